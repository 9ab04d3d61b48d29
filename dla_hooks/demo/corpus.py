"""Generates the text the demonstration model learns from, and the prompts it never saw.

Four tasks, each with a part held out for showing that the model generalises:

``indirect_object``
    "When Mary and John went to the store, John gave a drink to" continues with " Mary".
    Held out: pairs of names (in every sentence) and templates (with every pair).
``landmark``
    "The Eiffel Tower is in the city of" continues with " Paris".
    Held out: three of the twelve phrasings of each landmark, different ones for neighbours.
``agreement``
    "The keys near the cabinet" continues with " are".
    Held out: pairs of a subject and a distractor, in every number and with every preposition.
``induction``
    "Pairs: fox lamp, river gate. river" continues with " gate".
    Held out: pairs of words.

What is held out follows from the words themselves and not from a seed, so that training with any
seed and asking with any other can never overlap.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dla_hooks.demo import words

_Drawn = TypeVar("_Drawn")

TASKS: tuple[str, ...] = ("indirect_object", "landmark", "agreement", "induction")


@dataclass(frozen=True)
class Example:
    """A prompt, the token that should follow it, and a plausible token that should not.

    ``answer`` and ``incorrect`` have their leading space and are one token each.
    """

    task: str
    prompt: str
    answer: str
    incorrect: str


# The well-known sentences, held out by name because the hash below need not hold them out.
_LITERAL_HELD_OUT: frozenset[str] = frozenset(
    {"names John Mary", "nouns key cabinet"}
    | {"words river gate", "words fox lamp", "words cup stone", "words apple wolf"}
)


def _is_held_out(*parts: str) -> bool:
    """Whether this combination is kept out of training: about one in eight.

    A checksum stands in for a random choice because, unlike ``hash``, it is the same in every
    process.
    """
    key = " ".join(parts)
    return key in _LITERAL_HELD_OUT or zlib.crc32(key.encode()) % 8 == 0


def names_held_out(one: str, other: str) -> bool:
    """Whether the two names never share a training sentence, in either order."""
    return _is_held_out("names", *sorted((one, other)))


def template_held_out(opening: str, meeting: str, closing: str) -> bool:
    """Whether the indirect-object template never occurs in training."""
    return _is_held_out("template", opening, meeting, closing)


def phrasing_held_out(landmark: int, phrasing: int) -> bool:
    """Whether the landmark never occurs in training in that phrasing, both given by index.

    Counting instead of hashing gives every landmark and every phrasing the same share.
    """
    return (landmark + phrasing) % 4 == 0


def nouns_held_out(subject: str, distractor: str) -> bool:
    """Whether the subject never meets that distractor in training, both given as singulars."""
    return _is_held_out("nouns", subject, distractor)


def words_held_out(first: str, second: str) -> bool:
    """Whether the second word never follows the first as its pair in training."""
    return _is_held_out("words", first, second)


# --- one sampler per task -----------------------------------------------------------------
#
# Each returns an example, and its training document. Both come from the same lines, so that they
# can differ in nothing but what is held out.


@dataclass(frozen=True)
class Document:
    """A training text in two parts that are to be joined.

    Attributes:
        task: its task.
        given: most of its words could as well be others.
        rest: each word follows from what went before, and that is what there is to learn.
        looks: where it can be foreseen how the text goes on: a beginning of it, the words of
            ``given`` that say so, and a token that does not follow.
    """

    task: str
    given: str
    rest: str
    looks: tuple[tuple[str, str, str], ...] = ()


_Sample = tuple[Example, Document]


def _indirect_object(rng: random.Random, held_out: bool) -> _Sample:
    # A held-out prompt always has a new pair of names, and every other time a new template too.
    new_template = held_out and rng.random() < 0.5
    first, second = _choose(
        lambda: rng.sample(words.NAMES, 2), lambda pair: names_held_out(*pair) == held_out
    )
    template = _choose(
        lambda: [rng.choice(part) for part in (words.OPENINGS, words.MEETINGS, words.CLOSINGS)],
        lambda parts: template_held_out(*parts) == new_template,
    )
    opening, meeting, closing = template
    giver, receiver = (first, second) if rng.random() < 0.5 else (second, first)
    if not held_out and rng.random() < 0.08:
        # A third person gives: either of the two may receive. This makes the usual corrupted
        # prompt, with an unrelated name for the giver, something the model has an opinion on.
        giver = _choose(
            lambda: rng.choice(words.NAMES),
            lambda name: (
                name not in (first, second)
                and not names_held_out(name, first)
                and not names_held_out(name, second)
            ),
        )
    prompt = f"{opening} {closing}".format(
        first=first,
        second=second,
        meeting=meeting,
        place=rng.choice(words.PLACES),
        giver=giver,
        thing=rng.choice(words.THINGS),
    )
    example = Example("indirect_object", prompt, f" {receiver}", f" {giver}")
    looks = ((prompt, example.answer, example.incorrect),)
    return example, Document(example.task, prompt, f"{example.answer}.", looks)


def _landmark(rng: random.Random, held_out: bool) -> _Sample:
    which, phrasing = _choose(
        lambda: (rng.randrange(len(words.LANDMARKS)), rng.randrange(len(words.PHRASINGS))),
        lambda pair: phrasing_held_out(*pair) == held_out,
    )
    landmark, city = words.LANDMARKS[which]
    other = _choose(lambda: rng.choice(words.LANDMARKS)[1], lambda name: name != city)
    prompt = words.PHRASINGS[phrasing].format(landmark=landmark)
    example = Example("landmark", prompt, f" {city}", f" {other}")
    return example, Document(
        "landmark", prompt, f" {city}.", ((prompt, f" {landmark}", f" {other}"),)
    )


def _agreement(rng: random.Random, held_out: bool) -> _Sample:
    subject, distractor = _choose(
        lambda: rng.sample(words.NOUNS, 2),
        lambda pair: nouns_held_out(pair[0][0], pair[1][0]) == held_out,
    )
    plural = rng.randrange(2)
    prompt = f"{rng.choice(words.DETERMINERS)} {subject[plural]}"
    # Some training sentences have no distractor: the plain rule is the easier one to learn.
    if held_out or rng.random() < 0.9:
        prompt += f" {rng.choice(words.PREPOSITIONS)} the {distractor[rng.randrange(2)]}"
    answer, incorrect = f" {words.VERBS[plural]}", f" {words.VERBS[1 - plural]}"
    rest = f"{answer} {rng.choice(words.ADJECTIVES)}."
    example = Example("agreement", prompt, answer, incorrect)
    looks = ((prompt, f" {subject[plural]}", incorrect),)
    return example, Document("agreement", prompt, rest, looks)


def _induction(rng: random.Random, held_out: bool) -> _Sample:
    # No word comes twice in a list: a word then has exactly one right continuation.
    count = rng.randint(2, 6)
    pairs: list[tuple[str, str]] = []
    free = list(words.LIST_WORDS)
    while len(pairs) < count:
        first, second = _choose(
            lambda: rng.sample(free, 2), lambda pair: words_held_out(*pair) == held_out
        )
        pairs.append((first, second))
        free.remove(first)
        free.remove(second)
    again = rng.sample(pairs, count)
    asked = rng.randrange(count)
    given = f"{rng.choice(words.LIST_OPENINGS)} {_listed(pairs)}."
    first, second = again[asked]
    other = _choose(lambda: rng.choice(pairs)[1], lambda word: word != second)
    prompt = f"{given} {_listed([*again[:asked], (first,)])}"
    looks = tuple(
        (f"{given} {_listed([*again[:number], (one,)])}", f" {two}", f" {again[number - 1][1]}")
        for number, (one, two) in enumerate(again)
    )
    document = Document("induction", given, f" {_listed(again)}.", looks)
    return Example("induction", prompt, f" {second}", f" {other}"), document


def _listed(pairs: Sequence[tuple[str, ...]]) -> str:
    return ", ".join(" ".join(pair) for pair in pairs)


_SAMPLERS: dict[str, Callable[[random.Random, bool], _Sample]] = {
    "indirect_object": _indirect_object,
    "landmark": _landmark,
    "agreement": _agreement,
    "induction": _induction,
}


def _choose(draw: Callable[[], _Drawn], accept: Callable[[_Drawn], bool]) -> _Drawn:
    """Draw until something is accepted."""
    while not accept(drawn := draw()):
        pass
    return drawn


# --- what other modules use ---------------------------------------------------------------


def training_document(task: str, rng: random.Random) -> Document:
    """One training document of the task, with nothing in it that is held out."""
    if task == "landmark" and rng.random() < 0.1:
        landmark, city = rng.choice(words.LANDMARKS)
        return Document(task, words.REVERSED_PHRASING.format(city=city, landmark=landmark), "")
    return _SAMPLERS[task](rng, False)[1]


def held_out(task: str, n: int, seed: int = 0) -> list[Example]:
    """``n`` different examples of the task whose prompts never occur in training."""
    if task not in _SAMPLERS:
        raise ValueError(f"unknown task {task!r}: the tasks are {', '.join(TASKS)}")
    rng = random.Random(seed)
    found: dict[Example, None] = {}
    # The draws are bounded because a task has only so many different examples.
    for _ in range(100 * n + 1000):
        if len(found) >= n:
            break
        found[_SAMPLERS[task](rng, True)[0]] = None
    else:
        raise ValueError(f"fewer than {n} different held-out examples of {task!r} were found")
    return list(found)


def literal_examples() -> list[Example]:
    """The well-known prompts, each with its mirror image; none of them occurs in training."""
    gave = "When {} and {} went to the store, {} gave a drink to"
    pairs = "Pairs: fox lamp, river gate, cup stone, apple wolf. cup stone, {}"
    return [
        Example("indirect_object", gave.format("Mary", "John", "John"), " Mary", " John"),
        Example("indirect_object", gave.format("Mary", "John", "Mary"), " John", " Mary"),
        Example("landmark", "The Eiffel Tower is in the city of", " Paris", " London"),
        Example("landmark", "You can visit the Space Needle in", " Seattle", " Rome"),
        Example("agreement", "The keys near the cabinet", " are", " is"),
        Example("agreement", "The key near the cabinets", " is", " are"),
        Example("induction", pairs.format("river"), " gate", " lamp"),
        Example("induction", pairs.format("fox"), " lamp", " gate"),
    ]


def vocabulary_text() -> Iterator[str]:
    """Text with every word of the corpus, in each form in which it can occur.

    Names and cities come both with a leading space and, as at the start of a text, without one.
    """
    for name in words.NAMES:
        yield f"{name} {name}"
    for landmark, city in words.LANDMARKS:
        yield f"{city} {city} {landmark}"
    blank = dict.fromkeys(("first", "second", "meeting", "place", "giver", "thing"), "the")
    for pattern in words.OPENINGS:
        yield pattern.format(**blank)
    for pattern in words.CLOSINGS:
        yield f" {pattern.format(**blank)}"
    for pattern in words.PHRASINGS:
        yield pattern.format(landmark="the")
    yield words.REVERSED_PHRASING.format(city=" the", landmark="the")
    yield from words.DETERMINERS
    yield from words.LIST_OPENINGS
    listed = (words.MEETINGS, words.PLACES, words.THINGS, words.PREPOSITIONS, words.VERBS)
    for group in (*listed, words.ADJECTIVES, words.LIST_WORDS, *words.NOUNS):
        for word in group:
            yield f" {word}"
