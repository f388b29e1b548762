"""Where the processes of a running job listen: on the interface of their worker, and nowhere else."""

import os
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import trustme
from distributed import Client

from h2mv_dist.config import ClusterSettings, TlsSettings
from h2mv_dist.jobs.cluster import LOOPBACK, connect, scheduler_address, workers_of
from h2mv_dist.jobs.preemption import RANK_MODULE
from h2mv_dist.jobs.training import submit_training
from tests.jobs.conftest import NO_OPTIONS, training_settings


def listeners() -> dict[str, set[str]]:
    """What each kind of process listens on: this one, workers, ranks."""
    found: dict[str, set[str]] = {"own": set(), "worker": set(), "rank": set()}
    own = psutil.Process(os.getpid())
    for process in (own, *own.children(recursive=True)):
        try:
            rank = RANK_MODULE in process.cmdline()
            connections = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        kind = "own" if process == own else "rank" if rank else "worker"
        found[kind] |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.slow
def test_a_gang_listens_on_the_interface_of_its_workers(
    client: Client, world_url: str, cache: Path, tmp_path: Path
) -> None:
    settings = training_settings(world_url, cache, training={"ranks": 2, "epochs": 6})
    handle = submit_training(client, settings, str(tmp_path / "job"), NO_OPTIONS)
    seen: dict[str, set[str]] = {}
    while not handle.status()["finished"]:
        for kind, addresses in listeners().items():
            seen[kind] = seen.get(kind, set()) | addresses
        time.sleep(0.1)
    handle.wait()
    assert seen == {"own": {LOOPBACK}, "worker": {LOOPBACK}, "rank": {LOOPBACK}}


def test_dashboard_and_metrics_are_served_there_too(client: Client) -> None:
    host = client.dashboard_link.split("/")[2].split(":")[0]
    assert host == LOOPBACK
    with urllib.request.urlopen(client.dashboard_link.replace("/status", "/metrics")) as page:
        assert b"h2mv_quarantined_slots" in page.read()


@pytest.mark.slow
def test_a_gang_trains_over_tls(world_url: str, cache: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert(LOOPBACK)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "own.pem"))
    own = str(tmp_path / "own.pem")
    tls = TlsSettings(ca_file=str(tmp_path / "ca.pem"), cert=own, key=own)
    with connect(ClusterSettings(kind="local", workers=2, tls=tls)) as client:
        assert scheduler_address(client).startswith("tls://")
        assert all(address.startswith("tls://") for address in workers_of(client))
        settings = training_settings(world_url, cache, training={"ranks": 2})
        status = submit_training(client, settings, str(tmp_path / "job"), NO_OPTIONS).wait()
    assert {unit["state"] for unit in status["units"]} == {"done"}
