"""Drafting that proves itself, refused settings, and what `status` says of both."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import llmstack
from llmstack import Drafting
from tests.noise_model import render_noise_gguf

TRIAL = llmstack.DRAFT_TRIAL_TOKENS


def row(output: int, per_s: float, **more: Any) -> dict[str, Any]:
    return {"tier": "a", "ended": "done", "output": output, "per_s": per_s, **more}


@pytest.mark.parametrize(("found", "drafts", "settled"), [
    (Drafting(), True, False),
    (Drafting(with_tokens=TRIAL - 1, with_ms=1000), True, False),
    (Drafting(with_tokens=TRIAL, with_ms=1000), False, False),
    (Drafting(TRIAL, 1000, TRIAL - 1, 1000), False, False),
    (Drafting(TRIAL, 1000, TRIAL, 1001), True, True),
    (Drafting(TRIAL, 1001, TRIAL, 1000), False, True),
    (Drafting(TRIAL, 1000, TRIAL, 1000), False, True),
])
def test_first_with_then_without_then_what_was_faster(found: Drafting, drafts: bool, settled: bool) -> None:
    assert (found.drafts_next, found.settled) == (drafts, settled)


def test_an_answer_is_added_to_what_ran() -> None:
    found = Drafting().learn(True, row(100, 50.0, drafted=80, accepted=60)).learn(False, row(30, 10.0))
    assert found == Drafting(100, 2000, 30, 3000, 80, 60)
    assert llmstack.drafting_words(found, True) == (
        "drafts, 75% of 80 drafted tokens were taken, 50.0 tok/s with drafts, 10.0 without")
    assert llmstack.drafting_words(Drafting(TRIAL, 1000), True).endswith("its next load goes without, to compare")
    assert llmstack.drafting_words(Drafting(TRIAL, 1000, TRIAL, 999), False).endswith("the faster is kept")


def test_the_counts_of_an_answer_tell_of_drafts() -> None:
    said = b'"timings":{"prompt_n":5,"predicted_n":9,"predicted_per_second":7.5,"draft_n":8,"draft_n_accepted":6}'
    counts = llmstack.tokens_said(said)
    assert (counts.drafted, counts.accepted, counts.output) == (8, 6, 9)
    assert llmstack.tokens_said(b'"predicted_n":9').drafted == 0


# ---- at a load


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> llmstack.Places:
    Path("noise.gguf").write_bytes(render_noise_gguf())
    Path(".llmstack").mkdir()
    monkeypatch.setenv("LLAMA_SERVER_BIN", sys.executable)
    monkeypatch.setattr(llmstack, "probe_flags", lambda *_: frozenset())
    return llmstack.find_places(os.environ)


def configured(places: llmstack.Places, *lines: str) -> llmstack.Config:
    Path(places.models_ini).write_text("\n".join(("[a]", "role = fast", "path = ../noise.gguf", *lines)) + "\n")
    return llmstack.load_config(places)


def open_drafts(places: llmstack.Places) -> llmstack.Drafts:
    return llmstack.Drafts(places.data, llmstack.Log("", "error"))


def loaded_words(places: llmstack.Places, config: llmstack.Config, drafts: llmstack.Drafts) -> list[str]:
    """The command line of the next load, by the embedded engine."""
    log = llmstack.Log("", "error")
    app = llmstack._embedded_app(places, config, log, drafts)
    return app.engine._command(config.tiers[0], 1)


def test_the_embedded_engine_loads_what_is_to_be_measured(places: llmstack.Places) -> None:
    config = configured(places, "draft = ../noise.gguf")
    drafts = open_drafts(places)
    assert "draft-simple" in loaded_words(places, config, drafts)
    drafts.hear(row(TRIAL, 20.0, drafted=10, accepted=1))
    assert "its next load goes without" in drafts.said()["a"]
    words = loaded_words(places, config, drafts)
    assert "-md" not in words
    assert "--spec-type" not in words
    drafts.hear(row(TRIAL, 30.0))
    drafts = open_drafts(places)                # the next daemon
    assert "-md" not in loaded_words(places, config, drafts)
    assert drafts.said()["a"].startswith("does not draft, 10% of 10 drafted tokens were taken, 20.0 tok/s with")
    drafts.hear(row(TRIAL, 1.0))
    assert "30.0 without" in drafts.said()["a"], "it is settled"
    other = configured(places, "draft = ../noise.gguf", "ctx_size = 2048")
    assert "-md" in loaded_words(places, other, drafts), "of other flags nothing is known"


@pytest.mark.parametrize("lines", [(), ("speculative = ngram",), ("draft = ../noise.gguf", "speculative = off"),
                                   ("speculative = auto",)])
def test_what_was_asked_for_is_never_taken_back(lines: tuple[str, ...], places: llmstack.Places) -> None:
    config = configured(places, *lines)
    drafts = open_drafts(places)
    before = loaded_words(places, config, drafts)
    drafts.hear(row(TRIAL, 20.0))
    assert loaded_words(places, config, drafts) == before
    assert drafts.said() == {}


def test_llama_swap_is_told_the_same(places: llmstack.Places) -> None:
    config = configured(places, "draft = ../noise.gguf")
    drafts, path = open_drafts(places), Path("swap.yaml")
    llmstack.write_swap_yaml(places, config, None, str(path), drafts)
    assert "draft-simple" in path.read_text()
    drafts.hear(row(TRIAL, 20.0))
    llmstack.write_swap_yaml(places, config, None, str(path), drafts)
    assert "noise.gguf" in path.read_text()
    assert "-md" not in path.read_text()


@pytest.mark.parametrize("text", ["[]", "{", '{"x": 3, "y": [1]}'])
def test_a_damaged_record_is_none(text: str, places: llmstack.Places) -> None:
    Path(places.data).mkdir(parents=True)
    Path(places.data, "drafting.json").write_text(text)
    drafts = open_drafts(places)
    assert "-md" in loaded_words(places, configured(places, "draft = ../noise.gguf"), drafts)
    drafts.hear(row(5, 20.0))
    drafts.hear({"tier": "b", "ended": "done"})
    drafts.hear(row(0, 0.0))
    assert "20.0 tok/s" in drafts.said()["a"]


def test_events_are_heard() -> None:
    events, heard = llmstack.Events(), []       # type: Any, list[Any]
    events.hearers.append(heard.append)
    said = {"time": 1.0, "path": "/v1/chat/completions", "tier": "a", "rung": "explicit", "ended": "done",
            "stream": False, "status": 200, "wait_s": 0.0, "first_byte_s": 0.1, "total_s": 0.2,
            "truth": 5, "tokens": 5, "cached": 0, "output": 3}
    events.add(said)
    assert heard == [said]


def test_a_probe_needs_no_restart() -> None:
    """The router compares what it has started with; what clients are told of tools is no part of that."""
    tier = llmstack.Tier("a", tool_call=True)
    assert llmstack.as_loaded(tier) == llmstack.as_loaded(tier._replace(tool_call=False, reasoning=True))
    assert llmstack.as_loaded(tier) != llmstack.as_loaded(tier._replace(ctx_size=1))


# ---- what a build does not know


def test_check_and_status_name_what_counts_nothing(
    places: llmstack.Places, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configured(places, "n_cpu_moe = 3", "parallel = 2", "mmproj = ../d/eyes.gguf")
    llmstack.trust_project(places, "run")
    monkeypatch.setattr(llmstack, "probe_flags", lambda *_: frozenset({"--n-cpu-moe"}))
    llmstack.main(["check", "--offline", "--json"])
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes == ["[a] n_cpu_moe: this llama-server refuses --n-cpu-moe 3"]
    llmstack.main(["check", "--offline"])
    assert notes[0] in capsys.readouterr().err
    llmstack.main(["status", "--json"])
    assert json.loads(capsys.readouterr().out)["tiers"][0]["settings"] == "n_cpu_moe 3, parallel 2, mmproj eyes.gguf"
    llmstack.main(["status"])
    assert "a: n_cpu_moe 3, parallel 2, mmproj eyes.gguf" in capsys.readouterr().out


def test_llama_swaps_daemon_logs_it(places: llmstack.Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = configured(places, "n_cpu_moe = 3")
    monkeypatch.setattr(llmstack, "probe_flags", lambda *_: frozenset({"--n-cpu-moe"}))
    monkeypatch.setattr(llmstack, "find_llama_swap", lambda *_: sys.executable)
    log = llmstack.Log(str(tmp_path / "log"), "info")
    llmstack._swap_app(places, config, log, open_drafts(places))
    log.flush()
    assert "[a] n_cpu_moe: this llama-server refuses --n-cpu-moe 3" in (tmp_path / "log").read_text()
