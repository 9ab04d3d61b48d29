"""What ends a row besides the model's own end of text: the argument ``stop``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.inputs.plain import check_text
from dla_hooks.inputs.prompts import tokenizer_for

Stop = Callable[[Tensor, Any, int], Tensor]
"""From the ids so far [batch, pos], the scores of the newest token and the width of the prompt to
the rows that end with that token [batch], on the CPU."""


def read_stop(stop: Any, model: Any, tokenizer: Any) -> Stop | None:
    """Read the argument ``stop``.

    Args:
        stop: a string, an id, a list of either, a callable, or None.
        model: asked for a tokenizer where there is none.
        tokenizer: for strings, or None.

    Raises:
        InputError: for anything else.
        TokenizerMissingError: for strings without a tokenizer.
    """
    if stop is None:
        return None
    if callable(stop):
        return lambda ids, scores, _: _as_rows(stop(ids, scores), len(ids))
    several = [stop] if isinstance(stop, str) or not isinstance(stop, Collection) else list(stop)
    if several and all(isinstance(one, str) for one in several):
        for text in several:
            check_text(text, "stop")
            if not text:
                raise InputError("stop holds an empty string, with which every text would end")
        return _at_strings(several, tokenizer_for(model, tokenizer, "stop"))
    try:
        numbers: list[Any] = [one for one in several if not isinstance(one, bool)]
        tokens = [operator.index(one) for one in numbers]
    except TypeError:
        tokens = []
    if not tokens or len(tokens) < len(several):
        raise InputError(
            "stop must be a string, a list of strings, a token id, a list of ids, or a callable "
            f"of (input_ids, scores); got {stop!r:.80}"
        )
    return at_tokens(tokens)


def at_tokens(tokens: Collection[int]) -> Stop:
    """End a row with one of these tokens."""
    ends = torch.tensor(sorted(tokens), dtype=torch.long, device="cpu")
    return lambda ids, _, __: torch.isin(ids[:, -1].cpu(), ends)


def _at_strings(texts: Sequence[str], tokenizer: Any) -> Stop:
    """End a row with the token that completes one of these texts in what it has generated."""

    def stop(ids: Tensor, scores: Any, width: int) -> Tensor:
        new = [str(tokenizer.decode(row)) for row in ids[:, width:].tolist()]
        found = [any(text in one for text in texts) for one in new]
        return torch.tensor(found, dtype=torch.bool, device="cpu")

    return stop


def _as_rows(answer: Any, batch: int) -> Tensor:
    """What a callable said, for each row.

    Raises:
        InputError: for what is neither a bool nor one bool for each row.
    """
    said = torch.as_tensor(answer, device="cpu").detach()
    if said.numel() not in (1, batch) or said.ndim > 1:
        raise InputError(
            f"stop returned a {type(answer).__name__} of shape {list(said.shape)}; it must return "
            f"a bool, or one for each of the {batch} rows"
        )
    return said.bool().expand(batch)
