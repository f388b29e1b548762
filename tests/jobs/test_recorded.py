"""Records of jobs found below a folder, on every kind of store; no cluster anywhere."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import h2mv_dist as hd
from h2mv_dist.config import StorageOptions, validate
from h2mv_dist.io import stores
from h2mv_dist.io.stores import join, put_object
from h2mv_dist.jobs import recorded
from h2mv_dist.jobs.messages import job_id
from h2mv_dist.jobs.progress import progress_of
from h2mv_dist.jobs.recorded import find_job, recorded_jobs
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.run_record import RunRecord
from tests.conftest import Place
from tests.io.counting import CountingFileSystem, counting_place, forget_reads
from tests.io.cubes import CubePlace, fill_with_receipts, map_layout
from tests.jobs.conftest import NO_OPTIONS
from tests.jobs.test_records import write


def record(kind: str, place: str, submitted: float = 0.0, options: StorageOptions = NO_OPTIONS) -> RunRecord:
    run = RunRecord(
        id=job_id(kind, place),
        run="a",
        place=place,
        scheduler="tcp://x:1",
        submitted=submitted,
        units=("one",),
        state="done",
    )
    run.write(options)
    return run


def test_what_is_no_record_of_ours_hides_no_job(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    places = [join(place.url, *name.split("/")) for name in ("a/deep/job", "cube.zarr", "a/copy")]
    for number, (kind, where) in enumerate(zip(("train", "infer", "compact"), places, strict=True)):
        record(kind, where, number, place.options)
    for name, content in (
        ("wandb/run.json", b'{"config": 1}'),
        ("torn.run.json", b'{"id": "infer-'),
        ("other.run.json", b"[]"),
        ("notes.json", b"{}"),
    ):
        put_object(join(place.url, *name.split("/")), content, place.options)
    found = recorded_jobs(place.url, place.options)
    assert [job.place for job in found] == places, "the last submitted last"
    assert [job.id.partition("-")[0] for job in found] == ["train", "infer", "compact"]
    for name in ("wandb/run.json", "torn.run.json", "other.run.json"):
        assert name in caplog.text
    assert "notes.json" not in caplog.text


def test_a_run_without_an_end_is_not_called_done_or_running(tmp_path: Path) -> None:
    """As one leaves it whose cluster was killed between the last receipt and the end."""
    cube = CubePlace(str(tmp_path / "cube.zarr"), NO_OPTIONS)
    fill_with_receipts(cube, map_layout())
    done = record("infer", cube.url)
    states = []
    for state in ("done", "running"):
        replace(done, state=state).write(NO_OPTIONS)
        states.append(progress_of(find_job(cube.url, NO_OPTIONS).status()).state)
    assert states == ["done", "unfinished"]


def test_cubes_and_data_are_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record("infer", str(tmp_path / "cube.zarr"))
    cubes = ("cube.zarr/runoff/c/0/0", "cube.ledger/0-1/x.json", "cube.states/0-1/x")
    for name in (*cubes, "a/zarr.json", "a/runoff/c/0/0", "b/c/x"):
        put_object(str(tmp_path / name), b"x", NO_OPTIONS)
    looked: list[str] = []

    def list_folder(url: str, options: StorageOptions) -> stores.Listing:
        looked.append(url)
        return stores.list_folder(url, options)

    monkeypatch.setattr(recorded, "list_folder", list_folder)
    assert len(recorded_jobs(str(tmp_path), NO_OPTIONS)) == 1
    assert sorted(looked) == [str(tmp_path / name) for name in ("", "a", "b", "b/c")]


def test_of_a_fold_only_the_last_epoch_is_read() -> None:
    with counting_place() as place:
        folder = JobFolder(place.url, place.options)
        folder.create(validate({"training": {"folds": [0, 1]}, "data": {"url": "none"}}, where="test"))
        writer = folder.fold(0).claim(2, "gang")
        for epoch in (1, 2, 3):
            write(writer, epoch)
        writer.mark_done({"epoch": 3})
        forget_reads()
        begun, untouched = find_job(place.url, place.options).status()["units"]
        read = [path for path in CountingFileSystem.reads if "/metrics/" in path]
    assert [path.rpartition("/")[2] for path in read] == ["00003-002.json"]
    assert (begun["state"], begun["attempt"], begun["latest"]["epoch"]) == ("done", 2, 3)
    assert (untouched["state"], untouched["latest"]) == ("unfinished", {})


def test_a_copied_folder_is_where_it_lies(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for kind, name in (("train", "job"), ("infer", "cube.zarr"), ("compact", "copy")):
        record(kind, str(old / name))
    shutil.copytree(old, new)
    found = {job.place: job.id for job in recorded_jobs(str(new), NO_OPTIONS)}
    assert found == {
        str(new / name): job_id(kind, str(new / name))
        for kind, name in (("train", "job"), ("infer", "cube.zarr"), ("compact", "copy"))
    }, "a scheduler may know the job of the old place"
    assert {job.place for job in hd.jobs(str(new))} == set(found)
    assert find_job(str(new / "cube.zarr"), NO_OPTIONS).id == found[str(new / "cube.zarr")]
    (tmp_path / "link").symlink_to(old)
    ids = {job.id for job in recorded_jobs(str(tmp_path / "link"), NO_OPTIONS)}
    assert ids == {job.id for job in recorded_jobs(str(old), NO_OPTIONS)}, "the same place by another name"
