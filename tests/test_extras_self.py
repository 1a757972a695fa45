"""extras/self.py: the command on PATH, and a file that takes another's place whole or not."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import build_zipapp
import llmstack
from tests.conftest import ROOT
from tests.scripted import ScriptedUpstream, always, answer


@pytest.fixture(scope="module")
def built() -> bytes:
    return build_zipapp.build()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bytecode")


@pytest.fixture
def pyz(built: bytes, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its own; the bytecode is cached for all of them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE")
    path = tmp_path / "a place" / "llmstack.pyz"
    path.parent.mkdir()
    build_zipapp.write(str(path), built)
    return path


def newer(path: Path, version: str = "9.9.9") -> Path:
    """A build of another version."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("models.ini", "")
        archive.writestr("llmstack.py", "")
        archive.writestr("__main__.py", f"print('llmstack {version}')\n")
    return path


def run(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(program), "self", *words],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def said(path: Path) -> str:
    return subprocess.run(
        [str(path), "version"], capture_output=True, text=True, timeout=60, check=False
    ).stdout


@pytest.fixture
def bin_dir(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{home}/.local/bin:{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("SHELL", "/bin/bash")
    return home / ".local" / "bin"


def test_a_zipapp_is_copied(pyz: Path, bin_dir: Path, home: Path) -> None:
    done = run(pyz, "install")
    assert done.returncode == 0, done.stderr
    assert (bin_dir / "llmstack").read_bytes() == pyz.read_bytes()
    assert said(bin_dir / "llmstack") == f"llmstack {llmstack.VERSION}\n"
    completion = home / ".local/share/bash-completion/completions/llmstack"
    assert completion.read_text() == (ROOT / "share/completion/llmstack.bash").read_text()
    assert "is not on PATH" not in done.stdout
    assert run(pyz, "install").returncode == 0, "again"
    assert "This is" in run(bin_dir / "llmstack", "install").stdout


@pytest.mark.parametrize("shell", ["fish", "zsh"])
def test_the_completion_of_other_shells(
    shell: str, pyz: Path, bin_dir: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    done = run(pyz, "install")
    if shell == "fish":
        assert (home / ".config/fish/completions/llmstack.fish").exists()
    else:
        assert 'eval "$(llmstack completion zsh)"' in done.stdout


def test_a_source_tree_gets_a_launcher(bin_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "src with 'quotes'"
    source.mkdir()
    shutil.copy(llmstack.PROGRAM, source)
    for name in ("extras", "share"):
        shutil.copytree(ROOT / name, source / name)
    assert run(source / "llmstack.py", "install", "--dir", str(bin_dir)).returncode == 0
    assert said(bin_dir / "llmstack") == f"llmstack {llmstack.VERSION}\n"
    assert run(source / "llmstack.py", "install").returncode == 0, "again"
    done = run(source / "llmstack.py", "update", "x.pyz")
    assert (done.returncode, "is no llmstack.pyz" in done.stderr) == (2, True)


def test_another_program_of_that_name_stays(pyz: Path, bin_dir: Path) -> None:
    bin_dir.mkdir(parents=True)
    (bin_dir / "llmstack").write_text("#!/bin/sh\necho mine\n")
    done = run(pyz, "install")
    assert done.returncode == 1
    assert "is another program" in done.stderr
    assert "mine" in (bin_dir / "llmstack").read_text()


def test_a_directory_that_is_not_on_path(pyz: Path, bin_dir: Path, tmp_path: Path) -> None:
    done = run(pyz, "install", "--dir", str(tmp_path / "other"), "--link")
    assert f"{tmp_path / 'other'} is not on PATH" in done.stdout
    assert str(pyz) in (tmp_path / "other" / "llmstack").read_text()


# ---- update


def test_an_update_from_a_file(pyz: Path, tmp_path: Path) -> None:
    new = newer(tmp_path / "new.pyz")
    digest = hashlib.sha256(new.read_bytes()).hexdigest()
    old = pyz.read_bytes()
    done = run(pyz, "update", str(new), "--check")
    assert f"llmstack 9.9.9, sha256 {digest}" in done.stdout
    assert pyz.read_bytes() == old
    done = run(pyz, "update", str(new), "--sha256", digest.upper())
    assert done.returncode == 0, done.stderr
    assert pyz.read_bytes() == new.read_bytes()
    assert os.access(pyz, os.X_OK)
    assert f"which was {llmstack.VERSION}" in done.stdout
    assert os.listdir(pyz.parent) == ["llmstack.pyz"]


def test_an_update_through_a_link_and_from_a_url(pyz: Path, tmp_path: Path) -> None:
    new = newer(tmp_path / "new.pyz").read_bytes()
    (tmp_path / "llmstack").symlink_to(pyz)
    with ScriptedUpstream(always(answer(new))) as upstream:
        done = run(tmp_path / "llmstack", "update", f"http://127.0.0.1:{upstream.port}/x.pyz")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "llmstack").is_symlink()
    assert pyz.read_bytes() == new


def test_the_same_build_again(pyz: Path, tmp_path: Path) -> None:
    shutil.copy(pyz, tmp_path / "same.pyz")
    done = run(pyz, "update", str(tmp_path / "same.pyz"))
    assert (done.returncode, "already" in done.stdout) == (0, True)


def make_bad(path: Path, kind: str, built: bytes) -> None:
    newer(path)
    whole = path.read_bytes()
    if kind == "cut":
        path.write_bytes(built[: len(built) // 2])
    elif kind == "text":
        path.write_text("<html>")
    elif kind == "damaged":
        at = whole.index(b"print")
        path.write_bytes(whole[:at] + b"PRINT" + whole[at + 5 :])
    elif kind == "foreign":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("__main__.py", "")
    elif kind == "broken":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("__main__.py", "raise SystemExit(3)\n")
    elif kind == "speaks":
        newer(path, "\\x1b[2J")
    else:
        path.unlink()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("cut", "is not taken: it is no zip archive"),
        ("text", "is not taken: it is no zip archive"),
        ("damaged", "__main__.py in it is damaged"),
        ("foreign", "it has no llmstack.py"),
        ("broken", "it does not run here"),
        ("speaks", "it does not run here"),
        ("missing", "No such file"),
    ],
)
def test_what_is_no_build_changes_nothing(
    kind: str, what: str, pyz: Path, tmp_path: Path, built: bytes
) -> None:
    make_bad(tmp_path / "bad.pyz", kind, built)
    done = run(pyz, "update", str(tmp_path / "bad.pyz"))
    assert done.returncode == 1
    assert what in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert pyz.read_bytes() == built


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["update", "http://example.com/x.pyz"], "would come unprotected"),
        (["update"], "update takes a FILE or a URL"),
        (["install", "x"], "install takes --dir and --link only"),
        (["upgrade"], "invalid choice"),
    ],
)
def test_usage(words: list[str], what: str, pyz: Path) -> None:
    done = run(pyz, *words)
    assert done.returncode == 2
    assert what in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_a_redirect_out_of_protection_is_not_followed_to_its_end(pyz: Path) -> None:
    away = answer(b"", "302 Found", "Location: http://localhost.example.invalid/x.pyz")
    with ScriptedUpstream(always(away)) as upstream:
        done = run(pyz, "update", f"http://127.0.0.1:{upstream.port}/x.pyz")
    assert done.returncode in (1, 2)
    assert len(done.stderr.splitlines()) == 2


def test_another_hash_is_not_taken(pyz: Path, tmp_path: Path) -> None:
    done = run(pyz, "update", str(newer(tmp_path / "new.pyz")), "--sha256", "0" * 64)
    assert (done.returncode, "its sha256 is" in done.stderr) == (1, True)


def test_nobody_there_is_two_lines(pyz: Path) -> None:
    done = run(pyz, "update", "http://127.0.0.1:9/x.pyz")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2
