"""A result as html: what a notebook shows. One family: a heading, tables that open, a closing."""

from __future__ import annotations

import itertools
import math
from html import escape

from torch import Tensor

from dla_hooks.results.by_entry import digits_of, entry_headline, entry_lines, mixed, spreads
from dla_hooks.results.data import EntryData, ResultData, real_entries
from dla_hooks.results.ranking import Shown, in_order, strongest
from dla_hooks.results.text import means_headline
from dla_hooks.results.wording import (
    closing,
    headline,
    nothing_in,
    printable,
    said_by_model,
    sum_line,
)

_ROWS, _ALL_ROWS, _ENTRIES = 24, 200, 60
_HALF_BAR = 110  # pixels

# Of middling lightness, so that they stand out on a light page and on a dark one.
_UP, _DOWN = "#4393c3", "#d6604d"
_NUMBERS = itertools.count(1)


def as_html(data: EntryData) -> str:
    """A result as one self-contained, escaped piece of html with inline styles."""
    nothing = nothing_in(data)
    if nothing:
        return printable(f"<div>{escape(data.words.sentence)}</div><div>{nothing}</div>")
    several = int(real_entries(data)[0].sum()) > 1
    end = [*closing(data), *said_by_model(data)]
    if not several:
        return page(headline(data), data.words.sentence, _rows(data), end)
    if mixed(data):
        tables = [("each entry", _entries(data)), *_rows(data, "mean over all entries, ")]
        return page(entry_headline(data), data.words.sentence, tables, end[1:])
    errors = spreads(data)
    tables = [*_rows(data, errors=errors), ("each entry", _entries(data))]
    sentence = data.words.sentence + " (± standard error)" * bool(errors)
    return page(headline(data), sentence, tables, end)


def means_as_html(means: ResultData, standard_error: Tensor, n: int, n_failed: int) -> str:
    """Means over prompts with standard errors, as the same piece of html.

    Args:
        means: one entry, the means.
        standard_error: of each row [row].
        n: prompts that the means are over.
        n_failed: prompts that failed.
    """
    head = means_headline(means, n, n_failed)
    if not n:
        return printable(f"<div>{escape(head)}</div>")
    errors = dict(zip(means.labels, standard_error.tolist(), strict=True))
    sentence = means.words.sentence + " (± standard error)" * (n > 1)
    return page(head, sentence, _rows(means, errors=errors), [sum_line(means, mean=True)])


def page(head: str, sentence: str, tables: list[tuple[str, str]], end: list[str]) -> str:
    """A heading, tables of which one is open at a time, and closing lines.

    Args:
        head: what it is about.
        sentence: what the rows are.
        tables: each with what it is called.
        end: closing lines.
    """
    group = f"dla-{next(_NUMBERS)}"  # opening one closes the others, in browsers that know how
    parts = [
        f'<details name="{group}"{" open" * (not i)}><summary style="cursor:pointer">'
        f"{escape(name)}</summary>{body}</details>"
        for i, (name, body) in enumerate(tables)
    ]
    closing_lines = "".join(f"<div>{escape(line)}</div>" for line in end)
    return printable(
        '<div style="line-height:1.45;max-width:60em;overflow-x:auto">'
        f'<div style="font-weight:600">{escape(head)}</div>'
        f'<div style="opacity:.7">{escape(sentence)}</div>{"".join(parts)}'
        f'<div style="opacity:.85">{closing_lines}</div></div>'
    )


def _rows(
    data: EntryData, what: str = "", errors: dict[str, float] | None = None
) -> list[tuple[str, str]]:
    """The rows as tables: the strongest by size, all by size, and in the order of the stream."""
    order = in_order(data)
    n = len(order.rows)
    first = f", the first {_ALL_ROWS}" * (n > _ALL_ROWS)
    if data.words.cumulative:
        tables = [(f"{what}in stream order", strongest(data, _ROWS))]
        if n > _ROWS:
            tables.append((f"{what}in stream order{first or f', all {n}'}", _within(order)))
    else:
        tables = [(f"{what}by size", strongest(data, _ROWS))]
        if n > _ROWS:
            count = f"all {n}" if n <= _ALL_ROWS else f"the strongest {_ALL_ROWS}"
            tables.append((f"{what}by size, {count}", strongest(data, _ALL_ROWS)))
        tables.append((f"{what}in stream order{first}", _within(order)))
    return [(name, _table(shown, errors or {})) for name, shown in tables]


def _within(shown: Shown) -> Shown:
    """No more rows than a page carries: the first ones, and a line about the others."""
    if len(shown.rows) <= _ALL_ROWS:
        return shown
    n = len(shown.rows) - _ALL_ROWS
    note = f"{n} more rows: records() has all"
    return Shown(shown.rows[:_ALL_ROWS], _ALL_ROWS, note, shown.remainder, shown.largest)


def _table(shown: Shown, errors: dict[str, float]) -> str:
    digits = shown.decimals
    lines = []
    for label, value in shown.rows:
        error = errors.get(label, math.nan)
        spread = "" if math.isnan(error) else f" ± {error:.{digits}f}"
        lines.append(_line(label, f"{value:+.{digits}f}{spread}", _bar(value, shown.largest)))
    if shown.left_out:
        lines.insert(shown.gap_at, _line("…", "", _note(shown.left_out)))
    if shown.remainder is not None:
        number = f"{shown.remainder.value:+.{digits}f}"
        lines.append(_line(shown.remainder.label, number, _note(shown.remainder.holds)))
    return table("".join(lines))


def _entries(data: EntryData) -> str:
    """One line for each entry: its logit, and the strongest row each way."""
    lines, n = entry_lines(data, _ENTRIES)
    digits = digits_of(lines)
    body = []
    for line in lines:
        ends = [
            "" if end is None else f"{arrow} {end[0]} {end[1]:+.{digits}f}"
            for arrow, end in (("↑", line.up), ("↓", line.down))
        ]
        body.append(cells((line.name, "left"), (f"{line.logit:+.{digits}f}", "right"), *(
            (end, "left") for end in ends
        )))  # fmt: skip
    if n > len(lines):
        body.append(_line("…", "", _note(f"{n - len(lines)} more entries: records() has all")))
    return table("".join(body))


def table(body: str) -> str:
    """Lines of a table, in the style of all."""
    style = "border:none;border-collapse:collapse;background:transparent;margin:.4em 0"
    return f'<table style="{style}">{body}</table>'


def cells(*texts: tuple[str, str]) -> str:
    """A line of monospaced cells, each with where its text stands; escaped."""
    return _row("".join(_cell(escape(text), side, "font-family:monospace") for text, side in texts))


def _line(label: str, number: str, last_cell: str) -> str:
    mono = "font-family:monospace"
    return _row(
        _cell(escape(label), "left", mono)
        + _cell(escape(number), "right", mono)
        + _cell(last_cell, "left")
    )


def _row(inside: str) -> str:
    return f'<tr style="background:transparent">{inside}</tr>'


def _cell(inside: str, side: str, more: str = "") -> str:
    style = "padding:1px 10px 1px 0;border:none;background:transparent;white-space:nowrap"
    return f'<td style="{style};{more}{";" if more else ""}text-align:{side}">{inside}</td>'


def _note(text: str) -> str:
    return f'<span style="opacity:.7">{escape(text)}</span>'


def _bar(value: float, largest: float) -> str:
    """A bar from a zero line in the middle, which is its own edge."""
    share = min(1.0, abs(value) / largest) if largest and value == value else 0.0
    width, down = _HALF_BAR * share, value < 0
    left = _HALF_BAR - width if down else _HALF_BAR
    return (
        f'<span style="display:inline-block;height:.8em;vertical-align:middle;'
        f"margin-left:{left:.1f}px;width:{width:.1f}px;background:{_DOWN if down else _UP};"
        f'border-{"right" if down else "left"}:1px solid currentColor"></span>'
    )
