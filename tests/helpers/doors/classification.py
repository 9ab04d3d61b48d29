"""Heads of labels: sequence classifiers and reward models, token classifiers, spans.

Reward models of transformers are sequence classifiers with one label. The head is the same linear
map of the last stream as with several.
"""

from __future__ import annotations

from typing import Any

import torch
from mapping_zoo import CannotBuild, build_any, example_ids_any
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from doors import Case, Door

PAD = 2


def build(
    auto: Any, model_type: str, seed: int = 0, attn: str | None = None, **changes: Any
) -> Any:
    """A tiny model with a head of three labels, each with a name, and with a pad token."""
    labels = {0: "bad", 1: "fair", 2: "good"}
    if auto is AutoModelForQuestionAnswering:
        labels = {0: "start", 1: "end"}  # some give a head of two only if there are two labels
    also: dict[str, Any] = {"pad_token_id": PAD, "use_cache": False, "id2label": labels}
    also["decoder_start_token_id"] = 0  # which a config of T5 lacks
    also["label2id"] = {name: index for index, name in labels.items()}
    return build_any(
        model_type,
        seed,
        attn=attn,
        auto=auto,
        decoder=_is_decoder(model_type),
        also=also,
        **changes,
    )


def _is_decoder(model_type: str) -> bool:
    """Whether the type is one that reads from left to right, and nothing else."""
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not hasattr(
        CONFIG_MAPPING[model_type], "is_decoder"
    )


def asked_of(model: Any) -> Any:
    """What a model is asked: ids that end as its type wants them, and boxes where it has any."""
    ids = example_ids_any(model)
    config = model.config
    if config.is_encoder_decoder:
        ids[:, -1] = config.eos_token_id  # classifiers of such types read it
    if config.model_type == "longformer":
        ids[:, 2:5] = config.sep_token_id  # which divide a question from its text
    if config.model_type == "lxmert":
        seen = torch.ones(len(ids), 4, config.visual_feat_dim).double()
        return {"input_ids": ids, "visual_feats": seen, "visual_pos": seen[..., :4]}
    if config.model_type == "bros":
        return {"input_ids": ids, "bbox": torch.zeros(*ids.shape, 8)}
    return ids


def run(model: Any, ids: Any) -> Any:
    try:
        with torch.no_grad():
            return model(**ids) if isinstance(ids, dict) else model(input_ids=ids)
    except Exception as error:  # of the code of 150 types, to be reported
        raise CannotBuild(f"its own run fails: {type(error).__name__}: {error}") from error


def _sequence(model_type: str, seed: int = 0, attn: str | None = None, **changes: Any) -> Any:
    model = build(AutoModelForSequenceClassification, model_type, seed, attn, **changes)
    ids = asked_of(model)
    logits = run(model, ids).logits
    return (Case(model, ids, logits, "good", "bad", (2, 0), {}),)


def _tokens(model_type: str, seed: int = 0, attn: str | None = None, **changes: Any) -> Any:
    model = build(AutoModelForTokenClassification, model_type, seed, attn, **changes)
    ids = asked_of(model)
    return (Case(model, ids, run(model, ids).logits, "good", "bad", (2, 0)),)


def _span(model_type: str, seed: int = 0, attn: str | None = None, **changes: Any) -> Any:
    model = build(AutoModelForQuestionAnswering, model_type, seed, attn, **changes)
    ids = asked_of(model)
    found = run(model, ids)
    if model_type == "lxmert":  # it chooses among whole answers, and has no logits of a span
        return (Case(model, ids, found.question_answering_score),)
    if getattr(found, "start_logits", None) is None:
        raise CannotBuild(f"{model_type}: it returns no start_logits without its training labels")
    logits = torch.stack((found.start_logits, found.end_logits), -1)
    return (
        Case(model, ids, logits, "start", None, (0, None), name="start"),
        Case(model, ids, logits, "end", "start", (1, 0), name="end"),
    )


def _types(names: Any) -> tuple[str, ...]:
    return tuple(sorted(names))


DOORS = (
    Door(
        name="classification",
        title="Sequence classifiers and reward models",
        about="Every type that transformers maps to a sequence classifier, with three labels. A "
        "reward model is one with one label. Read is the last token.",
        model_types=_types(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        cases=_sequence,
        rank=6,
    ),
    Door(
        name="token-classification",
        title="Token classifiers",
        about="Every type that transformers maps to a token classifier, with three labels, at "
        "every position.",
        model_types=_types(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
        cases=_tokens,
        rank=7,
    ),
    Door(
        name="question-answering",
        title="Question answering",
        about="Every type that transformers maps to question answering: `start` alone and `end` "
        "less `start`, at every position.",
        model_types=_types(MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
        cases=_span,
        rank=8,
    ),
)
