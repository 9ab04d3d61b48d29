"""Rows by their labels: where in the model ``3_mlp_out``, ``L9H6``, ``L2N5`` or ``L3E5`` is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dla_hooks.calibration.chosen_neurons import chosen_neurons
from dla_hooks.calibration.expert_sites import expert_sites
from dla_hooks.calibration.expert_way import ExpertSite
from dla_hooks.calibration.head_widths import with_head_widths
from dla_hooks.errors import ArgumentTypeError, LabelError
from dla_hooks.modules.hooks import Call, Place
from dla_hooks.modules.linear import input_width
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.stream import Stream

_IN_LAYER = re.compile(r"L([0-9]+)(?:\.([0-9]+))?([A-Z])([0-9]+)")


class Experts(NamedTuple):
    """The experts of one sublayer, of which one is a part.

    Attributes:
        number: of the expert.
        n: how many there are.
        side_by_side: whether each puts out something for every position, one after the other;
            otherwise their outputs come summed.
        slots: in how many slots an expert is asked alone.
    """

    number: int
    n: int
    side_by_side: bool
    slots: int


@dataclass(frozen=True)
class NamedPart:
    """A part of the model that writes to the stream, on its way there.

    Attributes:
        label: its name.
        write: the label of the write that it is, or is a part of.
        layer: the block that it belongs to.
        kind: ``write``, ``head``, ``neuron``, ``expert`` or ``shared expert``.
        place: the module's input or output in which it stands.
        width: how many channels it has; 0 where only a run shows it.
        channels: which of what stands there, side by side; None is all.
        heads: where the heads of its sublayer are seen, if it is a head.
        experts: the experts that it is one of.
        among: how many neurons there are in its MLP, if it is one.
    """

    label: str
    write: str
    layer: int
    kind: str
    place: Place
    width: int
    channels: slice | None = None
    heads: HeadSite | None = None
    experts: Experts | None = None
    among: int = 0

    def read(self, x: Tensor) -> Tensor:
        """What of an activation there is its own [..., width]; not for an expert."""
        flat = x if self.heads is None else self.heads.flat(x)
        return flat if self.channels is None else flat[..., self.channels]

    def seen(self, call: Call) -> Tensor:
        """What a call of the module holds of it."""
        return self.read(call.entered if self.place.before else call.left)


def part_named(stream: Stream, label: str) -> NamedPart:
    """Find one part by the label of its row.

    Args:
        stream: the located model.
        label: ``3_attn_out``, ``3_mlp_out``, ``L9H6``, ``L0.1H2``, ``L2N5``, ``L3E5``, ``L3S0``.

    Raises:
        LabelError: (a KeyError) for a label that no such part of this model has.
        ArgumentTypeError: for what is no string.
        UnsupportedModelError: where the heads, neurons or experts of the model cannot be told
            apart.
    """
    if not isinstance(label, str):
        raise ArgumentTypeError(f"a part is named by a label such as 'L9H6'; got {label!r:.80}")
    for write in stream.writes:
        if write.label == label:
            return NamedPart(label, label, write.layer, "write", write.place, stream.d_model)
    found = _IN_LAYER.fullmatch(label)
    find = _FIND.get(found[3]) if found else None
    if found is None or find is None:
        raise _unknown(stream, label, [write.label for write in stream.writes])
    layer, sub, number = int(found[1]), int(found[2] or 0), int(found[4])
    if layer not in {block.layer for block in stream.blocks}:
        last = stream.blocks[-1].layer
        raise LabelError(f"{stream.backend.name} has the layers 0 to {last}, and no {label!r:.40}")
    return find(stream, label, layer, sub, number)


def _head(stream: Stream, label: str, layer: int, sub: int, number: int) -> NamedPart:
    return _head_of(stream, label, layer, sub, number, cross=False)


def _cross_head(stream: Stream, label: str, layer: int, sub: int, number: int) -> NamedPart:
    return _head_of(stream, label, layer, sub, number, cross=True)


def _head_of(
    stream: Stream, label: str, layer: int, sub: int, number: int, *, cross: bool
) -> NamedPart:
    sized = with_head_widths(stream)
    mine = ((w, w.heads) for w in sized.writes if w.layer == layer)
    found = [(w, site) for w, site in mine if site is not None and site.cross == cross]
    writes, sites = [w for w, _ in found], [site for _, site in found]
    _check_number(stream, label, "head", sub, number, [site.n_heads for site in sites])
    site, write = sites[sub], writes[sub].label
    place = site.place.entered if site.linear is site.proj else site.place
    channels = slice(number * site.d_head, (number + 1) * site.d_head)
    return NamedPart(label, write, layer, "head", place, site.d_head, channels, heads=site)


def _neuron(stream: Stream, label: str, layer: int, sub: int, number: int) -> NamedPart:
    found = chosen_neurons(stream, (layer,))
    widths = [input_width(site.linear) for _, site, _ in found]
    _check_number(stream, label, "neuron", sub, number, widths)
    write, site, _ = found[sub]
    channels, n = slice(number, number + 1), widths[sub]
    return NamedPart(label, write.label, layer, "neuron", site.place, 1, channels, among=n)


def _expert(stream: Stream, label: str, layer: int, sub: int, number: int) -> NamedPart:
    sites = _sites(stream, layer)
    _check_number(stream, label, "expert", sub, number, [site.n for site in sites])
    site = sites[sub]
    experts = Experts(number, site.n, not site.k, site.slots)
    place = _place_in(stream, site, site.path)
    return NamedPart(label, site.label, layer, "expert", place, 0, experts=experts)


def _shared(stream: Stream, label: str, layer: int, sub: int, number: int) -> NamedPart:
    sites = _sites(stream, layer)
    _check_number(stream, label, "shared expert", sub, number, [len(s.shared) for s in sites])
    site = sites[sub]
    one = site.shared[number]
    if one.label:  # it is a whole write
        write = next(write for write in stream.writes if write.label == one.label)
        place, width = write.place, stream.d_model
        return NamedPart(label, write.label, layer, "shared expert", place, width)
    place = _place_in(stream, site, one.path)
    return NamedPart(label, site.label, layer, "shared expert", place, 0)


_FIND = {"H": _head, "X": _cross_head, "N": _neuron, "E": _expert, "S": _shared}


def _sites(stream: Stream, layer: int) -> list[ExpertSite]:
    every = expert_sites(stream)
    return [site for site in every if stream.blocks[site.block].layer == layer]


def _place_in(stream: Stream, site: ExpertSite, path: str) -> Place:
    block = stream.blocks[site.block]
    return Place(block.module.get_submodule(path), f"{block.name}.{path}")


def _check_number(
    stream: Stream, label: str, kind: str, sub: int, number: int, counts: Sequence[int]
) -> None:
    """Refuse a part that is not there.

    Args:
        stream: the located model.
        label: of the part.
        kind: what it is.
        sub: which sublayer of its layer it names.
        number: of the part there.
        counts: how many there are, by sublayer.

    Raises:
        LabelError: with what there is.
    """
    if sub < len(counts) and number < counts[sub]:
        return
    there = " and ".join(f"{n} (0 to {n - 1})" for n in counts if n) or "none"
    raise LabelError(f"{stream.backend.name} has no {kind} {label!r:.40}; its layer has {there}")


def _unknown(stream: Stream, label: str, writes: list[str]) -> LabelError:
    near = difflib.get_close_matches(label, writes, 3, 0.0)
    return LabelError(
        f"{stream.backend.name} has no part called {label!r:.40}. Parts are what a sublayer writes "
        f"({', '.join(map(repr, near))}, …), heads ('L0H0'), neurons ('L0N0'), experts ('L0E0') "
        "and shared experts ('L0S0')"
    )
