"""Texts that are the same but for the last digits of their numbers, and for bars drawn by them."""

from __future__ import annotations

import doctest
import re

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_BAR = re.compile(r"[ █▉▊▋▌▍▎▏▐│]*[█▌▐│][ █▉▊▋▌▍▎▏▐│]*")


def nearly(one: str, other: str) -> bool:
    """Whether two texts have the same words, and numbers within a hundredth of each other.

    Whole numbers are words. So is the end of a line that is a bar, but for its length.
    """
    if _words(one) != _words(other):
        return False
    pairs = zip(_numbers(one), _numbers(other), strict=True)
    return all(abs(a - b) <= 0.01 * max(1.0, abs(a)) for a, b in pairs)


def _plain(text: str) -> str:
    return _BAR.sub(" | ", text)


def _fraction(found: re.Match[str]) -> bool:
    return "." in found[0] or "e" in found[0]


def _words(text: str) -> str:
    words = _NUMBER.sub(lambda found: "#" if _fraction(found) else found[0], _plain(text))
    return re.sub(r"[ \n]+", " ", words).strip()


def _numbers(text: str) -> list[float]:
    return [float(found[0]) for found in _NUMBER.finditer(_plain(text)) if _fraction(found)]


class Checker(doctest.OutputChecker):
    """Takes an example's output where it is nearly what stands there."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return nearly(want, got) or super().check_output(want, got, optionflags)
