"""Activations that someone saved, projected with a few lines of tensor algebra.

A careful user of any tool that saves activations writes this by hand for one family of models. It
shares no code with the library. Where the two agree, both are right.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import Setting


@dataclass(frozen=True)
class Layout:
    """The paths of one family's modules."""

    layers: str
    projection: str
    mlp: str
    norm: str
    embed: str
    pos_embed: str | None = None
    centred: bool = False


LAYOUTS = {
    "gpt2": Layout(
        layers="transformer.h",
        projection="attn.c_proj",
        mlp="mlp",
        norm="transformer.ln_f",
        embed="transformer.wte",
        pos_embed="transformer.wpe",
        centred=True,
    ),
    "llama": Layout(
        layers="model.layers",
        projection="self_attn.o_proj",
        mlp="mlp",
        norm="model.norm",
        embed="model.embed_tokens",
    ),
}


def at(module: Any, path: str) -> Any:
    """The submodule at a path, or its proxy."""
    return attrgetter(path)(module)


def layout_of(model: Any) -> Layout:
    """The layout of a Hugging Face model's family."""
    return LAYOUTS[model.config.model_type]


class Projection:
    """The directions of one setting's answers, and the projections on them.

    Args:
        model: the Hugging Face model.
        setting: whose answers, at whose positions.
    """

    def __init__(self, model: Any, setting: Setting) -> None:
        self.layout = layout_of(model)
        self._norm = at(model, self.layout.norm)
        self._layers = at(model, self.layout.layers)
        self._n_heads = model.config.num_attention_heads
        rows = model.get_output_embeddings().weight.detach()
        answer, incorrect, pos = setting.answers()
        self.entries = slice(None) if pos is None else slice(-1, None)
        self._d = rows[answer] if incorrect is None else rows[answer] - rows[incorrect]
        self._folded = self._d * self._norm.weight.detach()
        if self.layout.centred:
            self._folded = self._folded - self._folded.mean(-1, keepdim=True)

    def scale(self, last: Tensor) -> Tensor:
        """The final norm's scale [batch, pos], from the stream that enters it."""
        x = last - last.mean(-1, keepdim=True) if self.layout.centred else last
        eps = getattr(self._norm, "eps", None) or self._norm.variance_epsilon
        scale: Tensor = (x.square().mean(-1) + eps).sqrt()
        return scale

    def write(self, x: Tensor) -> Tensor:
        """One write [batch, pos, d_model] on the directions, not yet over the scale."""
        return _dot(x, self._folded)

    def heads(self, z: Tensor, layer: int) -> Tensor:
        """One layer's heads [head, batch, pos], from what its output projection reads."""
        linear = at(self._layers[layer], self.layout.projection)
        weight = linear.weight.detach()
        out_in = weight.T if type(linear).__name__ == "Conv1D" else weight
        u = (self._folded @ out_in).unflatten(-1, (self._n_heads, -1))
        z = z.unflatten(-1, (self._n_heads, -1))
        if u.ndim == 2:
            return torch.einsum("bphd,hd->hbp", z, u)
        return torch.einsum("bphd,bphd->hbp", z, u)

    def normed(self, x: Tensor) -> Tensor:
        """The final norm's output on the directions, less the norm's own bias."""
        bias = getattr(self._norm, "bias", None)
        return _dot(x, self._d) - (0.0 if bias is None else self._d @ bias.detach())


def _dot(x: Tensor, d: Tensor) -> Tensor:
    """x [batch, pos, m] on one direction [m], or on one per position [batch, pos, m]."""
    return x @ d if d.ndim == 1 else torch.einsum("bpm,bpm->bp", x, d)


def rows_of(
    projection: Projection, unit: str, saved: dict[str, Tensor], n_layers: int
) -> dict[str, Tensor]:
    """Attributions by label, from saved activations.

    Args:
        projection: the projections.
        unit: the unit of the rows.
        saved: ``embed``, ``pos_embed`` and, by layer, ``attn.{l}`` and ``mlp.{l}``; for heads
            ``z.{l}`` alone; and the ``last`` stream; each at the positions that are wanted.
        n_layers: how many layers there are.
    """
    with torch.no_grad():
        scale = projection.scale(saved["last"])
        rows: dict[str, Tensor] = {}
        if unit == "head":
            for layer in range(n_layers):
                parts = projection.heads(saved[f"z.{layer}"], layer) / scale
                rows |= {f"L{layer}H{head}": part for head, part in enumerate(parts)}
            rows["remainder"] = projection.write(saved["last"]) / scale - sum(rows.values())
            return rows
        for name in ("embed", "pos_embed"):
            if name in saved:
                rows[name] = projection.write(saved[name]) / scale
        for layer in range(n_layers):
            rows[f"{layer}_attn_out"] = projection.write(saved[f"attn.{layer}"]) / scale
            rows[f"{layer}_mlp_out"] = projection.write(saved[f"mlp.{layer}"]) / scale
    return rows if unit == "component" else _running(rows)


def _running(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    total: Any = 0
    rows = {}
    for name, part in parts.items():
        layer, _, what = name.partition("_")
        if layer.isdigit():  # the stream before what is added there
            rows[f"{layer}_{'pre' if what == 'attn_out' else 'mid'}"] = total
        total = total + part
    return {**rows, "final_post": total}
