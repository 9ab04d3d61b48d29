"""From the last stream to a logit: directions, biases, and the frozen final scale.

    logit_t = cap( k * (W_U[t] . P(N(x)) + b_t) ),   N(x) = gamma * (x - centre(x)) / s + beta

with P the (rare) linear modules between the norm and the unembedding. With s frozen this is
``x . d / s + bias`` for

    d    = k * centre(gamma * P^T W_U[t])          bias = k * (W_U[t] . P(beta) + b_t)

and, for a difference of two tokens, the same with the difference of their rows and biases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks import norms
from dla_hooks.answers import Targets
from dla_hooks.directions import Directions
from dla_hooks.hooks import Tap, Use
from dla_hooks.kernels import Scalars, frozen_scales, project
from dla_hooks.linear import at_hand, mean_row, pull_back, rows, value_at
from dla_hooks.norms import Norm
from dla_hooks.precision import full
from dla_hooks.sites import Sites
from dla_hooks.stream import Stream

_TARGETS_AT_ONCE = 256


@dataclass(frozen=True)
class Readout:
    """How the final norm's input is read, once per distinct target.

    Attributes:
        directions: in the stream, one per target [d_model].
        bias_K: what the logit has besides the stream [n_targets].
        norm: the final norm.
    """

    directions: Directions
    bias_K: Tensor
    norm: Norm

    @property
    def d_KM(self) -> Tensor:
        """All directions at once [n_targets, d_model]."""
        return self.directions.of(torch.arange(len(self.directions)))


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
    mean: tuple[Tensor, Tensor] | None = None
    if center_unembed and stream.softcap is None and targets.incorrect is None:
        mean = mean_row(stream.unembed, stream.vocabulary, dtype)
    fetch = _row_source(stream, targets)

    def difference(some: Tensor) -> tuple[Tensor, Tensor]:
        W_KM, b_K = fetch(targets.correct[some])
        if targets.incorrect is not None:
            W_wrong, b_wrong = fetch(targets.incorrect[some])
            return W_KM - W_wrong, b_K - b_wrong
        return (W_KM, b_K) if mean is None else (W_KM - mean[0], b_K - mean[1])

    n_targets = len(targets.correct)
    return Readout(
        Directions(
            lambda some: before_norm(stream, norm, *difference(some))[0],
            n_targets,
            dtype,
            hold=stream.d_model,
        ),
        torch.cat(
            [
                before_norm(stream, norm, *difference(some))[1]
                for some in torch.arange(n_targets).split(_TARGETS_AT_ONCE)
            ]
        ),
        norm,
    )


def _row_source(stream: Stream, targets: Targets) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """How rows of W_U and their biases are had for some ids, again and again.

    Rows that lie in memory are read where they lie. Others (on disk, or known only by what a
    quantised module computes) are fetched once, those that are needed.
    """
    unembed, dtype = stream.unembed, stream.work_dtype
    if at_hand(unembed):
        return lambda ids: rows(unembed, ids, dtype)
    asked = [targets.correct] if targets.incorrect is None else [targets.correct, targets.incorrect]
    needed = torch.cat(asked).unique()
    W, b = rows(unembed, needed, dtype)

    def find(ids: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.searchsorted(needed, ids).to(W.device)
        return W.index_select(0, place), b.index_select(0, place)

    return find


@full
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

    Attributes:
        scale_N: the final norm's scale, once the model has run.
        total_RN: x . d for each readout, not yet divided by it.
    """

    scale_N: Tensor
    total_RN: Tensor

    def __init__(self, stream: Stream, sites: Sites, readouts: list[Readout]) -> None:
        self._sites = sites
        self._readouts = readouts
        # The scale comes first: it is read where the norm is, and all else divided by it there.
        self._scalars = Scalars(1 + len(readouts), len(sites), stream.work_dtype)
        self._misfits: list[Tensor] = []
        runs = stream.final_norm_runs
        norm, name, use = stream.final_norm, stream.final_norm_name, Use(runs - 1, runs)
        self.taps = [
            Tap(norm, name, self._see_stream, before=True, use=use),
            Tap(norm, name, self._see_norm, use=use, see_scale=self._see_scale),
        ]

    def finish(self) -> None:
        """Bring everything together after a run."""
        rows = self._scalars.gathered()
        self.scale_N, self.total_RN = rows[0], rows[1:]

    @property
    def misfit(self) -> float:
        """The largest part of the norm's output that its form leaves unexplained."""
        return norms.largest(self._misfits)

    def total_N(self) -> Tensor:
        """x . d / s [N]: what the whole stream contributes to the logit (or difference)."""
        return self.total_RN[0] / self.scale_N

    def bias_N(self, which: int = 0) -> Tensor:
        """What the logit (or difference) has besides the stream [N]."""
        bias_K = self._readouts[which].bias_K.to(self.scale_N.device)
        return bias_K[self._sites.target_on(bias_K.device)]

    def logits_N(self, which: int = 0) -> Tensor:
        """x . d / s + bias [N]: the logit (or difference) before any cap."""
        return self.total_RN[which] / self.scale_N + self.bias_N(which)

    def _see_stream(self, x: Tensor, _: Tensor) -> None:
        totals = self._scalars.on(x.device)[1:]
        for readout, total_N in zip(self._readouts, totals, strict=True):
            project(x, self._sites, readout.directions, total_N)

    def _see_scale(self, scale: Tensor) -> None:
        self._scalars.on(scale.device)[0].copy_(self._sites.take(scale)[:, 0])

    def _see_norm(self, x: Tensor, y: Tensor) -> None:
        scale_N = self._scalars.on(x.device)[0]
        self._misfits += frozen_scales(self._readouts[0].norm, x, y, self._sites, scale_N)
