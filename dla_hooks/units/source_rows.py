"""What the heads of a model read from each token on one target, and what is recorded in one run.

Heads that read the prompt come first among the rows, and those that read an encoder behind them:
how many positions an encoder puts out is known when it has run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.entries import Entries
from dla_hooks.modules.attention_interface import AttentionCall, AttentionTap
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.onto import onto
from dla_hooks.modules.user_hooks import is_hooked
from dla_hooks.projection.attention_reads import Reads, reads
from dla_hooks.projection.kernels import project_heads
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.read_ledger import ReadLedger, SourceLedger, joined, of_tokens
from dla_hooks.projection.tiles import View
from dla_hooks.results.row_runs import RowRuns, Run
from dla_hooks.units.base import Claim, RankedSplit, Recorder, Split, Unit, UnitPlan
from dla_hooks.units.head_layer import HeadLayer
from dla_hooks.units.head_rows import HeadsPlan
from dla_hooks.units.parts import Parts
from dla_hooks.units.parts_plan import PartsPlan
from dla_hooks.units.source_layer import Head, SourceLayer, runs_of, source_layers
from dla_hooks.units.source_mixers import MixerRecorder, mixers_of, runs_of_mixers


class SourcePlan(UnitPlan):
    """All chosen heads on one model and target.

    Args:
        unit: the unit.
        parts: the parts of the stream.
        heads: the chosen heads, or None.
        layers: the chosen layers, or None.
        top: rows to keep at each position.
        sum: see :class:`SourceTokens`.
    """

    def __init__(
        self,
        unit: Unit,
        parts: PartsPlan,
        heads: Sequence[Head] | None,
        layers: Sequence[int] | None,
        top: int | None,
        sum: str | None,
    ) -> None:
        super().__init__(unit)
        self.top, self.sum, stream = top, sum, parts.stream
        self.dtype = stream.work_dtype
        self.mixers = mixers_of(parts, layers) if heads is None else []
        labels = {mixer.write.label: mixer.write.layer for mixer in self.mixers}
        chosen = source_layers(stream, heads, layers, labels)
        if sum == "heads" and len({layer.of_encoder for layer in chosen}) > 1:
            raise InputError(
                "sum='heads' adds up heads that read the same tokens, and those of "
                f"{parts.stream.backend.name} read the encoder's or the decoder's. Choose either "
                "with heads=['L0X0', ...] or heads=['L0H0', ...], or use sum='layer'"
            )
        among = {layer.label for layer in chosen}
        self.heads: HeadsPlan | None = None
        self.layers: list[tuple[SourceLayer, HeadLayer]] = []
        if chosen:
            self.heads = HeadsPlan(unit, parts, fold_value_biases=False, among=among)
            self.layers = list(zip(chosen, self.heads.layers, strict=True))
        self.n_heads = chosen[-1].place.stop if chosen else 0
        # The places of the chosen heads among all heads of their layers.
        self.among = [ours.rows.start + h for one, ours in self.layers for h in one.heads]

    def runs(self, n_sources: int, *, of_encoder: bool = False) -> list[Run]:
        """The rows of the heads that read the prompt, or the encoder.

        Args:
            n_sources: how many tokens, or positions, there are at most.
            of_encoder: whether these are the encoder's.
        """
        found = runs_of(self._reading(of_encoder), self.sum, n_sources)
        if of_encoder or (found and self.sum == "heads"):
            return found
        return found + runs_of_mixers(self.mixers, self.sum, n_sources)

    def first_run(self, number: int) -> int:
        """The number of a layer's first run among those of its kind."""
        layer = self.layers[number][0]
        before = [one for one, _ in self.layers[:number] if one.of_encoder == layer.of_encoder]
        if self.sum == "heads":
            return 0
        return len(before) if self.sum == "layer" else sum(len(one.heads) for one in before)

    def first_run_of_mixer(self, number: int) -> int:
        """The same for a mixer; these come behind attention."""
        if self.sum == "heads":
            return 0
        before = runs_of_mixers(self.mixers[:number], self.sum, 1)
        return len(runs_of(self._reading(False), self.sum, 1)) + len(before)

    def n_heads_reading(self, of_encoder: bool) -> int:
        """How many of the chosen heads, and mixers without any, read the prompt or the encoder."""
        n_of_mixers = 0 if of_encoder else sum(mixer.n for mixer in self.mixers)
        return sum(len(layer.heads) for layer in self._reading(of_encoder)) + n_of_mixers

    def known_rows(self, entries: Entries) -> RowRuns:
        if self._reading(True):
            raise UnsupportedModelError(
                "which positions of an encoder are read is known after the run, so rows that read "
                "them cannot be compared; compare heads as a whole, or choose the decoder's own "
                "with heads=['L0H0', ...]"
            )
        return RowRuns(self.runs(entries.numbers()[1]))

    def _reading(self, of_encoder: bool) -> list[SourceLayer]:
        return [layer for layer, _ in self.layers if layer.of_encoder == of_encoder]

    def recorder(self, view: View) -> Recorder:
        return SourceRecorder(self, view)


class SourceRecorder(Recorder):
    """What all chosen heads read in one run."""

    def __init__(self, plan: SourcePlan, view: View) -> None:
        self._plan, self._entries = plan, view.entries
        self._heads: Any = None if plan.heads is None else plan.heads.recorder(view)
        # The numbers of what is read, and how many these are at most, by whether an encoder's.
        self._numbers = {False: view.entries.numbers()}
        self._ledgers: dict[bool, ReadLedger] = {}
        if plan.n_heads_reading(False):
            self._ledgers[False] = self._new_ledger(False)
        n, dtype = len(view), plan.dtype
        self._mixers = MixerRecorder(plan.mixers, dtype, view, self._add_mixer)
        self._sums = FixedRows(plan.n_heads, n, dtype)
        # Of padding, and of positions that the model itself puts before the prompt.
        self._off = FixedRows(len(plan.layers) + 1, n, dtype)
        # The caller's hooks may change z: then what attention left is projected ahead of them.
        hooked = any(_is_hooked(ours) for _, ours in plan.layers)
        self._ahead = FixedRows(len(plan.heads.rows), n, dtype) if plan.heads and hooked else None
        self._calls: dict[int, AttentionCall] = {}
        self._waiting: dict[int, ReadLedger] = {}

    def taps(self, view: View) -> list[Tap]:
        """Every attention function, every z, and every post-norm behind one."""
        found = self._mixers.taps(view) + (self._heads.taps(view) if self._heads else [])
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
        whole = self._heads.finish(parts) if self._heads else None
        sums_HN, off_LN = (rows.gathered(scale_N.device) for rows in (self._sums, self._off))
        for number, (layer, ours) in enumerate(self._plan.layers):
            if ours.post_norm is not None:
                post_N = self._heads.post_scale(number, scale_N.device)
                sums_HN[layer.place] /= post_N
                off_LN[number] /= post_N
        sums_HN /= scale_N
        runs, starts, tops = list[Run](), list[int](), []
        for of_encoder, ledger in sorted(self._ledgers.items()):
            starts.append(len(RowRuns(runs)))
            if isinstance(ledger, SourceLedger) and not of_encoder:
                ledger.n_heads -= self._mixers.n_left_out
            tops.append(ledger.gathered(scale_N, parts.entries))
            runs += self._plan.runs(self._numbers[of_encoder][1], of_encoder=of_encoder)
        top = joined(tops, starts, self._plan.top)
        mixers_RN, claims = self._mixers.finish(parts)
        sum_N = sums_HN.sum(0) + mixers_RN.sum(0) - off_LN.sum(0) / scale_N
        if whole is not None:
            claims += [*whole.claims, self._claim(sums_HN, whole, scale_N)]
        return RankedSplit(
            rows=RowRuns(runs),
            values_KN=top.values_KN,
            index_KN=top.index_KN,
            rest_N=sum_N - top.values_KN.sum(0),
            remainder_N=reading.whole_N - sum_N,
            claims=claims,
            norms=() if whole is None else whole.norms,
            beside={"weight": top.beside[0]},
        )

    def _claim(self, sums_HN: Tensor, whole: Split, scale_N: Tensor) -> Claim:
        """What each head took from all that it read is what z has of that head."""
        kinds = {layer.site.kind for _, layer in self._plan.layers}
        heads = [index for index, row in enumerate(whole.rows) if row.kind in kinds]
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
            if layer.of_encoder and True not in self._ledgers:
                self._numbers[True] = self._entries.encoder_numbers(call.key.shape[2])
                self._ledgers[True] = self._new_ledger(True)
            if self._ahead is not None and _is_hooked(ours):
                project_heads(z, view, ours.folded, self._ahead.on(z.device)[ours.rows])
            ledger = self._ledgers[layer.of_encoder]
            if ours.post_norm is not None:
                ledger = self._waiting[number] = self._new_ledger(layer.of_encoder)
            form, which = layer.form, layer.of_encoder
            given = z if form.scaled else None
            for found in reads(
                call, view, ours.folded, layer.heads, form.dtype, given, of_encoder=which
            ):
                sums_HT = found.values_HTS.sum(-1)
                self._sums.on(z.device)[layer.place, found.tile.index] = sums_HT
                first = self._plan.first_run(number)
                self._add(found, number, first, ledger, layer.of_encoder)

        return see

    def _see_scale(self, number: int) -> Callable[[Call], None]:
        def see(seen: Call) -> None:
            scale_N = self._heads.post_scale(number, seen.left.device)
            ledger = self._ledgers[self._plan.layers[number][0].of_encoder]
            ledger.merge(self._waiting.pop(number), scale_N, self._entries)

        return see

    def _add_mixer(self, found: Reads, number: int) -> None:
        """Add what some entries read through a mixer."""
        first = self._plan.first_run_of_mixer(number)
        self._add(found, len(self._plan.layers), first, self._ledgers[False])

    def _add(
        self, found: Reads, off: int, run: int, ledger: ReadLedger, of_encoder: bool = False
    ) -> None:
        """Add what some entries read to a ledger, and what is no token's to a row of those."""
        device, index = found.values_HTS.device, found.tile.index
        found, numbers_S, off_T = of_tokens(found, self._numbers[of_encoder][0])
        if off_T is not None:
            self._off.on(device)[off, index] += off_T
        ledger.add(found, run, onto(numbers_S, device))

    def _new_ledger(self, of_encoder: bool) -> ReadLedger:
        plan, n, dtype = self._plan, len(self._entries), self._plan.dtype
        n_sources = self._numbers[of_encoder][1]
        if plan.sum == "heads":
            return SourceLedger(plan.top, n_sources, n, dtype, plan.n_heads_reading(of_encoder))
        n_runs = len(plan.runs(n_sources, of_encoder=of_encoder))
        return ReadLedger(plan.top, n_runs, n_sources, n, dtype, plan.sum == "layer")


def _is_hooked(ours: HeadLayer) -> bool:
    """Whether the caller's hooks change z on its way into the output projection."""
    site = ours.site
    return is_hooked(site.place.entered if site.linear is site.proj else site.place)
