"""A run's own target beside another run's: two directions at every entry.

Two runs are compared without keeping a vector of either. Each run measures every row on its own
directions and on the other's, through its own gains, norms and output maps. The model says what the
first of the two numbers must be; the other half is held against the stream's own projection.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.positions import Selection
from dla_hooks.projection.directions import Directions, few
from dla_hooks.projection.reading_point import Reading
from dla_hooks.projection.readout import Readout
from dla_hooks.targets.base import Observed, Target, Witness

_SAMPLE = 64
"""Directions whose lengths are looked at."""
_MOST_LENT = 2**24
"""Numbers of directions that are made ahead of both runs: 64 MiB in float32."""
_AT_ONCE = 256


class PairTarget(Target):
    """A run's own target, and another run's at the same entries.

    Args:
        own: the target of this run.
        other: the other run's reading of the same thing, one direction for each of ``own``.

    Attributes:
        own: the same.
        factor: what the other's directions are multiplied by, a power of two. Both halves are then
            of one size, as the check expects of them.
    """

    def __init__(self, own: Target, other: Readout) -> None:
        self.own, self.stream, self.point = own, own.stream, own.point
        self.reads_logits, self.until = own.reads_logits, own.until
        first = own.readouts[0].directions
        if len(first) != len(other.directions):
            raise InputError(
                f"the two runs have {len(first)} and {len(other.directions)} distinct targets; "
                "ask both for the same"
            )
        self.factor = _factor(first, other.directions)
        self.readouts = [_joined(readout, other, self.factor) for readout in own.readouts]
        self._n_own = len(first)
        if own.witness is not None:  # it knows nothing of the other's directions
            self.witness = dataclasses.replace(
                own.witness, directions=_padded(own.witness, len(self))
            )

    def __len__(self) -> int:
        return len(self.readouts[0].directions)

    def witnessed(self, entries: Entries) -> Tensor:
        """The own half of the entries."""
        return entries.target < self._n_own

    def align(
        self, selection: Selection, prompt_shape: tuple[int, int], batched: bool = True
    ) -> Entries:
        """Lay out each entry of the own target twice: a last axis of (own, other).

        Raises:
            ShapeMismatchError: as the own target does.
        """
        entries = self.own.align(selection, prompt_shape, batched)
        valid = entries.unfold(torch.ones_like(entries.rows, dtype=torch.bool), padding=False)
        target = entries.target_of_entry
        return Entries(
            _twice(entries.unfold(entries.rows, padding=0)),
            _twice(entries.unfold(entries.cols, padding=0)),
            torch.stack((target, target + self._n_own), -1),
            _twice(valid),
            prompt_shape,
            batched,
            entries.mask,
        )

    def own_and_theirs(self, reading: Reading, observed: Observed) -> tuple[Tensor, Tensor]:
        """What the own target compares, at its own half of the entries."""
        return self.own.own_and_theirs(reading, self._own(observed))

    def sizes(self, target_N: Tensor) -> Tensor | None:
        """As of the own target: both halves are of one size."""
        return self.own.sizes(target_N % self._n_own)

    def largest(self, observed: Observed) -> float:
        """As of the own target."""
        return self.own.largest(self._own(observed))

    def seen_by_own(self, observed: Observed) -> Observed:
        """What was seen, for the entries of the own target alone."""
        own = self._own(observed)
        return dataclasses.replace(own, entries_E=own.entries_E // 2)

    def _own(self, observed: Observed) -> Observed:
        kept = observed.target_E < self._n_own
        return dataclasses.replace(
            observed,
            row_E=observed.row_E[kept.to(observed.row_E.device)],
            column_E=observed.column_E[kept.to(observed.column_E.device)],
            entries_E=observed.entries_E[kept],
            target_E=observed.target_E[kept],
        )


def lent(readout: Readout, *, ahead: bool) -> Readout:
    """A run's reading for another run to measure, where directions may be made during that run.

    Args:
        readout: of the run that lends it.
        ahead: make all directions now. A context that changes the lending model's weights may be
            left when the other run asks for them.

    Raises:
        InputError: when these are too many to be made ahead.
    """
    if not ahead:
        return readout
    behind = None if readout.behind is None else _made(readout.behind())
    made = _made(readout.directions)
    return dataclasses.replace(
        readout, directions=made, behind=None if behind is None else lambda: behind
    )


def _made(directions: Directions) -> Directions:
    n, width = (
        len(directions),
        _some(directions, torch.zeros(1, dtype=torch.long, device="cpu")).shape[-1],
    )
    if n > 1 and n * width > _MOST_LENT:
        raise InputError(
            f"{n} different targets with other_context: their directions have to be made ahead of "
            f"both runs, and {_MOST_LENT // width} of them fit. Select fewer positions, ask for "
            "one token, or give a second model object as other, without other_context"
        )
    every = torch.arange(n, device="cpu").split(_AT_ONCE)
    return Directions.held(torch.cat([_some(directions, some) for some in every]))


def _joined(own: Readout, other: Readout, factor: float) -> Readout:
    """The own targets, and behind them the other's."""
    n_own, behind, pick = len(own.directions), None, None
    if own.behind is not None and other.behind is not None:
        make, lend = own.behind, other.behind

        def behind() -> Directions:
            return _side_by_side(make(), lend(), factor)

    if own.of_logits is not None and other.of_logits is not None:
        first, second = own.of_logits, other.of_logits

        def pick(logits_EV: Tensor, target_E: Tensor) -> Tensor:
            picks = ((first, own.scale()), (second, other.scale() * factor))
            return _picked(logits_EV, target_E, n_own, picks)

    bias_K = torch.cat((own.bias_K, factor * other.bias_K.to(own.bias_K)))
    directions = _side_by_side(own.directions, other.directions, factor)
    return Readout(directions, bias_K, behind, pick)


def _picked(
    logits_EV: Tensor,
    target_E: Tensor,
    n_own: int,
    picks: Sequence[tuple[Callable[[Tensor, Tensor], Tensor], float]],
) -> Tensor:
    """Both readings of logits, each at its own entries."""
    is_own = target_E < n_own
    found = torch.zeros(len(target_E), dtype=torch.float64, device=logits_EV.device)
    halves = ((is_own, target_E), (~is_own, target_E - n_own))
    for (here, target), (of_logits, scale) in zip(halves, picks, strict=True):
        place = here.to(logits_EV.device)
        found[place] = scale * of_logits(logits_EV[place], target[here]).to(found)
    return found


def _side_by_side(own: Directions, other: Directions, factor: float) -> Directions:
    """Own directions, then the other's times a factor, with the device and dtype of the own."""
    n_own, n = len(own), len(own) + len(other)
    home = _some(own, torch.zeros(1, dtype=torch.long, device="cpu"))

    def make(targets: Tensor) -> Tensor:
        is_own = targets < n_own
        d_KM = home.new_empty(len(targets), home.shape[-1])
        halves = ((own, is_own, targets, 1.0), (other, ~is_own, targets - n_own, factor))
        for directions, here, target, times in halves:
            if bool(here.any()):
                d_KM[here.to(d_KM.device)] = times * _some(directions, target[here]).to(d_KM)
        return d_KM

    if few(n, home.shape[-1]):
        return Directions.held(make(torch.arange(n, device="cpu")))
    return Directions(make, n, home.dtype)


def _some(directions: Directions, targets: Tensor) -> Tensor:
    """The directions of some targets, one row for each of them."""
    return directions.of(targets).expand(len(targets), -1)


def _factor(own: Directions, other: Directions) -> float:
    """The power of two that makes the other's directions as long as the own."""
    some = torch.arange(min(len(own), _SAMPLE), device="cpu")
    lengths = [float(_some(one, some).double().norm()) for one in (own, other)]
    if not all(0 < length < math.inf for length in lengths):
        return 1.0
    return 2.0 ** round(math.log2(lengths[0] / lengths[1]))


def _padded(witness: Witness, n_targets: int) -> Directions:
    """The witness's directions, and zeros for further targets."""
    own = witness.directions
    d_KM = _some(own, torch.arange(len(own), device="cpu"))
    more = d_KM.new_zeros(n_targets - len(own), d_KM.shape[-1])
    return Directions.held(torch.cat((d_KM, more)))


def _twice(values: Tensor) -> Tensor:
    return torch.stack((values, values), -1)
