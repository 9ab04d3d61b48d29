"""Encoder-decoders: the decoder's stream, with what the encoder puts out as given."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from doors import by_name
from doors.seq2seq import START, TARGET, build, inputs, run, tokens
from doors.speech import build_speech, heard
from two_sequence_oracle import FAMILIES, Oracle
from typer.testing import CliRunner
from zoo import tiny_tokenizer

import dla_hooks
from dla_hooks import (
    InputError,
    LabelError,
    ShapeMismatchError,
    TokenError,
    UnsupportedModelError,
    direct_logit_attribution,
)
from dla_hooks.checkpoint import load_model
from dla_hooks.cli.app import app

ANSWER, INCORRECT = 5, 7
QUICK = ("t5", "mbart", "whisper")
CASES = [
    pytest.param(name, seed, marks=() if name in QUICK and not seed else pytest.mark.slow)
    for name in FAMILIES
    for seed in (0, 1)
]


def made(name, seed=0):
    if name == "whisper":
        ids = tokens(TARGET, seed=1 + seed)
        return build_speech(name, seed), {**heard(name, seed), "decoder_input_ids": ids}
    return build(name, seed), inputs(seed)


@pytest.fixture(scope="module")
def t5():
    model, given = made("t5")
    return SimpleNamespace(model=model, given=given, oracle=Oracle(model, "t5", given))


@pytest.fixture(scope="module")
def mbart():
    return SimpleNamespace(model=build("mbart"), given=inputs())


def attribute(one, **options):
    options = {"pos": None, **options}
    return direct_logit_attribution(one.model, one.given, ANSWER, INCORRECT, **options)


def close(found, expected, tolerance=1e-6):
    # Norms of transformers compute in float32 inside, also in float64 models.
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max() + 1)


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_components_equal_stored_vectors(name, seed):
    model, given = made(name, seed)
    truth = Oracle(model, name, given).parts(ANSWER, INCORRECT)
    result = direct_logit_attribution(model, given, ANSWER, INCORRECT, pos=None)
    assert result.gap < 1e-9
    close(result.bias, truth.pop("bias"))
    assert set(result.labels) == set(truth)
    for label, expected in truth.items():
        close(result[label], expected)


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_heads_equal_the_logits_that_go_with_them(name, seed):
    model, given = made(name, seed)
    oracle = Oracle(model, name, given)
    result = direct_logit_attribution(model, given, ANSWER, INCORRECT, unit="head", pos=None)
    last = len(oracle.blocks) - 1
    for which, letter in (("self", "H"), ("cross", "X")):
        linear = oracle.blocks[last].get_submodule(oracle.family.o_proj[which])
        labels = [f"L{last}{letter}{head}" for head in range(4)]
        width = linear.weight.shape[1] // len(labels)
        for head, label in enumerate(labels):
            lost = oracle.logits - oracle.without(
                last, which, slice(head * width, (head + 1) * width)
            )
            close(result[label], lost[..., ANSWER] - lost[..., INCORRECT])


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_cross_sources_equal_the_logits_that_go_with_a_value(name, seed):
    model, given = made(name, seed)
    oracle = Oracle(model, name, given)
    unit = dla_hooks.SourceTokens(top=None)
    result = direct_logit_attribution(model, given, ANSWER, INCORRECT, unit=unit, pos=None)
    last = len(oracle.blocks) - 1
    v_proj = oracle.blocks[last].get_submodule(oracle.family.v_proj)
    n_shared = 2 if name == "t5gemma" else 4
    width = v_proj.weight.shape[0] // n_shared
    group = 4 // n_shared
    for shared, column in ((0, 0), (n_shared - 1, 5)):
        channels = slice(shared * width, (shared + 1) * width)
        lost = oracle.logits - oracle.without_value(last, column, channels)
        heads = range(shared * group, (shared + 1) * group)
        found = sum(result[f"L{last}X{head}<{column}"] for head in heads)
        close(found, lost[..., ANSWER] - lost[..., INCORRECT])


def test_rows_of_a_head_sum_to_its_value(t5):
    heads = attribute(t5, unit="head")
    sources = attribute(t5, unit=dla_hooks.SourceTokens(top=None))
    for label in ("L0H1", "L1X3"):
        rows = [row for row in sources.rows if row.label.split("<")[0] == label]
        n = TARGET if "H" in label else t5.given["input_ids"].shape[1]
        assert len(rows) == n
        close(sum(sources[row.label].nan_to_num() for row in rows), heads[label], 1e-9)


def test_sources_summed_by_layer_keep_the_two_sequences_apart(t5):
    by_head = attribute(t5, unit=dla_hooks.SourceTokens(top=None))
    by_layer = attribute(t5, unit=dla_hooks.SourceTokens(top=None, sum="layer"))
    close(by_layer["L1X<3"], sum(by_head[f"L1X{head}<3"] for head in range(4)), 1e-9)
    close(by_layer["L1<0"], sum(by_head[f"L1H{head}<0"] for head in range(4)), 1e-9)
    with pytest.raises(InputError, match="encoder's or the decoder's"):
        attribute(t5, unit=dla_hooks.SourceTokens(sum="heads"))
    unit = dla_hooks.SourceTokens(heads=["L0X0", "L2X1"], sum="heads", top=None)
    close(attribute(t5, unit=unit)["<4"], by_head["L0X0<4"] + by_head["L2X1<4"], 1e-9)


def test_source_records_name_tokens_of_either_sequence(t5):
    tokenizer = tiny_tokenizer()
    result = direct_logit_attribution(
        t5.model, " cat sat on", ANSWER, unit="source", tokenizer=tokenizer, decoder_input=" dog"
    )
    assert result.encoder_tokens == [[" cat", " sat", " on"]]
    records = [record for record in result.records() if record["source"] is not None]
    named = {(r["kind"], r["source"], r["source_token"]) for r in records}
    assert ("cross_head", 2, " on") in named
    assert ("head", 1, " dog") in named
    assert {kind for kind, *_ in named} == {"head", "cross_head"}


def test_frames_are_named_by_their_number():
    model, given = made("whisper")
    result = direct_logit_attribution(model, given, ANSWER, unit="source")
    cross = [r for r in result.records() if r["kind"] == "cross_head"]
    assert cross
    assert all(r["source_token"] == f"<frame {r['source']}>" for r in cross)
    assert max(r["source"] for r in cross) < 16


def test_rows_padded_on_either_side_equal_rows_alone(t5):
    source, target = t5.given["input_ids"], t5.given["decoder_input_ids"]
    real, so_far = torch.ones_like(source), torch.ones_like(target)
    real[0, 6:], real[1, :3] = 0, 0
    so_far[0, :2], so_far[1, 4:] = 0, 0
    given = {"input_ids": source, "attention_mask": real,
             "decoder_input_ids": target, "decoder_attention_mask": so_far}  # fmt: skip
    unit = {"h": "head", "s": dla_hooks.SourceTokens(top=None)}
    both = direct_logit_attribution(t5.model, given, ANSWER, unit=unit)
    assert both["h"].positions.tolist() == [3, 3]
    for row in (0, 1):
        alone = {"input_ids": source[row][real[row] == 1],
                 "decoder_input_ids": target[row][so_far[row] == 1]}  # fmt: skip
        one = direct_logit_attribution(t5.model, alone, ANSWER, unit=unit)
        close(both["h"].prompt(row).attribution, one["h"].attribution, 1e-9)
        for label in ("L2X1<0", "L1X2<5", "L0H3<3"):
            close(both["s"].prompt(row)[label], one["s"][label], 1e-9)


def test_bias_behind_the_unembedding_is_in_the_bias(mbart):
    none = copy.deepcopy(mbart.model)
    none.final_logits_bias.zero_()
    with_it, without = attribute(mbart), attribute(SimpleNamespace(model=none, given=mbart.given))
    bias = mbart.model.final_logits_bias[0]
    close(with_it.bias - without.bias, (bias[ANSWER] - bias[INCORRECT]).expand(2, TARGET), 1e-9)
    close(with_it.attribution, without.attribution, 1e-9)
    logit = direct_logit_attribution(mbart.model, mbart.given, 9, pos=None)
    close(logit.logit, run(mbart.model, mbart.given)[..., 9], 1e-9)


def test_one_biased_token_is_enough(mbart):
    model = copy.deepcopy(mbart.model)
    model.final_logits_bias.zero_()
    model.final_logits_bias[0, 11] = 1e-3
    result = direct_logit_attribution(model, mbart.given, 11, pos=None)
    close(result.logit, run(model, mbart.given)[..., 11], 1e-9)
    model.final_logits_bias.zero_()
    without = direct_logit_attribution(model, mbart.given, 11, pos=None)
    close(result.bias - without.bias, torch.full((2, TARGET), 1e-3).double(), 1e-9)


def test_promoted_tokens_count_the_bias_behind_the_unembedding(mbart):
    found = dla_hooks.promoted_tokens(mbart.model, mbart.given, k=3)
    assert found.gap < 1e-9


@pytest.mark.parametrize("decoder_input", [None, " dog sat", [[4, 8]]])
def test_decoder_begins_by_the_models_own_custom(decoder_input):
    model, tokenizer = build("mbart", also={"forced_bos_token_id": 9}), tiny_tokenizer()
    result = direct_logit_attribution(
        model, " cat sat", " on", tokenizer=tokenizer, decoder_input=decoder_input
    )
    ids = {None: [START, 9], " dog sat": [START, 9, *tokenizer.encode(" dog sat")]}
    expected = ids[decoder_input] if not isinstance(decoder_input, list) else [4, 8]
    given = {"input_ids": torch.tensor([tokenizer.encode(" cat sat")]),
             "decoder_input_ids": torch.tensor([expected])}  # fmt: skip
    assert len(result.tokens[0]) == len(expected)
    close(result.logit, run(model, given)[:, -1, tokenizer.encode(" on")[0]], 1e-9)


def test_strings_of_different_lengths_equal_each_alone(mbart):
    tokenizer = tiny_tokenizer()
    texts, so_far = [" cat sat on", " dog"], [" the", " the dog sat"]
    options = {"unit": "head", "tokenizer": tokenizer}
    both = direct_logit_attribution(mbart.model, texts, " on", decoder_input=so_far, **options)
    for row in (0, 1):
        one = direct_logit_attribution(
            mbart.model, texts[row], " on", decoder_input=so_far[row], **options
        )
        close(both.prompt(row).attribution, one.attribution, 1e-9)


def test_a_mapping_of_strings_is_the_same_as_two_arguments(mbart):
    tokenizer = tiny_tokenizer()
    pair = {"input": " cat", "decoder_input": " dog"}
    one = direct_logit_attribution(mbart.model, pair, " on", tokenizer=tokenizer)
    plan = dla_hooks.prepare(mbart.model, " on", tokenizer=tokenizer)
    other = plan(" cat", decoder_input=" dog")
    close(one.attribution, other.attribution, 1e-12)


def test_tokens_that_follow_are_each_attributed(mbart):
    tokenizer = tiny_tokenizer()
    follows = dla_hooks.Continuation(" cat sat")
    result = direct_logit_attribution(mbart.model, " on", follows, tokenizer=tokenizer)
    first, second = tokenizer.encode(" cat sat")
    given = {"input_ids": torch.tensor([tokenizer.encode(" on")]),
             "decoder_input_ids": torch.tensor([[START, first]])}  # fmt: skip
    logits = run(mbart.model, given)[0]
    close(result.logit[0], torch.stack((logits[0, first], logits[1, second])), 1e-9)


@pytest.mark.parametrize("unit", ["component", "head", "source"])
def test_chunks_of_the_decoder_equal_one_run(mbart, unit):
    whole, pieces = attribute(mbart, unit=unit), attribute(mbart, unit=unit, chunk_size=2)
    close(pieces.total(), whole.total(), 1e-9)
    close(pieces.attribution, whole.attribution, 1e-9)


@pytest.mark.parametrize("unit", ["component", "source"])
def test_generated_tokens_are_those_of_generate(t5, unit):
    source = t5.given["input_ids"]
    result = dla_hooks.attribute_generation(
        t5.model, {"input_ids": source}, max_new_tokens=3, unit=unit
    )
    expected = t5.model.generate(source, max_new_tokens=3, do_sample=False)
    assert torch.equal(result.generated_ids, expected[:, 1:])
    logits = run(t5.model, {"input_ids": source, "decoder_input_ids": expected[:, :-1]})
    close(result.logit, logits.gather(-1, expected[:, 1:, None])[..., 0], 1e-9)


def test_generation_by_a_method_of_the_models_own_is_refused():
    model, given = made("whisper")
    with pytest.raises(UnsupportedModelError, match="generate of its own"):
        dla_hooks.attribute_generation(
            model, {"input_features": given["input_features"]}, max_new_tokens=2
        )


FORMS = {
    "output": lambda encoded: encoded,
    "tuple": lambda encoded: (encoded[0],),
    "mapping": lambda encoded: {"last_hidden_state": encoded[0]},
    "vectors": lambda encoded: encoded[0],
}


@pytest.mark.parametrize("name", ["t5", "nllb-moe", "switch_transformers", "t5gemma"])
@pytest.mark.parametrize("form", FORMS)
def test_output_of_an_encoder_stands_for_its_input(name, form):
    model, given = made(name)
    encoded = model.get_encoder()(given["input_ids"], output_router_logits=True)
    ids = given["decoder_input_ids"]
    asked = {"encoder_outputs": FORMS[form](encoded), "decoder_input_ids": ids}
    found, whole = (
        direct_logit_attribution(model, one, ANSWER, pos=None) for one in (asked, given)
    )
    close(found.attribution, whole.attribution, 1e-9)


@pytest.mark.parametrize("odd", [(), "text", torch.zeros(2, 5), torch.zeros(1, 9, 3)])
def test_output_of_an_encoder_without_vectors_is_refused(t5, odd):
    given = {"encoder_outputs": odd, "decoder_input_ids": t5.given["decoder_input_ids"]}
    with pytest.raises(InputError, match="encoder"):
        direct_logit_attribution(t5.model, given, ANSWER)


def test_ids_that_an_encoder_masks_are_those_that_were_given():
    model, given = made("m2m_100")  # counts positions by ids, and not by the mask
    mask = torch.ones_like(given["input_ids"])
    mask[0, -2:] = mask[1, -1] = 0
    asked = {**given, "attention_mask": mask}
    found = direct_logit_attribution(model, asked, ANSWER, pos=None)
    close(found.logit, run(model, asked)[..., ANSWER])


def test_chunks_of_a_decoder_whose_encoder_takes_no_cache():
    model, given = made("switch_transformers")
    found = direct_logit_attribution(model, given, ANSWER, pos=None, chunk_size=2)
    close(found.logit, run(model, given)[..., ANSWER])


def test_output_of_an_encoder_is_left_as_it_was_given():
    (case,) = by_name("speech").cases("moonshine_streaming")
    sound = case.asked["input_values"]
    encoded = case.model.get_encoder()(sound)
    before = encoded[0].detach().clone()
    given = {"encoder_outputs": encoded, "decoder_input_ids": case.asked["decoder_input_ids"]}
    for _ in range(2):  # its decoder adds positions in place
        found = direct_logit_attribution(case.model, given, ANSWER, pos=None)
        close(found.logit, case.logits[..., ANSWER], 1e-9)
    assert torch.equal(encoded[0], before)


def test_hook_on_an_unembedding_whose_input_is_scaled():
    model, given = made("t5")  # scales what its head reads, so that the head's output counts whole
    plan = dla_hooks.prepare(model, ANSWER)
    without = run(model, given)[:, -1, ANSWER]
    handle = model.lm_head.register_forward_hook(lambda module, args, out: 1.5 * out + 2)
    found = plan(given)
    close(found.logit, 1.5 * without + 2)
    close(found["logit_hook"], 0.5 * without + 2)
    other = copy.deepcopy(model)
    other.lm_head._forward_hooks.clear()
    difference = dla_hooks.compare(model, other, given, ANSWER)
    close(difference["logit_hook"], 0.5 * without + 2)
    handle.remove()
    close(plan(given).logit, without)


def test_effect_of_a_cross_head_is_that_of_its_ablation(t5):
    found = dla_hooks.effects(t5.model, t5.given, ANSWER, INCORRECT, parts=["L1X2"], unit="head")
    linear = t5.oracle.blocks[1].get_submodule("layer.1.EncDecAttention.o")
    width = linear.weight.shape[1] // 4

    def hook(_, args):
        return (args[0].index_fill(-1, torch.arange(2 * width, 3 * width), 0),)

    handle = linear.register_forward_pre_hook(hook)
    changed = run(t5.model, t5.given)
    handle.remove()
    lost = (t5.oracle.logits - changed)[:, -1]
    total = [record["total"] for record in found.records()]
    close(torch.tensor(total, dtype=torch.float64), lost[:, ANSWER] - lost[:, INCORRECT], 1e-9)


def test_comparison_of_two_sources_adds_up(t5):
    other = {**t5.given, "input_ids": t5.given["input_ids"].flip(0)}
    found = dla_hooks.compare(
        t5.model, t5.model, t5.given, other_input=other, answer_tokens=ANSWER, unit="head"
    )
    assert found.gap < 1e-9
    with pytest.raises(UnsupportedModelError, match="known after the run"):
        dla_hooks.compare(
            t5.model, t5.model, t5.given, other_input=other, answer_tokens=ANSWER,
            unit=dla_hooks.SourceTokens(top=None),
        )  # fmt: skip


def test_stacked_heads_are_called_as_rows_are(t5):
    _, labels = dla_hooks.stack_head_results(t5.model, t5.given, return_labels=True)
    assert labels == attribute(t5, unit="head").labels[:-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_of_the_decoder_are_rows(t5):
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(t5.model)
    config = peft.LoraConfig(r=2, target_modules=["o"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, config).double().eval()
    found = direct_logit_attribution(
        adapted, t5.given, ANSWER, unit=("component", "adapter", "head"), pos=None
    )
    close(found["component"].logit, run(adapted, t5.given)[..., ANSWER], 1e-9)
    close(
        found["component"]["1_cross_attn_out"],
        found["adapter"]["1_cross_attn_out[base]"] + found["adapter"]["1_cross_attn_out[default]"],
        1e-9,
    )


def test_encoder_runs_once_in_a_call_and_never_for_measuring():
    model, given = made("whisper")
    calls = []
    model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    for n in (1, 2):
        direct_logit_attribution(model, given, ANSWER, unit=("head", "source"))
        assert len(calls) == n


def test_model_is_left_as_it_was_found(t5):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in t5.model.modules())

    before, state = hooks(), torch.get_rng_state()
    attribute(t5, unit="source")
    bad = {**t5.given, "attention_mask": torch.ones(2, 3)}
    with pytest.raises(InputError):
        direct_logit_attribution(t5.model, bad, ANSWER)
    assert hooks() == before
    assert torch.equal(torch.get_rng_state(), state)


REFUSED_INPUTS = {
    "labels": ({"labels": [[5]]}, InputError, "decoder_input_ids"),
    "pixels": ({"pixel_values": torch.zeros(1)}, InputError, "does not take"),
    "batches": ({"decoder_input_ids": [[5], [6], [7]]}, ShapeMismatchError, "as many of both"),
    "two decoders": ({"decoder_input_ids": [[5], [6]], "decoder_input": " a"}, InputError, "one"),
    "vocabulary": ({"input_ids": [[5], [600]]}, TokenError, "600"),
    "decoder vocabulary": ({"decoder_input_ids": [[5], [600]]}, TokenError, "600"),
    "no encoder": ({"input_ids": None}, InputError, "nothing for the encoder"),
}


@pytest.mark.parametrize("name", REFUSED_INPUTS)
def test_odd_inputs_are_refused(t5, name):
    more, kind, said = REFUSED_INPUTS[name]
    if name in ("two decoders", "batches", "decoder vocabulary"):
        given = {"input_ids": t5.given["input_ids"], **more}
    else:
        given = {**t5.given, **more}
    with pytest.raises(kind, match=said):
        direct_logit_attribution(t5.model, given, ANSWER)


def test_what_has_no_meaning_for_two_sequences_is_refused(t5, mbart):
    tokenizer = tiny_tokenizer()
    ask = {"tokenizer": tokenizer}
    for options, said in (
        ({"prepend_bos": True}, "prepend_bos"),
        ({"pos": dla_hooks.Span(" cat")}, "reads two"),
        ({"unit": "head", "fold_value_biases": True}, "read what an encoder puts out"),
    ):
        with pytest.raises((InputError, UnsupportedModelError), match=said):
            direct_logit_attribution(t5.model, " cat", " dog", **ask, **options)
    with pytest.raises(UnsupportedModelError, match="no place"):
        dla_hooks.wrap(t5.model, tokenizer)
    with pytest.raises(UnsupportedModelError, match="attribute_many takes prompts of one text"):
        dla_hooks.attribute_many(t5.model, [" cat"], " dog", tokenizer=tokenizer)
    with pytest.raises(InputError, match="nothing in the decoder's stream wrote it"):
        dla_hooks.upstream(t5.model, t5.given, ANSWER, part="L1X2<3")
    with pytest.raises(LabelError, match="L9X0|layers 0 to 2"):
        dla_hooks.effects(t5.model, t5.given, ANSWER, parts=["L9X0"], unit="head")
    mask = torch.ones(2, TARGET)
    mask[0, :2] = 0
    given = {**mbart.given, "decoder_attention_mask": mask}
    with pytest.raises(UnsupportedModelError, match="padded on the left"):
        direct_logit_attribution(mbart.model, given, ANSWER)


def test_decoder_input_of_a_model_without_encoder_is_refused():
    model, tokenizer = dla_hooks.demo.load()
    with pytest.raises(InputError, match="no encoder-decoder"):
        direct_logit_attribution(
            model, "The dog", " is", tokenizer=tokenizer, decoder_input=" runs"
        )


def test_speech_without_sound_is_refused():
    model, _ = made("whisper")
    with pytest.raises(InputError, match="input_features"):
        direct_logit_attribution(model, " cat", ANSWER, tokenizer=tiny_tokenizer())


def test_post_norm_decoders_are_refused_with_the_reason():
    with pytest.raises(UnsupportedModelError, match="norms the sum itself"):
        direct_logit_attribution(build("bart"), inputs(), ANSWER)


def test_command_attributes_an_encoder_decoder_from_a_folder(tmp_path):
    model, tokenizer = build("t5").float(), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = ["attribute", str(tmp_path), " cat sat", "--answer", " on", "--decoder-input", " dog"]
    done = CliRunner().invoke(app, [*asked, "--unit", "head", "--json", "-"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    expected = direct_logit_attribution(
        model, " cat sat", " on", decoder_input=" dog", unit="head", tokenizer=tokenizer
    )
    assert found["labels"] == expected.labels
    close(torch.tensor(found["attribution"]), expected.attribution)


def test_speech_model_is_loaded_from_its_folder(tmp_path):
    model, given = made("whisper")
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "float64")
    assert type(loaded) is type(model)
    one, other = (direct_logit_attribution(m, given, ANSWER) for m in (model, loaded))
    close(one.attribution, other.attribution, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("door", ["seq2seq", "speech"])
def test_every_type_is_right_or_refused(door, seed):
    survey = pytest.importorskip("survey")
    found = {name: survey.survey_type(name, seed, door=door) for name in by_name(door).model_types}
    assert [name for name, one in found.items() if one.verdict == "WRONG"] == []
    right = [name for name, one in found.items() if one.verdict == "right"]
    assert len(right) >= {"seq2seq": 17, "speech": 10}[door]


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["mbart", "whisper", "m2m_100"])
def test_sources_are_the_same_by_either_implementation(name, attn):
    door = "speech" if name == "whisper" else "seq2seq"
    (case,) = by_name(door).cases(name, attn=attn)
    unit = dla_hooks.SourceTokens(top=None)
    result = direct_logit_attribution(case.model, case.asked, ANSWER, unit=unit, pos=None)
    close(result.total() + result.bias, case.logits[..., ANSWER], 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "mbart"])
def test_offloaded_weights_give_the_same_numbers(name):
    accelerate = pytest.importorskip("accelerate")
    (case,) = by_name("seq2seq").cases(name)
    options = {"unit": ("component", "head", "source"), "pos": None}
    plain = direct_logit_attribution(case.model, case.asked, ANSWER, **options)
    accelerate.cpu_offload(case.model)
    found = direct_logit_attribution(case.model, case.asked, ANSWER, **options)
    for key, result in plain.items():
        assert torch.equal(found[key].attribution, result.attribution)
