"""The one verb: who wrote this logit?"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from dla_hooks.call import read_call
from dla_hooks.completeness import (
    Outcome,
    columns_to_check,
    hold_against_cache,
    hold_against_model,
    identity_gap,
)
from dla_hooks.errors import DecompositionError, InputError, ShapeMismatchError
from dla_hooks.inputs import positions
from dla_hooks.inputs.answers import align, read_answers
from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.prompts import Prompt, to_strings
from dla_hooks.modules.version import forget
from dla_hooks.residual.stream import Stream
from dla_hooks.results.result import DirectLogitAttribution
from dla_hooks.sources.live import chunk_size_for
from dla_hooks.units import Split, unit_named
from dla_hooks.units.plan import Run
from dla_hooks.verification.recognise import stream_of


def direct_logit_attribution(
    model: Any,
    input: Any = None,
    answer_tokens: Any = None,
    incorrect_tokens: Any = None,
    *,
    unit: str = "component",
    pos: Any = -1,
    cache: Any = None,
    tokenizer: Any = None,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
    center_unembed: bool | None = None,
    fold_value_biases: bool | None = None,
    check: bool = True,
    chunk_size: int | None = None,
) -> DirectLogitAttribution:
    """Split a logit, or a difference of two logits, into what each part of the model wrote.

    With the final norm's scale s frozen at its actual value, the part of a write x_c in the logit
    of token t is ``x_c . d / s``, where ``d`` is the unembedding row of t with the final norm
    folded in (the README derives it). The parts and a bias sum to the model's logit;
    where logits are capped (Gemma 2), to the logit before the cap.

    The model is run once, under hooks that keep one scalar per part and position; no activation
    outlives the module that made it, and the model is left as it was found.

    Args:
        model: a Hugging Face causal language model in evaluation mode, or TransformerLens'
            ``HookedTransformer`` or ``TransformerBridge`` (in compatibility mode), or what
            :func:`wrap` made of a Hugging Face model.
        input: a string, a list of strings, or token ids [pos] or [batch, pos].
        answer_tokens: whose logit: a string of one token, an id, a list of these, or an integer
            tensor of shape [], [batch], [pos'], [1, pos'], [batch, 1] or [batch, pos'], aligned
            with the positions that ``pos`` has selected.
        incorrect_tokens: the same form and shape; the result is then the attribution of
            ``logit[answer] - logit[incorrect]``.
        unit: ``"component"`` (embeddings and each sublayer), ``"layer"`` (the running sum of
            components, as in a logit lens), or ``"head"`` (each attention head, and a remainder).
        pos: which positions: an int (no position axis in the result), None (all), a tuple meaning
            ``slice(*pos)``, a slice, a list, or a 1-d array or tensor of ints or bools. Counted
            among a row's real tokens, so -1 is the last one whichever side is padded.
        cache: an ``ActivationCache`` of a TransformerLens model, with or without its batch axis,
            to take activations from instead of running the model; ``input`` is then ignored.
            :func:`cache_names` says what it must hold.
        tokenizer: needed for strings, unless the model carries one as ``model.tokenizer``.
        attention_mask: 1 at real tokens [batch, pos], for ids that are padded on either side.
        prepend_bos: for strings: True puts one BOS first, False none, None leaves it to the
            tokenizer, or for a TransformerLens model to its ``cfg.default_prepend_bos``.
        center_unembed: take the vocabulary's mean off every row of W_U, as TransformerLens does
            by default (unless logits are capped). Differences of two tokens do not change. None
            is False, or for a wrapped model what it was wrapped with; so is the next.
        fold_value_biases: move each head's constant part (its value bias) to the remainder, as
            TransformerLens does by default. Only heads change.
        check: hold the parts against the last stream and, at a few positions, against the model's
            own logits, and raise if they do not add up. A cache does not say which logits the
            model gave; there the parts are held against the last stream alone.
        chunk_size: run the prompt so many tokens at a time, against the model's own cache of what
            came before, so that activation memory grows with the chunk and not with the prompt.
            The numbers are the same; a model whose numbers would not be is refused. Hooks of your
            own see each chunk by itself. None runs prompts of more than 8,192 tokens in chunks of
            2,048, where the model allows it and has no such hooks.

    Returns:
        A :class:`DirectLogitAttribution`, whose ``attribution`` is [component, batch] for a
        single position and [component, batch, pos'] otherwise, in at least float32.

    Raises:
        InputError: (a ValueError) for any argument that cannot be used; subclasses say which.
        PositionError: (an IndexError) for a position that some row does not have.
        UnsupportedModelError: (a NotImplementedError) for a model that is no sum of writes.
        DecompositionError: when the parts do not sum to the model's own numbers.
    """
    unit_class = unit_named(unit)
    if answer_tokens is None:
        raise InputError("answer_tokens is required: the token whose logit is attributed")
    inputs = read_call(
        model,
        input,
        cache=cache,
        tokenizer=tokenizer,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
        purpose=unit,
    )
    stream, prompt, replay = inputs.stream, inputs.prompt, inputs.replay
    conventions = inputs.model.conventions(center_unembed, fold_value_biases)
    model, tokenizer = stream.model, inputs.tokenizer
    if replay is not None and not unit_class.shows_embeddings:
        stream = dataclasses.replace(stream, positions=None)  # a cache need not tell them apart
    if replay is None:
        chunk_size = chunk_size_for(stream, prompt, chunk_size)
    elif chunk_size is not None:
        raise InputError("chunk_size goes with a run of the model; a cache is read as it is")
    selection = positions.select(positions.parse(pos, prompt.shape[1]), prompt.mask)
    answers = read_answers(
        answer_tokens,
        incorrect_tokens,
        model=model,
        tokenizer=tokenizer,
    )
    entries, targets = align(answers, selection, prompt.shape, stream.vocabulary)
    entries.batched = replay is None or replay.batched
    if not entries.batched and entries.shape[0] > 1:
        raise ShapeMismatchError(
            f"answers of shape {list(answers.correct.shape)} do not fit the one position of a "
            "cache without its batch axis; give one token"
        )

    def measure(stream: Stream) -> tuple[Run, Split, Outcome]:
        run = Run(
            stream,
            entries,
            targets,
            center_unembed=conventions.center_unembed,
            fold_value_biases=conventions.fold_value_biases,
        )
        splitter = unit_class(run)
        if replay is not None:
            run.replay(replay, splitter.taps(), parts=unit_class.made_of_parts)
            split = splitter.split()
            if not check:
                return run, split, Outcome(identity_gap(run), float("nan"))
            return run, split, hold_against_cache(run, splitter, split, replay.dtype())
        columns = columns_to_check(run, prompt) if check else None
        logits = run.forward(prompt, splitter.taps(), columns, chunk_size)
        split = splitter.split()
        if not check:
            return run, split, Outcome(identity_gap(run), float("nan"))
        return (
            run,
            split,
            hold_against_model(
                run, splitter, split, prompt, targets, columns, logits, conventions.center_unembed
            ),
        )

    try:
        run, split, outcome = measure(stream)
    except DecompositionError:
        if not stream.remembered:
            raise
        forget(model)  # the weights may have changed in a way that leaves no trace
        run, split, outcome = measure(stream_of(model))

    return DirectLogitAttribution(
        attribution=entries.unfold(split.values_CN),
        labels=split.labels,
        unit=unit,
        bias=entries.unfold(run.final.bias_N()),
        logit=entries.unfold(run.final.logits_N()),
        gap=outcome.gap,
        logit_gap=outcome.logit_gap,
        positions=_counted_among_real_tokens(prompt, entries),
        tokens=_texts(prompt, tokenizer) if replay is None else _unknown(prompt),
        answer=_names(targets.correct, entries, tokenizer),
        incorrect=None
        if targets.incorrect is None
        else _names(targets.incorrect, entries, tokenizer),
        model=stream.backend.name,
        softcap=stream.softcap,
    )


def _texts(prompt: Prompt, tokenizer: Any) -> list[list[str]]:
    """The tokens of every row, as text."""
    return [
        to_strings(ids[mask].tolist(), tokenizer)
        for ids, mask in zip(prompt.input_ids, prompt.mask, strict=True)
    ]


def _unknown(prompt: Prompt) -> list[list[str]]:
    """The same for a cache, which does not say what its tokens were."""
    batch, width = prompt.shape
    return [["?"] * width for _ in range(batch)]


def _names(ids: Tensor, entries: Entries, tokenizer: Any) -> list[str]:
    """The text of the one answer, or of every entry's answer."""
    if len(ids) > 1:
        ids = ids[entries.target_of_entry].reshape(-1)
    return to_strings(ids.tolist(), tokenizer)


def _counted_among_real_tokens(prompt: Prompt, entries: Entries) -> Tensor:
    """The position in its own row that every entry of the result belongs to; -1 for padding."""
    counted = prompt.position_ids()[entries.rows, entries.cols].double()
    return entries.unfold(counted).nan_to_num(nan=-1.0).long()
