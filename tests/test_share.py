"""share/: each file is whole in its own language, and the program says what it lacks without them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmstack
from tests.conftest import ROOT
from tests.test_stack import Project

HOOKS = ROOT / "share" / "hooks"
CHECKS = [
    ("bash", "-n", "llmstack.sh"), ("bash", "-n", "llmstack.bash"),
    ("zsh", "-n", "llmstack.sh"), ("zsh", "-n", "llmstack.zsh"),
    ("fish", "-n", "llmstack.fish"),
    ("shellcheck", "--", "llmstack.sh"), ("shellcheck", "--", "llmstack.bash"),
]


@pytest.mark.parametrize(("program", "flag", "name"), CHECKS)
def test_a_hook_is_whole_to_its_own_shell(program: str, flag: str, name: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"there is no {program}")
    done = subprocess.run([program, flag, str(HOOKS / name)], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def test_every_file_of_the_hooks_is_some_shells() -> None:
    named = {name for names in llmstack.HOOK_SOURCES.values() for name in names}
    assert {path.name for path in HOOKS.iterdir()} == named
    assert set(llmstack.HOOK_SOURCES) == set(llmstack.SHELLS)


@pytest.mark.parametrize("shell", llmstack.SHELLS)
def test_a_hook_undoes_every_variable_of_a_project(shell: str, home: Path) -> None:
    text = llmstack.hook_text(shell, str(home))
    assert re.findall(r"^ *_llmstack_unset (\w+)$", text, re.MULTILINE) == list(llmstack.SHELL_VARIABLES)


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A copy of llmstack.py beside models.ini, and nothing else of the project."""
    directory = tmp_path / "alone"
    directory.mkdir()
    for name in ("llmstack.py", "models.ini"):
        shutil.copy(ROOT / name, directory / name)
    return directory / "llmstack.py"


def run(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(program), *words], capture_output=True, text=True, timeout=120,
                          stdin=subprocess.DEVNULL, check=False)


def test_the_program_alone_runs_the_stack(alone: Path) -> None:
    project = Project()
    started = run(alone, "start", "--detach")
    try:
        assert started.returncode == 0
        assert [line for line in started.stderr.splitlines() if "LiteLLM is not installed" not in line] == []
        for name, lost in (("AGENTS.md", "so the project gets no AGENTS.md"),
                           ("litellm_config.yaml", "is not written")):
            line = next(x for x in started.stdout.splitlines() if f"templates/{name} is missing" in x)
            assert lost in line
        status = run(alone, "status")
        assert (status.returncode, status.stderr) == (0, "")
        assert str(project.router_port) in status.stdout
    finally:
        stopped = run(alone, "stop")
    assert (stopped.returncode, stopped.stdout) == (0, "Stopped.\n")


def test_the_program_alone_has_the_bundled_profile(alone: Path) -> None:
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import llmstack as l; l.total_memory_gb = lambda: 17.2;"
            "text, why = l.seed_text(); print(text == l.read_resource('models.ini')); print(why)\n"
            "try: l.seed_text('16')\nexcept l.UserError as exc: print(exc)")
    done = subprocess.run([sys.executable, "-c", code, str(alone.parent)], capture_output=True, text=True, check=True)
    same, why, refused = done.stdout.splitlines()
    assert same == "True"
    assert re.search(r"share.profiles.16\.ini is missing; taken instead: Profile 64, ", why)
    assert re.search(r"share.profiles.16\.ini is missing\Z", refused)


@pytest.mark.parametrize("shell", llmstack.SHELLS)
def test_a_hook_that_is_missing_is_an_error_in_a_line(shell: str, alone: Path) -> None:
    done = run(alone, "activate", shell)
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()
    assert re.match(r"llmstack: error: .*share.hooks.llmstack\.\w+ is missing\Z", error)
    assert "llmstack.pyz" in hint


def test_the_shell_of_start_opens_without_its_hook(home: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    places = llmstack.find_places({"LLMSTACK_DATA_DIR": str(home / "data")})
    monkeypatch.setattr(llmstack, "HOOK_SOURCES", {"bash": ("gone.bash",)})
    assert llmstack._shell_command("/bin/bash", places, llmstack.Marker("current"), {}, {}) == ["/bin/bash"]
    said, = capsys.readouterr().err.splitlines()
    assert "gone.bash is missing, so the prompt does not show the project" in said
