"""The preparing job: forcing becomes daily, in our units and cut for tiles, once.

A unit is a stretch of days over all space: it reads the input chunks of these days, one variable after the
other, and writes whole shards. The last unit adds what does not change with time.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from dask.utils import format_bytes
from distributed import Client

from h2mv_dist.config import Settings, StorageOptions, to_json, validate
from h2mv_dist.errors import ConfigError, DataError, JobError, describe
from h2mv_dist.grid import Period, as_date
from h2mv_dist.io.daily import DailyInput, Series, open_daily
from h2mv_dist.io.handles import fixed_values, places_of
from h2mv_dist.io.prepared import FINISH, PreparedLayout, PreparedStore
from h2mv_dist.io.stores import displayed
from h2mv_dist.jobs.cluster import require_workers, smallest_memory
from h2mv_dist.jobs.handle import JobHandle, require_idle, submit
from h2mv_dist.jobs.messages import Job, Message, Unit, job_id
from h2mv_dist.jobs.room import require_disk
from h2mv_dist.jobs.tasks import cancellation_check, report
from h2mv_dist.jobs.versions import require_same_versions
from h2mv_dist.spec import Float32Array

_OFTEN: Final = 1.2
"""Input chunks that are read more often than this, on average, are worth a warning."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparePlan:
    """Everything that client and workers must agree on."""

    settings: Settings
    daily: DailyInput
    layout: PreparedLayout

    def unit_bytes(self) -> int:
        """Projected peak of a unit, bytes: a variable over its days, and what is being read or written."""
        block, shape = self.layout.blocks[0], self.layout.grid.shape
        reading = max(series.read_bytes(block.n_days, shape) for series in self.daily.forcing)
        return self.layout.block_bytes() + max(reading, self.layout.write_bytes())

    def missing_bytes(self, done: Collection[str]) -> int:
        """Bytes of the forcing, before compression, in the stretches of days that are not done."""
        days = sum(block.n_days for block in self.layout.blocks if str(block) not in done)
        return 4 * len(self.daily.forcing) * days * self.layout.grid.mask.size

    def summary(self) -> str:
        """What will be made, a line for each variable after the first."""
        total = self.missing_bytes(())
        return "\n".join(
            (
                f"{len(self.daily.forcing)} variables over {self.layout.period} in {len(self.layout.blocks)} "
                f"stretches of days: {format_bytes(total)} before compression, about "
                f"{format_bytes(self.unit_bytes())} of a worker's memory",
                *(f"  {series.name}: {_how(series)}" for series in self.daily.forcing),
            )
        )


def plan_prepare(settings: Settings, options: StorageOptions) -> PreparePlan:
    """Find the forcing of the model and lay out its store; nothing is written.

    Raises:
        H2mvError: anything that does not fit together.
    """
    # not at the top: workers, which are told the names, do without torch and its memory
    from h2mv_dist.model.registry import model_kind

    return _plan(settings, model_kind(settings.model.name).spec.forcing, options)


def _plan(settings: Settings, forcing: tuple[str, ...], options: StorageOptions) -> PreparePlan:
    cut = settings.prepare
    daily = open_daily(settings.data, forcing=forcing, stamps=cut.stamps, options=options)
    identity = {
        "forcing": {s.name: [_how(s), *s.handle.conversion, *s.conversion] for s in daily.forcing},
        "static": [[handle.name, *handle.columns] for handle in daily.static],
        "fixed": fixed_values(daily.grid, daily.static),
        "start": str(daily.period.start),
        "shard": [cut.shard_days, *cut.shard],
        "chunk": [cut.chunk_days, *cut.chunk],
    }
    layout = PreparedLayout(
        grid=daily.grid,
        period=daily.period,
        forcing=forcing,
        static=tuple(handle.name for handle in daily.static),
        shard=(cut.shard_days, *cut.shard),
        chunk=(cut.chunk_days, *cut.chunk),
        identity=identity,
        data_url=places_of([series.handle for series in daily.forcing]),
    )
    return PreparePlan(settings, daily, layout)


def _until(plan: PreparePlan, period: Period) -> PreparePlan:
    """The plan of a store that ends earlier."""
    return replace(plan, layout=replace(plan.layout, period=period))


def lengthened(available: Period, shown: int, stretch: int) -> Period:
    """The days a store is to have: all there are, but whole stretches only once readers are shown some.

    Args:
        available: the days of the input.
        shown: how many of them readers are shown.
        stretch: days of a shard.

    Raises:
        DataError: readers are shown more days than there are.

    >>> [lengthened(Period.parse("2001-01-01..2001-01-20"), shown, 5).n_days for shown in (0, 10, 17)]
    [19, 15, 17]
    """
    if shown > available.n_days:
        raise DataError(
            describe(
                "the forcing ends before the store that was prepared of it",
                where="data.url, data.period",
                expected=f"at least {shown} days from {available.start} on",
                actual=f"{available.n_days}",
                fix="give the whole forcing, or prepare it into another store",
            )
        )
    whole = available.n_days // stretch * stretch
    n_days = max(shown, whole) if shown else available.n_days
    return Period(available.start, as_date(available.first + n_days))


def start_prepare(client: Client, plan: PreparePlan, to: str, options: StorageOptions) -> JobHandle | None:
    """Fill the store at ``to``, or let it grow; stretches of days that have a receipt are not done again.

    Returns:
        A handle, or None if there is nothing to do.

    Raises:
        H2mvError: something else is there, workers or the disk are too small, or the job runs already.
    """
    shown = PreparedStore(to, plan.layout, options).shown_days()
    plan = _until(plan, lengthened(plan.daily.period, shown, plan.layout.shard[0]))
    settings, store, name = plan.settings, PreparedStore(to, plan.layout, options), job_id("prepare", to)
    _refuse_input(plan, to)
    require_idle(client, name)
    require_workers(client, 1, "prepare")
    require_same_versions(client)
    _require_memory(client, plan)
    left = plan.missing_bytes(store.done())
    require_disk("prepared store", to, left, "fewer days with data.period")
    _log.info("%s: %s", displayed(to), plan.summary())
    _tell_what_is_left_out(plan)
    _warn_of_split_chunks(plan)
    store.create(overwrite=settings.prepare.overwrite)
    store.forget_others()
    done = store.done()
    names = [str(block) for block in plan.layout.blocks if str(block) not in done]
    if not names and shown == plan.layout.period.n_days:
        return None
    common = {
        "settings": to_json(settings),
        "forcing": plan.layout.forcing,
        "to": to,
        "fingerprint": plan.layout.fingerprint,
        "period": str(plan.layout.period),
        "storage_options": options.reveal(),
    }
    attempts = settings.prepare.attempts
    units = tuple(Unit(name, "prepare", {}, attempts=attempts) for name in names)
    final = Unit(FINISH, "prepare", {}, attempts=attempts, steps=0)
    return submit(client, Job(name, to, common, units, final))


def run_prepare_unit(message: Message) -> None:
    """Prepare a stretch of days, or what does not change with time; the receipt is put last."""
    plan, store = _context(message)
    started, unit = time.monotonic(), message["unit"]
    if unit == FINISH:
        _require_receipts(plan, store)
        store.finish(plan.daily.static)
    else:
        checksum = prepare_days(plan, store, Period.parse(unit), cancellation_check())
        store.record(unit, checksum, round(time.monotonic() - started, 3))
    report(message, event="prepared", seconds=round(time.monotonic() - started, 3))


def prepare_days(
    plan: PreparePlan,
    store: PreparedStore,
    block: Period,
    require_wanted: Callable[[], None] = lambda: None,
) -> str:
    """Write every variable over one of the layout's blocks; returns a checksum of the values.

    ``require_wanted`` raises what ends the work early; it is called between reads.
    """
    first = block.first - plan.layout.period.first
    days, digest = slice(first, first + block.n_days), hashlib.sha256()
    for series in plan.daily.forcing:
        # nothing here may keep the values: there is room for one variable
        checksum = store.write(
            series.name, block, _values(series, days, plan.layout, require_wanted), require_wanted
        )
        digest.update(checksum.encode())
    return digest.hexdigest()


def _values(
    series: Series, days: slice, layout: PreparedLayout, require_wanted: Callable[[], None]
) -> Float32Array:
    """One variable over all space, [day, *space]; each chunk of the input within the days is read once."""
    grid = layout.grid
    values = np.empty((days.stop - days.start, *grid.shape), np.float32)
    n_steps, *cells = series.read_shape(len(values), grid.shape)
    for box in grid.tiles(tuple(cells)):
        reached = 0
        for part in series.days(days, box.slices, n_steps):
            require_wanted()
            values[(slice(reached, reached + len(part)), *box.slices)] = part
            reached += len(part)
    return values


_contexts: dict[str, tuple[PreparePlan, PreparedStore]] = {}
"""By run of a job, the plan and store this worker is busy with; one at most."""


def _context(message: Mapping[str, Any]) -> tuple[PreparePlan, PreparedStore]:
    """Plan and store on a worker, from what the client sent.

    Raises:
        JobError: the worker sees other data than the client did.
    """
    run = message["run"]
    if run not in _contexts:
        options = StorageOptions(message["storage_options"])
        settings = validate(message["settings"], where="job")
        plan = _plan(settings, tuple(message["forcing"]), options)
        period = Period.parse(message["period"])
        if plan.layout.fingerprint != message["fingerprint"] or not plan.daily.period.contains(period):
            raise JobError(
                describe(
                    "a worker sees other data than those that were planned with",
                    where=displayed(message["to"]),
                    expected=f"fingerprint {message['fingerprint']}, days {period}",
                    actual=f"{plan.layout.fingerprint}, days {plan.daily.period}",
                    fix="do not change the data meanwhile, use paths that all hosts share; then start again",
                )
            )
        plan = _until(plan, period)
        _contexts.clear()
        _contexts[run] = plan, PreparedStore(message["to"], plan.layout, options)
    return _contexts[run]


def _require_receipts(plan: PreparePlan, store: PreparedStore) -> None:
    done = store.done()
    missing = [str(block) for block in plan.layout.blocks if str(block) not in done]
    if missing:
        raise JobError(
            describe(
                "stretches of days have no receipt",
                where=displayed(store.url),
                expected=f"receipts of all {len(plan.layout.blocks)} before the store is finished",
                actual=f"none of {len(missing)}, such as {missing[0]}",
                fix="do not delete receipts meanwhile; run h2mv-dist prepare again",
            )
        )


def _refuse_input(plan: PreparePlan, to: str) -> None:
    handles = (*(series.handle for series in plan.daily.forcing), *plan.daily.static)
    if to.rstrip("/") in {handle.url.rstrip("/") for handle in handles}:
        raise ConfigError(f"{displayed(to)} is the input itself; choose another place with --to")


def _require_memory(client: Client, plan: PreparePlan) -> None:
    limit = smallest_memory(client)
    needed = plan.unit_bytes()
    if limit is not None and needed > limit:
        days = plan.layout.blocks[0].n_days
        fitting = max(days * limit // needed, 1)
        raise JobError(
            describe(
                "a shard's days over all space do not fit into a worker",
                where="prepare.shard_days",
                expected=f"at most {format_bytes(limit)}, the smallest worker's limit",
                actual=f"about {format_bytes(needed)} for {days} days",
                fix=f"set prepare.shard_days (a multiple of prepare.chunk_days) to about {fitting}, or start "
                "larger workers",
            )
        )


def _tell_what_is_left_out(plan: PreparePlan) -> None:
    for series in plan.daily.forcing if plan.settings.data.period is None else ():
        if any(series.left_out):
            _log.warning(
                "%s: days that are not whole everywhere are left out: %d steps before %s, %d from %s on",
                *(series.name, series.left_out[0], plan.layout.period.start),
                *(series.left_out[1], plan.daily.period.stop),
            )
    if plan.layout.period != plan.daily.period:
        _log.warning(
            "days from %s on are left out until a stretch of %d days (prepare.shard_days) is whole",
            *(plan.layout.period.stop, plan.layout.shard[0]),
        )


def _warn_of_split_chunks(plan: PreparePlan) -> None:
    lengths = [block.n_days for block in plan.layout.blocks]
    for series in plan.daily.forcing:
        reads = series.chunk_reads(lengths)
        if reads > _OFTEN:
            _log.warning(
                "%s: chunks of the input, %.3g days each, are cut by stretches of %d days and read %.1f "
                "times on average; with a prepare.shard_days that is a multiple of their days, once",
                *(series.name, series.handle.chunks[0] / series.per_day, plan.layout.shard[0], reads),
            )


def _how(series: Series) -> str:
    """How days are made of steps."""
    if series.per_day == 1:
        return f"daily, stamped by {series.stamp}"
    kind = "sum" if series.amounts else "mean"
    return f"{kind} of {series.per_day} steps a day, stamped by {series.stamp}"
