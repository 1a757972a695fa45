"""extras/cache.py: who broke the cache, from nothing but the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, List

import pytest

import llmstack


def turn(conversation: str = "abc1", **more: Any) -> str:
    """A line of the record, of a turn that had one before."""
    row = {"time": 1.5, "conversation": conversation, "tier": "code-smart", "same": 1.0,
           "differs": "", "held": 10_000, "client": "", "cached": 9_990, "wait_s": 0.0}
    return json.dumps({**row, **more}, separators=(",", ":"))


def write(*lines: str) -> None:
    path = Path(".llmstack/logs/decisions.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def cache(capsys: pytest.CaptureFixture[str], *words: str) -> List[Any]:
    assert llmstack.main(["cache", "--json", *words]) == 0
    found: List[Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(autouse=True)
def project() -> None:
    Path(".llmstack").mkdir()


def test_what_was_kept_is_told_by_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    write(turn(), turn(cached=0, wait_s=4.2), turn("def2", same=0.1, differs="message 3",
                                                   cached=1_000))
    first, second = cache(capsys)
    assert (first["conversation"], first["turns"]) == ("abc1", 2)
    assert first["kept_by_client"] == 1.0
    assert first["kept_by_server"] == pytest.approx(0.5, abs=0.01)
    assert (first["changes"], first["losses"]) == ({}, {"loaded anew": 1})
    assert second["kept_by_client"] == 0.1
    assert second["kept_by_server"] == 1.0, "the server has kept what the client left of it"
    assert (second["changes"], second["losses"]) == ({"message": 1}, {})


LOSSES = {
    "another tier": {"held": 0, "cached": 0, "left": {"tier": "code-fast", "tokens": 9_000,
                                                      "cost_s": 9.0}},
    "loaded anew": {"cached": 0, "wait_s": 2.0},
    "made room": {"cached": 0},
}


@pytest.mark.parametrize(("loss", "row"), LOSSES.items(), ids=LOSSES.keys())
def test_why_the_server_had_nothing(
        loss: str, row: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write(turn(**row))
    assert cache(capsys)[0]["losses"] == {loss: 1}


ADVICE = {
    "Claude Code's line": ("claude", "system text", "CLAUDE_CODE_ATTRIBUTION_HEADER=0"),
    "opencode's reminder": ("opencode", "message 7", "reminder"),
    "anybody's tools": ("codex", "tools", "MCP"),
}


@pytest.mark.parametrize(("client", "differs", "words"), ADVICE.values(), ids=ADVICE.keys())
def test_the_setting_that_stops_it_is_named(
        client: str, differs: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(turn(client=client, same=0.0, differs=differs, cached=0))
    (advice,) = cache(capsys)[0]["advice"]
    assert words in advice


def test_what_happens_once_in_a_while_is_no_habit(capsys: pytest.CaptureFixture[str]) -> None:
    write(*[turn(client="claude")] * 9, turn(client="claude", same=0, differs="system text"))
    assert cache(capsys)[0]["advice"] == []


def test_a_conversation_is_shown_turn_by_turn(capsys: pytest.CaptureFixture[str]) -> None:
    write(turn(), turn("def2", same=0.25, differs="message 3", cached=2_500))
    assert llmstack.main(["cache", "de"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("def2  code-smart, turns after its first: 1, the last at ")
    assert "  kept by the client 25%, by the server 100%\n" in out
    assert "10,000 tokens, client 25%, differs from message 3 on, server 100%" in out
    assert "abc1" not in out


def test_a_name_that_is_none_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    write(turn())
    assert llmstack.main(["cache", "zz\x1b[1m"]) == 1
    err = capsys.readouterr().err
    assert "no conversation zz" in err
    assert "\x1b" not in err


def test_no_record_and_an_empty_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["cache"]) == 1
    assert "decision_log" in capsys.readouterr().err
    write('{"conversation":"abc1","tier":"code-smart"}')
    assert llmstack.main(["cache"]) == 0
    assert "has had a second turn" in capsys.readouterr().out


HOSTILE = ["", '"same":', '{"same":1}', '{"same":[]}', '[1,"same":2]', '"same": ' + "[" * 100_000,
           turn(held="many"), turn(left=5), turn(cached=1e400), turn(time=None)]


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_a_line_that_is_none_is_passed_over(
        line: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(line, turn())
    assert [row["turns"] for row in cache(capsys)] == [1]


def test_text_of_a_record_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    write(turn("a\x1b[2J", tier="b\x1b[2J", differs="message \x1b[2J", same=0.5))
    assert llmstack.main(["cache", "a"]) == 0
    assert "\x1b" not in capsys.readouterr().out
