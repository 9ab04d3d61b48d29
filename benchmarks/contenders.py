"""The compared calls, by name, and the reading of their numbers.

A contender is made for one setting and one model, and is called many times. Its numbers are read
afterwards, outside of any timing: rows by label for those that attribute, the logit for those that
only run the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.byhand import Projection, at, layout_of, rows_of
from benchmarks.models import Setting, unit_of
from dla_hooks import cache_names, direct_logit_attribution

Call = Callable[[], Any]
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to get the numbers.

    Attributes:
        name: its name in options, tables and files.
        kind: the model that it works on; see :func:`benchmarks.peers.make`.
        make: from (model, setting) to the call.
        read: from what the call returns, and the setting, to rows [batch, pos'] by label; ``logit``
            is the logit (difference) itself.
        processed: whether its numbers are those of processed weights, as TransformerLens has them.
        unit: the only unit that it has, if that may differ from the setting's.
    """

    name: str
    kind: str
    make: Callable[[Any, Setting], Call]
    read: Callable[[Any, Setting], Rows]
    processed: bool = False
    unit: str | None = None

    @property
    def attributes(self) -> bool:
        """True if it does more than run the model, so that the unit and positions matter."""
        return self.read is not _logits


def _plain(model: Any, setting: Setting, *, full: bool = False) -> Call:
    ids = setting.ids()
    options = {} if full else {"logits_to_keep": 1}

    def call() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=False, **options)

    return call


def _plain_in_chunks(model: Any, setting: Setting) -> Call:
    pieces = setting.ids().split(setting.chunk or setting.tokens, dim=1)

    def call() -> Any:
        cache, out = None, None
        with torch.no_grad():
            for piece in pieces:
                out = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
        return out

    return call


def _plain_peer(model: Any, setting: Setting) -> Call:
    ids = setting.ids()

    def call() -> Any:
        with torch.no_grad():
            return model(ids)

    return call


def _logits(out: Any, setting: Setting) -> Rows:
    logits = out if isinstance(out, Tensor) else out.logits
    answer, incorrect, pos = setting.answers()
    if pos is not None:
        logits = logits[:, -1:]
    if incorrect is not None:
        return {"logit": logits[..., answer] - logits[..., incorrect]}
    answer = answer[:, answer.shape[1] - logits.shape[1] :]  # the last of them, or all
    return {"logit": logits.gather(-1, answer[..., None])[..., 0]}


def _hidden_states(model: Any, setting: Setting) -> Call:
    ids = setting.ids()
    projection = Projection(model, setting)
    norm = at(model, projection.layout.norm)

    def call() -> Rows:
        seen: list[Tensor] = []

        def look(_: Any, args: tuple[Any, ...]) -> None:
            seen.append(projection.scale(args[0]))  # missing from the hidden states

        handle = norm.register_forward_pre_hook(look)
        try:
            with torch.no_grad():
                out = model(ids, use_cache=False, logits_to_keep=1, output_hidden_states=True)
        finally:
            handle.remove()
        scale = seen[0][:, projection.entries]
        *streams, last = (state[:, projection.entries] for state in out.hidden_states)
        rows = {f"{i}_pre": projection.write(x) / scale for i, x in enumerate(streams)}
        return {**rows, "final_post": projection.normed(last)}  # the last one comes normed

    return call


def _ours(model: Any, setting: Setting, *, in_chunks: bool = False) -> Call:
    ids = setting.ids()
    answer, incorrect, pos = setting.answers()
    options: dict[str, Any] = {"chunk_size": setting.chunk} if in_chunks else {}
    unit = unit_of(setting.unit)

    def call() -> Any:
        return direct_logit_attribution(
            model, ids, answer, incorrect, unit=unit, pos=pos, **options
        )

    return call


def _reference(model: Any, setting: Setting, *, careful: bool) -> Call:
    from transformer_lens.tools.analysis import direct_logit_attribution as theirs

    ids = setting.ids()
    answer, incorrect, pos = setting.answers()
    options = {"unit": setting.unit, "pos": pos}
    names = set(_needed(model, setting.unit)) if careful else set()

    def call() -> Any:
        with torch.no_grad():
            if not careful:
                return theirs(model, ids, answer, incorrect, **options)
            _, cache = model.run_with_cache(ids, names_filter=lambda name: name in names)
            return theirs(model, None, answer, incorrect, cache=cache, **options)

    return call


def _needed(model: Any, unit: str) -> list[str]:
    """The fewest activations that the reference's own function reads."""
    names = cache_names(model, unit)
    if unit == "layer":  # ours does not need the streams
        names += [
            f"blocks.{layer}.hook_resid_{place}"
            for layer in range(model.cfg.n_layers)
            for place in ("pre", "mid", "post")[: 3 if layer == model.cfg.n_layers - 1 else 2]
        ]
    return names


def result_rows(out: Any, setting: Setting) -> Rows:
    """The rows of an attribution, of this library's or of the reference's."""
    values = out.attribution if setting.pos != "last" else out.attribution[..., None]
    rows = dict(zip(out.labels, values, strict=True))
    if hasattr(out, "logit"):
        rows["logit"] = out.logit if setting.pos != "last" else out.logit[..., None]
    return rows


def _nnsight(model: Any, setting: Setting) -> Call:
    ids = setting.ids()
    plain = model._module
    projection = Projection(plain, setting)
    layout, entries, unit = layout_of(plain), projection.entries, setting.unit
    n_layers = len(at(plain, layout.layers))

    def call() -> Rows:
        saved: dict[str, Any] = {}
        with torch.no_grad(), model.trace(ids, use_cache=False, logits_to_keep=1):
            # In the order in which the modules run.
            if unit != "head":
                saved["embed"] = at(model, layout.embed).output[:, entries].save()
                if layout.pos_embed is not None:
                    saved["pos_embed"] = at(model, layout.pos_embed).output[:, entries].save()
            for layer in range(n_layers):
                block = at(model, layout.layers)[layer]
                projected = at(block, layout.projection)
                if unit == "head":
                    saved[f"z.{layer}"] = projected.input[:, entries].save()
                else:
                    saved[f"attn.{layer}"] = projected.output[:, entries].save()
                    saved[f"mlp.{layer}"] = at(block, layout.mlp).output[:, entries].save()
            saved["last"] = at(model, layout.norm).input[:, entries].save()
        return rows_of(projection, unit, saved, n_layers)

    return call


def _as_they_are(out: Rows, setting: Setting) -> Rows:
    return out


PLAIN = "plain forward"
OURS = "dla_hooks"
CHUNKED, PLAIN_CHUNKED = "dla_hooks, in chunks", "plain forward, in chunks"

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(PLAIN, "hf", _plain, _logits),
        Contender("plain, full logits", "hf", partial(_plain, full=True), _logits),
        Contender("output_hidden_states", "hf", _hidden_states, _as_they_are, unit="layer"),
        Contender(OURS, "hf", _ours, result_rows),
        Contender("dla_hooks on the bridge", "bridge", _ours, result_rows, processed=True),
        Contender("nnsight", "nnsight", _nnsight, _as_they_are),
        Contender("bridge, plain forward", "bridge", _plain_peer, _logits, processed=True),
        Contender(
            "bridge, names_filter",
            "bridge",
            partial(_reference, careful=True),
            result_rows,
            processed=True,
        ),
        Contender(
            "bridge, full cache",
            "bridge",
            partial(_reference, careful=False),
            result_rows,
            processed=True,
        ),
        Contender(
            "HookedTransformer, names_filter",
            "hooked",
            partial(_reference, careful=True),
            result_rows,
            processed=True,
        ),
        Contender(
            "HookedTransformer, full cache",
            "hooked",
            partial(_reference, careful=False),
            result_rows,
            processed=True,
        ),
        Contender(PLAIN_CHUNKED, "hf", _plain_in_chunks, _logits),
        Contender(CHUNKED, "hf", partial(_ours, in_chunks=True), result_rows),
    )
}
COMPARED = tuple(name for name in CONTENDERS if name not in (CHUNKED, PLAIN_CHUNKED))


def missing(name: str) -> str | None:
    """The reason why a contender cannot run here, with the remedy; None if it can."""
    return peers.missing(CONTENDERS[name].kind)


def split_missing(names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The names of those that can run here, and the reasons of the others."""
    reasons = {name: missing(name) for name in names}
    return (
        [name for name, reason in reasons.items() if reason is None],
        {name: reason for name, reason in reasons.items() if reason is not None},
    )


class Bench:
    """The models of one setting, each kind made when it is first asked for.

    Args:
        setting: whose weights.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._models: dict[str, Any] = {}

    def model(self, kind: str) -> Any:
        """The model of a kind."""
        if kind not in self._models:
            self._models[kind] = peers.make(kind, self._setting)
        return self._models[kind]

    def models(self) -> list[Any]:
        """Those that were made, as modules."""
        return [getattr(model, "_module", model) for model in self._models.values()]

    def call(self, name: str, setting: Setting) -> Call:
        """A contender's call, for a setting with the same weights."""
        contender = CONTENDERS[name]
        return contender.make(self.model(contender.kind), setting)
