"""Ranks for tests: processes of their own that meet over gloo."""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from h2mv_dist.jobs.trainer import Ranks

CPU = torch.device("cpu")
LIMIT_SECONDS = 500
"""Only ends what hangs."""

Target = Callable[[int, int, Path], object]


@contextmanager
def joined(rank: int, world: int, folder: Path) -> Iterator[Ranks]:
    """Within it, one of ``world`` ranks that have met in ``folder``; each computes with one thread."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"meet-{world}"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT_SECONDS)
    )
    yield Ranks(rank, world, CPU)
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(target: Target, world: int, folder: Path) -> None:
    """Run ``target(rank, world, folder)`` on each of them."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_run, args=(target, rank, world, folder)) for rank in range(world)]
    end = time.monotonic() + LIMIT_SECONDS
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(max(end - time.monotonic(), 0.0))
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()


def _run(target: Target, rank: int, world: int, folder: Path) -> None:
    """End at once, as the product's ranks do: gloo's threads may need Python while it is taken down."""
    code = 1
    try:
        target(rank, world, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)
