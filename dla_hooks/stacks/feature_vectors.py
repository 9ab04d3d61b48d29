"""The strongest features of each entry, as the unembedding reads them: one vector each.

A feature's vector is f_i W_dec[i]; at z it goes through the output projection, and through the norm
that may stand behind it. What a dictionary writes whatever the features (``b_dec``), and what it
leaves unexplained (``error``), are rows among the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.named_places import NamedPlace, feature_rows
from dla_hooks.modules.dictionaries import Codes, Dictionary
from dla_hooks.modules.linear import matrix
from dla_hooks.modules.onto import onto
from dla_hooks.projection.features import BEYOND
from dla_hooks.residual.gains import path_factors, times
from dla_hooks.residual.hooked import Hooked, hook_factor
from dla_hooks.stacks.checks import hold_alike
from dla_hooks.stacks.final_norm import FinalNorm
from dla_hooks.stacks.kept import Kept
from dla_hooks.stacks.strongest_rows import Offer, Rows, StrongestVectors

_ROWS_AT_ONCE = 1024


def feature_vectors(
    kept: Kept, final: FinalNorm, read: Sequence[tuple[NamedPlace, Dictionary]], top: int
) -> StrongestVectors:
    """The strongest features of some dictionaries, the rest of them, and what is at no place.

    Args:
        kept: what to keep of the run.
        final: the final norm.
        read: the dictionaries, each with its place.
        top: how many rows of each entry.
    """
    places, first, factors = list[Rows](), 0, path_factors(kept.stream)
    for at, dictionary in read:
        if at.write is not None:
            factor = factors[at.write.label]
        else:
            block = None if at.layer is None else kept.stream.blocks[at.block]
            factor = hook_factor(Hooked(at.block, block, at.name == "pre", at.place), factors)
        places.append(_Place(kept, final, at, dictionary, factor, first))
        first += places[-1].n_rows
    rows = feature_rows([(at, dictionary.n_features) for at, dictionary in read])
    return StrongestVectors(kept, final, places, rows, top)


class _Place(Rows):
    """The rows of one dictionary, and their way to the last stream."""

    def __init__(
        self,
        kept: Kept,
        final: FinalNorm,
        at: NamedPlace,
        dictionary: Dictionary,
        factor: Tensor | None,
        first: int,
    ) -> None:
        self._kept, self._final, self._at, self._factor = kept, final, at, factor
        self._dictionary, self.first = dictionary, first
        self.n_rows = self.most = dictionary.n_features + BEYOND
        site = at.heads
        self._x = kept.at(at.place) if site is None else kept.heads(site)
        norm = None if site is None else site.post_norm_place
        self._after: Any = None if norm is None else kept.scale(norm.ahead)
        self._found: tuple[Tensor, Tensor] | None = None

    def hold(self) -> None:
        """Hold what the rows make up against what stands at the place."""
        x_NI = self._input(slice(None))
        codes, beyond_NBI = self._read(x_NI)
        made_NI = self._features(codes).to(x_NI) @ self._columns()[0].to(x_NI)
        what = f"the features, b_dec and error at {self._at.label}"
        hold_alike(self._kept, what, made_NI + beyond_NBI.sum(1), x_NI)

    def offer(self, place: slice, top: int) -> Offer:
        """The rows that wrote most at some entries."""
        x_NI = self._input(place)
        codes, beyond_NBI = self._read(x_NI)
        W_FI, size_F = self._columns()
        f_NF = self._features(codes).to(x_NI)
        scale_N1 = None if self._after is None else self._kept.flat(self._after)[place].to(x_NI)
        beyond_NBM = self._wrote(beyond_NBI, None if scale_N1 is None else scale_N1[:, None])
        sizes_NF = f_NF.abs() * size_F.to(f_NF)
        if scale_N1 is not None:
            sizes_NF = sizes_NF / scale_N1
        active_NF = codes.f_TF.to(f_NF.device) != 0
        n, n_kept = len(x_NI), min(top, self._dictionary.n_features)
        sizes_NC, index_NC = sizes_NF.masked_fill(~active_NF, -1).topk(n_kept)
        f_NC, last = f_NF.gather(-1, index_NC), self._dictionary.n_features
        beyond_B = torch.arange(last, last + BEYOND, device=f_NF.device)

        def wrote(entries_J: Tensor, columns_J: Tensor) -> Tensor:
            is_beyond_J = columns_J >= n_kept
            number_J = columns_J.masked_fill(is_beyond_J, 0)
            x_JI = f_NC[entries_J, number_J][:, None] * W_FI[index_NC[entries_J, number_J]].to(x_NI)
            found_JM = self._wrote(x_JI, None if scale_N1 is None else scale_N1[entries_J])
            own = entries_J[is_beyond_J], columns_J[is_beyond_J] - n_kept
            found_JM[is_beyond_J] = beyond_NBM[own].to(found_JM)
            return found_JM

        every_NM = self._wrote(f_NF @ W_FI.to(f_NF), scale_N1) + beyond_NBM.sum(1)
        return Offer(
            torch.cat((sizes_NC, self._final.size(beyond_NBM).to(sizes_NC)), -1),
            torch.cat((index_NC, beyond_B.expand(n, -1)), -1),
            active_NF.sum(-1) + BEYOND,
            every_NM,
            wrote,
        )

    def _input(self, place: slice) -> Tensor:
        return self._kept.flat(self._x)[place].to(self._kept.stream.work_dtype)

    def _read(self, x_NI: Tensor) -> tuple[Codes, Tensor]:
        """What the dictionary makes of the activations, and b_dec and error [N, 2, width]."""
        read = self._dictionary
        codes = read.encode(x_NI - x_NI.mean(-1, keepdim=True) if read.centred else x_NI)
        error_NI = x_NI - read.decode(codes).to(x_NI)
        bias_NI = read.bias().to(x_NI).expand_as(x_NI)
        if codes.scale_T1 is not None:
            bias_NI = bias_NI * codes.scale_T1.to(x_NI)
        if codes.offset_T1 is not None:
            bias_NI = bias_NI + codes.offset_T1.to(x_NI)
        return codes, torch.stack((bias_NI, error_NI), 1)

    def _features(self, codes: Codes) -> Tensor:
        """What multiplies the features' vectors [N, n_features]."""
        return codes.f_TF if codes.scale_T1 is None else codes.f_TF * codes.scale_T1

    def _columns(self) -> tuple[Tensor, Tensor]:
        """The features' vectors [n_features, width], and what sizes they have behind all norms."""
        if self._found is None:
            read, dtype = self._dictionary, self._kept.stream.work_dtype
            eye_II = torch.eye(read.width, dtype=read.dtype, device="cpu")
            W_FI = read.pull_back(onto(eye_II, read.device)).T
            tiles = W_FI.split(_ROWS_AT_ONCE)
            sizes = [self._final.size(self._wrote(tile.to(dtype), None)) for tile in tiles]
            self._found = W_FI, torch.cat(sizes)
        return self._found

    def _wrote(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """What stands at the place [..., width], as it stands in the last stream."""
        site = self._at.heads
        if site is not None:
            W_MI = matrix(site.linear)
            x = x.to(W_MI.device) @ W_MI.T.to(x.dtype)
            if self._after is not None:
                x = self._kept.norm(self._after).at_scale_one(x)
                x = x if scale is None else x / scale.to(x)
        return times(x, self._factor)
