"""A picture: what a notebook shows, and what is written to a file. It needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dla_hooks.errors import InputError
from dla_hooks.results.files import checked, write_text
from dla_hooks.results.picture import render
from dla_hooks.results.picture.svg import MONO, SANS, Canvas, clean, number, wrapped

PAD = 16.0
"""Empty pixels at each edge."""

_TITLE, _SUBTITLE = 15, 12
_INK, _PAPER = "#1f2328", "#ffffff"
_DARK = "svg{color:#e6edf3}.dla-paper{fill:#0d1117}"
_SUFFIXES = (".html", ".svg", *render.SUFFIXES)


class Picture:
    """A picture of numbers, drawn as SVG. A notebook shows it, with or without a network.

    It stands on a light and on a dark page. A pointer over a mark shows its number; each mark also
    has the attributes ``data-label`` and ``data-value``.

    Example:
        >>> import dla_hooks
        >>> result = dla_hooks.direct_logit_attribution(
        ...     model, "The keys near the cabinet", " are", " is", tokenizer=tokenizer
        ... )
        >>> picture = result.plot()
        >>> picture
        <Picture "Components: ' are' - ' is'", 640 x 369; .save(path) writes html, svg, png or pdf>
        >>> picture.save("components.svg").name
        'components.svg'

    Attributes:
        title: the heading.
        width: in pixels.
        height: in pixels.
        values: the numbers that are drawn, each with its label, in the order of the drawing.
    """

    __module__ = "dla_hooks"

    def __init__(
        self,
        body: Canvas,
        *,
        width: float,
        height: float,
        title: str = "",
        subtitle: Sequence[str] = (),
        values: Sequence[tuple[str, float]] = (),
    ) -> None:
        """Put a heading over what was drawn.

        Args:
            body: what was drawn.
            width: of the picture, in pixels.
            height: of the body, in pixels; the heading comes on top.
            title: the heading.
            subtitle: lines below it.
            values: the numbers that are drawn, each with its label.
        """
        head, top = heading(title, subtitle, width)
        self.title, self.width, self.height = title, width, top + height
        self.values = list(values)
        self._inside = f'{head}<g transform="translate(0 {top:g})">{body}</g>'

    def to_svg(self) -> str:
        """The picture as the text of an SVG file, which adapts to light and dark."""
        return self._svg(f"<style>@media(prefers-color-scheme:dark){{{_DARK}}}</style>")

    def to_html(self) -> str:
        """The picture as the text of one page, with its numbers as a table below."""
        lines = "".join(
            f"<tr><td>{escape(clean(label))}<td>{escape(number(value, 6))}"
            for label, value in self.values
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="color-scheme" content="light dark">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "style-src 'unsafe-inline'\">"
            '<meta name="viewport" content="width=device-width">'
            f"<title>{escape(clean(self.title))}</title>"
            f"<style>body{{margin:1rem;font:13px {SANS}}}td{{font-family:{MONO};padding:0 1em 0 0}}"
            "td+td{text-align:right}</style></head><body>"
            f"{self._repr_html_()}<details><summary>numbers</summary><table>{lines}</table>"
            "</details></body></html>\n"
        )

    def save(self, path: str | Path) -> Path:
        """Write the picture to one file that needs nothing else, not even a network.

        Args:
            path: ends in ``.html`` or ``.svg``, which need no other package, or in ``.png`` (twice
                the size) or ``.pdf``, which vl-convert, CairoSVG or rsvg-convert draws.

        Returns:
            The path.

        Raises:
            InputError: for any other suffix, or when the file cannot be written.
            MissingExtraError: when nothing is installed that draws png or pdf.
        """
        place = checked(path)
        check_path(place)
        suffix = place.suffix.lower()
        if suffix == ".html":
            return write_text(place, self.to_html())
        if suffix == ".svg":
            return write_text(place, self.to_svg())
        data = render.rendered(self._svg(""), suffix)
        try:
            place.write_bytes(data)
        except OSError as error:
            raise InputError(f"cannot write {place}: {error.strerror or error}") from None
        return place

    def _svg(self, style: str) -> str:
        paper = f'<rect class="dla-paper" width="100%" height="100%" fill="{_PAPER}"/>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" color="{_INK}" {self._frame()}>'
            f"{style}{paper}{self._inside}</svg>\n"
        )

    def _frame(self) -> str:
        size = f"{self.width:g} {self.height:g}"
        return (
            f'viewBox="0 0 {size}" width="{self.width:g}" height="{self.height:g}" role="img" '
            f'aria-label="{escape(clean(self.title))}" fill="currentColor" font-size="11" '
            f'font-family="{MONO}"'
        )

    def _repr_html_(self) -> str:
        """The picture within a page: in the colours of its text, on its ground."""
        style = "max-width:100%;height:auto;display:block"
        return (
            f'<div style="overflow-x:auto"><svg style="{style}" {self._frame()}>'
            f"{self._inside}</svg></div>"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {
            "text/html": self._repr_html_(),
            "image/svg+xml": self.to_svg(),
            "text/plain": repr(self),
        }

    def __repr__(self) -> str:
        size = f"{self.width:.0f} x {self.height:.0f}"
        title = clean(self.title)
        return f'<Picture "{title}", {size}; .save(path) writes html, svg, png or pdf>'

    def __getattr__(self, name: str) -> Any:
        why = f"a Picture has no attribute {name!r}"
        if not name.startswith("_"):
            why += "; result.to_altair() gives an Altair chart, whose methods change it"
        raise AttributeError(why, name=name, obj=self)


def heading(title: str, subtitle: Sequence[str], width: float) -> tuple[Canvas, float]:
    """A title and lines below it, wrapped to a width: their shapes, and how high they are."""
    drawn, y = Canvas(), PAD if title or subtitle else 0.0
    lines: list[tuple[str, int, dict[str, object]]] = []
    if title:
        lines.append((title, _TITLE, {"font_weight": 600}))
    lines += [(line, _SUBTITLE, {"opacity": 0.72}) for line in subtitle]
    for text, size, style in lines:
        # Text without serifs is narrower than the monospaced that is measured, bold is not.
        for line in wrapped(
            clean(text), (1.04 if size == _TITLE else 0.94) * size, width - 2 * PAD
        ):
            y += 1.4 * size
            drawn.text(PAD, y - 0.35 * size, line, font_size=size, font_family=SANS, **style)
    return drawn, round(y + 6, 1)


def check_path(path: str | Path) -> None:
    """Refuse, before any work, what :meth:`Picture.save` could not write.

    Raises:
        InputError: for a suffix that is none of the four.
        MissingExtraError: when nothing is installed that draws png or pdf.
    """
    suffix = checked(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(
            f"a picture is written as {', '.join(_SUFFIXES)}, by the file's suffix; got "
            f"{str(path)!r}"
        )
    if suffix in render.SUFFIXES:
        render.check()
