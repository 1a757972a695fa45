"""What a hostile or an unlucky day found and no other file tests: upstreams that never end, servers that never die."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest

import build_zipapp
import llmstack
from tests.scripted import Connection, always, answer
from tests.test_engine import Stage, open_stage, stage, wait_for  # noqa: F401  # fixtures
from tests.test_router import (  # noqa: F401  # fixtures
    CHAT,
    SSE_CHUNKED,
    Start,
    chat,
    chunk,
    error_of,
    post,
    start,
)
from tests.test_stack import PROGRAM, Project, ask, command, free_ports, project  # noqa: F401  # fixtures

# ---- an upstream that trickles


def drip(up: Connection, data: bytes, stop: threading.Event) -> None:
    """The same bytes again and again, until the other side has had enough."""
    try:
        while not stop.is_set():
            up.send(data)
            stop.wait(0.002)
    except OSError:
        stop.set()


@pytest.mark.parametrize("data", [b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_interim_answers_have_an_end(start: Start, data: bytes) -> None:  # noqa: F811
    rig = start()
    client = rig.client()
    client.send(chat("code-smart"))
    up = rig.upstream.next()
    up.read()
    drip(up, data, threading.Event())
    got = client.read_message("POST")
    assert got.status == 502
    assert "its head does not end" in error_of(got)["message"]


@pytest.mark.parametrize("data", [b"H", b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: y\r\n"])
def test_a_client_that_leaves_a_trickling_head_is_noticed(
        start: Start, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:  # noqa: F811
    monkeypatch.setattr(llmstack, "MAX_INTERIM", 10**9)
    monkeypatch.setattr(llmstack, "MAX_HEAD_BYTES", 10**9)
    rig = start()
    client = rig.client()
    client.send(chat("code-smart"))
    up = rig.upstream.next()
    up.read()
    stop = threading.Event()
    thread = threading.Thread(target=drip, args=(up, data, stop))
    thread.start()
    client.close()
    thread.join(15)
    assert stop.is_set(), "the router has closed its connection"


def test_a_head_has_its_time(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(llmstack, "HEAD_TIMEOUT_S", 0.05)
    rig = start()
    client = rig.client()
    client.send(chat("code-smart"))
    up = rig.upstream.next()
    up.read()
    drip(up, b"x", threading.Event())
    assert client.read_message("POST").status == 502


# ---- streams that something is added to


def test_a_stream_is_asked_for_uncompressed(start: Start) -> None:  # noqa: F811
    rig = start(always(answer()))
    rig.ask(chat("code-smart", "Accept-Encoding: gzip, br", stream=True))
    rig.ask(chat("gpt-unknown", "Accept-Encoding: gzip, br", stream=True))
    rig.ask(chat("code-smart", "Accept-Encoding: gzip, br"))
    asked = [m.header("accept-encoding") for m in rig.upstream.requests if m.target == CHAT]
    assert asked[0] == "identity"
    assert asked[-1] == "gzip, br"
    assert "gzip" not in "".join(asked[:-1])


MESSAGE = b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"%b"}}\n\n'


@pytest.mark.parametrize("prose", [b"an error occurred", b'\\"error\\"', b"message_stop", b"event: error"])
def test_prose_about_errors_is_no_end_of_a_stream(start: Start, prose: bytes) -> None:  # noqa: F811
    rig = start()
    client = rig.client()
    client.send(post({"model": "code-smart", "stream": True, "messages": []}, target="/v1/messages"))
    up = rig.upstream.next()
    up.read()
    up.send(SSE_CHUNKED, chunk(MESSAGE % prose), b"0\r\n\r\n")
    client.read_head()
    assert b"event: error\ndata: " in client.rest(), "its end is missing, and that is said"


# ---- processes


def test_a_server_that_does_not_die_keeps_its_memory(
        stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Its model stays "stopping", and nobody gets the memory it has."""
    assert stage.hello("code-smart") == "code-smart says hello"
    stage.wait_idle("code-smart")
    tries = threading.Semaphore(0)
    dies = threading.Event()
    stop = llmstack.stop_process

    def stubborn(*words: Any) -> bool:
        tries.release()
        return stop(*words) if dies.wait(0.01) else False

    monkeypatch.setattr(llmstack, "stop_process", stubborn)
    thread = threading.Thread(target=stage.engine.unload, args=([stage.engine.models["code-smart"]],))
    thread.start()
    for _ in range(3):
        assert tries.acquire(timeout=15)
    assert stage.states() == {"code-smart": "stopping"}
    dies.set()
    thread.join(15)
    assert stage.states() == {}


def test_port_0_is_a_free_one(project: Project) -> None:  # noqa: F811
    assert llmstack.main(["start", "--port", "0"]) == 0
    record = llmstack.read_record(str(project.state / "router.pid"))
    assert record is not None
    assert record.port not in (0, project.router_port)
    assert llmstack.main(["status"]) == 0


def test_ctrl_c_during_start_leaves_nothing_up(project: Project, tmp_path: Path,  # noqa: F811
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    swap = tmp_path / "bin" / "llama-swap"
    swap.parent.mkdir()
    swap.write_text("#!/bin/sh\necho started > \"$0.started\"\nexec sleep 600\n")
    swap.chmod(0o755)
    monkeypatch.setenv("LLMSTACK_BIN_DIR", str(swap.parent))
    project.defaults = project.defaults.replace("embedded", "llama-swap")
    project.write("[hosted]\nrole = agent\nmodel = provider/some-model\n")
    process = subprocess.Popen([sys.executable, PROGRAM, "start"], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: Path(f"{swap}.started").exists(), "llama-swap, which never answers")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not list(project.state.glob("*.pid"))
    assert not llmstack.project_members(str(project.directory))


def test_reload_answers_with_the_routers_own_word(project: Project,  # noqa: F811
                                                  capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    llmstack.main(["start"])
    capsys.readouterr()
    project.write("[hosted]\nrole = agent\nmodel = \n")
    for name in ("load_config", "check_run_trust"):         # this side sees nothing wrong
        monkeypatch.setattr(llmstack, name, lambda *_: llmstack.Config())
    assert llmstack.main(["reload"]) == 1
    err = capsys.readouterr().err
    assert "the router keeps its old models.ini" in err
    assert "models.ini:" in err


def test_a_running_router_takes_in_no_file_that_is_not_trusted(project: Project) -> None:  # noqa: F811
    """What a pull brings reaches a router that runs by its own API, and by a signal, too."""
    llmstack.main(["start"])
    pulled = "[mine]\nrole = agent\nmodel = m\nbase_url = https://evil.example\napi_key_env = HOME\n"
    (project.state / "models.ini").write_text(project.defaults + pulled)
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(project.router_port, "/llmstack/reload")
    assert "is not trusted here as it is now" in json.loads(refused.value.read())["problem"]
    url = f"http://127.0.0.1:{project.router_port}/v1/models"
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert "mine" not in {model["id"] for model in json.loads(answer.read())["data"]}


def test_restart_without_its_models_ini_stops_nothing(project: Project,  # noqa: F811
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    llmstack.main(["start"])
    with monkeypatch.context() as inside:
        inside.setenv("LLMSTACK_MODELS_INI", str(project.directory / "gone.ini"))
        assert llmstack.main(["restart"]) == 2
    assert llmstack.main(["status"]) == 0


@pytest.fixture
def interrupted_pyz(tmp_path: Path) -> Path:
    """The zipapp with a program that is interrupted while it is being loaded."""
    path = tmp_path / "llmstack.pyz"
    build_zipapp.write(str(path), build_zipapp.build())
    with zipfile.ZipFile(path) as archive:
        main = archive.read("__main__.py")
    other = tmp_path / "interrupted.pyz"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("__main__.py", main)
        archive.writestr("llmstack.py", "raise KeyboardInterrupt\n")
    return other


def test_ctrl_c_in_the_first_moment_is_no_traceback(interrupted_pyz: Path) -> None:
    done = subprocess.run([sys.executable, str(interrupted_pyz), "status"], capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 130
    assert done.stderr.strip() == "llmstack: interrupted"


def test_a_full_disk_at_start_leaves_no_daemon(project: Project, capsys: pytest.CaptureFixture[str],  # noqa: F811
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The record cannot be written: the daemon that was spawned is ended, and the port is free."""
    write = llmstack.write_record

    def full(path: str, record: llmstack.Record) -> None:
        assert llmstack.process_started(record.pid), "it has been spawned"
        raise llmstack.UserError(f"cannot write {path}: No space left on device", "free some room")

    with monkeypatch.context() as inside:
        inside.setattr(llmstack, "write_record", full)
        assert llmstack.main(["start"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not llmstack.project_members(str(project.directory))
    assert llmstack.write_record is write
    assert llmstack.main(["start"]) == 0


def test_a_copied_project_does_not_own_the_originals_daemon(project: Project, tmp_path: Path,  # noqa: F811
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    llmstack.main(["start"])
    pid = project.pid("router")
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(project.directory), str(copy)], check=True)
    with monkeypatch.context() as inside:
        inside.chdir(copy)
        llmstack.main(["stop"])
    assert llmstack.process_started(pid), "it is the original's"
    assert llmstack.main(["status"]) == 0


