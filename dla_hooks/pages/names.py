"""The names of files for pages, without torch: refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from dla_hooks.errors import InputError


def check_page(path: Path) -> Path:
    """Refuse a file whose suffix is of another kind than a page is.

    Raises:
        InputError: for what ends otherwise than in html, and has a suffix.
    """
    if path.suffix.lower() not in ("", ".html", ".htm"):
        raise InputError(f"a page is written as .html; got {str(path)!r}")
    return path
