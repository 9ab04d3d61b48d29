"""Parts taken out one by one: which they are, and the table of what the model loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dla_hooks.bars import steps
from dla_hooks.call import ReadModel
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.measure.one_prompt import results
from dla_hooks.questions.ablated import ablatable, puts_of
from dla_hooks.questions.ablation import Part, Put
from dla_hooks.questions.feature_part import Dictionaries, FeaturePart
from dla_hooks.questions.taken_out import (
    COMPONENT,
    HEAD,
    Lost,
    Measured,
    Runs,
    container,
    lost,
    most_direct,
    own_units,
    own_written,
)
from dla_hooks.results.effects import Effects
from dla_hooks.units.base import Unit

_CHOSEN = "chosen"
_MOST_NUMBERS = 2**24
_UNIT_OF = {"write": COMPONENT, "shared expert": "expert"}


class OneByOne:
    """All runs of one call: the clean one, and one without each part.

    Args:
        runs: how the model is run.
        unit: whose rows are taken out.
        named: the labels of the parts; None is those with the largest direct effects.
        count: how many of these.
        ablation: what takes their place.
    """

    def __init__(
        self, runs: Runs, unit: Unit, named: list[str] | None, count: int, ablation: Any
    ) -> None:
        self._runs, self._unit = runs, unit
        stream = runs.target.stream  # what stands behind the reading cannot be missed there
        dictionaries = Dictionaries(unit, stream)
        clean: Measured | None = None
        if named is None:
            clean = runs.measured({_CHOSEN: unit} if unit.words.name != HEAD else {HEAD: unit})
            named = self._most_direct(clean, count)
        self.parts = [ablatable(stream, label, dictionaries) for label in named]
        units = {key: own for part in self.parts for key, own in own_units(part).items()}
        self._check_size()
        if clean is None or not set(units) <= set(clean.found.splits):
            clean = runs.measured(units)
        self.clean = clean
        self._puts = puts_of(self.parts, ablation, lambda: runs.source)
        self._ablation = ablation if isinstance(ablation, str) else "value"

    def effects(self, read: ReadModel) -> Effects:
        """Run the model without each part."""
        clean, parts = self.clean, self.parts
        columns: dict[str, list[Tensor]] = {name: [] for name in ("direct", "own", "read", "total")}
        by_row, by_unit = list[Lost](), list[Lost]()
        with steps(len(parts), "part") as done:
            for put in self._puts:
                own_N = self._without(put, columns, by_row, by_unit)
                columns["own"].append(own_N)
                columns["direct"].append(clean.row_N(put.part))
                done()
        numbers = {name: torch.stack(own) for name, own in columns.items()}
        result = results(clean.found, clean.outcome, self._runs.source, read.tokenizer)[COMPONENT]
        entries, dtype = clean.found.entries, result.attribution.dtype
        row_labels, rows = _together(by_row)
        unit_labels, unit_rows = _together(by_unit) if len(by_unit) == len(parts) else (None, None)
        gap = _gap(numbers, rows)
        return Effects(
            labels=[part.label for part in parts],
            unit=self._name_of_unit(),
            ablation=self._ablation,
            clean=result,  # type: ignore[arg-type]
            row_labels=row_labels,
            by_row=entries.unfold(rows.to(dtype)),
            unit_labels=unit_labels,
            by_unit=None if unit_rows is None else entries.unfold(unit_rows.to(dtype)),
            gap=gap,
            **{name: entries.unfold(own.to(dtype)) for name, own in numbers.items()},
        )

    def _without(
        self,
        put: Put,
        columns: dict[str, list[Tensor]],
        by_row: list[Lost],
        by_unit: list[Lost],
    ) -> Tensor:
        """Run the model without one part; what its own row lost [N]."""
        part, clean = put.part, self.clean
        units = {} if isinstance(part, FeaturePart) else own_units(part)
        other = self._runs.measured(units, put)
        components = lost(clean, other, COMPONENT)
        own_N = own_written(part, clean, other, components)
        columns["read"].append(components.read_CN.sum(0))
        columns["total"].append(clean.value_N - other.value_N)
        by_row.append(components.less(container(part), own_N))
        if HEAD in units:
            by_unit.append(lost(clean, other, HEAD).less(part.label, own_N))
        return own_N

    def _most_direct(self, clean: Measured, count: int) -> list[str]:
        name, stream = self._unit.words.name, self._runs.target.stream
        key = HEAD if name == HEAD else _CHOSEN
        kinds = self._unit.taken_out
        if "write" in kinds:
            kinds = tuple({write.kind for write in stream.writes})
        found = most_direct(clean, key, kinds, count)
        if found is None:
            raise InputError(
                f"which rows of the unit {name!r} count most over {len(clean.found.entries)} "
                "entries is not kept: select fewer positions, or name the parts: parts=[labels]"
            )
        if not found:
            raise UnsupportedModelError(
                f"{stream.backend.name}{stream.extent} has no row of the unit {name!r} to take out"
            )
        return found

    def _check_size(self) -> None:
        """Refuse ranked units with too many numbers: all rows beside a part are kept.

        Raises:
            InputError: with what fits.
        """
        rows = {next(iter(own_units(part)), ""): _beside(part) for part in self.parts}
        n_rows, n = sum(rows.values()), int(self._runs.selection.valid.sum())
        if n_rows * n > _MOST_NUMBERS:
            raise InputError(
                f"the {n_rows:,} rows beside the parts at {n} entries would be {n_rows * n:,} "
                f"numbers, and up to {_MOST_NUMBERS:,} are kept; {max(1, _MOST_NUMBERS // n_rows)} "
                "entries fit: select fewer positions, or parts of fewer layers"
            )

    def _name_of_unit(self) -> str:
        kinds = {
            "feature" if isinstance(part, FeaturePart) else _UNIT_OF.get(part.kind, part.kind)
            for part in self.parts
        }
        return kinds.pop() if len(kinds) == 1 else ""


def _beside(part: Part) -> int:
    """The rows of a ranked unit that are measured with a part."""
    return part.dictionary.n_features if isinstance(part, FeaturePart) else part.among


def _together(each: Sequence[Lost]) -> tuple[list[str], Tensor]:
    """What rows wrote less in several runs, by the labels of all [part, row, N]."""
    labels = list(dict.fromkeys(label for one in each for label in one.labels))
    first = each[0].written_CN
    found = first.new_zeros(len(each), len(labels), first.shape[-1])
    for number, one in enumerate(each):
        found[number, [labels.index(label) for label in one.labels]] = one.written_CN
    return labels, found


def _gap(numbers: dict[str, Tensor], rows: Tensor) -> float:
    """The largest miss of the sum, over the larger of own and read."""
    if not rows.numel():
        return 0.0
    miss = numbers["own"] + rows.sum(1) + numbers["read"] - numbers["total"]
    size = torch.maximum(numbers["own"].abs(), numbers["read"].abs()).max()
    return float(miss.abs().max() / size) if bool(size) else float(miss.abs().max())
