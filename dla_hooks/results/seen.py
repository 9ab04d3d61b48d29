"""What the model itself said where its logits were looked at: ranks, probabilities, top tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """The answers under the model's own distribution; NaN and -1 where it was not looked at.

    Attributes:
        log_probability: of the answer, natural logarithm [*batch_and_pos].
        rank: of the answer among all tokens, from 1 [*batch_and_pos].
        top_ids: the tokens with the largest logits, the largest first [top, *batch_and_pos].
        top_probability: of these, under the model [top, *batch_and_pos].
        names: the text of each of these tokens, by its id as text.
    """

    log_probability: Tensor
    rank: Tensor
    top_ids: Tensor
    top_probability: Tensor
    names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def nothing(cls, shape: torch.Size) -> Seen:
        """Nothing was looked at."""
        numbers = torch.full(shape, math.nan, device="cpu")
        none = torch.full(shape, -1, device="cpu")
        return cls(numbers, none, none[None][:0], numbers[None][:0])

    def changed(self, change: Callable[[Tensor], Tensor], top: Callable[[Tensor], Tensor]) -> Self:
        """The same with other tensors: those of the entries, and those with an axis before them."""
        return type(self)(
            change(self.log_probability),
            change(self.rank),
            top(self.top_ids),
            top(self.top_probability),
            self.names,
        )

    def at(self, place: tuple[Any, ...]) -> Self:
        """The same at a place of the batch and the positions."""
        return self.changed(lambda own: own[place], lambda own: own[(slice(None), *place)])

    def named(self, texts: Callable[[list[int]], list[str]]) -> Self:
        """The same with the texts of its tokens."""
        ids = [i for i in self.top_ids.unique().tolist() if i >= 0]
        names = dict(zip(map(str, ids), texts(ids), strict=True))
        return type(self)(*(getattr(self, one.name) for one in fields(self)[:-1]), names)

    def top(self) -> list[list[tuple[str, float]]]:
        """The top tokens of each entry, flattened, with their probabilities."""
        k = len(self.top_ids)
        ids = self.top_ids.reshape(k, -1).T.tolist()
        shares = self.top_probability.reshape(k, -1).T.tolist()
        return [
            [(self.names.get(str(i), str(i)), p) for i, p in zip(*pair, strict=True) if i >= 0]
            for pair in zip(ids, shares, strict=True)
        ]
