"""PEFT's wrapped models as they are: the numbers of the merged model (extra ``peft``)."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from mapping_zoo import build_any, example_ids_any
from units import UNIT_NAMES
from zoo import build, example_ids, tiny_tokenizer

import dla_hooks
from dla_hooks import (
    TrainingModeError,
    UnsupportedModelError,
    direct_logit_attribution,
    verify,
    wrap,
)

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.lowest,
    pytest.mark.filterwarnings("ignore"),  # PEFT's own
]

CONVENTIONS = {"center_unembed": True, "fold_value_biases": True}
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora(*targets, **options):
    return peft.LoraConfig(r=2, target_modules=list(targets), **options)


def ia3(*targets, feedforward):
    return peft.IA3Config(target_modules=list(targets), feedforward_modules=feedforward)


def adapted(spec, config, *, dtype=torch.float64, seed=0):
    return filled(peft.get_peft_model(build(spec, seed, dtype), config), seed).eval()


@torch.no_grad()
def filled(model, seed=0):
    """The adapters' own weights drawn anew: as they come they change nothing."""
    generator = torch.Generator().manual_seed(seed)
    own = ("lora_", "ia3_", "modules_to_save", "trainable_tokens_delta")
    for name, parameter in model.named_parameters():
        if any(part in name for part in own):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            kept = 0 if "lora_" in name or "tokens" in name else parameter
            parameter.copy_(kept + 0.3 * noise)
    return model


def merged(model):
    return copy.deepcopy(model).merge_and_unload().eval()


def own_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


CASES = {
    "gpt2 Conv1D": ("gpt2", lora("c_attn", "c_proj", "c_fc", fan_in_fan_out=True)),
    "llama all-linear": ("llama-bias", peft.LoraConfig(r=2, target_modules="all-linear")),
    "llama for a task": ("llama", lora(*LLAMA, task_type="CAUSAL_LM")),
    "llama DoRA": ("llama-bias", lora(*LLAMA, use_dora=True)),
    "llama rsLoRA, head": ("llama", lora("o_proj", "lm_head", use_rslora=True)),
    "llama embedding": ("llama", lora("embed_tokens", "o_proj", "lm_head")),
    "llama IA3": ("llama", ia3("v_proj", "o_proj", "down_proj", feedforward=["down_proj"])),
    "gemma2": ("gemma2", lora(*LLAMA)),
    "gemma2 norms saved": (
        "gemma2",
        lora("o_proj", modules_to_save=["norm", "post_attention_layernorm"]),
    ),
    "gpt_neox": ("gpt_neox-parallel", lora("query_key_value", "dense", "dense_4h_to_h")),
    "gpt_neox head saved": ("gpt_neox-parallel", lora("dense", modules_to_save=["embed_out"])),
    "mixtral": ("mixtral", lora("q_proj", "v_proj", "o_proj")),
    "llama saved_attention": ("llama", lora("up_proj", modules_to_save=["self_attn"])),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {**CONVENTIONS, "pos": None}], ids=["raw", "folded"])
def test_adapted_model_matches_merged_model(case, options):
    spec, config = CASES[case]
    model = adapted(spec, copy.deepcopy(config))
    plain, ids = merged(model), example_ids(spec)
    base = own_logits(build(spec), ids)
    assert (own_logits(model, ids) - base).abs().max() > 0.1, "the adapter does nothing"
    for unit in UNIT_NAMES:
        found = direct_logit_attribution(model, ids, 5, unit=unit, **options)
        expected = direct_logit_attribution(plain, ids, 5, unit=unit, **options)
        torch.testing.assert_close(found.attribution, expected.attribution, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.bias, expected.bias, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.logit, expected.logit, rtol=1e-9, atol=1e-9)
        assert found.labels == expected.labels
    assert verify(model, show=False).ok


@pytest.mark.parametrize("seed", [0, 1])
def test_adapted_float32_model_with_targets_per_position_is_exact(seed):
    model = adapted("llama-bias", lora(*LLAMA, "lm_head"), dtype=torch.float32, seed=seed)
    plain, ids = merged(model), example_ids("llama-bias", seed=seed)
    for unit in UNIT_NAMES:
        found = direct_logit_attribution(model, ids[:, :-1], ids[:, 1:], unit=unit, pos=None)
        expected = direct_logit_attribution(plain, ids[:, :-1], ids[:, 1:], unit=unit, pos=None)
        torch.testing.assert_close(found.attribution, expected.attribution, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config", [lora("wte"), lora("c_proj", modules_to_save=["lm_head"])], ids=str
)
def test_tied_embeddings_with_one_adapted_are_exact(config):
    """Merging would change both; the model as it stands has them apart."""
    config = copy.deepcopy(config)
    config.fan_in_fan_out = config.target_modules != {"wte"}
    model, ids = adapted("gpt2", config), example_ids("gpt2")
    logits = own_logits(model, ids)
    for unit in UNIT_NAMES:
        result = direct_logit_attribution(model, ids, 5, unit=unit, pos=None, **CONVENTIONS)
        centred = (logits - logits.mean(-1, keepdim=True))[..., 5]
        torch.testing.assert_close(result.logit, centred, rtol=1e-5, atol=1e-5)
    assert not wrap(model).cfg.tie_word_embeddings


def test_trained_tokens_in_tied_embeddings_are_exact():
    config = lora("o_proj", trainable_token_indices=[5, 9])
    model = adapted("llama-mha-tied", config)
    plain, ids = merged(model), example_ids("llama-mha-tied")
    for unit in UNIT_NAMES:
        found = direct_logit_attribution(model, ids, 5, unit=unit, **CONVENTIONS)
        expected = direct_logit_attribution(plain, ids, 5, unit=unit, **CONVENTIONS)
        torch.testing.assert_close(found.attribution, expected.attribution, rtol=1e-9, atol=1e-9)


def several():
    model = adapted("llama", lora("o_proj", "lm_head", modules_to_save=["norm"]))
    model.add_adapter("other", lora("v_proj", "down_proj"))
    return filled(model, 3).eval()


@pytest.mark.skipif(
    peft.__version__.startswith("0.18."),
    reason="peft 0.18 cannot merge a module to save that the active adapter lacks",
)
@pytest.mark.parametrize("check", [True, False])
def test_active_adapter_is_used(check):
    model, ids = several(), example_ids("llama")
    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        alone = copy.deepcopy(model)
        alone.delete_adapter("other" if adapter == "default" else "default")
        expected = direct_logit_attribution(merged(alone), ids, 5, unit="head")
        found = direct_logit_attribution(model, ids, 5, unit="head", check=check)
        torch.testing.assert_close(found.attribution, expected.attribution, rtol=1e-9, atol=1e-9)
        assert found.model == f"LlamaForCausalLM (llama) with adapter {adapter}"


def test_two_active_adapters_are_exact():
    model, ids = several(), example_ids("llama")
    model.base_model.set_adapter(["default", "other"])
    logits = own_logits(model, ids)[:, -1]
    result = direct_logit_attribution(model, ids, 5, 7, unit="head")
    torch.testing.assert_close(result.logit, logits[:, 5] - logits[:, 7], rtol=1e-5, atol=1e-5)
    assert result.model == "LlamaForCausalLM (llama) with adapters default, other"


def test_disabled_and_merged_adapters_are_exact():
    model, ids = adapted("llama-bias", lora(*LLAMA, "lm_head")), example_ids("llama-bias")
    on = direct_logit_attribution(model, ids, 5, unit="head", **CONVENTIONS)
    with model.disable_adapter():
        off = direct_logit_attribution(model, ids, 5, unit="head", **CONVENTIONS)
    base = direct_logit_attribution(build("llama-bias"), ids, 5, unit="head", **CONVENTIONS)
    torch.testing.assert_close(off.attribution, base.attribution, rtol=1e-9, atol=1e-9)
    assert off.model == "LlamaForCausalLM (llama) with no adapter"
    model.merge_adapter()
    inside = direct_logit_attribution(model, ids, 5, unit="head", **CONVENTIONS)
    torch.testing.assert_close(inside.attribution, on.attribution, rtol=1e-9, atol=1e-9)
    model.unmerge_adapter()
    again = direct_logit_attribution(model, ids, 5, unit="head", **CONVENTIONS)
    torch.testing.assert_close(again.attribution, on.attribution, rtol=1e-9, atol=1e-9)


def test_measurements_are_repeated_for_another_adapter():
    """Blocks that each adapter has a copy of, with a bare parameter that no module puts out."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    class Steered(LlamaDecoderLayer):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) + self.bare

    base = build("llama")
    block = base.model.layers[1]
    block.__class__ = Steered
    block.bare = torch.nn.Parameter(torch.ones(40, dtype=torch.float64))
    config = lora("o_proj", layers_to_transform=[0], modules_to_save=["layers.1"])
    model = filled(peft.get_peft_model(base, config)).eval()
    model.add_adapter("other", copy.deepcopy(config))
    filled(model, 3).eval()
    ids = example_ids("llama")
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        logits = own_logits(model, ids)[:, -1, 5]
        result = direct_logit_attribution(model, ids, 5, check=False)
        assert "1_constant" in result.labels
        total = result.attribution.sum(0) + result.bias
        torch.testing.assert_close(total, logits, rtol=1e-5, atol=1e-5)


def test_adapters_loaded_into_a_plain_model_are_exact(tmp_path):
    model, ids = adapted("llama", lora("o_proj", "down_proj", "lm_head")), example_ids("llama")
    expected = direct_logit_attribution(model, ids, 5, unit="head")
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    injected = build("llama")
    injected.load_adapter(str(tmp_path))
    injected.eval()
    for other in (loaded, injected):
        found = direct_logit_attribution(other, ids, 5, unit="head")
        torch.testing.assert_close(found.attribution, expected.attribution, rtol=1e-9, atol=1e-9)
    mixed = peft.get_peft_model(build("llama"), lora("o_proj"), mixed=True)
    filled(mixed).eval()
    logits = own_logits(mixed, ids)[:, -1, 5]
    result = direct_logit_attribution(mixed, ids, 5, unit="head")
    torch.testing.assert_close(result.logit, logits, rtol=1e-5, atol=1e-5)


def test_adapted_offloaded_model_is_exact():
    accelerate = pytest.importorskip("accelerate")
    config = lora("o_proj", "down_proj", "lm_head", modules_to_save=["norm"])
    model, ids = adapted("llama", config, dtype=torch.float32), example_ids("llama")
    here = [
        direct_logit_attribution(model, ids, 5, unit=unit, **CONVENTIONS) for unit in UNIT_NAMES
    ]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    for unit, expected in zip(UNIT_NAMES, here, strict=True):
        found = direct_logit_attribution(model, ids, 5, unit=unit, **CONVENTIONS)
        torch.testing.assert_close(found.attribution, expected.attribution)


def state(model):
    return (
        {name: (p.clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()},
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        torch.get_rng_state(),
    )


@pytest.mark.parametrize(
    "around",
    [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad],
    ids=["inference mode", "autocast", "grad"],
)
def test_caller_modes_change_no_number_and_are_restored(around):
    config = lora(*LLAMA, "lm_head")
    model = adapted("llama-bias", config, dtype=torch.float32)
    ids = example_ids("llama-bias")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    weights, modules, rng = state(model)
    outside = direct_logit_attribution(model, ids, 5, 7, unit="head")
    face = wrap(model)
    W_U, W_O = face.W_U, face.W_O
    with around():
        inside = direct_logit_attribution(model, ids, 5, 7, unit="head", check=False)
        torch.testing.assert_close(face.W_U, W_U)
        torch.testing.assert_close(face.W_O, W_O)
        coarse = torch.is_autocast_enabled("cpu")  # the model's own activations then are in 16 bits
    torch.testing.assert_close(inside.bias, outside.bias)
    tolerance = {"rtol": 0.1, "atol": 0.3} if coarse else {}
    torch.testing.assert_close(inside.attribution, outside.attribution, **tolerance)
    after, modules_after, rng_after = state(model)
    assert modules_after == modules
    assert torch.equal(rng_after, rng)
    for name, (value, requires_grad, grad) in after.items():
        assert torch.equal(value, weights[name][0]), name
        assert requires_grad == weights[name][1], name
        assert grad is None, name


def test_wrapped_adapted_model_is_exact():
    config = lora("o_proj", "embed_tokens", modules_to_save=["lm_head", "norm"])
    model = adapted("llama", config)
    plain, tokenizer = merged(model), tiny_tokenizer()
    face, expected = wrap(model, tokenizer), wrap(plain, tokenizer)
    for name in ("W_U", "b_U", "W_E", "W_O", "b_O"):
        torch.testing.assert_close(getattr(face, name), getattr(expected, name))
    torch.testing.assert_close(face("John went to the"), expected("John went to the"))
    own, theirs = ({**vars(w.cfg)} for w in (face, expected))
    assert own == theirs
    found = dla_hooks.stack_neuron_results(model, example_ids("llama"))
    other = dla_hooks.stack_neuron_results(plain, example_ids("llama"))
    torch.testing.assert_close(found, other)


VIRTUAL = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
}


@pytest.mark.parametrize("method", VIRTUAL)
def test_virtual_tokens_are_refused(method):
    model = peft.get_peft_model(build("llama", dtype=torch.float32), VIRTUAL[method]()).eval()
    ids = example_ids("llama")
    for unit in UNIT_NAMES:
        with pytest.raises(UnsupportedModelError, match=r"'default'.*virtual tokens.*disable"):
            direct_logit_attribution(model, ids, 5, unit=unit)
    with model.disable_adapter():
        found = direct_logit_attribution(model, ids, 5, unit="head")
    expected = direct_logit_attribution(build("llama", dtype=torch.float32), ids, 5, unit="head")
    assert torch.equal(found.attribution, expected.attribution)


def test_adapters_that_vary_by_position_are_refused(tmp_path):
    ids = example_ids("llama")
    activated = adapted(
        "llama", lora("o_proj", alora_invocation_tokens=[5, 7], task_type="CAUSAL_LM")
    )
    with pytest.raises(UnsupportedModelError, match=r"activated LoRA.*positions"):
        direct_logit_attribution(activated, ids, 5)
    adapted("llama", lora("o_proj", task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    base = build("llama", dtype=torch.float32)
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=40, xlora_depth=1, adapters={"0": str(tmp_path)}
    )
    mixing = peft.get_peft_model(base, config).eval()
    with pytest.raises(UnsupportedModelError, match=r"X-LoRA"):
        direct_logit_attribution(mixing, ids, 5)
    config = peft.PolyConfig(
        task_type="CAUSAL_LM", target_modules=["o_proj"], r=2, n_tasks=2, n_skills=2
    )
    by_task = peft.get_peft_model(build("llama", dtype=torch.float32), config).eval()
    with pytest.raises(UnsupportedModelError, match=r"task id"):
        direct_logit_attribution(by_task, ids, 5)


def test_disabled_saved_block_is_exact():
    """Its wrapper is the only one to know; no other module changes, and no weight does."""
    pytest.importorskip("transformers.models.gemma4")  # its blocks have a gain, which is asked
    config = lora("q_proj", modules_to_save=["layers.0"])
    model = peft.get_peft_model(build_any("gemma4_text"), config).eval()
    ids = example_ids_any(model)
    wrapper = model.base_model.model.model.layers[0]
    with torch.no_grad():
        wrapper.modules_to_save["default"].layer_scalar.mul_(2.5)
    direct_logit_attribution(model, ids, 5)
    wrapper.enable_adapters(False)
    expected = direct_logit_attribution(build_any("gemma4_text"), ids, 5).attribution
    found = direct_logit_attribution(model, ids, 5, check=False).attribution
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_an_adapter_left_in_training_mode_is_refused():
    model = adapted("llama", lora("o_proj", lora_dropout=0.1))
    model.train()
    with pytest.raises(TrainingModeError, match="eval"):
        direct_logit_attribution(model, example_ids("llama"), 5)


def test_peft_is_not_imported_for_other_models():
    """transformers may import it where it is installed; this library does not."""
    code = """
import builtins, zoo
original = builtins.__import__
def guarded(name, globals=None, *rest):
    importer = (globals or {}).get("__name__", "")
    optional = name.split(".")[0] in ("peft", "torchao", "bitsandbytes")
    assert not (optional and importer.startswith("dla_hooks")), (importer, name)
    return original(name, globals, *rest)
builtins.__import__ = guarded
import dla_hooks
model = zoo.build("gpt2")
dla_hooks.direct_logit_attribution(model, zoo.example_ids("gpt2"), 5, unit="head")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="tests/helpers")
