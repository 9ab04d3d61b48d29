"""Mid streams: the place in a block where the stream is read again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.modules.edits import Edit, edited
from dla_hooks.modules.hooks import Call, Place, Tap, tapped
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.stream import Block, Stream, WriteSite

_known: Remembered[list[int | None]] = Remembered()


def mid_streams(stream: Stream) -> list[int | None]:
    """For each block, count the writes before the stream is read again.

    In a sequential block the MLP reads the stream after attention has written: 1. In a parallel
    one nothing reads it before the block's end: None. Asked once per model, by running a few
    tokens twice: the second time every block is given the input it had before, and every first
    write is disturbed. The mid stream ends before the first write that this changes. The
    disturbance is as large, in the stream, as the larger of the block's input and its write: next
    to a small one a large one would not show.
    """
    found = _known.of(stream.model, stream.version, lambda: _ask_mid_streams(stream.whole))
    return found[: len(stream.blocks)]


def _ask_mid_streams(stream: Stream) -> list[int | None]:
    prompt = short_prompt(stream)
    inputs: dict[str, Tensor] = {}
    clean: dict[str, Tensor] = {}
    disturbed: dict[str, Tensor] = {}

    def keep(where: dict[str, Tensor], key: str) -> Callable[[Call], None]:
        return lambda call: where.__setitem__(key, call.entered.detach().double().cpu().clone())

    def writes(where: dict[str, Tensor]) -> list[Tap]:
        # The input of a write's module, not its output: that may be zero, or mostly bias.
        return [Tap(Place(w.module, w.name, w.use), keep(where, w.label)) for w in stream.writes]

    def keep_size(block: Block) -> Callable[[Call], None]:
        return lambda call: written.__setitem__(block.name, _size(call.left))

    written: dict[str, float] = {}
    before = [Tap(block.input, keep(inputs, block.name)) for block in stream.blocks]
    first = [Tap(block.writes[0].place, keep_size(block)) for block in stream.blocks]
    with tapped([*before, *first, *writes(clean)]):
        stream.backend.run_synthetic(prompt, None)

    generator = torch.Generator().manual_seed(1)
    given: dict[nn.Module, list[Tensor]] = {}
    noises: dict[nn.Module, list[Tensor]] = {}
    for block in stream.blocks:
        as_before = inputs[block.name]
        noise = torch.randn(
            as_before.shape, generator=generator, dtype=torch.float32, device="cpu"
        ).double()
        noise *= max(_size(as_before) / _factor(block.writes[0]), written[block.name])
        given.setdefault(block.module, []).append(as_before)
        noises.setdefault(block.writes[0].written_by, []).append(noise)
    edits = [Edit(module, _in_turn(_replaced, uses), True) for module, uses in given.items()]
    edits += [Edit(module, _in_turn(_disturbed, uses)) for module, uses in noises.items()]
    # Output taps come before the edits there, so they read the model's own output.
    with tapped(writes(disturbed)), edited(edits):
        stream.backend.run_synthetic(prompt, None)

    def changed(write: WriteSite) -> bool:
        difference = disturbed[write.label] - clean[write.label]
        return bool(difference.norm() > 1e-3 * clean[write.label].norm())

    return [
        next((k for k, write in enumerate(block.writes) if k and changed(write)), None)
        for block in stream.blocks
    ]


def _in_turn(
    change: Callable[[Tensor, Tensor], Tensor], values: list[Tensor]
) -> Callable[[Tensor], Tensor]:
    """A change with a different value at each use of the module."""
    remaining = iter(values)
    return lambda x: change(x, next(remaining))


def _size(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def _factor(write: WriteSite) -> float:
    """The size of what a write is multiplied by as it enters the stream."""
    return 1.0 if write.response is None else _size(write.response) or 1.0


def _replaced(x: Tensor, by: Tensor) -> Tensor:
    return by.to(x, copy=True)


def _disturbed(out: Tensor, noise: Tensor) -> Tensor:
    return out + noise.reshape(out.shape).to(out)
