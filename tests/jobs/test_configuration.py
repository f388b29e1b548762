"""Settings from Dask's configuration: below the settings file, above what is built in."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml

from h2mv_dist.config import SITE, DataSettings, Settings
from h2mv_dist.errors import ConfigError
from h2mv_dist.jobs.configuration import DEFAULTS, leave_template, load, load_cluster, site_settings
from h2mv_dist.template import dask_template, settings_template

URL = "data.url=/x"


def site(tree: dict[str, Any]) -> Any:
    return dask.config.set({f"{SITE}.{section}": values for section, values in tree.items()})


def test_the_shipped_file_is_made_from_the_settings() -> None:
    assert DEFAULTS.read_text() == dask_template(), "h2mv-dist settings --dask > h2mv_dist/h2mv_dist.yaml"


def test_the_shipped_file_holds_the_defaults() -> None:
    tree = yaml.safe_load(DEFAULTS.read_text())[SITE]
    assert tree.pop("storage_options") == {}
    tree["data"]["url"] = "/x"
    assert Settings.model_validate(tree) == Settings(data=DataSettings(url="/x"))


def test_the_shipped_file_documents_every_setting_that_is_printed() -> None:
    shipped = DEFAULTS.read_text()
    printed = set(re.findall(r"^#?(\w+) =", settings_template(), re.MULTILINE)) - {"secret", "endpoint_url"}
    for name in printed:
        assert re.search(rf"^ +(# [\w.]*\b)?{name}:", shipped, re.MULTILINE), name


def test_nothing_said_leaves_what_is_built_in() -> None:
    assert site_settings() == {}
    assert load(None, [URL])[0] == Settings(data=DataSettings(url="/x"))


def test_each_place_comes_before_the_next(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[data]\nurl = "/x"\n[training]\nepochs = 3\nranks = 3\n')
    with site({"training": {"epochs": 4, "ranks": 4, "patience": 4}, "cluster": {"workers": 4}}):
        training = load(file, ["training.epochs=2"])[0].training
        assert load_cluster(None).workers == 4
        assert load_cluster(None, ["cluster.workers=1"]).workers == 1
    assert (training.epochs, training.ranks, training.patience, training.batch_size) == (2, 3, 4, 256)


@pytest.mark.parametrize(
    ("of_site", "file", "overrides", "kind", "where"),
    [
        ({"kind": "slurm"}, "", ["cluster.address=tcp://x:1"], "auto", "tcp://x:1"),
        ({"kind": "slurm"}, 'address = "tcp://x:1"', [], "auto", "tcp://x:1"),
        ({"scheduler_file": "x.json"}, 'address = "tcp://x:1"', [], "auto", "tcp://x:1"),
        ({}, 'scheduler_file = "x.json"', ["cluster.address=tcp://x:1"], "auto", "tcp://x:1"),
        ({}, 'address = "tcp://x:1"', ["cluster.kind=local"], "local", None),
        ({"address": "tcp://x:1"}, 'kind = "local"', ["cluster.workers=5"], "local", None),
        ({"address": "tcp://x:1"}, "workers = 5", [], "auto", "tcp://x:1"),
    ],
)
def test_a_cluster_is_named_by_one_place(
    of_site: dict[str, Any], file: str, overrides: list[str], kind: str, where: str | None, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text(f'[data]\nurl = "/x"\n[cluster]\nthreads_per_worker = 3\n{file}\n')
    with site({"cluster": {**of_site, "memory_limit": "1GiB"}}):
        for found in (load_cluster(settings, overrides), load(settings, overrides)[0].cluster):
            assert (found.kind, found.address, found.scheduler_file) == (kind, where, None)
            assert (found.threads_per_worker, found.memory_limit) == (3, "1GiB"), "the rest is as it was"


def test_environment_and_files_are_read_as_dask_reads_them(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(
        "h2mv-dist:\n  training:\n    batch-size: 7\n    learning_rate: 1e-3\n"
        "  inference:\n    preset: maps\n  storage-options:\n    s3:\n      key-file: a\n"
    )
    code = (
        "from h2mv_dist.jobs.configuration import load\n"
        f"settings, options = load(None, [{URL!r}])\n"
        "print(settings.training.batch_size, settings.training.learning_rate, settings.cluster.workers,\n"
        "      settings.inference.chunk, sorted(options['s3']))"
    )
    environment = {
        **os.environ,
        "DASK_CONFIG": str(tmp_path),
        "DASK_H2MV_DIST__CLUSTER__WORKERS": "5",
        "DASK_H2MV_DIST__STORAGE_OPTIONS__S3__KEY": "k",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == "7 0.001 5 (20, 20) ['key', 'key-file']"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"training": {"epocs": 3}}, "h2mv_dist.training.epocs: unknown setting; did you mean 'epochs'?"),
        ({"clustr": {"workers": 3}}, "h2mv_dist.clustr: unknown setting; did you mean 'cluster'?"),
        ({"training": {"epochs": 0}}, "h2mv_dist.training.epochs: expected greater than or equal to 1"),
        ({"training": 5}, "h2mv_dist.training: expected a table of settings; given 5"),
        ({"cluster": {"tls": {"cert": "x"}}}, "h2mv_dist.cluster.tls.key: expected a value; given nothing"),
    ],
)
def test_a_mistake_is_named_as_dask_names_it(tree: dict[str, Any], message: str) -> None:
    with site(tree), pytest.raises(ConfigError) as refused:
        load(None, [URL])
    assert message in str(refused.value)
    assert "the command line and Dask's configuration, h2mv_dist" in str(refused.value)


def test_a_mistake_of_the_file_is_not_dasks() -> None:
    with site({"training": {"epochs": 5}}), pytest.raises(ConfigError) as refused:
        load(None, [URL, "training.epochs=0"])
    assert "\n  training.epochs: expected" in str(refused.value)


def test_no_table_at_all_is_explained() -> None:
    with dask.config.set({SITE: 5}), pytest.raises(ConfigError, match="no table of settings"):
        site_settings()


def test_the_commented_file_is_left_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask.config, "PATH", str(tmp_path))
    leave_template()
    left = tmp_path / "h2mv_dist.yaml"
    assert yaml.safe_load(left.read_text()) is None
    left.write_text("h2mv_dist: {}\n")
    leave_template()
    assert left.read_text() == "h2mv_dist: {}\n"


def test_importing_the_package_leaves_no_file_and_no_dask(tmp_path: Path) -> None:
    code = "import sys, h2mv_dist, h2mv_dist.config\nassert 'dask' not in sys.modules"
    environment = {**os.environ, "DASK_CONFIG": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
