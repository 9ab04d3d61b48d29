"""The modules that PEFT puts around a model's own, and what each of its adapters adds there.

PEFT itself is not imported: a module is known by what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.errors import UnsupportedModelError
from dla_hooks.modules.linear import bias_of, matrix


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a model that PEFT wrapped, with its path: adapted ones, and copied ones."""
    for path, module in model.named_modules():
        if _is_wrapped(module):
            yield path, module


def at_work(module: nn.Module) -> list[str]:
    """The adapters that act in a wrapped module, in PEFT's order; none if off, or merged."""
    kept: Any = module
    if kept.disable_adapters or getattr(kept, "merged", False):
        return []
    names = list(kept.active_adapters)
    if is_copied(module):  # which runs only where every active adapter has one
        return names if all(name in kept.modules_to_save for name in names) else []
    own = [getattr(module, field, {}) for field in kept.adapter_layer_names]
    return [name for name in names if any(name in adapters for adapters in own)]


def state_of_adapters(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Which adapters act in each wrapped module: merging and switching leave no other trace."""
    return tuple((path, *at_work(module)) for path, module in adapted_modules(model))


def is_copied(module: nn.Module) -> bool:
    """Whether an adapter has a copy of the module, which runs in its place (modules_to_save)."""
    return "modules_to_save" in module._modules


def is_of_parameter(module: nn.Module) -> bool:
    """Whether an adapter changes one parameter of the module (target_parameters)."""
    return hasattr(module, "parameter_name") and hasattr(module, "get_delta_weight")


def inside(module: nn.Module) -> nn.Module:
    """What an adapted module wraps."""
    base: Any = module
    found: nn.Module = base.base_layer
    return found


def innermost(module: nn.Module) -> nn.Module:
    """The model's own module in an adapted one, through wrappers of several parameters."""
    while is_of_parameter(module):
        module = inside(module)
    return module


@dataclass(frozen=True)
class Added:
    """One term of an adapted linear module's output.

    Attributes:
        name: the adapter, or None for the module inside.
        factor: what multiplies it [d_out], as the magnitudes of DoRA do; None is one.
        bias: of the module inside [d_out], which that factor leaves out; None is nothing.
    """

    name: str | None
    factor: Tensor | None = None
    bias: Tensor | None = None


def check_added(module: nn.Module, path: str) -> None:
    """Refuse an adapted module whose adapters do not add a term of their own.

    Args:
        module: adapted, with some adapter at work.
        path: for the message of an error.

    Raises:
        UnsupportedModelError: naming the adapter, and what it is.
    """
    kept: Any = module
    for name in at_work(module):
        method = type(module).__module__.removeprefix("peft.tuners.").partition(".")[0]
        variant = _variant(module, name)
        reason = None
        if not hasattr(module, "lora_A"):
            reason = f"{method} does not add a term to what the module puts out, or not as LoRA"
        elif variant not in _ADDS:
            reason = f"this kind of LoRA ({variant}) is not read"
        elif name in kept.lora_embedding_A and variant in _SCALES:
            reason = "DoRA of embeddings scales every token's vector by its own norm"
        elif _is_wrapped(inside(module)) and not is_of_parameter(module):
            reason = "another adapter is within the module that it adapts"
        if reason is not None:
            raise UnsupportedModelError(
                f"{path} writes to the stream, and the adapter {name!r} has no part of its own "
                f"there: {reason}. Attribute components instead, with the adapter on and with "
                "`with model.disable_adapter(): ...`"
            )


def terms(module: nn.Module) -> list[Added]:
    """The terms of an adapted linear module's output: the module inside, then each adapter.

    DoRA multiplies the sum so far, less the bias, by one number for each channel: its magnitude
    over the norm of the adapted weight's row.
    """
    kept: Any = module
    found = [Added(None)]
    for name in at_work(module):
        found.append(Added(name))
        if _variant(module, name) in _SCALES:
            base = inside(module)
            B, A = (matrix(part[name]) for part in (kept.lora_B, kept.lora_A))
            adapted = matrix(base).to(B) + kept.scaling[name] * (B @ A)
            norm = torch.linalg.vector_norm(adapted, dim=1)
            magnitude = kept.lora_magnitude_vector[name].weight.detach() / norm
            bias = bias_of(base)
            found = [
                Added(
                    term.name,
                    magnitude if term.factor is None else term.factor * magnitude,
                    bias if term.name is None else None,
                )
                for term in found
            ]
    return found


def product_of(module: nn.Module, name: str) -> tuple[Tensor, Tensor] | None:
    """What AdaLoRA adds is x @ A^T @ B^T with parameters; None for adapters made of modules.

    Returns:
        A [rank, d_in], with the singular values and the scaling in it, and B [d_out, rank].
    """
    kept: Any = module
    A = kept.lora_A[name]
    if isinstance(A, nn.Module):
        return None
    scaling = kept.scaling[name] / (kept.ranknum[name].detach() + 1e-5)  # as PEFT divides
    return (A * kept.lora_E[name]).detach() * scaling, kept.lora_B[name].detach()


def low_rank(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """What an adapter adds to a linear module, as a product of two matrices; DoRA's factor apart.

    Returns:
        A [rank, d_in] and B [d_out, rank], with the scaling in B. Where the adapter has a bias, B
        has one more column than A has rows.
    """
    kept: Any = module
    product = product_of(module, name)
    if product is not None:
        return product
    down, up, scaling = kept.lora_A[name], kept.lora_B[name], kept.scaling[name]
    B, bias = matrix(up).detach() * scaling, bias_of(up)
    if bias is not None:
        B = torch.cat((B, bias.detach()[:, None] * scaling), 1)
    return matrix(down).detach(), B


def width_of(module: nn.Module) -> int | None:
    """How many channels the adapters at work in a module add to; None where they are no maps."""
    kept: Any = module
    for name in at_work(module):
        if name not in kept.lora_A:
            return None
        if product_of(module, name) is None:
            maps = kept.lora_A[name], kept.lora_B[name]
            if not all(isinstance(one, nn.Linear) for one in maps):
                return None
    B = kept.lora_B[at_work(module)[0]]
    return int(B.shape[0] if isinstance(B, Tensor) else B.out_features)


def with_parameter(module: nn.Module, name: str, value: Tensor) -> nn.Module:
    """A module that computes the same with another value of one parameter.

    The module itself is not touched. Adapters that act on its other parameters act here, too.
    """
    parametrized = getattr(module, "parametrizations", {})
    kind: Any = type(module).__bases__[0] if len(parametrized) else type(module)
    twin: nn.Module = kind.__new__(kind)
    twin.__dict__.update(vars(module))
    twin.__dict__.pop("forward", None)
    own = {key: getattr(module, key) for key in (*module._parameters, *parametrized)}
    twin.__dict__["_parameters"] = {**own, name: value}
    modules = {key: one for key, one in module._modules.items() if key != "parametrizations"}
    twin.__dict__["_modules"] = modules
    return twin


def plain_parameter(module: nn.Module, name: str) -> Tensor:
    """A parameter as it is without any adapter."""
    parametrized: Any = getattr(module, "parametrizations", {})
    found: Tensor = parametrized[name].original if name in parametrized else getattr(module, name)
    return found


_ADDS = ("", "MiCALinearVariant", "DoraLinearVariant", "DoraEmbeddingVariant")
_SCALES = ("DoraLinearVariant", "DoraEmbeddingVariant")


def _variant(module: nn.Module, name: str) -> str:
    kept: Any = getattr(module, "lora_variant", {})
    return type(kept[name]).__name__ if name in kept else ""


def _is_wrapped(module: nn.Module) -> bool:
    held = module._modules
    if not type(module).__module__.startswith("peft."):
        return False
    is_layer = "base_layer" in held and hasattr(type(module), "adapter_layer_names")
    return is_layer or "modules_to_save" in held
