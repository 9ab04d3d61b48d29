"""A result as text: its ``repr``, and the lines that other views print."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dla_hooks.results.ranking import (
    REMAINDER,
    Rows,
    decimals,
    strongest,
)
from dla_hooks.results.wording import EMPTY, closing, headline, unit_sentence

if TYPE_CHECKING:
    from dla_hooks.results.result import DirectLogitAttribution

_TEXT_ROWS = 14
_HALF_BAR = 12


def as_text(result: DirectLogitAttribution) -> str:
    """A result in at most 25 lines, its strongest rows with bars."""
    if not result.attribution.numel():
        return f"{unit_sentence(result)}\n{EMPTY}"
    rows = strongest(result, _TEXT_ROWS)
    table = [f"  {line.start}{line.end}".rstrip() for line in lines(rows, _HALF_BAR)]
    return "\n".join([headline(result), unit_sentence(result), *table, *closing(result)])


@dataclass(frozen=True)
class Line:
    """One line of a table in fixed width: the label and number, padded, then a bar or a note."""

    start: str
    end: str
    value: float | None = None


def lines(rows: Rows, half: int) -> list[Line]:
    """The rows as lines of text that stand under each other.

    Args:
        rows: what to show.
        half: characters of a full bar, to either side.
    """
    digits = decimals([rows.largest, rows.remainder or 0.0])
    shown = [(label, f"{value:+.{digits}f}", value) for label, value in rows.shown]
    last = None if rows.remainder is None else f"{rows.remainder:+.{digits}f}"
    width = max(len(label) for label, _, _ in [*shown, (REMAINDER if last else "", "", 0.0)])
    columns = max(len(number) for number in [*(number for _, number, _ in shown), last or ""])

    found = [
        Line(f"{label:<{width}}  {number:>{columns}}  ", bar(value, rows.largest, half), value)
        for label, number, value in shown
    ]
    if rows.left_out:
        found.insert(rows.gap_at, Line("", f"… {rows.left_out}"))
    if last:
        note = "(what no head wrote)" if half > 9 else "(no head)"
        found.append(Line(f"{REMAINDER:<{width}}  {last:>{columns}}  ", note))
    return found


def bar(value: float, largest: float, half: int) -> str:
    """A bar of ``2 * half + 1`` characters that grows from its middle to either side."""
    if not math.isfinite(value) or largest == 0:
        return f"{'│':^{2 * half + 1}}"
    steps = min(2 * half, round(2 * half * abs(value) / largest))  # half characters
    full, odd = divmod(steps, 2)
    if value < 0:
        return f"{'▐' * odd + '█' * full:>{half}}│{'':{half}}"
    return f"{'':{half}}│{'█' * full + '▌' * odd:<{half}}"
