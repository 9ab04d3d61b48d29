"""The way into attention: queries, keys and values as linear readings of what attention reads.

Between what an attention module reads and what its attention function gets stand linear maps and
norms, and the module's own code: heads are cut and shared, rotary positions turned. The maps are
pulled back through as elsewhere, norms with their scales frozen. For what the module's own code
does autograd is on, between the modules in it and never inside of them, until the attention
function is called.

Axes: R row of the batch, M d_model, D width of a head.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.errors import DecompositionError, HookError, UnsupportedModelError
from dla_hooks.modules.attention_interface import AttentionCall, AttentionTap
from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.hooks import Place, Tap, hidden_in, mark, with_hidden
from dla_hooks.modules.linear import bias_of, pull_back
from dla_hooks.modules.norms import Norm, frozen_scale
from dla_hooks.tolerance import LEAST, length_of, misfit_tolerance


@dataclass(frozen=True)
class Passed:
    """What an attention module's own code is made of, besides tensors: the modules in it.

    Attributes:
        maps: linear modules and norms, topmost ones, with their paths; None for a linear one.
        frozen: modules that are neither, whose output is taken as it is.
    """

    maps: dict[nn.Module, tuple[str, Norm | None]]
    frozen: dict[nn.Module, str]


@dataclass
class _Step:
    """One call of a map: what entered it, and what left it as a leaf."""

    module: nn.Module
    entered: Tensor
    left: Tensor


class WayIn(Tap):
    """Records how one attention module makes queries, keys and values, in one run of the model.

    Args:
        place: the attention module, and which of its runs; the name is for messages.
        passed: the modules in it.
        dtype: to compute in.
        on_call: called with what the attention function got and returned. Only there, and until
            :meth:`forget`, can the way be read.
    """

    def __init__(
        self,
        place: Place,
        passed: Passed,
        dtype: torch.dtype,
        on_call: Callable[[AttentionCall], None],
    ) -> None:
        super().__init__(place, _is_hooked_itself)
        self._passed, self._dtype, self._on_call = passed, dtype, on_call
        self._read: Tensor | None = None
        self._entered: list[Tensor] = []
        self._steps: list[_Step] = []
        self._open = False

    def put_on(self, thread: int) -> Any:
        """Watch the module, the maps in it and its attention function, in this thread."""

        def mine() -> bool:
            return self._open and threading.get_ident() == thread

        def enter(_: nn.Module, args: Any, *rest: Any) -> Any:
            if threading.get_ident() != thread:
                return None
            self.fired += 1
            return self._enter(args, rest[0]) if self.fired == self.place.use.nth + 1 else None

        def leave(*_: Any) -> None:
            if mine():
                self._close()

        def enter_map(_: nn.Module, args: Any, *rest: Any) -> Any:
            return self._enter_map(args, rest[0]) if mine() else None

        def leave_map(module: nn.Module, _: Any, output: Any) -> Any:
            return self._leave_map(module, output) if mine() else None

        mark(enter, leave, enter_map, leave_map)
        module, stack = self.place.module, ExitStack()
        handles = [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
            AttentionTap(self.place, self._see_call).put_on(thread),
        ]
        for inner in (*self._passed.maps, *self._passed.frozen):
            # The caller's hooks on a map see plain tensors: autograd is off between these two.
            handles += [
                inner.register_forward_pre_hook(enter_map, with_kwargs=True, prepend=True),
                inner.register_forward_hook(leave_map),
            ]
        for handle in handles:
            stack.callback(handle.remove)
        stack.callback(self.forget)
        return _Handle(stack)

    def forget(self) -> None:
        """Let go of all that the way is made of."""
        self._read, self._steps, self._entered, self._open = None, [], [], False

    @outside_autocast
    def reading(
        self, made: Tensor, rows_R: Tensor, columns_R: Tensor, head: int, d_RD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What ``made[row, head, column] . d`` is of what the module read at the same positions.

        Args:
            made: queries, keys or values, as the attention function got them.
            rows_R: rows of the batch, each once.
            columns_R: a column of ``made`` in each.
            head: which of its heads.
            d_RD: directions there.

        Returns:
            Directions [R, d_model] at the module's input, and constants [R].

        Raises:
            UnsupportedModelError: where it is no linear reading of the module's input there.
        """
        name, read = self.place.name, self._read
        if read is None or not made.requires_grad:
            raise UnsupportedModelError(
                f"what {name} hands to its attention function is not made of what it reads there "
                "by linear maps and norms: layers that share keys and values take those of an "
                f"earlier layer{self._among()}"
            )
        rows_R, columns_R = rows_R.to(made.device), columns_R.to(made.device)
        at_made = torch.zeros_like(made)
        at_made[rows_R, head, columns_R] = d_RD.to(at_made)
        at_read, constants_B = self._pull_back(made, at_made)
        places_R = columns_R + (read.shape[1] - made.shape[2]) if read.ndim == 3 else columns_R
        if read.ndim != 3 or len(read) != len(made) or bool((places_R < 0).any()):
            raise UnsupportedModelError(
                f"{name} reads an activation of shape {list(read.shape)} and hands on one of shape "
                f"{list(made.shape)}: which position is which cannot be told"
            )
        found_RM = at_read[rows_R, places_R].to(self._dtype)
        at_read[rows_R, places_R] = 0
        if bool(at_read.any()):
            raise UnsupportedModelError(
                f"{name} mixes positions before it attends, as a convolution does, so that what "
                "its heads read at a token is no reading of the stream there"
            )
        constants_R = constants_B[rows_R]
        self._check(
            made[rows_R, head, columns_R], d_RD, read[rows_R, places_R], found_RM, constants_R
        )
        return found_RM, constants_R

    def _check(
        self, made_RD: Tensor, d_RD: Tensor, read_RM: Tensor, found_RM: Tensor, constants_R: Tensor
    ) -> None:
        """Hold the reading against what it is of."""
        dtype, lefts = self._dtype, [step.left for step in self._steps]  # coarser under autocast
        eps = max(torch.finfo(one.dtype).eps for one in (read_RM, made_RD, *lefts))
        ahead_RM, behind_RD = read_RM.detach().to(dtype) * found_RM, made_RD.detach() * d_RD
        own_R, theirs_R = ahead_RM.sum(-1) + constants_R, behind_RD.to(dtype).sum(-1)
        size_R = length_of(ahead_RM) + length_of(behind_RD.to(dtype)) + constants_R.abs()
        if bool(((own_R - theirs_R).abs() <= (1e-5 + 16 * eps) * size_R + LEAST).all()):
            return
        raise UnsupportedModelError(
            f"what the attention function of {self.place.name} gets is no linear reading of what "
            "the module reads, with the scales of norms frozen: the two miss by "
            f"{float((own_R - theirs_R).abs().max()):.2g} of {float(size_R.max()):.2g}. Values "
            f"that are clipped do this, and hooks of yours in between{self._among()}"
        )

    def _among(self) -> str:
        found = ", ".join(self._passed.frozen.values())
        return f"; neither a linear map nor a norm is {found}" if found else ""

    def _pull_back(self, made: Tensor, at_made: Tensor) -> tuple[Tensor, Tensor]:
        """Directions at the module's input, and the sum of what maps add, in each row [B]."""
        assert self._read is not None
        leaves = [self._read, *(step.left for step in self._steps)]
        found: list[Tensor | None] = [None] * len(leaves)

        def spread(x: Tensor, at_x: Tensor) -> None:
            if not x.requires_grad:
                return
            parts = torch.autograd.grad(x, leaves, at_x, retain_graph=True, allow_unused=True)
            for number, part in enumerate(parts):
                if part is not None:
                    before = found[number]
                    found[number] = part if before is None else before + part

        spread(made, at_made)
        constants_B = torch.zeros(len(made), dtype=self._dtype, device=made.device)
        for number in reversed(range(len(self._steps))):
            at_left = found[number + 1]
            if at_left is not None:
                step = self._steps[number]
                at_entered, added_B = self._through(step, at_left, len(made))
                constants_B += added_B
                spread(step.entered, at_entered)
        at_read = found[0]
        return torch.zeros_like(self._read) if at_read is None else at_read, constants_B

    def _through(self, step: _Step, at_left: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Directions behind a map as directions ahead of it, and what it adds in each row [B]."""
        name, norm = self._passed.maps[step.module]
        entered, dtype = step.entered, self._dtype
        if entered.shape[:-1] != step.left.shape[:-1]:
            raise UnsupportedModelError(
                f"{name} makes {list(step.left.shape)} of {list(entered.shape)}, so that which "
                "position is which cannot be told"
            )
        flat = at_left.reshape(-1, at_left.shape[-1])
        live = flat.any(-1).nonzero()[:, 0]
        d_NK = flat[live].to(dtype)
        if norm is None:
            pulled = pull_back(step.module, d_NK, name)
            added = bias_of(step.module)
        else:
            x, y = (
                t.detach().reshape(-1, t.shape[-1])[live].to(dtype) for t in (entered, step.left)
            )
            s, misfit = frozen_scale(norm, x, y)
            if not float(misfit) <= misfit_tolerance(entered.dtype):
                raise DecompositionError(
                    f"{name} did something else than gamma * (x - centre) / s + beta at one of the "
                    f"positions: {float(misfit):.1e} of its output is unexplained"
                )
            pulled, added = norm.pull_back(d_NK) / s[:, None], norm.beta
        at_entered = torch.zeros_like(entered).reshape(-1, entered.shape[-1])
        at_entered[live] = pulled.to(at_entered)
        added_N = torch.zeros(len(flat), dtype=dtype, device=flat.device)
        if added is not None:
            added_N[live] = d_NK @ added.to(d_NK)
        return at_entered.view_as(entered), added_N.reshape(batch, -1).sum(-1)

    def _enter(self, args: Any, kwargs: Any) -> Any:
        self.forget()
        self._read = hidden_in(args, kwargs).detach().requires_grad_()
        self._open = True
        torch.set_grad_enabled(True)
        # A copy: the module's own code may write in place, and not to a leaf.
        return with_hidden(args, kwargs, self._read.clone())

    def _enter_map(self, args: Any, kwargs: Any) -> Any:
        entered = hidden_in(args, kwargs)
        self._entered.append(entered)
        torch.set_grad_enabled(False)
        return with_hidden(args, kwargs, entered.detach())

    def _leave_map(self, module: nn.Module, output: Any) -> Any:
        torch.set_grad_enabled(True)
        entered = self._entered.pop()
        if module not in self._passed.maps:
            return None
        if not isinstance(output, Tensor):
            raise HookError(f"{self._passed.maps[module][0]} returned a {type(output).__name__}")
        left = output.detach().requires_grad_()
        self._steps.append(_Step(module, entered, left))
        return left.clone()

    def _see_call(self, call: AttentionCall) -> None:
        if self._open:
            self._close()
        self._on_call(call)

    def _close(self) -> None:
        self._open = False
        torch.set_grad_enabled(False)


class _Handle:
    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def remove(self) -> None:
        """Take everything off."""
        self._stack.close()


def _is_hooked_itself(_: Any) -> None:
    raise HookError("the way into attention was shown the call of a module")
