"""The case on a GPU: one model of 8 billion random weights, made on the device itself."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.agree import prove
from benchmarks.bar import Measured, Options, Skipped, once
from benchmarks.contenders import OURS, PLAIN, Bench
from benchmarks.memory import peak_during
from benchmarks.models import Setting
from benchmarks.timing import Spread, interleaved, ratios

LIMIT = 1.03


def measured(options: Options) -> list[Measured]:
    """Llama 3 8B's shape in bfloat16: time and peak, 1.03.

    Over the plain forward pass, head unit, last and all positions.
    """
    if not torch.cuda.is_available():
        raise Skipped("there is no CUDA device")
    setting = Setting(options.model, dtype="bfloat16", device="cuda")
    # 16 bits round differently along every path, and in 32 bits the model does not fit twice. So
    # agreement is checked on a smaller stack, with the same code on the same device. In the timed
    # calls the library checks its own sums, as in every call.
    small = Setting("long-llama", 2048, device="cuda")
    for pos in ("last", "all"):
        options.say(f"{small.named()}: do all agree?")
        prove([PLAIN, OURS, "output_hidden_states"], replace(small, pos=pos))
    options.say(f"making {setting.model} on {torch.cuda.get_device_name()}")
    bench = Bench(setting)
    found = []
    for tokens in options.tokens:
        for pos in ("last", "all"):
            here = replace(setting, tokens=tokens, pos=pos)
            calls = {name: bench.call(name, here) for name in (PLAIN, OURS)}
            options.say(f"timing, {here.named()}, {options.repeats} rounds")
            seconds = interleaved(calls, options.repeats, here.device, warm_up=2)
            found.append(
                Measured(
                    f"time, {here.named()}",
                    Spread.of(ratios(seconds, PLAIN)[OURS]),
                    LIMIT,
                    detail=f"{Spread.of(seconds[PLAIN]).median * 1e3:,.1f} ms plain",
                )
            )
            # The allocator counts to the byte, so the process may be this one.
            peaks = {name: peak_during(call, here.device) for name, call in calls.items()}
            found.append(
                Measured(
                    f"memory, {here.named()}",
                    once(peaks[OURS] / peaks[PLAIN]),
                    LIMIT,
                    detail=f"{peaks[OURS] / 1e6:,.1f} MB / {peaks[PLAIN] / 1e6:,.1f} MB",
                )
            )
    return found
