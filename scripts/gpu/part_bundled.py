"""The bundled model trained on a GPU, by the stages of scripts/emoji/build.py from `render` to `mmdit`.

    bash scripts/gpu/kit.sh bundled          # again and again: it goes on where it was; stopped and saved before the time is up
    KIT_STEPS=9000 bash scripts/gpu/kit.sh bundled # another number of the network's steps than configs/emoji.yaml's
    python scripts/gpu/part_bundled.py --join DIR  # where the pieces are: puts the pipeline folder together again

Renders and scenes are made there from the packed icons, the frozen models too, unless KIT_FROZEN=packed takes those that `prepare` found;
the pipeline (averages, half precision) comes back as pieces of 15 MiB beside bundled.json, with a sheet of pictures through time.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from cells import DEVICE, OUT_OF_TIME, SHRUNK, Cells

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "emoji"))
import build  # noqa: E402, isort: skip

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(os.environ.get("KIT_EMOJI", tempfile.gettempdir() + ("/latentfm-emoji-shrunk" if SHRUNK else "/latentfm-emoji")))
ICONS = ROOT / "build" / "gpu" / "emoji.jsonl.gz"
BASE = next(folder for folder in (ROOT / "build" / "gpu" / "base", ROOT / "assets" / "emoji") if folder.is_dir())
PIECE = 15 * 2**20
SECONDS_TO_SAVE = 30
FROZEN = os.environ.get("KIT_FROZEN", "packed" if SHRUNK else "trained")
RUN = (
    ["train.steps=6", "train.batch_size=8", "train.gradient_accumulation=1", "train.compile=false", "train.mixed_precision=no",
     "train.warmup_steps=2", "output.checkpoint_every=3", "sample.steps=1", "sample.every=6", "data.workers=1"]
    if SHRUNK else
    ["train.gradient_accumulation=1", "data.workers=10", "output.checkpoint_every=500", "sample.every=1000",
     *([f"train.steps={os.environ['KIT_STEPS']}"] if os.environ.get("KIT_STEPS") else [])]
)  # fmt: skip


def prepared() -> dict[str, Any]:
    """The icons rendered, captioned and composed, once; how many pictures of each part there are."""
    pictures, done = WORK / "pictures", WORK / "prepared"
    if done.exists():
        return json.loads(done.read_text())
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
    found = {name: len(list((pictures / name).glob("*.png"))) for name in ("plain", "styled", "scenes")}
    done.write_text(json.dumps(found))
    return found


def frozen(deadline: float) -> dict[str, Any]:
    """The VAE, the text encoders and, of those, the pipeline folder without network that the training begins with."""
    if (WORK / "base" / "model_index.json").exists():
        return {"made": "before"}
    if FROZEN == "packed":
        build.base_of(BASE, WORK)
        return {"made": str(BASE.relative_to(ROOT))}

    def encoders(*names: str) -> list[list[str]]:
        missing = [name for name in names if not (WORK / "text" / build.TOKENIZERS[name] / "tokenizer_config.json").exists()]
        called = "import build, pathlib, sys; build.text_encoder(pathlib.Path(sys.argv[1]), sys.argv[2], 2)"
        return [[sys.executable, "-c", called, str(WORK), name] for name in missing]

    vae = [] if (WORK / "vae" / "model" / "config.json").exists() else [build.vae_command(WORK, "data.workers=5")]
    run_together([*vae, *encoders("clip", "open_clip")], deadline)
    run_together(encoders("t5"), deadline)  # it learns the VAE's latents
    build.base(WORK)
    return {"made": "here"}


def run_together(commands: list[list[str]], deadline: float) -> None:
    """Runs commands side by side. Raises RuntimeError when one fails, SystemExit when the time is up: they go on in the next call."""
    paths = os.pathsep.join([str(ROOT / "scripts" / "emoji"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    processes = [subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}) for command in commands]
    while any(process.poll() is None for process in processes) and time.time() < deadline - SECONDS_TO_SAVE:
        time.sleep(0.5)
    late = [process for process in processes if process.poll() is None]
    for process in late:
        process.terminate()
    for process in late:
        process.wait()
    if late:
        print("no time left for the frozen models: start the part again, it goes on here", flush=True)
        raise SystemExit(OUT_OF_TIME)
    if any(process.returncode for process in processes):
        raise RuntimeError(f"exit codes {[process.returncode for process in processes]} of the frozen models' trainings: see the log")


def trained(deadline: float) -> dict[str, Any]:
    """Trains until the run is done or the time is up, saved either way; what it reached."""
    done = WORK / "mmdit" / "model" / "model_index.json"
    if not done.exists():
        with subprocess.Popen(build.training_command(WORK, *RUN), cwd=ROOT) as process:
            while process.poll() is None:
                time.sleep(0.5)
                if time.time() > deadline - SECONDS_TO_SAVE:
                    process.send_signal(signal.SIGTERM)  # it saves after its step, and ends
                    process.wait()
            early = process.returncode == -signal.SIGTERM  # while the cache was being filled: what is in it stays
            if process.returncode and not early:
                raise RuntimeError(f"the training ended with exit code {process.returncode}: see the log")
    metrics = WORK / "mmdit" / "metrics.jsonl"
    if not metrics.exists():
        return {"step": 0, "finished": False}
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
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
        print(f"{join(given.join)}: mmdit/model of build.py; next are `further`, `styles`, `long`, `export`, then scripts/emoji/measure.py")
        return
    cells = Cells("bundled")
    for name in ("data", "frozen", "training", "weights"):  # each goes on by itself
        cells.rows.pop(name, None)
    if not cells.run("data", prepared, 120):
        raise SystemExit(1)
    if not cells.run("frozen", lambda: frozen(cells.deadline), 60):
        raise SystemExit(1)
    row = cells.run("training", lambda: trained(cells.deadline) | {"on": DEVICE}, 60)
    if not row:
        raise SystemExit(1)
    if row["step"]:
        cells.run("weights", lambda: packed(cells.path.parent), 0)
    if not row["finished"]:
        print(f"step {row['step']}: start the part again to go on")
        raise SystemExit(75)


if __name__ == "__main__":
    main()
