"""Scales: the factors and constants with which a model's writes add up, measured once.

A declaration names the writes. Two things are measured: how they enter the stream (write scales,
skip gains, bare biases), and how the stream is read (logit scale, softcap). A tiny batch is run.
Known vectors replace the input of every block, the output of every write and the output of the
final norm. Each block must then return

    output = gain * input + sum_j response_j * write_j + constant

per channel. Every term has a row of the batch and can be read from it exactly. Any other block (a
norm on the sum, a mixing of several streams) is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dla_hooks.backends import Backend
from dla_hooks.calibration.logits import masked_tokens
from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.calibration.readout import readout
from dla_hooks.calibration.synthetic_run import SyntheticRun, refusal
from dla_hooks.errors import HookError, NonFiniteError
from dla_hooks.modules.autocast import autocast_is_on
from dla_hooks.modules.compiled import eagerly
from dla_hooks.modules.faults import SyntheticRunError
from dla_hooks.modules.hooks import ONLY_USE, Use
from dla_hooks.modules.past_wrappers import EVERY, every_wrapper
from dla_hooks.modules.runs import count_firings
from dla_hooks.modules.version import Remembered
from dla_hooks.modules.weights import made_of
from dla_hooks.residual.stream import Stream, coarsest


@dataclass(frozen=True)
class BlockScales:
    """The scales of one block. None stands for one (factors) or for nothing (the constant).

    Attributes:
        index: of the block in the declared list.
        writes: indices of the writes that ran, among the declared ones.
        gain: the factor of the input, [] or [d_model].
        responses: the factor of each write, [] or [d_model].
        constant: the vector that is added besides [d_model].
        carriers: what carries the stream on: its number, how many writes run before it, and its
            factor.
        behind: the factor between the block's output and what reads the stream next.
    """

    index: int
    writes: tuple[int, ...]
    gain: Tensor | None
    responses: tuple[Tensor | None, ...]
    constant: Tensor | None
    carriers: tuple[tuple[int, int, Tensor | None], ...] = ()
    behind: Tensor | None = None


@dataclass(frozen=True)
class Scales:
    """The scales of one model, as plain numbers that keep no model alive."""

    blocks: tuple[BlockScales, ...]
    has_positions: bool
    positions_response: Tensor | None
    final_norm_use: Use
    stream_dtype: torch.dtype
    write_dtype: torch.dtype
    read_dtype: torch.dtype
    logit_scale: float
    logit_bias: Tensor | None
    softcap: float | None
    masked: Tensor | None
    vocabulary: int
    ahead: int
    under_autocast: bool


_known: Remembered[Scales] = Remembered()


def with_scales(stream: Stream) -> Stream:
    """Return a located stream together with the measured scales of its model.

    The scales are kept per model object, and measured again when its weights change.

    Raises:
        UnsupportedModelError: when a block is no sum, or the logits no affine map of the stream.
    """
    version = stream.backend.state.version
    around = {one.module: one.inner.module for one in stream.blocks if one.inner is not None}
    if stream.backend.past == EVERY:
        around = {**every_wrapper(stream.backend.root), **around}
    stream.backend.wrappers = around
    scales = _known.find(stream.model, version, stream.architecture)
    remembered = scales is not None
    if scales is None:
        scales = _measure(stream)
        # A first run may change the weights itself, as RWKV's does.
        version = stream.backend.read_state().version
        _known.keep(stream.model, version, scales, stream.architecture)
    stream.backend.under_autocast = scales.under_autocast
    try:
        scaled = _apply(stream, scales)
    except IndexError:  # the stack was longer when it was measured, in a way that left no trace
        _known.drop(stream.model)
        return with_scales(stream)
    return replace(scaled, version=version, remembered=remembered)


def _apply(stream: Stream, scales: Scales) -> Stream:
    blocks = []
    for found in scales.blocks:
        block = stream.blocks[found.index]
        writes = tuple(
            block.writes[j] if response is None else replace(block.writes[j], response=response)
            for j, response in zip(found.writes, found.responses, strict=True)
        )
        # This runs in every call. Most blocks are plain sums and stay as they are.
        plain = found.gain is None and found.constant is None and len(writes) == len(block.writes)
        plain = plain and found.behind is None and not block.carriers
        if not plain or any(a is not b for a, b in zip(writes, block.writes, strict=True)):
            carriers = tuple(
                replace(block.carriers[number], after=after, response=response)
                for number, after, response in found.carriers
            )
            block = replace(
                block,
                writes=writes,
                gain=found.gain,
                constant=found.constant,
                carriers=carriers,
                behind=found.behind,
            )
        blocks.append(block)
    return replace(
        stream,
        blocks=tuple(blocks),
        positions=stream.positions if scales.has_positions else None,
        positions_response=scales.positions_response,
        final_norm=stream.final_norm._replace(use=scales.final_norm_use),
        stream_dtype=scales.stream_dtype,
        write_dtype=scales.write_dtype,
        read_dtype=scales.read_dtype,
        logit_scale=scales.logit_scale,
        logit_bias=scales.logit_bias,
        softcap=scales.softcap,
        masked=scales.masked,
        vocabulary=scales.vocabulary,
        ahead=scales.ahead,
    )


def _measure(stream: Stream) -> Scales:
    check_weights(stream.backend)
    stream.backend.under_autocast = autocast_is_on() and not _runs_outside_autocast(stream)
    with eagerly(stream.backend.compiled):  # or it is refused before any hook is put on
        synthetic, logits = _synthetic_run(stream)
    blocks = []
    for position, (index, writes) in enumerate(synthetic.live):
        block = stream.blocks[index]
        gain, *responses = (
            synthetic.factor(position, slot, block) for slot in range(1 + len(writes))
        )
        synthetic.check_together(position, block, [gain, *responses])
        constant = synthetic.constant(position)
        kept = constant if bool(constant.any()) else None
        carriers = tuple(synthetic.carriers(position, block))
        behind = synthetic.behind(position)
        blocks.append(BlockScales(index, writes, gain, tuple(responses), kept, carriers, behind))
    scale, cap, bias = readout(synthetic, logits)
    has_positions, response = synthetic.positions() if stream.positions else (False, None)
    return Scales(
        blocks=tuple(blocks),
        has_positions=has_positions,
        positions_response=response,
        final_norm_use=synthetic.norm_use,
        stream_dtype=coarsest(synthetic.dtypes.stream),
        write_dtype=coarsest(synthetic.dtypes.writes),
        read_dtype=coarsest(synthetic.dtypes.read),
        logit_scale=scale,
        logit_bias=bias,
        softcap=cap,
        masked=masked_tokens(logits),
        vocabulary=logits.shape[-1],
        ahead=synthetic.ahead,
        under_autocast=stream.backend.under_autocast,
    )


def _runs_outside_autocast(stream: Stream) -> bool:
    """Whether a model runs at all where autocast does not make its dtypes one."""
    try:
        with torch.no_grad():
            stream.backend.run_synthetic(short_prompt(stream, length=2), None)
    except SyntheticRunError:  # "expected m1 and m2 to have the same dtype"
        return False
    return True


def _synthetic_run(stream: Stream) -> tuple[SyntheticRun, Tensor]:
    """Make a synthetic run, and return it with its logits.

    In most models every declared module runs once. The run itself shows that, so one is enough:
    for a model on disk, a run reads all weights. Otherwise a plain run first counts the modules'
    runs, and the synthetic run is repeated.
    """
    declared = [(index, tuple(range(len(b.writes)))) for index, b in enumerate(stream.blocks)]
    synthetic = SyntheticRun(stream, declared, ONLY_USE)
    try:
        with count_firings(_declared_modules(stream)) as fired:
            logits = synthetic.run()
        as_declared = _live(stream, fired) == (declared, ONLY_USE)
    except HookError:  # something did not run, or several times
        as_declared = False
    if not as_declared:
        with count_firings(_declared_modules(stream)) as fired:
            stream.backend.run_synthetic(short_prompt(stream, length=2), None)
        synthetic = SyntheticRun(stream, *_live(stream, fired))
        logits = synthetic.run()
    return synthetic, logits


def _declared_modules(stream: Stream) -> list[nn.Module]:
    modules = [stream.final_norm.module]
    for block in stream.blocks:
        modules += [block.module, *(write.written_by for write in block.writes)]
    return modules


def check_weights(backend: Backend) -> None:
    """Refuse weights that are not finite. A run may not touch them, so all are checked."""
    for name, parameter in backend.named_weights():
        if not all(_is_finite(tensor) for tensor in made_of(parameter.detach())):
            raise NonFiniteError(
                f"the weights hold NaN or infinity: {name} is the first such parameter; "
                "the checkpoint is damaged or was not loaded in full"
            )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    if tensor.dtype.itemsize == 1:  # torch cannot sum 8-bit floats
        tensor = tensor.to(torch.float32)
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if bool(torch.isfinite(tensor.sum(dtype=wide))):
        return True
    return bool(torch.isfinite(tensor).all())  # large finite entries overflow in a sum


def _live(
    stream: Stream, fired: dict[nn.Module, int]
) -> tuple[list[tuple[int, tuple[int, ...]]], Use]:
    """Find the blocks that run, the writes of each that run, and the final norm's last run."""
    runs = fired[stream.final_norm.module]
    if not runs:
        raise refusal(stream, f"its final norm {stream.final_norm.name} never runs")
    live = []
    for index, block in enumerate(stream.blocks):
        if fired[block.module]:
            writes = tuple(j for j, w in enumerate(block.writes) if fired[w.written_by])
            if not writes:
                raise refusal(
                    stream,
                    f"nothing that {block.name} is said to write ever runs in a plain forward pass",
                )
            live.append((index, writes))
    if not live:
        raise refusal(stream, f"no block of {stream.architecture.layers} runs as a whole")
    return live, Use(runs - 1, runs)
