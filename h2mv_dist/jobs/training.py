"""The fold-training job: check everything that can be checked early, then submit one unit a fold."""

import hashlib

from distributed import Client

from h2mv_dist.config import Settings, StorageOptions, to_json
from h2mv_dist.errors import ConfigError
from h2mv_dist.io.folds import make_folds
from h2mv_dist.io.source import open_source
from h2mv_dist.jobs.cluster import require_workers
from h2mv_dist.jobs.handle import JobHandle, submit
from h2mv_dist.jobs.messages import Job, Unit
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.model.registry import chosen_targets, model_kind


def submit_training(client: Client, settings: Settings, folder: str, options: StorageOptions) -> JobHandle:
    """Train the folds of ``settings`` on the client's cluster; resumes what the folder already holds.

    Args:
        client: connected, with the coordinator installed.
        settings: validated settings.
        folder: URL of the job folder, reachable from every worker.
        options: storage options, never written anywhere.

    Raises:
        H2mvError: anything that can be found wrong before work starts.
    """
    require_workers(client, settings.training.ranks, "training.ranks")
    folds = chosen_folds(settings)
    spec = model_kind(settings.model.name).spec
    targets = chosen_targets(spec, settings.training.targets)
    source = open_source(settings.data, forcing=spec.forcing, targets=targets, options=options)
    make_folds(source.grid, settings.folds)
    JobFolder(folder, options).create(settings)
    common = {"settings": to_json(settings), "folder": folder, "storage_options": options.reveal()}
    units = tuple(
        Unit(
            name=f"fold-{fold:02d}",
            task="fold",
            spec={"fold": fold},
            ranks=settings.training.ranks,
            attempts=settings.training.attempts,
        )
        for fold in folds
    )
    return submit(client, Job(id=job_id("train", folder), common=common, units=units))


def chosen_folds(settings: Settings) -> tuple[int, ...]:
    """The folds to train.

    Raises:
        ConfigError: a fold that the settings do not define.
    """
    count = settings.folds.count
    folds = settings.training.folds if settings.training.folds is not None else tuple(range(count))
    unknown = [fold for fold in folds if not 0 <= fold < count]
    if unknown or not folds:
        raise ConfigError(
            f"training.folds = {list(folds)}: expected fold numbers from 0 to {count - 1}, at least one"
        )
    return folds


def job_id(kind: str, url: str) -> str:
    """One place, one job: the same folder or cube always gives the same id.

    >>> job_id("train", "s3://bucket/job")
    'train-32564751'
    """
    return f"{kind}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
