"""Clusters of every kind, with real schedulers and workers that listen on 127.0.0.1 only."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import types
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
import torch
from dask.system import CPU_COUNT
from distributed import Client
from distributed.system import MEMORY_LIMIT
from pydantic import ValidationError

from h2mv_dist.config import ClusterSettings, TlsSettings
from h2mv_dist.errors import JobError
from h2mv_dist.jobs import cluster, tasks
from h2mv_dist.jobs.cluster import (
    LOOPBACK,
    _ended_at_last,
    chosen_kind,
    connect,
    for_work,
    local_workers,
    no_gpu_because,
    start_cluster,
    workers_of,
)
from h2mv_dist.jobs.handle import JobHandle, submit
from h2mv_dist.jobs.messages import Job, Unit, job_id
from tests.jobs.conftest import assert_runs_jobs
from tests.jobs.processes import START_SECONDS, process, wait_until


@contextmanager
def plain_dask(
    folder: Path, *options: str, tls: TlsSettings | None = None, plugins: bool = True
) -> Iterator[Path]:
    """A ``dask scheduler`` and a ``dask worker`` as users start them; yields the scheduler file.

    Without ``plugins``, the scheduler takes none from clients (``distributed.scheduler.pickle`` is no more).
    """
    file = folder / "scheduler.json"
    log = folder / "scheduler.log"
    place = [
        "--host",
        f"{'tcp' if tls is None else 'tls'}://{LOOPBACK}",
        "--dashboard-address",
        f"{LOOPBACK}:0",
    ]
    if tls is not None:
        place += ["--tls-ca-file", tls.ca_file, "--tls-cert", tls.cert, "--tls-key", tls.key]
    known = ["--scheduler-file", str(file)]
    scheduler = ("distributed.cli.dask_scheduler", "--port", "0", *place, *known, *options)
    worker = ("distributed.cli.dask_worker", "--nthreads", "1", *place, *known)
    environment = {} if plugins else {"DASK_DISTRIBUTED__SCHEDULER__BLOCKED_HANDLERS": f"[{REGISTER!r}]"}
    with process(log, *scheduler, **environment):
        wait_until(lambda: file.exists() and file.read_text().endswith("}"), "the scheduler", log)
        with process(folder / "worker.log", *worker):
            yield file


PRELOADED = ("--preload", cluster.PRELOAD)
REGISTER = "register_scheduler_plugin"


def test_of_many_failed_units_the_first_are_heard(client: Client) -> None:
    units = tuple(Unit(f"tile-{number}", "tile", {}, attempts=1) for number in range(50))
    many = job_id("infer", "many")
    with pytest.raises(JobError) as failed:
        submit(client, Job(many, "", {}, units)).wait()
    *said, more, last = str(failed.value).splitlines()
    assert len(said) == 3
    assert all(re.match(r"tile-\d+ \(attempt 1\): ", line) for line in said)
    assert more == "... and 47 more"
    assert last.startswith(f"50 of 50 units of {many} failed")


# running schedulers


@pytest.mark.parametrize(
    "options", [(), pytest.param(PRELOADED, marks=pytest.mark.slow)], ids=["plain", "preloaded"]
)
def test_a_running_scheduler_is_used_and_left_alone(options: tuple[str, ...], tmp_path: Path) -> None:
    with plain_dask(tmp_path, *options) as file:
        settings = ClusterSettings(scheduler_file=str(file))
        assert chosen_kind(settings) == "address"
        with connect(settings) as client:
            assert_runs_jobs(client)
        address = json.loads(file.read_text())["address"]
        with connect(ClusterSettings(kind="address", address=address)) as client:
            assert JobHandle("empty", client).status()["finished"], "the coordinator was replaced"


def test_a_scheduler_that_takes_no_plugins_needs_the_preload(tmp_path: Path) -> None:
    (tmp_path / "with").mkdir()
    with (
        plain_dask(tmp_path / "with", *PRELOADED, plugins=False) as file,
        connect(ClusterSettings(scheduler_file=str(file))) as client,
    ):
        assert_runs_jobs(client)
    (tmp_path / "without").mkdir()
    with plain_dask(tmp_path / "without", plugins=False) as file:
        with (
            pytest.raises(JobError, match=r"--preload h2mv_dist\.jobs\.preload") as refused,
            connect(ClusterSettings(scheduler_file=str(file))),
        ):
            pass
        assert "explicitly disallowed" in str(refused.value)


@pytest.mark.parametrize(
    "options", [(), pytest.param(PRELOADED, marks=pytest.mark.slow)], ids=["plain", "preloaded"]
)
def test_tls_to_a_running_scheduler(options: tuple[str, ...], tls: TlsSettings, tmp_path: Path) -> None:
    with plain_dask(tmp_path, *options, tls=tls) as file:
        with connect(ClusterSettings(scheduler_file=str(file), tls=tls)) as client:
            assert cluster.scheduler_address(client).startswith("tls://")
            assert_runs_jobs(client)
        with (
            pytest.raises(JobError, match=r"cannot reach the Dask scheduler(.|\n)*cluster\.tls"),
            connect(ClusterSettings(scheduler_file=str(file))),
        ):
            pass


@pytest.mark.parametrize("content", [None, "{", '["tcp://x:1"]', "{}"])
def test_an_unusable_scheduler_file_is_explained(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    if content is not None:
        file.write_text(content)
    with (
        pytest.raises(JobError, match="cannot read the scheduler file") as refused,
        connect(ClusterSettings(scheduler_file=str(file))),
    ):
        pass
    assert str(file) in str(refused.value)
    assert "cluster start --scheduler-file" in str(refused.value)


# workers on this machine


def listening(pid: int) -> set[str]:
    """Addresses that a process and its children listen on."""
    parent = psutil.Process(pid)
    connections = [c for p in (parent, *parent.children(recursive=True)) for c in p.net_connections("inet")]
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


# Dask leaves the closing of its socket to the garbage collector where a port of the range is taken
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_local_workers_are_as_asked_for(tls: TlsSettings, tmp_path: Path) -> None:
    first = 20_000 + os.getpid() % 10_000  # below the ports that others are given
    settings = ClusterSettings(
        kind="local",
        workers=1,
        threads_per_worker=3,
        memory_limit="700MiB",
        interface="lo",
        port_range=f"{first}:{first + 20}",
        local_directory=str(tmp_path),
        tls=tls,
    )
    with connect(settings) as client:
        ((address, worker),) = workers_of(client).items()
        assert address.startswith(f"tls://{LOOPBACK}:")
        for part in (address, worker["nanny"]):
            assert first <= int(part.rpartition(":")[2]) <= first + 20
        assert worker["nthreads"] == 3
        assert worker["memory_limit"] == 700 * 2**20
        assert worker["local_directory"].startswith(str(tmp_path))
        with urllib.request.urlopen(client.dashboard_link) as page:
            assert b"Dask Diagnostic UI" in page.read()
        assert listening(os.getpid()) == {LOOPBACK}
        host, port = client.submit(tasks.open_rendezvous, "gang", None).result()
        assert host == LOOPBACK
        assert first <= port <= first + 20, "ranks meet on a port that a firewall would not let through"
        assert_runs_jobs(client)


@pytest.mark.parametrize(
    ("settings", "cores", "gibibytes", "expected"),
    [
        ({}, 2, 16, 2),
        ({}, 64, 256, 64),
        ({}, 64, 32, 16),
        ({}, 8, 1, 1),
        ({"threads_per_worker": 4}, 16, 64, 4),
        ({"threads_per_worker": 4}, 2, 64, 1),
        ({"memory_limit": "16GiB"}, 64, 100, 6),
        ({"memory_limit": "512MiB"}, 4, 2, 4),
        ({"memory_limit": "0"}, 64, 32, 16),
        ({"memory_limit": "0.5"}, 4, 32, 4),
        ({"workers": 3, "threads_per_worker": 4, "memory_limit": "16GiB"}, 2, 1, 3),
    ],
)
def test_one_worker_a_core_unless_memory_or_settings_say_otherwise(
    settings: dict[str, Any], cores: int, gibibytes: int, expected: int
) -> None:
    chosen = ClusterSettings(kind="local", **settings)
    assert local_workers(chosen, cores=cores, memory=gibibytes * 2**30) == expected


def test_work_has_the_workers_it_needs_if_settings_leave_it_open() -> None:
    local = ClusterSettings(kind="local")
    usual = local_workers(local)
    assert local_workers(local, threads=4, cores=16, memory=64 * 2**30) == 4
    assert for_work(local).workers == usual
    assert for_work(local, threads=10 * CPU_COUNT).workers == 1
    assert for_work(local, least=usual + 1, most=usual + 3).workers == usual + 1, "each rank has one"
    assert for_work(local, most=1).workers == 1, "the others would have nothing to do"
    for settings in (
        ClusterSettings(kind="local", workers=1),
        ClusterSettings(kind="slurm"),
        ClusterSettings(address="tcp://x:1"),
    ):
        assert for_work(settings, least=8) == settings


def test_so_many_start() -> None:
    with connect(ClusterSettings(kind="local", memory_limit=str(MEMORY_LIMIT))) as client:
        assert len(workers_of(client)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ClusterSettings(kind="local", interface="no-such0"), "no such network interface"),
        (
            ClusterSettings(kind="local", tls=TlsSettings(ca_file="no-ca.pem", cert="c", key="k")),
            "cluster.tls.ca_file(.|\n)*no file no-ca.pem",
        ),
        (ClusterSettings(address="tcp://127.0.0.1:1"), "nothing to start"),
        (ClusterSettings(kind="local", local_directory="/proc/nowhere"), "the cluster did not start"),
    ],
)
def test_what_cannot_be_started_is_explained(settings: ClusterSettings, message: str) -> None:
    with pytest.raises(JobError, match=message), start_cluster(settings):
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "address"},
        {"kind": "local", "address": "tcp://x:1"},
        {"kind": "slurm", "scheduler_file": "x.json"},
        {"address": "tcp://x:1", "scheduler_file": "x.json"},
        {"port_range": "3000"},
        {"port_range": "3026:3000"},
        {"port_range": "3000:70000"},
        {"memory_limit": "much"},
        {"slurm": {"memory": "auto"}},
        {"threads_per_worker": 0},
    ],
)
def test_contradicting_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ClusterSettings.model_validate(wrong)


# GPUs


class _Driver(types.ModuleType):
    """What NVML answers on a machine with so many GPUs; without a driver if None."""

    NVMLError = RuntimeError

    def __init__(self, n_gpus: int | None) -> None:
        super().__init__("pynvml")
        self.n_gpus = n_gpus

    def nvmlInit(self) -> None:  # noqa: N802
        if self.n_gpus is None:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int | None:  # noqa: N802
        return self.n_gpus


@pytest.mark.parametrize(
    ("visible", "driver", "build", "reason"),
    [
        (None, _Driver(2), "12.9", None),
        ("1,0", _Driver(2), "12.9", None),
        ("", _Driver(2), "12.9", 'CUDA_VISIBLE_DEVICES = ""'),
        ("-1", _Driver(2), "12.9", 'CUDA_VISIBLE_DEVICES = "-1"'),
        (None, _Driver(0), "12.9", "knows no GPU"),
        (None, _Driver(None), "12.9", "Driver Not Loaded"),
        (None, None, "12.9", "nvidia-ml-py"),
        (None, _Driver(2), None, "built without CUDA"),
    ],
)
def test_gpus_are_found_without_initialising_cuda(
    visible: str | None,
    driver: _Driver | None,
    build: str | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch.version, "cuda", build)
    assert chosen_kind(ClusterSettings()) == ("cuda" if reason is None else "local")
    assert not torch.cuda.is_initialized()
    if reason is None:
        assert no_gpu_because() is None
        return
    assert reason in str(no_gpu_because())
    with (
        pytest.raises(JobError, match="there is no GPU") as refused,
        start_cluster(ClusterSettings(kind="cuda")),
    ):
        pass
    assert reason in str(refused.value)


def test_one_worker_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """dask-cuda's own way to run on a machine without GPUs; it only fails to warm the devices up."""
    pytest.importorskip("dask_cuda")
    monkeypatch.setenv("DASK_CUDA_TEST_DISABLE_DEVICE_SPECIFIC", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(cluster, "no_gpu_because", lambda: None)
    with dask.config.set({"distributed.diagnostics.nvml": False}), connect(ClusterSettings()) as client:
        seen = client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
        assert sorted(seen.values()) == ["0,1", "1,0"]
        assert listening(os.getpid()) == {LOOPBACK}


# the command line


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_files_made_as_the_documentation_says_encrypt(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/howto/encrypt.md").read_text()
    (command,) = re.findall(r"^openssl .*$", page, re.MULTILINE)
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True, capture_output=True)
    (section,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    said = tomllib.loads(section.replace("/home/me/h2mv-tls", str(tmp_path)))["cluster"]["tls"]
    with connect(ClusterSettings(kind="local", workers=1, tls=TlsSettings(**said))) as client:
        assert cluster.scheduler_address(client).startswith("tls://")
        assert all(address.startswith("tls://") for address in workers_of(client))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_cluster_start_keeps_workers_until_told_to_stop(number: signal.Signals, tmp_path: Path) -> None:
    file, log, toml = tmp_path / "scheduler.json", tmp_path / "log", tmp_path / "settings.toml"
    toml.write_text('[data]\nurl = "nowhere"\n[cluster]\nkind = "local"\nworkers = 3\n')
    options = ("--settings", str(toml), "--workers", "1", "--set", "cluster.threads_per_worker=2")
    command = ("h2mv_dist.cli", "cluster", "start", *options, "--scheduler-file", str(file))
    with process(log, *command) as started:
        wait_until(lambda: "dashboard: http" in log.read_text(), "the cluster", log)
        assert listening(started.pid) == {LOOPBACK}
        with connect(ClusterSettings(scheduler_file=str(file))) as client:
            (worker,) = workers_of(client).values()
            assert worker["nthreads"] == 2
            assert f"scheduler: {cluster.scheduler_address(client)}\n" in log.read_text()
        family = psutil.Process(started.pid).children(recursive=True)
        # Ctrl-C reaches every process of the terminal, a batch system's SIGTERM only the first
        (os.killpg if number == signal.SIGINT else os.kill)(started.pid, number)
        assert started.wait(START_SECONDS) == 0, log.read_text()
    assert not psutil.wait_procs(family, timeout=START_SECONDS)[1]
    assert not file.exists()
    # a busy machine may make Dask warn of a worker that takes its time
    assert "stopping\n" in log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()


def test_cluster_start_refuses_gpus_where_there_are_none(tmp_path: Path) -> None:
    with process(
        tmp_path / "log", "h2mv_dist.cli", "cluster", "start", "--cuda", CUDA_VISIBLE_DEVICES=""
    ) as started:
        assert started.wait(START_SECONDS) == 2
    output = (tmp_path / "log").read_text()
    assert "there is no GPU to use" in output
    assert "Traceback" not in output


def test_that_workers_take_long_to_end_is_no_failure_of_the_work(caplog: pytest.LogCaptureFixture) -> None:
    @contextmanager
    def busy_host() -> Iterator[str]:
        yield "cluster"
        raise TimeoutError

    with pytest.raises(SystemExit) as left, _ended_at_last(busy_host()) as cluster:
        raise SystemExit(cluster)
    assert left.value.code == "cluster"
    with _ended_at_last(busy_host()):
        pass
    assert caplog.text.count("took too long to end") == 2
