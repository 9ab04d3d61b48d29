"""What is attributed: a linear functional of the stream at a reading point.

A target says in which directions the stream is read, what the reading has besides the stream, and
what the model itself says there, by which the parts are checked. ``answer_tokens`` takes tokens,
or a :class:`Request` for any other target. A new target is one file with both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dla_hooks.inputs.entries import Entries, one_target
from dla_hooks.inputs.positions import Selection
from dla_hooks.modules.hooks import Call, Place
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.reading_point import Reading, ReadingPoint
from dla_hooks.projection.readout import Readout
from dla_hooks.projection.vocabulary_mean import finite_mean
from dla_hooks.residual.stream import Stream
from dla_hooks.targets.spread import spread_of

_FIRST = torch.zeros(1, dtype=torch.long, device="cpu")
"""The only one of all columns, or of all entries."""


@dataclass(frozen=True)
class Observed:
    """What the model itself put out, at the entries where it was looked at.

    Attributes:
        logits_BSV: the model's logits at a few columns [batch, n_columns, vocabulary].
        row_E: the batch row of each such entry.
        column_E: its place among the columns.
        entries_E: its number among all entries.
        target_E: its target.
    """

    logits_BSV: Tensor
    row_E: Tensor
    column_E: Tensor
    entries_E: Tensor
    target_E: Tensor

    @classmethod
    def at(cls, entries: Entries, columns: Tensor, logits_BSV: Tensor) -> Observed:
        """The entries whose columns the model's logits were kept for."""
        device = logits_BSV.device
        if columns is entries.cols and columns.numel() == 1:
            row_E, target_E = entries.rows, entries.target
            return cls(logits_BSV, row_E.to(device), _FIRST.to(device), _FIRST, target_E)
        # In each row once at most.
        entries_E, column_E = (entries.cols[:, None] == columns).nonzero().unbind(-1)
        # `index_select` costs a fifth of what indexing costs.
        row_E, target_E = (of.index_select(0, entries_E) for of in (entries.rows, entries.target))
        return cls(logits_BSV, row_E.to(device), column_E.to(device), entries_E, target_E)

    @cached_property
    def place_E(self) -> Tensor:
        """Where each such entry's logits are, among the rows of all columns."""
        return self.row_E * self.logits_BSV.shape[1] + self.column_E

    def of(self, ids_E: Tensor) -> Tensor:
        """The logits of one token for each entry, or of several [n, m], in float64."""
        logits_BSV = self.logits_BSV
        number_E = ids_E.to(logits_BSV.device)
        if logits_BSV.shape[:2].numel() > 1:
            first_E = self.place_E * logits_BSV.shape[-1]
            number_E = number_E + (first_E if ids_E.ndim == 1 else first_E[:, None])
        return logits_BSV.take(number_E).double()

    def mean(self) -> Tensor:
        """The mean logit over the vocabulary for each entry, in float64; masked tokens are out."""
        means_BS = finite_mean(self.logits_BSV)
        return means_BS.reshape(-1).index_select(0, self.place_E)

    def spread(self, cap: float | None = None) -> float:
        """Largest less smallest logit over the vocabulary, averaged over the entries.

        Masked tokens are left out: those of -inf, and those of a large finite number.

        Args:
            cap: the softcap on the logits, for the spread before it; None for the logits' own.
        """
        logits_BSV = self.logits_BSV
        if cap is not None:
            most = 1 - 1e-3  # of a logit at the cap, all that is known is that it is large
            capped = (logits_BSV.double() / cap).clamp(-most, most)
            logits_BSV = torch.where(torch.isfinite(logits_BSV), cap * capped.atanh(), -torch.inf)
        spread_BS = spread_of(logits_BSV)
        if spread_BS.numel() == 1:  # of the only column that there is
            return spread_BS.item()
        return float(spread_BS.take(self.place_E.cpu()).mean())


@dataclass(frozen=True)
class Witness:
    """What the model itself computes of a target that is no logit, seen in the same run.

    Attributes:
        place: the module that computes it.
        look: from its call to the activation that holds it [batch, pos, width].
        directions: what that is projected on, one per target.
    """

    place: Place
    look: Callable[[Call], Tensor]
    directions: Directions


class Target:
    """Something to attribute, on one located model.

    Attributes:
        stream: what it is a reading of: the located model, or its stream up to the reading point.
        point: where the stream is read.
        readouts: the directions and biases there, one per distinct target. The first readout is
            attributed. Others are only measured, for :meth:`own_and_theirs`.
        reads_logits: whether it is checked by the model's own logits.
        witness: otherwise, what it is checked by besides the stream itself.
        answers_K: the token that each target asks for; -1 where there is none, and None where there
            is none at all.
        until: the input of a module from which on nothing need run, or None.
        reading: what is read, in words, where that is no logit.
        of_prompt: whether its directions depend on what the model does with a prompt.
        known_N: instead of a witness, what an earlier run showed at each entry.
    """

    stream: Stream
    point: ReadingPoint
    readouts: Sequence[Readout]
    reads_logits: bool = True
    witness: Witness | None = None
    answers_K: Tensor | None = None
    until: Place | None = None
    reading: str | None = None
    of_prompt: bool = False
    known_N: Tensor | None = None

    def in_prompt(self, source: Any, selection: Selection) -> Target:
        """The target for one prompt, where it depends on what the model does with it.

        Args:
            source: shows the activations (:class:`dla_hooks.sources.base.Source`).
            selection: the selected entries.

        Raises:
            InputError: for positions that do not go with the target.
        """
        return self

    def align(
        self, selection: Selection, prompt_shape: tuple[int, int], batched: bool = True
    ) -> Entries:
        """Lay the target over the selected positions: by default one target at all of them.

        Args:
            selection: entries [batch] (a single position) or [batch, pos'].
            prompt_shape: (batch, pos) of the prompt.
            batched: whether the result has an axis for the batch.

        Raises:
            ShapeMismatchError: when the two do not broadcast; it names both shapes.
        """
        return one_target(
            selection.rows,
            selection.cols,
            selection.valid,
            prompt_shape,
            batched,
            selection.mask,
        )

    def own_and_theirs(self, reading: Reading, observed: Observed) -> tuple[Tensor, Tensor]:
        """The same numbers twice, at the observed entries: from the stream, and from the model.

        Returns:
            Ours [n] and the model's [n], after any cap.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it is checked")

    def witnessed(self, entries: Entries) -> Tensor | None:
        """Which of the entries the witness tells of [N]; None is all of them."""
        return None

    def sizes(self, target_N: Tensor) -> Tensor | None:
        """How large the number of each target may be, in logits, for tolerances [n] or [1].

        Args:
            target_N: of some entries.

        Returns:
            None where all are 1.
        """
        return None

    def largest(self, observed: Observed) -> float:
        """The largest of the model's numbers, by whose rounding the comparison is limited."""
        logits = observed.logits_BSV
        return float(logits[torch.isfinite(logits)].abs().max()) if logits.numel() else 0.0

    def names(self, entries: Entries, tokenizer: Any) -> tuple[list[str], list[str] | None]:
        """The text of the answers and of the incorrect tokens: one, or one for every entry."""
        return [type(self).__name__], None


class Request:
    """A target before it meets a model: what a caller gives as ``answer_tokens``."""

    def on(self, stream: Stream) -> Target:
        """The target on a located model.

        Raises:
            InputError: when it does not fit the model.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it reads of a model")


class TokenRequest(Request):
    """Tokens in another form than their ids; :mod:`dla_hooks.targets.question` reads them."""
