"""The global-inference job: plan a cube, create it, then submit one unit a tile that has no receipt yet.

``plan_inference`` gives client and workers the same :class:`CubePlan` from the same settings, so that both
agree on the cube's geometry without sending it.
"""

import logging
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dask.utils import format_bytes
from distributed import Client

from h2mv_dist.config import Settings, StorageOptions, canonical_json, to_json, validate
from h2mv_dist.errors import CheckpointError, ConfigError, JobError, StoreError, describe
from h2mv_dist.grid import Period
from h2mv_dist.io.cube import FINGERPRINT, CubeLayout, projected_bytes
from h2mv_dist.io.cube_store import create_cube
from h2mv_dist.io.ledger import FINISH_UNIT, Ledger
from h2mv_dist.io.source import Source, open_source
from h2mv_dist.io.stores import displayed, local_path
from h2mv_dist.io.tile_forcing import TileForcing
from h2mv_dist.jobs.cluster import require_workers
from h2mv_dist.jobs.handle import JobHandle, submit
from h2mv_dist.jobs.messages import Job, Unit
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.training import job_id
from h2mv_dist.model.checkpoint import Checkpoint, checksum, code_versions
from h2mv_dist.model.h2mv import GATE_DAYS
from h2mv_dist.model.registry import model_kind
from h2mv_dist.spec import ModelSpec
from h2mv_dist.variables import nearest

FLOAT_BYTES: Final = 4
COMPRESSION: Final = 10
"""Outputs are not compressed any further than by about this factor."""

_log = logging.getLogger(__name__)


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
    layout: CubeLayout
    period: Period
    baseline: Period
    spinup: Period | None

    def tile_bytes(self) -> int:
        """Projected peak of the arrays a worker holds for its largest tile, bytes; one line a buffer.

        Measured where what is freed goes back to the system, as nannies start their workers
        (``MALLOC_TRIM_THRESHOLD_``); elsewhere glibc may hold about twice as much.
        """
        layout, mask = self.layout, self.layout.grid.mask
        tile = max(layout.tiles, key=lambda tile: int(mask[tile.slices].sum()))
        cells, box = int(mask[tile.slices].sum()), math.prod(tile.shape)
        days, members = min(layout.shard_days, self.period.n_days), len(layout.members)
        forcing = TileForcing(self.source, tile, self.period, layout.shard_days).n_bytes
        # of one member: gates as a product and with what is constant, days one by one and joined
        gates = 2 * GATE_DAYS * cells * 4 * self.settings.model.hidden
        member = 2 * days * cells * len(self.spec.daily)
        # of all members: what is computed, and the block before, which is being written
        values = 2 * members * days * cells * len(layout.daily)
        # of the variable that is being written: its deviations in float64, then its box with sea, and coded
        spread = 0 if layout.member_axis else 2 * members * days * cells
        coded = 3 * (members if layout.member_axis else 1) * days * box
        return forcing + FLOAT_BYTES * (gates + member + values + max(spread, coded))

    def missing_bytes(self, done: Collection[str]) -> int:
        """Projected bytes, before compression, of the tiles that are not ``done``."""
        missing = sum(math.prod(tile.shape) for tile in self.layout.tiles if tile.name not in done)
        return projected_bytes(self.layout) * missing // self.layout.grid.mask.size

    def summary(self) -> str:
        """How large the cube will be, in a sentence."""
        n_arrays = sum(
            len(self.layout.arrays_of(n)) for n in (*self.layout.daily, *self.layout.static)
        ) + len(self.layout.constants)
        return (
            f"{n_arrays} arrays over {self.period} from {len(self.layout.members)} folds in "
            f"{len(self.layout.tiles)} tiles: {format_bytes(self.missing_bytes(()))} before compression, "
            f"about {format_bytes(self.tile_bytes())} of a worker's memory"
        )


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
    layout = _layout(settings, training_folder, source, spec, checksums, period, baseline)
    spinup = _spinup(settings, period)
    return CubePlan(settings, source, spec, checkpoints, layout, period, baseline, spinup)


def start_inference(
    client: Client, planned: CubePlan, training_folder: str, cube: str, options: StorageOptions
) -> JobHandle | None:
    """Fill the cube at ``cube``; tiles that have a receipt are not computed again.

    Returns:
        A handle, or None if there is nothing to do.

    Raises:
        H2mvError: another cube is there, the cluster or the disk is too small, or the job runs already.
    """
    settings = planned.settings
    require_workers(client, 1, "inference")
    _require_memory(client, planned)
    _require_disk(planned, cube, options)
    _log.info("%s: %s", displayed(cube), planned.summary())
    warn_of_split_chunks(planned)
    create_cube(cube, planned.layout, options, settings.inference.overwrite)
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
    tiles = {tile.name: tile for tile in planned.layout.tiles}
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
    names = [*(tile.name for tile in planned.layout.tiles), FINISH_UNIT]
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
    wanted = settings.inference.folds if settings.inference.folds is not None else _finished(job, trained)
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


def _finished(job: JobFolder, trained: Sequence[int]) -> tuple[int, ...]:
    """The trained folds, if all are finished: a cube of half-trained models is hardly ever what is meant."""
    unfinished = [fold for fold in job.begun_folds() if job.fold(fold).done() is None]
    if unfinished:
        raise CheckpointError(
            describe(
                "some folds are not finished",
                where=job.url,
                expected="only folds that were trained to their end",
                actual=f"not finished: {unfinished}, of them with a best checkpoint: "
                f"{sorted(set(unfinished) & set(trained)) or 'none'}",
                fix=f"finish them with h2mv-dist train --resume {job.url}, or name the folds you want with "
                "inference.folds, which takes the best checkpoint that each has so far",
            )
        )
    return tuple(trained)


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
    training_folder: str,
    source: Source,
    spec: ModelSpec,
    checksums: Mapping[int, str],
    period: Period,
    baseline: Period,
) -> CubeLayout:
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
    return CubeLayout(
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
        attributes={
            **provenance,
            "data_url": ", ".join(sorted({_public(handle.url) for handle in source.arrays.forcing})),
            "training_job": _public(training_folder),
            FINGERPRINT: checksum(canonical_json(provenance).encode()),
        },
    )


def _public(url: str) -> str:
    """A URL without what may be a secret: user, password, and the signature of a signed one."""
    return displayed(url).partition("?")[0] if "://" in url else url


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
                expected=f"at most {format_bytes(min(limits))}, the smallest worker's limit",
                actual=f"about {format_bytes(needed)} for the largest tile",
                fix="choose smaller tiles or fewer inference.shard_days, or start larger workers",
            )
        )


def _require_disk(planned: CubePlan, cube: str, options: StorageOptions) -> None:
    """Refuse a cube that cannot fit on this machine's disk; object stores do not say what is free.

    Raises:
        StoreError: not even a tenth of the bytes before compression is free.
    """
    place = local_path(cube)
    if place is None:
        return
    receipts = Ledger(cube, options).receipts().values()
    done = {receipt.unit for receipt in receipts if receipt.fingerprint == planned.layout.fingerprint}
    needed = planned.missing_bytes(done)
    folder = next(path for path in (place, *place.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free * COMPRESSION < needed:
        raise StoreError(
            describe(
                "the cube does not fit on the disk",
                where=str(folder),
                expected=f"at least {format_bytes(needed // COMPRESSION)} free for what is missing of the "
                f"cube ({format_bytes(needed)} before compression)",
                actual=f"{format_bytes(free)} free",
                fix="free space (a cube that is to be replaced can be deleted first), choose another disk, "
                "or fewer inference.outputs",
            )
        )
    if free < needed:
        _log.warning(
            "%s has %s free; the tiles of the cube that are missing take %s before compression",
            *(folder, format_bytes(free), format_bytes(needed)),
        )


def warn_of_split_chunks(planned: CubePlan) -> None:
    """Say so if several tiles need the same chunks of the forcing, each of which reads them."""
    chunk, shape = planned.source.chunk_shape, planned.source.grid.shape
    tile, shard = planned.layout.tile, planned.layout.shard
    if any(t % c and t < n for t, c, n in zip(tile, chunk, shape, strict=True)):
        fitting = [_nearest_multiple(t, math.lcm(c, s)) for t, c, s in zip(tile, chunk, shard, strict=True)]
        _log.warning(
            "inference.tile = %s cuts chunks of the forcing, %s cells each, which are then read by several "
            "tiles; inference.tile = %s would not",
            *(list(tile), list(chunk), fitting),
        )


def _nearest_multiple(size: int, unit: int) -> int:
    """The multiple of ``unit`` nearest to ``size``, not 0.

    >>> _nearest_multiple(20, 12), _nearest_multiple(5, 12)
    (24, 12)
    """
    return max(round(size / unit), 1) * unit
