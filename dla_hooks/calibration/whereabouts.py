"""From the label of any row to the module, and the channels, where its numbers stand."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dla_hooks.calibration.named_parts import part_named
from dla_hooks.calibration.named_places import named_places
from dla_hooks.errors import InputError
from dla_hooks.modules.hooks import Place
from dla_hooks.residual.stream import Stream
from dla_hooks.results.where import Where

_OF_STREAM = re.compile(r"[0-9]+_(pre|mid)|final_post")
_OF_LAYER = re.compile(r"L([0-9]+)(?:\.([0-9]+))?")
_FEATURE = re.compile(r"(?:L([0-9]+))?F[0-9]+(?:@(.+))?")
_NO_PLACE = re.compile(r"remainder|rest|bias|.*_constant|.*hook|<[0-9]+")


def where_is(stream: Stream, label: str, dictionaries: Sequence[str] = ()) -> Where:
    """The place of a row.

    Args:
        stream: the located model.
        label: of the row, of any unit.
        dictionaries: the places that the rows of features belong to.

    Raises:
        LabelError: (a KeyError) for what this model does not have.
        InputError: for a row that stands at no place.
    """
    if isinstance(label, str):
        if label in ("embed", "pos_embed"):
            place = stream.embedding if label == "embed" else stream.positions
            if place is not None:
                return _where(stream, place)
        if _NO_PLACE.fullmatch(label):
            raise InputError(
                f"{label!r:.40} stands at no place of the model: it is what belongs to no part, "
                "or to hooks of yours"
            )
        label = label.partition("<")[0]  # a source stands where its head does
        feature, layer = _FEATURE.fullmatch(label), _OF_LAYER.fullmatch(label)
        if feature:
            return _named(stream, _of_feature(label, feature[1], feature[2], dictionaries))
        if layer:
            return _whole_attention(stream, label, int(layer[1]), int(layer[2] or 0))
        name = label.partition("[")[0]  # a part of what stands at a place
        if _OF_STREAM.fullmatch(name) or name != label or name.endswith("_z"):
            return _named(stream, name)
    part = part_named(stream, label)
    return _where(stream, part.place, part.channels)


def _of_feature(label: str, layer: str | None, name: str | None, places: Sequence[str]) -> str:
    """The place of a feature's dictionary."""
    if name is not None and layer is not None:
        return f"{layer}_{name}"
    found = [place for place in places if layer is None or place.startswith(f"{layer}_")]
    if len(found) != 1:
        raise InputError(
            f"which dictionary {label!r:.40} is a row of cannot be told; give the unit with its "
            "places: unit=Features({place: dictionary})"
        )
    return found[0]


def _named(stream: Stream, label: str) -> Where:
    (at,) = named_places(stream, [label])
    site = at.heads
    return _where(stream, at.place.entered if site and site.linear is site.proj else at.place)


def _whole_attention(stream: Stream, label: str, layer: int, sub: int) -> Where:
    """The heads of one attention together."""
    sites = [w.heads for w in stream.writes if w.layer == layer and w.heads is not None]
    if sub >= len(sites):
        raise InputError(f"{stream.backend.name} has no attention {label!r:.40} with heads")
    site = sites[sub]
    return _where(stream, site.place.entered if site.linear is site.proj else site.place)


def _where(stream: Stream, place: Place, channels: slice | None = None) -> Where:
    """A place by its path from the model that the caller holds, whatever wraps the one inside."""
    found = (path for path, one in stream.model.named_modules() if one is place.module)
    path = next(found, place.name)
    return Where(path, "input" if place.before else "output", channels)
