"""What takes the place of parts, as replacements at the modules' inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_hooks.calibration.named_parts import Experts, NamedPart
from dla_hooks.errors import HookError, ShapeMismatchError
from dla_hooks.modules.experts import ExpertsCall
from dla_hooks.modules.hooks import Place
from dla_hooks.modules.replacing import Arguments, Replacement, put_in
from dla_hooks.questions.feature_part import FeaturePart

Part = NamedPart | FeaturePart


@dataclass(frozen=True)
class Put:
    """A part with what takes its place.

    Attributes:
        part: the part.
        value: a number [], or [width], [pos, width] or [batch, pos, width]; None is zero.
    """

    part: Part
    value: Tensor | None


def replacements(puts: Sequence[Put]) -> list[Replacement]:
    """The replacements for some parts; those of one place in one."""
    groups: dict[tuple[Any, ...], list[Put]] = {}
    for put in puts:
        part = put.part
        among = id(part.dictionary) if isinstance(part, FeaturePart) else part.experts is None
        groups.setdefault((part.place, type(part), among), []).append(put)
    found = list[Replacement]()
    for (place, *_), group in groups.items():
        first = group[0].part
        if isinstance(first, FeaturePart):
            found.append(Replacement(place, _Features(group).change))
        elif first.experts is None:
            found.append(Replacement(place, _Channels(group).change))
        elif first.experts.side_by_side:
            apart = _ExpertsApart(group, first.experts.n)
            found.append(Replacement(place.entered, apart.without))
            if any(put.value is not None for put in group):
                found.append(Replacement(place, apart.change))
        else:
            routed = _ExpertsSummed(place, group)
            found.append(Replacement(place.entered, arguments=routed.without))
            if routed.values:
                found.append(Replacement(place, routed.change))
    return found


class _Channels:
    """Whole writes, and slices of an activation."""

    def __init__(self, puts: Sequence[Put]) -> None:
        self._puts = puts

    def change(self, x: Tensor) -> Tensor:
        new = x
        for put in self._puts:
            part = put.part
            assert isinstance(part, NamedPart)
            flat = new if part.heads is None else part.heads.flat(new)
            value = None if put.value is None else fitted(put.value, part.read(flat), part.label)
            new = put_in(flat, part.channels, value).reshape(x.shape)
        return new


class _Features:
    """Rows of one dictionary: all are told apart in what stands there ahead of the change."""

    def __init__(self, puts: Sequence[Put]) -> None:
        self._puts = puts

    def change(self, x: Tensor) -> Tensor:
        first = self._puts[0].part
        assert isinstance(first, FeaturePart)
        flat = first.flat(x)
        x_TM = flat.reshape(-1, flat.shape[-1])
        wide_TM = x_TM.to(torch.promote_types(x.dtype, first.dictionary.dtype))
        codes, new_TM = first.encode(wide_TM), wide_TM
        for put in self._puts:
            assert isinstance(put.part, FeaturePart)
            new_TM = new_TM - put.part.written(wide_TM, codes)
        new = new_TM.reshape(flat.shape)
        for put in self._puts:
            if put.value is not None:
                new = new + fitted(put.value, new, put.part.label)
        return new.to(x.dtype).reshape(x.shape)


class _ExpertsApart:
    """Experts each of which reads every position, times a score: zero where it is not chosen.

    One that is replaced reads zeros, and so is chosen nowhere.
    """

    def __init__(self, puts: Sequence[Put], n: int) -> None:
        self._puts, self._n = {_experts(put).number: put for put in puts}, n

    def without(self, x: Tensor) -> Tensor:
        new_END: Tensor = x.unflatten(0, (self._n, -1)).clone()
        for number in self._puts:
            new_END[number].zero_()
        return new_END.reshape(x.shape)

    def change(self, y: Tensor) -> Tensor:
        new_END: Tensor = y.unflatten(0, (self._n, -1)).clone()
        for number, put in self._puts.items():
            if put.value is not None:
                new_END[number].copy_(fitted(put.value, new_END[number], put.part.label))
        return new_END.reshape(y.shape)


class _ExpertsSummed:
    """Experts whose outputs come as one sum, each times a routing weight.

    The weights of those that are replaced are set to zero on the way in; the others keep theirs.
    """

    def __init__(self, place: Place, puts: Sequence[Put]) -> None:
        self._place = place
        self._numbers = torch.tensor([_experts(put).number for put in puts], device="cpu")
        self.values = [put for put in puts if put.value is not None]

    def without(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        seen = ExpertsCall.read(args, kwargs)
        if seen is None:
            raise HookError(
                f"{self._place.name} was called otherwise than in a short run: not with hidden "
                "states, experts and their weights. Hooks that change its arguments do this"
            )
        gone = torch.isin(seen.index, self._numbers.to(seen.index))
        weights = seen.weights.masked_fill(gone, 0)
        swapped = [weights if value is seen.weights else value for value in args]
        named = {k: weights if value is seen.weights else value for k, value in kwargs.items()}
        return tuple(swapped), named

    def change(self, y: Tensor) -> Tensor:
        for put in self.values:
            assert put.value is not None
            y = y + fitted(put.value, y, put.part.label)
        return y


def _experts(put: Put) -> Experts:
    assert isinstance(put.part, NamedPart)
    assert put.part.experts is not None
    return put.part.experts


def fitted(value: Tensor, there: Tensor, label: str) -> Tensor:
    """A value, laid over what stands at a part's place [..., width].

    Raises:
        ShapeMismatchError: where it does not fit; it names both shapes.
    """
    value = value.to(there)
    if there.ndim == 2 and value.ndim > 1:  # the module flattens its input
        value = value.reshape(-1, value.shape[-1])
        if len(value) > 1 and len(there) % len(value) == 0:
            value = value.repeat(len(there) // len(value), 1)
    try:
        return value.expand(there.shape)
    except RuntimeError:
        raise ShapeMismatchError(
            f"what is to stand at {label} has the shape {list(value.shape)}, and what the model "
            f"has there {list(there.shape)}; give [width], or [pos, width] for a run of exactly "
            "these positions (one with a cache of keys and values runs one at a time)"
        ) from None
