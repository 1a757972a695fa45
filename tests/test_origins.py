"""Which web pages and hosts may ask the router, and what a browser is told."""

from __future__ import annotations

import pytest

import llmstack
from llmstack import parse_models_ini
from tests import test_router
from tests.scripted import always, answer
from tests.test_router import (  # noqa: F401
    CHAT,
    CONFIG,
    OK,
    SSE_CHUNKED,
    Start,
    chat,
    error_of,
    nothing_left_behind,
    request,
    start,
)

EDITOR = "vscode-webview://1a2b3c"
PAGE = "https://app.example.com"


@pytest.mark.parametrize(("pattern", "origin", "passes"), [
    ("https://app.example.com", "https://app.example.com", True),
    ("https://app.example.com", "https://APP.example.com", True),
    ("https://app.example.com", "http://app.example.com", False),
    ("https://app.example.com", "https://app.example.com:8443", False),
    ("https://app.example.com", "https://app.example.com.evil.example", False),
    ("https://*.example.com", "https://a.b.example.com", True),
    ("https://*.example.com", "https://example.com", False),
    ("https://*.example.com", "https://evilexample.com", False),
    ("*.example.com", "http://a.example.com:3000", True),
    ("box.lan", "http://box.lan:3000", True),
    ("box.lan", "ftp://box.lan", False),
    ("vscode-webview://*", EDITOR, True),
    ("vscode-webview://*", "https://vscode-webview", False),
    ("app://obsidian.md", "app://obsidian.md", True),
    ("app://obsidian.md", "app://other.md", False),
    ("chrome-extension://abcdef", "chrome-extension://abcdef", True),
    ("chrome-extension://abcdef", "chrome-extension://abcdeg", False),
    ("box.lan", "null", False),
])
def test_which_pages_a_pattern_lets_in(pattern: str, origin: str, passes: bool) -> None:
    config, _ = parse_models_ini(f"[DEFAULT]\nallowed_origins = {pattern}\n")
    assert config.allowed_origins == (pattern,)
    assert llmstack.origin_matches(origin, pattern) is passes


@pytest.mark.parametrize("pattern", ["*", "https://*", "http://*:3000", "a b", "https://x/y"])
def test_every_page_there_is_and_none_are_no_patterns(pattern: str) -> None:
    with pytest.raises(llmstack.ConfigError):
        parse_models_ini(f"[DEFAULT]\nallowed_origins = https://a.b, {pattern}\n")


def test_who_may_ask_needs_trust() -> None:
    config, _ = parse_models_ini(
        "[DEFAULT]\nallowed_origins = https://a.b, app://c\nallowed_hosts = d.lan\n")
    assert llmstack.config_effects(config) == [
        ("allowed_origins", "https://a.b, app://c"), ("allowed_hosts", "d.lan")]


def allow(monkeypatch: pytest.MonkeyPatch, *origins: str, hosts: tuple[str, ...] = ()) -> None:
    config = CONFIG._replace(allowed_origins=origins, allowed_hosts=hosts)
    monkeypatch.setattr(test_router, "CONFIG", config)


def test_a_refusal_names_the_key_to_set(start: Start) -> None:  # noqa: F811
    rig = start(always(OK))
    got = rig.ask(request("GET", "/x", f"Origin: {PAGE}"))
    assert got.status == 403
    assert "allowed_origins in models.ini" in error_of(got)["message"]
    assert got.header("access-control-allow-origin") == ""
    got = rig.ask(request("GET", "/x", "Host: box.lan:10101"))
    assert "allowed_hosts of models.ini" in error_of(got)["message"]
    assert rig.upstream.requests == []


def preflight(origin: str, *lines: str) -> bytes:
    return request("OPTIONS", CHAT, f"Origin: {origin}", "Access-Control-Request-Method: POST",
                   "Access-Control-Request-Headers: authorization, content-type", *lines)


def test_a_preflight_is_answered_here_and_without_the_key(
        start: Start, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    allow(monkeypatch, PAGE)
    rig = start(always(OK), loopback=False, key="sesame")
    got = rig.ask(preflight(PAGE, "Host: box.lan:10101"))
    assert got.status == 200
    assert got.header("access-control-allow-origin") == PAGE
    assert got.header("access-control-allow-headers") == "authorization, content-type"
    assert "POST" in got.header("access-control-allow-methods")
    assert got.header("vary") == "Origin"
    assert rig.ask(preflight("https://evil.example", "Host: box.lan:10101")).status == 403
    host = "Host: box.lan:10101"
    got = rig.ask(chat("auto", host, f"Origin: {PAGE}"))
    assert (got.status, got.header("access-control-allow-origin")) == (401, PAGE), "it may read why"
    got = rig.ask(chat("auto", host, f"Origin: {PAGE}", "Authorization: Bearer sesame"))
    assert (got.status, got.header("access-control-allow-origin")) == (200, PAGE)
    assert [m.all("origin") for m in rig.upstream.requests] == [[]], "what is behind does not judge"


@pytest.mark.parametrize("reply", [
    answer(b"ok", "200 OK", "Access-Control-Allow-Origin: *",
           "Access-Control-Allow-Credentials: true"),
    SSE_CHUNKED.replace(b"\r\n\r\n", b"\r\nAccess-Control-Allow-Origin: https://evil.example\r\n\r\n")
    + b"0\r\n\r\n",
    answer(b"no", "403 Forbidden"),
])
def test_the_page_that_asked_may_read_what_is_relayed_and_no_other(
        start: Start, monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:  # noqa: F811
    allow(monkeypatch, "vscode-webview://*")
    rig = start(always(reply))
    got = rig.ask(chat("code-fast", f"Origin: {EDITOR}"))
    assert got.all("access-control-allow-origin") == [EDITOR]
    assert got.all("access-control-allow-credentials") == []
    assert got.header("vary") == "Origin"
    assert rig.ask(chat("code-fast")).all("access-control-allow-origin") == []


@pytest.mark.parametrize("host", [
    "host.docker.internal:10101", "host.containers.internal", "box.lan:10101", "a.corp.example"])
def test_names_of_this_machine(start: Start, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
                               host: str) -> None:
    allow(monkeypatch, hosts=("box.lan", "*.corp.example"))
    rig = start(always(OK))
    assert rig.ask(chat("auto", f"Host: {host}")).status == 200
    assert rig.ask(chat("auto", "Host: box.lan.evil.example")).status == 403


def test_the_machine_s_own_name_counts(start: Start,  # noqa: F811
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Desk.home")
    rig = start(always(OK))
    for host in ("desk.home:10101", "DESK.local:10101"):
        assert rig.ask(chat("auto", f"Host: {host}")).status == 200
