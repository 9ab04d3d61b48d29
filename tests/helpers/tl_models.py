"""Reference models without a download: TransformerLens models built from tiny random HF ones.

Needs the extra ``tl``. The builders refuse a reference that does not say what the raw model says,
so that nothing is ever compared with a model that was loaded wrongly.

    reference = bridged(build("gpt2", dtype=torch.float32), folder)     # 3.9 and 4.3
    reference = hooked(build("gpt2", dtype=torch.float32), folder)      # 3.9 only

Tests take them from the fixture ``references``, which builds each only once:

    model, reference = references.raw("gpt2"), references.bridged("gpt2")
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging
from zoo import _GPT_NEO, Spec, _old_sizes, _sizes, _spec, build, tiny_tokenizer

# Families whose attribution the reference gets right, see each exception in `parity`.
FROM_THE_ZOO = (
    *("gpt2", "gpt2-odd-width", "gpt2-untied", "gpt_neo", "gptj"),
    *("gpt_neox-parallel", "gpt_neox-sequential"),
    *("opt", "opt-no-bias", "bloom", "bloom-untied"),
    *("llama", "llama-mqa", "llama-mha-tied", "llama-bias", "llama-wide-heads"),
    *("mistral", "mistral-narrow-heads", "mixtral", "mixtral-tied"),
    *("qwen2", "qwen2-tied-window", "qwen3", "qwen3-bias-tied", "qwen3_moe"),
    *("gemma", "gemma-bias-untied", "gemma3_text"),
    *("phi", "phi3", "phi3-mha-tied", "falcon-7b", "falcon-rw"),
    *("stablelm-parallel", "stablelm-sequential", "olmo"),
)
# Families that the zoo lacks, or has only with a switch that some reference misses: bridges drop
# the epsilon of starcoder2 and fold through olmo's clipped values; HookedTransformers know neither
# bloom with another number of heads than a power of two nor gpt_neo with an MLP of its own width.
MORE = (
    _spec("bloom-four-heads", _old_sizes(71, 32, 2, 4)),
    _spec("gpt_neo-fourfold", {**_GPT_NEO, "intermediate_size": None}),
    _spec("starcoder2-plain", _sizes(85, 40, 50, 2, 4, 2)),
    _spec("olmo-gqa", _sizes(71, 40, 50, 2, 4, 2), attention_bias=True, tie_word_embeddings=True),
    _spec("mpt-plain", vocab_size=73, d_model=40, n_layers=2, n_heads=4, max_seq_len=64),
)
NAMES: tuple[str, ...] = (*FROM_THE_ZOO, *(spec.name for spec in MORE))

# A HookedTransformer of these says what the raw model says.
HOOKED = (
    *("gpt2", "gpt2-untied", "gpt_neo-fourfold", "gptj", "gpt_neox-parallel"),
    *("gpt_neox-sequential", "opt", "bloom-four-heads", "llama", "llama-mqa", "llama-mha-tied"),
    *("mistral", "mistral-narrow-heads", "mixtral", "mixtral-tied", "qwen2", "qwen3"),
    *("phi3", "phi3-mha-tied"),
)


def has_hooked() -> bool:
    """Whether this TransformerLens still has the ``HookedTransformer``."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


def spec_called(name: str) -> Spec | str:
    return next((spec for spec in MORE if spec.name == name), name)


def raw(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The raw model that a reference is built from, and compared with."""
    return build(spec_called(name), seed=seed, dtype=dtype)


def ids_for(model: Any, batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length], specials left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)


def hooked(model: Any, folder: Path, fold_ln: bool = True, **processing: bool) -> Any:
    """A ``HookedTransformer``, processed by default, from a HF model saved to ``folder``.

    Its ``from_pretrained`` asks the hub even for a model that is given, so the pieces below it are
    called instead. The folder's path must contain neither "llama" nor "gemma".
    """
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    original, model = model, copy.deepcopy(model)
    if model.config.model_type == "gpt2":
        model.config.n_ctx = model.config.n_positions  # dropped by transformers 5
    dtype = next(model.parameters()).dtype
    _save(model, folder)
    with _quietly():
        config = loading.get_pretrained_model_config(
            str(folder), fold_ln=fold_ln, device="cpu", dtype=dtype
        )
        state = loading.get_pretrained_state_dict(str(folder), config, model, dtype=dtype)
        config.tokenizer_name = None  # else it is looked up on the hub
        reference = HookedTransformer(config, tokenizer=_tokenizer(folder), move_to_device=False)
        reference.load_and_process_state_dict(state, fold_ln=fold_ln, **processing)
    reference.eval()
    _check(reference, original)
    return reference


def bridged(model: Any, folder: Path, compatible: bool = True, **processing: bool) -> Any:
    """A ``TransformerBridge``, in compatibility mode unless told otherwise.

    It works on the modules that it is given, so it is given copies.
    """
    original, model = model, copy.deepcopy(model)
    reference = booted(model, folder)
    if compatible:
        with _quietly():
            reference.enable_compatibility_mode(disable_warnings=True, **processing)
    reference.eval()
    _check(reference, original)
    return reference


def booted(model: Any, folder: Path) -> Any:
    """A ``TransformerBridge`` around the modules of a model, unchecked."""
    from transformer_lens.model_bridge import TransformerBridge

    _save(model, folder)
    with _quietly():
        return TransformerBridge.boot_transformers(
            str(folder), hf_model=model, device="cpu", tokenizer=_tokenizer(folder)
        )


class References:
    """Builds each model and each of its references once, and keeps them."""

    def __init__(self, new_folder: Callable[[], Path]) -> None:
        self._new_folder = new_folder
        self.raw = functools.cache(raw)
        self.bridged = functools.cache(functools.partial(self._built, bridged))
        self.hooked = functools.cache(functools.partial(self._built, hooked))

    def _built(
        self,
        builder: Callable[..., Any],
        name: str,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **processing: bool,
    ) -> Any:
        return builder(self.raw(name, seed, dtype), self._new_folder(), **processing)


def _save(model: Any, folder: Path) -> None:
    """Both loaders read the config; the weights stay in memory."""
    model.config.save_pretrained(folder)


def _tokenizer(folder: Path) -> Any:
    """A tokenizer that knows its folder, as both loaders want it: they load it again from there.

    The folder has no config, which would make ``AutoTokenizer`` take the class of the model's type,
    and that splits text in its own way.
    """
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


@contextlib.contextmanager
def _quietly():
    """Without the reference's progress bars and prints, which would bury the tests' own output.

    TransformerLens 3.9 says that its HookedTransformer goes, whichever test makes the first one.
    """
    logging.disable_progress_bar()
    out, err = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    try:
        with out, err, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "HookedTransformer is deprecated")
            yield
    finally:
        logging.enable_progress_bar()


def _check(reference: Any, model: Any) -> None:
    ids = ids_for(model, seed=7)
    if not log_probabilities_agree(reference, model, ids):
        raise RuntimeError(f"the reference was not loaded faithfully: {model.config.model_type}")


def log_probabilities_agree(reference: Any, model: Any, ids: torch.Tensor) -> bool:
    """Whether a reference model was loaded faithfully at all."""
    with torch.no_grad():
        theirs = reference(ids).log_softmax(-1)
        ours = model(ids).logits.log_softmax(-1)
    return bool(torch.allclose(theirs, ours, atol=1e-4))
