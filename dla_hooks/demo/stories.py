"""What the demonstration model does with its well-known prompts: words, to be held to its numbers.

A story says which token the answer is read from. Which head reads it, and how much that gives, is
measured each time: ``dla-hooks demo`` prints it, and tests hold the words to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dla_hooks.demo.corpus import Example, literal_examples


@dataclass(frozen=True)
class Story:
    """A prompt, and where its answer comes from.

    Attributes:
        example: the prompt, its answer, and a token that should not follow.
        title: what there is to see.
        source: the token that the strongest head reads.
        role: what that token is, and what the head does with it where that is no copy.
    """

    example: Example
    title: str
    source: str
    role: str


_TASKS = {
    "indirect_object": (
        "Who is given something: the name that was said once, not the one said twice.",
        "the name said twice, and writes against it",
    ),
    "landmark": ("A fact: the city of a landmark.", "the landmark"),
    "agreement": (
        "Singular or plural: the verb agrees with its subject, not with the nearer noun.",
        "the subject",
    ),
    "induction": (
        "Repetition: what followed this word before follows again.",
        "what followed the word before",
    ),
}
_SOURCES = (" John", " Mary", " Eiffel", " Needle", " keys", " key", " gate", " lamp")


def stories() -> list[Story]:
    """A story for each of :func:`dla_hooks.demo.examples`, in their order."""
    return [
        Story(example, title=_TASKS[example.task][0], source=source, role=_TASKS[example.task][1])
        for example, source in zip(literal_examples(), _SOURCES, strict=True)
    ]
