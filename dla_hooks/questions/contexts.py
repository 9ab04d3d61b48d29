"""The context that the second of two runs is made in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from dla_hooks.errors import ArgumentTypeError
from dla_hooks.modules.version import forget
from dla_hooks.residual.stream import Stream

Context = Callable[[], AbstractContextManager[Any]]


@contextmanager
def entered(context: Context | None, forgotten: Sequence[Stream]) -> Iterator[None]:
    """Be in the context of the second run, made anew.

    Args:
        context: the caller's function, or None.
        forgotten: models of which nothing is remembered across either end of it.

    Raises:
        ArgumentTypeError: when the caller's function returns no context manager.
    """
    if context is None:
        yield
        return
    failed: BaseException | None = None
    try:
        with _context_of(context):
            for stream in forgotten:
                forget(stream.backend.model)
            try:
                yield
            except BaseException as error:
                failed = error
                raise
        if failed is not None:  # the context has swallowed it
            raise failed
    finally:
        for stream in forgotten:
            forget(stream.backend.model)


def _context_of(context: Context) -> AbstractContextManager[Any]:
    made = context()
    if not (hasattr(made, "__enter__") and hasattr(made, "__exit__")):
        raise ArgumentTypeError(
            "other_context must be a function that returns a context manager, such as "
            f"model.disable_adapter; it returned {type(made).__name__}: {made!r:.80}"
        )
    return made
