"""`why` and `check` as people read them: a sentence and a table each, and a line of what to do."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import llmstack
from tests.test_engine import OpenStage, Stage, message_of, open_stage, stage

__all__ = ["OpenStage", "open_stage", "stage"]  # fixtures

CHECK = llmstack.load_extra("check")
GOLDEN = Path(__file__).parent / "golden"
LADDER = """
[code-fast]
role = fast
path = fast.gguf
ctx_size = 131072
[code-smart]
role = agent
path = smart.gguf
ctx_size = 65536
[code-ultra]
role = ultra
base_url = http://127.0.0.1:9/v1
model = some-model
ctx_size = 24000
[plan]
role = plan
path = plan.gguf
"""


def plain(text: str, _colour: str) -> str:
    return text


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".llmstack").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_ini(project: Path, text: str) -> None:
    (project / ".llmstack" / "models.ini").write_text(text)


def why(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert llmstack.main(["why", *words]) == 0
    return capsys.readouterr().out.splitlines()


def body(project: Path, **more: Any) -> str:
    messages = more.pop("messages", [{"role": "user", "content": "hi"}])
    (project / "request.json").write_text(json.dumps({"model": "auto", "messages": messages, **more}))
    return "request.json"


def said(tokens: int, turns: int = 1) -> list[dict[str, str]]:
    return [{"role": "user", "content": "x" * (4 * tokens // turns)}] * turns


def test_why_takes_plain_words(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ini(project, "[mine]\nrole = agent\npath = mine.gguf\nctx_size = 32768\n")
    for words in (["hello"], ["why is the sky blue?"], ["why", "is", "the", "sky", "blue?"],
                  ["this and/or that"]):
        first = why(capsys, *words)[0]
        assert first.startswith("mine. Short prompt (")
        assert first.endswith("of 12,000 tokens): the best tier you have")
    assert why(capsys, "hi")[0] == "mine. Short prompt (1 of 12,000 tokens): the best tier you have"


@pytest.mark.parametrize(("request_of", "sentence"), [
    ({"messages": said(13_240)}, "code-smart. Longer prompt (13,240 of 32,000 tokens): the heavy coder"),
    ({"messages": said(40_000, 10)},
     "code-smart. Long prompt (40,000 tokens) in a long conversation (10 turns): the heavy coder goes on"),
    ({"messages": said(40_000)},
     "code-fast. Long prompt (40,000 tokens, more than 32,000): the tier with the long window"),
    ({"messages": [{"role": "user", "content": "[opus] hi"}]},
     "code-ultra. [opus] is in the prompt: the best tier you have"),
    ({"messages": said(11_999), "max_tokens": 20_000},
     "code-ultra. Short prompt (11,999 of 12,000 tokens): the best tier you have"),
    ({"messages": said(200_000)}, "code-fast. Long prompt (200,000 tokens, more than 32,000)."
                                  " No tier holds 163,424 tokens (estimated); this one has the largest context"),
    ({"model": "plan"}, "plan. Asked for by name"),
    ({"model": "gpt-4o"}, "code-ultra. gpt-4o is auto here."
                          " Short prompt (1 of 12,000 tokens): the best tier you have"),
])
def test_why_says_each_rung_in_a_sentence(request_of: dict[str, Any], sentence: str, project: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    write_ini(project, LADDER)
    assert why(capsys, body(project, **request_of))[0] == sentence


def test_why_says_what_a_better_tier_lacks(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ini(project, LADDER.replace("127.0.0.1:9", "example.com").replace(
        "model = some-model", "model = some-model\napi_key_env = NO_SUCH_KEY"))
    assert why(capsys, "hi")[0] == ("code-smart. Short prompt (1 of 12,000 tokens), for code-ultra."
                                    " But code-ultra is left alone for now: NO_SUCH_KEY is not set")


def test_why_says_that_a_role_is_missing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_ini(project, "[mine]\nrole = fast\npath = mine.gguf\nctx_size = 32768\n")
    request = body(project, messages=said(13_240))
    assert why(capsys, request)[0] == ("mine. Longer prompt (13,240 of 32,000 tokens):"
                                       " there is no agent tier here")


def test_why_shows_the_ladder_with_what_was_passed_over(project: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    write_ini(project, LADDER)
    assert why(capsys, body(project, messages=said(13_240)))[1:] == [
        "",
        "   code-ultra  ultra   24k  13,240 tokens > 12,000 and no trigger",
        "\u2192  code-smart  agent   64k  taken",
        "   code-fast   fast   128k  below the tier taken",
        "   plan        plan    32k  role plan is never auto-routed; ask for it by name",
        "Nearest change: 1,240 fewer tokens \u2192 code-ultra",
    ]
    assert len(why(capsys, body(project, model="plan"))) == 1


@pytest.mark.parametrize("words", [["gone.json"], ["gone/request"], ["--path", "/v1/embeddings", "hello"]])
def test_why_takes_no_file_name_for_words(words: list[str], project: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    write_ini(project, LADDER)
    assert llmstack.main(["why", *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


# ---- check


def file_row(file: str, size: int, local: str, problem: str = "") -> dict[str, Any]:
    return {"repo": "owner/repo", "url": "https://hub.example/owner/repo", "file": file, "quant": "",
            "exists": True, "size_bytes": size, "changed": "2026-05-04", "local": local,
            "problem": problem}


def tier_row(name: str, role: str, **more: Any) -> dict[str, Any]:
    return {"tier": name, "role": role, "backend": "gguf", "drift": [], **more}


FOUND: dict[str, Any] = {
    "ok": False,
    "llama_server": "/usr/bin/llama-server",
    "llama_swap": None,
    "tiers": [
        tier_row("code-fast", "fast", current=file_row("fast-Q4_K_M.gguf", 5_600_000_000, "intact"),
                 next=file_row("fast-Q6_K.gguf", 7_000_000_000, "missing"),
                 drift=["fast-Q4_0.gguf is running, models.ini has fast-Q4_K_M.gguf"]),
        tier_row("code-smart", "agent", current=file_row("smart-Q4_K_M.gguf", 49_900_000_000, "missing")),
        tier_row("plan", "plan", current=file_row(
            "plan-Q4_K_M.gguf", 9_200_000_000, "damaged",
            "the local copy is damaged: it has 9,100,000,000 bytes, the hub's has 9,200,000,000")),
        {"tier": "code-ultra", "role": "ultra", "backend": "litellm", "drift": [],
         "model": "anthropic/some-model", "model_next": None, "problem": "missing ANTHROPIC_API_KEY"},
    ],
    "todo": "`llmstack download code-smart` (49.9 GB), then `llmstack restart`, then mend plan, code-ultra",
}


@pytest.mark.parametrize("width", [40, 80, 200])
def test_check_at_a_terminal_s_width(width: int) -> None:
    lines = CHECK.render_check(FOUND, width, plain, False, llmstack)
    shown = "\n".join(lines) + "\n"
    assert shown == (GOLDEN / f"check-{width}.txt").read_text(encoding="utf-8")
    assert [line for line in lines if len(line) > width] == []


def test_check_of_a_tier_says_where_its_files_come_from() -> None:
    lines = CHECK.render_check({**FOUND, "tiers": FOUND["tiers"][:1]}, 200, plain, True, llmstack)
    assert "current   https://hub.example/owner/repo fast-Q4_K_M.gguf, changed 2026-05-04" in lines
    assert "next      https://hub.example/owner/repo fast-Q6_K.gguf, changed 2026-05-04" in lines


def test_check_takes_names_and_refuses_wrong_ones(project: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLAMA_SERVER_BIN", "/bin/true")
    write_ini(project, "[a]\npath = a.gguf\nrole = fast\naliases = coder\n[b]\npath = b.gguf\n")
    assert llmstack.main(["check", "--offline", "--json", "coder"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [row["tier"] for row in found["tiers"]] == ["a"]
    assert all(need.startswith("a ") for need in found["needs"])
    assert llmstack.main(["check", "--offline", "c"]) == 2
    assert "there is no tier 'c'" in capsys.readouterr().err


def test_check_says_in_one_line_what_to_do(project: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "find_llama_server", lambda config, env, data: ())
    write_ini(project, "[a]\nhf_repo = o/n\nhf_file = a.gguf\n[b]\nhf_repo = o/n\nhf_file = b.gguf\n"
                       "[c]\npath = gone.gguf\n")
    monkeypatch.setattr(llmstack, "called_as", lambda: "llmstack")
    assert llmstack.main(["check", "--offline"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        "To do: `llmstack setup`, then `llmstack download a b`, then mend c.")


def test_check_has_nothing_to_do(project: Path, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLAMA_SERVER_BIN", "/bin/true")
    write_ini(project, "[ultra]\nrole = ultra\nbase_url = http://127.0.0.1:9/v1\nmodel = some-model\n"
                       "model_next = other-model\n")
    assert llmstack.main(["check", "--offline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ultra  ultra  some-model  served  queued: other-model"
    assert lines[-1] == "All is as it should be."


# ---- lines that read badly


@pytest.mark.parametrize(("said", "words", "hint"), [
    ("cut: its server exited with 1 while loading:\n0.1 E data is not within the file bounds\nmore",
     "cut failed to load: the file is cut short", "see `llmstack logs cut`"),
    ("gone is not downloaded (49.0 GB): llmstack download gone",
     "gone is not downloaded (49.0 GB): llmstack download gone", "see `llmstack status`, or the router's log"),
])
def test_run_shows_no_log_of_a_server(said: str, words: str, hint: str) -> None:
    error = llmstack.load_extra("run").refused(said, llmstack)
    assert (str(error), error.hint) == (words, hint)


def test_without_a_hub_download_installs_nothing(project: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(llmstack, "environment_ready", lambda *_: False)
    monkeypatch.setattr(llmstack, "install_environment", lambda *_: pytest.fail("installed for nothing"))
    write_ini(project, "[a]\nhf_repo = o/n\nhf_file = a.gguf\n")
    assert llmstack.main(["download"]) == 1
    assert "the model hub cannot be reached at http://127.0.0.1:9" in capsys.readouterr().err


def test_a_long_command_is_a_line_rewritten_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """It said a line every 3 s."""
    written = io.StringIO()
    said: list[str] = []
    monkeypatch.setattr(llmstack, "live_terminal", lambda: written)
    ends = llmstack._ends_within
    looks = itertools.count()
    monkeypatch.setattr(llmstack, "_ends_within",
                        lambda process, seconds: next(looks) > 1 and ends(process, 60))
    assert llmstack.run_with_progress("a step", [sys.executable, "-c", "input"], said.append) is None
    assert re.search(r"\r  a step: \d+ s", written.getvalue())
    assert len(said) == 1
    assert said[0].startswith("  a step: done in ")


def test_a_model_that_is_not_here_says_so_and_what_brings_it(stage: Stage) -> None:
    """Twelve lines of llama-server's log were the answer."""
    stage.engine._is_here = lambda model: False             # type: ignore[method-assign]
    stage.put("code-smart.fail", "twelve lines of a log")
    status, answer = stage.call().chat("code-smart").answer()
    assert status == 500
    assert message_of(answer) == "code-smart is not downloaded (45.0 GB): llmstack download code-smart"
    row = stage.engine.watched()["models"]["code-smart"]
    assert (row["state"], row["reason"]) == ("not here", "llmstack download code-smart")


def test_fit_within_60_columns() -> None:
    machine = llmstack.Machine(19.0, "75% of 25.3 GB of memory", gpu=False)
    memory = llmstack.Memory(2_100_000_000, 1_200_000_000, 0, 300_000_000, cache=70_000_000)
    fits = [
        llmstack.TierFit("code-fast", "local", "", 3.67, True, 131_072, 131_072, memory, cache_mib=8_192),
        llmstack.TierFit("code-smart", "size_gb", "", 49.9, False, 65_536,
                         note="the model hub cannot be reached at hub.example: Name or service not known"),
    ]
    sets = [{"tiers": ("code-fast", "code-smart"), "need_gb": 53.57, "fits": False},
            {"tiers": ("code-fast",), "need_gb": 3.67, "fits": True}]
    fit = llmstack.load_extra("fit")
    lines = fit.fit_lines(machine, [], fits, sets, llmstack)
    shown = "".join(line + "\n" for line in lines)
    assert shown == (GOLDEN / "fit-60.txt").read_text(encoding="utf-8")
    assert max(map(len, shown.splitlines())) <= fit.COLUMNS
