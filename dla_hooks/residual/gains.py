"""What later blocks make of a write: products of gains."""

from __future__ import annotations

from torch import Tensor

from dla_hooks.residual.stream import Block, Stream


def constant_label(block: Block) -> str:
    """The name of what a block adds besides its writes (a bare bias parameter, say)."""
    return f"{block.layer}_constant"


def times(values: Tensor, factor: Tensor | None) -> Tensor:
    """Times a factor [] or [d_model]; None is one."""
    return values if factor is None else values * factor.to(values)


def path_factors(stream: Stream) -> dict[str, Tensor | None]:
    """What the last stream holds of every part: its response, times all later blocks' gains."""
    factors: dict[str, Tensor | None] = {}
    later: Tensor | None = None
    for block in reversed(stream.blocks):
        factors[constant_label(block)] = later
        for write in block.writes:
            factors[write.label] = _product(write.response, later)
        later = _product(block.gain, later)
    positions = _product(stream.positions_response, later)
    return {"embed": later, "pos_embed": positions, **factors}


def _product(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else times(one, other)


def later_gains(stream: Stream, layer: int) -> list[Tensor | None]:
    """What the input of block ``layer`` holds of everything before each earlier block."""
    gains: list[Tensor | None] = [None] * (layer + 1)
    for index in range(layer - 1, -1, -1):
        gain, later = stream.blocks[index].gain, gains[index + 1]
        gains[index] = later if gain is None else times(gain, later)
    return gains


def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else times(one, other)
