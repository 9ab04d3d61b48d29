"""Models with quantised weights, for the tests that need some."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn
from zoo import build

# Widths in multiples of 32, which blocks of weights are quantised in.
WIDE = zoo._spec("llama-wide", zoo._sizes(64, 64, 128, 2, 4, 2), attention_bias=True)


def not_the_head(module, name):
    return isinstance(module, nn.Linear) and name != "lm_head"


def any_linear(module, name):
    return isinstance(module, nn.Linear)


def torchao_model(config, which=not_the_head, seed=0):
    quantization = pytest.importorskip("torchao.quantization")
    model = build(WIDE, seed, torch.float32)
    quantization.quantize_(model, getattr(quantization, config)(), filter_fn=which)
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    return model


def eight_bits(bnb, plain):
    made = bnb.Linear8bitLt(
        plain.in_features, plain.out_features, plain.bias is not None, has_fp16_weights=False
    )
    made.weight = bnb.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = plain.bias
    return made


def four_bits(bnb, plain, trainable=True):
    made = bnb.Linear4bit(plain.in_features, plain.out_features, plain.bias is not None)
    made.weight = bnb.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
    made.bias = plain.bias
    made.support_avx512bf16_for_cpu = made.support_avx512bf16_for_cpu and not trainable
    return made


def bitsandbytes_model(make, dtype=torch.float32):
    bnb = pytest.importorskip("bitsandbytes")
    model = build(WIDE, dtype=dtype)
    for name, module in list(model.named_modules()):
        if not_the_head(module, name):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(bnb.nn, module).to("cpu").eval())
    return model
