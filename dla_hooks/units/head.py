"""Heads: each attention head's own direct path to the logit.

A head's write is z_h W_O[h]. It is never built: the direction is folded through W_O first, and
through the post-norm where the sublayer has one, with that norm's scale frozen at its actual
value. What no head wrote (embeddings, MLPs, output biases) is the ``remainder``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dla_hooks import norms
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.folding import head_constants
from dla_hooks.hooks import Tap
from dla_hooks.kernels import over_tiles, project_heads
from dla_hooks.linear import pull_back, value_at
from dla_hooks.run import Run
from dla_hooks.stream import HeadSite, WriteSite
from dla_hooks.units.base import Claim, Split, Unit


class HeadUnit(Unit):
    """Every attention head, and a remainder."""

    made_of_parts = False

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        constants = head_constants(run.stream) if run.fold_value_biases else {}
        self._layers = []
        for block in run.stream.blocks:
            several = 0  # attentions in one block: the second one's heads are L0.1H0, L0.1H1, ...
            for write in block.writes:
                if write.heads is not None:
                    layer = f"L{block.layer}.{several}" if several else f"L{block.layer}"
                    constant_I = constants.get(write.label)
                    self._layers.append(_LayerHeads(run, write, write.heads, constant_I, layer))
                    several += 1
        if not self._layers:
            raise UnsupportedModelError(
                f"{type(run.stream.model).__name__} has no attention heads with a direct path to "
                "the stream; use unit='component' or 'layer'"
            )

    def taps(self) -> list[Tap]:
        """Every output projection, and every post-norm behind one."""
        return [tap for layer in self._layers for tap in layer.taps()]

    def split(self) -> Split:
        """``L0H0``, ``L0H1``, …, ``remainder``."""
        labels = [label for layer in self._layers for label in layer.labels]
        heads_CN = torch.cat([layer.heads_HN() for layer in self._layers])
        remainder_N = self.run.final.total_N() - heads_CN.sum(0)
        return Split([*labels, "remainder"], torch.cat((heads_CN, remainder_N[None])))

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
    """

    def __init__(
        self, run: Run, write: WriteSite, heads: HeadSite, constant_I: Tensor | None, layer: str
    ) -> None:
        self._run, self._write, self._heads = run, write, heads
        self._constant_I = constant_I
        self._post_norm = None
        like = run.readout.d_KM
        if heads.post_norm is not None:
            name = heads.post_norm_name
            with run.stream.kind.quiet():
                self._post_norm = norms.probe(heads.post_norm, like.shape[1], name, like.dtype)
        self._post_scale_N = like.new_ones(len(run.sites))
        self._unscaled_HN = like.new_zeros(heads.n_heads, len(run.sites))
        self.norm_name, self.misfit = heads.post_norm_name, 0.0
        self.labels = [f"{layer}H{head}" for head in range(heads.n_heads)]

    def taps(self) -> list[Tap]:
        use = self._write.use
        taps = [Tap(self._heads.proj, self._heads.name, self._see_z, use=use)]
        if self._heads.post_norm is not None:
            taps.append(
                Tap(
                    self._heads.post_norm,
                    self._heads.post_norm_name,
                    self._see_post_norm,
                    use=use,
                    see_scale=self._see_post_scale,
                )
            )
        return taps

    def heads_HN(self) -> Tensor:
        """What each head contributed at each site."""
        return self._unscaled_HN / (self._post_scale_N * self._run.final.scale_N)

    def claim(self) -> Claim:
        return Claim(
            f"the heads in {self._heads.name}",
            self.heads_HN().sum(0) + self._no_head_N(),
            self._run.part(self._write.label),
            through_norm=self._post_norm is not None,
        )

    def _no_head_N(self) -> Tensor:
        """What the write holds besides its heads: biases, and the constants taken off them."""
        d_stream_KM, d_KM = self._directions()
        z = self._constant_I
        if z is None:
            z = d_KM.new_zeros(self._heads.n_heads * self._heads.d_head)
        target_N = self._run.sites.target_on(d_KM.device)
        constant_M = value_at(self._heads.linear, z).to(d_KM)
        constant_N = (d_KM @ constant_M)[target_N] / self._post_scale_N
        if self._post_norm is not None:
            constant_N += (d_stream_KM @ self._post_norm.beta.to(d_KM))[target_N]
        return constant_N / self._run.final.scale_N

    def _directions(self) -> tuple[Tensor, Tensor]:
        """In the stream, and at the output projection's output [n_targets, d_model] each."""
        d_KM = self._run.direction(self._write.label)
        return d_KM, d_KM if self._post_norm is None else self._post_norm.pull_back(d_KM)

    def _see_z(self, entered: Tensor, left: Tensor) -> None:
        z = self._heads.z(entered, left)
        project_heads(
            z,
            self._run.sites,
            self._directions()[1],
            lambda d_KM: pull_back(self._heads.linear, d_KM),
            self._unscaled_HN,
            self._constant_I,
        )

    def _see_post_scale(self, scale: Tensor) -> None:
        self._post_scale_N.copy_(self._run.sites.take(scale, slice(None))[:, 0])

    def _see_post_norm(self, x: Tensor, y: Tensor) -> None:
        assert self._post_norm is not None
        for tile, x_TM, y_TM in over_tiles(x, y, self._run.sites, self._post_scale_N):
            self._post_scale_N[tile], misfit = norms.frozen_scale(self._post_norm, x_TM, y_TM)
            self.misfit = max(self.misfit, misfit)
