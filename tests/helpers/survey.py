"""Every type of transformers, door by door, held against its own logits.

    python tests/helpers/survey.py                                 # causal: one line a type
    python tests/helpers/survey.py --door classification           # of another auto class
    python tests/helpers/survey.py --door all --write docs/architectures.md   # the page
    python tests/helpers/survey.py --door vision --write docs/architectures.md   # one section
    python tests/helpers/survey.py --check docs/architectures.md   # fails when the page is stale
    python tests/helpers/survey.py --check docs/architectures.md --quick   # a sample of wide doors
    python tests/helpers/survey.py --sample 8                      # every eighth type only

A tiny model of each type is built with every parameter drawn at random. It is right when all units
reproduce its logits; refused when the library says why not; and the rest cannot be built here. The
doors, and what is asked of their models, are in the folder `doors`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from doors import Case, Door, by_name, doors
from findings import ABSENT, REFUSED, RIGHT, WRONG, Finding
from mapping_zoo import CannotBuild
from survey_page import checked, count, written
from transformers.utils import logging
from units import EVERY_UNIT, UNIT_NAMES

from dla_hooks import DLAError, UnsupportedModelError, direct_logit_attribution
from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.residual.stream import Stream
from dla_hooks.verification.recognise import stream_of

FINER = tuple(name for name in EVERY_UNIT if name not in (*UNIT_NAMES, "adapter", "feature"))
"""Units of some models. Adapters and dictionaries are brought along by a user."""


def survey_type(
    model_type: str, seed: int = 0, attn: str | None = None, door: str = "causal", **changes: Any
) -> Finding:
    """Build the models of one type behind a door, and attribute them in every unit."""
    try:
        cases = by_name(door).cases(model_type, seed, attn=attn, **changes)
    except CannotBuild as error:
        return Finding(ABSENT, reason=_first_line(str(error).removeprefix(f"{model_type}: ")))
    return together([(case.name, examine(case)) for case in cases])


def examine(case: Case) -> Finding:
    """Hold every unit of a model against the logits that it gave."""
    model, name = case.model, type(case.model).__name__
    logits = case.logits.double()
    if not bool(logits.isfinite().all()):
        return Finding(ABSENT, name, reason="its own logits are not finite")
    units: list[str] = []
    lacking: dict[str, str] = {}
    gap = logit_gap = 0.0
    column, other = case.columns
    spread = float((logits.amax(-1) - logits.amin(-1)).mean())
    try:
        for unit in (*UNIT_NAMES, *FINER):
            try:
                result = direct_logit_attribution(
                    model, case.asked, case.answer, case.incorrect, unit=unit, **case.options
                )
            except UnsupportedModelError as error:
                if unit in FINER:
                    lacking[unit] = _first_line(str(error)).replace("|", "/")
                elif unit != "head" or "no attention heads" not in str(error):
                    raise
                continue
            units.append(unit)
            cap = result.softcap
            plain = logits if cap is None else cap * torch.atanh(logits / cap)
            truth = plain[..., column] - (0 if other is None else plain[..., other])
            found = result.total() + result.bias
            if found.shape != truth.shape:
                shapes = f"{list(found.shape)} where the model has {list(truth.shape)}"
                return Finding(WRONG, name, reason=f"{unit} has shape {shapes}")
            gap = max(gap, result.gap / spread)
            logit_gap = max(logit_gap, float((found - truth).abs().max()) / spread)
    except UnsupportedModelError as error:
        return Finding(REFUSED, name, reason=_reason(str(error)))
    except DLAError as error:
        return Finding(WRONG, name, reason=f"{type(error).__name__}: {_first_line(str(error))}")
    verdict = RIGHT if logit_gap < 1e-5 else WRONG
    what = special(stream_of(model))
    return Finding(verdict, name, tuple(units), what, gap, logit_gap, lacking=lacking)


def together(found: list[tuple[str, Finding]]) -> Finding:
    """One finding of a type's cases: the worst of them, its case named."""
    if len(found) == 1:
        name, one = found[0]
        return dataclasses.replace(one, special=(*one.special, *filter(None, [name])))
    for verdict in (WRONG, ABSENT, REFUSED):
        for name, one in found:
            if one.verdict == verdict:
                return dataclasses.replace(one, reason=f"{name}: {one.reason}")
    first = found[0][1]
    every = [one for _, one in found]
    return dataclasses.replace(
        first,
        units=tuple(unit for unit in first.units if all(unit in one.units for one in every)),
        special=(
            *dict.fromkeys(what for one in every for what in one.special),
            ", ".join(name for name, _ in found),
        ),
        gap=max(one.gap for one in every),
        logit_gap=max(one.logit_gap for one in every),
        lacking={unit: why for one in every for unit, why in one.lacking.items()},
    )


def special(stream: Stream) -> tuple[str, ...]:
    """What stands out in how a model writes to its stream."""
    found = []
    if stream.positions is not None:
        found.append("positions added to the stream")
    kinds = Counter(write.label.split("_", 1)[1] for write in stream.writes)
    extra = [kind for kind in kinds if kind not in ("attn_out", "mlp_out")]
    if extra:
        found.append("also writes " + ", ".join(extra))
    if any(write.post_norm is not None for write in stream.writes):
        found.append("post-norms")
    two = [mid for mid, block in zip(mid_streams(stream), stream.blocks, strict=True)
           if len(block.writes) > 1]  # fmt: skip
    if two and not any(two):
        found.append("parallel blocks")
    if any(write.response is not None for write in stream.writes):
        found.append("scaled writes")
    gains = [block.gain for block in stream.blocks if block.gain is not None]
    if gains:
        found.append("skip gains" + (" per channel" if any(g.ndim for g in gains) else ""))
    if any(block.constant is not None for block in stream.blocks):
        found.append("constants")
    widths = {w.heads.n_heads * w.heads.d_head for w in stream.writes if w.heads is not None}
    if widths - {stream.d_model}:
        found.append("heads not as wide as the stream")
    if stream.logit_scale != 1:
        found.append("logit scale")
    if stream.softcap is not None:
        found.append("softcap")
    if stream.after_norm:
        found.append("a projection before the unembedding")
    return tuple(found)


def survey_door(door: Door, every: int = 1) -> dict[str, Finding]:
    """The findings of a door's types, or of one in so many."""
    return {name: survey_type(name, door=door.name) for name in door.model_types[:: max(every, 1)]}


def _reason(message: str) -> str:
    _, _, reason = message.partition("cannot be attributed")
    return _first_line(reason.lstrip(".: ") or message).replace("|", "/")


def _first_line(message: str) -> str:
    return " ".join(message.strip().splitlines()[:1])


def main() -> int:
    """Survey doors, print a line a type, and write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--door", help="one door, or all; causal, and with --check all")
    parser.add_argument("--write", type=Path, help="write these doors' sections of the page")
    parser.add_argument("--check", type=Path)
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="every N-th type only")
    parser.add_argument("--quick", action="store_true", help="of wide doors every few types only")
    options = parser.parse_args()
    if (options.sample > 1 or options.quick) and options.write:
        parser.error("a page needs every type: leave out --sample and --quick")
    logging.set_verbosity(50)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    name = options.door or ("all" if options.check else "causal")
    bad = False
    for door in doors() if name == "all" else (by_name(name),):
        every = max(options.sample, door.in_ci if options.quick else 1)
        findings = survey_door(door, every)
        for model_type, f in findings.items():
            detail = f"{f.gap:.0e} {f.logit_gap:.0e}" if f.verdict == RIGHT else f.reason[:110]
            sys.stdout.write(f"{model_type:28} {f.verdict:8} {detail}\n")
        sys.stdout.write(f"\n{door.name}: {count(findings)}\n")
        bad |= any(f.verdict == WRONG for f in findings.values())
        if options.write is not None:
            old = options.write.read_text() if options.write.exists() else ""
            options.write.write_text(written(old, door, findings))
        if options.check is not None:
            stale = checked(options.check.read_text(), door, findings, whole=every == 1)
            for line in stale[:5]:
                sys.stdout.write(f"{options.check} is stale (--write writes it anew): {line}\n")
            bad |= bool(stale)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
