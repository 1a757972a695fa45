"""Benchmark: llmstack beside the bare upstream, nginx and the peer package, in one run.

    python3 -m tests.bench [--rounds N] [--peer PYTHON] [--pyz FILE] [--json] [--quick] [--check]

    client (this process) ──> subject ──> stub upstream (its own process)
                              direct      the client talks to the stub itself
                              nginx       one worker, keep-alive, unbuffered: relays, and reads no JSON
                              llmstack    `serve --upstream STUB --host 127.0.0.1 --port 0`
                              peer        opencode-llmstack, where --peer names a Python that has it

How it measures
    Machines are noisy, so nothing is compared across runs or across minutes. Each round takes every measure over every
    subject in turn, starting with another subject each round; the two latencies, which are differences of a few dozen
    microseconds, are taken in short slices that go around the subjects. A comparison with a rival is a ratio within one
    round; what is reported is the median over the rounds.
    The client is one selectors loop, which costs less than the thread per connection of a typical Python client: on a
    shared core that leaves the client less to hide a slow router behind.
    In every measure the client serialises each body with json.dumps, inside the timed span, and the stub parses each with
    json.loads, as real clients and servers do. Every request says model "auto", so a router has to parse and rewrite it,
    and no two prompts of a measure are the same, so that remembering answers or decisions wins nothing. Sockets are
    keep-alive with Nagle off.
    Before a subject is timed, in every round, one plain and one streamed answer are read through it and compared with
    what the stub sent; a subject that alters or cuts them fails the round instead of winning.
    Two things to know when reading it. "direct" is no ceiling for streams: a relay that joins the stub's sends leaves the
    client fewer reads. And on several cores the p50 of one request at a time depends on whether the kernel puts client,
    stub and subject on one core or wakes another for each hop (0.02 against 0.07 ms for direct);
    `taskset -c 0 python3 -m tests.bench` takes that choice away, and what is left is each subject's own cost.

Measures
    one at a time         p50 of the latency; "added" is what the subject adds to direct's p50 of that round
    16 at a time          requests/s
    16 streams            events/s; 500 events each, the stub sends each event on its own
    64 live streams       200 events/s each for a second: events/s delivered, time to the first event
    400 kB prompt         p50 of the latency
    boot                  from spawning a server to its first 200 on /models.ini or /v1/models
    idle memory           resident, right after that answer
    llmstack.pyz version  beside `python -c pass`

It measures and does not judge: the exit code is 0 with a goal missed, unless --check is given (then 1).
Exit 2: it cannot measure llmstack at all. Needs a POSIX system. Leaves no process, port or file behind.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import getpass
import grp
import heapq
import http.client
import itertools
import json
import os
import platform
import re
import selectors
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Optional

# ---- constants

REPOSITORY = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
PATIENCE_S = 10  # longest wait for a byte, a boot or a short command before the subject has failed
POLL_S = 0.001  # how often a booting child is looked at; also the error of the boot measure
STOP_S = 5  # from SIGTERM to SIGKILL

RECEIVE_BYTES = 1 << 18
SLICES = 10  # of a latency measure, in turn with the other subjects'
STREAMS = 16
LIVE_STREAMS = 64
STREAM_EVENTS = 500
LIVE_EVENTS = 200
LIVE_INTERVAL_S = 0.005
BIG_PROMPT = "word and " * 44_444  # 400 kB
BURST, LIVE = "hello", "live"  # how a prompt begins tells the stub which of its two streams to send
# A relay may cut the stream into other chunks, and a chunk header may then fall inside a "data:". The exact
# comparison is the one made before the clock starts; under the clock a stream may look this much short.
COUNT_TOLERANCE = 0.98

DIRECT, NGINX, LLMSTACK, PEER = "direct", "nginx", "llmstack", "peer"
RIVALS = (NGINX, PEER)
PYZ = "llmstack.pyz"


class SubjectError(Exception):
    """A subject failed to start, to answer, or to relay what it was given."""


class SetupError(Exception):
    """The benchmark cannot run at all (exit code 2)."""


# ---- records


class Effort(NamedTuple):
    """How long each measure runs, per subject and round."""

    one_s: float
    requests_s: float
    streams_s: float
    big_s: float
    versions: int


FULL = Effort(one_s=0.5, requests_s=1.0, streams_s=1.0, big_s=0.5, versions=5)
QUICK = Effort(one_s=0.2, requests_s=0.3, streams_s=0.3, big_s=0.2, versions=3)


class Measure(NamedTuple):
    """One row of the table."""

    key: str
    label: str
    unit: str
    digits: int


MEASURES = (
    Measure("one_ms", "one at a time, p50", "ms", 3),
    Measure("added_ms", "one at a time, added", "ms", 3),
    Measure("requests", "16 at a time", "requests/s", 0),
    Measure("events", "16 streams of 500 events", "events/s", 0),
    Measure("live_events", "64 live streams", "events/s", 0),
    Measure("live_first_ms", "64 live, first event, median", "ms", 1),
    Measure("live_first_max_ms", "64 live, first event, slowest", "ms", 1),
    Measure("big_ms", "400 kB prompt, p50", "ms", 2),
    Measure("boot_ms", "boot to first answer", "ms", 0),
    Measure("idle_mb", "idle memory", "MB", 1),
    Measure("version_ms", "llmstack.pyz version", "ms", 1),
    Measure("version_ratio", "  beside python -c pass", "x", 2),
)


class Goal(NamedTuple):
    """A bound on llmstack's median, or on the median of its per-round ratios to the rival it needs."""

    text: str
    measure: str
    needs: Optional[str]  # what may be missing: a rival, or the .pyz
    at_most: bool
    limit: float
    unit: str


GOALS = (
    Goal("added latency, one at a time", "added_ms", NGINX, True, 1.5, "x nginx"),
    Goal("16 at a time, requests/s", "requests", NGINX, False, 0.4, "x nginx"),
    Goal("16 streams, events/s", "events", NGINX, False, 0.8, "x nginx"),
    Goal("64 live streams, first event", "live_first_ms", NGINX, True, 3.0, "x nginx"),
    Goal("400 kB prompt", "big_ms", NGINX, True, 1.6, "x nginx"),
    Goal("16 at a time, requests/s", "requests", PEER, False, 20.0, "x peer"),
    Goal("16 streams, events/s", "events", PEER, False, 20.0, "x peer"),
    Goal("boot to first answer", "boot_ms", None, True, 200.0, "ms"),
    Goal("idle memory", "idle_mb", None, True, 25.0, "MB"),
    Goal("llmstack.pyz version", "version_ratio", PYZ, True, 2.0, "x python -c pass"),
)

PASS, MISS, UNKNOWN = "PASS", "MISS", "NOT MEASURED"


class Outcome(NamedTuple):
    """A goal with what was measured: *value* is the median, *low* and *high* the extremes of the rounds."""

    goal: Goal
    verdict: str
    value: Optional[float] = None
    low: Optional[float] = None
    high: Optional[float] = None


class Results:
    """Every sample of the run: a round is measure -> subject -> value, with no entry for what failed."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, dict[str, float]]] = []
        self.failures: list[str] = []

    def add(self, subject: str, values: dict[str, float]) -> None:
        """File *values* (measure -> value) of *subject* under the last round."""
        for key, value in values.items():
            self.rounds[-1].setdefault(key, {})[subject] = value

    def samples(self, key: str, subject: str) -> list[float]:
        """What the rounds hold of one measure of one subject."""
        return [each[key][subject] for each in self.rounds if subject in each.get(key, {})]

    def median(self, key: str, subject: str) -> Optional[float]:
        """The median over the rounds, or None if nothing was measured."""
        found = self.samples(key, subject)
        return statistics.median(found) if found else None

    def ratios(self, key: str, subject: str, rival: str) -> list[float]:
        """*subject* / *rival* within each round; a round without a positive rival has no ratio."""
        pairs = [each[key] for each in self.rounds if {subject, rival} <= each.get(key, {}).keys()]
        return [pair[subject] / pair[rival] for pair in pairs if pair[rival] > 0]


# ---- the stub upstream


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(payload), payload)


def _stream_chunks(count: int) -> list[bytes]:
    """So many SSE events as a server sends them, each a chunk: the role, the words, `[DONE]`."""
    event = ('data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"choices":[{"index":0,'
             '"delta":{%s},"finish_reason":null}]}\n\n')
    role, word = (_chunk((event % delta).encode()) for delta in ('"role":"assistant","content":""', '"content":" word"'))
    return [role, *[word] * (count - 2), _chunk(b"data: [DONE]\n\n")]


def _json_answer(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def _completion(model: str) -> bytes:
    """The plain answer; it names the *model* the stub was asked for, so rewriting can be seen."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "hello there"}, "finish_reason": "stop"}
    body = {"id": "chatcmpl-1", "object": "chat.completion", "model": model, "choices": [choice]}
    return _json_answer(b"200 OK", json.dumps(body).encode())


STREAM_HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
               b"Transfer-Encoding: chunked\r\n\r\n")
LAST_CHUNK = b"0\r\n\r\n"
BURST_CHUNKS = _stream_chunks(STREAM_EVENTS)
LIVE_CHUNKS = _stream_chunks(LIVE_EVENTS)
GET_ANSWERS = {
    b"/health": _json_answer(b"200 OK", b'{"status":"ok"}'),
    b"/v1/models": _json_answer(b"200 OK", b'{"object":"list","data":[]}'),
}


class _StubConnection:
    """One connection to the stub: a request coming in, sends going out one by one."""

    def __init__(self, stub: _Stub, sock: socket.socket) -> None:
        self._stub, self._sock = stub, sock
        self._received = bytearray()
        self._expected_bytes = 0  # of the request being received; 0 until its head is complete
        self._unsent: collections.deque[bytes] = collections.deque()
        self.is_open = True

    def on_ready(self, mask: int) -> None:
        """Go on with whatever the socket is ready for; a broken connection is closed."""
        try:
            if mask & selectors.EVENT_WRITE:
                self.send()
            if mask & selectors.EVENT_READ:
                self._receive()
        except (OSError, ValueError, LookupError):  # gone, or what the subject made of the request is no JSON
            self._close()

    def send(self, *sends: bytes) -> None:
        """Send each of *sends* on its own, after what is still waiting."""
        self._unsent.extend(sends)
        was_waiting = bool(self._stub.selector.get_key(self._sock).events & selectors.EVENT_WRITE)
        try:
            while self._unsent:
                data = self._unsent[0]
                sent = self._sock.send(data)
                if sent < len(data):
                    self._unsent[0] = data[sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        if bool(self._unsent) != was_waiting:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
            self._stub.selector.modify(self._sock, wanted, self.on_ready)

    def _receive(self) -> None:
        data = self._sock.recv(1 << 20)
        if not data:
            self._close()
            return
        self._received += data
        while self.is_open and self._has_request():
            request = bytes(self._received[:self._expected_bytes])
            del self._received[:self._expected_bytes]
            self._expected_bytes = 0
            self._answer(request)

    def _has_request(self) -> bool:
        """Whether a whole request is here; its length is worked out once the head is."""
        if not self._expected_bytes:
            head_end = self._received.find(b"\r\n\r\n")
            if head_end < 0:
                return False
            _, found, rest = bytes(self._received[:head_end]).lower().partition(b"\r\ncontent-length:")
            self._expected_bytes = head_end + 4 + (int(rest.split(b"\r\n", 1)[0]) if found else 0)
        return len(self._received) >= self._expected_bytes

    def _answer(self, request: bytes) -> None:
        method, path, _ = request.split(b" ", 2)
        if method != b"POST":
            self.send(GET_ANSWERS.get(path, _json_answer(b"404 Not Found", b"{}")))
            return
        body = json.loads(request[request.index(b"\r\n\r\n") + 4:])
        if not body.get("stream"):
            self.send(self._stub.completion(body["model"]))
        elif body["messages"][-1]["content"].startswith(LIVE):
            self.send(STREAM_HEAD)
            self._stub.start_live(self)
        else:
            self.send(STREAM_HEAD, *BURST_CHUNKS, LAST_CHUNK)

    def _close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._stub.selector.unregister(self._sock)
            self._sock.close()


class _Stub:
    """An upstream that costs next to nothing: one selectors loop, answers made beforehand."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._listener = socket.create_server((HOST, 0), backlog=1024)
        self._listener.setblocking(False)
        self._due: list[tuple[float, int, _StubConnection, int]] = []  # heap: when, tie-break, whose, event
        self._serial = itertools.count()
        self._completions: dict[str, bytes] = {}

    def run(self) -> None:
        """Print the address, then serve until standard input ends, as it does when the parent dies."""
        self.selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self.selector.register(sys.stdin, selectors.EVENT_READ, None)
        print(f"http://{HOST}:{self._listener.getsockname()[1]}", flush=True)
        while True:
            timeout_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            for key, mask in self.selector.select(timeout_s):
                if key.data is None:
                    return
                key.data(mask)
            self._send_due()

    def completion(self, model: str) -> bytes:
        """The plain answer for *model*, made once."""
        if model not in self._completions:
            self._completions[model] = _completion(model)
        return self._completions[model]

    def start_live(self, connection: _StubConnection) -> None:
        """Send *connection* a live stream, its first event now."""
        heapq.heappush(self._due, (time.monotonic(), next(self._serial), connection, 0))

    def _accept(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.selector.register(sock, selectors.EVENT_READ, _StubConnection(self, sock).on_ready)

    def _send_due(self) -> None:
        now_s = time.monotonic()
        while self._due and self._due[0][0] <= now_s:
            due_s, serial, connection, index = heapq.heappop(self._due)
            if not connection.is_open:
                continue
            is_last = index + 1 == LIVE_EVENTS
            with contextlib.suppress(OSError):  # a gone client: its read event closes the connection
                connection.send(LIVE_CHUNKS[index], *([LAST_CHUNK] if is_last else []))
            if not is_last:
                heapq.heappush(self._due, (due_s + LIVE_INTERVAL_S, serial, connection, index + 1))


# ---- the client

_SERIAL = itertools.count()


def _connect(port: int) -> socket.socket:
    """A blocking connection on which no read or write waits longer than PATIENCE_S.

    The kernel's timeout, not settimeout(): that one costs a poll() before every read and write.
    """
    sock = socket.create_connection((HOST, port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", PATIENCE_S, 0))
    return sock


def _request(port: int, prompt: str, stream: bool = False) -> bytes:
    """A chat request in wire form, its prompt like no other and of another length than the last."""
    number = next(_SERIAL)
    message = {"role": "user", "content": f"{prompt}{' again' * (number % 8)} {number}"}
    body = json.dumps({"model": "auto", "messages": [message], "stream": stream}).encode()
    return (b"POST /v1/chat/completions HTTP/1.1\r\nHost: %s:%d\r\nAccept: */*\r\nUser-Agent: bench\r\n"
            b"Authorization: Bearer none\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (HOST.encode(), port, len(body), body))


def _receive(sock: socket.socket) -> bytes:
    """The next bytes; raise SubjectError when the subject closes or stays silent."""
    try:
        data = sock.recv(RECEIVE_BYTES)
    except BlockingIOError:
        raise SubjectError(f"silent for {PATIENCE_S} s") from None
    except OSError as error:
        raise SubjectError(f"broke the connection: {error}") from None
    if not data:
        raise SubjectError("closed the connection in the middle of an answer")
    return data


def _body_start(answer: bytes) -> int:
    """Where the body of *answer* starts, 0 if its head is not complete; any status but 200 raises."""
    head_end = answer.find(b"\r\n\r\n")
    if head_end < 0:
        return 0
    if not answer.startswith(b"HTTP/1.1 200"):
        raise SubjectError(f"answered {answer[:300].decode('latin-1')!r}")
    return head_end + 4


def _is_complete(answer: bytes) -> bool:
    """Whether *answer* is a whole plain answer, with a length or in chunks."""
    start = _body_start(answer)
    if not start:
        return False
    _, found, rest = answer[:start].lower().partition(b"\r\ncontent-length:")
    if found:
        return len(answer) >= start + int(rest.split(b"\r\n", 1)[0])
    return answer.endswith(b"\r\n" + LAST_CHUNK)


def _exchange(sock: socket.socket, prompt: str, port: int) -> None:
    """Send one plain request and read its whole answer."""
    sock.sendall(_request(port, prompt))
    answer = _receive(sock)
    while not _is_complete(answer):
        answer += _receive(sock)


@contextlib.contextmanager
def _connections(port: int, count: int) -> Iterator[tuple[selectors.BaseSelector, list[socket.socket]]]:
    """Yield *count* connections and a selector that holds them."""
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        socks = [stack.enter_context(_connect(port)) for _ in range(count)]
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
        yield selector, socks


def _ready(selector: selectors.BaseSelector) -> Iterator[socket.socket]:
    """Yield the sockets with something to read; raise SubjectError when there are none for PATIENCE_S."""
    events = selector.select(PATIENCE_S)
    if not events:
        raise SubjectError(f"silent for {PATIENCE_S} s")
    for key, _ in events:
        assert isinstance(key.fileobj, socket.socket)
        yield key.fileobj


class _StreamReader:
    """Follows one streamed answer just closely enough to count its events and see its end."""

    def __init__(self) -> None:
        self.events = 0
        self.started_s = time.perf_counter()
        self.first_event_s: Optional[float] = None
        self._head: Optional[bytes] = b""  # None once the body has begun
        self._tail = b""

    def feed(self, data: bytes) -> bool:
        """Take the next bytes of the answer; return whether it has ended."""
        if self._head is not None:
            self._head += data
            start = _body_start(self._head)
            if not start:
                return False
            data, self._head = self._head[start:], None
        self.events += data.count(b"data:")
        if self.first_event_s is None and self.events:
            self.first_event_s = time.perf_counter() - self.started_s
        self._tail = (self._tail + data[-7:])[-7:]
        return self._tail == b"\r\n" + LAST_CHUNK

    def check(self, expected: int) -> None:
        """Raise SubjectError if the ended stream lost events."""
        if not expected * COUNT_TOLERANCE <= self.events <= expected:
            raise SubjectError(f"relayed {self.events} of {expected} events")


def _latencies_s(sock: socket.socket, port: int, prompt: str, seconds: float) -> list[float]:
    """How long requests sent one after the other took."""
    taken_s = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        start_s = time.perf_counter()
        _exchange(sock, prompt, port)
        taken_s.append(time.perf_counter() - start_s)
    return taken_s


def measure_requests(port: int, effort: Effort) -> dict[str, float]:
    """Small requests, 16 at a time."""
    answered = 0
    with _connections(port, STREAMS) as (selector, socks):
        received = dict.fromkeys(socks, b"")
        start_s = time.perf_counter()
        end_s = start_s + effort.requests_s
        for sock in socks:
            sock.sendall(_request(port, BURST))
        waiting = len(socks)
        while waiting:
            for sock in _ready(selector):
                received[sock] += _receive(sock)
                if not _is_complete(received[sock]):
                    continue
                answered += 1
                received[sock] = b""
                if time.perf_counter() < end_s:
                    sock.sendall(_request(port, BURST))
                else:
                    waiting -= 1
        return {"requests": answered / (time.perf_counter() - start_s)}


def _run_streams(port: int, count: int, prompt: str, expected: int, seconds: float) -> tuple[float, list[float]]:
    """Keep *count* streams open, each followed by another until *seconds* are over; all run to their end.

    Return the events per second and what each stream waited for its first.
    """
    first_events_s = []
    with _connections(port, count) as (selector, socks):
        start_s = time.perf_counter()
        end_s = start_s + seconds
        readers = {}
        for sock in socks:
            readers[sock] = _StreamReader()
            sock.sendall(_request(port, prompt, stream=True))
        while readers:
            for sock in _ready(selector):
                reader = readers[sock]
                if not reader.feed(_receive(sock)):
                    continue
                reader.check(expected)
                first_events_s.append(reader.first_event_s or 0.0)
                del readers[sock]
                if time.perf_counter() < end_s:
                    readers[sock] = _StreamReader()
                    sock.sendall(_request(port, prompt, stream=True))
        return expected * len(first_events_s) / (time.perf_counter() - start_s), first_events_s


def measure_streams(port: int, effort: Effort) -> dict[str, float]:
    """16 streams of 500 events, sent as fast as they are taken."""
    return {"events": _run_streams(port, STREAMS, BURST, STREAM_EVENTS, effort.streams_s)[0]}


def measure_live(port: int, _effort: Effort) -> dict[str, float]:
    """64 streams that start together and have an event every 5 ms each."""
    events, first_s = _run_streams(port, LIVE_STREAMS, LIVE, LIVE_EVENTS, 0.0)
    return {"live_events": events, "live_first_ms": statistics.median(first_s) * 1e3, "live_first_max_ms": max(first_s) * 1e3}


LOAD_MEASURES: tuple[Callable[[int, Effort], dict[str, float]], ...] = (measure_requests, measure_streams, measure_live)


def _read_answer(port: int, stream: bool) -> bytes:
    """The body of one chat answer, read by http.client: exact, and off the clock."""
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=PATIENCE_S)) as connection:
        body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": BURST}], "stream": stream})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
    if response.status != 200:
        raise SubjectError(f"answered {response.status} {answer[:200].decode('latin-1')!r}")
    return answer


def check_relay(port: int) -> str:
    """Return the model the stub was asked for; raise SubjectError unless both answers arrive whole.

    A relay may write the JSON anew and may add to it (the peer names the tier in the message), so the
    answers are compared by what a client uses: the text, and the number and order of the events.
    """
    try:
        answer = json.loads(_read_answer(port, stream=False))
        text, model = answer["choices"][0]["message"]["content"], str(answer["model"])
        events = _read_answer(port, stream=True).split(b"\n\n")
        words = [json.loads(event[6:])["choices"][0]["delta"]["content"] for event in events[:-2]]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise SubjectError(f"gave no valid answer: {error!r}") from None
    if text != "hello there" or events[-2:] != [b"data: [DONE]", b""]:
        raise SubjectError("altered the answer")
    if words != [""] + [" word"] * (STREAM_EVENTS - 2):
        raise SubjectError(f"altered the stream: {len(words)} events before [DONE], not {STREAM_EVENTS - 1}")
    return model


# ---- processes


class _Signals:
    """Turns SIGINT, SIGTERM and SIGHUP into SystemExit (128 + number), though never while held.

    Held, a signal waits: an interrupt between a fork and the line that files the child would leave it behind.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._is_held = False
        self._waiting: Optional[int] = None
        for number in self.NUMBERS:
            signal.signal(number, self._on_signal)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep signals waiting for the length of the block."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._waiting is not None:
            raise SystemExit(128 + self._waiting)

    def _on_signal(self, number: int, _frame: Optional[FrameType]) -> None:
        if self._is_held:
            self._waiting = number
            return
        for each in self.NUMBERS:  # a second Ctrl-C must not cut the clearing up short
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)


def _child_env(home: Path) -> dict[str, str]:
    """The environment of every child: nothing of the user's settings, no proxy for local requests."""
    private = ("PYTHON", "LLMSTACK_", "XDG_", "OPENCODE_")
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(private) and not name.lower().endswith("_proxy")}
    return {**kept, "HOME": str(home), "TMPDIR": str(home)}


def _get_status(port: int, path: str) -> int:
    """The status of a GET, 0 if there was no answer."""
    try:
        with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=PATIENCE_S)) as connection:
            connection.request("GET", path)
            return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0


def _output_of(command: Sequence[str], **options: Any) -> str:
    """Run a short *command* to its end and return its output; raise SubjectError if it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE_S, check=False,
                              **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SubjectError(str(error)) from None
    output = str(done.stdout.decode(errors="replace")).strip()
    if done.returncode:
        last_line = output.splitlines()[-1] if output else "no output"
        raise SubjectError(f"{command[0]} ended with {done.returncode}: {last_line}")
    return output


class Launch(NamedTuple):
    """How to start a server and where it says on which port it listens."""

    name: str
    command: Sequence[str]
    env: dict[str, str]
    announces_on: str  # "stdout" or "stderr"
    announcement: str  # pattern; its first group is the port


class Child:
    """A server this run started, its output in files (a full pipe would stop it)."""

    def __init__(self, launch: Launch, number: int, directory: Path, env: dict[str, str]) -> None:
        self.launch = launch
        self._outputs = {name: directory / f"{number}-{launch.name}.{name}" for name in ("stdout", "stderr")}
        self.started_s = time.perf_counter()
        with self._outputs["stdout"].open("wb") as out, self._outputs["stderr"].open("wb") as err:
            self.process = subprocess.Popen(
                launch.command, stdin=subprocess.PIPE, stdout=out, stderr=err, cwd=directory, env={**env, **launch.env},
                start_new_session=True)  # out of reach of the terminal's Ctrl-C; a group to end as one

    def wait_for_port(self) -> int:
        """Return the port the server announces."""
        while True:
            text = self._outputs[self.launch.announces_on].read_text(errors="replace")
            found = re.search(self.launch.announcement, text)
            if found:
                return int(found.group(1))
            self._wait("announced no port")

    def wait_for_answer(self, port: int) -> None:
        """Return when the server has answered a GET with 200."""
        for path in itertools.cycle(("/models.ini", "/v1/models")):
            if _get_status(port, path) == 200:
                return
            self._wait("answered no GET with 200")

    def resident_bytes(self) -> int:
        """The resident memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status")
        if status.exists():
            found = re.search(r"^VmRSS:\s+(\d+) kB", status.read_text(), re.MULTILINE)
            return int(found.group(1)) * 1024 if found else 0
        return int(_output_of(["ps", "-o", "rss=", "-p", str(self.process.pid)])) * 1024

    def last_words(self) -> str:
        """The last line of standard error, for a failure's message."""
        lines = self._outputs["stderr"].read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing on stderr"

    def stop(self) -> None:
        """End the process and whatever it started, and reap it."""
        self._signal_group(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._signal_group(signal.SIGKILL)
            self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()

    def _signal_group(self, number: signal.Signals) -> None:
        if self.process.returncode is None:  # not reaped, so the number still is this child's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def _wait(self, failure: str) -> None:
        """Sleep a moment of a boot; raise SubjectError when the child is dead or has had its time."""
        status = self.process.poll()
        if status is not None:
            raise SubjectError(f"ended with status {status} at start: {self.last_words()}")
        if time.perf_counter() - self.started_s > PATIENCE_S:
            raise SubjectError(f"{failure} within {PATIENCE_S} s: {self.last_words()}")
        time.sleep(POLL_S)


class Children:
    """The directory and the servers of a run."""

    def __init__(self, signals: _Signals) -> None:
        self._signals = signals
        self._running: list[Child] = []
        self._numbers = itertools.count()
        self.directory = Path(tempfile.mkdtemp(prefix="llmstack-bench-"))
        self.env = _child_env(self.directory)

    def start(self, launch: Launch) -> Child:
        """Start a server; it ends with the run at the latest."""
        try:
            with self._signals.held():
                child = Child(launch, next(self._numbers), self.directory, self.env)
                self._running.append(child)
        except OSError as error:
            raise SubjectError(f"cannot be started: {error}") from None
        return child

    def stop(self, child: Child) -> None:
        """End a server before the run ends."""
        child.stop()
        self._running.remove(child)

    def close(self) -> None:
        """End every server and remove the directory."""
        with self._signals.held():
            for child in reversed(self._running):
                child.stop()
            shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def children_of_run() -> Iterator[Children]:
    """Yield the children of a run; however the block is left, none of them stays behind."""
    children = Children(_Signals())
    try:
        yield children
    finally:
        children.close()


# ---- the subjects

URL_ON_FIRST_LINE = r"\A[^\n]*?https?://[^\s/:]+:(\d+)[^\n]*\n"

NGINX_CONFIG = """\
daemon off;
worker_processes 1;
{user}
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_max_body_size 64m;
    client_body_buffer_size 1m;
    keepalive_requests 1000000000;
    client_body_temp_path {directory}/nginx-body;
    proxy_temp_path {directory}/nginx-proxy;
    fastcgi_temp_path {directory}/nginx-fastcgi;
    uwsgi_temp_path {directory}/nginx-uwsgi;
    scgi_temp_path {directory}/nginx-scgi;
    upstream stub {{
        server {host}:{upstream};
        keepalive 128;
        keepalive_requests 1000000000;
    }}
    server {{
        listen {host}:{port} backlog=1024;
        location / {{
            proxy_pass http://stub;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""

PEER_FACTS = """\
import importlib.metadata, json, platform, llmstack.paths
print(json.dumps([importlib.metadata.version("opencode-llmstack"), platform.python_version(),
                  str(llmstack.paths.MODELS_INI_TEMPLATE)]))
"""

# Release 0.12.0 has no setting for the port of its upstream, only this constant, which app.py copies when
# it is imported. Everything else is its own `python -m llmstack.app`.
PEER_LAUNCH = """\
import sys
from llmstack import paths
paths.SWAP_PORT = int(sys.argv.pop(1))
from llmstack.app import main
main()
"""


class Subject(NamedTuple):
    """Something the client can be pointed at."""

    name: str
    port: int
    child: Child
    has_boot: bool = False  # whether its boot and memory are measured


def start_stub(children: Children) -> Subject:
    """Start the upstream of the run."""
    command = [sys.executable, str(Path(__file__).resolve()), "--stub"]
    child = children.start(Launch("stub", command, {}, "stdout", URL_ON_FIRST_LINE))
    return Subject(DIRECT, child.wait_for_port(), child)


def find_nginx() -> str:
    """Return the path of nginx; raise SubjectError if there is none."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which("nginx", path=places)
    if not found:
        raise SubjectError("no nginx on PATH or in /usr/sbin")
    return found


def start_nginx(children: Children, nginx: str, upstream: int) -> Subject:
    """Start nginx with one worker; it takes no port 0, so a port lost to another program is tried anew."""
    config, log = children.directory / "nginx.conf", children.directory / "nginx.log"
    # As root, nginx would run its worker as nobody, to whom the directory of the run is closed.
    user = f"user {getpass.getuser()} {grp.getgrgid(os.getegid()).gr_name};" if os.geteuid() == 0 else ""
    for attempts_left in (2, 1, 0):
        with socket.create_server((HOST, 0)) as free:
            port = free.getsockname()[1]
        config.write_text(NGINX_CONFIG.format(directory=children.directory, host=HOST, port=port, upstream=upstream, user=user))
        command = [nginx, "-p", str(children.directory), "-c", str(config)]
        child = children.start(Launch(NGINX, command, {}, "stderr", ""))
        try:
            child.wait_for_answer(port)
            return Subject(NGINX, port, child)
        except SubjectError:
            children.stop(child)
            if not attempts_left or "Address already in use" not in log.read_text():
                raise
    raise AssertionError("unreachable")


def start_llmstack(children: Children, command: Sequence[str], upstream: int) -> Subject:
    """Start the router under test."""
    serve = ["serve", "--upstream", f"http://{HOST}:{upstream}", "--host", HOST, "--port", "0"]
    return _start_measured(children, Launch(LLMSTACK, [*command, *serve], {}, "stdout", URL_ON_FIRST_LINE))


def start_peer(children: Children, python: str, models_ini: str, upstream: int) -> Subject:
    """Start the peer's router as its own `start` does, with its bundled models.ini."""
    command = [python, "-c", PEER_LAUNCH, str(upstream), "--host", HOST, "--port", "0"]
    env = {"LLMSTACK_MODELS_INI": models_ini}
    return _start_measured(children, Launch(PEER, command, env, "stderr", r"running on http://[^\s/:]+:(\d+)"))


def _start_measured(children: Children, launch: Launch) -> Subject:
    child = children.start(launch)
    port = child.wait_for_port()
    child.wait_for_answer(port)
    return Subject(launch.name, port, child, has_boot=True)


def peer_facts(children: Children, python: Optional[str]) -> tuple[str, str]:
    """Return the peer's version (with its Python's) and its models.ini; raise SubjectError without it."""
    if not python:
        raise SubjectError("no --peer PYTHON given")
    output = _output_of([python, "-c", PEER_FACTS], cwd=children.directory, env=children.env)
    version, python_version, models_ini = json.loads(output)
    return f"opencode-llmstack {version} on Python {python_version}", str(models_ini)


def router_command(options: argparse.Namespace) -> list[str]:
    """Return what `serve` is appended to."""
    if options.router:
        return shlex.split(options.router)
    script = Path(options.pyz).resolve() if options.pyz else REPOSITORY / "llmstack.py"
    if not script.is_file():
        raise SetupError(f"there is no {script} (name one with --pyz FILE or --router 'CMD ...')")
    return [sys.executable, str(script)]


def find_pyz(children: Children, given: Optional[str]) -> Path:
    """Return the .pyz: the *given* one, or one built from a copy of the repository."""
    if given:
        return Path(given).resolve()
    if not (REPOSITORY / "build_zipapp.py").is_file():
        raise SubjectError("no --pyz FILE given and no build_zipapp.py to build one with")
    copy = children.directory / "build"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.pyz"))
    _output_of([sys.executable, "build_zipapp.py"], cwd=copy, env=children.env)
    built = sorted(copy.rglob("*.pyz"))
    if not built:
        raise SubjectError("build_zipapp.py left no .pyz")
    return built[0]


# ---- the run


def measure_boot(children: Children, launch: Launch) -> dict[str, float]:
    """A fresh server up to its first answer, and its memory then."""
    child = children.start(launch)
    try:
        child.wait_for_answer(child.wait_for_port())
        taken_s = time.perf_counter() - child.started_s
        return {"boot_ms": taken_s * 1e3, "idle_mb": child.resident_bytes() / 1e6}
    finally:
        children.stop(child)


def measure_version(children: Children, pyz: Path, effort: Effort) -> dict[str, float]:
    """`llmstack.pyz version` and a bare Python, one after the other."""
    taken_s: dict[str, list[float]] = {"bare": [], "pyz": []}
    commands = {"bare": [sys.executable, "-c", "pass"], "pyz": [sys.executable, str(pyz), "version"]}
    for _ in range(effort.versions):
        for name, command in commands.items():
            start_s = time.perf_counter()
            _output_of(command, cwd=children.directory, env=children.env)
            taken_s[name].append(time.perf_counter() - start_s)
    medians = {name: statistics.median(values) for name, values in taken_s.items()}
    return {"version_ms": medians["pyz"] * 1e3, "version_ratio": medians["pyz"] / medians["bare"]}


class Field(NamedTuple):
    """Who takes part, and who does not and why."""

    subjects: list[Subject]
    pyz: Optional[Path]
    versions: dict[str, str]
    missing: dict[str, str]
    rewrites: dict[str, str]  # subject -> the model the stub was asked for, where the client said "auto"


def gather_field(children: Children, options: argparse.Namespace) -> Field:
    """Start every subject; only the stub and llmstack are indispensable."""
    command = router_command(options)
    versions, missing, pyz = {}, {}, None
    try:
        direct = start_stub(children)
        subjects = [direct, start_llmstack(children, command, direct.port)]
        rewrites = {each.name: check_relay(each.port) for each in subjects}
    except SubjectError as error:
        raise SetupError(f"cannot start the stub and {shlex.join(command)!r}: {error}") from None
    try:
        nginx = find_nginx()
        versions[NGINX] = _output_of([nginx, "-v"]).rpartition("/")[2]
        subjects.insert(1, start_nginx(children, nginx, direct.port))
    except SubjectError as error:
        missing[NGINX] = str(error)
    try:
        versions[PEER], models_ini = peer_facts(children, options.peer)
        subjects.append(start_peer(children, options.peer, models_ini, direct.port))
        rewrites[PEER] = check_relay(subjects[-1].port)
    except SubjectError as error:
        missing[PEER] = str(error)
    try:
        pyz = find_pyz(children, options.pyz)
    except SubjectError as error:
        missing[PYZ] = str(error)
    return Field(subjects, pyz, versions, missing, rewrites)


def _attempt(results: Results, name: str, what: str, measure: Callable[[], dict[str, float]]) -> bool:
    """File what *measure* returns for the subject *name*, or its failure; return whether it succeeded."""
    try:
        results.add(name, measure())
    except (SubjectError, OSError) as error:
        results.failures.append(f"{name}, round {len(results.rounds)}, {what}: {error}")
        return False
    return True


def _take_latencies(results: Results, subjects: Iterable[Subject], key: str, prompt: str, seconds: float, warm_up: int) -> None:
    """File the p50 of requests sent one after the other over one connection, in slices that go around the subjects."""
    with contextlib.ExitStack() as stack:
        socks: dict[Subject, socket.socket] = {}
        taken_s: dict[Subject, list[float]] = {subject: [] for subject in subjects}

        def start(subject: Subject) -> dict[str, float]:
            socks[subject] = stack.enter_context(_connect(subject.port))
            for _ in range(warm_up):
                _exchange(socks[subject], prompt, subject.port)
            return {}

        def go_on(subject: Subject) -> dict[str, float]:
            taken_s[subject] += _latencies_s(socks[subject], subject.port, prompt, seconds / SLICES)
            return {}

        for step in (start, *[go_on] * SLICES):
            taken_s = {each: values for each, values in taken_s.items()
                       if _attempt(results, each.name, key, lambda each=each, step=step: step(each))}  # type: ignore[misc]
        for subject, values in taken_s.items():
            results.add(subject.name, {key: statistics.median(values) * 1e3})


def _run_round(children: Children, field: Field, effort: Effort, results: Results, first: int) -> None:
    """Take every measure once over every subject, beginning with the subject number *first*."""
    results.rounds.append({})
    turn = first % len(field.subjects)
    order = [*field.subjects[turn:], *field.subjects[:turn]]

    def check(subject: Subject) -> dict[str, float]:
        check_relay(subject.port)
        return {}

    sound = [each for each in order if _attempt(results, each.name, "check_relay", lambda each=each: check(each))]
    _take_latencies(results, sound, "one_ms", BURST, effort.one_s, warm_up=20)
    for measure in LOAD_MEASURES:
        for each in sound:
            _attempt(results, each.name, measure.__name__, lambda each=each, measure=measure: measure(each.port, effort))
    _take_latencies(results, sound, "big_ms", BIG_PROMPT, effort.big_s, warm_up=2)
    for each in order:
        if each.has_boot:
            _attempt(results, each.name, "measure_boot", lambda each=each: measure_boot(children, each.child.launch))
    if field.pyz:
        pyz = field.pyz
        _attempt(results, LLMSTACK, "measure_version", lambda: measure_version(children, pyz, effort))
    latencies = results.rounds[-1].get("one_ms", {})
    if DIRECT in latencies:
        for name in latencies.keys() - {DIRECT}:
            results.add(name, {"added_ms": latencies[name] - latencies[DIRECT]})


def run_rounds(children: Children, field: Field, rounds: int, effort: Effort) -> Results:
    """Run a short warm-up that counts for nothing, then the rounds."""
    _run_round(children, field, QUICK, Results(), first=0)
    results = Results()
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", file=sys.stderr, flush=True)
        _run_round(children, field, effort, results, first=number)
    if results.failures:
        results.failures += [f"{each.name}, last on stderr: {each.child.last_words()}" for each in field.subjects]
    return results


def judge(goal: Goal, results: Results, missing: Container[str]) -> Outcome:
    """Return how llmstack did against *goal*; rounds that llmstack failed are not left out, but a miss."""
    ours = results.samples(goal.measure, LLMSTACK)
    values = results.ratios(goal.measure, LLMSTACK, goal.needs) if goal.needs in RIVALS else ours  # type: ignore[arg-type]
    if goal.needs in missing or (ours and not values):
        return Outcome(goal, UNKNOWN)
    if not values:
        return Outcome(goal, MISS)
    value = statistics.median(values)
    is_met = value <= goal.limit if goal.at_most else value >= goal.limit
    is_whole = len(ours) == len(results.rounds)
    return Outcome(goal, PASS if is_met and is_whole else MISS, value, min(values), max(values))


# ---- the report


def describe_machine(field: Field) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": _cpu_model(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        **field.versions,
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    with contextlib.suppress(SubjectError):
        return _output_of(["sysctl", "-n", "machdep.cpu.brand_string"])
    return platform.processor() or "unknown CPU"


def render_text(machine: dict[str, Any], field: Field, results: Results, outcomes: Sequence[Outcome]) -> str:
    """Return the report for people."""
    rivals = [f"{name}: {'NOT MEASURED' if name in field.missing else field.versions[name]}" for name in RIVALS]
    lines = [
        "machine: {usable_cores} of {cores} cores, {cpu}; {system}; load {load_before}".format(**machine),
        f"python:  {machine['python']}; rivals: {'; '.join(rivals)}",
    ]
    if machine["load_before"] > machine["usable_cores"] / 2:
        lines.append("warning: other programs were at work at the start; measure again on a quiet machine")
    lines += [f'auto:    {name} asked the stub for "{model}"' for name, model in field.rewrites.items()]
    lines += ["", f"medians, rounds: {len(results.rounds)}", *_render_table(field, results), ""]
    lines += ["goals (llmstack; the extremes of the rounds in brackets)", *map(_render_outcome, outcomes)]
    lines += [f"not measured: {name}: {reason}" for name, reason in field.missing.items()]
    lines += [f"failed: {failure}" for failure in results.failures]
    return "\n".join(lines)


def _render_table(field: Field, results: Results) -> list[str]:
    names = [subject.name for subject in field.subjects]
    lines = [" " * 44 + "".join(f"{name:>12}" for name in names)]
    for measure in MEASURES:
        medians = [results.median(measure.key, name) for name in names]
        cells = ["-" if value is None else f"{value:,.{measure.digits}f}" for value in medians]
        lines.append(f"{measure.label:32}{measure.unit:>12}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def _render_outcome(outcome: Outcome) -> str:
    goal = outcome.goal
    bound = f"{'<=' if goal.at_most else '>='} {goal.limit:g} {goal.unit}"
    line = f"{outcome.verdict:13} {goal.text:30} {bound:22}"
    if outcome.value is None:
        return line.rstrip()
    return f"{line} {outcome.value:8.2f}  ({outcome.low:.2f} to {outcome.high:.2f})"


def render_json(machine: dict[str, Any], field: Field, results: Results, outcomes: Sequence[Outcome]) -> str:
    """Return the report as one JSON object."""
    names = [subject.name for subject in field.subjects]
    report = {
        "machine": machine,
        "missing": field.missing,
        "rewrites": field.rewrites,
        "rounds": len(results.rounds),
        "measures": {measure.key: {
            "label": measure.label.strip(),
            "unit": measure.unit,
            "medians": {name: results.median(measure.key, name) for name in names},
            "rounds": {name: results.samples(measure.key, name) for name in names},
        } for measure in MEASURES},
        "goals": [{**outcome._asdict(), "goal": outcome.goal._asdict()} for outcome in outcomes],
        "failures": results.failures,
    }
    return json.dumps(report, indent=2)


# ---- the start


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds to run (default 5; 2 with --quick)")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that can import opencode-llmstack")
    parser.add_argument("--pyz", metavar="FILE", help="serve from this .pyz instead of llmstack.py")
    parser.add_argument("--router", metavar="CMD", help="serve with this command instead of llmstack.py")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="shorter measures, fewer rounds: a smoke test")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    if list(argv) == ["--stub"]:
        _Stub().run()
        return 0
    parser = build_parser()
    options = parser.parse_args(argv)
    rounds = options.rounds if options.rounds is not None else (2 if options.quick else 5)
    if rounds < 1:
        parser.error("--rounds: at least 1")
    try:
        with children_of_run() as children:
            field = gather_field(children, options)
            machine = describe_machine(field)
            results = run_rounds(children, field, rounds, QUICK if options.quick else FULL)
    except SetupError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    outcomes = [judge(goal, results, field.missing) for goal in GOALS]
    print((render_json if options.json else render_text)(machine, field, results, outcomes))
    return 1 if options.check and any(outcome.verdict == MISS for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
