"""Draws by integer seeds, in any number, resumable.

    python tests/fuzz/run.py --draws 20000 --seconds 3600 --seeds fuzz.jsonl
    python tests/fuzz/run.py --seed 123

Every seed's outcome is a line of the file; seeds that it holds are not drawn again.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]

from draws import outcome_of, smallest  # noqa: E402


def replay(seed: int, without: tuple[str, ...]) -> None:
    found = smallest(seed, without)
    print(*found.said, sep="\n")  # noqa: T201
    print(f"{found.kind}: {found.what} ({found.seconds:.2f} s)\n{found.error}")  # noqa: T201


def summary(lines: list[dict]) -> str:
    """Outcomes, refusals and failures, the most frequent first."""
    kinds = collections.Counter(line["kind"] for line in lines)
    judged = len(lines) - kinds["discarded"]
    slowest = max((line["seconds"] for line in lines), default=0.0)
    said = [f"{len(lines)} draws, {judged} judged, slowest {slowest:.2f} s"]
    said += [f"  {kind}: {n}" for kind, n in kinds.most_common()]
    said.append(f"refused: {kinds['refused'] / max(judged, 1):.1%} of those judged")
    for kind in ("discarded", "refused", "failed"):
        whats = collections.defaultdict(list)
        for line in lines:
            if line["kind"] == kind:
                whats[line["what"]].append(line["seed"])
        ranked = sorted(whats.items(), key=lambda pair: -len(pair[1]))
        said += [f"  {kind} {len(seeds):5} {what} (seed {seeds[0]})" for what, seeds in ranked]
    return "\n".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000, help="seeds 0 to this")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after")
    parser.add_argument(
        "--seeds", type=Path, default=Path("fuzz.jsonl"), help="the file of outcomes"
    )
    parser.add_argument("--seed", type=int, help="draw this one alone, and show it")
    parser.add_argument("--without", nargs="*", default=[], help="interventions to leave out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.seed is not None:
        replay(given.seed, tuple(given.without))
        return
    kept = given.seeds.read_text().splitlines() if given.seeds.exists() else []
    lines = [json.loads(line) for line in kept]
    done = {line["seed"] for line in lines}
    stop = time.monotonic() + given.seconds
    with given.seeds.open("a") as file:
        for seed in range(given.first, given.first + given.draws):
            if seed in done or time.monotonic() > stop:
                continue
            line = {"seed": seed, **dataclasses.asdict(outcome_of(seed, tuple(given.without)))}
            if line["kind"] != "failed":
                del line["said"], line["error"]
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
    print(summary(lines))  # noqa: T201
    sys.exit(any(line["kind"] == "failed" for line in lines))


if __name__ == "__main__":
    main()
