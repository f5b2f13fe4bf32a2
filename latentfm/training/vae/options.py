"""The options of a VAE's training: those of any training, and what is its own. `load_config(..., kind=VAEConfig)` makes them.

Every term of the loss is of a picture, divided by its 3 H W numbers: the notes' loss (eq. 78) and latent diffusion's, up to a factor.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from latentfm.config import OptimisationOptions, OutputOptions, PictureOptions, Section, options_of

NEW = ("widths", "latent_channels", "layers", "attention", "norm_groups")  # what a new autoencoder is made of


class VAEModelOptions(Section):
    """The autoencoder: one to go on from, or the sizes of a new one."""

    vae: str | None = Field(None, description="train this AutoencoderKL further: its folder, or a pipeline folder; a new one if not given")
    part: Literal["all", "decoder"] = Field(
        "all", description="what trains; decoder: the encoder and so all latents stay as they are, and what was trained on them stays good"
    )
    widths: list[Annotated[int, Field(ge=1, le=8192)]] = Field(
        [64, 128, 256, 256], min_length=1, max_length=8,
        description="of a new one: channels of each level; n levels make 2^(n - 1) pixels a side one latent, so four make 8",
    )  # fmt: skip
    latent_channels: int = Field(16, ge=1, le=512, description="of a new one; SD3's has 16")
    layers: int = Field(2, ge=1, le=16, description="of a new one: residual blocks a level, one more in the decoder")
    attention: bool = Field(False, description="of a new one: attention between the latents; without it all sizes are seen alike")
    norm_groups: int = Field(16, ge=1, le=512, description="of a new one: groups of the normalisations; they divide all widths")

    @model_validator(mode="after")
    def new_or_given(self) -> "VAEModelOptions":
        if self.vae and (given := [name for name in NEW if name in self.model_fields_set]):
            raise ValueError(f"model.vae has sizes of its own: leave out model.{', model.'.join(given)}, or model.vae")
        if self.part == "decoder" and not self.vae:
            raise ValueError("model.part=decoder needs an encoder that is good: give model.vae")
        if wrong := [width for width in self.widths if width % self.norm_groups]:
            raise ValueError(f"model.norm_groups {self.norm_groups} does not divide model.widths {wrong[0]}")
        return self


class VAEDataOptions(PictureOptions):
    """The pictures; captions, masks and regularisation are not read."""

    caption: ClassVar[str] = ""  # stands for all captions, so that none is asked for
    pairs: ClassVar[None] = None  # there are pictures always
    crop: Literal["centre", "random"] = Field(
        "random", description="random: any stretch of the picture's own pixels; centre: scaled to cover the size, the middle, as the "
        "training of a network sees it, and validation and report always do"
    )  # fmt: skip
    random_background: float = Field(0.0, ge=0, le=1, description="share of the draws that lay transparency on a random colour, not white")
    permute_colours: float = Field(0.0, ge=0, le=1, description="share of the draws with red, green and blue in any order")


class VAETrainOptions(OptimisationOptions):
    """The optimisation."""

    weights: ClassVar[str] = "float32"  # what a VAE trains in is no option: float32 weights and all of them
    moments: ClassVar[str] = "float32"
    master_weights: ClassVar[bool] = False
    adapter: ClassVar[None] = None
    compile: bool = Field(False, description="torch.compile the autoencoder: a minute to start, faster steps; not with an adversarial term")


class LossOptions(Section):
    """How much each term counts; 0 leaves it out."""

    l1: float = Field(1.0, ge=0, allow_inf_nan=False, description="absolute difference of the pixels, which are in [-1, 1]")
    l2: float = Field(0.0, ge=0, allow_inf_nan=False, description="squared difference; 1 / (2 sigma^2) is Algorithm 6 of the notes")
    sigma: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Algorithm 6 itself: instead of l1 and l2 the negative log-likelihood of a Gaussian "
        "decoder with this deviation; kl is then the notes' beta"
    )  # fmt: skip
    edges: float = Field(0.0, ge=0, allow_inf_nan=False, description="absolute difference of neighbouring pixels' differences: crisp edges")
    perceptual: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="LPIPS; where loss.lpips is not given the distance in the discriminator's features, "
        "which then trains on these pictures, fooled or not (Larsen et al. 2016), from adversarial.start on"
    )  # fmt: skip
    lpips: str | None = Field(
        None, description="safetensors of the state of lpips.LPIPS(net='vgg'); also a line of the validation and the report"
    )
    kl: float = Field(1e-6, ge=0, allow_inf_nan=False, description="beta: the divergence of the latents from a standard normal, in nats")
    kl_warmup: int = Field(0, ge=0, description="steps in which kl grows from 0 to its full weight")


class AdversarialOptions(Section):
    """A discriminator that judges patches (PatchGAN, hinge loss), as in VQGAN and latent diffusion."""

    weight: float = Field(
        0.0, ge=0, allow_inf_nan=False,
        description="of the term, times the adaptive weight: the ratio of reconstruction's and term's gradients at the last layer; 0: none",
    )  # fmt: skip
    start: int = Field(0, ge=0, description="the step at which discriminator and term begin: reconstructions should be good by then")
    width: int = Field(64, ge=1, le=1024, description="channels of the discriminator's first layer")
    layers: int = Field(3, ge=1, le=6, description="halvings of the side; with 3 a patch is 70 pixels, with 2 it is 34")
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False, description="of the discriminator; train.learning_rate if unset")


class VAEValidationOptions(Section):
    """Reconstructions of pictures that are not trained on, by the averaged weights."""

    held_out: int = Field(0, ge=0, description="of the data's pictures, kept out of the training for it")
    folder: str | None = Field(None, description="pictures of a folder instead")
    every: int = Field(500, ge=1, description="steps between validations; also before the first step and after the last")
    pictures: int = Field(16, ge=1, le=256, description="on the report's sheet, original, reconstruction and difference")

    @model_validator(mode="after")
    def given_once(self) -> "VAEValidationOptions":
        if self.held_out and self.folder:
            raise ValueError("validation.held_out and validation.folder are both given; leave one of them out")
        return self


class VAEConfig(Section):
    """A whole run."""

    model: VAEModelOptions = Field(default_factory=VAEModelOptions)
    data: VAEDataOptions
    train: VAETrainOptions = Field(default_factory=VAETrainOptions)
    loss: LossOptions = Field(default_factory=LossOptions)
    adversarial: AdversarialOptions = Field(default_factory=AdversarialOptions)
    validation: VAEValidationOptions = Field(default_factory=VAEValidationOptions)
    output: OutputOptions

    @model_validator(mode="after")
    def goes_together(self) -> "VAEConfig":
        self.data.check_given_once()
        self.train.check_batch_divides()
        if self.train.compile and self.judged:
            raise ValueError("train.compile does not go with a discriminator (adversarial.weight, or loss.perceptual without loss.lpips)")
        if self.loss.lpips and not self.loss.perceptual and not (self.validation.held_out or self.validation.folder):
            raise ValueError("loss.lpips measures nothing: give loss.perceptual, validation.held_out or validation.folder, or leave it out")
        if not (self.loss.sigma or self.loss.l1 or self.loss.l2):
            raise ValueError("nothing asks for the pictures back: give loss.l1, loss.l2 or loss.sigma")
        return self

    @property
    def judged(self) -> bool:
        """Whether there is a discriminator."""
        return bool(self.adversarial.weight or (self.loss.perceptual and not self.loss.lpips))


VAE_OPTIONS = options_of(VAEConfig)
