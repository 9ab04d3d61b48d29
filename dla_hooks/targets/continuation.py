"""Several tokens that follow the prompt, each at the position that predicts it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError, TokenError
from dla_hooks.inputs.answers import read_ids
from dla_hooks.inputs.prompts import tokenizer_for
from dla_hooks.targets.base import TokenRequest


class Continuation(TokenRequest):
    """What follows the prompt, token by token: an answer of several tokens, teacher-forced.

    Its tokens are put behind the prompt, and each is attributed at the position that predicts it:
    ``attribution`` is [row, batch, n], with NaN where a shorter continuation has ended.
    ``result.summed()`` adds the tokens up. ``pos`` stays -1.

    Example:
        >>> result = direct_logit_attribution(
        ...     model, "The keys near", dla_hooks.Continuation(" the cabinet are"),
        ...     tokenizer=tokenizer,
        ... )
        >>> result.answer, result.logit.shape
        ([' the', ' cabinet', ' are'], torch.Size([1, 3]))

    Args:
        pieces: a string, or token ids with one axis; or a list with one of these for each prompt.

    Raises:
        InputError: for anything else, or nothing.
    """

    __module__ = "dla_hooks"

    def __init__(self, pieces: Any) -> None:
        if hasattr(pieces, "tolist"):
            pieces = pieces.tolist()
        if isinstance(pieces, (str, tuple)) or _is_ids(pieces):
            pieces = [pieces]
        rows = [one.tolist() if hasattr(one, "tolist") else one for one in _listed(pieces)]
        if not rows or not all(isinstance(one, str) or _is_ids(one) for one in rows):
            raise InputError(
                "Continuation takes a string or a list of token ids, or one of these for each "
                f"prompt; got {pieces!r:.80}"
            )
        if not all(len(one) for one in rows):
            raise InputError("a continuation is empty: it has no token to attribute")
        self.rows: list[Any] = rows

    def ids(self, model: Any, tokenizer: Any) -> list[Tensor]:
        """The tokens of each continuation.

        Args:
            model: asked for a tokenizer when none is given.
            tokenizer: for strings.

        Raises:
            TokenError: for a string that is no token at all.
        """
        found = []
        for one in self.rows:
            if isinstance(one, str):
                reads = tokenizer_for(model, tokenizer, "a continuation")
                encoded = list(reads.encode(one, add_special_tokens=False))
                unknown = getattr(reads, "unk_token_id", None)
                if not encoded or (unknown is not None and unknown in encoded):
                    what = "holds a piece that is not in" if encoded else "is no token of"
                    raise TokenError(
                        f"the continuation {one!r:.80} {what} the tokenizer's vocabulary"
                    )
                found.append(torch.tensor(encoded, dtype=torch.long, device="cpu"))
            else:
                found.append(read_ids(list(one), "answer_tokens", model, None))
        return found

    def __repr__(self) -> str:
        return f"Continuation({self.rows if len(self.rows) > 1 else self.rows[0]!r})"


def _listed(pieces: Any) -> list[Any]:
    return list(pieces) if isinstance(pieces, (list, tuple)) else []


def _is_ids(value: Any) -> bool:
    """Whether this is a row of ids."""
    return isinstance(value, (list, tuple)) and all(
        hasattr(one, "__index__") and not isinstance(one, bool) for one in value
    )
