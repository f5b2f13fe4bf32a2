"""Captions and tables out of bytes: by their byte order mark or as UTF-8, within bounds, and what is odd about a caption said."""

import codecs
import re
import unicodedata

CAPTION_BYTES = 2**20  # the most that a file of captions may have
CAPTION_CHARACTERS = 100_000  # the most that one caption may have: a thousand times what the encoders read
POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that stands for another, kept elsewhere by Git LFS
FETCH = "Git LFS pointer, not the file itself (fetch it: git lfs pull)"

_MARKS = {  # the longer ones first: UTF-32's begins as UTF-16's
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_BLANK = frozenset("\u2800\u3164\u115f\u1160\uffa0") | {chr(number) for number in range(0xFE00, 0xFE10)}  # letters that show nothing
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Unusable(Exception):
    """A row or a file that becomes a Problem: its reason."""


def encoding_of(head: bytes) -> str:
    """The encoding that a text's first bytes tell. Raises Unusable for a Git LFS pointer and for UTF-16 without its mark."""
    if head.startswith(POINTER):
        raise Unusable(FETCH)
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    if b"\0" in head:
        raise Unusable("text with NUL characters (UTF-16 without its byte order mark?); save it again as UTF-8")
    return "utf-8-sig"


def decoded(data: bytes, what: str = "caption file") -> str:
    """The text of a caption file's bytes. Raises Unusable when it is none, or larger than CAPTION_BYTES."""
    if len(data) > CAPTION_BYTES:
        raise Unusable(f"{what} of more than {CAPTION_BYTES:,} bytes")
    try:
        return data.decode(encoding_of(data))
    except UnicodeDecodeError:
        raise Unusable(f"{what} that is not UTF-8") from None
    except Unusable as error:
        raise Unusable(f"{what} that is a {error}") from None


def lines_of(text: str) -> tuple[str, ...]:
    """The lines of a caption file that show something; the empty caption when there is none.

    Raises Unusable for one longer than CAPTION_CHARACTERS.
    """
    # Not splitlines(), which also cuts at U+2028 and other characters a caption may hold.
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text)]
    found = tuple(checked(line) for line in lines if visible(line))
    return found or (max(lines, key=len),)  # invisible characters alone are told of by `oddity`


def checked(text: str) -> str:
    """A caption without the white space around it. Raises Unusable for one that no encoder takes or that is too long to be one."""
    if len(text) > CAPTION_CHARACTERS:
        raise Unusable(f"caption of more than {CAPTION_CHARACTERS:,} characters")
    if "\0" in text:
        raise Unusable("caption with NUL characters")
    return text.strip()


def visible(text: str) -> bool:
    """Whether any character of a text shows something."""
    return any(character not in _BLANK and unicodedata.category(character) not in ("Cc", "Cf", "Zs", "Zl", "Zp") for character in text)


def oddity(caption: str) -> str | None:
    """What is odd about a caption that is used all the same; None for the most."""
    if caption.isascii() and caption.isprintable():
        return None
    if caption and not visible(caption):
        return "caption of invisible characters alone (taken as empty)"
    if _CONTROLS.search(caption):
        return "caption with control characters (another encoding, or copied from a terminal?)"
    if "\ufffd" in caption:
        return "caption that lost characters before it came here (they are U+FFFD)"
    if decoded_twice(caption):
        return "caption whose letters were decoded wrongly before it came here, as in caf\u00c3\u00a9 for caf\u00e9"
    return None


def decoded_twice(text: str) -> bool:
    """Whether a text is UTF-8 that was read as Windows-1252 or Latin-1: back in its bytes it is UTF-8 again, and shorter."""
    for encoding in ("cp1252", "latin-1"):
        try:
            return len(text.encode(encoding).decode("utf-8")) < len(text)
        except UnicodeError:
            continue
    return False


def composed(name: str) -> str:
    """A file's name with its accents composed (NFC): macOS writes them decomposed, most editors and tables do not."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)
