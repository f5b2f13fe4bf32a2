"""Where the bundled model and configurations are: beside the package in a checkout, inside it in an installed wheel."""

from pathlib import Path

from latentfm.errors import InputError
from latentfm.files import expanded


def bundled_model() -> Path:
    """The folder of the bundled pipeline. Raises InputError when the installation lacks it."""
    package = Path(__file__).resolve().parent
    for folder in (package / "assets" / "emoji", package.parent / "assets" / "emoji"):
        if (folder / "model_index.json").is_file():
            return folder
    raise InputError("the bundled model is missing from this installation; give a pipeline folder with --model, or reinstall latentfm")


def detector_folder() -> Path:
    """The folder of the detector for the bundled model's art, and of its prompts. Raises InputError when the installation lacks it."""
    folder = bundled_model().parent / "detector"
    if not (folder / "config.json").is_file():
        raise InputError("the emoji detector is missing from this installation; name another with --detector, or reinstall latentfm")
    return folder


def bundled_configurations() -> dict[str, Path]:
    """The commented configurations of runs by name, as "quickstart.yaml"; none where the installation lacks them."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "quickstart.yaml").is_file():
            return {path.name: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def pipeline_folder(name: str | None) -> Path:
    """The pipeline folder of a run's model.pipeline: the bundled one if it names none."""
    return expanded(name) if name else bundled_model()
