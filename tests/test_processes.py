"""Whose a process is: records that came along with a copy, marks in environments, who holds a port."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

import llmstack

READY = "import sys; print(flush=True); sys.stdin.read()"
LISTEN = ("import socket, sys; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen();"
          "print(s.getsockname()[1], flush=True); sys.stdin.read()")
Start = Callable[..., "subprocess.Popen[str]"]
only_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")


@pytest.fixture
def start() -> Iterator[Start]:
    """Start children that stay until the end: start([words], mark, code); the first line is read."""
    children: list[subprocess.Popen[str]] = []

    def begin(code: str = READY, *words: str, mark: str = "", **options: Any) -> subprocess.Popen[str]:
        env = {**os.environ, **({llmstack.STACK_VARIABLE: mark} if mark else {})}
        child = subprocess.Popen([sys.executable, "-S", "-c", code, *words], env=env, text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 start_new_session=True, **options)
        children.append(child)
        return child

    yield begin
    for child in children:
        child.kill()
        child.communicate()


def line_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout
    return child.stdout.readline().strip()


def record_of(child: subprocess.Popen[str], mark: str) -> llmstack.Record:
    line_of(child)
    return llmstack.Record(child.pid, llmstack.process_started(child.pid), mark, kind="router")


def make_project(path: Path) -> Path:
    (path / ".llmstack").mkdir(parents=True)
    return path


def pid_file(project: Path) -> str:
    return str(project / ".llmstack" / "router.pid")


# ---- records


def test_a_copied_directory_does_not_own_the_originals_daemons(start: Start, tmp_path: Path) -> None:
    original, copy = make_project(tmp_path / "a"), tmp_path / "b"
    mark = llmstack.new_mark(str(original))
    child = start(mark=mark)
    record = record_of(child, mark)
    llmstack.write_record(pid_file(original), record)
    shutil.copytree(original, copy)
    assert llmstack.read_record(pid_file(copy)) is None
    assert not llmstack.owned_process(record, str(copy))
    assert llmstack.stop_recorded(record, str(copy), 1) == 0
    assert llmstack.stop_members(llmstack.project_members(str(copy))) == 0
    assert child.poll() is None
    assert llmstack.read_record(pid_file(original)) == record
    assert record.project == str(original)
    assert llmstack.stop_recorded(record, str(original), 5) == 1
    assert child.wait() == -signal.SIGTERM


def test_stop_in_a_copy_stops_nothing(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    original, copy = make_project(tmp_path / "a"), tmp_path / "b"
    mark = llmstack.new_mark(str(original))
    child = start(mark=mark)
    llmstack.write_record(pid_file(original), record_of(child, mark))
    shutil.copytree(original, copy)
    monkeypatch.chdir(copy)
    assert llmstack.main(["stop"]) == 0
    assert "Stopped" not in capsys.readouterr().out
    assert child.poll() is None


def test_a_link_makes_no_record_of_another_project_ours(start: Start, tmp_path: Path) -> None:
    original, hostile = make_project(tmp_path / "a"), make_project(tmp_path / "b")
    mark = llmstack.new_mark(str(original))
    llmstack.write_record(pid_file(original), record_of(start(mark=mark), mark))
    os.symlink(pid_file(original), pid_file(hostile))
    assert llmstack.read_record(pid_file(hostile)) is None


@only_proc
@pytest.mark.parametrize("its_mark", ["", "another"])
def test_a_record_made_up_for_a_stranger_stops_nobody(start: Start, its_mark: str) -> None:
    """Everything in the record is right but the mark, which nobody can know."""
    project = make_project(Path.cwd() / "clone")
    own = llmstack.new_mark(str(project))
    stranger = start(mark=llmstack.new_mark(str(project)) if its_mark else "")
    record = record_of(stranger, own)
    llmstack.write_record(pid_file(project), record)
    assert record.alive
    assert llmstack.record_is_ours(record, str(project))
    assert llmstack.read_record(pid_file(project)) is None
    assert not llmstack.owned_process(record, str(project))
    assert llmstack.stop_recorded(record, str(project), 1) == 0
    assert stranger.poll() is None


@only_proc
@pytest.mark.parametrize("words", ["reload", "status", "stop"])
def test_no_command_touches_the_stranger_of_a_made_up_record(start: Start, words: str,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGHUP, too, ends most programs; and a key would go to the address that the record names."""
    project = make_project(Path.cwd() / "clone")
    (project / ".llmstack" / "models.ini").write_text("[a]\nrole = agent\nmodel = p/m\n")
    stranger = start(LISTEN)
    port = int(line_of(stranger))
    record = llmstack.Record(stranger.pid, llmstack.process_started(stranger.pid),
                             llmstack.new_mark(str(project)), "127.0.0.1", port, "router")
    llmstack.write_record(pid_file(project), record)
    asked: list[str] = []
    monkeypatch.setattr(llmstack.Upstream, "get", lambda self, path, *_, **__: asked.append(path))
    monkeypatch.setenv("LLMSTACK_API_KEY", "a-key-of-the-test")
    monkeypatch.chdir(project)
    assert llmstack.main([words]) == (0 if words == "stop" else 1)
    assert stranger.poll() is None
    assert asked == []


def test_where_no_environment_can_be_read_the_command_line_must_be_ours(
        start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "process_environment", lambda pid: None)
    mark = llmstack.new_mark(str(tmp_path))
    stranger, ours = start(), start(READY, llmstack.PROGRAM)
    config = start(READY, "-config", str(tmp_path / ".llmstack" / "llama-swap.yaml"))
    assert not llmstack.owned_process(record_of(stranger, mark), str(tmp_path))
    assert llmstack.owned_process(record_of(ours, mark), str(tmp_path))
    assert llmstack.owned_process(record_of(config, mark), str(tmp_path))


GOOD = {"started": "x", "stack": "stack-1:/p", "host": "h", "port": 1, "kind": "router",
        "channel": "next"}


def test_a_whole_record_is_read() -> None:
    read = llmstack.parse_record("12\n" + json.dumps(GOOD))
    assert read == llmstack.Record(12, "x", "stack-1:/p", "h", 1, "router", "next")


@pytest.mark.parametrize("number", ["", "0", "1", "-5", "+5", "5.0", "abc", "9" * 11, "9" * 5000,
                                    "\u0665\u0665", " 5", "5 6", "1e3", "nan"])
def test_a_record_of_no_process_is_none(number: str) -> None:
    assert llmstack.parse_record(number + "\n" + json.dumps(GOOD)) is None


@pytest.mark.parametrize("key", sorted(GOOD))
@pytest.mark.parametrize("value", [None, True, 1.5, float("nan"), [], {}, ["x"], -1, 2 ** 70, "\x1b[2J"])
def test_a_record_with_a_value_of_another_type_is_none(key: str, value: Any) -> None:
    assert llmstack.parse_record("12\n" + json.dumps({**GOOD, key: value})) is None


@pytest.mark.parametrize("rest", ["", "[]", "5", "[" * 200_000, '{"a":' * 50_000, "NaN", "\0"])
def test_a_record_that_is_no_object_is_none(rest: str) -> None:
    assert llmstack.parse_record("12\n" + rest) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_a_pipe_in_the_place_of_a_record_hangs_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "router.pid")
    assert llmstack.read_record(str(tmp_path / "router.pid")) is None


@only_proc
def test_a_start_time_names_the_boot_as_well() -> None:
    """After a reboot another process may have the number and the ticks of a daemon that is gone."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    assert llmstack.process_started(os.getpid()).startswith(boot + "-")


# ---- marks


@pytest.mark.parametrize("name", ["plain", "with a blank", "per%cent", "\u00fcml\u00e4ut", "a:b", "new\nline"])
def test_a_mark_names_its_project_without_a_blank(tmp_path: Path, name: str) -> None:
    project = make_project(tmp_path / name)
    mark = llmstack.new_mark(str(project))
    assert mark.isascii()
    assert mark.split() == [mark]
    assert mark != llmstack.new_mark(str(project))
    record = llmstack.Record(2, "x", mark)
    assert record.project == str(project)
    assert llmstack.record_is_ours(record, str(project))
    assert not llmstack.record_is_ours(record, str(tmp_path))


@only_proc
def test_what_was_started_for_a_project_is_found_without_a_record(start: Start, tmp_path: Path) -> None:
    one, other = make_project(tmp_path / "one"), make_project(tmp_path / "one b")
    orphans = [start(mark=llmstack.new_mark(str(one))) for _ in range(2)]
    download = start(mark=llmstack.new_mark(str(one), "download"))
    others = [start(mark=llmstack.new_mark(str(other))), start()]
    for child in (*orphans, download, *others):
        line_of(child)
    assert set(llmstack.project_members(str(one))) == {child.pid for child in orphans}
    assert llmstack.stop_members(llmstack.project_members(str(one))) == 2
    assert [child.wait() for child in orphans] == [-signal.SIGTERM] * 2
    assert all(child.poll() is None for child in (download, *others))
    assert llmstack.stop_members(llmstack.project_members(str(one))) == 0


PS = {
    ("-ww", "-ax"): "   7 sh -c x LLMSTACK_STACK=stack-1:/p\n  8 python daemon\n 9 secret\n",
    ("-wwE", "-ax"): "   7 sh -c x LLMSTACK_STACK=stack-1:/p HOME=/h\n"
                     "  8 python daemon HOME=/a b LLMSTACK_STACK=stack-2:/p\n 9 secret\n",
}


def test_macos_tells_an_environment_from_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def output(command: list[str]) -> str:
        assert command[0] == "ps"
        return PS.get((command[1], "-ax"), "")

    monkeypatch.setattr(llmstack, "program_output", output)
    monkeypatch.setattr(llmstack, "_has_proc", lambda: False)
    monkeypatch.setattr(llmstack, "_project_code", lambda project: project)
    assert llmstack._marks() == {8: "stack-2:/p"}
    assert llmstack.process_environment(9) is None, "it hides its environment"
    environment = llmstack.process_environment(7)
    assert environment == {"HOME": "/h"}
    assert llmstack.project_members("/p") == {8: "stack-2:/p"}


# ---- starting


def test_a_daemon_has_its_record_when_it_is_started(tmp_path: Path) -> None:
    project = make_project(tmp_path / "p")
    blank = llmstack.Record(0, "", llmstack.new_mark(str(project)), port=5, kind="router")
    process, record = llmstack.spawn_recorded([sys.executable, "-c", READY], str(tmp_path / "log"),
                                              os.environ, pid_file(project), blank)
    process.wait()
    assert record == blank._replace(pid=process.pid, started=record.started)
    assert record.started
    assert llmstack.read_record(pid_file(project)) == record


def test_a_child_whose_record_cannot_be_written_is_ended(tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    project = make_project(tmp_path / "p")
    monkeypatch.setattr(llmstack.os, "fsync", full)
    blank = llmstack.Record(0, "", llmstack.new_mark(str(project)), kind="router")
    forever = "import threading; threading.Event().wait()"
    with pytest.raises(llmstack.UserError, match="No space left"):
        llmstack.spawn_recorded([sys.executable, "-c", forever], str(tmp_path / "log"), os.environ,
                                pid_file(project), blank)
    assert llmstack.project_members(str(project)) == {}
    assert not os.path.exists(pid_file(project))


# ---- ports


def test_a_port_of_ours_is_told_by_its_project(start: Start, tmp_path: Path) -> None:
    child = start(LISTEN, mark=llmstack.new_mark(str(tmp_path)))
    port = int(line_of(child))
    assert llmstack.port_holder(port) == f"the llmstack of {tmp_path} (pid {child.pid})"


def test_stop_tells_whose_stack_has_the_ports(monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "port_is_free", lambda host, port: port != 10101)
    monkeypatch.setattr(llmstack, "port_holder", lambda port: "another user's llmstack (pid 12)")
    assert llmstack.main(["stop"]) == 0
    assert capsys.readouterr().out == ("Nothing of this project is running:"
                                       " port 10101 is taken by another user's llmstack (pid 12).\n")
    monkeypatch.setattr(llmstack, "port_holder", lambda port: "nginx (pid 12)")
    assert llmstack.main(["stop"]) == 0
    assert capsys.readouterr().out == "Nothing is running.\n"


def another_user() -> dict[str, Any]:
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if not python or os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    return {"executable": python, "user": 65534, "cwd": "/"}


@only_proc
@pytest.mark.parametrize("is_hidden", [False, True], ids=["root", "as anybody sees it"])
@pytest.mark.parametrize("name", ["llmstack", "other"])
def test_a_port_of_another_user_is_told_so(monkeypatch: pytest.MonkeyPatch, name: str,
                                           is_hidden: bool) -> None:
    options = another_user()
    port = free_port()
    code = (f"import socket, sys; s = socket.create_server(('127.0.0.1', {port}));"
            "print(flush=True); sys.stdin.read()")
    child = subprocess.Popen([name, "-c", code, "--port", str(port)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)
    try:
        line_of(child)
        if is_hidden:
            monkeypatch.setattr(llmstack, "_open_files", lambda pid: ())
        said = llmstack.port_holder(port)
        if name == "llmstack":
            assert said == f"another user's llmstack (pid {child.pid})"
        elif is_hidden:
            assert said == "another user's program"
        else:
            assert said == f"another user's program (pid {child.pid})"
    finally:
        child.kill()
        child.communicate()


def free_port() -> int:
    import socket
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


NETSTAT = """
Aktive Verbindungen

  Proto  Lokale Adresse         Remoteadresse          Status           PID
  TCP    127.0.0.1:10101        0.0.0.0:0              ABH\u00d6REN         4711
  TCP    0.0.0.0:10101          0.0.0.0:0              \u00c0 l'\u00e9coute         12
  TCP    [::1]:10101            [::]:0                 ABH\u00d6REN         4712
  TCP    127.0.0.1:10101        127.0.0.1:50000        HERGESTELLT      4713
  TCP    127.0.0.1:50000        127.0.0.1:10101        HERGESTELLT      4714
  TCP    127.0.0.1:101010       0.0.0.0:0              ABH\u00d6REN         4715
  UDP    0.0.0.0:10101          *:*                                     4716
"""


def test_a_german_netstat_is_understood() -> None:
    assert llmstack._windows_listeners(NETSTAT, 10101) == {4711, 12, 4712}


# ---- Windows


def test_windows_waits_for_a_reader_of_the_file_it_replaces(tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    real, refusals, waits = os.replace, [1, 2], []      # type: Any, list[int], list[float]

    def replace(source: str, target: str) -> None:
        if refusals:
            refusals.pop()
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        real(source, target)

    monkeypatch.setattr(llmstack, "IS_WINDOWS", True)
    monkeypatch.setattr(llmstack.os, "replace", replace)
    monkeypatch.setattr(llmstack.time, "sleep", waits.append)
    llmstack.write_atomic(str(tmp_path / "file"), "x")
    assert (tmp_path / "file").read_text() == "x"
    assert len(waits) == 2


def test_windows_launcher_knows_the_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def output(command: list[str]) -> str:
        asked.append(command)
        if command[1] == "-3.12":
            return "C:\\Python312\\python.exe\r\n"
        return "12\r\n" if command[0] == "C:\\Python312\\python.exe" else ""

    monkeypatch.setattr(llmstack, "IS_WINDOWS", True)
    monkeypatch.setattr(llmstack, "find_program", lambda name: "C:\\py.exe" if name[:2] == "py" and "3" not in name else "")
    monkeypatch.setattr(llmstack, "program_output", output)
    monkeypatch.setattr(llmstack.sys, "version_info", (3, 9, 18))
    assert llmstack.suitable_python(llmstack.LLAMA_CPP) == "C:\\Python312\\python.exe"
    assert asked[0][:2] == ["C:\\py.exe", "-3.14"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux keeps threads on a core")
def test_what_a_thread_that_keeps_to_a_core_starts_has_all_of_them(tmp_path: Path) -> None:
    every = os.sched_getaffinity(0)
    seen: list[object] = []

    def serve() -> None:
        llmstack.stay_on_core(llmstack.core_here())
        seen.append(len(os.sched_getaffinity(0)))
        words = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
        seen.append(llmstack.spawn(words, str(tmp_path / "log"), os.environ).wait())

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert seen == [1, 0]
    assert (tmp_path / "log").read_text() == f"{sorted(every)}\n"
    assert os.sched_getaffinity(0) == every, "the main thread is free"
