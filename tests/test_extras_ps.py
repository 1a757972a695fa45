"""extras/ps.py: the requests of now, whatever the router says of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

import llmstack
from tests.scripted import ScriptedUpstream, always, answer

ROW = {
    "id": "r1",
    "conversation": "0a1b",
    "model": "auto",
    "tier": "code-fast",
    "stage": "reading",
    "since_s": 14.2,
    "stream": True,
}


def ask(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, said: bytes, *words: str
) -> tuple[int, str, str]:
    with ScriptedUpstream(always(said)) as upstream:
        router = llmstack.Upstream("127.0.0.1", upstream.port)
        monkeypatch.setattr(llmstack, "running_router", lambda places: (router, llmstack.Config()))
        code = llmstack.main(["ps", *words])
        assert {message.target for message in upstream.requests} == {"/llmstack/requests"}
    out, err = capsys.readouterr()
    return code, out, err


def rows(*values: Any) -> bytes:
    return answer(json.dumps({"requests": values}).encode())


def test_a_request_is_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        ask(capsys, monkeypatch, rows(ROW))[1]
        == """\
id  conversation  model  tier       stage    since
r1  0a1b          auto   code-fast  reading  14 s
"""
    )


def test_a_column_that_nothing_fills_is_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = {"id": 3, "stage": "queued behind code-smart"}
    assert ask(capsys, monkeypatch, rows(bare))[1].splitlines() == [
        "id  stage", "3   queued behind code-smart"]


def test_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(ask(capsys, monkeypatch, rows(ROW), "--json")[1]) == [ROW]
    assert json.loads(
        ask(capsys, monkeypatch, answer(json.dumps([ROW]).encode()), "--json")[1]
    ) == [ROW]


def test_nothing_to_show(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(capsys, monkeypatch, rows()) == (0, "Nothing is being answered.\n", "")


def test_what_a_router_should_not_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = ask(
        capsys,
        monkeypatch,
        rows(7, {"id": "\x1b[2J", "since_s": "x", "tier": ["y"] * 99}, {"since_s": 1e300}),
    )
    assert code == 0
    assert "\x1b" not in out
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (answer(b"{}", "404 Not Found"), "this router does not tell what it is doing"),
        (answer(b"{}", "401 Unauthorized"), "the router wants its key"),
        (answer(b"{}"), "no answer from http"),
        (answer(b"nonsense"), "no answer from http"),
        (answer(b"{}", "500 Oops"), "no answer from http"),
        (b"", "no answer from http"),
    ],
)
def test_no_answer_is_two_lines(
    said: bytes, what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = ask(capsys, monkeypatch, said)
    assert (code, out) == (1, "")
    assert err.splitlines()[0].startswith("llmstack: error: " + what)
    assert len(err.splitlines()) == 2
