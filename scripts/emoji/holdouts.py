"""What the bundled model never learns, so that it can be asked for: all decided by hashes of names, so for good. Used by build.py.

- 5 % of the (style, concept) pairs: never drawn anywhere, VAE and scenes included. A concept loses one style at most, and never
  the one that plain prompts are drawn in.
- 10 % of the combinations in scenes: (concept, concept, relation), (concept, count), (concept, background).
- 10 % of the synonyms: never in a caption.
"""

import hashlib

PAIR_SHARE, COMBINATION_SHARE, SYNONYM_SHARE = 0.05, 0.1, 0.1


def share(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` alone."""
    return int(hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:13], 16) / 16**13


def held_out_style(code: str, styles: list[str], kept: str) -> str | None:
    """The style that concept `code` is not shown in, or none; `kept` is never it. On average PAIR_SHARE of all its pairs."""
    losable = [style for style in styles if style != kept]
    if not losable or share("concept", code) >= PAIR_SHARE * len(styles):
        return None
    return min(losable, key=lambda style: share("pair", style, code))


def combination(relation: str, *things: object) -> bool:
    """Whether scenes with `relation` between `things` are kept for the examination. Mirrored relations are one:
    "right" of (a, b) is "left" of (b, a), "below" is "above", and "and" knows no order.
    """
    if relation in ("right", "below"):
        relation, things = {"right": "left", "below": "above"}[relation], tuple(reversed(things))
    elif relation == "and":
        things = tuple(sorted(things, key=str))
    return share("combination", relation, *things) < COMBINATION_SHARE


def synonym(code: str, word: str) -> bool:
    """Whether `word` is never said of concept `code` in training."""
    return share("synonym", code, word) < SYNONYM_SHARE
