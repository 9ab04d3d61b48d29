"""Faces around a model: what a call takes from one where it leaves a keyword out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Conventions:
    """The values of keywords that a call leaves out.

    Attributes:
        center_unembed: the vocabulary's mean is taken off every row of W_U.
        fold_value_biases: each head's constant part counts as remainder.
        prepend_bos: strings begin with one BOS, or with none; None is the tokenizer's custom.
    """

    center_unembed: bool = False
    fold_value_biases: bool = False
    prepend_bos: bool | None = None

    def given(
        self, *, center_unembed: bool | None = None, fold_value_biases: bool | None = None
    ) -> Conventions:
        """These conventions with the values that a call does give.

        >>> Conventions(center_unembed=True).given(fold_value_biases=True)
        Conventions(center_unembed=True, fold_value_biases=True, prepend_bos=None)
        """
        given = {"center_unembed": center_unembed, "fold_value_biases": fold_value_biases}
        return replace(self, **{name: bool(v) for name, v in given.items() if v is not None})


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
