"""The neurons of every MLP: what enters the last linear map of it, found by a short run.

Going back from what an MLP writes, a module that puts out the same, or a constant multiple of it,
hands it on. The first linear map on that way is the last map of the MLP. A norm may stand behind
it: the one that the declaration names, or one that the MLP ends in. Experts have no single last
map, nor have MLPs whose output is gated anew at each position.

All MLPs are found in one run, once per version of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dla_hooks.calibration.block_run import (
    ANY_NUMBER,
    EveryCall,
    SeenCall,
    flat,
    same,
    watched,
)
from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.faults import as_refusal
from dla_hooks.modules.hooks import Call, Place, Tap, Use, tapped
from dla_hooks.modules.linear import declared_width
from dla_hooks.modules.version import Remembered
from dla_hooks.modules.vjp import past_hooks
from dla_hooks.residual.kinds import kind_of
from dla_hooks.residual.stream import Block, Stream, WriteSite


@dataclass(frozen=True)
class NeuronSite:
    """The neurons of one MLP, and their way to the stream.

    Attributes:
        place: where they are seen: what enters the last linear map.
        linear: that map.
        name: its path.
        factor: the constant that its output is multiplied by, up to the norm or the stream.
        before: the map and the modules behind it that hand its output on, each with the constant
            that remains.
        norm: the norm behind these, or None.
        norm_factor: the constant that the norm's output is multiplied by.
        behind: the modules behind the norm that hand its output on.
    """

    place: Place
    linear: nn.Module
    name: str
    factor: float
    before: tuple[tuple[Place, float], ...]
    norm: Place | None = None
    norm_factor: float = 1.0
    behind: tuple[tuple[Place, float], ...] = ()


class _Passed(NamedTuple):
    """An end of a module that holds what an MLP writes, or a multiple of it.

    Attributes:
        path: of the module in its block.
        factor: the constant that remains.
        before: whether it is the input.
    """

    path: str
    factor: float
    before: bool


@dataclass(frozen=True)
class _Found:
    """The same by paths in the block: a measurement must hold no part of its model."""

    path: str | None
    before: tuple[_Passed, ...]
    norm: str | None = None
    norm_factor: float = 1.0
    behind: tuple[_Passed, ...] = ()


_known: Remembered[dict[str, _Found]] = Remembered()


def neuron_sites(stream: Stream) -> dict[str, NeuronSite]:
    """The neurons of every write that has some, by the label of the write."""
    key = stream.architecture
    found = _known.of(stream.model, stream.version, lambda: _measure(stream.whole), key)
    writes = [(block, write) for block in stream.blocks for write in block.writes]
    return {w.label: _site(stream, b, w, found[w.label]) for b, w in writes if w.label in found}


def _site(stream: Stream, block: Block, write: WriteSite, found: _Found) -> NeuronSite:
    def place(path: str) -> Place:
        return Place(block.module.get_submodule(path), f"{block.name}.{path}", write.use)

    def places(found: tuple[_Passed, ...]) -> tuple[tuple[Place, float], ...]:
        return tuple((place(e.path)._replace(before=e.before), e.factor) for e in found)

    norm = None if found.norm is None else place(found.norm)
    if write.post_norm is not None:
        norm = write.place
    way = places(found.before), norm, found.norm_factor, places(found.behind)
    if found.path is None:
        named = stream.backend.neurons(block.module)
        assert named is not None
        hook_point, path, linear = named
        at = Place(hook_point, f"{block.name}.{path}", write.use)
        return NeuronSite(at, linear, at.name, found.before[0].factor, *way)
    at = place(found.path).entered
    return NeuronSite(at, at.module, at.name, found.before[0].factor, *way)


class _Seen:
    """What a short run shows of the writes that may be an MLP's.

    Attributes:
        of: for each write the calls in its block whose output has its shape, in order, and what
            was written, ahead of a declared post-norm.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._calls: list[SeenCall] = []
        self._wrote: dict[str, Tensor] = {}
        self.of: dict[str, tuple[list[SeenCall], Tensor]] = {}

    def run(self) -> None:
        stream, modules, around = self._stream, dict[nn.Module, str](), list[Tap]()
        for block in stream.blocks:
            if block.module not in modules:
                place = Place(block.module, block.name, Use(0, ANY_NUMBER))
                around += [EveryCall(place.entered, self._begin), EveryCall(place, self._end)]
            for path, module in block.module.named_modules():
                modules.setdefault(module, f"{block.name}.{path}")
        inside = [watched(module, name, self._calls.append) for module, name in modules.items()]
        candidates = [w for w in stream.writes if w.heads is None and kind_of(w.label) != "attn"]
        writes = [Tap(write.place, self._see(write)) for write in candidates]
        with tapped([*inside, *writes, *around]):
            stream.backend.run_synthetic(short_prompt(stream), None)
            for tap in inside:
                tap.fired = max(tap.fired, 1)  # a module that never runs is no mistake here

    def _begin(self, _: Call) -> None:
        self._calls.clear()
        self._wrote.clear()

    def _end(self, _: Call) -> None:
        for label, wrote in self._wrote.items():  # only what has its shape can hand it on
            self.of[label] = [one for one in self._calls if one.left.shape == wrote.shape], wrote

    def _see(self, write: WriteSite) -> Callable[[Call], None]:
        def see(call: Call) -> None:
            before_norm = write.post_norm is not None
            self._wrote[write.label] = flat(call.entered if before_norm else call.left)

        return see


def _measure(stream: Stream) -> dict[str, _Found]:
    seen = _Seen(stream)
    seen.run()
    found = {}
    for block in stream.blocks:
        every = block.module.named_modules(remove_duplicate=False)
        longest_first = sorted(every, key=lambda one: -len(one[0]))
        paths = {module: path for path, module in longest_first}
        for write in block.writes:
            if write.label in seen.of:
                calls, wrote = seen.of[write.label]
                if kind_of(write.label) == "mlp" or _is_position_wise(stream, write, calls):
                    way = _way(stream, block, write, paths, calls, wrote)
                    if way is not None:
                        found[write.label] = way
    return found


def _way(
    stream: Stream,
    block: Block,
    write: WriteSite,
    paths: dict[nn.Module, str],
    calls: list[SeenCall],
    wrote: Tensor,
) -> _Found | None:
    """How the neurons of one write reach it; None where no single linear map makes it."""
    # What runs behind the write hands it on, too, and is the stream's own; what ends behind it and
    # holds it does not (a hook point in a norm).
    own = [n for n, call in enumerate(calls) if call.module is write.written_by]
    if own:
        later = calls[own[-1] + 1 :]
        holders = [call for call in later if write.written_by in call.module.modules()]
        calls = calls[: own[-1] + 1] + holders
    named = stream.backend.neurons(block.module)
    # The module whose parameter the map is, where the backend names it.
    inner = None if named is None else block.module.get_submodule(named[1].rpartition(".")[0])
    if inner is not None and all(call.module is not inner for call in calls):
        before = _handed_on(paths, calls, wrote)  # some bridges go past it, to the map itself
        return _Found(None, before) if before else None
    map_path, before = _to_map(paths, calls, wrote, inner)
    if before or write.post_norm is not None:
        return _Found(map_path, before) if before else None
    for call in reversed(calls):  # an MLP may end in a norm of its own
        behind = _ratio(call.left, wrote)
        if behind is None or call.entered.shape != wrote.shape or same(call.entered, call.left):
            continue
        map_path, before = _to_map(paths, calls, call.entered, inner)
        if before and _is_norm(stream, call):
            outer = _handed_on(paths, calls, wrote)
            outer = tuple(one for one in outer if one.path != paths[call.module])
            return _Found(map_path, before, paths[call.module], behind, outer)
    return None


def _to_map(
    paths: dict[nn.Module, str], calls: list[SeenCall], wrote: Tensor, inner: nn.Module | None
) -> tuple[str | None, tuple[_Passed, ...]]:
    """The linear map that makes an activation, and all that hands it on; or nothing.

    Args:
        paths: of the modules in the block.
        calls: in the order in which they ended.
        wrote: the activation.
        inner: a module that is known to end in the map, where the map is no module.
    """
    for number in reversed(range(len(calls))):
        call = calls[number]
        width = declared_width(call.module)  # None for a container around the map
        is_map = call.module is inner if inner is not None else width is not None and width > 1
        if is_map and _ratio(call.left, wrote) is not None:
            path = None if inner is not None else paths[call.module]
            return path, _handed_on(paths, calls[number:], wrote)
    return None, ()


def _handed_on(
    paths: dict[nn.Module, str], calls: list[SeenCall], wrote: Tensor
) -> tuple[_Passed, ...]:
    found = []
    for call in calls:
        path, behind = paths.get(call.module), _ratio(call.left, wrote)
        if not path or behind is None:
            continue
        ahead = _ratio(call.entered, wrote)
        found += [] if ahead is None else [_Passed(path, ahead, True)]
        found.append(_Passed(path, behind, False))
    return tuple(found)


def _ratio(one: Tensor, other: Tensor) -> float | None:
    """The constant that makes one activation the other; None where there is none."""
    if same(one, other):
        return 1.0
    if one.shape != other.shape or not one.is_floating_point():
        return None
    wide, target = one.double(), other.to(one.device).double()
    ratio = float((wide * target).sum() / wide.square().sum().clamp_min(1e-300))
    return ratio if ratio and same(one * ratio, other) else None


def _is_norm(stream: Stream, call: SeenCall) -> bool:
    try:
        norm_at(stream, Place(call.module, call.name))
    except UnsupportedModelError:
        return False
    return True


def _is_position_wise(stream: Stream, write: WriteSite, calls: list[SeenCall]) -> bool:
    """Whether a sublayer that no name tells is an MLP: the last token alone gives the same."""
    own = next((one for one in reversed(calls) if one.module is write.module), None)
    if own is None or write.post_norm is not None:
        return False
    try:
        with (
            as_refusal(f"{write.name} does not run on one token"),
            stream.backend.without_user_hooks(),
            past_hooks(write.module),
            torch.no_grad(),
        ):
            alone = write.module.forward(own.entered[None, -1:])
            return isinstance(alone, Tensor) and same(flat(alone), own.left[-1:])
    except UnsupportedModelError:
        return False
