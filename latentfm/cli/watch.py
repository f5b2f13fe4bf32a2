"""A picture shown while it forms: in the terminal, where that has a protocol for pictures, or else in a file that is written anew."""

import base64
import io
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from PIL import Image

EVERY = 0.25  # seconds between two looks
ROWS = 16  # lines of the terminal that a look takes
PIECE = 4096  # characters of base64 that kitty takes at once
KITTY = ("xterm-kitty", "xterm-ghostty")


class Watch:
    """Where the forming pictures are shown: the terminal behind `stream` (standard error unless given) or the file `path`."""

    def __init__(self, path: Path, stream: TextIO | None = None):
        self.path, self.stream = path, stream or sys.stderr
        self.protocol = protocol(os.environ) if self.stream.isatty() else None
        self.last = float("-inf")

    def show(self, images: "list[Image.Image]", finished: bool = False) -> None:
        """Shows the pictures of a batch in one, unless the last look was a moment ago; a finished one is always shown."""
        if time.monotonic() - self.last < EVERY and not finished:
            return
        from latentfm.pictures import grid

        self.last = time.monotonic()
        sheet, data = grid(images), io.BytesIO()
        sheet.save(data, "PNG")
        if self.protocol is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".part")
            partial.write_bytes(data.getvalue())
            os.replace(partial, self.path)  # whoever looks sees a whole picture
            return
        # each look is drawn over the one before: room is made, and the cursor kept where it was
        room, after = "\n" * ROWS + f"\x1b[{ROWS}A\x1b7", f"\x1b[{ROWS}B\n" if finished else "\x1b8"
        self.stream.write(room + self.protocol(data.getvalue()) + after)
        self.stream.flush()


def protocol(environment: Mapping[str, str]) -> Callable[[bytes], str] | None:
    """The function that puts a PNG into the escape codes of the terminal that the environment tells of; None where it has none."""
    if environment.get("TERM") in KITTY or environment.get("KITTY_WINDOW_ID"):
        return kitty
    return iterm if environment.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm") else None


def kitty(png: bytes) -> str:
    """A PNG in kitty's graphics protocol, ROWS lines high, in pieces (https://sw.kovidgoyal.net/kitty/graphics-protocol)."""
    text = base64.b64encode(png).decode("ascii")
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    last = len(pieces) - 1
    heads = [f"a=T,f=100,r={ROWS},q=2,C=1,i=1,m={int(i < last)}" if i == 0 else f"m={int(i < last)}" for i in range(len(pieces))]
    return "".join(f"\x1b_G{head};{piece}\x1b\\" for head, piece in zip(heads, pieces, strict=True))


def iterm(png: bytes) -> str:
    """A PNG as iTerm2's inline picture, ROWS lines high (https://iterm2.com/documentation-images.html)."""
    return f"\x1b]1337;File=inline=1;size={len(png)};height={ROWS}:{base64.b64encode(png).decode('ascii')}\x07"
