"""Peak memory of one call above what was resident before it, in a process of its own (Linux).

Run as ``python -m benchmarks.memory MODEL TOKENS CASE|plain``; prints bytes. glibc is told to give
freed memory back at once, or its pools would blur what is measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


def peak_of(model: str, n_tokens: int, case: str) -> int | None:
    """Bytes above the weights at the highest point of one call; None where there is no /proc."""
    if not _STATUS.exists():
        return None
    command = [sys.executable, "-m", "benchmarks.memory", model, str(n_tokens), case]
    environment = {**os.environ, **_ALLOCATOR}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    """Measure one call and print its peak."""
    from benchmarks.cases import make_calls, make_model

    name, n_tokens, case = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    model = make_model(name)
    for parameter in model.parameters():
        parameter.sum()  # touch every page, so that no weight is paged in while measuring
    any_case = "component, last position"
    warm_up = make_calls(model, 16, any_case if case == "plain" else case)
    call = make_calls(model, n_tokens, any_case if case == "plain" else case)
    which = 1 if case == "plain" else 0
    warm_up[which]()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _resident("VmRSS")
    call[which]()
    sys.stdout.write(f"{_resident('VmHWM') - before}\n")


if __name__ == "__main__":
    main()
