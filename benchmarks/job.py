"""One job of :mod:`benchmarks.memory`, in the process that was started for it:

python -m benchmarks.job '{"job": "call", "name": "plain forward", "setting": {…}}'
"""

from __future__ import annotations

import dataclasses
import json
import sys

from benchmarks import offload, questions
from benchmarks.contenders import Bench
from benchmarks.memory import peak_during
from benchmarks.models import Setting

_WARM_UP = 16  # tokens


def of_a_call(name: str, setting: Setting) -> int:
    """Bytes above the weights at the highest point of one call of a contender."""
    short = dataclasses.replace(
        setting,
        tokens=min(setting.tokens, _WARM_UP),
        chunk=None if setting.chunk is None else _WARM_UP // 2,
    )
    bench = Bench(setting)
    bench.call(name, short)()  # makes the model
    for model in bench.models():
        for parameter in model.parameters():
            parameter.sum()  # touches every page, so that no weight is paged in while measuring
    bench.call(name, short)()
    return peak_during(bench.call(name, setting), setting.device)


def main() -> None:
    """Do one job and print its bytes."""
    job = json.loads(sys.argv[1])
    what = job.pop("job")
    if what == "call":
        found = of_a_call(job["name"], Setting(**job["setting"]))
    elif what == "question":
        found = questions.peak_here(**job)
    else:
        found = offload.peak_here(**job)
    sys.stdout.write(f"\n{found}\n")


if __name__ == "__main__":
    main()
