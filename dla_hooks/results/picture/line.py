"""Values in their order from left to right, as dots on a line."""

from __future__ import annotations

import math
from collections.abc import Sequence

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

_HEIGHT = 260.0
_SIZE, _LABEL = 11.0, 150.0


def line(
    labels: Sequence[str],
    values: Sequence[float],
    *,
    errors: Sequence[float] | None = None,
    y_title: str = "",
    title: str = "",
    subtitle: Sequence[str] = (),
    width: float | None = None,
    height: float | None = None,
) -> Picture:
    """A dot for each value, from left to right, joined by a line.

    Args:
        labels: of the values, written upwards below them.
        values: one for each; one that is not finite leaves a hole in the line.
        errors: half the length of an error bar at each value, or None; NaN draws none.
        y_title: what the values are.
        title: the heading.
        subtitle: lines below it.
        width: of the picture in pixels; by default so that each label has room.
        height: of the field in pixels, the labels below it apart; 260 by default.
    """
    n, tall = len(values), float(height or _HEIGHT)
    spreads = list(errors) if errors is not None else [math.nan] * n
    digits = digits_of(values)
    reach = [0.0, *values]
    for sign in (-1, 1):
        reach += [value + sign * spread for value, spread in zip(values, spreads, strict=True)]
    known = [each for each in reach if math.isfinite(each)]
    low, high = min(known), max(known)
    span = (high - low) or 1.0

    marks = ticks(low, high)
    names = [number(each, 6).rstrip("0").rstrip(".") if each else "0" for each in marks]
    left = PAD + max(width_of(each, _SIZE) for each in names) + 10 + (16 if y_title else 0)
    wide = float(width or max(480.0, left + PAD + n * max(14.0, min(40.0, 700 / max(1, n)))))
    step = (wide - left - PAD) / max(1, n)
    y_of = {"top": 14.0, "bottom": 14.0 + tall}

    def y(value: float) -> float:
        return y_of["bottom"] - (value - low) / span * tall

    canvas = Canvas()
    for tick, name in zip(marks, names, strict=True):
        canvas.line(left, y(tick), wide - PAD, y(tick), stroke_opacity=0.12)
        canvas.text(left - 8, y(tick) + 4, name, text_anchor="end", opacity=0.72)
    canvas.line(left, y(0.0), wide - PAD, y(0.0), stroke_opacity=0.6)
    if y_title:
        middle = 14 + tall / 2
        turned = f"rotate(-90 {PAD + 6} {middle:g})"
        canvas.text(PAD + 6, middle, y_title, text_anchor="middle", transform=turned, opacity=0.72)
    points = [(left + step * (i + 0.5), value) for i, value in enumerate(values)]
    run: list[tuple[float, float]] = []
    for x, value in [*points, (0.0, math.nan)]:
        if math.isfinite(value):
            run.append((x, y(value)))
            continue
        if len(run) > 1:
            canvas.polyline(run, stroke_opacity=0.45, stroke_width=1.5)
        run = []
    every = max(1, math.ceil(_SIZE / step))  # labels that have room
    for i, (x, value) in enumerate(points):
        if math.isfinite(value):
            if math.isfinite(spreads[i]):
                canvas.line(x, y(value - spreads[i]), x, y(value + spreads[i]), stroke_width=1.2)
            colour = DOWN if value < 0 else UP
            text = f"{labels[i]}: {number(value, digits)}"
            canvas.circle(x, y(value), 4.0, text, fill=colour, **mark(labels[i], value))
        if (n - 1 - i) % every == 0:  # the last one is the whole
            name = shortened(labels[i], _SIZE, _LABEL)
            foot = y_of["bottom"] + 10
            turned = f"rotate(-90 {x + 4:.2f} {foot:g})"
            canvas.text(x + 4, foot, name, text_anchor="end", transform=turned)
    below = min(_LABEL, max((width_of(each, _SIZE) for each in labels), default=0))
    said = list(zip(labels, values, strict=True))
    whole = y_of["bottom"] + 10 + below + PAD
    return Picture(canvas, width=wide, height=whole, title=title, subtitle=subtitle, values=said)
