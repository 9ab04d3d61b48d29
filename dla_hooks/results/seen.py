"""What the model itself said where its logits were looked at: ranks, probabilities, top tokens."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self
from weakref import ReferenceType, ref

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Seen) or self.names != other.names:
            return False
        pairs = [(getattr(self, one.name), getattr(other, one.name)) for one in fields(self)[:-1]]
        return all(
            a.shape == b.shape and torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))
            for a, b in pairs
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def nothing(cls, shape: torch.Size, top: int = 0) -> Seen:
        """Nothing was looked at."""
        numbers = torch.full(shape, math.nan, dtype=torch.float32, device="cpu")
        none = torch.full(shape, -1, device="cpu")
        return cls(numbers, none, none.expand(top, *shape), numbers.expand(top, *shape))

    @classmethod
    def when_read(cls, look: Callable[[], Seen]) -> Seen:
        """What ``look`` returns, worked out when any of it is first read.

        Until then the function holds what it looks at. So only a few wait at a time: the oldest is
        worked out when one more comes.
        """
        found = _Waiting(look)
        _waiting.append(ref(found))
        if len(_waiting) > _MOST_WAITING:
            oldest = _waiting.popleft()()
            if oldest is not None:
                with suppress(Exception):  # whoever reads it is told
                    _work_out(oldest)
        return found

    @classmethod
    def joined(cls, pieces: Sequence[Seen]) -> Seen:
        """Those of neighbouring positions, side by side."""
        top = max(len(one.top_ids) for one in pieces)
        wide = [one if len(one.top_ids) == top else cls._widened(one, top) for one in pieces]
        numbers = {
            one.name: torch.cat([getattr(own, one.name) for own in wide], -1)
            for one in fields(cls)[:-1]
        }
        return cls(**numbers, names={k: text for one in pieces for k, text in one.names.items()})

    @classmethod
    def _widened(cls, one: Seen, top: int) -> Seen:
        """One without top tokens, beside others that have some."""
        nothing = cls.nothing(one.rank.shape, top)
        return replace(one, top_ids=nothing.top_ids, top_probability=nothing.top_probability)

    def changed(self, change: Callable[[Tensor], Tensor], top: Callable[[Tensor], Tensor]) -> Self:
        """The same with other tensors: those of the entries, and those with an axis before them."""
        return replace(
            self,
            log_probability=change(self.log_probability),
            rank=change(self.rank),
            top_ids=top(self.top_ids),
            top_probability=top(self.top_probability),
        )

    def at(self, place: tuple[Any, ...]) -> Self:
        """The same at a place of the batch and the positions."""
        return self.changed(lambda own: own[place], lambda own: own[(slice(None), *place)])

    def named(self, texts: Callable[[list[int]], list[str]]) -> Self:
        """The same with the texts of its tokens."""
        ids = sorted(set(self.top_ids.flatten().tolist()) - {-1})
        return replace(self, names=dict(zip(map(str, ids), texts(ids), strict=True)))

    def top(self) -> list[list[tuple[str, float]]]:
        """The top tokens of each entry, flattened, with their probabilities."""
        k = len(self.top_ids)
        ids = self.top_ids.reshape(k, -1).T.tolist()
        shares = self.top_probability.reshape(k, -1).T.tolist()
        return [
            [(self.names.get(str(i), str(i)), p) for i, p in zip(*pair, strict=True) if i >= 0]
            for pair in zip(ids, shares, strict=True)
        ]


class _Waiting(Seen):
    """What has not been worked out yet; then it is a :class:`Seen` like any other."""

    def __init__(self, look: Callable[[], Seen]) -> None:
        vars(self)["_look"] = look

    def __getattr__(self, name: str) -> Any:  # of what is not there
        if name.startswith("__"):
            raise AttributeError(name)
        _work_out(self)
        return object.__getattribute__(self, name)

    def __reduce__(self) -> Any:
        _work_out(self)
        return object.__reduce_ex__(self, 2)


def _work_out(seen: Seen) -> None:
    """Look, and let it be what was seen."""
    with _lock:
        look = vars(seen).get("_look")
        if look is None:  # another thread has been here
            return
        with torch.inference_mode(False), torch.no_grad():
            vars(seen).update(vars(look()))
        object.__setattr__(seen, "__class__", Seen)
        del vars(seen)["_look"]


_lock = threading.RLock()
_MOST_WAITING = 16
_waiting: deque[ReferenceType[Seen]] = deque()
