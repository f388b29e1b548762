"""How far a job is, from its status (see ``Job.status``): pure functions that every display shares."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from h2mv_dist.jobs.messages import kind_of

FOLD_COLUMNS: Final = ("fold", "state", "attempt", "epoch", "train", "validation", "best", "s / epoch")
PART_COLUMNS: Final = ("part", "state", "attempt", "worker", "days")
"""Of a unit that is no fold: a tile, some days, a shard."""
_LISTED: Final = 20
COUNTED: Final = {"train": "epochs", "infer": "tiles", "prepare": "stretches", "compact": "shards"}
"""Kind of job -> what it goes forward by."""
_OVER: Final = ("failed", "cancelled")


class Progress(NamedTuple):
    """How far a job is.

    Attributes:
        state: running, done, failed, cancelled, or unfinished, if nobody is at it as far as is known.
        units: state -> how many units are in it.
        counted: what it goes forward by, such as epochs.
        done: how many of them are done.
        total: how many there are at most; folds may stop earlier.
        rate: of them a second now; None if that is not known.
        seconds_left: at most; None if that is not known.
    """

    state: str
    units: Mapping[str, int]
    counted: str
    done: int
    total: int
    rate: float | None
    seconds_left: float | None


def progress_of(status: Mapping[str, Any]) -> Progress:
    """How far a job is.

    >>> def unit(state, **latest): return {"state": state, "steps": 10, "latest": latest}
    >>> units = [unit("running", epoch=4, seconds=2.0), unit("running", epoch=2, seconds=2.0)]
    >>> job = {"id": "train-1", "units": units, "finished": False, "cancelled": False}
    >>> progress_of({**job, "submitted": 0.0, "now": 60.0})[-4:]
    (6, 20, 1.0, 14.0)
    """
    units = status["units"]
    done = sum(map(_steps_done, units))
    undone = [unit for unit in units if unit["state"] != "done"]
    begun = sum(map(_share, units))
    left = sum(unit["steps"] - _steps_done(unit) for unit in undone if unit["state"] not in _OVER) - begun
    rate = None if status["finished"] else _rate(status, done + begun)
    return Progress(
        state=_state(status),
        units=Counter(unit["state"] for unit in units),
        counted=COUNTED[kind_of(status["id"])],
        done=done,
        total=done + sum(unit["steps"] - _steps_done(unit) for unit in undone),
        rate=rate,
        seconds_left=left / rate if rate else None,
    )


def _steps_done(unit: Mapping[str, Any]) -> int:
    if unit["steps"] <= 1:
        return unit["steps"] if unit["state"] == "done" else 0
    return int(unit["latest"].get("epoch", 0))


def _share(unit: Mapping[str, Any]) -> float:
    """Of a tile that runs: how much of it is computed.

    >>> _share({"state": "running", "latest": {"days": 90, "of": 360}})
    0.25
    """
    latest = unit["latest"]
    return float(latest["days"] / latest["of"]) if unit["state"] == "running" and "of" in latest else 0.0


def _rate(status: Mapping[str, Any], done: float) -> float | None:
    """Epochs of the folds that run now; of anything else, the mean since the job was submitted."""
    units: Sequence[Mapping[str, Any]] = status["units"]
    epochs = [float(unit["latest"]["seconds"]) for unit in units if _runs_epochs(unit)]
    if epochs:
        return sum(1 / max(seconds, 1e-3) for seconds in epochs)
    since = status["submitted"]
    if kind_of(status["id"]) == "train" or since is None or status["now"] <= since or not done:
        return None
    return float(done / (status["now"] - since))


def _runs_epochs(unit: Mapping[str, Any]) -> bool:
    return unit["state"] == "running" and unit["steps"] > 1 and "seconds" in unit["latest"]


def _state(status: Mapping[str, Any]) -> str:
    states = {unit["state"] for unit in status["units"]}
    if status["cancelled"]:
        return "cancelled"
    if "failed" in states and status["finished"]:
        return "failed"
    if "unfinished" in states:
        return "unfinished"
    return "done" if status["finished"] else "running"


def duration(seconds: float | None) -> str:
    """For people.

    >>> duration(42), duration(600), duration(7300), duration(200_000), duration(None)
    ('42 s', '10 min', '2 h 2 min', '2 d 7 h', '-')
    """
    if seconds is None:
        return "-"
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def speed(progress: Progress) -> str:
    """The rate for people; "" if it is not known.

    >>> speed(Progress("running", {}, "epochs", 1, 4, 0.5, 6.0))
    '30 epochs / min'
    """
    if progress.rate is None:
        return ""
    for per, name in ((60, "min"), (3600, "h")):
        if progress.rate * per >= 1:
            return f"{progress.rate * per:.3g} {progress.counted} / {name}"
    return f"{progress.rate * 86400:.3g} {progress.counted} / d"


def fold_cells(unit: Mapping[str, Any]) -> tuple[str, ...]:
    """A fold's row under ``FOLD_COLUMNS``."""
    latest = unit["latest"]
    reason = waits_for(unit)
    state = f"waits: {reason.splitlines()[0]}" if reason else str(unit["state"])
    losses = (number(latest.get(name)) for name in ("train_loss", "valid_loss", "best_loss", "seconds"))
    return (unit["name"], state, str(unit["attempt"]), str(latest.get("epoch", "-")), *losses)


def parts_under_way(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Units that run, or are to run again; the first ones of many."""
    begun = [
        u for u in status["units"] if u["state"] == "running" or (u["state"] == "queued" and u["attempt"])
    ]
    return begun[:_LISTED]


def part_cells(unit: Mapping[str, Any]) -> tuple[str, ...]:
    """A unit's row under ``PART_COLUMNS``.

    >>> unit = {"name": "0-4_0-6", "state": "running", "attempt": 1, "workers": ["tcp://10.0.0.7:40001"]}
    >>> part_cells({**unit, "latest": {"days": 720, "of": 7305}, "error": "", "pause": 0.0})
    ('0-4_0-6', 'running', '1', 'tcp://10.0.0.7:40001', '720 of 7305')
    """
    latest, reason = unit["latest"], waits_for(unit)
    state = f"waits: {reason.splitlines()[0]}" if reason else str(unit["state"])
    days = f"{latest['days']} of {latest['of']}" if "of" in latest else "-"
    return (unit["name"], state, str(unit["attempt"]), ", ".join(unit["workers"]), days)


def waits_for(unit: Mapping[str, Any]) -> str:
    """Why a rank waits for room in its store, or a fold before it is tried again; "" if they do not."""
    if unit["state"] == "queued" and unit["pause"]:
        return str(unit["error"])
    waits = unit["state"] == "running" and unit["latest"].get("event") == "waiting"
    return str(unit["latest"]["reason"]) if waits else ""


def number(value: float | None) -> str:
    """A loss or a duration.

    >>> number(0.12345), number(None)
    ('0.1235', '-')
    """
    return "-" if value is None else f"{value:.4f}"


def summary_of(error: str) -> str:
    r"""An error without its traceback: the last line of one, all of any other text.

    >>> summary_of("Traceback (most recent call last):\n  File ...\nValueError: no such cell\n")
    'ValueError: no such cell'
    >>> summary_of("two lines\nof ours")
    'two lines\nof ours'
    """
    text = error.strip()
    if not text.startswith("Traceback"):
        return text
    return next((line for line in reversed(text.splitlines()) if line[:1].strip()), text)
