"""A home, a project and processes of the run's own, and what can be seen of them from outside."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from tests.chaos import model_server

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND_S = 60                      # longest that a command of ours may take

MODELS_INI = """\
[DEFAULT]
engine = {engine}
router_port = {router_port}
engine_port = {engine_port}
llama_server_bin = {server}
memory_gb = {memory_gb}
loading_state = off

[code-fast]
role = fast
path = {model}
ctx_size = 128k
size_gb = 1

[code-smart]
role = agent
path = {model}
ctx_size = 64k
size_gb = 1
"""
SMALL_GB, LARGE_GB = 3, 8           # room for one of the tiers, or for both

# A bystander of ours looks as much like a part of the stack as a stranger can.
BYSTANDER = """\
import signal, socket, sys, time
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
signal.pause()
"""


class Fault(Exception):
    """Something that must not happen has happened."""


class Said(NamedTuple):
    """How a command ended."""

    code: int
    text: str


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def is_open(port: int) -> bool:
    """Whether somebody listens on a port."""
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex((HOST, port)) == 0


def until(condition: Callable[[], Any], what: str, seconds: float = 15) -> Any:
    """Wait for something; its value. Errors: Fault."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise Fault(f"not within {seconds:g} s: {what}")


def read_bytes(path: str) -> bytes:
    """A file of /proc, empty where its process has ended."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


class Process(NamedTuple):
    """A process as /proc shows it."""

    pid: int
    part: str                       # daemon | llama-server | llama-swap | worker | other

    def kill(self) -> bool:
        """kill -9; False where it has ended already."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


# A word of the command line -> the part of the stack that has it.
PARTS = {"_daemon": "daemon", "model_server.py": "llama-server", "_download": "worker",
         "llama-swap": "llama-swap"}


def part_of(command: bytes) -> str:
    """Which part of the stack a command line is."""
    for word in command.split(b"\0"):
        name = os.path.basename(os.fsdecode(word))
        if name in PARTS:
            return PARTS[name]
    return "other"


class Bystander:
    """A process beside the stack that nobody may touch."""

    def __init__(self, directory: Path) -> None:
        words = [sys.executable, "-c", BYSTANDER, "llmstack.py", "_daemon", "llama-server"]
        env = {"PATH": os.environ["PATH"], "LLMSTACK_WORK_DIR": str(directory)}
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, env=env, cwd=directory,
                                         start_new_session=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def check(self) -> None:
        """Errors: Fault, where it is gone."""
        if self._process.poll() is not None:
            raise Fault(f"a stranger was ended, with {self._process.returncode}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


class Rig:
    """One project in a home of its own. Everything it starts inherits that HOME."""

    def __init__(self, data: Optional[Path], swap: Optional[str], program: str = "") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="llmstack-chaos-"))
        self.project = self.directory / "project"
        self.state = self.project / ".llmstack"
        self.state.mkdir(parents=True)
        self.data = self.directory / "data"
        self.data.mkdir()
        self.hub = bool(data)
        for name in ("hub", "llama-cpp"):
            if data:
                (self.data / name).symlink_to(data / name)
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("LLMSTACK_", "LLAMA_", "HF_", "XDG_", "PYTHON"))}
        self.env = {**kept, "HOME": str(self.directory), "LLMSTACK_DATA_DIR": str(self.data),
                    "LLMSTACK_WORK_DIR": str(self.project), "NO_COLOR": "1",
                    "PYTHONDONTWRITEBYTECODE": "1"}
        self.program = program or self._build_program()
        self.swap = swap
        if swap:
            programs = self.directory / "programs"
            programs.mkdir()
            (programs / "llama-swap").symlink_to(swap)
            self.env["PATH"] = f"{programs}{os.pathsep}{self.env['PATH']}"
        self.server = self.directory / "llama-server"
        words = shlex.join([sys.executable, str(model_server.__file__)])
        self.server.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        self.server.chmod(0o755)
        self.model = self.directory / "model.gguf"
        self.model.touch()
        self.router_port, self.engine_port = free_port(), free_port()
        self.bystander = Bystander(self.project)

    def _build_program(self) -> str:
        """What users run, of what is here now; a run is long, and we edit meanwhile."""
        copy = self.directory / "program"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.pyz"))
        done = subprocess.run([sys.executable, "build_zipapp.py"], cwd=copy, env=self.env,
                              check=False, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(self.directory)
            raise SystemExit(f"chaos: error: no .pyz to run: {done.stderr.strip()}\n"
                             "hint: mend that, or name a program: --program llmstack.py")
        return str(copy / "llmstack.pyz")

    def close(self) -> None:
        """End whatever is left, and the home with it."""
        self.bystander.close()
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def write_ini(self, engine: str = "embedded", memory_gb: int = SMALL_GB,
                  more: str = "") -> None:
        """Give the project its tiers, and trust them as its user would."""
        text = MODELS_INI.format(engine=engine, router_port=self.router_port, server=self.server,
                                 engine_port=self.engine_port, memory_gb=memory_gb,
                                 model=self.model)
        (self.state / "models.ini").write_text(text + more)
        self.command("trust")

    # ---- commands

    def popen(self, *words: str) -> subprocess.Popen[str]:
        """Begin a command."""
        return subprocess.Popen([sys.executable, self.program, *words], env=self.env,
                                cwd=self.project, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, process: subprocess.Popen[str], words: Sequence[str]) -> Said:
        """Wait for a command. Errors: Fault, where it hangs or ends in a traceback."""
        try:
            text = process.communicate(timeout=COMMAND_S)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise Fault(f"`{' '.join(words)}` did not end within {COMMAND_S} s") from None
        if "Traceback" in text:
            raise Fault(f"`{' '.join(words)}` ended in a traceback: {text[-2000:]}")
        return Said(process.returncode, text)

    def command(self, *words: str, code: Optional[int] = 0) -> Said:
        """Run a command to its end. Errors: Fault, also for another exit code than `code`."""
        said = self.finish(self.popen(*words), words)
        if code is not None and said.code != code:
            raise Fault(f"`{' '.join(words)}` ended with {said.code}: {said.text.strip()}")
        return said

    def start(self) -> None:
        self.command("start", "--detach")

    # ---- what can be seen

    def processes(self) -> list[Process]:
        """All that was started in this home and is no zombie."""
        mark, found = f"HOME={self.directory}".encode(), []
        for name in os.listdir("/proc"):
            if not name.isdigit() or mark not in read_bytes(f"/proc/{name}/environ").split(b"\0"):
                continue
            state = read_bytes(f"/proc/{name}/stat").rpartition(b")")[2].split()
            if state and state[0] not in (b"Z", b"X"):
                found.append(Process(int(name), part_of(read_bytes(f"/proc/{name}/cmdline"))))
        return found

    def find(self, part: str) -> Optional[Process]:
        """A process of one part."""
        return next((each for each in self.processes() if each.part == part), None)

    def daemon_pid(self) -> int:
        """As its record says. Errors: Fault."""
        try:
            return int((self.state / "router.pid").read_text().split("\n")[0])
        except (OSError, ValueError) as exc:
            raise Fault(f"the daemon has no record: {exc}") from None

    def status(self) -> dict[str, Any]:
        """What `status --json` says."""
        said = self.command("status", "--json", code=None)
        try:
            value = json.loads(said.text)
        except ValueError:
            raise Fault(f"`status --json` says no JSON: {said.text[:500]}") from None
        return dict(value)

    def check_logs(self) -> None:
        """No log of ours has a traceback. Errors: Fault, with it; the log begins anew then.

        The logs of models and of llama-swap are what those print.
        """
        for name in ("router.log", "engine.log", "download.log"):
            path = self.state / "logs" / name
            text = path.read_text(errors="replace") if path.exists() else ""
            if "Traceback" in text:
                path.unlink()
                raise Fault(f"{path.name}: {text[text.index('Traceback'):][:3000]}")

    def check_down(self) -> None:
        """Nothing of ours is left: no process, no listener, no record. Errors: Fault."""
        with contextlib.suppress(Fault):
            until(lambda: not self.processes(), "an end of all processes", 2)
        left = [f"{each.part} {each.pid}" for each in self.processes()]
        if left:
            raise Fault(f"left behind: {', '.join(left)}")
        for port in (self.router_port, self.engine_port):
            if is_open(port):
                raise Fault(f"somebody listens on {port}")
        records = [path.name for path in self.state.glob("*.pid")]
        records += [name for name in ("active-channel",) if (self.state / name).exists()]
        records += [name for name in ("owner.json",) if (self.data / name).exists()]
        if records:
            raise Fault(f"a record is left: {', '.join(records)}")

    def check_up(self) -> None:
        """The record names the daemon that runs, and it is the only one. Errors: Fault."""
        daemons = [each.pid for each in self.processes() if each.part == "daemon"]
        if daemons != [self.daemon_pid()]:
            raise Fault(f"the record says {self.daemon_pid()}, there are {daemons}")
        for port in (self.router_port, self.engine_port):
            if not is_open(port):
                raise Fault(f"nobody listens on {port}")
