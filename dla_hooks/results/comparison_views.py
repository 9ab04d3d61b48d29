"""A comparison as text and as html: the difference, with the two runs above it."""

from __future__ import annotations

from dataclasses import replace
from html import escape

from dla_hooks.results import html
from dla_hooks.results.data import EntryData, ResultData, entry_mean
from dla_hooks.results.ranked_data import RankedData
from dla_hooks.results.ranking import decimals, strongest
from dla_hooks.results.text import lines
from dla_hooks.results.wording import closing, headline, nothing_in, place, printable

_TEXT_ROWS = 14
_HALF_BAR = 8


def as_text(difference: EntryData, first: EntryData, second: EntryData) -> str:
    """The difference in at most 26 lines: its strongest rows, with what was written and read."""
    nothing = nothing_in(difference)
    sentence = printable(difference.words.sentence)
    if nothing:
        return f"{sentence}\n{nothing}"
    shown = strongest(difference, _TEXT_ROWS)
    halves = {
        label: f"written {written:+.{shown.decimals}f}, read {read:+.{shown.decimals}f}"
        for label, (written, read) in _halves(difference).items()
    }
    width = max((len(halves.get(label, "")) for label, _ in shown.rows), default=0)
    table = []
    for line in lines(shown, _HALF_BAR):
        own = halves.get(line.label, "")
        table.append(f"  {line.start}{own:<{width}}  {line.end}".rstrip())
    start = [headline(difference), runs(first, second), sentence]
    return "\n".join([*start, *table, *closing(difference)])


def as_html(difference: EntryData, first: EntryData, second: EntryData) -> str:
    """The difference as html, below a line about the two runs."""
    said = escape(printable(runs(first, second)))
    return f'<div style="opacity:.85">{said}</div>{html.as_html(difference)}'


def runs(first: EntryData, second: EntryData) -> str:
    """Both runs' logits, and where the second was read, if it was elsewhere."""
    values = [entry_mean(run.logit) for run in (first, second)]
    digits = decimals(values)
    line = f"first {values[0]:+.{digits}f}, second {values[1]:+.{digits}f}"
    here, there = place(first), place(second)
    return line if here == there else f"{line} ({there})"


def _halves(difference: EntryData) -> dict[str, tuple[float, float]]:
    """What was written and what was read of each row, by label, as means over the entries."""
    written, read = (difference.beside[name] for name in ("written", "read"))
    if isinstance(difference, ResultData):
        means = [
            own.reshape(len(own), difference.shape.numel()).nanmean(-1).tolist()
            for own in (written, read)
        ]
        return dict(zip(difference.labels, zip(*means, strict=True), strict=True))
    if not isinstance(difference, RankedData) or difference.shape.numel() > 1:
        return {}  # a row is kept at some of the entries only
    found = [replace(difference, attribution=own).kept_means() for own in (written, read)]
    (numbers, one), (_, other) = found
    labels = [difference.row_label(number) for number in numbers.tolist()]
    return dict(zip(labels, zip(one.tolist(), other.tolist(), strict=True), strict=True))
