"""One object for every engine: batches of columns in, columns with attributions out."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dla_hooks.attribution import direct_logit_attribution
from dla_hooks.calibration.prompt import short_prompt
from dla_hooks.call import checked
from dla_hooks.engines.columns import Batch, names_and_types
from dla_hooks.engines.layout import Layout, names_of
from dla_hooks.engines.rows import Outcomes
from dla_hooks.engines.worker import Recipe
from dla_hooks.errors import DLAError, InputError
from dla_hooks.inputs import positions
from dla_hooks.inputs.rows_of_positions import PerRow, Span
from dla_hooks.many import fingerprint
from dla_hooks.many.begin import begin, count
from dla_hooks.results.ranked import Result
from dla_hooks.units import DEFAULT_UNIT, UnitName, read_units
from dla_hooks.units.base import Unit
from dla_hooks.verification.recognise import stream_of


class Attributor:
    """Direct logit attribution of batches of rows, on any engine that maps them.

    It holds a folder and options, so it can be sent to any process. There it loads its model when
    it is first called, on the device that the worker has. Rows of one call are sorted by length
    and run in batches of at most ``max_tokens``, as by :func:`attribute_many`; so a call should
    have some hundred of them.

    Example:
        >>> from dla_hooks import Attributor, demo
        >>> attributor = Attributor(demo.path(), unit="head", answer=" are", incorrect=" is")
        >>> found = attributor({"id": [7, 8], "prompt": ["The keys", ""]})
        >>> found["id"], len(found["attribution"][0]) == len(attributor.labels)
        ([7, 8], True)
        >>> [bool(error) for error in found["error"]]
        [False, True]

    Columns that are read: ``prompt``, a text, or ``input_ids``, token ids (with ``attention_mask``
    where they are padded); ``answer`` and ``incorrect``, a token as text or as an id; ``position``,
    an int or a list of ints. All columns come back as they were, and there are new ones:

    - ``attribution``: a number for each of ``labels``; for several positions a list for each.
    - ``bias``, ``logit``, ``gap``: as in :class:`DirectLogitAttribution`.
    - ``error``: why the row failed, or ""; its numbers are then NaN.
    - ``about``: what the rows are, as JSON in the first row of a batch, and its digest in the
      others. :func:`summarize_rows` reads it.
    - of units that keep the strongest rows only, ``kept``, their labels, ``rest`` and
      ``remainder``; with ``means`` also ``means``, a number for every row that there is.

    Args:
        checkpoint: a folder, or an id on the Hugging Face hub.
        unit: into which rows, as for :func:`direct_logit_attribution`; one unit only.
        answer: the answer of all rows, where there is no such column; all that
            :func:`direct_logit_attribution` takes, as ``dla_hooks.TOP``.
        incorrect: what is subtracted, likewise.
        pos: which positions of all rows, likewise.
        dtype: of the weights, as for :func:`dla_hooks.checkpoint.load`; None is "float32".
        device: as torch names it; None is the GPU that the worker has, or else the CPU.
        device_map: as for :func:`dla_hooks.checkpoint.load`; so is ``max_memory``.
        adapter: the folder of a PEFT adapter to put on the model (extra: peft).
        trust_remote_code: run Python code that comes with the checkpoint.
        prepend_bos: as for :func:`direct_logit_attribution`; so are the next three.
        max_tokens: the most tokens that run at once, padding counted.
        chunk_size: as for :func:`attribute_many`.
        columns: names of your own for the columns that are read: ``{"prompt": "sentence"}``.
        keep: the columns that come back; None is all.
        means: of units that keep the strongest rows only, give every row's mean, too, which
            :func:`summarize_rows` needs.

    Raises:
        CheckpointError: when there is no such folder, or no model in it. So make one before a
            sweep begins, where you would otherwise have the error of a worker.
        InputError: for options that cannot be used.
    """

    __module__ = "dla_hooks"

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        unit: UnitName | Unit = DEFAULT_UNIT,
        answer: Any = None,
        incorrect: Any = None,
        pos: Any = -1,
        dtype: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        max_memory: str | None = None,
        adapter: str | Path | None = None,
        trust_remote_code: bool = False,
        prepend_bos: bool | None = None,
        center_unembed: bool | None = None,
        fold_value_biases: bool | None = None,
        check: bool = True,
        max_tokens: int = 4096,
        chunk_size: int | None = None,
        columns: Mapping[str, str] | None = None,
        keep: Sequence[str] | None = None,
        means: bool = False,
    ) -> None:
        self._recipe = Recipe(
            str(checkpoint),
            dtype=dtype or "float32",
            device=device,
            device_map=device_map,
            max_memory=max_memory,
            trust_remote_code=trust_remote_code,
            adapter=None if adapter is None else str(adapter),
        )
        if not read_units(unit)[1]:
            raise InputError(f"an Attributor has one unit, got {unit!r:.80}; make one for each")
        if isinstance(pos, PerRow):
            raise InputError("positions of each row's own go in a column 'position', not in pos")
        self._options: dict[str, Any] = {
            "unit": unit,
            "pos": pos if isinstance(pos, Span) else positions.parse(pos, 0),
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
            "check": check,
        }
        self._run: dict[str, Any] = {
            "prepend_bos": prepend_bos,
            "max_tokens": count("max_tokens", max_tokens),
            "chunk_size": None if chunk_size is None else count("chunk_size", chunk_size),
        }
        self._answers = {"answer": answer, "incorrect": incorrect}
        given = {name for name, value in self._answers.items() if value is not None}
        if self._options["pos"] != -1:
            given.add("pos")
        self._layout = Layout(names_of(columns), None if keep is None else tuple(keep), given)
        self._means = bool(means)
        self._begin()

    def _begin(self) -> None:
        self._loaded: tuple[Any, Any] | None = None
        self._tried = False
        self._outcomes: Outcomes | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_loaded", "_tried", "_outcomes", "_lock")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def __repr__(self) -> str:
        return f"<Attributor {self._recipe.name}, unit {self._options['unit']}>"

    def check(self, columns: Any) -> None:
        """Check a data set's columns before a sweep begins.

        Args:
            columns: names; a schema of Ray's (``ds.schema()``) or Arrow's; the features of a data
                set of ``datasets``.

        Raises:
            InputError: naming the column that is missing, has another type, or would be lost.
        """
        self._layout.check(names_and_types(columns))

    @property
    def labels(self) -> list[str]:
        """The name of each number of ``attribution``; loads the model where it is not yet.

        Of units that keep the strongest rows only, of all rows that there are.
        """
        model, _ = self._load(None)
        stream = stream_of(checked(model).model)
        ids = short_prompt(stream).input_ids[:1]
        one: Any = direct_logit_attribution(model, ids, 0, unit=self._options["unit"], check=False)
        return [row.label for row in one.rows]

    def __call__(self, batch: Any, rank: int | None = None) -> Any:
        """Attribute the rows of a batch.

        Args:
            batch: a mapping of columns, or a table of Arrow's or pandas'.
            rank: of the worker on its machine, as ``datasets`` gives it (``with_rank=True``): it
                chooses the GPU.

        Returns:
            A mapping of columns, or a table where one was given; a row for each, in their order.

        Raises:
            InputError: for a column that is missing.
            CheckpointError: when the model cannot be loaded.
            UnsupportedModelError: for a model or unit that cannot be attributed.
        """
        given = Batch(batch)
        self._layout.check(dict.fromkeys(given.names, ""))
        with self._lock:
            model, tokenizer = self._load(rank)
            columns = {
                name: given.values(own)
                for name, own in self._layout.names.items()
                if own in given.names
            }
            new = self._attributed(columns, model, tokenizer)
        return given.with_columns(new, filter(self._layout.keeps, given.names))

    def _attributed(
        self, columns: dict[str, list[Any]], model: Any, tokenizer: Any
    ) -> dict[str, list[Any]]:
        assert self._outcomes is not None
        prompts = columns["prompt"] if "prompt" in columns else columns["input_ids"]
        if "attention_mask" in columns:
            pairs = zip(prompts, columns["attention_mask"], strict=True)
            prompts = [_masked(ids, mask) for ids, mask in pairs]
        found: dict[int, Result | DLAError] = {}
        for name in ("position", "answer", "incorrect"):
            for index, value in enumerate(columns.get(name, ())):
                if value is None:
                    found[index] = InputError(f"the row has no {self._layout.names[name]!r}")
        todo = [index for index in range(len(prompts)) if index not in found]
        options = dict(self._options)
        if "position" in columns:
            options["pos"] = _positions([columns["position"][i] for i in todo])
        answers = {
            name: [columns[name][i] for i in todo] if name in columns else self._answers[name]
            for name in ("answer", "incorrect")
        }
        if todo:
            work = begin(
                model,
                [prompts[i] for i in todo],
                answers["answer"],
                answers["incorrect"],
                options=options,
                tokenizer=tokenizer,
                window=len(todo),
                progress=False,
                tried=self._tried,
                **self._run,
            )
            self._tried = True
            found |= zip(todo, work.results(), strict=True)
        return self._outcomes.columns([found[index] for index in range(len(prompts))])

    def _load(self, rank: int | None) -> tuple[Any, Any]:
        with self._lock:
            if self._loaded is None:
                model, tokenizer = self._recipe.load(rank)
                backend = checked(model)
                run = {
                    "config": fingerprint.of_config(backend),
                    "adapters": fingerprint.of_adapters(backend),
                    "weights": fingerprint.of_weights(backend),
                    **{
                        name: self._options[name]
                        for name in ("center_unembed", "fold_value_biases")
                    },
                }
                several = not isinstance(self._options["pos"], int)
                self._outcomes = Outcomes(run, self._recipe.name, several, self._means)
                self._loaded = model, tokenizer
            return self._loaded


def _masked(ids: Any, mask: Any) -> Any:
    """Token ids without padding, where both are there."""
    if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
        return ids
    return [one for one, real in zip(ids, mask, strict=True) if real]


def _positions(given: list[Any]) -> PerRow:
    lists = [isinstance(one, list) for one in given]
    return PerRow.of_any_length(given) if given and all(lists) else PerRow(given)
