"""Each command gives the numbers of the function behind it, and says what it was not asked."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import webbrowser
from io import StringIO
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dla_hooks
from dla_hooks import demo
from dla_hooks.bars import shown
from dla_hooks.cli.app import app
from dla_hooks.cli.effects import EffectsUnit
from dla_hooks.cli.promote import PromoteUnit
from dla_hooks.cli.words import as_typed
from dla_hooks.units import unit_class, unit_names

PROMPT = "The keys near the cabinet"
ASKED = ("--answer", " are", "--incorrect", " is")
COMMANDS = (
    *("demo", "attribute", "report", "many", "generate", "compare"),
    *("effects", "upstream", "promote", "verify", "list"),
)


@pytest.fixture(scope="module")
def model():
    return demo.load()


def call(*args, **more):
    env = {"NO_COLOR": "1", "COLUMNS": "100"}
    return CliRunner().invoke(app, [str(arg) for arg in args], env=env, **more)


def data_of(*args, **more):
    """What a command writes to stdout as JSON: that and nothing else."""
    done = call(*args, "--json", "-", **more)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def same(found, expected):
    """Numbers of a command and of a function, which ran on two loads of one model."""
    flat = [float(x) for x in re.findall(r"-?\d[\d.e+-]*", json.dumps(found))]
    assert flat == pytest.approx(expected.flatten().tolist(), abs=1e-5)


class TestAttribute:
    def test_an_answer_left_out_is_the_top_token_and_is_said(self, model):
        net, tokenizer = model
        done = call("attribute", "demo", PROMPT)
        assert "no --answer was given: the answer is the model's own top token" in done.stdout
        assert "' are' at the last token" in done.stdout
        found = data_of("attribute", "demo", PROMPT)
        expected = dla_hooks.direct_logit_attribution(
            net, PROMPT, dla_hooks.TOP, tokenizer=tokenizer
        )
        same(found["attribution"], expected.attribution)
        assert found["answer"] == expected.answer

    def test_the_next_token_is_asked_for_by_a_word(self, model):
        net, tokenizer = model
        found = data_of("attribute", "demo", PROMPT, "--answer", "next", "--pos", "0:-1")
        expected = dla_hooks.direct_logit_attribution(
            net, PROMPT, dla_hooks.NEXT, pos=slice(0, -1), tokenizer=tokenizer
        )
        same(found["attribution"], expected.attribution)
        said = call("attribute", "demo", PROMPT, "--answer", "next", "--pos", "0:-1").stdout
        assert "comes next in the text" in said
        assert "' keys' → ' near'" in said

    def test_the_runner_up_is_subtracted_by_a_word(self, model):
        net, tokenizer = model
        found = data_of("attribute", "demo", PROMPT, "--incorrect", "runner-up")
        expected = dla_hooks.direct_logit_attribution(
            net, PROMPT, dla_hooks.TOP, dla_hooks.RUNNER_UP, tokenizer=tokenizer
        )
        same(found["attribution"], expected.attribution)

    @pytest.mark.parametrize(
        ("option", "text", "pos"),
        [("--pos", "1,3", [1, 3]), ("--pos", "-2,0", [-2, 0]), ("--span", "the cabinet", [3, 4])],
    )
    def test_several_positions_match_the_library(self, model, option, text, pos):
        net, tokenizer = model
        found = data_of("attribute", "demo", PROMPT, *ASKED, option, text)
        expected = dla_hooks.direct_logit_attribution(
            net, PROMPT, " are", " is", pos=pos, tokenizer=tokenizer
        )
        same(found["attribution"], expected.attribution)

    def test_csv_to_stdout_is_alone_there(self, model):
        done = call("attribute", "demo", PROMPT, *ASKED, "--csv", "-")
        lines = list(csv.DictReader(StringIO(done.stdout)))
        assert lines[0]["label"] == "embed"
        assert all(float(line["attribution"]) for line in lines)

    def test_pictures_are_written_for_suffixes_in_capitals(self, tmp_path):
        pytest.importorskip("vl_convert")
        file = tmp_path / "pic.PNG"
        done = call("attribute", "demo", PROMPT, *ASKED, "--plot", file)
        assert done.exit_code == 0, done.output
        assert file.read_bytes().startswith(b"\x89PNG")


class TestErrorsBeforeLoading:
    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (("--answer", " a", "--answer", " b"), "'--answer': it is given 2 times"),
            (("--unit", "head", "--unit", "layer"), "'--unit': it is given 2 times"),
            (("--pos", "1", "--span", "cat"), "'--span'"),
            (("--pos", "::0"), "step"),
            (("--pos", "1,x"), "several as in 1,3"),
        ],
    )
    def test_bad_options_are_named_as_typed(self, monkeypatch, args, words):
        monkeypatch.setattr("dla_hooks.checkpoint.load_model", never)
        done = call("attribute", "demo", PROMPT, *args)
        assert done.exit_code == 2
        assert words in done.stderr

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (("--answer", " are is"), "--answer ' are is' is 2 tokens"),
            (("--incorrect", " are is"), "--incorrect ' are is' is 2 tokens"),
            (("--answer", " are", "--pos", "9"), "position 9 is out of range"),
            (("--json", "x", "--csv", "x"), "two outputs cannot be one file"),
        ],
    )
    def test_what_the_tokenizer_can_tell_comes_before_the_weights(self, monkeypatch, args, words):
        monkeypatch.setattr("dla_hooks.checkpoint.load_model", never)
        done = call("attribute", "demo", PROMPT, *args)
        assert done.exit_code == 1
        assert done.stdout == ""
        assert words in done.stderr

    def test_commands_refuse_their_own_options_at_once(self, monkeypatch):
        monkeypatch.setattr("dla_hooks.checkpoint.load_model", never)
        for args, words in (
            (("compare", "demo", PROMPT), "'--other'"),
            (("effects", "demo", PROMPT, "--ablation", "half"), "'--ablation'"),
            (("effects", "demo", PROMPT, "--parts", "3", "--part", "L1H4"), "'--parts'"),
            (("upstream", "demo", PROMPT, "--part", "L1H4"), "'--part'"),
            (("generate", "demo", PROMPT, "--seed", "1"), "--seed goes with --sample"),
            (("many", "demo", "nowhere.csv"), "cannot be read"),
            (("many", "demo", "prompts.txt"), "must end in .jsonl or .csv"),
            (("list", "nonsense"), "no declared model type holds 'nonsense'"),
        ):
            done = call(*args)
            assert done.exit_code in (1, 2), args
            assert words in done.stderr, args

    def test_messages_name_options_and_no_arguments(self):
        assert as_typed("chunk_size must be positive") == "--chunk-size must be positive"
        assert as_typed("unit must be one of a, b") == "--unit must be one of a, b"
        assert as_typed(
            "pass trust_remote_code=True (on the command line --trust-remote-code)"
        ) == ("pass --trust-remote-code")
        assert as_typed("give device_map='auto'") == "give --device-map 'auto'"
        assert as_typed("instead (leave out unit=)") == "instead (leave out --unit)"
        assert as_typed("(pos=slice(0, -1), pos=-2)") == "(--pos 0:-1, --pos -2)"
        assert as_typed("give pos=slice(-3, None)") == "give --pos -3:"
        assert as_typed("decoder_input is empty") == "--decoder-input is empty"
        assert (
            as_typed("need: unit=dla_hooks.Features") == "need: in Python unit=dla_hooks.Features"
        )
        assert as_typed("the unit 'head' has no part") == "the unit 'head' has no part"


def never(*_, **__):
    raise AssertionError("the weights were read")


class TestPromote:
    @pytest.mark.parametrize("unit", [unit for unit in PromoteUnit if unit != "expert"])
    def test_logits_match_the_library(self, model, unit):
        net, tokenizer = model
        found = data_of("promote", "demo", PROMPT, "--unit", unit, "-k", "3")
        expected = dla_hooks.promoted_tokens(net, PROMPT, unit=unit.value, k=3, tokenizer=tokenizer)
        same(found["up"], expected.up)
        assert found["up_ids"] == expected.up_ids.tolist()

    def test_experts_that_a_model_lacks_are_refused(self):
        done = call("promote", "demo", PROMPT, "--unit", "expert")
        assert done.exit_code == 1
        assert "GPT2LMHeadModel has no experts" in done.stderr

    def test_rows_are_shown(self):
        done = call("promote", "demo", PROMPT)
        assert "3_attn_out" in done.stdout
        assert "↑ ' are'" in done.stdout


class TestCompare:
    def test_two_prompts_match_the_library(self, model):
        net, tokenizer = model
        other = "The key near the cabinet"
        expected = dla_hooks.compare(
            net, None, PROMPT, " are", " is", other_input=other, tokenizer=tokenizer
        )
        done = call("compare", "demo", PROMPT, "--other-prompt", other, *ASKED, "--csv", "-")
        lines = list(csv.DictReader(StringIO(done.stdout)))
        for line, record in zip(lines, expected.records(), strict=True):
            for name in ("attribution", "written", "read", "first", "second"):
                assert float(line[name]) == pytest.approx(record[name], abs=1e-4)
        assert (
            lines[0]["label"]
            in call("compare", "demo", PROMPT, "--other-prompt", other, *ASKED).stdout
        )

    def test_the_same_model_twice_differs_in_nothing(self):
        done = call("compare", "demo", PROMPT, "--other", "demo", *ASKED, "--csv", "-")
        lines = list(csv.DictReader(StringIO(done.stdout)))
        assert lines
        assert all(float(line["attribution"]) == 0 for line in lines)


class TestEffects:
    def test_units_are_those_that_can_be_taken_out_by_name(self):
        known = {name for name in unit_names() if unit_class(name).taken_out}
        assert set(EffectsUnit) == known - {"feature"}

    def test_numbers_match_the_library(self, model):
        net, tokenizer = model
        args = ("--part", "L1H4", "--part", "2_mlp_out", "--ablation", "mean")
        found = data_of("effects", "demo", PROMPT, *ASKED, *args)
        expected = dla_hooks.effects(
            net, PROMPT, " are", " is", parts=["L1H4", "2_mlp_out"], ablation="mean",
            tokenizer=tokenizer,
        )  # fmt: skip
        assert found["labels"] == expected.labels
        same(found["total"], expected.total)
        same(found["direct"], expected.direct)

    def test_the_picture_is_written(self, tmp_path):
        file = tmp_path / "e.svg"
        done = call("effects", "demo", PROMPT, *ASKED, "--parts", "2", "--plot", file)
        assert done.exit_code == 0, done.output
        assert "· total" in file.read_text(encoding="utf-8")


class TestUpstream:
    def test_numbers_match_the_library(self, model):
        net, tokenizer = model
        found = data_of("upstream", "demo", PROMPT, *ASKED, "--part", "L3H1<1")
        expected = dla_hooks.upstream(
            net, PROMPT, " are", " is", part="L3H1<1", tokenizer=tokenizer
        )
        same(found["attribution"], expected.attribution)


class TestGenerate:
    def test_numbers_match_the_library(self, model):
        net, tokenizer = model
        args = ("--max-new-tokens", "3", "--against", "runner-up")
        found = data_of("generate", "demo", PROMPT, *args)
        expected = dla_hooks.attribute_generation(
            net, PROMPT, max_new_tokens=3, against="runner-up", tokenizer=tokenizer
        )
        same(found["attribution"], expected.attribution)

    def test_a_seed_gives_the_same_text(self):
        args = ("generate", "demo", PROMPT, "--max-new-tokens", "4", "--sample", "--seed", "3")
        assert call(*args).stdout == call(*args).stdout

    def test_the_text_stands_above_the_numbers(self):
        text = call("generate", "demo", PROMPT, "--max-new-tokens", "2").stdout
        assert text.startswith(f"{PROMPT} are")


class TestList:
    def test_a_part_of_the_name_filters(self):
        named = re.findall(r"^([\w.-]+) +component ", call("list", "LLAMA").stdout, re.MULTILINE)
        assert named
        assert all("llama" in name for name in named)

    def test_json_holds_units_and_notes(self):
        found = json.loads(call("list", "gemma2", "--json", "-").stdout)
        assert [line["model_type"] for line in found if line["model_type"] == "gemma2"]
        assert "head" in found[0]["units"]
        assert "a norm after each sublayer" in found[0]["special"]


def help_of(*command):
    """Help in a terminal of sixty columns; the runner of tests has a width of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "dla_hooks", *command, "--help"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "COLUMNS": "60"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_names_are_whole_and_lines_fit_sixty_columns(self, command):
        help = help_of(command)
        assert max(map(len, help.splitlines())) <= 60
        assert "…" not in help.replace("PROMPT…", "")
        assert "Examples:" in help

    def test_options_stand_in_groups(self):
        help = help_of("attribute")
        for name in ("--device-map", "--max-memory", "--trust-remote-code", "--no-prepend-bos"):
            assert name in help
        for group in ("What is asked:", "The model and its run:", "Output:"):
            assert group in help

    def test_every_command_is_listed_with_its_sentence(self):
        help = help_of()
        assert "..." not in help.replace("[ARGS]...", "")
        for command in COMMANDS:
            assert f"\n  {command} " in help
        assert "--install-completion" in help


class TestProcess:
    def run(self, *args, **env):
        return subprocess.run(
            [sys.executable, "-m", "dla_hooks", *args],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env={**os.environ, **env},
        )

    def test_the_module_runs_without_log_noise(self):
        done = self.run("attribute", "demo", PROMPT, "--answer", " are", "--json", "-")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert json.loads(done.stdout)["answer"] == [" are"]

    @pytest.mark.slow  # two processes
    def test_a_model_that_is_nowhere_is_said_to_be_looked_for(self, tmp_path):
        env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
        done = self.run("verify", "nobody/nothing", **env)
        assert done.returncode == 1
        assert "HF_HUB_OFFLINE=1" in done.stderr.splitlines()[0]
        assert "error: nobody/nothing" in done.stderr
        offline = self.run("verify", "nobody/nothing", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
        assert offline.stderr.startswith("error: nobody/nothing")

    def test_long_prompts_show_a_bar_over_their_pieces(self, model, capsys):
        net, tokenizer = model
        ask = dla_hooks.direct_logit_attribution
        with shown(True):
            ask(net, PROMPT, " are", tokenizer=tokenizer, chunk_size=2)
        assert "0/3" in capsys.readouterr().err
        ask(net, PROMPT, " are", tokenizer=tokenizer, chunk_size=2)
        with shown(False):
            ask(net, PROMPT, " are", tokenizer=tokenizer, chunk_size=2)
        with shown(True):
            ask(net, PROMPT, " are", tokenizer=tokenizer)
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(("method", "kept"), [("torchao", True), ("bitsandbytes", False)])
    def test_torchao_is_left_out_unless_a_checkpoint_needs_it(self, tmp_path, method, kept):
        pytest.importorskip("torchao")
        config = {"model_type": "gpt2", "quantization_config": {"quant_method": method}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        code = (
            "import sys; from dla_hooks.cli import startup; startup.claim()\n"
            f"startup.import_models({str(tmp_path)!r}); import transformers.modeling_utils\n"
            "from transformers.utils import is_torchao_available\n"
            "print('torchao' in sys.modules, is_torchao_available())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == f"{kept} True\n", done.stderr


def examples_of(text):
    """The commands in a text, with their continued lines put together."""
    joined = re.sub(r"(\\|\|)\n\s+", lambda m: "| " if m[1] == "|" else "", text)
    return re.findall(r"^\s*(?:\$ )?((?:printf .*)?dla-hooks .*)$", joined, re.MULTILINE)


@pytest.fixture
def no_browser(tmp_path, monkeypatch):
    """Pages are opened in none, and written where they go with the test."""
    monkeypatch.setattr("webbrowser.open", lambda address: True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.usefixtures("no_browser")
@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_help_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(webbrowser, "open", lambda url: True)
    (tmp_path / "prompts.csv").write_text("prompt,answer\nThe dogs, are\n", encoding="utf-8")
    help = CliRunner().invoke(app, [command, "--help"]).stdout.split("Examples:")[1]
    found = examples_of(help)
    assert found
    for line in found:
        start, _, line = line.rpartition("dla-hooks ")
        given = start.split("'")[1].replace("\\n", "\n") if start.startswith("printf") else None
        done = call(*shlex.split(line), input=given)
        assert done.exit_code == 0, (line, done.output)


@pytest.mark.usefixtures("no_browser")
def test_examples_of_the_page_run(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "command-line.md"
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    found = [line for line in examples_of(page.read_text("utf-8")) if "COMMAND" not in line]
    assert {shlex.split(line.rpartition("dla-hooks ")[2])[0] for line in found} >= {*COMMANDS}
    for line in found:
        start, _, line = line.rpartition("dla-hooks ")
        given = start.split("'")[1].replace("\\n", "\n") if start.startswith("printf") else None
        done = call(*shlex.split(line), input=given)
        assert done.exit_code == 0, (line, done.output)
    assert (tmp_path / "found" / "summary.safetensors").is_file()
    assert len(opened) == sum("--open" in line for line in found)
