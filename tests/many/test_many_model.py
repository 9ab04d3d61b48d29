"""Stored results belong to one model: whatever changes its numbers is refused, nothing else is."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from many_prompts import made, random_prompts
from quantised import bitsandbytes_model, eight_bits, four_bits, torchao_model
from torch import nn
from zoo import build

from dla_hooks import InputError, UnsupportedModelError, attribute_many, direct_logit_attribution

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and the quantising libraries

PROMPTS = random_prompts((3, 4))


def run(model, folder):
    return list(attribute_many(model, PROMPTS, 5, resume=folder))


def assert_refused(model, folder, said="weights was"):
    with pytest.raises(InputError, match=said):
        attribute_many(model, PROMPTS, 5, resume=folder)


def permute_heads(inner):
    attention = inner.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(attention, name).weight
        weight.copy_(weight.reshape(2, -1, weight.shape[1]).flip(0).reshape(weight.shape))


def swap_rows(table):
    table[[3, 4]] = table[[4, 3]]


REORDERED = {
    "rows": lambda inner: inner.layers[1].mlp.up_proj.weight.copy_(
        inner.layers[1].mlp.up_proj.weight.flip(0)
    ),
    "two embeddings": lambda inner: swap_rows(inner.embed_tokens.weight),
    "heads": permute_heads,
    "signs": lambda inner: inner.layers[0].mlp.up_proj.weight[:2].neg_(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", REORDERED)
def test_fingerprint_changes_when_entries_swap(tmp_path, how, dtype):
    options = {"check": False, "resume": tmp_path}
    list(attribute_many(build("llama", dtype=dtype), PROMPTS, 5, **options))
    model = build("llama", dtype=dtype)
    with torch.no_grad():
        REORDERED[how](model.model)
    with pytest.raises(InputError, match="weights was"):
        attribute_many(model, PROMPTS, 5, **options)


def test_fingerprint_changes_when_large_pieces_swap(tmp_path):
    """Weights are summed 2**14 entries at a time."""

    def large(order):
        model = made("gpt2")
        pieces = torch.randn(3, 2**20, generator=torch.Generator().manual_seed(0))
        model.transformer.h[0].register_buffer("table", pieces[order].clone())
        return model

    run(large([0, 1, 2]), tmp_path)
    assert_refused(large([1, 0, 2]), tmp_path)
    assert len(run(large([0, 1, 2]), tmp_path)) == 2


def test_fingerprint_ignores_layout_and_threads(tmp_path):
    run(made("llama"), tmp_path)
    model = made("llama")
    projection = model.model.layers[0].mlp.up_proj
    projection.weight = nn.Parameter(projection.weight.detach().T.contiguous().T)
    assert not projection.weight.is_contiguous()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert len(run(model, tmp_path)) == 2
    finally:
        torch.set_num_threads(threads)


def test_fingerprint_of_offloaded_weights_is_the_same(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    run(made("llama"), tmp_path / "run")
    for offload in (
        lambda model: accelerate.cpu_offload(model, torch.device("cpu")),
        lambda model: accelerate.disk_offload(model, str(tmp_path / "disk"), torch.device("cpu")),
    ):
        model = made("llama")
        offload(model)
        assert next(model.parameters()).is_meta
        assert len(run(model, tmp_path / "run")) == 2


def adapted(alpha=2, seed=0):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "o_proj"])
    model = peft.get_peft_model(build("llama", seed), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def lora_layer(model):
    return model.base_model.model.model.layers[0].self_attn.o_proj


def add_another(model):
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    model.eval()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: lora_layer(model).set_scale("default", 3.0), "adapters was"),
        (lambda model: lora_layer(model).enable_adapters(False), "adapters was"),
        (lambda model: setattr(model.peft_config["default"], "lora_alpha", 5), "adapters was"),
        (lambda model: lora_layer(model).lora_A["default"].weight.data.mul_(2), "weights was"),
        (add_another, "model was"),
    ],
    ids=["scale", "one off", "config", "weight", "another"],
)
def test_fingerprint_includes_adapter_settings(tmp_path, change, said):
    run(adapted(), tmp_path)
    assert_refused(adapted(alpha=4), tmp_path, "adapters was")
    model = adapted()
    change(model)
    assert_refused(model, tmp_path, said)
    model = adapted()
    model.peft_config["default"].inference_mode = True
    model.peft_config["default"].base_model_name_or_path = "elsewhere"
    assert len(run(model, tmp_path)) == 2


def test_fingerprint_includes_scales_of_4_bit_codes(tmp_path):
    def doubled(bnb, plain):
        plain.weight.data *= 2
        return four_bits(bnb, plain)

    model, other = bitsandbytes_model(four_bits), bitsandbytes_model(doubled)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(model.get_submodule(name).weight, other.get_submodule(name).weight)
    run(model, tmp_path)
    assert_refused(other, tmp_path)
    assert len(run(bitsandbytes_model(four_bits), tmp_path)) == 2
    assert len(run(model, tmp_path)) == 2


def test_fingerprint_includes_scales_of_8_bit_codes(tmp_path):
    def doubled(bnb, plain):
        plain.weight.data *= 2
        return eight_bits(bnb, plain)

    model = bitsandbytes_model(eight_bits)
    run(model, tmp_path)
    assert_refused(bitsandbytes_model(doubled), tmp_path)
    assert len(run(model, tmp_path)) == 2  # its scales have moved by now
    assert len(run(bitsandbytes_model(eight_bits), tmp_path)) == 2


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig"])
@pytest.mark.parametrize("part", ["qdata", "scale"])
def test_fingerprint_includes_wrapped_tensors(tmp_path, config, part):
    run(torchao_model(config), tmp_path)
    assert len(run(torchao_model(config), tmp_path)) == 2
    model = torchao_model(config)
    codes = getattr(model.model.layers[1].mlp.down_proj.weight, part)
    codes.copy_(codes.flip(0))
    assert_refused(model, tmp_path)


ELSEWHERE = """
import sys, warnings
warnings.simplefilter("ignore")
import peft, torch
from transformers import AutoModelForCausalLM
from test_many_model import run
from quantised import torchao_model
def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
models = {
    "plain": load("plain"),
    "adapted": peft.PeftModel.from_pretrained(load("base"), "adapter").eval(),
    "torchao": torchao_model("Int8WeightOnlyConfig"),
}
for name, model in models.items():
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    print(name, len(run(model, name + "-results")), len(ran))
"""


@pytest.mark.slow
def test_fingerprint_is_the_same_in_another_process(tmp_path):
    pytest.importorskip("torchao")
    plain, adapter = build("llama"), adapted()
    models = {"plain": plain, "adapted": adapter, "torchao": torchao_model("Int8WeightOnlyConfig")}
    for name, model in models.items():
        run(model, tmp_path / f"{name}-results")
    plain.save_pretrained(tmp_path / "plain")
    build("llama").save_pretrained(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "adapter")
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {folders!r}\n{ELSEWHERE}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split("\n")
    assert [line for line in found if line] == ["plain 2 0", "adapted 2 0", "torchao 2 0"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_model_without_an_attention_mask_runs_prompts_of_one_length_together(name, seed):
    model = build(name, seed=seed)
    kind, rows = type(model), []

    class WithoutMask(kind):
        def forward(self, input_ids):
            rows.append(tuple(input_ids.shape))
            return kind.forward(self, input_ids)

    model.__class__ = WithoutMask
    prompts = [[4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14], [15, 16, 17]]
    direct_logit_attribution(model, prompts[0], 5)
    rows.clear()
    found = list(attribute_many(model, prompts, 5, 7, unit="head"))
    assert {(2, 4), (2, 3)} <= set(rows)
    for ids, result in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = kind.forward(model, torch.tensor([ids])).logits[0, -1]
        total = result.attribution.sum(0) + result.bias
        torch.testing.assert_close(total.squeeze(), logits[5] - logits[7], rtol=0, atol=1e-6)
    with pytest.raises(UnsupportedModelError, match="no attention mask"):
        direct_logit_attribution(
            model, torch.tensor([[4, 5], [6, 7]]), 5, attention_mask=torch.tensor([[1, 1], [0, 1]])
        )


@pytest.mark.parametrize("seed", [0, 1])
def test_hooks_see_each_prompt_without_padding(seed):
    """A hook that names a position from the left means another token in a padded row."""
    model = build("gpt2", seed)
    prompts = [torch.arange(1, 4), torch.arange(5, 11), torch.arange(2, 5)]
    column = torch.linspace(-1, 1, model.config.n_embd)

    def steer(module, args, output):
        output[:, 1] += column.to(output)

    handle = model.transformer.h[0].mlp.register_forward_hook(steer)
    try:
        alone = [direct_logit_attribution(model, ids[None], 5, 7) for ids in prompts]
        together = list(attribute_many(model, prompts, 5, 7))
    finally:
        handle.remove()
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other.attribution, one.attribution)
