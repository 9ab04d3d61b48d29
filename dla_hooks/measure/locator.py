"""How a result finds where its rows stand, without holding the model."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from dla_hooks.backends import backend_of
from dla_hooks.calibration.whereabouts import where_is
from dla_hooks.errors import InputError
from dla_hooks.results.where import Where
from dla_hooks.verification.recognise import located


class Locator:
    """Finds the places of rows in a model, as long as that is there.

    Args:
        model: the model; None where it is not known.
        dictionaries: the places that the rows of features belong to.
    """

    def __init__(self, model: Any, dictionaries: Sequence[str] = ()) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._dictionaries = dictionaries

    def __call__(self, label: str) -> Where:
        """The place of a row.

        Raises:
            InputError: when the model is gone.
        """
        model = None if self._model is None else self._model()
        if model is None:
            raise InputError(
                "the model of this result is gone, or another process made it; "
                f"dla_hooks.where(model, {label!r}) says where the row is"
            )
        return where_is(located(backend_of(model)), label, self._dictionaries)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, self._dictionaries)  # a model does not travel with its results

    def __deepcopy__(self, _: Any) -> Locator:
        return self
