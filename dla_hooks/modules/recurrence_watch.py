"""A look at the recurrences of mixers without attention, as a model calls them.

No module boundary shows what they are computed from. For the length of a run the functions are
replaced, in the model's own file, by ones that show their calls, as attention functions are (see
:mod:`dla_hooks.modules.attention_interface`). The look is for one thread.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dla_hooks.errors import HookError
from dla_hooks.modules.asides import in_aside
from dla_hooks.modules.hooks import Place, Tap
from dla_hooks.modules.recurrences import FUNCTIONS, RecurrenceCall

Look = Callable[[RecurrenceCall], Tensor | None]
"""Sees a call, and may return what stands in the place of its output."""


def has_recurrence(module: nn.Module) -> bool:
    """Whether the file of a module has such a function."""
    return bool(_functions_of([module]))


def _functions_of(modules: Iterable[nn.Module]) -> list[tuple[str, str]]:
    """The files of some modules, each with the name of such a function in it."""
    homes = {kind.__module__ for module in modules for kind in type(module).__mro__}
    return [
        (home, name)
        for home in sorted(homes)
        for name in FUNCTIONS
        if callable(vars(sys.modules.get(home, threading)).get(name))
    ]


class RecurrenceTap(Tap):
    """Reads the calls of such functions in the files of some modules, in one run of the model.

    Args:
        place: one of the modules; the name is for messages.
        modules: all of them.
        on_call: called with each call.
    """

    def __init__(self, place: Place, modules: Iterable[nn.Module], on_call: Look) -> None:
        super().__init__(place, _is_no_module_call, optional=True)
        self._modules, self._on_call = tuple(modules), on_call

    def put_on(self, thread: int) -> Any:
        """Watch the functions, in this thread."""
        return _Watch(self._modules, self._on_call)

    def count(self, call: Any) -> None:
        """Look at nothing: where activations were held, no function is called."""


def _is_no_module_call(_: Any) -> None:
    raise HookError("a tap on a recurrence was shown the call of a module")


@contextmanager
def watching(modules: Iterable[nn.Module], look: Look) -> Iterator[None]:
    """Look at such calls in the files of some modules within a ``with`` block, in this thread."""
    watch = _Watch(modules, look)
    try:
        yield
    finally:
        watch.remove()


class _Watch:
    """One look at such calls, by the thread that made it, until it is removed."""

    def __init__(self, modules: Iterable[nn.Module], look: Look) -> None:
        self._look, self._names = look, list[tuple[str, str]]()
        _looks_of_thread().append(look)
        try:
            for home, name in _functions_of(modules):
                _Replaced.put_on(home, name)
                self._names.append((home, name))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take it off."""
        looks = _looks_of_thread()
        if self._look in looks:
            looks.remove(self._look)
        for name in self._names:
            _Replaced.take_off(*name)
        self._names = []


_local = threading.local()


def _looks_of_thread() -> list[Look]:
    found: list[Look] | None = getattr(_local, "looks", None)
    if found is None:
        found = _local.looks = []
    return found


class _Replaced:
    """One replaced function, while any thread watches."""

    _lock = threading.Lock()
    _all: dict[tuple[str, str], _Replaced] = {}  # noqa: RUF012

    def __init__(self, home: str, name: str) -> None:
        self._users, self.before = 0, vars(sys.modules[home])[name]
        self.ours = _watched(self.before, *FUNCTIONS[name])

    @classmethod
    def put_on(cls, home: str, name: str) -> None:
        """Replace the function, or count one more user of it."""
        with cls._lock:
            found = cls._all.get((home, name))
            if found is None:
                found = cls._all[home, name] = cls(home, name)
                setattr(sys.modules[home], name, found.ours)
            found._users += 1

    @classmethod
    def take_off(cls, home: str, name: str) -> None:
        """Count one user less; the last one puts it back, if ours still stands there."""
        with cls._lock:
            found = cls._all[home, name]
            found._users -= 1
            if found._users:
                return
            del cls._all[home, name]
            if vars(sys.modules[home]).get(name) is found.ours:
                setattr(sys.modules[home], name, found.before)


def _watched(function: Callable[..., Any], values: str, axis: int) -> Callable[..., Any]:
    """A function that shows its calls to the looks of this thread."""
    takes = inspect.signature(function)

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        looks = () if in_aside() else tuple(_looks_of_thread())
        found = function(*args, **kwargs)
        if not looks:
            return found
        given = takes.bind(*args, **kwargs).arguments
        more = [n for n, p in takes.parameters.items() if p.kind is p.VAR_KEYWORD and n in given]
        arguments = {**given, **{key: x for name in more for key, x in given[name].items()}}
        for name in more:
            del arguments[name]
        output = found[0] if isinstance(found, tuple) else found
        kept = output
        for look in looks:
            changed = look(RecurrenceCall(function, arguments, values, axis, output))
            output = output if changed is None else changed
        if output is kept:
            return found
        return (output, *found[1:]) if isinstance(found, tuple) else output

    return watched
