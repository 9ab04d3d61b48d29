"""Load a model that is ready to be attributed, or refuse its checkpoint in one line.

``from_pretrained`` fills missing weights with random numbers, and makes an empty tokenizer if there
is none. Both would give meaningless numbers without an error, so both are refused here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any

from dla_hooks.errors import CheckpointError, DLAError, InputError, UnsupportedModelError
from dla_hooks.placement import Placement, first_line

DTYPES = ("float32", "float64", "bfloat16", "float16", "auto")

_IN_A_STACK = re.compile(r"\.\d+\.")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def load(
    path: str | Path,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    *,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        path: a folder, or an id on the Hugging Face hub.
        dtype: one of ``DTYPES``; "auto" is the checkpoint's own.
        device: as torch names it: "cpu", "cuda", "cuda:1", "mps"; None is "cpu".
        trust_remote_code: run Python code that comes with the checkpoint.
        device_map: instead of ``device``, for models that do not fit (extra: offload). "auto" puts
            the weights on GPUs first, then in memory, then on disk, as accelerate decides. "disk"
            leaves them on disk. Each module's are read while it runs, on the CPU.
        max_memory: with ``device_map``: the limit for the weights on each GPU and in memory, as in
            "4GiB" or "500MB". For "disk" it is the limit in memory, by default zero.

    Returns:
        The model, in evaluation mode, and the tokenizer, or None where there is none.

    Raises:
        CheckpointError: when anything is missing or cannot be read.
        UnsupportedModelError: when it holds no causal language model.
        InputError: for a dtype, device, map or size that cannot be used.
        MissingExtraError: for a ``device_map`` without accelerate.
    """
    model = load_model(
        path, dtype, device, trust_remote_code, device_map=device_map, max_memory=max_memory
    )
    return model, load_tokenizer(path, trust_remote_code)


def load_model(
    path: str | Path,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    *,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> Any:
    """Load the model alone; see :func:`load`."""
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    source = found(path)
    placement = Placement(device, device_map, max_memory)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _quiet(), _one_line(source, "config.json"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    with placement as arguments:
        with _quiet(), _one_line(source, "the weights", config.model_type):
            auto: Any = AutoModelForCausalLM  # not typed for output_loading_info
            model, info = auto.from_pretrained(
                source,
                config=config,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, in one line
                **arguments,
            )
        _check_complete(source, model, info)
        return placement.put(model)


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer alone, or return None where the checkpoint has none.

    Raises:
        CheckpointError: when there is one that cannot be read.
    """
    source = found(path)
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    with _quiet(), _one_line(source, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    return tokenizer if tokenizer.vocab_size else None


def found(path: str | Path) -> str:
    """The argument for ``from_pretrained``: a checked folder, or a hub id.

    Raises:
        InputError: for an empty name.
        CheckpointError: for a folder that is not there, or holds no model.
    """
    name = str(path)
    if not name.strip():
        raise InputError("the model's name is empty: give a folder or a hub id")
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return str(folder)
    if folder.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds it and config.json")
    if isinstance(path, Path) or name[0] in "./~" or "\\" in name or name.count("/") > 1:
        raise CheckpointError(f"there is no folder {name}")
    return name


def _check_folder(folder: Path) -> None:
    file = folder / "config.json"
    if not file.is_file():
        hint = "no model that transformers can load"
        if (folder / "adapter_config.json").is_file():
            hint = (
                "an adapter only; load its base model and put it on with PeftModel.from_pretrained "
                "in Python, or merge it into its base model and save that"
            )
        raise CheckpointError(f"{folder} has no config.json: it holds {hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{file} names no model_type, so it is no model's configuration")


def _check_complete(source: str, model: Any, info: dict[str, Any]) -> None:
    from dla_hooks.modules.weights import misfits

    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} of the model's weights ({_some(missing)}), which "
            "would be filled with random numbers; check that the checkpoint is complete"
        )
    unread = sorted(name for name in info["unexpected_keys"] if _IN_A_STACK.search(name))
    if unread:
        raise CheckpointError(
            f"{source} holds {len(unread)} weights that config.json has no place for "
            f"({_some(unread)}), as when the stack was cut short; the model would be another one"
        )
    mismatched = sorted([*info["mismatched_keys"], *misfits(model)], key=str)
    if mismatched:
        first = mismatched[0]  # its name; in transformers 5 with what was found and expected
        if not isinstance(first, str):
            name, found, expected = first
            first = f"{name}: {list(found)} instead of {list(expected)}"
        raise CheckpointError(
            f"{source}: {len(mismatched)} weights do not have the shape that config.json says "
            f"({first})"
        )


@contextmanager
def _one_line(source: str, what: str, model_type: str = "") -> Iterator[None]:
    """Turn any error of a loader into a ``DLAError``.

    Loading runs code of many packages, which raise exceptions of every class.
    """
    try:
        yield
    except DLAError:
        raise
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise CheckpointError(
                f"{source} needs Python code that comes with it; if you trust its author, pass "
                "trust_remote_code=True (on the command line --trust-remote-code)"
            ) from error
        if text.startswith("Unrecognized configuration class"):
            raise UnsupportedModelError(
                f"{source} is a {model_type!r} model, which transformers does not load as a "
                "causal language model"
            ) from error
        if "does not recognize this architecture" in text:
            raise UnsupportedModelError(
                f"{source} has a model type that the installed transformers does not know; a newer "
                "transformers may"
            ) from error
        if "couldn't connect" in text:
            raise CheckpointError(
                f"{source} is neither a folder here nor in the local cache, and the Hugging Face "
                "hub cannot be reached"
            ) from error
        raise CheckpointError(f"{source}: {what} cannot be read: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' bars and reports; problems in them are raised as errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    others = [getLogger(name) for name in ("huggingface_hub", "accelerate")]
    levels = [logger.level for logger in others]
    for logger in others:
        logger.setLevel(CRITICAL)
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        for logger, before in zip(others, levels, strict=True):
            logger.setLevel(before)
        if bars:
            logging.enable_progress_bar()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
