"""The heads of a model on one target, and what is recorded of them in one run."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

import torch
from torch import Tensor

from dla_hooks.calibration.head_widths import with_head_widths
from dla_hooks.calibration.value_biases import head_constants
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.inputs.entries import Entries
from dla_hooks.modules import norms
from dla_hooks.modules.autocast import autocast_is_on
from dla_hooks.modules.hooks import Call, Tap
from dla_hooks.modules.user_hooks import is_hooked
from dla_hooks.projection.directions import of_constants
from dla_hooks.projection.hook_writes import HookWrites
from dla_hooks.projection.kernels import frozen_scales, project_heads
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.one_column import OneColumn
from dla_hooks.projection.tiles import View
from dla_hooks.results.rows import Row
from dla_hooks.tolerance import is_coarse
from dla_hooks.units.base import Claim, Recorder, Split, Unit, UnitPlan, claims_of_writes
from dla_hooks.units.head_layer import HeadLayer, rows_of, with_heads
from dla_hooks.units.parts import Parts
from dla_hooks.units.parts_plan import PartsPlan


class HeadsPlan(UnitPlan):
    """The heads on one model and target.

    Args:
        unit: the unit, whose remainder they have.
        parts: the parts of the stream.
        fold_value_biases: move each head's constant part to the remainder.
        among: the labels of the writes whose heads are taken; None is all.
    """

    def __init__(
        self,
        unit: Unit,
        parts: PartsPlan,
        fold_value_biases: bool,
        among: Container[str] | None = None,
    ) -> None:
        super().__init__(unit)
        stream = with_head_widths(parts.stream)
        constants = head_constants(stream) if fold_value_biases else {}
        self.layers: list[HeadLayer] = []
        self.rows: list[Row] = []
        for block in stream.blocks:
            for sub, write in with_heads(block.writes):
                if among is not None and write.label not in among:
                    continue
                first = len(self.rows)
                self.rows += rows_of(write, sub)
                place = slice(first, len(self.rows))
                # Elsewhere a write is more, or another number, than what its heads sum to.
                exact = not (block.optional or write.by_row or is_coarse(stream.product_dtype))
                constant_I = constants.get(write.label)
                self.layers.append(HeadLayer(parts, write, constant_I, place, exact))
        if not self.layers:
            raise UnsupportedModelError(
                f"{type(stream.backend.root).__name__}{stream.extent} has no attention heads with "
                "a direct path to the stream; attribute whole sublayers instead (leave out unit=)"
            )
        # What a layer writes besides its heads: the projection's bias, and the post-norm's beta.
        biases = [(layer.at_output, layer.bias_M) for layer in self.layers]
        betas = [(layer.in_stream, layer.beta_M) for layer in self.layers]
        self.constants = of_constants(biases), of_constants(betas)
        remainder = unit.words.remainder
        self.rows.append(Row(remainder, remainder))
        self.dtype = stream.work_dtype

    def recorder(self, view: View) -> HeadsRecorder:
        return HeadsRecorder(self, view)


class HeadsRecorder(Recorder):
    """All layers' heads in one run.

    Attributes:
        post_scales_LN: after :meth:`finish`, the scale of each layer's post-norm, if it has one.
    """

    post_scales_LN: Tensor

    def __init__(self, plan: HeadsPlan, view: View) -> None:
        self._plan, n_layers = plan, len(plan.layers)
        self._values = FixedRows(len(plan.rows), len(view), plan.dtype)
        # Besides the heads, for each layer: what was taken off them, and the post-norm's scale.
        self._aside = FixedRows(2 * n_layers, len(view), plan.dtype)
        self._tells = False
        self._values_CN: Tensor | None = None
        self._beside: tuple[Tensor, ...] | None = None
        self._takes_off = any(layer.constant_I is not None for layer in plan.layers)
        self._misfits: dict[str, list[Tensor]] = {}
        # What the caller's hooks write between z and the stream, by the number of the layer.
        self._hooks: dict[int, HookWrites] = {}
        untouched = list[int]()
        for number, layer in enumerate(plan.layers):
            if layer.is_untouched():  # nearly always
                untouched.append(number)
                continue
            found = layer.written_on_the_way()
            if found:
                writes = [(one.place, directions) for one, directions in found]
                may_rest = [one.may_rest for one, _ in found]
                self._hooks[number] = HookWrites(writes, len(view), plan.dtype, may_rest)
        self._whole: list[int] = []
        if not autocast_is_on():
            self._whole = [n for n in untouched if plan.layers[n].is_whole]
        self.whole_writes = [plan.layers[number].label for number in self._whole]

    def taps(self, view: View) -> list[Tap]:
        """Every output projection, and every post-norm behind one."""
        layers = enumerate(self._plan.layers)
        one = OneColumn.of(view)
        taps = [tap for number, layer in layers for tap in self._taps(number, layer, view, one)]
        return taps + [tap for writes in self._hooks.values() for tap in writes.taps(view)]

    def post_scale(self, number: int, device: torch.device) -> Tensor:
        """The scale of the post-norm behind one layer at each entry [N], as far as it was seen."""
        return self._aside.row(len(self._plan.layers) + number, device)

    def again(self) -> bool:
        self._values_CN = self._beside = None
        self._tells = False
        self._misfits.clear()
        return not self._hooks and self._values.again() and self._aside.again()

    def wrote(self, device: torch.device, entries: Entries) -> Tensor:
        self._tells = True
        wrote_LN = self._sums(self._gather(device)[:-1])
        if self._takes_off:
            wrote_LN += self._gather_beside(device)[0]
        biases_LK, _ = self._plan.constants
        if biases_LK is not None:
            wrote_LN += entries.of_target(biases_LK.to(device))
        return wrote_LN if len(self._whole) == len(wrote_LN) else wrote_LN[self._whole]

    def _gather(self, device: torch.device) -> Tensor:
        """All rows, on one device."""
        if self._values_CN is None:
            self._values_CN = self._values.gathered(device)
        return self._values_CN

    def _gather_beside(self, device: torch.device) -> tuple[Tensor, ...]:
        """What was taken off the heads of each layer, and the scale of its post-norm."""
        if self._beside is None:
            self._beside = self._aside.gathered(device).chunk(2)
        return self._beside

    def finish(self, parts: Parts) -> Split:
        reading, layers = parts.reading, self._plan.layers
        device, of_target = reading.scale_N.device, parts.entries.of_target
        values_CN = self._gather(device) / reading.scale_N  # a copy: results are their caller's
        heads_CN, rest_N = values_CN[:-1], values_CN[-1]
        if self._tells and len(self._whole) == len(layers):  # the sum of all parts holds them
            torch.sub(reading.whole_N, heads_CN.sum(0), out=rest_N)
            return Split(self._plan.rows, values_CN)
        beside_LN, scale_LN = self._gather_beside(device)
        self.post_scales_LN = scale_LN
        biases_LK, betas_LK = self._plan.constants
        if biases_LK is not None:
            beside_LN += of_target(biases_LK.to(device))
        for number, layer in enumerate(layers):
            if layer.post_norm is not None:
                values_CN[layer.rows] /= scale_LN[number]
                beside_LN[number] /= scale_LN[number]
        if betas_LK is not None:
            beside_LN += of_target(betas_LK.to(beside_LN.device))
        beside_LN /= reading.scale_N
        hooks = self._written(scale_LN, parts)
        for number, written_N in hooks.items():
            beside_LN[number] += written_N
        torch.sub(reading.whole_N, heads_CN.sum(0), out=rest_N)
        seen = [(name, norms.largest(misfits)) for name, misfits in self._misfits.items()]
        claims = self._claims(heads_CN, beside_LN, parts)
        return Split(*self._with_hooks(values_CN, hooks), claims, seen)

    def _taps(self, number: int, layer: HeadLayer, view: View, one: OneColumn | None) -> list[Tap]:
        norm, place = layer.post_norm, layer.site.post_norm_place
        scale_row = len(self._plan.layers) + number

        def see_z(call: Call) -> None:
            z = layer.site.z(call)
            heads_HN = self._values.on(z.device)[layer.rows]
            off_N = None if layer.constant_I is None else self._aside.row(number, z.device)
            project_heads(z, view, layer.folded, heads_HN, layer.constant_I, off_N)

        at_once = None
        if one is not None and layer.constant_I is None:
            enters = layer.site.linear is layer.site.proj
            at_once = one.project_heads(layer.folded, self._values, layer.rows, entered=enters)
        taps = [Tap(layer.site.place, see_z, at_once=at_once)]
        if place is None or norm is None:
            return taps

        def see_post_norm(call: Call) -> None:
            x, y = call.entered, call.left
            misfits = frozen_scales(norm, x, y, view, self._aside.row(scale_row, x.device))
            self._misfits.setdefault(layer.site.post_norm_name, []).extend(misfits)

        def see_post_scale(scale: Tensor) -> None:
            self._aside.row(scale_row, scale.device).copy_(view.take(scale)[:, 0])

        return [*taps, Tap(place.ahead, see_post_norm, see_post_scale)]

    def _written(self, scale_LN: Tensor, parts: Parts) -> dict[int, Tensor]:
        """What the caller's hooks wrote between z and the stream, by the number of the layer."""
        final_N, found = parts.reading.scale_N, {}
        for number, writes in self._hooks.items():
            layer, written = self._plan.layers[number], writes.finish(final_N.device)
            if layer.post_norm is not None:  # what stands before it is divided by its scale, too
                for (place, _), row_N in zip(writes.places, written, strict=True):
                    if place != layer.site.post_norm_place:
                        row_N /= scale_LN[number]
            written_N = written.sum(0) / final_N
            if bool(written_N.any()) or any(is_hooked(place) for place, _ in writes.places):
                found[number] = written_N  # a wrapper that writes nothing has no row
        return found

    def _with_hooks(self, values_CN: Tensor, hooks: dict[int, Tensor]) -> tuple[list[Row], Tensor]:
        """The rows, with what hooks wrote beside the heads of their layer."""
        if not hooks:
            return self._plan.rows, values_CN
        rows, values = list[Row](), list[Tensor]()
        for number, layer in enumerate(self._plan.layers):
            rows += self._plan.rows[layer.rows]
            values += values_CN[layer.rows]
            if number in hooks:
                label = rows[-1].label.partition(layer.site.letter)[0] + layer.hook_name
                rows.append(replace(rows[-1], label=label, kind="hook", index=None))
                values.append(hooks[number])
        rest_N = values_CN[-1] - torch.stack(list(hooks.values())).sum(0)
        return [*rows, self._plan.rows[-1]], torch.stack([*values, rest_N])

    def _claims(self, heads_CN: Tensor, beside_LN: Tensor, parts: Parts) -> list[Claim]:
        """Each layer's heads, with the biases, make up what that layer's attention wrote."""
        wrote_LN = beside_LN + self._sums(heads_CN)
        writes = [
            (layer.label, f"the heads in {layer.site.name}", layer.post_norm is not None)
            for layer in self._plan.layers
        ]
        return claims_of_writes(writes, wrote_LN, parts)

    def _sums(self, heads_CN: Tensor) -> Tensor:
        """The sum of each layer's heads [L, N]."""
        layers = self._plan.layers
        most = layers[0].n_heads
        if all(layer.n_heads == most for layer in layers):
            return heads_CN.view(len(layers), most, -1).sum(1)
        each_HN = heads_CN.split([layer.n_heads for layer in layers])
        return torch.stack([heads_HN.sum(0) for heads_HN in each_HN])
