"""The one file people copy: built twice alike, and run from elsewhere on the oldest and newest Pythons here."""

from __future__ import annotations

import ast
import glob
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
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


class Untyped(ast.NodeTransformer):
    """Takes types away where the program does not read them itself: everywhere but in the bodies of classes."""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        node.body = [inner if isinstance(inner, ast.AnnAssign) else self.visit(inner) for inner in node.body]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        self.generic_visit(node)
        return node if node.value is None else ast.copy_location(ast.Assign([node.target], node.value, None), node)


def test_the_program_inside_is_the_source_without_what_only_readers_need() -> None:
    source = (ROOT / "llmstack.py").read_text(encoding="utf-8")
    bare = build_zipapp.bare(source)

    def shape(text: str) -> list[str]:
        tree = Untyped().visit(ast.parse(text))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Expr(ast.Constant("", lineno=0, end_lineno=0), lineno=node.body[0].lineno)
        return [f"{getattr(n, 'lineno', 0)} {ast.dump(n)[:200]}" for n in ast.walk(tree)]

    assert shape(bare) == shape(source)
    assert bare.startswith("#!/usr/bin/env python3\n")
    assert len(bare) < 0.8 * len(source)


def test_bare_keeps_what_only_looks_like_a_comment() -> None:
    source = ('A = "# no"  # gone\n\n\ndef f():\n    """Gone,\n    é.\n    """  # gone\n    # gone\n    if A:\n'
              '        return """#\n      kept """\n    return (1,\n            f"""{A}\n    kept {A} """, 2)\n')
    assert build_zipapp.bare(source) == (
        'A = "# no"\n\n\ndef f():\n ""\n\n\n\n'
        ' if A:\n  return """#\n      kept """\n return (1,\nf"""{A}\n    kept {A} """, 2)\n')


@pytest.mark.parametrize("data", [b"", b"a", b"ab", b"abc" * 400, bytes(range(256)) * 3, b"x" * 70_000, os.urandom(3000),
                                  (ROOT / "README.md").read_bytes()], ids=len)
def test_zlib_reads_what_our_compressor_writes(data: bytes) -> None:
    compressor = build_zipapp.Deflate()
    written = compressor.compress(data[:1000]) + compressor.compress(data[1000:]) + compressor.flush()
    assert zlib.decompress(written, -15) == data


def test_two_builds_are_the_same_bytes(pyz: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "again.pyz").read_bytes() == pyz.read_bytes()


def test_one_file_under_300_kb(pyz: Path) -> None:
    assert pyz.stat().st_size < 300_000
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
    assert why.stdout.startswith("code-smart: "), why.stderr
    status = run(python, "./llmstack.pyz", "status", cwd=directory)
    assert status.returncode == 1, status.stderr
    assert "llmstack start" in status.stdout


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


def test_types_go_but_not_those_of_fields() -> None:
    source = ("from typing import NamedTuple\nX: int = 1\n\nclass N(NamedTuple):\n    a: int\n    b: str = '->'\n\n"
              "    def f(self, x: dict[str, int], *y: 'é', z: int = 1) -> dict[str, str]:\n        q: int\n"
              "        g = {1: lambda k: k}[1:]\n        return g\n")
    bare = build_zipapp._unannotated(source)
    assert bare == source.replace("X: int", "X").replace(": dict[str, int]", "").replace(": 'é'", "").replace(
        "z: int", "z").replace(" -> dict[str, str]", "")
    compile(bare, "x", "exec")
