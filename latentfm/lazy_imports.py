"""What diffusers and transformers import at their top for the sake of some of their users is imported when it is used.

Of the seconds that a first picture took, most were imports: torch's compiler with sympy and triton, distributed tensors, peft, scipy and
torchvision, none of which drew it; and bitsandbytes, where it is installed, asks the hub for a kernel, which is code. `import latentfm`
puts a finder before Python's own. While a module of LAZY's importers runs, a stand-in is in sys.modules in each library's place, from which
it takes names that import the library when they are called or looked into; it is gone when the module has run, and what runs meanwhile of
other packages never sees it. Whoever imports the library gets the library. Standard library alone.
"""

import functools
import gc
import importlib
import sys
import threading
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder, SourceFileLoader, SourcelessFileLoader
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any


@dataclass(frozen=True)
class Lazy:
    """A module of a library whose import waits. importers: modules that import it at their top, with those below them.

    names: of its functions and classes, which may wait as well; all of them are None. Anything else that is asked for imports it.
    """

    module: str
    importers: tuple[str, ...]
    names: Collection[str] | None = ()


BITSANDBYTES, DYNAMO = "bitsandbytes", "torch._dynamo"
BLOCKS = ("dual_transformer_2d", "sana_transformer", "transformer_2d", "transformer_2d_dreamlite", "transformer_temporal")
DISTRIBUTED = ("_composable.fsdp", "checkpoint.hf_storage", "fsdp", "tensor", "tensor._utils", "tensor.placement_types")
PROCESSING = ("feature_extraction_utils", "image_processing_utils", "processing_utils", "video_processing_utils")
PARALLEL = ("transformers.distributed.tensor_parallel", "transformers.distributed.expert_parallel")
LAZY = (
    # quantising: asks the hub for code
    Lazy(BITSANDBYTES, ("diffusers.quantizers.bitsandbytes.utils", "transformers.integrations.bitsandbytes", "peft.helpers")),
    # torch.compile, and decorators for it: 1.0 s, with sympy and triton
    Lazy(DYNAMO, ("diffusers", "transformers"), ("allow_in_graph", "assume_constant_result", "disable")),
    Lazy("torch._dynamo._trace_wrapped_higher_order_op", ("transformers.masking_utils",), ("TransformGetItemToIndex",)),
    # attention="flex": the above
    Lazy("torch.nn.attention.flex_attention", ("transformers.masking_utils",), ("BlockMask", "create_block_mask")),
    Lazy("torch.nn.attention.flex_attention", ("diffusers.models.attention_dispatch",)),
    Lazy("transformers.integrations.flex_attention", ("transformers.modeling_utils",), ("flex_attention_forward",)),
    # adapters: 1.2 s
    Lazy("peft.helpers", ("diffusers.hooks.layerwise_casting",), ("disable_input_dtype_casting",)),
    Lazy("peft.tuners.tuners_utils", ("diffusers.hooks.layerwise_casting", "diffusers.loaders.lora_base"), ("BaseTunerLayer",)),
    # schedulers' beta sigmas, and losses of detection: 0.5 s
    Lazy("scipy.stats", ("diffusers.schedulers",)),
    Lazy("scipy.optimize", ("transformers.loss",), ("linear_sum_assignment",)),
    # preparing pictures for transformers: torchvision, 0.3 s, and by it torch's compiler
    Lazy("transformers.image_transforms", ("transformers.loss",), None),
    *(Lazy(f"transformers.{name}", ("transformers.models.auto",), None) for name in PROCESSING),
    Lazy(
        "transformers.processing_utils", ("transformers.modeling_layers", "transformers.models"),
        ("Unpack",) if sys.version_info >= (3, 11) else (),
    ),
    # from_single_file of a network: every scheduler, and torchvision
    Lazy("diffusers.loaders.single_file_utils", ("diffusers.loaders.single_file_model",), None),
    # parts of U-Nets and autoencoders: the package of every transformer, 0.5 s, and torchvision
    *(Lazy(f"diffusers.models.transformers.{name}", ("diffusers.models.unets", "diffusers.models.autoencoders"), None) for name in BLOCKS),
    # an autoencoder on transformers' image encoders, which prepares pictures for them
    Lazy("diffusers.models.autoencoders.autoencoder_rae", ("diffusers.models.autoencoders",), None),
    # tensors and weights spread over processes: 0.5 s
    *(Lazy(f"torch.distributed.{name}", ("transformers",), None) for name in DISTRIBUTED),
    Lazy("torch.distributed._functional_collectives", ("diffusers", "transformers"), None),
    *(Lazy(name, ("transformers.distributed.mixin", "transformers.modeling_utils", "transformers.generation"), None) for name in PARALLEL),
    # fetching from the hub: 0.1 s
    Lazy("requests", ("diffusers",)),
)  # fmt: skip
LIBRARIES = {row.module for row in LAZY}
IMPORTERS = {name for row in LAZY for name in row.importers}
STANDING: list["StandIn"] = []  # the stand-ins that are in sys.modules
FILES = (SourceFileLoader, SourcelessFileLoader, ExtensionFileLoader)  # the loaders that are one module's own
Execute = Callable[[ModuleType], None]


class LazyName:
    """A function or class of a library that is imported when it is called or looked into, and from then on is there in the importer.

    Nothing is an instance of a class whose library nobody has imported.
    """

    def __init__(self, module: str, name: str, importer: str):
        self.module, self.name, self.importer = module, name, importer

    def real(self) -> Any:
        value = getattr(imported(self.module), self.name)
        names = vars(sys.modules.get(self.importer, STAND_IN))
        names.update({name: value for name, held in list(names.items()) if held is self})
        return value

    def __repr__(self) -> str:
        return f"{self.module}.{self.name}, imported when used"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.real()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what looks at names in passing
            raise AttributeError(name)
        return getattr(self.real(), name)

    def __instancecheck__(self, value: Any) -> bool:
        return is_imported(self.module) and isinstance(value, self.real())

    def __subclasscheck__(self, kind: type) -> bool:
        return is_imported(self.module) and issubclass(kind, self.real())

    def __mro_entries__(self, bases: tuple) -> tuple:
        return (self.real(),)

    def __or__(self, other: Any) -> Any:
        return typing.Union[self, other]  # noqa: UP007  # as the annotations of a module have it

    __ror__ = __or__


class StandIn(ModuleType):
    """A library as a module that is imported when something else of it is used than names that may wait."""

    __path__: Sequence[str] = []

    def __init__(self, library: str, names: Collection[str] | None, importer: str):
        super().__init__(library)
        self._names, self._importer, self._thread, self._stands = names, importer, threading.get_ident(), True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if threading.get_ident() == self._thread and self._stands and (self._names is None or name in self._names):
            value = KNOWN.get((self.__name__, name)) or LazyName(self.__name__, name, self._importer)
            setattr(self, name, value)
            return value
        return getattr(imported(self.__name__), name)


def is_imported(library: str) -> bool:
    """Whether something has imported the library: only then can an object be one of its own."""
    return not isinstance(sys.modules.get(library, STAND_IN), StandIn)


def imported(library: str) -> ModuleType:
    """The library itself."""
    with without_stand_ins():
        return importlib.import_module(library)


@contextmanager
def without_stand_ins() -> Iterator[None]:
    """A context in which no library is stood in for: for modules that are none of the importers."""
    aside = [each for each in STANDING if sys.modules.get(each.__name__) is each]
    for each in aside:
        sys.modules.pop(each.__name__, None)
    STANDING[:] = [each for each in STANDING if each not in aside]
    try:
        yield
    finally:
        for each in aside:
            if each._stands and sys.modules.setdefault(each.__name__, each) is each:
                STANDING.append(each)


@contextmanager
def with_stand_ins(importer: str) -> Iterator[None]:
    """A context in which the libraries that `importer` may wait for are stood in for: those that are installed and not imported yet.

    The first row that is the importer's counts.
    """
    with without_stand_ins():
        for row in LAZY:
            if row.module in sys.modules or row.module == importer or not any(is_below(importer, name) for name in row.importers):
                continue
            if is_installed(row.module.split(".")[0]):
                sys.modules[row.module] = StandIn(row.module, row.names, importer)
                STANDING.append(sys.modules[row.module])
        ours = [each for each in STANDING if each._importer == importer]
        try:
            yield
        finally:
            for each in ours:
                each._stands = False
                if sys.modules.get(each.__name__) is each:
                    del sys.modules[each.__name__]
            STANDING[:] = [each for each in STANDING if each._stands]


@contextmanager
def without_collecting() -> Iterator[None]:
    """A context in which no garbage is looked for: there is none in what imports make, and looking takes a seventh of them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def is_below(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


@functools.cache
def is_installed(package: str) -> bool:
    return package in sys.modules or find_spec(package) is not None


# torch's compiler is told of what was decorated for it when somebody imports it, before it compiles anything
DECORATED: list[tuple[str, Any]] = []


def decorator(name: str) -> Callable[[Any], Any]:
    """The compiler's decorator `name`, one that returns what it is given: it is told of that when it is there."""

    def decorate(thing: Any) -> Any:
        if is_imported(DYNAMO):
            return getattr(imported(DYNAMO), name)(thing)
        DECORATED.append((name, thing))
        return thing

    return decorate


def disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
    """The compiler's decorator of functions that it is to pass over: without it they are themselves."""
    if function is None:
        return functools.partial(disable, recursive=recursive, **options)
    if not isinstance(function, FunctionType) or is_imported(DYNAMO):
        return imported(DYNAMO).disable(function, recursive, **options)
    passed_over = functools.cache(lambda: imported(DYNAMO).disable(function, recursive, **options))

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return passed_over()(*args, **kwargs) if is_imported(DYNAMO) else function(*args, **kwargs)

    DECORATED.append(("skip", run))
    return run


def tell_compiler(module: ModuleType) -> None:
    while DECORATED:
        name, thing = DECORATED.pop()
        getattr(module.decorators, name)(thing)


def ask_by_import(module: ModuleType) -> None:
    """Has peft, which would import bitsandbytes for every adapter, take it for there only where it is imported."""
    module.is_bnb_available = module.is_bnb_4bit_available = functools.partial(is_imported, BITSANDBYTES)


def unwrap_by_import(module: ModuleType) -> None:
    """Has diffusers, which looks whether a pipeline's component is one of peft's, take peft for there only where it is imported."""
    module.is_peft_available = functools.partial(is_imported, "peft")


def compiled_by_import(module: ModuleType) -> None:
    """Has diffusers, which looks whether a component is a compiled one, take none for one where the compiler is not imported."""
    ask = module.is_compiled_module
    module.is_compiled_module = functools.wraps(ask)(lambda component: is_imported(DYNAMO) and ask(component))


class Filled(dict):
    """A dict that `fill` enters everything into when it is first looked into."""

    def __init__(self, fill: Callable[[dict], Any]):
        super().__init__()
        self._fill: Callable | None = fill


def looking(name: str) -> Callable:
    def look(self: Filled, *args: Any) -> Any:
        fill, self._fill = self._fill, None
        if fill is not None:
            fill(self)
        return getattr(dict, name)(self, *args)

    return look


for each in ("__getitem__", "__contains__", "__iter__", "__len__", "get", "keys", "values", "items"):
    setattr(Filled, each, looking(each))


def register_styles_lazily(module: ModuleType) -> None:
    """Has transformers' ways of spreading a layer over processes be entered into their table when somebody looks for one."""
    module.ParallelInterface._global_mapping = Filled(lambda table: [imported(name) for name in PARALLEL])


def remember_structure(module: ModuleType) -> None:
    """Has transformers read the names of its 1,600 files once, and from where they stand: it keeps what 128 folders say and has 500."""
    read, names = module.create_import_structure_from_path, module.fetch__all__
    module.create_import_structure_from_path = functools.cache(getattr(read, "__wrapped__", read))
    module.fetch__all__ = lambda content: names(content[content.rfind("\n__all__") + 1 :])  # the last such line counts


@contextmanager
def lazy_packages() -> Iterator[None]:
    """A context in which every installed file is asked for its distribution only when somebody looks for one, as diffusers seldom does."""
    from importlib import metadata

    find = metadata.packages_distributions
    metadata.packages_distributions = lambda: Filled(lambda table: table.update(find()))
    try:
        yield
    finally:
        metadata.packages_distributions = find


KNOWN = {  # what is given in the place of names that are used at once
    (DYNAMO, "allow_in_graph"): decorator("allow_in_graph"),
    (DYNAMO, "assume_constant_result"): decorator("assume_constant_result"),
    (DYNAMO, "disable"): disable,
    ("transformers.processing_utils", "Unpack"): getattr(typing, "Unpack", None),  # where transformers takes it from
}
AFTER = {  # done when a module has run
    DYNAMO: tell_compiler,
    "peft.import_utils": ask_by_import,
    "diffusers.pipelines.pipeline_loading_utils": unwrap_by_import,
    "diffusers.utils.torch_utils": compiled_by_import,
    "transformers.distributed.parallel_utils": register_styles_lazily,
    "transformers.utils.import_utils": remember_structure,
}
WHILE = {"diffusers.utils.import_utils": lazy_packages}
STAND_IN = StandIn("", (), "")


class Waiting(Loader):
    """Loads a part of a library that is stood in for: with the library itself.

    Not before it is loaded: modules are looked for under Python's one lock of all imports, and another thread, which imports the library,
    would wait for that while this one waited for the library.
    """

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return imported(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class Finder(MetaPathFinder):
    """Finds modules as they are found otherwise, to be run among stand-ins where they are importers, and without any where not."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if STANDING and isinstance(sys.modules.get(fullname.rpartition(".")[0]), StandIn):  # a part of a library that waits
            return ModuleSpec(fullname, Waiting())
        lazy = any(is_below(fullname, name) for name in IMPORTERS)
        if not (lazy or STANDING or fullname in AFTER or fullname == "torch"):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, FILES):
            spec.loader.exec_module = changed(fullname, lazy, spec.loader.exec_module)
        return spec


def changed(name: str, lazy: bool, execute: Execute) -> Execute:
    """`execute`, of the module `name`, among stand-ins or without any, and what is to be done after it."""

    def run(module: ModuleType) -> None:
        with without_collecting(), WHILE.get(name, nullcontext)(), with_stand_ins(name) if lazy else without_stand_ins():
            execute(module)
            with suppress(AttributeError):  # another version's module may lack what is put off; it is then done at once, as without us
                AFTER.get(name, lambda module: None)(module)

    return run


def install() -> None:
    """Puts the finder before all others, once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
