"""A tier with a projector: its command line, the requests it gets, and what `probe` asks of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Mapping

import pytest

import llmstack
from tests import gguf_models
from tests.test_extras_probe import PROBE, Told, reply

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
INI = """\
[eyes]
role = fast
path = ../m.gguf
mmproj = {projector}
[code-smart]
role = agent
path = ../m.gguf
"""


@pytest.fixture
def places() -> llmstack.Places:
    gguf_models.write(Path("m.gguf"), *gguf_models.model("qwen3", vocab=300))
    Path("mmproj-F16.gguf").write_bytes(b"GGUF")
    Path(".llmstack").mkdir()
    return llmstack.find_places(os.environ)


def write_ini(projector: str) -> llmstack.Config:
    places = llmstack.find_places(os.environ)
    Path(places.models_ini).write_text(INI.format(projector=projector))
    llmstack.trust_project(places, "run")
    return llmstack.load_config(places)


@pytest.mark.parametrize("projector", ["auto", "../mmproj-F16.gguf"])
def test_the_engine_starts_the_tier_with_its_projector_and_no_other(
    places: llmstack.Places, projector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_ini(projector)
    monkeypatch.setattr(llmstack, "find_llama_server", lambda config, env, data: ("/bin/true",))
    log = llmstack.Log("", "error")
    app = llmstack._embedded_app(places, config, log, llmstack.Drafts(places.data, log))
    commands = {tier.name: app.engine._command(tier, 1) for tier in config.tiers}
    words = commands["eyes"]
    assert words[words.index("--mmproj") + 1] == str(Path("mmproj-F16.gguf").absolute())
    assert "--mmproj" not in commands["code-smart"]


def chosen(config: llmstack.Config, content: Any) -> str:
    body = {"model": "auto", "messages": [{"role": "user", "content": content}]}
    facts = llmstack.read_facts("/v1/chat/completions", body, config.routing.ultra_triggers)
    return llmstack.decide(facts, config).tier


def test_a_picture_goes_to_the_tier_that_takes_it(places: llmstack.Places) -> None:
    config = write_ini("auto")
    assert chosen(config, "What is this?") == "code-smart"
    assert chosen(config, [{"type": "text", "text": "What is this?"}, PICTURE]) == "eyes"


class Seen(Told):
    """Answers every test alike."""

    def ask(self, path: str, body: Mapping[str, Any] | None = None,
            timeout_s: float = 10) -> tuple[int, dict[str, Any]]:
        self.asked.append((path, body))
        if path == "/props":
            return 200, {"default_generation_settings": {"n_ctx": 64}}
        return reply("Red.")


def test_probe_asks_about_a_picture_where_there_is_a_projector(places: llmstack.Places) -> None:
    config = write_ini("auto")
    prober = PROBE.Prober.__new__(PROBE.Prober)
    prober.llmstack = llmstack
    rows: dict[str, dict[str, Any]] = {"eyes": {}, "code-smart": {}}
    for name, row in rows.items():
        trial: Any = Seen()
        trial.loaded_s = 1.0
        prober._ask(trial, config.by_name(name), row)
    assert rows["eyes"]["pictures"] is True
    assert "pictures" not in rows["code-smart"]
