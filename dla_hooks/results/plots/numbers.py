"""The numbers of rows at lines of entries, as every kind of picture takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dla_hooks.errors import InputError, LabelError
from dla_hooks.results.data import EntryData, ResultData, real_entries
from dla_hooks.results.parts import unknown_label
from dla_hooks.results.plots.lines import Line
from dla_hooks.results.ranked_data import RankedData
from dla_hooks.results.rows import Row


@dataclass(frozen=True)
class Numbers:
    """Rows at lines; all in float64.

    Attributes:
        rows: a record of each row.
        labels: what each is called in a picture.
        values: [row, line]; NaN where a row is not kept.
        others: what rows that are not among these add up to [line].
        n_others: how many these are; 0 for none.
        remainder: what is no row of the unit [line], or None.
        bias: [line].
        logit: [line].
        errors: half an error bar of each value [row, line], or None.
    """

    rows: list[Row]
    labels: list[str]
    values: Tensor
    others: Tensor
    n_others: int
    remainder: Tensor | None
    bias: Tensor
    logit: Tensor
    errors: Tensor | None = None

    def strength(self) -> Tensor:
        """The largest absolute value of each row [row]; -1 where it has none."""
        return self.values.abs().nan_to_num(nan=-1.0, posinf=-1.0).amax(1)

    def of(self, chosen: Sequence[int]) -> Numbers:
        """The rows with these numbers, in this order; all others in one number."""
        out = torch.ones(len(self.rows), dtype=torch.bool, device="cpu")
        out[list(chosen)] = False
        others = self.others + self.values[out].nan_to_num().sum(0)
        return replace(
            self,
            rows=[self.rows[i] for i in chosen],
            labels=[self.labels[i] for i in chosen],
            values=self.values[list(chosen)],
            errors=None if self.errors is None else self.errors[list(chosen)],
            others=others,
            n_others=self.n_others + int(out.sum()),
        )

    def strongest(self, n: int) -> Numbers:
        """The ``n`` strongest rows, in their order."""
        if n >= len(self.rows):
            return self
        return self.of(sorted(self.strength().topk(n).indices.tolist()))

    def named(self, labels: Sequence[str], unit: str) -> Numbers:
        """The rows with these labels.

        Raises:
            LabelError: (a KeyError) for a label that no row has.
        """
        numbers = {row.label: i for i, row in enumerate(self.rows)}
        for label in labels:
            if label not in numbers:
                raise unknown(unit, label, list(numbers))
        return self.of([numbers[label] for label in labels])

    def mean(self, spread: str) -> Numbers:
        """All lines as one.

        Args:
            spread: ``"error"`` of the mean, or the values' own ``"deviation"``.
        """
        n = self.values.shape[1]
        errors = None
        if n > 1:
            errors = self.values.std(1, keepdim=True)
            errors = errors / n**0.5 if spread == "error" else errors
        return replace(
            self,
            values=self.values.mean(1, keepdim=True),
            errors=errors,
            others=self.others.mean(0, keepdim=True),
            remainder=None if self.remainder is None else self.remainder.mean(0, keepdim=True),
            bias=self.bias.mean(0, keepdim=True),
            logit=self.logit.mean(0, keepdim=True),
        )


def unknown(unit: str, label: str, labels: list[str]) -> LabelError:
    """The error for a label that no row has."""
    return unknown_label(unit, label, labels, "result.rows")


def numbers_of(data: EntryData, lines: Sequence[Line]) -> Numbers:
    """The rows of a result at some lines; a line of several entries as their mean.

    Raises:
        InputError: for means of rows that are only kept at some entries.
    """
    if isinstance(data, RankedData):
        return _ranked(data, lines)
    assert isinstance(data, ResultData)
    values = torch.stack([_flat(data.attribution, line) for line in lines], 1)
    kept = [i for i, row in enumerate(data.rows) if row.label != data.words.remainder]
    rest = [i for i in range(len(data.rows)) if i not in set(kept)]
    return Numbers(
        rows=[data.rows[i] for i in kept],
        labels=[data.rows[i].label for i in kept],
        values=values[kept],
        others=values.new_zeros(len(lines)),
        n_others=0,
        remainder=values[rest].sum(0) if rest else None,
        bias=_each(data.bias, lines),
        logit=_each(data.logit, lines),
    )


def _flat(numbers: Tensor, line: Line) -> Tensor:
    """The mean of [row, *batch_and_pos] over a line's entries [row]."""
    flat = numbers.detach().cpu().double().reshape(len(numbers), -1)
    return flat[:, list(line.flats)].mean(1)


def _each(numbers: Tensor, lines: Sequence[Line]) -> Tensor:
    """The same of [*batch_and_pos], for each line [line]."""
    return torch.cat([_flat(numbers[None], line) for line in lines])


def _ranked(data: RankedData, lines: Sequence[Line]) -> Numbers:
    remainder, total = _each(data.remainder, lines), _each(data.total(), lines)
    found = _kept(data, lines)
    numbers = sorted({number for one in found for number in one})
    place = {number: i for i, number in enumerate(numbers)}
    values = torch.full((len(numbers), len(lines)), torch.nan, dtype=torch.float64, device="cpu")
    for j, one in enumerate(found):
        values[[place[number] for number in one], j] = torch.tensor(
            list(one.values()), dtype=torch.float64, device="cpu"
        )
    rows = [data.rows[number] for number in numbers]
    return Numbers(
        rows=rows,
        labels=[data.named(row).label for row in rows],
        values=values,
        others=total - remainder - values.nan_to_num().sum(0),
        n_others=len(data.rows) - len(numbers),
        remainder=remainder,
        bias=_each(data.bias, lines),
        logit=_each(data.logit, lines),
    )


def _kept(data: RankedData, lines: Sequence[Line]) -> list[dict[int, float]]:
    """The rows that each line knows: those kept at its entry, or all means of its prompt."""
    index, values = (
        each.cpu().reshape(len(each), -1).T.tolist() for each in (data.index, data.attribution)
    )
    valid, row_of = real_entries(data)
    n_of = row_of[valid].bincount().tolist()
    found = []
    for line in lines:
        if len(line.flats) == 1:
            pairs = zip(index[line.flats[0]], values[line.flats[0]], strict=True)
            found.append({number: value for number, value in pairs if number >= 0})
            continue
        means = data.prompt_means
        if means is None or len(line.flats) != n_of[line.row] or line.row >= means.shape[1]:
            raise no_means(data)
        found.append(dict(enumerate(means[:, line.row].cpu().double().tolist())))
    return found


def no_means(data: EntryData) -> InputError:
    """The error for means of rows that are known at some entries only."""
    return InputError(
        f"a {data.unit} result keeps the strongest rows of each entry, which have no means over "
        "these; draw one entry, with prompt=… and pos=…"
    )
