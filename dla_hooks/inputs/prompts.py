"""Read prompts as token ids; for answers see :mod:`dla_hooks.inputs.answers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError, ShapeMismatchError, TokenError, TokenizerMissingError
from dla_hooks.inputs.plain import check_dense, check_text


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts.

    Attributes:
        input_ids: [batch, pos], on the CPU.
        mask: True at the real tokens [batch, pos], on the CPU.
    """

    input_ids: Tensor
    mask: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, pos)."""
        batch, width = self.input_ids.shape
        return batch, width

    @property
    def padded(self) -> bool:
        """True if some row is shorter than the batch is wide."""
        return not bool(self.mask.all())

    def position_ids(self) -> Tensor:
        """Positions counted among each row's real tokens; 0 on the padding before them."""
        return (self.mask.long().cumsum(-1) - 1).clamp_min(0)


def read_prompt(
    input: Any,
    *,
    tokenizer: Any,
    attention_mask: Any,
    vocabulary: int,
    encode: Callable[[str], list[int]],
) -> Prompt:
    """Read the ``input`` argument.

    Args:
        input: a string, a list of strings, token ids [pos] or [batch, pos], or what a tokenizer
            returns for ``return_tensors="pt"``.
        tokenizer: gives the padding token for strings.
        attention_mask: 1 at real tokens, for ids that are padded on either side.
        vocabulary: number of tokens that the model embeds.
        encode: token ids of a string. Token ids are taken as they are.

    Raises:
        InputError: for an input that is neither, is empty, or whose mask does not fit.
        TokenError: for ids outside the vocabulary.
    """
    if isinstance(input, Mapping):
        if "input_ids" not in input:
            raise InputError(f"input is a mapping without 'input_ids'; it has {sorted(input)}")
        unread = set(input) - {"input_ids", "attention_mask"}
        if unread:  # GPT-2, for one, adds token_type_ids to the stream
            raise InputError(
                f"input holds {', '.join(sorted(unread))} besides input_ids and attention_mask, "
                "which may change the model's logits and cannot be passed on; leave them out"
            )
        if attention_mask is None:
            attention_mask = input.get("attention_mask")
        input = input["input_ids"]
    if isinstance(input, str):
        input = [input]
    if isinstance(input, list) and input and all(isinstance(text, str) for text in input):
        if attention_mask is not None:
            raise InputError("attention_mask goes with token ids; strings are padded for you")
        ids, mask = _encode_all(input, encode)
    elif isinstance(input, Tensor):
        ids, mask = _as_batch(input, attention_mask)
    else:
        raise InputError(
            "input must be a string, a non-empty list of strings, or a tensor of token ids [pos] "
            "or [batch, pos] (from a tokenizer: return_tensors='pt'); "
            f"got {type(input).__name__}: {input!r:.80}"
        )
    check_ids(ids[mask], vocabulary)
    return Prompt(ids, mask)


def to_strings(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return each token as readable text, or its id if there is no tokenizer."""
    if tokenizer is None:
        return [str(i) for i in ids]
    text = {i: _token_text(i, tokenizer) for i in set(ids)}
    return [text[i] for i in ids]


def _token_text(i: int, tokenizer: Any) -> str:
    text = str(tokenizer.decode([i]))
    # Decoding drops the space that a SentencePiece tokenizer keeps in front of a first word.
    piece = tokenizer.convert_ids_to_tokens(i)
    if isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" "):
        return f" {text}"
    return text


def tokenizer_for(model: Any, tokenizer: Any, needed_for: str) -> Any:
    """Return the given tokenizer, or the one that the model carries.

    Raises:
        TokenizerMissingError: naming the argument that needs it.
    """
    if tokenizer is None:
        tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise TokenizerMissingError(
            f"{needed_for} is a string, which needs a tokenizer: pass "
            "tokenizer=AutoTokenizer.from_pretrained(...), or give token ids"
        )
    return tokenizer


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse an object that is no tokenizer, such as the name of one.

    Raises:
        InputError: naming the given object.
    """
    if tokenizer is not None and not (
        hasattr(tokenizer, "encode") and hasattr(tokenizer, "convert_ids_to_tokens")
    ):
        raise InputError(
            f"tokenizer must be a tokenizer, got {type(tokenizer).__name__}: {tokenizer!r:.80}; "
            "AutoTokenizer.from_pretrained(...) makes one"
        )


def _encode_all(texts: list[str], encode: Callable[[str], list[int]]) -> tuple[Tensor, Tensor]:
    rows = []
    for text in texts:
        check_text(text, "the prompt")
        rows.append(encode(text) if text else [])
        if not rows[-1]:
            raise InputError(f"the prompt {text!r} is empty: there is no position to attribute")
    width = max(map(len, rows))
    # Masked positions hold 0: a tokenizer's own pad token may have no embedding.
    ids = torch.zeros(len(rows), width, dtype=torch.long, device="cpu")
    mask = torch.zeros(len(rows), width, dtype=torch.bool, device="cpu")
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(tokens, device="cpu")
        mask[row, width - len(tokens) :] = True
    return ids, mask


def encode(text: str, tokenizer: Any, prepend_bos: bool | None) -> list[int]:
    """Return the token ids of a prompt.

    Args:
        text: the prompt.
        tokenizer: the tokenizer.
        prepend_bos: True puts exactly one BOS first, False none; None leaves it to the tokenizer.
    """
    tokens = list(tokenizer.encode(text, add_special_tokens=prepend_bos is None))
    if prepend_bos and tokens:
        bos = getattr(tokenizer, "bos_token_id", None)
        if bos is None:
            raise InputError("prepend_bos=True, but the tokenizer has no BOS token")
        if tokens[0] != bos:
            tokens = [bos, *tokens]
    return tokens


def _as_batch(ids: Tensor, attention_mask: Any) -> tuple[Tensor, Tensor]:
    check_dense(ids, "input")
    check_dense(attention_mask, "attention_mask")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"token ids must be integers, got a tensor of {ids.dtype}")
    if ids.ndim not in (1, 2):
        raise InputError(f"token ids must have shape [pos] or [batch, pos], got {list(ids.shape)}")
    if ids.numel() == 0:
        raise InputError("the prompt is empty: there is no position to attribute")
    ids = ids.detach().to("cpu", torch.long).reshape(-1, ids.shape[-1])
    if attention_mask is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    try:
        mask = torch.as_tensor(attention_mask, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"attention_mask must be a tensor of 0 and 1, got {attention_mask!r:.80}"
        ) from None
    if mask.ndim == 1:
        mask = mask[None]
    if mask.shape != ids.shape:
        raise ShapeMismatchError(
            f"attention_mask has shape {list(mask.shape)}, the token ids {list(ids.shape)}"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("attention_mask must hold 1 at real tokens and 0 at padding, nothing else")
    mask = mask.bool()
    if not bool(mask.any(-1).all()):
        row = int((~mask.any(-1)).nonzero()[0])
        raise InputError(f"row {row} of the input is all padding: there is nothing to attribute")
    return ids.masked_fill(~mask, 0), mask  # padding may hold ids that have no embedding


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Refuse ids that are no tokens of the model.

    Raises:
        TokenError: naming the first of them.
    """
    bad = ids[(ids < 0) | (ids >= vocabulary)]
    if len(bad):
        raise TokenError(
            f"token id {int(bad[0])} is outside the model's vocabulary (0 to {vocabulary - 1})"
        )
