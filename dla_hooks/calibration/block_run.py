"""A short run of a model that shows everything that happens inside one block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.modules.hooks import Call, Place, Tap, Use, tapped
from dla_hooks.residual.stream import Block, Stream

ANY_NUMBER = 0
"""Of runs: for a :class:`Use` of a module that may run more often than once."""


@dataclass(frozen=True)
class SeenCall:
    """One call of one module in a block, with what went in and what came out [n, d]."""

    module: nn.Module
    name: str
    nth: int
    entered: Tensor
    left: Tensor


@dataclass
class BlockRun:
    """What a short run shows of one block: its input, its writes by label, all calls in order."""

    input: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32, device="cpu"))
    writes: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    calls: list[SeenCall] = field(default_factory=list)


class EveryCall(Tap):
    """A tap that looks at every call of a module, and does not mind if there is none."""

    def count(self, call: Call) -> None:
        self.on_activation(call)
        self.fired += 1


def run_block(stream: Stream, block: Block) -> BlockRun:
    """Run a few tokens, and keep what goes in and out of every module of one block."""
    run = BlockRun()

    def see_block(call: Call) -> None:
        run.input = flat(call.activation)

    def see_write(label: str) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            run.writes[label] = flat(call.entered), flat(call.left)

        return see

    inside = [
        watched(module, f"{block.name}.{path}", run.calls.append)
        for path, module in block.module.named_modules()
        if path
    ]
    taps = [Tap(stream.input_of(block), see_block)]
    taps += [Tap(write.place, see_write(write.label)) for write in block.writes]
    with tapped([*inside, *taps]):
        stream.backend.run_synthetic(short_prompt(stream), None)
        for tap in inside:
            tap.fired = max(tap.fired, 1)  # a module that never runs is no mistake here
    return run


def watched(module: nn.Module, name: str, keep: Callable[[SeenCall], None]) -> EveryCall:
    """A tap that keeps every call of a module with an activation in and out."""

    def see(call: Call) -> None:
        given = [t for t in (*call.args, *call.kwargs.values()) if is_activation(t)]
        out: Any = call.output
        out = out[0] if isinstance(out, tuple) and out else out
        if given and is_activation(out):
            keep(SeenCall(module, name, tap.fired, flat(given[0]), flat(out)))

    tap = EveryCall(Place(module, name, Use(0, ANY_NUMBER)), see)
    return tap


def is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def flat(x: Tensor) -> Tensor:
    """A copy of an activation with its positions in a row [n, d]."""
    return x.detach().reshape(-1, x.shape[-1]).clone()


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two activations [n, d] are one, but for rounding."""
    if one.shape != other.shape or not one.is_floating_point():
        return False
    eps = max(torch.finfo(x.dtype).eps for x in (one, other))
    one, other = one.double(), other.to(one.device).double()
    return bool((one - other).norm() <= 8 * eps * other.norm())
