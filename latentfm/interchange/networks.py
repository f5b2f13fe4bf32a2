"""The networks that configurations make, without memory, and whether numbers are numbers."""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, T5Config

from latentfm.models.encoders import BY_NAME
from latentfm.models.mmdit import MMDiT

VAES = (AutoencoderKL.__name__, AutoencoderTiny.__name__)


class Plain(TorchFunctionMode):
    """Leaves out of the meta device's work what is done in Python there, and imports torch's compiler: counting, and drawing noise."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.arange and "device" not in kwargs:
            return function(*args, device="cpu", **kwargs).to("meta")
        if function in (nn.init.normal_, Tensor.normal_):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def empty(name: str, config: dict[str, Any]) -> nn.Module:
    """The network of component `name` without memory: parameters and buffers on the meta device."""
    with torch.device("meta"), Plain():
        if name == "transformer":
            return MMDiT.from_config(config)
        if name == "vae":
            return vae_class(config).from_config(config)
        return getattr(transformers, BY_NAME[name].family.model)(text_config(name, config))


def vae_class(config: dict[str, Any]) -> type[AutoencoderKL] | type[AutoencoderTiny]:
    """The class of a VAE of this configuration: AutoencoderTiny where it says so, AutoencoderKL where not."""
    return AutoencoderTiny if config.get("_class_name") == AutoencoderTiny.__name__ else AutoencoderKL


def text_config(name: str, config: dict[str, Any]) -> CLIPTextConfig | T5Config:
    """The configuration of a text encoder as transformers has it: what decides its numbers, and nothing besides.

    Raises ValueError for settings of another type.
    """
    family = BY_NAME[name].family
    try:
        made = getattr(transformers, family.config).from_dict({key: config[key] for key in family.settings if key in config})
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    if isinstance(made, CLIPTextConfig) and type(made.eos_token_id) is not int:
        raise ValueError("its eos_token_id is no number, and the end of a text is where its pooled state is read")
    if isinstance(made, T5Config):
        exact = made.relative_attention_num_buckets // 4  # distances that have a bucket of their own
        if not 0 < exact < made.relative_attention_max_distance:
            raise ValueError("its relative_attention_num_buckets and relative_attention_max_distance do not go together")
    return made


def all_finite(value: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity: its least and greatest number would be one. Reads it once, makes no copy."""
    if not value.is_floating_point() or value.itemsize == 1 or value.numel() == 0:  # float8 is only ever read on
        return True
    least, greatest = torch.aminmax(value.detach())
    return bool(least.isfinite() & greatest.isfinite())


def plain_parts(value: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor of a quantising library's own kind is made of; a plain one itself."""
    if not hasattr(value, "__tensor_flatten__"):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from plain_parts(getattr(value, name))
