"""bitsandbytes is imported when something is quantised by it, and not because diffusers or peft are.

Where it is installed they import it at once, and on some processors its import asks the hub for a kernel, which is code. `import latentfm`
has them come by a stand-in instead, which imports it when something of it is used. Standard library alone.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

LIBRARY = "bitsandbytes"
EAGER = ("diffusers.quantizers.bitsandbytes.utils", "transformers.integrations.bitsandbytes", "peft.helpers")  # import it at their top
ASKED = "peft.import_utils"  # by whose word peft imports it for every adapter


class StandIn(ModuleType):
    """The library as a module that is imported when an attribute of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(LIBRARY), name)


def is_imported() -> bool:
    """Whether something has imported the library: only then can a module be one of its own."""
    return isinstance(sys.modules.get(LIBRARY), ModuleType) and not isinstance(sys.modules[LIBRARY], StandIn)


def with_stand_in(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """`execute` with the stand-in in the library's place meanwhile, unless it is imported already or not installed."""

    def run(module: ModuleType) -> None:
        if LIBRARY in sys.modules or (spec := find_spec(LIBRARY)) is None:
            return execute(module)
        sys.modules[LIBRARY] = stand_in = StandIn(LIBRARY)
        stand_in.__spec__ = spec
        try:
            execute(module)
        finally:
            if sys.modules.get(LIBRARY) is stand_in:
                del sys.modules[LIBRARY]

    return run


def asking_is_imported(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """`execute`, after which peft takes the library for there only where it is imported."""

    def run(module: ModuleType) -> None:
        execute(module)
        module.is_bnb_available = module.is_bnb_4bit_available = is_imported

    return run


class Finder(MetaPathFinder):
    """Finds the modules named above as they are found otherwise, to be run as the functions above say."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in (*EAGER, ASKED):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            change = asking_is_imported if fullname == ASKED else with_stand_in
            spec.loader.exec_module = change(spec.loader.exec_module)
        return spec


def install() -> None:
    """Puts the finder before all others, once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
