"""The bundled model trained on a GPU, by the stages of scripts/emoji/build.py from `render` to `mmdit`.

    bash scripts/gpu/kit.sh bundled          # again and again: it goes on where it was; stopped and saved before the time is up
    KIT_LAST=1 bash scripts/gpu/kit.sh bundled     # the last call: the network's steps end, and its rate falls, within what is left of it
    python scripts/gpu/part_bundled.py --join DIR  # where the pieces are: puts the pipeline folder together again

Renders and scenes are made there from the packed icons, the frozen models too, unless KIT_FROZEN=packed takes those that `prepare` found;
the pipeline (averages, half precision) comes back as pieces of 15 MiB beside bundled.json, with a sheet of pictures through time.
"""

import argparse
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from cells import DEVICE, SHRUNK, Cells

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emoji"))
import build  # noqa: E402, isort: skip

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(os.environ.get("KIT_EMOJI", tempfile.gettempdir() + ("/latentfm-emoji-shrunk" if SHRUNK else "/latentfm-emoji")))
ICONS = ROOT / "build" / "gpu" / "emoji.jsonl.gz"
BASE = next(folder for folder in (ROOT / "build" / "gpu" / "base", ROOT / "assets" / "emoji") if folder.is_dir())
PIECE = 15 * 2**20
SECONDS_TO_SAVE, SECONDS_TO_START = 30, 60
FROZEN = os.environ.get("KIT_FROZEN", "packed" if SHRUNK else "trained")
RUN = (
    ["train.steps=6", "train.batch_size=8", "train.compile=false", "train.mixed_precision=no", "train.warmup_steps=2",
     "output.checkpoint_every=3", "sample.steps=1", "sample.every=6", "data.workers=1"]
    if SHRUNK else
    ["train.batch_size=512", "train.ema_decay=0.9995", "train.warmup_steps=500", "train.t_shift=3", "data.workers=10",
     "output.checkpoint_every=1000", "sample.every=2000"]
)  # fmt: skip


def prepared() -> dict[str, Any]:
    """The icons rendered, captioned and composed, and the frozen models."""
    if not ICONS.exists():
        raise FileNotFoundError(f"{ICONS}: made by `bash scripts/gpu/kit.sh prepare`")
    WORK.mkdir(parents=True, exist_ok=True)
    shutil.copy(ICONS, WORK / "catalogue.jsonl.gz")
    (WORK / "meanings.json").write_bytes(gzip.decompress(ICONS.with_name("meanings.json.gz").read_bytes()))
    if SHRUNK:  # a few of them
        icons, _ = build.sets.read_catalogue(ICONS)
        things = [icon for icon in icons if icon.group == 3 and icon.style in ("noto", "flat")]  # animals
        few = [icon for icon in things if not icon.held_out][:24] + [icon for icon in things if icon.held_out][:2]
        build.sets.read_catalogue = lambda file: (few, {})
        build.SCENES, build.EXAMINED = 4, 0
    build.render(WORK)
    build.captions(WORK)
    build.scenes(WORK)
    return {name: len(list((WORK / "pictures" / name).glob("*.png"))) for name in ("plain", "styled", "scenes")}


def frozen() -> dict[str, Any]:
    """The VAE, the text encoders and, of those, the pipeline folder without network that the training begins with."""
    if (WORK / "base" / "model_index.json").exists():
        return {"made": "before"}
    if FROZEN == "packed":
        build.base_of(BASE, WORK)
        return {"made": str(BASE.relative_to(ROOT))}
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        done = {name: (WORK / "text" / folder / "tokenizer_config.json").exists() for name, folder in build.TOKENIZERS.items()}
        clips = [pool.submit(build.text_encoder, WORK, name, 2) for name in ("clip", "open_clip") if not done[name]]
        build.vae(WORK, "data.workers=5")
        if not done["t5"]:  # it learns the VAE's latents
            pool.submit(build.text_encoder, WORK, "t5", 4).result()
        for clip in clips:
            clip.result()
    build.base(WORK)
    return {"made": "here"}


def steps(deadline: float) -> list[str]:
    """The option of the training's steps: KIT_STEPS of them, or in the last call as many as its time is enough for, as fast as before."""
    if SHRUNK:
        return []
    metrics = WORK / "mmdit" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() and os.environ.get("KIT_LAST") else []
    if not rows:
        return [f"train.steps={os.environ.get('KIT_STEPS', '12000')}"]
    newest = rows[-200:]
    pace = sorted(row["images_per_second"] for row in newest)[len(newest) // 2] / 512
    return [f"train.steps={rows[-1]['step'] + int(pace * (deadline - SECONDS_TO_SAVE - SECONDS_TO_START - time.time()))}"]


def trained(deadline: float) -> dict[str, Any]:
    """Trains until the run is done or the time is up, saved either way; what it reached."""
    done = WORK / "mmdit" / "model" / "model_index.json"
    if not done.exists():
        with subprocess.Popen(build.training_command(WORK, *RUN, *steps(deadline)), cwd=ROOT) as process:
            while process.poll() is None:
                time.sleep(0.5)
                if time.time() > deadline - SECONDS_TO_SAVE:
                    process.send_signal(signal.SIGTERM)  # it saves after its step, and ends
                    process.wait()
            if process.returncode:
                raise RuntimeError(f"the training ended with exit code {process.returncode}: see the log")
    rows = [json.loads(line) for line in (WORK / "mmdit" / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    return {
        "step": last["step"], "finished": done.exists(), "loss": round(sum(row["loss"] for row in rows[-100:]) / len(rows[-100:]), 5),
        "images_per_second": round(last["images_per_second"], 1), "seconds": last["seconds"], "memory_gib": last["memory_gib"],
    }  # fmt: skip


def packed(results: Path) -> dict[str, Any]:
    """The newest pipeline as pieces in `results`, and the pictures through time."""
    checkpoints = sorted((WORK / "mmdit" / "checkpoints").glob("step-*/model"))
    folder = WORK / "mmdit" / "model" if (WORK / "mmdit" / "model").is_dir() else checkpoints[-1]
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        archive.add(WORK / "base", "model")
        archive.add(folder / "transformer", "model/transformer")
    data = written.getvalue()
    for old in results.glob("model-*.part"):
        old.unlink()
    for number, start in enumerate(range(0, len(data), PIECE)):
        (results / f"model-{number:02d}.part").write_bytes(data[start : start + PIECE])
    sheet = WORK / "mmdit" / "samples" / "progress.png"
    if sheet.exists():
        shutil.copy(sheet, results / "progress.png")
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "of": folder.parent.name, "pieces": -(-len(data) // PIECE)}


def join(folder: Path) -> Path:
    """folder/model, the pipeline put together from its pieces. Raises ValueError when one is missing or damaged."""
    said = json.loads((folder / "bundled.json").read_text())["rows"]["weights"]
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("model-*.part")))
    if hashlib.sha256(data).hexdigest() != said["sha256"]:
        raise ValueError(f"{folder}: {len(data):,} bytes in pieces, not the {said['bytes']:,} that were sent; fetch them again")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--join", type=Path, metavar="DIR", help="put the pipeline together from the pieces in DIR")
    given = parser.parse_args()
    if given.join:
        print(f"{join(given.join)}: the model/ of build.py's stage mmdit; `long` and `export` are next, and scripts/emoji/measure.py")
        return
    cells = Cells("bundled")
    for name in ("data", "frozen", "training", "weights"):  # each goes on by itself
        cells.rows.pop(name, None)
    if not cells.run("data", prepared, 120):
        raise SystemExit(1)
    if not cells.run("frozen", frozen, 60):
        raise SystemExit(1)
    row = cells.run("training", lambda: trained(cells.deadline) | {"on": DEVICE}, 60)
    if not row:
        raise SystemExit(1)
    cells.run("weights", lambda: packed(cells.path.parent), 0)
    if not row["finished"]:
        print(f"step {row['step']}: start the part again to go on")
        raise SystemExit(75)


if __name__ == "__main__":
    main()
