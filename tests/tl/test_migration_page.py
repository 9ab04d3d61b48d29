"""The snippets of docs/migration.md that need TransformerLens or the hub, and so are no examples.

A folder called ``gpt2`` stands for the hub's model: the one that ships with the library.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dla_hooks

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
SNIPPETS = [one for one in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if ">>>" not in one]


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What a snippet finds, in a folder where ``gpt2`` is a checkpoint."""
    (tmp_path / "gpt2").symlink_to(dla_hooks.demo.path())
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(
        "import dla_hooks\n"
        "from dla_hooks import direct_logit_attribution\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n",
        found,
    )
    return found


def test_snippets_for_raw_models_run_and_agree(names):
    change, conventions = SNIPPETS[1:3]
    exec(change.partition("# after\n")[2], names)
    wrapped = names["result"]
    exec(conventions, names)
    torch.testing.assert_close(names["result"].attribution, wrapped.attribution)
    assert wrapped.answer == [" Paris"]


@pytest.mark.tl
@pytest.mark.filterwarnings("ignore")  # the reference's own
def test_snippets_for_transformer_lens_run(names, tmp_path):
    pytest.importorskip("transformer_lens")
    before, after = SNIPPETS[0].split("# after\n")
    exec(before + after, names)
    from tl_models import bridged

    model, tokenizer = dla_hooks.demo.load()
    folder = tmp_path / "bridge"
    folder.mkdir()
    bridge = bridged(model, folder)
    bridge.tokenizer.__dict__.update(tokenizer.__dict__)
    names |= {
        "bridge": bridge,
        "tokens": torch.tensor([tokenizer.encode("The Eiffel Tower is in")]),
    }
    exec(SNIPPETS[3], names)


def test_snippets_are_the_ones_that_are_tested():
    assert len(SNIPPETS) == 4
