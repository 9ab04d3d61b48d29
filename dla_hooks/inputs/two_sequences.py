"""What an encoder-decoder reads: something for its encoder, and the tokens of its decoder so far.

Decided here: what the decoder begins with where the caller gives no tokens for it
(:func:`start_of`), and that its rows are padded on the right, as positions count from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError, ShapeMismatchError
from dla_hooks.inputs.encoder_outputs import ENCODED, encoder_output, vectors_of
from dla_hooks.inputs.extras import EMBEDS, MASK, NEVER, POSITIONS, embeddings, sized
from dla_hooks.inputs.forms import as_tensor, check_integers, is_array, pad_right
from dla_hooks.inputs.plain import check_dense, check_text
from dla_hooks.inputs.prompts import Prompt, as_batch, check_ids, is_text

INPUT, DECODER_INPUT = "input", "decoder_input"
"""Keys of a mapping with strings: what the encoder reads, and the decoder's text so far."""
IDS = "input_ids"
_DECODER_IDS, _DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"
_OF_DECODER = {"decoder_inputs_embeds": EMBEDS, "decoder_position_ids": POSITIONS}


@dataclass(frozen=True)
class Reader:
    """How the two sequences of one model are read.

    Attributes:
        encode: token ids of a string that the encoder reads.
        encode_decoder: token ids of a string that the decoder has written, without its start.
        start: the tokens that the decoder begins with; empty where the model has no custom.
        n_tokens: number of tokens that the decoder embeds.
        n_encoded: number of tokens that the encoder embeds, or None where that is not known.
        main: the name of what the encoder reads, in the model's forward.
        pad: fills up rows of the encoder, where they are masked.
    """

    encode: Callable[[str], list[int]]
    encode_decoder: Callable[[str], list[int]]
    start: Sequence[int]
    n_tokens: int
    n_encoded: int | None
    main: str
    pad: int = 0


def paired(input: Any, decoder_input: Any) -> Any:
    """What the encoder reads together with the decoder's text so far, as one input.

    Args:
        input: a string, strings, ids, or a mapping of the forward's arguments.
        decoder_input: a string, strings or ids that the decoder has written; None is nothing yet.

    Raises:
        InputError: where the mapping already holds the decoder's tokens.
    """
    if decoder_input is None:
        return input
    if not isinstance(input, Mapping):
        return {INPUT: input, DECODER_INPUT: decoder_input}
    given = [name for name in (DECODER_INPUT, _DECODER_IDS) if input.get(name) is not None]
    if given:
        raise InputError(f"input holds {given[0]}, and decoder_input= is another; give one")
    return {**input, DECODER_INPUT: decoder_input}


def read_two(input: Any, reader: Reader, attention_mask: Any) -> Prompt:
    """Read what the encoder and the decoder of a model read.

    Args:
        input: as for :func:`dla_hooks.direct_logit_attribution`.
        reader: how the model's sequences are read.
        attention_mask: of the encoder's ids, or None.

    Raises:
        InputError: for an input that cannot be read.
        TokenError: for ids outside the vocabulary.
        ShapeMismatchError: for two sequences of different batches.
    """
    given: dict[str, Any] = {INPUT: input}
    if isinstance(input, Mapping):
        given = {str(name): value for name, value in input.items() if value is not None}
    _check_names(given)
    if attention_mask is not None:
        if MASK in given:
            raise InputError(
                "input holds an attention_mask, and attention_mask= is another; give one"
            )
        given[MASK] = attention_mask
    mine = {own: given.pop(name) for name, own in _OF_DECODER.items() if name in given}
    ids, mask = given.pop(_DECODER_IDS, None), given.pop(_DECODER_MASK, None)
    so_far = given.pop(DECODER_INPUT, None)
    encoder = _encoder(given, reader)
    batch = _batch_of(encoder)
    if EMBEDS in mine:
        if ids is not None or so_far is not None:
            raise InputError("input holds decoder_inputs_embeds and tokens for them; give one")
        mine[EMBEDS] = embeddings(mine[EMBEDS])
        shape = mine[EMBEDS].shape[:2]
        ids, mask = as_batch(torch.zeros(shape, dtype=torch.long, device="cpu"), mask)
    else:
        ids, mask = _decoder_ids(ids, mask, so_far, reader, batch)
        check_ids(ids, reader.n_tokens)
    if batch is not None and len(ids) != batch:
        raise ShapeMismatchError(
            f"the encoder reads {batch} inputs and the decoder {len(ids)}; give as many of both"
        )
    return Prompt(ids, mask, sized(mine, mask) if mine else {}, encoder)


def _check_names(given: Mapping[str, Any]) -> None:
    for name in given:
        if name in NEVER:
            instead = "give decoder_input_ids" if name == "labels" else "leave it out"
            raise InputError(f"input holds {name}, which {NEVER[name]}; {instead}")


def _encoder(given: dict[str, Any], reader: Reader) -> dict[str, Any]:
    """What the encoder reads, as arguments of the forward."""
    plain = given.pop(INPUT, None)
    if plain is not None and given.keys() - {MASK}:
        raise InputError(f"input holds both {INPUT!r} and {sorted(given)[0]!r}; give one")
    if plain is not None:
        if reader.main != IDS:
            raise InputError(
                f"the encoder of this model reads no tokens: give a mapping with {reader.main!r}, "
                "as its processor returns it, and decoder_input_ids"
            )
        given[IDS] = plain
    if ENCODED in given:
        given[ENCODED] = encoder_output(given[ENCODED])
    found = {name: _tensor(value, name) for name, value in given.items() if name != IDS}
    ids = given.get(IDS)
    if ids is not None:
        found = {**_encoder_ids(ids, found.pop(MASK, None), reader), **found}
    if not found.keys() - {MASK}:
        raise InputError(
            f"input holds nothing for the encoder; give {reader.main!r} beside the decoder's tokens"
        )
    return found


def _encoder_ids(ids: Any, mask: Any, reader: Reader) -> dict[str, Tensor]:
    if is_text(ids):
        if mask is not None:
            raise InputError("attention_mask goes with token ids; strings are padded for you")
        ids = [_encoded(text, reader.encode) for text in ([ids] if isinstance(ids, str) else ids)]
    if not is_array(ids) or (isinstance(ids, (list, tuple)) and not ids):
        raise InputError(
            "input must be a string, a non-empty list of strings, token ids [pos] or [batch, pos], "
            f"or a mapping of the forward's arguments; got {type(ids).__name__}: {ids!r:.80}"
        )
    given = ids
    ids, real = _padded(ids, mask, "input")
    if reader.n_encoded is not None:
        check_ids(ids, reader.n_encoded)
    if bool(real.all()):
        return {IDS: ids} if mask is None else {IDS: ids, MASK: real.long()}
    return {IDS: _behind_mask(given, ids, real, mask, reader), MASK: real.long()}


def _behind_mask(given: Any, ids: Tensor, real: Tensor, mask: Any, reader: Reader) -> Tensor:
    """The ids with those the caller masked as they came: some models count positions by ids.

    What no embedding is there for becomes the model's pad token, and so does padding of our own.
    """
    filled = ids.masked_fill(~real, reader.pad)
    if mask is None or reader.n_encoded is None:
        return filled
    own = as_tensor(given, "input", "token ids").detach().to(ids).reshape(ids.shape)
    return torch.where((own >= 0) & (own < reader.n_encoded), own, filled)


def _decoder_ids(
    ids: Any, mask: Any, so_far: Any, reader: Reader, batch: int | None
) -> tuple[Tensor, Tensor]:
    """The decoder's tokens [batch, pos] and which are real; where none are given, its start."""
    if ids is not None and so_far is not None:
        raise InputError(f"input holds {_DECODER_IDS} and {DECODER_INPUT}; give one")
    if ids is not None and not is_text(ids):
        return _padded(ids, mask, _DECODER_IDS)
    if so_far is not None and not is_text(so_far):
        return _padded(so_far, mask, "decoder_input")
    if mask is not None:
        raise InputError(f"{_DECODER_MASK} goes with {_DECODER_IDS}; strings are padded for you")
    text = so_far if ids is None else ids
    texts = [""] * (batch or 1) if text is None else [text] if isinstance(text, str) else text
    if not reader.start:
        raise InputError(
            "the config does not say which token the decoder begins with (decoder_start_token_id); "
            "give decoder_input_ids"
        )
    rows = [
        [*reader.start, *(_encoded(one, reader.encode_decoder) if one else [])] for one in texts
    ]
    return pad_right([torch.tensor(row, dtype=torch.long, device="cpu") for row in rows])


def _encoded(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    check_text(text, "the prompt")
    ids = encode(text) if text else []
    if not ids:
        raise InputError(f"the prompt {text!r} is empty: there is no position to attribute")
    return ids


def _padded(ids: Any, mask: Any, name: str) -> tuple[Tensor, Tensor]:
    """Ids [batch, pos], and which of them are real; rows of different lengths end on the right."""
    if isinstance(ids, (list, tuple)) and any(map(is_array, ids)):
        rows = [as_tensor(row, f"row {i} of {name}", "token ids") for i, row in enumerate(ids)]
        if len({row.shape for row in rows}) > 1:
            if mask is not None or any(row.ndim != 1 or not len(row) for row in rows):
                raise InputError(
                    f"{name} holds rows of different lengths, which are padded for you: give rows "
                    "of ids, and no mask"
                )
            for row in rows:
                check_integers(row)
            return pad_right(rows)
        ids = torch.stack(rows)
    return as_batch(as_tensor(ids, name, "token ids"), mask)


def _tensor(value: Any, name: str) -> Any:
    """Numbers as a tensor; anything else as it is."""
    if name == ENCODED or not is_array(value):
        return value  # an encoder's output has a form of its own
    found = as_tensor(value, name)
    check_dense(found, name)
    return found


def _batch_of(encoder: Mapping[str, Any]) -> int | None:
    """The number of inputs that the encoder reads."""
    encoded = encoder.get(ENCODED)
    if encoded is not None:
        vectors = vectors_of(encoded)
        return None if vectors is None else len(vectors)
    for name, value in encoder.items():
        if isinstance(value, Tensor) and value.ndim and name != MASK:
            return len(value)
    return None


def start_of(model: Any) -> list[int]:
    """The tokens that a decoder begins with, as ``model.generate`` would begin.

    It is ``decoder_start_token_id`` (or the BOS, where there is none), and the token that is forced
    to follow it (``forced_bos_token_id``: the language of mBART and its kin), each from the
    generation config, or else from the config.
    """
    homes = [getattr(model, "generation_config", None), getattr(model, "config", None)]
    decoder = getattr(homes[1], "decoder", None)
    homes += [] if isinstance(decoder, Mapping) else [decoder]

    def find(name: str) -> int | None:
        found = (getattr(home, name, None) for home in homes)
        return next((i for i in found if isinstance(i, int) and not isinstance(i, bool)), None)

    start = find("decoder_start_token_id")
    start = find("bos_token_id") if start is None else start
    if start is None:
        return []
    forced = find("forced_bos_token_id")
    return [start] if forced is None or forced == start else [start, forced]


def encode_target(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text that a decoder has written, without what its start and end add.

    A tokenizer of two languages reads it as the language of the target.
    """
    try:
        found = tokenizer(text_target=text, add_special_tokens=False)["input_ids"]
    except (TypeError, ValueError, KeyError):
        found = tokenizer.encode(text, add_special_tokens=False)
    return list(found)
