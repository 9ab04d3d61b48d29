"""What is typed, as the library takes it; and what the library says, as it was typed."""

from __future__ import annotations

import re
from typing import Any

import typer

_INT = re.compile(r"\s*[-+]?[0-9]+\s*")
_INTS = re.compile(r"\s*[-+]?[0-9]+\s*(,\s*[-+]?[0-9]+\s*)+,?\s*")
_SLICE = re.compile(r"\s*([-+]?[0-9]+)?\s*(:\s*([-+]?[0-9]+)?\s*){1,2}")

OWN = {"top": "TOP", "next": "NEXT", "runner-up": "RUNNER_UP"}
"""Words for tokens that the model or the text names, and as which the library has them."""

_OPTIONS = {
    "answer_tokens": "--answer",
    "incorrect_tokens": "--incorrect",
    "other_input": "--other-prompt",
    "other_pos": "--other-pos",
    "max_new_tokens": "--max-new-tokens",
    "max_tokens": "--max-tokens",
    "max_memory": "--max-memory",
    "device_map": "--device-map",
    "chunk_size": "--chunk-size",
    "prepend_bos": "--prepend-bos",
    "do_sample": "--sample",
    "trust_remote_code": "--trust-remote-code",
    "decoder_input": "--decoder-input",
}
"""Options under the names that the library has for them."""
_SHORT = ("unit", "pos", "dtype", "device", "parts", "part", "ablation", "against", "stop")
"""Names that are words of English, too: they are options where a value or a verb follows."""
_NAMED = re.compile(rf"\b({'|'.join(_OPTIONS)})\b(?:=(True\b)?)?")
_WITH_VALUE = re.compile(rf"(?<![\w-])({'|'.join(_SHORT)})=")
_AS_SUBJECT = re.compile(rf"^({'|'.join(_SHORT)}) (?=must |takes |is required)")
_BY_OBJECT = re.compile(r"unit=(?=dla_hooks\.)")
"""What cannot be typed: the sentence goes on in Python."""
_SLICED = re.compile(r"slice\((-?[0-9]+|None), (-?[0-9]+|None)\)")
_TWICE = re.compile(r" \(on the command line [^)]*\)")


def as_pos(pos: str | None, span: str | None = None, name: str = "--pos") -> Any:
    """What ``--pos`` or ``--span`` says, as ``pos=`` takes it.

    Raises:
        BadParameter: for what is no position, and for both.
    """
    if span is not None:
        if pos is not None:
            raise typer.BadParameter(f"it says where, and so does {name}", param_hint="'--span'")
        if not span:
            raise typer.BadParameter("it is empty", param_hint="'--span'")
        from dla_hooks.inputs.rows_of_positions import Span

        return Span(span)
    if pos is None:
        return -1
    if pos == "all":
        return None
    if _INT.fullmatch(pos):
        return int(pos)
    if _INTS.fullmatch(pos):
        return [int(part) for part in pos.split(",") if part.strip()]
    if _SLICE.fullmatch(pos):
        parts = [int(part) if part.strip() else None for part in pos.split(":")]
        if parts[2:] == [0]:
            raise typer.BadParameter("the step of a slice cannot be 0", param_hint=f"'{name}'")
        return slice(*parts)
    raise typer.BadParameter(
        f"{pos!r} is none of: an int, several as in 1,3, a slice like 2:5, 'all'",
        param_hint=f"'{name}'",
    )


def as_answer(text: str | None) -> Any:
    """A token as it was typed, or the library's object for one of :data:`OWN`."""
    if text is None or text not in OWN:
        return text
    from dla_hooks.targets import own

    return getattr(own, OWN[text])


def as_typed(message: str) -> str:
    """A message of the library, with options under the names that were typed."""

    def option(match: re.Match[str]) -> str:
        with_value = match[0].endswith("=")
        return _OPTIONS[match[1]] + " " * with_value

    line = " ".join(message.splitlines())
    line = _BY_OBJECT.sub("in Python unit\0=", line)
    line = _NAMED.sub(option, _TWICE.sub("", line))
    line = _SLICED.sub(lambda ends: ":".join(ends.groups()).replace("None", ""), line)
    line = _WITH_VALUE.sub(r"--\1 ", line).replace(" )", ")").replace("\0", "")
    return _AS_SUBJECT.sub(r"--\1 ", line)
