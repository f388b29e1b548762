"""What the ranks of a gang tell each other before the first step, and what must be true of it.

Each rank puts a few facts into the gang's store; rank 0 compares them, decides what is still open (threads,
code path) and answers all of them: go on with these decisions, or stop for this reason.
"""

import hashlib
import json
import os
import platform
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import psutil
import torch
import torch.distributed as dist
from dask.system import CPU_COUNT
from dask.utils import format_bytes

from h2mv_dist.config import Settings, canonical_json
from h2mv_dist.errors import JobError, describe
from h2mv_dist.io.cache import StagedCells
from h2mv_dist.jobs.code_path import COMPILED, EAGER, Way
from h2mv_dist.jobs.memory import own_bytes
from h2mv_dist.jobs.messages import Failure, Place, RankError, failure_of
from h2mv_dist.model.checkpoint import code_versions
from h2mv_dist.model.days import BLOCK_DAYS, no_compiler_because

GRAPH_BYTES: Final[Mapping[tuple[str, bool], tuple[int, int]]] = MappingProxyType(
    {
        (EAGER, False): (105, 600),
        (EAGER, True): (55, 600),
        (COMPILED, False): (26, 200),
        (COMPILED, True): (3, 50),
    }
)
"""(code path, recomputed) -> bytes of a graph for each simulated day of a cell: for each hidden unit, and on
top; measured with what is lost between arrays, of which eager code makes many of different sizes."""
FIRST_STEP_BYTES: Final = 270 * 2**20
"""What the first step leaves behind beside its graph: code that was compiled or loaded; measured."""
SPARE_DISK: Final = 256 * 2**20
"""Free bytes a host's cache disk must have left after staging."""

_ALIKE: Final = {
    "code": "install the same version of h2mv-dist on every worker",
    "versions": "install the same packages on every worker",
    "data": "do not change the data while a job starts; start again",
}

Facts = Mapping[str, Any]


def gather_facts(
    settings: Settings, staged: StagedCells, n_cells: int, device: torch.device, worker_memory: int | None
) -> Facts:
    """What a rank knows of itself; all of it is also kept in the record.

    Args:
        settings: of the job.
        staged: its data.
        n_cells: that are trained on.
        device: of this rank.
        worker_memory: bytes that the worker's limit leaves to its rank; None without a limit.
    """
    return {
        "host": socket.gethostname(),
        "device": _device_name(device),
        "code": code_fingerprint(),
        "versions": {**code_versions(), "python": platform.python_version()},
        "data": staged.path.name,
        "cores": CPU_COUNT,
        "free_memory": _free_memory(device),
        "worker_memory": _left_of(worker_memory, device),
        "free_disk": shutil.disk_usage(staged.path).free,
        "no_compiler": no_compiler_because(),
        "needed_memory": least_step_bytes(settings, n_cells, staged.period.n_days),
    }


def least_step_bytes(settings: Settings, n_cells: int, n_days: int) -> int:
    """The least that :func:`step_bytes` can be with these settings."""
    wanted, recompute = settings.training.code_path, settings.training.recompute
    paths = (EAGER, COMPILED) if wanted == "auto" else (wanted,)
    ways = (False, True) if recompute is None else (recompute,)
    return min(step_bytes(settings, n_cells, n_days, path, way) for path, way in product(paths, ways))


def step_bytes(settings: Settings, n_cells: int, n_days: int, code_path: str, recompute: bool) -> int:
    """About what the graph of a step keeps on each rank, bytes; ``n_cells`` are those to train on."""
    training = settings.training
    share = -(-min(training.batch_size, n_cells) // training.ranks)
    cells = min(share, training.cells_at_once or share)
    n_days = min(n_days, training.truncation_days or n_days)

    def graph(days: int, recompute: bool) -> int:
        for_each_hidden, on_top = GRAPH_BYTES[code_path, recompute]
        return cells * days * (for_each_hidden * settings.model.hidden + on_top)

    # going backward one block after the other is there as if it had not been forgotten
    return graph(n_days, recompute) + (graph(min(BLOCK_DAYS, n_days), False) if recompute else 0)


def bytes_of_way(settings: Settings, n_cells: int, n_days: int, way: Way) -> int:
    """As :func:`step_bytes`, in the way that was decided on."""
    return step_bytes(settings, n_cells, n_days, COMPILED if way.compiled else EAGER, way.recompute)


def must_recompute(
    settings: Settings, n_cells: int, n_days: int, code_path: str, everyone: Sequence[Facts]
) -> bool:
    """Whether a graph would not fit into the memory of any rank otherwise, if settings leave it open."""
    if settings.training.recompute is not None:
        return settings.training.recompute
    needed = step_bytes(settings, n_cells, n_days, code_path, False)
    return any(needed > _room(facts, everyone) for facts in everyone)


def require_step_memory(
    settings: Settings, n_cells: int, n_days: int, way: Way, everyone: Sequence[Facts]
) -> None:
    """Make sure that a step fits into the memory of every rank, in the way that was decided on.

    Raises:
        RankError: it does not at present.
    """
    needed = bytes_of_way(settings, n_cells, n_days, way)
    for rank, facts in enumerate(everyone):
        _check_memory(rank, facts, needed, everyone)


def ranks_of_host(facts: Facts, everyone: Sequence[Facts]) -> int:
    """How many ranks run on the host of one."""
    return sum(other["host"] == facts["host"] for other in everyone)


def _room(facts: Facts, everyone: Sequence[Facts]) -> int:
    """Bytes that a rank may still take: its share of what is free, but no more than its worker's limit."""
    sharing = ranks_of_host(facts, everyone) if facts["device"].startswith("cpu") else 1
    free, limit = int(facts["free_memory"]) // sharing, facts["worker_memory"]
    return free if limit is None else min(free, int(limit))


def agree(
    store: dist.Store, place: Place, own: Facts, decide: Callable[[Sequence[Facts]], Mapping[str, Any]]
) -> dict[str, Any]:
    """Exchange facts; rank 0 checks them and decides for all.

    Args:
        store: where the ranks meet.
        place: which rank this is.
        own: from :func:`gather_facts`.
        decide: called on rank 0 with the facts of all ranks, in order.

    Returns:
        What rank 0 decided.

    Raises:
        JobError: the gang must not start (rank 0).
        RankError: rank 0 could not start the gang, for its very reason (the other ranks).
    """
    store.set(f"facts/{place.rank}", json.dumps(own))
    if place.rank != 0:
        answer = json.loads(store.get("agreed"))
        if "failure" in answer:
            raise RankError(Failure(**answer["failure"]))
        return dict(answer["decisions"])
    try:
        everyone = [json.loads(store.get(f"facts/{rank}")) for rank in range(place.world)]
        check(everyone)
        decisions = dict(decide(everyone))
    except Exception as error:
        # with its kind: what may pass for rank 0 must not be final for another one
        store.set("agreed", json.dumps({"failure": failure_of(error)._asdict()}))
        raise
    store.set("agreed", json.dumps({"decisions": decisions}))
    return decisions


def check(everyone: Sequence[Facts]) -> None:
    """Refuse a gang whose ranks differ in what must be alike, share a device, or have no room.

    Raises:
        JobError: says which rank differs, and in what.
        RankError: a rank has no room at present.
    """
    for key, fix in _ALIKE.items():
        for rank, facts in enumerate(everyone):
            if facts[key] != everyone[0][key]:
                what = f"ranks differ in {key}"
                raise JobError(_described(what, rank, facts, everyone[0][key], facts[key], fix))
    devices: dict[tuple[str, str], int] = {}
    for rank, facts in enumerate(everyone):
        first = devices.setdefault((facts["host"], facts["device"]), rank)
        if first != rank:
            fix = "start one worker for each GPU, as dask-cuda does"
            own, shared = "a device of its own", facts["device"]
            raise JobError(_described("two ranks share a device", rank, facts, own, shared, fix))
    for rank, facts in enumerate(everyone):
        _check_room(rank, facts, everyone)


def _check_room(rank: int, facts: Facts, everyone: Sequence[Facts]) -> None:
    _check_memory(rank, facts, facts["needed_memory"], everyone)
    free = f"{format_bytes(facts['free_disk'])} free"
    if facts["free_disk"] < SPARE_DISK:
        fix = "free space, or choose another folder with training.cache"
        expected = f"at least {format_bytes(SPARE_DISK)} free for the cache"
        raise RankError(Failure("full", _described("the disk is full", rank, facts, expected, free, fix)))


def _check_memory(rank: int, facts: Facts, needed: int, everyone: Sequence[Facts]) -> None:
    if needed <= _room(facts, everyone):
        return
    limit = facts["worker_memory"]
    # a limit stays, but others may use the host's memory only for a while
    limited = limit is not None and needed > limit
    fix = (
        "set training.recompute or cells_at_once, lower training.batch_size, raise training.ranks, "
        "or start workers with more memory (cluster.memory_limit)"
    )
    expected = f"about {format_bytes(needed)} for a step"
    actual = f"{format_bytes(_room(facts, everyone))} {'of its worker' if limited else 'free'}"
    message = _described("a step does not fit into memory", rank, facts, expected, actual, fix)
    raise RankError(Failure("refused" if limited else "busy", message))


def _described(what: str, rank: int, facts: Facts, expected: object, actual: object, fix: str) -> str:
    where = f"rank {rank} on {facts['host']}"
    return describe(what, where=where, expected=str(expected), actual=str(actual), fix=fix)


def check_all_reduce(world: int, device: torch.device) -> None:
    """One round trip through the process group.

    Raises:
        JobError: the sum that comes back is wrong.
    """
    total = torch.full((1,), dist.get_rank() + 1.0, device=device)
    dist.all_reduce(total)
    expected = world * (world + 1) / 2
    if float(total) != expected:
        fix = "check the network interface of the workers (cluster.interface)"
        where = f"rank {dist.get_rank()}"
        message = describe(
            "an all-reduce gave a wrong sum",
            where=where,
            expected=str(expected),
            actual=str(float(total)),
            fix=fix,
        )
        raise JobError(message)


@cache
def code_fingerprint() -> str:
    """SHA-256 over the package's own source files."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in {".py", ".cpp"}):
        digest.update(canonical_json([path.relative_to(root).as_posix()]).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    return f"cpu of process {os.getpid()}"


def _left_of(worker_memory: int | None, device: torch.device) -> int | None:
    """What this process, with all it has imported, leaves of it; steps on a GPU take nothing."""
    if worker_memory is None or device.type == "cuda":
        return None
    return max(0, worker_memory - own_bytes(os.getpid()) - FIRST_STEP_BYTES)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
