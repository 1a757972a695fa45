"""Refused writes, races between processes, and what does not end or answer."""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable

import pytest

import llmstack

Patch = pytest.MonkeyPatch


def refuse(code: int) -> Callable[..., Any]:
    """A system call that fails so."""
    def call(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))
    return call


@pytest.fixture
def clock(monkeypatch: Patch) -> list[float]:
    """A clock that only sleeping moves."""
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(llmstack.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(llmstack.time, "sleep", sleep)
    return now


# ---- directories and files


def test_two_processes_may_make_one_directory(tmp_path: Path, monkeypatch: Patch) -> None:
    mkdir = os.mkdir

    def other_is_quicker(path: str, mode: int) -> None:
        mkdir(path, mode)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(llmstack.os, "mkdir", other_is_quicker)
    llmstack.write_atomic(str(tmp_path / "a" / "b" / "file"), "x")
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"


def test_a_file_in_the_place_of_a_directory_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(llmstack.UserError, match="cannot write") as caught:
        llmstack.write_atomic(str(tmp_path / "a" / "file"), "x")
    assert "move away" in caught.value.hint
    assert (tmp_path / "a").read_text() == "a file"


def test_a_file_system_without_permissions_is_written_to(tmp_path: Path,
                                                         monkeypatch: Patch) -> None:
    """vfat refuses fchmod."""
    path = tmp_path / "log"
    path.write_text("")
    path.chmod(0o644)
    monkeypatch.setattr(llmstack.os, "fchmod", refuse(errno.EPERM))
    llmstack.Log(str(path)).error("line")
    llmstack.close_to_others(str(path))
    assert path.read_text().endswith("line\n")


def test_where_the_system_does_not_say_how_much_memory_there_is(monkeypatch: Patch) -> None:
    def sysconf(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(llmstack.os, "sysconf", sysconf)
    assert llmstack.total_memory_gb() == 0.0


@pytest.mark.parametrize(("limit", "gb"), [("2000000000\n", 2.0), ("max\n", 8.192), ("", 8.192)])
def test_a_container_has_its_share_of_memory(monkeypatch: Patch, limit: str, gb: float) -> None:
    sizes = {"SC_PHYS_PAGES": 2_000_000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(llmstack.os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(llmstack, "read_text", lambda path: limit)
    assert llmstack.total_memory_gb() == gb


def test_a_driver_that_fails_is_no_card(monkeypatch: Patch) -> None:
    failed = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
    monkeypatch.setattr(llmstack, "program_output", lambda command: failed)
    assert llmstack.nvidia_cards() == []


# ---- logs and the record


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_stops_no_log(monkeypatch: Patch) -> None:
    log = llmstack.Log()
    log._fd = os.open("/dev/full", os.O_WRONLY)
    try:
        log.error("lost")
        log.flush()
    finally:
        os.close(log._fd)


def test_a_log_that_cannot_be_opened_again_goes_to_standard_error(
        tmp_path: Path, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "LOG_BYTES", 10)
    path = tmp_path / "logs" / "router.log"
    log = llmstack.Log(str(path))
    log.error("the first of them")
    open_log = llmstack.open_log
    monkeypatch.setattr(llmstack, "open_log", refuse(errno.EACCES))
    log.rotate()
    log.error("the second")
    assert capfd.readouterr().err.endswith("ERROR the second\n")
    monkeypatch.setattr(llmstack, "open_log", open_log)
    log.rotate()
    log.error("the third")
    assert path.read_text().endswith("ERROR the third\n")
    assert capfd.readouterr().err == ""


def test_a_foreign_log_that_cannot_be_copied_loses_nothing(tmp_path: Path,
                                                           monkeypatch: Patch) -> None:
    monkeypatch.setattr(llmstack, "LOG_BYTES", 10)
    path = tmp_path / "llama-swap.log"
    path.write_text("a line of more than ten bytes\n")
    monkeypatch.setattr(llmstack, "open_log", refuse(errno.ENOSPC))
    llmstack.rotate_foreign_log(str(path))
    assert path.read_text() == "a line of more than ten bytes\n"


def test_a_log_that_is_not_there_has_no_tail(tmp_path: Path) -> None:
    assert llmstack.tail_of(str(tmp_path / "gone.log")) == ""


def test_the_record_of_decisions_rotates(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(llmstack, "LOG_BYTES", 10)
    path = tmp_path / "decisions.jsonl"
    record = llmstack.Recorder(str(path))
    for number in range(3):
        record.add({"number": number, "text": "longer than that"})
        record.flush()
    record.flush()
    names = sorted(p.name for p in tmp_path.glob("decisions*"))
    assert names == ["decisions.jsonl", "decisions.jsonl.1", "decisions.jsonl.2"]
    assert '"number":2' in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    path.mkdir()
    record = llmstack.Recorder(str(path))
    record.add({"number": 1})
    record.flush()
    path.rmdir()
    record.add({"number": 2})
    record.flush()
    assert path.read_text() == '{"number":2}\n'


def hangs(path: Path, call: Callable[[], object]) -> bool:
    """Whether a call waits for the other end of a pipe at `path`."""
    os.mkfifo(path)
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)                             # only what hangs ever takes this long
    hung = thread.is_alive()
    if hung:
        os.close(os.open(path, os.O_RDWR))      # either end lets it go
        thread.join()
    return hung


def test_a_pipe_in_the_place_of_the_record_stops_no_router(tmp_path: Path) -> None:
    """A project's logs/ may have come with it, out of an archive."""
    path = tmp_path / "decisions.jsonl"
    record = llmstack.Recorder(str(path))
    record.add({"number": 1})
    assert not hangs(path, record.flush)


def test_a_record_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    path.touch(0o644)
    record = llmstack.Recorder(str(path))
    record.add({"number": 1})
    record.flush()
    assert path.stat().st_mode & 0o077 == 0


def test_a_pipe_in_the_place_of_a_model_stops_no_start(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    said: list[str] = []

    def read() -> None:
        try:
            llmstack.local_header(str(path))
        except (OSError, llmstack.GgufError) as exc:
            said.append(str(exc))

    assert not hangs(path, read)
    assert said


def test_the_record_says_what_a_request_cost_and_what_was_drafted() -> None:
    facts = llmstack.Facts("auto", "auto", False, 40, 0, 0, 0, 1, 0, "")
    path = "/v1/chat/completions"
    row = llmstack.record_row(facts, path, "t", llmstack.Outcome("ok"))
    assert not {"cost", "drafted", "accepted", "per_s"} & set(row)
    counts = llmstack.Counts(drafted=20, accepted=15, written_per_s=41.26)
    outcome = llmstack.Outcome("ok", cost=0.0125, counts=counts)
    row = llmstack.record_row(facts, path, "t", outcome)
    assert (row["drafted"], row["accepted"], row["cost"], row["per_s"]) == (20, 15, 0.0125, 41.3)


# ---- other systems' libraries and limits


def test_another_libc_than_glibc_is_asked_nothing() -> None:
    """musl has no malloc_trim, and its mallopt is missing, too."""
    llmstack._glibc("no_such_function_of_malloc", 0)


def test_a_core_that_must_not_be_had_is_not_taken(monkeypatch: Patch) -> None:
    """A container may forbid it; what starts a program goes on."""
    monkeypatch.setattr(llmstack.os, "sched_setaffinity", refuse(errno.EPERM), raising=False)
    monkeypatch.setattr(llmstack.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    llmstack.stay_on_core(0)
    llmstack.leave_core()


@pytest.mark.parametrize("line", ["", "7 (python3) S 1 2"])
def test_a_core_that_cannot_be_told_is_none(monkeypatch: Patch, line: str) -> None:
    monkeypatch.setattr(llmstack, "read_text", lambda path: line)
    assert llmstack.core_here() == -1


@pytest.mark.parametrize(("soft", "hard", "wanted"), [
    (256, -1, (4096, -1)), (256, 1024, (1024, 1024)), (8192, 8192, (8192, 8192)),
])
def test_a_daemon_may_open_as_many_files_as_it_can(monkeypatch: Patch, soft: int, hard: int,
                                                   wanted: tuple[int, int]) -> None:
    resource = pytest.importorskip("resource")
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: seen.append(limits))
    llmstack.more_files()
    assert seen == [wanted]
    # macOS refuses more than its own limit, whatever the hard one says.
    monkeypatch.setattr(resource, "setrlimit", refuse(errno.EINVAL))
    llmstack.more_files()


# ---- people


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals_that_may_have_them(monkeypatch: Patch) -> None:
    assert llmstack.paint("up", "32") == "up"
    monkeypatch.setattr(llmstack.sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert llmstack.paint("up", "32") == "up", "NO_COLOR is set"
    monkeypatch.delenv("NO_COLOR")
    assert llmstack.paint("up", "32") == "\x1b[32mup\x1b[0m"
    monkeypatch.setenv("TERM", "dumb")
    assert llmstack.paint("up", "32") == "up"


def test_without_a_standard_input_nobody_is_asked(monkeypatch: Patch) -> None:
    """pythonw and `<&-` leave none."""
    monkeypatch.setattr(llmstack.sys, "stdin", None)
    assert llmstack.ask_person("Do it?") is None
    with pytest.raises(llmstack.UserError, match="not deleted unasked, and there is no terminal"):
        llmstack.agreed("Do it?", "not deleted", "pass --yes")


@pytest.mark.parametrize(("typed", "said"), [
    ("y\n", True), ("Yes\n", True), ("\n", False), ("", False)])
def test_only_a_yes_is_one(monkeypatch: Patch, typed: str, said: bool) -> None:
    answer = Terminal(typed)
    monkeypatch.setattr(llmstack.sys, "stdin", answer)
    monkeypatch.setattr(llmstack.sys, "stdout", Terminal())
    assert llmstack.agreed("Do it?", "not deleted", "pass --yes") is said


# ---- processes


def test_a_process_that_nothing_ends_is_said(tmp_path: Path, clock: list[float],
                                             monkeypatch: Patch) -> None:
    """One that waits for a broken disk survives KILL."""
    signals: list[int] = []
    record = llmstack.Record(4711, "then", llmstack.new_mark(str(tmp_path)), kind="embedded")
    monkeypatch.setattr(llmstack, "process_started", lambda pid: "then")
    monkeypatch.setattr(llmstack, "process_environment",
                        lambda pid: {llmstack.STACK_VARIABLE: record.stack})
    monkeypatch.setattr(llmstack.os, "killpg", lambda pid, number: signals.append(number))
    with pytest.raises(llmstack.UserError, match=r"embedded \(pid 4711\) does not stop") as caught:
        llmstack.stop_recorded(record, str(tmp_path), 5)
    assert signals == [signal.SIGTERM, signal.SIGKILL]
    assert "kill -9 4711" in caught.value.hint
    assert clock[0] == pytest.approx(1015, abs=0.1), "5 s for TERM, 10 s for KILL"


def test_a_process_that_leads_no_group_is_stopped_alone() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"],
                             stdin=subprocess.PIPE)
    try:
        started = llmstack.process_started(child.pid)
        assert llmstack.stop_process(child.pid, started, 10, child.poll)
        assert child.returncode == -signal.SIGTERM
        # What has ended meanwhile is no error, nor is what is not ours.
        llmstack._signal_process(child.pid, signal.SIGTERM)
    finally:
        child.kill()
        child.communicate()


def test_a_number_that_another_process_has_got_is_not_signalled(monkeypatch: Patch) -> None:
    mark = llmstack.new_mark("/p")
    environments = iter([{llmstack.STACK_VARIABLE: mark}, {"HOME": "/root"}])
    monkeypatch.setattr(llmstack, "_has_proc", lambda: True)
    monkeypatch.setattr(llmstack, "_all_pids", lambda: [4711])
    monkeypatch.setattr(llmstack, "process_environment", lambda pid: next(environments))
    monkeypatch.setattr(llmstack, "stop_process", lambda *_: pytest.fail("it is a stranger's"))
    assert llmstack.stop_members(llmstack.stack_members(mark)) == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")
def test_a_zombie_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert llmstack.process_started(child.pid) == ""
    finally:
        child.wait()
    assert llmstack._is_empty_shell(child.pid), "it has gone between two looks"
    assert llmstack.process_command(child.pid) == []
    assert llmstack.process_environment(child.pid) is None
    assert llmstack.process_user(child.pid) is None
    assert llmstack.process_age_s(child.pid) is None


class Silent:
    """A process that is there and does not answer."""

    def poll(self) -> None:
        return None


def test_a_daemon_that_does_not_answer_in_time_is_said(tmp_path: Path, clock: list[float]) -> None:
    log = tmp_path / "router.log"
    log.write_text("of the last start\n")
    before = log.stat().st_size
    with pytest.raises(llmstack.UserError, match=r"did not answer within 90 s at start$"):
        llmstack.await_answer("the daemon", Silent(), lambda: False, str(log), before, 90)
    log.write_text("of the last start\nloading 45 GB\n")
    with pytest.raises(llmstack.UserError) as caught:
        llmstack.await_answer("the daemon", Silent(), lambda: False, str(log), before, 90)
    assert "within 90 s at start:\n" in str(caught.value)
    assert "loading 45 GB" in str(caught.value)
    assert caught.value.hint == f"see {log}"


def test_a_process_in_the_middle_of_exec_is_looked_at_again(clock: list[float],
                                                            monkeypatch: Patch) -> None:
    seen = iter([{}, {}, {"HOME": "/h"}])
    monkeypatch.setattr(llmstack, "process_environment", lambda pid: next(seen))
    monkeypatch.setattr(llmstack, "process_started", lambda pid: "then")
    assert llmstack._settled_environment(4711) == {"HOME": "/h"}
    monkeypatch.setattr(llmstack, "process_environment", lambda pid: {})
    assert llmstack._settled_environment(4711) == {}, "some have none"


def test_no_process_has_the_number_0() -> None:
    """To a signal it means every process of a group."""
    assert llmstack.process_started(0) == llmstack.process_started(-1) == ""
    assert not llmstack.Record(os.getpid(), "", "mark").alive


# ---- ports


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(llmstack.UserError, match=r"cannot listen on 192\.0\.2\.1") as caught:
        llmstack.port_is_free("192.0.2.1", 10101)
    assert caught.value.exit_code == 2


def test_a_port_of_the_other_family_is_found() -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("there is no IPv6 here")
    with server:
        assert not llmstack.port_is_free("::1", server.getsockname()[1])
    assert llmstack.free_port("::1")
    assert llmstack.base_url("::", 10101) == "http://[::1]:10101"


def test_a_run_of_ports_has_nobody_in_it(monkeypatch: Patch) -> None:
    taken = {10_001, 10_003}
    monkeypatch.setattr(llmstack, "port_is_free", lambda host, port: port not in taken)
    assert llmstack.free_run(10_001, 1) == 10_002
    assert llmstack.free_run(10_001, 2) == 10_004
    monkeypatch.setattr(llmstack, "port_is_free", lambda host, port: False)
    with pytest.raises(llmstack.UserError, match="no 3 free ports in a row above 10001"):
        llmstack.free_run(10_001, 3)
