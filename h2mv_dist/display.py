"""Progress of a job in a terminal: a live table where there is one, plain lines where there is not."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from h2mv_dist.jobs.handle import Watcher
from h2mv_dist.jobs.messages import kind_of
from h2mv_dist.jobs.progress import (
    FOLD_COLUMNS,
    PART_COLUMNS,
    duration,
    fold_cells,
    number,
    part_cells,
    parts_under_way,
    progress_of,
    speed,
    waits_for,
)

_COLOURS = {"running": "cyan", "done": "green", "failed": "red", "cancelled": "yellow"}


@contextmanager
def watching(console: Console) -> Iterator[Watcher]:
    """Show every fold with its epoch and losses, or each tile, or stretch of days, that is under way."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield lambda status: live.update(table_of(status))


def table_of(status: Mapping[str, Any]) -> Table:
    """A job by its status."""
    return _fold_table(status) if kind_of(status["id"]) == "train" else _tile_table(status)


class _Lines:
    """Prints what changed, for logs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seen: dict[str, str] = {}

    def __call__(self, status: Mapping[str, Any]) -> None:
        for unit in status["units"]:
            text = _line(unit)
            if self.seen.get(unit["name"]) != text:
                self.seen[unit["name"]] = text
                self.console.print(text, highlight=False, soft_wrap=True)


def _state_text(unit: Mapping[str, Any]) -> str:
    return f"{unit['name']}: {unit['state']}"


def _line(unit: Mapping[str, Any]) -> str:
    latest = unit["latest"]
    if reason := waits_for(unit):
        return f"{unit['name']}: waits, {reason}"
    if "epoch" not in latest:
        return _state_text(unit)
    train, valid, best = (number(latest.get(name)) for name in ("train_loss", "valid_loss", "best_loss"))
    return f"{_state_text(unit)}, epoch {latest['epoch']}, train {train}, validation {valid}, best {best}"


def _fold_table(status: Mapping[str, Any]) -> Table:
    table = Table(title=_title(status), title_justify="left")
    for column in FOLD_COLUMNS:
        table.add_column(column, justify="left" if column in ("fold", "state") else "right")
    for unit in status["units"]:
        name, state, *rest = map(escape, fold_cells(unit))
        table.add_row(name, _state(state), *rest)
    return table


def _title(status: Mapping[str, Any]) -> str:
    """What it is, how fast it goes on, and how long that takes at most."""
    progress = progress_of(status)
    told = f"{status['id']}: {progress.done} of {progress.total} {progress.counted}"
    if rate := speed(progress):
        told += f", {rate}, {duration(progress.seconds_left)} left"
        told += " at most" if progress.counted == "epochs" else ""
    return told


def _tile_table(status: Mapping[str, Any]) -> Table:
    states = [unit["state"] for unit in status["units"]]
    title = _title(status)
    counted = (
        f"{states.count(state)} {_state(state)}" for state in dict.fromkeys(("done", "running", *states))
    )
    table = Table(
        title=title,
        title_justify="left",
        min_width=len(title),
        caption=", ".join(counted),
        caption_justify="left",
    )
    for column in PART_COLUMNS:
        table.add_column(column, justify="left" if column in ("part", "state", "worker") else "right")
    for unit in parts_under_way(status):
        name, state, *rest = map(escape, part_cells(unit))
        table.add_row(name, _state(state), *rest)
    return table


def _state(state: str) -> str:
    colour = _COLOURS.get(state)
    return f"[{colour}]{state}[/]" if colour else state
