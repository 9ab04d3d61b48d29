"""The result of :func:`dla_hooks.compare`: two runs' difference, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.results import comparison_views, files, table
from dla_hooks.results.picture import Picture
from dla_hooks.results.ranked import REMAINDER, REST, RankedAttribution, Result
from dla_hooks.results.result import DirectLogitAttribution
from dla_hooks.results.rows import Row, Words
from dla_hooks.results.schema import as_json, pack_within, unpack_within
from dla_hooks.results.stored import Exported
from dla_hooks.results.where import Where

if TYPE_CHECKING:
    import altair
    import pandas

WRITTEN, READ, FIRST, SECOND = "written", "read", "first", "second"
_PARTS = ("difference", "first", "second")
_KIND = "kind"
_KINDS: dict[str, type[Result]] = {
    files.RESULT: DirectLogitAttribution,
    files.RANKED: RankedAttribution,
}


@dataclass(repr=False, eq=False)
class Comparison(Exported):
    """Why two runs answer differently: first minus second, row by row.

    ``attribution == written + read``, and as in each run ``attribution.sum(0) + bias == logit``
    (for running sums ``attribution[-1]``; of a ranked unit ``rest`` and ``remainder`` belong to the
    sum), all of them differences. ``comparison["3_mlp_out"]`` is one row [*batch_and_pos].

    Example:
        >>> import dla_hooks
        >>> model, tokenizer = dla_hooks.demo.load()
        >>> found = dla_hooks.compare(
        ...     model, input="The keys near the cabinet", other_input="The key near the cabinet",
        ...     answer_tokens=" are", incorrect_tokens=" is", tokenizer=tokenizer)
        >>> found.attribution.shape == found.written.shape == found.first.attribution.shape
        True
        >>> sorted(set(found.records()[0]) - set(found.first.records()[0]))
        ['first', 'read', 'second', 'written']

    Attributes:
        difference: the difference as a result of its own; its ``beside`` holds ``written``,
            ``read``, ``first`` and ``second``, and differences of what the unit puts beside a row.
        first: the whole attribution of the first run.
        second: of the second run.
        written_means: of a ranked unit every row's mean of ``written`` over the entries of each
            prompt [all rows, batch], or None.
        beyond: of a ranked unit what was written by the rows that are not kept, and by no row of
            the unit [2, *batch_and_pos]: the written part of ``rest`` and ``remainder``; or None.

    Raises:
        InputError: when ``difference`` does not hold what was written and read.
    """

    __module__ = "dla_hooks"
    form = files.COMPARISON

    difference: Result
    first: Result
    second: Result
    written_means: Tensor | None = None
    beyond: Tensor | None = None

    def __post_init__(self) -> None:
        missing = [name for name in (WRITTEN, READ, FIRST, SECOND) if name not in self._beside]
        if missing:
            raise InputError(
                f"difference has no {missing[0]!r} beside its rows; compare() makes it"
            )
        self.difference.compared = True
        if self.first.locate is not None:
            self.difference.located_by(self.first.locate)

    @property
    def attribution(self) -> Tensor:
        """First minus second [row or place, *batch_and_pos]; NaN at padding."""
        return self.difference.attribution

    @property
    def written(self) -> Tensor:
        """The part that comes from what each row wrote, the same shape."""
        return self._beside[WRITTEN]

    @property
    def read(self) -> Tensor:
        """The part that comes from how it is read: the final scale, or the directions."""
        return self._beside[READ]

    @property
    def bias(self) -> Tensor:
        """The difference of what the logits have besides the stream [*batch_and_pos]."""
        return self.difference.bias

    @property
    def logit(self) -> Tensor:
        """The difference of the two runs' logits, before any softcap [*batch_and_pos]."""
        return self.difference.logit

    @property
    def gap(self) -> float:
        """Both runs' gaps between the parts' sum and the stream's projection, added."""
        return self.difference.gap

    @property
    def logit_gap(self) -> float:
        """Both runs' gaps to the model's own logits, added; NaN when the call was not checked."""
        return self.difference.logit_gap

    @property
    def unit(self) -> str:
        """The name of the unit that made the rows."""
        return self.difference.unit

    @property
    def rows(self) -> Any:
        """A record of each row: label, kind, layer, sub, index."""
        return self.difference.rows

    @property
    def labels(self) -> list[str]:
        """The name of each row; of a ranked unit those of the rows that are kept somewhere."""
        if isinstance(self.difference, DirectLogitAttribution):
            return self.difference.labels
        return [row.label for row, _ in self.difference]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` rows that speak most for the first run: ``(label, mean)``, largest first.

        Args:
            k: how many; no more than there are rows.

        Raises:
            InputError: when ``k`` is no int, or negative.
        """
        return self.difference.top(k)

    def bottom(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` rows that speak most for the second run, most negative first."""
        return self.difference.bottom(k)

    def prompt(self, index: int) -> Self:
        """The comparison of one row of the batch; see :meth:`DirectLogitAttribution.prompt`."""
        parts, n = self._each("prompt", index), len(self.difference.tokens)
        means, beyond = self.written_means, self.beyond
        if n > 1:  # one prompt is whole
            row = slice(index % n, index % n + 1)
            means = None if means is None else means[:, row]
            beyond = None if beyond is None else beyond[:, row]
        return type(self)(parts[0], parts[1], parts[2], means, beyond)

    def position(self, index: int) -> Self:
        """The comparison at one of the selected positions; see
        :meth:`DirectLogitAttribution.position`."""
        parts = self._each("position", index)
        means = self.written_means if self.difference.shape[1] == 1 else None
        beyond = None if self.beyond is None else self.beyond[:, :, index]
        return type(self)(parts[0], parts[1], parts[2], means, beyond)

    def where(self, label: str) -> Where:
        """The place of a row in the first run's model; see :meth:`DirectLogitAttribution.where`.

        ``second.where(label)`` is the place in the second run's model. The two differ where one
        model is wrapped and the other is not.

        Args:
            label: of a row.

        Raises:
            LabelError: (a KeyError) for a label that no row has.
            InputError: for a row that stands at no place, such as a remainder; where the model
                is not there.
        """
        return self.difference.where(label)

    def records(self) -> list[dict[str, Any]]:
        """The lines of :meth:`to_dataframe`, as dictionaries."""
        lines = self.difference.records()
        if self.beyond is not None:
            last = dict(zip((REST, REMAINDER), self.beyond.flatten(1).tolist(), strict=True))
            entries = [flat for flat, _ in table.entries(self.difference)]
            for label, values in last.items():
                own = [line for line in lines if line["label"] == line["kind"] == label]
                for line, flat in zip(own, entries, strict=True):
                    line[WRITTEN] = values[flat]
                    line[READ] = line["attribution"] - values[flat]
        return lines

    def to_dataframe(self) -> pandas.DataFrame:
        """One line per row, batch entry and position (extra ``pandas``).

        Returns:
            The columns of :meth:`DirectLogitAttribution.to_dataframe`, and ``written``, ``read``,
            ``first`` and ``second`` (the row in each of the two runs; 0 where a run has none).

        Raises:
            MissingExtraError: when pandas is not installed.
        """
        return table.frame(self.records(), self._columns())

    def plot(self, kind: str | None = None, **options: Any) -> Picture:
        """A picture of the difference, which needs no network and no other package.

        Args:
            kind: see :meth:`DirectLogitAttribution.plot`.
            **options: likewise.

        Raises:
            InputError: when the result holds no number, or for an argument without meaning.
        """
        return self.difference.plot(kind, **options)

    def to_altair(self) -> altair.Chart:
        """An Altair chart of the difference (extra ``plot``); a notebook needs a network for it.

        Raises:
            MissingExtraError: when Altair is not installed.
            InputError: when the result holds no number.
        """
        return self.difference.to_altair()

    @classmethod
    def from_file(cls, **fields: Any) -> Self:
        """Make a comparison of the fields of its file."""
        made = _KINDS[fields.pop(_KIND)]
        parts: dict[str, Any] = {name: made(**unpack_within(name, fields)) for name in _PARTS}
        return cls(**parts, **fields)

    def _packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        given = {name: getattr(self, name) for name in ("written_means", "beyond")}
        tensors = {name: own for name, own in given.items() if own is not None}
        plain: dict[str, Any] = {_KIND: self.difference.form}
        for name in _PARTS:
            own, rest = pack_within(name, getattr(self, name))
            tensors |= own
            plain |= rest
        return tensors, plain

    def __getitem__(self, label: str) -> Tensor:
        """The difference [*batch_and_pos] of one row; of a ranked unit NaN where it is not kept.

        Raises:
            LabelError: (a KeyError) for a label that no row has; it names those most like it.
            ArgumentTypeError: for what is no string.
        """
        return self.difference[label]

    def __contains__(self, label: object) -> bool:
        return label in self.difference

    def __len__(self) -> int:
        return len(self.difference)

    def __iter__(self) -> Iterator[tuple[Row, Tensor]]:
        """Each row's record with its differences [*batch_and_pos]."""
        return iter(self.difference)

    def __repr__(self) -> str:
        return comparison_views.as_text(self.difference, self.first, self.second)

    def _repr_html_(self) -> str:
        return comparison_views.as_html(self.difference, self.first, self.second)

    @property
    def _beside(self) -> dict[str, Tensor]:
        return self.difference.beside

    def _each(self, method: str, index: int) -> list[Result]:
        """What a method of all three results gives."""
        return [getattr(getattr(self, name), method)(index) for name in _PARTS]

    def _columns(self) -> tuple[str, ...]:
        return table.columns(self.difference.words)

    def _as_dict(self) -> dict[str, Any]:
        own = {name: as_json(getattr(self, name)) for name in ("written_means", "beyond")}
        return {name: table.as_dict(getattr(self, name)) for name in _PARTS} | own


def words_of_difference(words: Words) -> Words:
    """What a unit says of its rows, where these are differences of two runs."""
    return replace(
        words,
        title=f"{words.title}, first - second",
        sentence=f"{words.sentence}, first - second",
        beside=(*words.beside, WRITTEN, READ, FIRST, SECOND),
    )
