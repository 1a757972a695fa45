"""PROGRAMS: private environments, made once, by one process at a time, and made anew when their Python is gone."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest

import llmstack

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")


def quiet(line: str) -> None:
    pass


def make_environment(wanted: llmstack.PrivateEnvironment, data: str) -> Path:
    """An environment that looks finished, on a Python of its own below `data`."""
    directory = Path(llmstack.environment_dir(wanted, data))
    base = Path(data) / "base" / "python3.12"
    for folder in (base.parent, directory / "bin", directory / "lib" / "python3.12"):
        folder.mkdir(parents=True, exist_ok=True)
    base.write_text("#!/bin/sh\n")
    base.chmod(0o755)
    (directory / "bin" / "python").symlink_to(base)
    (directory / "pyvenv.cfg").write_text(f"home = {base.parent}\nversion = 3.12.1\n")
    (directory / "ready").write_text(wanted.version)
    return directory


def a_python(path: Path, wait_for: Path | None = None) -> Path:
    """A program that makes environments, once something can be read from `wait_for`, and notes each beside itself."""
    wait = f"read line < '{wait_for}'\n" if wait_for else ""
    path.write_text(f"#!/bin/sh\ncase \"$*\" in *--version) exit 1;; esac\necho made >> '{path}.log'\n{wait}mkdir -p \"$3/bin\"\n"
                    f"echo 'home = {path.parent}' > \"$3/pyvenv.cfg\"\n"
                    "printf '#!/bin/sh\\n' > \"$3/bin/python\"\nchmod 755 \"$3/bin/python\"\n")
    path.chmod(0o755)
    return path


def times_made(python: Path) -> int:
    return Path(f"{python}.log").read_text().count("made")


def test_an_environment_that_is_there_is_used_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_environment(llmstack.LLAMA_CPP, str(home))
    monkeypatch.setattr(llmstack, "suitable_python", lambda wanted: pytest.fail("not looked for"))
    llmstack.install_environment(llmstack.LLAMA_CPP, str(home), quiet)


def lose_interpreter(directory: Path, base: Path) -> None:
    """`brew upgrade python`, with the old one cleaned away."""
    (base / "python3.12").unlink()


def lose_home(directory: Path, base: Path) -> None:
    """As on Windows, where bin/python is a copy that looks for its library there."""
    (directory / "bin" / "python").unlink()
    shutil.move(base / "python3.12", directory / "bin" / "python")
    base.rmdir()


def become_newer(directory: Path, base: Path) -> None:
    """/usr/bin/python3 after a distribution's upgrade."""
    (base / "python3.12").rename(base / "python3.13")
    (base / "python3.12").symlink_to("python3.13")


@pytest.mark.parametrize("change", [lose_interpreter, lose_home, become_newer])
def test_an_environment_whose_python_is_gone_is_made_anew(change: object, home: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(home / "data")
    directory = make_environment(llmstack.LLAMA_CPP, data)
    assert llmstack.environment_ready(llmstack.LLAMA_CPP, data)
    change(directory, Path(data) / "base")  # type: ignore[operator]
    assert not llmstack.environment_ready(llmstack.LLAMA_CPP, data)
    monkeypatch.setattr(llmstack, "find_program", lambda *_: "")
    assert llmstack.find_llama_server(llmstack.Config(), {}, data) == (), "it would not start"
    python = a_python(tmp_path / "python")
    monkeypatch.setattr(llmstack, "suitable_python", lambda wanted: str(python))
    said: list[str] = []
    llmstack.install_environment(llmstack.LLAMA_CPP, data, said.append)
    assert said[0] == f"The Python that {directory} was made with is gone, so it is made anew"
    assert llmstack.environment_ready(llmstack.LLAMA_CPP, data)
    llmstack.install_environment(llmstack.LLAMA_CPP, data, quiet)
    assert times_made(python) == 1


def test_of_two_first_setups_one_installs_and_the_other_waits(home: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    data, gate = str(home / "data"), tmp_path / "gate"
    os.mkfifo(gate)
    python = a_python(tmp_path / "python", gate)
    monkeypatch.setattr(llmstack, "suitable_python", lambda wanted: str(python))
    waits, begun = threading.Event(), threading.Event()

    def say(line: str) -> None:
        if line.startswith("Another llmstack is installing"):
            waits.set()
        if line.startswith("Installing"):
            begun.set()

    setups = [threading.Thread(target=llmstack.install_environment, args=(llmstack.LLAMA_CPP, data, say)) for _ in "ab"]
    for setup in setups:
        setup.start()
    try:
        assert begun.wait(20)
        assert waits.wait(20)
    finally:
        gate.write_text("go on\n")
        for setup in setups:
            setup.join()
    assert times_made(python) == 1
    assert llmstack.environment_ready(llmstack.LLAMA_CPP, data)


def test_the_stand_in_needs_a_python_its_wheels_are_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "suitable_python", lambda wanted: "")
    with pytest.raises(llmstack.UserError, match=r"needs Python 3\.10") as failure:
        llmstack.install_environment(llmstack.LLAMA_CPP, str(home / "data"), quiet)
    assert failure.value.hint == "or install llama.cpp yourself"


def test_a_failed_installation_leaves_nothing_and_says_why(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho one; echo 'ERROR: no route to the index' >&2; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(llmstack, "suitable_python", lambda wanted: str(python))
    said: list[str] = []
    with pytest.raises(llmstack.UserError, match="no route to the index"):
        llmstack.install_environment(llmstack.LLAMA_CPP, str(home / "data"), said.append)
    assert not Path(llmstack.environment_dir(llmstack.LLAMA_CPP, str(home / "data"))).exists()
    assert "34 MB" in said[0]


def test_a_newer_python_is_found_for_an_old_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    newer = tmp_path / "python3.12"
    newer.write_text("#!/bin/sh\necho 12\n")
    newer.chmod(0o755)
    (tmp_path / "python3.14").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "python3.14").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(llmstack, "USUAL_PLACES", ())
    monkeypatch.setattr(llmstack.sys, "version_info", (3, 9, 18))
    assert llmstack.suitable_python(llmstack.LLAMA_CPP) == str(newer)


def test_a_wheel_is_taken_by_its_hash_alone(home: Path, tmp_path: Path) -> None:
    directory = str(tmp_path / "environment")
    words = llmstack._requirement_words(llmstack.LLAMA_CPP, directory)
    assert words[:2] == ["--no-deps", "--require-hashes"]
    lines = Path(words[-1]).read_text().split()
    assert lines[0] == f"xllamacpp=={llmstack.LLAMA_CPP_PIN}"
    assert len(lines) == 1 + len(llmstack.LLAMA_CPP.hashes) > 1
    assert all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", line) for line in lines[1:])
    assert llmstack._requirement_words(llmstack.LITELLM, directory) == [llmstack.LITELLM.requirement]


def test_an_environment_gets_no_pip_where_one_is_at_hand(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking it took 5 of the 6 s."""
    commands: list[list[str]] = []

    def run(what: str, command: list[str], say: object) -> None:
        commands.append(command)

    monkeypatch.setattr(llmstack, "run_with_progress", run)
    monkeypatch.setattr(llmstack, "suitable_python", lambda wanted: "/usr/bin/python3.12")
    data = str(home / "data")
    inside = llmstack.environment_program(llmstack.LITELLM, data)
    for pip in (["python3", "-m", "pip"], []):
        monkeypatch.setattr(llmstack, "outside_pip", lambda python, pip=pip: pip)
        commands.clear()
        llmstack.install_environment(llmstack.LITELLM, data, quiet)
        assert ("--without-pip" in commands[0]) is bool(pip)
        if pip:
            assert commands[1][:5] == [*pip, "--python", inside]
        else:
            assert commands[1][:3] == [inside, "-m", "pip"]
        assert commands[1][-1] == llmstack.LITELLM.requirement
        shutil.rmtree(data)


@pytest.mark.parametrize(("said", "there"), [
    ("pip 23.2.1 from /usr/lib", True), ("pip 22.3 from /usr/lib", True), ("pip 22.0.2 from /usr/lib", False),
    ("pip 9.0.3", False), ("", False), ("no pip", False)])
def test_only_a_pip_that_installs_elsewhere_is_taken(said: str, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "program_output", lambda command: said)
    expected = ["/usr/bin/python3", "-I", "-m", "pip"] if there else []
    assert llmstack.outside_pip("/usr/bin/python3") == expected
