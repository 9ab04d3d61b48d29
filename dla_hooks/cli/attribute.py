"""``dla-hooks attribute``."""

from __future__ import annotations

import dla_hooks
from dla_hooks.cli.files import Files
from dla_hooks.cli.help import examples
from dla_hooks.cli.loading import load, readable
from dla_hooks.cli.media import check_media, with_media
from dla_hooks.cli.options import (
    UNIT,
    DecoderInput,
    Loading,
    Media,
    Model,
    PromptArgument,
    Question,
    Run,
    Top,
    UnitOption,
)
from dla_hooks.cli.running import running
from dla_hooks.cli.terminal import out
from dla_hooks.errors import InputError


@examples(
    "dla-hooks attribute demo 'The keys near the cabinet'",
    "dla-hooks attribute demo 'The keys near the cabinet' \\",
    "    --answer ' are' --incorrect ' is' --unit head",
    "dla-hooks attribute demo 'The keys near the cabinet' \\",
    "    --answer next --pos 0:-1 --json -",
)
def attribute(
    model: Model,
    prompt: PromptArgument,
    question: Question,
    run: Run,
    media: Media,
    files: Files,
    loading: Loading,
    decoder_input: DecoderInput = None,
    unit: UnitOption = UNIT,
    top: Top = 10,
) -> None:
    """Split a logit, or the difference of two, into what each part of a model wrote."""
    where = question.where()
    files.check()
    check_media(media)
    # Beside images a text has more positions than it has tokens.
    place = None if media else where
    check = readable(prompt, question.said, place, run.prepend_bos, decoder_input)
    loaded, tokenizer = load(model, loading, check=check)
    with running():
        result = dla_hooks.direct_logit_attribution(
            loaded,
            with_media(model, loading, prompt, media, loaded) if media else prompt,
            **question.tokens(),
            decoder_input=decoder_input,
            unit=unit.value,
            pos=where,
            tokenizer=tokenizer,
            prepend_bos=run.prepend_bos,
            chunk_size=run.chunk_size,
        )
        if not result.attribution.numel():
            raise InputError(f"--pos {question.pos} selects no position of this prompt")

    from dla_hooks.cli import views

    if not files.quiet:
        out().print(views.attribution(result, top, views.asked(question)), crop=False)
    files.write(result)
