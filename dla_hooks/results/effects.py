"""The result of :func:`dla_hooks.effects`: what taking parts out does, and where it went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.results import effects_chart, effects_views, files
from dla_hooks.results.data import entry_mean
from dla_hooks.results.effects_data import Effect, EffectsData
from dla_hooks.results.parts import check_label, unknown_label
from dla_hooks.results.picture import Picture
from dla_hooks.results.plots import effects as effects_plot
from dla_hooks.results.result import DirectLogitAttribution
from dla_hooks.results.schema import pack, pack_within, unpack_within
from dla_hooks.results.stored import Exported
from dla_hooks.results.table import frame

if TYPE_CHECKING:
    import altair
    import pandas

_CLEAN = "clean"


class Effects(EffectsData, Exported):
    """What taking out each of some parts does to a logit, and where the difference went.

    ``total == own + downstream + read``: the logit of the clean run less that of the ablated one,
    split into what the part's own row lost, what all other rows lost (where that is negative, they
    make up for the part), and what the final norm's scale changes. ``direct`` is the part's row in
    the clean run, as :func:`direct_logit_attribution` gives it.

    ``effects["L9H6"]`` is one part's :class:`Effect`.

    Example:
        >>> import dla_hooks
        >>> model, tokenizer = dla_hooks.demo.load()
        >>> found = dla_hooks.effects(
        ...     model, "The keys near the cabinet", " are", " is", parts=3, tokenizer=tokenizer)
        >>> len(found.labels), found.total.shape
        (3, torch.Size([3, 1]))
        >>> bool((found.own + found.downstream + found.read - found.total).abs().max() < 1e-4)
        True

    Attributes:
        labels: the parts, the largest direct effect first, or as they were named.
        unit: the name of the unit that they are rows of; "" for those of several.
        ablation: ``zero``, ``mean``, or ``value`` for numbers and tensors.
        clean: the clean run's attribution to components.
        direct: each part's row in the clean run [part, *batch_and_pos]; NaN at padding.
        own: what its row lost, the same shape; so are the next two.
        read: what the final norm's scale changes.
        total: the clean logit less the ablated one, measured apart from all rows.
        row_labels: the components that the others' losses are told apart by.
        by_row: what each component lost, but for the part itself
            [part, row, *batch_and_pos]. ``downstream`` is their sum.
        gap: the largest difference of own + downstream + read from total, relative to the larger
            of own and read.
        unit_labels: the rows of the unit, where it has few enough to tell all apart; or None.
        by_unit: the same losses by these rows, or None.
    """

    __module__ = "dla_hooks"
    form = files.EFFECTS

    def __getitem__(self, label: str) -> Effect:
        """One part's numbers, each [*batch_and_pos].

        Raises:
            LabelError: (a KeyError) for a part that was not taken out; it names those most like it.
            ArgumentTypeError: for what is no string.
        """
        return self.effect(self._number(label))

    def __contains__(self, label: object) -> bool:
        return label in self.labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def made_up(self) -> list[str]:
        """The parts for whose loss other rows make up: with theirs at most half of it is left."""
        return effects_views.made_up(self)

    def downstream_rows(
        self, label: str, k: int | None = None, *, unit: str = "component"
    ) -> list[tuple[str, float]]:
        """What the other rows lost when one part was taken out: ``(row, mean)``, the largest first.

        A negative number is a row that makes up for the part. They sum to ``downstream``. The row
        that holds the part has what the rest of it lost.

        Args:
            label: of the part.
            k: how many; None is all.
            unit: into which rows: components, or the unit that the parts are rows of.

        Raises:
            LabelError: (a KeyError) for a part that was not taken out.
            InputError: for a unit that was not measured.
        """
        number = self._number(label)
        rows: list[str] | None = self.row_labels
        numbers: Tensor | None = self.by_row
        if unit != "component":
            rows, numbers = (self.unit_labels, self.by_unit) if unit == self.unit else (None, None)
        if rows is None or numbers is None:
            known = ["component", *([] if self.unit_labels is None else [self.unit])]
            raise InputError(f"unit must be one of {', '.join(map(repr, known))}; got {unit!r:.40}")
        values = torch.tensor(
            [entry_mean(own) for own in numbers[number]], dtype=torch.float64, device="cpu"
        )
        order = values.abs().argsort(descending=True)[:k].tolist()
        return [(rows[row], float(values[row])) for row in order]

    def records(self) -> list[dict[str, Any]]:
        """The lines of :meth:`to_dataframe`, as dictionaries."""
        return effects_views.records(self)

    def to_dataframe(self) -> pandas.DataFrame:
        """One line per part, batch entry and position (extra ``pandas``).

        Returns:
            Columns ``label``, ``row``, ``position``, ``direct``, ``own``, ``downstream``, ``read``
            and ``total``; padding is left out.

        Raises:
            MissingExtraError: when pandas is not installed.
        """
        return frame(self.records(), self._columns())

    def plot(
        self,
        kind: str | None = None,
        *,
        rows: int | Sequence[str] | None = None,
        title: str | None = None,
        width: float | None = None,
        height: float | None = None,
    ) -> Picture:
        """A picture: bars for each part, as means over batch and positions.

        Args:
            kind: ``"effects"``, direct beside total (None is this one); or ``"split"``, where the
                total went: own, downstream and read.
            rows: how many parts, the first ones; or a list of labels; None is all, up to 30.
            title: in place of the heading.
            width: of the picture, in pixels.
            height: of what is below the heading, in pixels.

        Raises:
            InputError: when the result holds no number, or for an argument without meaning.
            LabelError: (a KeyError) for a part that was not taken out.
        """
        return effects_plot.plot(
            self, kind=kind, rows=rows, title=title, width=width, height=height
        )

    def to_altair(self) -> altair.Chart:
        """An Altair chart, whose methods change it (extra ``plot``): where each total went.

        A bar for each part, with marks for total and direct. To see it, a notebook needs a
        network.

        Raises:
            MissingExtraError: when Altair is not installed.
            InputError: when the result holds no number.
        """
        return effects_chart.plot(self)

    @classmethod
    def from_file(cls, **fields: Any) -> Self:
        """Make effects of the fields of their file."""
        clean = DirectLogitAttribution(**unpack_within(_CLEAN, fields))
        return cls(clean=clean, **fields)

    def _packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, plain = pack(self)
        own, rest = pack_within(_CLEAN, self.clean)
        return tensors | own, plain | rest

    def __repr__(self) -> str:
        return effects_views.as_text(self)

    def _repr_html_(self) -> str:
        return effects_views.as_html(self)

    def _number(self, label: Any) -> int:
        check_label(label, next(iter(self.labels), "L0H0"))
        if label not in self.labels:
            raise unknown_label("effects", label, self.labels, "result.labels")
        return self.labels.index(label)

    def _columns(self) -> tuple[str, ...]:
        return effects_views.COLUMNS

    def _as_dict(self) -> dict[str, Any]:
        return effects_views.as_dict(self)

    def _ipython_key_completions_(self) -> list[str]:
        return self.labels
