"""Bars over what takes long: the pieces of a long prompt, prompts, parts, new tokens.

A verb's ``progress`` is True (a bar wherever there are several steps), False (none), or None: a bar
in a terminal or a notebook, once the steps have taken half a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import NoneType
from typing import Any, NamedTuple, ParamSpec, TypeVar

from dla_hooks.errors import InputError

_P = ParamSpec("_P")
_T = TypeVar("_T")
_SOON = 0.5
"""Seconds before a bar is shown that nobody asked for."""


def _nothing() -> None:
    pass


class _Wanted(NamedTuple):
    progress: bool | None
    before: Callable[[], None]


_UNSAID = _Wanted(None, _nothing)
_wanted: ContextVar[_Wanted] = ContextVar("bars", default=_UNSAID)


@contextmanager
def shown(progress: bool | None, before: Callable[[], None] = _nothing) -> Iterator[None]:
    """Show bars or none, in all that is called here and does not say so itself.

    Args:
        progress: whether to; None is as it was.
        before: called before the first of a bar, as to take away what stands in its place.

    Raises:
        InputError: for anything else.
    """
    check_progress(progress)
    if progress is None:
        yield
        return
    token = _wanted.set(_Wanted(progress, before))
    try:
        yield
    finally:
        _wanted.reset(token)


def check_progress(progress: Any) -> None:
    """Refuse what is no ``progress``.

    Raises:
        InputError: it says what is taken.
    """
    if not isinstance(progress, (bool, NoneType)):
        raise InputError(f"progress must be True, False or None, got {progress!r:.80}")


def with_progress(verb: Callable[_P, _T]) -> Callable[_P, _T]:
    """A verb whose argument ``progress`` holds for all bars of what it calls."""

    @wraps(verb)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        progress: Any = kwargs.get("progress")
        if progress is None:
            return verb(*args, **kwargs)
        with shown(progress):
            return verb(*args, **kwargs)

    return called


def bar(
    total: int | None,
    unit: str,
    *,
    progress: bool | None = None,
    leave: bool = True,
    pieces: Iterable[Any] | None = None,
) -> Any:
    """A bar of tqdm's, for a terminal or a notebook.

    Args:
        total: how many steps, where that is known.
        unit: what a step is called.
        progress: of the verb; None is what :func:`shown` says.
        leave: whether the bar stays when it is full.
        pieces: the steps, to iterate over.
    """
    from tqdm.auto import tqdm

    around = _wanted.get()
    if progress is None:
        progress = around.progress
    if progress:
        around.before()
    return tqdm(
        pieces,
        total=total,
        unit=unit,
        leave=leave,
        delay=0 if progress else _SOON,
        disable=None if progress is None else not progress,  # None: only at a terminal
    )


@contextmanager
def steps(total: int, unit: str) -> Iterator[Callable[[], Any]]:
    """A bar over several runs, instead of those over the pieces of each; one run keeps its own."""
    if total < 2:
        yield _nothing
        return
    with bar(total, unit, leave=False) as over, shown(False):
        yield over.update


def over_pieces(pieces: Iterable[_T], count: int) -> Iterable[_T]:
    """The pieces of a prompt, with a bar over them where there are several."""
    if count < 2 or _wanted.get().progress is False:
        return pieces
    found: Iterable[_T] = bar(count, "chunk", leave=False, pieces=pieces)
    return found
