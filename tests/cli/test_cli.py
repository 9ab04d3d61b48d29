"""The command line, as a user runs it."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner
from units import EVERY_UNIT, UNIT_NAMES
from zoo import build, tiny_tokenizer

import dla_hooks
from dla_hooks.checkpoint import DTYPES
from dla_hooks.cli.app import app
from dla_hooks.cli.options import DeviceMap, Dtype, Unit
from dla_hooks.placement import DEVICE_MAPS

PROMPT = "The cat sat on the mat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build("gpt2", dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def demo_text():
    done = call("demo")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return done.stdout


def call(*args, **env):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"NO_COLOR": "1", **env})


def attribute(folder, *args, **env):
    return call("attribute", folder, PROMPT, "--answer", " Paris", *args, **env)


def run(*args, code="from dla_hooks.cli.app import main; main()", **env):
    """A process of its own, as the console script starts it."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **env},
    )


def expected(incorrect=None, **kwargs):
    return dla_hooks.direct_logit_attribution(
        build("gpt2", dtype=torch.float32),
        PROMPT,
        " Paris",
        incorrect,
        tokenizer=tiny_tokenizer(),
        **kwargs,
    )


def failed(done, *words):
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


class TestAttribute:
    @pytest.mark.parametrize("unit", UNIT_NAMES)
    def test_rows_match_library(self, folder, unit):
        done = attribute(folder, "--incorrect", " Berlin", "--unit", unit)
        assert done.exit_code == 0, done.output
        result = expected(" Berlin", unit=unit)
        rows = dict(re.findall(r"^(\w+) +([+-]\d\S*)", done.stdout, re.MULTILINE))
        rows.pop("sum", None)
        assert set(rows) == set(result.labels)
        for label, value in zip(result.labels, result.mean().tolist(), strict=True):
            assert float(rows[label]) == pytest.approx(value, abs=1e-3)
        logit = float(result.logit)
        assert f"= {logit:+.3f}, the logit difference" in done.stdout
        assert done.stderr == ""

    def test_top_shows_both_ends(self, folder):
        done = attribute(folder, "--unit", "head", "--top", "2")
        rows = re.findall(r"^(L\dH\d)", done.stdout, re.MULTILINE)
        heads = expected(unit="head")
        ranked = [label for label, _ in heads.top(99) if label != "remainder"]
        assert rows == [*ranked[:2], *ranked[-2:]]
        assert "… 8 more rows" in done.stdout

    @pytest.mark.parametrize(
        ("pos", "words"),
        [
            ("2", "at token 2 (' sat')"),
            ("-1", "at the last token"),
            ("all", "mean over all 6 positions"),
            ("2:5", "mean over 3 positions"),
            (":-1", "mean over 5 positions"),
            ("::2", "mean over 3 positions"),
        ],
    )
    def test_pos_is_followed(self, folder, pos, words):
        done = attribute(folder, "--pos", pos)
        assert done.exit_code == 0, done.output
        assert words in done.stdout

    @pytest.mark.parametrize("pos", ["", "x", "1:2:3:4", "1.5", "a:b"])
    def test_unreadable_pos_is_bad_usage(self, pos):
        done = attribute("never-loaded", "--pos", pos)
        assert done.exit_code == 2
        assert "--pos" in done.stderr

    def test_json_matches_library(self, folder, tmp_path):
        file = tmp_path / "r.json"
        done = attribute(folder, "--incorrect", " Berlin", "--json", file)
        assert f"wrote {file}" in done.stderr
        assert str(file) not in done.stdout
        data, result = json.loads(file.read_text("utf-8")), expected(" Berlin")
        assert data["version"] == 1
        assert data["labels"] == result.labels
        assert torch.allclose(torch.tensor(data["attribution"]), result.attribution, atol=1e-5)
        assert data["logit"] == pytest.approx(result.logit.tolist(), abs=1e-5)
        assert (data["answer"], data["incorrect"]) == ([" Paris"], [" Berlin"])
        assert data["tokens"] == [["The", " cat", " sat", " on", " the", " mat"]]

    def test_csv_and_plots_are_written(self, folder, tmp_path):
        file = tmp_path / "r.csv"
        done = attribute(
            folder, "--pos", "all", "--csv", file, "--plot", tmp_path / "p.svg", "--unit", "head"
        )
        assert done.exit_code == 0, done.output
        with file.open(encoding="utf-8", newline="") as opened:
            lines = list(csv.DictReader(opened))
        result = expected(unit="head", pos=None)
        assert len(lines) == result.attribution.numel()
        total = sum(float(line["attribution"]) for line in lines)
        assert total == pytest.approx(float(result.attribution.sum()), abs=1e-3)
        assert "L2H3" in (tmp_path / "p.svg").read_text(encoding="utf-8")

    def test_dtype_is_followed(self, folder, tmp_path):
        attribute(folder, "--dtype", "float64", "--json", tmp_path / "r.json")
        assert json.loads((tmp_path / "r.json").read_text())["gap"] < 1e-12
        attribute(folder, "--dtype", "bfloat16", "--json", tmp_path / "b.json")
        assert json.loads((tmp_path / "b.json").read_text())["gap"] > 1e-4

    @pytest.mark.parametrize("options", [("disk",), ("auto", "--max-memory", "40KB")])
    def test_device_map_disk_matches_memory(self, folder, options):
        pytest.importorskip("accelerate")
        done = attribute(folder, "--unit", "head", "--device-map", *options)
        assert done.exit_code == 0, done.output
        assert done.stderr == ""
        rows = dict(re.findall(r"^(\w+) +([+-]\d\S*)", done.stdout, re.MULTILINE))
        result = expected(unit="head")
        for label, value in zip(result.labels, result.mean().tolist(), strict=True):
            assert float(rows[label]) == pytest.approx(value, abs=1e-3)

    def test_chunk_size_matches_whole_prompt(self, folder, tmp_path):
        whole, chunks = tmp_path / "whole.json", tmp_path / "chunks.json"
        attribute(folder, "--unit", "head", "--json", whole)
        done = attribute(folder, "--unit", "head", "--json", chunks, "--chunk-size", "2")
        assert done.exit_code == 0, done.output
        found = [json.loads(path.read_text())["attribution"] for path in (whole, chunks)]
        assert found[1] == [pytest.approx(row, abs=1e-4) for row in found[0]]
        assert attribute("never-loaded", "--chunk-size", "0").exit_code == 2

    def test_bos_option_prepends_bos(self, folder, tmp_path):
        for option, first in (("--prepend-bos", "<bos>"), ("--no-prepend-bos", "The")):
            attribute(folder, option, "--json", tmp_path / "r.json")
            assert json.loads((tmp_path / "r.json").read_text())["tokens"][0][0] == first

    def test_demo_is_accepted_as_model_name(self):
        done = call("attribute", "demo", "The keys near the cabinet", "--answer", " are")
        assert done.exit_code == 0, done.output
        assert "GPT2LMHeadModel (gpt2)" in done.stdout

    def test_colour_is_used_only_on_request(self, folder):
        plain = attribute(folder).stdout
        assert "\x1b" not in plain
        coloured = attribute(folder, NO_COLOR="", FORCE_COLOR="1").stdout
        assert "\x1b[" in coloured
        assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain

    def test_a_narrow_terminal_leaves_the_rows_whole(self, folder):
        rows = r"^(?!sum)\S+ +[+-][\d.]+ .*"
        wide = re.findall(rows, attribute(folder).stdout, re.MULTILINE)
        narrow = re.findall(rows, attribute(folder, COLUMNS="24").stdout, re.MULTILINE)
        assert len(wide) == 8
        assert narrow == wide


class TestErrors:
    def test_answer_of_several_tokens_fails(self, folder):
        failed(call("attribute", folder, PROMPT, "--answer", " cat sat"), "2 tokens")

    def test_position_out_of_range_fails(self, folder):
        failed(attribute(folder, "--pos", "6"), "position 6 is out of range")

    def test_conflicting_placement_options_fail(self, folder):
        pytest.importorskip("accelerate")
        failed(attribute(folder, "--max-memory", "4GiB"), "--max-memory '4GiB'", "--device-map")
        failed(attribute(folder, "--device-map", "disk", "--max-memory", "4"), "is no size")
        failed(attribute(folder, "--device-map", "disk", "--device", "cpu"), "give one of them")

    def test_missing_folder_fails(self):
        failed(attribute("./nowhere"), "there is no folder ./nowhere")

    def test_missing_tokenizer_fails(self, tmp_path):
        build("gpt2", dtype=torch.float32).save_pretrained(tmp_path)
        failed(attribute(tmp_path), "has no tokenizer")
        assert call("verify", tmp_path).exit_code == 0

    @pytest.mark.parametrize("option", ["--json", "--csv", "--plot"])
    def test_unwritable_output_fails_before_loading(self, tmp_path, option):
        missing = tmp_path / "nowhere" / "out.svg"
        failed(attribute("never-loaded", option, missing), "cannot write", "there is no folder")

    def test_plot_with_unknown_suffix_fails(self, tmp_path):
        failed(attribute("never-loaded", "--plot", tmp_path / "p.gif"), ".html, .svg, .png, .pdf")

    def test_brackets_in_messages_are_printed(self):
        failed(attribute("./[bold]x"), "./[bold]x")

    @pytest.mark.parametrize(
        "args",
        [
            ("attribute", "m"),
            ("attribute", "m", "p", "--answer", "a", "--unit", "token"),
            ("attribute", "m", "p", "--answer", "a", "--dtype", "int8"),
            ("attribute", "m", "p", "--answer", "a", "--top", "0"),
            ("attribute", "m", "p", "--answer", "a", "--device-map", "balanced"),
            ("nonsense",),
            (),
        ],
    )
    def test_bad_usage_exits_with_two(self, args):
        done = call(*args)
        assert done.exit_code == 2
        assert "Traceback" not in done.output

    def test_interrupt_exits_with_130(self, monkeypatch):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("dla_hooks.checkpoint.load_model", interrupt)
        assert call("verify", "demo").exit_code == 130

    def test_an_error_of_another_kind_is_not_hidden(self, monkeypatch):
        def fail(*_, **__):
            raise ZeroDivisionError

        monkeypatch.setattr("dla_hooks.checkpoint.load_model", fail)
        assert isinstance(call("verify", "demo").exception, ZeroDivisionError)


class TestVerify:
    def test_verify_passes_and_exits_zero(self, folder):
        done = call("verify", folder)
        assert done.exit_code == 0
        assert "GPT2LMHeadModel (gpt2), float32: adds up" in done.stdout
        assert done.stdout.count("\n  ok ") == 7

    def test_verify_fails_and_exits_one(self, folder, monkeypatch):
        from dla_hooks.verification.trace import Line, Verification

        bad = Verification("M (m)", "float32", (Line("h.0", "out = in + writes", 0.3, False),))
        monkeypatch.setattr(dla_hooks, "verify", lambda *_, **__: bad)
        done = call("verify", folder)
        assert done.exit_code == 1
        assert "DOES NOT ADD UP" in done.stdout
        assert "BAD" in done.stdout

    def test_dtype_is_followed(self, folder):
        assert "(gpt2), float64: adds up" in call("verify", folder, "--dtype", "float64").stdout

    def test_device_map_disk_matches_memory(self, folder):
        pytest.importorskip("accelerate")
        done = call("verify", folder, "--device-map", "disk", "--max-memory", "40KB")
        assert "(gpt2), float32: adds up" in done.stdout

    def test_help_explains_placement_options(self):
        for command in ("attribute", "verify"):
            text = call(command, "--help", COLUMNS="120").stdout
            assert "--device-map" in text
            assert "--max-memory" in text
            assert "4GiB" in text


class TestList:
    def test_every_model_type_in_alphabetical_order(self):
        done = call("list")
        assert done.exit_code == 0
        named = re.findall(r"^([\w.-]+) +component ", done.stdout, re.MULTILINE)
        known = {name for arch in dla_hooks.architectures() for name in arch.model_types}
        assert named == sorted(known)

    def test_list_notes_come_from_declarations(self):
        text = call("list", COLUMNS="160").stdout
        lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
        assert "a norm after each sublayer" in lines["gemma2"]
        assert "learned positions" in lines["gpt2"]
        assert lines["llama"].split() == ["llama", *UNIT_NAMES]

    def test_list_names_the_units_that_a_declaration_has(self):
        lines = {
            line.split()[0]: line
            for line in call("list", COLUMNS="160").stdout.splitlines()
            if line.strip()
        }
        for architecture in dla_hooks.architectures():
            with_heads = any(write.heads is not None for write in architecture.writes)
            for name in architecture.model_types:
                words = lines[name].split()
                assert {"component", "layer"} <= set(words)
                assert ("head" in words) == with_heads


class TestDemo:
    def test_every_task_is_shown_with_its_sum(self, demo_text):
        from dla_hooks.demo import TASKS, examples

        first = {example.task: example for example in reversed(examples())}
        assert set(first) == set(TASKS)
        for example in first.values():
            assert example.prompt in demo_text
            assert f"{example.answer!r} - {example.incorrect!r}" in demo_text
        assert len(re.findall(r"= \+\d\S+, the logit difference", demo_text)) == len(TASKS)
        gaps = re.findall(r"^gap (\d.\de[-+]\d+)", demo_text, re.MULTILINE)
        assert len(gaps) == len(TASKS)
        assert all(float(gap) < 1e-4 for gap in gaps)

    def test_no_line_is_wider_than_a_terminal_or_cut(self, demo_text):
        assert max(map(len, demo_text.splitlines())) <= 80
        assert not re.search(r"\w…", demo_text)

    def test_the_python_lines_at_the_end_run(self, demo_text):
        code = demo_text.split("In Python:")[1]
        code = re.sub(r"^    ", "", code, flags=re.MULTILINE)
        names: dict = {}
        exec(code.replace("result.top(3)", "top = result.top(3)"), names)
        assert len(names["top"]) == 3


class TestStartsFast:
    def test_options_are_those_of_the_library(self):
        assert [unit.value for unit in Unit] == list(EVERY_UNIT)
        assert tuple(dtype.value for dtype in Dtype) == DTYPES
        assert tuple(where.value for where in DeviceMap) == DEVICE_MAPS

    HEAVY = ("torch", "transformers", "altair", "pandas")

    def loaded(self, code):
        """Which heavy modules are loaded at the end of a process."""
        tail = f"print('LOADED', [m for m in {self.HEAVY} if m in sys.modules])"
        done = run(code=f"import sys, atexit\natexit.register(lambda: {tail})\n{code}")
        assert done.returncode == 0, done.stderr
        return done.stdout.rsplit("LOADED ")[-1].strip()

    @pytest.mark.parametrize("args", ["--help", "attribute --help", "--version", "list"])
    def test_light_commands_do_not_import_torch(self, args):
        code = f"from dla_hooks.cli.app import app; app({args.split()})"
        assert self.loaded(code) == "[]"

    def test_importing_loads_nothing_heavy(self):
        assert self.loaded("import dla_hooks, dla_hooks.cli.app") == "[]"

    def test_loading_verify_imports_torch(self):
        assert self.loaded("import dla_hooks; dla_hooks.verify") == "['torch', 'transformers']"


class TestProcess:
    def test_version_is_printed(self):
        done = run("--version")
        assert (done.returncode, done.stdout) == (0, f"dla-hooks {dla_hooks.__version__}\n")

    def test_error_is_one_line_with_exit_code_one(self):
        done = run("verify", "./nowhere")
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr == "error: there is no folder ./nowhere\n"

    def test_terminal_without_block_characters_gets_rows(self, folder):
        done = run(
            "attribute",
            folder,
            PROMPT,
            "--answer",
            " Paris",
            PYTHONIOENCODING="ascii",
            PYTHONUTF8="0",
        )
        assert done.returncode == 0, done.stderr
        assert "0_attn_out" in done.stdout
        # Nothing of ours: transformers imports torchao where it is there, and torchao logs.
        assert "error: " not in done.stderr
        assert "Traceback" not in done.stderr
