"""Models under ``torch.compile``: run as the plain code that they were compiled from.

Compiled code runs no hook that it was not compiled with, and keeps one that it was compiled with.
So a compiled model is run eagerly while it is looked at; what has been compiled stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn

from dla_hooks.errors import HookError

_lock = threading.Lock()
_inside = 0  # how many `with` blocks are open, in all threads
_stance: Any = None


def is_compiled(module: nn.Module) -> bool:
    """True if a small module, a part of it, or a function that one keeps is compiled.

    For a whole model see :func:`dla_hooks.modules.version.state_of`.
    """
    return any(has_compiled(part) or class_has_compiled(type(part)) for part in module.modules())


@contextmanager
def eagerly(needed: bool = True) -> Iterator[None]:
    """Run plain code within a ``with`` block, whatever of it is compiled.

    What torch runs compiled and what eagerly is one setting for the whole process. The first block
    sets it and the last one puts it back; in between, other threads run their compiled models
    eagerly too.

    Args:
        needed: False to leave all that alone: the model has no compiled parts.

    Raises:
        HookError: from within a compiled function, where torch does not let it be changed.
    """
    global _inside, _stance
    if not needed:
        yield
        return
    with _lock:
        if not _inside:
            try:
                _stance = torch.compiler.set_stance("force_eager")
            except RuntimeError as error:
                raise HookError(
                    "a compiled model cannot be attributed from within a compiled function, where "
                    f"its hooks would not run ({error}); call this from outside of it"
                ) from error
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _stance.__exit__(None, None, None)
                _stance = None


def has_compiled(module: nn.Module) -> bool:
    """True if a module is compiled by itself, or keeps a compiled function."""
    # A module's own entries, not its attributes: every call reads them of every module.
    kept = vars(module)
    if kept.get("_compiled_call_impl") is not None:
        return True
    for value in kept.values():  # noqa: SIM110 (a generator for every module takes longer)
        if type(value) is FunctionType and _is_compiled(value):
            return True
    return False


def class_has_compiled(kind: type) -> bool:
    """True if the forward pass of all modules of a class is compiled."""
    return _is_compiled(getattr(kind, "forward", None))


def _is_compiled(function: Any) -> bool:
    return getattr(function, "_torchdynamo_orig_callable", None) is not None
