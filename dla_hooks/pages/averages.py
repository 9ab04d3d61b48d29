"""Means over many prompts as what their page shows: units of one data set, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.pages.contents import columns, grids, number, words_of
from dla_hooks.pages.grid import Grid
from dla_hooks.results.summary import HALVES, Summary
from dla_hooks.results.wording import printable

_MOST_ROWS, _LISTED = 4096, 256
"""Of more rows, such as a large model's neurons, the page lists the strongest."""
_ALIKE = 1e-3
"""How far apart two units' means of the same logits may lie: chunks and dtypes round otherwise."""


def join(groups: list[list[Summary]], one: Summary) -> None:
    """Put a summary to those of the same prompts and question, or by itself.

    Raises:
        InputError: for a summary of no prompt.
    """
    if not one.n:
        raise InputError("the summary is of no prompt, so there is nothing to show")
    for group in groups:
        if _same_question(group[0], one) and one.unit not in {other.unit for other in group}:
            group.append(one)
            return
    groups.append([one])


def _same_question(one: Summary, other: Summary) -> bool:
    names = ("model", "n", "n_failed", "difference", "compared", "softcap")
    if any(getattr(one, name) != getattr(other, name) for name in names):
        return False
    pairs = (
        (one.logit, other.logit),
        (one.bias, other.bias),
        (one.logit_standard_error, other.logit_standard_error),
    )
    return all(
        math.isclose(a, b, rel_tol=_ALIKE, abs_tol=_ALIKE) or (math.isnan(a) and math.isnan(b))
        for a, b in pairs
    )


def page_of(group: Sequence[Summary]) -> dict[str, Any]:
    """One page: an entry of means, with a unit of rows for each summary."""
    first = group[0]
    what = "logit differences" if first.difference else "logits"
    question = f"mean of {what} over {first.n} prompts"
    if first.compared:
        question += ", first run minus second"
    return {
        "kind": "summary",
        "model": printable(first.model),
        "tokens": [],
        "question": question,
        "spots": [0],
        "answers": [],
        "answer": [None],
        "incorrects": [],
        "incorrect": [None],
        "difference": first.difference,
        "compared": first.compared,
        "logit": [number(first.logit)],
        "bias": [number(first.bias)],
        "gap": None,
        "logit_gap": None,
        "softcap": first.softcap,
        "n": first.n,
        "n_failed": first.n_failed,
        "logit_error": number(first.logit_standard_error),
        "focus": 0,
        "notes": [],
        "effects": None,
        "units": [_unit(one) for one in group],
        "reads": None,
        "promotes": [],
    }


def _unit(one: Summary) -> dict[str, Any]:
    beside = {"standard error": one.standard_error}
    if one.compared:
        beside |= {name: one.beside[name] for name in HALVES}
    own = {"key": one.unit, **words_of(one.words), "at": [0]}
    if len(one.rows) > _MOST_ROWS and not one.words.cumulative:
        return {**own, **_strongest(one, beside)}
    return {
        **own,
        "dense": True,
        "rows": columns(one.rows),
        "beside": {name: grids(values[:, None], [0], 0) for name, values in beside.items()},
        **grids(one.mean[:, None], [0], 0),
    }


def _strongest(one: Summary, beside: dict[str, Tensor]) -> dict[str, Any]:
    """The strongest of many rows, and the sum of those that are not listed."""
    rest_of = [row.label == one.words.remainder for row in one.rows]
    remainder = torch.tensor(rest_of, device="cpu")
    means = one.mean.masked_fill(remainder, 0.0)
    kept = means.abs().topk(_LISTED).indices
    rows = [one.rows[i] for i in kept.tolist()]
    return {
        "dense": False,
        "n_rows": len(one.rows) - int(remainder.sum()),
        "rows": columns(rows),
        "index": Grid.of(torch.arange(_LISTED, device="cpu")[:, None]),
        "values": Grid.of(means[kept, None]),
        "beside": {name: {"values": Grid.of(own[kept, None])} for name, own in beside.items()},
        "rest": [number(float(means.sum() - means[kept].sum()))],
        "rest_of": [number(float(one.mean[remainder].sum()))],
    }
