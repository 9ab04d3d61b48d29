"""A result as a picture, drawn with Altair (extra ``plot``). Blue pushes up, red down.

The data are put in line as plain values, so a chart needs neither pandas nor a server, and a
saved one no network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dla_hooks.errors import InputError, MissingExtraError
from dla_hooks.results.data import EntryData, real_entries
from dla_hooks.results.marks import INK, KINDS, has_square
from dla_hooks.results.ranking import decimals, drawn
from dla_hooks.results.wording import closing, place, printable, question

if TYPE_CHECKING:
    import altair

SUFFIXES = (".html", ".png", ".svg")

_FONT = "Helvetica, Arial, sans-serif"
_PROMPT_WIDTH = 64


def plot(data: EntryData) -> altair.Chart:
    """Draw a result as its unit says: a heatmap of layer by index, bars, or a line.

    Several batch rows or positions are drawn as their mean, and the title says so.

    Raises:
        MissingExtraError: when Altair is not installed.
        InputError: when the result holds no number, or its unit names no kind of chart.
    """
    if not bool(data.attribution.isfinite().any()):
        raise InputError(
            "there is nothing to draw: no position is selected, no row is there, or nothing is "
            "finite"
        )
    kind = data.words.chart
    if kind not in KINDS:
        raise InputError(
            f"the unit {data.unit!r} wants a chart of the kind {kind!r}, which is none of "
            f"{', '.join(KINDS)}"
        )
    alt = _altair()
    chart: altair.Chart = (
        KINDS[kind](alt, data)
        .properties(title=_title(alt, data))
        .configure(font=_FONT, background="white", padding=14)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=INK, titleColor=INK, titleFontWeight="normal", tickColor="#cccccc"
        )
        .configure_legend(titleFontWeight="normal", titleColor=INK, labelColor=INK)
    )
    return chart


def save_plot(chart: Any, path: str | Path) -> Path:
    """Write a chart to one file that needs nothing else, not even a network.

    Args:
        chart: from :func:`plot`.
        path: ends in ``.html``, ``.png`` or ``.svg``.

    Raises:
        InputError: for any other suffix, or when the file cannot be written.
        MissingExtraError: when vl-convert, which renders the chart, is not installed.
    """
    path = Path(path)
    check_plot_path(path)
    suffix = path.suffix.lower()
    options: dict[str, Any] = {".html": {"inline": True}, ".png": {"scale_factor": 2}}
    try:
        chart.save(str(path), format=suffix[1:], **options.get(suffix, {}))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def check_plot_path(path: Path) -> None:
    """Refuse, before any work, what :func:`save_plot` could not write.

    Raises:
        InputError: for a suffix that is none of the three.
        MissingExtraError: when what draws and renders is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"a plot is written as {', '.join(SUFFIXES)}, by the file's suffix; got {str(path)!r}"
        )
    _altair()
    try:
        import vl_convert  # noqa: F401
    except ImportError:
        raise MissingExtraError("saving a plot", "plot") from None


def _altair() -> Any:
    try:
        import altair
    except ImportError:
        raise MissingExtraError("to_altair()", "plot") from None
    return altair


def _title(alt: Any, data: EntryData) -> Any:
    title = f"{data.words.title}: {question(data)}"
    if int(real_entries(data)[0].sum()) > 1:
        title += " (mean)"
    lines = [place(data, _PROMPT_WIDTH), data.model, closing(data)[0], *_not_drawn(data)]
    return alt.TitleParams(
        printable(title),
        # With the minus sign that the axes have.
        subtitle=[re.sub(r"(?<= )-(?=\d)", "−", printable(line)) for line in lines if line],
        anchor="start",
        fontSize=15,
        fontWeight=600,
        color=INK,
        subtitleFontSize=12,
        subtitleColor="#666666",
        subtitlePadding=5,
        offset=14,
    )


def _not_drawn(data: EntryData) -> list[str]:
    """A line about the remainder, and one about rows that have no square in a heatmap."""
    all_rows = drawn(data)
    rows, remainder = all_rows.rows, all_rows.remainder
    lines = []
    digits = decimals([remainder.value if remainder else 0.0, *(value for _, value in rows)])
    others = [value for row, value in rows if not has_square(row)]
    if data.words.chart == "heatmap" and 0 < len(others) < len(rows):
        count = f"{len(others)} more row{'s' * (len(others) > 1)}"
        lines.append(f"{count} without a square, together {sum(others):+.{digits}f}")
    if remainder is not None:
        holds = f"{remainder.holds} ({remainder.label})" if remainder.holds else remainder.label
        lines.append(f"{holds}: {remainder.value:+.{digits}f}")
    return lines
