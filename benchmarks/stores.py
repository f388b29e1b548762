"""s3fs against obstore as zarr's store, on SeaweedFS: reading chunks, and writing shards.

The package reads chunks through obstore and writes through s3fs, which this measures anew. Both do the same
in turns, and the medians are compared.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
from obstore.store import S3Store
from zarr.abc.store import Store
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import ObjectStore

from h2mv_dist.io.shards import write_shards
from h2mv_dist.io.stores import open_store
from tests.seaweed import ACCESS_KEY, SECRET, S3Server, running_server

CHUNK: Final = (360, 6, 6)
SHARD: Final = (360, 18, 18)
INNER: Final = (120, 9, 9)
WORTH_IT: Final = 1.3


def main(quick: bool = False) -> None:
    repeats, n_shards = (2, 2) if quick else (15, 6)
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as server:
        bucket = server.new_bucket()
        openers: dict[str, Callable[[str], Store]] = {
            "s3fs": lambda name: open_store(f"{bucket}/{name}", server.options, read_only=False),
            "obstore": lambda name: _obstore(server, bucket, name),
        }
        values = _values(n_shards)
        chunked = {"chunks": CHUNK}
        sharded = {"shards": SHARD, "chunks": INNER}
        zarr.create_array(openers["s3fs"]("read"), data=values, **_coded(chunked))
        times: dict[str, dict[str, list[float]]] = {
            what: {name: [] for name in openers} for what in ("reading chunks", "writing shards")
        }
        for repeat in range(repeats):
            for name, opener in openers.items():
                # as cubes are written
                target = opener(f"write-{name}-{repeat}")
                array = zarr.create_array(target, shape=values.shape, dtype=values.dtype, **_coded(sharded))
                times["writing shards"][name].append(_seconds(partial(_write, array, values)))
                source = zarr.open_array(opener("read"), mode="r")
                times["reading chunks"][name].append(_seconds(partial(np.asarray, source)))
    print(f"{values.nbytes / 2**20:.0f} MiB, medians of {repeats}\n")
    print("| | s3fs, s | obstore, s | gain |\n|---|---|---|---|")
    for what, seconds in times.items():
        known, other = (statistics.median(seconds[name]) for name in ("s3fs", "obstore"))
        print(f"| {what} | {known:.3f} | {other:.3f} | {known / other:.2f} |")
    print(f"\nworth a way of its own above {WORTH_IT}")


def _obstore(server: S3Server, bucket: str, name: str) -> Store:
    store = S3Store(
        bucket.removeprefix("s3://"),
        prefix=name,
        endpoint=server.endpoint,
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET,
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    return ObjectStore(store)


def _coded(chunking: dict[str, Any]) -> dict[str, Any]:
    return {**chunking, "compressors": (ZstdCodec(level=3), Crc32cCodec()), "fill_value": np.nan}


def _values(n_shards: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Smooth and noisy, as simulated fluxes are, [time, lat, lon]."""
    days, rows, columns = SHARD
    rng = np.random.default_rng(0)
    season = np.sin(np.arange(days) / 58.0)[:, None, None]
    noise = rng.gamma(0.5, 1.0, (days, rows * n_shards, columns * n_shards))
    return (season + noise.round(2)).astype(np.float32)


def _write(array: Any, values: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    write_shards(array, (...,), values)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
