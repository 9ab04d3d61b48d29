"""A result as text: its ``repr``, and the lines that other views print."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dla_hooks.results.by_entry import (
    digits_of,
    entry_headline,
    entry_lines,
    mixed,
    spreads,
)
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
    if mixed(data):
        return _each_entry(data)
    errors = spreads(data)
    sentence = printable(data.words.sentence + " (± standard error)" * bool(errors))
    table = _with_spreads(strongest(data, _TEXT_ROWS), errors)
    return "\n".join([headline(data), sentence, *table, *closing(data), *said_by_model(data)])


def _with_spreads(shown: Shown, errors: dict[str, float]) -> list[str]:
    """Rows with bars; behind each number its standard error, where it has one."""
    said = {
        label: "" if math.isnan(error) else f"± {error:.{shown.decimals}f}  "
        for label, error in errors.items()
    }
    width = max(map(len, said.values()), default=0)
    table = []
    for line in lines(shown, _HALF_BAR):
        spread = said.get(line.label, "")  # what stands for the rest has none
        table.append(f"  {line.start}{spread:<{width}}{line.end}".rstrip())
    return table


def _each_entry(data: EntryData) -> str:
    """One line for each entry: its logit, and the strongest row each way."""
    found, n = entry_lines(data, _TEXT_ROWS)
    digits = digits_of(found)
    numbers = [f"{line.logit:+.{digits}f}" for line in found]
    ups, downs = (
        ["" if end is None else f"{arrow} {end[0]} {end[1]:+.{digits}f}" for end in ends]
        for arrow, ends in (("↑", [x.up for x in found]), ("↓", [x.down for x in found]))
    )
    columns = [[line.name for line in found], numbers, ups]
    widths = [max(map(len, column)) for column in columns]
    table = [
        f"  {name:<{widths[0]}}  {number:>{widths[1]}}  {up:<{widths[2]}}  {down}".rstrip()
        for (name, number, up), down in zip(zip(*columns, strict=True), downs, strict=True)
    ]
    if n > len(found):
        table.append(f"  … {n - len(found)} more entries")
    sentence = printable(f"logit, and of {data.words.sentence.partition(':')[0]} the strongest")
    return "\n".join(
        [entry_headline(data), sentence, *table, *closing(data)[1:], *said_by_model(data)]
    )


def means_headline(means: ResultData, n: int, n_failed: int) -> str:
    """What means are of, over how many prompts, and of which model: one line."""
    what = "logit differences" if means.incorrect is not None else "logits"
    if means.compared:
        what = f"first - second, {what}"
    head = f"mean of {what} over {n} prompt{'s' * (n != 1)}"
    if n_failed:
        head += f" ({n_failed} {'more ' * (n > 0)}failed)"
    return printable(f"{head} · {means.model}" if means.model else head)


def means_as_text(means: ResultData, standard_error: Tensor, n: int, n_failed: int) -> str:
    """Means over prompts in fixed width, the strongest rows with standard errors and bars.

    Args:
        means: one entry, the means.
        standard_error: of each row [row].
        n: prompts that the means are over.
        n_failed: prompts that failed.
    """
    head = means_headline(means, n, n_failed)
    if not n:
        return head
    sentence = means.words.sentence + " (± standard error)" * (n > 1)
    errors = dict(zip(means.labels, standard_error.tolist(), strict=True))
    table = _with_spreads(strongest(means, _TEXT_ROWS), errors)
    return "\n".join([head, printable(sentence), *table, sum_line(means, mean=True)])


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
