"""The rows of a unit as the unembedding reads them: one vector each, for some entries at a time.

A row's part x of the last stream becomes ``gamma * (x - centre(x)) / s``, with the final norm's own
scale s. What is kept of the run is what the rows are made of; the rows themselves are built when
they are asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dla_hooks.calibration.embedding_factor import embeddings_enter
from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.calibration.value_biases import head_constants
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.hooks import Place
from dla_hooks.modules.linear import matrix
from dla_hooks.modules.user_hooks import EMBED_HOOK, FINAL_HOOK, is_hooked
from dla_hooks.residual.gains import constant_label, path_factors, product, times
from dla_hooks.residual.hooked import Hooked, hook_factor, hook_label, hooked_places
from dla_hooks.residual.inside_attention import written_inside
from dla_hooks.residual.stream import Block, Stream
from dla_hooks.results.row_runs import RowRuns
from dla_hooks.stacks.final_norm import FinalNorm
from dla_hooks.stacks.heads import KeptHeads, plan_heads, written_by_heads
from dla_hooks.stacks.kept import Kept


class RowVectors:
    """The rows of one unit.

    Attributes:
        labels: of the rows.
        whole: which of them make up the whole.
        rows: a record of every row that there is, where each entry has rows of its own.
    """

    labels: list[str]
    whole: slice = slice(None)
    rows: RowRuns | None = None

    def hold(self) -> None:
        """Hold rows against what they are parts of, besides the sum of all."""

    def at(self, place: slice) -> Tensor:
        """The rows at some entries [row, entries, d_model]."""
        raise NotImplementedError(f"{type(self).__name__} must make its rows")

    def index(self) -> Tensor | None:
        """The number in ``rows`` of each row at each entry; None where rows are the same."""
        return None


class _Step(NamedTuple):
    """One addend of the stream: what is kept of it, or a constant; and its factor."""

    kept: Any
    constant: Tensor | None
    factor: Tensor | None


class _InBlock(NamedTuple):
    """What one block adds: its own writes by label, and what hooks write at and in it.

    Of hooks there are, in the order of the stream, those at its input, and those behind so many of
    its writes.
    """

    block: Block
    own: dict[str, _Step]
    at_input: list[_Step]
    hooks: list[tuple[int, _Step]]

    def behind(self, n_writes: int) -> list[_Step]:
        """What hooks write behind so many of its writes."""
        return [step for after, step in self.hooks if after == n_writes]

    def all_hooks(self) -> list[_Step]:
        """What hooks write at and in it."""
        return [*self.at_input, *(step for _, step in self.hooks)]


class ComponentVectors(RowVectors):
    """The components: embeddings, writes, constants, and what the caller's hooks write."""

    def __init__(self, kept: Kept, final: FinalNorm) -> None:
        stream = kept.stream
        self._kept, self._final = kept, final
        factors = path_factors(stream)
        self._embed, self._factor = kept.start(), factors["embed"]
        self._positions: _Step | None = None
        if stream.positions is not None:
            self._positions = _Step(kept.positions(), None, factors["pos_embed"])
        self._embed_hook: _Step | None = None
        if is_hooked(stream.embedding):
            linear, factor = embeddings_enter(stream)
            if linear:
                hook = kept.hook(stream.embedding)
                self._embed_hook = _Step(hook, None, product(factor, factors["embed"]))
        hooks: dict[int, list[tuple[Hooked, _Step]]] = {}
        for hooked in hooked_places(stream):
            step = _Step(kept.hook(hooked.place), None, hook_factor(hooked, factors))
            hooks.setdefault(hooked.number, []).append((hooked, step))
        self._blocks = []
        for number, block in enumerate(stream.blocks):
            own = {w.label: _Step(kept.write(w), None, factors[w.label]) for w in block.writes}
            if block.constant is not None:
                label = constant_label(block)
                own[label] = _Step(None, block.constant, factors[label])
            here = hooks.get(number, [])
            at_input = [step for hooked, step in here if hooked.at_input]
            others = [(hooked.after, step) for hooked, step in here if not hooked.at_input]
            self._blocks.append(_InBlock(block, own, at_input, others))
        self._at_end = next((step for _, step in hooks.get(len(stream.blocks), [])), None)
        self.labels = self._labels()

    def _labels(self) -> list[str]:
        labels = ["embed"]
        if self._embed_hook is not None:
            labels.append(EMBED_HOOK)
        if self._positions is not None:
            labels.append("pos_embed")
        for part in self._blocks:
            labels += part.own
            if part.all_hooks():
                labels.append(hook_label(part.block))
        return [*labels, FINAL_HOOK] if self._at_end or self._final.is_hooked else labels

    def at(self, place: slice) -> Tensor:
        """The rows at some entries [row, entries, d_model]."""
        start = self._start(place)
        rows = [start]
        for beside in (self._embed_hook, self._positions):
            if beside is not None:
                rows.append(self._of(beside, place, start))
                rows[0] = rows[0] - rows[-1]
        for part in self._blocks:
            rows += [self._of(step, place, start) for step in part.own.values()]
            hooks = [self._of(step, place, start) for step in part.all_hooks()]
            if hooks:
                rows.append(torch.stack(hooks).sum(0))
        read = self._final.read(torch.stack(rows), place)
        if not (self._at_end or self._final.is_hooked):
            return read
        behind = torch.zeros_like(start)
        if self._at_end:
            behind = self._final.read(self._of(self._at_end, place, start), place)
        if self._final.is_hooked:
            behind = behind + self._final.behind(place, start)
        return torch.cat((read, behind[None]))

    def _start(self, place: slice) -> Tensor:
        x = self._kept.flat(self._embed)[place].to(self._kept.stream.work_dtype)
        return times(x, self._factor)

    def _of(self, step: _Step, place: slice, like: Tensor) -> Tensor:
        """One addend, as it stands in the last stream [entries, d_model]."""
        if step.constant is not None:
            return times(step.constant.to(like), step.factor).expand_as(like)
        return times(self._kept.flat(step.kept)[place].to(like), step.factor)


class LayerVectors(ComponentVectors):
    """The running sum of the components, at the beginning, middle and end of every block."""

    def __init__(self, kept: Kept, final: FinalNorm) -> None:
        self._mids = mid_streams(kept.stream)
        super().__init__(kept, final)
        self.whole = slice(-1, None)

    def _labels(self) -> list[str]:
        labels = []
        for part, n_first in zip(self._blocks, self._mids, strict=True):
            labels.append(f"{part.block.layer}_pre")
            if n_first is not None:
                labels.append(f"{part.block.layer}_mid")
        return [*labels, "final_post", *([FINAL_HOOK] if self._final.is_hooked else [])]

    def at(self, place: slice) -> Tensor:
        """The rows at some entries [row, entries, d_model]."""
        running = self._start(place)
        rows = []
        for part, n_first in zip(self._blocks, self._mids, strict=True):
            for step in part.at_input:
                running = running + self._of(step, place, running)
            rows.append(running)
            own = list(part.own.values())
            for count in range(len(own) + 1):
                added = own[count - 1 : count] if count else []
                for step in (*added, *part.behind(count)):
                    running = running + self._of(step, place, running)
                if count == n_first:
                    rows.append(running)
        if self._at_end:
            running = running + self._of(self._at_end, place, running)
        read = self._final.read(torch.stack([*rows, running]), place)
        if not self._final.is_hooked:
            return read
        return torch.cat((read, read[-1:] + self._final.behind(place, read)))


class HeadVectors(RowVectors):
    """Every attention head, what hooks write between heads and stream, and the remainder."""

    def __init__(self, kept: Kept, final: FinalNorm, fold_value_biases: bool) -> None:
        stream = kept.stream
        self._kept, self._final = kept, final
        self._plan = plan_heads(kept, len(stream.blocks))
        if not self._plan:
            raise UnsupportedModelError(
                f"{type(stream.backend.root).__name__} has no attention heads with a direct path "
                "to the stream; take whole sublayers instead (leave out unit=)"
            )
        self._constants = head_constants(stream) if fold_value_biases else {}
        self._hooks = [
            [(place, kept.hook(place)) for place in _written_on_the_way(stream, heads)]
            for heads in self._plan
        ]
        self.labels: list[str] = []
        for heads, hooks in zip(self._plan, self._hooks, strict=True):
            self.labels += [*heads.labels, *([f"{heads.layer}hook"] if hooks else [])]
        self.labels.append("remainder")

    @outside_autocast
    def hold(self) -> None:
        """Hold the heads of every attention against what it wrote.

        Raises:
            DecompositionError: when they do not make it up.
        """
        every = slice(None)
        for heads, hooks in zip(self._plan, self._hooks, strict=True):
            linear = heads.site.linear
            written = self._written(heads, hooks, every) if hooks else None
            heads.whole.hold(heads.z, linear, matrix(linear), heads.after, written)

    def at(self, place: slice) -> Tensor:
        """The rows at some entries [row, entries, d_model]."""
        kept, dtype, rows = self._kept, self._kept.stream.work_dtype, list[Tensor]()
        whole = self._final.whole(place)
        for heads, hooks in zip(self._plan, self._hooks, strict=True):
            z_NI = kept.flat(heads.z)[place].to(dtype)
            if heads.write.label in self._constants:
                z_NI = z_NI - self._constants[heads.write.label].to(z_NI)
            scale = None if heads.after is None else kept.flat(heads.after)[place]
            found = written_by_heads(kept, heads, matrix(heads.site.linear), z_NI, scale)
            if hooks:
                found.append(times(self._written(heads, hooks, place).to(z_NI), heads.factor))
            rows += [row.to(whole.device) for row in found]
        read = self._final.read(torch.stack(rows), place)
        return torch.cat((read, (whole - read.sum(0))[None]))

    def _written(self, heads: KeptHeads, hooks: list[tuple[Place, Any]], place: slice) -> Tensor:
        """What hooks wrote between z and the stream, as it stands there [entries, d_model]."""
        kept, found = self._kept, []
        for where, key in hooks:
            wrote = kept.flat(key)[place].to(kept.stream.work_dtype)
            if heads.after is not None and where != heads.site.post_norm_place:
                scale = kept.flat(heads.after)[place].to(wrote)
                wrote = kept.norm(heads.after).at_scale_one(wrote) / scale
            found.append(wrote)
        return torch.stack(found).sum(0)


def _written_on_the_way(stream: Stream, heads: KeptHeads) -> list[Place]:
    """Where the caller's hooks may write between z and the stream."""
    site, write, found = heads.site, heads.write, list[Place]()
    if site.linear is site.proj:
        found.append(site.place)
    module = Place(write.module, write.name, write.use)
    if write.module is not site.proj:
        found.append(module)
    if site.post_norm_place is not None:
        found.append(site.post_norm_place)
    inside = [one.place for one in written_inside(stream, write) if not one.may_rest]
    return [*(place for place in found if is_hooked(place)), *inside]
