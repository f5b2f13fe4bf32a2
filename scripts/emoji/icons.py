"""The bundled model's data: three open emoji sets, rendered and captioned. Used by build.py.

Sets (npm): @iconify-json/noto (Apache-2.0), @iconify-json/fluent-emoji-flat (MIT), @iconify-json/twemoji (CC BY 4.0);
names and synonyms: emojibase-data (MIT). People and flags are left out.
"""

import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojibase": "emojibase-data@17.0.0",
}
STYLES = ("noto", "fluent", "twemoji")
GROUPS = (0, 3, 4, 5, 6, 7, 8)  # emojibase: smileys, animals, food, travel, activities, objects, symbols
SIZE = 64
VAE_SIZES = (64, 96)  # the VAE also sees crops of larger renders
HELD_OUT = 0.05
PORTIONS = ("slice", "piece", "bowl", "glass", "cup", "pot", "bottle", "box", "pair")


@dataclass(frozen=True)
class Icon:
    """One picture: a concept (an emoji code point sequence) drawn in one style."""

    style: str
    code: str
    label: str
    tags: tuple[str, ...]
    svg: str
    held_out: bool

    @property
    def stem(self) -> str:
        return f"{self.style}-{self.code.lower()}"


def fetch(folder: Path) -> None:
    """Download the four npm packages (exact versions) and unpack them under `folder`."""
    if shutil.which("npm") is None:
        raise SystemExit("npm is needed to fetch the emoji sets: install Node.js, then run this stage again")
    for name, spec in PACKAGES.items():
        if (folder / name / "package.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", spec, "--silent"], cwd=folder, check=True, capture_output=True, text=True
        )
        archive = folder / packed.stdout.strip().splitlines()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(folder / f"{name}.partial", filter="data")
        (folder / f"{name}.partial" / "package").rename(folder / name)
        (folder / f"{name}.partial").rmdir()
        archive.unlink()


def plain_code(code: str) -> str:
    """The code point sequence without variation selectors, which the sets write differently."""
    return "-".join(part for part in code.upper().split("-") if part not in ("FE0F", "FE0E"))


def clean(label: str) -> str:
    return re.sub(r"\s+", " ", label.replace("“", "").replace("”", "").replace("’", "'").replace(":", "")).strip().lower()


def catalogue(folder: Path) -> list[Icon]:
    """Every icon of the three sets, in a fixed order, with its held-out mark.

    5 % of the (style, concept) pairs are held out by a hash; a concept never loses more than one of its styles.
    """
    entries = json.loads((folder / "emojibase" / "en" / "data.json").read_text("utf-8"))
    sets = {}
    for style in STYLES:
        icons = json.loads((folder / style / "icons.json").read_text("utf-8"))
        chars = json.loads((folder / style / "chars.json").read_text("utf-8"))
        sets[style] = (icons, {plain_code(code): name for code, name in chars.items()})
    found = []
    for entry in entries:
        if entry.get("group") not in GROUPS:
            continue
        code = plain_code(entry["hexcode"])
        drawn = []
        for style in STYLES:
            icons, names = sets[style]
            icon = icons["icons"].get(names.get(code, ""))
            if icon is not None:
                width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
                left, top = icon.get("left", 0), icon.get("top", 0)
                svg = (
                    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                    f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
                )
                drawn.append((style, svg))
        draws = {s: int(hashlib.sha256(f"{s}/{code}".encode()).hexdigest()[:8], 16) / 2**32 for s, _ in drawn}
        lowest = min(draws, key=draws.get) if len(drawn) > 1 else None
        for style, svg in drawn:
            held = style == lowest and draws[style] < HELD_OUT
            tags = tuple(clean(tag) for tag in entry.get("tags", ()))
            found.append(Icon(style, code, clean(entry["label"]), tags, svg, held))
    return found


def render(icon: Icon, size: int) -> Image.Image:
    """The icon as an RGBA image of size x size pixels, centred if it is not square."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=icon.svg, width=size, height=size))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.size != (size, size):
        canvas = Image.new("RGBA", (size, size))
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = canvas
    return image


def on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def article(label: str) -> str:
    return f"an {label}" if label[0] in "aeiou" else f"a {label}"


def captions(icon: Icon) -> list[str]:
    """Five captions: the plain name, names with style words, and synonyms; fixed by the icon alone."""
    rng = random.Random(f"{icon.style}/{icon.code}")
    label, style = icon.label, icon.style
    named = article(label)
    portion = next((tag for tag in icon.tags if tag in PORTIONS), None)
    if portion and portion not in label:
        named = f"a {portion} of {label}"
    tags = [tag for tag in icon.tags if tag != label and tag not in label.split()]
    rng.shuffle(tags)
    found = [f"{label}, {style} style", named, rng.choice((f"{named}, {style} style", f"{style} emoji of {named}"))]
    if tags:
        found.append(f"{tags[0]} {label}, {style} style")
        found.append(f"{' '.join(tags[:3])}, {style} style" if len(tags) > 1 else f"{label} {tags[0]}, {style}")
    else:
        found.append(f"{label}, {style}")
    return list(dict.fromkeys(found))


def write_pictures(icons: list[Icon], folder: Path) -> None:
    """Write vae/ (RGBA, all training renders), train/ and held_out/ (RGB on white, 64 px); a whole folder or none."""
    if (folder / "done").exists():
        return
    for name in ("vae", "train", "held_out"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    for icon in icons:
        if not icon.held_out:
            for size in VAE_SIZES:
                render(icon, size).save(folder / "vae" / f"{icon.stem}-{size}.png")
        part = "held_out" if icon.held_out else "train"
        on_white(render(icon, SIZE)).save(folder / part / f"{icon.stem}.png")
    (folder / "done").write_text(f"{len(icons)}\n")


def write_captions(icons: list[Icon], folder: Path) -> None:
    """Write metadata.jsonl beside the pictures of train/ and held_out/."""
    for part in ("train", "held_out"):
        rows = [
            {"file_name": f"{icon.stem}.png", "text": captions(icon), "style": icon.style, "label": icon.label}
            for icon in icons
            if icon.held_out == (part == "held_out")
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / part / "metadata.jsonl").write_text(text, "utf-8")
