"""The limits that this library sets itself, measured case by case.

Each case is a function from :class:`Options` to its figures. A case that this machine or
installation cannot measure raises :class:`Skipped` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks import (
    contenders,
    finer,
    generate,
    gpu,
    many,
    offload,
    page,
    peers,
    prepared,
    questions,
    sweep,
)
from benchmarks.agree import prove
from benchmarks.bar import Measured, Options, Skipped, once
from benchmarks.compare import grid, measure
from benchmarks.contenders import CHUNKED, OURS, PLAIN, PLAIN_CHUNKED
from benchmarks.memory import measurable, peak_of
from benchmarks.models import UNITS, Setting
from benchmarks.timing import Spread


def _time(options: Options, pos: str, limit: float) -> list[Measured]:
    settings = grid(
        model=[options.model],
        tokens=options.tokens,
        unit=UNITS,
        pos=[pos],
    )
    lines = measure(settings, [OURS], options.repeats, options.say, memory=False)
    return [
        Measured(
            f"time, {line.setting.named()}",
            line.ratio,
            limit,
            detail=f"{line.seconds.median * 1e3:,.0f} ms",
        )
        for line in lines
        if line.contender == OURS
    ]


def time_last(options: Options) -> list[Measured]:
    """Time over a plain pass, last position: at most 1.05."""
    return _time(options, "last", 1.05)


def time_all(options: Options) -> list[Measured]:
    """Time over a plain pass, all positions: at most 1.05."""
    return _time(options, "all", 1.05)


def time_next(options: Options) -> list[Measured]:
    """Time over a plain pass, next token at each: at most 1.35."""
    return _time(options, "next", 1.35)


def memory(options: Options) -> list[Measured]:
    """Peak over a plain pass, last and all: at most 1.03."""
    _check_measurable()
    found = []
    for tokens in options.tokens:
        of_model = Setting(options.model, tokens)
        options.say(f"peak memory of the plain forward pass, {tokens:,} tokens")
        plain = peak_of(PLAIN, of_model)
        for pos in ("last", "all"):
            for unit in UNITS:
                setting = replace(of_model, unit=unit, pos=pos)
                options.say(f"peak memory, {setting.named()}")
                found.append(_peaks("memory", setting, peak_of(OURS, setting), plain, 1.03))
    return found


def _reference_kinds() -> list[tuple[str, str, bool]]:
    """The reference's contenders here: name, call, and whether the bars were set for them."""
    installed = peers.version("transformer-lens") or "0"
    new = int(installed.partition(".")[0]) > 3
    names, reasons = contenders.split_missing(
        ["bridge, full cache", "HookedTransformer, full cache"]
    )
    if not names:
        raise Skipped("; ".join(dict.fromkeys(reasons.values())))
    # The bars are of 4.3.0 on a bridge and of 3.9.0 on a HookedTransformer.
    return [(name, f"{name} ({installed})", new or name.startswith("Hooked")) for name in names]


def reference_time(options: Options) -> list[Measured]:
    """The reference's time over ours: at least 3.5 or 11.

    On a bridge and on a HookedTransformer.
    """
    kinds = _reference_kinds()
    setting = Setting(options.model, options.tokens[0])
    names = [OURS, *(name for name, _, _ in kinds)]
    rounds = max(3, options.repeats // 2)
    lines = measure([setting], names, rounds, options.say, memory=False)
    taken = {line.contender: line.rounds for line in lines}
    return [
        Measured(
            f"{words}: time over ours, {setting.named()}",
            Spread.of([t / own for t, own in zip(taken[name], taken[OURS], strict=True)]),
            (11.0 if name.startswith("Hooked") else 3.5) if has_bar else None,
            at_least=True,
        )
        for name, words, has_bar in kinds
    ]


def reference_memory(options: Options) -> list[Measured]:
    """The reference's peak over ours: at least 40 or 80.

    On a bridge and on a HookedTransformer.
    """
    kinds = _reference_kinds()
    _check_measurable()
    setting = Setting(options.model, options.tokens[0])
    options.say(f"peak memory, {setting.named()}")
    own = peak_of(OURS, setting)
    found = []
    for name, words, has_bar in kinds:
        options.say(f"peak memory of {name}")
        limit = (80.0 if name.startswith("Hooked") else 40.0) if has_bar else None
        peak = peak_of(name, setting)
        what = f"{words}: peak memory over ours, {setting.named()}"
        detail = f"{peak / 1e6:,.0f} MB / {own / 1e6:,.1f} MB"
        found.append(Measured(what, once(peak / own), limit, at_least=True, detail=detail))
    return found


def chunks(options: Options) -> list[Measured]:
    """In chunks: peak over a loop (1.05), over one pass (0.65)."""
    _check_measurable()
    tokens = options.tokens[0]
    setting = Setting(options.model, tokens, chunk=tokens // _CHUNKS)
    few = replace(setting, tokens=tokens // 4)
    options.say(f"{few.named()}: do all agree?")
    prove([PLAIN, PLAIN_CHUNKED, OURS, CHUNKED], few)
    options.say(f"peak memory of one plain forward pass over {tokens:,} tokens")
    whole = peak_of(PLAIN, replace(setting, chunk=None))
    options.say("peak memory of the plain loop over the chunks")
    loop = peak_of(PLAIN_CHUNKED, setting)
    found = []
    for pos in ("last", "all"):
        setting = replace(setting, pos=pos)
        options.say(f"peak memory, {setting.named()}")
        peak = peak_of(CHUNKED, setting)
        found.append(_peaks("over a plain loop", setting, peak, loop, 1.05))
        found.append(_peaks("over one plain pass", setting, peak, whole, 0.65))
    return found


def _peaks(what: str, setting: Setting, peak: int, plain: int, limit: float) -> Measured:
    detail = f"{peak / 1e6:,.1f} MB / {plain / 1e6:,.1f} MB"
    return Measured(f"{what}, {setting.named()}", once(peak / plain), limit, detail=detail)


def _check_measurable() -> None:
    if not measurable():
        raise Skipped("peak memory is measured on Linux only")


_CHUNKS = 16


@dataclass(frozen=True)
class Case:
    """One bar, or a few of a kind.

    Attributes:
        measure: from the options to the figures.
        model, tokens: its own sizes, which the bar was set for.
        shortest: the fewest tokens that it can be measured on.
        also: further sizes of its own (model, tokens), measured where a user names none.
    """

    measure: Callable[[Options], list[Measured]]
    model: str
    tokens: tuple[int, ...]
    shortest: int = 1
    also: tuple[tuple[str, int], ...] = ()

    @property
    def says(self) -> str:
        """Its description, in one line."""
        return (self.measure.__doc__ or "").partition("\n")[0]


BARS = {
    "time-last": Case(time_last, "gpt2-small", (512, 1024)),
    "time-all": Case(time_all, "gpt2-small", (512, 1024)),
    "time-next": Case(time_next, "gpt2-small", (512, 1024)),
    "plan": Case(prepared.plan, "gpt2-small", (16, 512), also=(("gpt2-4x96", 16),)),
    "one-shot": Case(prepared.one_shot, "gpt2-small", (16, 512), also=(("gpt2-4x96", 16),)),
    "several": Case(prepared.several, "gpt2-small", (512,)),
    "memory": Case(memory, "gpt2-small", (512, 1024)),
    "reference-time": Case(reference_time, "gpt2-small", (1024,)),
    "reference-memory": Case(reference_memory, "gpt2-small", (1024,)),
    "chunks": Case(chunks, "long-llama", (16384,), shortest=_CHUNKS),
    "finer": Case(finer.units, "gpt2-small", (512,), also=(("mixtral-6x768", 512),)),
    "finer-chunks": Case(finer.in_chunks, "long-llama", (16384,), shortest=_CHUNKS),
    "promoted": Case(finer.promoted, "gpt2-small", (512,)),
    "early": Case(questions.early, "gpt2-small", (512,)),
    "compare": Case(questions.compare, "gpt2-small", (512,)),
    "effects": Case(questions.effects, "gpt2-small", (512,)),
    "report": Case(page.measured, "gpt2-small", (512,)),
    "offload": Case(offload.measured, "llama-250m", (256,)),
    "many": Case(many.measured, "gpt2-small", (64,)),  # as long as its longest
    "ray": Case(sweep.measured, "gpt2-4x96", (16,)),  # the demo model, which has its own size
    "generate": Case(generate.measured, "gpt2-small", (64,)),
    "gpu": Case(gpu.measured, "llama-3-8b", (2048, 8192)),
}
