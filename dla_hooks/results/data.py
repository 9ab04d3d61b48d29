"""The fields of a result, and arithmetic on them."""

from __future__ import annotations

import torch
from torch import Tensor

from dla_hooks.errors import InputError


def ranked(labels: list[str], means: Tensor, k: int, *, largest: bool) -> list[tuple[str, float]]:
    """The ``k`` largest or smallest of labelled values, the most extreme first.

    Raises:
        InputError: when ``k`` is no int, or negative.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise InputError(f"k must be an int that is not negative, got {k!r}")
    last = -torch.inf if largest else torch.inf  # what has no value is ranked behind all else
    order = means.nan_to_num(nan=last, posinf=torch.inf, neginf=-torch.inf)
    rows = order.topk(min(k, len(labels)), largest=largest).indices
    values = means[rows]
    return [(labels[row], value) for row, value in zip(rows.tolist(), values.tolist(), strict=True)]
