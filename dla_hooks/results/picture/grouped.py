"""Several bars for each label, in one colour per series."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dla_hooks.results.picture.bars import ends_of, scale
from dla_hooks.results.picture.picture import PAD, Picture
from dla_hooks.results.picture.svg import (
    Canvas,
    digits_of,
    mark,
    number,
    shortened,
    ticks,
    width_of,
)

COLOURS = ("#4393c3", "#e08214", "#8c8c8c")
"""Blue, orange and grey: told apart by all eyes, and legible on a light and a dark page."""

_WIDTH, _SIZE = 640.0, 11.0
_BAR, _GAP = 11.0, 9.0
_AXIS, _LEGEND = 30.0, 24.0


def grouped(
    labels: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    *,
    title: str = "",
    subtitle: Sequence[str] = (),
    width: float | None = None,
    height: float | None = None,
) -> Picture:
    """A group of bars for each label, with a legend above.

    Args:
        labels: of the groups.
        series: at most three: a name, and a value for each label; what is not finite has no bar.
        title: the heading.
        subtitle: lines below it.
        width: of the picture in pixels; 640 by default.
        height: of what is below the heading in pixels; by default what the bars need.
    """
    wide, n = float(width or _WIDTH), len(series)
    group = n * _BAR + _GAP
    if height is not None:
        group = max(12.0, (height - _LEGEND - _AXIS - PAD) / max(1, len(labels)))
    thick = group * n * _BAR / (n * _BAR + _GAP) / n
    every = [value for _, values in series for value in values]
    digits = digits_of(every)
    texts = [[number(value, digits) for value in values] for _, values in series]
    small = min(_SIZE, thick + 1)

    room = min(max((width_of(label, _SIZE) for label in labels), default=0), 0.35 * wide)
    beside = max((width_of(text, small) for own in texts for text in own), default=0) + 8
    low, high = ends_of(every)
    left = PAD + room + 8 + (beside if low < 0 else 0)
    right = wide - PAD - (beside if high > 0 or not low < 0 else 0)
    at = scale(low, high, left, max(right, left + 40))

    canvas = Canvas()
    x = PAD
    for (name, _), colour in zip(series, COLOURS, strict=False):
        canvas.rect(x, 4, 10, 10, fill=colour)
        canvas.text(x + 15, 13, name, font_size=_SIZE)
        x += 15 + width_of(name, _SIZE) + 18
    bottom = _LEGEND + group * len(labels)
    for tick in ticks(low, high, max(1, min(6, int((right - left) / 50)))):
        canvas.line(at(tick), _LEGEND - 4, at(tick), bottom, stroke_opacity=0.12)
        text = number(tick, 6).rstrip("0").rstrip(".") if tick else "0"
        canvas.text(at(tick), bottom + 14, text, text_anchor="middle", opacity=0.72)
    said = []
    for i, label in enumerate(labels):
        top = _LEGEND + group * i
        canvas.text(
            PAD + room, top + thick * n / 2 + 0.36 * _SIZE, shortened(label, _SIZE, room),
            text_anchor="end", font_size=_SIZE,
        )  # fmt: skip
        for j, ((name, values), colour) in enumerate(zip(series, COLOURS, strict=False)):
            value, text = values[i], texts[j][i]
            said.append((f"{label} · {name}", value))
            end = at(value) if math.isfinite(value) else at(0.0)
            y = top + thick * j
            canvas.rect(
                min(at(0.0), end), y + 0.08 * thick, abs(end - at(0.0)), 0.84 * thick,
                f"{label}, {name}: {text}", fill=colour, **mark(f"{label} · {name}", value),
            )  # fmt: skip
            down = value < 0
            canvas.text(
                end - 5 if down else end + 5, y + thick / 2 + 0.36 * small, text,
                text_anchor="end" if down else "start", font_size=small,
            )  # fmt: skip
    canvas.line(at(0.0), _LEGEND - 4, at(0.0), bottom, stroke_opacity=0.6)
    return Picture(
        canvas, width=wide, height=bottom + _AXIS, title=title, subtitle=subtitle, values=said
    )
