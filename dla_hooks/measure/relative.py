"""Checks without the model's logits: the parts are held against the stream, relative to their size.

A stored cache has no logits. A target that is none is read off the stream.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dla_hooks.errors import DecompositionError, NonFiniteError
from dla_hooks.measure.claims import (
    Outcome,
    broken_of,
    check_finite,
    check_norms,
    claims_of,
    identity_gap,
)
from dla_hooks.measure.rounding import rounding_of
from dla_hooks.modules.autocast import AUTOCAST
from dla_hooks.projection.ledger import all_finite, largest
from dla_hooks.residual.stream import coarsest
from dla_hooks.tolerance import LEAST, tolerance
from dla_hooks.units.plan import Measurement


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
    check_finite(measurement)
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
    check_finite(measurement)
    if not measurement.parts.complete:
        return Outcome(math.nan)
    rounds = torch.is_autocast_enabled(reading.scale_N.device.type)
    largest_N = _hold_parts(
        measurement,
        dtype,
        AUTOCAST
        if rounds
        else "look for hooks of yours that change activations inside of a block, or call "
        "dla_hooks.verify(model), which shows what adds up",
    )
    check_norms(measurement)
    theirs_N = measurement.theirs_N
    if theirs_N is None:
        return Outcome(identity_gap(measurement))
    if not all_finite(theirs_N):
        raise NonFiniteError("what the model itself computes of the target is NaN or infinite")
    gap_N = (reading.value_N() - theirs_N).abs()
    witnessed_N = measurement.plan.target.witnessed(measurement.entries)
    if witnessed_N is not None:
        gap_N = gap_N.masked_fill(~witnessed_N.to(gap_N.device), 0)
    relative = tolerance(coarsest((dtype, stream.product_dtype)), len(stream.writes))[1]
    allowed_N = relative * torch.maximum(largest_N, theirs_N.abs()) + LEAST
    allowed_N += rounding_of(measurement)
    if not bool((gap_N <= allowed_N).all()):
        witness = measurement.plan.target.witness
        where = "the model" if witness is None else witness.place.name
        why = "a hook of yours, or something else between the two, changes what is read"
        raise DecompositionError(
            f"the stream at {stream.last_label}, read as the target says, and what {where} "
            f"itself computes differ by {largest(gap_N):.3g}, where rounding explains "
            f"{relative:.0e} of {largest(largest_N):.3g}: {AUTOCAST if rounds else why}"
        )
    return Outcome(identity_gap(measurement), largest(gap_N))


def _hold_parts(measurement: Measurement, dtype: torch.dtype, why: str) -> Tensor:
    """Hold the parts against the stream, and units against their claims, relative to the parts.

    Returns:
        The largest part at each entry, and the whole.
    """
    stream, parts = measurement.plan.stream, measurement.parts
    largest_N: Tensor = parts.raw_CN.abs().amax(0) + measurement.reading.total_N.abs()
    rounding_N = rounding_of(measurement)
    for claim, seen in claims_of(measurement):
        relative = tolerance(coarsest((dtype, seen)), len(stream.writes))[claim.through_norm]
        broken = broken_of(claim, relative * largest_N + rounding_N + LEAST)
        if broken is not None:
            raise DecompositionError(
                f"{broken[0]} miss by {broken[1]:.3g}, where rounding explains "
                f"{relative:.0e} of {largest(largest_N):.3g}: {why}"
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
