"""The daemons as a user runs them: real processes, and the real llama.cpp for the conversations."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

import llmstack
from tests.noise_model import render_noise_gguf

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = llmstack.PROGRAM
NO_MODELS = "[hosted]\nrole = agent\nmodel = provider/some-model\n"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def until(condition: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s: {what}")


def get(url: str) -> tuple[int, bytes]:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.status, answer.read()


def ask(port: int, path: str = "/v1/chat/completions", **body: Any) -> tuple[dict[str, str], bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(answer.headers), answer.read()


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True, timeout=120,
                          stdin=subprocess.DEVNULL, check=False, **options)


class Project:
    """A project in the current directory, with ports of its own."""

    def __init__(self, tiers: str = NO_MODELS, engine: str = "embedded") -> None:
        self.directory = Path.cwd()
        self.state = self.directory / ".llmstack"
        self.router_port, self.engine_port = free_ports(2)
        # Two threads would only wait for each other at models as small as the tests' own.
        self.defaults = (f"[DEFAULT]\nengine = {engine}\nthreads = 1\n"
                         f"router_port = {self.router_port}\nengine_port = {self.engine_port}\n")
        self.write(tiers)

    def write(self, tiers: str) -> None:
        self.state.mkdir(exist_ok=True)
        (self.state / "models.ini").write_text(self.defaults + tiers)
        llmstack.trust_project(llmstack.find_places(os.environ), "run")     # a path out of it, as its user would

    def pid(self, name: str) -> int:
        return int((self.state / f"{name}.pid").read_text().split()[0])

    def log(self, name: str) -> str:
        return (self.state / "logs" / f"{name}.log").read_text()


@pytest.fixture
def project() -> Iterator[Project]:
    yield Project()
    llmstack.main(["stop"])


@pytest.fixture
def noise(home: Path) -> Path:
    path = home / "noise.gguf"
    path.write_bytes(render_noise_gguf())
    return path


def two_tiers(model: Path) -> str:
    return (f"[code-fast]\nrole = fast\npath = {model}\nctx_size = 8k\nsize_gb = 0.1\n"
            f"[code-smart]\nrole = agent\npath = {model}\nctx_size = 2k\nsize_gb = 0.1\n")


def alive(pid: int) -> bool:
    return bool(llmstack.process_started(pid))


# ---- up and down


def test_start_brings_both_up_and_stop_leaves_nothing(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["start"]) == 0
    said = capsys.readouterr().out
    assert f"http://127.0.0.1:{project.router_port}/v1" in said
    assert get(f"http://127.0.0.1:{project.router_port}/models.ini")[1] == (project.state / "models.ini").read_bytes()
    assert get(f"http://127.0.0.1:{project.engine_port}/health") == (200, b"OK")
    assert (project.state / "active-channel").read_text() == "current\n"
    pid = project.pid("router")
    assert list(llmstack.project_members(str(project.directory))) == [pid], "one process"
    assert llmstack.main(["stop"]) == 0
    assert not alive(pid)
    assert not list(project.state.glob("*.pid"))
    assert not (project.state / "active-channel").exists()


def test_a_start_that_is_refused_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(llmstack, "USUAL_PLACES", ())
    assert llmstack.main(["start"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "llmstack: error: there is no llama-server on this machine", "hint: " + llmstack.LLAMA_SERVER_HINT]
    assert not Path(".llmstack").exists()


def test_start_seeds_a_directory_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "check_plan", lambda plan: None)
    monkeypatch.setattr(llmstack, "start_stack", lambda plan, again: True)
    assert llmstack.main(["start"]) == 0
    assert "Wrote" in capsys.readouterr().out
    assert Path(".llmstack/models.ini").read_bytes() == llmstack.seed_text()[0]


def test_a_directory_below_a_project_is_that_project(project: Project, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    below = project.directory / "src" / "deep"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert llmstack.main(["start"]) == 0
    assert llmstack.main(["status", "--json"]) == 0
    assert not (below / ".llmstack").exists()
    monkeypatch.chdir(project.directory)
    assert llmstack.main(["stop"]) == 0
    assert capsys.readouterr().out.endswith("Stopped.\n")


@pytest.mark.parametrize("words", [["status", "--json"], ["fit", "--json"], ["install", "--print"]])
def test_before_a_project_has_tiers_those_it_would_be_given_are_shown(words: list[str], monkeypatch: pytest.MonkeyPatch,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "this_machine", lambda config: llmstack.Machine(5.7, "a small one", False))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    llmstack.main(words)
    given = llmstack.parse_models_ini(llmstack.seed_text()[0].decode())[0].by_name("code-smart")
    assert given is not None
    assert given.ctx_size == 16_384, "profile 8"
    shown = json.loads(capsys.readouterr().out)
    if words[0] == "install":
        assert shown["provider"]["llama.cpp"]["models"]["code-smart"]["limit"]["context"] == given.ctx_size
    else:
        assert next(t for t in shown["tiers"] if t["name"] == "code-smart")["ctx_size"] == given.ctx_size
    assert not Path(".llmstack").exists()


def test_a_second_start_finds_it_running(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    llmstack.main(["start"])
    pid = project.pid("router")
    capsys.readouterr()
    assert llmstack.main(["start"]) == 0
    assert capsys.readouterr().out.startswith("Running already")
    assert project.pid("router") == pid


def test_a_plain_start_joins_what_runs_on_another_channel_and_port(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.write(NO_MODELS + "model_next = provider/other\n")
    assert llmstack.main(["start", "--next", "--port", str(free_ports(1)[0])]) == 0
    pid = project.pid("router")
    capsys.readouterr()
    assert llmstack.main(["start"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("the next channel")
    assert llmstack.main(["start", "--current"]) == 1
    assert "restart --current" in capsys.readouterr().err
    assert project.pid("router") == pid


def test_parallel_starts_end_with_one_stack(project: Project) -> None:
    starts = [subprocess.Popen([sys.executable, PROGRAM, "start"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               stdin=subprocess.DEVNULL, text=True) for _ in range(4)]
    said = [p.communicate(timeout=60)[0] for p in starts]
    assert [p.returncode for p in starts] == [0, 0, 0, 0], said
    assert sum("Router  http" in text for text in said) == 1
    assert sum("Running already" in text for text in said) == 3


def test_stop_with_nothing_running(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "port_is_free", lambda *_: True)      # a stack of the developer's own may be running
    assert llmstack.main(["stop"]) == 0
    assert capsys.readouterr().out == "Nothing is running.\n"


def test_a_dead_daemon_is_started_again(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    llmstack.main(["start"])
    pid = project.pid("router")
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), "the daemon is dead")
    assert llmstack.main(["status"]) == 1
    assert "died" in capsys.readouterr().out
    assert llmstack.main(["start"]) == 0
    assert "The daemon has died; cleaning up after it and starting it again" in capsys.readouterr().out
    assert llmstack.main(["status"]) == 0


def test_a_daemon_without_a_record_is_found_and_ended(project: Project) -> None:
    """As a full disk at start would leave one behind."""
    llmstack.main(["start"])
    pid = project.pid("router")
    (project.state / "router.pid").unlink()
    os.unlink(llmstack.owner_file(llmstack.find_places(os.environ).data))
    assert llmstack.main(["stop"]) == 0
    assert not alive(pid)


def test_the_daemon_outlives_its_terminal(project: Project) -> None:
    llmstack.main(["start"])
    os.kill(project.pid("router"), signal.SIGHUP)
    until(lambda: "models.ini read again" in project.log("router"), "the router has seen SIGHUP")
    assert get(f"http://127.0.0.1:{project.engine_port}/health")[0] == 200
    assert os.getsid(project.pid("router")) == project.pid("router") != os.getsid(0)


def test_a_stack_whose_directory_was_deleted_can_still_be_stopped(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    llmstack.main(["start"])
    pids = [project.pid("router")]
    shutil.rmtree(project.state)
    capsys.readouterr()
    assert llmstack.main(["stop"]) == 0
    assert capsys.readouterr().out == "Stopped.\n"
    assert not any(map(alive, pids))


# ---- what is not ours


def test_a_busy_port_names_its_holder(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", project.router_port)):
        assert llmstack.main(["start"]) == 1
    assert f"holds {project.router_port}" in capsys.readouterr().err
    assert not (project.state / "router.pid").exists()


@pytest.mark.parametrize("content", ["{pid}\n", '{pid}\n{{"started": "long ago", "stack": "x", "kind": "router"}}\n', "abc", ""])
def test_stop_leaves_strangers_alone(project: Project, content: str) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        for name in ("router", "llama-swap"):
            (project.state / f"{name}.pid").write_text(content.format(pid=stranger.pid))
        assert llmstack.main(["stop"]) == 0
        assert stranger.poll() is None
        assert alive(stranger.pid)
    finally:
        stranger.kill()
        stranger.wait()


def test_a_second_project_is_told_who_owns_the_daemons(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    llmstack.main(["start"])
    (tmp_path / "second").mkdir()
    with monkeypatch.context() as inside:
        inside.chdir(tmp_path / "second")
        Project()
        assert llmstack.main(["start"]) == 1
        what, hint = capsys.readouterr().err.splitlines()[-2:]
        assert what.endswith(f"another llmstack ({project.directory}) holds {project.router_port} and {project.engine_port}")
        assert f"`llmstack install --external http://127.0.0.1:{project.router_port}` uses it from here" in hint
        assert llmstack.main(["stop"]) == 1
        assert str(project.directory) in capsys.readouterr().err
    assert llmstack.main(["status"]) == 0


# ---- options, files


def test_host_and_port_are_seen_by_status_and_kept_by_restart(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_ports(1)[0]
    assert llmstack.main(["start", "--port", str(port)]) == 0
    capsys.readouterr()
    assert llmstack.main(["status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["router"]["url"] == f"http://127.0.0.1:{port}"
    assert status["running"] is True
    assert llmstack.main(["start"]) == 0
    assert llmstack.main(["start", "--port", str(project.router_port)]) == 1, "another address than the running one"
    assert llmstack.main(["restart"]) == 0
    assert get(f"http://127.0.0.1:{port}/models.ini")[0] == 200


def test_restart_with_a_broken_file_stops_nothing(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    llmstack.main(["start"])
    project.write("[broken\n")
    assert llmstack.main(["restart"]) == 2
    line = project.defaults.count("\n") + 1
    assert f"models.ini:{line}:" in capsys.readouterr().err
    assert get(f"http://127.0.0.1:{project.router_port}/models.ini")[0] == 200


def test_reload_changes_routing_live_and_refuses_a_broken_file(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    llmstack.main(["start"])
    project.write(NO_MODELS + "[ROUTING]\nhigh_fidelity_ceiling = 5\n")
    assert llmstack.main(["reload"]) == 0
    until(lambda: "read again" in project.log("router"), "the log")
    project.write("[ROUTING]\nmulti_turn = many\n")
    assert llmstack.main(["reload"]) == 2
    os.kill(project.pid("router"), signal.SIGHUP)
    until(lambda: "refused, the old one stays" in project.log("router"), "the refusal")
    _, body = get(f"http://127.0.0.1:{project.router_port}/v1/models")
    assert json.loads(body)["data"][0]["id"] == "auto"


def test_other_addresses_need_a_key(project: Project, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["start", "--host", "0.0.0.0"]) == 2
    assert "LLMSTACK_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("LLMSTACK_API_KEY", "a-key-of-the-test")
    assert llmstack.main(["start", "--host", "0.0.0.0"]) == 0
    assert llmstack.main(["status"]) == 0
    with pytest.raises(urllib.error.HTTPError, match="401"):
        get(f"http://127.0.0.1:{project.router_port}/models.ini")
    for file in project.state.rglob("*"):
        assert not file.is_file() or b"a-key-of-the-test" not in file.read_bytes()


def test_an_engine_that_cannot_start_shows_its_last_words(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    swap = tmp_path / "bin" / "llama-swap"
    swap.parent.mkdir()
    swap.write_text("#!/bin/sh\necho 'no such config key' >&2\nexit 3\n")
    swap.chmod(0o755)
    monkeypatch.setenv("LLMSTACK_BIN_DIR", str(swap.parent))
    project.defaults = project.defaults.replace("embedded", "llama-swap")
    project.write(NO_MODELS)
    assert llmstack.main(["start"]) == 1
    err = capsys.readouterr().err
    assert "exited with 3 at start" in err
    assert "no such config key" in err
    assert not list(project.state.glob("*.pid"))


# ---- the command line


def test_serve_prints_its_address_first_and_ends_on_interrupt() -> None:
    process = subprocess.Popen([sys.executable, PROGRAM, "serve", "--upstream", "http://127.0.0.1:9", "--port", "0"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    assert process.stdout
    url = process.stdout.readline().split()[0]
    assert get(url + "/models.ini")[1] == (ROOT / "models.ini").read_bytes()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_closed_pipe_is_no_traceback(project: Project) -> None:
    process = subprocess.Popen([sys.executable, PROGRAM, "status", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=20)
    assert err == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, PROGRAM, "status"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["llmstack: error: cannot write the output: No space left on device",
                                        "hint: redirect the output elsewhere"]


def test_no_output_at_all_is_no_traceback() -> None:
    done = subprocess.run(["sh", "-c", f"exec '{sys.executable}' '{PROGRAM}' status >&-"], stderr=subprocess.PIPE, text=True,
                          check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_data_directory_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMSTACK_DATA_DIR", str(tmp_path / "file" / "data"))
    assert llmstack.main(["start", "--demo"]) == 1
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["llmstack", "hint"]


@pytest.mark.parametrize("words", [["strat"], ["start", "--prot", "1"], ["start", "--port", "abc"], ["why"],
                                   ["serve", "--upstream", "ftp://x"]])
def test_usage_errors_are_two_lines_and_exit_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(words) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert err[0].startswith("llmstack: error: ")
    assert err[1].startswith("hint: ")


def test_a_full_disk_or_a_read_only_directory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path(".llmstack").write_text("a file where the directory should be")
    assert llmstack.main(["start"]) == 1
    assert "Traceback" not in capsys.readouterr().err


# ---- conversations with the real llama.cpp


def engines() -> list[Any]:
    missing = pytest.mark.skipif(shutil.which("llama-swap") is None, reason="no llama-swap on PATH")
    return ["embedded", pytest.param("llama-swap", marks=missing)]


@pytest.mark.parametrize("engine", engines())
def test_a_chat_through_auto_is_answered_by_real_llama_cpp(engine: str, real_data: Path, noise: Path,
                                                           monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "find_program", only_llama_swap(llmstack.find_program))
    project = Project(two_tiers(noise), engine)
    message = {"role": "user", "content": "capital of France?"}
    try:
        assert llmstack.main(["start"]) == 0
        headers, body = ask(project.router_port, model="auto", stream=True, max_tokens=8, messages=[message])
        assert headers["X-LLMStack-Model"] == "code-smart"
        events = [line for line in body.decode().split("\n\n") if line.startswith("data: {")]
        words = [json.loads(e[6:])["choices"][0]["delta"].get("content") for e in events]
        assert any(words)
        assert "loading" in body.decode(), "a stream that waits says so"
        assert body.endswith(b"data: [DONE]\n\n")
        headers, body = ask(project.router_port, model="", messages=[{"role": "user", "content": "x" * 7_000}], max_tokens=600)
        assert headers["X-LLMStack-Model"] == "code-fast", "1,750 tokens and room to answer do not fit code-smart's 2k"
        assert json.loads(body)["usage"]["prompt_tokens"] > 2048
        for path, extra in (("/v1/completions", {"prompt": "one two"}), ("/v1/responses", {"input": "one two"}),
                            ("/v1/messages", {"messages": [message]}), ("/v1/messages/count_tokens", {"messages": [message]}),
                            ("/completion", {"prompt": "one", "n_predict": 2}),
                            ("/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 2})):
            headers, body = ask(project.router_port, path, model="auto", max_tokens=4, **extra)
            assert headers["X-LLMStack-Model"] == ("code-fast" if path == "/infill" else "code-smart"), path
            assert json.loads(body), path
        assert llmstack.main(["status"]) == 0
        assert "loaded" in capsys.readouterr().out
    finally:
        llmstack.main(["stop"])


def only_llama_swap(find: Callable[..., str]) -> Callable[..., str]:
    """Hides any llama-server of the machine, so that the one from PyPI is used everywhere."""
    def find_program(name: str, *places: Any) -> str:
        return "" if name.startswith("llama-server") else find(name, *places)
    return find_program


def test_after_kill_9_of_the_engine_its_children_go_and_nothing_else(real_data: Path, noise: Path,
                                                                     capsys: pytest.CaptureFixture[str],
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "find_program", only_llama_swap(llmstack.find_program))
    project = Project(two_tiers(noise))
    try:
        llmstack.main(["start"])
        ask(project.router_port, model="code-smart", messages=[{"role": "user", "content": "x"}], max_tokens=1)
        record = llmstack.read_record(str(project.state / "router.pid"))
        assert record is not None
        children = [pid for pid in llmstack.stack_members(record.stack) if pid != record.pid]
        assert len(children) == 2
        os.kill(record.pid, signal.SIGKILL)
        until(lambda: not alive(record.pid), "the daemon is dead")
        assert all(map(alive, children)), "orphans, as after any kill -9"
        assert llmstack.main(["start"]) == 0
        assert "cleaning up after it" in capsys.readouterr().out
        assert not any(map(alive, children))
        assert ask(project.router_port, model="auto", messages=[{"role": "user", "content": "x"}], max_tokens=1)
    finally:
        llmstack.main(["stop"])
