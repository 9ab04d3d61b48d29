"""The results of some new tokens at a time, put together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dla_hooks.call import ReadModel
from dla_hooks.generation.text import Text
from dla_hooks.inputs.prompts import to_strings
from dla_hooks.results.joined import joined
from dla_hooks.results.ranked import Result


class Pieces:
    """Results by unit, of a text that grows.

    Args:
        text: the text.
        read: the model, whose tokens are named.
    """

    def __init__(self, text: Text, read: ReadModel) -> None:
        self._text, self._tokenizer = text, read.tokenizer
        self._found: list[Mapping[str, Result]] = []

    def add(self, steps: range, found: Mapping[str, Result]) -> None:
        """Take the results of some new tokens, which follow those before."""
        self._found.append(found)

    def whole(self, new: Tensor) -> dict[str, Result]:
        """One result for each unit.

        Args:
            new: all new tokens [batch, n], as they were generated.
        """
        steps = range(len(self._text))
        results = {key: [one[key] for one in self._found] for key in self._found[0]}
        return {key: self._finished(each, steps, new) for key, each in results.items()}

    def one(self, step: int, found: Mapping[str, Result]) -> dict[str, Result]:
        """The results of a single new token."""
        steps = range(step, step + 1)
        new = self._text.new_BS[:, step:]
        return {key: self._finished([each], steps, new) for key, each in found.items()}

    def _finished(self, pieces: list[Result], steps: range, new: Tensor) -> Result:
        """The pieces as one result that names the tokens of the text so far."""
        text, tokenizer = self._text, self._tokenizer
        prompt = text.whole(steps.stop)
        result = joined(pieces, int(prompt.mask.sum(-1).max()))
        real_BS = text.real_BS[:, steps.start : steps.stop]
        result.tokens = [
            to_strings(ids[mask].tolist(), tokenizer)
            for ids, mask in zip(prompt.input_ids, prompt.mask, strict=True)
        ]
        result.generated = [
            to_strings(ids[real].tolist(), tokenizer)
            for ids, real in zip(new, real_BS, strict=True)
        ]
        result.generated_ids = new
        answers = text.answers(steps, single=False)
        result.answer = self._names(answers.correct, real_BS)
        result.incorrect = None
        if answers.incorrect is not None:
            result.incorrect = self._names(answers.incorrect, real_BS)
        return result

    def _names(self, ids_BS: Tensor, real_BS: Tensor) -> list[str]:
        """One name where all are the same, else one for each entry; padding has none."""
        names = to_strings(ids_BS.flatten().tolist(), self._tokenizer)
        real = real_BS.flatten().tolist()
        if len({name for name, there in zip(names, real, strict=True) if there}) == 1:
            return [next(name for name, there in zip(names, real, strict=True) if there)]
        return names
