"""What mixers without attention compute their output from: the recurrence that runs over positions.

Linear attention and Mamba end in one function of the model's own file, from values [batch, pos,
…] to outputs of the same shape, which no module boundary shows. For the length of a run that
function is replaced, in that file, by one that shows its calls, as attention functions are (see
:mod:`dla_hooks.modules.attention_interface`). The look is for one thread.

With all else that it gets held fixed, the function is linear in the values, and causal. So what one
position's value gives to an output is that value times a derivative (:func:`parts_of_output`).

Axes: T output, S source, C channel (all heads side by side).
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.errors import HookError
from dla_hooks.modules.asides import in_aside
from dla_hooks.modules.hooks import Place, Tap

# The values' name among the arguments, and the axis of their positions.
_FUNCTIONS = {
    "torch_chunk_gated_delta_rule": ("value", 1),
    "chunk_kimi_delta_attention": ("value", 1),
    "mamba2_chunk_scan": ("hidden_states", 1),
    "mamba_selective_scan": ("hidden_states", 2),
    "rwkv_linear_attention": ("value", 1),
}
_STATES = ("initial_state", "initial_states", "state")
_ELEMENTS = 2**21
"""Numbers of the values that are run together, each output with a copy of its own."""


@dataclass(frozen=True)
class RecurrenceCall:
    """One call of such a function.

    Attributes:
        function: it.
        arguments: what it got, by name.
        values: the name of the values among them.
        axis: of their positions.
        output: what it returned, besides a state.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    values: str
    axis: int
    output: Tensor

    @property
    def goes_on(self) -> bool:
        """Whether it starts from a state, as of an earlier piece of a prompt."""
        return any(self.arguments.get(name) is not None for name in _STATES)

    @property
    def value(self) -> Tensor:
        """The values [batch, pos, C]."""
        return self.flat(self.arguments[self.values])

    @property
    def left(self) -> Tensor:
        """The output [batch, pos, C]."""
        return self.flat(self.output)

    def flat(self, x: Tensor) -> Tensor:
        """Values or outputs as [batch, pos, C]."""
        return x.movedim(self.axis, 1).flatten(2)

    def of_row(self, row: int, copies: int, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments for some copies of one row of the batch, in a dtype, off any graph."""
        batch, found = len(self.arguments[self.values]), dict(self.arguments)
        for name, x in found.items():
            if not isinstance(x, Tensor):
                continue
            if x.ndim > 2 and len(x) == batch:  # parameters have fewer axes
                x = x[row : row + 1].expand(copies, *x.shape[1:])
            kind = dtype if x.is_floating_point() else x.dtype
            found[name] = torch.empty(x.shape, dtype=kind, device=x.device).copy_(x.detach())
        return found

    def run(self, arguments: Mapping[str, Any], value: Tensor) -> Tensor:
        """The output [copies, pos, C] for other values, in the function's own layout."""
        found = self.function(**{**arguments, self.values: value})
        return self.flat(found[0] if isinstance(found, tuple) else found)


Look = Callable[[RecurrenceCall], Tensor | None]
"""Sees a call, and may return what stands in the place of its output."""


def parts_of_output(
    call: RecurrenceCall, row: int, places_T: Tensor, u_TC: Tensor, n_heads: int
) -> tuple[Tensor, Tensor]:
    """What each position's value gives to some outputs, in a direction of each.

    Args:
        call: of the function.
        row: of the batch.
        places_T: the positions of the outputs.
        u_TC: the directions.
        n_heads: how many heads the channels are, side by side.

    Returns:
        The parts [n_heads, T, S]; and what the value is multiplied by, the mean over the channels
        of a head, likewise.
    """
    n_sources, n_channels = call.left.shape[1:]
    step = max(1, _ELEMENTS // max(1, n_sources * n_channels))
    parts, weights = list[Tensor](), list[Tensor]()
    for places, u in zip(places_T.split(step), u_TC.split(step), strict=True):
        with torch.inference_mode(False), torch.enable_grad():
            arguments = call.of_row(row, len(places), u.dtype)
            value = arguments[call.values].requires_grad_()
            out = call.run(arguments, value)
            each, along = torch.arange(len(places), device=out.device), torch.zeros_like(out)
            along[each, places] = u.to(out)
            (slope,) = torch.autograd.grad(out, value, along, retain_graph=True)
            along[each, places] = 1
            (weight,) = torch.autograd.grad(out, value, along)
        given = call.flat(slope.detach() * value.detach()).unflatten(-1, (n_heads, -1))
        parts.append(given.sum(-1).movedim(-1, 0))
        mean = call.flat(weight.detach()).unflatten(-1, (n_heads, -1)).mean(-1)
        weights.append(mean.movedim(-1, 0))
    return torch.cat(parts, 1).to(u_TC), torch.cat(weights, 1).to(u_TC)


def has_recurrence(module: nn.Module) -> bool:
    """Whether the file of a module has such a function."""
    return bool(_functions_of([module]))


def _functions_of(modules: Iterable[nn.Module]) -> list[tuple[str, str]]:
    """The files of some modules, each with the name of such a function in it."""
    homes = {kind.__module__ for module in modules for kind in type(module).__mro__}
    return [
        (home, name)
        for home in sorted(homes)
        for name in _FUNCTIONS
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
        self.ours = _watched(self.before, *_FUNCTIONS[name])

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
