"""Adapters in front of a sublayer's last map that have a direct part, found by asking the model.

With the attention pattern frozen, z is linear in the values; with the gate frozen, the hidden layer
of a gated MLP is linear in what the gate multiplies. So an adapter whose channels become values, or
are multiplied by a gate that does not depend on them, adds a term to what the last map reads.

In one made-up run each such module is disturbed in a row of the batch of its own. Which values, or
which hidden channels, change as its channels do says where these are: a module may put out queries,
keys and values side by side, or a gate beside what it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.calibration.block_run import ANY_NUMBER, EveryCall, same
from dla_hooks.calibration.last_maps import neuron_sites
from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.calibration.two_rows import as_first_row
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.adapters import (
    adapted_modules,
    at_work,
    check_added,
    is_copied,
    is_of_parameter,
    state_of_adapters,
    width_of,
)
from dla_hooks.modules.attention_interface import AttentionCall, watching, why_unseen
from dla_hooks.modules.edits import Edit, edited
from dla_hooks.modules.hooks import ONLY_USE, Call, Place, Tap, Use, tapped
from dla_hooks.modules.linear import input_width
from dla_hooks.modules.outputs import tensor_in
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.stream import Stream

_LENGTH = 8
_FEW = 256
_ANY_USE = Use(0, ANY_NUMBER)


@dataclass(frozen=True)
class Inner:
    """An adapted module in front of a sublayer's last map, whose adapters have a direct part.

    Attributes:
        path: of the module, in the model.
        name: the same, in the sublayer.
        channels: for each value (head after head), or for each hidden channel, which of the
            module's channels it is [I].
        gate: the path of the module that puts out what the hidden channels are multiplied by; None
            for values.
    """

    path: str
    name: str
    channels: Tensor
    gate: str | None = None


_known: Remembered[dict[str, list[Inner]]] = Remembered()


def inner_adapters(stream: Stream) -> dict[str, list[Inner]]:
    """The modules with a direct part, by the label of the write; once per version of a model."""
    key = state_of_adapters(stream.model)
    return _known.of(stream.model, stream.version, lambda: _ask(stream.whole), key)


def _ask(stream: Stream) -> dict[str, list[Inner]]:
    run = _Run(stream)
    return run.found() if run.asked else {}


@dataclass
class _Asked:
    """One module that is disturbed in some rows: in which of its channels, and what was seen."""

    path: str
    name: str
    module: nn.Module
    rows: dict[int, slice]
    noise: Tensor | None = None
    output: Tensor | None = None


class _Run:
    """One made-up run.

    Attributes:
        asked: by the label of the write, the modules that may have a direct part.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream, self._rows = stream, 1
        self._paths = {module: path for path, module in stream.model.named_modules()}
        self._sites = {k: s for k, s in neuron_sites(stream).items() if k in _once(stream)}
        self._values: dict[str, list[Tensor]] = {}
        self._hidden: dict[str, Tensor] = {}
        self._outputs: dict[nn.Module, list[Tensor]] = {}
        self.asked: dict[str, list[_Asked]] = {}
        adapted = [(path, m) for path, m in adapted_modules(stream.model) if _adds(m, path)]
        for label, write in _once(stream).items():
            heads = write.heads
            if heads is not None and not heads.cross and why_unseen() is None:
                inner = _within(adapted, heads.attention, heads.linear)
                self._ask(label, inner, [slice(None)])
            elif label in self._sites:
                last = self._sites[label].linear
                inner, width = _within(adapted, write.module, last), input_width(last)
                for factor in (1, 2):
                    wide = [one for one in inner if width_of(one[2]) == factor * width]
                    self._ask(label, wide, _layouts(width, factor))

    def found(self) -> dict[str, list[Inner]]:
        """Run, and say which of them have a direct part."""
        self._run()
        found: dict[str, list[Inner]] = {}
        for label, asked in self.asked.items():
            of = self._of_hidden if label in self._sites else self._of_values
            found[label] = [one for one in map(partial(of, label), asked) if one is not None]
        return {label: inner for label, inner in found.items() if inner}

    def _ask(
        self, label: str, modules: list[tuple[str, str, nn.Module]], layouts: list[slice]
    ) -> None:
        asked = self.asked.setdefault(label, []) if modules else []
        for module in modules:
            first = 1 + sum(len(one.rows) for one in asked)
            asked.append(_Asked(*module, dict(enumerate(layouts, start=first))))
            self._rows = max(self._rows, first + len(layouts))

    def _run(self) -> None:
        stream, writes = self._stream, _once(self._stream)
        prompt = short_prompt(stream, batch=self._rows, length=_LENGTH)
        prompt.input_ids.copy_(prompt.input_ids[:1].expand_as(prompt.input_ids))
        # What was disturbed in one sublayer must not reach the next one.
        same_input: dict[nn.Module, None] = {block.module: None for block in stream.blocks}
        looks: dict[nn.Module, Callable[[AttentionCall], None]] = {}
        taps, edits = list[Tap](), list[Edit]()
        for label, asked in self.asked.items():
            heads, module = writes[label].heads, writes[label].module
            if label in self._sites:
                site = self._sites[label]
                taps.append(Tap(site.place, partial(self._see_hidden, label)))
                inside = [one for one in module.modules() if one not in self._outputs]
                for one in inside:
                    self._outputs[one] = []
                    place = Place(one, self._paths.get(one, ""), _ANY_USE)
                    taps.append(EveryCall(place, partial(self._see_output, one)))
                same_input[module] = None
            elif heads is not None:
                looks[heads.attention] = partial(self._see_values, label)
                same_input[heads.attention] = None
            edits += [Edit(one.module, partial(self._change, one)) for one in asked]
        alike = partial(as_first_row, rows=self._rows)
        edits = [*(Edit(one, alike, at_input=True) for one in same_input), *edits]
        with watching(looks), edited(edits), tapped(taps):
            stream.backend.run_synthetic(prompt, None)
            for tap in taps:
                tap.fired = max(tap.fired, 1)  # a module that never runs is no mistake here

    def _of_values(self, label: str, asked: _Asked) -> Inner | None:
        """Where a module's channels are among the values, if these are no more than its own."""
        calls, ((row, _),) = self._values.get(label, []), asked.rows.items()
        if len(calls) != 1 or asked.noise is None or calls[0].shape[2] != len(asked.noise):
            return None
        values_SC = calls[0].transpose(1, 2).flatten(2)
        change_CS, noise_OS = (values_SC[row] - values_SC[0]).T, asked.noise.T
        if len(change_CS) == len(noise_OS):
            channels = torch.arange(len(noise_OS), device="cpu")
            if self._close(change_CS, noise_OS, values_SC[0].T):
                return Inner(asked.path, asked.name, channels)
        nearest = [torch.cdist(some, noise_OS).argmin(1) for some in change_CS.split(_FEW)]
        channels = torch.cat(nearest)
        if self._close(change_CS, noise_OS[channels], values_SC[0].T):
            return Inner(asked.path, asked.name, channels)
        return None

    def _of_hidden(self, label: str, asked: _Asked) -> Inner | None:
        """Where a module's channels are among those that a gate multiplies, if any are."""
        hidden_RSI, output = self._hidden.get(label), asked.output
        if hidden_RSI is None or output is None:
            return None
        for row, layout in asked.rows.items():
            up_RSI = output[:, :, layout]
            for gate, calls in self._outputs.items():
                if len(calls) != 1 or calls[0].shape != hidden_RSI.shape or gate is asked.module:
                    continue
                (gate_RSI,) = calls
                fits = all(same(gate_RSI[n] * up_RSI[n], hidden_RSI[n]) for n in (0, row))
                if fits and torch.equal(gate_RSI[0], gate_RSI[row]) and gate in self._paths:
                    channels = torch.arange(output.shape[-1], device="cpu")[layout]
                    return Inner(asked.path, asked.name, channels, self._paths[gate])
        return None

    def _close(self, change_CS: Tensor, noise_CS: Tensor, values_CS: Tensor) -> bool:
        rounding = 1e-5 + 4 * torch.finfo(self._stream.coarsest_dtype).eps
        size_C, noise_C = values_CS.norm(dim=1), noise_CS.norm(dim=1)
        # A disturbance that is lost in the rounding of the values tells nothing.
        allowed_C = torch.minimum(rounding * (size_C + noise_C), 0.5 * noise_C)
        return bool(((change_CS - noise_CS).norm(dim=1) <= allowed_C).all())

    def _change(self, asked: _Asked, x: Tensor) -> Tensor:
        if x.numel() % (self._rows * x.shape[-1]):
            return x
        by_row = x.reshape(self._rows, -1, x.shape[-1])
        generator = torch.Generator("cpu").manual_seed(7)
        shape = by_row.shape[1:]
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        noise = noise.to(x) * by_row[0].float().square().mean().sqrt().clamp(min=1e-3)
        changed = by_row.clone()
        for row, layout in asked.rows.items():
            changed[row, :, layout] += noise[:, layout]
        asked.noise, asked.output = noise.double().cpu(), changed.cpu()
        return changed.view(x.shape)

    def _see_values(self, label: str, call: AttentionCall) -> None:
        value = call.value
        if value.ndim == 4 and len(value) == self._rows:
            self._values.setdefault(label, []).append(value.detach().double().cpu())

    def _see_hidden(self, label: str, call: Call) -> None:
        self._hidden[label] = self._by_row(call.activation)

    def _see_output(self, module: nn.Module, call: Call) -> None:
        out = tensor_in(call.output)
        if out is not None and out.ndim and not out.numel() % (self._rows * out.shape[-1]):
            self._outputs[module].append(self._by_row(out))

    def _by_row(self, x: Tensor) -> Tensor:
        return x.detach().reshape(self._rows, -1, x.shape[-1]).cpu().clone()


def _once(stream: Stream) -> dict[str, Any]:
    """The writes whose block runs once."""
    return {write.label: write for write in stream.writes if write.use == ONLY_USE}


def _within(
    adapted: list[tuple[str, nn.Module]], sublayer: nn.Module, last: nn.Module
) -> list[tuple[str, str, nn.Module]]:
    """Path, name and module of those in a sublayer, ahead of its last map."""
    names = {module: name for name, module in sublayer.named_modules()}
    return [(path, names[one], one) for path, one in adapted if one in names and one is not last]


def _layouts(width: int, factor: int) -> list[slice]:
    """Where the half that is multiplied may be among a module's channels."""
    if factor == 1:
        return [slice(0, width)]
    halves = slice(width, 2 * width), slice(0, width)
    return [*halves, slice(1, 2 * width, 2), slice(0, 2 * width, 2)]


def _adds(module: nn.Module, path: str) -> bool:
    """Whether adapters at work in a module add terms to what it puts out, of low rank."""
    if is_copied(module) or is_of_parameter(module) or not at_work(module):
        return False
    try:
        check_added(module, path)
    except UnsupportedModelError:  # of another kind: what it changes is within the base's
        return False
    return width_of(module) is not None
