"""The cases of the finer units: neurons, experts, the tokens that heads read, promoted tokens."""

from __future__ import annotations

from typing import Any

import torch

import dla_hooks
from benchmarks.agree import Disagreement
from benchmarks.bar import Measured, Options, Skipped, once
from benchmarks.contenders import CHUNKED, OURS, PLAIN, PLAIN_CHUNKED, Bench
from benchmarks.memory import measurable, peak_of
from benchmarks.models import Setting
from benchmarks.timing import Spread, interleaved, ratios

# Unit and position: the bars of time and of memory. They were set for these sizes alone.
_LIMITS: dict[tuple[str, str], tuple[float, float | None]] = {
    ("neuron", "last"): (1.05, 1.03),
    ("neuron", "all"): (1.35, 1.10),
    ("source", "last"): (1.08, 1.05),
    ("source, 2 heads", "all"): (1.15, 1.15),
    ("four units", "last"): (1.15, None),
    ("expert", "last"): (1.08, 1.05),
    ("expert", "all"): (2.1, 1.15),
}
_SIZES = (("gpt2-small", 512), ("mixtral-6x768", 512))


def units(options: Options) -> list[Measured]:
    """Finer units over a plain pass: time 1.05 to 2.1, peak 1.03 to 1.15."""
    found = []
    for model, tokens in [*((options.model, tokens) for tokens in options.tokens), *options.also]:
        experts = model.startswith("mixtral")
        for (unit, pos), limits in _LIMITS.items():
            if (unit == "expert") == experts:
                setting = Setting(model, tokens, unit=unit, pos=pos)
                limits = limits if (model, tokens) in _SIZES else (None, None)
                found += _measured(setting, options, *limits)
    return found


def in_chunks(options: Options) -> list[Measured]:
    """The source unit in chunks: peak over a plain loop, at most 1.05."""
    if not measurable():
        raise Skipped("peak memory is measured on Linux only")
    tokens = options.tokens[0]
    setting = Setting(options.model, tokens, unit="source", pos="last", chunk=max(1, tokens // 16))
    options.say(f"peak memory, {setting.named()}")
    peak, plain = peak_of(CHUNKED, setting), peak_of(PLAIN_CHUNKED, setting)
    return [_peaks("over a plain loop", setting, peak, plain, 1.05)]


def promoted(options: Options) -> list[Measured]:
    """Promoted tokens, beyond their pass, over a 512-token pass: at most 0.3."""
    found = []
    for tokens in options.tokens:
        setting = Setting(options.model, tokens, unit="component", pos="last")
        bench = Bench(setting)
        model, ids = bench.model("hf"), setting.ids()
        calls = {
            PLAIN: bench.call(PLAIN, setting),
            "promoted": lambda model=model, ids=ids: dla_hooks.promoted_tokens(model, ids),
        }
        options.say(f"{setting.named()}: are the ranked logits those of an attribution?")
        _prove_ranks(calls["promoted"](), model, ids)
        options.say(f"{setting.named()}: timing promoted tokens, {options.repeats} rounds")
        seconds = interleaved(calls, options.repeats, setting.device, warm_up=2)
        beyond = [ratio - 1 for ratio in ratios(seconds, PLAIN)["promoted"]]
        limit = 0.3 if (options.model, tokens) in _SIZES else None
        found.append(Measured(f"promoted tokens, {setting.named()}", Spread.of(beyond), limit))
    return found


def _measured(
    setting: Setting, options: Options, most_time: float | None, most_memory: float | None
) -> list[Measured]:
    bench = Bench(setting)
    calls = {name: bench.call(name, setting) for name in (PLAIN, OURS)}
    options.say(f"{setting.named()}: do the parts make up the model's logits?")
    _prove(calls[OURS](), bench.model("hf"), setting)
    options.say(f"{setting.named()}: timing, {options.repeats} rounds")
    seconds = interleaved(calls, options.repeats, setting.device, warm_up=2)
    found = [
        Measured(
            f"time, {setting.named()}",
            Spread.of(ratios(seconds, PLAIN)[OURS]),
            most_time,
            detail=f"{Spread.of(seconds[OURS]).median * 1e3:,.0f} ms",
        )
    ]
    if measurable():
        options.say(f"peak memory, {setting.named()}")
        peak, plain = peak_of(OURS, setting), peak_of(PLAIN, setting)
        found.append(_peaks("memory", setting, peak, plain, most_memory))
    return found


def _prove(out: Any, model: Any, setting: Setting) -> None:
    """Check the sums against the model's own logits before anything is timed."""
    answer, incorrect, pos = setting.answers()
    with torch.no_grad():
        logits = model(setting.ids(), use_cache=False).logits
    own = logits[..., answer] - logits[..., incorrect]
    own = own if pos is None else own[:, pos]
    for result in out.values() if isinstance(out, dict) else [out]:
        gap = float((result.total() + result.bias - own).abs().max())
        if not gap <= 1e-4 * float(logits.amax() - logits.amin()):
            raise Disagreement(f"{result.unit} misses the model's own logits by {gap:.1e}")


def _prove_ranks(out: Any, model: Any, ids: Any) -> None:
    """Check the first token of the last row against the attribution of its centred logit."""
    token = out.up_ids[-1, :, 0]
    own = dla_hooks.direct_logit_attribution(model, ids, token, center_unembed=True)
    gap = float((out.up[-1, :, 0] - own.attribution[-1]).abs().max())
    if out.labels != own.labels or not gap <= 1e-4 * max(1.0, float(own.logit.abs().max())):
        raise Disagreement(f"promoted tokens and an attribution differ by {gap:.1e}")


def _peaks(what: str, setting: Setting, peak: int, plain: int, limit: float | None) -> Measured:
    detail = f"{peak / 1e6:,.1f} MB / {plain / 1e6:,.1f} MB"
    return Measured(f"{what}, {setting.named()}", once(peak / plain), limit, detail=detail)
