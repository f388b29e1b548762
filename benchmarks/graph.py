"""Memory of a training step: what its graph takes, against the bound by which a rank decides whether it fits.

Each case is a process of its own, in which a short step was taken before; its peak (VmHWM) counts.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

from dask.utils import format_bytes

from benchmarks.day_loop import CELLS, sample_batch, sample_model, train
from benchmarks.memory import status_bytes
from h2mv_dist.config import validate
from h2mv_dist.jobs.code_path import COMPILED, EAGER
from h2mv_dist.jobs.memory import RANK_BYTES, keep_freed_memory
from h2mv_dist.jobs.preflight import step_bytes
from h2mv_dist.model.days import BLOCK_DAYS, no_compiler_because


class Case(NamedTuple):
    """A step of ``CELLS`` cells."""

    code_path: str
    recompute: bool
    days: int

    @property
    def bound(self) -> int:
        """Bytes."""
        tree = {"data": {"url": "none"}, "training": {"batch_size": CELLS, "ranks": 1}}
        return step_bytes(validate(tree, where="benchmark"), CELLS, self.days, self.code_path, self.recompute)


CASES: Final = (
    Case(EAGER, False, 365),
    Case(EAGER, True, 365),
    Case(COMPILED, False, 365),
    Case(COMPILED, False, 1460),
    Case(COMPILED, True, 1460),
    Case(COMPILED, True, 7000),
)


def main() -> None:
    """Print a table."""
    print(f"batch {CELLS}\n")
    print("| days run | recomputed | days | peak of a step | bound | bound / peak | seconds |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        if case.code_path == COMPILED and no_compiler_because():
            continue
        grown, seconds = _measured(case)
        sizes = f"{format_bytes(int(grown))} | {format_bytes(case.bound)} | {case.bound / grown:.2f}"
        print(f"| {case.code_path} | {case.recompute} | {case.days} | {sizes} | {seconds:.0f} |", flush=True)


def _measured(case: Case) -> tuple[float, float]:
    """Bytes a step takes, and its seconds."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.graph", json.dumps(case)],
        check=True,
        capture_output=True,
        text=True,
    )
    grown, seconds = json.loads(done.stdout.splitlines()[-1])
    return grown, seconds


def _child(case: Case) -> None:
    # as ranks do
    keep_freed_memory(RANK_BYTES)
    model = sample_model(compiled=case.code_path == COMPILED, width=CELLS)
    model.recompute = case.recompute
    batch = sample_batch(CELLS, case.days)
    train(model, batch.days(0, BLOCK_DAYS + 1))
    before = status_bytes("VmRSS")
    # the peak counts from here
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    train(model, batch)
    print(json.dumps([status_bytes("VmHWM") - before, time.perf_counter() - started]))


if __name__ == "__main__":
    if sys.argv[1:]:
        _child(Case(*json.loads(sys.argv[1])))
    else:
        main()
