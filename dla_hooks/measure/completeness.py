"""Do the parts sum to the model's own numbers? The check that every call makes of itself.

Three things must hold, each measured apart from the others:

1. at every entry the parts sum to the last stream's projection;
2. what each unit claims of its own rows (neurons make up what their MLP wrote);
3. at a few columns, projection and bias give the model's own logits.

:mod:`dla_hooks.tolerance` says by how much they may differ, relative to the spread of the model's
logits over its vocabulary. :mod:`dla_hooks.measure.relative` has the checks without logits.
"""

from __future__ import annotations

import math
from functools import cache, partial

import torch
from torch import Tensor

from dla_hooks.errors import DecompositionError, NonFiniteError
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.measure.claims import (
    Outcome,
    broken_of,
    check_finite,
    check_norms,
    claims_of,
    gap_of,
    identity_gap,
    norms_of,
)
from dla_hooks.measure.rounding import rounding_of
from dla_hooks.modules.autocast import AUTOCAST
from dla_hooks.modules.user_hooks import has_callers
from dla_hooks.projection.ledger import all_finite, largest
from dla_hooks.residual.stream import Stream
from dla_hooks.targets.base import Observed
from dla_hooks.tolerance import is_coarse, misfit_tolerance, of_stream, tolerance
from dla_hooks.units.plan import Measurement
from dla_hooks.verification.trace import trace_report

_OF_STREAM = 0.45
"""Of :func:`tolerance` in 16 bits, for the stream: clean models of any depth reach 0.1 to 0.23."""


def seems_current(measurement: Measurement, outcome: Outcome) -> bool:
    """Whether norms do what their constants say, and the parts sum to the stream."""
    stream = measurement.plan.stream
    allowed = misfit_tolerance(stream.product_dtype)
    if not all(misfit <= allowed for _, misfit in norms_of(measurement)):
        return False
    claim, dtype = next(claims_of(measurement))
    relative = tolerance(dtype, len(stream.writes))[claim.through_norm]
    return not outcome.gap > relative * largest(measurement.parts.raw_CN)


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
    check_finite(measurement)
    if columns is None or logits is None:
        return Outcome(0.0, 0.0)
    observed = Observed.at(measurement.entries, columns, logits)
    sizes_N = measurement.plan.target.sizes(measurement.entries.target)
    size_N: Tensor | float = 1.0 if sizes_N is None else sizes_N.to(reading.total_N)
    spread = observed.spread()
    if stream.backend.scores_labels:  # one label has no spread, and two may be close
        spread = max(spread, largest(measurement.parts.raw_CN / size_N))
    n_writes = len(stream.writes)
    allowed_logit = tolerance(stream.coarsest_dtype, n_writes)[1]
    # What rounding may do is asked for where something is off by more than is allowed anyway.
    rounding = cache(partial(rounding_of, measurement, spread * size_N))
    # Parts are held against the stream before any cap, where the logits are as far apart as this.
    uncapped = spread if stream.softcap is None else observed.spread(stream.softcap)
    for claim, dtype in claims_of(measurement):
        relative = tolerance(dtype, n_writes)[claim.through_norm]
        relative *= _OF_STREAM if is_coarse(dtype) else 1
        limit: Tensor | float = relative * uncapped * size_N
        if claim.of_stream and is_coarse(dtype) and reading.size_N is not None:
            rounded_N = of_stream(dtype, _additions(measurement), reading.size_N)
            limit = rounded_N.clamp(max=limit)
            relative = min(relative, largest(rounded_N) / max(uncapped, 1e-300))
        if not isinstance(limit, Tensor) and gap_of(claim) <= limit:
            continue
        broken = broken_of(claim, rounding() + limit)
        if broken is not None:
            raise _failure(measurement, prompt, *broken, spread, relative)
    check_norms(measurement)
    own_E, theirs_E = measurement.plan.target.own_and_theirs(reading, observed)
    logit_gap = largest(own_E - theirs_E)
    if not (math.isfinite(logit_gap) or all_finite(theirs_E)):
        raise NonFiniteError("the model's own logit of an answer is NaN or infinite")
    in_logits = logit_gap  # of weighted sets: over the size of their weights
    if isinstance(size_N, Tensor):
        sizes_E = size_N if len(size_N) == 1 else size_N[observed.entries_E.to(size_N.device)]
        in_logits = largest((own_E - theirs_E) / sizes_E)
    allowed = allowed_logit * spread
    if not in_logits <= allowed:
        # A logit itself is rounded to its dtype, and large ones coarsely; so are two with a small
        # difference.
        rounded = torch.finfo(stream.coarsest_dtype).eps
        allowed += 2 * rounded * measurement.plan.target.largest(observed)
        allowed += largest(rounding() / size_N)
    if not in_logits <= allowed:
        what = "the last stream's projection, compared with the model's own logits,"
        raise _failure(measurement, prompt, what, logit_gap, spread, allowed_logit)
    return Outcome(identity_gap(measurement), logit_gap, observed)


def _additions(measurement: Measurement) -> int:
    """How often the stream is rounded: by every step, and by every gain."""
    gains = sum(block.gain is not None for block in measurement.plan.stream.blocks)
    return len(measurement.parts.steps_SN) + gains


def _failure(
    measurement: Measurement, prompt: Prompt, what: str, gap: float, spread: float, allowed: float
) -> DecompositionError:
    stream = measurement.plan.stream
    dtype = str(stream.coarsest_dtype).removeprefix("torch.")
    if spread <= 1e-12 * largest(measurement.reading.value_N()):
        return DecompositionError(
            f"{stream.backend.name}: all logits are the same, so that there is nothing to "
            "attribute: its unembedding has the same weights for every token, or a hook left "
            "nothing of the stream. Load weights for it, or take the hook off"
        )
    relative = gap / max(spread, 1e-300)
    if torch.is_autocast_enabled(measurement.reading.scale_N.device.type):
        why = AUTOCAST
    elif stream.softcap is not None and has_callers(stream.model._forward_hooks):
        why = (
            "Where a hook of yours on the whole model changes logits, it does so behind their cap, "
            "and no row can show it. Put it on the unembedding"
        )
    else:
        why = trace_report(stream, prompt).diagnosis() + _of_inputs(stream)
    return DecompositionError(
        f"{stream.backend.name}: {what} miss by {gap:.3g}, which is {relative:.1e} of the logits' "
        f"spread ({spread:.3g}); {allowed:.0e} is allowed in {dtype}. {why}"
    )


def _of_inputs(stream: Stream) -> str:
    """A sentence about hooks on what modules in blocks read, which may write in place; or nothing.

    The tensor that a norm reads is the stream itself.
    """
    blocks = {block.module for block in stream.blocks}
    for path, module in stream.model.named_modules():
        if module not in blocks and has_callers(module._forward_pre_hooks):
            return (
                f" A hook on the input of {path or 'the model'} that writes in place there changes "
                "the stream, too: let it return a changed copy, or put it on the block"
            )
    return ""
