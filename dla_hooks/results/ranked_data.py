"""The fields of a ranked result: the strongest rows at each entry, and arithmetic on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.results.data import EntryData, RowMeans, entry_mean, no_positions, real_entries
from dla_hooks.results.row_runs import RowRuns
from dla_hooks.results.rows import Row, Words
from dla_hooks.results.seen import Seen
from dla_hooks.results.wording import quoted

_MOST_SHOWN = 100


@dataclass(repr=False, eq=False)
class RankedData(EntryData):
    """The strongest rows of every entry, without any view.

    Raises:
        InputError: when the numbers do not fit each other.
    """

    attribution: Tensor  # [top, *batch_and_pos]
    index: Tensor  # [top, *batch_and_pos]
    rows: Sequence[Row]
    unit: str
    rest: Tensor  # [*batch_and_pos]
    remainder: Tensor  # [*batch_and_pos]
    bias: Tensor
    logit: Tensor
    gap: float
    words: Words
    prompt_means: Tensor | None = None  # [row, batch]
    logit_gap: float = float("nan")
    positions: Tensor = field(default_factory=no_positions)
    tokens: list[list[str]] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    incorrect: list[str] | None = None
    model: str = ""
    softcap: float | None = None
    target: Tensor | None = None
    beside: dict[str, Tensor] = field(default_factory=dict)
    generated: list[list[str]] | None = None
    generated_ids: Tensor | None = None
    reading: str | None = None
    seen: Seen | None = None
    several: bool = False
    encoder_tokens: list[list[str]] = field(default_factory=list)
    keeps_some = True

    def __post_init__(self) -> None:
        if self.index.shape != self.attribution.shape or self.rest.shape != self.shape:
            raise InputError(
                f"attribution has shape {list(self.attribution.shape)}, index "
                f"{list(self.index.shape)} and rest {list(self.rest.shape)}; give one row number "
                "for each value, and one rest for each entry"
            )
        self._check_target()

    @property
    def mean_rows(self) -> Tensor | None:
        """Every row's mean over batch and positions, padding left out [all rows]."""
        if self.prompt_means is None:
            return None
        if self.prompt_means.shape[1] == 1:
            return self.prompt_means[:, 0]
        valid = real_entries(self)[0].reshape(self.prompt_means.shape[1], -1)
        n_B = valid.sum(1).to(self.prompt_means)
        return (self.prompt_means.nan_to_num() * n_B).sum(1) / n_B.sum()

    def total(self) -> Tensor:
        """All rows and the remainder [*batch_and_pos]; with the bias it is the logit."""
        return self.attribution.sum(0) + self.rest + self.remainder

    def row_means(self) -> RowMeans:
        """The rows with the largest and the smallest means, and all others in one.

        Where a row does not mean the same at each entry, a mean is over the entries where the row
        is kept, divided by the number of all; the others hold what it is elsewhere.
        """
        means = self.mean_rows
        if means is None:
            numbers, values = self.kept_means()
        else:
            n = min(max(len(self.attribution), _MOST_SHOWN), len(means))
            known = means.nan_to_num(nan=0.0)
            ends = [order.topk(n).indices for order in (known, -known)]
            numbers = torch.cat(ends).unique()
            values = means[numbers]
        remainder = entry_mean(self.remainder)
        beyond = entry_mean(self.total()) - remainder - float(values.double().sum())
        pairs = zip(numbers.tolist(), values.tolist(), strict=True)
        rows = [(self.named(self.rows[number]), value) for number, value in pairs]
        n_beyond = len(self.rows) - len(rows)
        rows.append((Row(self.words.remainder, self.words.remainder), remainder))
        return RowMeans(rows, n_beyond, beyond if n_beyond else 0.0)

    def at(self, place: tuple[slice | int, ...]) -> Self:
        """The same at a place of the batch and the positions."""
        part = super().at(place)
        part.index = self.index[(slice(None), *place)]
        part.rest, part.remainder = self.rest[place], self.remainder[place]
        if part.prompt_means is not None and place:
            rows, *positions = place
            n_prompts = part.prompt_means.shape[1]
            whole = positions in ([], [slice(None)]) or self.shape[1:] == part.shape[1:]
            fits = isinstance(rows, slice) and n_prompts == self.shape[0]
            part.prompt_means = part.prompt_means[:, rows] if whole and fits else None
        return part

    def of_row(self, row: int) -> None:
        """Leave out what an encoder read for other rows."""
        self.encoder_tokens = self.encoder_tokens[row : row + 1]

    def of_tokens(self, n: int) -> None:
        """Leave out the rows that read tokens which a prompt of ``n`` tokens does not have."""
        if not isinstance(self.rows, RowRuns) or (rows := self.rows.of_tokens(n)) == self.rows:
            return
        device = self.index.device
        starts, fewer = (torch.tensor(of.starts, device=device) for of in (self.rows, rows))
        run = (torch.searchsorted(starts, self.index.contiguous(), right=True) - 1).clamp(min=0)
        moved = self.index + (fewer - starts)[run]
        self.index = torch.where(self.index < 0, self.index, moved)[: len(rows)]
        self.attribution, self.rows = self.attribution[: len(rows)], rows
        self.beside = {name: own[: len(rows)] for name, own in self.beside.items()}

    def row_label(self, number: int) -> str:
        """The label that a row is shown with."""
        return self.named(self.rows[number]).label

    def named(self, row: Row) -> Row:
        """The row, with the token that it reads behind its label, where there is one prompt."""
        if row.source is None or len(self.tokens) != 1:
            return row
        return replace(row, label=f"{row.label} {quoted(self, self.source_token(row, 0))}")

    def source_token(self, row: Row, prompt: int) -> str:
        """The token that a row reads in one prompt; a frame's number, where it is no token."""
        assert row.source is not None
        if not row.reads_encoder:
            return self.tokens[prompt][row.source]
        if not self.encoder_tokens:
            return f"<frame {row.source}>"
        return self.encoder_tokens[prompt][row.source]

    def kept_means(self) -> tuple[Tensor, Tensor]:
        """The rows that are kept at some entry, and their sums there over all entries' number."""
        there = self.index >= 0
        numbers, place = self.index[there].unique(return_inverse=True)
        sums = self.attribution.new_zeros(len(numbers)).index_add_(
            0, place, self.attribution[there]
        )
        return numbers, sums / max(1, int(real_entries(self)[0].sum()))


def number_of(rows: Sequence[Row], label: str) -> int | None:
    """The number of the row with a label, or None."""
    if isinstance(rows, RowRuns):
        return rows.number_of(label)
    return next((number for number, row in enumerate(rows) if row.label == label), None)
