"""Effects as a picture: where each part's total went, beside its direct effect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dla_hooks.errors import InputError, MissingExtraError
from dla_hooks.results.effects_data import EffectsData
from dla_hooks.results.marks import INK, finite
from dla_hooks.results.wording import headline, printable

if TYPE_CHECKING:
    import altair

_PIECES = {"own": "#2166ac", "downstream": "#f4a582", "read": "#bababa"}
_MARKS = {"direct": "circle", "total": "stroke"}
_STEP, _WIDTH = 22, 520


def plot(data: EffectsData) -> altair.Chart:
    """Draw a bar for each part: own, downstream and read, with marks for total and direct.

    Raises:
        MissingExtraError: when Altair is not installed.
        InputError: when the result holds no number.
    """
    if not bool(data.total.isfinite().any()):
        raise InputError("there is nothing to draw: no part, or no position, is there")
    try:
        import altair as alt
    except ImportError:
        raise MissingExtraError("to_altair()", "plot") from None
    means, labels = data.means(), [printable(label) for label in data.labels]
    lines = list(zip(labels, means, strict=True))
    pieces = _lines(lines, tuple(_PIECES))
    marks = _lines(lines, tuple(_MARKS))
    rows = alt.Y("label:N", sort=labels, title=None)
    bars = (
        alt.Chart(alt.InlineData(values=pieces))
        .mark_bar(height=_STEP - 9)
        .encode(
            x=alt.X("value:Q", title="clean - ablated"),
            y=rows,
            color=alt.Color(
                "what:N",
                title=None,
                scale=alt.Scale(domain=[*_PIECES], range=[*_PIECES.values()]),
            ),
            tooltip=_tooltip(alt),
        )
    )
    points = (
        alt.Chart(alt.InlineData(values=marks))
        .mark_point(size=90, color=INK, strokeWidth=2)
        .encode(
            x="value:Q",
            y=rows,
            shape=alt.Shape(
                "what:N", title=None, scale=alt.Scale(domain=[*_MARKS], range=[*_MARKS.values()])
            ),
            tooltip=_tooltip(alt),
        )
    )
    title = alt.TitleParams(
        "Effects of ablation",
        subtitle=[printable(headline(data.clean)), f"ablation: {data.ablation}"],
        anchor="start",
        color=INK,
        subtitleColor="#666666",
    )
    chart: altair.Chart = (
        alt.layer(bars, points)
        .resolve_scale(color="independent", shape="independent")
        .properties(title=title, width=_WIDTH, height=alt.Step(_STEP))
        .configure(background="white", padding=14)
        .configure_view(stroke=None)
    )
    return chart


def _lines(
    parts: list[tuple[str, dict[str, float]]], names: tuple[str, ...]
) -> list[dict[str, Any]]:
    return [
        {"label": label, "what": name, "value": finite(line[name])}
        for label, line in parts
        for name in names
    ]


def _tooltip(alt: Any) -> list[Any]:
    return [
        alt.Tooltip("label:N"),
        alt.Tooltip("what:N"),
        alt.Tooltip("value:Q", format="+.4f"),
    ]
