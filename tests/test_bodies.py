"""Bodies as clients send them: packed, in forms, with a mark in front; and HTTP/1.0's connections."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest

import llmstack
from tests.scripted import always, answer
from tests.test_router import (  # noqa: F401
    CHAT,
    HELLO,
    OK,
    Start,
    error_of,
    nothing_left_behind,
    post,
    request,
    start,
)

BODY = json.dumps({"model": "auto", "messages": HELLO}).encode()


def deflated(body: bytes) -> bytes:
    return zlib.compress(body)


@pytest.mark.parametrize(("coding", "pack"), [
    ("gzip", gzip.compress), ("X-GZIP", gzip.compress), ("deflate", deflated),
    ("identity", bytes), ("", bytes), ("gzip, identity", gzip.compress),
    ("deflate, gzip", lambda b: gzip.compress(deflated(b), mtime=0)),
])
def test_a_packed_body_is_decided_as_any(start: Start, coding: str, pack) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    rig = start(always(OK))
    got = rig.ask(post(pack(BODY), f"Content-Encoding: {coding}"))
    assert (got.status, got.header("x-llmstack-model")) == (200, "code-ultra")
    seen = rig.upstream.requests[0]
    assert seen.json == {"model": "code-ultra", "messages": HELLO}
    assert seen.all("content-encoding") == []


def test_zstd_is_read_where_python_can() -> None:
    zstd = pytest.importorskip("compression.zstd", reason="Python 3.14 has it")
    assert llmstack.decoded_body("zstd", zstd.compress(BODY)) == BODY


@pytest.mark.parametrize(("coding", "body", "status", "says"), [
    ("br", b"x", 415, "gzip, deflate and identity are"),
    ("gzip", b"not packed", 400, "the body is not gzip"),
    ("gzip", gzip.compress(BODY, mtime=0)[:-9], 400, "not one whole gzip stream"),
    ("gzip", gzip.compress(BODY, mtime=0) + b"more", 400, "not one whole gzip stream"),
])
def test_a_packed_body_that_cannot_be_read(start: Start, coding: str, body: bytes,  # noqa: F811
                                           status: int, says: str) -> None:
    rig = start(always(OK))
    got = rig.ask(post(body, f"Content-Encoding: {coding}"))
    assert got.status == status
    assert says in error_of(got)["message"]
    assert rig.upstream.requests == []


@pytest.mark.parametrize("coding", ["gzip", "gzip, gzip"])
def test_a_bomb_is_no_larger_than_any_body(start: Start, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
                                           coding: str) -> None:
    monkeypatch.setattr(llmstack, "MAX_BODY_BYTES", 1 << 20)
    body = gzip.compress(bytes(1 << 24), mtime=0)
    if coding == "gzip, gzip":
        body = gzip.compress(body, mtime=0)
    rig = start(always(OK))
    assert rig.ask(post(body, f"Content-Encoding: {coding}")).status == 413
    assert rig.upstream.requests == []


def test_a_mark_before_json_is_taken_off(start: Start) -> None:  # noqa: F811
    rig = start(always(OK))
    assert rig.ask(post(b"\xef\xbb\xbf" + BODY)).status == 200
    assert rig.upstream.requests[0].json["model"] == "code-ultra"


# ---- forms and queries


def form(model: str, boundary: str = "b0und") -> bytes:
    parts = [
        'Content-Disposition: form-data; name="file"; filename="model"\r\n\r\n\x00\xff--b0un\r\n',
        f'content-disposition: form-data; name="model"\r\n\r\n{model}',
        'Content-Disposition: form-data; name="language"\r\n\r\nde'] if model else [
        'Content-Disposition: form-data; name="file"\r\n\r\nx']
    text = "".join(f"--{boundary}\r\n{part}\r\n" for part in parts) + f"--{boundary}--\r\n"
    return text.encode("latin-1")


def upload(body: bytes, kind: str = 'multipart/form-data; boundary="b0und"') -> bytes:
    return request("POST", "/v1/audio/transcriptions", f"Content-Type: {kind}", body=body)


@pytest.mark.parametrize(("asked", "sent"), [
    ("code-fast", "code-fast"), ("fast", "fast"), ("openai/CODE-FAST", "code-fast"),
    ("code-ultra", "code-ultra"), ("whisper-1", "whisper-1"), ("", ""),
])
def test_a_form_names_its_model_in_a_part(start: Start, asked: str, sent: str) -> None:  # noqa: F811
    rig = start(always(OK))
    assert rig.ask(upload(form(asked))).status == 200
    seen = rig.upstream.requests[0]
    assert seen.body == form(sent)
    assert seen.header("content-type") == 'multipart/form-data; boundary="b0und"'


@pytest.mark.parametrize("body", [b"", b"--b0und", b"--b0und\r\n\r\n", b"x" * 99,
                                  b'--b0und\r\nContent-Disposition: form-data; name="model"\r\n\r\nx'])
def test_half_a_form_names_none(body: bytes) -> None:
    assert llmstack.form_model("multipart/form-data; boundary=b0und", body) == (0, 0)


@pytest.mark.parametrize(("target", "sent"), [
    ("/props?model=code-fast", "/props?model=code-fast"),
    ("/slots?x=1&model=openai%2Fcode-smart", "/slots?x=1&model=openai%2Fcode-smart"),
])
def test_props_and_slots_of_a_named_model(start: Start, target: str, sent: str) -> None:  # noqa: F811
    rig = start(always(OK))
    assert rig.ask(request("GET", target)).status == 200
    assert rig.upstream.requests[0].target == sent


# ---- HTTP/1.0


def test_a_client_of_http_1_0_may_keep_its_connection(start: Start) -> None:  # noqa: F811
    rig = start(always(answer(b"hello")))
    client = rig.client()
    lines = "Host: 127.0.0.1\r\nConnection: keep-alive\r\n\r\n"
    for target in ("/x", "/models.ini", "/x"):
        client.send(f"GET {target} HTTP/1.0\r\n{lines}".encode())
        got = client.read_message("GET")
        assert got.header("connection") == "keep-alive"
    client.send(b"GET /x HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
    assert client.read_message("GET").header("connection") == "close"
    assert client.ended()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_root_is_answered_here(start: Start, method: str) -> None:  # noqa: F811
    rig = start(always(OK))
    assert rig.ask(request(method, "/")).status == 200
    assert rig.upstream.requests == []
