"""All benchmarks, or those named: ``python -m benchmarks day_loop job_start``."""

import sys

from benchmarks import day_loop, job_start

ALL = {"day_loop": day_loop.main, "job_start": job_start.main}


def main() -> None:
    for name in sys.argv[1:] or ALL:
        print(f"\n## {name}\n", flush=True)
        ALL[name]()


if __name__ == "__main__":
    main()
