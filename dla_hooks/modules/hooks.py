"""Taps: forward hooks that look, compute and leave nothing behind.

A tap sees what goes into or comes out of one module during one run of the model. Taps are put on
just before that run and come off on every way out of it, exceptions included. They never return
anything, so the model's own activations are as they would be without them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dla_hooks.errors import HookError
from dla_hooks.modules.autocast import outside_autocast


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
    """One look at one module: what enters or leaves it in one of its runs.

    Attributes:
        module: the module to watch.
        name: its path, for messages.
        use: which of the module's runs, where it runs several times.
        before: what enters the module; otherwise what leaves it.
    """

    module: nn.Module
    name: str
    use: Use = ONLY_USE
    before: bool = False

    @property
    def entered(self) -> Place:
        """What enters the same run of the same module."""
        return self._replace(before=True)


class Call:
    """One call of a module, as a hook sees it.

    Attributes:
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: what it returned; None ahead of the module.
    """

    __slots__ = ("_before", "args", "kwargs", "output")

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None, before: bool = True
    ) -> None:
        self.args, self.kwargs, self.output, self._before = args, kwargs, output, before

    @classmethod
    def of(cls, activation: Tensor) -> Call:
        """A call that is known by one activation only, as a stored one is."""
        return cls((activation,), {}, activation, before=False)

    @property
    def entered(self) -> Tensor:
        """The hidden states that entered the module."""
        return hidden_in(self.args, self.kwargs)

    @property
    def left(self) -> Tensor:
        """The hidden states that left it."""
        return hidden_out(self.output)

    @property
    def activation(self) -> Tensor:
        """The hidden states at the place that is watched: those that entered, or that left."""
        return self.entered if self._before else self.left


@dataclass
class Tap:
    """A function that looks at one place in one run of a model.

    Attributes:
        place: where it looks.
        on_activation: called once, with the module's call. Ahead of the module, where the place
            says so: a block may change its input in place.
        on_scale: for a norm: what to do with its scale [batch, pos, 1], where a source of
            activations has stored that instead of what went in and came out.
    """

    place: Place
    on_activation: Callable[[Call], None]
    on_scale: Callable[[Tensor], None] | None = None
    fired: int = field(default=0, init=False)

    def count(self, call: Call) -> None:
        """Count one run of the module, and look if it is the one."""
        self.fired += 1
        if self.fired == self.place.use.nth + 1:
            look = self.on_activation
            if torch.is_autocast_enabled(call.activation.device.type):
                look = outside_autocast(look)
            look(call)


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a module's arguments: by transformers' custom, the first tensor."""
    candidates = (*args, kwargs.get("hidden_states"), *kwargs.values())
    for value in candidates:
        if isinstance(value, Tensor):
            return value
    raise HookError("a module that should read the stream was called without any tensor")


def hidden_out(output: Any) -> Tensor:
    """The hidden states in a module's output, which may be a tuple that starts with them."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


@contextmanager
def tapped(taps: Sequence[Tap]) -> Iterator[None]:
    """Put taps on for the length of a ``with`` block, then check that each module ran as expected.

    Only what the present thread runs is seen, so that two threads can share a model.

    Raises:
        HookError: when a tap's module did not run, or ran another number of times.
    """
    handles = []
    try:
        for tap in taps:
            tap.fired = 0
            handles.append(_put_on(tap, threading.get_ident()))
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
    for tap in taps:
        if tap.fired == 0:
            raise HookError(
                f"{tap.place.name} never ran during the forward pass, so what it writes was not "
                "seen. A fused, compiled or skipped module does this; run the plain eager model."
            )
        use = tap.place.use
        if use.of and tap.fired != use.of:
            raise HookError(
                f"{tap.place.name} ran {tap.fired} times in one forward pass, where {use.of} was "
                "expected. Gradient checkpointing and modules that share a part do this."
            )


def _put_on(tap: Tap, thread: int) -> torch.utils.hooks.RemovableHandle:
    # `rest` is (kwargs,) or (kwargs, output). A thread that runs the module just while another's
    # tap comes off may call that tap without the kwargs: unpack nothing before the thread is known.
    def before(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if threading.get_ident() == thread:
            tap.count(Call(args, rest[0]))

    def after(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if threading.get_ident() == thread:
            tap.count(Call(args, rest[0], rest[1], before=False))

    _mark(before, after)
    module = tap.place.module
    if tap.place.before:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after, with_kwargs=True)


@dataclass(frozen=True)
class Edit:
    """A change to one module's hidden states, for the made-up runs that ask a model a question.

    Attributes:
        module: the module to change.
        change: from the hidden states to those that take their place.
        at_input: change what goes in; otherwise what comes out.
    """

    module: nn.Module
    change: Callable[[Tensor], Tensor]
    at_input: bool = False


@contextmanager
def edited(edits: Sequence[Edit]) -> Iterator[None]:
    """Run with changed activations for the length of a ``with`` block; this thread only."""
    handles = []
    try:
        for edit in edits:
            handles.append(_put_in(edit, threading.get_ident()))
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _put_in(edit: Edit, thread: int) -> torch.utils.hooks.RemovableHandle:
    def before(
        module: nn.Module, args: tuple[Any, ...], *rest: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if threading.get_ident() != thread:
            return None
        (kwargs,) = rest
        new = edit.change(hidden_in(args, kwargs))
        for i, value in enumerate(args):
            if isinstance(value, Tensor):
                return (*args[:i], new, *args[i + 1 :]), kwargs
        key = next(
            (k for k in ("hidden_states", *kwargs) if isinstance(kwargs.get(k), Tensor)),
        )
        return args, {**kwargs, key: new}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        new = edit.change(hidden_out(output))
        return new if isinstance(output, Tensor) else (new, *output[1:])

    _mark(before, after)
    if edit.at_input:
        return edit.module.register_forward_pre_hook(before, with_kwargs=True)
    return edit.module.register_forward_hook(after)


def is_ours(hook: Any) -> bool:
    """Whether a hook on a module is one of this library's."""
    return hasattr(hook, "_dla_hooks")


def _mark(*hooks: Any) -> None:
    for hook in hooks:
        hook._dla_hooks = True


@contextmanager
def count_firings(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """Count how often each module runs within a ``with`` block; this thread only."""
    thread = threading.get_ident()
    fired = dict.fromkeys(modules, 0)

    def count(module: nn.Module, *_: Any) -> None:
        if threading.get_ident() == thread:
            fired[module] += 1

    _mark(count)
    handles = []
    try:
        for module in fired:
            handles.append(module.register_forward_hook(count))
        with torch.no_grad():
            yield fired
    finally:
        for handle in handles:
            handle.remove()


_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "deepspeed")
"""Libraries whose hooks make a model what it is: captured outputs, offload, weight norms."""


def callers_hooks(model: nn.Module) -> Iterator[str]:
    """The path of every module with a forward hook of the caller's, once for each hook."""
    for path, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if not is_ours(hook) and not _is_librarys(hook):
                yield path


def _is_librarys(hook: Any) -> bool:
    """True for a hook from one of the libraries that models are made with."""
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0] in _LIBRARIES
