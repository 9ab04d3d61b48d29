"""Where PEFT's adapters write to the stream, found by asking the model.

Every adapted module in a sublayer is disturbed in a row of the batch of its own. If what the
sublayer writes changes by exactly the disturbance, the module's output is a term of the write.
Queries, keys, gates and hidden layers change it in other ways; their adapters have no direct part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.calibration.block_run import ANY_NUMBER, same
from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.calibration.two_rows import as_first_row
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.adapters import (
    adapted_modules,
    at_work,
    check_added,
    innermost,
    is_copied,
    is_of_parameter,
    state_of_adapters,
    with_parameter,
)
from dla_hooks.modules.edits import Edit, edited
from dla_hooks.modules.hooks import Call, Place, Tap, Use, tapped
from dla_hooks.modules.version import Remembered
from dla_hooks.residual.stream import Stream, WriteSite

_ANY_USE = Use(0, ANY_NUMBER)


@dataclass(frozen=True)
class Ending:
    """An adapted module whose output is a term of a write.

    Attributes:
        module: the module.
        path: where it is.
        whole: whether there is no other term.
    """

    module: nn.Module
    path: str
    whole: bool


_known: Remembered[dict[str, list[Ending]]] = Remembered()


def endings(stream: Stream) -> dict[str, list[Ending]]:
    """The adapted modules that each write ends with, by its label; once per version of a model.

    Raises:
        UnsupportedModelError: for an adapter that writes to the stream in a way that is not read.
    """
    key = state_of_adapters(stream.model)
    return _known.of(stream.model, stream.version, lambda: _ask(stream.whole), key)


def _ask(stream: Stream) -> dict[str, list[Ending]]:
    found: dict[str, list[Ending]] = {}
    asked: dict[str, list[tuple[str, nn.Module]]] = {}
    adapted = [(path, m) for path, m in adapted_modules(stream.model) if at_work(m)]
    for write in stream.writes:
        within = set(write.module.modules())
        around = [(p, m) for p, m in adapted if is_copied(m) and write.module in set(m.modules())]
        if around:
            found[write.label] = [Ending(module, path, True) for path, module in around[:1]]
            continue
        inner = [(path, module) for path, module in adapted if module in within]
        if inner:
            asked[write.label] = inner
    if asked:
        found |= _Disturbed(stream, asked).found()
    return found


class _Disturbed:
    """One made-up run in which each adapted module of a write is disturbed in its own row."""

    def __init__(self, stream: Stream, asked: dict[str, list[tuple[str, nn.Module]]]) -> None:
        self._stream, self._asked = stream, asked
        self._writes = [write for write in stream.writes if write.label in asked]
        self._rows = 1 + max(map(len, asked.values()))
        self._noise: dict[nn.Module, Tensor] = {}
        self._outputs: dict[nn.Module, Tensor] = {}
        self._scattered: set[nn.Module] = set()
        self._wrote: dict[str, Tensor] = {}
        self._affine: dict[nn.Module, bool] = {}

    def found(self) -> dict[str, list[Ending]]:
        self._run()
        return {write.label: self._of(write) for write in self._writes}

    def _run(self) -> None:
        stream = self._stream
        prompt = short_prompt(stream, batch=self._rows)
        prompt.input_ids.copy_(prompt.input_ids[:1].expand_as(prompt.input_ids))
        # What was disturbed in one sublayer must not reach the next one.
        same_input = {block.module: None for block in stream.blocks}
        same_input |= {write.module: None for write in self._writes}
        alike = partial(as_first_row, rows=self._rows)
        edits = [Edit(module, alike, at_input=True) for module in same_input]
        taps: dict[nn.Module, Tap] = {}
        for write in self._writes:
            taps[write.module] = Tap(
                Place(write.module, write.name, _ANY_USE), self._keep(write.label)
            )
            for row, (path, module) in enumerate(self._asked[write.label], start=1):
                edits.append(Edit(module, self._change(module, row)))
                if is_of_parameter(module):
                    taps[module] = Tap(Place(innermost(module), path, _ANY_USE), self._bend(module))
        with edited(edits), tapped(list(taps.values())):
            stream.backend.run_synthetic(prompt, None)

    def _of(self, write: WriteSite) -> list[Ending]:
        found, wrote = list[Ending](), self._wrote[write.label]
        for row, (path, module) in enumerate(self._asked[write.label], start=1):
            noise = self._noise.get(module)
            if module in self._scattered:
                raise _unread(
                    path, module, "it sees an encoder's positions, or one expert's tokens"
                )
            if noise is None or not self._affine.get(module, True):
                continue  # of another width, not run, or a parameter of a hidden layer
            change, size = wrote[row] - wrote[0], wrote[0].norm() + noise.norm()
            rounding = (1e-5 + 16 * torch.finfo(self._stream.coarsest_dtype).eps) * size
            # A disturbance that is lost in the rounding of what is written tells nothing.
            if bool((change - noise).norm() <= rounding.clamp(max=0.5 * float(noise.norm()))):
                if not is_copied(module):
                    check_added(module, path)
                whole = same(self._outputs[module], wrote[0])
                if is_copied(module) and not whole:
                    raise _unread(path, module, "the copy writes one of several terms")
                found.append(Ending(module, path, whole))
                continue
            factor = (change * noise).sum(-1, keepdim=True) / noise.square().sum(-1, keepdim=True)
            unexplained = (change - factor * noise).norm()
            if bool(unexplained <= rounding < change.norm()) and unexplained < 0.5 * change.norm():
                raise _unread(path, module, "what it puts out is weighed before it is written")
        return found

    def _change(self, module: nn.Module, row: int) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            if x.shape[-1] != self._stream.d_model:
                return x
            by_row = x.reshape(-1, x.shape[-1])
            if len(by_row) % self._rows or len(by_row) != self._rows * self._length(x):
                self._scattered.add(module)
                return x
            by_row = x.reshape(self._rows, -1, x.shape[-1])
            first = by_row[0].detach()
            generator = torch.Generator("cpu").manual_seed(7)
            noise = torch.randn(first.shape, generator=generator, dtype=torch.float32, device="cpu")
            noise = noise.to(first) * first.float().square().mean().sqrt().clamp(min=1e-3)
            self._noise[module] = noise.double().cpu()
            self._outputs[module] = first.double().cpu()
            changed = by_row.clone()
            changed[row] += noise
            return changed.view(x.shape)

        return change

    def _length(self, x: Tensor) -> int:
        limit = self._stream.position_limit
        return min(4, limit) if limit else 4

    def _keep(self, label: str) -> Callable[[Call], None]:
        def keep(call: Call) -> None:
            out = call.left.detach().double().cpu()
            self._wrote[label] = out.reshape(self._rows, -1, out.shape[-1]).clone()

        return keep

    def _bend(self, module: nn.Module) -> Callable[[Call], None]:
        """Ask whether the module's output is an affine function of the adapted parameter."""

        def see(call: Call) -> None:
            own, kept = innermost(module), module
            name: Any = kept.parameter_name
            value = getattr(own, name)
            none, one, two = (
                _first(with_parameter(own, name, value * k).forward(*call.args, **call.kwargs))
                for k in (0, 1, 2)
            )
            eps = torch.finfo(one.dtype).eps
            bend = (two - 2 * one + none).double().norm()
            size = two.double().norm() + one.double().norm()
            self._affine[module] = bool(bend <= (1e-6 + 16 * eps) * size)

        return see


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _unread(path: str, module: nn.Module, why: str) -> UnsupportedModelError:
    names = ", ".join(map(repr, at_work(module)))
    return UnsupportedModelError(
        f"{path} writes to the stream, and the part that the adapter {names} has there is not "
        f"read: {why}. Attribute components instead, with the adapter on and with "
        "`with model.disable_adapter(): ...`"
    )
