"""Figures with their intervals as SVG: complete in itself, in the colours of the page that it stands on."""

import math
from collections.abc import Sequence
from html import escape

HEIGHT, LEFT, BELOW, ABOVE = 210, 48, 34, 26
NARROWEST, LETTER = 440, 6.5  # pixels of a plot, and of a letter of its labels


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about so many."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(times for times in (1, 2, 5, 10) if (high - low) / (step * times) <= about + 0.5)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plot(title: str, labels: Sequence[str], series: Sequence[Sequence[dict[str, float]]], joined: bool = True) -> str:
    """The SVG of a few series of figures, a point a label with its interval; `joined` by lines where the labels are in an order.

    What is not finite is left out: such a figure has no point, and such an interval fills the plot's height.
    """
    numbers = [number for each in series for one in each for number in (one["value"], one["low"], one["high"]) if math.isfinite(number)]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    margin = 0.06 * (high - low) or abs(high) or 1.0
    low, high = low - margin, high + margin
    width = max(NARROWEST, LEFT + round(len(labels) * (LETTER * max(map(len, labels)) + 12)))

    def down(value: float) -> float:
        return ABOVE + (HEIGHT - ABOVE - BELOW) * (high - min(max(value, low), high)) / (high - low)

    def across(place: int, which: int) -> float:
        room = (width - LEFT - 8) / len(labels)
        return LEFT + room * (place + 0.5) + 8 * (which - (len(series) - 1) / 2)

    parts = [f'<text x="0" y="14" class="title">{escape(title)}</text>']
    for tick in ticks(low, high):
        y = f"{down(tick):.1f}"
        parts.append(f'<line x1="{LEFT}" x2="{width}" y1="{y}" y2="{y}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy="4" text-anchor="end">{tick:.6g}</text>')
    for which, each in enumerate(series):
        points = [(across(place, which), one) for place, one in enumerate(each) if math.isfinite(one["value"])]
        if joined:
            line = " ".join(f"{x:.1f},{down(one['value']):.1f}" for x, one in points)
            parts.append(f'<polyline points="{line}" class="s{which} line"/>')
        for x, one in points:
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{down(one["low"]):.1f}" y2="{down(one["high"]):.1f}" class="s{which}"/>')
            interval = f"{one['low']:.4g} to {one['high']:.4g}" if math.isfinite(one["high"] - one["low"]) else "too few prompts"
            said = f"{one['value']:.4g} ({interval})"
            parts.append(f'<circle cx="{x:.1f}" cy="{down(one["value"]):.1f}" r="4" class="s{which}"><title>{said}</title></circle>')
    middle = (len(series) - 1) / 2
    for place, label in enumerate(labels):
        x = across(place, 0) + 8 * middle
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BELOW + 18}" text-anchor="middle">{escape(label)}</text>')
    return f'<svg viewBox="0 0 {width} {HEIGHT}" width="{width}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
