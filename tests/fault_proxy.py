"""A real HTTP/1.1 proxy in front of an object store that fails on purpose, the same way every time.

It passes every request on byte for byte, the Host header (which S3 signs) included, and can answer 503, reset
the connection, cut a body short, stall, lose the reply of a request that was carried out, or claim that the
store is full. What it does is switched while it runs; what went through it is counted.
"""

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self
from urllib.parse import unquote, urlsplit

Fault = Literal["unavailable", "full", "expired", "reset", "truncate", "stall", "lose"]
"""Not passed on: unavailable (503), full (507), expired (403), reset (RST), stall (silence, then RST).
Passed on: truncate (half of the answer's body, then the end), lose (carried out, then RST, no answer)."""

_SEED: Final = 7
_PIECE: Final = 1 << 16
_REFUSALS: Final[Mapping[str, tuple[str, str, str]]] = {
    "unavailable": ("503 Service Unavailable", "SlowDown", "Please reduce your request rate."),
    "full": ("507 Insufficient Storage", "XMinioStorageFull", "No space left."),
    "expired": ("403 Forbidden", "ExpiredToken", "The provided token has expired."),
}
"""Fault -> status, code and message."""


class _Head(NamedTuple):
    first: str
    headers: dict[str, str]  # names in lower case
    raw: bytes

    @property
    def method(self) -> str:
        return self.first.split(" ")[0]

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.first.split(" ")[1]).path)

    @property
    def status(self) -> int:
        return int(self.first.split(" ")[1])


@dataclass
class _Plan:
    """The next ``times`` requests that match fail."""

    fault: Fault
    times: int
    method: str
    match: str


@dataclass(frozen=True)
class _Shares:
    parts: Mapping[Fault, float] = field(default_factory=dict)
    methods: Collection[str] = ()
    match: str = ""


class FaultProxy:
    """A context manager; ``url`` is the endpoint to give to clients.

    Attributes:
        requests: requests seen, by method.
        faults: faults served, by kind.
        puts: PUTs that were carried out, by path (``/bucket/key``).
        body_bytes: bytes of successful GET bodies, by path, those included that are just being sent.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (str(parts.hostname), int(parts.port or 80))
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="fault-proxy")
        self.clear()

    def clear(self) -> None:
        """No more faults, and counts of zero."""
        with self._lock:
            self.requests: Counter[str] = Counter()
            self.faults: Counter[str] = Counter()
            self.puts: Counter[str] = Counter()
            self.body_bytes: Counter[str] = Counter()
            self._plans: list[_Plan] = []
            self._shares = _Shares()
            self._random = random.Random(_SEED)
            self.stall_seconds = 60.0

    def share(
        self, parts: Mapping[Fault, float], methods: Collection[str] = (), match: str = "", seed: int = _SEED
    ) -> None:
        """From now on these shares of the requests fail; {} ends it.

        Args:
            parts: share of each fault, 0 to 1; their sum is at most 1.
            methods: only requests of these methods; empty is all.
            match: only requests whose path and query hold this text.
            seed: the n-th matching request meets the same fault whenever the seed is the same.
        """
        with self._lock:
            self._shares = _Shares(dict(parts), tuple(methods), match)
            self._random = random.Random(seed)

    def plan(self, fault: Fault, times: int, method: str = "", match: str = "") -> None:
        """Let the next ``times`` requests of this method whose path and query hold ``match`` fail."""
        with self._lock:
            self._plans.append(_Plan(fault, times, method, match))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with await asyncio.start_server(self._serve, sock=self._listener):
            await self._stop.wait()
            # Clients keep their connections open: end them, or Python 3.12 waits for them.
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._serve_one(reader, writer):
                pass
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # the client or the test has gone
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the connection is of no more use."""
        request = await _read_head(reader)
        fault = self._fault_for(request)
        if fault == "reset":
            return _reset(writer)
        body = await _read_request_body(request, reader, writer)
        if fault == "stall":
            await asyncio.sleep(self.stall_seconds)
            return _reset(writer)
        if fault is not None and fault in _REFUSALS:
            return await _refuse(request, fault, writer)
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._upstream)
        try:
            upstream_writer.write(_without_expect(request.raw) + body)
            return await self._relay(request, upstream_reader, writer, fault)
        finally:
            upstream_writer.close()

    async def _relay(
        self,
        request: _Head,
        upstream: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        fault: Fault | None,
    ) -> bool:
        answer = await _read_head(upstream)
        while 100 <= answer.status < 200:
            answer = await _read_head(upstream)
        if request.method == "PUT" and answer.status < 300:
            with self._lock:
                self.puts[request.path] += 1
        if fault == "lose":
            async for _ in _body_pieces(request, answer, upstream):
                pass
            return _reset(writer)
        if fault == "truncate":
            whole = b"".join([piece.raw async for piece in _body_pieces(request, answer, upstream)])
            writer.write(answer.raw + whole[: len(whole) // 2])
            await writer.drain()
            return False
        writer.write(answer.raw)
        async for piece in _body_pieces(request, answer, upstream):
            # first, so that whoever has received all of it finds all of it counted
            if request.method == "GET" and answer.status < 300:
                with self._lock:
                    self.body_bytes[request.path] += piece.size
            writer.write(piece.raw)
            await writer.drain()
        await writer.drain()
        return _keeps_alive(request, answer)

    def _fault_for(self, request: _Head) -> Fault | None:
        with self._lock:
            self.requests[request.method] += 1
            fault = self._planned(request) or self._drawn(request)
            if fault is not None:
                self.faults[fault] += 1
            return fault

    def _planned(self, request: _Head) -> Fault | None:
        for plan in self._plans:
            if plan.times and plan.method in {"", request.method} and plan.match in request.first:
                plan.times -= 1
                return plan.fault
        return None

    def _drawn(self, request: _Head) -> Fault | None:
        shares = self._shares
        if shares.match not in request.first or (shares.methods and request.method not in shares.methods):
            return None
        drawn = self._random.random()
        for fault, part in shares.parts.items():
            if drawn < part:
                return fault
            drawn -= part
        return None


class _Piece(NamedTuple):
    raw: bytes
    size: int
    """Bytes of the body itself, without the frame of a chunk."""


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.split(":", 1) for line in lines)
    return _Head(first, {name.lower(): value.strip() for name, value in pairs}, raw)


async def _read_request_body(
    request: _Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bytes:
    if "expect" in request.headers:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if "chunked" in request.headers.get("transfer-encoding", ""):
        return b"".join([piece.raw async for piece in _chunks(reader)])
    return await reader.readexactly(int(request.headers.get("content-length", 0)))


def _without_expect(raw: bytes) -> bytes:
    """The proxy has answered ``Expect`` itself; S3 does not sign that header."""
    lines = raw.split(b"\r\n")
    return b"\r\n".join(line for line in lines if not line.lower().startswith(b"expect:"))


async def _body_pieces(
    request: _Head, answer: _Head, upstream: asyncio.StreamReader
) -> AsyncIterator[_Piece]:
    if request.method == "HEAD" or answer.status in {204, 304}:
        return
    if "chunked" in answer.headers.get("transfer-encoding", ""):
        async for piece in _chunks(upstream):
            yield piece
        return
    left = int(answer.headers.get("content-length", 1 << 62))
    while left and (data := await upstream.read(min(left, _PIECE))):
        left -= len(data)
        yield _Piece(data, len(data))


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[_Piece]:
    """The chunks of a body as they came, then the trailer."""
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        if size == 0:
            break
        yield _Piece(line + await reader.readexactly(size + 2), size)
    trailer = line
    while line != b"\r\n":
        line = await reader.readuntil(b"\r\n")
        trailer += line
    yield _Piece(trailer, 0)


def _keeps_alive(request: _Head, answer: _Head) -> bool:
    framed = "content-length" in answer.headers or "transfer-encoding" in answer.headers
    asked = "close" not in (request.headers.get("connection", "") + answer.headers.get("connection", ""))
    return asked and (framed or request.method == "HEAD" or answer.status in {204, 304})


async def _refuse(request: _Head, fault: Fault, writer: asyncio.StreamWriter) -> bool:
    status, code, message = _REFUSALS[fault]
    body = b""
    if request.method != "HEAD":
        xml = f"<Error><Code>{code}</Code><Message>{message}</Message><RequestId>1</RequestId></Error>"
        body = xml.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return True


def _reset(writer: asyncio.StreamWriter) -> bool:
    """End the connection with RST instead of FIN."""
    with contextlib.suppress(OSError):
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    return False
