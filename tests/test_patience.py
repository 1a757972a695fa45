"""A tiny request does not wait for a busy tier while another has nothing to do."""

from __future__ import annotations

from typing import Any

import pytest

import llmstack
from tests import test_router
from tests.scripted import Connection
from tests.test_router import (  # noqa: F401
    CONFIG,
    OK,
    Rig,
    Start,
    chat,
    nothing_left_behind,
    start,
)

LOCAL = CONFIG._replace(tiers=CONFIG.tiers[:2])             # code-fast and code-smart
LOADED = {"models": {"code-fast": {"state": "loaded"}, "code-smart": {"state": "loaded"}}}
LONG = "a long prompt " * 400


def prepare(start: Start, monkeypatch: pytest.MonkeyPatch, patience_s: float,  # noqa: F811
            watched: Any = None) -> Rig:
    monkeypatch.setattr(test_router, "CONFIG", LOCAL._replace(patience_s=patience_s))
    rig = start()
    monkeypatch.setattr(rig.app.behind, "watched", lambda: watched or LOADED)
    return rig


def occupy(rig: Rig) -> Connection:
    """A request that code-smart is busy with; its connection at the upstream."""
    rig.client().send(chat("code-smart", text=LONG))
    up: Connection = rig.upstream.next()
    up.read()
    return up


def test_a_tiny_request_goes_past_a_busy_tier(start: Start,  # noqa: F811
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    rig = prepare(start, monkeypatch, 0.01)
    busy = occupy(rig)
    client = rig.client()
    client.send(chat("auto"))
    first = rig.upstream.next()
    assert first.read().json["model"] == "code-smart"
    second = rig.upstream.next()                # the first has said nothing for so long
    assert second.read().json["model"] == "code-fast"
    second.send(OK)
    got = client.read_message("POST")
    assert got.header("x-llmstack-model") == "code-fast"
    assert "code-smart\u2192code-fast" in got.header("x-llmstack-fallback")
    busy.send(OK)
    assert rig.app._breaker.down() == {}, "it is busy, not broken"


@pytest.mark.parametrize(("patience_s", "text", "watched"), [
    (0.0, "hello", LOADED),
    (0.01, LONG, LOADED),
    (0.01, "hello", {"models": {"code-smart": {"state": "loaded"}}}),
])
def test_others_wait_for_their_turn(start: Start, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
                                    patience_s: float, text: str, watched: Any) -> None:
    rig = prepare(start, monkeypatch, patience_s, watched)
    busy = occupy(rig)
    client = rig.client()
    client.send(chat("auto", text=text))
    up = rig.upstream.next()
    up.read()
    busy.send(OK)
    up.send(OK)
    assert client.read_message("POST").header("x-llmstack-model") == "code-smart"


def test_an_idle_tier_is_asked_without_haste(start: Start,  # noqa: F811
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    rig = prepare(start, monkeypatch, 0.01)
    assert rig.app._idle_beside(LOCAL.ladder) == []
    assert llmstack.Config().patience_s == 0


class Still:
    """A client that waits, and does nothing else."""

    @staticmethod
    def gone() -> bool:
        return False


class Queued(llmstack.Lease):
    """A place that never becomes ready."""

    ended = False

    def ready(self) -> bool:
        return False

    def end(self) -> None:
        self.ended = True


def test_a_load_or_a_queue_is_waited_for_no_longer() -> None:
    client: Any = Still()
    asked: Any = None
    lease = Queued()
    waiting = llmstack.Waiting(client, "/v1/chat/completions", False, lease.stage)
    outcome = llmstack.ask_lease(client, asked, lease, "/x", [], llmstack.Terms(patience_s=1e-9),
                                 waiting)
    assert (outcome.state, outcome.detail) == ("unreachable", "busy")
    assert lease.ended
