"""The page: how it is served, what it may do, and what a real browser makes of it."""

# ruff: noqa: F811  # a fixture that is imported is a parameter, too

from __future__ import annotations

import base64
import hashlib
import html
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import llmstack
from tests.scripted import WAIT_S, always, answer
from tests.test_router import Rig, Start, chat, request, start  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "share/page/index.html").read_text(encoding="utf-8")
HTML = "Accept: text/html,application/xhtml+xml"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
GB = 10**9


def test_a_browser_gets_the_page_and_a_program_does_not(start: Start) -> None:
    rig = start(key="sesame")
    got = rig.ask(request("GET", "/", HTML))
    assert (got.status, got.header("content-type")) == (200, "text/html; charset=utf-8")
    assert b"<title>llmstack</title>" in got.body
    for lines in ((), ("Accept: */*",), ("Accept: application/json",)):
        got = rig.ask(request("GET", "/", *lines))
        assert got.json == {"name": "llmstack", "api": "/v1", "models": "/v1/models"}
    for lines in ((), (HTML,)):
        client = rig.client()
        client.send(request("HEAD", "/", *lines))
        head = client.read_message("HEAD")
        assert (head.status, head.body) == (200, b"")
    assert rig.upstream.requests == []


@pytest.mark.parametrize("line", ["Host: evil.example", "Origin: https://evil.example", "Sec-Fetch-Site: cross-site"])
def test_the_page_is_for_this_machine(start: Start, line: str) -> None:
    assert start().ask(request("GET", "/", HTML, line)).status == 403


def test_only_its_own_script_and_style_may_run(start: Start) -> None:
    got = start().ask(request("GET", "/", HTML))
    policy = dict(part.strip().partition(" ")[::2] for part in got.header("content-security-policy").split(";"))
    text = got.body.decode()
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for element in ("script", "style"):
        inside = re.findall(f"<{element}[^>]*>(.*?)</{element}>", text, re.DOTALL)
        assert len(inside) == 1
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert policy[f"{element}-src"] == f"'sha256-{digest}'"
    meta = re.search('<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    assert meta
    assert got.header("content-security-policy") == meta.group(1) + "; frame-ancestors 'none'"
    assert got.header("x-content-type-options") == "nosniff"


def test_the_page_asks_no_other_host_and_writes_no_html() -> None:
    addresses = set(re.findall(r"""["'(]((?:https?:)?//[^"')\s]*)""", SOURCE))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a name of SVG, nothing that is fetched"
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage", "style=",
                 "onclick", "@import", "url("):
        assert word not in SOURCE, word


def test_the_page_has_landmarks_and_live_regions() -> None:
    for word in ('lang="en"', "<main>", "<header>", "<h1>", 'aria-live="polite"', 'role="status"', 'scope="col"',
                 ":focus-visible", "prefers-color-scheme: dark", "prefers-reduced-motion"):
        assert word in SOURCE, word
    sections = re.findall(r"<section [^>]*>", SOURCE)
    for section in sections:
        named = re.search('aria-labelledby="([^"]*)"', section)
        assert named, section
        assert f'<h2 id="{named.group(1)}">' in SOURCE


def test_a_program_copied_alone_says_where_the_api_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise llmstack.UserError(f"{name} is missing")

    assert llmstack.read_page() is not None
    monkeypatch.setattr(llmstack, "read_shared_text", missing)
    assert llmstack.read_page() is None


# ---- in a real browser


class Shown(llmstack.Behind):
    """What stands behind: an engine with models in every state."""

    log = llmstack.Log("", "error")

    def __init__(self, upstream: llmstack.Upstream) -> None:
        self.upstream = upstream

    def lease(self, name: str) -> llmstack.Lease:
        return llmstack.Lease(self.upstream)

    def watched(self) -> dict[str, Any]:
        parts = {"weights": 3 * GB, "kv": 2 * GB, "recurrent": 0, "compute": GB}
        known = {"since": 0, "loads": 1, "evictions": 0, "reason": ""}
        parked = [{"tier": "code-smart", "tokens": 31_200, "turns": 9, "bytes": 2 * GB,
                   "used": round(time.time()) - 720}]
        return {"budget": 56 * GB, "parked": parked, "models": {
            "code-fast": {**known, "state": "loaded", "bytes": 6 * GB, "parts": parts},
            "code-smart": {**known, "state": "failed to load", "bytes": 40 * GB,
                           "reason": "<b>the file is cut short</b>"},
            "plan": {**known, "state": "not here", "bytes": 9 * GB, "reason": "llmstack download plan"}}}


@pytest.fixture
def shown(start: Start, tmp_path: Path) -> Rig:
    record = llmstack.Recorder(str(tmp_path / "decisions.jsonl"))
    rig = start(always(answer(b'{"usage":{"prompt_tokens":1234,"completion_tokens":9,'
                              b'"prompt_tokens_details":{"cached_tokens":1200}}}')), record=record)
    rig.app.behind = Shown(rig.app.behind.upstream)         # type: ignore[attr-defined]
    return rig


def browse(tmp_path: Path, rig: Rig, *options: str) -> str:
    """Run the browser on the page, and return what it prints."""
    if not CHROMIUM or sys.platform != "linux":
        pytest.skip("no chromium here")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
               "--disable-extensions", "--disable-background-networking", "--virtual-time-budget=3000",
               f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", *options,
               f"http://127.0.0.1:{rig.port}/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S * 6, check=True)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line and "status of 401" not in line]
    assert console == [], "nothing is refused by the policy, and no script fails"
    return done.stdout


def test_a_browser_shows_what_runs(tmp_path: Path, shown: Rig) -> None:
    assert shown.ask(chat("auto")).status == 200
    while not shown.app.events.snapshot()["decisions"]:
        pass
    shown.app.events._points.append((time.time(), "plan", 0.4, 30.0))
    dom = browse(tmp_path, shown, "--dump-dom")
    body = html.unescape(re.sub(r"<[^>]*>", " ", dom.partition("<main>")[2].partition("<script>")[0]))
    for words in ("code-fast", "loaded", "Unload", "<b>the file is cut short</b>", "llmstack download plan",
                  "6.0 GB of 56.0 GB, code-fast", "weights 3.0 GB", "KV 2.0 GB", "1,234 tokens", "why",
                  "1,200 of 1,234 tokens were in the cache", "31,200", "2.0 GB on the disk", "12 min ago",
                  "parked conversations on disk: 2.0 GB"):
        assert words in body, words
    assert re.search(r'<span id="link"[^>]*>live</span>', dom)
    assert '<circle class="dot"' in dom


def test_a_browser_is_asked_for_the_key(tmp_path: Path, start: Start) -> None:
    dom = browse(tmp_path, start(key="sesame"), "--dump-dom")
    assert re.search(r'<section id="key" class=""', dom)
    assert re.search(r'<span id="link"[^>]*>wants its key</span>', dom)


def test_a_lost_stream_comes_again(tmp_path: Path, shown: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = llmstack.Events._tell, []

    def tell(self: llmstack.Events, client: llmstack.Client, last_id: str) -> None:
        asked.append(last_id)
        if len(asked) > 1:
            real(self, client, last_id)
        client.open_stream()
        self._send(client, "snapshot", self.snapshot(), 0)
        client.send(b"0\r\n\r\n")              # so that it is read before the end

    monkeypatch.setattr(llmstack.Events, "_tell", tell)
    dom = browse(tmp_path, shown, "--dump-dom")
    assert asked[0] == ""
    assert asked[1] == f"{shown.app.events._start}-0"
    assert re.search(r'<span id="link"[^>]*>live</span>', dom)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 2400), (1400, 1000)])
def test_a_browser_draws_it_in_both_themes(tmp_path: Path, shown: Rig, width: int, height: int, theme: str) -> None:
    path = tmp_path / f"page-{width}-{theme}.png"       # kept by pytest: to be looked at
    options = ["--force-dark-mode"] if theme == "dark" else []
    browse(tmp_path, shown, f"--window-size={width},{height}", f"--screenshot={path}", *options)
    data = path.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (width, height)
    assert len(data) > 20_000, "there is something on it"


# ---- /ui of the embedded engine


def test_the_engine_s_ui_is_the_router_s_page() -> None:
    engine = llmstack.Engine(llmstack.Config(), lambda tier, port: [], llmstack.Log("", "error"), str,
                             llmstack.EnginePlan({}, 1.0))
    app = llmstack.EngineApp(engine, llmstack.Log("", "error"))
    app.page_url = "http://127.0.0.1:10101/"
    server = llmstack.Server("127.0.0.1", 0, app)
    import threading
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        response, _ = llmstack.Upstream("127.0.0.1", server.server_port).get("/ui")
        assert (response.status, response.header(b"location")) == (307, "http://127.0.0.1:10101/")
    finally:
        server.shutdown()
        thread.join(WAIT_S)
        server.server_close()
