"""The kinds of model that a checkpoint may be for, and the class of transformers that loads each.

A config names the class that was saved (``config.architectures``). Which kind that is, the tables
of transformers say: each auto class maps a model type to a class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Door:
    """One kind of model.

    Attributes:
        name: as ``dla-hooks list --door`` takes it.
        auto: transformers' auto class that loads it.
        table: transformers' table of its classes by model type.
        ending: how its classes are named, where that tells it from every other kind; or nothing.
        what: a model of it, in words.
        labels: the names of what it scores, where that is the config's labels (``"id2label"``), or
            these names; None for a model that scores tokens.
    """

    name: str
    auto: str
    table: str
    ending: str
    what: str
    labels: str | tuple[str, ...] | None = None

    def classes(self) -> dict[str, tuple[str, ...]]:
        """The names of the classes behind it, by model type, in the installed transformers."""
        from transformers.models.auto import modeling_auto

        found: Mapping[str, Any] = getattr(modeling_auto, self.table, {})
        return {
            name: (classes,) if isinstance(classes, str) else tuple(classes)
            for name, classes in found.items()
        }


DOORS = (
    Door(
        "causal",
        "AutoModelForCausalLM",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "ForCausalLM",
        "a causal language model",
    ),
    Door(
        "seq2seq",
        "AutoModelForSeq2SeqLM",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "",
        "an encoder-decoder",
    ),
    Door(
        "speech",
        "AutoModelForSpeechSeq2Seq",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        "",
        "a speech model",
    ),
    Door(
        "image-text",
        "AutoModelForImageTextToText",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "",
        "an image-text model",
    ),
    Door(
        "masked",
        "AutoModelForMaskedLM",
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
        "ForMaskedLM",
        "a masked language model",
    ),
    Door(
        "classification",
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "ForSequenceClassification",
        "a sequence classifier or a reward model",
        labels="id2label",
    ),
    Door(
        "token-classification",
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "ForTokenClassification",
        "a token classifier",
        labels="id2label",
    ),
    Door(
        "question-answering",
        "AutoModelForQuestionAnswering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        "ForQuestionAnswering",
        "a model that answers questions with a span",
        labels=("start", "end"),
    ),
)
"""In the order in which they are tried."""

CAUSAL = DOORS[0]


def door_of(
    model_type: str, class_name: str, remote: Mapping[str, Any] | None = None
) -> Door | None:
    """The kind of a class: by transformers' tables, else by how its name ends; or None.

    Args:
        model_type: ``config.model_type``.
        class_name: the class.
        remote: ``config.auto_map``, of a checkpoint that brings its own code.
    """
    for door in DOORS:
        if _ends(remote, door.auto, class_name) or class_name in door.classes().get(model_type, ()):
            return door
    named = (door for door in DOORS if door.ending and class_name.endswith(door.ending))
    return next(named, None)


def door_for(
    model_type: str,
    class_names: Iterable[str] = (),
    remote: Mapping[str, Any] | None = None,
) -> Door | None:
    """The kind of model that a checkpoint is for.

    Args:
        model_type: ``config.model_type``.
        class_names: ``config.architectures``.
        remote: ``config.auto_map``, of a checkpoint that brings its own code.

    Returns:
        The first kind whose auto class loads the class that was saved. Where the config names
        none, or one without a head, the first kind that the model type has. None for neither.
    """
    found = (door_of(model_type, name, remote) for name in class_names)
    known = next((door for door in found if door is not None), None)
    return known or next(
        (d for d in DOORS if model_type in d.classes() or d.auto in (remote or {})),
        None,
    )


def _ends(remote: Mapping[str, Any] | None, auto: str, class_name: str) -> bool:
    """Whether a checkpoint's own code has this class behind an auto class."""
    found = (remote or {}).get(auto)
    return isinstance(found, str) and found.rpartition(".")[2] == class_name
