"""Plain causal language models of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.kinds.base import Kind
from dla_hooks.tokens import Prompt
from dla_hooks.weights import run_device


class HuggingFace(Kind):
    """A causal LM with a ``config``."""

    @property
    def model_type(self) -> str:
        return str(self.root.config.model_type)

    def check(self) -> None:
        """Refuse what is no causal language model.

        Raises:
            InputError: for something that is no Hugging Face model at all.
            UnsupportedModelError: for encoders, encoder-decoders and models without an LM head.
        """
        model = self.root
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise InputError(
                "model must be a Hugging Face causal language model, a HookedTransformer or a "
                f"TransformerBridge, got {type(model).__name__}; load one with "
                "AutoModelForCausalLM.from_pretrained(folder)"
            )
        name = f"{type(model).__name__} (model type {self.model_type!r})"
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"{name} is an encoder-decoder: its decoder's stream also holds what the encoder "
                "wrote. Only decoder-only causal language models can be attributed."
            )
        find_unembed: Any = getattr(model, "get_output_embeddings", lambda: None)
        if find_unembed() is None:
            raise UnsupportedModelError(
                f"{name} has no unembedding, so there are no logits to attribute; "
                "load it with AutoModelForCausalLM"
            )

    def embedding(self) -> nn.Module:
        found: nn.Module = self.root.get_input_embeddings()
        return found

    def n_tokens(self) -> int:
        weight: Any = self.embedding().weight
        return int(weight.shape[0])

    def unembed(self) -> nn.Module:
        found: nn.Module = self.root.get_output_embeddings()
        return found

    def number(self, field: str) -> Any:
        return getattr(self.root.config.get_text_config(), field, None)

    def run(self, prompt: Prompt, columns: Tensor | None) -> Tensor:
        model = self.model
        accepted = inspect.signature(self.root.forward).parameters
        device = run_device(self.embedding())
        arguments: dict[str, Any] = {"input_ids": prompt.input_ids.to(device), "use_cache": False}
        if prompt.padded:
            if "attention_mask" not in accepted:
                raise UnsupportedModelError(
                    f"{type(self.root).__name__} takes no attention mask, so that padding would "
                    "change its logits; run prompts of different lengths one at a time"
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
