"""The fields of a result, and arithmetic on them. The views take these classes, and nothing above.

The fields are the schema of every file format, too: :mod:`dla_hooks.results.schema` reads them
off them. What they mean stands at :class:`dla_hooks.DirectLogitAttribution`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.results.rows import NO_WORDS, Row, Words, filled
from dla_hooks.results.seen import Seen
from dla_hooks.results.where import Located


@dataclass(frozen=True)
class RowMeans:
    """Rows of a result, each as its mean over batch and positions.

    Attributes:
        rows: in the order of the result.
        n_beyond: how many more rows there are, which come as one number.
        beyond: that number.
    """

    rows: list[tuple[Row, float]]
    n_beyond: int = 0
    beyond: float = 0.0


class EntryData(Located):
    """What all results have: numbers of entries, of which some belong to rows.

    Its fields are those that the dataclasses below have in common.
    """

    attribution: Tensor  # [row or place, *batch_and_pos]
    unit: str
    bias: Tensor  # [*batch_and_pos]
    logit: Tensor  # [*batch_and_pos]
    gap: float
    logit_gap: float
    positions: Tensor  # [*batch_and_pos]
    tokens: list[list[str]]
    answer: list[str]
    incorrect: list[str] | None
    model: str
    softcap: float | None
    rows: Sequence[Row]
    words: Words
    target: Tensor | None  # [*batch_and_pos]
    beside: dict[str, Tensor]  # each like attribution
    generated: list[list[str]] | None = None
    generated_ids: Tensor | None = None  # [batch, new token]
    reading: str | None = None
    seen: Seen | None
    several: bool
    keeps_some = False  # whether there are more rows than are kept
    compared: bool = False  # whether the numbers are differences of two runs

    @property
    def shape(self) -> torch.Size:
        """The axes of the entries: ``[batch]`` or ``[batch, pos']``, and one of several answers."""
        return self.attribution.shape[1:]

    def total(self) -> Tensor:
        """The whole that the rows make up [*batch_and_pos]; with the bias it is the logit."""
        raise NotImplementedError(f"{type(self).__name__} must sum its rows")

    def row_means(self) -> RowMeans:
        """The rows to show, each as its mean over batch and positions, padding left out."""
        raise NotImplementedError(f"{type(self).__name__} must say which rows are shown")

    def at(self, place: tuple[slice | int, ...]) -> Self:
        """The same at a place of the batch and the positions; views, where these are kept."""
        part = copy.copy(self)
        part.attribution = self.attribution[(slice(None), *place)]
        part.bias, part.logit = self.bias[place], self.logit[place]
        if self.positions.shape == self.shape:
            part.positions = self.positions[place]
        if self.target is not None:
            part.target = self.target[place]
        part.beside = {name: own[(slice(None), *place)] for name, own in self.beside.items()}
        if self.seen is not None:
            part.seen = self.seen.at(place)
        return part

    def of_row(self, row: int) -> None:
        """Leave out what belongs to other rows of the batch, besides numbers and tokens."""

    def of_tokens(self, n: int) -> None:
        """Leave out what a prompt of ``n`` tokens does not have; here nothing."""

    def _check_target(self) -> None:
        if self.target is not None and self.target.shape != self.shape:
            raise InputError(
                f"target has shape {list(self.target.shape)}, and the result's entries have "
                f"{list(self.shape)}; give one index into answer for each entry"
            )


def no_positions() -> Tensor:
    """The positions of a result that does not say them."""
    return torch.zeros(0, dtype=torch.long, device="cpu")


@dataclass(repr=False, eq=False)
class ResultData(EntryData):
    """Numbers with labels, without any view.

    Raises:
        InputError: when labels, rows or targets do not fit the numbers.
    """

    attribution: Tensor  # [row, *batch_and_pos]
    labels: list[str]
    unit: str
    bias: Tensor
    logit: Tensor
    gap: float
    logit_gap: float = float("nan")
    positions: Tensor = field(default_factory=no_positions)
    tokens: list[list[str]] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    incorrect: list[str] | None = None
    model: str = ""
    softcap: float | None = None
    rows: Sequence[Row] = field(default_factory=list)
    words: Words = NO_WORDS
    target: Tensor | None = None
    beside: dict[str, Tensor] = field(default_factory=dict)
    generated: list[list[str]] | None = None
    generated_ids: Tensor | None = None
    reading: str | None = None
    seen: Seen | None = None
    several: bool = False

    def __post_init__(self) -> None:
        self.rows, self.words = filled(self.labels, self.unit, list(self.rows), self.words)
        n_rows = self.attribution.shape[0] if self.attribution.ndim else 0
        if n_rows != len(self.labels):
            raise InputError(
                f"attribution has {n_rows} rows, and there are {len(self.labels)} labels; give "
                "one label for each row"
            )
        self._check_target()

    def mean(self) -> Tensor:
        """Each row's mean over batch and positions, padding left out [row]."""
        return self.attribution.reshape(len(self.labels), self.shape.numel()).nanmean(-1)

    def row_means(self) -> RowMeans:
        """Every row with its mean."""
        return RowMeans(list(zip(self.rows, self.mean().tolist(), strict=True)))

    def total(self) -> Tensor:
        """The whole that the rows make up [*batch_and_pos]; with the bias it is the logit.

        Their sum, or for running sums the last one.
        """
        if self.words.cumulative and self.labels:
            return self.attribution[-1]
        return self.attribution.sum(0)


def real_entries(data: EntryData) -> tuple[Tensor, Tensor]:
    """The entries that are no padding, and whose row each belongs to, both [*batch_and_pos].

    One prompt may have several entries at one position: one for each answer.
    """
    if located(data):
        valid = data.positions >= 0
    else:  # padding has a number in no row
        valid = ~(data.attribution if len(data.attribution) else data.logit[None]).isnan().all(0)
    ones = valid.new_ones(data.shape).long()
    return valid, ones.cumsum(0) - 1 if len(data.tokens) > 1 else ones - 1


def located(data: EntryData) -> bool:
    """Whether the result says which tokens it is about (one made by hand need not)."""
    return bool(data.tokens) and data.positions.shape == data.shape


def entry_mean(values: Tensor) -> float:
    """The mean over batch and positions, padding left out."""
    return float(values.double().nanmean())


def names_of_entries(data: EntryData, names: list[str] | None) -> list[str | None]:
    """The name of every entry, flattened, padding included; None where it is unknown.

    Args:
        data: any.
        names: its ``answer`` or ``incorrect``.
    """
    if not names:
        return [None] * data.shape.numel()
    index = data.target
    if index is None:
        index = _laid_out(len(names), data.shape)
    if index is None:
        return [None] * data.shape.numel()
    known = range(len(names))  # at padding any index may stand
    return [names[i] if i in known else None for i in index.flatten().tolist()]


def _laid_out(n_names: int, shape: torch.Size) -> Tensor | None:
    """The index of names that were not indexed, by the rule that answers are laid out with.

    One name belongs to all entries; as many names as entries are in their order. Otherwise there
    is one for each entry of the first axis that has as many: rows come before positions.
    """
    if n_names == 1:
        return torch.zeros(shape, dtype=torch.long, device="cpu")
    if n_names == shape.numel():
        return torch.arange(n_names, device="cpu").reshape(shape)
    for axis, size in enumerate(shape):
        if size == n_names:
            own = [1] * len(shape)
            own[axis] = size
            return torch.arange(n_names, device="cpu").reshape(own).expand(shape)
    return None


def most_extreme(
    rows: Sequence[Row], means: Tensor, k: int, *, largest: bool
) -> list[tuple[str, float]]:
    """The ``k`` largest or smallest of the rows' values, the most extreme first.

    Raises:
        InputError: when ``k`` is no int, or negative.
    """
    count = checked_count(k)
    last = -torch.inf if largest else torch.inf  # what has no value is ranked behind all else
    order = means.nan_to_num(nan=last, posinf=torch.inf, neginf=-torch.inf)
    found = order.topk(min(count, len(rows)), largest=largest).indices
    pairs = zip(found.tolist(), means[found].tolist(), strict=True)
    return [(rows[row].label, value) for row, value in pairs]


def checked_count(k: Any) -> int:
    """How many of something are asked for.

    Raises:
        InputError: when ``k`` is no int, or negative.
    """
    count = operator.index(k) if hasattr(k, "__index__") and not isinstance(k, bool) else -1
    if count < 0:
        raise InputError(f"k must be an int that is not negative, got {k!r}")
    return count
