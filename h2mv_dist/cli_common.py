"""What the commands share: the console, options, and how arguments become places."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from h2mv_dist.config import ClusterSettings, shared_place
from h2mv_dist.errors import ConfigError, describe

INTERRUPTED: Final = 130

console = Console()
errors = Console(stderr=True)


def place(param: typer.CallbackParam, value: str | None) -> str | None:
    """A URL or path among the arguments, as workers in other folders understand it."""
    try:
        return None if value is None else shared_place(value)
    except ConfigError as error:
        raise ConfigError(f"{param.opts[0]}: {error}") from None


Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override a setting: --set training.epochs=20. Can be repeated."),
]
Address = Annotated[
    str | None, typer.Option(help="Running Dask scheduler to use, instead of cluster.* in the settings.")
]
ClusterFile = Annotated[
    str | None, typer.Option("--settings", help="Settings file (TOML): its [cluster] and [storage_options].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def with_address(overrides: list[str] | None, address: str | None) -> list[str]:
    """Overrides that name a running scheduler, too."""
    extra = [] if address is None else ["cluster.kind=address", f"cluster.address={address}"]
    return [*(overrides or []), *extra]


def named_scheduler(settings: str | None, changes: list[str]) -> ClusterSettings:
    """Settings that name a running scheduler; no cluster is ever started for them.

    Raises:
        ConfigError: none is named.
    """
    if (found := scheduler_if_named(settings, changes)) is not None:
        return found
    raise ConfigError(
        describe(
            "no scheduler is named",
            where="the command line, the settings file and Dask's configuration",
            expected="the address or scheduler file of a running scheduler",
            actual="none",
            fix="give --address tcp://host:8786, or --settings FILE with cluster.address",
        )
    )


def scheduler_if_named(settings: str | None, changes: list[str]) -> ClusterSettings | None:
    """Settings that name a running scheduler, if they do."""
    from h2mv_dist.jobs.cluster import chosen_kind
    from h2mv_dist.jobs.configuration import load_cluster

    chosen = load_cluster(settings, changes)
    return chosen if chosen_kind(chosen) == "address" else None


def print_json(value: Mapping[str, Any] | list[Any]) -> None:
    """One document on standard output."""
    typer.echo(json.dumps(value, indent=2, default=str))
