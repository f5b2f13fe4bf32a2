"""What drawing pictures with a model takes: memory, operations, time, and what would make it fit. Needs no torch."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from latentfm.errors import InputError
from latentfm.planning.cost import forward_flops
from latentfm.planning.devices import Device
from latentfm.planning.memory import Phase, drawing_phases, fullest
from latentfm.planning.model import ModelSpec
from latentfm.planning.training import WIDTHS
from latentfm.sampling import SOLVERS


@dataclass(frozen=True)
class Sampling:
    """Pictures drawn by each of several GPUs; together so many at a time."""

    model: ModelSpec
    size: tuple[int, int]  # width and height in pixels
    text_tokens: int
    steps: int
    guidance: float
    dtype: str
    pictures: int
    gpus: int = 1
    solver: str | None = None

    def __post_init__(self) -> None:
        if SOLVERS[self.solver or "euler"] is None:
            others = ", ".join(name for name, evaluations in SOLVERS.items() if evaluations)
            raise InputError(f"how often {self.solver} evaluates the network is not known beforehand; plan with {others}")

    @property
    def each(self) -> int:
        """Pictures at a time on a GPU."""
        return self.pictures // self.gpus

    @property
    def encoders(self) -> int:
        """Bytes of the text encoders."""
        return WIDTHS[self.dtype] * sum(self.model.encoder_parameters.values())

    def phases(self, pictures: int, encoders: int) -> list[Phase]:
        """What is in a GPU's memory while it draws so many pictures beside so many bytes of text encoders."""
        model, width = self.model, WIDTHS[self.dtype]
        decoding = width * model.decoder.numbers(self.size[0] * self.size[1])
        return drawing_phases(
            model.network, model.image_tokens(self.size), self.text_tokens, pictures, self.guidance > 1, self.steps, width,
            encoders + width * model.vae, decoding,
        )  # fmt: skip

    def flops(self) -> dict[str, dict[str, int]]:
        """FLOP of one picture by part: of one forward pass, and of all its steps and decoding."""
        once = forward_flops(self.model.network, self.model.image_tokens(self.size), self.text_tokens)
        evaluations = self.steps * SOLVERS[self.solver or "euler"] * (1 + (self.guidance > 1))
        decoding = self.model.decoder.flops(self.size[0] * self.size[1])
        return {"forward": once, "picture": {"the network's steps": evaluations * sum(once.values()), "decoding": decoding}}

    def time(self, device: Device, efficiency: float) -> dict[str, Any]:
        """FLOP of a picture, and the time they take of a GPU's peak."""
        flops = sum(self.flops()["picture"].values())
        seconds = flops / (device.gpu.tflops * 1e12 * efficiency)
        return {"FLOP a picture": flops, "efficiency": efficiency, "images a second": self.gpus / seconds, "seconds a picture": seconds}

    def ways_to_fit(self, device: Device) -> list[str]:
        """Fewer pictures at a time, or no text encoders beside the network, where what was asked for does not fit."""

        def most(encoders: int) -> int:
            """The most pictures up to those asked for that fit; 0 when not even one does."""
            return bisect_left(range(1, self.each + 1), True, key=lambda n: not device.fits(fullest(self.phases(n, encoders)).total))

        beside, without = most(self.encoders), most(0)
        if beside == self.each:
            return []
        fewer = "" if without == self.each else f"--generate {self.gpus * without} and "
        aside = f"{fewer}the text encoders off the GPU while drawing (pipe.enable_model_cpu_offload())"
        return [*([f"--generate {self.gpus * beside}"] if beside else []), *([aside] if without else [])]
