"""The names of tokens in the results of many prompts."""

from __future__ import annotations

from typing import Any

from dla_hooks.inputs.prompts import to_strings
from dla_hooks.many.batches import Item
from dla_hooks.many.questions import names
from dla_hooks.results.ranked import Result


class Names:
    """Tokens as text, each made once.

    Args:
        tokenizer: or None, which names tokens by their ids.
        answers_with: names answers; a tokenizer, too, or a classifier's labels.
    """

    def __init__(self, tokenizer: Any, answers_with: Any) -> None:
        self._prompts, self._answers = _Names(tokenizer), _Names(answers_with)

    def put_on(self, result: Result, item: Item) -> Result:
        """Say in a result which prompt and answers it is of."""
        result.tokens = [self._prompts.of(item.ids.tolist())]
        result.of_tokens(len(item.ids))
        if result.seen is not None:
            result.seen = result.seen.named(self._answers.of)
        if item.question is not None:
            result.answer, result.incorrect = names(item.question, result, self._answers.of)
            return result
        correct = item.correct.expand(item.n_entries).tolist()
        wrong = correct
        if item.incorrect is not None:
            wrong = item.incorrect.expand(item.n_entries).tolist()
        if len(set(zip(correct, wrong, strict=True))) == 1:  # one name stands for all entries
            correct, wrong = correct[:1], wrong[:1]
        result.answer = self._answers.of(correct)
        result.incorrect = None if item.incorrect is None else self._answers.of(wrong)
        return result


class _Names:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, ids: list[int]) -> list[str]:
        new = [i for i in set(ids) if i not in self._known]
        self._known.update(zip(new, to_strings(new, self._tokenizer), strict=True))
        return [self._known[i] for i in ids]
