"""What is shown while a model runs, where stderr is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dla_hooks.cli.terminal import progress


@contextmanager
def running(what: str = "running the model") -> Iterator[None]:
    """A spinner, and a bar over the pieces of a long prompt in its place."""
    from dla_hooks.sources.bars import chunk_bars

    spinner = progress(what)
    with spinner, chunk_bars(sys.stderr.isatty(), before=spinner.stop):
        yield
