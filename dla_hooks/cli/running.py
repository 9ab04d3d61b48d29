"""What is shown while a model runs, where stderr is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dla_hooks.bars import shown
from dla_hooks.cli.terminal import progress


@contextmanager
def running(what: str = "running the model") -> Iterator[None]:
    """A spinner, and a bar over what takes several steps in its place."""
    spinner = progress(what)
    with spinner, shown(sys.stderr.isatty(), before=spinner.stop):
        yield
