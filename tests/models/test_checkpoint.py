"""Loading: what is complete loads as it was saved, what is not is refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig
from transformers.utils import logging
from zoo import build, tiny_tokenizer

from dla_hooks import CheckpointError, InputError, UnsupportedModelError
from dla_hooks.checkpoint import load, load_model, load_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build("gpt2", dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


class TestLoads:
    def test_saved_weights_load_in_eval_mode(self, saved):
        model, tokenizer = load(saved)
        original = build("gpt2", dtype=torch.float32).state_dict()
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, original[name]), name
        assert not model.training
        assert tokenizer.encode(" Paris") == tiny_tokenizer().encode(" Paris")

    @pytest.mark.parametrize("name", ["gpt2-untied", "llama-mha-tied", "gemma2", "mixtral", "opt"])
    def test_families_load_without_missing_weights(self, name, tmp_path):
        build(name, dtype=torch.float32).save_pretrained(tmp_path)
        assert load_model(tmp_path).dtype == torch.float32

    @pytest.mark.parametrize(
        ("dtype", "loaded"),
        [
            ("float32", torch.float32),
            ("float64", torch.float64),
            ("float16", torch.float16),
            ("auto", torch.bfloat16),
        ],
    )
    def test_dtype_is_followed(self, tmp_path, dtype, loaded):
        build("gpt2", dtype=torch.bfloat16).save_pretrained(tmp_path)
        assert load_model(tmp_path, dtype).dtype == loaded

    def test_path_with_tilde_is_expanded(self, saved, monkeypatch):
        monkeypatch.setenv("HOME", str(saved.parent))
        assert load_tokenizer(f"~/{saved.name}") is not None

    def test_loading_prints_nothing(self, saved, capfd):
        load(saved)
        assert capfd.readouterr() == ("", "")

    def test_transformers_settings_are_restored(self, saved, copy):
        def settings():
            return logging.get_verbosity(), logging.is_progress_bar_enabled()

        logging.set_verbosity_info()
        try:
            before = settings()
            load(saved)
            assert settings() == before
            (copy / "model.safetensors").unlink()
            with pytest.raises(CheckpointError):
                load(copy)
            assert settings() == before
        finally:
            logging.set_verbosity_warning()


class TestTokenizer:
    def test_missing_tokenizer_gives_none(self, copy):
        for file in copy.glob("tokenizer*"):
            file.unlink()
        model, tokenizer = load(copy)
        assert model is not None
        assert tokenizer is None

    def test_empty_tokenizer_gives_none(self, copy):
        (copy / "tokenizer.json").unlink()
        edit_tokenizer = copy / "tokenizer_config.json"
        edit_tokenizer.write_text('{"tokenizer_class": "GPT2Tokenizer"}')
        assert load_tokenizer(copy) is None

    def test_corrupt_tokenizer_is_refused(self, copy):
        (copy / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
            load(copy)
        assert load_model(copy) is not None


class TestRefuses:
    @pytest.mark.parametrize(
        "name", ["./nowhere", "../nowhere", "/no/where", "~/nowhere", "a/b/c", "a\\b", "nowhere/x/"]
    )
    def test_missing_path_is_refused_without_the_hub(self, name, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("asked the hub")

        monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
        with pytest.raises(CheckpointError, match=r"^there is no folder "):
            load(name)

    @pytest.mark.parametrize("name", ["nobody-here", "nobody/nothing-at-all"])
    def test_hub_id_offline_is_refused(self, name, offline):
        with pytest.raises(CheckpointError) as caught:
            load(name)
        assert str(caught.value) == (
            f"{name} is neither a folder here nor in the local cache, and the Hugging Face hub "
            "cannot be reached"
        )

    def test_empty_name_is_refused(self):
        with pytest.raises(InputError, match="empty"):
            load("")

    def test_path_of_a_file_is_refused(self, saved):
        with pytest.raises(CheckpointError, match="is a file; give the folder"):
            load(saved / "model.safetensors")

    def test_folder_without_config_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"has no config\.json: it holds no model"):
            load(tmp_path)

    def test_adapter_folder_is_refused(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="an adapter only; load its base model"):
            load(tmp_path)

    @pytest.mark.parametrize(
        ("text", "words"),
        [("{", "cannot be read"), ("[]", "names no model_type"), ("{}", "names no model_type")],
    )
    def test_invalid_config_is_refused(self, copy, text, words):
        (copy / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=words):
            load(copy)

    def test_folder_without_weights_is_refused(self, copy):
        (copy / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="weights cannot be read"):
            load(copy)

    @pytest.mark.parametrize("keep", [0, 5, 1000, 100_000])
    def test_truncated_weights_are_refused(self, copy, keep):
        file = copy / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match="weights cannot be read"):
            load(copy)

    def test_corrupt_weights_are_refused(self, copy):
        (copy / "model.safetensors").write_bytes(b"no tensors at all, but long enough for a head")
        with pytest.raises(CheckpointError, match="weights cannot be read"):
            load(copy)

    def test_missing_shard_is_refused(self, tmp_path):
        build("gpt2", dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="60KB")
        shards = sorted(tmp_path.glob("model-*.safetensors"))
        assert len(shards) > 1
        shards[0].unlink()
        with pytest.raises(CheckpointError, match="weights cannot be read"):
            load_model(tmp_path)

    def test_missing_weights_are_refused(self, copy):
        edit_weights(copy, lambda weights: weights.pop("transformer.h.1.mlp.c_fc.weight"))
        with pytest.raises(CheckpointError) as caught:
            load(copy)
        assert "lacks 1 of the model's weights (transformer.h.1.mlp.c_fc.weight)" in str(
            caught.value
        )

    def test_missing_untied_unembedding_is_refused(self, tmp_path):
        build("gpt2-untied", dtype=torch.float32).save_pretrained(tmp_path)
        edit_weights(tmp_path, lambda weights: weights.pop("lm_head.weight"))
        with pytest.raises(CheckpointError, match=r"lacks 1 .*\(lm_head\.weight\)"):
            load(tmp_path)

    def test_weights_of_another_shape_are_refused(self, copy):
        edit_config(copy, n_positions=32)
        with pytest.raises(CheckpointError, match=r"wpe\.weight: \[64, 36\] instead of \[32, 36\]"):
            load(copy)

    def test_unknown_model_type_is_refused(self, copy):
        edit_config(copy, model_type="zork")
        with pytest.raises(UnsupportedModelError, match="does not know"):
            load(copy)

    def test_model_of_images_is_refused(self, tmp_path):
        ViTConfig().save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModelError, match=r"'vit' model.*not load as a causal"):
            load(tmp_path)

    def test_untrusted_code_is_not_run(self, copy):
        trace = copy / "was_run"
        (copy / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\n")
        edit_config(copy, model_type="zork", auto_map={"AutoConfig": "own.Config"})
        with pytest.raises(CheckpointError, match=r"trust_remote_code=True .*--trust-remote-code"):
            load(copy)
        assert not trace.exists()

    @pytest.mark.parametrize("device", ["zork", "cuda:99"])
    def test_missing_device_is_refused(self, saved, device):
        with pytest.raises(InputError, match=f"device '{device}' cannot be used"):
            load(saved, device=device)

    def test_unknown_dtype_is_refused(self, saved):
        with pytest.raises(InputError, match=r"dtype must be one of float32, .*got 'int8'"):
            load(saved, "int8")

    def test_every_message_is_one_line(self, copy):
        edit_config(copy, model_type="zork")
        with pytest.raises(UnsupportedModelError) as caught:
            load(copy)
        assert "\n" not in str(caught.value)
