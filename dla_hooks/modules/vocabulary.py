"""All logits of a few vectors, a tile at a time, whatever the unembedding is.

A plain weight is read where it lies, slice after slice. One that is offloaded is read from its
store in the same slices. Any other linear module (adapted, quantised) is run on the vectors, if it
computes in float32 or wider. Otherwise its rows are read through its backward pass: exact, but its
time grows with the square of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dla_hooks.modules import vjp
from dla_hooks.modules.linear import at_hand, bias_of, matrix, output_width, rows
from dla_hooks.modules.weights import run_device

_WEIGHTS = 2**20
"""Entries of a plain weight that are read at once: 4 MiB in float32."""
_WEIGHTS_ON_GPU = 2**25
_LOGITS = 2**20
"""Logits in one tile."""
_LOGITS_ON_GPU = 2**25

LogitTile = tuple[slice, slice, Tensor]
"""Which vectors, which tokens, and their logits [vectors, tokens]."""


def logit_tiles(unembed: nn.Module, y_RM: Tensor) -> Iterator[LogitTile]:
    """Yield W_U y for some vectors and every token, without the unembedding's bias.

    Args:
        unembed: any module that is an affine map along its last axis.
        y_RM: vectors [n, width], in the dtype of the products.

    Yields:
        Tiles that make up [n, vocabulary], each once. For one slice of vectors the tokens come in
        their order.

    Raises:
        UnsupportedModelError: for an unembedding that cannot be read through.
    """
    y_RM = y_RM.to(run_device(unembed))
    weight = getattr(unembed, "weight", None)
    away = isinstance(weight, Tensor) and weight.is_meta
    if at_hand(unembed):
        return _from_weight(matrix(unembed), y_RM)
    if not away and vjp.dtype_of(unembed).itemsize >= y_RM.dtype.itemsize:
        return _from_runs(unembed, y_RM)
    return _from_rows(unembed, y_RM)


def token_biases(unembed: nn.Module, like: Tensor) -> Tensor:
    """The unembedding's own bias for every token [vocabulary], in another tensor's dtype."""
    b_V = bias_of(unembed)
    if b_V is None:
        return like.new_zeros(output_width(unembed))
    return b_V.to(like)


def _from_weight(W_VM: Tensor, y_RM: Tensor) -> Iterator[LogitTile]:
    every = slice(0, len(y_RM))
    for tokens in _cut(len(W_VM), _step(y_RM)):
        yield every, tokens, y_RM @ W_VM[tokens].to(y_RM).T


def _from_rows(unembed: nn.Module, y_RM: Tensor) -> Iterator[LogitTile]:
    every = slice(0, len(y_RM))
    for tokens in _cut(output_width(unembed), _step(y_RM)):
        ids = torch.arange(tokens.start, tokens.stop, device="cpu")
        W_TM, _ = rows(unembed, ids, y_RM.dtype)
        yield every, tokens, y_RM @ W_TM.to(y_RM).T


def _from_runs(unembed: nn.Module, y_RM: Tensor) -> Iterator[LogitTile]:
    """The module's own outputs for the vectors, less its output for nothing."""
    rows(unembed, torch.zeros(1, dtype=torch.long, device="cpu"), y_RM.dtype)  # is it linear?
    width, dtype = output_width(unembed), vjp.dtype_of(unembed)
    b_V = token_biases(unembed, y_RM)
    for some in _cut(len(y_RM), max(1, _most(y_RM, _LOGITS, _LOGITS_ON_GPU) // width)):
        with vjp.past_hooks(unembed), torch.no_grad():
            # With the axes that a module of a model is given: [batch, pos, d_in].
            out = unembed.forward(y_RM[some][:, None].to(dtype))[:, 0]
        yield some, slice(0, width), out.to(y_RM) - b_V


def _step(y_RM: Tensor) -> int:
    """Tokens in a tile: neither the weights in it nor the logits are many."""
    n, width = y_RM.shape
    weights = _most(y_RM, _WEIGHTS, _WEIGHTS_ON_GPU) // max(1, width)
    return max(1, min(weights, _most(y_RM, _LOGITS, _LOGITS_ON_GPU) // max(1, n)))


def _most(like: Tensor, on_cpu: int, on_gpu: int) -> int:
    return on_gpu if like.is_cuda else on_cpu


def _cut(count: int, step: int) -> Iterator[slice]:
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
