"""One small file for each library: the way in which its models are looked at and run.

A backend knows where its models keep the few things that every model has (embedding, unembedding,
head projections), how to run them, and when to refuse them. All else is the same for all models.
"""

from __future__ import annotations

from typing import Any

from dla_hooks.backends.base import Backend
from dla_hooks.backends.hooked_transformer import HookedTransformerBackend
from dla_hooks.backends.huggingface import HuggingFaceBackend
from dla_hooks.backends.peft import PeftBackend
from dla_hooks.backends.transformer_bridge import TransformerBridgeBackend
from dla_hooks.backends.wrapped import Conventions, Wrapper
from dla_hooks.inputs.prompts import check_tokenizer

# By the names of the classes that a model's own class descends from. No library is imported for
# it: a model of a library cannot be here without that library.
_BY_CLASS: dict[str, type[Backend]] = {
    "peft.PeftMixedModel": PeftBackend,
    "peft.PeftModel": PeftBackend,
    "transformer_lens.HookedTransformer": HookedTransformerBackend,
    "transformer_lens.TransformerBridge": TransformerBridgeBackend,
}
_COMPILED = "torch.OptimizedModule"


def backend_of(model: Any) -> Backend:
    """The backend of a model, or of the model in a wrapper; nothing about it is checked yet.

    Args:
        model: a model of any backend, compiled or not, or what :func:`dla_hooks.wrap` made of one.

    Raises:
        InputError: for a wrapper whose tokenizer is none.
    """
    conventions, tokenizer = Conventions(), None
    if isinstance(model, Wrapper):
        conventions, tokenizer, model = model.conventions, model.tokenizer, model.model
        check_tokenizer(tokenizer)
    names = _class_names(model)
    while _COMPILED in names:
        model = model._orig_mod
        names = _class_names(model)
    kind = next((_BY_CLASS[name] for name in names if name in _BY_CLASS), HuggingFaceBackend)
    return kind(model, conventions, tokenizer)


def _class_names(model: Any) -> list[str]:
    return [f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(model).__mro__]


__all__ = ["Backend", "Conventions", "Wrapper", "backend_of"]
