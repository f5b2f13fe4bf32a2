"""Measure the bundled model: retrieval of its pictures, VAE PSNR, and a contact sheet. Needs the renders of build.py.

    python scripts/emoji/build.py --work build/emoji fetch render captions
    python scripts/emoji/measure.py --work build/emoji                     # about 10 minutes on two CPU cores

Of 300 training captions, and of every held-out (style, concept) pair asked for by its name and style with three seeds: the share
whose generated picture's nearest render of the same style, by pixels at 24 x 24, is its own concept; at guidance 3 and 1. Of the
training captions, some with T5 padded to 256 tokens as stock diffusers does. The renders of both parts compete. Writes
build/emoji/eval/{results.json, *.png}.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from autoencoder import psnr
from PIL import Image

from latentfm import LatentFMPipeline, bundled_model
from latentfm.data.images import open_rgb, to_tensor
from latentfm.evaluation.retrieval import ranks
from latentfm.pictures import grid


def rows_of(folder: Path) -> list[dict]:
    lines = (folder / "metadata.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) | {"path": folder / json.loads(line)["file_name"]} for line in lines]


def pixels(images: list[Image.Image]) -> torch.Tensor:
    import numpy as np

    return torch.stack([to_tensor(np.asarray(image)) for image in images])


def generate(pipe: LatentFMPipeline, prompts: list[str], guidance: float, steps: int, t5_length: int, batch: int) -> list[Image.Image]:
    """One picture a prompt, seeded by its place."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        images += pipe(
            part, guidance_scale=guidance, num_inference_steps=steps, generator=seeds, max_sequence_length=t5_length
        ).images
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--model", type=Path, default=None, help="pipeline folder; the bundled model if not given")
    parser.add_argument("--captions", type=int, default=300, help="training captions to draw")
    parser.add_argument("--long", type=int, default=100, help="how many of them to draw with T5 padded to 256 as well")
    parser.add_argument("--seeds", type=int, default=3, help="pictures of each held-out pair")
    parser.add_argument("--only", choices=("train", "held_out"), help="one of the two parts; both if not given")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args()
    out = options.work / "eval"
    out.mkdir(parents=True, exist_ok=True)
    pipe = LatentFMPipeline.from_pretrained(options.model or bundled_model())
    pipe.set_progress_bar_config(disable=True)
    parts = {name: rows_of(options.work / "pictures" / name) for name in ("train", "held_out")}
    everything = parts["train"] + parts["held_out"]
    references = pixels([open_rgb(row["path"]) for row in everything])
    styles = [row["style"] for row in everything]
    place = {row["path"]: i for i, row in enumerate(everything)}
    results: dict[str, float] = {}
    # one caption with style words for each picture: without them the style would be anyone's guess
    chosen = {
        "train": [
            (row, random.Random(row["file_name"]).choice([c for c in row["text"] if row["style"] in c]))
            for row in random.Random(0).sample(parts["train"], options.captions)
        ],
        "held_out": [(row, f"{row['label']}, {row['style']} style") for row in parts["held_out"] * options.seeds],
    }
    with torch.no_grad():
        held = references[len(parts["train"]) :]
        ratios = psnr(pipe.vae, held)
        results["vae_psnr_held_out_mean"], results["vae_psnr_held_out_min"] = ratios.mean().item(), ratios.min().item()
    for part, pairs in chosen.items():
        if options.only not in (None, part):
            continue
        for guidance, length in ((3.0, 16), (1.0, 16), (3.0, 256), (1.0, 256)):
            if part == "held_out" and length == 256:
                continue
            used, prompts = zip(*(pairs if length == 16 else pairs[: options.long]))
            began = time.monotonic()
            images = generate(pipe, list(prompts), guidance, options.steps, length, options.batch)
            own = torch.tensor([place[row["path"]] for row in used])
            allowed = torch.tensor([[style == row["style"] for style in styles] for row in used])
            found = ranks(pixels(images), own, references, allowed)
            name = f"{part}_guidance_{guidance:g}_t5_{length}"
            results[name] = (found == 0).float().mean().item()
            results[f"{name}_top5"] = (found < 5).float().mean().item()
            first, five, seconds = results[name], results[f"{name}_top5"], time.monotonic() - began
            print(f"{name}: {first:.1%} first, {five:.1%} in five, of {len(used)}; {seconds:.0f} s", flush=True)
            sheet = [image for i in range(min(24, len(used))) for image in (open_rgb(used[i]["path"]), images[i])]
            labels = [label for i in range(min(24, len(used))) for label in ("render", prompts[i])]
            grid(sheet, columns=12, labels=labels).save(out / f"{name}.png")
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
