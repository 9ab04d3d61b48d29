"""The cases of questions of several runs: their cost over the plain passes that they contain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dla_hooks
from benchmarks.agree import Disagreement
from benchmarks.bar import Measured, Options, once
from benchmarks.contenders import PLAIN, Bench
from benchmarks.memory import in_a_process, measurable, peak_during, peak_of
from benchmarks.models import Setting
from benchmarks.timing import Call, Spread, interleaved, ratios

# The sizes that the bars were set for; any other is measured without a bar.
_SIZES = (("gpt2-small", 512),)
_WARM_UP = 16  # tokens
_PARTS = 10


class Passes:
    """Plain forward passes, one after the other.

    Args:
        runs: each a model and its ids.
    """

    def __init__(self, *runs: tuple[Any, Tensor]) -> None:
        self.runs = runs

    def __call__(self) -> list[Tensor]:
        """The logits at the last position of each."""
        with torch.no_grad():
            return [
                model(ids, use_cache=False, logits_to_keep=1).logits for model, ids in self.runs
            ]


def compare(options: Options) -> list[Measured]:
    """Two runs compared: time over two plain passes, peak over one (1.05)."""
    found = []
    for tokens in options.tokens:
        setting = Setting(options.model, tokens, unit="component", pos="last")
        limit = 1.05 if (options.model, tokens) in _SIZES else None
        model = Bench(setting).model("hf")
        for name, make in COMPARISONS.items():
            call, passes = make(model, setting)
            options.say(f"{name}, {setting.named()}: is it the difference of the models' logits?")
            _prove(call(), passes(), setting)
            what = f"{name}, {setting.named()}"
            found.append(_timed(what, {PLAIN: passes, "compare": call}, limit, options))
            if measurable():
                options.say(f"peak memory of {what}")
                peak = in_a_process({"job": "question", "name": name, "setting": vars(setting)})
                plain = peak_of(PLAIN, setting)
                detail = f"{peak / 1e6:,.1f} MB / {plain / 1e6:,.1f} MB"
                found.append(
                    Measured(f"memory, {what}", once(peak / max(1, plain)), limit, detail=detail)
                )
    return found


def early(options: Options) -> list[Measured]:
    """A direction at layer l of L, prepared: time at most l / L + 0.1, peak 1.03."""
    found = []
    for tokens in options.tokens:
        setting = Setting(options.model, tokens, unit="component", pos="last")
        bar = (options.model, tokens) in _SIZES
        model = Bench(setting).model("hf")
        for name, share in _EARLY.items():
            call, passes = _direction(share)(model, setting)
            layer, n = _layer(model, share)
            what = f"a direction at layer {layer} of {n}, {setting.named()}"
            options.say(f"{what}: is it the stream's own projection?")
            _prove_direction(call(), model, setting, layer)
            limit = layer / n + 0.1 if bar else None
            found.append(_timed(what, {PLAIN: passes, "early": call}, limit, options))
            if measurable():
                peak = in_a_process({"job": "question", "name": name, "setting": vars(setting)})
                plain = peak_of(PLAIN, setting)
                found.append(
                    Measured(
                        f"memory, {what}",
                        once(peak / max(1, plain)),
                        1.03 if bar else None,
                        detail=f"{peak / 1e6:,.1f} MB / {plain / 1e6:,.1f} MB",
                    )
                )
    return found


def effects(options: Options) -> list[Measured]:
    """Effects of 10 rows: time over 11 plain passes (1.05)."""
    found = []
    for tokens in options.tokens:
        for unit in ("component", "head"):
            setting = Setting(options.model, tokens, unit=unit, pos="last")
            limit = 1.05 if (options.model, tokens) in _SIZES else None
            model, ids = Bench(setting).model("hf"), setting.ids()
            answer, incorrect, pos = setting.answers()
            call = partial(
                dla_hooks.effects, model, ids, answer, incorrect, unit=unit, parts=_PARTS, pos=pos
            )
            what = f"effects of {_PARTS} rows, {setting.named()}"
            options.say(f"{what}: are they differences of the model's own logits?")
            _prove_effects(call(), model, setting)
            passes = Passes(*[(model, ids)] * (1 + _PARTS))
            found.append(_timed(what, {PLAIN: passes, "effects": call}, limit, options))
    return found


def _prove_effects(found: Any, model: Any, setting: Setting) -> None:
    """Check each total against the model's own logits, under the same ablation."""
    answer, incorrect, _ = setting.answers()

    def own() -> Tensor:
        (logits,) = Passes((model, setting.ids()))()
        difference: Tensor = logits[:, -1, answer] - logits[:, -1, incorrect]
        return difference

    clean, size = own(), float(found.total.abs().max())
    for label, total in zip(found.labels, found.total, strict=True):
        with dla_hooks.ablated(model, label):
            gap = float((clean - own() - total).abs().max())
        if not gap <= 1e-3 * max(1.0, size):
            raise Disagreement(f"the effect of {label} misses the model's own logits by {gap:.1e}")


def _two_prompts(model: Any, setting: Setting) -> tuple[Call, Passes]:
    """A clean and a corrupted prompt of one model, and the plain passes over both."""
    ids = setting.ids()
    answer, incorrect, pos = setting.answers()
    other = ids.roll(3, dims=1)

    def call() -> Any:
        return dla_hooks.compare(
            model, None, ids, answer, incorrect, other_input=other, unit=setting.unit, pos=pos
        )

    return call, Passes((model, ids), (model, other))


def _two_checkpoints(model: Any, setting: Setting) -> tuple[Call, Passes]:
    """A model and a changed copy of it, and the plain passes of both."""
    ids = setting.ids()
    answer, incorrect, pos = setting.answers()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.01

    def call() -> Any:
        return dla_hooks.compare(model, other, ids, answer, incorrect, unit=setting.unit, pos=pos)

    return call, Passes((model, ids), (other, ids))


def _layer(model: Any, share: float) -> tuple[int, int]:
    """The layer at a share of the depth, and the depth."""
    n: int = model.config.num_hidden_layers
    return min(round(share * n), n - 1), n


def _direction(share: float) -> Callable[[Any, Setting], tuple[Call, Passes]]:
    """A prepared plan of a direction part of the way up, and the plain pass."""

    def make(model: Any, setting: Setting) -> tuple[Call, Passes]:
        ids, pos = setting.ids(), setting.answers()[2]
        target = dla_hooks.Direction(_vector(model), f"{_layer(model, share)[0]}_pre")
        plan = dla_hooks.prepare(model, target, unit=setting.unit)
        return lambda: plan(ids, pos=pos), Passes((model, ids))

    return make


def _vector(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(model.config.hidden_size, generator=generator)


def _prove_direction(found: Any, model: Any, setting: Setting, layer: int) -> None:
    """Check the sum against the model's own hidden states."""
    with torch.no_grad():
        states = model(setting.ids(), output_hidden_states=True, use_cache=False).hidden_states
    own = states[layer][:, -1] @ _vector(model)
    gap = float((found.attribution.sum(0) - own).abs().max())
    if not gap <= 1e-4 * float(found.attribution.abs().max()):
        raise Disagreement(f"a direction misses the stream's own projection by {gap:.1e}")


_EARLY = {"a quarter up": 0.25, "half way up": 0.5, "three quarters up": 0.75}
COMPARISONS: dict[str, Callable[[Any, Setting], tuple[Call, Passes]]] = {
    "two prompts": _two_prompts,
    "two checkpoints": _two_checkpoints,
}


CALLS = COMPARISONS | {name: _direction(share) for name, share in _EARLY.items()}


def peak_here(name: str, setting: dict[str, Any]) -> int:
    """Bytes above the weights at the highest point of one call, in this process."""
    asked = Setting(**setting)
    model = Bench(asked).model("hf")
    short = Setting(**{**setting, "tokens": min(asked.tokens, _WARM_UP)})
    make = CALLS[name]
    call, passes = make(model, asked)
    make(model, short)[0]()
    for one, _ in passes.runs:
        for parameter in one.parameters():
            parameter.sum()  # touches every page
    return peak_during(call, asked.device)


def _prove(found: Any, logits: Any, setting: Setting) -> None:
    """Check the sums against the models' own logits before anything is timed."""
    answer, incorrect, _ = setting.answers()
    own = [one[:, -1, answer] - one[:, -1, incorrect] for one in logits]
    gap = float((found.attribution.sum(0) + found.bias - (own[0] - own[1])).abs().max())
    if not gap <= 1e-4 * float(logits[0].amax() - logits[0].amin()):
        raise Disagreement(f"a comparison misses the models' own logits by {gap:.1e}")


def _timed(what: str, pair: dict[str, Call], limit: float | None, options: Options) -> Measured:
    """Interleaved rounds of the plain passes and the call; the median of their ratios."""
    options.say(f"timing {what}, {options.repeats} rounds")
    seconds = interleaved(pair, options.repeats, warm_up=2)
    (other,) = (name for name in pair if name != PLAIN)
    taken = {name: Spread.of(times).median * 1e3 for name, times in seconds.items()}
    return Measured(
        f"time, {what}",
        Spread.of(ratios(seconds, PLAIN)[other]),
        limit,
        detail=f"{taken[other]:,.0f} ms / {taken[PLAIN]:,.0f} ms",
    )
