"""What a model is asked once, before it is attributed: how its writes add up.

A declaration says where the writes are. How they enter the stream (write scales, skip gains,
biases that no module puts out) and how the stream is read (logit scale, softcap) is measured: a
tiny batch is run in which the input of every block, the output of every write and the output of
the final norm are replaced by known vectors. Each block must then return

    output = gain * input + sum_j response_j * write_j + constant

per channel, and every term can be read off its own row of the batch, exactly. A block that does
anything else with the sum (a norm on it, a mixing of several streams) is refused here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dla_hooks.errors import NonFiniteError, UnsupportedModelError
from dla_hooks.forward import run_model
from dla_hooks.hooks import Edit, Tap, Use, count_firings, edited, tapped
from dla_hooks.linear import rows as rows_of
from dla_hooks.linear import value_at
from dla_hooks.locate import Block, Stream
from dla_hooks.questions import short_prompt, stamp

_TOKENS = 64  # as many as are needed to see a map of the vocabulary for what it is


@dataclass(frozen=True)
class BlockFacts:
    """How one block adds up; None stands for one (factors) or for nothing (the constant).

    Attributes:
        index: of the block in the declared list.
        writes: indices of the writes that ran, among the declared ones.
        gain: what the input is multiplied by, [] or [d_model].
        responses: what each write is multiplied by, [] or [d_model].
        constant: what is added besides [d_model].
    """

    index: int
    writes: tuple[int, ...]
    gain: Tensor | None
    responses: tuple[Tensor | None, ...]
    constant: Tensor | None


@dataclass(frozen=True)
class Facts:
    """The answers of one model: plain numbers, so that keeping them keeps no model alive."""

    blocks: tuple[BlockFacts, ...]
    final_norm_runs: int
    stream_dtype: torch.dtype
    logit_scale: float
    softcap: float | None
    vocabulary: int


_known: WeakKeyDictionary[nn.Module, tuple[object, Facts]] = WeakKeyDictionary()
_lock = threading.Lock()


def settle(stream: Stream) -> Stream:
    """A located stream with all that its model had to be asked.

    The answers are kept per model object, and forgotten when its weights change.

    Raises:
        UnsupportedModelError: when a block is no sum, or the logits no affine map of the stream.
    """
    now = (stream.architecture, stamp(stream.model))
    with _lock:
        kept = _known.get(stream.model)
    if kept is not None and kept[0] == now:
        return replace(_apply(stream, kept[1]), remembered=True)
    facts = _ask(stream)
    with _lock:  # asking may change the weights itself: RWKV rescales them when it first runs
        _known[stream.model] = (stream.architecture, stamp(stream.model)), facts
    return _apply(stream, facts)


def forget(model: nn.Module) -> None:
    """Drop what is known of a model."""
    with _lock:
        _known.pop(model, None)


def _apply(stream: Stream, facts: Facts) -> Stream:
    blocks = []
    for found in facts.blocks:
        block = stream.blocks[found.index]
        writes = tuple(
            replace(block.writes[j], response=response)
            for j, response in zip(found.writes, found.responses, strict=True)
        )
        blocks.append(replace(block, writes=writes, gain=found.gain, constant=found.constant))
    return replace(
        stream,
        blocks=tuple(blocks),
        final_norm_runs=facts.final_norm_runs,
        stream_dtype=facts.stream_dtype,
        logit_scale=facts.logit_scale,
        softcap=facts.softcap,
        vocabulary=facts.vocabulary,
    )


def _ask(stream: Stream) -> Facts:
    check_weights(stream.model)
    live, norm_runs = _live(stream)
    interview = _Interview(stream, live, norm_runs)
    logits = interview.run()
    blocks = []
    for position, (index, writes) in enumerate(live):
        block = stream.blocks[index]
        gain, *responses = (
            interview.factor(position, slot, block) for slot in range(1 + len(writes))
        )
        constant = interview.constant(position)
        kept = constant if bool(constant.any()) else None
        blocks.append(BlockFacts(index, writes, gain, tuple(responses), kept))
    scale, cap = interview.readout(logits)
    return Facts(tuple(blocks), norm_runs, interview.stream_dtype, scale, cap, logits.shape[-1])


def check_weights(model: nn.Module) -> None:
    """Refuse weights that are not finite, wherever they are: a run may pass over them unseen."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            if not bool(torch.isfinite(parameter.detach().sum(dtype=wide))):
                raise NonFiniteError(
                    f"the weights hold NaN or infinity: {name} is the first such parameter; "
                    "the checkpoint is damaged or was not loaded in full"
                )


def _live(stream: Stream) -> tuple[list[tuple[int, tuple[int, ...]]], int]:
    """The blocks that run at all with the writes of each that do; how often the final norm runs."""
    modules = [stream.final_norm]
    for block in stream.blocks:
        modules += [block.module, *(write.written_by for write in block.writes)]
    prompt = short_prompt(stream, length=2)
    with count_firings(modules) as fired:
        run_model(stream.model, prompt, None)
    if not fired[stream.final_norm]:
        raise _refusal(stream, f"its final norm {stream.final_norm_name} never runs")
    live = []
    for index, block in enumerate(stream.blocks):
        if fired[block.module]:
            writes = tuple(j for j, w in enumerate(block.writes) if fired[w.written_by])
            if not writes:
                raise _refusal(stream, f"nothing that {block.name} is said to write ever runs")
            live.append((index, writes))
    if not live:
        raise _refusal(stream, f"no block of {stream.architecture.layers} runs as a whole")
    return live, fired[stream.final_norm]


def _refusal(stream: Stream, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(stream.model).__name__} (model type {stream.model.config.model_type!r}) cannot be "
        f"attributed: {what}"
    )


class _Interview:
    """One run on made-up activations.

    Rows of the batch: 0 has nothing anywhere; then two rows for the input and for each write,
    one with +-1 in every channel (which shows a factor to the last bit) and one with noise (which
    shows whether the block is linear at all).
    """

    def __init__(
        self, stream: Stream, live: list[tuple[int, tuple[int, ...]]], norm_runs: int
    ) -> None:
        self.stream = stream
        self.live = live
        self.norm_runs = norm_runs
        self.n_rows = 1 + 2 * (1 + max(len(writes) for _, writes in live))
        generator = torch.Generator().manual_seed(4)
        d_model = stream.d_model
        self.signs = torch.ones(d_model, dtype=torch.float64)
        self.signs[torch.randperm(d_model, generator=generator)[: d_model // 2]] = -1
        # Larger than the signs, or a norm would treat the two alike; rounded, so that what is put
        # in is what the model sees.
        self.noise = 4 * torch.randn(d_model, generator=generator, dtype=torch.float64)
        self.noise = self.noise.to(stream.dtype).double()
        self.outputs: dict[int, Tensor] = {}
        self.stream_dtype = stream.dtype

    def run(self) -> Tensor:
        """Logits [rows, vocabulary] at the first token."""
        prompt = short_prompt(self.stream, batch=self.n_rows, length=2)
        prompt.input_ids.copy_(prompt.input_ids[:1].expand_as(prompt.input_ids))
        blocks = [self.stream.blocks[index] for index, _ in self.live]
        taps = [
            Tap(block.module, block.name, self._keep(i - 1), True, block.use)
            for i, block in enumerate(blocks)
            if i
        ]
        norm, runs = self.stream.final_norm, self.norm_runs
        taps.append(
            Tap(
                norm,
                self.stream.final_norm_name,
                self._keep(len(blocks) - 1),
                True,
                Use(runs - 1, runs),
            )
        )
        edits = [self._edit(norm, self.stream.final_norm_name, self._normed())]
        for block, (_, writes) in zip(blocks, self.live, strict=True):
            if block is blocks[0] and self.stream.start is not None:
                name = self.stream.architecture.start or ""
                edits.append(self._edit(self.stream.start, name, self._slot(0)))
            else:
                edits.append(self._edit(block.module, block.name, self._slot(0), at_input=True))
            for slot, j in enumerate(writes, start=1):
                write = block.writes[j]
                edits.append(self._edit(write.written_by, write.name, self._slot(slot)))
        # Taps first: they must see what reaches a block before it is replaced.
        with tapped(taps), edited(edits):
            logits = run_model(self.stream.model, prompt, torch.tensor([0]))
        if logits.ndim != 3 or logits.shape[0] != self.n_rows:
            raise _refusal(self.stream, f"its logits have the shape {list(logits.shape)}")
        return logits[:, 0].double().cpu()

    def factor(self, position: int, slot: int, block: Block) -> Tensor | None:
        """What a block multiplies its input (slot 0) or one of its writes by."""
        out = self.outputs[position] - self.outputs[position][0]
        of_signs, of_noise = out[1 + 2 * slot], out[2 + 2 * slot]
        factor = of_signs * self.signs
        expected = factor * self.noise
        tolerance = 1e-5 + 16 * torch.finfo(self.stream.dtype).eps
        off = float((of_noise - expected).norm() / (expected.norm() + of_noise.norm() + 1e-30))
        if slot == 0 and self.stream.dtype == torch.float64 and off > 1e-12:
            self.stream_dtype = torch.float32  # as Mamba does, whatever the model's dtype
        if not off <= tolerance:
            what = "its input" if slot == 0 else block.writes[slot - 1].label
            raise _refusal(
                self.stream,
                f"{block.name} is no sum: what it returns does not depend linearly on {what} "
                f"(off by {off:.1e}), as with a norm on the sum itself or several mixed streams",
            )
        if slot == 0 and not bool(factor.any()):
            raise _refusal(
                self.stream,
                f"{block.name} does not carry its input on: one of the modules that are said to "
                "write to the stream returns the stream itself",
            )
        if bool((factor == factor[0]).all()):
            # One number for all channels. In 16 bits noise tells it more finely than +-1 does.
            fit = of_noise @ self.noise / self.noise.square().sum()
            rounded = torch.finfo(self.stream.dtype).eps > 1e-6
            factor = fit if rounded and factor[0] != 1 else factor[0]
            return None if factor == 1 else factor
        return factor

    def constant(self, position: int) -> Tensor:
        """What a block adds to nothing [d_model]."""
        return self.outputs[position][0]

    def readout(self, logits: Tensor) -> tuple[float, float | None]:
        """The logit scale and the softcap."""
        stream = self.stream
        cap = self._cap(logits)
        # Some models mask the end of their vocabulary with -inf.
        finite = torch.isfinite(logits[1]).nonzero()[:, 0]
        shuffled = torch.randperm(len(finite), generator=torch.Generator().manual_seed(5))
        ids = finite[shuffled[:_TOKENS]]
        W, b = (t.double().cpu() for t in rows_of(stream.unembed, ids, torch.float64))
        y = self._normed()[1]
        for module in stream.after_norm:
            y = value_at(module, y).double().cpu()
        linear = W @ y
        seen = logits[1, ids] if cap is None else cap * torch.atanh(logits[1, ids] / cap)
        # The bias is scaled along with the rest: seen = k * (linear + b).
        ours = linear + b
        scale = float(ours @ seen / ours.square().sum())
        off = float((scale * ours - seen).norm() / seen.norm())
        rounding = torch.finfo(stream.dtype).eps
        if not off <= 1e-4 + 16 * rounding:
            raise _refusal(
                stream,
                "its logits are not the unembedding of the final norm's output: even a best fit is "
                f"off by {off:.1e}; another layer or nonlinearity stands between them",
            )
        return (1.0 if abs(scale - 1) < 1e-6 + rounding else scale), cap

    def _cap(self, logits: Tensor) -> float | None:
        seen = torch.isfinite(logits[1])
        large, larger = logits[2][seen].abs().max(), logits[3][seen].abs().max()
        if bool(torch.isfinite(larger)) and bool((larger - large).abs() <= 1e-3 * larger):
            return float(larger)
        return None

    def _slot(self, slot: int) -> Tensor:
        rows = torch.zeros(self.n_rows, self.stream.d_model, dtype=torch.float64)
        rows[1 + 2 * slot], rows[2 + 2 * slot] = self.signs, self.noise
        return rows

    def _normed(self) -> Tensor:
        """Rows for the final norm's output: nothing, some noise, and so much that a cap is met."""
        sizes = torch.zeros(self.n_rows, 1, dtype=torch.float64)
        sizes[1], sizes[2], sizes[3] = 0.25, 2e3, 4e3
        return sizes * self.noise

    def _fill(self, name: str, like: Tensor, rows: Tensor) -> Tensor:
        if like.shape[-1] != self.stream.d_model:
            raise _refusal(
                self.stream,
                f"{name} puts out {like.shape[-1]} channels, but the stream has "
                f"{self.stream.d_model}: it is not what the block adds to the stream",
            )
        per_row = like.numel() // (self.n_rows * like.shape[-1])
        new = rows[:, None, :].expand(-1, per_row, -1).reshape(like.shape)
        return new.to(like, copy=True)  # a model may go on to write into it

    def _edit(self, module: nn.Module, name: str, rows: Tensor, at_input: bool = False) -> Edit:
        return Edit(module, lambda x: self._fill(name, x, rows), at_input)

    def _keep(self, position: int) -> Callable[[Tensor, Tensor], None]:
        def keep(x: Tensor, _: Tensor) -> None:
            rows = x.detach().double().cpu().reshape(self.n_rows, -1, x.shape[-1])
            self.outputs[position] = rows[:, 0].clone()

        return keep
