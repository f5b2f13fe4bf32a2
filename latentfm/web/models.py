"""The models and LoRAs that the page offers, by name: which folder each is, and the one that is loaded. No client names a path."""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentfm.cli.checks import chosen_device, chosen_dtype, model_folder
from latentfm.drawing import choose_attention, described, load, load_adapters, move
from latentfm.errors import InputError, nearest
from latentfm.models.folder import Usual, usual_sampling
from latentfm.words import listed, shown

if TYPE_CHECKING:
    from latentfm.pipelines.text_to_image import LatentFMPipeline

BUNDLED = "bundled"
Stamp = tuple[tuple[str, int, int], ...]  # of files: name, time and size


class Models:
    """The models in `folders` beside the bundled one, and the LoRAs in the folder `loras`. One of them at a time is in memory.

    compiled: whether torch.compile takes their networks' blocks.
    """

    def __init__(self, folders: Sequence[Path], loras: Path | None, device: str, dtype: str, compiled: bool = False):
        self.device, self.dtype, self.compiled = device, dtype, compiled
        self.folders: dict[str, Path | None] = {}
        for folder in folders:
            model_folder(folder)
            self.folders[free_name(folder, self.folders)] = folder
        self.folders[BUNDLED] = None
        self.loras = loras
        self.pipe: LatentFMPipeline | None = None
        self.loaded: tuple[str, Stamp] | None = None
        self.adapted: tuple[str, float, Stamp] | None = None
        self.common: dict[str, Any] = {}

    def names(self) -> list[str]:
        """The models, the default first."""
        return list(self.folders)

    def lora_paths(self) -> dict[str, Path]:
        """The LoRAs by name: files of safetensors and folders with such; what was added since the last look is among them."""
        found: dict[str, Path] = {}
        for path in sorted(self.loras.iterdir()) if self.loras is not None and self.loras.is_dir() else ():
            if path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors"))):
                found[numbered(shown(path.stem if path.is_file() else path.name), found)] = path
        return found

    def check(self, model: str, lora: str | None) -> None:
        """Raises InputError for a name that is not offered."""
        if model not in self.folders:
            raise InputError(f"no model {shown(repr(model), 60)}{nearest(model, self.folders)}; there are {listed(self.folders, 20)}")
        there = self.lora_paths() if lora is not None else {}
        if lora is not None and lora not in there:
            raise InputError(f"no LoRA {shown(repr(lora), 60)}{nearest(lora, there)}; there are: {listed(there, 20) or 'none'}")

    def usual(self, model: str) -> Usual:
        """What a model is drawn with where nothing else is asked for."""
        return usual_sampling(model_folder(self.folders[model])) if model in self.folders else Usual()

    def name_of(self, model: object) -> str | None:
        """The name on the page of a model as a picture's settings name it; None where it is not offered."""
        return next((name for name, folder in self.folders.items() if str(folder or BUNDLED) == model), None)

    def lora_of(self, path: object) -> str | None:
        """The name on the page of a LoRA as a picture's settings name it; None where it is not offered."""
        return next((name for name, each in self.lora_paths().items() if str(each) == path), None)

    def ready(self, model: str, lora: str | None, strength: float) -> "tuple[LatentFMPipeline, dict[str, Any]]":
        """The pipeline of a model with so much of a LoRA, and what its pictures say of it. Raises InputError for what cannot be loaded."""
        self.check(model, lora)
        try:
            return self.opened(model, lora, strength)
        except InputError as error:  # whoever asks over the network is told names, not paths
            text = str(error)
            for name, path in (self.folders | self.lora_paths()).items():
                text = text.replace(shown(path), name).replace(str(path), name) if path is not None else text
            raise InputError(text) from error

    def opened(self, model: str, lora: str | None, strength: float) -> "tuple[LatentFMPipeline, dict[str, Any]]":
        folder = model_folder(self.folders[model])
        now = (model, stamp(folder))
        if self.loaded != now:  # another one, or trained on since
            self.pipe = self.loaded = self.adapted = None  # the one before goes first: two may not fit
            device = chosen_device(self.device)
            kind = chosen_dtype(self.dtype, device)
            pipe = load(folder, kind, option="model")
            choose_attention(pipe, "auto", device)
            move(pipe, device, self.compiled)
            self.pipe, self.loaded = pipe, now
            self.common = described(self.folders[model], folder, (), (), device, kind, "auto", compile=self.compiled)
        path = () if lora is None else (self.lora_paths()[lora],)
        wanted = (lora, strength, stamp(path[0])) if path else None
        if wanted != self.adapted:
            self.adapted = None
            self.pipe.unload_lora_weights()
            load_adapters(self.pipe, path, (strength,) if path else ())
            self.adapted = wanted
        more = {"lora": [str(each) for each in path]} if path else {}
        return self.pipe, self.common | more | ({"lora_strength": [strength]} if path and strength != 1 else {})


def stamp(place: Path) -> Stamp:
    """What changes when a file, or one in a folder or in those in it, is written anew."""
    paths = sorted([place] if place.is_file() else [*place.glob("*"), *place.glob("*/*")])
    return tuple((str(path), status.st_mtime_ns, status.st_size) for path in paths if path.is_file() for status in [path.stat()])


def free_name(folder: Path, taken: dict[str, Any]) -> str:
    """What a model's folder is called on the page: its last name that is not merely `model`, numbered where that is taken."""
    parts = [part for part in folder.resolve().parts if part not in ("model", "/")]
    return numbered(shown(parts[-1] if parts else folder.name), (*taken, BUNDLED))


def numbered(name: str, taken: Container[str]) -> str:
    """A name, with a number after it where it is taken."""
    return next(each for each in (name, *(f"{name} {number}" for number in range(2, 10_000))) if each not in taken)
