"""Distributed training and global inference of hybrid (physics + LSTM) land models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from h2mv_dist.version import __version__

if TYPE_CHECKING:
    from h2mv_dist.jobs.local import run as run
    from h2mv_dist.notebook import connect as connect
    from h2mv_dist.notebook import disconnect as disconnect
    from h2mv_dist.notebook import infer as infer
    from h2mv_dist.notebook import job as job
    from h2mv_dist.notebook import jobs as jobs
    from h2mv_dist.notebook import train as train

__all__ = ["__version__", "connect", "disconnect", "infer", "job", "jobs", "run", "train"]

_PLACES: Final = dict.fromkeys(("connect", "disconnect", "infer", "job", "train"), "h2mv_dist.notebook")
_PLACES["run"] = "h2mv_dist.jobs.local"


def __getattr__(name: str) -> Any:
    """What users call, imported when it is first used: torch and Dask take seconds."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if name == "jobs":
        return import_module("h2mv_dist.jobs")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
