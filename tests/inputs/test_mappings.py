"""Token ids in every form, and mappings with further arguments of the model's forward.

The truth is the model itself, called with the same arguments.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    BatchEncoding,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)
from units import UNIT_NAMES
from zoo import build, example_ids, tiny_tokenizer

import dla_hooks
from dla_hooks import (
    DLAWarning,
    InputError,
    ShapeMismatchError,
    UnsupportedModelError,
    accumulated_resid,
    attribute_many,
    decompose_resid,
    direct_logit_attribution,
    prepare,
)

needs_mrope = pytest.mark.skipif(
    transformers.__version__ < "5", reason="older Qwen2-VL models are not recognised"
)
FAMILIES = ["gpt2", "llama", "gemma", "opt", "bloom"]
ANSWER = 5


def truth(model, columns=slice(None), **inputs):
    """The model's own logit of the answer [batch, pos]."""
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[:, columns, ANSWER]


def assert_right(model, inputs, expected, pos=None, **options):
    """Every unit's sum is the model's own logit at every position."""
    for unit in UNIT_NAMES:
        found = direct_logit_attribution(model, inputs, ANSWER, unit=unit, pos=pos, **options)
        rows = found.attribution[-1:] if unit == "layer" else found.attribution
        torch.testing.assert_close(
            (rows.sum(0) + found.bias).double(), expected.double(), rtol=1e-4, atol=1e-4
        )
    return found


# Forms of ids


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("form", ["lists", "tuples", "array", "rows of arrays", "encoding", "dict"])
def test_ids_in_other_forms_give_the_same_numbers(form, seed):
    model, ids = build("llama", seed=seed, dtype=torch.float32), example_ids("llama", seed=seed)
    lists = ids.tolist()
    frozen = ids.numpy().astype(np.int32)
    frozen.flags.writeable = False
    mask = torch.ones_like(ids).tolist()
    forms = {
        "lists": lists,
        "tuples": tuple(tuple(row) for row in lists),
        "array": frozen,
        "rows of arrays": list(ids.numpy()),
        "encoding": BatchEncoding({"input_ids": lists, "attention_mask": mask}),
        "dict": {"input_ids": frozen, "attention_mask": None},
    }
    expected = direct_logit_attribution(model, ids, ANSWER)
    found = direct_logit_attribution(model, forms[form], ANSWER)
    assert torch.equal(found.attribution, expected.attribution)
    assert found.tokens == expected.tokens


def test_one_row_of_ids_is_one_prompt():
    model, ids = build("gpt2", dtype=torch.float32), [4, 5, 17]
    expected = direct_logit_attribution(model, torch.tensor([ids]), ANSWER)
    for form in (ids, tuple(ids), np.array(ids), {"input_ids": ids}):
        found = direct_logit_attribution(model, form, ANSWER)
        assert torch.equal(found.attribution, expected.attribution)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_different_lengths_are_padded_as_strings_are(family):
    model = build(family, dtype=torch.float32)
    rows = [[4, 5, 17, 9], [8, 6]]
    ones = [[1] * len(row) for row in rows]
    for form in (
        rows,
        {"input_ids": rows, "attention_mask": ones},
        [torch.tensor(r) for r in rows],
    ):
        found = direct_logit_attribution(model, form, ANSWER)
        for i, row in enumerate(rows):
            expected = truth(model, -1, input_ids=torch.tensor([row]))[0]
            torch.testing.assert_close(found.logit[i], expected, rtol=1e-4, atol=1e-4)
    assert found.tokens == [[str(i) for i in row] for row in rows]


def test_output_of_a_tokenizer_is_taken_as_it_is():
    model, tokenizer = build("gpt2", dtype=torch.float32), tiny_tokenizer()
    texts = ["The cat sat", "The dog"]
    expected = direct_logit_attribution(model, texts, ANSWER, tokenizer=tokenizer)
    encoded = tokenizer(texts, return_token_type_ids=False)
    found = direct_logit_attribution(model, encoded, ANSWER, tokenizer=tokenizer)
    assert torch.equal(found.attribution, expected.attribution)
    assert found.tokens == expected.tokens


# Further arguments


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "opt"])
def test_position_ids_reach_the_real_run(family, seed):
    model, ids = build(family, seed=seed), example_ids(family, seed=seed)
    position_ids = torch.tensor([[0, 1, 2, 3, 10, 11, 12], [3, 4, 5, 6, 7, 8, 9]])
    inputs = {"input_ids": ids, "position_ids": position_ids}
    expected = truth(model, **inputs)
    assert (expected - truth(model, input_ids=ids)).abs().max() > 1e-3
    assert_right(model, inputs, expected)
    shared = {"input_ids": ids, "position_ids": position_ids[0].tolist()}
    assert_right(model, shared, truth(model, input_ids=ids, position_ids=position_ids[:1]))


def test_packed_rows_are_as_the_model_reads_them():
    model, ids = build("llama", attn="sdpa"), example_ids("llama", batch=1)
    inputs = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    assert_right(model, inputs, truth(model, **inputs))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_stand_in_for_ids(family, seed):
    model, ids = build(family, seed=seed), example_ids(family, seed=seed)
    noise = torch.randn(2, 7, 1, generator=torch.Generator().manual_seed(seed))
    embeds = model.get_input_embeddings()(ids).detach() * (1 + noise.double())
    inputs = {"inputs_embeds": embeds}
    found = assert_right(model, inputs, truth(model, **inputs))
    assert found.tokens == [["?"] * 7] * 2
    one = direct_logit_attribution(model, {"inputs_embeds": embeds[0]}, ANSWER, pos=2)
    torch.testing.assert_close(one.logit, truth(model, **inputs)[:1, 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_with_a_mask_count_real_positions(family):
    model = build(family, dtype=torch.float32)
    ids = example_ids(family)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    embeds = model.get_input_embeddings()(ids).detach()
    inputs = {"inputs_embeds": embeds, "attention_mask": mask}
    found = direct_logit_attribution(model, inputs, ANSWER, pos=1)
    expected = [
        truth(model, 1, inputs_embeds=embeds[:1]),
        truth(model, 1, inputs_embeds=embeds[1:, 3:]),
    ]
    torch.testing.assert_close(found.logit, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert found.positions.tolist() == [1, 1]


@pytest.mark.parametrize("seed", [0, 1])
def test_token_types_are_in_the_embeddings_row(seed):
    model, ids = build("gpt2", seed=seed), example_ids("gpt2", seed=seed)
    inputs = {"input_ids": ids, "token_type_ids": torch.ones_like(ids) * 9}
    expected = truth(model, **inputs)
    assert (expected - truth(model, input_ids=ids)).abs().max() > 1e-3
    assert_right(model, inputs, expected)
    plain, typed = (direct_logit_attribution(model, i, ANSWER) for i in (ids, inputs))
    at = plain.labels.index("embed")
    assert (plain.attribution[at] - typed.attribution[at]).abs().max() > 1e-3
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    padded = direct_logit_attribution(model.float(), {**inputs, "attention_mask": mask}, ANSWER)
    alone = {name: value[1:, 3:] for name, value in inputs.items()}
    torch.testing.assert_close(padded.logit[1], truth(model, -1, **alone)[0], rtol=1e-4, atol=1e-4)


def test_rows_of_token_types_are_padded_as_the_ids_are():
    model, rows = build("gpt2", dtype=torch.float32), [[4, 5, 17, 9], [8, 6]]
    types = [[9, 9, 3, 3], [9, 3]]
    inputs = {"input_ids": rows, "token_type_ids": types}
    found = direct_logit_attribution(model, inputs, ANSWER)
    for i, (row, kinds) in enumerate(zip(rows, types, strict=True)):
        alone = {"input_ids": torch.tensor([row]), "token_type_ids": torch.tensor([kinds])}
        torch.testing.assert_close(
            found.logit[i], truth(model, -1, **alone)[0], rtol=1e-4, atol=1e-4
        )
    with pytest.raises(ShapeMismatchError, match="token_type_ids has shape list"):
        direct_logit_attribution(model, {**inputs, "token_type_ids": [[9], [9, 3]]}, ANSWER)


@pytest.mark.parametrize("kind", ["float", "bool", "shared"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma"])
def test_masks_with_four_axes_reach_the_real_run(family, kind):
    attn = "sdpa" if kind == "bool" else "eager"
    model, ids = build(family, dtype=torch.float32, attn=attn), example_ids(family)
    reads = torch.ones(7, 7).tril().bool()
    reads[4:, 1:3] = False  # the last tokens do not read the second and the third
    reads = reads.expand(2, 1, 7, 7)
    mask = reads if kind == "bool" else torch.zeros(reads.shape).masked_fill(~reads, -1e9)
    mask = mask[:1] if kind == "shared" else mask
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = truth(model, **inputs)
    assert (expected - truth(model, input_ids=ids))[:, 4:].abs().max() > 1e-3
    assert_right(model, inputs, expected)
    found = direct_logit_attribution(model, ids, ANSWER, pos=None, attention_mask=mask)
    torch.testing.assert_close(found.logit, expected, rtol=1e-4, atol=1e-4)


def test_made_up_runs_do_not_see_the_prompts_arguments():
    model, ids = build("llama"), example_ids("llama")
    inner, calls = model.model.forward, []

    def watched(*args, **kwargs):
        calls.append(kwargs)
        return inner(*args, **kwargs)

    model.model.forward = watched
    position_ids = torch.arange(3, 10)[None].expand(2, -1)
    direct_logit_attribution(model, {"input_ids": ids, "position_ids": position_ids}, ANSWER)
    given = [kwargs for kwargs in calls if kwargs.get("position_ids") is not None]
    assert len(calls) > 1
    assert len(given) == 1
    assert torch.equal(given[0]["position_ids"], position_ids)


@pytest.mark.parametrize("seed", [0, 1])
def test_plans_and_stacks_take_the_same_inputs(seed):
    model, ids = build("llama", seed=seed), example_ids("llama", seed=seed)
    inputs = {"input_ids": ids, "position_ids": torch.arange(3, 10).flip(0)[None]}
    expected = truth(model, **inputs)
    found = prepare(model, ANSWER)(inputs, pos=None)
    torch.testing.assert_close(found.logit, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        stream = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[1]
    parts = decompose_resid(model, inputs, layer=1).sum(0)
    torch.testing.assert_close(parts, stream, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        accumulated_resid(model, inputs, layer=1)[-1], stream, rtol=1e-6, atol=1e-6
    )


# Images


def llava(seed, image_token=100):
    text = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    eyes = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=eyes,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=-1,
    )
    return _random(LlavaForConditionalGeneration(config), seed)


def paligemma(seed):
    text = dict(
        model_type="gemma",
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
    )
    eyes = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    config = PaliGemmaConfig(
        vision_config=eyes, text_config=text, image_token_index=100, projection_dim=32
    )
    return _random(PaliGemmaForConditionalGeneration(config), seed)


def _random(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def with_image(seed, image_token=100):
    ids = torch.tensor([[1, *[image_token] * 4, 5, 17], [1, *[image_token] * 4, 8, 9]])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("make", [llava, paligemma])
def test_images_reach_the_real_run(make, seed):
    model, inputs = make(seed), with_image(seed)
    if make is paligemma:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    expected = truth(model, **inputs)
    assert_right(model, inputs, expected)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert (truth(model, **other) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("seed", [0, 1])
def test_padded_rows_with_images_are_as_the_model_reads_them(seed):
    model, inputs = llava(seed), with_image(seed)
    ids = torch.cat((torch.tensor([[0], [7]]), inputs["input_ids"]), 1)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    inputs |= {"input_ids": ids, "attention_mask": mask}
    assert_right(model, inputs, truth(model, -1, **inputs), pos=-1)


def qwen2_vl(seed):
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
        ),
        vision_config=dict(
            depth=2,
            embed_dim=32,
            hidden_size=32,
            num_heads=4,
            patch_size=4,
            mlp_ratio=2,
            spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        image_token_id=100,
        video_token_id=99,
        vision_start_token_id=98,
        vision_end_token_id=97,
    )
    model = _random(Qwen2VLForConditionalGeneration(config), seed)
    ids = torch.tensor([[0, 1, 98, *[100] * 4, 97, 5, 17], [1, 7, 98, *[100] * 4, 97, 8, 9]])
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    patches = torch.randn(32, 96, generator=torch.Generator().manual_seed(seed))
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == 100).int()
    return model, inputs


@pytest.mark.parametrize("seed", [0, 1])
@needs_mrope
def test_positions_are_counted_by_the_model_where_there_are_images(seed):
    model, inputs = qwen2_vl(seed)
    expected = truth(model, -1, **inputs)
    model.model.rope_deltas = None
    assert_right(model, inputs, expected, pos=-1)
    assert model.model.rope_deltas is None  # as it was found


@needs_mrope
def test_chunks_after_a_run_with_images_are_those_of_the_text():
    model, inputs = qwen2_vl(0)
    text = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]]).repeat(1, 4)
    whole = direct_logit_attribution(model, text, ANSWER, pos=None)
    before = direct_logit_attribution(model, text, ANSWER, pos=None, chunk_size=5)
    truth(model, **inputs)  # of the caller's: it leaves an offset for tokens to be generated
    offset = model.model.rope_deltas
    assert offset is not None
    after = direct_logit_attribution(model, text, ANSWER, pos=None, chunk_size=5)
    torch.testing.assert_close(before.logit, whole.logit, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.logit, whole.logit, rtol=1e-4, atol=1e-5)
    assert model.model.rope_deltas is offset


def test_arrays_and_lists_of_images_are_taken():
    model, inputs = llava(0), with_image(0)
    expected = direct_logit_attribution(model, inputs, ANSWER)
    array = inputs["pixel_values"].numpy()
    for pixels in (array, list(array), array.tolist()):
        found = direct_logit_attribution(model, {**inputs, "pixel_values": pixels}, ANSWER)
        assert torch.equal(found.attribution, expected.attribution)


def test_placeholders_need_as_many_positions_as_the_image_has():
    model, inputs = llava(0), with_image(0)
    wrong = {name: value[:, 1:] for name, value in inputs.items() if name != "pixel_values"}
    wrong["input_ids"][:, 0] = 3
    with pytest.raises(InputError, match=r"fails on this input .*pixel_values \[2, 3, 16, 16\]"):
        direct_logit_attribution(model, {**inputs, **wrong}, ANSWER)


def test_model_that_makes_more_positions_than_ids_is_refused():
    model, ids = build("llama"), example_ids("llama")
    inner = type(model).forward

    class Doubled(type(model)):
        def forward(self, input_ids=None, pixel_values=None, **kwargs):
            embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None:
                embeds = torch.cat((embeds, embeds[:, -1:]), 1)
            return inner(self, inputs_embeds=embeds, **kwargs)

    model.__class__ = Doubled
    direct_logit_attribution(model, ids, ANSWER)
    with pytest.raises(UnsupportedModelError, match="other positions of this input than its ids"):
        direct_logit_attribution(model, {"input_ids": ids, "pixel_values": ids}, ANSWER)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# Refusals

IDS = example_ids("llama")
NAMES = {
    **dict.fromkeys(
        ("use_cache", "return_dict", "output_hidden_states", "output_attentions"), True
    ),
    "logits_to_keep": 1,
    "labels": IDS,
    "past_key_values": object(),
    "cache_position": torch.arange(7),
}


@pytest.mark.parametrize("name", NAMES)
def test_arguments_that_belong_to_no_prompt_are_refused(name):
    with pytest.raises(InputError, match=f"input holds {name}, which .*leave it out"):
        direct_logit_attribution(build("llama"), {"input_ids": IDS, name: NAMES[name]}, ANSWER)


@pytest.mark.parametrize(
    ("extras", "error", "said"),
    [
        (
            {"token_type_ids": IDS},
            InputError,
            "token_type_ids, which the forward of LlamaFor.* It "
            "takes attention_mask, inputs_embeds, position_ids$",
        ),
        ({"offset_mapping": IDS}, InputError, "offset_mapping, which the forward"),
        ({"inputs_embeds": torch.zeros(2, 7, 32)}, InputError, "both input_ids and inputs_embeds"),
        ({"position_ids": IDS[:, :5]}, ShapeMismatchError, r"\[2, 5\].*\[2, 7\] is expected"),
        ({"position_ids": IDS[[0, 0, 0]]}, ShapeMismatchError, r"\[3, 7\].*\[2, 7\] is expected"),
        ({"position_ids": IDS.float()}, InputError, "must hold integers"),
        ({"position_ids": -IDS}, InputError, "negative position"),
        ({"position_ids": "first"}, InputError, "must hold integers"),
        ({"attention_mask": torch.zeros(2, 1, 7, 6)}, ShapeMismatchError, r"\[2, 1, 7, 7\]"),
        ({"attention_mask": torch.ones(2, 1, 7, 7).long()}, InputError, "int64 would add its ones"),
        ({"attention_mask": torch.ones(2, 1, 7, 7).bool()}, InputError, "eager attention adds"),
        ({"attention_mask": torch.zeros(2, 7, 7)}, ShapeMismatchError, r"\[2, 7, 7\]"),
        ({"attention_mask": {"full": torch.ones(2, 7)}}, InputError, "mapping of masks"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(extras, error, said):
    model = build("llama")
    with pytest.raises(error, match=said):
        direct_logit_attribution(model, {"input_ids": IDS, **extras}, ANSWER)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_two_masks_are_refused():
    mask = torch.ones_like(IDS)
    with pytest.raises(InputError, match="attention_mask= is another; give one"):
        direct_logit_attribution(
            build("llama"), {"input_ids": IDS, "attention_mask": mask}, ANSWER, attention_mask=mask
        )


@pytest.mark.parametrize(
    ("embeds", "said"),
    [
        (torch.zeros(2, 7, 5), "fails on this input"),
        (torch.zeros(2, 7, 8, 4), "must hold floating-point vectors"),
        (IDS[..., None], "must hold floating-point vectors"),
        (torch.zeros(2, 0, 32), "is empty"),
    ],
)
def test_embeddings_of_another_form_are_refused(embeds, said):
    with pytest.raises(InputError, match=said):
        direct_logit_attribution(
            build("llama"),
            {"inputs_embeds": embeds.double() if embeds.is_floating_point() else embeds},
            ANSWER,
        )


def test_position_beyond_the_models_table_is_refused():
    model, ids = build("gpt2"), example_ids("gpt2")
    inputs = {"input_ids": ids, "position_ids": torch.arange(58, 65)[None]}
    with pytest.raises(InputError, match="has 65 positions, but GPT2LMHeadModel has .* 64 only"):
        direct_logit_attribution(model, inputs, ANSWER)


def test_mapping_of_text_is_refused():
    with pytest.raises(InputError, match="input_ids must hold token ids"):
        direct_logit_attribution(build("gpt2"), {"input_ids": "text"}, ANSWER)
    with pytest.raises(InputError, match=r"without 'input_ids' \(or 'inputs_embeds'\)"):
        direct_logit_attribution(build("gpt2"), {"attention_mask": IDS}, ANSWER)


def test_sweeps_refuse_further_arguments_beside_padding_by_name():
    model, row = build("llama"), example_ids("llama")[0]
    mask = (torch.arange(7) > 1).long()
    extra = {"input_ids": row, "position_ids": torch.arange(7), "attention_mask": mask}
    found = list(attribute_many(model, [row, extra, {"input_ids": row}], ANSWER))
    assert isinstance(found[1], InputError)
    assert "a prompt holds position_ids" in str(found[1])
    torch.testing.assert_close(found[0].attribution, found[2].attribution)


def test_wrapped_model_refuses_further_arguments_in_its_forward():
    wrapped = dla_hooks.wrap(build("llama"))
    inputs = {"input_ids": IDS, "position_ids": torch.arange(7)[None]}
    with pytest.raises(InputError, match="input holds position_ids; a wrapped model runs on ids"):
        wrapped(inputs)
    assert_right(wrapped.model, inputs, truth(wrapped.model, **inputs))


# Chunks


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_cut_into_chunks(family):
    model, ids = build(family), example_ids(family, length=11)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids).detach() * 1.5}
    assert_right(model, inputs, truth(model, **inputs), chunk_size=4)


def test_chunks_refuse_what_cannot_be_cut(monkeypatch):
    model, ids = build("llama"), example_ids("llama", length=11)
    inputs = {"input_ids": ids, "position_ids": torch.arange(11)[None]}
    with pytest.raises(UnsupportedModelError, match="its input holds position_ids, which cannot"):
        direct_logit_attribution(model, inputs, ANSWER, chunk_size=4)
    monkeypatch.setattr("dla_hooks.sources.live.LONG_PROMPT", 8)
    with pytest.warns(DLAWarning, match="its input holds position_ids, which cannot be cut"):
        direct_logit_attribution(model, inputs, ANSWER)


# Forwards without a signature


class Shell(torch.nn.Module):
    """A module around a model that hands on whatever it is given."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_model_whose_forward_was_replaced_takes_further_arguments():
    model, ids = build("llama"), example_ids("llama")
    inputs = {"input_ids": ids, "position_ids": torch.arange(3, 10).flip(0)[None]}
    expected = truth(model, **inputs)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert_right(model, inputs, expected)
    with pytest.raises(InputError, match="token_type_ids, which the forward"):
        direct_logit_attribution(model, {"input_ids": ids, "token_type_ids": ids}, ANSWER)


def test_forward_that_names_no_argument_is_right_or_refused():
    model = build("llama", dtype=torch.float32)
    shell, ids = Shell(model).eval(), example_ids("llama")
    found = direct_logit_attribution(shell, ids, ANSWER)
    torch.testing.assert_close(found.logit, truth(model, -1, input_ids=ids))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    padded = direct_logit_attribution(shell, ids, ANSWER, attention_mask=mask)
    alone = truth(model, -1, input_ids=ids[1:, 3:])[0]
    torch.testing.assert_close(padded.logit[1], alone, rtol=1e-4, atol=1e-4)
    inputs = {"input_ids": ids, "position_ids": torch.arange(3, 10).flip(0)[None]}
    with torch.no_grad():
        expected = shell(**inputs).logits[..., ANSWER]
    assert_right(shell, inputs, expected)


def test_forward_that_hands_on_to_one_without_a_mask_is_refused():
    shell, ids = Shell(build("llama", dtype=torch.float32)).eval(), example_ids("llama")
    inner = shell.inner.forward
    shell.forward = lambda *args, **kwargs: bare(*args, **kwargs)

    def bare(input_ids):
        return inner(input_ids)

    found = direct_logit_attribution(shell, ids, ANSWER)
    torch.testing.assert_close(found.logit, truth(shell.inner, -1, input_ids=ids))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with pytest.raises(UnsupportedModelError, match="Shell takes no attention mask"):
        direct_logit_attribution(shell, ids, ANSWER, attention_mask=mask)
    inputs = {"input_ids": ids, "position_ids": torch.arange(7)[None]}
    with pytest.raises(InputError, match="the forward of Shell fails on this input"):
        direct_logit_attribution(shell, inputs, ANSWER)
