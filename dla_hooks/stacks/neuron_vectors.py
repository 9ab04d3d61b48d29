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
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.hooks import Place
from dla_hooks.modules.linear import check_readable, input_width, matrix
from dla_hooks.modules.user_hooks import is_hooked
from dla_hooks.residual.gains import path_factors, times
from dla_hooks.residual.stream import WriteSite
from dla_hooks.results.row_runs import RowRuns, Run
from dla_hooks.stacks.checks import WriteSum
from dla_hooks.stacks.final_norm import FinalNorm
from dla_hooks.stacks.kept import Kept
from dla_hooks.stacks.row_vectors import RowVectors

_COLUMNS_AT_ONCE = 1024


class NeuronVectors(RowVectors):
    """The strongest neurons, the rest of them, and what no neuron wrote.

    Args:
        kept: what to keep of the run.
        final: the final norm.
        top: how many neurons of each entry.
        layers: of which layers; None for all that have neurons.

    Attributes:
        rows: a record of every neuron.

    Raises:
        InputError: for a layer that the model does not have.
        UnsupportedModelError: for a model, or a layer that was asked for, without neurons.
    """

    rows: RowRuns

    def __init__(
        self, kept: Kept, final: FinalNorm, top: int, layers: tuple[int, ...] | None
    ) -> None:
        self._kept, self._final = kept, final
        factors = path_factors(kept.stream)
        self._mlps: list[_Mlp] = []
        runs, first = list[Run](), 0
        for write, site, sub in chosen_neurons(kept.stream, layers):
            mlp = _Mlp(kept, write, site, factors[write.label], first)
            layer = f"L{write.layer}.{sub}" if sub else f"L{write.layer}"
            runs.append(Run(f"{layer}N{{}}", "neuron", write.layer, sub, n=mlp.width))
            self._mlps.append(mlp)
            first += mlp.width
        self.rows = RowRuns(runs)
        self._top = min(top, first)
        self._index_NK = torch.full((len(kept.entries), self._top), -1, device="cpu")
        self.labels = [*(f"#{place}" for place in range(1, self._top + 1)), "rest", "remainder"]
        self._sizes: list[Tensor] | None = None

    def index(self) -> Tensor:
        """Which neurons the rows are [row, *batch_and_pos]; -1 for no neuron, and at padding."""
        no_neuron = self._index_NK.new_full((len(self._index_NK), 2), -1)
        return self._kept.entries.unfold(torch.cat((self._index_NK, no_neuron), -1).T, padding=-1)

    @outside_autocast
    def hold(self) -> None:
        """Hold the neurons of every MLP against what it wrote.

        Raises:
            DecompositionError: when they do not make it up.
        """
        for mlp in self._mlps:
            mlp.hold()

    def at(self, place: slice) -> Tensor:
        """The rows at some entries [row, entries, d_model]."""
        whole_NM = self._final.whole(place)
        device, every_NM = whole_NM.device, torch.zeros_like(whole_NM)
        found = list[tuple[Tensor, ...]]()
        for mlp, size_I in zip(self._mlps, self._column_sizes(), strict=True):
            acts_NI = mlp.acts(place)
            every_NM += mlp.wrote(acts_NI @ mlp.columns().T.to(acts_NI)).to(device)
            sizes_NI = acts_NI.abs() * size_I.to(acts_NI)
            sizes, own = sizes_NI.topk(min(self._top, mlp.width))
            acts = acts_NI.gather(-1, own)
            found.append((sizes.to(device), (own + mlp.first).to(device), acts.to(device)))
        sizes_NC, index_NC, acts_NC = (torch.cat(each, -1) for each in zip(*found, strict=True))
        strongest = sizes_NC.topk(self._top).indices
        index_NK, acts_NK = index_NC.gather(-1, strongest), acts_NC.gather(-1, strongest)
        self._index_NK[place] = index_NK.to(self._index_NK)
        wrote_NKM = whole_NM.new_zeros(*index_NK.shape, whole_NM.shape[-1])
        for mlp in self._mlps:
            here = (index_NK >= mlp.first) & (index_NK < mlp.first + mlp.width)
            columns = mlp.columns()
            own = (index_NK[here] - mlp.first).to(columns.device)
            W_CM = columns.T[own].to(wrote_NKM)
            wrote_NKM[here] = mlp.wrote(acts_NK[here][:, None] * W_CM).to(wrote_NKM)
        wrote_KNM = wrote_NKM.transpose(0, 1)
        rest_NM = every_NM - wrote_KNM.sum(0)
        if self._top == len(self.rows):
            rest_NM.zero_()  # of rounding
        read = self._final.read(torch.cat((wrote_KNM, rest_NM[None])), place)
        return torch.cat((read, (whole_NM - read.sum(0))[None]))

    def _column_sizes(self) -> list[Tensor]:
        """For each MLP the size [neuron] of what a neuron writes at an activation of one."""
        if self._sizes is None:
            self._sizes = []
            for mlp in self._mlps:
                tiles = mlp.columns().T.split(_COLUMNS_AT_ONCE)
                dtype = self._kept.stream.work_dtype
                sizes = [self._final.size(mlp.wrote(tile.to(dtype))) for tile in tiles]
                self._sizes.append(torch.cat(sizes))
        return self._sizes


class _Mlp:
    """The neurons of one MLP, and their way to the last stream.

    Attributes:
        first: the number of its first neuron among all.
        width: how many there are.
    """

    def __init__(
        self, kept: Kept, write: WriteSite, site: NeuronSite, factor: Tensor | None, first: int
    ) -> None:
        self._kept, self._site, self._factor = kept, site, factor
        check_readable(site.linear, site.name)
        self.first, self.width = first, input_width(site.linear)
        self._acts = kept.neurons(site.place)
        self._after = None if site.norm is None else kept.scale(site.norm.ahead)
        self._whole = WriteSum(kept, write, "the neurons")
        before, behind = [*site.before], [*site.behind]
        if site.norm is not None:
            before.append((site.norm.entered, 1.0))
            behind.append((site.norm, site.norm_factor))
        self._before, self._behind = self._hooks(before), self._hooks(behind)

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
