"""TransformerLens models and their caches in the model's place: the reference's own numbers.

Nothing is converted here: how a model was processed is its own business, so neither convention is
asked for, and both sides are given the very same model or cache.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from parity import FEW_POSITIONS, POSITIONS, UNITS, assert_same, cells, hold, theirs
from tl_models import HOOKED, NAMES, bridged, has_hooked, hooked, ids_for

from dla_hooks import direct_logit_attribution as ours

pytest.importorskip("transformer_lens")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the reference's own
    pytest.mark.tl,
    pytest.mark.skipif(
        "cache" not in inspect.signature(ours).parameters, reason="raw models only, so far"
    ),
]

SLOW = pytest.mark.slow
DIFFERENCE = pytest.mark.parametrize("incorrect", [None, 7], ids=["logit", "difference"])
KINDS = ("bridged", "hooked") if has_hooked() else ("bridged",)
EVERY = [("bridged", name) for name in NAMES]
EVERY += [("hooked", name) for name in HOOKED if has_hooked()]
# Fused and separate projections, both norms, sequential and parallel blocks
SOME = ("gpt2", "llama", "gpt_neox-parallel")
WRONG = ("gemma3_text", "head")  # skips a post-norm, see `test_reference`
TEXT = " John gave Mary a drink"

# The names that a stored cache has to hold for a unit. Rotary models have no hook_pos_embed.
ALWAYS = ("ln_final.hook_scale",)
LEAST = {
    "component": ("hook_embed", "hook_pos_embed", "hook_attn_out", "hook_mlp_out"),
    "layer": ("hook_resid_pre", "hook_resid_mid", "hook_resid_post"),
    "head": ("attn.hook_z", "hook_resid_post"),
}


def filtered(model, ids, names):
    """A cache that holds nothing but these, in every layer."""
    return model.run_with_cache(ids, names_filter=lambda name: name.endswith((*ALWAYS, *names)))[1]


# How a cache can come about; each takes a prompt of one row or, unless it drops the axis, more.
WITH_ROWS = {
    "whole": lambda model, ids, unit: model.run_with_cache(ids)[1],
    "filtered": lambda model, ids, unit: filtered(model, ids, sum(LEAST.values(), ())),
    "least": lambda model, ids, unit: filtered(model, ids, LEAST[unit]),
}
WITHOUT_ROWS = {
    "run without its axis": lambda model, ids, unit: model.run_with_cache(
        ids, remove_batch_dim=True
    )[1],
    "axis removed": lambda model, ids, unit: model.run_with_cache(ids)[1].remove_batch_dim(),
    "least, axis removed": lambda model, ids, unit: filtered(
        model, ids, LEAST[unit]
    ).remove_batch_dim(),
}
SOURCES = WITH_ROWS | WITHOUT_ROWS
UNCACHED = {
    ("hooked", name, "run without its axis") for name in ("qwen3", "mixtral", "mixtral-tied")
}


def some_slow(names, quick):
    return [name if name in quick else pytest.param(name, marks=SLOW) for name in names]


@pytest.mark.parametrize(("kind", "name"), EVERY)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("place", some_slow(FEW_POSITIONS, ("all",)))
@pytest.mark.parametrize("incorrect", [7, pytest.param(None, marks=SLOW)])
def test_model_kinds_match_reference(references, kind, name, unit, place, incorrect):
    if (name, unit) == WRONG:
        pytest.skip("the reference is wrong here")
    model, options = getattr(references, kind)(name), {"unit": unit, "pos": POSITIONS[place]}
    ids = ids_for(references.raw(name))
    expected = theirs(model, ids, 5, incorrect, **options)
    assert_same(ours(model, ids, 5, incorrect, **options), expected)


@pytest.mark.parametrize(
    ("kind", "name", "source"),
    [
        pytest.param(kind, name, source, marks=[SLOW] * (name not in SOME and source != "least"))
        for kind, name in EVERY
        for source in SOURCES
    ],
)
@pytest.mark.parametrize("unit", UNITS)
def test_caches_match_reference(references, kind, name, unit, source):
    if (name, unit) == WRONG:
        pytest.skip("the reference is wrong here")
    if (kind, name, source) in UNCACHED:
        pytest.skip("the reference fails to cache a hook that sees no batch axis")
    model = getattr(references, kind)(name)
    ids = ids_for(references.raw(name), batch=1 if source in WITHOUT_ROWS else 2)
    given, there = SOURCES[source](model, ids, unit), SOURCES[source](model, ids, unit)
    expected = theirs(model, None, 5, 7, unit=unit, pos=None, cache=there)
    assert_same(ours(model, None, 5, 7, unit=unit, pos=None, cache=given), expected)
    assert expected.attribution.ndim == (2 if source in WITHOUT_ROWS else 3)


def sweep():
    for name in SOME:
        for unit in UNITS:
            quick = (name, unit) == ("gpt2", "head")
            positions = POSITIONS if name == "gpt2" else FEW_POSITIONS
            for label, batch, pos, answer, incorrect in cells(positions, batches=(1, 2)):
                slow = not quick or label.split(", ")[1] not in FEW_POSITIONS
                yield pytest.param(
                    *(name, unit, batch, pos, answer, incorrect),
                    id=f"{name}-{unit}-{label}",
                    marks=[SLOW] * slow,
                )


@pytest.mark.parametrize("kind", some_slow(KINDS, ("bridged",)))
@pytest.mark.parametrize(("name", "unit", "batch", "pos", "answer", "incorrect"), [*sweep()])
def test_answers_at_positions_match_reference(
    references, kind, name, unit, batch, pos, answer, incorrect
):
    """On the model and on its cache, with the batch axis and where possible without."""
    model, ids = getattr(references, kind)(name), ids_for(references.raw(name), batch)
    options = {"unit": unit, "pos": pos}
    expected = theirs(model, ids, answer, incorrect, **options)
    assert_same(ours(model, ids, answer, incorrect, **options), expected)
    cache = WITH_ROWS["filtered"](model, ids, unit)
    assert_same(ours(model, None, answer, incorrect, cache=cache, **options), expected)
    if batch == 1:
        given, there = (WITHOUT_ROWS["least, axis removed"](model, ids, unit) for _ in range(2))
        hold(
            lambda: ours(model, None, answer, incorrect, cache=given, **options),
            lambda: theirs(model, None, answer, incorrect, cache=there, **options),
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*SOME, "bloom-four-heads"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    "prompt", [TEXT, [TEXT, " When the cat sat on"], torch.arange(3, 9), torch.tensor([[4]])]
)
def test_input_forms_match_reference(references, kind, name, unit, prompt):
    """Strings get a BOS where the model's config says so, which BLOOM's does not."""
    model = getattr(references, kind)(name)
    expected = theirs(model, prompt, " Paris", " Berlin", unit=unit, pos=None)
    assert_same(ours(model, prompt, " Paris", " Berlin", unit=unit, pos=None), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("center_unembed", [False, True])
@pytest.mark.parametrize("fold_value_biases", [False, True])
def test_models_keep_their_own_conventions(
    references, kind, unit, center_unembed, fold_value_biases
):
    model = getattr(references, kind)(
        "gpt2", center_unembed=center_unembed, fold_value_biases=fold_value_biases
    )
    ids = ids_for(references.raw("gpt2"))
    expected = theirs(model, ids, 5, unit=unit, pos=None)
    assert_same(ours(model, ids, 5, unit=unit, pos=None), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("unit", UNITS)
def test_cache_of_some_positions_matches_reference(references, kind, name, unit):
    """Positions are counted among those that it holds."""
    model, ids = getattr(references, kind)(name), ids_for(references.raw(name))
    for pos in (0, -1, None, [2, 0], (1, 3)):
        given, there = (model.run_with_cache(ids, pos_slice=(2, 6))[1] for _ in range(2))
        expected = theirs(model, None, 5, unit=unit, pos=pos, cache=there)
        assert_same(ours(model, None, 5, unit=unit, pos=pos, cache=given), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", UNITS)
def test_input_is_ignored_beside_a_cache(references, kind, unit):
    model, ids = getattr(references, kind)("gpt2"), ids_for(references.raw("gpt2"))
    given, there = (model.run_with_cache(ids)[1] for _ in range(2))
    other = torch.arange(3, 8)[None]
    expected = theirs(model, other, 5, unit=unit, cache=there)
    assert_same(ours(model, other, 5, unit=unit, cache=given), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", UNITS)
def test_float64_models_match_reference(references, kind, unit):
    model = getattr(references, kind)("llama", dtype=torch.float64)
    ids = ids_for(references.raw("llama"))
    expected = theirs(model, ids, 5, unit=unit, pos=None)
    assert expected.attribution.dtype == torch.float64
    assert_same(ours(model, ids, 5, unit=unit, pos=None), expected)


# After a change of dtype the bridge of TransformerLens 3 cannot run.
@pytest.mark.parametrize("kind", KINDS[-1:])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unit", UNITS)
def test_half_precision_matches_reference(references, tmp_path, kind, dtype, unit):
    """The reference adds up in half precision, so its numbers are good to a few per cent only."""
    builder = {"bridged": bridged, "hooked": hooked}[kind]
    model, ids = (
        builder(references.raw("llama"), tmp_path).to(dtype),
        ids_for(references.raw("llama")),
    )
    expected = theirs(model, ids, 5, unit=unit, pos=None)
    given = ours(model, ids, 5, unit=unit, pos=None)
    assert given.attribution.dtype == torch.float32
    assert given.labels == expected.labels
    assert (given.attribution - expected.attribution.float()).abs().max() < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", UNITS)
def test_models_and_caches_are_unchanged(references, kind, unit):
    """The reference's head unit writes to the cache that it is given."""
    model, ids = getattr(references, kind)("gpt2"), ids_for(references.raw("gpt2"))
    with torch.no_grad():
        before = model(ids)
    cache = model.run_with_cache(ids)[1]
    stored = {name: value.clone() for name, value in cache.items()}
    ours(model, ids, 5, unit=unit)
    ours(model, None, 5, unit=unit, cache=cache)
    assert list(cache.keys()) == list(stored)
    assert all(torch.equal(cache[name], value) for name, value in stored.items())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    with torch.no_grad():
        assert torch.equal(model(ids), before)
