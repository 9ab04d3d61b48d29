"""The case of promoted tokens: every token ranked for every row, without an answer."""

from __future__ import annotations

import dla_hooks
from benchmarks.agree import Disagreement
from benchmarks.bar import Measured, Options
from benchmarks.contenders import PLAIN, Bench
from benchmarks.models import UNITS, Setting
from benchmarks.timing import Spread, interleaved, ratios

_LIMIT = 1.3


def measured(options: Options) -> list[Measured]:
    """Tokens promoted by every row over a plain pass: at most 1.3."""
    found = []
    for tokens in options.tokens:
        for unit in UNITS:
            setting = Setting(options.model, tokens, unit=unit, pos="last")
            found.append(_timed(setting, options))
    return found


def _timed(setting: Setting, options: Options) -> Measured:
    bench, ids = Bench(setting), setting.ids()
    model = bench.model("hf")
    options.say(f"{setting.named()}: are the ranked logits those of an attribution?")
    _prove(model, ids, setting.unit)
    pair = {
        PLAIN: bench.call(PLAIN, setting),
        "ours": lambda: dla_hooks.promoted_tokens(model, ids, unit=setting.unit),
    }
    options.say(f"{setting.named()}: timing promoted tokens, {options.repeats} rounds")
    seconds = interleaved(pair, options.repeats, setting.device, warm_up=2)
    taken = {name: Spread.of(times).median * 1e3 for name, times in seconds.items()}
    return Measured(
        f"tokens promoted, {setting.named()}",
        Spread.of(ratios(seconds, PLAIN)["ours"]),
        _LIMIT,
        detail=f"{taken['ours']:,.0f} ms / {taken[PLAIN]:,.0f} ms",
    )


def _prove(model: object, ids: object, unit: str) -> None:
    """Check the first token of the last row against the attribution of its centred logit."""
    ours = dla_hooks.promoted_tokens(model, ids, unit=unit, k=1)
    token = ours.up_ids[-1, :, 0]
    own = dla_hooks.direct_logit_attribution(model, ids, token, unit=unit, center_unembed=True)
    gap = float((ours.up[-1, :, 0] - own.attribution[-1]).abs().max())
    if ours.labels != own.labels or not gap <= 1e-4 * max(1.0, float(own.logit.abs().max())):
        raise Disagreement(f"promoted tokens and an attribution differ by {gap:.1e}")
