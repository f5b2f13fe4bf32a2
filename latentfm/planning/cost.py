"""What an MM-DiT costs: its parameters, and the floating-point operations of an image, in closed form. Needs no torch.

N image tokens, L text tokens, S = N + L, D = 64 heads wide in SD3's models. A multiply-add is 2 FLOP; only products of matrices
are counted, as by torch.utils.flop_counter. planning/memory.py has the bytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from latentfm.errors import InputError
from latentfm.models.linears import LORA_TARGETS

TIME_FEATURES = 256  # sines and cosines of the timestep
# the scores are computed a second time in the backward pass, where flash attention has not kept them: 2 products forward, 5 backward
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Network:
    """The part of an MM-DiT's configuration that decides its cost."""

    layers: int
    heads: int
    head_dim: int
    patch: int
    in_channels: int
    out_channels: int
    text_dim: int
    pooled_dim: int
    table: int  # patches a side of the position table
    qk_norm: bool
    dual: tuple[int, ...]  # blocks with SD3.5 medium's second attention

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Network":
        """The network of a configuration: a preset, or a transformer's config.json. Raises InputError naming what is missing."""
        try:
            return cls(
                layers=config["num_layers"], heads=config["num_attention_heads"], head_dim=config["attention_head_dim"],
                patch=config["patch_size"], in_channels=config["in_channels"],
                out_channels=config.get("out_channels") or config["in_channels"], text_dim=config["joint_attention_dim"],
                pooled_dim=config["pooled_projection_dim"], table=config["pos_embed_max_size"],
                qk_norm=config.get("qk_norm") is not None,
                dual=tuple(i for i in config.get("dual_attention_layers") or () if 0 <= i < config["num_layers"]),
            )  # fmt: skip
        except KeyError as missing:
            raise InputError(f"the configuration has no {missing}; it is not an SD3 transformer's") from None

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    def last(self, block: int) -> bool:
        """Whether the text is only read in this block: no queries, no output, no feed-forward."""
        return block == self.layers - 1

    def modulations(self, block: int) -> tuple[int, int]:
        """How many adaLN vectors this block has for the image and for the text."""
        return 9 if block in self.dual else 6, 2 if self.last(block) else 6


def block_linears(net: Network, block: int) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear of one block, by its name within it."""
    dim, last, (of_image, of_text) = net.dim, net.last(block), net.modulations(block)
    into, out = (dim, 4 * dim), (4 * dim, dim)
    attention = [name for name in LORA_TARGETS if not (last and name == "attn.to_add_out")]
    second = [f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")] if block in net.dual else []
    feed_forward = {"ff.net.0.proj": into, "ff.net.2": out}
    feed_forward |= {} if last else {"ff_context.net.0.proj": into, "ff_context.net.2": out}
    modulation = {"norm1.linear": (dim, of_image * dim), "norm1_context.linear": (dim, of_text * dim)}
    return modulation | dict.fromkeys([*attention, *second], (dim, dim)) | feed_forward


def outer_linears(net: Network) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear before the first block and after the last; the patches' convolution is one."""
    dim, patch = net.dim, net.patch**2
    return {
        "pos_embed.proj": (patch * net.in_channels, dim), "context_embedder": (net.text_dim, dim),
        "timestep_embedder.linear_1": (TIME_FEATURES, dim), "timestep_embedder.linear_2": (dim, dim),
        "text_embedder.linear_1": (net.pooled_dim, dim), "text_embedder.linear_2": (dim, dim),
        "norm_out.linear": (dim, 2 * dim), "proj_out": (dim, patch * net.out_channels),
    }  # fmt: skip


def part_of(name: str) -> str:
    """The part of the network that a linear of it is counted with."""
    if name.startswith("norm"):
        return "modulation"
    if name.startswith("attn2."):
        return "second attention"
    if name.startswith(("attn.add_", "attn.to_add_out", "ff_context.")):
        return "text stream"
    return "image stream" if name.startswith(("attn.", "ff.")) else "embeddings and output"


def parameters(net: Network) -> dict[str, int]:
    """Parameters of each part of the network; their sum is the whole. The position table is none of them (position_table)."""
    linears = [linear for block in range(net.layers) for linear in block_linears(net, block).items()]
    counts = [(part_of(name), numbers(*linear)) for name, linear in [*linears, *outer_linears(net).items()]]
    norms = sum(norm_parameters(net, block) for block in range(net.layers))
    return dict.fromkeys(("image stream", "text stream", "second attention", "modulation", "query-key norms"), 0) | by_part(
        [*counts, ("query-key norms", norms)]
    )


def numbers(inputs: int, outputs: int) -> int:
    """Parameters of a linear."""
    return inputs * outputs + outputs


def norm_parameters(net: Network, block: int) -> int:
    """Parameters of a block's query-key norms."""
    return net.qk_norm * net.head_dim * (4 + 2 * (block in net.dual))


def block_parameters(net: Network, block: int) -> int:
    """Parameters of one block."""
    return norm_parameters(net, block) + sum(numbers(*linear) for linear in block_linears(net, block).values())


def block_matrices(net: Network, block: int) -> int:
    """Of a block's parameters, those in matrices: all but biases and query-key norms."""
    return sum(inputs * outputs for inputs, outputs in block_linears(net, block).values())


def position_table(net: Network) -> int:
    """Numbers in the position table, which is stored and not trained."""
    return net.table**2 * net.dim


def lora_parameters(net: Network, block: int, rank: int) -> int:
    """Parameters of the adapters of LORA_TARGETS in one block: 2 rank D for each of 8 linears, 7 in the last block."""
    return 2 * rank * net.dim * (7 if net.last(block) else 8)


class Product(NamedTuple):
    """A product of matrices in the forward pass of one image."""

    part: str
    flops: int
    adapter: int = 0  # FLOP of one of a LoRA's two matrices beside it, where it is one of LORA_TARGETS
    moves: bool = True  # whether its input depends on any adapter when adapters alone are trained
    first: bool = False  # whether its input is data, which has no gradient


def block_products(net: Network, block: int, image: int, text: int, rank: int) -> Iterator[Product]:
    """The products of one block for `image` and `text` tokens. The text's queries of the last block are skipped: nothing reads them."""
    for name, (inputs, outputs) in block_linears(net, block).items():
        part, tokens = part_of(name), text if part_of(name) == "text stream" else image
        if part == "modulation":
            yield Product(part, 2 * inputs * outputs, moves=False)
        elif not (net.last(block) and name == "attn.add_q_proj"):
            after = name.startswith(("ff", "attn.to_out", "attn.to_add_out"))  # this block's own adapters
            adapter = 2 * tokens * net.dim * rank if name in LORA_TARGETS else 0
            yield Product(part, 2 * tokens * inputs * outputs, adapter, moves=after or block > 0)
    queries = image if net.last(block) else image + text
    yield Product("attention", 4 * queries * (image + text) * net.dim)
    if block in net.dual:
        yield Product("attention", 4 * image**2 * net.dim, moves=block > 0)


def outer_products(net: Network, image: int, text: int) -> Iterator[Product]:
    """The products before the first block and after the last."""
    tokens = {"pos_embed.proj": image, "proj_out": image, "context_embedder": text}
    for name, (inputs, outputs) in outer_linears(net).items():
        first = name in ("pos_embed.proj", "context_embedder") or name.endswith("_1")
        yield Product(part_of(name), 2 * tokens.get(name, 1) * inputs * outputs, moves=name == "proj_out", first=first)


def forward_flops(net: Network, image: int, text: int) -> dict[str, int]:
    """FLOP of one image's forward pass by part, for `image` and `text` tokens."""
    blocks = [product for block in range(net.layers) for product in block_products(net, block, image, text, 0)]
    return by_part((product.part, product.flops) for product in [*blocks, *outer_products(net, image, text)])


def training_flops(
    net: Network, image: int, text: int, rank: int | None = None, checkpointing: float = 0.0, first: int = 0,
    routed: tuple[int, int, int] | None = None,
) -> dict[str, int]:  # fmt: skip
    """FLOP of one image's forward and backward pass by part, and what is computed again for checkpointed blocks.

    rank None trains everything: three times the forward pass (Kaplan et al. 2020, section 2.1), less the gradients of the data,
    more the attention's recomputed scores. With a rank, only adapters of LORA_TARGETS train: frozen weights have no gradient, and nothing
    has one that no adapter comes before. checkpointing: the share of blocks that is recomputed. first: the first block that trains;
    where it is not 0 nothing before it, nor around the blocks, does. routed: (first, last, tokens) of blocks that see only so many.
    """
    amounts, again = [], 0
    for block in range(net.layers):
        tokens = routed[2] if routed and routed[0] <= block <= routed[1] else image
        products = list(block_products(net, block, tokens, text, rank or 0))
        if first:  # what conditions the blocks is frozen too
            products = [product._replace(first=product.part == "modulation") for product in products]
        amounts += [(product.part, product.flops if block < first else trained(product, rank)) for product in products]
        again += (block >= first and checkpointed(block, checkpointing)) * sum(p.flops + 2 * p.adapter for p in products)
    for product in outer_products(net, image, text):  # with all around the blocks frozen, as with an adapter's rank of nothing
        amounts.append((product.part, trained(product, rank if first == 0 else 0)))
    return by_part([*amounts, ("recomputation", again)])


def trained(product: Product, rank: int | None) -> int:
    """FLOP of a product's forward pass and its gradients."""
    if rank is None:
        backward = ATTENTION_BACKWARD if product.part == "attention" else 1 if product.first else 2
        return int(product.flops * (1 + backward))
    backward = ATTENTION_BACKWARD if product.part == "attention" else 1
    # an adapter's second matrix always has both gradients, its first has that of its input where the input moves
    return int(product.flops * (1 + backward * product.moves)) + product.adapter * (5 + product.moves)


@dataclass(frozen=True)
class Decoder:
    """The decoder of a VAE (AutoencoderKL), whose cost a picture adds to its steps; by default SD3's."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # from the picture's size down to the latents'
    layers: int = 2
    latent_channels: int = 16

    @property
    def factor(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.channels) - 1)

    def flops(self, pixels: int) -> int:
        """FLOP of decoding one picture of so many pixels."""
        place, width = pixels // self.factor**2, self.channels[-1]
        found = 18 * place * width * self.latent_channels + 4 * 18 * place * width**2  # a first convolution, two blocks
        found += 4 * 2 * place * width**2 + 4 * place**2 * width  # attention at the lowest resolution
        before = width
        for level, width in enumerate(reversed(self.channels)):
            found += 18 * place * (before * width + (2 * self.layers + 1) * width**2)
            found += (before != width) * 2 * place * before * width  # the shortcut
            if level < len(self.channels) - 1:
                place *= 4
                found += 18 * place * width**2
            before = width
        return found + 18 * pixels * width * 3

    def numbers(self, pixels: int) -> int:
        """Numbers in memory at the peak of decoding one picture: its widest layer's input, what normalises it, and its output."""
        return 3 * self.channels[:2][-1] * pixels

    def encoder_numbers(self, pixels: int) -> int:
        """The same of the encoder beside it, encoding one picture: five times its first layer's output."""
        return 5 * self.channels[0] * pixels


def checkpointed(block: int, share: float) -> bool:
    """Whether MMDiT.set_gradient_checkpointing(share) has this block computed again in the backward pass, as MMDiT.checkpointed says."""
    return int((block + 1) * share) > int(block * share)


def by_part(amounts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The sum of each part's amounts, parts without any left out."""
    sums: dict[str, int] = {}
    for part, amount in amounts:
        if amount:
            sums[part] = sums.get(part, 0) + amount
    return sums
