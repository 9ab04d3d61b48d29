"""Logits of tokens, differences of two, and any weighted sets: what ``answer_tokens`` means.

With the final norm's scale s frozen, the logit of token t is ``x . d / s + bias`` with

    d    = k * centre(gamma * P^T W_U[t])          bias = k * (W_U[t] . P(beta) + b_t)

and a weighted set of tokens is the same with the weighted sum of their rows and biases, as the
difference of two with the weights 1 and -1 (:mod:`dla_hooks.projection.reading_point` has the
symbols).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.calibration.scale_behind import scale_behind
from dla_hooks.inputs.answers import check_answers
from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.positions import Selection
from dla_hooks.inputs.prompts import to_strings
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.linear import at_hand, pull_back, rows, value_at
from dla_hooks.modules.norms import Norm
from dla_hooks.projection.directions import Directions, few
from dla_hooks.projection.ledger import largest
from dla_hooks.projection.output_hooks import Outputs
from dla_hooks.projection.reading_point import Reading, ReadingPoint
from dla_hooks.projection.readout import Readout
from dla_hooks.projection.vocabulary_mean import finite_mean, mean_of_rows
from dla_hooks.residual.hooked import decoders
from dla_hooks.residual.stream import Stream, coarsest
from dla_hooks.targets.base import Observed, Target
from dla_hooks.targets.laid import numbered
from dla_hooks.targets.token_sets import TokenSets
from dla_hooks.tolerance import is_coarse

_TARGETS_AT_ONCE = 256


class TokenTarget(Target):
    """The logits of some tokens, or of weighted sets of tokens, as differences of two are.

    Args:
        stream: the located model.
        sets: of any shape that can be laid over positions.
        center_unembed: see :func:`read_out`.
    """

    def __init__(self, stream: Stream, sets: TokenSets, *, center_unembed: bool = False) -> None:
        self.stream = stream
        self._vocabulary, self._softcap = stream.vocabulary, stream.softcap
        self._named_with = stream.backend.answer_tokenizer
        self._asked, self._has_outside = sets, False
        self._names: tuple[Any, list[str], list[str] | None] | None = None
        self._laid: tuple[Selection, tuple[int, int], bool, Entries] | None = None
        low, high = sets.ends
        if low < 0 or high >= stream.vocabulary:  # :meth:`align` refuses these
            self._has_outside = True
            outside = (sets.ids < 0) | (sets.ids >= stream.vocabulary)
            sets = replace(sets, ids=sets.ids.masked_fill(outside, 0))
        self._sets, self._which = sets.distinct()
        centred = center_unembed and stream.softcap is None and bool(self._sets.totals.any())
        self._centred = centred
        self.answers_K = self._sets.answers
        self.point = final_point(stream)
        self.readouts = [read_out(stream, self._sets, center_unembed=center_unembed)]
        if stream.softcap is not None and not self._sets.plain:
            # The cap acts on each logit, not on their sum: measure each for the check.
            for ids in self._sets.ids.unbind(-1):
                self.readouts.append(read_out(stream, TokenSets.of(ids), center_unembed=False))

    def align(
        self, selection: Selection, prompt_shape: tuple[int, int], batched: bool = True
    ) -> Entries:
        """Lay the answers over the selected positions, by the reference's rule.

        Several answers to one prompt are a last axis.

        Raises:
            ShapeMismatchError: when they do not broadcast; it names both shapes.
            TokenError: for an id outside the vocabulary, unless it stands at padding.
        """
        last = self._laid
        if last is not None and last[0] is selection and last[1:3] == (prompt_shape, batched):
            return last[3]
        entries = self._lay(selection, prompt_shape, batched)
        if entries.few:
            self._laid = selection, prompt_shape, batched, entries
        return entries

    def _lay(self, selection: Selection, prompt_shape: tuple[int, int], batched: bool) -> Entries:
        selected = tuple(selection.cols.shape)
        each = (selection.rows, selection.cols, selection.valid)
        index = numbered(self._asked, selected)
        shape = torch.broadcast_shapes(index.shape, selected) if index.ndim else selected
        if self._asked.several:
            n = self._asked.shape[-1]
            which = self._which.reshape(-1, n)[index].expand(*shape, n)
            rows, cols, valid = (one.expand(shape)[..., None].expand(*shape, n) for one in each)
        else:
            which = self._which.reshape(-1)[index].expand(shape)
            rows, cols, valid = (one.expand(shape) for one in each)
        if self._has_outside:
            self._refuse_outside(index, shape, valid)
        return Entries(
            rows,
            cols,
            which,
            valid,
            prompt_shape,
            batched,
            selection.mask,
            several=self._asked.several,
        )

    def own_and_theirs(self, reading: Reading, observed: Observed) -> tuple[Tensor, Tensor]:
        """Our logits (or sums of them) and the model's, after any cap."""
        at, sets, target_E = observed.entries_E, self._sets, observed.target_E
        theirs = sets.of_logits(self._logits(observed), target_E)
        if self._centred:
            total = sets.totals if len(sets.totals) == 1 else sets.totals[target_E]
            theirs = theirs - total.to(theirs.device) * observed.mean()

        def own(readout: int) -> Tensor:
            value_N = reading.value_N(readout)
            if len(at) < len(value_N):  # which are in order
                value_N = value_N.index_select(0, at.to(value_N.device))
            return value_N.double()

        cap = self._softcap
        if cap is None:
            ours = own(0)
        elif len(self.readouts) == 1:
            ours = _capped(own(0), cap)
        else:
            each = [_capped(own(1 + number), cap) for number in range(sets.m)]
            ours = sets.of_logits(torch.stack(each, -1), target_E)
        return ours, theirs.to(ours.device)

    def sizes(self, target_N: Tensor) -> Tensor | None:
        """How large the number of each target may be, in logits; None where all are 1."""
        sizes = self._sets.sizes
        return sizes if sizes is None or len(sizes) == 1 else sizes[target_N]

    def largest(self, observed: Observed) -> float:
        """The largest of the logits that are compared; where many are added, so are roundings."""
        return largest(self._logits(observed)) * max(1.0, math.sqrt(self._sets.m / 2))

    def names(self, entries: Entries, tokenizer: Any) -> tuple[list[str], list[str] | None]:
        """The text of the one answer, or of every entry's answer; likewise of the incorrect."""
        named_with = self._named_with(tokenizer)
        if self._names is None or self._names[0] is not named_with:
            found = self._sets.names(lambda ids: to_strings(ids.tolist(), named_with))
            self._names = named_with, *found
        _, right, wrong = self._names
        if len(right) > 1:
            places = entries.target_of_entry.reshape(-1).tolist()
            right = [right[place] for place in places]
            wrong = None if wrong is None else [wrong[place] for place in places]
        return right, wrong

    def _logits(self, observed: Observed) -> Tensor:
        """The model's logits of the tokens of each observed entry [n, m], in float64."""
        ids, target_E = self._sets.ids, observed.target_E
        if len(ids) > 1 or len(target_E) != 1:
            ids = ids.index_select(0, target_E)
        return observed.of(ids)

    def _refuse_outside(self, index: Tensor, shape: tuple[int, ...], valid: Tensor) -> None:
        ids, n = self._asked.laid(index).ids, self._asked.n_right
        sides = {"answer_tokens": ids[..., :n], "incorrect_tokens": ids[..., n:]}
        for name, side in sides.items():
            for one in side.unbind(-1):
                check_answers(one.expand(valid.shape), valid, name, self._vocabulary)


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


def read_out(stream: Stream, sets: TokenSets, *, center_unembed: bool) -> Readout:
    """Fold the final norm and the unembedding into one direction per target.

    Args:
        stream: the located model.
        sets: of tokens [n_targets, m].
        center_unembed: take the vocabulary's mean off every row of W_U (and of b_U), as
            TransformerLens does unless the logits are capped. Where weights sum to 0, as those of
            differences do, nothing changes.
    """
    dtype = stream.work_dtype
    norm = norm_at(stream, stream.final_norm)
    mean: tuple[Tensor, Tensor] | None = None
    if center_unembed and stream.softcap is None and bool(sets.totals.any()):
        mean = mean_of_rows(stream, dtype)
    fetch = _row_source(stream, sets)

    def totals(some: Tensor) -> Tensor:
        return sets.totals if len(sets.totals) == 1 else sets.totals[some]

    def fold(some: Tensor, through: Norm | None = norm) -> tuple[Tensor, Tensor]:
        W_KM, b_K = sets.rows(some, fetch)
        if mean is not None:
            total_K = totals(some).to(W_KM)
            W_KM, b_K = W_KM - total_K[:, None] * mean[0], b_K - total_K * mean[1]
        return before_norm(stream, through, W_KM, b_K)

    def behind() -> Directions:
        return Directions(lambda some: fold(some, None)[0], n_targets, dtype)

    def of_logits(logits_EV: Tensor, target_E: Tensor) -> Tensor:
        ids = sets.ids[target_E].to(logits_EV.device)
        found = sets.of_logits(logits_EV.gather(1, ids), target_E)
        if mean is None:
            return found
        return found - totals(target_E).to(found) * finite_mean(logits_EV)

    n_targets = len(sets)
    if few(n_targets, stream.d_model):
        d_KM, bias_K = fold(torch.arange(n_targets, device="cpu"))
        directions = Directions.held(d_KM)
    else:
        some_at_once = torch.arange(n_targets, device="cpu").split(_TARGETS_AT_ONCE)
        bias_K = torch.cat([fold(some)[1] for some in some_at_once])
        directions = Directions(lambda some: fold(some)[0], n_targets, dtype)
    return Readout(directions, bias_K, behind, of_logits, lambda: scale_behind(stream))


def _row_source(stream: Stream, sets: TokenSets) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function from token ids to rows of W_U and their biases.

    Rows that lie in memory are read where they lie. Others (on disk, or known only by what a
    quantised module computes) are fetched once, those that are needed.
    """
    unembed, dtype = stream.unembed, stream.work_dtype

    def fetch(ids: Tensor) -> tuple[Tensor, Tensor]:
        W, b = rows(unembed, ids, dtype)
        if stream.logit_bias is not None:
            b = b + stream.logit_bias[ids.cpu()].to(b)
        return W, b

    if at_hand(unembed):
        return fetch
    needed = sets.ids.unique()
    W, b = fetch(needed)

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
