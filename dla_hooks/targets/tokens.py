"""From the last stream to a logit: directions, biases, and the frozen final scale.

    logit_t = cap( k * (W_U[t] . P(N(x)) + b_t) ),   N(x) = gamma * (x - centre(x)) / s + beta

with P the (rare) linear modules between the norm and the unembedding. With s frozen this is
``x . d / s + bias`` for

    d    = k * centre(gamma * P^T W_U[t])          bias = k * (W_U[t] . P(beta) + b_t)

and, for a difference of two tokens, the same with the difference of their rows and biases.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dla_hooks.modules import norms
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.linear import at_hand, mean_row, pull_back, rows, value_at
from dla_hooks.modules.norms import Norm
from dla_hooks.projection.directions import Directions
from dla_hooks.residual.stream import Stream
from dla_hooks.targets.base import Readout, Targets

_TARGETS_AT_ONCE = 256


def read_out(stream: Stream, targets: Targets, *, center_unembed: bool) -> Readout:
    """Fold the final norm and the unembedding into one direction per target.

    Args:
        stream: the located model.
        targets: token ids.
        center_unembed: take the vocabulary's mean off every row of W_U (and of b_U), as
            TransformerLens does unless the logits are capped. Differences do not change.
    """
    dtype = stream.work_dtype
    with stream.backend.without_user_hooks():
        norm = norms.probe(stream.final_norm.module, stream.d_model, stream.final_norm.name, dtype)
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


@outside_autocast
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
