"""Mid streams: the place in a block where the stream is read again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.modules.hooks import Call, Edit, Place, Tap, edited, tapped
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.stream import Stream, WriteSite

_known: Remembered[list[int | None]] = Remembered()


def mid_streams(stream: Stream) -> list[int | None]:
    """For each block, count the writes before the stream is read again.

    In a sequential block the MLP reads the stream after attention has written: 1. In a parallel
    block nothing reads it before the block's end: None. This is measured once per model, by
    running a few tokens twice. In the second run every block gets its earlier input, and every
    first write is disturbed. The mid stream ends before the first write that this changes.
    """
    return _known.of(stream.model, stream.version, lambda: _ask_mid_streams(stream))


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

    before = [Tap(block.input, keep(inputs, block.name)) for block in stream.blocks]
    with tapped([*before, *writes(clean)]):
        stream.backend.run_synthetic(prompt, None)

    generator = torch.Generator().manual_seed(1)
    given: dict[nn.Module, list[Tensor]] = {}
    noises: dict[nn.Module, list[Tensor]] = {}
    for block in stream.blocks:
        as_before = inputs[block.name]
        noise = torch.randn(as_before.shape, generator=generator).double()
        noise *= as_before.square().mean().sqrt()
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


def _replaced(x: Tensor, by: Tensor) -> Tensor:
    return by.to(x, copy=True)


def _disturbed(out: Tensor, noise: Tensor) -> Tensor:
    return out + noise.reshape(out.shape).to(out)
