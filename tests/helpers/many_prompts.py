"""Prompts and models for the tests of many prompts."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mapping_zoo import build_any
from zoo import build

from dla_hooks import attribute_many

LENGTHS = (5, 9, 2, 7, 7, 3, 1, 9)
RECURRENT = ("mamba", "rwkv", "recurrent_gemma")


def random_prompts(lengths=LENGTHS, seed=0, vocabulary=60):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths]


def made(name: str, seed: int = 0):
    if name in RECURRENT:
        return build_any(name, seed)
    family, _, attn = name.partition(" ")
    return build(family, seed, attn=attn or "sdpa")


@contextmanager
def batches_seen(model) -> Iterator[list[tuple[int, ...]]]:
    """The shape of every batch that the model runs."""
    shapes: list[tuple[int, ...]] = []
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):  # no hook: a folder to resume is refused with one
        shapes.append(tuple(kwargs["input_ids"].shape))
        return inner(*args, **kwargs)

    model.forward = forward
    list(attribute_many(model, random_prompts(), 5))  # what the model is asked once, it is asked
    shapes.clear()
    try:
        yield shapes
    finally:
        del model.forward


def assert_same(result, alone, atol=1e-5):
    """A result equals that of its prompt alone, up to rounding.

    transformers computes norms, softmax or rotary tables in float32, even in float64 models, and
    rounds them otherwise in a batch than in a run alone.
    """
    for name, value in vars(alone).items():
        found = getattr(result, name)
        if name in ("gap", "logit_gap"):  # the largest of a batch, and rounding besides
            assert found >= 0 or value != value
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(found, value, rtol=0, atol=atol, msg=name)
        elif name == "seen":
            assert_same_looks(found, value, atol)
        else:
            assert found == value, name


def assert_same_looks(found, value, atol):
    """The model's own logits say the same, at all entries that both have looked at."""
    if found is None or value is None:
        return
    both = (found.rank > 0) & (value.rank > 0)
    assert torch.equal(found.rank[both], value.rank[both])
    for name in ("log_probability", "top_probability"):
        pair = (getattr(each, name)[..., both] for each in (found, value))
        torch.testing.assert_close(*pair, rtol=1e-3, atol=10 * atol, msg=name)
