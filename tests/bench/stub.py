"""The upstream of the benchmark, a program of its own: costs next to nothing, for its answers are made beforehand.

    python3 tests/bench/stub.py                 prints its address, serves until its standard input ends
    python3 tests/bench/stub.py --port N ...    the same as a llama-server, until its parent is gone

A plain answer, or one of two streams: BURST_CHUNKS sent at once, each on its own, or LIVE_CHUNKS, one every
LIVE_INTERVAL_S, where the last prompt begins with LIVE. Bodies are parsed, as real servers do.
"""

from __future__ import annotations

import collections
import contextlib
import heapq
import itertools
import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, Optional

HOST = "127.0.0.1"
STREAM_EVENTS = 500
LIVE_EVENTS = 200
LIVE_INTERVAL_S = 0.005
LIVE = "live"


def content_length(head: bytes) -> Optional[int]:
    """What a head says, None when it does not."""
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.split(b"\r\n", 1)[0]) if found else None


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(payload), payload)


def _stream_chunks(count: int) -> list[bytes]:
    """So many SSE events as a server sends them, each a chunk: the role, the words, `[DONE]`."""
    event = ('data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"choices":[{"index":0,'
             '"delta":{%s},"finish_reason":null}]}\n\n')
    role, word = (_chunk((event % delta).encode()) for delta in ('"role":"assistant","content":""', '"content":" word"'))
    return [role, *[word] * (count - 2), _chunk(b"data: [DONE]\n\n")]


def _json_answer(status: bytes, value: Any) -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


STREAM_HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
               b"Transfer-Encoding: chunked\r\n\r\n")
LAST_CHUNK = b"0\r\n\r\n"
BURST_CHUNKS, LIVE_CHUNKS = _stream_chunks(STREAM_EVENTS), _stream_chunks(LIVE_EVENTS)
GET_ANSWERS = {b"/health": _json_answer(b"200 OK", {"status": "ok"}),
               b"/v1/models": _json_answer(b"200 OK", {"object": "list", "data": []})}


class _Connection:
    """One connection to the stub: a request coming in, sends going out one by one."""

    def __init__(self, stub: Stub, sock: socket.socket) -> None:
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
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                data = self._unsent[0]
                sent = self._sock.send(data)
                if sent < len(data):
                    self._unsent[0] = data[sent:]
                else:
                    self._unsent.popleft()
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
            self._expected_bytes = head_end + 4 + (content_length(bytes(self._received[:head_end])) or 0)
        return len(self._received) >= self._expected_bytes

    def _answer(self, request: bytes) -> None:
        method, path, _ = request.split(b" ", 2)
        if method != b"POST":
            self.send(GET_ANSWERS.get(path, _json_answer(b"404 Not Found", {})))
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


class Stub:
    """An upstream that costs next to nothing: one selectors loop, answers made beforehand."""

    def __init__(self, port: int = 0) -> None:
        self.selector = selectors.DefaultSelector()
        self._parent = os.getppid() if port else 0      # whose end is ours, too; 0: standard input's is
        self._listener = socket.create_server((HOST, port), backlog=1024)
        self._listener.setblocking(False)
        self._due: list[tuple[float, int, _Connection, int]] = []  # heap: when, tie-break, whose, event
        self._serial = itertools.count()
        self._completions: dict[str, bytes] = {}

    def run(self) -> None:
        """Print the address, then serve until the parent dies, which standard input's end shows, too."""
        self.selector.register(self._listener, selectors.EVENT_READ, self._accept)
        if not self._parent:
            self.selector.register(sys.stdin, selectors.EVENT_READ, None)
        print(f"http://{HOST}:{self._listener.getsockname()[1]}", flush=True)
        while self._parent in (0, os.getppid()):
            timeout_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else 1.0
            for key, mask in self.selector.select(timeout_s):
                if key.data is None:
                    return
                key.data(mask)
            self._send_due()

    def completion(self, model: str) -> bytes:
        """The plain answer, made once; it names the *model* the stub was asked for, so rewriting can be seen."""
        if model not in self._completions:
            choice = {"index": 0, "message": {"role": "assistant", "content": "hello there"}, "finish_reason": "stop"}
            self._completions[model] = _json_answer(
                b"200 OK", {"id": "chatcmpl-1", "object": "chat.completion", "model": model, "choices": [choice]})
        return self._completions[model]

    def start_live(self, connection: _Connection) -> None:
        """Send *connection* a live stream, its first event now."""
        heapq.heappush(self._due, (time.monotonic(), next(self._serial), connection, 0))

    def _accept(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.selector.register(sock, selectors.EVENT_READ, _Connection(self, sock).on_ready)

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


def main(words: Sequence[str]) -> None:
    """Serve as the command line says; a llama-server is also asked which flags it takes."""
    if "--version" in words:
        return
    port = int(words[words.index("--port") + 1]) if "--port" in words else 0
    Stub(port).run()


if __name__ == "__main__":
    main(sys.argv[1:])
