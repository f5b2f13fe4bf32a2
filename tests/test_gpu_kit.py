"""The GPU kit in miniature on a CPU: the same script, the same environment variables; its clock, its rows, its report."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / "scripts" / "gpu"
ENVIRONMENT = {
    "KIT_SCALE": "shrunk", "KIT_SITE": "none", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable,
}  # fmt: skip


def kit(folder: Path, part: str, **more: str) -> subprocess.CompletedProcess:
    """`kit.sh PART` in miniature, everything it writes below `folder`."""
    own = {"RESULTS": str(folder / "results"), "OUT": str(folder / "out"), "TMPDIR": str(folder), **ENVIRONMENT, **more}
    folder.mkdir(exist_ok=True)
    return subprocess.run(["bash", KIT / "kit.sh", part], env=os.environ | own, capture_output=True, text=True, cwd=folder)


def rows_of(folder: Path, part: str) -> dict:
    """The rows of a part that came back, all of them done; less than a megabyte of them."""
    path = folder / "out" / f"{part}.json"
    assert path.stat().st_size < 1e6 and (folder / "out" / f"{part}.log").stat().st_size < 1e6
    return json.loads(path.read_text())["rows"]


def finished(folder: Path, part: str, **more: str) -> dict:
    done = kit(folder, part, **more)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = rows_of(folder, part)
    assert {row["state"] for row in rows.values()} == {"done"}
    return rows


# Every part


def test_kernels(tmp_path):
    rows = finished(tmp_path, "kernels")
    ours = rows["training, one step, bf16, latentfm"]
    assert {"matrix products", "attention", "optimizer"} <= ours["kinds"].keys() and ours["launches"] > 100
    assert abs(sum(ours["kinds"].values()) / ours["busy_ms"] - 1) < 0.01 and len(ours["kernels"]) == 40
    table = subprocess.run([sys.executable, KIT / "report.py", tmp_path / "out"], capture_output=True, text=True, check=True).stdout
    assert "IN MINIATURE" in table and "| training, one step, bf16, latentfm |" in table and "matrix products" in table


@pytest.mark.slow
def test_sampling(tmp_path):
    rows = finished(tmp_path, "sampling")
    both = rows["eager, 64 px, 1"]
    assert both["difference"] < 0.05 and both["ratio"] > 0 and 0 < both["latentfm"]["share"] < 2
    assert {"attention math, 64 px, 1", "forward sd3.5-large, 64 px, 2", "compiled, 64 px, 4"} <= rows.keys()


@pytest.mark.slow
def test_training(tmp_path):
    rows = finished(tmp_path, "training")
    assert {"start-up", "the loader's cost", "lora, 64 px, 2, compiled", "bf16, 32 px, 2, 0.5 recomputed"} <= rows.keys()
    assert rows["bf16, 64 px, 2"]["ratio"] > 0 and rows["start-up"]["seconds"] > 0


@pytest.mark.slow
def test_the_bundled_network(tmp_path, request):
    """What comes back in pieces is the pipeline that was trained."""
    if not (ROOT / "build" / "gpu" / "emoji.jsonl.gz").exists():
        pytest.skip("bash scripts/gpu/kit.sh prepare has not been run: it fetches the icons")
    rows = finished(tmp_path, "bundled")
    assert rows["training"]["step"] == 6 and rows["training"]["finished"] and rows["data"]["styled"] == 24 and rows["data"]["scenes"] == 4
    subprocess.run([sys.executable, KIT / "part_bundled.py", "--join", tmp_path / "out"], check=True, env=os.environ | ENVIRONMENT)
    whole = tmp_path / "latentfm-emoji-shrunk" / "mmdit" / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / "model" / "transformer" / whole.name).read_bytes() == whole.read_bytes()
    assert (tmp_path / "out" / "model" / "model_index.json").exists()
    assert max(path.stat().st_size for path in (tmp_path / "out").glob("model-*.part")) < 16 * 2**20


@pytest.mark.slow
def test_tests(tmp_path):
    rows = finished(tmp_path, "tests")
    assert len(rows) == 3 and all(row["passed"] > 10 and not row["failed"] for row in rows.values())


# Its clock and its rows


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """begun(call) -> the Cells of a part called "tried", as a process of the call numbered `call` begins with them."""
    for name, value in (ENVIRONMENT | {"RESULTS": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(KIT))
    monkeypatch.delitem(sys.modules, "cells", raising=False)
    import cells

    def begin(call: int, again: str = ""):
        monkeypatch.setenv("KIT_CALL", str(call))
        monkeypatch.setenv("KIT_AGAIN", again)
        return cells.Cells("tried")

    yield begin
    sys.modules.pop("cells", None)


def saved(tmp_path) -> dict:
    return json.loads((tmp_path / "tried.json").read_text())["rows"]


def test_a_part_goes_on_with_what_is_missing_and_tries_again_what_failed(begun, tmp_path):
    def call(number: int, bad: str, again: str = "") -> dict:
        cells = begun(number, again)
        for name in ("a", "b", "c"):
            cells.run(name, lambda name=name: {"value": 1 / (name != bad), "in_call": number})
        return saved(tmp_path)

    first = call(1, bad="b")
    assert [first[name]["state"] for name in "abc"] == ["done", "failed", "done"]
    assert first["b"]["error"].startswith("ZeroDivisionError: ")
    assert call(1, bad="") == first  # a process of the same call, started again, leaves it
    second = call(2, bad="c")
    assert second["a"] == first["a"] and second["c"] == first["c"] and second["b"]["in_call"] == 2
    third = call(3, bad="", again="c")
    assert third["a"] == first["a"] and third["c"]["in_call"] == 3


def test_a_cell_whose_process_dies_is_named_and_not_tried_again_in_the_same_call(begun, tmp_path):
    class Killed(BaseException):
        """As if the process ended here."""

    def fatal():
        raise Killed

    cells = begun(1)
    cells.run("before", lambda: {"value": 1})
    with pytest.raises(Killed):
        cells.run("fatal", fatal)
    assert saved(tmp_path)["fatal"] == {"state": "started"}
    cells = begun(1)
    assert cells.run("fatal", fatal) is None and cells.run("after", lambda: {"value": 2})["value"] == 2
    assert "its process ended" in saved(tmp_path)["fatal"]["error"] and saved(tmp_path)["before"]["value"] == 1


def test_a_part_ends_before_its_time_is_up(begun, tmp_path, monkeypatch):
    cells = begun(1)
    monkeypatch.setattr(sys.modules["cells"], "SHRUNK", False)
    cells.deadline = time.time() + 100
    cells.run("a", lambda: {"value": 1}, about=60)
    with pytest.raises(SystemExit) as left:
        cells.run("b", lambda: {"value": 2}, about=120)
    assert left.value.code == 75 and saved(tmp_path).keys() == {"a"}


def test_figures_of_another_device_are_not_mixed_in(begun, tmp_path):
    begun(1).run("a", lambda: {"value": 1})
    found = json.loads((tmp_path / "tried.json").read_text())
    found["machine"]["device"] = "NVIDIA H100"
    (tmp_path / "tried.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="is of NVIDIA H100, this is .*: move it away, or set RESULTS"):
        begun(2)
    assert saved(tmp_path).keys() == {"a"}


# The report


def results(folder: Path, seconds: float, failed: dict[str, str] | None = None) -> Path:
    machine = {"device": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2.11.0", "diffusers": "0.42.1"}}
    peer = {"tflops": 400.0, "share": 0.5, "memory_gib": 9.5}
    rows = {
        "ceilings": {"state": "done", "tflops": 790.0, "gb_per_second": 3000.0},
        "eager, 1024 px, 1": {
            "state": "done", "diffusers": {"seconds": 4.0, **peer}, "latentfm": {"seconds": seconds, **peer}, "ratio": 4 / seconds,
        },
        "attention flash, 1024 px, 1": {"state": "failed", "error": "InputError: no"},
    }  # fmt: skip
    tests = {"test_network.py": {"state": "done", "passed": 20, "skipped": {}, "failed": failed or {}}}
    folder.mkdir()
    for part, found in (("sampling", rows), ("tests", tests)):
        (folder / f"{part}.json").write_text(json.dumps({"part": part, "scale": "full", "machine": machine, "rows": found}))
    return folder


def report(*folders: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, KIT / "report.py", *folders], capture_output=True, text=True)


def test_the_report_is_a_table_with_the_cards_name(tmp_path):
    said = report(results(tmp_path / "a", 3.2)).stdout
    assert said.startswith("NVIDIA H100 80GB HBM3, torch 2.11.0, diffusers 0.42.1; bf16 products 790 TFLOP/s, copies 3000 GB/s.\n")
    rate = "400 TFLOP/s (50%), 9.5 GiB"
    assert f"| eager, 1024 px, 1 | diffusers 4 s, {rate}; latentfm 3.2 s, {rate}; **1.25 x** |" in said
    assert "| attention flash, 1024 px, 1 | **failed**: InputError: no | `bash scripts/gpu/kit.sh sampling` |" in said


def test_two_results_are_compared_and_what_is_slower_or_broken_is_an_exit_code(tmp_path):
    old, same, slow = (results(tmp_path / name, seconds) for name, seconds in (("old", 3.2), ("same", 3.3), ("slow", 3.6)))
    broken = results(tmp_path / "broken", 3.2, {"test_x": "assert"})
    assert report(old, same).returncode == 0
    said = report(old, slow)
    assert said.returncode == 1 and "latentfm: 3.2 s -> 3.6 s (+12.5%)  <-- slower" in said.stdout
    assert "flash, 1024 px, 1: failed -> failed" in said.stdout
    said = report(old, broken)
    assert said.returncode == 1 and "test_network.py: test_x fails now" in said.stdout
    assert "no results in" in report(tmp_path).stderr
