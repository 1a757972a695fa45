"""The client: one selectors loop, and readers that follow an answer as closely as its measure needs."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import selectors
import socket
import struct
import time
from typing import Any, Optional

from tests.bench.processes import PATIENCE_S, SubjectError
from tests.bench.stub import HOST, LAST_CHUNK, STREAM_EVENTS, content_length

RECEIVE_BYTES = 1 << 18
BURST = "hello"  # a prompt for the stub's other stream
# A relay may cut the stream into other chunks, and a chunk header may then fall inside a "data:". The exact
# comparison is the one made before the clock starts; under the clock a stream may look this much short.
COUNT_TOLERANCE = 0.98

_SERIAL = itertools.count()


def connect(port: int) -> socket.socket:
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


class _PlainReader:
    """Collects one plain answer, with a length or in chunks."""

    def __init__(self) -> None:
        self._answer = b""

    def feed(self, data: bytes) -> bool:
        """Take the next bytes of the answer; return whether it has ended."""
        self._answer += data
        start = _body_start(self._answer)
        length = content_length(self._answer[:start])
        if length is None:
            return bool(start) and self._answer.endswith(b"\r\n" + LAST_CHUNK)
        return len(self._answer) >= start + length


class _StreamReader:
    """Follows one streamed answer just closely enough to count its events and see its end."""

    def __init__(self, expected: int) -> None:
        self._expected, self.events = expected, 0
        self._started_s, self.first_event_s = time.perf_counter(), 0.0
        self._head: Optional[bytes] = b""  # None once the body has begun
        self._tail = b""

    def feed(self, data: bytes) -> bool:
        """Take the next bytes; return whether the answer has ended. Raise SubjectError if it ended without its events."""
        if self._head is not None:
            self._head += data
            start = _body_start(self._head)
            if not start:
                return False
            data, self._head = self._head[start:], None
        self.events += data.count(b"data:")
        if not self.first_event_s and self.events:
            self.first_event_s = time.perf_counter() - self._started_s
        self._tail = (self._tail + data[-7:])[-7:]
        if self._tail != b"\r\n" + LAST_CHUNK:
            return False
        if not self._expected * COUNT_TOLERANCE <= self.events <= self._expected:
            raise SubjectError(f"relayed {self.events} of {self._expected} events")
        return True


def exchange(sock: socket.socket, prompt: str, port: int) -> float:
    """Send one plain request and read its whole answer; return how long that took, in seconds."""
    start_s = time.perf_counter()
    sock.sendall(_request(port, prompt))
    reader = _PlainReader()
    while not reader.feed(_receive(sock)):
        pass
    return time.perf_counter() - start_s


def keep_asking(port: int, count: int, prompt: str, events: int, seconds: float) -> tuple[list[Any], float]:
    """Ask over *count* connections, again on each when its answer is whole, until *seconds* are over; all run to their end.

    *events* is what a stream has, 0 asks for plain answers. Return the readers of the answers, and the seconds it took.
    """
    done: list[Any] = []
    readers: dict[socket.socket, Any] = {}

    def ask(sock: socket.socket) -> None:
        readers[sock] = _StreamReader(events) if events else _PlainReader()
        sock.sendall(_request(port, prompt, stream=bool(events)))

    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        socks = [stack.enter_context(connect(port)) for _ in range(count)]
        start_s = time.perf_counter()
        for sock in socks:
            selector.register(sock, selectors.EVENT_READ)
            ask(sock)
        while readers:
            ready = selector.select(PATIENCE_S)
            if not ready:
                raise SubjectError(f"silent for {PATIENCE_S} s")
            for key, _ in ready:
                sock = key.fileobj  # type: ignore[assignment]
                if readers[sock].feed(_receive(sock)):
                    done.append(readers.pop(sock))
                    if time.perf_counter() < start_s + seconds:
                        ask(sock)
        return done, time.perf_counter() - start_s


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
