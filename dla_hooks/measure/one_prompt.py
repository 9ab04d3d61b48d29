"""One prompt, from a plan and a source of activations to results.

Decided here: at which columns the model's own logits are looked at.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import DecompositionError, ShapeMismatchError
from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.positions import Selection, spread_over
from dla_hooks.inputs.prompts import Prompt, to_strings
from dla_hooks.measure.claims import Outcome, identity_gap
from dla_hooks.measure.completeness import hold_against_model
from dla_hooks.measure.locator import Locator
from dla_hooks.measure.looks import seen_at
from dla_hooks.measure.relative import hold_against_cache, hold_against_reading
from dla_hooks.modules.autocast import autocast_is_on
from dla_hooks.modules.user_hooks import hooked_modules
from dla_hooks.results.ranked import RankedAttribution
from dla_hooks.results.result import DirectLogitAttribution
from dla_hooks.results.seen import Seen
from dla_hooks.sources.base import Source
from dla_hooks.units.base import RankedSplit
from dla_hooks.units.plan import Kept, Measurement, Plan, Recording

_MOST_COLUMNS = 4
_MOST_LOGITS = 2**22  # of the model's own, kept for the check: 16 MiB in float32


def columns_to_check(entries: Entries, prompt: Prompt, vocabulary: int) -> Tensor | None:
    """A few of the selected columns, the first and the last among them; None if there are none."""
    if not len(entries):
        return None
    if len(entries) == 1:
        return entries.cols
    columns: Tensor = entries.cols.unique()
    per_column = len(prompt.input_ids) * vocabulary
    most = max(1, min(_MOST_COLUMNS, _MOST_LOGITS // per_column))
    if most == 1 or len(columns) == 1:
        return columns[-1:]
    return columns[spread_over(len(columns), most)]


def measure(
    plan: Plan, source: Source, selection: Selection, check: bool, kept: Kept | None = None
) -> tuple[Measurement, Outcome]:
    """Let a source show its activations to a plan's taps, and check what they wrote.

    Where the sum of all parts is off, though some were sums of a unit's rows, each is measured by
    itself, to say which one it is.

    Args:
        plan: what is measured.
        source: shows the activations.
        selection: the selected positions.
        check: whether to check it.
        kept: where nobody has hooks on the model: what was kept of the prompt before, which may
            serve again.

    Raises:
        DecompositionError: when something does not add up.
    """
    plan = plan.in_prompt(source, selection)
    by_itself = not source.of_a_run
    try:
        return _measure(plan, source, selection, check, by_itself, kept)
    except DecompositionError:
        # Hooks may act in the first run only.
        told = not (by_itself or plan.parts.by_itself)
        if told and not hooked_modules(plan.stream.backend.hookable()):
            try:
                _measure(plan, source, selection, check, True, None)
            except DecompositionError as named:
                raise named from None
        raise  # a run that adds up the second time is not the one that was asked about


def _measure(
    plan: Plan,
    source: Source,
    selection: Selection,
    check: bool,
    by_itself: bool,
    kept: Kept | None,
) -> tuple[Measurement, Outcome]:
    prompt = source.prompt
    entries = plan.target.align(selection, prompt.shape, source.batched)
    if prompt.encoder_mask is not None:
        entries = entries.beside_encoder(prompt.encoder_mask)
    if not entries.batched and entries.shape[0] > 1:
        raise ShapeMismatchError(
            f"{entries.shape[0]} answers do not fit the one prompt of a cache without its batch "
            "axis; give one token, or keep the axis"
        )
    if kept is None or by_itself or autocast_is_on():
        recording = Recording(plan, entries, source.missing, by_itself)
    else:
        recording = kept.take(plan, entries)
    columns = None
    reads_logits = plan.target.reads_logits
    if reads_logits:
        columns = columns_to_check(entries, prompt, plan.stream.vocabulary) if check else None
        if recording.needs_all_logits or (check and recording.is_changed_behind):
            columns = torch.arange(prompt.shape[1], device="cpu")  # what hooks there would see
        if source.logits_at is not None:
            columns = source.logits_at if check else None
    logits = source.show(
        recording.view, recording.taps, columns, plan.target.until, recording.taps_before
    )
    measurement = recording.finish()
    if not check:
        return measurement, Outcome(identity_gap(measurement))
    if not reads_logits:
        return measurement, hold_against_reading(measurement, source.dtype())
    if not source.has_logits:
        return measurement, hold_against_cache(
            measurement, source.dtype(), source.own_scale(recording.view)
        )
    return measurement, hold_against_model(measurement, prompt, columns, logits)


def results(
    measurement: Measurement,
    outcome: Outcome,
    source: Source,
    tokenizer: Any,
    seen: Seen | None = None,
    kept: Kept | None = None,
) -> dict[str, DirectLogitAttribution | RankedAttribution]:
    """A result for each unit.

    Args:
        measurement: what was measured.
        outcome: of the check.
        source: of the prompt.
        tokenizer: names the tokens, or None.
        seen: what the model's logits say at all entries; None leaves it to those of the check.
        kept: where the recording is kept, of which nothing is read any more; None drops it.
    """
    plan, entries, reading = measurement.plan, measurement.entries, measurement.reading
    named_with = plan.stream.backend.answer_tokenizer(tokenizer)
    texts = partial(to_strings, tokenizer=named_with)
    if seen is not None:
        seen = seen.named(texts)
    elif outcome.observed is not None:
        seen = seen_at(entries, outcome.observed, plan.target.answers_K, texts)
    answer, incorrect = plan.target.names(entries, tokenizer)
    bias, logit = entries.unfold(reading.bias_N), entries.unfold(reading.value_N())
    given: list[Tensor] = []
    found: dict[str, DirectLogitAttribution | RankedAttribution] = {}
    for key, split in measurement.splits.items():
        unit = plan.units[key].unit
        if found:  # each result is its caller's to write to
            bias, logit = bias.clone(), logit.clone()
            seen = None if seen is None else seen.changed(torch.clone, torch.clone)
        common: dict[str, Any] = {
            "unit": unit.words.name,
            "words": plan.units[key].words,
            "bias": bias,
            "logit": logit,
            "gap": outcome.gap,
            "logit_gap": outcome.logit_gap,
            "positions": entries.positions(source.prompt.mask),
            "tokens": source.texts(tokenizer),
            "answer": list(answer),
            "incorrect": None if incorrect is None else list(incorrect),
            "model": plan.stream.backend.name,
            "softcap": plan.stream.softcap,
            "reading": plan.target.reading,
            "seen": seen,
            "several": entries.several,
        }
        if split.beside:
            common["beside"] = {name: entries.unfold(own) for name, own in split.beside.items()}
        if isinstance(split, RankedSplit):
            common["encoder_tokens"] = source.encoder_texts(tokenizer)
            found[key] = _ranked(split, entries, common)
        else:
            values_CN = split.values_CN
            if any(values_CN is other for other in given):  # of one unit under two keys
                values_CN = values_CN.clone()
            given.append(values_CN)
            found[key] = DirectLogitAttribution(
                attribution=entries.unfold(values_CN),
                labels=[row.label for row in split.rows],
                rows=list(split.rows),
                **common,
            )
        found[key].located_by(Locator(plan.stream.model, unit.dictionary_places()))
    if kept is not None:
        kept.put(measurement.recording)
    return found


def _ranked(split: RankedSplit, entries: Entries, common: dict[str, Any]) -> RankedAttribution:
    means = None
    if split.row_sums_RB is not None:
        n_B = entries.rows.bincount(minlength=entries.prompt_shape[0])
        means = split.row_sums_RB / n_B.to(split.row_sums_RB)
    return RankedAttribution(
        attribution=entries.unfold(split.values_KN),
        index=entries.unfold(split.index_KN, padding=-1),
        rows=split.rows,
        rest=entries.unfold(split.rest_N),
        remainder=entries.unfold(split.remainder_N),
        prompt_means=means,
        **common,
    )
