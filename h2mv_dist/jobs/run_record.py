"""How the last run of a job goes, or went: an object beside what it fills, to be read without a cluster.

``JOB/run.json`` for training, ``STORE.run.json`` for a cube, a copy of one, or a prepared store. The client
that submits a job writes it, and when the job ends the coordinator has a worker write it again. What counts
for going on are the other records; this one only tells.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Final, Literal

from pydantic import Field, TypeAdapter

from h2mv_dist.config import StorageOptions, canonical_json
from h2mv_dist.io.documents import checked
from h2mv_dist.io.stores import exists, get_object, join, put_object, resolved
from h2mv_dist.jobs.messages import ID, job_id, kind_of

RunState = Literal["running", "done", "failed", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run of a job.

    Attributes:
        id: of the job.
        run: a word that no other run of the job has.
        place: URL of the folder or store it fills.
        scheduler: address of the scheduler it was submitted to.
        submitted: seconds since 1970.
        units: names of what it consists of.
        state: ``running`` until it has ended, and for ever if its scheduler was lost.
        ended: seconds since 1970.
        failed: name of a unit -> its error.
    """

    id: Annotated[str, Field(pattern=ID)]
    run: str
    place: str
    scheduler: str
    submitted: float
    units: tuple[str, ...]
    state: RunState = "running"
    ended: float | None = None
    failed: Mapping[str, str] = field(default_factory=dict)

    def write(self, options: StorageOptions) -> None:
        """Put it beside what the job fills."""
        put_object(run_url(self.id, self.place), canonical_json(asdict(self)).encode(), options)

    @staticmethod
    def read(job: str, place: str, options: StorageOptions) -> "RunRecord | None":
        """The record of the last run, if there was one.

        Raises:
            StoreError: it cannot be read.
        """
        url = run_url(job, place)
        return read_record(url, options) if exists(url, options) else None


_RECORD: Final = TypeAdapter(RunRecord)


def read_record(url: str, options: StorageOptions) -> RunRecord:
    """The record at a URL; what it speaks of is beside it, also if both were moved or copied.

    Raises:
        StoreError: there is none, or it is something else.
    """
    record = checked(_RECORD, get_object(url, options), url)
    there = resolved(run_url(record.id, record.place)) == resolved(url)
    return record if there else _moved(record, url)


def _moved(record: RunRecord, url: str) -> RunRecord:
    """A record that lies elsewhere than it was written; the scheduler may know another job of its id."""
    kind = kind_of(record.id)
    if kind == "train":
        place = url.removesuffix("/run.json")
    else:
        ending = ".zarr" if record.place.rstrip("/").endswith(".zarr") else ""
        place = url.removesuffix(".run.json") + ending
    return replace(record, id=job_id(kind, place), place=place)


def run_url(job: str, place: str) -> str:
    """Where the record of a job is kept.

    >>> run_url("train-1", "s3://bucket/job"), run_url("infer-1", "s3://bucket/cube.zarr/")
    ('s3://bucket/job/run.json', 's3://bucket/cube.run.json')
    """
    if kind_of(job) == "train":
        return join(place, "run.json")
    return place.rstrip("/").removesuffix(".zarr") + ".run.json"


def end_run(message: Mapping[str, Any]) -> None:
    """On a worker, when a job has ended: complete its record, unless a newer run has one.

    Args:
        message: ``record`` (of :class:`RunRecord`) and ``storage_options``.
    """
    ended, options = _RECORD.validate_python(message["record"]), StorageOptions(message["storage_options"])
    found = RunRecord.read(ended.id, ended.place, options)
    if found is None or found.run == ended.run:
        ended.write(options)
