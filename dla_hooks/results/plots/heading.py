"""What stands over a picture of a result."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dla_hooks.results.data import EntryData
from dla_hooks.results.plots import kinds
from dla_hooks.results.plots.lines import MEAN, Line, asked, where
from dla_hooks.results.plots.numbers import Numbers
from dla_hooks.results.plots.wish import Wish
from dla_hooks.results.ranking import decimals
from dla_hooks.results.wording import printable


def heading(
    data: EntryData, lines: Sequence[Line], mean: bool, note: str, wish: Wish
) -> tuple[str, list[str]]:
    title = wish.title if wish.title is not None else f"{data.words.title}: {asked(data, lines)}"
    if wish.title is None and note.startswith("mean"):
        title += f" ({note})"
    said = [where(data, lines)]
    if mean and len(lines) > 1:
        what = "standard error" if wish.prompt == MEAN else "standard deviation"
        said[0] += f"{', ' if said[0] else ''}± {what}"
    elif note and not note.startswith("mean"):
        said.append(note)
    said.append(data.model)
    if len(lines) == 1 or mean:
        said.append(_sum(data, lines, mean or note.startswith("mean")))
    # With the minus sign that the numbers have.
    shown = [re.sub(r"(?<= )-(?=\d)", "−", printable(line)) for line in said if line]
    return printable(title), shown


def _sum(data: EntryData, lines: Sequence[Line], mean: bool) -> str:
    """What the rows are held to."""
    total, bias, logit = (
        sum(float(flat[list(line.flats)].mean()) for line in lines) / len(lines)
        for flat in (
            each.detach().cpu().double().flatten() for each in (data.total(), data.bias, data.logit)
        )
    )
    digits = decimals([total, bias, logit])
    what = f"the {'mean ' * mean}logit{' difference' * (data.incorrect is not None)}"
    if data.softcap is not None:
        what += f" before the cap of {data.softcap:g}"
    start = "last entry" if data.words.cumulative else "sum"
    return f"{start} {total:+.{digits}f}  + bias {bias:+.{digits}f}  = {logit:+.{digits}f}, {what}"


def not_drawn(data: EntryData, numbers: Numbers) -> list[str]:
    """A line about rows that have no square in a grid, and one about the remainder."""
    others = [
        float(value)
        for row, value in zip(numbers.rows, numbers.values[:, 0].tolist(), strict=True)
        if not kinds.has_square(row)
    ]
    n, total = len(others) + numbers.n_others, sum(others) + float(numbers.others[0])
    remainder = 0.0 if numbers.remainder is None else float(numbers.remainder[0])
    digits = decimals([remainder, *numbers.values[:, 0].tolist()])
    lines = []
    if n:
        lines.append(f"{n} more row{'s' * (n > 1)} without a square, together {total:+.{digits}f}")
    if numbers.remainder is not None:
        words = data.words
        holds = (
            f"{words.remainder_is} ({words.remainder})" if words.remainder_is else words.remainder
        )
        lines.append(f"{holds}: {remainder:+.{digits}f}")
    return [line.replace(" -", " −") for line in lines]
