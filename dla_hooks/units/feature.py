"""Features: what each feature of sparse dictionaries wrote, beside what they leave unexplained.

A dictionary makes of an activation x = f @ W_dec + b_dec + error. A feature's write f_i W_dec[i] is
never built: the direction is folded through W_dec first (and, at z, through the output projection
and the post-norm, with that norm's scale frozen). The feature activations are frozen, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dla_hooks.backends import Conventions
from dla_hooks.calibration.head_widths import with_head_widths
from dla_hooks.calibration.named_places import NamedPlace, feature_rows, named_places
from dla_hooks.calibration.norm_constants import norm_at
from dla_hooks.errors import InputError
from dla_hooks.inputs.options import whole_number
from dla_hooks.modules.dictionaries import Dictionary, Spot
from dla_hooks.modules.dictionary_files import read_dictionary
from dla_hooks.modules.hooks import Call, Place, Tap
from dla_hooks.modules.linear import bias_of, pull_back
from dla_hooks.modules.weights import run_device
from dla_hooks.projection.features import BEYOND, ProjectedDictionary, strongest_of
from dla_hooks.projection.ledger import Top, TopRows
from dla_hooks.projection.tiles import View
from dla_hooks.projection.way_out import OnTheWay, WayOut, WayRecorder
from dla_hooks.residual.hooked import Hooked
from dla_hooks.residual.stream import Stream
from dla_hooks.results.rows import Words
from dla_hooks.units.base import Claim, RankedSplit, Recorder, Unit, UnitPlan
from dla_hooks.units.parts import Parts
from dla_hooks.units.parts_plan import PartsPlan


class Features(Unit):
    """``L3F123``, …, ``3_mlp_out[b_dec]``, ``3_mlp_out[error]``: features of sparse dictionaries.

    A place is what a sublayer writes (``3_mlp_out``, behind its post-norm), what its heads put out
    (``3_z``, side by side), or the stream (``3_pre``, ``3_mid``, ``final_post``), whose rows are
    the parts that features have of the stream there. All that is at no place is the remainder.

    Args:
        dictionaries: by place. Each is an object with ``encode(x)`` [n, width] -> [n, features]
            and ``decode(f)``, which must be affine; or the path of a folder, as SAELens writes
            them: ``cfg.json``, and safetensors with ``W_enc``, ``W_dec``, ``b_enc``, ``b_dec``.
        top: how many rows to keep at each position; None keeps all.
        centred: whether the dictionaries of streams and writes were trained on those of
            TransformerLens, which take each vector's mean off it. Then they are given that, and
            the mean, which a LayerNorm does not read, counts in the error. One whose ``cfg`` says
            ``center_writing_weights`` needs no word of it.

    A feature's activation stands beside it (``activation``; that of b_dec and error is 1). Features
    with none have no row at that position. Where two dictionaries stand in one layer, their rows
    are ``L3F123@z`` and ``L3F123@mlp_out``.

    Raises:
        InputError: for a place that is not there, twice in one sum, or of another width than its
            dictionary; for what is no such dictionary (a transcoder reads elsewhere).

    >>> import torch
    >>> import dla_hooks
    >>> class Random:
    ...     def __init__(self, width, n):
    ...         generator = torch.Generator().manual_seed(0)
    ...         self.W = torch.randn(n, width, generator=generator) / width ** 0.5
    ...     def encode(self, x):
    ...         return (x @ self.W.T).relu()
    ...     def decode(self, f):
    ...         return f @ self.W
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> unit = dla_hooks.Features({"1_mlp_out": Random(model.config.hidden_size, 200)}, top=5)
    >>> result = dla_hooks.direct_logit_attribution(
    ...     model, "The keys near the cabinet", " are", unit=unit, tokenizer=tokenizer)
    >>> result.rows[7].label, result.rows[201].label
    ('L1F7', '1_mlp_out[error]')
    """

    words = Words(
        name="feature",
        title="Features",
        sentence="features: what each feature of the dictionaries wrote",
        index="feature",
        remainder="remainder",
        remainder_is="what stands at none of the dictionaries' places",
        beside=("activation",),
    )
    by_column = True
    of_every_model = False
    taken_out = ("feature",)

    def __init__(
        self,
        dictionaries: Mapping[str, Any] | None = None,
        top: int | None = 64,
        centred: bool = False,
    ) -> None:
        if dictionaries is not None and not isinstance(dictionaries, Mapping):
            raise InputError(
                f"dictionaries must be a mapping from places to dictionaries, such as "
                f'{{"3_mlp_out": dictionary}}, got {dictionaries!r:.60}'
            )
        if not isinstance(centred, bool):
            raise InputError(f"centred must be True or False, got {centred!r:.60}")
        self.dictionaries = dict(dictionaries or {})
        self.top = None if top is None else whole_number(top, "top", least=1)
        self.centred = centred

    def places(self, stream: Stream) -> list[Place]:
        """Every write, the heads' outputs that are asked for, and the last stream."""
        named = (write for write in stream.writes if f"{write.layer}_z" in self.dictionaries)
        sites = [write.heads for write in named if write.heads is not None]
        z = [place for one in sites for place in (one.place, one.post_norm_place)]
        found = [stream.start, *(write.place for write in stream.writes), *z, stream.last]
        return [place for place in found if place is not None]

    def dictionary_places(self) -> tuple[str, ...]:
        """The places of the dictionaries."""
        return tuple(self.dictionaries)

    def prepare(self, parts: PartsPlan, conventions: Conventions) -> UnitPlan:
        """Read the dictionaries, and fold the directions through their decoders."""
        return _FeaturesPlan(self, parts, self.read(parts.stream))

    def at_place(self, label: str) -> Features:
        """All features of one place."""
        return Features({label: self.dictionaries[label]}, top=None, centred=self.centred)

    def read(self, stream: Stream) -> list[tuple[NamedPlace, Dictionary]]:
        """Read the dictionaries, each with its place, in the order of the stream.

        Raises:
            InputError: as the class says.
            UnsupportedModelError: for heads, or a mid stream, that the model does not show.
        """
        if not self.dictionaries:
            raise InputError(
                "features need dictionaries: unit=dla_hooks.Features({place: dictionary}), with "
                "an object that encodes and decodes, or a folder, for places such as "
                f"{stream.writes[-1].label!r}"
            )
        if any(str(label).endswith("_z") for label in self.dictionaries):
            stream = with_head_widths(stream)
        found = named_places(stream, self.dictionaries)
        return [(one, self._read(stream, one)) for one in found]

    def _read(self, stream: Stream, at: NamedPlace) -> Dictionary:
        n_heads = None if at.heads is None else at.heads.n_heads
        device, n = run_device(at.place.module), len(stream.whole.blocks)
        spot = Spot(at.label, at.width, n_heads, stream.work_dtype, device, n)
        found = read_dictionary(self.dictionaries[at.label], spot)
        centres = norm_at(stream, stream.final_norm).centred
        # TransformerLens leaves other models as they are, also where it is told to centre them.
        found.centred = at.heads is None and (self.centred or (centres and found.settings.centred))
        if found.centred and not centres:
            raise InputError(
                f"the dictionary at {at.label} reads centred streams, and TransformerLens "
                f"centres those of models with LayerNorms only; {stream.final_norm.name} "
                "subtracts no mean, so that the mean could not be left to the error"
            )
        return found


def _way(parts: PartsPlan, at: NamedPlace) -> WayOut:
    """From a place to the stream."""
    stream, write, site = parts.stream, at.write, at.heads
    if write is None:
        block = None if at.layer is None else stream.blocks[at.block]
        # A mid stream is one of a block without a gain: nothing tells it from the block's end.
        hooked = Hooked(at.block, block, at.name == "pre", at.place)
        return WayOut(parts.of_hooks(hooked), [])
    if site is None:
        return WayOut(parts.directions(write.label), [])
    modules = [Place(write.module, write.name, write.use)]
    if site.linear is site.proj:
        modules.insert(0, site.place)
    post_norm = site.post_norm_place
    norm = None if post_norm is None else norm_at(stream, post_norm)
    return WayOut(parts.directions(write.label), modules, post_norm, norm)


class _Layer:
    """One dictionary at its place.

    Args:
        parts: the parts of the stream.
        at: the place.
        dictionary: what stands there.
        first: the number of its first row.
    """

    def __init__(
        self, parts: PartsPlan, at: NamedPlace, dictionary: Dictionary, first: int
    ) -> None:
        self.at, self.first = at, first
        self.way, self._bias_M = _way(parts, at), None
        directions = self.way.at_output
        if at.heads is not None:
            linear = at.heads.linear
            directions = directions.then(lambda d_KM: pull_back(linear, d_KM))
            self._bias_M = bias_of(linear)
        self.rows = ProjectedDictionary(dictionary, directions)
        # A dictionary in float32 rounds as a norm does, also in a float64 model.
        self._coarse = self.way.norm is not None or dictionary.dtype != torch.float64

    def is_seen(self, parts: Parts) -> bool:
        """Whether what the rows must sum to was measured; a stored cache may lack it."""
        write = self.at.write
        return parts.complete if write is None else write.label not in parts.missing

    def claim(self, parts: Parts, sum_N: Tensor, beside: OnTheWay) -> Claim:
        """The rows, with all that stands between them and the stream, make up their place."""
        at = self.at
        if self._bias_M is not None:
            bias_K = self.way.at_output.of_constant(self._bias_M)
            sum_N = sum_N + parts.entries.of_target(bias_K.to(sum_N.device)) / beside.scale_N
        for more_N in (beside.beta_N, beside.hooks_N):
            sum_N = sum_N if more_N is None else sum_N + more_N
        if at.write is not None:
            whole_N = parts.of([at.write.label])[0]
        else:
            whole_N = parts.steps_SN.cumsum(0)[self._step(parts)]
        what = f"the features, b_dec and error at {at.label}"
        return Claim([what], sum_N[None], whole_N[None], self._coarse, at.of_stream)

    def _step(self, parts: Parts) -> int:
        """The last of the stream's steps that stands at a place of the stream."""
        steps = parts.places[self.at.block]
        return steps[-1 if self.at.layer is None else self.at.n_before]


class _FeaturesPlan(UnitPlan):
    """All dictionaries on one model and target."""

    def __init__(
        self, unit: Features, parts: PartsPlan, read: list[tuple[NamedPlace, Dictionary]]
    ) -> None:
        super().__init__(unit)
        self.top, self.dtype = unit.top, parts.stream.work_dtype
        self.layers, first = list[_Layer](), 0
        self.rows = feature_rows([(at, one.n_features) for at, one in read])
        for at, dictionary in read:
            self.layers.append(_Layer(parts, at, dictionary, first))
            first += dictionary.n_features + BEYOND

    def recorder(self, view: View) -> Recorder:
        return _FeaturesRecorder(self, view)


class _FeaturesRecorder(Recorder):
    """All dictionaries in one run."""

    def __init__(self, plan: _FeaturesPlan, view: View) -> None:
        self._plan, n, dtype = plan, len(view), plan.dtype
        self._rows = [
            TopRows(plan.top, layer.rows.n_rows, n, dtype, n_beside=1) for layer in plan.layers
        ]
        self._ways = [WayRecorder(layer.way, n, dtype) for layer in plan.layers]

    def taps(self, view: View) -> list[Tap]:
        """Every place, and what stands between the heads and the stream."""
        found = []
        for layer, rows, way in zip(self._plan.layers, self._rows, self._ways, strict=True):
            found += [self._tap(layer, rows, view), *way.taps(view)]
        return found

    def _tap(self, layer: _Layer, rows: TopRows, view: View) -> Tap:
        def see(call: Call) -> None:
            layer.rows.see(layer.at.read(call), view, rows)

        return Tap(layer.at.place, see)

    def finish(self, parts: Parts) -> RankedSplit:
        """The strongest rows of all dictionaries, and the claim that each makes up its place."""
        reading, tops, claims = parts.reading, list[Top](), list[Claim]()
        sum_N = torch.zeros_like(reading.scale_N)
        for layer, rows, way in zip(self._plan.layers, self._rows, self._ways, strict=True):
            beside = way.finish(reading.scale_N, parts.entries)
            top = rows.gathered(beside.scale_N, parts.entries)
            tops.append(top)
            sum_N += top.sum_N
            if layer.is_seen(parts):
                claims.append(layer.claim(parts, top.sum_N, beside))
        firsts = [layer.first for layer in self._plan.layers]
        values_KN, index_KN, activation_KN = strongest_of(tops, firsts, self._plan.top)
        sums = [top.row_sums_RB for top in tops if top.row_sums_RB is not None]
        return RankedSplit(
            self._plan.rows,
            values_KN,
            index_KN,
            sum_N - values_KN.sum(0),
            reading.whole_N - sum_N,
            torch.cat(sums) if len(sums) == len(tops) else None,
            claims,
            [norm for way in self._ways for norm in way.norms()],
            {"activation": activation_KN},
        )
