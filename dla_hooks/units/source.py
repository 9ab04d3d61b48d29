"""Sources: each head's direct path, split over the tokens that the head reads.

A head's z is a sum over the tokens that it reads, each with its attention weight and its value. So
is the head's part of the logit, with the attention pattern frozen. The weights of the selected
positions are computed from the queries and keys that the attention function gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dla_hooks.backends import Conventions
from dla_hooks.errors import InputError
from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.options import some_layers, whole_number
from dla_hooks.modules.attention_interface import AttentionCall, AttentionTap
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.onto import onto
from dla_hooks.modules.user_hooks import is_hooked
from dla_hooks.projection.attention_reads import Reads, reads
from dla_hooks.projection.kernels import project_heads
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.read_ledger import ReadLedger, SourceLedger
from dla_hooks.projection.tiles import View
from dla_hooks.residual.stream import Stream
from dla_hooks.results.row_runs import RowRuns, Run
from dla_hooks.results.rows import Words
from dla_hooks.units.base import Claim, RankedSplit, Recorder, Split, Unit, UnitPlan
from dla_hooks.units.head_layer import HeadLayer
from dla_hooks.units.head_rows import HeadsPlan
from dla_hooks.units.parts import Parts
from dla_hooks.units.parts_plan import PartsPlan
from dla_hooks.units.source_layer import as_heads, hook_points, runs_of, source_layers


class SourceTokens(Unit):
    """``L3H5<7``: what head 5 of layer 3 took from the token at position 7.

    Positions are counted among the prompt's real tokens. At each position that is attributed, the
    ``top`` strongest rows are kept; ``rest`` is the sum of the others, and ``remainder`` what no
    head wrote. Beside each row stands its attention weight. The pattern is frozen: a row says what
    was read there, not why the head looked there. A token that a head does not read at all is no
    row. Value biases are part of what is read (``fold_value_biases`` does not apply).

    Layers without attention (Mamba, linear attention) are left in the ``remainder``. Models of
    transformers whose attention does not come by its registry of attention functions are refused.

    Args:
        heads: only these: pairs (layer, head), or labels such as ``"L3H5"``. None is all.
        layers: only the heads of these layers, or of one. None is all.
        top: rows to keep at each position; None keeps all.
        sum: None; or "layer" for the sum over the heads of each layer, in rows ``L3<7``; or
            "heads" for the sum over all of them, in rows ``<7``. The weight beside such a row is
            the mean over its heads.

    Raises:
        InputError: for an option that cannot be used; for a layer or head that the model does not
            have, when the unit meets the model.

    >>> import dla_hooks
    >>> dla_hooks.SourceTokens(heads=["L0H1"], top=3)
    SourceTokens(heads=((0, 0, 1),), layers=None, top=3, sum=None)
    """

    words = Words(
        name="source",
        title="Sources",
        sentence="sources: what each attention head took from each token",
        index="head",
        remainder="remainder",
        remainder_is="what no head wrote",
        sources=True,
        beside=("weight",),
    )
    by_column = True
    of_every_model = False
    kept_in = "attention adds up what a head reads before any module shows it; take out heads"

    def __init__(
        self,
        heads: Iterable[str | tuple[int, int]] | None = None,
        layers: int | Iterable[int] | None = None,
        top: int | None = 64,
        sum: str | None = None,
    ) -> None:
        self.heads = as_heads(heads)
        self.layers = None if layers is None else some_layers(layers)
        if sum not in (None, "layer", "heads"):
            raise InputError(f"sum must be None, 'layer' or 'heads'; got {sum!r}")
        self.top = None if top is None else whole_number(top, "top", least=1)
        self.sum = sum

    def places(self, stream: Stream) -> list[Place]:
        """Every z, the values and weights where the model shows them, and the post-norms."""
        sites = [write.heads for write in stream.writes if write.heads is not None]
        found = [
            place
            for site in sites
            for place in (*(hook_points(site) or ()), site.place, site.post_norm_place)
        ]
        return [*(place for place in found if place is not None), stream.last]

    def prepare(self, parts: PartsPlan, conventions: Conventions) -> UnitPlan:
        """Fold the directions through every output projection, and measure what stands before it.

        Raises:
            InputError: for a layer or head that is not there.
            UnsupportedModelError: where the tokens that heads read cannot be told apart.
        """
        return SourcePlan(self, parts)


class SourcePlan(UnitPlan):
    """All chosen heads on one model and target."""

    def __init__(self, unit: SourceTokens, parts: PartsPlan) -> None:
        super().__init__(unit)
        self.top, self.sum = unit.top, unit.sum
        chosen = source_layers(parts.stream, unit.heads, unit.layers)
        among = {layer.label for layer in chosen}
        self.heads = HeadsPlan(unit, parts, fold_value_biases=False, among=among)
        self.layers = list(zip(chosen, self.heads.layers, strict=True))
        self.n_heads = chosen[-1].place.stop
        # The places of the chosen heads among all heads of their layers.
        self.among = [ours.rows.start + h for one, ours in self.layers for h in one.heads]

    def runs(self, n_sources: int) -> list[Run]:
        """The rows for prompts of so many tokens."""
        return runs_of([layer for layer, _ in self.layers], self.sum, n_sources)

    def known_rows(self, entries: Entries) -> RowRuns:
        return RowRuns(self.runs(entries.numbers()[1]))

    def recorder(self, view: View) -> Recorder:
        return SourceRecorder(self, view)


class SourceRecorder(Recorder):
    """What all chosen heads read in one run."""

    def __init__(self, plan: SourcePlan, view: View) -> None:
        self._plan, self._entries = plan, view.entries
        self._heads = plan.heads.recorder(view)
        self._numbers, n_sources = view.entries.numbers()
        self._runs = plan.runs(n_sources)
        self._ledger = self._new_ledger()
        n, dtype = len(view), plan.heads.dtype
        self._sums = FixedRows(plan.n_heads, n, dtype)
        # Of padding, and of positions that the model itself puts before the prompt.
        self._off = FixedRows(len(plan.layers), n, dtype)
        # The caller's hooks may change z: then what attention left is projected ahead of them.
        hooked = any(_is_hooked(ours) for _, ours in plan.layers)
        self._ahead = FixedRows(len(plan.heads.rows), n, dtype) if hooked else None
        self._calls: dict[int, AttentionCall] = {}
        self._waiting: dict[int, ReadLedger] = {}

    def taps(self, view: View) -> list[Tap]:
        """Every attention function, every z, and every post-norm behind one."""
        found = self._heads.taps(view)
        for number, (layer, ours) in enumerate(self._plan.layers):
            site = ours.site
            if layer.points is None:
                name = f"the attention function of {site.name.rpartition('.')[0] or site.name}"
                place = Place(site.attention, name, site.use)
                found.append(AttentionTap(place, self._see_call(number)))
            else:
                found += self._at_points(number, *layer.points)
            found.append(Tap(site.place.entered.ahead, self._see_z(number, view)))
            if site.post_norm_place is not None:
                # Behind all hooks: the heads' own tap, which finds the scale, is ahead of them.
                found.append(Tap(site.post_norm_place, self._see_scale(number)))
        return found

    def finish(self, parts: Parts) -> RankedSplit:
        reading, scale_N = parts.reading, parts.reading.scale_N
        whole = self._heads.finish(parts)
        sums_HN, off_LN = (rows.gathered(scale_N.device) for rows in (self._sums, self._off))
        for number, (layer, ours) in enumerate(self._plan.layers):
            if ours.post_norm is not None:
                post_N = self._heads.post_scale(number, scale_N.device)
                sums_HN[layer.place] /= post_N
                off_LN[number] /= post_N
        sums_HN /= scale_N
        top = self._ledger.gathered(scale_N, parts.entries)
        sum_N = sums_HN.sum(0) - off_LN.sum(0) / scale_N
        return RankedSplit(
            rows=RowRuns(self._runs),
            values_KN=top.values_KN,
            index_KN=top.index_KN,
            rest_N=sum_N - top.values_KN.sum(0),
            remainder_N=reading.value_N() - reading.bias_N - sum_N,
            claims=[*whole.claims, self._claim(sums_HN, whole, scale_N)],
            norms=whole.norms,
            beside={"weight": top.beside[0]},
        )

    def _claim(self, sums_HN: Tensor, whole: Split, scale_N: Tensor) -> Claim:
        """What each head took from all that it read is what z has of that head."""
        heads = [index for index, row in enumerate(whole.rows) if row.kind == "head"]
        rows = [whole.rows[index] for index in heads]
        whole_HN = whole.values_CN[heads]
        if self._ahead is not None:
            ahead_CN = self._ahead.gathered(scale_N.device)
            for number, (_, ours) in enumerate(self._plan.layers):
                if _is_hooked(ours):
                    whole_HN[ours.rows] = ahead_CN[ours.rows] / scale_N
                    if ours.post_norm is not None:
                        whole_HN[ours.rows] /= self._heads.post_scale(number, scale_N.device)
        among = self._plan.among
        names = [f"the tokens that {rows[index].label} reads" for index in among]
        # Models compute their weights in float32, also those in float64.
        return Claim(names, sums_HN, whole_HN[among], through_norm=True)

    def _see_call(self, number: int) -> Callable[[AttentionCall], None]:
        def see(call: AttentionCall) -> None:
            # The attention module itself holds all of this until its projection has run.
            self._calls[number] = call

        return see

    def _at_points(self, number: int, values: Place, weights: Place) -> list[Tap]:
        """The same, where the model itself shows its values and weights."""
        seen, d_head = list[Tensor](), self._plan.layers[number][1].site.d_head

        def see_weights(call: Call) -> None:
            # Bridges show the heads of values side by side.
            v, p = (
                seen.pop().flatten(2).unflatten(-1, (-1, d_head)).transpose(1, 2),
                call.activation,
            )
            self._calls[number] = AttentionCall(weights.module, p, v, v, None, {}, "", p, p)

        return [
            Tap(values, lambda call: seen.append(call.activation)),
            Tap(weights, see_weights),
        ]

    def _see_z(self, number: int, view: View) -> Callable[[Call], None]:
        layer, ours = self._plan.layers[number]

        def see(seen: Call) -> None:
            call, z = self._calls.pop(number), ours.site.flat(seen.entered)
            if self._ahead is not None and _is_hooked(ours):
                project_heads(z, view, ours.folded, self._ahead.on(z.device)[ours.rows])
            ledger = self._ledger
            if ours.post_norm is not None:
                ledger = self._waiting[number] = self._new_ledger()
            given = z if layer.form.scaled else None
            for found in reads(call, view, ours.folded, layer.heads, layer.form.dtype, given):
                self._add(found, number, ledger)

        return see

    def _see_scale(self, number: int) -> Callable[[Call], None]:
        def see(seen: Call) -> None:
            scale_N = self._heads.post_scale(number, seen.left.device)
            self._ledger.merge(self._waiting.pop(number), scale_N, self._entries)

        return see

    def _add(self, found: Reads, number: int, ledger: ReadLedger) -> None:
        """Add what some entries read to the sums of their heads, and to a ledger."""
        layer, _ = self._plan.layers[number]
        device, index = found.values_HTS.device, found.tile.index
        sums_HT = found.values_HTS.sum(-1)
        self._sums.on(device)[layer.place, index] = sums_HT
        numbers_S = self._numbers[found.row if len(self._numbers) > 1 else 0]
        numbers_S = numbers_S[max(found.first, 0) : found.first + found.values_HTS.shape[-1]]
        real_S = torch.cat((numbers_S.new_full((max(-found.first, 0),), -1), numbers_S)) >= 0
        if not bool(real_S.all()):
            kept = onto(real_S.nonzero()[:, 0], device)  # a mask on a GPU would be waited for
            found = Reads(
                found.row,
                found.tile,
                found.values_HTS.index_select(-1, kept),
                found.weights_HTS.index_select(-1, kept),
                found.first,
            )
            off_T = (sums_HT - found.values_HTS.sum(-1)).sum(0)
            self._off.on(device)[number, index] = off_T
            numbers_S = numbers_S[numbers_S >= 0]
        run = number if self._plan.sum == "layer" else layer.place.start
        ledger.add(found, run, onto(numbers_S, device))

    def _new_ledger(self) -> ReadLedger:
        plan, n, dtype = self._plan, len(self._entries), self._plan.heads.dtype
        n_sources = self._runs[0].n
        if plan.sum == "heads":
            return SourceLedger(plan.top, n_sources, n, dtype, plan.n_heads)
        return ReadLedger(plan.top, len(self._runs), n_sources, n, dtype, plan.sum == "layer")


def _is_hooked(ours: HeadLayer) -> bool:
    """Whether the caller's hooks change z on its way into the output projection."""
    site = ours.site
    return is_hooked(site.place.entered if site.linear is site.proj else site.place)
