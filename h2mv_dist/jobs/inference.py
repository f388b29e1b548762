"""The global-inference job: plan a cube, create it, then submit one unit a tile that has no receipt yet.

``plan_inference`` gives client and workers the same :class:`CubePlan` from the same settings, so that both
agree on the cube's geometry without sending it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import dask.utils
from distributed import Client

from h2mv_dist.config import Settings, StorageOptions, canonical_json, to_json, validate
from h2mv_dist.errors import CheckpointError, ConfigError, JobError, describe
from h2mv_dist.grid import Period, Tile
from h2mv_dist.io import sink
from h2mv_dist.io.ledger import Ledger
from h2mv_dist.io.source import Source, open_source
from h2mv_dist.jobs.cluster import require_workers
from h2mv_dist.jobs.handle import JobHandle, submit
from h2mv_dist.jobs.messages import Job, Unit
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.training import job_id
from h2mv_dist.model.checkpoint import Checkpoint, checksum, code_versions
from h2mv_dist.model.registry import model_kind
from h2mv_dist.spec import ModelSpec
from h2mv_dist.variables import nearest

FINISH_UNIT: Final = "finish"
FLOAT_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class CubePlan:
    """Everything that client and workers must agree on.

    Attributes:
        settings: of the job; model and data count, not the cluster.
        source: opened forcing and static features.
        spec: columns of the model.
        checkpoints: one a member, in the order of ``layout.members``.
        layout: of the cube.
        period: days to simulate.
        baseline: days whose mean anomalies refer to.
        spinup: days run first, or None for no spin-up.
    """

    settings: Settings
    source: Source
    spec: ModelSpec
    checkpoints: tuple[Checkpoint, ...]
    layout: sink.CubeLayout
    period: Period
    baseline: Period
    spinup: Period | None

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Tiles with land, in order."""
        return self.source.grid.land_tiles(self.settings.inference.tile)

    def tile_bytes(self) -> int:
        """Projected peak of the arrays a worker holds for one tile, bytes.

        Forcing of the tile, the gates of one time block, and that block's outputs twice: computed, and being
        written.
        """
        cells, days = self._largest_tile(), self.layout.shard_days
        hidden = self.settings.model.hidden
        forcing = cells * self.period.n_days * len(self.spec.forcing)
        gates = cells * days * 4 * hidden
        outputs = cells * days * len(self.spec.daily)
        written = 2 * cells * days * len(self.layout.daily) * len(self.layout.members)
        return FLOAT_BYTES * (forcing + gates + outputs + written)

    def _largest_tile(self) -> int:
        mask = self.source.grid.mask
        return max(int(mask[tile.slices].sum()) for tile in self.tiles)


def plan_inference(settings: Settings, training_folder: str, options: StorageOptions) -> CubePlan:
    """Read what a cube needs and lay it out; nothing is written.

    Args:
        settings: data, model and inference settings.
        training_folder: job folder with the trained folds.
        options: storage options.

    Raises:
        H2mvError: anything that does not fit together.
    """
    spec = model_kind(settings.model.name).spec
    checkpoints, checksums = _read_members(settings, training_folder, options)
    source = open_source(settings.data, forcing=spec.forcing, targets=(), options=options)
    _check_static(checkpoints, source, settings.data.url)
    period = _within(settings.inference.period, source.period, "inference.period")
    baseline = _within(settings.inference.baseline, period, "inference.baseline")
    layout = _layout(settings, source, spec, checksums, period, baseline)
    spinup = _spinup(settings, period)
    return CubePlan(settings, source, spec, checkpoints, layout, period, baseline, spinup)


def start_inference(
    client: Client, planned: CubePlan, training_folder: str, cube: str, options: StorageOptions
) -> JobHandle | None:
    """Fill the cube at ``cube``; tiles that have a receipt are not computed again.

    Returns:
        A handle, or None if there is nothing to do.

    Raises:
        H2mvError: another cube is there, the cluster is too small, or runs this job already.
    """
    settings = planned.settings
    require_workers(client, 1, "inference")
    _require_memory(client, planned)
    sink.create_cube(cube, planned.layout, options, settings.inference.overwrite)
    missing = missing_units(planned, cube, options)
    if not missing:
        return None
    common = {
        "settings": to_json(settings),
        "training_folder": training_folder,
        "cube": cube,
        "provenance": dict(planned.layout.attributes),
        "storage_options": options.reveal(),
    }
    attempts = settings.inference.attempts
    tiles = {tile.name: tile for tile in planned.tiles}
    units = tuple(
        Unit(name, "tile", {"start": tiles[name].start, "stop": tiles[name].stop}, attempts=attempts)
        for name in missing
        if name != FINISH_UNIT
    )
    final = Unit(FINISH_UNIT, "finish", {}, attempts=attempts)
    return submit(client, Job(id=job_id("infer", cube), common=common, units=units, final=final))


def submit_inference(
    client: Client, settings: Settings, training_folder: str, cube: str, options: StorageOptions
) -> JobHandle | None:
    """Plan and start inference; see :func:`plan_inference` and :func:`start_inference`."""
    planned = plan_inference(settings, training_folder, options)
    return start_inference(client, planned, training_folder, cube, options)


def missing_units(planned: CubePlan, cube: str, options: StorageOptions) -> tuple[str, ...]:
    """Names of the tiles without receipt, and of the finishing unit if it has none."""
    names = [*(tile.name for tile in planned.tiles), FINISH_UNIT]
    return Ledger(cube, options).missing(names, planned.layout.fingerprint)


def plan_from_message(message: Mapping[str, Any]) -> CubePlan:
    """The plan on a worker, from what the client sent.

    Raises:
        JobError: the worker sees other data, checkpoints or code than the client did.
    """
    settings = validate(message["settings"], where="job")
    options = StorageOptions(message["storage_options"])
    planned = plan_inference(settings, message["training_folder"], options)
    theirs, ours = message["provenance"], planned.layout.attributes
    changed = sorted(key for key in ours if theirs.get(key) != ours[key])
    if changed:
        raise JobError(
            describe(
                "a worker would make another cube than the one that was planned",
                where=f"{message['cube']}: {', '.join(changed)}",
                expected="; ".join(f"{key} = {theirs.get(key)}" for key in changed),
                actual="; ".join(f"{key} = {ours[key]}" for key in changed),
                fix="do not change data or checkpoints while a cube is made, and run the same software on "
                "every worker; then start again",
            )
        )
    return planned


def _read_members(
    settings: Settings, folder: str, options: StorageOptions
) -> tuple[tuple[Checkpoint, ...], dict[int, str]]:
    job = JobFolder(folder, options)
    trained = job.trained_folds()
    wanted = settings.inference.folds if settings.inference.folds is not None else trained
    missing = sorted(set(wanted) - set(trained))
    if missing or not wanted:
        raise CheckpointError(
            describe(
                "no trained model to run",
                where=folder,
                expected=f"best checkpoints of folds {list(wanted) or 'trained by h2mv-dist train'}",
                actual=f"trained folds: {list(trained) or 'none'}",
                fix="train them first, or choose others with inference.folds",
            )
        )
    checkpoints = tuple(job.fold(fold).read_checkpoint("best") for fold in wanted)
    for checkpoint in checkpoints:
        _check_model(checkpoint, settings, folder)
    return checkpoints, {c.fold: checksum(c.to_bytes()) for c in checkpoints}


def _check_model(checkpoint: Checkpoint, settings: Settings, folder: str) -> None:
    if checkpoint.model != settings.model:
        raise CheckpointError(
            describe(
                "the checkpoint is of another model",
                where=f"{folder}, fold {checkpoint.fold}",
                expected=str(settings.model),
                actual=str(checkpoint.model),
                fix="use the settings the folds were trained with",
            )
        )


def _check_static(checkpoints: tuple[Checkpoint, ...], source: Source, where: str) -> None:
    for checkpoint in checkpoints:
        if checkpoint.static_names != source.static:
            raise CheckpointError(
                describe(
                    "the data set has other static features than the model was trained on",
                    where=where,
                    expected=", ".join(checkpoint.static_names),
                    actual=", ".join(source.static),
                    fix="list the same features in the same order in data.static",
                )
            )


def _within(wanted: Period | None, available: Period, setting: str) -> Period:
    if wanted is None:
        return available
    if not available.contains(wanted):
        raise ConfigError(
            describe(
                f"{setting} lies outside the days there are",
                where=setting,
                expected=f"within {available}",
                actual=str(wanted),
                fix="shorten it, or give longer forcing",
            )
        )
    return wanted


def _spinup(settings: Settings, period: Period) -> Period | None:
    days = settings.inference.spinup_days
    if days == 0:
        return None
    return period if days is None or days >= period.n_days else next(iter(period.blocks(days)))


def _layout(
    settings: Settings,
    source: Source,
    spec: ModelSpec,
    checksums: Mapping[int, str],
    period: Period,
    baseline: Period,
) -> sink.CubeLayout:
    chosen = settings.inference
    names = _chosen_outputs(chosen.outputs, spec)
    provenance = {
        "model": canonical_json(settings.model.model_dump(mode="json")),
        "checkpoints": canonical_json({str(fold): value for fold, value in checksums.items()}),
        "input_fingerprint": source.fingerprint(),
        "baseline_period": str(baseline),
        "spinup_days": canonical_json(chosen.spinup_days),
        "threads": str(chosen.threads),
        "versions": canonical_json(code_versions()),
    }
    return sink.CubeLayout(
        grid=source.grid,
        period=period,
        daily=tuple(n for n in names if n in spec.daily or n in spec.anomalies),
        static=tuple(n for n in names if n in spec.static),
        constants=tuple(n for n in names if n in spec.constants),
        members=tuple(checksums),
        member_axis=chosen.members == "all",
        chunk=chosen.chunk,
        shard=chosen.shard,
        tile=chosen.tile,
        chunk_days=chosen.chunk_days,
        shard_days=chosen.shard_days,
        attributes={**provenance, sink.FINGERPRINT: checksum(canonical_json(provenance).encode())},
    )


def _chosen_outputs(wanted: tuple[str, ...] | None, spec: ModelSpec) -> tuple[str, ...]:
    for name in wanted or ():
        if name not in spec.outputs:
            raise ConfigError(
                f"inference.outputs: {spec.name} has no {name!r}; {nearest(name, spec.outputs)}"
            )
    return spec.outputs if wanted is None else wanted


def _require_memory(client: Client, planned: CubePlan) -> None:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    limits = [worker["memory_limit"] for worker in workers if worker["memory_limit"]]
    needed = planned.tile_bytes()
    if limits and needed > min(limits):
        raise JobError(
            describe(
                "a tile does not fit into a worker",
                where="inference.tile and inference.shard_days",
                expected=f"at most {dask.utils.format_bytes(min(limits))}, the smallest worker's limit",
                actual=f"about {dask.utils.format_bytes(needed)} for the largest tile",
                fix="choose smaller tiles or fewer inference.shard_days, or start larger workers",
            )
        )
