"""Names of the positions that hold images, videos and sounds: ``<image 3,4>``, ``<audio 17>``.

A patch of an image is named by its row and column, where the prompt or the config says how its
patches lie; else by its number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from dla_hooks.inputs.extras import OF_TEXT
from dla_hooks.inputs.prompts import Prompt, to_strings

_PLACEHOLDER = re.compile(
    r"(image|video|audio)_(token|patch|context_token)_(id|index)|image_patch_id"
)
_OF_TOKENS = {*OF_TEXT, "mm_token_type_ids"}
_Names = Mapping[int, str]
_Run = tuple[int, int, int]  # row, first column, one behind the last


def texts_of(prompt: Prompt, tokenizer: Any, config: Any = None) -> list[list[str]]:
    """The tokens of every row, as text; padding left out. Embeddings are question marks.

    Args:
        prompt: the batch.
        tokenizer: or None, for ids.
        config: of a model whose prompts hold images and the like, in positions of their own.
    """
    if prompt.embedded:
        return [["?"] * int(real.sum()) for real in prompt.mask]
    if not (prompt.padded or prompt.extras):
        return [to_strings(ids, tokenizer) for ids in prompt.input_ids.tolist()]
    names = media_names(prompt, config) if prompt.extras.keys() - OF_TEXT else {}
    found = []
    for row, (ids, real) in enumerate(zip(prompt.input_ids, prompt.mask, strict=True)):
        texts = to_strings(ids[real].tolist(), tokenizer)
        if row in names:
            columns = real.nonzero()[:, 0].tolist()
            texts = [names[row].get(at, text) for at, text in zip(columns, texts, strict=True)]
        found.append(texts)
    return found


def media_names(prompt: Prompt, config: Any) -> dict[int, dict[int, str]]:
    """A name for each position of an image and the like, by row and column."""
    found: dict[int, dict[int, str]] = {}
    for token, kind in _placeholders(config).items():
        runs = list(_runs(prompt, token))
        pieces = _by_grid(prompt.extras, kind, config, runs) or _by_square(
            prompt, config, kind, runs
        )
        several = {
            row for row, start, _ in runs if any(r == row and s != start for r, s, _ in runs)
        }
        count: dict[int, int] = {}
        for (row, start, _), places in pieces:
            count[row] = count.get(row, 0) + 1
            which = f"{count[row]}: " if row in several else ""
            names = found.setdefault(row, {})
            for number, place in enumerate(places):
                names[start + number] = f"<{kind} {which}{place}>"
    return found


def _placeholders(config: Any) -> dict[int, str]:
    """The ids that stand for one position of an image and the like, with the kind of it."""
    named = vars(config).items() if hasattr(config, "__dict__") else ()
    found = {}
    for name, value in named:
        fits = _PLACEHOLDER.fullmatch(name)
        if fits and isinstance(value, int) and value >= 0:
            found[value] = fits[1] or "image"
    return found


def _runs(prompt: Prompt, token: int) -> Iterator[_Run]:
    """Places of one id that follow each other without a gap."""
    for row, ids in enumerate(prompt.input_ids):
        here = ((ids == token) & prompt.mask[row]).nonzero()[:, 0].tolist()
        start = 0
        for place in range(1, len(here) + 1):
            if place == len(here) or here[place] != here[place - 1] + 1:
                yield row, here[start], here[place - 1] + 1
                start = place


def _by_grid(
    extras: Mapping[str, Any], kind: str, config: Any, runs: Sequence[_Run]
) -> list[tuple[_Run, list[str]]]:
    """Rows and columns by the grids that the processor gave; nothing where they do not fit."""
    grids = extras.get(f"{kind}_grid_thw")
    if not isinstance(grids, Tensor) or grids.ndim != 2 or grids.shape[1] != 3:
        return []
    vision = getattr(config, "vision_config", None)
    names = ("spatial_merge_size", "merge_size")
    merge = next((n for n in (getattr(vision, name, None) for name in names) if n), None)
    if not isinstance(merge, int):
        return []
    sizes = [(t, h // merge, w // merge) for t, h, w in grids.tolist()]
    if [t * h * w for t, h, w in sizes] != [end - start for _, start, end in runs]:
        return []
    return [
        (
            run,
            [
                f"{t},{h},{w}" if n_frames > 1 else f"{h},{w}"
                for t in range(n_frames)
                for h in range(height)
                for w in range(width)
            ],
        )
        for run, (n_frames, height, width) in zip(runs, sizes, strict=True)
    ]


def _by_square(
    prompt: Prompt, config: Any, kind: str, runs: Sequence[_Run]
) -> list[tuple[_Run, list[str]]]:
    """Rows and columns where whole square images are merged evenly; else numbers."""
    side = _patches_in_a_row(prompt.extras, config) if kind == "image" else None
    found = []
    for run in runs:
        n = run[2] - run[1]
        width = math.isqrt(n)
        square = side is not None and n > 1 and width * width == n and side % width == 0
        found.append((run, [f"{i // width},{i % width}" if square else str(i) for i in range(n)]))
    return found


def _patches_in_a_row(extras: Mapping[str, Any], config: Any) -> int | None:
    """The patches in a row of a square image; None where images may have other shapes."""
    pixels = extras.get("pixel_values")
    others = extras.keys() - _OF_TOKENS - {"pixel_values"}
    vision = getattr(config, "vision_config", None)
    size, patch = (_side(getattr(vision, name, None)) for name in ("image_size", "patch_size"))
    if others or not isinstance(pixels, Tensor) or size is None or patch is None or size % patch:
        return None
    return size // patch if tuple(pixels.shape[-2:]) == (size, size) else None


def _side(value: Any) -> int | None:
    """The side of a square, which configs give as one number or as two."""
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    return value if isinstance(value, int) and value > 0 else None
