"""The built wheel carries the bundled model and the configurations: `latentfm generate` works from it in an empty folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from latentfm.pictures import read_settings

ROOT = Path(__file__).resolve().parent.parent


def test_generate_from_the_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    assert any(name.startswith("latentfm/assets/emoji/transformer/") for name in names)
    assert {"latentfm/configs/quickstart.yaml", "latentfm/configs/accelerate/ddp-8.yaml"} <= set(names)
    assert {"latentfm/assets/detector/model.safetensors", "latentfm/assets/detector/prompts.jsonl"} <= set(names)
    assert not any(name.startswith(("tests/", "scripts/")) for name in names)
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "latentfm", "generate", "a slice of pizza", "--seed", "3", "--steps", "4"],
        cwd=empty, env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = read_settings(empty / done.stdout.strip())
    assert settings["prompt"] == "a slice of pizza" and settings["seed"] == 3
