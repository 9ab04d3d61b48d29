"""The stories of the demonstration: heads carry each prompt, and taking them out agrees."""

from __future__ import annotations

import pytest
import torch

from dla_hooks import SourceTokens, demo, direct_logit_attribution
from dla_hooks.demo.stories import Story, stories

STORIES = stories()


@pytest.fixture(scope="module")
def shipped():
    return demo.load()


def attributed(shipped, story: Story, unit):
    model, tokenizer = shipped
    one = story.example
    return direct_logit_attribution(
        model, one.prompt, one.answer, one.incorrect, unit=unit, tokenizer=tokenizer
    )


def strongest(heads) -> tuple[str, float]:
    """The head that wrote most, either way."""
    rows = [(row.label, float(value)) for row, value in heads if row.kind == "head"]
    return max(rows, key=lambda pair: abs(pair[1]))


def difference_without(shipped, story: Story, layer: int | None = None, head: int = 0) -> float:
    """The model's own logit difference, with a head set to zero by a hook of the test's own."""
    model, tokenizer = shipped
    answer, incorrect = (
        tokenizer.encode(text)[0] for text in (story.example.answer, story.example.incorrect)
    )
    width = model.config.n_embd // model.config.n_head

    def silence(_module, inputs):
        z = inputs[0].clone()
        z[..., head * width : (head + 1) * width] = 0
        return (z,)

    handles = []
    if layer is not None:
        projection = model.transformer.h[layer].attn.c_proj
        handles.append(projection.register_forward_pre_hook(silence))
    try:
        with torch.no_grad():
            logits = model(**tokenizer(story.example.prompt, return_tensors="pt")).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return float(logits[answer] - logits[incorrect])


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.example.prompt)
class TestStory:
    def test_heads_write_most_of_the_difference(self, shipped, story):
        heads = attributed(shipped, story, "head")
        written = float(heads.attribution.sum() - heads["remainder"])
        assert written >= 0.5 * difference_without(shipped, story)

    def test_the_strongest_head_reads_the_token_that_the_story_names(self, shipped, story):
        heads = attributed(shipped, story, "head")
        sources = attributed(shipped, story, SourceTokens(top=None))
        label, value = strongest(heads)
        assert value > 0
        most, took = next(pair for pair in sources.top(500) if pair[0].startswith(f"{label}<"))
        assert sources.tokens[0][int(most.partition("<")[2])] == story.source
        assert took > 0.5 * value

    def test_taking_out_the_strongest_head_costs_most(self, shipped, story):
        heads = attributed(shipped, story, "head")
        clean = difference_without(shipped, story)
        lost = {
            f"L{layer}H{head}": clean - difference_without(shipped, story, layer, head)
            for layer in range(4)
            for head in range(6)
        }
        first, _ = strongest(heads)
        others = sorted(abs(lost[label]) for label in lost if label != first)
        assert lost[first] > 1
        # One of the others, at random, costs less than half: their median.
        assert lost[first] > 2 * others[len(others) // 2]
