"""What experts made of the entries in view, as scalars: by asking them again, or as they work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.errors import HookError
from dla_hooks.modules.experts import (
    DownInputs,
    ExpertsCall,
    ExpertsTap,
    is_sorted,
    pull_back_down,
    shows_down_inputs,
)
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.kernels import project
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.tiles import View

Put = Callable[[slice | Tensor, Tensor, Tensor, Tensor], None]
"""Takes entries, and the numbers (-1 for nobody), weights and votes of their slots, each [T, k]."""


class Voters:
    """The experts of one sublayer, and the directions that their outputs are projected on.

    Args:
        place: the module that holds them.
        n: how many there are.
        k: how many each position goes to; 0 where each reads every position.
        directions: at their outputs.
        slots: in how many slots one of them is asked alone.
    """

    def __init__(
        self, place: Place, n: int, k: int, directions: Directions, slots: int = 1
    ) -> None:
        self.place, self.n, self.k, self.directions = place, n, k, directions
        self._slots = slots
        self._down: tuple[Tensor, Tensor] | None = None

    @property
    def n_slots(self) -> int:
        """How many experts an entry may have."""
        return self.k or self.n

    def taps(self, view: View, put: Put) -> list[Tap]:
        """What to watch while the entries in view are run."""
        if not self.k:
            return [Tap(self.place.ahead, lambda call: self._side_by_side(call, view, put))]
        if len(self.directions) == 1 and shows_down_inputs(self.place.module):
            return self._watch(view, put)
        tap = ExpertsTap(self.place.ahead, lambda call: self._ask(tap, call, view, put))
        return [tap]

    def _read(self, call: Call) -> ExpertsCall:
        seen = ExpertsCall.read(call.args, call.kwargs)
        if seen is None or seen.index.shape[-1] != self.k:
            raise HookError(
                f"{self.place.name} was called otherwise than in a short run: not with hidden "
                f"states and {self.k} experts for each. Hooks that change its arguments do this"
            )
        return seen

    def _ask(self, tap: ExpertsTap, call: Call, view: View, put: Put) -> None:
        seen, k, dtype = self._read(call), self.k, self.directions.dtype
        index, weights = seen.index.reshape(-1, k), seen.weights.reshape(-1, k)
        device = seen.hidden.device
        for tile in view.tiles(k * seen.hidden.shape[-1], device):
            index_TK, known_TK = self._known(view.take(index, tile.place))
            weights_TK = view.take(weights, tile.place)
            votes_TK = torch.zeros(index_TK.shape, dtype=dtype, device=device)
            entry_P = known_TK.nonzero()[:, 0]
            if len(entry_P):
                hidden_PD = view.take(seen.hidden, tile.place).index_select(0, entry_P)
                index_P = index_TK[known_TK]
                with tap.as_it_ran():
                    out_PM = seen.again(self.place.module, hidden_PD, index_P, self._slots)
                d_KM = self.directions.at(tile, device)
                if len(d_KM) > 1:
                    d_KM = tile.spread(d_KM).index_select(0, entry_P)
                votes_TK[known_TK] = torch.linalg.vecdot(out_PM.to(dtype), d_KM)
            put(tile.index, index_TK, weights_TK * known_TK, votes_TK)

    def _side_by_side(self, call: Call, view: View, put: Put) -> None:
        """All experts read every position, times a score that is zero for those not chosen."""
        x_END, y_END = (x.unflatten(0, (self.n, -1)) for x in (call.entered, call.left))
        device = y_END.device
        index = torch.arange(self.n, device=device)
        for tile in view.tiles(self.n * x_END.shape[-1], device):
            chosen = [view.take(x_ND, tile.place).any(-1) for x_ND in x_END]
            known_TE = torch.stack(chosen, 1)
            d_KM = tile.spread(self.directions.at(tile, device))
            votes = [view.take(y_ND, tile.place).to(d_KM) for y_ND in y_END]
            votes_TE = torch.stack([torch.linalg.vecdot(y_TM, d_KM) for y_TM in votes], 1)
            put(tile.index, torch.where(known_TE, index, -1), known_TE, votes_TE * known_TE)

    def _watch(self, view: View, put: Put) -> list[Tap]:
        """Read the input of the down map; which row of it is whose, ahead of it."""
        if self._down is None and len(view) * self.k >= self.n:
            self._down = self._folded()
        calls: list[ExpertsCall] = []
        entered = Tap(self.place.entered, lambda call: calls.append(self._read(call)))

        def see(rows: Tensor) -> None:
            self._from_down(calls.pop(), rows, view, put)

        return [entered, DownInputs(self.place, _unused, on_rows=see)]

    def _from_down(self, seen: ExpertsCall, rows_SI: Tensor, view: View, put: Put) -> None:
        k = self.k
        index, weights = seen.index.reshape(-1, k), seen.weights.reshape(-1, k)
        device = rows_SI.device
        where = torch.arange(index.numel(), device=device)
        if is_sorted(self.place.module):  # as transformers sorts them
            where[index.reshape(-1).sort().indices] = where.clone()
        where = where.view(-1, k)
        # Small tiles: the run is at its peak of memory here.
        for tile in view.tiles(4 * k * rows_SI.shape[-1], device):
            index_TK, known_TK = self._known(view.take(index, tile.place))
            weights_TK, where_TK = (view.take(x, tile.place) for x in (weights, where))
            expert_P = index_TK[known_TK]
            votes_TK = torch.zeros(index_TK.shape, dtype=self.directions.dtype, device=device)
            if len(expert_P):
                (u_EI, of_bias_E), which_P = self._of_experts(expert_P)
                a_PI = rows_SI.index_select(0, where_TK[known_TK]).to(u_EI.dtype)
                products_P = torch.linalg.vecdot(a_PI, u_EI.index_select(0, which_P))
                votes_TK[known_TK] = of_bias_E[which_P] + products_P
            put(tile.index, index_TK, weights_TK * known_TK, votes_TK)

    def _folded(self, experts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        device = next(self.place.module.parameters()).device
        return pull_back_down(self.place.module, self.directions.on(device)[0], experts)

    def _of_experts(self, expert_P: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """What some experts are projected on, and which of it is whose.

        For few entries only the chosen experts' maps are read: to read all takes longer.
        """
        if self._down is not None:
            return self._down, expert_P
        chosen, which_P = expert_P.unique(return_inverse=True)
        return self._folded(chosen.tolist()), which_P

    def _known(self, index_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The experts, -1 where a slot names none (as for a token that is skipped)."""
        known_TK = (index_TK >= 0) & (index_TK < self.n)
        return index_TK.masked_fill(~known_TK, -1), known_TK


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every position goes to.

    Attributes:
        place: its module.
        gate: the module whose output, through a sigmoid, is its weight; None for a weight of 1.
        directions: where its output, times the factor, is added.
        factor: of its output.
    """

    place: Place
    gate: Place | None
    directions: Directions
    factor: float = 1.0


class SharedVotes:
    """Records the weights and votes of shared experts.

    Args:
        experts: the experts.
        n_entries: number of entries.
        dtype: of the numbers.
    """

    def __init__(self, experts: Sequence[SharedExpert], n_entries: int, dtype: torch.dtype) -> None:
        self._experts = experts
        self._rows = FixedRows(2 * len(experts), n_entries, dtype)  # what the gate put out, vote

    def taps(self, view: View) -> list[Tap]:
        """What to watch while the entries in view are run."""
        taps = []
        for number, one in enumerate(self._experts):
            taps.append(Tap(one.place, self._see(2 * number + 1, view, one.directions)))
            if one.gate is not None:
                alone = Directions.held(torch.ones(1, 1, dtype=one.directions.dtype, device="cpu"))
                taps.append(Tap(one.gate, self._see(2 * number, view, alone)))
        return taps

    def gathered(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """The weight [N] and the vote [N] of each, once."""
        found = []
        for one, (gate_N, vote_N) in zip(
            self._experts, self._rows.gathered(device).unflatten(0, (-1, 2)), strict=True
        ):
            weight_N = torch.ones_like(vote_N) if one.gate is None else gate_N.sigmoid()
            found.append((weight_N, vote_N * one.factor))
        return found

    def _see(self, row: int, view: View, directions: Directions) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            x = call.activation
            project(x, view, directions, self._rows.row(row, x.device))

        return see


def _unused(call: Call) -> None:
    raise AssertionError("this tap sees rows, not calls")
