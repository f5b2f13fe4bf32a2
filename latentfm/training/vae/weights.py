"""What a VAE's training trains: the autoencoder or its decoder, its averages, a discriminator beside it, and the way to disk."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL

from latentfm.errors import InputError
from latentfm.files import expanded, whole_or_nothing
from latentfm.interchange.networks import vae_class
from latentfm.interchange.tensors import Held, Tensors, write_shards
from latentfm.interchange.weights import load_part, open_component
from latentfm.models.folder import INFO_FILE, read_config
from latentfm.models.manifest import files_of, hash_of, write_manifest
from latentfm.training.checkpoint.state import pack, unpack
from latentfm.training.checkpoint.storage import LARGEST_FILE
from latentfm.training.distributed.shards import Chunk, LocalShards, is_fsdp
from latentfm.training.optimizers.ema import EMA
from latentfm.training.optimizers.factory import make_optimizer
from latentfm.training.vae.networks import Discriminator, Reconstruction
from latentfm.training.vae.options import VAEConfig, VAEModelOptions
from latentfm.training.weights import Weights
from latentfm.words import shown

NETWORK_FILE = "diffusion_pytorch_model"
JUDGE = "discriminator."  # begins the names of its tensors in a checkpoint


def vae_folder(place: str) -> Path:
    """The folder of the AutoencoderKL that model.vae names: it itself, or a pipeline folder's. Raises InputError where there is none."""
    folder = expanded(place)
    for found in (folder / "vae", folder):
        if (found / "config.json").is_file():
            config = read_config(found / "config.json")
            if (kind := config.get("_class_name", AutoencoderKL.__name__)) != AutoencoderKL.__name__:
                raise InputError(f"model.vae: {shown(found)} holds a {shown(kind, 80)}; what is trained here is an AutoencoderKL")
            if (colours := (config.get("in_channels", 3), config.get("out_channels", 3))) != (3, 3):
                raise InputError(f"model.vae: {shown(found)} has {colours[0]} channels in and {colours[1]} out; pictures have 3")
            return found
    what = "holds no AutoencoderKL: it has neither a config.json nor a vae/config.json" if folder.is_dir() else "is no folder"
    raise InputError(f"model.vae: {shown(folder)} {what}; give its folder, or a pipeline folder with one")


def settings_of(options: VAEModelOptions, side: int | None) -> dict[str, object]:
    """The configuration of the AutoencoderKL that the options describe, for pictures of `side` pixels."""
    if options.vae:
        return read_config(vae_folder(options.vae) / "config.json")
    levels = len(options.widths)
    return {
        "in_channels": 3, "out_channels": 3, "block_out_channels": options.widths, "latent_channels": options.latent_channels,
        "layers_per_block": options.layers, "norm_num_groups": options.norm_groups, "mid_block_add_attention": options.attention,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": side, "scaling_factor": 1.0, "shift_factor": 0.0,
    }  # fmt: skip


def load_vae(options: VAEModelOptions, side: int) -> AutoencoderKL:
    """The autoencoder to train, float32 on the CPU: a given one's weights, or new ones drawn from torch's generator."""
    if options.vae:
        return load_part("vae", open_component(vae_folder(options.vae), "vae")[0], torch.float32)
    return vae_class({}).from_config(settings_of(options, side))


def fingerprint(folder: Path) -> str:
    """What tells one saved autoencoder from another: the hashes of its files."""
    return " ".join(hash_of(folder / name).sha256 for name in files_of(folder) if name.endswith((".safetensors", "config.json")))


def choose_part(vae: AutoencoderKL, part: str) -> None:
    """Has `part` of an autoencoder take gradients, and nothing else."""
    vae.requires_grad_(part == "all")
    if part == "decoder":
        for module in filter(None, (vae.decoder, vae.post_quant_conv)):
            module.requires_grad_(True)


class VAEWeights(Weights):
    """The autoencoder on the device, and where the options ask for one, a discriminator with an optimizer of its own.

    A process has a copy of both. Gradients of the autoencoder are averaged by DDP, those of the discriminator by `average_judge`.
    """

    def __init__(self, vae: AutoencoderKL, config: VAEConfig, accelerator: Accelerator):
        if is_fsdp(accelerator):
            raise InputError("FSDP does not split an autoencoder; start the processes with DDP, as configs/accelerate/ddp-8.yaml does")
        self.config, self.accelerator = config, accelerator
        choose_part(vae, config.model.part)
        self.network = vae.to(accelerator.device, memory_format=torch.channels_last).train()
        self.size = sum(parameter.numel() for parameter in vae.parameters())
        forward = Reconstruction(vae)
        if config.train.compile:
            forward.compile(dynamic=False)
        self.shards = LocalShards(vae, accelerator, accelerator.prepare(forward))
        self.optimizer = make_optimizer(self.shards.parameters, config.train)
        self.ema = EMA(self.shards.parameters, config.train.ema_decay, torch.device("cpu") if config.train.ema_device == "cpu" else None)
        self.judge: Discriminator | None = None
        if config.judged:
            options = config.adversarial
            self.judge = Discriminator(options.width, options.layers).to(accelerator.device, memory_format=torch.channels_last)
            self.judge_shards = LocalShards(self.judge)
            rate = options.learning_rate or config.train.learning_rate
            self.judge_optimizer = make_optimizer(self.judge_shards.parameters, config.train.model_copy(update={"learning_rate": rate}))

    @property
    def last_layer(self) -> torch.nn.Parameter:
        """The weight that the adaptive weight looks at."""
        return self.network.decoder.conv_out.weight

    def set_learning_rate(self, step: int) -> float:
        rate = super().set_learning_rate(step)
        if self.judge is not None:
            own = self.config.adversarial.learning_rate or self.config.train.learning_rate
            for group in self.judge_optimizer.param_groups:
                group["lr"] = own * rate / self.config.train.learning_rate
        return rate

    def average_judge(self) -> None:
        """Makes the discriminator's gradients the mean over the processes."""
        gradients = [parameter.grad for parameter in self.judge_shards.parameters.values()]
        mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape))

    def update_judge(self) -> None:
        """Moves the discriminator by its gradients."""
        self.judge_optimizer.step()
        self.judge_optimizer.zero_grad()

    # To disk and back

    def chunks(self) -> dict[str, Chunk]:
        found = super().chunks()
        if self.judge is not None:
            found |= {JUDGE + name: chunk for name, chunk in pack(self.judge_shards, None, self.judge_optimizer).items()}
        return found

    def take(self, tensors: Tensors) -> None:
        super().take({name: stored for name, stored in tensors.items() if not name.startswith(JUDGE)})
        if self.judge is not None:
            own = {name.removeprefix(JUDGE): stored for name, stored in tensors.items() if name.startswith(JUDGE)}
            unpack(own, self.judge_shards, None, self.judge_optimizer)

    def write_model(self, folder: Path, checkpoint: Path, small: bool = False) -> None:
        """Writes folder/model, an AutoencoderKL folder as diffusers saves it; what did not train is as it was given.

        Not into a checkpoint: what its latents are to be scaled by is known at the end.
        """
        if small:
            return
        averages = {name: Held.of(value) for name, value in self.ema.shadow.items()}
        weights = {name: averages.get(name, Held.of(value)) for name, value in self.network.state_dict().items()}
        train = self.config.train
        trained = {"part": self.config.model.part, "steps": train.steps, "batch_size": train.batch_size, "seed": train.seed}
        with whole_or_nothing(folder / "model") as partial:
            partial.mkdir(parents=True)
            self.network.save_config(partial)
            (partial / INFO_FILE).write_text(json.dumps({"format": 1, "trained": trained}, indent=2) + "\n", "utf-8")
            write_shards(partial, NETWORK_FILE, weights, {"format": "pt"}, getattr(torch, self.config.output.dtype), LARGEST_FILE)
            write_manifest(partial)
