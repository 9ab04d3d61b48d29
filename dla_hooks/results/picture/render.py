"""SVG as png and pdf, by whatever is installed that draws it."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec

from dla_hooks.errors import InputError, MissingExtraError

SUFFIXES = (".png", ".pdf")
_SCALE = 2
_DPI = 96  # of the pixels that SVG counts in


def check() -> None:
    """Refuse where nothing is installed that draws.

    Raises:
        MissingExtraError: it names the packages.
    """
    _drawer()


def rendered(svg: str, suffix: str) -> bytes:
    """A picture as the content of a file.

    Args:
        svg: the picture.
        suffix: ``.png``, drawn at twice the size, or ``.pdf``.

    Raises:
        MissingExtraError: when nothing is installed that draws.
        InputError: when it fails.
    """
    png, drawer = suffix == ".png", _drawer()
    if drawer == "vl_convert":
        import vl_convert

        found = vl_convert.svg_to_png(svg, scale=_SCALE) if png else vl_convert.svg_to_pdf(svg)
        return bytes(found)
    if drawer == "cairosvg":
        import cairosvg

        draw = cairosvg.svg2png if png else cairosvg.svg2pdf
        return bytes(draw(bytestring=svg.encode(), scale=_SCALE if png else 1, dpi=_DPI))
    command = [drawer, f"--format={suffix[1:]}", f"--zoom={_SCALE if png else 1}"]
    done = subprocess.run(command, input=svg.encode(), capture_output=True, check=False)
    if done.returncode:
        why = done.stderr.decode(errors="replace").strip()
        raise InputError(f"{drawer} cannot draw the picture: {why:.300}")
    return done.stdout


def _drawer() -> str:
    """The module or the program that draws."""
    for module in ("vl_convert", "cairosvg"):
        if find_spec(module) is not None:
            return module
    program = shutil.which("rsvg-convert")
    if program is None:
        raise MissingExtraError("a picture as png or pdf", "plot")
    return program
