"""Measures whether padding and chunks leave the logits as they are, once per model and side."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.inputs.positions import spread_over
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.length_dependence import Limits
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.stream import Stream

_padding: Remembered[bool] = Remembered()
_chunks: Remembered[bool] = Remembered()
_holes: Remembered[bool] = Remembered()
_limits: Remembered[Limits] = Remembered()
_MOST_COLUMNS = 64


def length_limits(stream: Stream) -> Limits:
    """The lengths from which on a model computes otherwise. Looked up once per model."""
    return _limits.of(stream.model, stream.version, lambda: Limits.of(stream.model))


def padding_is_ignored(stream: Stream, *, left: bool) -> bool:
    """Measure whether a prompt has the same logits with padding on one side as without.

    Recurrent layers read the padding on the left, and some position tables count it. Measured once
    per model and side.
    """
    return _padding.of(stream.model, stream.version, lambda: _try_padding(stream, left), left)


def holes_are_ignored(stream: Stream, mask: Tensor) -> bool:
    """Measure whether rows with masked tokens in their middle are as without these tokens.

    Sliding windows, convolutions and recurrent layers count what is masked. Made-up tokens run
    under the prompt's own mask, since a window may be longer than a short prompt. Measured once per
    model and row of the mask.

    Args:
        stream: the located model.
        mask: True at the real tokens [batch, pos].
    """
    for row in mask[has_hole(mask)].unique(dim=0):
        pattern = bytes(row.to(torch.uint8).tolist())
        measure = partial(_try_hole, stream, row)
        if not _holes.of(stream.model, stream.version, measure, pattern):
            return False
    return True


def has_hole(mask: Tensor) -> Tensor:
    """Whether masked tokens lie between the real ones of each row [batch]."""
    real = mask.long()
    starts = (real[:, 1:] > real[:, :-1]).sum(-1) + real[:, 0]
    return starts > 1


def _try_hole(stream: Stream, row: Tensor) -> bool:
    columns = row.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(stream.backend.n_tokens(), (1, len(row)), generator=generator, device="cpu")
    holed = Prompt(ids.masked_fill(~row, 0), row[None])
    alone = Prompt(ids[:, row], torch.ones(1, len(columns), dtype=torch.bool, device="cpu"))
    # The last token, those right behind a hole, and some of all others.
    behind = 1 + (columns[1:] > columns[:-1] + 1).nonzero()[:, 0]
    some = spread_over(len(columns), _MOST_COLUMNS)
    seen = torch.cat((some, behind[-_MOST_COLUMNS:])).unique()
    with torch.no_grad():
        expected = stream.backend.run_synthetic(alone, seen).double()
        found = stream.backend.run_synthetic(holed, columns[seen]).double()
    return alike(stream, expected, found)


def _try_padding(stream: Stream, left: bool) -> bool:
    made_up = short_prompt(stream, length=3)
    alone = Prompt(made_up.input_ids, made_up.mask)  # text alone, whatever else it may read
    padded = _padded(alone, left)
    with torch.no_grad():
        expected = stream.backend.run_synthetic(alone, torch.tensor([2], device="cpu")).double()
        last = torch.tensor([4 if left else 2], device="cpu")
        found = stream.backend.run_synthetic(padded, last).double()
    return alike(stream, expected, found)


def _padded(prompt: Prompt, left: bool) -> Prompt:
    padding = torch.zeros(len(prompt.input_ids), 2, dtype=torch.long, device="cpu")
    ids = [padding, prompt.input_ids] if left else [prompt.input_ids, padding]
    real = [padding.bool(), prompt.mask] if left else [prompt.mask, padding.bool()]
    return Prompt(torch.cat(ids, 1), torch.cat(real, 1))


def chunks_are_ignored(stream: Stream, *, left: bool | None) -> bool:
    """Measure whether a prompt gives the same logits in chunks as at once.

    Some recurrent layers start anew with each chunk. Measured once per model and side.

    Args:
        stream: the located model.
        left: the side on which the prompt is padded, or None if it is not.

    Raises:
        UnsupportedModelError: for a model that has no cache to run chunks against.
    """
    try_chunks = _try_chunks if stream.backend.under_autocast else outside_autocast(_try_chunks)
    return _chunks.of(stream.model, stream.version, lambda: try_chunks(stream, left), left)


def _try_chunks(stream: Stream, left: bool | None) -> bool:
    # Two rows, since one that is alone may be treated apart; where there is padding, one has it.
    prompt = short_prompt(stream, batch=2, length=17)
    n_padding = 0 if left is None else min(4, prompt.shape[1] - 1)
    mask = prompt.mask.clone()
    mask[0, :n_padding] = False
    prompt = Prompt(prompt.input_ids, mask)
    if left is False:  # the last of the columns where both rows have a token
        prompt = Prompt(prompt.input_ids.flip(-1), mask.flip(-1))
    width = prompt.shape[1]
    last = width - 1 - (n_padding if left is False else 0)
    # Several tokens and one alone, which some layers treat apart: of padding, at the start, on top
    # of others, and at the end.
    ends = sorted({*((2, 3) if n_padding > 3 else ()), (width + 1) // 2, width - 1, width})
    found, past, start = None, None, 0
    with torch.no_grad(), stream.backend.without_user_hooks():
        try:
            for stop in ends:
                if start >= stop:
                    return False  # a model for prompts so short has no use for chunks
                column = torch.tensor([last], device="cpu") if start <= last < stop else None
                chunk = range(start, stop)
                logits, past = stream.backend.forward_chunk(prompt, chunk, column, past)
                if column is not None:
                    found = logits.double()
                start = stop
        finally:  # the last run, for models that keep a state of their own until the next
            expected = stream.backend.forward(prompt, torch.tensor([last], device="cpu")).double()
    assert found is not None
    return alike(stream, expected, found)


def alike(stream: Stream, expected: Tensor, found: Tensor) -> bool:
    """Whether two runs have the same logits, but for rounding."""
    finite = torch.isfinite(expected) & torch.isfinite(found)
    if not bool(torch.equal(torch.isfinite(expected), finite)):
        return False
    difference = (found - expected)[finite].norm()
    tolerance = 1e-4 + 8 * torch.finfo(stream.coarsest_dtype).eps
    return bool(difference <= tolerance * expected[finite].norm())
