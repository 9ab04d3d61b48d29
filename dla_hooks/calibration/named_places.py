"""Places by their names: ``3_mlp_out``, ``3_z``, ``3_pre``, ``3_mid``, ``final_post``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dla_hooks.calibration.mid_places import mid_place
from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.errors import InputError
from dla_hooks.modules.hooks import Call, Place
from dla_hooks.modules.linear import check_readable, input_width
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.stream import Stream, WriteSite
from dla_hooks.results.row_runs import RowRuns, Run

FINAL = "final_post"


@dataclass(frozen=True)
class NamedPlace:
    """A place of the stream, or one that writes to it.

    Attributes:
        label: its name.
        name: the same without the layer: ``mlp_out``, ``z``, ``pre``.
        place: the module's input or output that is looked at.
        width: of what is seen there.
        order: where it stands in the order of the stream.
        block: the block's place in the stack; the number of blocks for the last stream.
        layer: the block's layer; None for the last stream.
        write: what is written there, or what the heads there write; None for a place of the stream.
        heads: where the heads are seen, if these are it.
        n_before: for a mid stream, how many writes of its block stand before it.
    """

    label: str
    name: str
    place: Place
    width: int
    order: tuple[int, float]
    block: int
    layer: int | None
    write: WriteSite | None = None
    heads: HeadSite | None = None
    n_before: int = 0

    @property
    def of_stream(self) -> bool:
        """Whether the stream itself is seen there, with all that was written before."""
        return self.write is None

    def read(self, call: Call) -> Tensor:
        """What is seen there."""
        return call.activation if self.heads is None else self.heads.z(call)


def named_places(stream: Stream, labels: Iterable[str]) -> list[NamedPlace]:
    """The places of some names, in the order of the stream.

    Raises:
        InputError: for a name of no place, and for places of which one holds the other.
        UnsupportedModelError: for a mid stream that nothing shows, and heads that cannot be read.
    """
    found = sorted((_find(stream, label) for label in labels), key=lambda one: one.order)
    for one, later in itertools.pairwise(found):
        if later.of_stream or one.write is later.write:
            raise InputError(
                f"{later.label} holds what stands at {one.label}, so that it would count twice; "
                "leave out one of them"
            )
    return found


def feature_rows(read: Sequence[tuple[NamedPlace, int]]) -> RowRuns:
    """The rows of dictionaries: of each its features, ``b_dec`` and ``error``.

    Args:
        read: the place of each dictionary, and how many features it has.
    """
    layers, runs = [at.layer for at, _ in read], list[Run]()
    for at, n in read:
        layer = "" if at.layer is None else f"L{at.layer}"
        apart = f"@{at.name}" if layers.count(at.layer) > 1 else ""
        runs += [
            Run(f"{layer}F{{}}{apart}", "feature", at.layer, n=n),
            Run(f"{at.label}[b_dec]", "b_dec", at.layer),
            Run(f"{at.label}[error]", "error", at.layer),
        ]
    return RowRuns(runs)


def _find(stream: Stream, label: str) -> NamedPlace:
    d_model, blocks = stream.d_model, stream.blocks
    if label == FINAL == stream.last_label:
        order = len(blocks), 0.0
        return NamedPlace(label, FINAL, stream.last, d_model, order, len(blocks), None)
    for number, block in enumerate(blocks):
        layer = block.layer
        if label == f"{layer}_pre":
            place, order = stream.input_of(block), (number, 0.0)
            return NamedPlace(label, "pre", place, d_model, order, number, layer)
        n_before = mid_streams(stream)[number] if label == f"{layer}_mid" else None
        if n_before is not None:
            place, order = mid_place(stream, number), (number, n_before + 0.5)
            return NamedPlace(label, "mid", place, d_model, order, number, layer, n_before=n_before)
        for nth, write in enumerate(block.writes, start=1):
            order = number, float(nth)
            if label == write.label:
                place = write.place
                return NamedPlace(label, write.kind, place, d_model, order, number, layer, write)
        with_heads = [(n, w) for n, w in enumerate(block.writes, 1) if w.heads is not None]
        if label == f"{layer}_z" and len(with_heads) == 1:
            nth, write = with_heads[0]
            site = write.heads
            assert site is not None
            check_readable(site.linear, site.name)
            width, order = input_width(site.linear), (number, float(nth))
            return NamedPlace(label, "z", site.place, width, order, number, layer, write, site)
    if stream.ending is not None and label in _behind(stream):
        raise InputError(
            f"{label!r:.40} is not ahead of {stream.last_label}, where the stream is read, so that "
            "nothing there is part of the number; leave it out, or read the stream later"
        )
    if not blocks:
        raise InputError(f"{label!r:.40} is no place of the stream as far as {stream.last_label}")
    some = [write.label for write in blocks[-1].writes]
    raise InputError(
        f"{label!r:.40} is no place of {stream.backend.name}; places are what a sublayer writes, "
        f"as {', '.join(map(repr, some))}, what its heads put out, as '{blocks[-1].layer}_z', and "
        f"the stream at '{blocks[-1].layer}_pre', at '{blocks[-1].layer}_mid' in sequential "
        f"blocks, or at {FINAL!r}"
    )


def _behind(stream: Stream) -> set[str]:
    """The names of the places from where the stream is read on."""
    layers = {block.layer for block in stream.whole.blocks[len(stream.blocks) - 1 :]}
    writes = {write.label for write in stream.whole.writes}
    names = {f"{layer}_{end}" for layer in layers for end in ("pre", "mid", "z")}
    return {FINAL} | names | writes
