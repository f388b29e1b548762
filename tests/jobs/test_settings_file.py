"""Storage options that stand in a settings file only: commands without other settings find them there."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import xarray as xr
from distributed import Client

from h2mv_dist.cli import app
from h2mv_dist.jobs.cluster import scheduler_address
from h2mv_dist.jobs.records import JobFolder
from tests.conftest import SECRET, S3Server
from tests.faults.conftest import settings_file
from tests.jobs.conftest import small_settings
from tests.jobs.processes import START_SECONDS, process, wait_until


@pytest.fixture(scope="module")
def stored(s3_server: S3Server, s3_bucket: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in the object store, with a world."""
    folder, file = f"{s3_bucket}/settings-file", tmp_path_factory.mktemp("options") / "settings.toml"
    file.write_text(in_toml(s3_server))
    world = ["world", f"{folder}/world.zarr", "--resolution", "10", "--years", "1", "--seed", "3"]
    called(*world, "--settings", str(file))
    return folder


def in_toml(server: S3Server) -> str:
    """The options of the store, without those that only tests need."""
    known = ("key", "secret", "endpoint_url")
    return "\n".join(
        ["[storage_options.s3]", *(f'{name} = "{server.options["s3"][name]}"' for name in known)]
    )


def called(*command: str) -> None:
    """A command that ends well."""
    assert app(list(command), standalone_mode=False) in (0, None)


def written(tmp_path: Path, server: S3Server, stored: str, cache: Path, cluster: str) -> str:
    """Settings of a small job, and of a cluster."""
    chosen = small_settings(
        f"{stored}/world.zarr",
        cache,
        inference={"outputs": ["runoff"]},
    )
    file = Path(settings_file(tmp_path, chosen))
    file.write_text(f"{file.read_text()}\n[cluster]\n{cluster}\n{in_toml(server)}\n")
    return str(file)


@pytest.mark.slow
def test_an_interrupted_training_goes_on_with_what_is_printed(
    s3_server: S3Server, stored: str, cache: Path, tmp_path: Path
) -> None:
    file = written(tmp_path, s3_server, stored, cache, 'kind = "slurm"')
    log, job = tmp_path / "log", f"{stored}/interrupted"
    own = ("--set", "cluster.kind=local", "--set", "cluster.workers=1")
    with process(log, "h2mv_dist.cli", "train", file, "--job", job, *own) as trained:
        wait_until(lambda: "fold-00: " in log.read_text(), "a watcher", log)
        trained.send_signal(signal.SIGTERM)
        assert trained.wait(START_SECONDS) == 143, log.read_text()
    found = re.search(r"the job stops with its cluster; go on with: (.*)", log.read_text())
    assert found is not None, log.read_text()
    program, *words = shlex.split(found[1])
    assert program == "h2mv-dist"
    assert words[:3] == ["train", "--resume", job]
    command = [sys.executable, "-m", "h2mv_dist.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=4 * START_SECONDS)
    assert done.returncode == 0, done.stderr
    assert f"trained; checkpoints, metrics, logs and summary.csv: {job}" in done.stdout
    assert SECRET not in log.read_text() + done.stdout + done.stderr


def test_no_command_needs_them_anywhere_else(
    client: Client, s3_server: S3Server, stored: str, cache: Path, tmp_path: Path
) -> None:
    cluster = f'address = "{scheduler_address(client)}"'
    file = written(tmp_path, s3_server, stored, cache, cluster)
    job, cube, long = (f"{stored}/{name}" for name in ("job", "cube.zarr", "long.zarr"))
    settings = small_settings(f"{stored}/world.zarr", cache, training={"epochs": 1})
    JobFolder(job, s3_server.options).create(settings)
    called("train", "--resume", job, "--settings", file)
    called("export", job, "--metrics", str(tmp_path / "metrics.csv"), "--settings", file)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2, "epochs are those of the job"
    called("infer", file, "--job", job, "--cube", cube)
    called("verify-cube", cube, "--repair", "--settings", file)
    called("compact", cube, long, "--shard-days", "240", "--settings", file)
    called("extract", long, str(tmp_path / "part.nc"), "--settings", file)
    with xr.open_dataset(tmp_path / "part.nc") as part:
        assert part.sizes["time"] == 240
