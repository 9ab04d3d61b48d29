"""The model's own logits at some entries: the answer's rank and probability, the top tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.inputs.entries import Entries
from dla_hooks.results.seen import Seen
from dla_hooks.targets.base import Observed

_TOP = 5
_FEW_LOGITS = 2**18
"""So many may be kept until somebody reads what they say (1 MiB in float32)."""
_AT_ONCE = 2**20
"""Logits that are looked at together (4 MiB in float32)."""


@dataclass(frozen=True)
class Look:
    """What some entries' logits say.

    Attributes:
        log_p_E: the answers' log-probabilities; NaN where nothing single is asked for.
        rank_E: the answers' ranks, from 1; -1 there.
        ids_KE: the top tokens.
        log_p_KE: their log-probabilities.
    """

    log_p_E: Tensor
    rank_E: Tensor
    ids_KE: Tensor
    log_p_KE: Tensor

    @classmethod
    def at(cls, logits_EV: Tensor, answer_E: Tensor | None) -> Look:
        """Look at logits.

        Args:
            logits_EV: as the model gives them, after any cap.
            answer_E: the token that each entry asks for, -1 for none; None for none at all.
        """
        logits_EV = logits_EV if logits_EV.dtype == torch.float64 else logits_EV.float()
        log_p_EV = logits_EV.log_softmax(-1)
        # By the logits: their logarithms may be rounded to ties.
        ids_EK = logits_EV.topk(min(_TOP, logits_EV.shape[-1])).indices
        log_p_EK = log_p_EV.gather(-1, ids_EK)
        if answer_E is None:
            log_p_E = log_p_EV.new_full((len(logits_EV),), math.nan)
            none_E = ids_EK.new_full((len(logits_EV),), -1)
            return cls(log_p_E, none_E, ids_EK.T, log_p_EK.T)
        has_all = min(answer_E.tolist(), default=-1) >= 0
        answer_E = answer_E.to(logits_EV.device)
        asked_E = answer_E if has_all else answer_E.clamp(min=0)
        asked_E1 = asked_E[:, None]
        log_p_E = log_p_EV.gather(-1, asked_E1)[:, 0]
        # Ones and zeros where the logarithms were: their sum takes half the time of a count.
        above_EV = torch.gt(logits_EV, logits_EV.gather(-1, asked_E1), out=log_p_EV)
        rank_E = above_EV.sum(-1).long().add_(1)
        if not has_all:
            log_p_E = log_p_E.masked_fill(answer_E < 0, math.nan)
            rank_E = rank_E.masked_fill(answer_E < 0, -1)
        return cls(log_p_E, rank_E, ids_EK.T, log_p_EK.T)

    @classmethod
    def joined(cls, looks: Sequence[Look]) -> Look:
        """Looks at entries that follow each other."""
        if len(looks) == 1:
            return looks[0]
        return cls(
            torch.cat([look.log_p_E for look in looks]),
            torch.cat([look.rank_E for look in looks]),
            torch.cat([look.ids_KE for look in looks], 1),
            torch.cat([look.log_p_KE for look in looks], 1),
        )

    def asking(self, place: int) -> Look:
        """The same, where the answers are the top tokens at a place."""
        rank_E = torch.full_like(self.rank_E, place + 1)
        return Look(self.log_p_KE[place], rank_E, self.ids_KE, self.log_p_KE)

    def unfolded(self, entries: Entries, entries_E: Tensor | None = None) -> Seen:
        """The look in the axes of a result.

        Args:
            entries: all entries.
            entries_E: which of them were looked at; None for all.
        """

        def lay(values: Tensor, padding: float) -> Tensor:
            if entries_E is not None and values.shape[-1] != len(entries):
                every = values.new_full((*values.shape[:-1], len(entries)), padding)
                every[..., entries_E.to(values.device)] = values
                values = every
            return entries.unfold(values, padding)

        return Seen(
            lay(self.log_p_E, math.nan),
            lay(self.rank_E, -1),
            lay(self.ids_KE, -1),
            lay(self.log_p_KE.exp(), math.nan),
        )


def seen_at(
    entries: Entries,
    observed: Observed,
    answers_K: Tensor | None,
    texts: Callable[[list[int]], list[str]],
) -> Seen | None:
    """What the check's logits say, where they were looked at; of few, when it is first read.

    Args:
        entries: all entries.
        observed: these logits.
        answers_K: the token that each target asks for, see :class:`Target`.
        texts: of tokens.
    """
    if not len(observed.entries_E):
        return None
    if observed.logits_BSV.numel() > _FEW_LOGITS:
        return _seen_at(entries, observed, answers_K).named(texts)
    entries = entries.alone()
    places = observed.row_E, observed.column_E, observed.entries_E, observed.target_E
    observed = Observed(observed.logits_BSV.clone(), *places)  # the model's are its caller's
    return Seen.when_read(lambda: _seen_at(entries, observed, answers_K).named(texts))


def _seen_at(entries: Entries, observed: Observed, answers_K: Tensor | None) -> Seen:
    n, logits_BSV = len(observed.entries_E), observed.logits_BSV
    answer_E = answers_K
    if answers_K is not None and (n > 1 or len(answers_K) > 1):
        answer_E = answers_K.index_select(0, observed.target_E)
    at_once = max(1, _AT_ONCE // logits_BSV.shape[-1])
    if logits_BSV.shape[1] == 1 and n == len(logits_BSV) <= at_once:  # each row's only position
        look = Look.at(logits_BSV[:, 0], answer_E)
        return look.unfolded(entries, observed.entries_E)
    looks = []
    for part in torch.arange(n, device="cpu").split(at_once):
        place = part.to(observed.row_E.device)
        logits_EV = logits_BSV[observed.row_E[place], observed.column_E[place]]
        looks.append(Look.at(logits_EV, None if answer_E is None else answer_E[part]))
    return Look.joined(looks).unfolded(entries, observed.entries_E)
