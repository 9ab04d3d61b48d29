"""What can be done with any attribution: cut, shown, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.results import chart, parts, table
from dla_hooks.results.data import EntryData
from dla_hooks.results.html import as_html
from dla_hooks.results.picture import Picture
from dla_hooks.results.plots.plot import plot
from dla_hooks.results.plots.wish import Wish
from dla_hooks.results.seen import Seen
from dla_hooks.results.stored import Exported
from dla_hooks.results.text import as_text
from dla_hooks.results.where import Where

if TYPE_CHECKING:
    import altair
    import pandas


class Views(EntryData, Exported):
    """The methods that :class:`DirectLogitAttribution` and :class:`RankedAttribution` share."""

    def __getitem__(self, label: str) -> Tensor:
        """The numbers [*batch_and_pos] of one row."""
        raise NotImplementedError(f"{type(self).__name__} must look up its rows")

    def prompt(self, index: int) -> Self:
        """The result of one row of the batch.

        Its axes are the same, the batch with one entry; padded entries stay NaN. Several answers
        of one prompt stay together. ``gap`` and ``logit_gap`` are those of the whole batch.

        Args:
            index: of the row, from either end.

        Raises:
            PositionError: (an IndexError) when the batch has no such row.
            ArgumentTypeError: when ``index`` is no int.
        """
        return parts.one_prompt(self, index)

    def position(self, index: int) -> Self:
        """The result at one of the selected positions: [row, batch], without the position axis.

        Args:
            index: among the selected positions, from either end.

        Raises:
            InputError: when the result has no axis of positions behind its batch axis.
            PositionError: (an IndexError) when no such position was selected.
            ArgumentTypeError: when ``index`` is no int.
        """
        return parts.one_position(self, index)

    def where(self, label: str) -> Where:
        """The module, its input or output, and the channels where a row's numbers stand.

        The model is asked, which a result does not hold: a result that was read from a file, or
        whose model is gone, cannot say it. :func:`dla_hooks.where` says it of any model.

        Args:
            label: of a row.

        Raises:
            LabelError: (a KeyError) for a label that no row has.
            InputError: for a row that stands at no place, such as a remainder; where the model
                is not there.
        """
        self[label]  # refuses what is no label of this result
        locate = self.locate
        if locate is None:
            raise InputError(
                "this result was read from a file, or made by hand, and does not know its model; "
                f"dla_hooks.where(model, {label!r}) says where the row is"
            )
        return locate(label)

    def each(self, index: int) -> Self:
        """The result for one of several answers (:class:`Each`): without their axis.

        Args:
            index: among the answers, from either end.

        Raises:
            InputError: when there is one answer only.
            PositionError: (an IndexError) when there are fewer.
            ArgumentTypeError: when ``index`` is no int.
        """
        return parts.one_answer(self, index)

    @property
    def log_probability(self) -> Tensor:
        """The log-probability of each answer under the model, natural logarithm [*batch_and_pos].

        NaN where its logits were not looked at, or where the answer is no single token. The check
        looks at up to four positions, and at every one for ``answer_tokens=dla_hooks.TOP``. It is
        no sum of the parts: docs/questions/tokens.md says why.
        """
        return self._seen().log_probability

    @property
    def rank(self) -> Tensor:
        """The rank of each answer among all tokens, from 1 [*batch_and_pos]; -1 where unknown."""
        return self._seen().rank

    @property
    def top_tokens(self) -> list[list[tuple[str, float]]]:
        """The model's own top tokens with their probabilities, the most likely first.

        One list for each entry, flattened; empty where its logits were not looked at.
        """
        seen = self._seen()
        return seen.top() if len(seen.top_ids) else [[] for _ in range(self.shape.numel())]

    def _seen(self) -> Seen:
        return Seen.nothing(self.shape) if self.seen is None else self.seen

    def to_dataframe(self) -> pandas.DataFrame:
        """One line per row, batch entry and position (extra ``pandas``).

        Returns:
            Columns ``label``, ``kind``, ``layer``, ``sub`` and ``head`` (empty where the row has
            none; a unit may count something else than heads and names the column so), for rows
            that read one token ``source`` and ``source_token``, then ``row``, ``position``,
            ``token``, ``answer``, ``incorrect``, ``attribution``, and the numbers that the unit
            puts beside it; padding is left out. ``sub`` counts the attentions of a block, from 0.

        Raises:
            MissingExtraError: when pandas is not installed.
        """
        return table.frame(self.records(), self._columns())

    def plot(
        self,
        kind: str | None = None,
        *,
        rows: int | Sequence[str] | None = None,
        row: str | None = None,
        sort: str | None = None,
        pos: int | slice | Sequence[int] | str | None = None,
        prompt: int | str | None = None,
        answer: str | None = None,
        title: str | None = None,
        width: float | None = None,
        height: float | None = None,
    ) -> Picture:
        """A picture, which a notebook shows without a network; no other package is needed.

        One entry is drawn as its unit says: bars, a line, or a heatmap of layer by index. Several
        positions, prompts or answers stand under each other, in a heatmap with a column for each
        row of the result; layers at several positions are a lens. Of a long prompt the last
        positions are drawn unless ``pos`` says which. A mean is drawn only where it is asked for,
        and the title says so.

        Example:
            >>> import dla_hooks
            >>> result = dla_hooks.direct_logit_attribution(
            ...     model, "The keys near the cabinet", " are", pos=None, tokenizer=tokenizer
            ... )
            >>> result.plot()  # each token's logit, and who wrote it
            <Picture "Components: ' are'", ...>
            >>> result.plot("bars", pos=-1).save("bars.svg").name
            'bars.svg'
            >>> result.plot("strip", row="0_mlp_out").title
            "0_mlp_out: ' are'"

        Args:
            kind: ``"bars"``; ``"waterfall"``, bars that begin where the one above ends;
                ``"line"``; ``"heatmap"``, of layer by index where one entry is drawn;
                ``"lens"``, running sums with layers upwards and tokens from left to right; or
                ``"strip"``, the tokens in the colours of one row. Of several positions, bars,
                waterfall and line draw the last one. None is what the numbers call for.
            rows: how many, the strongest; or a list of labels. None is all, or the strongest where
                they are too many.
            row: the label of the row that colours a strip, or ``"logit"``; None is the strongest.
                For the unit ``source`` a head (``"L3H0"``): what it took from each token.
            sort: ``"size"``, by value, or ``"stream"``, in the order of the model.
            pos: which of the selected positions: of the prompt's tokens, from either end, one or
                several, or ``"mean"``.
            prompt: which row of the batch; or ``"mean"``, with the standard error.
            answer: the text of one of several answers.
            title: in place of the heading.
            width: of the picture, in pixels.
            height: of what is below the heading, in pixels.

        Raises:
            InputError: when the result holds no number, or for an argument without meaning here.
            PositionError: (an IndexError) for a prompt or a position that is not there.
            LabelError: (a KeyError) for a label that no row has.
        """
        return plot(self, Wish(kind, rows, row, sort, pos, prompt, answer, title, width, height))

    def to_altair(self) -> altair.Chart:
        """The result as an Altair chart, whose methods change it (extra ``plot``).

        It draws the means over batch and positions. To see it, a notebook needs a network.

        Raises:
            MissingExtraError: when Altair is not installed.
            InputError: when the result holds no number.
        """
        return chart.plot(self)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def _columns(self) -> tuple[str, ...]:
        return table.columns(self.words)

    def _as_dict(self) -> dict[str, Any]:
        return table.as_dict(self)
