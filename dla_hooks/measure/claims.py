"""What must hold of a measurement, and what rounding alone may do to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dla_hooks.calibration.scales import check_weights
from dla_hooks.errors import DecompositionError, NonFiniteError
from dla_hooks.projection.ledger import all_finite, largest
from dla_hooks.residual.stream import coarsest
from dla_hooks.targets.base import Observed
from dla_hooks.tolerance import misfit_tolerance
from dla_hooks.units.base import Claim
from dla_hooks.units.plan import Measurement


@dataclass(frozen=True)
class Outcome:
    """What the check found.

    Attributes:
        gap: largest difference between the parts' sum and the stream's projection.
        logit_gap: largest difference from the model's own logits, where they were looked at.
        observed: these logits, or None.
    """

    gap: float
    logit_gap: float = math.nan
    observed: Observed | None = field(default=None, repr=False, compare=False)


def identity_gap(measurement: Measurement) -> float:
    """The largest difference between the parts' sum and the last stream's projection."""
    return measurement.parts.gap if measurement.parts.complete else math.nan


def claims_of(measurement: Measurement) -> Iterator[tuple[Claim, torch.dtype]]:
    """What must hold, and in what dtype: the parts sum to the stream, and all that units claim."""
    stream = measurement.plan.stream
    parts = measurement.parts
    sum_LN, whole_LN = parts.sum_N[None], measurement.reading.total_N[None]
    what = ["the parts of the stream"]
    claim = Claim(what, sum_LN, whole_LN, of_stream=True, gap=parts.gap)
    # Parallel writes may be added to each other before the stream, in their own dtype.
    yield claim, coarsest((stream.stream_dtype, stream.write_dtype))
    for split in measurement.splits.values():
        for claim in split.claims:
            yield claim, stream.product_dtype


def gap_of(claim: Claim) -> float:
    """The largest gap between the two sides of a claim, at any entry."""
    return largest(claim.parts_LN - claim.whole_LN) if claim.gap is None else claim.gap


def broken_of(claim: Claim, allowed_N: Tensor) -> tuple[str, float] | None:
    """The first thing that is not as claimed, and the largest gap there; None if all is."""
    gap_LN = (claim.parts_LN - claim.whole_LN).abs_()
    holds_LN = gap_LN <= allowed_N
    if bool(holds_LN.all()):
        return None
    first = int((~holds_LN.all(-1)).nonzero()[0])
    return claim.what[first], largest(gap_LN[first])


def check_norms(measurement: Measurement) -> None:
    """Hold every norm that was read through against its form."""
    allowed = misfit_tolerance(measurement.plan.stream.product_dtype)
    for name, misfit in norms_of(measurement):
        if not misfit <= allowed:
            raise DecompositionError(
                f"{name} did something else than gamma * (x - centre) / s + beta at one of the "
                f"positions: {misfit:.1e} of its output is unexplained. A hook that changes what "
                "it puts out does this."
            )


def norms_of(measurement: Measurement) -> Iterator[tuple[str, float]]:
    """Every norm that was read through, and what its form leaves unexplained."""
    place = measurement.plan.target.point.norm_place
    if place is not None:
        yield place.name, measurement.reading.misfit
    for split in measurement.splits.values():
        yield from split.norms


def check_finite(measurement: Measurement) -> None:
    parts, stream = measurement.parts, measurement.plan.stream
    if parts.complete:
        finite = math.isfinite(parts.gap)  # what is in it is, then
    else:
        finite = all_finite(parts.raw_CN) and all_finite(measurement.reading.total_N)
    if finite and all(all_finite(one.values_CN) for one in measurement.splits.values()):
        return
    for label, added_RN in measurement.reading.hooks_RN.items():
        if all_finite(parts.raw_CN) and not all_finite(added_RN):
            raise NonFiniteError(
                f"a hook of yours makes a logit that is asked about infinite ({label}), as a mask "
                "of -inf does; ask about tokens that it leaves as they are"
            )
    check_weights(stream.backend)
    pairs = zip(parts.plan.rows, torch.isfinite(parts.undivided_CN).all(-1).tolist(), strict=True)
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
