"""What every public call begins with: from the arguments to a located stream and a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dla_hooks.backends import Backend, Conventions, backend_of
from dla_hooks.calibration.invariance import padding_is_ignored
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.answers import read_answers
from dla_hooks.inputs.prompts import Prompt, check_tokenizer, read_prompt, tokenizer_for
from dla_hooks.residual.stream import Stream
from dla_hooks.sources.base import Source
from dla_hooks.sources.live import Live, chunk_size_for
from dla_hooks.sources.stored_cache import StoredCache, check_cache
from dla_hooks.targets.base import Request, Target
from dla_hooks.targets.tokens import TokenTarget
from dla_hooks.verification.recognise import stream_of


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model that was let in, and what is done where a call leaves it open.

    Attributes:
        backend: how the model is run.
        tokenizer: the one given, or one that the model or its wrapper carries, or None.
        conventions: the keywords of the call, or the wrapper's own.
    """

    backend: Backend
    tokenizer: Any
    conventions: Conventions

    def stream(self) -> Stream:
        """The located model, as it is now."""
        return stream_of(self.backend.model)

    def check_evaluation_mode(self) -> None:
        """Refuse a model in training mode."""
        self.backend.check_evaluation_mode()

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        return self.backend.encode(text, self.tokenizer, self.conventions.prepend_bos)


def open_model(
    model: Any,
    tokenizer: Any = None,
    *,
    cache: Any = None,
    center_unembed: bool | None = None,
    fold_value_biases: bool | None = None,
    prepend_bos: bool | None = None,
) -> Opened:
    """Let a model in, or refuse it.

    Args:
        model: a model of any backend, or what :func:`dla_hooks.wrap` made of one. None takes the
            model that made the cache.
        tokenizer: for strings.
        cache: an ``ActivationCache``, or None.
        center_unembed: None leaves it to how the model was wrapped; so do the next two.
        fold_value_biases: likewise.
        prepend_bos: likewise.

    Raises:
        InputError: for any argument that cannot be used.
        UnsupportedModelError: for a model that is no causal language model.
    """
    conventions, model, tokenizer = _unwrapped(model, tokenizer)
    given = {
        "center_unembed": center_unembed,
        "fold_value_biases": fold_value_biases,
        "prepend_bos": prepend_bos,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if model is None and cache is not None:
        model = getattr(cache, "model", None)
    backend = backend_of(model)
    backend.check()
    if cache is not None:
        check_cache(model, cache)
    check_tokenizer(tokenizer)
    return Opened(backend, _carried(model, tokenizer), dataclasses.replace(conventions, **chosen))


def check_given(input: Any, cache: Any) -> None:
    """Refuse a call with nothing to take activations from.

    Raises:
        InputError: when there is neither.
    """
    if input is None and cache is None:
        raise InputError(
            "provide either `input` (a prompt, a list of prompts, or token ids) to run the model, "
            "or a precomputed `cache`"
        )


def open_source(
    opened: Opened,
    stream: Stream,
    input: Any,
    *,
    cache: Any = None,
    attention_mask: Any = None,
    chunk_size: Any = None,
    purpose: Any = "component",
    each_write: bool = True,
) -> Source:
    """Where a call's activations come from: a run on a prompt, or a cache.

    Args:
        opened: the model.
        stream: the same, located.
        input: see :func:`dla_hooks.direct_logit_attribution`.
        cache: an ``ActivationCache``, or None.
        attention_mask: for padded ids.
        chunk_size: run so many tokens at a time.
        purpose: what reads the cache, for the message about a missing entry.
        each_write: whether a cache must show every write by itself.

    Raises:
        InputError: for any argument that cannot be used.
        UnsupportedModelError: for a prompt that the model cannot be run on without other numbers.
    """
    if cache is not None:
        if chunk_size is not None:
            raise InputError("chunk_size goes with a run of the model; a cache is read as it is")
        return StoredCache(cache, stream, purpose, each_write)
    prompt = _read_prompt(opened, stream, input, attention_mask)
    return Live(opened.backend, prompt, chunk_size_for(stream, prompt, chunk_size))


def read_target(
    opened: Opened, answer_tokens: Any, incorrect_tokens: Any
) -> Callable[[Stream], Target]:
    """Read what is attributed: tokens, or a request for another target.

    Args:
        opened: the model.
        answer_tokens: see :func:`dla_hooks.direct_logit_attribution`.
        incorrect_tokens: likewise.

    Returns:
        A function that makes the target on a located model.

    Raises:
        InputError: for tokens that cannot be read.
    """
    if isinstance(answer_tokens, Request):
        if incorrect_tokens is not None:
            raise InputError(
                f"incorrect_tokens goes with tokens, but answer_tokens is {answer_tokens!r:.80}"
            )
        return answer_tokens.on
    answers = read_answers(
        answer_tokens, incorrect_tokens, model=opened.backend.model, tokenizer=opened.tokenizer
    )
    centred = opened.conventions.center_unembed
    return lambda stream: TokenTarget(stream, answers, center_unembed=centred)


def _read_prompt(opened: Opened, stream: Stream, input: Any, attention_mask: Any) -> Prompt:
    tokenizer = opened.tokenizer
    if _holds_string(input):
        tokenizer = tokenizer_for(opened.backend.model, tokenizer, "input")
    prompt = read_prompt(
        input,
        tokenizer=tokenizer,
        attention_mask=attention_mask,
        vocabulary=opened.backend.n_tokens(),
        encode=opened.encode,
    )
    check_length(stream, prompt)
    _check_padding(stream, prompt)
    return prompt


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A model and what it is to be run on.

    Attributes:
        stream: the located model.
        source: where activations come from.
        tokenizer: the one given, or one that the model or its wrapper carries, or None.
    """

    stream: Stream
    source: Source
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
    """Check a model and read its input, or take a cache's; see :func:`open_source`."""
    opened = open_model(model, tokenizer, cache=cache, prepend_bos=prepend_bos)
    check_given(input, cache)
    stream = opened.stream()
    source = open_source(
        opened, stream, input, cache=cache, attention_mask=attention_mask, purpose=purpose
    )
    return Inputs(stream, source, opened.tokenizer)


def _unwrapped(model: Any, tokenizer: Any) -> tuple[Conventions, Any, Any]:
    from dla_hooks.tl.wrap import Wrapped

    if not isinstance(model, Wrapped):
        return Conventions(), model, tokenizer
    bos = model.cfg.default_prepend_bos if tokenizer is None else None
    conventions = Conventions(
        model.processing.center_unembed, model.processing.fold_value_biases, bos
    )
    return conventions, model.model, model.tokenizer if tokenizer is None else tokenizer


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
