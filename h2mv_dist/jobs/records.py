"""What a training job leaves in its folder (any URL).

    job.json                       settings; written when the job is created, replaced when it is resumed
    token.json                     read back by every host before anything starts
    summary.csv                    one line a fold; written at the end
    folds/NN/state.json            which attempt owns the fold, and its newest checkpoints
    folds/NN/checkpoints/E-A-KIND.safetensors   epoch E, attempt A; best: weights, last: all a resume needs
    folds/NN/metrics/E-A.json      numbers of an epoch
    folds/NN/decisions.json        what defaults and probes decided; a resume does the same
    folds/NN/attempts/A/rank-R.json   who ran the rank where and when, its first step, and how it ended
    folds/NN/attempts/A/rank-R.log    what it printed
    folds/NN/done.json             present when the fold is finished
    run.json                       how the last run went, see jobs/run_record.py
    runs/NAME/...                  the same again for each run of a sweep

A job can be resumed from its folder alone. Credentials are never in it.

Every object that an attempt writes carries the attempt's number, and only ``state.json`` says which of them
count. It is moved by compare-and-swap, so an attempt that was thought dead and wakes up changes nothing.
"""

import re
import secrets
import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter, with_config

from h2mv_dist.config import Settings, StorageOptions, canonical_json, to_json, validate
from h2mv_dist.errors import JobError, StoreError, describe
from h2mv_dist.io import stores
from h2mv_dist.io.documents import checked, parsed

if TYPE_CHECKING:
    from h2mv_dist.model.checkpoint import Checkpoint

Which = Literal["best", "last"]

_STATE: Final = "state.json"
_TOKEN: Final = "token.json"
_READERS: Final = 8
UNFINISHED_SECONDS: Final = 86_400.0
"""Age at which nobody is writing a file any more."""
_CHECKPOINT: Final = re.compile(r"\d+-(\d+)-\w+\.safetensors", re.ASCII)
_METRICS: Final = re.compile(r"(\d{1,9})-\d+\.json", re.ASCII)
_FOLD_STATE: Final = re.compile(r"(\d{2,9})/state\.json", re.ASCII)
CheckpointName = Annotated[str, Field(pattern=r"^([0-9]+-[0-9]+-[a-z]+\.safetensors)?$")]
"""What :class:`FoldWriter` calls a checkpoint, or "" for none: what is named so is read, and deleted."""


@with_config(ConfigDict(strict=True, extra="forbid"))
@dataclass(frozen=True, slots=True)
class FoldState:
    """The pointer of a fold.

    Attributes:
        attempt: number of the attempt that owns the fold.
        gang: unique name of that attempt.
        epoch: epochs that are complete.
        best: name of the best checkpoint; "" before the first epoch is complete.
        last: name of the checkpoint a resume starts from.
        kept: names of checkpoints to keep for ever.
    """

    attempt: NonNegativeInt = 0
    gang: str = ""
    epoch: NonNegativeInt = 0
    best: CheckpointName = ""
    last: CheckpointName = ""
    kept: tuple[CheckpointName, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """All checkpoints that count."""
        return frozenset({self.best, self.last, *self.kept}) - {""}

    def to_bytes(self) -> bytes:
        """As stored."""
        return canonical_json(asdict(self)).encode()

    @staticmethod
    def from_bytes(data: bytes, url: str) -> "FoldState":
        """Inverse of :meth:`to_bytes`.

        Raises:
            StoreError: the object at ``url`` is no pointer of a fold.
        """
        return checked(_POINTER, data, url)


_POINTER: Final = TypeAdapter(FoldState)


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """What is kept of one attempt at a fold."""

    url: str
    options: StorageOptions

    def write_rank(self, rank: int, record: Mapping[str, Any]) -> None:
        """Who runs a rank; written again when it has ended."""
        _write_json(stores.join(self.url, f"rank-{rank}.json"), record, self.options)

    def write_log(self, rank: int, text: bytes) -> None:
        """What a rank printed, if anything."""
        if text:
            stores.put_object(self._log(rank), text, self.options)

    def log(self, rank: int) -> bytes:
        """What a rank printed that has ended; nothing if it printed nothing."""
        there = stores.exists(self._log(rank), self.options)
        return stores.get_object(self._log(rank), self.options) if there else b""

    def _log(self, rank: int) -> str:
        return stores.join(self.url, f"rank-{rank}.log")


@dataclass(frozen=True, slots=True)
class FoldRecord:
    """The part of a job folder that belongs to one fold."""

    url: str
    options: StorageOptions

    def state(self) -> FoldState:
        """The pointer; that of an untouched fold if there is none yet."""
        found = stores.get_versioned(self.path(_STATE), self.options)
        return FoldState() if found is None else FoldState.from_bytes(found.data, self.path(_STATE))

    def claim(self, attempt: int, gang: str) -> "FoldWriter":
        """Take the fold over, from where its last checkpoint is; older attempts cannot write any more.

        Raises:
            JobError: a newer attempt owns it.
        """
        while True:
            found = stores.get_versioned(self.path(_STATE), self.options)
            state = FoldState() if found is None else FoldState.from_bytes(found.data, self.path(_STATE))
            if state.attempt >= attempt:
                raise _superseded(self.url, attempt, state)
            state = replace(state, attempt=attempt, gang=gang)
            expected = found.version if found is not None else None
            version = stores.swap_object(self.path(_STATE), state.to_bytes(), expected, self.options)
            if version is not None:
                writer = FoldWriter(self, state, version)
                writer.delete_unused()
                stores.delete_unfinished(self.url, self.options, UNFINISHED_SECONDS)
                return writer

    def has_checkpoint(self, which: Which) -> bool:
        """Whether such a checkpoint was written."""
        return bool(getattr(self.state(), which))

    def checkpoint_bytes(self, which: Which) -> bytes:
        """The object as stored.

        Raises:
            StoreError: there is none.
        """
        return stores.get_object(self._checkpoint_path(which), self.options)

    def read_checkpoint(self, which: Which) -> "Checkpoint":
        """The best or last checkpoint.

        Raises:
            StoreError: there is none.
            CheckpointError: it is damaged or foreign.
        """
        path = self._checkpoint_path(which)
        from h2mv_dist.model.checkpoint import Checkpoint

        return Checkpoint.from_bytes(stores.get_object(path, self.options), path)

    def metrics(self) -> list[dict[str, Any]]:
        """The numbers of all complete epochs, in order; of each epoch, those of its newest attempt."""
        return _read_all(self._metrics_urls(), self.options)

    def reached(self) -> tuple[int, dict[str, Any]]:
        """How many epochs are complete, and the numbers of the last one, which alone are read."""
        urls = self._metrics_urls()
        latest = _read_all(urls[-1:], self.options)
        return len(urls), latest[0] if latest else {}

    def _metrics_urls(self) -> list[str]:
        folder, epochs = self.path("metrics"), self.state().epoch
        matches = map(_METRICS.fullmatch, stores.list_objects(folder, self.options))
        newest = {int(match[1]): match.string for match in matches if match is not None}
        return [stores.join(folder, newest[e]) for e in sorted(newest) if e <= epochs]

    def attempt(self, number: int) -> AttemptRecord:
        """What is kept of an attempt."""
        return AttemptRecord(self.path(f"attempts/{number:03d}"), self.options)

    def attempts(self) -> list[dict[str, Any]]:
        """Every rank of every attempt, as its supervisor saw it."""
        folder = self.path("attempts")
        names = [n for n in stores.list_objects(folder, self.options) if n.endswith(".json")]
        return _read_all([stores.join(folder, n) for n in names], self.options)

    def decisions(self) -> dict[str, Any] | None:
        """What the first attempt decided, if there was one."""
        return _read_json(self.path("decisions.json"), self.options)

    def settle(self, decisions: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what was decided, before the first step; returns what counts, which is what was first."""
        data = canonical_json({**decisions, "writer": secrets.token_hex(4)}).encode()
        stores.swap_object(self.path("decisions.json"), data, None, self.options)
        settled = self.decisions()
        assert settled is not None, "it is there, whoever wrote it"
        return settled

    def done(self) -> dict[str, Any] | None:
        """The summary of the last run that finished the fold."""
        return _read_json(self.path("done.json"), self.options)

    def path(self, name: str) -> str:
        """URL of an object of the fold."""
        return stores.join(self.url, *name.split("/"))

    def checkpoint_path(self, name: str) -> str:
        """URL of a checkpoint."""
        return self.path(f"checkpoints/{name}")

    def _checkpoint_path(self, which: Which) -> str:
        name = getattr(self.state(), which)
        if not name:
            raise StoreError(
                describe(
                    f"there is no {which} checkpoint yet",
                    where=self.url,
                    expected="a fold that was trained for an epoch at least",
                    actual="none",
                    fix="train it first",
                )
            )
        return self.checkpoint_path(name)


class FoldWriter:
    """The right of one attempt to write to a fold; only its rank 0 has it."""

    def __init__(self, record: FoldRecord, state: FoldState, version: str) -> None:
        self.record, self.state, self.version = record, state, version

    def write_epoch(
        self,
        epoch: int,
        metrics: Mapping[str, Any],
        last: "Checkpoint",
        best: "Checkpoint | None",
        keep: bool,
    ) -> None:
        """Store a complete epoch: its objects first, then the pointer, which makes all of them count at once.

        Args:
            epoch: from 1.
            metrics: its numbers.
            last: what a resume starts from.
            best: if the epoch was the best so far.
            keep: keep the last checkpoint for ever.

        Raises:
            JobError: a newer attempt owns the fold; nothing of it was changed.
        """
        attempt = f"{self.state.attempt:03d}"
        _write_json(self.record.path(f"metrics/{epoch:05d}-{attempt}.json"), metrics, self.record.options)
        state = replace(self.state, epoch=epoch, last=self._write(last, "last", epoch))
        if best is not None:
            state = replace(state, best=self._write(best, "best", epoch))
        if keep:
            state = replace(state, kept=(*state.kept, state.last))
        self._move(state)

    def write_within_epoch(self, epoch: int, last: "Checkpoint") -> None:
        """Store what a resume needs to go on within an epoch, of which ``epoch`` are complete."""
        self._move(replace(self.state, last=self._write(last, "part", epoch)))

    def mark_done(self, summary: Mapping[str, Any]) -> None:
        """Say that the fold is finished, and clear away what attempts left that were thought dead.

        Raises:
            JobError: a newer attempt has said so; nothing was changed.
        """
        url, options = self.record.path("done.json"), self.record.options
        data = canonical_json({**summary, "attempt": self.state.attempt}).encode()
        swapped = None
        while swapped is None:
            found = stores.get_versioned(url, options)
            if found is not None and parsed(found.data, url).get("attempt", 0) > self.state.attempt:
                raise _superseded(self.record.url, self.state.attempt, self.record.state())
            swapped = stores.swap_object(url, data, found.version if found is not None else None, options)
        self.delete_unused()

    def delete_unused(self) -> None:
        """Delete what older attempts left; a newer one, of which this one may not know yet, keeps its own."""
        found = stores.list_objects(self.record.path("checkpoints"), self.record.options)
        older = (name for name in found if _is_older(name, self.state.attempt))
        self._delete(name for name in older if name not in self.state.names)

    def _write(self, checkpoint: "Checkpoint", kind: str, epoch: int) -> str:
        name = f"{epoch:05d}-{self.state.attempt:03d}-{kind}.safetensors"
        stores.put_object(self.record.checkpoint_path(name), checkpoint.to_bytes(), self.record.options)
        return name

    def _move(self, state: FoldState) -> None:
        url = self.record.path(_STATE)
        version = stores.swap_object(url, state.to_bytes(), self.version, self.record.options)
        if version is None:
            # Nothing is deleted: if only the answer was lost, a newer attempt goes on from these very names.
            raise _superseded(self.record.url, self.state.attempt, self.record.state())
        unused = self.state.names - state.names
        self.state, self.version = state, version
        self._delete(unused)

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            stores.delete_tree(self.record.checkpoint_path(name), self.record.options)


def _is_older(name: str, attempt: int) -> bool:
    """Whether a checkpoint was written by an attempt before this one; False for what is no checkpoint.

    >>> _is_older("00003-002-last.safetensors", 3), _is_older("00003-003-last.safetensors", 3)
    (True, False)
    """
    number = _CHECKPOINT.fullmatch(name)
    return number is not None and int(number[1]) < attempt


def _superseded(url: str, attempt: int, state: FoldState) -> JobError:
    return JobError(
        describe(
            "another attempt owns the fold",
            where=url,
            expected=f"an attempt before {attempt}",
            actual=f"attempt {state.attempt} ({state.gang})",
            fix="nothing, if the job runs elsewhere or was resumed; this attempt changed nothing",
        )
    )


def _read_all(urls: Iterable[str], options: StorageOptions) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(_READERS, "h2mv-records") as pool:
        return list(pool.map(lambda url: parsed(stores.get_object(url, options), url), urls))


def _read_json(url: str, options: StorageOptions) -> dict[str, Any] | None:
    if not stores.exists(url, options):
        return None
    return parsed(stores.get_object(url, options), url)


def _write_json(url: str, record: Mapping[str, Any], options: StorageOptions) -> None:
    stores.put_object(url, canonical_json(record).encode(), options)


@dataclass(frozen=True, slots=True)
class _JobRecord:
    kind: Literal["train"]
    settings: dict[str, Any]


_JOB: Final = TypeAdapter(_JobRecord)


@dataclass(frozen=True, slots=True)
class JobFolder:
    """A training job's folder."""

    url: str
    options: StorageOptions

    def create(self, settings: Settings) -> None:
        """Write ``job.json``; a job that is there is resumed.

        Raises:
            JobError: see :meth:`require_same_job`.
        """
        self.require_same_job(settings)
        record = {"kind": "train", "settings": to_json(settings)}
        _write_json(stores.join(self.url, "job.json"), record, self.options)

    def require_same_job(self, settings: Settings) -> None:
        """Check that the folder is free, or that its job may go on with these settings.

        Raises:
            JobError: the folder holds a job whose numbers would differ.
        """
        if self.exists():
            _require_same_job(self.settings(), settings, self.url)

    def write_token(self) -> str:
        """Put a word here that only who sees this very folder can know; one that is there stays."""
        if (found := self.token()) is None:
            found = secrets.token_hex(8)
            _write_json(stores.join(self.url, _TOKEN), {"token": found}, self.options)
        return found

    def token(self) -> str | None:
        """The word, or None if it is not here."""
        record = _read_json(stores.join(self.url, _TOKEN), self.options)
        return None if record is None else str(record.get("token"))

    def require_token(self, expected: str) -> None:
        """Check that this host sees the folder the job was submitted with, and not another one of that name.

        Raises:
            JobError: there is another word here, or none.
        """
        found = self.token()
        if found != expected:
            raise JobError(
                describe(
                    "this host does not see the job folder",
                    where=f"{stores.displayed(self.url)} on {socket.gethostname()}",
                    expected=f"the token {expected}, which was written when the job was submitted",
                    actual=found or "no token there",
                    fix="use an object store, or a path on a file system that all hosts share",
                )
            )

    def exists(self) -> bool:
        """Whether a job was created here."""
        return stores.exists(stores.join(self.url, "job.json"), self.options)

    def settings(self) -> Settings:
        """The settings the job runs with.

        Raises:
            StoreError: there is no job here.
        """
        path = stores.join(self.url, "job.json")
        return validate(checked(_JOB, stores.get_object(path, self.options), path).settings, where=path)

    def run(self, name: str) -> "JobFolder":
        """The folder of a run of a sweep; this one for the only run of a job without a sweep."""
        return JobFolder(stores.join(self.url, "runs", name), self.options) if name else self

    def fold(self, index: int) -> FoldRecord:
        """The records of one fold."""
        return FoldRecord(stores.join(self.url, "folds", f"{index:02d}"), self.options)

    def states(self, folds: Iterable[int]) -> dict[int, FoldState]:
        """The pointer of each fold."""
        wanted = tuple(folds)
        with ThreadPoolExecutor(_READERS, "h2mv-records") as pool:
            return dict(zip(wanted, pool.map(lambda f: self.fold(f).state(), wanted), strict=True))

    def begun_folds(self) -> tuple[int, ...]:
        """Folds that any attempt has claimed."""
        names = stores.list_objects(stores.join(self.url, "folds"), self.options)
        return tuple(sorted(int(match[1]) for match in map(_FOLD_STATE.fullmatch, names) if match))

    def trained_folds(self) -> tuple[int, ...]:
        """Folds that have a best checkpoint."""
        return tuple(fold for fold, state in self.states(self.begun_folds()).items() if state.best)


def _require_same_job(found: Settings, wanted: Settings, url: str) -> None:
    """A resumed job may train longer, on other folds or hardware, but not on other numbers."""
    before, after = _identity(found), _identity(wanted)
    changed = sorted(key for key in after if before.get(key) != after[key])
    if changed:
        raise JobError(
            describe(
                "the job folder holds a job with other settings",
                where=url,
                expected="; ".join(f"{k} = {before.get(k)}" for k in changed),
                actual="; ".join(f"{k} = {after[k]}" for k in changed),
                fix="choose another folder for the new job, or restore the settings to resume this one",
            )
        )


def _identity(settings: Settings) -> dict[str, Any]:
    tree = to_json(settings)
    sections = {"training": settings.training.identity()} | {k: tree[k] for k in ("data", "folds", "model")}
    return {f"{s}.{key}": value for s, section in sections.items() for key, value in section.items()}
