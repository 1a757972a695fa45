"""The servers of a run, and proof that none of them stays behind."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from tests.bench.stub import HOST

PATIENCE_S = 10  # longest wait for a byte, a boot or a short command before the subject has failed
POLL_S = 0.001  # how often a booting child is looked at; also the error of the boot measure
STOP_S = 5  # from SIGTERM to SIGKILL


class SubjectError(Exception):
    """A subject failed to start, to answer, or to relay what it was given."""


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _leave(number: int, _frame: object) -> None:
    for each in SIGNALS:  # a second Ctrl-C must not cut the clearing up short
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
    """Keep signals waiting: an interrupt between a fork and the line that files the child would leave it behind."""
    waiting: list[int] = []
    before = [signal.signal(each, lambda number, _frame: waiting.append(number)) for each in SIGNALS]
    try:
        yield
    finally:
        for each, handler in zip(SIGNALS, before):
            signal.signal(each, handler)
    if waiting:
        _leave(waiting[0], None)


def child_env(home: Path) -> dict[str, str]:
    """The environment of every child: nothing of the user's settings, no proxy for local requests."""
    private = ("PYTHON", "LLMSTACK_", "XDG_", "OPENCODE_")
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(private) and not name.lower().endswith("_proxy")}
    return {**kept, "HOME": str(home), "TMPDIR": str(home)}


def get_status(port: int, path: str) -> int:
    """The status of a GET, 0 if there was no answer."""
    try:
        with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=PATIENCE_S)) as connection:
            connection.request("GET", path)
            return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0


def output_of(command: Sequence[str], **options: Any) -> str:
    """Run a short *command* to its end and return its output; raise SubjectError if it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE_S, check=False,
                              **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SubjectError(str(error)) from None
    output = str(done.stdout.decode(errors="replace")).strip()
    if done.returncode:
        last_line = output.splitlines()[-1] if output else "no output"
        raise SubjectError(f"{command[0]} ended with {done.returncode}: {last_line}")
    return output


class Launch(NamedTuple):
    """How to start a server and where it says on which port it listens."""

    name: str
    command: Sequence[str]
    env: dict[str, str]
    announces_on: str  # "stdout" or "stderr"
    announcement: str  # pattern; its first group is the port


class Child:
    """A server this run started, its output in files (a full pipe would stop it)."""

    def __init__(self, launch: Launch, number: int, directory: Path, env: dict[str, str]) -> None:
        self.launch = launch
        self._outputs = {name: directory / f"{number}-{launch.name}.{name}" for name in ("stdout", "stderr")}
        self.started_s = time.perf_counter()
        with self._outputs["stdout"].open("wb") as out, self._outputs["stderr"].open("wb") as err:
            self.process = subprocess.Popen(
                launch.command, stdin=subprocess.PIPE, stdout=out, stderr=err, cwd=directory, env={**env, **launch.env},
                start_new_session=True)  # out of reach of the terminal's Ctrl-C; a group to end as one

    def wait_for_port(self) -> int:
        """Return the port the server announces."""
        while True:
            text = self._outputs[self.launch.announces_on].read_text(errors="replace")
            found = re.search(self.launch.announcement, text)
            if found:
                return int(found.group(1))
            self._wait("announced no port")

    def wait_for_answer(self, port: int) -> None:
        """Return when the server has answered a GET with 200."""
        for path in itertools.cycle(("/models.ini", "/v1/models")):
            if get_status(port, path) == 200:
                return
            self._wait("answered no GET with 200")

    def resident_bytes(self) -> int:
        """The resident memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status")
        if status.exists():
            found = re.search(r"^VmRSS:\s+(\d+) kB", status.read_text(), re.MULTILINE)
            return int(found.group(1)) * 1024 if found else 0
        return int(output_of(["ps", "-o", "rss=", "-p", str(self.process.pid)])) * 1024

    def processor_s(self) -> float:
        """The processor time that the process and what it started have used; 0.0 where /proc does not tell."""
        ticks = sum(int(fields[11]) + int(fields[12]) for fields in self._group().values())
        return ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0

    def memory_bytes(self) -> tuple[int, int]:
        """The resident memory of the process and what it started: now, and at its highest; zeros without /proc."""
        now, most = 0, 0
        for directory in self._group():
            with contextlib.suppress(OSError):
                status = (directory / "status").read_text()
                now += 1024 * sum(map(int, re.findall(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)))
                most += 1024 * sum(map(int, re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)))
        return now, most

    def _group(self) -> dict[Path, list[str]]:
        """The processes of the group that the child leads, by their directories in /proc, with the fields of their stat."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self.process.pid:
                    found[stat.parent] = fields
        return found

    def last_words(self) -> str:
        """The last line of standard error, for a failure's message."""
        lines = self._outputs["stderr"].read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing on stderr"

    def stop(self) -> None:
        """End the process and whatever it started, and reap it."""
        self._signal_group(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._signal_group(signal.SIGKILL)
            self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()

    def _signal_group(self, number: signal.Signals) -> None:
        if self.process.returncode is None:  # not reaped, so the number still is this child's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def _wait(self, failure: str) -> None:
        """Sleep a moment of a boot; raise SubjectError when the child is dead or has had its time."""
        status = self.process.poll()
        if status is not None:
            raise SubjectError(f"ended with status {status} at start: {self.last_words()}")
        if time.perf_counter() - self.started_s > PATIENCE_S:
            raise SubjectError(f"{failure} within {PATIENCE_S} s: {self.last_words()}")
        time.sleep(POLL_S)


class Children:
    """The directory and the servers of a run."""

    def __init__(self) -> None:
        self._running: list[Child] = []
        self._numbers = itertools.count()
        self.directory = Path(tempfile.mkdtemp(prefix="llmstack-bench-"))
        self.env = child_env(self.directory)

    def start(self, launch: Launch) -> Child:
        """Start a server; it ends with the run at the latest."""
        try:
            with _held_signals():
                child = Child(launch, next(self._numbers), self.directory, self.env)
                self._running.append(child)
        except OSError as error:
            raise SubjectError(f"cannot be started: {error}") from None
        return child

    def stop(self, child: Child) -> None:
        """End a server before the run ends."""
        child.stop()
        self._running.remove(child)

    def close(self) -> None:
        """End every server and remove the directory."""
        with _held_signals():
            for child in reversed(self._running):
                child.stop()
            shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def children_of_run() -> Iterator[Children]:
    """Yield the children of a run; however the block is left, none of them stays behind."""
    for each in SIGNALS:
        signal.signal(each, _leave)
    children = Children()
    try:
        yield children
    finally:
        children.close()


URL_ON_FIRST_LINE = r"\A[^\n]*?https?://[^\s/:]+:(\d+)[^\n]*\n"


class Subject(NamedTuple):
    """Something the client can be pointed at."""

    name: str
    port: int
    child: Child
    has_boot: bool = False  # whether its boot and memory are measured


def start(children: Children, name: str, command: Sequence[str], announces_on: str = "stdout",
          announcement: str = URL_ON_FIRST_LINE, env: Optional[dict[str, str]] = None, has_boot: bool = False) -> Subject:
    """Start a server that says on which port it listens."""
    child = children.start(Launch(name, command, env or {}, announces_on, announcement))
    port = child.wait_for_port()
    if has_boot:
        child.wait_for_answer(port)
    return Subject(name, port, child, has_boot)
