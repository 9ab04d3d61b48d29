"""Do the parts sum to the model's own numbers? The check that every call makes of itself.

Three things must hold, each measured apart from the others:

1. at every entry the parts sum to the last stream's projection;
2. what each unit claims of its own rows (heads make up what attention wrote);
3. at a few columns, projection and bias give the model's own logits.

:mod:`dla_hooks.tolerance` says by how much they may differ, relative to the spread of the model's
logits over its vocabulary. A stored cache has no logits: there it is relative to the largest part,
and instead of the third the final norm's scale is held against the last stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_hooks.calibration.scales import check_weights
from dla_hooks.errors import DecompositionError, NonFiniteError
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.user_hooks import has_callers
from dla_hooks.projection.ledger import all_finite
from dla_hooks.residual.stream import coarsest
from dla_hooks.targets.base import Observed
from dla_hooks.tolerance import is_coarse, misfit_tolerance, of_stream, tolerance
from dla_hooks.units.base import Claim
from dla_hooks.units.plan import Measurement
from dla_hooks.verification.trace import trace_report

_OF_STREAM = 0.45
"""Of :func:`tolerance` in 16 bits, for the stream: clean models of any depth reach 0.1 to 0.23."""


@dataclass(frozen=True)
class Outcome:
    """What the check found.

    Attributes:
        gap: largest difference between the parts' sum and the stream's projection.
        logit_gap: largest difference from the model's own logits, where they were looked at.
    """

    gap: float
    logit_gap: float = math.nan


def identity_gap(measurement: Measurement) -> float:
    """The largest difference between the parts' sum and the last stream's projection."""
    if not measurement.parts.complete:
        return math.nan
    return _largest(measurement.parts.sum_N - measurement.reading.total_N)


def seems_current(measurement: Measurement, outcome: Outcome) -> bool:
    """Whether norms do what their constants say, and the parts sum to the stream."""
    stream = measurement.plan.stream
    allowed = misfit_tolerance(stream.product_dtype)
    if not all(misfit <= allowed for _, misfit in _norms(measurement)):
        return False
    claim, dtype = next(_claims(measurement))
    relative = tolerance(dtype, len(stream.writes))[claim.through_norm]
    return not outcome.gap > relative * _largest(measurement.parts.raw_CN)


def hold_against_model(
    measurement: Measurement, prompt: Prompt, columns: Tensor | None, logits: Tensor | None
) -> Outcome:
    """Hold the scalars of a run against each other and against the model's logits.

    Args:
        measurement: what was measured.
        prompt: what the model was run on.
        columns: where its logits were kept, or None where no position is selected.
        logits: these logits [batch, n_columns, vocabulary].

    Raises:
        NonFiniteError: when anything is NaN or infinite.
        DecompositionError: when something does not add up; it says what, by how much, and where.
    """
    stream, reading = measurement.plan.stream, measurement.reading
    _check_finite(measurement)
    if columns is None or logits is None:
        return Outcome(0.0, 0.0)
    observed = Observed.at(measurement.entries, columns, logits)
    spread = observed.spread()
    if stream.backend.scores_labels:  # one label has no spread, and two may be close
        spread = max(spread, _largest(measurement.parts.raw_CN))
    n_writes = len(stream.writes)
    allowed_logit = tolerance(stream.coarsest_dtype, n_writes)[1]
    rounding_N = _rounding(measurement, spread)
    # Parts are held against the stream before any cap, where the logits are as far apart as this.
    uncapped = spread if stream.softcap is None else observed.spread(stream.softcap)
    for claim, dtype in _claims(measurement):
        relative = tolerance(dtype, n_writes)[claim.through_norm]
        relative *= _OF_STREAM if is_coarse(dtype) else 1
        allowed_N = rounding_N + relative * uncapped
        if claim.of_stream and is_coarse(dtype) and reading.size_N is not None:
            rounded_N = of_stream(dtype, _additions(measurement), reading.size_N)
            allowed_N = rounding_N + rounded_N.clamp(max=relative * uncapped)
            relative = min(relative, _largest(rounded_N) / max(uncapped, 1e-300))
        broken = _broken(claim, allowed_N)
        if broken is not None:
            raise _failure(measurement, prompt, *broken, spread, relative)
    _check_norms(measurement)
    own_E, theirs_E = measurement.plan.target.own_and_theirs(reading, observed)
    if not all_finite(theirs_E):
        raise NonFiniteError("the model's own logit of an answer is NaN or infinite")
    logit_gap = _largest(own_E - theirs_E)
    # A logit itself is rounded to its dtype, and large ones coarsely; so are two with a small
    # difference.
    rounded = torch.finfo(stream.coarsest_dtype).eps
    coarse = 2 * rounded * measurement.plan.target.largest(observed)
    if not logit_gap <= allowed_logit * spread + coarse + _largest(rounding_N):
        what = "the last stream's projection, compared with the model's own logits,"
        raise _failure(measurement, prompt, what, logit_gap, spread, allowed_logit)
    return Outcome(identity_gap(measurement), logit_gap)


def hold_against_cache(
    measurement: Measurement, dtype: torch.dtype, own_scale: tuple[Tensor, Tensor] | None
) -> Outcome:
    """Hold a stored cache's scalars against each other, as far as it has the parts.

    Args:
        measurement: what was measured.
        dtype: the coarsest of the cache's entries, which may have been converted.
        own_scale: from :meth:`Source.own_scale`.

    Raises:
        NonFiniteError: when anything is NaN or infinite.
        DecompositionError: when something does not add up.
    """
    _check_finite(measurement)
    if own_scale is not None:
        _check_scale(measurement, dtype, *own_scale)
    if not measurement.parts.complete:
        return Outcome(math.nan)
    _hold_parts(
        measurement,
        dtype,
        "the cache does not hold what one run of this model wrote (its entries were changed, or "
        "its weights were)",
    )
    return Outcome(identity_gap(measurement))


def hold_against_reading(measurement: Measurement, dtype: torch.dtype) -> Outcome:
    """Hold a run's scalars against the stream where it is read, and what the model makes of it.

    Args:
        measurement: what was measured, of a target that is no logit.
        dtype: the coarsest of a cache's entries, where they come from one.

    Raises:
        NonFiniteError: when anything is NaN or infinite.
        DecompositionError: when something does not add up.
    """
    stream, reading = measurement.plan.stream, measurement.reading
    _check_finite(measurement)
    if not measurement.parts.complete:
        return Outcome(math.nan)
    largest_N = _hold_parts(
        measurement,
        dtype,
        "look for hooks of yours that change activations inside of a block, or call "
        "dla_hooks.verify(model), which shows what adds up",
    )
    _check_norms(measurement)
    theirs_N = measurement.theirs_N
    if theirs_N is None:
        return Outcome(identity_gap(measurement))
    if not all_finite(theirs_N):
        raise NonFiniteError("what the model itself computes of the target is NaN or infinite")
    gap_N = (reading.value_N() - theirs_N).abs()
    relative = tolerance(coarsest((dtype, stream.product_dtype)), len(stream.writes))[1]
    allowed_N = relative * torch.maximum(largest_N, theirs_N.abs()) + _rounding(measurement)
    if not bool((gap_N <= allowed_N).all()):
        witness = measurement.plan.target.witness
        where = "the model in the run before" if witness is None else witness.place.name
        raise DecompositionError(
            f"the stream at {stream.last_label}, read as the target says, and what {where} "
            f"itself computes differ by {_largest(gap_N):.3g}, where rounding explains "
            f"{relative:.0e} of {_largest(largest_N):.3g}: a hook of yours, or something else "
            "between the two, changes what is read"
        )
    return Outcome(identity_gap(measurement), _largest(gap_N))


def _hold_parts(measurement: Measurement, dtype: torch.dtype, why: str) -> Tensor:
    """Hold the parts against the stream, and units against their claims, relative to the parts.

    Returns:
        The largest part at each entry, and the whole.
    """
    stream, parts = measurement.plan.stream, measurement.parts
    largest_N: Tensor = parts.raw_CN.abs().amax(0) + measurement.reading.total_N.abs()
    rounding_N = _rounding(measurement)
    for claim, seen in _claims(measurement):
        relative = tolerance(coarsest((dtype, seen)), len(stream.writes))[claim.through_norm]
        broken = _broken(claim, relative * largest_N + rounding_N)
        if broken is not None:
            raise DecompositionError(
                f"{broken[0]} miss by {broken[1]:.3g}, where rounding explains "
                f"{relative:.0e} of {_largest(largest_N):.3g}: {why}"
            )
    return largest_N


def _check_scale(
    measurement: Measurement, dtype: torch.dtype, own_N: Tensor, rounding_N: Tensor
) -> None:
    """Hold the stored scale of the final norm against the last stream.

    A cache with little more than its unit reads adds up whatever it holds; the scale does not.
    """
    stream = measurement.plan.stream
    stored_N = measurement.reading.scale_N.to(own_N)
    seen = coarsest((dtype, stream.stream_dtype, stream.product_dtype))
    relative = tolerance(seen, len(stream.writes))[1]
    off_N = (stored_N - own_N).abs() - rounding_N
    if not bool((off_N <= relative * own_N.abs()).all()):
        raise DecompositionError(
            f"the scale of {stream.final_norm.name} in the cache is not that of its last stream; "
            f"they differ by up to {float((off_N / own_N.abs()).max()):.1e} of it, and "
            f"{relative:.0e} is allowed. The cache does not hold what one run of this model wrote: "
            "its entries were changed, or its weights were, or a hook set the scale. Run the model "
            "instead (without cache=)"
        )


def _claims(measurement: Measurement) -> Iterator[tuple[Claim, torch.dtype]]:
    """What must hold, and in what dtype: the parts sum to the stream, and all that units claim."""
    stream = measurement.plan.stream
    parts = measurement.parts
    whole_LN = measurement.reading.total_N[None]
    claim = Claim(["the parts of the stream"], parts.sum_N[None], whole_LN, of_stream=True)
    # Parallel writes may be added to each other before the stream, in their own dtype.
    yield claim, coarsest((stream.stream_dtype, stream.write_dtype))
    for split in measurement.splits.values():
        for claim in split.claims:
            yield claim, stream.product_dtype


def _broken(claim: Claim, allowed_N: Tensor) -> tuple[str, float] | None:
    """The first thing that is not as claimed, and the largest gap there; None if all is."""
    gap_LN = (claim.parts_LN - claim.whole_LN).abs_()
    holds_LN = gap_LN <= allowed_N
    if bool(holds_LN.all()):
        return None
    first = int((~holds_LN.all(-1)).nonzero()[0])
    return claim.what[first], _largest(gap_LN[first])


def _check_norms(measurement: Measurement) -> None:
    """Hold every norm that was read through against its form."""
    allowed = misfit_tolerance(measurement.plan.stream.product_dtype)
    for name, misfit in _norms(measurement):
        if not misfit <= allowed:
            raise DecompositionError(
                f"{name} did something else than gamma * (x - centre) / s + beta at one of the "
                f"positions: {misfit:.1e} of its output is unexplained. A hook that changes what "
                "it puts out does this."
            )


def _norms(measurement: Measurement) -> Iterator[tuple[str, float]]:
    """Every norm that was read through, and what its form leaves unexplained."""
    place = measurement.plan.target.point.norm_place
    if place is not None:
        yield place.name, measurement.reading.misfit
    for split in measurement.splits.values():
        yield from split.norms


def _additions(measurement: Measurement) -> int:
    """How often the stream is rounded: by every step, and by every gain."""
    gains = sum(block.gain is not None for block in measurement.plan.stream.blocks)
    return len(measurement.parts.steps_SN) + gains


def _rounding(measurement: Measurement, spread: float = 0.0) -> Tensor:
    """What rounding alone may do to the sum of the parts at each entry [N].

    Every addition rounds the sum so far, and independent roundings grow as a square root. It
    matters where large parts cancel, as the massive activations of large models do. In 16 bits
    it is looked at more closely: sums within the logits' spread are left to what is allowed of it.
    """
    parts = measurement.parts
    dtype = measurement.plan.stream.coarsest_dtype
    eps = torch.finfo(dtype).eps
    running_SN = parts.steps_SN.cumsum(0).abs_()
    if spread and is_coarse(dtype):
        beyond_N: Tensor = (running_SN - spread).clamp_(min=0).square_().sum(0).sqrt_()
        return beyond_N * eps
    largest_N: Tensor = running_SN.amax(0)
    return largest_N * (2 * eps * math.sqrt(len(parts.plan.rows)))


def _largest(difference: Tensor) -> float:
    return float(torch.linalg.vector_norm(difference, torch.inf)) if difference.numel() else 0.0


def _check_finite(measurement: Measurement) -> None:
    parts, stream = measurement.parts, measurement.plan.stream
    splits = measurement.splits.values()
    measured = (parts.raw_CN, measurement.reading.total_N, *(one.values_CN for one in splits))
    if all(map(all_finite, measured)):
        return
    check_weights(stream.backend)
    finite = [True] * len(parts.plan.rows) if parts.finite_C is None else parts.finite_C.tolist()
    pairs = zip(parts.plan.rows, finite, strict=True)
    first = next((row.label for row, is_finite in pairs if not is_finite), "the final norm")
    away = any(weight.is_meta for _, weight in stream.backend.named_weights())
    looked_at = "every weight in memory is finite (those that are offloaded were not looked at)"
    message = (
        f"the activations become NaN or infinite, first in {first}, though "
        f"{looked_at if away else 'every weight is finite'}"
    )
    if torch.finfo(stream.stream_dtype).max < 1e5:
        message += (
            f"; in {stream.stream_dtype} a large activation overflows: try float32 or bfloat16"
        )
    raise NonFiniteError(message)


def _failure(
    measurement: Measurement, prompt: Prompt, what: str, gap: float, spread: float, allowed: float
) -> DecompositionError:
    stream = measurement.plan.stream
    dtype = str(stream.coarsest_dtype).removeprefix("torch.")
    if spread <= 1e-12 * _largest(measurement.reading.value_N()):
        return DecompositionError(
            f"{stream.backend.name}: all logits are the same, so that there is nothing to "
            "attribute: its unembedding has the same weights for every token, or a hook left "
            "nothing of the stream. Load weights for it, or take the hook off"
        )
    relative = gap / max(spread, 1e-300)
    if torch.is_autocast_enabled(measurement.reading.scale_N.device.type):
        why = (
            "Autocast is on, under which the model's own products are rounded to 16 bits: call "
            "this outside of it, or with check=False"
        )
    elif stream.softcap is not None and has_callers(stream.model._forward_hooks):
        why = (
            "Where a hook of yours on the whole model changes logits, it does so behind their cap, "
            "and no row can show it. Put it on the unembedding"
        )
    else:
        why = trace_report(stream, prompt).diagnosis()
    return DecompositionError(
        f"{stream.backend.name}: {what} miss by {gap:.3g}, which is {relative:.1e} of the logits' "
        f"spread ({spread:.3g}); {allowed:.0e} is allowed in {dtype}. {why}"
    )
