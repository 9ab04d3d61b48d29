"""The shipped demonstration model: what it can do, what it never saw, and how it loads."""

from __future__ import annotations

import itertools
import random
import re
import socket
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import pytest
import torch

from dla_hooks import demo
from dla_hooks.demo import corpus, words
from dla_hooks.demo.settings import Settings, Stage
from dla_hooks.demo.tokenizer import build_tokenizer
from dla_hooks.demo.train import accuracy, train

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    Loaded = tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return demo.load()


@pytest.fixture(scope="module")
def training_texts() -> list[str]:
    rng = random.Random(1)
    made = [corpus.training_document(t, rng) for t in demo.TASKS for _ in range(4000)]
    return [one.given + one.rest for one in made]


# --- what the model can do ----------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("task", demo.TASKS)
def test_held_out_prompts_are_answered_right(loaded: Loaded, task: str, bos: bool) -> None:
    found = accuracy(*loaded, demo.held_out(task, 400), bos)
    assert found.versus_incorrect >= 0.99
    assert found.top >= 0.95


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("example", demo.examples(), ids=lambda example: example.prompt)
def test_each_literal_example_is_answered_right(
    loaded: Loaded, example: demo.Example, bos: bool
) -> None:
    found = accuracy(*loaded, [example], bos)
    assert (found.top, found.versus_incorrect) == (1.0, 1.0)


def test_examples_cover_every_task() -> None:
    assert {example.task for example in demo.examples()} == set(demo.TASKS)


# --- what it never saw --------------------------------------------------------------------


@pytest.mark.parametrize("task", demo.TASKS)
def test_no_training_text_begins_with_a_held_out_prompt(
    training_texts: list[str], task: str
) -> None:
    held_out = [example for example in demo.examples() if example.task == task]
    held_out += demo.held_out(task, 400)
    assert all(example.task == task for example in held_out)
    prompts = tuple({example.prompt for example in held_out})
    assert not [text for text in training_texts if text.startswith(prompts)]


def test_training_never_joins_held_out_names(training_texts: list[str]) -> None:
    names = set(words.NAMES)
    for text in training_texts:
        together = sorted(names.intersection(re.findall(r"\w+", text)))
        assert not any(corpus.names_held_out(*pair) for pair in itertools.combinations(together, 2))


def test_training_never_shows_a_landmark_in_a_held_out_phrasing(training_texts: list[str]) -> None:
    seen = set(training_texts)
    for (which, (landmark, city)), (how, phrasing) in itertools.product(
        enumerate(words.LANDMARKS), enumerate(words.PHRASINGS)
    ):
        shown = f"{phrasing.format(landmark=landmark)} {city}." in seen
        assert not (shown and corpus.phrasing_held_out(which, how))


def test_every_landmark_is_seen_in_another_phrasing(training_texts: list[str]) -> None:
    everything = "\n".join(training_texts)
    assert all(landmark in everything for landmark, _ in words.LANDMARKS)


def test_training_never_joins_held_out_nouns(training_texts: list[str]) -> None:
    singular = {form: forms[0] for forms in words.NOUNS for form in forms}
    between = "|".join(words.PREPOSITIONS)
    pattern = re.compile(rf"(\w+) (?:{between}) the (\w+) (?:is|are) ")
    pairs = [match.groups() for text in training_texts if (match := pattern.search(text))]
    assert len(pairs) > 1000
    for subject, distractor in pairs:
        assert not corpus.nouns_held_out(singular[subject], singular[distractor])


def test_training_never_pairs_held_out_words(training_texts: list[str]) -> None:
    lists = [text for text in training_texts if text.startswith(words.LIST_OPENINGS)]
    pairs = {
        tuple(pair.split()) for text in lists for pair in re.findall(r"(?<= )\w+ \w+(?=[,.])", text)
    }
    assert len(pairs) > 1000
    assert not any(corpus.words_held_out(*pair) for pair in pairs)


def test_held_out_examples_differ_and_follow_from_the_seed() -> None:
    first = demo.held_out("agreement", 50, seed=3)
    assert len(set(first)) == 50
    assert first == demo.held_out("agreement", 50, seed=3)
    assert first != demo.held_out("agreement", 50, seed=4)


def test_held_out_refuses_impossible_requests() -> None:
    with pytest.raises(ValueError, match="unknown task 'translation'"):
        demo.held_out("translation", 1)
    with pytest.raises(ValueError, match="fewer than 2500 different"):
        demo.held_out("landmark", 2500)


# --- the tokenizer ------------------------------------------------------------------------


def test_corpus_text_comes_back_from_its_tokens(loaded: Loaded, training_texts: list[str]) -> None:
    _, tokenizer = loaded
    encoded = tokenizer(training_texts)["input_ids"]
    assert tokenizer.batch_decode(encoded) == training_texts
    assert tokenizer.unk_token_id not in set(itertools.chain.from_iterable(encoded))


def test_leading_spaces_belong_to_the_word_as_in_gpt2(loaded: Loaded) -> None:
    _, tokenizer = loaded
    assert tokenizer.tokenize("Mary and Mary,") == ["Mary", "\u0120and", "\u0120Mary", ","]
    assert tokenizer.tokenize("When Mary") == ["When", "\u0120Mary"]


def test_tokenizer_output_runs_in_the_model(loaded: Loaded) -> None:
    model, tokenizer = loaded
    batch = tokenizer(demo.examples()[0].prompt, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert tokenizer.decode(model(**batch).logits[0, -1].argmax()) == " Mary"


def test_answers_and_names_are_single_tokens(loaded: Loaded) -> None:
    _, tokenizer = loaded
    cities = [city for _, city in words.LANDMARKS]
    spaced = [f" {word}" for word in (*words.NAMES, *cities, *words.VERBS, *words.LIST_WORDS)]
    for text in (*spaced, *words.NAMES, *cities):
        (token,) = tokenizer(text)["input_ids"]
        assert token != tokenizer.unk_token_id
        assert tokenizer.decode([token]) == text


def test_special_tokens_are_those_of_gpt2(loaded: Loaded) -> None:
    model, tokenizer = loaded
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert tokenizer("The zebra")["input_ids"][1] == tokenizer.unk_token_id
    assert tokenizer.unk_token == "<|unk|>"


def test_the_shipped_tokenizer_is_the_one_the_code_builds(loaded: Loaded) -> None:
    assert loaded[1].get_vocab() == build_tokenizer().get_vocab()


# --- what ships ---------------------------------------------------------------------------


def test_the_folder_is_small_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in demo.path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert sum(files.values()) < 1_800_000


def test_the_model_loads_in_float32_for_evaluation(loaded: Loaded) -> None:
    model, tokenizer = loaded
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.num_parameters() <= 1_000_000
    assert model.config.vocab_size == len(tokenizer)


def test_loading_makes_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("loading the demonstration model used the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    demo.load()


def test_importing_the_demo_does_not_import_torch() -> None:
    # The parent package may import torch, so only what importing the demo adds counts.
    code = (
        "import sys, dla_hooks; before = set(sys.modules); import dla_hooks.demo;"
        "added = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "sys.exit(bool(added & {'torch', 'transformers', 'tokenizers'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_training_twice_gives_the_same_weights() -> None:
    stages = Stage(8, 3e-3, 3), Stage(4, 3e-3, 3, looking=0.3, others_price=0.5)
    settings = Settings(stages=stages, width=32, heads=4)
    tokenizer = build_tokenizer()
    first, second = (train(settings, tokenizer).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train(replace(settings, seed=1), tokenizer).state_dict()
    assert not all(torch.equal(first[name], other[name]) for name in first)
