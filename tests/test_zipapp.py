"""The one file people copy: built twice alike, and run from elsewhere on the oldest and newest Pythons here."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import build_zipapp
import llmstack

ROOT = Path(__file__).resolve().parent.parent
MODERN = [f"3.{minor}" for minor in range(9, 20)]


def pythons(versions: list[str]) -> list[str]:
    """Installed interpreters of these versions: on PATH, and those that pyenv keeps."""
    found = []
    for version in versions:
        root = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
        kept = sorted(glob.glob(os.path.join(root, "versions", version + ".*", "bin", "python")))
        on_path = shutil.which("python" + version)
        found += kept[-1:] or ([on_path] if on_path and "shims" not in on_path else [])
    return found


PYTHONS = pythons(MODERN)
OLD = pythons(["2.7", "3.6", "3.7", "3.8"])
OLDEST_AND_NEWEST = sorted({*PYTHONS[:1], *PYTHONS[-1:]}) or [sys.executable]


def run(python: str, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *words], capture_output=True, stdin=subprocess.DEVNULL, text=True, timeout=60,
                          check=False, **options)  # type: ignore[call-overload]


def build(path: Path) -> Path:
    done = run(sys.executable, str(ROOT / "build_zipapp.py"), "--output", str(path))
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("built") / "llmstack.pyz")


@pytest.mark.parametrize("python", OLDEST_AND_NEWEST)
def test_every_python_builds_the_same_file(python: str, pyz: Path) -> None:
    done = run(python, str(ROOT / "build_zipapp.py"), "--check", str(pyz))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_program_inside_is_the_source_whole(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        assert archive.read("llmstack.py") == (ROOT / "llmstack.py").read_bytes()


def test_another_packing_of_the_same_is_recognised(pyz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.pyz"
    other.write_bytes(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(pyz) as archive, zipfile.ZipFile(other, "a") as again:
        for entry in archive.infolist():
            again.writestr(entry, archive.read(entry), zipfile.ZIP_STORED)
    assert build_zipapp.compare(str(other), pyz.read_bytes()) == 0
    assert "packed by another zlib" in capsys.readouterr().out
    with zipfile.ZipFile(other, "a") as again:
        again.writestr("more", "")
    assert build_zipapp.compare(str(other), pyz.read_bytes()) == 1
    other.write_bytes(pyz.read_bytes()[:5000])
    assert build_zipapp.compare(str(other), pyz.read_bytes()) == 1


def test_two_builds_are_the_same_bytes(pyz: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "again.pyz").read_bytes() == pyz.read_bytes()


def test_one_file_under_420_kb(pyz: Path) -> None:
    assert pyz.stat().st_size < 420_000
    assert os.access(pyz, os.X_OK)


def test_check_tells_whether_a_file_is_this_tree(pyz: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pyz"
    other.write_bytes(pyz.read_bytes() + b" ")
    script = str(ROOT / "build_zipapp.py")
    assert run(sys.executable, script, "--check", str(pyz)).returncode == 0
    assert run(sys.executable, script, "--check", str(other)).returncode == 1
    assert run(sys.executable, script, "--check", str(tmp_path / "none")).returncode == 1


@pytest.mark.parametrize("python", OLDEST_AND_NEWEST)
def test_it_runs_alone_in_an_empty_directory(pyz: Path, python: str, tmp_path: Path) -> None:
    directory = tmp_path / "elsewhere with spaces"
    directory.mkdir()
    shutil.copy(pyz, directory)
    assert run(python, "llmstack.pyz", "version", cwd=directory).stdout == f"llmstack {llmstack.VERSION}\n"
    (directory / "body.json").write_text('{"model":"auto","messages":[{"role":"user","content":"hi"}]}')
    why = run(python, "llmstack.pyz", "why", "body.json", cwd=directory)
    assert why.stdout.startswith("code-smart. "), why.stderr
    status = run(python, "./llmstack.pyz", "status", cwd=directory)
    assert status.returncode == 1, status.stderr
    assert "llmstack.pyz start`" in status.stdout


@pytest.mark.parametrize("python", OLD or [pytest.param("", marks=pytest.mark.skip(reason="no old Python here"))])
def test_old_pythons_get_one_clean_line(pyz: Path, python: str) -> None:
    done = run(python, str(pyz), "start")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("llmstack: error: Python 3.9 or newer is needed, this is ")
    assert len(done.stderr.splitlines()) == 2


def test_bytecode_is_cached_used_and_replaced(pyz: Path, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE")
    cache = home / "cache" / "llmstack"
    help_text = run(sys.executable, str(pyz), "help").stdout
    first = list(cache.iterdir())
    assert len(first) == 1
    assert run(sys.executable, str(pyz), "help").stdout == help_text
    assert list(cache.iterdir()) == first
    first[0].write_bytes(b"garbage")
    assert run(sys.executable, str(pyz), "help").stdout == help_text, "a broken cache is made again"
    changed = tmp_path / "changed.pyz"
    with zipfile.ZipFile(pyz) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"A multi-tier local LLM stack", b"Another multi-tier stack"))
    assert "Another multi-tier stack" in run(sys.executable, str(changed), "help").stdout, "a new program is compiled anew"
    assert len(list(cache.iterdir())) == 1, "one file a Python version"


def test_an_unwritable_cache_is_no_obstacle(pyz: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE")
    (home / "cache").write_text("not a directory")
    assert run(sys.executable, str(pyz), "help").returncode == 0


