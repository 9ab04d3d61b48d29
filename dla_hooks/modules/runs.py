"""Runs of a model that are counted, or ended early."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dla_hooks.modules.hooks import Call, Place, Run, Tap, mark


class _Ended(BaseException):
    """Ends a forward pass. It is no ``Exception``, so that nothing takes it for a mistake."""


@contextmanager
def ended_at(place: Place, run: Run) -> Iterator[None]:
    """End the forward pass in a ``with`` block, ahead of a module.

    Only ahead of one: in the middle of a module, its own cleaning up would be left out.

    Args:
        place: the module's input. Hooks that were on it before are passed first, unless the place
            is ahead of them.
        run: is told.
    """

    def end(call: Call) -> None:
        raise mine

    mine = _Ended(place.name)
    handle = Tap(place, end).put_on(threading.get_ident())
    try:
        yield
    except _Ended as reached:
        if reached is not mine:
            raise
        run.ended = True
    finally:
        handle.remove()


@contextmanager
def count_firings(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """Count how often each module runs within a ``with`` block; this thread only."""
    thread = threading.get_ident()
    fired = dict.fromkeys(modules, 0)

    def count(module: nn.Module, *_: Any) -> None:
        if threading.get_ident() == thread:
            fired[module] += 1

    mark(count)
    handles = []
    try:
        for module in fired:
            handles.append(module.register_forward_hook(count))
        with torch.no_grad():
            yield fired
    finally:
        for handle in handles:
            handle.remove()
