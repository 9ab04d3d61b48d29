"""One row of a sparse dictionary, as a part of the activation that the dictionary reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dla_hooks.calibration.named_places import NamedPlace, feature_rows
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.modules.dictionaries import Codes, Dictionary
from dla_hooks.modules.hooks import Call, Place
from dla_hooks.projection.features import BEYOND
from dla_hooks.residual.stream import Stream
from dla_hooks.units.base import Unit


@dataclass(frozen=True)
class FeaturePart:
    """A feature, ``b_dec`` or ``error`` of one dictionary.

    Attributes:
        label: of its row.
        at: the place of the dictionary.
        dictionary: the dictionary.
        number: of the feature; behind the features come ``b_dec`` and ``error``.
        unit: the unit of that dictionary alone, which keeps all rows.
    """

    label: str
    at: NamedPlace
    dictionary: Dictionary
    number: int
    unit: Unit

    @property
    def place(self) -> Place:
        """The module's input or output that the dictionary reads."""
        site = self.at.heads
        return self.at.place.entered if site and site.linear is site.proj else self.at.place

    @property
    def width(self) -> int:
        """The channels of what it writes."""
        return self.at.width

    def flat(self, x: Tensor) -> Tensor:
        """An activation at the place with its channels side by side [..., width]."""
        return x if self.at.heads is None else self.at.heads.flat(x)

    def encode(self, x_TM: Tensor) -> Codes:
        """What the dictionary makes of some activations [T, width]."""
        if self.dictionary.centred:
            x_TM = x_TM - x_TM.mean(-1, keepdim=True)
        return self.dictionary.encode(x_TM)

    def written(self, x_TM: Tensor, codes: Codes) -> Tensor:
        """What of some activations is its own [T, width]."""
        n, f_TF = self.dictionary.n_features, codes.f_TF
        if self.number > n:
            return x_TM - self.dictionary.decode(codes).to(x_TM)
        if self.number == n:
            return self.dictionary.decode(codes._replace(f_TF=torch.zeros_like(f_TF))).to(x_TM)
        own_T1 = f_TF[:, self.number, None]
        if codes.scale_T1 is not None:
            own_T1 = own_T1 * codes.scale_T1
        return (own_T1 * self._row_M).to(x_TM)

    def seen(self, call: Call) -> Tensor:
        """What a call of the module holds of it, position by position [..., width]."""
        x = self.flat(call.entered if self.place.before else call.left)
        x_TM = x.reshape(-1, x.shape[-1])
        return self.written(x_TM, self.encode(x_TM)).reshape(x.shape)

    @cached_property
    def _row_M(self) -> Tensor:
        """The feature's row of the decoder."""
        like = self.dictionary.bias()
        f_TF = like.new_zeros(2, self.dictionary.n_features)
        f_TF[1, self.number] = 1
        rows_2M = self.dictionary.decode(Codes(f_TF.to(self.dictionary.dtype)))
        return rows_2M[1] - rows_2M[0]


class Dictionaries:
    """The dictionaries of a unit, read once.

    Args:
        unit: the unit; None is no dictionary.
        stream: the located model.

    Raises:
        InputError: for another unit, and for dictionaries that cannot be read.
    """

    def __init__(self, unit: Unit | None, stream: Stream) -> None:
        if unit is not None and not isinstance(unit, Unit):
            raise InputError(
                f"unit is for labels of features: the unit with dictionaries; got {unit!r:.60}"
            )
        self._unit, self._read = unit, [] if unit is None else unit.read(stream)
        self.places = [at.label for at, _ in self._read]

    def part(self, label: str) -> FeaturePart | None:
        """Find one row; None where none has that label.

        Raises:
            UnsupportedModelError: at a place that is read beside the stream.
        """
        rows = feature_rows([(at, dictionary.n_features) for at, dictionary in self._read])
        number = rows.number_of(label)
        if number is None or self._unit is None:
            return None
        for at, dictionary in self._read:
            n_rows = dictionary.n_features + BEYOND
            if number < n_rows:
                _check_place(label, at)
                return FeaturePart(label, at, dictionary, number, self._unit.at_place(at.label))
            number -= n_rows
        return None


def _check_place(label: str, at: NamedPlace) -> None:
    if at.name == "mid":
        raise UnsupportedModelError(
            f"{label} is at {at.label}, which a norm reads while the stream itself goes past it, "
            "so that nothing can be taken out of the stream there; give the dictionary's place as "
            "what was written before"
        )
