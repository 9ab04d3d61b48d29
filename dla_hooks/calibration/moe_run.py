"""Two short runs of a model that show where what its experts write goes.

The first is plain. In the second every block reads what it read before, and the output of every
module that holds experts is disturbed. What differs then comes from the experts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.calibration.block_run import ANY_NUMBER, EveryCall, flat, is_activation
from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.modules.edits import Edit, edited
from dla_hooks.modules.experts import ExpertsCall, count_of, slots_to_ask
from dla_hooks.modules.hooks import Call, Place, Tap, Use, tapped
from dla_hooks.residual.stream import Stream


@dataclass(frozen=True, eq=False)
class Seen:
    """One call of one module in a block.

    Attributes:
        module: the module.
        path: where it is in the block.
        nth: which of its calls, from 0.
        entered: what went in [n, d].
        left: what came out [n, d].
        experts: how many experts each position went to; 0 where the module was not called as one
            that holds experts.
        slots: in how many slots these can be asked one by one; 0 where they cannot be.
        misfit: by which part of its size the sum of these misses what came out.
    """

    module: nn.Module
    path: str
    nth: int
    entered: Tensor
    left: Tensor
    experts: int = 0
    slots: int = 0
    misfit: float = 0.0


@dataclass
class BlockCalls:
    """What one run shows of one block: its input, every call inside in order, and its terms.

    Attributes:
        input: [n, d].
        calls: in the order in which they ended.
        terms: by the write's label what it adds, ahead of a post-norm.
    """

    input: Tensor | None = None
    calls: list[Seen] = field(default_factory=list)
    terms: dict[str, Tensor] = field(default_factory=dict)

    def like(self, other: Seen) -> Seen:
        """The same call as one of another run."""
        return next(c for c in self.calls if c.module is other.module and c.nth == other.nth)


def plain_run(stream: Stream) -> list[BlockCalls]:
    """What happens inside of each block on a few tokens."""
    return _run(stream, ())


def disturbed_run(
    stream: Stream, plain: Sequence[BlockCalls], experts: Sequence[Seen | None]
) -> list[BlockCalls]:
    """The same with what one module of each block puts out disturbed.

    Args:
        stream: the located model.
        plain: from :func:`plain_run`.
        experts: for each block the call to disturb.
    """
    generator = torch.Generator().manual_seed(7)
    edits = []
    for block, calls, seen in zip(stream.blocks, plain, experts, strict=True):
        if seen is None or calls.input is None:
            continue
        # As large as the terms of the block, or it would be lost in their rounding.
        size = max(float(x.double().square().mean().sqrt()) for x in calls.terms.values()) or 1.0
        edits.append(Edit(block.module, _as_before(calls.input), at_input=True))
        edits.append(Edit(seen.module, _disturbed(size, generator)))
    return _run(stream, edits)


def _disturbed(size: float, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    def disturb(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu")
        return x + size * noise.to(x)

    return disturb


def _as_before(x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda now: x.reshape(now.shape).to(now, copy=True)


def _run(stream: Stream, edits: Sequence[Edit]) -> list[BlockCalls]:
    found = [BlockCalls() for _ in stream.blocks]
    every: list[EveryCall] = []
    taps: list[Tap] = []
    for block, calls in zip(stream.blocks, found, strict=True):
        if block.use.of != 1:
            continue
        for path, module in block.module.named_modules():
            if path:
                every.append(_watch(module, path, calls))
        taps.append(Tap(block.input, _keep_input(calls)))
        for write in block.writes:
            taps.append(Tap(write.place, _keep_term(calls, write.label, write.post_norm is None)))
    with edited(edits), tapped([*every, *taps]):  # taps are behind edits, and see them
        stream.backend.run_synthetic(short_prompt(stream), None)
        for tap in every:
            tap.fired = max(tap.fired, 1)  # a module that never runs is no mistake here
    return found


def _keep_input(calls: BlockCalls) -> Callable[[Call], None]:
    def keep(call: Call) -> None:
        calls.input = flat(call.activation)

    return keep


def _keep_term(calls: BlockCalls, label: str, at_output: bool) -> Callable[[Call], None]:
    def keep(call: Call) -> None:
        calls.terms[label] = flat(call.left if at_output else call.entered)

    return keep


def _watch(module: nn.Module, path: str, calls: BlockCalls) -> EveryCall:
    def see(call: Call) -> None:
        given = [t for t in (*call.args, *call.kwargs.values()) if is_activation(t)]
        out: Any = call.output
        out = out[0] if isinstance(out, tuple) and out else out
        if not given or not is_activation(out):
            return
        experts, n = ExpertsCall.read(call.args, call.kwargs), count_of(module)
        k, asked = 0, (0, 0.0)
        if experts is not None and n and out.shape == experts.hidden.shape:
            k = experts.index.shape[-1]
            asked = slots_to_ask(module, experts, out, n)
        seen = Seen(module, path, tap.fired, flat(given[0]), flat(out), k, *asked)
        calls.calls.append(seen)

    tap = EveryCall(Place(module, path, Use(0, ANY_NUMBER)), see)
    return tap
