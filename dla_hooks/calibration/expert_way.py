"""By which way the experts of one block reach the stream, and what stands beside them.

Read off two runs. The modules that read the experts' output one after another are the way; how a
disturbance of that output arrives tells whether nothing else stands on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dla_hooks.calibration.block_run import same
from dla_hooks.calibration.moe_run import BlockCalls, Seen
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules import norms
from dla_hooks.modules.experts import count_of
from dla_hooks.modules.linear import declared_width
from dla_hooks.residual.stream import Block, Stream

INSTEAD = "attribute whole sublayers instead (leave out unit=)"


_FINE = 1e-12
"""Of a float64 model, the rounding that is its own."""


@dataclass(frozen=True)
class SharedSite:
    """An expert that every position goes to. Paths are those in the block.

    Attributes:
        path: the module whose output it is; "" where it is a whole write of its own.
        gate: the module whose output, through a sigmoid, multiplies it; or None.
        factor: of its output.
        label: the write of its own.
    """

    path: str
    gate: str | None = None
    factor: float = 1.0
    label: str = ""


@dataclass(frozen=True)
class ExpertSite:
    """The experts of one write. Paths are those in the block.

    Attributes:
        block: the number of the block in the stack.
        label: the write that they are added to.
        path: the module that holds them.
        n: how many there are.
        k: how many each position goes to; 0 where each expert's output of every position is seen
            side by side.
        slots: in how many slots an expert is asked alone; see :class:`Seen`.
        steps: the linear maps and norms between that module and the sum with all others, in order.
        factor: what the last of these is multiplied by, [] or [d_model]; None is one.
        shared: those that every position goes to.
        constant: what that sum holds besides [d_model]; None is nothing.
        tail: the linear maps and norms between the sum and the write's own post-norm.
        rounds: whether experts or their sum are rounded more coarsely than float64.
        inside: whether they are inside of the module that makes the write.
    """

    block: int
    label: str
    path: str
    n: int
    k: int
    slots: int
    steps: tuple[str, ...]
    factor: Tensor | None
    shared: tuple[SharedSite, ...]
    constant: Tensor | None
    tail: tuple[str, ...]
    rounds: bool
    inside: bool


def refused(block: Block, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{block.name}: {why}; {INSTEAD}")


def site_of(
    stream: Stream, number: int, experts: Seen, plain: BlockCalls, moved: BlockCalls
) -> ExpertSite:
    block = stream.blocks[number]
    n, again = count_of(experts.module), moved.like(experts)
    assert n is not None
    out, out_again = experts.left, again.left
    if not experts.experts:  # expert by expert
        out, out_again = (x.unflatten(0, (n, -1)).sum(0) for x in (out, out_again))
    label = _moved(block, plain, moved)
    ends = {write.written_by for write in block.writes}
    whole, whole_again = plain.terms[label], moved.terms[label]
    tail = list[Seen]()
    while True:
        steps = _steps(stream, plain.calls, experts, out, whole, ends)
        end, end_again = out, out_again
        if steps:
            end, end_again = steps[-1].left, moved.like(steps[-1]).left
        change = end_again.double() - end, whole_again.double() - whole
        factor = _factor(*change, torch.finfo(out.dtype).eps)
        if factor is not None:
            break
        # Perhaps what makes the term reads the sum.
        last = _reads_sum(stream, plain.calls, experts, whole, tail)
        if last is None:
            raise refused(
                block,
                f"between its experts ({experts.path}) and the stream stands more than linear "
                "maps, norms and factors, such as a convolution over positions",
            )
        tail = [last, *tail]
        whole, whole_again = last.entered, moved.like(last).entered
    rest = whole.double() - end.double() * factor
    size = float(whole.double().norm() + end.double().norm()) or 1.0
    rounding = (1e-6 + 2 * torch.finfo(whole.dtype).eps) * size
    shared, constant, misfit = _besides(block, plain, experts, rest, rounding)
    write = next(write for write in block.writes if write.label == label)
    apart = [w.label for w in block.writes if "shared" in w.kind and w.label != label]
    return ExpertSite(
        block=number,
        label=label,
        path=experts.path,
        n=n,
        k=experts.experts,
        slots=experts.slots,
        steps=tuple(step.path for step in steps),
        factor=None if bool((factor == 1).all()) else factor,
        shared=(*shared, *(SharedSite("", label=other) for other in apart)),
        constant=constant,
        tail=tuple(step.path for step in tail),
        rounds=max(misfit / size, experts.misfit) > _FINE,
        inside=any(module is experts.module for module in write.module.modules()),
    )


def _moved(block: Block, plain: BlockCalls, moved: BlockCalls) -> str:
    """The write that the experts are a part of: the first that the disturbance reaches."""
    for write in block.writes:
        term = plain.terms[write.label].double()
        change = moved.terms[write.label].double() - term
        if bool(change.norm() > 1e-3 * term.norm()):
            return write.label
    raise refused(block, "what its experts put out reaches none of its writes")


def _steps(
    stream: Stream,
    calls: Sequence[Seen],
    experts: Seen,
    out: Tensor,
    term: Tensor,
    ends: set[nn.Module],
) -> list[Seen]:
    """The linear maps and norms through which the experts' output goes, one after another."""
    steps, later = list[Seen](), calls[calls.index(experts) + 1 :]
    while not same(out, term):
        reading = (
            seen
            for seen in later
            if same(seen.entered, out)
            and seen.module not in ends
            and not same(seen.left, out)
            and _is_step(stream, seen)
        )
        step = next(reading, None)
        if step is None:
            break
        steps.append(step)
        out, later = step.left, later[later.index(step) + 1 :]
    return steps


def _is_step(stream: Stream, seen: Seen) -> bool:
    if declared_width(seen.module) == seen.entered.shape[-1]:
        return True
    if seen.entered.shape[-1] != stream.d_model:
        return False
    try:
        norms.probe(seen.module, stream.d_model, seen.path, stream.work_dtype)
    except UnsupportedModelError:
        return False
    return True


def _reads_sum(
    stream: Stream, calls: Sequence[Seen], experts: Seen, whole: Tensor, tail: Sequence[Seen]
) -> Seen | None:
    """The linear map or norm behind the experts whose output a term is, not counting ``tail``."""
    for seen in reversed(calls[calls.index(experts) + 1 :]):
        makes = seen not in tail and same(seen.left, whole) and not same(seen.entered, whole)
        if makes and _is_step(stream, seen):
            return seen
    return None


def _factor(given: Tensor, reached: Tensor, eps: float) -> Tensor | None:
    """What multiplies one change on its way to the other: one number, or one for each channel.

    Returns:
        [] or [d_model]; None where it is more than that.
    """
    rounding = 1e-5 + 16 * eps
    if given.shape != reached.shape:
        return None
    number = (given * reached).sum() / given.square().sum()
    if bool((reached - number * given).norm() <= rounding * reached.norm()):
        return torch.ones_like(number) if bool((number - 1).abs() <= rounding) else number
    channels = (given * reached).sum(0) / given.square().sum(0)
    if bool((reached - channels * given).norm() <= rounding * reached.norm()):
        return channels
    return None


def _besides(
    block: Block, calls: BlockCalls, experts: Seen, rest: Tensor, rounding: float
) -> tuple[list[SharedSite], Tensor | None, float]:
    """What a sum holds besides routed experts: a shared one, or a constant; and what is left."""
    whole = float(rest.norm())
    if whole <= rounding:
        return [], None, whole
    varies = float((rest - rest.mean(0)).norm())
    if varies <= rounding:
        return [], rest.mean(0), varies
    for seen in reversed(calls.calls):  # a module before those inside of it
        if seen.left.shape != rest.shape or seen.path.startswith(f"{experts.path}."):
            continue
        left = seen.left.double()
        by_N = (rest * left).sum(-1) / left.square().sum(-1)
        misfit = float((rest - by_N[:, None] * left).norm())
        if misfit <= rounding:
            return [_shared(block, calls, seen, by_N)], None, misfit
    raise refused(
        block,
        f"what it adds to the stream beside the experts in {experts.path} is the output of no "
        "module in it, so that no row can be made of it",
    )


def _shared(block: Block, calls: BlockCalls, seen: Seen, by_N: Tensor) -> SharedSite:
    close = 1e-4 + 16 * torch.finfo(seen.left.dtype).eps
    for gate in calls.calls:
        if gate.left.shape == (len(by_N), 1) and torch.allclose(
            gate.left.double().sigmoid()[:, 0], by_N, rtol=close, atol=close
        ):
            return SharedSite(seen.path, gate.path)
    number = float(by_N.mean())
    if not torch.allclose(by_N, by_N.mean().expand_as(by_N), rtol=close, atol=close):
        raise refused(
            block, f"{seen.path} is multiplied by a number of each position that no module shows"
        )
    return SharedSite(seen.path, factor=1.0 if abs(number - 1) <= close else number)
