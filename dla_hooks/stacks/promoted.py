"""The tokens that each row of a unit promotes and demotes most, without any answer.

The unembedding is read once for a tile of positions, a slice of the vocabulary at a time; of each
slice's logits only the running ranks are kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dla_hooks.call import Inputs
from dla_hooks.errors import InputError, UnsupportedModelError
from dla_hooks.inputs.prompts import known_ids, to_strings
from dla_hooks.results.promoted import PromotedTokens
from dla_hooks.stacks.arguments import measured
from dla_hooks.stacks.checks import StreamSum
from dla_hooks.stacks.every_logit import EveryLogit
from dla_hooks.stacks.expert_vectors import expert_vectors
from dla_hooks.stacks.feature_vectors import feature_vectors
from dla_hooks.stacks.final_norm import FinalNorm
from dla_hooks.stacks.kept import Kept
from dla_hooks.stacks.neuron_vectors import neuron_vectors
from dla_hooks.stacks.row_vectors import ComponentVectors, HeadVectors, LayerVectors, RowVectors
from dla_hooks.stacks.token_ranks import TokenRanks, rank_tokens
from dla_hooks.units import DEFAULT_UNIT, UnitName, read_units
from dla_hooks.units.base import Unit


def _heads(unit: Any, inputs: Inputs, kept: Kept, final: FinalNorm) -> RowVectors:
    conventions = inputs.model.conventions(None, unit.fold_value_biases)
    return HeadVectors(kept, final, conventions.fold_value_biases)


def _neurons(unit: Any, inputs: Inputs, kept: Kept, final: FinalNorm) -> RowVectors:
    if unit.top is None:
        raise InputError(
            f"promoted_tokens ranks tokens for the strongest neurons of each position, and "
            f"{unit!r} keeps all. Give how many: top=16"
        )
    return neuron_vectors(kept, final, unit.top, unit.layers)


def _features(unit: Any, inputs: Inputs, kept: Kept, final: FinalNorm) -> RowVectors:
    if unit.top is None:
        raise InputError(
            "promoted_tokens ranks tokens for the strongest features of each position, and the "
            "unit keeps all. Give how many: top=16"
        )
    return feature_vectors(kept, final, unit.read(kept.stream), unit.top)


_VECTORS: dict[str, Callable[[Any, Inputs, Kept, FinalNorm], RowVectors]] = {
    "component": lambda unit, inputs, kept, final: ComponentVectors(kept, final),
    "layer": lambda unit, inputs, kept, final: LayerVectors(kept, final),
    "head": _heads,
    "neuron": _neurons,
    "expert": lambda unit, inputs, kept, final: expert_vectors(kept, final, unit.top, unit.layers),
    "feature": _features,
}
"""What makes the rows of a unit as vectors, by the unit's name."""


def promoted_tokens(
    model: Any,
    input: Any = None,
    *,
    unit: UnitName | Unit = DEFAULT_UNIT,
    pos: Any = -1,
    k: int = 10,
    tokenizer: Any = None,
    cache: Any = None,
    attention_mask: Any = None,
    prepend_bos: bool | None = None,
    check: bool = True,
) -> PromotedTokens:
    """Find the tokens whose logits each row pushes up and down the most, without any answer.

    A row's logits are W_U times its part of the last stream, with the final norm's gain and its
    scale at this position, less their mean over the vocabulary: what is the same for every token
    decides nothing. A softcap comes after it; what the model adds for a token whatever the prompt
    (biases of the unembedding and of the final norm) is in no row.

    Nothing of the size rows x vocabulary is built. Kept are the activations that the rows are made
    of, at the selected positions: [position, d_model] for every component, z of every layer's
    heads, the activations of every layer's neurons, what stands at the places of dictionaries, or
    what each chosen expert put out. The vectors of the rows are made for a few positions at a
    time; of neurons and features, those of the strongest alone. An adapted or quantised
    unembedding that computes in 16 bits is read exactly, but its time grows with the square of
    the vocabulary.

    Args:
        model: of any kind that :func:`direct_logit_attribution` takes.
        input: as there; None with a ``cache``.
        unit: into which rows: "component", "layer" (running sums) or "head", which ends with the
            ``remainder`` that no head wrote; or an object of such a unit's class. Of neurons,
            experts and features, as with ``Neurons(top=5)``, ``Experts(top=5)`` and
            ``Features({place: dictionary}, top=5)``, the ``top`` strongest at each position: those
            whose vectors are the largest behind the final norm, its gain included. ``#1``, ``#2``,
            … are followed by the ``rest`` of the unit's rows and the ``remainder``. A unit that
            keeps all by default lists all that a position went to. Where a position has fewer rows,
            the last are empty.
        pos: which positions, as there; an int drops the axis.
        k: how many tokens each way; at most as many as there are.
        tokenizer: for strings, and for the tokens' names. Rows of the unembedding that it has no
            token for (a padded vocabulary) are left out of ranks and of the mean. Without one all
            rows count.
        cache: an ``ActivationCache`` to take activations from, as there.
        attention_mask: for padded ids, as there.
        prepend_bos: for strings, as there.
        check: at a few positions, hold the rows' sum and the bias against the model's own logits,
            for every token that the model does not mask. A cache does not say which logits the
            model gave.

    Returns:
        A :class:`PromotedTokens`, whose logits are [row, *batch_and_pos, k].

    Raises:
        InputError: for an argument that cannot be used; subclasses say which.
        PositionError: (an IndexError) for a position that some row does not have.
        UnsupportedModelError: for a model that is no sum of writes, or has no such rows.
        DecompositionError: when the rows do not sum to the model's own logits. What hooks of the
            caller write to the logits themselves is in no row.

    >>> import dla_hooks
    >>> model, tokenizer = dla_hooks.demo.load()
    >>> found = dla_hooks.promoted_tokens(
    ...     model, "The keys near the cabinet", unit="layer", k=2, tokenizer=tokenizer)
    >>> [token for token, logit in found.top("final_post")]
    [' are', ' is']
    """
    chosen = _with_vectors(unit)
    count = _count(k)

    def measure(inputs: Inputs) -> PromotedTokens:
        counted = _counted(inputs)
        kept = Kept.of(inputs, pos, check)
        final = FinalNorm(kept)
        rows = _VECTORS[chosen.words.name](chosen, inputs, kept, final)
        sum_of_all = StreamSum(kept, len(kept.stream.blocks))
        every = EveryLogit(kept)
        logits = kept.run(every.columns)
        sum_of_all.hold()
        if check:
            rows.hold()
        every.see(logits)
        ranks = rank_tokens(kept, final, rows, every, counted, count)
        index = rows.index()
        if index is not None:
            ranks = _without_nobody(ranks, index)
        named = kept.stream.backend.answer_tokenizer(inputs.tokenizer)
        ids = torch.cat((ranks.up_ids.flatten(), ranks.down_ids.flatten())).unique().tolist()
        ids = [i for i in ids if i >= 0]  # -1 stands at padding
        return PromotedTokens(
            labels=rows.labels,
            unit=chosen.words.name,
            up=ranks.up,
            up_ids=ranks.up_ids,
            down=ranks.down,
            down_ids=ranks.down_ids,
            mean=ranks.mean,
            names=dict(zip(ids, to_strings(ids, named), strict=True)),
            n_tokens=ranks.n_tokens,
            gap=every.gap,
            positions=kept.entries.positions(inputs.source.prompt.mask),
            tokens=inputs.source.texts(inputs.tokenizer),
            model=kept.stream.backend.name,
            softcap=kept.stream.softcap,
            words=chosen.words,
            index=index,
            rows=rows.rows,
        )

    options = {
        "cache": cache,
        "tokenizer": tokenizer,
        "attention_mask": attention_mask,
        "prepend_bos": prepend_bos,
    }
    return measured(model, input, options, measure)


def _without_nobody(ranks: TokenRanks, index: Tensor) -> TokenRanks:
    """Nothing where an entry has fewer rows than places, as at padding."""
    nobody = index < 0
    nobody[-2:] = False  # the rest, and the remainder
    by_token = nobody[..., None]
    return TokenRanks(
        up=ranks.up.masked_fill(by_token, torch.nan),
        up_ids=ranks.up_ids.masked_fill(by_token, -1),
        down=ranks.down.masked_fill(by_token, torch.nan),
        down_ids=ranks.down_ids.masked_fill(by_token, -1),
        mean=ranks.mean.masked_fill(nobody, torch.nan),
        n_tokens=ranks.n_tokens,
    )


def _with_vectors(unit: Any) -> Unit:
    """The one unit, of those whose rows are vectors.

    Raises:
        InputError: for any other.
    """
    units, single = read_units(unit)
    if not single:
        raise InputError(f"promoted_tokens takes one unit at a time, got {unit!r:.80}")
    (found,) = units.values()
    if found.words.name not in _VECTORS:
        raise InputError(
            f"promoted_tokens has no vectors for the rows of unit {found.words.name!r}; it takes "
            f"{', '.join(map(repr, _VECTORS))}"
        )
    return found


def _count(k: Any) -> int:
    count = operator.index(k) if hasattr(k, "__index__") and not isinstance(k, bool) else 0
    if count < 1:
        raise InputError(f"k must be a positive int, the tokens to list each way; got {k!r:.80}")
    return count


def _counted(inputs: Inputs) -> Tensor | None:
    """Which rows of the unembedding stand for a token [vocabulary]; None for all.

    Raises:
        InputError: where fewer than two do.
    """
    stream, tokenizer = inputs.stream, inputs.tokenizer
    counted = None
    if tokenizer is not None and not stream.backend.scores_labels:
        counted = known_ids(tokenizer, stream.vocabulary)
    n_tokens = stream.vocabulary if counted is None else int(counted.sum())
    if n_tokens < 2 and stream.backend.scores_labels:
        raise UnsupportedModelError(
            f"{stream.backend.name} scores one label, and ranks need two; direct_logit_attribution "
            "says what each row writes to it"
        )
    if n_tokens < 2:
        raise InputError(
            f"{stream.backend.name} scores {n_tokens} of the tokens that can be named, and ranks "
            "need two; give the model's own tokenizer, or none"
        )
    return counted
