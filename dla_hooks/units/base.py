"""What every unit has in common."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dla_hooks.modules.hooks import Tap
from dla_hooks.units.plan import Run


@dataclass(frozen=True)
class Split:
    """Rows of a result: ``labels[i]`` contributed ``values_CN[i]`` at each site."""

    labels: list[str]
    values_CN: Tensor


@dataclass(frozen=True)
class Claim:
    """Two ways [N] to the same number, measured apart; they differ by rounding or by a mistake.

    Attributes:
        what: what the parts are, for the message of an error.
        parts_N: their sum at each site.
        whole_N: what it should be.
        through_norm: whether a norm of the model stands between the two; transformers computes
            norms in float32, so that even a float64 model is then exact to float32 only.
    """

    what: str
    parts_N: Tensor
    whole_N: Tensor
    through_norm: bool = False


class Unit:
    """A way to split the stream, for one run.

    Attributes:
        made_of_parts: whether its rows are computed from the parts.
        shows_embeddings: whether tokens and positions have rows of their own.

    Args:
        run: the plan; its scalars are there once its ``forward`` has returned.
    """

    made_of_parts = True
    shows_embeddings = False

    def __init__(self, run: Run) -> None:
        self.run = run

    def taps(self) -> list[Tap]:
        """What to watch besides the parts."""
        return []

    def split(self) -> Split:
        """The labelled rows, after the run."""
        raise NotImplementedError(f"{type(self).__name__} must say how it splits the stream")

    def norms_seen(self) -> list[tuple[str, float]]:
        """Norms that the unit reads through, each with what its form leaves unexplained."""
        return []

    def claims(self) -> list[Claim]:
        """What must hold of the unit's own rows, besides the parts summing to the stream."""
        return []
