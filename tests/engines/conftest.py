"""A small Ray cluster for the tests that need one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="session")
def cluster():
    """Ray on this machine; what it was called with is its address."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install dla-hooks[ray]")
    data = pytest.importorskip("ray.data", reason="ray[data] is not installed")
    own = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HELPERS), os.environ.get("PYTHONPATH")))),
    }
    before = {name: os.environ.get(name) for name in own}
    os.environ |= own
    try:
        ray.init(
            num_cpus=4,  # as Ray counts them: actors hold two, reading and writing take others
            object_store_memory=200 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        data.DataContext.get_current().enable_progress_bars = False
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
