"""RELAY and ROUTER: a real server on port 0 before a scripted upstream, raw sockets as its clients.

A test drives both ends in the order it reads; every read waits for what must come, so nothing depends on time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import pytest

import llmstack
from llmstack import chunk
from tests.scripted import WAIT_S, Connection, Message, Script, ScriptedUpstream, Wire, always, answer, reply_with, wait

HOST = "Host: 127.0.0.1:10101"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
ULTRA = llmstack.Tier("code-ultra", role="ultra", backend="litellm", model="anthropic/claude-opus", ctx_size=24_000)


class Client(Wire):
    """A client's connection to the router."""

    def __init__(self, port: int) -> None:
        super().__init__(socket.create_connection(("127.0.0.1", port), WAIT_S))

    def ask(self, request: bytes) -> Message:
        """Send a request and read its whole answer."""
        self.send(request)
        return self.read_message(request.split(b" ")[0].decode())


class Rig:
    """A router on port 0, what is behind it, and the clients of one test."""

    def __init__(self, config: llmstack.Config, directory: Path, script: Optional[Script], *, most: int = 512,
                 head_timeout_s: float = 30.0, prefix: str = "", upstream_port: int = 0, receive_buffer_bytes: int = 0,
                 **settings: Any) -> None:
        self.upstream = ScriptedUpstream(script, receive_buffer_bytes)
        self._log_file = directory / "router.log"
        self._log = llmstack.Log(str(self._log_file), "debug")
        behind = llmstack.Upstream("127.0.0.1", upstream_port or self.upstream.port, prefix)
        settings.setdefault("models_ini", str(directory / "models.ini"))
        self.app = llmstack.RouterApp(config, behind, self._log, **settings)
        self._server = llmstack.make_server("127.0.0.1", 0, self.app, most=most, head_timeout_s=head_timeout_s)
        self.port: int = self._server.server_port
        self._clients: list[Client] = []
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def client(self) -> Client:
        client = Client(self.port)
        self._clients.append(client)
        return client

    def ask(self, request: bytes) -> Message:
        """The answer to a request on a connection of its own."""
        return self.client().ask(request)

    def log(self) -> str:
        return self._log_file.read_text(encoding="utf-8")

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._server.shutdown()
        self._thread.join(WAIT_S)
        self._server.server_close()
        try:
            self.upstream.close()
        finally:
            self.app.upstream.forget()
            for thread in threading.enumerate():    # those that serve connections: all of them must come to an end
                if thread not in (threading.current_thread(), threading.main_thread()):
                    thread.join(WAIT_S)
                    assert not thread.is_alive(), thread
            os.close(self._log._fd)


Start = Callable[..., Rig]


@pytest.fixture
def start(config: llmstack.Config, tmp_path: Path) -> Iterator[Start]:
    """Starts a router with the bundled models.ini and an ultra tier; all of it is closed behind the test."""
    with contextlib.ExitStack() as stack:
        def start(script: Optional[Script] = None, **settings: Any) -> Rig:
            directory = tmp_path / f"rig-{len(list(tmp_path.iterdir()))}"
            directory.mkdir()
            rig = Rig(config._replace(tiers=(*config.tiers, ULTRA)), directory, script, **settings)
            stack.callback(rig.close)
            return rig
        yield start


# ---- what is sent


def request(method: str = "GET", target: str = "/props", *lines: str, body: bytes = b"", minor: int = 1) -> bytes:
    """A request with a Content-Length where it has a body; its Host is the router's unless `lines` have one."""
    head = [f"{method} {target} HTTP/1.{minor}", *([] if any(x.lower().startswith("host:") for x in lines) else [HOST]), *lines]
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
    client = rig.client()
    for _ in range(2):                          # twice: the first answer must have been framed right
        got = client.ask(request(method, "/slots/1?action=save&x=%2F", "X-To: upstream", body=b"" if method == "HEAD" else b"a=b"))
        assert (got.start, got.header("x-from")) == (b"HTTP/1.1 207 Odd", "upstream")
        assert got.body == (b"" if method == "HEAD" else b"fine")
    seen = rig.upstream.requests[1]
    assert seen.start == f"{method} /slots/1?action=save&x=%2F HTTP/1.1".encode()
    assert (seen.header("x-to"), seen.body) == ("upstream", b"" if method == "HEAD" else b"a=b")
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


@pytest.mark.parametrize("target", ["/", "/v1/embeddings", "/upstream/code-fast/slots?a=b&a=c&d", "/x?y=http://z/?q", "/%2e%2e/x",
                                    "//x", "*", "/a;b=c?%00", "/caf\xe9"])
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
    lines = ["User-Agent: curl/8", "X-CaSe:  two  spaces ", "X-Twice: 1", "accept: */*", "X-Twice: 2", "X-Latin: \xe9", "X-Empty:",
             "Authorization: Bearer theirs", "Cookie: a=b", "x-session-id: s"]
    rig.ask(request("POST", "/x", *lines, body=b"{}"))
    head = rig.upstream.requests[0].raw.split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    assert head == ["POST /x HTTP/1.1", f"Host: 127.0.0.1:{rig.upstream.port}", *lines, "Content-Length: 2"]


def test_hop_by_hop_headers_of_a_request_stay_here(start: Start) -> None:
    rig = start(always(OK))
    rig.ask(request("GET", "/x", "Connection: keep-alive, X-Hop", "Keep-Alive: timeout=5", "X-Hop: 1", "TE: trailers", "Upgrade: h2c",
                    "Proxy-Authorization: Basic x", "Proxy-Connection: keep-alive", "Trailer: X-T", "X-Kept: 1"))
    assert [n for n, _ in rig.upstream.requests[0].headers] == [b"Host", b"X-Kept"]


def test_response_headers_pass_as_they_were_spelled(start: Start) -> None:
    lines = ["Date: Mon, 01 Jan 2024 00:00:00 GMT", "Server: llama.cpp", "Set-Cookie: a=1; Expires=Mon, 01 Jan 2024", "X-CaSe:  y ",
             "set-cookie: b=2", "Set-Cookie: c=3"]
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
@pytest.mark.parametrize("lines", [[], ["Connection: keep-alive"]])
def test_http_1_0_gets_no_chunks_and_the_end_of_the_connection(start: Start, data: bytes, lines: list[str]) -> None:
    def script(up: Connection) -> None:
        up.read()
        up.send(data)
    rig = start(script)
    client = rig.client()
    client.send("\r\n".join(["GET /x HTTP/1.0", *lines, "", ""]).encode())
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


# ---- keep-alive and the upstream pool


def test_connections_are_kept_on_both_sides(start: Start) -> None:
    rig = start()
    client = rig.client()
    client.send(request("GET", "/1"))
    up = rig.upstream.next()
    up.read()
    up.send(OK)
    assert client.read_message("GET").body == b"ok"
    other = rig.client()                        # another client, the same upstream connection
    other.send(chat("code-fast"))
    assert up.read().target == CHAT
    up.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    assert other.read_message("POST").body == b"ok"
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


def served_once(rig: Rig, client: Client) -> Connection:
    """An upstream connection that has answered one request and is kept."""
    client.send(request("GET", "/first"))
    up = rig.upstream.next()
    up.read()
    up.send(OK)
    client.read_message("GET")
    return up


def test_a_kept_connection_that_was_closed_is_passed_over(start: Start) -> None:
    rig = start()
    client = rig.client()
    served_once(rig, client).close()
    client.send(chat())
    up = rig.upstream.next()
    assert up.read().json["model"] == "code-ultra"
    up.send(OK)
    assert client.read_message("POST").body == b"ok"


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
    rig = start(reply_with(lambda m: answer(m.target.encode() + m.body)))
    client = rig.client()
    client.send(request("GET", "/1") + request("PUT", "/2", body=b"two") + request("HEAD", "/3") + request("GET", "/4"))
    assert [client.read_message(m).body for m in ("GET", "PUT")] == [b"/1", b"/2two"]
    assert client.read_head().header("content-length") == "2"
    assert client.read_message("GET").body == b"/4"
    assert rig.upstream.connections == 1


@pytest.mark.parametrize("between", [b"\r\n", b"\r\n\r\n"])
def test_empty_lines_between_requests_are_nothing(start: Start, between: bytes) -> None:
    """RFC 9112, 2.2: old clients send one behind a body."""
    client = start(always(OK)).client()
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


@pytest.mark.parametrize("size", [100, 8_000_000])
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
    assert client.read_head().header("content-type") == "text/event-stream"
    for event in EVENTS:
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
    "an event over two chunks": [chunk(EVENTS[0][:5]), chunk(EVENTS[0][5:] + EVENTS[1]), b"0\r\n\r\n"],
    "extensions": [b"3;x=y\r\ndat\r\n", b"005\r\na: 1\n\r\n1\r\n\n\r\n", b"0;z\r\n\r\n"],
}


@pytest.mark.parametrize("pieces", SPLITS.values(), ids=SPLITS.keys())
def test_chunks_are_relayed_byte_for_byte_as_they_come(start: Start, pieces: list[bytes]) -> None:
    rig = start()
    client = rig.client()
    client.send(chat(stream=True))
    up = rig.upstream.next()
    up.read()
    up.send(SSE_CHUNKED)
    client.read_head()
    for piece in pieces:                        # each must arrive before the next is sent
        up.send(piece)
        assert client.take(len(piece)) == piece
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
    assert client.take(100) == STREAM[:100]
    up.send(STREAM[100:])
    assert client.take(len(STREAM) - 100) == STREAM[100:]


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


def broken_stream(rig: Rig, sent: list[bytes], end: Callable[[Connection], None] = Connection.close,
                  ask: bytes = b"") -> tuple[Message, bytes, bytes]:
    """An answer of which `sent` came and no more: (its head, what came of `sent`, what came behind that)."""
    client = rig.client()
    client.send(ask or chat(stream=True))
    up = rig.upstream.next()
    up.read()
    head = sent[0].partition(b"\r\n\r\n")[0]
    body = b"".join(sent)[len(head) + 4:]
    up.send(*sent)
    got = client.read_head()
    came = client.take(len(body))
    end(up)
    return got, came, client.rest()


CUTS = {
    "right behind the head": b"",
    "between events": chunk(EVENTS[0]),
    "in an event": chunk(EVENTS[0])[:-20],
    "one byte into an event": chunk(EVENTS[0]) + b"2f\r\nd",
    "behind an event's payload": chunk(EVENTS[0])[:-2],
    "in the CRLF behind it": chunk(EVENTS[0])[:-1],
    "in a size line": chunk(EVENTS[0]) + b"2",
    "behind a size": chunk(EVENTS[0]) + b"2f",
    "in the CRLF of a size line": chunk(EVENTS[0]) + b"2f\r",
    "behind a size line": chunk(EVENTS[0]) + b"2f\r\n",
    "behind a size of 1000": chunk(EVENTS[0]) + b"1000",
    "behind a 0 that may have been the end": chunk(EVENTS[0]) + b"0",
    "behind white space": chunk(EVENTS[0]) + b"2f ",
    "in an extension": chunk(EVENTS[0]) + b"2f;a=",
    "an event over two chunks": chunk(EVENTS[0]) + chunk(EVENTS[1][:9]),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("end", [Connection.close, Connection.reset])
def test_a_stream_that_breaks_off_says_so_and_never_ends_cleanly(start: Start, cut: bytes,
                                                                 end: Callable[[Connection], None]) -> None:
    rig = start()
    _, came, more = broken_stream(rig, [SSE_CHUNKED, cut], end)
    assert came == cut
    payload, whole = chunks_of(came + more)
    assert not whole, "a clean end: opencode would ask again without bound"
    *_, last = [line for line in payload.split(b"\n") if line]
    assert last.startswith(b"data: ")
    assert payload.endswith(b"\n\n"), "the event is a whole one"
    assert set(json.loads(last[6:])["error"]) == {"message", "type", "param", "code"}
    assert "broke off" in rig.log()


def chunks_of(framed: bytes) -> tuple[bytes, bool]:
    """The payload of chunk framing that must hold up to the end of the bytes, and whether the last chunk is there."""
    near, far = socket.socketpair()
    with near, far:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        near.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed)
        near.close()
        message = PairWire(far).read_message("GET")
    return message.body, message.whole


