"""The same numbers, labels and shapes as TransformerLens' own tool, from raw models (extra ``tl``).

Its models are processed by default; ``center_unembed`` and ``fold_value_biases`` reproduce that
from raw weights. Other kinds of model, and caches: `test_reference_kinds`.
"""

from __future__ import annotations

import pytest
import torch
from parity import POSITIONS, UNITS, assert_same, theirs
from tl_models import HOOKED, NAMES, has_hooked, ids_for

from dla_hooks import direct_logit_attribution

pytest.importorskip("transformer_lens")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the reference's own
    pytest.mark.tl,
]

# Its heads skip Gemma 3's post-norm (reference.md), and that error is no ground to stand on.
WRONG = {("gemma3_text", "head")}
RIGHT = [(name, unit) for name in NAMES for unit in UNITS if (name, unit) not in WRONG]
SLOW = pytest.mark.slow
QUICK = ("gpt2", "gpt_neox-parallel", "llama-bias", "gemma")
DIFFERENCE = pytest.mark.parametrize("incorrect", [None, 7], ids=["logit", "difference"])
HOOKED_HERE = HOOKED if has_hooked() else ()  # only TransformerLens 3 has it
# Bridges of these mix float32 into float64 in TransformerLens 3, where some bias is missing.
NO_DOUBLES = (
    *("gpt_neo", "gpt_neo-fourfold", "gptj", "opt-no-bias", "qwen2", "qwen2-tied-window"),
    *("falcon-7b", "stablelm-parallel", "stablelm-sequential"),
)


def ours(model, *args, **options):
    processed = {"center_unembed": True, "fold_value_biases": True}
    return direct_logit_attribution(model, *args, **{**processed, **options})


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=SLOW)])
@pytest.mark.parametrize(("name", "unit"), RIGHT)
@pytest.mark.parametrize(
    "place", ["last", "all", *(pytest.param(p, marks=SLOW) for p in ("list", "mask", "(stop)"))]
)
@DIFFERENCE
def test_families_match_reference(references, name, seed, unit, place, incorrect):
    model, reference = references.raw(name, seed), references.bridged(name, seed)
    ids, options = ids_for(model), {"unit": unit, "pos": POSITIONS[place]}
    expected = theirs(reference, ids, 5, incorrect, **options)
    assert_same(ours(model, ids, 5, incorrect, **options), expected)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=SLOW)])
@pytest.mark.parametrize("name", HOOKED_HERE)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("place", ["all", pytest.param("last", marks=SLOW)])
@DIFFERENCE
def test_hooked_transformers_match_reference(references, name, seed, unit, place, incorrect):
    model, reference = references.raw(name, seed), references.hooked(name, seed)
    ids, options = ids_for(model), {"unit": unit, "pos": POSITIONS[place]}
    expected = theirs(reference, ids, 5, incorrect, **options)
    assert_same(ours(model, ids, 5, incorrect, **options), expected)


# All families are in `test_reference_exact`; here the reference rounds as it comes.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[SLOW] * (name not in QUICK))
        for name in NAMES
        if not (has_hooked() and name in NO_DOUBLES)
    ],
)
def test_float64_models_match_reference(references, name):
    model = references.raw(name, dtype=torch.float64)
    reference, ids = references.bridged(name, dtype=torch.float64), ids_for(model)
    for unit in UNITS:
        if (name, unit) not in WRONG:
            expected = theirs(reference, ids, 5, 7, unit=unit, pos=None)
            assert expected.attribution.dtype == torch.float64
            assert_same(ours(model, ids, 5, 7, unit=unit, pos=None), expected)


# Raw weights are what a reference has that folds its norms and does nothing else: without fold_ln
# its direction is wrong. The other kinds of processing are switched one by one.
CONVENTIONS = [
    pytest.param(name, centre, fold, id=f"{name}-{'centred' * centre}-{'folded' * fold}", marks=m)
    for name in NAMES
    for centre in (False, True)
    for fold in (False, True)
    for m in [[SLOW] * ((centre or fold) and name not in QUICK)]
]


@pytest.mark.parametrize(("name", "center_unembed", "fold_value_biases"), CONVENTIONS)
@pytest.mark.parametrize("center_writing_weights", [False, pytest.param(True, marks=SLOW)])
def test_conventions_match_reference(
    references, name, center_unembed, fold_value_biases, center_writing_weights
):
    options = {"center_unembed": center_unembed, "fold_value_biases": fold_value_biases}
    processing = {**options, "center_writing_weights": center_writing_weights}
    check_conventions(references, references.bridged, name, processing, options)


@pytest.mark.parametrize("name", HOOKED_HERE)
@pytest.mark.parametrize("center_unembed", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize("fold_value_biases", [False, pytest.param(True, marks=SLOW)])
def test_conventions_of_hooked_transformers_match_reference(
    references, name, center_unembed, fold_value_biases
):
    options = {"center_unembed": center_unembed, "fold_value_biases": fold_value_biases}
    processing = {**options, "center_writing_weights": False}
    check_conventions(references, references.hooked, name, processing, options)


def check_conventions(references, kind, name, processing, options):
    model, reference = references.raw(name), kind(name, **processing)
    ids = ids_for(model)
    for unit in UNITS:
        if (name, unit) not in WRONG:
            expected = theirs(reference, ids, 5, unit=unit, pos=None)
            assert_same(ours(model, ids, 5, unit=unit, pos=None, **options), expected)


def test_conventions_change_the_expected_numbers(references):
    """Else they would not be tested at all."""
    model = references.raw("gpt2")
    ids = ids_for(model)
    for unit in UNITS:
        raw, centred, folded = (
            ours(model, ids, 5, unit=unit, center_unembed=centre, fold_value_biases=fold)
            for centre, fold in ((False, False), (True, False), (False, True))
        )
        assert not torch.allclose(raw.attribution, centred.attribution, atol=1e-3)
        same = torch.allclose(raw.attribution, folded.attribution, atol=1e-3)
        assert same == (unit != "head")


# It rounds its folded weights in half precision, so only the form of the result is compared.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unit", UNITS)
def test_half_precision_gives_float32(references, dtype, unit):
    model = references.raw("llama", dtype=dtype)
    expected = theirs(references.bridged("llama"), ids_for(model), 5, unit=unit, pos=None)
    given = ours(model, ids_for(model), 5, unit=unit, pos=None)
    assert given.attribution.dtype == torch.float32
    assert given.labels == expected.labels
    assert given.attribution.shape == expected.attribution.shape
