"""extras/config.py: one value changed and no other byte; nothing that does not hold gets in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import llmstack

INI = Path(".llmstack/models.ini")
TEXT = """\
# mine
[DEFAULT]
router_port = 10111
engine=embedded   ; no swap here

[code-fast]
role = fast
path = /fast.gguf ; a link
ctx_size : 8k
description =

# the end
[code-smart]
role = agent
path = /smart.gguf"""


@pytest.fixture(autouse=True)
def ini() -> None:
    INI.parent.mkdir()
    INI.write_bytes(TEXT.encode())


def config(*words: str) -> int:
    return llmstack.main(["config", *words])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("router_port", "10111"),
        ("DEFAULT.router_port", "10111"),
        ("engine", "embedded"),
        ("engine_port", "10102"),
        ("decision_log", "yes"),
        ("ROUTING.multi_turn", "10"),
        ("ultra_triggers", "[ultra], [opus], ultra:, opus:"),
        ("code-fast.ctx_size", "8k"),
        ("code-smart.ctx_size", "32768"),
        ("fast.role", "fast"),
        ("code-fast.description", ""),
        ("code-fast.path", "/fast.gguf"),
    ],
)
def test_what_is_in_effect(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert config("get", name) == 0
    assert capsys.readouterr().out == value + "\n"


@pytest.mark.parametrize(
    ("name", "value", "old", "new"),
    [
        ("router_port", "10222", "router_port = 10111\n", "router_port = 10222\n"),
        ("engine", "auto", "engine=embedded   ; no", "engine=auto   ; no"),
        ("code-fast.ctx_size", "16k", "ctx_size : 8k\n", "ctx_size : 16k\n"),
        ("code-fast.path", "/a b.gguf", "/fast.gguf ; a link", "/a b.gguf ; a link"),
        (
            "code-fast.description",
            "quick = good",
            "description =\n",
            "description = quick = good\n",
        ),
        ("code-fast.ttl", "0", "description =\n", "description =\nttl = 0\n"),
        ("engine_port", "10333", "swap here\n", "swap here\nengine_port = 10333\n"),
        ("code-smart.ttl", "0", "/smart.gguf", "/smart.gguf\nttl = 0"),
        ("multi_turn", "5", "/smart.gguf", "/smart.gguf\n\n[ROUTING]\nmulti_turn = 5\n"),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_one_line_and_no_other_byte(name: str, value: str, old: str, new: str, ending: str) -> None:
    INI.write_bytes(TEXT.replace("\n", ending).encode("utf-8-sig"))
    assert config("set", name, value) == 0
    assert TEXT.count(old) == 1
    assert INI.read_bytes().decode("utf-8-sig").replace(ending, "\n") == TEXT.replace(old, new)
    assert INI.read_bytes().startswith(b"\xef\xbb\xbf")
    assert (b"\n" in INI.read_bytes().replace(b"\r\n", b"")) is (ending == "\n")
    assert config("get", name) == 0


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("router_prot", "1", "models.ini knows no 'router_prot', did you mean router_port?"),
        (
            "code-fats.ctx_size",
            "8k",
            "models.ini knows no 'code-fats.ctx_size', did you mean code-fast.ctx_size?",
        ),
        ("ctx_size", "8k", "models.ini knows no 'ctx_size'"),
        (
            "router_port",
            "many",
            ".llmstack/models.ini:3: router_port: 'many' is not a whole number",
        ),
        (
            "code-fast.description",
            "one\ntwo = 2",
            "'one\\ntwo = 2' is no value that one line can hold",
        ),
        ("code-fast.description", "one ; two", "'one ; two' is no value that one line can hold"),
        ("code-fast.description", "\x1b[2J", "control character"),
        ("engine_port", "10111", "router_port and engine_port are both 10111"),
    ],
)
def test_what_does_not_hold_is_not_written(
    name: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert config("set", name, value) == 2
    err = capsys.readouterr().err
    assert said.replace(".llmstack", str(INI.parent.resolve())) in err or said in err
    assert "Traceback" not in err
    assert INI.read_text() == TEXT


def test_the_same_value_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert config("set", "router_port", "10111") == 0
    assert capsys.readouterr().out == "router_port is 10111 already.\n"


@pytest.mark.parametrize(
    "words", [["get"], ["set", "router_port"], ["edit", "x"], ["sett", "a", "b"], []]
)
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert config(*words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    INI.unlink()
    assert config("get", "router_port") == 0
    assert config("set", "router_port", "1") == 1
    assert "`llmstack install` writes one" in capsys.readouterr().err


def test_a_link_stays_a_link_and_a_mode_a_mode(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.ini"
    target.write_text(TEXT)
    target.chmod(0o640)
    INI.unlink()
    INI.symlink_to(target)
    assert config("set", "router_port", "10222") == 0
    assert INI.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640


def test_what_was_trusted_stays_so() -> None:
    places = llmstack.find_places(os.environ)
    assert config("set", "code-fast.path", "/other.gguf") == 0
    assert not llmstack.is_trusted(places, "run")
    llmstack.trust_project(places, "run")
    assert config("set", "code-fast.path", "/third.gguf") == 0
    assert llmstack.is_trusted(places, "run")


# ---- edit


def use_editor(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    script = Path("editor with spaces.py").resolve()
    script.write_text(
        "import sys, pathlib\npath = pathlib.Path(sys.argv[1])\ntext = path.read_text()\n" + code
    )
    monkeypatch.setenv("EDITOR", f"{sys.executable} '{script}'")


def left() -> list[str]:
    return sorted(path.name for path in INI.parent.iterdir() if path.is_file())


def test_an_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    use_editor(monkeypatch, "path.write_text(text.replace('8k', '16k'))")
    assert config("edit") == 0
    assert INI.read_text() == TEXT.replace("8k", "16k")
    assert left() == ["models.ini"]


def test_an_edit_of_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_editor(monkeypatch, "")
    assert config("edit") == 0
    assert capsys.readouterr().out == "Nothing has changed.\n"
    assert left() == ["models.ini"]


def test_a_broken_file_is_not_let_in_and_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_editor(monkeypatch, "path.write_text(text.replace('8k', 'much'))")
    assert config("edit") == 2
    out, err = capsys.readouterr()
    assert "models.ini:9: ctx_size: 'much' is not a number of tokens" in out
    kept = next(name for name in left() if name != "models.ini")
    assert kept in err
    assert (INI.parent / kept).read_text() == TEXT.replace("8k", "much")
    assert INI.read_text() == TEXT


def test_it_can_be_mended_in_a_second_go(monkeypatch: pytest.MonkeyPatch) -> None:
    use_editor(
        monkeypatch,
        "old, new = ('much', '16k') if 'much' in text else ('8k', 'much')\n"
        "path.write_text(text.replace(old, new))",
    )
    monkeypatch.setattr(llmstack, "ask_person", lambda question: True)
    assert config("edit") == 0
    assert INI.read_text() == TEXT.replace("8k", "16k")


def test_somebody_elses_change_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_editor(
        monkeypatch,
        f"path.write_text(text + '\\n')\nopen({str(INI.resolve())!r}, 'a').write('\\n\\n')",
    )
    assert config("edit") == 1
    assert "changed by somebody else" in capsys.readouterr().err
    assert INI.read_text() == TEXT + "\n\n"


@pytest.mark.parametrize(
    ("editor", "said"),
    [
        ("/no/such/editor", "cannot run /no/such/editor: No such file"),
        ("false", "false has failed, with exit code 1"),
        ("vi '", "is no command line"),
    ],
)
def test_an_editor_that_does_not_run(
    editor: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDITOR", editor)
    assert config("edit") in (1, 2)
    assert said in capsys.readouterr().err
    assert INI.read_text() == TEXT
