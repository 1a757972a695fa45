"""Many clients at once, most of them rude, every stream judged by its hash."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import socket
import time
from typing import Callable, NamedTuple

from tests.chaos.model_server import known_events, prompt
from tests.chaos.rig import HOST, LARGE_GB, Fault, Rig, read_bytes, until

SETTLE_S = 13                       # from the start to the first figures: memory has been returned
AFTER_S = 65                        # "a minute after": kept connections to the model are closed
SAMPLE_S = 0.5
SEEDS = 24                          # different streams
BUSY_MB, AFTER_MB = 80, 40          # goals: with every client, and a minute after they left

# What a client does -> its share of all requests.
KINDS = {"whole": 55, "leaves": 18, "slow": 4, "half head": 15, "stops reading": 8}


class SoakReport(NamedTuple):
    """What was seen."""

    clients: int
    seconds: float
    counts: dict[str, int]
    resources: dict[str, tuple[float, float, float]]    # what -> idle, most, a minute after
    faults: list[str]


class Sample(NamedTuple):
    """What the daemon takes at one moment."""

    megabytes: float
    threads: int
    files: int


def take_sample(pid: int) -> Sample:
    """Errors: Fault, where the daemon has ended."""
    status = read_bytes(f"/proc/{pid}/status")
    found = {name: int(value) for name, value in
             re.findall(rb"^(VmRSS|Threads):\s+(\d+)", status, re.MULTILINE)}
    if b"VmRSS" not in found:
        raise Fault("the daemon has ended")
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(found[b"VmRSS"] * 1024 / 1e6, found[b"Threads"], files)


class Soak:
    """The clients, and what they count."""

    def __init__(self, port: int, source: random.Random, seconds: float) -> None:
        self._port, self._source = port, source
        self._end = time.monotonic() + seconds
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self._hashes: dict[tuple[int, int], bytes] = {}

    def digest(self, seed: int, count: int) -> bytes:
        """Of the whole payload of a stream."""
        key = (seed, count)
        if key not in self._hashes:
            self._hashes[key] = hashlib.sha256(b"".join(known_events(seed, count))).digest()
        return self._hashes[key]

    async def client(self) -> None:
        """One client: connection after connection, each of another kind."""
        kinds, weights = list(KINDS), list(KINDS.values())
        while time.monotonic() < self._end:
            kind = self._source.choices(kinds, weights)[0]
            try:
                await asyncio.wait_for(self._connection(kind), 90)
            except asyncio.TimeoutError:
                self.faults.append(f"client ({kind}): nothing more for 90 s")
            except (OSError, EOFError, ValueError) as exc:
                self.faults.append(f"client ({kind}): {type(exc).__name__}: {exc}")
            self.counts[kind] += 1

    async def _connection(self, kind: str) -> None:
        sock = socket.socket()
        if kind in ("slow", "stops reading"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (HOST, self._port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 16)
        try:
            if kind == "half head":
                writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow")
                await asyncio.sleep(self._source.uniform(0, 5))
                return
            requests = self._source.randint(1, 4) if kind == "whole" else 1
            for _ in range(requests):
                await self._stream(kind, reader, writer)
        finally:
            if kind == "leaves" and self._source.random() < 0.5:
                writer.transport.abort()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _stream(self, kind: str, reader: asyncio.StreamReader,
                      writer: asyncio.StreamWriter) -> None:
        seed = self._source.randrange(SEEDS)
        count, delay_ms = 30, self._source.choice((20, 50, 100))
        if kind in ("slow", "stops reading"):
            count, delay_ms = 2000, 0           # more than buffers hold
        message = {"role": "user", "content": prompt(seed, count, delay_ms)}
        body = json.dumps({"model": "auto", "stream": True, "messages": [message]}).encode()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                     b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                     % (len(body), body))
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise ValueError(f"answered {head[:200]!r}")
        if kind == "stops reading":
            await asyncio.sleep(self._source.uniform(1, 5))
            return
        leave_after = self._source.randrange(60_000) if kind == "leaves" else 1 << 40
        digest, received = hashlib.sha256(), 0
        while received < leave_after:
            size = int(await reader.readuntil(b"\r\n"), 16)
            payload = (await reader.readexactly(size + 2))[:-2]
            if not size:
                self._judge(digest.digest(), seed, count)
                return
            digest.update(payload)
            received += size
            if kind == "slow":
                await asyncio.sleep(0.005)

    def _judge(self, digest: bytes, seed: int, count: int) -> None:
        self.counts["streams whole, by their hash"] += 1
        if digest != self.digest(seed, count):
            raise ValueError(f"stream {seed} of {count} events came with other bytes")


async def _sample(pid: int, samples: list[Sample]) -> None:
    while True:
        samples.append(take_sample(pid))
        await asyncio.sleep(SAMPLE_S)


async def _run(soak: Soak, clients: int, pid: int, samples: list[Sample]) -> None:
    sampler = asyncio.ensure_future(_sample(pid, samples))
    try:
        await asyncio.gather(*(soak.client() for _ in range(clients)))
        if sampler.done():
            sampler.result()
    finally:
        sampler.cancel()


def _get(port: int, path: str) -> dict[str, object]:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return dict(json.loads(connection.getresponse().read()))


def _in_flight(rig: Rig) -> int:
    rows = _get(rig.engine_port, "/running")["running"]
    assert isinstance(rows, list)
    return sum(row["in_flight"] for row in rows)


def _active(rig: Rig) -> int:
    """Streams that the model still sends; asking is itself none."""
    return int(str(_get(rig.engine_port, "/upstream/code-smart/active")["active"]))


def run_soak(rig: Rig, clients: int, seconds: float, source: random.Random,
             tell: Callable[[str], None]) -> SoakReport:
    """Bring a stack up, let the clients at it, look at it again a minute later, stop it."""
    rig.write_ini("embedded", LARGE_GB)
    rig.start()
    pid = rig.daemon_pid()
    warm = Soak(rig.router_port, source, 0)
    asyncio.run(warm._connection("whole"))      # both models are loaded
    tell(f"idle for {SETTLE_S} s")
    time.sleep(SETTLE_S)
    idle, samples = take_sample(pid), []        # type: Sample, list[Sample]
    tell(f"{clients} clients for {seconds:.0f} s")
    soak = Soak(rig.router_port, source, seconds)
    asyncio.run(_run(soak, clients, pid, samples))
    faults = soak.faults
    try:
        until(lambda: not _in_flight(rig), "an end of all requests at the engine", 20)
        until(lambda: not _active(rig), "an end of all streams at the model", 20)
    except Fault as exc:
        faults.append(str(exc))
    tell(f"idle for {AFTER_S} s")
    time.sleep(AFTER_S)
    after = take_sample(pid)
    most = Sample(*(max(column) for column in zip(*samples)))
    faults += _judge(idle, most, after)
    rig.bystander.check()
    rig.check_logs()
    rig.command("stop")
    rig.check_down()
    named = {"memory, MB": 0, "threads": 1, "open files": 2}
    resources = {what: (idle[n], most[n], after[n]) for what, n in named.items()}
    return SoakReport(clients, seconds, dict(sorted(soak.counts.items())), resources, faults)


def _judge(idle: Sample, most: Sample, after: Sample) -> list[str]:
    faults = []
    if most.megabytes > BUSY_MB:
        faults.append(f"{most.megabytes:.0f} MB with all clients, the goal is {BUSY_MB}")
    if after.megabytes > AFTER_MB:
        faults.append(f"{after.megabytes:.0f} MB a minute after, the goal is {AFTER_MB}")
    if after.threads > idle.threads:
        faults.append(f"{after.threads} threads a minute after, {idle.threads} before")
    if after.files > idle.files:
        faults.append(f"{after.files} open files a minute after, {idle.files} before")
    return faults
