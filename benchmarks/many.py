"""The case of many short prompts, against a plain loop over the very same batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.agree import Disagreement
from benchmarks.bar import Measured, Options
from benchmarks.contenders import Bench
from benchmarks.models import ANSWER, INCORRECT, MODELS, Setting
from benchmarks.timing import Spread, interleaved, ratios
from dla_hooks import attribute_many, direct_logit_attribution
from dla_hooks.many.batches import pad_left
from dla_hooks.many.order import batches_of

_PROMPTS, _SHORTEST, _LONGEST = 256, 8, 64
_MAX_TOKENS = 4096


def measured(options: Options) -> list[Measured]:
    """256 short prompts: speed over a plain loop, at least 0.9."""
    name = options.model
    model = Bench(Setting(name)).model("hf")
    prompts = _prompts(MODELS[name].get("vocab_size", 50257))
    n_tokens = sum(map(len, prompts))
    found = []
    for unit in ("component", "head"):
        plain, ours = _plain(model, prompts), _ours(model, prompts, unit)
        options.say(f"{_PROMPTS} prompts, {unit}: does each agree with its prompt run alone?")
        _prove(model, prompts, unit, ours())
        options.say(f"timing {_PROMPTS} prompts, {options.repeats} rounds")
        seconds = interleaved({"plain loop": plain, "ours": ours}, options.repeats)
        inverse = [1 / ratio for ratio in ratios(seconds, "plain loop")["ours"]]
        speed = {who: n_tokens / Spread.of(times).median for who, times in seconds.items()}
        found.append(
            Measured(
                f"tokens per second over a plain loop, {name}, {_PROMPTS} prompts, {unit}",
                Spread.of(inverse),
                0.9,
                at_least=True,
                detail=f"{speed['ours']:,.0f} / {speed['plain loop']:,.0f} tokens per second",
            )
        )
    return found


def _prompts(vocabulary: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(_SHORTEST, _LONGEST + 1, (_PROMPTS,), generator=generator)
    return [torch.randint(vocabulary, (int(n),), generator=generator) for n in lengths]


def _plain(model: Any, prompts: list[Tensor]) -> Callable[[], Any]:
    order = batches_of([len(ids) for ids in prompts], _MAX_TOKENS)

    def loop() -> None:
        for batch in order:
            ids, mask = pad_left([prompts[i] for i in batch])
            positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
            with torch.no_grad():
                model(
                    ids,
                    attention_mask=mask.long(),
                    position_ids=positions,
                    use_cache=False,
                    logits_to_keep=1,
                )

    return loop


def _ours(model: Any, prompts: list[Tensor], unit: str) -> Callable[[], list[Any]]:
    def call() -> list[Any]:
        results = attribute_many(
            model, prompts, ANSWER, INCORRECT, unit=unit, max_tokens=_MAX_TOKENS, progress=False
        )
        return list(results)

    return call


def _prove(model: Any, prompts: list[Tensor], unit: str, results: list[Any]) -> None:
    for i in range(0, len(prompts), len(prompts) // 8):
        alone = direct_logit_attribution(model, prompts[i], ANSWER, INCORRECT, unit=unit)
        gap = float((results[i].attribution - alone.attribution).abs().max())
        if not gap <= 1e-4 * max(1.0, float(alone.logit.abs().max())):
            raise Disagreement(f"prompt {i} among many and alone: attributions differ by {gap:.1e}")
