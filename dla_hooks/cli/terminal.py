"""Where commands print: results to stdout, everything else to stderr."""

from __future__ import annotations

import codecs
import warnings
from typing import Any

from rich.console import Console
from rich.text import Text

from dla_hooks.cli.words import as_typed
from dla_hooks.errors import DLAWarning


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


def complain(error: Exception | str) -> None:
    """An expected failure, as one line."""
    message = Text.assemble(("error:", "bold red"), f" {as_typed(str(error))}")
    err().print(message, soft_wrap=True)


def say_warnings() -> None:
    """In a process of ours: give each of the library's warnings as one line."""
    before = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, DLAWarning):
            before(message, category, *where, **more)
            return
        text = Text.assemble(("warning:", "bold yellow"), f" {as_typed(str(message))}")
        err().print(text, soft_wrap=True)

    warnings.showwarning = show


_SPELLED = {"…": "...", "·": "*", "│": "|", "↑": "+", "↓": "-", "→": "->", "×": "x", "−": "-"}
_SPELLED |= dict.fromkeys("█▌▐▏▎▍▋▊▉", "#")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(_SPELLED.get(letter, "?") for letter in text), error.end


def spell_out(*streams: Any) -> None:
    """In a process of ours: spell what a terminal's encoding lacks with what it has."""
    codecs.register_error("dla_hooks.spelled", _spelled)
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="dla_hooks.spelled")
