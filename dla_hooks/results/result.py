"""The result of a call, and what can be done with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from dla_hooks.results import files, parts, table
from dla_hooks.results.data import ResultData, most_extreme
from dla_hooks.results.rows import Row
from dla_hooks.results.views import Views


class DirectLogitAttribution(ResultData, Views):
    """Who wrote a logit, or a difference of logits.

    ``total() + bias == logit``, to within ``gap``. The total is ``attribution.sum(0)``, or
    for a unit whose rows are running sums (``words.cumulative``) ``attribution[-1]``.

    ``result["L3H0"]`` is one row [*batch_and_pos], ``len(result)`` counts the rows, and a loop
    over the result gives pairs of a :class:`Row` record and that row's numbers.

    Example:
        >>> import torch
        >>> from dla_hooks import DirectLogitAttribution
        >>> result = DirectLogitAttribution(
        ...     attribution=torch.tensor([[1.0], [-2.0], [0.5]]),
        ...     labels=["L0H0", "L0H1", "remainder"],
        ...     unit="head",
        ...     bias=torch.tensor([0.25]),
        ...     logit=torch.tensor([-0.25]),
        ...     gap=0.0,
        ... )
        >>> result["L0H1"]
        tensor([-2.])
        >>> result.top(1)
        [('L0H0', 1.0)]
        >>> [(row.label, row.layer, row.index) for row, numbers in result]
        [('L0H0', 0, 0), ('L0H1', 0, 1), ('remainder', None, None)]

    Attributes:
        attribution: [row, *batch_and_pos], aligned with ``labels``; NaN at padding.
        labels: the name of each row.
        unit: the name of the unit that made the rows.
        bias: what the logit has besides the stream [*batch_and_pos].
        logit: the logit (or difference), before any softcap [*batch_and_pos].
        gap: the largest difference between the parts' sum and the stream's own projection.
        logit_gap: the largest difference from the model's own logits where they were looked at;
            NaN when the call was not checked.
        positions: which token of its row each entry belongs to [*batch_and_pos]; -1 for padding.
        tokens: the tokens of each row, as text (ids as text where there was no tokenizer).
        answer: the answer's text; one for each entry, flattened, where they are not all the same.
        incorrect: the same for the incorrect tokens, or None.
        model: the model's class and type.
        softcap: the cap that the model puts on its logits, or None.
        rows: a record of each row: label, kind, layer, sub, index.
        words: what the unit says of its rows: a sentence, the kind of chart, the name of a column.
        target: which of ``answer`` and ``incorrect`` each entry is about [*batch_and_pos]; None
            where there is one for all, or one for each in their order.
        beside: further numbers of each row, by name, each like ``attribution``.
        generated: of :func:`attribute_generation`, the new tokens of each row, as text; else None.
        generated_ids: the same as ids [batch, new token], as the model's ``generate`` gives them.
        reading: what was read, where that is no logit (:class:`Direction`); else None. ``logit`` is
            then the value that was read.
        seen: what the model's own logits say of the answers, a :class:`Seen`; None where they were
            not looked at. ``log_probability``, ``rank`` and ``top_tokens`` read it.
        several: whether the last axis holds several answers to one prompt (:class:`Each`).
    """

    __module__ = "dla_hooks"
    form = files.RESULT

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` rows that push the logit up the most: ``(label, mean value)``, largest first.

        Args:
            k: how many; no more than there are rows.

        Raises:
            InputError: when ``k`` is no int, or negative.
        """
        return most_extreme(self.rows, self.mean(), k, largest=True)

    def bottom(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` rows that push the logit down the most, most negative first."""
        return most_extreme(self.rows, self.mean(), k, largest=False)

    def __getitem__(self, label: str) -> Tensor:
        """The numbers [*batch_and_pos] of one row.

        Raises:
            LabelError: (a KeyError) for a label that no row has; it names those most like it.
            ArgumentTypeError: for what is no string.
        """
        return parts.row_named(self, label)

    def __contains__(self, label: object) -> bool:
        return label in self.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Row, Tensor]]:
        """Each row's record with its numbers [*batch_and_pos]."""
        return zip(self.rows, self.attribution, strict=True)

    @property
    def heads(self) -> Tensor:
        """The heads as [layer, head, *batch_and_pos].

        NaN stands where a layer has fewer heads, or none. Where a block has several attentions,
        the heads of the second (``L3.1H0``) follow those of the first in the layer's line.

        Raises:
            InputError: when the rows are no heads.
        """
        return parts.head_grid(self)

    def summed(self) -> DirectLogitAttribution:
        """The sum over the selected positions: one entry for each prompt.

        For a :class:`Continuation` it is the attribution of all its tokens together. Rows, bias and
        logit are added, padding left out; so is ``log_probability``, where every one is known.

        Raises:
            InputError: when there is no axis of positions.
        """
        return parts.summed(self)

    def records(self) -> list[dict[str, Any]]:
        """The lines of :meth:`to_dataframe`, as dictionaries."""
        return table.records(self)

    def _ipython_key_completions_(self) -> list[str]:
        return self.labels
