"""Every type behind the doors of labels and masks is right, or refused with the reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from doors import by_name
from findings import ABSENT, REFUSED, RIGHT
from head_ablation import head_effects
from mapping_zoo import CannotBuild, build_any, example_ids_any
from survey import survey_type

import dla_hooks
from dla_hooks import UnsupportedModelError, direct_logit_attribution
from dla_hooks.doors import DOORS, door_for
from dla_hooks.residual import registry

OURS = ("classification", "token-classification", "question-answering", "masked")
ALL = [(door, name) for door in OURS for name in by_name(door).model_types]
FEW = [
    ("classification", "gemma2"),
    ("classification", "doge"),
    ("classification", "mixtral"),
    ("token-classification", "gpt_neox"),
    ("token-classification", "megatron-bert"),
    ("token-classification", "esmc"),
    ("question-answering", "llama"),
    ("question-answering", "xlm-roberta-xl"),
    ("masked", "eurobert"),
]
# These run in float32, or sum there.
COARSE = {"zamba", "mra"}


# Its heads are half as many and twice as wide as declared: tests/models/test_heads.py has them.
OTHER_HEADS = {"diffllama"}


def _some(every, few=FEW):
    return [one if one in few else pytest.param(*one, marks=pytest.mark.slow) for one in every]


@pytest.mark.parametrize(("door", "model_type"), _some(ALL, FEW[::3]))
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)], ids="seed{}".format)
def test_type_behind_a_door_is_exact_or_refused(door, model_type, seed):
    found = survey_type(model_type, seed, door=door)
    assert found.verdict in (RIGHT, REFUSED, ABSENT), found
    if found.verdict == RIGHT:
        assert found.gap < 1e-9 or model_type in COARSE
        assert registry.refusal_for(model_type, door) is None
    if found.verdict == REFUSED:
        assert len(found.reason) > 40
        assert "no unembedding" not in found.reason
        # What `dla-hooks list --door` names is right.
        assert registry.adapter_for(model_type) is None or registry.refusal_for(model_type, door)


@pytest.mark.parametrize(("door", "model_type"), _some(ALL))
def test_heads_behind_a_door_are_what_their_ablation_removes(door, model_type):
    try:
        cases = by_name(door).cases(model_type)
    except CannotBuild:
        return
    for case in cases:
        try:
            result = direct_logit_attribution(
                case.model, case.asked, case.answer, case.incorrect, unit="head", **case.options
            )
        except UnsupportedModelError:
            assert (door, model_type) not in FEW
            return
        if model_type in OTHER_HEADS:
            continue
        effects = head_effects(case)
        spread = float((case.logits.amax(-1) - case.logits.amin(-1)).mean())
        rows = [label for label in result.labels if label in effects]
        assert rows
        for label in rows:
            found = result.attribution[result.labels.index(label)]
            assert float((found - effects[label]).abs().max()) < 1e-5 * spread, label


@pytest.mark.parametrize(
    ("door", "model_type", "reason"),
    [
        ("masked", "esm", "the LM head: a dense layer, an activation and a norm"),
        ("masked", "modernbert", "the head: a dense layer, an activation and a norm"),
        ("classification", "megatron-bert", "the classifier: a dense layer and an activation"),
        ("classification", "ultrabert", "it reads the first position or the mean of all"),
        ("question-answering", "big_bird", "each block norms the sum itself"),
        ("masked", "mobilebert", "each block multiplies the sum itself"),
    ],
)
def test_refusal_behind_a_door_says_what_prevents_it(door, model_type, reason):
    found = survey_type(model_type, door=door)
    assert found.verdict == REFUSED
    assert reason in found.reason


def test_reason_of_one_door_does_not_stand_at_another():
    assert registry.refusal_for("megatron-bert", "token-classification") is None
    assert registry.refusal_for("megatron-bert", "masked").place == "the LM head"
    assert registry.refusal_for("megatron-bert", "classification").place == "the classifier"
    assert registry.refusal_for("bert") is registry.refusal_for("bert", "masked")


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_door_names_an_auto_class_and_its_table(door):
    assert hasattr(transformers, door.auto)
    assert len(door.classes()) > 10


@pytest.mark.parametrize(
    ("model_type", "names", "door"),
    [
        ("llama", ["LlamaForCausalLM"], "causal"),
        ("llama", ["LlamaForSequenceClassification"], "classification"),
        ("llama", ["LlamaForTokenClassification"], "token-classification"),
        ("llama", ["LlamaForQuestionAnswering"], "question-answering"),
        ("gpt2", [], "causal"),
        ("gpt2", ["GPT2Model"], "causal"),
        ("t5", ["T5ForConditionalGeneration"], "seq2seq"),
        ("whisper", ["WhisperForConditionalGeneration"], "speech"),
        ("llava", ["LlavaForConditionalGeneration"], "image-text"),
        ("bert", ["BertForMaskedLM"], "masked"),
        ("made_up", ["MadeUpForTokenClassification"], "token-classification"),
    ],
)
def test_class_of_a_checkpoint_says_its_door(model_type, names, door):
    assert door_for(model_type, names).name == door


def test_code_of_a_checkpoint_says_its_door():
    remote = {"AutoModelForSequenceClassification": "modeling.MyReward", "AutoConfig": "c.C"}
    assert door_for("mine", ["MyReward"], remote).name == "classification"
    assert door_for("mine", ["Other"], {}) is None


# A model that was made without a final norm


@pytest.mark.parametrize("changes", [{}, {"word_embed_proj_dim": 20}], ids=["plain", "projected"])
def test_heads_of_opt_without_a_final_norm_are_what_their_ablation_removes(changes):
    case = by_name("causal").cases("opt", _remove_final_layer_norm=True, **changes)[0]
    result = direct_logit_attribution(case.model, case.asked, 5, 7, unit="head", pos=None)
    truth = case.logits[..., 5] - case.logits[..., 7]
    torch.testing.assert_close(result.total() + result.bias, truth, rtol=0, atol=1e-12)
    if not changes:
        for label, effect in _without_norm(case).items():
            found = result.attribution[result.labels.index(label)]
            torch.testing.assert_close(found, effect, rtol=0, atol=1e-12)


@torch.no_grad()
def _without_norm(case):
    """Heads straight through the unembedding, from what enters each projection."""
    model, seen = case.model, {}
    layers = model.model.decoder.layers
    handles = [
        layer.self_attn.out_proj.register_forward_pre_hook(
            lambda module, given, at=at: seen.update({at: given[0].clone()})
        )
        for at, layer in enumerate(layers)
    ]
    model(case.asked)
    for handle in handles:
        handle.remove()
    direction = model.lm_head.weight[5] - model.lm_head.weight[7]
    n, found = model.config.num_attention_heads, {}
    for at, z in seen.items():
        weight = layers[at].self_attn.out_proj.weight
        width = z.shape[-1] // n
        for h in range(n):
            columns = slice(h * width, (h + 1) * width)
            found[f"L{at}H{h}"] = z[..., columns] @ weight[:, columns].T @ direction
    return found


def test_model_without_a_final_norm_keeps_no_hook_of_ours():
    model = build_any("opt", _remove_final_layer_norm=True)
    ids = example_ids_any(model)
    last = model.model.decoder.layers[-1]
    direct_logit_attribution(model, ids, 5)
    assert not last._forward_hooks

    def fails(module, given, output):
        raise RuntimeError("mine")

    handle = model.lm_head.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="mine"):
        direct_logit_attribution(model, ids, 5)
    handle.remove()
    assert not last._forward_hooks
    assert model.model.decoder.final_layer_norm is None


def test_hook_behind_the_last_block_without_a_norm_is_a_row():
    model = build_any("opt", _remove_final_layer_norm=True)
    ids = example_ids_any(model)
    with model.model.decoder.layers[-1].register_forward_hook(lambda m, a, out: out + 0.1):
        with torch.no_grad():
            truth = model(ids).logits[:, -1, 5]
        result = direct_logit_attribution(model, ids, 5)
    torch.testing.assert_close(result.total() + result.bias, truth, rtol=0, atol=1e-10)
    assert "2_hook" in result.labels


def test_generation_of_a_model_without_a_final_norm_is_refused():
    model = build_any("opt", _remove_final_layer_norm=True)
    with pytest.raises(UnsupportedModelError, match="made without a final norm"):
        dla_hooks.attribute_generation(model, example_ids_any(model)[:1], max_new_tokens=2)


@pytest.mark.parametrize("changes", [{}, {"word_embed_proj_dim": 20}], ids=["plain", "projected"])
def test_opt_with_norms_on_the_sum_is_refused(changes):
    model = build_any("opt", do_layer_norm_before=False, **changes)
    with pytest.raises(UnsupportedModelError, match="does not depend linearly on its input"):
        direct_logit_attribution(model, example_ids_any(model), 5)
