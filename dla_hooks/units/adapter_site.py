"""The parts of the stream that adapters end in: writes of sublayers, and embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dla_hooks.calibration.adapted_writes import Ending
from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.adapters import check_added, is_copied
from dla_hooks.modules.hooks import Place
from dla_hooks.projection.adapted import AdaptedModule
from dla_hooks.projection.way_out import WayOut
from dla_hooks.residual.stream import WriteSite
from dla_hooks.units.parts_plan import EMBED, PartsPlan

_INSTEAD = "Attribute components instead (leave out unit=)"


@dataclass(frozen=True)
class Site:
    """A part of the stream that adapters end in.

    Attributes:
        label: the part's.
        modules: what adapters end in there.
        whole: whether there is nothing else; there is one module then.
        way: from there to the stream.
    """

    label: str
    modules: list[AdaptedModule]
    whole: bool
    way: WayOut


def of_write(parts: PartsPlan, write: WriteSite, found: list[Ending]) -> Site:
    """A sublayer's write that adapters end in.

    Raises:
        UnsupportedModelError: for several adapted modules, one within the other.
    """
    whole = any(one.whole for one in found)
    if whole and len(found) > 1:
        paths = ", ".join(one.path for one in found)
        raise UnsupportedModelError(
            f"{write.label} ends in several adapted modules, one within the other: {paths}. "
            f"{_INSTEAD}"
        )
    places = [Place(one.module, one.path, write.use) for one in found]
    places.append(Place(write.module, write.name, write.use))
    post_norm = None if write.post_norm is None else write.place
    norm = None if post_norm is None else norm_at(parts.stream, post_norm)
    way = WayOut(parts.directions(write.label), places, post_norm, norm)
    modules = [AdaptedModule(one.module, one.path, write.use, way.at_output) for one in found]
    return Site(write.label, modules, whole, way)


def of_table(parts: PartsPlan, label: str, place: Place, path: str, module: nn.Module) -> Site:
    """An adapted table of embeddings, of tokens or positions.

    Raises:
        UnsupportedModelError: where its adapter has no part of its own.
    """
    if is_copied(module):
        raise UnsupportedModelError(f"{path} is a copied part of the embeddings. {_INSTEAD}")
    check_added(module, path)
    directions = parts.of_embeddings() if label == EMBED else parts.directions(label)
    if directions is None or module is not place.module:
        raise UnsupportedModelError(
            f"{path} is adapted, and more than a factor stands between it and the stream, so that "
            f"its adapter has no part of its own there. {_INSTEAD}"
        )
    # Hooks of the caller's on the token embeddings have a row of their own.
    way = WayOut(directions, [] if label == EMBED else [place])
    return Site(label, [AdaptedModule(module, path, place.use, directions)], True, way)
