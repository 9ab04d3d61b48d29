"""Plain causal language models of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dla_hooks.backends.arguments import (
    call_with,
    check_extras,
    extra_arguments,
    no_mask,
    refusing,
    without_traces,
)
from dla_hooks.backends.base import Backend
from dla_hooks.backends.caches import caches_in
from dla_hooks.backends.labels import (
    LabelHead,
    label_head,
    label_names,
    last_real,
    padded_as_known,
    run_labels,
)
from dla_hooks.backends.readouts import (
    at_columns,
    instead_of,
    n_embedded,
    taken,
    token_embedding,
    unembedding,
    way_out,
    wrapped_in,
)
from dla_hooks.backends.stand_in import StandIn, switched_off
from dla_hooks.backends.two_sequences import (
    check_encoder,
    check_writes_tokens,
    decoder_of,
    of_decoder,
    of_decoder_alone,
    reads_two,
)
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.extras import MASK
from dla_hooks.inputs.prompts import Prompt
from dla_hooks.modules.outputs import tensor_in
from dla_hooks.modules.recurrent import from_the_start
from dla_hooks.modules.signature import arguments_of, takes_any, takes_keywords
from dla_hooks.modules.version import Remembered
from dla_hooks.modules.weights import run_device

_OTHER_NAMES = {
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "max_position_embeddings": ("block_size", "n_positions", "n_ctx", "max_seq_len"),
}
"""What configs of other people's call a field."""

_decoders: Remembered[bool] = Remembered()
"""Models that were found to be decoders with a linear head."""


class HuggingFaceBackend(Backend):
    """A causal LM with a ``config``."""

    _ending: StandIn | None = None

    @property
    def model_type(self) -> str:
        """``config.model_type``; the name of the class where there is none."""
        found = self._config_value("model_type")
        return found if isinstance(found, str) and found else type(self.root).__name__

    @cached_property
    def reads_two(self) -> bool:
        """Whether it is an encoder-decoder; what is attributed is then its decoder's stream."""
        return bool(reads_two(self.root))

    @cached_property
    def _labels(self) -> LabelHead | None:
        """The head of a model that scores labels instead of a vocabulary."""
        return None if unembedding(self.root) is not None else label_head(self.root)

    def check_kind(self) -> None:
        """Refuse models that are no decoders with a linear head.

        Raises:
            InputError, UnsupportedModelError: for no decoder at all; for one without such a head.
        """
        model = self.root
        is_module = isinstance(model, nn.Module)
        # Configs take long to read, and nothing that is read here has changed.
        if is_module and _decoders.find(model, self.state.version):
            return
        has_head = is_module and (unembedding(model) is not None or self._labels is not None)
        if has_head and token_embedding(model) is None:
            has_head = hasattr(model, "config")
        if not is_module or not (has_head or hasattr(model, "config")):
            raise InputError(
                "model must be a Hugging Face causal language model, a HookedTransformer or a "
                f"TransformerBridge, got {type(model).__name__}; {instead_of(model)}"
            )
        name = f"{type(model).__name__} (model type {self.model_type!r})"
        if self._config_value("is_encoder_decoder"):
            check_writes_tokens(model, name, has_labels=self._labels is not None)
        if not has_head:
            raise UnsupportedModelError(
                f"{name} has no unembedding, so there are no logits to attribute; {way_out(model)}"
            )
        if token_embedding(model) is None:
            raise UnsupportedModelError(
                f"{name} has no token embeddings that can be found; give it a method "
                "get_input_embeddings() that returns the module"
            )
        _decoders.keep(model, self.state.version, True)

    def check_prompt(self, prompt: Prompt) -> None:
        """Refuse arguments that the forward does not take, and a classifier's prompt whose last
        token is not the one that it reads.

        Raises:
            InputError: for such an argument, or a row that ends with the model's pad token.
        """
        if prompt.encoder is not None:
            check_encoder(self.root, prompt)
        elif prompt.extras:
            attention = self.number("_attn_implementation")
            check_extras(self.root, prompt, self.n_tokens(), attention)
        pad = self.number("pad_token_id") if self._labels is not None else None
        if not isinstance(pad, int) or prompt.embedded:
            return
        columns = torch.arange(prompt.shape[1], device="cpu")
        last = (columns * prompt.mask).amax(-1)
        ends = prompt.input_ids[torch.arange(len(last), device="cpu"), last]
        if bool((ends == pad).any()):
            raise InputError(
                f"row {int((ends == pad).nonzero()[0])} of the input ends with the model's pad "
                f"token ({pad}), and {type(self.root).__name__} reads the last token that is none; "
                "leave padding out, or give attention_mask"
            )

    def answer_tokenizer(self, tokenizer: Any) -> Any:
        """The names of a classifier's labels, in the place of a tokenizer."""
        return tokenizer if self._labels is None else label_names(self.root, self._labels)

    @property
    def scores_labels(self) -> bool:
        """True for a model whose logits are labels' and not tokens'."""
        return self._labels is not None

    def stand_in(self, layers: str, final_norm: str) -> tuple[nn.Module, str] | None:
        if not switched_off(self.root, final_norm):
            return None
        blocks = self.root.get_submodule(layers)
        if self._ending is None and isinstance(blocks, nn.ModuleList) and len(blocks):
            self._ending = StandIn(blocks[-1], f"{layers}.{len(blocks) - 1}")
        return None if self._ending is None else (self._ending.module, self._ending.name)

    @property
    def stands_in(self) -> bool:
        return self._ending is not None

    @property
    def _accepted(self) -> Mapping[str, Any]:
        """The arguments that the model takes; of a wrapper that hands on all, the model inside."""
        accepted = arguments_of(self.root)
        inside = None if self._labels is None else wrapped_in(self.root)
        if inside is None or not takes_keywords(accepted):
            return accepted
        return {**arguments_of(inside), **accepted}

    @cached_property
    def _keeps_columns(self) -> bool:
        """Whether it takes the columns of logits; old remote code takes a count from the end."""
        return "Tensor" in str(self._accepted["logits_to_keep"].annotation)

    def embedding(self) -> nn.Module:
        found = token_embedding(decoder_of(self.root) if self.reads_two else self.root)
        assert found is not None
        return found

    def n_tokens(self) -> int:
        found = n_embedded(self.embedding())
        if found is None:
            found = self.number("vocab_size")
        if not isinstance(found, int):
            raise UnsupportedModelError(
                f"the embeddings of {type(self.root).__name__} ({type(self.embedding()).__name__}) "
                "do not say how many tokens they know; give them num_embeddings"
            )
        return found

    def unembed(self) -> nn.Module:
        found = unembedding(self.root) if self._labels is None else self._labels.module
        assert found is not None
        return found

    def number(self, field: str) -> Any:
        for name in (field, *_OTHER_NAMES.get(field, ())):
            found = self._config_value(name, text=True)
            if found is not None:
                return found
        return None

    def _config_value(self, field: str, *, text: bool = False) -> Any:
        """A field of the config, which may be a dict, a dataclass, or missing."""
        config: Any = getattr(self.root, "config", None)
        if isinstance(config, Mapping):
            return config.get(field)
        if text and hasattr(config, "get_text_config"):
            config = config.get_text_config()
        return getattr(config, field, None)

    def run(self, prompt: Prompt, columns: Tensor | None) -> Tensor:
        return self._run(prompt, range(prompt.shape[1]), columns, {"use_cache": False})[0]

    def run_chunk(
        self, prompt: Prompt, chunk: range, columns: Tensor | None, past: Any
    ) -> tuple[Tensor, Any]:
        # Switch hands use_cache on to its encoder, which refuses it; its decoder caches by default.
        by_default = self.reads_two and self.number("use_cache") is True
        keep = {} if by_default else {"use_cache": True}
        logits, output = self._run(prompt, chunk, columns, {**keep, **(past or {})})
        return logits, caches_in(output, self._accepted, type(self.root).__name__)

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
        accepted = self._accepted
        device = run_device(self.embedding())
        arguments: dict[str, Any] = taken({**options, "return_dict": True}, accepted)
        own = of_decoder_alone(accepted) if self.reads_two else accepted
        if prompt.padded and MASK not in own and not takes_any(self.root):
            raise no_mask(self.root)
        arguments |= extra_arguments(prompt, chunk, own, device)
        if columns is None:
            columns = torch.tensor([chunk.stop - 1], device="cpu")
        wanted = columns - chunk.start if chunk.start else columns
        ids = None
        if not prompt.embedded:
            ids = prompt.input_ids
            if self._labels is not None:
                ids = padded_as_known(prompt, self.number("pad_token_id"))
            if len(chunk) < ids.shape[1]:
                ids = ids[:, chunk.start : chunk.stop]
            ids = ids.to(device)
        if self.reads_two:
            ids, arguments = None, of_decoder(self.root, ids, arguments, prompt, device)
        if "logits_to_keep" in accepted and self._labels is None:
            if self._keeps_columns:
                arguments["logits_to_keep"] = wanted.to(device)
            else:
                arguments["logits_to_keep"] = len(chunk) - int(wanted.min())
        in_chunks = len(chunk) < prompt.shape[1]
        traces = without_traces(self.root, in_chunks=in_chunks)
        ending = nullcontext() if self._ending is None else self._ending.running()
        start = from_the_start(self.root)
        with refusing(self.root, prompt), traces, start, ending:
            if self._labels is None:
                output, logits = self._call(ids, arguments, accepted)
            else:
                last = last_real(prompt, chunk)
                given = call_with(ids, arguments, accepted)
                output, logits = run_labels(self.model, self._labels, *given, last)
        if not ("logits_to_keep" in arguments and logits.shape[1] == len(wanted)):
            logits = at_columns(logits, wanted, len(chunk), type(self.root).__name__)
        return logits, output

    def _call(
        self, ids: Tensor | None, arguments: dict[str, Any], accepted: Mapping[str, Any]
    ) -> tuple[Any, Tensor]:
        """Run the model: its output, and the logits [batch, n, vocabulary] in it."""
        given, arguments = call_with(ids, arguments, accepted)
        output = self.model(*given, **arguments)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            logits = tensor_in(output, ("logits",))
        if logits is None or logits.ndim != 3:
            raise UnsupportedModelError(
                f"{type(self.root).__name__} returns a {type(output).__name__} without logits "
                "[batch, position, vocabulary]; let its forward return them first, or as `logits`"
            )
        return output, logits
