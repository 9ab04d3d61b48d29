"""The stream between two writes of one block, as a sum of what has entered it by then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.calibration.block_run import run_block, same
from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.residual.gains import product, times
from dla_hooks.residual.hooked import Hooked, hooked_places
from dla_hooks.residual.stream import Block, Stream


@dataclass(frozen=True)
class MidStream:
    """The stream between two writes of one block: gain * input + responses * writes + constant.

    Attributes:
        gain: what the block's input is multiplied by there, [] or [d_model]; None is one.
        responses: the same for each write before it.
        constant: what is added besides [d_model]; None is nothing.
    """

    gain: Tensor | None
    responses: tuple[Tensor | None, ...]
    constant: Tensor | None

    def of(self, x: Tensor, writes: list[Tensor]) -> Tensor:
        """The mid stream of one input [..., d_model] and the writes that follow it."""
        x = times(x, self.gain)
        for write, response in zip(writes, self.responses, strict=True):
            x = x + times(write, response)
        return x if self.constant is None else x + self.constant.to(x)

    def hooks(self, stream: Stream, place: int) -> Iterator[tuple[Hooked, Tensor | None]]:
        """The caller's hooks inside of the block and ahead of this stream, with their factors.

        Args:
            stream: the located model.
            place: of the block in ``stream.blocks``.
        """
        block = stream.blocks[place]
        for hooked in hooked_places(stream):
            inside = hooked.number == place and not hooked.at_input
            if inside and hooked.after <= len(self.responses):
                yield hooked, self.response_to(block, hooked.after, hooked.response)

    def response_to(self, block: Block, after: int, response: Tensor | None) -> Tensor | None:
        """What this stream multiplies a change in the block by.

        Args:
            block: the block.
            after: how many of its writes stand before the change.
            response: what the block's output multiplies it by.
        """
        here, there = self.gain, block.gain
        if after:
            here, there = self.responses[after - 1], block.writes[after - 1].response
        return product(response, _over(here, there))


def mid_stream(stream: Stream, place: int) -> MidStream | None:
    """Find the stream that the MLP of one block reads.

    Most blocks add one write after another. Where a block has a gain or a constant too, a short
    run shows on which side of the mid stream they stand.

    Args:
        stream: the located model.
        place: of the block in ``stream.blocks``.

    Returns:
        None for a parallel block, whose MLP reads what its attention reads.

    Raises:
        UnsupportedModelError: when nothing in the block reads any such stream.
    """
    block, n_before = stream.blocks[place], mid_streams(stream)[place]
    if n_before is None:
        return None
    responses = tuple(write.response for write in block.writes[:n_before])
    if block.gain is None and block.constant is None:
        return MidStream(None, responses, None)
    run = run_block(stream, block)
    writes = [run.writes[write.label][1] for write in block.writes[:n_before]]
    for mid in _candidates(block, responses):
        x = mid.of(run.input, writes)
        if any(same(call.entered, x) for call in run.calls):
            return mid
    for constant in (None,) if block.constant is None else (None, block.constant):
        x = MidStream(block.gain, responses, constant).of(run.input, writes)
        for call in run.calls:  # one number that stands in no other factor (Beam scales by depth)
            if call.entered.shape == x.shape and (after := _over_fit(x, call.entered)) is not None:
                return _divided(block, responses, constant, after)
    raise UnsupportedModelError(
        f"{block.name} has a gain or a constant besides its writes, and no module in it reads its "
        "input and its attention's writes alone; leave the mid streams out (incl_mid, mlp_input)"
    )


def _candidates(block: Block, responses: tuple[Tensor | None, ...]) -> Iterator[MidStream]:
    """Ways to divide a block's factors between what stands before its mid stream and after it."""
    for constant in (None,) if block.constant is None else (None, block.constant):
        yield MidStream(None, responses, constant)
        # What comes after multiplies all alike: by nothing, the whole gain, or the write's factor.
        for after in (None, block.gain, responses[-1]):
            yield _divided(block, responses, constant, after)


def _divided(
    block: Block,
    responses: tuple[Tensor | None, ...],
    constant: Tensor | None,
    after: Tensor | None,
) -> MidStream:
    """The mid stream of a block that multiplies it by ``after``."""
    before = tuple(_over(one, after) for one in responses)
    constant = constant if constant is None or after is None else constant / after
    return MidStream(_over(block.gain, after), before, constant)


def _over_fit(x: Tensor, seen: Tensor) -> Tensor | None:
    """The number that ``seen`` times is x, if there is one."""
    size = seen.double().square().sum()
    factor = (x.to(seen.device).double() * seen.double()).sum() / size
    return factor if bool(size > 0) and same(seen * factor.to(seen), x) else None


def _over(factor: Tensor | None, other: Tensor | None) -> Tensor | None:
    """One factor over another; None is one."""
    if other is None:
        return factor
    return (torch.ones_like(other) if factor is None else factor) / other
