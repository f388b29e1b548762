"""Job folders with models that nobody trained, so that inference can be measured by itself."""

from collections.abc import Sequence

from h2mv_dist.config import Settings, StorageOptions
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.model.base import ProcessModel
from h2mv_dist.model.checkpoint import Checkpoint, code_versions, model_tensors


def write_members(
    folder: str,
    settings: Settings,
    models: Sequence[ProcessModel],
    static_names: tuple[str, ...],
    options: StorageOptions,
) -> None:
    """Write one finished fold a model, as training would leave it."""
    job = JobFolder(folder, options)
    job.create(settings)
    for fold, model in enumerate(models):
        checkpoint = Checkpoint(
            model=settings.model,
            scaler=model.scaler,
            static_names=static_names,
            fold=fold,
            settings={},
            progress={},
            tensors=model_tensors(model),
            versions=code_versions(),
        )
        writer = job.fold(fold).claim(1, "benchmark")
        writer.write_epoch(1, {}, checkpoint, checkpoint, keep=False)
        writer.mark_done({})
