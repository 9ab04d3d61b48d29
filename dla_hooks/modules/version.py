"""Which version of a model it is, and answers that are kept until that changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

_Answer = TypeVar("_Answer")


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
        # Synthetic runs skip hooks on hook points: see `Backend.without_user_hooks`.
        # `getattr` for a missing name goes through `nn.Module.__getattr__`, which is slow;
        # `vars(module)` is fast.
        if "fwd_hooks" not in vars(module):
            seen += (*module._forward_hooks, *module._forward_pre_hooks)
        if hasattr(type(module), "_disable_adapters") or "_disable_adapters" in vars(module):
            seen += str(module.active_adapters), module.disable_adapters
    return hash(tuple(seen))


class Remembered(Generic[_Answer]):
    """Answers that were measured of models, each kept until its model changes.

    Models are held weakly. An answer must hold no part of its model.
    """

    _all: ClassVar[list[Remembered[Any]]] = []

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, tuple[int, dict[Hashable, _Answer]]]
        self._kept = WeakKeyDictionary()
        self._lock = threading.Lock()
        Remembered._all.append(self)

    def find(self, model: nn.Module, version: int, key: Hashable = None) -> _Answer | None:
        """The answer to one question about one version of a model, or None."""
        with self._lock:
            kept = self._kept.get(model)
            return kept[1].get(key) if kept is not None and kept[0] == version else None

    def keep(self, model: nn.Module, version: int, answer: _Answer, key: Hashable = None) -> None:
        """Keep an answer; those about other versions of the model are dropped."""
        with self._lock:
            kept = self._kept.get(model)
            if kept is None or kept[0] != version:
                kept = self._kept[model] = version, {}
            kept[1][key] = answer

    def of(
        self, model: nn.Module, version: int, measure: Callable[[], _Answer], key: Hashable = None
    ) -> _Answer:
        """The answer that is kept, or the one that is measured now."""
        answer = self.find(model, version, key)
        if answer is None:
            answer = measure()
            self.keep(model, version, answer, key)
        return answer

    def drop(self, model: nn.Module) -> None:
        """Forget one model."""
        with self._lock:
            self._kept.pop(model, None)


def forget(model: nn.Module) -> None:
    """Drop everything that is remembered of a model."""
    for remembered in Remembered._all:
        remembered.drop(model)
