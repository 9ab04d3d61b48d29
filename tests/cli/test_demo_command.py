"""``dla-hooks demo``: what it prints is measured, and its page opens."""

from __future__ import annotations

import json
import re
import webbrowser

import pytest
from typer.testing import CliRunner

import dla_hooks
from dla_hooks.cli.app import app
from dla_hooks.demo.stories import stories


def call(*given: object):
    return CliRunner().invoke(
        app, ["demo", *map(str, given)], env={"NO_COLOR": "1", "COLUMNS": "80"}
    )


@pytest.fixture(scope="module")
def printed() -> str:
    done = call()
    assert done.exit_code == 0
    return done.stdout


ROW = re.compile(
    r"^  (L\dH\d) +([-+]\d+\.\d\d) .*?('.+?') \((\d+)\) +([-+]\d+\.\d\d) +([-+]\d+\.\d\d)$", re.M
)


def test_rows_of_heads_are_what_heads_wrote_and_took_and_what_is_lost_without(printed):
    model, tokenizer = dla_hooks.demo.load()
    for title, told in zip(
        dict.fromkeys(one.title for one in stories()), stories()[::2], strict=True
    ):
        one = told.example
        text = printed.partition(title)[2].partition("\ngap ")[0]
        rows = ROW.findall(text)
        assert len(rows) == 4
        asked = (model, one.prompt, one.answer, one.incorrect)
        heads = dla_hooks.direct_logit_attribution(*asked, unit="head", tokenizer=tokenizer)
        lost = dla_hooks.effects(*asked, parts=[row[0] for row in rows], tokenizer=tokenizer)
        parts = dla_hooks.direct_logit_attribution(
            *asked, unit=dla_hooks.SourceTokens(top=None), tokenizer=tokenizer
        )
        for label, wrote, token, place, took, without in rows:
            assert float(wrote) == pytest.approx(float(heads[label]), abs=0.006)
            assert float(without) == pytest.approx(float(lost[label].total), abs=0.006)
            assert repr(heads.tokens[0][int(place)]) == token
            assert float(took) == pytest.approx(float(parts[f"{label}<{place}"]), abs=0.006)


def test_the_sentence_below_names_the_strongest_head_and_what_it_reads(printed):
    said = re.findall(r"^(L\dH\d) reads ('.+?'), ", printed, re.M)
    first = [
        text.partition("\n")[0].split()[0] for text in re.split(r"lost without\n", printed)[1:]
    ]
    assert said == list(zip(first, [repr(one.source) for one in stories()[::2]], strict=True))


def test_open_makes_a_page_of_every_prompt_and_asks_the_browser_for_it(tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(webbrowser, "open", asked.append)  # gives None: there is no browser
    file = tmp_path / "page.html"
    done = call("--open", "-o", file)
    assert done.exit_code == 0
    assert asked == [file.as_uri()]
    assert "8 pages" in done.stderr
    assert "no browser was found" in done.stderr
    html = file.read_text(encoding="utf-8")
    assert all(json.dumps(one.example.prompt)[1:-1] in html for one in stories())
    assert "https://" not in html


def test_folder_that_is_not_there_is_refused_before_loading(tmp_path):
    done = call("-o", tmp_path / "no" / "page.html")
    assert done.exit_code == 1
    assert "there is no folder" in done.stderr
