"""Bars from a zero line: to the right what is positive, to the left what is negative."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dla_hooks.results.picture.picture import PAD, Picture
from dla_hooks.results.picture.svg import (
    DOWN,
    UP,
    Canvas,
    digits_of,
    mark,
    number,
    shortened,
    ticks,
    width_of,
)

WIDTH = 640.0
_STEP, _LOW_STEP, _MANY = 20.0, 15.0, 40
_AXIS = 30.0


def bars(
    labels: Sequence[str],
    values: Sequence[float],
    *,
    errors: Sequence[float] | None = None,
    total: tuple[str, float] | None = None,
    title: str = "",
    subtitle: Sequence[str] = (),
    width: float | None = None,
    height: float | None = None,
) -> Picture:
    """A bar for each value, under each other.

    Args:
        labels: of the bars.
        values: one for each; what is not finite has no bar.
        errors: half the length of an error bar at each value, or None; NaN draws none.
        total: label and value of a last bar, in the colour of text.
        title: the heading.
        subtitle: lines below it.
        width: of the picture in pixels; 640 by default.
        height: of the bars and the axis in pixels; 20 per bar by default.
    """
    spreads = list(errors) if errors is not None else [math.nan] * len(values)
    starts = [0.0] * len(values)
    names, ends = list(labels), list(values)
    if total is not None:
        names, ends = [*names, total[0]], [*ends, total[1]]
        starts, spreads = [*starts, 0.0], [*spreads, math.nan]
    said = list(zip(names, ends, strict=True))
    return _drawn(said, starts, ends, spreads, total is not None, title, subtitle, width, height)


def waterfall(
    labels: Sequence[str],
    values: Sequence[float],
    *,
    total: str = "sum",
    title: str = "",
    subtitle: Sequence[str] = (),
    width: float | None = None,
    height: float | None = None,
) -> Picture:
    """Bars each of which begins where the one above ends; a last one is the sum of all.

    Args:
        labels: of the bars.
        values: one for each, finite.
        total: the label of the sum.
        title: the heading.
        subtitle: lines below it.
        width: of the picture in pixels; 640 by default.
        height: of the bars and the axis in pixels; 20 per bar by default.
    """
    starts, ends, running = [], [], 0.0
    for value in values:
        starts.append(running)
        running += value
        ends.append(running)
    said = [*zip(labels, values, strict=True), (total, running)]
    spreads = [math.nan] * len(said)
    starts, ends = [*starts, 0.0], [*ends, running]
    return _drawn(said, starts, ends, spreads, True, title, subtitle, width, height)


def _drawn(
    said: list[tuple[str, float]],
    starts: list[float],
    ends: list[float],
    spreads: list[float],
    has_total: bool,
    title: str,
    subtitle: Sequence[str],
    width: float | None,
    height: float | None,
) -> Picture:
    wide = float(width or WIDTH)
    step = _STEP if len(said) <= _MANY else _LOW_STEP
    if height is not None:
        step = max(8.0, (height - _AXIS - PAD) / max(1, len(said)))
    size = min(11.0, step - 3)
    canvas, bottom = Canvas(), 6 + step * len(said)
    values = [value for _, value in said]
    digits = digits_of(values)
    texts = [number(value, digits) for value in values]
    for i, spread in enumerate(spreads):
        if math.isfinite(spread):
            texts[i] += f" ± {spread:.{digits}f}"

    room = min(max((width_of(name, size) for name, _ in said), default=0), 0.42 * wide)
    beside = max((width_of(text, size) for text in texts), default=0) + 8
    low, high = _ends(starts, ends, spreads)
    left = PAD + room + 8 + (beside if any(value < 0 for value in values) else 0)
    right = wide - PAD - (beside if any(not value < 0 for value in values) else 0)
    at = scale(low, high, left, max(right, left + 40))

    for tick in ticks(low, high, max(1, min(6, int((right - left) / 50)))):
        canvas.line(at(tick), 4, at(tick), bottom + 2, stroke_opacity=0.12)
        text = number(tick, 6).rstrip("0").rstrip(".") if tick else "0"
        canvas.text(at(tick), bottom + 15, text, text_anchor="middle", opacity=0.72)
    for i, (name, value) in enumerate(said):
        is_total = has_total and i == len(said) - 1
        y = 6 + step * i
        _bar(canvas, at, (starts[i], ends[i]), y, step, (name, value, texts[i]), is_total)
        if math.isfinite(spreads[i]) and math.isfinite(ends[i]):
            _whisker(canvas, at(ends[i] - spreads[i]), at(ends[i] + spreads[i]), y + step / 2)
        base = y + step / 2 + 0.36 * size
        weight = 600 if is_total else None
        canvas.text(
            PAD + room, base, shortened(name, size, room), text_anchor="end", font_size=size,
            font_weight=weight,
        )  # fmt: skip
        far = [ends[i], starts[i], *(ends[i] + s * spreads[i] for s in (-1, 1))]
        places = [at(each) for each in far if math.isfinite(each)] or [at(0.0)]
        down = value < 0
        edge = min(places) - 5 if down else max(places) + 5
        anchor = "end" if down else "start"
        canvas.text(edge, base, texts[i], text_anchor=anchor, font_size=size, font_weight=weight)
    canvas.line(at(0.0), 4, at(0.0), bottom + 2, stroke_opacity=0.6)
    whole = bottom + _AXIS
    return Picture(canvas, width=wide, height=whole, title=title, subtitle=subtitle, values=said)


def _bar(
    canvas: Canvas,
    at: Callable[[float], float],
    span: tuple[float, float],
    y: float,
    step: float,
    said: tuple[str, float, str],
    is_total: bool,
) -> None:
    name, value, text = said
    first, last = (at(each) if math.isfinite(each) else at(0.0) for each in span)
    colour = "currentColor" if is_total else DOWN if value < 0 else UP
    more = {"fill_opacity": 0.65} if is_total else {}
    canvas.rect(
        min(first, last), y + 0.14 * step, abs(last - first), 0.72 * step, f"{name}: {text}",
        fill=colour, **mark(name, value), **more,
    )  # fmt: skip


def _whisker(canvas: Canvas, first: float, last: float, y: float) -> None:
    canvas.line(first, y, last, y, stroke_width=1.2)
    for x in (first, last):
        canvas.line(x, y - 3, x, y + 3, stroke_width=1.2)


def _ends(
    starts: Sequence[float], ends: Sequence[float], spreads: Sequence[float]
) -> tuple[float, float]:
    """The smallest and the largest number drawn; zero is among them."""
    reach = [*starts, *ends]
    for sign in (-1, 1):
        reach += [end + sign * spread for end, spread in zip(ends, spreads, strict=True)]
    return ends_of(reach)


def ends_of(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest of the values that are finite, zero among them."""
    known = [0.0, *(value for value in values if math.isfinite(value))]
    return min(known), max(known)


def scale(low: float, high: float, left: float, right: float) -> Callable[[float], float]:
    """From a number to its place between two edges, in pixels."""
    span = (high - low) or 1.0
    return lambda value: left + (value - low) / span * (right - left)
