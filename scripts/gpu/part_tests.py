"""The gpu-marked tests, each file in a process of its own (a fault of the device ends one of them), as rows of tests.json.

    bash scripts/gpu/kit.sh tests
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from cells import SHRUNK, Cells

ROOT = Path(__file__).resolve().parents[2]


class Failures(Exception):
    """Some tests of a file did not pass."""


def tested(file: Path, left: float) -> dict[str, Any]:
    """{"passed", "skipped": {test: reason}, "seconds"} of a file's tests. Raises Failures with what failed."""
    environment = os.environ | ({"LATENTFM_TEST_DEVICE": "cpu"} if SHRUNK else {})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", str(file)]
        command += ["-o", "addopts=-ra --import-mode=importlib"]  # in one process, with whatever of pytest is there
        command += os.environ.get("KIT_PYTEST", "").split()
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=max(30, left))
        if not report.exists():
            raise Failures(f"{file.name}: pytest ended with {done.returncode} and no report: see the log")
        tests = list(ElementTree.parse(report).getroot().iter("testcase"))
    found: dict[str, Any] = {"passed": 0, "skipped": {}, "failed": {}, "seconds": {}}
    for test in tests:
        name = test.get("name", "")
        found["seconds"][name] = round(float(test.get("time", 0)), 2)
        bad = test.find("failure") if test.find("failure") is not None else test.find("error")
        if bad is not None:
            found["failed"][name] = f"{bad.get('message', '')}\n{bad.text or ''}"[-1500:]
        elif (skipped := test.find("skipped")) is not None:
            found["skipped"][name] = skipped.get("message", "")
        else:
            found["passed"] += 1
    if not tests:
        raise Failures(f"{file.name}: no test was run")
    return found


def main() -> None:
    cells, bad = Cells("tests"), []
    for file in sorted((ROOT / "tests" / "gpu").glob("test_*.py"), key=lambda path: path.name != "test_training.py"):
        row = cells.rows.get(file.name)
        if row and row.get("failed") and row.get("call") != cells.call:
            del cells.rows[file.name]  # somebody may have mended it
        row = cells.run(file.name, lambda file=file: tested(file, cells.deadline - time.time()) | {"call": cells.call}, 60)
        bad += [] if row and not row["failed"] else [file.name]
    if bad:
        print(f"not all tests passed: {', '.join(bad)}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
