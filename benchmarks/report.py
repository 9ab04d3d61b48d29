"""Reports: tables, Markdown, JSON, and the machine of the measurement."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bar import Measured
from benchmarks.compare import Line
from benchmarks.contenders import OURS
from benchmarks.peers import version

_PACKAGES = (
    "torch",
    "transformers",
    "dla-hooks",
    "transformer-lens",
    "nnsight",
    "accelerate",
    "safetensors",
)
Row = tuple[str, ...]


def say(line: str) -> None:
    """Print each step on stderr, since some take minutes."""
    # Without markup, which would take the extra out of pip install 'dla-hooks[plot]'.
    console = Console(stderr=True, highlight=False, markup=False)
    console.print(line, style="dim", soft_wrap=True)


def out() -> Console:
    """The console for results; wide enough for the tables when it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=110)


def circumstances(threads: int) -> dict[str, Any]:
    """The circumstances of a figure: time, versions and machine."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in _PACKAGES if (found := version(name)) is not None},
        },
        "git_revision": _revision(),
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": threads,
            "memory_bytes": _memory(),
            "gpu": _gpu(),
        },
    }


def write_json(path: Path, threads: int, body: dict[str, Any]) -> None:
    """File figures with their circumstances."""
    text = json.dumps({**circumstances(threads), **body}, indent=2, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def caption(threads: int, repeats: int) -> str:
    """One line of circumstances under a table."""
    found = circumstances(threads)
    versions = found["versions"]
    names = [name for name in ("torch", "transformers", "transformer-lens", "nnsight")]
    known = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    gpu = found["hardware"]["gpu"]
    return (
        f"{known}; {found['hardware']['cpu']}, {threads} threads{f', {gpu}' if gpu else ''}; "
        f"medians of {repeats} interleaved rounds"
    )


def cost_rows(lines: Sequence[Line]) -> tuple[Row, list[Row]]:
    """The README's table: this library over the plain forward pass, case by case."""
    words = {
        "last": "last position",
        "all": "all positions",
        "next": "all positions, next-token target at each",
    }
    head = ("case", "time ratio", "quartiles", "memory ratio", "peak over weights, MB")
    rows: list[Row] = []
    for line in lines:
        if line.contender != OURS:
            continue
        rows.append(
            (
                f"{line.setting.unit}, {words[line.setting.pos]}",
                f"{line.ratio.median:.2f}",
                line.ratio.quartiles(),
                _times(line.memory_ratio),
                f"{_mb(line.peak)} / {_mb(line.plain_peak)}",
            )
        )
    return head, rows


def compared_rows(lines: Sequence[Line]) -> tuple[Row, list[Row]]:
    """One setting's contenders."""
    head = (
        *("contender", "time, s", "time ratio", "quartiles"),
        *("peak over weights, MB", "memory ratio"),
    )
    rows: list[Row] = [
        (
            line.contender,
            f"{line.seconds.median:.3f}",
            f"{line.ratio.median:.2f}",
            line.ratio.quartiles(),
            _mb(line.peak),
            _times(line.memory_ratio),
        )
        for line in lines
    ]
    return head, rows


def show_bars(name: str, found: Sequence[Measured], under: str) -> None:
    """One case of the bars: the figures, the bar, and whether it is met."""
    words = {True: "met", False: "MISSED", None: "-"}
    rows = []
    for one in found:
        digits = 1 if one.value.median >= 10 else 3
        bar = "-" if one.limit is None else f"{'≥' if one.at_least else '≤'} {one.limit:g}"
        value = f"{one.value.median:.{digits}f}"
        rows.append((one.case, value, one.value.quartiles(digits), bar, words[one.met], one.detail))
    show(name, ("case", "measured", "quartiles", "bar", "", "behind it"), rows, under)


def show(
    title: str, head: Row, rows: Sequence[Row], under: str, markdown: Sequence[str] = ()
) -> None:
    """Print a table, or as Markdown some of its columns: what a README can take as it is.

    Args:
        title: the text above.
        head: names of the columns.
        rows: cells.
        under: the text below.
        markdown: which columns to print as Markdown; none for a table with all of them.
    """
    if markdown:
        kept = [head.index(name) for name in markdown]
        lines = [" | ".join(row[i] for i in kept) for row in (head, *rows)]
        rule = "|".join(["---", *["---:"] * (len(kept) - 1)])
        body = [f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]
        sys.stdout.write("\n".join([title, "", *body, "", f"({under})", "", ""]))
        return
    console = out()
    table = Table(title=title, caption=under, title_justify="left", caption_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", no_wrap=bool(i))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _mb(found: int | None) -> str:
    return "-" if found is None else f"{found / 1e6:,.1f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _revision() -> str | None:
    """The commit of this checkout, with "-dirty" when files differ from it; None outside of git."""
    root, git = Path(__file__).parents[1], shutil.which("git")
    if git is None or not (root / ".git").exists():  # never that of a repository further up
        return None
    # Without tags, so that it is a hash in every checkout.
    command = [git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
