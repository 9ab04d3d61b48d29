"""What kinds of model there are, and how each is talked to: one small file per kind.

A kind knows where its models keep the few things that every one of them has (embedding,
unembedding, head projections), how to run them, and when to refuse them. All else is the same for
all of them.
"""

from __future__ import annotations

from typing import Any

from dla_hooks.backends.base import Kind
from dla_hooks.backends.hooked_transformer import Hooked
from dla_hooks.backends.huggingface import HuggingFace
from dla_hooks.backends.peft import Adapted
from dla_hooks.backends.transformer_bridge import Bridge

# By the names of the classes that a model's own class descends from: no library is imported to find
# out, and a model of its cannot be here without it.
_BY_CLASS: dict[str, type[Kind]] = {
    "peft.PeftMixedModel": Adapted,
    "peft.PeftModel": Adapted,
    "transformer_lens.HookedTransformer": Hooked,
    "transformer_lens.TransformerBridge": Bridge,
}
_COMPILED = "torch.OptimizedModule"


def kind_of(model: Any) -> Kind:
    """How to talk to a model; nothing about it is checked yet."""
    names = _class_names(model)
    while _COMPILED in names:
        model = model._orig_mod
        names = _class_names(model)
    return next((_BY_CLASS[name] for name in names if name in _BY_CLASS), HuggingFace)(model)


def _class_names(model: Any) -> list[str]:
    return [f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(model).__mro__]


__all__ = ["Kind", "kind_of"]
