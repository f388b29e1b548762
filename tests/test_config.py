"""Settings: what is refused and how that is said, places, the printed template."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from h2mv_dist.config import (
    DataSettings,
    InferenceSettings,
    Settings,
    StorageOptions,
    load,
    load_cluster,
    model_inside,
    place,
    validate,
)
from h2mv_dist.errors import ConfigError
from h2mv_dist.template import settings_template

SECRET = "hush-hush-canary"


def refusal(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as refused:
        load(file, overrides if file else ["data.url=x", *overrides])
    return str(refused.value)


@pytest.mark.parametrize(
    ("override", "setting", "expected", "given"),
    [
        ("inference.chunk=[0, 6]", "inference.chunk.0", "greater than 0", "0"),
        ("inference.chunk=3", "inference.chunk", "a list, such as [0, 1]", "3"),
        ("training.epochs=x", "training.epochs", "a valid integer", '"x"'),
        ("training.ranks=0", "training.ranks", "greater than or equal to 1", "0"),
        ("training.folds=0", "training.folds", "a list, such as [0, 1]", "0"),
        ("training.folds=[1, 1]", "training.folds", "different fold numbers", "[1, 1]"),
        ("inference.folds=[0, 2, 0]", "inference.folds", "different fold numbers", "[0, 2, 0]"),
        ("inference.folds=[]", "inference.folds", "one or more", "[]"),
        ("training.folds=[-1]", "training.folds.0", "greater than or equal to 0", "-1"),
        ("training.cache=s3://b/cache", "training.cache", "a folder on each host", "a URL"),
        ("data.layout=x", "data.layout", "'published' or 'cf'", '"x"'),
        ("data.static=clay", "data.static", '["a", "b"]', '"clay"'),
        ("data.period=2001-01-01", "data.period", "2001-01-01..2002-01-01", '"2001-01-01"'),
        ("inference.baseline=5", "inference.baseline", "2001-01-01..2002-01-01", "5"),
        ("inference.rounding=12", "inference.rounding", "a table of bits from 1 to 23", "12"),
        ("inference.rounding=some", "inference.rounding", '"none", "fluxes", "all"', '"some"'),
        ("inference.rounding={runoff = 0}", "inference.rounding", "a table of bits", "a table"),
        ("inference.rounding={runoff = 24}", "inference.rounding", "a table of bits", "a table"),
        ("inference.rounding={runoff = true}", "inference.rounding", "a table of bits", "a table"),
        ("inference.rounding={runoff = 9.5}", "inference.rounding", "a table of bits", "a table"),
        ("cluster.memory_limit=much", "cluster.memory_limit", "text that matches", '"much"'),
        ("training=5", "training", "a table of settings", "5"),
        ("data=5", "data", "a table of settings", "5"),
    ],
)
def test_one_line_says_what_is_wrong(override: str, setting: str, expected: str, given: str) -> None:
    header, line = refusal(override).splitlines()
    assert "the command line" in header
    assert "h2mv-dist settings" in header
    named, _, rest = line.strip().partition(": ")
    said, shown, todo = rest.split("; ", 2)
    assert named == setting
    assert said.startswith("expected ")
    assert expected in said
    assert shown == f"given {given}"
    assert todo


def test_axes_of_sizes_must_agree() -> None:
    text = refusal("inference.chunk=[3]")
    assert "given 1 for chunk, 2 for shard, 2 for tile" in text
    assert "inference: chunk, shard and tile need one number for each spatial axis" in text
    assert "given 0 for chunk" in refusal(*(f"inference.{name}=[]" for name in ("chunk", "shard", "tile")))


@pytest.mark.parametrize("name", ["data.period", "inference.period", "inference.baseline"])
def test_a_reversed_period_is_named(name: str) -> None:
    assert f"{name}: period 2002-01-01..2001-01-01 holds no day" in refusal(f"{name}=2002-01-01..2001-01-01")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.mask.nam=x", "data.mask.nam: unknown setting; did you mean 'name'?"),
        ("data.variables.runoff.nam=x", "data.variables.runoff.nam: unknown setting; did you mean 'name'?"),
        ("data.variables.name.grup=x", "data.variables.name.grup: unknown setting; did you mean 'group'?"),
        ('folds.explicit=[[{rol="train"}]]', "folds.explicit.0.0.rol: unknown setting; did you mean 'role'?"),
        ("cluster.tls.cart=x", "cluster.tls.cart: unknown setting; did you mean 'cert'?"),
        ("cluster.slurm.quue=x", "cluster.slurm.quue: unknown setting; did you mean 'queue'?"),
        ("storage_option.s3.key=x", "storage_option: unknown setting; did you mean 'storage_options'?"),
    ],
)
def test_an_unknown_setting_is_compared_with_its_own_section(override: str, message: str) -> None:
    assert message in refusal(override)


@pytest.mark.parametrize(
    "overrides",
    [["training=5", "training.epochs=3"], ["data.url=x", "data.url.x=1"], ["training.epochs"], ["=3"]],
)
def test_unreadable_overrides_are_explained(overrides: list[str]) -> None:
    text = refusal(*overrides)
    assert text.startswith("cannot read an override")
    for part in ("where:    --set", "expected: section.key=value", "actual:", "to do:"):
        assert part in text


def test_a_table_in_place_of_a_url_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[data]\nurl = "x"\n')
    assert "data.url: expected a valid string; given a table" in refusal("data.url.x=1", file=file)


@pytest.mark.parametrize("text", ["", "[data]\n"])
def test_a_missing_url_is_asked_for(text: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    assert "data.url: expected a value; given nothing; add it" in refusal(file=file)


@pytest.mark.parametrize(
    "override",
    [
        f"storage_options.s3={SECRET}",
        f"storage_options.key={SECRET}",
        f"storage_options={SECRET}",
        f"storage_options.s3.secret:{SECRET}",
        f"storage_option.s3.secret={SECRET}",
        f"data.url.secret={SECRET}",
        f"data.static=[{{secret = '{SECRET}'}}]",
        f"data.url=ftp://me:{SECRET}@host/x",
        f"data.url=simplecache::ftp://me:a@{SECRET}@host/x",
        f"data.url=ftp:/me:{SECRET}@host/x",
        f"data.mask.url=ftp://me:a/{SECRET}@host/x",
        f"data.variables.runoff.url=ftp://me:{SECRET}@host:21/x",
        f"training.cache=/x/ftp://me:{SECRET}@host",
        f"data.period=ftp://me:{SECRET}@host/x",
        f"training.epochs=ftp://me:{SECRET}@host/x",
    ],
)
def test_secrets_are_refused_unseen(override: str) -> None:
    assert SECRET not in refusal(override)


def test_storage_options_belong_to_a_protocol(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(f'[data]\nurl = "x"\n[storage_options]\nkey = "{SECRET}"\n')
    text = refusal(file=file)
    assert "storage_options.key" in text
    assert "[storage_options.s3]" in text
    assert SECRET not in text
    wrong: Any = {"s3": SECRET}
    with pytest.raises(ConfigError, match=r"storage_options\.s3"):
        StorageOptions(wrong)


@pytest.mark.parametrize("name", ["data.url", "data.mask.url", "data.variables.runoff.url"])
def test_memory_is_no_place_for_data_of_a_job(name: str) -> None:
    assert f"{name}: expected a place that every process reaches" in refusal(f"{name}=memory://x")
    assert DataSettings(url="memory://x").url == "memory://x"


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a:b@c",
        "http://host:80/a@b",
        "abfs://container@account.dfs.core.windows.net/x",
        "file:///a:b@c/x",
        "/a:b@c",
        "memory://x",
    ],
)
def test_what_holds_no_password_is_left_alone(url: str) -> None:
    assert place(url) == url


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings, _ = load(None, ["data.url=world.zarr", "training.cache=~/cache"])
    assert settings.data.url == str(tmp_path / "world.zarr")
    assert settings.training.cache == os.path.expanduser("~/cache")
    monkeypatch.chdir("/")
    assert Settings.model_validate(settings.model_dump(mode="json")) == settings


def test_the_cluster_section_stands_alone(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        f'[cluster]\nworkers = 5\n[data]\nlayout = "cf"\n[storage_options.s3]\nkey = "{SECRET}"\n'
    )
    assert load_cluster(file, ["cluster.threads_per_worker=2"]).workers == 5
    assert load_cluster(None).workers is None
    with pytest.raises(ConfigError, match=r"clustr: unknown setting; did you mean 'cluster'\?"):
        load_cluster(None, ["clustr.workers=3"])
    with pytest.raises(ConfigError, match=r"cluster\.workers: expected greater than or equal to 1; given 0"):
        load_cluster(file, ["cluster.workers=0"])


def test_the_template_holds_the_defaults(tmp_path: Path) -> None:
    text = settings_template().replace('url = ""', 'url = "/data/world.zarr"')
    file = tmp_path / "settings.toml"
    for filled in (text, re.sub(r"^#(\w+ = .+)$", r"\1", text, flags=re.MULTILINE)):
        file.write_text(filled)
        assert load(file)[0] == Settings(data=DataSettings(url="/data/world.zarr"))
    assert filled.count("\n#") < text.count("\n#")


def fields(model: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, field in model.model_fields.items():
        inner = model_inside(field.annotation)
        found += fields(inner, f"{prefix}{name}.") if inner else [(f"{prefix}{name}", field)]
    return found


def test_every_setting_is_described_and_printed() -> None:
    text = settings_template()
    described = fields(Settings)
    assert [name for name, field in described if not field.description] == []
    printed = [name for name, _ in described if not name.startswith("folds.explicit.")]
    assert all(re.search(rf"^#?{name.split('.')[-1]} =", text, re.MULTILINE) for name in printed)


def test_rounding_is_a_word_or_bits_by_name(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[data]\nurl = "x"\n[inference.rounding]\nfluxes = 12\nrunoff = 23\n')
    assert load(file)[0].inference.rounding == {"fluxes": 12, "runoff": 23}
    assert load(file, ["inference.rounding=all"])[0].inference.rounding == "all"
    settings, _ = load(file, ["inference.rounding.fluxes=10"])
    assert settings.inference.rounding == {"fluxes": 10, "runoff": 23}
    assert Settings.model_validate(settings.model_dump(mode="json")) == settings


def test_a_preset_sets_only_chunks_that_are_not_set() -> None:
    def inference(**chosen: object) -> InferenceSettings:
        return validate({"data": {"url": "d"}, "inference": chosen}, where="test").inference

    assert inference(preset="maps").chunk == inference().shard
    assert inference(preset="maps").chunk_days == 1
    maps = inference(preset="maps", shard=[40, 20], tile=[40, 20], chunk_days=3, shard_days=6)
    assert (maps.chunk, maps.chunk_days) == ((40, 20), 3)
    assert inference().chunk == (10, 10)
