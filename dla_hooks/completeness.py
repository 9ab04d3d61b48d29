"""The check that every call makes of itself.

Three things must hold, each measured apart from the others:

1. at every site the parts sum to the last stream's projection;
2. what the unit claims of its own rows (heads make up what attention wrote);
3. at a few columns, projection and bias give the model's own logits.

The tolerances follow the dtype, since the stream itself is rounded after every addition, and are
relative to the spread of the model's logits over its vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.calibration.scales import check_weights
from dla_hooks.errors import DecompositionError, NonFiniteError
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.norms import misfit_tolerance
from dla_hooks.targets.base import Targets
from dla_hooks.units import Claim, Split, Unit
from dla_hooks.units.plan import Run
from dla_hooks.verification.trace import trace_report

_MOST_COLUMNS = 4
_MOST_LOGITS = 2**22  # of the model's own, kept for the check: 16 MiB in float32


@dataclass(frozen=True)
class Outcome:
    """What the check found.

    Attributes:
        gap: largest difference between the parts' sum and the stream's projection.
        logit_gap: largest difference from the model's own logits, where they were looked at.
    """

    gap: float
    logit_gap: float


def tolerance(dtype: torch.dtype, n_writes: int) -> tuple[float, float]:
    """Allowed gaps over the logits' spread: (parts against stream, stream against logits).

    In float64 the parts are exact to 1e-9, but transformers computes norms, softmax and rotary
    tables in float32, so its logits are good to 1e-5 only. In the 16-bit types each of the
    ``n_writes`` additions rounds the stream, and independent roundings add up as a square root.
    """
    if dtype == torch.float64:
        return 1e-9, 1e-5
    if dtype == torch.float32:
        return 1e-4, 1e-4
    rounding = torch.finfo(dtype).eps * max(1, n_writes) ** 0.5
    return rounding, rounding


def columns_to_check(run: Run, prompt: Prompt) -> Tensor | None:
    """A few of the selected columns, the first and the last among them; None if there are none."""
    columns: Tensor = run.entries.cols.unique()
    if not len(columns):
        return None
    per_column = len(prompt.input_ids) * run.stream.vocabulary
    most = max(1, min(_MOST_COLUMNS, len(columns), _MOST_LOGITS // per_column))
    if most == 1:
        return columns[-1:]
    return columns[torch.linspace(0, len(columns) - 1, most).round().long()]


def hold_against_model(
    run: Run,
    unit: Unit,
    split: Split,
    prompt: Prompt,
    targets: Targets,
    columns: Tensor | None,
    logits: Tensor,
    center_unembed: bool,
) -> Outcome:
    """Hold a run's scalars against each other and against the model's logits.

    Raises:
        NonFiniteError: when anything is NaN or infinite.
        DecompositionError: when something does not add up; it says what, by how much, and where.
    """
    stream = run.stream
    _check_finite(run, split)
    if columns is None:
        return Outcome(0.0, 0.0)
    seen = _Seen(run, columns, logits)
    spread = seen.spread()
    allowed, allowed_logit = tolerance(stream.coarsest_dtype, len(stream.writes))

    whole = Claim("the parts of the stream", run.parts_CN.sum(0), run.final.total_N())
    rounding_N = _rounding(run)
    for claim in [whole, *unit.claims()]:
        relative = allowed_logit if claim.through_norm else allowed
        gap_N = (claim.parts_N - claim.whole_N).abs()
        if not bool((gap_N <= relative * spread + rounding_N).all()):
            raise _failure(run, prompt, claim.what, _largest(gap_N), spread, relative)
    norms = [(stream.final_norm.name, run.final.misfit), *unit.norms_seen()]
    for name, misfit in norms:
        if not misfit <= misfit_tolerance(stream.dtype):
            raise DecompositionError(
                f"{name} did something else than gamma * (x - centre) / s + beta at one of the "
                f"positions: {misfit:.1e} of its output is unexplained. A hook that changes what "
                "it puts out does this."
            )

    own, theirs = seen.logits(targets, center_unembed)
    logit_gap = _largest(own - theirs)
    # A logit itself is rounded to the model's dtype, and large ones coarsely.
    coarse = 2 * torch.finfo(stream.dtype).eps * _largest(theirs)
    if not bool(torch.isfinite(theirs).all()):
        raise NonFiniteError("the model's own logit of an answer is NaN or infinite")
    if not logit_gap <= allowed_logit * spread + coarse + float(rounding_N.max()):
        what = "the last stream's projection, compared with the model's own logits,"
        raise _failure(run, prompt, what, logit_gap, spread, allowed_logit)
    return Outcome(gap=identity_gap(run), logit_gap=logit_gap)


def hold_against_cache(run: Run, unit: Unit, split: Split, dtype: torch.dtype) -> Outcome:
    """Hold a stored cache's scalars against each other, as far as it has the parts.

    Which logits the model gave, a cache does not say; the parts are held against its last stream.
    ``dtype`` is the coarsest of its entries', which may have been converted.

    Raises:
        NonFiniteError: when anything is NaN or infinite.
        DecompositionError: when something does not add up.
    """
    _check_finite(run, split)
    if not run.has_parts:
        return Outcome(float("nan"), float("nan"))
    dtype = max(dtype, run.stream.coarsest_dtype, key=lambda dtype: torch.finfo(dtype).eps)
    allowed, through_norm = tolerance(dtype, len(run.stream.writes))
    largest_N = run.parts_CN.abs().amax(0) + run.final.total_N().abs()
    whole = Claim("the parts in the cache", run.parts_CN.sum(0), run.final.total_N())
    for claim in [whole, *unit.claims()]:
        relative = through_norm if claim.through_norm else allowed
        gap_N = (claim.parts_N - claim.whole_N).abs()
        if not bool((gap_N <= relative * largest_N + _rounding(run)).all()):
            raise DecompositionError(
                f"{claim.what} miss by {_largest(gap_N):.3g}, where rounding explains "
                f"{relative:.0e} of {_largest(largest_N):.3g}: the cache does not hold what one "
                "run of this model wrote (its entries were changed, or its weights were)"
            )
    return Outcome(identity_gap(run), float("nan"))


def identity_gap(run: Run) -> float:
    """The largest difference between the parts' sum and the last stream's projection."""
    return _largest(run.parts_CN.sum(0) - run.final.total_N()) if run.has_parts else float("nan")


def _rounding(run: Run) -> Tensor:
    """What rounding alone may do to the sum of the parts at each site [N].

    Every addition rounds the sum so far, and independent roundings grow as a square root. It
    matters where large parts cancel, as the massive activations of large models do.
    """
    eps = torch.finfo(run.stream.coarsest_dtype).eps
    largest_N: Tensor = run.parts_CN.cumsum(0).abs().amax(0)
    return largest_N * (2 * eps * math.sqrt(len(run.labels)))


class _Seen:
    """The entries whose columns the model's own logits were kept for."""

    def __init__(self, run: Run, columns: Tensor, logits: Tensor) -> None:
        self._run = run
        self._logits = logits
        hit = run.entries.cols[:, None] == columns[None, :]
        self._entries = hit.any(-1).nonzero()[:, 0]
        device = logits.device
        self._row = run.entries.rows[self._entries].to(device)
        self._column = hit[self._entries].long().argmax(-1).to(device)

    def spread(self) -> float:
        """Largest less smallest logit over the vocabulary, averaged over the entries seen."""
        rows = self._logits[self._row, self._column]
        low, high = rows.aminmax(dim=-1)
        if not bool(torch.isfinite(high - low).all()):
            # Some models mask the end of their vocabulary with -inf.
            finite = torch.isfinite(rows)
            high = rows.masked_fill(~finite, -torch.inf).amax(-1)
            low = rows.masked_fill(~finite, torch.inf).amin(-1)
        return float((high.double() - low.double()).mean())

    def logits(self, targets: Targets, center_unembed: bool) -> tuple[Tensor, Tensor]:
        """Our logits (or differences) at the entries seen, and the model's."""
        run = self._run
        target = run.entries.target[self._entries]
        cap = run.stream.softcap
        theirs = self._of(targets.correct[target])
        if targets.incorrect is not None:
            theirs = theirs - self._of(targets.incorrect[target])
        elif center_unembed and cap is None:
            theirs = theirs - self._logits[self._row, self._column].double().mean(-1)
        if cap is None:
            own = self._ours(0)
        elif targets.incorrect is None:
            own = _capped(self._ours(0), cap)
        else:
            own = _capped(self._ours(1), cap) - _capped(self._ours(2), cap)
        return own, theirs.to(own.device)

    def _of(self, ids: Tensor) -> Tensor:
        ids = ids.to(self._logits.device)
        return self._logits[self._row, self._column, ids].double()

    def _ours(self, which: int) -> Tensor:
        logits_N = self._run.final.logits_N(which)
        return logits_N[self._entries.to(logits_N.device)].double()


def _capped(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


def _check_finite(run: Run, split: Split) -> None:
    parts = (run.parts_CN,) if run.has_parts else ()
    measured = (*parts, run.final.total_N(), split.values_CN)
    if all(bool(torch.isfinite(values).all()) for values in measured):
        return
    check_weights(run.stream.backend)
    broken = (label for label, ok in zip(run.labels, run.finite_C, strict=True) if not ok)
    first = next(broken, "the final norm")
    weights = run.stream.backend.named_weights()
    away = any(weight.is_meta for _, weight in weights)
    looked_at = "every weight in memory is finite (those that are offloaded were not looked at)"
    message = (
        f"the activations become NaN or infinite, first in {first}, though "
        f"{looked_at if away else 'every weight is finite'}"
    )
    if torch.finfo(run.stream.dtype).max < 1e5:
        message += f"; in {run.stream.dtype} a large activation overflows: try float32 or bfloat16"
    raise NonFiniteError(message)


def _failure(
    run: Run, prompt: Prompt, what: str, gap: float, spread: float, allowed: float
) -> DecompositionError:
    stream = run.stream
    dtype = str(stream.coarsest_dtype).removeprefix("torch.")
    relative = gap / max(spread, 1e-300)
    if torch.is_autocast_enabled(run.final.scale_N.device.type):
        why = (
            "Autocast is on, under which the model's own products are rounded to 16 bits: call "
            "this outside of it, or with check=False"
        )
    else:
        why = trace_report(stream, prompt).diagnosis()
    return DecompositionError(
        f"{stream.backend.name}: {what} miss by {gap:.3g}, which is {relative:.1e} of the logits' "
        f"spread ({spread:.3g}); {allowed:.0e} is allowed in {dtype}. {why}"
    )
