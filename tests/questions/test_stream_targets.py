"""Directions in the stream, and outputs of modules that read it, against the model's own."""

from __future__ import annotations

import pytest
import torch
from mapping_zoo import CannotBuild, build_any, example_ids_any
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo import ZOO, build, example_ids

import dla_hooks
from dla_hooks import DecompositionError, Direction, InputError, Output, UnsupportedModelError
from dla_hooks import direct_logit_attribution as attribute
from dla_hooks.modules.hooks import Place, Run
from dla_hooks.modules.runs import ended_at

UNITS = ("component", "layer", "head", "neuron")
FAMILIES = (
    *("gpt2", "llama", "gemma2", "granite", "gpt_neox-parallel", "gpt_neox-sequential"),
    *("cohere", "mixtral", "olmo2", "opt", "bloom", "qwen3_moe-mixed", "falcon-new"),
)
BLOCKS = {"gpt2": "transformer.h", "bloom": "transformer.h", "falcon-new": "transformer.h"}
BLOCKS |= {"gpt_neox-parallel": "gpt_neox.layers", "gpt_neox-sequential": "gpt_neox.layers"}
BLOCKS |= {"opt": "model.decoder.layers"}


def blocks_of(name: str, model: nn.Module) -> nn.ModuleList:
    return model.get_submodule(BLOCKS.get(name, "model.layers"))


def vector_for(model: nn.Module, seed: int = 0) -> torch.Tensor:
    width = model.get_input_embeddings().weight.shape[1]
    width = model.config.hidden_size or width
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, generator=generator, dtype=torch.float64)


def seen_at(
    module: nn.Module, model: nn.Module, ids: torch.Tensor, *, before: bool
) -> torch.Tensor:
    """What enters or leaves a module in a plain run."""
    kept = []

    def pre(_, args, kwargs):
        found = args[0] if args else kwargs["hidden_states"]
        kept.append(found.clone())

    def post(_, args, out):
        kept.append((out[0] if isinstance(out, tuple) else out).clone())

    add = module.register_forward_hook
    handle = module.register_forward_pre_hook(pre, with_kwargs=True) if before else add(post)
    with torch.no_grad():
        model(ids)
    handle.remove()
    return kept[0]


def assert_adds_up(result, value, atol=1e-9):
    assert torch.allclose(result.total() + result.bias, value, atol=atol)
    assert torch.allclose(result.logit, value, atol=atol)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_direction_before_a_block_is_the_streams_own_projection(name, seed):
    model, ids = build(name, seed=seed), example_ids(name, seed=seed)
    v = vector_for(model, seed)
    blocks = blocks_of(name, model)
    for layer in range(len(blocks)):
        x = seen_at(blocks[layer], model, ids, before=True)
        for unit in UNITS:
            try:
                result = attribute(model, ids, Direction(v, f"{layer}_pre"), unit=unit, pos=None)
            except UnsupportedModelError:
                assert unit in ("head", "neuron")
                continue
            assert_adds_up(result, x @ v)


def test_direction_matches_stored_writes_row_by_row():
    model, ids = build("llama"), example_ids("llama")
    v = vector_for(model)
    result = attribute(model, ids, Direction(v, "1_mid"), pos=None)
    layers = model.model.layers
    expected = {
        "embed": seen_at(layers[0], model, ids, before=True),
        "0_attn_out": seen_at(layers[0].self_attn, model, ids, before=False),
        "0_mlp_out": seen_at(layers[0].mlp, model, ids, before=False),
        "1_attn_out": seen_at(layers[1].self_attn, model, ids, before=False),
    }
    assert result.labels == list(expected)
    for row, x in zip(result.attribution, expected.values(), strict=True):
        assert torch.allclose(row, x @ v, atol=1e-9)


def test_gains_of_later_blocks_are_left_out():
    """Granite multiplies what it writes; a reading ahead of the end knows only the gains before."""
    model, ids = build("granite"), example_ids("granite")
    v = vector_for(model)
    x = seen_at(model.model.layers[1], model, ids, before=True)
    assert_adds_up(attribute(model, ids, Direction(v, "1_pre"), pos=None), x @ v)
    head = attribute(model, ids, Direction(v, "1_pre"), unit="head", pos=None)
    assert {label for label in head.labels if label.startswith("L")} == {
        f"L0H{h}" for h in range(model.config.num_attention_heads)
    }


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "cohere", "gpt_neox-sequential"])
def test_direction_through_the_norm_is_what_the_block_reads(name):
    model, ids = build(name), example_ids(name)
    v = vector_for(model)
    block = blocks_of(name, model)[1]
    norm = block.ln_1 if name == "gpt2" else block.input_layernorm
    y = seen_at(norm, model, ids, before=False)
    for unit in UNITS:
        result = attribute(model, ids, Direction(v, "1_pre", True), unit=unit, pos=None)
        assert_adds_up(result, y @ v, atol=1e-5)
    assert result.logit_gap < 1e-5


def test_direction_at_the_end_is_read_raw_or_through_the_final_norm():
    model, ids = build("gemma2"), example_ids("gemma2")
    v = vector_for(model)
    x = seen_at(model.model.norm, model, ids, before=True)
    y = seen_at(model.model.norm, model, ids, before=False)
    assert_adds_up(attribute(model, ids, Direction(v), pos=None), x @ v)
    assert_adds_up(attribute(model, ids, Direction(v, through_norm=True), pos=None), y @ v, 1e-5)
    row = attribute(model, ids, 7, pos=None)  # Gemma 2 has caps, but no bias and no logit scale
    W = model.get_output_embeddings().weight[7].double()
    read = attribute(model, ids, Direction(W.detach(), through_norm=True), pos=None)
    assert torch.allclose(read.attribution, row.attribution, atol=1e-5)


@pytest.mark.parametrize("spec", [spec for spec in ZOO if spec.name in FAMILIES], ids=repr)
def test_outputs_are_the_modules_own_or_refused(spec):
    model, ids = build(spec), example_ids(spec)
    block = blocks_of(spec.name, model)[-1]
    right, refused = [], []
    for path, module in model.named_modules():
        inside = any(one is module for one in block.modules())
        named = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if not inside or not (named or path.endswith("mlp.gate")):
            continue
        own = seen_at(module, model, ids, before=False).reshape(*ids.shape, -1)
        try:
            result = attribute(model, ids, Output(path, 1), pos=None)
        except UnsupportedModelError:
            refused.append(path.rpartition(".")[2])
            continue
        assert_adds_up(result, own[..., 1].double(), atol=1e-5)
        right.append(path.rpartition(".")[2])
    assert len(right) >= 2  # what reads the stream
    assert len(refused) >= 1  # what writes to it


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["gpt2", "cohere", "granite", "falcon_h1"])
def test_unembedding_s_channel_is_what_the_module_puts_out_ahead_of_any_scale(name, seed):
    made = (build, example_ids) if name != "falcon_h1" else (build_any, example_ids_any)
    model, ids = (make(name, seed=seed) for make in made)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    result = attribute(model, ids, Output("lm_head", -3), pos=None)
    torch.testing.assert_close(result.logit, seen[0][..., -3].double(), rtol=0, atol=1e-5)
    parts = result.attribution.sum(0) + result.bias
    torch.testing.assert_close(parts, result.logit, rtol=0, atol=1e-9)


@pytest.mark.parametrize("unit", ["head", "neuron", "source"])
def test_unit_without_rows_ahead_of_the_reading_is_refused_for_that_reason(unit):
    model, ids = build("gpt2"), example_ids("gpt2")
    with pytest.raises(UnsupportedModelError, match="as far as 0_pre, has no"):
        attribute(model, ids, Direction(vector_for(model), "0_pre"), unit=unit)
    if unit != "source":
        with pytest.raises(UnsupportedModelError, match="as far as 0_pre, has no"):
            dla_hooks.effects(model, ids, Direction(vector_for(model), "0_pre"), unit=unit)


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("beam", "mlp.up_proj"),  # blocks that multiply the stream on its way to the MLP
        ("doge", "mlp.up_proj"),
        ("gemma4_text", "mlp.up_proj"),
        ("gpt_neox_japanese", "mlp.dense_h_to_4h"),  # its last block adds a constant
    ],
)
def test_gains_and_constants_inside_of_the_block_are_counted(model_type, path):
    model = build_any(model_type)
    ids = example_ids_any(model)
    full = next(p for p in reversed([p for p, _ in model.named_modules()]) if p.endswith(path))
    own = seen_at(model.get_submodule(full), model, ids, before=False)[..., 1].double()
    result = attribute(model, ids, Output(full, 1), pos=None)
    assert_adds_up(result, own, atol=1e-5 * float(result.attribution.abs().max()))


class _Dictionary:
    """A dictionary of as many features as the stream is wide."""

    def encode(self, x):
        return x.relu()

    def decode(self, f):
        return f * 0.5 + 1


@pytest.mark.parametrize("at", ["1_pre", "1_mid"])
def test_features_ahead_of_the_reading_add_up_and_those_behind_are_refused(at):
    model, ids = build("llama"), example_ids("llama")
    v = vector_for(model)

    def ask(place):
        unit = dla_hooks.Features({place: _Dictionary()}, top=None)
        return attribute(model, ids, Direction(v, at), unit=unit, pos=None)

    x = seen_at(model.model.layers[0].mlp, model, ids, before=False)
    found = ask("0_mlp_out")
    assert torch.allclose(found["L0F3"].nan_to_num(), x[..., 3].relu() * 0.5 * v[3], atol=1e-9)
    assert torch.allclose(found.total() + found.bias, found.logit)
    for place in ("final_post", "1_mlp_out", "2_pre"):
        with pytest.raises(InputError, match=f"{place}.* is not ahead of {at}"):
            ask(place)


def test_router_logit_is_split_by_who_wrote_it():
    model, ids = build("mixtral"), example_ids("mixtral")
    gate = model.model.layers[1].mlp.gate
    own = seen_at(gate, model, ids, before=False).reshape(*ids.shape, -1)
    result = attribute(model, ids, Output("model.layers.1.mlp.gate", 2), unit="expert", pos=None)
    assert_adds_up(result, own[..., 2].double(), atol=1e-5)
    assert all(label.startswith("L0") for label in result.labels if label.startswith("L"))


def test_score_of_a_classifier_is_the_labels_own():
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    result = attribute(model, ids, Output("score", 2))
    with torch.no_grad():
        assert torch.allclose(result.logit, model(ids).logits[:, 2], atol=1e-6)
    assert torch.equal(result.attribution, attribute(model, ids, 2).attribution)


@pytest.mark.parametrize(("at", "runs"), [("0_pre", 0), ("1_pre", 1), ("1_mid", 2)])
def test_blocks_behind_the_reading_do_not_run(at, runs):
    model, ids = build("llama"), example_ids("llama")
    plan = dla_hooks.prepare(model, Direction(vector_for(model), at))
    plan(ids)
    fired = []
    handles = [
        block.register_forward_hook(lambda *_, n=number: fired.append(n))
        for number, block in enumerate(model.model.layers)
    ]
    handles.append(model.lm_head.register_forward_hook(lambda *_: fired.append("lm_head")))
    plan(ids)  # made anew for the hooks: made-up runs pass these by
    for handle in handles:
        handle.remove()
    assert fired == list(range(runs))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    result = attribute(model, ids, 5)
    assert abs(float(result.gap)) < 1e-9  # the model is as it was


@pytest.mark.parametrize("through", [False, True])
def test_hooks_behind_the_last_stream_do_not_fire(through):
    model, ids = build("llama"), example_ids("llama")
    fired = []
    model.lm_head.register_forward_hook(lambda *_: fired.append("lm_head"))
    if not through:
        model.model.norm.register_forward_hook(lambda *_: fired.append("norm"))
    result = attribute(model, ids, Direction(vector_for(model), through_norm=through), pos=None)
    assert fired == []
    assert torch.allclose(result.total() + result.bias, result.logit)


def test_models_whose_weights_are_brought_run_whole():
    accelerate = pytest.importorskip("accelerate")
    model, ids = build("llama"), example_ids("llama")
    v = vector_for(model)
    own = attribute(model, ids, Direction(v, "1_pre"))
    accelerate.cpu_offload(model, torch.device("cpu"))
    fired = []
    model.lm_head.register_forward_hook(lambda *_: fired.append("lm_head"))
    again = attribute(model, ids, Direction(v, "1_pre"))
    assert torch.allclose(own.attribution, again.attribution, atol=1e-9)
    assert "lm_head" in fired


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_weights_behind_the_reading_are_not_computed():
    model, ids = build("llama"), example_ids("llama")
    gate, calls = model.model.layers[2].mlp.gate_proj, []
    nn.utils.parametrize.register_parametrization(gate, "weight", Doubled())

    def halve_in_place(module, args):  # under autograd it fails
        calls.append(module)
        args[0].mul_(0.5)

    gate.parametrizations.weight[0].register_forward_pre_hook(halve_in_place)
    before = gate.parametrizations.weight.original.clone()
    attribute(model.eval(), ids, Direction(vector_for(model), at="1_mid"))
    assert calls == []
    assert torch.equal(gate.parametrizations.weight.original, before)


def test_hooks_ahead_of_the_reading_are_rows_and_those_behind_do_not_count():
    model, ids = build("llama"), example_ids("llama")
    v = vector_for(model)
    steer = torch.randn(model.config.hidden_size, dtype=torch.float64)
    layers = model.model.layers
    plain = attribute(model, ids, Direction(v, "1_pre"), pos=None)
    handles = [
        layers[0].mlp.register_forward_hook(lambda m, a, out: out * 0),
        layers[0].register_forward_hook(lambda m, a, out: out + steer),
        layers[1].register_forward_pre_hook(lambda m, a: (a[0] - 2 * steer, *a[1:])),
        layers[1].register_forward_hook(lambda m, a, out: out + 100 * steer),
    ]
    result = attribute(model, ids, Direction(v, "1_pre"), pos=None)
    for handle in handles:
        handle.remove()
    assert result.labels == [*plain.labels, "0_hook", "final_hook"]
    rows = dict(zip(result.labels, result.attribution, strict=True))
    assert torch.allclose(rows["0_hook"], (steer @ v).expand(ids.shape))
    assert torch.allclose(rows["final_hook"], (-2 * steer @ v).expand(ids.shape))
    assert not rows["0_mlp_out"].any()
    assert torch.allclose(result.total() + result.bias, result.logit)


def test_hook_between_the_stream_and_the_module_is_refused():
    model, ids = build("llama"), example_ids("llama")
    q_proj = model.model.layers[1].self_attn.q_proj
    q_proj.register_forward_pre_hook(lambda m, a: (a[0] * 1.5,))
    with pytest.raises(DecompositionError, match="q_proj"):
        attribute(model, ids, Output("model.layers.1.self_attn.q_proj", 0))


def test_hook_on_the_modules_output_is_not_its_own_number():
    model, ids = build("llama"), example_ids("llama")
    path = "model.layers.1.self_attn.q_proj"
    own = attribute(model, ids, Output(path, 0))
    model.get_submodule(path).register_forward_hook(lambda m, a, out: out + 3)
    assert torch.allclose(attribute(model, ids, Output(path, 0)).logit, own.logit, atol=1e-9)


def test_chunks_and_padding_give_the_same_numbers():
    model = build("gpt2")
    v = vector_for(model)
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    result = attribute(model, rows, Direction(v, "1_mid", True), unit="head", pos=(1, None))
    for number, row in enumerate(rows):
        alone = attribute(model, row, Direction(v, "1_mid", True), unit="head", pos=(1, None))
        n = len(row) - 1
        assert torch.allclose(result.attribution[:, number, -n:], alone.attribution[:, 0])
    ids = example_ids("gpt2")
    whole = attribute(model, ids, Direction(v, "1_mid"), pos=None)
    pieces = attribute(model, ids, Direction(v, "1_mid"), pos=None, chunk_size=3)
    assert torch.allclose(whole.attribution, pieces.attribution, atol=1e-9)


def test_float32_and_bfloat16_add_up():
    for dtype in (torch.float32, torch.bfloat16):
        model, ids = build("llama").to(dtype), example_ids("llama")
        v = vector_for(model)
        for at in ("1_pre", "1_mid"):
            result = attribute(model, ids, Direction(v, at, True), unit="head", pos=None)
            assert torch.allclose(result.total() + result.bias, result.logit, atol=1e-4)


@pytest.mark.parametrize(("how", "error"), [
    (lambda: Direction([1.0, float("nan")]), "NaN"),
    (lambda: Direction([[1.0]]), "one axis"),
    (lambda: Direction(["a"]), "numbers"),
    (lambda: Direction([1.0], at=3), "label"),
    (lambda: Output(3, 1), "path"),
    (lambda: Output("a", "b"), "int"),
])  # fmt: skip
def test_what_is_no_target_is_refused_at_once(how, error):
    with pytest.raises(InputError, match=error):
        how()


@pytest.mark.parametrize(("target", "error"), [
    (lambda v: Direction(v[:-1]), "wide"),
    (lambda v: Direction(v, "9_pre"), "no place"),
    (lambda v: Direction(v, "0_attn_out"), "no place"),
    (lambda v: Output("model.layers.0.mlp.nope", 0), "no module"),
    (lambda v: Output("model.layers.0.mlp.gate_proj", 10**6), "channel"),
    (lambda v: Output("lm_head", 10**6), "channel"),
])  # fmt: skip
def test_what_the_model_lacks_is_refused_before_it_runs(target, error):
    model, ids = build("llama"), example_ids("llama")
    fired = []
    attribute(model, ids, 5)
    model.register_forward_hook(lambda *_: fired.append(1))
    with pytest.raises(InputError, match=error):
        attribute(model, ids, target(vector_for(model)))
    assert not fired


def test_parallel_blocks_have_no_middle():
    model, ids = build("gpt_neox-parallel"), example_ids("gpt_neox-parallel")
    with pytest.raises(InputError, match="parallel"):
        attribute(model, ids, Direction(vector_for(model), "1_mid"))


def test_blocks_without_a_norm_have_none_to_read_through():
    model, ids = build("olmo2"), example_ids("olmo2")
    with pytest.raises(UnsupportedModelError, match="through_norm"):
        attribute(model, ids, Direction(vector_for(model), "1_pre", through_norm=True))


def test_modules_outside_of_the_blocks_and_shared_ones_are_refused():
    model, ids = build("llama"), example_ids("llama")
    with pytest.raises(UnsupportedModelError, match="in no block"):
        attribute(model, ids, Output("model.embed_tokens", 0))
    with pytest.raises(UnsupportedModelError, match="linear"):
        attribute(model, ids, Output("model.layers.0.input_layernorm", 0))


def test_incorrect_tokens_do_not_go_with_a_direction():
    model, ids = build("llama"), example_ids("llama")
    with pytest.raises(InputError, match="incorrect_tokens"):
        attribute(model, ids, Direction(vector_for(model)), 3)


def test_result_says_what_was_read(tmp_path):
    model, ids = build("llama"), example_ids("llama")
    result = attribute(model, ids, Direction(vector_for(model), "1_pre"))
    assert str(result).startswith("Direction([")  # no token, and so not in quotes
    assert "the mean value" in str(result)
    assert "to the stream's own number" in str(result)
    assert "1_pre" in result.answer[0]
    result.save(tmp_path / "r.safetensors")
    again = dla_hooks.load(tmp_path / "r.safetensors")
    assert again.answer == result.answer
    assert torch.equal(again.attribution, result.attribution)


def test_many_prompts_and_summaries_take_directions():
    model = build("llama")
    target = Direction(vector_for(model), "1_pre")
    prompts = [[5, 6, 7], [8, 9, 10, 11], [3, 4]]
    found = list(dla_hooks.attribute_many(model, prompts, target))
    for prompt, result in zip(prompts, found, strict=True):
        alone = attribute(model, prompt, target)
        assert torch.allclose(result.attribution, alone.attribution, atol=1e-9)
    assert dla_hooks.summarize(found).labels == found[0].labels


def test_many_prompts_with_another_direction_are_another_sweep(tmp_path):
    model = build("gpt2")
    prompts = [[5, 6, 7], [8, 9, 10]]
    one, other = Direction(vector_for(model), "1_pre"), Direction(vector_for(model, 1), "1_pre")
    first = list(dla_hooks.attribute_many(model, prompts, one, resume=tmp_path / "a"))
    again = list(dla_hooks.attribute_many(model, prompts, one, resume=tmp_path / "a"))
    assert torch.equal(first[1].attribution, again[1].attribution)
    with pytest.raises(InputError):
        list(dla_hooks.attribute_many(model, prompts, other, resume=tmp_path / "a"))
    with pytest.raises(InputError, match="incorrect_tokens"):
        list(dla_hooks.attribute_many(model, prompts, one, 5))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_type_reads_a_direction_where_its_last_block_begins(model_type):
    try:
        model = build_any(model_type)
    except CannotBuild as error:
        pytest.skip(str(error))
    ids = example_ids_any(model)
    try:
        labels = attribute(model, ids, 3, unit="layer").labels
    except dla_hooks.UnsupportedModelError as error:
        pytest.skip(f"refused: {error!s:.60}")
    last = [label for label in labels if label.endswith("_pre")][-1]
    v = vector_of(model)
    stack, names = dla_hooks.accumulated_resid(model, ids, return_labels=True)
    x = stack[names.index(last)].double()
    result = attribute(model, ids, Direction(v, last), pos=None)
    size = 1e-5 * float(x.norm(dim=-1).max() * v.norm())
    assert torch.allclose(result.logit.double(), x @ v, atol=size, rtol=0)
    assert torch.allclose((result.total() + result.bias).double(), x @ v, atol=size, rtol=0)


def vector_of(model: nn.Module) -> torch.Tensor:
    """A direction as wide as the stream, which the model itself shows."""
    stack = dla_hooks.accumulated_resid(model, example_ids_any(model), layer=1)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(stack.shape[-1], generator=generator, dtype=torch.float64)


def test_one_end_is_not_taken_for_another():
    module = nn.Linear(2, 2)
    place, outer, inner = Place(module, "it", before=True), Run(), Run()
    with ended_at(place, outer):
        with ended_at(place.ahead, inner):
            module(torch.zeros(1, 2))
        assert inner.ended
        with ended_at(Place(nn.Linear(2, 2), "another", before=True), Run()):
            module(torch.zeros(1, 2))
        raise AssertionError("the outer one ends the pass")
    assert outer.ended
