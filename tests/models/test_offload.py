"""Models whose weights are elsewhere between uses (extra ``offload``: accelerate)."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from units import UNIT_NAMES
from zoo import build, example_ids, tiny_tokenizer

import dla_hooks.placement
from dla_hooks import (
    CheckpointError,
    InputError,
    MissingExtraError,
    direct_logit_attribution,
    verify,
)
from dla_hooks.checkpoint import DTYPES, load, load_model
from dla_hooks.modules import weights
from dla_hooks.modules.linear import input_width, mean_row, output_width, rows

pytestmark = pytest.mark.lowest

accelerate = pytest.importorskip("accelerate")
OLD = int(transformers.__version__.partition(".")[0]) < 5
BY_FIVE = pytest.mark.skipif(OLD, reason="transformers 5 leaves weights in the checkpoint")
CPU = torch.device("cpu")


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The only place for temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def saved(spec, folder, dtype=torch.float32):
    build(spec, dtype=dtype).save_pretrained(folder)
    return folder


def offloaded(spec, where, folder):
    """A model whose weights accelerate keeps in memory, in files of its own, or in a checkpoint."""
    if where == "checkpoint":
        if OLD:
            pytest.skip(BY_FIVE.kwargs["reason"])
        return load_model(saved(spec, folder / "model"), device_map="disk")
    model = build(spec, dtype=torch.float32)
    if where == "memory":
        return accelerate.cpu_offload(model, execution_device=CPU)
    return accelerate.disk_offload(model, str(folder / "files"), execution_device=CPU)


def hold_equal(found, expected, dtype=torch.float32):
    """To rounding: a kernel may take another path for weights that begin anywhere in a file."""
    for name in ("attribution", "logit", "bias"):
        one, other = getattr(found, name), getattr(expected, name)
        allowed = 32 * torch.finfo(dtype).eps * float(other.nan_to_num().abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=allowed, equal_nan=True)


class TestNumbers:
    @pytest.mark.parametrize("where", ["memory", "files", "checkpoint"])
    @pytest.mark.parametrize("spec", ["gpt2", "gemma2", "llama-bias", "phi", "granite"])
    def test_numbers_match_model_in_memory(self, spec, where, tmp_path, monkeypatch):
        monkeypatch.setattr(weights, "_TILE_ELEMENTS", 300)  # several tiles in a tiny vocabulary
        ids = example_ids(spec)
        options = {"center_unembed": True, "fold_value_biases": True, "pos": None}
        here = build(spec, dtype=torch.float32)
        away = offloaded(spec, where, tmp_path)
        assert all(parameter.is_meta for parameter in away.parameters())
        for unit in UNIT_NAMES:
            expected = direct_logit_attribution(here, ids, 5, unit=unit, **options)
            hold_equal(direct_logit_attribution(away, ids, 5, unit=unit, **options), expected)
        for answers in ((ids.flip(-1), None), (5, 7)):  # at every position another row, or two
            expected = direct_logit_attribution(here, ids, *answers, unit="head", pos=None)
            hold_equal(
                direct_logit_attribution(away, ids, *answers, unit="head", pos=None), expected
            )
        assert verify(away, show=False).ok
        assert all(parameter.is_meta for parameter in away.parameters())  # left as it was found

    @BY_FIVE
    @pytest.mark.parametrize(
        ("spec", "dtype"),
        [
            *((spec, dtype) for spec in ("gpt2", "llama-mha-tied") for dtype in DTYPES),
            ("mixtral", "float32"),
            ("mixtral", "auto"),  # its experts' kernel knows no float64
        ],
    )
    def test_numbers_match_for_checkpoint_in_another_dtype(self, spec, dtype, tmp_path, scratch):
        """Tied unembeddings, and experts that are put together anew, among them."""
        folder = saved(spec, tmp_path / "model", torch.bfloat16)
        here, away = load_model(folder, dtype), load_model(folder, dtype, device_map="disk")
        assert all(parameter.is_meta for parameter in away.parameters())
        for unit in ("component", "head"):
            expected = direct_logit_attribution(here, example_ids(spec), 5, 7, unit=unit)
            hold_equal(direct_logit_attribution(away, example_ids(spec), 5, 7, unit=unit), expected)

    @BY_FIVE
    @pytest.mark.parametrize("device_map", ["auto", "disk"])
    @pytest.mark.parametrize("form", ["one file", "shards", "torch"])
    def test_numbers_match_with_weights_partly_in_memory(self, form, device_map, tmp_path, scratch):
        model = build("llama", dtype=torch.float32)
        model.save_pretrained(tmp_path, max_shard_size="20KB" if form == "shards" else "1GB")
        if form == "torch":
            torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
            (tmp_path / "model.safetensors").unlink()
        away, tokenizer = load(tmp_path, device_map=device_map, max_memory="150KB")
        assert tokenizer is None
        assert len({parameter.is_meta for parameter in away.parameters()}) == 2
        for unit in UNIT_NAMES:
            expected = direct_logit_attribution(model, example_ids("llama"), 5, unit=unit)
            hold_equal(direct_logit_attribution(away, example_ids("llama"), 5, unit=unit), expected)

    @BY_FIVE
    @pytest.mark.parametrize("max_memory", [None, "1GiB"])
    def test_model_that_fits_is_not_offloaded(self, max_memory, tmp_path, scratch):
        folder = saved("llama", tmp_path / "model")
        model = load_model(folder, device_map="auto", max_memory=max_memory)
        assert not any(parameter.is_meta for parameter in model.parameters())

    @BY_FIVE
    def test_centred_logits_match_model(self, tmp_path, monkeypatch):
        monkeypatch.setattr(weights, "_TILE_ELEMENTS", 300)
        away = offloaded("llama-bias", "checkpoint", tmp_path)
        ids = example_ids("llama-bias")
        with torch.no_grad():
            logits = away(ids).logits.double()[:, -1]
        found = direct_logit_attribution(away, ids, 5, center_unembed=True)
        torch.testing.assert_close(
            found.logit.double(), logits[:, 5] - logits.mean(-1), rtol=1e-5, atol=1e-5
        )


def test_custom_device_map_matches_model_in_memory(tmp_path):
    """As ``from_pretrained(..., device_map=...)`` sets it up, from a folder."""
    folder = saved("llama", tmp_path / "model")
    ids = example_ids("llama")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.2"), "cpu")
    places |= {"model.layers.1": "disk", "lm_head": "disk"}
    places |= {"model.rotary_emb": "cpu", "model.norm": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=places, offload_folder=str(tmp_path / "offload")
    ).eval()
    for unit in ("component", "head"):
        expected = direct_logit_attribution(plain, ids, 5, 7, unit=unit)
        found = direct_logit_attribution(spread, ids, 5, 7, unit=unit)
        torch.testing.assert_close(found.attribution, expected.attribution)


class _Recorder:
    """Stands for safetensors' ``safe_open``, and counts what is cut out of each tensor."""

    def __init__(self, *args, **kwargs):
        self._file = safe_open(*args, **kwargs)

    cut: ClassVar[Counter] = Counter()

    def __enter__(self):
        self._open = self._file.__enter__()
        return self

    def __exit__(self, *args):
        return self._file.__exit__(*args)

    def get_slice(self, name):
        kept, recorder = self._open.get_slice(name), self

        class Slice:
            def get_shape(self):
                return kept.get_shape()

            def __getitem__(self, where):
                values = kept[where]
                recorder.cut[name] += values.numel()
                return values

        return Slice()


@pytest.fixture
def cut(monkeypatch):
    """Entries that our own code has taken out of each tensor of a checkpoint."""
    monkeypatch.setattr(_Recorder, "cut", Counter())
    monkeypatch.setattr(weights, "safe_open", _Recorder)
    return _Recorder.cut


class TestReads:
    @pytest.mark.parametrize("where", ["memory", "files", "checkpoint"])
    def test_sizes_are_known_without_reads(self, where, tmp_path, monkeypatch):
        away = offloaded("gpt2-untied", where, tmp_path)

        def refuse(*_, **__):
            raise AssertionError("read")

        monkeypatch.setattr(weights, "_open", refuse)
        monkeypatch.setattr(accelerate.utils.offload.PrefixedDataset, "__getitem__", refuse)
        config = away.config
        assert output_width(away.lm_head) == config.vocab_size
        assert input_width(away.lm_head) == config.n_embd
        assert input_width(away.transformer.h[1].mlp.c_proj) == away.transformer.h[1].mlp.c_fc.nf

    @BY_FIVE
    @pytest.mark.parametrize("spec", ["llama", "llama-mha-tied"])
    def test_selected_rows_are_read_by_slices(self, spec, tmp_path, cut, monkeypatch):
        away = offloaded(spec, "checkpoint", tmp_path)
        width, vocabulary = away.config.hidden_size, away.config.vocab_size
        monkeypatch.setattr(weights, "_TILE_ELEMENTS", 4 * width)
        truth = build(spec, dtype=torch.float32).lm_head.weight
        ids = torch.tensor([vocabulary - 1, 5, 4, vocabulary - 1])
        found, _ = rows(away.lm_head, ids, torch.float64)
        assert torch.equal(found, truth[ids].double())
        assert sum(cut.values()) <= 2 * 4 * width  # two tiles hold them all
        cut.clear()
        mean, _ = mean_row(away.lm_head, vocabulary, torch.float64)
        torch.testing.assert_close(mean, truth.double().mean(0))
        assert sum(cut.values()) == vocabulary * width  # once, and no tile of it twice

    @pytest.mark.parametrize("where", ["memory", "files", "checkpoint"])
    def test_unembedding_is_read_whole_by_forward_pass_only(
        self, where, tmp_path, cut, monkeypatch
    ):
        away = offloaded("llama", where, tmp_path)
        monkeypatch.setattr(weights, "_TILE_ELEMENTS", 4 * away.config.hidden_size)
        fetched = Counter()
        dataset = accelerate.utils.offload.PrefixedDataset
        fetch = dataset.__getitem__

        def counted(self, key):
            fetched[self.prefix + key] += 1
            return fetch(self, key)

        monkeypatch.setattr(dataset, "__getitem__", counted)
        ids = example_ids("llama")
        direct_logit_attribution(away, ids, 5, 7, unit="head")
        fetched.clear(), cut.clear()
        with torch.no_grad():
            away(ids)
        plain = dict(fetched)
        fetched.clear()
        direct_logit_attribution(away, ids, 5, 7, unit="head")
        projections = {name for name in plain if name.endswith("o_proj.weight")}
        assert len(projections) == away.config.num_hidden_layers
        extra = {name: count - plain[name] for name, count in fetched.items()}
        for name, more in extra.items():
            # Norms are asked what they do, and projections for their bias.
            small = "norm" in name or name in projections
            assert more <= (1 if small else 0), name
        assert cut["lm_head.weight"] <= 2 * 4 * away.config.hidden_size

    def test_accelerate_files_are_memory_mapped(self, tmp_path, monkeypatch):
        away = offloaded("llama", "files", tmp_path)

        def refuse(*_, **__):
            raise AssertionError("copied")

        monkeypatch.setattr(accelerate.utils.offload, "load_offloaded_weight", refuse)
        truth = build("llama", dtype=torch.float32).lm_head.weight
        found, _ = rows(away.lm_head, torch.tensor([7, 3]), torch.float32)
        assert torch.equal(found, truth[[7, 3]])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_accelerate_files_in_16_bits_are_exact(self, dtype, tmp_path):
        here, away = (build("llama", dtype=dtype) for _ in range(2))
        accelerate.disk_offload(away, str(tmp_path), execution_device=CPU)
        ids = example_ids("llama")
        expected = direct_logit_attribution(here, ids, 5, unit="head")
        hold_equal(direct_logit_attribution(away, ids, 5, unit="head"), expected, dtype)


@BY_FIVE
class TestTemporaryFolder:
    def bin_checkpoint(self, folder):
        saved("llama", folder)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        return folder

    def test_no_folder_if_checkpoint_is_read_directly(self, tmp_path, scratch):
        model = load_model(saved("llama", tmp_path / "model"), "bfloat16", device_map="disk")
        assert model is not None
        assert list(scratch.iterdir()) == []

    def test_folder_is_deleted_with_model(self, tmp_path, scratch):
        model = load_model(self.bin_checkpoint(tmp_path / "model"), device_map="disk")
        assert len(list(scratch.iterdir())) == 1
        assert verify(model, show=False).ok
        del model
        gc.collect()
        assert list(scratch.iterdir()) == []

    def test_folder_is_deleted_when_checkpoint_is_refused(self, tmp_path, scratch):
        folder = self.bin_checkpoint(tmp_path / "model")
        held = torch.load(folder / "pytorch_model.bin", weights_only=True)
        held.pop("model.norm.weight")
        torch.save(held, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"lacks 1 .*model\.norm\.weight"):
            load_model(folder, device_map="disk")
        assert list(scratch.iterdir()) == []

    def test_folder_is_deleted_with_process(self, tmp_path, scratch):
        folder = self.bin_checkpoint(tmp_path / "model")
        code = (
            "import sys, os; from dla_hooks.checkpoint import load_model\n"
            "model = load_model(sys.argv[1], device_map='disk')\n"
            "print(len(os.listdir(sys.argv[2])))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(scratch)],
            env={**os.environ, "TMPDIR": str(scratch)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "1\n"
        assert list(scratch.iterdir()) == []


def _without(name):
    def damage(folder):
        held = load_file(folder / "model.safetensors")
        held.pop(name)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def _config(**changes):
    def damage(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def _truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


DAMAGES = {
    "a weight is missing": (_without("model.layers.1.mlp.up_proj.weight"), "lacks 1 of"),
    "the unembedding is missing": (_without("lm_head.weight"), r"lacks 1 .*lm_head\.weight"),
    "other shapes": (_config(vocab_size=50), r"2 weights .* \[61, 40\] instead of \[50, 40\]"),
    "a stack cut short": (_config(num_hidden_layers=1), "the stack was cut short"),
    "a stack that is longer": (_config(num_hidden_layers=4), "lacks"),
    "a file cut short": (_truncate, "the weights cannot be read"),
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
}


class TestRefuses:
    def test_device_map_with_transformers_4_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(dla_hooks.placement, "version", lambda name: "4.57.1")
        folder = saved("llama", tmp_path / "model")
        with pytest.raises(InputError, match=r"needs transformers 5.* installed is 4\.57\.1"):
            load_model(folder, device_map="disk")

    @BY_FIVE
    @pytest.mark.parametrize("options", [("disk", None), ("auto", "30KB")], ids=["disk", "auto"])
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_damaged_checkpoint_gives_same_messages(self, damage, options, tmp_path, scratch):
        change, words = DAMAGES[damage]
        folder = saved("llama", tmp_path / "model")
        change(folder)
        with pytest.raises(CheckpointError, match=words) as usual:
            load_model(folder)
        with pytest.raises(CheckpointError) as here:
            load_model(folder, device_map=options[0], max_memory=options[1])
        assert str(here.value) == str(usual.value)
        assert list(scratch.iterdir()) == []

    def test_device_beside_device_map_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="device='cpu' and device_map='disk' both say where"):
            load_model(saved("llama", tmp_path), device="cpu", device_map="disk")

    def test_unknown_device_map_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="must be one of auto, disk, got 'balanced'"):
            load_model(saved("llama", tmp_path), device_map="balanced")

    @BY_FIVE
    @pytest.mark.parametrize("device_map", ["auto", "disk"])
    @pytest.mark.parametrize("size", ["4", "much", "", "GiB", "-1GB", "4 G", "infGB", "nanMB"])
    def test_unreadable_max_memory_is_refused(self, size, device_map, tmp_path):
        with pytest.raises(InputError, match=rf"max_memory='{size}' is no size; .*4GiB or 500MB"):
            load_model(saved("llama", tmp_path), device_map=device_map, max_memory=size)

    def test_max_memory_without_device_map_is_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"max_memory='4GiB' .* give device_map='auto' or"):
            load_model(saved("llama", tmp_path), max_memory="4GiB")

    @BY_FIVE
    def test_device_map_without_accelerate_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "accelerate.utils", None)
        with pytest.raises(MissingExtraError, match=r"device_map='disk' .*pip install 'accelerate"):
            load_model(saved("llama", tmp_path), device_map="disk")

    def test_model_on_meta_device_is_refused(self):
        with torch.device("meta"):
            model = build("llama", dtype=torch.float32)
        assert next(model.parameters()).is_meta
        with pytest.raises(InputError, match=r"weight of Linear is on the meta device.*device_map"):
            direct_logit_attribution(model, example_ids("llama"), 5)

    def test_preloaded_modules_are_refused(self, tmp_path):
        model = build("llama", dtype=torch.float32)
        accelerate.disk_offload(
            model, str(tmp_path), execution_device=CPU, preload_module_classes=["LlamaAttention"]
        )
        with pytest.raises(InputError, match="without preload_module_classes"):
            direct_logit_attribution(model, example_ids("llama"), 5, unit="head")

    def test_sharded_weights_are_refused(self):
        model = build("llama", dtype=torch.float32)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight = nn.Parameter(torch.empty(0))
        with pytest.raises(InputError, match=r"has the shape \[0\], so its values are elsewhere"):
            direct_logit_attribution(model, example_ids("llama"), 5, unit="head")


# A process of its own: what one call leaves behind would hide in the next.
MEASURE = """
import pathlib, sys
import torch
from transformers.models.llama import modeling_llama
import accelerate
from dla_hooks import direct_logit_attribution
from dla_hooks.checkpoint import load_model

def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

def reset():
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark

reset()
before = resident("VmRSS")
model = load_model(sys.argv[1], "float32", device_map="disk")
if sys.argv[2] != "float32":
    reset()  # transformers looks through a file whose dtype is another
ids = torch.arange(256)[None]
for _ in range(2):
    direct_logit_attribution(model, ids, 5, 7, unit="head")
print(resident("VmHWM") - before, 4 * sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_far_below_weights(dtype, tmp_path):
    """Loading, the first call and the second, of 60 million parameters that are left on disk."""
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    allocator = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dtype],
        env={**os.environ, **allocator},
        capture_output=True,
        text=True,
        check=True,
    )
    shutil.rmtree(tmp_path)
    peak, whole = map(int, done.stdout.split())
    assert peak <= 0.5 * whole, f"{peak / 1e6:.0f} of {whole / 1e6:.0f} MB"


# The same as a user has it: one command, and the allocator as it comes.
COMMAND = """
import pathlib, sys
import torch
from transformers.models.llama import modeling_llama
import accelerate
from dla_hooks.cli.app import app

def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])

pathlib.Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
prompt = " ".join(["the cat sat on the mat"] * 40)
where = ["--unit", "head", "--device-map", "disk"]
app(["attribute", sys.argv[1], prompt, "--answer", " cat", *where], standalone_mode=False)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")
def test_command_peak_memory_is_far_below_weights(tmp_path):
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config)
    whole = 4 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    del model
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    shutil.rmtree(tmp_path)
    assert int(done.stdout.split()[-1]) <= 0.3 * whole
