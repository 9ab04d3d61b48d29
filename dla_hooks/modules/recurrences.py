"""What mixers without attention compute their output from: the recurrence that runs over positions.

Linear attention and Mamba end in one function of the model's own file, from values [batch, pos,
…] to outputs of the same shape (:mod:`dla_hooks.modules.recurrence_watch` shows its calls).

With all else that it gets held fixed, the function is linear in the values, and causal. So what one
position's value gives to an output is that value times a derivative (:func:`parts_of_output`).

Axes: T output, S source, C channel (all heads side by side).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FUNCTIONS = {
    "torch_chunk_gated_delta_rule": ("value", 1),
    "chunk_kimi_delta_attention": ("value", 1),
    "mamba2_chunk_scan": ("hidden_states", 1),
    "mamba_selective_scan": ("hidden_states", 2),
    "rwkv_linear_attention": ("value", 1),
}
"""Their names, each with that of the values among the arguments, and the axis of positions."""
_STATES = ("initial_state", "initial_states", "state")
_ELEMENTS = 2**18
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
        with torch.inference_mode(False), torch.enable_grad(), _InSteps():
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


class _InSteps(TorchFunctionMode):
    """Lets a loop that takes one position after another out of a tensor have a cheap derivative.

    That of ``x[:, :, i]`` is as large as x at each step. Here all positions are taken at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[tuple[int, int], tuple[Tensor, tuple[Tensor, ...]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], tuple) and args[0].requires_grad:
            x, (*whole, place) = args
            if type(place) is int and all(one == slice(None) for one in whole):
                key = id(x), len(whole)
                if key not in self._taken:
                    self._taken[key] = x, x.unbind(len(whole))  # x is held, so that its id is its
                return self._taken[key][1][place]
        return func(*args, **(kwargs or {}))
