"""What diffusers' own features ask of the network: how its tokens are spread over processes, where its blocks have their two streams."""

import functools
from collections.abc import Callable
from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.utils.peft_utils import apply_lora_scale

from latentfm.models.block import Block

# enable_cache: what of a block's results is the image, what the text; as the registry's own register(), which first imports every network
# that diffusers has
TransformerBlockRegistry._registry[Block] = TransformerBlockMetadata(
    return_hidden_states_index=0, return_encoder_hidden_states_index=1, _cls=Block
)

# enable_parallelism: a picture's tokens over several processes
CONTEXT_PARALLEL = {
    "pos_embed": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
    "context_embedder": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


def check_parallel(parallel_config: Any, heads: int, image_tokens: int, text_tokens: int, **whole: Any) -> None:
    """Raises ValueError for what cannot be computed while the tokens are spread over processes (enable_parallelism).

    whole: arguments of the forward call that ask for all tokens in one place.
    """
    spread = getattr(parallel_config, "context_parallel_config", None)
    if spread is None:
        return
    given = [name for name, value in whole.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} cannot be used with context parallelism: each process has a part of the tokens only")
    if getattr(spread, "ulysses_anything", False) or getattr(spread, "ring_anything", False):
        return
    processes = spread.ring_degree * spread.ulysses_degree
    if image_tokens % processes or text_tokens % processes or heads % spread.ulysses_degree:
        raise ValueError(
            f"{image_tokens} image tokens, {text_tokens} text tokens and {heads} heads do not divide over "
            f"{processes} processes; ContextParallelConfig(ulysses_anything=True), or ring_anything=True, takes any number"
        )


def lora_scaled(forward: Callable) -> Callable:
    """`forward` with LoRAs at the "scale" of joint_attention_kwargs, as diffusers' apply_lora_scale, which imports peft without one too."""
    scaled = apply_lora_scale("joint_attention_kwargs")(forward)

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (scaled if "scale" in (kwargs.get("joint_attention_kwargs") or ()) else forward)(self, *args, **kwargs)

    return run
