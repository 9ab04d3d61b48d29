"""Modules in a block that may carry the stream on, beside those that write to it.

They are the modules that hold a write and stand in the block, as BLOOM's attention around its
output projection and a block inside of a wrapper; and the dropouts and identities next to them.
Which of them do is measured, in :mod:`dla_hooks.calibration.scales`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import nn

from dla_hooks.modules.hooks import Place, Use
from dla_hooks.residual.stream import Block, Carrier

PASS_ON = (nn.Dropout, nn.Identity)


def with_carriers(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """Find the modules of each block that may carry the stream on."""
    found = [_candidates(block) for block in blocks]
    total = Counter(key for places in found for key in map(_key, places))
    so_far: Counter[tuple[nn.Module, bool]] = Counter()
    numbered = []
    for block, places in zip(blocks, found, strict=True):
        carriers = []
        for place in places:
            key = _key(place)
            carriers.append(Carrier(place._replace(use=Use(so_far[key], total[key]))))
            so_far[key] += 1
        numbered.append(replace(block, carriers=tuple(carriers)) if carriers else block)
    return tuple(numbered)


def _key(place: Place) -> tuple[nn.Module, bool]:
    return place.module, place.before


def _candidates(block: Block) -> list[Place]:
    """The input and output of every such module, each once."""
    written = {write.written_by for write in block.writes}
    held: dict[nn.Module, str] = {}
    for write in block.writes:
        if not write.name.startswith(f"{block.name}."):
            continue  # it stands beside the block
        module, path = block.module, block.name
        for name in write.name.removeprefix(f"{block.name}.").split(".")[:-1]:
            module, path = getattr(module, name), f"{path}.{name}"
            held.setdefault(module, path)
    found = dict(held)
    for module, path in ((block.module, block.name), *held.items()):
        for name, child in module._modules.items():
            if isinstance(child, PASS_ON):
                found.setdefault(child, f"{path}.{name}")
    return [
        Place(module, path, before=before)
        for module, path in found.items()
        if module not in written
        if block.inner is None or module is not block.inner.module
        for before in (True, False)
    ]
