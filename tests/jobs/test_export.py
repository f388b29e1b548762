"""A sweep as one job, and its numbers in other tools."""

import csv
import urllib.request
from pathlib import Path

import pytest
from distributed import Client
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from h2mv_dist.io.cache import is_staged
from h2mv_dist.jobs.export import metrics_table, to_tensorboard
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.training import plan_training, submit_training
from tests.jobs.conftest import NO_OPTIONS, training_settings

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def swept(client: Client, world_url: str, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    """Two learning rates with two seeds each, one fold, two epochs."""
    folder = str(tmp_path_factory.mktemp("sweep"))
    settings = training_settings(world_url, cache, sweep={"values": {"lr": [0.005, 0.02]}, "seeds": 2})
    submit_training(client, settings, folder, NO_OPTIONS).wait()
    return JobFolder(folder, NO_OPTIONS)


def test_one_table_sums_up_a_sweep(swept: JobFolder) -> None:
    rows = list(csv.DictReader((Path(swept.url) / "summary.csv").read_text().splitlines()))
    assert [(r["training.learning_rate"], r["training.seed"]) for r in rows] == [
        ("0.005", "0"),
        ("0.005", "1"),
        ("0.02", "0"),
        ("0.02", "1"),
    ]
    assert {r["state"] for r in rows} == {"done"}
    assert len({r["best_loss"] for r in rows}) == 4, "every run gives other numbers"


def test_runs_of_a_sweep_share_what_is_staged(swept: JobFolder, cache: Path) -> None:
    plan = plan_training(swept.settings(), swept.url, NO_OPTIONS)
    assert len(plan.runs) == 4
    assert is_staged(cache, plan.data)
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1


def test_all_epochs_are_one_table_and_tensorboard_reads_them(swept: JobFolder, tmp_path: Path) -> None:
    table = metrics_table(swept)
    assert len(table) == 8
    assert list(table.columns[:3]) == ["training.learning_rate", "training.seed", "fold"]
    assert table["valid_terms.runoff"].notna().all()
    assert to_tensorboard(swept, tmp_path) == 4
    events = EventAccumulator(str(tmp_path / "learning_rate=0.02,seed=1" / "fold-00"))
    events.Reload()
    of_run = table[(table["training.learning_rate"] == 0.02) & (table["training.seed"] == 1)]
    assert [e.value for e in events.Scalars("valid_loss")] == pytest.approx(list(of_run["valid_loss"]))


def test_prometheus_sees_jobs_beside_dasks_own_metrics(client: Client, swept: JobFolder) -> None:
    assert client.dashboard_link is not None
    with urllib.request.urlopen(client.dashboard_link.replace("status", "metrics")) as answer:
        text = answer.read().decode()
    assert "dask_scheduler_workers" in text
    assert 'h2mv_units{job="train-' in text
    assert "h2mv_valid_loss{" in text
