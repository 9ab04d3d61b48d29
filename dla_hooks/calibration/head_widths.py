"""The number and the width of a model's heads, measured instead of read off its config.

Pruned layers, edited configs and attention of one's own have other heads than their config says,
and the heads' sum would be the same, so that no check could tell. Here a few made-up tokens are run
in several rows. Every row multiplies each head, inside of attention, by a power of two that spells
the head's number in base four; what enters the output projection then says of every channel which
head it belongs to. Where something between bends that (a norm on each head), a second run changes
one head in each row, and shows which channels move.

Kept per version of a model, and measured only for what needs heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.calibration.two_rows import as_first_row
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.attention import AttentionCalls, Change, disturbed_heads, scaled_heads
from dla_hooks.modules.edits import Edit, edited
from dla_hooks.modules.hooks import Call, Place, Tap, Use, tapped
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.stream import Stream, WriteSite

_LENGTH = 3
_DIGITS = 5  # base four: enough for 1024 heads
_ANY_USE = Use(0, 0)
_INSTEAD = "whole sublayers do not need that (leave out unit=)"


@dataclass(frozen=True)
class HeadWidths:
    """What is measured of one model's heads.

    Attributes:
        sizes: of each write with heads, by its label: their number and the width of one.
        reasons: of each write whose heads cannot be told apart, by its label: why.
        hidden: the writes that run attention whose heads cannot be seen, with the path of the
            missing projection.
    """

    sizes: dict[str, tuple[int, int]]
    reasons: dict[str, str]
    hidden: dict[str, str]


_known: Remembered[HeadWidths] = Remembered()


def head_widths(stream: Stream) -> HeadWidths:
    """Measure the heads of every write; once per version of a model."""
    if not any(write.heads is not None or write.without_heads for write in stream.writes):
        return HeadWidths({}, {}, {})
    key = stream.architecture
    return _known.of(stream.model, stream.version, lambda: _measure(stream.whole), key)


def with_head_widths(stream: Stream) -> Stream:
    """The stream with the measured number and width of every write's heads.

    Raises:
        UnsupportedModelError: naming the layers whose heads cannot be seen, or told apart.
    """
    found = head_widths(stream)
    if found.hidden:
        layers = ", ".join(str(w.layer) for w in stream.writes if w.label in found.hidden)
        paths = ", ".join(found.hidden.values())
        raise UnsupportedModelError(
            f"there is no {paths}, so the heads of layer {layers} cannot be seen, though attention "
            f"runs there ({stream.backend.name}). A wrapper should keep what it wraps as a module "
            f"of its own, and a projection should keep its name; {_INSTEAD}"
        )
    if found.reasons:
        raise UnsupportedModelError(f"{next(iter(found.reasons.values()))}; {_INSTEAD}")
    blocks = []
    for block in stream.blocks:
        writes = tuple(_sized(write, found.sizes) for write in block.writes)
        changed = any(a is not b for a, b in zip(writes, block.writes, strict=True))
        blocks.append(replace(block, writes=writes) if changed else block)
    return replace(stream, blocks=tuple(blocks))


def _sized(write: WriteSite, sizes: dict[str, tuple[int, int]]) -> WriteSite:
    site = write.heads
    if site is None or (site.n_heads, site.d_head) == sizes[write.label]:
        return write
    n_heads, d_head = sizes[write.label]
    return replace(write, heads=replace(site, n_heads=n_heads, d_head=d_head))


def _measure(stream: Stream) -> HeadWidths:
    sizes: dict[str, tuple[int, int]] = {}
    reasons: dict[str, str] = {}
    unclear: list[WriteSite] = []
    codes = _codes(4**_DIGITS)  # [1 + digits, head]
    run = _Run(stream, stream.writes, len(codes))
    run.run(lambda out, n: scaled_heads(out, codes[:, :n]))
    for write in stream.writes:
        if write.heads is None:
            continue
        z, seen = run.z[write.heads.proj], run.seen.get(write.heads.proj, 0)
        if z.ndim == 3:  # [row, head, d_head]: the axes say it themselves
            sizes[write.label] = z.shape[1], z.shape[2]
        elif not seen:
            _declared(write, z.shape[-1], sizes, reasons)
        elif _reads_one_by_one(z, seen):
            sizes[write.label] = seen, z.shape[-1] // seen
        else:
            unclear.append(write)
    if unclear:
        _look_closer(stream, unclear, run.seen, sizes, reasons)
    hidden = {
        write.label: write.without_heads
        for write in stream.writes
        if write.without_heads and run.seen.get(write.module)
    }
    return HeadWidths(sizes, reasons, hidden)


def _codes(n_heads: int) -> Tensor:
    """Row 0 is one; row r holds two to minus the r-th digit, in base four, of every head."""
    heads = torch.arange(n_heads, device="cpu")
    digits = [heads // 4**place % 4 for place in range(_DIGITS)]
    return torch.stack([torch.zeros_like(heads), *digits]).double().neg().exp2()


def _reads_one_by_one(z_RI: Tensor, n_heads: int) -> bool:
    """Whether each of n slices of z follows one head, and no two of them the same one."""
    if z_RI.shape[-1] % n_heads:
        return False
    live_I = z_RI[0].abs() > 1e-6 * z_RI[0].abs().max()
    if not bool(live_I.any()):
        return True  # nothing passes here at all
    # A norm over all heads multiplies a row as a whole: compare with one channel.
    moved = (z_RI[1:, live_I] / z_RI[0, live_I]).abs().clamp_min(1e-9).log2()
    moved = moved - moved[:, :1]
    digits = moved.round()
    if bool(((moved - digits).abs() > 0.1).any()):
        return False
    owner = torch.arange(z_RI.shape[-1], device="cpu") // (z_RI.shape[-1] // n_heads)
    owner = owner[live_I.cpu()]
    codes = set()
    slices = owner.unique().tolist()
    for head in slices:
        of_head = digits[:, owner == head]
        if bool((of_head != of_head[:, :1]).any()):
            return False
        codes.add(tuple(of_head[:, 0].tolist()))
    return len(codes) == len(slices)


def _look_closer(
    stream: Stream,
    writes: list[WriteSite],
    seen: dict[nn.Module, int],
    sizes: dict[str, tuple[int, int]],
    reasons: dict[str, str],
) -> None:
    """Change one head in each row, and see which channels move."""
    sites = {write.label: write.heads for write in writes if write.heads is not None}
    most = max(seen[site.proj] for site in sites.values())
    run = _Run(stream, tuple(writes), 1 + most)
    run.run(lambda out, _: disturbed_heads(out))
    rounding = torch.finfo(stream.coarsest_dtype).eps
    for label, site in sites.items():
        z_RI, n_heads = run.z[site.proj], seen[site.proj]
        change_HI = (z_RI[1 : 1 + n_heads] - z_RI[0]).abs()
        moved_HI = change_HI > (1e-5 + 8 * rounding) * z_RI[0].abs()
        found = next((n for n in range(n_heads, 1, -1) if _are_slices(moved_HI, n)), None)
        if found is None and n_heads == 1:
            found = 1
        if found is not None:
            sizes[label] = found, z_RI.shape[-1] // found
            continue
        channels = moved_HI[0].nonzero()[:, 0].tolist()
        some = ", ".join(map(str, channels[:4])) + (", …" if len(channels) > 4 else "")
        reasons[label] = (
            f"{site.name} does not read its heads one after the other: of {n_heads} heads, head 0 "
            f"reaches the channels {some or 'of none'} of {z_RI.shape[-1]}"
        )


def _are_slices(moved_HI: Tensor, n: int) -> bool:
    """Whether n slices are moved each by heads of its own, all channels of a slice by the same."""
    n_heads, width = moved_HI.shape
    if width % n or n_heads % n:
        return False
    by_slice = moved_HI.reshape(n_heads, n, -1)
    live = by_slice.any(0)  # channels that nothing moves say nothing
    moves = by_slice.any(-1)
    if bool((by_slice != moves[:, :, None])[:, live].any()):
        return False
    return bool((moves.sum(1) <= 1).all()) and bool(moves.any(0).all())


def _declared(
    write: WriteSite, width: int, sizes: dict[str, tuple[int, int]], reasons: dict[str, str]
) -> None:
    """Attention that calls none of the known functions: what its module says, or the config."""
    site = write.heads
    assert site is not None
    said: Any = getattr(site.attention, "head_dim", None)
    n_heads = site.n_heads
    if isinstance(said, int) and not isinstance(said, bool) and said > 0 and width % said == 0:
        n_heads = width // said
    if n_heads and width % n_heads == 0:
        sizes[write.label] = n_heads, width // n_heads
        return
    reasons[write.label] = (
        f"{site.name} reads {width} channels, which {n_heads or 'an unknown number of'} heads "
        "cannot share evenly"
    )


class _Run:
    """One made-up run in which every row of the batch reaches attention alike.

    Attributes:
        z: of every output projection, what entered it at the last token [row, channel].
        seen: of every output projection, and of every module that should hold one and does not,
            the number of heads that attention functions computed on the way there.
    """

    def __init__(self, stream: Stream, writes: tuple[WriteSite, ...], rows: int) -> None:
        self._stream, self._writes, self._rows = stream, writes, rows
        self.z: dict[nn.Module, Tensor] = {}
        self.seen: dict[nn.Module, int] = {}
        self._inside: nn.Module | None = None

    def run(self, change: Change) -> None:
        stream, rows = self._stream, self._rows
        prompt = short_prompt(stream, batch=rows, length=_LENGTH)
        prompt.input_ids.copy_(prompt.input_ids[:1].expand_as(prompt.input_ids))
        taps, edits = self._taps_and_edits()

        def changed(out: Tensor, n_heads: int) -> Tensor:
            assert self._inside is not None
            self.seen[self._inside] = max(n_heads, self.seen.get(self._inside, 0))
            return change(out, n_heads)

        length = prompt.input_ids.shape[1]
        calls = AttentionCalls(rows, length, changed, lambda: self._inside is not None)
        with tapped(taps), edited(edits), calls:
            stream.backend.run_synthetic(prompt, None)

    def _taps_and_edits(self) -> tuple[list[Tap], list[Edit]]:
        # What one layer's heads changed must not reach the next layer's.
        same = {block.module: None for block in self._stream.blocks}
        taps: dict[tuple[nn.Module, str], Tap] = {}
        for write in self._writes:
            site = write.heads
            if site is not None:
                same[site.attention] = None
                entered = Place(site.attention, site.name, _ANY_USE, before=True)
                taps[site.attention, "in"] = Tap(entered, self._enter(site.proj))
                place = site.place._replace(use=_ANY_USE)
                taps[site.proj, "z"] = Tap(place, self._keep(site))
            elif write.without_heads:
                into = Place(write.module, write.name, _ANY_USE, before=True)
                taps[write.module, "in"] = Tap(into, self._enter(write.module))
                out = Place(write.module, write.name, _ANY_USE)
                taps[write.module, "out"] = Tap(out, self._leave)
        alike = partial(as_first_row, rows=self._rows)
        edits = [Edit(module, alike, at_input=True) for module in same]
        return list(taps.values()), edits

    def _enter(self, module: nn.Module) -> Callable[[Call], None]:
        def enter(_: Call) -> None:
            self._inside = module

        return enter

    def _leave(self, _: Call) -> None:
        self._inside = None

    def _keep(self, site: HeadSite) -> Callable[[Call], None]:
        def keep(call: Call) -> None:
            self._inside = None
            z = call.entered if site.linear is site.proj else call.left
            z = z.detach().double().cpu()
            if z.ndim == 4:
                self.z[site.proj] = z[:, -1].clone()
            else:
                self.z[site.proj] = z.reshape(self._rows, -1, z.shape[-1])[:, -1].clone()

        return keep
