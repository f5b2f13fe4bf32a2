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


@pytest.fixture(scope="session")
def saved(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by LatentFMPipeline before its first picture, for 16 T5 tokens, its null condition with it: read it, never write into it."""
    from latentfm import LatentFMPipeline

    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pipe = LatentFMPipeline.from_pretrained(tiny_folder)
    pipe.info["max_sequence_length"] = 16
    pipe.save_pretrained(folder)
    return folder
