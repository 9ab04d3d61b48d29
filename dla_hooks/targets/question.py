"""What is asked, before it meets a prompt: the answer's side, and what is subtracted from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError, ShapeMismatchError
from dla_hooks.inputs.answers import read_ids
from dla_hooks.residual.stream import Stream
from dla_hooks.targets.base import Request, Target, TokenRequest
from dla_hooks.targets.continuation import Continuation
from dla_hooks.targets.own import Own
from dla_hooks.targets.sets import Cell, Each, Mean, Tokens
from dla_hooks.targets.token_sets import TokenSets
from dla_hooks.targets.tokens import TokenTarget

Side = TokenSets | Own


@dataclass(frozen=True)
class Question:
    """Tokens that are asked about.

    Attributes:
        right: the answer's side.
        wrong: what is subtracted from it, or None.
        centred: see :func:`dla_hooks.targets.tokens.read_out`.
        follows: the tokens that are put behind each prompt, which are then the answers; or None.
    """

    right: Side
    wrong: Side | None
    centred: bool
    follows: list[Tensor] | None = None

    @property
    def fixed(self) -> bool:
        """Whether no prompt changes what is asked."""
        own = isinstance(self.right, Own) or isinstance(self.wrong, Own)
        return self.follows is None and not own

    def __call__(self, stream: Stream) -> Target:
        """The target on a located model; a stand-in, where a prompt must say what it is."""
        if isinstance(self.right, Own) or isinstance(self.wrong, Own):
            return self.of(stream, TokenSets.of(torch.tensor(0, device="cpu")))
        return self.of(stream, self.both(self.right, self.wrong))

    def of(self, stream: Stream, sets: TokenSets) -> Target:
        """The target of some sets."""
        return TokenTarget(stream, sets, center_unembed=self.centred)

    @staticmethod
    def both(right: TokenSets, wrong: TokenSets | None) -> TokenSets:
        """The sets of both sides together."""
        return right if wrong is None else right.minus(wrong)

    def knowing(self, sides: Mapping[str, TokenSets]) -> Question:
        """The same with sides that are known, by the names of the attributes."""
        right, wrong = sides.get("right", self.right), sides.get("wrong", self.wrong)
        return replace(self, right=right, wrong=wrong)

    def known(self) -> Question:
        """A stand-in that needs no prompt, for a trial."""
        if self.fixed:
            return self
        return self.about(TokenSets.of(torch.tensor(0, device="cpu"))).knowing(
            {}
            if isinstance(self.wrong, TokenSets | None)
            else {"wrong": TokenSets.of(torch.tensor(0, device="cpu"))}
        )

    def about(self, right: TokenSets) -> Question:
        """The same with other answers, which no prompt changes."""
        return replace(self, right=right, follows=None)


def read_question(
    answer_tokens: Any, incorrect_tokens: Any, *, model: Any, tokenizer: Any, centred: bool
) -> Question | Callable[[Stream], Target]:
    """Read ``answer_tokens`` and ``incorrect_tokens``.

    Args:
        answer_tokens: see :func:`dla_hooks.direct_logit_attribution`.
        incorrect_tokens: likewise.
        model: asked for a tokenizer when none is given.
        tokenizer: for strings.
        centred: see :class:`Question`.

    Returns:
        A function that makes the target on a located model.

    Raises:
        InputError: for tokens that cannot be read, or that do not go together.
        ShapeMismatchError: when their shapes do not.
        TokenError: for a string that is not one token.
    """
    if isinstance(incorrect_tokens, Request) and not isinstance(incorrect_tokens, TokenRequest):
        raise InputError(
            f"incorrect_tokens takes tokens, got {incorrect_tokens!r:.80}; it goes in answer_tokens"
        )
    if isinstance(answer_tokens, Request) and not isinstance(answer_tokens, TokenRequest):
        if incorrect_tokens is not None:
            raise InputError(
                f"incorrect_tokens goes with tokens, but answer_tokens is {answer_tokens!r:.80}"
            )
        return answer_tokens.on
    if isinstance(answer_tokens, Question):  # read before
        return answer_tokens
    if _holds(incorrect_tokens, Continuation):
        raise InputError(
            "incorrect_tokens cannot be a Continuation: its tokens would need other positions than "
            "the answer's. Attribute it in a call of its own, and subtract"
        )

    follows: list[Tensor] | None = None
    right: Side
    if _holds(answer_tokens, Continuation):
        follows = _follows(answer_tokens, model, tokenizer)
        right = TokenSets.of(torch.tensor(0, device="cpu"))
    else:
        right = read_side(answer_tokens, "answer_tokens", model, tokenizer)
    wrong: Side | None = None
    if incorrect_tokens is not None:
        wrong = read_side(incorrect_tokens, "incorrect_tokens", model, tokenizer)
    if isinstance(wrong, TokenSets) and isinstance(right, TokenSets) and follows is None:
        forms = _is_plain(answer_tokens) and _is_plain(incorrect_tokens)
        _check_shapes(right, wrong, plain=forms)
    return Question(right, wrong, centred, follows)


def require_answer(answer_tokens: Any) -> None:
    """Refuse a call without an answer.

    Raises:
        InputError: when it is None.
    """
    if answer_tokens is None:
        raise InputError(
            "answer_tokens is required: the token whose logit is attributed. dla_hooks.TOP is the "
            "model's own top token"
        )


def read_side(value: Any, name: str, model: Any, tokenizer: Any) -> Side:
    """Read one of the two arguments.

    Raises:
        InputError: for any other type.
        TokenError: for a string that is not one token.
    """

    def read(token: Any) -> int:
        return int(read_ids(token, name, model, tokenizer))

    def cell(item: Any) -> Cell:
        if isinstance(item, (Tokens, Mean)):
            return item.cell(read)
        if isinstance(item, TokenRequest):
            raise InputError(
                f"{name} holds {item!r:.80} among other answers; give it alone, or in a call of "
                "its own"
            )
        if isinstance(item, (list, tuple)):
            raise InputError(f"{name} holds a list among other answers: {item!r:.80}")
        return [read(item)], [1.0]

    if isinstance(value, Own):
        return value
    if isinstance(value, Each):
        return TokenSets.made_of([cell(item) for item in value.flat], value.shape, True)
    if isinstance(value, (Tokens, Mean)):
        return TokenSets.made_of([cell(value)], (), False)
    if _holds(value, TokenRequest):
        return TokenSets.made_of([cell(item) for item in value], [len(value)], False)
    return TokenSets.of(read_ids(value, name, model, tokenizer))


def _holds(value: Any, kind: type) -> bool:
    """Whether this is such a request, or a list with one in it."""
    return isinstance(value, kind) or (
        isinstance(value, list) and any(isinstance(one, kind) for one in value)
    )


def _is_plain(value: Any) -> bool:
    return not _holds(value, TokenRequest)


def _follows(value: Any, model: Any, tokenizer: Any) -> list[Tensor]:
    given = value if isinstance(value, list) else [value]
    if not all(isinstance(one, Continuation) for one in given):
        raise InputError("answer_tokens holds a Continuation beside other answers; give one kind")
    return [row for one in given for row in one.ids(model, tokenizer)]


def _check_shapes(right: TokenSets, wrong: TokenSets, *, plain: bool) -> None:
    """Refuse sides that do not go together."""
    if right.shape == wrong.shape and right.several == wrong.several:
        return
    if not plain:
        if not right.shape or not wrong.shape:
            return  # one for all of the other's
        several, other = (right, wrong) if right.several else (wrong, right)
        if several.several and not other.several and other.shape == several.shape[:-1]:
            return  # one for all answers to a prompt
    raise ShapeMismatchError(
        f"incorrect_tokens has shape {list(wrong.shape)}, but answer_tokens has "
        f"{list(right.shape)}; the two must be equal (a string or int counts as []). One wrong "
        "token for several answers goes with dla_hooks.Each, several wrong ones are "
        "dla_hooks.Mean([...])"
    )
