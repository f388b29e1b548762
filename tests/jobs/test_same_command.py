"""The same command again, as a program of its own, while its job is running on a running scheduler."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from h2mv_dist.config import Settings
from h2mv_dist.errors import JobError
from h2mv_dist.jobs.cluster import scheduler_address
from h2mv_dist.jobs.cube_plan import plan_inference
from h2mv_dist.jobs.handle import submit
from h2mv_dist.jobs.inference import start_inference
from h2mv_dist.jobs.messages import Job, Unit, job_id
from h2mv_dist.jobs.prepare import plan_prepare, start_prepare
from tests.faults.conftest import settings_file
from tests.jobs.conftest import NO_OPTIONS, small_settings
from tests.jobs.processes import START_SECONDS, process, wait_until
from tests.jobs.test_inference import contents, infer

CUBE: Any = {"outputs": ["runoff"], "folds": [0]}
OVER: Any = {**CUBE, "overwrite": True, "tile": [9, 12], "shard": [9, 12], "chunk": [9, 12]}
"""Another layout, for which the cube would be deleted."""


@pytest.fixture(scope="module")
def cube(
    client: Client, world_url: str, cache: Path, job: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("again") / "cube.zarr"
    infer(client, small_settings(world_url, cache, inference=CUBE), job, path)
    return path


@pytest.fixture
def other(world_url: str, cache: Path) -> Settings:
    return small_settings(world_url, cache, inference=OVER)


@contextmanager
def running(client: Client, kind: str, place: Path) -> Iterator[None]:
    """A job that fills a place, until it is cancelled: no gang of the cluster is large enough."""
    name = job_id(kind, str(place))
    handle = submit(client, Job(name, "", {}, (Unit("endless", "tile", {}, ranks=99),)))
    try:
        yield
        assert not handle.status()["finished"], "the command ended it"
    finally:
        handle.cancel()


@pytest.mark.parametrize(
    ("kind", "number", "code"),
    [("infer", signal.SIGTERM, 143), ("prepare", signal.SIGINT, 130), ("compact", signal.SIGTERM, 143)],
)
def test_it_watches_and_touches_nothing(
    kind: str,
    number: signal.Signals,
    code: int,
    client: Client,
    job: str,
    cube: Path,
    other: Settings,
    tmp_path: Path,
) -> None:
    settings, log, new = settings_file(tmp_path, other), tmp_path / "log", tmp_path / "new.zarr"
    words = {
        "infer": (settings, "--job", job, "--cube", str(cube)),
        "prepare": (settings, "--to", str(new)),
        "compact": (str(cube), str(new), "--shard-days", "240"),
    }
    place, before = cube if kind == "infer" else new, contents(cube.parent)
    command = (kind, *words[kind], "--address", scheduler_address(client))
    with running(client, kind, place), process(log, "h2mv_dist.cli", *command) as watching:
        wait_until(lambda: "endless: queued" in log.read_text(), "a watcher", log)
        watching.send_signal(number)
        assert watching.wait(START_SECONDS) == code
    assert "the job is running already" in log.read_text()
    assert "the job goes on; watch it with: the same command" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert contents(cube.parent) == before
    assert not new.exists()


def test_what_would_change_the_cube_is_refused(
    client: Client, job: str, cube: Path, world_url: str, cache: Path, tmp_path: Path
) -> None:
    settings = settings_file(tmp_path, small_settings(world_url, cache, inference=CUBE))
    before, log = contents(cube.parent), tmp_path / "log"
    command = ("infer", settings, "--job", job, "--cube", str(cube), "--from", "2001-12-31")
    with (
        running(client, "infer", cube),
        process(log, "h2mv_dist.cli", *command, "--address", scheduler_address(client)) as refused,
    ):
        assert refused.wait(START_SECONDS) == 2
    assert "already running on this scheduler; wait for it, or cancel it first" in log.read_text()
    assert contents(cube.parent) == before


def test_a_second_job_is_refused_before_anything_is_deleted(
    client: Client, job: str, cube: Path, other: Settings, tmp_path: Path
) -> None:
    before = contents(cube.parent)
    plan = plan_inference(other, job, NO_OPTIONS, cube=str(cube))
    with running(client, "infer", cube), pytest.raises(JobError, match="already running"):
        start_inference(client, plan, job, str(cube), NO_OPTIONS)
    assert contents(cube.parent) == before
    to = tmp_path / "to.zarr"
    with running(client, "prepare", to), pytest.raises(JobError, match="already running"):
        start_prepare(client, plan_prepare(other, NO_OPTIONS), str(to), NO_OPTIONS)
    assert not to.exists()
