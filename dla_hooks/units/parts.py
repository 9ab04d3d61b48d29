"""The parts: every term of the residual stream, measured one by one in every run.

Whatever the unit, the parts are what a call is checked by: their sum must be the last stream's own
projection. Some units are made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.errors import CacheEntryError
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.kernels import project, project_constant
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.reading_point import Reading
from dla_hooks.projection.tiles import View
from dla_hooks.residual.gains import constant_label, path_factors, times
from dla_hooks.residual.stream import Stream
from dla_hooks.results.rows import Row

EMBED, POSITIONS = "embed", "pos_embed"

Missing = Callable[[Place], CacheEntryError | None]
"""Why a source of activations does not have a place; None where it has it."""


class PartsPlan:
    """The parts of one model's stream, with the directions that each is projected on.

    Args:
        stream: the located model.
        directions: of the target, at the last stream.

    Attributes:
        rows: a record for each part, in stream order.
        n_embeddings: how many of them begin the stream.
        last_of_block: for every block, the row of the last part that it adds.
    """

    def __init__(self, stream: Stream, directions: Directions) -> None:
        self.stream = stream
        self.rows = [Row(EMBED, EMBED)]
        if stream.positions is not None:
            self.rows.append(Row(POSITIONS, POSITIONS))
        self.n_embeddings = len(self.rows)
        self.last_of_block: list[int] = []
        for block in stream.blocks:
            self.rows += [Row(write.label, write.kind, block.layer) for write in block.writes]
            if block.constant is not None:
                self.rows.append(Row(constant_label(block), "constant", block.layer))
            self.last_of_block.append(len(self.rows) - 1)
        self.row_of = {row.label: index for index, row in enumerate(self.rows)}
        self._factors = path_factors(stream)
        self._target = directions
        directions.prepare()
        self._directions = {row.label: self._make(row.label) for row in self.rows}

    def directions(self, label: str) -> Directions:
        """What one part is projected on: the target's directions, through all later gains."""
        return self._directions[label]

    def recorder(self, view: View, missing: Missing) -> PartsRecorder:
        """A recorder for one prompt.

        Args:
            view: all entries that are read.
            missing: why the source of activations does not have a place; None where it has it.
        """
        return PartsRecorder(self, view, missing)

    def _make(self, label: str) -> Directions:
        factor = self._factors[label]
        if factor is None:
            return self._target
        return self._target.then(lambda d_KM: times(d_KM, factor))


class PartsRecorder:
    """Records the parts in one run.

    Args:
        plan: the parts.
        view: all entries that are read.
        missing: why the source of activations does not have a place, or None. Parts at such
            places are left out; only a unit that needs them says so.
    """

    def __init__(self, plan: PartsPlan, view: View, missing: Missing) -> None:
        self._plan = plan
        self._rows = FixedRows(len(plan.rows), len(view), plan.stream.work_dtype)
        self._view = view
        stream = plan.stream
        places = {EMBED: stream.start}
        if stream.positions is not None:
            places[POSITIONS] = stream.positions
        places |= {write.label: write.place for write in stream.writes}
        found = {label: missing(place) for label, place in places.items()}
        self._missing = {label: reason for label, reason in found.items() if reason is not None}
        self._places = {k: place for k, place in places.items() if k not in self._missing}

    def taps(self, view: View) -> list[Tap]:
        """What to watch while the entries in view are run."""
        return [self._tap(label, place, view) for label, place in self._places.items()]

    def finish(self, reading: Reading) -> Parts:
        """The parts, after the run."""
        plan, device = self._plan, reading.scale_N.device
        values_CN = self._rows.gathered(device)
        view = self._view
        for block in plan.stream.blocks:
            if block.constant is not None:
                label = constant_label(block)
                row_N = values_CN[plan.row_of[label]]
                project_constant(block.constant, view, plan.directions(label), row_N)
        finite_C = torch.isfinite(values_CN).all(-1)
        values_CN /= reading.scale_N
        return Parts(plan, values_CN, self._missing, finite_C, reading, view)

    def _tap(self, label: str, place: Place, view: View) -> Tap:
        row, directions = self._plan.row_of[label], self._plan.directions(label)

        def see(call: Call) -> None:
            x = call.activation
            project(x, view, directions, self._rows.on(x.device)[row])

        return Tap(place, see)


@dataclass(frozen=True)
class Parts:
    """The parts of one prompt, measured.

    Attributes:
        plan: what they are.
        raw_CN: what stood at each part's place, in logits. The first row is the whole beginning
            of the stream, positions included; rows of missing parts are zero.
        missing: labels of the parts that the source of activations did not show, and why.
        finite_C: whether each part was finite before the division by the final scale.
        reading: what the final norm saw: the whole stream, measured apart.
        view: all entries, for what is the same at every position.
    """

    plan: PartsPlan
    raw_CN: Tensor
    missing: Mapping[str, CacheEntryError]
    finite_C: Tensor
    reading: Reading
    view: View

    @property
    def complete(self) -> bool:
        """Whether every part was measured; positions are within the embeddings."""
        return not set(self.missing) - {POSITIONS}

    @property
    def values_CN(self) -> Tensor:
        """Contribution of each part at each entry.

        Raises:
            CacheEntryError: when a part was not shown.
        """
        self._require(self.missing)
        # What begins the stream is the sum of the embeddings. The tokens' part is what positions
        # leave of it, with whatever scaling, norm or projection the model puts on it.
        if self.plan.n_embeddings == 1:
            return self.raw_CN
        values_CN = self.raw_CN.clone()
        values_CN[0] -= values_CN[1]
        return values_CN

    @property
    def running_CN(self) -> Tensor:
        """The running sum of the parts, from the end of the embeddings on [1 + writes, N].

        Raises:
            CacheEntryError: when a write was not shown. Embeddings need not be told apart.
        """
        self._require(label for label in self.missing if label != POSITIONS)
        n = self.plan.n_embeddings
        return torch.cat((self.raw_CN[:1], self.raw_CN[n:])).cumsum(0)

    @property
    def sum_N(self) -> Tensor:
        """The sum of all parts [N]."""
        n = self.plan.n_embeddings
        return self.raw_CN[0] + self.raw_CN[n:].sum(0)

    def __getitem__(self, label: str) -> Tensor:
        """What one write contributed [N]."""
        return self.raw_CN[self.plan.row_of[label]]

    def _require(self, labels: Iterable[str]) -> None:
        for label in labels:
            raise self.missing[label]
