"""A result as a picture, drawn with Altair (extra ``plot``). Blue pushes up, red down.

The data are put in line as plain values, so a chart needs neither pandas nor a server, and a
saved one no network.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dla_hooks.errors import InputError, MissingExtraError
from dla_hooks.results.ranking import decimals, entry_mean, ranked_rows, real_entries
from dla_hooks.results.wording import closing, place, question

if TYPE_CHECKING:
    import altair

    from dla_hooks.results.result import DirectLogitAttribution

SUFFIXES = (".html", ".png", ".svg")

_UP, _DOWN, _INK, _FAINT = "#2166ac", "#b2182b", "#333333", "#8a8a8a"
_FONT = "Helvetica, Arial, sans-serif"
_TITLES = {
    "component": "Components",
    "head": "Heads",
    "layer": "Layers, running sum of the components",
}
_HEAD = re.compile(r"L(\d+(?:\.\d+)?)H(\d+)")
_PROMPT_WIDTH = 64


def plot(result: DirectLogitAttribution) -> altair.Chart:
    """Draw a result: layer x head heatmap, bars of components, or the line of the layers.

    Several batch rows or positions are drawn as their mean, and the title says so.

    Raises:
        MissingExtraError: when Altair is not installed.
        InputError: when the result holds no number.
    """
    if not bool(result.attribution.isfinite().any()):
        raise InputError("there is nothing to draw: no position is selected, or nothing is finite")
    alt = _altair()
    draw = {"head": _heatmap, "layer": _line}.get(result.unit, _bars)
    chart: altair.Chart = (
        draw(alt, result)
        .properties(title=_title(alt, result))
        .configure(font=_FONT, background="white", padding=14)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=_INK, titleColor=_INK, titleFontWeight="normal", tickColor="#cccccc"
        )
        .configure_legend(titleFontWeight="normal", titleColor=_INK, labelColor=_INK)
    )
    return chart


def save_plot(chart: Any, path: str | Path) -> Path:
    """Write a chart to one file that needs nothing else, not even a network.

    Args:
        chart: from :func:`plot`.
        path: ends in ``.html``, ``.png`` or ``.svg``.

    Raises:
        InputError: for any other suffix, or when the file cannot be written.
        MissingExtraError: when vl-convert, which renders the chart, is not installed.
    """
    path = Path(path)
    check_plot_path(path)
    options: dict[str, Any] = {".html": {"inline": True}, ".png": {"scale_factor": 2}}
    try:
        chart.save(str(path), **options.get(path.suffix.lower(), {}))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def check_plot_path(path: Path) -> None:
    """Refuse, before any work, what :func:`save_plot` could not write.

    Raises:
        InputError: for a suffix that is none of the three.
        MissingExtraError: when what draws and renders is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"a plot is written as {', '.join(SUFFIXES)}, by the file's suffix; got {str(path)!r}"
        )
    _altair()
    try:
        import vl_convert  # noqa: F401
    except ImportError:
        raise MissingExtraError("saving a plot", "plot") from None


def _altair() -> Any:
    try:
        import altair
    except ImportError:
        raise MissingExtraError("plot()", "plot") from None
    return altair


def _heatmap(alt: Any, result: DirectLogitAttribution) -> Any:
    """Layer 0 at the top, one square per head; the remainder is no head and stands above."""
    rows, _ = ranked_rows(result)
    values = []
    for label, value in rows:
        found = _HEAD.fullmatch(label)
        if found:
            layer, head = float(found[1]), int(found[2])  # L0.1H2: the second attention
            values.append({"label": label, "layer": layer, "head": head, "value": value})
    n_layers = len({cell["layer"] for cell in values})
    n_heads = len({cell["head"] for cell in values})
    largest = _largest(cell["value"] for cell in values)
    step = max(9, min(42, 540 // max(n_layers, n_heads, 1)))

    axis: dict[str, Any] = {
        "labelAngle": 0,
        "domain": False,
        "ticks": False,
        "labelFontSize": min(11, step - 1),
    }
    if step < 14:  # too small for a name on each
        axis["labelExpr"] = "datum.value % 4 == 0 ? datum.label : ''"
    base = alt.Chart(
        alt.InlineData(values=values),
        width=alt.Step(step),
        height=alt.Step(step),
    ).encode(
        x=alt.X("head:O", title="head", axis=alt.Axis(**axis)),
        y=alt.Y("layer:O", title="layer", axis=alt.Axis(**axis)),
        tooltip=_tooltip(alt),
    )
    colour = alt.Color(
        "value:Q",
        title=None,
        scale=alt.Scale(scheme="redblue", domain=[-largest, largest]),
        legend=alt.Legend(
            gradientLength=max(80, min(240, step * n_layers - 10)),
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
    digits = max(1, decimals([largest]) - 1)
    longest = len(f"{largest:+.{digits}f}")
    numbers = base.mark_text(fontSize=min(12, round(1.7 * step / longest))).encode(
        text=alt.Text("value:Q", format=f"+.{digits}f"),
        color=alt.condition(
            f"abs(datum.value) > {0.6 * largest}", alt.value("white"), alt.value(_INK)
        ),
    )
    return alt.layer(squares, numbers)


def _bars(alt: Any, result: DirectLogitAttribution) -> Any:
    """In the order of the stream; below, the bias and what they all sum to."""
    rows, _ = ranked_rows(result)
    bias, logit = entry_mean(result.bias), entry_mean(result.logit)
    total = "logit" if result.incorrect is None else "logit difference"
    values = [_coloured(label, value) for label, value in [*rows, ("bias", bias)]]
    values.append({"label": total, "value": logit, "colour": _INK})
    order = [bar["label"] for bar in values]
    step = 22 if len(values) <= 30 else 14
    largest = _largest(bar["value"] for bar in values)

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
            scale=alt.Scale(domain=_domain([bar["value"] for bar in values])),
            axis=alt.Axis(gridColor="#eeeeee", domain=False, tickCount=6, labelFlush=False),
        ),
        tooltip=_tooltip(alt),
    )
    bars = base.mark_bar().encode(color=alt.Color("colour:N", scale=None))
    number = {
        "text": alt.Text("value:Q", format=f"+.{max(2, decimals([largest]) - 1)}f"),
        "color": alt.value(_INK),
    }
    size = min(11, step - 4)
    right = base.mark_text(align="left", dx=4, fontSize=size).encode(**number)
    left = base.mark_text(align="right", dx=-4, fontSize=size).encode(**number)
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(color=_FAINT)
    return alt.layer(
        bars,
        right.transform_filter("datum.value >= 0"),
        left.transform_filter("datum.value < 0"),
        zero.encode(x="zero:Q"),
    )


def _line(alt: Any, result: DirectLogitAttribution) -> Any:
    rows, _ = ranked_rows(result)
    values = [_coloured(label, value) for label, value in rows]
    order = [label for label, _ in rows]
    step = max(13, min(34, 640 // max(len(rows), 1)))
    base = alt.Chart(
        alt.InlineData(values=values),
        width=alt.Step(step),
        height=260,
    ).encode(
        x=alt.X(
            "label:N",
            sort=order,
            title=None,
            axis=alt.Axis(labelAngle=-90, domain=False, labelOverlap=False, labelLimit=400),
        ),
        y=alt.Y(
            "value:Q",
            title="sum up to here",
            axis=alt.Axis(gridColor="#eeeeee", domain=False, tickCount=6),
        ),
        tooltip=_tooltip(alt),
    )
    zero = alt.Chart(alt.InlineData(values=[{"zero": 0}])).mark_rule(color=_FAINT)
    points = base.mark_point(filled=True, size=46, opacity=1).encode(
        color=alt.Color("colour:N", scale=None)
    )
    return alt.layer(zero.encode(y="zero:Q"), base.mark_line(color=_FAINT, strokeWidth=1.5), points)


def _title(alt: Any, result: DirectLogitAttribution) -> Any:
    title = f"{_TITLES.get(result.unit, result.unit)}: {question(result)}"
    if int(real_entries(result)[0].sum()) > 1:
        title += " (mean)"
    lines = [place(result, _PROMPT_WIDTH), result.model, closing(result)[0]]
    rows, remainder = ranked_rows(result)
    if remainder is not None:
        digits = decimals([remainder, *(value for _, value in rows)])
        lines.append(f"what no head wrote (remainder): {remainder:+.{digits}f}")
    return alt.TitleParams(
        title,
        # With the minus sign that the axes have.
        subtitle=[re.sub(r"(?<= )-(?=\d)", "−", line) for line in lines if line],
        anchor="start",
        fontSize=15,
        fontWeight=600,
        color=_INK,
        subtitleFontSize=12,
        subtitleColor="#666666",
        subtitlePadding=5,
        offset=14,
    )


def _coloured(label: str, value: float) -> dict[str, Any]:
    return {"label": label, "value": value, "colour": _DOWN if value < 0 else _UP}


def _tooltip(alt: Any) -> list[Any]:
    return [alt.Tooltip("label:N"), alt.Tooltip("value:Q", title="attribution", format="+.4f")]


def _largest(values: Any) -> float:
    return max((abs(value) for value in values), default=0.0) or 1.0


def _domain(values: list[float]) -> list[float]:
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.13 * ((high - low) or 1.0)
    return [low - room if low < 0 else 0.0, high + room if high > 0 else 0.0]
