"""One result as what its page shows: rows with their words, and numbers [row, entry]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.pages.grid import Grid
from dla_hooks.results.data import EntryData, ResultData, located, names_of_entries, real_entries
from dla_hooks.results.ranked_data import RankedData
from dla_hooks.results.rows import Row, Words

_MOST_PLACES = 256
"""Rows of a ranked unit that the page lists at one entry."""


def check_axes(data: EntryData) -> None:
    """Refuse entries that a page has no place for.

    Raises:
        InputError: for results without entries, or with more axes than batch and positions.
    """
    if getattr(data, "several", False) or len(data.shape) > 2:
        raise InputError(
            f"a page shows one answer at a time, and this result's entries are {list(data.shape)}; "
            "take one of them first, result.each(0); or each as a page, "
            "Report.of(result.each(0), result.each(1))"
        )
    if not data.shape.numel():
        raise InputError("there is nothing to show: the result has no entry (check pos)")


def spots(data: EntryData) -> list[int]:
    """The token that each real entry is about; their count where the result does not say."""
    valid = real_entries(data)[0].flatten()
    if located(data):
        return list(data.positions.flatten()[valid].tolist())
    return list(range(int(valid.sum())))


def entries_of(data: EntryData) -> dict[str, Any]:
    """What belongs to the entries and not to any row: answers, logits, biases."""
    valid = real_entries(data)[0].flatten()
    answers, answer = _named(names_of_entries(data, data.answer), valid)
    incorrects, incorrect = _named(names_of_entries(data, data.incorrect), valid)
    return {
        "spots": spots(data),
        "answers": answers,
        "answer": answer,
        "incorrects": incorrects,
        "incorrect": incorrect,
        "difference": data.incorrect is not None,
        "logit": numbers(data.logit.flatten()[valid]),
        "bias": numbers(data.bias.flatten()[valid]),
        "gap": number(data.gap),
        "logit_gap": number(data.logit_gap),
        "softcap": data.softcap,
        **_seen(data, valid),
    }


def unit_of(data: EntryData, key: str, at: list[int], focus: int) -> dict[str, Any]:
    """The rows of one result.

    Args:
        data: of one prompt.
        key: its name on the page.
        at: the entry of the page that each of its own entries is.
        focus: the entry of the page whose numbers are never rounded.
    """
    valid = real_entries(data)[0].flatten()
    own = {"key": key, **words_of(data.words), "at": at}
    if isinstance(data, RankedData):
        return {**own, **_ranked(data, valid)}
    assert isinstance(data, ResultData)
    beside = {name: grids(_flat(one, valid), at, focus) for name, one in data.beside.items()}
    return {
        **own,
        "dense": True,
        "rows": columns(data.rows),
        "beside": beside,
        **grids(_flat(data.attribution, valid), at, focus),
    }


def columns(rows: Iterable[Row]) -> dict[str, list[Any]]:
    """Rows as lists, one for each of their fields that the page reads."""
    found = list(rows)
    names = ("label", "kind", "layer", "sub", "index", "source")
    lists = {name: [getattr(row, name) for row in found] for name in names}
    return {name: own for name, own in lists.items() if any(one is not None for one in own)}


def number(value: float) -> float | None:
    """A number, or None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def numbers(values: Tensor) -> list[float | None]:
    """A list of numbers."""
    return [number(value) for value in values.tolist()]


def words_of(words: Words) -> dict[str, Any]:
    """What a unit says of its rows."""
    return {
        "unit": words.name,
        "title": words.title,
        "sentence": words.sentence,
        "index_is": words.index,
        "chart": words.chart,
        "cumulative": words.cumulative,
        "remainder": words.remainder,
        "remainder_is": words.remainder_is,
    }


def _flat(values: Tensor, valid: Tensor) -> Tensor:
    """Numbers [row, real entry]."""
    return values.reshape(len(values), valid.numel())[:, valid.to(values.device)]


def grids(values: Tensor, at: Sequence[int], focus: int) -> dict[str, Any]:
    """All numbers, and those of one entry, which are exact."""
    found: dict[str, Any] = {"values": Grid.of(values, rounded=True)}
    if focus in at:
        column = list(at).index(focus)
        found["exact"] = Grid.of(values[:, column : column + 1])
    return found


def _ranked(data: RankedData, valid: Tensor) -> dict[str, Any]:
    """The strongest rows at each entry; what is not listed joins the rest."""
    index = _flat(data.index, valid)[:_MOST_PLACES]
    values = _flat(data.attribution, valid)
    rest = data.rest.flatten()[valid] + values[_MOST_PLACES:].sum(0)
    known = index.unique()
    known = known[known >= 0]
    place = torch.searchsorted(known, index.clamp(min=0).contiguous())
    beside = {
        name: {"values": Grid.of(_flat(one, valid)[:_MOST_PLACES])}
        for name, one in data.beside.items()
    }
    return {
        "dense": False,
        "n_rows": len(data.rows),
        "rows": columns(data.rows[number] for number in known.tolist()),
        "index": Grid.of(place.masked_fill(index < 0, -1)),
        "values": Grid.of(values[:_MOST_PLACES]),
        "beside": beside,
        "rest": numbers(rest),
        "rest_of": numbers(data.remainder.flatten()[valid]),
    }


def _named(names: list[str | None], valid: Tensor) -> tuple[list[str], list[int | None]]:
    """The distinct names of the real entries, and which of them each entry has."""
    own = [name for name, real in zip(names, valid.tolist(), strict=True) if real]
    distinct = list(dict.fromkeys(name for name in own if name is not None))
    order = {name: place for place, name in enumerate(distinct)}
    return distinct, [None if name is None else order[name] for name in own]


def _seen(data: EntryData, valid: Tensor) -> dict[str, Any]:
    """What the model itself said of the answers, where the result holds it."""
    seen = getattr(data, "seen", None)
    if seen is None:
        return {}
    every = getattr(data, "top_tokens", [])
    tops = [top for top, real in zip(every, valid.tolist(), strict=True) if real]
    return {
        "rank": [None if one < 1 else one for one in seen.rank.flatten()[valid].tolist()],
        "probability": numbers(seen.log_probability.flatten()[valid].exp()),
        "top": [[[name, number(share)] for name, share in own] for own in tops],
    }
