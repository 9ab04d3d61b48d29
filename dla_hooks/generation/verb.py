"""The verb over a text while the model writes it: who wrote each new token?"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any

import torch

from dla_hooks.bars import bar, check_progress, shown
from dla_hooks.call import ReadModel, check_given, checked, model_of
from dla_hooks.errors import InputError
from dla_hooks.generation.options import check_model, check_options, check_stream, ends_of_text
from dla_hooks.generation.pieces import Pieces
from dla_hooks.generation.run import RUNNER_UP, Asked, Generation
from dla_hooks.generation.stops import at_tokens, read_stop
from dla_hooks.generation.turns import ThreadSettings, in_turns
from dla_hooks.inputs.answers import check_answers, read_ids
from dla_hooks.inputs.options import whole_number
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.inputs.two_sequences import start_of
from dla_hooks.results.ranked import Result
from dla_hooks.sources.prompt import prompt_for
from dla_hooks.units import DEFAULT_UNIT, UnitName, read_units
from dla_hooks.units.base import Unit


def attribute_generation(
    model: Any,
    input: Any,
    *,
    max_new_tokens: int,
    unit: UnitName | Unit | tuple[UnitName | Unit, ...] | Mapping[str, Any] = DEFAULT_UNIT,
    against: Any = None,
    tokenizer: Any = None,
    stop: Any = None,
    do_sample: bool = False,
    stream: bool = False,
    progress: bool | None = None,
    check: bool = True,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
    center_unembed: bool | None = None,
    fold_value_biases: bool | None = None,
    **generate_options: Any,
) -> Any:
    """Let a model generate, and attribute the logit of each token as it comes.

    The tokens are those of ``model.generate``, whose own options choose them: processors, sampling
    and the state of the random numbers are the model's. Each new token is one entry, at the
    position before it. Its numbers are those of :func:`direct_logit_attribution` on the finished
    text with that token as the answer, up to rounding.

    They are measured in the runs that made the tokens, against the model's own cache: besides that
    cache, the memory is that of a few tokens. There are two exceptions. Some models give other
    logits in pieces than at once (recurrent layers that start anew, rotary positions that depend
    on the length), and the units ``expert`` and ``adapter``, or one of your own, read more than
    activations. There the tokens are generated, and the finished text is then attributed in one
    more run of the model; with ``stream``, the text so far at each token.

    Args:
        model: a Hugging Face causal language model with ``generate``, plain, wrapped or with
            adapters.
        input: as for :func:`direct_logit_attribution`: strings or ids, padded on the left.
        max_new_tokens: the most new tokens.
        unit: into which rows; several in a tuple or a mapping.
        against: None for the new tokens' logits; a token (a string or an id), whose logit is
            subtracted from each; or "runner-up": the second most likely token by the model's own
            logits at that step (the most likely one, where the second was chosen).
        tokenizer: for strings, unless the model carries one.
        stop: what ends a row besides the model's end of text: a string, or a list of strings, which
            a row's new text may come to hold; an id, or a list of ids; or a callable of
            ``(input_ids [batch, pos], scores)`` that returns a bool or one for each row, as
            transformers' stopping criteria are.
        do_sample: whether tokens are drawn; then ``temperature``, ``top_k``, ``top_p`` and the
            like may follow.
        stream: return an iterator of results of one position each, as the tokens come. The model
            generates in a thread of its own, and only while the next result is waited for. Closing
            the iterator ends the generation.
        progress: show a bar; None shows it in a terminal or a notebook, where it takes long.
        check: hold the parts against the last stream at every token, and against the model's own
            logits at a few of them.
        attention_mask: 1 at real tokens [batch, pos], for ids that are padded on the left.
        prepend_bos: for strings, as for :func:`direct_logit_attribution`; so are the next two.
        center_unembed: take the vocabulary's mean off every row of W_U.
        fold_value_biases: move each head's constant part to the remainder.
        **generate_options: further options of ``model.generate``, such as ``temperature``.

    Returns:
        A :class:`DirectLogitAttribution` or :class:`RankedAttribution` whose ``attribution`` is
        [row, batch, new token], NaN behind the end of a row; a dictionary of them for several
        units. ``generated`` has the new tokens of each row as text, ``generated_ids`` [batch, new
        token] what ``generate`` returns. With ``stream``, an iterator of such results with
        ``attribution`` [row, batch].

    Raises:
        InputError: for any argument that cannot be used. Beam search, several sequences for one
            prompt, assisted decoding and guidance are refused by name.
        UnsupportedModelError: for a model that cannot be attributed, or has no ``generate``.
        DecompositionError: when the parts do not sum to the model's own numbers.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> result = dla_hooks.attribute_generation(
    ...     model, "The keys near the cabinet", max_new_tokens=3, tokenizer=tokenizer)
    >>> result.generated_ids.shape == result.logit.shape
    True
    >>> gap = result.attribution.sum(0) + result.bias - result.logit
    >>> bool(gap.abs().max() < 1e-3)
    True
    """
    units, single = read_units(unit)
    max_new_tokens = whole_number(max_new_tokens, "max_new_tokens", least=1)
    for name, value in (("do_sample", do_sample), ("stream", stream)):
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False, got {value!r:.80}")
    check_progress(progress)
    backend = checked(model)
    check_given(input, None)
    check_model(backend)
    options = {**generate_options, "do_sample": do_sample}
    check_options(backend.model, options)
    read = model_of(backend, tokenizer=tokenizer, prepend_bos=prepend_bos)
    check_stream(read.stream)
    prompt = prompt_for(
        read.stream, read.tokenizer, read.prepend_bos, input, attention_mask=attention_mask
    )
    _check_prompt(read, prompt, max_new_tokens)
    stops = [at_tokens(ends_of_text(backend.model, options))]
    own = read_stop(stop, backend.model, read.tokenizer)
    asked = Asked(
        read=read,
        units=units,
        conventions=read.conventions(center_unembed, fold_value_biases),
        check=bool(check),
        max_new_tokens=max_new_tokens,
        against=_against(read, against),
        stops=(*stops, *([] if own is None else [own])),
        options=options,
        streams=stream,
    )
    generation = Generation(asked, prompt)
    pieces = Pieces(generation.text, read)
    if stream:
        return _streamed(generation, pieces, single, progress, ThreadSettings())
    with bar(generation.longest, "token", progress=progress) as over, shown(False):
        new = generation.run(pieces.add, over.update)
    found = pieces.whole(new)
    return next(iter(found.values())) if single else found


def _streamed(
    generation: Generation,
    pieces: Pieces,
    single: bool,
    progress: bool | None,
    settings: ThreadSettings,
) -> Generator[Any, None, None]:
    """The results of each new token as it comes."""

    def work(hand_over: Callable[[Any], None]) -> None:
        def emit(steps: range, found: Mapping[str, Result]) -> None:
            made = pieces.one(steps.start, found)
            hand_over(next(iter(made.values())) if single else made)

        with shown(False):  # another thread, in which nothing is said yet
            generation.run(emit, _nothing)

    over = bar(generation.longest, "token", progress=progress)
    with over, closing(in_turns(work, settings)) as results:
        for result in results:
            over.update()
            yield result


def _nothing() -> None:
    """The bar of a stream moves where the results are taken."""


def _check_prompt(read: ReadModel, prompt: Prompt, n: int) -> None:
    """Refuse a prompt that cannot be gone on from.

    Raises:
        InputError: for further arguments of a forward, padding on the right, or a text that would
            be longer than the model's positions.
    """
    if prompt.extras:
        raise InputError(
            f"input holds {', '.join(prompt.extras)}, and attribute_generation goes on from "
            "strings or ids; attribute the finished text with direct_logit_attribution"
        )
    start = start_of(read.backend.model)[:1] if prompt.encoder is not None else []
    if start and not bool((prompt.input_ids[:, 0] == start[0]).all()):
        raise InputError(
            f"generate begins the decoder with its start token ({start[0]}); let decoder_input_ids "
            "begin with it, or leave them out"
        )
    if not bool(prompt.mask[:, -1].all()):
        raise InputError(
            "the prompts are padded on the right, where generation goes on; pad them on the left "
            "(tokenizer.padding_side = 'left'), or give them as strings or lists"
        )
    limit, longest = read.stream.position_limit, int(prompt.mask.sum(-1).max())
    if limit is not None and longest + n - 1 > limit:
        raise InputError(
            f"a prompt of {longest} tokens with {n} new ones needs {longest + n - 1} positions, "
            f"but {read.backend.name} has {limit}; shorten it, or lower max_new_tokens"
        )


def _against(read: ReadModel, against: Any) -> int | str | None:
    if against is None or (isinstance(against, str) and against == RUNNER_UP):
        return against
    model, tokenizer = read.backend.model, read.backend.answer_tokenizer(read.tokenizer)
    ids = read_ids(against, "against", model, tokenizer)
    if ids.numel() != 1:
        raise InputError(
            f"against must be one token, {RUNNER_UP!r} or None; got {ids.numel()} tokens"
        )
    every = torch.ones_like(ids, dtype=torch.bool)
    return int(check_answers(ids, every, "against", read.stream.vocabulary))
