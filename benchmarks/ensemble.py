"""Ten members over the same forcing: in one pass, or in ten; as written, stacked or not, and compiled.

In one pass, compiled members take turns on each part of the forcing, as they do where a cube is filled: a
product of 256 cells fills a core, so that stacking would only ask for more memory at a time.
"""

from typing import Final

import torch

from benchmarks.day_loop import CELLS, KEPT, Work, medians, products, sample_batch, sample_model
from h2mv_dist.jobs.simulation import PART_DAYS
from h2mv_dist.model.days import no_compiler_because
from h2mv_dist.model.ensemble import Ensemble

MEMBERS: Final = 10
CPU: Final = torch.device("cpu")
SINGLE: Final = "ten passes, as written", "ten passes, compiled"


def main() -> None:
    """Print a table; the ways take turns."""
    batch, can_compile = sample_batch(CELLS, PART_DAYS), not no_compiler_because()

    def way(passes: int, *, together: bool = False, compiled: bool = False) -> Work:
        members = [sample_model() for _ in range(MEMBERS)]
        size = MEMBERS // passes
        shares = [members[first : first + size] for first in range(0, MEMBERS, size)]
        ensembles = [Ensemble(share, CPU, together, compiled=compiled) for share in shares]
        ensembles[0].warm_up(KEPT)

        def run() -> None:
            for ensemble in ensembles:
                ensemble.run(batch, ensemble.initial_state(CELLS), lambda _member, _result: None, KEPT)

        return run

    ways = {
        SINGLE[0]: way(MEMBERS),
        SINGLE[1]: way(MEMBERS, compiled=can_compile),
        "one pass, stacked products, as written": way(1, together=True),
        "one pass, compiled, members in turn": way(1, compiled=can_compile),
        "limit": lambda: products(PART_DAYS),
    }
    times = medians(ways)
    best = min(times[name] for name in SINGLE)
    print(f"{MEMBERS} members, batch {CELLS}, {PART_DAYS} days, {torch.get_num_threads()} threads\n")
    print("| way | cell-days a second | of the better ten passes | of the GEMM limit |\n|---|---|---|---|")
    for name in (name for name in ways if name != "limit"):
        rate = MEMBERS * CELLS * PART_DAYS / times[name]
        share = MEMBERS * times["limit"] / times[name]
        print(f"| {name} | {rate:,.0f} | {best / times[name]:.2f} | {share:.1%} |")


if __name__ == "__main__":
    main()
