"""The kinds of adapter whose change of a weight is a product of two matrices, a row each: all are read as the LoRA that computes the same.

Such a change depends on the adapter alone, so that it can be scaled, mixed, fused and unloaded as LoRA's; one that depends also on the
weight (OFT, GLoRA) is none of these. LoHa and LoKr: Yeh et al. 2024, "Navigating text-to-image customization: from LyCORIS fine-tuning to
model evaluation"; their scale as LyCORIS has it.

To add one: a row in KINDS, its tensors and a function that makes the two matrices of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from latentfm.interchange.lora.formats import BIAS, MAGNITUDE, A, B
from latentfm.interchange.tensors import LazyTensor, Stored

# Numbers of a linear that matrices are made for (SD3.5 large's largest has 53 million), and of all matrices of a LoRA
MOST_NUMBERS, MOST_TOGETHER = 2**27, 2**35


@dataclass(frozen=True)
class Matrices:
    """A LoRA of one linear: alpha / rank * up @ down is added to its weight.

    down [rank, in], up [out, rank]; of a convolution [rank, in, k, k] and [out, rank, 1, 1]. alpha None: the rank. magnitude [out]: of a
    DoRA. bias [out]: added to what down and up make, before the scale.
    """

    down: Stored
    up: Stored
    alpha: float | None = None
    magnitude: Stored | None = None
    bias: Stored | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def parts(self) -> dict[str, Stored]:
        """The tensors by diffusers' names for them."""
        found = {A: self.down, B: self.up, MAGNITUDE: self.magnitude, BIAS: self.bias}
        return {part: value for part, value in found.items() if value is not None}


def whole(number: float) -> float:
    """The number, as int where it is a whole one, as trainers write it."""
    return int(number) if number == int(number) else number


@dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    title: for people. tensors: the sets of tensors that make one, by the endings of their names. matrices: of these and alpha.
    """

    title: str
    tensors: tuple[tuple[str, ...], ...]
    matrices: Callable[[Mapping[str, Stored], float | None], Matrices]


def lora(found: Mapping[str, Stored], alpha: float | None) -> Matrices:
    """The two matrices as they are."""
    down, up = found[A], found[B]
    if len(down.shape) not in (2, 4) or len(up.shape) != len(down.shape) or down.shape[0] != up.shape[1] or down.shape[0] < 1:
        raise ValueError(f"the matrices, {list(down.shape)} and {list(up.shape)}, are no pair of one rank")
    return Matrices(down, up, alpha)


def loha(found: Mapping[str, Stored], alpha: float | None) -> Matrices:
    """(a1 b1) times (a2 b2) entry by entry: column i of a1 times column j of a2 for all i and j, and b's rows likewise; of rank r1 r2."""
    a1, b1, a2, b2 = (found[name] for name in KINDS["loha"].tensors[0])
    check_matrices("LoHa", a1, b1, a2, b2)
    (out, r1), (r2, into) = a1.shape, b2.shape
    if (b1.shape, a2.shape) != ((r1, into), (out, r2)):
        raise ValueError(f"{[list(value.shape) for value in (a1, b1, a2, b2)]} are no LoHa of a linear")
    scale = 1.0 if alpha is None else alpha / r1
    if (rank := r1 * r2) >= min(out, into):
        return dense((out, into), torch.float32, lambda: (full(a1) @ full(b1)) * (full(a2) @ full(b2)), scale)
    check_size(out, into)
    up = made(torch.float32, (out, rank), lambda: (full(a1)[:, :, None] * full(a2)[:, None]).flatten(1))
    down = made(torch.float32, (rank, into), lambda: (full(b1)[:, None] * full(b2)[None]).flatten(0, 1))
    return Matrices(down, up, whole(scale * rank))


def lokr(found: Mapping[str, Stored], alpha: float | None) -> Matrices:
    """kron(w1, w2), each factor whole or a product: with w1 = u1 v1 and w2 = u2 v2 it is kron(u1, u2) kron(v1, v2).

    A whole factor is its product with the identity. Where one factor stands on the left and the other on the right of theirs, there is
    nothing to multiply: the entries are the factors' own, in their own dtype.
    """
    first, second = ([value for end in ("", "_a", "_b") if (value := found.get(f"lokr_{w}{end}"))] for w in ("w1", "w2"))
    check_matrices("LoKr", *first, *second)
    if any(len(factor) == 2 and factor[0].shape[1] != factor[1].shape[0] for factor in (first, second)):
        raise ValueError(f"{[list(value.shape) for value in (*first, *second)]} are no LoKr of a linear")
    ranks = [factor[1].shape[0] for factor in (second, first) if len(factor) == 2]
    scale = alpha / ranks[0] if ranks and alpha is not None else 1.0  # where both are whole there is no rank, and LyCORIS takes no alpha
    left_1, left_2 = (factor[-1].shape[1] <= factor[0].shape[0] for factor in (first, second))
    if left_1 == left_2 and first[0].shape[0] == first[-1].shape[1]:
        left_1 = not left_2
    elif left_1 == left_2 and second[0].shape[0] == second[-1].shape[1]:
        left_2 = not left_1
    (u1, v1), (u2, v2) = halves(first, left_1), halves(second, left_2)
    out, into = first[0].shape[0] * second[0].shape[0], first[-1].shape[1] * second[-1].shape[1]
    check_size(out, into)
    if (rank := width(u1) * width(u2)) > min(out, into):
        return dense((out, into), torch.float32, lambda: torch.kron(full(u1) @ full(v1), full(u2) @ full(v2)), scale)
    dtype = torch.float32 if ranks or left_1 == left_2 else torch.promote_types(first[0].dtype, second[0].dtype)
    up = made(dtype, (out, rank), lambda: torch.kron(full(u1, dtype), full(u2, dtype)))
    down = made(dtype, (rank, into), lambda: torch.kron(full(v1, dtype), full(v2, dtype)))
    return Matrices(down, up, whole(scale * rank))


def difference(found: Mapping[str, Stored], alpha: float | None) -> Matrices:
    """A change of a linear's whole weight; it has no alpha."""
    change = found["diff"]
    check_matrices("difference of weights", change)
    return dense(change.shape, change.dtype, change.load, 1.0)


KINDS = {
    "lora": Kind("LoRA", ((A, B),), lora),
    "loha": Kind("LoHa", (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),), loha),
    "lokr": Kind(
        "LoKr",
        tuple(
            (*first, *second)
            for first, second in product((("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")), (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")))
        ),
        lokr,
    ),
    "full": Kind("whole difference of weights", (("diff",),), difference),
}


def kind_of(module: str, parts: set[str]) -> str:
    """The row of KINDS that these parts are of. Raises ValueError for parts of two kinds, or not all of one."""
    kinds = [name for name, kind in KINDS.items() if any(parts & set(tensors) for tensors in kind.tensors)] or ["lora"]
    titles = [KINDS[name].title for name in kinds]
    if len(kinds) > 1:
        raise ValueError(f"{module} is adapted twice, by a {titles[0]} and a {titles[1]}")
    own = parts & {name for tensors in KINDS[kinds[0]].tensors for name in tensors}
    lacks = [[name for name in tensors if name not in own] for tensors in KINDS[kinds[0]].tensors if own <= set(tensors)]
    if not lacks:
        raise ValueError(f"{module} has {', '.join(sorted(own))}, which no {titles[0]} has together")
    if fewest := min(lacks, key=len):
        raise ValueError(f"it has no {' and '.join(fewest)} for {module}")
    return kinds[0]


def check_matrices(title: str, *values: Stored) -> None:
    """Raises ValueError for what is no matrix of numbers, as the core of a convolution's adapter."""
    if any(len(value.shape) != 2 or not value.numel for value in values):
        raise ValueError(f"{[list(value.shape) for value in values]} are no {title} of a linear")


def check_size(out: int, into: int) -> None:
    """Raises ValueError for a linear beyond every model's."""
    if out * into > MOST_NUMBERS:
        raise ValueError(f"it is for a linear of {into:,} numbers in and {out:,} out, which no SD3 model has")


def halves(factor: list[Stored], left: bool) -> tuple[Stored | int, Stored | int]:
    """The two matrices that a factor of a LoKr is the product of; a number stands for the identity of that size."""
    if len(factor) == 2:
        return factor[0], factor[1]
    return (factor[0], factor[0].shape[1]) if left else (factor[0].shape[0], factor[0])


def width(half: Stored | int) -> int:
    return half if isinstance(half, int) else half.shape[1]


def full(half: Stored | int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix in memory."""
    return torch.eye(half, dtype=dtype) if isinstance(half, int) else half.load(dtype)


def made(dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Stored:
    """A tensor that is made when it is needed."""
    return LazyTensor(dtype, shape, (), make)


def dense(shape: tuple[int, ...], dtype: torch.dtype, change: Callable[[], Tensor], scale: float) -> Matrices:
    """A whole change [out, in] of a weight as two matrices, one of them the identity."""
    check_size(*shape)
    out, into = shape
    rank = min(out, into)
    identity = made(dtype, (rank, rank), lambda: torch.eye(rank, dtype=dtype))
    changed = made(dtype, shape, change)
    down, up = (identity, changed) if into <= out else (changed, identity)
    return Matrices(down, up, whole(scale * rank))


def rows(value: Stored, parts: int) -> list[Stored]:
    """`parts` equal tensors, one after the other along the first dimension."""
    if value.shape[0] % parts:
        raise ValueError(f"a tensor of {value.shape[0]} rows does not divide into {parts}")
    if type(value) is Stored:
        return value.chunk(parts)
    shape = (value.shape[0] // parts, *value.shape[1:])
    return [made(value.dtype, shape, lambda i=i: value.load().chunk(parts)[i]) for i in range(parts)]
