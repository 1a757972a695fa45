"""Text from elsewhere never steers a terminal: not in a log, an error, a warning or an answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import llmstack

# C0, C1, DEL, marks of direction, line ends of Unicode's own, a lone surrogate, an invisible tag.
STEERING = "\x00\x07\x08\x1b\x7f\x9b\x9d\x90\u200e\u202e\u2066\u2028\u2029\ufeff\udc9b\U000e0001"
HOSTILE = f"a{STEERING}b\nllmstack: error: made up"


def test_every_character_of_unicode_is_shown_or_escaped() -> None:
    for start in range(0, sys.maxunicode, 0x1000):
        block = "".join(map(chr, range(start, start + 0x1000)))
        shown = llmstack.visible(block, sys.maxsize)
        assert shown.isprintable()
        if '"' not in block:
            assert json.loads(f'"{shown}"') == json.loads(json.dumps(block)), "nothing is lost"


def test_a_text_is_cut_where_it_is_too_long() -> None:
    assert llmstack.visible("x" * 301) == "x" * 300 + "..."
    assert llmstack.visible("x" * 300) == "x" * 300


def test_a_line_for_people_keeps_nothing_that_steers(capsys: pytest.CaptureFixture[str]) -> None:
    for write in (llmstack.say, llmstack.warn):
        write(f"x {HOSTILE}")
    shown = "".join(capsys.readouterr())
    assert all(line.isprintable() for line in shown.splitlines())
    assert "\\u009b" in shown


def test_json_for_programs_stays_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"path": HOSTILE, "name": "na\u00efve \u65e5\u672c"}
    llmstack.say(json.dumps(value, indent=2, ensure_ascii=False))
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.splitlines())
    assert "na\u00efve \u65e5\u672c" in out
    assert json.loads(out) == value


def test_our_colours_survive_and_end_with_their_line() -> None:
    text = "\x1b[32mup\x1b[0m \x1b[2J\x1b[8mx \x1b[31mleft open"
    assert llmstack.visible_colours(text) == (
        "\x1b[32mup\x1b[0m \\u001b[2J\\u001b[8mx \x1b[31mleft open\x1b[0m")
    assert llmstack.visible_colours("plain") == "plain"


def test_an_error_is_printable_whatever_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    Path(".llmstack").mkdir()
    Path(".llmstack/models.ini").write_bytes("[x\u202e\u009b31m]\nrole = \u0085\u2028z\n".encode())
    assert llmstack.main(["fit"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("llmstack: error: ")
    assert all(line.isprintable() for line in shown.split("\n"))


def test_a_log_holds_no_line_that_a_client_made_up(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    log = llmstack.Log(str(path))
    log.warning("GET /\x9b31m\x1b[2J\u2028\r -> 404")
    log.error("its last words:\n2026-01-01T00:00:00 ERROR made up")
    lines = path.read_bytes().decode().split("\n")
    assert all(line.isprintable() for line in lines)
    assert "GET /\\u009b31m\\u001b[2J" in lines[0]
    assert lines[2] == "    2026-01-01T00:00:00 ERROR made up"


def test_a_tail_shows_neither_c1_nor_escapes(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes("\x1b[1;31mred\x1b[0m \u009b31m \u202eturned\tand on\r\n".encode())
    assert llmstack.tail_of(str(path)).split() == ["red", "\\u009b31m", "\\u202eturned", "and", "on"]


def test_what_a_shell_evaluates_is_left_as_it_is() -> None:
    code = "import llmstack; llmstack._say_raw('cd \\x1b\\u202e \\udcff\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True,
                          cwd=str(Path(llmstack.__file__).parent))
    assert done.stdout == b"cd \x1b\xe2\x80\xae \xff\n"
