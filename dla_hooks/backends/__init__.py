"""One small file for each library: the way in which its models are looked at and run.

A backend knows where its models keep the few things that every model has (embedding, unembedding,
head projections), how to run them, and when to refuse them. All else is the same for all models.
A backend is found by its file: it names the classes that it serves. Models of any other class are
run as those of Hugging Face.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any
from weakref import WeakKeyDictionary

from dla_hooks.backends.base import Backend
from dla_hooks.backends.huggingface import HuggingFaceBackend
from dla_hooks.backends.wrapped import Conventions, Wrapper
from dla_hooks.errors import InputError
from dla_hooks.inputs.prompts import check_tokenizer


def _find_backends() -> dict[str, type[Backend]]:
    """Every backend of this folder, by the classes that it serves.

    No other library is imported for it: a model of a library cannot be here without that library.
    """
    found: dict[str, type[Backend]] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Backend):
                found |= dict.fromkeys(value.serves, value)
    return found


_BY_CLASS = _find_backends()
_INSIDE = {
    "torch.OptimizedModule": "_orig_mod",
    "torch.DataParallel": "module",
    "torch.DistributedDataParallel": "module",
    "repeng.ControlModel": "model",
}
"""Wrappers that change nothing about a forward pass, and the attribute with the model inside."""
_RUN_OTHERWISE = {"pyvene.IntervenableModel": "model"}
"""Wrappers that act in calls of their own only, and the attribute with the model inside."""


_NAMES: WeakKeyDictionary[type, list[str]] = WeakKeyDictionary()
"""The names of each class that was met and of its bases, with their packages."""


def backend_of(model: Any) -> Backend:
    """The backend of a model, or of the model in a wrapper; nothing about it is checked yet.

    Args:
        model: a model of any backend, compiled or not, or what :func:`dla_hooks.wrap` made of one.

    Raises:
        InputError: for a wrapper whose tokenizer is none, or that acts in calls of its own only.
    """
    conventions, tokenizer = Conventions(), None
    if isinstance(model, Wrapper):
        conventions, tokenizer, model = model.conventions, model.tokenizer, model.model
        check_tokenizer(tokenizer)
    names = _class_names(model)
    while (inside := next((_INSIDE[name] for name in names if name in _INSIDE), None)) is not None:
        model = getattr(model, inside)
        names = _class_names(model)
    for name in names:
        if name in _RUN_OTHERWISE:
            raise InputError(
                f"a {type(model).__name__} runs a model by calls of its own, in which alone it "
                f"intervenes; pass the model in it, .{_RUN_OTHERWISE[name]}, and put what it does "
                "into a hook (register_forward_hook)"
            )
    kind = next((_BY_CLASS[name] for name in names if name in _BY_CLASS), HuggingFaceBackend)
    return kind(model, conventions, tokenizer)


def _class_names(model: Any) -> list[str]:
    kind = type(model)
    found = _NAMES.get(kind)
    if found is None:
        bases = kind.__mro__
        found = [f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in bases]
        _NAMES[kind] = found
    return found


__all__ = ["Backend", "Conventions", "Wrapper", "backend_of"]
