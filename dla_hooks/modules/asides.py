"""Calls of a module that are no part of the model's run, though they may fall into one.

Directions of many targets are folded while the model runs, and a module without a plain weight is
called for that. A tap on a module inside of it must not take that call for the model's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Here(threading.local):
    depth = 0


_here = _Here()


def in_aside() -> bool:
    """Whether this thread is in such a call."""
    return _here.depth > 0


@contextmanager
def aside() -> Iterator[None]:
    """Let no tap see what this thread calls within a ``with`` block."""
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1
