"""The decision record has a line however a request was asked and ended; `nearest` and `why` know what is down."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any, Dict, List

import pytest

import llmstack
from tests.scripted import always, answer
from tests.test_engine import wait_for
from tests.test_ladder import any_config, any_facts, fewer
from tests.test_router import (  # noqa: F401  # fixtures
    CONFIG,
    Rig,
    Start,
    chat,
    post,
    request,
    start,
)

SAID = answer(b'{"usage":{"prompt_tokens":7}}', "200 OK", "Content-Type: application/json")


class Lines:
    """What a router has recorded."""

    def __init__(self, start: Start, tmp_path: Path, data: bytes = b"") -> None:  # noqa: F811
        self.path = tmp_path / "decisions.jsonl"
        script = always(data) if data else None
        self.rig: Rig = start(script, record=llmstack.Recorder(str(self.path)))

    def next(self, count: int = 1) -> List[Dict[str, Any]]:
        def there() -> bool:
            return self.path.exists() and self.path.read_text().count("\n") >= count
        wait_for(there, "the lines")
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@pytest.mark.parametrize("path", sorted(set(llmstack.INFERENCE_PATHS.values())))
def test_a_request_by_name_is_a_line_on_each_path(start: Start, tmp_path: Path, path: str) -> None:  # noqa: F811
    lines = Lines(start, tmp_path, SAID)
    lines.rig.ask(post({"model": "code-fast", "input": "hello"}, target=path))
    row = lines.next()[0]
    assert (row["path"], row["tier"], row["rung"], row["truth"]) == (path, "code-fast", "explicit", 7)


@pytest.mark.parametrize(("model", "rung"), [("auto", "high"), ("code-ultra", "explicit")])
def test_a_client_that_left_is_a_line(start: Start, tmp_path: Path, model: str, rung: str) -> None:  # noqa: F811
    lines = Lines(start, tmp_path)
    client = lines.rig.client()
    client.send(chat(model, stream=True))
    up = lines.rig.upstream.next()
    up.read()
    client.close()
    row = lines.next()[0]
    assert (row["tier"], row["rung"], row["ended"], row["truth"]) == ("code-ultra", rung, "left", 0)
    up.close()


def test_a_request_that_only_counts_holds_nothing(start: Start, tmp_path: Path) -> None:  # noqa: F811
    lines = Lines(start, tmp_path, answer(b'{"input_tokens":20}', "200 OK", "Content-Type: application/json"))
    body = {"model": "code-fast", "messages": [{"role": "user", "content": "hello"}]}
    lines.rig.ask(post(body, target="/v1/messages/count_tokens"))
    lines.next()
    conversations = lines.rig.app._conversations._known
    assert not any(known.held for known in conversations.values())


def test_nearest_names_no_tier_that_cannot_answer() -> None:
    rng = random.Random(11)
    named = 0
    for _ in range(3_000):
        config = any_config(rng)
        names = [tier.name for tier in config.ladder]
        down = {name: "down" for name in names if rng.random() < 0.3}
        barred = {name: "no key" for name in names if rng.random() < 0.3}
        asked = any_facts(rng)._replace(wide=0, extra=0, pictures=0, fim=False)
        found = llmstack.decide(asked, config, down, barred).nearest
        match = re.fullmatch(r"([\d,]+) (fewer token|more user turn)s? \u2192 ([\w-]+)", found)
        if not match:
            continue
        named += 1
        change = int(match.group(1).replace(",", ""))
        made = asked._replace(turns=asked.turns + change)
        if match.group(2) == "fewer token":
            made = fewer(asked, change)
        assert llmstack.decide(made, config, down, barred).tier == match.group(3)
    assert named > 100


def test_why_knows_what_the_running_router_leaves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"code-ultra": {"state": "failing", "reason": "answered 500 a moment ago"},
            "code-smart": {"state": "no credential", "reason": "missing KEY"},
            "code-fast": {"state": "available", "reason": ""}}
    monkeypatch.setattr(llmstack, "running_router", lambda places: (None, CONFIG))
    monkeypatch.setattr(llmstack, "asked_json", lambda upstream, path: told)
    why = llmstack.load_extra("why")
    down, barred = why.tiers_not_asked(None, CONFIG, llmstack)
    assert (down, barred) == ({"code-ultra": "answered 500 a moment ago"}, {"code-smart": "missing KEY"})
    body = {"messages": [{"role": "user", "content": "[ultra] hello"}]}
    decision = why.why_decision(body, None, CONFIG, "/v1/chat/completions", llmstack)
    assert decision.tier == "code-fast"
    assert "left alone for now: answered 500" in decision.refused["code-ultra"]


@pytest.mark.parametrize("path", ["/v1/models", "//v1/models", "/v1//models/", "/v1/v1/models", "/models"])
def test_the_list_of_models_is_taken_however_a_client_joins_it(start: Start, path: str) -> None:  # noqa: F811
    got = start(always(answer(b'{"data":[]}'))).ask(request("GET", path))
    assert got.json["data"][0]["id"] == "auto"
