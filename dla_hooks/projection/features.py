"""What the features of a dictionary give at one place, a tile of positions at a time.

Letters: F feature; R row of the dictionary: its features, then ``b_dec``, then ``error``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dla_hooks.modules.dictionaries import Dictionary
from dla_hooks.modules.onto import onto
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.ledger import Top, TopRows
from dla_hooks.projection.tiles import Tile, View

BEYOND = 2
"""Rows of a dictionary besides its features."""


class ProjectedDictionary:
    """A dictionary with the directions that its rows are projected on.

    Args:
        dictionary: the dictionary.
        directions: what the activation that it reads is projected on.
    """

    def __init__(self, dictionary: Dictionary, directions: Directions) -> None:
        self._dictionary, self._directions = dictionary, directions
        self._folded = directions.then(dictionary.pull_back)
        self._folded.prepare()
        self._bias_K = directions.of_constant(dictionary.bias())
        self.n_rows = dictionary.n_features + BEYOND
        self._rows_R = torch.arange(self.n_rows, device="cpu")

    def see(self, x: Tensor, view: View, rows: TopRows) -> None:
        """Add all rows at the entries in view, each with its activation beside it.

        Args:
            x: the activation at the dictionary's place, as a hook sees it.
            view: where to read.
            rows: the ledger; features that are not active have no row in it.
        """
        for tile in view.tiles(max(self._dictionary.n_features, x.shape[-1]), x.device):
            x_TM = view.take(x, tile.place).to(self._directions.dtype)
            self._see_tile(x_TM, tile, rows)

    def _see_tile(self, x_TM: Tensor, tile: Tile, rows: TopRows) -> None:
        read, device = self._dictionary, x_TM.device
        codes = read.encode(x_TM - x_TM.mean(-1, keepdim=True) if read.centred else x_TM)
        error_TM = x_TM - read.decode(codes).to(x_TM)
        d_TM = tile.spread(self._directions.at(tile, device))
        f_TF = codes.f_TF.to(x_TM)
        of_features_TF = f_TF * tile.spread(self._folded.at(tile, device))
        of_bias_T = tile.spread(onto(self._bias_K, device)[onto(tile.targets, device)])
        if codes.scale_T1 is not None:
            scale_T1 = codes.scale_T1.to(x_TM)
            of_features_TF, of_bias_T = of_features_TF * scale_T1, of_bias_T * scale_T1[:, 0]
        if codes.offset_T1 is not None:
            of_bias_T = of_bias_T + codes.offset_T1.to(x_TM)[:, 0] * d_TM.sum(-1)
        error_T = torch.linalg.vecdot(error_TM, d_TM)
        beyond_TR = torch.stack((of_bias_T.expand_as(error_T), error_T), -1)
        values_RT = torch.cat((of_features_TF, beyond_TR), -1).T
        active_RT = torch.cat((f_TF, torch.ones_like(beyond_TR)), -1).T
        numbers_RT = onto(self._rows_R, device)[:, None].expand_as(values_RT)
        rows.add(values_RT, numbers_RT.masked_fill(active_RT == 0, -1), tile, (active_RT,))


def strongest_of(
    tops: Sequence[Top], firsts: Sequence[int], k: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The strongest rows of several dictionaries at each entry.

    Args:
        tops: what was kept of each dictionary.
        firsts: the number of each one's first row among all.
        k: how many to keep; None keeps all.

    Returns:
        Their values, their numbers among all rows, and their activations, each [<= k, N].
    """
    pairs = zip(tops, firsts, strict=True)
    numbers = [torch.where(top.index_KN < 0, -1, top.index_KN + first) for top, first in pairs]
    values_KN, index_KN = torch.cat([top.values_KN for top in tops]), torch.cat(numbers)
    activation_KN = torch.cat([top.beside[0] for top in tops])
    n = len(values_KN) if k is None else min(k, len(values_KN))
    kept = values_KN.abs().masked_fill(index_KN < 0, -1).topk(n, dim=0).indices
    return values_KN.gather(0, kept), index_KN.gather(0, kept), activation_KN.gather(0, kept)
