"""Heads: each attention head's own direct path to the logit.

A head's write is z_h W_O[h]. It is never built: the direction is folded through W_O first, and
through the post-norm where the sublayer has one, with that norm's scale frozen at its actual
value. What no head wrote (embeddings, MLPs, output biases) is the ``remainder``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dla_hooks.calibration.value_biases import head_constants
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules import norms
from dla_hooks.modules.hooks import Call, Tap
from dla_hooks.modules.linear import at_hand, bias_of, check_readable, pull_back
from dla_hooks.projection.kernels import frozen_scales, project_constant, project_heads
from dla_hooks.projection.ledger import Scalars
from dla_hooks.residual.stream import HeadSite, WriteSite
from dla_hooks.units.base import Claim, Split, Unit
from dla_hooks.units.plan import Run


class HeadUnit(Unit):
    """Every attention head, and a remainder."""

    made_of_parts = False

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        constants = head_constants(run.stream) if run.fold_value_biases else {}
        self._layers: list[_LayerHeads] = []
        n_heads = 0
        for block in run.stream.blocks:
            several = 0  # attentions in one block: the second one's heads are L0.1H0, L0.1H1, ...
            for write in block.writes:
                if write.heads is not None:
                    layer = f"L{block.layer}.{several}" if several else f"L{block.layer}"
                    constant_I = constants.get(write.label)
                    rows = slice(n_heads, n_heads + write.heads.n_heads)
                    heads = _LayerHeads(run, write, write.heads, constant_I, layer, rows)
                    self._layers.append(heads)
                    n_heads = rows.stop
                    several += 1
        if not self._layers:
            raise UnsupportedModelError(
                f"{type(run.stream.backend.root).__name__} has no attention heads with a direct "
                "path to the stream; use unit='component' or 'layer'"
            )
        # One row more, for what no head wrote.
        self._scalars = Scalars(n_heads + 1, len(run.entries), run.stream.work_dtype)

    def taps(self) -> list[Tap]:
        """Every output projection, and every post-norm behind one."""
        return [tap for layer in self._layers for tap in layer.taps(self._scalars)]

    def split(self) -> Split:
        """``L0H0``, ``L0H1``, …, ``remainder``."""
        final = self.run.final
        values_CN = self._scalars.gathered(final.scale_N.device)
        for layer in self._layers:
            layer.finish(values_CN)
        torch.sub(final.total_N(), values_CN[:-1].sum(0), out=values_CN[-1])
        labels = [label for layer in self._layers for label in layer.labels]
        return Split([*labels, "remainder"], values_CN)

    def norms_seen(self) -> list[tuple[str, float]]:
        """The post-norms, each with what its form leaves unexplained of its outputs."""
        return [(layer.norm_name, layer.misfit) for layer in self._layers]

    def claims(self) -> list[Claim]:
        """Each layer's heads, with the biases, make up what that layer's attention wrote."""
        return [layer.claim() for layer in self._layers]


class _LayerHeads:
    """The heads of one layer: two taps, and the scalars that they leave.

    Args:
        run: the plan.
        write: what the layer's attention writes.
        heads: where its heads can be seen.
        constant_I: what to take off every z [head * d_head], or None.
        layer: how the labels begin.
        rows: its heads' rows of the unit's scalars.
    """

    def __init__(
        self,
        run: Run,
        write: WriteSite,
        heads: HeadSite,
        constant_I: Tensor | None,
        layer: str,
        rows: slice,
    ) -> None:
        self._run, self._write, self._heads = run, write, heads
        self._constant_I = constant_I
        self._rows = rows
        self._post_norm: norms.Norm | None = None
        self._beta: Tensor | None = None
        self._in_stream = self._at_output = run.directions(write.label)
        dtype = run.stream.work_dtype
        if heads.post_norm is not None:
            name = heads.post_norm_name
            with run.stream.backend.without_user_hooks():
                norm = norms.probe(heads.post_norm, run.stream.d_model, name, dtype)
            self._post_norm = norm
            self._beta = norm.beta if bool(norm.beta.any()) else None
            self._at_output = self._in_stream.then(norm.pull_back)
        check_readable(heads.linear, heads.name)
        self._folded = self._at_output.then(lambda d_KM: pull_back(heads.linear, d_KM))
        if at_hand(heads.linear):
            # In between the model's own products, which leave nothing else in the processor's
            # caches, the same few steps take several times as long. What is offloaded is nearer
            # when the model has just read it.
            self._folded.prepare()
        # Besides the heads: what was taken off them, and the post-norm's scale.
        self._aside = Scalars(2, len(run.entries), dtype)
        self._misfits: list[Tensor] = []
        self.norm_name = heads.post_norm_name
        self.labels = [f"{layer}H{head}" for head in range(heads.n_heads)]

    @property
    def misfit(self) -> float:
        """The largest part of the post-norm's output that its form leaves unexplained."""
        return norms.largest(self._misfits)

    def taps(self, scalars: Scalars) -> list[Tap]:
        """What to watch.

        Args:
            scalars: where to write what each head contributes.
        """

        def see_z(call: Call) -> None:
            self._see_z(self._heads.z(call), scalars)

        taps = [Tap(self._heads.place, see_z)]
        post_norm = self._heads.post_norm_place
        if post_norm is not None:
            taps.append(Tap(post_norm, self._see_post_norm, self._see_post_scale))
        return taps

    def finish(self, values_CN: Tensor) -> None:
        """Add what biases write, and divide by all scales, after the run.

        Args:
            values_CN: the unit's rows, on the final norm's device; this layer's are changed.
        """
        final_N = self._run.final.scale_N
        biases_N, post_scale_N = self._aside.gathered(values_CN.device)
        bias_M, entries = bias_of(self._heads.linear), self._run.entries
        if bias_M is not None:
            project_constant(bias_M, entries, self._at_output, biases_N)
        beta_N = torch.zeros_like(biases_N)
        if self._beta is not None:
            project_constant(self._beta, entries, self._in_stream, beta_N)
        self._heads_HN = values_CN[self._rows]
        scale_N = final_N if self._post_norm is None else post_scale_N * final_N
        self._heads_HN /= scale_N
        self._no_head_N = biases_N / scale_N + beta_N / final_N

    def claim(self) -> Claim:
        """The heads, and the biases beside them, make up what attention wrote."""
        return Claim(
            f"the heads in {self._heads.name}",
            self._heads_HN.sum(0) + self._no_head_N,
            self._run.part(self._write.label),
            through_norm=self._post_norm is not None,
        )

    def _see_z(self, z: Tensor, scalars: Scalars) -> None:
        heads_HN = scalars.on(z.device)[self._rows]
        off_N = None if self._constant_I is None else self._aside.on(z.device)[0]
        project_heads(z, self._run.entries, self._folded, heads_HN, self._constant_I, off_N)

    def _see_post_scale(self, scale: Tensor) -> None:
        self._aside.on(scale.device)[1].copy_(self._run.entries.take(scale)[:, 0])

    def _see_post_norm(self, call: Call) -> None:
        x, y = call.entered, call.left
        assert self._post_norm is not None
        scale_N = self._aside.on(x.device)[1]
        self._misfits += frozen_scales(self._post_norm, x, y, self._run.entries, scale_N)
