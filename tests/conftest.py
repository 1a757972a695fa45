"""What every test shares: a home of its own, and proof that nothing is left behind."""

from __future__ import annotations

import marshal
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import llmstack  # noqa: E402

# Below the range that outgoing connections take theirs from, and apart from other processes that
# run tests: the first of the ports that this one's model servers take.
FIRST_PORT = 11_000 + os.getpid() % 500 * 40
# Where the program lies that tests start. It goes when this process ends.
COMPILED = tempfile.TemporaryDirectory(
    prefix="llmstack-", dir=os.environ.get("PYTEST_DEBUG_TEMPROOT"))
LAUNCHER = """\
import marshal

with open({path!r}, "rb") as file:
    code = marshal.load(file)
exec(code, globals())
"""


def compiled_program() -> str:
    """The path of the program as tests start it: with its bytecode, and with ports of its own.

    A script that is run by its path is compiled at every start, and a run of all tests starts it
    hundreds of times.
    """
    directory = Path(COMPILED.name, "compiled")             # which tests/sections.py knows
    directory.mkdir()
    for name in ("extras", "models.ini", "share"):
        (directory / name).symlink_to(ROOT / name)
    source = (ROOT / "llmstack.py").read_text(encoding="utf-8")
    here = f"FIRST_SERVER_PORT = {llmstack.FIRST_SERVER_PORT} "
    assert source.count(here) == 1
    source = source.replace(here, f"FIRST_SERVER_PORT = {FIRST_PORT} ")
    code = compile(source, str(ROOT / "llmstack.py"), "exec", dont_inherit=True)
    bytecode, program = directory / "bytecode", directory / "llmstack.py"
    bytecode.write_bytes(marshal.dumps(code))
    program.write_text(LAUNCHER.format(path=str(bytecode)), encoding="utf-8")
    return str(program)


llmstack.PROGRAM = compiled_program()


def load_always(monkeypatch: pytest.MonkeyPatch, name: str, module: Any) -> None:
    """Have the program load this very module as an extra, with all that a test has changed in it."""
    load = llmstack.load_extra
    monkeypatch.setattr(llmstack, "load_extra", lambda asked: module if asked == name else load(asked))


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    # In the background of a shell, a run and all its children would ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, data directory and project of the test's own; the project is the current directory."""
    for name in list(os.environ):
        if name.startswith(("LLMSTACK_", "LLAMA_", "LITELLM_", "XDG_", "HF_")) and not name.startswith("LLMSTACK_TEST_"):
            monkeypatch.delenv(name)
    directory = tmp_path / "home"
    project = tmp_path / "project"
    for path in (directory, project):
        path.mkdir()
    monkeypatch.setenv("HOME", str(directory))
    monkeypatch.setenv("USERPROFILE", str(directory))
    monkeypatch.setenv("XDG_DATA_HOME", str(directory / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(directory / "local"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)    # Python's own is beside its modules
    monkeypatch.chdir(project)
    return directory


@pytest.fixture(autouse=True)
def nothing_left_behind(home: Path) -> Iterator[None]:
    """No process that a test started survives it. Proof: all of them inherit the test's HOME."""
    before = _processes()
    yield
    mark = f"HOME={home}".encode()
    deadline = time.monotonic() + 5
    while True:
        left = [pid for pid in _processes() - before if mark in _environment(pid)]
        if not left or time.monotonic() > deadline:
            break
        threading.Event().wait(0.02)
    for pid in left:
        os.kill(pid, 9)
    assert not left, f"processes left behind: {left}"


def _processes() -> set[int]:
    if not os.path.isdir("/proc/self"):
        return set()
    return {int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid()}


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


@pytest.fixture
def real_data(home: Path) -> Path:
    """A data directory of the test's own, in which llama.cpp's server and huggingface_hub from PyPI are installed already."""
    shared = os.environ.get("LLMSTACK_TEST_DATA")
    if not shared:
        pytest.skip("run the suite with `python3 -m tests`: it provisions llama.cpp's server")
    data = home / "data" / "llmstack"
    data.mkdir(parents=True)
    for name in ("llama-cpp", "hub"):
        (data / name).symlink_to(Path(shared) / name, target_is_directory=True)
    return data


@pytest.fixture
def config() -> llmstack.Config:
    """The bundled models.ini."""
    return llmstack.parse_models_ini((ROOT / "models.ini").read_text(encoding="utf-8"))[0]
