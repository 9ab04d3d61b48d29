"""Samples in the columns of rows: one for each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import InputError


def samples_of(columns: Mapping[str, Sequence[Any]], good: list[int]) -> tuple[Tensor, list[int]]:
    """Samples [row + 2, prompt], the last two being bias and logit, and the rows they are of.

    A prompt's entries are averaged. One without any is no sample.
    """
    if not good:
        return torch.zeros(2, 0, dtype=torch.float64, device="cpu"), []
    ranked = "means" in columns and "remainder" in columns
    if not ranked and "kept" in columns:
        raise InputError(
            "these rows hold the strongest parts only, which differ from row to row; make them "
            "with Attributor(…, means=True) to summarize them"
        )
    names = ("means", "remainder") if ranked else ("attribution",)
    parts = [_means(columns[name], good, stacked=name != "remainder") for name in names]
    parts += [_means(columns[name], good, stacked=False) for name in ("bias", "logit")]
    samples = torch.cat(parts)
    there = ~samples[-1].isnan()
    if ranked and bool(samples[:, there].isnan().any()):
        raise InputError("some of these rows have no means: they select too many positions")
    places = [index for index, real in zip(good, there.tolist(), strict=True) if real]
    return samples[:, there], places


def _means(values: Sequence[Any], good: list[int], *, stacked: bool) -> Tensor:
    """Each row's numbers [row, prompt], as the mean over its entries.

    Args:
        values: a column; of each prompt [row, *entries], or [*entries] where it is not stacked.
        good: the rows that are read.
        stacked: see there.
    """
    own, n_axes = [values[index] for index in good], 1 + stacked
    try:
        means = _averaged(_tensor(own), n_axes)
    except (ValueError, TypeError):  # prompts have other numbers of entries
        means = torch.stack([_averaged(_tensor(one), n_axes - 1) for one in own])
    return means.T if stacked else means[None]


def _averaged(values: Tensor, n_axes: int) -> Tensor:
    """The mean over all axes behind the first ``n_axes``."""
    return values.flatten(n_axes).mean(-1) if values.ndim > n_axes else values


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")
