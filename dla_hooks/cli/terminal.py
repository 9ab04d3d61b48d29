"""Where commands print: results to stdout, everything else to stderr."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from dla_hooks.cli.words import as_typed


def out() -> Console:
    """The standard output; coloured in a terminal, plain in a pipe."""
    return Console(highlight=False)


def err() -> Console:
    """The standard error."""
    return Console(stderr=True, highlight=False)


def show(text: str) -> None:
    """Print plain text as it is."""
    out().print(text, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Say something beside the result."""
    err().print(text, markup=False, soft_wrap=True)


def progress(what: str) -> Any:
    """A spinner on stderr, where that is a terminal."""
    return err().status(Text(f"{what} …"))


def complain(error: Exception) -> None:
    """An expected failure, as one line."""
    message = Text.assemble(("error:", "bold red"), f" {as_typed(str(error))}")
    err().print(message, soft_wrap=True)
