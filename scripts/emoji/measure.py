"""Measure a model made by build.py: does it draw what is asked for, in words it knows, and in combinations it has never seen?

    python scripts/emoji/build.py --work build/emoji fetch catalogue render captions scenes
    python scripts/emoji/measure.py --work build/emoji --model build/emoji/long/model       # everything, at guidance 3 and 1
    python scripts/emoji/measure.py --work build/emoji --only vae --vae build/emoji/vae/model

Parts: `vae` (PSNR, SSIM and edge strength of held-out renders), `plain` (names without style words, against the plain style's renders),
`styled` (known style and concept), `pairs` (the held-out ones, three seeds; and how many of them another style's drawings would get),
`wordings` (the held-out synonyms), `composed` (scenes with held-out combinations). "First" means that of all renders of the style asked
for the right one is the nearest, by pixels at 24 x 24; shares come with Wilson's 95 % interval.
Writes WORK/eval/{results.json, PART-guidance.png}.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from captions import named
from english import article
from judge import Judge, features
from PIL import Image
from render import SIZE
from scenes import scene_from, vocabulary
from sets import PLAIN, Icon, read_catalogue

from latentfm.data.images import open_rgb
from latentfm.evaluation.intervals import wilson
from latentfm.pictures import grid

PARTS = ("vae", "plain", "styled", "pairs", "wordings", "composed")
SHOWN = 24  # pictures of a sheet


def share(right: list[bool]) -> dict[str, float]:
    """A share with its interval, as results.json has it."""
    low, high = wilson(sum(right) / len(right), len(right))
    return {"share": sum(right) / len(right), "low": low, "high": high, "of": len(right)}


class Renders:
    """All renders, by icon: what pictures of one thing are compared with."""

    def __init__(self, icons: list[Icon], pictures: Path):
        self.icons = icons
        paths = [pictures / ("held_out" if icon.held_out else "icons") / f"{icon.stem}.png" for icon in icons]
        self.features = features(open_rgb(path) for path in paths)
        self.path = dict(zip(icons, paths, strict=True))

    def compare(self, images: list[Image.Image], wanted: list[Icon]) -> dict:
        """How often the wanted render is the nearest of its style, and how far off it is in the mean."""
        place = {icon: i for i, icon in enumerate(self.icons)}
        distances = torch.cdist(features(images), self.features)
        right, far = [], []
        for row, icon in zip(distances, wanted, strict=True):
            same = torch.tensor([other.style == icon.style for other in self.icons])
            far.append(row[place[icon]].item())
            right.append(far[-1] <= row[same].min().item())
        by_style: dict[str, list[bool]] = defaultdict(list)
        for icon, one in zip(wanted, right, strict=True):
            by_style[icon.style].append(one)
        styles = {style: sum(found) / len(found) for style, found in by_style.items()}
        return share(right) | {"distance": sum(far) / len(far), "styles": styles}

    def borrowed(self) -> dict:
        """How often a held-out pair would be first if it were drawn just as another style draws that thing: for each style the
        one that serves it best. What can be known of a drawing that was never seen, but for what the style itself adds.
        """
        held_out = [icon for icon in self.icons if icon.held_out]
        of = {(icon.style, icon.code): self.features[i] for i, icon in enumerate(self.icons)}
        right, lenders = 0, {}
        for style in dict.fromkeys(icon.style for icon in held_out):
            mine = [icon for icon in held_out if icon.style == style]
            drawn = [icon for icon in self.icons if icon.style == style]
            looks = torch.stack([of[style, icon.code] for icon in drawn])
            served = {}
            for other in dict.fromkeys(icon.style for icon in self.icons if icon.style != style):
                both = [icon for icon in mine if (other, icon.code) in of]
                if not both:
                    continue
                nearest = torch.cdist(torch.stack([of[other, icon.code] for icon in both]), looks).argmin(1).tolist()
                served[other] = sum(drawn[i] == icon for i, icon in zip(nearest, both, strict=True))
            best = max(served, key=served.__getitem__)
            right, lenders[style] = right + served[best], {best: served[best] / len(mine)}
        return {"share": right / len(held_out), "of": len(held_out), "styles": lenders}


def requests(part: str, icons: list[Icon], pictures: Path, number: int) -> list[tuple[str, Icon]]:
    """(prompt, icon that it should look like) of a part about single things, at most `number` or all of what is held out."""
    rng = random.Random(part)
    plain = {icon.code: icon for icon in icons if icon.style == PLAIN}
    held_out = json.loads((pictures / "held_out.json").read_text("utf-8"))
    if part == "plain":
        return [(article(named(icon)), icon) for icon in rng.sample(sorted(plain.values(), key=lambda icon: icon.code), number)]
    if part == "styled":
        known = [icon for icon in icons if not icon.held_out]
        return [(f"{icon.label}, {icon.style} style", icon) for icon in rng.sample(known, number)]
    if part == "pairs":
        return [(f"{icon.label}, {icon.style} style", icon) for icon in icons if icon.held_out] * 3
    return [(article(name), plain[code]) for code, row in held_out["synonyms"].items() for name in row["names"]] * 3


def draw(pipe, prompts: list[str], guidance: float, steps: int, batch: int) -> list[Image.Image]:
    """One picture a prompt, seeded by its place, brought to the renders' SIZE."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images += pipe(part, guidance_scale=guidance, num_inference_steps=steps, generator=seeds).images
    return [image.resize((SIZE, SIZE)) for image in images]


def composed(images: list[Image.Image], rows: list[dict], judge: Judge) -> dict:
    """Of each kind of combination, how often all of the picture is right, and each side of it."""
    found: dict[str, list[bool]] = defaultdict(list)
    for image, row in zip(images, rows, strict=True):
        for name, right in judge.verdict(image, scene_from(row)).items():
            found[f"{row['kind']} {name}"].append(right)
    return {name: share(right) for name, right in found.items()}


def spread(rows: list[dict], each: int) -> list[dict]:
    """The first `each` rows of every kind."""
    seen: dict[str, int] = defaultdict(int)
    kept = []
    for row in rows:
        seen[row["kind"]] += 1
        if seen[row["kind"]] <= each:
            kept.append(row)
    return kept


def measured_vae(folder: Path, pictures: Path) -> dict:
    """Means over the held-out renders: PSNR in dB and the worst, SSIM, and edges as a share of the renders' own."""
    from diffusers import AutoencoderKL

    from latentfm.data.images import to_tensor
    from latentfm.training.vae.quality import measures, reconstructed

    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    renders = torch.stack([to_tensor(np.asarray(open_rgb(path))) for path in sorted((pictures / "held_out").glob("*.png"))])
    parts = []
    for part in renders.split(64):
        output, mean, logvar = reconstructed(vae, part)
        parts.append(measures(output, part, mean, logvar))
    found = {name: torch.cat([part[name] for part in parts]) for name in ("psnr", "ssim", "edges")}
    return {name: value.mean().item() for name, value in found.items()} | {"worst_psnr": found["psnr"].min().item(), "of": len(renders)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--model", type=Path, help="pipeline folder; WORK/long/model if not given")
    parser.add_argument("--vae", type=Path, help="the VAE's folder; the model's own if not given")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    parser.add_argument("--number", type=int, default=500, help="prompts of plain and of styled; a fifth of it of each kind of composed")
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 1.0])
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    pictures, out, model = given.work / "pictures", given.work / "eval", given.model or given.work / "long" / "model"
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {}

    def note(name: str, found: Callable[[], dict]) -> None:
        began = time.monotonic()
        results[name] = found()
        print(f"{name} ({time.monotonic() - began:.0f} s): {json.dumps(results[name])}", flush=True)
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    if "vae" in given.only:
        note("vae", lambda: measured_vae(given.vae or model / "vae", pictures))
    if set(given.only) == {"vae"}:
        return
    from latentfm import LatentFMPipeline

    pipe = LatentFMPipeline.from_pretrained(model, torch_dtype=getattr(torch, given.dtype))
    pipe.set_progress_bar_config(disable=True)
    icons, _ = read_catalogue(given.work / "catalogue.jsonl.gz")
    renders = Renders(icons, pictures)
    if "pairs" in given.only:
        note("pairs as another style draws them", renders.borrowed)

    def single(part: str, guidance: float) -> dict:
        wanted = requests(part, icons, pictures, given.number)
        images = draw(pipe, [prompt for prompt, _ in wanted], guidance, given.steps, given.batch)
        shown = [(image, prompt) for image, (prompt, _) in zip(images[:SHOWN], wanted, strict=False)]
        beside = [each for (image, prompt), (_, icon) in zip(shown, wanted, strict=False) for each in
                  ((open_rgb(renders.path[icon]), "render"), (image, prompt))]  # fmt: skip
        grid([image for image, _ in beside], columns=12, labels=[label for _, label in beside]).save(out / f"{part}-{guidance:g}.png")
        return renders.compare(images, [icon for _, icon in wanted])

    def several(guidance: float) -> dict:
        lines = (pictures / "composed_held_out" / "metadata.jsonl").read_text("utf-8").splitlines()
        rows = spread([json.loads(line) for line in lines], given.number // 5)
        things = vocabulary(icons, pictures / "large")[PLAIN]
        large = {thing.code: pictures / "large" / f"{PLAIN}-{thing.code.lower()}.png" for thing in things}
        judge = Judge({code: Image.open(path).convert("RGBA") for code, path in large.items()})
        images = draw(pipe, [row["text"][0] for row in rows], guidance, given.steps, given.batch)
        shown = range(0, len(images), max(1, len(images) // SHOWN))
        grid([images[i] for i in shown], columns=8, labels=[rows[i]["text"][0] for i in shown]).save(out / f"composed-{guidance:g}.png")
        return composed(images, rows, judge)

    with torch.no_grad():
        for guidance in given.guidance:
            for part in given.only:
                if part == "composed":
                    note(f"composed, guidance {guidance:g}", lambda guidance=guidance: several(guidance))
                elif part != "vae":
                    note(f"{part}, guidance {guidance:g}", lambda part=part, guidance=guidance: single(part, guidance))


if __name__ == "__main__":
    main()
