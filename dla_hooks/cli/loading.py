"""Models for commands: everything that can be refused is refused before the weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dla_hooks import hub
from dla_hooks.cli.options import Loading
from dla_hooks.cli.startup import import_models, quick_imports
from dla_hooks.cli.terminal import note, progress
from dla_hooks.cli.words import OWN
from dla_hooks.errors import TokenizerMissingError


def load(
    model: str,
    loading: Loading,
    *,
    also: Sequence[str] = (),
    needs_tokenizer: bool = True,
    check: Any = None,
) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Args:
        model: as ``MODEL`` was typed.
        loading: how.
        also: other models that the process loads later.
        needs_tokenizer: whether it is read; it must then be there.
        check: called with the tokenizer, and what answers are read with, before the weights are
            read.

    Raises:
        DLAError: when there is no such model, or it cannot be loaded.
    """
    source, others = source_of(model), [*map(source_of, also)]
    with progress(f"loading {model}"):
        _say_where(model, source)
        with quick_imports():
            from dla_hooks import checkpoint, placement

            for one in (source, *others):
                checkpoint.find(one)
            device_map = None if loading.device_map is None else loading.device_map.value
            placement.Placement(loading.device, device_map, loading.max_memory)  # or it refuses
            if device_map is not None:
                placement.hand_back_freed_memory()  # the process is ours
            tokenizer = None
            if needs_tokenizer:
                tokenizer = checkpoint.load_tokenizer(source, loading.trust_remote_code)
                if tokenizer is None:
                    raise TokenizerMissingError(
                        f"{model} has no tokenizer, which the prompt and the answer are read "
                        "with; save one into the folder with tokenizer.save_pretrained(folder)"
                    )
                if check is not None:
                    check(tokenizer, _answers(source, others, loading, tokenizer))
            import_models(source, *others)
            loaded = checkpoint.load_model(
                source,
                loading.dtype.value,
                loading.device,
                loading.trust_remote_code,
                device_map=device_map,
                max_memory=loading.max_memory,
            )
        return loaded, tokenizer


def on_ray(
    model: str,
    loading: Loading,
    question: tuple[list[str], Any, Any],
    pos: Any,
    options: dict[str, Any],
    workers: int,
    folder: Path | None,
) -> Iterator[Any]:
    """A sweep on Ray, whose workers load the model themselves.

    Args:
        model: as ``MODEL`` was typed.
        loading: how.
        question: prompts, answers, and what is subtracted.
        pos: positions of each, or of all.
        options: of :func:`dla_hooks.attribute_many`.
        workers: how many.
        folder: where finished results are kept, or None.

    Raises:
        DLAError: when there is no such model, or no Ray.
    """
    from dla_hooks.engines.ray_sweep import Prompts, blocks
    from dla_hooks.engines.worker import Recipe

    recipe = Recipe(
        source_of(model),
        dtype=loading.dtype.value,
        device=loading.device,
        device_map=None if loading.device_map is None else loading.device_map.value,
        max_memory=loading.max_memory,
        trust_remote_code=loading.trust_remote_code,
    )
    return blocks(recipe, Prompts(*question, pos), options, workers=workers, folder=folder)


def readable(
    prompt: str,
    answers: Sequence[str | None],
    pos: Any,
    prepend_bos: bool | None,
    decoder_input: str | None = None,
) -> Any:
    """A check, by a tokenizer and the names of labels alone, of what a prompt is asked.

    Raises:
        InputError: for an answer that is not one token or label, and a prompt without any.
        PositionError: for a position that the prompt does not have.
    """

    def check(tokenizer: Any, names: Any) -> None:
        import torch

        from dla_hooks.inputs.answers import read_ids
        from dla_hooks.inputs.positions import select
        from dla_hooks.inputs.prompts import encode
        from dla_hooks.inputs.rows_of_positions import Span

        for name, answer in zip(("--answer", "--incorrect"), answers, strict=False):
            if answer is not None and answer not in OWN:
                read_ids(answer, name, None, names)
        ids = encode(prompt, tokenizer, prepend_bos)
        if ids and decoder_input is None and not isinstance(pos, Span):
            select(pos, torch.ones(1, len(ids), dtype=torch.bool, device="cpu"))

    return check


def _answers(source: str, also: Sequence[str], loading: Loading, tokenizer: Any) -> Any:
    """What answers are read with: the names of a classifier's labels, or the tokenizer."""
    from dla_hooks import checkpoint

    names = checkpoint.labels(source, loading.trust_remote_code)
    if names is None:
        return tokenizer
    import_models(source, *also)
    from dla_hooks.backends.labels import LabelNames

    return LabelNames(names)


def source_of(model: str) -> str:
    """The folder or hub id of what was typed; ``demo`` is the model that is included."""
    if model != "demo":
        return model
    from dla_hooks.demo import path

    return str(path())


def _say_where(model: str, source: str) -> None:
    """Say that a model is looked for elsewhere, which may take a while.

    Raises:
        CheckpointError: when it is nowhere.
    """
    if (
        Path(source).expanduser().exists()
        or source[:1] in (".", "/", "~", "")
        or source.count("/") > 1
        or "\\" in source
        or hub.is_offline()
    ):
        return
    try:
        cached = hub.is_cached(source)
    except ValueError:  # no such name can be on the hub, and the loader says so
        return
    if not cached:
        note(
            f"there is no folder {model}, and the local cache does not have it: asking "
            f"huggingface.co (with {hub.OFFLINE}=1 set, only the cache is looked in) …"
        )
    if hub.is_reachable(source):
        return
    if not cached:
        raise hub.unreachable(source)
    note(f"huggingface.co cannot be reached: {model} is taken from the local cache")
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True  # the process is ours
