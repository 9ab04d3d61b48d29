"""The state of a model, and measurements that are kept until its version changes.

Decided here: which changes of a model are noticed, so that it is measured again.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from dla_hooks.modules.compiled import COMPILED_CALL, class_has_compiled, is_compiled_function
from dla_hooks.modules.user_hooks import library_hooks

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


# Training mode makes no difference to modules with one of these `forward` methods. They have none
# of their own (as `ModuleList`), run the children, or return their input.
_IDLE = (nn.Module.forward, nn.Sequential.forward, nn.Identity.forward)


_OF_TORCH = len(vars(nn.Module()))
"""How many things torch itself keeps on every module. They come first."""
_LAST = [*vars(nn.Module())][-1]
"""The last of these."""

_PLAIN = frozenset({int, float, bool, str, type(None)})
_LONGEST_TABLE = 16  # of labels, names: a model's own settings are shorter


@dataclass(frozen=True)
class State:
    """The state of a model's modules.

    Attributes:
        version: a number that moves when a weight is changed in place or replaced, when a module
            is replaced, added, removed or used twice, when a plain value of a config or a number
            that a module keeps (an epsilon, a multiplier) changes, when a library's hook comes or
            goes, when another PEFT adapter becomes the active one, or when a part is compiled.
            Writing through ``.data`` escapes it; a call whose check then fails measures again.
        training: whether a module is in training mode. Bare containers do not count: they compute
            nothing, and one made after ``model.eval()`` (``nn.ModuleList(layers[:4])``) is True.
        compiled: whether a module, or a function stored on a module, is compiled.
        adapters_off: for every module that PEFT has adapted, whether its adapters are switched off.
        hooked: whether any module has forward hooks, whoever put them there.
        code: a number that moves when a class of modules gets another ``forward``. What is measured
            once stays: a check that then fails measures again.
    """

    version: int
    training: bool
    compiled: bool
    adapters_off: tuple[bool, ...]
    hooked: bool
    code: int


def state_of(model: nn.Module, *others: nn.Module) -> State:
    """Walk over a model once and read the state that every call needs.

    Args:
        model: the model.
        *others: models that it stores outside of its own modules.
    """
    seen: list[Any] = []
    tensors: list[Tensor | None] = []
    code: list[int] = []
    training = compiled = hooked = False
    adapters_off: list[bool] = []
    adapted: dict[type, bool] = {}  # of the classes that were met: those of PEFT's layers
    configs: dict[int, Any] = {}
    for root in (model, *others):
        for module in modules_of(root):
            # `getattr` for a missing name goes through `nn.Module.__getattr__`, which is slow;
            # `vars(module)` is fast.
            kept, kind = module.__dict__, module.__class__
            if kind not in adapted:  # a model has many modules, and few classes of them
                adapted[kind] = hasattr(kind, "_disable_adapters")
                code.append(id(getattr(kind, "forward", None)))
                compiled = compiled or class_has_compiled(kind)
            if module._modules:  # with a module that is there twice, twice
                seen += map(id, module._modules.values())
            names = [*kept]  # a list: another thread may put something on the module meanwhile
            if len(names) >= _OF_TORCH and names[_OF_TORCH - 1] == _LAST:
                names = names[_OF_TORCH:]
            for value in map(kept.get, names):
                what = type(value)
                if what is float:  # an epsilon, a multiplier
                    seen.append(value)
                elif what is FunctionType:
                    compiled = compiled or is_compiled_function(value)
            if "config" in kept:
                config = kept.get("config")
                configs[id(config)] = config
            if "forward" in kept:
                forward = kept.get("forward")
                seen.append(id(forward))
                compiled = compiled or is_compiled_function(forward)
            if kept.get(COMPILED_CALL) is not None:
                compiled = True
            if module._parameters:
                tensors += module._parameters.values()
            if module._buffers:
                # Tables that a model makes anew as it runs (rotary frequencies) are no weights.
                passing = module._non_persistent_buffers_set
                buffers = [*module._buffers.items()]
                tensors += [tensor for name, tensor in buffers if name not in passing]
            # The caller's hooks are no part of the model: synthetic runs go past them.
            if kept["_forward_hooks"] or kept["_forward_pre_hooks"]:
                hooked = True
                seen += library_hooks(module)
            if adapted[kind] or "_disable_adapters" in kept:
                layer: Any = module
                off = bool(layer.disable_adapters)
                seen += str(layer.active_adapters), off
                adapters_off.append(off)
            if module.training and not training:
                training = is_training(module)
        config = vars(root).get("cfg")  # as TransformerLens has it
        configs[id(config)] = config
    seen += _stamps(tensors)
    for config in configs.values():
        seen += _plain_values(config)
    version, switched_off = hash((compiled, *seen)), tuple(adapters_off)
    return State(version, training, compiled, switched_off, hooked, hash(tuple(code)))


def _stamps(tensors: Iterable[Tensor | None]) -> list[int]:
    """Where each weight lies, and how often it was written to in place."""
    found = list[int]()
    for tensor in tensors:
        if tensor is None:
            continue
        try:
            at = tensor.data_ptr()
            if at or not tensor.is_meta:  # quantised weights lie elsewhere, those on meta nowhere
                found += at, tensor._version
        except RuntimeError:  # a sparse weight has no storage; inference keeps no count
            found += id(tensor), 0 if tensor.is_inference() else tensor._version
    return found


def _plain_values(config: Any) -> list[Any]:
    """What can be hashed of a config: numbers, strings, and flat lists and mappings of these."""
    found: list[Any] = []
    for value in getattr(config, "__dict__", {}).values():
        kind = value.__class__
        if kind in _PLAIN:
            found.append(value)
        elif kind is list:
            found += [one if one.__class__ in _PLAIN else repr(one) for one in value]
        elif kind is dict and len(value) <= _LONGEST_TABLE:
            found.append(repr(value))
    return found


def is_training(module: nn.Module) -> bool:
    """True for a module that is in training mode, and that this can make a difference to."""
    if not module.training or getattr(type(module), "forward", None) in _IDLE:
        return False
    kind: Any = type(module)
    return "forward" in vars(module) or _asks_for_its_mode(kind)


@lru_cache(maxsize=4096)
def _asks_for_its_mode(kind: type) -> bool:
    """Whether the code of a class of modules reads ``training``; True where it cannot be read.

    A wrapper that was put in after ``model.eval()`` is in training mode, and most do not care.
    """
    own = (one for one in kind.__mro__ if one not in (nn.Module, object))
    return any(_reads_mode(value) for one in own for value in vars(one).values())


def _reads_mode(value: Any) -> bool:
    value = getattr(value, "__func__", getattr(value, "fget", value))
    if not callable(value) or isinstance(value, type):
        return False
    value = inspect.unwrap(value)
    code = getattr(value, "__code__", None)
    if code is None:
        return True
    if code.co_freevars and code.co_freevars != ("__class__",):
        return True  # a decorator that does not say what it decorates
    codes = [code]
    for one in codes:  # which grows as it is read
        codes += [const for const in one.co_consts if isinstance(const, CodeType)]
    return any("training" in one.co_names for one in codes)


_VERSIONS = 2


class Remembered(Generic[_Answer]):
    """Measurements of models, each kept while its model is in one of two states.

    The two are the last that were measured: an adapter is switched off and on again. Models are
    held by weak references. A measurement must hold no part of its model.
    """

    _all: ClassVar[list[Remembered[Any]]] = []

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, dict[int, dict[Hashable, _Answer]]]
        self._kept = WeakKeyDictionary()
        self._lock = threading.Lock()
        Remembered._all.append(self)

    def find(self, model: nn.Module, version: int, key: Hashable = None) -> _Answer | None:
        """Return the measurement for one version of a model, or None."""
        with self._lock:
            return self._kept.get(model, {}).get(version, {}).get(key)

    def keep(self, model: nn.Module, version: int, answer: _Answer, key: Hashable = None) -> None:
        """Keep a measurement, and drop those of versions before the last two."""
        with self._lock:
            kept = self._kept.setdefault(model, {})
            kept.setdefault(version, {})[key] = answer
            for old in list(kept)[:-_VERSIONS]:
                del kept[old]

    def of(
        self, model: nn.Module, version: int, measure: Callable[[], _Answer], key: Hashable = None
    ) -> _Answer:
        """Return the kept measurement, or measure now and keep it."""
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
