"""Time and memory over prompt length, as a picture (extra ``plot``: Altair, no browser)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare import Line
from benchmarks.contenders import CONTENDERS, OURS, PLAIN

# One hue per kind of model, the darkest shade and a full line for the most frugal way of using it.
LOOKS: dict[str, tuple[str, list[int]]] = {
    PLAIN: ("#222222", [1, 0]),
    "plain, full logits": ("#8c8c8c", [5, 4]),
    "output_hidden_states": ("#b8860b", [1, 0]),
    OURS: ("#d7191c", [1, 0]),
    "dla_hooks on the bridge": ("#f4837d", [5, 4]),
    "nnsight": ("#7b3294", [1, 0]),
    "bridge, plain forward": ("#92c5de", [2, 3]),
    "bridge, names_filter": ("#1f4e9c", [1, 0]),
    "bridge, full cache": ("#4393c3", [5, 4]),
    "HookedTransformer, names_filter": ("#0b6e4f", [1, 0]),
    "HookedTransformer, full cache": ("#5cc2a0", [5, 4]),
}
_WHISKERS = "dots are medians; whiskers on the time, where there are several rounds, are quartiles"
_PAGE = 4096  # bytes: less is not seen, and a logarithmic axis has no zero
_SHOWN = ("value", "low", "high")
_INK, _FONT = "#333333", "Helvetica, Arial, sans-serif"


def draw(lines: Sequence[Line], under: str, path: Path) -> None:
    """Write the curves as a PNG: time ratio and peak memory over prompt length.

    Args:
        lines: what was measured; each combination of the other axes is a row of its own.
        under: circumstances, one line.
        path: ends in ``.png``.
    """
    import altair as alt

    rows = []
    for title in dict.fromkeys(_title(line) for line in lines):
        of_row = [line for line in lines if _title(line) == title]
        panels = [_panel(alt, of_row, "time", title)]
        if any(line.peak is not None for line in of_row):
            panels.append(_panel(alt, of_row, "memory", ""))
        rows.append(alt.hconcat(*panels, spacing=48))
    chart = (
        alt.vconcat(*rows, spacing=36)
        .resolve_scale(color="shared", strokeDash="shared")
        .properties(
            title=alt.TitleParams(
                "What attribution costs as the prompt grows",
                subtitle=[*_wrapped(under), _WHISKERS],
                anchor="start",
                fontSize=17,
                subtitleFontSize=12,
                subtitleColor="#666666",
                color=_INK,
                offset=16,
            )
        )
        .configure(font=_FONT, background="white", padding=18)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=_INK,
            titleColor=_INK,
            titleFontWeight="normal",
            labelFontSize=12,
            titleFontSize=13,
            gridColor="#eeeeee",
            domainColor="#999999",
            tickColor="#999999",
        )
    )
    chart.save(str(path), format="png", scale_factor=2)


def _panel(alt: Any, lines: Sequence[Line], what: str, title: str) -> Any:
    values: list[dict[str, Any]] = []
    for line in lines:
        value = line.ratio.median if what == "time" else max(line.peak or 0, _PAGE) / 1e6
        tokens = line.setting.tokens
        values.append({"tokens": tokens, "who": line.contender, "value": value})
        if what == "time" and line.ratio.low is not None:
            values[-1] |= {"low": line.ratio.low, "high": line.ratio.high}
    present = [name for name in CONTENDERS if any(line.contender == name for line in lines)]
    looks = [LOOKS[name] for name in present]
    domain = around([value[key] for value in values for key in _SHOWN if key in value])
    lengths = sorted({line.setting.tokens for line in lines})
    legend = alt.Legend(
        title=None,
        orient="right",
        symbolType="stroke",
        symbolSize=900,
        symbolStrokeWidth=2.5,
        symbolOpacity=1,
        labelFontSize=12,
        labelLimit=320,
        labelColor=_INK,
        rowPadding=5,
    )
    x = alt.X(
        "tokens:Q",
        title="tokens in the prompt",
        scale=alt.Scale(type="log", base=2, domain=around(lengths), nice=False),
        axis=alt.Axis(values=lengths, format=",d", grid=False, labelFlush=False),
    )
    name = "time over the plain forward pass" if what == "time" else "peak memory over weights, MB"
    y = alt.Y(
        "value:Q",
        title=name,
        scale=alt.Scale(type="log", domain=domain, nice=False),
        axis=alt.Axis(values=ticks(*domain), format=",~f"),
    )
    colour = alt.Color(
        "who:N",
        sort=present,
        scale=alt.Scale(domain=present, range=[colour for colour, _ in looks]),
        legend=legend,
    )
    dash = alt.StrokeDash(
        "who:N",
        sort=present,
        scale=alt.Scale(domain=present, range=[dash for _, dash in looks]),
        legend=legend,
    )
    base = alt.Chart(alt.InlineData(values=values), width=380, height=340).encode(x=x)
    # Wide, so that a curve of equal cost is visible on top of it.
    width = alt.condition(f"datum.who == '{PLAIN}'", alt.value(6), alt.value(2.5))
    curve = base.mark_line().encode(y=y, color=colour, strokeDash=dash, strokeWidth=width)
    dots = base.mark_circle(size=42, opacity=1).encode(y=y, color=colour)
    layers = [curve, dots]
    if what == "time":
        spread = base.mark_rule(strokeWidth=1.2, opacity=0.6, clip=True).encode(
            y=alt.Y("low:Q"), y2="high:Q", color=colour
        )
        layers.insert(0, spread)
    heading = alt.TitleParams(title, anchor="start", fontSize=13, fontWeight=600, color=_INK)
    return alt.layer(*layers).properties(title=heading)


def _title(line: Line) -> str:
    return line.setting.named(length=False)


def around(values: Sequence[float]) -> list[float]:
    """The ends of a logarithmic axis, with some room for the dots."""
    low, high = min(values), max(values)
    room = max(1.05, (high / low) ** 0.05)
    return [low / room, high * room]


def ticks(low: float, high: float) -> list[float]:
    """Steps of 1, 2 and 5 between the ends of a logarithmic axis, in even ones if it is short."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    inside = [step for step in steps if low <= step <= high]
    if len(inside) >= 3:
        return [round(value, 12) for value in inside]
    # The narrower the axis, the finer: five marks or so, at whole multiples of one step.
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one * power for one in (1, 2, 5, 10) if one * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _wrapped(text: str) -> list[str]:
    return [piece.strip() for piece in text.split(";")]
