"""The result of a unit that has too many rows to keep: the strongest at each entry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.results import files, parts, table
from dla_hooks.results.data import most_extreme
from dla_hooks.results.ranked_data import RankedData, number_of
from dla_hooks.results.result import DirectLogitAttribution
from dla_hooks.results.rows import Row
from dla_hooks.results.views import Views

REST, REMAINDER = "rest", "remainder"


class RankedAttribution(RankedData, Views):
    """Who wrote a logit, or a difference of logits: the strongest of many rows at each entry.

    ``attribution.sum(0) + rest + remainder + bias == logit``, to within ``gap``.

    ``result["L3N17"]`` is one row [*batch_and_pos], NaN where it is not among the strongest. A loop
    over the result gives pairs of a :class:`Row` record and these numbers, for each row that is
    kept at some entry; ``len(result)`` counts them.

    Example:
        >>> import torch
        >>> from dla_hooks import RankedAttribution
        >>> from dla_hooks.results.row_runs import RowRuns, Run
        >>> from dla_hooks.results.rows import Words
        >>> result = RankedAttribution(
        ...     attribution=torch.tensor([[2.0], [-1.0]]),
        ...     index=torch.tensor([[17], [4]]),
        ...     rows=RowRuns([Run("L0N{}", "neuron", 0, 0, n=64)]),
        ...     unit="neuron",
        ...     rest=torch.tensor([0.5]),
        ...     remainder=torch.tensor([3.0]),
        ...     bias=torch.tensor([0.25]),
        ...     logit=torch.tensor([4.75]),
        ...     gap=0.0,
        ...     words=Words("neuron", "Neurons", "neurons", "neuron", remainder="remainder"),
        ... )
        >>> result.top(1), result["L0N4"]
        ([('L0N17', 2.0)], tensor([-1.]))
        >>> [record["label"] for record in result.records()]
        ['L0N17', 'L0N4', 'rest', 'remainder']

    Attributes:
        attribution: [top, *batch_and_pos], the largest absolute value first; NaN at padding.
        index: the number in ``rows`` of each of them, the same shape; -1, with the value 0, where
            an entry has fewer rows than places, and at padding.
        rows: a record of every row that there is, made when looked at: label, kind, layer, sub,
            index, source.
        unit: the name of the unit that made the rows.
        rest: what the rows that are not kept add up to [*batch_and_pos].
        remainder: what belongs to no row of this unit [*batch_and_pos].
        bias: what the logit has besides the stream [*batch_and_pos].
        logit: the logit (or difference), before any softcap [*batch_and_pos].
        gap: the largest difference between the parts' sum and the stream's own projection.
        words: what the unit says of its rows.
        prompt_means: every row's mean over the entries of each prompt [all rows, batch]; None where
            rows do not mean the same at each entry, or would be too many numbers. ``mean_rows``
            is their mean over all entries [all rows].
        logit_gap: see :class:`DirectLogitAttribution`; so are all others.
        positions: which token of its row each entry belongs to.
        tokens: the tokens of each row.
        answer: the answer's text.
        incorrect: the same for the incorrect tokens, or None.
        model: the model's class and type.
        softcap: the cap that the model puts on its logits, or None.
        target: which of ``answer`` each entry is about, or None.
        beside: further numbers of each kept row, by name, each like ``attribution``.
        generated: of :func:`attribute_generation`, the new tokens of each row, as text; else None.
        generated_ids: the same as ids [batch, new token], as the model's ``generate`` gives them.
        reading: what was read, where that is no logit (:class:`Direction`); else None. ``logit`` is
            then the value that was read.
        seen: what the model's own logits say of the answers, or None.
        several: whether the last axis holds several answers to one prompt.
        encoder_tokens: of an encoder-decoder, the tokens that the encoder read, for rows that read
            these (``L3X0<7``); empty where it read no tokens.
    """

    __module__ = "dla_hooks"
    form = files.RANKED

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` rows that push the logit up the most: ``(label, mean value)``, largest first.

        Ranked are all rows by ``mean_rows``; at a single entry without it, the rows that are kept.

        Args:
            k: how many; no more than there are rows.

        Raises:
            InputError: when ``k`` is no int, or negative; or for several entries whose means are
                not there.
        """
        return self._extreme(k, largest=True)

    def bottom(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` rows that push the logit down the most, most negative first."""
        return self._extreme(k, largest=False)

    def summed(self) -> RankedAttribution:
        """Refused: which rows are kept differs from position to position.

        Raises:
            InputError: always; it says what to do.
        """
        raise InputError(
            f"a {self.unit} result keeps the strongest rows of each position, and their sums would "
            'miss what is not kept; sum a unit that keeps every row, as "component" or "head"'
        )

    def records(self) -> list[dict[str, Any]]:
        """One dictionary per entry and kept row, ``rest`` and ``remainder`` last; see the columns
        of :meth:`to_dataframe`."""
        numbers, lines = table.numbers_of(self), []
        index = self.index.reshape(len(self.index), self.shape.numel()).tolist()
        last = {REST: self.rest.flatten().tolist(), REMAINDER: self.remainder.flatten().tolist()}
        nothing = dict.fromkeys(table.columns(self.words))
        for flat, entry in table.entries(self):
            for place, own in enumerate(index):
                if own[flat] >= 0:
                    row = self.rows[own[flat]]
                    line = {**nothing, **table.describe(row, self.words), **entry}
                    if row.source is not None and self.tokens:
                        line["source_token"] = self.source_token(row, entry["row"])
                    of_row = {name: values[place][flat] for name, values in numbers.items()}
                    lines.append({**line, **of_row})
            for label, values in last.items():
                line = {**nothing, "label": label, "kind": label, **entry}
                lines.append({**line, "attribution": values[flat]})
        return lines

    def __getitem__(self, label: str) -> Tensor:
        """The numbers [*batch_and_pos] of one row; NaN where it is not among the strongest.

        Raises:
            LabelError: (a KeyError) for a label that no row has; it names those most like it.
            ArgumentTypeError: for what is no string.
        """
        parts.check_label(label, self.rows[0].label if self.rows else "L0N0")
        number = number_of(self.rows, label)
        if number is None:
            raise parts.unknown_label(self.unit, label, self._kept_labels(), "result.rows")
        return self._numbers(number)

    def __contains__(self, label: object) -> bool:
        return isinstance(label, str) and number_of(self.rows, label) is not None

    def __len__(self) -> int:
        return len(self._kept())

    def __iter__(self) -> Iterator[tuple[Row, Tensor]]:
        """Each kept row's record with its numbers [*batch_and_pos]."""
        return ((self.rows[number], self._numbers(number)) for number in self._kept())

    def _numbers(self, number: int) -> Tensor:
        there = self.index == number
        values = self.attribution.masked_fill(~there, 0).sum(0)
        return values.masked_fill(~there.any(0), torch.nan)

    def _kept(self) -> list[int]:
        kept: list[int] = self.index[self.index >= 0].unique().tolist()
        return kept

    def _kept_labels(self) -> list[str]:
        return [self.rows[number].label for number in self._kept()]

    def _extreme(self, k: int, *, largest: bool) -> list[tuple[str, float]]:
        means = self.mean_rows
        if means is not None:
            return most_extreme(self.rows, means, k, largest=largest)
        if self.shape.numel() > 1:
            raise InputError(
                f"the rows of this {self.unit} result have no means over its "
                f"{self.shape.numel()} entries: rows that read tokens have none, nor have many "
                "positions, nor one position of a whole batch. Take one entry "
                "(result.prompt(i), result.position(j)), or select fewer positions"
            )
        numbers, values = self.kept_means()
        return most_extreme([self.rows[i] for i in numbers.tolist()], values, k, largest=largest)

    def _ipython_key_completions_(self) -> list[str]:
        return self._kept_labels()


Result = DirectLogitAttribution | RankedAttribution
"""What a call gives for one unit."""
