"""Edits: forward hooks that change activations, in the made-up runs that measure a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.modules.hooks import hidden_in, hidden_out, mark, with_hidden
from dla_hooks.modules.outputs import tensor_in, with_tensor


@dataclass(frozen=True)
class Edit:
    """A change to one module's hidden states, for synthetic runs that measure a model.

    Attributes:
        module: the module to change.
        change: a function from the hidden states to their replacement.
        at_input: True to change the input, False to change the output.
        optional: whether a call without hidden states is passed by.
    """

    module: nn.Module
    change: Callable[[Tensor], Tensor]
    at_input: bool = False
    optional: bool = False


@contextmanager
def edited(edits: Sequence[Edit]) -> Iterator[None]:
    """Change activations within a ``with`` block; in this thread only."""
    handles = []
    try:
        for edit in edits:
            handles.append(_put_in(edit, threading.get_ident()))
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _put_in(edit: Edit, thread: int) -> torch.utils.hooks.RemovableHandle:
    def before(
        module: nn.Module, args: tuple[Any, ...], *rest: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if threading.get_ident() != thread:
            return None
        (kwargs,) = rest
        if edit.optional and not any(isinstance(x, Tensor) for x in (*args, *kwargs.values())):
            return None
        return with_hidden(args, kwargs, edit.change(hidden_in(args, kwargs)))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != thread or (edit.optional and tensor_in(output) is None):
            return None
        return with_tensor(output, edit.change(hidden_out(output)))

    mark(before, after)
    if edit.at_input:
        return edit.module.register_forward_pre_hook(before, with_kwargs=True)
    return edit.module.register_forward_hook(after)
