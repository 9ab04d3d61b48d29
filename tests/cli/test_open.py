"""``--open``: a page is written and shown in the browser."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from typer.testing import CliRunner

from dla_hooks.cli.app import app
from dla_hooks.demo import TASKS, examples


def opened(monkeypatch, *args, there=True):
    """What a command says, and the file that it asked a browser for."""
    found: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: found.append(address) or there)
    done = CliRunner().invoke(app, list(args), env={"NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    (address,) = found
    return done, Path(unquote(urlsplit(address).path))


@pytest.mark.parametrize("there", [True, False])
def test_report_opens_its_page_or_says_that_there_is_no_browser(monkeypatch, tmp_path, there):
    path = tmp_path / "a page.html"
    args = ("report", "demo", "The keys near the cabinet", "--unit", "head", "-o", str(path))
    done, shown = opened(monkeypatch, *args, "--open", there=there)
    assert shown == path
    assert ("no browser was found" in " ".join(done.stderr.split())) != there


def test_demo_opens_a_page_with_one_prompt_of_each_kind(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _, shown = opened(monkeypatch, "demo", "--open")
    assert tmp_path in shown.parents
    html = shown.read_text(encoding="utf-8")
    first = {example.task: example.prompt for example in reversed(examples())}
    assert len(first) == len(TASKS)
    for prompt in first.values():
        assert prompt in html  # of readers without scripts
