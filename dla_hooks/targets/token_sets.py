"""Weighted sets of tokens: one token, a pair of a right and a wrong one, or any others.

The logit of a set is ``sum_j weight_j * logit_j``. A token is the set of one with weight 1, and a
difference of two logits the set of two with weights 1 and -1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

_ROWS_AT_ONCE = 1024
_FEW_IDS = 64  # which Python compares faster than one operation does
_NOTHING = 1e-12
"""A sum of weights below this part of their sizes is rounding: the weights cancel."""


@dataclass(frozen=True, eq=False)
class TokenSets:
    """Sets of the same number of tokens, of any shape.

    Attributes:
        ids: of the tokens [*shape, m]; a smaller set holds one of its tokens again, with weight 0.
        weights: in float64 [m], where all sets have the same, or [*shape, m].
        n_right: how many of the m tokens are the answer's; the others are subtracted from it.
        several: whether the last axis of ``shape`` holds several answers to one prompt.
    """

    ids: Tensor
    weights: Tensor
    n_right: int
    several: bool = False

    @classmethod
    def of(cls, correct: Tensor, incorrect: Tensor | None = None) -> TokenSets:
        """Tokens [*shape], or pairs of a right and a wrong one."""
        if incorrect is None:
            return cls(correct[..., None], _weights(1.0), 1)
        return cls(torch.stack((correct, incorrect), -1), _weights(1.0, -1.0), 1)

    @classmethod
    def made_of(
        cls, cells: Sequence[tuple[list[int], list[float]]], shape: Sequence[int], several: bool
    ) -> TokenSets:
        """Sets that are given one by one.

        Args:
            cells: of each set its ids and its weights.
            shape: that they are laid out in.
            several: see the attribute.
        """
        m = max(len(ids) for ids, _ in cells)
        ids = [own + own[:1] * (m - len(own)) for own, _ in cells]
        weights = [own + [0.0] * (m - len(own)) for _, own in cells]
        given = torch.tensor(ids, dtype=torch.long, device="cpu").reshape(*shape, m)
        if all(own == weights[0] for own in weights):
            of_all = torch.tensor(weights[0], dtype=torch.float64, device="cpu")
            return cls(given, of_all, m, several)
        each = torch.tensor(weights, dtype=torch.float64, device="cpu")
        return cls(given, each.reshape(*shape, m), m, several)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TokenSets)
            and (self.n_right, self.several) == (other.n_right, other.several)
            and torch.equal(self.ids, other.ids)
            and torch.equal(self.weights, other.weights)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def shape(self) -> torch.Size:
        """The shape in which the sets are laid out."""
        return self.ids.shape[:-1]

    @property
    def m(self) -> int:
        """How many tokens each set has."""
        return self.ids.shape[-1]

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest id and the largest."""
        if self.ids.numel() > _FEW_IDS:
            low, high = self.ids.aminmax()
            return int(low), int(high)
        each: list[int] = self.ids.reshape(-1).tolist()
        return min(each), max(each)

    def laid(self, index: Tensor) -> TokenSets:
        """The sets at numbers of any shape; these count the sets, flattened.

        Of several answers to one prompt, all are taken.
        """
        lead = self.shape[-1:] if self.several else ()
        ids = self.ids.reshape(-1, *lead, self.m)[index]
        weights = self.weights
        if weights.ndim > 1:
            weights = weights.reshape(-1, *lead, self.m)[index]
        return replace(self, ids=ids, weights=weights)

    def minus(self, wrong: TokenSets) -> TokenSets:
        """The difference of two, whose shapes broadcast. Both are answers' sides."""
        right = self
        if right.several and not wrong.several:
            wrong = wrong.spread()
        elif wrong.several and not right.several:
            right = right.spread()
        shape = right.shape  # the same for both, nearly always
        if shape != wrong.shape:
            shape = torch.broadcast_shapes(shape, wrong.shape)
        ids = torch.cat([each.ids.expand(*shape, each.m) for each in (right, wrong)], -1)
        if right.weights is wrong.weights is _weights(1.0):  # of two tokens, nearly always
            return TokenSets(ids, _weights(1.0, -1.0), 1, self.several or wrong.several)
        signed = [right.weights, -wrong.weights]
        if any(each.ndim > 1 for each in signed):
            signed = [each.expand(*shape, each.shape[-1]) for each in signed]
        return TokenSets(ids, torch.cat(signed, -1), right.m, self.several or wrong.several)

    def spread(self) -> TokenSets:
        """The same with an axis for several answers to one prompt, of length 1."""
        weights = self.weights if self.weights.ndim == 1 else self.weights.unsqueeze(-2)
        return replace(self, ids=self.ids.unsqueeze(-2), weights=weights, several=True)

    def distinct(self) -> tuple[TokenSets, Tensor]:
        """The sets that differ [K], and the number among them of each [*shape]."""
        if self.shape.numel() == 1:
            weights = self.weights if self.weights.ndim == 1 else self.weights.reshape(1, self.m)
            only = replace(self, ids=self.ids.reshape(1, self.m), weights=weights, several=False)
            return only, torch.zeros(self.shape, dtype=torch.long, device="cpu")
        columns = list(self.ids.reshape(-1, self.m).unbind(-1))
        if self.weights.ndim > 1:
            each = self.weights.reshape(-1, self.m).unbind(-1)
            columns += [own.unique(return_inverse=True)[1] for own in each]
        # Several numbers as one: rows of a matrix are slow to tell apart.
        code = columns[0]
        for number, more in enumerate(columns[1:]):
            if number:
                code = code.unique(return_inverse=True)[1]
            code = code * (int(more.max()) + 1) + more
        which = code.unique(return_inverse=True)[1]
        first = which.new_empty(int(which.max()) + 1)
        first[which] = torch.arange(len(which), device="cpu")
        weights = self.weights
        if weights.ndim > 1:
            weights = weights.reshape(-1, self.m)[first]
        flat = replace(self, ids=self.ids.reshape(-1, self.m)[first], weights=weights)
        return replace(flat, several=False), which.reshape(self.shape)

    # Of sets [K], as `distinct` makes them

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def plain(self) -> bool:
        """Whether each set is one token with weight 1."""
        return self.m == 1 and bool((self.weights == 1).all())

    @cached_property
    def totals(self) -> Tensor:
        """The sum of each set's weights [K] (or [1]), exactly 0 where they cancel."""
        totals = self.weights.sum(-1)
        cancel = totals.abs() <= _NOTHING * self.weights.abs().sum(-1)
        return totals.masked_fill(cancel, 0.0).reshape(-1)

    @cached_property
    def sizes(self) -> Tensor | None:
        """How large each set's number may be, in logits [K] (or [1]); None where all are 1.

        A difference of two logits counts as one: it is about as large as they are apart.
        """
        if self.weights.ndim == 1:
            each = [abs(weight) for weight in self.weights.tolist()]
            size = max(*each, sum(each) / 2)
            return None if size == 1 else self.weights.new_tensor([size])
        sizes = self.weights.abs()
        sizes = torch.maximum(sizes.amax(-1), sizes.sum(-1) / 2).reshape(-1)
        return None if bool((sizes == 1).all()) else sizes

    def weights_of(self, which: Tensor) -> Tensor:
        """The weights of some of the sets [n, m], or [1, m] where all have the same."""
        return self.weights[None] if self.weights.ndim == 1 else self.weights[which]

    def rows(
        self, some: Tensor, fetch: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Weighted sums of rows of the unembedding, and of their biases.

        Args:
            some: of the sets [k].
            fetch: from ids to rows of W_U and their biases.

        Returns:
            Sums [k, width] and [k].
        """
        ids = self.ids[some]
        if self.plain:
            return fetch(ids[:, 0])
        weights, step = self.weights_of(some), max(1, _ROWS_AT_ONCE // max(1, len(ids)))
        sums: tuple[Tensor, Tensor] | None = None
        for some_ids, w in zip(ids.split(step, 1), weights.split(step, 1), strict=True):
            W, b = fetch(some_ids.reshape(-1))
            w = w.to(W)
            W = (W.reshape(*some_ids.shape, W.shape[-1]) * w[..., None]).sum(1)
            b = (b.reshape(some_ids.shape) * w.to(b)).sum(1)
            sums = (W, b) if sums is None else (sums[0] + W, sums[1] + b)
        assert sums is not None
        return sums

    def of_logits(self, logits: Tensor, which: Tensor) -> Tensor:
        """Weighted sums of logits [n], in float64.

        Args:
            logits: of the tokens of each [n, m].
            which: of the sets [n].
        """
        if self.plain:
            return logits[:, 0].double()
        weights = self.weights.to(logits.device)
        if weights.ndim == 1:
            return logits.double() @ weights
        return (logits.double() * weights[which.to(logits.device)]).sum(-1)

    @property
    def answers(self) -> Tensor:
        """The token that each set asks for [K]; -1 where that is not one token with weight 1."""
        asked = self.n_right == 1
        if not asked:
            return torch.full((len(self),), -1, device="cpu")
        first = self.weights[..., 0]
        if first.ndim == 0 and float(first) == 1:  # of all sets
            return self.ids[:, 0]
        return torch.where(first == 1, self.ids[:, 0], -1)

    def names(self, texts: Callable[[Tensor], list[str]]) -> tuple[list[str], list[str] | None]:
        """The text of each set's answer, and of what is subtracted from it, or None.

        Args:
            texts: from ids to their texts.
        """
        flat = texts(self.ids.reshape(-1))
        rows = [flat[start : start + self.m] for start in range(0, len(flat), self.m)]
        weights = self.weights.expand(len(self), self.m).tolist()
        n = self.n_right
        right = [_name(row[:n], own[:n]) for row, own in zip(rows, weights, strict=True)]
        if n == self.m:
            return right, None
        wrong = [
            _name(row[n:], [-w for w in own[n:]]) for row, own in zip(rows, weights, strict=True)
        ]
        return right, wrong


def _name(texts: list[str], weights: list[float]) -> str:
    kept = [(text, w) for text, w in zip(texts, weights, strict=True) if w != 0]
    if [w for _, w in kept] == [1.0]:
        return kept[0][0]
    shown = ", ".join(repr(text) for text, _ in kept)
    if len(kept) > 1 and all(math.isclose(w, 1 / len(kept), rel_tol=1e-9) for _, w in kept):
        return f"mean of {shown}"
    terms = [f"{'-' if w < 0 else '+'} {_number(abs(w))}{text!r}" for text, w in kept]
    return " ".join(terms).removeprefix("+ ")


def _number(weight: float) -> str:
    return "" if weight == 1 else f"{weight:.6g} "


@lru_cache(maxsize=4)
def _weights(*weights: float) -> Tensor:
    """The weights of all sets; nobody writes to them."""
    return torch.tensor(weights, dtype=torch.float64, device="cpu")
