"""The truth that the library is tested against, obtained from the model by brute force.

Everything is kept: the whole stream, every write, every head's effect measured by changing the
model and running it again. What has to be known of a family is in `oracle_families`; neither
module shares anything with the library.

    parts = stream_parts(model, ids)                 # {"embed": [batch, pos, d_model], ...}
    logit_parts(model, ids, answer, incorrect)       # {"embed": [batch, pos], ..., "bias": ...}
    head_effects(model, ids, answer, incorrect)      # [layer, head, batch, pos]

"The logit" is the one before a soft cap; with `incorrect` it is the difference of two. Answers are
a token id, or ids that broadcast to [batch, pos]. Extra keywords (attention_mask, position_ids) go
to the model. Results are float64 whatever the model's dtype. A norm of transformers computes in
float32 inside, also in a float64 model, while the formulas here are float64: the two differ by
about 1e-7 of the stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from oracle_families import (
    FAMILIES,
    family_of,
    final_norm,
    frozen_norm,
    layer_at,
    module_at,
    n_heads,
    n_layers,
    norm_scale,
    post_norms,
    write_modules,
)
from torch import Tensor, nn

__all__ = [
    "FAMILIES",
    "ablation_effects",
    "head_effects",
    "last_stream",
    "logit_of",
    "logit_parts",
    "logits_from_stream",
    "projection_bias_effects",
    "stream_parts",
]


# What is read off the model


@dataclasses.dataclass
class Clean:
    """One unchanged run: the parts of the stream, and what the interventions need to hold fixed."""

    parts: dict[str, Tensor]
    last_stream: Tensor  # [batch, pos, d_model], the final norm's input
    written: dict[str, Tensor]  # raw outputs of `attn` and `mlp`, by label, in the model's dtype
    post_norm_inputs: dict[str, Tensor]  # by part label


@torch.no_grad()
def stream_parts(model: nn.Module, ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Every write to the stream as it enters it, [batch, pos, d_model] each."""
    return _clean_run(model, ids, inputs).parts


@torch.no_grad()
def last_stream(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    """The final norm's input, [batch, pos, d_model]."""
    return _clean_run(model, ids, inputs).last_stream


@torch.no_grad()
def logit_parts(
    model: nn.Module, ids: Tensor, answer: Any, incorrect: Any = None, **inputs: Any
) -> dict[str, Tensor]:
    """What each write adds to the logit under the final norm's actual scale, [batch, pos] each.

    The last entry, "bias", is what is left when the stream is zero: norm bias and head bias.
    """
    clean = _clean_run(model, ids, inputs)
    family, norm = family_of(model), final_norm(model)
    scale = norm_scale(family.norm, norm, clean.last_stream)
    zero = torch.zeros_like(clean.last_stream)
    bias = _logit(model, frozen_norm(family.norm, norm, zero, scale), answer, incorrect)
    contributions = {
        label: _logit(model, frozen_norm(family.norm, norm, part, scale), answer, incorrect) - bias
        for label, part in clean.parts.items()
    }
    return {**contributions, "bias": bias}


@torch.no_grad()
def logits_from_stream(model: nn.Module, stream: Tensor) -> Tensor:
    """All logits, soft cap included, by formula from a last stream [batch, pos, d_model]."""
    family, norm = family_of(model), final_norm(model)
    normed = frozen_norm(family.norm, norm, stream, norm_scale(family.norm, norm, stream))
    logits = _apply_head(model, normed)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logit_of(logits: Tensor, answer: Any, incorrect: Any = None) -> Tensor:
    """The answer's logit or logit difference [batch, pos] among logits [batch, pos, vocab]."""
    picked = logits.gather(-1, _at_each_position(answer, logits)[..., None])[..., 0]
    return picked if incorrect is None else picked - logit_of(logits, incorrect)


# What is found by changing the model and running it again


@torch.no_grad()
def head_effects(
    model: nn.Module,
    ids: Tensor,
    answer: Any,
    incorrect: Any = None,
    eps: float = 1.0,
    **inputs: Any,
) -> Tensor:
    """Each head's direct effect on the logit, measured, [layer, head, batch, pos].

    The head's slice of the output projection's input is scaled by 1 + eps, all other writes are
    held at their clean values, and so are the scales of the norms that the head passes on its way
    out (its post norm and the final norm). The change of the logit over eps does not depend on
    eps, since every step that is left is affine.
    """
    clean = _clean_run(model, ids, inputs)
    rows = []
    for layer in range(n_layers(model)):
        with _only_attention_is_live(model, clean, layer):
            before = logit_of(_uncapped_logits(model, ids, inputs), answer, incorrect)
            for head in range(n_heads(model)):
                with _scaled_head(model, layer, head, 1 + eps):
                    after = logit_of(_uncapped_logits(model, ids, inputs), answer, incorrect)
                rows.append((after - before) / eps)
    return torch.stack(rows).unflatten(0, (n_layers(model), n_heads(model)))


@torch.no_grad()
def projection_bias_effects(
    model: nn.Module, ids: Tensor, answer: Any, incorrect: Any = None, **inputs: Any
) -> Tensor:
    """What the output projections' biases add to the logit, measured, [layer, batch, pos].

    Together with a layer's heads this is the layer's attn_out.
    """
    clean = _clean_run(model, ids, inputs)
    effects = []
    for layer in range(n_layers(model)):
        projection = module_at(layer_at(model, layer), family_of(model).o_proj)
        if projection.bias is None:
            effects.append(torch.zeros(ids.shape, dtype=torch.float64))
            continue
        with _only_attention_is_live(model, clean, layer):
            before = logit_of(_uncapped_logits(model, ids, inputs), answer, incorrect)
            with _hooked(projection, lambda module, args, output: output - module.bias):
                without = logit_of(_uncapped_logits(model, ids, inputs), answer, incorrect)
        effects.append(before - without)
    return torch.stack(effects)


@torch.no_grad()
def ablation_effects(
    model: nn.Module, ids: Tensor, answer: Any, incorrect: Any = None, **inputs: Any
) -> Tensor:
    """Each head's total effect at the last position, [layer, head, batch].

    Clean minus ablated: the logit with the head, less the logit when its slice of the output
    projection's input is zero at every position and all that follows is recomputed.
    """
    clean = logit_of(_uncapped_logits(model, ids, inputs), answer, incorrect)[:, -1]
    rows = []
    for layer in range(n_layers(model)):
        for head in range(n_heads(model)):
            with _scaled_head(model, layer, head, 0.0):
                ablated = logit_of(_uncapped_logits(model, ids, inputs), answer, incorrect)[:, -1]
            rows.append(clean - ablated)
    return torch.stack(rows).unflatten(0, (n_layers(model), n_heads(model)))


# Interventions


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _scaled_head(model: nn.Module, layer: int, head: int, factor: float) -> Iterator[None]:
    """One head's slice of the output projection's input times `factor`, at every position."""
    projection = module_at(layer_at(model, layer), family_of(model).o_proj)

    def scale(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = args[0].clone().unflatten(-1, (n_heads(model), -1))
        heads[..., head, :] *= factor
        return (heads.flatten(-2), *args[1:])

    handle = projection.register_forward_pre_hook(scale)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _only_attention_is_live(model: nn.Module, clean: Clean, layer: int) -> Iterator[None]:
    """All writes held at their clean values but one layer's attention, norms after it frozen."""
    family = family_of(model)
    live = f"{layer}_attn_out"
    with contextlib.ExitStack() as stack:
        for label, module in write_modules(model).items():
            if label != live:
                stack.enter_context(_hooked(module, _replace_by(clean.written[label])))
        for label, norm in post_norms(model).items():
            frozen_at = clean.post_norm_inputs[label]
            stack.enter_context(_frozen(family.norm, norm, frozen_at))
        stack.enter_context(_frozen(family.norm, final_norm(model), clean.last_stream))
        yield


def _replace_by(value: Tensor) -> Callable[..., Any]:
    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        # A copy each time: Falcon adds the attention to the MLP's output in place.
        if isinstance(output, tuple):
            return (value.clone(), *output[1:])
        return value.clone().view(output.shape)  # OPT's MLP sees positions flattened

    return replace


@contextlib.contextmanager
def _frozen(kind: str, norm: nn.Module, x: Tensor) -> Iterator[None]:
    """The norm with its scale held at what it is for x."""
    scale = norm_scale(kind, norm, x)
    norm.forward = lambda y: frozen_norm(kind, norm, y.double(), scale).to(y.dtype)
    try:
        yield
    finally:
        del norm.forward  # the class's own is found again


# Runs


def _clean_run(model: nn.Module, ids: Tensor, inputs: dict[str, Any]) -> Clean:
    family, config = family_of(model), model.config
    seen: dict[str, Tensor] = {}

    def keep(label: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            # OPT's MLP sees positions flattened, and Falcon writes into what it is given.
            seen[label] = output.detach().clone().reshape(*ids.shape, -1)

        return hook

    def keep_input(label: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            seen[label] = args[0].detach().clone().reshape(*ids.shape, -1)

        return hook

    writes, normed = write_modules(model), post_norms(model)
    with contextlib.ExitStack() as stack:
        for label, module in writes.items():
            stack.enter_context(_hooked(module, keep(label)))
        for label, norm in normed.items():
            stack.enter_context(_hooked(norm, keep_input(f"before norm of {label}")))
            stack.enter_context(_hooked(norm, keep(f"normed {label}")))
        stack.enter_context(_hooked(final_norm(model), keep_input("last stream")))
        if family.positions is not None:
            position_module = module_at(model, family.positions)
            stack.enter_context(_hooked(position_module, _keep_positions(seen, ids)))
        model(ids, use_cache=False, **inputs)

    embedded = module_at(model, family.embed).weight[ids].double() * family.embed_scale(config)
    if family.embed_norm is not None:
        embed_norm = module_at(model, family.embed_norm)
        scale = norm_scale(family.norm, embed_norm, embedded)
        embedded = frozen_norm(family.norm, embed_norm, embedded, scale)
    parts = {"embed": embedded}
    if family.positions is not None:
        parts["pos_embed"] = seen["pos_embed"].double()
    for label in writes:
        write = seen.get(f"normed {label}", seen[label])
        parts[label] = write.double() * family.write_scale(config)
    return Clean(
        parts=parts,
        last_stream=seen["last stream"].double(),
        written={label: seen[label] for label in writes},
        post_norm_inputs={label: seen[f"before norm of {label}"].double() for label in normed},
    )


def _keep_positions(seen: dict[str, Tensor], ids: Tensor) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        seen["pos_embed"] = output.detach().clone().expand(*ids.shape, -1)

    return hook


def _uncapped_logits(model: nn.Module, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The run's logits before a soft cap, and before GPT-J's old cast to float32."""
    seen: list[Tensor] = []
    head = module_at(model, family_of(model).head)
    with _hooked(head, lambda module, args, output: seen.append(output.detach().double())):
        model(ids, use_cache=False, **inputs)
    (logits,) = seen
    return logits * family_of(model).logit_scale(model.config)


def _apply_head(model: nn.Module, normed: Tensor) -> Tensor:
    head = module_at(model, family_of(model).head)
    logits = normed @ head.weight.T.double()
    if head.bias is not None:
        logits = logits + head.bias
    return logits * family_of(model).logit_scale(model.config)


def _logit(model: nn.Module, normed: Tensor, answer: Any, incorrect: Any) -> Tensor:
    return logit_of(_apply_head(model, normed), answer, incorrect)


def _at_each_position(token: Any, logits: Tensor) -> Tensor:
    return torch.as_tensor(token).expand(logits.shape[:-1])
