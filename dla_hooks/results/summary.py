"""Many results as one: means with standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dla_hooks.errors import DLAError, InputError, MissingExtraError
from dla_hooks.results.data import ranked
from dla_hooks.results.ranking import decimals, real_entries, strongest
from dla_hooks.results.result import DirectLogitAttribution
from dla_hooks.results.table import layer_and_head
from dla_hooks.results.text import lines
from dla_hooks.results.wording import UNITS, sum_line

if TYPE_CHECKING:
    import pandas

_ROWS = 14
_HALF_BAR = 12


@dataclass(repr=False, eq=False)
class Summary:
    """What many prompts have in common: each row's mean over prompts, and how sure it is.

    As in a single result the rows and the bias sum to the logit (for ``layer`` the last row and
    the bias do), each now a mean over prompts.

    Attributes:
        labels: the name of each row.
        unit: ``component``, ``layer`` or ``head``.
        mean: over prompts, in float64 [component].
        standard_error: of that mean: the samples' standard deviation over the root of ``n``
            [component]; NaN where there is one sample only.
        n: prompts that the means are over.
        n_failed: errors that stood in the place of results.
        bias: the mean of the biases.
        logit: the mean of the logits (or differences), before any softcap.
        logit_standard_error: of that mean.
        difference: whether it is about differences of two logits.
        model: the model's class and type; empty where the results have several.
        softcap: the cap that the model puts on its logits, or None.
    """

    labels: list[str]
    unit: str
    mean: Tensor
    standard_error: Tensor
    n: int
    n_failed: int
    bias: float
    logit: float
    logit_standard_error: float
    difference: bool = False
    model: str = ""
    softcap: float | None = None

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` rows that push the logit up the most: ``(label, mean)``, largest first.

        Args:
            k: how many; no more than there are rows.
        """
        return ranked(self.labels, self.mean, k, largest=True)

    def bottom(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` rows that push the logit down the most, most negative first."""
        return ranked(self.labels, self.mean, k, largest=False)

    def to_dataframe(self) -> pandas.DataFrame:
        """One line per row (extra ``pandas``).

        Returns:
            Columns ``label``, ``layer`` and ``head`` (where the label has them), ``mean``,
            ``standard_error``, ``n``.

        Raises:
            MissingExtraError: when pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise MissingExtraError("to_dataframe()", "pandas") from None
        return pandas.DataFrame(self.records())

    def records(self) -> list[dict[str, Any]]:
        """The lines of :meth:`to_dataframe`, as dictionaries."""
        found = []
        pairs = zip(self.mean.tolist(), self.standard_error.tolist(), strict=True)
        for label, (mean, error) in zip(self.labels, pairs, strict=True):
            layer, head = layer_and_head(label)
            place = {"label": label, "layer": layer, "head": head}
            found.append({**place, "mean": mean, "standard_error": error, "n": self.n})
        return found

    def __repr__(self) -> str:
        return _as_text(self)


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
    if not isinstance(results, Iterable) or isinstance(results, DirectLogitAttribution):
        raise InputError(
            f"results must be an iterable of attributions, got one {type(results).__name__}; "
            "put it in a list: summarize([result])"
        )
    first: DirectLogitAttribution | None = None
    moments = _Moments()
    n_failed, failure = 0, None
    model = ""
    for index, result in enumerate(results):
        if isinstance(result, DLAError):
            n_failed, failure = n_failed + 1, failure or f"{type(result).__name__}: {result}"
            continue
        if not isinstance(result, DirectLogitAttribution):
            raise InputError(
                f"results must be attributions (or errors), got {type(result).__name__} "
                f"at index {index}: {result!r:.80}"
            )
        if first is None:
            first, model = _without_numbers(result), result.model
        _check_alike(first, result, index)
        model = model if model == result.model else ""
        moments.add(_samples(result))
    if first is None or moments.mean is None:
        why = "none was given"
        if first is not None:
            why = "no position is selected in any"
        elif failure is not None:
            why = f"all {n_failed} prompts failed, the first with {failure}"
        raise InputError(f"there are no results to summarize: {why}")
    mean, error = moments.mean, moments.standard_error()
    return Summary(
        labels=list(first.labels),
        unit=first.unit,
        mean=mean[:-2],
        standard_error=error[:-2],
        n=moments.n,
        n_failed=n_failed,
        bias=float(mean[-2]),
        logit=float(mean[-1]),
        logit_standard_error=float(error[-1]),
        difference=first.incorrect is not None,
        model=model,
        softcap=first.softcap,
    )


class _Moments:
    """Mean and spread of a stream of samples, without keeping them (Welford, Chan et al.)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean: Tensor | None = None
        self._squares: Tensor = torch.zeros(())

    def add(self, samples: Tensor) -> None:
        """Take in samples [row, n]."""
        n = samples.shape[1]
        if not n:
            return
        mean = samples.mean(1)
        squares = (samples - mean[:, None]).square().sum(1)
        if self.mean is None:
            self.mean, self._squares = torch.zeros_like(mean), torch.zeros_like(mean)
        total = self.n + n
        step = mean - self.mean
        self.mean = self.mean + step * (n / total)
        self._squares = self._squares + squares + step.square() * (self.n * n / total)
        self.n = total

    def standard_error(self) -> Tensor:
        """Of the mean [row]; NaN for one sample."""
        if self.n == 1:
            return torch.full_like(self._squares, math.nan)
        return (self._squares / (self.n - 1) / self.n).sqrt()


def _samples(result: DirectLogitAttribution) -> Tensor:
    """One sample per prompt [component + 2, prompt], the last two rows being bias and logit."""
    valid, row_of = real_entries(result)
    valid, row_of = valid.cpu(), row_of.cpu()
    parts = (result.attribution, result.bias[None], result.logit[None])
    values: Tensor = torch.cat([part.detach().cpu().double() for part in parts])[:, valid]
    if len(result.tokens) <= 1:  # most often: one prompt
        return values.mean(1, keepdim=True) if values.shape[1] else values
    rows, place, n = row_of[valid].unique(return_inverse=True, return_counts=True)
    sums: Tensor = values.new_zeros(len(values), len(rows)).index_add_(1, place, values)
    return sums.div(n)


def _without_numbers(result: DirectLogitAttribution) -> DirectLogitAttribution:
    """What the results after the first are held against, keeping nothing of it alive."""
    empty = result.attribution.new_zeros(0)
    return DirectLogitAttribution(
        attribution=empty,
        labels=list(result.labels),
        unit=result.unit,
        bias=empty,
        logit=empty,
        gap=0.0,
        incorrect=None if result.incorrect is None else [],
        softcap=result.softcap,
    )


def _check_alike(first: DirectLogitAttribution, result: DirectLogitAttribution, index: int) -> None:
    what = ""
    if result.unit != first.unit:
        what = f"unit is {result.unit!r}, where the first has {first.unit!r}"
    elif result.labels != first.labels:
        pairs = zip(result.labels, first.labels, strict=False)
        n = len(result.labels), len(first.labels)
        other = next((f"{a!r} for {b!r}" for a, b in pairs if a != b), f"{n[0]} rows for {n[1]}")
        what = f"labels are not those of the first ({other})"
    elif (result.incorrect is None) != (first.incorrect is None):
        kinds = ("a logit", "a difference of two logits")
        what = f"number is {kinds[result.incorrect is not None]}, where the first's is "
        what += kinds[first.incorrect is not None]
    if what:
        raise InputError(f"results cannot be averaged: the {what} (result {index})")


def _as_text(summary: Summary) -> str:
    """A summary in fixed width, its strongest rows with standard errors and bars."""
    mean = DirectLogitAttribution(
        attribution=summary.mean[:, None],
        labels=summary.labels,
        unit=summary.unit,
        bias=torch.tensor([summary.bias]),
        logit=torch.tensor([summary.logit]),
        gap=math.nan,
        incorrect=[] if summary.difference else None,
        softcap=summary.softcap,
    )
    rows = strongest(mean, _ROWS)
    errors = dict(zip(summary.labels, summary.standard_error.tolist(), strict=True))
    digits = decimals([rows.largest, rows.remainder or 0.0])
    spreads = {
        label: "" if math.isnan(error) else f"± {error:.{digits}f}  "
        for label, error in errors.items()
    }
    width = max(map(len, spreads.values()))
    table = []
    for line in lines(rows, _HALF_BAR):
        label = line.start.split(" ", 1)[0]
        spread = spreads[label] if label else ""  # what stands for the rest has none
        table.append(f"  {line.start}{spread:<{width}}{line.end}".rstrip())
    what = "logit differences" if summary.difference else "logits"
    head = f"mean of {what} over {summary.n} prompt{'s' * (summary.n != 1)}"
    if summary.n_failed:
        head += f" ({summary.n_failed} more failed)"
    if summary.model:
        head += f" · {summary.model}"
    unit = UNITS.get(summary.unit, summary.unit)
    if summary.n > 1:
        unit += " (± standard error)"
    return "\n".join([head, unit, *table, sum_line(mean, mean=True)])
