"""Asked to leave, a rank makes a checkpoint wherever it is; what comes of it is the same to the bit."""

import gc
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from h2mv_dist.config import Settings
from h2mv_dist.io.cache import StagedCells, stage
from h2mv_dist.io.folds import fit_scaler, make_folds
from h2mv_dist.io.source import open_source
from h2mv_dist.jobs import supervisor
from h2mv_dist.jobs.code_path import Way
from h2mv_dist.jobs.messages import RankError
from h2mv_dist.jobs.records import AttemptRecord, FoldRecord, JobFolder
from h2mv_dist.jobs.trainer import FoldRun, Ranks
from h2mv_dist.model.registry import chosen_targets, model_kind
from tests.faults.processes import is_alive
from tests.jobs.conftest import NO_OPTIONS, small_settings
from tests.jobs.processes import wait_until

COMPILING = """
import subprocess
print(subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL).pid, flush=True)
"""
ORPHANED = f"""{COMPILING}
from h2mv_dist.jobs.rank import _exit_when_orphaned
_exit_when_orphaned()
"""


@pytest.fixture
def alone() -> Iterator[dist.Store]:
    """A process group of this process only."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def settings(world_url: str, cache: Path) -> Settings:
    return small_settings(
        world_url, cache, data={"period": "2001-01-01..2001-03-01"}, training={"batch_size": 4, "epochs": 1}
    )


@pytest.fixture(scope="module")
def staged(settings: Settings, cache: Path) -> StagedCells:
    spec = model_kind(settings.model.name).spec
    targets = chosen_targets(spec, settings.training.targets)
    return stage(open_source(settings.data, forcing=spec.forcing, targets=targets, options=NO_OPTIONS), cache)


class Attempt:
    """One attempt at the fold; says what it reported and how often it looked whether it had to leave."""

    def __init__(
        self, settings: Settings, staged: StagedCells, fold: FoldRecord, store: dist.Store, number: int
    ) -> None:
        self.asked, self.beats = 0, 0
        chosen = make_folds(staged.grid, settings.folds)[0]
        writer, ranks = fold.claim(number, f"gang-{number}"), Ranks(0, 1, torch.device("cpu"))
        way = Way(compiled=False, recompute=False)
        scaler, own = fit_scaler(staged, chosen), dist.PrefixStore(str(number), store)
        self.leave: Callable[[int], bool] = lambda _: False
        self.run = FoldRun(
            settings, staged, chosen, scaler, way, ranks, fold, writer, own, self._emit, self._must_leave
        )

    def _emit(self, **_: Any) -> None:
        self.beats += 1

    def _must_leave(self) -> bool:
        self.asked += 1
        return self.leave(self.asked)


# torch's newest release would have it called otherwise, which the oldest we support does not know
@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")
def test_leaving_during_validation_keeps_the_epoch(
    settings: Settings, staged: StagedCells, alone: dist.Store, tmp_path: Path
) -> None:
    whole, parts = (JobFolder(str(tmp_path / name), NO_OPTIONS).fold(0) for name in ("whole", "parts"))
    first = Attempt(settings, staged, whole, alone, 1)
    gc.unfreeze()
    assert first.run.train(0.0) is not None
    assert gc.get_freeze_count() > 0, "what is loaded is set apart before the first step"
    steps = -(-len(first.run.fold.cells("train")) // 4)
    assert first.asked > steps, "it was asked before each batch of the validation"

    stopped = Attempt(settings, staged, parts, alone, 2)
    stopped.leave = lambda asked: asked > steps
    assert stopped.run.train(0.0) is None
    assert stopped.asked == steps + 1
    assert parts.read_checkpoint("last").progress["steps"] == steps

    back = Attempt(settings, staged, parts, alone, 3)
    assert back.run.train(0.0) is not None
    assert parts.checkpoint_bytes("best") == whole.checkpoint_bytes("best")
    assert parts.checkpoint_bytes("last") == whole.checkpoint_bytes("last")


def test_a_worker_that_leaves_takes_no_rank() -> None:
    leaving = threading.Event()
    leaving.set()
    with pytest.raises(RankError) as refused:
        supervisor._require_time(leaving)
    assert refused.value.failure.kind == "preempted", "another worker can have it, for free"


@contextmanager
def started(code: str) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """A process as ranks are started, and what it starts itself."""
    pipe, command = subprocess.PIPE, (sys.executable, "-c", code)
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        assert process.stdout is not None
        compiler = psutil.Process(int(process.stdout.readline()))
        try:
            yield process, compiler
        finally:
            with suppress(psutil.NoSuchProcess):
                compiler.kill()


def test_what_a_rank_started_ends_with_it() -> None:
    with started(COMPILING) as (rank, compiler):
        rank.wait()
        assert is_alive(compiler)
        child = supervisor._Child(rank, -1)
        child.end()
        wait_until(lambda: not is_alive(compiler), "the end of what the rank started")
        child.end()


def test_what_a_rank_started_ends_with_its_worker() -> None:
    with started(ORPHANED) as (rank, compiler):
        assert rank.stdin is not None
        rank.stdin.close()
        rank.wait()
        wait_until(lambda: not is_alive(compiler), "the end of what the rank started")


def test_the_end_of_a_long_log_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOG_BYTES", 16)
    record = AttemptRecord(str(tmp_path), NO_OPTIONS)
    with tempfile.TemporaryFile() as log:
        log.write(b"first lines\n" * 100 + b"the last one")
        log.flush()
        supervisor._keep(record, 0, {}, None, log)
    assert (tmp_path / "rank-0.log").read_bytes() == b"nes\nthe last one"
