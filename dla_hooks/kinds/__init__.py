"""What kinds of model there are, and how each is talked to: one small file per kind.

A kind knows where its models keep the few things that every one of them has (embedding,
unembedding, head projections), how to run them, and when to refuse them. All else is the same for
all of them.
"""

from __future__ import annotations

from typing import Any

from dla_hooks.kinds.base import Kind
from dla_hooks.kinds.bridge import Bridge
from dla_hooks.kinds.hooked import Hooked
from dla_hooks.kinds.huggingface import HuggingFace

# By the names of the classes that a model's own class descends from: TransformerLens is not
# imported to find out, and a model of its cannot be here without it.
_BY_CLASS: dict[str, type[Kind]] = {
    "transformer_lens.HookedTransformer": Hooked,
    "transformer_lens.TransformerBridge": Bridge,
}


def kind_of(model: Any) -> Kind:
    """How to talk to a model; nothing about it is checked yet."""
    for base in model.__class__.__mro__:
        name = f"{base.__module__.partition('.')[0]}.{base.__name__}"
        if name in _BY_CLASS:
            return _BY_CLASS[name](model)
    return HuggingFace(model)


__all__ = ["Kind", "kind_of"]
