"""Neurons: each MLP's hidden units, and their own direct paths to the logit.

A neuron's write is a_i W_down[i]. It is never built: the direction is folded through W_down first,
and through the post-norm where the sublayer has one, with that norm's scale frozen at its actual
value. The strongest neurons of each entry are kept, and the sum of all. What no neuron wrote
(embeddings, attention, experts, biases of the last maps) is the ``remainder``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dla_hooks.backends import Conventions
from dla_hooks.calibration.chosen_neurons import chosen_neurons
from dla_hooks.calibration.last_maps import NeuronSite, neuron_sites
from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.inputs.options import some_layers, whole_number
from dla_hooks.modules import norms
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.linear import bias_of, check_readable, input_width, pull_back
from dla_hooks.modules.user_hooks import is_hooked
from dla_hooks.modules.weights import in_memory
from dla_hooks.projection.directions import Directions, of_constants
from dla_hooks.projection.hook_writes import HookWrites
from dla_hooks.projection.kernels import frozen_scales, project_neurons
from dla_hooks.projection.ledger import FixedRows, TopRows
from dla_hooks.projection.tiles import View
from dla_hooks.residual.stream import Stream, WriteSite
from dla_hooks.results.row_runs import RowRuns, Run
from dla_hooks.results.rows import Words
from dla_hooks.units.base import (
    Claim,
    RankedSplit,
    Recorder,
    Unit,
    UnitPlan,
    claims_of_writes,
)
from dla_hooks.units.parts import Parts
from dla_hooks.units.parts_plan import PartsPlan

_FEW = 4
"""Entries that are at most one in so many positions are copied out of what is held."""


class Neurons(Unit):
    """``L0N0``, ``L0N1``, …: every hidden unit of the MLPs; the strongest of each entry are kept.

    A neuron is a channel of what enters the last linear map of an MLP. Those of a block's second
    MLP are ``L0.1N0``, ``L0.1N1``, … Layers whose MLP has no such map (experts, an output that is
    gated) are left to the remainder.

    Args:
        top: how many to keep at each entry; None keeps all.
        layers: a layer, or several; None is all that have neurons.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> result = dla_hooks.direct_logit_attribution(
    ...     model, "The keys near the cabinet", " are", tokenizer=tokenizer,
    ...     unit=dla_hooks.Neurons(top=3, layers=[1, 2]))
    >>> result.attribution.shape, len(result.rows), result.rows[0].label
    (torch.Size([3, 1]), 256, 'L1N0')
    """

    words = Words(
        name="neuron",
        title="Neurons",
        sentence="neurons: what each hidden unit of the MLPs wrote",
        index="neuron",
        remainder="remainder",
        remainder_is="what no neuron wrote",
    )
    by_column = True
    of_every_model = False
    taken_out = ("neuron",)

    def __init__(self, top: int | None = 64, layers: int | Sequence[int] | None = None) -> None:
        self.top = None if top is None else whole_number(top, "top", least=1)
        self.layers = None if layers is None else some_layers(layers)

    @classmethod
    def of_layer(cls, layer: int) -> Neurons:
        """All neurons of one layer."""
        return cls(top=None, layers=layer)

    def places(self, stream: Stream) -> list[Place]:
        """What enters every last map, the norms behind them, and the last stream."""
        sites = neuron_sites(stream).values()
        found = [place for site in sites for place in (site.place, site.norm)]
        return [*(place for place in found if place is not None), stream.last]

    def prepare(self, parts: PartsPlan, conventions: Conventions) -> UnitPlan:
        """Fold the directions through every last map.

        Raises:
            InputError: for a layer that the model does not have.
            UnsupportedModelError: for a model, or a layer that was asked for, without neurons, or
                whose last maps cannot be read through.
        """
        return _NeuronsPlan(self, parts)


class _NeuronsPlan(UnitPlan):
    """All MLPs' neurons on one model and target."""

    def __init__(self, unit: Neurons, parts: PartsPlan) -> None:
        super().__init__(unit)
        self.top, stream = unit.top, parts.stream
        self.mlps: list[_Mlp] = []
        runs, n_rows = list[Run](), 0
        for write, site, sub in chosen_neurons(stream, unit.layers):
            mlp = _Mlp(parts, write, site, n_rows)
            layer = f"L{write.layer}.{sub}" if sub else f"L{write.layer}"
            runs.append(Run(f"{layer}N{{}}", "neuron", write.layer, sub, n=len(mlp.rows)))
            n_rows += len(mlp.rows)
            self.mlps.append(mlp)
        self.rows = RowRuns(runs)
        # What an MLP writes besides its neurons: the last map's bias, and the post-norm's beta.
        biases = [(mlp.at_map, mlp.bias_M) for mlp in self.mlps]
        betas = [(mlp.at_norm, mlp.beta_M) for mlp in self.mlps]
        self.constants = of_constants(biases), of_constants(betas)
        self.dtype = stream.work_dtype

    def recorder(self, view: View) -> Recorder:
        return _NeuronsRecorder(self, view)


class _Mlp:
    """The neurons of one MLP, with the directions that they are projected on.

    Args:
        parts: the parts of the stream.
        write: what the MLP writes.
        site: where its neurons are.
        first: the number of its first neuron among all.
    """

    def __init__(self, parts: PartsPlan, write: WriteSite, site: NeuronSite, first: int) -> None:
        stream = parts.stream
        self.label, self.site = write.label, site
        in_stream = parts.directions(write.label)
        self.at_norm = _times(in_stream, site.norm_factor)
        self.norm: norms.Norm | None = None
        self.beta_M: Tensor | None = None
        before = in_stream
        if site.norm is not None:
            self.norm = norm = norm_at(stream, site.norm)
            self.beta_M = norm.beta if bool(norm.beta.any()) else None
            before = self.at_norm.then(norm.pull_back)
        self.at_map = _times(before, site.factor)
        linear = site.linear
        check_readable(linear, site.name)
        self.bias_M = bias_of(linear)
        self.rows = range(first, first + input_width(linear))
        self.folded = self.at_map.then(lambda d_KM: pull_back(linear, d_KM, site.name))
        if in_memory(linear):
            self.folded.prepare()  # before the run, as heads do
        # Where the caller's hooks may write between the neurons and the stream.
        self.before = [(place, _times(before, factor)) for place, factor in site.before]
        self.behind = [(place, _times(in_stream, factor)) for place, factor in site.behind]
        if site.norm is not None:
            self.before.append((site.norm.entered, before))
            self.behind.append((site.norm, self.at_norm))


class _NeuronsRecorder(Recorder):
    """All MLPs' neurons in one run."""

    def __init__(self, plan: _NeuronsPlan, view: View) -> None:
        self._plan, self._n = plan, len(plan.mlps)
        n_rows, n_prompts = len(plan.rows), view.n_prompts
        self._top = TopRows(plan.top, n_rows, len(view), plan.dtype, n_prompts=n_prompts)
        # For each MLP: the sum of its neurons, and the post-norm's scale.
        self._aside = FixedRows(2 * self._n, len(view), plan.dtype)
        self._misfits: dict[str, list[Tensor]] = {}
        # What enters a last map, until the norm behind it has run.
        self._held: dict[int, Callable[[slice | None], Tensor]] = {}
        # What the caller's hooks write on the way to the stream, before and behind the norm.
        self._hooks: dict[tuple[int, bool], HookWrites] = {}
        for number, mlp in enumerate(plan.mlps):
            for behind, places in ((False, mlp.before), (True, mlp.behind)):
                hooked = [(place, d) for place, d in places if is_hooked(place)]
                if hooked:
                    self._hooks[number, behind] = HookWrites(hooked, len(view), plan.dtype)

    def taps(self, view: View) -> list[Tap]:
        """What enters every last map, and every norm behind one."""
        mlps = enumerate(self._plan.mlps)
        taps = [tap for number, mlp in mlps for tap in self._taps(number, mlp, view)]
        return taps + [tap for writes in self._hooks.values() for tap in writes.taps(view)]

    def finish(self, parts: Parts) -> RankedSplit:
        reading, mlps = parts.reading, self._plan.mlps
        final_N, of_target = reading.scale_N, parts.entries.of_target
        sums_LN, scale_LN = self._aside.gathered(final_N.device).split(self._n)
        top = self._top.gathered(final_N, parts.entries)
        normed = [number for number, mlp in enumerate(mlps) if mlp.norm is not None]
        beside_LN = torch.zeros_like(sums_LN)
        biases_LK, betas_LK = self._plan.constants
        if biases_LK is not None:
            beside_LN += of_target(biases_LK.to(beside_LN.device))
        for (number, behind), writes in self._hooks.items():
            if not behind:
                beside_LN[number] += writes.finish(final_N.device).sum(0)
        beside_LN[normed] /= scale_LN[normed]
        if betas_LK is not None:
            beside_LN += of_target(betas_LK.to(beside_LN.device))
        for (number, behind), writes in self._hooks.items():
            if behind:
                beside_LN[number] += writes.finish(final_N.device).sum(0)
        wrote_LN = (sums_LN + beside_LN) / final_N
        return RankedSplit(
            rows=self._plan.rows,
            values_KN=top.values_KN,
            index_KN=top.index_KN,
            rest_N=top.rest_N,
            remainder_N=reading.whole_N - top.sum_N,
            row_sums_RB=top.row_sums_RB,
            claims=self._claims(wrote_LN, parts),
            norms=[(name, norms.largest(misfits)) for name, misfits in self._misfits.items()],
        )

    def _taps(self, number: int, mlp: _Mlp, view: View) -> list[Tap]:
        site, norm, place = mlp.site, mlp.norm, mlp.site.norm

        def rank(read: Callable[[slice | None], Tensor], device: torch.device) -> None:
            scale_N = None if norm is None else self._aside.row(self._n + number, device)
            out_N = self._aside.row(number, device)
            project_neurons(read, view, mlp.folded, self._top, mlp.rows, out_N, scale_N)

        def see(call: Call) -> None:
            rank(partial(view.take, call.activation), call.activation.device)

        if place is None or norm is None:
            return [Tap(site.place, see)]

        def hold(call: Call) -> None:
            x = call.activation
            if len(view) * _FEW > x.numel() // x.shape[-1]:
                self._held[number] = partial(view.take, x)
                return
            some = view.take(x).clone()  # a slice would hold the whole activation
            self._held[number] = lambda place: some if place is None else some[place]

        def see_norm(call: Call) -> None:
            x, y = call.entered, call.left
            misfits = frozen_scales(norm, x, y, view, self._aside.row(self._n + number, x.device))
            self._misfits.setdefault(place.name, []).extend(misfits)
            rank(self._held.pop(number), x.device)

        def see_scale(scale: Tensor) -> None:
            self._aside.row(self._n + number, scale.device).copy_(view.take(scale)[:, 0])
            rank(self._held.pop(number), scale.device)

        return [Tap(site.place, hold), Tap(place.ahead, see_norm, see_scale)]

    def _claims(self, wrote_LN: Tensor, parts: Parts) -> list[Claim]:
        """Each MLP's neurons, with the biases, make up what that MLP wrote."""
        writes = [
            (mlp.label, f"the neurons in {mlp.site.name}", mlp.norm is not None)
            for mlp in self._plan.mlps
        ]
        return claims_of_writes(writes, wrote_LN, parts)


def _times(directions: Directions, factor: float) -> Directions:
    return directions if factor == 1 else directions.then(lambda d_KM: d_KM * factor)
