"""One draw: a model, what was done to it, a question, and what came of it."""

from __future__ import annotations

import dataclasses
import random
import re
import time
import traceback
import warnings
from typing import Any

import torch
from bench import Bench, bench_of
from guest import belongings, left_behind
from interventions import NAMES, TABLE
from questions import (
    Question,
    Wrong,
    ask,
    hold,
    hold_compare,
    hold_direction,
    hold_many,
    hold_neurons,
    hold_sets,
    hold_stacks,
    prepared,
    question_of,
)
from truth import Truth, plainly, truth_of

import dla_hooks


@dataclasses.dataclass
class Outcome:
    """What came of a draw.

    Attributes:
        kind: "right", "right in sum" (where an intervention leaves no formula for rows),
            "refused", "discarded" (the model itself does not run so), "warned" (wrong, with a
            warning that says why) or "failed".
        what: the refusal or the failure, in short.
        said: the draw, in words.
        seconds: how long it took.
        interventions: their names.
        error: the failure's whole text.
    """

    kind: str
    what: str = ""
    said: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    interventions: list[str] = dataclasses.field(default_factory=list)
    error: str = ""


def smallest(seed: int, without: tuple[str, ...] = ()) -> Outcome:
    """A draw that fails, with as few of its interventions as still fail."""
    found = outcome_of(seed, without)
    for name in dict.fromkeys(found.interventions):
        fewer = outcome_of(seed, (*without, name))
        if fewer.kind == "failed":
            found, without = fewer, (*without, name)
    return found


class _Discarded(Exception):
    pass


def outcome_of(seed: int, without: tuple[str, ...] = ()) -> Outcome:
    """Draw, ask and judge.

    Args:
        seed: of all choices.
        without: interventions that are drawn, and then not made.
    """
    start = time.perf_counter()
    rng = random.Random(seed)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", dla_hooks.DLAWarning)
        bench = bench_of(rng)
        found = Outcome("right", said=bench.said)
        try:
            _settle(bench, found, without)
        except _Discarded as reason:
            found.kind, found.what = "discarded", str(reason)
        except dla_hooks.DLAError as error:
            found.kind, found.what = "refused", f"{type(error).__name__}: {_short(str(error))}"
            found.error = str(error)
        except Wrong as wrong:
            found.kind, found.what, found.error = "failed", _short(str(wrong)), str(wrong)
            if any("on made-up tokens that measure it" in str(one.message) for one in warned):
                found.kind = "warned"  # a hook with a memory beside a cast
        except Exception as error:
            found.kind, found.error = "failed", traceback.format_exc()
            found.what = f"raised {type(error).__name__}: {_short(str(error))}"
    found.seconds = time.perf_counter() - start
    return found


def _settle(bench: Bench, found: Outcome, without: tuple[str, ...]) -> None:
    rng = bench.random
    drawn = [rng.choice(NAMES) for _ in range(rng.choice([0, 1, 1, 2, 2, 3]))]
    late = [rng.random() < 0.5 and TABLE[name].late for name in drawn]
    seeds = [rng.randrange(2**32) for _ in drawn]
    asked_first = rng.random() < 0.5
    question = question_of(bench)
    after = rng.randrange(2**32)
    bench.said.append(repr(question))
    twice = question.way in ("twice", "plan")
    for name, is_late, seed in zip(drawn, late, seeds, strict=True):
        if not (twice and is_late):
            _intervene(bench, found, name, seed, without)
    bench.reseed(after)
    truth = _plain(bench)
    if question.way == "many":
        if bench.positional:
            raise _Discarded("many prompts, and hooks that name positions")
        _as_guest(bench, lambda: hold_many(bench, question))
        return
    if question.way == "stacks":
        found.kind = _as_guest(bench, lambda: hold_stacks(bench, question, truth))
        return
    if question.way == "neurons":
        found.kind = _as_guest(bench, lambda: hold_neurons(bench, truth))
        return
    if question.way == "direction":
        found.kind = _as_guest(bench, lambda: hold_direction(bench, question, truth))
        return
    if question.way == "sets":
        found.kind = _as_guest(bench, lambda: hold_sets(bench, truth))
        return
    if question.way == "compare":
        found.kind = _as_guest(bench, lambda: hold_compare(bench, truth))
        return
    if question.way == "unchecked":  # nothing is promised of its numbers
        _as_guest(bench, lambda: ask(bench, question))
        found.kind = "right in sum"
        return
    plan = None
    if question.way == "plan":
        plan = _as_guest(bench, lambda: prepared(bench, question))
    if asked_first or not twice:
        result = _as_guest(bench, lambda: ask(bench, question, plan))
        found.kind = hold(bench, question, result, truth)
        _hold_rows_alone(bench, question, result)
    if not twice:
        return
    for name, is_late, seed in zip(drawn, late, seeds, strict=True):
        if is_late:
            bench.said.append("then")
            _intervene(bench, found, name, seed, without)
    truth = _plain(bench)
    result = _as_guest(bench, lambda: ask(bench, question, plan))
    found.kind = hold(bench, question, result, truth)


def _intervene(
    bench: Bench, found: Outcome, name: str, seed: int, without: tuple[str, ...]
) -> None:
    if name in without:
        return
    bench.reseed(seed)
    found.interventions.append(name)
    try:
        said = TABLE[name].do(bench)
    except (dla_hooks.DLAError, Wrong):
        raise
    except Exception as error:  # this model has no such place, or no such weights
        raise _Discarded(f"{name} cannot be done: {type(error).__name__}") from error
    bench.said.append(f"{name}: {said}")


def _plain(bench: Bench) -> Truth:
    """The truth; a model that does not run so is no question of ours."""
    try:
        plainly(bench, bench.ids, bench.mask)
        truth = truth_of(bench, bench.ids, bench.mask)
    except Exception as error:
        raise _Discarded(f"the model raises {type(error).__name__}") from error
    real = bench.mask.bool() if bench.mask is not None else torch.ones_like(bench.ids).bool()
    if bool(truth.final[real].isnan().any()):
        raise _Discarded("the model's own logits are NaN")
    return truth


def _as_guest(bench: Bench, call: Any) -> Any:
    """Call the library, and see that nothing is left behind, whatever it does."""
    before = belongings(bench.model)
    try:
        return call()
    finally:
        left = left_behind(before, belongings(bench.model))
        if left:
            raise Wrong(f"left behind: {', '.join(left[:4])}")


def _hold_rows_alone(bench: Bench, question: Question, result: Any) -> None:
    """A padded row is the row alone, wherever no hook names a position."""
    if bench.mask is None or bench.positional or question.center:
        return
    one = next(iter(result.values())) if isinstance(result, dict) else result
    if one.softcap is not None or not isinstance(question.pos, int):
        return
    for row, real in enumerate(bench.mask.bool()):
        try:
            logits = plainly(bench, bench.ids[row : row + 1, real], None)[0].double()
        except Exception:  # a run of another shape, which some models are not made for
            return
        token = int(question.answer[row, 0])
        due = logits[question.pos, token]
        if question.incorrect is not None:
            due = due - logits[question.pos, int(question.incorrect[row, 0])]
        coarse = max(torch.finfo(p.dtype).eps for p in bench.root.parameters())
        size = max(float(logits.amax() - logits.amin()), float(one.attribution[:, row].abs().max()))
        allowed = (0.1 if coarse > 1e-3 else 1e-3) * size
        if not abs(float(one.logit[row]) - float(due)) <= allowed:
            raise Wrong(f"a padded row is {float(one.logit[row]):.6g}, alone {float(due):.6g}")


def _short(message: str) -> str:
    """The kind of a message: its first words, numbers and names of places taken out."""
    message = re.sub(
        r"^\w+(ForCausalLM|LMHeadModel)( \([^)]*\))?( with adapters? [\w, ]+)?", "…", message
    )
    message = re.sub(r"\b(model|transformer|gpt_neox|base_model)\.[\w.]+", "…", message)
    words = re.sub(r"'[^']*'|\[[^]]*\]|\([^)]*\)", "…", message)
    message = re.sub(
        r"^\w+(ForCausalLM|LMHeadModel)( \([^)]*\))?( with adapters? [\w, ]+)?", "…", message
    )
    message = re.sub(r"\b(model|transformer|gpt_neox|base_model)\.[\w.]+", "…", message)
    words = re.sub(r"-?\d[\d.e+-]*", "N", words)
    return " ".join(words.split()[:14])
