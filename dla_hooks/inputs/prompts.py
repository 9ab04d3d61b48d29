"""Read prompts as token ids; for answers see :mod:`dla_hooks.inputs.answers`.

Decided here: which forms of input are taken, and whether a BOS is put before a string.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError, ShapeMismatchError, TokenError, TokenizerMissingError
from dla_hooks.inputs.extras import EMBEDS, MASK, embeddings, is_whole_mask, sized, split_mapping
from dla_hooks.inputs.forms import as_ids, check_integers, is_array, pad_left
from dla_hooks.inputs.masks import is_whole, whole_mask
from dla_hooks.inputs.plain import check_dense, check_text


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts.

    Attributes:
        input_ids: [batch, pos], on the CPU; zeros where embeddings were given in their place.
        mask: True at the real tokens [batch, pos], on the CPU.
        extras: further arguments of the model's forward, for the real run only.
        encoder: of an encoder-decoder, whose decoder reads the ids: what its encoder reads, as
            arguments of the forward. None for a model without an encoder, and in made-up runs.
    """

    input_ids: Tensor
    mask: Tensor
    extras: Mapping[str, Any] = field(default_factory=dict)
    encoder: Mapping[str, Any] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, pos)."""
        batch, width = self.input_ids.shape
        return batch, width

    @cached_property
    def padded(self) -> bool:
        """True if some row is shorter than the batch is wide."""
        return not is_whole(self.mask)

    @property
    def embedded(self) -> bool:
        """True if embeddings were given in the place of ids."""
        return EMBEDS in self.extras

    @property
    def encoder_mask(self) -> Tensor | None:
        """True at the real tokens of an encoder [batch, position], where the prompt says it."""
        mask = (self.encoder or {}).get(MASK)
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

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
        input: a string, a list of strings; token ids [pos] or [batch, pos] as a tensor, an array
            or lists; or a mapping of the forward's arguments, as tokenizers and processors return.
        tokenizer: gives the padding token for strings.
        attention_mask: 1 at real tokens, for ids that are padded on either side; or a mask with 4
            axes, which goes to the forward as it is.
        vocabulary: number of tokens that the model embeds.
        encode: token ids of a string. Token ids are taken as they are.

    Raises:
        InputError: for an input that is neither, is empty, or whose mask does not fit.
        TokenError: for ids outside the vocabulary. Beside further arguments they are left to the
            backend: placeholders of images may have no embedding.
    """
    extras: dict[str, Any] = {}
    if isinstance(input, Mapping):
        input, own_mask, extras = split_mapping(input)
        if own_mask is not None and attention_mask is not None:
            raise InputError(
                "input holds an attention_mask, and attention_mask= is another; give one"
            )
        attention_mask = own_mask if attention_mask is None else attention_mask
        if is_text(input):
            raise InputError("input_ids must hold token ids; give a string as input itself")
    if is_whole_mask(attention_mask):
        extras[MASK], attention_mask = attention_mask, None
    if EMBEDS in extras:
        extras[EMBEDS] = embeddings(extras[EMBEDS])
        ids = torch.zeros(extras[EMBEDS].shape[:2], dtype=torch.long, device="cpu")
        ids, mask = as_batch(ids, attention_mask)
    elif is_text(input):
        if attention_mask is not None or extras:
            raise InputError("attention_mask goes with token ids; strings are padded for you")
        ids, mask = _encode_all([input] if isinstance(input, str) else input, encode)
    elif is_array(input) and not (isinstance(input, (list, tuple)) and not input):
        ids, mask = as_batch(*as_ids(input, attention_mask))
    else:
        raise InputError(
            "input must be a string, a non-empty list of strings, token ids [pos] or [batch, pos] "
            "(a tensor, an array or lists), or a mapping of the forward's arguments, as a "
            f"tokenizer returns it; got {type(input).__name__}: {input!r:.80}"
        )
    if extras:
        return Prompt(ids, mask, sized(extras, mask))
    check_ids(ids, vocabulary)  # padding holds 0
    return Prompt(ids, mask)


def is_text(input: Any) -> bool:
    """Whether an input is a string, or a list of nothing else."""
    if isinstance(input, list):
        return bool(input) and all(isinstance(text, str) for text in input)
    return isinstance(input, str)


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


def known_ids(tokenizer: Any, count: int) -> Tensor:
    """Which of the ids below ``count`` are tokens of a tokenizer [count], on the CPU."""
    known = torch.zeros(count, dtype=torch.bool, device="cpu")
    if hasattr(tokenizer, "get_vocab"):
        ids = torch.tensor(list(tokenizer.get_vocab().values()), dtype=torch.long, device="cpu")
        known[ids[(ids >= 0) & (ids < count)]] = True
        return known
    pieces = tokenizer.convert_ids_to_tokens(list(range(count)))
    known[[i for i, piece in enumerate(pieces) if piece is not None]] = True
    return known


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
        rows.append(torch.tensor(encode(text) if text else [], dtype=torch.long, device="cpu"))
        if not len(rows[-1]):
            raise InputError(f"the prompt {text!r} is empty: there is no position to attribute")
    # Masked positions hold 0: a tokenizer's own pad token may have no embedding.
    return pad_left(rows)


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


def as_batch(ids: Tensor, attention_mask: Any) -> tuple[Tensor, Tensor]:
    """Token ids [batch, pos] and which of them are real, checked.

    Args:
        ids: [pos] or [batch, pos].
        attention_mask: 1 at real tokens, or None for all.

    Raises:
        InputError: for ids that are none, and for a row of nothing but padding.
        ShapeMismatchError: for a mask of another shape.
    """
    check_dense(ids, "input")
    check_dense(attention_mask, "attention_mask")
    check_integers(ids)
    if ids.ndim not in (1, 2):
        raise InputError(f"token ids must have shape [pos] or [batch, pos], got {list(ids.shape)}")
    if ids.numel() == 0:
        raise InputError("the prompt is empty: there is no position to attribute")
    ids = ids.detach().to("cpu", torch.long).reshape(-1, ids.shape[-1])
    if attention_mask is None:
        return ids, whole_mask(*ids.shape)
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
    if not ids.numel():
        return
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= vocabulary:
        bad = ids[(ids < 0) | (ids >= vocabulary)]
        raise TokenError(
            f"token id {int(bad[0])} is outside the model's vocabulary (0 to {vocabulary - 1}); "
            "if it is padding, pass attention_mask"
        )
