"""What every test shares: tests/ on the path (`from tiny import tiny_pipeline`), and one tiny stock pipeline folder a session."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock StableDiffusion3Pipeline folder (tiny.tiny_pipeline), made once: read it, never write into it."""
    from tiny import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")
