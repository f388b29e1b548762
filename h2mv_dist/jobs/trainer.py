"""One rank's training loop; knows torch.distributed, not Dask.

A step: a batch of cells is drawn from (seed, fold, epoch, step) -> each rank runs its share -> statistics are
summed over ranks -> every rank goes backward through its own cells -> gradients are averaged by DDP ->
all ranks step or none. So the result does not depend on the number of ranks, but for rounding.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from h2mv_dist.config import Settings, StorageOptions, validate
from h2mv_dist.errors import JobError, StoreError, describe
from h2mv_dist.io.cache import StagedCells, default_cache, is_staged, open_staged, stage_once
from h2mv_dist.io.folds import Fold, fit_scaler, make_folds, require_observations
from h2mv_dist.io.source import Source, open_source
from h2mv_dist.io.stores import displayed
from h2mv_dist.jobs.batches import CellBank, Cells
from h2mv_dist.jobs.code_path import COMPILED, Way
from h2mv_dist.jobs.decisions import Begun, decided, work_of
from h2mv_dist.jobs.gradient import Objective, Outcome, SkippedStep, averaging
from h2mv_dist.jobs.memory import give_back_freed_memory, set_apart_what_is_loaded
from h2mv_dist.jobs.messages import Failure, Place, RankError, Share
from h2mv_dist.jobs.preflight import Facts, agree, bytes_of_way, check_all_reduce, gather_facts
from h2mv_dist.jobs.probe import cell_days_a_second
from h2mv_dist.jobs.records import FoldRecord, FoldWriter, JobFolder
from h2mv_dist.model.base import Batch, ProcessModel
from h2mv_dist.model.checkpoint import Checkpoint, code_versions, model_tensors, new_model
from h2mv_dist.model.days import telling_more
from h2mv_dist.model.networks import multiply_in
from h2mv_dist.model.registry import chosen_targets, model_kind
from h2mv_dist.model.rollout import warm_up
from h2mv_dist.spec import Scaler

MEETING_TIMEOUT: Final = timedelta(hours=6)
"""How long ranks wait for each other to stage; one that is gone ends its gang much sooner."""
REACH_TIMEOUT: Final = timedelta(seconds=60)
"""How long a rank tries to reach the others at all."""
BEAT_SECONDS: Final = 2.0
POLL_SECONDS: Final = 0.02
STORE_PATIENCE_SECONDS: Final = 3600.0
"""How long a rank waits for a store that has no space left before it gives up."""
OPTIMIZER_PREFIX: Final = "optimizer/"
PART_STATISTICS: Final = "epoch/statistics"
_CHECKED: Final = ("model", "fold", "scaler", "static features")

Emit = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank among those that train a fold."""

    rank: int
    world: int
    device: torch.device

    def share(self, cells: Cells) -> Cells:
        """The rank's part of a batch; parts differ by one cell at most and may be empty."""
        return np.array_split(cells, self.world)[self.rank]

    @staticmethod
    def all_reduce(tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all ranks get the same answer."""
        return bool(self.all_reduce(torch.full((1,), float(flag), device=self.device)) > 0)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a fold is; the best epoch is the one with the lowest validation loss.

    ``rate_cuts`` says how often the learning rate was lowered.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = float("inf")
    rate_cuts: int = 0

    def after(self, valid_loss: float, plateau_epochs: int | None = None) -> "Progress":
        """Progress after one more epoch; the rate is cut each ``plateau_epochs`` without a better one."""
        epoch = self.epoch + 1
        if valid_loss < self.best_loss:
            return Progress(epoch, epoch, valid_loss, self.rate_cuts)
        cut = plateau_epochs is not None and (epoch - self.best_epoch) % plateau_epochs == 0
        return replace(self, epoch=epoch, rate_cuts=self.rate_cuts + cut)

    def learning_rate(self, first: float, factor: float) -> float:
        """The rate after all cuts.

        >>> Progress(rate_cuts=2).learning_rate(0.01, 0.5)
        0.0025
        """
        return float(first * factor**self.rate_cuts)

    def record(self) -> dict[str, float]:
        """JSON-able form; a loss that was never finite is left out."""
        best = {"best_loss": self.best_loss} if self.best_epoch else {}
        cuts = {"rate_cuts": self.rate_cuts} if self.rate_cuts else {}
        return {"epoch": self.epoch, "best_epoch": self.best_epoch, **best, **cuts}

    @staticmethod
    def from_record(record: Mapping[str, float]) -> "Progress":
        """Inverse of :meth:`record`."""
        best = record.get("best_loss", float("inf"))
        cuts = int(record.get("rate_cuts", 0))
        return Progress(int(record["epoch"]), int(record["best_epoch"]), best, cuts)


@dataclass(slots=True)
class EpochPart:
    """What has been done of the epoch that is under way.

    Attributes:
        steps: taken or skipped.
        statistics: of the loss so far, [term, 2].
        skipped: steps whose loss or gradient was not finite.
    """

    steps: int
    statistics: Tensor
    skipped: list[SkippedStep]

    def counted(self) -> Tensor:
        """The statistics; NaN if no step was taken, which is no loss of 0."""
        nothing = len(self.skipped) == self.steps
        return torch.full_like(self.statistics, torch.nan) if nothing else self.statistics


def train_rank(
    message: Mapping[str, Any], place: Place, share: Share, emit: Emit, leave: Callable[[], bool]
) -> dict[str, Any] | None:
    """Train one fold as one of its ranks.

    Args:
        message: the unit, see :func:`h2mv_dist.jobs.training.start_training`.
        place: which rank of which attempt this is.
        share: what it gets of its worker.
        emit: reports to the supervisor.
        leave: whether this rank was asked to make a checkpoint and leave.

    Returns:
        A summary, or None if the ranks left before the end.

    Raises:
        H2mvError: the gang must not start, or cannot go on.
    """
    settings = validate(message["settings"], where="job")
    options = StorageOptions(message["storage_options"])
    job = JobFolder(message["folder"], options)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    claimed: list[FoldWriter] = []

    def decide(everyone: Sequence[Facts]) -> dict[str, Any]:
        claimed.append(job.fold(message["fold"]).claim(place.attempt, place.gang))
        begun = Begun(claimed[0].record, place.world, device.type)
        work = work_of(settings.training, len(fold.cells("train")), staged.period.n_days, place.world)
        return decided(begun, settings, work, share.nthreads, everyone, measure)

    def measure(threads: Sequence[int], way: Way) -> dict[int, float]:
        return cell_days_a_second(settings, staged, fold, scaler, threads, way)

    # hosts may take very different times to stage
    with beating(emit):
        JobFolder(message["root"], options).require_token(message["token"])
        staged = _staged(settings, message["data"], options)
        fold = make_folds(staged.grid, settings.folds)[message["fold"]]
        require_observations(staged, fold, "validation")
        scaler = Scaler.from_dict(message["scaler"]) if message["scaler"] else fit_scaler(staged, fold)
        store = meet(place)
        facts = gather_facts(settings, staged, len(fold.cells("train")), device, share.memory)
        decisions = agree(store, place, facts, decide)
        torch.set_num_threads(decisions["threads"])
        way = Way(decisions["code_path"] == COMPILED, decisions["recompute"])
    with process_group(store, place, settings.training.stuck_seconds, device) as ranks:
        check_all_reduce(ranks.world, device)
        writer = claimed[0] if claimed else None
        record = job.fold(fold.index)
        # cells may take long to reach a device
        with beating(emit):
            run = FoldRun(settings, staged, fold, scaler, way, ranks, record, writer, store, emit, leave)
        with telling_more():
            return run.train(message["submitted"])


def _staged(settings: Settings, key: str, options: StorageOptions) -> StagedCells:
    """The cells the client saw; of each host, one process opens the store, unless that was done before."""
    cache, limit = settings.training.cache, settings.training.cache_limit
    folder = Path(cache) if cache is not None else default_cache()
    if is_staged(folder, key):
        return open_staged(folder / key)
    return stage_once(lambda: _source_seen_by_client(settings, key, options), key, folder, limit)


def _source_seen_by_client(settings: Settings, key: str, options: StorageOptions) -> Source:
    spec = model_kind(settings.model.name).spec
    targets = chosen_targets(spec, settings.training.targets)
    source = open_source(settings.data, forcing=spec.forcing, targets=targets, options=options)
    if source.cache_key != key:
        raise JobError(
            describe(
                "the data changed since the job was submitted",
                where=displayed(settings.data.url),
                expected=f"fingerprint {key}",
                actual=f"fingerprint {source.cache_key}",
                fix="let the data be while a job runs, then submit it again",
            )
        )
    return source


@contextmanager
def beating(emit: Emit) -> Iterator[None]:
    """Give signs of life while work goes on that has no steps."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            emit(event="beat")

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def meet(place: Place) -> dist.Store:
    """The store of the gang's rank 0, where the ranks find each other; one of its own for a rank alone.

    Raises:
        RankError: it cannot be reached from here.
    """
    if place.world == 1:
        return dist.HashStore()
    assert place.rendezvous is not None, "several ranks always have a place to meet"
    host, port = place.rendezvous
    try:
        store = dist.TCPStore(host, port, is_master=False, timeout=REACH_TIMEOUT)
    except dist.DistError as error:
        raise RankError(Failure("failed", _unreachable(place, error))) from error
    store.set_timeout(MEETING_TIMEOUT)
    return dist.PrefixStore(place.gang, store)


def _unreachable(place: Place, error: Exception) -> str:
    host, port = place.rendezvous or ("", 0)
    return describe(
        "the ranks cannot reach each other",
        where=f"rank {place.rank} on {socket.gethostname()}, connecting to {host} port {port}",
        expected=f"the first rank's worker to answer within {REACH_TIMEOUT.total_seconds():g} s",
        actual=str(error).splitlines()[0],
        fix="let all workers listen on a network they share (cluster.interface, or --interface), and open "
        "the ports between their hosts (cluster.port_range, or --worker-port)",
    )


@contextmanager
def process_group(
    store: dist.Store, place: Place, timeout_seconds: float, device: torch.device
) -> Iterator[Ranks]:
    """Join the other ranks; nccl on GPUs (always device 0 of what is visible), else gloo."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=place.rank,
        world_size=place.world,
        timeout=timedelta(seconds=timeout_seconds),
    )
    yield Ranks(place.rank, place.world, device)
    # only on success: a failed rank leaves at once, and its gang is ended by the coordinator
    dist.barrier()
    dist.destroy_process_group()


def epoch_batches(cells: Cells, batch_size: int, seed: tuple[int, ...]) -> list[Cells]:
    """Shuffle cells with a generator of their own and cut them into batches; the last may be smaller.

    >>> [b.tolist() for b in epoch_batches(np.arange(5), 2, (0, 1))]
    [[1, 4], [3, 0], [2]]
    """
    order = np.random.default_rng(seed).permutation(cells)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


class FoldRun:
    """The training of one fold on one rank."""

    def __init__(
        self,
        settings: Settings,
        staged: StagedCells,
        fold: Fold,
        scaler: Scaler,
        way: Way,
        ranks: Ranks,
        record: FoldRecord,
        writer: FoldWriter | None,
        store: dist.Store,
        emit: Emit,
        leave: Callable[[], bool],
    ) -> None:
        self.settings, self.staged, self.fold, self.ranks = settings, staged, fold, ranks
        self.record, self.writer, self.store = record, writer, store
        self.emit, self.leave, self.written = emit, leave, 0
        self.training = settings.training
        torch.manual_seed(int(np.random.SeedSequence([self.training.seed, fold.index]).generate_state(1)[0]))
        self.model = new_model(settings.model, scaler).to(ranks.device)
        multiply_in(self.model, self.training.precision)
        needed = bytes_of_way(settings, len(fold.cells("train")), staged.period.n_days, way)
        self.bank = CellBank.open(staged, fold, ranks.device, needed)
        self.loss = model_kind(settings.model.name).loss(scaler)
        self._prepare(way)
        self.objective = Objective(
            loss=self.loss,
            spinup_days=self.training.spinup_days,
            cells_at_once=self.training.cells_at_once,
            truncation_days=self.training.truncation_days,
            world=ranks.world,
            all_reduce=ranks.all_reduce,
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.training.learning_rate,
            weight_decay=self.training.weight_decay,
        )
        self.progress = Progress()
        self.part = self._new_epoch()

    def _prepare(self, way: Way) -> None:
        """Make the model ready to run in the way that was decided on."""
        largest = min(self.training.batch_size, len(self.fold.cells("train")))
        share = -(-largest // self.ranks.world)
        self.model.compiled, self.model.recompute = way.compiled, way.recompute
        self.model.width = min(share, self.training.cells_at_once or share)
        if way.compiled:
            warm_up(self.model, self.loss.reads, gradient=True)
            # ranks of a host compile in turn what is new; collectives would not wait that long
            self.store.add("compiled", 1)
            while self.store.add("compiled", 0) < self.ranks.world:
                time.sleep(POLL_SECONDS)

    def train(self, submitted: float) -> dict[str, Any] | None:
        """Train until the loss stops falling or all epochs are done.

        Args:
            submitted: when the job was, seconds since 1970; the time to the first step is reported.

        Returns:
            A summary, or None if a rank was asked to leave; then a checkpoint was made.
        """
        self.submitted: float | None = submitted
        with beating(self.emit):
            if self.record.has_checkpoint("last"):
                self._restore(self.record.read_checkpoint("last"))
            distributed = averaging(self.model)
            set_apart_what_is_loaded()
        while not self._finished():
            validated = self._validate() if self._train_epoch(distributed) else None
            if validated is None:
                self._persist(self._store_part)
                return None
            self._end_epoch(validated)
        if not self.progress.best_epoch:
            raise JobError(
                f"fold {self.fold.index}: the validation loss was not finite in any of "
                f"{self.progress.epoch} epochs; check the targets, or lower training.learning_rate"
            )
        summary = {"fold": self.fold.index, **self.progress.record()}
        self._persist(lambda writer: writer.mark_done(summary))
        return summary

    def _finished(self) -> bool:
        waited = self.progress.epoch - self.progress.best_epoch
        return self.progress.epoch >= self.training.epochs or waited >= self.training.patience

    def _new_epoch(self) -> EpochPart:
        self.epoch_started, self.computing = time.monotonic(), 0.0
        return EpochPart(0, torch.zeros(len(self.loss.terms), 2, device=self.ranks.device), [])

    def _train_epoch(self, distributed: DistributedDataParallel) -> bool:
        """Take the steps that are left of this epoch; False if a rank was asked to leave before the end."""
        rate = self.progress.learning_rate(self.training.learning_rate, self.training.plateau_factor)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed = (self.training.seed, self.fold.index, self.progress.epoch + 1)
        batches = epoch_batches(self.fold.cells("train"), self.training.batch_size, seed)
        for cells in batches[self.part.steps :]:
            if self.ranks.any(self.leave()):
                return False
            batch = self._batch(cells, "train")
            outcome = self._step(distributed, batch)
            self.part.steps += 1
            if outcome.fault:
                self._skip(cells, batch, outcome.fault)
            else:
                self.part.statistics += outcome.statistics
            self._tell_step()
        return True

    def _tell_step(self) -> None:
        if self.submitted is None:
            self.emit(event="beat")
        else:
            self.emit(event="first step", seconds_since_submit=round(time.time() - self.submitted, 3))
            self.submitted = None

    def _end_epoch(self, validated: Tensor) -> None:
        trained = self.part.counted()
        train, valid = self.loss.value(trained), self.loss.value(validated)
        before = self.progress
        self.progress = before.after(float(valid.total), self.training.plateau_epochs)
        metrics = {
            **self.progress.record(),
            "train_loss": _finite(train.total),
            "valid_loss": _finite(valid.total),
            "train_terms": self._terms(trained),
            "valid_terms": self._terms(validated),
            "skipped": [step._asdict() for step in self.part.skipped],
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": round(time.monotonic() - self.epoch_started, 3),
            "seconds_computing": round(self.computing, 3),
        }
        self.part = self._new_epoch()
        improved = self.progress.best_epoch != before.best_epoch
        self._persist(lambda writer: self._store_epoch(writer, metrics, improved))
        shown = ("epoch", "train_loss", "valid_loss", "best_loss", "learning_rate", "skipped", "seconds")
        self.emit(event="epoch", **{k: metrics.get(k) for k in shown})

    def _step(self, distributed: DistributedDataParallel, batch: Batch) -> Outcome:
        """One optimizer step, unless loss or gradient is not finite, which all ranks see alike."""
        with self._computing():
            self.optimizer.zero_grad(set_to_none=True)
            outcome = self.objective.gradient(distributed, batch)
            if not outcome.fault:
                torch.nn.utils.clip_grad_value_(self.model.parameters(), self.training.clip_value)
                self.optimizer.step()
        return outcome

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Count the time: what is left of an epoch is spent on data and records."""
        started = time.monotonic()
        yield
        self.computing += time.monotonic() - started

    def _skip(self, cells: Cells, batch: Batch, fault: str) -> None:
        """Find out whose fault it is, over all ranks, and say so."""
        mine = torch.from_numpy(self.ranks.share(np.arange(len(cells))))
        bad = self.objective.culprits(self.model, batch, mine, len(cells))
        skipped = SkippedStep(self.part.steps, cells[bad.cpu().numpy()].tolist(), fault)
        self.part.skipped.append(skipped)
        if self.ranks.rank == 0:
            print(f"epoch {self.progress.epoch + 1}: {skipped}", flush=True)

    def _validate(self) -> Tensor | None:
        """Statistics of all validation cells, [term, 2]; None if a rank was asked to leave before the end."""
        give_back_freed_memory()
        cells = self.fold.cells("validation")
        total = torch.zeros(len(self.loss.terms), 2, device=self.ranks.device)
        for first in range(0, len(cells), self.training.batch_size):
            if self.ranks.any(self.leave()):
                return None
            batch = self._batch(cells[first : first + self.training.batch_size], "validation")
            with self._computing():
                total += self.objective.evaluate(self.model, batch)
            self.emit(event="beat")
        return total

    def _batch(self, cells: Cells, role: str) -> Batch:
        return self.bank.gather(role, self.ranks.share(cells))

    def _terms(self, statistics: Tensor) -> dict[str, float | None]:
        """Each term by name; None where it is not finite, or nothing was observed."""
        terms, observed = self.loss.value(statistics).terms, self.loss.observed(statistics)
        named = zip(self.loss.names, terms, observed, strict=True)
        return {name: _finite(value) if seen else None for name, value, seen in named}

    def _persist(self, write: Callable[[FoldWriter], None]) -> None:
        """Let rank 0 write; while there is no space left, it waits, and the other ranks wait for it.

        Not in a collective, which would time out meanwhile; they give signs of life as long as rank 0 does.
        """
        self.written += 1
        written, beats = f"written/{self.written}", f"beats/{self.written}"
        if self.writer is not None:

            def beat(**event: Any) -> None:
                self.emit(**event)
                self.store.add(beats, 1)

            with beating(beat):
                _until_there_is_space(partial(write, self.writer), self.emit)
            self.store.set(written, "")
            return
        heard = 0
        while not self.store.check([written]):
            before, heard = heard, self.store.add(beats, 0)
            if heard != before:
                self.emit(event="beat")
            time.sleep(POLL_SECONDS)

    def _store_epoch(self, writer: FoldWriter, metrics: Mapping[str, Any], improved: bool) -> None:
        last = self._checkpoint(resumable=True)
        best = self._checkpoint(resumable=False) if improved else None
        every = self.training.keep_every
        keep = every is not None and self.progress.epoch % every == 0
        writer.write_epoch(self.progress.epoch, metrics, last, best, keep)

    def _store_part(self, writer: FoldWriter) -> None:
        writer.write_within_epoch(self.progress.epoch, self._checkpoint(resumable=True))

    def _checkpoint(self, *, resumable: bool) -> Checkpoint:
        tensors = model_tensors(self.model)
        if resumable:
            tensors |= _optimizer_tensors(self.model, self.optimizer) | {"rng": torch.get_rng_state()}
        progress: dict[str, Any] = self.progress.record()
        if resumable and self.part.steps:
            tensors[PART_STATISTICS] = self.part.statistics.clone()
            progress |= {"steps": self.part.steps, "skipped": [step._asdict() for step in self.part.skipped]}
        return Checkpoint(
            model=self.settings.model,
            scaler=self.model.scaler,
            static_names=self.staged.static_names,
            fold=self.fold.index,
            settings=self.training.identity(),
            progress=progress,
            tensors=tensors,
            versions=code_versions(),
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        found = (checkpoint.model, checkpoint.fold, checkpoint.scaler, checkpoint.static_names)
        wanted = (self.settings.model, self.fold.index, self.model.scaler, self.staged.static_names)
        for name, theirs, ours in zip(_CHECKED, found, wanted, strict=True):
            if theirs != ours:
                raise JobError(
                    describe(
                        f"the last checkpoint is of another {name}",
                        where=self.record.url,
                        expected=str(ours),
                        actual=str(theirs),
                        fix="restore settings and data, or choose another job folder",
                    )
                )
        self.model.load_state_dict(checkpoint.build_model().state_dict())
        _load_optimizer(self.model, self.optimizer, checkpoint.tensors)
        torch.set_rng_state(checkpoint.tensors["rng"])
        self.progress = Progress.from_record(checkpoint.progress)
        if PART_STATISTICS in checkpoint.tensors:
            self.part.steps = int(checkpoint.progress["steps"])
            self.part.skipped = [SkippedStep(**step) for step in checkpoint.progress["skipped"]]
            self.part.statistics = checkpoint.tensors[PART_STATISTICS].to(self.ranks.device)


def _until_there_is_space(write: Callable[[], None], emit: Emit) -> None:
    """Try again while the store says that it is full, at most for an hour."""
    deadline, pause = time.monotonic() + STORE_PATIENCE_SECONDS, 1.0
    while True:
        try:
            return write()
        except StoreError as error:
            if not error.full or time.monotonic() > deadline:
                raise
            emit(event="waiting", reason=str(error))
            time.sleep(pause)
            pause = min(2 * pause, 30.0)


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def _optimizer_tensors(model: ProcessModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{OPTIMIZER_PREFIX}{slot}/{name}": value.detach().clone()
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state[parameter].items()
    }


def _load_optimizer(
    model: ProcessModel, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    position = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    for key, value in tensors.items():
        if key.startswith(OPTIMIZER_PREFIX):
            slot, name = key.removeprefix(OPTIMIZER_PREFIX).split("/", 1)
            state.setdefault(position[name], {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
