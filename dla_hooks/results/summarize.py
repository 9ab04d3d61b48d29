"""From results to their summary, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from dla_hooks.errors import DLAError, InputError
from dla_hooks.results.comparison import Comparison
from dla_hooks.results.data import EntryData, ResultData, real_entries
from dla_hooks.results.moments import Moments
from dla_hooks.results.ranked import Result
from dla_hooks.results.ranked_data import RankedData
from dla_hooks.results.row_runs import RowRuns
from dla_hooks.results.rows import Row
from dla_hooks.results.subject import Subject, mismatch
from dla_hooks.results.summary import Summary


def summarize(results: Iterable[Result | Comparison | DLAError]) -> Summary:
    """Means over prompts, with standard errors, in one pass and constant memory.

    Each prompt is one sample: its mean over its positions, padding left out. A prompt without any
    selected position is none.

    Args:
        results: what :func:`dla_hooks.attribute_many` yields, or any iterable of results of one
            model and unit, errors among them; a result with several prompts gives as many samples.
            Comparisons are averaged as pairs: the standard errors are those of the differences.

    Raises:
        InputError: when there is no result, for anything that is neither a result nor an error,
            and for results that differ in unit, labels, or in being differences.
    """
    if not isinstance(results, Iterable) or isinstance(results, (EntryData, Comparison)):
        raise InputError(
            f"results must be an iterable of attributions, got one {type(results).__name__}; "
            "put it in a list: summarize([result])"
        )
    first: Subject | None = None
    moments: Moments | None = None
    n_failed, failure = 0, None
    model = ""
    for index, result in enumerate(results):
        if isinstance(result, DLAError):
            n_failed, failure = n_failed + 1, failure or f"{type(result).__name__}: {result}"
            continue
        comparison = result if isinstance(result, Comparison) else None
        result = result.difference if isinstance(result, Comparison) else result
        if not isinstance(result, (ResultData, RankedData)):
            raise InputError(
                f"results must be attributions (or errors), got {type(result).__name__} "
                f"at index {index}: {result!r:.80}"
            )
        subject = subject_of(result)
        if first is None:
            first, model = subject, result.model
        different = mismatch(subject, first)
        if different:
            raise InputError(f"results cannot be averaged: the {different} (result {index})")
        model = model if model == result.model else ""
        samples = _samples(result, index)
        if comparison is not None:
            samples = torch.cat((samples, *_halves(comparison, index)))
        if samples.shape[1]:
            new = Moments.of(samples)
            moments = new if moments is None else moments.merged(new)
    if first is None or moments is None:
        why = "none was given"
        if first is not None:
            why = "no position is selected in any"
        elif failure is not None:
            why = f"all {n_failed} prompts failed, the first with {failure}"
        raise InputError(f"there are no results to summarize: {why}")
    return Summary.of_moments(moments, first, n_failed=n_failed, model=model)


def subject_of(result: Result) -> Subject:
    """What a result is about; it keeps none of its numbers alive."""
    rows, words = result.rows, result.words
    if isinstance(result, RankedData):
        rows = all_rows(rows, words.remainder)
    return Subject(
        unit=result.unit,
        labels=[row.label for row in rows],
        difference=result.incorrect is not None,
        rows=list(rows),
        words=words,
        softcap=result.softcap,
        compared=result.compared,
    )


def all_rows(rows: Sequence[Row], remainder: str) -> Sequence[Row]:
    """Every row of a ranked result, made once for all results of one model."""
    if isinstance(rows, RowRuns):
        return _made(rows, remainder)
    return [*rows, Row(remainder, remainder)]


@lru_cache(maxsize=2)
def _made(rows: RowRuns, remainder: str) -> tuple[Row, ...]:
    return (*rows, Row(remainder, remainder))


def _halves(comparison: Comparison, number: int) -> list[Tensor]:
    """What each row wrote and what is read of it, one sample per prompt, each [row, prompt]."""
    difference = comparison.difference
    if isinstance(difference, RankedData):
        assert comparison.beyond is not None
        whole = _samples(difference, number)[:-2]
        own = replace(
            difference, remainder=comparison.beyond[1], prompt_means=comparison.written_means
        )
        written = _samples(own, number)[:-2]
        return [written, whole - written]
    halves = (comparison.written, comparison.read)
    return [_samples(replace(difference, attribution=own), number)[:-2] for own in halves]


def _samples(result: Result, number: int) -> Tensor:
    """One sample per prompt [row + 2, prompt], the last two rows being bias and logit."""
    valid, row_of = real_entries(result)
    valid, row_of = valid.cpu(), row_of.cpu()
    first = result.remainder[None] if isinstance(result, RankedData) else result.attribution
    parts = (first, result.bias[None], result.logit[None])
    values: Tensor = torch.cat([part.detach().cpu().double() for part in parts])[:, valid]
    if len(result.tokens) <= 1:  # most often: one prompt
        found = values.mean(1, keepdim=True) if values.shape[1] else values
        prompts = torch.zeros(found.shape[1], dtype=torch.long, device="cpu")
    else:
        prompts, place, n = row_of[valid].unique(return_inverse=True, return_counts=True)
        sums: Tensor = values.new_zeros(len(values), len(prompts)).index_add_(1, place, values)
        found = sums.div(n)
    if not isinstance(result, RankedData):
        return found
    if result.prompt_means is None:
        raise InputError(
            f"results cannot be averaged: the rows of a {result.unit} result do not mean the same "
            f"in each prompt, or are too many numbers for so many positions (result {number})"
        )
    return torch.cat((result.prompt_means.cpu().double()[:, prompts], found))
