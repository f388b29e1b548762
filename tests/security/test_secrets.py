"""A canary among the storage options is nowhere in what is stored, printed, logged, shown or raised."""

import pickle
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from h2mv_dist import notebook
from h2mv_dist.config import Settings, StorageOptions
from h2mv_dist.errors import H2mvError
from h2mv_dist.io.stores import get_object, list_objects
from h2mv_dist.jobs.compact import plan_compact, start_compact
from h2mv_dist.jobs.cube_plan import plan_inference
from h2mv_dist.jobs.handle import JobHandle
from h2mv_dist.jobs.inference import start_inference
from h2mv_dist.jobs.messages import Job, Message
from h2mv_dist.jobs.prepare import plan_prepare, start_prepare
from h2mv_dist.jobs.tasks import TOPIC
from h2mv_dist.jobs.training import plan_training, start_training
from h2mv_dist.jobs.worlds import make_world
from tests.jobs.conftest import small_settings
from tests.seaweed import SECRET, S3Server, running_server, storage_options


class Heard:
    """Everything that anybody could read."""

    def __init__(self) -> None:
        self.texts: dict[str, bytes] = {}

    def __call__(self, name: str, *things: object) -> None:
        for thing in things:
            text = thing if isinstance(thing, bytes) else f"{thing!r}\n{thing}".encode()
            self.texts[name] = self.texts.get(name, b"") + text

    def error(self, name: str, error: BaseException) -> None:
        """As it prints, and as it travels to another process."""
        self(name, error, "".join(traceback.format_exception(error)), pickle.dumps(error))

    def store(self, name: str, url: str, options: StorageOptions) -> int:
        """Every object, with its name."""
        names = list_objects(url, options)
        for one in names:
            self(name, one, get_object(f"{url}/{one}", options))
        return len(names)

    def cluster(self, name: str, client: Client) -> None:
        """Logs and events of scheduler and workers."""
        self(name, client.get_scheduler_logs(), client.get_worker_logs(), client.get_events())
        self(name, client.get_events(TOPIC), client.scheduler_info(n_workers=-1))

    def assert_silent(self, *secrets: str) -> None:
        leaks = [name for name, text in self.texts.items() for s in secrets if s.encode() in text]
        assert leaks == []


def impatient(options: StorageOptions) -> StorageOptions:
    """Whoever asks a store that does not answer soon gives up."""
    return StorageOptions({"s3": {**options["s3"], "patience": 1.0}})


def short_job(url: str, cache: Path) -> Settings:
    sections: dict[str, dict[str, Any]] = {
        "folds": {"block": 1, "n_folds": 2},
        "training": {"epochs": 1, "attempts": 1},
        "inference": {"attempts": 1, "spinup_days": 5},
    }
    return small_settings(url, cache, **sections)


def trained(client: Client, settings: Settings, folder: str, options: StorageOptions, heard: Heard) -> None:
    plan = plan_training(settings, folder, options)
    handle = start_training(client, plan)
    heard("plan", plan, handle, settings, options)
    heard("status", handle.wait())


def inferred(
    client: Client, settings: Settings, job: str, cube: str, options: StorageOptions, heard: Heard
) -> None:
    planned = plan_inference(settings, job, options, cube=cube)
    heard("plan", planned)
    handle = start_inference(client, planned, job, cube, options)
    assert handle is not None
    heard("status", handle.wait())


def prepared(client: Client, settings: Settings, to: str, options: StorageOptions, heard: Heard) -> None:
    plan = plan_prepare(settings, options)
    heard("plan", plan)
    handle = start_prepare(client, plan, to, options)
    assert handle is not None
    heard("status", handle.wait())


def copied(client: Client, cube: str, to: str, options: StorageOptions, heard: Heard) -> None:
    plan = plan_compact(cube, to, options, shard_days=240)
    heard("plan", plan)
    heard("status", start_compact(client, plan, options).wait())


def shown(place: str, options: StorageOptions, heard: Heard) -> None:
    """What a notebook shows of the records of a job."""
    stores = options.reveal()
    found = notebook.job(place, storage_options=stores)
    heard("notebook", found, found._repr_html_(), found.status())
    below = notebook.jobs(place, storage_options=stores)
    heard("notebook", below, below._repr_html_())


@pytest.mark.slow
def test_nothing_tells_a_secret(
    client: Client,
    s3_server: S3Server,
    s3_bucket: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG", "h2mv_dist")
    heard, options = Heard(), s3_server.options
    root = f"{s3_bucket}/secrets"
    make_world(f"{root}/world", resolution=20.0, years=1, seed=3, options=options)
    settings = short_job(f"{root}/world", tmp_path / "cache")
    trained(client, settings, f"{root}/job", options, heard)
    inferred(client, settings, f"{root}/job", f"{root}/cube.zarr", options, heard)
    prepared(client, settings, f"{root}/ready.zarr", options, heard)
    copied(client, f"{root}/cube.zarr", f"{root}/copy.zarr", options, heard)
    for place in ("job", "cube.zarr", "ready.zarr", "copy.zarr"):
        shown(f"{root}/{place}", options, heard)
    assert heard.store("objects", root, options) > 50
    for path in (tmp_path / "cache").rglob("*.json"):
        heard("cache", path.read_bytes())

    wrong = storage_options(s3_server.endpoint, secret=f"other-{SECRET}")
    failures = {
        "wrong key": (f"{root}/world", wrong),
        "missing bucket": ("s3://no-such-bucket-here/world", options),
        "nobody there": (f"{root}/world", impatient(storage_options("http://127.0.0.1:9"))),
    }
    for name, (url, given) in failures.items():
        elsewhere = short_job(url, tmp_path / "none")
        attempts: tuple[Callable[[], object], ...] = (
            partial(trained, client, elsewhere, f"{root}/other", given, heard),
            partial(inferred, client, settings, f"{root}/job", f"{url}-cube.zarr", given, heard),
            partial(prepared, client, elsewhere, f"{root}/other.zarr", given, heard),
            partial(copied, client, f"{url}-cube.zarr", f"{root}/other.zarr", given, heard),
            partial(shown, f"{url}-cube.zarr", given, heard),
        )
        for attempt in attempts:
            with pytest.raises(H2mvError) as refused:
                attempt()
            heard.error(name, refused.value)

    heard.cluster("cluster", client)
    heard("output", *capfd.readouterr(), caplog.text)
    heard.assert_silent(SECRET)


@pytest.mark.slow
def test_a_store_that_dies_under_a_job_tells_no_secret(
    client: Client, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard = Heard()
    with ExitStack() as stack:
        server = stack.enter_context(running_server(tmp_path))
        options = impatient(server.options)
        bucket = server.new_bucket()
        make_world(f"{bucket}/world", resolution=20.0, years=1, seed=3, options=options)
        settings = short_job(f"{bucket}/world", tmp_path / "cache")
        handle = start_training(client, plan_training(settings, f"{bucket}/job", options))
        stack.close()
        with pytest.raises(H2mvError) as refused:
            handle.wait()
    heard.error("gone", refused.value)
    heard.cluster("cluster", client)
    heard("output", *capfd.readouterr())
    heard.assert_silent(SECRET)


def test_what_carries_options_does_not_show_them(client: Client) -> None:
    options = StorageOptions(
        {"s3": {"secret": SECRET, "client_kwargs": {"headers": {"Authorization": SECRET}}}}
    )
    common = {"storage_options": options.reveal()}
    heard = Heard()
    heard("shown", options, Job("j", "", common, ()), JobHandle("j", client))
    heard("shown", Message({"job": "j", "unit": "u", **common}), [options], {"o": options})
    heard("shown", Job("j", "", common, ()).status())
    heard.assert_silent(SECRET)
