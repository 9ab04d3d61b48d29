"""A model is a guest: all that a call must leave as it was found."""

from __future__ import annotations

import copy
import random
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_TABLES = [name for name in vars(nn.Module()) if "hooks" in name]
_GLOBAL = [name for name in vars(torch_module) if name.startswith("_global_") and "hooks" in name]


def belongings(model: nn.Module) -> dict[str, Any]:
    """Everything, in a form that can be compared."""
    found: dict[str, Any] = {
        "random state": torch.random.get_rng_state(),
        # The checker of shapes, which every test is under, draws what it looks at.
        "python's random state": "beartype" in sys.modules or random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "global hooks": {name: dict(getattr(torch_module, name)) for name in _GLOBAL},
    }
    for name, module in model.named_modules(remove_duplicate=False):
        for table in _TABLES:
            kept = getattr(module, table, None)
            found[f"{table} of {name}"] = dict(kept) if isinstance(kept, dict) else kept
        own = vars(module)
        found[f"mode of {name}"] = module.training
        found[f"forward of {name}"] = own.get("forward")
        found[f"attributes of {name}"] = sorted(own)
        found[f"numbers of {name}"] = {k: v for k, v in own.items() if type(v) in (int, float, str)}
        found[f"children of {name}"] = {k: id(child) for k, child in module._modules.items()}
    for name, weight in model.named_parameters(remove_duplicate=False):
        found[f"weight {name}"] = weight.detach().clone()
        found[f"flags of {name}"] = weight.requires_grad, weight.grad is None, id(weight)
    config = getattr(model, "config", None)
    found["config"] = copy.deepcopy(vars(config)) if config is not None else None
    return found


def left_behind(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is no longer as it was."""
    keys = [*before, *(key for key in after if key not in before)]
    return [key for key in keys if not _same(before.get(key), after.get(key))]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        # Bits, so that NaN is equal to itself.
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(_bits(one), _bits(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    return one is other or bool(one == other)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8) if x.numel() else x
