"""Promoted tokens as lines, as text, and as html."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import torch

from dla_hooks._version import __version__
from dla_hooks.results.promoted_data import PromotedData
from dla_hooks.results.schema import as_json, pack
from dla_hooks.results.wording import elided, printable

COLUMNS = ("label", "row", "position", "rank", "token_id", "token", "logit")
_FORMAT, _VERSION = "dla_hooks.promoted", 1
_TEXT_ROWS, _TEXT_TOKENS = 18, 4
_HTML_ROWS, _HTML_TOKENS = 40, 6
_WIDTH = 60


def records(data: PromotedData) -> list[dict[str, Any]]:
    """One dictionary of :data:`COLUMNS` per row, entry and listed token, padding left out."""
    entries, n_entries = _entries(data), data.shape.numel()
    shape = len(data.labels), n_entries, data.k
    ways = [
        (sign, ids.reshape(shape).tolist(), numbers.reshape(shape).tolist())
        for sign, ids, numbers in ((1, data.up_ids, data.up), (-1, data.down_ids, data.down))
    ]
    found = []
    for number in range(len(data.labels)):
        for flat, row, position in entries:
            label = data.label_at(number, flat)
            for sign, ids, numbers in ways:
                pairs = zip(ids[number][flat], numbers[number][flat], strict=True)
                for rank, (i, logit) in enumerate(pairs, start=1):
                    if i < 0:  # nothing stands there
                        continue
                    line = (label, row, position, sign * rank, i, data.names[i], logit)
                    found.append(dict(zip(COLUMNS, line, strict=True)))
    return found


def as_dict(data: PromotedData) -> dict[str, Any]:
    """Everything in the result, as what JSON can hold: NaN is None, tensors are nested lists."""
    tensors, plain = pack(data)
    about = {"format": _FORMAT, "version": _VERSION, "dla_hooks": __version__}
    return {name: as_json(value) for name, value in {**about, **plain, **tensors}.items()}


def as_text(data: PromotedData) -> str:
    """A table in fixed width: a row's label, its first tokens up, its first tokens down."""
    entry = shown_entry(data)
    if entry is None:
        return "\n".join([*heading(data), "no token is selected"])
    lines = []
    for number in shown_rows(data, entry, _TEXT_ROWS):
        up, down = (_tokens(data, way, number, entry, _TEXT_TOKENS) for way in ("up", "down"))
        lines.append((printable(data.label_at(number, entry)), _joined(up), _joined(down)))
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(2)]
    table = [f"  {a:<{widths[0]}}  ↑ {b:<{widths[1]}}  ↓ {c}" for a, b, c in lines]
    return "\n".join([*heading(data), *table, *_end(data, len(lines))])


def as_html(data: PromotedData) -> str:
    """One self-contained, escaped table: a row's label, tokens up, tokens down."""
    head, entry = heading(data), shown_entry(data)
    cell = "padding:1px 14px 1px 0;border:none;background:transparent;text-align:left"
    body, shown = [], [] if entry is None else shown_rows(data, entry, _HTML_ROWS)
    titles = "".join(f'<th style="{cell}">{title}</th>' for title in ("", "up", "down"))
    for number in shown:
        label = escape(data.label_at(number, entry or 0))
        cells = [f'<td style="{cell};font-family:monospace">{label}</td>']
        for way in ("up", "down"):
            listed = _tokens(data, way, number, entry or 0, _HTML_TOKENS)
            spans = [
                f'<code>{escape(token)}</code>&nbsp;<span style="opacity:.7">{escape(value)}</span>'
                for token, value in listed
            ]
            cells.append(f'<td style="{cell}">{" &nbsp;".join(spans)}</td>')
        body.append(f'<tr style="background:transparent">{"".join(cells)}</tr>')
    end = "".join(f"<div>{escape(line)}</div>" for line in _end(data, len(shown)))
    table = (
        '<table style="border:none;border-collapse:collapse;background:transparent;margin:.4em 0">'
        f'<tr style="background:transparent">{titles}</tr>{"".join(body)}</table>'
    )
    if entry is None:
        table = "<div>no token is selected</div>"
    return printable(
        '<div style="line-height:1.45;max-width:80em">'
        f'<div style="font-weight:600">{escape(head[0])}</div>'
        f'<div style="opacity:.7">{escape(head[1])}</div>{table}'
        f'<div style="opacity:.85">{end}</div></div>'
    )


def _entries(data: PromotedData) -> list[tuple[int, int, int | None]]:
    """Each entry that is no padding: its flat index, its row of the batch, and its position."""
    n = data.shape.numel()
    located = data.positions.shape == data.shape
    positions = data.positions.flatten().tolist() if located else [None] * n
    first = data.up_ids.reshape(len(data.labels), n, data.k)[:, :, :1]
    ids = (first.amax(0) if len(first) else first[:0].new_full((n, 1), -1)).flatten().tolist()
    per_row = n // data.shape[0] if data.shape and data.shape[0] and len(data.tokens) > 1 else n
    return [(flat, flat // max(1, per_row), positions[flat]) for flat in range(n) if ids[flat] >= 0]


def shown_entry(data: PromotedData) -> int | None:
    """The entry that a table shows: the last real one of the first prompt."""
    entries = _entries(data)
    return next((flat for flat, row, _ in reversed(entries) if row == entries[0][1]), None)


def shown_rows(data: PromotedData, entry: int, most: int) -> list[int]:
    """The rows that push hardest at an entry, in their own order."""
    n = data.shape.numel()
    both = (data.up, data.down)
    first = [each.reshape(len(data.labels), n, data.k)[:, entry, 0].abs() for each in both]
    strength = torch.maximum(*first).nan_to_num(nan=-1.0)
    there = int((strength >= 0).sum())
    kept: list[int] = strength.topk(min(most, there)).indices.sort().values.tolist()
    return kept


def tokens_of(
    data: PromotedData, way: str, row: int, entry: int, most: int
) -> list[tuple[str, float]]:
    """The first tokens of a row at an entry, in quotes unless they are ids, with their logits."""
    shape = len(data.labels), data.shape.numel(), data.k
    ids = getattr(data, f"{way}_ids").reshape(shape)[row, entry, :most].tolist()
    values = getattr(data, way).reshape(shape)[row, entry, :most].tolist()
    listed = [(i, data.names[i], value) for i, value in zip(ids, values, strict=True) if i >= 0]
    return [(name if name == str(i) else printable(repr(name)), value) for i, name, value in listed]


def _tokens(data: PromotedData, way: str, row: int, entry: int, most: int) -> list[tuple[str, str]]:
    return [(name, f"{value:+.2f}") for name, value in tokens_of(data, way, row, entry, most)]


def _joined(tokens: list[tuple[str, str]]) -> str:
    return "  ".join(f"{token} {value}" for token, value in tokens)


def heading(data: PromotedData) -> list[str]:
    """What the table is about: the prompt's end, and what the rows are."""
    model = f" · {data.model}" if data.model else ""
    entry = shown_entry(data)
    where = ""
    if entry is not None and data.tokens:
        _, row, position = next(one for one in _entries(data) if one[0] == entry)
        here = data.tokens[row] if position is None else data.tokens[row][: position + 1]
        by_id = all(token.isdecimal() for token in here)
        where = f" after {elided((' ' if by_id else '').join(here), _WIDTH)!r}"
    return [printable(f"tokens promoted{where}{model}"), printable(data.words.sentence)]


def _end(data: PromotedData, n_shown: int) -> list[str]:
    lines = []
    if n_shown < len(data.labels):
        lines.append(f"… {len(data.labels) - n_shown} weaker rows: records() has all")
    n = data.shape.numel()
    if n > 1:
        lines.append(f"one of {n} entries {list(data.shape)}: prompt(i), position(j) take others")
    cap = "" if data.softcap is None else f", before the cap of {data.softcap:g}"
    line = f"logits less their mean over {data.n_tokens:,} tokens{cap}"
    if not math.isnan(data.gap):
        line += f"; the rows make up the model's own logits to {data.gap:.0e}"
    return [*lines, line]
