"""Many prompts as a few batches: which prompts run together, and how they are laid side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.result import DirectLogitAttribution


@dataclass(frozen=True)
class Item:
    """One prompt among many, as token ids.

    Attributes:
        index: its place in the caller's order, from 0.
        ids: its tokens [pos].
        correct: its answer [], or one for each selected position [pos'].
        incorrect: the same for the incorrect tokens, or None.
        n_entries: how many positions are selected; 1 for a single one.
    """

    index: int
    ids: Tensor
    correct: Tensor
    incorrect: Tensor | None
    n_entries: int = 1


def batches_of(
    lengths: Sequence[int], max_tokens: int, *, same_length: bool = False
) -> list[list[int]]:
    """Sort prompts by length and fill batches with them.

    Args:
        lengths: tokens of each prompt.
        max_tokens: the most that a batch may hold, padding counted: its rows times its longest. A
            prompt that is longer is a batch of its own.
        same_length: put prompts of one length together only, so that nothing is padded.

    Returns:
        Indices into ``lengths``, a list for each batch; every index once, longest prompts first.
    """
    batches: list[list[int]] = []
    # Longest first: what does not fit in memory shows at once.
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        full = not batches or (len(batches[-1]) + 1) * longest > max_tokens
        if full or (same_length and lengths[index] != longest):
            batches.append([])
        batches[-1].append(index)
    return batches


def pad_left(rows: Sequence[Tensor], filler: int = 0) -> tuple[Tensor, Tensor]:
    """Lay rows of ids [pos] side by side, right ends aligned.

    Returns:
        Ids [batch, pos], and a mask of that shape that is True at the real ones.
    """
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), filler, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, own in enumerate(rows):
        ids[row, width - len(own) :] = own
        mask[row, width - len(own) :] = True
    return ids, mask


def side_by_side(answers: Sequence[Tensor], items: Sequence[Item], *, one_position: bool) -> Tensor:
    """The answers of a batch's prompts, laid over the positions that are selected in it.

    Args:
        answers: of each item, [] or [pos'].
        items: in the order of the batch.
        one_position: whether the result has no position axis.

    Returns:
        Ids [batch], [batch, 1] where no prompt has more than one answer, or [batch, pos'].
    """
    if all(ids.ndim == 0 for ids in answers):
        column = torch.stack(list(answers))
        return column if one_position else column[:, None]
    pairs = zip(answers, items, strict=True)
    return pad_left([ids.expand(item.n_entries) for ids, item in pairs])[0]


def split(batch: DirectLogitAttribution) -> Iterator[DirectLogitAttribution]:
    """The result of every row of a batch that is padded on the left, as if it had run alone.

    The numbers are copies on the CPU, which keep nothing of the batch alive. ``gap`` and
    ``logit_gap`` are the batch's: the largest of its rows. Tokens and answers are left out.
    """
    attribution, bias = batch.attribution.cpu(), batch.bias.cpu()
    logit, positions = batch.logit.cpu(), batch.positions.cpu()
    width = positions.shape[-1]
    for row, real in enumerate((positions >= 0).reshape(len(positions), -1).sum(-1).tolist()):
        place: tuple[slice, ...] = (slice(row, row + 1),)
        if positions.ndim > 1:
            place += (slice(width - real, width),)
        single = copy.copy(batch)
        single.attribution = attribution[(slice(None), *place)].clone()
        single.bias, single.logit = bias[place].clone(), logit[place].clone()
        single.positions = positions[place].clone()
        single.tokens, single.answer, single.incorrect = [], [], None
        yield single
