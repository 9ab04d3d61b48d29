"""The experts that each entry went to, as the unembedding reads them: one vector each.

An expert's vector is its routing weight times what it made of the position, put through what
follows the experts: linear maps, factors, and norms frozen at their scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dla_hooks.calibration.expert_sites import expert_rows, expert_sites
from dla_hooks.calibration.expert_way import ExpertSite, SharedSite
from dla_hooks.errors import HookError, UnsupportedModelError
from dla_hooks.modules.experts import ExpertsCall, ExpertsTap
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.linear import bias_of, check_readable, declared_width, matrix
from dla_hooks.modules.user_hooks import is_hooked
from dla_hooks.projection.slots import once
from dla_hooks.residual.gains import path_factors, times
from dla_hooks.results.row_runs import RowRuns, Run
from dla_hooks.stacks.checks import WriteSum
from dla_hooks.stacks.final_norm import FinalNorm
from dla_hooks.stacks.kept import Kept
from dla_hooks.stacks.strongest_rows import Offer, Rows, StrongestVectors


def expert_vectors(
    kept: Kept, final: FinalNorm, top: int | None, layers: tuple[int, ...] | None
) -> StrongestVectors:
    """The strongest experts of each entry, the rest of them, and what no expert wrote.

    Args:
        kept: what to keep of the run.
        final: the final norm.
        top: how many of each entry; None is all that it went to.
        layers: of which layers; None for all that have experts.

    Raises:
        InputError: for a layer without experts.
        UnsupportedModelError: for a model without experts that can be told apart.
    """
    stream, factors = kept.stream, path_factors(kept.stream)
    sites = expert_sites(stream, layers)
    places, runs, first = list[Rows](), list[Run](), 0
    for number, site in enumerate(sites):
        sub = sum(before.block == site.block for before in sites[:number])
        runs += expert_rows(site, stream.blocks[site.block].layer, sub)
        places.append(_Layer(kept, final, site, factors, first))
        first += places[-1].n_rows
    return StrongestVectors(kept, final, places, RowRuns(runs), top)


class _Step(NamedTuple):
    """A linear map, or a norm with the key of its scale."""

    place: Place
    norm: Any = None


class _Layer(Rows):
    """The experts of one sublayer, and their way to the last stream."""

    def __init__(
        self,
        kept: Kept,
        final: FinalNorm,
        site: ExpertSite,
        factors: dict[str, Tensor | None],
        first: int,
    ) -> None:
        self._kept, self._final, self._site, self._factors = kept, final, site, factors
        self.first, self.n_rows = first, site.n + len(site.shared)
        self.most = (site.k or site.n) + len(site.shared)
        block = kept.stream.blocks[site.block]
        self._write = next(write for write in block.writes if write.label == site.label)

        def place(path: str) -> Place:
            return Place(block.module.get_submodule(path), f"{block.name}.{path}")

        self._ahead = [self._step(place(path)) for path in site.steps]
        self._tail = [self._step(place(path)) for path in site.tail]
        if self._write.post_norm is not None:
            self._tail.append(_Step(self._write.place, kept.scale(self._write.place.ahead)))
        self._slots: tuple[Tensor, Tensor, Tensor] | None = None  # numbers, weights, outputs
        self._place = place(site.path)
        if not kept.watch([self._tap()]):
            raise UnsupportedModelError(
                "a cache does not hold what each expert made of a position; give the model an "
                "input to run instead"
            )
        self._shared = [self._keep_shared(one, place) for one in site.shared]
        self._whole = WriteSum(kept, self._write, "the experts")
        ends = [self._place, *(s.place for s in (*self._ahead, *self._tail)), self._write.place]
        self._hooked = any(is_hooked(end) for end in ends)

    def hold(self) -> None:
        """Hold the experts with all constants against what the sublayer wrote."""
        if self._hooked:
            return  # what hooks write on the way is in the remainder
        place = slice(None)
        _, weights_NK, outputs_NKM = self._experts(place)
        y = (outputs_NKM * weights_NK[..., None]).sum(1)
        y = self._through(y, self._ahead, place, constants=True)
        y = times(y, self._site.factor)
        for one, vector_NM in zip(self._site.shared, self._shared_at(place), strict=True):
            y = y if one.label else y + vector_NM.to(y)
        if self._site.constant is not None:
            y = y + self._site.constant.to(y)
        y = self._through(y, self._tail, place, constants=True)
        norms = any(step.norm is not None for step in (*self._ahead, *self._tail))
        self._whole.hold_vectors(y, through_norm=norms or self._site.rounds)

    def offer(self, place: slice, top: int) -> Offer:
        """The experts that some entries went to."""
        index_NK, weights_NK, outputs_NKM = self._experts(place)
        y = self._through(outputs_NKM * weights_NK[..., None], self._ahead, place)
        y = self._through(times(y, self._site.factor), self._tail, place)
        parts = [times(y, self._factors[self._site.label])]
        there = [index_NK >= 0]
        for one, vector_NM in zip(self._site.shared, self._shared_at(place), strict=True):
            if not one.label:
                vector_NM = self._through(vector_NM, self._tail, place)
            factor = self._factors[one.label or self._site.label]
            parts.append(times(vector_NM, factor)[:, None].to(y))
            there.append(torch.ones_like(there[0][:, :1]))
        wrote_NCM, there_NC = torch.cat(parts, 1), torch.cat(there, 1)
        numbers_S = torch.arange(self._site.n, self.n_rows, device=index_NK.device)
        index_NC = torch.cat((index_NK, numbers_S.expand(len(index_NK), -1)), 1)
        sizes_NC = self._final.size(wrote_NCM).to(wrote_NCM.device).masked_fill(~there_NC, -1)
        wrote_NCM = wrote_NCM * there_NC[..., None]

        def wrote(entries_J: Tensor, columns_J: Tensor) -> Tensor:
            return wrote_NCM[entries_J, columns_J]

        return Offer(sizes_NC, index_NC, there_NC.sum(1), wrote_NCM.sum(1), wrote)

    def _experts(self, place: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The slots of some entries: experts [N, k] (-1 for nobody), weights, outputs."""
        assert self._slots is not None
        index_NK, weights_NK, outputs_NKM = (each[place] for each in self._slots)
        outputs_NKM = outputs_NKM.to(self._kept.stream.work_dtype)
        index_KN, weights_KN = once(index_NK.T, weights_NK.T.to(outputs_NKM))
        return index_KN.T, weights_KN.T, outputs_NKM

    def _tap(self) -> Tap:
        site, ahead = self._site, self._place.ahead
        if not site.k:
            return Tap(ahead, self._see_side_by_side)
        tap = ExpertsTap(ahead, lambda call: self._ask(tap, call))
        return tap

    def _ask(self, tap: ExpertsTap, call: Call) -> None:
        """Ask the chosen experts again, for the selected tokens."""
        seen, site = ExpertsCall.read(call.args, call.kwargs), self._site
        if seen is None or seen.index.shape[-1] != site.k:
            raise HookError(
                f"{self._place.name} was called otherwise than in a short run: not with hidden "
                f"states and {site.k} experts for each. Hooks that change its arguments do this"
            )
        take, k = self._kept.take, site.k
        index_NK, weights_NK = (take(x.reshape(-1, k)) for x in (seen.index, seen.weights))
        known_NK = (index_NK >= 0) & (index_NK < site.n)
        entry_P, hidden_ND = known_NK.nonzero()[:, 0], take(seen.hidden)
        outputs_NKM = hidden_ND.new_zeros(*index_NK.shape, call.activation.shape[-1])
        if len(entry_P):
            with tap.as_it_ran():
                out_PM = seen.again(
                    self._place.module, hidden_ND[entry_P], index_NK[known_NK], site.slots
                )
            outputs_NKM = outputs_NKM.to(out_PM)
            outputs_NKM[known_NK] = out_PM
        self._slots = index_NK.masked_fill(~known_NK, -1), weights_NK * known_NK, outputs_NKM

    def _see_side_by_side(self, call: Call) -> None:
        """All experts read every position, times a score that is zero for those not chosen."""
        x_END, y_END = (x.unflatten(0, (self._site.n, -1)) for x in (call.entered, call.left))
        known_NE = torch.stack([self._kept.take(x_ND).any(-1) for x_ND in x_END], 1)
        outputs_NEM = torch.stack([self._kept.take(y_NM) for y_NM in y_END], 1)
        index_E = torch.arange(self._site.n, device=known_NE.device)
        self._slots = torch.where(known_NE, index_E, -1), known_NE, outputs_NEM

    def _keep_shared(self, one: SharedSite, place: Callable[[str], Place]) -> tuple[Any, Any]:
        """Keep what a shared expert and its gate put out."""
        if one.label:
            writes = self._kept.stream.blocks[self._site.block].writes
            return self._kept.write(next(w for w in writes if w.label == one.label)), None
        gate = None if one.gate is None else self._kept.at(place(one.gate))
        return self._kept.at(place(one.path)), gate

    def _shared_at(self, place: slice) -> list[Tensor]:
        """What the shared experts wrote at some entries, times their gates and factors."""
        found = []
        for one, (key, gate) in zip(self._site.shared, self._shared, strict=True):
            out_NM = self._kept.flat(key)[place].to(self._kept.stream.work_dtype) * one.factor
            if gate is not None:
                out_NM = out_NM * self._kept.flat(gate)[place].to(out_NM).sigmoid()
            found.append(out_NM)
        return found

    def _step(self, place: Place) -> _Step:
        if declared_width(place.module) is None:
            return _Step(place, self._kept.scale(place.ahead))
        check_readable(place.module, place.name)
        return _Step(place)

    def _through(
        self, y: Tensor, steps: list[_Step], place: slice, *, constants: bool = False
    ) -> Tensor:
        """Put vectors [N, ..., width] through some steps, with what these add or without."""
        for step in steps:
            if step.norm is None:
                W_OI = matrix(step.place.module)
                y = y.to(W_OI.device) @ W_OI.T.to(y.dtype)
                added = bias_of(step.place.module)
            else:
                norm = self._kept.norm(step.norm)
                scale_N1 = self._kept.flat(step.norm)[place].to(y)
                y = norm.at_scale_one(y) / (scale_N1 if y.ndim == 2 else scale_N1[:, None])
                added = norm.beta
            if constants and added is not None:
                y = y + added.to(y)
        return y
