"""The truth of one draw: a plain run under hooks of our own, and algebra on what they saw.

Rows are what really entered the stream, seen in the run with all interventions on: the final norm
with its scale frozen, by formula, and the unembedding as its own ``forward`` maps unit vectors.
Nothing here is taken from the library.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from bench import Bench, Slot
from oracle_families import _centred, norm_scale
from torch import Tensor, nn


@dataclasses.dataclass
class Truth:
    """What the model itself computed, float64, [batch, pos, …].

    Attributes:
        final: the model's logits, as it returns them.
        logits: those before any cap, as the unembedding put them out, scaled.
        written: what each row wrote to the stream, by label; hooks on the stream with them.
        streams: what each block read, by label, and the last stream.
        behind: final_hook and logit_hook, in logits [batch, pos, vocab].
        heads: what each head wrote, and L{l}hook.
        to_logits: from a write to its part in all logits [batch, pos, vocab]; None if the layout
            is not what the family's formulas say.
        size: how far apart the logits are, without what hooks did to them.
    """

    final: Tensor
    logits: Tensor
    written: dict[str, Tensor]
    streams: dict[str, Tensor]
    behind: dict[str, Tensor]
    heads: dict[str, Tensor]
    to_logits: Any
    size: float

    def rows(self, unit: str) -> dict[str, Tensor] | None:
        """Every row of a unit in all logits, or None where there is no formula for them."""
        if self.to_logits is None:
            return None
        if unit == "layer":
            return {k: self.to_logits(x) for k, x in self.streams.items()}
        if unit == "head":
            return {k: self.to_logits(x) for k, x in self.heads.items()}
        found = {k: self.to_logits(x) for k, x in self.written.items()}
        for label, x in self.behind.items():
            found[label] = found[label] + x if label in found else x
        return found


def plainly(bench: Bench, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The model's logits, as a user calls it."""
    given: dict[str, Any] = {}
    if mask is not None and not bool(mask.all()):
        ids = ids.masked_fill(mask == 0, 0)
        given["attention_mask"] = mask
        if "position_ids" in inspect.signature(type(bench.root).forward).parameters:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), bench.running():
        return bench.model(input_ids=ids, use_cache=False, return_dict=True, **given).logits


class _Eyes:
    """Hooks of ours, first or last at a place; each keeps a copy of what it sees."""

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.watched: set[nn.Module] = set()
        self.seen: dict[tuple[int, str], Tensor] = {}
        self.times: dict[tuple[int, str], int] = {}

    def on(self, slot: Slot) -> nn.Module:
        module = slot.now
        if module in self.watched:  # BLOOM's attention is its output projection
            return module
        self.watched.add(module)
        for when, first in (("before", True), ("after", False)):
            self._pre(module, f"in {when}", first)
            self._post(module, f"out {when}", first)
        return module

    def _pre(self, module: nn.Module, what: str, first: bool) -> None:
        def hook(m, args, kwargs):
            x = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
            self._keep(module, what, x)

        self.handles.append(module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True))

    def _post(self, module: nn.Module, what: str, first: bool) -> None:
        def hook(m, args, out):
            self._keep(module, what, out if isinstance(out, Tensor) else out[0])

        self.handles.append(module.register_forward_hook(hook, prepend=first))

    def _keep(self, module: nn.Module, what: str, x: Tensor) -> None:
        key = id(module), what
        x = x.detach().double() if x.is_floating_point() else x.detach()
        self.seen[key] = x.clone()
        self.times[key] = self.times.get(key, 0) + 1

    def __call__(self, module: nn.Module, what: str) -> Tensor:
        return self.seen[id(module), what]


def truth_of(bench: Bench, ids: Tensor, mask: Tensor | None) -> Truth:
    """Run the model on the bench, interventions on, and work out every row.

    Raises:
        Exception: whatever the model raises by itself.
    """
    eyes = _Eyes()
    places = bench.places
    blocks = [
        [eyes.on(b.whole), eyes.on(b.post_attn or b.attn), eyes.on(b.post_mlp or b.mlp)]
        for b in bench.blocks
    ]
    projections = [eyes.on(b.o_proj) for b in bench.blocks]
    norm, head = eyes.on(places["final_norm"]), eyes.on(places["head"])
    tokens = eyes.on(places["embed"])
    positions = eyes.on(places["positions"]) if "positions" in places else None
    try:
        final = plainly(bench, ids, mask).detach().double()
    finally:
        for handle in eyes.handles:
            handle.remove()
    shape = ids.shape
    config, family = bench.root.config, bench.family
    k = family.logit_scale(config)
    logits = eyes(head, "out after") * k
    plain_logits = eyes(head, "out before") * k
    real = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
    cap = getattr(config, "final_logit_softcapping", None)
    returned = logits if cap is None else cap * torch.tanh(logits / cap)
    gap = (returned - final)[real].abs()
    largest = final[real].abs().nan_to_num(0, 0, 0).max()
    same = bool(((gap <= 20 * _eps(bench) * largest) | (returned == final)[real]).all())
    if not same and cap is None:  # a scale that is not the config's, or hooks on the whole
        logits = final
    spread = plain_logits.amax(-1) - plain_logits.amin(-1)
    found = Truth(final, logits, {}, {}, {}, {}, None, float(spread[real].max()))
    if bench.only_sums or not same or any(count != 1 for count in eyes.times.values()):
        return found

    written, streams = found.written, found.streams
    scale = family.write_scale(config)
    written["embed"] = eyes(blocks[0][0], "in before")
    if positions is not None:
        at = eyes(positions, "out after").expand(*shape, -1)
        written["embed"], written["pos_embed"] = written["embed"] - at, at
    before, after = eyes(tokens, "out before"), eyes(tokens, "out after")
    times = (after * written["embed"]).sum() / after.square().sum()
    off = (written["embed"] - times * after)[real].abs().max()
    if bool(off <= 20 * _eps(bench) * written["embed"][real].abs().max()):  # scaled, no more
        written["embed_hook"] = times * (after - before)
        written["embed"] = times * before
    for number, (whole, attn, mlp) in enumerate(blocks):
        into, out = eyes(whole, "in after"), eyes(whole, "out before")
        streams[f"{number}_pre"] = into
        written[f"{number}_attn_out"] = eyes(attn, "out after").view(*shape, -1) * scale
        written[f"{number}_mlp_out"] = eyes(mlp, "out after").view(*shape, -1) * scale
        streams[f"{number}_mid"] = into + written[f"{number}_attn_out"]
        hooks = into - eyes(whole, "in before") + eyes(whole, "out after") - out
        written[f"{number}_hook"] = hooks
    x = eyes(norm, "in after")
    written["final_hook"] = x - eyes(norm, "in before")
    streams["final_post"] = x
    _heads(bench, eyes, projections, found)

    weight, _ = _affine(head, x.shape[-1])
    s, formula = norm_scale(family.norm, norm, x), family.norm
    gamma = _gamma(formula, norm, x)
    normed = eyes(norm, "out before")
    bias = normed - _centred(formula, x) / s * gamma  # the norm's own, or nothing
    # Hooks on the norm's output and, behind it, on the decoder's.
    read = eyes(head, "in before")
    read = read if read.shape == normed.shape else eyes(norm, "out after")
    found.behind["final_hook"] = (read - normed) @ weight * k
    moved = (eyes(head, "in after") - eyes(head, "in before")) @ weight * k
    added = logits - plain_logits
    # A mask is so large that the logits beneath it are rounded away: no row can be told from it.
    found.behind["logit_hook"] = moved + added.masked_fill(added.abs() > 1e6, float("nan"))

    def to_logits(vectors: Tensor) -> Tensor:
        return (_centred(formula, vectors) / s * gamma) @ weight * k

    flat = bias[real]
    even = bool((flat - flat[:1]).abs().max() < 1e3 * _eps(bench) * normed[real].abs().max())
    stream = sum(written.values())
    gap = (stream - x)[real].abs().max()
    summed = bool(gap < 20 * _eps(bench) * max(v[real].abs().max() for v in written.values()))
    straight = plain_logits - (eyes(head, "in after") @ weight) * k
    straight = straight[real] - straight[real][:1]
    linear = bool(straight.abs().max() < 100 * _eps(bench) * plain_logits[real].abs().max())
    if even and summed and linear:
        found.to_logits = to_logits
    return found


def _heads(bench: Bench, eyes: _Eyes, projections: list[nn.Module], found: Truth) -> None:
    """What each head wrote, through a post-norm at its real scale; and what hooks added to it."""
    config, formula = bench.root.config, bench.family.norm
    n_heads, shape = config.num_attention_heads, found.final.shape[:2]
    scale = bench.family.write_scale(config)
    for layer, (block, projection) in enumerate(zip(bench.blocks, projections, strict=True)):
        z = eyes(projection, "in after").view(*shape, -1)
        if z.shape[-1] % n_heads:
            continue
        weight, bias = _affine(projection, z.shape[-1])
        through, beta = scale, torch.zeros(())
        if block.post_attn is not None:
            norm = block.post_attn.now
            into, out = eyes(norm, "in after"), eyes(norm, "out before")
            through = scale * _gamma(formula, norm, into) / norm_scale(formula, norm, into)
            beta = scale * out - through * _centred(formula, into)
            if bool((beta - beta[:1, :1]).abs().max() > 1e3 * _eps(bench) * out.abs().max()):
                continue  # it does something else than its formula
        heads = [
            _centred(formula, part @ rows) * through if block.post_attn else part @ rows * scale
            for part, rows in zip(z.chunk(n_heads, -1), weight.chunk(n_heads), strict=True)
        ]
        found.heads |= {f"L{layer}H{head}": wrote for head, wrote in enumerate(heads)}
        own = _centred(formula, bias) if block.post_attn else bias
        added = found.written[f"{layer}_attn_out"] - sum(heads) - own * through - beta
        found.heads[f"L{layer}hook"] = added


@torch.no_grad()
def _affine(module: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """A linear module's matrix [in, out] and bias, as it maps unit vectors, past its hooks."""
    like = next(module.parameters())
    unit = torch.eye(width, dtype=like.dtype)[:, None]  # one token each
    out, none = module.forward(unit), module.forward(torch.zeros_like(unit))
    return (out.double() - none.double())[:, 0], none[0, 0].double()


def _gamma(formula: str, norm: nn.Module, x: Tensor) -> Tensor:
    if formula == "layer without weight":
        return torch.ones((), dtype=torch.float64)
    weight = norm.weight.detach().double()
    return 1 + weight if formula.startswith("rms of 1") else weight


def _eps(bench: Bench) -> float:
    """How finely activations are rounded: norms of transformers compute in float32 at best."""
    coarsest = max(torch.finfo(p.dtype).eps for p in bench.root.parameters())
    if torch.is_autocast_enabled("cpu"):
        coarsest = torch.finfo(torch.bfloat16).eps
    return max(coarsest, torch.finfo(torch.float32).eps)
