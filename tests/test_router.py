"""RELAY and ROUTER: a real server on port 0 before a scripted upstream, raw sockets as its clients.

A test drives both ends in the order it reads; every read waits for what must come, so nothing depends on time.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import pytest

import llmstack
from llmstack import chunk
from tests.scripted import (
    WAIT_S,
    Connection,
    Message,
    Script,
    ScriptedUpstream,
    Wire,
    always,
    answer,
    read_chunks,
    reply_with,
    wait,
)

HOST = "Host: 127.0.0.1:10101"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
CONFIG = llmstack.Config(tiers=(
    llmstack.Tier("code-fast", "fast", ctx_size=131_072, aliases=("fast",)),
    llmstack.Tier("code-smart", "agent", ctx_size=65_536, aliases=("coder",)),
    llmstack.Tier("code-ultra", "ultra", backend="litellm", model="anthropic/claude-opus", ctx_size=24_000),
    llmstack.Tier("plan", "plan", ctx_size=65_536),
))


class Client(Wire):
    """A client's connection to the router."""

    def __init__(self, port: int) -> None:
        super().__init__(socket.create_connection(("127.0.0.1", port), WAIT_S))

    def ask(self, request: bytes) -> Message:
        """Send a request and read its whole answer."""
        self.send(request)
        return self.read_message(request.split(b" ")[0].decode())


class HeardLog(llmstack.Log):
    """A log that is kept, and can be waited for: most lines are written behind the answer."""

    def __init__(self) -> None:
        super().__init__("", "debug")
        self._lines: list[str] = []
        self._news = threading.Condition()

    def _hear(self, message: str) -> None:
        with self._news:
            self._lines.append(message)
            self._news.notify_all()

    debug = info = warning = error = _hear

    def line_with(self, text: str) -> str:
        """The first line with this text, once there is one."""
        def found() -> Optional[str]:
            return next((line for line in self._lines if text in line), None)
        with self._news:
            assert self._news.wait_for(found, WAIT_S), f"{text!r} was not logged, but {self._lines}"
            return found() or ""

    def says(self, text: str) -> bool:
        """Whether it is there already: for what must never be, asked when all threads have ended."""
        return any(text in line for line in self._lines)


class Rig:
    """A router on port 0, what is behind it, and the clients of one test."""

    def __init__(self, script: Optional[Script], *, most: int = 512, head_timeout_s: float = 30.0, prefix: str = "",
                 upstream_port: int = 0, receive_buffer_bytes: int = 0, tls: Optional[ssl.SSLContext] = None,
                 **settings: Any) -> None:
        self._others = set(threading.enumerate())
        self.upstream = ScriptedUpstream(script, receive_buffer_bytes, tls)
        self.log = HeardLog()
        self.never_logged = ["internal error"]      # checked at the end
        behind = llmstack.Upstream("127.0.0.1", upstream_port or self.upstream.port, prefix, tls is not None)
        self.app = llmstack.RouterApp(CONFIG, llmstack.UpstreamApp(behind, self.log), self.log,
                                      llmstack.Setting(**settings))
        self._server = llmstack.Server("127.0.0.1", 0, self.app, most=most, head_timeout_s=head_timeout_s)
        self.port: int = self._server.server_port
        self._clients: list[Client] = []
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.002,), daemon=True)
        self._thread.start()

    def client(self) -> Client:
        client = Client(self.port)
        self._clients.append(client)
        return client

    def ask(self, request: bytes) -> Message:
        """The answer to a request on a connection of its own."""
        return self.client().ask(request)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._server.shutdown()
        self._thread.join(WAIT_S)
        self._server.server_close()
        try:
            self.upstream.close()
        finally:
            self.app.behind.upstream.forget()
            for thread in set(threading.enumerate()) - self._others:    # those that serve connections: all must end
                thread.join(WAIT_S)
                assert not thread.is_alive(), thread
        for text in self.never_logged:
            assert not self.log.says(text), self.log.line_with(text)


Start = Callable[..., Rig]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """No processes here; that all threads end is seen to by Rig.close."""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a router with the tiers above; all of it is closed behind the test."""
    monkeypatch.setattr(llmstack, "PATIENCE_MS", 5)     # the suite's time, not its outcome
    with contextlib.ExitStack() as stack:
        def start(script: Optional[Script] = None, **settings: Any) -> Rig:
            rig = Rig(script, **settings)
            stack.callback(rig.close)
            return rig
        yield start


# ---- what is sent


def request(method: str = "GET", target: str = "/props", *lines: str, body: bytes = b"") -> bytes:
    """A request with a Content-Length where it has a body; its Host is the router's unless `lines` have one."""
    head = [f"{method} {target} HTTP/1.1", *([] if any(x.lower().startswith("host:") for x in lines) else [HOST]), *lines]
    if body:
        head.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def post(body: object, *lines: str, target: str = CHAT) -> bytes:
    """A POST of JSON, or of bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request("POST", target, "Content-Type: application/json", *lines, body=data)


def chat(model: Optional[str] = "auto", *lines: str, text: str = "hello", target: str = CHAT, **more: object) -> bytes:
    return post({"model": model, "messages": [{"role": "user", "content": text}], **more}, *lines, target=target)


OK = answer()
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
SSE_CHUNKED = SSE + b"Transfer-Encoding: chunked\r\n\r\n"
JSON_CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = [b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % n for n in range(4)] + [b"data: [DONE]\n\n"]


def error_of(message: Message) -> dict[str, Any]:
    """The error in an OpenAI-shaped answer."""
    assert message.header("content-type") == "application/json"
    assert list(message.json) == ["error"]
    error = message.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == message.status
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "Traceback" not in error["message"]
    return dict(error)


def refused_port() -> Iterator[int]:
    """A port on which nothing listens, held so that nothing else can."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


nothing_listens = pytest.fixture(refused_port)


# ---- passing through


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "POST", "PROPFIND"])
def test_every_method_passes(start: Start, method: str) -> None:
    rig = start(reply_with(lambda m: answer(b"" if m.start.startswith(b"HEAD") else b"fine", "207 Odd", "X-From: upstream")))
    client, body = rig.client(), b"" if method == "HEAD" else b"a=b"
    for _ in range(2):                          # twice: the first answer must have been framed right
        got = client.ask(request(method, "/slots/1?action=save&x=%2F", "X-To: upstream", body=body))
        assert (got.start, got.header("x-from")) == (b"HTTP/1.1 207 Odd", "upstream")
        assert got.body == (b"" if method == "HEAD" else b"fine")
    seen = rig.upstream.requests[1]
    assert seen.start == f"{method} /slots/1?action=save&x=%2F HTTP/1.1".encode()
    assert (seen.header("x-to"), seen.body) == ("upstream", body)
    assert rig.upstream.connections == 1


def test_the_length_of_a_head_answer_is_kept(start: Start) -> None:
    rig = start(always(b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n"))
    client = rig.client()
    assert client.ask(request("HEAD", "/health")).header("content-length") == "1234"
    assert client.ask(request("HEAD", "/health")).status == 200


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_answers_without_a_body(start: Start, status: str) -> None:
    rig = start(always(f"HTTP/1.1 {status}\r\nETag: x\r\n\r\n".encode()))
    client = rig.client()
    for _ in range(2):
        got = client.ask(request())
        assert (got.header("etag"), got.header("transfer-encoding")) == ("x", "")


@pytest.mark.parametrize("target", ["/v1/embeddings", "/upstream/code-fast/slots?a=b&a=c&d", "/x?y=http://z/?q", "/%2e%2e/x",
                                    "//x", "/a;b=c?%00", "/caf\xe9"])
def test_targets_pass_byte_for_byte(start: Start, target: str) -> None:
    rig = start(always(OK))
    assert rig.ask(request("GET", target)).status == 200
    assert rig.upstream.requests[0].target == target


def test_the_upstreams_prefix_is_put_in_front(start: Start) -> None:
    rig = start(always(OK), prefix="/api")
    rig.ask(request("GET", "/health?x=1"))
    rig.ask(chat("code-fast"))
    assert [m.target for m in rig.upstream.requests] == ["/api/health?x=1", "/api" + CHAT]


@pytest.mark.parametrize("body", [bytes(range(256)), b"\r\n\r\n", b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n", os.urandom(300_000)],
                         ids=["all bytes", "newlines", "framing", "large"])
def test_bodies_pass_byte_for_byte_both_ways(start: Start, body: bytes) -> None:
    rig = start(reply_with(lambda m: answer(m.body)))
    client = rig.client()
    for _ in range(2):
        assert client.ask(request("PUT", "/x", body=body)).body == body
    assert [m.body for m in rig.upstream.requests] == [body, body]


def test_request_headers_pass_as_they_were_spelled(start: Start) -> None:
    rig = start(always(OK))
    lines = ["User-Agent: curl/8", "X-CaSe:  two  spaces ", "X-Twice: 1", "accept: */*", "X-Twice: 2", "X-Latin: \xe9",
             "X-Empty:", "Authorization: Bearer theirs", "Cookie: a=b", "x-session-id: s"]
    rig.ask(request("POST", "/x", *lines, body=b"{}"))
    head = rig.upstream.requests[0].raw.split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    assert head == ["POST /x HTTP/1.1", f"Host: 127.0.0.1:{rig.upstream.port}", *lines, "Content-Length: 2"]


def test_hop_by_hop_headers_of_a_request_stay_here(start: Start) -> None:
    rig = start(always(OK))
    rig.ask(request("GET", "/x", "Connection: keep-alive, X-Hop", "Keep-Alive: timeout=5", "X-Hop: 1", "TE: trailers",
                    "Upgrade: h2c", "Proxy-Authorization: Basic x", "Proxy-Connection: keep-alive", "Trailer: X-T", "X-Kept: 1"))
    assert [n for n, _ in rig.upstream.requests[0].headers] == [b"Host", b"X-Kept"]


def test_response_headers_pass_as_they_were_spelled(start: Start) -> None:
    lines = ["Date: Mon, 01 Jan 2024 00:00:00 GMT", "Server: llama.cpp", "Set-Cookie: a=1; Expires=Mon, 01 Jan 2024",
             "X-CaSe:  y ", "set-cookie: b=2", "Set-Cookie: c=3"]
    rig = start(always(answer(b"ok", "200 Fine by me", *lines)))
    got = rig.ask(request())
    assert got.raw == b"\r\n".join([b"HTTP/1.1 200 Fine by me", *(x.encode() for x in lines), b"Content-Length: 2", b"", b"ok"])
    assert got.all("set-cookie") == ["a=1; Expires=Mon, 01 Jan 2024", "b=2", "c=3"]
    assert (len(got.all("date")), len(got.all("server"))) == (1, 1)


def test_hop_by_hop_headers_of_an_answer_stay_here(start: Start) -> None:
    rig = start(always(answer(b"ok", "200 OK", "Connection: close, X-Hop", "Keep-Alive: timeout=5", "x-hop: 1", "Upgrade: h2c",
                              "Proxy-Authenticate: Basic", "Trailer: X-T", "X-Kept: 1")))
    client = rig.client()
    for _ in range(2):                          # the upstream's close is not the client's
        assert [n for n, _ in client.ask(request()).headers] == [b"X-Kept", b"Content-Length"]


@pytest.mark.parametrize("line", ["Connection: close, Content-Length", "Content-Length: 2"])
def test_an_answers_length_reaches_the_client_once(start: Start, line: str) -> None:
    """Dropped, the client would wait for an end that does not come; twice, strict clients refuse it."""
    client = start(always(answer(b"ok", "200 OK", line))).client()
    got = client.ask(request())
    assert (got.all("content-length"), got.body) == (["2"], b"ok")
    assert client.ask(request()).body == b"ok"


def test_a_length_beside_chunks_is_not_passed_on(start: Start) -> None:
    rig = start(always(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"))
    client = rig.client()
    for _ in range(2):
        got = client.ask(request())
        assert (got.body, got.whole, got.all("content-length")) == (b"ok", True, [])


CHUNKED_BODIES = {
    "one chunk": (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    "upper case": (b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    "extensions and trailers": (b"5;a=b\r\nhello\r\n1\r\n!\r\n0;x\r\nX-T: 1\r\n\r\n", b"hello!"),
    "empty": (b"0\r\n\r\n", b""),
    "framing inside": (b"7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", b"\r\n0\r\n\r\n"),
    "large": (chunk(b"x" * 100_000) * 2 + b"0\r\n\r\n", b"x" * 200_000),
}


@pytest.mark.parametrize(("framed", "body"), CHUNKED_BODIES.values(), ids=CHUNKED_BODIES.keys())
def test_chunked_request_bodies(start: Start, framed: bytes, body: bytes) -> None:
    rig = start(always(OK))
    client = rig.client()
    head = request("PUT", "/x", "Transfer-Encoding: chunked", "Trailer: X-T")
    client.send(head + framed + request("GET", "/next"))
    assert [client.read_message("PUT").status, client.read_message("GET").status] == [200, 200]
    first, second = rig.upstream.requests
    assert (first.body, first.header("content-length"), first.all("transfer-encoding")) == (body, str(len(body)), [])
    assert second.target == "/next", "what stands behind the body is the next request"


def test_a_chunked_body_in_single_bytes(start: Start) -> None:
    rig = start(always(OK))
    client = rig.client()
    client.send(request("PUT", "/x", "Transfer-Encoding: chunked"))
    client.send(*(bytes([b]) for b in b"5;a\r\nhello\r\n1\r\n!\r\n0\r\nX: y\r\n\r\n"))
    assert client.read_message("PUT").status == 200
    assert rig.upstream.requests[0].body == b"hello!"


def test_a_body_in_tiny_chunks_takes_no_more_memory_than_it_weighs() -> None:
    """64 MiB of two bytes at a time would be 2.7 GB, were each kept as it came."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = llmstack.Client.__new__(llmstack.Client)
        client._sock, client._buffer, client.head_timeout_s = ours, b"", WAIT_S
        sender = threading.Thread(target=theirs.sendall, args=(b"2\r\nab\r\n" * 100_000 + b"0\r\n\r\n",))
        sender.start()
        tracemalloc.start()
        body = client._read_chunked()
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        sender.join(WAIT_S)
    assert body == b"ab" * 100_000
    assert peak_bytes < 2_500_000


def test_a_chunked_chat_is_decided_like_any(start: Start) -> None:
    rig = start(always(OK))
    body = json.dumps({"model": "auto", "messages": HELLO}).encode()
    framed = chunk(body[:9]) + chunk(body[9:]) + b"0\r\n\r\n"
    assert rig.ask(request("POST", CHAT, "Transfer-Encoding: chunked") + framed).header("x-llmstack-model") == "code-ultra"
    assert rig.upstream.requests[0].json["model"] == "code-ultra"


def test_expect_100_continue(start: Start) -> None:
    rig = start(always(OK))
    client = rig.client()
    client.send(request("PUT", "/x", "Expect: 100-continue", "Content-Length: 5"))
    assert client.read_head().raw == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"hello")
    assert client.read_message("PUT").body == b"ok"
    assert rig.upstream.requests[0].body == b"hello"
    assert rig.upstream.requests[0].all("expect") == [], "the router has answered it"


def test_a_body_that_is_refused_is_not_asked_for(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "MAX_BODY_BYTES", 10)
    client = start().client()
    got = client.ask(request("PUT", "/x", "Expect: 100-continue", "Content-Length: 11"))
    assert got.status == 413
    assert client.ended()


def test_an_unknown_expectation_does_not_turn_the_body_into_a_request(start: Start) -> None:
    rig = start(always(OK))
    client = rig.client()
    got = client.ask(request("PUT", "/x", "Expect: a-miracle", body=request("DELETE", "/smuggled")))
    assert got.status == 417
    assert client.ended()
    assert rig.upstream.requests == []


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"])
def test_interim_answers_of_the_upstream_are_not_the_answer(start: Start, interim: bytes) -> None:
    got = start(always(interim + answer(b"final"))).ask(request("PUT", "/x", body=b"x"))
    assert got.body == b"final"


# ---- HTTP/1.0 clients


HTTP10_ANSWERS = {
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x\r\nllo\r\n0\r\nT: 1\r\n\r\n",
    "length": answer(b"hello"),
    "close": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello",
}


@pytest.mark.parametrize("data", HTTP10_ANSWERS.values(), ids=HTTP10_ANSWERS.keys())
def test_http_1_0_gets_no_chunks_and_the_end_of_the_connection(start: Start, data: bytes) -> None:
    def script(up: Connection) -> None:
        up.read()
        up.send(data)
    rig = start(script)
    client = rig.client()
    client.send(b"GET /x HTTP/1.0\r\n\r\n")
    got = client.read_head()
    assert (got.header("transfer-encoding"), got.header("connection")) == ("", "close")
    assert client.rest() == b"hello"
    assert rig.upstream.requests[0].start == b"GET /x HTTP/1.1"


def test_http_1_0_streams_too(start: Start) -> None:
    rig = start()
    client = rig.client()
    client.send(b"GET /events HTTP/1.0\r\n\r\n")
    up = rig.upstream.next()
    up.read()
    up.send(SSE_CHUNKED)
    client.read_head()
    for event in EVENTS:
        up.send(chunk(event))
        assert client.take(len(event)) == event
    up.send(b"0\r\n\r\n")
    assert client.ended()


# ---- Upgrade


UPGRADE = ["Connection: keep-alive, Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: k"]
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: a\r\n\r\n"


def test_an_upgrade_becomes_a_tunnel(start: Start) -> None:
    rig = start()
    client = rig.client()
    client.send(request("GET", "/ws?x=1", *UPGRADE))
    up = rig.upstream.next()
    asked = up.read()
    assert (asked.target, asked.header("upgrade"), asked.header("sec-websocket-key")) == ("/ws?x=1", "websocket", "k")
    assert "upgrade" in asked.header("connection").lower()
    up.send(SWITCH)
    assert client.read_head().raw == SWITCH
    for word in (b"ping", b"\x00\r\n\r\n\xff", b"x" * 200_000):
        client.send(word)
        assert up.take(len(word)) == word
        up.send(word[::-1])
        assert client.take(len(word)) == word[::-1]
    client.half_close()
    assert up.ended()
    up.send(b"last")
    up.close()
    assert client.rest() == b"last"


def test_bytes_right_behind_the_upgrade_are_not_lost(start: Start) -> None:
    rig = start()
    client = rig.client()
    client.send(request("GET", "/ws", *UPGRADE) + b"early client")
    up = rig.upstream.next()
    up.read()
    up.send(SWITCH + b"early upstream")
    assert client.read_head().status == 101
    assert client.take(14) == b"early upstream"
    assert up.take(12) == b"early client"


def test_a_tunnel_ends_when_the_upstream_does(start: Start) -> None:
    rig = start()
    client = rig.client()
    client.send(request("GET", "/ws", *UPGRADE))
    up = rig.upstream.next()
    up.read()
    up.send(SWITCH)
    client.read_head()
    up.close()
    assert client.ended()


def test_an_upgrade_that_is_not_granted_is_an_ordinary_answer(start: Start) -> None:
    client = start(always(answer(b"no", "400 Bad Request"))).client()
    for _ in range(2):
        assert client.ask(request("GET", "/ws", *UPGRADE)).body == b"no"


def test_an_upgrade_that_nobody_asked_for_is_a_502(start: Start) -> None:
    rig = start(always(SWITCH))
    client = rig.client()
    for _ in range(2):                          # the client still speaks HTTP, and so does the router
        assert client.ask(request("GET", "/x")).status == 502


# ---- keep-alive and the upstream pool


def served_once(rig: Rig, client: Client) -> Connection:
    """An upstream connection that has answered one request of the client's and is kept."""
    client.send(request("GET", "/first"))
    up = rig.upstream.next()
    up.read()
    up.send(OK)
    assert client.read_message("GET").body == b"ok"
    # The answer goes out before the connection is put by; when the next is answered, it has been.
    assert client.ask(request("GET", "/models.ini")).status == 404
    return up


def test_connections_are_kept_on_both_sides(start: Start) -> None:
    rig = start()
    client = rig.client()
    up = served_once(rig, client)
    other = rig.client()                        # another client, the same upstream connection
    other.send(chat("code-fast"))
    assert up.read().target == CHAT
    up.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    assert other.read_message("POST").body == b"ok"
    assert other.ask(request("GET", "/models.ini")).status == 404
    client.send(request("GET", "/2"))
    assert up.read().target == "/2"
    up.send(OK)
    assert client.read_message("GET").body == b"ok"
    assert rig.upstream.connections == 1


@pytest.mark.parametrize("data", [
    answer(b"ok", "200 OK", "Connection: close"),
    b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    answer(b"ok") + b"more than it said",
    b"HTTP/1.1 204 No Content\r\n\r\nmore than it said",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nmore",
], ids=["close", "HTTP/1.0", "longer than its length", "a body on a 204", "longer than its chunks"])
def test_a_connection_that_cannot_be_used_again_is_closed(start: Start, data: bytes) -> None:
    rig = start()
    client = rig.client()
    for _ in range(2):
        client.send(request())
        up = rig.upstream.next()
        up.read()
        up.send(data)
        assert client.read_message("GET").body in (b"ok", b"")
        assert up.ended(), "closed by the router"


def test_a_kept_connection_that_was_closed_is_passed_over(start: Start) -> None:
    rig = start()
    client = rig.client()
    served_once(rig, client).close()
    client.send(chat())
    up = rig.upstream.next()
    assert up.read().json["model"] == "code-ultra"
    up.send(OK)
    assert client.read_message("POST").body == b"ok"


@pytest.mark.parametrize("said", [b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n", b"late"])
def test_a_kept_connection_on_which_something_came_is_passed_over(said: bytes) -> None:
    """It would be taken for the answer to the next request."""
    with ScriptedUpstream() as scripted:
        upstream = llmstack.Upstream("127.0.0.1", scripted.port)
        kept = upstream.connect()
        upstream.checkin(kept)
        scripted.next().send(said)
        assert select.select([kept], [], [], WAIT_S)[0]
        new, used = upstream.checkout()
        new.close()
        assert not used


@pytest.mark.parametrize("end", [Connection.close, Connection.reset])
def test_a_kept_connection_that_dies_silently_is_replaced_once(start: Start, end: Callable[[Connection], None]) -> None:
    rig = start()
    client = rig.client()
    old = served_once(rig, client)
    client.send(chat("code-fast"))
    asked = old.read()
    end(old)
    up = rig.upstream.next()
    assert up.read().raw == asked.raw
    up.send(OK)
    assert client.read_message("POST").body == b"ok"
    assert rig.upstream.connections == 2


def test_it_is_replaced_only_once(start: Start) -> None:
    rig = start()
    client = rig.client()
    old = served_once(rig, client)
    client.send(chat("code-fast"))
    old.read()
    old.close()
    new = rig.upstream.next()
    new.read()
    new.close()
    assert client.read_message("POST").status == 502
    assert (rig.upstream.connections, len(rig.upstream.requests)) == (2, 3)


def test_a_kept_connection_that_dies_with_half_a_head_is_not_replaced(start: Start) -> None:
    rig = start()
    client = rig.client()
    old = served_once(rig, client)
    client.send(chat("code-fast"))
    old.read()
    old.send(b"HTTP/1.1 200 O")
    old.close()
    assert client.read_message("POST").status == 502
    assert (rig.upstream.connections, len(rig.upstream.requests)) == (1, 2)


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 O", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", b"garbage\r\n\r\n",
                                  b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"])
def test_a_new_connection_that_dies_before_its_head_is_not_replaced(start: Start, data: bytes) -> None:
    def script(up: Connection) -> None:
        up.read()
        up.send(data)
    rig = start(script)
    client = rig.client()
    got = client.ask(chat("code-fast"))
    assert got.status == 502
    assert "llmstack start" in error_of(got)["message"]
    assert (rig.upstream.connections, len(rig.upstream.requests)) == (1, 1), "a POST is never sent twice"
    assert client.ask(request("GET", "/x")).status == 502, "the client's connection stays"


def test_pipelined_requests_are_answered_in_order(start: Start) -> None:
    rig = start(reply_with(lambda m: answer(m.target.encode() + m.body)[:-2 if m.start.startswith(b"HEAD") else None]))
    client = rig.client()
    client.send(request("GET", "/1") + request("PUT", "/2", body=b"two") + request("HEAD", "/3") + request("GET", "/4"))
    assert [client.read_message(m).body for m in ("GET", "PUT")] == [b"/1", b"/2two"]
    assert client.read_head().header("content-length") == "2"
    assert client.read_message("GET").body == b"/4"
    assert rig.upstream.connections == 1


def test_one_empty_line_between_requests_is_nothing(start: Start) -> None:
    """RFC 9112, 2.2: old clients send one behind a body."""
    client, between = start(always(OK)).client(), b"\r\n"
    client.send(between + request("PUT", "/1", body=b"one") + between + request("GET", "/2") + between)
    assert [client.read_message(m).status for m in ("PUT", "GET")] == [200, 200]
    assert client.ask(request("GET", "/3")).status == 200


def test_a_request_in_single_bytes(start: Start) -> None:
    rig = start(always(OK))
    client = rig.client()
    client.send(*(bytes([b]) for b in request("PUT", "/x", body=b"hello")))
    assert client.read_message("PUT").body == b"ok"
    assert rig.upstream.requests[0].body == b"hello"


def test_a_client_that_asks_to_close_is_closed(start: Start) -> None:
    client = start(always(OK)).client()
    got = client.ask(request("GET", "/x", "Connection: close"))
    assert (got.header("connection"), got.body) == ("close", b"ok")
    assert client.ended()


@pytest.mark.parametrize("size", [100, pytest.param(8_000_000, marks=pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere a RST takes what came before it along"))])
def test_an_upstream_may_answer_before_it_has_read_the_body(start: Start, size: int) -> None:
    """As one does that refuses it; nothing more can be sent to it then, but its answer is there to be read."""
    rig = start(receive_buffer_bytes=4096)
    client = rig.client()
    client.send(request("PUT", "/x", body=b"x" * size))
    up = rig.upstream.next()
    up.read_head()
    up.send(answer(b"too much", "413 Content Too Large", "Connection: close"))
    up.close()
    got = client.read_message("PUT")
    assert (got.status, got.body) == (413, b"too much")


def test_a_connection_on_which_a_body_stopped_short_is_not_kept(start: Start) -> None:
    """The next request on it would be taken for the rest of that body."""
    rig = start(receive_buffer_bytes=4096)
    client = rig.client()
    client.send(request("PUT", "/x", body=b"x" * 8_000_000))
    up = rig.upstream.next()
    up.read_head()
    up.send(answer(b"too much", "413 Content Too Large"))
    assert client.read_message("PUT").body == b"too much"
    assert len(up.rest()) < 8_000_000, "and then its end"
    client.send(request("GET", "/next"))
    assert rig.upstream.next().read().target == "/next"


# ---- an upstream behind TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 and its key, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run([openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                    "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1",
                    "-keyout", str(path), "-out", str(path) + ".c"],
                   check=True, stderr=subprocess.DEVNULL)
    path.write_text(path.read_text() + Path(str(path) + ".c").read_text())
    return path


@pytest.fixture
def tls(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """What the upstream speaks; the router trusts it."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_tls_streams_and_is_kept(start: Start, tls: ssl.SSLContext) -> None:
    rig = start(tls=tls)
    client = rig.client()
    client.send(chat("code-ultra", stream=True))
    up = rig.upstream.next()
    for more in (True, False):
        assert up.read().json["model"] == "code-ultra"
        up.send(SSE_CHUNKED)
        client.read_head()
        for event in EVENTS:
            up.send(chunk(event))
            assert client.read_chunk() == event
        up.send(b"0\r\n\r\n")
        assert client.take(5) == b"0\r\n\r\n"
        if more:
            client.send(chat("code-ultra", stream=True))
    assert rig.upstream.connections == 1


def test_tls_carries_a_large_body_slowly(start: Start, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS 1.3 begins with tickets from the server: bytes that are there to be read, and no answer."""
    looked, enough, gone = [0], threading.Event(), llmstack.Client.gone

    def gone_and_tell(client: llmstack.Client) -> bool:
        looked[0] += 1
        if looked[0] == 3:
            enough.set()
        return gone(client)
    monkeypatch.setattr(llmstack.Client, "gone", gone_and_tell)
    rig = start(tls=tls, receive_buffer_bytes=4096)
    client = rig.client()
    client.send(request("PUT", "/x", body=b"x" * 8_000_000))
    up = rig.upstream.next()
    wait(enough)                                # the router has been waiting for this upstream to read on
    assert len(up.read().body) == 8_000_000
    up.send(OK)
    assert client.read_message("PUT").status == 200


def test_tls_that_breaks_off(start: Start, tls: ssl.SSLContext) -> None:
    more = broken_off(start(tls=tls), chat(stream=True), SSE_CHUNKED, ONE, Connection.close)
    check_last_words(read_chunks(ONE + more).payload)


def test_a_client_that_goes_away_cancels_over_tls(start: Start, tls: ssl.SSLContext) -> None:
    rig = start(tls=tls)
    client = rig.client()
    client.send(chat())
    up = rig.upstream.next()
    up.read()
    client.close()
    assert up.ended()


def test_tls_that_is_not_trusted_is_a_502(start: Start, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    rig = start(tls=tls)
    assert "certificate" in error_of(rig.ask(chat("code-fast")))["message"].lower()


# ---- streaming


class Framing:
    """How an upstream frames an answer, and how its pieces then reach a client."""

    def __init__(self, head: str, wrap: Callable[[bytes], bytes], end: bytes, chunked: bool) -> None:
        self.head, self.wrap, self.end, self.chunked = head, wrap, end, chunked

    def read(self, client: Client, piece: bytes) -> bytes:
        return client.read_chunk() if self.chunked else client.take(len(piece))


FRAMINGS = {
    "chunked": Framing("Transfer-Encoding: chunked", chunk, b"0\r\n\r\n", True),
    "length": Framing(f"Content-Length: {sum(map(len, EVENTS))}", lambda piece: piece, b"", False),
    "close": Framing("Connection: close", lambda piece: piece, b"", True),
}


@pytest.mark.parametrize("framing", FRAMINGS.values(), ids=FRAMINGS.keys())
@pytest.mark.parametrize("model", ["auto", "code-fast"])
def test_each_event_arrives_before_the_next_is_sent(start: Start, framing: Framing, model: str) -> None:
    rig = start()
    client = rig.client()
    client.send(chat(model, stream=True))
    up = rig.upstream.next()
    up.read()
    up.send(SSE + framing.head.encode() + b"\r\n\r\n")
    if model == "auto":                         # its head waits for the first event: that may be an error
        up.send(framing.wrap(EVENTS[0]))
    assert client.read_head().header("content-type") == "text/event-stream"
    for event in EVENTS:
        if model != "auto" or event is not EVENTS[0]:
            up.send(framing.wrap(event))
        assert framing.read(client, event) == event
    up.send(framing.end)
    if framing.head == "Connection: close":
        up.close()
    if framing.chunked:
        assert client.take(5) == b"0\r\n\r\n"
    client.send(request("GET", "/next"))        # the end was a clean one
    following = up if framing.head != "Connection: close" else rig.upstream.next()
    assert following.read().target == "/next"
    following.send(OK)
    assert client.read_message("GET").body == b"ok"


STREAM = b"".join(map(chunk, EVENTS)) + b"0\r\nX-Trailer: 1\r\n\r\n"
SPLITS = {
    "all at once": [STREAM],
    "single bytes": [STREAM[i:i + 1] for i in range(len(STREAM))],
    "in the size line": [STREAM[:1], STREAM[1:3], STREAM[3:]],
    "by sevens": [STREAM[i:i + 7] for i in range(0, len(STREAM), 7)],
    "two events at a time": [b"".join(map(chunk, EVENTS[:2])), b"".join(map(chunk, EVENTS[2:4])), STREAM[len(b"".join(map(
        chunk, EVENTS[:4]))):]],
    "an event over two chunks": [chunk(EVENTS[0][:5]), chunk(EVENTS[0][5:] + EVENTS[-1]), b"0\r\n\r\n"],
    "extensions": [b"3;x=y\r\ndat\r\n", b"00a\r\na: [DONE]\n\r\n1\r\n\n\r\n", b"0;z\r\n\r\n"],
}


def take_payload(client: Client, count: int) -> bytes:
    """The next so many bytes of a chunked answer, however it is cut into chunks."""
    got = b""
    while len(got) < count:
        got += client.read_chunk()
    return got


@pytest.mark.parametrize("pieces", SPLITS.values(), ids=SPLITS.keys())
def test_what_is_in_chunks_is_relayed_as_it_comes(start: Start, pieces: list[bytes]) -> None:
    rig = start()
    client = rig.client()
    client.send(chat("code-smart", stream=True))
    up = rig.upstream.next()
    up.read()
    up.send(SSE_CHUNKED)
    client.read_head()
    sent = got = b""
    for piece in pieces:                        # each must arrive before the next is sent
        up.send(piece)
        sent += piece
        payload = read_chunks(sent).payload
        got += take_payload(client, len(payload) - len(got))
        assert got == payload
    if read_chunks(sent).at != "done":          # its first events only
        return
    assert client.take(5) == b"0\r\n\r\n"
    client.send(request("GET", "/next"))        # and both connections are still in step
    assert up.read().target == "/next"


def test_a_head_and_its_first_events_in_one_piece(start: Start) -> None:
    rig = start()
    client = rig.client()
    client.send(chat(stream=True))
    up = rig.upstream.next()
    up.read()
    up.send(SSE_CHUNKED + STREAM[:100])
    client.read_head()
    first = read_chunks(STREAM[:100]).payload
    assert take_payload(client, len(first)) == first
    up.send(STREAM[100:])
    rest = read_chunks(STREAM).payload[len(first):]
    assert take_payload(client, len(rest)) == rest


def test_a_head_in_pieces(start: Start) -> None:
    rig = start()
    client = rig.client()
    client.send(request())
    up = rig.upstream.next()
    up.read()
    up.send(*(bytes([b]) for b in answer(b"ok", "200 OK", "X-A: b")))
    assert client.read_message("GET").raw == answer(b"ok", "200 OK", "X-A: b")


def test_many_streams_at_a_time(start: Start) -> None:
    def script(up: Connection) -> None:
        seen = up.read()
        up.send(SSE_CHUNKED, *(chunk(b"data: %b %d\n\n" % (seen.target.encode(), n)) for n in range(50)), b"0\r\n\r\n")
    rig = start(script)
    clients = [rig.client() for _ in range(16)]
    for number, client in enumerate(clients):
        client.send(request("GET", f"/{number}"))
    for number, client in enumerate(clients):
        got = client.read_message("GET")
        assert got.whole
        assert got.body == b"".join(b"data: /%d %d\n\n" % (number, n) for n in range(50))


# ---- an upstream that dies in the middle


End = Callable[[Connection], None]
both_ends = pytest.mark.parametrize("end", [Connection.close, Connection.reset], ids=["FIN", "RST"])


def broken_off(rig: Rig, asked: bytes, head: bytes, body: bytes, end: End) -> bytes:
    """All that a client gets behind the head of an answer that breaks off behind `body`."""
    client = rig.client()
    client.send(asked)
    up = rig.upstream.next()
    up.read()
    up.send(head, body)
    client.read_head()
    got = b""
    if b"chunked" in head:
        payload = read_chunks(body).payload
        while len(got) < len(payload):
            got += client.read_chunk()
        assert got == payload
        got = chunk(got) if got else b""
    else:
        got = client.take(len(body))
        assert got == body
    end(up)
    return got + client.rest()


def check_last_words(payload: bytes) -> None:
    """A stream's last event is a whole one, and an error."""
    assert payload.endswith(b"\n\n")
    *_, last = filter(None, payload.split(b"\n"))
    assert last.startswith(b"data: {")
    assert set(json.loads(last[6:])["error"]) == {"message", "type", "param", "code"}


ONE = chunk(EVENTS[0])
CUTS = {
    "behind the head": b"",
    "between events": ONE,
    "behind an event's payload": ONE[:-2],
    "in the CRLF behind it": ONE[:-1],
    "in an event over two chunks": ONE + chunk(EVENTS[1][:9]),
}
WITHIN = {
    "in an event": ONE[:-20],
    "one byte into an event": ONE + b"2f\r\nd",
    "in a size line": ONE + b"2",
    "in the CRLF of a size line": ONE + b"2f\r",
    "behind a size line": ONE + b"2f\r\n",
    "behind a 0 that may be the end": ONE + b"0",
    "in an extension": ONE + b"2f;a=",
    "in the last chunk": ONE + b"0\r",
    "behind the last chunk": ONE + b"0\r\n",
    "behind a trailer": ONE + b"0\r\nX-Trailer: 1\r\n",
}


@pytest.mark.parametrize("cut", {**CUTS, **WITHIN}.values(), ids={**CUTS, **WITHIN}.keys())
@both_ends
def test_a_stream_that_breaks_off_says_so_and_never_ends_cleanly(start: Start, cut: bytes, end: End) -> None:
    rig = start()
    got = read_chunks(broken_off(rig, chat("code-smart", stream=True), SSE_CHUNKED, cut, end))
    assert (got.at, got.line) == ("size", b""), "a clean end: opencode would ask again without bound"
    assert got.payload.startswith(read_chunks(cut).payload)
    check_last_words(got.payload)
    rig.log.line_with("broke off")


@pytest.mark.parametrize("cut", [ONE + b"0\r\n", ONE + b"0\r", ONE + b"0\r\nX-Trailer: 1\r\n",
                                 ONE + b"7fffffff\r\ndata: "])
def test_an_end_that_is_cut_is_said_to_be_one(start: Start, cut: bytes) -> None:
    got = read_chunks(broken_off(start(), chat("code-smart", stream=True), SSE_CHUNKED, cut,
                                 Connection.close))
    assert (got.at, got.line) == ("size", b"")
    check_last_words(got.payload)


@pytest.mark.parametrize("garbage", [b"zz\r\n", b"-5\r\n", b"\r\n", b"5\r\nhello!\r\n", b"zz"])
def test_a_garbled_stream_says_so_and_never_ends_cleanly(start: Start, garbage: bytes) -> None:
    def end(up: Connection) -> None:
        up.send(garbage)
        up.close()

    got = read_chunks(broken_off(start(), chat("code-smart", stream=True), SSE_CHUNKED, ONE, end))
    assert (got.at, got.line) == ("size", b"")
    check_last_words(got.payload)


@pytest.mark.parametrize("event", [b'data: {"choices":[{"delta":{"content":"x"},"finish_reason":null}]}\n\n',
                                   b": loading\n\n"])
def test_a_stream_that_ends_cleanly_without_its_end_is_broken(start: Start, event: bytes) -> None:
    """llama-swap ends it so when the llama-server behind it is killed."""
    got = read_chunks(broken_off(start(), chat("code-smart", stream=True), SSE_CHUNKED, chunk(event),
                                 lambda up: up.send(b"0\r\n\r\n")))
    assert (got.at, got.line) == ("size", b"")
    check_last_words(got.payload)


FAILED_LOAD = chunk(b": loading\n\n") + chunk(b'{"error":{"message":"no such file","code":502}}')


CLEAN_ENDS = {
    "at once": [FAILED_LOAD + b"0\r\n\r\n"],
    "in two": [FAILED_LOAD[:9], FAILED_LOAD[9:] + b"0\r\n\r\n"],
    "apart": [FAILED_LOAD, b"0\r\n\r\n"],
    "behind its digit": [FAILED_LOAD + b"0", b"\r\n\r\n"],
    "before its last byte": [FAILED_LOAD + b"0\r\n\r", b"\n"],
    "with a trailer": [FAILED_LOAD + b"0\r\nX: 0\r\n\r\n"],
}


@pytest.mark.parametrize("pieces", CLEAN_ENDS.values(), ids=CLEAN_ENDS.keys())
def test_a_stream_that_ends_within_an_event_never_ends_cleanly(start: Start, pieces: list[bytes]) -> None:
    """llama-swap ends a stream of loading messages with a failed load's JSON and a clean last chunk."""
    rig = start()
    client = rig.client()
    client.send(chat("code-smart", stream=True))
    up = rig.upstream.next()
    up.read()
    up.send(SSE_CHUNKED, *pieces)
    client.read_head()
    got = read_chunks(client.rest())
    assert got.at != "done"
    check_last_words(got.payload)
    assert b"no such file" in got.payload.rpartition(b"data: ")[2]


PLAIN = [
    (JSON_CHUNKED, chunk(b'{"choices":')),
    (JSON_CHUNKED, b"5\r\n{"),
    (JSON_CHUNKED, b""),
    (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n", b'{"choices":'),
    (SSE + b"Content-Length: 999\r\n\r\n", EVENTS[0]),
]


@pytest.mark.parametrize(("head", "body"), PLAIN)
@both_ends
def test_other_answers_just_break_off(start: Start, head: bytes, body: bytes, end: End) -> None:
    got = broken_off(start(), chat(), head, body, end)
    if b"chunked" in head:
        assert read_chunks(got).at == "size"
    else:
        assert got == body, "nothing is added"


def test_an_answer_up_to_the_close_is_broken_by_a_reset(start: Start) -> None:
    """Its only framing is the end of the connection: a RST is a server that died."""
    rig = start()
    client = rig.client()
    client.send(chat(stream=True))
    up = rig.upstream.next()
    up.read()
    up.send(SSE + b"\r\n", EVENTS[0])
    client.read_head()
    got = client.take(len(chunk(EVENTS[0])))
    up.reset()
    got += client.rest()
    assert read_chunks(got).at == "size"
    check_last_words(read_chunks(got).payload)


def up_to_the_close(events: list[bytes]) -> Script:
    def script(up: Connection) -> None:
        up.read()
        up.send(SSE + b"\r\n", *events)
        up.close()
    return script


@pytest.mark.parametrize("model", ["auto", "code-smart"])
@pytest.mark.parametrize("events", [[], EVENTS[:2], [EVENTS[0], EVENTS[1][:9]]], ids=["none", "whole ones", "half of one"])
def test_a_stream_up_to_the_close_that_lacks_its_end_is_broken(start: Start, events: list[bytes], model: str) -> None:
    """A FIN may be that of a server that was killed."""
    rig = start(up_to_the_close(events))
    client = rig.client()
    client.send(chat(model, stream=True))
    head = client.read_head()
    if model == "auto" and not events:
        assert head.status == 502, "every tier of the ladder was asked, and one error is said"
        assert [m.json["model"] for m in rig.upstream.requests] == ["code-ultra", "code-smart", "code-fast"]
        return
    assert head.header("transfer-encoding") == "chunked"
    got = read_chunks(client.rest())
    assert (got.at, got.line) == ("size", b"")
    assert got.payload.startswith(b"".join(events))
    check_last_words(got.payload)
    rig.log.line_with("broke off")


@pytest.mark.parametrize(("target", "events"), [(CHAT, EVENTS), ("/events", EVENTS[:2]), ("/events", [])])
def test_a_stream_up_to_the_close_that_is_whole_ends_cleanly(start: Start, target: str, events: list[bytes]) -> None:
    rig = start(up_to_the_close(events))
    got = rig.ask(chat(target=target, stream=True))
    assert (got.body, got.whole) == (b"".join(events), True)


@both_ends
def test_http_1_0_gets_the_error_event_too(start: Start, end: End) -> None:
    rig = start()
    client = rig.client()
    client.send(b"GET /events HTTP/1.0\r\n\r\n")
    up = rig.upstream.next()
    up.read()
    up.send(SSE_CHUNKED, ONE)
    client.read_head()
    assert client.take(len(EVENTS[0])) == EVENTS[0]
    end(up)
    check_last_words(client.rest())


def test_an_answer_that_is_garbled_from_the_start_is_a_502(start: Start) -> None:
    """Nothing of it has reached the client yet, so the client can still be told."""
    def script(up: Connection) -> None:
        up.read()
        up.send(SSE_CHUNKED + b"zz\r\n")
    rig = start(script)
    client = rig.client()
    assert error_of(client.ask(chat("code-fast", stream=True)))["type"] == "upstream_error"
    assert client.ask(request()).status == 502


# ---- an upstream that is down


@pytest.mark.parametrize("asked", [chat(), chat("code-fast"), chat(stream=True), request("GET", "/props"),
                                   request("DELETE", "/x")])
def test_an_upstream_that_is_down_is_said_and_what_to_run(start: Start, nothing_listens: int, asked: bytes) -> None:
    rig = start(upstream_port=nothing_listens, remedy="run `llmstack start`")
    client = rig.client()
    for _ in range(2):                          # the connection stays
        got = client.ask(asked)
        assert (got.status, got.whole) == (502, True)
        message = error_of(got)["message"]
        assert f"http://127.0.0.1:{nothing_listens}" in message
        assert "connection refused" in message
        assert "run `llmstack start`" in message


def test_a_502_to_head_has_no_body(start: Start, nothing_listens: int) -> None:
    client = start(upstream_port=nothing_listens).client()
    assert client.ask(request("HEAD", "/health")).status == 502
    assert client.ask(request("GET", "/health")).status == 502


def test_it_is_asked_again_once_it_is_up(start: Start) -> None:
    rig = start(reply_with(lambda m: None if m.target == "/die" else OK))
    client = rig.client()
    assert [client.ask(request("GET", t)).status for t in ("/die", "/x", "/die", "/x")] == [502, 200, 502, 200]


# ---- auto


PATHS = {
    "/v1/chat/completions": CHAT, "/chat/completions": CHAT, "/v1/chat/completions/": CHAT, "/chat/completions/": CHAT,
    "/v1/completions": "/v1/completions", "/completions": "/v1/completions", "/completions/": "/v1/completions",
    "/v1/responses": "/v1/responses", "/responses": "/v1/responses",
    "/v1/messages": "/v1/messages", "/messages": "/v1/messages", "/v1/messages/": "/v1/messages",
    "/v1/messages/count_tokens": "/v1/messages/count_tokens", "/messages/count_tokens/": "/v1/messages/count_tokens",
    "/completion": "/completion", "/completion/": "/completion", "/v1/completion": "/completion",
    "/infill": "/infill", "/infill/": "/infill",
}


@pytest.mark.parametrize(("path", "canonical"), PATHS.items())
def test_auto_is_resolved_on_every_inference_path(start: Start, path: str, canonical: str) -> None:
    rig = start(always(OK))
    got = rig.ask(chat(target=path + "?beta=true&x=/"))
    tier = "code-fast" if canonical == "/infill" else "code-ultra"
    assert (got.status, got.header("x-llmstack-model")) == (200, tier)
    seen = rig.upstream.requests[0]
    assert (seen.target, seen.json["model"]) == (canonical + "?beta=true&x=/", tier)


@pytest.mark.parametrize("model", ["auto", "AUTO", "Auto", "", " auto ", "llama.cpp/auto", "a/b/AUTO", None])
def test_spellings_of_auto(start: Start, model: Optional[str]) -> None:
    rig = start(always(OK))
    assert rig.ask(chat(model)).header("x-llmstack-model") == "code-ultra"
    assert rig.upstream.requests[0].json["model"] == "code-ultra"


@pytest.mark.parametrize("model", ["code-fast", "coder", "autopilot", "auto/x", "llama3.2", 5, ["auto"]])
def test_a_model_asked_for_by_name_passes_untouched(start: Start, model: object) -> None:
    rig = start(always(OK))
    body = json.dumps({"messages": HELLO, "model": model}).encode() + b"\n"
    got = rig.ask(post(body, target="/chat/completions/?q"))
    assert [n for n, _ in got.headers] == [b"Content-Length"], "nothing is added to what was not decided here"
    target = CHAT + "?q" if model in ("code-fast", "coder") else "/chat/completions/?q"
    assert (rig.upstream.requests[0].target, rig.upstream.requests[0].body) == (target, body)


BIG = b'"%b"' % (b"The word \\\"model\\\": \\\"auto\\\" in prose. " * 10_000)
REWRITES = {
    "spaces": (b'\n{ "model" :\t"auto" , "messages":[]}\r\n ', b'\n{ "model" :\t"code-ultra" , "messages":[]}\r\n '),
    "last": (b'{"messages":[],"model":"AUTO"}', b'{"messages":[],"model":"code-ultra"}'),
    "null": (b'{"model":null,"n":1}', b'{"model":"code-ultra","n":1}'),
    "empty": (b'{"model":"","n":1}', b'{"model":"code-ultra","n":1}'),
    "absent": (b'{"n":1.0}', b'{"model":"code-ultra","n":1.0}'),
    "absent from an empty object": (b" { } ", b' {"model":"code-ultra" } '),
    "with a provider": (b'{"model":"llama.cpp/auto"}', b'{"model":"code-ultra"}'),
    "key in escapes": (b'{"mode\\u006c":"auto"}', b'{"mode\\u006c":"code-ultra"}'),
    "value in escapes": (b'{"model":"\\u0061uto"}', b'{"model":"code-ultra"}'),
    "given twice": (b'{"model":"x","model":"auto"}', b'{"model":"code-ultra","model":"code-ultra"}'),
    "others further in": (b'{"tools":[{"model":"auto"}],"model":"auto","x":{"model":null}}',
                          b'{"tools":[{"model":"auto"}],"model":"code-ultra","x":{"model":null}}'),
    "only further in": (b'{"metadata":{"model":"auto"}}', b'{"model":"code-ultra","metadata":{"model":"auto"}}'),
    "a value of that name": (b'{"x":"model","model":"auto"}', b'{"x":"model","model":"code-ultra"}'),
    "in prose": (b'{"prompt":"say \\"model\\":\\"auto\\"","model":"auto"}',
                 b'{"prompt":"say \\"model\\":\\"auto\\"","model":"code-ultra"}'),
    "numbers and letters as they were": ('{"a":1.50e+01,"b":"é\\u00e9😀\\/","model":"auto","c":[1 ,2]}'.encode(),
                                         '{"a":1.50e+01,"b":"é\\u00e9😀\\/","model":"code-ultra","c":[1 ,2]}'.encode()),
    "given 6,000 times": (b"{" + b",".join([b'"model":"auto"'] * 6000) + b"}",
                          b"{" + b",".join([b'"model":"code-ultra"'] * 6000) + b"}"),
    "400 kB behind it": (b'{"model":"auto","x":' + BIG + b"}", b'{"model":"code-ultra","x":' + BIG + b"}"),
    "400 kB before it": (b'{"x":' + BIG + b',"model":"auto"}', b'{"x":' + BIG + b',"model":"code-ultra"}'),
}


@pytest.mark.parametrize(("body", "expected"), REWRITES.values(), ids=REWRITES.keys())
def test_only_the_models_bytes_change(start: Start, body: bytes, expected: bytes) -> None:
    rig = start(always(OK))
    assert rig.ask(post(body)).status == 200
    seen = rig.upstream.requests[0]
    assert seen.body == expected
    assert seen.header("content-length") == str(len(expected))


def test_what_is_decided_is_said_in_headers_and_in_the_log(start: Start) -> None:
    rig = start(always(answer(b"{}", "200 OK", "X-Up: 1")))
    got = rig.ask(chat(text="x" * 80_000))
    assert (got.header("x-llmstack-model"), got.header("x-llmstack-tokens"), got.header("x-up")) == ("code-smart", "20000", "1")
    assert "heavy local coder" in got.header("x-llmstack-reason")
    assert got.all("x-llmstack-fallback") == []
    assert got.header("x-llmstack-reason") in rig.log.line_with("auto -> code-smart [")


def test_the_ladder_by_length(start: Start) -> None:
    rig = start(always(OK))
    client = rig.client()
    took = [client.ask(chat(text="x" * n)).header("x-llmstack-model") for n in (4, 48_003, 48_004, 128_003, 128_004)]
    assert took == ["code-ultra", "code-ultra", "code-smart", "code-smart", "code-fast"]


def test_other_paths_and_methods_are_not_decided(start: Start) -> None:
    rig = start(always(OK))
    client = rig.client()
    for target in ("/v1/embeddings", CHAT + "/x", "/upstream/code-fast" + CHAT):
        assert client.ask(chat(target=target)).all("x-llmstack-model") == []
    assert client.ask(request("PUT", CHAT, body=b"not json")).status == 200
    assert [m.json["model"] for m in rig.upstream.requests[:3]] == ["auto"] * 3


def test_a_tier_that_is_not_served_is_passed_over(start: Start) -> None:
    rig = start(always(OK), unserved=lambda config: {"code-ultra": "LiteLLM is not installed"})
    got = rig.ask(chat())
    assert got.header("x-llmstack-model") == "code-smart"
    assert "LiteLLM is not installed" in got.header("x-llmstack-reason")
    assert rig.ask(chat("code-ultra")).status == 200, "by name, the upstream is to say so"


def test_models_ini_read_again_changes_the_routing(start: Start) -> None:
    def reload() -> llmstack.Config:
        return readings.pop(0)()

    def broken() -> llmstack.Config:
        raise llmstack.ConfigError(["models.ini:3: what is this"])
    smaller = CONFIG._replace(tiers=CONFIG.tiers[:1])
    readings = [lambda: smaller, broken]
    rig = start(always(OK), reload=reload)
    client = rig.client()
    took = []
    for _ in range(3):
        took.append(client.ask(chat()).header("x-llmstack-model"))
        if readings:
            rig.app.reload()
    assert took == ["code-ultra", "code-fast", "code-fast"], "a broken file is refused, the old one stays"
    rig.log.line_with("models.ini:3: what is this")


def test_no_tier_of_the_ladder_is_a_400(start: Start) -> None:
    rig = start()
    rig.app._snapshot = rig.app._adopt(CONFIG._replace(tiers=tuple(t for t in CONFIG.tiers if t.role == "plan")), {}, {})
    assert "auto" in error_of(rig.ask(chat()))["message"]


# ---- malformed bodies


BODIES = {
    "nothing": b"", "no JSON": b"hello", "array": b"[]", "array of objects": b'[{"model":"auto"}]', "string": b'"auto"',
    "number": b"5", "null": b"null", "true": b"true", "cut off": b'{"model":"auto"', "two objects": b"{}{}",
    "bad UTF-8": b'{"model":"auto","x":"\xff"}', "half a character": b'{"x":"\xe2\x82"}',
    "UTF-16": '{"model":"auto"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf["auto"]', "NUL": b'{"model":"auto"}\0', "single quotes": b"{'model':'auto'}",
    "deep arrays": b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "deep objects": b'{"x":' * 100_000,
    "form": b"model=auto&x=y",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("target", [CHAT, "/infill"])
def test_malformed_bodies_are_a_400(start: Start, body: bytes, target: str) -> None:
    rig = start()
    got = rig.ask(request("POST", target, *([] if body else ["Content-Length: 0"]), body=body))
    assert got.status == 400
    assert error_of(got)["type"] == "invalid_request_error"
    assert rig.upstream.connections == 0


WRONG_TYPES = [
    {"messages": "hello"}, {"messages": 5}, {"messages": None}, {"messages": [None, 5, "x", []]}, {"messages": {"role": "user"}},
    {"messages": [{"role": 5, "content": 5}]}, {"messages": [{"role": "user"}]}, {"messages": [{"content": {"text": 5}}]},
    {"messages": [{"role": "user", "content": [None, 5, {"type": 5}, {"type": "text", "text": None}]}]},
    {"messages": [{"role": "assistant", "tool_calls": "x"}, {"role": "assistant", "tool_calls": [5, {"function": 5}]}]},
    {"prompt": 5}, {"prompt": [5, [5, None]]}, {"prompt": {"x": 1}}, {"input": 5}, {"input": {}}, {"system": 5}, {"tools": "x"},
    {"tools": 5}, {"max_tokens": "many"}, {"max_tokens": -1}, {"max_tokens": 1e400}, {"max_tokens": 10**30}, {"stream": "yes"},
    {"messages": [{"role": "user", "content": "\ud800"}]}, {"suffix": 5}, {"suffix": ["x"]},
]


@pytest.mark.parametrize("body", WRONG_TYPES, ids=repr)
def test_wrong_types_inside_are_for_the_upstream_to_judge(start: Start, body: dict[str, object]) -> None:
    rig = start(always(answer(b"{}", "422 Not Like This")))
    for target in (CHAT, "/v1/completions", "/v1/responses", "/v1/messages"):
        assert rig.ask(post(body, target=target)).status == 422


# ---- /v1/models and /models.ini


def names(message: Message) -> list[str]:
    assert message.status == 200
    return [entry["id"] for entry in message.json["data"]]


def listing(*entries: object, **more: object) -> bytes:
    return answer(json.dumps({"object": "list", "data": entries, **more}).encode(), "200 OK", "Connection: close")


def closing(data: bytes) -> Script:
    """A script that answers one request a connection and closes it."""
    def script(up: Connection) -> None:
        up.read()
        up.send(data)
    return script


@pytest.mark.parametrize("target", ["/v1/models", "/models", "/v1/models/", "/v1/models?x=1"])
def test_the_upstreams_models_and_auto(start: Start, target: str) -> None:
    rig = start(closing(listing({"id": "code-fast", "odd": [1]}, {"id": "auto", "mine": 1}, {"id": "other"}, more="kept")))
    got = rig.ask(request("GET", target))
    assert names(got) == ["auto", "code-fast", "other"]
    assert (got.json["data"][2], got.json["more"]) == ({"id": "other"}, "kept")
    known = got.json["data"][1]
    assert (known["odd"], known["channel"], known["meta"]["llmstack"]["channel"]) == ([1], "current", "current")
    assert got.json["data"][0]["owned_by"] == "llmstack"
    assert rig.upstream.requests[0].target == ("/v1/models?x=1" if "?" in target else "/v1/models")


def test_the_upstreams_models_in_chunks(start: Start) -> None:
    body = json.dumps({"data": [{"id": "é"}]}).encode()
    data = JSON_CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + chunk(body[:9]) + chunk(body[9:]) + b"0\r\n\r\n"
    assert names(start(closing(data)).ask(request("GET", "/v1/models"))) == ["auto", "é"]


def test_the_upstreams_models_without_its_closing(start: Start) -> None:
    """Its answer is whole by its length; an upstream that keeps the connection open must not delay it."""
    rig = start()
    client = rig.client()
    client.send(request("GET", "/v1/models"))
    up = rig.upstream.next()
    up.read()
    up.send(listing({"id": "only-upstream"}))
    assert names(client.read_message("GET")) == ["auto", "only-upstream"]


def test_the_upstreams_key_is_passed_on_for_its_models(start: Start) -> None:
    rig = start(closing(listing({"id": "x"})), key="ours")
    assert names(rig.ask(request("GET", "/v1/models", "Authorization: Bearer theirs", "X-Api-Key: ours"))) == ["auto", "x"]
    assert rig.upstream.requests[0].all("authorization") == ["Bearer theirs"]
    assert rig.upstream.requests[0].all("x-api-key") == []


KNOWN = ["auto", "code-fast", "code-smart", "code-ultra", "plan"]


def test_the_models_without_an_upstream(start: Start, nothing_listens: int) -> None:
    rig = start(upstream_port=nothing_listens)
    got = rig.ask(request("GET", "/v1/models"))
    assert names(got) == KNOWN
    assert all(entry["object"] == "model" for entry in got.json["data"])


GARBAGE = {
    "not HTTP": b"garbage", "nothing": b"", "not JSON": answer(b"<html>"), "array": answer(b"[]"), "string": answer(b'"x"'),
    "no data": answer(b"{}"), "data null": answer(b'{"data":null}'), "data number": answer(b'{"data":5}'),
    "an error": answer(b'{"error":{}}', "500 Oh"), "an error with data": answer(b'{"data":[{"id":"x"}]}', "503 Later"),
    "bad UTF-8": answer(b'{"data":[{"id":"\xff"}]}'), "cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
    "bad chunks": JSON_CHUNKED + b"zz\r\n", "deep": answer(b'{"data":' + b"[" * 100_000),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_the_models_of_an_upstream_that_talks_nonsense(start: Start, data: bytes) -> None:
    rig = start(closing(data))
    assert names(rig.ask(request("GET", "/v1/models"))) == KNOWN


def test_entries_that_are_none_are_left_out(start: Start) -> None:
    rig = start(closing(listing({"id": "x"}, None, 5, "y")))
    assert names(rig.ask(request("GET", "/v1/models"))) == ["auto", "x"]


def test_models_ini_is_read_fresh(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "fresh.ini"
    rig = start(models_ini=str(path))
    client = rig.client()
    for text in ("[code-fast]\n", "; now é\n"):
        path.write_text(text, encoding="utf-8")
        got = client.ask(request("GET", "/models.ini?x=1"))
        assert (got.status, got.body.decode()) == (200, text)
        assert got.header("content-type").startswith("text/plain")
        assert client.ask(request("HEAD", "/models.ini")).header("content-length") == str(len(text.encode()))
    path.unlink()
    got = client.ask(request("GET", "/models.ini"))
    assert got.status == 404
    assert str(path) in error_of(got)["message"]
    assert len(error_of(got)["message"].split()) > 5, "a sentence"
    assert client.ask(request("HEAD", "/models.ini")).status == 404
    assert rig.upstream.connections == 0


@pytest.mark.parametrize("target", ["/models.ini", "/v1/models"])
def test_a_body_that_nobody_reads_is_no_request(start: Start, nothing_listens: int, target: str, tmp_path: Path) -> None:
    (tmp_path / "m.ini").write_text("; mine")
    client = start(upstream_port=nothing_listens, models_ini=str(tmp_path / "m.ini")).client()
    got = client.ask(request("GET", target, body=request("DELETE", "/smuggled")))
    assert (got.status, got.header("connection")) == (200, "close")
    assert client.ended()


# ---- fallback


def by_model(**answers: Optional[bytes]) -> Script:
    """Answers by the model asked for (`_` for `-`); OK for those not named, None closes without a word."""
    return reply_with(lambda m: answers.get(m.json["model"].replace("-", "_"), OK))


def asked(rig: Rig) -> list[str]:
    return [m.json["model"] for m in rig.upstream.requests]


def refuse(status: str, *lines: str) -> bytes:
    return answer(b'{"error":{"message":"no"}}', status, "Content-Type: application/json", *lines)


FAILURES = {
    "401": (refuse("401 Unauthorized"), "401"),
    "403": (refuse("403 Forbidden"), "403"),
    "404 of a hosted tier": (refuse("404 Not Found"), "404"),
    "429": (refuse("429 Too Many Requests", "Retry-After: 7"), "429"),
    "500": (refuse("500 Internal Server Error"), "500"),
    "502": (refuse("502 Bad Gateway"), "502"),
    "503": (refuse("503 Service Unavailable"), "503"),
    "529": (refuse("529 Overloaded"), "529"),
    "500 in chunks": (b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n", "500"),
    "500 as events": (b"HTTP/1.1 500 Oh\r\nContent-Type: text/event-stream\r\n\r\n", "500"),
    "closed": (None, "closed the connection without an answer"),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-Le", None),
    "garbage": (b"garbage\r\n\r\n", None),
}


@pytest.mark.parametrize(("data", "why"), FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("stream", [False, True])
def test_a_tier_that_fails_is_answered_for_by_the_next(start: Start, data: Optional[bytes], why: Optional[str],
                                                       stream: bool) -> None:
    def script(up: Connection) -> None:
        while not up.ended():
            if up.read().json["model"] == "code-ultra":
                up.send(data or b"")
                return
            up.send(answer(b"served"))
    rig = start(script)
    got = rig.ask(chat(stream=stream))
    assert (got.status, got.body, got.header("x-llmstack-model")) == (200, b"served", "code-smart")
    assert asked(rig) == ["code-ultra", "code-smart"]
    fallback = got.header("x-llmstack-fallback")
    assert fallback.startswith("code-ultra→code-smart (")
    assert why is None or fallback == f"code-ultra→code-smart ({why})"
    rig.log.line_with(fallback)
    first, second = rig.upstream.requests
    assert second.body == first.body.replace(b"code-ultra", b"code-smart")
    assert second.target == first.target == CHAT


@pytest.mark.parametrize("status", ["200 OK", "201 Created", "301 Moved Permanently", "400 Bad Request",
                                    "409 Conflict", "413 Content Too Large", "422 Unprocessable"])
def test_what_another_tier_would_not_do_better_is_passed_on(start: Start, status: str) -> None:
    rig = start(by_model(code_ultra=refuse(status)))
    got = rig.ask(chat())
    assert (got.status, got.json) == (int(status[:3]), {"error": {"message": "no"}})
    assert (asked(rig), got.all("x-llmstack-fallback")) == (["code-ultra"], [])


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found"])
def test_a_local_tiers_400_and_404_are_passed_on(start: Start, status: str) -> None:
    rig = start(by_model(code_smart=refuse(status)))
    assert rig.ask(chat(text="x" * 80_000)).status == int(status[:3])
    assert asked(rig) == ["code-smart"]


def test_down_the_whole_ladder(start: Start) -> None:
    rig = start(by_model(code_ultra=refuse("429 Slow down"), code_smart=None))
    got = rig.ask(chat())
    assert (got.status, got.header("x-llmstack-model")) == (200, "code-fast")
    assert got.header("x-llmstack-fallback").startswith("code-ultra→code-smart (429), code-smart→code-fast (closed")


def test_up_the_ladder_where_nothing_is_below(start: Start) -> None:
    rig = start(by_model(code_fast=refuse("500 Oh")))
    assert rig.ask(chat(text="x" * 130_000)).header("x-llmstack-fallback") == "code-fast→code-smart (500)"


def test_only_to_tiers_that_hold_the_request(start: Start) -> None:
    rig = start(by_model(code_fast=refuse("500 Oh")))
    assert rig.ask(chat(text="x" * 400_000)).status == 500
    assert asked(rig) == ["code-fast"], "100,000 tokens fit nowhere else"


def test_when_all_fail_the_last_answer_is_passed_on(start: Start) -> None:
    rig = start(by_model(code_ultra=refuse("401 No"), code_smart=refuse("500 Oh"),
                         code_fast=answer(b'{"error":"the last"}', "503 Loading", "Retry-After: 3")))
    got = rig.ask(chat())
    assert (got.status, got.body, got.header("retry-after")) == (503, b'{"error":"the last"}', "3")
    assert got.header("x-llmstack-fallback") == "code-ultra→code-smart (401), code-smart→code-fast (500)"


def test_when_all_fail_without_an_answer_it_is_a_502(start: Start) -> None:
    rig = start(reply_with(lambda _: None))
    got = rig.ask(chat())
    assert error_of(got)["type"] == "upstream_error"
    assert (got.status, asked(rig)) == (502, ["code-ultra", "code-smart", "code-fast"])
    assert got.header("x-llmstack-fallback").count("→") == 2


@pytest.mark.parametrize("status", ["401 No", "429 Slow down", "500 Oh", "503 Loading"])
def test_a_model_asked_for_by_name_never_falls_back(start: Start, status: str) -> None:
    rig = start(by_model(code_ultra=refuse(status)))
    client = rig.client()
    for _ in range(2):
        assert client.ask(chat("code-ultra")).status == int(status[:3])
    assert asked(rig) == ["code-ultra"] * 2
    assert client.ask(chat("code-ultra")).all("x-llmstack-fallback") == []


def test_never_after_the_first_byte(start: Start) -> None:
    def script(up: Connection) -> None:
        up.read()
        up.send(SSE_CHUNKED, ONE)
    rig = start(script)
    got = rig.ask(chat(stream=True))
    assert (got.status, got.whole, asked(rig)) == (200, False, ["code-ultra"])
    check_last_words(got.body)


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def with_clock(rig: Rig) -> Clock:
    clock = Clock()
    rig.app._breaker = llmstack.Breaker(clock)
    return clock


@pytest.mark.parametrize(("lines", "seconds"), [
    ([], llmstack.BREAKER_S),
    (["Retry-After: 7"], 7),
    (["Retry-After: 60"], 60),
    (["Retry-After: 999999"], llmstack.MAX_BREAKER_S),
    (["Retry-After: 0"], llmstack.BREAKER_S),
    (["Retry-After: Wed, 21 Oct 2065 07:28:00 GMT"], llmstack.MAX_BREAKER_S),
    (["Retry-After: Wed, 21 Oct 2015 07:28:00 GMT"], llmstack.BREAKER_S),
    (["Retry-After: Wed, 99 Oct 2065"], llmstack.BREAKER_S),
    (["Retry-After: -5"], llmstack.BREAKER_S),
])
def test_a_tier_that_failed_is_left_alone_for_a_while(start: Start, lines: list[str], seconds: float) -> None:
    rig = start(by_model(code_ultra=refuse("429 Slow down", *lines)))
    clock, client = with_clock(rig), rig.client()
    client.ask(chat())
    clock.now_s += seconds - 1
    got = client.ask(chat())
    assert (got.header("x-llmstack-model"), got.all("x-llmstack-fallback")) == ("code-smart", [])
    assert "429" in got.header("x-llmstack-reason")
    assert asked(rig) == ["code-ultra", "code-smart", "code-smart"]
    clock.now_s += 2
    assert client.ask(chat()).header("x-llmstack-fallback") == "code-ultra→code-smart (429)"
    assert asked(rig)[3:] == ["code-ultra", "code-smart"], "tried again"


def test_a_tier_that_has_recovered_is_used_again(start: Start) -> None:
    answers = [refuse("503 Loading")]
    rig = start(reply_with(lambda m: answers.pop() if answers else OK))
    clock, client = with_clock(rig), rig.client()
    assert client.ask(chat()).header("x-llmstack-model") == "code-smart"
    clock.now_s += llmstack.BREAKER_S + 1
    for _ in range(2):
        got = client.ask(chat())
        assert (got.header("x-llmstack-model"), got.all("x-llmstack-fallback")) == ("code-ultra", [])


def test_a_400_is_no_reason_to_leave_a_tier_alone(start: Start) -> None:
    rig = start(by_model(code_ultra=refuse("400 Bad Request")))
    client = rig.client()
    for _ in range(2):
        client.ask(chat())
    assert asked(rig) == ["code-ultra"] * 2


def test_when_all_are_left_alone_all_are_tried(start: Start) -> None:
    rig = start(by_model(code_ultra=refuse("500 Oh"), code_smart=refuse("500 Oh"), code_fast=refuse("500 Oh")))
    with_clock(rig)
    client = rig.client()
    client.ask(chat())
    assert client.ask(chat()).status == 500
    assert asked(rig)[3:] == ["code-ultra", "code-smart", "code-fast"]


def test_an_upstream_that_was_down_leaves_no_tier_behind(start: Start, nothing_listens: int) -> None:
    """Nothing was learned about a tier where nothing could be connected to."""
    rig = start(always(OK))
    up, rig.app.behind.upstream = rig.app.behind.upstream, llmstack.Upstream("127.0.0.1", nothing_listens)
    client = rig.client()
    assert client.ask(chat()).status == 502
    rig.app.behind.upstream = up
    assert client.ask(chat()).header("x-llmstack-model") == "code-ultra"


def test_breaker() -> None:
    clock = Clock()
    breaker = llmstack.Breaker(clock)
    breaker.trip("a", "why a", 5)
    breaker.trip("b", "why b")
    assert breaker.down() == {"a": "why a", "b": "why b"}
    clock.now_s += 5
    assert breaker.down() == {"b": "why b"}
    breaker.trip("b", "again", 10_000)
    clock.now_s += llmstack.MAX_BREAKER_S - 1
    assert breaker.down() == {"b": "again"}
    clock.now_s += 1
    assert breaker.down() == {}


@pytest.mark.parametrize(("status", "local", "hosted"), [
    (200, False, False), (302, False, False), (400, False, False), (401, True, True), (402, False, True), (403, True, True),
    (404, False, True), (408, True, True), (413, False, False), (422, False, False), (429, True, True), (499, False, False),
    (500, True, True), (503, True, True), (529, True, True), (599, True, True),
])
def test_which_statuses_fall_through(status: int, local: bool, hosted: bool) -> None:
    assert (llmstack.falls_through(status, False), llmstack.falls_through(status, True)) == (local, hosted)


# ---- a client that goes away


Stage = Callable[[Connection, Client], None]


def before_the_head(up: Connection, client: Client) -> None:
    pass


def between_head_and_body(up: Connection, client: Client) -> None:
    up.send(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n")
    client.read_head()


def within_a_body(up: Connection, client: Client) -> None:
    up.send(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")
    client.read_head()
    client.take(1)


def within_a_stream(up: Connection, client: Client) -> None:
    up.send(SSE_CHUNKED, ONE)
    client.read_head()
    client.read_chunk()


def within_half_a_head(up: Connection, client: Client) -> None:
    up.send(b"HTTP/1.1 200 OK\r\nConte")


@pytest.mark.parametrize("stage", [before_the_head, between_head_and_body, within_a_body, within_a_stream, within_half_a_head])
@pytest.mark.parametrize("leave", [Client.close, Client.reset], ids=["FIN", "RST"])
@pytest.mark.parametrize("request_bytes", [chat("code-fast"), chat(stream=True), request("GET", "/slow")],
                         ids=["by name", "auto", "other"])
def test_a_client_that_goes_away_cancels_upstream(start: Start, stage: Stage, leave: Callable[[Client], None],
                                                  request_bytes: bytes) -> None:
    rig = start()
    client = rig.client()
    client.send(request_bytes)
    up = rig.upstream.next()
    up.read()
    stage(up, client)
    leave(client)
    assert up.ended(), "the upstream sees its connection closed"
    assert rig.upstream.connections == 1, "and no other tier is asked"


def test_a_client_that_goes_away_behind_a_kept_connection(start: Start) -> None:
    rig = start()
    up = served_once(rig, rig.client())
    client = rig.client()
    client.send(chat())
    up.read()
    client.close()
    assert up.ended()
    assert rig.upstream.connections == 1


@pytest.mark.parametrize("more", [b"\r\n", request("GET", "/next"), b"GET /ha"], ids=["empty line", "request", "half a request"])
def test_a_client_that_goes_away_with_more_said_already(start: Start, more: bytes) -> None:
    rig = start()
    client = rig.client()
    client.send(chat("code-fast"))
    up = rig.upstream.next()
    up.read()
    client.send(more)
    client.close()
    assert up.ended()


def test_a_client_that_goes_away_while_the_upstream_does_not_read(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = start(receive_buffer_bytes=4096)
    done = threading.Event()
    serve = rig.app.answer

    def answer_and_tell(*given: Any) -> None:
        try:
            serve(*given)
        finally:
            done.set()
    monkeypatch.setattr(rig.app, "answer", answer_and_tell)
    client = rig.client()
    client.send(request("PUT", "/x", body=b"x" * 8_000_000))
    up = rig.upstream.next()
    up.read_head()
    client.close()
    wait(done)                                  # reading here before it would let the router go on sending
    assert len(up.rest()) < 8_000_000, "cut off"


def test_a_client_that_goes_away_in_its_own_body_asks_nothing(start: Start) -> None:
    rig = start()
    for head in (request("PUT", "/x", "Content-Length: 9"), request("PUT", "/x", "Transfer-Encoding: chunked") + b"9\r\n"):
        client = rig.client()
        client.send(head + b"half")
        client.close()
    last = rig.client()
    last.send(request("GET", "/last"))
    assert rig.upstream.next().read().target == "/last"
    assert rig.upstream.connections == 1


# ---- limits


@pytest.mark.parametrize("framed", [["Content-Length: 11", "", "x" * 11], ["Transfer-Encoding: chunked", "", "b\r\n" + "x" * 11]])
@pytest.mark.parametrize("target", [CHAT, "/x"])
def test_a_body_over_the_limit_is_a_413(start: Start, monkeypatch: pytest.MonkeyPatch, framed: list[str], target: str) -> None:
    monkeypatch.setattr(llmstack, "MAX_BODY_BYTES", 10)
    rig = start()
    client = rig.client()
    got = client.ask("\r\n".join([f"POST {target} HTTP/1.1", HOST, *framed]).encode())
    assert (got.status, got.header("connection")) == (413, "close")
    assert error_of(got)
    assert client.ended()
    assert rig.upstream.connections == 0


@pytest.mark.parametrize("framed", [["Content-Length: 10", "", "x" * 10], ["Transfer-Encoding: chunked", "", "a\r\n" + "x" * 10
                                                                           + "\r\n0\r\n\r\n"]])
def test_a_body_at_the_limit_passes(start: Start, monkeypatch: pytest.MonkeyPatch, framed: list[str]) -> None:
    monkeypatch.setattr(llmstack, "MAX_BODY_BYTES", 10)
    assert start(always(OK)).ask("\r\n".join(["POST /x HTTP/1.1", HOST, *framed]).encode()).status == 200


@pytest.mark.parametrize("given", [b"G", b"GET / HTTP/1.1\r\nHost: 127.0.0.1", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r"])
def test_a_head_that_does_not_arrive_is_a_408(start: Start, given: bytes) -> None:
    client = start(head_timeout_s=0.02).client()
    client.send(given)
    got = client.read_message("GET")
    assert (got.status, got.header("connection")) == (408, "close")
    assert error_of(got)
    assert client.ended()


@pytest.mark.parametrize("line", ["Content-Length: 9", "Transfer-Encoding: chunked"])
def test_a_body_that_does_not_arrive_is_a_408(start: Start, line: str) -> None:
    rig = start(head_timeout_s=0.02)
    client = rig.client()
    got = client.ask(request("PUT", "/x", line))
    assert (got.status, got.header("connection")) == (408, "close")
    assert client.ended()
    assert rig.upstream.connections == 0


def test_a_client_that_says_nothing_is_let_go(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "IDLE_CLIENT_S", 0.02)
    client = start(head_timeout_s=0.02).client()
    assert client.ended()


LARGE_HEADS = {
    "one header": request("GET", "/x", "X: " + "x" * llmstack.MAX_HEAD_BYTES),
    "the target": request("GET", "/" + "x" * llmstack.MAX_HEAD_BYTES),
    "many headers": request("GET", "/x", *["X: a"] * 128),
    "without an end": b"GET /x HTTP/1.1\r\n" + b"X: a\r\n" * (llmstack.MAX_HEAD_BYTES // 6 + 1),
    "one line without an end": b"GET /" + b"x" * (llmstack.MAX_HEAD_BYTES + 1),
}


@pytest.mark.parametrize("head", LARGE_HEADS.values(), ids=LARGE_HEADS.keys())
def test_large_heads_are_a_400(start: Start, head: bytes) -> None:
    client = start().client()
    assert error_of(client.ask(head))["code"] == 400
    assert client.ended()


def test_a_head_just_within_the_limit_passes(start: Start) -> None:
    rig = start(always(OK))
    line = "X: " + "x" * (llmstack.MAX_HEAD_BYTES - 100)
    assert rig.ask(request("GET", "/x", line)).status == 200
    assert len(rig.upstream.requests[0].header("x")) == llmstack.MAX_HEAD_BYTES - 100


SMUGGLED = request("GET", "/smuggled")
ATTACKS = {
    "two lengths": request("PUT", "/x", "Content-Length: 5", f"Content-Length: {5 + len(SMUGGLED)}") + b"hello" + SMUGGLED,
    "length and chunked": request("PUT", "/x", f"Content-Length: {5 + len(SMUGGLED)}", "Transfer-Encoding: chunked")
    + b"0\r\n\r\n" + SMUGGLED,
    "unknown coding": request("PUT", "/x", "Transfer-Encoding: x, chunked") + b"0\r\n\r\n" + SMUGGLED,
    "bare LF": b"GET /x HTTP/1.1\n" + HOST.encode() + b"\n\n" + SMUGGLED,
    "bare CR": b"GET /x HTTP/1.1\r" + HOST.encode() + b"\r\r" + SMUGGLED,
    "bare LF at the end": b"GET /x HTTP/1.1\r\n" + HOST.encode() + b"\n\n",
    "fold": b"GET /x HTTP/1.1\r\n" + HOST.encode() + b"\r\n x: y\r\n\r\n" + SMUGGLED,
    "NUL": request("GET", "/x", "X: \0") + SMUGGLED,
    "bad chunks": request("PUT", "/x", "Transfer-Encoding: chunked") + b"0x1\r\n" + SMUGGLED,
    "a chunk that is longer": request("PUT", "/x", "Transfer-Encoding: chunked") + b"1\r\nxx\r\n0\r\n\r\n" + SMUGGLED,
    "two Origins": request("GET", "/x", "Origin: http://localhost", "Origin: https://evil.example"),
    "two Sec-Fetch-Sites": request("GET", "/x", "Sec-Fetch-Site: none", "Sec-Fetch-Site: cross-site"),
    "CONNECT": request("CONNECT", "127.0.0.1:10101") + SMUGGLED,
    "authority form": request("GET", "127.0.0.1:10101") + SMUGGLED,
    "asterisk form": request("GET", "*") + SMUGGLED,
    "two empty lines in front": b"\r\n\r\n" + SMUGGLED,
    "LF in front": b"\n" + SMUGGLED,
    "CR in front": b"\r" + SMUGGLED,
    "a control byte": request("GET", "/x", "X: \x1b[31m") + SMUGGLED,
    "a trailer without a colon": request("PUT", "/x", "Transfer-Encoding: chunked") + b"0\r\nX\r\n\r\n" + SMUGGLED,
    "a folded trailer": request("PUT", "/x", "Transfer-Encoding: chunked") + b"0\r\nX: 1\r\n 2\r\n\r\n" + SMUGGLED,
    "a trailer and LF": request("PUT", "/x", "Transfer-Encoding: chunked") + b"0\r\nX: 1\n\r\n" + SMUGGLED,
    "a CR in a trailer": request("PUT", "/x", "Transfer-Encoding: chunked") + b"0\r\nX: 1\rY: 2\r\n\r\n" + SMUGGLED,
    "no HTTP": b"\x16\x03\x01\r\n\r\n" + SMUGGLED,
}


@pytest.mark.parametrize("data", ATTACKS.values(), ids=ATTACKS.keys())
def test_smuggling_is_a_400_and_the_end(start: Start, data: bytes) -> None:
    rig = start(always(OK))
    client = rig.client()
    client.send(data)
    got = client.read_message("GET")
    assert (error_of(got)["code"], got.header("connection")) == (400, "close")
    assert client.ended()
    assert rig.upstream.connections == 0


def test_a_malformed_request_behind_a_good_one(start: Start) -> None:
    client = start(always(OK)).client()
    client.send(request("HEAD", "/x") + b"garbage\r\n\r\n")
    assert client.read_message("HEAD").status == 200
    got = client.read_message("GET")
    assert error_of(got)["code"] == 400
    assert client.ended()


def test_connections_over_the_limit_are_a_503(start: Start) -> None:
    rig = start(always(OK), most=2)
    clients = [rig.client() for _ in range(2)]
    for client in clients:
        assert client.ask(request()).status == 200
    third = rig.client()
    got = third.read_message("GET")
    assert (error_of(got)["code"], got.header("connection")) == (503, "close")
    assert third.ended()
    assert [client.ask(request()).status for client in clients] == [200, 200], "those within it are not disturbed"
    clients[0].close()
    deadline = time.monotonic() + WAIT_S        # its thread leaves when it has seen the end; nothing tells us when
    while time.monotonic() < deadline:
        with contextlib.suppress(AssertionError, ConnectionError):
            if rig.ask(request()).status == 200:
                return
    raise AssertionError("its place was not given free")


# ---- who may ask


def test_web_pages_do_not_reach_the_models(start: Start) -> None:
    rig = start(always(OK))
    for line in ("Host: evil.example", "Host: 127.0.0.1.evil.example:10101", "Origin: https://evil.example", "Origin: null",
                 "Sec-Fetch-Site: cross-site"):
        for method, target in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/models.ini"), ("OPTIONS", CHAT), ("GET", "/x")):
            got = rig.ask(request(method, target, line, body=b"{}" if method == "POST" else b""))
            assert got.status == 403, (line, target)
            assert error_of(got)["type"] == "forbidden"
            assert not [n for n, _ in got.headers if n.lower().startswith(b"access-control")]
    assert rig.upstream.connections == 0


def test_pages_of_this_machine_do(start: Start) -> None:
    rig = start(always(OK))
    for host in ("localhost:10101", "127.0.0.1", "[::1]:10101"):
        assert rig.ask(chat("auto", f"Host: {host}", "Origin: http://localhost:3000")).status == 200


def test_a_body_that_was_refused_is_no_request(start: Start) -> None:
    rig = start(always(OK))
    client = rig.client()
    assert client.ask(request("POST", CHAT, "Origin: https://evil.example", body=request("GET", "/smuggled"))).status == 403
    assert client.ended()
    assert rig.upstream.connections == 0


def test_beyond_loopback_other_hosts_may_ask(start: Start) -> None:
    rig = start(always(OK), loopback=False, key="k")
    key = "Authorization: Bearer k"
    assert rig.ask(request("GET", "/x", "Host: box.lan:10101", key)).status == 200
    assert rig.ask(request("GET", "/x", "Host: box.lan:10101", "Origin: http://box.lan:10101", key)).status == 200
    assert rig.ask(request("GET", "/x", "Host: box.lan:10101", "Origin: http://evil.example", key)).status == 403


KEYS = {
    "Bearer": (["Authorization: Bearer sesame"], True),
    "bearer, more spaces": (["Authorization: bearer   sesame "], True),
    "x-api-key": (["X-Api-Key: sesame"], True),
    "theirs beside ours": (["Authorization: Bearer theirs", "x-api-key: sesame"], True),
    "none": ([], False),
    "wrong": (["Authorization: Bearer simsim"], False),
    "wrong x-api-key": (["X-Api-Key: simsim"], False),
    "longer": (["Authorization: Bearer sesame2"], False),
    "shorter": (["Authorization: Bearer sesam"], False),
    "other case": (["Authorization: Bearer SESAME"], False),
    "empty": (["Authorization: Bearer "], False),
    "empty x-api-key": (["X-Api-Key:"], False),
    "in other letters": (["Authorization: Bearer s\xe9same"], False),
    "Basic": (["Authorization: Basic sesame"], False),
    "without a scheme": (["Authorization: sesame"], False),
    "in a cookie": (["Cookie: key=sesame"], False),
}


@pytest.mark.parametrize(("lines", "right"), KEYS.values(), ids=KEYS.keys())
def test_the_key(start: Start, lines: list[str], right: bool, tmp_path: Path) -> None:
    (tmp_path / "m.ini").write_text("; mine")
    rig = start(closing(listing()), key="sesame", models_ini=str(tmp_path / "m.ini"))
    rig.never_logged.append("sesame")
    for sent in (chat("auto", *lines), chat("code-fast", *lines), request("GET", "/props", *lines),
                 request("GET", "/v1/models", *lines), request("GET", "/models.ini", *lines),
                 request("HEAD", "/models.ini", *lines)):
        got = rig.ask(sent)
        assert got.status == (200 if right else 401), sent
        if not right and got.body:
            error = error_of(got)
            assert error["type"] == "authentication_error"
            assert "LLMSTACK_API_KEY" in error["message"]
            assert "sesame" not in error["message"]
    assert len(rig.upstream.requests) == (4 if right else 0)
    assert not [m for m in rig.upstream.requests if b"sesame" in m.raw], "our key is not for the upstream"


def test_another_key_goes_on_to_the_upstream(start: Start) -> None:
    rig = start(always(OK), key="sesame")
    rig.ask(request("GET", "/x", "Authorization: Bearer theirs", "X-Api-Key: sesame"))
    rig.ask(request("GET", "/x", "Authorization: Bearer sesame", "X-Api-Key: theirs"))
    first, second = rig.upstream.requests
    assert (first.all("authorization"), first.all("x-api-key")) == (["Bearer theirs"], [])
    assert (second.all("authorization"), second.all("x-api-key")) == ([], ["theirs"])


def test_our_key_given_in_both_places_goes_on_from_neither(start: Start) -> None:
    rig = start(always(OK), key="sesame")
    assert rig.ask(chat("auto", "Authorization: Bearer sesame", "x-api-key: sesame")).status == 200
    assert b"sesame" not in rig.upstream.requests[0].raw


def test_without_a_key_none_is_asked_for_and_theirs_pass(start: Start) -> None:
    rig = start(always(OK))
    assert rig.ask(request("GET", "/x", "Authorization: Bearer theirs", "x-api-key: theirs")).status == 200
    assert rig.upstream.requests[0].raw.count(b"theirs") == 2


# ---- a bug of ours


def test_a_bug_is_a_500_and_its_traceback_stays_here(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a detail of ours")
    rig = start(always(OK))
    rig.never_logged.clear()
    with monkeypatch.context() as patch:
        patch.setattr(llmstack, "decide", broken)
        client = rig.client()
        got = client.ask(chat())
        assert (got.status, got.header("connection")) == (500, "close")
        assert error_of(got)["type"] == "server_error"
        assert b"ZeroDivisionError" not in got.raw
        assert b"a detail of ours" not in got.raw
        assert client.ended()
    line = rig.log.line_with("ZeroDivisionError: a detail of ours")
    assert "Traceback" in line
    assert rig.ask(chat()).status == 200, "the router goes on"
