"""Reference models without a download: TransformerLens models built from tiny random HF ones.

Needs the extra ``tl`` (TransformerLens 3.9).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch


def hooked(model: Any, folder: Path, *, processed: bool = True) -> Any:
    """A ``HookedTransformer`` from a HF model saved to ``folder``, processed by default or not.

    Its ``from_pretrained`` asks the hub even for a model that is given, so the pieces below it are
    called instead. The folder's path must contain neither "llama" nor "gemma".
    """
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    model = copy.deepcopy(model)
    if model.config.model_type == "gpt2":
        model.config.n_ctx = model.config.n_positions  # dropped by transformers 5
    model.save_pretrained(folder)
    dtype = next(model.parameters()).dtype
    config = loading.get_pretrained_model_config(
        str(folder), fold_ln=processed, device="cpu", dtype=dtype
    )
    state = loading.get_pretrained_state_dict(str(folder), config, model, dtype=dtype)
    config.tokenizer_name = None
    reference = HookedTransformer(config, tokenizer=None, move_to_device=False)
    reference.load_and_process_state_dict(
        state,
        fold_ln=processed,
        center_writing_weights=processed,
        center_unembed=processed and config.output_logits_soft_cap <= 0,
        fold_value_biases=processed,
    )
    return reference.eval()


def log_probabilities_agree(reference: Any, model: Any, ids: torch.Tensor) -> bool:
    """Whether a reference model was loaded faithfully at all."""
    with torch.no_grad():
        theirs = reference(ids).log_softmax(-1)
        ours = model(ids).logits.log_softmax(-1)
    return bool(torch.allclose(theirs, ours, atol=1e-4))
