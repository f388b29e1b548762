"""One process with two threads, one with one, or two with one each; training and inference.

Strong scaling: the same batch is divided among the processes. Weak scaling: each has a batch of its own. All
processes of a way run at the same time, and training averages gradients over them with gloo.
"""

import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.day_loop import CELLS, DAYS, KEPT, PASSES, infer, products, sample_batch, sample_model, sum_of
from h2mv_dist.jobs.memory import RANK_BYTES, keep_freed_memory
from h2mv_dist.model.days import no_compiler_because
from h2mv_dist.model.rollout import spin_up, warm_up

REPEATS: Final = 7


class Way(NamedTuple):
    """How many processes there are, their threads, and the cells of each."""

    name: str
    processes: int
    threads: int
    cells: int


WAYS: Final = (
    Way("one process, one thread", 1, 1, CELLS),
    Way("one process, two threads", 1, 2, CELLS),
    Way("two processes, half the batch each", 2, 1, CELLS // 2),
    Way("two processes, a batch each", 2, 1, CELLS),
)


def main() -> None:
    """Print a table; the ways take turns."""
    rates: dict[tuple[str, str], list[float]] = {}
    shares: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        teams = [_Team(way, Path(folder) / str(i)) for i, way in enumerate(WAYS)]
        for _ in range(REPEATS):
            for team in teams:
                for work in ("inference", "training"):
                    seconds, limit = team.run(work), team.run("limit")
                    cells = team.way.processes * team.way.cells
                    rates.setdefault((work, team.way.name), []).append(cells * DAYS / seconds)
                    share = PASSES[work] * limit * team.way.cells / CELLS / seconds
                    shares.setdefault((work, team.way.name), []).append(share)
        for team in teams:
            team.end()
    print(f"batch {CELLS}, {DAYS} days, {'eager: ' + _OBSTACLE if _OBSTACLE else 'compiled'}\n")
    print("| work | way | cell-days a second | of one thread | of the GEMM limit |\n|---|---|---|---|---|")
    for (work, name), found in rates.items():
        rate, single = statistics.median(found), statistics.median(rates[work, WAYS[0].name])
        share = statistics.median(shares[work, name])
        print(f"| {work} | {name} | {rate:,.0f} | {rate / single:.2f} | {share:.1%} |")


_OBSTACLE: Final = no_compiler_because()


class _Team:
    """The processes of a way, which wait for work."""

    def __init__(self, way: Way, meeting: Path) -> None:
        self.way, self.pipes, self.members = (
            way,
            list[Connection](),
            list[multiprocessing.process.BaseProcess](),
        )
        context = multiprocessing.get_context("spawn")
        for rank in range(way.processes):
            ours, theirs = context.Pipe()
            member = context.Process(target=_work, args=(way, rank, meeting, theirs))
            member.start()
            self.pipes.append(ours)
            self.members.append(member)
        for pipe in self.pipes:
            pipe.recv()

    def run(self, work: str) -> float:
        """Seconds that all processes together need."""
        for pipe in self.pipes:
            pipe.send(work)
        return max(float(pipe.recv()) for pipe in self.pipes)

    def end(self) -> None:
        """Let all processes end."""
        for pipe in self.pipes:
            pipe.send("")
        for member in self.members:
            member.join()


def _work(way: Way, rank: int, meeting: Path, pipe: Connection) -> None:
    keep_freed_memory(RANK_BYTES)
    torch.set_num_threads(way.threads)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(meeting), way.processes), rank=rank, world_size=way.processes
    )
    model = sample_model(compiled=not _OBSTACLE, width=way.cells)
    if model.compiled:
        warm_up(model, KEPT, gradient=True)
    batch, distributed = sample_batch(way.cells, DAYS), DistributedDataParallel(model)

    def train() -> None:
        distributed.zero_grad()
        torch.autograd.backward(sum_of(distributed(batch, spin_up(model, batch, None, KEPT), KEPT).daily))

    def limit() -> None:
        for _ in range(3):
            products()

    works = {"inference": lambda: infer(model, batch), "training": train, "limit": limit}
    for warm in works.values():
        warm()
    pipe.send("ready")
    while work := pipe.recv():
        dist.barrier()
        started = time.perf_counter()
        works[work]()
        seconds = time.perf_counter() - started
        pipe.send(seconds / 3 if work == "limit" else seconds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
