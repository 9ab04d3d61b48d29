"""``dla-hooks report``, as a user runs it."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

import dla_hooks.checkpoint
from dla_hooks.cli.app import app

PROMPT = "The keys near the cabinet"


def call(*arguments):
    given = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, ["report", "demo", *given], env={"NO_COLOR": "1"})


def content(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="content">(.*?)</script>', text, re.DOTALL)[1])


def test_page_is_written_with_the_command_that_makes_it_again(tmp_path):
    path = tmp_path / "page.html"
    done = call(PROMPT, "--answer", " are", "--incorrect", " is", "-o", path)
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert f"wrote {path}" in done.stderr.replace("\n", "")
    page = content(path)["pages"][0]
    assert "".join(page["tokens"]) == PROMPT
    assert page["reproduce"]["command"].startswith(f"dla-hooks report demo '{PROMPT}' ")


def test_several_prompts_units_and_positions_are_followed(tmp_path):
    path = tmp_path / "page.html"
    options = ("--unit", "component", "--unit", "head", "--pos", "1:3", "--title", "Two <prompts>")
    done = call(PROMPT, "The dogs near", "--answer", " are", *options, "-o", path)
    assert done.exit_code == 0, done.output
    pages = content(path)["pages"]
    assert [page["spots"] for page in pages] == [[1, 2], [1, 2]]
    assert [unit["key"] for unit in pages[0]["units"]] == ["component", "head"]
    assert "<title>Two &lt;prompts&gt;</title>" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-o", "no/such/folder/x.html"), "there is no folder"),
        (("-o", "page.pdf"), "a page is written as .html"),
        (("--answer", " is", "--answer", " was"), "--answer is given 3 times for 1 prompt"),
        (("--pos", "x"), "none of: an int"),
    ],
)
def test_bad_options_are_refused_before_loading(options, words, monkeypatch):
    monkeypatch.setattr(dla_hooks.checkpoint, "load_model", None)
    done = call(PROMPT, "--answer", " are", *options)
    assert done.exit_code in (1, 2)
    assert words in " ".join(done.output.split())
