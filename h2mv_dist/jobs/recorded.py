"""What the records of a job say, without any cluster: a status as a scheduler would give it (``Job.status``).

A unit is done if its own record says so, and ``failed`` or ``cancelled`` if the record of the last run does.
Of any other one nobody knows more than that it is ``unfinished``: whether the last run goes on, only its
scheduler can tell.
"""

import logging
import posixpath
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

from h2mv_dist.config import StorageOptions
from h2mv_dist.errors import JobError, StoreError, describe
from h2mv_dist.io.cube_store import read_cube
from h2mv_dist.io.folds import chosen_folds
from h2mv_dist.io.ledger import Ledger, gaps
from h2mv_dist.io.stores import Listing, displayed, exists, join, list_folder
from h2mv_dist.jobs.messages import job_id, kind_of
from h2mv_dist.jobs.records import FoldRecord, JobFolder
from h2mv_dist.jobs.run_record import RunRecord, read_record
from h2mv_dist.jobs.sweep import variants

_READERS: Final = 8
_RUN: Final = ".run.json"
_DATA: Final = (".zarr", ".ledger", ".states")
"""Endings of folders with many objects, none of which is a record of a run."""
_T = TypeVar("_T")

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RecordedJob:
    """A job as its records tell it.

    Attributes:
        id: of the job.
        place: URL of the folder or store it fills.
        run: record of its last run; None if none was ever submitted.
        options: of the store.
    """

    id: str
    place: str
    run: RunRecord | None
    options: StorageOptions

    def status(self) -> dict[str, Any]:
        """State of every unit, as ``Job.status`` gives it.

        Raises:
            StoreError: the records cannot be read.
        """
        run, units = self.run, self._units()
        if run is not None:
            units = _as_left_by(run, units)
        return {
            "id": self.id,
            "place": self.place,
            "submitted": run.submitted if run else None,
            "now": (run.ended if run else None) or 0.0,
            "finished": (run is not None and run.state != "running")
            or (run is None and all(unit["state"] == "done" for unit in units)),
            # as far as was written down, which it is not where a scheduler was lost
            "scheduler": run.scheduler if run is not None and run.state == "running" else "",
            "cancelled": run is not None and run.state == "cancelled",
            "units": units,
        }

    def _units(self) -> list[dict[str, Any]]:
        match kind_of(self.id):
            case "train":
                return _folds(self)
            case "prepare":
                # its own receipts are for stretches of days that only a plan knows
                assert self.run is not None, "nothing else told that there is such a job"
                state = "done" if self.run.state == "done" else "unfinished"
                return [_unit(name, state) for name in self.run.units]
            case _:
                return _tiles(self)


def _as_left_by(run: RunRecord, units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Units after the last run, which also knows errors of units that records know nothing of."""
    failed = run.failed if run.state == "failed" else {}
    known = {unit["name"] for unit in units}
    ends = [_unit(name, "unfinished", steps=0) for name in failed if name not in known]
    if run.state == "running":
        # whatever is done, nobody has written down that this was all
        ends.append(_unit("end", "unfinished", steps=0))
    return [_left_by(run, failed, unit) for unit in [*units, *ends]]


def _left_by(run: RunRecord, failed: Mapping[str, str], unit: dict[str, Any]) -> dict[str, Any]:
    if unit["name"] in failed:
        return {**unit, "state": "failed", "error": failed[unit["name"]]}
    return {**unit, "state": "cancelled"} if run.state == "cancelled" and unit["state"] != "done" else unit


def unreadable(name: str, place: str, reason: str) -> dict[str, Any]:
    """Stands for the status of a job whose records cannot be read, in a list of others."""
    unit = {**_unit(name, "failed", steps=0), "error": reason}
    return {
        "id": name,
        "place": place,
        "submitted": None,
        "now": 0.0,
        "finished": True,
        "cancelled": False,
        "units": [unit],
    }


def find_job(place: str, options: StorageOptions) -> RecordedJob:
    """The job that fills a folder or store.

    Args:
        place: URL, as it was given when the job was submitted.
        options: of its store.

    Raises:
        JobError: there is no job and no cube.
        StoreError: the records cannot be read.
    """
    if JobFolder(place, options).exists():
        run = RunRecord.read(job_id("train", place), place, options)
        return RecordedJob(run.id if run else job_id("train", place), place, run, options)
    # all but training jobs keep it at the same place
    run = RunRecord.read("infer", place, options)
    if run is None and not exists(join(place, "zarr.json"), options):
        raise JobError(
            describe(
                "there is no job",
                where=displayed(place),
                expected="the folder of a training job, or a store that a job filled",
                actual="neither",
                fix="give the URL that was given to --job or --cube; h2mv-dist jobs list FOLDER finds some",
            )
        )
    return RecordedJob(run.id if run else job_id("infer", place), place, run, options)


def recorded_jobs(folder: str, options: StorageOptions) -> tuple[RecordedJob, ...]:
    """Jobs whose record of a run lies below a folder, the last submitted last.

    What cannot be read, such as somebody else's ``run.json``, is left out with a warning.

    Raises:
        StoreError: the folder cannot be listed.
    """
    with ThreadPoolExecutor(_READERS, "h2mv-records") as pool:
        found = pool.map(_or_warn(lambda url: read_record(url, options)), _records(folder, options, pool))
        runs = sorted(filter(None, found), key=lambda run: run.submitted)
    return tuple(RecordedJob(run.id, run.place, run, options) for run in runs)


def _records(folder: str, options: StorageOptions, pool: ThreadPoolExecutor) -> Iterator[str]:
    """URLs of what are records of runs by their names, level by level, but not from within cubes and data."""
    level = [(folder, list_folder(folder, options))]
    while level:
        yield from (
            join(url, name) for url, found in level for name in found.objects if f".{name}".endswith(_RUN)
        )
        deeper = [join(url, name) for url, found in level for name in _worth_a_look(found)]
        listings = pool.map(_or_warn(lambda url: list_folder(url, options)), deeper)
        level = [(url, found) for url, found in zip(deeper, listings, strict=True) if found is not None]


def _worth_a_look(found: Listing) -> tuple[str, ...]:
    """Folders that may hold records of runs."""
    is_zarr = "zarr.json" in found.objects
    return () if is_zarr else tuple(name for name in found.folders if not name.endswith(_DATA))


def _or_warn(read: Callable[[str], _T]) -> Callable[[str], _T | None]:
    """Reads something, or says why it is left out."""

    def tried(url: str) -> _T | None:
        try:
            return read(url)
        except StoreError as error:
            _log.warning("left out of the list of jobs: %s", error)
            return None

    return tried


class RecordedFold(NamedTuple):
    """A unit of a training job: its name, its records, and the epochs it takes at most."""

    name: str
    record: FoldRecord
    epochs: int


def recorded_folds(job: RecordedJob) -> Iterator[RecordedFold]:
    """All folds of a training job, also those nobody has begun."""
    folder = JobFolder(job.place, job.options)
    for variant in variants(folder.settings()):
        run, epochs = folder.run(variant.name), variant.settings.training.epochs
        for fold in chosen_folds(variant.settings):
            yield RecordedFold(posixpath.join(variant.name, f"fold-{fold:02d}"), run.fold(fold), epochs)


def _folds(job: RecordedJob) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(_READERS, "h2mv-records") as pool:
        return list(pool.map(_fold, recorded_folds(job)))


def _fold(fold: RecordedFold) -> dict[str, Any]:
    done, (epochs, latest) = fold.record.done(), fold.record.reached()
    state = "done" if done is not None and done["epoch"] == epochs else "unfinished"
    return _unit(fold.name, state, fold.epochs, fold.record.state().attempt, latest)


def _tiles(job: RecordedJob) -> list[dict[str, Any]]:
    cube = read_cube(job.place, job.options)
    covered = Ledger(job.place, job.options, cube.progress.rollbacks).covered()
    missing = {
        tile.name: gaps(covered.get(tile.name, ()), cube.progress.intended) for tile in cube.layout.tiles
    }
    return [_unit(name, "unfinished" if left else "done") for name, left in missing.items()]


def _unit(
    name: str, state: str, steps: int = 1, attempt: int = 0, latest: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "name": name,
        "state": state,
        "steps": steps,
        "attempt": attempt,
        "workers": [],
        "error": "",
        "pause": 0.0,
        "latest": dict(latest or {}),
    }
