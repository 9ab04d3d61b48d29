"""Weights in parts: FSDP2, tensor parallelism, and torch's data parallel wrappers.

Everything runs in processes of its own: a process group is one thing for a whole process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from zoo import build

from dla_hooks import direct_logit_attribution

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)

SLOW = pytest.mark.slow
IDS = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(1))
HELPERS = Path(__file__).parents[1] / "helpers"
BEGIN = """
    import os, sys, torch, torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from dla_hooks import UnsupportedModelError, direct_logit_attribution as dla, verify
    from zoo import build
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    ids = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(1))

    def blocks_of(model):
        return model.model.layers if hasattr(model, "model") else model.transformer.h

    def same(model, plain, units=("component", "layer", "head")):
        for unit in units:
            found, expected = (dla(one, ids, 7, unit=unit) for one in (model, plain))
            assert found.labels == expected.labels
            torch.testing.assert_close(
                found.attribution, expected.attribution, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                logits = plain(ids).logits[:, -1, 7]
            torch.testing.assert_close(found.logit.to(logits), logits, rtol=1e-4, atol=1e-5)
"""
END = """
    dist.barrier()
    dist.destroy_process_group()
    print("right", flush=True)
    os._exit(0)  # threads of torch's may abort the interpreter while it ends
"""


def _run(body: str, processes: int) -> None:
    """Run code in several processes that form a group, all of which must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = textwrap.dedent(BEGIN) + textwrap.dedent(body) + textwrap.dedent(END)
    paths = [str(HELPERS), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
           "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1",
           "PYTHONPATH": os.pathsep.join(filter(None, paths))}  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [one.communicate(timeout=240)[0] for one in started]
    finally:
        for one in started:
            one.kill()
    for one, text in zip(started, said, strict=True):
        assert one.returncode == 0, text[-3000:]


@pytest.mark.parametrize("processes", [pytest.param(1, marks=SLOW), 2])
def test_fully_sharded_model_has_the_numbers_of_the_whole_one(processes):
    _run(
        """
        from torch.distributed.fsdp import fully_shard
        for family in ("llama", "gpt2", "qwen2"):
            plain, model = (build(family, dtype=torch.float32) for _ in range(2))
            for block in blocks_of(model):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            kinds = {name: type(p) for name, p in model.named_parameters()}
            same(model, plain)
            assert verify(model, show=False).ok
            assert {name: type(p) for name, p in model.named_parameters()}.keys() == kinds.keys()
        """,
        processes,
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_mlps_in_tensor_parallel_have_the_numbers_of_the_whole_one(processes):
    _run(
        """
        from torch.distributed.tensor.parallel import (
            ColwiseParallel, RowwiseParallel, parallelize_module)
        plain, model = (build("llama", dtype=torch.float32) for _ in range(2))
        plan = {"mlp.down_proj": RowwiseParallel(), "mlp.up_proj": ColwiseParallel(),
                "mlp.gate_proj": ColwiseParallel()}
        for block in blocks_of(model):
            parallelize_module(block, mesh, plan)
        same(model, plain)
        """,
        processes,
    )


@pytest.mark.parametrize(
    ("family", "processes"),
    [("llama", 2), *(pytest.param(*one, marks=SLOW) for one in (("llama", 1), ("qwen2", 2)))],
)
def test_tp_plan_of_transformers_is_right_or_refused(processes, family, tmp_path):
    build(family, dtype=torch.float32).save_pretrained(tmp_path)
    _run(
        f"""
        from transformers import AutoModelForCausalLM
        folder = {str(tmp_path)!r}
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
        same(model, plain, ("component", "layer"))
        try:
            same(model, plain, ("head",))
        except UnsupportedModelError as error:
            assert size > 1 and "a part of the heads in each process" in str(error), error
        """,
        processes,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wrappers_of_torch_are_looked_through(family):
    _run(
        f"""
        plain = build({family!r}, dtype=torch.float32)
        for wrap in (nn.DataParallel, nn.parallel.DistributedDataParallel):
            same(wrap(build({family!r}, dtype=torch.float32)).eval(), plain)
        """,
        1,
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_data_parallel_model_is_the_model_inside(family):
    model = build(family)
    found = direct_logit_attribution(torch.nn.DataParallel(model).eval(), IDS, 7, unit="head")
    expected = direct_logit_attribution(model, IDS, 7, unit="head")
    torch.testing.assert_close(found.attribution, expected.attribution)
    assert found.model == expected.model
