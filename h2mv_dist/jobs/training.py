"""The fold-training job: check everything that can be checked early, then submit one unit a fold."""

import hashlib
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A checked fold-training job; nothing was written for it yet.

    Attributes:
        settings: of the job.
        folder: where it is kept.
        folds: to train.
    """

    settings: Settings
    folder: JobFolder
    folds: tuple[int, ...]


def plan_training(settings: Settings, folder: str, options: StorageOptions) -> TrainingPlan:
    """Check everything that needs no cluster: folds, model, targets, data, and what the folder holds.

    Args:
        settings: validated settings.
        folder: URL of the job folder, reachable from every worker.
        options: storage options, never written anywhere.

    Raises:
        H2mvError: anything that can be found wrong before work starts.
    """
    folds = chosen_folds(settings)
    spec = model_kind(settings.model.name).spec
    targets = chosen_targets(spec, settings.training.targets)
    source = open_source(settings.data, forcing=spec.forcing, targets=targets, options=options)
    make_folds(source.grid, settings.folds)
    job = JobFolder(folder, options)
    job.require_same_job(settings)
    return TrainingPlan(settings, job, folds)


def start_training(client: Client, plan: TrainingPlan) -> JobHandle:
    """Submit one unit a fold; the folder is created, or resumed.

    Args:
        client: connected, with the coordinator installed.
        plan: what to do.

    Raises:
        JobError: the cluster is too small, or runs this job already.
    """
    training = plan.settings.training
    require_workers(client, training.ranks, "training.ranks")
    plan.folder.create(plan.settings)
    common = {
        "settings": to_json(plan.settings),
        "folder": plan.folder.url,
        "storage_options": plan.folder.options.reveal(),
    }
    units = tuple(
        Unit(f"fold-{fold:02d}", "fold", {"fold": fold}, ranks=training.ranks, attempts=training.attempts)
        for fold in plan.folds
    )
    return submit(client, Job(id=job_id("train", plan.folder.url), common=common, units=units))


def submit_training(client: Client, settings: Settings, folder: str, options: StorageOptions) -> JobHandle:
    """Plan and start training; see :func:`plan_training` and :func:`start_training`."""
    return start_training(client, plan_training(settings, folder, options))


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
