"""What of a network is trained: all of it, some blocks, or a small addition (LoRA, DoRA) to frozen weights, quantised ones if asked."""

import hashlib
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from latentfm.adapters import ADAPTERS
from latentfm.config import AdapterOptions, TrainOptions
from latentfm.errors import InputError
from latentfm.models.linears import BLOCKS, adapted_linears, parse_blocks
from latentfm.models.mmdit import MMDiT
from latentfm.randomness import seed_of
from latentfm.training.optimizers.factory import package
from latentfm.training.precision import compute_dtype

NF4_BLOCKS = (64, 32)  # numbers that share a scale: QLoRA's 64, and what a row of another width still divides into
OUTLIERS = 6.0  # LLM.int8's threshold (Dettmers et al. 2022): columns of activations beyond it are not multiplied in 8 bits


@dataclass(frozen=True)
class Trained:
    """What of a network is trained. `summary` says it in words; `base` is the fingerprint of what is frozen, None where nothing is."""

    names: tuple[str, ...]  # of the parameters
    summary: str
    base: str | None


def choose_trainable(network: MMDiT, options: TrainOptions, device: torch.device | str = "cpu") -> Trained:
    """Leaves trainable what train.adapter and train.blocks ask for, freezes the rest, and says what that is.

    With train.adapter an adapter called "default" is added, in float32, its start a function of train.seed alone, and the frozen
    linears of the blocks are quantised on `device` if its base asks for it; all else stays where it is. Without both options everything
    that takes a gradient trains. Call it on the network as it was loaded, before averages and optimizer are made. Raises InputError for
    blocks or modules that the network has not, and where bitsandbytes is needed and not installed.
    """
    layers, adapter = len(network.transformer_blocks), options.adapter
    chosen = range(layers) if options.blocks is None else parse_blocks(options.blocks, layers)
    where = "" if options.blocks is None else f" of {len(chosen)} of {layers} blocks"
    if adapter is not None:
        modules = adapted_linears([name for name, _ in linears_of_blocks(network)], adapter.targets, chosen)
        check_base(network, adapter, device)
        base = base_fingerprint(network)
        network.requires_grad_(False)
        quantise(network, adapter.base, torch.device(device), compute_dtype(options))
        add_adapter(network, adapter, modules, options.seed)
        frozen = options.weights if adapter.base == "as_weights" else adapter.base
        summary = f"a {ADAPTERS[adapter.kind].title} of rank {adapter.rank} on {len(modules)} linears{where}, the base frozen in {frozen}"
        return Trained(trainable(network), summary, base)
    if options.blocks is None:
        return Trained(trainable(network), "every weight", None)
    network.requires_grad_(False)
    for index in chosen:
        network.transformer_blocks[index].requires_grad_(True)
    names = trainable(network)
    return Trained(names, f"the weights{where}, the rest frozen", base_fingerprint(network, names))


def trainable(network: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that are trained."""
    return tuple(name for name, parameter in network.named_parameters() if parameter.requires_grad)


def check_base(network: nn.Module, options: AdapterOptions, device: torch.device | str) -> None:
    """Raises InputError where train.adapter.base cannot be had: without bitsandbytes, or for linears or a device that it is not made for.

    The network may be one without memory (on the meta device).
    """
    if options.base != "as_weights":
        package("bitsandbytes", f"train.adapter.base={options.base}")
    if options.base == "nf4":
        for _, linear in linears_of_blocks(network):
            nf4_block(linear)
    if options.base == "int8" and ADAPTERS[options.kind].magnitudes and torch.device(device).type == "cpu":
        # peft 0.21 unpacks such a weight for its norms, and on a CPU loses its scales in doing so
        raise InputError(f"train.adapter.kind={options.kind} on base=int8 does not run on a CPU; use nf4 or as_weights there, or lora")


def linears_of_blocks(network: nn.Module) -> list[tuple[str, nn.Linear]]:
    """(name, linear) of all the blocks' linears, in the network's order."""
    return [(name, module) for name, module in network.named_modules() if name.startswith(BLOCKS) and isinstance(module, nn.Linear)]


def add_adapter(network: MMDiT, options: AdapterOptions, modules: list[str], seed: int) -> None:
    """Adds the adapter to the linears `modules`, in float32, drawn from `seed`; nothing else is drawn from torch's generator."""
    alpha = options.rank if options.alpha is None else options.alpha
    config = LoraConfig(
        r=options.rank, lora_alpha=int(alpha) if alpha == int(alpha) else alpha, target_modules=modules, lora_dropout=options.dropout,
        **ADAPTERS[options.kind].keywords,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "adapter"))
        network.add_adapter(config)
    for parameter in network.parameters():
        if parameter.requires_grad:  # peft makes it in the base's precision
            parameter.data = parameter.data.float()


def quantise(network: MMDiT, base: str, device: torch.device, dtype: torch.dtype) -> None:
    """Puts bitsandbytes' linears of 4 (nf4) or 8 bits (int8) in the place of all those of the blocks, one by one, on `device`.

    nf4: NormalFloat4 in blocks of 64, the blocks' scales in 8 bits too (QLoRA, Dettmers et al. 2023), computing in `dtype`. int8: LLM.int8
    (Dettmers et al. 2022). Raises InputError as check_base does.
    """
    if base == "as_weights":
        return
    library = package("bitsandbytes", f"train.adapter.base={base}")
    # at every product it says that it takes float16 for the quantised part, which is so by design
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name, linear in linears_of_blocks(network):
        made = nf4(library.nn, linear, device, dtype) if base == "nf4" else int8(library.nn, linear, device)
        network.set_submodule(name, made)
    # peft asks for these before it gives such linears an adapter
    network.is_loaded_in_4bit, network.is_loaded_in_8bit = base == "nf4", base == "int8"


def nf4_block(linear: nn.Linear) -> int:
    """How many numbers of a linear's weight share a scale; a whole row must divide into such blocks.

    bitsandbytes' CPU kernels take each row for a number of whole blocks: with another width what they unpack is wrong, and nothing says so.
    """
    for size in NF4_BLOCKS:
        if linear.in_features % size == 0:
            return size
    raise InputError(
        f"train.adapter.base=nf4 needs linears whose width divides by {NF4_BLOCKS[-1]}, this network has one of {linear.in_features}; "
        "use int8 or as_weights"
    )


def nf4(library: Any, linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """`linear` with its weight in 4 bits."""
    found = library.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4", device="meta")
    weight = library.Params4bit(linear.weight.data, requires_grad=False, blocksize=nf4_block(linear), quant_type="nf4", module=found)
    found.weight = weight.to(device)
    found.weight.quant_state.dtype = dtype  # of what it is unpacked to
    found.bias = linear.bias
    found.support_avx512bf16_for_cpu = False  # or sampling on a CPU would repack the weight, and no gradient could pass afterwards
    return found


def int8(library: Any, linear: nn.Linear, device: torch.device) -> nn.Module:
    """`linear` with its weight in 8 bits; it computes in its input's precision."""
    size = linear.in_features, linear.out_features, linear.bias is not None
    found = library.Linear8bitLt(*size, has_fp16_weights=False, threshold=OUTLIERS, device="meta")
    found.weight = library.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    found.bias = linear.bias
    return found


def cast_weights(network: MMDiT, options: TrainOptions) -> None:
    """Brings the parameters to train.weights: with an adapter the frozen ones, its own staying float32. Buffers stay as they are.

    Averages and masters begin in float32: keep what they begin with.
    """
    dtype = getattr(torch, options.weights)
    for parameter in network.parameters():
        if parameter.is_floating_point() and not (options.adapter and parameter.requires_grad):
            parameter.data = parameter.data.to(dtype)


def base_fingerprint(network: MMDiT, trained: Collection[str] = ()) -> str:
    """SHA-256 of the configuration and of the weights whose names are not `trained`, as they are now: before quantising and casting."""
    config = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    left_out = set(trained)
    for name, value in sorted(network.state_dict().items()):
        if name not in left_out:
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(memory(value))
    return digest.hexdigest()


def memory(value: Tensor) -> Any:
    """The bytes of a tensor, not copied where they lie in order on the CPU."""
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def seed_dropout(options: TrainOptions, step: int, micro_batch: int) -> None:
    """Makes the adapter's dropout in micro-batch `micro_batch` (over all processes) of step `step` a function of these and train.seed.

    A resumed run then drops what it would have dropped. Other numbers of processes or of accumulation are other draws.
    """
    if options.adapter is not None and options.adapter.dropout:
        torch.manual_seed(seed_of(options.seed, "adapter dropout", step, micro_batch))
