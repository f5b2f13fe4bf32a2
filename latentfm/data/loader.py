"""From a dataset and its cache to training batches, each sample's randomness a function of (seed, epoch, id) alone.

A reader turns members of a batch, (epoch, sample index, how many times it was drawn before in this epoch), into a Batch; which
members step s has is the stream's matter (latentfm.data.stream), whatever the number of processes. The Loader reads this
process's share ahead.
"""

import gc
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from latentfm.data.stream import Member, Stream
from latentfm.data.table import SampleTable
from latentfm.errors import Failure, InputError
from latentfm.models.encoders import ENCODERS
from latentfm.models.text import PromptParts
from latentfm.randomness import encoded, hashed, uniforms

AHEAD = 4  # batches that each loader process reads ahead

Request = tuple[Sequence[Member], int]  # the members of a micro-batch, and how many T5 tokens it has


@dataclass(frozen=True)
class Dropout:
    """Label dropout: `joint` drops the whole condition, `each` every encoder by itself (SD3 paper: 0.464 each, about 10 % of all)."""

    joint: float
    each: float

    def p_unconditional(self, encoders: int) -> float:
        """The probability that a sample is trained without any condition."""
        return self.joint + (1 - self.joint) * self.each**encoders


@dataclass(frozen=True)
class Routing:
    """Token routing (TREAD, Krause et al. 2025): some blocks see a share `keep` of the image tokens, patches of `patch_size` squared."""

    keep: float
    patch_size: int

    def counts(self, height: int, width: int) -> tuple[int, int]:
        """(kept tokens, all tokens) of latents of height x width."""
        tokens = (height // self.patch_size) * (width // self.patch_size)
        return round(self.keep * tokens), tokens

    def draw(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """The kept tokens, [K] int64 ascending: each set of K is equally likely."""
        kept, tokens = self.counts(height, width)
        return torch.randperm(tokens, generator=generator)[:kept].sort().values


@dataclass
class Batch:
    """What one forward pass needs. moments [B, 2C, h, w] float32; draws as named, one row a sample; ids for error messages.

    A batch that is not encoded yet has pixels and captions instead of moments and parts; one of pairs has latents instead of moments.
    """

    moments: Tensor | None
    parts: PromptParts | None
    dropped: dict[str, Tensor]  # encoder name -> bool [B]
    u: Tensor  # uniform in [0, 1): the draw of t
    vae_noise: Tensor  # [B, C, h, w]
    eps: Tensor  # [B, C, h, w]
    t5_length: int
    ids: list[str]
    kept: Tensor | None = None  # [B, K] int64: the image tokens that routed blocks see; None without routing
    mask: Tensor | None = None  # [B, 1, h, w] float32, the weight of each latent in the loss; None when no sample has one
    prior: Tensor | None = None  # bool [B]: which samples are a regularisation set; None when none is
    pixels: Tensor | None = None  # uint8 [B, 3, H, W]
    captions: list[str] | None = None
    latents: Tensor | None = None  # [B, C, h, w] float32, the network's own: what eps was carried to

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `function` applied to each of its tensors."""

        def mapped(value: object) -> object:
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, dict):
                return {name: function(tensor) for name, tensor in value.items()}
            return value.map(function) if isinstance(value, PromptParts) else value

        return replace(self, **{field.name: mapped(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`; copies from pinned memory do not wait."""
        return self.map(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch with its tensors in pinned memory."""
        return self.map(Tensor.pin_memory)


@dataclass(frozen=True)
class Draws:
    """What is drawn for each member: the settings, all functions of (seed, epoch, id, turn)."""

    seed: int
    dropout: Dropout
    flip: bool = False
    routing: Routing | None = None

    def make(self, table: SampleTable, members: Sequence[Member], shape: tuple[int, int, int]) -> tuple[Batch, list[int], list[bool]]:
        """(a batch without pictures and prompts, the number of each one's caption, whether each is flipped) for latents of `shape`.

        A member's draws are those of `randomness` for its purposes, its epoch, and its id and turn.
        """
        ids, places = places_of(table, members)
        vae_noise, eps = self.normal("vae_noise", places, shape), self.normal("eps", places, shape)
        routed, source, routing = [], torch.Generator(), encoded(self.seed, "routing")
        if self.routing:
            routed = [self.routing.draw(*shape[1:], source.manual_seed(hashed(routing + place))) for place in places]
        joint = self.uniform("dropout", places) < self.dropout.joint
        each = {kind.parts[0]: self.uniform(f"dropout/{kind.parts[0]}", places) < self.dropout.each for kind in ENCODERS}
        prior = table.prior[[index for _, index, _ in members]]
        batch = Batch(
            moments=None,
            parts=None,
            dropped={name: joint | alone for name, alone in each.items()},
            u=self.uniform("t", places),
            vae_noise=vae_noise,
            eps=eps,
            t5_length=0,
            ids=ids,
            kept=torch.stack(routed) if self.routing else None,
            prior=torch.from_numpy(prior) if prior.any() else None,
        )
        chosen = self.uniform("caption", places).tolist()
        captions = [table.caption(index, u) for (_, index, _), u in zip(members, chosen, strict=True)]
        flipped = (self.uniform("flip", places) < 0.5).tolist() if self.flip else [False] * len(members)
        return batch, captions, flipped

    def uniform(self, purpose: str, places: Sequence[bytes]) -> Tensor:
        """[N] float32 in [0, 1), one at each place, an encoded epoch and id."""
        return torch.tensor(uniforms(encoded(self.seed, purpose), places))

    def normal(self, purpose: str, places: Sequence[bytes], shape: tuple[int, int, int]) -> Tensor:
        """[N, *shape] float32, standard normal."""
        found, source, begins = torch.empty(len(places), *shape), torch.Generator(), encoded(self.seed, purpose)
        for row, place in zip(found, places, strict=True):
            torch.randn(shape, generator=source.manual_seed(hashed(begins + place)), out=row)
        return found


def places_of(table: SampleTable, members: Sequence[Member]) -> tuple[list[str], list[bytes]]:
    """(the members' ids, their places): a place is what all that is drawn for a member depends on beside seed and purpose."""
    ids = [table.ids[index] for _, index, _ in members]
    return ids, [encoded(epoch, f"{name}\0{turn}" if turn else name) for (epoch, _, turn), name in zip(members, ids, strict=True)]


class Reader(TorchDataset):
    """Micro-batches of samples: reader[(members, t5_length)] is a Batch, its members all of one bucket.

    `table` has the samples that it counts by, and `draws` says what is drawn for each.
    """

    table: SampleTable
    draws: Draws

    def __getitem__(self, request: Request) -> Batch:
        raise NotImplementedError


def stacked_masks(masks: Sequence[Tensor | None], height: int, width: int) -> Tensor | None:
    """The loss masks [B, 1, h, w], ones for a sample without; None when none has one."""
    if all(mask is None for mask in masks):
        return None
    ones = torch.ones(1, height, width)
    return torch.stack([ones if mask is None else mask for mask in masks])


class Guarded(TorchDataset):
    """A reader whose bad input comes back as a value: a DataLoader wraps what its workers raise in their traceback."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def __getitem__(self, request: Request) -> Batch | InputError:
        try:
            return self.reader[request]
        except InputError as error:
            return error


class Loader:
    """This process's micro-batches of the steps up to `stop`, from its position on, read ahead by `workers` processes.

    Every rank's share of a step is of the same size: the m-th micro-batch of all ranks together is a stretch of the global batch.
    `shares` are the numbers of T5 tokens and how often each is drawn; a step has one. Its position is a step: state_dict() is where the
    batches handed out so far end, and iterating goes on from there.

    Raises ValueError when the global batch does not divide by world x accumulation; while iterating InputError for what cannot be
    read, and Failure for a loader process that died.
    """

    def __init__(
        self, reader: Reader, stream: Stream, shares: dict[int, float], stop: int, accumulation: int = 1, rank: int = 0, world: int = 1,
        workers: int = 0, pin: bool = False,
    ):  # fmt: skip
        if stream.batch_size % (world * accumulation):
            raise ValueError(f"a batch of {stream.batch_size} does not divide by {world} processes x {accumulation} micro-batches")
        self.reader, self.stream, self.shares, self.stop = reader, stream, shares, stop
        self.accumulation, self.rank, self.world, self.workers, self.pin = accumulation, rank, world, workers, pin
        self.step = 0

    @cached_property
    def identity(self) -> dict[str, int | str]:
        """What a state of this loader holds beside its place: another batch size or other samples are another run."""
        return {"batch_size": self.stream.batch_size, "samples": self.reader.table.digest()}

    def state_dict(self) -> dict[str, int | str]:
        """{"seed", "epoch", "cursor", "step"} of the first step whose batches have not all been handed out, and `identity`."""
        return self.stream.state(self.step) | self.identity

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Goes to where `state`, a state_dict() or a Stream.state(), was taken. Raises InputError when it is of another run."""
        for name, mine in self.identity.items():
            if state.get(name, mine) != mine:
                raise InputError(f"the data of this run are not the checkpoint's: {name} was {state[name]}, is {mine}; restore it")
        self.step = self.stream.step_of(state)

    def requests(self) -> Iterator[Request]:
        """What each micro-batch of this rank holds, from the position on."""
        micro = self.stream.batch_size // (self.world * self.accumulation)
        for step in range(self.step, self.stop):
            members, length = self.stream.members(step), self.stream.choose(step, self.shares)
            for m in range(self.accumulation):
                first = (m * self.world + self.rank) * micro
                yield members[first : first + micro], length

    def __iter__(self) -> Iterator[Batch]:
        source = DataLoader(
            Guarded(self.reader), sampler=self.requests(), batch_size=None, num_workers=self.workers, pin_memory=self.pin,
            prefetch_factor=AHEAD if self.workers else None, worker_init_fn=freeze_gc,
        )  # fmt: skip
        found = started(source)
        for _ in range(self.step, self.stop):
            for m in range(self.accumulation):
                try:
                    batch = next(found)
                except (RuntimeError, OSError, EOFError) as error:  # the last two where it died while it handed a batch over
                    ended = how_they_ended(found)
                    if not ended:
                        raise
                    raise Failure(
                        f"a process that reads batches ahead died ({ended}); if the machine ran out of memory, "
                        f"lower data.workers (now {self.workers}); the run goes on with --resume"
                    ) from error
                if isinstance(batch, InputError):
                    raise batch
                self.step += m + 1 == self.accumulation
                yield batch


def started(source: DataLoader) -> Iterator[Batch | InputError]:
    """The iterator of a DataLoader, without its handler of SIGCHLD.

    That one raises the death of a process wherever the main thread happens to be, in the middle of an update or of a save. Without
    it a dead process is noticed by the next batch that waits for it.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(source)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(source)
    finally:
        signal.signal(signal.SIGCHLD, before)


def how_they_ended(found: Iterator) -> str:
    """Which processes of a DataLoader's iterator have ended, and how."""
    workers = getattr(found, "_workers", ())
    for process in workers:
        process.join(0.1)  # what it had open closes before it has ended
    ended = [process for process in workers if process.exitcode is not None]
    return ", ".join(
        f"pid {process.pid}, " + (f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}")
        for process in ended
    )


def freeze_gc(worker: int) -> None:
    """Keeps the garbage collector of a loader process from the objects it shares with its parent: looking at them copies their pages."""
    gc.freeze()
