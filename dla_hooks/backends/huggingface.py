"""Plain causal language models of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.backends.base import Backend
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.weights import run_device

_CACHES = {
    "cache": ("cache",),
    "past_key_values": ("cache", "past_key_values"),
    "cache_params": ("cache", "cache_params"),
    "state": ("state",),
}
"""Arguments that take the cache of earlier tokens, and the output's names for the same cache.

transformers 5.24 renamed the second and the third to the first. Its outputs rename them in models
of other people's, too, whose arguments stay as they were.
"""

_EXACT_LAYERS = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
}
"""Layers of transformers' caches that keep unchanged all that later tokens read."""


class HuggingFaceBackend(Backend):
    """A causal LM with a ``config``."""

    @property
    def model_type(self) -> str:
        return str(self.root.config.model_type)

    def check_kind(self) -> None:
        """Refuse models that are not causal language models.

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
        return self._run(prompt, range(prompt.shape[1]), columns, {"use_cache": False})[0]

    def run_chunk(
        self, prompt: Prompt, chunk: range, columns: Tensor | None, past: Any
    ) -> tuple[Tensor, Any]:
        logits, output = self._run(prompt, chunk, columns, {"use_cache": True, **(past or {})})
        # The model makes the cache that suits it: sliding windows, states, whatever it needs.
        accepted = _accepted(self.root)
        found: dict[str, Any] = {}
        for argument in (name for name in _CACHES if name in accepted):
            handed_on = (output.get(name) for name in _CACHES[argument])
            cache = next((cache for cache in handed_on if cache is not None), None)
            if cache is not None:
                found[argument] = cache
        if not found:
            raise UnsupportedModelError(
                f"{type(self.root).__name__} hands on no cache of what it has read"
            )
        unknown = {
            type(layer).__name__
            for cache in found.values()
            for layer in getattr(cache, "layers", ())
        } - _EXACT_LAYERS
        if unknown:
            raise UnsupportedModelError(
                f"its cache ({', '.join(sorted(unknown))}) is not known to be exact; sparse "
                "attention, for example, picks other tokens where scores tie"
            )
        return logits, found

    def _run(
        self, prompt: Prompt, chunk: range, columns: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        """Run a chunk: logits at some of its columns, and the model's whole output.

        Args:
            prompt: the whole batch.
            chunk: the columns to run; those before are in the cache.
            columns: as in :meth:`forward`, all within the chunk.
            options: further arguments of the model.
        """
        model = self.model
        accepted = _accepted(self.root)
        device = run_device(self.embedding())
        here = slice(chunk.start, chunk.stop)
        arguments: dict[str, Any] = {"input_ids": prompt.input_ids[:, here].to(device), **options}
        if prompt.padded:
            if "attention_mask" not in accepted:
                raise UnsupportedModelError(
                    f"{type(self.root).__name__} takes no attention mask, so that padding would "
                    "change its logits; run prompts of different lengths one at a time"
                )
            arguments["attention_mask"] = prompt.mask[:, : chunk.stop].long().to(device)
            if "position_ids" in accepted:
                arguments["position_ids"] = prompt.position_ids()[:, here].to(device)
        if columns is None:
            columns = torch.tensor([chunk.stop - 1])
        wanted = columns - chunk.start
        if "logits_to_keep" in accepted:
            arguments["logits_to_keep"] = wanted.to(device)
            output = model(**arguments, return_dict=True)
            return output.logits, output
        output = model(**arguments, return_dict=True)
        return output.logits[:, wanted.to(output.logits.device)], output


def _accepted(model: nn.Module) -> Collection[str]:
    """The names of the arguments that a model's forward pass takes.

    A function put in its place may take anything and hand it on. The class then names them.
    """
    for forward in (model.forward, *(vars(cls).get("forward") for cls in type(model).__mro__)):
        names: Collection[str] = inspect.signature(forward).parameters if forward else ()
        if "input_ids" in names:
            break
    return names
