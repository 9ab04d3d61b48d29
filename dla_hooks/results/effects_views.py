"""Effects as lines, as text, and as html."""

from __future__ import annotations

from html import escape
from typing import Any

from dla_hooks._version import __version__
from dla_hooks.results.data import real_entries
from dla_hooks.results.effects_data import NUMBERS, EffectsData
from dla_hooks.results.ranking import decimals
from dla_hooks.results.schema import as_json, pack
from dla_hooks.results.table import as_dict as result_as_dict
from dla_hooks.results.wording import headline, printable

COLUMNS = ("label", "row", "position", *NUMBERS)
_FORMAT, _VERSION = "dla_hooks.effects", 1
_TEXT_ROWS, _HTML_ROWS = 18, 60
_LEFT = 0.5
"""Others make up for a part if no more than this of its own loss is left with theirs."""


def records(data: EffectsData) -> list[dict[str, Any]]:
    """One dictionary of :data:`COLUMNS` per part and entry, padding left out."""
    valid, row_of = real_entries(data.clean)
    rows = row_of.flatten().tolist()
    real = valid.flatten().tolist()
    positions = data.clean.positions.flatten().tolist()
    n = len(real)
    columns = [getattr(data, name).reshape(len(data.labels), n).tolist() for name in NUMBERS]
    return [
        dict(
            zip(
                COLUMNS,
                (label, rows[flat], positions[flat], *(own[number][flat] for own in columns)),
                strict=True,
            )
        )
        for number, label in enumerate(data.labels)
        for flat in range(n)
        if real[flat]
    ]


def as_dict(data: EffectsData) -> dict[str, Any]:
    """Everything in the result, as what JSON can hold: NaN is None, tensors are nested lists."""
    tensors, plain = pack(data)
    plain["clean"] = result_as_dict(data.clean)
    about = {"format": _FORMAT, "version": _VERSION, "dla_hooks": __version__}
    return {name: as_json(value) for name, value in {**about, **plain, **tensors}.items()}


def as_text(data: EffectsData) -> str:
    """A table in fixed width: a part, its direct effect, the total one, and where that went."""
    head = [headline(data.clean), printable(_sentence(data))]
    if not data.by_row.numel():
        return "\n".join([*head, "nothing is selected"])
    means = data.means()[:_TEXT_ROWS]
    digits = decimals([value for line in means for value in line.values()])
    width = max(len(label) for label in ("", *data.labels[:_TEXT_ROWS]))
    names = ("direct", "total", "= own", "+ downstream", "+ read")
    cell = max(digits + 6, *map(len, names)) + 2
    table = [f"  {'':<{width}}" + "".join(f"{name:>{cell}}" for name in names)]
    for label, line in zip(data.labels, means, strict=False):
        values = (line[name] for name in ("direct", "total", "own", "downstream", "read"))
        numbers = "".join(f"{value:>+{cell}.{digits}f}" for value in values)
        table.append(f"  {printable(label):<{width}}{numbers}")
    return "\n".join([*head, *table, *_end(data, len(means))])


def as_html(data: EffectsData) -> str:
    """One self-contained, escaped table."""
    means = data.means()[:_HTML_ROWS]
    digits = decimals([value for line in means for value in line.values()])
    cell = "padding:1px 14px 1px 0;border:none;background:transparent;text-align:right"
    mono = "font-family:monospace"
    names = ("direct", "total", "own", "downstream", "read")
    titles = "".join(f'<th style="{cell}">{name}</th>' for name in ("", *names))
    body = "".join(
        f'<tr style="background:transparent"><td style="{cell};{mono};text-align:left">'
        f"{escape(label)}</td>"
        + "".join(f'<td style="{cell};{mono}">{line[name]:+.{digits}f}</td>' for name in names)
        + "</tr>"
        for label, line in zip(data.labels, means, strict=False)
    )
    end = "".join(f"<div>{escape(line)}</div>" for line in _end(data, len(means)))
    return printable(
        '<div style="line-height:1.45;max-width:80em">'
        f'<div style="font-weight:600">{escape(headline(data.clean))}</div>'
        f'<div style="opacity:.7">{escape(_sentence(data))}</div>'
        '<table style="border:none;border-collapse:collapse;background:transparent;margin:.4em 0">'
        f'<tr style="background:transparent">{titles}</tr>{body}</table>'
        f'<div style="opacity:.85">{end}</div></div>'
    )


def made_up(data: EffectsData) -> list[str]:
    """The labels of parts for whose loss other rows make up: at most half of it is left."""
    return [
        label
        for label, line in zip(data.labels, data.means(), strict=True)
        if line["own"] and abs(line["own"] + line["downstream"]) <= _LEFT * abs(line["own"])
    ]


def _sentence(data: EffectsData) -> str:
    n = len(data.labels)
    what = "one part" if n == 1 else f"each of {n} parts"
    put = {"zero": "zero", "mean": "its mean"}.get(data.ablation, "another value")
    return f"effects: {put} in the place of {what}, clean - ablated"


def _end(data: EffectsData, n_shown: int) -> list[str]:
    lines = []
    if n_shown < len(data.labels):
        lines.append(f"… {len(data.labels) - n_shown} more parts: records() has all")
    found = made_up(data)
    if found:
        some = ", ".join(found[:4]) + (", …" if len(found) > 4 else "")
        lines.append(printable(f"later parts make up for at least half of what is lost: {some}"))
    lines.append(
        f"total = own + downstream + read, to {data.gap:.1e} of the larger of own and read"
    )
    return lines
