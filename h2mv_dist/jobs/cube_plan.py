"""The plan of a cube: what client and workers must agree on, found out by both from the same settings.

Nothing is written here. Days, spin-up and baseline of a cube that exists are those it was created with.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Final

from dask.utils import format_bytes

from h2mv_dist.config import CodePath, Settings, StorageOptions, canonical_json, validate
from h2mv_dist.errors import CheckpointError, ConfigError, JobError, NothingNewError, StoreError, describe
from h2mv_dist.grid import Period, Tile, as_date
from h2mv_dist.io.cube import (
    COMPACTED,
    FINGERPRINT,
    INPUT_VALUES,
    KEPT_BITS,
    MANTISSA_BITS,
    CubeLayout,
    Progress,
    part_bytes,
)
from h2mv_dist.io.cube_store import differences, find_cube, read_cube, still_as_planned
from h2mv_dist.io.handles import places_of
from h2mv_dist.io.sink import ARRAYS_AT_ONCE
from h2mv_dist.io.source import Source, open_source
from h2mv_dist.io.stores import displayed, public
from h2mv_dist.io.tile_forcing import TileForcing
from h2mv_dist.jobs.code_path import COMPILED, EAGER, chosen_path
from h2mv_dist.jobs.records import JobFolder
from h2mv_dist.jobs.rollback import require_finished, rolled_back
from h2mv_dist.jobs.simulation import PART_CELLS, PART_DAYS
from h2mv_dist.model.checkpoint import Checkpoint, checksum, code_versions
from h2mv_dist.model.days import no_tools_because
from h2mv_dist.model.registry import model_kind
from h2mv_dist.spec import ModelSpec
from h2mv_dist.variables import by_name_or_group, variable

FLOAT_BYTES: Final = 4
FIRST_USE_BYTES: Final = 94 * 2**20
"""What torch, zarr and the clients of an object store take when they are first used, whatever the tile, and
what is lost between arrays; measured."""
COMPILED_BYTES: Final = 200 * 2**20
"""What torch's compiler leaves behind where days are compiled; measured."""
COMPILING_BYTES: Final = 1000 * 2**20
"""What it takes meanwhile, with the C++ compiler, before the first tile; measured."""
GATES_AT_ONCE: Final = 16
"""Of one day; measured."""
NUMBERS: Final = 1
"""Raised when a change of this code changes a cube's numbers by more than round-off: cubes made before are
then not continued. Versions of packages are recorded, but do not matter."""
_NO_SPINUP: Final = "none"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CubePlan:
    """Everything that client and workers must agree on.

    Attributes:
        settings: of the job; model and data count, not the cluster.
        source: opened forcing and static features.
        spec: columns of the model.
        checkpoints: one a member, in the order of ``layout.members``.
        layout: of the cube, as long as it is to become.
        baseline: days whose mean anomalies refer to.
        spinup: days run first, or None for no spin-up.
        progress: how far the cube is when the work begins, or None if there is none yet.
        before: how far it is now, if it is first to be rolled back.
    """

    settings: Settings
    source: Source
    spec: ModelSpec
    checkpoints: tuple[Checkpoint, ...]
    layout: CubeLayout
    baseline: Period
    spinup: Period | None
    progress: Progress | None
    before: Progress | None = None

    @property
    def code_path(self) -> str:
        """How days are run."""
        return self.layout.attributes.get("code_path", EAGER)

    @property
    def done(self) -> bool:
        """Whether readers are shown all of it."""
        return (
            self.progress is not None
            and self.progress.complete
            and self.progress.period == self.layout.period
        )

    def tile_bytes(self) -> int:
        """Projected growth of a worker above its imports while it works on its largest tile, bytes.

        One line a buffer; measured by ``python -m benchmarks memory``, where what is freed goes back to the
        system, as nannies start their workers (``MALLOC_TRIM_THRESHOLD_``).
        """
        layout, mask = self.layout, self.layout.grid.mask
        tile = max(layout.tiles, key=lambda tile: int(mask[tile.slices].sum()))
        cells, box = int(mask[tile.slices].sum()), math.prod(tile.shape)
        days, members = min(layout.shard_days, self.layout.period.n_days), len(layout.members)
        of_tile = TileForcing(self.source, tile, self.layout.period, layout.shard_days)
        # its next tile reads while the last block of this one is computed
        forcing = of_tile.n_bytes + (of_tile.n_bytes_left if len(layout.tiles) > 1 else 0)
        # as read, in the models, stacked, and what a pass makes of them
        weights = 4 * sum(t.nbytes for checkpoint in self.checkpoints for t in checkpoint.tensors.values())
        # of one member: gates that are constant, today's, and what a day makes of them
        at_once = min(cells, PART_CELLS)
        gates = GATES_AT_ONCE * at_once * 4 * self.settings.model.hidden
        # of one member and part: days one by one and joined, the budget in float64; with a
        # GPU these are on it, and on the host are pinned copies of two parts, of all members, instead
        part = 3 * min(PART_DAYS, days) * at_once * len(self.spec.daily)
        # of all members: what is computed, and the block before, which is being written
        values = 2 * members * days * cells * len(layout.daily)
        # sums over the month, float64, and the means of one that ends
        values += 3 * members * cells * len(layout.monthly)
        # of each array that is being written: its box with sea, and what is coded of it and sent just now
        written = 2 * ARRAYS_AT_ONCE * (members if layout.member_axis else 1) * days * box
        at_work = FIRST_USE_BYTES + forcing + weights
        at_work += FLOAT_BYTES * (gates + part + values + written)
        return at_work if self.code_path == EAGER else max(COMPILING_BYTES, COMPILED_BYTES + at_work)

    def missing_bytes(self, missing: Mapping[Tile, Sequence[Period]]) -> int:
        """Projected bytes, before compression, of these days of these tiles."""
        return part_bytes(self.layout, missing)

    def summary(self) -> str:
        """How large the cube will be, in a sentence."""
        layout = self.layout
        n_arrays = sum(len(layout.arrays_of(n)) for n in (*layout.daily, *layout.static)) + len(
            layout.constants
        )
        whole = self.missing_bytes({tile: [layout.period] for tile in layout.tiles})
        return (
            f"{n_arrays} arrays over {layout.period} from {len(layout.members)} folds in "
            f"{len(layout.tiles)} tiles: {format_bytes(whole)} before compression, "
            f"about {format_bytes(self.tile_bytes())} of a worker's memory"
        )


def plan_inference(
    settings: Settings,
    training_folder: str,
    options: StorageOptions,
    *,
    cube: str = "",
    append: bool = False,
    since: date | None = None,
) -> CubePlan:
    """Read what a cube needs and lay it out; nothing is written.

    Args:
        settings: data, model and inference settings.
        training_folder: job folder with the trained folds.
        options: storage options.
        cube: URL of the cube, which may exist; nowhere in particular if left out.
        append: make it as long as the forcing is by now.
        since: the same, and compute anew what it holds from this day on, or from a little before.

    Raises:
        H2mvError: anything that does not fit together.
    """
    known = find_cube(cube, options) if cube else None
    longer = append or since is not None
    if known and COMPACTED in known and (longer or not settings.inference.overwrite):
        raise _filled_by_compact(cube, known)
    if longer:
        settings = _kept(settings)
    if since is None:
        planned = _plan(settings, training_folder, options, known, append=append)
    else:
        planned = _plan_since(settings, training_folder, options, known, cube, since)
    planned.source.tell_uneven_days()
    if known and planned.progress:
        _tell_other_forcing(known, planned.layout, cube)
    return planned


def _plan_since(
    settings: Settings,
    training_folder: str,
    options: StorageOptions,
    known: Mapping[str, str] | None,
    cube: str,
    since: date,
) -> CubePlan:
    """Of a cube as it will be once it is rolled back."""
    there = read_cube(cube, options)
    shorter = {**(known or {}), **rolled_back(cube, there, since, options).attributes()}
    planned = _plan(settings, training_folder, options, shorter, append=True)
    return replace(planned, before=there.progress)


def _kept(settings: Settings) -> Settings:
    """What makes a cube longer never replaces it, whatever differs."""
    inference = settings.inference.model_copy(update={"overwrite": False})
    return settings.model_copy(update={"inference": inference})


def plan_from_message(message: Mapping[str, Any]) -> CubePlan:
    """The plan on a worker, from what the client sent.

    Raises:
        JobError: the worker sees other data, checkpoints or code than the client did.
    """
    settings = validate(message["settings"], where="job")
    options = StorageOptions(message["storage_options"])
    known, until = find_cube(message["cube"], options), Period.parse(message["period"])
    seen = message["provenance"][INPUT_VALUES], message["objects"]
    planned = _plan(settings, message["training_folder"], options, known, until=until, seen=seen)
    if known:
        before = message["progress"]
        rollbacks = Progress.of(before).rollbacks if before else ()
        still_as_planned(message["cube"], planned.layout, rollbacks, options)
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


def _plan(
    settings: Settings,
    training_folder: str,
    options: StorageOptions,
    known: Mapping[str, str] | None,
    *,
    append: bool = False,
    until: Period | None = None,
    seen: tuple[str, str] | None = None,
) -> CubePlan:
    spec = model_kind(settings.model.name).spec
    checkpoints, checksums = _read_members(settings, training_folder, options)
    source = open_source(settings.data, forcing=spec.forcing, targets=(), options=options)
    if seen is not None:
        source.take_over_identity(*seen)
    _check_static(checkpoints, source, settings.data.url)

    def planned(known: Mapping[str, str] | None) -> CubePlan:
        progress = Progress.of(known) if known else None
        period = until or _target(settings, source, progress, append)
        baseline, spinup = _references(settings, source.period, period, known)
        days = [period, baseline, *([spinup] if spinup else [])]
        cell_days = int(source.grid.mask.sum()) * len(checkpoints) * sum(part.n_days for part in days)
        path = _code_path(settings.inference.code_path, cell_days, known)
        data = _fingerprint_of(source, known)
        layout = _layout(
            settings, training_folder, source, data, spec, checksums, period, baseline, spinup, path
        )
        return CubePlan(settings, source, spec, checkpoints, layout, baseline, spinup, progress)

    # a cube whose days the forcing has no more is refused, not replaced: perhaps some of it is only missing
    if known and settings.inference.overwrite and differences(known, planned(known).layout):
        return planned(None)
    return planned(known)


def _fingerprint_of(source: Source, known: Mapping[str, str] | None) -> str:
    """What the data are, as the cube knows them: by values, or by objects if it is an early one."""
    if known is None:
        return source.identity
    if INPUT_VALUES not in known:
        return source.identity_by_objects()
    return known["input_fingerprint"] if known[INPUT_VALUES] == source.identity else source.identity


def _tell_other_forcing(known: Mapping[str, str], layout: CubeLayout, cube: str) -> None:
    before, now = known.get("data_url"), layout.attributes["data_url"]
    if before != now:
        _log.warning(
            "%s: its forcing was read from %s so far, and is read from %s now; nothing checks that this is "
            "the same product",
            *(displayed(cube), before, now),
        )


def _filled_by_compact(cube: str, known: Mapping[str, str]) -> StoreError:
    return StoreError(
        describe(
            "this cube is a compacted one, which h2mv-dist infer does not fill; nothing was touched",
            where=displayed(cube),
            expected="a cube that h2mv-dist infer created",
            actual=f"one that was compacted from {known.get('source_cube', 'another cube')}",
            fix="infer into that one; h2mv-dist compact then extends this one, and writes anew what "
            "verify-cube --repair found damaged here",
        )
    )


def _target(settings: Settings, source: Source, progress: Progress | None, append: bool) -> Period:
    """The days the cube is to hold: those it was to have, or with ``append`` all whole shards there are.

    Raises:
        ConfigError: days are asked for that cannot be given.
        NothingNewError: append, but the forcing has not grown enough.
    """
    wanted = _within(settings.inference.period, source.period, "inference.period")
    if progress is None:
        return wanted
    _within(progress.intended, source.period, "the cube's days")
    if append:
        _require_no_gap(settings.inference.period, progress)
        return _appended(progress, wanted, settings, source)
    if settings.inference.period is None:
        return progress.intended
    if wanted.stop > progress.intended.stop:
        unfinished = "leave inference.period out, or end it there, to finish the cube first; then "
        raise ConfigError(
            f"inference.period goes on until {wanted.stop}, but the cube ends {progress.intended.stop}; "
            f"{'' if progress.complete else unfinished}extend it with h2mv-dist infer --append, or make "
            "another one"
        )
    return Period(wanted.start, progress.intended.stop)


def _require_no_gap(chosen: Period | None, progress: Progress) -> None:
    """A cube's settings say all of its days, so that it can be repaired with them."""
    if chosen is not None and chosen.start != progress.period.start:
        raise ConfigError(
            describe(
                "days to append leave a gap, or overlap with the cube's",
                where="inference.period",
                expected=f"a start on {progress.period.start}, with the cube's own days",
                actual=str(chosen),
                fix="leave it out to append all there is; --from DATE computes days anew",
            )
        )


def _appended(progress: Progress, wanted: Period, settings: Settings, source: Source) -> Period:
    start, length = progress.period.start, progress.period.n_days
    shard_days = settings.inference.shard_days
    require_finished(progress)
    if length % shard_days:
        raise JobError(
            describe(
                "the cube ends within a shard, which appending would write again under its readers",
                where=f"inference.shard_days = {shard_days}",
                expected="a cube of whole shards, such as one with inference.shard_days = 1",
                actual=f"{length} days",
                fix="--from DATE, with the cube's last day, computes its last shard anew and appends; new "
                "cubes are best created with the inference.period ending where a shard does",
            )
        )

    def in_whole_shards(days: Period) -> date:
        whole = (days.stop - start).days // shard_days * shard_days
        return as_date(progress.period.first + whole)

    stop = max(in_whole_shards(wanted), progress.intended.stop)
    if stop <= progress.period.stop:
        left_out = in_whole_shards(source.period) > stop
        raise _nothing_to_append(progress.period.stop, left_out, settings, source)
    return Period(start, stop)


def _nothing_to_append(end: date, left_out: bool, settings: Settings, source: Source) -> Exception:
    """Of days that may come, or, which a timer must not wait for, of days that the settings leave out."""
    if left_out:
        return ConfigError(
            describe(
                "nothing to append: the settings leave out the days behind the cube's",
                where="inference.period",
                expected=f"a whole shard of days after {end}; the forcing goes on until {source.period.stop}",
                actual=str(settings.inference.period),
                fix="leave it out; a cube that exists keeps its first day, its baseline and its spin-up",
            )
        )
    late = f" ({source.arrays.uneven})" if source.arrays.uneven else ""
    cut = settings.data.period is not None and settings.data.period.stop == source.period.stop
    return NothingNewError(
        f"nothing to append: the cube is complete until {end} (that day excluded), the forcing ends "
        f"{source.period.stop}{', as data.period says' if cut else ''}{late}, and days are appended "
        f"{settings.inference.shard_days} at a time"
    )


def _code_path(chosen: CodePath, cell_days: int, known: Mapping[str, str] | None) -> str:
    """As set, else as the cube has it, else as is worth it."""
    if known and "code_path" not in known and chosen != COMPILED:
        return ""
    if chosen != "auto":
        return chosen
    if known:
        return known["code_path"]
    # workers compile, not this machine, whose folders may be of no use for it
    return chosen_path(chosen, "cpu", cell_days, no_tools_because(), "inference.code_path")


def _references(
    settings: Settings, available: Period, period: Period, known: Mapping[str, str] | None
) -> tuple[Period, Period | None]:
    """Baseline and spin-up: as set, else as the cube has them, else the whole period."""
    chosen, days = settings.inference.baseline, settings.inference.spinup_days
    if chosen is None and known:
        baseline = Period.parse(known["baseline_period"])
    else:
        baseline = _within(chosen, period, "inference.baseline")
    if days is None and known:
        recorded = known["spinup_period"]
        return baseline, None if recorded == _NO_SPINUP else Period.parse(recorded)
    return baseline, spinup_of(period, days, available, "inference.spinup_days")


def spinup_of(period: Period, days: int | None, available: Period, setting: str) -> Period | None:
    """Days run first: some from the start of the period on, all of it if left out, or none.

    Raises:
        ConfigError: there are not so many.
    """
    if days == 0:
        return None
    spinup = period if days is None else Period(period.start, as_date(period.first + days))
    return _within(spinup, available, setting)


def tiles_sharing_no_chunk(planned: CubePlan) -> bool:
    """Whether every chunk of the forcing is needed by one tile only."""
    chunk, shape, tile = planned.source.chunk_shape, planned.source.grid.shape, planned.layout.tile
    return not any(t % c and t < n for t, c, n in zip(tile, chunk, shape, strict=True))


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
                f"{setting}: days are wanted that are not there",
                where=setting,
                expected=f"within {available}",
                actual=str(wanted),
                fix="shorten it, or give longer forcing",
            )
        )
    return wanted


def _layout(
    settings: Settings,
    training_folder: str,
    source: Source,
    data: str,
    spec: ModelSpec,
    checksums: Mapping[int, str],
    period: Period,
    baseline: Period,
    spinup: Period | None,
    code_path: str,
) -> CubeLayout:
    chosen = settings.inference
    names = _chosen_outputs(chosen.outputs, spec)
    rounded = _rounded(chosen.rounding, names, spec)
    provenance = {
        "model": canonical_json(settings.model.model_dump(mode="json")),
        "checkpoints": canonical_json({str(fold): value for fold, value in checksums.items()}),
        "input_fingerprint": data,
        "baseline_period": str(baseline),
        "spinup_period": str(spinup or _NO_SPINUP),
        "threads": str(chosen.threads),
        # cubes that were begun before there was a choice are eager, and do not say so
        **({"code_path": code_path} if code_path else {}),
        "numbers": str(NUMBERS),
    }
    return CubeLayout(
        grid=source.grid,
        period=period,
        daily=tuple(n for n in names if n in spec.daily or n in spec.anomalies),
        static=tuple(n for n in names if n in spec.static),
        constants=tuple(n for n in names if n in spec.constants),
        members=tuple(checksums),
        members_as=chosen.members,
        compression=chosen.compression,
        rounded=rounded,
        monthly=tuple(n for n in names if n in spec.daily or n in spec.anomalies) if chosen.monthly else (),
        chunk=chosen.chunk,
        shard=chosen.shard,
        tile=chosen.tile,
        chunk_days=chosen.chunk_days,
        shard_days=chosen.shard_days,
        attributes={
            **provenance,
            "data_url": places_of(source.arrays.forcing),
            INPUT_VALUES: source.identity,
            "training_job": public(training_folder),
            "versions": canonical_json(code_versions()),
            "settings": canonical_json(_recorded(settings, names, rounded)),
            FINGERPRINT: checksum(canonical_json(provenance).encode()),
        },
    )


def _rounded(rounding: str | Mapping[str, int], names: Sequence[str], spec: ModelSpec) -> dict[str, int]:
    """Bits that rounded outputs keep; the water budget of stored values closes only where none is rounded."""
    if isinstance(rounding, Mapping):
        return _bits(rounding, names, spec)
    daily = [name for name in names if name in spec.daily or name in spec.anomalies]
    stores = [name for name in daily if variable(name).units == "mm"]
    chosen = [n for n in daily if rounding == "all" or (rounding == "fluxes" and n not in stores)]
    return dict.fromkeys(chosen, KEPT_BITS)


def _bits(rounding: Mapping[str, int], names: Sequence[str], spec: ModelSpec) -> dict[str, int]:
    """Of the outputs that are written; those named themselves come after, so before, their groups."""
    bits: dict[str, int] = {}
    for key in sorted(rounding, key=lambda key: key in spec.outputs):
        bits |= dict.fromkeys(by_name_or_group([key], spec.outputs, "inference.rounding"), rounding[key])
    return {name: bits[name] for name in names if bits.get(name, MANTISSA_BITS) < MANTISSA_BITS}


def _recorded(settings: Settings, names: tuple[str, ...], rounded: Mapping[str, int]) -> dict[str, Any]:
    """The settings that matter for a cube's values; groups as their variables, which may grow some day."""
    whole = settings.model_dump(mode="json", include={"data": True, "model": True, "inference": True})
    unimportant = {"overwrite", "attempts"}
    inference = {key: value for key, value in whole["inference"].items() if key not in unimportant}
    if inference["outputs"] is not None:
        inference["outputs"] = list(names)
    if isinstance(inference["rounding"], Mapping):
        inference["rounding"] = dict(rounded)
    return {**whole, "inference": inference}


def _chosen_outputs(wanted: tuple[str, ...] | None, spec: ModelSpec) -> tuple[str, ...]:
    return spec.outputs if wanted is None else by_name_or_group(wanted, spec.outputs, "inference.outputs")
