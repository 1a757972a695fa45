"""The dispatcher: commands of the program and of extras/, their help, what a slip is told."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import build_zipapp
import llmstack
from tests.conftest import ROOT

EXTRAS = sorted(path.stem.replace("_", "-") for path in (ROOT / "extras").glob("*.py"))
LISTED = " ".join(names for _, names in llmstack.COMMAND_GROUPS).split()
BUILT_IN = [name for name in llmstack.COMMANDS if not name.startswith("_")]
GREETING = '''"""Greet somebody.

examples:
  llmstack well-met you     # politely
"""


def main(argv, llmstack):
    llmstack.say(f"well met, {argv[0]}")
    return 3
'''


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A copy of the program with one extra that nobody knows of."""
    directory = tmp_path / "elsewhere with spaces"
    (directory / "extras").mkdir(parents=True)
    shutil.copy(llmstack.PROGRAM, directory / "llmstack.py")
    shutil.copy(ROOT / "models.ini", directory)
    (directory / "extras" / "well_met.py").write_text(GREETING)
    return directory


def run(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_every_command_is_listed_once_and_every_listed_one_is_there() -> None:
    assert len(LISTED) == len(set(LISTED))
    assert set(LISTED) == {*BUILT_IN, *EXTRAS} & set(LISTED)
    assert set(BUILT_IN) <= set(LISTED)


def test_an_extra_is_found_by_its_name(elsewhere: Path) -> None:
    done = run(elsewhere, "llmstack.py", "well-met", "friend")
    assert (done.stdout, done.returncode) == ("well met, friend\n", 3)
    assert (
        "\n  well-met            greet somebody\n" in run(elsewhere, "llmstack.py", "help").stdout
    )


def test_an_extra_is_found_in_the_zipapp(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (elsewhere / "LICENSE").write_text("")
    shutil.copy(ROOT / "llmstack.py", elsewhere)
    shutil.copytree(ROOT / "share", elsewhere / "share")
    monkeypatch.setattr(build_zipapp, "ROOT", str(elsewhere))
    build_zipapp.write(str(elsewhere / "x.pyz"), build_zipapp.build())
    done = run(elsewhere, "x.pyz", "well-met", "friend")
    assert (done.stdout, done.returncode) == ("well met, friend\n", 3), done.stderr
    assert "greet somebody" in run(elsewhere, "x.pyz", "help").stdout
    done = run(elsewhere, "x.pyz", "strat")
    assert done.stderr.splitlines()[0].endswith("did you mean start?")


@pytest.mark.parametrize("name", [name for name in LISTED if name not in BUILT_IN])
def test_a_copy_without_the_extras_says_where_they_are(name: str, elsewhere: Path) -> None:
    done = run(elsewhere, "llmstack.py", name)
    assert done.returncode == 2
    assert done.stderr == (
        f"llmstack: error: llmstack {name} is one of the extras, which this copy is without\n"
        "hint: copy extras/ beside llmstack.py, or use llmstack.pyz\n"
    )


def test_a_copy_without_the_extras_has_no_demo(elsewhere: Path) -> None:
    done = run(elsewhere, "llmstack.py", "start", "--demo")
    assert done.returncode == 2
    assert done.stderr.startswith("llmstack: error: llmstack demo is one of the extras, which")
    assert run(elsewhere, "llmstack.py", "stop", "--demo").returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strat"], "there is no command 'strat', did you mean start?"),
        (["well-mett"], "there is no command 'well-mett', did you mean well-met?"),
        (["../well_met"], "there is no command '../well_met', did you mean well-met?"),
        (["xyzzy"], "there is no command 'xyzzy'"),
        (["help", "strat"], "there is no command 'strat', did you mean start?"),
        (["start", "--prot", "1"], "llmstack start has no '--prot', did you mean --port?"),
        (["start", "--prot=1"], "llmstack start has no '--prot', did you mean --port?"),
        (["stop", "now"], "llmstack stop has no 'now'"),
        (["--versoin"], "there is no command '--versoin', did you mean version?"),
    ],
)
def test_a_slip_is_one_line_and_what_was_meant(
    words: list[str], said: str, elsewhere: Path
) -> None:
    done = run(elsewhere, "llmstack.py", *words)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "llmstack: error: " + said
    assert len(done.stderr.splitlines()) == 2


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    try:
        code = llmstack.main(words)
    except SystemExit as exc:  # argparse has printed it
        code = exc.code
    assert code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [*BUILT_IN, *EXTRAS])
def test_the_help_of_each_ends_with_two_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(capsys, "help", name)
    examples = text.partition("\nexamples:\n")[2].splitlines()
    assert len(examples) >= 2
    for line in examples:
        assert line.lstrip(" $").startswith("llmstack ") or f"| llmstack {name}" in line, line
    assert help_of(capsys, name, "--help").split() == text.split()


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_examples_of_a_command_are_command_lines(name: str) -> None:
    for line in llmstack.render_examples(f"llmstack {name}").splitlines()[2:]:
        words = line.partition("#")[0].partition(" | ")[0].partition(" <")[0].split()[1:]
        if "--help" not in words:
            llmstack.command_parser(words[0]).parse_args(words[1:])


# ---- the program as it was called


def hint(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.splitlines()[-1]


def test_hints_show_the_program_as_it_was_called(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = Path(sys.executable).name if sys.version_info >= (3, 10) else "python3"
    monkeypatch.setenv("PATH", "")
    done = run(elsewhere, "llmstack.py", "strat")
    assert hint(done) == f"hint: `{python} llmstack.py help` lists the commands"
    done = run(elsewhere.parent, "elsewhere with spaces/llmstack.py", "strat")
    assert f"`{python} 'elsewhere with spaces/llmstack.py' help`" in hint(done)
    assert "`llmstack" not in run(elsewhere, "llmstack.py", "status").stdout
    monkeypatch.setenv("LLMSTACK_ACTIVE", "1")
    assert "`llmstack help`" in hint(run(elsewhere, "llmstack.py", "strat"))


def test_hints_show_the_bare_name_where_it_is_on_the_path(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llmstack").write_text("#!/bin/sh\n")
    (tmp_path / "llmstack").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "`llmstack help`" in hint(run(elsewhere, "llmstack.py", "strat"))


def test_a_json_document_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "called_as", lambda: 'python "x"')
    assert llmstack.as_called("run `llmstack stop`") == 'run `python "x" stop`'
    assert llmstack.as_called('{"a": "run `llmstack stop`"}') == '{"a": "run `llmstack stop`"}'


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_under_the_hook_the_name_works(
    shell: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = shutil.which(shell)
    if not program:
        pytest.skip(f"there is no {shell}")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    hook = llmstack.write_hook(shell, str(home))
    done = subprocess.run(
        [program, "-c", f". {hook}; llmstack version"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    assert done.stdout == f"llmstack {llmstack.VERSION}\n", done.stderr


@pytest.mark.parametrize("words", [["run", "hello"], ["ps"], ["logs"]], ids=lambda words: words[0])
def test_the_demo_can_be_talked_to_and_looked_at(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`start --demo --detach` left no way to ask it anything but curl."""
    asked: list[bool] = []
    find = llmstack.find_places

    def finding(env: object, demo: bool = False) -> llmstack.Places:
        asked.append(demo)
        return find(os.environ, demo)

    monkeypatch.setattr(llmstack, "find_places", finding)
    llmstack.main([*words, "--demo"])
    assert asked[-1]


# ---- what an extra stands on


def loaded_extra(node: ast.expr) -> str:
    """NAME of `llmstack.load_extra("NAME")`, "" for anything else."""
    match = re.fullmatch(r"llmstack\.load_extra\('([a-z-]+)'\)", ast.unparse(node))
    return match.group(1) if match else ""


def names_used(function: ast.FunctionDef) -> set[tuple[str, str]]:
    """(extra, name) of what a function uses of an extra, ("", name) of what it uses of the program."""
    owners = {"llmstack": ""}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and loaded_extra(node.value):
            owners[ast.unparse(node.targets[0])] = loaded_extra(node.value)
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            owner = loaded_extra(node.value) or owners.get(ast.unparse(node.value))
            if owner is not None:
                found.add((owner, node.attr))
    return found


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_uses_public_names_that_are_there(name: str) -> None:
    tree = ast.parse((ROOT / llmstack.extra_file(name)).read_text(encoding="utf-8"))
    used = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            used |= names_used(function)
    for owner, word in sorted(used):
        module = llmstack.load_extra(owner) if owner else llmstack
        assert hasattr(module, word), (owner, word)
        assert not word.startswith("_"), (owner, word)
