"""All tokens ranked for every row of a unit, a tile of entries and of the vocabulary at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.linear import matrix, value_at
from dla_hooks.modules.vocabulary import logit_tiles, token_biases
from dla_hooks.modules.weights import run_device
from dla_hooks.residual.stream import Stream
from dla_hooks.stacks.every_logit import EveryLogit
from dla_hooks.stacks.extremes import Extremes
from dla_hooks.stacks.final_norm import FinalNorm
from dla_hooks.stacks.kept import Kept
from dla_hooks.stacks.row_vectors import RowVectors

_VECTORS_AT_ONCE = 2048
"""Vectors that the unembedding is read for at once: enough that reading it costs little."""


class TokenRanks(NamedTuple):
    """The ranks of every row.

    Attributes:
        up, down: logits less their mean [row, *batch_and_pos, k], the strongest first; NaN where
            the prompt has no token.
        up_ids, down_ids: their tokens; -1 there.
        mean: the mean logit of each row [row, *batch_and_pos].
        n_tokens: how many tokens are ranked.
    """

    up: Tensor
    up_ids: Tensor
    down: Tensor
    down_ids: Tensor
    mean: Tensor
    n_tokens: int


@outside_autocast
def rank_tokens(
    kept: Kept,
    final: FinalNorm,
    rows: RowVectors,
    every: EveryLogit,
    counted: Tensor | None,
    k: int,
) -> TokenRanks:
    """Rank all tokens for every row, after the run.

    Args:
        kept: what was kept of the run.
        final: the final norm.
        rows: the unit's.
        every: holds the rows against the model's own logits.
        counted: which tokens are ranked [vocabulary], or None for all.
        k: how many to keep each way.

    Raises:
        DecompositionError: when the rows do not sum to the model's own logits.
    """
    stream, n = kept.stream, len(kept.entries)
    n_tokens = stream.vocabulary if counted is None else int(counted.sum())
    ranker = _Ranker(stream, final, rows, every, counted, min(k, n_tokens))
    step = max(1, _VECTORS_AT_ONCE // len(rows.labels))
    # One tile of no entry, where there are none, for the shapes of the result.
    tiles = [ranker.rank(slice(start, min(start + step, n))) for start in range(0, max(n, 1), step)]
    up, up_ids, down, down_ids, mean = (torch.cat(parts, -1) for parts in zip(*tiles, strict=True))
    unfold = kept.entries.unfold

    def numbers(values_CKN: Tensor) -> Tensor:
        return unfold(values_CKN).movedim(1, -1)

    def names(ids_CKN: Tensor) -> Tensor:
        return numbers(ids_CKN.double()).nan_to_num(nan=-1.0).long()

    mean = unfold(mean)
    return TokenRanks(numbers(up), names(up_ids), numbers(down), names(down_ids), mean, n_tokens)


class _Ranker:
    def __init__(
        self,
        stream: Stream,
        final: FinalNorm,
        rows: RowVectors,
        every: EveryLogit,
        counted: Tensor | None,
        k: int,
    ) -> None:
        self._stream, self._final, self._rows, self._every = stream, final, rows, every
        self._counted, self._k = counted, k
        # What the logits have whatever the stream is; read as one more vector.
        constant = final.beta.to(stream.work_dtype)
        for module in stream.after_norm:
            constant = value_at(module, constant).to(constant)
        self._constant = constant * stream.logit_scale

    def rank(self, place: slice) -> tuple[Tensor, ...]:
        """Rank all tokens at some entries: up, their ids, down, their ids [row, k, entries]; mean.

        The mean is [row, entries].
        """
        stream, n_rows, size = self._stream, len(self._rows.labels), place.stop - place.start
        y_RM = self._read(self._rows.at(place)).flatten(0, 1)
        held = self._every.part(place, n_rows, self._rows.whole)
        n_parts = len(y_RM)
        if held is not None:
            last = self._read(self._final.whole(place))[held.entries]
            y_RM = torch.cat((y_RM, last.to(y_RM), self._constant[None].to(y_RM)))
        device = run_device(stream.unembed)
        ranks = Extremes(self._k, n_parts, self._counted, stream.work_dtype, device)
        for vectors, tokens, values in logit_tiles(stream.unembed, y_RM):
            tokens = slice(tokens.start, min(tokens.stop, stream.vocabulary))
            values = values[:, : max(0, tokens.stop - tokens.start)]
            if held is not None:
                held.add(vectors, tokens, values, size)
            if vectors.start < n_parts:
                own = slice(vectors.start, min(vectors.stop, n_parts))
                ranks.add(own, tokens, values[: own.stop - own.start])
        if held is not None:
            biases = token_biases(stream.unembed, held.constant)[: stream.vocabulary]
            if stream.logit_bias is not None:
                biases = biases + stream.logit_bias.to(biases)
            self._every.hold(held, held.constant + stream.logit_scale * biases)
        return self._by_row(ranks, n_rows)

    def _read(self, y: Tensor) -> Tensor:
        """What stands behind the norm as the unembedding reads it, times the logit scale."""
        for module in self._stream.after_norm:
            y = y.to(matrix(module).device) @ matrix(module).T.to(y)
        return y * self._stream.logit_scale

    def _by_row(self, ranks: Extremes, n_rows: int) -> tuple[Tensor, ...]:
        mean = ranks.mean()
        found = []
        for numbers, ids in (ranks.largest(), ranks.smallest()):
            for each in ((numbers - mean[:, None]).to(numbers), ids):
                found.append(each.unflatten(0, (n_rows, -1)).movedim(1, -1))
        return *found, mean.to(found[0]).unflatten(0, (n_rows, -1))
