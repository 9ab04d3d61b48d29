"""One run of a model: what every unit shares, and the forward pass itself.

:class:`Run` holds the plan of a call (stream, entries, directions) and the scalars it gathers. Its
own rows are the *parts*: every term of the residual stream, measured one by one, whatever the
unit. Units add rows of their own, and the parts are what each call is checked by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dla_hooks.inputs.entries import Entries
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.hooks import Call, Place, Tap, tapped
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.kernels import project, project_constant
from dla_hooks.projection.ledger import Scalars
from dla_hooks.projection.reading_point import FinalStream
from dla_hooks.residual.gains import constant_label, path_factors, times
from dla_hooks.residual.stream import Stream
from dla_hooks.sources.live import chunks
from dla_hooks.targets.base import Targets
from dla_hooks.targets.tokens import read_out

if TYPE_CHECKING:
    from dla_hooks.sources.stored_cache import Replay


class Run:
    """The plan and the scalars of one call.

    Args:
        stream: the located model.
        entries: where the stream is read.
        targets: what is attributed there.
        center_unembed: see :func:`dla_hooks.targets.tokens.read_out`.
        fold_value_biases: see :mod:`dla_hooks.calibration.value_biases`.

    Attributes:
        labels: names of the parts, in stream order.
        last_of_block: for every block, the row of the last part that it adds.
        has_parts: whether the parts were measured, as they are in every run.
        final: what the final norm saw.
        finite_C: whether each part is finite, before the division by the final scale; once the
            model has run.
        parts_CN: contribution of each part to the logit (difference) at each site; as above.
    """

    finite_C: Tensor
    parts_CN: Tensor

    def __init__(
        self,
        stream: Stream,
        entries: Entries,
        targets: Targets,
        *,
        center_unembed: bool = False,
        fold_value_biases: bool = False,
    ) -> None:
        self.stream = stream
        self.entries = entries
        self.fold_value_biases = fold_value_biases
        self.readout = read_out(stream, targets, center_unembed=center_unembed)
        readouts = [self.readout]
        if stream.softcap is not None and targets.incorrect is not None:
            # The cap acts on each logit, not on their difference: measure both for the check.
            for ids in (targets.correct, targets.incorrect):
                readouts.append(read_out(stream, Targets(ids, None), center_unembed=False))
        self.final = FinalStream(stream, entries, readouts)

        self.labels = ["embed"]
        if stream.positions is not None:
            self.labels.append("pos_embed")
        self.last_of_block: list[int] = []
        for block in stream.blocks:
            self.labels += [write.label for write in block.writes]
            if block.constant is not None:
                self.labels.append(constant_label(block))
            self.last_of_block.append(len(self.labels) - 1)
        self._row = {label: row for row, label in enumerate(self.labels)}
        self.readout.directions.prepare()
        self._factors = path_factors(stream)
        self._scalars = Scalars(len(self.labels), len(entries), stream.work_dtype)
        self.has_parts = True

    def part(self, label: str) -> Tensor:
        """The row [N] of one part."""
        return self.parts_CN[self._row[label]]

    def directions(self, label: str) -> Directions:
        """What one part is projected on: d, through all later gains."""
        factor = self._factors[label]
        d = self.readout.directions
        return d if factor is None else d.then(lambda d_KM: times(d_KM, factor))

    def replay(self, cache: Replay, taps: list[Tap], *, parts: bool) -> None:
        """The same from a stored cache, instead of a run.

        Args:
            cache: the source of activations.
            taps: the unit's own taps.
            parts: whether the unit is made of the parts. Otherwise a cache need not hold them;
                then they are NaN, and nothing is checked by them.
        """
        own = self._taps()
        if not parts and not all(cache.holds(tap) for tap in own):
            own = []
            self._scalars.on(torch.device("cpu")).fill_(float("nan"))
        self.has_parts = bool(own)
        cache.play([*own, *self.final.taps, *taps])
        self._finish()

    def forward(
        self,
        prompt: Prompt,
        taps: list[Tap],
        columns: Tensor | None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Run the model once, with the parts' taps and a unit's on it.

        Args:
            prompt: what to run on.
            taps: the unit's own taps.
            columns: where the model's own logits are wanted, or None for the least it can do.
            chunk_size: run so many columns at a time, against the model's own cache of what came
                before; None is all at once. Chunks without a site are run without taps.

        Returns:
            Logits [batch, n_columns, vocabulary].
        """
        taps = [*self._taps(), *self.final.taps, *taps]
        logits = []
        for chunk, run in chunks(self.stream.backend, prompt, columns, chunk_size):
            seen = self.entries.look_at(chunk.start, chunk.stop)
            with tapped(taps if seen or chunk_size is None else []):
                logits.append(run())
        self.entries.look_at(0, prompt.shape[1])
        self._finish()
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)

    def _taps(self) -> list[Tap]:
        stream = self.stream

        def tap(place: Place, label: str) -> Tap:
            row, directions = self._row[label], self.directions(label)

            def see(call: Call) -> None:
                out = call.activation
                project(out, self.entries, directions, self._scalars.on(out.device)[row])

            return Tap(place, see)

        taps = [tap(stream.start, "embed")]
        if stream.positions is not None:
            taps.append(tap(stream.positions, "pos_embed"))
        taps += [tap(write.place, write.label) for write in stream.writes]
        return taps

    def _finish(self) -> None:
        self.final.finish()
        device = self.final.scale_N.device
        self.parts_CN = self._scalars.gathered(device)
        # What enters block 0 is the sum of the embeddings; the tokens' part is what positions
        # leave of it, with whatever scaling, norm or projection the model puts on it.
        if self.stream.positions is not None:
            self.part("embed").sub_(self.part("pos_embed"))
        for block in self.stream.blocks:
            if block.constant is not None:
                label = constant_label(block)
                project_constant(
                    block.constant, self.entries, self.directions(label), self.part(label)
                )
        self.finite_C = torch.isfinite(self.parts_CN).all(-1)
        self.parts_CN /= self.final.scale_N
