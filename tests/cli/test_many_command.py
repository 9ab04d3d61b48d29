"""``dla-hooks many``: files of prompts in, lines and means out."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import dla_hooks
from dla_hooks import demo
from dla_hooks.cli.app import app

PROMPTS = ["The keys near the cabinet", "The dogs", "The key near the cars"]
ANSWERS, WRONG = [" are", " are", " is"], [" is", " is", " are"]


@pytest.fixture(scope="module")
def model():
    return demo.load()


def call(*args, **more):
    return CliRunner().invoke(
        app, [str(arg) for arg in args], env={"NO_COLOR": "1", "COLUMNS": "100"}, **more
    )


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def jsonl(path, **columns):
    rows = zip(*columns.values(), strict=True)
    text = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    return jsonl(tmp_path / "p.jsonl", prompt=PROMPTS, answer=ANSWERS, incorrect=WRONG)


def alone(model, number, pos=-1):
    net, tokenizer = model
    return dla_hooks.direct_logit_attribution(
        net, PROMPTS[number], ANSWERS[number], WRONG[number], pos=pos, tokenizer=tokenizer
    )


def test_lines_hold_the_numbers_of_each_prompt_alone(model, file):
    done = call("many", "demo", file, "-o", "-")
    assert done.exit_code == 0, done.output
    found = lines_of(done.stdout)
    assert [line["prompt_index"] for line in found] == [0, 1, 2]
    for number, line in enumerate(found):
        expected = alone(model, number).attribution
        assert torch.allclose(torch.tensor(line["attribution"]), expected, atol=1e-4)
        assert line["answer"] == [ANSWERS[number]]


def test_csv_and_stdin_are_read_as_jsonl_is(file, tmp_path):
    rows = zip(PROMPTS, ANSWERS, WRONG, strict=True)
    text = "prompt,answer,incorrect\n" + "".join(",".join(row) + "\n" for row in rows)
    table = tmp_path / "p.csv"
    table.write_text(text, encoding="utf-8")
    whole = call("many", "demo", file, "-o", "-").stdout
    assert call("many", "demo", table, "-o", "-").stdout == whole
    assert call("many", "demo", "-", "-o", "-", input=text).stdout == whole
    assert call("many", "demo", "-", "-o", "-", input=file.read_text()).stdout == whole


def test_positions_of_each_prompt_are_followed(model, tmp_path):
    where = [1, 0, -2]
    path = jsonl(
        tmp_path / "p.jsonl", prompt=PROMPTS, answer=ANSWERS, incorrect=WRONG, position=where
    )
    for number, line in enumerate(lines_of(call("many", "demo", path, "-o", "-").stdout)):
        expected = alone(model, number, where[number]).attribution
        assert torch.allclose(torch.tensor(line["attribution"]), expected, atol=1e-4)


def test_a_folder_holds_lines_and_means_and_is_gone_on_from(model, file, tmp_path, monkeypatch):
    folder = tmp_path / "found"
    done = call("many", "demo", file, "-o", folder)
    assert done.exit_code == 0, done.output
    means = dla_hooks.load(folder / "summary.safetensors")
    expected = torch.stack([alone(model, i).attribution[:, 0] for i in range(3)]).double().mean(0)
    assert torch.allclose(means.mean, expected, atol=1e-4)
    assert means.n == 3
    assert "mean of logit differences over 3 prompts" in done.stdout
    lines = (folder / "results.jsonl").read_text()

    def ran(*_, **__):
        raise AssertionError("a finished prompt ran again")

    monkeypatch.setattr("dla_hooks.attribution.measure", ran)
    again = call("many", "demo", file, "-o", folder)
    assert again.exit_code == 0, again.output
    assert [line["attribution"] for line in lines_of((folder / "results.jsonl").read_text())] == [
        line["attribution"] for line in lines_of(lines)
    ]


def test_a_prompt_that_fails_is_said_and_does_not_stop_the_rest(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", prompt=["The dogs", "The key"], answer=[" are", " a b c"])
    out = tmp_path / "out.jsonl"
    done = call("many", "demo", path, "-o", out)
    assert done.exit_code == 0, done.output
    assert "prompt 1 failed" in done.stderr
    assert "(1 more failed)" in done.stdout
    found = lines_of(out.read_text())
    assert "error" not in found[0]
    assert "tokens" in found[1]["error"] or "vocabulary" in found[1]["error"]


def test_answers_left_out_are_the_top_tokens_and_are_said(model, tmp_path):
    net, tokenizer = model
    path = jsonl(tmp_path / "p.jsonl", prompt=PROMPTS)
    done = call("many", "demo", path)
    assert "the answer of each prompt is the model's own top token" in done.stdout
    found = lines_of(call("many", "demo", path, "-o", "-").stdout)
    for prompt, line in zip(PROMPTS, found, strict=True):
        result = dla_hooks.direct_logit_attribution(net, prompt, dla_hooks.TOP, tokenizer=tokenizer)
        assert line["answer"] == result.answer


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no prompt"),
        ("nonsense\n", "line 1 is no JSON"),
        ("[1]\n", "line 1 must be an object"),
        ('{"text": "a"}\n', "no column 'prompt'; it has 'text'"),
        ('{"prompt": 3}\n', "line 1: the prompt must be text"),
        ('{"prompt": "a", "answer": " b"}\n\n{"prompt": "a"}\n', "line 3 has no 'answer'"),
        ('{"prompt": "a", "answr": " b"}\n', "call it 'answer'"),
        ('{"prompt": "a", " answer": " b"}\n', "call it 'answer'"),
        ('{"prompt": "a", "Position": 1}\n', "call it 'position'"),
        ('{"prompt": "a", "position": "x"}\n', "line 1: a position is an int"),
    ],
)
def test_files_that_cannot_be_read_are_refused_before_loading(tmp_path, text, words):
    path = tmp_path / "p.jsonl"
    path.write_text(text, encoding="utf-8")
    done = call("many", "never-loaded", path)
    assert done.exit_code == 1
    assert words in done.stderr


def test_a_folder_is_not_named_as_a_file_of_another_kind(file, tmp_path):
    done = call("many", "never-loaded", file, "-o", tmp_path / "found.csv")
    assert done.exit_code == 1
    assert "a folder or a .jsonl file" in done.stderr
    assert not (tmp_path / "found.csv").exists()


def test_columns_of_other_things_are_left_alone(tmp_path):
    from dla_hooks.cli import tables

    path = tmp_path / "p.csv"
    path.write_text("id,prompt,correct,answer,answers\n1,The key,yes, is,x\n", encoding="utf-8")
    assert tables.read(path) == tables.Table(["The key"], [" is"], None, None)


def test_an_option_and_a_column_that_say_the_same_are_refused(file):
    done = call("many", "never-loaded", file, "--answer", " are")
    assert done.exit_code == 1
    assert "--answer goes with a file without a column 'answer'" in done.stderr
