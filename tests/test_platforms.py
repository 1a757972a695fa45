"""What macOS and Windows answer, as canned text through the functions that read it."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest

import llmstack

Patch = pytest.MonkeyPatch
Answers = dict[tuple[str, ...], str]


@pytest.fixture
def asked(monkeypatch: Patch) -> Callable[[Answers], list[tuple[str, ...]]]:
    """Have small programs answer by their first words, others nothing; what was asked."""

    def install(answers: Answers) -> list[tuple[str, ...]]:
        seen: list[tuple[str, ...]] = []

        def output(command: list[str]) -> str:
            seen.append(tuple(command))
            found = [text for words, text in answers.items() if set(words) <= set(command)]
            return found[0] if found else ""

        monkeypatch.setattr(llmstack, "program_output", output)
        return seen

    return install


@pytest.fixture
def mac(monkeypatch: Patch) -> None:
    """As on a Mac: no /proc."""
    monkeypatch.setattr(llmstack, "IS_MAC", True)
    monkeypatch.setattr(llmstack.sys, "platform", "darwin")
    monkeypatch.setattr(llmstack, "_has_proc", lambda: False)
    monkeypatch.setattr(llmstack, "read_text", lambda path: "")
    exists = os.path.exists
    monkeypatch.setattr(llmstack.os.path, "exists",
                        lambda path: not str(path).startswith("/proc") and exists(path))


@pytest.fixture
def windows(mac: None, monkeypatch: Patch) -> None:
    """As on Windows: no /proc, and not what its Python lacks."""
    monkeypatch.setattr(llmstack, "IS_MAC", False)
    monkeypatch.setattr(llmstack, "IS_WINDOWS", True)
    monkeypatch.setattr(llmstack.sys, "platform", "win32")
    for name in ("geteuid", "fchmod", "O_NOFOLLOW", "O_NONBLOCK", "getpgid", "killpg", "sysconf",
                 "sched_setaffinity"):
        monkeypatch.delattr(llmstack.os, name, raising=False)
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    monkeypatch.delattr(signal, "SIGKILL", raising=False)


# ---- macOS


VM_STAT = """\
Mach Virtual Memory Statistics: (page size of {} bytes)
Pages free:                              203915.
Pages active:                            812345.
Swapins:                                   7000.
Swapouts:                                 10000.
"""


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize("page_bytes", [16_384, 4_096], ids=["Apple silicon", "Intel"])
def test_what_a_mac_has_swapped_is_counted_in_its_own_pages(asked: Any, page_bytes: int) -> None:
    asked({("vm_stat",): VM_STAT.format(page_bytes),
           ("kern.memorystatus_vm_pressure_level",): "1\n"})
    state = llmstack.read_memory_state(False)
    assert state.swapped_bytes == 10_000 * page_bytes
    assert not state.critical


def test_what_linux_has_swapped_is_counted_in_its_own_pages(monkeypatch: Patch) -> None:
    """An ARM server's kernel has pages of 64 KiB."""
    files = {"/proc/vmstat": "pswpin 5\npswpout 1000\n"}
    monkeypatch.setattr(llmstack, "read_text", lambda path: files.get(path, ""))
    monkeypatch.setattr(mmap, "PAGESIZE", 65_536)
    assert llmstack.read_memory_state(False).swapped_bytes == 1000 * 65_536


PS_STARTED = {
    ("stat=", "41"): "Ss\n",
    ("lstart=", "41"): "Mon Jun  3 09:01:02 2024    \n",
    ("stat=", "42"): "Z+\n",
    ("lstart=", "42"): "Mon Jun  3 09:01:02 2024    \n",
}


@pytest.mark.usefixtures("mac")
def test_a_mac_tells_a_process_by_its_start(asked: Any) -> None:
    asked(PS_STARTED)
    assert llmstack.process_started(41) == "Mon Jun 3 09:01:02 2024"
    assert llmstack.process_started(42) == "", "a zombie has ended"
    assert llmstack.process_started(43) == "", "ps knows no such process"


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize(("etime", "age_s"), [
    ("   00:07\n", 7), ("01:02:03\n", 3723), ("2-03:00:01\n", 183_601), ("", None),
])
def test_a_mac_tells_the_age_of_a_process(asked: Any, etime: str, age_s: Any) -> None:
    asked({("etime=", "41"): etime})
    assert llmstack.process_age_s(41) == age_s


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize(("uid", "command", "comm", "holder"), [
    ("501", "/usr/sbin/httpd -D X", "/usr/sbin/httpd", "another user's program (pid 41)"),
    ("501", "/usr/bin/python3 /opt/llmstack.pyz _daemon", "python3",
     "another user's llmstack (pid 41)"),
    (str(os.geteuid()), "ollama serve", "/Applications/Ollama.app/ollama", "ollama (pid 41)"),
    ("", "", "", "a program (pid 41)"),
])
def test_a_mac_tells_who_has_a_port(asked: Any, uid: str, command: str, comm: str,
                                    holder: str) -> None:
    seen = asked({("lsof", "-iTCP:10101"): "41\n", ("uid=", "41"): uid,
                  ("command=", "41"): command, ("comm=", "41"): comm})
    assert llmstack.listeners(10101) == {41}
    assert llmstack.port_holder(10101) == holder
    assert "-sTCP:LISTEN" in seen[0], "who is only connected to it has it not"


@pytest.mark.usefixtures("mac")
def test_a_mac_where_lsof_shows_nobody(asked: Any) -> None:
    """Another user's processes lsof does not show."""
    asked({})
    assert llmstack.port_holder(10101) == "another program"


@pytest.mark.usefixtures("mac")
def test_a_threads_core_is_no_matter_on_a_mac(monkeypatch: Patch) -> None:
    monkeypatch.delattr(llmstack.os, "sched_setaffinity", raising=False)
    assert llmstack.core_here() == -1
    llmstack.stay_on_core(-1)
    llmstack.leave_core()


# ---- Windows


class MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX as Microsoft documents it."""

    _fields_ = [
        ("length", ctypes.c_uint32), ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64), ("free", ctypes.c_uint64),
        ("page_total", ctypes.c_uint64), ("page_free", ctypes.c_uint64),
        ("virtual_total", ctypes.c_uint64), ("virtual_free", ctypes.c_uint64),
        ("extended_free", ctypes.c_uint64),
    ]


class Kernel32:
    """The calls of kernel32.dll that the program makes, of a machine with one process, 41."""

    memory_works = True
    exit_code = 259                             # STILL_ACTIVE
    knows_times = True

    def __init__(self) -> None:
        self.open_handles = 0

    def GlobalMemoryStatusEx(self, buffer: Any) -> int:
        status = MemoryStatus.from_buffer(buffer)
        # Windows refuses a structure that does not say how large it is.
        if status.length != ctypes.sizeof(MemoryStatus) or not self.memory_works:
            return 0
        status.load, status.total, status.free = 40, 34_000_000_000, 20_000_000_000
        return 1

    def OpenProcess(self, access: int, inherit: bool, pid: int) -> int:
        if pid != 41:
            return 0
        assert access == 0x1000, "more than that is refused for others' processes"
        self.open_handles += 1
        return 7

    def GetProcessTimes(self, handle: int, created: Any, *others: Any) -> int:
        assert len(others) == 3
        created._obj.value = 133_600_000_000_000_000
        return int(self.knows_times)

    def GetExitCodeProcess(self, handle: int, code: Any) -> int:
        code._obj.value = self.exit_code
        return 1

    def CloseHandle(self, handle: int) -> int:
        self.open_handles -= 1
        return 1


@pytest.fixture
def kernel(windows: None, monkeypatch: Patch) -> Kernel32:
    made = Kernel32()
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=made), raising=False)
    return made


def test_windows_tells_its_memory(kernel: Kernel32) -> None:
    assert llmstack.total_memory_gb() == 34.0
    kernel.memory_works = False
    assert llmstack.total_memory_gb() == 0.0


@pytest.mark.usefixtures("windows")
def test_windows_does_not_tell_how_short_memory_is(asked: Any) -> None:
    asked({})
    state = llmstack.read_memory_state(True)
    assert llmstack.memory_pressure(state, state) == ""


def test_where_memory_is_not_told_every_model_may_load(kernel: Kernel32, asked: Any) -> None:
    asked({})
    kernel.memory_works = False
    assert llmstack.this_machine(llmstack.Config()).budget_gb > 1e6


def test_windows_tells_a_process_by_its_start(kernel: Kernel32) -> None:
    assert llmstack.process_started(41) == "133600000000000000"
    assert llmstack.process_started(42) == "", "there is none"
    kernel.exit_code = 0
    assert llmstack.process_started(41) == "", "somebody holds a handle of one that has ended"
    kernel.exit_code, kernel.knows_times = 259, False
    assert llmstack.process_started(41) == ""
    assert kernel.open_handles == 0


COMMAND_LINE = "C:\\Python312\\python.exe C:\\Tools\\llmstack.pyz _daemon --port 10101\r\n"


def test_windows_knows_our_daemon_by_its_command_line(kernel: Kernel32, asked: Any,
                                                      monkeypatch: Patch) -> None:
    """Nobody can read another process's environment there."""
    asked({("powershell",): COMMAND_LINE})
    monkeypatch.setattr(llmstack, "PROGRAM", "C:/Tools/llmstack.pyz")
    mark = llmstack.new_mark(os.getcwd())
    record = llmstack.Record(41, "133600000000000000", mark, kind="router")
    assert llmstack.process_environment(41) is None
    assert llmstack.owned_process(record, os.getcwd())
    assert not llmstack.owned_process(record._replace(started="1"), os.getcwd())
    monkeypatch.setattr(llmstack, "PROGRAM", "C:/Tools/other.pyz")
    assert not llmstack.owned_process(record, os.getcwd())
    assert llmstack.project_members(os.getcwd()) == {}


def test_windows_stops_a_process_with_its_children(kernel: Kernel32, asked: Any) -> None:
    seen = asked({})
    reaped: list[int] = []

    def reap() -> None:
        reaped.append(1)
        kernel.exit_code = 0

    assert llmstack.stop_process(41, "133600000000000000", 5, reap)
    assert seen == [("taskkill", "/PID", "41", "/T", "/F")]
    assert reaped == [1]


@pytest.mark.usefixtures("windows")
def test_windows_tells_who_has_a_port(asked: Any) -> None:
    asked({("netstat", "-ano"): "  TCP    0.0.0.0:10101    0.0.0.0:0    ABH\u00d6REN    4711\r\n"})
    assert llmstack.port_holder(10101) == "a program (pid 4711)"
    assert llmstack.port_holder(10102) == "another program"


@pytest.mark.usefixtures("windows")
def test_a_daemon_on_windows_has_no_console(monkeypatch: Patch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def popen(command: list[str], **options: Any) -> Any:
        seen.update(options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    llmstack.spawn(["llama-server"], str(tmp_path / "log"), {})
    detached_process, new_process_group = 0x8, 0x200
    assert seen["creationflags"] == detached_process | new_process_group
    assert "start_new_session" not in seen


@pytest.mark.usefixtures("windows")
def test_windows_has_neither_modes_nor_limits_of_files(tmp_path: Path) -> None:
    """What its Python lacks is not asked for."""
    llmstack.write_atomic(str(tmp_path / "a" / "file"), "x")
    llmstack.close_to_others(str(tmp_path), str(tmp_path / "a" / "file"))
    log = llmstack.Log(str(tmp_path / "a" / "log"))
    log.error("line")
    assert (tmp_path / "a" / "log").read_text().endswith(" ERROR line\n")
    llmstack.more_files()
    assert llmstack.core_here() == -1


@pytest.mark.usefixtures("windows")
def test_a_daemon_on_windows_knows_no_hangup() -> None:
    before, ended = signal.getsignal(signal.SIGTERM), []     # type: Any, list[str]
    try:
        llmstack._on_signals(lambda: None, lambda: ended.append("server"))
        terminate: Any = signal.getsignal(signal.SIGTERM)
        with pytest.raises(llmstack._Terminated):
            terminate()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == ["server"]


@pytest.mark.usefixtures("windows")
def test_a_lock_on_windows_is_waited_for(monkeypatch: Patch, tmp_path: Path) -> None:
    refusals, said = [1, 2], []         # type: Any, list[str]

    def locking(handle: int, mode: int, count: int) -> None:
        assert count == 1
        if refusals:
            refusals.pop()
            raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(llmstack.time, "sleep", lambda seconds: None)
    with llmstack.FileLock(str(tmp_path / "lock"), lambda: said.append("waits")):
        assert not refusals
    assert said == ["waits"]


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("code", [10_013, 10_048])
def test_a_port_that_windows_refuses_is_taken(monkeypatch: Patch, code: int) -> None:
    """Hyper-V reserves ranges of ports, and refuses them as it refuses what it forbids."""

    class Refused(OSError):
        winerror = code

    class Socket(llmstack.socket.socket):
        def setsockopt(self, *_: object) -> None:
            raise AssertionError("the option would share a port in use")

        def bind(self, _: object) -> None:
            raise Refused(0, "refused")

    monkeypatch.setattr(llmstack.socket, "socket", Socket)
    assert not llmstack.port_is_free("127.0.0.1", 10101)


@pytest.mark.usefixtures("windows")
def test_a_reader_that_does_not_let_go_is_said(monkeypatch: Patch, tmp_path: Path) -> None:
    now = [0.0]
    (tmp_path / "file").write_text("old")

    def replace(*_: object) -> None:
        raise PermissionError(13, "The process cannot access the file")

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(llmstack.os, "replace", replace)
    monkeypatch.setattr(llmstack.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(llmstack.time, "sleep", sleep)
    with pytest.raises(llmstack.UserError, match=r"cannot write .*cannot access") as caught:
        llmstack.write_atomic(str(tmp_path / "file"), "new")
    assert caught.value.hint
    assert (tmp_path / "file").read_text() == "old"
    assert 1 <= now[0] < 2
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


# ---- what shells are told


@pytest.mark.parametrize(("shell", "line"), [
    ("bash", "eval \"$('/it'\\''s/py' '/x y/llmstack.py' activate bash)\""),
    ("zsh", "eval \"$('/it'\\''s/py' '/x y/llmstack.py' activate zsh)\""),
    ("fish", "'/it\\'s/py' '/x y/llmstack.py' activate fish | source"),
    ("powershell", "& '/it''s/py' '/x y/llmstack.py' activate powershell"
                   " | Out-String | Invoke-Expression"),
])
def test_the_line_that_turns_a_hook_on_quotes_the_program(shell: str, line: str) -> None:
    assert llmstack.activate_line(shell, ["/it's/py", "/x y/llmstack.py"]) == line
    assert "llmstack activate " + shell in llmstack.activate_line(shell)


def test_powershell_gets_and_loses_a_projects_variables() -> None:
    told = llmstack.render_hook_answer(
        "powershell", {"LLMSTACK_WORK_DIR": "C:\\It's", "LLMSTACK_CHANNEL": "next"},
        ["LLMSTACK_CHANNEL"], "[llmstack:next] ", "1:powershell:C:\\It's")
    assert told == ("_llmstack_set LLMSTACK_WORK_DIR 'C:\\It''s' s\n"
                    "_llmstack_set LLMSTACK_CHANNEL 'next' x\n"
                    "$global:_llmstack_prefix = '[llmstack:next] '\n"
                    "$env:LLMSTACK_HOOK = '1:powershell:C:\\It''s'\n")
    assert llmstack.render_assignment("powershell", "X", None) == "$env:X = $null"


def test_the_shell_of_start_on_windows_is_told_in_powershell(monkeypatch: Patch) -> None:
    import base64
    places = llmstack.find_places(os.environ)
    words = llmstack._shell_command("C:\\Program Files\\PowerShell\\7\\pwsh.exe", places,
                                    llmstack.Marker("current"), {}, {"LLMSTACK_CHANNEL": "current"})
    assert words[1:4] == ["-NoLogo", "-NoExit", "-EncodedCommand"]
    text = base64.b64decode(words[4]).decode("utf-16-le")
    assert "$env:LLMSTACK_CHANNEL = 'current'" in text
    assert len(words[4]) < 32_000, "Windows takes no longer command line"
