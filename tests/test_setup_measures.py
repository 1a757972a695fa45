"""setup's offer to measure what the tiers can do: who is asked, and who goes by it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

import llmstack
from tests.noise_model import render_noise_gguf

SETUP = llmstack.load_extra("setup")


@pytest.fixture
def places() -> llmstack.Places:
    """A project with one tier whose model is here, and one whose is not."""
    Path("noise.gguf").write_bytes(render_noise_gguf())
    Path(".llmstack").mkdir()
    found = llmstack.find_places(os.environ)
    Path(found.models_ini).write_text("[code-fast]\nrole = fast\npath = ../noise.gguf\nctx_size = 1024\n"
                                      "[plan]\nrole = plan\npath = ../gone.gguf\n")
    llmstack.trust_project(found, "run")
    return found


class Asked:
    """A setup whose person gives one answer, and what they were asked."""

    def __init__(self, places: llmstack.Places, answer: bool | None, **args: bool) -> None:
        self.questions: list[str] = []
        self.answer = answer
        given = argparse.Namespace(**{"probe": False, "yes": False, **args})
        self.setup = SETUP.Setup(places, os.environ, given, print, self.ask, [], [])

    def ask(self, question: str) -> bool | None:
        self.questions.append(question)
        return self.answer


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The tiers that `probe` is asked to measure, each time; it finds nothing."""
    probe = llmstack.load_extra("probe")
    found: list[list[str]] = []

    def measure(tiers: Any, prober: Any, as_json: bool) -> Any:
        found.append([tier.name for tier in tiers])
        return [], []

    load = llmstack.load_extra
    monkeypatch.setattr(probe, "measure", measure)
    monkeypatch.setattr(llmstack, "load_extra", lambda name: probe if name == "probe" else load(name))
    return found


@pytest.mark.parametrize(("answer", "args", "questions", "tiers"), [
    pytest.param(True, {}, 1, [["code-fast"]], id="a person who wants it"),
    pytest.param(False, {}, 1, [], id="one who does not"),
    pytest.param(None, {}, 1, [], id="no terminal"),
    pytest.param(True, {"yes": True}, 0, [], id="--yes"),
    pytest.param(None, {"probe": True}, 0, [["code-fast"]], id="--probe without a terminal"),
    pytest.param(True, {"yes": True, "probe": True}, 0, [["code-fast"]], id="--yes --probe"),
])
def test_who_is_asked_and_what_is_measured(
    places: llmstack.Places, measured: list[list[str]], answer: bool | None, args: dict[str, bool],
    questions: int, tiers: list[list[str]]
) -> None:
    asked = Asked(places, answer, **args)
    if tiers:
        assert "code-fast" in SETUP.setup_probe(asked.setup, llmstack)
    else:
        with pytest.raises(SETUP.Skipped, match="llmstack probe"):
            SETUP.setup_probe(asked.setup, llmstack)
    assert measured == tiers
    assert len(asked.questions) == questions
    for question in asked.questions:
        assert "Measure what code-fast can do here? It takes about 5 minutes." in question


def test_it_measures_once(real_data: Path, places: llmstack.Places) -> None:
    asked = Asked(places, True, probe=True)
    said = SETUP.setup_probe(asked.setup, llmstack)
    assert said == "code-fast: kept, and what routing goes by"
    speeds = llmstack.Speeds(places.data)
    assert speeds.reading(speeds.identity_of("code-fast"), 500) > 0
    assert SETUP.setup_probe(asked.setup, llmstack) == "measured before"


def test_a_tier_that_cannot_be_measured_fails_the_step(real_data: Path, places: llmstack.Places) -> None:
    Path("noise.gguf").write_bytes(b"GGUF")
    with pytest.raises(llmstack.UserError, match="not measured: code-fast"):
        SETUP.setup_probe(Asked(places, None, probe=True).setup, llmstack)


def test_without_a_model_there_is_nothing_to_measure(places: llmstack.Places) -> None:
    Path("noise.gguf").unlink()
    with pytest.raises(SETUP.Skipped, match="there is no model to measure yet"):
        SETUP.setup_probe(Asked(places, True).setup, llmstack)
