"""What stands between the program and the machine: files, logs, cores."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

import llmstack

# ---- files


def test_a_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file"
    llmstack.write_atomic(str(path), "one")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(llmstack.os, "fsync", full)
    with pytest.raises(llmstack.UserError, match="No space left"):
        llmstack.write_atomic(str(path), "two")
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(("env", "data"), [
    ({"LLMSTACK_DATA_DIR": "/d"}, "/d"), ({"XDG_DATA_HOME": "/x"}, "/x/llmstack"), ({}, "~/.local/share/llmstack"),
])
def test_the_data_directory(env: dict[str, str], data: str) -> None:
    assert llmstack.data_dir(env) == os.path.expanduser(data)


def test_the_data_directory_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "IS_WINDOWS", True)
    assert llmstack.data_dir({"LOCALAPPDATA": "/local"}) == "/local/llmstack"


# ---- logs


def test_our_log_rotates_and_keeps_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "LOG_BYTES", 200)
    path = tmp_path / "logs" / "router.log"
    log = llmstack.Log(str(path))
    for number in range(8):
        log.error(f"number {number} " + "x" * 200)
        log.rotate()
    names = sorted(p.name for p in path.parent.iterdir())
    assert names == ["router.log", "router.log.1", "router.log.2", "router.log.3"]
    assert "number 7" in (path.parent / "router.log.1").read_text()
    assert "number 5" in (path.parent / "router.log.3").read_text()


def test_a_log_another_program_writes_rotates_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "LOG_BYTES", 200)
    path = tmp_path / "llama-swap.log"
    with open(path, "ab", buffering=0) as writer:
        for number in range(6):
            writer.write(b"number %d " % number + b"x" * 200)
            llmstack.rotate_foreign_log(str(path))
        writer.write(b"behind")
    assert path.read_bytes() == b"behind"
    assert sorted(p.name for p in tmp_path.glob("llama-swap*")) == [
        "llama-swap.log", "llama-swap.log.1", "llama-swap.log.2", "llama-swap.log.3"]
    assert b"number 5" in (tmp_path / "llama-swap.log.1").read_bytes()


@pytest.mark.parametrize(("level", "lines"), [("debug", 4), ("INFO", 3), (" Warning ", 2), ("error", 1), ("nonsense", 3)])
def test_log_level_in_any_case(level: str, lines: int, tmp_path: Path) -> None:
    log = llmstack.Log(str(tmp_path / "x.log"), level)
    for write in (log.debug, log.info, log.warning, log.error):
        write("line")
    log.flush()
    assert len((tmp_path / "x.log").read_text().splitlines()) == lines


def test_lines_of_many_threads_are_all_written(tmp_path: Path) -> None:
    log = llmstack.Log(str(tmp_path / "x.log"))
    threads = [threading.Thread(target=lambda: [log.info("line") for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.flush()
    assert len((tmp_path / "x.log").read_text().splitlines()) == 4000


def test_a_tail_shows_no_control_characters(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_bytes(b"\x1b[31mred\x1b[0m\r\n" * 30)
    tail = llmstack.tail_of(str(tmp_path / "x.log"), 3)
    assert tail.count("red") == 3
    assert "\x1b" not in tail


