"""The cases of a prepared plan: the cost of a call after everything is measured once.

Short prompts show it best: on long ones the forward pass hides everything else.
"""

from __future__ import annotations

from typing import Any

import dla_hooks
from benchmarks.agree import Disagreement
from benchmarks.bar import Measured, Options
from benchmarks.contenders import OURS, PLAIN, Bench, Call
from benchmarks.models import UNITS, Setting
from benchmarks.timing import Spread, interleaved, ratios

# The sizes that the bars were set for; any other is measured without a bar.
_PLAN = {("gpt2-4x96", 16): 1.6, ("gpt2-small", 16): 1.08, ("gpt2-small", 512): 1.02}
_ONE_SHOT = {("gpt2-4x96", 16): 2.3, ("gpt2-small", 16): 1.15, ("gpt2-small", 512): 1.03}
_SEVERAL = {("gpt2-small", 512): 1.03}

_SHORT = 64  # tokens, up to which a call takes milliseconds and needs more rounds
_ROUNDS_OF_SHORT = 20


def plan(options: Options) -> list[Measured]:
    """A plan's call over a plain pass, head, last: 1.6 to 1.02."""
    found = []
    for setting in _settings(options):
        bench = Bench(setting)
        ids, answer, incorrect = _asked(setting)
        prepared = dla_hooks.prepare(bench.model("hf"), answer, incorrect, unit=setting.unit)
        options.say(f"{setting.named()}: do the plan and the one-shot call agree?")
        _prove_same(prepared(ids), bench.call(OURS, setting)(), "a plan's call")
        pair = {PLAIN: bench.call(PLAIN, setting), "plan": lambda plan=prepared, ids=ids: plan(ids)}
        found.append(_timed("a plan's call", setting, pair, PLAIN, options, _PLAN))
    return found


def one_shot(options: Options) -> list[Measured]:
    """One whole call over a plain pass, head, last: 2.3 to 1.03."""
    found = []
    for setting in _settings(options):
        bench = Bench(setting)
        pair = {name: bench.call(name, setting) for name in (PLAIN, OURS)}
        found.append(_timed("a one-shot call", setting, pair, PLAIN, options, _ONE_SHOT))
    return found


def several(options: Options) -> list[Measured]:
    """Three units in one pass over a head call: at most 1.03."""
    found = []
    for setting in _settings(options):
        model = Bench(setting).model("hf")
        ids, answer, incorrect = _asked(setting)

        def call(unit: Any, model: Any = model, asked: Any = (ids, answer, incorrect)) -> Call:
            return lambda: dla_hooks.direct_logit_attribution(model, *asked, unit=unit)

        options.say(f"{setting.named()}: does each unit agree with its own call?")
        together = call(UNITS)()
        for unit in UNITS:
            _prove_same(together[unit], call(unit)(), f"{unit} among several units")
        pair = {"head": call("head"), "several": call(UNITS)}
        what = "component, layer and head over head alone"
        found.append(_timed(what, setting, pair, "head", options, _SEVERAL))
    return found


def _settings(options: Options) -> list[Setting]:
    sizes = [*options.also, *((options.model, tokens) for tokens in options.tokens)]
    return [Setting(model, tokens, unit="head", pos="last") for model, tokens in sizes]


def _asked(setting: Setting) -> tuple[Any, Any, Any]:
    answer, incorrect, _ = setting.answers()
    return setting.ids(), answer, incorrect


def _prove_same(found: Any, expected: Any, who: str) -> None:
    """Check that a case gives the numbers of a separate call, before it is timed."""
    if list(found.labels) != list(expected.labels):
        raise Disagreement(f"{who} has other rows than a call of its own")
    gap = float((found.attribution - expected.attribution).abs().max())
    if not gap <= 1e-5 * max(1.0, float(expected.logit.abs().max())):
        raise Disagreement(f"{who} and a call of its own differ by {gap:.1e}")


def _timed(
    what: str,
    setting: Setting,
    pair: dict[str, Call],
    over: str,
    options: Options,
    limits: dict[tuple[str, int], float],
) -> Measured:
    """Interleaved rounds of two calls; the median of their ratios, round by round."""
    rounds = options.repeats * (_ROUNDS_OF_SHORT if setting.tokens <= _SHORT else 1)
    options.say(f"{setting.named()}: timing {what}, {rounds} rounds")
    seconds = interleaved(pair, rounds, setting.device, warm_up=3)
    (other,) = (name for name in pair if name != over)
    taken = {name: Spread.of(times).median * 1e3 for name, times in seconds.items()}
    return Measured(
        f"{what}, {setting.named()}",
        Spread.of(ratios(seconds, over)[other]),
        limits.get((setting.model, setting.tokens)),
        detail=f"{taken[other]:,.2f} ms / {taken[over]:,.2f} ms, {rounds} rounds",
    )
