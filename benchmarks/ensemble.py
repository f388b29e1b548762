"""Ten members over the same forcing: in stacked products, or one after the other, as written and compiled."""

from typing import Final

import torch

from benchmarks.day_loop import CELLS, KEPT, Work, medians, products, sample_batch, sample_model
from h2mv_dist.jobs.simulation import PART_DAYS
from h2mv_dist.model.days import no_compiler_because
from h2mv_dist.model.ensemble import Ensemble

MEMBERS: Final = 10
CPU: Final = torch.device("cpu")


def main() -> None:
    """Print a table; the ways take turns."""
    batch = sample_batch(CELLS, PART_DAYS)

    def way(together: bool, compiled: bool) -> Work:
        members = [sample_model() for _ in range(MEMBERS)]
        ensemble = Ensemble(members, CPU, together, compiled=compiled)
        ensemble.warm_up(KEPT)
        state = ensemble.initial_state(CELLS)
        return lambda: ensemble.run(batch, state, lambda _member, _result: None, KEPT)

    ways = {
        "stacked, as written": way(True, False),
        "one by one, as written": way(False, False),
        "one by one, compiled": way(False, not no_compiler_because()),
        "limit": lambda: products(PART_DAYS),
    }
    times = medians(ways)
    print(f"{MEMBERS} members, batch {CELLS}, {PART_DAYS} days, {torch.get_num_threads()} threads\n")
    print("| way | cell-days a second | of stacked | of the GEMM limit |\n|---|---|---|---|")
    for name in (name for name in ways if name != "limit"):
        rate, gain = MEMBERS * CELLS * PART_DAYS / times[name], times["stacked, as written"] / times[name]
        print(f"| {name} | {rate:,.0f} | {gain:.2f} | {MEMBERS * times['limit'] / times[name]:.1%} |")


if __name__ == "__main__":
    main()
