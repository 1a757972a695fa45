"""EVENTS: the stream, the snapshot, /metrics, and who may change something, over a real router."""

# ruff: noqa: F811  # a fixture that is imported is a parameter, too

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llmstack
from tests.scripted import Message, always, answer, wait
from tests.test_router import CONFIG, EVENTS, SSE, Client, Rig, Start, chat, request, start  # noqa: F401

SECRET = "xyzzy-of-the-prompt"
SAID = b'{"choices":[],"usage":{"prompt_tokens":1200,"completion_tokens":40},"timings":{"prompt_n":200,' \
       b'"cache_n":1000,"predicted_n":40,"predicted_per_second":81.25}}'
PAGE = "http://127.0.0.1:10101"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack.Events, "EVERY_S", 0.01)       # the suite's time, not its outcome


class Listener:
    """A client of the event stream, and what it knows."""

    def __init__(self, rig: Rig, *lines: str) -> None:
        self.client: Client = rig.client()
        self.client.send(request("GET", "/llmstack/events", *lines))
        self.head = self.client.read_head()
        self.now: dict[str, Any] = {}
        self.last_id = ""
        self.raw = b""

    def next(self) -> tuple[str, dict[str, Any]]:
        """The next event: (kind, data); comments are passed over."""
        while True:
            block = self.client.read_chunk()
            self.raw += block
            found = re.fullmatch(rb"id: (\S+)\nevent: (\w+)\ndata: (.*)\n\n", block, re.DOTALL)
            if found is None:
                assert block == b":\n\n"
                continue
            self.last_id = found.group(1).decode()
            data: dict[str, Any] = json.loads(found.group(3))
            self.now.update(data)
            return found.group(2).decode(), data

    def until(self, key: str, true: Any) -> Any:
        """What the stream says of `key`, once that is true of it."""
        while not true(self.now.get(key)):
            self.next()
        return self.now[key]


@contextlib.contextmanager
def waiting_upstream(start: Start) -> Iterator[tuple[Rig, Client]]:
    """A router with one stream under way."""
    import threading
    go_on = threading.Event()

    def script(connection: Any) -> None:
        connection.read()
        connection.send(SSE + b"Connection: close\r\n\r\n" + EVENTS[0])
        wait(go_on)
        connection.send(*EVENTS[1:])

    rig = start(script)
    client = rig.client()
    client.send(chat("code-fast", stream=True, text=SECRET))
    assert client.read_head().status == 200
    try:
        yield rig, client
    finally:
        go_on.set()


def noted(rig: Rig, count: int) -> None:
    """Wait until so many requests are counted: that is done behind their answers."""
    while len(rig.app.events.snapshot()["decisions"]) < count:
        time.sleep(0.001)


def test_first_everything_then_what_changes(start: Start) -> None:
    rig = start(always(answer(SAID)))
    assert rig.ask(chat("auto", text=SECRET)).status == 200
    noted(rig, 1)
    heard = Listener(rig)
    assert heard.head.header("content-type") == "text/event-stream"
    kind, data = heard.next()
    assert kind == "snapshot"
    assert {"about", "tiers", "memory", "requests", "decisions", "points", "now"} <= set(data)
    assert [t["name"] for t in data["tiers"]] == ["code-fast", "code-smart", "code-ultra", "plan"]
    row = data["decisions"][-1]
    assert (row["truth"], row["cached"], row["output"], row["per_s"]) == (1200, 1000, 40, 81.2)
    assert row["reason"]
    assert rig.ask(chat("code-fast")).status == 200
    heard.until("decisions", lambda rows: rows[0]["rung"] == "explicit")
    assert SECRET.encode() not in heard.raw


def test_a_request_shows_with_its_stage_and_goes(start: Start) -> None:
    with waiting_upstream(start) as (rig, client):
        heard = Listener(rig)
        # Its client has the first words a moment before the row says so.
        rows = heard.until("requests", lambda rows: rows and rows[0]["stage"] == "writing")
        assert [(r["tier"], r["stream"]) for r in rows] == [("code-fast", True)]
        quiet = heard.now
        assert rig.client().ask(request("GET", "/llmstack/requests")).json["requests"][0]["id"] == rows[0]["id"]
        assert heard.now is quiet
        client.close()
        heard.until("requests", lambda rows: rows == [])
        assert SECRET.encode() not in heard.raw
    while 'tier="code-fast",rung="explicit",outcome="left"} 1\n' not in rig.ask(request("GET", "/metrics")).body.decode():
        time.sleep(0.001)


def test_a_listener_that_comes_again_gets_what_it_missed(start: Start) -> None:
    rig = start(always(answer(SAID)))
    rig.ask(chat("code-fast"))
    first = Listener(rig)
    first.until("decisions", bool)
    first.client.close()
    rig.ask(chat("plan"))
    noted(rig, 2)
    again = Listener(rig, f"Last-Event-ID: {first.last_id}")
    _, data = again.next()
    assert [row["tier"] for row in data["decisions"]] == ["plan"]
    for other in ("elsewhere-1", "x", first.last_id + "x", first.last_id.split("-")[0] + "-" + "9" * 99):
        _, data = Listener(rig, f"Last-Event-ID: {other}").next()
        assert [row["tier"] for row in data["decisions"]] == ["code-fast", "plan"]


def test_a_quiet_stream_has_a_heartbeat(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack.Events, "HEARTBEAT_S", 0.0)
    heard = Listener(start())
    heard.next()
    assert heard.client.read_chunk() == b":\n\n"


def test_listeners_are_bounded_and_their_places_come_back(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "MAX_LISTENERS", 2)
    rig = start()
    both = [Listener(rig), Listener(rig)]
    for heard in both:
        heard.next()
    assert Listener(rig).head.status == 503
    both[0].client.close()
    while Listener(rig).head.status != 200:
        pass


def test_a_snapshot_is_made_only_for_those_who_look(start: Start) -> None:
    rig = start(always(answer(SAID)))
    asked: list[int] = []

    def tell() -> dict[str, Any]:
        asked.append(1)
        return {}

    rig.app.events.sources.append(tell)
    for _ in range(3):
        rig.ask(chat("auto"))
    assert not asked
    while rig.app.requests()["requests"]:
        time.sleep(0.001)
    assert rig.ask(request("GET", "/llmstack/snapshot")).json["decisions"]
    assert asked


# ---- /metrics


SAMPLE = re.compile(r'([a-z_]+)(?:\{([a-z_]+="[^"\\\n]*"(?:,[a-z_]+="[^"\\\n]*")*)\})? (\S+)')


def test_metrics_are_prometheus_text(start: Start) -> None:
    rig = start(always(answer(SAID)))
    for _ in range(2):
        rig.ask(chat("auto", text=SECRET))
    rig.ask(chat("code-fast"))
    noted(rig, 3)
    got = rig.ask(request("GET", "/metrics"))
    assert got.header("content-type") == "text/plain; version=0.0.4; charset=utf-8"
    samples: dict[str, float] = {}
    families: dict[str, str] = {}
    for line in got.body.decode().removesuffix("\n").split("\n"):
        if line.startswith("#"):
            _, what, name, rest = line.split(" ", 3)
            if what == "TYPE":
                assert name not in families
                families[name] = rest
            continue
        found = SAMPLE.fullmatch(line)
        assert found, line
        family = re.sub("_(bucket|sum|count)$", "", found.group(1))
        assert families.get(found.group(1)) or families[family] == "histogram"
        samples[line.rpartition(" ")[0]] = float(found.group(3))
    assert families.keys() == llmstack.METRICS.keys()
    assert samples['llmstack_requests_total{tier="code-fast",rung="explicit",outcome="done"}'] == 1
    assert samples['llmstack_tokens_total{tier="code-fast",kind="cached"}'] == 1000
    assert samples["llmstack_wait_seconds_count"] == 3
    assert samples['llmstack_first_byte_seconds_bucket{le="+Inf"}'] == 3
    assert samples["llmstack_fallbacks_total"] == 0
    assert samples["llmstack_connections"] >= 1
    assert SECRET not in got.body.decode()


def test_a_fallback_and_a_failure_are_counted(start: Start) -> None:
    rig = start(always(answer(b'{"error":{"message":"no"}}', "503 No")))
    rig.ask(chat("auto"))
    noted(rig, 1)
    text = rig.ask(request("GET", "/metrics")).body.decode()
    assert 'outcome="rejected"} 1\n' in text or 'outcome="done"} 1\n' in text
    assert re.search(r"llmstack_fallbacks_total [1-9]", text)


def test_metrics_of_a_model_are_its_own(start: Start) -> None:
    rig = start(always(answer(b"of the model")))
    assert rig.ask(request("GET", "/metrics?model=plan")).body == b"of the model"


# ---- changing something


def test_a_request_is_stopped(start: Start) -> None:
    with waiting_upstream(start) as (rig, client):
        number = rig.ask(request("GET", "/llmstack/requests")).json["requests"][0]["id"]
        stop = f"/llmstack/requests/{number}/stop"
        assert rig.ask(request("POST", stop, "X-LLMStack: 1", body=b"{}")).json == {"ok": True}
        client.rest()
        while rig.ask(request("GET", "/llmstack/requests")).json["requests"]:
            pass
        assert rig.ask(request("POST", stop, "X-LLMStack: 1", body=b"{}")).status == 404


def test_load_and_unload_are_asked_of_what_is_behind(start: Start) -> None:
    rig = start(always(answer(b"OK")))
    for verb, asked in (("load", "GET /upstream/plan/health HTTP/1.1"),
                        ("unload", "POST /api/models/unload/plan HTTP/1.1")):
        got = rig.ask(request("POST", f"/llmstack/{verb}/plan", "X-LLMStack: 1"))
        assert got.status == 200
        assert rig.upstream.requests[-1].start.decode() == asked
    assert rig.ask(request("POST", "/llmstack/load/nobody", "X-LLMStack: 1")).status == 404
    assert rig.ask(request("POST", "/llmstack/load/code-ultra", "X-LLMStack: 1")).status == 400


@pytest.mark.parametrize(("lines", "status"), [
    ((), 403),
    (("Origin: null",), 403),
    (("Origin: https://evil.example", "X-LLMStack: 1"), 403),
    (("Origin: http://localhost:3000", "X-LLMStack: 1"), 403),
    (("Sec-Fetch-Site: cross-site", "X-LLMStack: 1"), 403),
    (("Host: evil.example", "X-LLMStack: 1"), 403),
    ((f"Origin: {PAGE}",), 200),
    (("X-LLMStack: 1",), 200),
])
@pytest.mark.parametrize("path", ["/llmstack/load/plan", "/llmstack/unload/plan"])
def test_no_page_but_ours_changes_anything(start: Start, path: str, lines: tuple[str, ...], status: int) -> None:
    rig = start(always(answer(b"OK")))
    form = "Content-Type: application/x-www-form-urlencoded"
    assert rig.ask(request("POST", path, form, *lines, body=b"a=b")).status == status
    assert len(rig.upstream.requests) == (status == 200)


@pytest.mark.parametrize("path", ["/llmstack/events", "/llmstack/snapshot", "/metrics"])
def test_what_is_seen_wants_the_key_and_no_strange_page(start: Start, path: str) -> None:
    rig = start(key="sesame")
    assert rig.ask(request("GET", path)).status == 401
    assert rig.ask(request("GET", path, "Authorization: Bearer sesame", "Origin: https://evil.example")).status == 403
    got = opened(rig, request("GET", path, "Authorization: Bearer sesame"))
    assert got.status == 200


def opened(rig: Rig, asked: bytes) -> Message:
    client = rig.client()
    client.send(asked)
    return client.read_head()


# ---- following it from a terminal


def test_a_terminal_follows_the_same_stream(start: Start) -> None:
    rig = start(always(answer(SAID)))
    upstream = llmstack.Upstream("127.0.0.1", rig.port)
    with contextlib.closing(llmstack.load_extra("watch").follow_events(upstream, llmstack)) as snapshots:
        assert next(t["name"] for t in next(snapshots)["tiers"]) == "code-fast"
        rig.ask(chat("plan"))
        now = next(s for s in snapshots if s["decisions"])
        lines = llmstack.render_snapshot(now, "http://x", 100, now["now"], lambda text, code: text)
        assert lines[-1].startswith("last  plan, 1,200 tokens (1,000 cached), ")


@pytest.mark.parametrize("reply", [
    answer(b"{}"), answer(b"{}", "401 No"), b"", b"x" * 70_000,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
], ids=range(6))
def test_a_stream_that_is_none_ends_in_words(start: Start, reply: bytes) -> None:
    def script(connection: Any) -> None:
        connection.read()
        connection.send(reply)

    rig = start(script)
    upstream = llmstack.Upstream("127.0.0.1", rig.upstream.port)
    with pytest.raises((OSError, ValueError)):
        list(llmstack.load_extra("watch").follow_events(upstream, llmstack))


def test_the_board_asks_for_what_there_is() -> None:
    board = json.loads((Path(llmstack.__file__).parent / "docs/grafana.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {re.sub("_bucket$", "", name) for expression in asked for name in re.findall("llmstack_[a-z_]+", expression)}
    assert named <= llmstack.METRICS.keys()
    assert llmstack.METRICS.keys() - named <= {"llmstack_tier_loaded"}
    for expression in asked:
        for name, labels in re.findall(r"(llmstack_[a-z_]+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)[=!]", labels)) <= set(llmstack.METRICS[name].labels)


def test_an_edited_models_ini_is_seen_until_it_is_read_again(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "models.ini"
    path.write_text("[a]\n")
    now = [CONFIG]
    rig = start(models_ini=str(path), reload=lambda: now[0])

    def changed() -> bool:
        rig.app.events._asked_s = -1e9
        about: dict[str, Any] = rig.ask(request("GET", "/llmstack/snapshot")).json["about"]
        return bool(about["changed"])

    assert not changed()
    path.write_text("[a]\nrole = fast\n")
    assert changed()
    assert rig.app.reload() == ""
    assert not changed(), "only routing has changed, and that is read"
    now[0] = CONFIG._replace(tiers=CONFIG.tiers[:2])
    assert rig.app.reload() == ""
    assert changed(), "its tiers take a restart"
