"""Atomic, rotated training checkpoints made of safetensors and JSON only.

A checkpoint is a folder `step-00001200` with the run's state in safetensors (`checkpoint.state`), `state.json` (the step, what describes
the run, the files' checksums and its own) and what can be drawn with, a pipeline folder `model` or an adapter. The state is in
`state.safetensors`, or, where FSDP2 splits the weights, each process has written its rows of every tensor by torch.distributed.checkpoint
into `shard-*.safetensors`; any number of processes goes on from either. It is written under a `.partial` name, flushed to disk and
renamed, so a folder without that suffix is whole. Nothing older is removed before the new one is in place.
"""

import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from latentfm.errors import InputError
from latentfm.files import JSON_BYTES, SpecialFile, TooLarge, could_not_write, open_file, read_bytes, reason, whole_or_nothing
from latentfm.interchange.tensors import CHUNK, Held, Tensors, read_chunks, split, write_shards
from latentfm.training.distributed.processes import raise_on_all_ranks
from latentfm.training.records.json_lines import name_aside, number
from latentfm.words import shown

if TYPE_CHECKING:  # it knows FSDP, which a dry run and a start do without
    from latentfm.training.distributed.shards import Chunk

NAME = re.compile(r"step-(\d{8})")
CHECKSUM = "checksum"  # in state.json: of all else that it says
LARGEST_FILE = 5 * 10**9  # bytes, as diffusers splits its own


def save(
    folder: Path,
    step: int,
    chunks: "Mapping[str, Chunk]",
    info: Mapping[str, Any],
    accelerator: Accelerator,
    keep: int = 2,
    also: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Writes the checkpoint of `step` into `folder`, then removes what is neither among the newest `keep` nor the best.

    All processes call it, with what each has of every tensor; where each has all of it the main one writes. `also`, called on the main
    process once the state is written, puts further files into the checkpoint. The best is the one with the least info["validation_loss"]
    among those that have it. Raises InputError on every process when the disk refuses it.
    """
    path, main = path_of(folder, step), accelerator.is_main_process
    with raise_on_all_ranks(accelerator), ExitStack() as stack:
        partial = path.with_name(f"{path.name}.partial")
        with raise_on_all_ranks(accelerator), writing(path):
            if main:
                stack.enter_context(whole_or_nothing(path)).mkdir()
        files = write_state(path, partial, chunks, accelerator)
        if main:
            also(partial)
            state = json.loads(json.dumps({"step": step, **info, "files": files}))
            (partial / "state.json").write_text(json.dumps({**state, CHECKSUM: of_state(state)}, indent=1), "utf-8")
    if main:
        remove_older(folder, keep)
    return path


def path_of(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return folder / f"step-{step:08d}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context whose failure to write is an InputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise could_not_write(path, error) from error


def write_state(path: Path, folder: Path, chunks: "Mapping[str, Chunk]", accelerator: Accelerator) -> dict[str, int]:
    """Writes the state of the checkpoint `path` into safetensors in `folder`, and returns their checksums by name. Raises as `save`."""
    sharded = any(chunk.value.shape != chunk.shape for chunk in chunks.values())
    if accelerator.num_processes > 1:
        sharded = any(gather_object([sharded]))
    if sharded:
        with writing(path):
            write_chunks(folder, chunks)
    sums: list[tuple[str, int]] = []
    with raise_on_all_ranks(accelerator), writing(path):
        if accelerator.is_main_process and not sharded:
            tensors: Tensors = {name: Held.of(chunk.value) for name, chunk in chunks.items()}
            write_shards(folder, "state", tensors, {"format": "pt"}, None, LARGEST_FILE)
        if accelerator.is_main_process or sharded:
            own = f"shard-{accelerator.process_index + 1:05d}-*.safetensors" if sharded else "*.safetensors"
            sums = [(file.name, checksum(file)) for file in sorted(folder.glob(own))]
    return dict(sorted(gather_object(sums) if sharded else sums))


def write_chunks(folder: Path, chunks: "Mapping[str, Chunk]") -> None:
    """Writes this process's rows of every tensor into files of its own, all at once. Raises on every process what one of them meets."""
    from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, SavePlan
    from torch.distributed.checkpoint import save as save_distributed
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    def item_of(name: str, chunk: "Chunk") -> WriteItem:
        offsets = torch.Size([chunk.first, *[0] * (len(chunk.shape) - 1)][: len(chunk.shape)])
        rows = ChunkStorageMetadata(offsets=offsets, sizes=chunk.value.shape)
        data = TensorWriteData(chunk=rows, properties=TensorProperties.create_from_tensor(chunk.value), size=chunk.shape)
        return WriteItem(index=MetadataIndex(name, offsets), type=WriteItemType.SHARD, tensor_data=data)

    class Planner(DefaultSavePlanner):
        """Rows are written from where they lie: as DTensors, those on the CPU would all be copied to the GPU first."""

        def create_local_plan(self) -> SavePlan:
            there = (pair for pair in chunks.items() if pair[1].value.numel() or not math.prod(pair[1].shape))
            self.plan = SavePlan([item_of(name, chunk) for name, chunk in there])
            return self.plan

        def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
            return chunks[write_item.index.fqn].value

    state = {name: chunk.value for name, chunk in chunks.items()}
    files = split({name: Held.of(value) for name, value in state.items()}, None, LARGEST_FILE)  # each is in memory while it is written
    file_of = {name: number for number, file in enumerate(files, start=1) for name in file}
    writer, planner = HuggingFaceStorageWriter(str(folder), file_of, save_distributed=True), Planner(flatten_state_dict=False)
    try:
        save_distributed(state, storage_writer=writer, planner=planner)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def remove_older(folder: Path, keep: int) -> None:
    """Removes the checkpoints that are neither among the newest `keep` nor the best; one that cannot be removed is told."""
    unwanted: list[Path] = []
    with told_if_refused(folder):
        there = checkpoints(folder)
        kept = {*there[-keep:], best(there)}
        unwanted = [*folder.glob("step-*.partial"), *(old for old in there if old not in kept)]  # the former of runs killed while saving
    for old in unwanted:
        with told_if_refused(old):  # under another name first: half of a checkpoint should not look like one
            shutil.rmtree(old if old.suffix == ".partial" else old.rename(old.with_name(f"{old.name}.partial")))


@contextmanager
def told_if_refused(old: Path) -> Iterator[None]:
    """A context that prints what keeps `old` from being removed: what was saved since is no less whole."""
    try:
        yield
    except OSError as error:
        print(f"warning: the older {shown(old)} could not be removed: {error.strerror}; what was saved since is whole", flush=True)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole unless something was done to them since, oldest first. An empty folder is none."""
    if not folder.is_dir():
        return []
    named = sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))
    return [path for path in named if (path / "state.json").exists() or state_files(path)]


def best(paths: list[Path]) -> Path | None:
    """The checkpoint with the least validation loss; None when none was validated."""
    losses = {}
    for path in paths:
        try:
            loss = number(state_of(path).get("validation_loss"))
        except InputError:
            continue
        if loss is not None:
            losses[path] = loss
    return min(losses, key=losses.get) if losses else None


class DamagedCheckpoint(InputError):
    """What is in a checkpoint is not what was written."""

    def __init__(self, path: Path, what: str):
        self.told = f"checkpoint {shown(path)} cannot be read ({what})"
        super().__init__(f"{self.told}; move it away to resume from the one before")


@contextmanager
def reading_from(path: Path) -> Iterator[None]:
    """A context whose failure to read a checkpoint says nothing of what it holds: InputError, and nothing is renamed."""
    try:
        yield
    except OSError as error:
        why = f"checkpoint {shown(path)} cannot be read now: {reason(error)}. Nothing was renamed; try again, or move it away"
        raise InputError(why) from error


def load(path: Path, verify: bool = True) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, each read from its file when it is asked for; info) of a checkpoint.

    Raises DamagedCheckpoint when its content is not what was written, by its checksums, InputError when it cannot be read now, which says
    nothing of its content. With verify=False the files are not read for their checksums: somebody has just done so.
    """
    info = state_of(path)
    with reading_from(path):
        try:
            files = {file.name: checksum(file) for file in state_files(path)} if verify else info["files"]
        except SpecialFile as error:
            raise DamagedCheckpoint(path, str(error)) from error
    if files != info["files"]:
        changed = sorted(name for name in files.keys() | info["files"].keys() if files.get(name) != info["files"].get(name))
        raise DamagedCheckpoint(path, f"{', '.join(changed)}: not what was written")
    return tensors_of(path), info


def tensors_of(path: Path) -> Tensors:
    """The tensors of a checkpoint, each read from its files when it is asked for. Raises InputError when it cannot be read now."""
    with reading_from(path):
        return read_chunks(state_files(path))


def state_of(path: Path) -> dict[str, Any]:
    """What a checkpoint's state.json says, checked against its own checksum. Raises as `load`."""
    with reading_from(path):
        if state_files(path) and not (path / "state.json").exists():
            raise DamagedCheckpoint(path, "state.json is missing")
        try:
            text = read_bytes(path / "state.json", JSON_BYTES)
        except (SpecialFile, TooLarge) as error:
            raise DamagedCheckpoint(path, str(error)) from error
    try:
        info = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(path, reason(error)) from error
    told = info.pop(CHECKSUM, None) if isinstance(info, dict) else None
    whole = isinstance(info, dict) and (told == of_state(info) or (told is None and is_old(info)))
    if not whole or not isinstance(info.get("files"), dict):
        raise DamagedCheckpoint(path, "state.json: not what was written")
    return info


def is_old(info: Mapping[str, Any]) -> bool:
    """Whether a state.json without a checksum is whole as far as can be seen: one of the versions that wrote none."""
    kinds = {"step": int, "config": dict, "inputs": dict, "data": dict, "files": dict}
    return info.keys() - {"validation_loss"} == kinds.keys() and all(isinstance(info[name], kind) for name, kind in kinds.items())


def of_state(info: Mapping[str, Any]) -> int:
    """CRC-32 of what state.json says, however it is laid out."""
    return zlib.crc32(json.dumps(info, sort_keys=True, separators=(",", ":")).encode())


def newest_whole(folder: Path, tell: Callable[[str], None]) -> Path:
    """The newest checkpoint in `folder` that is whole; a damaged one is told and renamed.

    Raises InputError when there is none, or when the newest cannot be read now.
    """
    there = checkpoints(folder)
    if not there:
        raise InputError(f"{shown(folder)} holds no checkpoint")
    for path in reversed(there):
        try:
            load(path)
            return path
        except DamagedCheckpoint as error:
            problem = f"{error.told}; it is now called {path.rename(name_aside(path)).name}"
            if path != there[0]:
                tell(f"{problem}, going on from the one before")
    raise InputError(f"{problem}, and there is none before it; leave --resume out to start from the first step")


def state_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def checksum(file: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with open_file(file) as opened:
        while block := opened.read(CHUNK):
            value = zlib.crc32(block, value)
    return value
