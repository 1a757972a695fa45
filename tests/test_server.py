"""RELAY: the server, its clients and the pool of upstream connections, without a router."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from typing import Callable, Iterator, Optional

import pytest

import llmstack
from llmstack import ChunkFraming, HttpError, chunk, head_end, parse_request_head, parse_response_head
from tests.scripted import WAIT_S, ScriptedUpstream, Wire, always, wait

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
PUT = b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"


@pytest.fixture(autouse=True)
def home() -> None:
    """No files here."""


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """No processes either; that all threads end is seen to by the rig."""


class TestApp(llmstack.App):
    """Answers with what it was sent; counts its housekeeping."""

    __test__ = False

    def __init__(self) -> None:
        self.log = llmstack.Log("", "error")
        self.kept_house = 0
        self.kept = threading.Event()
        self.holding = threading.Event()        # a /hold is being answered...
        self.let_go = threading.Event()         # ...until this
        self.flooded = threading.Event()        # a /flood ended
        self.cores: set[int] = set()            # that answered last

    def answer(self, client: llmstack.Client, request: llmstack.Request) -> None:
        if hasattr(os, "sched_getaffinity"):
            self.cores = set(os.sched_getaffinity(0))
        if request.target == "/flood":
            try:
                while True:
                    client.send(b"x" * 100_000)
            finally:
                self.flooded.set()
        if request.target == "/hold":
            self.holding.set()
            wait(self.let_go)
        client.reply(200, client.read_body(request), "text/plain")

    def every_second(self) -> None:
        self.kept_house += 1
        self.kept.set()


class Rig:
    """A server on port 0 and its clients."""

    def __init__(self, most: int = 512, head_timeout_s: float = 30.0, every_s: float = 0.002) -> None:
        self._others = set(threading.enumerate())
        self.app = TestApp()
        self.server = llmstack.Server("127.0.0.1", 0, self.app, most=most, head_timeout_s=head_timeout_s)
        self._thread = threading.Thread(target=self.server.serve_forever, args=(every_s,), daemon=True)
        self._thread.start()
        self._clients: list[Wire] = []

    def client(self, sent: bytes = b"") -> Wire:
        client = Wire(socket.create_connection(("127.0.0.1", self.server.server_port), WAIT_S))
        self._clients.append(client)
        client.send(sent)
        return client

    def close(self) -> None:
        self.app.let_go.set()
        for client in self._clients:
            client.close()
        self.server.shutdown()
        self._thread.join(WAIT_S)
        self.server.server_close()
        for thread in set(threading.enumerate()) - self._others:
            thread.join(WAIT_S)
            assert not thread.is_alive(), thread


Start = Callable[..., Rig]


@pytest.fixture
def start() -> Iterator[Start]:
    rigs: list[Rig] = []

    def start(**settings: float) -> Rig:
        rigs.append(Rig(**settings))            # type: ignore[arg-type]
        return rigs[-1]
    yield start
    for rig in rigs:
        rig.close()


def status_of(client: Wire) -> int:
    return client.read_message("GET").status


# ---- clients that hold on to what others need


def test_a_client_that_stops_reading_is_let_go(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack.Client, "send_timeout_s", 0.05)
    rig = start(head_timeout_s=0.03)
    rig.client(b"GET /flood HTTP/1.1\r\nHost: localhost\r\n\r\n")
    wait(rig.app.flooded)


def test_a_client_that_reads_slowly_gets_it_all(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is that it goes on, not how long the whole takes."""
    monkeypatch.setattr(llmstack.Client, "send_timeout_s", WAIT_S)
    rig = start(head_timeout_s=0.03)
    body = bytes(range(256)) * 40_000
    client = rig.client(b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert client.read_message("PUT").body == body


def settled(rig: Rig) -> int:
    """How many connections the server has, and has read all of."""
    clients = list(rig.server._clients)
    for client in clients:
        with contextlib.suppress(BlockingIOError):
            client._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            return 0
    return len(clients)


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: localhost\r\n", PUT + b"half"],
                         ids=["nothing", "a byte", "half a head", "half a body"])
def test_the_oldest_half_open_request_gives_way(start: Start, sent: bytes) -> None:
    rig = start(most=4)
    clients = []
    for number in range(1, 5):                  # one after the other, as their age is what counts
        clients.append(rig.client(sent))
        end = time.monotonic() + WAIT_S
        while settled(rig) != number and time.monotonic() < end:
            time.sleep(0.001)
    first, *others = clients
    last = rig.client(GET)
    assert status_of(last) == 200
    assert first.ended()
    rig.client(GET)
    assert others[0].ended(), "and then the next"


def test_half_open_requests_within_a_quarter_stay(start: Start) -> None:
    rig = start(most=4)
    half = rig.client(GET[:9])
    served = [rig.client(GET) for _ in range(3)]
    assert [status_of(client) for client in served] == [200, 200, 200]
    assert status_of(rig.client(GET)) == 503
    half.send(GET[9:])
    assert status_of(half) == 200


def test_requests_under_way_never_give_way(start: Start) -> None:
    rig = start(most=1)
    busy = rig.client(b"GET /hold HTTP/1.1\r\nHost: localhost\r\n\r\n")
    wait(rig.app.holding)
    assert status_of(rig.client(GET)) == 503
    rig.app.let_go.set()
    assert status_of(busy) == 200


# ---- what is short


class NoThread(threading.Thread):
    def start(self) -> None:
        raise RuntimeError("can't start new thread")


def test_without_threads_everybody_gets_a_503(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = start(most=4)
    assert status_of(rig.client(GET)) == 200
    monkeypatch.setattr(llmstack.threading, "Thread", NoThread)
    clients = [rig.client(GET) for _ in range(120)]
    answers = [client.read_message("GET") for client in clients]
    monkeypatch.undo()
    assert {got.status for got in answers} == {503}
    assert {got.header("retry-after") for got in answers} == {"1"}
    assert {got.json["error"]["message"] for got in answers} == {"no more threads are to be had"}
    assert all(client.ended() for client in clients)
    assert status_of(rig.client(GET)) == 200, "their places are free again"


def test_housekeeping_is_not_done_at_every_connection(start: Start) -> None:
    rig = start(every_s=3600.0)
    for _ in range(30):
        assert status_of(rig.client(GET)) == 200
    assert rig.app.kept_house == 0


def test_a_server_ends_at_once_however_seldom_it_keeps_house(start: Start) -> None:
    start(every_s=3600.0).close()


@pytest.mark.skipif(llmstack.core_here() < 0, reason="no thread is kept on a core here")
def test_connections_share_a_core_and_the_main_thread_keeps_its_own(start: Start) -> None:
    before = os.sched_getaffinity(0)
    rig = start()
    for _ in range(3):
        assert status_of(rig.client(GET)) == 200
        assert len(rig.app.cores) == 1
    assert os.sched_getaffinity(os.getpid()) == before


def test_housekeeping_is_done_without_any_connection(start: Start) -> None:
    wait(start().app.kept)


def test_memory_is_returned_once_clients_have_come(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    returned = threading.Event()
    monkeypatch.setattr(llmstack, "RETURN_MEMORY_S", 0.0)
    monkeypatch.setattr(llmstack, "return_memory", returned.set)
    rig = start()
    wait(returned)
    returned.clear()
    rig.client().close()
    wait(returned)


def test_returning_memory_never_fails() -> None:
    llmstack.return_memory()


# ---- upstream connections


def test_idle_upstream_connections_are_closed() -> None:
    with ScriptedUpstream() as scripted:
        upstream = llmstack.Upstream("127.0.0.1", scripted.port)
        for sock in (upstream.connect(), upstream.connect()):
            upstream.checkin(sock)
        ends = [scripted.next(), scripted.next()]
        upstream.close_idle(3600.0)
        used, again = upstream.checkout()
        assert again, "the young ones stay"
        upstream.close_idle(0.0)
        used.sendall(b"x")
        assert sorted(end.rest() for end in ends if end.sock.recv(1, socket.MSG_PEEK) == b"") == [b""]
        used.close()
        upstream.close_idle(0.0)


@pytest.mark.parametrize("said", [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"hel") + chunk(b"lo") + b"0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\nhello",
], ids=["length", "chunked", "close"])
def test_an_answer_of_our_own_comes_in_any_pieces(said: bytes) -> None:
    for size in (1, 7, len(said)):
        pieces = iter([said[i:i + size] for i in range(0, len(said), size)])
        assert llmstack._read_answer(pieces, "GET")[1] == b"hello"


def test_the_answer_to_a_head_has_no_body() -> None:
    with ScriptedUpstream(always(b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n")) as scripted:
        response, body = llmstack.Upstream("127.0.0.1", scripted.port).get("/x", method="HEAD")
    assert (response.status, body) == (200, b"")


@pytest.mark.parametrize("said", [
    [b"HTTP/1.1 200 OK\r\nContent-Le"], [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello"], [],
    [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"], [b"x" * 1000] * 200,
], ids=["in its head", "in its body", "at once", "in its chunks", "a head without end"])
def test_an_answer_that_is_not_whole_is_a_value_error(said: list[bytes]) -> None:
    with pytest.raises(ValueError):
        llmstack._read_answer(iter(said), "GET")


# ---- whatever comes


ALPHABET = [b"\r\n", b"\r\n", b"\r\n\r\n", b"\r", b"\n", b"\0", b" ", b"\t", b":", b",", b";", b"0", b"5", b"a", b"ffffffff",
            b"GET / HTTP/1.1", b"POST /v1 HTTP/1.0", b"Host: localhost", b"Content-Length: 5", b"Content-Length: 99",
            b"Transfer-Encoding: chunked", b"Connection: close, x", b"Origin: http://localhost", b"X: \xff", b"\x1b",
            b"HTTP/1.1 200 OK", b"HTTP/1.1 101 ", b"Expect: 100-continue", b"hello", b"*", b"http://x", b"\x80"]


def outcome(parse: Callable[[], object]) -> Optional[object]:
    """What a parser returns, None where it refuses; any other exception is a fault."""
    try:
        return parse()
    except (HttpError, ValueError):
        return None


def feed_all(data: bytes, size: int) -> Optional[tuple[bytes, bool]]:
    """(payload, whether it is done) of chunks that come in pieces of this size."""
    framing, payload = ChunkFraming(), b""
    for position in range(0, len(data), size):
        if framing.ended:
            break
        payload += framing.feed(data[position:position + size])
    return payload, framing.ended


def find_end(data: bytes, size: int) -> int:
    """head_end() of bytes that come in pieces of this size."""
    searched, end = 0, -1
    while end < 0 and searched < len(data):
        end = head_end(data[:searched + size], searched)
        searched += size
    return end


@pytest.mark.parametrize("seed", range(4))
def test_nothing_but_a_refusal_comes_of_any_bytes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10_000):
        data = b"".join(rng.choices(ALPHABET, k=rng.randrange(1, 14)))
        outcome(lambda: parse_request_head(data))               # noqa: B023
        outcome(lambda: parse_response_head(data, "GET"))       # noqa: B023
        whole, single = (outcome(lambda: feed_all(data, n)) for n in (len(data), 1))    # noqa: B023
        assert whole == single, data
        ends = [outcome(lambda: find_end(data, n)) for n in (len(data), 1)]             # noqa: B023
        assert ends[0] == ends[1] or None in ends, data


def test_an_answered_request_leaves_the_next_alone(start: Start) -> None:
    client = start().client(PUT + b"123456789" + GET + b"\r\n" + GET)
    assert [client.read_message(m).status for m in ("PUT", "GET", "GET")] == [200, 200, 200]
