"""Rows of the stream held against the model's own logits, token by token over the vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dla_hooks.errors import NonFiniteError
from dla_hooks.modules.weights import run_device
from dla_hooks.residual.stream import coarsest
from dla_hooks.stacks.checks import failure
from dla_hooks.stacks.kept import Kept
from dla_hooks.stacks.own_logits import columns_of
from dla_hooks.targets.base import Observed
from dla_hooks.tolerance import tolerance

_MASKED = 50.0
"""How many spreads below the largest logit a token is masked by the model."""


class EveryLogit:
    """All logits at a few of the selected positions: the rows' sum, the last stream's, the model's.

    Attributes:
        columns: of the prompt, where the model's own logits are wanted; None where they are not.
        gap: the largest difference so far between rows with the bias and the model's own logits;
            NaN where none was looked at.
    """

    def __init__(self, kept: Kept) -> None:
        self._kept, self.columns, self.gap = kept, columns_of(kept), math.nan
        self._observed: Observed | None = None

    def see(self, logits: Tensor | None) -> None:
        """Take the model's own logits [batch, n_columns, vocabulary], after the run.

        Raises:
            NonFiniteError: where one of them is NaN or +inf.
        """
        if logits is None or self.columns is None:
            return
        if bool((logits.isnan() | (logits == torch.inf)).any()):
            raise NonFiniteError("one of the model's own logits is NaN or infinite")
        self._observed = Observed.at(self._kept.entries, self.columns, logits)
        self._spread = self._observed.spread()
        cap = self._kept.stream.softcap
        self._uncapped = self._spread if cap is None else self._observed.spread(cap)

    def part(self, place: slice, n_rows: int, whole: slice) -> LogitsHeld | None:
        """Begin with some of the entries; None where nothing is looked at in them.

        Args:
            place: of the entries.
            n_rows: the rows of each.
            whole: which of the rows make up the whole.
        """
        seen = self._observed
        if seen is None:
            return None
        inside = (seen.entries_E >= place.start) & (seen.entries_E < place.stop)
        if not bool(inside.any()):
            return None
        at, stream = inside.to(seen.logits_BSV.device), self._kept.stream
        theirs = seen.logits_BSV[seen.row_E[at], seen.column_E[at]]
        theirs = theirs.to(run_device(stream.unembed), stream.work_dtype)
        return LogitsHeld(seen.entries_E[inside] - place.start, n_rows, whole, theirs)

    def hold(self, part: LogitsHeld, constants: Tensor) -> None:
        """Compare, when all tiles have come.

        Args:
            part: what was added up.
            constants: of every token: its own bias, and the norm's [vocabulary].

        Raises:
            DecompositionError: when they differ by more than rounding.
        """
        stream, n_writes = self._kept.stream, len(self._kept.stream.writes)
        spread, uncapped = self._spread, self._uncapped
        largest = float(part.largest.max())
        if stream.backend.scores_labels:  # labels are few, and may be close
            spread, uncapped = max(spread, largest), max(uncapped, largest)
        rounding = 2 * torch.finfo(stream.coarsest_dtype).eps * math.sqrt(part.n_rows) * largest
        added = coarsest((stream.stream_dtype, stream.write_dtype))
        relative = tolerance(added, n_writes)[0]
        gap = float((part.total - part.last).abs().max())
        if not gap <= relative * uncapped + rounding:
            raise failure(self._kept, "the rows' logits", gap, uncapped, relative)
        high = part.theirs.amax(-1, keepdim=True)
        compared = part.theirs >= high - _MASKED * self._spread
        own, ours = (self._capped(each + constants) for each in (part.last, part.total))
        gap = float((own - part.theirs).abs()[compared].max())
        relative = tolerance(stream.coarsest_dtype, n_writes)[1]
        coarse = 2 * torch.finfo(stream.coarsest_dtype).eps
        coarse *= float(part.theirs[compared].abs().max())
        if not gap <= relative * spread + coarse + rounding:
            raise failure(self._kept, "the last stream's logits", gap, spread, relative)
        of_rows = float((ours - part.theirs).abs()[compared].max())
        self.gap = of_rows if math.isnan(self.gap) else max(self.gap, of_rows)

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self._kept.stream.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class LogitsHeld:
    """What is added up at a few entries, over tiles of tokens.

    The vectors come row by row, each row with all entries of its tile; then the last stream at the
    few entries, and one vector for what is the same everywhere.

    Attributes:
        entries: their numbers in the tile of entries.
        n_rows: how many rows there are.
        theirs: the model's own logits [e, vocabulary].
        total: the sum of the rows that make up the whole.
        last: the last stream's own.
        largest: the largest absolute value of any row.
        constant: of what is the same everywhere [vocabulary].
    """

    def __init__(self, entries: Tensor, n_rows: int, whole: slice, theirs: Tensor) -> None:
        self.entries: list[int] = entries.tolist()
        self.n_rows, self._whole, self.theirs = n_rows, range(n_rows)[whole], theirs
        self.total, self.last, self.largest = (torch.zeros_like(theirs) for _ in range(3))
        self.constant = torch.zeros_like(theirs[0])

    def add(self, vectors: slice, tokens: slice, values: Tensor, n_entries: int) -> None:
        """Add a tile of logits [vectors, tokens], of rows with so many entries each."""
        tokens = slice(tokens.start, min(tokens.stop, len(self.constant)))
        values = values[:, : tokens.stop - tokens.start]
        n_parts = self.n_rows * n_entries
        parts = values[: max(0, n_parts - vectors.start)]
        for place, entry in enumerate(self.entries):
            first = (entry - vectors.start) % n_entries  # among the vectors of this tile
            if first < len(parts):
                self._add(
                    place, (vectors.start + first) // n_entries, tokens, parts[first::n_entries]
                )
        for number in range(max(n_parts, vectors.start), vectors.stop):
            place = number - n_parts
            target = self.last[place] if place < len(self.last) else self.constant
            target[tokens] = values[number - vectors.start]

    def _add(self, place: int, row: int, tokens: slice, values: Tensor) -> None:
        """Add some rows' logits [rows, tokens] at one entry, from a row on."""
        size = self.largest[place, tokens]
        torch.maximum(size, values.abs().amax(0), out=size)
        self.total[place, tokens] += values[max(0, self._whole.start - row) :].sum(0)
