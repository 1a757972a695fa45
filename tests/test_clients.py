"""Real clients on a router before a scripted provider, with what connect wrote or run-with gives.

They are installed by LLMSTACK_TEST_CLIENTS=1 (see tests/__main__.py). What is asserted is what
arrived at the provider, what was written, and what the user reads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

import pytest

import llmstack
from tests.provider import Asked, Provider, Tool

PROGRAM = llmstack.PROGRAM
CLIENTS = Path(os.environ.get("LLMSTACK_TEST_CLIENTS", "/nowhere"))
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY")
KEY = "a-key-of-the-test"
NO_CLIENTS = "needs LLMSTACK_TEST_CLIENTS=1, which installs the real clients"
OUTSIDE = "http://127.0.0.1:9"                  # nothing listens there: no client gets out
LADDER = "[DEFAULT]\nbuild_model = auto\n[ROUTING]\nmid_fidelity_ceiling = 20000\n" + "".join(
    f"[{name}]\nrole = {role}\nmodel = x/y\nctx_size = {context}\nmax_output_tokens = 4000\n"
    for name, role, context in (("code-smart", "agent", "64k"), ("code-fast", "fast", "128k")))


class Trial(NamedTuple):
    """How a client is asked one thing without a terminal."""

    program: str                                # below LLMSTACK_TEST_CLIENTS
    words: tuple[str, ...]                      # what stands before the prompt
    tool: Optional[Tool]                        # its own that writes FILE
    connected: tuple[str, ...] = ()             # words only where `connect` has set it up
    env: tuple[tuple[str, str], ...] = ()
    connected_env: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, str], ...] = ()     # of the user, in the home directory
    rewrites: bool = False                      # it writes its own file anew, once it has read it


FILE = "hello.txt"
PATIENCE_S = 50
TRIALS = {
    "claude": Trial(
        "claude/node_modules/.bin/claude",
        ("-p", "--allowedTools", "Write", "--output-format", "text", "--"),
        Tool("Write", {"file_path": "{here}/hello.txt", "content": "from the stack"}),
        env=(("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1"), ("DISABLE_TELEMETRY", "1")),
        files=((".claude/settings.json", '{"theme": "dark"}'),)),
    "codex": Trial(
        "codex/node_modules/.bin/codex",
        ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox",
         "-c", "analytics.enabled=false", "-c", "check_for_update_on_startup=false"),
        Tool("exec_command", {"cmd": "printf 'from the stack' > hello.txt"}),
        connected=("--profile", "llmstack"),
        files=((".codex/config.toml", 'model = "gpt-5"\n'),)),
    "qwen": Trial(
        "qwen/node_modules/.bin/qwen", ("--yolo", "-p"),
        Tool("write_file", {"file_path": "{here}/hello.txt", "content": "from the stack"}),
        files=((".qwen/settings.json",
                '{\n    "privacy": {"usageStatisticsEnabled": false},  // mine\n'
                '    "general": {"enableAutoUpdate": false}\n}\n'),), rewrites=True),
    "continue": Trial(
        "continue/node_modules/.bin/cn", ("--auto", "-p"),
        Tool("Write", {"filepath": "{here}/hello.txt", "content": "from the stack"}),
        env=(("CONTINUE_TELEMETRY_ENABLED", "0"),)),
    "aider": Trial(
        "aider/bin/aider",
        ("--no-git", "--yes-always", "--no-check-update", "--analytics-disable", "--no-pretty",
         "--no-show-release-notes", "--edit-format", "whole", FILE, "--message"),
        None, env=(("AIDER_ANALYTICS", "false"),)),
    "llm": Trial("llm/bin/llm", ("--functions", "def hello(text: str): "
                 "open('hello.txt', 'w').write(text); return 'ok'"),
                 Tool("hello", {"text": "from the stack"}), connected=("-m", "llmstack/auto")),
    "opencode": Trial(
        os.environ.get("LLMSTACK_TEST_OPENCODE") or "opencode/none", ("run",),
        Tool("write", {"filePath": "{here}/hello.txt", "content": "from the stack"}),
        env=(("OPENCODE_DISABLE_MODELS_FETCH", "1"), ("OPENCODE_DISABLE_AUTOUPDATE", "1")),
        connected_env=(("OPENCODE_CONFIG", ".llmstack/opencode.json"),)),
    "pi": Trial(
        "pi/node_modules/.bin/pi", ("--offline", "-p"),
        Tool("write", {"path": "{here}/hello.txt", "content": "from the stack"}),
        env=(("PI_TELEMETRY", "0"), ("PI_OFFLINE", "1"))),
}
BY_ENVIRONMENT = ("claude", "codex", "qwen", "aider", "llm", "opencode")


def needs(name: str) -> Trial:
    trial = TRIALS[name]
    if not (CLIENTS.is_dir() and (CLIENTS / trial.program).exists()):
        pytest.skip(NO_CLIENTS)
    return trial


class Stack(NamedTuple):
    """A router, and the provider behind it."""

    url: str
    provider: Provider


@pytest.fixture(params=["", KEY], ids=["no key", "key"])
def stack(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
          ) -> Iterator[Stack]:
    if not CLIENTS.is_dir():
        pytest.skip(NO_CLIENTS)
    desk = tmp_path / "desk"
    (desk / ".llmstack").mkdir(parents=True)
    (desk / ".llmstack" / "models.ini").write_text(LADDER)
    if request.param:
        monkeypatch.setenv("LLMSTACK_API_KEY", request.param)
    provider = Provider()
    command = [sys.executable, PROGRAM, "serve", "--port", "0"]
    router = subprocess.Popen([*command, "--upstream", provider.url], cwd=desk, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)
    assert router.stdout
    yield Stack(router.stdout.readline().split()[0], provider)
    router.terminate()
    router.communicate(timeout=20)
    provider.close()


def environment(name: str, stack: Stack) -> dict[str, str]:
    """What a client's process gets: a home of the test's own, and no way out."""
    env = {"PATH": os.pathsep.join((str((CLIENTS / TRIALS[name].program).parent),
                                    os.environ["PATH"])),
           "HOME": os.environ["HOME"], "TERM": "dumb", "NO_PROXY": "127.0.0.1,localhost",
           "LLMSTACK_REMOTE_URL": stack.url, **dict.fromkeys(PROXIES, OUTSIDE),
           "DO_NOT_TRACK": "1", "NO_COLOR": "1", **dict(TRIALS[name].env)}
    if name == "qwen":                          # it asks its proxy for 127.0.0.1, too
        env = {variable: text for variable, text in env.items() if variable not in PROXIES}
    key = os.environ.get("LLMSTACK_API_KEY")
    if key:
        env["LLMSTACK_API_KEY"] = key
    if key and name == "aider":                 # what connect says
        env["OPENAI_API_KEY"] = key
    return env


def ask(name: str, stack: Stack, prompt: str, by_environment: bool) -> str:
    """What the client prints, on both of its streams."""
    trial = TRIALS[name]
    env = environment(name, stack)
    command = [str(CLIENTS / trial.program), *trial.connected, *trial.words, prompt]
    env.update(trial.connected_env if not by_environment else ())
    if by_environment:
        command = [sys.executable, PROGRAM, "run-with", name, *trial.words, prompt]
    done = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)
    try:
        return done.communicate(timeout=PATIENCE_S)[0]
    except subprocess.TimeoutExpired:
        os.killpg(done.pid, 9)
        said = done.communicate()[0]
        raise AssertionError(f"still running: {said[-2000:]}") from None


def set_up(name: str, stack: Stack) -> dict[Path, bytes]:
    """Connect a client beside what its user has; the user's files."""
    home = Path(os.environ["HOME"])
    files = {}
    for path, text in TRIALS[name].files:
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(text)
        files[home / path] = text.encode()
    assert llmstack.main(["connect", name, "--url", stack.url]) == 0
    if name == "llm" and os.environ.get("LLMSTACK_API_KEY"):    # what connect says
        keys = home / ".config" / "io.datasette.llm" / "keys.json"
        keys.write_text(f'{{"llmstack": "{KEY}"}}')
    return files


def script(name: str, stack: Stack) -> None:
    """The provider calls the tool that writes the file, or says the file, then says it is done."""
    tool = TRIALS[name].tool
    if tool:
        arguments = {k: str(v).format(here=os.getcwd()) for k, v in tool.arguments.items()}
        stack.provider.tool = Tool(tool.name, arguments)
    else:
        stack.provider.text = f"all done\n\n{FILE}\n```\nfrom the stack\n```\n"


def of_agent(name: str, stack: Stack) -> list[Asked]:
    """What its agent has asked, without titles and the like."""
    trial = TRIALS[name]
    return [asked for asked in stack.provider.asked if asked.tools or trial.tool is None]


WAYS = [*(pytest.param(name, False, id=name + "-connect") for name in TRIALS),
        *(pytest.param(name, True, id=name + "-run-with") for name in BY_ENVIRONMENT)]


@pytest.mark.parametrize(("name", "by_environment"), WAYS)
def test_prompt_tool_call_tool_run_answer(name: str, by_environment: bool, stack: Stack) -> None:
    needs(name)
    files = {} if by_environment else set_up(name, stack)
    script(name, stack)
    output = ask(name, stack, "write hello.txt", by_environment)
    assert Path(FILE).exists(), output[-3000:]
    assert Path(FILE).read_text().strip() == "from the stack"
    assert "all done" in output
    provider = stack.provider
    asked = [(one.body["model"], one.body["stream"]) for one in of_agent(name, stack)]
    assert set(asked) == {("code-smart", True)}
    assert not any(KEY in str(a.headers) for a in provider.asked), "the key stays with the router"
    if not by_environment and name != "opencode":       # that one's files are the project's
        assert llmstack.main(["connect", name, "--undo"]) == 0
        for path, data in files.items():
            now = path.read_bytes()
            assert TRIALS[name].rewrites or now == data, f"{path} is not as it was"
            assert b"llmstack" not in now
            assert stack.url.encode() not in now


@pytest.mark.parametrize(("name", "by_environment"), WAYS)
def test_a_long_prompt_arrives_whole(name: str, by_environment: bool, stack: Stack) -> None:
    needs(name)
    if not by_environment:
        set_up(name, stack)
    prompt = "Say something. " + "".join(f"{n} quick brown foxes. " for n in range(5000))
    output = ask(name, stack, prompt, by_environment)
    assert "all done" in output, output[-3000:]
    whole = [a for a in of_agent(name, stack) if a.holds("4999 quick brown foxes.")]
    assert {asked.body["model"] for asked in whole} == {"code-fast"}, "the ladder went by its length"


@pytest.mark.parametrize(("name", "by_environment"), WAYS)
def test_an_error_of_the_provider_is_read_by_the_user(name: str, by_environment: bool,
                                                      stack: Stack) -> None:
    needs(name)
    if not by_environment:
        set_up(name, stack)
    stack.provider.error = "this model is on strike"
    output = ask(name, stack, "say something", by_environment)
    assert "this model is on strike" in output, output[-3000:]


@pytest.mark.parametrize("by_environment", [False, True], ids=["connect", "run-with"])
def test_aiders_commit_messages_are_the_fast_tiers(by_environment: bool, stack: Stack,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    trial = needs("aider")
    subprocess.run(["git", "init", "-q"], check=True)
    for name in ("user.name", "user.email"):
        subprocess.run(["git", "config", name, "a@b"], check=True)
    if not by_environment:
        set_up("aider", stack)
    script("aider", stack)
    words = tuple(word for word in trial.words if word != "--no-git")
    monkeypatch.setitem(TRIALS, "aider", trial._replace(words=words))
    ask("aider", stack, "write hello.txt", by_environment)
    models = [asked.body["model"] for asked in stack.provider.asked]
    assert models[0] == "code-smart"
    assert set(models[1:]) == {"code-fast"}
