"""A field of cells: blue is positive, red negative, and the deeper the larger."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dla_hooks.results.picture.picture import PAD, Picture
from dla_hooks.results.picture.svg import (
    DOWN,
    UP,
    Canvas,
    digits_of,
    mark,
    number,
    shortened,
    width_of,
)
from dla_hooks.results.ranking import largest

_SIZE = 11.0
_LEAST, _MOST, _GRID = 480.0, 940.0, 540.0  # pixels, where no width is given
_TALLEST, _LEGEND = 130.0, 66.0
_LEAST_TEXT = 7.5
_FIRST_COLUMN = 0.42


def heatmap(
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    texts: Sequence[Sequence[str]] | None = None,
    names: Sequence[Sequence[str]] | None = None,
    plain: Sequence[tuple[str, Sequence[float]]] = (),
    row_title: str = "",
    column_title: str = "",
    square: bool = False,
    title: str = "",
    subtitle: Sequence[str] = (),
    width: float | None = None,
    height: float | None = None,
) -> Picture:
    """A cell for each value. The scale is symmetric about zero.

    Numbers stand in the cells that have room. Where they have none, a dash marks those below zero.

    Args:
        row_labels: of the lines.
        column_labels: of the columns.
        values: [row][column]; NaN leaves the cell empty.
        texts: [row][column], what stands in the cells in place of the numbers.
        names: [row][column], what cells are called when pointed at; by default row and column.
        plain: further columns with a label and a number for each row, without colour.
        row_title: what the lines are.
        column_title: what the columns are.
        square: whether cells are as high as wide.
        title: the heading.
        subtitle: lines below it.
        width: of the picture in pixels.
        height: of the cells in pixels.
    """
    every = [value for line in values for value in line]
    most = largest(every)
    digits = digits_of([most])
    rows, columns = len(row_labels), len(column_labels)
    shown = texts or [[number(v, digits) if v == v else "" for v in line] for line in values]

    whole = float(width or 0.0)
    label = max((width_of(each, _SIZE) for each in row_labels), default=0) + 8
    label = min(label, _FIRST_COLUMN * (whole or _MOST))
    left = PAD + label + (16 if row_title else 0)
    digits_beside = digits_of([v for _, line in plain for v in line])
    beside = [
        max(width_of(text, _SIZE) for text in (name, *(number(v, digits_beside) for v in line)))
        + 14
        for name, line in plain
    ]
    spare = (whole or _MOST) - left - sum(beside) - _LEGEND - PAD
    longest = max((width_of(text, 1.0) for line in shown for text in line), default=0)
    wanted = 42.0 if square else longest * _SIZE + 8
    if whole:
        across = max(3.0, spare / max(1, columns))
    elif texts:
        across = wanted  # words are to be read, however wide that is
    else:
        across = max(9.0, min(wanted, spare / max(1, columns)))
    if square:
        across = min(across, max(9.0, _GRID / max(rows, columns, 1)))
    down = across if square else 22.0 if rows <= 60 else 17.0
    if height is not None:
        down = max(3.0, height / max(1, rows))
    size = min(_SIZE, (across - 4) / max(longest, 0.1), down - 3)
    field = _Field(left, across, down, most, size if size >= _LEAST_TEXT else 0.0)

    canvas = Canvas()
    top = _column_heads(
        canvas, field, column_labels, [name for name, _ in plain], column_title, beside
    )
    for i, name in enumerate(row_labels):
        y = top + down * i
        if down >= 11 or i % math.ceil(11 / down) == 0:
            text = shortened(name, min(_SIZE, max(7, down - 1)), label - 8)
            base = y + down / 2 + 4
            canvas.text(
                left - 8, base, text, text_anchor="end", font_size=min(_SIZE, max(7, down - 1))
            )
        for j, value in enumerate(values[i]):
            called = names[i][j] if names else f"{name} · {column_labels[j]}"
            field.cell(canvas, j, y, value, shown[i][j], called, digits)
        x = left + across * columns
        for (_, line), room in zip(plain, beside, strict=True):
            x += room
            text = number(line[i], digits_beside) if line[i] == line[i] else ""
            canvas.text(x, y + down / 2 + 4, text, text_anchor="end", opacity=0.85)
    if row_title:
        middle = top + down * rows / 2
        turned = f"rotate(-90 {PAD + 6:g} {middle:g})"
        canvas.text(
            PAD + 6, middle, row_title, text_anchor="middle", transform=turned, opacity=0.72
        )
    end = left + across * columns + sum(beside)
    tall = max(60.0, min(_TALLEST, down * rows))
    _legend(canvas, end + 14, top, tall, most)
    wide = whole or max(end + _LEGEND + PAD, _LEAST)
    said = [
        (names[i][j] if names else f"{row_labels[i]} · {column_labels[j]}", value)
        for i, line in enumerate(values)
        for j, value in enumerate(line)
    ]
    bottom = top + max(down * rows, tall + 8) + PAD
    return Picture(canvas, width=wide, height=bottom, title=title, subtitle=subtitle, values=said)


@dataclass(frozen=True)
class _Field:
    """Where cells stand, and what colour they have."""

    left: float
    across: float
    down: float
    most: float
    size: float  # of text, 0 for none

    def cell(
        self,
        canvas: Canvas,
        column: int,
        y: float,
        value: float,
        text: str,
        called: str,
        digits: int,
    ) -> None:
        if value != value:
            return
        gap = 1.0 if min(self.across, self.down) > 8 else 0.4
        x = self.left + self.across * column
        share = min(1.0, abs(value) / self.most) if self.most else 0.0
        canvas.rect(
            x, y, self.across - gap, self.down - gap, f"{called}: {_said(text, value, digits)}",
            fill=DOWN if value < 0 else UP, fill_opacity=round(0.04 + 0.9 * share, 3),
            **mark(called, value),
        )  # fmt: skip
        middle, centre = y + self.down / 2, x + (self.across - gap) / 2
        if self.size:
            canvas.text(
                centre, middle + 0.36 * self.size, text, text_anchor="middle",
                font_size=self.size, pointer_events="none",
            )  # fmt: skip
        elif value < 0 and share > 0.15:  # told apart without colour, too
            half = 0.22 * min(self.across, self.down)
            canvas.line(centre - half, middle, centre + half, middle, pointer_events="none")


def _said(text: str, value: float, digits: int) -> str:
    own = number(value, digits + 1)
    return own if not text or text == number(value, digits) else f"{text} {own}"


def _column_heads(
    canvas: Canvas,
    field: _Field,
    labels: Sequence[str],
    plain: Sequence[str],
    column_title: str,
    beside: Sequence[float],
) -> float:
    """Write what stands over the columns; returns where the cells begin."""
    y = 16.0 if column_title else 2.0
    if column_title:
        middle = field.left + field.across * len(labels) / 2
        canvas.text(middle, 10, column_title, text_anchor="middle", opacity=0.72)
    widest = max((width_of(each, _SIZE) for each in labels), default=0)
    flat = widest <= field.across - 3 or max(map(len, labels), default=0) <= 3
    high = 14.0 if flat else min(widest, 190.0) + 8
    step = max(1, math.ceil((widest + 4 if flat else 11.0) / field.across))
    if step in (3, 5, 6, 7):
        step = 4 if step == 3 else 8
    for j, name in enumerate(labels):
        if j % step:
            continue
        x = field.left + field.across * (j + 0.5)
        if flat:
            canvas.text(x, y + 8, name, text_anchor="middle")
            continue
        turned = f"rotate(-90 {x + 4:.2f} {y + high - 6:.2f})"
        canvas.text(x + 4, y + high - 6, shortened(name, _SIZE, 190.0), transform=turned)
    x = field.left + field.across * len(labels)
    for name, room in zip(plain, beside, strict=True):
        x += room
        canvas.text(x, y + high - 6, name, text_anchor="end", opacity=0.72)
    return y + high


def _legend(canvas: Canvas, x: float, top: float, tall: float, most: float) -> None:
    """The scale: the largest at the top, zero in the middle."""
    pieces = 24
    for i in range(pieces):
        value = 1 - (2 * i + 1) / pieces
        canvas.rect(
            x, top + tall * i / pieces, 10.0, tall / pieces + 0.3,
            fill=UP if value > 0 else DOWN, fill_opacity=round(0.04 + 0.9 * abs(value), 3),
        )  # fmt: skip
    for share in (1, 0, -1):
        y = top + tall * (1 - share) / 2
        text = number(share * most, digits_of([most]) - 1) if share and most else "0"
        if most or not share:
            canvas.text(x + 14, y + (8 if share > 0 else 4 if not share else 0), text, opacity=0.72)
