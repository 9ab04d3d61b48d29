"""Prompts with arguments of their own beside their tokens."""

from __future__ import annotations

import pytest
import torch
from zoo import build

from dla_hooks import InputError, attribute_many

PROMPTS = [
    {"input_ids": [3, 4, 5, 6], "position_ids": [0, 1, 5, 6]},
    [3, 4, 5],
    {"input_ids": torch.tensor([[7, 8, 9]]), "position_ids": torch.tensor([[2, 1, 0]])},
    {"input_ids": torch.tensor([7, 8, 9])},
]


def logits_of(model, prompt):
    given = prompt if isinstance(prompt, dict) else {"input_ids": prompt}
    given = {name: torch.as_tensor(value).reshape(1, -1) for name, value in given.items()}
    return model(**given, use_cache=False).logits.detach()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_prompts_with_positions_of_their_own_are_each_as_the_model_runs_them(name, seed):
    model = build(name, seed=seed)
    for prompt, found in zip(PROMPTS, attribute_many(model, PROMPTS, 5, pos=None), strict=True):
        due = logits_of(model, prompt)[..., 5]
        logit = found.logit
        if found.softcap is not None:
            logit = found.softcap * torch.tanh(logit / found.softcap)
        torch.testing.assert_close(logit, due.to(logit), rtol=0, atol=1e-5)
        torch.testing.assert_close(found.total() + found.bias, found.logit, rtol=0, atol=1e-8)


def test_prompts_with_token_types_of_their_own_are_each_as_the_model_runs_them():
    model = build("gpt2")
    prompts = [
        {"input_ids": [5, 6, 7], "token_type_ids": types} for types in ([1, 1, 2], [9, 2, 2])
    ]
    for prompt, found in zip(prompts, attribute_many(model, prompts, 5), strict=True):
        due = logits_of(model, prompt)[:, -1, 5]
        torch.testing.assert_close(found.logit, due, rtol=0, atol=1e-5)


def test_folder_to_resume_tells_prompts_by_their_arguments(tmp_path):
    model = build("llama")
    first = [float(one.logit) for one in attribute_many(model, PROMPTS, 5, resume=tmp_path)]
    again = [float(one.logit) for one in attribute_many(model, PROMPTS, 5, resume=tmp_path)]
    assert again == first
    others = [{**PROMPTS[0], "position_ids": [0, 1, 2, 3]}, *PROMPTS[1:]]
    with pytest.raises(InputError, match="prompt 0 or its answer is not the one"):
        list(attribute_many(model, others, 5, resume=tmp_path))


def test_prompt_of_embeddings_is_refused_and_does_not_stop_the_rest():
    model = build("llama")
    embeds = model.get_input_embeddings()(torch.tensor([[3, 4]])).detach()
    found = list(attribute_many(model, [{"inputs_embeds": embeds}, [3, 4]], 5))
    assert isinstance(found[0], InputError)
    assert "plan of prepare" in str(found[0])
    torch.testing.assert_close(
        found[1].logit, logits_of(model, [3, 4])[:, -1, 5], atol=1e-5, rtol=0
    )
