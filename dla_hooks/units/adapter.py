"""Adapters: each write, split into what the base put out and what each active adapter added.

An adapter on the map that a sublayer ends with (or on the embeddings) writes to the stream itself:
its part is the adapter's own output, for the input that this run gave it. An adapter of values
writes through the attention pattern and the base's last map, and one of what a gate multiplies
through that gate and the base's last map; both are frozen. Adapters elsewhere (on queries, keys,
gates, hidden layers behind a nonlinearity) have no direct part, and what they do is within the
base's. ``disable_adapter`` changes all of it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.backends import Conventions
from dla_hooks.calibration.adapted_writes import endings
from dla_hooks.errors import HookError, UnsupportedModelError
from dla_hooks.modules.adapters import (
    adapted_modules,
    at_work,
    is_copied,
    is_of_parameter,
    state_of_adapters,
)
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.projection.adapted import AdaptedModule
from dla_hooks.projection.kernels import project
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.tiles import View
from dla_hooks.projection.way_out import WayRecorder
from dla_hooks.residual.stream import Stream
from dla_hooks.results.rows import Row, Words
from dla_hooks.units.adapter_inner import InnerSite, inner_sites
from dla_hooks.units.adapter_inner_rows import InnerRecorder
from dla_hooks.units.adapter_site import Site, of_table, of_write
from dla_hooks.units.base import Claim, Recorder, Split, Unit, UnitPlan
from dla_hooks.units.parts import Parts
from dla_hooks.units.parts_plan import EMBED, POSITIONS, PartsPlan

_BASE, _HOOK = "base", "hook"


class Adapters(Unit):
    """``embed``, ``0_attn_out[base]``, ``0_attn_out[NAME]``, ``0_mlp_out``, …: by adapter.

    For models with PEFT adapters: LoRA, rsLoRA, AdaLoRA and DoRA, several at once, on linear maps,
    on embeddings, and on parameters of experts. Writes that no adapter ends keep the labels of the
    components; so do all, where the adapters are merged or switched off. What a copy of a module
    writes (``modules_to_save``) is the adapter's alone.

    A DoRA multiplies what the base puts out by its magnitudes: the base's part is behind these.

    Two kinds of adapters in front of a sublayer's last map have rows of their own, too, called by
    where they are; what they write goes on through the base's own last map:

    - ``0_attn_out[NAME@v_proj]``: of values, with the attention pattern frozen: ``pattern @ (delta
      v)``. Of a map that puts out queries, keys and values together it is the part of values.
    - ``0_mlp_out[NAME@up_proj]``: of what the gate of an MLP multiplies, with the gate frozen:
      ``act(gate) * (delta up)``. Of a map that puts out both it is the part that is multiplied.

    Adapters of queries, keys and gates, and of hidden layers that a nonlinearity follows (MLPs
    without a gate), have no direct part. What they change is within the base's, and the result's
    sentence names them. So is, by name, what cannot be read exactly: values that are normed, or are
    read by attention that transformers' attention functions do not compute; gates that no module
    puts out; maps of single experts. Compare the model with and without the adapters for that.

    Raises:
        UnsupportedModelError: for a model without adapters, and for one whose adapters write to
            the stream without adding a term: IA3, other methods, the adapters of single experts.
    """

    words = Words(
        name="adapter",
        title="Components by adapter",
        sentence="components: each split into what the base wrote and what each adapter added",
    )
    of_every_model = False
    kept_in = "compare(..., other_context=model.disable_adapter) switches an adapter off as a whole"

    def places(self, stream: Stream) -> list[Place]:
        """The embeddings and every write."""
        embeddings = [stream.embedding]
        if stream.positions is not None:
            embeddings.append(stream.positions)
        return [*embeddings, *(write.place for write in stream.writes)]

    def prepare(self, parts: PartsPlan, conventions: Conventions) -> UnitPlan:
        """Find what each adapter ends in.

        Raises:
            UnsupportedModelError: as the class says.
        """
        stream = parts.stream
        adapted = list(adapted_modules(stream.model))
        if not adapted:
            raise UnsupportedModelError(
                f"{stream.backend.name} has no PEFT adapters on its modules, so no write of it has "
                "an adapter's part; attribute components instead (leave out unit=)"
            )
        ended, copies = endings(stream), dict[str, str]()
        for label, found in ended.items():
            for one in filter(lambda one: is_copied(one.module), found):
                copies[label] = at_work(one.module)[0]
        sites = [
            of_write(parts, write, ended[write.label])
            for write in stream.writes
            if ended.get(write.label) and write.label not in copies
        ]
        for label, place in ((EMBED, stream.embedding), (POSITIONS, stream.positions)):
            within = set() if place is None else set(place.module.modules())
            for path, module in adapted:
                if module not in within or not at_work(module):
                    continue
                assert place is not None
                if is_copied(module) and module is place.module:
                    copies[label] = at_work(module)[0]
                else:
                    sites.append(of_table(parts, label, place, path, module))
        modules = {label: [one.module for one in found] for label, found in ended.items()}
        inner = [site for site in inner_sites(parts, modules) if site.label not in copies]
        ours = {_BASE, _HOOK, *(name for site in inner for name in site.names)}
        taken = ours & {name for _, module in adapted for name in at_work(module)}
        if taken:
            raise UnsupportedModelError(
                f"an adapter is called {min(taken)!r}, as one of the rows of this unit is; load it "
                "under another name"
            )
        direct = [one for found in modules.values() for one in found]
        direct += [one.module for site in inner for one in site.modules]
        without = _without_part(stream, direct)
        return _AdaptersPlan(self, parts, sites, copies, inner, without)


def _without_part(stream: Stream, direct: Container[nn.Module]) -> list[str]:
    """The names of the adapted modules that have no part of their own, in their blocks."""
    named: dict[str, list[bool]] = {}
    for block in stream.blocks:
        for path, module in adapted_modules(block.module):
            if not at_work(module) or is_copied(module):
                continue
            if is_of_parameter(module):
                own: Any = module
                path = f"{path.replace('.base_layer', '')}.{own.parameter_name}"
            named.setdefault(path, []).append(module in direct)
    some = {name: any(found) for name, found in named.items() if not all(found)}
    return [f"{name} of some layers" if partly else name for name, partly in some.items()]


class _AdaptersPlan(UnitPlan):
    """All adapters' parts on one model and target."""

    def __init__(
        self,
        unit: Unit,
        parts: PartsPlan,
        sites: list[Site],
        copies: dict[str, str],
        inner: list[InnerSite],
        without: list[str],
    ) -> None:
        super().__init__(unit)
        self._without = without
        self.sites, self.copies, self.inner = sites, copies, inner
        self.dtype = parts.stream.work_dtype
        self._model = parts.stream.model
        self._state = state_of_adapters(self._model)

    @property
    def words(self) -> Words:
        """The unit's, and the names of the adapted modules that have no part of their own."""
        words = self.unit.words
        if not self._without:
            return words
        names = ", ".join(self._without)
        return replace(words, sentence=f"{words.sentence} (no direct part is read of {names})")

    def recorder(self, view: View) -> Recorder:
        """A recorder for one prompt.

        Raises:
            HookError: when adapters were switched or merged since; the plan is then made anew.
        """
        if state_of_adapters(self._model) != self._state:
            raise HookError("adapters were switched on or off, or merged, while the model was read")
        return _AdaptersRecorder(self, view)


class _AdaptersRecorder(Recorder):
    """All adapters' parts in one run."""

    def __init__(self, plan: _AdaptersPlan, view: View) -> None:
        self._plan = plan
        self._sites = [_SiteRecorder(site, len(view), plan.dtype) for site in plan.sites]
        self._inner = [InnerRecorder(site, len(view), plan.dtype) for site in plan.inner]

    def taps(self, view: View) -> list[Tap]:
        """What adapters end in, those in front of last maps, and the norms behind."""
        taps = [tap for site in self._sites for tap in site.taps(view)]
        return taps + [tap for site in self._inner for tap in site.taps(view)]

    def taps_before(self, view: View) -> list[Tap]:
        """Adapters of the values that later pieces read."""
        return [tap for site in self._inner for tap in site.taps_before(view)]

    def finish(self, parts: Parts) -> Split:
        """The components' rows; in place of one that adapters end, its base's and theirs."""
        found: dict[str, dict[str, Tensor]] = {}
        claims, seen = list[Claim](), list[tuple[str, float]]()
        components = dict(zip((row.label for row in parts.rows), parts.values_CN, strict=True))
        for site in self._sites:
            found[site.label], claim = site.finish(parts, components[site.label])
            claims.append(claim)
            seen += site.way.norms()
        found |= {k: {name: components[k]} for k, name in self._plan.copies.items()}
        for inner in self._inner:
            added, more = inner.finish(parts.reading.scale_N, parts.entries)
            own = found.setdefault(inner.label, {_BASE: components[inner.label]})
            own[_BASE] = own[_BASE] - torch.stack([*added.values()]).sum(0)
            own |= added
            claims += more
            seen += inner.way.norms()
        rows, values = list[Row](), list[Tensor]()
        for row in parts.rows:
            split = found.get(row.label)
            if split is None:
                rows.append(row)
                values.append(components[row.label])
                continue
            rows += [replace(row, label=f"{row.label}[{name}]") for name in split]
            values += split.values()
        return Split(rows, torch.stack(values), claims, seen)


class _SiteRecorder:
    """One part of the stream that adapters end in, in one run."""

    def __init__(self, site: Site, n_entries: int, dtype: torch.dtype) -> None:
        self._site, self.label = site, site.label
        self.way = WayRecorder(site.way, n_entries, dtype)
        # For each module its terms and its whole output.
        sizes = [len(module.names) + 1 for module in site.modules]
        *self._first, n_rows = accumulate(sizes, initial=0)
        self._rows = FixedRows(n_rows, n_entries, dtype)

    def taps(self, view: View) -> list[Tap]:
        site, rows, taps = self._site, self._rows, self.way.taps(view)
        for module, first in zip(site.modules, self._first, strict=True):
            last = first + len(module.names)
            taps += module.taps(view, [partial(rows.row, n) for n in range(first, last)])
            if not site.whole:
                taps.append(self._see_output(module, last, view))
        return taps

    def finish(self, parts: Parts, whole_N: Tensor) -> tuple[dict[str, Tensor], Claim]:
        """The parts by name, and the claim that they sum to the whole."""
        site, final_N = self._site, parts.reading.scale_N
        way = self.way.finish(final_N, parts.entries)
        values_CN = self._rows.gathered(final_N.device)
        found, outputs_N = {_BASE: torch.zeros_like(final_N)}, torch.zeros_like(final_N)
        for module, first in zip(site.modules, self._first, strict=True):
            constant_K = module.constant()
            if constant_K is not None:
                values_CN[first] += parts.entries.of_target(constant_K.to(final_N.device))
            outputs_N += values_CN[first + len(module.names)] / way.scale_N
            for number, name in enumerate(module.names, start=first):
                key, value_N = name or _BASE, values_CN[number] / way.scale_N
                found[key] = found[key] + value_N if key in found else value_N
        if site.whole:
            if way.beta_N is not None:
                found[_BASE] = found[_BASE] + way.beta_N
            if way.hooks_N is not None:
                found[_HOOK] = way.hooks_N
            name = f"the parts of {site.label} (of its base and its adapters)"
            sum_N = torch.stack([*found.values()]).sum(0)
            return found, Claim([name], sum_N[None], whole_N[None], site.way.norm is not None)
        added_N = torch.stack([*found.values()]).sum(0)
        paths = " and ".join(module.path for module in site.modules)
        claim = Claim([f"the terms of {paths}"], added_N[None], outputs_N[None])
        # What the sublayer writes besides these modules is the base's.
        found[_BASE] = found[_BASE] + whole_N - outputs_N
        if way.hooks_N is not None:
            found[_BASE] = found[_BASE] - way.hooks_N
            found[_HOOK] = way.hooks_N
        return found, claim

    def _see_output(self, module: AdaptedModule, row: int, view: View) -> Tap:
        def see(call: Call) -> None:
            x = call.activation
            project(x, view, self._site.way.at_output, self._rows.row(row, x.device))

        return Tap(module.place, see)
