"""Effects as a picture: direct beside total, or where the total went."""

from __future__ import annotations

from collections.abc import Sequence

from dla_hooks.errors import InputError
from dla_hooks.results.effects_data import EffectsData
from dla_hooks.results.parts import unknown_label
from dla_hooks.results.picture import Picture, grouped
from dla_hooks.results.plots.wish import check_look
from dla_hooks.results.wording import headline, printable

KINDS = {"effects": ("direct", "total"), "split": ("own", "downstream", "read")}
"""The bars of each part."""
_MOST = 30
_SAYS = {
    "effects": "direct: what the part wrote; total: what the logit loses without it",
    "split": "total = own + downstream + read",
}


def plot(
    data: EffectsData,
    *,
    kind: str | None,
    rows: int | Sequence[str] | None,
    title: str | None,
    width: float | None,
    height: float | None,
) -> Picture:
    """Draw a group of bars for each part.

    Raises:
        InputError: when the result holds no number, or for an argument without meaning.
        LabelError: for a label that was not taken out.
    """
    check_look(kind, tuple(KINDS), rows, None, width, height)
    if not bool(data.total.isfinite().any()):
        raise InputError("there is nothing to draw: no part, or no position, is there")
    kind, means = kind or "effects", data.means()
    chosen = list(range(len(data.labels)))
    if isinstance(rows, Sequence):
        for label in rows:
            if label not in data.labels:
                raise unknown_label("effects", label, data.labels, "result.labels")
        chosen = [data.labels.index(label) for label in rows]
    else:
        chosen = chosen[: _MOST if rows is None else int(rows)]
    subtitle = [printable(headline(data.clean)), f"ablation: {data.ablation}. {_SAYS[kind]}"]
    if data.total[0].numel() > 1:
        subtitle.append(f"means over {int(data.total[0].isfinite().sum())} entries")
    left_out = len(data.labels) - len(chosen)
    if left_out:
        subtitle.append(f"{left_out} more part{'s' * (left_out > 1)}")
    return grouped(
        [printable(data.labels[number]) for number in chosen],
        [(name, [means[number][name] for number in chosen]) for name in KINDS[kind]],
        title="Effects of ablation" if title is None else title,
        subtitle=subtitle,
        width=width,
        height=height,
    )
