"""Every row of ``docs/differences.md``: what the reference does there, and what is done here."""

from __future__ import annotations

import pytest
import torch
from tl_models import has_hooked, hooked, ids_for
from zoo import build, example_ids, tiny_tokenizer

from dla_hooks import (
    DecompositionError,
    InputError,
    TokenError,
    TrainingModeError,
    UnsupportedModelError,
    decompose_resid,
    direct_logit_attribution,
    stack_head_results,
)

pytest.importorskip("transformer_lens")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.tl]
OLD = has_hooked()  # TransformerLens 3


def reference(*args, **kwargs):
    from transformer_lens.tools.analysis import direct_logit_attribution as theirs

    return theirs(*args, **kwargs)


def unfaithful_bridge(model, folder):
    """A bridge without the check that it says what the raw model says."""
    from copy import deepcopy

    from tl_models import booted

    bridge = booted(deepcopy(model), folder)
    bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge.eval()


def miss(result, model, ids, bias=0.0):
    """How far parts and bias are from the last logit of token 5, over the logits' spread."""
    with torch.no_grad():
        out = model(ids)
    logits = (out if isinstance(out, torch.Tensor) else out.logits)[:, -1]
    total = result.attribution.sum(0) + bias
    return float((total - logits[:, 5]).abs().max() / (logits.max() - logits.min()))


def test_offloaded_weights_give_the_numbers_in_memory(tmp_path):
    pytest.importorskip("accelerate")
    from tl_models import _quietly
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    here, ids = build("llama", dtype=torch.float32), example_ids("llama")
    here.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, device_map={"": "disk"}, offload_folder=tmp_path / "files"
    ).eval()

    def bridged():
        bridge = TransformerBridge.boot_transformers(str(tmp_path), hf_model=away, device="cpu")
        bridge.enable_compatibility_mode(disable_warnings=True)

    with _quietly(), pytest.raises((ValueError, RuntimeError), match="disk"):
        bridged()
    expected = direct_logit_attribution(here, ids, 5, 7, unit="head").attribution
    found = direct_logit_attribution(away, ids, 5, 7, unit="head").attribution
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_heads_pass_through_post_norm(name, tmp_path):
    model, ids = build(name, dtype=torch.float32), example_ids(name)
    bridge = unfaithful_bridge(model, tmp_path)
    theirs = reference(bridge, ids, 5, 7, unit="head")
    for ours in (
        direct_logit_attribution(bridge, ids, 5, 7, unit="head"),
        direct_logit_attribution(model, ids, 5, 7, unit="head", fold_value_biases=True),
    ):
        assert ours.labels == theirs.labels
        difference = (ours.attribution - theirs.attribution).abs().max()
        assert difference > 0.05 * ours.attribution.abs().max()
        # Ours make up what attention wrote.
        parts = direct_logit_attribution(bridge, ids, 5, 7)
        wrote = sum(
            row for label, row in zip(parts.labels, parts.attribution, strict=True)
            if label.endswith("attn_out")
        )  # fmt: skip
        torch.testing.assert_close(ours.attribution[:-1].sum(0), wrote, rtol=1e-3, atol=1e-3)


def test_granite_multipliers_and_scale_are_exact(tmp_path):
    model, ids = build("granite", dtype=torch.float32), example_ids("granite")
    bridge = unfaithful_bridge(model, tmp_path)
    theirs = reference(bridge, ids, 5)
    assert miss(theirs, bridge, ids, bridge.b_U[5].item()) > 0.01
    ours = direct_logit_attribution(model, ids, 5)
    assert miss(ours, model, ids, ours.bias) < 1e-4
    with pytest.raises(UnsupportedModelError, match="Hugging Face model itself"):
        direct_logit_attribution(bridge, ids, 5)


def test_sinks_with_folded_value_biases_are_refused(tmp_path):
    model, ids = build("gpt_oss", dtype=torch.float32), example_ids("gpt_oss")
    bridge = unfaithful_bridge(model, tmp_path)
    with torch.no_grad():
        changed = bridge(ids).log_softmax(-1) - model(ids).logits.log_softmax(-1)
    assert changed.abs().max() > 1e-3
    ours = direct_logit_attribution(model, ids, 5, unit="head")
    assert miss(ours, model, ids, ours.bias) < 1e-4
    with pytest.raises(UnsupportedModelError, match="sinks"):
        direct_logit_attribution(model, ids, 5, unit="head", fold_value_biases=True)


def test_post_norms_are_exact(tmp_path):
    model, ids = build("olmo2", dtype=torch.float32), example_ids("olmo2")
    bridge = unfaithful_bridge(model, tmp_path)
    if OLD:
        assert miss(reference(bridge, ids, 5), bridge, ids, bridge.b_U[5].item()) > 0.01
    else:
        with pytest.raises(ValueError, match="norm"):
            reference(bridge, ids, 5)
    with pytest.raises(InputError, match="Hugging Face model itself"):
        direct_logit_attribution(bridge, ids, 5)
    ours = direct_logit_attribution(model, ids, 5, unit="head")
    assert miss(ours, model, ids, ours.bias) < 1e-4


def test_a_cap_is_no_part(tmp_path):
    model, ids = build("gemma2", dtype=torch.float32), example_ids("gemma2")
    bridge = unfaithful_bridge(model, tmp_path)
    theirs = reference(bridge, ids, 5)
    for given in (model, bridge):
        ours = direct_logit_attribution(given, ids, 5)
        assert ours.softcap == pytest.approx(5.0)
        capped = ours.softcap * torch.tanh(ours.logit / ours.softcap)
        with torch.no_grad():
            out = given(ids)
        logits = (out if isinstance(out, torch.Tensor) else out.logits)[:, -1, 5]
        torch.testing.assert_close(capped, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.attribution, theirs.attribution, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not OLD, reason="HookedTransformer was removed in 4.0")
def test_unfolded_hooked_transformer_is_exact(tmp_path):
    model, ids = build("gpt2", dtype=torch.float32), example_ids("gpt2")
    raw = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    unfolded = hooked(model, tmp_path, **dict.fromkeys(raw, False))
    theirs = reference(unfolded, ids, 5)
    assert miss(theirs, unfolded, ids, unfolded.b_U[5].item()) > 0.01
    for unit in ("component", "head"):
        ours = direct_logit_attribution(unfolded, ids, 5, unit=unit)
        assert miss(ours, unfolded, ids, ours.bias) < 1e-4


def test_ragged_rows_are_read_at_their_last_tokens(references):
    bridge = references.bridged("gpt2")
    texts = ["Paris is the city of", "Berlin of"]
    ours = direct_logit_attribution(bridge, texts, 5).attribution[:, 1]
    alone = reference(bridge, texts[1], 5).attribution[:, 0]
    theirs = reference(bridge, texts, 5).attribution[:, 1]
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)
    assert bridge.tokenizer.padding_side == "left" or not torch.allclose(theirs, alone, atol=1e-3)


def test_parallel_blocks_have_layers_without_mid(references):
    bridge = references.bridged("gpt_neox-parallel")
    ids = ids_for(references.raw("gpt_neox-parallel"))
    with pytest.raises(KeyError):
        reference(bridge, ids, 5, unit="layer")
    labels = direct_logit_attribution(bridge, ids, 5, unit="layer").labels
    assert labels == [*(f"{layer}_pre" for layer in range(bridge.cfg.n_layers)), "final_post"]


def test_negative_ids_and_lists_differ(references):
    bridge, ids = references.bridged("gpt2"), ids_for(references.raw("gpt2"))
    last = bridge.cfg.d_vocab - 1
    negative = reference(bridge, ids, -1).attribution
    torch.testing.assert_close(negative, reference(bridge, ids, last).attribution)
    with pytest.raises(TokenError, match="-1"):
        direct_logit_attribution(bridge, ids, -1)
    with pytest.raises(ValueError, match="token"):
        reference(bridge, ids, [5, 9])
    listed = direct_logit_attribution(bridge, ids, [5, 9]).attribution
    tensor = direct_logit_attribution(bridge, ids, torch.tensor([5, 9])).attribution
    assert torch.equal(listed, tensor)


def test_prompts_that_are_too_long_are_refused(references):
    bridge = references.bridged("gpt2")
    text = "Paris " * (bridge.cfg.n_ctx + 9)
    assert bridge.to_tokens(text).shape[1] <= bridge.cfg.n_ctx
    with pytest.raises(InputError, match=str(bridge.cfg.n_ctx)):
        direct_logit_attribution(bridge, text, 5)


def test_answers_per_row_broadcast_over_positions(references):
    bridge, ids = references.bridged("gpt2"), ids_for(references.raw("gpt2"), batch=2, length=2)
    answer = torch.tensor([5, 9])
    ours = direct_logit_attribution(bridge, ids, answer, pos=None).attribution
    theirs = reference(bridge, ids, answer, pos=None).attribution
    assert torch.allclose(ours, theirs, atol=1e-4) != OLD
    per_row = direct_logit_attribution(bridge, ids, answer[:, None], pos=None).attribution
    assert torch.equal(ours, per_row)


def test_caches_are_not_written_to(references):
    bridge, ids = references.bridged("gpt2"), ids_for(references.raw("gpt2"))
    _, cache = bridge.run_with_cache(ids, names_filter=lambda n: "hook_result" not in n)
    names = set(cache.cache_dict)
    direct_logit_attribution(bridge, answer_tokens=5, unit="head", cache=cache)
    assert set(cache.cache_dict) == names
    reference(bridge, answer_tokens=5, unit="head", cache=cache)
    assert set(cache.cache_dict) != names


def test_training_mode_is_refused(references):
    bridge, ids = references.bridged("gpt2", seed=3), ids_for(references.raw("gpt2", seed=3))
    bridge.train()
    with pytest.raises(TrainingModeError):
        direct_logit_attribution(bridge, ids, 5)
    if OLD:
        reference(bridge, ids, 5)
    else:
        with pytest.raises(ValueError, match="evaluation"):
            reference(bridge, ids, 5)


def test_cache_of_bridge_in_training_mode_differs(references):
    bridge, ids = references.bridged("gpt2", seed=4), ids_for(references.raw("gpt2", seed=4))
    _, cache = bridge.run_with_cache(ids)
    bridge.train()
    with pytest.raises(TrainingModeError):
        direct_logit_attribution(bridge, answer_tokens=5, cache=cache)
    assert reference(bridge, answer_tokens=5, cache=cache).labels


def test_remainder_before_first_block_differs(references):
    bridge, ids = references.bridged("gpt2"), ids_for(references.raw("gpt2"))
    _, cache = bridge.run_with_cache(ids)
    theirs = cache.stack_head_results(layer=0, incl_remainder=True)
    ours = stack_head_results(bridge, ids, layer=0, incl_remainder=True)
    last = f"blocks.{bridge.cfg.n_layers - 1}.hook_resid_post"
    torch.testing.assert_close(theirs[0], cache[last])
    torch.testing.assert_close(ours[0], cache["blocks.0.hook_resid_pre"])


@pytest.mark.parametrize(("name", "layer"), [("gpt2", None), ("gpt_neox-parallel", 1)])
def test_mlp_input_without_mlp_is_refused(references, name, layer):
    bridge, ids = references.bridged(name), ids_for(references.raw(name))
    _, cache = bridge.run_with_cache(ids)
    with pytest.raises(InputError, match="MLP"):
        decompose_resid(bridge, ids, layer=layer, mlp_input=True)
    if layer is None:
        with pytest.raises(KeyError):
            cache.decompose_resid(mlp_input=True)
    else:
        sums = cache.decompose_resid(layer=layer, mlp_input=True).sum(0)
        assert not torch.allclose(sums, cache[f"blocks.{layer}.hook_resid_pre"], atol=1e-3)


def test_hooks_that_change_the_stream_are_followed(references):
    bridge, ids = references.bridged("gpt2"), ids_for(references.raw("gpt2"))

    def halve(value, hook):
        return value * 0.5

    def steer(value, hook):
        return value + 3.0 * torch.arange(value.shape[-1]).to(value)

    for name in ("hook_mlp_out", "hook_attn_out", "attn.hook_z"):
        with bridge.hooks(fwd_hooks=[(f"blocks.1.{name}", halve)]):
            ours = direct_logit_attribution(bridge, ids, 5).attribution
            theirs = reference(bridge, ids, 5).attribution
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_attn_out", halve)]):
        assert reference(bridge, ids, 5, unit="head").labels
        assert "L1hook" in direct_logit_attribution(bridge, ids, 5, unit="head").labels
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", steer)]):
        theirs = reference(bridge, ids, 5)
        assert miss(theirs, bridge, ids, bridge.b_U[5].item()) > 0.01
        with pytest.raises(DecompositionError, match="hooks of your own"):
            direct_logit_attribution(bridge, ids, 5)
