"""STATUS: what people read, at 40, 80 and 200 columns, and that no router's word breaks it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import llmstack

GOLDEN = Path(__file__).parent / "golden"
GB = 10**9
NOW_S = 1_000_000.0
URL = "http://127.0.0.1:10101"
LOG = "/home/me/project/.llmstack/logs/plan-uncensored.log"


def plain(text: str, _colour: str) -> str:
    return text


def tier(name: str, role: str, ctx_size: int, state: str, size_gb: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "role": role, "backend": "gguf", "ctx_size": ctx_size, "state": state,
            "reason": "", "bytes": round(size_gb * GB), "per_s": 0.0, "since": NOW_S - 400, **more}


def under_way(name: str, stage: str, age_s: float) -> dict[str, Any]:
    return {"id": 1, "model": "auto", "tier": name, "stage": stage, "began": NOW_S - age_s}


SNAPSHOT: dict[str, Any] = {
    "about": {"changed": True, "local_only": False},
    "memory": {"budget": 56 * GB, "resident": round(52.4 * GB)},
    "tiers": [
        tier("code-fast", "fast", 131_072, "loaded", 5.6, per_s=81.2),
        tier("code-smart", "agent", 65_536, "loading", 49.9, since=NOW_S - 14, share=0.62),
        tier("plan", "plan", 65_536, "not here", 9.2, reason="llmstack download plan"),
        tier("plan-uncensored", "plan-uncensored", 32_768, "failed to load", 9.2, since=NOW_S - 8,
             reason=f"the file is cut short ({LOG})"),
        tier("code-ultra", "ultra", 200_000, "no credential", 0, reason="missing ANTHROPIC_API_KEY")],
    "requests": [under_way("code-fast", "writing", 3), under_way("code-fast", "reading the prompt", 1),
                 under_way("code-smart", "loading code-smart", 14)],
    "downloads": [{"tier": "plan", "label": "current", "state": "running", "bytes": 3 * GB,
                   "total_bytes": round(9.2 * GB), "error": ""}],
    "decisions": [{"rung": "high", "tier": "code-fast", "truth": 35_000, "cached": 31_200, "tokens": 34_000,
                   "ended": "done", "total_s": 2.1, "time": NOW_S - 4}],
}


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_status_at_a_terminal_s_width(width: int) -> None:
    lines = llmstack.render_snapshot(SNAPSHOT, URL, width, NOW_S, plain)
    path = GOLDEN / f"status-{width}.txt"
    shown = "\n".join(lines) + "\n"
    assert shown == path.read_text(encoding="utf-8")
    long = [line for line in lines if len(line) > width]
    assert [line for line in long if LOG not in line] == []


def test_colours_take_no_room() -> None:
    def red(text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m"

    for width in (40, 80, 200):
        plainly = llmstack.render_snapshot(SNAPSHOT, URL, width, NOW_S, plain)
        coloured = llmstack.render_snapshot(SNAPSHOT, URL, width, NOW_S, red)
        assert [llmstack._COLOUR.sub("", line) for line in coloured] == plainly


WRONG: list[Any] = [None, 7, -1, "x\x1b[2J", [], {}, [None], ["x"], True, 1e300, float("nan"), {"a": []}]


@pytest.mark.parametrize("key", list(SNAPSHOT))
def test_no_word_of_a_router_breaks_the_status(key: str) -> None:
    for wrong in WRONG:
        shown = llmstack.render_snapshot({**SNAPSHOT, key: wrong}, URL, 80, NOW_S, plain)
        assert all(line.isprintable() for line in shown)
    inner = SNAPSHOT[key][0] if isinstance(SNAPSHOT[key], list) else SNAPSHOT[key]
    for name in inner:
        for wrong in WRONG:
            broken: Any = {**inner, name: wrong}
            if isinstance(SNAPSHOT[key], list):
                broken = [broken]
            shown = llmstack.render_snapshot({**SNAPSHOT, key: broken}, URL, 80, NOW_S, plain)
            assert all(line.isprintable() for line in shown)


@pytest.mark.parametrize(("said", "words"), [
    ("plan: its server exited with 1 while loading:\nmodel is corrupted or incomplete", "the file is cut short"),
    ("plan: there is no /x.gguf", "the file is not there"),
    ("plan: something new:\nmore", "plan: something new"),
])
def test_a_failure_says_its_reason_in_words(said: str, words: str) -> None:
    assert llmstack.load_failure_words(said) == words


def test_a_missing_file_that_no_hub_has_is_not_to_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".llmstack").mkdir()
    (tmp_path / ".llmstack" / "models.ini").write_text(
        "[own]\nrole = fast\npath = gone.gguf\n[theirs]\nrole = agent\nhf_repo = o/n\nhf_file = f.gguf\n")
    llmstack.main(["status"])
    out = capsys.readouterr().out
    assert re.search(r"own .*not here.* there is no .*gone\.gguf", out)
    assert re.search(r"theirs .*not here.* llmstack download theirs", out)
