"""What every unit has in common.

A unit says into which rows the stream is split. It lives in three steps, each whole when it is
made: the unit with its options; the unit on one model and target (:class:`UnitPlan`), with all
that no prompt changes; and what it records of one prompt (:class:`Recorder`).

A unit whose rows are made of the parts alone needs one method, :meth:`Unit.split`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dla_hooks.backends import Conventions
from dla_hooks.calibration.named_places import NamedPlace
from dla_hooks.inputs.entries import Entries
from dla_hooks.modules.dictionaries import Dictionary
from dla_hooks.modules.hooks import Place, Tap
from dla_hooks.projection.tiles import View
from dla_hooks.residual.stream import Stream
from dla_hooks.results.rows import Row, Words
from dla_hooks.units.parts import Parts
from dla_hooks.units.parts_plan import PartsPlan


@dataclass(frozen=True)
class Claim:
    """Two ways to the same numbers, measured apart; they differ by rounding or by a mistake.

    Attributes:
        what: what the parts are, for the message of an error: a name for each number that is
            claimed.
        parts_LN: their sums at each entry.
        whole_LN: what these should be.
        through_norm: whether a norm of the model stands between the two; transformers computes
            norms in float32, so that even a float64 model is then exact to float32 only.
        of_stream: whether the whole is the stream, which every addition rounds.
        gap: their largest difference, where that was measured before.
    """

    what: Sequence[str]
    parts_LN: Tensor
    whole_LN: Tensor
    through_norm: bool = False
    of_stream: bool = False
    gap: float | None = None


def claims_of_writes(
    writes: Sequence[tuple[str, str, bool]], wrote_LN: Tensor, parts: Parts
) -> list[Claim]:
    """That the rows of some sublayers, with what is constant, make up what each wrote.

    Args:
        writes: of each, the label of the write, what its rows are called in an error, and whether a
            norm stands between them.
        wrote_LN: the sum of its rows and constants at each entry.
        parts: the parts; a write that no source has shown is left out.
    """
    claims = []
    for through_norm in (False, True):
        kept = [
            number
            for number, (label, _, normed) in enumerate(writes)
            if normed == through_norm and label not in parts.missing
        ]
        if kept:
            whole_LN = parts.of([writes[number][0] for number in kept])
            own_LN = wrote_LN if len(kept) == len(writes) else wrote_LN[kept]
            names = [writes[number][1] for number in kept]
            claims.append(Claim(names, own_LN, whole_LN, through_norm))
    return claims


@dataclass(frozen=True)
class Split:
    """What a unit found for one prompt.

    Attributes:
        rows: a record for each row.
        values_CN: what ``rows[i]`` contributed at each entry.
        claims: what must hold if the rows are right, besides the parts summing to the stream.
        norms: norms that the unit reads through, each with what its form leaves unexplained.
        beside: further numbers of each row [C, N], by the names in ``words.beside``.
    """

    rows: Sequence[Row]
    values_CN: Tensor
    claims: Sequence[Claim] = field(default_factory=tuple)
    norms: Sequence[tuple[str, float]] = field(default_factory=tuple)
    beside: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RankedSplit:
    """What a unit with too many rows to keep found for one prompt: the strongest at each entry.

    Attributes:
        rows: a record for each row that there is, kept or not.
        values_KN: what the kept rows contributed at each entry, the largest absolute value first.
        index_KN: their numbers among ``rows``; -1 where an entry has fewer rows than places, with
            the value 0.
        rest_N: what the unit's other rows contributed together, summed from them.
        remainder_N: what belongs to no row of the unit.
        row_sums_RB: each row's sum over the entries of each prompt of the batch; None where a row
            does not mean the same at each of them, or where there were too many numbers to keep.
        claims: as in :class:`Split`.
        norms: as in :class:`Split`.
        beside: further numbers of the kept rows [K, N], by the names in ``words.beside``.
    """

    rows: Sequence[Row]
    values_KN: Tensor
    index_KN: Tensor
    rest_N: Tensor
    remainder_N: Tensor
    row_sums_RB: Tensor | None = None
    claims: Sequence[Claim] = field(default_factory=tuple)
    norms: Sequence[tuple[str, float]] = field(default_factory=tuple)
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def values_CN(self) -> Tensor:
        """All numbers [K + 2, N] that with the bias sum to the logit."""
        return torch.cat((self.values_KN, self.rest_N[None], self.remainder_N[None]))


class Recorder:
    """What a unit records of one run, besides the parts.

    Attributes:
        whole_writes: labels of the writes that its rows make up, with what is constant. Where no
            unit reads the parts, they are taken from there (:meth:`wrote`): the sum of all parts
            then holds these rows against the stream.
    """

    whole_writes: Sequence[str] = ()

    def taps(self, view: View) -> list[Tap]:
        """What to watch while the entries in view are run."""
        return []

    def taps_before(self, view: View) -> list[Tap]:
        """What to watch in a piece of the prompt without entries, which later pieces read."""
        return []

    def again(self) -> bool:
        """Make ready for another run at the same entries; False where it has to be made anew."""
        return False

    def wrote(self, device: torch.device, entries: Entries) -> Tensor:
        """What these writes wrote [writes, N], not divided by the final scale; before the rest."""
        raise NotImplementedError(f"{type(self).__name__} must say what its rows make up")

    def finish(self, parts: Parts) -> Split | RankedSplit:
        """The rows, after the run."""
        raise NotImplementedError(f"{type(self).__name__} must say how it splits the stream")


class UnitPlan:
    """A unit on one model and target.

    Args:
        unit: the unit, with its options.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    @property
    def words(self) -> Words:
        """What the results say of their rows."""
        return self.unit.words

    def recorder(self, view: View) -> Recorder:
        """A recorder for one prompt, whose entries are all in view."""
        return _FromParts(self.unit)

    def known_rows(self, entries: Entries) -> Sequence[Row] | None:
        """The rows of a prompt, hooks left out, where they are known before it is run; or None."""
        found: Sequence[Row] | None = getattr(self, "rows", None)
        return found


class Unit:
    """A way to split the stream.

    Attributes:
        words: its name, and what it says of its rows.
        reads_parts: whether its rows are made of the parts, or held against them one by one.
        reads_each_write: whether it needs every write by itself; otherwise what a block added may
            come in one, as from a cache that holds the stream around each block only.
        of_every_model: whether every model that is declared for it has it.
        by_column: whether its taps read hidden states and attention calls alone, each column by
            itself, so that these can be held and be shown later.
        taken_out: the kinds of its rows that can be taken out of a model; ``write`` for all that
            sublayers write.
        kept_in: where there are none, why, and what to do instead.
    """

    words: ClassVar[Words]
    reads_parts: ClassVar[bool] = True
    reads_each_write: ClassVar[bool] = True
    of_every_model: ClassVar[bool] = True
    by_column: ClassVar[bool] = False
    taken_out: ClassVar[tuple[str, ...]] = ()
    kept_in: ClassVar[str] = "no module shows one of them alone"

    def places(self, stream: Stream) -> list[Place]:
        """The places whose activations it is made of, besides the final norm's scale."""
        raise NotImplementedError(f"{type(self).__name__} must name its places")

    @classmethod
    def of_layer(cls, layer: int) -> Unit:
        """The unit with every row of one layer, and maybe of others."""
        return cls()

    def dictionary_places(self) -> Sequence[str]:
        """The labels of places that its rows name by their layer only."""
        return ()

    def read(self, stream: Stream) -> list[tuple[NamedPlace, Dictionary]]:
        """The dictionaries that its rows belong to, each with its place."""
        return []

    def at_place(self, label: str) -> Unit:
        """The unit with every row of one of its dictionaries, and no other rows."""
        raise NotImplementedError(f"{type(self).__name__} has no dictionaries")

    def prepare(self, parts: PartsPlan, conventions: Conventions) -> UnitPlan:
        """The unit on one model and target: everything that no prompt changes is made here.

        Args:
            parts: the parts of the stream, each with the directions that it is projected on.
            conventions: what is done where the unit's own options leave it open.

        Raises:
            UnsupportedModelError: when the model has nothing of the kind.
        """
        return UnitPlan(self)

    def split(self, parts: Parts) -> Split:
        """The rows, for a unit that is made of the parts alone."""
        raise NotImplementedError(f"{type(self).__name__} must say how it splits the stream")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"


class _FromParts(Recorder):
    """The recorder of a unit that is made of the parts: there is nothing more to watch."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit

    def again(self) -> bool:
        return True

    def finish(self, parts: Parts) -> Split:
        return self._unit.split(parts)
