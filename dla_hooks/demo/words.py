"""The word lists and sentence patterns of the demonstration corpus: data, no logic."""

from __future__ import annotations

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# --- indirect objects ---------------------------------------------------------------------

NAMES: Final[tuple[str, ...]] = _words(
    """Mary John Tom James Dan Sarah Anna Emma Paul Peter Mark Lucy Alice Bob Carol David Kate
    Laura Kevin Sam Jack Jane Julia Henry George Helen Martin Simon Linda Susan Robert Michael
    Karen Nancy Lisa Betty Steven Edward Brian Ronald Anthony Jason Ruth Sharon Michelle Eric
    Stephen Andrew"""
)

# An indirect-object template is one opening, one meeting and one closing. Splitting it in three
# makes many templates from few words, so that whole templates can be held out of training while
# each of their words is still learnt from the others.
OPENINGS: Final[tuple[str, ...]] = (
    "When {first} and {second} {meeting} the {place}, {giver}",
    "After {first} and {second} {meeting} the {place}, {giver}",
    "While {first} and {second} {meeting} the {place}, {giver}",
    "Once {first} and {second} {meeting} the {place}, {giver}",
    "Because {first} and {second} {meeting} the {place}, {giver}",
    "Then {first} and {second} {meeting} the {place}, and {giver}",
    "Yesterday {first} and {second} {meeting} the {place}, where {giver}",
    "{first} and {second} {meeting} the {place}. {giver}",
)
MEETINGS: Final[tuple[str, ...]] = (
    "went to",
    "came to",
    "walked to",
    "drove to",
    "were at",
    "met at",
    "worked at",
    "had lunch at",
)
CLOSINGS: Final[tuple[str, ...]] = (
    "gave a {thing} to",
    "gave the {thing} to",
    "handed a {thing} to",
    "handed the {thing} to",
    "passed the {thing} to",
    "decided to give a {thing} to",
    "wanted to offer the {thing} to",
    "offered a {thing} to",
    "showed the {thing} to",
    "brought a {thing} to",
)
PLACES: Final[tuple[str, ...]] = _words(
    """store park school office station restaurant garden house beach hospital market library
    museum cafe"""
)
THINGS: Final[tuple[str, ...]] = _words(
    """drink book ring letter ball map cake flower bottle basket ticket present pencil computer
    key snack"""
)

# --- landmarks ----------------------------------------------------------------------------

# Only cities of a single word: the answer has to be one token. Several cities have more than one
# landmark, so that a city is not simply another name for its landmark.
LANDMARKS: Final[tuple[tuple[str, str], ...]] = (
    ("Eiffel Tower", "Paris"),
    ("Colosseum", "Rome"),
    ("Tower Bridge", "London"),
    ("Brandenburg Gate", "Berlin"),
    ("Space Needle", "Seattle"),
    ("Kremlin", "Moscow"),
    ("Louvre Museum", "Paris"),
    ("British Museum", "London"),
    ("Trevi Fountain", "Rome"),
    ("Sagrada Familia", "Barcelona"),
    ("Parthenon", "Athens"),
    ("Acropolis", "Athens"),
    ("Prado Museum", "Madrid"),
    ("Hagia Sophia", "Istanbul"),
    ("Blue Mosque", "Istanbul"),
    ("Opera House", "Sydney"),
    ("Forbidden City", "Beijing"),
    ("Little Mermaid", "Copenhagen"),
    ("Charles Bridge", "Prague"),
    ("Egyptian Museum", "Cairo"),
    ("Belvedere Palace", "Vienna"),
    ("Willis Tower", "Chicago"),
    ("Liberty Bell", "Philadelphia"),
    ("Belem Tower", "Lisbon"),
    ("Atomium", "Brussels"),
    ("Burj Khalifa", "Dubai"),
    ("Chain Bridge", "Budapest"),
    ("Rialto Bridge", "Venice"),
)

# No phrasing may be the beginning of another one: the city has to be the only continuation.
PHRASINGS: Final[tuple[str, ...]] = (
    "The {landmark} is in the city of",
    "The {landmark} can be found in",
    "The {landmark} stands in the middle of",
    "The {landmark} was built in",
    "You can visit the {landmark} in",
    "To see the {landmark}, travel to",
    "Every tour of the {landmark} begins in",
    "If you want to see the {landmark}, go to",
    "The {landmark} is located in",
    "The {landmark} is a famous landmark of",
    "The train to the {landmark} stops in",
    "We took a picture of the {landmark} in",
)
REVERSED_PHRASING: Final = "{city} is the home of the {landmark}."

# --- agreement ----------------------------------------------------------------------------

# Irregular plurals stand beside regular ones, so that the number is a property of the word.
NOUNS: Final[tuple[tuple[str, str], ...]] = (
    ("key", "keys"),
    ("cabinet", "cabinets"),
    ("door", "doors"),
    ("book", "books"),
    ("table", "tables"),
    ("window", "windows"),
    ("car", "cars"),
    ("tree", "trees"),
    ("house", "houses"),
    ("box", "boxes"),
    ("lamp", "lamps"),
    ("chair", "chairs"),
    ("bottle", "bottles"),
    ("cup", "cups"),
    ("plate", "plates"),
    ("boat", "boats"),
    ("dog", "dogs"),
    ("cat", "cats"),
    ("bird", "birds"),
    ("horse", "horses"),
    ("pencil", "pencils"),
    ("picture", "pictures"),
    ("basket", "baskets"),
    ("stone", "stones"),
    ("coat", "coats"),
    ("knife", "knives"),
    ("child", "children"),
    ("mouse", "mice"),
    ("man", "men"),
    ("woman", "women"),
    ("clock", "clocks"),
    ("letter", "letters"),
)
DETERMINERS: Final[tuple[str, ...]] = (
    "The",
    "Today the",
    "We think that the",
    "She says that the",
    "Maybe the",
)
PREPOSITIONS: Final[tuple[str, ...]] = (
    "near",
    "behind",
    "beside",
    "under",
    "above",
    "by",
    "next to",
    "in front of",
)
VERBS: Final[tuple[str, str]] = ("is", "are")
ADJECTIVES: Final[tuple[str, ...]] = _words("old new red green small large clean heavy lost")

# --- induction ----------------------------------------------------------------------------

LIST_OPENINGS: Final[tuple[str, ...]] = ("Pairs:", "List:", "Remember:")
LIST_WORDS: Final[tuple[str, ...]] = _words(
    """fox river gate stone cup lamp cloud bridge apple wolf silver paper hill rope candle storm
    brick honey wheel glass forest shell bell iron pepper tiger ladder cotton ocean drum feather
    copper needle maple rocket button castle pearl violin desert mirror sugar hammer island
    lantern marble orange puzzle ribbon saddle temple tunnel velvet whistle anchor barrel carrot
    dragon engine falcon"""
)
