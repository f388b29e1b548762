"""The fold-training job: check everything that can be checked early, then submit one unit a fold."""

import posixpath
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from distributed import Client

from h2mv_dist.config import Settings, StorageOptions, shared_place, to_json
from h2mv_dist.errors import DataError, describe
from h2mv_dist.io.folds import chosen_folds, make_folds
from h2mv_dist.io.source import Source, open_source
from h2mv_dist.io.stores import displayed
from h2mv_dist.jobs.cluster import require_workers
from h2mv_dist.jobs.handle import JobHandle, submit
from h2mv_dist.jobs.messages import Job, Unit, job_id
from h2mv_dist.jobs.reach import require_shared
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.sweep import Variant, variants
from h2mv_dist.jobs.versions import require_same_versions
from h2mv_dist.model.registry import chosen_targets, model_kind
from h2mv_dist.spec import Scaler


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A checked fold-training job; nothing was written for it yet.

    Attributes:
        settings: of the job.
        folder: where it is kept.
        runs: one, or those of a sweep.
        data: cache key of what is read.
        scaler: published statistics, or None to fit them.
    """

    settings: Settings
    folder: JobFolder
    runs: tuple["Run", ...]
    data: str
    scaler: Scaler | None


@dataclass(frozen=True, slots=True)
class Run:
    """Folds trained with the same settings.

    Attributes:
        variant: the settings, and what distinguishes them from those of other runs.
        folder: where the run is kept; that of the job unless it is a sweep.
        attempts: for each fold to train, the number of its last attempt.
    """

    variant: Variant
    folder: JobFolder
    attempts: Mapping[int, int]

    def units(self) -> Iterator[Unit]:
        """One unit a fold."""
        training = self.variant.settings.training
        for fold, attempt in self.attempts.items():
            yield Unit(
                name=posixpath.join(self.variant.name, f"fold-{fold:02d}"),
                task="fold",
                spec={"fold": fold, "folder": self.folder.url, "settings": to_json(self.variant.settings)},
                ranks=training.ranks,
                attempts=training.attempts,
                steps=training.epochs,
                attempt=attempt,
            )


def plan_training(settings: Settings, folder: str, options: StorageOptions) -> TrainingPlan:
    """Check everything that needs no cluster: folds, model, targets, data, and what the folder holds.

    Forcing variables that end on different days are refused, unlike for inference, which uses the days they
    have in common: a fold that is resumed must not get another period because a variable was late.

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
    _require_even_days(source, settings.data.url)
    make_folds(source.grid, settings.folds)
    job = JobFolder(shared_place(folder), options)
    job.require_same_job(settings)
    return TrainingPlan(
        settings=settings,
        folder=job,
        runs=tuple(_run(variant, job.run(variant.name), folds) for variant in variants(settings)),
        data=source.cache_key,
        scaler=source.published_scaler() if settings.training.scaler == "published" else None,
    )


def _require_even_days(source: Source, url: str) -> None:
    if source.arrays.uneven:
        raise DataError(
            describe(
                "forcing variables have different days",
                where=displayed(url),
                expected="the same days of each, so that a fold always has the same period",
                actual=source.arrays.uneven,
                fix=f"set data.period, to the common days {source.period} for instance",
            )
        )


def start_training(client: Client, plan: TrainingPlan) -> JobHandle:
    """Submit one unit a fold, and one that writes the summary; the folder is created, or resumed.

    Args:
        client: connected, with the coordinator installed.
        plan: what to do.

    Raises:
        JobError: the cluster is too small, a host cannot see the folder, or the job runs already.
    """
    training, folder = plan.settings.training, plan.folder
    require_workers(client, training.ranks, "training.ranks")
    require_same_versions(client)
    token = require_shared(client, folder)
    folder.create(plan.settings)
    for run in plan.runs:
        run.folder.create(run.variant.settings)
    common = {
        # of the whole job; the units of a sweep have folders of their own
        "root": folder.url,
        "token": token,
        "folder": folder.url,
        "storage_options": folder.options.reveal(),
        "data": plan.data,
        "scaler": plan.scaler.as_dict() if plan.scaler is not None else None,
        "submitted": time.time(),
    }
    job = Job(
        id=job_id("train", folder.url),
        place=folder.url,
        common=common,
        units=tuple(unit for run in plan.runs for unit in run.units()),
        final=Unit("summary", "summary", {}, steps=0),
        always_final=True,
        priority=training.priority,
    )
    return submit(client, job)


def submit_training(client: Client, settings: Settings, folder: str, options: StorageOptions) -> JobHandle:
    """Plan and start training; see :func:`plan_training` and :func:`start_training`."""
    return start_training(client, plan_training(settings, folder, options))


def _run(variant: Variant, folder: JobFolder, folds: tuple[int, ...]) -> Run:
    folder.require_same_job(variant.settings)
    return Run(variant, folder, {fold: state.attempt for fold, state in folder.states(folds).items()})
