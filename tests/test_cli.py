"""The command line: helpful errors, exit codes, settings with overrides."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from h2mv_dist.cli import _opening, _resuming, app
from h2mv_dist.config import ClusterSettings, Settings, StorageOptions, load, to_json, validate
from h2mv_dist.errors import ConfigError
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.template import settings_template

SECRET = "hush-hush-canary"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "h2mv_dist.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_an_unknown_setting_names_the_nearest_one(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[data]\nurl = "nowhere"\n[training]\nepoch = 3\n')
    done = run("train", str(file), "--job", str(tmp_path / "job"))
    assert done.returncode == 2
    assert "training.epoch: unknown setting; did you mean 'epochs'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "job").exists()


def test_settings_are_checked_before_torch_is_imported(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[data]\nurl = "nowhere"\n[training]\nepoch = 3\n')
    code = "import sys; sys.modules['torch'] = None; from h2mv_dist.cli import main; main()"
    for command in (["train"], ["infer", "--cube", "cube.zarr"]):
        arguments = [*command, str(file), "--job", str(tmp_path / "job")]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert "training.epoch: unknown setting" in done.stderr, command


def test_an_address_goes_with_its_kind(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[data]\nurl = "nowhere"\n[cluster]\nkind = "address"\n')
    done = run("train", str(file), "--job", str(tmp_path / "job"))
    assert done.returncode == 2
    assert 'kind = "address" and an address go together' in done.stderr


@pytest.mark.parametrize("command", [["train"], ["infer", "--cube", "cube.zarr"]])
def test_data_are_looked_at_before_a_cluster_starts(command: list[str], tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(f'[data]\nurl = "{tmp_path}/nowhere.zarr"\n')
    done = run(*command, str(file), "--job", str(tmp_path / "job"))
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert "to do:" in done.stderr
    assert "dashboard" not in done.stdout
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(("text", "reason"), [(None, "No such file"), ("[data\n", "line 1")])
def test_unreadable_settings_are_explained(text: str | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    if text is not None:
        file.write_text(text)
    done = run("train", str(file), "--job", str(tmp_path / "job"))
    assert done.returncode == 2
    for part in (str(file), reason, "expected:", "to do:"):
        assert part in done.stderr


def test_a_world_is_not_written_over_anything(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("do not touch")
    done = run("world", str(tmp_path), "--resolution", "15", "--years", "1")
    assert done.returncode == 2
    assert "will not write over" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_verify_fails_on_a_file_that_is_off(shared: Path, tmp_path: Path) -> None:
    golden = shared / "golden" / "h2mv.npz"
    assert run("verify", str(golden)).returncode == 0
    (tmp_path / "cut.npz").write_bytes(golden.read_bytes()[:5000])
    assert run("verify", str(tmp_path / "cut.npz")).returncode == 2


@pytest.mark.parametrize(
    "command",
    [
        *("world", "prepare", "train", "infer", "compact", "jobs"),
        *("settings", "verify", "verify-cube", "demo", "cluster"),
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout
    if command in ("prepare", "train", "infer"):
        assert "h2mv-dist settings" in " ".join(done.stdout.split())


def test_the_printed_settings_are_a_start(tmp_path: Path) -> None:
    done = run("settings")
    assert done.returncode == 0
    assert done.stdout == settings_template()
    (tmp_path / "settings.toml").write_text(done.stdout)
    done = run("train", str(tmp_path / "settings.toml"), "--job", str(tmp_path / "job"))
    assert "data.url: expected a path or URL; given an empty one" in done.stderr


def test_cancel_needs_a_scheduler() -> None:
    done = run("jobs", "cancel", "job")
    assert done.returncode == 2
    assert "--address" in done.stderr


class PlannedError(Exception):
    """Stands for what comes after reading the arguments."""


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, str]]:
    """What the commands would plan: settings, and the job folder or store."""
    seen: list[tuple[Settings, str]] = []

    def plan(settings: Settings, folder: str, options: StorageOptions, **_: object) -> None:
        seen.append((settings, folder))
        raise PlannedError

    monkeypatch.setattr("h2mv_dist.jobs.training.plan_training", plan)
    monkeypatch.setattr("h2mv_dist.jobs.cube_plan.plan_inference", plan)
    return seen


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("job", "{cwd}/job"),
        ("../x/./job/", "{parent}/x/job"),
        ("~/job", "{home}/job"),
        ("file:///x/../job", "file:///job"),
        ("s3://bucket/job", "s3://bucket/job"),
    ],
)
def test_places_do_not_depend_on_the_folder(
    given: str, meant: str, plans: list[tuple[Settings, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    meant = meant.format(cwd=tmp_path, parent=tmp_path.parent, home=Path.home())
    Path("settings.toml").write_text(
        f'[data]\nurl = "{given}"\n[data.variables.runoff]\nurl = "{given}"\n[data.mask]\nurl = "{given}"\n'
    )
    for command in (["train"], ["infer", "--cube", given]):
        with pytest.raises(PlannedError):
            app([*command, "settings.toml", "--job", given], standalone_mode=False)
    for settings, folder in plans:
        data = settings.data
        assert data.mask is not None
        assert (folder, data.url, data.variables["runoff"].url, data.mask.url) == (meant,) * 4


@pytest.mark.parametrize(
    ("recorded", "words", "kind", "address"),
    [
        ({"scheduler_file": "x.json"}, ["--address", "tcp://y:1"], "address", "tcp://y:1"),
        ({"kind": "slurm"}, ["--address", "tcp://y:1"], "address", "tcp://y:1"),
        ({"address": "tcp://x:1"}, ["--set", "cluster.kind=local"], "local", None),
        ({"address": "tcp://x:1"}, ["--set", "cluster.workers=3"], "auto", "tcp://x:1"),
    ],
)
def test_a_job_goes_on_elsewhere(
    recorded: dict[str, str],
    words: list[str],
    kind: str,
    address: str | None,
    plans: list[tuple[Settings, str]],
    tmp_path: Path,
) -> None:
    JobFolder(str(tmp_path), StorageOptions()).create(
        validate({"data": {"url": "/x"}, "cluster": recorded}, "test")
    )
    with pytest.raises(PlannedError):
        app(["train", "--resume", str(tmp_path), *words], standalone_mode=False)
    ((settings, _),) = plans
    found = settings.cluster
    assert (found.kind, found.address, found.scheduler_file) == (kind, address, None)


def test_a_job_takes_the_cluster_of_the_file_it_goes_on_with(
    plans: list[tuple[Settings, str]], tmp_path: Path
) -> None:
    recorded = {"data": {"url": "/x"}, "cluster": {"address": "tcp://x:1", "workers": 3}}
    JobFolder(str(tmp_path), StorageOptions()).create(validate(recorded, "test"))
    file = tmp_path / "settings.toml"
    for text in ("", '[data]\nurl = "/y"\n[training]\nranks = 9\n[cluster]\nkind = "local"\n'):
        file.write_text(f"{text}[storage_options.file]\nauto_mkdir = true\n")
        with pytest.raises(PlannedError):
            app(["train", "--resume", str(tmp_path), "--settings", str(file)], standalone_mode=False)
    (before, _), (after, _) = plans
    assert (before.cluster.kind, before.cluster.address) == ("auto", "tcp://x:1")
    assert (after.cluster.kind, after.cluster.address, after.cluster.workers) == ("local", None, 3)
    assert (after.data.url, after.training.ranks) == ("/x", before.training.ranks)


@pytest.mark.parametrize(
    "words",
    [
        ["settings.toml", "--job", "job", "--settings", "settings.toml"],
        ["settings.toml", "--resume", "job"],
        ["settings.toml", "--resume", "job", "--settings", "settings.toml"],
        ["--job", "job", "--settings", "settings.toml"],
    ],
)
def test_a_job_has_one_file_of_settings(words: list[str]) -> None:
    with pytest.raises(typer.BadParameter, match="or --resume, alone or with --settings"):
        app(["train", *words], standalone_mode=False)


def test_the_command_that_goes_on_says_what_is_not_recorded(tmp_path: Path) -> None:
    plain, with_options = tmp_path / "plain.toml", tmp_path / "with options.toml"
    plain.write_text("[cluster]\nworkers = 2\n")
    with_options.write_text(f'[storage_options.s3]\nsecret = "{SECRET}"\n')
    changes, start = ["cluster.kind=local"], "h2mv-dist train --resume s3://b/job"
    assert _resuming("s3://b/job", None, changes) == start
    assert _resuming("s3://b/job", str(plain), changes) == start
    expected = f"{start} --settings '{with_options}' --set=cluster.kind=local"
    assert _resuming("s3://b/job", str(with_options), changes) == expected
    given = [f"storage_options.s3.secret={SECRET}"]
    assert _resuming("s3://b/job", None, given) == "the same command", "secrets are not printed"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (f"ftp://me:{SECRET}@host/x", "expected a URL without a password"),
        (f"ftp://me:a/@{SECRET}@host/x", "expected a URL without a password"),
        ("memory://x", "which worker processes do not share"),
        ("", "given an empty one"),
    ],
)
def test_unusable_places_are_refused(wrong: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[data]\nurl = "x"\n')
    infer = ["infer", str(file)]
    for command in (
        ["train", str(file), "--job", wrong],
        ["train", "--resume", wrong],
        [*infer, "--job", wrong, "--cube", "c"],
        [*infer, "--job", "j", "--cube", wrong],
        ["world", wrong],
    ):
        with pytest.raises(ConfigError, match=reason) as refused:
            app(command, standalone_mode=False)
        named = "path" if command[0] == "world" else command[command.index(wrong) - 1]
        assert str(refused.value).startswith(f"{named}: ")
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("cube", "options"),
    [("/data/c.zarr", False), ("file:///c", False), ("s3://b/c", True), ("gs://b/c", True)],
)
def test_how_to_open_a_cube(cube: str, options: bool) -> None:
    text = _opening(cube)
    assert text.startswith(f'xarray.open_zarr("{cube}"')
    assert ("storage_options" in text) is options


def test_a_cluster_needs_no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[ClusterSettings] = []

    def start_cluster(settings: ClusterSettings) -> None:
        asked.append(settings)
        raise PlannedError

    monkeypatch.setattr("h2mv_dist.jobs.cluster.start_cluster", start_cluster)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    file = tmp_path / "settings.toml"
    file.write_text("[cluster]\nthreads_per_worker = 2\n")
    with pytest.raises(PlannedError):
        app(["cluster", "start", "--settings", str(file), "--workers", "3"], standalone_mode=False)
    assert asked == [ClusterSettings(threads_per_worker=2, workers=3)]


def test_overrides_win_and_secrets_stay_apart(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        '[data]\nurl = "s3://b/x"\nperiod = "2001-01-01..2002-01-01"\n'
        f'[storage_options.s3]\nsecret = "{SECRET}"\n'
    )
    settings, options = load(file, ["training.epochs=7", "model.name=h2mv", "inference.tile=[40, 20]"])
    assert settings.training.epochs == 7
    assert settings.inference.tile == (40, 20)
    assert options["s3"]["secret"] == SECRET
    assert validate(to_json(settings), where="test") == settings
    assert SECRET not in repr(settings) + repr(options) + str(to_json(settings))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.ranks=0", "training.ranks"),
        ("inference.chunk_days=7", "multiple of its chunk"),
        ("data.period=2001..2002", "START..END"),
        ("nonsense", "section.key=value"),
        ("storage_option.s3.key=1", "storage_option"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, ["data.url=x", override])
