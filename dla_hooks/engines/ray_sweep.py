"""Many prompts on Ray: blocks of them by workers, and their results in order."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dla_hooks.engines.worker import Recipe
from dla_hooks.errors import CheckpointError, DLAError, InputError, MissingExtraError
from dla_hooks.inputs.rows_of_positions import PerRow
from dla_hooks.many.sweep import attribute_many
from dla_hooks.results.files import write_text
from dla_hooks.results.summarize import summarize
from dla_hooks.results.summary import Summary

_MOST = 1024  # prompts of a block
_BLOCKS_OF_A_WORKER = 4  # at least, so that all are busy to the end
_SIZE = "blocks.json"


@dataclass(frozen=True)
class Prompts:
    """Prompts, and what is asked of each.

    Attributes:
        prompts: texts.
        answer_tokens: one for all, or one for each.
        incorrect_tokens: likewise, or None.
        pos: positions of all, or ``PerRow``.
    """

    prompts: list[str]
    answer_tokens: Any
    incorrect_tokens: Any
    pos: Any

    def block(self, start: int, stop: int) -> Prompts:
        """Those of a range."""
        own, wrong = (
            value[start:stop] if isinstance(value, list) else value
            for value in (self.answer_tokens, self.incorrect_tokens)
        )
        pos = PerRow(self.pos.rows[start:stop]) if isinstance(self.pos, PerRow) else self.pos
        return Prompts(self.prompts[start:stop], own, wrong, pos)


@dataclass(frozen=True)
class Block:
    """The outcome of a block.

    Attributes:
        lines: a line of JSON for each prompt.
        failures: what is said of each prompt that failed, by its index.
        summary: of its results.
    """

    lines: list[str]
    failures: dict[int, str]
    summary: Summary


class BlockWorker:
    """An actor: loads its model once, and runs the blocks that it is given.

    Args:
        recipe: of the model.
        asked: all prompts.
        options: further ones of :func:`dla_hooks.attribute_many`.
        folder: where finished results are kept, or None.
    """

    def __init__(
        self, recipe: Recipe, asked: Prompts, options: dict[str, Any], folder: str | None
    ) -> None:
        self._recipe, self._asked = recipe, asked
        self._options, self._folder = options, folder
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        """Run the blocks of a batch; an error comes back as the block's outcome."""
        pairs = zip(batch["start"], batch["stop"], strict=True)
        return {"block": [pickle.dumps(self._outcome(int(a), int(b))) for a, b in pairs]}

    def _outcome(self, start: int, stop: int) -> Block | DLAError:
        try:
            self._loaded = self._loaded or self._recipe.load()
            model, tokenizer = self._loaded
            own = self._asked.block(start, stop)
            results = list(
                attribute_many(
                    model,
                    own.prompts,
                    own.answer_tokens,
                    own.incorrect_tokens,
                    pos=own.pos,
                    tokenizer=tokenizer,
                    progress=False,
                    resume=None if self._folder is None else Path(self._folder, f"block-{start}"),
                    **self._options,
                )
            )
        except DLAError as error:
            return error.with_traceback(None)
        lines, failures = [], {}
        for index, result in enumerate(results, start):
            if isinstance(result, DLAError):
                failures[index] = str(result)
                about = {"error": str(result)}
            else:
                about = json.loads(result.to_json())
            lines.append(json.dumps({"prompt_index": index, **about}, ensure_ascii=False))
        if len(failures) == len(results):
            return Block(lines, failures, Summary.empty(len(failures)))
        return Block(lines, failures, summarize(results))


def blocks(
    recipe: Recipe,
    asked: Prompts,
    options: dict[str, Any],
    *,
    workers: int,
    folder: Path | None = None,
) -> Iterator[Block]:
    """The blocks of a sweep on Ray, in the order of their prompts.

    The cluster is the one of ``RAY_ADDRESS``, or that this process is in; else one is started
    here. Each worker takes a CPU, and a GPU where the cluster has some.

    Args:
        recipe: of the model.
        asked: all prompts.
        options: further ones of :func:`dla_hooks.attribute_many`.
        workers: how many.
        folder: where finished results are kept, which all workers see; or None.

    Raises:
        MissingExtraError: without Ray.
        InputError: when the cluster is too small.
        DLAError: of a worker.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray.data
    except ImportError:
        raise MissingExtraError("--engine ray", "ray") from None
    return _blocks(ray, recipe, asked, options, workers, folder)


def _blocks(
    ray: Any,
    recipe: Recipe,
    asked: Prompts,
    options: dict[str, Any],
    workers: int,
    folder: Path | None,
) -> Iterator[Block]:
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        own = ray.data.DataContext.get_current()
        own.enable_progress_bars = False
        own.execution_options.preserve_order = True
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        size = _size(len(asked.prompts), workers, folder)
        starts = range(0, len(asked.prompts), size)
        rows = [{"start": a, "stop": min(a + size, len(asked.prompts))} for a in starts]
        found = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            BlockWorker,
            fn_constructor_args=(recipe, asked, options, None if folder is None else str(folder)),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
            num_gpus=_gpus(recipe, ray.cluster_resources(), min(workers, len(rows))),
        )
        for row in found.iter_rows():
            outcome: Block | DLAError = pickle.loads(row["block"])
            if isinstance(outcome, DLAError):
                raise outcome
            yield outcome
    finally:
        if started:
            ray.shutdown()


def _gpus(recipe: Recipe, there: Mapping[str, float], workers: int) -> int:
    """How many GPUs each worker takes.

    Raises:
        InputError: when there are fewer CPUs or GPUs than workers, which Ray would wait for.
    """
    on_gpu = recipe.device is None or recipe.device.startswith("cuda")
    gpus = int(on_gpu and there.get("GPU", 0) > 0)
    for kind, each in (("CPU", 1), ("GPU", gpus)):
        if each * workers > there.get(kind, 0):
            raise InputError(
                f"the Ray cluster has {there.get(kind, 0):g} {kind}s, and {workers} workers take "
                "one each; give fewer workers, or set RAY_ADDRESS to a larger cluster"
            )
    return gpus


def _size(n: int, workers: int, folder: Path | None) -> int:
    """How many prompts a block has; in a folder that was begun, what it had.

    Raises:
        CheckpointError: when the folder cannot be read or written.
    """
    size = max(1, min(_MOST, -(-n // (workers * _BLOCKS_OF_A_WORKER))))
    if folder is None:
        return size
    place = folder / _SIZE
    try:
        if place.exists():
            return int(json.loads(place.read_text(encoding="utf-8"))["prompts"])
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(
                f"{folder} was begun without Ray; go on without --engine ray, or take another "
                "folder"
            )
        unfinished = place.with_suffix(".unfinished")
        write_text(unfinished, json.dumps({"prompts": size}))
        unfinished.replace(place)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{place} cannot be used to resume: {error}") from None
    return size
