"""What people call on StableDiffusion3Pipeline and its siblings, each asked of theirs and of ours on the same weights.

    python tests/pipelines/peers.py        # a table: what is called, the largest difference of the answers

`ROWS` is read by test_peers.py. A row's function is given a `Pipes`, theirs or ours, and answers with a tensor or a text, or raises.
"""

import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.callbacks import SD3CFGCutoffCallback
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from drawn import quiet
from tiny import tiny_pipeline

from latentfm import LatentFMImg2ImgPipeline, LatentFMInpaintPipeline, LatentFMPipeline

PROMPT, OTHER = "a red apple on a white plate", "a photo of a small brown dog in the park"
BASE = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 5.0, "max_sequence_length": 16, "output_type": "latent"}
STOCK = (StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline)
OURS = (LatentFMPipeline, LatentFMImg2ImgPipeline, LatentFMInpaintPipeline)


@dataclass
class Pipes:
    """The three pipelines of one side on the weights of a folder, each made when it is first asked for."""

    folder: Path
    classes: tuple[type, type, type]

    @cached_property
    def draw(self) -> Any:
        return quiet(self.classes[0].from_pretrained(self.folder, dtype=torch.float32))

    @cached_property
    def redraw(self) -> Any:
        return quiet(self.classes[1](**self.draw.components))

    @cached_property
    def fill(self) -> Any:
        return quiet(self.classes[2](**self.draw.components))


def run(pipe: Any, seeds: int | list[int] = 0, **changes: Any) -> Tensor:
    """The latents, or what else is asked for, of BASE with `changes`; `seeds` makes one generator, or one for each picture."""
    make = torch.Generator
    generator = make().manual_seed(seeds) if isinstance(seeds, int) else [make().manual_seed(each) for each in seeds]
    torch.manual_seed(5)  # for schedulers that draw noise
    found = pipe(**{"generator": generator, **BASE, **changes}).images
    return torch.as_tensor(np.stack([np.asarray(each) for each in found])) if not torch.is_tensor(found) else found


def picture(seed: int = 1, side: int = 32) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def half_mask(side: int = 32) -> Image.Image:
    mask = np.zeros((side, side), np.uint8)
    mask[:, side // 2 :] = 255
    return Image.fromarray(mask)


def adapter(pipe: Any) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter of random weights for the network, in the layout of SD3's."""
    config = pipe.transformer.config
    width, hidden = config.num_attention_heads * config.attention_head_dim, 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        projection = IPAdapterTimeImageProjection(
            embed_dim=16, output_dim=width, hidden_dim=hidden, heads=1, num_queries=4, timestep_in_dim=32
        )
        shape = (width, width, config.attention_head_dim, hidden)
        processors = [SD3IPAdapterJointAttnProcessor2_0(*shape) for _ in pipe.transformer.attn_processors]
    weights = {f"{i}.{name}": value for i, each in enumerate(processors) for name, value in each.state_dict().items()}
    return {"image_proj": projection.state_dict(), "ip_adapter": weights}


def with_adapter(pipes: Pipes, scale: float = 0.7) -> Any:
    """A pipeline with the IP-Adapter and a random image encoder loaded."""
    pipe = quiet(pipes.classes[0].from_pretrained(pipes.folder, dtype=torch.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        encoder = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)).eval()
    pipe.register_modules(image_encoder=encoder, feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}))
    pipe.load_ip_adapter(adapter(pipe))
    pipe.set_ip_adapter_scale(scale)
    return pipe


def with_lora(pipes: Pipes) -> Any:
    """A pipeline with a random LoRA on network and first text encoder, loaded the usual way."""
    pipe = quiet(pipes.classes[0].from_pretrained(pipes.folder, dtype=torch.float32))
    source = StableDiffusion3Pipeline.from_pretrained(pipes.folder, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        source.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
        source.text_encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    state = {f"transformer.{name}": value for name, value in get_peft_model_state_dict(source.transformer).items()}
    state |= {f"text_encoder.{name}": value for name, value in get_peft_model_state_dict(source.text_encoder).items()}
    pipe.load_lora_weights(state, adapter_name="one")
    return pipe


def with_scheduler(pipes: Pipes, name: str, **config: Any) -> Any:
    pipe = quiet(pipes.classes[0](**pipes.draw.components))
    pipe.scheduler = getattr(diffusers, name)(**config)
    return pipe


def stepping(change: Callable[[Any, int, dict[str, Tensor]], Any], names: tuple[str, ...] = ("latents",)) -> dict[str, Any]:
    """The arguments of a call whose step callback does `change`."""

    def callback(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        change(pipe, step, tensors)
        return tensors

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": list(names)}


def set_value(tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
    tensors[name] = value


def seen_of_scheduler(pipe: Any) -> Tensor:
    """What a callback sees of the scheduler: timestep, the noise that is left, how many timesteps, and the index."""
    rows = []

    def look(pipe: Any, step: int, tensors: dict[str, Tensor]) -> None:
        rows.append([float(pipe.scheduler.sigmas[step + 1]), len(pipe.scheduler.timesteps), pipe.scheduler.step_index])

    run(pipe, **stepping(look))
    return torch.tensor(rows)


def encoded(pipes: Pipes, **given: Any) -> Tensor:
    return torch.cat([each.flatten() for each in pipes.draw.encode_prompt(**{"prompt": PROMPT, "prompt_2": None, "prompt_3": None,
                     "max_sequence_length": 16, **given}) if each is not None])  # fmt: skip


def from_embeds(pipes: Pipes, **changes: Any) -> Tensor:
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    made = pipes.draw.encode_prompt(PROMPT, OTHER, None, negative_prompt="the moon", max_sequence_length=16)
    return run(pipes.draw, prompt=None, **dict(zip(names, made, strict=True)), **changes)


def saved_and_loaded(pipe: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        return quiet(type(pipe).from_pretrained(folder, dtype=torch.float32))


def error(function: Callable[[], Any]) -> str:
    """"refused" where the call raises; the rows that compare errors do it so."""
    try:
        function()
    except Exception:
        return "refused"
    return "accepted"


def controlled(pipes: Pipes) -> Tensor:
    torch.manual_seed(8)
    control = SD3ControlNetModel.from_transformer(pipes.draw.transformer, num_layers=1, num_extra_conditioning_channels=0)
    for parameter in control.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    control.eval()
    pipe = quiet(StableDiffusion3ControlNetPipeline(**pipes.draw.components, controlnet=control))
    return run(pipe, control_image=picture(), controlnet_conditioning_scale=0.8)


def perturbed(pipes: Pipes) -> Tensor:
    own = pipes.classes[0].from_pretrained(pipes.folder, dtype=torch.float32)
    pipe = quiet(StableDiffusion3PAGPipeline.from_pipe(own, pag_applied_layers=["transformer_blocks.0"]))
    return run(pipe, pag_scale=2.0)


def modified(pipes: Pipes, change: Callable[[Any], Any], **arguments: Any) -> Tensor:
    """What a pipeline of its own draws after `change`."""
    pipe = quiet(pipes.classes[0].from_pretrained(pipes.folder, dtype=torch.float32))
    change(pipe)
    return run(pipe, **arguments)


LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
CALLS: dict[str, dict[str, Any]] = {
    "the base": {}, "guidance 1": {"guidance_scale": 1.0}, "one step": {"num_inference_steps": 1}, "28 steps": {"num_inference_steps": 28},
    "negative_prompt": {"negative_prompt": OTHER}, "negative_prompt_2, _3": {"negative_prompt_2": "the moon", "negative_prompt_3": "a car"},
    "prompt_2, prompt_3": {"prompt_2": OTHER, "prompt_3": "two green trees"}, "height, width": {"height": 24, "width": 48},
    "max_sequence_length 64": {"max_sequence_length": 64}, "latents": {"latents": LATENTS}, "two prompts": {"prompt": [PROMPT, OTHER]},
    "num_images_per_prompt": {"prompt": [PROMPT, OTHER], "num_images_per_prompt": 2},
    "generators": {"prompt": [PROMPT, OTHER], "seeds": [3, 4]},
    "negatives in a list": {"prompt": [PROMPT, OTHER], "negative_prompt": ["the moon", ""]},
    "sigmas": {"sigmas": [1.0, 0.7, 0.3]}, "clip_skip 0": {"clip_skip": 0}, "clip_skip 1": {"clip_skip": 1},
    "joint_attention_kwargs {}": {"joint_attention_kwargs": {}},
    "skip_guidance_layers": {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.6},
    "skip_guidance_layers, two": {"skip_guidance_layers": [0, 1], "num_inference_steps": 12},
    "skip_layer_guidance_scale": {"skip_guidance_layers": [1], "skip_layer_guidance_scale": -1.5, "skip_layer_guidance_stop": 1.0},
    "skipped without guidance": {"skip_guidance_layers": [1], "guidance_scale": 1.0, "skip_layer_guidance_stop": 1.0},
    "output_type np": {"output_type": "np"}, "output_type pt": {"output_type": "pt"}, "output_type pil": {"output_type": "pil"},
}  # fmt: skip
REDRAW: dict[str, dict[str, Any]] = {
    "image": {}, "strength 0.3": {"strength": 0.3}, "strength 1": {"strength": 1.0}, "guidance 1": {"guidance_scale": 1.0},
    "image as an array": {"image": np.asarray(picture(), np.float32)[None] / 255}, "image of another size": {"image": picture(side=50)},
    "image as latents": {"image": LATENTS * 0.5}, "two prompts": {"prompt": [PROMPT, OTHER]}, "latents": {"latents": LATENTS},
    "sigmas": {"sigmas": [1.0, 0.8, 0.5, 0.2]}, "clip_skip": {"clip_skip": 1}, "two images": {"prompt": [PROMPT, OTHER],
    "image": [picture(), picture(2)]}, "generators": {"prompt": [PROMPT, OTHER], "image": [picture(), picture(2)], "seeds": [3, 4]},
    "output_type np": {"output_type": "np"},
}  # fmt: skip
FILL: dict[str, dict[str, Any]] = {
    "mask_image": {}, "strength 0.4": {"strength": 0.4}, "strength 1": {"strength": 1.0}, "guidance 1": {"guidance_scale": 1.0},
    "mask as a tensor": {"mask_image": torch.eye(32)[None, None]}, "two prompts": {"prompt": [PROMPT, OTHER]},
    "num_images_per_prompt": {"num_images_per_prompt": 2},
}  # fmt: skip
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler, shift 3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "Euler, karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler, beta": ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}),
    "Euler, dynamic shifting": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    "Euler, 500 train timesteps": ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 500}),
    "Euler, shift_terminal": ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}),
    "Euler, stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 2.0}), "LCM": ("FlowMatchLCMScheduler", {"shift": 3.0}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", FLOW), "DPM++ 3M": ("DPMSolverMultistepScheduler", FLOW | {"solver_order": 3}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", FLOW | {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ singlestep": ("DPMSolverSinglestepScheduler", FLOW | {"use_flow_sigmas": True}), "UniPC": ("UniPCMultistepScheduler", FLOW),
    "DEIS": ("DEISMultistepScheduler", FLOW), "SA-Solver": ("SASolverScheduler", FLOW),
}  # fmt: skip
ROWS: dict[str, Callable[[Pipes], Any]] = {
    **{f"call: {name}": lambda p, c=c: run(p.draw, **c) for name, c in CALLS.items()},
    **{f"img2img: {name}": lambda p, c=c: run(p.redraw, **({"image": picture()} | c)) for name, c in REDRAW.items()},
    **{f"inpaint: {name}": lambda p, c=c: run(p.fill, **({"image": picture(), "mask_image": half_mask()} | c)) for name, c in FILL.items()},
    **{f"scheduler: {name}": lambda p, c=c: run(with_scheduler(p, c[0], **c[1]), num_inference_steps=6) for name, c in SCHEDULERS.items()},
    "scheduler: mu": lambda p: run(with_scheduler(p, "FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True), mu=1.3),
    "scheduler: seen in a callback": lambda p: seen_of_scheduler(p.draw),
    "scheduler: after a run": lambda p: (run(p.draw), p.draw.scheduler.timesteps.cpu())[1],
    "scheduler: img2img by Heun": lambda p: run(
        p.classes[1].from_pipe(with_scheduler(p, "FlowMatchHeunDiscreteScheduler")), image=picture(), strength=0.7
    ),
    "return_dict=False": lambda p: p.draw(**BASE, generator=torch.Generator().manual_seed(0), return_dict=False)[0],
    "callback: latents": lambda p: run(p.draw, **stepping(lambda _, i, t: set_value(t, "latents", t["latents"] * (1 + (i == 1))))),
    "callback: latents in place": lambda p: run(p.draw, **stepping(lambda _, i, t: t["latents"].mul_(1 + 0.5 * (i == 1)))),
    "callback: prompt_embeds": lambda p: run(
        p.draw, **stepping(lambda _, i, t: set_value(t, "prompt_embeds", t["prompt_embeds"] * (1 - i)), ("prompt_embeds",))
    ),
    "callback: pooled_prompt_embeds": lambda p: run(
        p.draw,
        **stepping(lambda _, i, t: set_value(t, "pooled_prompt_embeds", t["pooled_prompt_embeds"] * (1 - i)), ("pooled_prompt_embeds",)),
    ),
    "callback: _guidance_scale": lambda p: run(p.draw, **stepping(lambda pipe, i, _: setattr(pipe, "_guidance_scale", 2.0 + i))),
    "callback: _interrupt": lambda p: run(p.draw, **stepping(lambda pipe, i, _: setattr(pipe, "_interrupt", i == 1))),
    "callback: _skip_layer_guidance_scale": lambda p: run(
        p.draw, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0,
        **stepping(lambda pipe, i, _: setattr(pipe, "_skip_layer_guidance_scale", float(i))),
    ),
    "callback: SD3CFGCutoffCallback": lambda p: run(p.draw, callback_on_step_end=SD3CFGCutoffCallback(cutoff_step_ratio=0.5)),
    "num_timesteps": lambda p: (run(p.draw), torch.tensor(p.draw.num_timesteps))[1],
    "encode_prompt": lambda p: encoded(p),
    "encode_prompt, negative": lambda p: encoded(p, negative_prompt=OTHER, num_images_per_prompt=2),
    "encode_prompt, clip_skip": lambda p: encoded(p, clip_skip=1),
    "encode_prompt without guidance": lambda p: encoded(p, do_classifier_free_guidance=False),
    "prompt_embeds of encode_prompt": lambda p: from_embeds(p),
    "prepare_latents": lambda p: p.draw.prepare_latents(2, 4, 32, 32, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(1)),
    "img2img.get_timesteps": lambda p: (run(p.redraw, image=picture()), p.redraw.get_timesteps(4, 0.5, "cpu")[0])[1],
    "img2img.prepare_latents": lambda p: (
        p.redraw.scheduler.set_timesteps(4),
        p.redraw.prepare_latents(
            torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)), p.redraw.scheduler.timesteps[1:2], 1, 2, torch.float32,
            torch.device("cpu"), torch.Generator().manual_seed(1),
        ),
    )[1],
    "inpaint.prepare_mask_latents": lambda p: torch.cat([each.flatten() for each in p.fill.prepare_mask_latents(
        torch.ones(1, 1, 32, 32), torch.zeros(1, 3, 32, 32), 1, 1, 32, 32, torch.float32, "cpu", torch.Generator().manual_seed(1), True
    )]),
    "check_inputs": lambda p: error(lambda: p.draw.check_inputs(PROMPT, None, None, 31, 32)),
    "tokenizer_max_length, default_sample_size, patch_size": lambda p: torch.tensor(
        [p.draw.tokenizer_max_length, p.draw.default_sample_size, p.draw.patch_size, p.draw.vae_scale_factor]
    ),
    "Pipeline(**pipe.components)": lambda p: run(quiet(type(p.draw)(**p.draw.components))),
    "save_pretrained, from_pretrained": lambda p: run(saved_and_loaded(p.draw)),
    "from_pipe to itself": lambda p: run(quiet(type(p.draw).from_pipe(p.draw))),
    "from_pipe to stock's": lambda p: run(quiet(StableDiffusion3Pipeline.from_pipe(p.draw))),
    "from_pipe to ours": lambda p: run(quiet(LatentFMPipeline.from_pipe(p.draw))),
    "from_pipe to stock's img2img": lambda p: run(quiet(StableDiffusion3Img2ImgPipeline.from_pipe(p.draw)), image=picture()),
    "from_pipe to our img2img": lambda p: run(quiet(LatentFMImg2ImgPipeline.from_pipe(p.draw)), image=picture()),
    "from_pipe to stock's inpaint": lambda p: run(
        quiet(StableDiffusion3InpaintPipeline.from_pipe(p.draw)), image=picture(), mask_image=half_mask()
    ),
    "AutoPipelineForText2Image": lambda p: run(quiet(AutoPipelineForText2Image.from_pipe(p.redraw))),
    "AutoPipelineForImage2Image": lambda p: run(quiet(AutoPipelineForImage2Image.from_pipe(p.draw)), image=picture()),
    "AutoPipelineForInpainting": lambda p: run(
        quiet(AutoPipelineForInpainting.from_pipe(p.draw)), image=picture(), mask_image=half_mask()
    ),
    "LoRA": lambda p: run(with_lora(p)), "LoRA, scale 0.3": lambda p: run(with_lora(p), joint_attention_kwargs={"scale": 0.3}),
    "LoRA, scale 0": lambda p: run(with_lora(p), joint_attention_kwargs={"scale": 0.0}),
    "LoRA, set_adapters": lambda p: (pipe := with_lora(p), pipe.set_adapters("one", 0.5), run(pipe))[2],
    "LoRA, fused": lambda p: (pipe := with_lora(p), pipe.fuse_lora(), run(pipe))[2],
    "LoRA, fused and unloaded": lambda p: (pipe := with_lora(p), pipe.fuse_lora(), pipe.unload_lora_weights(), run(pipe))[3],
    "LoRA, unloaded": lambda p: (pipe := with_lora(p), run(pipe), pipe.unload_lora_weights(), run(pipe))[3],
    "LoRA, disabled": lambda p: (pipe := with_lora(p), pipe.disable_lora(), run(pipe))[2],
    "IP-Adapter": lambda p: run(with_adapter(p), ip_adapter_image=picture()),
    "IP-Adapter, scale 1.5": lambda p: run(with_adapter(p, 1.5), ip_adapter_image=picture()),
    "IP-Adapter, scale 0": lambda p: run(with_adapter(p, 0.0), ip_adapter_image=picture()),
    "IP-Adapter, guidance 1": lambda p: run(with_adapter(p), ip_adapter_image=picture(), guidance_scale=1.0),
    "IP-Adapter, two prompts": lambda p: run(with_adapter(p), ip_adapter_image=picture(), prompt=[PROMPT, OTHER]),
    "ip_adapter_image_embeds": lambda p: run(
        with_adapter(p), ip_adapter_image_embeds=torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))
    ),
    "IP-Adapter, unloaded": lambda p: (pipe := with_adapter(p), pipe.unload_ip_adapter(), run(pipe))[2],
    "encode_image": lambda p: with_adapter(p).encode_image(picture(), "cpu"),
    "PAG by diffusers' class": perturbed, "ControlNet by diffusers' class": controlled,
    "enable_attention_slicing": lambda p: modified(p, lambda pipe: pipe.enable_attention_slicing()),
    "vae.enable_slicing": lambda p: modified(p, lambda pipe: pipe.vae.enable_slicing(), output_type="pt", prompt=[PROMPT, OTHER]),
    "vae.enable_tiling": lambda p: modified(p, lambda pipe: pipe.vae.enable_tiling(), output_type="pt"),
    "enable_model_cpu_offload": lambda p: modified(p, lambda pipe: pipe.enable_model_cpu_offload(device="cpu")),
    "enable_group_offload": lambda p: modified(
        p,
        lambda pipe: pipe.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        ),
    ),
    "enable_layerwise_casting": lambda p: modified(
        p, lambda pipe: pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    ),
    "text_encoder_3=None": lambda p: run(quiet(p.classes[0].from_pretrained(p.folder, text_encoder_3=None, tokenizer_3=None))),
    "vae=None": lambda p: run(quiet(p.classes[0].from_pretrained(p.folder, vae=None))),
    "transformer=None": lambda p: torch.cat([each.flatten() for each in p.classes[0].from_pretrained(
        p.folder, transformer=None, vae=None
    ).encode_prompt(PROMPT, None, None, max_sequence_length=16)]),
    "error: height 31": lambda p: error(lambda: run(p.draw, height=31)),
    "error: no prompt": lambda p: error(lambda: run(p.draw, prompt=None)),
    "error: prompt and embeds": lambda p: error(lambda: run(p.draw, prompt_embeds=torch.zeros(1, 32, 48))),
    "error: embeds without pooled": lambda p: error(lambda: run(p.draw, prompt=None, prompt_embeds=torch.zeros(1, 32, 48))),
    "error: unknown callback tensor": lambda p: error(lambda: run(p.draw, callback_on_step_end_tensor_inputs=["nothing"])),
    "error: strength 2": lambda p: error(lambda: run(p.redraw, image=picture(), strength=2.0)),
    "error: generators": lambda p: error(lambda: run(p.draw, seeds=[1, 2])),
    "error: negative prompts": lambda p: error(lambda: run(p.draw, negative_prompt=["a", "b"])),
}  # fmt: skip
# rounding grows where a scheduler divides by the last noise level, a thousandth
TOLERANCES = {"scheduler: img2img by Heun": 2e-4}
SIXTEEN = ("inpaint", "from_pipe to stock's inpaint", "AutoPipelineForInpainting")  # diffusers inpaints with this many channels alone


def pairs(folder: Path) -> dict[int, tuple[Pipes, Pipes]]:
    """(theirs, ours) on the weights of two tiny folders, by the number of latent channels."""
    return {
        channels: tuple(Pipes(tiny_pipeline(folder / str(channels), channels=channels), classes) for classes in (STOCK, OURS))
        for channels in (4, 16)
    }


def answers(name: str, made: dict[int, tuple[Pipes, Pipes]]) -> tuple[Any, Any]:
    """(theirs, ours) to a row; an error as the answer that it is."""

    @torch.no_grad()
    def answer(pipes: Pipes) -> Any:
        try:
            return ROWS[name](pipes)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return tuple(answer(pipes) for pipes in made[16 if name.startswith(SIXTEEN) else 4])


def difference(theirs: Any, ours: Any) -> float:
    """The largest difference of two answers; infinite where they are of another shape or kind, or no numbers."""
    if not (torch.is_tensor(theirs) and torch.is_tensor(ours)):
        return 0.0 if theirs == ours else float("inf")
    apart = theirs.float() - ours.float() if theirs.shape == ours.shape else torch.tensor(float("nan"))
    return float(apart.abs().max()) if bool(apart.isfinite().all()) else float("inf")


def main() -> None:
    diffusers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        made, worst = pairs(Path(folder)), 0.0
        for name in ROWS:
            found = answers(name, made)
            apart = difference(*found)
            worst = max(worst, apart)
            texts = "" if apart < 1 else " | ".join(str(each)[:150].replace("\n", " ") for each in found)
            print(f"{name:58} {apart:.1e} {texts}", flush=True)
    print(f"{len(ROWS)} rows, largest difference {worst:.1e}")


if __name__ == "__main__":
    main()
