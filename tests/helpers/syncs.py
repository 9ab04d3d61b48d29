"""What makes a device wait for the host, counted while hooks run; no such device is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dla_hooks.modules.hooks import Tap

# Operators that read numbers of a tensor on the host, or size a tensor by them.
_OPERATORS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim")
_METHODS = ("tolist", "cpu", "numpy", "__array__")
_OURS = "dla_hooks"


class _Mode(TorchDispatchMode):
    def __init__(self, seen: set[tuple[str, str, str]]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if name in _OPERATORS or masks:
            self._seen.add((*_place(), name))
        return op(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[set[tuple[str, str, str]]]:
    """Where hooks wait within the block: (module, function, what for) of each place."""
    seen: set[tuple[str, str, str]] = set()
    within, count = [0], Tap.count
    methods = {name: getattr(torch.Tensor, name) for name in _METHODS}

    def of_hook(tap: Tap, call: Any) -> None:
        within[0] += 1
        try:
            with _Mode(seen):
                count(tap, call)
        finally:
            within[0] -= 1

    def noted(name: str) -> Any:
        def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if within[0]:
                seen.add((*_place(), name))
            return methods[name](tensor, *args, **kwargs)

        return method

    Tap.count = of_hook  # type: ignore[method-assign]
    for name in methods:
        setattr(torch.Tensor, name, noted(name))
    try:
        yield seen
    finally:
        Tap.count = count  # type: ignore[method-assign]
        for name, method in methods.items():
            setattr(torch.Tensor, name, method)


def _place() -> tuple[str, str]:
    """The innermost function of ours that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if _OURS in path.parts and "tests" not in path.parts:
            last = len(path.parts) - 1 - path.parts[::-1].index(_OURS)
            parts = path.parts[last + 1 :]
            return "/".join(parts), frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return "?", "?"
