"""Peak memory of one call above what was resident before it, in a process of its own.

On the CPU that is the process' own high-water mark (Linux), reset after a short warm-up with the
weights resident. glibc gives freed memory back at once here, or its pools would blur the figure. On
CUDA it is the allocator's peak. The other process runs one named job of :mod:`benchmarks.job`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.models import Setting

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


def measurable(device: str = "cpu") -> bool:
    """True if peaks can be measured here."""
    return device.startswith("cuda") or _RESET.exists()


def peak_of(name: str, setting: Setting) -> int:
    """Bytes above the weights at the highest point of one call of a contender."""
    job = {"job": "call", "name": name, "setting": dataclasses.asdict(setting)}
    return in_a_process(job)


def in_a_process(job: dict[str, Any]) -> int:
    """Run a job and return the bytes that it prints.

    Raises:
        RuntimeError: with the last lines that it wrote, when it fails.
    """
    import torch

    command = [sys.executable, "-m", "benchmarks.job", json.dumps(job)]
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = "\n".join(done.stderr.splitlines()[-6:])
        raise RuntimeError(f"measuring the memory of {job} failed:\n{lines}")
    return int(done.stdout.split()[-1])


def resident(field: str = "VmRSS") -> int:
    """A figure of this process in bytes: ``VmRSS`` now, ``VmHWM`` at its highest."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")


def peak_during(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes at the highest point of a call above what was there before it."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    _RESET.write_text("5")  # puts VmHWM back to VmRSS
    before = resident()
    call()
    return resident("VmHWM") - before
