"""Experts, against a plain loop over their weights, and against taking one of them out."""

from __future__ import annotations

import re

import pytest
import torch
from mapping_zoo import MODEL_TYPES, VARIANTS, CannotBuild, build_any, example_ids_any
from moe_oracle import Layer, direction, experts_of
from zoo import build, example_ids

import dla_hooks
from dla_hooks import Experts, InputError, UnsupportedModelError, direct_logit_attribution
from dla_hooks.verification.recognise import stream_of

A, B = 5, 7
FAMILIES = (
    *("afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "dbrx"),
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note_text", "ernie4_5_moe"),
    *("exaone_moe", "flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss"),
    *("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe"),
    *("hy_v3", "jamba", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4_text"),
    *("longcat_flash", "mellum", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "mixtral"),
    *("nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe"),
    *("qwen3_next", "solar_open", "zaya"),
)
NAMED = {(kind, name): changes for kind, name, changes in VARIANTS}
CASES = [(kind, {}) for kind in FAMILIES if kind in MODEL_TYPES]
CASES += [
    ("gemma4_text", NAMED.get(("gemma4_text", "experts"), {})),
    ("gemma4_text", NAMED.get(("gemma4_text", "experts-no-layer-input"), {})),
    ("nemotron_h", {"moe_latent_size": 24, "mlp_bias": True}),
    ("cohere2_moe", {"shared_expert_combination_strategy": "sum"}),
    ("longcat_flash", {"zero_expert_num": 0}),
]
# Norms behind the experts compute in float32, and so do the sum of hy_v3 and the gate of beam.
IN_FLOAT32 = {"afmoe", "axk1", "kolibri1", "gemma4_text", "hy_v3", "flex_olmo", "beam"}
# The same for the gain of the final norm, by which the oracle reads a write.
GAIN_IN_FLOAT32 = {"minimax_m3_vl_text", "nemotron_h", "qwen3_5_moe_text", "qwen3_next"}
GAINED = {"zaya"}  # each channel of the stream has a gain of its own

pytestmark = pytest.mark.skipif("mixtral" not in MODEL_TYPES, reason="no such models")


def name_of(case) -> str:
    return "-".join([case[0], *map(str, case[1])][:2])


@pytest.fixture(params=CASES, ids=name_of, scope="module")
def kind(request):
    return request.param


@pytest.fixture(
    params=[0, pytest.param(1, marks=pytest.mark.slow)], ids="seed{}".format, scope="module"
)
def case(request, kind):
    """A model, a prompt, its experts and its components at every position."""
    try:
        model = build_any(kind[0], request.param, **kind[1])
    except CannotBuild as error:
        pytest.skip(str(error))
    ids = example_ids_any(model, batch=2, length=5, seed=request.param)
    found = direct_logit_attribution(model, ids, A, B, unit=("expert", "component"), pos=None)
    return kind[0], model, ids, found["expert"], found["component"]


def of_layer(result, layer: int) -> dict[str, int]:
    """The places of a layer's rows, by what stands behind the layer in the label."""
    rows = enumerate(result.rows)
    return {re.sub(r"L[0-9.]+", "", r.label): i for i, r in rows if r.layer == layer}


def layers_of(model, ids):
    stream = stream_of(model)
    for block in stream.blocks:
        if experts_of(block.module) is None:
            continue
        write = next(w for w in block.writes if w.kind in ("mlp_out", "moe_out", "mixer_out"))
        for one in block.writes:
            inside = experts_of(one.module)
            write = one if inside is not None and one.kind != "attn_out" else write
        yield block.layer, write, Layer(model, block.module, write.written_by, ids)


def assert_share(row, contribution, layer, component, d, close):
    """row / component = (contribution . d) / (write . d) at each position."""
    ours = row.flatten() * (layer.write @ d)
    theirs = component.flatten() * (contribution @ d)
    size = float((component.abs().max() * (layer.write @ d).abs().max()).clamp_min(1e-30))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=close * size)


def test_each_row_is_its_expert_computed_by_hand(case):
    kind, model, ids, experts, components = case
    if kind in GAINED:
        pytest.skip("the direction differs from block to block")
    d = direction(model, stream_of(model).final_norm.module, A, B)
    close = 1e-6 if kind in IN_FLOAT32 | GAIN_IN_FLOAT32 else 1e-9
    for number, write, layer in layers_of(model, ids):
        places, component = of_layer(experts, number), components[write.label]
        found = layer.contributions()
        assert found
        n = sum(label.startswith("E") for label in places)
        for e in range(n):
            own = found.get(e, torch.zeros_like(layer.write))
            row = experts.attribution[places[f"E{e}"]]
            assert_share(row, own, layer, component, d, close)
            assert torch.equal(row.flatten() == 0, (own == 0).all(-1)), e


def test_taking_an_expert_out_moves_the_write_by_its_row(case):
    kind, model, ids, experts, components = case
    if kind in GAINED:
        pytest.skip("the direction differs from block to block")
    d = direction(model, stream_of(model).final_norm.module, A, B)
    close = 1e-6 if kind in IN_FLOAT32 | GAIN_IN_FLOAT32 else 1e-9
    for number, write, layer in layers_of(model, ids):
        places = of_layer(experts, number)
        for e in (0, 3):
            row = experts.attribution[places[f"E{e}"]]
            assert_share(row, layer.ablated(e), layer, components[write.label], d, close)


def test_each_shared_row_is_what_goes_without_its_module(case):
    kind, model, ids, experts, components = case
    d = direction(model, stream_of(model).final_norm.module, A, B)
    close = 1e-6 if kind in IN_FLOAT32 | GAIN_IN_FLOAT32 else 1e-9
    for number, write, layer in layers_of(model, ids):
        places = of_layer(experts, number)
        shared = shared_of(layer.block)
        if shared is None:
            assert "S0" not in places
            continue
        row = experts.attribution[places["S0"]]
        if kind.startswith("granitemoe"):  # a write of its own
            torch.testing.assert_close(row, components[f"{number}_shared_mlp_out"])
            continue
        own = layer.write - layer.write_with(shared, torch.zeros_like)
        assert_share(row, own, layer, components[write.label], d, close)


def shared_of(block):
    names = ("shared_experts", "shared_expert", "shared_mlp")
    if hasattr(block, "post_feedforward_layernorm_1"):  # Gemma 4's dense branch
        return block.mlp
    for path, module in block.named_modules():
        if path.rpartition(".")[2] in names:
            return module
    return None


def test_rows_are_weight_times_vote_and_sum_to_the_sublayer(case):
    kind, model, ids, experts, components = case
    weight, vote = experts.beside["weight"], experts.beside["vote"]
    assert weight.shape == vote.shape == experts.attribution.shape
    torch.testing.assert_close(weight[:-1] * vote[:-1], experts.attribution[:-1])
    assert bool(((weight == 0) <= (experts.attribution == 0))[:-1].all())
    close = 1e-6 if kind in IN_FLOAT32 else 1e-9
    spread = float(components.attribution.abs().max())
    for number, write, layer in layers_of(model, ids):
        rows = [i for label, i in of_layer(experts, number).items() if label[0] == "E"]
        assert bool(((weight[rows] != 0).sum(0) <= 2).all())
        shared = [i for label, i in of_layer(experts, number).items() if label[0] == "S"]
        if kind.startswith("granitemoe"):
            shared = []
        whole = experts.attribution[rows + shared].sum(0)
        if kind == "nemotron_h":
            continue  # its last map may have a bias, which is no expert's
        torch.testing.assert_close(
            whole, components[write.label], rtol=0, atol=close * spread, msg=write.label
        )
    torch.testing.assert_close(
        experts.attribution.sum(0) + experts.bias, experts.logit, rtol=0, atol=1e-9 * spread
    )
