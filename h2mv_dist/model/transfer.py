"""Batches to a GPU and results back, through pinned memory and on a stream of their own, while it computes.

On a CPU nothing is copied. Pinned memory is torch's: it is kept and used again once a copy out of or into it
is done, so what it takes is what two batches and the results of two take.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from h2mv_dist.model.base import Batch

Use = Callable[[Sequence[Tensor]], None]
"""Takes tensors on the host."""


class _Copied(NamedTuple):
    """Tensors that are being copied.

    Attributes:
        tensors: the copies.
        done: recorded behind the copying.
    """

    tensors: tuple[Tensor, ...]
    done: torch.Event


class Transfer:
    """Takes batches to a device one ahead, and brings what is made of them back one behind."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._coming: deque[tuple[_Copied, Use]] = deque()

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches on the device, without targets; the next is copied while one is used.

        When they end, all that :meth:`bring` was given meanwhile has been used; until then, no more than what
        belongs to two batches is waiting.
        """
        if self.device.type == "cpu":
            yield from batches
            return
        # of a run that failed
        self._coming.clear()
        yield from self._ahead(batches)
        self._use(len(self._coming))

    def bring(self, tensors: Sequence[Tensor], use: Use) -> None:
        """Give ``use`` the tensors on the host: at once on a CPU, else at the latest when the batches end.

        What it is given is its own only during the call. The tensors must not be changed in place afterwards.
        """
        if self.device.type == "cpu":
            use(tensors)
        else:
            self._coming.append((self._to_host(tensors), use))

    def _ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        following = (self._to_device((batch.forcing, batch.static)) for batch in batches)
        sent, before = next(following, None), 0
        while (arriving := sent) is not None:
            sent = next(following, None)
            yield self._arrived(arriving)
            # those of the batch before: the device is busy with this one meanwhile
            self._use(before)
            before = len(self._coming)

    def _use(self, count: int) -> None:
        """Hand over what was asked for first."""
        for _ in range(count):
            copied, use = self._coming.popleft()
            copied.done.synchronize()
            use(copied.tensors)

    def _to_device(self, tensors: Sequence[Tensor]) -> _Copied:
        copying = _copy_stream(self.device)
        with torch.cuda.stream(copying):
            pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t) for t in tensors]
            copies = tuple(t.to(self.device, non_blocking=True) for t in pinned)
            return _Copied(copies, copying.record_event())

    def _arrived(self, copied: _Copied) -> Batch:
        """A batch for whatever is computed from now on."""
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(copied.done)
        for tensor in copied.tensors:
            # made on the other stream, which must not use its memory again before it is computed with
            tensor.record_stream(computing)
        forcing, static = copied.tensors
        return Batch(forcing, static, {})

    def _to_host(self, tensors: Sequence[Tensor]) -> _Copied:
        copying = _copy_stream(self.device)
        copying.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(copying):
            copies = tuple(torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors)
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
                tensor.record_stream(copying)
            return _Copied(copies, copying.record_event())


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of this process for copies; made when it is first asked for."""
    return torch.cuda.Stream(device)
