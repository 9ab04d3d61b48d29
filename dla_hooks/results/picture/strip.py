"""The tokens of a text, each in the colour of its number."""

from __future__ import annotations

from collections.abc import Sequence

from dla_hooks.results.picture.picture import PAD, Picture
from dla_hooks.results.picture.svg import (
    DOWN,
    UP,
    Canvas,
    clean,
    digits_of,
    mark,
    number,
    shortened,
    width_of,
)
from dla_hooks.results.ranking import largest

_WIDTH = 720.0
_SIZE, _SMALL = 13.0, 9.5
_BOX, _LINE = 21.0, 40.0


def strip(
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    chosen: int | None = None,
    title: str = "",
    subtitle: Sequence[str] = (),
    width: float | None = None,
) -> Picture:
    """The tokens in lines as text has them; below each its number, with its sign.

    Args:
        tokens: as text; spaces at their ends are drawn as dots.
        values: one for each; NaN leaves a token without colour and number.
        chosen: the number of a token to frame, or None.
        title: the heading.
        subtitle: lines below it.
        width: of the picture in pixels; 720 by default.
    """
    wide, canvas = float(width or _WIDTH), Canvas()
    most = largest(values)
    digits = digits_of([most]) - 1
    x, y = PAD, 8.0
    for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
        name = shortened(_visible(token), _SIZE, wide - 2 * PAD - 8)
        known = value == value
        text = number(value, digits) if known else ""
        room = max(width_of(name, _SIZE) + 6, width_of(text, _SMALL) + 5)
        if x + room > wide - PAD and x > PAD:
            x, y = PAD, y + _LINE
        share = min(1.0, abs(value) / most) if known and most else 0.0
        hover = f"{place} {token!r}" + (f": {number(value, digits + 1)}" if known else "")
        frame = {"stroke": "currentColor", "stroke_width": 1.5} if place == chosen else {}
        said = mark(token, value) if known else {}
        canvas.rect(
            x, y, room - 2, _BOX, hover, rx=2, fill=DOWN if value < 0 else UP,
            fill_opacity=round(0.04 + 0.86 * share, 3) if known else 0, **frame, **said,
        )  # fmt: skip
        centre = x + (room - 2) / 2
        canvas.text(
            centre, y + 15, name, text_anchor="middle", font_size=_SIZE, pointer_events="none"
        )
        canvas.text(
            centre, y + _BOX + 10, text, text_anchor="middle", font_size=_SMALL, opacity=0.75
        )
        x += room
    pairs = [pair for pair in zip(tokens, values, strict=True) if pair[1] == pair[1]]
    return Picture(
        canvas, width=wide, height=y + _LINE + PAD / 2, title=title, subtitle=subtitle, values=pairs
    )


def _visible(token: str) -> str:
    """A token whose spaces at its ends are seen."""
    bare = clean(token).strip(" ")
    if not bare:
        return "·" * len(token) or "∅"
    start = len(token) - len(token.lstrip(" "))
    end = len(token) - len(token.rstrip(" "))
    return "·" * start + bare + "·" * end
