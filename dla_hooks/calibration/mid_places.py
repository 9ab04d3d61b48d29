"""Where the stream between two writes of a block can be looked at."""

from __future__ import annotations

from torch import nn

from dla_hooks.calibration.block_run import ANY_NUMBER, run_block, same
from dla_hooks.calibration.mid_terms import mid_stream
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.hooks import Place, Use
from dla_hooks.residual.stream import Stream


def mid_place(stream: Stream, number: int) -> Place:
    """The input of a module that reads the mid stream of one block, ahead of hooks on it.

    Args:
        stream: the located model.
        number: the block's place in ``stream.blocks``; it must have a mid stream.

    Raises:
        UnsupportedModelError: where nothing reads it, or the block multiplies the stream, or adds
            a constant.
    """
    block, mid = stream.blocks[number], mid_stream(stream, number)
    if mid is not None and block.gain is None and block.constant is None:
        named = stream.backend.norm_before(mlp=True)
        norm = None if named is None else getattr(block.module, named, None)
        if isinstance(norm, nn.Module):
            use = Use(0, ANY_NUMBER)
            return Place(norm, f"{block.name}.{named}", use, before=True, first=True)
        run = run_block(stream, block)
        before = [run.writes[write.label][1] for write in block.writes[: len(mid.responses)]]
        x = mid.of(run.input, before)
        for call in run.calls:
            if same(call.entered, x):
                use = Use(call.nth, ANY_NUMBER)
                return Place(call.module, call.name, use, before=True, first=True)
    raise UnsupportedModelError(
        f"{block.name} does not show the stream between its writes as a sum of them alone; take "
        f"the stream before it ({block.layer}_pre), or what it writes"
    )
