"""Where the experts of each block are, found by what modules do in a short run.

A module is taken for one that holds experts if it is called as such, and if its experts, asked one
by one, sum to what it puts out.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import transformers

from dla_hooks.calibration.expert_way import INSTEAD, ExpertSite, refused, site_of
from dla_hooks.calibration.moe_run import BlockCalls, Seen, disturbed_run, plain_run
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.modules.experts import count_of, is_spread
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.stream import Block, Stream
from dla_hooks.results.row_runs import Run

_HOLDS_EXPERTS = re.compile(r"(MoE|Moe|MOE|Experts)$")

_known: Remembered[tuple[ExpertSite, ...]] = Remembered()


def expert_sites(stream: Stream, layers: Collection[int] | None = None) -> tuple[ExpertSite, ...]:
    """The experts of every block that has some, found once per version of a model.

    Args:
        stream: the located model.
        layers: the layers to look at; None is all.

    Raises:
        InputError: for a layer that has none.
        UnsupportedModelError: for a model without experts, or with some that cannot be told apart.
    """
    found = _known.of(stream.model, stream.version, lambda: _find(stream.whole))
    if stream.ending is not None:
        here = {write.label for write in stream.writes}
        found = tuple(site for site in found if site.label in here)
        if not found:
            raise UnsupportedModelError(
                f"no experts write to {stream.last_label} of {stream.backend.name}; {INSTEAD}"
            )
    have = {stream.blocks[site.block].layer for site in found}
    lacking = [layer for layer in layers or () if layer not in have]
    if lacking:
        raise InputError(
            f"layers names {lacking[0]}, but the layers with experts are {sorted(have)}"
        )
    return tuple(s for s in found if not layers or stream.blocks[s.block].layer in layers)


def expert_rows(site: ExpertSite, layer: int, sub: int) -> list[Run]:
    """The rows of one sublayer; those of a second one in a block are L0.1E0, L0.1E1, …"""
    at = f"L{layer}.{sub}" if sub else f"L{layer}"
    routed = Run(f"{at}E{{}}", "expert", layer, sub, n=site.n)
    return [routed, Run(f"{at}S{{}}", "shared", layer, sub, n=len(site.shared))]


def _find(stream: Stream) -> tuple[ExpertSite, ...]:
    hidden = [_unseen(block) for block in stream.blocks]
    name = type(stream.backend.root).__name__
    if not any(hidden):
        raise UnsupportedModelError(f"{name} has no experts; {INSTEAD}")
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} keeps the experts of {name} as modules "
            f"apart, with weights that no module sees; install transformers 5, or {INSTEAD}"
        )
    plain = plain_run(stream)
    experts = [_experts_call(calls) for calls in plain]
    for block, seen, why in zip(stream.blocks, experts, hidden, strict=True):
        _check(block, seen, why)
    moved = disturbed_run(stream, plain, experts)
    return tuple(
        site_of(stream, number, seen, plain[number], moved[number])
        for number, seen in enumerate(experts)
        if seen is not None
    )


def _check(block: Block, seen: Seen | None, hidden: str) -> None:
    """Refuse experts that cannot be asked one by one."""
    if seen is None:
        if block.use.of != 1 and hidden:
            raise refused(block, "it is used more than once, and which run is which is not told")
        if hidden:
            raise refused(
                block,
                f"{hidden} does not take hidden states with the numbers and the weights of the "
                "experts that they go to, so no expert can be asked alone (kernels that replace "
                "the whole layer do this, and layers with a routing of their own)",
            )
        return
    if is_spread(seen.module):
        raise refused(
            block,
            f"the experts in {seen.path} are spread over processes (expert or tensor "
            "parallelism), and none sees all of them; load the model without it",
        )
    if seen.experts and not seen.slots:
        raise refused(
            block,
            f"the experts in {seen.path}, asked one by one and times their weights, do not sum to "
            "what it puts out",
        )


def _unseen(block: Block) -> str:
    """The path of what calls itself experts in a block; "" for none."""
    for path, module in block.module.named_modules():
        last = path.rpartition(".")[2]
        if path and ("expert" in last or _HOLDS_EXPERTS.search(type(module).__name__)):
            return f"{path} ({type(module).__name__})"
    return ""


def _experts_call(calls: BlockCalls) -> Seen | None:
    """The call of the module that holds a block's experts; of wrappers the outermost."""
    found = [seen for seen in calls.calls if seen.experts]
    if found:
        return found[-1]
    rows = 0 if calls.input is None else len(calls.input)
    for seen in reversed(calls.calls):  # every expert reads every position, one after another
        n, weight = count_of(seen.module) or 1, seen.module._parameters.get("down_proj")
        holds = n > 1 and weight is not None and weight.ndim == 3
        if holds and len(seen.entered) == n * rows == len(seen.left):
            return seen
    return None
