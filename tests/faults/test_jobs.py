"""Jobs side by side: two at once, one bad fold among good ones, ten folds on four workers."""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import JobError
from h2mv_dist.io import stores
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.summary import FILE
from h2mv_dist.jobs.training import submit_training
from h2mv_dist.jobs.worlds import make_world
from tests.conftest import S3Server, storage_options
from tests.fault_proxy import FaultProxy
from tests.faults.conftest import NewSettings
from tests.faults.folds import (
    FinalBytes,
    assert_gangs_were_whole,
    assert_workers_held_one_rank_at_a_time,
    final,
    overlap,
    rank_runs,
)
from tests.faults.processes import DaskProcesses
from tests.jobs.conftest import NO_OPTIONS

pytestmark = [pytest.mark.slow]


def test_two_jobs_at_once(
    steady: DaskProcesses, new_settings: NewSettings, references: Mapping[int, FinalBytes], tmp_path: Path
) -> None:
    folders = {fold: JobFolder(str(tmp_path / str(fold)), NO_OPTIONS) for fold in references}
    with steady.client() as client:
        jobs = [
            submit_training(client, new_settings(folds=[fold]), folder.url, NO_OPTIONS)
            for fold, folder in folders.items()
        ]
        for job in jobs:
            job.wait()
    runs = {fold: rank_runs(folder.fold(fold)) for fold, folder in folders.items()}
    assert overlap(*runs.values()), "they ran one after the other"
    for fold, folder in folders.items():
        assert final(folder.fold(fold)) == references[fold]
        assert_gangs_were_whole(runs[fold])
    assert_workers_held_one_rank_at_a_time(run for each in runs.values() for run in each)


@pytest.mark.parametrize(
    ("limit", "message"),
    [("900MiB", "a step does not fit into memory"), ("430MiB", "needs more memory than its worker may use")],
    ids=["seen before", "seen when it happens"],
)
def test_a_rank_that_needs_too_much_memory_fails_its_fold_only(
    limit: str, message: str, own: DaskProcesses, new_settings: NewSettings, folder: JobFolder
) -> None:
    """The second gang gets workers that may not use as much as a step needs, or a rank before it steps."""
    for name in ("x0", "x1"):
        own.start_worker(name, "--memory-limit", limit)
    own.wait_for_workers(4)
    settings = new_settings(
        folds=[0, 1],
        epochs=1,
        batch_size=150,
        model={"hidden": 400},
        data={"period": "2001-01-01..2002-01-01"},
    )
    with own.client() as client:
        job = submit_training(client, settings, folder.url, NO_OPTIONS)
        with pytest.raises(JobError, match=message) as failed:
            job.wait()
    assert "fold-01 (attempt 1)" in str(failed.value), "another attempt would have been in vain"
    assert "cluster.memory_limit" in str(failed.value)
    assert folder.fold(0).done() is not None
    assert folder.fold(1).done() is None
    assert {run.name for run in rank_runs(folder.fold(1))} == {"x0", "x1"}
    assert "refused" in {run.kind for run in rank_runs(folder.fold(1))}


def test_an_error_in_a_rank_fails_its_fold_only(
    steady: DaskProcesses, new_settings: NewSettings, folder: JobFolder
) -> None:
    """A record without what we always write raises what no check of ours foresees."""
    damaged = folder.fold(1).path("decisions.json")
    stores.put_object(damaged, b'{"ranks": 2, "device": "cpu", "code_path": "eager"}', NO_OPTIONS)
    with steady.client() as client:
        job = submit_training(
            client, new_settings(folds=[0, 1], epochs=2, attempts=2), folder.url, NO_OPTIONS
        )
        with pytest.raises(JobError, match=r"^fold-01 \(attempt 2\): KeyError: 'threads'") as failed:
            job.wait()
        errors = [unit["error"] for unit in job.status()["units"] if unit["state"] == "failed"]
    assert "1 of 3 units" in str(failed.value)
    assert "Traceback" not in str(failed.value), "short"
    assert "Traceback (most recent call last)" in errors[0]
    assert {run.attempt for run in rank_runs(folder.fold(1))} == {1, 2}
    log = stores.get_object(folder.fold(1).path("attempts/002/rank-0.log"), NO_OPTIONS).decode()
    assert "KeyError: 'threads'" in log
    assert folder.fold(0).done() is not None
    states = {row["fold"]: row["state"] for row in summary(folder)}
    assert states == {"0": "done", "1": "unfinished"}


class TenFolds(NamedTuple):
    """What a job of ten folds with two ranks each left behind."""

    folder: JobFolder
    status: Mapping[str, Any]
    data_url: str
    read: Mapping[str, int]
    """Bytes of the answers to GET, by path."""


@pytest.fixture(scope="module")
def ten_folds(
    steady: DaskProcesses,
    new_settings: NewSettings,
    s3_server: S3Server,
    s3_bucket: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TenFolds]:
    data_url = f"{s3_server.new_bucket()}/world.zarr"
    make_world(data_url, resolution=6.0, years=3, seed=3, options=s3_server.options)
    settings = new_settings(
        data={"url": data_url},
        model={"hidden": 4},
        folds=None,
        epochs=1,
        batch_size=400,
        cache=str(tmp_path_factory.mktemp("empty-cache")),
    )
    folder = JobFolder(f"{s3_bucket}/ten-folds/job", s3_server.options)
    with FaultProxy(s3_server.endpoint) as proxy, steady.client() as client:
        status = submit_training(client, settings, folder.url, storage_options(proxy.url)).wait()
        yield TenFolds(folder, status, data_url, dict(proxy.body_bytes))


def test_ten_folds_share_four_workers(ten_folds: TenFolds) -> None:
    assert {unit["state"] for unit in ten_folds.status["units"]} == {"done"}
    runs = {fold: rank_runs(ten_folds.folder.fold(fold)) for fold in range(10)}
    for of_fold in runs.values():
        assert_gangs_were_whole(of_fold)
        assert {run.kind for run in of_fold} == {"done"}
        assert all(run.first_step is not None for run in of_fold), "a rank took no step"
    assert_workers_held_one_rank_at_a_time(run for of_fold in runs.values() for run in of_fold)
    assert any(overlap(runs[a], runs[b]) for a in runs for b in range(a)), "no two folds at once"
    rows = summary(ten_folds.folder)
    assert [row["fold"] for row in rows] == [str(fold) for fold in range(10)]
    assert {row["state"] for row in rows} == {"done"}


def test_one_host_reads_its_cells_once(ten_folds: TenFolds) -> None:
    """Coordinates, metadata and listings included, and all that is read of the job's own records."""
    held = chunk_bytes(ten_folds.data_url, ten_folds.folder.options)
    read = sum(ten_folds.read.values())
    assert held <= read <= 1.05 * held


def chunk_bytes(url: str, options: StorageOptions) -> int:
    """Bytes of all chunks of forcing, static features and targets; those that hold only sea do not exist."""
    sizes = {name: int(version.split(":")[0]) for name, version in stores._found(url, options).items()}
    return sum(size for name, size in sizes.items() if re.fullmatch(r"(?!mask)\w+/data/[\d./]+", name))


def summary(folder: JobFolder) -> list[dict[str, str]]:
    table = stores.get_object(stores.join(folder.url, FILE), folder.options).decode()
    return list(csv.DictReader(io.StringIO(table)))
