"""Pictures as prompts: an IP-Adapter of SD3's layout (diffusers' SD3IPAdapterMixin) and what it looks at."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentfm.errors import InputError
from latentfm.files import reading
from latentfm.models.folder import refuse_pickle
from latentfm.pipelines.components import Components
from latentfm.words import shown


def mixin() -> type:
    """SD3IPAdapterMixin, whose methods these are; no base, since its module prepares pictures for transformers, with torchvision."""
    from diffusers.loaders import SD3IPAdapterMixin

    return SD3IPAdapterMixin


class ImagePrompts(Components):
    """A pipeline that can look at pictures through a loaded IP-Adapter."""

    @property
    def is_ip_adapter_active(self) -> bool:
        """Whether an IP-Adapter is loaded whose scale is not 0."""
        return mixin().is_ip_adapter_active.fget(self)

    def set_ip_adapter_scale(self, scale: float) -> None:
        """Sets how strongly the pictures are looked at: 0 is not at all."""
        mixin().set_ip_adapter_scale(self, scale)

    def unload_ip_adapter(self) -> None:
        """Takes the IP-Adapter and its image encoder out again."""
        mixin().unload_ip_adapter(self)

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        weight_name: str = "ip-adapter.safetensors",
        subfolder: str | None = None,
        image_encoder_folder: str | None = "image_encoder",
        **kwargs: Any,
    ) -> None:
        """Loads an IP-Adapter, whose arguments are SD3IPAdapterMixin's, and its image encoder where none is there yet.

        The encoder is image_encoder_folder beside the weights of a local folder; elsewhere give image_encoder and feature_extractor to
        the pipeline. Raises InputError for a pickle and for weights that do not fit the network.
        """
        source = pretrained_model_name_or_path_or_dict
        self.need("transformer", to="adapt", without="load the pipeline with it")
        if not isinstance(source, dict):
            refuse_pickle(Path(weight_name))
            if not weight_name.endswith(".safetensors"):
                raise InputError(f"the IP-Adapter {shown(weight_name)} is no safetensors file by its name; only these are loaded")
            encoder = Path(source) / (subfolder or "") / (image_encoder_folder or "")
            if self.image_encoder is None and image_encoder_folder and (encoder / "config.json").is_file():
                from transformers import SiglipImageProcessor, SiglipVisionModel

                with reading(encoder, "it holds no SigLIP image encoder"):
                    self.register_modules(
                        image_encoder=SiglipVisionModel.from_pretrained(encoder, dtype=self.dtype).to(self.device),
                        feature_extractor=SiglipImageProcessor.from_pretrained(encoder),
                    )
        with reading("the IP-Adapter", "it does not fit this model", also=(KeyError,)):
            mixin().load_ip_adapter(self, source, weight_name, subfolder, None, **kwargs)

    def encode_image(self, image: Any, device: torch.device) -> Tensor:
        """What the image encoder sees in pictures: its second-to-last hidden states [N, tokens, width]."""
        self.need("image_encoder", to="look at ip_adapter_image", without="give ip_adapter_image_embeds")
        if not isinstance(image, Tensor):
            self.need("feature_extractor", to="prepare ip_adapter_image", without="give a tensor of pixels")
            image = self.feature_extractor(image, return_tensors="pt").pixel_values
        return self.image_encoder(image.to(device, self.dtype), output_hidden_states=True).hidden_states[-2]

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Tensor | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> Tensor:
        """What the adapter looks at, for all rows of a batch: [2 or 1 times num_images_per_prompt, tokens, width], zeros guided against.

        ip_adapter_image_embeds holds both halves where there is guidance, as in StableDiffusion3Pipeline.
        """
        if ip_adapter_image_embeds is None and ip_adapter_image is None:
            raise InputError("give ip_adapter_image or ip_adapter_image_embeds")
        device = device or self._execution_device
        if ip_adapter_image_embeds is None:
            seen = self.encode_image(ip_adapter_image, device)
            halves = [torch.zeros_like(seen), seen] if do_classifier_free_guidance else [seen]
        elif not isinstance(ip_adapter_image_embeds, Tensor) or (do_classifier_free_guidance and len(ip_adapter_image_embeds) % 2):
            raise InputError("ip_adapter_image_embeds must be one tensor, with guidance the negative half before the other")
        else:
            halves = ip_adapter_image_embeds.chunk(2 if do_classifier_free_guidance else 1)
        return torch.cat([half.repeat(num_images_per_prompt, 1, 1) for half in halves]).to(device, self.transformer.dtype)

    def attention_arguments(self, given: Any, image: Any, embeds: Any, pictures: int, guided: bool) -> dict[str, Any]:
        """joint_attention_kwargs for a call: what is given, and what a loaded IP-Adapter looks at. Raises InputError for no dict."""
        if given is not None and not isinstance(given, dict):
            raise InputError("joint_attention_kwargs must be a dict, as {'scale': 0.8}")
        found = dict(given or {})
        for name, value in (("ip_adapter_image", image), ("ip_adapter_image_embeds", embeds)):
            if value is not None and getattr(self.transformer, "image_proj", None) is None:
                raise InputError(f"{name} needs an IP-Adapter to look at it; load_ip_adapter loads one")
        if (image is not None and self.is_ip_adapter_active) or embeds is not None:
            found["ip_adapter_image_embeds"] = self.prepare_ip_adapter_image_embeds(image, embeds, None, pictures, guided)
        return found
