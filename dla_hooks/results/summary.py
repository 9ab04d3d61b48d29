"""Many results as one: means with standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dla_hooks.errors import ArgumentTypeError, InputError
from dla_hooks.results import files, table
from dla_hooks.results.data import ResultData, most_extreme
from dla_hooks.results.html import means_as_html
from dla_hooks.results.moments import Moments
from dla_hooks.results.picture import Picture
from dla_hooks.results.plots import summary as summary_plot
from dla_hooks.results.rows import NO_WORDS, Row, Words, filled
from dla_hooks.results.stored import Stored
from dla_hooks.results.subject import Subject, mismatch
from dla_hooks.results.text import means_as_text

if TYPE_CHECKING:
    import pandas

HALVES = ("written", "read")
"""What a comparison has beside the difference of each row."""
_ERROR = "_standard_error"


@dataclass(repr=False, eq=False)
class Summary(Stored):
    """What many prompts have in common: each row's mean over prompts, and how sure it is.

    As in a single result the rows and the bias sum to the logit (where rows are running sums
    the last row and the bias do), each now a mean over prompts.

    Summaries of parts of a data set make up that of the whole: ``one.merge(other)``.

    Attributes:
        labels: the name of each row.
        unit: the name of the unit that made the rows.
        mean: over prompts, in float64 [row].
        standard_error: of that mean: the samples' standard deviation over the root of ``n``
            [row]; NaN where there is one sample only.
        n: prompts that the means are over.
        n_failed: errors that stood in the place of results.
        bias: the mean of the biases.
        logit: the mean of the logits (or differences), before any softcap.
        logit_standard_error: of that mean.
        difference: whether it is about differences of two logits.
        model: the model's class and type; empty where the results have several.
        softcap: the cap that the model puts on its logits, or None.
        rows: a record of each row: label, kind, layer, sub, index.
        words: what the unit says of its rows.
        squares: sums of squared deviations from the mean, which merging needs: of each row, of
            the bias and of the logit [row + 2]; of comparisons then those of each row's ``written``
            and ``read``.
        compared: whether it is about differences of two runs, as :func:`dla_hooks.compare` gives.
        beside: of comparisons the means of ``written`` and ``read``, and the standard errors of
            these (``written_standard_error``, ``read_standard_error``), each [row].
        contrast: of :func:`summarize_rows` with pairs: which prompts' numbers are subtracted from
            which; else None.
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
    rows: list[Row] = field(default_factory=list)
    words: Words = NO_WORDS
    squares: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu")
    )
    compared: bool = False
    beside: dict[str, Tensor] = field(default_factory=dict)
    contrast: str | None = None

    def __post_init__(self) -> None:
        self.rows, self.words = filled(self.labels, self.unit, self.rows, self.words)
        if not len(self.mean) == len(self.standard_error) == len(self.labels):
            raise InputError(
                f"there are {len(self.labels)} labels, {len(self.mean)} means and "
                f"{len(self.standard_error)} standard errors; give one of each for every row"
            )
        if not len(self.squares):  # one made by hand: nothing is said of the bias's spread
            errors = [*self.standard_error.tolist(), torch.nan, self.logit_standard_error]
            for name in self._halves():
                errors += self.beside[f"{name}{_ERROR}"].tolist()
            error = torch.tensor(errors, dtype=torch.float64, device="cpu")
            self.squares = error.square() * self.n * (self.n - 1)
            if self.n == 1:
                self.squares.zero_()
        if len(self.squares) != (n_squares := len(self.labels) * (1 + len(self._halves())) + 2):
            raise InputError(
                f"squares has {len(self.squares)} numbers, where {len(self.labels)} rows"
                f"{', their halves' * self.compared}, the bias and the logit have {n_squares}"
            )

    @classmethod
    def empty(cls, n_failed: int = 0) -> Summary:
        """The summary of no result, to begin merging with, or for prompts that all failed."""
        nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
        nan = float("nan")
        return cls([], "", nothing, nothing, 0, n_failed, nan, nan, nan)

    @classmethod
    def of_moments(
        cls, moments: Moments, subject: Subject, *, n_failed: int, model: str
    ) -> Summary:
        """The summary of samples.

        Args:
            moments: of each row, then of the bias and the logit; of comparisons then of what was
                written by each row, and of what was read.
            subject: what they are about.
            n_failed: see :class:`Summary`.
            model: see :class:`Summary`.
        """
        n, error = len(subject.labels), moments.standard_error()
        beside = dict[str, Tensor]()
        if subject.compared:
            for place, name in enumerate(HALVES, start=1):
                own = slice(place * n + 2, (place + 1) * n + 2)
                beside |= {name: moments.mean[own], f"{name}{_ERROR}": error[own]}
        return cls(
            **vars(subject),
            mean=moments.mean[:n],
            standard_error=error[:n],
            n=moments.n,
            n_failed=n_failed,
            bias=float(moments.mean[n]),
            logit=float(moments.mean[n + 1]),
            logit_standard_error=float(error[n + 1]),
            model=model,
            squares=moments.squares,
            beside=beside,
        )

    def merge(self, other: Summary) -> Summary:
        """The summary of the prompts of both, as if they had been summarized at once.

        However a data set is split, and in whatever order its parts are merged, means and
        standard errors are the same up to rounding. Neither of the two is changed.

        Example:
            >>> import functools, torch
            >>> from dla_hooks import DirectLogitAttribution, Summary, summarize
            >>> def one(value):
            ...     numbers = torch.tensor([value])
            ...     return DirectLogitAttribution(
            ...         numbers[None], ["embed"], "component", 0 * numbers, numbers, 0.0
            ...     )
            >>> shards = [summarize([one(1.0), one(2.0)]), summarize([one(6.0)])]
            >>> whole = functools.reduce(Summary.merge, shards, Summary.empty())
            >>> whole.n, float(whole.mean[0])
            (3, 3.0)

        Raises:
            ArgumentTypeError: when ``other`` is no summary.
            InputError: when the two differ in unit, labels, or in being differences.
        """
        if not isinstance(other, Summary):
            raise ArgumentTypeError(
                f"a Summary can be merged with another Summary only, got {type(other).__name__}; "
                "summarize([…]) makes one of results"
            )
        n_failed = self.n_failed + other.n_failed
        if not (self.n and other.n):
            some = self if self.n else other
            return Summary(**{**vars(some), "n_failed": n_failed})
        different = mismatch(other._subject(), self._subject())
        if different:
            raise InputError(f"summaries cannot be merged: the second's {different}")
        model = self.model if self.model == other.model else ""
        moments = self._moments().merged(other._moments())
        return Summary.of_moments(moments, self._subject(), n_failed=n_failed, model=model)

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` rows that push the logit up the most: ``(label, mean)``, largest first.

        Args:
            k: how many; no more than there are rows.
        """
        return most_extreme(self.rows, self.mean, k, largest=True)

    def bottom(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` rows that push the logit down the most, most negative first."""
        return most_extreme(self.rows, self.mean, k, largest=False)

    def to_dataframe(self) -> pandas.DataFrame:
        """One line per row (extra ``pandas``).

        Returns:
            Columns ``label``, ``kind``, ``layer``, ``sub`` and ``head`` (as in
            :meth:`DirectLogitAttribution.to_dataframe`), ``mean``, ``standard_error``, for
            comparisons ``written``, ``written_standard_error``, ``read`` and
            ``read_standard_error``, and ``n``.

        Raises:
            MissingExtraError: when pandas is not installed.
        """
        columns = (*table.row_columns(self.words), "mean", "standard_error", *self.beside, "n")
        return table.frame(self.records(), columns)

    def records(self) -> list[dict[str, Any]]:
        """The lines of :meth:`to_dataframe`, as dictionaries."""
        columns = {"mean": self.mean, "standard_error": self.standard_error, **self.beside}
        numbers = zip(*(column.tolist() for column in columns.values()), strict=True)
        lines = []
        for row, of_row in zip(self.rows, numbers, strict=True):
            own = dict(zip(columns, of_row, strict=True))
            lines.append({**table.describe(row, self.words), **own, "n": self.n})
        return lines

    def _subject(self) -> Subject:
        own = self.unit, self.labels, self.difference, self.rows, self.words, self.softcap
        return Subject(*own, self.compared, self.contrast)

    def _halves(self) -> tuple[str, ...]:
        return HALVES if self.compared else ()

    def _moments(self) -> Moments:
        rest = torch.tensor([self.bias, self.logit], dtype=torch.float64, device="cpu")
        halves = (self.beside[name].double() for name in self._halves())
        return Moments(self.n, torch.cat([self.mean.double(), rest, *halves]), self.squares)

    def plot(
        self,
        kind: str | None = None,
        *,
        rows: int | Sequence[str] | None = None,
        sort: str | None = None,
        title: str | None = None,
        width: float | None = None,
        height: float | None = None,
    ) -> Picture:
        """A picture of the means, with error bars where they are bars or a line.

        Args:
            kind: ``"bars"``, ``"line"`` or ``"heatmap"`` of layer by index, which has no error
                bars; None is what the unit says.
            rows: how many, the strongest; or a list of labels; None is all, or the strongest where
                they are too many.
            sort: ``"size"``, by value, or ``"stream"``, in the order of the model.
            title: in place of the heading.
            width: of the picture, in pixels.
            height: of what is below the heading, in pixels.

        Raises:
            InputError: when there is nothing to draw, or for an argument without meaning.
            LabelError: (a KeyError) for a label that no row has.
        """
        return summary_plot.plot(
            self._means(), self.standard_error, self._says(), kind=kind, rows=rows, sort=sort,
            title=title, width=width, height=height,
        )  # fmt: skip

    def _says(self) -> str:
        failed = f" ({self.n_failed} {'more ' * (self.n > 0)}failed)" if self.n_failed else ""
        kind = "prompt" if self.contrast is None else "pair"
        of = "" if self.contrast is None else f", {self.contrast}"
        return f"mean over {self.n} {kind}{'s' * (self.n != 1)}{of}{failed}"

    def _means(self) -> ResultData:
        means = ResultData(
            attribution=self.mean[:, None],
            labels=self.labels,
            unit=self.unit,
            bias=torch.tensor([self.bias], dtype=torch.float64, device="cpu"),
            logit=torch.tensor([self.logit], dtype=torch.float64, device="cpu"),
            gap=float("nan"),
            incorrect=[] if self.difference else None,
            model=self.model,
            softcap=self.softcap,
            rows=self.rows,
            words=self.words,
        )
        means.compared = self.compared
        return means

    def __repr__(self) -> str:
        text = means_as_text(self._means(), self.standard_error, self.n, self.n_failed)
        return text if self.contrast is None else f"paired: {self.contrast}\n{text}"

    def _repr_html_(self) -> str:
        return means_as_html(self._means(), self.standard_error, self.n, self.n_failed)


Summary.__module__ = "dla_hooks"
Summary.form = files.SUMMARY
