"""The beginning of every public call: from the arguments to a located stream and a prompt.

The model is read first (:func:`model_of`) and a prompt for it later (:func:`prompt_of`), any number
of times; :func:`read_call` does both.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dla_hooks.backends import Backend, Conventions, backend_of
from dla_hooks.calibration.invariance import padding_is_ignored
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.prompts import Prompt, check_tokenizer, read_prompt, tokenizer_for
from dla_hooks.residual.stream import Stream
from dla_hooks.sources.stored_cache import Replay, check_cache
from dla_hooks.verification.recognise import located


@dataclasses.dataclass(frozen=True)
class ReadModel:
    """A model that can be attributed, and what its strings are read with.

    Attributes:
        stream: the located model.
        tokenizer: the one given, or one that the model or its wrapper carries, or None.
        prepend_bos: as given; where it was not, the custom that goes with that tokenizer.
    """

    stream: Stream
    tokenizer: Any
    prepend_bos: bool | None

    @property
    def backend(self) -> Backend:
        """The backend of the model."""
        return self.stream.backend

    def conventions(
        self, center_unembed: bool | None = None, fold_value_biases: bool | None = None
    ) -> Conventions:
        """The conventions of a call: what it gives, and the wrapper's where it gives None."""
        return self.backend.conventions.given(
            center_unembed=center_unembed, fold_value_biases=fold_value_biases
        )


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A model and what it is to be run on.

    Attributes:
        model: the model.
        prompt: the batch; for a cache, one of its shape whose tokens are unknown.
        replay: the cache as a source of activations, or None for a run.
    """

    model: ReadModel
    prompt: Prompt
    replay: Replay | None

    @property
    def stream(self) -> Stream:
        """The located model."""
        return self.model.stream

    @property
    def tokenizer(self) -> Any:
        """The one given, or one that the model or its wrapper carries, or None."""
        return self.model.tokenizer


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
    backend = checked(model, cache=cache)
    if input is None and cache is None:
        raise InputError(
            "provide either `input` (a prompt, a list of prompts, or token ids) to run the model, "
            "or a precomputed `cache`"
        )
    read = model_of(backend, tokenizer=tokenizer, prepend_bos=prepend_bos)
    if cache is not None:
        replay = Replay(cache, read.stream, purpose)
        return Inputs(read, replay.prompt(), replay)
    return Inputs(read, prompt_of(read, input, attention_mask=attention_mask), None)


def checked(model: Any, *, cache: Any = None) -> Backend:
    """The backend of a model that can be run as it stands.

    Args:
        model: a model of any backend, or what :func:`dla_hooks.wrap` made of one; with a cache,
            None is the model that made it.
        cache: an ``ActivationCache`` of the model, or None.

    Raises:
        InputError: for what is no model, or not in evaluation mode; for another model's cache.
        UnsupportedModelError: for a model that its backend does not support.
    """
    if model is None and cache is not None:
        model = getattr(cache, "model", None)
    backend = backend_of(model)
    backend.check()
    if cache is not None:
        check_cache(backend.model, cache)
    return backend


def model_of(model: Any, *, tokenizer: Any = None, prepend_bos: bool | None = None) -> ReadModel:
    """Check and locate a model, without a prompt.

    Args:
        model: a model of any backend, what :func:`dla_hooks.wrap` made of one, or its backend from
            :func:`checked`.
        tokenizer: for strings, or None for the one that the model or its wrapper carries.
        prepend_bos: for strings.

    Raises:
        InputError: for what is no model, or not in evaluation mode; for no tokenizer.
        UnsupportedModelError: for a model that is no sum of writes.
    """
    backend = model if isinstance(model, Backend) else checked(model)
    stream = located(backend)
    check_tokenizer(tokenizer)
    return ReadModel(stream, *backend.reads_with(tokenizer, prepend_bos))


def prompt_of(model: ReadModel, input: Any, *, attention_mask: Any = None) -> Prompt:
    """Read a prompt for a model, and check that the model can run it.

    Args:
        model: from :func:`model_of`.
        input: see :func:`dla_hooks.direct_logit_attribution`.
        attention_mask: for padded ids.

    Raises:
        InputError: for an input that cannot be read, or is longer than the model's positions.
        UnsupportedModelError: for padding that would change the model's logits.
    """
    stream, backend, tokenizer = model.stream, model.backend, model.tokenizer
    if _holds_string(input):
        tokenizer = tokenizer_for(backend.model, tokenizer, "input")
    prompt = read_prompt(
        input,
        tokenizer=tokenizer,
        attention_mask=attention_mask,
        vocabulary=backend.n_tokens(),
        encode=lambda text: backend.encode(text, tokenizer, model.prepend_bos),
    )
    check_length(stream, prompt)
    _check_padding(stream, prompt)
    return prompt


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
