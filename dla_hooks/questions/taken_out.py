"""One clean run and one without each part: what each row wrote, in both.

Nothing but the scale of the final norm is read otherwise in a run of the same model, so one
direction serves all of them. With x what a row wrote to the last stream and s the scale,

    written = (x_A - x_B) . d (1 / s_A + 1 / s_B) / 2
    read    = (x_A + x_B) . d (1 / s_A - 1 / s_B) / 2

sum to what the row counted in the clean run A less what it counts in the ablated run B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dla_hooks.backends import Conventions
from dla_hooks.calibration.named_parts import NamedPart
from dla_hooks.inputs.positions import Selection
from dla_hooks.measure.claims import Outcome
from dla_hooks.measure.one_prompt import measure
from dla_hooks.modules.user_hooks import FINAL_HOOK
from dla_hooks.questions.ablated import Ablated
from dla_hooks.questions.ablation import Part, Put
from dla_hooks.questions.feature_part import FeaturePart
from dla_hooks.residual.stream import Stream
from dla_hooks.results.row_runs import RowRuns
from dla_hooks.results.rows import Row
from dla_hooks.sources.base import Source
from dla_hooks.targets.base import Target
from dla_hooks.units import DEFAULT_UNIT, unit_class
from dla_hooks.units.base import RankedSplit, Split, Unit
from dla_hooks.units.plan import Measurement, Plan, make_plan

COMPONENT, HEAD = DEFAULT_UNIT, "head"


@dataclass
class Runs:
    """Runs of one model on one prompt, with one question.

    Attributes:
        stream: the located model; the target's own may end before it does.
        source: what it is run on.
        selection: the positions.
        target: what is attributed.
        conventions: of the call.
        check: hold each run against the model's own logits.
    """

    stream: Stream
    source: Source
    selection: Selection
    target: Target
    conventions: Conventions
    check: bool
    _plans: dict[tuple[str, ...], Plan] = field(default_factory=dict)

    def measured(self, units: Mapping[str, Unit], put: Put | None = None) -> Measured:
        """Run the model: into components and some units; without a part, if one is given."""
        plan = self._plans.get(tuple(units))
        if plan is None:
            every = {COMPONENT: unit_class(COMPONENT)(), **units}
            plan = make_plan(self.target, every, self.conventions)
            self._plans[tuple(units)] = plan
        if put is None:
            return Measured(*measure(plan, self.source, self.selection, self.check))
        with Ablated(self.stream, [put]):
            return Measured(*measure(plan, self.source, self.selection, self.check))


@dataclass(frozen=True)
class Measured:
    """One run, measured.

    Attributes:
        found: its scalars.
        outcome: what the check found.
    """

    found: Measurement
    outcome: Outcome

    @property
    def scale_N(self) -> Tensor:
        """The final norm's scale."""
        return self.found.reading.scale_N.double()

    @property
    def value_N(self) -> Tensor:
        """The logit, before any cap: the stream's own projection."""
        return self.found.reading.value_N().double()

    def labels(self, key: str) -> list[str]:
        """The labels of all rows of a unit."""
        return [row.label for row in self.found.splits[key].rows]

    def rows(self, key: str, labels: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What some rows of a dense unit counted; one that is not there counts nothing.

        Returns:
            All of it [labels, N], and of that what hooks of the caller's added behind the final
            norm: in rows of their own, or in the unit's remainder.
        """
        split = self.found.splits[key]
        at = {label: place for place, label in enumerate(labels)}
        places = [at[row.label] for row in split.rows]
        values_CN = self.scale_N.new_zeros(len(labels), *self.scale_N.shape)
        values_CN[places] = split.values_CN.double()
        behind_CN = torch.zeros_like(values_CN)
        remainder = self.found.plan.units[key].unit.words.remainder
        for label, added_RN in self.found.reading.hooks_RN.items():
            behind_CN[at[remainder or label]] += added_RN[0].double()
        return values_CN, behind_CN

    def row_N(self, part: Part) -> Tensor:
        """What a part's own row counted [N]."""
        if isinstance(part, NamedPart) and part.kind == "write":
            return self.rows(COMPONENT, self.labels(COMPONENT))[0][self._place(part.label)]
        split = self.found.splits[next(iter(own_units(part)))]
        if isinstance(split, RankedSplit):
            return _kept(split, part)
        numbers = [n for n, row in enumerate(split.rows) if _is_own(row, part)]
        return split.values_CN[numbers].double().sum(0)

    def _place(self, label: str) -> int:
        return self.labels(COMPONENT).index(label)


def own_units(part: Part) -> dict[str, Unit]:
    """The unit that a part is a row of, with few other rows, by a key; components come anyway."""
    if isinstance(part, FeaturePart):
        return {f"feature at {part.at.label}": part.unit}
    if part.kind == "write":
        return {}
    name = part.kind.rpartition(" ")[2]  # of a shared expert: expert
    key = HEAD if name == HEAD else f"{name}s of {part.layer}"
    return {key: unit_class(name).of_layer(part.layer)}


def container(part: Part) -> str:
    """The component that a part is within."""
    if isinstance(part, NamedPart):
        return part.write
    if part.at.write is not None:
        return part.at.write.label
    return FINAL_HOOK if part.at.layer is None else f"{part.at.layer}_hook"


@dataclass(frozen=True)
class Lost:
    """Clean less ablated, row by row.

    Attributes:
        labels: of the rows.
        written_CN: what each wrote otherwise.
        read_CN: what is read otherwise.
    """

    labels: list[str]
    written_CN: Tensor
    read_CN: Tensor

    def less(self, label: str, own_N: Tensor) -> Lost:
        """The same without what a part of one row lost."""
        written_CN = self.written_CN.clone()
        written_CN[self.labels.index(label)] -= own_N
        return replace(self, written_CN=written_CN)


def lost(clean: Measured, other: Measured, key: str) -> Lost:
    """Split the difference of two runs; a row that one alone has counts nothing in the other."""
    labels = list(dict.fromkeys((*clean.labels(key), *other.labels(key))))
    (first_CN, hooks_CN), (second_CN, others_CN) = (run.rows(key, labels) for run in (clean, other))
    added_CN = hooks_CN - others_CN  # by which no scale is divided
    values = first_CN - hooks_CN, second_CN - others_CN
    written_CN = _written(values, (clean.scale_N, other.scale_N))
    return Lost(labels, written_CN + added_CN, values[0] - values[1] - written_CN)


def own_written(part: Part, clean: Measured, other: Measured, components: Lost) -> Tensor:
    """What a part's own row lost [N]."""
    if isinstance(part, FeaturePart):
        # Encoded anew, the activation without it has other features: what it was is the difference.
        return components.written_CN[components.labels.index(container(part))]
    values = clean.row_N(part), other.row_N(part)
    return _written(values, (clean.scale_N, other.scale_N))


def _written(values: tuple[Tensor, Tensor], scales: tuple[Tensor, Tensor]) -> Tensor:
    (one_N, other_N), (s_N, t_N) = values, scales
    return (one_N * s_N - other_N * t_N) * (1 / s_N + 1 / t_N) / 2


def _is_own(row: Row, part: NamedPart | FeaturePart) -> bool:
    """Whether a row is a part's, or what the hook that replaced an expert wrote in its layer."""
    if row.label == part.label:
        return True
    ours = isinstance(part, NamedPart) and part.experts is not None
    return ours and row.kind == "hook"


def _kept(split: RankedSplit, part: Part) -> Tensor:
    """The numbers of one row [N], of a split that keeps all rows."""
    number: int | None = part.number if isinstance(part, FeaturePart) else None
    if number is None and isinstance(split.rows, RowRuns):
        number = split.rows.number_of(part.label)
    assert number is not None
    there_KN = split.index_KN.eq(number)
    return split.values_KN.double().masked_fill(~there_KN, 0).sum(0)


def most_direct(run: Measured, key: str, kinds: Sequence[str], k: int) -> list[str] | None:
    """The labels of the rows with the largest |mean|; None where a ranked unit has no means.

    Args:
        run: the clean run.
        key: of the unit.
        kinds: of rows that can be taken out.
        k: how many.
    """
    split, n = run.found.splits[key], max(1, len(run.found.entries))
    if isinstance(split, Split):
        numbers = [place for place, row in enumerate(split.rows) if row.kind in kinds]
        means = split.values_CN[numbers].double().sum(-1) / n
        order = means.abs().topk(min(k, len(numbers))).indices.tolist()
        return [split.rows[numbers[place]].label for place in order]
    if split.row_sums_RB is not None:
        means = split.row_sums_RB.double().sum(-1) / n
        order = means.abs().argsort(descending=True).tolist()
    elif n == 1:
        order = [number for number in split.index_KN[:, 0].tolist() if number >= 0]
    else:
        return None
    found = (row for row in (split.rows[number] for number in order) if row.kind in kinds)
    return [row.label for _, row in zip(range(k), found, strict=False)]
