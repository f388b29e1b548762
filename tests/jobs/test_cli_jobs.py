"""The commands around jobs and clusters, as programs of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from h2mv_dist.jobs.cluster import scheduler_address
from h2mv_dist.jobs.messages import job_id
from tests.jobs.processes import START_SECONDS, process, wait_until


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "h2mv_dist.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def as_json(*arguments: str) -> Any:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_records_are_listed_shown_and_read_without_a_cluster(job: str) -> None:
    (listed,) = as_json("jobs", "list", job)
    shown = as_json("jobs", "show", job)
    for found in (listed, shown):
        assert (found["id"], found["state"], found["done"]) == (job_id("train", job), "done", 4)
        assert found["counted"] == "epochs"
    assert [unit["name"] for unit in shown["units"]] == ["fold-00", "fold-01"]
    logs = run("jobs", "logs", job, "--unit", "fold-01")
    assert "fold-01, attempt 1, rank 0" in logs.stdout
    assert "fold-00" not in logs.stdout
    (printed,) = as_json("jobs", "logs", job, "--unit", "fold-01")
    assert (printed["unit"], printed["rank"], printed["outcome"]) == ("fold-01", 0, "done")
    assert printed["text"].strip() in logs.stdout
    wrong = run("jobs", "logs", job, "--unit", "fold-1")
    assert wrong.returncode == 2
    assert "did you mean 'fold-01'" in wrong.stderr
    assert f"{shown['id']} is done" in run("jobs", "watch", job).stdout, "it has ended"
    assert as_json("jobs", "watch", job)["units"] == shown["units"]
    nothing = run("jobs", "show", str(Path(job) / "folds"))
    assert nothing.returncode == 2
    assert "there is no job" in nothing.stderr


def test_records_are_read_where_the_scheduler_is_gone(job: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(f'[cluster]\nscheduler_file = "{tmp_path}/gone.json"\n')
    for words in (["list", job], ["logs", job]):
        done = run("jobs", *words, "--settings", str(file))
        assert done.returncode == 0, done.stderr
        assert "gone.json" in done.stderr, "it is said"
        assert "so this is what was recorded" in done.stderr
        assert done.stdout
    needed = run("jobs", "show", job_id("train", job), "--settings", str(file))
    assert needed.returncode == 2, "an id says nothing of where the records are"


def test_a_scheduler_is_asked_by_id(client: Client, job: str) -> None:
    address, name = ("--address", scheduler_address(client)), job_id("train", job)
    assert name in {found["id"] for found in as_json("jobs", "list", *address)}
    table = run("jobs", "show", name, *address)
    assert "fold-01" in table.stdout
    assert run("jobs", "cancel", name, *address).returncode == 2, "there is nothing to cancel"
    info = as_json("cluster", "info", *address)
    assert info["scheduler"] == scheduler_address(client)
    assert len(info["workers"]) == 4


@pytest.mark.slow
def test_a_cluster_is_stopped_by_another_process(tmp_path: Path) -> None:
    file, log = tmp_path / "scheduler.json", tmp_path / "log"
    command = ("cluster", "start", "--workers", "1", "--scheduler-file", str(file))
    with process(log, "h2mv_dist.cli", *command) as started:
        wait_until(file.exists, "the scheduler's file", log)
        address = json.loads(file.read_text())["address"]
        assert as_json("cluster", "stop", "--address", address) == {"stopped": address}
        assert started.wait(START_SECONDS) == 0
    assert not file.exists()
