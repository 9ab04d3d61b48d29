"""Adapters: each write, split into what the base put out and what each active adapter added.

An adapter on the map that a sublayer ends with (or on the embeddings) writes to the stream itself:
its part is the adapter's own output, for the input that this run gave it. Adapters elsewhere (on
queries, keys, values, gates, hidden layers) change what the base's map reads; they have no direct
part, and what they do is within the base's. ``disable_adapter`` changes both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from dla_hooks.backends import Conventions
from dla_hooks.calibration.adapted_writes import Ending, endings
from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules import norms
from dla_hooks.modules.adapters import adapted_modules, at_work, check_added, is_copied
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.user_hooks import is_hooked
from dla_hooks.projection.adapted import AdaptedModule
from dla_hooks.projection.directions import Directions
from dla_hooks.projection.hook_writes import HookWrites
from dla_hooks.projection.kernels import frozen_scales, project
from dla_hooks.projection.ledger import FixedRows
from dla_hooks.projection.tiles import View
from dla_hooks.residual.stream import Stream, WriteSite
from dla_hooks.results.rows import Row, Words
from dla_hooks.units.base import Claim, Recorder, Split, Unit, UnitPlan
from dla_hooks.units.parts import EMBED, POSITIONS, Parts, PartsPlan

_BASE, _HOOK = "base", "hook"
_INSTEAD = "Attribute components instead (leave out unit=)"


class Adapters(Unit):
    """``embed``, ``0_attn_out[base]``, ``0_attn_out[NAME]``, ``0_mlp_out``, …: by adapter.

    For models with PEFT adapters: LoRA, rsLoRA and DoRA, several at once, on linear maps, on
    embeddings, and on parameters of experts. Writes that no adapter ends keep the labels of the
    components; so do all, where the adapters are merged or switched off. What a copy of a module
    writes (``modules_to_save``) is the adapter's alone.

    A DoRA multiplies what the base puts out by its magnitudes: the base's part is behind these.

    Adapters of queries, keys, values, gates and hidden layers have no part of their own: what they
    change is within the base's. Compare the model with and without them for that.

    Raises:
        UnsupportedModelError: for a model without adapters, and for one whose adapters write to
            the stream without adding a term: IA3, other methods, the adapters of single experts.
    """

    words = Words(
        name="adapter",
        title="Components by adapter",
        sentence="components: each split into what the base wrote and what each adapter added",
    )

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
                f"{stream.backend.name} has no PEFT adapters, so no write of it has an adapter's "
                "part; attribute components instead (leave out unit=)"
            )
        taken = {_BASE, _HOOK} & {name for _, module in adapted for name in at_work(module)}
        if taken:
            raise UnsupportedModelError(
                f"an adapter is called {min(taken)!r}, as one of the rows of this unit is; load it "
                "under another name"
            )
        ended, copies = endings(stream), dict[str, str]()
        for label, found in ended.items():
            for one in filter(lambda one: is_copied(one.module), found):
                copies[label] = at_work(one.module)[0]
        sites = [
            _of_write(parts, write, ended[write.label])
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
                    sites.append(_of_table(parts, label, place, path, module))
        return _AdaptersPlan(self, parts, sites, copies)


@dataclass(frozen=True)
class _Site:
    """A part of the stream that adapters end in.

    Attributes:
        label: the part's.
        modules: what adapters end in there.
        whole: whether there is nothing else; there is one module then.
        at_output: what the modules' output is projected on.
        in_stream: what the post-norm's output is projected on.
        post_norm: the place of that norm, or None.
        way: the places that hooks of the caller's may write at, up to the stream.
    """

    label: str
    modules: list[AdaptedModule]
    whole: bool
    at_output: Directions
    in_stream: Directions
    post_norm: Place | None
    norm: norms.Norm | None
    way: list[tuple[Place, Directions]]


def _of_write(parts: PartsPlan, write: WriteSite, found: list[Ending]) -> _Site:
    in_stream = at_output = parts.directions(write.label)
    module = Place(write.module, write.name, write.use)
    norm, post_norm = None, None
    if write.post_norm is not None:
        post_norm = write.place
        norm = norm_at(parts.stream, post_norm)
        at_output = in_stream.then(norm.pull_back)
    modules = [AdaptedModule(one.module, one.path, write.use, at_output) for one in found]
    way = [(one.place._replace(first=False), at_output) for one in modules]
    if all(place.module is not write.module for place, _ in way):
        way.append((module, at_output))
    if post_norm is not None:
        way.append((post_norm, in_stream))
    whole = any(one.whole for one in found)
    if whole and len(found) > 1:
        paths = ", ".join(one.path for one in found)
        raise UnsupportedModelError(
            f"{write.label} ends in several adapted modules, one within the other: {paths}. "
            "Attribute components instead (leave out unit=)"
        )
    return _Site(write.label, modules, whole, at_output, in_stream, post_norm, norm, way)


def _of_table(parts: PartsPlan, label: str, place: Place, path: str, module: nn.Module) -> _Site:
    if is_copied(module):
        raise UnsupportedModelError(f"{path} is a copied part of the embeddings. {_INSTEAD}")
    check_added(module, path)
    directions = parts.of_embeddings() if label == EMBED else parts.directions(label)
    if directions is None or module is not place.module:
        raise UnsupportedModelError(
            f"{path} is adapted, and more than a factor stands between it and the stream, so that "
            f"its adapter has no part of its own there. {_INSTEAD}"
        )
    one = AdaptedModule(module, path, place.use, directions)
    way = [] if label == EMBED else [(place, directions)]
    return _Site(label, [one], True, directions, directions, None, None, way)


class _AdaptersPlan(UnitPlan):
    """All adapters' parts on one model and target."""

    def __init__(
        self, unit: Unit, parts: PartsPlan, sites: list[_Site], copies: dict[str, str]
    ) -> None:
        super().__init__(unit)
        self.sites, self.copies, self.dtype = sites, copies, parts.stream.work_dtype

    def recorder(self, view: View) -> Recorder:
        return _AdaptersRecorder(self, view)


class _AdaptersRecorder(Recorder):
    """All adapters' parts in one run."""

    def __init__(self, plan: _AdaptersPlan, view: View) -> None:
        self._plan = plan
        self._sites = [_SiteRecorder(site, len(view), plan.dtype) for site in plan.sites]

    def taps(self, view: View) -> list[Tap]:
        """What adapters end in, and the norms behind."""
        return [tap for site in self._sites for tap in site.taps(view)]

    def finish(self, parts: Parts) -> Split:
        """The components' rows; in place of one that adapters end, its base's and theirs."""
        found: dict[str, dict[str, Tensor]] = {}
        claims, seen = list[Claim](), list[tuple[str, float]]()
        components = dict(zip((row.label for row in parts.rows), parts.values_CN, strict=True))
        for site in self._sites:
            label = site.site.label
            found[label], claim = site.finish(parts, components[label])
            claims.append(claim)
            if site.site.post_norm is not None:
                seen.append((site.site.post_norm.name, norms.largest(site.misfits)))
        found |= {k: {name: components[k]} for k, name in self._plan.copies.items()}
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

    def __init__(self, site: _Site, n_entries: int, dtype: torch.dtype) -> None:
        self.site, self.misfits = site, list[Tensor]()
        self._first = [0]
        for module in site.modules:
            self._first.append(self._first[-1] + len(module.names) + 1)
        # For each module its terms and its whole output, and at last the post-norm's scale.
        self._rows = FixedRows(self._first[-1] + 1, n_entries, dtype)
        hooked = [(place, d) for place, d in site.way if is_hooked(place)]
        self._hooks = HookWrites(hooked, n_entries, dtype) if hooked else None

    def taps(self, view: View) -> list[Tap]:
        site, rows = self.site, self._rows
        taps = [] if self._hooks is None else self._hooks.taps(view)
        for module, first in zip(site.modules, self._first, strict=False):
            last = first + len(module.names)
            taps += module.taps(view, [partial(rows.row, n) for n in range(first, last)])
            if not site.whole:
                taps.append(self._see_output(module, last, view))
        place, norm = site.post_norm, site.norm
        if place is None or norm is None:
            return taps

        def see_post_norm(call: Call) -> None:
            x, y = call.entered, call.left
            self.misfits += frozen_scales(norm, x, y, view, rows.row(-1, x.device))

        return [*taps, Tap(place.ahead, see_post_norm)]

    def finish(self, parts: Parts, whole_N: Tensor) -> tuple[dict[str, Tensor], Claim]:
        """The parts by name, and the claim that they sum to the whole."""
        site, of_target = self.site, parts.entries.of_target
        values_CN = self._rows.gathered(parts.reading.scale_N.device)
        scale_N = parts.reading.scale_N
        at_output_N = scale_N * values_CN[-1] if site.post_norm is not None else scale_N
        found, outputs_N = {_BASE: torch.zeros_like(scale_N)}, torch.zeros_like(scale_N)
        for module, first in zip(site.modules, self._first, strict=False):
            constant_K = module.constant()
            if constant_K is not None:
                values_CN[first] += of_target(constant_K.to(scale_N.device))
            outputs_N += values_CN[first + len(module.names)] / at_output_N
            for number, name in enumerate(module.names, start=first):
                key, value_N = name or _BASE, values_CN[number] / at_output_N
                found[key] = found[key] + value_N if key in found else value_N
        hooks_N = self._written(at_output_N, scale_N)
        if hooks_N is not None:
            found[_HOOK] = hooks_N
        if site.whole:
            if site.norm is not None and bool(site.norm.beta.any()):
                beta_K = site.in_stream.of_constant(site.norm.beta)
                found[_BASE] += of_target(beta_K.to(scale_N.device)) / scale_N
            name = f"the parts of {site.label} (of its base and its adapters)"
            claim = Claim(
                [name],
                torch.stack([*found.values()]).sum(0)[None],
                whole_N[None],
                site.norm is not None,
            )
            return found, claim
        added_N = torch.stack([value_N for key, value_N in found.items() if key != _HOOK]).sum(0)
        paths = " and ".join(module.path for module in site.modules)
        claim = Claim([f"the terms of {paths}"], added_N[None], outputs_N[None])
        # What the sublayer writes besides these modules is the base's.
        rest_N = whole_N - outputs_N
        found[_BASE] = found[_BASE] + (rest_N if hooks_N is None else rest_N - hooks_N)
        return found, claim

    def _see_output(self, module: AdaptedModule, row: int, view: View) -> Tap:
        def see(call: Call) -> None:
            x = call.activation
            project(x, view, self.site.at_output, self._rows.row(row, x.device))

        return Tap(module.place, see)

    def _written(self, at_output_N: Tensor, scale_N: Tensor) -> Tensor | None:
        """What the caller's hooks wrote between the modules and the stream."""
        if self._hooks is None:
            return None
        pairs = zip(self._hooks.places, self._hooks.finish(scale_N.device), strict=True)
        behind = self.site.post_norm
        each = [w_N / (scale_N if place == behind else at_output_N) for (place, _), w_N in pairs]
        return torch.stack(each).sum(0)
