"""What we write is for its user alone, whatever the umask; what a clone puts in its place hangs nobody."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

import llmstack

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    old = os.umask(0)
    yield
    os.umask(old)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def open_to_others(root: Path) -> list[Path]:
    paths = [root, *root.rglob("*")]
    return [p for p in paths if not p.is_symlink() and mode(p) & 0o077]


def test_files_directories_and_logs_are_private(tmp_path: Path) -> None:
    top = tmp_path / "top"
    llmstack.write_atomic(str(top / "a" / "file"), "x")
    llmstack.Log(str(top / "logs" / "router.log")).error("line")
    llmstack.spawn([sys.executable, "-c", ""], str(top / "more" / "x.log"), os.environ).wait()
    with llmstack.FileLock(str(top / "data" / "lock"), lambda: None):
        assert open_to_others(top) == []
    assert mode(top / "a" / "file") == 0o600
    assert mode(top / "a") == 0o700


def test_install_leaves_nothing_that_others_may_read(home: Path) -> None:
    assert llmstack.main(["install"]) == 0
    assert open_to_others(Path(".llmstack")) == []
    assert open_to_others(home / "data" / "llmstack") == []


def test_what_an_older_version_left_open_is_closed(home: Path) -> None:
    places = llmstack.find_places(os.environ)
    logs = Path(places.in_state("logs"))
    logs.mkdir(parents=True)
    Path(places.data).mkdir(parents=True)
    (logs / "router.log").write_text("prompts\n")
    assert mode(logs) == 0o777
    llmstack.check_state(places)
    llmstack.Log(str(logs / "router.log")).error("more")
    assert [mode(Path(p)) for p in (places.state, logs, places.data)] == [0o700] * 3
    assert mode(logs / "router.log") == 0o600
    assert mode(Path(places.work)) & 0o077, "the project's own directory is not ours"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    shown = tmp_path / "public"
    shown.mkdir(mode=0o755)
    os.symlink(shown, tmp_path / "link")
    llmstack.close_to_others(str(tmp_path / "link"), str(tmp_path / "none"))
    assert mode(shown) == 0o755


def test_a_foreign_owner_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o755)
    uid = os.geteuid()
    monkeypatch.setattr(llmstack.os, "geteuid", lambda: uid + 1)
    llmstack.close_to_others(str(theirs))
    assert mode(theirs) == 0o755


def test_a_rotated_foreign_log_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "LOG_BYTES", 10)
    path = tmp_path / "logs" / "llama-swap.log"
    os.close(llmstack.open_log(str(path)))
    path.write_text("x" * 100)
    llmstack.rotate_foreign_log(str(path))
    assert sorted(p.name for p in path.parent.iterdir()) == ["llama-swap.log", "llama-swap.log.1"]
    assert open_to_others(path.parent) == [path.parent] * bool(mode(path.parent) & 0o077)
    assert mode(path.with_name("llama-swap.log.1")) == 0o600


@pytest.mark.parametrize("name", ["models.ini", "router.pid", "default-channel"])
def test_a_pipe_in_the_place_of_a_file_hangs_nothing(name: str) -> None:
    Path(".llmstack").mkdir()
    os.mkfifo(Path(".llmstack") / name)
    program = llmstack.PROGRAM
    done = subprocess.run([sys.executable, program, "status"], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=30, check=False)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    if name == "models.ini":
        assert "it is no regular file" in done.stderr


def test_a_pipe_in_the_place_of_a_log_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.log")
    with pytest.raises(llmstack.UserError, match="cannot write"):
        llmstack.spawn([sys.executable, "-c", ""], str(tmp_path / "x.log"), os.environ)


def test_a_models_ini_beyond_its_size_is_refused() -> None:
    path = Path(".llmstack") / "models.ini"
    path.parent.mkdir()
    path.write_text("#" * (llmstack.MAX_INI_BYTES + 1))
    with pytest.raises(llmstack.UserError, match="larger than 262,144 bytes"):
        llmstack.load_config(llmstack.find_places(os.environ))
