"""The package as a whole: a light import, names that resolve, and imports that run one way."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import latentfm
from latentfm import _HOMES

PACKAGE = Path(latentfm.__file__).parent
HEAVY = {"torch", "numpy", "diffusers", "transformers", "accelerate", "open_clip", "peft", "PIL", "pydantic", "yaml", "typer", "rich"}

# What each room may import besides itself; "*" is everything. `latentfm` itself is the version and the lazy public names.
LEAVES = {"errors", "files", "words", "bounds", "bundled", "pictures", "randomness", "optimizers", "adapters"}
MAY_IMPORT = {
    "errors": set(),
    "words": set(),
    "randomness": set(),
    "optimizers": set(),
    "adapters": set(),
    "files": {"errors", "words"},
    "bounds": set(),
    "bundled": {"errors", "files"},
    "pictures": {"errors", "files", "words"},
    "lazy_imports": set(),
    "requests": {"errors", "files", "words", "bounds", "sampling"},
    "system": {"models", "__init__"},
    "__init__": {"lazy_imports"},
    "option_text": {"errors", "files", "words"},
    "config": LEAVES | {"option_text", "sampling"},
    "flow": set(),
    "models": LEAVES | {"flow"},
    "interchange": LEAVES | {"models"},
    "data": LEAVES | {"flow", "models", "interchange", "config", "option_text"},
    "planning": LEAVES | {"config", "models", "data", "sampling"},
    "sampling": {"errors", "words", "flow", "models", "config"},
    "pipelines": LEAVES | {"flow", "models", "interchange", "sampling"},
    "drawing": LEAVES | {"models", "pipelines"},
    "series": LEAVES | {"drawing", "requests", "data", "pipelines"},
    "training": LEAVES | {"flow", "models", "interchange", "data", "planning", "sampling", "pipelines", "config", "requests"},
    "evaluation": LEAVES | {"flow", "models", "data", "pipelines", "requests", "config", "planning", "training"},
    "cli": {"*"},
    "web": {"*"},
    "__main__": {"*"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """"latentfm.flow.ode" -> "flow"; "latentfm" -> "__init__"."""
    return module.split(".")[1] if "." in module else "__init__"


def imported(source: str, package: str) -> set[str]:
    """The absolute name of everything that `source`, a module of `package`, imports anywhere, functions and strings included.

    `from latentfm import flow` is latentfm.flow, and a name such as LatentFMPipeline is its home.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            if module == "latentfm":
                names = {alias.name for alias in node.names}
                found |= {_HOMES.get(name, "latentfm" if name.startswith("__") else f"latentfm.{name}") for name in names}
            else:
                found.add(module)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def package_of(path: Path) -> str:
    return ".".join([PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1]])


def own_room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def forbidden(path: Path) -> set[str]:
    """The imports in the module at `path` that its room may not make."""
    room = own_room(path)
    allowed = MAY_IMPORT[room]
    ours = {name for name in imported(path.read_text("utf-8"), package_of(path)) if name.split(".")[0] == PACKAGE.name}
    return set() if "*" in allowed else {name for name in ours if room_of(name) not in {room, "__init__", *allowed}}


def test_imports_are_found_in_every_form():
    source = """
import latentfm.models.text as text
from latentfm.flow import ode
from latentfm import config, __version__, LatentFMPipeline
from .ema import EMA
from ..data import cache
def later():
    import accelerate.utils
    importlib.import_module("latentfm.cli.main")
"""
    assert imported(source, "latentfm.training") == {
        "latentfm.models.text", "latentfm.flow", "latentfm.config", "latentfm", "latentfm.pipelines.text_to_image", "latentfm.training.ema",
        "latentfm.data", "accelerate.utils", "latentfm.cli.main",
    }  # fmt: skip


def test_every_room_has_its_rule():
    assert {own_room(path) for path in modules()} <= MAY_IMPORT.keys()
    assert {"flow", "models", "data", "training", "pipelines", "cli", "config", *LEAVES} <= {own_room(path) for path in modules()}


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path):
    assert not forbidden(path)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_only_training_and_the_command_line_know_accelerate(path):
    names = {name.split(".")[0] for name in imported(path.read_text("utf-8"), package_of(path))}
    knows = own_room(path) in ("training", "cli") or path.name == "placing.py"  # and what hangs a device map's hooks on, as diffusers does
    assert "accelerate" not in names or knows


def test_training_does_know_accelerate():
    source = (PACKAGE / "training" / "loop.py").read_text("utf-8")
    assert "accelerate" in imported(source, "latentfm.training")  # else the test above sees nothing


def loaded_by(program: str) -> set[str]:
    """The top-level modules loaded in a fresh interpreter after `program`."""
    code = f"import sys; before = set(sys.modules); {program}; print(*{{name.split('.')[0] for name in set(sys.modules) - before}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_by("import latentfm; latentfm.__version__; dir(latentfm)")
    assert "latentfm" in loaded and not loaded & HEAVY


def test_the_leaves_load_no_torch():
    loaded = loaded_by("import latentfm.errors, latentfm.bundled, latentfm.pictures, latentfm.config")
    assert {"latentfm", "PIL"} <= loaded and not loaded & {"torch", "diffusers", "transformers", "accelerate"}


@pytest.mark.parametrize("name", latentfm.__all__)
def test_public_names_resolve(name):
    value = getattr(latentfm, name)
    assert name in dir(latentfm)
    if name in _HOMES and name != "flow":
        assert value is getattr(importlib.import_module(_HOMES[name]), name)
        assert value.__module__ == _HOMES[name] and value.__doc__


def test_every_home_is_the_one_that_is_tested():
    assert {"LatentFMPipeline", "MMDiT", "InputError", "flow", "train", "__version__"} <= set(latentfm.__all__)
    assert latentfm.flow is sys.modules["latentfm.flow"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="LatentFMPipelin'"):
        latentfm.LatentFMPipelin  # noqa: B018
    with pytest.raises(ImportError):
        exec("from latentfm import no_such_name")


def test_the_version_is_the_projects():
    project = (PACKAGE.parent / "pyproject.toml").read_text("utf-8")
    assert f'version = "{latentfm.__version__}"' in project
