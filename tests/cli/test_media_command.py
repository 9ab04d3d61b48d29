"""`dla-hooks attribute --image` and `--audio`, with processors made here."""

from __future__ import annotations

import wave

import numpy as np
import pytest
import torch
import transformers
from test_cli import call
from zoo import tiny_tokenizer

PROMPT = "The cat sat on the mat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA with its processor."""
    pytest.importorskip("PIL", reason="images need Pillow")
    where = tmp_path_factory.mktemp("llava")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlavaForConditionalGeneration(config).save_pretrained(where)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**sizes),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(where)
    return where


@pytest.fixture
def picture(tmp_path):
    image = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype("uint8")
    image.fromarray(noise).save(tmp_path / "x.png")
    return tmp_path / "x.png"


def test_an_image_beside_a_prompt_gets_placeholders_ahead_of_it(folder, picture, tmp_path):
    done = call("attribute", folder, PROMPT, "--image", picture, "--csv", tmp_path / "a.csv")
    assert done.exit_code == 0, done.output
    assert "'<image>The cat sat on the mat'" in done.output
    placed = call("attribute", folder, f"<image>{PROMPT}", "--image", picture)
    assert placed.output in done.output
    patch = call("attribute", folder, f"<image>{PROMPT}", "--image", picture, "--pos", 5)
    assert "<image 1,1>" in patch.output or "<image 1,0>" in patch.output


def test_what_cannot_be_read_is_said_before_the_weights_are(folder, picture, tmp_path):
    done = call("attribute", folder, PROMPT, "--image", tmp_path / "none.png")
    assert "there is no file" in done.output
    done = call("attribute", folder, "<image> <image>", "--image", picture)
    assert "the prompt has 2 of '<image>', and there are 1" in done.output
    (tmp_path / "text.png").write_text("no image")
    done = call("attribute", folder, PROMPT, "--image", tmp_path / "text.png")
    assert "cannot be read as an image" in done.output


def test_a_model_without_a_processor_says_so(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes(b"\0\0" * 100)
    done = call("attribute", "demo", "The keys", "--audio", tmp_path / "a.wav")
    assert done.exit_code == 1
    assert "has no processor that reads sounds" in done.output
