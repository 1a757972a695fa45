"""Programs of share/guests: run from the source tree, out of the zipapp, and named where they are missing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import llmstack
from tests.test_zipapp import OLDEST_AND_NEWEST, ROOT, run

ECHO = """import sys

if __name__ == "__main__":
    print(sys.argv[1:], "llmstack" in sys.modules, __file__)
    try:
        import llmstack
    except ImportError:
        sys.exit(7)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree with one guest."""
    directory = tmp_path_factory.mktemp("tree")
    for name in ("LICENSE", "llmstack.py", "models.ini", "build_zipapp.py"):
        shutil.copy(ROOT / name, directory)
    (directory / "share" / "guests").mkdir(parents=True)
    (directory / "share" / "guests" / "echo.py").write_text(ECHO)
    return directory


def command_of(program: Path, name: str) -> list[str]:
    """What guest_command says in a process of that program's own."""
    code = (f"import sys; sys.path.insert(0, {str(program)!r}); import llmstack\n"
            "try:\n"
            f"    print(chr(0).join(llmstack.guest_command('PYTHON', {name!r})))\n"
            "except llmstack.UserError as exc:\n"
            "    print(exc, exc.hint, sep=chr(0))\n")
    return run(sys.executable, "-c", code).stdout.strip().split("\0")


def test_from_source_it_is_the_file_itself(tree: Path) -> None:
    assert command_of(tree, "echo") == ["PYTHON", str(tree / "share" / "guests" / "echo.py")]


@pytest.mark.parametrize("python", OLDEST_AND_NEWEST)
def test_the_zipapp_runs_it_without_loading_the_program(python: str, tree: Path, tmp_path: Path) -> None:
    pyz = tmp_path / "a b.pyz"
    assert run(sys.executable, str(tree / "build_zipapp.py"), "--output", str(pyz)).returncode == 0
    command = command_of(pyz, "echo")
    assert command == ["PYTHON", str(pyz), "_guest", "echo"]
    done = run(python, *command[1:], "one", "two words", cwd=tmp_path)
    assert done.stdout.startswith("['one', 'two words'] False "), done.stderr
    assert done.returncode == 7, "the archive is not on the guest's path"


def test_a_copy_without_its_guests_says_what_to_copy(tree: Path, tmp_path: Path) -> None:
    shutil.copy(tree / "llmstack.py", tmp_path)
    message, hint = command_of(tmp_path, "echo")
    assert message == f"there is no {tmp_path / 'share' / 'guests' / 'echo.py'}"
    assert "share/" in hint
    assert "llmstack.pyz" in hint


def test_this_program_knows_its_own() -> None:
    with pytest.raises(llmstack.UserError, match="no-such-guest"):
        llmstack.guest_command(sys.executable, "no-such-guest")
