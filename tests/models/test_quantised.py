"""Modules without a plain weight: quantised (torchao, bitsandbytes), parametrized, or patched."""

from __future__ import annotations

import copy

import pytest
import torch
from quantised import (
    WIDE,
    any_linear,
    bitsandbytes_model,
    eight_bits,
    four_bits,
    not_the_head,
    torchao_model,
)
from torch import nn
from units import UNIT_NAMES
from zoo import build, example_ids

import dla_hooks
from dla_hooks import (
    NonFiniteError,
    UnsupportedModelError,
    direct_logit_attribution,
    verify,
    wrap,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the quantising libraries

CONVENTIONS = {"center_unembed": True, "fold_value_biases": True}


def dequantised(model):
    """The same model with plain weights: what each module does to the rows of an identity."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "in_features") and not list(module.children()):
            parent, _, child = name.rpartition(".")
            plain = nn.Linear(module.in_features, module.out_features, bias=True)
            with torch.no_grad():
                plain.bias.copy_(module(torch.zeros(1, module.in_features))[0])
                plain.weight.copy_((module(torch.eye(module.in_features)) - plain.bias).T)
            setattr(model.get_submodule(parent), child, plain)
    return model.eval()


def own_logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def check_against_dequantised(model, ids):
    plain = dequantised(model)
    torch.testing.assert_close(own_logits(model, ids), own_logits(plain, ids), rtol=1e-4, atol=1e-4)
    for unit in UNIT_NAMES:
        found = direct_logit_attribution(model, ids, 5, unit=unit, pos=None, **CONVENTIONS)
        expected = direct_logit_attribution(plain, ids, 5, unit=unit, pos=None, **CONVENTIONS)
        torch.testing.assert_close(found.attribution, expected.attribution, rtol=1e-4, atol=1e-4)
    per_position = direct_logit_attribution(model, ids[:, :-1], ids[:, 1:], unit="head", pos=None)
    expected = direct_logit_attribution(plain, ids[:, :-1], ids[:, 1:], unit="head", pos=None)
    torch.testing.assert_close(per_position.attribution, expected.attribution, rtol=1e-4, atol=1e-4)


# torchao: an nn.Linear whose weight is a tensor of another kind.


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig"])
@pytest.mark.parametrize("which", [not_the_head, any_linear])
def test_weights_in_8_bits_match_dequantised(config, which, seed):
    model, ids = torchao_model(config, which, seed), example_ids(WIDE, seed=seed)
    plain = own_logits(build(WIDE, seed, torch.float32), ids)
    assert (own_logits(model, ids) - plain).abs().max() > 1e-3, "nothing was quantised"
    check_against_dequantised(model, ids)
    assert verify(model, show=False).ok


@pytest.mark.parametrize(
    "config", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"]
)
def test_activations_in_8_bits_have_components_but_no_heads(config):
    model, ids = torchao_model(config), example_ids(WIDE)
    logits = own_logits(model, ids)[..., 5]
    for unit in ("component", "layer"):
        result = direct_logit_attribution(model, ids, 5, unit=unit, pos=None)
        total = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
        torch.testing.assert_close(total + result.bias, logits, rtol=1e-4, atol=1e-5)
    for check in (True, False):
        with pytest.raises(UnsupportedModelError, match=r"not linear.*leave out unit="):
            direct_logit_attribution(model, ids, 5, unit="head", check=check)
    report = verify(model, show=False)
    assert report.ok
    assert [line.ok for line in report.lines].count(None) == 2  # the heads of each layer
    assert "?    model.layers.0.self_attn.o_proj" in str(report)
    assert "model.layers.0.self_attn.o_proj (Linear with its" in str(report)


def test_unembedding_that_quantises_its_input_is_refused():
    model = torchao_model("Int8DynamicActivationInt8WeightConfig", any_linear)
    with pytest.raises(UnsupportedModelError, match=r"the unembedding .*not linear.*leave it out"):
        direct_logit_attribution(model, example_ids(WIDE), 5)


def test_damaged_scales_are_named():
    model = torchao_model("Int8WeightOnlyConfig")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.scale.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        direct_logit_attribution(model, example_ids(WIDE), 5)


def test_model_quantised_on_loading_is_exact(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    build(WIDE, dtype=torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()),
        attn_implementation="eager",
    ).eval()
    assert type(model.model.layers[0].self_attn.o_proj.weight) is not nn.Parameter
    check_against_dequantised(model, example_ids(WIDE))


def test_adapter_on_quantised_weights_is_exact():
    peft = pytest.importorskip("peft")
    model = torchao_model("Int8WeightOnlyConfig")
    config = peft.LoraConfig(r=2, target_modules=["o_proj", "down_proj"])
    model, ids = peft.get_peft_model(model, config), example_ids(WIDE)
    before = own_logits(model.eval(), ids)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    logits = own_logits(model, ids)
    assert (logits - before).abs().max() > 0.1
    for unit in UNIT_NAMES:
        result = direct_logit_attribution(model, ids, 5, unit=unit, pos=None)
        torch.testing.assert_close(result.logit, logits[..., 5], rtol=1e-4, atol=1e-5)


# bitsandbytes: modules of its own, which keep integers.


def test_weights_in_4_bits_match_dequantised():
    model, ids = bitsandbytes_model(four_bits), example_ids(WIDE)
    check_against_dequantised(model, ids)
    assert wrap(model).W_O.dtype == torch.float32
    found = dla_hooks.stack_neuron_results(model, ids)
    expected = dla_hooks.stack_neuron_results(dequantised(model), ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make", [eight_bits, lambda bnb, plain: four_bits(bnb, plain, trainable=False)], ids=["8", "4"]
)
def test_kernels_without_backward_have_components_but_no_heads(make):
    """LLM.int8 quantises activations; the packed kernel of some CPUs has no backward pass."""
    model, ids = bitsandbytes_model(make), example_ids(WIDE)
    logits = own_logits(model, ids)[:, -1, 5]
    result = direct_logit_attribution(model, ids, 5)
    torch.testing.assert_close(result.logit, logits, rtol=1e-4, atol=1e-5)
    packs = getattr(model.model.layers[0].self_attn.o_proj, "support_avx512bf16_for_cpu", True)
    if not packs:
        pytest.skip("this CPU does not pack weights of four bits")
    with pytest.raises(
        UnsupportedModelError, match=r"(not linear|no usable backward).*leave out unit="
    ):
        direct_logit_attribution(model, ids, 5, unit="head")


# Without any library.


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("the fused kernel is for inference only")


class OtherBackward(NoBackward):
    @staticmethod
    def backward(ctx, grad):
        return torch.zeros(*grad.shape[:-1], 40, dtype=grad.dtype), None


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            NoBackward,
            r"no usable backward.*NotImplementedError: the fused kernel is for inference only",
        ),
        (OtherBackward, "backward pass that is not that of its forward pass"),
    ],
    ids=["none", "another"],
)
def test_kernel_error_is_quoted_in_refusal(function, said):
    class Fused(nn.Linear):
        def forward(self, x):
            return function.apply(x, self.weight)

    model, ids = build("llama"), example_ids("llama")
    expected = direct_logit_attribution(model, ids, 5)
    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = Fused
    found = direct_logit_attribution(model, ids, 5)
    torch.testing.assert_close(found.attribution, expected.attribution)
    with pytest.raises(UnsupportedModelError, match=f"Fused.*{said}.*leave out unit="):
        direct_logit_attribution(model, ids, 5, unit="head")
    model.lm_head.__class__ = Fused
    with pytest.raises(UnsupportedModelError, match=f"the unembedding .*Fused.*{said}"):
        direct_logit_attribution(model, ids, 5)


def weight_norm(module):
    nn.utils.weight_norm(module)
    module.weight_g.data *= 2  # what it makes of this is there when it has run


def parametrization(module):
    nn.utils.parametrizations.weight_norm(module)
    module.parametrizations.weight.original0.data *= 2


def own_forward(module):
    weight, bias = module.weight, module.bias
    module.forward = lambda x: nn.functional.linear(x, 2 * weight, bias)


@pytest.mark.parametrize("double", [weight_norm, parametrization, own_forward])
def test_parametrized_weights_and_replaced_forwards_are_exact(double):
    model, plain, ids = build("llama-bias"), build("llama-bias"), example_ids("llama-bias")
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        double(layer.self_attn.o_proj)
        other.self_attn.o_proj.weight.data *= 2
    model.eval()
    for unit in UNIT_NAMES:
        found = direct_logit_attribution(model, ids, 5, unit=unit, **CONVENTIONS)
        expected = direct_logit_attribution(plain, ids, 5, unit=unit, **CONVENTIONS)
        torch.testing.assert_close(found.attribution, expected.attribution, rtol=1e-9, atol=1e-9)
