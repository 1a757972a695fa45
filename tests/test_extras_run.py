"""extras/run.py: an answer, a chat, and everything that may come instead of one."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest

import llmstack
from tests.scripted import Connection, Message, ScriptedUpstream, answer
from tests.test_demo import smol  # noqa: F401  # a fixture
from tests.test_extras_replay import LADDER
from tests.test_stack import Project

PROGRAM = llmstack.PROGRAM


def event(content: str = "", **more: Any) -> bytes:
    delta = {"content": content, **{k: v for k, v in more.items() if k == "reasoning_content"}}
    rest = {k: v for k, v in more.items() if k != "reasoning_content"}
    return b"data: " + json.dumps({"choices": [{"delta": delta}], **rest}).encode() + b"\n\n"


HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
    b"X-LLMStack-Model: code-smart\r\nX-LLMStack-Reason: 3 tokens: top tier\r\n\r\n"
)
COUNTS = {
    "usage": {
        "prompt_tokens": 35_000,
        "completion_tokens": 162,
        "prompt_tokens_details": {"cached_tokens": 31_200},
    },
    "timings": {"predicted_ms": 2000, "cache_n": 31_200},
}
HELLO = (
    HEAD
    + b": loading\n"
    + event(reasoning_content="a greeting")
    + event("hel")
    + event("lo")
    + event(**COUNTS)
    + b"data: [DONE]\n\n"
)


class Router:
    """A router on another machine: its models.ini, and what the test makes it answer."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.asked: list[Message] = []
        self.upstream = ScriptedUpstream(self._answer)

    def _answer(self, connection: Connection) -> None:
        asked = connection.read()
        if asked.target == "/models.ini":
            connection.send(answer(LADDER.encode()))
            return
        self.asked.append(asked)
        sent = self.answers.pop(0) if self.answers else HELLO
        held = self.answers[:1] == [b"hold"]
        connection.send(sent)
        if held:
            connection.ended()

    @property
    def bodies(self) -> list[Any]:
        return [message.json for message in self.asked]


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Iterator[Router]:
    router = Router()
    with router.upstream:
        url = f"http://127.0.0.1:{router.upstream.port}"
        assert llmstack.main(["install", "--external", url]) == 0
        monkeypatch.setattr(sys, "stdin", Terminal())
        yield router


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = llmstack.main(["run", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_an_answer_and_what_it_took(router: Router, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "say hello")
    assert (code, out) == (0, "hello\n")
    assert err == "code-smart, 35,000 tokens (31,200 cached), 162 written, 81 a second\n"
    body = router.bodies[0]
    assert body["model"] == "auto"
    assert body["messages"] == [{"role": "user", "content": "say hello"}]
    assert body["stream"] is True


def test_a_tier_options_and_the_key(
    router: Router, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMSTACK_API_KEY", "a-key")
    code, out, err = run(
        capsys, "code-fast", "-q", "--system", "be brief", "--max-tokens", "5", "hi"
    )
    assert (code, out, err) == (0, "hello\n", "")
    assert router.bodies[0]["model"] == "code-fast"
    assert router.bodies[0]["max_tokens"] == 5
    assert router.bodies[0]["messages"][0] == {"role": "system", "content": "be brief"}
    assert router.asked[0].header("authorization") == "Bearer a-key"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-"], "from a pipe"),
        ([], "from a pipe"),
        (["code-fast", "review:", "-"], "review:\n\nfrom a pipe"),
    ],
)
def test_standard_input(
    words: list[str],
    text: str,
    router: Router,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert run(capsys, *words)[0] == 0
    assert router.bodies[0]["messages"][-1]["content"] == text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["code-fats", "hi"], "there is no tier 'code-fats', did you mean code-fast?"),
        (["why", "is", "the", "sky", "blue"], "there is no tier 'why'"),
        (["--tire", "x"], "llmstack run has no '--tire', did you mean --quiet?"),
        (["-"], "there is nothing on standard input"),
    ],
)
def test_usage(
    words: list[str], said: str, router: Router, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2
    assert err.splitlines()[0] == "llmstack: error: " + said
    assert len(err.splitlines()) == 2


def error_body(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (answer(error_body("no tier holds this"), "400 Bad Request"), "no tier holds this"),
        (answer(b"", "502 Bad Gateway"), "the router answers 502"),
        (HEAD + b"data: " + error_body("it \x1b[31mfailed") + b"\n\n", "it \\u001b[31mfailed"),
        (HEAD + event("hel"), "the answer broke off"),
        (b"nonsense\r\n\r\n", "no answer from http://127.0.0.1:"),
        (b"", "no answer from http://127.0.0.1:"),
        (
            HEAD
            + b'data: [1, 2]\n\ndata: {"choices": [7]}\n\ndata: {"usage": 3}\n\ndata: \xff\n\n',
            "the answer broke off",
        ),
    ],
)
def test_what_comes_instead_of_an_answer_is_two_lines(
    sent: bytes, said: str, router: Router, capsys: pytest.CaptureFixture[str]
) -> None:
    router.answers = [sent]
    code, _, err = run(capsys, "hi")
    assert code == 1
    assert err.splitlines()[0].startswith("llmstack: error: " + said)
    assert len(err.splitlines()) == 2


def test_without_a_stack_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "hi")
    assert code == 1
    assert err.splitlines()[0] == "llmstack: error: the stack of this project is not running"


# ---- the chat


def talk(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """What the user types."""
    typed = list(lines)

    def read(prompt: str) -> str:
        if not typed:
            raise EOFError
        line = typed.pop(0)
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)


def test_a_chat_keeps_what_was_said(
    router: Router, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk(monkeypatch, "one", "", "^C", '"""', "two", "lines", '"""', "/why", "/new", "three")
    code, out, _ = run(capsys, "--system", "s")
    assert code == 0
    told = [[m["content"] for m in body["messages"]] for body in router.bodies]
    assert told == [["s", "one"], ["s", "one", "hello", "two\nlines"], ["s", "three"]]
    assert "3 tokens: top tier" in out
    assert "/quit or Ctrl-D leaves" in out
    names = {message.header("x-session-affinity") for message in router.asked}
    assert len(names) == 1


def test_the_commands_of_a_chat(
    router: Router, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("notes.txt").write_text("```\nfenced\n```\n")
    Path("binary").write_bytes(b"\xff\xfe")
    talk(
        monkeypatch,
        "/help",
        "/tier",
        "/tier code-fats",
        "/tier code-fast",
        "/file none",
        "/file binary",
        "/file notes.txt",
        "what is this?",
        "/save chat.md",
        "/save chat.md",
        "/quit",
        "never",
    )
    code, out, _ = run(capsys)
    assert code == 0
    for said in (
        "/file PATH",
        "auto, of auto, code-fast, code-smart",
        "there is no tier 'code-fats'",
        "cannot read none: No such file",
        "binary is not text",
        "chat.md is there already",
    ):
        assert said in out
    assert router.bodies[0]["model"] == "code-fast"
    sent = router.bodies[0]["messages"][0]["content"]
    assert sent == "notes.txt:\n````\n```\nfenced\n```\n\n````\n\nwhat is this?"
    assert Path("chat.md").read_text().endswith("## assistant\n\nhello\n")
    assert len(router.bodies) == 1


def test_a_failed_message_can_be_sent_again(
    router: Router, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    router.answers = [answer(error_body("busy"), "503 Busy"), HELLO]
    talk(monkeypatch, "one", "one")
    assert run(capsys)[0] == 0
    assert router.bodies[1]["messages"] == [{"role": "user", "content": "one"}]


class Screen:
    """The program on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        pid, self.fd = pty.fork()
        if not pid:
            os.environ.update(TERM="xterm")
            os.environ.pop("NO_COLOR", None)
            os.execv(sys.executable, [sys.executable, PROGRAM, *words])
        self.pid, self.text = pid, ""

    def until(self, text: str) -> None:
        while text not in self.text:
            self.text += os.read(self.fd, 4096).decode("utf-8", "replace")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        try:
            while True:
                data = os.read(self.fd, 4096)
                self.text += data.decode("utf-8", "replace")
                if not data:
                    break
        except OSError:  # Linux' way to say that the other end is closed
            pass
        os.close(self.fd)
        return os.waitpid(self.pid, 0)[1]


def test_on_a_terminal_ctrl_c_ends_the_answer_only(router: Router) -> None:
    router.answers = [HEAD + event(reasoning_content="think\x1b[2J") + event("endless"), b"hold"]
    screen = Screen("run")
    screen.until("> ")
    screen.type("one\n")
    screen.until("endless")
    router.answers.clear()
    screen.type("\x03")
    screen.until("ended by you")
    screen.type("two\n")
    screen.until("81 a second")
    screen.type("/quit\n")
    assert screen.end() == 0
    assert "\x1b[2mthink\\u001b[2J\x1b[0m\r\n\r\nendless" in screen.text
    assert router.bodies[1]["messages"][1] == {"role": "assistant", "content": "endless"}


def test_an_interrupted_answer_of_a_script_exits_with_130(router: Router) -> None:
    router.answers = [HEAD + event("endless"), b"hold"]
    child = subprocess.Popen(
        [sys.executable, PROGRAM, "run", "hi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout
    assert child.stdout.read(7) == b"endless"
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=20)
    assert (child.returncode, out) == (130, b"\n")


def test_a_closed_pipe_is_no_traceback(router: Router) -> None:
    router.answers = [HEAD + event("endless"), b"hold"]
    child = subprocess.Popen(
        [sys.executable, PROGRAM, "run", "hi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout
    assert child.stdout.read(1) == b"e"
    child.stdout.close()
    child.send_signal(signal.SIGINT)
    assert child.stderr
    said = child.stderr.read()
    child.stderr.close()
    child.wait(timeout=20)
    assert b"Traceback" not in said


def test_a_real_model_answers(
    smol: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = next(smol.parent.rglob("*.gguf"), smol)
    Project(f"[code-fast]\nrole = fast\npath = {model}\nctx_size = 2k\nsize_gb = 0.2\n")
    monkeypatch.setattr(sys, "stdin", Terminal())
    try:
        assert llmstack.main(["start"]) == 0
        code, out, err = run(capsys, "--max-tokens", "12", "Why is the sky blue?")
        assert code == 0, err
        assert len(out.split()) > 3
        assert err.startswith("code-fast, ")
        assert " a second" in err
    finally:
        llmstack.main(["stop"])
