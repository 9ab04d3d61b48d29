"""A module's parameters, also while they are offloaded.

accelerate keeps the parameters of an offloaded module on the meta device, and their values in a
store (memory, or files) that hangs on the module's hook; they are there only while it runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def stored(module: nn.Module, name: str) -> Tensor | None:
    """A parameter's values, or None where the module has no such parameter."""
    parameter = getattr(module, name, None)
    if not isinstance(parameter, Tensor):
        return None
    if not parameter.is_meta:
        return parameter.detach()
    for hook in _hooks(module):
        store = getattr(hook, "weights_map", None)
        if store is not None:
            values: Tensor = store[name]
            return values
    raise RuntimeError(f"{name} of {type(module).__name__} is on the meta device, without values")


def run_device(module: nn.Module) -> torch.device:
    """Where a module's inputs belong: its weights' device, or the one that they are moved to."""
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))
