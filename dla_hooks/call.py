"""The beginning of every public call: from the arguments to a model, a source and a target.

The model is read first (:func:`model_of`). What it is asked (:func:`target_of`) and where its
activations come from (:func:`source_of`) are read later, any number of times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from dla_hooks.backends import Backend, Conventions, backend_of
from dla_hooks.errors import InputError
from dla_hooks.inputs.positions import Selection, select
from dla_hooks.inputs.prompts import check_tokenizer
from dla_hooks.inputs.rows_of_positions import Span
from dla_hooks.inputs.two_sequences import paired
from dla_hooks.modules.user_hooks import check_global_hooks
from dla_hooks.residual.stream import Stream
from dla_hooks.sources.base import Source
from dla_hooks.sources.live import Live, chunk_size_for
from dla_hooks.sources.placed import continued, spanned
from dla_hooks.sources.prompt import prompt_for
from dla_hooks.sources.stored_cache import StoredCache, check_cache
from dla_hooks.targets.base import Target
from dla_hooks.targets.question import Question, read_question
from dla_hooks.targets.token_sets import TokenSets
from dla_hooks.units.base import Unit
from dla_hooks.verification.recognise import check, located


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
        source: where activations come from.
    """

    model: ReadModel
    source: Source

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
    purpose: str | None,
    chunk_size: Any = None,
) -> Inputs:
    """Check a model and read its input, or take a cache's.

    Args:
        model: a model of any backend, or what :func:`dla_hooks.wrap` made of one.
        input: see :func:`dla_hooks.direct_logit_attribution`; so are the next three.
        cache: an ``ActivationCache``, or None.
        tokenizer: for strings.
        attention_mask: for padded ids.
        prepend_bos: for strings.
        purpose: what reads the cache, for the message about a missing entry.
        chunk_size: run so many tokens at a time.

    Raises:
        InputError: for any argument that cannot be used.
        UnsupportedModelError: for a model that is no sum of writes.
    """
    backend = checked(model, cache=cache)
    check_given(input, cache)
    read = model_of(backend, tokenizer=tokenizer, prepend_bos=prepend_bos)
    source = source_of(
        read,
        input,
        cache=cache,
        attention_mask=attention_mask,
        chunk_size=chunk_size,
        purpose=purpose,
    )
    return Inputs(read, source)


def check_given(input: Any, cache: Any, decoder_input: Any = None) -> Any:
    """The input, with what a decoder has written; a call with neither prompt nor cache is refused.

    Raises:
        InputError: when there is neither.
    """
    if input is None and cache is None:
        raise InputError(
            "provide either `input` (a prompt, a list of prompts, or token ids) to run the model, "
            "or a precomputed `cache`"
        )
    return paired(input, decoder_input)


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
    check(backend)
    if cache is None:
        check_global_hooks()
    else:
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


def source_of(
    model: ReadModel,
    input: Any,
    *,
    cache: Any = None,
    attention_mask: Any = None,
    chunk_size: Any = None,
    purpose: Any,
    each_write: bool = True,
) -> Source:
    """Where a call's activations come from: a run on a prompt, or a cache.

    Args:
        model: from :func:`model_of`.
        input: see :func:`dla_hooks.direct_logit_attribution`.
        cache: an ``ActivationCache``, or None.
        attention_mask: for padded ids.
        chunk_size: run so many tokens at a time.
        purpose: what reads the cache, for the message about a missing entry.
        each_write: whether a cache must show every write by itself.

    Raises:
        InputError: for any argument that cannot be used.
        UnsupportedModelError: for a prompt that the model cannot be run on with the same numbers.
    """
    if cache is not None:
        if chunk_size is not None:
            raise InputError("chunk_size goes with a run of the model; a cache is read as it is")
        return StoredCache(cache, model.stream, purpose, each_write)
    prompt = prompt_for(
        model.stream, model.tokenizer, model.prepend_bos, input, attention_mask=attention_mask
    )
    return Live(model.stream, prompt, chunk_size_for(model.stream, prompt, chunk_size))


def source_for(
    model: ReadModel,
    units: Collection[Unit],
    input: Any,
    cache: Any,
    attention_mask: Any,
    chunk_size: int | None,
) -> Source:
    """:func:`source_of`, for some units."""
    names = [unit.words.name for unit in units]
    return source_of(
        model,
        input,
        cache=cache,
        attention_mask=attention_mask,
        chunk_size=chunk_size,
        purpose=names[0] if len(names) == 1 else tuple(names),
        each_write=any(unit.reads_each_write for unit in units),
    )


def target_of(
    model: ReadModel, answer_tokens: Any, incorrect_tokens: Any, conventions: Conventions
) -> Question | Callable[[Stream], Target]:
    """Read what is attributed: tokens, or a request for another target.

    Args:
        model: from :func:`model_of`.
        answer_tokens: see :func:`dla_hooks.direct_logit_attribution`.
        incorrect_tokens: likewise.
        conventions: of the call.

    Returns:
        A function that makes the target on a located model. A :class:`Question` may need a prompt
        to say what its tokens are.

    Raises:
        InputError: for tokens that cannot be read.
    """
    return read_question(
        answer_tokens,
        incorrect_tokens,
        model=model.backend.model,
        tokenizer=model.backend.answer_tokenizer(model.tokenizer),
        centred=conventions.center_unembed,
    )


def placed(
    model: ReadModel,
    question: Question | Callable[[Stream], Target],
    source: Source,
    input: Any,
    pos: Any,
    chunk_size: Any,
) -> tuple[Question | Callable[[Stream], Target], Source, Selection]:
    """Find the positions that are asked about; tokens that follow a prompt are put behind it.

    Args:
        model: from :func:`model_of`.
        question: from :func:`target_of`.
        source: of the prompt.
        input: as it was given.
        pos: see :func:`dla_hooks.direct_logit_attribution`.
        chunk_size: likewise.

    Returns:
        The question, the source and the selected positions.

    Raises:
        InputError: for any other form of ``pos``, and for what cannot be found or followed.
        PositionError: when a row has no such position.
    """
    stream = model.stream
    if isinstance(question, Question) and question.follows is not None:
        ids, source, selection = continued(stream, question.follows, source, pos, chunk_size)
        return question.about(TokenSets.of(ids)), source, selection
    if isinstance(pos, Span):
        return (
            question,
            source,
            spanned(stream, model.tokenizer, model.prepend_bos, source, input, pos),
        )
    return question, source, select(pos, source.prompt.mask)
