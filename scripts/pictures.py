"""Draw the pictures of docs/pictures/, with the demo model.

python scripts/pictures.py --write docs/pictures
python scripts/pictures.py --check docs/pictures   # fails when a picture is stale
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import dla_hooks
from dla_hooks import Picture

PROMPT, ANSWER, INCORRECT = "The keys near the cabinet", " are", " is"


def pictures() -> dict[str, Picture]:
    """Each picture, by the name of its file."""
    model, tokenizer = dla_hooks.demo.load()
    model = model.double()  # so that each machine draws the same

    def attribute(**options: object) -> dla_hooks.DirectLogitAttribution:
        return dla_hooks.direct_logit_attribution(
            model, PROMPT, ANSWER, INCORRECT, tokenizer=tokenizer, **options
        )

    every = attribute(pos=None)
    examples = dla_hooks.demo.held_out("indirect_object", 100)
    many = dla_hooks.attribute_many(
        model,
        [one.prompt for one in examples],
        [one.answer for one in examples],
        [one.incorrect for one in examples],
        tokenizer=tokenizer,
    )
    return {
        "components": attribute().plot("waterfall"),
        "data_set": dla_hooks.summarize(many).plot(),
        "heads": attribute(unit="head").plot(),
        "layers": attribute(unit="layer", pos=None).plot(),
        "neurons": attribute(unit=dla_hooks.Neurons(top=5)).plot(),
        "positions": every.plot(),
        "tokens": every.plot("strip", row="3_attn_out"),
    }


def is_current(drawn: Picture, file: Path) -> bool:
    """Whether a file shows the picture, up to the last digits."""
    if not file.is_file():
        return False
    return _digits_apart(file.read_text(encoding="utf-8"), drawn.to_svg())


def _digits_apart(one: str, other: str) -> bool:
    """Whether two texts are the same but for numbers that are nearly the same."""
    number = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")
    if number.sub("#", one) != number.sub("#", other):
        return False
    pairs = zip(number.findall(one), number.findall(other), strict=True)
    return all(abs(float(a) - float(b)) <= 0.02 for a, b in pairs)


def main(say: Callable[[str], object] = sys.stdout.write) -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", type=Path, metavar="FOLDER")
    group.add_argument("--check", type=Path, metavar="FOLDER")
    asked = parser.parse_args()
    stale = []
    for name, drawn in pictures().items():
        file = (asked.write or asked.check) / f"{name}.svg"
        if is_current(drawn, file):
            continue
        stale.append(file)
        if asked.write:
            file.parent.mkdir(parents=True, exist_ok=True)
            drawn.save(file)
            say(f"wrote {file}\n")
    if asked.check and stale:
        names = ", ".join(map(str, stale))
        say(f"stale: {names}; run python scripts/pictures.py --write {asked.check}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
