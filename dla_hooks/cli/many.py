"""``dla-hooks many``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

import dla_hooks
from dla_hooks.cli import tables
from dla_hooks.cli.files import STDOUT, as_file, check_folder, said
from dla_hooks.cli.help import examples
from dla_hooks.cli.loading import load, on_ray
from dla_hooks.cli.options import (
    OUTPUT,
    RUN,
    UNIT,
    Answer,
    ChunkSize,
    Incorrect,
    Loading,
    Model,
    Pos,
    PrependBos,
    UnitOption,
)
from dla_hooks.cli.terminal import note, show
from dla_hooks.cli.words import as_answer, as_pos
from dla_hooks.errors import DLAError, InputError

_SAID = {
    "top": "the model's own top token",
    "next": "the token that comes next in the text",
}


class Engine(StrEnum):
    """What ``--engine`` takes."""

    local = "local"
    ray = "ray"


RESULTS, SUMMARY, FINISHED = "results.jsonl", "summary.safetensors", "finished"
"""What a folder holds: a line per prompt, the means, and what a later run goes on from."""


@examples(
    "printf 'prompt,answer\\nThe dogs, are\\nThe key, is\\n' |",
    "    dla-hooks many demo -",
    "dla-hooks many demo prompts.csv --unit head -o found",
    "dla-hooks many demo prompts.csv -o found.jsonl",
)
def many(
    model: Model,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Prompts: .jsonl or .csv with the columns prompt and, for each prompt its own, "
            "answer, incorrect, position. '-' is stdin.",
            show_default=False,
        ),
    ],
    loading: Loading,
    answer: Answer = None,
    incorrect: Incorrect = None,
    unit: UnitOption = UNIT,
    pos: Pos = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="A .jsonl file with a line for each prompt ('-' is stdout); or a folder, with "
            "such a file and a summary. The same call with the same folder goes on where it ended.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    summary: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the means as .safetensors, which dla_hooks.load reads.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also draw the means: .html, .svg, .png or .pdf.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="The most tokens in a batch, padding counted.",
            rich_help_panel=RUN,
        ),
    ] = 4096,
    prepend_bos: PrependBos = None,
    chunk_size: ChunkSize = None,
    engine: Annotated[
        Engine,
        typer.Option(
            metavar="ENGINE",
            help="What runs it: local, this process; or ray, workers on the cluster of RAY_ADDRESS "
            "or on this machine (extra: ray), each with a GPU where there are some.",
            rich_help_panel=RUN,
        ),
    ] = Engine.local,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="With --engine ray: how many workers, 2 by default.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
) -> None:
    """Attribute a file of prompts, one by one, and show the means over all of them."""
    if workers is not None and engine is Engine.local:
        raise InputError("--workers goes with --engine ray")
    table = tables.read(file)
    answers = _one_of("--answer", answer, table.answers) or "top"
    against = _one_of("--incorrect", incorrect, table.incorrect)
    where = as_pos(pos)
    if table.positions is not None:
        if pos is not None:
            raise InputError("--pos goes with a file without positions; this one has a column")
        where = dla_hooks.PerRow(table.positions)
    folder = _folder_of(output)
    for path in (summary, plot, output if folder is None else None):
        if path not in (None, STDOUT):
            check_folder(path)
    if plot is not None:
        from dla_hooks.results.picture import check_path

        check_path(plot)
    options: dict[str, Any] = {
        "unit": unit.value,
        "prepend_bos": prepend_bos,
        "max_tokens": max_tokens,
        "chunk_size": chunk_size,
    }
    kept = None if folder is None else folder / FINISHED
    lines = output if folder is None else folder / RESULTS
    try:
        if engine is Engine.ray:
            question = (table.prompts, _as_tokens(answers), _as_tokens(against))
            run = on_ray(model, loading, question, where, options, workers or 2, kept)
            with _opened(lines, whole=True) as opened:
                means = _merged(run, opened)
        else:
            loaded, tokenizer = load(model, loading)  # ahead of what imports transformers' models
            question = (table.prompts, _as_tokens(answers), _as_tokens(against))
            results = dla_hooks.attribute_many(
                loaded, *question, pos=where, tokenizer=tokenizer, resume=kept, **options
            )
            with _opened(lines, whole=folder is not None) as opened:
                means = dla_hooks.summarize(_written(results, opened))
    except KeyboardInterrupt:
        if folder is not None:
            note(f"what is finished is kept in {folder}; the same command goes on from there")
        raise
    if output != STDOUT:
        if isinstance(answers, str) and answers in _SAID:
            show(f"the answer of each prompt is {_SAID[answers]}\n")
        show(repr(means))
    if folder is not None:
        said(means.save(folder / SUMMARY))
    if summary is not None:
        said(means.save(summary))
    if plot is not None:
        said(means.plot().save(plot))
    if lines not in (None, STDOUT):
        said(lines)


def _merged(blocks: Iterable[Any], file: TextIO | None) -> Any:
    """The summary of blocks, whose lines are written when they come."""
    means = dla_hooks.Summary.empty()
    failure = ""
    for block in blocks:
        for index, why in block.failures.items():
            note(f"prompt {index} failed: {' '.join(why.splitlines())}")
            failure = failure or why
        if file is not None:
            file.writelines(f"{line}\n" for line in block.lines)
        means = means.merge(block.summary)
    if not means.n:
        raise InputError(
            f"there are no results to summarize: all {means.n_failed} prompts failed, the first "
            f"with {failure}"
        )
    return means


def _one_of(option: str, given: str | None, column: list[Any] | None) -> Any:
    if given is not None and column is not None:
        raise InputError(
            f"{option} goes with a file without a column {option[2:]!r}; this one has it"
        )
    return given if column is None else column


def _as_tokens(given: Any) -> Any:
    """One answer, or one for each prompt, as the library takes it."""
    if isinstance(given, list):
        return [as_answer(one) if isinstance(one, str) else one for one in given]
    return as_answer(given)


def _folder_of(output: Path | None) -> Path | None:
    """The folder to write to, made where it is not there; None for a file and for nothing."""
    if output is None or output == STDOUT or output.suffix.lower() == ".jsonl":
        return None
    if output.suffix.lower() in (".csv", ".json", ".txt", ".html"):
        raise InputError(f"--output is a folder or a .jsonl file; got {str(output)!r}")
    if output.is_file() or not output.parent.is_dir():
        raise InputError(
            f"cannot write {output}: give a .jsonl file, '-', or a folder (in one that is there)"
        )
    output.mkdir(exist_ok=True)
    return output


@contextmanager
def _opened(path: Path | None, *, whole: bool) -> Iterator[TextIO | None]:
    """A file for lines; where ``whole`` is said it gets its name when all are in it."""
    if path is None or path == STDOUT:
        yield None if path is None else as_file()
        return
    place = path.with_name(f"{path.name}.unfinished") if whole else path
    try:
        with place.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield file
        place.replace(path)
    finally:
        if whole:
            place.unlink(missing_ok=True)


def _written(results: Iterable[Any], file: TextIO | None) -> Iterator[Any]:
    """The results, each written as a line when it comes; failures are said on stderr."""
    for index, result in enumerate(results):
        failed = isinstance(result, DLAError)
        if failed:
            note(f"prompt {index} failed: {' '.join(str(result).splitlines())}")
        if file is not None:
            about = {"error": str(result)} if failed else json.loads(result.to_json())
            file.write(json.dumps({"prompt_index": index, **about}, ensure_ascii=False) + "\n")
        yield result
