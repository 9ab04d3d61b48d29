"""The mean over the vocabulary, of unembedding rows and of logits; masked tokens have no part."""

from __future__ import annotations

import torch
from torch import Tensor

from dla_hooks.modules.linear import mean_row, rows
from dla_hooks.residual.stream import Stream


def mean_of_rows(stream: Stream, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean row of W_U [d] and the mean bias [], over the tokens that the model does not mask.

    Args:
        stream: the located model.
        dtype: of the mean.
    """
    W_M, b = mean_row(stream.unembed, stream.vocabulary, dtype)
    count, masked = stream.vocabulary, stream.masked
    if masked is not None:
        W_KM, b_K = rows(stream.unembed, masked, dtype)
        left = count / (count - len(masked))
        W_M, b = W_M * left, b * left
        W_M = W_M - W_KM.sum(0).to(W_M) / (count - len(masked))
        b = b - b_K.sum().to(b) / (count - len(masked))
        count -= len(masked)
    if stream.logit_bias is not None:
        b = b + (stream.logit_bias.sum() / count).to(b)  # nothing for masked tokens
    return W_M, b


def finite_mean(logits: Tensor) -> Tensor:
    """The mean over the last axis in float64; a hook or the model may mask tokens with -inf.

    >>> finite_mean(torch.tensor([[1.0, 3.0], [1.0, -torch.inf]]))
    tensor([2., 1.], dtype=torch.float64)
    """
    means = logits.mean(-1, dtype=torch.float64)
    if bool(torch.isfinite(means).all()):
        return means
    masked = logits == -torch.inf
    sums = logits.masked_fill(masked, 0).sum(-1, dtype=torch.float64)
    return sums / (logits.shape[-1] - masked.sum(-1))
