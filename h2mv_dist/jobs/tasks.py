"""What a worker is asked to do; imported by the scheduler too, so nothing heavy is imported here."""

import errno
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlparse

from distributed import get_worker, secede
from distributed.utils import parse_ports

from h2mv_dist.errors import JobError, describe
from h2mv_dist.jobs.messages import Failure, Message, Place, RankError, failure_of

if TYPE_CHECKING:
    from torch.distributed import TCPStore

TOPIC: Final = "h2mv"
"""Dask topic of all reports."""
ROOM: Final = "h2mv-room"
"""Dask topic of units that let their worker begin another one."""


def run_unit(message: Message, place: Place) -> dict[str, Any]:
    """Entry point of every task of a gang, on a worker.

    Failures are results, not exceptions: Dask would log those with their arguments, and unpickle them on the
    scheduler.
    """
    try:
        return {"failure": None, "result": _result(message, place)}
    except Exception as error:
        return {"failure": failure_of(error), "result": None}


def _result(message: Message, place: Place) -> Any:
    match message["task"]:
        case "fold":
            from h2mv_dist.jobs.supervisor import supervise_rank

            return supervise_rank(message, place)
        case "summary":
            from h2mv_dist.jobs.summary import summarize_unit

            return summarize_unit(message)
        case "prepare":
            from h2mv_dist.jobs.prepare import run_prepare_unit

            return run_prepare_unit(message)
        case "compact":
            from h2mv_dist.jobs.compact import run_compact_unit

            return run_compact_unit(message)
        case _:
            from h2mv_dist.jobs.tiles import run_tile_unit

            return run_tile_unit(message, place)


def record_end(message: Message) -> str:
    """Write down how a job ended; answers why that could not be done, which changes nothing else."""
    from h2mv_dist.jobs.run_record import end_run

    try:
        end_run(message)
    except Exception as error:
        return str(error)
    return ""


def cancellation_check() -> Callable[[], None]:
    """For the task that this thread runs: what raises once the scheduler does not want it any more.

    Dask cannot stop a thread, so whatever takes more than a moment must ask, again and again; other threads
    of the task may ask, too.
    """
    worker = get_worker()
    key = worker.get_current_task()

    def check() -> None:
        state = worker.state.tasks.get(key)
        if state is None or state.state not in ("executing", "long-running"):
            raise RankError(Failure("cancelled", "cancelled"))

    return check


def make_room(place: Place) -> None:
    """Let this thread's worker begin another unit: what is left of this one leaves room for that.

    Dask counts the thread no more: if the unit is cancelled, its worker is free before the thread has ended.
    """
    secede()
    worker = get_worker()
    worker.log_event(ROOM, {"worker": worker.address, "gang": place.gang})


def report(message: Mapping[str, Any], **content: Any) -> None:
    """Tell whoever watches the job; costs a fraction of a millisecond."""
    get_worker().log_event(TOPIC, {"job": message["job"], "unit": message["unit"], **content})


_open_stores: dict[str, "TCPStore"] = {}


def open_rendezvous(gang: str, port_range: str | None) -> tuple[str, int]:
    """Listen on this worker's own interface only; answers (host, port).

    Args:
        gang: who meets.
        port_range: ``cluster.port_range`` of the job; what the worker was started with comes first.

    Raises:
        JobError: every port of the range is taken.
    """
    from torch.distributed import TCPStore

    host = worker_host()
    listener = _listener(host, _allowed_ports(port_range))
    port = int(listener.getsockname()[1])
    # torch takes over the file descriptor, so there is no moment at which the port is free
    _open_stores[gang] = TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return host, port


def _allowed_ports(port_range: str | None) -> Sequence[int]:
    """Ports to meet on, in the order to try them; 0 stands for any free one."""
    own = _ports(get_worker()._start_port)
    # a worker with one port only has taken it itself
    chosen = own if len(own) > 1 else _ports(port_range)
    # workers and nannies take the first ones, also when they are restarted
    return tuple(reversed(chosen)) or (0,)


def _ports(given: int | str | Collection[int] | None) -> list[int]:
    """The ports of a range as Dask writes it; none where any would do."""
    return [port for port in parse_ports(given) if port]


def _listener(host: str, ports: Sequence[int]) -> socket.socket:
    """A socket that listens on the first of the ports that is free."""
    for port in ports:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        # as Dask does: a port that was left a moment ago counts as free
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return listener
    raise JobError(
        describe(
            "the ranks have no free port to meet on",
            where=host,
            expected="a port that no worker and no nanny of this host has taken",
            actual=f"{len(ports)} ports in use, {min(ports)} to {max(ports)}",
            fix="widen cluster.port_range, and start the workers with it",
        )
    )


def close_rendezvous(gang: str) -> None:
    """Stop listening, if this worker did."""
    _open_stores.pop(gang, None)


def worker_host() -> str:
    """The host part of this worker's own address."""
    host = urlparse(get_worker().address).hostname
    assert host is not None, "a Dask worker that runs tasks always has an address"
    return host
