"""Heads: each attention head's own direct path to the logit.

A head's write is z_h W_O[h]. It is never built: the direction is folded through W_O first, and
through the post-norm where the sublayer has one, with that norm's scale frozen at its actual
value. What no head wrote (embeddings, MLPs, output biases) is the ``remainder``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dla_hooks.backends import Conventions
from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.calibration.value_biases import head_constants
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.entries import Entries
from dla_hooks.modules import norms
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.linear import at_hand, bias_of, check_readable, pull_back
from dla_hooks.projection.kernels import frozen_scales, project_constant, project_heads
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.tiles import View
from dla_hooks.residual import architecture
from dla_hooks.residual.stream import Stream, WriteSite
from dla_hooks.results.rows import Row, Words
from dla_hooks.units.base import Claim, Recorder, Split, Unit, UnitPlan
from dla_hooks.units.parts import Parts, PartsPlan


class Heads(Unit):
    """``L0H0``, ``L0H1``, …, ``remainder``: every attention head, and what no head wrote.

    Called with a projection, ``Heads("self_attn.o_proj", …)`` is the declaration of where an
    architecture keeps its heads (:class:`dla_hooks.Write` takes it).

    Args:
        fold_value_biases: move each head's constant part (its value bias) to the remainder, as
            TransformerLens does by default. None leaves it to the call, or to how the model was
            wrapped.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> result = dla_hooks.direct_logit_attribution(
    ...     model, "The keys near the cabinet", " are", unit=dla_hooks.Heads(),
    ...     tokenizer=tokenizer)
    >>> result.labels[0], result.labels[-1]
    ('L0H0', 'remainder')
    """

    words = Words(
        name="head",
        title="Heads",
        sentence="heads: what each attention head wrote",
        index="head",
        chart="heatmap",
        remainder="remainder",
        remainder_is="what no head wrote",
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A unit; or, with a projection, the declaration of the same name."""
        if args or "proj" in kwargs:
            return architecture.Heads(*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, *, fold_value_biases: bool | None = None) -> None:
        if fold_value_biases not in (True, False, None):
            raise InputError(
                "fold_value_biases must be True, False, or None for the call's own; "
                f"got {fold_value_biases!r}"
            )
        self.fold_value_biases = fold_value_biases

    def places(self, stream: Stream) -> list[Place]:
        """Every z, the post-norms behind them, and the last stream."""
        sites = [write.heads for write in stream.writes if write.heads is not None]
        norms_behind = [site.post_norm_place for site in sites]
        found = [place for place in norms_behind if place is not None]
        return [*(site.place for site in sites), *found, stream.last]

    def prepare(self, parts: PartsPlan, conventions: Conventions) -> UnitPlan:
        """Fold the directions through every output projection.

        Raises:
            UnsupportedModelError: for a model without such heads, or whose projections cannot be
                read through.
        """
        fold = self.fold_value_biases
        if fold is None:
            fold = conventions.fold_value_biases
        return _HeadsPlan(self, parts, fold)


class _HeadsPlan(UnitPlan):
    """All layers' heads on one model and target."""

    def __init__(self, unit: Heads, parts: PartsPlan, fold_value_biases: bool) -> None:
        super().__init__(unit)
        stream = parts.stream
        constants = head_constants(stream) if fold_value_biases else {}
        self.layers: list[_Layer] = []
        self.rows: list[Row] = []
        for block in stream.blocks:
            with_heads = [write for write in block.writes if write.heads is not None]
            for sub, write in enumerate(with_heads):
                first = len(self.rows)
                self.rows += _rows_of(write, sub)
                place = slice(first, len(self.rows))
                self.layers.append(_Layer(parts, write, constants.get(write.label), place))
        if not self.layers:
            raise UnsupportedModelError(
                f"{type(stream.backend.root).__name__} has no attention heads with a direct path "
                "to the stream; use unit='component' or 'layer'"
            )
        remainder = unit.words.remainder
        self.rows.append(Row(remainder, remainder))
        self.dtype = stream.work_dtype

    def recorder(self, entries: Entries) -> Recorder:
        return _HeadsRecorder(self, entries)


class _HeadsRecorder(Recorder):
    """All layers' heads in one run."""

    def __init__(self, plan: _HeadsPlan, entries: Entries) -> None:
        self._plan = plan
        self._values = FixedRows(len(plan.rows), len(entries), plan.dtype)
        self._layers = [_LayerRecorder(layer, self._values, entries) for layer in plan.layers]

    def taps(self, view: View) -> list[Tap]:
        """Every output projection, and every post-norm behind one."""
        return [tap for layer in self._layers for tap in layer.taps(view)]

    def finish(self, parts: Parts) -> Split:
        reading = parts.reading
        values_CN = self._values.gathered(reading.scale_N.device)
        claims = []
        for layer in self._layers:
            claim = layer.finish(values_CN, parts)
            if claim is not None:
                claims.append(claim)
        torch.sub(reading.total_N, values_CN[:-1].sum(0), out=values_CN[-1])
        seen = [(layer.norm_name, layer.misfit) for layer in self._layers]
        return Split(self._plan.rows, values_CN, claims, seen)


class _Layer:
    """The heads of one layer, with the directions that they are projected on.

    Args:
        parts: the parts of the stream.
        write: what the layer's attention writes.
        constant_I: what to take off every z [head * d_head], or None.
        rows: its heads' rows among the unit's.
    """

    def __init__(
        self, parts: PartsPlan, write: WriteSite, constant_I: Tensor | None, rows: slice
    ) -> None:
        assert write.heads is not None
        stream = parts.stream
        self.write, self.site, self.rows = write, write.heads, rows
        self.constant_I = constant_I
        self.dtype = stream.work_dtype
        self.in_stream = self.at_output = parts.directions(write.label)
        self.post_norm: norms.Norm | None = None
        self.beta_M: Tensor | None = None
        place = self.site.post_norm_place
        if place is not None:
            self.post_norm = norm = norm_at(stream, place)
            self.beta_M = norm.beta if bool(norm.beta.any()) else None
            self.at_output = self.in_stream.then(norm.pull_back)
        linear = self.site.linear
        check_readable(linear, self.site.name)
        self.folded = self.at_output.then(lambda d_KM: pull_back(linear, d_KM))
        if at_hand(linear):
            # Fold before the run: between the model's own matrix products this is several times
            # slower (cold caches). An offloaded weight is at hand when the model has just read it.
            self.folded.prepare()


class _LayerRecorder:
    """The heads of one layer in one run.

    Args:
        layer: the layer.
        values: the unit's rows.
        entries: what is read.
    """

    def __init__(self, layer: _Layer, values: FixedRows, entries: Entries) -> None:
        self._layer, self._values = layer, values
        # Besides the heads: what was taken off them, and the post-norm's scale.
        self._aside = FixedRows(2, len(entries), layer.dtype)
        self._misfits: list[Tensor] = []
        self.norm_name = layer.site.post_norm_name

    @property
    def misfit(self) -> float:
        """The largest part of the post-norm's output that its form leaves unexplained."""
        return norms.largest(self._misfits)

    def taps(self, view: View) -> list[Tap]:
        """The output projection, and the post-norm behind it."""
        layer, norm = self._layer, self._layer.post_norm

        def see_z(call: Call) -> None:
            z = layer.site.z(call)
            heads_HN = self._values.on(z.device)[layer.rows]
            off_N = None if layer.constant_I is None else self._aside.on(z.device)[0]
            project_heads(z, view, layer.folded, heads_HN, layer.constant_I, off_N)

        taps = [Tap(layer.site.place, see_z)]
        place = layer.site.post_norm_place
        if place is None or norm is None:
            return taps

        def see_post_norm(call: Call) -> None:
            x, y = call.entered, call.left
            self._misfits += frozen_scales(norm, x, y, view, self._aside.on(x.device)[1])

        def see_post_scale(scale: Tensor) -> None:
            self._aside.on(scale.device)[1].copy_(view.take(scale)[:, 0])

        return [*taps, Tap(place, see_post_norm, see_post_scale)]

    def finish(self, values_CN: Tensor, parts: Parts) -> Claim | None:
        """Divide by all scales, after the run, and claim what the heads and biases make up.

        Args:
            values_CN: the unit's rows, on the final norm's device; this layer's are changed.
            parts: what the layer's attention wrote is among them.
        """
        layer, final_N, view = self._layer, parts.reading.scale_N, parts.view
        biases_N, post_scale_N = self._aside.gathered(values_CN.device)
        scale_N = final_N if layer.post_norm is None else post_scale_N * final_N
        heads_HN = values_CN[layer.rows]
        heads_HN /= scale_N
        if layer.write.label in parts.missing:
            return None
        bias_M = bias_of(layer.site.linear)
        if bias_M is not None:
            project_constant(bias_M, view, layer.at_output, biases_N)
        no_head_N = biases_N / scale_N
        if layer.beta_M is not None:
            beta_N = torch.zeros_like(biases_N)
            project_constant(layer.beta_M, view, layer.in_stream, beta_N)
            no_head_N += beta_N / final_N
        return Claim(
            f"the heads in {layer.site.name}",
            heads_HN.sum(0) + no_head_N,
            parts[layer.write.label],
            through_norm=layer.post_norm is not None,
        )


def _rows_of(write: WriteSite, sub: int) -> list[Row]:
    """The heads of a block's attention; those of a second one are L0.1H0, L0.1H1, …"""
    assert write.heads is not None
    layer = f"L{write.layer}.{sub}" if sub else f"L{write.layer}"
    heads = range(write.heads.n_heads)
    return [Row(f"{layer}H{head}", "head", write.layer, sub, head) for head in heads]
