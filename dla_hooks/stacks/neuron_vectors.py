"""The strongest neurons of each entry, as the unembedding reads them: one vector each.

A neuron's vector is a_i W_down[:, i], through the norm that may stand behind its MLP. How large it
is behind the final norm is |a_i| times a number of the neuron's own, but for factors of the entry.
So the strongest are found without any vector, and the vectors of these alone are built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.chosen_neurons import chosen_neurons
from dla_hooks.calibration.last_maps import NeuronSite
from dla_hooks.modules.hooks import Place
from dla_hooks.modules.linear import check_readable, input_width, matrix
from dla_hooks.modules.user_hooks import is_hooked
from dla_hooks.residual.gains import path_factors, times
from dla_hooks.residual.stream import WriteSite
from dla_hooks.results.row_runs import RowRuns, Run
from dla_hooks.stacks.checks import WriteSum
from dla_hooks.stacks.final_norm import FinalNorm
from dla_hooks.stacks.kept import Kept
from dla_hooks.stacks.strongest_rows import Offer, Rows, StrongestVectors

_COLUMNS_AT_ONCE = 1024


def neuron_vectors(
    kept: Kept, final: FinalNorm, top: int, layers: tuple[int, ...] | None
) -> StrongestVectors:
    """The strongest neurons, the rest of them, and what no neuron wrote.

    Args:
        kept: what to keep of the run.
        final: the final norm.
        top: how many neurons of each entry.
        layers: of which layers; None for all that have neurons.

    Raises:
        InputError: for a layer that the model does not have.
        UnsupportedModelError: for a model, or a layer that was asked for, without neurons.
    """
    factors = path_factors(kept.stream)
    mlps, runs, first = list[_Mlp](), list[Run](), 0
    for write, site, sub in chosen_neurons(kept.stream, layers):
        mlp = _Mlp(kept, final, write, site, factors[write.label], first)
        layer = f"L{write.layer}.{sub}" if sub else f"L{write.layer}"
        runs.append(Run(f"{layer}N{{}}", "neuron", write.layer, sub, n=mlp.n_rows))
        mlps.append(mlp)
        first += mlp.n_rows
    return StrongestVectors(kept, final, mlps, RowRuns(runs), top)


class _Mlp(Rows):
    """The neurons of one MLP, and their way to the last stream."""

    def __init__(
        self,
        kept: Kept,
        final: FinalNorm,
        write: WriteSite,
        site: NeuronSite,
        factor: Tensor | None,
        first: int,
    ) -> None:
        self._kept, self._final, self._site, self._factor = kept, final, site, factor
        check_readable(site.linear, site.name)
        self.first = first
        self.n_rows = self.most = input_width(site.linear)
        self._sizes: Tensor | None = None
        self._acts = kept.neurons(site.place)
        self._after = None if site.norm is None else kept.scale(site.norm.ahead)
        self._whole = WriteSum(kept, write, "the neurons")
        before, behind = [*site.before], [*site.behind]
        if site.norm is not None:
            before.append((site.norm.entered, 1.0))
            behind.append((site.norm, site.norm_factor))
        self._before, self._behind = self._hooks(before), self._hooks(behind)

    def offer(self, place: slice, top: int) -> Offer:
        """The neurons that wrote most at some entries."""
        acts_NI = self.acts(place)
        every_NM = self.wrote(acts_NI @ self.columns().T.to(acts_NI))
        sizes_NI = acts_NI.abs() * self._column_sizes().to(acts_NI)
        sizes_NC, index_NC = sizes_NI.topk(min(top, self.n_rows))
        acts_NC = acts_NI.gather(-1, index_NC)

        def wrote(entries_J: Tensor, columns_J: Tensor) -> Tensor:
            columns = self.columns()
            W_JM = columns.T[index_NC[entries_J, columns_J].to(columns.device)].to(acts_NC)
            return self.wrote(acts_NC[entries_J, columns_J][:, None] * W_JM)

        count = torch.tensor(self.n_rows, device="cpu")
        return Offer(sizes_NC, index_NC, count, every_NM, wrote)

    def _column_sizes(self) -> Tensor:
        """The size [neuron] of what a neuron writes at an activation of one."""
        if self._sizes is None:
            dtype = self._kept.stream.work_dtype
            tiles = self.columns().T.split(_COLUMNS_AT_ONCE)
            sizes = [self._final.size(self.wrote(tile.to(dtype))) for tile in tiles]
            self._sizes = torch.cat(sizes)
        return self._sizes

    def columns(self) -> Tensor:
        """The last map's matrix [d_model, neuron]."""
        return matrix(self._site.linear)

    def acts(self, place: slice) -> Tensor:
        """The neurons' activations at some entries [entries, neuron], over the scale behind them.

        The scale is that of the norm that follows the MLP, where one does.
        """
        kept = self._kept
        acts = kept.flat(self._acts)[place].to(kept.stream.work_dtype)
        return acts if self._after is None else acts / kept.flat(self._after)[place].to(acts)

    def wrote(self, out: Tensor) -> Tensor:
        """What the last map puts out [..., d_model], as it stands in the last stream."""
        return times(self._through_norm(out * self._site.factor), self._factor)

    def hold(self) -> None:
        """Hold the neurons against what the MLP wrote."""
        site, written = self._site, list[Tensor]()
        for key, factor in self._before:
            wrote = self._through_norm(self._of_hook(key) * factor)
            if self._after is not None:
                wrote = wrote / self._kept.flat(self._after).to(wrote)
            written.append(wrote)
        written += [self._of_hook(key) * factor for key, factor in self._behind]
        hooks_NM = torch.stack(written).sum(0) if written else None
        factors = site.factor, site.norm_factor
        self._whole.hold(self._acts, site.linear, self.columns(), self._after, hooks_NM, factors)

    def _through_norm(self, x: Tensor) -> Tensor:
        if self._after is None:
            return x
        return self._kept.norm(self._after).at_scale_one(x) * self._site.norm_factor

    def _hooks(self, places: list[tuple[Place, float]]) -> list[tuple[Any, float]]:
        """Keep what the caller's hooks write at some places, with the constants behind these."""
        return [(self._kept.hook(place), factor) for place, factor in places if is_hooked(place)]

    def _of_hook(self, key: Any) -> Tensor:
        return self._kept.flat(key).to(self._kept.stream.work_dtype)
