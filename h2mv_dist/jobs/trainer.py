"""One rank's training loop; knows torch.distributed, not Dask.

A step: a batch of cells is drawn from (seed, fold, epoch, step) -> each rank runs its share -> statistics are
summed over ranks -> every rank goes backward through its own cells -> gradients are averaged by DDP ->
all ranks step or none. So the result does not depend on the number of ranks, but for rounding.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from h2mv_dist.config import Settings, StorageOptions, validate
from h2mv_dist.errors import JobError
from h2mv_dist.io.cache import StagedCells, default_cache, stage
from h2mv_dist.io.folds import Fold, fit_scaler, make_folds
from h2mv_dist.io.source import open_source
from h2mv_dist.jobs.batches import gather
from h2mv_dist.jobs.records import FoldRecord, JobFolder
from h2mv_dist.jobs.tasks import Place
from h2mv_dist.model.base import Batch, ProcessModel
from h2mv_dist.model.checkpoint import Checkpoint, code_versions, model_tensors, new_model
from h2mv_dist.model.loss import LossSum, LossValue, summed_over_ranks
from h2mv_dist.model.registry import chosen_targets, model_kind
from h2mv_dist.model.rollout import spin_up
from h2mv_dist.spec import Scaler

COLLECTIVE_TIMEOUT: Final = timedelta(minutes=10)
OPTIMIZER_PREFIX: Final = "optimizer/"

Emit = Callable[..., None]
Cells = NDArray[np.int64]


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


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a fold is; the best epoch is the one with the lowest validation loss."""

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = float("inf")

    def after(self, valid_loss: float) -> "Progress":
        """Progress after one more epoch."""
        if valid_loss < self.best_loss:
            return Progress(self.epoch + 1, self.epoch + 1, valid_loss)
        return replace(self, epoch=self.epoch + 1)

    def record(self) -> dict[str, float]:
        """JSON-able form; a loss that was never finite is left out."""
        best = {"best_loss": self.best_loss} if self.best_epoch else {}
        return {"epoch": self.epoch, "best_epoch": self.best_epoch, **best}

    @staticmethod
    def from_record(record: Mapping[str, float]) -> "Progress":
        """Inverse of :meth:`record`."""
        best = record.get("best_loss", float("inf"))
        return Progress(int(record["epoch"]), int(record["best_epoch"]), best)


def train_rank(message: Mapping[str, Any], place: Place, emit: Emit) -> dict[str, Any]:
    """Train one fold as one of its ranks; returns a summary."""
    settings = validate(message["settings"], where="job")
    options = StorageOptions(message["storage_options"])
    torch.set_num_threads(settings.training.threads)
    staged, published = _staged(settings, options)
    fold = make_folds(staged.grid, settings.folds)[message["fold"]]
    scaler = published if published is not None else fit_scaler(staged, fold)
    record = JobFolder(message["folder"], options).fold(fold.index)
    with process_group(place) as ranks:
        run = FoldRun(settings, staged, fold, scaler, ranks, record, place.attempt, emit)
        return run.train()


def _staged(settings: Settings, options: StorageOptions) -> tuple[StagedCells, Scaler | None]:
    spec = model_kind(settings.model.name).spec
    targets = chosen_targets(spec, settings.training.targets)
    source = open_source(settings.data, forcing=spec.forcing, targets=targets, options=options)
    cache = settings.training.cache
    staged = stage(source, Path(cache) if cache is not None else default_cache())
    return staged, source.published_scaler() if settings.training.scaler == "published" else None


@contextmanager
def process_group(place: Place) -> Iterator[Ranks]:
    """Meet the other ranks; nccl where there is a GPU (always device 0 of what is visible), else gloo."""
    assert place.rendezvous is not None, "ranks of a fold always have a place to meet"
    host, port = place.rendezvous
    gpu = torch.cuda.is_available()
    device = torch.device("cuda:0" if gpu else "cpu")
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=dist.PrefixStore(place.gang, dist.TCPStore(host, port, is_master=False)),
        rank=place.rank,
        world_size=place.world,
        timeout=COLLECTIVE_TIMEOUT,
    )
    yield Ranks(place.rank, place.world, device)
    # only on success: a failed rank leaves at once, and its gang is ended by the coordinator
    dist.barrier()
    dist.destroy_process_group()


def global_loss(
    model: DistributedDataParallel | ProcessModel,
    loss: LossSum,
    batch: Batch,
    spinup_days: int | None,
    all_reduce: Callable[[Tensor], Tensor],
) -> tuple[LossValue, Tensor]:
    """Loss over the batches of all ranks, and the statistics it was formed from.

    Its gradient on a rank is the part of the global gradient that comes from the rank's own cells.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    state = spin_up(bare, batch, spinup_days)
    local = loss.statistics(model(batch, state), batch)
    total = summed_over_ranks(local, all_reduce)
    return loss.value(total), total.detach()


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
        ranks: Ranks,
        record: FoldRecord,
        attempt: int,
        emit: Emit,
    ) -> None:
        self.settings, self.staged, self.fold, self.ranks = settings, staged, fold, ranks
        self.record, self.attempt, self.emit = record, attempt, emit
        self.training = settings.training
        torch.manual_seed(int(np.random.SeedSequence([self.training.seed, fold.index]).generate_state(1)[0]))
        self.model = new_model(settings.model, scaler).to(ranks.device)
        self.loss = model_kind(settings.model.name).loss(scaler)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.training.learning_rate,
            weight_decay=self.training.weight_decay,
        )
        self.progress = Progress()

    def train(self) -> dict[str, Any]:
        """Train until the loss stops falling or all epochs are done; returns a summary."""
        if self.record.has_checkpoint("last"):
            self._restore(self.record.read_checkpoint("last"))
        distributed = DistributedDataParallel(self.model, broadcast_buffers=False)
        while not self._finished():
            self._epoch(distributed)
        if not self.progress.best_epoch:
            raise JobError(
                f"fold {self.fold.index}: the validation loss was not finite in any of "
                f"{self.progress.epoch} epochs; check the targets, or lower training.learning_rate"
            )
        summary = {"fold": self.fold.index, **self.progress.record()}
        if self.ranks.rank == 0:
            self.record.mark_done(summary)
        return summary

    def _finished(self) -> bool:
        waited = self.progress.epoch - self.progress.best_epoch
        return self.progress.epoch >= self.training.epochs or waited >= self.training.patience

    def _epoch(self, distributed: DistributedDataParallel) -> None:
        started = time.monotonic()
        train, skipped = self._train_epoch(distributed)
        valid = self._validate()
        before, self.progress = self.progress, self.progress.after(float(valid.total))
        metrics = {
            **self.progress.record(),
            "train_loss": _finite(train.total),
            "valid_loss": _finite(valid.total),
            "train_terms": self._by_name(train),
            "valid_terms": self._by_name(valid),
            "skipped_steps": skipped,
            "seconds": round(time.monotonic() - started, 3),
        }
        if self.ranks.rank == 0:
            self._store(metrics, improved=self.progress.best_epoch != before.best_epoch)
        shown = ("epoch", "train_loss", "valid_loss", "best_loss", "seconds")
        self.emit(event="epoch", epochs=self.training.epochs, **{k: metrics.get(k) for k in shown})

    def _train_epoch(self, distributed: DistributedDataParallel) -> tuple[LossValue, int]:
        seed = (self.training.seed, self.fold.index, self.progress.epoch + 1)
        total = torch.zeros(len(self.loss.terms), 2, device=self.ranks.device)
        skipped = 0
        for cells in epoch_batches(self.fold.cells("train"), self.training.batch_size, seed):
            statistics = self._step(distributed, self._batch(cells, "train"))
            if statistics is None:
                skipped += 1
            else:
                total += statistics
            self.emit(event="beat")
        return self.loss.value(total), skipped

    def _step(self, distributed: DistributedDataParallel, batch: Batch) -> Tensor | None:
        """One optimizer step; None if loss or gradient is not finite, which all ranks see alike."""
        self.optimizer.zero_grad(set_to_none=True)
        value, statistics = global_loss(
            distributed, self.loss, batch, self.training.spinup_days, self.ranks.all_reduce
        )
        # DDP divides the summed gradients by the number of ranks; the global gradient is their sum
        torch.autograd.backward(value.total * self.ranks.world)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        finite = torch.stack([value.total.detach(), *(g.abs().sum() for g in gradients)]).isfinite().all()
        if not finite:
            return None
        torch.nn.utils.clip_grad_value_(self.model.parameters(), self.training.clip_value)
        self.optimizer.step()
        return statistics

    @torch.no_grad()
    def _validate(self) -> LossValue:
        cells = self.fold.cells("validation")
        total = torch.zeros(len(self.loss.terms), 2, device=self.ranks.device)
        for first in range(0, len(cells), self.training.batch_size):
            batch = self._batch(cells[first : first + self.training.batch_size], "validation")
            spinup = self.training.spinup_days
            total += global_loss(self.model, self.loss, batch, spinup, self.ranks.all_reduce)[1]
            self.emit(event="beat")
        return self.loss.value(total)

    def _batch(self, cells: Cells, role: str) -> Batch:
        return gather(self.staged, self.fold, role, self.ranks.share(cells)).to(self.ranks.device)

    def _by_name(self, value: LossValue) -> dict[str, float | None]:
        return {name: _finite(v) for name, v in zip(self.loss.names, value.terms, strict=True)}

    def _store(self, metrics: Mapping[str, Any], *, improved: bool) -> None:
        """Metrics, then the best checkpoint if it is new, then the last one, which a resume starts from."""
        self.record.write_metrics(self.progress.epoch, metrics)
        if improved:
            self.record.write_checkpoint("best", self._checkpoint(resumable=False), self.attempt)
        self.record.write_checkpoint("last", self._checkpoint(resumable=True), self.attempt)

    def _checkpoint(self, *, resumable: bool) -> Checkpoint:
        tensors = model_tensors(self.model)
        if resumable:
            tensors |= _optimizer_tensors(self.model, self.optimizer) | {"rng": torch.get_rng_state()}
        return Checkpoint(
            model=self.settings.model,
            scaler=self.model.scaler,
            static_names=self.staged.static_names,
            fold=self.fold.index,
            settings=self.training.identity(),
            progress=self.progress.record(),
            tensors=tensors,
            versions=code_versions(),
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.scaler != self.model.scaler:
            raise JobError(
                f"fold {self.fold.index}: the last checkpoint was trained with other input statistics; "
                "the data changed since. Restore them, or choose another job folder"
            )
        self.model.load_state_dict(checkpoint.build_model().state_dict())
        _load_optimizer(self.model, self.optimizer, checkpoint.tensors)
        torch.set_rng_state(checkpoint.tensors["rng"])
        self.progress = Progress.from_record(checkpoint.progress)


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
