"""Models that read images or sounds beside text: their own logits, and vectors taken by hand."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from doors import audio_text, by_name, image_text
from mapping_zoo import CannotBuild
from media_zoo import AUDIO, IMAGE
from survey import ABSENT, REFUSED, RIGHT, examine
from units import UNIT_NAMES

from dla_hooks import (
    DecompositionError,
    Direction,
    InputError,
    UnsupportedModelError,
    attribute_generation,
    attribute_many,
    decompose_resid,
    direct_logit_attribution,
    prepare,
    promoted_tokens,
    verify,
)
from dla_hooks.residual import registry

ANSWER, INCORRECT = 5, 7
# Types that need a package that may be missing; see the page.
NOT_BUILT = {"fast_vlm", "gemma3n", "inkling_mm_model", "perception_lm"}
LARGE = {"kosmos-2", "kosmos-2.5", "janus", "chameleon", "vibevoice_asr"}


def built(zoo, model_type):
    """A model of a type that older transformers lack."""
    if model_type not in zoo.CLASSES:
        pytest.skip(f"this transformers has no {model_type}")
    return zoo.build(model_type)


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def ask(model, inputs, **options):
    return direct_logit_attribution(model, inputs, ANSWER, INCORRECT, pos=None, **options)


def row(result, label):
    return result.attribution[result.labels.index(label)]


@torch.no_grad()
def captured(model, modules, inputs):
    """What enters some modules [batch, pos, d], by name, in one run; and their keywords."""
    seen, handles = {}, []
    for name, module in modules.items():

        def keep(module, args, kwargs, name=name):
            x = args[0] if args else kwargs["hidden_states"]
            seen[name] = x.clone(), kwargs

        handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def read_with(model, norm, last):
    """The direction of the difference of two logits, over the norm's scale [batch, pos, d]."""
    rows = model.get_output_embeddings().weight
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    scale = (last.square().mean(-1, keepdim=True) + eps).sqrt()
    return (rows[ANSWER] - rows[INCORRECT]) * norm.weight / scale


# Every type


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("door", "model_type"),
    [
        (d, t)
        for d in ("image-text", "audio-text")
        for t in by_name(d).model_types
        if t not in LARGE
    ],
)
def test_every_type_is_exact_or_refused(door, model_type, seed):
    try:
        cases = by_name(door).cases(model_type, seed)
    except CannotBuild:
        assert model_type in NOT_BUILT
        return
    for case in cases:
        found = examine(case)
        assert found.verdict in (RIGHT, REFUSED, ABSENT), (case.name, found)
        if found.verdict == RIGHT:
            assert found.gap < 1e-9
            assert found.logit_gap < 1e-5
        else:
            assert len(found.reason) > 40


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(image_text.MODEL_TYPES) - LARGE))
def test_heads_of_the_last_block_are_what_their_ablation_takes_away(model_type):
    """With the MLP behind it kept as it was, a head that is zeroed takes its write out."""
    try:
        model = image_text.build(model_type)
        inputs = image_text.pixels(model_type, model)
        found = ask(model, inputs, unit="head")
    except (CannotBuild, UnsupportedModelError):
        return
    blocks = _blocks(model)
    block, attention = blocks[-1], getattr(blocks[-1], "self_attn", None)
    proj = getattr(attention, "o_proj", None)
    labels = [label for label in found.labels if label.startswith(f"L{len(blocks) - 1}H")]
    names = {name for name, _ in block.named_children() if "norm" in name}
    plain = names == {"input_layernorm", "post_attention_layernorm"} and hasattr(block, "mlp")
    if proj is None or not labels or not plain or _final_norm(model) is None:
        return  # post-norms and parallel blocks have oracles of their own
    width = proj.in_features // len(labels)
    kept = {}
    keep = block.mlp.register_forward_hook(lambda m, a, out: kept.setdefault("mlp", out))
    norm = _final_norm(model)
    clean = captured(model, {"last": norm}, inputs)["last"][0]
    keep.remove()
    replay = block.mlp.register_forward_hook(lambda m, a, out: kept["mlp"])

    def zero(module, args):
        z = args[0].clone()
        z[..., :width] = 0
        return (z, *args[1:])

    ablate = proj.register_forward_pre_hook(zero)
    without = captured(model, {"last": norm}, inputs)["last"][0]
    ablate.remove(), replay.remove()
    moved = ask_of(model, norm, clean, clean - without, found)
    if moved is not None:
        torch.testing.assert_close(row(found, labels[0]), moved, rtol=1e-5, atol=1e-6)


def ask_of(model, norm, last, write, found):
    """A write's part by hand, where the final norm is a plain root-mean-square norm."""
    scaled = found.softcap is not None or getattr(norm, "bias", None) is not None
    own = norm(last) / last
    plain = own / own.mean(-1, keepdim=True) * norm.weight.mean()
    is_rms = torch.allclose(plain, norm.weight.expand_as(plain), rtol=1e-4)
    if scaled or not is_rms:
        return None
    rows = model.get_output_embeddings().weight
    factor = logit_factor(model)
    return (write * own * (rows[ANSWER] - rows[INCORRECT])).sum(-1) * factor


def logit_factor(model):
    """The factor of the logits, by the config."""
    config = model.config.get_text_config()
    scaling = getattr(config, "logits_scaling", None)
    scale = getattr(config, "logit_scale", None)
    return 1 / scaling if scaling else scale if scale else 1.0


def _stack(model):
    """The path of the decoder that holds the blocks."""
    lists = [n for n, m in model.named_modules() if n.endswith(".layers") and "vision" not in n]
    named = dict(model.named_modules())
    of = [n for n in lists if isinstance(named[n], torch.nn.ModuleList) and "audio" not in n]
    return max(of, key=lambda n: hasattr(named[n][-1], "self_attn") + hasattr(named[n][-1], "mlp"))


def _blocks(model):
    return dict(model.named_modules())[_stack(model)]


def _final_norm(model):
    return dict(model.named_modules()).get(_stack(model).removesuffix("layers") + "norm")


# Additions between blocks


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "model_type", ["qwen3_vl", pytest.param("cosmos3_omni", marks=pytest.mark.slow)]
)
def test_deepstack_rows_are_the_features_that_were_added(model_type, seed):
    model = image_text.build(model_type, seed)
    inputs = image_text.pixels(model_type, model, seed)
    language = model.model.language_model
    seen = {}

    def keep(module, args, kwargs):
        seen.update(kwargs)

    handle = language.register_forward_pre_hook(keep, with_kwargs=True)
    last = captured(model, {"last": language.norm}, inputs)["last"][0]
    handle.remove()
    result = ask(model, inputs)
    d = read_with(model, language.norm, last)
    for layer, features in enumerate(seen["deepstack_visual_embeds"]):
        written = torch.zeros_like(last)
        written[seen["visual_pos_masks"]] = features
        torch.testing.assert_close(
            row(result, f"{layer}_deepstack"), (written * d).sum(-1), rtol=1e-5, atol=1e-7
        )
    logits = logits_of(model, inputs)
    truth = logits[..., ANSWER] - logits[..., INCORRECT]
    torch.testing.assert_close(result.attribution.sum(0) + result.bias, truth, rtol=0, atol=1e-5)
    assert not bool(row(result, "0_deepstack")[:, -1].any())  # a text position


def test_deepstack_stands_between_the_layers_of_the_stream():
    model = image_text.build("qwen3_vl")
    inputs = image_text.pixels("qwen3_vl", model)
    language = model.model.language_model
    vector = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    place = captured(model, {"in": language.layers[1]}, inputs)["in"][0]
    found = direct_logit_attribution(model, inputs, Direction(vector, at="1_pre"), pos=None)
    torch.testing.assert_close(found.attribution.sum(0) + found.bias, place @ vector)
    assert found.labels[-1] == "0_deepstack"
    layers = ask(model, inputs, unit="layer")
    parts = ask(model, inputs)
    steps = [parts.labels.index(name) for name in ("0_mlp_out", "0_deepstack")]
    until = parts.attribution[: steps[1] + 1].sum(0)
    torch.testing.assert_close(row(layers, "1_pre"), until, rtol=0, atol=1e-9)


def test_text_alone_has_no_deepstack_rows():
    model = image_text.build("qwen3_vl")
    assert not [
        name
        for name in ask(model, image_text.text("", model)["input_ids"]).labels
        if "deep" in name
    ]


def test_a_deepstack_that_is_not_seen_fails_the_check(monkeypatch):
    model = image_text.build("qwen3_vl")
    inputs = image_text.pixels("qwen3_vl", model)
    monkeypatch.setattr("dla_hooks.units.parts.places_between", lambda stream: iter(()))
    with pytest.raises(DecompositionError, match="miss"):
        ask(model, inputs)


def test_stacks_refuse_features_between_blocks_by_name():
    model = image_text.build("qwen3_vl")
    inputs = image_text.pixels("qwen3_vl", model)
    for call in (decompose_resid, promoted_tokens):
        with pytest.raises(UnsupportedModelError, match="deepstack"):
            call(model, inputs)


def test_stacks_take_images_of_a_type_that_is_only_built_alike():
    model = image_text.build("llava")
    inputs = image_text.pixels("llava", model)
    found = promoted_tokens(model, inputs)
    assert found.labels[0] == "embed"
    with pytest.raises(UnsupportedModelError, match="deepstack"):
        promoted_tokens(model, inputs, check=False)  # where no sum would tell


# Cross-attention of its own


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_gated_cross_attention_is_what_its_gates_let_through(seed):
    model = image_text.build("mllama", seed)
    inputs = image_text.pixels("mllama", model, seed)
    language = model.model.language_model
    block = language.layers[1]
    places = {"z": block.cross_attn.o_proj, "down": block.mlp.down_proj, "last": language.norm}
    seen = captured(model, {**places, "block": block}, inputs)
    d = read_with(model, language.norm, seen["last"][0])
    z, weight = seen["z"][0], block.cross_attn.o_proj.weight
    heads, n = ask(model, inputs, unit="head"), model.config.text_config.num_attention_heads
    width = z.shape[-1] // n
    for head in range(n):
        own = slice(head * width, (head + 1) * width)
        written = z[..., own] @ weight[:, own].T * block.cross_attn_attn_gate.tanh()
        torch.testing.assert_close(
            row(heads, f"L1X{head}"), (written * d).sum(-1), rtol=1e-5, atol=1e-8
        )
    mask = seen["block"][1]["full_text_row_masked_out_mask"][:, 0]
    assert not bool(mask.all())
    written = block.mlp.down_proj(seen["down"][0]) * mask * block.cross_attn_mlp_gate.tanh()
    parts = ask(model, inputs)
    torch.testing.assert_close(row(parts, "1_mlp_out"), (written * d).sum(-1), rtol=1e-5, atol=1e-8)
    assert not bool(row(parts, "1_mlp_out")[:, 0].any())  # it reads no image
    neurons = ask(model, inputs, unit="neuron")
    assert neurons.gap < 1e-12


def test_cross_attention_writes_nothing_without_an_image():
    model = image_text.build("mllama")
    ids = image_text.text("mllama", model)["input_ids"]
    logits = logits_of(model, {"input_ids": ids})
    for unit in UNIT_NAMES:
        found = ask(model, ids, unit=unit)
        rows = found.attribution[-1:] if unit == "layer" else found.attribution
        truth = logits[..., ANSWER] - logits[..., INCORRECT]
        torch.testing.assert_close(rows.sum(0) + found.bias, truth, rtol=0, atol=1e-5)
    parts = ask(model, ids)
    assert not bool(row(parts, "1_cross_attn_out").any())
    assert not bool(row(parts, "1_mlp_out").any())


def test_rows_that_read_no_image_are_masked_or_the_check_fails(monkeypatch):
    model = image_text.build("mllama")
    inputs = image_text.pixels("mllama", model)
    monkeypatch.setattr("dla_hooks.sources.as_run._behind", lambda write, d_model: [])
    with pytest.raises(DecompositionError, match="miss"):
        ask(model, inputs)


# Prompts


def several_images(model):
    """Two images in the first row, one in the second, which is padded on the left."""
    one = image_text.pixels("qwen3_vl", model)
    ids, image = one["input_ids"], one["input_ids"][0, 2:8]
    first = torch.cat((ids[0, :2], image, ids[0, 8:10], image, ids[0, 10:]))
    pad = len(first) - ids.shape[1]
    second = torch.cat((torch.full((pad,), 3), ids[1]))
    both = torch.stack((first, second))
    mask = torch.ones_like(both)
    mask[1, :pad] = 0
    patches = torch.cat((one["pixel_values"], -one["pixel_values"][:16]))
    return {
        "input_ids": both,
        "attention_mask": mask,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 3),
        "mm_token_type_ids": (both == IMAGE).long() * mask,
    }, pad


def test_rows_with_different_numbers_of_images_are_those_of_each_alone():
    model = image_text.build("qwen3_vl", dtype=torch.float32)
    inputs, pad = several_images(model)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    found = direct_logit_attribution(model, inputs, ANSWER, INCORRECT)
    for number, (start, patches) in enumerate([(0, slice(0, 32)), (pad, slice(32, 48))]):
        alone = {
            "input_ids": inputs["input_ids"][number : number + 1, start:],
            "pixel_values": inputs["pixel_values"][patches],
            "image_grid_thw": inputs["image_grid_thw"][: 2 - number],
            "mm_token_type_ids": inputs["mm_token_type_ids"][number : number + 1, start:],
        }
        own = direct_logit_attribution(model, alone, ANSWER, INCORRECT)
        shared = [found.labels.index(label) for label in own.labels]
        torch.testing.assert_close(
            found.attribution[shared, number], own.attribution[:, 0], rtol=1e-4, atol=1e-4
        )
    assert [name for name in found.tokens[0] if name.startswith("<image 2: ")][
        1
    ] == "<image 2: 0,1>"
    assert "<image 1,1>" in found.tokens[1]


def test_plans_take_prompts_with_images_and_without():
    model = image_text.build("mllama")
    plan = prepare(model, ANSWER, INCORRECT, unit="component")
    inputs = image_text.pixels("mllama", model)
    for given in (inputs, inputs["input_ids"], inputs):
        expected = ask(model, given)
        torch.testing.assert_close(plan(given, pos=None).attribution, expected.attribution)


def test_a_model_and_the_random_numbers_stay_as_they_were():
    model = image_text.build("mllama")
    inputs = image_text.pixels("mllama", model)
    before, config = torch.get_rng_state(), deepcopy(model.config.to_dict())
    given = {name: value.clone() for name, value in inputs.items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ask(model, inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(inputs[name], value) for name, value in given.items())
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_pieces_generation_and_many_are_refused_by_name():
    model = image_text.build("llava")
    inputs = image_text.pixels("llava", model)
    with pytest.raises(UnsupportedModelError, match="pixel_values, which cannot be cut"):
        direct_logit_attribution(model, inputs, ANSWER, chunk_size=3)
    with pytest.raises(InputError, match="pixel_values"):
        list(attribute_generation(model, inputs, max_new_tokens=2))
    (found,) = attribute_many(model, [inputs], ANSWER)
    assert isinstance(found, InputError)
    assert "pixel_values" in str(found)


# Names of positions

SQUARE = {"gemma3": 2, "llava": 4, "paligemma": 4, "idefics3": 2, "internvl": 2, "qwen2_vl": 2}


@pytest.mark.parametrize(
    "model_type",
    [
        "llava",
        *(pytest.param(t, marks=pytest.mark.slow) for t in sorted(SQUARE) if t != "llava"),
    ],
)
def test_patches_are_named_by_row_and_column(model_type):
    model = image_text.build(model_type)
    tokens = ask(model, image_text.pixels(model_type, model)).tokens[0]
    width = SQUARE[model_type]
    names = [f"<image {r},{c}>" for r in range(width) for c in range(width)]
    assert [name for name in tokens if name.startswith("<image")] == names


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(SQUARE))
def test_a_patch_moves_the_position_of_its_name_most(model_type):
    """Pixels of one place are changed: the embedding that changes most is at the name of it."""
    model = image_text.build(model_type)
    inputs, width = image_text.pixels(model_type, model), SQUARE[model_type]
    tokens = ask(model, inputs).tokens[0]
    norm_of = _blocks(model)[0]
    clean = captured(model, {"in": norm_of}, inputs)["in"][0][0]
    places = [at for at, name in enumerate(tokens) if name.startswith("<image")]
    for r, c in ((0, 1), (1, 0)):
        moved = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
        if moved["pixel_values"].ndim == 2:  # Qwen: four patches of a place stand together
            first = 4 * (r * width + c)
            moved["pixel_values"][first : first + 4] += 3
        else:
            side = 16 // width
            part = moved["pixel_values"][0]
            part[..., r * side : (r + 1) * side, c * side : (c + 1) * side] += 3
        after = captured(model, {"in": norm_of}, moved)["in"][0][0]
        changed = (after - clean).norm(dim=-1)[places]
        assert tokens[places[int(changed.argmax())]] == f"<image {r},{c}>"


def test_patches_without_a_known_grid_and_frames_are_numbered():
    model = image_text.build("llava_next")
    tokens = ask(model, image_text.pixels("llava_next", model)).tokens[0]
    assert tokens[3:5] == ["<image 0>", "<image 1>"]
    model = audio_text.build("qwen2_audio")
    inputs = audio_text.sounds("qwen2_audio", model)
    found = ask(model, inputs)
    logits = logits_of(model, inputs)
    truth = logits[..., ANSWER] - logits[..., INCORRECT]
    torch.testing.assert_close(found.attribution.sum(0) + found.bias, truth, rtol=0, atol=1e-5)
    assert found.tokens[0][3:5] == ["<audio 0>", "<audio 1>"]
    assert "<audio>" in str(found)
    assert found.tokens[0].count("<audio 9>") == 1 == int(inputs["input_ids"][0, 12] == AUDIO)


def test_refusals_say_why_an_image_is_needed():
    for model_type in ("blip-2", "idefics"):
        refusal = registry.refusal_for(model_type)
        assert "does not run without an image" in refusal.reason


def test_prompts_of_several_tokens_a_position_are_refused_by_name():
    model = built(audio_text, "kyutai_speech_to_text")
    inputs = audio_text.text("kyutai_speech_to_text", model)
    assert bool(logits_of(model, inputs).isfinite().all())
    for given in (inputs, inputs["input_ids"][..., 0]):
        with pytest.raises(UnsupportedModelError, match="every codebook"):
            ask(model, given)


def test_padded_text_through_a_model_with_cross_attention_is_that_of_each_alone():
    model = image_text.build("mllama", dtype=torch.float32)
    ids = image_text.text("mllama", model)["input_ids"]
    rows = [ids[0].tolist(), ids[1, :4].tolist()]
    both = direct_logit_attribution(model, rows, ANSWER, INCORRECT)
    for number, own in enumerate(rows):
        alone = direct_logit_attribution(model, own, ANSWER, INCORRECT)
        torch.testing.assert_close(both.logit[number], alone.logit[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("model_type", "cross", "norm"),
    [
        (
            "vision-encoder-decoder",
            "decoder.transformer.h.0.crossattention",
            "decoder.transformer.ln_f",
        ),
        (
            "pix2struct",
            "decoder.layer.0.encoder_decoder_attention.attention",
            "decoder.final_layer_norm",
        ),
        ("pp_formulanet", "model.decoder.layers.0.encoder_attn", "model.decoder.layer_norm"),
    ],
)
def test_a_captioning_model_reads_its_image_through_cross_attention(model_type, cross, norm, seed):
    if model_type not in image_text.CLASSES:
        pytest.skip(f"this transformers has no {model_type}")
    (case,) = by_name("image-text").cases(model_type, seed)
    model = case.model
    found = direct_logit_attribution(model, case.asked, ANSWER, INCORRECT, pos=None)
    truth = case.logits[..., ANSWER] - case.logits[..., INCORRECT]
    torch.testing.assert_close(found.attribution.sum(0) + found.bias, truth, rtol=0, atol=1e-5)
    kept = {}
    handles = [
        model.get_submodule(cross).register_forward_hook(
            lambda m, args, out: kept.update(write=out[0].detach())
        ),
        model.get_submodule(norm).register_forward_pre_hook(
            lambda m, args: kept.update(stream=args[0].detach())
        ),
    ]
    logits_of(model, case.asked)
    for handle in handles:
        handle.remove()
    own = model.get_submodule(norm)
    write, stream = kept["write"], kept["stream"]
    if isinstance(own, torch.nn.LayerNorm):
        write = write - write.mean(-1, keepdim=True)
        stream = stream - stream.mean(-1, keepdim=True)
    eps = getattr(own, "eps", None) or own.variance_epsilon
    scale = (stream.square().mean(-1) + eps).sqrt()
    rows = (model if hasattr(model, "lm_head") else model.decoder).lm_head.weight
    expected = (write * own.weight) @ (rows[ANSWER] - rows[INCORRECT]) / scale
    assert bool(expected.abs().max() > 1e-3)
    torch.testing.assert_close(row(found, "0_cross_attn_out"), expected, rtol=0, atol=1e-6)


def test_text_alone_is_read_by_a_model_that_does_not_run_without_an_image():
    model = built(image_text, "kosmos-2")
    ids = torch.tensor([[5, 9, 11, 30, 8]])
    none = {"image_embeds": torch.zeros(1, 0, 32), "image_embeds_position_mask": ids * 0}
    truth = logits_of(model, {"input_ids": ids, **none})
    truth = truth[..., ANSWER] - truth[..., INCORRECT]
    found = ask(model, ids)
    torch.testing.assert_close(found.attribution.sum(0) + found.bias, truth, rtol=0, atol=1e-4)
    inputs = image_text.pixels("kosmos-2", model)
    truth = logits_of(model, inputs)
    truth = truth[..., ANSWER] - truth[..., INCORRECT]
    found = ask(model, inputs)
    torch.testing.assert_close(found.attribution.sum(0) + found.bias, truth, rtol=0, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match="no attention heads"):
        ask(model, ids, unit="head")


@pytest.mark.parametrize(
    ("zoo", "model_type"), [(image_text, "nemotron_h_omni"), (audio_text, "nemo_speechlm")]
)
def test_heads_of_a_hybrid_inside_are_what_its_projection_makes_of_each(zoo, model_type):
    model = built(zoo, model_type)
    inputs = zoo.text(model_type, model)
    found = ask(model, inputs["input_ids"], unit="head")
    projections = {n: m for n, m in model.named_modules() if n.endswith("mixer.o_proj")}
    ((name, proj),) = projections.items()
    norms = [m for n, m in model.named_modules() if n.endswith("norm_f")]
    kept = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, key=key: kept.update({key: args[0]}))
        for key, module in (("z", proj), ("stream", norms[0]))
    ]
    logits_of(model, inputs)
    for handle in handles:
        handle.remove()
    head = model.lm_head if hasattr(model, "lm_head") else model.language_model.lm_head
    eps = norms[0].variance_epsilon
    scale = (kept["stream"].square().mean(-1) + eps).sqrt()
    direction = (head.weight[ANSWER] - head.weight[INCORRECT]) * norms[0].weight
    layer = int(name.split(".")[-3])
    labels = [label for label in found.labels if label.startswith(f"L{layer}H")]
    width = proj.in_features // len(labels)
    assert len(labels) == 4
    for number, label in enumerate(labels):
        own = slice(number * width, (number + 1) * width)
        write = kept["z"][..., own] @ proj.weight[:, own].T
        torch.testing.assert_close(row(found, label), write @ direction / scale, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "mllama"])
def test_verify_holds_every_block_of_models_with_images(model_type):
    report = verify(image_text.build(model_type), show=False)
    assert report.ok, report


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_stacks_of_a_model_with_images_that_adds_nothing_between_its_blocks(model_type):
    model = image_text.build(model_type)
    inputs = image_text.pixels(model_type, model)
    stack, labels = decompose_resid(model, inputs, return_labels=True)
    language = model.model.language_model
    stream = captured(model, {"norm": language.norm}, inputs)["norm"][0]
    torch.testing.assert_close(stack.sum(0), stream)
    assert not [label for label in labels if "deep" in label]


def test_generation_beside_blocks_that_an_image_runs_is_refused_by_name():
    model = image_text.build("mllama")
    ids = image_text.text("mllama", model)["input_ids"]
    with pytest.raises(UnsupportedModelError, match=r"only beside an image \(.*layers"):
        next(iter(attribute_generation(model, ids, max_new_tokens=2)))
