"""A Slurm of our own, a copy of deploy/slurm to submit from, and a fold trained there undisturbed."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from h2mv_dist.config import Settings
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.worlds import make_world
from tests.faults.conftest import PERIOD, settings_file
from tests.faults.folds import EPOCHS, FinalBytes, final
from tests.jobs.conftest import NO_OPTIONS, small_settings
from tests.jobs.processes import wait_until
from tests.slurm.single_node import SingleNode, missing_daemons, single_node

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "slurm"
SIZE = ("--ntasks=2", "--mem-per-cpu=2G")
"""What fits on the node of the tests."""
JOB_SECONDS = 400.0
"""For a job that has to start scheduler and workers first, twice if it is requeued."""
LARGE = {"tile": [18, 18], "shard": [18, 18], "chunk": [6, 6]}
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")


@dataclass(frozen=True)
class Site:
    """A user's copy of deploy/slurm, with settings of a small job, and the Slurm it is submitted to."""

    slurm: SingleNode
    folder: Path

    def submit(self, *command: str) -> str:
        """The id of a job submitted from the folder."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        submitted = ("sbatch", "--parsable", *command)
        return self.slurm.run(*submitted, cwd=self.folder, PATH=path, OMP_NUM_THREADS="1")

    def wait(self, job: str) -> str:
        """How a job ended: its state and exit code."""
        wait_until(lambda: self.slurm.state(job) in _OVER, f"job {job}", seconds=JOB_SECONDS)
        return f"{self.slurm.state(job)} {self.slurm.detail(job, 'ExitCode')}"

    def output(self) -> str:
        """What all jobs have printed."""
        return "\n".join(f"== {log.name}\n{log.read_text()}" for log in sorted(self.folder.glob("*.log")))

    def job(self, name: str) -> JobFolder:
        """A training job's folder."""
        return JobFolder(str(self.folder / name), NO_OPTIONS)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SingleNode]:
    """One node with four CPUs."""
    if missing := missing_daemons():
        reason = f"Slurm is not installed: no {', '.join(missing)} (make slurm)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with single_node(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """One fold of two ranks."""
    url = str(tmp_path_factory.mktemp("world") / "world.zarr")
    make_world(url, resolution=10.0, years=1, seed=3, options=NO_OPTIONS)
    training = {"ranks": 2, "epochs": EPOCHS, "spinup_days": 10}
    cache = tmp_path_factory.mktemp("cache")
    days = {"shard_days": 20, "chunk_days": 20, "spinup_days": 20}
    return small_settings(url, cache, data={"period": PERIOD}, training=training, inference={**LARGE, **days})


@pytest.fixture(scope="session")
def site(slurm: SingleNode, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Where jobs are submitted."""
    folder = tmp_path_factory.mktemp("site") / "h2mv-slurm"
    shutil.copytree(DEPLOY, folder)
    settings_file(folder, settings)
    return Site(slurm, folder)


@pytest.fixture(scope="session")
def reference(site: Site) -> FinalBytes:
    """The final bytes of the fold of ``job``, trained by train.sbatch."""
    trained = site.submit(*SIZE, "train.sbatch", "settings.toml", "--job", "job")
    assert site.wait(trained) == "COMPLETED 0:0", site.output()
    fold = site.job("job").fold(0)
    assert fold.state().attempt == 1
    return final(fold)
