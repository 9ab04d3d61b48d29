"""How what a mixer without attention writes comes from its values, measured on a made-up run.

Linear attention and Mamba can be read where their recurrence is linear in the values, and where all
that follows it, up to the last linear map, multiplies every channel by a number that does not
depend on them (but for a norm's scale, which is frozen). Both are tested, as for attention
(:mod:`dla_hooks.calibration.attention_form`): two rows are run that reach the mixer alike, and
differ in what the recurrence returned.

Kept per version of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dla_hooks.calibration.head_widths import with_head_widths
from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.calibration.two_rows import as_first_row, noise
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.edits import Edit, edited
from dla_hooks.modules.hooks import Call, Place, Tap, tapped
from dla_hooks.modules.linear import check_readable
from dla_hooks.modules.recurrence_watch import has_recurrence, watching
from dla_hooks.modules.recurrences import RecurrenceCall, parts_of_output
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.stream import Stream, WriteSite

_LENGTH = 8
_PROJECTIONS = ("out_proj", "o_proj", "output")


@dataclass(frozen=True)
class MixerForm:
    """How one write comes from the values of its recurrence.

    Attributes:
        n_heads: how many heads of the unit ``head`` enter its last linear map, side by
            side; 0 where it has none.
        scaled: whether something between the recurrence and the map multiplies each channel.
    """

    n_heads: int
    scaled: bool


@dataclass(frozen=True)
class MixerForms:
    """What is measured of one model's mixers, by the label of the write.

    Attributes:
        of: how what they write comes to be.
        reasons: why the tokens that a mixer reads cannot be told apart.
    """

    of: dict[str, MixerForm]
    reasons: dict[str, str]


_known: Remembered[MixerForms] = Remembered()


def mixer_forms(stream: Stream) -> MixerForms:
    """Measure every write that ends in a recurrence; once per version of a model.

    Args:
        stream: the located model.
    """
    return _known.of(
        stream.model, stream.version, lambda: _measure(stream.whole), stream.architecture
    )


class _NotReadable(Exception):
    """Why one write's sources cannot be told apart."""


@dataclass
class _Seen:
    """What one mixer was seen to do.

    Attributes:
        calls: of its recurrence, as they were changed in row 1.
        bend: how far each is from a linear map, relative to its output.
        z: what entered the last linear map [2, pos, C].
        own: what that map put out.
        wrote: what the mixer put out.
    """

    calls: list[Tensor]
    bend: float
    z: Tensor
    own: Tensor | None = None
    wrote: Tensor | None = None


def _measure(stream: Stream) -> MixerForms:
    mixers = [write for write in stream.writes if has_recurrence(write.module)]
    found = {write.label: last_map(write) for write in mixers}
    projections = {label: place for label, place in found.items() if place is not None}
    forms = MixerForms({}, {})
    if not projections:
        return forms
    writes = {write.label: write for write in stream.writes if write.label in projections}
    prompt = short_prompt(stream, batch=2, length=_LENGTH)
    prompt.input_ids.copy_(prompt.input_ids[:1].expand_as(prompt.input_ids))
    waiting, seen, eps = list[tuple[Tensor, float]](), dict[str, _Seen](), _rounding(stream)

    def look(call: RecurrenceCall) -> Tensor:
        changed = call.output.detach().clone()
        changed[1:] *= noise(changed[1:].shape).to(changed)
        waiting.append((call.flat(changed).double().cpu().clone(), _bend(call, stream.work_dtype)))
        return changed

    def enter(label: str) -> Callable[[Call], None]:
        def keep(call: Call) -> None:
            z = call.entered.detach().double().cpu()
            if waiting and z.ndim == 3:
                calls, bends = zip(*waiting, strict=True)
                seen[label] = _Seen(list(calls), max(bends), z.clone())
            waiting.clear()

        return keep

    def leave(label: str, name: str) -> Callable[[Call], None]:
        def keep(call: Call) -> None:
            if label in seen:
                setattr(seen[label], name, call.left.detach().double().cpu().clone())

        return keep

    taps, modules = list[Tap](), [write.module for write in writes.values()]
    for label, place in projections.items():
        write = writes[label]
        taps.append(Tap(place, enter(label)))
        taps.append(Tap(place._replace(before=False), leave(label, "own")))
        taps.append(Tap(Place(write.module, write.name, write.use), leave(label, "wrote")))
    same = dict.fromkeys([*(block.module for block in stream.blocks), *modules])
    edits = [Edit(module, as_first_row, at_input=True) for module in same]
    with watching(modules, look), tapped(taps), edited(edits):
        stream.backend.run_synthetic(prompt, None)
    heads = {write.label: write.heads for write in with_head_widths(stream).writes}
    for label, one in seen.items():
        place, site = projections[label], heads[label]
        n_heads = 0 if site is None else site.n_heads
        try:
            scaled = _is_scaled(writes[label], one, n_heads, eps)
            check_readable(place.module, place.name)
        except (_NotReadable, UnsupportedModelError) as error:
            forms.reasons[label] = f"{writes[label].name} reads cannot be told: {error}"
        else:
            forms.of[label] = MixerForm(n_heads, scaled)
    return forms


def last_map(write: WriteSite) -> Place | None:
    """The input of the last linear map of a write's module, if it has one by a usual name."""
    for name in _PROJECTIONS:
        found = getattr(write.module, name, None)
        if isinstance(found, nn.Module):
            path = write.name if write.post_norm is None else "a mixer"
            return Place(found, f"{path}.{name}", write.use, before=True)
    return None


def _rounding(stream: Stream) -> float:
    return max(1e-4, 16 * torch.finfo(stream.product_dtype).eps)


@torch.no_grad()
def _bend(call: RecurrenceCall, dtype: torch.dtype) -> float:
    """How far a recurrence is from a causal linear map of its values, relative to its output.

    Its parts by derivative are held against its output, too.
    """
    arguments = call.of_row(0, 1, dtype)
    value = arguments[call.values]
    other = value.flip(call.axis) * 0.5
    whole, one, two, nothing = (
        call.run(arguments, x).double() for x in (value + other, value, other, 0 * value)
    )
    size = float(one.norm() + two.norm())
    bend = float((whole - one - two).norm() + nothing.norm()) / (size + 1e-30)
    last = torch.tensor([one.shape[1] - 1], device=one.device)
    u_TC = noise(one.shape[2:]).to(value)[None] - 1
    try:
        parts, _ = parts_of_output(call, 0, last, u_TC, 1)
    except RuntimeError:  # a kernel without a backward pass
        return float("inf")
    terms = one[0, -1] * u_TC[0].double()
    miss = abs(float(parts.double().sum() - terms.sum()))
    return max(bend, miss / (float(terms.norm()) + 1e-30))


def _is_scaled(write: WriteSite, seen: _Seen, n_heads: int, rounding: float) -> bool:
    """Whether z is the recurrence's output times a number for each channel, or that output itself.

    Raises:
        _NotReadable: where it is neither.
    """
    if write.post_norm is not None:
        raise _NotReadable("a norm stands behind it")
    if not seen.bend <= rounding:
        raise _NotReadable(
            "its recurrence is not linear in its values, or has no usable backward pass "
            f"(it misses by {seen.bend:.0e})"
        )
    a, z = torch.cat(seen.calls, -1), seen.z
    own, wrote = cast("Tensor", seen.own), cast("Tensor", seen.wrote)
    if a.shape != z.shape or not _close(own, wrote, 1e-6):
        raise _NotReadable("its last linear map reads something else than its recurrence")
    if _close(z, a, rounding):
        return False
    moved, expected = z[1], z[0] * torch.where(a[0] != 0, a[1] / a[0], 0)
    for n in {max(1, n_heads), *_group_counts(z.shape[-1])}:
        one, other = (x.unflatten(-1, (n, -1)) for x in (moved, expected))
        # A norm's scale changes, too: one number for each group of channels that it norms.
        scale = (one * other).sum(-1, keepdim=True) / other.square().sum(-1, keepdim=True)
        if _close(one, other * scale.nan_to_num(), rounding):
            return True
    raise _NotReadable(
        "between its recurrence and its last linear map stands something else than a gate or a "
        "norm that multiplies each channel"
    )


def _group_counts(width: int) -> list[int]:
    """Into how many groups of neighbours, of four or more channels, a width can be cut."""
    return [n for n in range(1, width // 4 + 1) if width % n == 0]


def _close(one: Tensor, other: Tensor, relative: float) -> bool:
    return bool((one - other).norm() <= relative * other.norm())
