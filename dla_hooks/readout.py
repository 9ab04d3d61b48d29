"""From the last stream to a logit: directions, biases, and the frozen final scale.

    logit_t = cap( k * (W_U[t] . P(N(x)) + b_t) ),   N(x) = gamma * (x - centre(x)) / s + beta

with P the (rare) linear modules between the norm and the unembedding. With s frozen this is
``x . d / s + bias`` for

    d    = k * centre(gamma * P^T W_U[t])          bias = k * (W_U[t] . P(beta) + b_t)

and, for a difference of two tokens, the same with the difference of their rows and biases.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dla_hooks import norms
from dla_hooks.answers import Targets
from dla_hooks.hooks import Tap, Use
from dla_hooks.kernels import over_tiles, project
from dla_hooks.linear import mean_row, pull_back, rows, value_at
from dla_hooks.norms import Norm
from dla_hooks.sites import Sites
from dla_hooks.stream import Stream


@dataclass(frozen=True)
class Readout:
    """How the final norm's input is read, once per distinct target.

    Attributes:
        d_KM: directions in the stream [n_targets, d_model].
        bias_K: what the logit has besides the stream [n_targets].
        norm: the final norm.
    """

    d_KM: Tensor
    bias_K: Tensor
    norm: Norm


def read_out(stream: Stream, targets: Targets, *, center_unembed: bool) -> Readout:
    """Fold the final norm and the unembedding into one direction per target.

    Args:
        stream: the located model.
        targets: token ids.
        center_unembed: take the vocabulary's mean off every row of W_U (and of b_U), as
            TransformerLens does unless the logits are capped. Differences do not change.
    """
    dtype = stream.work_dtype
    with stream.kind.quiet():
        norm = norms.probe(stream.final_norm, stream.d_model, stream.final_norm_name, dtype)
    W_KM, b_K = rows(stream.unembed, targets.correct, dtype)
    if targets.incorrect is not None:
        W_wrong, b_wrong = rows(stream.unembed, targets.incorrect, dtype)
        W_KM, b_K = W_KM - W_wrong, b_K - b_wrong
    elif center_unembed and stream.softcap is None:
        W_mean, b_mean = mean_row(stream.unembed, stream.vocabulary, dtype)
        W_KM, b_K = W_KM - W_mean, b_K - b_mean

    d_KM, bias_K = before_norm(stream, norm, W_KM, b_K)
    return Readout(d_KM, bias_K, norm)


def before_norm(
    stream: Stream, norm: Norm | None, W_KM: Tensor, b_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of the unembedding as directions in the stream, with the final norm folded in.

    Args:
        stream: the located model.
        norm: the final norm, or None to stop behind it: what is returned then reads the norm's
            output.
        W_KM: rows of W_U, or sums of rows [n, width].
        b_K: their biases [n].

    Returns:
        Directions [n, d_model] and what the logits have besides [n], both times the logit scale.
    """
    constant = W_KM.new_zeros(stream.d_model) if norm is None else norm.beta
    for module in stream.after_norm:
        constant = value_at(module, constant).to(W_KM.dtype)
    bias_K = W_KM @ constant.to(W_KM) + b_K
    for module in reversed(stream.after_norm):
        W_KM = pull_back(module, W_KM)
    d_KM = W_KM if norm is None else norm.pull_back(W_KM)
    return stream.logit_scale * d_KM, stream.logit_scale * bias_K


class FinalStream:
    """What the final norm saw: its scale at every site, and the whole stream's projections.

    Args:
        stream: the located model.
        sites: where to look.
        readouts: the directions to project on; the first is the one that is attributed.
    """

    def __init__(self, stream: Stream, sites: Sites, readouts: list[Readout]) -> None:
        self._sites = sites
        self._readouts = readouts
        d = readouts[0].d_KM
        self.scale_N = d.new_zeros(len(sites))
        self.total_RN = d.new_zeros(len(readouts), len(sites))
        self.misfit = 0.0
        runs = stream.final_norm_runs
        norm, name, use = stream.final_norm, stream.final_norm_name, Use(runs - 1, runs)
        self.taps = [
            Tap(norm, name, self._see_stream, before=True, use=use),
            Tap(norm, name, self._see_norm, use=use, see_scale=self._see_scale),
        ]

    def total_N(self) -> Tensor:
        """x . d / s [N]: what the whole stream contributes to the logit (or difference)."""
        return self.total_RN[0] / self.scale_N

    def bias_N(self, which: int = 0) -> Tensor:
        """What the logit (or difference) has besides the stream [N]."""
        bias_K = self._readouts[which].bias_K
        return bias_K[self._sites.target_on(bias_K.device)]

    def logits_N(self, which: int = 0) -> Tensor:
        """x . d / s + bias [N]: the logit (or difference) before any cap."""
        return self.total_RN[which] / self.scale_N + self.bias_N(which)

    def _see_stream(self, x: Tensor, _: Tensor) -> None:
        for readout, total_N in zip(self._readouts, self.total_RN, strict=True):
            project(x, self._sites, readout.d_KM, total_N)

    def _see_scale(self, scale: Tensor) -> None:
        self.scale_N.copy_(self._sites.take(scale, slice(None))[:, 0])

    def _see_norm(self, x: Tensor, y: Tensor) -> None:
        norm = self._readouts[0].norm
        for tile, x_TM, y_TM in over_tiles(x, y, self._sites, self.scale_N):
            self.scale_N[tile], misfit = norms.frozen_scale(norm, x_TM, y_TM)
            self.misfit = max(self.misfit, misfit)
