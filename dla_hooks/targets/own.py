"""Tokens that the text or the model itself names: the next one, the model's first and second."""

from __future__ import annotations

from dla_hooks.targets.base import TokenRequest


class Own(TokenRequest):
    """A token that a prompt or the model's logits name, at each position.

    Attributes:
        name: as which it is public.
        place: among the model's tokens by their logits; None for the next one of the text.
    """

    __module__ = "dla_hooks"

    def __init__(self, name: str, place: int | None) -> None:
        self.name, self.place = name, place

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> str:  # one object in every process
        return self.name


TOP = Own("TOP", 0)
"""The model's own top token at each position."""
RUNNER_UP = Own("RUNNER_UP", 1)
"""The model's second token at each position."""
NEXT = Own("NEXT", None)
"""The token that really comes next in the text, at each position."""
