"""A result as text: its ``repr``, and the lines that other views print."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dla_hooks.results.data import EntryData, ResultData
from dla_hooks.results.ranking import Shown, strongest
from dla_hooks.results.wording import (
    closing,
    headline,
    nothing_in,
    printable,
    said_by_model,
    sum_line,
)

_TEXT_ROWS = 14
_HALF_BAR = 12
_NARROW = 9  # half a bar that leaves room for two words beside it


def as_text(data: EntryData) -> str:
    """A result in at most 25 lines, its strongest rows with bars."""
    nothing = nothing_in(data)
    if nothing:
        return f"{printable(data.words.sentence)}\n{nothing}"
    shown = strongest(data, _TEXT_ROWS)
    table = [f"  {line.start}{line.end}".rstrip() for line in lines(shown, _HALF_BAR)]
    sentence = printable(data.words.sentence)
    return "\n".join([headline(data), sentence, *table, *closing(data), *said_by_model(data)])


def means_as_text(means: ResultData, standard_error: Tensor, n: int, n_failed: int) -> str:
    """Means over prompts in fixed width, the strongest rows with standard errors and bars.

    Args:
        means: one entry, the means.
        standard_error: of each row [row].
        n: prompts that the means are over.
        n_failed: prompts that failed.
    """
    what = "logit differences" if means.incorrect is not None else "logits"
    if means.compared:
        what = f"first - second, {what}"
    head = f"mean of {what} over {n} prompt{'s' * (n != 1)}"
    if n_failed:
        head += f" ({n_failed} {'more ' * (n > 0)}failed)"
    if means.model:
        head += f" · {means.model}"
    if not n:
        return printable(head)
    sentence = means.words.sentence + " (± standard error)" * (n > 1)
    shown = strongest(means, _TEXT_ROWS)
    spreads = {
        label: "" if math.isnan(error) else f"± {error:.{shown.decimals}f}  "
        for label, error in zip(means.labels, standard_error.tolist(), strict=True)
    }
    width = max(map(len, spreads.values()), default=0)
    table = []
    for line in lines(shown, _HALF_BAR):
        spread = spreads.get(line.label, "")  # what stands for the rest has none
        table.append(f"  {line.start}{spread:<{width}}{line.end}".rstrip())
    return "\n".join([printable(head), printable(sentence), *table, sum_line(means, mean=True)])


@dataclass(frozen=True)
class TextLine:
    """One line of a table in fixed width.

    Attributes:
        label: of its row, or "" for a line about those left out.
        start: the label and the number, padded.
        end: a bar or a note.
        value: the number that a bar stands for, or None.
    """

    label: str
    start: str
    end: str
    value: float | None = None


def lines(shown: Shown, half: int) -> list[TextLine]:
    """The rows as lines of text that stand under each other.

    Args:
        shown: the rows.
        half: characters of a full bar, to either side.
    """
    remainder = shown.remainder
    cells = [(label, printable(label), value) for label, value in shown.rows]
    if remainder is not None:
        cells.append((remainder.label, printable(remainder.label), remainder.value))
    numbers = [f"{value:+.{shown.decimals}f}" for _, _, value in cells]
    width = max((len(name) for _, name, _ in cells), default=0)
    columns = max(map(len, numbers), default=0)
    starts = [
        f"{name:<{width}}  {number:>{columns}}  "
        for (_, name, _), number in zip(cells, numbers, strict=True)
    ]

    found = [
        TextLine(label, start, bar(value, shown.largest, half), value)
        for (label, value), start in zip(shown.rows, starts, strict=False)
    ]
    if shown.left_out:
        found.insert(shown.gap_at, TextLine("", "", f"… {shown.left_out}"))
    if remainder is not None:
        note = remainder.holds if half > _NARROW else remainder.short
        found.append(TextLine(remainder.label, starts[-1], f"({note})" if note else ""))
    return found


def bar(value: float, largest: float, half: int) -> str:
    """A bar of ``2 * half + 1`` characters that grows from its middle to either side."""
    if not math.isfinite(value) or largest == 0:  # a bar that has no length
        return f"{'│':^{2 * half + 1}}"
    steps = min(2 * half, round(2 * half * abs(value) / largest))  # half characters
    full, odd = divmod(steps, 2)
    if value < 0:
        return f"{'▐' * odd + '█' * full:>{half}}│{'':{half}}"
    return f"{'':{half}}│{'█' * full + '▌' * odd:<{half}}"
