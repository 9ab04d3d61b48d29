"""Promoted tokens as a picture: a line for each row, its tokens in the colours of their logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dla_hooks.errors import InputError
from dla_hooks.results import picture
from dla_hooks.results.parts import unknown_label
from dla_hooks.results.picture import Picture
from dla_hooks.results.plots.wish import check_look
from dla_hooks.results.promoted_data import PromotedData
from dla_hooks.results.promoted_views import heading, shown_entry, shown_rows, tokens_of

_LONGEST = 13


def plot(
    data: PromotedData,
    *,
    rows: int | Sequence[str] | None,
    k: int,
    title: str | None,
    width: float | None,
    height: float | None,
) -> Picture:
    """Draw the tokens of one entry.

    Raises:
        InputError: when there is no entry, or for an argument without meaning.
        LabelError: for a label that no row has.
    """
    check_look(None, (), rows, None, width, height)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k must be how many tokens, at least 1; got {k!r:.80}")
    entry = shown_entry(data)
    if entry is None:
        raise InputError("there is nothing to draw: no token is selected")
    k, n = min(k, data.k), len(data.labels)
    labels = [data.label_at(number, entry) for number in range(n)]
    if isinstance(rows, Sequence):
        for label in rows:
            if label not in labels:
                raise unknown_label(data.unit, label, labels, "result.labels")
        chosen = [labels.index(label) for label in rows]
    else:
        chosen = shown_rows(data, entry, n if rows is None else int(rows))
    chosen = [number for number in chosen if tokens_of(data, "up", number, entry, 1)]
    if not chosen:
        raise InputError("there is nothing to draw: none of these rows is there at this entry")
    values, texts, names = [], [], []
    for number in chosen:
        # The largest at the left, then those pushed down, the most negative at the right.
        both = [tokens_of(data, way, number, entry, k) for way in ("up", "down")]
        listed = [*both[0], *reversed(both[1])]
        values.append([value for _, value in listed])
        texts.append([_short(token) for token, _ in listed])
        names.append([f"{labels[number]} · {token}" for token, _ in listed])
    up = [f"↑ {rank}" for rank in range(1, k + 1)]
    down = [f"↓ {rank}" for rank in range(k, 0, -1)]
    head = heading(data)
    subtitle = [head[1], f"logits less their mean over {data.n_tokens:,} tokens"]
    if not math.isnan(data.gap):
        subtitle[1] += f"; the rows make up the model's own logits to {data.gap:.0e}"
    if data.shape.numel() > 1:
        subtitle.append(f"one of {data.shape.numel()} entries: prompt(i), position(j) take others")
    return picture.heatmap(
        [labels[number] for number in chosen], [*up, *down], values, texts=texts, names=names,
        title=head[0] if title is None else title, subtitle=subtitle, width=width, height=height,
    )  # fmt: skip


def _short(token: str) -> str:
    return token if len(token) <= _LONGEST else f"{token[: _LONGEST - 2]}…{token[-1]}"
