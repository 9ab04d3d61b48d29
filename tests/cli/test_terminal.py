"""How commands end, and what they say beside their results."""

from __future__ import annotations

import io
import warnings
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

import dla_hooks
from dla_hooks import DLAWarning, checkpoint, hub
from dla_hooks.cli import listing
from dla_hooks.cli.app import app
from dla_hooks.cli.files import as_file
from dla_hooks.cli.terminal import say_warnings, spell_out
from dla_hooks.errors import CheckpointError

PROMPT = "The keys near the cabinet"


def run(*args):
    """Exit code, stdout and stderr of a command."""
    done = CliRunner().invoke(app, list(args))
    return done.exit_code, done.stdout, done.stderr


def fails_with(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
        (PermissionError(13, "Not allowed", "a.json"), 1, "error: a.json: Not allowed\n"),
    ],
)  # fmt: skip
def test_what_ends_a_command_is_one_line(monkeypatch, error, code, said):
    monkeypatch.setattr(listing, "out", fails_with(error))
    assert run("list", "llama") == (code, "", said)


def test_interrupted_many_says_how_to_go_on(monkeypatch, tmp_path):
    (tmp_path / "prompts.csv").write_text("prompt\nThe dogs\n")
    monkeypatch.setattr(dla_hooks, "summarize", fails_with(KeyboardInterrupt()), raising=False)
    code, _, said = run("many", "demo", str(tmp_path / "prompts.csv"), "-o", str(tmp_path / "out"))
    assert code == 130
    assert "the same command goes on from there\ninterrupted\n" in said


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        (["report", "demo", PROMPT, "--answer", " zzz"], "--answer ' zzz' is not in"),
        (["report", "demo", PROMPT, "The dogs", "--pos", "3"], "row 0 of the input has 2 tokens"),
        (["attribute", "demo", PROMPT, "--incorrect", " zzz"], "--incorrect ' zzz' is not in"),
        (["attribute", "demo", PROMPT, "--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_before_weights_are_read(
    monkeypatch, tmp_path, command, wrong
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "load_model", fails_with(AssertionError()))
    code, _, said = run(*command)
    assert code == 1
    assert said.startswith("error: ")
    assert wrong in said


def test_report_takes_the_words_for_tokens(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, said = run("report", "demo", PROMPT, "--answer", "next", "--pos", "0:-1", "--unit",
                        "component", "-o", "page.html")  # fmt: skip
    assert (code, said.startswith("wrote page.html")) == (0, True)
    assert "' keys'" in (tmp_path / "page.html").read_text()


def test_warnings_of_the_library_are_one_line(monkeypatch, capsys):
    of_others = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: of_others.append(str(message)))
    say_warnings()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("with chunk_size a hook sees a chunk", DLAWarning, stacklevel=1)
        warnings.warn("of another", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: with --chunk-size a hook sees a chunk\n"
    assert of_others == ["of another"]


def test_what_an_encoding_lacks_is_spelled():
    kept = io.BytesIO()
    stream = io.TextIOWrapper(kept, encoding="ascii", newline="\n")
    spell_out(stream)
    stream.write("│██▌ · … é\n")
    stream.flush()
    assert kept.getvalue() == b"|### * ... ?\n"


class TestHub:
    @pytest.fixture(autouse=True)
    def online(self, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    @pytest.fixture
    def answers(self, monkeypatch):
        def put(answer, cached):
            session = SimpleNamespace(head=answer)
            monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: session)
            monkeypatch.setattr(hub, "is_cached", lambda name: cached)

        return put

    def test_no_answer_is_said_at_once(self, answers):
        answers(fails_with(ConnectionError("no route")), cached=False)
        with pytest.raises(CheckpointError, match="the Hugging Face hub cannot be reached"):
            checkpoint.load("nobody/nothing")
        code, _, said = run("attribute", "nobody/nothing", PROMPT)
        first, second = said.splitlines()
        assert code == 1
        assert "asking huggingface.co (with HF_HUB_OFFLINE=1" in first
        assert second.startswith("error: nobody/nothing is neither a folder here")

    def test_cached_model_is_taken_without_a_hub(self, answers, monkeypatch):
        answers(fails_with(ConnectionError("no route")), cached=True)
        seen = []

        def load(*_):
            seen.append(constants.HF_HUB_OFFLINE)
            raise CheckpointError("enough")

        monkeypatch.setattr(checkpoint, "load_tokenizer", load)
        code, _, said = run("attribute", "some/body", PROMPT)
        assert (code, seen) == (1, [True])
        assert "some/body is taken from the local cache" in said

    def test_answer_that_there_is_none_is_left_to_the_loader(self, answers):
        answers(lambda url, timeout: SimpleNamespace(status_code=404), cached=False)
        assert hub.is_reachable("nobody/nothing")

    def test_folder_and_demo_ask_nobody(self, answers):
        answers(fails_with(AssertionError("asked")), cached=False)
        assert run("verify", "demo")[0] == 0


def test_file_on_stdout_is_utf8_whatever_a_terminal_has(monkeypatch):
    kept = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(kept, encoding="ascii", newline="\n"))
    stream = as_file()
    stream.write("é …\n")
    stream.flush()
    assert kept.getvalue().decode("utf-8") == "é …\n"


def test_mistyped_value_is_named_as_it_is():
    code, _, said = run("attribute", "demo", PROMPT, "--unit", "nothing")
    assert code == 2
    assert "Invalid value for '--unit': 'nothing' is not one of 'adapter'" in said
