"""What attention is computed from: queries, keys and values, as the attention function gets them.

No module boundary shows these. Models of transformers ask a registry for the function that computes
their attention (``ALL_ATTENTION_FUNCTIONS.get_interface``). For the length of a run that method is
replaced, on the registry's instance, by one that hands out the model's own function with a look at
it. Neither the config nor the registry's entries change, and so the model's mask stays its own.

The look is for one thread. Other threads get the function itself.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import modeling_utils

from dla_hooks.errors import HookError
from dla_hooks.modules.hooks import Tap

_METHOD = "get_interface"
_NOTHING = object()


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function.

    Attributes:
        module: the attention module that called it.
        query: [batch, head, query, d_key], after rotary positions and norms.
        key: [batch, key-value head, source, d_key], with the cache.
        value: [batch, key-value head, source, d_value].
        mask: as the function got it: of bools, added to scores, or None.
        options: all else that it got, by name: ``scaling``, ``softcap``, …
        implementation: its name in the registry; ``eager`` for the model's own.
        output: what it returned [batch, query, head, d_value].
        weights: its weights [batch, head, query, source], where the model itself shows them.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: Mapping[str, Any]
    implementation: str
    output: Tensor
    weights: Tensor | None = None


Look = Callable[[AttentionCall], Tensor | None]
"""Sees a call, and may return what stands in the place of its output."""


class AttentionTap(Tap):
    """Reads what the attention function gets from one module, in one run of the model.

    Args:
        place: the attention module, and which of its runs; the name is for messages.
        on_call: called with what the function got and returned.
    """

    def __init__(self, place: Any, on_call: Callable[[AttentionCall], None]) -> None:
        super().__init__(place, _is_no_module_call)
        self._on_call = on_call

    def put_on(self, thread: int) -> Any:
        """Watch the module's calls of its attention function, in this thread."""
        return _Watch(self.place.module, self.count_call)

    def count_call(self, call: AttentionCall) -> None:
        """Count one call of the function, and read it if it is the wanted one."""
        self.fired += 1
        if self.fired == self.place.use.nth + 1:
            self._on_call(call)


def _is_no_module_call(_: Any) -> None:
    raise HookError("a tap on an attention function was shown the call of a module")


@contextmanager
def watching(looks: Mapping[nn.Module, Look]) -> Iterator[None]:
    """Look at the attention calls of some modules within a ``with`` block, in this thread."""
    with ExitStack() as stack:
        for module, look in looks.items():
            stack.callback(_Watch(module, look).remove)
        yield


def why_unseen() -> str | None:
    """Why no attention function can be watched with the installed transformers; None if it can."""
    if hasattr(modeling_utils.ALL_ATTENTION_FUNCTIONS, _METHOD):
        return None
    return (
        f"transformers {transformers.__version__} does not show what attention is computed from "
        "(its registry of attention functions is read past any watch); transformers 5.23 does"
    )


class _Watch:
    """One look at one module's calls, by the thread that made it, until it is removed."""

    def __init__(self, module: nn.Module, look: Look) -> None:
        self.look = look
        self._module, self._registries = module, list[Any]()
        self._looks: list[_Watch] = _looks_of_thread().setdefault(module, [])
        self._looks.append(self)
        try:
            for registry in _registries_of(type(module)):
                _Replaced.put_on(registry)
                self._registries.append(registry)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take it off."""
        if self in self._looks:
            self._looks.remove(self)
        for registry in self._registries:
            _Replaced.take_off(registry)
        self._registries = []
        looks = _looks_of_thread()
        if not looks.get(self._module, True):
            del looks[self._module]


_local = threading.local()


def _looks_of_thread() -> dict[nn.Module, list[_Watch]]:
    found: dict[nn.Module, list[_Watch]] | None = getattr(_local, "looks", None)
    if found is None:
        found = _local.looks = {}
    return found


class _Replaced:
    """The replaced method of one registry, while any thread watches."""

    _lock = threading.Lock()
    _all: dict[int, _Replaced] = {}  # noqa: RUF012

    def __init__(self, registry: Any) -> None:
        self._registry, self._users = registry, 0
        self._before = vars(registry).get(_METHOD, _NOTHING)
        get = getattr(registry, _METHOD)

        def get_watched(implementation: Any, *args: Any, **kwargs: Any) -> Any:
            function = get(implementation, *args, **kwargs)
            return _watched(function, str(implementation)) if _looks_of_thread() else function

        self._ours = get_watched

    @classmethod
    def put_on(cls, registry: Any) -> None:
        """Replace the method, or count one more user of it."""
        with cls._lock:
            found = cls._all.get(id(registry))
            if found is None:
                found = cls._all[id(registry)] = cls(registry)
                setattr(registry, _METHOD, found._ours)
            found._users += 1

    @classmethod
    def take_off(cls, registry: Any) -> None:
        """Count one user less; the last one puts the method back, if ours still stands there."""
        with cls._lock:
            found = cls._all[id(registry)]
            found._users -= 1
            if found._users:
                return
            del cls._all[id(registry)]
            if vars(registry).get(_METHOD) is not found._ours:
                return
            if found._before is _NOTHING:
                delattr(registry, _METHOD)
            else:
                setattr(registry, _METHOD, found._before)


def _watched(function: Callable[..., Any], implementation: str) -> Callable[..., Any]:
    """An attention function that shows its calls to the looks of this thread."""

    def watched(
        module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, **more: Any
    ) -> Any:
        looks = _looks_of_thread().get(module)
        if not looks:
            return function(module, query, key, value, attention_mask, **more)
        with torch.no_grad():  # a look may have it on around this
            found = function(module, query, key, value, attention_mask, **more)
        output, *rest = found
        for watch in tuple(looks):
            call = AttentionCall(
                module, query, key, value, attention_mask, more, implementation, output
            )
            changed = watch.look(call)
            output = output if changed is None else changed
        return found if output is found[0] else (output, *rest)

    return watched


def _registries_of(kind: type) -> Sequence[Any]:
    """The registries of attention functions that the code of a module may ask."""
    shared = modeling_utils.ALL_ATTENTION_FUNCTIONS
    found = {id(shared): shared}
    for home in {one.__module__ for one in kind.__mro__}:
        for value in list(vars(sys.modules.get(home, threading)).values()):
            if isinstance(value, type(shared)):
                found[id(value)] = value
    return list(found.values())
