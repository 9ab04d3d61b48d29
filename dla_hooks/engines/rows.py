"""Results of many prompts as columns: numbers, errors, and what they are about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dla_hooks.engines.about import About
from dla_hooks.errors import DLAError
from dla_hooks.results.ranked import RankedAttribution, Result

NUMBERS = ("attribution", "bias", "logit", "gap")
RANKED = ("kept", "rest", "remainder", "means")
OWN = (*NUMBERS, "error", "about", *RANKED)
"""The columns that are written."""


class Outcomes:
    """Writes results and errors as columns.

    Args:
        run: what the numbers depend on besides the model's class, see :class:`About`.
        checkpoint: the name of the model.
        several: whether a prompt has several positions.
        means: whether every row's mean is written of units that keep some rows only.
    """

    def __init__(self, run: dict[str, Any], checkpoint: str, several: bool, means: bool) -> None:
        self._run, self._checkpoint, self._means = run, checkpoint, means
        self._known: list[About] = []
        # The form of numbers that are not there: columns have one type in all batches.
        self._nothing: Any = [math.nan] if several else math.nan
        self._ranked = False

    def columns(self, outcomes: Sequence[Result | DLAError]) -> dict[str, list[Any]]:
        """Columns with a row for each outcome."""
        one = next((one for one in outcomes if not isinstance(one, DLAError)), None)
        if one is not None:
            self._ranked = isinstance(one, RankedAttribution)
            self._nothing = _nothing_like(one.logit[0])
        names = [*NUMBERS, *(RANKED[: 3 + self._means] if self._ranked else ())]
        found: dict[str, list[Any]] = {name: [] for name in (*names, "error", "about")}
        told: set[str] = set()
        for outcome in outcomes:
            if isinstance(outcome, DLAError):
                line, error, about = self._failed(), f"{type(outcome).__name__}: {outcome}", ""
            else:
                line, error, about = self._numbers(outcome), "", self._about(outcome, told)
            for name in names:
                found[name].append(line[name])
            found["error"].append(error)
            found["about"].append(about)
        return found

    def _numbers(self, result: Result) -> dict[str, Any]:
        line = {
            "attribution": result.attribution[:, 0].tolist(),
            "bias": result.bias[0].tolist(),
            "logit": result.logit[0].tolist(),
            "gap": result.gap,
        }
        if isinstance(result, RankedAttribution):
            line["kept"] = _labels(result, result.index[:, 0].tolist())
            line["rest"] = result.rest[0].tolist()
            line["remainder"] = result.remainder[0].tolist()
            if self._means:
                means = result.prompt_means
                line["means"] = [] if means is None else means[:, 0].tolist()
        return line

    def _failed(self) -> dict[str, Any]:
        nothing = self._nothing
        line = dict.fromkeys(("bias", "logit", "rest", "remainder"), nothing)
        line |= {"attribution": [nothing], "gap": math.nan, "means": [math.nan]}
        return {**line, "kept": _named(nothing)}

    def _about(self, result: Result, told: set[str]) -> str:
        about = next((one for one in self._known if one.fits(result)), None)
        if about is None:
            about = About.of(result, self._run, self._checkpoint)
            self._known = [about, *self._known][:8]
        if about.digest in told:
            return about.digest
        told.add(about.digest)
        return about.text


def _nothing_like(values: Any) -> Any:
    """NaN within as many lists as a prompt's logit is."""
    nothing: Any = math.nan
    for _ in range(values.ndim):
        nothing = [nothing]
    return nothing


def _named(nothing: Any) -> Any:
    """The same form, of labels: a list of them, within lists for positions."""
    return [_named(one) for one in nothing] if isinstance(nothing, list) else [""]


def _labels(result: RankedAttribution, index: Any) -> Any:
    if isinstance(index, list):
        return [_labels(result, one) for one in index]
    return result.rows[index].label if index >= 0 else ""
