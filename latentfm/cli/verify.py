"""`latentfm verify`: whether a saved folder is what was saved, to the byte; or a new manifest for one changed on purpose."""

from pathlib import Path
from typing import Annotated

import typer

from latentfm.errors import InputError
from latentfm.words import count, shown


def verify(
    folder: Annotated[Path, typer.Argument(help="A pipeline, transformer or LoRA folder.")],
    renew: Annotated[
        bool, typer.Option("--renew", help="Take the folder as it is now: write its manifest anew. Nothing else in it changes.")
    ] = False,
) -> None:
    """Compare every byte of a saved folder with its manifest, which holds the size and SHA-256 of each file as it was saved.

    Loading a folder looks at sizes and headers alone; generate and convert do the same as this with --verify. A folder that was changed on
    purpose, or comes from elsewhere, gets a manifest of its files as they are with --renew.
    """
    from latentfm.models.folder import read_index
    from latentfm.models.manifest import MANIFEST, check_manifest, files_of, read_manifest, write_manifest

    if not folder.is_dir():
        what = "is a file; give its folder" if folder.exists() else "does not exist"
        raise InputError(f"{shown(folder)} {what}")
    if not files_of(folder):
        raise InputError(f"{shown(folder)} is no model's or adapter's folder: it has no model_index.json, config.json or safetensors")
    if renew:
        if (folder / "model_index.json").is_file():
            read_index(folder)
        write_manifest(folder)
        print(f"{shown(folder / MANIFEST)}: {count(len(read_manifest(folder) or {}), 'file')} as they are now")
        return
    check_manifest(folder, verify=True)
    saved = read_manifest(folder) or {}
    print(f"{shown(folder)}: {count(len(saved), 'file')}, {sum(entry.size for entry in saved.values()):,} bytes, all as they were saved")
