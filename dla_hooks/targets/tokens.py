"""Logits of tokens, and differences of two: what ``answer_tokens`` means by default.

With the final norm's scale s frozen, the logit of token t is ``x . d / s + bias`` with

    d    = k * centre(gamma * P^T W_U[t])          bias = k * (W_U[t] . P(beta) + b_t)

and the difference of two tokens is the same with the difference of their rows and biases
(:mod:`dla_hooks.projection.reading_point` has the symbols).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.inputs.answers import Answers, check_answers, over_positions
from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.positions import Selection
from dla_hooks.inputs.prompts import to_strings
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.linear import at_hand, mean_row, pull_back, rows, value_at
from dla_hooks.modules.norms import Norm
from dla_hooks.projection.directions import Directions, few
from dla_hooks.projection.output_hooks import Outputs
from dla_hooks.projection.reading_point import Reading, ReadingPoint
from dla_hooks.projection.readout import Readout
from dla_hooks.residual.hooked import decoders
from dla_hooks.residual.stream import Stream, coarsest
from dla_hooks.targets.base import Observed, Target
from dla_hooks.tolerance import is_coarse

_TARGETS_AT_ONCE = 256


@dataclass(frozen=True)
class TokenPairs:
    """Distinct tokens, or pairs of a right and a wrong one.

    Attributes:
        correct: ids [n_targets].
        incorrect: ids [n_targets], or None for the logits themselves.
    """

    correct: Tensor
    incorrect: Tensor | None


class TokenTarget(Target):
    """The logits of some tokens, or differences of logits.

    Args:
        stream: the located model.
        answers: token ids, of any shape that can be laid over positions.
        center_unembed: see :func:`read_out`.
    """

    def __init__(self, stream: Stream, answers: Answers, *, center_unembed: bool = False) -> None:
        self.stream = stream
        self._vocabulary, self._softcap = stream.vocabulary, stream.softcap
        self._named_with = stream.backend.answer_tokenizer
        self._outside: dict[str, Tensor] = {}  # with ids that are no tokens of the model
        correct = self._known("answer_tokens", answers.correct)
        incorrect = None
        if answers.incorrect is not None:
            incorrect = self._known("incorrect_tokens", answers.incorrect)
        if incorrect is None:
            distinct, self._which = correct.unique(return_inverse=True)
            self._pairs = TokenPairs(distinct, None)
        else:
            # A pair as one number: rows of a matrix are slow to tell apart.
            codes = correct * stream.vocabulary + incorrect
            distinct, self._which = codes.unique(return_inverse=True)
            self._pairs = TokenPairs(distinct // stream.vocabulary, distinct % stream.vocabulary)
        self._centred = center_unembed and stream.softcap is None and incorrect is None
        self.point = final_point(stream)
        self.readouts = [read_out(stream, self._pairs, center_unembed=center_unembed)]
        if stream.softcap is not None and self._pairs.incorrect is not None:
            # The cap acts on each logit, not on their difference: measure both for the check.
            for ids in (self._pairs.correct, self._pairs.incorrect):
                pairs = TokenPairs(ids, None)
                self.readouts.append(read_out(stream, pairs, center_unembed=False))

    def align(
        self, selection: Selection, prompt_shape: tuple[int, int], batched: bool = True
    ) -> Entries:
        """Lay the answers over the selected positions, by the reference's rule.

        Raises:
            ShapeMismatchError: when they do not broadcast; it names both shapes.
            TokenError: for an id outside the vocabulary, unless it stands at padding.
        """
        selected = tuple(selection.cols.shape)
        which = over_positions(self._which, selected)
        shape = torch.broadcast_shapes(which.shape, selected)
        valid = selection.valid.expand(shape)
        for name, ids in self._outside.items():
            check_answers(
                over_positions(ids, selected).expand(shape), valid, name, self._vocabulary
            )
        return Entries(
            selection.rows.expand(shape),
            selection.cols.expand(shape),
            which.expand(shape),
            valid,
            prompt_shape,
            batched,
            selection.mask,
        )

    def own_and_theirs(self, reading: Reading, observed: Observed) -> tuple[Tensor, Tensor]:
        """Our logits (or differences) and the model's, after any cap."""
        at = observed.entries_E
        theirs = observed.of(self._pairs.correct[observed.target_E])
        if self._pairs.incorrect is not None:
            theirs = theirs - observed.of(self._pairs.incorrect[observed.target_E])
        elif self._centred:
            theirs = theirs - observed.mean()

        def own(readout: int) -> Tensor:
            value_N = reading.value_N(readout)
            return value_N[at.to(value_N.device)].double()

        cap = self._softcap
        if cap is None:
            ours = own(0)
        elif self._pairs.incorrect is None:
            ours = _capped(own(0), cap)
        else:
            ours = _capped(own(1), cap) - _capped(own(2), cap)
        return ours, theirs.to(ours.device)

    def largest(self, observed: Observed) -> float:
        """The largest of the logits that are compared: of both, where two are subtracted."""
        pairs = self._pairs
        asked = [ids for ids in (pairs.correct, pairs.incorrect) if ids is not None]
        logits = [observed.of(ids[observed.target_E]).abs() for ids in asked]
        return max((float(one.max()) for one in logits if one.numel()), default=0.0)

    def names(self, entries: Entries, tokenizer: Any) -> tuple[list[str], list[str] | None]:
        """The text of the one answer, or of every entry's answer; likewise of the incorrect."""

        def texts(ids: Tensor) -> list[str]:
            if len(ids) > 1:
                ids = ids[entries.target_of_entry].reshape(-1)
            return to_strings(ids.tolist(), self._named_with(tokenizer))

        wrong = self._pairs.incorrect
        return texts(self._pairs.correct), None if wrong is None else texts(wrong)

    def _known(self, name: str, ids: Tensor) -> Tensor:
        """The ids, with 0 for what is outside the vocabulary: :meth:`align` refuses these."""
        outside = (ids < 0) | (ids >= self._vocabulary)
        if not bool(outside.any()):
            return ids
        self._outside[name] = ids
        return ids.masked_fill(outside, 0)


def final_point(stream: Stream) -> ReadingPoint:
    """The last stream, read through the final norm."""
    norm = norm_at(stream, stream.final_norm)
    rounds = is_coarse(coarsest((stream.stream_dtype, stream.write_dtype)))
    models = list(dict.fromkeys((stream.backend.model, stream.backend.root)))
    if stream.softcap is not None or stream.backend.scores_labels:
        models = []
    outputs = Outputs(() if stream.after_norm else decoders(stream), models)
    return ReadingPoint(
        stream.last, stream.final_norm, norm, stream.work_dtype, stream.unembed, rounds, outputs
    )


def read_out(stream: Stream, pairs: TokenPairs, *, center_unembed: bool) -> Readout:
    """Fold the final norm and the unembedding into one direction per target.

    Args:
        stream: the located model.
        pairs: token ids.
        center_unembed: take the vocabulary's mean off every row of W_U (and of b_U), as
            TransformerLens does unless the logits are capped. Differences do not change.
    """
    dtype = stream.work_dtype
    norm = norm_at(stream, stream.final_norm)
    mean: tuple[Tensor, Tensor] | None = None
    if center_unembed and stream.softcap is None and pairs.incorrect is None:
        mean = mean_row(stream.unembed, stream.vocabulary, dtype)
    fetch = _row_source(stream, pairs)

    def fold(some: Tensor, through: Norm | None = norm) -> tuple[Tensor, Tensor]:
        W_KM, b_K = fetch(pairs.correct[some])
        if pairs.incorrect is not None:
            W_wrong, b_wrong = fetch(pairs.incorrect[some])
            W_KM, b_K = W_KM - W_wrong, b_K - b_wrong
        elif mean is not None:
            W_KM, b_K = W_KM - mean[0], b_K - mean[1]
        return before_norm(stream, through, W_KM, b_K)

    def behind() -> Directions:
        return Directions(lambda some: fold(some, None)[0], n_targets, dtype)

    def of_logits(logits_EV: Tensor, target_E: Tensor) -> Tensor:
        found = _pick(logits_EV, pairs.correct[target_E])
        if pairs.incorrect is not None:
            return found - _pick(logits_EV, pairs.incorrect[target_E])
        return found if mean is None else found - logits_EV.double().mean(-1)

    n_targets = len(pairs.correct)
    if few(n_targets, stream.d_model):
        d_KM, bias_K = fold(torch.arange(n_targets, device="cpu"))
        directions = Directions.held(d_KM)
    else:
        some_at_once = torch.arange(n_targets, device="cpu").split(_TARGETS_AT_ONCE)
        bias_K = torch.cat([fold(some)[1] for some in some_at_once])
        directions = Directions(lambda some: fold(some)[0], n_targets, dtype)
    return Readout(directions, bias_K, behind, of_logits, stream.logit_scale)


def _row_source(stream: Stream, pairs: TokenPairs) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function from token ids to rows of W_U and their biases.

    Rows that lie in memory are read where they lie. Others (on disk, or known only by what a
    quantised module computes) are fetched once, those that are needed.
    """
    unembed, dtype = stream.unembed, stream.work_dtype
    if at_hand(unembed):
        return lambda ids: rows(unembed, ids, dtype)
    asked = [pairs.correct] if pairs.incorrect is None else [pairs.correct, pairs.incorrect]
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


def _capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def _pick(logits_EV: Tensor, ids_E: Tensor) -> Tensor:
    return logits_EV.gather(1, ids_E.to(logits_EV.device)[:, None])[:, 0].double()
