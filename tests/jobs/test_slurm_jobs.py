"""Workers that are jobs of Slurm, whose commands are stood in for; tests/slurm has the real ones."""

import logging
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue

import pytest

import h2mv_dist as hd
from h2mv_dist.config import ClusterSettings, SlurmSettings, TlsSettings, to_json
from h2mv_dist.errors import JobError
from h2mv_dist.jobs import cluster, slurm
from h2mv_dist.jobs.cluster import LOOPBACK, connect, require_workers, start_cluster, workers_of
from tests.jobs.conftest import assert_runs_jobs, training_settings
from tests.jobs.processes import START_SECONDS, wait_until

QUEUE = {
    "sbatch": 'cp "$1" "$QUEUE/script.$$"; setsid sh "$QUEUE/script.$$" >> "$QUEUE/log" 2>&1 &\n'
    'touch "$QUEUE/jobs/$!"; echo "Submitted batch job $!"',
    "squeue": 'ls "$QUEUE/jobs"',
    "scancel": 'rm "$QUEUE/jobs/$1"; kill -- "-$1"',
}
"""Stand-ins for Slurm's commands: a job is a process group, and is in the queue until it is cancelled."""


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "queue"
    (folder / "jobs").mkdir(parents=True)
    for name, script in QUEUE.items():
        (folder / name).write_text(f"#!/bin/sh\nQUEUE={folder}\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


CROWDED = (
    'cp "$1" "$QUEUE/script.$$"; setsid sh -c "until mv $QUEUE/room $QUEUE/taken 2> /dev/null; '
    'do sleep 0.1; done; exec sh $QUEUE/script.$$" >> "$QUEUE/log" 2>&1 &\n'
    'touch "$QUEUE/jobs/$!"; echo "Submitted batch job $!"'
)
"""An ``sbatch`` whose jobs wait for room; each file ``room`` is room for one."""


@pytest.fixture
def crowded(queue: Path) -> Path:
    """Slurm has room for one job; there is more whenever ``room`` is touched again."""
    (queue / "sbatch").write_text(f"#!/bin/sh\nQUEUE={queue}\n{CROWDED}\n")
    (queue / "room").touch()
    return queue


def two_jobs(queue: Path) -> ClusterSettings:
    """Two workers, each a job of its own."""
    slurm = SlurmSettings(memory="2GiB", log_directory=str(queue / "logs"))
    return ClusterSettings(kind="slurm", workers=2, interface="lo", slurm=slurm)


def test_the_slurm_job_asks_for_what_the_settings_say(tls: TlsSettings, tmp_path: Path) -> None:
    settings = ClusterSettings(
        kind="slurm",
        workers=8,
        interface="lo",
        port_range="3000:3026",
        local_directory="/scratch",
        tls=tls,
        slurm=SlurmSettings(
            queue="gpu",
            account="hydrology",
            cores=32,
            memory="64GiB",
            processes=4,
            walltime="02:00:00",
            directives=("--gres=gpu:4",),
            prologue=("module load cuda",),
            log_directory=str(tmp_path / "logs"),
            worker_command="dask_cuda.cli",
        ),
    )
    with slurm.new_cluster(settings, LOOPBACK, cluster._security(tls)) as made:
        script = made.job_script()
    for line in (
        *("-p gpu", "-A hydrology", "--cpus-per-task=32", "--mem=64G", "-t 02:00:00", "--gres=gpu:4"),
        f"-o {tmp_path}/logs/",
    ):
        assert f"#SBATCH {line}" in script
    assert "module load cuda" in script
    for option in (
        *("-m dask_cuda.cli tls://", "--nthreads 1", "--memory-limit 16.00GiB", "--interface lo"),
        *("--worker-port 3000:3026", "--local-directory /scratch", "--protocol tls://"),
        *(f"--tls-ca-file {tls.ca_file}", f"--tls-cert {tls.cert}", f"--tls-key {tls.key}"),
    ):
        assert option in script
    assert "--nanny-port" not in script, "dask_cuda.cli has no such option"


def test_slurm_jobs_run_and_ended_ones_are_replaced(queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "WATCH_SECONDS", 0.5)
    settings = ClusterSettings(
        kind="slurm",
        interface="lo",
        memory_limit="600MiB",
        slurm=SlurmSettings(memory="1GiB", log_directory=str(queue / "logs")),
    )
    jobs = queue / "jobs"
    with connect(settings) as client:
        client.wait_for_workers(2, timeout=START_SECONDS)
        workers = workers_of(client)
        assert {w["memory_limit"] for w in workers.values()} == {600 * 2**20}
        first = sorted(job.name for job in jobs.iterdir())
        assert len(first) == 2
        subprocess.run([queue / "scancel", first[0]], check=True)
        wait_until(lambda: len(list(jobs.iterdir())) == 2, "a new job", queue / "log")
        assert first[1] in {job.name for job in jobs.iterdir()}, "a job that ran well was replaced"
        wait_until(
            lambda: len(set(workers_of(client)) - set(workers)) == 1,
            "its worker",
            queue / "log",
        )
        assert_runs_jobs(client)
    assert list(jobs.iterdir()) == []


def test_work_begins_before_slurm_has_room_for_all(crowded: Path) -> None:
    with connect(two_jobs(crowded)) as client:
        assert len(workers_of(client)) == 1
        require_workers(client, 1, "inference")
        with pytest.raises(JobError, match=r"not enough workers(.|\n)*3 for training.ranks"):
            require_workers(client, 3, "training.ranks")
        assert_runs_jobs(client)


def test_a_training_waits_until_slurm_had_room_for_its_ranks(
    crowded: Path, world_url: str, cache: Path, tmp_path: Path
) -> None:
    # Dask's clusters change the levels of handlers that are there, pytest's included
    told: SimpleQueue[logging.LogRecord] = SimpleQueue()
    handler, log = QueueHandler(told), logging.getLogger(cluster.__name__)
    settings = to_json(training_settings(world_url, cache, training={"ranks": 2, "epochs": 1}))
    with ThreadPoolExecutor(1) as pool:
        try:
            client = hd.connect(settings={"cluster": two_jobs(crowded).model_dump(exclude_unset=True)})
            assert len(workers_of(client)) == 1
            log.addHandler(handler)
            submitted = pool.submit(hd.train, settings, str(tmp_path / "job"))
            wait_until(lambda: not told.empty() or submitted.done(), "a word of it")
            assert "waiting for 2 workers" in told.get_nowait().getMessage()
            assert not submitted.done()
            (crowded / "room").touch()
            assert submitted.result().wait(progress=False).state == "done"
        finally:
            hd.disconnect()
            log.removeHandler(handler)


def test_a_refusal_of_slurm_is_passed_on(queue: Path) -> None:
    (queue / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: nowhere' >&2; exit 1\n")
    settings = ClusterSettings(kind="slurm", interface="lo", slurm=SlurmSettings(queue="nowhere"))
    with pytest.raises(JobError, match="Slurm did not take the jobs") as refused, start_cluster(settings):
        pass
    assert "invalid partition specified: nowhere" in str(refused.value)
