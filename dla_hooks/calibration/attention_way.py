"""What stands between the stream and what the attention of one block is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from dla_hooks.calibration.block_run import SeenCall, run_block, same
from dla_hooks.calibration.linear_readers import Reader, reader_of
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules import norms
from dla_hooks.modules.hooks import Place
from dla_hooks.modules.linear import check_readable, declared_width
from dla_hooks.modules.norms import Norm
from dla_hooks.modules.way_in import Passed
from dla_hooks.residual.head_site import HeadSite
from dla_hooks.residual.stream import Stream


@dataclass(frozen=True)
class AttentionWay:
    """Where the attention of one block reads the stream, and what it is made of.

    Attributes:
        reader: the stream up to where it is read, and the norm between the two.
        place: the attention module.
        passed: the modules in it.
    """

    reader: Reader
    place: Place
    passed: Passed


def attention_way(stream: Stream, site: HeadSite) -> AttentionWay:
    """Find what stands between the stream and one attention function.

    Args:
        stream: the model's whole stream.
        site: its heads.

    Raises:
        UnsupportedModelError: where the attention reads anything but the stream or its norm.
    """
    attention = site.attention
    block, path = next(
        (block, f"{block.name}.{path}" if path else block.name)
        for block in stream.blocks
        for path, module in block.module.named_modules()
        if module is attention
    )
    reader = reader_of(stream, attention, path)
    calls = dict[nn.Module, SeenCall]()
    for call in run_block(stream, block).calls:
        calls.setdefault(call.module, call)
    passed = Passed({}, {})
    with stream.backend.without_user_hooks():
        _sort(stream, attention, calls, passed)
    return AttentionWay(reader, Place(attention, path, site.use), passed)


def _sort(
    stream: Stream, module: nn.Module, calls: Mapping[nn.Module, SeenCall], passed: Passed
) -> None:
    """Tell the topmost linear maps and norms in a module from all else that it calls."""
    for child in module.children():
        call = calls.get(child)
        if call is not None and same(call.entered, call.left):
            continue  # it hands its input on
        is_map, norm = (False, None) if call is None else _map(stream, call)
        if is_map and call is not None:
            passed.maps[child] = call.name, norm
        elif next(child.children(), None) is not None:
            _sort(stream, child, calls, passed)
        elif call is not None:
            passed.frozen[child] = call.name


def _map(stream: Stream, call: SeenCall) -> tuple[bool, Norm | None]:
    """Whether a module is a linear map or a norm, and the norm's constants."""
    if not call.entered.is_floating_point():
        return False, None
    if declared_width(call.module) == call.entered.shape[-1]:
        check_readable(call.module, call.name)
        return True, None
    if call.entered.shape != call.left.shape:
        return False, None
    width = call.entered.shape[-1]
    try:
        return True, norms.probe(call.module, width, call.name, stream.work_dtype)
    except UnsupportedModelError:
        return False, None
