"""What one optimizer step needs before it: the loss over the batches of all ranks, and its gradient.

A rank that cannot hold a graph for its whole share works in pieces of cells, and blocks of days if gradients
are truncated. The first pass runs every piece without a graph and keeps the outputs the loss reads; their
statistics are summed over pieces and ranks, the loss is formed, and so is its gradient with respect to those
outputs. The second pass runs every piece again, with a graph, and sends that gradient backward. So memory is
bounded by one piece, and any loss is exact whose statistics add up over cells.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from h2mv_dist.model.base import Batch, ProcessModel, Result, State, detach
from h2mv_dist.model.loss import LossSum, LossValue, summed_over_ranks
from h2mv_dist.model.rollout import spin_up

LOSS_FAULT: Final = "the loss is not finite"
GRADIENT_FAULT: Final = "the gradient is not finite"


class Outcome(NamedTuple):
    """What all ranks agree on before they step.

    Attributes:
        value: the loss over all ranks.
        statistics: what it was formed from, [term, 2].
        fault: why no rank may step; empty if all may.
    """

    value: LossValue
    statistics: Tensor
    fault: str


class SkippedStep(NamedTuple):
    """A step that no rank took.

    Attributes:
        step: number in its epoch, from 1.
        cells: positions among the land cells of those whose own statistics are not finite; none if only
            their sum or the gradient is not.
        reason: what was not finite.
    """

    step: int
    cells: list[int]
    reason: str

    def __str__(self) -> str:
        found = f"land cells {', '.join(map(str, self.cells))}" if self.cells else "no single cell"
        return f"step {self.step} skipped: {self.reason} ({found})"


def averaging(model: ProcessModel) -> DistributedDataParallel:
    """A model whose way back averages gradients over ranks, each parameter's by itself.

    By default DDP sends several as one, and after a process's first step arranges them anew: three ranks that
    go on from a checkpoint would then add in another order than ranks that were never interrupted.
    """
    distributed = DistributedDataParallel(model, forward_sync_buffers=False)
    distributed.register_comm_hook(None, _averaged_by_itself)
    return distributed


def _averaged_by_itself(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    ranks = dist.get_world_size()
    sums = [dist.all_reduce(slope.div_(ranks), async_op=True) for slope in bucket.gradients()]

    def averaged(sent: torch.futures.Future[list[torch.futures.Future[list[Tensor]]]]) -> Tensor:
        for each in sent.value():
            # raises if another rank is gone
            each.value()
        return bucket.buffer()

    return torch.futures.collect_all([each.get_future() for each in sums]).then(averaged)


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
    state = spin_up(bare, batch, spinup_days, loss.reads)
    local = loss.statistics(model(batch, state, loss.reads), batch)
    total = summed_over_ranks(local, all_reduce)
    return loss.value(total), total.detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a step makes smaller, over all ranks.

    Attributes:
        loss: the terms.
        spinup_days: run before each simulation; None for the whole period.
        cells_at_once: most cells to hold a graph for; None for a rank's whole share.
        truncation_days: gradients do not flow back across multiples of so many days; None for no limit.
        world: number of ranks.
        all_reduce: sums a tensor without graph over all ranks, in place.
    """

    loss: LossSum
    spinup_days: int | None
    cells_at_once: int | None = None
    truncation_days: int | None = None
    world: int
    all_reduce: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def evaluate(self, model: ProcessModel, batch: Batch) -> Tensor:
        """Statistics of the loss over the batches of all ranks, [term, 2]; in pieces too."""
        return self.all_reduce(sum_of(self._statistics(run) for run in self._runs(model, batch)))

    def gradient(self, model: DistributedDataParallel, batch: Batch) -> Outcome:
        """Fill the gradients of all parameters, on all ranks alike; they have none before.

        Args:
            model: its gradients are averaged over ranks once, whatever the number of pieces.
            batch: this rank's share of the cells; may be empty.
        """
        if self.cells_at_once is None and self.truncation_days is None:
            value, statistics = global_loss(model, self.loss, batch, self.spinup_days, self.all_reduce)
            # DDP divides the summed gradients by the number of ranks; the global gradient is their sum
            torch.autograd.backward(value.total * self.world)
        else:
            value, statistics = self._backward_in_pieces(model, batch)
        return Outcome(value, statistics, self._fault(model, value))

    @torch.no_grad()
    def culprits(self, model: ProcessModel, batch: Batch, positions: Tensor, n_cells: int) -> Tensor:
        """Which cells of the global batch have statistics of their own that are not finite, [cell], bool.

        Args:
            model: without its distributed wrapper.
            batch: this rank's share of the cells.
            positions: where those cells are in the global batch, [cell of the share].
            n_cells: size of the global batch.
        """
        own = [self._statistics(cell) for run in self._runs(model, batch) for cell in run.single_cells()]
        found = batch.forcing.new_zeros(n_cells)
        for position, statistics in zip(positions.tolist(), own, strict=True):
            found[position] = ~statistics.isfinite().all()
        return self.all_reduce(found) > 0

    def _fault(self, model: DistributedDataParallel, value: LossValue) -> str:
        """The same answer on all ranks, also if their arithmetic should differ."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        checked = torch.stack([value.total.detach(), *(g.abs().sum() for g in gradients)])
        bad = ~checked.isfinite()
        loss, gradient = self.all_reduce(torch.stack([bad[0], bad[1:].any()]).float()).tolist()
        return LOSS_FAULT if loss else GRADIENT_FAULT if gradient else ""

    def _backward_in_pieces(self, model: DistributedDataParallel, batch: Batch) -> tuple[LossValue, Tensor]:
        runs = list(self._runs(model.module, batch))
        with torch.no_grad():
            total = self.all_reduce(sum_of(self._statistics(run) for run in runs))
        value = self.loss.value(total.requires_grad_())
        if not value.total.isfinite():
            return value, total.detach()
        (slopes,) = torch.autograd.grad(value.total * self.world, total)
        for run in runs:
            self._backward(model, run, slopes, last=run is runs[-1])
        return value, total.detach()

    def _runs(self, model: ProcessModel, batch: Batch) -> Iterator["_Run"]:
        """Run one piece of cells after the other, without a graph; an empty batch is one piece."""
        for first, stop in _cuts(batch.n_cells, self.cells_at_once):
            piece = batch.cells(first, stop)
            state = spin_up(model, piece, self.spinup_days, self.loss.reads)
            yield _Run(piece, state, self._outputs(model, piece, state))

    @torch.no_grad()
    def _outputs(self, model: ProcessModel, piece: Batch, state: State) -> Result:
        blocks: list[Result] = []
        for first, stop in _cuts(piece.n_days, self.truncation_days):
            result = model(piece.days(first, stop), state, self.loss.reads)
            state = result.state
            blocks.append(result.only(self.loss.reads))
        daily = {name: torch.cat([b.daily[name] for b in blocks], dim=1) for name in blocks[0].daily}
        return Result(daily, blocks[0].static, blocks[0].constants, state)

    def _statistics(self, run: "_Run") -> Tensor:
        return self.loss.statistics(run.outputs, run.batch)

    def _backward(self, model: DistributedDataParallel, run: "_Run", slopes: Tensor, *, last: bool) -> None:
        """Send the loss' gradient backward through one piece of cells, block of days by block of days.

        Args:
            model: its ranks meet in the last block of the last piece, and nowhere else.
            run: the piece.
            slopes: derivative of the loss with respect to the statistics, [term, 2].
            last: whether this is the rank's last piece.
        """
        wanted = _output_gradients(self.loss, run, slopes)
        state = run.state
        for first, stop in _cuts(run.batch.n_days, self.truncation_days):
            meeting = last and stop == run.batch.n_days
            with nullcontext() if meeting else model.no_sync():
                result = model(run.batch.days(first, stop), state, self.loss.reads)
                pairs = list(_pairs(result, wanted, first, stop))
                if meeting:
                    # DDP waits for every parameter, also for those that a short block does not need
                    pairs += [(p, torch.zeros_like(p)) for p in model.parameters()]
                torch.autograd.backward([p[0] for p in pairs], [p[1] for p in pairs])
            state = detach(result.state)


class _Run(NamedTuple):
    """A piece of cells that ran over all days.

    Attributes:
        batch: the piece.
        state: before the first day.
        outputs: those the loss reads, without graph.
    """

    batch: Batch
    state: State
    outputs: Result

    def single_cells(self) -> Iterator["_Run"]:
        """Each cell by itself."""
        for first, stop in _cuts(self.batch.n_cells, 1):
            if first < stop:
                state = tuple(s[first:stop] for s in self.state)
                yield _Run(self.batch.cells(first, stop), state, self.outputs.cells(first, stop))


def sum_of(tensors: Iterator[Tensor]) -> Tensor:
    """Sum of at least one tensor, in order."""
    total = next(tensors)
    for tensor in tensors:
        total = total + tensor
    return total


def _cuts(length: int, size: int | None) -> Iterator[tuple[int, int]]:
    """First and stop of parts of a size; one part, maybe empty, without a size or a length."""
    edges = [0, *range(size or length or 1, length, size or length or 1), length]
    return pairwise(edges)


def _output_gradients(loss: LossSum, run: _Run, slopes: Tensor) -> Result:
    """Gradient of the loss with respect to the outputs of a piece; the graph holds the loss only."""
    leaves = run.outputs.each(lambda output: output.detach().requires_grad_())
    with torch.enable_grad():
        statistics = loss.statistics(leaves, run.batch)
    gradients = torch.autograd.grad(statistics, leaves.outputs(), slopes, materialize_grads=True)
    remaining = iter(gradients)
    return leaves.each(lambda _: next(remaining))


def _pairs(result: Result, wanted: Result, first: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs of a block of days and their gradients; what has no days counts in the first block."""
    pairs = [(result.daily[k], v[:, first:stop]) for k, v in wanted.daily.items()]
    if first == 0:
        pairs += [(result.static[k], v) for k, v in wanted.static.items()]
        pairs += [(result.constants[k], v) for k, v in wanted.constants.items()]
    return (pair for pair in pairs if pair[0].requires_grad)
