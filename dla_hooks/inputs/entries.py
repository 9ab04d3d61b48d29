"""The entries of the prompt that are read, each with its target.

An entry is one (row, column) of the batch together with one target. Selecting positions and
broadcasting answers both end here, as three flat lists of numbers. The kernels therefore know
nothing of argument forms, padding or ragged rows.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from dla_hooks.inputs.masks import is_whole

_FEW = 64


class Entries:
    """N flat (row, column, target) triples, which unfold into the result's axes.

    Args:
        rows: batch rows [*shape].
        cols: columns of the prompt [*shape].
        target: index of the distinct target [*shape].
        valid: False where the result has an entry but the prompt has no token [*shape].
        prompt_shape: (batch, pos) of the prompt.
        batched: whether the result has an axis for the batch.
        mask: True at the real tokens of the prompt [batch, pos]; None where all are.
        several: whether the last axis of the result holds several answers to one prompt.

    Attributes:
        shape: of the result after its row axis, with the axis for the batch.
        rows: batch row of each entry [N].
        cols: column of each entry [N].
        target: target of each entry [N].
        target_of_entry: the same [*shape], padding included.
        mask: True at the real tokens of the prompt [batch, pos]; None where all are.
        encoder_mask: likewise of what an encoder reads, see :meth:`beside_encoder`.
        few: whether they, and what is derived from them, may be kept for the next prompt.
        view: what is derived from them (:class:`dla_hooks.projection.tiles.View`).
    """

    encoder_mask: Tensor | None = None
    view: Any = None

    def __init__(
        self,
        rows: Tensor,
        cols: Tensor,
        target: Tensor,
        valid: Tensor,
        prompt_shape: tuple[int, int],
        batched: bool = True,
        mask: Tensor | None = None,
        several: bool = False,
    ) -> None:
        self.several = several
        self.mask = None if mask is None or is_whole(mask) else mask
        self.shape = tuple(valid.shape)
        self.prompt_shape = prompt_shape
        self.batched = batched
        self.target_of_entry = target
        self._valid = None if bool(valid.all()) else valid
        self.rows, self.cols, self.target = (
            values.reshape(-1) if self._valid is None else values[valid]
            for values in (rows, cols, target)
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def few(self) -> bool:
        return len(self) <= _FEW

    def alone(self) -> Entries:
        """The same without what is derived from them, for what outlives the call."""
        found = Entries.__new__(Entries)  # `copy` takes several times as long
        vars(found).update(vars(self), view=None)
        return found

    def beside_encoder(self, mask: Tensor) -> Entries:
        """The same, of a decoder beside an encoder with this mask [batch, position]."""
        found = copy(self)
        found.encoder_mask, found.view = mask, None
        return found

    def at(self, columns: Tensor) -> Entries:
        """The same entries at other columns [N], each with a target of its own, in order."""
        valid = torch.ones_like(self.target_of_entry, dtype=torch.bool)
        valid = valid if self._valid is None else self._valid
        rows, cols, target = (
            torch.zeros(valid.shape, dtype=torch.long, device="cpu") for _ in "rct"
        )
        numbers = torch.arange(len(self), device="cpu")
        for values, own in ((rows, self.rows), (cols, columns), (target, numbers)):
            values[valid] = own
        return Entries(rows, cols, target, valid, self.prompt_shape, self.batched, self.mask)

    def of_target(self, numbers_K: Tensor) -> Tensor:
        """Spread numbers [..., K] for targets to entries [..., N]; one target's stay [..., 1]."""
        if numbers_K.shape[-1] == 1:
            return numbers_K
        return numbers_K.index_select(-1, self.target.to(numbers_K.device))

    def taken(self, values: Tensor) -> Tensor:
        """Numbers [*shape] as those of the entries [N], padding left out."""
        return values.reshape(-1) if self._valid is None else values[self._valid]

    def unfold(self, values: Tensor, padding: float = float("nan")) -> Tensor:
        """Unfold scalars [..., N] to [..., *shape], with NaN where the prompt has no token."""
        lead = values.shape[:-1]
        if self._valid is None:
            out = values.reshape(*lead, *self.shape)
        else:
            out = values.new_full((*lead, *self.shape), padding)
            out[..., self._valid.to(values.device)] = values
        return out if self.batched else out.squeeze(-len(self.shape))

    def numbers(self) -> tuple[Tensor, int]:
        """The position of each column among its row's real tokens, and the most that a row has.

        Returns:
            Positions [1 or batch, pos], -1 for padding: one row where all are alike.
        """
        return _counted(self.mask, self.prompt_shape[1])

    def encoder_numbers(self, n: int) -> tuple[Tensor, int]:
        """The same of an encoder that puts out ``n`` positions: of tokens, or of frames."""
        mask = self.encoder_mask
        return _counted(None if mask is None or mask.shape[1] != n else mask, n)

    def positions(self, mask: Tensor) -> Tensor:
        """The position of each entry among its row's real tokens [*shape]; -1 for padding.

        Args:
            mask: True at the real tokens of the prompt [batch, pos].
        """
        if self._valid is None and is_whole(mask):
            return self.unfold(self.cols).clone()  # the caller's to write to
        counted = (mask.cumsum(-1) - 1)[self.rows, self.cols]
        if self._valid is None:
            return self.unfold(counted)
        return self.unfold(counted.double()).nan_to_num(nan=-1.0).long()


def _counted(mask: Tensor | None, width: int) -> tuple[Tensor, int]:
    if mask is None or is_whole(mask):
        return torch.arange(width, device="cpu")[None], width
    counted = mask.cumsum(-1)
    return (counted - 1).masked_fill(~mask, -1), int(counted.max())


def one_target(
    rows: Tensor,
    cols: Tensor,
    valid: Tensor,
    prompt_shape: tuple[int, int],
    batched: bool = True,
    mask: Tensor | None = None,
) -> Entries:
    """Make entries that all have the same target."""
    return Entries(rows, cols, torch.zeros_like(cols), valid, prompt_shape, batched, mask)
