"""The case of generation: each new token attributed, against the model's own ``generate``."""

from __future__ import annotations

from typing import Any

import dla_hooks
from benchmarks.agree import Disagreement
from benchmarks.bar import Measured, Options, Skipped
from benchmarks.contenders import Bench
from benchmarks.models import Setting, longest_prompt
from benchmarks.timing import Spread, interleaved, ratios

_NEW = 64
_LIMIT = ("gpt2-small", 1.10)


def measured(options: Options) -> list[Measured]:
    """64 new tokens, component: time over model.generate, at most 1.10."""
    return [
        _of(Setting(options.model, tokens, unit="component"), options) for tokens in options.tokens
    ]


def _of(setting: Setting, options: Options) -> Measured:
    if setting.tokens + _NEW > longest_prompt(setting.model):
        raise Skipped(f"{setting.model} has no positions for {_NEW} tokens behind {setting.tokens}")
    model, ids = Bench(setting).model("hf"), setting.ids()
    plain: dict[str, Any] = {"max_new_tokens": _NEW, "do_sample": False, "eos_token_id": None}

    def generate() -> Any:
        return model.generate(ids, **plain)

    def ours() -> Any:
        return dla_hooks.attribute_generation(
            model, ids, unit=setting.unit, progress=False, **plain
        )

    options.say(f"{setting.model}, {setting.tokens} tokens and {_NEW} new ones: do both agree?")
    _prove(model, generate(), ours())
    options.say(f"timing {_NEW} new tokens, {options.repeats} rounds")
    seconds = interleaved({"generate": generate, "ours": ours}, options.repeats)
    taken = {name: Spread.of(times).median * 1e3 for name, times in seconds.items()}
    name, limit = _LIMIT
    return Measured(
        f"{_NEW} new tokens over model.generate, {setting.model}, {setting.tokens} tokens, "
        f"{setting.unit}",
        Spread.of(ratios(seconds, "generate")["ours"]),
        limit if setting.model == name else None,
        detail=f"{taken['ours']:,.0f} ms / {taken['generate']:,.0f} ms",
    )


def _prove(model: Any, text: Any, found: Any) -> None:
    """Check that the tokens are the same, and the numbers those of the finished text."""
    new = text[:, -_NEW:]
    if not bool((found.generated_ids == new).all()):
        raise Disagreement("the generation that is attributed has other tokens than generate")
    places = list(range(-_NEW - 1, -1))
    expected = dla_hooks.direct_logit_attribution(model, text, new, pos=places, unit=found.unit)
    gap = float((found.attribution - expected.attribution).abs().max())
    if not gap <= 1e-4 * max(1.0, float(expected.logit.abs().max())):
        raise Disagreement(f"generation and the finished text differ by {gap:.1e}")
