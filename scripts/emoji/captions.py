"""What is said of a picture of one thing: names, synonyms, short sentences, with style words and without. Used by build.py.

A caption without style words is drawn in one style (sets.PLAIN), so that a plain prompt has one answer; half of what is trained
on has none. A tenth of the synonyms is never said (holdouts.synonym) and kept for the examination.
"""

import json
import os
import random
import shutil
from collections import defaultdict
from pathlib import Path

import holdouts
from english import article
from sets import PLAIN, Icon

PORTIONS = ("slice", "piece", "bowl", "glass", "cup", "pot", "bottle", "box", "pair")
PLAIN_SENTENCES = (
    "{a}", "{bare}", "{a}", "a picture of {a}", "an emoji of {a}", "an icon of {a}", "a drawing of {a}", "draw {a}", "this is {a}",
    "{a}, please", "here is {a}", "I want {a}", "just {a}", "there is {a}", "show me {a}", "a nice picture of {a}",
)  # fmt: skip
STYLED_SENTENCES = (
    "{bare}, {style} style", "{a}, {style} style", "{style} emoji of {a}", "{bare}, {style}", "{a} in {style} style",
    "{style} style {bare}", "{a} drawn in {style} style", "draw {a} in {style} style", "a picture of {a}, {style} style", "{a}, {style}",
)  # fmt: skip
EACH = {True: 12, False: 8}  # captions of a picture: without style words, with them
REPEATED_TAGS = 3  # a tag that more concepts have than this says too little to stand alone


def named(icon: Icon) -> str:
    """The concept's own name as a noun phrase: "slice of pizza" where a tag says that it is a portion."""
    portion = next((tag for tag in icon.tags if tag in PORTIONS), None)
    return f"{portion} of {icon.label}" if portion and portion not in icon.label else icon.label


def words(icon: Icon, held_out: bool = False) -> tuple[list[str], list[str]]:
    """(names, tags) beside the concept's own, of which the held-out ones are either left out or all there is."""
    label = icon.label.split()
    tags = [tag for tag in icon.tags if tag not in (icon.label, *label, *icon.names) and any(map(str.isalnum, tag))]
    return tuple([word for word in of if holdouts.synonym(icon.code, word) == held_out] for of in (icon.names, tags))


def captions(icon: Icon, shared: dict[str, int], plain: bool) -> list[str]:
    """EACH captions of a picture or somewhat fewer or more, fixed by the icon alone: `plain` without style words, or each with them.

    `shared` says how many concepts have a tag: a rare one may stand alone, any may stand beside the name.
    """
    rng = random.Random(f"{icon.style}/{icon.code}/{plain}")
    names, tags = words(icon)
    own = list(dict.fromkeys([named(icon), icon.label]))
    telling = [tag for tag in tags if shared[tag] <= REPEATED_TAGS]
    nouns = own * 3 + names * 2 + [f"{tag} {icon.label}" for tag in rng.sample(tags, min(2, len(tags)))]
    sentences = PLAIN_SENTENCES if plain else STYLED_SENTENCES
    found = [sentence.format(a=article(own[0]), bare=icon.label, style=icon.style) for sentence in sentences[:2]]
    found += [sentences[0].format(a=article(name), bare=name, style=icon.style) for name in names]
    rng.shuffle(telling)
    for few in (telling[:1], telling[:3], rng.sample(tags, min(3, len(tags)))):
        if len(few) > 1 or (few and shared[few[0]] == 1):
            found.append(" ".join(few) if plain else f"{' '.join(few)}, {icon.style} style")
    while len(found) < EACH[plain]:
        noun = rng.choice(nouns)
        found.append(rng.choice(sentences).format(a=article(noun), bare=noun, style=icon.style))
    return list(dict.fromkeys(found))


def counted_tags(icons: list[Icon]) -> dict[str, int]:
    """How many concepts have each tag."""
    codes = defaultdict(set)
    for icon in icons:
        for tag in icon.tags:
            codes[tag].add(icon.code)
    return {tag: len(have) for tag, have in codes.items()}


def write_rows(folder: Path, rows: list[dict]) -> None:
    """The rows as metadata.jsonl of `folder`, whole or not at all."""
    partial = folder / "metadata.partial"
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    os.replace(partial, folder / "metadata.jsonl")


def row_of(icon: Icon, text: list[str]) -> dict:
    return {"file_name": f"{icon.stem}.png", "text": text, "style": icon.style, "label": icon.label, "code": icon.code}


def write_captions(icons: list[Icon], pictures: Path) -> None:
    """Write styled/ and plain/ (links to the pictures of icons/, with captions), held_out/'s captions, and held_out.json."""
    shared = counted_tags(icons)
    for part, plain in (("styled", False), ("plain", True)):
        shutil.rmtree(pictures / part, ignore_errors=True)
        (pictures / part).mkdir()
        shown = [icon for icon in icons if not icon.held_out and (icon.style == PLAIN or not plain)]
        for icon in shown:
            os.link(pictures / "icons" / f"{icon.stem}.png", pictures / part / f"{icon.stem}.png")
        write_rows(pictures / part, [row_of(icon, captions(icon, shared, plain)) for icon in shown])
    lost = [icon for icon in icons if icon.held_out]
    write_rows(pictures / "held_out", [row_of(icon, [f"{icon.label}, {icon.style} style"]) for icon in lost])
    unsaid = {}
    for icon in icons:
        if icon.style == PLAIN:
            names, tags = words(icon, held_out=True)
            unsaid[icon.code] = {"label": icon.label, "names": names, "tags": [tag for tag in tags if shared[tag] == 1]}
    said = {
        "pairs": [{"style": icon.style, "code": icon.code, "label": icon.label} for icon in lost],
        "synonyms": {code: row for code, row in unsaid.items() if row["names"] or row["tags"]},
        "combinations": f"holdouts.combination, {holdouts.COMBINATION_SHARE:.0%} by hash; those that are asked for are composed_held_out's",
    }
    (pictures / "held_out.json").write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", "utf-8")
