"""The benchmark itself: it proves before it times, reports what it measured, and skips by name."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import agree, bars, contenders, curves, peers
from benchmarks.__main__ import app
from benchmarks.agree import Disagreement, prove_on
from benchmarks.bar import Measured, once
from benchmarks.byhand import Projection, at, layout_of, rows_of
from benchmarks.contenders import CONTENDERS, OURS, PLAIN, Bench
from benchmarks.models import MODELS, POSITIONS, UNITS, Setting, make_model
from benchmarks.timing import Spread, interleaved, ratios
from dla_hooks import direct_logit_attribution

HERE = (PLAIN, "plain, full logits", "output_hidden_states", OURS)
ONLY_HERE = [piece for name in HERE for piece in ("--contender", name)]
TINY = ("tiny-gpt2", "tiny-llama")


def run(*arguments: str, code: int = 0):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, done.output + done.stderr
    return done


@pytest.fixture(scope="module", params=TINY)
def bench(request):
    return Bench(Setting(request.param))


# What is proven


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("unit", UNITS)
def test_contenders_agree(bench, unit, pos):
    name = bench.model("hf").config.model_type
    setting = Setting(f"tiny-{name}", tokens=12, batch=2, unit=unit, pos=pos)
    found = {one.other: one for one in prove_on(bench, list(HERE), setting)}
    assert set(found) == set(HERE)
    assert all(one.gap <= 1e-5 for one in found.values())
    assert found["output_hidden_states"].rows == 3  # two blocks' inputs, and the last stream


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("unit", UNITS)
def test_activations_projected_by_hand_match(bench, unit, pos):
    """What tools that save activations are timed at, here saved by bare hooks of torch."""
    model_type = bench.model("hf").config.model_type
    setting = Setting(f"tiny-{model_type}", tokens=9, batch=2, unit=unit, pos=pos)
    model = make_model(setting.model)  # hooks stay on: not on the fixture's
    projection, layout = Projection(model, setting), layout_of(model)
    saved: dict[str, torch.Tensor] = {}

    def keep(name, module, of_input=False):
        def hook(_, args, out):
            saved[name] = (args[0] if of_input else out)[:, projection.entries]

        module.register_forward_hook(hook)

    keep("embed", at(model, layout.embed))
    if layout.pos_embed:
        keep("pos_embed", at(model, layout.pos_embed))
    for layer, block in enumerate(at(model, layout.layers)):
        keep(f"z.{layer}", at(block, layout.projection), of_input=True)
        keep(f"attn.{layer}", at(block, layout.projection))
        keep(f"mlp.{layer}", at(block, layout.mlp))
    keep("last", at(model, layout.norm), of_input=True)
    with torch.no_grad():
        model(setting.ids())

    answer, incorrect, position = setting.answers()
    result = direct_logit_attribution(
        bench.model("hf"), setting.ids(), answer, incorrect, unit=unit, pos=position
    )
    rows = rows_of(projection, unit, saved, n_layers=2)
    assert list(rows) == result.labels
    found = torch.stack([row.expand(2, -1) for row in rows.values()])
    torch.testing.assert_close(found.squeeze(-1) if pos == "last" else found, result.attribution)


def _off(value):
    """One row of the result, times a factor."""

    def read(out, setting):
        rows = contenders.result_rows(out, setting)
        rows["L1H2"] = rows["L1H2"] * value
        return rows

    return read


def _renamed(out, setting):
    rows = contenders.result_rows(out, setting)
    rows["L9H9"] = rows.pop("L1H2")
    return rows


def _lost(out, setting):
    rows = contenders.result_rows(out, setting)
    del rows["L0H1"]
    return rows


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (_off(1.01), "row L1H2 differs"),
        (_off(float("nan")), "row L1H2 differs by inf"),
        (_renamed, "rows of other names: ['L1H2', 'L9H9']"),
        (_lost, "rows of other names: ['L0H1']"),
    ],
    ids=["off by a hundredth", "nan", "renamed", "lost"],
)
def test_wrong_contender_is_named_and_nothing_is_timed(monkeypatch, read, message):
    wrong = dataclasses.replace(CONTENDERS[OURS], name="output_hidden_states", read=read)
    monkeypatch.setitem(CONTENDERS, "output_hidden_states", wrong)
    setting = Setting("tiny-gpt2", tokens=12)
    with pytest.raises(Disagreement) as caught:
        prove_on(Bench(setting), [PLAIN, "output_hidden_states"], setting)
    assert message in str(caught.value)
    assert "dla_hooks and output_hidden_states" in str(caught.value)

    done = run("compare", "--model", "tiny-gpt2", "--tokens", "12", *ONLY_HERE, code=1)
    assert "error: dla_hooks and output_hidden_states" in done.stderr
    assert "timing" not in done.stderr
    assert done.stdout == ""


def test_wrong_attribution_of_this_library_is_found(monkeypatch):
    """By the plain pass, whose logit shares no code with it."""

    def wrong(*args, **options):
        result = direct_logit_attribution(*args, **options)
        return dataclasses.replace(result, logit=result.logit + 0.01)

    monkeypatch.setattr(agree, "direct_logit_attribution", wrong)
    setting = Setting("tiny-gpt2", tokens=12)
    with pytest.raises(Disagreement, match="dla_hooks and plain forward do not agree: row logit"):
        prove_on(Bench(setting), [PLAIN], setting)


# How it is timed


def test_every_round_runs_all_and_starts_with_another():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    gc.disable()
    try:
        seconds = interleaved(calls, repeats=4, warm_up=1)
        assert not gc.isenabled()  # as it was found
    finally:
        gc.enable()
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    interleaved(calls, repeats=1)
    assert gc.isenabled()


def test_garbage_is_not_collected_while_the_clock_runs():
    enabled = []
    interleaved({"a": lambda: enabled.append(gc.isenabled())}, repeats=2, warm_up=0)
    assert enabled == [False, False]


def test_ratios_are_taken_round_by_round():
    seconds = {"plain": [1.0, 2.0, 4.0], "ours": [1.5, 2.0, 2.0]}
    assert ratios(seconds, "plain")["ours"] == [1.5, 1.0, 0.5]
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(2.0, 3.0, 4.0)
    assert Spread.of([2.0]) == Spread(None, 2.0, None)


# What is reported


def test_compare_prints_files_and_draws(tmp_path):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    figures, picture = tmp_path / "out.json", tmp_path / "out.png"
    axes = ("--model", ",".join(TINY), "--tokens", "12,24", "--pos", "last")
    files = ("--json", str(figures), "--png", str(picture))
    done = run("compare", *axes, "--repeats", "2", "--no-memory", *ONLY_HERE, *files)
    assert "tiny-llama float32, 24 tokens, head, last position" in done.stdout
    assert "do all agree?" in done.stderr  # progress is not mixed with results

    filed = json.loads(figures.read_text())
    assert filed["command"].startswith("python -m benchmarks")
    assert filed["date"][:2] == "20"
    assert filed["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "dla-hooks"} <= set(filed["versions"])
    assert {"cpu", "cores", "threads", "memory_bytes", "gpu"} <= set(filed["hardware"])
    assert filed["git_revision"] == _revision()
    assert filed["hardware"]["threads"] == torch.get_num_threads()
    assert len(filed["lines"]) == 2 * 2 * len(HERE)
    for line in filed["lines"]:
        assert line["contender"] in HERE
        assert len(line["rounds_seconds"]) == 2
        for spread in (line["seconds"], line["time_ratio"]):
            assert spread["low"] <= spread["median"] <= spread["high"]
        assert line["gap_over_spread"] <= 1e-4
        assert line["peak_bytes"] is line["plain_peak_bytes"] is line["memory_ratio"] is None
        assert line["setting"]["model"] in TINY
    assert {
        line["time_ratio"]["median"] for line in filed["lines"] if line["contender"] == PLAIN
    } == {1}

    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert width > 900
    assert height > 1400  # a row for each of the two models


def _revision():
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    ask = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=True)
    changed = ask(["git", "status", "--porcelain", "--untracked-files=no"]).stdout
    return ask(["git", "rev-parse", "HEAD"]).stdout.strip() + ("-dirty" if changed else "")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.4, 12, [0.5, 1, 2, 5, 10]),
        (0.88, 1.1, [0.9, 0.95, 1, 1.05, 1.1]),  # none of which but 1 is a step of 1, 2 and 5
        (1.09, 1.41, [1.1, 1.2, 1.3, 1.4]),
        (8, 3000, [10, 20, 50, 100, 200, 500, 1000, 2000]),
    ],
)
def test_the_marks_of_an_axis_lie_within_it(low, high, ticks):
    assert curves.ticks(low, high) == pytest.approx(ticks)


def test_every_curve_can_be_told_from_the_others():
    looks = [curves.LOOKS[name] for name in contenders.COMPARED]
    assert len({colour for colour, _ in looks}) == len(looks)


def test_missing_peers_are_left_out_by_name_with_the_command_that_helps(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "version", lambda package: None)
    figures = tmp_path / "out.json"
    done = run(
        *("compare", "--model", "tiny-gpt2", "--tokens", "12", "--repeats", "1", "--no-memory"),
        *("--json", str(figures)),
    )
    assert "left out: nnsight. nnsight is not installed: pip install nnsight==" in done.stderr
    for name in ("bridge, full cache", "HookedTransformer, names_filter"):
        assert f"left out: {name}. TransformerLens is not installed: pip install" in done.stderr
    filed = json.loads(figures.read_text())
    assert {line["contender"] for line in filed["lines"]} == set(HERE)
    assert set(filed["skipped"]) | set(HERE) == set(contenders.COMPARED)


def test_missing_hooked_transformer_is_reported(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda package: "4.3.0")
    assert "4.3.0 has no HookedTransformer" in str(
        contenders.missing("HookedTransformer, full cache")
    )
    assert contenders.missing("bridge, full cache") is None


def test_table_is_printed_as_markdown(monkeypatch):
    monkeypatch.setattr("benchmarks.compare.measurable", lambda device: False)
    done = run("table", "--model", "tiny-llama", "--tokens", "12", "--repeats", "1", "--markdown")
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[:2] == ["| case | time ratio | memory ratio |", "|---|---:|---:|"]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| component, last position",
        "| layer, last position",
        "| head, last position",
        "| head, all positions",
        "| head, all positions, next-token target at each",
    ]
    assert len({row.count("|") for row in rows}) == 1


def test_no_arguments_prints_first_command():
    done = CliRunner().invoke(app, [])
    text = done.stdout + done.stderr
    assert "Run 'table' first" in " ".join(text.split())
    assert all(command in text for command in ("compare", "bars", "table"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "--model", "gpt3"), "'gpt3' is none of tiny-gpt2"),
        (("compare", "--unit", "neuron"), "'neuron' is none of component"),
        (("compare", "--tokens", "many"), "'many' is no number above 0"),
        (("compare", "--tokens", "2048"), "takes at most 1,024 tokens"),
        (("compare", "--png", "x.png"), "two prompt lengths"),
        (("compare", "--contender", "magic"), "'magic' is none of: plain forward"),
        (("compare", "--device", "nowhere"), "nowhere"),
        (("compare", "--json", "no/such/x.json"), "there is no folder no/such"),
        (("compare", "--tokens", "8,16", "--png", "no/such/x.png"), "there is no folder no/such"),
        (("compare", "--tokens", "8,16", "--png", "x.svg"), "curves are drawn as .png; got x.svg"),
        (("compare", "--json", "."), "it is a folder"),
        (("table", "--json", "no/such/x.json"), "there is no folder no/such"),
        (("table", "--model", "tiny-gpt2"), "takes at most 256 tokens"),
        (("bars", "--json", "no/such/x.json"), "there is no folder no/such"),
        (("bars", "--only", "speed"), "'speed' is none of time-last"),
        (("bars", "--only", "chunks", "--tokens", "8"), "chunks needs 16 tokens at least; got 8"),
    ],
)
def test_unmeasurable_options_are_refused_before_work(arguments, message):
    done = run(*arguments, code=2)
    assert message in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("package", ["altair", "vl_convert"])
def test_missing_plot_packages_are_named_before_work(monkeypatch, tmp_path, package):
    for name in ("altair", "vl_convert"):
        pytest.importorskip(name)
    monkeypatch.setitem(sys.modules, package, None)
    picture = str(tmp_path / "out.png")
    tiny = ("--model", "tiny-gpt2", "--tokens", "8,16")
    done = run("compare", *tiny, "--png", picture, *ONLY_HERE, code=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("pip install 'altair>=5.5' 'vl-convert-python>=1.7'")


# The bars


@pytest.mark.parametrize(
    "name", [name for name in bars.BARS if name not in ("offload", "many", "generate", "ray")]
)
def test_bar_lengths_beyond_the_model_are_refused(name):
    done = run("bars", "--only", name, "--model", "tiny-gpt2", code=2)
    text = " ".join(done.stderr.split())
    assert f"{name} measures prompts of" in text
    assert "tiny-gpt2 takes at most 256; give other lengths" in text


def test_help_lists_cases_contenders_and_positions():
    done = run("bars", "--help")
    lines = [line.strip() for line in done.stdout.splitlines()]
    for name, case in bars.BARS.items():
        assert f"{name:<18}{case.says}" in lines  # on one line of a terminal
        assert len(case.says) > 20
    assert "A full run takes an hour" in done.stdout
    lines = [line.strip() for line in run("compare", "--help").stdout.splitlines()]
    assert set(contenders.COMPARED) <= set(lines)
    assert {f"{name:<6}{says}" for name, says in POSITIONS.items()} <= set(lines)
    assert all(len(line) < 80 for line in lines)


def test_a_bar_is_measured_on_other_sizes_and_filed(tmp_path):
    figures = tmp_path / "bars.json"
    done = run(
        *("bars", "--only", "time-next", "--model", "tiny-gpt2", "--tokens", "12"),
        *("--repeats", "2", "--json", str(figures)),
    )
    assert "≤ 1.35" in done.stdout
    filed = json.loads(figures.read_text())["bars"]
    assert [one["bar"] for one in filed] == ["time-next"] * 3
    for one in filed:
        assert one["limit"] == 1.35
        assert one["met"] is (one["ratio"]["median"] <= 1.35)
        assert one["ratio"]["low"] <= one["ratio"]["median"] <= one["ratio"]["high"]


def test_a_figure_that_was_taken_once_has_no_quartiles(monkeypatch, tmp_path):
    taken = [Measured("a case", once(0.5), 1.0)]
    _put(monkeypatch, "memory", lambda options: taken)
    figures = tmp_path / "bars.json"
    done = run("bars", "--only", "memory", "--json", str(figures))
    assert " - " in done.stdout.replace("│", " ")
    (one,) = json.loads(figures.read_text())["bars"]
    assert one["ratio"] == {"low": None, "median": 0.5, "high": None}
    assert one["met"] is True


def _put(monkeypatch, name, measure):
    """Another measurement in place of a case's own."""
    case = dataclasses.replace(bars.BARS[name], measure=measure)
    monkeypatch.setitem(bars.BARS, name, case)


@pytest.mark.parametrize("at_least", [False, True])
def test_a_missed_bar_fails_only_when_asked_to(monkeypatch, at_least):
    value = once(0.5 if at_least else 2.0)
    missed = Measured("a case", value, 1.0, at_least=at_least)
    assert missed.met is False
    assert dataclasses.replace(missed, at_least=not at_least).met is True
    assert dataclasses.replace(missed, limit=None).met is None
    _put(monkeypatch, "memory", lambda options: [missed])
    assert "MISSED" in run("bars", "--only", "memory").stdout
    run("bars", "--only", "memory", "--strict", code=1)


def test_unmeasurable_cases_give_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(peers, "version", lambda package: None)
    figures = tmp_path / "bars.json"
    names = "gpu,reference-time,reference-memory,offload"
    done = run("bars", "--only", names, "--strict", "--json", str(figures))
    assert "gpu: skipped, there is no CUDA device" in done.stdout
    assert "reference-time: skipped, TransformerLens is not installed" in done.stdout
    extra = "pip install 'dla-hooks[offload]'"
    assert f"offload: skipped, accelerate is not installed: {extra}" in done.stdout
    assert [one["bar"] for one in json.loads(figures.read_text())["bars"]] == names.split(",")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in bars.BARS if name not in ("gpu", "ray")])
def test_every_bar_runs_on_a_tiny_model(name, tmp_path):
    """Whether it is met says nothing at this size."""
    pytest.importorskip("accelerate")
    figures = tmp_path / "bars.json"
    model = "tiny-llama" if name in ("chunks", "offload") else "tiny-gpt2"
    run(
        *("bars", "--only", name, "--model", model, "--tokens", "64"),
        *("--repeats", "2", "--json", str(figures)),
    )
    filed = json.loads(figures.read_text())["bars"]
    if "skipped" in filed[0]:
        pytest.skip(filed[0]["skipped"])
    found = [one["ratio"]["median"] for one in filed]
    assert all(0 <= ratio < 1e3 for ratio in found), found
    # A tiny model may not raise the peak of memory at all, and chunks measure nothing else.
    assert name == "chunks" or any(ratio > 0 for ratio in found), found


def test_named_sizes_match_parameter_counts():
    from transformers import AutoConfig, AutoModelForCausalLM

    millions = {}
    for name in ("gpt2-small", "gpt2-medium", "llama-250m", "llama-1b", "llama-3-8b"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]))
        millions[name] = round(sum(p.numel() for p in model.parameters()) / 1e6)
    assert millions == {
        "gpt2-small": 124,
        "gpt2-medium": 355,
        "llama-250m": 246,
        "llama-1b": 1100,
        "llama-3-8b": 8030,
    }


@pytest.mark.tl
@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("model", TINY)
def test_installed_peers_agree(model, unit, pos):
    names, skipped = contenders.split_missing(set(contenders.COMPARED) - set(HERE))
    if not names:
        pytest.skip("; ".join(dict.fromkeys(skipped.values())))
    setting = Setting(model, tokens=12, batch=2, unit=unit, pos=pos)
    assert all(one.rows > 0 for one in prove_on(_peers(model), names, setting))


@functools.cache
def _peers(model):
    return Bench(Setting(model))
