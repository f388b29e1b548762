"""Batches to a device and results back: nothing happens on a CPU, on a GPU they are the same."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from h2mv_dist.model.base import Batch
from h2mv_dist.model.transfer import Transfer, _Copied
from tests.model import builders

CPU = torch.device("cpu")


def batches(count: int) -> list[Batch]:
    whole = builders.batch(n_cells=5, n_days=4 * count)
    return [whole.days(first, first + 4) for first in range(0, 4 * count, 4)]


def test_on_a_cpu_nothing_is_copied_or_put_off() -> None:
    transfer, given = Transfer(CPU), batches(3)
    used: list[Tensor] = []
    for batch, same in zip(transfer.ahead(iter(given)), given, strict=True):
        assert batch is same
        transfer.bring([batch.forcing], used.extend)
        assert used[-1] is same.forcing
    assert len(used) == len(given)


class Told(Transfer):
    """Tells what is done when, and copies nothing."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda"))
        self.log: list[str] = []

    def _to_device(self, tensors: Sequence[Tensor]) -> _Copied:
        self.log.append(f"send {sum(line.startswith('send') for line in self.log)}")
        return _Copied(tuple(tensors), torch.Event("cpu"))

    def _arrived(self, copied: _Copied) -> Batch:
        forcing, static = copied.tensors
        return Batch(forcing, static, {})

    def _to_host(self, tensors: Sequence[Tensor]) -> _Copied:
        return _Copied(tuple(tensors), Done("cpu"))


class Done(torch.Event):
    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_batches_go_one_ahead_and_results_come_one_behind(count: int) -> None:
    transfer = Told()
    for i, _ in enumerate(transfer.ahead(batches(count))):
        transfer.log.append(f"compute {i}")
        for member in range(2):
            transfer.bring([], lambda _, i=i, member=member: transfer.log.append(f"use {i} {member}"))  # type: ignore[misc]
    for i in range(count):
        computed = transfer.log.index(f"compute {i}")
        assert transfer.log[: computed + 1].count(f"send {min(i + 1, count - 1)}") == 1
        assert f"send {i + 2}" not in transfer.log[:computed]
        if i + 1 < count:
            assert computed < transfer.log.index(f"compute {i + 1}") < transfer.log.index(f"use {i} 0")
        if i + 2 < count:
            assert transfer.log.index(f"use {i} 1") < transfer.log.index(f"compute {i + 2}")
    used = [line for line in transfer.log if line.startswith("use")]
    assert used == [f"use {i} {member}" for i in range(count) for member in range(2)]


def test_what_a_failed_run_left_is_dropped() -> None:
    transfer = Told()
    for _ in transfer.ahead(batches(3)):
        transfer.bring([], lambda _: pytest.fail("of a run that failed"))
        break
    assert not [*transfer.ahead([])]


@pytest.mark.gpu
def test_a_gpu_gets_and_gives_back_the_same_values() -> None:
    gpu = torch.device("cuda:0")
    transfer, given, found = Transfer(gpu), batches(9), list[Tensor]()
    weights = torch.randn(2048, 2048, device=gpu)
    for batch in transfer.ahead(given):
        # long enough for a copy that does not wait to be seen
        busy = torch.linalg.matrix_power(weights, 8)
        assert batch.forcing.is_cuda
        assert batch.static.is_cuda
        doubled = 2 * batch.forcing + 0 * busy[0, 0].nan_to_num(0, 0, 0)
        transfer.bring(
            [doubled.swapaxes(0, 1), batch.static], lambda host: found.extend(t.clone() for t in host)
        )
        del doubled
    assert len(found) == 2 * len(given)
    for batch, forcing, static in zip(given, found[::2], found[1::2], strict=True):
        torch.testing.assert_close(forcing, 2 * batch.forcing.swapaxes(0, 1), rtol=0, atol=0)
        torch.testing.assert_close(static, batch.static, rtol=0, atol=0)


@pytest.mark.gpu
def test_no_cells_go_to_a_gpu_and_back() -> None:
    transfer, found = Transfer(torch.device("cuda:0")), list[Tensor]()
    for batch in transfer.ahead(batch.cells(0, 0) for batch in batches(2)):
        transfer.bring([batch.forcing], found.extend)
    assert [tuple(t.shape) for t in found] == [(0, 4, 3)] * 2
