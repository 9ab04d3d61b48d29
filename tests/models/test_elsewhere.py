"""A type's decoder that stands elsewhere, and types with a second declaration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mapping_zoo import _prepare, _randomise_buffers, _shaped_any, tiny_config
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from units import UNIT_NAMES
from zoo import _randomise, build

import dla_hooks
from dla_hooks import Architecture, Heads, UnsupportedModelError, Write, direct_logit_attribution
from dla_hooks.residual import registry

IDS = torch.randint(5, 40, (2, 7), generator=torch.Generator().manual_seed(0))
TYPES = (
    "llama4", "qwen3_5", "qwen3_5_moe", "glm4v", "glm46v", "glm_ocr", "smolvlm", "idefics2",
    "idefics3", "lfm2_vl", "minicpmv4_6",
)  # fmt: skip
BIG = "kosmos-2.5"  # its vision tower has fixed sizes


def _vision_language(model_type: str) -> Any:
    """A tiny model that takes images, for text alone."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    config = tiny_config(model_type)
    if model_type.startswith("glm"):
        text = config.text_config
        rope = dict(text.rope_parameters)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        n = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
        text.rope_parameters = {**rope, "mrope_section": [n - 2 * (n // 3), n // 3, n // 3]}
    kind = AutoModelForImageTextToText._model_mapping[type(config)]
    _prepare(config, torch.float64)
    with torch.random.fork_rng(devices=[]):
        model = kind._from_config(config, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    _randomise(model, generator, _shaped_any)
    _randomise_buffers(model, generator)
    return model


@pytest.mark.parametrize("model_type", [*TYPES, pytest.param(BIG, marks=pytest.mark.slow)])
def test_decoder_of_a_vision_language_class_is_found(model_type):
    try:
        model = _vision_language(model_type)
        with torch.no_grad():
            expected = model(input_ids=IDS).logits[:, -1, 7]
    except (AttributeError, KeyError, TypeError) as error:  # transformers 4 lacks some of it
        pytest.skip(f"cannot be built: {error}")
    for unit in UNIT_NAMES:
        result = direct_logit_attribution(model, IDS, 7, unit=unit)
        whole = result.attribution[-1] if unit == "layer" else result.attribution.sum(0)
        torch.testing.assert_close(whole + result.bias, expected, rtol=1e-5, atol=1e-5)


WRITES = (
    Write("attn_out", "self_attn", heads=Heads("self_attn.o_proj")),
    Write("mlp_out", "mlp"),
)


@pytest.fixture
def register():
    registry.architectures()
    kept = dict(registry._registered), dict(registry._earlier)
    yield dla_hooks.register
    for now, before in zip((registry._registered, registry._earlier), kept, strict=True):
        now.clear()
        now.update(before)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_second_declaration_is_tried_first(register, family):
    named = (Write("mixing_out", "self_attn"), WRITES[1])
    register(Architecture((family,), "model.layers", "model.norm", named))
    labels = direct_logit_attribution(build(family), IDS, 7).labels
    assert labels[:3] == ["embed", "0_mixing_out", "0_mlp_out"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("layers", "norm", "writes"),
    [
        ("model.stack", "model.norm", WRITES),  # no such module
        ("model.layers", "model.norm", WRITES[:1]),  # no sum
    ],
)
def test_second_declaration_that_is_not_true_leaves_the_first(
    register, family, layers, norm, writes
):
    before = direct_logit_attribution(build(family), IDS, 7)
    register(Architecture((family,), layers, norm, writes))
    after = direct_logit_attribution(build(family), IDS, 7)
    assert after.labels == before.labels
    torch.testing.assert_close(after.attribution, before.attribution)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_declared_type_that_fits_nowhere_is_refused_by_its_declaration(family):
    model = build(family)
    blocks = model.model if family == "llama" else model.transformer
    name = "layers" if family == "llama" else "h"
    blocks.stack = getattr(blocks, name)
    delattr(blocks, name)
    with pytest.raises(UnsupportedModelError, match="does not fit the declaration"):
        direct_logit_attribution(model, IDS, 7)
