"""What goes first when memory is short: what is cheapest to bring back."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator, Tuple

import pytest

import llmstack
from llmstack import Counts
from tests.test_engine import FIRST_PORT, Stage, idle_for

TIERS = ("code-smart", "plan", "code-fast")


class Learning(Stage):
    """Three models of 1 GB each with files of their own, an engine that learns, room for two."""

    def __init__(self, tmp_path: Path, config: llmstack.Config) -> None:
        tiers = []
        for name in TIERS:
            weights = tmp_path / f"{name}.gguf"
            weights.write_bytes(b"GGUF" + name.encode())
            tier = config.by_name(name)
            assert tier is not None
            tiers.append(tier._replace(path=str(weights), size_gb=1.0, rope_scale=0.0))
        config = config._replace(tiers=tuple(tiers), park_gb=0.0)
        super().__init__(tmp_path / "stage", config, 1e9, FIRST_PORT)
        for model in self.engine.models.values():
            model.needs = (4e8,)
        self.engine._sets = [llmstack.ResidencySet("all", TIERS)]
        self.parking = llmstack.Parking(str(tmp_path / "data"), config)
        self.engine._parking = self.parking

    def learn(self, model: str, what: str, value: float) -> None:
        """Once and for all: what the fake server takes itself is of no interest."""
        row = self.parking.speeds._rows[self.engine.models[model].identity]
        row[what] = value


@pytest.fixture
def stage(tmp_path: Path, config: llmstack.Config) -> Iterator[Learning]:
    found = Learning(tmp_path, config)
    yield found
    found.close()


def test_a_load_is_learned_without_parking(stage: Learning) -> None:
    stage.hello("plan")
    speeds = stage.parking.speeds
    identity = stage.engine.models["plan"].identity
    assert speeds.identity_of("plan") == identity != ""
    assert speeds.load_s(identity) > 0
    assert stage.engine.pace("plan", 100).loaded
    assert not stage.parking.parks


GOES: Tuple[Tuple[str, float, float, str], ...] = (
    ("as long idle: the one that loads faster", 60, 60, "plan"),
    ("a slow load that was idle for long goes before a fast one just used", 6_000, 1, "code-smart"),
)


@pytest.mark.parametrize(("smart_idle_s", "plan_idle_s", "goes"), [row[1:] for row in GOES],
                         ids=[row[0] for row in GOES])
def test_the_cheapest_to_bring_back_goes(
        stage: Learning, smart_idle_s: float, plan_idle_s: float, goes: str) -> None:
    for name in ("code-smart", "plan"):
        stage.hello(name)
        stage.wait_idle(name)
    stage.learn("code-smart", "load", 40.0)
    stage.learn("plan", "load", 2.0)
    idle_for(stage, "code-smart", smart_idle_s)
    idle_for(stage, "plan", plan_idle_s)
    stage.hello("code-fast")
    assert goes not in stage.states()
    assert len(stage.states()) == 2


def test_what_would_be_read_anew_counts(stage: Learning) -> None:
    for name in ("code-smart", "plan"):
        stage.hello(name)
        stage.wait_idle(name)
        stage.learn(name, "load", 2.0)
    bay = stage.engine.models["code-smart"].bay
    assert bay is not None
    bay.note("", b"", Counts(20_000, 0, 100, 500.0, 20.0))
    idle_for(stage, "code-smart", 61)
    idle_for(stage, "plan", 60)
    stage.hello("code-fast")
    assert sorted(stage.states()) == ["code-fast", "code-smart"]


def test_llama_swaps_costs_are_the_seconds_that_were_seen(
        tmp_path: Path, config: llmstack.Config) -> None:
    speeds = llmstack.Speeds(str(tmp_path))
    local = [tier for tier in config.tiers if tier.name in ("code-fast", "plan")]
    assert llmstack.costly_gb(local, [], speeds) == {}
    speeds.note("i", "plan", "disk", 20.0)
    speeds.note("i", "plan", "load", 8.0)
    found = llmstack.costly_gb(local, [], speeds)
    assert {name: llmstack.evict_cost(gb) for name, gb in found.items()} == {"plan": 8}
