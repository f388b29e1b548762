"""What deploy/slurm says, without a Slurm."""

import os
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


@pytest.mark.parametrize(
    ("asked", "limit"),
    [
        ({"SLURM_MEM_PER_CPU": "4096"}, "8192MiB"),
        ({"SLURM_MEM_PER_CPU": "4096", "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "3"}, "2048MiB"),
        ({"SLURM_MEM_PER_NODE": "65536"}, "16384MiB"),
        ({"SLURM_MEM_PER_NODE": "65536", "SLURM_TASKS_PER_NODE": "9,10(x2)"}, "6553MiB"),
        (
            {
                "SLURM_MEM_PER_NODE": "65536",
                "SLURM_GPUS_ON_NODE": "2",
                "SLURM_NTASKS": "3",
                "SLURM_TASKS_PER_NODE": "1(x3)",
            },
            "32768MiB",
        ),
        ({"SLURM_MEM_PER_NODE": "0"}, "0.25"),
        ({}, "0.25"),
    ],
)
def test_workers_share_the_memory_that_was_asked_for(
    asked: dict[str, str], limit: str, tmp_path: Path
) -> None:
    job = {"SLURM_NTASKS": "11", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "2"}
    tasks = {"SLURM_TASKS_PER_NODE": "4(x2),3"}
    srun = 'srun() { echo "$@"; }; dask_log=$0 scheduler_file=x; start_workers; wait "$workers"'
    log = tmp_path / "log"
    script = ("bash", "-c", f"set -euo pipefail; . ./workers.sh; {srun}", str(log))
    subprocess.run(script, cwd=DEPLOY, env={"PATH": os.environ["PATH"], **job, **tasks, **asked}, check=True)
    assert f"--memory-limit {limit} " in log.read_text()


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
