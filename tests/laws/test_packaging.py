"""What is public, what is shipped, and that ``adapters/`` is never a package of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dla_hooks
from dla_hooks.targets import request_classes
from dla_hooks.units import unit_classes

ROOT = Path(__file__).parents[2]


def test_public_names_are_the_listed_ones_and_all_exist():
    assert dla_hooks.__all__ == sorted(dla_hooks.__all__)
    for name in dla_hooks.__all__:
        assert getattr(dla_hooks, name) is not None
    found = {*unit_classes(), *request_classes()}
    assert {"Components", "Heads", "Layers"} <= found
    assert set(dla_hooks.__all__) == {"__version__", "demo", *dla_hooks._HOME, *found}
    assert set(dla_hooks.__all__) <= set(dir(dla_hooks))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dla_hooks.nonsense  # noqa: B018


def test_errors_derive_from_dla_error_and_are_described():
    from dla_hooks import errors

    for name in errors.__dict__:
        if name.endswith("Error"):
            error = getattr(errors, name)
            assert issubclass(error, dla_hooks.DLAError)
            assert getattr(dla_hooks, name) is error
            assert error.__doc__


def test_adapters_imported_as_top_level_package_are_refused():
    command = [sys.executable, "-c", "import adapters"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "architecture declarations of dla_hooks" in done.stderr


def test_import_in_a_checkout_uses_the_installed_package(tmp_path):
    """The folder hides the installed package then, and its adapters are not inside of it."""
    for folder in ("dla_hooks", "adapters"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    code = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import dla_hooks
print(len(dla_hooks.architectures()), sys.modules["dla_hooks.adapters.llama"].__file__)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    count, path = done.stdout.split()
    assert int(count) == len(dla_hooks.architectures())
    assert Path(path) == tmp_path / "adapters" / "llama.py"

    shutil.rmtree(tmp_path / "adapters")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "ImportError: the adapters are not installed beside dla_hooks" in done.stderr


@pytest.mark.slow
def test_a_wheel_built_from_the_source_distribution_holds_everything(tmp_path):
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)  # the sdist, and the wheel from it
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 2_000_000
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = {name for name in names if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dla_hooks").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {f"dla_hooks/adapters/{path.name}" for path in (ROOT / "adapters").glob("*.py")}
    assert packaged == expected
