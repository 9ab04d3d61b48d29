"""The whole mapping of causal language models: right, or refused with the reason, never wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from mapping_zoo import MODEL_TYPES, VARIANTS, CannotBuild, build_any, example_ids_any
from survey import ABSENT, REFUSED, RIGHT, survey_type
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dla_hooks import UnsupportedModelError, direct_logit_attribution, verify
from dla_hooks.residual import registry

ROOT = Path(__file__).parents[2]
# The survey needs weights or packages for these that are not there.
NOT_BUILT = {"gemma3n", "gemma4_assistant", "gemma4_unified_assistant"}


def is_refused(model_type: str) -> bool:
    return registry.refusal_for(model_type, "causal") is not None


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)], ids="seed{}".format)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_model_type_is_exact_or_refused(model_type, seed):
    found = survey_type(model_type, seed)
    if model_type in NOT_BUILT:
        assert found.verdict == ABSENT
    elif is_refused(model_type):
        assert found.verdict == REFUSED, found
        assert len(found.reason) > 40
    else:
        assert found.verdict == RIGHT, found
        assert found.gap < 1e-9 or model_type in SUMS_IN_FLOAT32
        assert {"component", "layer"} <= set(found.units)


# These add up in float32 whatever the model's dtype, or run in float32 only.
SUMS_IN_FLOAT32 = {"falcon_mamba", "mamba", "mamba2", "xglm", "zaya"}
# No attention, none with a direct path to the stream, or none that is split by one projection.
WITHOUT_HEADS = {
    "falcon_mamba", "inkling_text", "jetmoe", "mamba", "mamba2", "rwkv", "xlstm", "zamba", "zamba2",
}  # fmt: skip


@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - NOT_BUILT))
def test_heads_exist_for_every_attention_write(model_type):
    found = survey_type(model_type)
    if found.verdict == RIGHT:
        assert ("head" in found.units) == (model_type not in WITHOUT_HEADS)


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - NOT_BUILT))
def test_attention_implementations_agree(model_type, attn):
    found = survey_type(model_type, attn=attn)
    if found.verdict != ABSENT:  # not every type has both
        assert found.verdict == (REFUSED if is_refused(model_type) else RIGHT), found


@pytest.mark.parametrize(("model_type", "name", "changes"), VARIANTS, ids=lambda v: str(v)[:24])
def test_config_switches_are_exact(model_type, name, changes):
    found = survey_type(model_type, **changes)
    assert found.verdict in (RIGHT, REFUSED), found
    if found.verdict == REFUSED:
        assert is_refused(model_type) or (model_type, name) in REFUSED_VARIANTS, found


# Blocks that norm their own sum, or take the residual after the norm.
REFUSED_VARIANTS = {
    ("bloom", "residual-after-norm"),
    ("opt", "post-norm"),
    ("opt", "post-norm-projected"),
}


@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - NOT_BUILT))
def test_blocks_verify_one_by_one(model_type):
    """Each block's own writes make up its change of the stream, not only the total."""
    if is_refused(model_type):
        with pytest.raises(UnsupportedModelError):
            verify(build_any(model_type), show=False)
        return
    report = verify(build_any(model_type), show=False)
    assert report.ok, report
    assert report.largest_gap < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - NOT_BUILT))
def test_verify_agrees_in_every_dtype(model_type, dtype):
    try:
        model = build_any(model_type, dtype=dtype)
        ids = example_ids_any(model)
        with torch.no_grad():
            finite = bool(model(ids, use_cache=False).logits.isfinite().all())
    except (CannotBuild, RuntimeError):
        return  # a kernel that this dtype does not have
    if not finite:
        return
    if is_refused(model_type):
        with pytest.raises(UnsupportedModelError):
            verify(model, show=False)
        return
    assert verify(model, show=False).ok
    direct_logit_attribution(model, ids, 5, 7, pos=None)


def test_declared_types_exist_in_transformers():
    known = set(CONFIG_MAPPING) | {"emu3_text_model", "mllama_text_model"}
    known |= {"HookedTransformer", "TransformerBridge"}  # of TransformerLens
    declared = {name for a in registry.architectures() for name in a.model_types}
    assert declared <= known
    with pytest.raises(ValueError, match="made_up"):
        AutoConfig.for_model("made_up")  # or the set above could hold anything


@pytest.mark.parametrize("path", sorted((ROOT / "adapters").glob("*.py")), ids=lambda p: p.stem)
def test_declarations_are_plain_data(path):
    """No arithmetic, no conditions and no functions in an adapter."""
    if path.stem != "__init__":
        code = re.sub(r'""".*?"""|"[^"]*"|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
        assert not re.search(r"\b(if|for|def|lambda|while|class)\b", code)


def test_library_names_no_architecture():
    names = {name for a in registry.architectures() for name in a.model_types}
    for path in (ROOT / "dla_hooks").rglob("*.py"):
        strings = set(re.findall(r'"([A-Za-z0-9_-]+)"', path.read_text()))
        # A command, the classes that backends are for, and a kind of layer of TransformerLens.
        known = {"git", "HookedTransformer", "TransformerBridge"}
        known |= {"mamba"} if path.stem == "transformer_bridge" else set()
        assert not strings & (names - known), path
