"""What numbers are about, so that only those of one subject are averaged."""

from __future__ import annotations

from dataclasses import dataclass

from dla_hooks.results.rows import Row, Words


@dataclass(frozen=True)
class Subject:
    """What numbers are about; those of the same subject can be averaged.

    Attributes:
        unit: its name.
        labels: of the rows.
        difference: whether of differences of two logits.
        rows: a record of each row.
        words: what the unit says of its rows.
        softcap: of the model, or None.
        compared: whether the numbers are differences of two runs.
        contrast: which prompts' numbers are subtracted from which, in words; None where none are.
    """

    unit: str
    labels: list[str]
    difference: bool
    rows: list[Row]
    words: Words
    softcap: float | None
    compared: bool = False
    contrast: str | None = None


def mismatch(given: Subject, first: Subject) -> str:
    """What keeps two results or summaries from being averaged, in words; "" where nothing does."""
    if given.unit != first.unit:
        return f"unit is {given.unit!r}, where the first has {first.unit!r}"
    if given.labels != first.labels:
        pairs = zip(given.labels, first.labels, strict=False)
        n = len(given.labels), len(first.labels)
        other = next((f"{a!r} for {b!r}" for a, b in pairs if a != b), f"{n[0]} rows for {n[1]}")
        return f"labels are not those of the first ({other})"
    if given.compared != first.compared:
        kinds = ("of one run", "the difference of two runs")
        return f"number is {kinds[given.compared]}, where the first's is {kinds[first.compared]}"
    if given.contrast != first.contrast:
        kind = [one.contrast or "no difference of two prompts" for one in (given, first)]
        return f"number is {kind[0]}, where the first's is {kind[1]}"
    if given.difference != first.difference:
        kinds = ("a logit", "a difference of two logits")
        return (
            f"number is {kinds[given.difference]}, where the first's is {kinds[first.difference]}"
        )
    return ""
