"""A prompt, read for a model and checked against what the model can run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dla_hooks.backends.two_sequences import reader_of
from dla_hooks.calibration.encoder_padding import check_encoder_padding
from dla_hooks.calibration.invariance import holes_are_ignored, length_limits, padding_is_ignored
from dla_hooks.errors import DLAError, InputError, UnsupportedModelError
from dla_hooks.inputs.extras import POSITIONS
from dla_hooks.inputs.prompts import Prompt, is_text, read_prompt, tokenizer_for
from dla_hooks.inputs.two_sequences import DECODER_INPUT, encode_target, read_two
from dla_hooks.modules.faults import described_error
from dla_hooks.residual.stream import Stream
from dla_hooks.sources.cautions import warn_of, warn_of_unknown

_LONGEST = "max_position_embeddings"


def prompt_for(
    stream: Stream,
    tokenizer: Any,
    prepend_bos: bool | None,
    input: Any,
    *,
    attention_mask: Any = None,
) -> Prompt:
    """Read a prompt for a model, and check that the model can run it.

    Args:
        stream: the located model.
        tokenizer: for strings, or None.
        prepend_bos: for strings.
        input: see :func:`dla_hooks.direct_logit_attribution`.
        attention_mask: for padded ids.

    Raises:
        InputError: for an input that cannot be read, or is longer than the model's positions.
        UnsupportedModelError: for padding that would change the model's logits.
    """
    backend = stream.backend
    if backend.reads_two:
        return _pair_for(stream, tokenizer, prepend_bos, input, attention_mask)
    if isinstance(input, Mapping) and input.get(DECODER_INPUT) is not None:
        raise InputError(
            f"{backend.name} is no encoder-decoder, so decoder_input has no decoder of its own; "
            "put the text behind input"
        )
    if is_text(input):
        tokenizer = tokenizer_for(backend.model, tokenizer, "input")
    prompt = read_prompt(
        input,
        tokenizer=tokenizer,
        attention_mask=attention_mask,
        vocabulary=stream.n_tokens,
        encode=lambda text: backend.encode(text, tokenizer, prepend_bos),
    )
    runnable(stream, prompt)
    masked = attention_mask is not None or (
        isinstance(input, Mapping) and "attention_mask" in input
    )
    as_ids = not (masked or is_text(input) or prompt.padded)  # rows of lists are padded here
    warn_of(stream, prompt, tokenizer, given_as_ids=as_ids)
    if is_text(input):
        warn_of_unknown(prompt.input_ids, tokenizer, input)
    return prompt


def _pair_for(
    stream: Stream, tokenizer: Any, prepend_bos: bool | None, input: Any, attention_mask: Any
) -> Prompt:
    """:func:`prompt_for`, for an encoder-decoder."""
    backend = stream.backend
    if prepend_bos is not None:
        raise InputError(
            f"{backend.name} is an encoder-decoder, whose tokenizer knows what its texts begin and "
            "end with; leave prepend_bos out, or give token ids"
        )

    def encode(text: str) -> list[int]:
        reads = tokenizer_for(backend.model, tokenizer, "input")
        return backend.encode(text, reads, None)

    def encode_decoder(text: str) -> list[int]:
        reads = tokenizer_for(backend.model, tokenizer, "decoder_input")
        return encode_target(text, reads)

    prompt = read_two(input, reader_of(backend, encode, encode_decoder), attention_mask)
    check_encoder_padding(stream, runnable(stream, prompt))
    return prompt


def runnable(stream: Stream, prompt: Prompt) -> Prompt:
    """A prompt, once it is known that the model can run it.

    Raises:
        InputError: for one that is longer than the model's positions, or has odd arguments.
        UnsupportedModelError: for padding that would change the model's logits.
    """
    check_length(stream, prompt)
    stream.backend.check_prompt(prompt)
    _check_padding(stream, prompt)
    return prompt


def check_length(stream: Stream, prompt: Prompt) -> None:
    """Refuse a prompt that is longer than the model has positions for.

    Raises:
        InputError: with both lengths.
    """
    longest = int(prompt.mask.sum(-1).max()) if prompt.padded else prompt.shape[1]
    positions = prompt.extras.get(POSITIONS)
    if positions is not None:
        if bool((positions < 0).any()):
            raise InputError("position_ids holds a negative position")
        longest = int(positions.max()) + 1
    if stream.position_limit is not None and longest > stream.position_limit:
        raise InputError(
            f"the prompt has {longest} {'tokens' if positions is None else 'positions'}, but "
            f"{type(stream.backend.root).__name__} has "
            f"positions for {stream.position_limit} only; shorten it"
        )


@contextmanager
def refusing_length(stream: Stream, prompt: Prompt) -> Iterator[None]:
    """Say that a prompt is too long, where a forward fails on more tokens than it has positions.

    Raises:
        InputError: with both lengths, and what the forward raised.
    """
    try:
        yield
    except (DLAError, torch.OutOfMemoryError):
        raise
    except (IndexError, RuntimeError) as error:
        table = None if stream.positions is None else stream.positions.module
        limits = getattr(table, "num_embeddings", None), stream.backend.number(_LONGEST)
        known = [limit for limit in limits if isinstance(limit, int)]
        if not known or prompt.shape[1] <= min(known):
            raise
        raise InputError(
            f"{type(stream.backend.root).__name__} fails on a prompt of {prompt.shape[1]} tokens, "
            f"and has positions for {min(known)}; shorten it ({described_error(error)})"
        ) from error


def _check_padding(stream: Stream, prompt: Prompt) -> None:
    if not prompt.padded:
        return
    for left in (True, False):
        outermost = prompt.mask[:, 0 if left else -1]
        if not bool(outermost.all()) and not padding_is_ignored(stream, left=left):
            side = "left" if left else "right"
            raise UnsupportedModelError(
                f"{stream.backend.name} gives a prompt other logits when it is padded on the "
                f"{side} ({stream.dtype}, its attention implementation as it is set): recurrent "
                "layers and position tables read the padding. Run prompts of different lengths "
                "one at a time, or pad the other side."
            )
    shortest = int(prompt.mask.sum(-1).min())
    reason = length_limits(stream).why_no_padding(prompt.shape[1], shortest)
    if reason is not None:
        raise UnsupportedModelError(
            f"{stream.backend.name} gives a prompt other logits beside a longer one than alone: "
            f"{reason}, and this batch is {prompt.shape[1]} wide. Run prompts of different lengths "
            "one at a time, or with attribute_many, which does."
        )
    if not holes_are_ignored(stream, prompt.mask):
        raise UnsupportedModelError(
            f"{stream.backend.name} gives a prompt other logits when tokens in its middle are "
            "masked than when they are left out: sliding windows, recurrent layers and position "
            "tables count them. Leave these tokens out of the prompt."
        )
