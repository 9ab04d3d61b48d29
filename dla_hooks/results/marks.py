"""The kinds of charts, by the word that a unit says: bars, a line, a heatmap of layer by index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dla_hooks.results.data import EntryData, entry_mean
from dla_hooks.results.ranking import Drawn, decimals, drawn, largest
from dla_hooks.results.rows import Row
from dla_hooks.results.wording import of_what, printable

INK = "#333333"
_MOST_BARS = 30
_UP, _DOWN, _FAINT = "#2166ac", "#b2182b", "#8a8a8a"


def heatmap(alt: Any, data: EntryData) -> Any:
    """Layer 0 at the top, one square per row that has a number; other rows have none."""
    rows = [(row, value) for row, value in drawn(data).rows if has_square(row)]
    if not rows:
        return bars(alt, data)
    several = len({row.kind for row, _ in rows}) > 1
    cells = [
        {
            "label": printable(row.label),
            "layer": _lane(row, several),
            "index": row.index,
            "value": finite(value),
        }
        for row, value in rows
    ]
    lanes = list(dict.fromkeys(cell["layer"] for cell in cells))
    most = largest(value for _, value in rows) or 1.0
    step = max(9, min(42, 540 // max(len(lanes), len({cell["index"] for cell in cells}))))

    axis: dict[str, Any] = {
        "labelAngle": 0,
        "domain": False,
        "ticks": False,
        "labelFontSize": min(11, step - 1),
    }
    if step < 14:  # too small for a name on each
        axis["labelExpr"] = "datum.value % 4 == 0 ? datum.label : ''"
    base = alt.Chart(
        alt.InlineData(values=cells),
        width=alt.Step(step),
        height=alt.Step(step),
    ).encode(
        x=alt.X("index:O", title=data.words.index, axis=alt.Axis(**axis)),
        y=alt.Y("layer:O", title="layer", sort=lanes, axis=alt.Axis(**axis)),
        tooltip=_tooltip(alt),
    )
    colour = alt.Color(
        "value:Q",
        title=None,
        scale=alt.Scale(scheme="redblue", domain=[-most, most]),
        legend=alt.Legend(
            gradientLength=max(80, min(240, step * len(lanes) - 10)),
            format="+.3~g",
            labelExpr="datum.value == 0 ? '0' : datum.label",
            tickCount=5,
        ),
    )
    squares = base.mark_rect(stroke="white", strokeWidth=1 if step > 14 else 0.5).encode(
        color=colour
    )
    if step < 30:
        return alt.layer(squares)
    digits = max(1, decimals([most]) - 1)
    longest = len(f"{most:+.{digits}f}")
    numbers = base.mark_text(fontSize=min(12, round(1.7 * step / longest))).encode(
        text=alt.Text("value:Q", format=f"+.{digits}f"),
        color=alt.condition(f"abs(datum.value) > {0.6 * most}", alt.value("white"), alt.value(INK)),
    )
    return alt.layer(squares, numbers)


def bars(alt: Any, data: EntryData) -> Any:
    """In the order of the stream; below, the bias and what they all sum to.

    Of a result that keeps some of many rows, the strongest are drawn, and the others in one.
    """
    all_rows = drawn(data)
    rows = _few(all_rows) if data.keeps_some else _named(all_rows.rows)
    bias, logit = entry_mean(data.bias), entry_mean(data.logit)
    total = of_what(data)
    values = [_coloured(label, value) for label, value in [*rows, ("bias", bias)]]
    values.append({"label": total, "value": finite(logit), "colour": INK})
    order = [bar["label"] for bar in values]
    step = 22 if len(values) <= 30 else 14
    numbers = [bar["value"] or 0.0 for bar in values]

    base = alt.Chart(
        alt.InlineData(values=values),
        width=460,
        height=alt.Step(step),
    ).encode(
        y=alt.Y(
            "label:N",
            sort=order,
            title=None,
            scale=alt.Scale(paddingInner=0.25, paddingOuter=0.3),
            axis=alt.Axis(
                domain=False, ticks=False, labelFontSize=min(12, step - 3), labelLimit=400
            ),
        ),
        # Room at both ends for the numbers.
        x=alt.X(
            "value:Q",
            title=None,
            scale=alt.Scale(domain=_domain(numbers)),
            axis=alt.Axis(gridColor="#eeeeee", domain=False, tickCount=6, labelFlush=False),
        ),
        tooltip=_tooltip(alt),
    )
    marks = base.mark_bar().encode(color=alt.Color("colour:N", scale=None))
    number = {
        "text": alt.Text("value:Q", format=f"+.{max(2, decimals(numbers) - 1)}f"),
        "color": alt.value(INK),
    }
    size = min(11, step - 4)
    right = base.mark_text(align="left", dx=4, fontSize=size).encode(**number)
    left = base.mark_text(align="right", dx=-4, fontSize=size).encode(**number)
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(color=_FAINT)
    return alt.layer(
        marks,
        right.transform_filter("datum.value >= 0"),
        left.transform_filter("datum.value < 0"),
        zero.encode(x="zero:Q"),
    )


def line(alt: Any, data: EntryData) -> Any:
    """The rows in their order, from left to right."""
    rows = drawn(data).rows
    values = [_coloured(label, value) for label, value in _named(rows)]
    step = max(13, min(34, 640 // max(len(rows), 1)))
    base = alt.Chart(
        alt.InlineData(values=values),
        width=alt.Step(step),
        height=260,
    ).encode(
        x=alt.X(
            "label:N",
            sort=[point["label"] for point in values],
            title=None,
            axis=alt.Axis(labelAngle=-90, domain=False, labelOverlap=False, labelLimit=400),
        ),
        y=alt.Y(
            "value:Q",
            title="sum up to here" if data.words.cumulative else None,
            axis=alt.Axis(gridColor="#eeeeee", domain=False, tickCount=6),
        ),
        tooltip=_tooltip(alt),
    )
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(color=_FAINT)
    points = base.mark_point(filled=True, size=46, opacity=1).encode(
        color=alt.Color("colour:N", scale=None)
    )
    return alt.layer(zero.encode(y="zero:Q"), base.mark_line(color=_FAINT, strokeWidth=1.5), points)


KINDS: dict[str, Callable[[Any, EntryData], Any]] = {
    "bars": bars,
    "line": line,
    "heatmap": heatmap,
}


def has_square(row: Row) -> bool:
    """Whether a row has a place in a heatmap."""
    return row.index is not None


def finite(value: float) -> float | None:
    """The value, or None for what JSON has no number for."""
    return value if abs(value) < float("inf") else None


def _lane(row: Row, several: bool) -> str:
    """The name of a heatmap's line: the layer, with what tells apart several in one layer."""
    layer = "" if row.layer is None else str(row.layer)
    if row.sub:
        layer += f".{row.sub}"
    return f"{layer} {row.kind}".lstrip() if several else layer


def _few(all_rows: Drawn) -> list[tuple[str, float]]:
    """The strongest rows by value, then those that are not drawn, and the remainder."""
    rows = sorted(_named(all_rows.rows), key=lambda row: abs(row[1]), reverse=True)
    shown, others = rows[:_MOST_BARS], rows[_MOST_BARS:]
    n_others = len(others) + all_rows.n_beyond
    found = sorted(shown, key=lambda row: row[1], reverse=True)
    if n_others:
        found.append((f"{n_others} more", sum(value for _, value in others) + all_rows.beyond))
    if all_rows.remainder is not None:
        found.append((all_rows.remainder.label, all_rows.remainder.value))
    return found


def _named(rows: list[tuple[Row, float]]) -> list[tuple[str, float]]:
    return [(row.label, value) for row, value in rows]


def _coloured(label: str, value: float) -> dict[str, Any]:
    colour = _DOWN if value < 0 else _UP
    return {"label": printable(label), "value": finite(value), "colour": colour}


def _tooltip(alt: Any) -> list[Any]:
    return [alt.Tooltip("label:N"), alt.Tooltip("value:Q", title="attribution", format="+.4f")]


def _domain(values: list[float]) -> list[float]:
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.13 * ((high - low) or 1.0)
    return [low - room if low < 0 else 0.0, high + room if high > 0 else 0.0]
