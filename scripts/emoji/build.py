"""Build the bundled model from nothing: eight emoji sets in, assets/emoji out.

    pip install -e ".[test]"                                   # brings resvg_py; npm is needed too, for the fetch
    python scripts/emoji/build.py --work build/emoji           # every stage in order; hours on two CPU cores
    python scripts/emoji/build.py --work build/emoji vae text  # some stages; each goes on where it was interrupted
    bash scripts/gpu/kit.sh bundled                            # render to mmdit on a GPU: half an hour (scripts/gpu/part_bundled.py)

Stages: fetch (npm packages) -> catalogue (every icon with its names, one file) -> render (PNG) -> captions -> scenes (composed
pictures) -> vae -> text (three encoders) -> base (those as a pipeline folder without network) -> mmdit (`latentfm train --config
configs/emoji.yaml`) -> further (more of scenes) -> styles (more of styles) -> long (a little more, with T5 padded as stock diffusers
pads it) -> export (half precision, into assets/).
`python scripts/emoji/measure.py` then measures the result. Seeds are fixed; a stage that is done is not done again, one that was
interrupted goes on.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import encoders
import sets
import yaml
from captions import write_captions, write_rows
from pairs import Pairs, opened
from render import write_pictures
from scenes import write_scenes
from synonyms import THINGS, WordNet

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("fetch", "catalogue", "render", "captions", "scenes", "vae", "text", "base", "mmdit", "further", "styles", "long", "export")
VAE = (  # options of `latentfm train-vae`
    "model.widths=[32, 64, 128, 192]", "model.layers=1", "model.latent_channels=16", "model.norm_groups=16",
    "data.size=64", "data.crop=random", "data.flip=true", "data.random_background=0.3", "data.permute_colours=0.05",
    "train.batch_size=16", "train.weight_decay=1e-4", "train.compile=true", "loss.l1=1", "loss.l2=10", "loss.edges=0.5",
    "train.steps=8000", "train.learning_rate=8e-4", "loss.kl=3.6e-3", "loss.kl_warmup=1000", "validation.every=2000",
    "output.dtype=float16",
)  # fmt: skip
SCENES, EXAMINED = 48_000, 200  # composed pictures to learn, and of each kind of combination to be examined in
TEXT_STEPS = 3000  # of each encoder
TOKENIZERS = {"t5": "tokenizer_3", "clip": "tokenizer", "open_clip": "tokenizer_2"}  # written last, when an encoder is done
SHORT, LONG = encoders.LENGTH, 256  # T5 lengths: the model's own, and what stock diffusers pads to


def fetch(work: Path) -> None:
    sets.fetch(work / "npm")


def catalogue(work: Path) -> None:
    """Write the icons, and which words mean the same, each as one file: all that the later stages need of what was fetched."""
    sets.write_catalogue(work / "npm", work / "catalogue.jsonl.gz")
    icons, _ = sets.read_catalogue(work / "catalogue.jsonl.gz")
    words = {word for icon in icons for word in (icon.label, *icon.names, *icon.tags)}
    meanings = [texts for texts in WordNet(work / "npm" / "wordnet" / "dict").meanings(THINGS) if words & set(texts)]
    (work / "meanings.json").write_text(json.dumps(meanings) + "\n", "utf-8")


def render(work: Path) -> None:
    write_pictures(*sets.read_catalogue(work / "catalogue.jsonl.gz"), work / "pictures")


def captions(work: Path) -> None:
    write_captions(sets.read_catalogue(work / "catalogue.jsonl.gz")[0], work / "pictures")


def scenes(work: Path) -> None:
    write_scenes(sets.read_catalogue(work / "catalogue.jsonl.gz")[0], work / "pictures", SCENES, EXAMINED)


def vae(work: Path) -> None:
    """Train the VAE with this package's own trainer, or go on with it; the held-out renders are those of its report."""
    if not (work / "vae" / "model" / "config.json").exists():
        subprocess.run(vae_command(work), check=True, cwd=ROOT)


def vae_command(work: Path, *more: str) -> list[str]:
    """The command that trains the VAE, or goes on with it; `more` are further overrides."""
    folders = {"data.folder": work / "pictures" / "vae", "validation.folder": work / "pictures" / "held_out"}
    folders |= {"data.cache": work / "cache", "output.folder": work / "vae"}
    options = [*VAE, *more, *(f"{option}={folder}" for option, folder in folders.items()), *resumed(work / "vae")]
    return [sys.executable, "-m", "latentfm", "train-vae", *options]


def resumed(run: Path) -> list[str]:
    """["--resume"] where the run in a folder has begun."""
    from latentfm.training.checkpoint.storage import checkpoints

    return ["--resume"] if checkpoints(run / "checkpoints") else []


def latents_of(paths: list[Path], folder: Path):
    """Pictures as the MM-DiT sees them: the VAE's mean latents, shifted and scaled, half precision [N, 16, 16, 16]."""
    import torch
    from diffusers import AutoencoderKL

    from latentfm.data.images import to_tensor

    model = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).to(encoders.DEVICE)
    pictures, means = opened(paths), []
    with torch.no_grad(), torch.autocast(encoders.DEVICE, torch.bfloat16):
        while some := list(islice(pictures, 64)):
            batch = torch.stack([to_tensor(picture) for picture in some]).to(encoders.DEVICE)
            means.append(model.encode(batch).latent_dist.mean.float().cpu())
    return ((torch.cat(means) - model.config.shift_factor) * model.config.scaling_factor).half()


def text_encoder(work: Path, name: str, threads: int) -> None:
    """Train one of the three text encoders."""
    import torch

    torch.set_num_threads(threads)
    pairs, out = Pairs(work / "pictures", json.loads((work / "meanings.json").read_text("utf-8"))), work / "text"
    if name == "clip":
        encoders.train_clip(pairs, out, TEXT_STEPS, batch=256, seed=1)
    elif name == "open_clip":
        encoders.train_open_clip(pairs, out, TEXT_STEPS, batch=256, seed=2)
    else:
        encoders.train_t5(pairs, latents_of(pairs.paths, work / "vae" / "model"), out, TEXT_STEPS, batch=128, seed=3)


def text(work: Path) -> None:
    """Train the text encoders two at a time, each on half the cores: their matrices are too small to share."""
    missing = [name for name, folder in TOKENIZERS.items() if not (work / "text" / folder / "tokenizer_config.json").exists()]
    threads = max(1, (os.cpu_count() or 2) // 2)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(text_encoder, work, name, threads) for name in missing]:
            done.result()


def base_of(folder: Path, work: Path) -> None:
    """Take the frozen models of a finished pipeline `folder` in the place of those that `vae`, `text` and `base` make."""
    shutil.rmtree(work / "base", ignore_errors=True)
    shutil.copytree(folder, work / "base", ignore=shutil.ignore_patterns("transformer", "README.md"))


def base(work: Path) -> None:
    """Put the frozen models together as a pipeline folder, with the null condition at both T5 lengths."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from latentfm.interchange.components import load_text_encoders
    from latentfm.models.text import NullCondition

    folder = work / "base"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / "text", folder, ignore=shutil.ignore_patterns("clip", "open_clip", "t5"))  # their checkpoints
    shutil.copytree(work / "vae" / "model", folder / "vae", ignore=shutil.ignore_patterns("latentfm*"))  # a folder's own notes
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    index |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "vae": ["diffusers", "AutoencoderKL"]}
    for suffix, model, tokenizer in (
        ("", "CLIPTextModelWithProjection", "CLIPTokenizer"),
        ("_2", "CLIPTextModelWithProjection", "CLIPTokenizer"),
        ("_3", "T5EncoderModel", "T5Tokenizer"),
    ):
        index[f"text_encoder{suffix}"] = ["transformers", model]
        index[f"tokenizer{suffix}"] = ["transformers", tokenizer]
    index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    widths = encoders.T5_WIDTH, sum(encoders.CLIP_WIDTHS)
    null = NullCondition(load_text_encoders(folder, *widths))
    for length in (SHORT, LONG):
        null.parts(length)
    null.save(folder)
    info = {"format": 1, "name": "emoji", "max_sequence_length": SHORT, "steps": 8, "guidance": 2.0}
    (folder / "latentfm.json").write_text(json.dumps(info, indent=2) + "\n", "utf-8")


def mmdit(work: Path) -> None:
    """Train the network by this package's own trainer, with the options of configs/emoji.yaml."""
    if not finished(work, "mmdit"):
        subprocess.run(training_command(work), check=True, cwd=ROOT)


def further(work: Path) -> None:
    """Go on with more of scenes, 55 % of what is drawn; plain pictures, which are known by heart by then, are a tenth."""
    go_on(work, "further", "mmdit", {"plain": 1.4, "styled": 0.8, "scenes": 0.2}, 4000, seed=1)


def styles(work: Path) -> None:
    """Go on with more of styles, half of what is drawn; 40 % are scenes."""
    go_on(work, "styles", "further", {"plain": 1.43, "styled": 1.2, "scenes": 0.15}, 3000, seed=2)


def go_on(work: Path, stage: str, after: str, weights: dict[str, float], steps: int, seed: int) -> None:
    """Go on with the network of the stage before at half its rate and a quarter of its batch, with other shares of the pictures."""
    if finished(work, stage):
        return
    sources = [{"path": str(work / "pictures" / part), "weight": weight} for part, weight in weights.items()]
    own = [f"data.sources={json.dumps(sources)}", f"train.steps={steps}", "train.batch_size=128", "train.gradient_accumulation=2"]
    own += ["train.learning_rate=1.2e-3", "train.warmup_steps=100", f"train.seed={seed}"]
    subprocess.run(training_command(work, *own, folder=stage, after=after), check=True, cwd=ROOT)


def long(work: Path) -> None:
    """Go on for a little with T5 padded to LONG tokens, on some captions of everything: all of them would be 20 GB in the cache."""
    folder = work / "pictures" / "long"
    if finished(work, "long"):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = []
    for part, every, texts in (("plain", 1, 3), ("styled", 4, 1), ("scenes", 4, 1)):
        for line in (work / "pictures" / part / "metadata.jsonl").read_text("utf-8").splitlines()[::every]:
            row = json.loads(line)
            name = f"{part}-{row['file_name']}"
            os.link(work / "pictures" / part / row["file_name"], folder / name)
            rows.append({"file_name": name, "text": row["text"][:texts]})
    write_rows(folder, rows)
    own = [f"data.sources={json.dumps([{'path': str(folder)}])}", f"data.t5_lengths={{{SHORT}: 0.7, {LONG}: 0.3}}"]
    own += ["train.steps=200", "train.batch_size=64", "train.gradient_accumulation=1", "train.learning_rate=2e-4"]
    own += ["train.warmup_steps=20", "train.decay=cosine", "train.t_shift=2.5"]
    subprocess.run(training_command(work, *own, folder="long", after="styles"), check=True, cwd=ROOT)


def finished(work: Path, stage: str) -> bool:
    return (work / stage / "model" / "model_index.json").exists()


def training_command(work: Path, *more: str, folder: str = "mmdit", after: str | None = None) -> list[str]:
    """The command that trains the MM-DiT in a folder of `work`, or goes on with it; `more` are further overrides.

    It begins with the network that the stage `after` ended with, or, without one, from nothing on the frozen models.
    """
    config = ROOT / "configs" / "emoji.yaml"
    sources = yaml.safe_load(config.read_text("utf-8"))["data"]["sources"]
    there = [source | {"path": str(work / Path(source["path"]).relative_to("build/emoji"))} for source in sources]
    folders = {"data.cache": work / "cache", "output.folder": work / folder}
    folders["model.pipeline"] = work / after / "model" if after else work / "base"
    command = [sys.executable, "-m", "latentfm", "train", "--config", str(config)]
    if not any(option.startswith("data.sources=") for option in more):  # a list that is given twice has the values of both
        command.append(f"data.sources={json.dumps(there)}")
    begun = ["model.preset="] if after else []  # the network is there
    return [*command, *(f"{option}={place}" for option, place in folders.items()), *begun, *more, *resumed(work / folder)]


def export(work: Path) -> None:
    """Put the finished pipeline into assets/emoji; the model card there is kept."""
    from latentfm.models.folder import write_stock_names
    from latentfm.models.manifest import write_manifest

    target = ROOT / "assets" / "emoji"
    card = (target / "README.md").read_text("utf-8") if (target / "README.md").exists() else None
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(work / "long" / "model", target)
    write_stock_names(target)
    write_manifest(target)
    if card is not None:
        (target / "README.md").write_text(card, "utf-8")
    total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {total / 2**20:.1f} MiB")
    if total > 62 * 2**20:  # and the detector 1.2 MB: under 64 MB of assets
        raise SystemExit("the bundled model must stay under 62 MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}; all of them if none is named")
    parser.add_argument("--work", type=Path, default=Path("build/emoji"), help="where downloads, renders, caches and checkpoints go")
    options = parser.parse_args()
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    work = options.work.resolve()
    for stage in STAGES:
        if not options.stages or stage in options.stages:
            print(f"== {stage}", flush=True)
            globals()[stage](work)


if __name__ == "__main__":
    main()
