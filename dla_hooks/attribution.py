"""The one verb: who wrote this logit?

read the call -> make a plan -> let a source show activations -> check -> results
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dla_hooks.backends import Backend, Conventions
from dla_hooks.bars import with_progress
from dla_hooks.call import ReadModel, check_given, checked, model_of, placed, source_for, target_of
from dla_hooks.errors import DecompositionError, HookError
from dla_hooks.inputs.positions import said_first
from dla_hooks.measure.asked import Asked, settled
from dla_hooks.measure.completeness import seems_current
from dla_hooks.measure.one_prompt import measure, results
from dla_hooks.modules.user_hooks import hooked_modules, refuse_second_run
from dla_hooks.modules.version import State, forget
from dla_hooks.residual.stream import Stream
from dla_hooks.sources.base import Source
from dla_hooks.targets.base import Target
from dla_hooks.targets.question import Question, require_answer
from dla_hooks.units import DEFAULT_UNIT, UnitName, read_units
from dla_hooks.units.base import Unit
from dla_hooks.units.plan import Kept, make_plan
from dla_hooks.units.plan import Plan as PlanData
from dla_hooks.verification.recognise import located


@with_progress
def direct_logit_attribution(
    model: Any,
    input: Any = None,
    answer_tokens: Any = None,
    incorrect_tokens: Any = None,
    *,
    decoder_input: Any = None,
    unit: UnitName | Unit | tuple[UnitName | Unit, ...] | Mapping[str, Any] = DEFAULT_UNIT,
    pos: Any = -1,
    cache: Any = None,
    tokenizer: Any = None,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
    center_unembed: bool | None = None,
    fold_value_biases: bool | None = None,
    check: bool = True,
    chunk_size: int | None = None,
    progress: bool | None = None,
) -> Any:
    """Split a logit, or a difference of two logits, into what each part of the model wrote.

    With the final norm's scale s frozen at its actual value, the part of a write x_c in the logit
    of token t is ``x_c . d / s``, where ``d`` is the unembedding row of t with the final norm
    folded in (the README derives it). The parts and a bias sum to the model's logit;
    where logits are capped (Gemma 2), to the logit before the cap.

    The model is run once, under hooks that keep one scalar per part and position; no activation
    outlives the module that made it, and the model is left as it was found.

    Args:
        model: a Hugging Face causal language model or encoder-decoder in evaluation mode, or
            TransformerLens' ``HookedTransformer`` or ``TransformerBridge`` (in compatibility mode),
            or what :func:`wrap` made.
        input: a string, a list of strings, or token ids [pos] or [batch, pos] as a tensor, an array
            or lists (rows of different lengths are padded on the left); or a mapping of arguments
            of the model's forward, as tokenizers and processors return: ``input_ids`` or
            ``inputs_embeds``, ``position_ids``, ``pixel_values`` and whatever else it takes.
        answer_tokens: whose logit: a string of one token, an id, a list of these, or an integer
            tensor of shape [], [batch], [pos'], [1, pos'], [batch, 1] or [batch, pos'], aligned
            with the positions that ``pos`` has selected. Or a weighted set (:class:`Tokens`,
            :class:`Mean`), several answers (:class:`Each`), several tokens that follow
            (:class:`Continuation`), ``dla_hooks.TOP`` (the model's own top token at each position;
            the model then runs twice) or ``dla_hooks.NEXT`` (the one that comes next in the text).
        incorrect_tokens: the same form and shape; the result is then the attribution of
            ``logit[answer] - logit[incorrect]``. One :class:`Mean` or :class:`Tokens` for all, and
            ``dla_hooks.RUNNER_UP`` (the model's second token), go with any answer.
        decoder_input: what an encoder-decoder's decoder has written so far: a string, strings or
            ids; None is its start token. The encoder reads ``input``; positions are the decoder's.
        unit: into which rows: the name of a unit (docs/reference.md lists them under "Units"), or
            an object of its class, which takes the unit's own options. Several in a tuple, or in a
            mapping with keys of your own, are measured in one run of the model.
        pos: which positions: an int (no position axis in the result), None (all), a tuple meaning
            ``slice(*pos)``, a slice, a list, or a 1-d array or tensor of ints or bools. Counted
            among a row's real tokens, so -1 is the last one whichever side is padded. Or positions
            of each prompt's own (:class:`PerRow`), or a piece of the text (:class:`Span`).
        cache: an ``ActivationCache`` of a TransformerLens model, with or without its batch axis,
            to take activations from instead of running the model; ``input`` is then ignored.
            :func:`cache_names` says what it must hold.
        tokenizer: needed for strings, unless the model carries one as ``model.tokenizer``.
        attention_mask: 1 at real tokens [batch, pos], for ids that are padded on either side; or
            a mask [batch, 1, pos, pos] of bools, or of floats that are added to attention scores.
        prepend_bos: for strings: True puts one BOS first, False none, None leaves it to the
            tokenizer, or for a TransformerLens model to its ``cfg.default_prepend_bos``.
        center_unembed: take the vocabulary's mean off every row of W_U, as TransformerLens does
            by default (unless logits are capped). Differences of two tokens do not change. None
            is False, or for a wrapped model what it was wrapped with; so is the next.
        fold_value_biases: move each head's value bias to the remainder, as TransformerLens does.
        check: hold the parts against the last stream and, at a few positions, against the model's
            own logits (a cache has none), and raise if they do not add up.
        chunk_size: run the prompt so many tokens at a time, against the model's own cache of what
            came before, so that activation memory grows with the chunk. The numbers are the same,
            or it is refused. Hooks of your own see each chunk by itself, and a warning says so.
            None runs prompts of more than 8,192 tokens in chunks of 2,048, where it can.
        progress: show a bar over the chunks; None shows it in a terminal or a notebook, where they
            take long.

    Returns:
        A :class:`DirectLogitAttribution`, whose ``attribution`` is [component, batch] for a
        single position and [component, batch, pos'] otherwise, in at least float32. A unit with
        too many rows to keep gives a :class:`RankedAttribution` of the strongest of each entry.
        For several units a dictionary of them, by the name of the unit or the mapping's key.

    Raises:
        InputError: (a ValueError) for any argument that cannot be used; subclasses say which.
        PositionError: (an IndexError) for a position that some row does not have.
        UnsupportedModelError: (a NotImplementedError) for a model that is no sum of writes.
        DecompositionError: when the parts do not sum to the model's own numbers.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> result = dla_hooks.direct_logit_attribution(
    ...     model, "The keys near the cabinet", " are", " is", tokenizer=tokenizer)
    >>> bool(abs(result.attribution.sum() + result.bias - result.logit) < 1e-3)
    True
    """
    units, single = read_units(unit)
    require_answer(answer_tokens)
    backend = checked(model, cache=cache)
    input = check_given(input, cache, decoder_input)
    read = model_of(backend, tokenizer=tokenizer, prepend_bos=prepend_bos)
    source = source_for(read, units.values(), input, cache, attention_mask, chunk_size)
    conventions = read.conventions(center_unembed, fold_value_biases)
    with said_first(pos, source.prompt.mask):
        question = target_of(read, answer_tokens, incorrect_tokens, conventions)
    question, source, selection = placed(read, question, source, input, pos, chunk_size)
    asked = settled(question, read.stream, source, selection)
    plan = Plan(model, read, asked.question, units, single, conventions, bool(check))
    return plan._attribute(source, asked)


def prepare(
    model: Any,
    answer_tokens: Any,
    incorrect_tokens: Any = None,
    *,
    unit: UnitName | Unit | tuple[UnitName | Unit, ...] | Mapping[str, Any] = DEFAULT_UNIT,
    tokenizer: Any = None,
    prepend_bos: bool | None = None,
    center_unembed: bool | None = None,
    fold_value_biases: bool | None = None,
    check: bool = True,
) -> Plan:
    """Make everything that no prompt changes, for many calls with the same question.

    Args:
        model: as for :func:`direct_logit_attribution`; so are all other arguments.
        answer_tokens: whose logit.
        incorrect_tokens: whose logit is subtracted, or None.
        unit: into which rows, or several.
        tokenizer: for strings.
        prepend_bos: for strings.
        center_unembed: take the vocabulary's mean off every row of W_U.
        fold_value_biases: move each head's constant part to the remainder.
        check: hold every call against the model's own logits.

    Returns:
        A :class:`Plan`: a function of a prompt.

    Raises:
        InputError: for any argument that cannot be used.
        UnsupportedModelError: for a model that cannot be attributed.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> plan = dla_hooks.prepare(model, " are", " is", tokenizer=tokenizer)
    >>> for prompt in ("The keys near the cabinet", "The dogs near the car"):
    ...     result = plan(prompt)
    """
    units, single = read_units(unit)
    require_answer(answer_tokens)
    read = model_of(model, tokenizer=tokenizer, prepend_bos=prepend_bos)
    conventions = read.conventions(center_unembed, fold_value_biases)
    question = target_of(read, answer_tokens, incorrect_tokens, conventions)
    return Plan(model, read, question, units, single, conventions, bool(check))


class Plan:
    """A question, ready to be asked of many prompts; made by :func:`prepare`.

    What is folded into directions is made once. Each call notices when the model's weights, hooks
    or adapters have changed since, and then makes it anew.
    """

    __module__ = "dla_hooks"

    def __init__(
        self,
        model: Any,
        read: ReadModel,
        question: Question | Callable[[Stream], Target],
        units: Mapping[str, Unit],
        single: bool,
        conventions: Conventions,
        check: bool,
    ) -> None:
        self._model, self._read, self._question = model, read, question
        self._units, self._single = units, single
        self._conventions, self._check = conventions, check
        self._asked, self._kept = False, Kept()
        self._last: Plan | None = None
        self._data = self._make()

    @with_progress
    def __call__(
        self,
        input: Any = None,
        *,
        decoder_input: Any = None,
        pos: Any = -1,
        attention_mask: Any = None,
        cache: Any = None,
        chunk_size: int | None = None,
        progress: bool | None = None,
    ) -> Any:
        """Attribute one prompt, or one batch of prompts.

        Args:
            input: as for :func:`direct_logit_attribution`; so are all other arguments.
            decoder_input: what a decoder has written so far.
            pos: which positions.
            attention_mask: for padded ids.
            cache: take activations from it, instead of running the model.
            chunk_size: run so many tokens at a time.
            progress: show a bar over the chunks.

        Returns:
            What :func:`direct_logit_attribution` returns for the same arguments.
        """
        backend = checked(self._model, cache=cache)
        input, units = check_given(input, cache, decoder_input), self._units.values()
        if backend.state.version != self._read.stream.version:
            self._measure_again(backend)
        source = source_for(self._read, units, input, cache, attention_mask, chunk_size)
        question, source, selection = placed(
            self._read, self._question, source, input, pos, chunk_size
        )
        asked = settled(question, self._read.stream, source, selection)
        return self._about(asked.question)._attribute(source, asked, backend.state)

    def __repr__(self) -> str:
        return f"Plan({self._read.backend.name}: {', '.join(self._units)})"

    def _make(self) -> PlanData:
        return make_plan(self._question(self._read.stream), self._units, self._conventions)

    def _measure_again(self, backend: Backend) -> None:
        """Make the plan anew, for a model that has changed."""
        self._read = dataclasses.replace(self._read, stream=located(backend))
        self._data = self._make()

    def _about(self, question: Question | Callable[[Stream], Target]) -> Plan:
        """The plan for what one prompt asks; the last such plan is kept."""
        if question is self._question:
            return self
        kept = self._last
        if kept is None or kept._read is not self._read or kept._question != question:
            kept = copy.copy(self)
            kept._question, kept._asked, kept._last = question, False, None
            kept._data, kept._kept = kept._make(), Kept()
            self._last = kept
        return kept

    def _attribute(self, source: Source, asked: Asked, state: State | None = None) -> Any:
        # Weights may have changed in a way that leaves no trace, since this was measured.
        may_be_stale = self._asked or self._data.stream.remembered
        self._asked, kept = True, self._kept.under(state)
        failed: DecompositionError | HookError | None = None
        try:
            found, outcome = measure(self._data, source, asked.selection, self._check, kept)
            hookable = self._read.backend.hookable  # hooks may act in the first run only
            if self._check or seems_current(found, outcome) or hooked_modules(hookable()):
                may_be_stale = False
        except (DecompositionError, HookError) as error:
            if not may_be_stale:
                raise
            failed = error
        if may_be_stale:
            backend = checked(self._read.backend.model)
            forget(backend.model)
            self._measure_again(backend)
            if failed is not None:
                refuse_second_run(backend.model, failed)
            source = source.on(self._read.stream)
            found, outcome = measure(self._data, source, asked.selection, self._check)
        made = results(found, outcome, source, self._read.tokenizer, asked.seen, kept)
        return next(iter(made.values())) if self._single else made
