"""Every module of a model: what each call looks at a few times over."""

from __future__ import annotations

from typing import Any

from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model.modules()``, level by level, and several times as fast."""
    found = [model]
    seen = {model}
    for module in found:  # which grows as it is read
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def version_of(model: nn.Module) -> int:
    """A number that moves when a weight is changed in place or replaced, or a hook comes or goes.

    So it does when another PEFT adapter is made the active one, which leaves the weights alone.

    Writing through ``.data`` escapes it; a call whose check then fails asks again.
    """
    seen: list[Any] = []
    for module in modules_of(model):
        # Tables that a model makes anew as it runs (rotary frequencies, say) are no weights.
        passing = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in passing and not tensor.is_meta:
                seen += tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
        # Hooks on hook points are not seen by a question: see `Backend.quiet`.
        # (What a module does not have is slow to ask of it, and quick of what it is made of.)
        if "fwd_hooks" not in vars(module):
            seen += (*module._forward_hooks, *module._forward_pre_hooks)
        if hasattr(type(module), "_disable_adapters") or "_disable_adapters" in vars(module):
            seen += str(module.active_adapters), module.disable_adapters
    return hash(tuple(seen))
