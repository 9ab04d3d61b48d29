"""What would be missed: the direct effect of parts beside what taking them out really does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dla_hooks.call import ReadModel, check_given, checked, model_of, source_of, target_of
from dla_hooks.errors import DecompositionError, HookError, InputError, UnsupportedModelError
from dla_hooks.inputs import positions
from dla_hooks.inputs.options import whole_number
from dla_hooks.measure.completeness import seems_current
from dla_hooks.measure.one_prompt import results
from dla_hooks.modules.user_hooks import refuse_second_run
from dla_hooks.modules.version import forget
from dla_hooks.questions.ablated import ZERO, ablatable, names_of, puts_of
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
from dla_hooks.units import UnitName, read_units
from dla_hooks.units.base import Unit
from dla_hooks.units.feature import Features

_KINDS = {
    COMPONENT: (),
    HEAD: ("head",),
    "neuron": ("neuron",),
    "expert": ("expert", "shared"),
    "feature": ("feature",),
}
"""Of each unit whose rows can be taken out, the kinds of these; of components, the writes."""
_CHOSEN = "chosen"
_MOST_NUMBERS = 2**24
_UNIT_OF = {"write": COMPONENT, "shared expert": "expert"}


def effects(
    model: Any,
    input: Any = None,
    answer_tokens: Any = None,
    incorrect_tokens: Any = None,
    *,
    unit: UnitName | Unit = HEAD,
    parts: int | Sequence[str] = 10,
    ablation: Any = ZERO,
    pos: Any = -1,
    tokenizer: Any = None,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
    center_unembed: bool | None = None,
    check: bool = True,
    chunk_size: int | None = None,
) -> Effects:
    """Take parts out one by one: what the logit really loses, and where that went.

    A direct effect says what a row wrote to the logit. Whether the row would be missed is another
    question: later parts read what it wrote, and may make up for its loss. Each part is taken out
    at all positions by a real hook (see :func:`ablated`), the model is run, and the two runs are
    compared exactly, with x_c what the last stream holds of row c and s the final norm's scale:

        total      = logit of the clean run - logit of the ablated run, before any cap
                   = own + downstream + read
        own        = what the part's own row wrote less
        downstream = what all other rows wrote less; negative where they make up for it
        read       = what the final norm's scale changes in all rows

    For k parts the model runs k + 1 times, and once more for means.

    Args:
        model: as for :func:`direct_logit_attribution`; so are all arguments that are not described.
        input: the prompts.
        answer_tokens: whose logit.
        incorrect_tokens: whose logit is subtracted, or None.
        unit: whose rows are taken out: ``"component"``, ``"head"``, ``"neuron"``, ``"expert"``, or
            a :class:`Features`.
        parts: how many, those with the largest direct effects (of their means over batch and
            positions; embeddings, remainders and hooks are left out); or a list of labels, which
            may be of several units.
        ablation: what takes their place, as in :func:`ablated`: ``"zero"``; ``"mean"``, each
            part's own mean over the real tokens of ``input``; a number, a tensor, or a mapping
            from each label to one of these.
        pos: the positions at which the logit is looked at.
        tokenizer: for strings.
        attention_mask: for padded ids.
        prepend_bos: for strings.
        center_unembed: take the vocabulary's mean off every row of W_U.
        check: hold every run against the model's own logits.
        chunk_size: run the prompt so many tokens at a time.

    Returns:
        An :class:`Effects`.

    Raises:
        InputError: for a unit whose rows cannot be taken out (sources, layers, adapters), and for
            any other argument that cannot be used.
        LabelError: (a KeyError) for a part that this model does not have.
        UnsupportedModelError: for a model, or parts, that cannot be told apart.
        DecompositionError: when the parts of a run do not sum to the model's own numbers.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> found = dla_hooks.effects(
    ...     model, "The keys near the cabinet", " are", " is", parts=["L1H0", "2_mlp_out"],
    ...     tokenizer=tokenizer)
    >>> [record["label"] for record in found.records()]
    ['L1H0', '2_mlp_out']
    """
    given = _one_unit(unit)
    if answer_tokens is None:
        raise InputError("answer_tokens is required: the token whose logit is attributed")
    named = None if isinstance(parts, int) and not isinstance(parts, bool) else names_of(parts)
    count = 0 if named is not None else whole_number(parts, "parts", least=1)
    backend = checked(model)
    check_given(input, None)

    def asked() -> tuple[ReadModel, Runs]:
        read = model_of(backend, tokenizer=tokenizer, prepend_bos=prepend_bos)
        conventions = read.conventions(center_unembed, False)
        source = source_of(
            read,
            input,
            attention_mask=attention_mask,
            chunk_size=chunk_size,
            purpose=given.words.name,
        )
        selection = positions.select(pos, source.prompt.mask)
        target = target_of(read, answer_tokens, incorrect_tokens, conventions)(read.stream)
        return read, Runs(read.stream, source, selection, target, conventions, bool(check))

    read, runs = asked()
    failed: DecompositionError | HookError | None = None
    try:
        found = _Found(runs, given, named, count, ablation)
        current = check or seems_current(found.clean.found, found.clean.outcome)
        if current or not runs.stream.remembered:
            return found.effects(read)
    except (DecompositionError, HookError) as error:
        if not runs.stream.remembered:
            raise
        failed = error
    forget(backend.model)  # it may have changed in a way that leaves no trace
    if failed is not None:
        refuse_second_run(backend.model, failed)
    read, runs = asked()
    return _Found(runs, given, named, count, ablation).effects(read)


def _one_unit(unit: Any) -> Unit:
    units, single = read_units(unit)
    found = next(iter(units.values()))
    if not single:
        raise InputError("unit takes one unit; name parts of several as parts=[labels]")
    name = found.words.name
    if name not in _KINDS:
        why = {
            "source": "attention adds up what a head reads before any module shows it; take out "
            "heads (unit='head')",
            "layer": "they are running sums; take out components",
            "adapter": "an adapter is switched off as a whole: dla_hooks.compare with "
            "other_context=model.disable_adapter",
        }.get(name, f"known are {', '.join(map(repr, _KINDS))}")
        raise InputError(f"rows of the unit {name!r} cannot be taken out: {why}")
    return found


class _Found:
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
        dictionaries = Dictionaries(unit if isinstance(unit, Features) else None, stream)
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
        for put in self._puts:
            own_N = self._without(put, columns, by_row, by_unit)
            columns["own"].append(own_N)
            columns["direct"].append(clean.row_N(put.part))
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
        name = self._unit.words.name
        key = HEAD if name == HEAD else _CHOSEN
        kinds = _KINDS[name] or tuple({write.kind for write in self._runs.target.stream.writes})
        found = most_direct(clean, key, kinds, count)
        if found is None:
            raise InputError(
                f"which rows of the unit {name!r} count most over {len(clean.found.entries)} "
                "entries is not kept: select fewer positions, or name the parts: parts=[labels]"
            )
        if not found:
            raise UnsupportedModelError(
                f"{self._runs.stream.backend.name} has no row of the unit {name!r} to take out"
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
