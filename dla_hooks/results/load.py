"""Read back whatever was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dla_hooks.results import files
from dla_hooks.results.comparison import Comparison
from dla_hooks.results.effects import Effects
from dla_hooks.results.promoted import PromotedTokens
from dla_hooks.results.ranked import RankedAttribution
from dla_hooks.results.result import DirectLogitAttribution
from dla_hooks.results.summary import Summary

Saved = DirectLogitAttribution | RankedAttribution | Summary | PromotedTokens | Comparison | Effects

_KINDS: tuple[type[Saved], ...] = (
    DirectLogitAttribution,
    RankedAttribution,
    Summary,
    PromotedTokens,
    Comparison,
    Effects,
)


def load(path: str | Path) -> Saved:
    """Read what the ``save`` of a result or a summary has written.

    Example:
        >>> import tempfile, torch, dla_hooks
        >>> one = torch.ones(1)
        >>> result = dla_hooks.DirectLogitAttribution(
        ...     one[None], ["embed"], "component", one, 2 * one, 0.0
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = result.save(f"{folder}/result.safetensors")
        ...     dla_hooks.load(path)["embed"]
        tensor([1.])

    Args:
        path: of the file.

    Raises:
        InputError: when the file holds something else, or comes from a newer version.
        CheckpointError: when there is no such file, or it cannot be read.
    """
    kinds: dict[str, Callable[..., Saved]] = {one.form: one.from_file for one in _KINDS}
    return files.read(path, kinds)
