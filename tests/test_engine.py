"""The embedded engine: real child processes (fake_llama_server.py) behind the real HTTP server, and what PROCESSES promises.

Nothing here sleeps to synchronise: the children write down what happens to them, and the tests wait for that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence

import pytest

import llmstack
from tests.conftest import FIRST_PORT
from tests.noise_model import render_noise_gguf

FAKE = Path(__file__).with_name("fake_llama_server.py")
DEADLINE_S = 20.0
ROOT = Path(llmstack.__file__).parent


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """The first truth that `condition` returns."""
    end = time.monotonic() + DEADLINE_S
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"never happened: {what}"
        threading.Event().wait(0.005)


def exists(pid: int) -> bool:
    """True also for a zombie: who is not reaped still exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------
# A caller, and the stage it plays on
# ---------------------------------------------------------------------------------------------------


class Broken(Exception):
    """The connection ended before the answer did."""


class Call:
    """One HTTP connection that shows an answer's framing: comments, clean ends, broken ends."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        self.file = self.sock.makefile("rb")
        self.headers: Dict[str, str] = {}
        self.text = ""                          # of a stream, not yet split into events

    def send(self, method: str, target: str, body: object = None, minor: int = 1, host: str = "127.0.0.1") -> Call:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.sock.sendall(b"%b %b HTTP/1.%d\r\nHost: %b\r\nContent-Length: %d\r\n\r\n%b" % (
            method.encode(), target.encode(), minor, host.encode(), len(data), data))
        return self

    def chat(self, model: str, says: str = "hi", stream: bool = False, minor: int = 1) -> Call:
        body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": says}]}
        return self.send("POST", "/v1/chat/completions", body, minor)

    def silent(self) -> bool:
        """Nothing has come."""
        return not select.select([self.sock], [], [], 0)[0]

    def status(self) -> int:
        """Read the head."""
        line = self.file.readline()
        if not line:
            raise Broken
        self.headers = {}
        while True:
            name, _, value = self.file.readline().decode().partition(":")
            if not value:
                return int(line.split()[1])
            self.headers[name.lower()] = value.strip()

    def body(self) -> bytes:
        length = int(self.headers["content-length"])
        data = self.file.read(length)
        if len(data) < length:
            raise Broken
        return data

    def json(self) -> Any:
        return json.loads(self.body())

    def answer(self) -> Any:
        """(status, JSON body) of an answer that is no stream."""
        return self.status(), self.json()

    def event(self) -> str:
        """The next event or comment of a stream, "" at its clean end. Errors: Broken."""
        while not self._whole():
            if self.headers.get("transfer-encoding") != "chunked":
                line = self.file.readline()
                if not line:
                    assert not self.text.strip()
                    return ""
                self.text += line.decode()
                continue
            size = self.file.readline()
            if not size:
                raise Broken
            data = self.file.read(int(size, 16) + 2)
            if data == b"\r\n" and int(size, 16) == 0:
                assert not self.text.strip()
                return ""
            if not data.endswith(b"\r\n"):
                raise Broken
            self.text += data[:-2].decode()
        self.text = self.text.lstrip("\n")
        event, _, self.text = self.text.partition("\n" if self.text[:1] == ":" else "\n\n")
        return event

    def _whole(self) -> bool:
        """Whether an event, or a comment of one line, has come."""
        text = self.text.lstrip("\n")
        return ("\n" if text[:1] == ":" else "\n\n") in text

    def events(self) -> List[str]:
        """All that is left of a stream with a clean end."""
        found: List[str] = []
        while True:
            event = self.event()
            if not event:
                return found
            found.append(event)

    def content(self) -> str:
        """What a stream still has to say, comments left out, to its clean end."""
        return said([e for e in self.events() if not e.startswith(":")])

    def first_data(self) -> str:
        """What the first event after the comments says."""
        while True:
            event = self.event()
            if not event.startswith(":"):
                return said([event])

    def close(self) -> None:
        self.file.close()
        self.sock.close()


def said(events: List[str]) -> str:
    """The words of a chat's events; the last one has to be there or not to be there as a whole."""
    words = [json.loads(e[len("data: "):]) for e in events if e != "data: [DONE]"]
    return "".join(w["choices"][0]["delta"]["content"] for w in words) + ("." if "data: [DONE]" in events else "")


def message_of(answer: Any) -> str:
    return str(answer["error"]["message"])


class Stage:
    """An engine behind its HTTP server, and the directory in which its servers are told what to do."""

    def __init__(self, directory: Path, config: llmstack.Config, budget_gb: float, first_port: int) -> None:
        self.directory = directory
        directory.mkdir()
        self.config = config
        log = llmstack.Log(str(directory / "engine.log"), "debug")
        self.engine = llmstack.Engine(config, self.command, log, lambda name: str(directory / f"{name}.log"),
                                      llmstack.EnginePlan(os.environ, budget_gb, first_port))
        self.engine._is_here = lambda model: True       # type: ignore[method-assign]  # nothing is downloaded
        self.app = llmstack.EngineApp(self.engine, log)
        self.server = llmstack.Server("127.0.0.1", 0, self.app)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        self.calls: List[Call] = []

    def command(self, tier: llmstack.Tier, port: int) -> List[str]:
        program = [sys.executable, "-I", "-S", str(FAKE), str(self.directory)]
        return llmstack.server_command(program, tier, self.config, port, frozenset())

    def call(self) -> Call:
        self.calls.append(Call(self.server.server_port))
        return self.calls[-1]

    def ask(self, method: str, target: str, body: object = None) -> Any:
        """(status, body) of one request; JSON where it is JSON."""
        call = self.call().send(method, target, body)
        status, data = call.status(), call.body()
        return status, json.loads(data) if "json" in call.headers["content-type"] else data.decode()

    def hello(self, model: str) -> str:
        """What `model` answers to a plain chat."""
        status, answer = self.call().chat(model).answer()
        assert status == 200, answer
        return str(answer["choices"][0]["message"]["content"])

    def hold(self, model: str, what: str) -> Call:
        """A stream of `model` that has begun and goes on when `what`.go is put there."""
        call = self.call().chat(model, f"hold {what}", True)
        assert call.status() == 200
        assert call.first_data() == f"{model} says "
        self.wait_event(f"{model} held {what}")
        return call

    def put(self, name: str, text: str = "") -> None:
        whole = self.directory / f"{name}.part"
        whole.write_text(text, encoding="utf-8")
        whole.replace(self.directory / name)    # a server that looks now sees all of it

    def take(self, name: str) -> None:
        (self.directory / name).unlink()

    def log(self) -> str:
        return (self.directory / "engine.log").read_text(encoding="utf-8")

    # ---- what the servers have written down

    def happened(self) -> List[str]:
        """One line an event, whole lines only."""
        path = self.directory / "events"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return text[:text.rfind("\n") + 1].splitlines()

    def times(self, start: str) -> int:
        return sum(e == start or e.startswith(start + " ") for e in self.happened())

    def wait_event(self, start: str, times: int = 1) -> None:
        wait_for(lambda: self.times(start) >= times, f"{start} in {self.happened()}")

    def place(self, start: str, nth: int = 1) -> int:
        """Where the nth event that starts so stands among all."""
        places = [i for i, e in enumerate(self.happened()) if e == start or e.startswith(start + " ")]
        return places[nth - 1]

    def starts(self, model: str) -> List[Dict[str, Any]]:
        """Pid, port and neighbours of each start of a model's server."""
        rows = [e.split() for e in self.happened() if e.startswith(f"{model} started ")]
        return [{"pid": int(r[2]), "port": int(r[3]), "beside": r[4][len("beside="):]} for r in rows]

    def pid(self, model: str) -> int:
        pid = self.starts(model)[-1]["pid"]
        assert isinstance(pid, int)
        return pid

    # ---- what the engine says

    def states(self) -> Dict[str, str]:
        return {row["model"]: row["state"] for row in self.engine.running()}

    def wait_state(self, model: str, state: str) -> None:
        """`state` "" for one that is not running."""
        wait_for(lambda: self.states().get(model, "") == state, f"{model} {state} in {self.states()}")

    def wait_idle(self, model: str) -> None:
        """A client has its answer a moment before the engine counts its request as done."""
        wait_for(lambda: self.engine.models[model].in_flight == 0, f"the end of all requests to {model}")

    def wait_dead(self, model: str) -> None:
        process = self.engine.models[model].process
        wait_for(lambda: process.poll() is not None, f"the death of {model}'s server")

    def waiting(self) -> List[str]:
        """The models that requests wait for."""
        return [ticket.model.name for ticket in self.engine._tickets]

    def wait_blocked(self, model: str) -> None:
        """A request for `model` waits for others to become idle."""
        wait_for(lambda: any(t.model.name == model and t.blocked_by for t in list(self.engine._tickets)), f"{model} blocked")

    def close(self) -> None:
        for call in self.calls:
            call.close()
        self.server.shutdown()
        self.server.server_close()
        self.engine.close()
        self.thread.join(DEADLINE_S)


def idle_for(stage: Stage, model: str, seconds: float) -> None:
    stage.engine.models[model].last_used = time.monotonic() - seconds


OpenStage = Callable[..., Stage]


@pytest.fixture
def open_stage(tmp_path: Path, config: llmstack.Config) -> Iterator[OpenStage]:
    """Make stages: open_stage(config=..., budget_gb=..., first_port=...)."""
    stages: List[Stage] = []

    def make(config: llmstack.Config = config, budget_gb: float = 1e9, first_port: int = FIRST_PORT) -> Stage:
        config = config._replace(loading_state="comments")
        stages.append(Stage(tmp_path / f"stage{len(stages)}", config, budget_gb, first_port))
        return stages[-1]

    yield make
    for stage in stages:
        stage.close()


@pytest.fixture
def stage(open_stage: OpenStage) -> Stage:
    """The bundled models.ini's tiers and memory without end."""
    return open_stage()


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting streams are told so at once and often."""
    monkeypatch.setattr(llmstack.Waiting, "GRACE_S", 0.0)
    monkeypatch.setattr(llmstack, "WAITING_EVERY_S", 0.01)


@pytest.fixture
def taciturn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting streams are told nothing, however slow this machine is."""
    monkeypatch.setattr(llmstack.Waiting, "GRACE_S", 1e9)


# ---------------------------------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------------------------------


def test_a_model_is_started_when_it_is_first_asked_for(stage: Stage) -> None:
    assert stage.happened() == []
    assert stage.hello("code-fast") == "code-fast says hello"
    assert stage.hello("code-fast") == "code-fast says hello"
    assert len(stage.starts("code-fast")) == 1
    assert stage.starts("code-fast")[0]["port"] >= FIRST_PORT
    assert stage.states() == {"code-fast": "ready"}


def test_a_model_is_found_by_its_aliases(stage: Stage) -> None:
    for name in ("smart", "coder", "code-smart"):
        assert stage.hello(name) == "code-smart says hello"
    assert len(stage.starts("code-smart")) == 1


def test_preload_starts_the_fast_tier_and_nothing_else(stage: Stage) -> None:
    stage.engine.preload()
    stage.wait_state("code-fast", "ready")
    assert stage.states() == {"code-fast": "ready"}
    assert stage.waiting() == []
    assert [row["in_flight"] for row in stage.engine.running()] == [0]
    assert [e.split()[0] for e in stage.happened()] == ["code-fast"]


def test_a_failed_preload_is_logged_and_leaves_the_engine_up(open_stage: OpenStage) -> None:
    stage = open_stage(budget_gb=0.5)
    stage.engine.preload()
    assert "code-fast needs about 2.8 GB" in stage.log()
    assert stage.waiting() == []
    assert stage.ask("GET", "/health") == (200, "OK")


def test_health_says_ok_and_whose_process_answers(stage: Stage) -> None:
    call = stage.call().send("GET", "/health")
    assert call.status() == 200
    assert call.body() == b"OK"
    assert call.headers["x-llmstack-pid"] == str(os.getpid())


def test_v1_models_lists_tiers_and_aliases_with_their_status(stage: Stage) -> None:
    stage.hello("plan")
    status, answer = stage.ask("GET", "/v1/models")
    assert status == 200
    assert answer["object"] == "list"
    states = {m["id"]: m["status"]["value"] for m in answer["data"]}
    assert len(states) == len(answer["data"])
    names = {n for t in stage.config.tiers for n in (t.name, *t.aliases)}
    assert states == {n: "loaded" if n in ("plan", "planner", "chat", "glm") else "unloaded" for n in names}
    smart = next(m for m in answer["data"] if m["id"] == "code-smart")
    assert smart["object"] == "model"
    assert "coder" in smart["aliases"]
    assert smart["meta"]["llmstack"]["ctx_size"] == 65536


def test_running_has_the_rows_of_llama_swap(stage: Stage) -> None:
    assert stage.ask("GET", "/running") == (200, {"running": []})
    stage.hello("plan")
    (row,) = stage.ask("GET", "/running")[1]["running"]
    port = stage.starts("plan")[0]["port"]
    assert row["model"] == "plan"
    assert row["state"] == "ready"
    assert row["proxy"] == f"http://127.0.0.1:{port}"
    assert row["ttl"] == 1200
    assert f"--port {port} " in row["cmd"]
    assert row["description"] == stage.engine.models["plan"].tier.description


@pytest.mark.parametrize(("method", "target", "expected"), [
    ("GET", "/unload", "OK"), ("POST", "/unload", "OK"), ("POST", "/api/models/unload", {"msg": "ok"})])
def test_unload_stops_all_models_before_it_answers(stage: Stage, method: str, target: str, expected: object) -> None:
    stage.hello("code-fast")
    stage.hello("plan")
    pids = [stage.pid("code-fast"), stage.pid("plan")]
    assert all(map(exists, pids))
    assert stage.ask(method, target) == (200, expected)
    assert stage.states() == {}
    assert not any(map(exists, pids))           # stopped, and reaped


def test_unload_of_one_model_leaves_the_others(stage: Stage) -> None:
    stage.hello("code-fast")
    stage.hello("plan")
    assert stage.ask("POST", "/api/models/unload/chat") == (200, "OK")     # an alias of plan
    assert stage.states() == {"code-fast": "ready"}
    assert not exists(stage.pid("plan"))
    assert stage.ask("POST", "/api/models/unload/plan") == (200, "OK")     # it is not loaded: that is fine
    assert stage.hello("plan") == "plan says hello"
    assert len(stage.starts("plan")) == 2


def test_unload_cuts_a_stream_and_says_so(stage: Stage) -> None:
    held = stage.hold("plan", "one")
    assert stage.ask("POST", "/api/models/unload/plan") == (200, "OK")
    assert "server_error" in held.event()
    with pytest.raises(Broken):
        held.event()
    stage.wait_idle("plan")


def test_unload_reaches_a_model_that_is_loading(stage: Stage) -> None:
    stage.put("plan.slow")
    asking = stage.call().chat("plan")
    stage.wait_event("plan started")
    asking.close()
    wait_for(lambda: not stage.waiting(), "the client's leaving")
    assert stage.ask("POST", "/api/models/unload/plan") == (200, "OK")
    assert stage.states() == {}
    assert not exists(stage.pid("plan"))
    stage.take("plan.slow")
    assert stage.hello("plan") == "plan says hello"       # being unloaded is no failure to load


def test_unload_reaches_a_load_that_has_no_process_yet(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for another to end; what was called off must not start after all."""
    monkeypatch.setattr(llmstack, "STOP_GRACE_S", 1e9)
    stage.put("code-smart.hang")
    stage.hello("code-smart")
    hanging, plan = stage.engine.models["code-smart"].process, stage.engine.models["plan"]
    try:
        asking = stage.call().chat("plan")
        stage.wait_event("code-smart term")
        asking.close()
        wait_for(lambda: not stage.waiting(), "the client's leaving")
        unloading = stage.call().send("POST", "/unload")
        wait_for(lambda: plan.cancelled or plan.state != "starting", "the load's being called off")
    finally:
        hanging.kill()
    assert unloading.status() == 200
    assert stage.states() == {}
    assert stage.starts("plan") == []
    assert not exists(hanging.pid)
    stage.take("code-smart.hang")
    assert stage.hello("plan") == "plan says hello"


def test_unload_reaches_a_load_in_its_last_moment(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy, plan = stage.engine._healthy, stage.engine.models["plan"]
    unloading = threading.Thread(target=stage.engine.unload, args=([plan],), daemon=True)

    def late(*arguments: Any) -> bool:
        if not healthy(*arguments):
            return False
        unloading.start()
        wait_for(lambda: plan.cancelled or plan.state != "starting", "the load's being called off")
        return True

    monkeypatch.setattr(stage.engine, "_healthy", late)
    ticket = stage.engine.enqueue(plan)
    assert not stage.engine.try_enter(ticket)
    stage.engine.dequeue(ticket)                # who asked has left
    wait_for(lambda: unloading.ident, "its last moment")
    unloading.join(DEADLINE_S)
    assert not unloading.is_alive()
    assert stage.states() == {}
    assert not exists(stage.pid("plan"))


def test_a_model_that_goes_just_before_it_is_asked_is_502(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entered, and then unloaded or dead before the request is passed on: nobody's bug."""
    try_enter = stage.engine.try_enter

    def late(ticket: llmstack.Ticket) -> bool:
        entered = try_enter(ticket)
        if entered:
            stage.engine.unload([ticket.model])
        return entered

    monkeypatch.setattr(stage.engine, "try_enter", late)
    status, answer = stage.call().chat("plan").answer()
    assert status == 502
    assert "plan: its server" in message_of(answer)
    assert "Traceback" not in stage.log()


def test_unload_waits_for_what_is_stopping_already(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "STOP_GRACE_S", 0.2)
    stage.put("plan.hang")
    stage.hello("plan")
    stage.wait_idle("plan")
    idle_for(stage, "plan", 1201)
    stage.wait_event("plan term")
    assert stage.ask("POST", "/api/models/unload/plan") == (200, "OK")
    assert not exists(stage.pid("plan"))


def test_unload_of_an_unknown_model_is_404(stage: Stage) -> None:
    status, answer = stage.ask("POST", "/api/models/unload/nobody")
    assert status == 404
    assert "'nobody'" in message_of(answer)


def test_upstream_passes_path_query_and_body_on(stage: Stage) -> None:
    status, answer = stage.ask("PUT", "/upstream/smart/slots/0?action=erase&x=1", b"\x31 not JSON")
    assert status == 200
    assert answer == {"server": "code-smart", "method": "PUT", "target": "/slots/0?action=erase&x=1", "body": "1 not JSON"}
    assert stage.ask("GET", "/upstream/code-smart/health") == (200, {"status": "ok"})
    assert stage.ask("GET", "/upstream/code-smart")[1]["target"] == "/"


def test_the_model_may_stand_in_the_query(stage: Stage) -> None:
    status, answer = stage.ask("GET", "/props?model=chat&x=1")
    assert status == 200
    assert answer["server"] == "plan"
    assert answer["target"] == "/props?model=chat&x=1"


def test_the_model_in_the_body_counts_before_the_query(stage: Stage) -> None:
    assert stage.ask("POST", "/tokenize?model=plan", {"model": "code-fast"})[1]["server"] == "code-fast"
    assert stage.ask("POST", "/tokenize?model=plan", {"text": "x"})[1]["server"] == "plan"


@pytest.mark.parametrize(("method", "target", "body", "named"), [
    ("POST", "/v1/chat/completions", {"model": "gpt-9"}, "'gpt-9'"),
    ("POST", "/v1/chat/completions", {"messages": []}, "no model named"),
    ("POST", "/v1/chat/completions", [1], "no model named"),
    ("GET", "/props?model=gpt-9", None, "'gpt-9'"),
    ("GET", "/upstream/gpt-9/health", None, "'gpt-9'"),
])
def test_an_unknown_model_is_404_and_the_known_are_named(
        stage: Stage, method: str, target: str, body: object, named: str) -> None:
    call = stage.call().send(method, target, body)
    status, answer = call.answer()
    assert status == 404
    assert named in message_of(answer)
    assert "code-fast, code-smart, plan, plan-uncensored" in message_of(answer)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert call.send("GET", "/health").status() == 200      # and the connection goes on
    assert stage.happened() == []


@pytest.mark.parametrize("body", [b"{", b"\xff{}", b'{"model": "plan"', b"[" * 100_000])
def test_a_body_that_is_no_json_is_400(stage: Stage, body: bytes) -> None:
    status, answer = stage.ask("POST", "/v1/chat/completions", body)
    assert status == 400
    assert "not JSON" in message_of(answer)
    assert stage.happened() == []


def test_a_web_page_from_elsewhere_is_refused(stage: Stage) -> None:
    status, answer = stage.call().send("GET", "/unload", host="evil.example").answer()
    assert status == 403
    assert "evil.example" in message_of(answer)


# ---------------------------------------------------------------------------------------------------
# Residency
# ---------------------------------------------------------------------------------------------------


def test_a_model_is_gone_before_the_one_that_takes_its_place_starts(stage: Stage) -> None:
    stage.hello("code-fast")
    stage.hello("code-smart")
    assert stage.starts("code-smart")[0]["beside"] == "code-fast"
    stage.hello("plan")
    assert stage.starts("plan")[0]["beside"] == "code-fast"
    assert not exists(stage.pid("code-smart"))
    assert stage.states() == {"code-fast": "ready", "plan": "ready"}
    assert len(stage.starts("code-fast")) == 1


def test_the_chat_tiers_stay_side_by_side(stage: Stage) -> None:
    stage.hello("code-fast")
    stage.hello("plan")
    stage.hello("plan-uncensored")
    assert stage.starts("plan-uncensored")[0]["beside"] == "code-fast,plan"
    stage.hello("code-smart")
    assert stage.starts("code-smart")[0]["beside"] == "code-fast"


@pytest.mark.usefixtures("talkative")
def test_a_busy_model_is_never_evicted(stage: Stage) -> None:
    held = stage.hold("code-smart", "one")
    waiting = stage.call().chat("plan", stream=True)
    assert waiting.status() == 200
    assert re.fullmatch(r": waiting for code-smart to finish before plan can load, \d+ s", waiting.event())
    plain = stage.call().chat("plan")
    wait_for(lambda: stage.waiting() == ["plan", "plan"], "both requests queued")
    assert stage.states() == {"code-smart": "ready"}
    assert plain.silent()
    stage.put("one.go")
    assert held.content() == "hello."
    assert waiting.content() == "plan says hello."
    assert plain.answer()[0] == 200
    assert stage.place("code-smart done") < stage.place("code-smart term") < stage.place("plan started")
    assert stage.starts("plan")[0]["beside"] == ""


@pytest.mark.usefixtures("talkative")
def test_a_loading_model_is_never_evicted(stage: Stage) -> None:
    stage.put("code-smart.slow")
    first = stage.call().chat("code-smart")
    stage.wait_event("code-smart started")
    second = stage.call().chat("plan", stream=True)
    assert second.status() == 200
    assert re.fullmatch(r": waiting for code-smart to finish before plan can load, \d+ s", second.event())
    assert stage.states() == {"code-smart": "starting"}
    stage.put("code-smart.loaded")
    assert first.answer()[0] == 200
    assert second.content() == "plan says hello."
    assert len(stage.starts("code-smart")) == 1
    assert stage.place("code-smart done") < stage.place("code-smart term") < stage.place("plan started")


@pytest.mark.usefixtures("talkative")
def test_a_load_that_nobody_waits_for_any_more_is_not_broken_off(stage: Stage) -> None:
    stage.put("code-smart.slow")
    leaver = stage.call().chat("code-smart")
    stage.wait_event("code-smart started")
    leaver.close()
    wait_for(lambda: not stage.waiting(), "the leaver's going")
    second = stage.call().chat("plan", stream=True)
    assert second.status() == 200
    assert second.event().startswith(": waiting for code-smart to finish")
    assert stage.states() == {"code-smart": "starting"}
    stage.put("code-smart.loaded")
    assert second.content() == "plan says hello."
    assert stage.starts("plan")[0]["beside"] == ""


def test_a_model_that_is_waited_for_is_not_evicted_when_it_gets_ready(stage: Stage) -> None:
    """Between "ready" and the waiting request's entering, a later request must not throw it out: both would thrash."""
    engine = stage.engine
    smart, plan = engine.models["code-smart"], engine.models["plan"]
    first = engine.enqueue(smart)
    assert not engine.try_enter(first)
    second = engine.enqueue(plan)
    stage.wait_state("code-smart", "ready")
    assert not engine.try_enter(second)         # the first of the two to be woken
    assert stage.states() == {"code-smart": "ready"}
    assert engine.try_enter(first)
    engine.dequeue(first)
    assert not engine.try_enter(second)
    assert stage.states() == {"code-smart": "ready"}
    engine.leave(smart)
    assert not engine.try_enter(second)
    stage.wait_state("plan", "ready")
    assert engine.try_enter(second)
    engine.dequeue(second)
    engine.leave(plan)


def test_a_tier_over_the_budget_is_500_and_names_the_setting(open_stage: OpenStage) -> None:
    stage = open_stage(budget_gb=12)
    for stream in (False, True):
        status, answer = stage.call().chat("code-smart", stream=stream).answer()
        assert status == 500
        assert "memory_gb" in message_of(answer)
        assert "code-smart needs about 49.5 GB and the budget is 12.0 GB" in message_of(answer)
    assert stage.happened() == []


@pytest.mark.parametrize(("order", "stays"), [(("code-fast", "plan"), "plan"), (("plan", "code-fast"), "code-fast")])
def test_over_the_budget_the_least_recently_used_goes(
        open_stage: OpenStage, config: llmstack.Config, order: List[str], stays: str) -> None:
    config = config._replace(tiers=tuple(t._replace(size_gb=10.0) for t in config.tiers))
    stage = open_stage(config, budget_gb=23)    # two of 11 GB
    for name in ("code-fast", "plan", *order):
        stage.hello(name)
        stage.wait_idle(name)
    stage.hello("plan-uncensored")
    assert stage.starts("plan-uncensored")[0]["beside"] == stays
    assert stage.states() == {stays: "ready", "plan-uncensored": "ready"}


def test_within_the_budget_nothing_goes(open_stage: OpenStage, config: llmstack.Config) -> None:
    config = config._replace(tiers=tuple(t._replace(size_gb=10.0) for t in config.tiers))
    stage = open_stage(config, budget_gb=33.1)
    for name in ("code-fast", "plan", "plan-uncensored"):
        stage.hello(name)
    assert sorted(stage.states()) == ["code-fast", "plan", "plan-uncensored"]


def test_over_the_budget_an_idle_model_goes_before_a_busy_one(open_stage: OpenStage, config: llmstack.Config) -> None:
    """The busy one was asked first, so it is the one used least recently; waiting for it would be for nothing."""
    config = config._replace(tiers=tuple(t._replace(size_gb=10.0) for t in config.tiers))
    stage = open_stage(config, budget_gb=23)
    held = stage.hold("code-fast", "one")
    stage.hello("plan")
    assert stage.hello("plan-uncensored") == "plan-uncensored says hello"
    assert stage.starts("plan-uncensored")[0]["beside"] == "code-fast"
    stage.put("one.go")
    assert held.content() == "hello."


def test_nothing_more_goes_where_what_is_stopping_makes_room_enough(
        open_stage: OpenStage, config: llmstack.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "STOP_GRACE_S", 1e9)
    config = config._replace(tiers=tuple(t._replace(size_gb=10.0) for t in config.tiers))
    stage = open_stage(config, budget_gb=23)
    stage.put("plan.hang")
    stage.hello("code-fast")
    stage.hello("plan")
    stage.wait_idle("code-fast")
    stage.wait_idle("plan")
    hanging = stage.engine.models["plan"].process
    try:
        idle_for(stage, "plan", 1201)
        stage.wait_event("plan term")
        call = stage.call().chat("plan-uncensored")
        stage.wait_blocked("plan-uncensored")
        assert stage.engine._tickets[0].blocked_by == {"plan"}
    finally:
        hanging.kill()
    assert call.answer()[0] == 200
    assert stage.starts("plan-uncensored")[0]["beside"] == "code-fast"


# ---------------------------------------------------------------------------------------------------
# Fairness
# ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("talkative")
def test_newcomers_queue_behind_one_who_has_waited_long(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "FAIR_WAIT_S", 0)
    held = stage.hold("code-smart", "one")
    waiter = stage.call().chat("plan", "hold two", True)
    stage.wait_blocked("plan")
    newcomer = stage.call().chat("code-smart", stream=True)
    assert newcomer.status() == 200
    assert newcomer.event().startswith(": ")    # where it would have been served, had nobody waited
    stage.put("one.go")
    assert held.content() == "hello."
    assert waiter.status() == 200
    assert waiter.first_data() == "plan says "
    assert stage.times("code-smart request") == 1
    stage.put("two.go")
    assert waiter.content() == "hello."
    assert newcomer.content() == "code-smart says hello."
    assert [e.split()[0] for e in stage.happened() if " started " in e] == ["code-smart", "plan", "code-smart"]


def test_newcomers_are_served_at_once_while_the_wait_is_short(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "FAIR_WAIT_S", 1e9)
    held = stage.hold("code-smart", "one")
    waiter = stage.call().chat("plan")
    stage.wait_blocked("plan")
    assert stage.hello("code-smart") == "code-smart says hello"
    assert waiter.silent()
    stage.put("one.go")
    assert held.content() == "hello."
    assert waiter.answer()[0] == 200


def test_newcomers_of_a_model_that_nobody_waits_to_see_idle_are_served(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "FAIR_WAIT_S", 0)
    stage.hello("code-fast")
    held = stage.hold("code-smart", "one")
    waiter = stage.call().chat("plan")
    stage.wait_blocked("plan")
    assert stage.hello("code-fast") == "code-fast says hello"
    stage.put("one.go")
    assert held.content() == "hello."
    assert waiter.answer()[0] == 200


# ---------------------------------------------------------------------------------------------------
# Unloading
# ---------------------------------------------------------------------------------------------------


def test_a_model_idle_for_its_ttl_is_unloaded(stage: Stage) -> None:
    stage.hello("code-fast")
    stage.hello("plan")
    pid = stage.pid("plan")
    stage.wait_idle("code-fast")
    stage.wait_idle("plan")
    idle_for(stage, "code-fast", 1e6)           # ttl 0: never
    idle_for(stage, "plan", 1000)               # ttl 1200
    stage.engine.unload_idle()
    assert stage.states() == {"code-fast": "ready", "plan": "ready"}
    idle_for(stage, "plan", 1201)
    stage.engine.unload_idle()
    stage.wait_state("plan", "")
    assert not exists(pid)
    assert stage.states() == {"code-fast": "ready"}
    assert stage.hello("plan") == "plan says hello"


def test_the_server_looks_for_idle_models_by_itself(stage: Stage) -> None:
    stage.hello("plan")
    stage.wait_idle("plan")
    idle_for(stage, "plan", 1201)
    stage.wait_state("plan", "")


def test_a_busy_model_outlives_its_ttl(stage: Stage) -> None:
    held = stage.hold("plan", "one")
    idle_for(stage, "plan", 1e6)
    stage.engine.unload_idle()
    assert stage.states() == {"plan": "ready"}
    stage.put("one.go")
    assert held.content() == "hello."
    stage.wait_idle("plan")
    stage.engine.unload_idle()                  # its ttl runs from the end of the last request
    assert stage.states() == {"plan": "ready"}


def test_a_server_that_hangs_on_term_is_killed_after_the_grace(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "STOP_GRACE_S", 0.05)
    stage.put("code-smart.hang")
    stage.hello("code-smart")
    pid = stage.pid("code-smart")
    assert stage.hello("plan") == "plan says hello"
    assert stage.place("code-smart term") < stage.place("plan started")
    assert stage.starts("plan")[0]["beside"] == ""
    assert not exists(pid)


def test_close_stops_everything_and_refuses_what_waits(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "STOP_GRACE_S", 0.05)
    stage.put("plan-uncensored.slow")
    stage.put("plan.hang")
    stage.hello("code-fast")
    held = stage.hold("plan", "one")
    waiting = stage.call().chat("plan-uncensored")
    stage.wait_event("plan-uncensored started")
    pids = [stage.pid(name) for name in ("code-fast", "plan", "plan-uncensored")]
    stage.engine.close()
    assert not any(map(exists, pids))
    assert "server_error" in held.event()
    for call in (waiting, stage.call().chat("code-fast")):
        status, answer = call.answer()
        assert status == 500
        assert "stopping" in message_of(answer)
    assert stage.states() == {}
    assert len([e for e in stage.happened() if " started " in e]) == 3


def test_close_during_a_load_is_no_bug_in_the_log(stage: Stage) -> None:
    stage.put("plan.slow")
    stage.call().chat("plan")
    stage.wait_event("plan started")
    stage.engine.close()
    wait_for(lambda: not any(t.name == "load plan" for t in threading.enumerate()), "the end of the load's thread")
    assert not exists(stage.pid("plan"))
    assert "Traceback" not in stage.log()


# ---------------------------------------------------------------------------------------------------
# Waiting
# ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("talkative")
def test_a_waiting_stream_is_told_and_a_plain_request_is_not(stage: Stage) -> None:
    stage.put("code-smart.slow")
    plain = stage.call().chat("code-smart")
    stage.wait_event("code-smart started")
    stream = stage.call().chat("code-smart", stream=True)
    assert stream.status() == 200
    assert stream.headers["content-type"] == "text/event-stream"
    for _ in range(4):
        assert re.fullmatch(r": loading code-smart, \d+ s", stream.event())
    assert plain.silent()
    stage.put("code-smart.loaded")
    assert stream.content() == "code-smart says hello."
    assert plain.answer() == (200, {"choices": [{"message": {"role": "assistant", "content": "code-smart says hello"}}]})
    for call in (stream, plain):                # both connections are as good as new
        assert call.send("GET", "/health").status() == 200
        assert call.body() == b"OK"
    assert len(stage.starts("code-smart")) == 1


@pytest.mark.usefixtures("talkative")
def test_comments_come_as_often_as_they_should(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first at once, the next not before its time: here, never."""
    monkeypatch.setattr(llmstack, "WAITING_EVERY_S", 1e9)
    stage.put("code-smart.slow")
    looks: List[float] = []
    wait = stage.engine.wait

    def looking(seconds: float) -> None:
        looks.append(seconds)
        wait(seconds)

    monkeypatch.setattr(stage.engine, "wait", looking)
    stream = stage.call().chat("code-smart", stream=True)
    assert stream.status() == 200
    wait_for(lambda: len(looks) > 3, "more looks than comments")
    stage.put("code-smart.loaded")
    assert sum(e.startswith(": loading code-smart") for e in stream.events()) == 1


@pytest.mark.usefixtures("talkative")
def test_a_client_of_http_1_0_gets_its_comments_unchunked(stage: Stage) -> None:
    stage.put("code-smart.slow")
    stream = stage.call().chat("code-smart", stream=True, minor=0)
    assert stream.status() == 200
    assert "transfer-encoding" not in stream.headers
    assert stream.headers["connection"] == "close"
    assert re.fullmatch(r": loading code-smart, \d+ s", stream.event())
    stage.put("code-smart.loaded")
    assert stream.content() == "code-smart says hello."


@pytest.mark.usefixtures("taciturn")
def test_a_stream_that_need_not_be_told_has_the_servers_own_head(stage: Stage) -> None:
    stream = stage.call().chat("code-smart", stream=True)
    assert stream.status() == 200
    assert stream.events()[0].startswith("data: ")


def test_a_client_that_leaves_the_queue_is_forgotten(stage: Stage) -> None:
    held = stage.hold("code-smart", "one")
    leaver = stage.call().chat("plan")
    stage.wait_blocked("plan")
    leaver.close()
    wait_for(lambda: not stage.waiting(), "the leaver's going")
    stage.put("one.go")
    assert held.content() == "hello."
    assert stage.hello("code-smart") == "code-smart says hello"
    assert stage.states() == {"code-smart": "ready"}
    assert stage.starts("plan") == []


def test_a_load_goes_on_when_its_client_leaves(stage: Stage) -> None:
    stage.put("code-smart.slow")
    leaver = stage.call().chat("code-smart", stream=True)
    stage.wait_event("code-smart started")
    leaver.close()
    wait_for(lambda: not stage.waiting(), "the leaver's going")
    stage.put("code-smart.loaded")
    stage.wait_state("code-smart", "ready")
    assert stage.hello("code-smart") == "code-smart says hello"
    assert len(stage.starts("code-smart")) == 1
    assert stage.times("code-smart request") == 1


def test_a_client_that_leaves_while_it_is_served_frees_its_model(stage: Stage) -> None:
    held = stage.hold("code-smart", "one")
    held.close()
    stage.wait_event("code-smart left one")
    assert stage.hello("plan") == "plan says hello"


def test_parallel_requests_for_a_cold_model_start_one_process(stage: Stage) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(stage.hello, ["code-smart", "coder", "smart"] * 4))
    assert answers == ["code-smart says hello"] * 12
    assert len(stage.starts("code-smart")) == 1
    stage.wait_idle("code-smart")


def test_the_engine_answers_while_a_command_line_is_being_made(open_stage: OpenStage) -> None:
    """The first command asks llama-server which flags it takes: seconds, in which nothing else may stand still."""
    stage = open_stage()
    asked, go = threading.Event(), threading.Event()
    command = stage.engine._command

    def slow_command(tier: llmstack.Tier, port: int) -> List[str]:
        asked.set()
        assert go.wait(DEADLINE_S)
        return command(tier, port)

    stage.engine._command = slow_command
    stage.call().chat("plan")
    try:
        assert asked.wait(DEADLINE_S)
        for _ in range(3):                      # the accepting thread, too, does not stand still
            call = stage.call().send("GET", "/running")
            call.sock.settimeout(DEADLINE_S / 2)
            assert call.answer()[1]["running"][0]["state"] == "starting"
    finally:
        go.set()
    stage.wait_state("plan", "ready")


# ---------------------------------------------------------------------------------------------------
# Failing
# ---------------------------------------------------------------------------------------------------

COMPLAINT = "main: loading model\nerror: invalid argument: --no-mmap\n"


def test_a_request_knows_how_long_it_has_waited_for_a_load(stage: Stage) -> None:
    loads, finds_it_loaded = stage.engine.lease("code-smart"), None
    try:
        wait_for(loads.ready, "the model")
        assert 0 < loads.load_s <= stage.engine.models["code-smart"].load_s
        finds_it_loaded = stage.engine.lease("code-smart")
        assert finds_it_loaded.ready()
        assert finds_it_loaded.load_s == 0
    finally:
        loads.end()
        if finds_it_loaded:
            finds_it_loaded.end()


@pytest.mark.usefixtures("taciturn")
@pytest.mark.parametrize("stream", [False, True])
def test_a_load_that_fails_at_once_is_500_with_what_the_server_said(stage: Stage, stream: bool) -> None:
    stage.put("code-smart.fail", COMPLAINT)
    call = stage.call().chat("code-smart", stream=stream)
    status, answer = call.answer()
    assert status == 500
    assert "code-smart: its server exited with 1 while loading:" in message_of(answer)
    assert COMPLAINT.strip() in message_of(answer)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert call.headers["retry-after"] == "5"
    assert call.send("GET", "/health").status() == 200
    stage.wait_state("code-smart", "")
    assert not exists(stage.pid("code-smart"))


@pytest.mark.usefixtures("taciturn")
@pytest.mark.parametrize(("said", "quoted"), [("", "it printed nothing"), ("out of memory\n", "out of memory")])
def test_only_what_this_start_has_said_is_quoted(stage: Stage, said: str, quoted: str) -> None:
    stage.put("code-smart.fail", COMPLAINT)
    assert stage.call().chat("code-smart").status() == 500
    stage.engine.models["code-smart"].failed_at = -1e9
    stage.put("code-smart.fail", said)
    wait_for(lambda: stage.states() == {}, "the end of the first")
    status, answer = stage.call().chat("code-smart").answer()
    assert status == 500
    assert message_of(answer).endswith(f"while loading:\n{quoted}")


@pytest.mark.usefixtures("taciturn")
@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_is_not_there_is_500(stage: Stage, stream: bool) -> None:
    stage.engine._command = lambda tier, port: ["/nowhere/llama-server", "--port", str(port)]
    status, answer = stage.call().chat("code-smart", stream=stream).answer()
    assert status == 500
    assert message_of(answer) == "code-smart: cannot start /nowhere/llama-server: No such file or directory; reinstall it"


@pytest.mark.usefixtures("taciturn")
def test_weights_that_are_not_there_are_500(open_stage: OpenStage, config: llmstack.Config, tmp_path: Path) -> None:
    weights = str(tmp_path / "gone.gguf")
    stage = open_stage(config._replace(tiers=tuple(t._replace(path=weights) for t in config.tiers)))
    status, answer = stage.call().chat("code-smart").answer()
    assert status == 500
    assert weights in message_of(answer)


@pytest.mark.usefixtures("taciturn")
def test_a_user_error_while_the_command_is_made_is_passed_on(stage: Stage) -> None:
    """probe_flags says what is wrong with the llama-server that was found; a traceback in the log is no use."""
    def command(tier: llmstack.Tier, port: int) -> List[str]:
        raise llmstack.UserError("/usr/bin/llama-server --version fails", "reinstall llama.cpp")

    stage.engine._command = command
    status, answer = stage.call().chat("code-smart").answer()
    assert status == 500
    assert "/usr/bin/llama-server --version fails" in message_of(answer)


@pytest.mark.usefixtures("taciturn")
def test_a_bug_while_loading_is_500_and_not_a_wait_for_ever(stage: Stage) -> None:
    def command(tier: llmstack.Tier, port: int) -> List[str]:
        raise ZeroDivisionError("a bug")

    stage.engine._command = command
    status, answer = stage.call().chat("code-smart").answer()
    assert status == 500
    assert "see the log" in message_of(answer)
    assert "ZeroDivisionError: a bug" in stage.log()
    wait_for(lambda: stage.states() == {}, "the end of it")


@pytest.mark.usefixtures("talkative")
def test_a_load_that_fails_after_comments_is_an_error_event_and_a_broken_end(stage: Stage) -> None:
    stage.put("code-smart.slow")
    stream = stage.call().chat("code-smart", stream=True)
    assert stream.status() == 200
    assert stream.event().startswith(": loading code-smart")
    stage.wait_event("code-smart started")
    plain = stage.call().chat("code-smart")
    wait_for(lambda: len(stage.waiting()) == 2, "both wait")
    stage.put("code-smart.crash", COMPLAINT)
    status, answer = plain.answer()
    assert status == 500
    assert COMPLAINT.strip() in message_of(answer)
    event = stream.event()
    while event.startswith(":"):
        event = stream.event()
    assert event.startswith("data: ")
    assert message_of(json.loads(event[len("data: "):])) == message_of(answer)
    with pytest.raises(Broken):
        stream.event()


@pytest.mark.usefixtures("talkative")
def test_an_error_of_the_server_after_comments_is_an_error_event(stage: Stage) -> None:
    """An answer that is no stream cannot follow a stream's comments."""
    stage.put("code-smart.slow")
    stream = stage.call().send("POST", "/v1/other", {"model": "code-smart", "stream": True})     # the fake echoes JSON
    assert stream.status() == 200
    assert stream.event().startswith(": loading")
    stage.wait_event("code-smart started")
    stage.put("code-smart.loaded")
    event = stream.event()
    while event.startswith(":"):
        event = stream.event()
    assert "upstream_error" in event
    assert "/v1/other" in event
    with pytest.raises(Broken):
        stream.event()


@pytest.mark.usefixtures("taciturn")
def test_after_a_failed_load_requests_fail_at_once_for_a_while(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.put("code-smart.fail", COMPLAINT)
    first = stage.call().chat("code-smart").answer()
    wait_for(lambda: stage.states() == {}, "the end of the first load")
    stage.take("code-smart.fail")
    monkeypatch.setattr(llmstack, "FAILED_LOAD_S", 1e6)
    for stream in (False, True):
        assert stage.call().chat("code-smart", stream=stream).answer() == first
    assert len(stage.starts("code-smart")) == 1
    assert stage.hello("code-fast") == "code-fast says hello"
    monkeypatch.setattr(llmstack, "FAILED_LOAD_S", 0)
    assert stage.hello("code-smart") == "code-smart says hello"
    assert len(stage.starts("code-smart")) == 2


def test_a_server_that_has_died_is_started_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.engine, "unload_idle", lambda: None)     # the request itself notices
    stage.hello("code-smart")
    pid = stage.pid("code-smart")
    os.kill(pid, signal.SIGKILL)
    stage.wait_dead("code-smart")
    assert stage.hello("code-smart") == "code-smart says hello"
    assert len(stage.starts("code-smart")) == 2
    assert not exists(pid)


def test_a_server_that_has_died_idle_is_noticed(stage: Stage) -> None:
    stage.hello("code-smart")
    os.kill(stage.pid("code-smart"), signal.SIGKILL)
    stage.wait_state("code-smart", "")
    assert "its server has died" in stage.log()


def test_a_server_that_dies_mid_stream_is_an_error_event_and_a_broken_end(stage: Stage) -> None:
    held = stage.hold("code-smart", "one")
    stage.put("one.die")
    event = held.event()
    assert event.startswith("data: ")
    assert json.loads(event[len("data: "):])["error"]["type"] == "server_error"
    with pytest.raises(Broken):
        held.event()
    stage.wait_idle("code-smart")
    wait_for(lambda: not exists(stage.pid("code-smart")), "its death")
    assert stage.hello("code-smart") == "code-smart says hello"
    assert len(stage.starts("code-smart")) == 2


def test_a_server_that_dies_before_it_answers_is_502(stage: Stage) -> None:
    call = stage.call().chat("code-smart", "hold one")
    stage.wait_event("code-smart held one")
    stage.put("one.die")
    status, answer = call.answer()
    assert status == 502
    assert re.fullmatch("code-smart: .*closed the connection without an answer\\)", message_of(answer))


def test_a_port_that_a_stranger_has_is_passed_over(open_stage: OpenStage) -> None:
    with contextlib.ExitStack() as strangers:
        port = next(p for p in range(FIRST_PORT, FIRST_PORT + 40) if llmstack.port_is_free("127.0.0.1", p))
        stranger = strangers.enter_context(socket.socket())
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        stage = open_stage(first_port=port)
        stage.hello("code-fast")
        stage.hello("plan")
        ports = [stage.starts(name)[0]["port"] for name in ("code-fast", "plan")]
        assert port < ports[0] < ports[1]
        assert stage.times("code-fast refused") == 0


def test_a_port_that_is_shared_with_a_stranger_is_left(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-server sets SO_REUSEPORT: two that choose a port in the same moment both have it."""
    listeners, shared = llmstack.listeners, []      # type: Any, list[int]

    def listening(port: int) -> List[int]:
        found: List[int] = listeners(port)
        if found and port in (shared or [port]):
            shared[:] = [port]
            found = [*found, os.getpid()]
        return found

    free = llmstack.port_is_free
    monkeypatch.setattr(llmstack, "listeners", listening)
    monkeypatch.setattr(llmstack, "port_is_free", lambda host, port: port not in shared and free(host, port))
    assert stage.hello("plan") == "plan says hello"
    ports = [start["port"] for start in stage.starts("plan")]
    assert len(set(ports)) == 2
    assert ports[0] == shared[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="127.0.0.2 is this machine on Linux only")
def test_a_stranger_on_the_same_port_of_another_address_is_no_matter(stage: Stage) -> None:
    with socket.socket() as stranger:
        port = next(p for p in range(FIRST_PORT, FIRST_PORT + 40) if llmstack.port_is_free("127.0.0.1", p))
        stranger.bind(("127.0.0.2", port))
        stranger.listen()
        assert stage.hello("plan") == "plan says hello"
        assert stage.starts("plan")[0]["port"] == port


@pytest.mark.usefixtures("taciturn")
def test_a_stranger_that_takes_the_port_is_not_taken_for_our_server(
        open_stage: OpenStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-server downloads for minutes before it listens; a 200 on its port need not be its own."""
    strangers = open_stage()
    assert strangers.hello("code-fast") == "code-fast says hello"
    port = strangers.starts("code-fast")[0]["port"]
    monkeypatch.setattr(llmstack, "port_is_free", lambda host, port: True)
    stage = open_stage(first_port=port)
    status, answer = stage.call().chat("plan").answer()
    assert status == 500
    assert "couldn't bind HTTP server socket" in message_of(answer)
    assert strangers.times("code-fast request") == 1


def test_a_port_that_is_taken_in_the_moment_it_was_chosen_is_changed_for_another(
        open_stage: OpenStage, monkeypatch: pytest.MonkeyPatch) -> None:
    strangers = open_stage()
    assert strangers.hello("code-fast") == "code-fast says hello"
    port = strangers.starts("code-fast")[0]["port"]
    really, wrong = llmstack.port_is_free, [True]
    monkeypatch.setattr(llmstack, "port_is_free", lambda host, asked: bool(wrong and wrong.pop()) or really(host, asked))
    stage = open_stage(first_port=port)
    assert stage.hello("plan") == "plan says hello"
    assert stage.times("plan refused") == 1
    assert stage.starts("plan")[-1]["port"] > port
    assert strangers.times("code-fast request") == 1, "only our own server is asked"


# ---------------------------------------------------------------------------------------------------
# PROCESSES
# ---------------------------------------------------------------------------------------------------

# Says its pid, then ends when its standard input does.
READY = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"


class Child:
    """`python -c CODE` in a group of its own, after its first line."""

    def __init__(self, code: str, args: Sequence[str], env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen([sys.executable, "-S", "-c", code, *args], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env={**os.environ, **env}, start_new_session=True)
        self.pid, self.poll = self.process.pid, self.process.poll
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().decode().strip()

    def end(self) -> None:
        """Let it end by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)

    def clean_up(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()


Spawn = Callable[..., Child]


@pytest.fixture
def python() -> Iterator[Spawn]:
    """Start children: python(CODE, *arguments, env={...}); killed at the end."""
    children: List[Child] = []

    def start(code: str = READY, *args: str, env: Optional[Mapping[str, str]] = None) -> Child:
        children.append(Child(code, args, env or {}))
        return children[-1]

    yield start
    for child in children:
        child.clean_up()


def test_process_started_names_one_process(python: Spawn) -> None:
    ours = llmstack.process_started(os.getpid())
    assert ours
    assert llmstack.process_started(os.getpid()) == ours
    age_s, again_s = llmstack.process_age_s(os.getpid()), llmstack.process_age_s(os.getppid())
    assert age_s is not None
    assert again_s is not None
    assert 0 < age_s <= again_s + 1
    child = python()
    born = llmstack.process_started(child.pid)
    assert born != ours
    child.process.kill()
    wait_for(lambda: not llmstack.process_started(child.pid), "its death")     # a zombie, until we ask for its exit
    assert exists(child.pid)
    child.wait()
    assert llmstack.process_started(child.pid) == ""

@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="reads /proc")
def test_a_descriptor_that_is_closed_meanwhile_hides_no_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.readlink

    def readlink(path: str) -> str:
        if path.endswith("/fd/0"):
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(os, "readlink", readlink)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert llmstack.listeners(server.getsockname()[1]) == {os.getpid()}


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1])
def test_process_started_of_nobody(pid: int) -> None:
    assert llmstack.process_started(pid) == ""


def test_stop_process_stops_the_one_meant(python: Spawn) -> None:
    child = python()
    assert llmstack.stop_process(child.pid, llmstack.process_started(child.pid), DEADLINE_S, child.poll)
    assert child.wait() == -signal.SIGTERM


@pytest.mark.parametrize("started", ["", "0a1b2c3d-12345"])
def test_stop_process_leaves_another_process_of_the_same_number_alone(python: Spawn, started: str) -> None:
    child = python()
    assert llmstack.stop_process(child.pid, started, 0.0, child.poll)
    child.end()                                 # unharmed: it ends as it should
    assert child.wait() == 0


STUBBORN = "import os, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + READY
PARENT = ("import subprocess, sys; child = subprocess.Popen([sys.executable, '-S', '-c', sys.argv[1]], stdout=subprocess.PIPE);"
          "child.stdout.readline(); print(child.pid, flush=True); child.wait()")
# Its first thread ends, the other goes on: what a server of many threads looks like while it gives its memory back.
HEADLESS = ("import ctypes, sys, threading; threading.Thread(target=sys.stdin.read).start();"
            "print(flush=True); ctypes.CDLL(None).pthread_exit(None)")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_is_not_gone_while_one_of_its_threads_is_there(python: Spawn) -> None:
    child = python(HEADLESS)
    started = wait_for(lambda: llmstack.process_started(child.pid), "its birth")
    stat = Path(f"/proc/{child.pid}/stat")
    wait_for(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "Z", "the end of its first thread")
    assert child.poll() is None
    assert llmstack.process_started(child.pid) == started
    assert llmstack.stop_process(child.pid, started, DEADLINE_S, child.poll)
    assert child.poll() == -signal.SIGTERM


def test_stop_process_kills_one_that_hangs(python: Spawn) -> None:
    child = python(STUBBORN)
    assert llmstack.stop_process(child.pid, llmstack.process_started(child.pid), 0.05, child.poll)
    assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("code", [READY, STUBBORN], ids=["ready", "stubborn"])
def test_stop_process_stops_the_whole_group(python: Spawn, code: str) -> None:
    """A wrapper script dies of TERM at once; the llama-server below it may hang and keep memory and port."""
    parent = python(PARENT, code)
    child = int(parent.line)
    assert llmstack.stop_process(parent.pid, llmstack.process_started(parent.pid), 0.2, parent.poll)
    wait_for(lambda: not llmstack.process_started(child), "the child's death")


def test_a_model_is_stopped_with_all_its_processes(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "STOP_GRACE_S", 0.2)
    stage.put("plan.orphan")
    stage.hello("plan")
    orphan = next(int(e.split()[2]) for e in stage.happened() if e.startswith("plan orphan "))
    assert llmstack.process_started(orphan)
    assert stage.ask("POST", "/api/models/unload/plan") == (200, "OK")
    wait_for(lambda: not llmstack.process_started(orphan), "the orphan's death")


def test_stack_members_are_found_by_their_mark_and_nobody_else(python: Spawn) -> None:
    mark = os.urandom(8).hex()
    member = python(env={"LLMSTACK_STACK": mark})
    parent = python(PARENT, READY, env={"LLMSTACK_STACK": mark})
    child = int(parent.line)
    python(env={"LLMSTACK_STACK": mark + "0"})
    python(env={"LLMSTACK_STACK": mark[:-1]})
    python(env={"OTHER": f"LLMSTACK_STACK={mark}"})
    python(READY, f"LLMSTACK_STACK={mark}")     # in the arguments only
    python()
    assert sorted(llmstack.stack_members(mark)) == sorted([member.pid, parent.pid, child])
    assert llmstack.stack_members("") == {}
    assert llmstack.stack_members(os.urandom(8).hex()) == {}


def test_stop_stack_members_stops_these_and_nobody_else(python: Spawn) -> None:
    mark = os.urandom(8).hex()
    members = [python(env={"LLMSTACK_STACK": mark}) for _ in range(2)]
    other = python(env={"LLMSTACK_STACK": mark + "0"})
    assert llmstack.stop_members(llmstack.stack_members(mark)) == 2
    assert [m.wait() for m in members] == [-signal.SIGTERM] * 2
    assert llmstack.process_started(other.pid)
    assert llmstack.stop_members(llmstack.stack_members(mark)) == 0


def test_port_holder_names_who_listens(python: Spawn) -> None:
    listen = ("import socket, sys; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen();"
              "print(s.getsockname()[1], flush=True); sys.stdin.read()")
    child = python(listen)
    port = int(child.line)
    assert re.fullmatch(rf"python[\d.]* \(pid {child.pid}\)", llmstack.port_holder(port))
    assert not llmstack.port_is_free("127.0.0.1", port)
    child.process.kill()
    child.wait()
    assert llmstack.port_holder(port) == "another program"


def test_a_record_comes_back_as_it_was_written(tmp_path: Path, python: Spawn) -> None:
    path = str(tmp_path / "state" / "router.pid")
    mark = llmstack.new_mark(str(tmp_path))
    child = python(env={llmstack.STACK_VARIABLE: mark})
    record = llmstack.Record(child.pid, llmstack.process_started(child.pid), mark, "127.0.0.1", 10101, "router", "next")
    llmstack.write_record(path, record)
    assert llmstack.read_record(path) == record
    assert record.alive
    assert Path(path).read_text(encoding="utf-8").splitlines()[0] == str(child.pid)      # what `kill $(head -1 …)` needs
    assert not record._replace(started="0a1b2c3d-1").alive
    assert not record._replace(started="").alive


@pytest.mark.parametrize("text", [
    None, "", "123\n", "123", "abc\n{}\n", "123\n{}\n", "123\n[]\n", "123\n5\n", "123\nnull\n", "123\n{\n",
    '123\n{"started": "x"}\n', '\n{"started": "x", "stack": "y"}\n'])
def test_a_pid_file_that_proves_nothing_is_no_record(tmp_path: Path, text: Optional[str]) -> None:
    path = tmp_path / "router.pid"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert llmstack.read_record(str(path)) is None


HOLDER = ("import sys; sys.path.insert(0, sys.argv[1]); import llmstack\n"
          "with llmstack.FileLock(sys.argv[2], lambda: None):\n"
          "    print('held', flush=True)\n"
          "    sys.stdin.read()\n")


@pytest.mark.parametrize("ending", ["exit", "kill"])
def test_a_lock_is_held_against_another_process_until_that_ends(python: Spawn, tmp_path: Path, ending: str) -> None:
    path = str(tmp_path / "state" / "lock")
    holder = python(HOLDER, str(ROOT), path)
    assert holder.line == "held"
    waits: List[bool] = []

    def waiting() -> None:
        waits.append(holder.poll() is None)
        holder.process.kill() if ending == "kill" else holder.end()

    with llmstack.FileLock(path, waiting):
        assert holder.wait() == (-signal.SIGKILL if ending == "kill" else 0)
        assert waits == [True]
    with llmstack.FileLock(path, waiting):      # and free again
        assert waits == [True]


# ---------------------------------------------------------------------------------------------------
# llama.cpp itself
# ---------------------------------------------------------------------------------------------------


def test_real_llama_cpp_is_served_and_swapped(
        real_data: Path, tmp_path: Path, config: llmstack.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "noise.gguf"
    weights.write_bytes(render_noise_gguf())
    tiers = tuple(t._replace(path=str(weights), ctx_size=4096, rope_scale=0.0) for t in config.tiers
                  if t.name in ("code-smart", "plan"))
    config = config._replace(tiers=tiers).with_settings({"threads": 1})
    program = llmstack.find_llama_server(config, os.environ, str(real_data))
    assert program
    refused = frozenset({"--no-mmap", "--load-mode"})       # what builds disagree about; asking this one takes seconds

    class RealStage(Stage):
        def command(self, tier: llmstack.Tier, port: int) -> List[str]:
            return llmstack.server_command(program, tier, config, port, refused)

    stage = RealStage(tmp_path / "stage", config, 1e9, FIRST_PORT)
    try:
        messages = [{"role": "user", "content": "Hello"}]
        status, answer = stage.ask("POST", "/v1/chat/completions", {"model": "coder", "max_tokens": 8, "messages": messages})
        assert status == 200, answer
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["completion_tokens"] > 0
        first = stage.engine.models["code-smart"].process.pid

        call = stage.call().send("POST", "/v1/chat/completions", {
            "model": "code-smart", "max_tokens": 8, "stream": True, "messages": messages})
        assert call.status() == 200
        events = call.events()
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][len("data: "):])["choices"][0]["finish_reason"] in ("stop", "length")

        status, answer = stage.ask("POST", "/v1/messages", {"model": "code-smart", "max_tokens": 8, "messages": messages})
        assert status == 200, answer
        assert answer["type"] == "message"

        status, answer = stage.ask("POST", "/infill", {
            "model": "code-smart", "input_prefix": "def f(", "input_suffix": "):\n    pass\n", "n_predict": 8})
        assert status == 200, answer
        assert isinstance(answer["content"], str)

        status, answer = stage.ask("POST", "/v1/chat/completions", {"model": "chat", "max_tokens": 8, "messages": messages})
        assert status == 200, answer
        assert stage.states() == {"plan": "ready"}
        assert not exists(first)
        assert stage.ask("GET", "/upstream/plan/v1/models")[1]["data"][0]["id"] == "plan"
    finally:
        stage.close()
