"""extras/completion.py: what it proposes, and that the shells take it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmstack
from tests.conftest import ROOT
from tests.test_stack import NO_MODELS

SHELLS = ["bash", "zsh", "fish", "powershell"]


@pytest.fixture(autouse=True)
def project() -> None:
    Path(".llmstack").mkdir()
    Path(".llmstack/models.ini").write_text(NO_MODELS)


def proposed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    capsys.readouterr()
    assert llmstack.main(["completion", "--complete", *words]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["=sta"], ["start", "status"]),
        (["=replay"], ["replay"]),
        (["help", "=down"], ["download"]),
        (["start", "=--de"], ["--detach", "--demo"]),
        (["replay", "=--m"], ["--models-ini"]),
        (["logs", "=--f"], ["--follow"]),
        (["run", "="], ["hosted"]),
        (["download", "="], ["hosted"]),
        (["fit", "=ho"], ["hosted"]),
        (["logs", "="], ["router", "engine", "hosted"]),
        (["activate", "=z"], ["zsh"]),
        (["completion", "=f"], ["fish"]),
        (["stop", "="], []),
        (["strat", "="], []),
        (["help", "=zz"], []),
    ],
)
def test_what_may_follow(
    words: list[str], found: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert proposed(capsys, *words) == found


def test_every_command_is_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    assert proposed(capsys, "=") == llmstack.command_names()


def test_a_broken_models_ini_is_not_the_place_to_say_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path(".llmstack/models.ini").write_text("[")
    assert proposed(capsys, "run", "=") == []
    assert capsys.readouterr().err == ""


def test_the_tiers_of_a_thin_client_are_known_without_asking(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path(".llmstack/default-channel").write_text("external http://127.0.0.1:9\n")
    assert proposed(capsys, "run", "=") == []
    models = '{"provider": {"llama.cpp": {"models": {"auto": {}, "distant": {}}}}}'
    Path(".llmstack/opencode.json").write_text(models)
    assert proposed(capsys, "run", "=") == ["distant"]
    Path(".llmstack/opencode.json").write_text('{"provider": ["x"]}')
    assert proposed(capsys, "run", "=") == []


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["completion", shell]) == 0
    file = {"powershell": "ps1"}.get(shell, shell)
    assert capsys.readouterr().out == (ROOT / f"share/completion/llmstack.{file}").read_text()


# ---- the shells themselves

BASH = """\
eval "$(llmstack completion bash)"
COMP_WORDS=(llmstack {words}); COMP_CWORD={count}
_llmstack_complete; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """\
compdef() {{ :; }}; compadd() {{ shift; print -l -- ${{(P)1}} }}; _files() {{ print FILES }}
eval "$(llmstack completion zsh)"
words=(llmstack {words}); CURRENT={count}+1; _llmstack
"""
FISH = "llmstack completion fish | source; complete -C 'llmstack {line}'"


@pytest.mark.parametrize(
    "words", [["sta"], ["run", ""], ["start", "--de"], ["stop", ""]], ids=" ".join
)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes(
    shell: str,
    words: list[str],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = shutil.which(shell)
    if not program:
        pytest.skip(f"there is no {shell}")
    (home / "llmstack").write_text(
        f"#!/bin/sh\nexec '{sys.executable}' '{llmstack.PROGRAM}' \"$@\"\n"
    )
    (home / "llmstack").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    quoted = " ".join(f"'{word}'" for word in words)
    text = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell].format(
        words=quoted, count=len(words), line=" ".join(words)
    )
    done = subprocess.run(
        [program, "-c", text],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.stderr == ""
    expected = proposed(capsys, *words[:-1], "=" + words[-1])
    if not expected:  # files, as the shell has them
        assert "hosted" not in done.stdout
        return
    assert set(expected) <= set(done.stdout.split())


@pytest.mark.parametrize(
    ("program", "flag", "name"),
    [
        ("bash", "-n", "llmstack.bash"),
        ("shellcheck", "--", "llmstack.bash"),
        ("zsh", "-n", "llmstack.zsh"),
        ("fish", "-n", "llmstack.fish"),
    ],
)
def test_a_script_is_whole_to_its_own_shell(program: str, flag: str, name: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"there is no {program}")
    done = subprocess.run(
        [program, flag, str(ROOT / "share/completion" / name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout + done.stderr == ""
