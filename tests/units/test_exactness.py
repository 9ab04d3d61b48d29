"""Every family, unit and dtype against the model's own logits and the brute-force oracle."""

from __future__ import annotations

import pytest
import torch
from oracle import head_effects, logit_of, logit_parts
from units import UNIT_NAMES
from zoo import ZOO, Spec, build, example_ids, supports

from dla_hooks import UnsupportedModelError, direct_logit_attribution, verify

pytestmark = pytest.mark.lowest

ANSWER, INCORRECT = 5, 7


def spread(logits: torch.Tensor) -> float:
    logits = logits.double()
    return float((logits.amax(-1) - logits.amin(-1)).mean())


def uncapped(model, logits: torch.Tensor) -> torch.Tensor:
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.atanh(logits / cap)


@pytest.fixture(params=ZOO, ids=repr, scope="module")
def spec(request) -> Spec:
    return request.param


@pytest.fixture(
    params=[0, pytest.param(1, marks=pytest.mark.slow)], ids="seed{}".format, scope="module"
)
def seed(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def case(spec, seed):
    """A float64 model, a prompt, its logits before any cap, and their spread."""
    model = build(spec, seed)
    ids = example_ids(spec, seed=seed)
    with torch.no_grad():
        logits = model(ids).logits
    return model, ids, uncapped(model, logits.double()), spread(logits)


@pytest.mark.parametrize("incorrect", [None, INCORRECT], ids=["logit", "difference"])
@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_parts_and_bias_sum_to_model_logit(case, unit, incorrect):
    model, ids, logits, size = case
    result = direct_logit_attribution(model, ids, ANSWER, incorrect, unit=unit, pos=None)
    whole = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
    truth = logit_of(logits, ANSWER, incorrect)
    assert result.gap <= 1e-9 * size
    torch.testing.assert_close(whole + result.bias, result.logit, rtol=0, atol=1e-9 * size)
    torch.testing.assert_close(result.logit, truth, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("folded", [False, True], ids=["as it is", "value biases folded"])
@pytest.mark.parametrize("unit", UNIT_NAMES)
def test_one_entry_alone_has_the_numbers_that_it_has_among_others(case, unit, folded):
    model, ids, _, size = case
    options = {"unit": unit, "fold_value_biases": folded}
    try:
        many = direct_logit_attribution(model, ids[:1], ANSWER, INCORRECT, pos=None, **options)
    except UnsupportedModelError:
        if not (folded and unit == "head"):
            raise
        return
    one = direct_logit_attribution(model, ids[:1], ANSWER, INCORRECT, **options)
    expected = many.attribution[..., -1]
    torch.testing.assert_close(one.attribution, expected, rtol=0, atol=1e-5 * size)
    assert float(expected.abs().max()) > 1e-3 * size


def test_components_match_oracle(case):
    model, ids, _, size = case
    result = direct_logit_attribution(model, ids, ANSWER, INCORRECT, pos=None)
    truth = logit_parts(model, ids, ANSWER, INCORRECT)
    assert result.labels == [label for label in truth if label != "bias"]
    for label, values in zip(result.labels, result.attribution, strict=True):
        torch.testing.assert_close(values, truth[label], rtol=0, atol=1e-6 * size, msg=label)
    torch.testing.assert_close(
        result.bias, truth["bias"].expand_as(result.bias), rtol=0, atol=1e-6 * size
    )


def test_layers_are_running_sums_of_components(case):
    model, ids, _, size = case
    parts = direct_logit_attribution(model, ids, ANSWER, pos=None)
    layers = direct_logit_attribution(model, ids, ANSWER, unit="layer", pos=None)
    running, expected = torch.zeros_like(parts.bias), {}
    for label, values in zip(parts.labels, parts.attribution, strict=True):
        if label.endswith("_attn_out"):
            expected[label.replace("attn_out", "pre")] = running
        running = running + values
        if label.endswith("_attn_out"):
            expected[label.replace("attn_out", "mid")] = running
    expected["final_post"] = running
    assert set(layers.labels) <= set(expected)
    for label, values in zip(layers.labels, layers.attribution, strict=True):
        torch.testing.assert_close(values, expected[label], rtol=0, atol=1e-9 * size)


PARALLEL = ("gptj", "gpt_neox-parallel", "gpt_neox-no-bias-tied", "phi", "phi-qknorm", "cohere")
PARALLEL += ("cohere-qknorm-untied", "stablelm-parallel", "falcon-7b", "falcon-new")
PARALLEL += ("falcon-new-1ln",)


def test_only_sequential_blocks_have_a_mid_stream(case, spec):
    model, ids, *_ = case
    labels = direct_logit_attribution(model, ids, ANSWER, unit="layer").labels
    n_layers = model.config.num_hidden_layers
    mids = [f"{layer}_mid" for layer in range(n_layers)]
    assert [label for label in labels if "mid" in label] == (
        mids if spec.name not in PARALLEL else []
    )
    assert [label for label in labels if "pre" in label] == [f"{i}_pre" for i in range(n_layers)]


def test_heads_match_effect_of_changing_them(case):
    model, ids, _, size = case
    result = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit="head", pos=None)
    truth = head_effects(model, ids, ANSWER, INCORRECT, eps=0.5)
    n_layers, n_heads = truth.shape[:2]
    assert result.labels[:-1] == [f"L{i}H{h}" for i in range(n_layers) for h in range(n_heads)]
    assert result.labels[-1] == "remainder"
    heads = result.attribution[:-1].reshape(truth.shape)
    torch.testing.assert_close(heads, truth, rtol=0, atol=1e-6 * size)


SDPA = [spec for spec in ZOO if supports(spec, "sdpa")]


@pytest.mark.parametrize("sdpa_spec", SDPA, ids=repr)
def test_fused_attention_matches_eager(sdpa_spec):
    """All other tests run eager attention."""
    model = build(sdpa_spec, attn="sdpa")
    ids = example_ids(sdpa_spec)
    result = direct_logit_attribution(model, ids, ANSWER, unit="head", pos=None)
    with torch.no_grad():
        logits = model(ids).logits
    truth = uncapped(model, logits.double())[..., ANSWER]
    whole = result.attribution.sum(0) + result.bias
    torch.testing.assert_close(whole, truth, rtol=0, atol=1e-5 * spread(logits))


# What is left of the numbers in each dtype, relative to the logits' spread: far below a mistake,
# above the rounding of the stream itself.
PRECISION = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.004}


@pytest.mark.parametrize("dtype", PRECISION, ids=lambda dtype: str(dtype).split(".")[1])
def test_lower_precisions_sum_to_model_logits(spec, dtype):
    model = build(spec, dtype=dtype)
    ids = example_ids(spec)
    with torch.no_grad():
        logits = model(ids).logits.double()
    for unit in UNIT_NAMES:
        result = direct_logit_attribution(model, ids, ANSWER, INCORRECT, unit=unit, pos=None)
        assert result.attribution.dtype == torch.float32
        whole = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
        if result.softcap is None:
            truth = logit_of(logits, ANSWER, INCORRECT)
            error = float((whole + result.bias - truth).abs().max())
            assert error <= PRECISION[dtype] * spread(logits), unit
        assert result.logit_gap <= PRECISION[dtype] * spread(logits)


def test_verify_passes_for_every_family(case):
    report = verify(case[0], show=False)
    assert report.ok
    assert report.largest_gap < 1e-5
    n_layers = case[0].config.num_hidden_layers
    assert len(report.lines) == 2 * n_layers + 1  # a block and its heads per layer, the readout


@pytest.mark.parametrize("seed", [0, 1])
def test_heads_before_a_post_norm_with_a_bias_sum_to_what_attention_wrote(seed):
    """No family of transformers has one: the norm is put in."""
    torch.manual_seed(seed)
    model, ids = build("olmo2", seed=seed), example_ids("olmo2")
    width = model.config.hidden_size
    for layer in model.model.layers:
        norm = torch.nn.LayerNorm(width, dtype=torch.float64)
        torch.nn.init.normal_(norm.weight, 1, 0.3)
        torch.nn.init.normal_(norm.bias, 0, 0.3)
        layer.post_attention_layernorm = norm.eval()
    result = direct_logit_attribution(model, ids, ANSWER, unit="head")
    with torch.no_grad():
        logits = model(ids).logits[:, -1, ANSWER]
    torch.testing.assert_close(result.attribution.sum(0) + result.bias, logits, rtol=0, atol=1e-5)
