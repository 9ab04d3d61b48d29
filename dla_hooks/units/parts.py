"""The parts: every term of the residual stream, measured one by one in every run.

Whatever the unit, the parts are what a call is checked by: their sum must be the last stream's own
projection. Some units are made of them. What the caller's hooks write to the stream beside the
writes is a part, too; it is there in runs on a model with such hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dla_hooks.errors import CacheEntryError
from dla_hooks.inputs.entries import Entries
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.user_hooks import EMBED_HOOK, FINAL_HOOK, is_hooked
from dla_hooks.projection.between_writes import BetweenWrites
from dla_hooks.projection.hook_writes import HookWrites
from dla_hooks.projection.kernels import project
from dla_hooks.projection.ledger import FixedRows, largest
from dla_hooks.projection.one_column import OneColumn
from dla_hooks.projection.reading_point import Reading
from dla_hooks.projection.tiles import View
from dla_hooks.residual.between import Between, places_between
from dla_hooks.residual.gains import constant_label
from dla_hooks.residual.hooked import Hooked, hook_label, hooked_places
from dla_hooks.residual.stream import Block
from dla_hooks.results.rows import Row
from dla_hooks.units.parts_plan import EMBED, POSITIONS, PartsPlan

Missing = Callable[[Place], CacheEntryError | None]
"""Why a source of activations does not have a place; None where it has it."""


class PartsRecorder:
    """Records the parts in one run.

    Args:
        plan: the parts.
        entries: all that are read.
        missing: why the source does not have a place, or None. Its part is then left out, and only
            a unit that needs it says so.
        told: labels of the writes that the rows of a unit make up: these are not looked at.
    """

    def __init__(
        self, plan: PartsPlan, entries: Entries, missing: Missing, told: Sequence[str] = ()
    ) -> None:
        self._plan, self._told = plan, tuple(told)
        stream, dtype = plan.stream, plan.stream.work_dtype
        self._rows = FixedRows(len(plan.rows), len(entries), dtype)
        self._entries = entries
        found = {label: missing(place) for label, place in plan.places.items()}
        self._missing = {label: reason for label, reason in found.items() if reason is not None}
        unseen = {*self._missing, *self._told}
        self._places = {k: place for k, place in plan.places.items() if k not in unseen}
        self._hooked = list(hooked_places(stream))
        writes = [(hooked.place, plan.of_hooks(hooked)) for hooked in self._hooked]
        if is_hooked(stream.embedding):
            directions = plan.of_embeddings()
            if directions is not None:
                writes.append((stream.embedding, directions))
        self._hooks = HookWrites(writes, len(entries), dtype) if writes else None
        between = [(place, plan.behind(place.block)) for place in places_between(stream)]
        self._between = BetweenWrites(between, len(entries), dtype) if between else None

    def taps(self, view: View) -> list[Tap]:
        """What to watch while the entries in view are run."""
        one = OneColumn.of(view)
        taps = [self._tap(label, place, view, one) for label, place in self._places.items()]
        for beside in (self._hooks, self._between):
            taps += beside.taps(view) if beside is not None else []
        return taps

    def again(self) -> bool:
        """Make ready for another run; False where more than the parts is looked at."""
        return self._hooks is None and self._between is None and self._rows.again()

    def finish(self, reading: Reading, told_LN: Tensor | None = None) -> Parts:
        """The parts, after the run.

        Args:
            reading: what the final norm saw.
            told_LN: the writes that were not looked at, not divided by the final scale.
        """
        plan, device = self._plan, reading.scale_N.device
        values_CN = self._rows.gathered(device)
        if told_LN is not None:
            values_CN.index_copy_(0, plan.rows_of(self._told, device), told_LN)
        for row, of_K in plan.constants_K.items():
            values_CN[row] = self._entries.of_target(of_K.to(device))
        hooks, of_embeddings = list[tuple[Hooked, Tensor]](), None
        if self._hooks is not None:
            written = self._hooks.finish(device) / reading.scale_N
            hooks = list(zip(self._hooked, written, strict=False))
            of_embeddings = written[-1] if len(written) > len(hooks) else None
        between = self._between.finish(device) if self._between is not None else []
        added = [(place, added_N / reading.scale_N) for place, added_N in between]
        return Parts(
            plan,
            values_CN / reading.scale_N,
            self._missing,
            values_CN,
            reading,
            self._entries,
            hooks,
            of_embeddings,
            added,
        )

    def _tap(self, label: str, place: Place, view: View, one: OneColumn | None) -> Tap:
        row, directions = self._plan.row_of[label], self._plan.directions(label)

        def see(call: Call) -> None:
            x = call.activation
            project(x, view, directions, self._rows.row(row, x.device))

        if one is None:
            return Tap(place, see)
        at_once = one.project(directions, self._rows, row, entered=place.before)
        return Tap(place, see, at_once=at_once)


@dataclass(frozen=True)
class Parts:
    """The parts of one prompt, measured.

    Attributes:
        plan: what they are.
        raw_CN: what stood at each part's place, in logits. The first row is the whole beginning
            of the stream, positions included; rows of missing parts are zero.
        missing: labels of the parts that the source of activations did not show, and why.
        undivided_CN: the same before the division by the final scale.
        reading: what the final norm saw: the whole stream, measured apart.
        entries: where.
        hooks: what the caller's hooks wrote to the stream at and in the blocks, in its order.
        hook_of_embeddings_N: what they wrote to the token embeddings, or None. The first of
            ``raw_CN`` holds it, too.
        between: what the model added to the stream behind some blocks, in its order.
    """

    plan: PartsPlan
    raw_CN: Tensor
    missing: Mapping[str, CacheEntryError]
    undivided_CN: Tensor
    reading: Reading
    entries: Entries
    hooks: Sequence[tuple[Hooked, Tensor]]
    hook_of_embeddings_N: Tensor | None = None
    between: Sequence[tuple[Between, Tensor]] = ()

    @property
    def complete(self) -> bool:
        """Whether every part was measured; positions are within the embeddings."""
        return not set(self.missing) - {POSITIONS}

    @property
    def rows(self) -> list[Row]:
        """A record for each part, hooks included, in stream order."""
        return [row for row, _ in self._labelled()]

    @property
    def values_CN(self) -> Tensor:
        """Contribution of each part at each entry, aligned with ``rows``.

        Raises:
            CacheEntryError: when a part was not shown.
        """
        self._require(self.missing)
        hooked = self.hooks or self.reading.hooks_RN or self.hook_of_embeddings_N is not None
        if self.plan.n_embeddings == 1 and not hooked and not self.between:
            return self.raw_CN
        return torch.stack([value for _, value in self._labelled()])

    @cached_property
    def steps_SN(self) -> Tensor:
        """Everything that is added to the stream, in order: the embeddings as one, writes, hooks.

        Raises:
            CacheEntryError: when a write was not shown. Embeddings need not be told apart.
        """
        self._require(label for label in self.missing if label != POSITIONS)
        raw, n = self.raw_CN, self.plan.n_embeddings
        if not self.hooks and not self.between:
            return raw if n == 1 else torch.cat((raw[:1], raw[n:]))
        return torch.stack(self._steps[0])

    @property
    def places(self) -> Sequence[Sequence[int]]:
        """Of each block and of the last stream: the last step before its writes, after one, …"""
        return self._steps[1]

    @cached_property
    def _steps(self) -> tuple[list[Tensor], list[list[int]]]:
        """The steps, and their places."""
        raw, row_of, stack = self.raw_CN, self.plan.row_of, self.plan.stream.blocks
        steps, places = [raw[0]], list[list[int]]()
        for number in range(len(stack) + 1):
            here = [(one, wrote) for one, wrote in self.hooks if one.number == number]
            steps += [wrote for one, wrote in here if one.at_input]
            places.append([len(steps) - 1])
            labels = _labels(stack[number]) if number < len(stack) else []
            inside = [(one.after, wrote) for one, wrote in here if not one.at_input]
            steps += [wrote for after, wrote in inside if not after]
            for n_writes, label in enumerate(labels, start=1):
                steps.append(raw[row_of[label]])
                steps += [wrote for after, wrote in inside if after == n_writes]
                places[-1].append(len(steps) - 1)
            steps += [added for place, added in self.between if place.number == number]
        return steps, places

    @cached_property
    def sum_N(self) -> Tensor:
        """The sum of all parts [N]."""
        n = self.plan.n_embeddings
        sum_N = self.raw_CN.sum(0)
        if n > 1:  # the first is the sum of these
            sum_N = self.raw_CN[0] + self.raw_CN[n:].sum(0)
        beside = (*self.hooks, *self.between)
        return sum((written_N for _, written_N in beside), sum_N)

    @cached_property
    def gap(self) -> float:
        """The largest difference between that sum and the stream's own projection."""
        return largest(self.sum_N - self.reading.total_N)

    def of(self, labels: Sequence[str]) -> Tensor:
        """What some writes contributed [labels, N]."""
        return self.raw_CN.index_select(0, self.plan.rows_of(tuple(labels), self.raw_CN.device))

    def _labelled(self) -> Sequence[tuple[Row, Tensor]]:
        """Every row with its values: what hooks wrote around a block is one row behind it."""
        plan, raw = self.plan, self.raw_CN
        rows = {row.label: row for row in plan.rows}
        # What begins the stream is the sum of the embeddings. The tokens' part is what positions
        # leave of it, with whatever scaling, norm or projection the model puts on it.
        found = [(rows[EMBED], raw[0] if plan.n_embeddings == 1 else raw[0] - raw[1])]
        if self.hook_of_embeddings_N is not None:
            found[0] = (rows[EMBED], found[0][1] - self.hook_of_embeddings_N)
            found.append((Row(EMBED_HOOK, "hook"), self.hook_of_embeddings_N))
        found += [(row, raw[1]) for row in plan.rows[1 : plan.n_embeddings]]
        for number, block in enumerate(plan.stream.blocks):
            found += [(rows[label], raw[plan.row_of[label]]) for label in _labels(block)]
            written = self._wrote(number)
            if written:
                row = Row(hook_label(block), "hook", block.layer)
                found.append((row, torch.stack(written).sum(0)))
            kind = plan.stream.architecture.between or ""
            for place, added_N in self.between:
                if place.number == number:
                    label = f"{block.layer}_{kind}"
                    found.append((Row(label, kind, block.layer), added_N))
        last = self._wrote(len(plan.stream.blocks))
        behind = {label: added_RN[0] for label, added_RN in self.reading.hooks_RN.items()}
        if last:
            behind[FINAL_HOOK] = sum(last, behind.get(FINAL_HOOK, torch.zeros_like(last[0])))
        for label in sorted(behind):  # final_hook, logit_hook
            found.append((Row(label, "hook"), behind[label]))
        return found

    def _wrote(self, number: int) -> list[Tensor]:
        here = [(one, wrote) for one, wrote in self.hooks if one.number == number]
        return [wrote for one, wrote in here if not one.by_wrapper or bool(wrote.any())]

    def _require(self, labels: Iterable[str]) -> None:
        for label in labels:
            raise self.missing[label]


def _labels(block: Block) -> list[str]:
    """The parts that a block adds, in order."""
    constant = [] if block.constant is None else [constant_label(block)]
    return [*(write.label for write in block.writes), *constant]
