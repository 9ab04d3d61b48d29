"""The object that engines map over batches: columns in, columns out."""

from __future__ import annotations

import math
import pickle

import numpy
import pytest
import torch
from many_prompts import random_prompts
from zoo import build

import dla_hooks
from dla_hooks import (
    TOP,
    Attributor,
    CheckpointError,
    DLAError,
    InputError,
    PerRow,
    attribute_many,
    direct_logit_attribution,
    summarize,
    summarize_rows,
)

PROMPTS = ["The keys near the cabinet", "", "The dog", "The dogs behind the car"]
BATCH = {"id": [3, 1, 4, 15], "prompt": PROMPTS}


@pytest.fixture(scope="module")
def demo():
    return dla_hooks.demo.load()


def attributor(**options):
    return Attributor(dla_hooks.demo.path(), **{"answer": " are", **options})


@pytest.mark.parametrize("unit", ["component", "layer", "head"])
def test_columns_hold_the_results_of_attribute_many(demo, unit):
    model, tokenizer = demo
    found = attributor(unit=unit, incorrect=" is")(BATCH)
    results = list(attribute_many(model, PROMPTS, " are", " is", unit=unit, tokenizer=tokenizer))
    assert found["id"] == BATCH["id"]
    assert found["prompt"] == PROMPTS
    for place, result in enumerate(results):
        if isinstance(result, DLAError):
            assert found["error"][place] == f"InputError: {result}"
            assert math.isnan(found["logit"][place])
            assert found["about"][place] == ""
            continue
        assert found["error"][place] == ""
        assert found["attribution"][place] == result.attribution[:, 0].tolist()
        for name in ("bias", "logit"):
            assert found[name][place] == getattr(result, name).item()
        assert found["gap"][place] == result.gap
    means, expected = summarize_rows(found), summarize(results)
    assert (means.n, means.n_failed, means.labels) == (3, 1, expected.labels)
    for name in ("mean", "standard_error"):
        pair = (getattr(one, name) for one in (means, expected))
        torch.testing.assert_close(*pair, rtol=0, atol=1e-12)
    assert (means.bias, means.logit) == pytest.approx((expected.bias, expected.logit), abs=1e-12)
    assert means.model == expected.model


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gemma2", "granite", "gpt_neox-parallel", "mixtral"]
)
def test_families_have_the_numbers_of_their_prompts_alone(family, seed, tmp_path):
    model = build(family, seed, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    prompts = random_prompts((5, 3, 9), seed)
    made = Attributor(tmp_path, unit="head", answer=7, incorrect=9)
    found = made({"input_ids": [ids.tolist() for ids in prompts]})
    assert found["error"] == [""] * 3
    for ids, numbers in zip(prompts, found["attribution"], strict=True):
        alone = direct_logit_attribution(model, ids, 7, 9, unit="head")
        torch.testing.assert_close(
            torch.tensor(numbers), alone.attribution[:, 0], rtol=1e-4, atol=1e-5
        )
        assert made.labels == alone.labels


def test_each_row_may_bring_its_own_question(demo):
    model, tokenizer = demo
    batch = {
        "text": ["The keys near the cabinet", "The dog behind the cars", "The key"],
        "verb": [" are", None, " is"],
        "position": [1, -1, 0],
    }
    found = attributor(answer=None, columns={"prompt": "text", "answer": "verb"})(batch)
    assert found["error"] == ["", "InputError: the row has no 'verb'", ""]
    for place in (0, 2):
        alone = direct_logit_attribution(
            model, batch["text"][place], batch["verb"][place], pos=batch["position"][place],
            tokenizer=tokenizer,
        )  # fmt: skip
        torch.testing.assert_close(
            torch.tensor(found["attribution"][place]), alone.attribution[:, 0]
        )


def test_several_positions_are_lists_and_one_sample(demo):
    model, tokenizer = demo
    for options, batch, pos in (
        ({"pos": None}, BATCH, None),
        ({}, {**BATCH, "position": [[1, 2], [0], [0], [-1]]}, PerRow([[1, 2], [0, 1], [0, 1]])),
    ):
        found = attributor(**options)(batch)
        assert [len(bias) for bias in found["bias"]][1] == 1
        if pos is None:
            results = attribute_many(model, PROMPTS, " are", pos=None, tokenizer=tokenizer)
            expected = summarize(results)
            torch.testing.assert_close(summarize_rows(found).mean, expected.mean)
            assert [len(row[0]) for row in found["attribution"]] == [5, 1, 2, 5]
        else:
            assert [len(row[0]) for row in found["attribution"]] == [2, 1, 1, 1]


def test_ranked_rows_are_lists_with_their_labels(demo):
    model, tokenizer = demo
    result = direct_logit_attribution(model, PROMPTS[0], TOP, unit="neuron", tokenizer=tokenizer)
    found = attributor(answer=TOP, unit="neuron", means=True)({"prompt": PROMPTS})
    kept = dict(zip(found["kept"][0], found["attribution"][0], strict=True))
    for label, value in kept.items():
        torch.testing.assert_close(torch.tensor([value]), result[label])
    results = attribute_many(model, PROMPTS, TOP, unit="neuron", tokenizer=tokenizer)
    expected = summarize(results)
    means = summarize_rows(found)
    assert means.labels == expected.labels
    torch.testing.assert_close(means.mean, expected.mean)
    without = attributor(answer=TOP, unit="neuron")({"prompt": PROMPTS})
    with pytest.raises(InputError, match="means=True"):
        summarize_rows(without)


def test_batches_of_any_form_come_back_in_it():
    expected = attributor()({"id": [1, 2], "prompt": PROMPTS[2:]})
    made = attributor()
    arrays = made({"id": numpy.array([1, 2]), "prompt": numpy.array(PROMPTS[2:], dtype=object)})
    assert isinstance(arrays["id"], numpy.ndarray)
    assert arrays["attribution"] == expected["attribution"]
    pandas = pytest.importorskip("pandas")
    frame = made(pandas.DataFrame({"id": [1, 2], "prompt": PROMPTS[2:]}))
    assert frame["attribution"] == expected["attribution"]
    pyarrow = pytest.importorskip("pyarrow")
    table = made(pyarrow.table({"id": [1, 2], "prompt": PROMPTS[2:]}))
    assert table.column("attribution").to_pylist() == expected["attribution"]
    assert summarize_rows(table).n == summarize_rows(frame).n == 2


def test_padded_ids_and_numbers_that_numpy_made_floats_are_read(demo):
    model, _ = demo
    ids = numpy.array([[5, 6, 7, 0], [8, 9, 10, 11]])
    mask = numpy.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "answer": numpy.array([3.0, numpy.nan])}
    found = attributor(answer=None)(batch)
    alone = direct_logit_attribution(model, torch.tensor(ids[0, :3]), 3)
    torch.testing.assert_close(torch.tensor(found["attribution"][0]), alone.attribution[:, 0])
    assert found["error"][1] == "InputError: the row has no 'answer'"


def test_pickled_object_is_a_folder_and_options_with_one_fingerprint():
    one = attributor(unit="head")
    before = pickle.dumps(one)
    expected = one(BATCH)
    assert pickle.dumps(one) == before
    assert len(before) < 2000
    assert pickle.loads(before)(BATCH)["attribution"][0] == expected["attribution"][0]


def test_model_is_loaded_once_and_tried_once(monkeypatch):
    made = attributor()
    calls = []
    load = dla_hooks.checkpoint.load
    monkeypatch.setattr(
        dla_hooks.checkpoint,
        "load",
        lambda *args, **more: calls.append(args) or load(*args, **more),
    )
    for _ in range(3):
        made(BATCH)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("options", "batch", "said"),
    [
        ({}, {"id": [1]}, "no column 'prompt' (texts) or 'input_ids' (token ids); the columns are"),
        ({}, {"prompt": ["a"], "input_ids": [[1]]}, "both 'prompt' and 'input_ids'"),
        ({"answer": None}, {"prompt": ["a"]}, "no column 'answer', and no answer= for all rows"),
        ({}, {"prompt": ["a"], "answer": [" is"]}, "answer= is for rows without a column 'answer'"),
        ({"pos": 0}, {"prompt": ["a"], "position": [1]}, "pos= is for rows without a column"),
        ({}, {"prompt": ["a"], "logit": [1.0]}, "the column 'logit' would be written over"),
        ({}, ["The keys"], "a batch must be a mapping of columns"),
    ],
)
def test_wrong_columns_are_refused_by_name(options, batch, said):
    with pytest.raises(InputError) as caught:
        attributor(**options)(batch)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"checkpoint": "/nowhere/x"}, CheckpointError, "there is no folder /nowhere/x"),
        ({"adapter": "/nowhere/y"}, CheckpointError, "there is no adapter in /nowhere/y"),
        ({"unit": ("head", "layer")}, InputError, "an Attributor has one unit"),
        ({"dtype": "int3"}, InputError, "dtype must be one of"),
        ({"device": "cpu", "device_map": "auto"}, InputError, "both say where the weights go"),
        ({"pos": PerRow([1])}, InputError, "go in a column 'position'"),
        ({"max_tokens": 0}, InputError, "max_tokens must be an int"),
        ({"columns": {"promt": "text"}}, InputError, "columns names 'promt'"),
    ],
)
def test_wrong_options_are_refused_when_it_is_made(options, error, said):
    options = {"checkpoint": dla_hooks.demo.path(), "answer": " are", **options}
    with pytest.raises(error) as caught:
        Attributor(**options)
    assert said in str(caught.value)


def test_types_that_do_not_fit_are_refused_before_a_sweep():
    made = attributor()
    made.check(["prompt", "id"])
    made.check({"prompt": "string"})
    with pytest.raises(InputError, match="must hold texts, and is int64"):
        made.check({"prompt": "int64"})
    with pytest.raises(InputError, match="columns must be names, a schema or features"):
        made.check("prompt")


def test_row_of_another_type_and_row_out_of_memory_fail_by_themselves(monkeypatch):
    made = attributor()
    found = made({"prompt": ["The keys", 5, None, "The dog"]})
    assert [bool(error) for error in found["error"]] == [False, True, True, False]
    assert "a prompt must be a string" in found["error"][1]
    model, _ = made._load(None)

    def small_machine(_, args, kwargs):
        if kwargs["input_ids"].shape[1] > 4:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you …")

    handle = model.register_forward_pre_hook(small_machine, with_kwargs=True)
    found = made({"prompt": ["The keys near the cabinet", "The dog"]})
    handle.remove()
    assert "runs out of memory by itself" in found["error"][0]
    assert found["error"][1] == ""


def test_columns_that_are_not_kept_are_left_out():
    found = attributor(keep=["id"])(BATCH)
    assert "prompt" not in found
    assert found["id"] == BATCH["id"]
    taken = attributor(keep=["id"])({**BATCH, "logit": [0, 0, 0, 0]})
    assert taken["logit"] == pytest.approx(found["logit"], nan_ok=True)


@pytest.mark.slow  # peft takes seconds to import
@pytest.mark.filterwarnings("ignore")
def test_adapter_is_put_on(tmp_path):
    peft = pytest.importorskip("peft")
    model = build("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    found = Attributor(tmp_path / "model", adapter=tmp_path / "adapter", answer=7)(
        {"input_ids": [[5, 6, 8]]}
    )
    plain = Attributor(tmp_path / "model", answer=7)({"input_ids": [[5, 6, 8]]})
    expected = direct_logit_attribution(wrapped.eval(), torch.tensor([5, 6, 8]), 7)
    torch.testing.assert_close(torch.tensor(found["attribution"][0]), expected.attribution[:, 0])
    mixed = [{name: own[0] for name, own in rows.items()} for rows in (found, plain)]
    with pytest.raises(InputError, match=r"some are of model \(.*others of model with adapter \("):
        summarize_rows(reversed(mixed))
