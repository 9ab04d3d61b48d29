"""A function that hands over its findings one at a time, in a thread of its own.

The two threads take turns: the function goes on only while the next finding is waited for. So
whoever takes them may use the same model in between.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


class _Closed(BaseException):
    """Nobody waits for more."""


def in_turns(
    work: Callable[[Callable[[_T], None]], None], settings: ThreadSettings
) -> Generator[_T, None, None]:
    """Yield what a function hands over.

    Args:
        work: called in a thread, with a function that takes one finding.
        settings: to call it with.

    Raises:
        BaseException: whatever the function raises.
    """
    turn, answers = threading.Semaphore(0), SimpleQueue[tuple[str, Any]]()
    closed = threading.Event()

    def wait() -> None:
        turn.acquire()
        if closed.is_set():
            raise _Closed

    def hand_over(found: _T) -> None:
        answers.put(("found", found))
        wait()

    def run() -> None:
        try:
            wait()
            with settings.as_there():
                work(hand_over)
            answers.put(("over", None))
        except _Closed:
            pass
        except BaseException as error:
            answers.put(("failed", error))

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(run,), daemon=True)
    thread.start()
    try:
        while True:
            turn.release()
            kind, value = answers.get()
            if kind == "over":
                return
            if kind == "failed":
                raise value
            yield value
    finally:
        closed.set()
        turn.release()
        thread.join()


class ThreadSettings:
    """Settings of torch's that each thread has for itself, as they are here and now."""

    def __init__(self) -> None:
        kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in kinds
            if torch.is_autocast_enabled(kind)
        ]
        self._inference = torch.is_inference_mode_enabled()
        self._cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    @contextmanager
    def as_there(self) -> Iterator[None]:
        """Have the same settings in another thread, within a ``with`` block."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            if self._cuda is not None:
                stack.enter_context(torch.cuda.device(self._cuda))
            yield
