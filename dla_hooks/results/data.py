"""The fields of a result, and arithmetic on them. The views take this class, and nothing above it.

The fields are the schema of every file format, too: :mod:`dla_hooks.results.schema` reads them
off this class. What they mean stands at :class:`dla_hooks.DirectLogitAttribution`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.results.rows import NO_WORDS, Row, Words, filled


@dataclass(repr=False, eq=False)
class ResultData:
    """Numbers with labels, without any view.

    Raises:
        InputError: when labels, rows or targets do not fit the numbers.
    """

    attribution: Tensor  # [row, *batch_and_pos]
    labels: list[str]
    unit: str
    bias: Tensor  # [*batch_and_pos]
    logit: Tensor  # [*batch_and_pos]
    gap: float
    logit_gap: float = float("nan")
    positions: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.long, device="cpu")
    )
    tokens: list[list[str]] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    incorrect: list[str] | None = None
    model: str = ""
    softcap: float | None = None
    rows: list[Row] = field(default_factory=list)
    words: Words = NO_WORDS
    target: Tensor | None = None  # [*batch_and_pos]

    def __post_init__(self) -> None:
        self.rows, self.words = filled(self.labels, self.unit, self.rows, self.words)
        n_rows = self.attribution.shape[0] if self.attribution.ndim else 0
        if n_rows != len(self.labels):
            raise InputError(
                f"attribution has {n_rows} rows, and there are {len(self.labels)} labels; give "
                "one label for each row"
            )
        if self.target is not None and self.target.shape != self.shape:
            raise InputError(
                f"target has shape {list(self.target.shape)}, and the result's entries have "
                f"{list(self.shape)}; give one index into answer for each entry"
            )

    @property
    def shape(self) -> torch.Size:
        """The axes of the entries: ``[batch]`` or ``[batch, pos']``."""
        return self.attribution.shape[1:]

    def mean(self) -> Tensor:
        """Each row's mean over batch and positions, padding left out [row]."""
        return self.attribution.reshape(len(self.labels), self.shape.numel()).nanmean(-1)

    def total(self) -> Tensor:
        """The whole that the rows make up [*batch_and_pos]; with the bias it is the logit.

        Their sum, or for running sums the last one.
        """
        if self.words.cumulative and self.labels:
            return self.attribution[-1]
        return self.attribution.sum(0)


def real_entries(data: ResultData) -> tuple[Tensor, Tensor]:
    """The entries that are no padding, and whose row each belongs to, both [*batch_and_pos].

    One prompt may have several entries at one position: one for each answer.
    """
    if located(data):
        valid = data.positions >= 0
    else:  # padding has a number in no row
        valid = ~(data.attribution if data.labels else data.logit[None]).isnan().all(0)
    ones = valid.new_ones(data.shape).long()
    return valid, ones.cumsum(0) - 1 if len(data.tokens) > 1 else ones - 1


def located(data: ResultData) -> bool:
    """Whether the result says which tokens it is about (one made by hand need not)."""
    return bool(data.tokens) and data.positions.shape == data.shape


def entry_mean(values: Tensor) -> float:
    """The mean over batch and positions, padding left out."""
    return float(values.double().nanmean())


def names_of_entries(data: ResultData, names: list[str] | None) -> list[str | None]:
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


def ranked(labels: list[str], means: Tensor, k: int, *, largest: bool) -> list[tuple[str, float]]:
    """The ``k`` largest or smallest of labelled values, the most extreme first.

    Raises:
        InputError: when ``k`` is no int, or negative.
    """
    count = operator.index(k) if hasattr(k, "__index__") and not isinstance(k, bool) else -1
    if count < 0:
        raise InputError(f"k must be an int that is not negative, got {k!r}")
    last = -torch.inf if largest else torch.inf  # what has no value is ranked behind all else
    order = means.nan_to_num(nan=last, posinf=torch.inf, neginf=-torch.inf)
    rows = order.topk(min(count, len(labels)), largest=largest).indices
    values = means[rows]
    return [(labels[row], value) for row, value in zip(rows.tolist(), values.tolist(), strict=True)]
