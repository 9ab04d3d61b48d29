"""A folder is loaded by the class that it was saved from: with its own head, or not at all."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2DoubleHeadsModel,
)
from typer.testing import CliRunner
from zoo import BY_NAME as SPECS
from zoo import _config, _randomise, tiny_tokenizer

from dla_hooks import CheckpointError, direct_logit_attribution
from dla_hooks.checkpoint import labels, load, load_model
from dla_hooks.cli.app import app

PROMPT = "The cat sat on the mat"
NAMES = {0: "bad", 1: "fair", 2: "good"}


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"NO_COLOR": "1"})


def save(auto, family, folder):
    config = _config(SPECS[family])
    config.pad_token_id = config.vocab_size - 1  # which the prompt does not end with
    if auto is not AutoModelForQuestionAnswering:
        config.id2label, config.label2id = dict(NAMES), {name: i for i, name in NAMES.items()}
    make = auto if auto is GPT2DoubleHeadsModel else auto.from_config
    with torch.random.fork_rng(devices=[]):
        model = make(config).eval()
    _randomise(model, torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return save(AutoModelForSequenceClassification, "gpt2", folder), folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "copy")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "auto",
    [
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoModelForQuestionAnswering,
        AutoModelForCausalLM,
    ],
    ids=lambda auto: auto.__name__,
)
@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_folder_comes_back_as_the_class_that_was_saved(auto, family, tmp_path):
    model = save(auto, family, tmp_path)
    found = load_model(tmp_path)
    assert type(found) is type(model)
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_masked_language_model_comes_back_as_one(tmp_path):
    from transformers import EuroBertConfig

    config = EuroBertConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=2, bos_token_id=0,
        eos_token_id=1, mask_token_id=3,
    )  # fmt: skip
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path, "float64")
    assert type(model).__name__ == "EuroBertForMaskedLM"
    assert tokenizer is None
    ids = torch.tensor([[5, 3, 9, 11]])
    with torch.no_grad():
        expected = model(ids).logits[:, 1, 7]
    result = direct_logit_attribution(model, ids, 7, pos=1)
    torch.testing.assert_close(result.total() + result.bias, expected, rtol=1e-6, atol=1e-6)


def test_double_heads_come_back_as_their_language_model(tmp_path):
    model = save(GPT2DoubleHeadsModel, "gpt2", tmp_path)
    found, ids = load_model(tmp_path), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)


def test_labels_of_a_folder_are_read_off_its_config(saved, tmp_path):
    assert labels(saved[1]) == NAMES
    save(AutoModelForQuestionAnswering, "gpt2", tmp_path / "span")
    assert labels(tmp_path / "span") == {0: "start", 1: "end"}
    save(AutoModelForCausalLM, "gpt2", tmp_path / "tokens")
    assert labels(tmp_path / "tokens") is None


def test_classifier_without_its_head_is_refused(copy):
    edit_weights(copy, lambda weights: weights.pop("score.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 of .*\(score\.weight\).*ForSequenceClass"):
        load_model(copy)


def test_head_of_another_number_of_labels_is_refused(copy):
    edit_weights(copy, lambda weights: weights.update({"score.weight": torch.zeros(4, 32)}))
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        load_model(copy)


@pytest.mark.parametrize("named", [None, ["GPT2LMHeadModel"], ["MadeUp"]])
def test_head_that_the_config_does_not_name_is_refused(copy, named):
    """GPT-2's unembedding is tied, so that nothing is missing: it would load without a word."""
    edit_config(copy, architectures=named)
    with pytest.raises(CheckpointError, match=r"holds a head of labels \(score\.weight\)"):
        load_model(copy)


def test_language_model_named_as_a_classifier_is_refused(tmp_path):
    save(AutoModelForCausalLM, "gpt2", tmp_path)
    edit_config(tmp_path, architectures=["GPT2ForSequenceClassification"])
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize("label", ["good", "2"])
def test_command_line_attributes_a_label_by_name_or_index(saved, label):
    model, folder = saved
    ids = tiny_tokenizer()(PROMPT, return_tensors="pt").input_ids
    found = call(
        "attribute", folder, PROMPT, "--answer", label, "--incorrect", "bad", "--json", "-"
    )
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    with torch.no_grad():
        logits = model(ids).logits[0]
    assert "good" in found.stdout
    assert data["logit"][0] == pytest.approx(float(logits[2] - logits[0]), abs=1e-4)


def test_command_line_takes_the_top_label_by_default(saved):
    model, folder = saved
    ids = tiny_tokenizer()(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        top = NAMES[int(model(ids).logits[0].argmax())]
    assert f"'{top}' at the last token" in call("attribute", folder, PROMPT).stdout


def test_command_line_refuses_what_is_no_label_before_it_reads_weights(saved, monkeypatch):
    monkeypatch.setattr("dla_hooks.checkpoint.load_model", lambda *_, **__: pytest.fail("loaded"))
    found = call("attribute", saved[1], PROMPT, "--answer", " Paris")
    assert found.exit_code != 0
    said = " ".join(found.output.split())
    assert "' Paris' is no label of the model; its labels are 'bad', 'fair', 'good'" in said


@pytest.mark.parametrize("command", ["effects", "promote", "compare"])
def test_commands_work_on_labels(saved, command):
    more = ["--other-prompt", PROMPT[:-3]] if command == "compare" else []
    answer = [] if command == "promote" else ["--answer", "good"]
    found = call(command, saved[1], PROMPT, *answer, *more)
    assert found.exit_code == 0, found.output
    assert "'good'" in found.stdout


def test_list_names_the_types_behind_a_door():
    def types(*args):
        found = call("list", *args, "--json", "-")
        assert found.exit_code == 0, found.output
        return {line["model_type"]: line for line in json.loads(found.stdout)}

    classifiers = types("--door", "classification")
    assert classifiers["llama"]["class"] == "LlamaForSequenceClassification"
    assert "megatron-bert" not in classifiers
    assert "megatron-bert" in types("--door", "token-classification")
    assert set(types("--door", "masked")) == {"eurobert", "mbart"}
    assert set(classifiers) <= set(types())
    assert set(types("--door", "classification", "qwen")) < set(classifiers)


def test_list_refuses_a_door_that_is_none():
    found = call("list", "--door", "front")
    assert found.exit_code != 0
    assert "must be one of causal, seq2seq" in " ".join(found.output.split())
