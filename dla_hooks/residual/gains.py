"""Factors that later blocks multiply a part of the stream by."""

from __future__ import annotations

from torch import Tensor

from dla_hooks.residual.stream import Block, Stream


def constant_label(block: Block) -> str:
    """The label of the constant that a block adds besides its writes (e.g. a bare bias)."""
    return f"{block.layer}_constant"


def times(values: Tensor, factor: Tensor | None) -> Tensor:
    """Multiply values [..., d_model] by a factor [] or [d_model]; None is one.

    >>> import torch
    >>> times(torch.ones(2), None), times(torch.ones(2), torch.tensor(3.0))
    (tensor([1., 1.]), tensor([3., 3.]))
    """
    return values if factor is None else values * factor.to(values)


def product(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Multiply two factors, either of which may be None for one.

    >>> import torch
    >>> product(None, None), product(torch.tensor(2.0), torch.tensor(3.0))
    (None, tensor(6.))
    """
    return other if one is None else times(one, other)


def path_factors(stream: Stream, end: int | None = None) -> dict[str, Tensor | None]:
    """Compute the factor of every part in the stream: its response times all later gains.

    Args:
        stream: the located model.
        end: a place in the stack: the stream that enters this block. None is the last stream.

    Returns:
        For "embed", "pos_embed", and every write and constant before ``end``: its factor [] or
        [d_model], or None for one.
    """
    factors: dict[str, Tensor | None] = {}
    later: Tensor | None = None
    for block in reversed(stream.blocks[:end]):
        factors[constant_label(block)] = later
        for write in block.writes:
            factors[write.label] = product(write.response, later)
        later = product(block.gain, later)
    return {"embed": later, "pos_embed": product(stream.positions_response, later), **factors}
