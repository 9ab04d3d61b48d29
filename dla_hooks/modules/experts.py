"""A module that holds all experts of a layer, asked for one expert at a time.

In transformers such a module is called with hidden states, and for each of them the numbers and
the weights of the experts that it goes to. It is recognised by that call. What one expert made of
one hidden state is found by asking the same module again, for that expert alone. So any way that a
library computes experts is read alike: in a loop, grouped, quantised, with an adapter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.modules.autocast import outside_autocast
from dla_hooks.modules.hooks import Call, Tap
from dla_hooks.modules.user_hooks import hooked_modules, silenced
from dla_hooks.modules.weights import is_sharded

_COUNTS = ("total_experts", "num_experts", "num_local_experts", "n_routed_experts")
"""Where such a module says how many experts it has; the first counts those of no weights, too."""

_GROUPED = ("grouped_mm", "batched_mm")
"""Ways to compute experts that call ``_apply_gate`` once, and the down map on what it returns."""


@dataclass(frozen=True)
class ExpertsCall:
    """One call of a module that holds experts.

    Attributes:
        hidden: what the experts read [n, d].
        index: the experts that each of them goes to [n, k].
        weights: what these experts' outputs are multiplied by [n, k].
        args: the positional arguments.
        kwargs: the keyword arguments.
    """

    hidden: Tensor
    index: Tensor
    weights: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def read(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExpertsCall | None:
        """Recognise such a call by its arguments; None for any other."""
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        floats = [t for t in tensors if t.is_floating_point()]
        numbers = [t for t in tensors if not t.is_floating_point() and t.dtype != torch.bool]
        if len(tensors) != 3 or len(floats) != 2 or len(numbers) != 1:
            return None
        (index,), (hidden, weights) = numbers, floats
        if index.ndim < 2 or hidden.ndim < 2 or weights.shape != index.shape:
            return None
        if index.shape[:-1].numel() != hidden.shape[:-1].numel():
            return None
        return cls(hidden, index, weights, args, kwargs)

    def again(
        self, module: nn.Module, hidden_PD: Tensor, index_P: Tensor, slots: int = 1
    ) -> Tensor:
        """What single experts make of single hidden states, before any routing weight [P, d].

        The module runs past all hooks: those on it, and those of the caller's inside of it.

        Args:
            module: the one that was called.
            hidden_PD: what to read.
            index_P: for each the expert to ask.
            slots: in how many slots to ask it, all but the first with the weight zero; some
                modules fail with one.
        """
        index_PK = index_P[:, None].to(self.index.dtype).expand(-1, slots).contiguous()
        weights_PK = self.weights.new_zeros(index_PK.shape)
        weights_PK[:, 0] = 1
        given = {id(self.hidden): hidden_PD, id(self.index): index_PK, id(self.weights): weights_PK}
        args = [given.get(id(value), value) for value in self.args]
        kwargs = {name: given.get(id(value), value) for name, value in self.kwargs.items()}
        with silenced(hooked_modules(module.modules())):
            out: Tensor = module.forward(*args, **kwargs)
        return out.reshape(len(index_P), -1)


def slots_to_ask(module: nn.Module, call: ExpertsCall, out: Tensor, n: int) -> tuple[int, float]:
    """In how many slots a module's experts can be asked one by one.

    Args:
        module: what was called.
        call: the call.
        out: what it put out.
        n: how many experts there are.

    Returns:
        The number, and by which part of its size the sum of all misses what the module put out.
        The number is 0 if they cannot be asked: it fails, or the sum misses by more than rounding.
    """
    k, hidden = call.index.shape[-1], call.hidden.reshape(-1, call.hidden.shape[-1])
    index_NK, weights_NK = call.index.reshape(-1, k), call.weights.reshape(-1, k)
    known_NK = (index_NK >= 0) & (index_NK < n)
    entries_P = known_NK.nonzero()[:, 0]
    wide = torch.promote_types(out.dtype, torch.float32)
    whole = out.reshape(len(hidden), -1).to(wide)
    for slots in (1, 2):
        try:
            each_PM = call.again(module, hidden[entries_P], index_NK[known_NK], slots).to(wide)
        except (RuntimeError, ValueError, IndexError):
            continue
        if each_PM.shape[-1] != whole.shape[-1]:
            continue
        weighted_PM = each_PM * weights_NK[known_NK][:, None].to(wide)
        added = torch.zeros_like(whole).index_add_(0, entries_P, weighted_PM)
        size = float(whole.norm() + weighted_PM.norm()) or 1.0
        misfit = float((added - whole).norm()) / size
        if misfit <= 1e-5 + 8 * torch.finfo(out.dtype).eps:
            return slots, misfit
    return 0, 0.0


class ExpertsTap(Tap):
    """A tap that can ask the module again, under the autocast that its run had."""

    under: tuple[str, ...] = ()

    def count(self, call: Call) -> None:
        device = call.activation.device.type
        self.under = (device,) if torch.is_autocast_enabled(device) else ()
        super().count(call)

    def as_it_ran(self) -> ExitStack:
        """A ``with`` block with the autocast that was on when the module ran."""
        stack = ExitStack()
        for device in self.under:
            stack.enter_context(torch.autocast(device, enabled=True))
        return stack


def count_of(module: nn.Module) -> int | None:
    """How many experts a module, or the one inside of its wrapper, says that it has."""
    for one in module.modules():
        for name in _COUNTS:
            found = getattr(one, name, None)
            if isinstance(found, int) and not isinstance(found, bool):
                return found
    return None


def is_spread(module: nn.Module) -> bool:
    """Whether each process holds some of the experts only."""
    if getattr(module, "_is_expert_parallel", False):
        return True
    return any(is_sharded(weight) for weight in module.parameters())


def shows_down_inputs(module: nn.Module) -> bool:
    """Whether what enters the experts' down map can be seen, and the map read off the module."""
    way = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if way not in _GROUPED or "forward" in vars(module) or is_spread(module):
        return False
    if not getattr(module, "has_gate", False) or getattr(module, "has_post_expert_norm", True):
        return False
    down, bias = _own(module, "down_proj"), _own(module, "down_proj_bias")
    if down is None or bool(getattr(module, "has_bias", False)) != (bias is not None):
        return False
    plain = all(type(w) is nn.Parameter and not w.is_meta for w in (down, bias) if w is not None)
    return plain and down.ndim == 3 and bool(down.is_floating_point())


def is_sorted(module: nn.Module) -> bool:
    """Whether the rows that enter the down map are sorted by expert."""
    return bool(vars(module)["config"]._experts_implementation == "grouped_mm")


@outside_autocast
def pull_back_down(
    module: nn.Module, d_M: Tensor, experts: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """A direction at the experts' outputs, as one at the input of each one's down map.

    Args:
        module: holds the experts.
        d_M: the direction.
        experts: of which; None is all.

    Returns:
        Directions [experts, d_ff], and what the biases give [experts].
    """
    down_EIM: Any = module.down_proj
    if not getattr(module, "is_transposed", False):
        down_EIM = down_EIM.transpose(1, 2)
    d_M = d_M.to(down_EIM.device)
    which = range(len(down_EIM)) if experts is None else experts
    u_EI = torch.stack([down_EIM[expert].detach().to(d_M) @ d_M for expert in which])
    bias_EM = _own(module, "down_proj_bias")
    if bias_EM is None:
        return u_EI, u_EI.new_zeros(len(u_EI))
    of_bias_E = bias_EM.detach()[list(which)].to(d_M) @ d_M
    return u_EI, of_bias_E


def _own(module: nn.Module, name: str) -> Any:
    return module._parameters.get(name)


_lock = threading.RLock()


class _Watched:
    """Stands on a module for its ``_apply_gate``, and shows what that returns."""

    def __init__(self, module: nn.Module) -> None:
        self.inner: Callable[[Tensor], Tensor] = module._apply_gate  # type: ignore[assignment]
        self.before = vars(module).get("_apply_gate")
        self.looks: dict[int, list[Callable[[Tensor], None]]] = {}  # by thread

    def __call__(self, given: Tensor) -> Tensor:
        out = self.inner(given)
        for look in self.looks.get(threading.get_ident(), ()):
            look(out)
        return out


@dataclass
class DownInputs(Tap):
    """Shows what enters the experts' down map, which no module boundary does.

    Attributes:
        on_rows: called with it [n * k, d_ff].
    """

    on_rows: Callable[[Tensor], None] = field(kw_only=True)
    _watched: _Watched = field(init=False, repr=False)
    _thread: int = field(init=False, repr=False)

    def put_on(self, thread: int) -> DownInputs:
        """Stand between the gate and the down map of a module, for one thread."""
        kept = vars(self.place.module)
        with _lock:
            if not isinstance(kept.get("_apply_gate"), _Watched):
                kept["_apply_gate"] = _Watched(self.place.module)
            self._watched = kept["_apply_gate"]
            self._watched.looks.setdefault(thread, []).append(self._look)
        self._thread = thread
        return self

    def remove(self) -> None:
        """Take it off. The last one out leaves the module as it was."""
        kept, watched = vars(self.place.module), self._watched
        with _lock:
            looks = watched.looks[self._thread]
            looks.remove(self._look)
            if not looks:
                del watched.looks[self._thread]
            if watched.looks or kept.get("_apply_gate") is not watched:
                return
            del kept["_apply_gate"]
            if watched.before is not None:
                kept["_apply_gate"] = watched.before

    def _look(self, rows: Tensor) -> None:
        self.fired += 1
        if self.fired == self.place.use.nth + 1:
            outside_autocast(self.on_rows)(rows)
