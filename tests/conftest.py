"""What every test needs."""

from __future__ import annotations

import zlib
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from shapes import check_results

check_results()

# The models are tiny: a second thread would only wait for the first.
torch.set_num_threads(1)

# What older versions of other libraries cannot run: a piece of a test's name, the library, the
# newest version that is known to fail, and why.
_TOO_OLD = (
    ("saved_attention", "peft", (0, 18), "it cannot run a saved attention module"),
    ("one_that_counts", "peft", (0, 18), "it cannot merge where one adapter of two was deleted"),
)


def _is_at_most(library: str, newest: tuple[int, ...]) -> bool:
    try:
        numbers = version(library).split(".")
    except PackageNotFoundError:
        return False
    return tuple(int(number) for number in numbers[: len(newest)]) <= newest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--sample N`` for suites that only the weekly run has time for."""
    parser.addoption(
        "--sample",
        type=int,
        default=1,
        metavar="N",
        help="run about one test in N, the same ones each time",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what the installed versions cannot run, with the reason; draw a sample if asked to."""
    share = config.getoption("--sample")
    left_out = [item for item in items if zlib.crc32(item.nodeid.encode()) % share]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not zlib.crc32(item.nodeid.encode()) % share]
    for piece, library, newest, reason in _TOO_OLD:
        if _is_at_most(library, newest):
            said = f"{library} {version(library)}: {reason}"
            for item in items:
                if piece in item.name:
                    item.add_marker(pytest.mark.skip(reason=said))


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """TransformerLens models, each built when it is first asked for."""
    from tl_models import References

    return References(lambda: tmp_path_factory.mktemp("reference"))
