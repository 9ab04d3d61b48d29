"""What would be missed: the direct effect of parts beside what taking them out really does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dla_hooks.bars import with_progress
from dla_hooks.call import ReadModel, check_given, checked, model_of, placed, source_of, target_of
from dla_hooks.errors import DecompositionError, HookError, InputError
from dla_hooks.inputs.options import whole_number
from dla_hooks.measure.asked import settled
from dla_hooks.measure.completeness import seems_current
from dla_hooks.modules.user_hooks import refuse_second_run
from dla_hooks.modules.version import forget
from dla_hooks.questions.ablated import ZERO, names_of
from dla_hooks.questions.alike import check_target
from dla_hooks.questions.one_by_one import OneByOne
from dla_hooks.questions.taken_out import HEAD, Runs
from dla_hooks.results.effects import Effects
from dla_hooks.units import UnitName, read_units
from dla_hooks.units.base import Unit


@with_progress
def effects(
    model: Any,
    input: Any = None,
    answer_tokens: Any = None,
    incorrect_tokens: Any = None,
    *,
    unit: UnitName | Unit = HEAD,
    parts: int | Sequence[str] = 10,
    ablation: Any = ZERO,
    pos: Any = -1,
    tokenizer: Any = None,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
    center_unembed: bool | None = None,
    check: bool = True,
    chunk_size: int | None = None,
    progress: bool | None = None,
) -> Effects:
    """Take parts out one by one: what the logit really loses, and where that went.

    A direct effect says what a row wrote to the logit. Whether the row would be missed is another
    question: later parts read what it wrote, and may make up for its loss. Each part is taken out
    at all positions by a real hook (see :func:`ablated`), the model is run, and the two runs are
    compared exactly, with x_c what the last stream holds of row c and s the final norm's scale:

        total      = logit of the clean run - logit of the ablated run, before any cap
                   = own + downstream + read
        own        = what the part's own row wrote less
        downstream = what all other rows wrote less; negative where they make up for it
        read       = what the final norm's scale changes in all rows

    For k parts the model runs k + 1 times, and once more for means.

    Args:
        model: as for :func:`direct_logit_attribution`; so are all arguments that are not described.
        input: the prompts.
        answer_tokens: whose logit.
        incorrect_tokens: whose logit is subtracted, or None.
        unit: whose rows are taken out: components, heads, neurons, experts or features; a name, or
            an object of its class.
        parts: how many, those with the largest direct effects (of their means over batch and
            positions; embeddings, remainders and hooks are left out); or a list of labels, which
            may be of several units.
        ablation: what takes their place, as in :func:`ablated`: ``"zero"``; ``"mean"``, each
            part's own mean over the real tokens of ``input``; a number, a tensor, or a mapping
            from each label to one of these.
        pos: the positions at which the logit is looked at.
        tokenizer: for strings.
        attention_mask: for padded ids.
        prepend_bos: for strings.
        center_unembed: take the vocabulary's mean off every row of W_U.
        check: hold every run against the model's own logits.
        chunk_size: run the prompt so many tokens at a time.
        progress: show a bar over the parts; None shows it in a terminal or a notebook, where they
            take long.

    Returns:
        An :class:`Effects`.

    Raises:
        InputError: for a unit whose rows cannot be taken out (sources, layers, adapters), and for
            any other argument that cannot be used.
        LabelError: (a KeyError) for a part that this model does not have.
        UnsupportedModelError: for a model, or parts, that cannot be told apart.
        DecompositionError: when the parts of a run do not sum to the model's own numbers.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> found = dla_hooks.effects(
    ...     model, "The keys near the cabinet", " are", " is", parts=["L1H0", "2_mlp_out"],
    ...     tokenizer=tokenizer)
    >>> [record["label"] for record in found.records()]
    ['L1H0', '2_mlp_out']
    """
    given = _one_unit(unit)
    if answer_tokens is None:
        raise InputError("answer_tokens is required: the token whose logit is attributed")
    named = None if isinstance(parts, int) and not isinstance(parts, bool) else names_of(parts)
    count = 0 if named is not None else whole_number(parts, "parts", least=1)
    backend = checked(model)
    check_given(input, None)

    def asked() -> tuple[ReadModel, Runs]:
        read = model_of(backend, tokenizer=tokenizer, prepend_bos=prepend_bos)
        conventions = read.conventions(center_unembed, False)
        source = source_of(
            read,
            input,
            attention_mask=attention_mask,
            chunk_size=chunk_size,
            purpose=given.words.name,
        )
        question = target_of(read, answer_tokens, incorrect_tokens, conventions)
        question, source, selection = placed(read, question, source, input, pos, chunk_size)
        known = settled(question, read.stream, source, selection)
        target = known.question(read.stream)
        check_target(target, "effects", answer_tokens)
        return read, Runs(read.stream, source, known.selection, target, conventions, bool(check))

    read, runs = asked()
    failed: DecompositionError | HookError | None = None
    try:
        found = OneByOne(runs, given, named, count, ablation)
        current = check or seems_current(found.clean.found, found.clean.outcome)
        if current or not runs.stream.remembered:
            return found.effects(read)
    except (DecompositionError, HookError) as error:
        if not runs.stream.remembered:
            raise
        failed = error
    forget(backend.model)  # it may have changed in a way that leaves no trace
    if failed is not None:
        refuse_second_run(backend.model, failed)
    read, runs = asked()
    return OneByOne(runs, given, named, count, ablation).effects(read)


def _one_unit(unit: Any) -> Unit:
    units, single = read_units(unit)
    found = next(iter(units.values()))
    if not single:
        raise InputError("unit takes one unit; name parts of several as parts=[labels]")
    if not found.taken_out:
        raise InputError(
            f"rows of the unit {found.words.name!r} cannot be taken out: {found.kept_in}"
        )
    return found
