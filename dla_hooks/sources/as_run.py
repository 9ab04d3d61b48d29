"""Taps on blocks with cross-attention, which may not run, or write at some positions only."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

from torch import Tensor, nn

from dla_hooks.modules.hooks import Call, Tap
from dla_hooks.residual.stream import Stream, WriteSite


def as_run(stream: Stream, taps: list[Tap]) -> list[Tap]:
    """The taps, for blocks that run only where there is something to read.

    Where such a block does not run, what it writes is zero. Where it multiplies a term by a number
    for each position, so are the activations that the term and its parts are read from.

    Args:
        stream: the located model.
        taps: for one run.
    """
    blocks = [block for block in stream.whole.blocks if block.optional]
    if not blocks:
        return taps
    inside = {module for block in blocks for module in block.module.modules()}
    by_row: dict[nn.Module, tuple[WriteSite, dict[str, Any]]] = {}
    found = list[Tap]()
    for block in blocks:
        for write in (write for write in block.writes if write.by_row is not None):
            numbers: dict[str, Any] = {}
            found.append(Tap(block.input.ahead, _keep(write, numbers), optional=True))
            by_row |= {module: (write, numbers) for module in _behind(write, stream.d_model)}
    for tap in taps:
        module = tap.place.module
        if module in inside:
            tap = copy(tap)
            tap.optional = True
        if module in by_row and _is_of(by_row[module][0], tap):
            tap.on_activation = _times(tap.on_activation, by_row[module][1])
            tap.at_once = None
        found.append(tap)
    return found


def _behind(write: WriteSite, d_model: int) -> list[nn.Module]:
    """The module of a term, and the last linear maps in it."""
    maps = [one for one in write.module.modules() if getattr(one, "out_features", 0) == d_model]
    return [write.written_by, *maps]


def _is_of(write: WriteSite, tap: Tap) -> bool:
    """Whether a tap reads the term itself, or what its last map makes it of."""
    return not tap.place.before or tap.place.module is not write.written_by


def _keep(write: WriteSite, numbers: dict[str, Any]) -> Callable[[Call], None]:
    def keep(call: Call) -> None:
        numbers["of_row"] = call.kwargs.get(write.by_row or "")

    return keep


def _times(look: Callable[[Call], None], numbers: dict[str, Any]) -> Callable[[Call], None]:
    def see(call: Call) -> None:
        of_row = numbers.get("of_row")
        look(call if not isinstance(of_row, Tensor) else _Multiplied(call, of_row))

    return see


class _Multiplied(Call):
    """A call whose activations are multiplied by a number for each position."""

    __slots__ = ("_of_row",)

    def __init__(self, call: Call, of_row: Tensor) -> None:
        super().__init__(call.args, call.kwargs, call.output, call._before)
        batch, width = call.activation.shape[:2]
        self._of_row = of_row.reshape(batch, width, 1)

    @property
    def entered(self) -> Tensor:
        """The hidden states that entered the module, multiplied."""
        return super().entered * self._of_row

    @property
    def left(self) -> Tensor:
        """The hidden states that left it, multiplied."""
        return super().left * self._of_row
