"""One run's numbers on its own directions and on another run's, row by row.

With x what a run wrote, d a run's direction at the last stream and s its final scale, run A has
measured ``x . d_A / s_A`` and ``x . d_B / s_A``. The second, times ``s_A / s_B``, is what B would
read of A's write. What the caller's hooks add behind the last stream is divided by no scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_hooks.inputs.entries import Entries
from dla_hooks.projection.reading_point import Reading
from dla_hooks.results.rows import Row, Words
from dla_hooks.units.base import RankedSplit, Split
from dla_hooks.units.plan import Measurement

OWN, OTHER = slice(0, None, 2), slice(1, None, 2)
"""The two halves of the entries of :class:`dla_hooks.targets.pair.PairTarget`."""


@dataclass(frozen=True)
class TwoWays:
    """The rows of one unit in one run, measured two ways, in float64.

    Attributes:
        rows: a record for each.
        own_CN: on the run's own directions, through its own final scale.
        other_CN: what the other run's directions and scale would make of the same writes.
        there_CN: which rows there are at each entry.
        beside: what the unit puts beside each row, by name [C, N].
        left_WN: for a ranked unit what no row holds, both ways [2, N]; else None.
    """

    rows: Sequence[Row]
    own_CN: Tensor
    other_CN: Tensor
    there_CN: Tensor
    beside: Mapping[str, Tensor]
    left_WN: Tensor | None = None

    def only(self, words: Words, labels: Sequence[str]) -> TwoWays:
        """The same with these rows, in their order; one that is not there counts nothing.

        Of running sums it is what the row before it is.
        """
        number_of = {row.label: number for number, row in enumerate(self.rows)}
        if list(number_of) == list(labels):
            return self
        places, last = list[int](), -1
        for label in labels:
            last = number_of.get(label, last if words.cumulative else -1)
            places.append(last)
        index = torch.tensor(places, device=self.own_CN.device)
        missing = index < 0

        def taken(numbers_CN: Tensor) -> Tensor:
            found = numbers_CN[index.clamp(min=0)]
            return found.masked_fill(missing[:, None], 0)

        return dataclasses.replace(
            self,
            rows=[self.rows[max(place, 0)] for place in places],
            own_CN=taken(self.own_CN),
            other_CN=taken(self.other_CN),
            there_CN=taken(self.there_CN),
            beside={name: taken(own) for name, own in self.beside.items()},
        )

    def on(self, device: torch.device) -> TwoWays:
        """The same numbers on a device."""
        left = self.left_WN
        return dataclasses.replace(
            self,
            own_CN=self.own_CN.to(device),
            other_CN=self.other_CN.to(device),
            there_CN=self.there_CN.to(device),
            beside={name: own.to(device) for name, own in self.beside.items()},
            left_WN=None if left is None else left.to(device),
        )


def own_half(found: Measurement, own: Any, entries: Entries) -> Measurement:
    """The measurement of the run's own target alone.

    Args:
        found: of both targets.
        own: the run's own target.
        entries: of that.
    """
    splits = {key: _half(split, OWN) for key, split in found.splits.items()}
    return dataclasses.replace(
        found,
        plan=dataclasses.replace(found.plan, target=own),
        entries=entries,
        reading=_half(found.reading, OWN),
        splits=splits,
    )


def two_ways(
    found: Measurement, split: Split | RankedSplit, words: Words, other_N: Tensor, factor: float
) -> TwoWays:
    """A unit's rows both ways.

    Args:
        found: what the run has measured, of both targets.
        split: the unit's rows; of a ranked unit all of them.
        words: of the unit.
        other_N: the other run's final scale at each entry.
        factor: what the other's directions were multiplied by.
    """
    reading = found.reading
    ratio_N = reading.scale_N[OWN].double() / other_N.to(reading.scale_N.device).double()

    def of_other(values_CN: Tensor, behind_N: Tensor | int = 0) -> Tensor:
        """The other half of numbers, through the other's scale; hooks behind it as they are."""
        hooks_N = behind_N[OTHER].double() / factor if isinstance(behind_N, Tensor) else 0
        return (values_CN[..., OTHER].double() / factor - hooks_N) * ratio_N + hooks_N

    rows, values_CN, there_CN, beside = _every_row(split)
    other_CN, left_WN = of_other(values_CN), None
    if isinstance(split, RankedSplit):
        left_N, hooks_N = split.remainder_N, sum(reading.hooks_RN.values())
        other_left_N = of_other(left_N, hooks_N[0] if isinstance(hooks_N, Tensor) else 0)
        left_WN = torch.stack((left_N[OWN].double(), other_left_N))
    else:
        for number, added_N in _behind(rows, words, reading).items():
            other_CN[number] = of_other(values_CN[number], added_N)
    return TwoWays(
        rows,
        values_CN[:, OWN].double(),
        other_CN,
        there_CN[:, OWN],
        {name: own[:, OWN].double() for name, own in beside.items()},
        left_WN,
    )


def _half(numbers: Any, half: slice) -> Any:
    """A dataclass of tensors [..., N] with one half of the entries; the rest stays as it is."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(numbers):
        value = getattr(numbers, field.name)
        if field.name.endswith("N") and isinstance(value, Tensor):
            changed[field.name] = value[..., half]
        elif field.name in ("beside", "hooks_RN"):
            changed[field.name] = {name: own[..., half] for name, own in value.items()}
    return dataclasses.replace(numbers, **changed)


def _behind(rows: Sequence[Row], words: Words, reading: Reading) -> dict[int, Tensor]:
    """What of each row, by its number, hooks have added behind the last stream [N]."""
    added = {label: added_RN[0] for label, added_RN in sorted(reading.hooks_RN.items())}
    if not added:
        return {}
    so_far, whole = dict[str, Tensor](), torch.zeros_like(reading.scale_N)
    for label, added_N in added.items():
        whole = so_far[label] = whole + added_N
    found = dict[int, Tensor]()
    for number, row in enumerate(rows):
        if words.remainder and row.label == words.remainder:
            found[number] = whole
        elif row.kind == "hook" and row.label in added:
            found[number] = (so_far if words.cumulative else added)[row.label]
    return found


def _every_row(
    split: Split | RankedSplit,
) -> tuple[Sequence[Row], Tensor, Tensor, Mapping[str, Tensor]]:
    """All rows, their numbers, where they are, and what stands beside them."""
    if isinstance(split, Split):
        there_CN = torch.ones_like(split.values_CN, dtype=torch.bool)
        return split.rows, split.values_CN, there_CN, split.beside
    n_rows = len(split.rows)
    index_KN = torch.where(split.index_KN < 0, n_rows, split.index_KN)  # no row: behind the last

    def spread(numbers_KN: Tensor) -> Tensor:
        found = numbers_KN.new_zeros(n_rows + 1, numbers_KN.shape[1])
        return found.scatter_(0, index_KN, numbers_KN)[:n_rows]

    there_RN = spread(torch.ones_like(index_KN, dtype=torch.bool))
    beside = {name: spread(own_KN) for name, own_KN in split.beside.items()}
    return split.rows, spread(split.values_KN), there_RN, beside
