"""Why do two runs answer differently? What was written differs, or how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from dla_hooks.bars import with_progress
from dla_hooks.call import check_given
from dla_hooks.errors import ArgumentTypeError, InputError
from dla_hooks.inputs.prompts import is_text
from dla_hooks.questions.differences import comparison_of
from dla_hooks.questions.sides import Asked, Question, both_runs
from dla_hooks.units import DEFAULT_UNIT, UnitName, read_units
from dla_hooks.units.base import Unit


@with_progress
def compare(
    model: Any,
    other: Any = None,
    input: Any = None,
    answer_tokens: Any = None,
    incorrect_tokens: Any = None,
    *,
    other_input: Any = None,
    other_context: Callable[[], AbstractContextManager[Any]] | None = None,
    other_pos: Any = None,
    unit: UnitName | Unit | tuple[UnitName | Unit, ...] | Mapping[str, Any] = DEFAULT_UNIT,
    pos: Any = -1,
    tokenizer: Any = None,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
    center_unembed: bool | None = None,
    fold_value_biases: bool | None = None,
    check: bool = True,
    chunk_size: int | None = None,
    progress: bool | None = None,
) -> Any:
    """Split the difference of two runs' logits: by who wrote otherwise, and what is read otherwise.

    Two checkpoints, an adapter on and off, a clean and a corrupted prompt, before and after an
    ablation: the result is first minus second, row by row. With x what a row wrote to the last
    stream, d a run's direction there and s its final norm's scale, each row's difference is exactly

        written = (x_A - x_B) . (d_A / s_A + d_B / s_B) / 2
        read    = (x_A + x_B) / 2 . (d_A / s_A - d_B / s_B)

    ``written`` is what the row put out otherwise. ``read`` is what the same write counts otherwise:
    the final norm's scale differs, or its weights and the unembedding do. The rows and the
    difference of the biases sum to the difference of the logits, before any cap. Exchanging the two
    runs changes all signs.

    Each run measures its rows on both runs' directions, so that no vector is kept: the cost is that
    of two attributions.

    Args:
        model: the first run's model, as for :func:`direct_logit_attribution`; so are all arguments
            that are not described here.
        other: the second run's model, of the same shape; None is the same model.
        input: what the first model is run on.
        answer_tokens: whose logit, in both runs.
        incorrect_tokens: whose logit is subtracted, or None.
        other_input: what the second model is run on; None is the same input. The prompts must have
            the same number of tokens, row by row, unless ``other_pos`` is given.
        other_context: a function without arguments that returns a context manager, in which the
            second run is read and made: ``model.disable_adapter`` of a PEFT model, or one that puts
            on hooks. It is called more than once.
        other_pos: the positions of the second run that are compared with ``pos`` of the first, for
            prompts whose tokens stand at different places; None is the same positions.
        unit: into which rows. Of a ranked unit all rows are measured, and the ``top`` strongest
            differences kept.
        pos: which positions.
        tokenizer: for strings, of both runs.
        attention_mask: for padded ids. It holds for ``other_input`` too, unless that is text or a
            mapping.
        prepend_bos: for strings.
        center_unembed: take the vocabulary's mean off every row of W_U, in both runs; None is as
            the first model was wrapped. So is the next.
        fold_value_biases: move each head's constant part to the remainder, in both runs.
        check: hold each run's parts against its last stream and its own logits.
        chunk_size: run the prompts so many tokens at a time.
        progress: show a bar over them; None shows it in a terminal or a notebook, where they take
            long.

    Returns:
        A :class:`Comparison`, or for several units a dictionary of them. A row that one run alone
        has (of a hook, of an adapter) counts nothing in the other.

    Raises:
        InputError: (a ValueError) for any argument that cannot be used.
        ShapeMismatchError: for prompts of different lengths without ``other_pos``.
        UnsupportedModelError: for models of different shapes, and for rows that do not pair up.
        DecompositionError: when the parts of a run do not sum to its own numbers.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> found = dla_hooks.compare(
    ...     model, input="The keys near the cabinet", other_input="The key near the cabinet",
    ...     answer_tokens=" are", incorrect_tokens=" is", tokenizer=tokenizer)
    >>> bool((found.attribution - found.written - found.read).abs().max() < 1e-5)
    True
    >>> bool((found.attribution.sum(0) + found.bias - found.logit).abs().max() < 1e-3)
    True
    """
    units, single = read_units(unit)
    if answer_tokens is None:
        raise InputError("answer_tokens is required: the token whose logit is attributed")
    check_given(input, None)
    if other_context is not None and not callable(other_context):
        raise ArgumentTypeError(
            "other_context must be a function that returns a context manager, such as "
            f"model.disable_adapter; got {type(other_context).__name__}: {other_context!r:.80}"
        )
    question = Question(
        first=Asked(model, input, attention_mask, pos),
        second=Asked(
            model if other is None else other,
            input if other_input is None else other_input,
            _mask_of_second(other_input, attention_mask),
            pos if other_pos is None else other_pos,
        ),
        same_input=other_input is None,
        aligned=other_pos is not None,
        context=other_context,
        answers=(answer_tokens, incorrect_tokens),
        units=units,
        tokenizer=tokenizer,
        prepend_bos=prepend_bos,
        center_unembed=center_unembed,
        fold_value_biases=fold_value_biases,
        check=bool(check),
        chunk_size=chunk_size,
    )
    first, second = both_runs(question)
    found = {key: comparison_of(key, one, first, second) for key, one in units.items()}
    return next(iter(found.values())) if single else found


def _mask_of_second(other_input: Any, attention_mask: Any) -> Any:
    """A mask of ids holds for both inputs; text and mappings have their own."""
    if isinstance(other_input, Mapping) or (other_input is not None and is_text(other_input)):
        return None
    return attention_mask
