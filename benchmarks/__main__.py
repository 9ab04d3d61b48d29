"""Time and peak memory of attribution as ratios to the plain forward pass, measured in one run.

python -m benchmarks [--model gpt2-small] [--tokens 512] [--repeats 9] [--json out.json]
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES, MODELS, Call, make_calls, make_model
from benchmarks.memory import peak_of


def ratio_of_times(ours: Call, plain: Call, repeats: int) -> tuple[float, float]:
    """The median over interleaved pairs of ours over plain, and the median of plain in seconds."""
    for call in (plain, ours):
        call()
    ratios, seconds = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        plain()
        middle = time.perf_counter()
        ours()
        end = time.perf_counter()
        ratios.append((end - middle) / (middle - start))
        seconds.append(middle - start)
    return statistics.median(ratios), statistics.median(seconds)


def measure(model: str, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One line per case; every call proves its own sums, so a wrong result is never timed."""
    lines: list[dict[str, Any]] = []
    built = make_model(model)
    floor = peak_of(model, tokens, "plain")
    for case in CASES:
        ratio, seconds = ratio_of_times(*make_calls(built, tokens, case), repeats)
        line = {"case": case, "time_ratio": ratio, "plain_seconds": seconds}
        if floor is not None:
            peak = peak_of(model, tokens, case)
            assert peak is not None
            line |= {"memory_ratio": peak / floor, "peak_mb": peak / 1e6, "plain_mb": floor / 1e6}
        lines.append(line)
    return lines


def main(
    model: Annotated[str, typer.Option(help=f"one of {', '.join(MODELS)}")] = "gpt2-small",
    tokens: Annotated[int, typer.Option(help="length of the prompt")] = 512,
    repeats: Annotated[int, typer.Option(help="interleaved pairs of runs")] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="write figures here")] = None,
) -> None:
    """Measure attribution against the plain forward pass of the same model."""
    import torch
    import transformers

    lines = measure(model, tokens, repeats)
    setting = {
        "model": model,
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
    }
    table = Table(
        title=f"{model}, {tokens} tokens, over model(ids, use_cache=False, logits_to_keep=1)",
        caption=f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{setting['threads']} threads; medians of {repeats} interleaved pairs",
    )
    for heading in ("case", "time ratio", "memory ratio", "peak over weights, MB"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for line in lines:
        memory = f"{line['memory_ratio']:.2f}" if "memory_ratio" in line else "-"
        peak = f"{line['peak_mb']:.1f} / {line['plain_mb']:.1f}" if "peak_mb" in line else "-"
        table.add_row(line["case"], f"{line['time_ratio']:.2f}", memory, peak)
    Console(width=100).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({**setting, "lines": lines}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
