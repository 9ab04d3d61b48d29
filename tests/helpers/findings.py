"""What became of one model of the survey."""

from __future__ import annotations

import dataclasses

RIGHT, REFUSED, ABSENT, WRONG = "right", "refused", "cannot be built here", "WRONG"


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
