"""Two runs held against each other, from stored vectors: what `compare` must give.

Every write is kept as the vector that it is in the last stream; directions and scales are taken
from the weights, by each family's own formula. Nothing here is shared with the library.

    one, other = Vectors.of(model, ids), Vectors.of(changed, ids)
    written_and_read(one, other, 5, 7)     # {"embed": (written, read), ...}, [batch, pos] each
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from oracle import last_stream, stream_parts
from oracle_families import FAMILIES, family_of, final_norm, frozen_norm, module_at, norm_scale
from torch import Tensor, nn


@dataclasses.dataclass
class Vectors:
    """One run.

    Attributes:
        x: what each part holds of the last stream [batch, pos, d_model].
        scale: the final norm's [batch, pos].
        gamma: the final norm's weight, with what centres the stream [d_model, d_model].
        constant: the final norm's bias [d_model].
        head: the unembedding.
        k: the logits' factor.
    """

    x: dict[str, Tensor]
    scale: Tensor
    gamma: Tensor
    constant: Tensor
    head: nn.Module
    k: float

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, ids: Tensor, **inputs: Any) -> Vectors:
        """Run a model, and keep everything."""
        kind = model.config.model_type
        if kind in FAMILIES:
            family, norm = family_of(model), final_norm(model)
            x, last = stream_parts(model, ids, **inputs), last_stream(model, ids, **inputs)
            one = last.new_ones(())
            eye = torch.eye(last.shape[-1], dtype=torch.float64)
            constant = frozen_norm(family.norm, norm, torch.zeros_like(eye[0]), one).double()
            gamma = frozen_norm(family.norm, norm, eye, one).double() - constant
            scale = norm_scale(family.norm, norm, last)[..., 0].double()
            head, k = module_at(model, family.head), family.logit_scale(model.config)
        else:
            x, last = _with_gains(model, ids)
            weight = model.model.norm.weight.double()
            gamma, constant = torch.diag(weight), torch.zeros_like(weight)
            scale = (last.square().mean(-1) + model.config.rms_norm_eps).sqrt()
            head, k = model.lm_head, 1.0
        torch.testing.assert_close(sum(x.values()), last, rtol=1e-6, atol=1e-6)
        return cls(x, scale, gamma, constant, head, k)

    def direction(self, answer: int, incorrect: int | None) -> Tensor:
        """d [d_model], or one for each entry [batch, pos, d_model]."""
        return self.k * (self._row(answer, incorrect) @ self.gamma.T)

    def bias(self, answer: int, incorrect: int | None) -> Tensor:
        """What the logit has besides the stream."""
        own = self._row(answer, incorrect) @ self.constant
        if self.head.bias is not None:
            b = self.head.bias.detach().double()
            own = own + b[answer] - (0 if incorrect is None else b[incorrect])
        return self.k * own

    def _row(self, answer: int, incorrect: int | None) -> Tensor:
        W = self.head.weight.detach().double()
        return W[answer] - (0 if incorrect is None else W[incorrect])


def written_and_read(
    first: Vectors, second: Vectors, answer: int, incorrect: int | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Both halves of the difference of every part, [batch, pos] each."""
    u, v = (run.direction(answer, incorrect) / run.scale[..., None] for run in (first, second))
    found = {}
    for label, x in first.x.items():
        y = second.x[label]
        written = ((x - y) * (u + v)).sum(-1) / 2
        read = ((x + y) * (u - v)).sum(-1) / 2
        found[label] = written, read
    return found


def _with_gains(model: Any, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The parts of models whose blocks multiply the stream: Gemma 4 and Doge."""
    kept: dict[str, Tensor] = {}
    layers = model.model.layers
    doge = model.config.model_type == "doge"
    names = {"attn_out": "self_attn", "mlp_out": "mlp"}
    if not doge:
        names = {
            "attn_out": "post_attention_layernorm",
            "mlp_out": "post_feedforward_layernorm",
            "ple_out": "post_per_layer_input_norm",
        }
    with contextlib.ExitStack() as stack:

        def keep(label: str, module: nn.Module, *, entered: bool = False) -> None:
            def see(_: nn.Module, args: Any, output: Any) -> None:
                value = args[0] if entered else output
                value = value[0] if isinstance(value, tuple) else value
                kept[label] = value.detach().clone().double()

            stack.callback(module.register_forward_hook(see).remove)

        keep("embed", model.model.embed_tokens)
        keep("last", model.model.norm, entered=True)
        for number, layer in enumerate(layers):
            for label, path in names.items():
                keep(f"{number}_{label}", layer.get_submodule(path))
        model(ids, use_cache=False)
    last = kept.pop("last")
    found = {"embed": kept.pop("embed")}
    for number, layer in enumerate(layers):
        if doge:
            first, then = layer.input_residual.double(), layer.post_attention_residual.double()
            found = {label: x * first * then for label, x in found.items()}
            found[f"{number}_attn_out"] = kept[f"{number}_attn_out"] * then
            found[f"{number}_mlp_out"] = kept[f"{number}_mlp_out"]
        else:
            found |= {f"{number}_{label}": kept[f"{number}_{label}"] for label in names}
            gain = layer.layer_scalar.double()
            found = {label: x * gain for label, x in found.items()}
    return found, last
