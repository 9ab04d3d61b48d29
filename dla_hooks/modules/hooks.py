"""Taps: forward hooks that read activations and change nothing.

A tap reads the input or the output of one module during one run of the model. Taps are added just
before that run. They are removed after it, also after an exception. They return nothing, so the
model's activations do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dla_hooks.errors import HookError
from dla_hooks.modules.asides import in_aside
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.outputs import tensor_in
from dla_hooks.modules.weights import whole_activation


class Use(NamedTuple):
    """One run of a module among all that it has in one forward pass.

    Attributes:
        nth: which run, from 0.
        of: how many there are; 0 where it does not matter.
    """

    nth: int = 0
    of: int = 1


ONLY_USE = Use()


class Place(NamedTuple):
    """The input or the output of one module in one of its runs.

    Attributes:
        module: the module to watch.
        name: its path, for messages.
        use: which of the module's runs, where it runs several times.
        before: what enters the module; otherwise what leaves it.
        first: ahead of all hooks that are on the module; otherwise behind them.
        since: the place that is looked at for what was there before, where that is another.
    """

    module: nn.Module
    name: str
    use: Use = ONLY_USE
    before: bool = False
    first: bool = False
    since: Place | None = None

    @property
    def ahead(self) -> Place:
        """The same, ahead of all hooks that are on the module, or of what else writes there."""
        return self.since or self._replace(first=True)

    @property
    def entered(self) -> Place:
        """The input of the same run of the same module."""
        return self._replace(before=True)


class Call:
    """One call of a module, as a hook sees it.

    Attributes:
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: what it returned; None ahead of the module.
    """

    __slots__ = ("_activation", "_before", "args", "kwargs", "output")

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None, before: bool = True
    ) -> None:
        self.args, self.kwargs, self.output, self._before = args, kwargs, output, before
        self._activation: Tensor | None = None

    @classmethod
    def of(cls, activation: Tensor) -> Call:
        """Make a call from one activation, such as one from a cache."""
        return cls((activation,), {}, activation, before=False)

    @property
    def entered(self) -> Tensor:
        """The hidden states that entered the module."""
        args = self.args
        if args and type(args[0]) is Tensor:  # nearly always
            return args[0]
        return whole_activation(hidden_in(args, self.kwargs))

    @property
    def left(self) -> Tensor:
        """The hidden states that left it."""
        output = self.output
        if type(output) is Tensor:  # nearly always
            return output
        return whole_activation(hidden_out(output))

    @property
    def activation(self) -> Tensor:
        """The hidden states at the watched place: the input or the output."""
        found = self._activation
        if found is None:
            found = self._activation = self.entered if self._before else self.left
        return found


@dataclass
class Tap:
    """A function that reads one place in one run of a model.

    Attributes:
        place: the place that is read.
        on_activation: called once, with the module's call. For an input it is called before the
            module runs, since a block may change its input in place.
        on_scale: for a norm: called with its scale [batch, pos, 1] if the source of activations
            stores that instead of the norm's input and output.
        optional: whether the module may also never run.
        at_once: reads the same from the first argument and the output, without a call around
            them; False where these are not as expected, which leaves it to ``on_activation``.
    """

    place: Place
    on_activation: Callable[[Call], None]
    on_scale: Callable[[Tensor], None] | None = None
    optional: bool = False
    at_once: Callable[[Any, Any], bool] | None = None
    fired: int = field(default=0, init=False)

    def count(self, call: Call) -> None:
        """Count one run of the module, and read it if it is the wanted one."""
        fired = self.fired
        self.fired = fired + 1
        if fired == self.place.use.nth:
            look = self.on_activation
            if torch.is_autocast_enabled(call.activation.device.type):
                look = outside_autocast(look)
            look(call)

    def put_on(self, thread: int) -> Any:
        """Watch the place, in one thread, until ``remove()`` is called on what this returns."""
        place, hook = self.place, _Hook(self, thread)
        if place.before:
            put_on: Any = place.module.register_forward_pre_hook
        else:
            put_on = place.module.register_forward_hook
        return put_on(hook, with_kwargs=True, prepend=place.first)


class _Hook:
    """A tap on its module, for the runs of one thread."""

    __slots__ = ("_at_once", "_before", "_nth", "_tap", "_thread")
    _dla_hooks = True

    def __init__(self, tap: Tap, thread: int) -> None:
        self._tap, self._before, self._thread = tap, tap.place.before, thread
        self._at_once, self._nth = tap.at_once, tap.place.use.nth

    # `rest` is (kwargs,) or (kwargs, output). While one thread removes its tap, another may call it
    # without the kwargs. So check the thread before unpacking anything.
    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if get_ident() != self._thread or in_aside():
            return
        before, tap, at_once = self._before, self._tap, self._at_once
        first, output = args[0] if args else None, None if before else rest[1]
        if at_once is not None and tap.fired == self._nth and at_once(first, output):
            tap.fired += 1  # nearly always
            return
        tap.count(Call(args, rest[0], output, before))


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a module's arguments: in transformers, the first tensor."""
    for value in (*args, kwargs.get("hidden_states"), *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise HookError("a module that should read the stream was called without any tensor")


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's arguments with others in the place of what :func:`hidden_in` finds."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], new, *args[i + 1 :]), kwargs
    key = next(k for k in ("hidden_states", *kwargs) if isinstance(kwargs.get(k), Tensor))
    return args, {**kwargs, key: new}


def hidden_out(output: Any) -> Tensor:
    """The hidden states in a module's output: see :func:`dla_hooks.modules.outputs.tensor_in`.

    Raises:
        HookError: for an output without any.
    """
    if isinstance(output, Tensor):
        return output
    found = tensor_in(output)
    if found is None:
        raise HookError(
            f"a module that should write to the stream returned a {type(output).__name__} without "
            "any floating-point tensor; declare the module inside it that returns the write"
        )
    return found


@dataclass
class Run:
    """A run with taps on it.

    Attributes:
        ended: whether it was ended before its end.
    """

    ended: bool = False


@contextmanager
def tapped(taps: Sequence[Tap]) -> Iterator[Run]:
    """Add taps for one ``with`` block, then check that each module ran as often as expected.

    Only runs in the present thread are read, so two threads can share a model.

    Raises:
        HookError: when a tap's module did not run, or ran another number of times.
    """
    handles, run, thread = list[Any](), Run(), get_ident()
    try:
        for tap in taps:
            tap.fired = 0
            handles.append(tap.put_on(thread))
        with torch.no_grad():
            yield run
    finally:
        for handle in handles:
            handle.remove()
    for tap in taps:
        if tap.fired <= (tap.place.use.nth if run.ended else 0) and not tap.optional:
            raise HookError(
                f"{tap.place.name} never ran during the forward pass, so what it writes was not "
                "seen. A fused, compiled or skipped module does this; run the plain eager model."
            )
        if not run.ended and tap.place.use.of and tap.fired not in (tap.place.use.of, 0):
            raise HookError(
                f"{tap.place.name} ran {tap.fired} times in one forward pass, not "
                f"{tap.place.use.of} as expected. Gradient checkpointing and shared modules do it."
            )


def is_ours(hook: Any) -> bool:
    """True for a hook that this library added."""
    return hasattr(hook, "_dla_hooks")


def others_in(table: Any) -> bool:
    """True for a table of hooks with any that is not ours."""
    # A list: another thread may put a hook of ours on meanwhile.
    return not all(is_ours(hook) for hook in list(table.values()))


def mark(*hooks: Any) -> None:
    """Say that hooks are ours."""
    for hook in hooks:
        hook._dla_hooks = True
