"""The primitives' own check: what they stack makes up what the model itself computed.

Nothing of a write's size is kept for it. What both sides are is looked at along a few fixed
directions, as the model runs, and their sizes are kept as one number per position.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dla_hooks.calibration.scales import check_weights
from dla_hooks.errors import DecompositionError, NonFiniteError, UnsupportedModelError
from dla_hooks.inputs.extras import OF_TEXT
from dla_hooks.modules.autocast import AUTOCAST, outside_autocast
from dla_hooks.modules.hooks import Call, Tap
from dla_hooks.modules.linear import bias_of
from dla_hooks.residual.gains import constant_label, path_factors, times
from dla_hooks.residual.hooked import hook_factor, hooked_places
from dla_hooks.residual.stream import Stream, WriteSite
from dla_hooks.stacks.kept import Kept
from dla_hooks.tolerance import tolerance
from dla_hooks.verification.trace import trace_report

_DIRECTIONS = 16


class StreamSum:
    """Holds everything that is written before a block against the stream that enters the block.

    Args:
        kept: the plan of what to keep; taps are put on its run.
        end: the block's place in the stack, or the number of blocks for the last stream.
    """

    def __init__(self, kept: Kept, end: int) -> None:
        _refuse_between(kept)
        self._kept, self._end = kept, end
        self._along = _directions(kept.stream)
        self._sum = self._whole = self._size = torch.empty(0, dtype=torch.float32, device="cpu")
        # Before the first block nothing has been added up yet.
        self._watched = kept.check and end > 0 and kept.watch(self._taps())

    @outside_autocast
    def hold(self) -> None:
        """Compare both, after the run.

        Raises:
            DecompositionError: when they differ by more than rounding.
        """
        if not self._watched:
            return
        factors = path_factors(self._kept.stream, self._end)
        for block in self._kept.stream.blocks[: self._end]:
            if block.constant is not None:
                constant = times(block.constant, factors[constant_label(block)])
                self._sum = self._sum + (constant.to(self._along) @ self._along).to(self._sum)
        _hold(self._kept, "the parts of the stream", self._sum, self._whole, self._size)

    def _taps(self) -> list[Tap]:
        stream, end = self._kept.stream, self._end
        factors = path_factors(stream, end)
        there = stream.last if end == len(stream.blocks) else stream.input_of(stream.blocks[end])
        taps = [Tap(stream.beginning, self._add(factors["embed"]))]
        for block in stream.blocks[:end]:
            taps += [Tap(w.place, self._add(factors[w.label])) for w in block.writes]
        for hooked in hooked_places(stream):
            if hooked.number < end or (hooked.number == end and hooked.at_input):
                factor = None if hooked.number == end else hook_factor(hooked, factors)
                taps.append(Tap(hooked.place.ahead, self._add(factor, -1)))
                taps.append(Tap(hooked.place, self._add(factor)))
        return [*taps, Tap(there, self._see_whole)]

    def _add(self, factor: Tensor | None, sign: int = 1) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            x = times(self._kept.take(call.activation).to(self._along.dtype), factor) * sign
            seen, size = (t.to(self._sum.device) for t in (_along(x, self._along), _norm(x)))
            if not self._sum.numel():
                seen, size = _along(x, self._along), _norm(x)
                self._sum, self._size = seen, size
                return
            self._sum += seen
            self._size = torch.maximum(self._size, size)

        return see

    def _see_whole(self, call: Call) -> None:
        x = self._kept.take(call.activation).to(self._along.dtype)
        self._whole = _along(x, self._along).to(self._sum.device)
        self._size = self._size + _norm(x).to(self._size.device)


def _refuse_between(kept: Kept) -> None:
    """Refuse prompts with images, for a model that adds their features between its blocks.

    A type that is not declared to do so may only be built alike: there the sum decides.

    Raises:
        UnsupportedModelError: with what to call instead.
    """
    stream, extras = kept.stream, kept.inputs.source.prompt.extras
    if stream.architecture.between is None or not extras.keys() - OF_TEXT:
        return
    if stream.backend.model_type in stream.architecture.model_types or not kept.check:
        raise UnsupportedModelError(
            f"{stream.backend.name} adds features of images to its stream between the blocks "
            f"({stream.architecture.between}), and stacks of vectors have no rows for them; "
            "direct_logit_attribution has, or give text alone"
        )


class WriteSum:
    """Holds what a linear module makes of its input against what a sublayer wrote.

    Args:
        kept: the plan of what to keep; a tap is put on its run.
        write: what the sublayer wrote.
        what: the rows that make it up, for the message of an error.
    """

    def __init__(self, kept: Kept, write: WriteSite, what: str) -> None:
        self._kept, self._what = kept, f"{what} of {write.label}"
        self._along = _directions(kept.stream)
        self._whole = self._size = torch.empty(0, dtype=torch.float32, device="cpu")
        self._watched = kept.check and kept.watch([Tap(write.place, self._see)])

    @outside_autocast
    def hold(
        self,
        z: object,
        linear: nn.Module,
        W_MI: Tensor,
        after: object | None,
        hooks_NM: Tensor | None = None,
        factors: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Compare both, after the run.

        Args:
            z: the key of what entered the linear module.
            linear: that module.
            W_MI: its matrix [d_model, width].
            after: the key of the scale of the norm that follows it, or None.
            hooks_NM: what the caller's hooks wrote to it on its way to the stream, or None.
            factors: what the linear module's output is multiplied by, and the norm's.

        Raises:
            DecompositionError: when they differ by more than rounding.
        """
        if not self._watched:
            return
        at_map, at_norm = factors
        d_KM, whole = self._along.T, self._whole
        if after is not None:
            d_KM = self._kept.norm(after).pull_back(d_KM) * at_norm
        d_KM = d_KM * at_map
        z_NI = self._kept.flat(z)
        u_KI = d_KM.to(W_MI.device) @ W_MI.to(d_KM.dtype)
        parts = (z_NI.to(u_KI.dtype) @ u_KI.T.to(z_NI.device)).to(whole)
        size = self._size + _norm(parts)
        bias = bias_of(linear)
        if bias is not None:
            parts = parts + (bias.to(d_KM) @ d_KM.T).to(parts)
        if after is not None:
            scale = self._kept.flat(after).to(parts)
            beta = self._kept.norm(after).beta.to(self._along) @ self._along * at_norm
            parts, size = parts / scale + beta.to(parts), self._size + size / scale[:, 0]
        if hooks_NM is not None:
            parts = parts + _along(hooks_NM.to(self._along.dtype), self._along).to(parts)
        _hold(self._kept, self._what, parts, whole, size, through_norm=after is not None)

    @outside_autocast
    def hold_vectors(self, wrote_NM: Tensor, *, through_norm: bool) -> None:
        """Compare what rows and constants make up with what was written, after the run.

        Args:
            wrote_NM: their sum.
            through_norm: whether a norm stands between.

        Raises:
            DecompositionError: when they differ by more than rounding.
        """
        if not self._watched:
            return
        parts = _along(wrote_NM.to(self._along.dtype), self._along).to(self._whole)
        size = self._size + _norm(wrote_NM).to(self._size)
        _hold(self._kept, self._what, parts, self._whole, size, through_norm=through_norm)

    def _see(self, call: Call) -> None:
        x = self._kept.take(call.activation).to(self._along.dtype)
        self._whole, self._size = _along(x, self._along), _norm(x)


def hold_alike(kept: Kept, what: str, parts_NI: Tensor, whole_NI: Tensor) -> None:
    """Compare vectors that were made in two ways.

    Raises:
        DecompositionError: when they differ by more than rounding.
    """
    if kept.check:
        size_N = _norm(parts_NI) + _norm(whole_NI)
        _hold(kept, what, parts_NI, whole_NI, size_N, through_norm=True)


def _directions(stream: Stream) -> Tensor:
    """A few directions [d_model, n]: they tell a wrong vector from a right one as well as all."""
    generator = torch.Generator().manual_seed(6)
    along = torch.randn(
        stream.d_model, _DIRECTIONS, generator=generator, dtype=torch.float64, device="cpu"
    )
    scaled: Tensor = (along / _DIRECTIONS**0.5).to(stream.work_dtype)
    return scaled


def _along(x_ND: Tensor, along: Tensor) -> Tensor:
    seen: Tensor = x_ND @ along.to(x_ND.device)
    return seen


def _norm(x_ND: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x_ND, dim=-1)
    return size


def _hold(
    kept: Kept,
    what: str,
    parts: Tensor,
    whole: Tensor,
    size_N: Tensor,
    *,
    through_norm: bool = False,
) -> None:
    """Compare two vectors [N, n], whose terms are of a size [N]."""
    stream = kept.stream
    if not bool(torch.isfinite(parts).all() and torch.isfinite(whole).all()):
        check_weights(stream.backend)
        raise NonFiniteError(f"the activations become NaN or infinite: see {what}")
    # The entries of a cache may have been converted.
    dtypes = stream.product_dtype, kept.inputs.source.dtype()
    dtype = max(dtypes, key=lambda one: torch.finfo(one).eps)
    relative = tolerance(dtype, len(stream.writes))[through_norm]
    gap_N = _norm(parts - whole)
    if not bool((gap_N <= relative * size_N).all()):
        worst = int((gap_N / size_N).argmax())
        raise failure(kept, what, float(gap_N[worst]), float(size_N[worst]), relative)


def failure(kept: Kept, what: str, gap: float, size: float, allowed: float) -> DecompositionError:
    """Say what does not add up, by how much, and where."""
    stream = kept.stream
    dtype = str(stream.product_dtype).removeprefix("torch.")
    if not kept.live:
        why = (
            "The cache does not hold what one run of this model wrote: its entries were changed, "
            "or its weights were."
        )
    elif kept.autocast:
        why = f"{AUTOCAST}."
    else:
        why = trace_report(stream, kept.inputs.source.prompt).diagnosis()
    relative = f"which is {gap / size:.1e} of" if size > 1e-12 * gap else "which is nothing like"
    return DecompositionError(
        f"{stream.backend.name}: {what} miss what the model computed by {gap:.3g}, {relative} "
        f"their size ({size:.3g}); {allowed:.0e} of it is allowed in {dtype}. {why}"
    )
