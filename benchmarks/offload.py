"""The case of a model that lies on disk between uses (extra ``offload``: accelerate)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.agree import Disagreement
from benchmarks.bar import Measured, Options, Skipped, once
from benchmarks.contenders import OURS, Bench
from benchmarks.memory import in_a_process, measurable, peak_during
from benchmarks.models import Setting
from benchmarks.timing import Spread, interleaved, ratios
from dla_hooks import checkpoint, direct_logit_attribution

_PLAIN = "accelerate's own pass"


def measured(options: Options) -> list[Measured]:
    """From disk: peak over the weights (0.5), time (1.15).

    The peak is resident memory above the interpreter, loading included; the time is over a plain
    pass.
    """
    if peers.version("accelerate") is None:
        raise Skipped("accelerate is not installed: pip install 'dla-hooks[offload]'")
    folder = Path(tempfile.mkdtemp(prefix="bench-offload-"))
    try:
        return _in(folder, Setting(options.model, options.tokens[0]), options)
    finally:
        shutil.rmtree(folder)


def _in(folder: Path, setting: Setting, options: Options) -> list[Measured]:
    options.say(f"making and saving {setting.model}")
    bench = Bench(setting)
    model = bench.model("hf")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder)
    expected = bench.call(OURS, setting)()
    del bench, model

    options.say(f"{setting.named()}, all weights on disk: does it agree with the model in memory?")
    plain, ours = _calls(_load(folder), setting)
    gap = float((ours().attribution - expected.attribution).abs().max())
    if not gap <= 1e-4 * float(expected.logit.abs().max()):
        raise Disagreement(f"on disk and in memory, attributions differ by {gap:.1e}")
    options.say(f"timing over {_PLAIN}, {options.repeats} rounds")
    seconds = interleaved({_PLAIN: plain, OURS: ours}, options.repeats)
    over = Spread.of(ratios(seconds, _PLAIN)[OURS])
    detail = f"{Spread.of(seconds[_PLAIN]).median:.2f} s plain"
    found = [Measured(f"time on disk, {setting.named()}", over, 1.15, detail=detail)]
    if measurable():
        for who, is_ours in ((OURS, True), (_PLAIN, False)):
            options.say(f"peak memory of {who}, loading included, in a process of its own")
            job = {"job": "offload", "folder": str(folder), "model": setting.model}
            peak = in_a_process({**job, "tokens": setting.tokens, "ours": is_ours})
            found.append(
                Measured(
                    f"peak of {who} over the weights' size, {setting.named()}",
                    once(peak / weights),
                    0.5 if is_ours else None,
                    detail=f"{peak / 1e6:,.0f} MB / {weights / 1e6:,.0f} MB",
                )
            )
    return found


def peak_here(folder: str, model: str, tokens: int, ours: bool) -> int:
    """Bytes above the interpreter, with its libraries loaded, for loading and for one call."""
    import accelerate  # noqa: F401

    tiny = Setting("tiny-llama", 8)
    Bench(tiny).call(OURS, tiny)()  # imports what a first call imports

    def load_and_call() -> None:
        plain, call = _calls(_load(Path(folder)), Setting(model, tokens))
        (call if ours else plain)()

    return peak_during(load_and_call)


def _load(folder: Path) -> Any:
    return checkpoint.load_model(folder, "float32", device_map="disk")


def _calls(model: Any, setting: Setting) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A plain pass and an attribution of the same prompt."""
    ids = setting.ids()
    answer, incorrect, pos = setting.answers()

    def plain() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=False, logits_to_keep=1)

    def ours() -> Any:
        return direct_logit_attribution(model, ids, answer, incorrect, unit=setting.unit, pos=pos)

    return plain, ours
