"""Check that all contenders give the same numbers, before any is timed.

Every contender is compared with this library's numbers, in its own convention and unit. The
contenders that save activations share no code with the library. The plain passes give the model's
own logits. So agreement is not agreement of one formula with itself.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, OURS, PLAIN, Bench, Contender, Rows, result_rows
from benchmarks.models import Setting
from dla_hooks import direct_logit_attribution

TOLERANCE = 1e-4
"""Of the logits' standard deviation over the vocabulary, in float32."""


class Disagreement(Exception):
    """Two contenders whose numbers differ, by name."""


@dataclass(frozen=True)
class Agreement:
    """The difference between two contenders.

    Attributes:
        one, other: their names.
        gap: the largest difference over all rows and positions, over the logits' spread.
        rows: the number of compared rows.
    """

    one: str
    other: str
    gap: float
    rows: int


def prove(names: list[str], setting: Setting) -> list[Agreement]:
    """Check that contenders agree, or name the pair that does not.

    16 bits round differently along every path, so a setting in 16 bits is proven in float32, on
    weights from the same seed.

    Raises:
        Disagreement: naming the pair, the row and by how much.
    """
    if setting.dtype not in ("float32", "float64"):
        setting = dataclasses.replace(setting, dtype="float32")
    return prove_on(Bench(setting), names, setting)


def prove_on(bench: Bench, names: list[str], setting: Setting) -> list[Agreement]:
    """Check agreement on given models, in float32 or float64."""
    spread = _spread(bench, setting)
    truths: dict[tuple[str, bool], Rows] = {}
    found = []
    for name in names:
        contender = CONTENDERS[name]
        key = (contender.unit or setting.unit, contender.processed)
        if key not in truths:
            truths[key] = _truth(bench.model("hf"), setting, *key)
        found.append(_compare(contender, bench, setting, truths[key], spread))
    return found


def _truth(model: Any, setting: Setting, unit: str, processed: bool) -> Rows:
    answer, incorrect, pos = setting.answers()
    result = direct_logit_attribution(
        model,
        setting.ids(),
        answer,
        incorrect,
        unit=unit,
        pos=pos,
        center_unembed=processed,
        fold_value_biases=processed,
    )
    return result_rows(result, setting)


def _compare(
    contender: Contender, bench: Bench, setting: Setting, truth: Rows, spread: float
) -> Agreement:
    name = contender.name
    rows = contender.read(bench.call(name, setting)(), setting)
    # A plain pass gives the logit alone; hidden states give nothing within a block.
    partial = contender.unit is not None or set(rows) == {"logit"}
    odd = set(rows) - set(truth) if partial else (set(rows) ^ set(truth)) - {"logit"}
    if odd or not rows:
        raise Disagreement(
            f"{OURS} and {name} have rows of other names: {sorted(odd)[:4]} ({setting.named()})"
        )
    worst, gap = "", -1.0
    for label, values in rows.items():
        found = values.detach().cpu().double()
        expected = truth[label].detach().cpu().double()[..., -found.shape[-1] :]
        difference = float((found - expected).abs().max()) / spread
        difference = float("inf") if math.isnan(difference) else difference
        if difference > gap:
            worst, gap = label, difference
    if gap > TOLERANCE:
        raise Disagreement(
            f"{OURS} and {name} do not agree: row {worst} differs by {gap:.1e} of the logits' "
            f"spread, where {TOLERANCE:.0e} is allowed ({setting.named()})"
        )
    return Agreement(OURS, name, gap, len(rows))


def _spread(bench: Bench, setting: Setting) -> float:
    """The standard deviation of the last position's logits over the vocabulary."""
    with torch.no_grad():
        logits = bench.call(PLAIN, setting)().logits[:, -1]
    return float(logits.double().std(-1).mean())
