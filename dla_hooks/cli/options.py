"""What commands take: values that are one of a few, and options that several share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer

from dla_hooks.cli.words import as_answer, as_pos
from dla_hooks.units import DEFAULT_UNIT, unit_names

Unit = StrEnum("Unit", [(name, name) for name in unit_names()])  # type: ignore[misc]
"""What ``--unit`` takes: the names of the units."""
UNIT = Unit(DEFAULT_UNIT if DEFAULT_UNIT in unit_names() else unit_names()[0])
"""What ``--unit`` is by default."""

QUESTION, RUN, OUTPUT = "What is asked", "The model and its run", "Output"
"""Groups of options in a command's help."""


class Dtype(StrEnum):
    """What ``--dtype`` takes: :data:`dla_hooks.checkpoint.DTYPES`."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"


class DeviceMap(StrEnum):
    """What ``--device-map`` takes: :data:`dla_hooks.placement.DEVICE_MAPS`."""

    auto = "auto"
    disk = "disk"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a Hugging Face hub id, or 'demo' for the small model that is included.",
        show_default=False,
    ),
]
PromptArgument = Annotated[
    str,
    typer.Argument(metavar="PROMPT", help="The text that the model reads.", show_default=False),
]
UnitOption = Annotated[
    Unit,
    typer.Option(
        metavar="UNIT",
        help=f"What to split it into: {', '.join(unit_names())}.",
        rich_help_panel=QUESTION,
    ),
]
Top = Annotated[
    int,
    typer.Option(
        min=1, metavar="K", help="How many rows to show at either end.", rich_help_panel=OUTPUT
    ),
]
Answer = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN",
        help="The token whose logit is attributed, with its leading space: ' Paris'; of a "
        "classifier, the label. Or 'next', the token that comes next in the text, or 'top', the "
        "model's own.",
        show_default="top",
        rich_help_panel=QUESTION,
    ),
]
Incorrect = Annotated[
    str | None,
    typer.Option(
        metavar="TOKEN",
        help="Attribute the answer's logit minus this token's. Or 'runner-up', the model's second.",
        show_default=False,
        rich_help_panel=QUESTION,
    ),
]
Pos = Annotated[
    str | None,
    typer.Option(
        metavar="POS",
        help="Position: an int, several as in 1,3, a slice like 2:5, or 'all'.",
        show_default="-1",
        rich_help_panel=QUESTION,
    ),
]
Span = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Instead of positions: a piece of the prompt, whose tokens are meant.",
        show_default=False,
        rich_help_panel=QUESTION,
    ),
]
DecoderInput = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Of an encoder-decoder: what its decoder has written so far, behind its start token.",
        show_default="nothing",
        rich_help_panel=QUESTION,
    ),
]
PrependBos = Annotated[
    bool | None,
    typer.Option(
        "--prepend-bos/--no-prepend-bos",
        help="Put a BOS token first, or none; by default as the tokenizer does.",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
ChunkSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="TOKENS",
        help="Run the prompt so many tokens at a time, which needs less memory; by itself it is "
        "done for very long prompts.",
        show_default=False,
        rich_help_panel=RUN,
    ),
]


@dataclass(frozen=True)
class Loading:
    """How a model is loaded."""

    dtype: Annotated[
        Dtype,
        typer.Option(
            metavar="DTYPE",
            help="Precision to load the weights in: float32, float64, bfloat16, float16, or auto, "
            "the checkpoint's own.",
            rich_help_panel=RUN,
        ),
    ] = Dtype.float32
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="Where to run: cpu, cuda, cuda:1, mps.",
            show_default="cpu",
            rich_help_panel=RUN,
        ),
    ] = None
    device_map: Annotated[
        DeviceMap | None,
        typer.Option(
            metavar="MAP",
            help="For models that do not fit: auto spreads the weights over GPUs, memory and "
            "disk; disk leaves them on disk and reads them as they are needed. Instead of a "
            "device.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --device-map: the most that the weights may take of memory and of each "
            "GPU, as in 4GiB or 500MB. With disk: of memory, nothing by default.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run Python code that comes with the model.",
            rich_help_panel=RUN,
        ),
    ] = False


@dataclass(frozen=True)
class Question:
    """Whose logit, and where."""

    answer: Answer = None
    incorrect: Incorrect = None
    pos: Pos = None
    span: Span = None

    @property
    def said(self) -> tuple[str | None, str | None]:
        """What was typed: the answer, and the token that is subtracted."""
        return self.answer, self.incorrect

    def tokens(self) -> dict[str, Any]:
        """Whose logit, as the library takes it; called once transformers may be imported."""
        return {
            "answer_tokens": as_answer(self.answer or "top"),
            "incorrect_tokens": as_answer(self.incorrect),
        }

    def where(self) -> Any:
        """Where, as ``pos=`` takes it.

        Raises:
            BadParameter: for what is none, or both ways to say it.
        """
        return as_pos(self.pos, self.span)


@dataclass(frozen=True)
class Run:
    """How a prompt is run."""

    prepend_bos: PrependBos = None
    chunk_size: ChunkSize = None
