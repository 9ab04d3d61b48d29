"""The scripts of CI read the README and pyproject.toml: what they read is what is meant."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def shell(script: str) -> str:
    command = ["bash", "-c", f"source {ROOT}/.ci/steps.sh; {script}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_lowest_python_matches_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = shell("echo $lowest_python").strip()
    assert project["requires-python"] == f">={lowest}"
    assert f"Python {lowest} or newer" in (ROOT / "README.md").read_text()
    promised = [name for name in project["classifiers"] if "Python :: 3." in name]
    assert promised[0].endswith(f":: {lowest}")


def test_readme_commands_are_parsed_verbatim():
    first, second = shell("readme_command 1; readme_command 2").splitlines()
    assert first == "pip install -c constraints.txt . && dla-hooks demo"
    assert second == 'pip install -c constraints.txt -e ".[dev]" && pytest'


def test_failing_suite_stops_script_and_passing_suite_prints_last_line():
    said = shell('suite "some tests" echo "3 passed in 1 s"; finish')
    assert "some tests" in said.splitlines()[-1]
    assert said.endswith("3 passed in 1 s\n")
    with pytest.raises(subprocess.CalledProcessError):
        shell('suite "some tests" false; finish')


def test_scripts_are_valid_bash():
    for name in (".ci/run", ".ci/weekly", ".ci/steps.sh", "scripts/check"):
        subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


def test_sample_is_deterministic_share_of_tests():
    def collected(*arguments: str) -> set[str]:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "tests/laws/test_house.py",
            *arguments,
        ]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return {line for line in done.stdout.splitlines() if "::" in line}

    whole, third = collected(), collected("--sample", "3")
    assert third < whole
    assert 0 < len(third) <= len(whole) * 2 / 3
    assert collected("--sample", "3") == third
