"""extras/logs.py: the end of a log, and what comes behind it, through rotations."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

import llmstack
from tests.test_stack import NO_MODELS

LOGS = Path(".llmstack/logs")
TIERS = NO_MODELS + "[code-fast]\nrole = fast\nhf_repo = a/b\nhf_file = c.gguf\n"


@pytest.fixture(autouse=True)
def project() -> None:
    LOGS.mkdir(parents=True)
    (LOGS.parent / "models.ini").write_text(TIERS)
    (LOGS / "router.log").write_text("".join(f"line {i}\n" for i in range(100)))
    (LOGS / "code-fast.log").write_text("a model\x1b[2J\n")
    (LOGS / "llama-swap.log").write_text("a swap\n")


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert llmstack.main(["logs", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_end_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys) == [f"line {i}" for i in range(60, 100)]
    assert shown(capsys, "-n", "1", "router") == ["line 99"]
    assert shown(capsys, "-n", "0") == []
    assert shown(capsys, "code-fast") == ["a model\\u001b[2J"]
    assert shown(capsys, "engine") == ["a swap"]
    assert shown(capsys, "router", "-n", "1", "code-fast") == [
        "router     line 99",
        "code-fast  a model\\u001b[2J",
    ]


def test_a_log_that_is_not_there_yet(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["logs", "hosted"]) == 0
    assert capsys.readouterr() == ("", "llmstack: warning: hosted has written nothing yet\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ruoter"], "there is no log 'ruoter', did you mean router?"),
        (["../models"], "there is no log '../models'"),
    ],
)
def test_a_log_that_never_is(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmstack.main(["logs", *words]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "llmstack: error: " + said


@pytest.fixture
def following() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, llmstack.PROGRAM, "logs", "-f", "-n", "1"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield child
    child.send_signal(signal.SIGINT)
    assert child.stdout
    child.stdout.close()
    assert child.wait(timeout=20) == 130


def add(text: str) -> None:
    with open(LOGS / "router.log", "a") as file:
        file.write(text)


def test_what_comes_is_shown_through_a_rotation(following: subprocess.Popen[str]) -> None:
    out = following.stdout
    assert out
    assert out.readline() == "line 99\n"
    add("half ")
    add("a line\n")
    assert out.readline() == "half a line\n"
    os.replace(LOGS / "router.log", LOGS / "router.log.1")
    with open(LOGS / "router.log.1", "a") as file:
        file.write("last words\n")
    add("a new file\n")
    assert out.readline() == "last words\n"
    assert out.readline() == "a new file\n"
    with open(LOGS / "router.log", "w") as file:  # copied and emptied in place
        file.write("short\n")
    assert out.readline() == "short\n"
