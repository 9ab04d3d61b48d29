"""The same weights as models of other libraries, made without a download."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

from benchmarks.models import DTYPES, Setting, make_model

INSTALL = {
    "bridge": "pip install transformer-lens==4.3.0",
    "hooked": "pip install transformer-lens==3.9.0",
    "nnsight": "pip install nnsight==0.8.1",
}


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(kind: str) -> str | None:
    """The reason why models of a kind cannot be made here, with the remedy; None if they can."""
    if kind == "nnsight":
        found = version("nnsight") is not None
        return None if found else f"nnsight is not installed: {INSTALL[kind]}"
    if kind in ("bridge", "hooked"):
        installed = version("transformer-lens")
        if installed is None:
            return f"TransformerLens is not installed: {INSTALL[kind]}"
        if kind == "hooked" and int(installed.partition(".")[0]) > 3:
            return f"TransformerLens {installed} has no HookedTransformer: {INSTALL[kind]}"
    return None


def make(kind: str, setting: Setting) -> Any:
    """A model of one kind, "hf", "bridge", "hooked" or "nnsight", with a setting's weights."""
    model = make_model(setting.model, setting.dtype, setting.device)
    if kind == "hf":
        return model
    with _quietly(), tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if kind == "nnsight":
            from nnsight import NNsight

            return NNsight(model)
        # Both loaders read the config and a tokenizer from a folder; the weights stay in memory.
        model.config.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        return {"bridge": _bridge, "hooked": _hooked}[kind](model, folder, setting)


def _bridge(model: Any, folder: str, setting: Setting) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        folder, hf_model=model, device=setting.device, dtype=DTYPES[setting.dtype]
    )
    bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge.eval()


def _hooked(model: Any, folder: str, setting: Setting) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    if model.config.model_type == "gpt2":
        model.config.n_ctx = model.config.n_positions  # which transformers 5 no longer has
        model.config.save_pretrained(folder)
    dtype = DTYPES[setting.dtype]
    # Its `from_pretrained` asks the hub even for a model that is given: call what lies below.
    config = loading.get_pretrained_model_config(
        folder, fold_ln=True, device=setting.device, dtype=dtype
    )
    state = loading.get_pretrained_state_dict(folder, config, model, dtype=dtype)
    config.tokenizer_name = None
    hooked = HookedTransformer(config, tokenizer=None, move_to_device=False)
    hooked.load_and_process_state_dict(state, fold_ln=True)
    return hooked.to(setting.device).eval()


def _tokenizer() -> Any:
    """The smallest tokenizer that a loader accepts; prompts are ids here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    vocabulary = {piece: index for index, piece in enumerate(special.values())}
    level = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=level, **special)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the loaders' own bars, prints and warnings."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            yield
