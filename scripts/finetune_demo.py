"""Fine-tune the bundled model on 40 pictures of something it has never seen, and show samples before and after.

    python scripts/finetune_demo.py --out runs/zorp        # minutes on two CPU cores

Draws a small creature, the zorp, in ten colours and four moods, writes captions beside the pictures, runs
`latentfm train --config configs/quickstart.yaml` for 200 steps, and puts pictures of the same prompts and seeds by
the model before and after side by side into OUT/before_after.png: prompts it was trained on, a mood and a colour it never saw
together, and a prompt from before, to see what was forgotten.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from latentfm import LatentFMPipeline, bundled_model
from latentfm.pictures import grid

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {
    "red": "#e5484d", "orange": "#f5a524", "yellow": "#f7d948", "green": "#46a758", "blue": "#3e63dd",
    "purple": "#8e4ec6", "pink": "#e93d82", "brown": "#8d6e63", "grey": "#8b8d98", "black": "#30323a",
}  # fmt: skip
MOODS = ("happy", "sad", "surprised", "sleepy", "angry")
UNSEEN = {("red", "angry"), ("blue", "happy"), ("green", "sad"), ("yellow", "sleepy"), ("pink", "surprised")}
PROMPTS = ["a happy red zorp", "a sad purple zorp", "a sleepy green zorp", "a surprised orange zorp",
           "a happy blue zorp", "a sad green zorp", "a slice of pizza", "a red apple, flat style"]  # fmt: skip


def zorp(colour: str, mood: str, side: int = 128) -> Image.Image:
    """A picture of a zorp: a round body, two antennae, three legs, one eye, and a mouth that shows its mood."""
    scale = 8
    image = Image.new("RGB", (64 * scale, 64 * scale), "white")
    pen = ImageDraw.Draw(image)

    def at(*values: float) -> list[float]:
        return [value * scale for value in values]

    fill, ink = COLOURS[colour], "#1c1c1c" if colour != "black" else "#000000"
    for x, tip in ((24, 18), (40, 46)):
        pen.line(at(x, 20, tip, 7), fill=fill, width=3 * scale)
        pen.ellipse(at(tip - 3.5, 3, tip + 3.5, 10), fill=fill)
    for x in (20, 32, 44):
        pen.rounded_rectangle(at(x - 3.5, 46, x + 3.5, 61), radius=3 * scale, fill=fill)
    pen.ellipse(at(10, 14, 54, 54), fill=fill)
    pen.ellipse(at(23, 20, 41, 38), fill="white")
    if mood == "sleepy":
        pen.chord(at(23, 20, 41, 38), 180, 360, fill=fill)
        pen.line(at(23, 29, 41, 29), fill=ink, width=2 * scale)
    else:
        small = 3.5 if mood == "surprised" else 5
        pen.ellipse(at(32 - small, 29 - small, 32 + small, 29 + small), fill=ink)
    if mood == "angry":
        pen.line(at(22, 19, 42, 24), fill=ink, width=3 * scale)
    if mood == "happy":
        pen.chord(at(24, 36, 40, 50), 0, 180, fill="#ffffff")
    elif mood == "sad":
        pen.arc(at(25, 43, 39, 55), 190, 350, fill="#ffffff", width=2 * scale)
    elif mood == "surprised":
        pen.ellipse(at(28.5, 41, 35.5, 49), fill="#ffffff")
    else:
        pen.line(at(27, 45, 37, 45), fill="#ffffff", width=2 * scale)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def write_dataset(folder: Path) -> int:
    """Writes the pictures with captions; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(c, m) for c in COLOURS for m in MOODS if (c, m) not in UNSEEN][:40]
    for colour, mood in wanted:
        zorp(colour, mood).save(folder / f"{mood}-{colour}.png")
        (folder / f"{mood}-{colour}.txt").write_text(f"a {mood} {colour} zorp\na zorp, {colour}, {mood}\n", "utf-8")
    return len(wanted)


def draw(model: Path) -> list[Image.Image]:
    pipe = LatentFMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS, guidance_scale=3.0, generator=[torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]).images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/zorp"))
    options = parser.parse_args()
    print(f"{write_dataset(options.out / 'pictures')} pictures in {options.out / 'pictures'}")
    before = draw(bundled_model())
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "latentfm", "train", "--config", str(ROOT / "configs" / "quickstart.yaml"),
         f"data.folder={options.out / 'pictures'}", f"output.folder={options.out / 'run'}"], check=True,
    )  # fmt: skip
    print(f"200 steps in {time.monotonic() - began:.0f} s, start-up included")
    after = draw(options.out / "run" / "model")
    grid([*before, *after], columns=len(PROMPTS), labels=[*PROMPTS, *("after" for _ in PROMPTS)]).save(options.out / "before_after.png")
    print(options.out / "before_after.png")


if __name__ == "__main__":
    main()
