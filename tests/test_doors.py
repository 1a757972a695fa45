"""No web page gets in anywhere: not at our listeners, and not at the servers behind them.

The real llama.cpp and, where its binary is on PATH, the real llama-swap.
"""

from __future__ import annotations

import http.client
import os
import re
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

import pytest

import llmstack
from tests.test_stack import Project, ask, engines, noise, only_llama_swap, two_tiers  # noqa: F401

EVIL = {"Origin": "https://evil.example"}
REBOUND = {"Host": "evil.example"}
MESSAGE = {"role": "user", "content": "hello"}


def get(port: int, path: str, method: str = "GET", **headers: str) -> Tuple[int, Dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


@pytest.fixture(params=engines())
def stack(request: pytest.FixtureRequest, real_data: Path, noise: Path,  # noqa: F811
          monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A stack whose two tiers are loaded."""
    monkeypatch.setattr(llmstack, "find_program", only_llama_swap(llmstack.find_program))
    project = Project(two_tiers(noise), request.param)
    assert llmstack.main(["start"]) == 0
    try:
        ask(project.router_port, model="code-smart", messages=[MESSAGE], max_tokens=1)
        yield project
    finally:
        llmstack.main(["stop"])


def servers(project: Project) -> Dict[str, int]:
    """Model -> the port its server has."""
    upstream = llmstack.Upstream("127.0.0.1", project.engine_port)
    rows = llmstack.asked_json(upstream, "/running")["running"]
    return {row["model"]: int(re.findall(r":([0-9]+)", row["proxy"])[0]) for row in rows}


def test_no_page_reads_what_a_model_server_says(stack: Project) -> None:
    ports = servers(stack)
    assert "code-smart" in ports
    for port in ports.values():
        status, headers, _ = get(port, "/v1/chat/completions", "POST", **EVIL)
        assert status == 401, "a key that nobody but us knows is wanted"
        assert headers.get("access-control-allow-origin") in (None, ""), headers
        _, headers, _ = get(port, "/v1/chat/completions", "OPTIONS", **EVIL)
        assert headers.get("access-control-allow-origin") not in ("*", EVIL["Origin"])
        assert get(port, "/slots")[0] == 401


def test_no_page_gets_past_our_listeners(stack: Project) -> None:
    for port in (stack.router_port, stack.engine_port):
        for headers in (EVIL, REBOUND, {"Sec-Fetch-Site": "cross-site"}):
            for path in ("/v1/models", "/running", "/unload", "/upstream/code-smart/slots", "/"):
                assert get(port, path, **headers)[0] == 403, (port, path, headers)
    assert "code-smart" in servers(stack), "nothing was unloaded"


def test_the_keys_stand_in_no_file_and_on_no_command_line(stack: Project) -> None:
    record = llmstack.read_record(str(stack.state / "router.pid"))
    assert record is not None
    keys = set()
    for pid in llmstack.stack_members(record.stack):
        environment = llmstack.process_environment(pid) or {}
        keys.add(environment.get("LLAMA_API_KEY", ""))
    keys.discard("")
    assert keys
    for key in keys:
        for path in stack.state.rglob("*"):
            assert not path.is_file() or key.encode() not in path.read_bytes(), path
        for pid in llmstack.stack_members(record.stack):
            assert key not in " ".join(llmstack.process_command(pid))


def test_what_the_engine_serves_passes_through_its_listener(stack: Project) -> None:
    status, _, body = get(stack.engine_port, "/v1/models")
    assert (status, b"code-smart" in body) == (200, True)
    assert get(stack.engine_port, "/upstream/code-smart/props")[0] == 200
    headers, _ = ask(stack.engine_port, model="code-smart", messages=[MESSAGE], max_tokens=1)
    assert "json" in headers["Content-Type"]
    record = llmstack.read_record(str(stack.state / "router.pid"))
    if record is not None and record.kind == "llama-swap":
        assert get(stack.engine_port, "/ui/")[0] in (200, 404), "a build without its page has none"
        assert first_event(stack.engine_port, "/api/events").startswith(b"data:")


def first_event(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path)
        answer: Any = connection.getresponse()
        assert "event-stream" in answer.getheader("content-type")
        line = b""
        while not line.startswith(b"data:"):
            line = answer.readline()
            assert line
        return bytes(line)
    finally:
        connection.close()


def test_llama_swap_s_own_port_wants_its_key(stack: Project) -> None:
    record = llmstack.read_record(str(stack.state / "router.pid"))
    assert record is not None
    if record.kind != "llama-swap":
        pytest.skip("the embedded engine has no port of its own")
    words = [llmstack.process_command(pid) for pid in llmstack.stack_members(record.stack)]
    listen = next(w[w.index("-listen") + 1] for w in words if "-listen" in w)
    port = int(listen.rpartition(":")[2])
    assert port != stack.engine_port
    assert get(port, "/v1/models", **EVIL)[0] == 401
    assert get(port, "/running")[0] == 401
    assert os.stat(stack.state / "llama-swap.yaml").st_mode & 0o077 == 0
