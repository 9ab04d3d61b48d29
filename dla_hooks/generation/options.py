"""The options of the model's own ``generate``: which of them are refused, and when a row ends.

Each new token must come from one forward pass of the model on one row of the batch. Options by
which it does not are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from dla_hooks.backends import Backend
from dla_hooks.backends.huggingface import HuggingFaceBackend
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.residual.stream import Stream

_ONE_RUN = "each new token must come from one forward pass of one row"
_OWN = "it is an argument of attribute_generation itself"

_COUNTS = {"num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "guidance_scale": 1}
"""Options that are refused unless they have this value, or None."""

_REFUSED = {
    "assistant_model": f"assisted decoding runs several tokens at once, and {_ONE_RUN}",
    "assistant_early_exit": f"assisted decoding runs several tokens at once, and {_ONE_RUN}",
    "prompt_lookup_num_tokens": f"assisted decoding runs several tokens at once, and {_ONE_RUN}",
    "use_mtp": f"assisted decoding runs several tokens at once, and {_ONE_RUN}",
    "penalty_alpha": f"contrastive search runs the model on candidates, and {_ONE_RUN}",
    "dola_layers": "the token would come from other logits than the last layer's",
    "constraints": f"constrained beam search keeps several beams, and {_ONE_RUN}",
    "force_words_ids": f"constrained beam search keeps several beams, and {_ONE_RUN}",
    "custom_generate": f"what it runs is not known, and {_ONE_RUN}",
    "token_healing": "it changes the prompt",
}
"""Options that are refused when they are set, in a call or in a generation config."""

_GROWING = (None, "dynamic", "dynamic_full", "offloaded", "hybrid")
"""Caches that grow with the text; transformers takes the last for the first."""

_NOT_HERE = {
    "inputs": "give the prompt as input",
    "input_ids": "give the prompt as input",
    "inputs_embeds": "give the prompt as input, as a string or as ids",
    "max_length": "give max_new_tokens",
    "stopping_criteria": "give them as stop=, which takes a callable of (input_ids, scores)",
    "stop_strings": "give them as stop=",
    "past_key_values": "the prompt is run from its beginning",
    "negative_prompt_ids": f"guidance runs the model a second time, and {_ONE_RUN}",
    "return_dict_in_generate": "the result has the tokens as generated_ids",
    "output_scores": "the result has the tokens as generated_ids",
    "output_logits": "the result has the tokens as generated_ids",
    "output_attentions": "the unit 'source' has what each head reads",
    "output_hidden_states": "dla_hooks.decompose_resid has the streams of a text",
}
"""Options that have no place in a call."""


def check_model(backend: Backend) -> None:
    """Refuse a model that cannot generate by transformers' own ``generate``.

    Raises:
        UnsupportedModelError: saying what can be done instead.
    """
    model, name = backend.model, backend.name
    if not isinstance(backend, HuggingFaceBackend):
        raise UnsupportedModelError(
            f"{name} does not generate as models of transformers do; pass the Hugging Face model "
            "itself, or attribute the finished text (direct_logit_attribution)"
        )
    can = getattr(model, "can_generate", None)
    if not callable(getattr(model, "generate", None)) or (callable(can) and not can()):
        raise UnsupportedModelError(
            f"{name} has no generate of transformers' (GenerationMixin); attribute a finished text "
            "with direct_logit_attribution"
        )
    if backend.reads_two and type(backend.root).generate is not GenerationMixin.generate:
        raise UnsupportedModelError(
            f"{name} has a generate of its own, whose tokens may come from several runs or passes; "
            "attribute the finished text, given as decoder_input_ids"
        )
    if backend.scores_labels:
        raise UnsupportedModelError(f"{name} scores labels, and generates no text")


def check_stream(stream: Stream) -> None:
    """Refuse a located model that a new token does not run as the finished text does.

    Raises:
        UnsupportedModelError: saying what can be done instead.
    """
    name = stream.backend.name
    if stream.backend.stands_in:
        raise UnsupportedModelError(
            f"{name} was made without a final norm, and its last stream is seen in runs of a "
            "finished text only: direct_logit_attribution"
        )
    idle = next((block for block in stream.blocks if block.optional), None)
    if idle is not None:
        raise UnsupportedModelError(
            f"{name} runs some blocks only beside an image ({idle.name}), which is not followed "
            "while it generates; attribute the finished text with direct_logit_attribution"
        )


def check_options(model: Any, options: Mapping[str, Any]) -> None:
    """Refuse options by which a token is no longer one forward pass of one row.

    Args:
        model: whose ``generation_config`` holds what the options leave out.
        options: further arguments of ``generate``, ``do_sample`` among them.

    Raises:
        InputError: naming the option.
    """
    for name, instead in _NOT_HERE.items():
        if options.get(name) is not None:
            raise InputError(f"{name} cannot be given to attribute_generation: {instead}")
    if getattr(options.get("generation_config"), "do_sample", False) and not options["do_sample"]:
        raise InputError(
            "generation_config says do_sample=True; say it to attribute_generation as well, whose "
            "own do_sample is False"
        )
    for name, reason in _REFUSED.items():
        if value_of(model, options, name) not in (None, False):
            raise InputError(f"{name} cannot be used in attribute_generation: {reason}")
    for name, plain in _COUNTS.items():
        value = value_of(model, options, name)
        if value not in (None, plain):
            raise InputError(
                f"{name}={value!r} cannot be used in attribute_generation: {_ONE_RUN}. Leave it out"
            )
    if value_of(model, options, "cache_implementation") == "quantized":
        raise InputError(
            "cache_implementation='quantized' changes what later tokens read, so that the numbers "
            "would not be those of the finished text; leave it out"
        )


def check_growing_cache(model: Any, options: Mapping[str, Any]) -> None:
    """Refuse a cache whose keys and values have places that hold no token yet.

    Raises:
        InputError: naming the kind of cache.
    """
    kind = value_of(model, options, "cache_implementation")
    if kind not in _GROWING:
        raise InputError(
            f"cache_implementation={kind!r} has places for tokens that are yet to come, so that "
            "which token a head reads cannot be told by its place; leave it out, or give None"
        )


def value_of(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """An option as ``generate`` reads it: of the call, of its config, or of the model's."""
    if name in options:
        return options[name]
    for config in (options.get("generation_config"), getattr(model, "generation_config", None)):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def ends_of_text(model: Any, options: Mapping[str, Any]) -> frozenset[int]:
    """The tokens that end a row."""
    found = value_of(model, options, "eos_token_id")
    if isinstance(found, Tensor):
        found = found.flatten().tolist()
    several = found if isinstance(found, (list, tuple)) else [found]
    return frozenset(int(token) for token in several if token is not None)
