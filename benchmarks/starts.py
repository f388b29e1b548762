"""What compiled days cost before the first step: made for the first time on a machine, and found again later.

Each start is a process of its own with the same, at first empty, cache of compiled code.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Final

from torch._dynamo.utils import counters

from benchmarks.day_loop import CELLS, KEPT, sample_model
from h2mv_dist.model.rollout import warm_up

LATER: Final = 5


def main() -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as cache:
        first, *later = (_start(cache) for _ in range(1 + LATER))
    print("| start | seconds | of the first | graphs found on disk | made |\n|---|---|---|---|---|")
    seconds = statistics.median(row["seconds"] for row in later)
    print(f"| first | {first['seconds']:.1f} | 1 / 1 | {first['found']} | {first['made']} |")
    found, made = min(row["found"] for row in later), max(row["made"] for row in later)
    print(f"| later | {seconds:.1f} | 1 / {first['seconds'] / seconds:.1f} | {found} | {made} |")


def _start(cache: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.starts", "child"],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        check=True,
        capture_output=True,
        text=True,
    )
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def _child() -> None:
    model = sample_model(compiled=True, width=CELLS)
    started = time.perf_counter()
    warm_up(model, KEPT, gradient=True)
    seconds, graphs = time.perf_counter() - started, counters["aot_autograd"]
    found, made = graphs["autograd_cache_hit"], graphs["autograd_cache_miss"]
    print(json.dumps({"seconds": seconds, "found": found, "made": made}))


if __name__ == "__main__":
    _child() if sys.argv[1:] == ["child"] else main()
