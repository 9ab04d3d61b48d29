"""A result as html: what a notebook shows."""

from __future__ import annotations

from html import escape

from dla_hooks.results.data import EntryData
from dla_hooks.results.ranking import strongest
from dla_hooks.results.wording import closing, headline, nothing_in, printable, said_by_model

_HTML_ROWS = 24


# Of middling lightness, so that they stand out on a light page and on a dark one.
_UP, _DOWN = "#4393c3", "#d6604d"


def as_html(data: EntryData) -> str:
    """A result as one self-contained, escaped piece of html with inline styles."""
    nothing = nothing_in(data)
    if nothing:
        return printable(f"<div>{escape(data.words.sentence)}</div><div>{nothing}</div>")
    shown = strongest(data, _HTML_ROWS)
    digits = shown.decimals
    cells = [
        _line(label, f"{value:+.{digits}f}", _bar(value, shown.largest))
        for label, value in shown.rows
    ]
    if shown.left_out:
        cells.insert(shown.gap_at, _line("…", "", _note(shown.left_out)))
    if shown.remainder is not None:
        number = f"{shown.remainder.value:+.{digits}f}"
        cells.append(_line(shown.remainder.label, number, _note(shown.remainder.holds)))
    body = "".join(cells)
    end = "".join(f"<div>{escape(line)}</div>" for line in [*closing(data), *said_by_model(data)])
    return printable(
        '<div style="line-height:1.45;max-width:60em">'
        f'<div style="font-weight:600">{escape(headline(data))}</div>'
        f'<div style="opacity:.7">{escape(data.words.sentence)}</div>'
        '<table style="border:none;border-collapse:collapse;background:transparent;'
        f'margin:.4em 0">{body}</table>'
        f'<div style="opacity:.85">{end}</div></div>'
    )


def _line(label: str, number: str, last_cell: str) -> str:
    cell = "padding:1px 10px 1px 0;border:none;background:transparent;white-space:nowrap"
    mono = "font-family:monospace"
    return (
        '<tr style="background:transparent">'
        f'<td style="{cell};{mono};text-align:left">{escape(label)}</td>'
        f'<td style="{cell};{mono};text-align:right">{escape(number)}</td>'
        f'<td style="{cell};text-align:left">{last_cell}</td></tr>'
    )


def _note(text: str) -> str:
    return f'<span style="opacity:.7">{escape(text)}</span>'


def _bar(value: float, largest: float) -> str:
    """Both halves of a bar whose zero is in the middle."""
    share = 100 * min(1.0, abs(value) / largest) if largest and value == value else 0.0
    half = "display:inline-block;width:110px;height:.8em;vertical-align:middle"
    sides = []
    for colour, own, side, zero in (
        (_DOWN, value < 0, "right", "border-right:1px solid currentColor"),
        (_UP, value > 0, "left", ""),
    ):
        fill = f'<span style="display:block;float:{side};height:100%;width:{share:.1f}%;'
        fill += f'background:{colour}"></span>'
        sides.append(f'<span style="{half};{zero}">{fill if own else ""}</span>')
    return "".join(sides)
