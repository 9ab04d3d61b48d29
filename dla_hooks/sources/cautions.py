"""Prompts that a model can run, but that look like something else than what was meant.

A model takes any ids. Padding without a mask, a second BOS and positions that nobody trained give
exact numbers for a prompt that the caller may not have had in mind. Each gets a warning that says
what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dla_hooks.errors import warn
from dla_hooks.inputs.extras import POSITIONS
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.stream import Stream

_PADDED = (
    "ids without an attention_mask begin or end with the pad token, so they look padded; padding "
    "is then read as text, and pos=-1 may be a pad token. Pass attention_mask (a tokenizer "
    "returns one beside the ids), or all ones if these tokens are meant"
)
_TWO_BOS = (
    "the prompt begins with two BOS tokens, where models are trained with one: its text has a BOS "
    "(as chat templates write one) and the tokenizer adds another. Pass prepend_bos=False, or "
    "leave the BOS out of the text"
)
_LONG = (
    "the prompt is longer than the model's max_position_embeddings. The numbers are the model's "
    "own, but at positions that it was not trained for. Shorten the prompt, or load the model with "
    "settings for longer ones (rope_parameters)"
)
_UNKNOWN = (
    "the prompt holds a word that the tokenizer does not know, and the model reads {unknown!r} in "
    "its place. Use words that it knows, or the tokenizer that belongs to the model"
)

_known: Remembered[_Known] = Remembered()


@dataclass(frozen=True)
class _Known:
    """What a model's config says of tokens and positions.

    Attributes:
        pad: the pad token, or None.
        bos: the token that prompts begin with, or None.
        eos: tokens that end a text.
        longest: the longest prompt that it is made for, or None.
    """

    pad: int | None
    bos: int | None
    eos: frozenset[int]
    longest: float | None


def warn_of(stream: Stream, prompt: Prompt, tokenizer: Any, *, given_as_ids: bool) -> None:
    """Warn of what looks wrong in a prompt.

    Args:
        stream: the located model.
        prompt: the prompt.
        tokenizer: the caller's or the model's, or None.
        given_as_ids: whether it was given as ids without a mask.
    """
    known, ids = _known_of(stream), prompt.input_ids
    padded = not given_as_ids and prompt.padded
    if not prompt.embedded and not (given_as_ids and warn_of_padding(stream, ids, tokenizer)):
        all_bos = _both(known.bos, tokenizer, "bos_token_id")
        if padded or not all_bos.isdisjoint(ids[:, 0].tolist()):
            _warn_of_bos(ids, prompt.mask if padded else None, all_bos)
    longest, width = known.longest, ids.shape[1]
    if longest is None or width <= longest or POSITIONS in prompt.extras:
        return
    if not padded or int(prompt.mask.sum(-1).max()) > longest:
        warn(_LONG)


def warn_of_unknown(ids: Tensor, tokenizer: Any, text: Any) -> None:
    """Warn of a text with words that its tokenizer does not know.

    Args:
        ids: what the tokenizer made of it.
        tokenizer: the one that did.
        text: a string, or several.
    """
    unknown, token = (getattr(tokenizer, f"unk_token{end}", None) for end in ("", "_id"))
    others = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    if not isinstance(token, int) or token in others or not bool((ids == token).any()):
        return
    texts = [text] if isinstance(text, str) else text
    if not any(str(unknown) in one for one in texts):
        warn(_UNKNOWN.format(unknown=unknown))


def warn_of_padding(stream: Stream, ids: Tensor, tokenizer: Any) -> bool:
    """Warn of ids without a mask that look padded, and tell whether they do.

    Args:
        stream: the located model.
        ids: [batch, pos].
        tokenizer: the caller's or the model's, or None.
    """
    known = _known_of(stream)
    pads = _both(known.pad, tokenizer, "pad_token_id")
    bos, eos = _both(known.bos, tokenizer, "bos_token_id"), known.eos
    if not pads:  # then the end of text is what prompts are padded with
        pads = set(eos)
    firsts, lasts = ids[:, 0].tolist(), ids[:, -1].tolist()
    for pad in pads:
        left = _runs(ids, pad) if pad in firsts else [0]
        right = _runs(ids.flip(-1), pad) if pad in lasts else [0]
        # A text may begin with a BOS and end with an EOS, but not with several.
        fewest = 2 if pad in bos or pad in eos else 1
        two_bos = pad in bos and set(left) == {2}  # that is another warning
        if max(right) >= fewest or (max(left) >= fewest and not two_bos):
            warn(_PADDED)
            return True
    return False


def _runs(ids: Tensor, pad: int) -> list[int]:
    """How often each row begins with a token; 0 for rows of nothing else."""
    found: list[int] = (ids != pad).int().argmax(-1).tolist()
    return found


def _warn_of_bos(ids: Tensor, mask: Tensor | None, all_bos: set[int]) -> None:
    for i, row in enumerate(ids):
        real = row if mask is None else row[mask[i]]
        first, *second = real[:2].tolist()
        if first in all_bos and second == [first] and bool((real != first).any()):
            warn(_TWO_BOS)
            return


def _both(of_model: int | None, tokenizer: Any, name: str) -> set[int]:
    """A token by the model's config and by the tokenizer, which may differ."""
    both = of_model, getattr(tokenizer, name, None)
    return {token for token in both if isinstance(token, int)}


def _known_of(stream: Stream) -> _Known:
    return _known.of(stream.model, stream.version, lambda: _read(stream))


def _read(stream: Stream) -> _Known:
    number = stream.backend.number
    pad, bos, eos = (number(f"{name}_token_id") for name in ("pad", "bos", "eos"))
    several = eos if isinstance(eos, (list, tuple)) else [eos]
    return _Known(
        pad if isinstance(pad, int) and pad >= 0 else None,
        bos if isinstance(bos, int) else None,
        frozenset(token for token in several if isinstance(token, int)),
        _longest(stream),
    )


def _longest(stream: Stream) -> float | None:
    """The longest prompt that the config names; None where positions have no end."""
    number = stream.backend.number
    longest = number("max_position_embeddings")
    has_alibi = number("alibi") or getattr(number("attn_config"), "alibi", False)
    if stream.position_limit is not None or has_alibi or not isinstance(longest, int):
        return None  # longer prompts are refused, or need no training
    settings = number("rope_parameters") or number("rope_scaling") or {}
    by_layer = [one for one in settings.values() if isinstance(one, dict)] or [settings]
    limits = [float(longest)]
    for one in by_layer:
        factor = one.get("factor")
        if isinstance(factor, (int, float)):
            limits.append(factor * (one.get("original_max_position_embeddings") or longest))
    return max(limits)
