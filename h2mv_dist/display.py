"""Progress of a job in a terminal: a live table where there is one, plain lines where there is not."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from h2mv_dist.jobs.handle import Watcher

_COLOURS = {"running": "cyan", "done": "green", "failed": "red", "cancelled": "yellow"}


@contextmanager
def watching_folds(console: Console) -> Iterator[Watcher]:
    """Show every fold with its epoch and losses."""
    with _watching(console, _fold_table, _fold_line) as watch:
        yield watch


@contextmanager
def watching_tiles(console: Console) -> Iterator[Watcher]:
    """Show how many tiles, or stretches of days, are finished."""
    with _watching(console, _tile_table, None) as watch:
        yield watch


@contextmanager
def _watching(console: Console, table: Any, line: Any) -> Iterator[Watcher]:
    if not console.is_terminal:
        yield _Lines(console, line)
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield lambda status: live.update(table(status))


class _Lines:
    """Prints what changed, for logs."""

    def __init__(self, console: Console, line: Any) -> None:
        self.console, self.line = console, line
        self.seen: dict[str, str] = {}

    def __call__(self, status: Mapping[str, Any]) -> None:
        for unit in status["units"]:
            text = _state_text(unit) if self.line is None else self.line(unit)
            if self.seen.get(unit["name"]) != text:
                self.seen[unit["name"]] = text
                self.console.print(text, highlight=False, soft_wrap=True)


def _state_text(unit: Mapping[str, Any]) -> str:
    return f"{unit['name']}: {unit['state']}"


def _fold_line(unit: Mapping[str, Any]) -> str:
    latest = unit["latest"]
    if reason := _waits_for(unit):
        return f"{unit['name']}: waits, {reason}"
    if "epoch" not in latest:
        return _state_text(unit)
    return (
        f"{unit['name']}: {unit['state']}, epoch {latest['epoch']}, train {_number(latest['train_loss'])}, "
        f"validation {_number(latest['valid_loss'])}, best {_number(latest['best_loss'])}"
    )


def _waits_for(unit: Mapping[str, Any]) -> str:
    """Why a rank waits for room in its store, or a fold before it is tried again; "" if they do not."""
    if unit["state"] == "queued" and unit["pause"]:
        return str(unit["error"])
    waits = unit["state"] == "running" and unit["latest"].get("event") == "waiting"
    return str(unit["latest"]["reason"]) if waits else ""


def _fold_table(status: Mapping[str, Any]) -> Table:
    table = Table(title=f"training {status['id']}", title_justify="left")
    for column in ("fold", "state", "attempt", "epoch", "train", "validation", "best", "s / epoch"):
        table.add_column(column, justify="left" if column in ("fold", "state") else "right")
    for unit in status["units"]:
        latest = unit["latest"]
        losses = (_number(latest.get(k)) for k in ("train_loss", "valid_loss", "best_loss", "seconds"))
        reason = _waits_for(unit)
        state = reason.splitlines()[0] if reason else _state(unit["state"])
        table.add_row(unit["name"], state, str(unit["attempt"]), str(latest.get("epoch", "-")), *losses)
    return table


def _tile_table(status: Mapping[str, Any]) -> Table:
    states = [unit["state"] for unit in status["units"]]
    table = Table(title=status["id"], title_justify="left")
    for state in dict.fromkeys(("done", "running", *states)):
        table.add_column(_state(state), justify="right")
    table.add_row(*(str(states.count(s)) for s in dict.fromkeys(("done", "running", *states))))
    return table


def _state(state: str) -> str:
    colour = _COLOURS.get(state)
    return f"[{colour}]{state}[/]" if colour else state


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
