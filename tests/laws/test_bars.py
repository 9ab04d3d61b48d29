"""Bars: one argument for all verbs that may take long, and none that nobody asked for."""

from __future__ import annotations

import inspect
import io
import sys

import pytest

import dla_hooks
from dla_hooks import InputError

PROMPT = "The keys near the cabinet"
VERBS = {
    "direct_logit_attribution": dict(answer_tokens=" are", chunk_size=2),
    "compare": dict(answer_tokens=" are", chunk_size=2, other_input="The dogs near the cabinet"),
    "effects": dict(answer_tokens=" are", parts=["L1H0", "2_mlp_out"]),
    "upstream": dict(answer_tokens=" are", part="L3H1<1", chunk_size=2),
    "report": dict(units=["component"], chunk_size=2),
}
STEPS = {"effects": "part"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def demo():
    return dla_hooks.demo.load()


@pytest.fixture
def says(demo, monkeypatch):
    """What a verb writes to stderr."""

    def call(name, stream=io.StringIO, input=PROMPT, **options):
        monkeypatch.setattr(sys, "stderr", stream())
        given = {"input": input, "tokenizer": demo[1], **VERBS.get(name, {}), **options}
        getattr(dla_hooks, name)(demo[0], **given)
        return sys.stderr.getvalue()

    return call


@pytest.mark.parametrize("name", VERBS)
def test_bar_is_shown_where_it_is_asked_for(says, name):
    assert STEPS.get(name, "chunk") in says(name, progress=True)
    assert says(name, Terminal, progress=False) == ""
    assert says(name) == ""


@pytest.mark.parametrize("name", VERBS)
def test_bar_that_nobody_asked_for_waits_for_half_a_second(says, name, monkeypatch):
    assert says(name, Terminal) == ""
    monkeypatch.setattr("dla_hooks.bars._SOON", 0)
    assert STEPS.get(name, "chunk") in says(name, Terminal)


def test_one_run_has_no_bar(says):
    assert says("direct_logit_attribution", chunk_size=None, progress=True) == ""
    assert says("report", chunk_size=None, progress=True) == ""


def test_bars_of_prompts_and_parts_stand_alone(says):
    found = says("report", input=[PROMPT, "The dogs near the car"], progress=True)
    assert "prompt" in found
    assert "chunk" not in found
    assert "chunk" not in says("effects", chunk_size=2, progress=True).rpartition("part")[2]


def test_plan_shows_a_bar(demo, monkeypatch):
    plan = dla_hooks.prepare(demo[0], " are", tokenizer=demo[1])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    quiet, shown = plan(PROMPT, chunk_size=2), plan(PROMPT, chunk_size=2, progress=True)
    assert "chunk" in sys.stderr.getvalue()
    assert quiet.attribution.equal(shown.attribution)


@pytest.mark.parametrize("name", [*VERBS, "attribute_many", "attribute_generation"])
def test_progress_is_an_argument_of_every_long_verb(demo, name):
    verb = getattr(dla_hooks, name)
    assert inspect.signature(verb).parameters["progress"].default is None
    assert "progress: show a bar" in inspect.getdoc(verb)


@pytest.mark.parametrize("name", VERBS)
def test_progress_of_another_kind_is_refused(says, name):
    with pytest.raises(InputError, match="progress must be True, False or None, got 'yes'"):
        says(name, progress="yes")


@pytest.mark.filterwarnings("ignore::dla_hooks.DLAWarning")  # of the hook
def test_bar_is_gone_after_an_error(says, demo):
    def fails(*_):
        raise ZeroDivisionError

    handle = demo[0].transformer.h[2].register_forward_hook(fails)
    try:
        with pytest.raises(ZeroDivisionError):
            says("direct_logit_attribution", progress=True)
    finally:
        handle.remove()
    assert says("direct_logit_attribution") == ""
