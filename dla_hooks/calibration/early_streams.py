"""The stream ahead of its end: before a block, or between two writes of one."""

from __future__ import annotations

from dataclasses import replace

from dla_hooks.calibration.mid_places import mid_place
from dla_hooks.calibration.mid_terms import mid_stream
from dla_hooks.errors import InputError
from dla_hooks.modules.hooks import Place
from dla_hooks.residual.stream import Block, Ending, Stream


def stream_before(stream: Stream, number: int, reader: Place | None = None) -> Stream:
    """The stream that one block reads.

    Args:
        stream: the model's whole stream.
        number: the block's place in ``stream.blocks``.
        reader: the input of a module in the block that reads it, if it is read there.
    """
    block = stream.blocks[number]
    places = (block.input,) if reader is None else (block.input, reader)
    until = block.input if reader is None else _behind(stream, number)
    ending = Ending(f"{block.layer}_pre", places, until, stream)
    return _ended(stream, stream.blocks[:number], ending)


def stream_within(stream: Stream, number: int, reader: Place | None = None) -> Stream:
    """The stream that the MLP of one block reads, behind what its attention wrote.

    Args:
        stream: the model's whole stream.
        number: the block's place in ``stream.blocks``.
        reader: the input of a module that reads it; None finds one.

    Raises:
        InputError: for a parallel block, which has no such stream.
        UnsupportedModelError: where nothing shows it.
    """
    block, mid = stream.blocks[number], mid_stream(stream, number)
    if mid is None:
        raise InputError(
            f"{block.layer}_mid is not there: block {block.layer} is parallel, and its MLP reads "
            f"what its attention reads ({block.layer}_pre)"
        )
    n_before = len(mid.responses)
    writes = tuple(
        replace(write, response=response)
        for write, response in zip(block.writes[:n_before], mid.responses, strict=True)
    )
    carriers = tuple(
        replace(one, response=mid.response_to(block, one.after, one.response))
        for one in block.carriers
        if one.after <= n_before
    )
    part = replace(block, writes=writes, gain=mid.gain, constant=mid.constant, carriers=carriers)
    places = (mid_place(stream, number) if reader is None else reader,)
    ending = Ending(f"{block.layer}_mid", places, _behind(stream, number), stream, within=True)
    return _ended(stream, (*stream.blocks[:number], part), ending)


def _behind(stream: Stream, number: int) -> Place:
    """The input of the next block, or of the final norm, ahead of hooks on it."""
    after = number + 1
    last = after == len(stream.blocks)
    return (stream.final_norm.entered if last else stream.blocks[after].input).ahead


def _ended(stream: Stream, blocks: tuple[Block, ...], ending: Ending) -> Stream:
    return replace(stream, blocks=blocks, ending=ending, softcap=None, logit_scale=1.0)
