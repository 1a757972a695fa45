"""Hosted tiers: hosts that the router asks itself, over TLS too, samplers, offline as a state, local_only, the next channel."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import pytest

import llmstack
from llmstack import Config, Tier, chunk, parse_models_ini
from tests.scripted import WAIT_S, Message, Script, ScriptedUpstream, always, answer, reply_with, wait
from tests.test_router import EVENTS, JSON_CHUNKED, OK, SSE_CHUNKED, Client, HeardLog, chat, error_of, post, request

FINE = always(OK)
KEY = "gsk-only-for-the-host-0123456789"
ENV = {"GROQ_API_KEY": f"{KEY}\n", "LLMSTACK_API_KEY": "ours-and-nobodys"}
ID = 'accounts/we/models/"best"é\\1'
SMART = Tier("code-smart", "agent", ctx_size=65_536, aliases=("coder",))
FAST = Tier("code-fast", "fast", ctx_size=131_072)
PROXIED = Tier("plan", "plan", backend="litellm", model="anthropic/x", sampler=(("temp", 0.7),), aliases=("planner",))


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Rig:
    """A router on port 0; behind it a scripted engine, and a scripted host for the tier code-ultra."""

    def __init__(self, engine: Optional[Script], host: Optional[Script], *, tls: Optional[ssl.SSLContext] = None,
                 path: str = "/v1", url: str = "", tiers: tuple[Tier, ...] = (SMART, FAST, PROXIED), local_only: bool = False,
                 env: Optional[dict[str, str]] = None, **tier: Any) -> None:
        self._others = set(threading.enumerate())
        self.engine, self.host = ScriptedUpstream(engine), ScriptedUpstream(host, tls=tls)
        self.log, self.clock = HeardLog(), Clock()
        settings: dict[str, Any] = {"backend": "openai", "model": ID, "api_key_env": "GROQ_API_KEY", "ctx_size": 24_000,
                                    "aliases": ("best",), **tier}
        self.url = url or f"{'https' if tls else 'http'}://127.0.0.1:{self.host.port}{path}"
        ultra = Tier("code-ultra", "ultra", base_url=self.url, **settings)
        channel = "next" if tier.get("model_next") else "current"
        self.config = Config(tiers=(ultra, *tiers), local_only=local_only).on_channel(channel)
        setting = llmstack.Setting(
            env=ENV if env is None else env, clock=self.clock,
            reload=lambda: self.config)
        behind = llmstack.UpstreamApp(llmstack.Upstream("127.0.0.1", self.engine.port), self.log)
        self.app = llmstack.RouterApp(self.config, behind, self.log, setting)
        self._server = llmstack.Server("127.0.0.1", 0, self.app)
        self.port: int = self._server.server_port
        self._clients: list[Client] = []
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.002,), daemon=True)
        self._thread.start()

    def client(self) -> Client:
        self._clients.append(Client(self.port))
        return self._clients[-1]

    def ask(self, request: bytes) -> Message:
        return self.client().ask(request)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._server.shutdown()
        self._thread.join(WAIT_S)
        self._server.server_close()
        for up in (self.app.behind.upstream, *self.app._snapshot.hosts.values()):
            up.forget()
        for scripted in (self.engine, self.host):
            scripted.close()
        for thread in set(threading.enumerate()) - self._others:
            thread.join(WAIT_S)
            assert not thread.is_alive(), thread
        assert not self.log.says("internal error"), self.log.line_with("internal error")
        for secret in (KEY, ENV["LLMSTACK_API_KEY"]):
            assert not self.log.says(secret)


Start = Callable[..., Rig]


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """No processes here, but for the tests at the end, which stop theirs; threads are seen to by Rig.close."""


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(llmstack, "PATIENCE_MS", 5)     # the suite's time, not its outcome
    with contextlib.ExitStack() as stack:
        def start(engine: Optional[Script] = FINE, host: Optional[Script] = FINE, **settings: Any) -> Rig:
            rig = Rig(engine, host, **settings)
            stack.callback(rig.close)
            return rig
        yield start


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority of our own, and a certificate for 127.0.0.1 that it has signed."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make certificates with")
    at = tmp_path_factory.mktemp("tls")
    (at / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for command in (["req", "-x509", *key, "-days", "2", "-subj", "/CN=our CA", "-keyout", "ca.key", "-out", "ca.pem"],
                    ["req", *key, "-subj", "/CN=host", "-keyout", "host.key", "-out", "host.csr"],
                    ["x509", "-req", "-in", "host.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
                     "-extfile", "ext", "-out", "host.pem"]):
        subprocess.run([openssl, *command], check=True, stderr=subprocess.DEVNULL, cwd=at)
    return at


@pytest.fixture
def tls(authority: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """What the host speaks; the router trusts its authority."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "host.pem", authority / "host.key")
    return context


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nothing listens, held so that nothing else can."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def model_of(message: Message) -> str:
    return str(message.json["model"])


def write_ini(text: str) -> None:
    """The project's models.ini, trusted as one is that its user wrote."""
    Path(".llmstack").mkdir(exist_ok=True)
    Path(".llmstack/models.ini").write_text(text)
    llmstack.trust_project(llmstack.find_places(os.environ))


# ---- what a host gets


@pytest.mark.parametrize("name", ["auto", "code-ultra", "best", None])
def test_a_host_gets_its_own_id_its_key_and_nothing_of_the_clients(start: Start, name: Optional[str]) -> None:
    rig = start()
    theirs = ("Authorization: Bearer client-secret", "X-Api-Key: client-secret", "Cookie: a=client-secret",
              "api-key: client-secret", "X-Named: client-secret", "Connection: x-named, keep-alive", "Accept-Encoding: gzip",
              "anthropic-version: 2023-06-01")
    got = rig.ask(chat(name, *theirs, text="a \u00e9 \\ \" model"))
    assert (got.status, rig.engine.requests) == (200, [])
    sent = rig.host.requests[0]
    assert sent.header("authorization") == f"Bearer {KEY}"
    assert (sent.target, sent.header("anthropic-version"), sent.header("accept-encoding")) == (
        "/v1/chat/completions", "2023-06-01", "identity")
    assert b"client-secret" not in sent.raw
    assert KEY not in got.raw.decode("latin-1")
    expected = chat(name, text="a \u00e9 \\ \" model").partition(b"\r\n\r\n")[2].replace(
        json.dumps(name).encode(), json.dumps(ID).encode(), 1)
    assert sent.body == expected
    assert sent.header("content-length") == str(len(sent.body))


def test_the_routers_own_key_goes_to_no_host(start: Start) -> None:
    rig = start()
    rig.app._given = rig.app._given._replace(key="ours-and-nobodys")
    for line in ("Authorization: Bearer ours-and-nobodys", "x-api-key: ours-and-nobodys"):
        assert rig.ask(chat("code-ultra", line)).status == 200
        assert b"ours-and-nobodys" not in rig.host.requests[-1].raw
        assert rig.host.requests[-1].header("authorization") == f"Bearer {KEY}"
    assert rig.ask(chat("code-ultra")).status == 401
    assert len(rig.host.requests) == 2


def test_a_host_without_a_key_gets_none(start: Start) -> None:
    rig = start(api_key_env="")
    assert rig.ask(chat("code-ultra", "Authorization: Bearer client-secret")).status == 200
    assert rig.host.requests[0].all("authorization") == []


@pytest.mark.parametrize(("base", "asked", "target"), [
    ("", "/v1/chat/completions", "/v1/chat/completions"),
    ("/v1", "/chat/completions", "/v1/chat/completions"),
    ("/openai/v1", "/v1/messages?beta=true", "/openai/v1/messages?beta=true"),
    ("/openai/v1/", "/v1/responses/", "/openai/v1/responses"),
    ("/v1beta/openai", "/v1/chat/completions", "/v1beta/openai/chat/completions"),
    ("/api/paas/v4", "/v1/completions", "/api/paas/v4/completions"),
    ("/v1", "/v1/embeddings?x=1", "/v1/embeddings?x=1"),
])
def test_the_path_on_the_host(start: Start, base: str, asked: str, target: str) -> None:
    rig = start(path=base)
    assert rig.ask(chat("code-ultra", target=asked)).status == 200
    assert rig.host.requests[0].target == target
    assert rig.host.requests[0].json["model"] == ID


def test_other_requests_still_pass_to_the_engine(start: Start) -> None:
    rig = start()
    for body in (post({"model": "code-smart", "input": "x"}, target="/v1/embeddings"),
                 post(b"no json", target="/v1/audio/speech"),
                 post([1], target="/x"), post({"model": ["code-ultra"]}, target="/x"), request("GET", "/slots"),
                 chat("coder"), chat("unknown")):
        assert rig.ask(body).status == 200
    assert (len(rig.engine.requests), rig.host.requests) == (7, [])


def test_v1_models_lists_the_tier_and_every_tiers_channel(start: Start) -> None:
    listing = answer(json.dumps({"object": "list", "data": [
        {"id": "code-smart", "meta": {"llamaswap": {"channel": "current"}}}, {"id": "coder"}, {"id": "plan"}]}).encode(),
        "200 OK", "Connection: close")
    rig = start(always(listing), model_next="vendor/next", tiers=(SMART._replace(hf_file_next="x.gguf"), FAST, PROXIED))
    entries = {e["id"]: e for e in rig.ask(request("GET", "/v1/models")).json["data"]}
    assert list(entries) == ["auto", "code-ultra", "code-smart", "plan"]
    assert {name: (e["channel"], e["meta"]["llmstack"]["channel"]) for name, e in entries.items() if name != "auto"} == {
        "code-smart": ("next",) * 2, "plan": ("current",) * 2, "code-ultra": ("next",) * 2}
    assert entries["code-smart"]["meta"]["llamaswap"] == {"channel": "current"}
    assert entries["code-ultra"]["meta"]["llmstack"]["model"] == "vendor/next"
    assert entries["code-ultra"]["meta"]["llmstack"]["ctx_size"] == 24_000


# ---- samplers

SAMPLED = (("temp", 0.5), ("top_p", 0.85), ("top_k", 20.0), ("min_p", 0.05), ("rep_pen", 1.05))
MEMBERS = b'"temperature":0.5,"top_p":0.85,"top_k":20,"min_p":0.05,"repetition_penalty":1.05'


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize(("body", "sent"), [
    (b'{"model":"%b","messages":[]}', b'{%b,"model":"%b","messages":[]}'),
    (b' \n{ "messages" : [ ] ,\t"model" : "%b" } ', b' \n{%b, "messages" : [ ] ,\t"model" : "%b" } '),
])
def test_the_sampler_goes_into_the_body_byte_for_byte(start: Start, target: str, body: bytes, sent: bytes) -> None:
    rig = start(sampler=SAMPLED)
    for name in ("auto", "code-ultra"):
        assert rig.ask(post(body % name.encode(), target=target)).status == 200
        assert rig.host.requests[-1].body == sent % (MEMBERS, json.dumps(ID)[1:-1].encode())


@pytest.mark.parametrize(("given", "added"), [
    ('"temperature":null', ["top_p", "top_k", "min_p", "repetition_penalty"]),
    ('"top_p":1,"temperature":0', ["top_k", "min_p", "repetition_penalty"]),
    ('"repeat_penalty":1.2,"top_k":1', ["temperature", "top_p", "min_p"]),
    ('"temperature":1,"top_p":1,"top_k":1,"min_p":0,"repetition_penalty":1', []),
    ('"extra":{"temperature":1}', ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"]),
])
def test_what_the_caller_sets_wins(start: Start, given: str, added: list[str]) -> None:
    rig = start(sampler=SAMPLED)
    body = b'{%b,"model":"code-ultra"}' % given.encode()
    rig.ask(post(body))
    sent = rig.host.requests[0].body
    members = b",".join(m for m in MEMBERS.split(b",") if json.loads(b"{%b}" % m).keys() <= set(added))
    expected = b"{" + (members + b"," if members else b"") + body[1:].replace(b"code-ultra", json.dumps(ID)[1:-1].encode())
    assert sent == expected


def test_an_empty_body_gets_well_formed_members(start: Start) -> None:
    rig = start(sampler=SAMPLED)
    rig.ask(post(b"{}"))
    assert rig.host.requests[0].body == b'{"model":%b,%b}' % (json.dumps(ID).encode(), MEMBERS)


def test_no_sampler_and_no_counting_of_tokens_change_nothing(start: Start) -> None:
    rig = start(sampler=SAMPLED)
    rig.ask(chat("code-ultra", target="/v1/messages/count_tokens"))
    assert set(rig.host.requests[0].json) == {"model", "messages"}
    rig = start()
    rig.ask(chat("code-ultra"))
    assert set(rig.host.requests[0].json) == {"model", "messages"}


def test_a_litellm_tier_gets_its_sampler_through_the_engine_and_a_local_one_is_never_touched(start: Start) -> None:
    rig = start(tiers=(SMART._replace(sampler=SAMPLED), FAST, PROXIED))
    for name in ("plan", "planner"):
        rig.ask(chat(name, "Authorization: Bearer theirs"))
        sent = rig.engine.requests[-1]
        assert sent.body.startswith(b'{"temperature":0.7,"model": "plan"')
        assert sent.header("authorization") == "Bearer theirs"
    body = chat("coder", temperature=1)
    rig.ask(body)
    assert rig.engine.requests[-1].body == body.partition(b"\r\n\r\n")[2]
    rig.ask(chat(text="x" * 80_000))
    assert set(rig.engine.requests[-1].json) == {"model", "messages"}


# ---- the next channel


def test_model_next_runs_on_the_next_channel(start: Start) -> None:
    rig = start(model_next="vendor/next", tiers=(SMART, FAST, PROXIED._replace(model_next="anthropic/y")))
    for name in ("auto", "best"):
        rig.ask(chat(name))
        assert model_of(rig.host.requests[-1]) == "vendor/next"
    rig.ask(chat("planner"))
    assert model_of(rig.engine.requests[-1]) == "plan_next"


def test_a_tier_without_an_upgrade_stays_on_the_next_channel(start: Start) -> None:
    rig = start(model_next="vendor/next")
    rig.ask(chat("planner"))
    assert model_of(rig.engine.requests[-1]) == "plan"


LOCAL = "[code-fast]\nrole = fast\npath = x.gguf\n"
HOSTED = "[code-ultra]\nrole = ultra\nbase_url = http://127.0.0.1:9/v1\nmodel = a/b\n"


@pytest.mark.parametrize("argv", [["start", "--next"], ["restart", "--next"], ["start"]])
def test_next_with_nothing_queued_is_an_error_that_says_so(
        argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_ini(LOCAL + HOSTED)
    if argv == ["start"]:
        monkeypatch.setenv("LLMSTACK_USE_NEXT", "1")
    monkeypatch.setattr(llmstack, "start_stack", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(llmstack, "stop_stack", lambda *_: pytest.fail("stopped"))
    assert llmstack.main(argv) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error == "llmstack: error: no tier has a queued upgrade, so there is no next channel to run"
    assert "model_next" in hint


@pytest.mark.parametrize(("argv", "env", "pinned", "queued", "channel"), [
    (["start"], "", "", LOCAL + "model_next = x\n" + HOSTED, "current"),
    (["start", "--next"], "", "", LOCAL + HOSTED + "model_next = x\n", "next"),
    (["start", "--next"], "", "", LOCAL + "hf_repo = a/b\nhf_file_next = x\n", "next"),
    (["start"], "1", "", HOSTED + "model_next = x\n", "next"),
    (["start"], "", "next\n", HOSTED + "model_next = x\n", "next"),
    (["start"], "", "current\n", HOSTED + "model_next = x\n", "current"),
    (["start", "--current"], "1", "next\n", HOSTED + "model_next = x\n", "current"),
    (["start"], "", "next\n", HOSTED, "current"),
    (["restart"], "", "next\n", HOSTED + "model_next = x\n", "next"),
])
def test_the_channel_that_is_run(argv: list[str], env: str, pinned: str, queued: str, channel: str,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    write_ini(queued)
    if pinned:
        Path(".llmstack/default-channel").write_text(pinned)
    monkeypatch.setenv("LLMSTACK_USE_NEXT", env)
    plans: list[llmstack.Plan] = []
    monkeypatch.setattr(llmstack, "check_plan", lambda plan: None)
    monkeypatch.setattr(llmstack, "stop_stack", lambda *_: False)
    monkeypatch.setattr(llmstack, "start_stack", lambda plan, *_: bool(plans.append(plan)))
    assert llmstack.main([*argv, "--detach"]) == 0
    assert [p.channel for p in plans] == [channel]


# ---- TLS


def test_tls_streams_event_by_event_and_is_kept(start: Start, tls: ssl.SSLContext) -> None:
    rig = start(host=None, tls=tls)
    client = rig.client()
    client.send(chat("code-ultra", stream=True))
    up = rig.host.next()
    for more in (True, False):
        assert model_of(up.read()) == ID
        up.send(SSE_CHUNKED)
        client.read_head()
        for event in EVENTS:
            up.send(chunk(event))
            assert client.read_chunk() == event
        up.send(b"0\r\n\r\n")
        assert client.take(5) == b"0\r\n\r\n"
        if more:
            client.send(chat("code-ultra", stream=True))
    assert rig.host.connections == 1


def test_tls_a_record_that_holds_more_than_one_read(start: Start, tls: ssl.SSLContext) -> None:
    """What OpenSSL has decrypted and not handed out is seen by no selector."""
    big = b"x" * 3_000_000
    rig = start(host=always(answer(big)), tls=tls)
    assert rig.ask(chat("code-ultra")).body == big


@pytest.mark.parametrize("name", ["auto", "code-ultra"])
def test_a_client_that_leaves_cancels_at_the_host(start: Start, tls: ssl.SSLContext, name: str) -> None:
    rig = start(host=None, tls=tls)
    for streaming in (False, True):
        client = rig.client()
        client.send(chat(name, stream=streaming))
        up = rig.host.next()
        up.read()
        if streaming:
            up.send(SSE_CHUNKED, chunk(EVENTS[0]))
            client.read_head()
        client.close()
        assert up.ended()


def test_a_certificate_that_does_not_verify_is_said_plainly(start: Start, tls: ssl.SSLContext,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    rig = start(tls=tls)
    message = error_of(rig.ask(chat("code-ultra")))["message"]
    assert f"no answer from https://127.0.0.1:{rig.host.port} (its certificate does not verify: " in message
    assert "SSL_CERT_FILE" in message
    got = rig.ask(chat())
    assert (got.status, got.header("x-llmstack-model"), rig.host.requests) == (200, "code-smart", [])


def test_tls_to_a_host_that_speaks_none(start: Start) -> None:
    rig = start(host=None, url="https://127.0.0.1:1/v1")
    host = next(iter(rig.app._snapshot.hosts.values()))
    host.port = rig.host.port
    client = rig.client()
    client.send(chat("code-ultra"))
    rig.host.next().send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert "TLS failed: wrong version number" in error_of(client.read_message("POST"))["message"]


# ---- fallback


@pytest.mark.parametrize("status", ["401 No", "402 Payment Required", "404 Not Found", "429 Too Many", "500 Oh", "503 No"])
def test_auto_falls_back_from_a_host_with_the_reason_in_a_header(start: Start, status: str) -> None:
    rig = start(host=always(answer(b"{}", status, "Retry-After: 50")), sampler=SAMPLED)
    got = rig.ask(chat("auto", "Authorization: Bearer theirs"))
    assert (got.status, got.header("x-llmstack-model")) == (200, "code-smart")
    assert got.header("x-llmstack-fallback") == f"code-ultra\u2192code-smart ({status[:3]})"
    sent = rig.engine.requests[0]
    assert (set(sent.json), sent.json["model"], sent.header("authorization")) == (
        {"model", "messages"}, "code-smart", "Bearer theirs")
    rig.clock.now_s += 49
    assert rig.ask(chat()).all("x-llmstack-fallback") == []
    assert len(rig.host.requests) == 1
    got = rig.ask(chat("code-ultra"))           # by name it is asked, and its answer is passed through
    assert (got.status, got.json) == (int(status[:3]), {})


def test_a_host_that_keeps_failing_is_left_alone_longer_each_time(start: Start) -> None:
    rig = start(host=always(answer(b"{}", "500 Oh")))
    for seconds in (20, 40, 80, 160, 300, 300):
        asked = len(rig.host.requests)
        for _ in range(2):
            rig.ask(chat())
        rig.clock.now_s += seconds - 1
        rig.ask(chat())
        assert len(rig.host.requests) == asked + 1
        rig.clock.now_s += 2


def test_a_litellm_tier_that_keeps_failing_is_left_alone_longer_each_time(start: Start) -> None:
    rig = start(reply_with(lambda m: OK if model_of(m) == "code-fast" else answer(b"{}", "500 Oh")),
                tiers=(PROXIED._replace(role="agent", name="hosted"), FAST))
    ask = chat(text="x" * 100_000)              # beyond the top tier
    for seconds in (20, 40, 80):
        asked = len(rig.engine.requests)
        assert rig.ask(ask).header("x-llmstack-fallback") == "hosted\u2192code-fast (500)"
        rig.clock.now_s += seconds - 1
        assert rig.ask(ask).all("x-llmstack-fallback") == []
        assert len(rig.engine.requests) == asked + 3
        rig.clock.now_s += 2


def test_litellms_spelling_of_retry_after_is_kept_to(start: Start) -> None:
    """LiteLLM passes a provider's Retry-After on as llm_provider-retry-after only."""
    rig = start(reply_with(lambda m: OK if model_of(m) == "code-fast" else
                           answer(b"{}", "429 Too Many", "llm_provider-retry-after: 90")),
                tiers=(PROXIED._replace(role="agent", name="hosted"), FAST))
    ask = chat(text="x" * 100_000)
    rig.ask(ask)
    for seconds, asked in ((89, 0), (2, 1)):
        before = len(rig.engine.requests)
        rig.clock.now_s += seconds
        rig.ask(ask)
        assert len(rig.engine.requests) == before + 1 + asked


def test_an_answer_ends_the_growing(start: Start) -> None:
    failing = [True, True, False, True]
    rig = start(host=reply_with(lambda m: answer(b"{}", "500 Oh") if failing.pop(0) else OK))
    for seconds in (20, 40, 0, 20):
        rig.ask(chat())
        rig.clock.now_s += seconds + 1
    assert rig.app._breaker.down() == {}


def test_a_tier_that_answers_by_name_is_auto_s_again(start: Start) -> None:
    failing = [True, False]
    rig = start(host=reply_with(lambda m: answer(b"{}", "500 Oh") if failing.pop(0) else OK))
    rig.ask(chat())
    assert "code-ultra" in rig.app._breaker.down()
    client = rig.client()
    assert client.ask(chat("code-ultra")).status == 200
    client.ask(b"GET /llmstack/state HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")     # its thread has ended with the first by then
    assert rig.app._breaker.down() == {}


def test_a_host_that_hangs_up_trips_the_breaker_and_is_not_offline(start: Start) -> None:
    rig = start(host=reply_with(lambda m: None))
    got = rig.ask(chat())
    assert got.header("x-llmstack-fallback") == "code-ultra\u2192code-smart (closed the connection without an answer)"
    for seconds in (20, 40, 80):
        asked = len(rig.host.requests)
        rig.clock.now_s += seconds - 1
        assert rig.ask(chat()).all("x-llmstack-fallback") == []
        assert rig.app.state()["code-ultra"]["state"] == "failing"
        assert len(rig.host.requests) == asked
        rig.clock.now_s += 2
        assert "code-ultra" in rig.ask(chat()).header("x-llmstack-fallback")


# ---- offline as a state


def free_threads(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(WAIT_S)


def test_offline_latches_once_and_is_probed_back(start: Start, closed_port: int) -> None:
    rig = start(url=f"http://127.0.0.1:{closed_port}/v1")
    host = next(iter(rig.app._snapshot.hosts.values()))
    got = rig.ask(chat())
    assert (got.header("x-llmstack-model"), got.header("x-llmstack-fallback")) == (
        "code-smart", "code-ultra\u2192code-smart (connection refused)")
    assert "auto runs locally meanwhile" in rig.log.line_with("offline")
    assert rig.app.state()["code-ultra"] == {
        "state": "offline", "reason": f"no connection to http://127.0.0.1:{closed_port} for 0 s (connection refused)"}
    dialled: list[float] = []
    dial = host._dial

    def heard() -> Any:
        dialled.append(rig.clock.now_s)
        return dial()
    host._dial = heard                          # type: ignore[method-assign]
    began = rig.clock.now_s
    for _ in range(200):                        # 200 s of a fake clock: nothing is tried but the growing probes
        rig.clock.now_s += 1
        host.look_again()
        free_threads("probe")
    assert [at - began for at in dialled] == [2, 6, 14, 30, 62, 122, 182]
    got = rig.ask(chat())
    assert (got.header("x-llmstack-model"), got.all("x-llmstack-fallback")) == ("code-smart", [])
    assert "no connection to" in got.header("x-llmstack-reason")
    host.port = rig.host.port                   # the network is back
    rig.clock.now_s += 60
    host.look_again()
    rig.log.line_with("back: ")
    assert rig.ask(chat()).header("x-llmstack-model") == "code-ultra"
    assert rig.host.requests[0].header("authorization") == f"Bearer {KEY}"
    assert sum("offline" in line for line in rig.log._lines) == 1


def test_a_probe_carries_neither_request_nor_key(start: Start) -> None:
    rig = start(host=None)
    host = next(iter(rig.app._snapshot.hosts.values()))
    host._mark_lost("no route")
    rig.clock.now_s += 3
    host.look_again()
    assert rig.host.next().rest() == b""
    rig.log.line_with("back: ")


def test_asked_by_name_an_offline_host_is_tried_and_found_again(start: Start, closed_port: int) -> None:
    rig = start(url=f"http://127.0.0.1:{closed_port}/v1")
    got = rig.ask(chat("code-ultra"))
    assert got.status == 502
    assert "(connection refused)" in error_of(got)["message"]
    host = next(iter(rig.app._snapshot.hosts.values()))
    assert host.offline
    host.port = rig.host.port
    assert rig.ask(chat("code-ultra")).status == 200
    assert not host.offline


def test_a_host_that_does_not_answer_to_the_connection_gives_way_soon(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(llmstack, "HOST_CONNECT_S", 0.02)
    rig = start()
    host = next(iter(rig.app._snapshot.hosts.values()))
    dial = host._dial

    def slow() -> Any:
        wait(release)
        return dial()
    host._dial = slow                           # type: ignore[method-assign]
    got = rig.ask(chat())
    assert got.header("x-llmstack-fallback") == "code-ultra\u2192code-smart (no answer to the connection)"
    release.set()
    free_threads("dial")
    assert rig.host.requests == []


def test_a_client_that_leaves_while_a_host_is_dialled_is_noticed(start: Start) -> None:
    release, dialling = threading.Event(), threading.Event()
    rig = start()
    host = next(iter(rig.app._snapshot.hosts.values()))
    dial = host._dial

    def slow() -> Any:
        dialling.set()
        wait(release)
        return dial()
    host._dial = slow                           # type: ignore[method-assign]
    client = rig.client()
    client.send(chat())
    wait(dialling)
    client.close()
    rig.log.line_with("the client left")
    release.set()
    free_threads("dial")
    assert (rig.host.requests, host.offline) == ([], "")


def test_a_connection_that_was_handed_over_is_left_open(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the thread that dialled runs on: it was interrupted where it had just said that it is done."""
    answered = threading.Event()

    class Event(threading.Event):
        def set(self) -> None:
            super().set()
            if sys._getframe(1).f_code.co_name == "dial":
                wait(answered)

    rig = start()
    host = next(iter(rig.app._snapshot.hosts.values()))
    monkeypatch.setattr(threading, "Event", Event)
    sock = host.connect()
    answered.set()
    free_threads("dial")
    with sock:
        assert sock.fileno() >= 0


def test_a_reload_keeps_what_is_known_of_a_host(start: Start, closed_port: int) -> None:
    rig = start(url=f"http://127.0.0.1:{closed_port}/v1")
    rig.ask(chat())
    rig.app.reload()
    assert rig.app.state()["code-ultra"]["state"] == "offline"


# ---- local_only


def test_local_only_sends_nothing_out_fallback_included(start: Start) -> None:
    rig = start(always(answer(b"{}", "503 No")), local_only=True, url="http://203.0.113.1:9/v1")
    got = rig.ask(chat())
    assert (got.status, got.header("x-llmstack-model")) == (503, "code-fast")
    assert [model_of(m) for m in rig.engine.requests] == ["code-smart", "code-fast"]
    for name in ("code-ultra", "best", "plan", "planner"):
        for target in ("/v1/chat/completions", "/v1/embeddings"):
            error = error_of(rig.ask(chat(name, target=target)))
            assert (error["code"], error["type"]) == (403, "forbidden")
            assert "local_only = yes" in error["message"]
    assert len(rig.engine.requests) == 2
    assert rig.app.state()["code-ultra"]["state"] == "local_only"
    listed = [e["id"] for e in rig.ask(request("GET", "/v1/models")).json["data"]]
    assert listed == ["auto", "code-smart", "code-fast"]


def test_local_only_leaves_hosted_tiers_out_of_what_clients_are_told() -> None:
    config = parse_models_ini("[DEFAULT]\nlocal_only = yes\n" + GROQ + LOCAL)[0]
    told = json.loads(llmstack.render_opencode_json(config, "http://127.0.0.1:1", "/x/AGENTS.md"))
    assert list(told["provider"]["llama.cpp"]["models"]) == ["auto", "code-fast"]


def test_local_only_forbids_another_machine_behind_the_router(capsys: pytest.CaptureFixture[str]) -> None:
    write_ini("[DEFAULT]\nlocal_only = yes\n" + LOCAL)
    assert llmstack.main(["serve", "--port", "0", "--upstream", "http://10.0.0.5:8080"]) == 2
    assert "is not on this machine" in capsys.readouterr().err


def test_a_host_on_this_machine_is_local(start: Start) -> None:
    rig = start(local_only=True)
    for name in ("auto", "code-ultra"):
        assert rig.ask(chat(name)).status == 200
        assert model_of(rig.host.requests[-1]) == ID


@pytest.mark.parametrize(("url", "remote"), [
    ("http://127.0.0.1:8080", False), ("https://localhost/v1", False), ("http://[::1]:1", False), ("http://127.1.2.3/v1", False),
    ("http://127.0.0.1.example.com", True), ("http://localhost.example.com/v1", True), ("http://10.0.0.1/v1", True),
    ("http://box:8000", True), ("https://api.groq.com/openai/v1", True),
])
def test_what_leaves_this_machine(url: str, remote: bool) -> None:
    assert Tier("x", backend="openai", model="m", base_url=url).remote is remote


# ---- credentials


@pytest.mark.parametrize("env", [{}, {"GROQ_API_KEY": " \n"}])
def test_a_missing_variable_is_named_and_auto_goes_around_it(start: Start, env: dict[str, str]) -> None:
    rig = start(env=env)
    got = rig.ask(chat())
    assert (got.header("x-llmstack-model"), got.all("x-llmstack-fallback")) == ("code-smart", [])
    assert "GROQ_API_KEY is not set" in got.header("x-llmstack-reason")
    for target in ("/v1/chat/completions", "/v1/embeddings"):
        error = error_of(rig.ask(chat("best", target=target)))
        assert (error["code"], error["type"]) == (401, "authentication_error")
        assert "GROQ_API_KEY is not set" in error["message"]
    assert (rig.host.connections, rig.app.state()["code-ultra"]["state"]) == (0, "no credential")


def test_where_only_the_tier_without_a_key_holds_the_request_auto_says_so(start: Start) -> None:
    rig = start(env={}, ctx_size=500_000)
    got = rig.ask(chat(text="x" * 800_000))
    assert "GROQ_API_KEY is not set" in error_of(got)["message"]
    assert (got.status, got.header("x-llmstack-model"), rig.engine.requests) == (401, "code-ultra", [])


def test_a_key_that_no_header_can_carry(start: Start) -> None:
    rig = start(env={"GROQ_API_KEY": "a\nb"})
    message = error_of(rig.ask(chat("code-ultra")))["message"]
    assert "GROQ_API_KEY holds more than printable ASCII" in message


def test_secrets_stay_where_they_are(start: Start) -> None:
    rig = start(host=always(answer(b"{}", "401 No")))
    shown = [rig.ask(chat("code-ultra")).raw, rig.ask(chat()).raw, rig.ask(request("GET", "/v1/models")).raw,
             rig.ask(request("GET", "/llmstack/state")).raw]
    rig.app.reload()
    assert all(KEY.encode() not in raw for raw in shown)    # the log is looked through at the end


# ---- models.ini

OWN = "[a]\nbase_url = {}\nmodel = m\n"


def test_a_tier_on_a_host_is_read() -> None:
    config, warnings = parse_models_ini("[a]\nbackend = openai\nbase_url = https://api.groq.com/openai/v1\nmodel = x/y\n"
                                        "model_next = x/z\napi_key_env = GROQ_API_KEY\nsampler = temp=1\n")
    tier = config.tiers[0]
    assert (tier.backend, tier.base_url, tier.api_key_env, tier.has_next, warnings) == (
        "openai", "https://api.groq.com/openai/v1", "GROQ_API_KEY", True, ())
    assert parse_models_ini(OWN.format("http://box:8000"))[0].tiers[0].backend == "openai"
    assert parse_models_ini("[DEFAULT]\nlocal_only = yes\n")[0].local_only


def problems(text: str) -> list[str]:
    with pytest.raises(llmstack.ConfigError) as caught:
        parse_models_ini(text)
    return list(caught.value.problems)


@pytest.mark.parametrize("url", [
    "ftp://x", "//x/v1", "https://", "https://user:pw@host/v1", "https://host/v1?key=1", "https://host/v1#x", "https://h ost",
    "https://host:0/v1", "https://host:70000/v1", "https://h\u00f6st/v1", "https://host/%0d%0a", "https://host:/v1", "https://a..b/",
    "https://" + "a" * 64 + ".com", "https://[x]/", "HTTPS://host", "https://host/" + "a" * 600, "https://" + "a" * 40 + "!",
])
def test_a_base_url_that_is_none_is_refused_by_its_line(url: str) -> None:
    assert [p.split(" ")[0].rstrip(":") for p in problems(OWN.format(url))] == ["models.ini:2"]


@pytest.mark.parametrize(("text", "line", "said"), [
    ("[a]\nbackend = openai\nmodel = m\n", 1, "[a] has backend = openai but no base_url"),
    ("[a]\nbackend = openai\nbase_url = http://x\n", 1, "[a] has backend = openai but no model"),
    ("[a]\nbackend = litellm\nmodel = m\nbase_url = http://x\n", 4, "base_url is for backend = openai"),
    ("[a]\npath = x\nbase_url = http://x\n", 3, "base_url is for backend = openai and needs a model"),
    ("[a]\npath = x\napi_key_env = A_KEY\n", 3, "api_key_env is for hosted tiers"),
    ("[a]\nmodel = m\napi_key_env = LLMSTACK_API_KEY\n", 3, "the router's own key"),
])
def test_what_does_not_fit_together_is_refused(text: str, line: int, said: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith(f"models.ini:{line}: ")
    assert said in found[0]


@pytest.mark.parametrize("value", ["gsk_0123456789abcdefghijklmn", "groq_api_key", "0123456789abcdef0123456789abcdef", "a b",
                                   "abcdefabcdefabcdefabcdefabcdef12", "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", "$GROQ", "A-B"])
def test_a_key_in_the_place_of_its_variables_name_is_refused_and_never_shown_nor_served(value: str) -> None:
    text = OWN.format("http://127.0.0.1") + f"api_key_env = {value}\n"
    found = problems(text)
    assert [p.split(" ")[0] for p in found] == ["models.ini:4:"]
    assert value not in found[0]
    assert llmstack.holds_secret(text)


@pytest.mark.parametrize("value", ["GROQ_API_KEY", "KEY2", "_X", "AZURE__KEY", "AWS_BEARER_TOKEN_BEDROCK"])
def test_names_of_variables(value: str) -> None:
    text = OWN.format("http://127.0.0.1") + f"api_key_env = {value}\n"
    assert parse_models_ini(text)[0].tiers[0].api_key_env == value
    assert not llmstack.holds_secret(text)


def test_a_key_that_would_travel_unencrypted_is_warned_of() -> None:
    _, warnings = parse_models_ini(OWN.format("http://box:8000") + "api_key_env = BOX_KEY\n")
    assert warnings == ("models.ini:2: the key in BOX_KEY travels unencrypted; https would protect it",)


def test_a_hosts_lines_need_trust() -> None:
    config, _ = parse_models_ini(OWN.format("http://127.0.0.1:1") + "api_key_env = A\n")
    found = llmstack.config_effects(config)
    assert [key.rpartition(" ")[2] for key, _ in found] == ["base_url", "api_key_env"]
    assert [value for _, value in found] == ["http://127.0.0.1:1", "A"]


# ---- why, status, and the whole of it


GROQ = "[code-ultra]\nrole = ultra\nbase_url = https://api.groq.com/openai/v1\nmodel = a/b\napi_key_env = GROQ_API_KEY\n"


@pytest.mark.parametrize(("defaults", "model", "env", "tier", "said"), [
    ("", "auto", "x", "code-ultra", "the best tier you have"),
    ("", "auto", "", "code-fast", "GROQ_API_KEY is not set"),
    ("[DEFAULT]\nlocal_only = yes\n", "auto", "x", "code-fast", "local_only = yes"),
    ("[DEFAULT]\nlocal_only = yes\n", "code-ultra", "x", "code-ultra", "local_only = yes"),
    ("", "code-ultra", "", "code-ultra", "GROQ_API_KEY is not set"),
])
def test_why_knows_what_the_configuration_alone_tells(
        defaults: str, model: str, env: str, tier: str, said: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    write_ini(defaults + GROQ + LOCAL)
    monkeypatch.delenv("GROQ_API_KEY", raising=False)
    if env:
        monkeypatch.setenv("GROQ_API_KEY", KEY)
    Path("r.json").write_text(json.dumps({"model": model, "messages": []}))
    assert llmstack.main(["why", "r.json"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tier}. ")
    assert said in out
    assert KEY not in out


@pytest.mark.parametrize("engine", ["embedded", "llama-swap"])
def test_a_stack_of_hosted_tiers_end_to_end(engine: str, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """`start`, requests and `status` with real daemons, whichever engine is behind; the key is in no file and no argument."""
    if engine == "llama-swap" and not llmstack.find_llama_swap({}, ""):
        pytest.skip("no llama-swap on PATH")
    monkeypatch.setenv("GROQ_API_KEY", KEY)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = one.getsockname()[1], two.getsockname()[1]
    with ScriptedUpstream(always(JSON_CHUNKED + chunk(b'{"ok":1}') + b"0\r\n\r\n"), tls=tls) as host:
        write_ini(f"[DEFAULT]\nengine = {engine}\nrouter_port = {ports[0]}\nengine_port = {ports[1]}\n"
                  f"[code-ultra]\nrole = ultra\nbase_url = https://127.0.0.1:{host.port}/v1\nmodel = a/b\nmodel_next = a/c\n"
                  "api_key_env = GROQ_API_KEY\n[other]\nbase_url = http://127.0.0.1:9\nmodel = x\napi_key_env = MISSING_KEY\n")
        try:
            assert llmstack.main(["start", "--next", "--detach"]) == 0
            with contextlib.closing(Client(ports[0])) as client:
                client.sock.settimeout(WAIT_S)
                assert client.ask(chat()).json == {"ok": 1}
                assert error_of(client.ask(chat("other")))["code"] == 401
                entries = {e["id"]: e for e in client.ask(request("GET", "/v1/models")).json["data"]}
            assert (model_of(host.requests[0]), host.requests[0].header("authorization")) == ("a/c", f"Bearer {KEY}")
            assert (entries["code-ultra"]["channel"], entries["other"]["channel"]) == ("next", "current")
            capsys.readouterr()
            assert llmstack.main(["status", "--json"]) == 0
            tiers = {t["name"]: t for t in json.loads(capsys.readouterr().out)["tiers"]}
            assert (tiers["code-ultra"]["state"], tiers["code-ultra"]["model"], tiers["code-ultra"]["channel"]) == (
                "available", "a/c", "next")
            assert (tiers["other"]["state"], tiers["other"]["reason"]) == (
                "no credential", "other: MISSING_KEY is not set where llmstack was started; export it, then `llmstack restart`")
            assert llmstack.main(["status"]) == 0
            assert re.search("no credential +other: MISSING_KEY is not set", capsys.readouterr().out)
            pid = int(Path(".llmstack/router.pid").read_text().split()[0])
            assert KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert llmstack.main(["restart", "--current", "--detach"]) == 0
            with contextlib.closing(Client(ports[0])) as client:
                client.ask(chat())
            assert model_of(host.requests[-1]) == "a/b"
        finally:
            llmstack.main(["stop"])
    for path in Path(".llmstack").rglob("*"):
        assert path.is_dir() or KEY not in path.read_text()
