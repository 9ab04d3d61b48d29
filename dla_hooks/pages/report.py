"""The verb: one prompt, or several, as a page to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from dla_hooks._version import __version__
from dla_hooks.bars import steps, with_progress
from dla_hooks.call import checked, model_of
from dla_hooks.errors import InputError, ShapeMismatchError
from dla_hooks.inputs.prompts import is_text
from dla_hooks.pages import reproduce
from dla_hooks.pages.asking import Prompt, ask, promoted_of
from dla_hooks.pages.document import Report
from dla_hooks.pages.names import check_page
from dla_hooks.results.files import checked as checked_path
from dla_hooks.targets.own import TOP
from dla_hooks.units import read_units
from dla_hooks.units.base import Unit

_PROMOTED = 6


@with_progress
def report(
    model: Any,
    input: Any,
    answer_tokens: Any = None,
    incorrect_tokens: Any = None,
    *,
    units: Sequence[str | Unit] | None = None,
    pos: Any = None,
    path: str | Path | None = None,
    tokenizer: Any = None,
    title: str | None = None,
    promoted: int | None = None,
    effects: Any = None,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
    center_unembed: bool | None = None,
    fold_value_biases: bool | None = None,
    check: bool = True,
    chunk_size: int | None = None,
    progress: bool | None = None,
) -> Report:
    """Attribute a logit, and show it as one html file that opens from disk without a network.

    The page has the prompt, on which a position is chosen; the components as a waterfall; the heads
    as a grid; a card for the chosen row with the tokens that it reads and promotes; and every row
    in a table.

    The model runs once for a prompt of up to 64 tokens. For a longer one, units that keep the
    strongest of many rows are measured at the last selected position, in a second run. Promoted
    tokens take a run of their own, and another for components. The units "component", "layer" and
    "head" alone, without promoted tokens, are one run whatever the length.

    Args:
        model: of any kind that :func:`direct_logit_attribution` takes.
        input: as there; a list of strings makes one page for each, all in one file.
        answer_tokens: as there. With a list of strings as input, a list of as many answers has one
            for each prompt. None is ``dla_hooks.TOP``, the model's own top token at each position.
        incorrect_tokens: likewise.
        units: names of units, or objects with their own options. None is "component", "layer",
            "head", and "source", "neuron", "expert" where the model has them.
        pos: which positions can be chosen on the page: all by default. The page opens with the
            last one.
        path: of the html file to write, or None.
        tokenizer: for strings, and for the tokens' names.
        title: of the window; None makes one of the prompt.
        promoted: how many tokens to list each way for every head and component, at the last
            selected position; 0 for none. None is 6, or 0 where ``units`` are given.
        effects: direct and total effects of rows, to be shown beside them; see :meth:`Report.of`.
        attention_mask: as there.
        prepend_bos: as there.
        center_unembed: as there.
        fold_value_biases: as there.
        check: as there.
        chunk_size: as there.
        progress: show a bar over the prompts, or the pieces of a single one; None shows it in a
            terminal or a notebook, where they take long.

    Returns:
        A :class:`Report`: ``save(path)`` writes it, ``html()`` is its text, ``data()`` its numbers.

    Raises:
        InputError: for an argument that cannot be used; subclasses say which.
        UnsupportedModelError: for a model that is no sum of writes, or has no such unit.
        DecompositionError: when the parts do not sum to the model's own numbers.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> page = dla_hooks.report(
    ...     model, "The keys near the cabinet", " are", " is", tokenizer=tokenizer)
    >>> page
    Report("The keys near the cabinet · ' are' - ' is'", 1 page); save('page.html') writes it
    """
    if path is not None:
        folder = check_page(checked_path(path)).parent
        if not folder.is_dir():
            raise InputError(f"cannot write {path}: there is no folder {folder}")
    answer_tokens = TOP if answer_tokens is None else answer_tokens
    count = _count(promoted, given=units is not None)
    chosen = None if units is None else read_units(tuple(units))[0]
    read = model_of(checked(model), tokenizer=tokenizer, prepend_bos=prepend_bos)
    shared = {"tokenizer": tokenizer, "attention_mask": attention_mask, "prepend_bos": prepend_bos}
    options = {
        **shared,
        "center_unembed": center_unembed,
        "fold_value_biases": fold_value_biases,
        "check": check,
        "chunk_size": chunk_size,
    }
    dtype = str(read.stream.dtype).removeprefix("torch.")
    pages: list[dict[str, Any]] = []
    texts: list[str] = []
    prompts = [*_prompts(input, answer_tokens, incorrect_tokens)]
    with steps(len(prompts), "prompt") as done:
        for prompt in prompts:
            found = ask(model, prompt, read, pos=pos, units=chosen, options=options)
            listed = promoted_of(model, prompt, found, count, {**shared, "check": check})
            made = Report.of(found.results, listed, about=_about(dtype), effects=effects)
            asked = _asked(prompt, units, pos, promoted, {**options, **shared})
            for each in made.pages:
                each["notes"] += found.notes
                each["reproduce"] = _again(model, dtype, prompt.input, asked)
            pages += made.pages
            texts += made.texts
            title = made.title if title is None else title
            done()
    whole = Report(title or "", pages, texts)
    if path is not None:
        whole.save(path)
    return whole


def _prompts(input: Any, answer: Any, incorrect: Any) -> Iterator[Prompt]:
    """Each prompt of a list of strings with its own answers; anything else is one."""
    if isinstance(input, str) or not is_text(input):
        yield Prompt(input, answer, incorrect)
        return
    for number, text in enumerate(input):
        own = (_of_prompt(one, number, len(input)) for one in (answer, incorrect))
        yield Prompt(text, *own)


def _of_prompt(answers: Any, number: int, n: int) -> Any:
    """One prompt's own answer, of a list of as many; one answer belongs to all."""
    listed = isinstance(answers, (list, tuple)) or getattr(answers, "ndim", 0) > 0
    if not listed or (len(answers) == 1 and n > 1):
        return answers
    if len(answers) != n:
        raise ShapeMismatchError(
            f"there are {n} prompts and {len(answers)} answers; give one for all, or one for each"
        )
    return answers[number]


def _count(promoted: Any, *, given: bool) -> int:
    if promoted is None:
        return 0 if given else _PROMOTED
    if isinstance(promoted, bool) or not isinstance(promoted, int) or promoted < 0:
        raise InputError(f"promoted must be an int, how many tokens to list; got {promoted!r:.80}")
    return promoted


def _about(dtype: str) -> dict[str, str]:
    return {
        "dtype": dtype,
        "dla_hooks": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def _asked(
    prompt: Prompt, units: Any, pos: Any, promoted: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of the call that are not the defaults, in its order."""
    found: dict[str, Any] = {"answer_tokens": prompt.answer, "incorrect_tokens": prompt.incorrect}
    found |= {"units": None if units is None else tuple(units), "pos": pos, "promoted": promoted}
    found |= {name: value for name, value in options.items() if name != "tokenizer"}
    if options["check"] is True:
        found.pop("check")
    return {name: value for name, value in found.items() if value is not None}


def _again(model: Any, dtype: str, input: Any, asked: dict[str, Any]) -> dict[str, str | None]:
    name = reproduce.model_name(model)
    backend = checked(model)
    kind = type(backend.model).__name__
    return {
        "call": reproduce.call(name, kind, dtype, input, asked),
        "command": reproduce.command(name, input, asked, dtype),
    }
