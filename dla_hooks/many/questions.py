"""Questions of many prompts that are no plain tokens: side by side for a batch, and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dla_hooks.errors import InputError, ShapeMismatchError
from dla_hooks.inputs.positions import Selection
from dla_hooks.inputs.prompts import Prompt, check_ids
from dla_hooks.measure.asked import next_tokens
from dla_hooks.residual.stream import Stream
from dla_hooks.results.ranked import Result
from dla_hooks.targets.base import Request
from dla_hooks.targets.own import NEXT, Own
from dla_hooks.targets.question import Question, Side
from dla_hooks.targets.token_sets import TokenSets

Names = Callable[[list[int]], list[str]]


@dataclass(frozen=True)
class Placed:
    """One prompt's question, with the positions that it is asked at.

    Attributes:
        ids: of the prompt, and of what follows it [pos].
        question: with all that the prompt says.
        columns: the selected positions.
    """

    ids: Tensor
    question: Asking
    columns: list[int]


@dataclass(frozen=True)
class OneForAll:
    """A target that is no token, the same for all prompts.

    Attributes:
        request: what the caller gave.
    """

    request: Request
    follows: ClassVar[None] = None

    def known(self) -> OneForAll:
        """The same: it needs no prompt."""
        return self


Asking = Question | OneForAll
"""What is asked of one prompt, where that is no plain token."""


def put(
    question: Asking, ids: Tensor, selection: Selection, stream: Stream | None, pos: Any
) -> Placed:
    """Ask of one prompt: the tokens that follow it, or come next in it, become answers.

    Args:
        question: as it was read.
        ids: the prompt's tokens [pos].
        selection: the selected positions of the prompt.
        stream: the located model; None for a prompt that was checked before.
        pos: the caller's.

    Raises:
        InputError: where the prompt has no such token, or positions were given for what follows.
        ShapeMismatchError: when answers do not fit the positions.
    """
    if question.follows is not None:
        if len(question.follows) != 1:
            raise ShapeMismatchError(
                f"one prompt has {len(question.follows)} continuations; give one for each prompt"
            )
        if pos != -1:
            raise InputError(
                f"a Continuation says its positions itself; leave pos at -1, got {pos!r:.80}"
            )
        if stream is not None and stream.backend.scores_labels:
            raise InputError(
                "a Continuation follows texts, and a classifier scores them as a whole"
            )
        more = question.follows[0]
        if stream is not None:
            check_ids(more, min(stream.backend.n_tokens(), stream.vocabulary))
        columns = list(range(len(ids) - 1, len(ids) - 1 + len(more)))
        return Placed(torch.cat((ids, more)), question.about(TokenSets.of(more)), columns)
    sides_given = () if isinstance(question, OneForAll) else (question.right, question.wrong)
    if isinstance(question, Question) and NEXT in sides_given:
        if stream is not None and stream.backend.scores_labels:
            raise InputError("NEXT is a token of the text, and a classifier's labels are none")
        prompt = Prompt(ids[None], torch.ones_like(ids[None], dtype=torch.bool))
        after, selection = next_tokens(prompt, selection)
        coming = TokenSets.of(after[0] if after.numel() else torch.tensor(0, device="cpu"))
        sides = {name: coming for name in ("right", "wrong") if getattr(question, name) is NEXT}
        question = question.knowing(sides)
    columns = selection.cols.reshape(-1).tolist()
    for side in () if isinstance(question, OneForAll) else (question.right, question.wrong):
        if isinstance(side, TokenSets):
            own = side.shape[:-1] if side.several else side.shape
            if len(own) > 1 or own.numel() not in (1, len(columns)):
                raise ShapeMismatchError(
                    f"answers of one prompt have shape {list(side.shape)}, and {len(columns)} "
                    "positions are selected; give one answer, or one for each"
                )
    return Placed(ids, question, columns)


def together(questions: Sequence[Asking], n_entries: Sequence[int] | None) -> Asking:
    """The questions of a batch's prompts as one.

    Args:
        questions: of each prompt.
        n_entries: how many positions each prompt has; None for a single one of each.
    """
    first = questions[0]
    if isinstance(first, OneForAll):
        return first
    given = [one for one in questions if isinstance(one, Question)]
    if all(one is first for one in questions) and _same_for_all(first):
        return first
    right = _stacked([one.right for one in given], n_entries)
    wrong: Side | None = None
    if first.wrong is not None:
        wrong = _stacked([one.wrong for one in given if one.wrong is not None], n_entries)
    return replace(first, right=right, wrong=wrong)


def names(question: Asking, result: Result, texts: Names) -> tuple[list[str], list[str] | None]:
    """The names of a result's answers, and of what is subtracted: one, or one for each entry."""
    if isinstance(question, OneForAll):
        return [repr(question.request)], None
    right = _names(question.right, result, texts)
    wrong = None if question.wrong is None else _names(question.wrong, result, texts)
    pairs = set(zip(right, right if wrong is None else wrong, strict=True))
    if len(pairs) == 1:
        return right[:1], None if wrong is None else wrong[:1]
    return right, wrong


def as_plain(question: Asking) -> list[Any]:
    """What a question asks, as JSON can hold it."""
    if isinstance(question, OneForAll):
        own = vars(question.request)
        return [
            type(question.request).__name__,
            *([k, v.tolist() if isinstance(v, Tensor) else repr(v)] for k, v in own.items()),
        ]
    sides: list[Any] = []
    for side in (question.right, question.wrong):
        if isinstance(side, TokenSets):
            sides.append([side.ids.tolist(), side.weights.tolist()])
        else:
            sides.append(repr(side))
    if question.follows is not None:
        sides.append([ids.tolist() for ids in question.follows])
    return sides


def _same_for_all(question: Question) -> bool:
    sides = (question.right, question.wrong)
    known = [side for side in sides if isinstance(side, TokenSets)]
    return all((side.shape[:-1] if side.several else side.shape) == () for side in known)


def _stacked(sides: Sequence[Side], n_entries: Sequence[int] | None) -> Side:
    """One side of each prompt, with an axis for the batch, and one for positions aligned right."""
    if isinstance(sides[0], Own):
        return sides[0]
    sets = [side for side in sides if isinstance(side, TokenSets)]
    if (
        len(sets) != len(sides)
        or len({(one.several, one.shape[-1:]) for one in sets if one.several}) > 1
    ):
        raise InputError(
            "prompts of one call have other numbers of answers, or answers of other kinds; give "
            "all of them as many"
        )
    m, several = max(one.m for one in sets), sets[0].several
    counts = n_entries or [1] * len(sets)
    ids, weights = [], []
    for one, n in zip(sets, counts, strict=True):
        lead = one.shape[-1:] if several else ()
        shape = (n, *lead)
        own = one.ids.reshape(-1, *lead, one.m).expand(*shape, one.m)
        more = own[..., :1].expand(*shape, m - one.m)
        weighed = one.weights.reshape(
            -1, *(lead if one.weights.ndim > 1 else [1] * len(lead)), one.m
        )
        weighed = weighed.expand(*shape, one.m)
        above = max(counts) - n
        ids.append(_padded(torch.cat((own, more), -1), above))
        nothing = weighed.new_zeros(*shape, m - one.m)
        weights.append(_padded(torch.cat((weighed, nothing), -1), above))
    every, weighed = torch.stack(ids), torch.stack(weights)
    if n_entries is None:
        every, weighed = every[:, 0], weighed[:, 0]
    if not every.numel():  # no position is selected
        return TokenSets.of(torch.tensor(0, device="cpu"))
    flat = weighed.reshape(-1, m)
    if bool((flat == flat[:1]).all()):
        weighed = flat[0]
    return TokenSets(every, weighed, m, several)


def _padded(values: Tensor, above: int) -> Tensor:
    """Values with copies of the first in front, for padding."""
    return torch.cat((values[:1].expand(above, *values.shape[1:]), values)) if above else values


def _names(side: Side, result: Result, texts: Names) -> list[str]:
    n = result.logit.numel()
    if isinstance(side, Own):
        ids = [] if result.seen is None else result.seen.top_ids[side.place or 0].flatten().tolist()
        return texts(ids) or [""] * n
    flat, which = side.distinct()
    named, _ = flat.names(lambda ids: texts(ids.tolist()))
    if result.several and not side.several:
        which = which[..., None]
    return [named[i] for i in which.expand(result.logit.shape).flatten().tolist()]
