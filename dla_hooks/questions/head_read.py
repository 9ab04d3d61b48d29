"""One head and one token that it reads, as readings of the stream at that token.

    row = p_tj (g * u_h) . v_j / (s_post s),   u_h = W_O[h]^T d

with the attention weight p, gates g and the scales s frozen. v_j is a linear reading of the stream
at j (:mod:`dla_hooks.modules.way_in`), and so is the row.

Axes: R row of the batch, D width of a head, N entry, M d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.backends import Conventions
from dla_hooks.calibration.attention_way import AttentionWay, attention_way
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.attention_interface import AttentionCall
from dla_hooks.modules.attention_rows import attention_weights, head_blocks
from dla_hooks.modules.hooks import Call, Tap
from dla_hooks.modules.way_in import WayIn
from dla_hooks.projection.attention_reads import gates
from dla_hooks.projection.tiles import View
from dla_hooks.units.base import RankedSplit, Recorder, UnitPlan
from dla_hooks.units.parts import Parts
from dla_hooks.units.parts_plan import PartsPlan
from dla_hooks.units.source import SourceTokens
from dla_hooks.units.source_rows import SourcePlan, SourceRecorder


@dataclass(frozen=True, kw_only=True)
class HeadReadSplit(RankedSplit):
    """What one head took from one token at each entry, besides the rows of the unit ``source``.

    Attributes:
        v_NM: directions at what the attention module reads at that token.
        bias_N: what the row has besides.
        value_N: the row.
        weight_N: the attention weight.
    """

    v_NM: Tensor
    bias_N: Tensor
    value_N: Tensor
    weight_N: Tensor


class HeadRead(SourceTokens):
    """One head, and in each row of the batch one token that it reads.

    Args:
        label: of the head: ``L9H6``.
        columns_B: the column of that token in each row.
    """

    def __init__(self, label: str, columns_B: Tensor) -> None:
        super().__init__(heads=[label], top=1)
        self.columns_B = columns_B

    def prepare(self, parts: PartsPlan, conventions: Conventions) -> UnitPlan:
        """Fold the directions, and find what stands between the stream and the values.

        Raises:
            UnsupportedModelError: where values are no linear reading of the stream.
        """
        return _Plan(self, parts)


class _Plan(SourcePlan):
    def __init__(self, unit: HeadRead, parts: PartsPlan) -> None:
        super().__init__(unit, parts, unit.heads, unit.layers, unit.top, unit.sum)
        self.columns_B, stream = unit.columns_B, parts.stream
        ((layer, ours),) = self.layers
        if layer.points is not None:
            raise UnsupportedModelError(
                f"what values are made of is not seen in {stream.backend.name}, a model of "
                "TransformerLens; give the Hugging Face model"
            )
        self.layer, self.ours, (self.head,) = layer, ours, layer.heads
        self.way: AttentionWay = attention_way(stream.whole, ours.site)

    def recorder(self, view: View) -> Recorder:
        return _Recorder(self, view)


class _Recorder(SourceRecorder):
    def __init__(self, plan: _Plan, view: View) -> None:
        super().__init__(plan, view)
        self._read, self._call, self._view = plan, list[AttentionCall](), view
        way = plan.way
        self._way = WayIn(way.place, way.passed, plan.dtype, self._call.append)
        self._v_NM: Tensor | None = None
        self._bias_N, self._value_N, self._weight_N = (
            torch.zeros(len(view), dtype=plan.dtype, device="cpu") for _ in "bvw"
        )

    def taps(self, view: View) -> list[Tap]:
        """Those of the unit ``source``, and the way from its values back to the stream."""
        place = self._read.ours.site.place.entered.ahead
        return [self._way, *super().taps(view), Tap(place, self._see)]

    def finish(self, parts: Parts) -> HeadReadSplit:
        split = super().finish(parts)
        device = parts.reading.scale_N.device
        scale_N = parts.reading.scale_N
        if self._read.ours.post_norm is not None and self._heads is not None:
            scale_N = scale_N * self._heads.post_scales_LN[0]
        assert self._v_NM is not None
        return HeadReadSplit(
            **vars(split),
            v_NM=self._v_NM / scale_N.to(self._v_NM.device)[:, None],
            bias_N=self._bias_N.to(device) / scale_N,
            value_N=self._value_N.to(device) / scale_N,
            weight_N=self._weight_N,
        )

    def _see(self, seen: Call) -> None:
        """Read the way while the attention module still holds what it is made of."""
        call, view = self._call.pop(), self._view
        device, n_sources = call.value.device, call.key.shape[2]
        columns_B = self._read.columns_B + (n_sources - view.entries.prompt_shape[1])
        d_ND = self._directions(call, seen, columns_B)
        rows_N = view.entries.rows
        shared = self._read.head // (call.query.shape[1] // call.value.shape[1])
        # Each row of the batch once in every round: directions of one token would add up.
        nth_N = (rows_N[:, None] == rows_N).tril(-1).sum(-1)
        for nth in range(int(nth_N.max()) + 1):
            some = (nth_N == nth).nonzero()[:, 0]
            rows_R = rows_N[some]
            at = rows_R, columns_B[rows_R], shared, d_ND[some.to(device)]
            v_RM, bias_R = self._way.reading(call.value, *at)
            if self._v_NM is None:
                self._v_NM = v_RM.new_zeros(len(rows_N), v_RM.shape[-1])
            self._v_NM[some.to(device)] = v_RM
            self._bias_N[some] = bias_R.to("cpu")
            value_RD = call.value[rows_R.to(device), shared, columns_B[rows_R].to(device)]
            self._value_N[some] = (value_RD.to(d_ND) * at[3]).sum(-1).to("cpu")
        self._way.forget()

    def _directions(self, call: AttentionCall, seen: Call, columns_B: Tensor) -> Tensor:
        """p (g * u) at every entry [N, D], ahead of the scales."""
        read, view = self._read, self._view
        folded, dtype = read.ours.folded, read.dtype
        device, n_heads = call.value.device, call.query.shape[1]
        (block,) = head_blocks(call, (read.head,), 1)
        found_ND = torch.zeros(len(view), call.value.shape[-1], dtype=dtype, device=device)
        for row, columns, tile in view.by_prompt(256, device):
            queries = columns + (call.query.shape[2] - len(view.columns))
            u_TI = tile.spread(folded.at(tile, device))
            if read.layer.form.scaled:
                z = read.ours.site.flat(seen.entered)
                u_TI = u_TI * gates(call, z, row, queries, dtype)
            u_TD = u_TI.view(len(u_TI), n_heads, -1)[:, read.head]
            p_TS = attention_weights(call, row, queries, block, dtype, read.layer.form.dtype)[0]
            p_T = p_TS[:, int(columns_B[row])]
            found_ND[tile.index] = p_T[:, None] * u_TD
            self._weight_N[tile.index] = p_T.to("cpu")
        return found_ND
