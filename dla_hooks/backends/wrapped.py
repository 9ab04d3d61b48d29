"""Faces around a model: what a call takes from one where it leaves a keyword out."""

from __future__ import annotations

from typing import Any

from dla_hooks.backends.base import Conventions


class Wrapper:
    """A face around a model, as :func:`dla_hooks.wrap` makes one.

    Every public call takes an instance for the model inside it. A subclass says what holds where a
    call leaves a keyword out.

    Attributes:
        model: the model inside.
        tokenizer: for strings, or None.
    """

    model: Any
    tokenizer: Any

    @property
    def conventions(self) -> Conventions:
        """The values of keywords that a call leaves out."""
        raise NotImplementedError
