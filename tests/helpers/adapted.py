"""Models with PEFT adapters, and what vectors in their stream give in the logits."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from oracle_families import family_of, final_norm, frozen_norm, module_at
from zoo import build

from dla_hooks import direct_logit_attribution

peft = pytest.importorskip("peft")

ANSWER, INCORRECT = 5, 7


def lora(*targets, **options):
    options = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.5, **options}
    return peft.LoraConfig(target_modules=list(targets), **options)


@torch.no_grad()
def filled(model, seed=0):
    """The adapters' own weights drawn anew: as they come they change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if "lora_" in name and "magnitude" not in name:
            parameter.copy_(0.3 * noise)
        elif any(part in name for part in ("modules_to_save", "magnitude", "ia3_", "oft_")):
            parameter.copy_(parameter + 0.3 * noise)
    return model.eval()


def adapted(spec, config, seed=0, dtype=torch.float64):
    return filled(peft.get_peft_model(build(spec, seed, dtype), copy.deepcopy(config)), seed)


def attribute(model, ids, **options):
    options = {"unit": "adapter", "pos": None, **options}
    return direct_logit_attribution(model, ids, ANSWER, INCORRECT, **options)


@contextlib.contextmanager
def inputs_of(modules):
    """What enters and leaves each module in one run: (input, output), by its key."""
    seen = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, out, key=key: seen.__setitem__(key, (args[0], out))
        )
        for key, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def own_scale(kind, norm, x, y):
    """The number that a norm divided by at each position: itself it computes in float32."""
    one = torch.ones_like(x[..., :1])
    beta = frozen_norm(kind, norm, torch.zeros_like(x), one)
    a = frozen_norm(kind, norm, x, one) - beta
    return (a * a).sum(-1, keepdim=True) / (a * (y - beta)).sum(-1, keepdim=True)


@torch.no_grad()
def in_logits(inner, ids, vectors):
    """What vectors [batch, pos, d_model] in the last stream give in the logit difference."""
    family, norm = family_of(inner), final_norm(inner)
    with inputs_of({0: norm}) as seen:
        inner(ids, use_cache=False)
    scale = own_scale(family.norm, norm, *(tensor.double() for tensor in seen[0]))

    def read(x):
        normed = frozen_norm(family.norm, norm, x, scale)
        W = module_at(inner, family.head).weight.double()
        return normed @ (W[ANSWER] - W[INCORRECT]) * family.logit_scale(inner.config)

    return read(vectors) - read(torch.zeros_like(vectors))


def layers_of(inner):
    return module_at(inner, family_of(inner).layers)


def delta_of(module, name):
    """The matrix that an adapter adds [d_out, d_in]."""
    A, B, alpha = module.lora_A[name], module.lora_B[name], module.lora_alpha[name]
    if isinstance(A, torch.nn.Parameter):  # AdaLoRA
        return B @ torch.diag(module.lora_E[name][:, 0]) @ A * alpha / (module.ranknum[name] + 1e-5)
    rank = A.weight.shape[0]
    by = alpha / rank**0.5 if module.use_rslora[name] else alpha / rank
    return B.weight @ A.weight * by
