"""Linear modules that read the stream: where a short run shows that they read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from dla_hooks.calibration.block_run import ANY_NUMBER, SeenCall, run_block, same
from dla_hooks.calibration.early_streams import stream_before, stream_within
from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.calibration.mid_terms import mid_stream
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.hooks import Place, Use, hidden_out
from dla_hooks.residual.stream import Stream


@dataclass(frozen=True)
class Reader:
    """A linear module that reads the stream.

    Attributes:
        stream: up to where it is read.
        norm: the norm between the two, or None.
        place: the module's own output, ahead of hooks on it.
    """

    stream: Stream
    norm: Place | None
    place: Place


def reader_of(stream: Stream, module: nn.Module, path: str) -> Reader:
    """Find which stream a module of a block reads, and through which norm.

    Args:
        stream: the located model.
        module: the module, in a block.
        path: its path, for messages.

    Raises:
        UnsupportedModelError: where it reads anything else, or runs otherwise than once.
    """
    inside = [
        (number, block)
        for number, block in enumerate(stream.blocks)
        if any(one is module for one in block.module.modules())
    ]
    if len(inside) != 1:
        where = "is in no block" if not inside else f"runs in {len(inside)} layers"
        raise UnsupportedModelError(
            f"{path} {where} of {stream.backend.name}, so what it reads of the stream is not "
            "told; name a linear module inside of one block, or the unembedding"
        )
    number, block = inside[0]
    run = run_block(stream, block)
    calls = [call for call in run.calls if call.module is module]
    if len(calls) != 1:
        raise UnsupportedModelError(
            f"{path} was called {len(calls)} times in a short run, and can be read through where "
            "it is called once; name another module"
        )
    place = Place(module, path, Use(0, ANY_NUMBER), first=True)
    read = calls[0].entered
    for within, x in _streams(stream, number, run.input, run.writes):
        end = stream_within if within else stream_before
        if same(read, x):
            entered = Place(module, path, Use(0, ANY_NUMBER), before=True)
            return Reader(end(stream, number, entered), None, place)
        norm = _norm_between(run.calls, x, read)
        if norm is not None:
            return Reader(end(stream, number, norm.entered), norm, place)
    raise UnsupportedModelError(
        f"{path} does not read the stream, nor the stream through one norm: what enters it is "
        "something else. Targets are linear readings of the stream; name a module that reads it, "
        "as a router, or a query, key, value, gate or up projection"
    )


def _streams(
    stream: Stream, number: int, x: Tensor, writes: dict[str, tuple[Tensor, Tensor]]
) -> Iterator[tuple[bool, Tensor]]:
    """The streams that a block may read: its input, and the one between its writes."""
    yield False, x
    if mid_streams(stream)[number] is not None:
        mid = mid_stream(stream, number)
        assert mid is not None
        before = stream.blocks[number].writes[: len(mid.responses)]
        yield True, mid.of(x, [writes[write.label][1] for write in before])


def _norm_between(calls: list[SeenCall], x: Tensor, read: Tensor) -> Place | None:
    """The module that makes of the stream what is read."""
    for call in calls:
        if same(call.left, read) and same(call.entered, x):
            return Place(call.module, call.name, Use(call.nth, ANY_NUMBER))
    return None


class FirstOutput(nn.Module):
    """A module that reads rows of the stream, as a linear map to its first output.

    Routers return their logits among other things, and flatten what they read.

    Args:
        module: the module.
        d_model: the width of the stream.
    """

    def __init__(self, module: nn.Module, d_model: int) -> None:
        super().__init__()
        self.module, self.in_features = module, d_model

    def forward(self, x: Tensor) -> Tensor:
        """The first output for each row."""
        out = hidden_out(self.module(x))
        return out.reshape(*x.shape[:-1], out.shape[-1])
