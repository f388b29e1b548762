"""Distributed training and global inference of hybrid (physics + LSTM) land models."""

from typing import TYPE_CHECKING, Any

from h2mv_dist.version import __version__

if TYPE_CHECKING:
    from h2mv_dist.jobs.local import run as run

__all__ = ["__version__", "run"]


def __getattr__(name: str) -> Any:
    """``h2mv_dist.run``, imported when it is first used: torch and Dask take seconds."""
    if name == "run":
        from h2mv_dist.jobs.local import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
