"""What the model's own module and each adapter put out, projected inside of one adapted module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.modules.adapters import (
    Added,
    at_work,
    innermost,
    inside,
    is_of_parameter,
    plain_parameter,
    product_of,
    terms,
    with_parameter,
)
from dla_hooks.modules.hooks import Call, Place, Tap, Use
from dla_hooks.modules.linear import pull_back
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.kernels import project
from dla_hooks.projection.tiles import View

_ROOM = 8
"""Experts take a few times the room of their input."""

Row = Callable[[torch.device], Tensor]
"""A row of a ledger to write to, on a device."""


class AdaptedModule:
    """An adapted module, whose output is a sum of what it wraps and of its adapters.

    Args:
        module: as PEFT wrapped it.
        path: where it is.
        use: the run of it that is read.
        directions: what its output is projected on.

    Attributes:
        path: the same.
        names: of the terms: None for the module inside, and then each adapter.
    """

    def __init__(self, module: nn.Module, path: str, use: Use, directions: Directions) -> None:
        self._module, self._path, self._use, self._d = module, path, use, directions
        self.path = path
        self.names: list[str | None] = [None, *at_work(module)]
        is_linear = not (is_of_parameter(module) or _is_table(module))
        self._terms = terms(module) if is_linear else []

    @property
    def place(self) -> Place:
        """The whole output, ahead of hooks."""
        return Place(self._module, self._path, self._use).ahead

    def factor(self, name: str) -> Tensor | None:
        """What multiplies one adapter's term [d_out], as magnitudes of DoRA do; None is one."""
        return next((term.factor for term in self._terms if term.name == name), None)

    def constant(self) -> Tensor | None:
        """What the base's term has besides [K]; None is nothing."""
        base = self._terms[0] if self._terms else None
        if base is None or base.factor is None or base.bias is None:
            return None
        return self._d.of_constant(base.bias.to(base.factor) * (1 - base.factor))

    def taps(self, view: View, rows: Sequence[Row]) -> list[Tap]:
        """Taps that write the terms' projections, in the order of ``names``."""
        module = self._module
        if is_of_parameter(module):
            place = Place(innermost(module), f"{self._path}.base_layer", self._use)
            return [Tap(place, self._see_parameter(view, rows))]
        base = Place(inside(module), f"{self._path}.base_layer", self._use)
        if _is_table(module):
            taps = [self._project(base, self._d, view, rows[0])]
            ids = Place(module, self._path, self._use, before=True)
            return [*taps, Tap(ids, self._see_ids(view, rows[1:]))]
        return [
            self._tap(term, base, view, row) for term, row in zip(self._terms, rows, strict=True)
        ]

    def _tap(self, term: Added, base: Place, view: View, row: Row) -> Tap:
        factor, kept, name = term.factor, self._module, term.name
        module: Any = kept
        d = self._d if factor is None else self._d.then(lambda d_KM: d_KM * factor.to(d_KM))
        if name is None:
            return self._project(base, d, view, row)
        product, before = product_of(kept, name), Place(kept, self._path, self._use, before=True)
        if product is not None:
            A_RM, B_MR = product
            u = d.then(lambda d_KM: d_KM @ B_MR.to(d_KM) @ A_RM.to(d_KM))
            return self._project(before, u, view, row)
        A, B, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
        if factor is None:
            place = Place(B, f"{self._path}.lora_B.{name}", self._use)
            return self._project(place, d.then(lambda d_KM: d_KM * scaling), view, row)
        # DoRA runs its matrices to norm them, too: read the module's input instead.
        u = d.then(lambda d_KM: pull_back(A, pull_back(B, d_KM)) * scaling)
        return self._project(before, u, view, row)

    def _project(self, place: Place, directions: Directions, view: View, row: Row) -> Tap:
        def see(call: Call) -> None:
            x = call.activation
            project(x, view, directions, row(x.device))

        return Tap(place, see)

    def _see_ids(self, view: View, rows: Sequence[Row]) -> Callable[[Call], None]:
        """Embeddings: the adapter's own vectors of the tokens, through its second matrix."""
        module: Any = self._module

        def see(call: Call) -> None:
            ids = call.entered[..., None]
            scale: Any = module._get_embed_scale() if hasattr(module, "_get_embed_scale") else None
            factor = 1.0 if scale is None else float(scale)
            for name, row in zip(self.names[1:], rows, strict=True):
                A, B = module.lora_embedding_A[name], module.lora_embedding_B[name]
                by = module.scaling[name] * factor
                out_N = row(ids.device)
                for tile in view.tiles(B.shape[0], ids.device):
                    x_TR = A.T[view.take(ids, tile.place)[:, 0]].to(self._d.dtype)
                    d_KR = self._d.at(tile, ids.device) @ B.to(self._d.dtype) * by
                    out_N[tile.index] = torch.linalg.vecdot(x_TR, tile.spread(d_KR))

        return see

    def _see_parameter(self, view: View, rows: Sequence[Row]) -> Callable[[Call], None]:
        """One parameter: the module runs again on the selected rows, with each term of it alone."""
        wrapper: Any = self._module
        name: str = wrapper.parameter_name

        def see(call: Call) -> None:
            own = innermost(wrapper)
            x, plain = call.entered, plain_parameter(own, name)
            deltas = [wrapper.get_delta_weight(adapter) for adapter in self.names[1:]]
            outs = [row(x.device) for row in rows]
            for tile in view.tiles(_ROOM * x.shape[-1], x.device):
                args, kwargs = _at(call, view, tile.place)

                def put_out(value: Tensor, args: Any = args, kwargs: Any = kwargs) -> Tensor:
                    out: Any = with_parameter(own, name, value).forward(*args, **kwargs)
                    out = out[0] if isinstance(out, tuple) else out
                    found: Tensor = out.reshape(-1, out.shape[-1]).to(self._d.dtype)
                    return found

                d_TM = tile.spread(self._d.at(tile, x.device))
                outs[0][tile.index] = torch.linalg.vecdot(put_out(plain), d_TM)
                nothing_TM = put_out(torch.zeros_like(plain))
                for delta, out_N in zip(deltas, outs[1:], strict=True):
                    added_TM = put_out(delta.to(plain)) - nothing_TM
                    out_N[tile.index] = torch.linalg.vecdot(added_TM, d_TM)

        return see


def _is_table(module: nn.Module) -> bool:
    """Whether an adapted module is an embedding."""
    kept: Any = module
    tables = getattr(kept, "lora_embedding_A", {})
    return any(name in tables for name in at_work(module))


def _at(call: Call, view: View, place: slice | None) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call at some of the entries in view."""
    flat = call.entered.ndim == 2

    def taken(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        found = view.take(value, place)
        return found if flat else found[None]

    return [taken(v) for v in call.args], {k: taken(v) for k, v in call.kwargs.items()}
