"""How much one request may ask for. What is beyond is refused with the limit and the value."""

from dataclasses import dataclass

from latentfm.errors import InputError
from latentfm.words import shortened


@dataclass(frozen=True)
class Limits:
    """size: pixels a side. steps: of the sampler. batch: pictures a request, sweeps included. prompt: characters. waiting: requests in the
    queue. at_once: pictures drawn together. pixels: of a picture that is sent in. upload: bytes of anything that is sent in.
    """

    size: int = 2048
    steps: int = 100
    batch: int = 16
    prompt: int = 2000
    waiting: int = 64
    at_once: int = 4
    pixels: int = 40_000_000
    upload: int = 25 * 2**20

    def check(self, what: str, value: int, most: int, unit: str = "") -> None:
        """Raises InputError where a value is beyond the limit."""
        if value > most:
            raise InputError(f"{what} {shortened(f'{value:,}', 40)}{unit} is more than {most:,}{unit}, the most that is taken here")

    def check_text(self, what: str, text: str) -> None:
        """Raises InputError for a text that is too long."""
        if len(text) > self.prompt:
            raise InputError(f"{what} '{shortened(text, 40)}' has {len(text):,} characters; the most that is taken here is {self.prompt:,}")
