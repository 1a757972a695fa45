"""PURE: HTTP. Heads, chunk framing, and who may ask: no sockets here (tests/test_router.py has them)."""

from __future__ import annotations

import random
from typing import Optional

import pytest

import llmstack
from llmstack import ChunkFraming, HttpError, chunk, parse_request_head, parse_response_head
from tests.scripted import read_chunks


@pytest.fixture(autouse=True)
def home() -> None:
    """No files here."""


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """No processes either."""


def head(*lines: str) -> bytes:
    """A head without its empty line, as the parsers get it."""
    return "\r\n".join(lines).encode("latin-1")


def post(*headers: str) -> bytes:
    return head("POST /v1/chat/completions HTTP/1.1", "Host: localhost", *headers)


def request(*headers: str, minor: int = 1) -> llmstack.Request:
    return parse_request_head(head(f"GET /x HTTP/1.{minor}", *headers))


# ---- request heads


def test_a_request_head_in_its_parts() -> None:
    parsed = parse_request_head(head("POST /v1/x?a=1&b=%20 HTTP/1.1", "HOST: localhost:1", "Content-Length:5", "X-A: \t b c \t",
                                     "x-a:", "Connection: Keep-Alive"))
    assert (parsed.method, parsed.target, parsed.minor, parsed.length) == ("POST", "/v1/x?a=1&b=%20", 1, 5)
    assert [(n, v) for n, v, _ in parsed.headers] == [
        (b"host", b"localhost:1"), (b"content-length", b"5"), (b"x-a", b"b c"), (b"x-a", b""), (b"connection", b"Keep-Alive")]
    assert parsed.headers[0][2] == b"HOST: localhost:1", "the line as it came"
    assert (parsed.keep_alive, parsed.upgrade, parsed.expects) == (True, False, False)
    assert (parsed.header(b"host"), parsed.header(b"x-a"), parsed.header(b"absent")) == ("localhost:1", "b c", "")


SMUGGLING = {
    "two lengths": post("Content-Length: 5", "Content-Length: 6"),
    "the same length twice": post("Content-Length: 5", "Content-Length: 5"),
    "a list of lengths": post("Content-Length: 5, 5"),
    "length +5": post("Content-Length: +5"),
    "length -1": post("Content-Length: -1"),
    "length 0x5": post("Content-Length: 0x5"),
    "length 1_0": post("Content-Length: 1_0"),
    "length 5.0": post("Content-Length: 5.0"),
    "length 1e3": post("Content-Length: 1e3"),
    "length with a space inside": post("Content-Length: 5 5"),
    "empty length": post("Content-Length:"),
    "length in other digits": post("Content-Length: \xb2"),
    "length of 16 digits": post("Content-Length: 1234567890123456"),
    "length of 4,000 digits": post("Content-Length: " + "9" * 4000),
    "length then chunked": post("Content-Length: 5", "Transfer-Encoding: chunked"),
    "chunked then length": post("Transfer-Encoding: chunked", "Content-Length: 5"),
    "chunked and length 0": post("Transfer-Encoding: chunked", "Content-Length: 0"),
    "coding gzip": post("Transfer-Encoding: gzip"),
    "coding identity": post("Transfer-Encoding: identity"),
    "coding gzip, chunked": post("Transfer-Encoding: gzip, chunked"),
    "coding chunked, gzip": post("Transfer-Encoding: chunked, gzip"),
    "coding chunked, chunked": post("Transfer-Encoding: chunked, chunked"),
    "coding xchunked": post("Transfer-Encoding: xchunked"),
    "coding with a parameter": post("Transfer-Encoding: chunked;q=1"),
    "coding with a vertical tab": post("Transfer-Encoding: \x0bchunked"),
    "coding in quotes": post('Transfer-Encoding: "chunked"'),
    "empty coding": post("Transfer-Encoding:"),
    "coding twice": post("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    "coding twice, one unknown": post("Transfer-Encoding: chunked", "Transfer-Encoding: cow"),
    "chunked in HTTP/1.0": head("POST / HTTP/1.0", "Transfer-Encoding: chunked"),
    "bare CR in a value": post("X: a\rContent-Length: 5"),
    "bare CR at the end of a line": post("X: a\r", "Y: b"),
    "bare CR at the end of the head": post("X: a\r"),
    "bare CR in the request line": head("GET / HTTP/1.1\r\r", "Host: localhost"),
    "bare CR in the target": head("GET /\rX HTTP/1.1", "Host: localhost"),
    "bare LF between lines": b"GET / HTTP/1.1\nHost: localhost",
    "bare LF in a value": post("X: a\nContent-Length: 5"),
    "LF CR": post("X: a\n\rY: b"),
    "a bare CR for each bare LF": post("X: a\nY: b\rZ: c"),
    "NUL in a value": post("X: a\0b"),
    "NUL in a name": post("X\0: a"),
    "NUL in the target": head("GET /\0 HTTP/1.1", "Host: localhost"),
    "folded line": post("X: a", " b"),
    "folded by a tab": post("X: a", "\tb"),
    "folded coding": post("Transfer-Encoding:", " chunked"),
    "first header folded": head("GET / HTTP/1.1", " Host: localhost"),
    "space before the colon": post("Content-Length : 5"),
    "tab before the colon": post("Transfer-Encoding\t: chunked"),
    "space in a name": post("X Y: a"),
    "no colon": post("Content-Length 5"),
    "no name": post(": a"),
    "name in other letters": post("X\xe9: a"),
    "an empty line within": post("", "X: a"),
    "two Hosts": post("Host: evil.example"),
    "two equal Hosts": post("Host: localhost"),
    "no Host": head("GET / HTTP/1.1"),
    "no Host but others": head("GET / HTTP/1.1", "X-Host: localhost"),
    "two Hosts in HTTP/1.0": head("GET / HTTP/1.0", "Host: a", "Host: b"),
    "HTTP/2.0": head("GET / HTTP/2.0", "Host: localhost"),
    "the preface of HTTP/2": b"PRI * HTTP/2.0",
    "HTTP/1.2": head("GET / HTTP/1.2", "Host: localhost"),
    "HTTP/1.10": head("GET / HTTP/1.10", "Host: localhost"),
    "HTTP/01.1": head("GET / HTTP/01.1", "Host: localhost"),
    "http/1.1": head("GET / http/1.1", "Host: localhost"),
    "HTTP/0.9": b"GET /",
    "no target": head("GET HTTP/1.1", "Host: localhost"),
    "empty target": head("GET  HTTP/1.1", "Host: localhost"),
    "space in the target": head("GET /a b HTTP/1.1", "Host: localhost"),
    "tab for a space": head("GET\t/ HTTP/1.1", "Host: localhost"),
    "two spaces": head("GET  / HTTP/1.1", "Host: localhost"),
    "space behind the version": head("GET / HTTP/1.1 ", "Host: localhost"),
    "space before the method": head(" GET / HTTP/1.1", "Host: localhost"),
    "method in brackets": head("(GET) / HTTP/1.1", "Host: localhost"),
    "method of 33 letters": head("G" * 33 + " / HTTP/1.1", "Host: localhost"),
    "nothing": b"",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "two Origins": post("Origin: http://localhost", "Origin: https://evil.example"),
    "two equal Origins": post("Origin: http://localhost", "Origin: http://localhost"),
    "two Sec-Fetch-Sites": post("Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"),
    "CONNECT": head("CONNECT localhost:10101 HTTP/1.1", "Host: localhost:10101"),
    "CONNECT of a path": head("CONNECT /v1/models HTTP/1.1", "Host: localhost"),
    "authority form": head("GET localhost:10101 HTTP/1.1", "Host: localhost"),
    "authority form without a port": head("GET localhost HTTP/1.1", "Host: localhost"),
    "asterisk form of GET": head("GET * HTTP/1.1", "Host: localhost"),
    "asterisk and a path": head("OPTIONS */x HTTP/1.1", "Host: localhost"),
    "another scheme": head("GET ftp://localhost/ HTTP/1.1", "Host: localhost"),
    "a scheme and no host": head("GET http:///x HTTP/1.1", "Host: localhost"),
    "a query alone": head("GET ?x HTTP/1.1", "Host: localhost"),
    "an empty line in front": b"\r\nGET / HTTP/1.1\r\nHost: localhost",
    "LF in front": b"\nGET / HTTP/1.1\r\nHost: localhost",
    "CR in front": b"\rGET / HTTP/1.1\r\nHost: localhost",
    "129 headers": head("GET / HTTP/1.1", "Host: localhost", *["X: a"] * 128),
}


@pytest.mark.parametrize("given", SMUGGLING.values(), ids=SMUGGLING.keys())
def test_what_could_smuggle_is_refused(given: bytes) -> None:
    with pytest.raises(HttpError) as caught:
        parse_request_head(given)
    assert caught.value.status == 400
    assert str(caught.value)


CONTROLS = [byte for byte in (*range(0x20), 0x7f) if byte != 0x09]


@pytest.mark.parametrize("byte", CONTROLS)
def test_control_bytes_are_refused_wherever_they_stand(byte: int) -> None:
    sign = chr(byte)
    for given in (post(f"X-A: a{sign}b"), post(f"X-A: {sign}"), post(f"X{sign}: a"),
                  head(f"GET /{sign} HTTP/1.1", "Host: localhost"), head("GET / HTTP/1.1", f"Host: localhost{sign}")):
        with pytest.raises(HttpError) as caught:
            parse_request_head(given)
        assert caught.value.status == 400
    with pytest.raises(ValueError):
        parse_response_head(head("HTTP/1.1 200 OK", f"X-A: a{sign}b"), "GET")


ACCEPTED = {
    "a tab in a value": (post("X: a\tb"), 0),
    "the same header twice": (post("X: a", "X: b"), 0),
    "length 0": (post("Content-Length: 0"), 0),
    "length with zeros in front": (post("Content-Length: 007"), 7),
    "length of 15 digits": (post("Content-Length: 123456789012345"), 123456789012345),
    "length in white space": (post("Content-Length: \t 5 \t"), 5),
    "no body": (post(), 0),
    "chunked": (post("Transfer-Encoding: chunked"), -1),
    "Chunked, any case": (post("TRANSFER-ENCODING: Chunked"), -1),
    "HTTP/1.0 without Host": (head("GET / HTTP/1.0"), 0),
    "128 headers": (head("GET / HTTP/1.1", "Host: localhost", *["X: a"] * 127), 0),
    "a value in other letters": (post("X: \xe9\xff"), 0),
    "an empty value": (post("X:"), 0),
    "a colon in a value": (post("X: a: b"), 0),
    "every sign a name may have": (post("!#$%&'*+-.^_`|~09azAZ: a"), 0),
    "an empty Host": (head("GET / HTTP/1.1", "Host:"), 0),
    "a target in other letters": (head("GET /\xe9 HTTP/1.1", "Host: localhost"), 0),
    "asterisk": (head("OPTIONS * HTTP/1.1", "Host: localhost"), 0),
}


@pytest.mark.parametrize(("given", "length"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_what_is_only_unusual_is_accepted(given: bytes, length: int) -> None:
    assert parse_request_head(given).length == length


@pytest.mark.parametrize(("given", "target"), [
    ("http://localhost:10101/v1/models?x=1", "/v1/models?x=1"),
    ("HTTPS://localhost/x", "/x"),
    ("http://localhost", "/"),
    ("http://localhost?x=/1", "/?x=/1"),
    ("//x", "//x"),
])
def test_absolute_targets_lose_their_host(given: str, target: str) -> None:
    assert parse_request_head(head(f"GET {given} HTTP/1.1", "Host: localhost")).target == target


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "M-SEARCH", "get", "Post"])
def test_methods_are_kept_as_they_are_spelled(method: str) -> None:
    assert parse_request_head(head(f"{method} / HTTP/1.1", "Host: localhost")).method == method


@pytest.mark.parametrize(("minor", "headers", "expected"), [
    (1, [], True),
    (1, ["Connection: keep-alive"], True),
    (1, ["Connection: close"], False),
    (1, ["Connection: CLOSE"], False),
    (1, ["Connection: x, Close"], False),
    (1, ["Connection: x", "Connection: close"], False),
    (1, ["Connection: closed"], True),
    (0, [], False),
    (0, ["Connection: close"], False),
    (0, ["Connection: Keep-Alive"], True),
    (0, ["Connection: keep-alive, close"], False),
])
def test_whether_the_client_stays(minor: int, headers: list[str], expected: bool) -> None:
    assert request("Host: localhost", *headers, minor=minor).keep_alive is expected


@pytest.mark.parametrize(("minor", "headers", "expected"), [
    (1, ["Connection: Upgrade", "Upgrade: websocket"], True),
    (1, ["Connection: keep-alive, upgrade", "Upgrade: h2c"], True),
    (1, ["Upgrade: websocket"], False),
    (1, ["Connection: Upgrade"], False),
    (0, ["Connection: Upgrade", "Upgrade: websocket"], False),
])
def test_whether_an_upgrade_is_asked_for(minor: int, headers: list[str], expected: bool) -> None:
    assert request("Host: localhost", *headers, minor=minor).upgrade is expected


def test_expectations() -> None:
    assert request("Host: localhost", "Expect: 100-Continue").expects
    assert not request("Host: localhost", "Expect: 100-continue", minor=0).expects
    with pytest.raises(HttpError) as caught:
        request("Host: localhost", "Expect: a-miracle")
    assert caught.value.status == 417


def test_other_headers_make_another_head_for_the_upstream() -> None:
    upstream, asked = llmstack.Upstream("127.0.0.1", 1), parse_request_head(post("Content-Length: 5", "X-A: 1"))
    changed = asked._replace(headers=(*asked.headers, (b"x-b", b"2", b"X-B: 2")))
    for each, there in ((asked, False), (changed, True), (asked, False)):
        assert (b"X-B: 2" in llmstack.request_head(each, upstream, "/", 7)) is there
    bare = llmstack.without_headers(asked, (b"x-a",))
    assert b"X-A" not in llmstack.request_head(bare, upstream, "/", 7)
    assert bare.fields[b"x-a"] == b"1", "what it said is known all the same"
    assert llmstack.request_head(asked, upstream, "/", 8).endswith(b"\r\nContent-Length: 8\r\n\r\n")


# ---- response heads


@pytest.mark.parametrize(("method", "lines", "framing", "length", "keep_alive"), [
    ("GET", ["HTTP/1.1 200 OK", "Content-Length: 5"], "length", 5, True),
    ("GET", ["HTTP/1.1 200 OK", "Content-Length: 0"], "length", 0, True),
    ("GET", ["HTTP/1.1 200", "Content-Length: 5"], "length", 5, True),
    ("GET", ["HTTP/1.1 200 ", "Content-Length: 5"], "length", 5, True),
    ("GET", ["HTTP/1.1 500 Bad \xe9", "Content-Length: 5", "Connection: close"], "length", 5, False),
    ("GET", ["HTTP/1.1 200 OK", "Transfer-Encoding: chunked"], "chunked", 0, True),
    ("GET", ["HTTP/1.1 200 OK", "transfer-encoding: Chunked", "Connection: x, Close"], "chunked", 0, False),
    ("GET", ["HTTP/1.1 200 OK"], "close", 0, False),
    ("GET", ["HTTP/1.0 200 OK"], "close", 0, False),
    ("GET", ["HTTP/1.0 200 OK", "Content-Length: 5"], "length", 5, False),
    ("GET", ["HTTP/1.0 200 OK", "Content-Length: 5", "Connection: Keep-Alive"], "length", 5, True),
    ("HEAD", ["HTTP/1.1 200 OK", "Content-Length: 5"], "none", 5, True),
    ("HEAD", ["HTTP/1.1 200 OK", "Transfer-Encoding: chunked"], "none", 0, True),
    ("GET", ["HTTP/1.1 204 No Content"], "none", 0, True),
    ("GET", ["HTTP/1.1 304 Not Modified", "Content-Length: 5"], "none", 5, True),
    ("GET", ["HTTP/1.1 100 Continue"], "none", 0, True),
    ("GET", ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket"], "none", 0, True),
])
def test_how_an_answer_is_framed(method: str, lines: list[str], framing: str, length: int, keep_alive: bool) -> None:
    response = parse_response_head(head(*lines), method)
    assert (response.framing, response.length, response.keep_alive) == (framing, length, keep_alive)


def test_both_chunked_and_a_length_means_chunked() -> None:
    lines = ["HTTP/1.1 200 OK", "Transfer-Encoding: chunked", "Content-Length: 5"]
    assert parse_response_head(head(*lines), "GET").framing == "chunked"


@pytest.mark.parametrize(("content_type", "events"), [
    ("text/event-stream", True),
    ("Text/Event-Stream; charset=utf-8", True),
    ("application/json", False),
    ("application/x-ndjson", False),
])
def test_streams_of_events_are_known(content_type: str, events: bool) -> None:
    response = parse_response_head(head("HTTP/1.1 200 OK", f"Content-Type: {content_type}"), "GET")
    assert response.events is events
    assert response.header(b"content-type") == content_type


@pytest.mark.parametrize("given", [
    b"", b"garbage", b"HTTP/2 200 OK", b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 600 Odd", b"HTTP/1.1 abc OK",
    b"HTTP/1.1  200 OK", b"SSH-2.0-OpenSSH_9.6", b"HTTP/1.1 200 OK\nX: a", b"HTTP/1.1 200 OK\r\nX: a\rb", b"HTTP/1.1 200 O\0K",
    b"HTTP/1.1 200 OK\r\nX a", b"HTTP/1.1 200 OK\r\nX : a", b"HTTP/1.1 200 OK\r\nX: a\r\n b",
    b"HTTP/1.1 200 OK\r\nContent-Length: -5", b"HTTP/1.1 200 OK\r\nContent-Length: five", b"HTTP/1.1 200 OK\r\nContent-Length:",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6",
])
def test_a_malformed_answer_is_refused(given: bytes) -> None:
    with pytest.raises(ValueError):
        parse_response_head(given, "GET")


# ---- which headers travel on


def travels(*lines: str) -> list[str]:
    text = parse_response_head(head("HTTP/1.1 200 OK", *lines), "GET").text
    return text.decode("latin-1").split("\r\n")[1:-1]


def test_hop_by_hop_headers_stay_behind() -> None:
    assert travels("X-A: 1", "Connection: keep-alive", "Keep-Alive: timeout=5", "TE: trailers", "Trailer: X", "Upgrade: h2c",
                   "Proxy-Authorization: x", "Proxy-Authenticate: x", "Proxy-Connection: keep-alive", "x-a:  2 ") == [
        "X-A: 1", "x-a:  2 "]


def test_headers_named_by_connection_stay_behind() -> None:
    assert travels("X-Secret: 1", "X-Kept: 2", "Connection: close, X-SECRET", "x-other: 3", "Connection: x-other ,",
                   "x-secret: 4") == ["X-Kept: 2"]


def test_which_page_may_read_an_answer_is_not_for_the_upstream_to_say() -> None:
    assert travels("Access-Control-Allow-Origin: *", "X-A: 1") == ["X-A: 1"]


# ---- chunk framing, held against the plain reader of tests/scripted.py


EVENTS = [b"data: {\"n\":%d}\n\n" % n for n in range(3)]
MESSAGES = {
    "empty": b"0\r\n\r\n",
    "events": b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n",
    "upper case": b"1A\r\n" + b"x" * 26 + b"\r\nF\r\n" + b"y" * 15 + b"\r\n0\r\n\r\n",
    "lower case": b"1a\r\n" + b"x" * 26 + b"\r\nf\r\n" + b"y" * 15 + b"\r\n0\r\n\r\n",
    "one byte at a time": b"1\r\nd\r\n1\r\na\r\n1\r\n\n\r\n000\r\n\r\n",
    "zeros in front": b"005\r\nhello\r\n00000000000001a\r\n" + b"z" * 26 + b"\r\n000000000000000\r\n\r\n",
    "extensions": b"5;a=b\r\nhello\r\n6 ; q=\"x;y\"\r\n world\r\n0;last\r\n\r\n",
    "white space": b"5 \r\nhello\r\n5\t \r\nworld\r\n0 \r\n\r\n",
    "trailers": b"5\r\nhello\r\n0\r\nX-A: 1\r\nX-B: 0\r\n\r\n",
    "framing in the payload": chunk(b"\r\n0\r\n\r\n") + chunk(b"5\r\n") + chunk(b"\r") + chunk(b"\n") + b"0\r\n\r\n",
    "a chunk of 300": chunk(b"data: " + b"t" * 292 + b"\n\n") + b"0\r\n\r\n",
}
ENDINGS = {"nothing": b"", "a request": b"GET / HTTP/1.1\r\n\r\n", "zeros": b"0\r\n\r\n", "a newline": b"\r\n"}


def feed(data: bytes, cuts: list[int]) -> tuple[bytes, int, int]:
    """Feed `data` cut at these places until the framing is done: (payload, bytes fed, bytes behind the end)."""
    framing, payload = ChunkFraming(), b""
    bounds = [0, *sorted(cuts), len(data)]
    for start, end in zip(bounds, bounds[1:]):
        payload += framing.feed(data[start:end])
        if framing.ended:
            return payload, end, framing.over
        assert framing.over == 0
    raise AssertionError("never done")


def random_message(rng: random.Random) -> bytes:
    """Chunks of all lengths and spellings, extensions and trailers."""
    parts = []
    for _ in range(rng.randrange(6)):
        data = bytes(rng.choice(b"\r\n0;a5") for _ in range(rng.choice([1, 1, 2, 3, 9, 17, 100, 5000])))
        size = rng.choice(["%x", "%X", "00%x", "%x;n=v", "%X ;n", "%x\t"]) % len(data)
        parts.append(size.encode() + b"\r\n" + data + b"\r\n")
    trailers = b"".join(rng.choice([b"A: 0\r\n", b"Long: " + b"x" * 300 + b"\r\n"]) for _ in range(rng.randrange(3)))
    return b"".join(parts) + rng.choice([b"0", b"000", b"0;x"]) + b"\r\n" + trailers + b"\r\n"


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES.keys())
@pytest.mark.parametrize("behind", ENDINGS.values(), ids=ENDINGS.keys())
def test_every_split_in_two_and_single_bytes(message: bytes, behind: bytes) -> None:
    expected = read_chunks(message).payload
    data = message + behind
    for cut in range(len(data) + 1):
        payload, fed, over = feed(data, [cut])
        assert (payload, fed - over) == (expected, len(message)), cut
    payload, fed, over = feed(data, list(range(1, len(data))))
    assert (payload, fed, over) == (expected, len(message), 0)


@pytest.mark.parametrize("seed", range(40))
def test_any_split_of_any_message(seed: int) -> None:
    rng = random.Random(seed)
    message = random_message(rng)
    data = message + rng.choice(list(ENDINGS.values()))
    expected = read_chunks(message)
    assert (expected.at, expected.behind) == ("done", 0)
    for _ in range(20):
        cuts = [rng.randrange(len(data) + 1) for _ in range(rng.choice([1, 3, 10, 200]))]    # equal ones: empty pieces
        payload, fed, over = feed(data, cuts)
        assert (payload, fed - over) == (expected.payload, len(message)), cuts


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES.keys())
def test_a_message_is_not_done_before_its_last_byte(message: bytes) -> None:
    for length in range(len(message)):
        framing = ChunkFraming()
        framing.feed(message[:length])
        assert framing.over == 0
        assert not framing.ended, message[:length]


MALFORMED = {
    "no size": b"\r\nhello\r\n",
    "not hexadecimal": b"g\r\nhello\r\n",
    "0x": b"0x5\r\nhello\r\n",
    "minus": b"-5\r\nhello\r\n",
    "plus": b"+5\r\nhello\r\n",
    "underscore": b"1_0\r\n" + b"x" * 16 + b"\r\n",
    "space in front": b" 5\r\nhello\r\n",
    "space within": b"5 5\r\nhello\r\n",
    "16 digits": b"0000000000000005\r\nhello\r\n",
    "more than any memory": b"ffffffffffffffff\r\nhello\r\n",
    "only an extension": b";a=b\r\nhello\r\n",
    "bare LF": b"5\nhello\n0\n\n\r\n",
    "bare CR": b"5\rhello\r\n",
    "two CRs": b"5\r\r\nhello\r\n",
    "NUL in an extension": b"5;\0\r\nhello\r\n",
    "LF in an extension": b"5;a\nb\r\nhello\r\n",
    "the payload is longer": b"5\r\nhello!\r\n0\r\n\r\n",
    "the payload is shorter": b"5\r\nhell\r\n0\r\n\r\n",
    "LF behind the payload": b"5\r\nhello\n0\r\n\r\n",
    "CR and no LF behind the payload": b"5\r\nhello\rX0\r\n\r\n",
    "the second chunk": b"5\r\nhello\r\nworld\r\n",
    "a long size line that ends": b"5;" + b"x" * 1200 + b"\r\nhello\r\n",
    "a size line without end": b"5;" + b"x" * 70_000,
    "a trailer without a colon": b"0\r\nX-A 1\r\n\r\n",
    "a trailer without a name": b"0\r\n: 1\r\n\r\n",
    "a folded trailer": b"0\r\nX-A: 1\r\n 2\r\n\r\n",
    "a trailer that ends in a bare LF": b"0\r\nX-A: 1\n\r\n",
    "a bare LF for the empty line": b"0\r\n\n",
    "a bare CR in a trailer": b"0\r\nX-A: 1\rX-B: 2\r\n\r\n",
    "a bare CR for the empty line": b"0\r\n\rX: 1\r\n\r\n",
    "NUL in a trailer": b"0\r\nX-A: \0\r\n\r\n",
    "129 trailers": b"0\r\n" + b"X: 1\r\n" * 129 + b"\r\n",
    "a control byte in an extension": b"5;\x1b\r\nhello\r\n",
    "a trailer without end": b"0\r\nX: " + b"x" * 70_000,
}


@pytest.mark.parametrize("message", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_framing_is_refused_however_it_is_split(message: bytes) -> None:
    def refused(cuts: list[int]) -> bool:
        try:
            feed(message, cuts)
        except ValueError:
            return True
        return False
    assert refused([])
    assert refused(list(range(1, min(len(message), 2000))))
    assert all(refused([cut]) for cut in range(min(len(message), 40)))


@pytest.mark.parametrize(("good", "bad"), [
    (b"5\r\nhello\r\n", b"zz\r\n"),
    (b"5\r\nhello\r\n1", b"zz\r\n"),
    (b"5\r\nhello\r\n1", b"\nx\r\n"),
    (b"5\r\nhel", b"loX"),
    (b"5\r\nhel", b"loXX"),
    (b"5\r\nhel", b"lo\r\nzz\r\n"),
    (b"5\r\nhel", b"lo\r\n3\r\nabc\r\n-\r\n"),
    (b"5\r\nhello\r", b"X"),
    (b"5\r\nhello\r", b"\nzz\r\n"),
    (b"5\r\nhello\r\n3\r\na", b"bcX"),
    (b"5\r\nhello\r\n0\r\nA: 1", b"x" * 2000),
])
def test_bytes_that_were_refused_do_not_count(good: bytes, bad: bytes) -> None:
    """What is refused is not passed on either, so the last words must fit behind what was taken before it."""
    framing = ChunkFraming()
    framing.feed(good)
    with pytest.raises(ValueError):
        framing.feed(bad)


# ---- our own errors


def test_errors_have_the_shape_of_openai() -> None:
    assert llmstack.error_json("a “b”\n", "kind", 429).decode() == (
        '{"error": {"message": "a “b”\\n", "type": "kind", "param": null, "code": 429}}')
    event = llmstack.error_event("line\nline")
    assert event.startswith(b'data: {"error": {"message": "line\\nline", "type": "upstream_error"')
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2, "one line of data"


# ---- who may ask

LOOPBACK = ["localhost", "LOCALHOST", "localhost.", "localhost:10101", "LocalHost:1", "app.localhost", "a.b-c.localhost:80",
            "127.0.0.1", "127.0.0.1:10101", "127.255.1.2", "127.0.0.1.", "[::1]", "[::1]:10101"]
ELSEWHERE = ["", "example.com", "localhost.example.com", "127.0.0.1.example.com", "127.0.0.1.nip.io", "notlocalhost",
             "localhost@example.com", "127.0.0.1@example.com", "example.com#localhost", "example.com/localhost", "localhost/x",
             "example.com:127", "10.0.0.1", "192.168.1.1:10101", "0.0.0.0", "0.0.0.0:10101", "128.0.0.1", "1127.0.0.1", "127.0.0",
             "127.0.0.1:", "127.0.0.1:abc", "127.0.0.1:80:80", "127.0.0.1:123456", "127.0.0.1, example.com", "127.0.0.\xb2",
             "[::]", "[::1", "::2", "[::2]:80", "[fe80::1]", "[::1]example.com", "[::1].example.com", "null", "local host"]


@pytest.mark.parametrize("host", LOOPBACK)
def test_hosts_that_mean_this_machine(host: str) -> None:
    assert llmstack.is_loopback(host)


@pytest.mark.parametrize("host", ELSEWHERE)
def test_hosts_that_could_mean_another(host: str) -> None:
    assert not llmstack.is_loopback(host)


def why_refused(loopback: bool, host: str = "127.0.0.1:10101", origin: Optional[str] = None, site: str = "") -> str:
    lines = [f"Host: {host}"]
    if origin is not None:
        lines.append(f"Origin: {origin}")
    if site:
        lines.append(f"Sec-Fetch-Site: {site}")
    return llmstack.refusal(request(*lines), loopback)


@pytest.mark.parametrize("host", [h for h in ELSEWHERE if h])
def test_a_page_that_rebinds_its_name_is_refused(host: str) -> None:
    assert why_refused(True, host).startswith("Host ")
    assert not why_refused(False, host), "another machine's name is what a router beyond loopback is asked by"


@pytest.mark.parametrize(("origin", "allowed"), [
    ("http://localhost", True), ("http://localhost:3000", True), ("https://127.0.0.1:8443", True), ("http://[::1]:5173", True),
    ("null", False), ("https://evil.example", False), ("http://127.0.0.1.evil.example", False), ("http://localhost.evil", False),
    ("http://localhost@evil.example", False), ("http://evil.example:10101", False), ("file://", False), ("http://0.0.0.0", False),
    ("chrome-extension://abcdef", False), ("http://192.168.1.5", False), ("http://evil.example://localhost", False),
])
def test_which_pages_may_ask_on_loopback(origin: str, allowed: bool) -> None:
    assert (why_refused(True, origin=origin) == "") is allowed
    assert (why_refused(True, origin=origin, site="cross-site") == "") is allowed


@pytest.mark.parametrize(("origin", "allowed"), [
    ("http://box.lan:10101", True), ("https://box.lan:10101", True), ("http://localhost:3000", True),
    ("http://box.lan", False), ("http://box.lan:1", False), ("https://evil.example", False), ("null", False),
])
def test_which_pages_may_ask_beyond_loopback(origin: str, allowed: bool) -> None:
    assert (why_refused(False, "box.lan:10101", origin) == "") is allowed


@pytest.mark.parametrize(("site", "allowed"), [
    ("", True), ("none", True), ("same-origin", True), ("same-site", True), ("cross-site", False), ("Cross-Site", False),
])
def test_pages_that_send_no_origin_give_themselves_away(site: str, allowed: bool) -> None:
    assert (why_refused(True, site=site) == "") is allowed
    assert why_refused(False, site=site) == ""


def test_programs_send_none_of_these() -> None:
    assert why_refused(True) == ""
    assert llmstack.refusal(request(minor=0), True) == "", "HTTP/1.0 without a Host: no browser"
