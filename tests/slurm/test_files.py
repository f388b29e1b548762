"""What deploy/slurm says, without a Slurm."""

import subprocess
from pathlib import Path

import dask
import pytest

from h2mv_dist.config import ClusterSettings, SlurmSettings, load, load_cluster
from h2mv_dist.jobs import slurm
from h2mv_dist.jobs.cluster import LOOPBACK
from tests.slurm.conftest import DEPLOY

SCRIPTS = sorted([*DEPLOY.glob("*.sbatch"), *DEPLOY.glob("*.sh")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_sound(script: Path) -> None:
    assert script.stem in {"train", "infer", "scheduler", "workers", "site"}
    subprocess.run(["bash", "-n", script], check=True)


def test_settings_are_valid() -> None:
    settings, _ = load(DEPLOY / "settings.toml")
    assert settings.training.ranks == 4


def test_both_descriptions_of_the_cluster_give_the_same_job() -> None:
    toml = load_cluster(DEPLOY / "cluster.toml")
    configured = ClusterSettings(kind="slurm", workers=toml.workers, slurm=SlurmSettings())
    slurm._cluster_type()  # imports dask-jobqueue, whose defaults would otherwise be forgotten again below
    file = dask.config.collect(paths=[str(DEPLOY / "jobqueue.yaml")], env={})
    with dask.config.set(dask.config.merge(dask.config.config, file)):
        assert job_script(configured) == job_script(toml)


def job_script(settings: ClusterSettings) -> list[str]:
    """What Slurm would be given, but for the place of the scheduler."""
    with slurm.new_cluster(settings, LOOPBACK, None) as cluster:
        address = cluster.scheduler_address
        script: str = cluster.job_script()
    return script.replace(address, "SCHEDULER").splitlines()
