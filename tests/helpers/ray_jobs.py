"""What the tests of Ray run in its workers, and drivers that are killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from dla_hooks import Attributor, demo

OPTIONS: dict[str, Any] = {
    "checkpoint": str(demo.path()),
    "unit": "head",
    "answer": " are",
    "incorrect": " is",
}
WORDS = "The keys near the cabinet"


def rows(n: int) -> list[dict[str, Any]]:
    """Rows with an id, a prompt of one of six lengths, a group, and a partner; one of 37 fails."""
    return [
        {
            "id": i,
            "prompt": "" if i % 37 == 5 else " ".join([WORDS] * (1 + i % 6)),
            "group": "ab"[i % 2],
            "pair": i // 2,
        }
        for i in range(n)
    ]


class Noting(Attributor):
    """Writes down the ids that it runs, each call to a file of its own."""

    def __init__(self, folder: str, **options: Any) -> None:
        super().__init__(**options)
        self.folder = Path(folder)

    def __call__(self, batch: Any, rank: int | None = None) -> Any:
        found = super().__call__(batch, rank)
        ids = [int(one) for one in batch["id"]]
        (self.folder / f"ran-{os.getpid()}-{ids[0]}").write_text(" ".join(map(str, ids)))
        return found


class Killed(Noting):
    """Kills a process, its own or that of another, once: at the row with some id."""

    def __init__(self, at: int, victim: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.at, self.victim = at, victim

    def __call__(self, batch: Any, rank: int | None = None) -> Any:
        mark = self.folder / "killed"
        if self.at in [int(one) for one in batch["id"]] and not mark.exists():
            mark.write_text("")
            os.kill(self.victim or os.getpid(), signal.SIGKILL)
        return super().__call__(batch, rank)


def sweep(source: str, folder: str, *, kill: bool) -> None:
    """A sweep from Parquet to Parquet with Ray's checkpoints."""
    import ray.data
    from ray.data.checkpoint import CheckpointConfig

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig(
        id_column="id", checkpoint_path=f"{folder}/checkpoint", delete_checkpoint_on_success=False
    )
    options = {**OPTIONS, "folder": folder}
    if kill:
        options |= {"at": 70, "victim": os.getpid()}
    rows = ray.data.read_parquet(source, override_num_blocks=6)
    rows = rows.map_batches(
        Killed if kill else Noting,
        fn_constructor_kwargs=options,
        batch_size=20,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    rows.write_parquet(f"{folder}/out")


if __name__ == "__main__":
    import ray

    address, source, folder, kill = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    sweep(source, folder, kill=kill == "kill")
