"""A page that was written, in the user's browser."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from dla_hooks.cli.options import OUTPUT
from dla_hooks.cli.terminal import note

Open = Annotated[
    bool, typer.Option("--open", help="Open the page in your browser.", rich_help_panel=OUTPUT)
]


def show(path: Path) -> None:
    """Open a file in the browser, or say that there is none."""
    if not webbrowser.open(path.resolve().as_uri()):
        note(f"no browser was found here; open {path} in one")
