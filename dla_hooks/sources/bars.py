"""A bar over the pieces that a long prompt is run in, where the caller wants to see one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm.auto import tqdm

_T = TypeVar("_T")

_before: ContextVar[Callable[[], None] | None] = ContextVar("chunk_bars", default=None)


def _nothing() -> None:
    pass


@contextmanager
def chunk_bars(wanted: bool = True, before: Callable[[], None] = _nothing) -> Iterator[None]:
    """Show a bar whenever a prompt is run in several pieces.

    Args:
        wanted: whether to.
        before: called before the first of a bar, as to take away what stands in its place.
    """
    token = _before.set(before if wanted else None)
    try:
        yield
    finally:
        _before.reset(token)


def with_bar(pieces: Iterable[_T], count: int) -> Iterable[_T]:
    """The pieces, with a bar over them where one is wanted and there are several."""
    before = _before.get()
    if before is None or count < 2:
        return pieces
    before()
    bar: Iterable[_T] = tqdm(pieces, total=count, unit="chunk", leave=False)
    return bar
