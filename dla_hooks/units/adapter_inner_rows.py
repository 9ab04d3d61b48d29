"""What adapters in front of a sublayer's last map wrote in one run; see ``adapter_inner``.

Of each position that may be read no more than an adapter's few channels a are kept, and only until
the sublayer's last map runs (where a prompt runs in pieces, until the last of them).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import HookError, UnsupportedModelError
from dla_hooks.inputs.entries import Entries
from dla_hooks.modules.attention_interface import AttentionCall, AttentionTap
from dla_hooks.modules.hooks import Call, Tap
from dla_hooks.projection.attention_reads import read_sums
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.kernels import project
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.tiles import View
from dla_hooks.projection.way_out import WayRecorder
from dla_hooks.units.adapter_inner import InnerModule, InnerSite
from dla_hooks.units.base import Claim

_TILE_ELEMENTS = 2**20
"""Numbers of a module's input that are in memory in another dtype."""


@dataclass
class _Seen:
    """What is kept of one module until the last map runs.

    Attributes:
        few: of each adapter its few channels a: at every position so far [batch, pos, R] for
            values, else at the entries in view [n, R].
        output: what the module put out, where a gate multiplies it.
        gate: that gate.
    """

    few: list[list[Tensor]]
    output: Tensor | None = None
    gate: Tensor | None = None


class InnerRecorder:
    """The adapters in front of one sublayer's last map, in one run."""

    def __init__(self, site: InnerSite, n_entries: int, dtype: torch.dtype) -> None:
        self._site, self._dtype, self.label = site, dtype, site.label
        self.way = WayRecorder(site.way, n_entries, dtype)
        # What the last map reads; the same by what makes it; each adapter's part.
        self._rows = FixedRows(2 + len(site.names), n_entries, dtype)
        # For each module, as if all of it were read with weight one: its terms, its whole output,
        # each adapter's term by its matrices, and of values what leaves the module and arrives.
        sizes = [2 * len(module.names) + 4 for module in site.modules]
        self._first = [sum(sizes[:number]) for number in range(len(sizes))]
        self._checks = FixedRows(sum(sizes), n_entries, dtype)
        self._seen = [_Seen([[] for _ in module.names]) for module in site.modules]
        self._call: AttentionCall | None = None

    def taps_before(self, view: View) -> list[Tap]:
        """What is watched in a piece without entries, whose tokens those of later pieces read."""
        if self._site.attention is None:
            return []
        modules = enumerate(self._site.modules)
        return [Tap(one.place.entered, partial(self._see_input, n, view)) for n, one in modules]

    def taps(self, view: View) -> list[Tap]:
        """The adapted modules, what multiplies their output, and the last map."""
        site, taps = self._site, self.way.taps(view)
        for number, module in enumerate(site.modules):
            taps.append(Tap(module.place.entered, partial(self._see_input, number, view)))
            first, n = self._first[number], len(module.names)
            rows = [partial(self._checks.row, row) for row in range(first, first + n + 1)]
            taps += module.adapted.taps(view, rows)
            taps.append(Tap(module.adapted.place, partial(self._check_output, number, view, True)))
            if module.gate is not None:
                taps.append(Tap(module.gate, partial(self._see_gate, number)))
                taps.append(Tap(module.place, partial(self._see_output, number)))
            else:
                taps.append(Tap(module.place, partial(self._check_output, number, view, False)))
        see: Any = self._see_hidden
        if site.attention is not None:
            taps.append(AttentionTap(site.attention[0], self._see_call))
            see = self._see_z
        return [*taps, Tap(site.last.ahead, partial(see, view))]

    def finish(self, final_N: Tensor, entries: Entries) -> tuple[dict[str, Tensor], list[Claim]]:
        """Each adapter's part by its name, and what must hold if these are right."""
        site, device = self._site, final_N.device
        scale_N = self.way.finish(final_N, entries).scale_N
        whole_N, made_N, *parts = self._rows.gathered(device) / scale_N
        checks_CN = self._checks.gathered(device)
        found: dict[str, Tensor] = {}
        for name, part_N in zip(site.names, parts, strict=True):
            found[name] = found[name] + part_N if name in found else part_N
        # Models compute attention's weights in float32, also those in float64.
        what = f"what enters {site.last.name}, by what makes it,"
        claims = [Claim([what], made_N[None], whole_N[None], through_norm=True)]
        for first, module in zip(self._first, site.modules, strict=True):
            constant_K = module.adapted.constant()
            if constant_K is not None:
                checks_CN[first] += entries.of_target(constant_K.to(device))
            n = len(module.names)
            own_CN = checks_CN[first : first + 2 * n + 4] / scale_N
            written_CN = torch.stack([found[name] for name in module.names])
            claims += self._claims(module, own_CN, written_CN)
        return found, claims

    def _claims(self, module: InnerModule, own_CN: Tensor, written_CN: Tensor) -> list[Claim]:
        """That a module's terms are what it puts out, and that this is what is read."""
        n, normed, path = len(module.names), self._site.way.norm is not None, module.place.name
        # Nothing is read with weight one: an error counts as it does in what is written.
        if own_CN.numel():
            own_CN = own_CN * _ratio(written_CN, own_CN[n + 2 : 2 * n + 2])
        terms_CN, whole_N, by_matrices_CN, left_N, read_N = own_CN.split([n + 1, 1, n, 1, 1])
        names = [f"the adapter {name!r} of {path}" for name in module.adapters]
        return [
            Claim([f"the terms of {path}"], terms_CN.sum(0)[None], whole_N, normed),
            Claim(names, by_matrices_CN, terms_CN[1:], normed),
            Claim([f"the values that {path} makes"], left_N, read_N, normed),
        ]

    def _see_input(self, number: int, view: View, call: Call) -> None:
        module, x = self._site.modules[number], call.entered
        of_values = self._site.attention is not None
        given = x if of_values else view.take(x)
        device, n, targets = x.device, len(module.names), module.at_output
        for place, name in enumerate(module.adapters):
            A, B = module.matrices(name, torch.empty(0, dtype=self._dtype, device=device))
            few = _few(given, A, B)
            if of_values:
                few = few.view(view.entries.prompt_shape[0], -1, few.shape[-1])
            self._seen[number].few[place].append(few)
            if len(view):
                out_N = self._checks.row(self._first[number] + n + 2 + place, device)
                at_entries = few if not of_values else view.take(few)
                _project_few(at_entries, B, view, targets, out_N)

    def _check_output(self, number: int, view: View, ahead: bool, call: Call) -> None:
        """Project a module's output, ahead of hooks or behind them."""
        module, x = self._site.modules[number], call.left
        n = len(module.names)
        row = self._first[number] + (n + 1 if ahead else 2 * n + 2)
        project(x, view, module.at_output, self._checks.row(row, x.device))

    def _see_output(self, number: int, call: Call) -> None:
        self._seen[number].output = call.left  # the MLP holds it itself until it is multiplied

    def _see_gate(self, number: int, call: Call) -> None:
        self._seen[number].gate = call.left

    def _see_call(self, call: AttentionCall) -> None:
        self._call = call  # the attention module holds all of this until its last map has run

    def _see_z(self, view: View, seen: Call) -> None:
        site, call, z = self._site, self._call, seen.entered
        assert site.attention is not None
        if call is None:
            raise _not_seen(site.attention[0].name)
        self._call = None
        z = z if z.shape[-1] == site.width else z.flatten(-2)
        rows = self._rows.on(z.device)
        project(z, view, site.folded, rows[0])
        n_sources, parts = call.key.shape[2], list[tuple[Tensor, Tensor]]()
        v_BSC = call.value[:, :, -call.query.shape[2] :].transpose(1, 2).flatten(2)
        for first, module, kept in zip(self._first, site.modules, self._seen, strict=True):
            read_N = self._checks.row(first + 2 * len(module.names) + 3, z.device)
            project(v_BSC, view, module.at_read, read_N)
            for name, few in zip(module.adapters, kept.few, strict=True):
                a_BSR = (few[0] if len(few) == 1 else torch.cat(few, 1))[:, -n_sources:]
                if a_BSR.shape[1] != n_sources:
                    raise UnsupportedModelError(
                        f"{module.place.name} ran on {a_BSR.shape[1]} positions, and the heads "
                        f"behind it read {n_sources}, so that what its adapter wrote cannot be "
                        "told; attribute components instead (leave out unit=)"
                    )
                _, B = module.matrices(name, a_BSR)
                channels = module.channels(B.device)
                parts.append((a_BSR, B[channels].unflatten(0, (module.n_shared, -1))))
        form = site.attention[1]
        given = z if form.scaled else None
        read_sums(call, view, site.folded, form.dtype, given, parts, rows[1:])
        if view.columns.stop == view.entries.prompt_shape[1]:
            self._forget()

    def _see_hidden(self, view: View, call: Call) -> None:
        site, h = self._site, call.entered
        rows_CN = self._rows.on(h.device)
        project(h, view, site.folded, rows_CN[0])
        row = 2
        for module, kept in zip(site.modules, self._seen, strict=True):
            output, gate = kept.output, kept.gate
            if output is None or gate is None:
                raise _not_seen(module.inner.gate or module.place.name)
            channels = module.channels(h.device)
            for tile in view.tiles(output.shape[-1], h.device):
                u_TI = tile.spread(site.folded.at(tile, h.device))
                u_TI = u_TI * view.take(gate, tile.place).to(self._dtype)
                up_TI = view.take(output, tile.place)[:, channels].to(self._dtype)
                if module is site.modules[0]:
                    rows_CN[1, tile.index] = (u_TI * up_TI).sum(-1)
                for place, name in enumerate(module.adapters):
                    (few,) = kept.few[place]
                    a_TR = few if tile.place is None else few[tile.place]
                    _, B = module.matrices(name, a_TR)
                    rows_CN[row + place, tile.index] = ((u_TI @ B[channels]) * a_TR).sum(-1)
            row += len(module.names)
        self._forget()

    def _forget(self) -> None:
        self._seen = [_Seen([[] for _ in module.names]) for module in self._site.modules]


def _ratio(written_CN: Tensor, read_CN: Tensor) -> Tensor:
    """How much smaller what is written is, at its largest; one where it is larger."""
    return (written_CN.abs().amax() / read_CN.abs().amax().clamp(min=1e-30)).clamp(max=1)


def _not_seen(name: str) -> HookError:
    return HookError(
        f"{name} was not seen before the last map behind it, so what the adapters in front of that "
        "wrote cannot be told. A fused, compiled or skipped module does this; run the plain eager "
        "model, or attribute components (leave out unit=)"
    )


def _few(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The few channels a of an adapter [..., R], in the dtype of its matrices."""
    flat_x = x.reshape(-1, x.shape[-1])
    rows = max(1, _TILE_ELEMENTS // x.shape[-1])
    a = torch.cat([some.to(A.dtype) @ A.T for some in flat_x.split(rows)])
    if B.shape[1] > A.shape[0]:  # its bias
        a = torch.cat((a, a.new_ones(len(a), 1)), 1)
    return a


def _project_few(few: Tensor, B: Tensor, view: View, at: Directions, out_N: Tensor) -> None:
    for tile in view.tiles(B.shape[0], few.device):
        w_KR = at.at(tile, few.device) @ B
        a_TR = few if tile.place is None else few[tile.place]
        out_N[tile.index] = (a_TR * tile.spread(w_KR)).sum(-1)
