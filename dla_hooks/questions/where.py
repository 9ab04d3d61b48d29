"""Where in a model a row stands."""

from __future__ import annotations

from typing import Any

from dla_hooks.calibration.whereabouts import where_is
from dla_hooks.call import model_of
from dla_hooks.results.where import Where
from dla_hooks.units.base import Unit


def where(model: Any, label: str, *, unit: Unit | None = None) -> Where:
    """The module, its input or output, and the channels where the numbers of a row stand.

    ``result.where(label)`` says the same of a row of a result.

    Args:
        model: as for :func:`direct_logit_attribution`.
        label: of a row of any unit: ``"3_mlp_out"``, ``"L9H6"``, ``"L2N5"``, ``"L3E5"``,
            ``"3_pre"``, ``"embed"``, …
        unit: a :class:`Features`, for labels of features.

    Returns:
        A :class:`Where`.

    Raises:
        LabelError: (a KeyError) for what this model does not have.
        InputError: for a row that stands at no place (a remainder, hooks), and for a model that
            cannot be used.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> dla_hooks.where(model, "2_mlp_out")
    Where(module='transformer.h.2.mlp', at='output', slice=None)
    """
    places = () if unit is None else unit.dictionary_places()
    return where_is(model_of(model).stream, label, places)
