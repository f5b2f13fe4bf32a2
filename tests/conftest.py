"""What every test shares: tests/ on the path (`from tiny import tiny_pipeline`), and one tiny stock pipeline folder a session."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: the processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock StableDiffusion3Pipeline folder (tiny.tiny_pipeline), made once: read it, never write into it."""
    from tiny import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")
