"""llama-swap and our own daemon, asked from outside: dead, broken, older, or another's."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Optional

import pytest

import llmstack
from tests.scripted import Message, ScriptedUpstream, answer, reply_with, wait

FIT, PROBE = llmstack.load_extra("fit"), llmstack.load_extra("probe")

Patch = pytest.MonkeyPatch
Answers = dict[str, Any]
TIER = "[code-fast]\nrole = fast\npath = m.gguf\nctx_size = 8k\n"
HOSTED = "[far]\nrole = agent\nmodel = provider/some-model\n"


@pytest.fixture
def peer() -> Iterator[Callable[[Answers], ScriptedUpstream]]:
    """Start a server that answers these paths with JSON, bytes or a status, others with 404."""
    servers: list[ScriptedUpstream] = []

    def start(answers: Answers) -> ScriptedUpstream:
        def reply(request: Message) -> Optional[bytes]:
            found = answers.get(request.target)
            if found is None:
                return answer(b"", "404 Not Found")
            if isinstance(found, int):
                return answer(b"", f"{found} Said So")
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            return answer(data)

        servers.append(ScriptedUpstream(reply_with(reply)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def upstream_of(server: ScriptedUpstream) -> llmstack.Upstream:
    return llmstack.Upstream("127.0.0.1", server.port)


@pytest.fixture
def dead() -> Iterator[llmstack.Upstream]:
    """An upstream where nobody listens, and nobody else can begin to."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield llmstack.Upstream("127.0.0.1", held.getsockname()[1])


# ---- llama-swap


class Swap:
    """Our listener's application before a llama-swap that a test plays."""

    def __init__(self, directory: Path, swap: llmstack.Upstream, parks: bool = True) -> None:
        config = llmstack.parse_models_ini(TIER + HOSTED)[0]
        self.log_path = directory / "engine.log"
        log = llmstack.Log(str(self.log_path))
        self.bays: Optional[llmstack.SwapBays] = None
        if parks:
            parking = llmstack.Parking(str(directory / "data"), config)
            self.bays = llmstack.SwapBays(parking, llmstack.local_tiers(config),
                                          lambda tier: "a" * 24, log)
        self.app = llmstack.SwapApp(config, lambda port: [sys.executable], {"LLAMA_API_KEY": "k"},
                                    log, str(directory / "swap.log"), self.bays)
        self.app.upstream = swap

    def settled(self) -> llmstack.Lease:
        """A lease of the tier, once its restoring has ended one way or the other."""
        lease = self.app.lease("code-fast")
        wait(self.bays.settle("code-fast", self.app.upstream).done)
        return lease


RUNNING = {"running": [
    {"model": "code-fast", "state": "starting", "proxy": "http://127.0.0.1:5800"},
    {"model": 7, "state": "ready"}, "no row", {"state": "ready"},
]}


@pytest.mark.parametrize("told", [b"not JSON", [], {}, {"running": None}, {"running": {}}, 500])
def test_a_llama_swap_that_tells_nonsense_tells_nothing(peer: Any, tmp_path: Path,
                                                        told: Any) -> None:
    swap = Swap(tmp_path, upstream_of(peer({"/running": told})))
    assert llmstack.running_states(swap.app.upstream) is None
    assert llmstack.ready_port(swap.app.upstream, "code-fast") == 0
    assert swap.app.watched() == {}
    lease = swap.app.lease("other")
    assert lease.ready(), "it is no tier: llama-swap says so itself"
    assert lease.stage() == "waiting for llama-swap to load other"


def test_a_llama_swap_that_died_has_lost_what_was_restored(tmp_path: Path, monkeypatch: Patch,
                                                           dead: llmstack.Upstream) -> None:
    swap = Swap(tmp_path, dead)
    swap.bays._settling["code-fast"] = llmstack.Settling()
    swap.app._process = SimpleNamespace(poll=lambda: -9)
    started: list[bool] = []
    monkeypatch.setattr(swap.app, "RESTART_S", -1)
    monkeypatch.setattr(swap.app, "_spawn", lambda: started.append(True))
    swap.app._closing = True
    swap.app.every_second()
    assert not started, "it was stopped"
    swap.app._closing = False
    swap.app.every_second()
    assert started
    assert swap.bays._settling == {}, "the next request restores again"


def test_a_loaded_models_pace_is_its_own(tmp_path: Path, dead: llmstack.Upstream) -> None:
    swap = Swap(tmp_path, dead)
    known = swap.bays._settling["code-fast"] = llmstack.Settling()
    loaded = llmstack.Pace(100.0, 5.0, True)
    bay: Any = SimpleNamespace(pace=lambda tokens: loaded)
    known.bay = bay
    assert swap.app.pace("code-fast", 5000) == loaded


def test_what_llama_swap_has_loaded_is_told_in_our_words(peer: Any, tmp_path: Path) -> None:
    swap = Swap(tmp_path, upstream_of(peer({"/running": RUNNING})))
    told = swap.app.watched()
    assert told["models"]["code-fast"] == {"state": "loading"}
    assert told["models"][llmstack.PROXY] == {"state": "not loaded"}
    assert told["parked"] == []
    assert llmstack.SwapLease(swap.app.upstream, "code-fast").stage() == "loading code-fast"
    ready = {"running": [{"model": "code-fast", "state": "ready"}]}
    up = upstream_of(peer({"/running": ready}))
    assert llmstack.SwapLease(up, "code-fast").stage() == ""
    assert llmstack.ready_port(up, "code-fast") == 0, "it says no address"


def test_a_path_that_llama_swap_cannot_route_names_its_model(tmp_path: Path,
                                                             dead: llmstack.Upstream) -> None:
    app = Swap(tmp_path, dead, parks=False).app
    assert app.target("code-fast", "/v1/chat/completions") == "/v1/chat/completions"
    assert app.target("code-fast", "/tokenize") == "/upstream/code-fast/tokenize"
    assert app.pace("code-fast", 5000) == llmstack.Pace()
    assert app.watched() == {}


def test_a_llama_swap_that_is_gone_keeps_no_request_waiting(tmp_path: Path,
                                                            dead: llmstack.Upstream) -> None:
    """What is parked stays; the request goes on and gets llama-swap's own error."""
    swap = Swap(tmp_path, dead)
    lease = swap.settled()
    lease.wait(15)
    assert lease.ready()
    assert lease.bay is None
    swap.app.log.flush()
    assert "code-fast: nothing is restored: " in swap.log_path.read_text()
    assert swap.bays._settling == {}, "the next request tries again"
    swap.bays.park("code-fast")
    swap.bays.save_when_due()


def test_a_model_that_did_not_get_ready_is_tried_again(peer: Any, tmp_path: Path) -> None:
    """llama-swap answers /health for a model that it has evicted again at once."""
    swap = Swap(tmp_path, upstream_of(peer({
        "/running": RUNNING, "/upstream/code-fast/health": {"status": "ok"}})))
    lease = swap.settled()
    assert lease.ready()
    assert lease.bay is None
    assert swap.bays._settling == {}


@pytest.mark.parametrize(("tokens", "restored"), [(0, 1), (5000, 0)])
def test_a_server_that_is_in_use_is_restored_into_no_more(
        peer: Any, tmp_path: Path, monkeypatch: Patch, tokens: int, restored: int) -> None:
    """Our daemon may have been restarted, and llama-swap's server not."""
    server = peer({"/slots": [{"id": 0, "n_prompt_tokens": tokens}]})
    row = {"model": "code-fast", "state": "ready", "proxy": f"http://127.0.0.1:{server.port}"}
    swap = Swap(tmp_path, upstream_of(peer({
        "/running": {"running": [row]}, "/upstream/code-fast/health": {"status": "ok"}})))
    restores: list[llmstack.Bay] = []
    monkeypatch.setattr(llmstack.Bay, "restore", lambda bay: restores.append(bay))
    assert swap.settled().ready()
    lease = swap.settled()
    assert lease.ready()
    assert lease.bay is not None
    assert len(restores) == restored
    assert swap.bays._parking.speeds.load_s("a" * 24) == 0, "it was loaded already"


def test_a_models_speed_is_known_before_it_is_loaded(tmp_path: Path,
                                                     dead: llmstack.Upstream) -> None:
    swap = Swap(tmp_path, dead)
    speeds = swap.bays._parking.speeds
    speeds.note("a" * 24, "code-fast", "load", 12.0)
    assert swap.app.pace("code-fast", 5000).load_s == 12.0
    assert swap.app.pace("far", 5000) == llmstack.Pace(), "LiteLLM's proxy reads no prompt"
    assert swap.app.pace("unknown", 5000) == llmstack.Pace()


# ---- our own daemon


@pytest.fixture
def daemon(monkeypatch: Patch, peer: Any) -> Callable[[Answers], llmstack.Places]:
    """Have this project's daemon, whose process is this one, answer as given."""

    def start(answers: Answers) -> llmstack.Places:
        places = llmstack.find_places(os.environ)
        port = peer(answers).port
        record = llmstack.Record(os.getpid(), llmstack.process_started(os.getpid()),
                                 llmstack.new_mark(places.work), "127.0.0.1", port, "embedded",
                                 engine_port=port)
        monkeypatch.setattr(llmstack, "running_record", lambda places: record)
        monkeypatch.setattr(llmstack, "read_stack", lambda places: record)
        monkeypatch.setattr(llmstack, "owned_process", lambda record, project: True)
        return places

    return start


@pytest.mark.parametrize(("told", "is_up"), [
    (401, True), (404, True), (500, False), (b"[t]\n", False)])
def test_a_daemon_is_up_where_its_router_answers_for_itself(
        daemon: Any, dead: llmstack.Upstream, told: Any, is_up: bool) -> None:
    """A key that is wanted, and a models.ini that is gone, are its words; 200 without a pid not."""
    places = daemon({"/models.ini": told})
    record = llmstack.read_stack(places)
    assert llmstack.answers(record, {}) is is_up
    assert not llmstack.answers(record._replace(started="then"), {})
    assert not llmstack.answers(record._replace(port=dead.port), {})


def test_a_key_that_no_header_carries_is_said() -> None:
    with pytest.raises(llmstack.UserError, match="more than printable ASCII") as caught:
        llmstack.api_key({"LLMSTACK_API_KEY": "\ufeffsecret"})
    assert caught.value.exit_code == 2
    assert llmstack.api_key({"LLMSTACK_API_KEY": "secret\n"}) == "secret"


@pytest.mark.parametrize(("memory", "gb"), [
    ({"resident": 5_000_000_000}, 5.0), ({"resident": "much"}, 0.0), ({}, 0.0), ("none", 0.0)])
def test_what_a_daemon_says_that_it_holds(daemon: Any, memory: Any, gb: float) -> None:
    places = daemon({"/llmstack/snapshot": {"memory": memory}})
    assert PROBE.running_gb(places, llmstack) == gb


BUDGET = {"budget_gb": 20.5, "host_gb": 48.0, "source": "2 NVIDIA cards", "gpu": True,
          "cuda": True, "cards": [10.5, "x", 10.0]}


def test_the_budget_of_a_running_daemon_counts(daemon: Any) -> None:
    places = daemon({"/llmstack/memory": BUDGET})
    found = FIT.running_machine(places, llmstack.Config(), llmstack)
    assert found == llmstack.Machine(20.5, "2 NVIDIA cards", True, True, 48.0, (10.5, 10.0))
    assert FIT.running_machine(places, llmstack.Config(memory_gb=12.0), llmstack) is None


@pytest.mark.parametrize("change", [
    {"budget_gb": None}, {"budget_gb": "20"}, {"host_gb": None}, {"source": 5},
    {"source": "memory_gb in models.ini"}])
def test_a_daemon_that_tells_no_budget_has_none(daemon: Any, change: dict[str, Any]) -> None:
    places = daemon({"/llmstack/memory": {**BUDGET, **change}})
    assert FIT.running_machine(places, llmstack.Config(), llmstack) is None


def test_a_daemon_that_is_older_tells_no_cards(daemon: Any) -> None:
    told = {name: value for name, value in BUDGET.items() if name != "cards"}
    found = FIT.running_machine(daemon({"/llmstack/memory": told}), llmstack.Config(), llmstack)
    assert found is not None
    assert found.cards == ()


def test_a_router_that_died_or_is_older_cannot_reload(daemon: Any,
                                                      dead: llmstack.Upstream) -> None:
    places = daemon({})
    record = llmstack.read_stack(places)
    assert llmstack.ask_reload(record, {}) == "it answers 404"
    gone = record._replace(port=dead.port)
    with pytest.raises(llmstack.UserError, match="the router does not answer"):
        llmstack.ask_reload(gone, {})


@pytest.mark.parametrize(("answers", "says"), [
    ({"/models.ini": 401}, "Engine   alive, but does not answer"),
    ({"/models.ini": 500, "/health": {}}, "Router   alive, but does not answer"),
    ({"/models.ini": 401, "/health": {}, "/llmstack/memory": {"pressure": "the machine swaps"}},
     "Memory   the machine swaps: idle models are unloaded, and none takes more"),
])
def test_status_says_which_half_of_a_daemon_ails(daemon: Any, answers: Answers, says: str,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    daemon(answers)
    state = Path.cwd() / ".llmstack"
    state.mkdir()
    (state / "models.ini").write_text("[DEFAULT]\nlocal_only = yes\n" + TIER)
    code = llmstack.main(["status"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(says) for line in lines), lines
    assert "local_only: no request leaves this machine" in lines
    assert code == int("Memory" not in says)


def test_nothing_runs_and_another_project_has_the_daemons(
        monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    demo = llmstack.find_places(os.environ, demo=True)
    monkeypatch.setattr(llmstack, "other_owner", lambda places: demo)
    assert llmstack.main(["status"]) == 1
    assert f"The daemons of this machine belong to {demo.work}." in capsys.readouterr().out
    assert llmstack.main(["stop"]) == 1
    assert "run `llmstack stop --demo`" in llmstack_spelled(capsys.readouterr().err)
    monkeypatch.setattr(llmstack, "other_owner", lambda places: llmstack.places_at("/d", "/other"))
    assert llmstack.main(["stop"]) == 1
    assert "hint: run it in /other\n" in capsys.readouterr().err
    monkeypatch.setattr(llmstack, "other_owner", lambda places: None)
    llmstack.main(["status", "--demo"])
    assert "Bring it up with `llmstack start --demo`." in llmstack_spelled(capsys.readouterr().out)


def llmstack_spelled(text: str) -> str:
    """A text with the program called by its name, however this suite was started."""
    return text.replace(f"`{llmstack.called_as()} ", "`llmstack ")


def test_a_project_without_tiers_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    state = Path.cwd() / ".llmstack"
    state.mkdir()
    (state / "models.ini").write_text("[DEFAULT]\nengine = embedded\n")
    assert llmstack.main(["start", "--detach"]) == 2
    assert "models.ini:1: names no tier" in capsys.readouterr().err
    assert not (state / "router.pid").exists()


PROXY_TIER = "[far]\nrole = agent\nmodel = anthropic/claude-sonnet-4-5\n"


@pytest.mark.parametrize(("told", "engine", "key", "state", "reason"), [
    ("available", "ready", "k", "loaded", ""),
    ("available", "starting", "k", "loading", ""),
    ("available", "", "k", "cold", ""),
    ("available", "ready", "", "no credential", "missing ANTHROPIC_API_KEY"),
    ("failing", "ready", "", "failing", "HTTP 529"),
])
def test_a_hosted_tier_is_as_its_router_and_its_proxy_say(
        daemon: Any, monkeypatch: Patch, told: str, engine: str, key: str, state: str,
        reason: str) -> None:
    rows = [{"model": llmstack.PROXY, "state": engine, "seconds": 5}] if engine else []
    said = {"state": told, "reason": "HTTP 529" if told == "failing" else ""}
    places = daemon({"/models.ini": 401, "/health": {}, "/running": {"running": rows},
                     "/llmstack/state": {"far": said, "near": "no row"}})
    # The credentials of the daemon's terminal count, not those of this one.
    env = {"HOME": "/h", **({"ANTHROPIC_API_KEY": key} if key else {})}
    monkeypatch.setattr(llmstack, "process_environment", lambda pid: env)
    config = llmstack.parse_models_ini(PROXY_TIER)[0]
    row, = llmstack.stack_status(places, config)["tiers"]
    assert (row["state"], row["reason"]) == (state, reason)
    assert row["since_s"] == (5.0 if engine and told == "available" else None)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_how_long_a_model_of_llama_swap_has_run_is_its_servers_age(
        peer: Any, dead: llmstack.Upstream) -> None:
    """llama-swap tells no times; of a server on another machine nothing is known."""
    server = peer({})
    row = {"model": "m", "state": "ready", "proxy": f"http://127.0.0.1:{server.port}"}
    age_s = llmstack._since_s(upstream_of(server), row)
    assert age_s is not None
    assert age_s >= 0
    assert llmstack._since_s(llmstack.Upstream("192.0.2.1", 1), row) is None
    assert llmstack._since_s(upstream_of(server), {**row, "seconds": "soon"}) is None
    gone = {**row, "proxy": f"http://127.0.0.1:{dead.port}"}
    assert llmstack._since_s(upstream_of(server), gone) is None


def test_a_tier_that_the_engine_was_started_without_is_not_served() -> None:
    """The router reads models.ini again; the engine and LiteLLM's proxy do not."""
    places = llmstack.find_places(os.environ)
    plan = llmstack.Plan(places, llmstack.parse_models_ini(TIER)[0], "127.0.0.1", 0)
    direct = "[direct]\nrole = agent\nbase_url = http://127.0.0.1:1/v1\nmodel = m\n"
    more = TIER.replace("code-fast", "new").replace("role = fast", "role = plan")
    config = llmstack.parse_models_ini(TIER + more + direct)[0]
    told = llmstack.unserved_tiers(plan, config)
    assert told == {"new": "the engine does not know it before `llmstack restart`"}


# ---- the programs that a start needs


def test_a_llama_server_that_is_named_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    data = str(tmp_path)
    for named in (str(tmp_path / "gone"), str(tmp_path / "text"), "no-such-llama-server"):
        with pytest.raises(llmstack.UserError, match="LLAMA_SERVER_BIN names") as caught:
            llmstack.find_llama_server(llmstack.Config(), {"LLAMA_SERVER_BIN": named}, data)
        assert caught.value.exit_code == 2
    config = llmstack.Config().with_settings({"llama_server_bin": "no-such-llama-server"})
    with pytest.raises(llmstack.UserError, match=r"llama_server_bin in models\.ini names"):
        llmstack.find_llama_server(config, {}, data)
    config = config._replace(tiers=llmstack.parse_models_ini(TIER)[0].tiers)
    assert llmstack.refused_notes(config, {}, data) == [], "check_plan has said it"


def test_a_llama_server_on_path_is_taken(tmp_path: Path, monkeypatch: Patch) -> None:
    program = tmp_path / ("llama-server" + llmstack.EXE)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert llmstack.find_llama_server(llmstack.Config(), {}, str(tmp_path)) == (str(program),)


@pytest.mark.parametrize(("refused", "park_gb", "parks"), [
    ([], 4.0, True), (["--slot-save-path"], 4.0, False), ([], 0.0, False)])
def test_a_llama_server_that_cannot_park_is_not_told_to(
        tmp_path: Path, monkeypatch: Patch, refused: list[str], park_gb: float,
        parks: bool) -> None:
    monkeypatch.setattr(llmstack, "find_llama_server", lambda config, env, data: ("llama-server",))
    monkeypatch.setattr(llmstack, "probe_flags", lambda *_: frozenset(refused))
    config = llmstack.Config(park_gb=park_gb)
    server = llmstack.swap_binary(config, {}, str(tmp_path))
    assert ("--slot-save-path" in server.program) is parks


def test_litellms_port_is_one_of_those_that_a_start_needs(
        monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    places = llmstack.find_places(os.environ)
    config = llmstack.parse_models_ini(PROXY_TIER)[0]
    plan = llmstack.Plan(places, config, "127.0.0.1", 10101)
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: "")
    assert "litellm_port" not in llmstack._plan_ports(plan)
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: "/bin/litellm")
    assert llmstack._plan_ports(plan)["litellm_port"] == ("127.0.0.1", config.litellm_port)
    proxy = SimpleNamespace(port=10103, preload=False)
    monkeypatch.setattr(llmstack, "plan_proxy", lambda *_: proxy)
    llmstack._say_started(plan)
    assert "LiteLLM http://127.0.0.1:10103/ui, on demand\n" in capsys.readouterr().out
    proxy.preload = True
    llmstack._say_started(plan)
    assert "LiteLLM http://127.0.0.1:10103/ui, starting" in capsys.readouterr().out


def test_an_engine_that_is_asked_for_must_be_there(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(llmstack, "find_llama_swap", lambda env, data: "")
    with pytest.raises(llmstack.UserError, match="there is no llama-swap on PATH"):
        llmstack.choose_engine(llmstack.Config(engine="llama-swap"), {}, str(tmp_path))
    assert llmstack.choose_engine(llmstack.Config(engine="auto"), {}, str(tmp_path)) == "embedded"


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_an_address_of_every_interface_needs_a_key(host: str) -> None:
    with pytest.raises(llmstack.UserError, match="can be reached by others"):
        llmstack.check_exposure(host, llmstack.Config(), {})
    llmstack.check_exposure(host, llmstack.Config(), {"LLMSTACK_API_KEY": "k"})


def test_a_port_that_another_took_meanwhile_is_named(peer: Any) -> None:
    server = peer({})
    app: Any = None
    with pytest.raises(llmstack.UserError, match=f"port {server.port}: taken by ") as caught:
        llmstack.listen("127.0.0.1", server.port, app)
    assert "choose another --port" in caught.value.hint
