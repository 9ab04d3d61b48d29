"""Replacements: hooks that put something else where a module reads or writes.

They are hooks like the caller's own, and not taps: the model runs otherwise, and is attributed as
it then runs.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dla_hooks.errors import HookError, UnsupportedModelError, warn
from dla_hooks.modules.hooks import Place, hidden_in, hidden_out
from dla_hooks.modules.outputs import with_tensor
from dla_hooks.modules.user_hooks import is_silent
from dla_hooks.modules.weights import whole_activation

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""A module's arguments: positional, and by keyword."""


@dataclass(frozen=True)
class Replacement:
    """A change of what enters or leaves one module in one of its runs.

    Attributes:
        place: where.
        change: from the activation there to the one that takes its place.
        arguments: instead, for an input: from all arguments of the module to others.
    """

    place: Place
    change: Callable[[Tensor], Tensor] | None = None
    arguments: Callable[[tuple[Any, ...], dict[str, Any]], Arguments] | None = None


class Replacing:
    """Replacements that are on for the length of a ``with`` block. It can be entered again.

    Each hook counts its module's runs, since blocks may share a module. The counts begin anew when
    the model does, so that a run that failed half-way leaves nothing behind.

    Args:
        replacements: in the order in which those of one place act.
        around: the modules that are called once in each run of the model, the innermost last.
        every_thread: whether they act in all threads, or in the one that enters.
    """

    def __init__(
        self,
        replacements: Sequence[Replacement],
        around: Sequence[nn.Module],
        *,
        every_thread: bool = False,
    ) -> None:
        self._replacements, self._around = replacements, around
        self._every_thread = every_thread
        self._entered: list[tuple[ExitStack, _Runs]] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Replacing:
        runs = _Runs(None if self._every_thread else threading.get_ident(), self._replacements)
        with ExitStack() as stack:
            for handle in runs.put_on(self._around):
                stack.callback(handle.remove)
            with self._lock:
                self._entered.append((stack.pop_all(), runs))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Take the hooks off that the same thread has put on last."""
        thread = threading.get_ident()
        with self._lock:
            mine = [n for n, (_, runs) in enumerate(self._entered) if runs.thread in (None, thread)]
            stack, runs = self._entered.pop(mine[-1] if mine else -1)
        stack.close()
        if kind is None and runs.only_elsewhere:
            warn(
                "the model ran in another thread only, where nothing was replaced; pass "
                "every_thread=True for what runs a model in a thread of its own"
            )


class _Runs:
    """What was run since the hooks were put on, thread by thread.

    Args:
        thread: the one in which the hooks act; None for all.
        replacements: what they do.

    Attributes:
        thread: the same.
    """

    def __init__(self, thread: int | None, replacements: Sequence[Replacement]) -> None:
        self.thread, self._replacements = thread, replacements
        self._fired: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self._handles = list[RemovableHandle]()  # of the replacements
        self._here = self._elsewhere = False

    @property
    def only_elsewhere(self) -> bool:
        """Whether the model was run, but in no thread in which the hooks act."""
        return self._elsewhere and not self._here

    def put_on(self, around: Sequence[nn.Module]) -> Iterator[RemovableHandle]:
        """Put everything on, hook by hook."""
        for module in dict.fromkeys(around):
            yield module.register_forward_pre_hook(_ours(self._begin))
        yield around[-1].register_forward_hook(_ours(self._end))
        for number, one in enumerate(self._replacements):
            module, before = one.place.module, self._before(number, one)
            if one.place.before:
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
            else:
                handle = module.register_forward_hook(self._after(number, one))
            self._handles.append(handle)
            yield handle

    def _acts(self) -> bool:
        return self.thread is None or self.thread == threading.get_ident()

    def _begin(self, *_: Any) -> None:
        if self._acts():
            self._here = True
            self._fired[threading.get_ident()].clear()
        else:
            self._elsewhere = True

    def _end(self, *_: Any) -> None:
        """Refuse a run that went past a replacement: its numbers would be the plain model's."""
        if not self._acts():
            return
        fired = self._fired[threading.get_ident()]
        for number, (one, handle) in enumerate(zip(self._replacements, self._handles, strict=True)):
            hooks = handle.hooks_dict_ref() or {}
            silent = is_silent(hooks.get(handle.id))  # a synthetic run goes past it
            if fired[number] <= one.place.use.nth and not silent:
                raise HookError(
                    f"{one.place.name} never ran during the forward pass, so nothing was replaced "
                    "there. A fused, compiled or skipped module does this; run the plain eager "
                    "model"
                )

    def _is_turn(self, number: int, place: Place) -> bool:
        """Count one run of the module of a replacement; whether it is the one that is meant."""
        if not self._acts():
            return False
        fired = self._fired[threading.get_ident()]
        fired[number] += 1
        nth, of = place.use
        return of <= 1 or (fired[number] - 1) % of == nth

    def _before(self, number: int, one: Replacement) -> Callable[..., Arguments | None]:
        # While one thread puts the hook on or takes it off, another may call it without the kwargs:
        # there it is not on.
        def before(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Arguments | None:
            if not rest or not self._is_turn(number, one.place):
                return None
            (kwargs,) = rest
            if one.arguments is not None:
                return one.arguments(args, kwargs)
            assert one.change is not None
            old = hidden_in(args, kwargs)
            new = one.change(_whole(old, one.place))
            swapped = [new if value is old else value for value in args]
            return tuple(swapped), {k: new if v is old else v for k, v in kwargs.items()}

        return before

    def _after(self, number: int, one: Replacement) -> Callable[..., Any]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not self._is_turn(number, one.place):
                return None
            assert one.change is not None
            return with_tensor(output, one.change(_whole(hidden_out(output), one.place)))

        return after


def _whole(x: Tensor, place: Place) -> Tensor:
    if whole_activation(x) is not x:
        raise UnsupportedModelError(
            f"the activation at {place.name} is spread over processes (tensor parallelism), where "
            "no process could replace a part of it; load the model without it"
        )
    return x


def _ours(function: Callable[..., None]) -> Callable[..., None]:
    """A hook that changes nothing: it is none of the caller's."""

    def hook(*args: Any) -> None:
        function(*args)

    hook._dla_hooks = True  # type: ignore[attr-defined]
    return hook


def put_in(x: Tensor, channels: slice | None, value: Tensor | None) -> Tensor:
    """An activation with another value in some of its channels.

    Args:
        x: [..., width].
        channels: which; None is all.
        value: what stands there instead, of a shape that broadcasts; None is zero.
    """
    if channels is None and value is None:
        return torch.zeros_like(x)
    new = x.clone()
    there = new if channels is None else new[..., channels]
    if value is None:
        there.zero_()
    else:
        there.copy_(value)
    return new
