"""What every public call begins with: from the arguments to a located stream and a prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

from dla_hooks.backends import backend_of
from dla_hooks.calibration.invariance import padding_is_ignored
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.prompts import Prompt, check_tokenizer, read_prompt, tokenizer_for
from dla_hooks.residual.stream import Stream
from dla_hooks.sources.stored_cache import Replay, check_cache
from dla_hooks.verification.recognise import stream_of


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A model and what it is to be run on.

    Attributes:
        stream: the located model.
        prompt: the batch; for a cache, one of its shape whose tokens are unknown.
        replay: the cache as a source of activations, or None for a run.
        tokenizer: the one given, or one that the model or its wrapper carries, or None.
    """

    stream: Stream
    prompt: Prompt
    replay: Replay | None
    tokenizer: Any


def read_call(
    model: Any,
    input: Any,
    *,
    cache: Any,
    tokenizer: Any,
    attention_mask: Any,
    prepend_bos: bool | None,
    purpose: str,
) -> Inputs:
    """Check a model and read its input, or take a cache's.

    Args:
        model: a model of any backend, or what :func:`dla_hooks.wrap` made of one.
        input: see :func:`dla_hooks.direct_logit_attribution`.
        cache: an ``ActivationCache``, or None.
        tokenizer: for strings.
        attention_mask: for padded ids.
        prepend_bos: for strings.
        purpose: what reads the cache, for the message about a missing entry.

    Raises:
        InputError: for any argument that cannot be used.
        UnsupportedModelError: for a model that is no sum of writes.
    """
    model, tokenizer, prepend_bos = unwrap(model, tokenizer, prepend_bos)
    if model is None and cache is not None:
        model = getattr(cache, "model", None)
    backend = backend_of(model)
    backend.check()
    if cache is not None:
        check_cache(model, cache)
    if input is None and cache is None:
        raise InputError(
            "provide either `input` (a prompt, a list of prompts, or token ids) to run the model, "
            "or a precomputed `cache`"
        )
    stream = stream_of(model)
    check_tokenizer(tokenizer)
    if cache is not None:
        replay = Replay(cache, stream, purpose)
        return Inputs(stream, replay.prompt(), replay, _carried(model, tokenizer))
    if _holds_string(input):
        tokenizer = tokenizer_for(model, tokenizer, "input")
    prompt = read_prompt(
        input,
        tokenizer=tokenizer,
        attention_mask=attention_mask,
        vocabulary=backend.n_tokens(),
        encode=lambda text: backend.encode(text, tokenizer, prepend_bos),
    )
    check_length(stream, prompt)
    _check_padding(stream, prompt)
    return Inputs(stream, prompt, None, _carried(model, tokenizer))


def unwrap(model: Any, tokenizer: Any, prepend_bos: bool | None) -> tuple[Any, Any, bool | None]:
    """A wrapped model's own model, with the tokenizer and the BOS custom that it carries."""
    from dla_hooks.tl.wrap import Wrapped

    if not isinstance(model, Wrapped):
        return model, tokenizer, prepend_bos
    if prepend_bos is None and tokenizer is None:
        prepend_bos = model.cfg.default_prepend_bos
    return model.model, model.tokenizer if tokenizer is None else tokenizer, prepend_bos


def _carried(model: Any, tokenizer: Any) -> Any:
    return tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)


def _holds_string(input: Any) -> bool:
    texts = input if isinstance(input, list) else [input]
    return any(isinstance(text, str) for text in texts)


def check_length(stream: Stream, prompt: Prompt) -> None:
    """Refuse a prompt that is longer than the model has positions for.

    Raises:
        InputError: with both lengths.
    """
    longest = int(prompt.mask.sum(-1).max())
    if stream.position_limit is not None and longest > stream.position_limit:
        raise InputError(
            f"the prompt has {longest} tokens, but {type(stream.backend.root).__name__} has "
            f"positions for {stream.position_limit} only; shorten it"
        )


def _check_padding(stream: Stream, prompt: Prompt) -> None:
    left = not bool(prompt.mask[:, 0].all())
    if prompt.padded and not padding_is_ignored(stream, left=left):
        side = "left" if left else "right"
        raise UnsupportedModelError(
            f"{stream.backend.name} gives a prompt other logits when it is padded on the {side} "
            f"({stream.dtype}, its attention implementation as it is set): recurrent layers and "
            "position tables read the padding. Run prompts of different lengths one at a time, or "
            "pad the other side."
        )
