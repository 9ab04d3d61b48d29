"""How the stream is read: the logit scale and the softcap, from a run on synthetic activations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dla_hooks.calibration.logits import that_move
from dla_hooks.calibration.synthetic_run import SyntheticRun, refusal
from dla_hooks.modules.linear import rows as rows_of
from dla_hooks.modules.linear import value_at
from dla_hooks.modules.vocabulary import logit_tiles, token_biases
from dla_hooks.residual.stream import Stream, coarsest

_TOKENS = 64  # enough to recognise the map to the vocabulary


def readout(run: SyntheticRun, logits: Tensor) -> tuple[float, float | None, Tensor | None]:
    """Find the logit scale, the softcap, and what logits have besides the unembedding's output.

    Args:
        run: the run.
        logits: what it returned [rows, vocabulary].

    Raises:
        UnsupportedModelError: when the logits are no affine map of the final norm's output.
    """
    stream = run.stream
    moves = that_move(logits)
    if not bool(moves.any()):
        raise refusal(
            stream,
            "none of its logits depends on what the final norm puts out, as where the "
            "unembedding is zero, so there is nothing to attribute; load weights for it",
        )
    cap = _cap(logits, moves)
    moving = moves.nonzero()[:, 0]
    shuffled = torch.randperm(len(moving), generator=torch.Generator().manual_seed(5), device="cpu")
    ids = moving[shuffled[:_TOKENS]]
    W, b = (t.double().cpu() for t in rows_of(stream.unembed, ids, torch.float64))
    # The largest of the small rows that a cap does not bend.
    row = next((r for r in (1, 4) if cap is None or float(logits[r, ids].abs().max()) < cap / 2), 5)
    y = run.normed()[row]
    nothing = torch.zeros_like(y)
    for module in stream.after_norm:
        y, nothing = (value_at(module, one).double().cpu() for one in (y, nothing))
    seen, without = (_uncapped(logits[r], cap) for r in (row, 0))
    if cap is not None and bool((logits[row, ids].abs() >= 0.999 * cap).all()):
        raise refusal(
            stream,
            f"its logits stand at their cap of {cap:g} even where the final norm puts out next to "
            "nothing, as with an unembedding whose weights are far too large, so there is nothing "
            "to attribute; load weights for it",
        )
    # The bias is scaled along with the rest: seen = k * (linear + b).
    ours, at_nothing = W @ y + b, W @ nothing + b
    if not bool(ours.any()):
        raise refusal(
            stream,
            "its unembedding makes nothing of any stream, as one whose weights are all zero, "
            "so that there is nothing to attribute; load weights for it",
        )
    rounding = torch.finfo(coarsest(run.dtypes.read)).eps
    scale, off = _fit(ours, seen[ids])
    constant = _at_nothing(stream, nothing)[: logits.shape[-1]]
    size = float(torch.maximum(seen.abs(), without.abs())[moving].max())
    besides = without - scale * constant
    bias: Tensor | None = None
    if (
        not off <= 1e-4 + 16 * rounding
        or float(besides[moving].abs().max()) > (1e-12 + 16 * rounding) * size
    ):
        # Another bias stands behind the unembedding: only differences tell the scale.
        scale, off = _fit(ours - at_nothing, (seen - without)[ids])
        scale = 1.0 if abs(scale - 1) < 1e-6 + rounding else scale
        bias = (without / scale - constant).where(moves, 0)
    if not off <= 1e-4 + 16 * rounding:
        best = f"even a best fit is off by {off:.1e}" if off < math.inf else "nothing fits them"
        raise refusal(
            stream,
            f"its logits are not the unembedding of the final norm's output: {best}; another layer "
            "or nonlinearity stands between them",
        )
    return (1.0 if abs(scale - 1) < 1e-6 + rounding else scale), cap, bias


def _fit(ours: Tensor, seen: Tensor) -> tuple[float, float]:
    """The factor that makes our numbers those that were seen, and how far they are off then."""
    scale = float(ours @ seen / ours.square().sum())
    return scale, float((scale * ours - seen).norm() / seen.norm())


def _uncapped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.atanh(logits / cap)


def _at_nothing(stream: Stream, y: Tensor) -> Tensor:
    """What the unembedding puts out where the norm puts out nothing [vocabulary]."""
    constant = token_biases(stream.unembed, y).double().cpu().clone()  # it may be the weights
    if bool(y.any()):  # a bias of the linear modules between the two
        for _, tokens, values in logit_tiles(stream.unembed, y[None].to(stream.work_dtype)):
            constant[tokens] += values[0].double().cpu()
    return constant


def _cap(logits: Tensor, moves: Tensor) -> float | None:
    """The value that most logits stop at when what enters the unembedding doubles."""
    large, larger = logits[2][moves].abs(), logits[3][moves].abs()
    usual = float(larger.median())
    # A few tokens may be large for a reason of their own, as a bias.
    if usual < math.inf and abs(usual - float(large.median())) <= 1e-3 * usual:
        return float(larger[larger <= 1.001 * usual].max())
    return None
