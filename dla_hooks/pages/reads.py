"""What stands on the card of a row: the tokens that a head reads, those that a row promotes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from dla_hooks.pages.contents import number, numbers
from dla_hooks.pages.grid import Grid
from dla_hooks.results.data import real_entries
from dla_hooks.results.promoted import PromotedTokens
from dla_hooks.results.ranked_data import RankedData

_DIGITS = 5


def reads_of(data: RankedData, at: list[int], budget: int) -> dict[str, Any] | None:
    """The tokens that each head reads, at each entry; the strongest where there are too many.

    Args:
        data: a result of the unit ``source`` for one prompt, with rows for each head.
        at: the entry of the page that each of its own entries is.
        budget: pairs of a head and a token that may be listed, at all entries together.

    Returns:
        None where the rows are sums over heads. Otherwise the labels of the heads, and for each
        place the head's number, the token's, the value and the attention weight [place, entry].
    """
    valid = real_entries(data)[0].flatten()
    flat = [
        one.reshape(len(one), valid.numel())[:, valid] for one in (data.index, data.attribution)
    ]
    places = min(len(flat[0]), max(64, budget // max(1, len(at))))
    index, values = (one[:places].cpu() for one in flat)
    known = index[index >= 0].unique()
    # The page shows the tokens of the prompt, and none of an encoder.
    own = [not data.rows[i].reads_encoder for i in known.tolist()]
    index = torch.where(torch.isin(index, known[torch.tensor(own, device="cpu")]), index, -1)
    known = index[index >= 0].unique()
    rows = [data.rows[i] for i in known.tolist()]
    if not rows or any(row.index is None or row.source is None for row in rows):
        return None
    names = [row.label.rpartition("<")[0] for row in rows]
    heads = list(dict.fromkeys(names))
    order = {name: place for place, name in enumerate(heads)}
    place = torch.searchsorted(known, index.clamp(min=0).contiguous())
    head = torch.tensor([order[name] for name in names], device="cpu")[place]
    token = torch.tensor([row.source for row in rows], device="cpu")[place]
    found = {
        "at": at,
        "heads": heads,
        "head": Grid.of(head.masked_fill(index < 0, -1)),
        "token": Grid.of(token),
        "values": Grid.of(values),
        "cut": places < len(flat[0]) or not bool((index < 0).any(0).all()),
    }
    if "weight" in data.beside:
        weight = data.beside["weight"]
        found["weight"] = Grid.of(weight.reshape(len(weight), valid.numel())[:places, valid])
    return found


def promotes_of(data: PromotedTokens, at: list[int]) -> dict[str, Any]:
    """The tokens that each row pushes up and down most, by the row's label at each entry."""
    valid = data.positions.flatten() >= 0 if data.positions.numel() else None
    k = data.k
    ids = [one.reshape(len(data.labels), -1, k) for one in (data.up_ids, data.down_ids)]
    logits = [one.reshape(len(data.labels), -1, k) for one in (data.up, data.down)]
    entries = range(ids[0].shape[1]) if valid is None else valid.nonzero()[:, 0].tolist()
    known = sorted({i for one in ids for i in one.flatten().tolist() if i >= 0})
    order = {token: place for place, token in enumerate(known)}
    rows: dict[str, Any] = {}
    for place, entry in zip(at, entries, strict=True):
        for row in range(len(data.labels)):
            label = data.label_at(row, entry)
            rows.setdefault(label, {})[place] = [
                _listed(own[row, entry].tolist(), values[row, entry].tolist(), order)
                for own, values in zip(ids, logits, strict=True)
            ]
    return {
        "unit": data.unit,
        "at": at,
        "names": [data.names[i] for i in known],
        "rows": rows,
    }


def effects_of(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Direct and total effects of rows by their labels, from lines that name them.

    Args:
        records: with the keys ``label``, ``direct`` and ``total``, and others that are numbers.
    """
    found = {}
    for line in records:
        values = {
            name: number(float(value))
            for name, value in line.items()
            if isinstance(value, (int, float)) and name not in ("row", "position", "layer")
        }
        found[line["label"]] = values
    return found


def _listed(ids: list[int], values: list[float], order: dict[int, int]) -> list[Any]:
    shown = numbers(torch.tensor(values, dtype=torch.float64, device="cpu"))
    return [
        [order[token], None if value is None else float(f"{value:.{_DIGITS}g}")]
        for token, value in zip(ids, shown, strict=True)
        if token >= 0
    ]
