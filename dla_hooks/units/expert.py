"""Experts: what each expert of a mixture wrote, and with which weight.

A sublayer with experts writes the sum of what its chosen experts make of a position, each times a
routing weight. The weights are taken as they are: nothing is credited to the router. What follows
the sum (factors, linear maps, norms frozen at their actual scale) is folded into the directions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dla_hooks.backends import Conventions
from dla_hooks.calibration.expert_sites import expert_rows, expert_sites
from dla_hooks.calibration.expert_way import ExpertSite
from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.inputs.options import some_layers, whole_number
from dla_hooks.modules.hooks import Place, Tap
from dla_hooks.modules.linear import bias_of, check_readable, declared_width, pull_back
from dla_hooks.projection.directions import of_constants
from dla_hooks.projection.slots import ExpertRows, Slots
from dla_hooks.projection.tiles import View
from dla_hooks.projection.votes import SharedExpert, SharedVotes, Voters
from dla_hooks.projection.ways import NormScales, Step, Way, WayHooks
from dla_hooks.residual.gains import times
from dla_hooks.residual.stream import Stream
from dla_hooks.results.row_runs import RowRuns, Run
from dla_hooks.results.rows import Row, Words
from dla_hooks.units.base import Claim, RankedSplit, Recorder, Split, Unit, UnitPlan
from dla_hooks.units.parts import Parts
from dla_hooks.units.parts_plan import PartsPlan


class Experts(Unit):
    """``L3E5``, ``L3S0``, …, ``remainder``: every expert, and what no expert wrote.

    ``L3E5`` is a routed expert, ``L3S0`` one that every token goes to (a shared expert, or the
    dense branch beside the routed ones). Beside each row stand its ``weight`` and its ``vote``:
    ``row = weight * vote``. The vote is what the expert's output gives by itself, in logits. The
    weight of a shared expert is that of its gate, or 1. Where a token does not go to an expert,
    row, weight and vote are 0. In Llama 4 the score multiplies what the expert reads, and not what
    it writes; there the weight is 1.

    Args:
        layers: the layers to look at, or one of them; None is all that have experts.
        top: keep the strongest so many at each position, of all layers; None keeps every row.

    >>> import dla_hooks
    >>> dla_hooks.Experts(layers=[3], top=8)
    Experts(layers=(3,), top=8)
    """

    words = Words(
        name="expert",
        title="Experts",
        sentence="experts: what each expert wrote",
        index="expert",
        chart="heatmap",
        remainder="remainder",
        remainder_is="what no expert wrote",
        beside=("weight", "vote"),
    )
    of_every_model = False
    taken_out = ("expert", "shared")

    def __init__(self, layers: int | Iterable[int] | None = None, top: int | None = None) -> None:
        self.layers = None if layers is None else some_layers(layers)
        self.top = None if top is None else whole_number(top, "top", least=1)

    @classmethod
    def of_layer(cls, layer: int) -> Experts:
        """All experts of one layer."""
        return cls(layers=layer)

    def places(self, stream: Stream) -> list[Place]:
        """Every write, and the last stream; experts are no places that a cache holds."""
        return [*(write.place for write in stream.writes), stream.last]

    def prepare(self, parts: PartsPlan, conventions: Conventions) -> UnitPlan:
        """Find the experts, and fold the directions through what follows them.

        Raises:
            InputError: for a layer that has no experts.
            UnsupportedModelError: for a model without experts, or with some that cannot be told
                apart.
        """
        return _ExpertsPlan(self, parts)


class _ExpertsPlan(UnitPlan):
    """The experts of all layers on one model and target."""

    def __init__(self, unit: Experts, parts: PartsPlan) -> None:
        super().__init__(unit)
        stream, self.top = parts.stream, unit.top
        sites = expert_sites(stream, unit.layers)
        self.layers, runs = list[_Layer](), list[Run]()
        for number, site in enumerate(sites):
            sub = sum(before.block == site.block for before in sites[:number])
            self.layers.append(_Layer(parts, site, first=sum(run.n for run in runs)))
            runs += expert_rows(site, stream.blocks[site.block].layer, sub)
        self.experts = RowRuns(runs)
        self.rows = [*self.experts, Row(unit.words.remainder, unit.words.remainder)]
        self.dtype = stream.work_dtype
        self.ways = [layer.way for layer in self.layers]
        # What the sublayers write besides experts: biases, betas, with the step ahead of which.
        self.constants = [(n, start) for n, x in enumerate(self.layers) for start, _ in x.constants]
        vectors = [(x.way.directions[start], c) for x in self.layers for start, c in x.constants]
        self.of_constants = of_constants(vectors)

    def recorder(self, view: View) -> Recorder:
        return _ExpertsRecorder(self, view)


class _Layer:
    """The experts of one sublayer, with the way from them to the stream.

    Args:
        parts: the parts of the stream.
        site: where they are.
        first: the row of the first of them among the unit's.
    """

    def __init__(self, parts: PartsPlan, site: ExpertSite, first: int) -> None:
        stream, self.site, self.first = parts.stream, site, first
        block = stream.blocks[site.block]
        self.write = next(write for write in block.writes if write.label == site.label)

        def place(path: str) -> Place:
            return Place(block.module.get_submodule(path), f"{block.name}.{path}")

        steps = [_step(stream, place(path)) for path in site.steps]
        if site.factor is not None:
            factor = site.factor
            steps.append(Step(lambda d_KM: times(d_KM, factor)))
        self.at_sum = len(steps)
        steps += [_step(stream, place(path)) for path in site.tail]
        self.at_term = len(steps)
        if self.write.post_norm is not None:
            steps.append(_step(stream, self.write.place))
        self.way = Way(steps, parts.directions(site.label))
        directions, at_sum = self.way.directions, self.way.directions[self.at_sum]
        self.voters = Voters(place(site.path), site.n, site.k, directions[0], site.slots)
        self.n_rows = site.n + len(site.shared)
        self.shared = [
            SharedExpert(
                place(one.path), None if one.gate is None else place(one.gate), at_sum, one.factor
            )
            for one in site.shared
            if not one.label
        ]
        self.constants = [
            (n + 1, step.constant) for n, step in enumerate(steps) if step.constant is not None
        ]
        if site.constant is not None:
            self.constants.append((self.at_sum, site.constant))

    def way_to_stream(self) -> list[tuple[Place, int]]:
        """The modules on the way, each with the number of the step that follows it."""
        places = [(n + 1, step.place) for n, step in enumerate(self.way.steps)]
        found = {self.voters.place: 0} | {p: after for after, p in places if p is not None}
        if self.site.inside and self.write.module not in {place.module for place in found}:
            found[Place(self.write.module, self.site.label, self.write.use)] = self.at_term
        return list(found.items())

    def claim(self, sum_N: Tensor, parts: Parts) -> Claim:
        """That experts, constants and hooks are what the sublayer wrote."""
        rounds = bool(self.way.norms_from(0)) or self.site.rounds
        what = [f"the experts in {self.voters.place.name}"]
        return Claim(what, sum_N[None], parts.of([self.site.label]), through_norm=rounds)


class _ExpertsRecorder(Recorder):
    """All layers' experts in one run."""

    def __init__(self, plan: _ExpertsPlan, view: View) -> None:
        self._plan, n, dtype = plan, len(view), plan.dtype
        self._slots = Slots([layer.voters.n_slots for layer in plan.layers], n, dtype)
        self._shared = SharedVotes([x for layer in plan.layers for x in layer.shared], n, dtype)
        self._scales = NormScales(plan.ways, n, dtype)
        self._hooks = WayHooks(
            [(way, x.way_to_stream()) for way, x in zip(plan.ways, plan.layers, strict=True)],
            self._scales,
            n,
            dtype,
        )

    def taps(self, view: View) -> list[Tap]:
        """The experts, the shared ones with their gates, the norms behind them, hooks."""
        taps = self._scales.taps(view)
        for number, layer in enumerate(self._plan.layers):
            taps += layer.voters.taps(view, partial(self._slots.put, number))
        return [*taps, *self._shared.taps(view), *self._hooks.taps(view)]

    def finish(self, parts: Parts) -> Split | RankedSplit:
        plan, final_N = self._plan, parts.reading.scale_N
        self._scales.finish(final_N.device)
        kept = ExpertRows(len(plan.rows) - 1, plan.top, final_N)
        slots = self._slots.gathered(final_N.device)
        shared = iter(self._shared.gathered(final_N.device))
        hooks = {n: row_N / final_N for n, row_N in self._hooks.finish(final_N.device).items()}
        claims = list[Claim]()
        for number, (layer, (index_KN, weights_KN, votes_KN)) in enumerate(
            zip(plan.layers, slots, strict=True)
        ):
            votes_KN = self._scales.divide(votes_KN, number, 0) / final_N
            rows_KN = torch.where(index_KN < 0, index_KN, index_KN + layer.first)
            sum_N = kept.add(rows_KN, weights_KN, votes_KN)
            for place, one in enumerate(layer.site.shared):
                row = torch.full_like(index_KN[:1], layer.first + layer.site.n + place)
                if one.label:  # a write of its own
                    kept.add(row, torch.ones_like(votes_KN[:1]), parts.of([one.label]))
                    continue
                weight_N, vote_N = next(shared)
                vote_N = self._scales.divide(vote_N, number, layer.at_sum) / final_N
                sum_N = sum_N + kept.add(row, weight_N[None], vote_N[None])
            sum_N = sum_N + self._constants(number, parts) / final_N + hooks.get(number, 0)
            if layer.site.label not in parts.missing:
                claims.append(layer.claim(sum_N, parts))
        return self._split(kept, hooks, parts, claims)

    def _split(
        self, kept: ExpertRows, hooks: dict[int, Tensor], parts: Parts, claims: list[Claim]
    ) -> Split | RankedSplit:
        """The rows, and what is in none of them."""
        reading, rows = parts.reading, self._plan.rows
        whole_N, names = reading.whole_N, self._plan.unit.words.beside
        norms = self._scales.largest_misfits()
        if kept.top is None:
            rows, numbers = self._with_hooks(kept.all, hooks)
            rest_N = whole_N - numbers[0].sum(0)
            nothing_N = torch.zeros_like(rest_N)
            numbers = torch.cat((numbers, torch.stack((rest_N, nothing_N, nothing_N))[:, None]), 1)
            beside = dict(zip(names, numbers[1:], strict=True))
            return Split([*rows, self._plan.rows[-1]], numbers[0], claims, norms, beside)
        top = kept.top.gathered(torch.ones_like(whole_N), parts.entries)
        return RankedSplit(
            rows=self._plan.experts,
            values_KN=top.values_KN,
            index_KN=top.index_KN,
            rest_N=top.rest_N,
            remainder_N=whole_N - top.sum_N,
            row_sums_RB=top.row_sums_RB,
            claims=claims,
            norms=norms,
            beside=dict(zip(names, top.beside, strict=True)),
        )

    def _with_hooks(
        self, numbers_XCN: Tensor, hooks: dict[int, Tensor]
    ) -> tuple[list[Row], Tensor]:
        """Each layer's rows, and behind them what hooks wrote there."""
        rows, numbers = list[Row](), list[Tensor]()
        for number, layer in enumerate(self._plan.layers):
            here = slice(layer.first, layer.first + layer.n_rows)
            rows += self._plan.rows[here]
            numbers.append(numbers_XCN[:, here])
            if number in hooks:
                label = f"{_prefix(rows[-1].layer, rows[-1].sub)}hook"
                rows.append(replace(rows[-1], label=label, kind="hook", index=None))
                nothing_N = torch.zeros_like(hooks[number])
                numbers.append(torch.stack((hooks[number], nothing_N, nothing_N))[:, None])
        return rows, torch.cat(numbers, 1)

    def _constants(self, number: int, parts: Parts) -> Tensor:
        """What a layer's sublayer writes besides experts, such as biases."""
        plan, scale_N = self._plan, parts.reading.scale_N
        found = torch.zeros_like(scale_N)
        if plan.of_constants is not None:
            for (layer, start), of_K in zip(plan.constants, plan.of_constants, strict=True):
                if layer == number:
                    of_N = parts.entries.of_target(of_K.to(scale_N.device)).expand_as(found)
                    found = found + self._scales.divide(of_N, number, start)
        return found


def _step(stream: Stream, place: Place) -> Step:
    """A linear map or a norm of the model, as a step of the way."""
    linear = place.module
    if declared_width(linear) is None:
        norm = norm_at(stream, place)
        return Step(norm.pull_back, place, norm, norm.beta if bool(norm.beta.any()) else None)
    check_readable(linear, place.name)
    return Step(lambda d_KM: pull_back(linear, d_KM), place, constant=bias_of(linear))


def _prefix(layer: int | None, sub: int | None) -> str:
    return f"L{layer}.{sub}" if sub else f"L{layer}"
