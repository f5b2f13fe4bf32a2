"""Words for people: what is not ours made safe to print, numbers with their nouns, long lists and texts cut short."""

import re
from collections.abc import Iterable

# C0 and C1 controls, line and paragraph separators, marks that reorder or hide text (Unicode TR36), lone surrogates, noncharacters
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}  # of bytes


def shown(text: object, most: int | None = None) -> str:
    r"""`text` as one line that a terminal shows and does not obey: control characters and the like as escapes, as in \x1b.

    For file names, captions, and whatever else comes from a file; with `most`, cut short to so many characters. Letters of all
    scripts stay as they are.
    """
    text = str(text)
    if most is not None:
        text = shortened(text, most)
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def is_text(text: str) -> bool:
    """False for lone surrogates, which neither UTF-8 nor a tokenizer takes: undecodable file names, or half an emoji in JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shortened(text: str, most: int = 80) -> str:
    """`text`, or its first characters and "..." where it is longer than `most`."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def count(number: int, noun: str, plural: str | None = None) -> str:
    """ "1 picture", "1,200 pictures": a number and its noun; `plural` where it is not the noun and an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def listed(names: Iterable[object], most: int = 4) -> str:
    """ "a, b and 7 more": the first names, safe to print, and how many others there are."""
    names = list(names)
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(shown(name, 200) for name in names[:most]) + rest


def in_units(size: float) -> str:
    """Bytes in words: "4.34 GB"."""
    unit = next((unit for unit in ("GB", "MB", "KB") if size >= UNITS[unit]), "")
    return f"{size / UNITS[unit]:.2f} {unit}" if unit else f"{size} bytes"
