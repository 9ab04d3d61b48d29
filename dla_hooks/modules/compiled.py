"""Models under ``torch.compile``: run as the plain code that they were compiled from.

Compiled code ignores hooks that were added after compilation. It also keeps hooks that were removed
since. So a compiled model runs eagerly while the library watches it. Its compiled code is kept.
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

COMPILED_CALL = "_compiled_call_impl"
"""Where ``module.compile()`` keeps what it has compiled."""

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
    """Run compiled models eagerly within a ``with`` block.

    Torch has one such setting for the whole process. The first block sets it, and the last one
    restores it. In between, compiled models in other threads run eagerly too.

    Args:
        needed: False where the model has no compiled parts: nothing is changed.

    Raises:
        HookError: inside a compiled function, where torch refuses to change the setting.
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
    kept = vars(module)
    if kept.get(COMPILED_CALL) is not None:
        return True
    return any(is_compiled_function(f) for f in kept.values() if type(f) is FunctionType)


def class_has_compiled(kind: type) -> bool:
    """True if the forward pass of all modules of a class is compiled."""
    return is_compiled_function(getattr(kind, "forward", None))


def is_compiled_function(function: Any) -> bool:
    """True for a function that ``torch.compile`` made, or ``module.compile()`` keeps."""
    return getattr(function, "_torchdynamo_orig_callable", None) is not None
