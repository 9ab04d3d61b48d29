"""What a process starts with, and what it says that nobody asked for: as little as can be."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading

import pytest
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from transformers.utils import logging as of_transformers

import dla_hooks
from dla_hooks.quiet import quiet

HEAVY = {
    "accelerate", "altair", "bitsandbytes", "huggingface_hub", "matplotlib", "numpy", "pandas",
    "peft", "safetensors", "scipy", "sklearn", "sympy", "tokenizers", "torch", "torchao",
    "torchvision", "tqdm", "transformer_lens", "transformers",
}  # fmt: skip
UNASKED = {
    "altair", "bitsandbytes", "matplotlib", "pandas", "peft", "scipy", "sklearn",
    "torchao", "torchvision", "transformer_lens", "transformers.trainer",
}  # fmt: skip
"""What no command needs for a plain checkpoint, installed or not."""

HELP = "from dla_hooks.cli.app import app; app(['{}', '--help'])"
ATTRIBUTE = (
    "import sys; from dla_hooks.cli import main\n"
    "sys.argv = ['dla-hooks', 'attribute', 'demo', 'The keys near the cabinet']\n"
    "main()"
)
MANY = (
    "import io, sys; from dla_hooks.cli import main\n"
    "sys.argv = ['dla-hooks', 'many', 'demo', '-']\n"
    "sys.stdin = io.StringIO('prompt\\nThe key\\n')\n"
    "main()"
)
SESSION = """
import dla_hooks
model, tokenizer = dla_hooks.demo.load()
from dla_hooks import checkpoint
checkpoint.load(dla_hooks.demo.path())
about = (model, "The keys near the cabinet", " are", " is")
result = dla_hooks.direct_logit_attribution(*about, tokenizer=tokenizer)
result.plot()
dla_hooks.report(*about, units=["component"], tokenizer=tokenizer)
"""


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, as a user starts one."""
    env = {name: value for name, value in os.environ.items() if "LOG" not in name}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def loaded(code: str, *options: str) -> set[str]:
    """The modules that a process has when it ends."""
    end = "atexit.register(lambda: print('LOADED', *sys.modules, file=sys.stderr))"
    done = python(f"import atexit, sys\n{end}\n{code}", *options)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rsplit("LOADED ")[-1].split())


def test_import_loads_nothing_but_the_standard_library():
    before = {name.partition(".")[0] for name in loaded("")}
    names = {name.partition(".")[0] for name in loaded("import dla_hooks", "-W", "error")}
    assert names - before - sys.stdlib_module_names == {"dla_hooks"}


@pytest.mark.parametrize("command", ["list", "attribute", "many", "report"])
def test_help_and_options_load_nothing_heavy(command):
    assert loaded(HELP.format(command)) & HEAVY == set()


@pytest.mark.slow
@pytest.mark.parametrize("code", [ATTRIBUTE, MANY], ids=["attribute", "many"])
def test_commands_load_what_they_need(code):
    found = loaded(code)
    assert {"torch", "transformers.modeling_utils"} <= found  # it says when something is loaded
    assert found & UNASKED == set()


def test_session_without_a_mistake_says_nothing():
    done = python(SESSION)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Kept(logging.Handler):
    """The records that come through."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def log():
    logger, kept = logging.getLogger("tests.some.package"), Kept()
    logger.addHandler(kept)
    yield logger, kept
    logger.removeHandler(kept)


def test_quiet_hides_what_its_own_thread_logs(log):
    logger, kept = log

    def fail():
        with quiet():
            logger.error("mine")
            other = threading.Thread(target=logger.error, args=("another's",))
            other.start()
            other.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    logger.error("later")
    assert kept.texts == ["another's", "later"]
    assert kept.filters == []
    assert logging.lastResort is not None
    assert logging.lastResort.filters == []


def test_bars_come_back_when_the_last_of_two_calls_ends():
    found = of_transformers.is_progress_bar_enabled(), are_progress_bars_disabled()
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    assert (of_transformers.is_progress_bar_enabled(), are_progress_bars_disabled()) == (
        False,
        True,
    )
    first.__exit__(None, None, None)  # the two overlap, as in two threads
    assert not of_transformers.is_progress_bar_enabled()
    second.__exit__(None, None, None)
    assert (of_transformers.is_progress_bar_enabled(), are_progress_bars_disabled()) == found


def test_demo_load_leaves_logging_as_found():
    names = (None, "transformers", "torch", "huggingface_hub")
    before = [(logging.getLogger(name).level, logging.getLogger(name).filters) for name in names]
    dla_hooks.demo.load()
    after = [(logging.getLogger(name).level, logging.getLogger(name).filters) for name in names]
    assert after == before
