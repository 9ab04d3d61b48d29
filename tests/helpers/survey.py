"""Every type that transformers maps to a causal language model, held against its own logits.

    python tests/helpers/survey.py                                 # one line a type, and the count
    python tests/helpers/survey.py --write docs/architectures.md   # the page
    python tests/helpers/survey.py --check docs/architectures.md   # fails when the page is stale
    python tests/helpers/survey.py --sample 8                      # every eighth type only

A tiny model of each type is built with every parameter drawn at random. It is right when all units
reproduce its logits; refused when the library says why not; and the rest cannot be built here.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from mapping_zoo import MODEL_TYPES, CannotBuild, build_any, example_ids_any
from transformers.utils import logging
from units import EVERY_UNIT, UNIT_NAMES

from dla_hooks import DLAError, UnsupportedModelError, direct_logit_attribution
from dla_hooks.calibration.mid_streams import mid_streams
from dla_hooks.residual.stream import Stream
from dla_hooks.verification.recognise import stream_of

RIGHT, REFUSED, ABSENT, WRONG = "right", "refused", "cannot be built here", "WRONG"
ANSWER, INCORRECT = 5, 7
FINER = tuple(name for name in EVERY_UNIT if name not in (*UNIT_NAMES, "adapter", "feature"))
"""Units of some models. Adapters and dictionaries are brought along by a user."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What became of one model.

    Attributes:
        verdict: right, refused, cannot be built here, or WRONG.
        model_class: its class.
        units: the units that it has.
        special: what stands out in how it writes.
        gap: of its parts against the stream, over the logits' spread.
        logit_gap: of its parts and bias against the model's own logits, over their spread.
        reason: why it is refused, or cannot be built.
        lacking: why it has no rows of each finer unit that it does not have.
    """

    verdict: str
    model_class: str = ""
    units: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    gap: float = 0.0
    logit_gap: float = 0.0
    reason: str = ""
    lacking: dict[str, str] = dataclasses.field(default_factory=dict)


def survey_type(model_type: str, seed: int = 0, attn: str | None = None, **changes: Any) -> Finding:
    """Build one model, and attribute it in every unit."""
    try:
        model = build_any(model_type, seed, attn=attn, **changes)
        ids = example_ids_any(model)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits.double()
    except CannotBuild as error:
        return Finding(ABSENT, reason=_first_line(str(error).removeprefix(f"{model_type}: ")))
    if not bool(logits.isfinite().all()):
        return Finding(ABSENT, type(model).__name__, reason="its own logits are not finite")
    return examine(model, ids, logits)


def examine(model: Any, ids: torch.Tensor, logits: torch.Tensor) -> Finding:
    """Hold every unit of a model against the logits that it gave."""
    name = type(model).__name__
    units: list[str] = []
    lacking: dict[str, str] = {}
    gap = logit_gap = 0.0
    try:
        for unit in (*UNIT_NAMES, *FINER):
            try:
                result = direct_logit_attribution(
                    model, ids, ANSWER, INCORRECT, unit=unit, pos=None
                )
            except UnsupportedModelError as error:
                if unit in FINER:
                    lacking[unit] = _first_line(str(error)).replace("|", "/")
                elif unit != "head" or "no attention heads" not in str(error):
                    raise
                continue
            units.append(unit)
            spread = float((logits.amax(-1) - logits.amin(-1)).mean())
            cap = result.softcap
            plain = logits if cap is None else cap * torch.atanh(logits / cap)
            truth = plain[..., ANSWER] - plain[..., INCORRECT]
            gap = max(gap, result.gap / spread)
            off = float((result.total() + result.bias - truth).abs().max())
            logit_gap = max(logit_gap, off / spread)
    except UnsupportedModelError as error:
        return Finding(REFUSED, name, reason=_reason(str(error)))
    except DLAError as error:
        return Finding(WRONG, name, reason=f"{type(error).__name__}: {_first_line(str(error))}")
    verdict = RIGHT if logit_gap < 1e-5 else WRONG
    what = special(stream_of(model))
    return Finding(verdict, name, tuple(units), what, gap, logit_gap, lacking=lacking)


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


def page(findings: dict[str, Finding]) -> str:
    """The survey as a page of documentation."""
    right = {name: f for name, f in findings.items() if f.verdict == RIGHT}
    lines = [
        "# Architectures",
        "",
        "Generated by `python tests/helpers/survey.py --write docs/architectures.md`: every type",
        "that transformers maps to a causal language model, as a tiny random float64 model. Gaps",
        "are relative to the spread of the logits: of the parts' sum to the stream's projection,",
        "and of parts and bias to the model's own logits (whose norms, softmax and rotary tables",
        "transformers computes in float32).",
        "",
        f"**{count(findings)}**",
        "",
        "## Taken apart exactly",
        "",
        "| model type | class | units | what is special | to the stream | to the logits |",
        "|---|---|---|---|---:|---:|",
    ]
    for name, f in right.items():
        row = (name, f.model_class, " ".join(f.units), "; ".join(f.special))
        lines.append(f"| {' | '.join(row)} | {f.gap:.0e} | {f.logit_gap:.0e} |")
    lines += ["", "## Without a finer unit", "", "| model type | unit | why |", "|---|---|---|"]
    for name, f in right.items():
        lines += [f"| {name} | {unit} | {why} |" for unit, why in f.lacking.items()]
    for verdict, title in ((REFUSED, "Refused"), (ABSENT, "Not built by the survey")):
        lines += ["", f"## {title}", "", "| model type | why |", "|---|---|"]
        chosen = ((name, f) for name, f in findings.items() if f.verdict == verdict)
        lines += [f"| {name} | {f.reason} |" for name, f in chosen]
    return "\n".join(lines) + "\n"


def count(findings: dict[str, Finding]) -> str:
    """How many models met which end."""
    ends = Counter(finding.verdict for finding in findings.values())
    said = ", ".join(f"{ends[verdict]} {verdict}" for verdict in (RIGHT, REFUSED, ABSENT))
    return f"{said}, {ends[WRONG]} wrong, of {len(findings)} model types"


def _without_gaps(text: str) -> list[str]:
    """The page's lines less its figures, which differ from machine to machine."""
    figures = re.compile(r"\| \de[-+]\d+ \| \de[-+]\d+ \|$")
    return [figures.sub("|", line) for line in text.splitlines()]


def _reason(message: str) -> str:
    _, _, reason = message.partition("cannot be attributed")
    return _first_line(reason.lstrip(".: ") or message).replace("|", "/")


def _first_line(message: str) -> str:
    return " ".join(message.strip().splitlines()[:1])


def main() -> int:
    """Survey the whole mapping."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="every N-th type only")
    options = parser.parse_args()
    if options.sample > 1 and (options.write or options.check):
        parser.error("a page needs every type: leave out --sample")
    logging.set_verbosity(50)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    findings = {name: survey_type(name) for name in MODEL_TYPES[:: options.sample]}
    for name, f in findings.items():
        detail = f"{f.gap:.0e} {f.logit_gap:.0e}" if f.verdict == RIGHT else f.reason[:110]
        sys.stdout.write(f"{name:28} {f.verdict:8} {detail}\n")
    sys.stdout.write(f"\n{count(findings)}\n")
    if options.write is not None:
        options.write.write_text(page(findings))
    stale = options.check is not None and _without_gaps(options.check.read_text()) != _without_gaps(
        page(findings)
    )
    if stale:
        sys.stdout.write(f"{options.check} is stale: write it anew with --write\n")
    return int(stale or any(f.verdict == WRONG for f in findings.values()))


if __name__ == "__main__":
    sys.exit(main())
