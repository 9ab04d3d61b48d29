"""From results to their summary, in one pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dla_hooks.errors import DLAError, InputError
from dla_hooks.results.data import ResultData, real_entries
from dla_hooks.results.moments import Moments
from dla_hooks.results.result import DirectLogitAttribution
from dla_hooks.results.summary import Subject, Summary, mismatch


def summarize(results: Iterable[DirectLogitAttribution | DLAError]) -> Summary:
    """Means over prompts, with standard errors, in one pass and constant memory.

    Each prompt is one sample: its mean over its positions, padding left out. A prompt without any
    selected position is none.

    Args:
        results: what :func:`dla_hooks.attribute_many` yields, or any iterable of results of one
            model and unit, errors among them; a result with several prompts gives as many samples.

    Raises:
        InputError: when there is no result, for anything that is neither a result nor an error,
            and for results that differ in unit, labels, or in being differences.
    """
    if not isinstance(results, Iterable) or isinstance(results, ResultData):
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
        if not isinstance(result, ResultData):
            raise InputError(
                f"results must be attributions (or errors), got {type(result).__name__} "
                f"at index {index}: {result!r:.80}"
            )
        subject = _subject(result)
        if first is None:
            first, model = subject, result.model
        different = mismatch(subject, first)
        if different:
            raise InputError(f"results cannot be averaged: the {different} (result {index})")
        model = model if model == result.model else ""
        samples = _samples(result)
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


def _subject(result: ResultData) -> Subject:
    """What a result is about; it keeps none of its numbers alive."""
    return Subject(
        unit=result.unit,
        labels=list(result.labels),
        difference=result.incorrect is not None,
        rows=list(result.rows),
        words=result.words,
        softcap=result.softcap,
    )


def _samples(result: ResultData) -> Tensor:
    """One sample per prompt [row + 2, prompt], the last two rows being bias and logit."""
    valid, row_of = real_entries(result)
    valid, row_of = valid.cpu(), row_of.cpu()
    parts = (result.attribution, result.bias[None], result.logit[None])
    values: Tensor = torch.cat([part.detach().cpu().double() for part in parts])[:, valid]
    if len(result.tokens) <= 1:  # most often: one prompt
        return values.mean(1, keepdim=True) if values.shape[1] else values
    rows, place, n = row_of[valid].unique(return_inverse=True, return_counts=True)
    sums: Tensor = values.new_zeros(len(values), len(rows)).index_add_(1, place, values)
    return sums.div(n)
