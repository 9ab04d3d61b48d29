"""How the models of each library are run: one small file per backend.

A backend knows where its models keep the few things that every model has (embedding, unembedding,
head projections), how to run them, and when to refuse them. All else is the same for all models.
"""

from __future__ import annotations

from typing import Any

from dla_hooks.backends.base import Backend, Conventions
from dla_hooks.backends.hooked_transformer import HookedTransformerBackend
from dla_hooks.backends.huggingface import HuggingFaceBackend
from dla_hooks.backends.peft import PeftBackend
from dla_hooks.backends.transformer_bridge import TransformerBridgeBackend

# By the names of the classes that a model's own class descends from: no library is imported to find
# out, and a model of its cannot be here without it.
_BY_CLASS: dict[str, type[Backend]] = {
    "peft.PeftMixedModel": PeftBackend,
    "peft.PeftModel": PeftBackend,
    "transformer_lens.HookedTransformer": HookedTransformerBackend,
    "transformer_lens.TransformerBridge": TransformerBridgeBackend,
}
_COMPILED = "torch.OptimizedModule"


def backend_of(model: Any) -> Backend:
    """How to talk to a model; nothing about it is checked yet."""
    names = _class_names(model)
    while _COMPILED in names:
        model = model._orig_mod
        names = _class_names(model)
    return next((_BY_CLASS[name] for name in names if name in _BY_CLASS), HuggingFaceBackend)(model)


def _class_names(model: Any) -> list[str]:
    return [f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(model).__mro__]


__all__ = ["Backend", "Conventions", "backend_of"]
