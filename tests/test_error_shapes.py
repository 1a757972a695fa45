"""Errors in the shape of the protocol that was asked, whoever says them."""

from __future__ import annotations

import json

import pytest

from tests.scripted import Connection, always, answer
from tests.test_router import (  # noqa: F401
    HELLO,
    SSE_CHUNKED,
    Start,
    chunk,
    nothing_left_behind,
    post,
    start,
)

ASKED = {"model": "code-fast", "messages": HELLO, "input": "hello"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_an_error_that_comes_before_the_body_is_read(start: Start, path: str) -> None:  # noqa: F811
    rig = start(always(answer()), loopback=False, key="sesame")
    got = rig.ask(post(ASKED, target=path))
    assert got.status == 401
    assert "LLMSTACK_API_KEY" in got.json["error"]["message"]
    assert ("type" in got.json) is (path == "/v1/messages")
    assert got.json["error"]["type"] == "authentication_error"


def broken(up: Connection) -> None:
    up.read()
    up.send(SSE_CHUNKED, chunk(b'event: x\ndata: {"type":"x"}\n\n'))
    up.close()


def events(body: bytes) -> list[tuple[str, dict[str, object]]]:
    found = []
    for block in body.decode().replace("\r\n", "\n").split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "data" in lines:
            found.append((lines.get("event", ""), json.loads(lines["data"])))
    return found


def test_a_broken_stream_of_responses_ends_as_its_clients_know_it(start: Start) -> None:  # noqa: F811
    rig = start(broken)
    got = rig.ask(post({**ASKED, "stream": True}, target="/v1/responses"))
    (_, _), (error, two), (failed, one) = events(got.body)
    assert (failed, error) == ("response.failed", "error")
    assert one["type"] == "response.failed"
    response = one["response"]
    assert isinstance(response, dict)
    assert response["status"] == "failed"
    assert "model's server failed" in response["error"]["message"]
    assert isinstance(two["error"], dict)
    assert two["message"] == two["error"]["message"] == response["error"]["message"]


def test_a_broken_stream_of_messages_ends_with_anthropics_error(start: Start) -> None:  # noqa: F811
    rig = start(broken)
    got = rig.ask(post({**ASKED, "stream": True}, target="/v1/messages"))
    name, said = events(got.body)[-1]
    assert (name, said["type"]) == ("error", "error")
    assert isinstance(said["error"], dict)
    assert said["error"]["type"] == "api_error"
