"""Whose files in a cache are believed, and what is to be said of who may write there."""

import os
import stat
from collections.abc import Collection, Sequence
from pathlib import Path

from latentfm.words import count, listed, shown

LISTINGS = "listings"  # the folder of what was read from files, see latentfm.data.cache.stat_cache


def anyone_writes(folder: Path) -> bool:
    """Whether every user may write into a folder of the cache, or into the cache that holds it."""
    return any(os.stat(place).st_mode & stat.S_IWOTH for place in (folder, folder.parent) if place.is_dir())


def rank_of(status: os.stat_result, open_to_all: bool) -> int | None:
    """How far a file of the cache is believed: 0 one's own or the administrator's, 1 another user's; None not at all.

    That is a file of another user where everybody may write.
    """
    if not hasattr(os, "geteuid") or status.st_uid in (os.geteuid(), 0):
        return 0
    return None if open_to_all else 1


def distrust(cache: Path, kinds: Sequence[Path], shards: Collection[Path], strange: Collection[Path]) -> list[str]:
    """What is to be said of a cache that others may write, or have written: of its folders, its `shards`, and the `strange` ones.

    A cache that a group shares is normal on a cluster, and used; what strangers may have put there is not.
    """
    folders = [folder for folder in (cache, *kinds) if folder.is_dir()]
    if not hasattr(os, "geteuid"):
        return []
    said = []
    for mode, who, way_out in ((stat.S_IWOTH, "everybody", "o-w"), (stat.S_IWGRP, "its group", "g-w")):
        wide = [folder for folder in folders if os.stat(folder).st_mode & mode]
        if wide:
            said.append(f"{listed(wide)} can be written by {who}, who can exchange what a training sees; chmod {way_out} prevents it")
            break
    others = {os.stat(path).st_uid for path in (*folders, *shards) if path.exists()} - {os.geteuid(), 0}
    if others:
        said.append(f"{shown(cache)} holds what other users made (uid {listed(sorted(others))}); it is used as it is")
    if strange:
        number = count(len(strange), "shard")
        said.append(f"{number} of the cache not used, being of another user where everybody may write: {listed(sorted(strange))}")
    return said
