"""Where in a model a row is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Where(NamedTuple):
    """The place in a model where the numbers of a row stand.

    Attributes:
        module: the module's path: ``model.get_submodule(module)`` is it.
        at: ``"input"`` or ``"output"`` of that module.
        slice: which channels there, heads side by side; None is all. An expert has no channels of
            its own in what its module puts out: None.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> dla_hooks.where(model, "L1H2")
    Where(module='transformer.h.1.attn.c_proj', at='input', slice=slice(32, 48, None))
    """

    module: str
    at: str
    slice: slice | None = None


Locate = Callable[[str], Where]
"""From the label of a row to its place."""


class Located:
    """A result that finds its rows in the model; how is no field of it, and is not saved."""

    __slots__ = ("_locate",)
    _locate: Locate

    @property
    def locate(self) -> Locate | None:
        """Finds the places of rows; None where the model is not known."""
        return getattr(self, "_locate", None)

    def located_by(self, locate: Locate) -> None:
        """Let the result find its rows in the model."""
        self._locate = locate
