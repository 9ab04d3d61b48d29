"""A summary as a picture: means over prompts with their standard errors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dla_hooks.errors import InputError
from dla_hooks.results.data import ResultData
from dla_hooks.results.picture import Picture
from dla_hooks.results.plots import kinds
from dla_hooks.results.plots.heading import not_drawn
from dla_hooks.results.plots.numbers import Numbers
from dla_hooks.results.plots.wish import OF_UNITS, check_look
from dla_hooks.results.wording import printable, sum_line

_MOST_BARS, _FEW_BARS = 100, 30


def plot(
    means: ResultData,
    errors: Tensor,
    says: str,
    *,
    kind: str | None,
    rows: int | Sequence[str] | None,
    sort: str | None,
    title: str | None,
    width: float | None,
    height: float | None,
) -> Picture:
    """Draw means of rows.

    Args:
        means: one entry, the means.
        errors: the standard error of each row [row].
        says: over how many prompts they are.
        kind: ``bars``, ``line``, ``heatmap``, or None for what the unit says.
        rows: how many, their labels, or None.
        sort: ``size``, ``stream`` or None.
        title: in place of the heading.
        width: in pixels, or None.
        height: in pixels, or None.

    Raises:
        InputError: when there is nothing to draw, or for an argument without meaning.
        LabelError: for a label that no row has.
    """
    check_look(kind, OF_UNITS, rows, sort, width, height)
    if not bool(means.attribution.isfinite().any()):
        raise InputError("there is nothing to draw: no prompt, no row, or nothing that is finite")
    words = means.words
    kept = [i for i, row in enumerate(means.rows) if row.label != words.remainder]
    rest = sorted({*range(len(means.rows))} - {*kept})
    values = means.attribution.double()
    numbers = Numbers(
        rows=[means.rows[i] for i in kept],
        labels=[means.rows[i].label for i in kept],
        values=values[kept],
        others=values.new_zeros(1),
        n_others=0,
        remainder=values[rest].sum(0) if rest else None,
        bias=means.bias,
        logit=means.logit,
        errors=errors[kept][:, None],
    )
    if rows is not None:
        numbers = (
            numbers.named(rows, means.unit)
            if isinstance(rows, Sequence)
            else numbers.strongest(int(rows))
        )
    kind = kind or words.chart
    if kind == "heatmap" and not any(map(kinds.has_square, numbers.rows)):
        kind = "bars"
    if kind == "bars" and rows is None and len(kept) > _MOST_BARS:
        numbers = numbers.strongest(_FEW_BARS)
    said = [means.model, says, sum_line(means, mean=True).replace(" -", " −")]
    if kind == "heatmap":
        said += not_drawn(means, numbers)
    elif bool(numbers.errors is not None and numbers.errors.isfinite().any()):
        said[1] += ", ± standard error"
    what = "mean logit" + " difference" * (means.incorrect is not None)
    look = kinds.Look(
        f"{words.title}: {what}" if title is None else title,
        [printable(each) for each in said if each], width, height, what, sort == "size",
    )  # fmt: skip
    return {"bars": kinds.bars, "line": kinds.line, "heatmap": kinds.grid}[kind](
        numbers, words, look
    )
