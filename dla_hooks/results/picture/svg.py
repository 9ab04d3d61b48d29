"""SVG as text: a few shapes, everything escaped, and an estimate of how wide text is."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from html import escape

from dla_hooks.results.ranking import decimals

UP, DOWN = "#4393c3", "#d6604d"
"""Blue and red of one lightness, told apart by all eyes, and legible on a light and a dark page."""

SANS = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

_WIDE = 1.0  # of East Asian text, in its font size
_PER_CHARACTER = 0.61  # of a monospaced one
_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def clean(text: str) -> str:
    """Text that XML can hold, on one line: what it cannot hold stands as its escape."""
    return "".join(map(_clean, text))


def _clean(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    code = ord(character)
    if unicodedata.category(character) in ("Cc", "Cs") or code & 0xFFFE == 0xFFFE:
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    return character


def width_of(text: str, size: float) -> float:
    """How wide monospaced text is, in pixels, about."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return size * (_WIDE * wide + _PER_CHARACTER * (len(text) - wide))


def shortened(text: str, size: float, width: float) -> str:
    """The text, its middle left out where it is wider than ``width``."""
    if width_of(text, size) <= width:
        return text
    keep = len(text)
    while (
        keep > 2
        and width_of(text[: keep - keep // 2] + "…" + text[len(text) - keep // 2 :], size) > width
    ):
        keep -= 1
    return text[: keep - keep // 2] + "…" + text[len(text) - keep // 2 :]


def wrapped(text: str, size: float, width: float) -> list[str]:
    """The text as lines that are no wider than ``width``; words that are wider are shortened."""
    found = [""]
    for word in text.split(" "):
        longer = f"{found[-1]} {word}" if found[-1] else word
        if found[-1] and width_of(longer, size) > width:
            found.append(word)
        else:
            found[-1] = longer
    return [shortened(each, size, width) for each in found]


def number(value: float, digits: int) -> str:
    """A signed number with a true minus."""
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "+∞" if value > 0 else "−∞"
    return f"{value:+.{digits}f}".replace("-", "−")


def digits_of(values: Sequence[float]) -> int:
    """How many decimals show three digits of the largest of the values; at least two."""
    return max(2, decimals(values) - 1)


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers between two ends, zero among them where it lies between."""
    if not high > low:
        return [0.0]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


class Canvas:
    """Shapes, in the order in which they are drawn."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, hover: str = "", **more: object
    ) -> None:
        """A rectangle, with what a pointer over it shows."""
        self._add("rect", _title(hover), x=x, y=y, width=width, height=height, **more)

    def line(self, x1: float, y1: float, x2: float, y2: float, **more: object) -> None:
        """A line, in the colour of text unless ``stroke`` says another."""
        more.setdefault("stroke", "currentColor")
        self._add("line", "", x1=x1, y1=y1, x2=x2, y2=y2, **more)

    def circle(self, x: float, y: float, radius: float, hover: str = "", **more: object) -> None:
        """A dot, with what a pointer over it shows."""
        self._add("circle", _title(hover), cx=x, cy=y, r=radius, **more)

    def polyline(self, points: Sequence[tuple[float, float]], **more: object) -> None:
        """Straight lines from point to point."""
        text = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self._add("polyline", "", points=text, fill="none", stroke="currentColor", **more)

    def text(self, x: float, y: float, text: str, **more: object) -> None:
        """A line of text, whose base begins at x and y."""
        self._add("text", escape(clean(text)), x=x, y=y, **more)

    def __str__(self) -> str:
        return "".join(self._parts)

    def _add(self, tag: str, inside: str, **attributes: object) -> None:
        said = "".join(
            f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"'
            for name, value in attributes.items()
            if value is not None
        )
        self._parts.append(f"<{tag}{said}>{inside}</{tag}>" if inside else f"<{tag}{said}/>")


def mark(label: str, value: float) -> dict[str, object]:
    """The attributes by which a shape says, to programs, what it stands for."""
    return {"data_label": label, "data_value": f"{value:.7g}"}


def _title(hover: str) -> str:
    return f"<title>{escape(clean(hover))}</title>" if hover else ""


def _value(value: object) -> str:
    if isinstance(value, float):
        return _number(value)
    return escape(clean(str(value)))


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
