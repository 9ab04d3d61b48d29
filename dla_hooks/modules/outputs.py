"""The tensor that matters in what a module returns: a tensor, tuple, dict or dataclass."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

_NAMES = ("hidden_states", "last_hidden_state")
"""Names under which a module returns the stream, by transformers' custom."""


def tensor_in(output: Any, names: tuple[str, ...] = _NAMES) -> Tensor | None:
    """The first floating-point tensor of an output, those under one of the names first.

    Args:
        output: a tensor, or a tuple, list, mapping or dataclass of outputs.
        names: keys that are looked at before all others.

    Returns:
        The tensor, or None where there is none.
    """
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    for _, item in _items(output, names):
        found = tensor_in(item, names)
        if found is not None:
            return found
    return None


def with_tensor(output: Any, new: Tensor, names: tuple[str, ...] = _NAMES) -> Any:
    """A copy of an output, of the same type, with another tensor for that of :func:`tensor_in`.

    Args:
        output: as for :func:`tensor_in`; it must hold such a tensor.
        new: the tensor that takes its place.
        names: as for :func:`tensor_in`.
    """
    if isinstance(output, Tensor):
        return new
    for key, item in _items(output, names):
        if tensor_in(item, names) is not None:
            return _replaced(output, key, with_tensor(item, new, names))
    return output


def _items(output: Any, names: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    """The parts of an output with the key of each."""
    if isinstance(output, (tuple, list)):
        yield from enumerate(output)
        return
    if isinstance(output, Mapping):
        found = dict(output)
    elif dataclasses.is_dataclass(output):
        found = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    else:
        found = dict(getattr(output, "__dict__", {}))
    for name in dict.fromkeys((*names, *found)):
        if name in found:
            yield name, found[name]


def _replaced(output: Any, key: Any, item: Any) -> Any:
    if isinstance(output, (tuple, list)):
        items = [*output[:key], item, *output[key + 1 :]]
        make = getattr(type(output), "_make", type(output))  # a named tuple has a way of its own
        return make(items)
    changed = copy.copy(output)
    if isinstance(output, Mapping):
        changed[key] = item
    else:
        object.__setattr__(changed, key, item)  # also of a frozen dataclass
    return changed
