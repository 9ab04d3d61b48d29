"""Experts: what each expert of a mixture wrote, and with which weight.

A sublayer with experts writes the sum of what its chosen experts make of a position, each times a
routing weight. The weights are taken as they are: nothing is credited to the router. What follows
the sum (factors, linear maps, norms frozen at their actual scale) is folded into the directions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dla_hooks.backends import Conventions
from dla_hooks.calibration.expert_sites import ExpertSite, SharedSite, expert_sites
from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.errors import InputError
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.linear import bias_of, check_readable, declared_width, pull_back
from dla_hooks.modules.user_hooks import is_hooked
from dla_hooks.projection.directions import Directions, of_constants
from dla_hooks.projection.hook_writes import HookWrites
from dla_hooks.projection.kernels import project
from dla_hooks.projection.ledger import FixedRows, TopRows
from dla_hooks.projection.slots import Slots
from dla_hooks.projection.tiles import Tile, View
from dla_hooks.projection.votes import Voters
from dla_hooks.projection.ways import NormScales, Step, Way
from dla_hooks.residual.gains import times
from dla_hooks.residual.stream import Stream
from dla_hooks.results.rows import Row, Words
from dla_hooks.units.base import Claim, RankedSplit, Recorder, Split, Unit, UnitPlan
from dla_hooks.units.parts import Parts, PartsPlan


class Experts(Unit):
    """``L3E5``, ``L3S0``, …, ``remainder``: every expert, and what no expert wrote.

    ``L3E5`` is a routed expert, ``L3S0`` one that every token goes to (a shared expert, or the
    dense branch beside the routed ones). Beside each row stand its ``weight`` and its ``vote``:
    ``row = weight * vote``. The vote is what the expert's output gives by itself, in logits. The
    weight of a shared expert is that of its gate, or 1. Where a token does not go to an expert,
    row, weight and vote are 0. In Llama 4 the score multiplies what the expert reads, and not what
    it writes; there the weight is 1.

    Args:
        layers: the layers to look at; None is all that have experts.
        top: keep the strongest so many at each position, of all layers; None keeps every row.

    Example:
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

    def __init__(self, layers: Iterable[int] | None = None, top: int | None = None) -> None:
        self.layers = None if layers is None else _layers(layers)
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
            raise InputError(f"top must be a positive number of rows, or None for all; got {top!r}")
        self.top = top

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
        sites = _chosen(expert_sites(stream), unit.layers, stream)
        self.layers: list[_Layer] = []
        self.rows: list[Row] = []
        for number, site in enumerate(sites):
            sub = sum(before.block == site.block for before in sites[:number])
            layer = _Layer(parts, site, first=len(self.rows))
            self.layers.append(layer)
            self.rows += _rows_of(site, stream.blocks[site.block].layer, sub)
        self.rows.append(Row(unit.words.remainder, unit.words.remainder))
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
        self.voters = Voters(place(site.path), site.n, site.k, self.way.directions[0])
        self.n_rows = site.n + len(site.shared)
        self.shared = [_Shared(one, place, self.way.directions[self.at_sum]) for one in site.shared]
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
            write = self.write
            at = Place(write.module, write.name if write.post_norm is None else "", write.use)
            found[at] = self.at_term
        return list(found.items())


class _Shared:
    """An expert that every position goes to."""

    def __init__(
        self, site: SharedSite, place: Callable[[str], Place], directions: Directions
    ) -> None:
        factor = site.factor
        self.site, self.label = site, site.label
        self.place = None if site.label else place(site.path)
        self.gate = None if site.gate is None else place(site.gate)
        self.directions = directions if factor == 1 else directions.then(lambda d: d * factor)


class _ExpertsRecorder(Recorder):
    """All layers' experts in one run."""

    def __init__(self, plan: _ExpertsPlan, view: View) -> None:
        self._plan, n, dtype = plan, len(view), plan.dtype
        self._slots = Slots([layer.voters.n_slots for layer in plan.layers], n, dtype)
        self._shared = [one for layer in plan.layers for one in layer.shared]
        # Of each shared expert its vote, and what its gate's sigmoid is taken of.
        self._aside = FixedRows(2 * len(self._shared), n, dtype)
        self._scales = NormScales(plan.ways, n, dtype)
        # What the caller's hooks write between the experts and the stream, by the layer's number.
        self._hooks: dict[int, tuple[HookWrites, list[int]]] = {}
        for number, layer in enumerate(plan.layers):
            found = [(p, after) for p, after in layer.way_to_stream() if is_hooked(p)]
            if found:
                places = [(place, layer.way.directions[after]) for place, after in found]
                self._hooks[number] = HookWrites(places, n, dtype), [after for _, after in found]

    def taps(self, view: View) -> list[Tap]:
        """The experts, the shared ones with their gates, the norms behind them, hooks."""
        taps = self._scales.taps(view)
        for number, layer in enumerate(self._plan.layers):
            taps += layer.voters.taps(view, partial(self._slots.put, number))
        for number, one in enumerate(self._shared):
            if one.place is not None:
                taps.append(Tap(one.place, partial(self._see_shared, 2 * number, one, view)))
            if one.gate is not None:
                taps.append(Tap(one.gate, partial(self._see_gate, 2 * number + 1, view)))
        return taps + [tap for writes, _ in self._hooks.values() for tap in writes.taps(view)]

    def finish(self, parts: Parts) -> Split | RankedSplit:
        plan, final_N = self._plan, parts.reading.scale_N
        self._scales.finish(final_N.device)
        kept = _Kept(parts, plan)
        slots = self._slots.gathered(final_N.device)
        aside = iter(self._aside.gathered(final_N.device).split(2))
        claims = []
        for number, (layer, (index_KN, weights_KN, votes_KN)) in enumerate(
            zip(plan.layers, slots, strict=True)
        ):
            votes_KN = self._scales.divide(votes_KN, number, 0) / final_N
            rows_KN = torch.where(index_KN < 0, index_KN, index_KN + layer.first)
            sum_N = kept.add(rows_KN, weights_KN, votes_KN)
            for place, one in enumerate(layer.shared):
                vote_N, gate_N = next(aside)
                weight_N = torch.ones_like(vote_N) if one.gate is None else gate_N.sigmoid()
                if one.label:
                    vote_N = parts.of([one.label])[0]
                else:
                    vote_N = self._scales.divide(vote_N, number, layer.at_sum) / final_N
                row = torch.full_like(index_KN[:1], layer.first + layer.site.n + place)
                written_N = kept.add(row, weight_N[None], vote_N[None])
                sum_N = sum_N if one.label else sum_N + written_N
            written_N = self._written(number, final_N)
            if written_N is not None:
                kept.hooks[number] = written_N
                sum_N = sum_N + written_N
            sum_N = sum_N + self._constants(number, parts) / final_N
            if layer.site.label not in parts.missing:
                what = [f"the experts in {layer.voters.place.name}"]
                whole_LN = parts.of([layer.site.label])
                through = bool(layer.way.norms_from(0))
                claims.append(Claim(what, sum_N[None], whole_LN, through))
        return kept.split(claims, self._scales.largest_misfits())

    def _see_shared(self, row: int, one: _Shared, view: View, call: Call) -> None:
        x = call.activation
        project(x, view, one.directions, self._aside.row(row, x.device))

    def _see_gate(self, row: int, view: View, call: Call) -> None:
        x = call.activation
        self._aside.row(row, x.device)[view.inside.to(x.device)] = view.take(x)[:, 0].to(
            self._plan.dtype
        )

    def _written(self, number: int, final_N: Tensor) -> Tensor | None:
        """What the caller's hooks wrote between a layer's experts and the stream."""
        if number not in self._hooks:
            return None
        writes, after = self._hooks[number]
        rows = zip(writes.finish(final_N.device), after, strict=True)
        divided = [self._scales.divide(row_N, number, start) for row_N, start in rows]
        return torch.stack(divided).sum(0) / final_N

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


class _Kept:
    """The rows of one prompt: all of them, or the strongest at each entry."""

    def __init__(self, parts: Parts, plan: _ExpertsPlan) -> None:
        self._parts, self._plan = parts, plan
        self.hooks: dict[int, Tensor] = {}
        n_rows, n = len(plan.rows), len(parts.entries)
        self._top, self._all = None, parts.reading.scale_N.new_zeros(0)
        if plan.top is None:  # values, weights, votes
            self._all = parts.reading.scale_N.new_zeros(3, n_rows, n, dtype=plan.dtype)
        else:
            self._top = TopRows(plan.top, n_rows - 1, n, plan.dtype, n_beside=2)

    def add(self, rows_KN: Tensor, weights_KN: Tensor, votes_KN: Tensor) -> Tensor:
        """Keep some rows at all entries; their sum [N]."""
        weights_KN = weights_KN.to(votes_KN)
        values_KN = weights_KN * votes_KN
        if self._top is not None:
            nobody = torch.zeros(1, dtype=torch.long, device="cpu")
            tile = Tile(None, slice(0, values_KN.shape[1]), values_KN.shape[1], nobody, None)
            self._top.add(values_KN, rows_KN, tile, (weights_KN, votes_KN))
            return values_KN.sum(0)
        where = (rows_KN >= 0).nonzero(as_tuple=True)
        place = rows_KN[where], where[1]
        for held_CN, new_KN in zip(self._all, (values_KN, weights_KN, votes_KN), strict=True):
            held_CN.index_put_(place, new_KN[where], accumulate=held_CN is not self._all[2])
        return values_KN.sum(0)

    def split(self, claims: list[Claim], norms: list[tuple[str, float]]) -> Split | RankedSplit:
        """The rows, and what is in none of them."""
        parts, plan, reading = self._parts, self._plan, self._parts.reading
        whole_N = reading.value_N() - reading.bias_N
        names = plan.unit.words.beside
        if self._top is not None:
            top = self._top.gathered(torch.ones_like(whole_N), parts.entries)
            return RankedSplit(
                plan.rows[:-1],
                top.values_KN,
                top.index_KN,
                top.rest_N,
                whole_N - top.sum_N,
                top.row_sums_RB,
                claims,
                norms,
                dict(zip(names, top.beside, strict=True)),
            )
        rows, numbers = self._with_hooks()
        torch.sub(whole_N, numbers[0, :-1].sum(0), out=numbers[0, -1])
        return Split(rows, numbers[0], claims, norms, dict(zip(names, numbers[1:], strict=True)))

    def _with_hooks(self) -> tuple[list[Row], Tensor]:
        """Each layer's rows, and behind them what hooks wrote there."""
        plan = self._plan
        if not self.hooks:
            return plan.rows, self._all
        rows, numbers = list[Row](), list[Tensor]()
        for number, layer in enumerate(plan.layers):
            here = slice(layer.first, layer.first + layer.n_rows)
            rows += plan.rows[here]
            numbers.append(self._all[:, here])
            if number in self.hooks:
                last = rows[-1]
                label = f"{_prefix(last.layer, last.sub)}hook"
                rows.append(replace(last, label=label, kind="hook", index=None))
                written_N = self.hooks[number]
                nothing_N = torch.zeros_like(written_N)
                numbers.append(torch.stack((written_N, nothing_N, nothing_N))[:, None])
        return [*rows, plan.rows[-1]], torch.cat((*numbers, self._all[:, -1:]), 1)


def _step(stream: Stream, place: Place) -> Step:
    """A linear map or a norm of the model, as a step of the way."""
    linear = place.module
    if declared_width(linear) is None:
        norm = norm_at(stream, place)
        return Step(norm.pull_back, place, norm, norm.beta if bool(norm.beta.any()) else None)
    check_readable(linear, place.name)
    return Step(lambda d_KM: pull_back(linear, d_KM), place, constant=bias_of(linear))


def _layers(layers: Iterable[int]) -> tuple[int, ...]:
    try:
        found = tuple(operator.index(layer) for layer in layers)
    except TypeError:
        found = ()
    if not found or any(layer < 0 for layer in found):
        raise InputError(f"layers must be numbers of layers, such as [3, 5]; got {layers!r:.80}")
    return tuple(sorted(set(found)))


def _chosen(
    sites: tuple[ExpertSite, ...], layers: Collection[int] | None, stream: Stream
) -> list[ExpertSite]:
    if layers is None:
        return list(sites)
    have = {stream.blocks[site.block].layer for site in sites}
    lacking = [layer for layer in layers if layer not in have]
    if lacking:
        raise InputError(
            f"layers names {lacking[0]}, but the layers with experts are {sorted(have)}"
        )
    return [site for site in sites if stream.blocks[site.block].layer in layers]


def _prefix(layer: int | None, sub: int | None) -> str:
    return f"L{layer}.{sub}" if sub else f"L{layer}"


def _rows_of(site: ExpertSite, layer: int, sub: int) -> list[Row]:
    """The rows of one sublayer; those of a second one in a block are L0.1E0, L0.1E1, …"""
    at = _prefix(layer, sub)
    rows = [Row(f"{at}E{n}", "expert", layer, sub, n) for n in range(site.n)]
    return rows + [Row(f"{at}S{n}", "shared", layer, sub, n) for n in range(len(site.shared))]
