"""The result of :func:`dla_hooks.promoted_tokens`: ranked tokens for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dla_hooks.errors import InputError
from dla_hooks.results import files, promoted_views
from dla_hooks.results.data import checked_count
from dla_hooks.results.parts import check_label, counted, unknown_label
from dla_hooks.results.picture import Picture
from dla_hooks.results.plots import promoted as promoted_plot
from dla_hooks.results.promoted_data import NUMBERS, PromotedData
from dla_hooks.results.stored import Exported
from dla_hooks.results.table import frame

if TYPE_CHECKING:
    import pandas


class PromotedTokens(PromotedData, Exported):
    """The tokens that each row pushes up and down the most.

    ``result["L3H0"]`` is the result of that row alone, ``result.top("L3H0")`` its tokens. Logits
    are before any softcap, and less their row's mean over all tokens that are ranked.

    Of rows that are too many, as neurons are, the strongest at each entry are there:
    ``result["#1"]`` is the strongest, ``result["L3N17"]`` that neuron wherever it is among them,
    and as at padding elsewhere.

    Example:
        >>> import torch
        >>> from dla_hooks import PromotedTokens
        >>> result = PromotedTokens(
        ...     labels=["embed"],
        ...     unit="component",
        ...     up=torch.tensor([[[2.0, 1.0]]]),
        ...     up_ids=torch.tensor([[[4, 0]]]),
        ...     down=torch.tensor([[[-3.0, -1.0]]]),
        ...     down_ids=torch.tensor([[[1, 2]]]),
        ...     mean=torch.tensor([[0.5]]),
        ...     names={0: " a", 1: " b", 2: " c", 4: " d"},
        ...     n_tokens=5,
        ... )
        >>> result.top("embed"), result.bottom("embed", 1)
        ([(' d', 2.0), (' a', 1.0)], [(' b', -3.0)])

    Attributes:
        labels: the name of each row.
        unit: the name of the unit that made the rows.
        up: the largest logits, less the mean, the largest first [row, *batch_and_pos, k]; NaN at
            padding.
        up_ids: their tokens; -1 at padding.
        down: the smallest ones, the smallest first [row, *batch_and_pos, k].
        down_ids: their tokens.
        mean: each row's mean logit over the tokens [row, *batch_and_pos].
        names: the text of every token that is listed, by its id (the id without a tokenizer).
        n_tokens: how many tokens are ranked.
        gap: the largest difference between the rows' sum with the bias and the model's own logits,
            where these were looked at; NaN when the call was not checked.
        positions: which token of its row of the batch each entry belongs to [*batch_and_pos]; -1
            for padding.
        tokens: the tokens of each row of the batch, as text.
        model: the model's class and type.
        softcap: the cap that the model puts on its logits, or None.
        words: what the unit says of its rows.
        index: for a unit that keeps the strongest rows of each entry, the number in ``rows`` of
            what stands there [row, *batch_and_pos]; -1 for ``rest``, ``remainder`` and padding.
            None where rows are the same everywhere.
        rows: a record of every row that ``index`` counts; None without it.
    """

    __module__ = "dla_hooks"
    form = files.PROMOTED

    def __getitem__(self, label: str) -> PromotedTokens:
        """One row alone.

        Raises:
            LabelError: (a KeyError) for a label that no row has; it names those most like it.
            ArgumentTypeError: for what is no string.
        """
        check_label(label, next(iter(self.labels), "embed"))
        kept = self.kept_labels()
        if label in kept and label not in self.labels:
            return self._wherever(label)
        if label not in self.labels:
            names = "result.labels" if self.index is None else "result.labels and records()"
            raise unknown_label(self.unit, label, [*self.labels, *kept], names)
        row = self.labels.index(label)
        return self._cut((slice(row, row + 1),), labels=[label])

    def __contains__(self, label: object) -> bool:
        return label in self.labels or label in self.kept_labels()

    def __len__(self) -> int:
        return len(self.labels)

    def top(self, label: str, k: int | None = None) -> list[tuple[str, float]]:
        """The tokens that one row pushes up the most: ``(token, logit)``, the largest first.

        Args:
            label: of the row.
            k: how many; None is all that are listed.

        Raises:
            LabelError: (a KeyError) for a label that no row has.
            InputError: for a result of several entries: take one with :meth:`prompt` and
                :meth:`position`.
        """
        return self._listed(label, k, "up")

    def bottom(self, label: str, k: int | None = None) -> list[tuple[str, float]]:
        """The tokens that one row pushes down the most, the most negative first."""
        return self._listed(label, k, "down")

    def prompt(self, index: int) -> PromotedTokens:
        """The result of one row of the batch, whose axis is kept with one entry.

        Raises:
            PositionError: (an IndexError) when the batch has no such row.
            ArgumentTypeError: when ``index`` is no int.
        """
        row = counted(index, self.shape[0] if self.shape else 1, "the batch", "rows")
        tokens = self.tokens[row : row + 1]
        return self._cut((slice(None), slice(row, row + 1))[: self.mean.ndim], tokens=tokens)

    def position(self, index: int) -> PromotedTokens:
        """The result at one of the selected positions, without the axis of positions.

        Raises:
            InputError: when the result has no axis of positions behind its batch axis.
            PositionError: (an IndexError) when no such position was selected.
            ArgumentTypeError: when ``index`` is no int.
        """
        if len(self.shape) != 2:
            raise InputError(
                "one position can be taken from a result with the axes [batch, position]; this "
                f"one has {list(self.shape)}: a single position was selected"
            )
        place = counted(index, self.shape[1], "the selected positions", "entries")
        return self._cut((slice(None), slice(None), place))

    def records(self) -> list[dict[str, Any]]:
        """The lines of :meth:`to_dataframe`, as dictionaries."""
        return promoted_views.records(self)

    def to_dataframe(self) -> pandas.DataFrame:
        """One line per row, batch entry, position and listed token (extra ``pandas``).

        Returns:
            Columns ``label``, ``row``, ``position``, ``rank`` (1, 2, … for the largest, -1, -2, …
            for the smallest), ``token_id``, ``token``, ``logit``; padding is left out.

        Raises:
            MissingExtraError: when pandas is not installed.
        """
        return frame(self.records(), self._columns())

    def plot(
        self,
        *,
        rows: int | Sequence[str] | None = None,
        k: int = 4,
        prompt: int | None = None,
        position: int | None = None,
        title: str | None = None,
        width: float | None = None,
        height: float | None = None,
    ) -> Picture:
        """A picture of one entry: each row's tokens, the more coloured the harder they are pushed.

        Args:
            rows: how many, those that push hardest; or a list of labels; None is all.
            k: how many tokens each way.
            prompt: which row of the batch, as in :meth:`prompt`; None is the first.
            position: which of the selected positions, as in :meth:`position`; None is the last.
            title: in place of the heading.
            width: of the picture, in pixels.
            height: of the cells, in pixels.

        Raises:
            InputError: when there is no entry, or for an argument without meaning.
            PositionError: (an IndexError) for a prompt or a position that is not there.
            LabelError: (a KeyError) for a label that no row has.
        """
        data = self if prompt is None else self.prompt(prompt)
        data = data if position is None else data.position(position)
        return promoted_plot.plot(data, rows=rows, k=k, title=title, width=width, height=height)

    def _listed(self, label: str, k: int | None, way: str) -> list[tuple[str, float]]:
        one = self[label]
        if one.mean.numel() != 1:
            raise InputError(
                f"the result has {one.mean.numel()} entries {list(self.shape)}, and each ranks its "
                "own tokens; take one first, with prompt(i) and position(j)"
            )
        numbers, ids = getattr(one, way).flatten().tolist(), getattr(one, f"{way}_ids").flatten()
        pairs = zip(ids.tolist(), numbers, strict=True)
        found = [(self.names[i], value) for i, value in pairs if i >= 0]
        return found[: None if k is None else checked_count(k)]

    def _wherever(self, label: str) -> PromotedTokens:
        """One row wherever it is among the strongest; elsewhere as at padding."""
        assert self.index is not None
        assert self.rows is not None
        number = self.rows.number_of(label)
        assert number is not None
        there = self.index.eq(number)
        place, nowhere = there.long().argmax(0, keepdim=True), ~there.any(0, keepdim=True)
        cut = {}
        for name in NUMBERS:
            numbers = getattr(self, name)
            by_token = numbers.ndim > there.ndim
            at, out = (x[..., None] if by_token else x for x in (place, nowhere))
            found = numbers.gather(0, at.expand(1, *numbers.shape[1:]))
            cut[name] = found.masked_fill(out, torch.nan if found.is_floating_point() else -1)
        return replace(self, labels=[label], index=None, rows=None, **cut)

    def _cut(self, place: tuple[slice | int, ...], **others: Any) -> PromotedTokens:
        cut = {name: getattr(self, name)[place] for name in NUMBERS}
        if self.index is not None:
            cut["index"] = self.index[place]
        if self.positions.shape == self.shape:
            cut["positions"] = self.positions[place[1:]]
        return replace(self, **cut, **others)

    def _columns(self) -> tuple[str, ...]:
        return promoted_views.COLUMNS

    def _as_dict(self) -> dict[str, Any]:
        return promoted_views.as_dict(self)

    def _ipython_key_completions_(self) -> list[str]:
        return [*self.labels, *self.kept_labels()]

    def __repr__(self) -> str:
        return promoted_views.as_text(self)

    def _repr_html_(self) -> str:
        return promoted_views.as_html(self)
