"""Which heads the sources of a model are looked at for, and which rows these make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from dla_hooks.calibration.attention_form import AttentionForm, AttentionForms, attention_forms
from dla_hooks.calibration.head_widths import with_head_widths
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.modules.attention_interface import why_unseen
from dla_hooks.modules.hooks import Place
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.stream import Stream
from dla_hooks.results.row_runs import Run
from dla_hooks.units.head_layer import with_heads

_HEAD = re.compile(r"L([0-9]+)(?:\.([0-9]+))?([HX])([0-9]+)")
_INSTEAD = "Whole heads can be attributed"

Head = tuple[int, int, int] | tuple[int, int, int, str]
"""(layer, sub, head): see :class:`dla_hooks.results.rows.Row`; and "X", if it reads an encoder."""


def as_heads(heads: Any) -> tuple[Head, ...] | None:
    """Read the option ``heads``.

    Raises:
        InputError: for anything but pairs (layer, head) and labels.
    """
    if heads is None:
        return None
    if isinstance(heads, str) or not isinstance(heads, Iterable):
        raise InputError(f"heads must be a list of heads, such as ['L3H5'], or None; got {heads!r}")
    found = tuple(dict.fromkeys(map(_as_head, heads)))
    if not found:
        raise InputError("heads is empty: name one or more, or leave it out for all heads")
    return found


def _as_head(head: Any) -> Head:
    if isinstance(head, str):
        match = _HEAD.fullmatch(head)
        if match:
            layer, sub, number = (int(match[place] or 0) for place in (1, 2, 4))
            return _head(layer, sub, number, of_encoder=match[3] == "X")
    elif isinstance(head, (tuple, list)) and len(head) == 2 and all(map(_is_number, head)):
        return head[0], 0, head[1]
    raise InputError(f"heads must hold labels such as 'L3H5' or pairs (layer, head); got {head!r}")


def _head(layer: int, sub: int, number: int, *, of_encoder: bool) -> Head:
    return (layer, sub, number, "X") if of_encoder else (layer, sub, number)


def _name(layer: int, sub: int, *, of_encoder: bool) -> str:
    """The beginning of a head's label: ``L3H``, ``L3.1H``, ``L3X``."""
    return f"L{layer}{f'.{sub}' if sub else ''}{'X' if of_encoder else 'H'}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class SourceLayer:
    """The chosen heads of one write.

    Attributes:
        label: of the write.
        name: of its rows, before the number of the head: ``L3H``, ``L3.1H``, ``L3X``.
        layer: the block.
        sub: which of its attentions.
        heads: the numbers of the chosen heads.
        form: how their z comes to be.
        place: the places of these heads among all chosen ones.
        points: where the model itself shows its values and weights; None where these are seen in
            the attention function.
        of_encoder: whether they read what an encoder put out.
    """

    label: str
    name: str
    layer: int
    sub: int
    heads: tuple[int, ...]
    form: AttentionForm
    place: slice
    points: tuple[Place, Place] | None = None
    of_encoder: bool = False

    @property
    def kind(self) -> str:
        """The beginning of its rows' kind: ``cross_head``, ``cross_layer``, or nothing."""
        return "cross_" if self.of_encoder else ""


def hook_points(site: HeadSite) -> tuple[Place, Place] | None:
    """The hook points of TransformerLens for the values and the weights of one attention."""
    found = [getattr(site.attention, name, None) for name in ("hook_v", "hook_pattern")]
    if site.linear is site.proj or not all(isinstance(point, nn.Module) for point in found):
        return None
    prefix = site.name.rpartition(".")[0]
    values, weights = (cast("nn.Module", point) for point in found)
    return (
        Place(values, f"{prefix}.hook_v", site.use),
        Place(weights, f"{prefix}.hook_pattern", site.use),
    )


def source_layers(
    stream: Stream,
    heads: Sequence[Head] | None,
    layers: Sequence[int] | None,
    mixers: Mapping[str, int] | None = None,
) -> list[SourceLayer]:
    """Choose heads of a model, and measure how their z comes to be.

    Args:
        stream: the located model.
        heads: the chosen heads, or None.
        layers: the chosen layers, or None.
        mixers: the labels of writes whose sources are told apart in another way, with their
            layers. Where there are any, there need be no heads besides.

    Raises:
        InputError: for a layer or head that is not there.
        UnsupportedModelError: where the tokens that a chosen head reads cannot be told apart.
    """
    model, mixers = type(stream.backend.root).__name__, mixers or {}
    sized = with_head_widths(stream)
    own = {
        (block.layer, sub, write.heads is not None and write.heads.cross): write
        for block in sized.blocks
        for sub, write in with_heads(block.writes)
        if write.label not in mixers
    }
    if not own and not mixers:
        raise UnsupportedModelError(
            f"{model}{stream.extent} has no attention heads with a direct path to the stream; "
            "attribute whole sublayers instead (leave out unit=)"
        )
    readable = {layer for layer, *_ in own} | set(mixers.values())
    _check_layers(model, len(stream.blocks), readable, layers)
    if not any(layers is None or layer in layers for layer, *_ in own):
        return []
    forms = _forms(sized, model)
    found: list[SourceLayer] = []
    n_before = 0
    for (layer, sub, of_encoder), write in own.items():
        assert write.heads is not None
        numbers = range(write.heads.n_heads)
        chosen = _chosen(model, (layer, sub, of_encoder), numbers, heads)
        if not chosen or (layers is not None and layer not in layers):
            continue
        if write.label in forms.unseen and heads is None and layers is None:
            continue  # left in the remainder, unless it is asked for
        _check_form(model, write.label, write.heads.name, forms)
        place = slice(n_before, n_before + len(chosen))
        name = _name(layer, sub, of_encoder=of_encoder)
        form = forms.of[write.label]
        points = hook_points(write.heads)
        found.append(
            SourceLayer(write.label, name, layer, sub, chosen, form, place, points, of_encoder)
        )
        n_before = place.stop
    missing = set(heads or ()) - {
        _head(one.layer, one.sub, number, of_encoder=one.of_encoder)
        for one in found
        for number in one.heads
    }
    if missing and layers is None:
        layer, sub, head, *more = min(missing)
        name = _name(layer, sub, of_encoder=bool(more))
        raise InputError(
            f"{model} has no head {name}{head}; its blocks are 0 to {len(stream.blocks) - 1}, and "
            "each counts its heads from 0"
        )
    if mixers and not found:
        return []
    if not found and (heads is not None or layers is not None):
        raise InputError("no head is in both heads= and layers=; give one of the two")
    if not found:
        raise UnsupportedModelError(_unseen(model, next(iter(own.values())).name))
    return found


def runs_of(layers: Sequence[SourceLayer], sum: str | None, n_sources: int) -> list[Run]:
    """The rows of some layers, one run for each head, each layer, or all of them."""
    n = n_sources
    if sum == "heads":
        return [Run("<{}", f"{one.kind}source", n=n, of_sources=True) for one in layers[:1]]
    if sum == "layer":
        names = [one.name if one.of_encoder else one.name.removesuffix("H") for one in layers]
        return [
            Run(f"{name}<{{}}", f"{one.kind}layer", one.layer, one.sub, None, n, True)
            for name, one in zip(names, layers, strict=True)
        ]
    return [
        Run(f"{one.name}{head}<{{}}", f"{one.kind}head", one.layer, one.sub, head, n, True)
        for one in layers
        for head in one.heads
    ]


def _forms(sized: Stream, model: str) -> AttentionForms:
    """How z comes to be, in each write with heads."""
    sites = {write.label: write.heads for write in sized.writes if write.heads is not None}
    if all(hook_points(site) for site in sites.values()):
        plain = AttentionForm(False, sized.work_dtype)
        return AttentionForms(dict.fromkeys(sites, plain), {}, ())
    unseen = why_unseen()
    if unseen is not None:
        raise UnsupportedModelError(
            f"which tokens the heads of {model} read cannot be seen: {unseen}. {_INSTEAD}"
        )
    return attention_forms(sized)


def _check_layers(model: str, n: int, with_heads: set[int], layers: Sequence[int] | None) -> None:
    for layer in layers or ():
        if layer >= n:
            raise InputError(f"{model} has the layers 0 to {n - 1}, and no layer {layer}")
        if layer not in with_heads:
            raise InputError(
                f"layer {layer} of {model} has no attention heads, nor a mixer that can be split; "
                f"those that have are {', '.join(map(str, sorted(with_heads)))}"
            )


def _chosen(
    model: str, place: tuple[int, int, bool], numbers: range, heads: Sequence[Head] | None
) -> tuple[int, ...]:
    """The heads of one write that are asked for, in order."""
    if heads is None:
        return tuple(numbers)
    asked = sorted(
        number for layer, sub, number, *more in heads if (layer, sub, bool(more)) == place
    )
    for head in asked:
        if head not in numbers:
            raise InputError(
                f"layer {place[0]} of {model} has the heads 0 to {len(numbers) - 1}, and no head "
                f"{head}"
            )
    return tuple(asked)


def _check_form(model: str, label: str, name: str, forms: AttentionForms) -> None:
    if label in forms.unseen:
        raise UnsupportedModelError(_unseen(model, name))
    if label in forms.reasons:
        raise UnsupportedModelError(
            f"which tokens the heads of {model} read cannot be told: {forms.reasons[label]}. "
            f"{_INSTEAD}; layers= leaves this layer out"
        )


def _unseen(model: str, name: str) -> str:
    return (
        f"{name} of {model} is reached without a call of transformers' attention "
        "functions (it computes attention in a loop of its own, or has none, as Mamba and linear "
        f"attention), so that which tokens its heads read cannot be seen. {_INSTEAD}; a newer "
        "transformers may have ported this model"
    )
