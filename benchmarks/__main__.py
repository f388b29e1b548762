"""All short benchmarks, or those named: ``python -m benchmarks day_loop scaling``, as Markdown tables.

``io``, ``memory`` and ``stores`` start an object store, take minutes, and run only when they are named.
"""

import argparse
from collections.abc import Callable
from typing import Final

from benchmarks import (
    day_loop,
    ensemble,
    graph,
    job_start,
    memory,
    object_store,
    scaling,
    staging,
    starts,
    stores,
    workers,
)

SHORT: Final[dict[str, Callable[[], None]]] = {
    "day_loop": day_loop.main,
    "ensemble": ensemble.main,
    "scaling": scaling.main,
    "starts": starts.main,
    "graph": graph.main,
    "staging": staging.main,
    "job_start": job_start.main,
    "workers": workers.main,
}
LONG: Final = ("io", "memory", "stores")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*SHORT, *LONG)))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    options = parser.add_argument_group("of io")
    options.add_argument("--resolution", type=float, default=1.0, help="degrees of the world")
    options.add_argument("--years", type=int, default=1, help="years of the world")
    options.add_argument("--members", type=int, default=2, help="of the cube")
    options.add_argument("--tile", type=int, default=object_store.TILE, help="cells along its edges")
    options.add_argument("--outputs", nargs="+", metavar="OUTPUT", help="of the cube; all if left out")
    options.add_argument("--compression", choices=("zstd", "blosc"), default="zstd", help="of the cube")
    chosen = parser.parse_args()
    resolution = 5.0 if chosen.quick else chosen.resolution
    outputs = tuple(chosen.outputs) if chosen.outputs else None
    case = object_store.Case(
        resolution, chosen.years, chosen.members, chosen.tile, chosen.compression, outputs
    )
    long: dict[str, Callable[[], None]] = {
        "io": lambda: object_store.main(case),
        "memory": lambda: memory.main(chosen.quick),
        "stores": lambda: stores.main(chosen.quick),
    }
    known = SHORT | long
    for name in chosen.names:
        if name not in known:
            parser.error(f"no benchmark {name!r}; there are {', '.join(known)}")
    for name in chosen.names or SHORT:
        print(f"\n## {name}\n", flush=True)
        known[name]()


if __name__ == "__main__":
    main()
