"""Bytes that training an MM-DiT and drawing with it take, part by part and phase by phase, in closed form. Needs no torch.

What a block keeps for its backward pass follows models/block.py line by line, and is tested against autograd's saved tensors for each
precision on the CPU and on a traced GPU. Left out: the GPU's context and what its allocator cannot use (together about 1 GB).
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from latentfm.bounds import EMA_CHUNK, OPTIMIZER_CHUNK, SHORT_ATTENTION
from latentfm.optimizers import MOMENTS
from latentfm.planning.cost import (
    TIME_FEATURES,
    Network,
    block_linears,
    block_matrices,
    block_parameters,
    by_part,
    checkpointed,
    lora_parameters,
    parameters,
    position_table,
)

Precision = Literal["float32", "autocast", "bfloat16"]
Quantised = Literal["nf4", "int8"]
LAID_OUT = 2**30  # bytes of weights that models/onednn.py makes a copy of at most; a test holds this to it
MODULATIONS = 128  # prompts times steps whose modulations models/schedule.py has together, as it says: a test holds this to it


@dataclass(frozen=True)
class Training:
    """A training run as one GPU sees it."""

    image: int  # tokens
    text: int  # tokens
    batch: int  # pictures in one forward pass
    precision: Precision = "autocast"  # autocast: float32 weights, products in bfloat16
    rank: int | None = None  # of a LoRA on LORA_TARGETS; None trains every parameter
    checkpointing: float = 0.0  # share of the blocks that is computed again in the backward pass
    master: bool = False  # float32 masters of bfloat16 weights
    narrow_moments: bool = False  # bfloat16 moments of the optimizer
    accumulated: bool = False  # whether gradients of earlier passes are there in the forward pass
    shards: int = 1  # GPUs that weights, gradients, optimizer and averages are split over (FSDP2)
    offloaded: bool = False  # what is split is on the CPU between its uses
    frozen: int = 0  # bytes of frozen models on the GPU
    pictures: int = 0  # sample pictures drawn together
    decoding: int = 0  # bytes that decoding them takes
    encoders: int = 0  # bytes of the text encoders, which are on the GPU while the cache is filled
    encoding: int = 0  # bytes that encoding pictures or captions takes beside the frozen models
    online: bool = False  # no cache: a batch is encoded in every step
    cpu: bool = False  # the CPU's kernels keep other things than a GPU's
    ema_on_cpu: bool = False
    state: float = MOMENTS  # bytes of the optimizer's state for each number it moves, its moments in float32
    matrices: bool = False  # whether it keeps half of that for the blocks' matrices (Muon)
    trains: tuple[int, ...] | None = None  # numbers that train in each block, then around them; None is all, or a LoRA on LORA_TARGETS
    everywhere: bool = False  # whether adapters lie on more than LORA_TARGETS: what is kept is then counted as if all trained
    wide_adapters: bool = False  # float32 adapters on bfloat16 weights
    quantised: Quantised | None = None  # how the frozen matrices of the blocks are stored instead
    routed: tuple[int, int, int] | None = None  # first and last block that see only so many image tokens

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.precision == "bfloat16" else 4

    @property
    def trained_width(self) -> int:
        """Bytes of a weight that trains, and of its gradient."""
        return 4 if self.wide_adapters else self.width

    @property
    def optimizer_width(self) -> float:
        """Bytes of the optimizer's state for a number that trains, its float32 master included."""
        return self.state / (2 if self.narrow_moments else 1) + 4 * self.master

    @property
    def gathers(self) -> bool:
        """Whether the weights are split, and gathered for each pass."""
        return self.shards > 1 or self.offloaded

    @property
    def compute(self) -> int:
        """Bytes of an activation."""
        return 4 if self.precision == "float32" else 2

    def nothing_before(self, block: int) -> bool:
        """Whether neither a block before this one trains nor anything around the blocks."""
        return self.trains is not None and not any((*self.trains[:block], self.trains[-1]))

    def seen_by(self, block: int) -> "Training":
        """The run as one block sees it: with the image tokens that are routed through it."""
        routed = self.routed is not None and self.routed[0] <= block <= self.routed[1]
        return replace(self, image=self.routed[2]) if routed else self


class Phase(NamedTuple):
    """What is in memory in one phase of a run, in bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def block_activations(net: Network, block: int, run: Training) -> int:
    """Bytes that one block keeps for its backward pass; not its weights, nor bfloat16 copies of them (block_copies)."""
    dim, c, full = net.dim, run.compute, run.rank is None
    last, rank = net.last(block), run.rank or 0
    moved = (full or block > 0) and not (run.cpu and run.nothing_before(block))  # whether a gradient is wanted of what comes in
    norm = (1 + full) * dim * 4 if run.cpu else dim * (4 if run.precision == "autocast" else c)  # of a query-key norm's input
    statistic = c if run.cpu else 4
    # peft's adapters ask for float32: each linear makes a copy for itself, which autocast makes bfloat16 again
    recast, a = (run.precision == "autocast" and not full) or run.wide_adapters, 4 if run.wide_adapters else c
    again = full and run.cpu  # what an accelerator computes a second time: the norms' results and GELU's
    per_picture = 0
    for tokens, read_only in ((run.image, False), (run.text, last)):
        read = 2 if read_only else 3  # key, value and query
        one = tokens * dim * c
        if moved:
            per_picture += one + 2 * tokens * statistic + dim * c  # the norm's input and statistics, its scale
        into = tokens * dim * a
        per_picture += (read if recast else 1) * into + read * tokens * rank * a  # input of the linears, and of LoRA's second ones
        per_picture += net.qk_norm * (read - 1) * tokens * (norm + net.heads * 4)
        if read_only:
            per_picture += again * one
            continue
        # both streams' attention lies in one tensor: a copy unless the batch is one picture
        if recast or (run.batch > 1 and not last) or in_float32(run, run.image + run.text):
            per_picture += into
        per_picture += tokens * rank * a
        per_picture += one + 2 * tokens * statistic + dim * c  # the feed-forward's norm: input, statistics, scale
        per_picture += (1 + again) * 4 * one + again * 2 * one  # before GELU and after; what both norms give
        per_picture += full * (1 + 1 + 1) * one  # attention's output, the feed-forward's input and output
    queries = run.image if last else run.image + run.text
    per_picture += attention_activations(net, queries, run.image + run.text, run)
    of_image, of_text = net.modulations(block)
    per_picture += (of_image + (0 if last else of_text)) * dim * c  # the gates, which are parts of these vectors
    if block in net.dual and (full or moved):
        one = run.image * dim * c
        per_picture += moved * (2 * run.image * statistic + dim * c)
        # the linears' input, what they give, what the norm does, and the attention's output where it is not the kernel's
        per_picture += full * ((3 if recast else 1) + 1 + again + in_float32(run, run.image)) * one
        per_picture += net.qk_norm * 2 * run.image * (norm + net.heads * 4)
        per_picture += attention_activations(net, run.image, run.image, run)
    return run.batch * per_picture


def in_float32(run: Training, keys: int) -> bool:
    """Whether attention over `keys` tokens is trained in float32 in a run in bfloat16."""
    return run.cpu and run.compute == 2 and keys <= SHORT_ATTENTION


def attention_activations(net: Network, queries: int, keys: int, run: Training) -> int:
    """Bytes one picture's attention keeps: query, key, value, output, and the logarithm of each query's sum of exponentials."""
    return 2 * (queries + keys) * net.dim * (4 if in_float32(run, keys) else run.compute) + queries * net.heads * 4


def block_input(net: Network, block: int, run: Training) -> int:
    """Bytes that a checkpointed block keeps: what comes into it."""
    return run.batch * (run.image + run.text) * net.dim * run.compute


def end_activations(net: Network, run: Training) -> int:
    """Bytes kept before the first block and after the last, the data (in the precision of the products) included."""
    dim, c, full = net.dim, run.compute, run.rank is None
    per_picture = dim * c + run.image * dim * c + 2 * run.image * (c if run.cpu else 4)  # the last norm: scale, input, statistics
    if full:
        per_picture += run.cpu * run.image * dim * c  # what the last norm gives
        data = net.in_channels * net.patch**2 * run.image + run.text * net.text_dim + net.pooled_dim + TIME_FEATURES
        per_picture += (data + 6 * dim + run.image * dim) * c  # two SiLUs and the conditioning vector, twice each; the output's input
    return run.batch * per_picture


def block_copies(net: Network, block: int, run: Training) -> int:
    """Bytes of the bfloat16 copies of a block's weights that autocast makes and the backward pass needs."""
    if run.precision != "autocast":
        return 0
    dim, last = net.dim, net.last(block)
    if run.rank is None:
        return 2 * (block_matrices(net, block) - last * dim**2)  # the last block's text has no queries
    moved = block > 0
    linears = 9 + 9 * (not last) + moved * (3 + (2 if last else 3) + 4 * (block in net.dual))
    linears *= run.quantised is None  # widened for the moment of a product alone
    into, out = (5, 1) if last else (6, 2)
    return 2 * (dim**2 * linears + dim * run.rank * (into * (1 + moved) + out * 2))


def end_copies(net: Network, run: Training) -> int:
    """Bytes of the bfloat16 copies of the other weights, as block_copies."""
    if run.precision != "autocast":
        return 0
    output = net.dim * net.patch**2 * net.out_channels
    patches = net.dim * net.patch**2 * net.in_channels
    return 2 * (output + (patches + 4 * net.dim**2 if run.rank is None else 0))


def trained_in(net: Network, block: int, run: Training) -> int:
    """How many numbers of one block train."""
    if run.trains is not None:
        return run.trains[block]
    return block_parameters(net, block) if run.rank is None else lora_parameters(net, block, run.rank)


def optimizer_bytes(net: Network, run: Training, numbers: int) -> int:
    """Bytes of the optimizer's state for all `numbers` that train, masters included."""
    found = numbers * run.optimizer_width
    if run.matrices:  # an adapter is matrices, but for DoRA's few magnitudes
        trained = [trained_in(net, i, run) for i in range(net.layers)]
        found -= run.state / 2 * sum(each if run.rank else min(each, block_matrices(net, i)) for i, each in enumerate(trained))
    return int(found)


def kept_in(net: Network, block: int, run: Training) -> int:
    """Bytes that one block, not checkpointed, keeps for the backward pass; nothing where nothing trains in it or before it."""
    if run.nothing_before(block + 1):
        return 0
    seen = run.seen_by(block)
    kept = block_activations(net, block, seen)
    return max(kept, block_activations(net, block, replace(seen, rank=None))) if run.everywhere else kept


def frozen_bytes(net: Network, run: Training) -> int:
    """Bytes of the weights that an adapter is added to.

    NF4 has 4 bits a number, 8 more for each 64 of them, and 32 for each 256 of those (QLoRA, Dettmers et al. 2023, section 3); int8 has
    32 for each row (LLM.int8, Dettmers et al. 2022). Only the matrices of the blocks are stored so.
    """
    width, whole = run.width, sum(parameters(net).values())
    if run.quantised is None:
        return whole * width
    matrices = sum(block_matrices(net, block) for block in range(net.layers))
    each = 0.5 + 1 / 64 + 4 / (64 * 256) if run.quantised == "nf4" else 1 + 4 / net.dim
    return (whole - matrices) * width + int(matrices * each)


def training_phases(net: Network, run: Training) -> list[Phase]:
    """The phases of a run that can be its highest in memory, in their order: before it, in a step from the second on, and after.

    The gradients grow through the backward pass as the activations go, so that its highest point may be any block's.
    """
    blocks = range(net.layers)
    trained = [trained_in(net, i, run) for i in blocks]
    in_blocks, whole = sum(trained), sum(parameters(net).values())
    ends = whole - sum(block_parameters(net, i) for i in blocks) if run.rank is None else 0
    ends = ends if run.trains is None else run.trains[-1]
    numbers, parts, here = in_blocks + ends, run.shards, not run.offloaded
    weights = whole * run.width if run.rank is None else frozen_bytes(net, run) + numbers * run.trained_width
    largest = max(block_parameters(net, i) for i in blocks)
    always = {
        "weights": here * weights // parts,
        "position table": position_table(net) * run.width,
        "optimizer": here * optimizer_bytes(net, run, numbers) // parts,
        "averages (EMA)": (here and not run.ema_on_cpu) * numbers * 4 // parts,
        "gathered weights": run.gathers * 2 * largest * (1 + (run.rank is None)) * run.compute,
        "frozen models": run.frozen,
        "batch": run.batch * 4 * (run.text * net.text_dim + net.pooled_dim + 8 * net.in_channels * net.patch**2 * run.image),
    }
    once = [kept_in(net, i, run) for i in blocks]
    kept = [min(block_input(net, i, run.seen_by(i)), once[i]) if checkpointed(i, run.checkpointing) else once[i] for i in blocks]
    copies = [0 if run.gathers or not once[i] else block_copies(net, i, run) for i in blocks]
    stays = [0 if checkpointed(i, run.checkpointing) else copies[i] for i in blocks]
    outer, outer_copies = end_activations(net, run), 0 if run.gathers else end_copies(net, run)
    gradient = here * run.trained_width

    def phase(name: str, **changing: int) -> Phase:
        return Phase(name, by_part([*always.items(), *((part.replace("_", " "), size) for part, size in changing.items())]))

    filling = by_part([("frozen models", run.frozen), ("text encoders", run.encoders), ("working memory", run.encoding)])
    found = [
        phase("encoding a batch", working_memory=run.encoding) if run.online else Phase("filling the cache", filling),
        phase(
            "end of the forward pass",
            activations=sum(kept) + outer,
            # autocast's own store has every weight that trains until the pass ends
            bfloat16_copies=outer_copies + (sum(copies) if run.rank is None else sum(stays)),
            gradients=run.accumulated * numbers * gradient // parts,
        ),
    ]
    for block in reversed(blocks):
        later = 0 if run.accumulated else sum(trained[: block + 1])
        found.append(
            phase(
                f"backward pass of block {block}",
                activations=sum(kept[:block]) + outer + once[block],
                bfloat16_copies=outer_copies + sum(stays[:block]) + copies[block],
                gradients=(numbers - later) * gradient // parts,
                working_memory=working_memory(net, run),
            )
        )
    widened = 0 if run.precision != "bfloat16" or run.offloaded else min(numbers, OPTIMIZER_CHUNK) * (22 if run.narrow_moments else 14)
    averaged = 0 if run.precision != "bfloat16" or run.offloaded else min(numbers, EMA_CHUNK) * 4
    found.append(phase("optimizer step", gradients=numbers * gradient // parts, working_memory=max(widened, averaged)))
    if run.pictures:
        found.append(
            phase(
                "drawing sample pictures",
                weights_put_aside=numbers * gradient // parts,
                weights_laid_out=(run.cpu and run.precision != "autocast") * laid_out(net, run.width),
                working_memory=max(run.decoding, forward_memory(net, run.image, run.text, 2 * run.pictures, run.width)),
            )
        )
    return found


def working_memory(net: Network, run: Training) -> int:
    """Bytes the backward pass of a block takes beside what was kept, at their most: gradients in the feed-forward.

    They are there when the block's activations still are: both streams' and two of the feed-forward's inner, after GELU and before it.
    """
    dim, c, longer = net.dim, run.compute, max(run.image, run.text)
    widened = 9 * dim**2 * c if run.quantised else 0  # the largest matrix, a modulation's, as the product takes it
    return run.batch * (run.image + run.text + 8 * longer) * dim * c + widened


def forward_memory(net: Network, image: int, text: int, batch: int, width: int, cpu: bool = False) -> int:
    """Bytes one block takes in a forward pass without gradients, at the most.

    In the attention: the streams, their normed copies, query, key and value apart and joined, and what it gives. In a feed-forward: the
    streams as they came and as they are, the attention's outputs, the normed copy, and the inner activations before and after GELU; a
    CPU makes GELU part of the product.
    """
    attention = 9 * (image + text)
    inner = 4 if cpu else 8
    of_image, of_text = (4 + inner) * image + 2 * text, 4 * image + (4 + inner) * text
    return batch * max(attention, of_image, of_text) * net.dim * width


def laid_out(net: Network, width: int) -> int:
    """Bytes of the copy of the blocks' weights but the modulations' that drawing on a CPU makes for its kernels; none of a large one."""
    linears = [linear for block in range(net.layers) for linear in block_linears(net, block).items() if not linear[0].startswith("norm")]
    size = width * sum(inputs * outputs for _, (inputs, outputs) in linears)
    return size if size <= LAID_OUT else 0


def drawing_phases(
    net: Network, image: int, text: int, pictures: int, guided: bool, steps: int, width: int, frozen: int, decoding: int
) -> list[Phase]:
    """The phases of drawing `pictures` together that can be the highest in memory; weights and activations of `width` bytes.

    frozen: bytes of text encoders and VAE, which stay beside the network; decoding: those that decoding one picture after the other
    takes. The modulations of as many steps as MMDiT's Precomputed takes together are there at a time.
    """
    batch = (2 if guided else 1) * pictures
    together = min(steps, max(1, MODULATIONS // batch))
    vectors = 3 + sum(parts + max(1, parts // 3) for i in range(net.layers) for parts in net.modulations(i))  # the scales twice
    always = {
        "weights": sum(parameters(net).values()) * width,
        "position table": position_table(net) * width,
        "text encoders and VAE": frozen,
        "modulations of steps ahead": batch * together * vectors * net.dim * width,
        "batch": batch * (text * (net.text_dim + net.dim) * width + 4 * 4 * net.in_channels * net.patch**2 * image),
    }
    return [
        Phase("denoising", always | {"working memory": forward_memory(net, image, text, batch, width)}),
        Phase("decoding", always | {"working memory": decoding}),
    ]


def fullest(phases: list[Phase]) -> Phase:
    """The phase with most in memory."""
    return max(phases, key=lambda phase: phase.total)


def totals(phases: list[Phase]) -> dict[str, int]:
    """The bytes in each phase; of the backward pass those of its fullest block alone."""
    found: dict[str, int] = {}
    for phase in phases:
        name = "backward pass" if phase.name.startswith("backward pass") else phase.name
        found[name] = max(phase.total, found.get(name, 0))
    return found
