"""Members over a tile, with what goes to their device and back streamed or not."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from h2mv_dist.jobs import simulation as simulation_module
from h2mv_dist.jobs.simulation import Days, TileSimulation, Values
from h2mv_dist.model.base import Batch
from h2mv_dist.model.ensemble import Ensemble
from h2mv_dist.model.h2mv import SPEC
from h2mv_dist.model.transfer import Transfer, Use
from tests.conftest import Place
from tests.jobs.tiles import NO_OPTIONS, Sizes, plan, write_data
from tests.model import builders

GPU = pytest.param("cuda:0", marks=pytest.mark.gpu)


class Plain(Transfer):
    """Copies when it is asked to, and waits."""

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        return (batch.to(self.device) for batch in batches)

    def bring(self, tensors: Sequence[Tensor], use: Use) -> None:
        use([tensor.cpu() for tensor in tensors])


def simulated(folder: Path, device: torch.device, transfer: Transfer) -> tuple[list[Values], list[Tensor]]:
    """Outputs of all blocks, and the last state."""
    sizes = Sizes(shard_days=30)
    planned = plan(str(folder), sizes)
    members = Ensemble([builders.model(seed, hidden=sizes.hidden) for seed in range(sizes.members)], device)
    layout, period = planned.layout, planned.layout.period
    days = Days(period=period, block=layout.shard_days, baseline=period, spinup=period)
    tile, names = layout.tiles[0], (*layout.daily, *layout.static)
    simulation = TileSimulation(planned.source, SPEC, members, tile, days, names)
    simulation.transfer = transfer
    carried, found = simulation.start(), list[Values]()
    for block, batch in simulation.blocks(period):
        carried, values = simulation.step(block, batch, carried)
        found.append(values)
    return found, [part.cpu() for part in carried.state]


@pytest.mark.parametrize("place", ["cpu", GPU])
def test_streamed_values_are_the_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(simulation_module, "PART_DAYS", 8)
    write_data(Place(str(tmp_path), NO_OPTIONS), Sizes())
    device = torch.device(place)
    streamed, state = simulated(tmp_path, device, Transfer(device))
    plain, expected = simulated(tmp_path, device, Plain(device))
    for ours, theirs in zip(streamed, plain, strict=True):
        assert ours.residual == theirs.residual
        assert ours.n_missing() == 0
        for found, wanted in ((ours.daily, theirs.daily), (ours.static, theirs.static)):
            for name, values in wanted.items():
                np.testing.assert_array_equal(found[name], values, err_msg=name)
    for part, wanted_part in zip(state, expected, strict=True):
        assert torch.equal(part, wanted_part)
