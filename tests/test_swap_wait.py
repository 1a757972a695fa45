"""What is asked through llama-swap: waited for truthfully, loaded once, and found by its path.

A stand-in plays llama-swap: one model at a time, in the order in which they were asked for.
"""

from __future__ import annotations

import collections
import json
import shutil
import socket
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Counter, Dict, Iterator, List, Optional

import pytest

import llmstack
from tests.scripted import WAIT_S, Connection, ScriptedUpstream, answer, wait
from tests.test_engine import Call, OpenStage, open_stage, wait_for  # noqa: F401

TIERS = """\
[code-smart]
role = agent
path = /models/smart.gguf
[plan]
role = plan
path = /models/plan.gguf
"""
OK = b'{"choices": []}'
EMPTY_502 = answer(b"", "502 Bad Gateway")


class StandIn:
    """llama-swap as far as it is asked here, and its models' servers, all on one port."""

    def __init__(self) -> None:
        self.loads: List[str] = []
        self.asked: List[str] = []              # paths
        self.busy = threading.Event()           # a chat that says "hold" has begun...
        self.go = threading.Event()             # ...and may end
        self.answers: List[bytes] = []          # of the next chats, instead of OK
        self.context = 4_096
        self._changed = threading.Condition()
        self._queue: List[object] = []
        self._in_flight: Counter[str] = collections.Counter()
        self.server = ScriptedUpstream(self._serve)

    @property
    def loaded(self) -> str:
        return self.loads[-1] if self.loads else ""

    def _enter(self, model: str) -> None:
        me = object()
        with self._changed:
            self._queue.append(me)
            while self.loaded != model:
                if self._queue[0] is me and not self._in_flight[self.loaded]:
                    self.loads.append(model)
                else:
                    assert self._changed.wait(WAIT_S)
            self._queue.remove(me)
            self._in_flight[model] += 1
            self._changed.notify_all()

    def _leave(self, model: str) -> None:
        with self._changed:
            self._in_flight[model] -= 1
            self._changed.notify_all()

    def _serve(self, connection: Connection) -> None:
        sock, buffer = connection.sock, b""
        while True:
            while b"\r\n\r\n" not in buffer:
                data = sock.recv(65_536)
                if not data:
                    return
                buffer += data
            head, _, buffer = buffer.partition(b"\r\n\r\n")
            method, target = head.decode().split(" ")[:2]
            lengths = [line for line in head.lower().split(b"\r\n")
                       if line.startswith(b"content-length")]
            length = int(lengths[0].split(b":")[1]) if lengths else 0
            while method == "POST" and len(buffer) < length:
                buffer += sock.recv(65_536)
            body, buffer = buffer[:length], buffer[length:]
            self.asked.append(target)
            held = sock if length and method == "GET" else None
            sock.sendall(self._answer(target, body, held))

    def _answer(self, target: str, body: bytes, held: Optional[socket.socket]) -> bytes:
        if target == "/running":
            row = {"model": self.loaded, "state": "ready",
                   "proxy": f"http://127.0.0.1:{self.server.port}"}
            return answer(json.dumps({"running": [row]}).encode())
        if target == "/slots":
            return answer(b"[]")
        if target == "/props":
            told = {"total_slots": 1, "default_generation_settings": {"n_ctx": self.context}}
            return answer(json.dumps(told).encode())
        if target == "/v1/models":
            return answer(json.dumps({"object": "list", "data": [{"id": "plan"}]}).encode())
        if target.startswith("/upstream/"):
            return self._run(target.split("/")[2], b"", held)
        if target in ("/v1/chat/completions", "/v1/messages"):
            return self._run(json.loads(body)["model"], body, held)
        return answer(b"404 page not found\n", "404 Not Found", "Content-Type: text/plain")

    def _run(self, model: str, body: bytes, held: Optional[socket.socket]) -> bytes:
        self._enter(model)
        try:
            if held is not None:
                held.recv(1)                    # until who holds it goes
            if b"hold" in body:
                self.busy.set()
                wait(self.go)
            if body and self.answers:
                return self.answers.pop(0)
            return answer(OK)
        finally:
            self._leave(model)


class JsonCall(Call):
    """A call that says that its body is JSON, as llama-swap wants it said."""

    def send(self, method: str, target: str, body: object = None, minor: int = 1,
             host: str = "127.0.0.1") -> Call:
        data = b"" if body is None else json.dumps(body).encode()
        head = (f"{method} {target} HTTP/1.{minor}\r\nHost: {host}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n")
        self.sock.sendall(head.encode() + data)
        return self


class Rig:
    """Our listener before the stand-in."""

    def __init__(self, directory: Path, parks: bool = True, ini: str = TIERS) -> None:
        config = llmstack.parse_models_ini(ini)[0]
        log = llmstack.Log(str(directory / "engine.log"))
        bays: Optional[llmstack.SwapBays] = None
        if parks:
            parking = llmstack.Parking(str(directory / "data"), config)
            bays = llmstack.SwapBays(parking, llmstack.local_tiers(config), lambda _: "a" * 24, log)
        self.swap = StandIn()
        self.app = llmstack.SwapApp(config, lambda _: [sys.executable], {"LLAMA_API_KEY": "k"},
                                    log, str(directory / "swap.log"), bays)
        self.app.upstream.port = self.swap.server.port
        self.app.upstream.key = "k"
        self.server = llmstack.Server("127.0.0.1", 0, self.app)
        self.app.every_second = lambda: None    # type: ignore[method-assign]  # there is no process
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        self.calls: List[Call] = []

    def call(self) -> Call:
        self.calls.append(JsonCall(self.server.server_port))
        return self.calls[-1]

    def chat_until(self, condition: Callable[[], Any]) -> None:
        """Chat with `plan` until something is known: nobody waits for its server's word."""
        def chatted() -> Any:
            assert self.call().chat("plan").answer()[0] == 200
            return condition()

        wait_for(chatted, "its server has been asked")

    def close(self) -> None:
        self.swap.go.set()
        for call in self.calls:
            call.close()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        self.app.upstream.forget()
        self.swap.server.close()


Start = Callable[..., Rig]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    rigs: List[Rig] = []

    def begin(**options: Any) -> Rig:
        rigs.append(Rig(tmp_path, **options))
        return rigs[-1]

    yield begin
    for rig in rigs:
        rig.close()


# ---- loading


def test_two_models_that_wait_for_each_others_memory_are_loaded_once_each(start: Start) -> None:
    """A model that is there, and not asked yet, was stopped for the next one at once."""
    rig = start()
    first = rig.call().chat("code-smart", "hold")
    wait(rig.swap.busy)
    second, third = rig.call().chat("plan"), rig.call().chat("code-smart")
    wait_for(lambda: rig.swap.asked.count("/upstream/plan/health") == 2, "it is held and asked")
    rig.swap.go.set()
    assert [call.answer()[0] for call in (first, second, third)] == [200] * 3
    assert rig.swap.loads[:2] == ["code-smart", "plan"]
    assert rig.swap.loads.count("plan") == 1


def test_a_model_is_kept_from_its_load_until_the_request_that_waited_has_been_asked(
        start: Start) -> None:
    rig = start()
    lease = rig.app.lease("code-smart")
    wait_for(lease.ready, "it is settled")
    other = rig.call().chat("plan")
    wait_for(lambda: "/upstream/plan/health" in rig.swap.asked, "another waits for its memory")
    assert rig.swap.loads == ["code-smart"]
    lease.end()
    assert other.answer()[0] == 200
    assert rig.swap.loads == ["code-smart", "plan"]


@pytest.mark.skipif(shutil.which("llama-swap") is None, reason="no llama-swap on PATH")
def test_the_real_llama_swap_keeps_a_model_whose_request_does_not_end(tmp_path: Path) -> None:
    program = tmp_path / "server.py"
    program.write_text(
        "import http.server, sys\n"
        "class Answer(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.rfile.read(int(self.headers.get('Content-Length') or 0))\n"
        "        self.send_response(200)\n"
        "        self.send_header('Content-Length', '0')\n"
        "        self.end_headers()\n"
        "    def log_message(self, *_): pass\n"
        "place = ('127.0.0.1', int(sys.argv[1]))\n"
        "http.server.ThreadingHTTPServer(place, Answer).serve_forever()\n")
    first_port = llmstack.free_run(llmstack.FIRST_SERVER_PORT, 2)
    text = f"healthCheckTimeout: 30\nstartPort: {first_port}\nmodels:\n"
    for name in ("a", "b"):
        text += (f"  {name}:\n    cmd: {sys.executable} {program} ${{PORT}}\n"
                 "    proxy: http://127.0.0.1:${PORT}\n")
    (tmp_path / "swap.yaml").write_text(text)
    port = llmstack.free_port("127.0.0.1")
    command = ["llama-swap", "-config", str(tmp_path / "swap.yaml"),
               "-listen", f"127.0.0.1:{port}"]
    process = llmstack.spawn(command, str(tmp_path / "log"), {**llmstack.os.environ})
    up = llmstack.Upstream("127.0.0.1", port)
    try:
        wait_for(lambda: llmstack.running_rows(up) is not None, "llama-swap is up")
        hold = llmstack.hold_model(up, "a")
        wait_for(lambda: llmstack.ready_port(up, "a"), "it is loaded")
        got = threading.Event()

        def ask_other() -> None:
            up.get("/upstream/b/x", 30)
            got.set()

        threading.Thread(target=ask_other, daemon=True).start()
        for _ in range(5):                      # as many looks as one at all
            assert llmstack.ready_port(up, "a")
        assert not got.is_set()
        hold.close()
        wait(got)
        assert llmstack.running_states(up) == {"b": "ready"}
    finally:
        llmstack.stop_process(process.pid, llmstack.process_started(process.pid), 5, process.poll)
        process.wait()


# ---- what is waited for

SETS = (llmstack.ResidencySet("a", ("code-smart",)), llmstack.ResidencySet("b", ("plan",)))
TOGETHER = (llmstack.ResidencySet("a", ("code-smart", "plan")),)


def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: Optional[Dict[str, str]],
           busy: str = "", sets: Any = SETS) -> str:
    """What a request for `plan` is told, with one of `busy` under way."""
    config = llmstack.parse_models_ini(TIERS)[0]
    app = llmstack.SwapApp(config, lambda _: [], {"LLAMA_API_KEY": "k"},
                           llmstack.Log(str(tmp_path / "log")), "")
    app.sets = sets
    monkeypatch.setattr(llmstack, "running_states", lambda _: states and dict(states))
    if busy:
        app.lease(busy)
    return app.lease("plan").stage()


@pytest.mark.parametrize(("states", "said"), [
    (None, "waiting for llama-swap to load plan"),
    ({}, "waiting for llama-swap to load plan"),
    ({"plan": "starting"}, "loading plan"),
    ({"plan": "stopping"}, "waiting for plan to stop before it can load again"),
    ({"plan": "ready"}, ""),
    ({"code-smart": "ready"}, "waiting for llama-swap to load plan"),
    ({"code-smart": "stopping"}, "unloading code-smart to load plan"),
    ({"code-smart": "starting"}, "queued for plan behind code-smart, which loads first"),
])
def test_a_wait_is_said_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 states: Optional[Dict[str, str]], said: str) -> None:
    assert staged(tmp_path, monkeypatch, states) == said


def test_who_is_waited_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = {"code-smart": "ready"}
    said = staged(tmp_path, monkeypatch, ready, "code-smart")
    assert said == "waiting for code-smart to finish before plan can load"
    said = staged(tmp_path, monkeypatch, ready, "code-smart", TOGETHER)
    assert said == "waiting for llama-swap to load plan", "that one is in nobody's way"
    said = staged(tmp_path, monkeypatch, {llmstack.PROXY: "ready"}, llmstack.PROXY)
    assert said == "waiting for llama-swap to load plan"


def test_a_restore_is_told_while_it_lasts(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is ready for llama-swap; a stream was told nothing until all was back."""
    go, began = threading.Event(), threading.Event()

    def restore(bay: llmstack.Bay) -> bool:
        began.set()
        wait(go)
        return True

    monkeypatch.setattr(llmstack.Bay, "restore", restore)
    lease = start().app.lease("plan")
    wait(began)
    assert not lease.ready()
    assert lease.stage() == "restoring what was parked of plan"
    go.set()
    wait_for(lease.ready, "it is restored")
    assert lease.stage() == ""
    lease.end()


def test_who_finds_no_place_in_a_loaded_model_is_told(start: Start) -> None:
    """llama-server queues what its slots do not take, and says nothing until it is begun."""
    rig = start()
    rig.chat_until(rig.app.contexts)
    first, second = rig.app.lease("plan"), rig.app.lease("plan")
    assert first.stage() == ""
    assert second.stage() == "queued for plan behind 1 of its requests"
    first.end()
    assert second.stage() == ""
    second.end()
    assert second.stage() == "", "who looks on may ask a moment too late"


def test_loading_state_holds_on_the_engine_s_port_too(start: Start) -> None:
    rig = start(ini="[DEFAULT]\nloading_state = off\n" + TIERS)
    assert rig.app.loading_state == "off"


# ---- what a conversation may hold


@pytest.mark.parametrize("parks", [True, False])
def test_a_server_is_asked_for_its_context_once_a_load(start: Start, parks: bool) -> None:
    rig = start(parks=parks)
    assert rig.app.contexts() == {}
    rig.chat_until(rig.app.contexts)
    assert rig.app.contexts() == {"plan": 4_096}
    assert rig.call().chat("plan").answer()[0] == 200
    assert rig.swap.asked.count("/props") == 1
    rig.swap.context = 2_048
    assert rig.call().send("POST", "/llmstack/park/plan").status() == 200
    assert rig.app.contexts() == {"plan": 4_096}, "as it said last"
    rig.chat_until(lambda: rig.app.contexts() == {"plan": 2_048})


# ---- paths

LISTS = ["/v1/models", "/v1/models/", "/v1/v1/models", "//v1/models", "/v1/%6dodels", "/models"]


@pytest.mark.parametrize("path", LISTS)
def test_a_list_of_models_is_found_under_llama_swap(start: Start, path: str) -> None:
    status, said = start().call().send("GET", path).answer()
    assert (status, said["data"][0]["id"]) == (200, "plan")


@pytest.mark.parametrize("path", LISTS)
def test_a_list_of_models_is_found_at_the_engine(open_stage: OpenStage, path: str) -> None:  # noqa: F811
    status, said = open_stage().call().send("GET", path).answer()
    assert (status, said["data"][0]["id"]) == (200, "code-fast")


def test_a_model_has_an_entry_of_its_own(start: Start, open_stage: OpenStage) -> None:  # noqa: F811
    for call, name in ((start().call, "plan"), (open_stage().call, "code-fast")):
        status, said = call().send("GET", f"/v1//models/{name}").answer()
        assert (status, said["id"]) == (200, name)
        status, said = call().send("GET", "/v1/models/other").answer()
        assert (status, said["error"]["message"]) == (404, "there is no model 'other' here")


def test_a_chat_is_found_by_any_spelling_of_its_path(start: Start) -> None:
    rig = start()
    body = {"model": "plan", "messages": []}
    for path in ("/v1/v1/chat/completions", "//chat/completions/", "/v1/chat/%63ompletions"):
        assert rig.call().send("POST", path, body).answer()[0] == 200
    assert set(rig.swap.asked) & {"/v1/v1/chat/completions", "//chat/completions/"} == set()


@pytest.mark.parametrize(("method", "path", "body"), [
    ("GET", "/v1/nonsense", None),
    ("POST", "/v1/nonsense", {"model": "auto"}),
    ("POST", "/v1/nonsense", {}),
    ("DELETE", "/nonsense", None),
])
def test_a_path_that_nobody_knows_is_said_to_be_one(
        start: Start, open_stage: OpenStage, method: str, path: str, body: Any) -> None:  # noqa: F811
    for call in (start().call, open_stage().call):
        asked = call()
        status, said = asked.send(method, path, body).answer()
        assert status == 404
        message = said["error"]["message"]
        assert message.startswith(f"no such path: {path}; base URL is http://127.0.0.1")
        assert "/v1, and" in message


def test_a_chat_that_names_no_model_has_a_path(open_stage: OpenStage) -> None:  # noqa: F811
    call = open_stage().call().send("POST", "/v1/chat/completions", {"messages": []})
    status, said = call.answer()
    assert status == 404
    assert said["error"]["message"].startswith("no model named in the request; there are: ")


# ---- a 502 without a body


def test_what_llama_swap_could_not_pass_on_is_asked_once_more(start: Start) -> None:
    """Its kept connection to the model's server has just been closed at the other end."""
    rig = start(parks=False)
    rig.swap.answers = [EMPTY_502]
    assert rig.call().chat("plan").answer()[0] == 200
    assert rig.swap.asked.count("/v1/chat/completions") == 2


@pytest.mark.parametrize(("path", "shape"), [
    ("/v1/chat/completions", {"message", "type", "param", "code"}),
    ("/v1/messages", {"type", "message"}),
])
def test_an_empty_502_is_said_in_the_protocol_s_words(start: Start, path: str,
                                                      shape: Any) -> None:
    rig = start(parks=False)
    rig.swap.answers = [EMPTY_502, EMPTY_502]
    status, said = rig.call().send("POST", path, {"model": "plan"}).answer()
    assert (status, said["error"].keys()) == (502, shape)
    assert "closed the connection without an answer" in said["error"]["message"]
    assert "\n" not in said["error"]["message"]
    assert rig.swap.asked.count(path) == 2


def test_a_host_s_own_empty_502_is_passed_on(start: Start) -> None:
    """Only of llama-swap is it known what that means."""
    rig = start(parks=False)
    rig.app.upstream.is_gateway = False
    rig.swap.answers = [EMPTY_502]
    call = rig.call().chat("plan")
    assert call.status() == 502
    assert rig.swap.asked.count("/v1/chat/completions") == 1


def test_llama_swap_lets_go_of_connections_before_a_server_does() -> None:
    config = llmstack.parse_models_ini(TIERS)[0]
    plan = llmstack.SwapPlan(config, llmstack.Binary(("llama-server",)), llmstack.posix_quote)
    text = llmstack.render_llama_swap_yaml(plan)
    assert text.count("timeouts: {idleConn: 3}") == 2
