"""The plain forward pass: the prompt in, a few columns of logits out."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from dla_hooks.errors import UnsupportedModelError
from dla_hooks.tokens import Prompt
from dla_hooks.weights import run_device


def run_model(model: Any, prompt: Prompt, columns: Tensor | None) -> Tensor:
    """The plain forward pass, with logits at a few columns only.

    Args:
        model: a Hugging Face causal LM.
        prompt: the batch.
        columns: columns of the prompt [n], or None for the last.

    Returns:
        Logits [batch, n, vocabulary].
    """
    accepted = inspect.signature(model.forward).parameters
    device = run_device(model.get_input_embeddings())
    arguments: dict[str, Any] = {"input_ids": prompt.input_ids.to(device), "use_cache": False}
    if prompt.padded:
        if "attention_mask" not in accepted:
            raise UnsupportedModelError(
                f"{type(model).__name__} takes no attention mask, so that padding would change "
                "its logits; run prompts of different lengths one at a time"
            )
        arguments["attention_mask"] = prompt.mask.long().to(device)
        if "position_ids" in accepted:
            arguments["position_ids"] = prompt.position_ids().to(device)
    if columns is None:
        columns = torch.tensor([prompt.input_ids.shape[1] - 1])
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = columns.to(device)
        logits: Tensor = model(**arguments, return_dict=True).logits
        return logits
    logits = model(**arguments, return_dict=True).logits
    return logits[:, columns.to(logits.device)]
