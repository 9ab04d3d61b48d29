"""The parts of one model's stream, with the directions that each is projected on."""

from __future__ import annotations

import torch
from torch import Tensor

from dla_hooks.calibration.embedding_factor import embeddings_enter
from dla_hooks.projection.directions import Directions
from dla_hooks.residual.gains import constant_label, path_factors, product, times
from dla_hooks.residual.hooked import Hooked, hook_factor
from dla_hooks.residual.stream import Block, Stream
from dla_hooks.results.rows import Row

EMBED, POSITIONS = "embed", "pos_embed"


class PartsPlan:
    """The parts of one model's stream, with the directions that each is projected on.

    Args:
        stream: the located model.
        directions: of the target, at the last stream.
        by_itself: whether a unit reads each part by itself. Otherwise positions are seen with the
            tokens only.

    Attributes:
        rows: a record for each part, in stream order; hooks are not among them.
        n_embeddings: how many of them begin the stream.
        row_of: the row of each part, by its label.
        places: where each part is seen, by its label; constants are not.
    """

    def __init__(self, stream: Stream, directions: Directions, by_itself: bool = True) -> None:
        self.stream, self.by_itself = stream, by_itself
        self.rows = [Row(EMBED, EMBED)]
        positions = stream.positions if by_itself else None
        if positions is not None:
            self.rows.append(Row(POSITIONS, POSITIONS))
        self.n_embeddings = len(self.rows)
        for block in stream.blocks:
            self.rows += [Row(write.label, write.kind, block.layer) for write in block.writes]
            if block.constant is not None:
                self.rows.append(Row(constant_label(block), "constant", block.layer))
        self.row_of = {row.label: index for index, row in enumerate(self.rows)}
        self._rows_of: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}
        self.places = {EMBED: stream.beginning}
        if positions is not None:
            self.places[POSITIONS] = positions
        self.places |= {write.label: write.place for write in stream.writes}
        self._factors = path_factors(stream)
        self._target = directions
        directions.prepare()
        self._directions = {row.label: self._times(self._factors[row.label]) for row in self.rows}
        # What a block adds besides its writes, by its row; no run has to show it.
        self.constants_K = {
            self.row_of[label]: self._directions[label].of_constant(block.constant)
            for label, block in ((constant_label(block), block) for block in stream.blocks)
            if block.constant is not None
        }

    def rows_of(self, labels: tuple[str, ...], device: torch.device) -> Tensor:
        """The numbers of some parts' rows, for indexing on a device; each made once."""
        key = labels, device
        found = self._rows_of.get(key)
        if found is None:
            rows = [self.row_of[label] for label in labels]
            found = self._rows_of[key] = torch.tensor(rows, device=device)
        return found

    def directions(self, label: str) -> Directions:
        """What one part is projected on: the target's directions, through all later gains."""
        return self._directions[label]

    def of_hooks(self, hooked: Hooked) -> Directions:
        """What the caller's hooks write at a place is projected on these."""
        return self._times(hook_factor(hooked, self._factors))

    def behind(self, block: Block) -> Directions:
        """What is added to the stream behind a block is projected on these."""
        return self._times(self._factors[constant_label(block)])

    def of_embeddings(self) -> Directions | None:
        """The same for the token embeddings; None where these are no term, as behind a norm."""
        is_linear, factor = embeddings_enter(self.stream)
        return self._times(product(factor, self._factors[EMBED])) if is_linear else None

    def _times(self, factor: Tensor | None) -> Directions:
        if factor is None:
            return self._target
        return self._target.then(lambda d_KM: times(d_KM, factor))
