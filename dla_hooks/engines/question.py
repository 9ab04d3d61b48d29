"""What is asked of rows: groups of them, and differences within pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dla_hooks.errors import InputError

_NEEDED = ("attribution", "bias", "logit", "error", "about")
ROWS = 1024
"""How many rows are added at once."""
RANKED = ("kept", "means", "remainder")
"""Columns that it needs of units that keep the strongest rows only."""


@dataclass(frozen=True)
class Question:
    """What is summed.

    Attributes:
        by: the column whose values are groups, or None.
        contrast: the column that says which side of a pair a row is, the side that is counted, and
            the side that is subtracted; or None.
        pair: the column that says which rows are a pair.
    """

    by: str | None = None
    contrast: tuple[str, Any, Any] | None = None
    pair: str | None = None

    def __post_init__(self) -> None:
        for name in ("by", "pair"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InputError(f"{name} must be the name of a column, got {value!r:.80}")
        sides = self.contrast
        if (sides is None) != (self.pair is None):
            raise InputError(
                "contrast and pair go together: contrast=('version', 'clean', 'corrupted') says "
                "what is subtracted from what, pair='pair' which rows belong together"
            )
        if sides is not None and (
            not isinstance(sides, tuple) or len(sides) != 3 or sides[1] == sides[2]
        ):
            raise InputError(
                "contrast must be (column, side, side that is subtracted), as in "
                f"('version', 'clean', 'corrupted'); got {sides!r:.80}"
            )

    @property
    def columns(self) -> list[str]:
        """The columns that it needs."""
        own = (self.by, self.pair, None if self.contrast is None else self.contrast[0])
        return [*_NEEDED, *(name for name in own if name is not None)]
