"""The constants of a norm, measured once per version of a model.

A later write to the norm that leaves no trace (through ``.data``) does not go unnoticed: the real
run shows what the norm's form leaves unexplained of its output, at every entry.
"""

from __future__ import annotations

from dla_hooks.modules import norms
from dla_hooks.modules.hooks import Place
from dla_hooks.modules.norms import Norm
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.stream import Stream

_known: Remembered[Norm] = Remembered()


def norm_at(stream: Stream, place: Place) -> Norm:
    """The constants of a norm of a model.

    Args:
        stream: the located model.
        place: the norm.

    Raises:
        UnsupportedModelError: for a module that is no LayerNorm or RMSNorm in disguise.
    """

    def measure() -> Norm:
        with stream.backend.without_user_hooks():
            return norms.probe(place.module, stream.d_model, place.name, stream.work_dtype)

    return _known.of(stream.model, stream.version, measure, place.name)
