"""The command and the call that make a report again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_DEMO = Path(__file__).parents[1] / "demo" / "model"
_PAGE = "page.html"


def model_name(model: Any) -> str:
    """What a reader can load the model by: a name on the hub, "demo", or a folder's own name."""
    inner = getattr(model, "hf_model", None) or getattr(model, "model", None) or model
    named = getattr(model, "name_or_path", None) or getattr(
        getattr(inner, "config", None), "_name_or_path", ""
    )
    if not isinstance(named, str) or not named:
        return ""
    path = Path(named)
    if path == _DEMO:
        return "demo"
    if path.is_absolute() or path.is_dir():  # where it lies is no business of the reader's
        return path.name
    return named


def call(name: str, kind: str, dtype: str, input: Any, asked: Mapping[str, Any]) -> str:
    """Lines of Python.

    Args:
        name: of the model, from :func:`model_name`.
        kind: the class of the model.
        dtype: of its weights.
        input: one prompt as it was given.
        asked: the arguments behind it, by name; None and defaults left out.
    """
    if name == "demo":
        load = ["model, tokenizer = dla_hooks.demo.load()"]
    else:
        folder = repr(name or "MODEL")
        load = [
            f"model = transformers.{kind}.from_pretrained({folder}, dtype=torch.{dtype}).eval()",
            f"tokenizer = transformers.AutoTokenizer.from_pretrained({folder})",
        ]
    imports = ["import dla_hooks"] if name == "demo" else ["import torch, transformers, dla_hooks"]
    given = [repr(input) if isinstance(input, str) else "input"]
    arguments = [*given, *(f"{key}={value!r}" for key, value in asked.items())]
    lines = [f"    {argument}," for argument in ["model", *arguments, "tokenizer=tokenizer"]]
    return "\n".join([*imports, *load, "dla_hooks.report(", *lines, f'    path="{_PAGE}",', ")"])


def command(name: str, input: Any, asked: Mapping[str, Any], dtype: str) -> str | None:
    """One line for a shell; None where a shell cannot say what was asked."""
    answer, incorrect = asked.get("answer_tokens"), asked.get("incorrect_tokens")
    if not (name and isinstance(input, str) and isinstance(answer, str)):
        return None
    if not isinstance(incorrect, str | None) or "\0" in f"{input}{answer}{incorrect}":
        return None
    options = set(asked) - {"answer_tokens", "incorrect_tokens", "units", "prepend_bos"}
    units = asked.get("units")
    if options or not (units is None or all(isinstance(one, str) for one in units)):
        return None
    parts = ["dla-hooks", "report", shlex.quote(name), shlex.quote(input)]
    parts += [f"--answer={shlex.quote(answer)}"]
    if incorrect is not None:
        parts.append(f"--incorrect={shlex.quote(incorrect)}")
    for unit in units or ():
        parts.append(f"--unit={unit}")
    if "prepend_bos" in asked:
        parts.append("--prepend-bos" if asked["prepend_bos"] else "--no-prepend-bos")
    if dtype != "float32":
        parts.append(f"--dtype={dtype}")
    return " ".join([*parts, "-o", _PAGE])
