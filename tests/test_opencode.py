"""The real opencode against the router: on real llama.cpp, and in front of a scripted OpenAI server.

Exit codes of opencode mislead (0 for a rejected permission), so what is asserted is what was written and what arrived.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Union

import pytest

import llmstack
from tests.test_stack import PROGRAM, Project, noise, only_llama_swap, until  # noqa: F401  # a fixture

OPENCODE = os.environ.get("LLMSTACK_TEST_OPENCODE", "")
KEY = "a-key-of-the-test"
CONFIG = Path(".llmstack/opencode.json")
pytestmark = pytest.mark.skipif(not OPENCODE, reason="no npm here to install opencode with, or not run by `python3 -m tests`")


def opencode(*words: str, **environment: str) -> str:
    """Run opencode in the current directory, offline; its standard output."""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "TERM": "dumb", "OPENCODE_CONFIG": str(CONFIG.absolute()),
           "OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_PROJECT_CONFIG": "1",
           "OPENCODE_DISABLE_CLAUDE_CODE": "1", "OPENCODE_DISABLE_EXTERNAL_SKILLS": "1", "NO_PROXY": "127.0.0.1,localhost",
           "npm_config_registry": "http://127.0.0.1:9/", **environment}
    done = subprocess.run([OPENCODE, *words], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
                          check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


def texts(output: str) -> str:
    """What the assistant has said in a `run --format json`."""
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return " ".join(e["part"]["text"] for e in events if e["type"] == "text")


def test_opencode_takes_the_file_as_it_is_meant() -> None:
    assert llmstack.main(["install"]) == 0
    ours, read = json.loads(CONFIG.read_text()), json.loads(opencode("debug", "config"))
    for key in ("model", "small_model", "share", "autoupdate", "enabled_providers", "instructions"):
        assert read[key] == ours[key], key
    assert read["provider"]["llama.cpp"]["models"] == ours["provider"]["llama.cpp"]["models"]
    for name, agent in ours["agent"].items():
        assert agent.items() <= {**agent, **read["agent"][name]}.items(), name
        assert read["agent"][name]["model"] == agent["model"]
    assert set(read["command"]) == {"review", "nofilter"}


def test_no_hosted_model_stands_in_the_list() -> None:
    assert llmstack.main(["install"]) == 0
    assert opencode("models").split() == [f"llama.cpp/{name}" for name in (
        "auto", "code-fast", "code-smart", "plan", "plan-uncensored")]


def test_build_and_plan_on_real_llama_cpp(real_data: Path, noise: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Without tools and with short prompts: the noise model reads letter by letter, and 31,000 of them take half a minute."""
    monkeypatch.setattr(llmstack, "find_program", only_llama_swap(llmstack.find_program))
    project = Project("build_model = auto\n" + "".join(
        f"[{name}]\nrole = {role}\npath = {noise}\nctx_size = 32k\nsize_gb = 0.1\n"
        for name, role in (("code-fast", "fast"), ("code-smart", "agent"), ("plan", "plan"))))
    less = json.dumps({"tools": {"*": False}, "agent": {name: {"prompt": "Be brief."} for name in ("build", "plan")}})
    try:
        assert llmstack.main(["start"]) == 0
        assert len(texts(opencode("run", "--format", "json", "say hi", OPENCODE_CONFIG_CONTENT=less)).split()) > 10
        until(lambda: "auto -> code-smart [high]" in project.log("router"), "the line of the decision")
        assert "plan: starting" not in project.log("engine")
        assert texts(opencode("run", "--format", "json", "--agent", "plan", "say hi", OPENCODE_CONFIG_CONTENT=less))
    finally:
        llmstack.main(["stop"])
    assert "plan: ready" in project.log("engine")
    assert project.log("router").count("auto -> ") == 1, "the plan agent names its tier"


# ---- in front of a script

Say = Union[str, dict[str, Any], bytes]         # text, the delta of a chunk, bytes as they are
CUT = b""                                       # the connection breaks here
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\nRetry-After: 1\r\n\r\n{}"


class OpenAI:
    """An upstream that answers the turns of a conversation by a script, and every title with a title."""

    def __init__(self, turns: Iterable[Callable[[Any], Iterable[Say]]]) -> None:
        self.titles: list[Any] = []
        self.asked: list[Any] = []
        self.headers: list[dict[str, str]] = []
        script = iter(turns)
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.headers.append({k.lower(): v for k, v in handler.headers.items()})
                    (self.asked if "tools" in body else self.titles).append(body)
                    turn = next(script, None) if "tools" in body else lambda _: ["a title", STOP]
                handler.close_connection, begun = True, False
                for said in turn(body) if turn else (BUSY,):
                    if said in (CUT, BUSY):
                        handler.wfile.write(said)
                        return
                    if not begun:
                        begun = True
                        handler.send_response(200)
                        handler.send_header("Content-Type", "text/event-stream")
                        handler.send_header("Transfer-Encoding", "chunked")
                        handler.end_headers()
                    data = said if isinstance(said, bytes) else chunk(said)
                    handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
                    handler.wfile.flush()
                handler.wfile.write(b"0\r\n\r\n")

            def log_message(handler, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def models(self) -> list[str]:
        return [body["model"] for body in self.asked]


STOP: dict[str, Any] = {"finish_reason": "stop"}


def chunk(said: Union[str, dict[str, Any]]) -> bytes:
    delta = {"content": said} if isinstance(said, str) else {k: v for k, v in said.items() if k != "finish_reason"}
    choice = {"index": 0, "delta": delta, "finish_reason": said.get("finish_reason") if isinstance(said, dict) else None}
    event = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(event).encode() + b"\n\n" + (b"data: [DONE]\n\n" if choice["finish_reason"] else b"")


def call(name: str, **arguments: str) -> list[Say]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return [{"tool_calls": [{"index": 0, "id": f"call_{name}", "type": "function", "function": function}]},
            {"finish_reason": "tool_calls"}]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., OpenAI]]:
    """serve(ini, turns): a router with a key before a scripted upstream, and this project its thin client."""
    running: list[Any] = []
    desk = tmp_path / "desk"
    (desk / ".llmstack").mkdir(parents=True)
    monkeypatch.setenv("LLMSTACK_API_KEY", KEY)

    def start(ini: str, *turns: Callable[[Any], Iterable[Say]]) -> OpenAI:
        (desk / ".llmstack" / "models.ini").write_text(ini)
        upstream = OpenAI(turns)
        router = subprocess.Popen([sys.executable, PROGRAM, "serve", "--port", "0", "--upstream",
                                   f"http://127.0.0.1:{upstream.server.server_port}"], cwd=desk, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        running.extend((upstream, router))
        assert router.stdout
        assert llmstack.main(["install", "--external", router.stdout.readline().split()[0]]) == 0
        return upstream

    yield start
    for one in running:
        if isinstance(one, OpenAI):
            one.close()
        else:
            one.terminate()
            one.communicate(timeout=20)


TIERS = (
    ("code-ultra", "ultra", "24_000"), ("code-smart", "agent", "64k"), ("code-fast", "fast", "128k"), ("plan", "plan", "64k"))
LADDER = "".join(f"[{name}]\nrole = {role}\nmodel = x/y\nctx_size = {context}\nmax_output_tokens = 4000\n"
                 for name, role, context in TIERS)


def test_a_tool_call_is_executed_and_its_result_comes_back(serve: Callable[..., OpenAI]) -> None:
    """The build agent on code-smart, the title on code-fast; the key goes to the router and no further."""
    target = Path.cwd() / "hello.txt"
    upstream = serve(LADDER, lambda _: call("write", filePath=str(target), content="from the stack"), lambda _: ["written", STOP])
    assert texts(opencode("run", "--format", "json", "write hello.txt", LLMSTACK_API_KEY=KEY)) == "written"
    assert target.read_text() == "from the stack"
    assert upstream.models == ["code-smart", "code-smart"]
    assert {body["model"] for body in upstream.titles} == {"code-fast"}
    first, second = upstream.asked
    assert first["max_tokens"] == 4000
    assert first["stream"] is True
    assert not {"temperature", "top_p", "top_k", "min_p"} & set(first), "the tier's sampler applies"
    assert "Notes for agents" in first["messages"][0]["content"], "AGENTS.md is read"
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "tool"]
    assert second["messages"][2]["tool_calls"][0]["id"] == second["messages"][3]["tool_call_id"] == "call_write"
    assert not any(KEY in value for headers in upstream.headers for value in headers.values())


def test_the_planner_is_on_plan_and_writes_nothing(serve: Callable[..., OpenAI]) -> None:
    target = Path.cwd() / "hello.txt"
    upstream = serve(LADDER, lambda _: call("write", filePath=str(target), content="x"), lambda _: ["only a plan", STOP])
    assert "only a plan" in texts(opencode("run", "--format", "json", "--agent", "plan", "hello.txt", LLMSTACK_API_KEY=KEY))
    assert not target.exists()
    assert set(upstream.models) == {"plan"}
    assert not {"bash", "webfetch"} & {tool["function"]["name"] for tool in upstream.asked[0]["tools"]}
    assert isinstance(upstream.asked[0]["messages"][-1]["content"], list), "an array of parts"


@pytest.mark.parametrize("agent", ["plan", "plan-nofilter"])
def test_a_planner_changes_nothing_through_another_agent(agent: str, serve: Callable[..., OpenAI]) -> None:
    """The built-in agents that it could hand a task to run commands, whatever the planner itself is denied.

    It asks each of them in turn, and whoever answers that tries to run a command.
    """
    turns: list[Callable[[Any], list[Say]]] = []
    for helper in ("general", "explore"):
        task = call("task", description="a file", prompt="make it", subagent_type=helper)
        touch = call("bash", command=f"touch {Path.cwd() / helper}", description="makes it")
        turns += [lambda _, said=said: said for said in (task, touch, touch)]  # type: ignore[misc]
    upstream = serve(LADDER + "[plan-uncensored]\nrole = plan-uncensored\nmodel = x/y\nctx_size = 64k\n",
                     *turns, *[lambda _: ["only a plan", STOP]] * 6)
    opencode("run", "--format", "json", "--agent", agent, "hello.txt", LLMSTACK_API_KEY=KEY)
    assert not Path("general").exists()
    assert not Path("explore").exists()
    assert len(upstream.asked) > 6


def test_a_long_file_steps_down_and_troubles_are_survived(serve: Callable[..., OpenAI]) -> None:
    """auto: short on code-ultra; the file read crosses the first rung; a slow load, two broken streams, a busy tier."""
    big = Path.cwd() / "big.txt"
    big.write_text("".join(f"{n} the quick brown fox jumps over the lazy dog\n" for n in range(1100)))
    pause = threading.Event()

    def slow_then_no_end(_: Any) -> Iterator[Say]:
        for second in range(3):
            yield b": loading code-smart %d s\n\n" % second
            pause.wait(0.7)
        yield {"reasoning_content": "llama-swap loading model: code-smart"}
        yield "half a"

    def broken_off(_: Any) -> Iterator[Say]:
        yield "half a sentence"
        yield CUT

    upstream = serve("[DEFAULT]\nbuild_model = auto\n" + LADDER, lambda _: call("read", filePath=str(big)),
                     slow_then_no_end, broken_off, lambda _: [BUSY], lambda _: ["all read", STOP])
    output = opencode("run", "--format", "json", "read big.txt", LLMSTACK_API_KEY=KEY)
    assert "all read" in texts(output)
    assert upstream.models[:2] == ["code-ultra", "code-smart"]
    assert upstream.models[2] == "code-fast", "a tier that broke off its answer is left alone"
    assert len(upstream.models) == 5
    assert len(upstream.asked[1]["messages"][-1]["content"]) > 48_000
    assert all(body["messages"] == upstream.asked[1]["messages"] for body in upstream.asked[2:]), "the same question again"
