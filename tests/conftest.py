"""What every test shares: a home of its own, and proof that nothing is left behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import llmstack  # noqa: E402

SERVERS = {"real_data", "noise", "smol", "swap"}        # fixtures of tests with model servers
# What stands in files whose tests bring up stacks, with model servers or with fakes of them.
STACKS = ('"start"', '"restart"', "open_stage")


def load_always(monkeypatch: pytest.MonkeyPatch, name: str, module: Any) -> None:
    """Have the program load this very module as an extra, with all that a test has changed in it."""
    load = llmstack.load_extra
    monkeypatch.setattr(llmstack, "load_extra", lambda asked: module if asked == name else load(asked))


@pytest.hookimpl(tryfirst=True)
def pytest_configure() -> None:
    # In the background of a shell, a run and all its children would ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two processes, one has all tests that start model servers: these take the first free port."""
    texts = {path: path.read_text(encoding="utf-8") for path in {item.path for item in items}}
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        text = texts[item.path]
        if not SERVERS.isdisjoint(fixtures) or any(word in text for word in STACKS):
            item.add_marker(pytest.mark.xdist_group("servers"))


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
