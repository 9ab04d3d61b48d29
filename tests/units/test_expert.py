"""Experts, against a plain loop over their weights, and against taking one of them out."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers
from mapping_zoo import MODEL_TYPES, VARIANTS, CannotBuild, build_any, example_ids_any
from moe_oracle import Layer, direction, experts_of

import dla_hooks
from dla_hooks import Experts, InputError, UnsupportedModelError, direct_logit_attribution
from dla_hooks.calibration import expert_sites
from dla_hooks.projection.slots import ExpertRows
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

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5, reason="its experts are modules apart"
)


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
    for number, write, _ in layers_of(model, ids):
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


# The same numbers in every way to run a model


def same(found, expected, close=1e-5):
    assert found.labels == expected.labels
    size = float(expected.attribution.abs().max())
    for one, other in [
        (found.attribution, expected.attribution),
        (found.beside["vote"], expected.beside["vote"]),
    ]:
        torch.testing.assert_close(one, other, rtol=0, atol=close * size, equal_nan=True)
    torch.testing.assert_close(found.beside["weight"], expected.beside["weight"], equal_nan=True)


def set_experts(model, way: str) -> None:
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = way


@pytest.mark.parametrize("spec", ["mixtral", "gpt_oss", "qwen2_moe", "nemotron_h", "olmoe"])
def test_every_way_to_compute_experts_gives_the_same_rows(spec):
    model = build_any(spec, dtype=torch.float32)
    ids = example_ids_any(model, batch=3, length=12)
    for pos in (-1, None):
        results = []
        for way in ("eager", "batched_mm", "grouped_mm"):
            set_experts(model, way)
            results.append(direct_logit_attribution(model, ids, A, B, unit="expert", pos=pos))
        for other in results[1:]:
            same(other, results[0], 1e-4)


def test_the_input_of_the_down_map_is_used_where_it_is_seen(monkeypatch):
    from dla_hooks.modules.experts import ExpertsCall

    model = build_any("gpt_oss", dtype=torch.float32)
    ids = example_ids_any(model, batch=2, length=12)
    set_experts(model, "grouped_mm")
    direct_logit_attribution(model, ids, A, unit="expert")
    asked = []
    again = ExpertsCall.again
    monkeypatch.setattr(ExpertsCall, "again", lambda *a: asked.append(1) or again(*a))
    direct_logit_attribution(model, ids, A, unit="expert", pos=None)
    direct_logit_attribution(model, ids, A, unit="expert")
    assert not asked
    direct_logit_attribution(model, ids, ids, unit="expert", pos=None)
    assert asked  # with a direction of its own at each position
    assert all("_apply_gate" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])  # with biases and without
def test_one_entry_alone_has_the_numbers_that_it_has_among_others(kind, way, seed):
    """Of few entries only the maps of their own experts are read."""
    model = build_any(kind, seed, dtype=torch.float32)
    set_experts(model, way)
    ids = example_ids_any(model, batch=1, length=20)
    many = direct_logit_attribution(model, ids, A, B, unit="expert", pos=None)
    one = direct_logit_attribution(model, ids, A, B, unit="expert")
    size = float(many.attribution.abs().max())
    for found, expected in (
        (one.attribution, many.attribution),
        (one.beside["vote"], many.beside["vote"]),
        (one.beside["weight"], many.beside["weight"]),
    ):
        torch.testing.assert_close(found, expected[..., -1], rtol=0, atol=1e-4 * max(1, size))
    assert int((one.attribution[:-1] != 0).sum()) >= 2


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_padding_rows_and_single_positions_agree_with_each_prompt_alone(way):
    model = build_any("qwen3_moe", dtype=torch.float32, attn="sdpa")
    set_experts(model, way)
    ids = example_ids_any(model, batch=2, length=20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    call = {"unit": "expert", "pos": None}
    both = direct_logit_attribution(model, ids, A, B, attention_mask=mask, **call)
    alone = direct_logit_attribution(model, ids[:1, 7:], A, B, **call)
    size = float(alone.attribution.abs().max())
    real = both.attribution[:, 0][:, ~both.attribution[0, 0].isnan()]
    torch.testing.assert_close(real, alone.attribution[:, 0], rtol=0, atol=1e-4 * size)
    whole = direct_logit_attribution(model, ids, A, B, **call)
    for pos in (-1, [3, 11]):
        some = direct_logit_attribution(model, ids, A, B, unit="expert", pos=pos)
        picked = whole.attribution[:, :, pos]
        torch.testing.assert_close(some.attribution, picked, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_answers_of_each_row_and_position_agree_with_single_ones(way):
    model = build_any("mixtral", dtype=torch.float32)
    set_experts(model, way)
    ids = example_ids_any(model, batch=2, length=12)
    answers = torch.tensor([[5], [9]])
    call = {"unit": "expert", "pos": None}
    both = direct_logit_attribution(model, ids, answers, **call)
    next_ones = direct_logit_attribution(model, ids, ids.roll(-1, 1), **call)
    for row, token in enumerate((5, 9)):
        one = direct_logit_attribution(model, ids, token, **call)
        size = float(one.attribution.abs().max())
        close = {"rtol": 0, "atol": 1e-4 * size}
        torch.testing.assert_close(both.attribution[:, row], one.attribution[:, row], **close)
    one = direct_logit_attribution(model, ids, int(ids[1, 4]), **call)
    found, expected = next_ones.attribution[:, 1, 3], one.attribution[:, 1, 3]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("spec", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_chunks_give_what_a_whole_run_gives(spec):
    model = build_any(spec, dtype=torch.float32)
    ids = example_ids_any(model, batch=2, length=40)
    for way in ("eager", "grouped_mm"):
        set_experts(model, way)
        whole = direct_logit_attribution(model, ids, A, B, unit="expert", pos=None)
        found = direct_logit_attribution(model, ids, A, B, unit="expert", pos=None, chunk_size=18)
        same(found, whole, 1e-4)


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_under_autocast_experts_are_asked_as_they_ran(way):
    model = build_any("qwen2_moe", dtype=torch.float32)
    set_experts(model, way)
    ids = example_ids_any(model, batch=2, length=12)
    units = ("expert", "component")
    plain = direct_logit_attribution(model, ids, A, B, unit="expert", pos=None)
    # As for heads, the products are then rounded to 16 bits, and the check says so.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = direct_logit_attribution(model, ids, A, B, unit=units, pos=None, check=False)
    experts, parts = found["expert"], found["component"]
    assert not torch.equal(experts.attribution, plain.attribution)
    rows = [i for i, row in enumerate(experts.rows) if row.layer == 2]
    size = float(parts.attribution.abs().max())
    whole = experts.attribution[rows].sum(0)
    torch.testing.assert_close(whole, parts["2_mlp_out"], rtol=0, atol=0.01 * size)


# The strongest rows only


@pytest.mark.parametrize("spec", ["mixtral", "qwen2_moe", "granitemoeshared", "llama4_text"])
def test_the_strongest_rows_are_those_of_the_dense_result(spec):
    model = build_any(spec)
    ids = example_ids_any(model, batch=2, length=6)
    dense = direct_logit_attribution(model, ids, A, B, unit="expert", pos=None)
    found = direct_logit_attribution(model, ids, A, B, unit=Experts(top=3), pos=None)
    assert [row.label for row in found.rows] == dense.labels[:-1]
    numbers = dense.attribution[:-1]
    order = numbers.abs().topk(3, 0).indices
    torch.testing.assert_close(found.attribution, numbers.gather(0, order))
    assert torch.equal(found.index, order)
    for name in ("weight", "vote"):
        torch.testing.assert_close(found.beside[name], dense.beside[name].gather(0, order))
    torch.testing.assert_close(found.rest, numbers.sum(0) - found.attribution.sum(0))
    torch.testing.assert_close(found.remainder, dense.attribution[-1])
    torch.testing.assert_close(found.mean_rows, numbers.flatten(1).mean(1))
    records = found.records()
    assert {"weight", "vote", "expert"} <= set(records[0])


def test_fewer_rows_than_asked_for_leave_empty_places():
    model = build_any("mixtral", num_hidden_layers=1)
    found = direct_logit_attribution(
        model, example_ids_any(model), A, unit=Experts(top=64), pos=None
    )
    assert found.attribution.shape[0] == 4
    whole = found.attribution.sum(0) + found.rest + found.remainder + found.bias
    torch.testing.assert_close(whole, found.logit)


def test_some_layers_leave_the_rest_in_the_remainder():
    model = build_any("mixtral")
    ids = example_ids_any(model)
    every = direct_logit_attribution(model, ids, A, unit="expert", pos=None)
    some = direct_logit_attribution(model, ids, A, unit=Experts(layers=[2, 0]), pos=None)
    assert some.labels == [label for label in every.labels if "L1" not in label]
    kept = [every.labels.index(label) for label in some.labels[:-1]]
    torch.testing.assert_close(some.attribution[:-1], every.attribution[kept])
    left = [i for i in range(len(every.labels)) if i not in kept]
    torch.testing.assert_close(some.attribution[-1], every.attribution[left].sum(0))
    one = direct_logit_attribution(model, ids, A, unit=Experts(layers=1))
    assert {row.layer for row in one.rows[:-1]} == {1}


# The model is a guest


def _state(model):
    kept = {path: dict(vars(module)) for path, module in model.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return {path: sorted(found) for path, found in kept.items()}, hooks, model.training


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_the_model_is_as_found_also_after_an_exception(way):
    model = build_any("mixtral", dtype=torch.float32)
    set_experts(model, way)
    ids = example_ids_any(model, batch=2, length=12)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    before, rng = _state(model), torch.get_rng_state()
    direct_logit_attribution(model, ids, A, unit="expert", pos=None)
    assert _state(model) == before

    def fails(*_):
        raise RuntimeError("on purpose")

    plan = dla_hooks.prepare(model, A, unit="expert")
    for module in (model.model.layers[2].mlp, model.model.layers[1].mlp.experts.act_fn):
        handle = module.register_forward_hook(fails)
        with pytest.raises(RuntimeError, match="on purpose"):
            plan(ids, pos=None)
        handle.remove()
    assert _state(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert model.config._experts_implementation == way


def test_two_threads_get_their_own_numbers():
    from concurrent.futures import ThreadPoolExecutor

    model = build_any("mixtral", dtype=torch.float32)
    set_experts(model, "grouped_mm")
    prompts = [example_ids_any(model, batch=1, length=20, seed=seed) for seed in range(4)]
    plan = dla_hooks.prepare(model, A, unit="expert")
    expected = [plan(ids, pos=None) for ids in prompts]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda ids: plan(ids, pos=None), prompts * 4))
    for number, result in enumerate(found):
        same(result, expected[number % 4])
    assert all("_apply_gate" not in vars(module) for module in model.modules())


# Hooks of the caller's


PLACES = ["mlp", "mlp.experts", "mlp.shared_expert", "mlp.gate", "mlp.shared_expert_gate"]


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("top", [None, 3])
def test_hooks_on_the_sublayer_are_told_from_its_experts(path, top):
    model = build_any("qwen2_moe", mlp_only_layers=[])
    ids = example_ids_any(model)
    module = model.model.layers[1].get_submodule(path)
    before = direct_logit_attribution(model, ids, A, B, unit=Experts(top=top), pos=None)

    def change(_, args, output):
        if isinstance(output, tuple):
            return (output[0], 2 * output[1], *output[2:])
        return 0.5 * output + 0.25

    handle = module.register_forward_hook(change)
    calls = []
    counted = module.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = direct_logit_attribution(model, ids, A, B, unit=Experts(top=top), pos=None)
        parts = direct_logit_attribution(model, ids, A, B, pos=None)
    finally:
        handle.remove()
        counted.remove()
    assert len(calls) == 2  # one for each call: the caller's hooks see no run that is not theirs
    assert not torch.allclose(found.logit, before.logit)
    if top is None:
        has_row = "L1hook" in found.labels
        assert has_row == (path in ("mlp", "mlp.experts"))
        rows = [i for i, row in enumerate(found.rows) if row.layer == 1]
        whole = found.attribution[rows].sum(0)
        torch.testing.assert_close(whole, parts["1_mlp_out"], rtol=0, atol=1e-8)


def test_a_hook_inside_of_the_experts_that_only_looks_fires_as_without_us():
    model = build_any("mixtral")
    ids = example_ids_any(model)
    seen = []
    act = model.model.layers[1].mlp.experts.act_fn
    act.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(ids, use_cache=False)
    plain = len(seen)
    plan = dla_hooks.prepare(model, A, unit="expert")
    seen.clear()
    plan(ids, pos=None)
    assert len(seen) == plain


@pytest.mark.filterwarnings("ignore")
def test_adapters_on_attention_beside_change_nothing_here():
    peft = pytest.importorskip("peft")
    model = build_any("mixtral", dtype=torch.float32)
    ids = example_ids_any(model)
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    found = direct_logit_attribution(adapted, ids, A, unit="expert", pos=None)
    merged = adapted.merge_and_unload()
    expected = direct_logit_attribution(merged, ids, A, unit="expert", pos=None)
    same(found, expected, 1e-4)


# What is refused


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {}, "has no experts"),
        ("jetmoe", {}, "no expert can be asked alone"),
        ("doge", NAMED.get(("doge", "experts"), {}), "no expert can be asked alone"),
        ("inkling_text", {}, "convolution over positions"),
    ],
)
def test_models_without_experts_to_tell_apart_are_refused_with_the_reason(kind, changes, reason):
    model = build_any(kind, **changes)
    with pytest.raises(UnsupportedModelError, match=reason):
        dla_hooks.prepare(model, A, unit="expert")


def test_older_transformers_are_refused_by_version(monkeypatch):
    model = copy.deepcopy(build_any("mixtral"))  # nothing is remembered of a copy
    # transformers may put another module in its place; this is the one that is asked.
    monkeypatch.setattr(expert_sites.transformers, "__version__", "4.57.1")
    with pytest.raises(UnsupportedModelError, match=r"transformers 4\.57\.1 .* install"):
        dla_hooks.prepare(model, A, unit="expert")


def test_experts_over_several_processes_are_refused():
    model = build_any("mixtral")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(UnsupportedModelError, match="spread over processes"):
        dla_hooks.prepare(model, A, unit="expert")


def test_a_layer_whose_experts_do_not_run_is_refused():
    model = build_any("gpt_oss")
    mlp = model.model.layers[1].mlp  # as a kernel does that replaces the whole layer
    mlp.forward = lambda x: (0.5 * x, None)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1: mlp.*kernels"):
        dla_hooks.prepare(model, A, unit="expert")


def test_more_than_linear_maps_behind_the_experts_is_refused():
    model = build_any("mixtral")
    model.model.layers[1].mlp.forward = bent(model.model.layers[1].mlp)
    with pytest.raises(UnsupportedModelError, match="more than linear maps"):
        dla_hooks.prepare(model, A, unit="expert")


def bent(mlp):
    own = mlp.forward
    return lambda x: own(x).tanh()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"top": 0}, "top"),
        ({"top": 2.5}, "top"),
        ({"top": True}, "top"),
        ({"layers": []}, "layers"),
        ({"layers": [-1]}, "layers"),
        ({"layers": ["one"]}, "layers"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        Experts(**options)


def test_a_layer_without_experts_is_refused_with_those_that_have_some():
    model = build_any("qwen3_moe", mlp_only_layers=[1])
    with pytest.raises(InputError, match=r"names 1, .* \[0, 2\]"):
        dla_hooks.prepare(model, A, unit=Experts(layers=[0, 1]))


def test_weights_of_llama4_are_one_since_its_scores_multiply_the_input():
    model = build_any("llama4_text")
    found = direct_logit_attribution(model, example_ids_any(model), A, unit="expert", pos=None)
    weights = found.beside["weight"][:-1]
    assert set(weights.unique().tolist()) == {0.0, 1.0}


def test_an_expert_that_a_position_goes_to_twice_is_one_row():
    rows = ExpertRows(4, None, torch.zeros(2, dtype=torch.float64))
    numbers = torch.tensor([[2, 0], [2, 1], [-1, 1]])
    weights = torch.tensor([[0.5, 1.0], [0.25, 0.5], [0.0, 0.25]], dtype=torch.float64)
    votes = torch.tensor([[4.0, 3.0], [4.0, 2.0], [0.0, 2.0]], dtype=torch.float64)
    total = rows.add(numbers, weights, votes)
    expected = torch.tensor([[0, 3.0], [0, 1.5], [3.0, 0], [0, 0]], dtype=torch.float64)
    assert torch.equal(rows.all[0], expected)
    assert torch.equal(total, expected.sum(0))


@pytest.mark.parametrize("spec", ["mixtral", "qwen2_moe", "laguna", "gemma4_text"])
def test_models_in_16_bits_are_near_their_numbers_in_32(spec):
    changes = NAMED.get((spec, "experts"), {})
    fine = build_any(spec, dtype=torch.float32, **changes)
    coarse = build_any(spec, dtype=torch.bfloat16, **changes)
    ids = example_ids_any(fine, batch=1, length=12)
    with torch.no_grad():  # the same weights, rounded
        for one, other in zip(fine.parameters(), coarse.parameters(), strict=True):
            one.copy_(other)
    expected = direct_logit_attribution(fine, ids, A, B, unit="expert", pos=None)
    found = direct_logit_attribution(coarse, ids, A, B, unit="expert", pos=None)
    assert found.labels == expected.labels
    both = (found.beside["weight"] != 0) == (expected.beside["weight"] != 0)
    same_route = both.all(0)  # near ties go either way
    assert same_route.float().mean() > 0.3
    size = float(expected.attribution.abs().max())
    ours, theirs = found.attribution[:, same_route], expected.attribution[:, same_route]
    assert float((ours - theirs).abs().mean()) < 0.03 * size
