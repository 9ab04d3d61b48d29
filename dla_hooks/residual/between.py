"""Where a model adds to the stream between its blocks, as image features do at some positions.

Such an addition is no module's output. It is seen as the difference between what one block puts
out and what the next one is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dla_hooks.modules.hooks import Place
from dla_hooks.residual.stream import Block, Stream


class Between(NamedTuple):
    """The way from a block to what reads the stream next.

    Attributes:
        number: the block's place in the stack.
        block: the block.
        behind: its output, behind all hooks on it.
        ahead: the input of the next block, or of the final norm, ahead of all hooks on it.
    """

    number: int
    block: Block
    behind: Place
    ahead: Place


def places_between(stream: Stream) -> Iterator[Between]:
    """The ways between the blocks of a model that is declared to add something there."""
    if stream.architecture.between is None:
        return
    whole, ending = stream.whole, stream.ending
    n_blocks = len(stream.blocks) - (ending is not None and ending.within)
    for number, block in enumerate(stream.blocks[:n_blocks]):
        last = number + 1 == len(whole.blocks)
        reader = whole.final_norm.entered if last else whole.blocks[number + 1].input
        yield Between(number, block, block.output, reader.ahead)
