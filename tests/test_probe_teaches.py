"""What `probe` measures is the first that routing, evictions and parking know of a tier's speed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import llmstack
from tests.noise_model import render_noise_gguf

SETTINGS = "ctx_size = 4096\nn_gpu_layers = 0\nparallel = 2\nthreads = 1\n"


@pytest.fixture
def places(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> llmstack.Places:
    """A project with one tier, whose words are noise."""
    Path("noise.gguf").write_bytes(render_noise_gguf())
    Path(".llmstack").mkdir()
    text = f"[code-fast]\nrole = fast\npath = ../noise.gguf\n{SETTINGS}"
    Path(".llmstack/models.ini").write_text(text)
    found = llmstack.find_places(os.environ)
    llmstack.trust_project(found, "run")
    return found


def engine_of(places: llmstack.Places) -> llmstack.Engine:
    """The embedded engine as a daemon has it, with nothing loaded."""
    config = llmstack.true_config(llmstack.load_config(places), places)
    log = llmstack.Log("", "error")
    app = llmstack._embedded_app(places, config, log, llmstack.Drafts(places.data, log))
    return app.engine


def test_a_tier_that_was_measured_is_known_before_its_first_answer(
    places: llmstack.Places, capsys: pytest.CaptureFixture[str]
) -> None:
    running = engine_of(places)
    assert running.pace("code-fast", 3_000) == llmstack.Pace()
    assert llmstack.main(["probe", "--json"]) == 0
    row, = json.loads(capsys.readouterr().out)
    speeds = llmstack.Speeds(places.data)
    identity = speeds.identity_of("code-fast")
    assert speeds.load_s(identity) == row["loaded_s"]
    assert speeds.get(identity, "written") > 0
    read = [speed["read_per_s"] for speed in row["speeds"]]
    assert speeds.reading(identity, 3_000) == pytest.approx(read[0] + (read[1] - read[0]) / 3, abs=0.01)

    for engine in (running, engine_of(places)):
        tier = engine.config.tiers[0]
        command = engine._command(tier, 4711)
        assert "--slot-save-path" in command, "which a trial has not"
        weights = llmstack.cached_model(llmstack.weights_for(tier), os.environ)
        assert llmstack.parking_identity(command, weights, engine._local_env) == identity
        pace = engine.pace("code-fast", 3_000)
        assert pace.load_s == pytest.approx(row["loaded_s"])
        assert pace.read_per_s > 0

    assert llmstack.main(["why", "--json", "hello " * 500]) == 0
    assert json.loads(capsys.readouterr().out)["takes"]["code-fast"]["read_s"] >= 0
    local = llmstack.local_tiers(llmstack.load_config(places))
    assert llmstack.costly_gb(local, [], speeds)["code-fast"] == pytest.approx(
        row["loaded_s"] * llmstack.LOADED_GB_PER_S)


def test_llama_swap_knows_it_too(places: llmstack.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llmstack.main(["probe"]) == 0
    config = llmstack.true_config(llmstack.load_config(places), places)
    log = llmstack.Log("", "error")
    monkeypatch.setattr(llmstack, "find_llama_swap", lambda env, data: "/bin/false")
    app = llmstack._swap_app(places, config, log, llmstack.Drafts(places.data, log))
    speeds = llmstack.Speeds(places.data)
    assert app._bays is not None
    assert app._bays._identify(config.tiers[0]) == speeds.identity_of("code-fast")
    assert app.pace("code-fast", 3_000).read_per_s > 0


# ---- several processes that learn


def test_what_another_process_has_written_is_taken_in(tmp_path: Any) -> None:
    daemon, probe = llmstack.Speeds(str(tmp_path)), llmstack.Speeds(str(tmp_path))
    daemon.note("a", "one", "load", 3.0)
    daemon.keep()
    probe.note("b", "two", "load", 5.0)
    probe.keep()
    assert daemon.identity_of("two") == "b"
    assert daemon.load_s("b") == 5.0
    daemon.note("a", "one", "read", 100.0)
    daemon.keep()
    found = llmstack.Speeds(str(tmp_path))
    assert (found.load_s("a"), found.reading("a", 1), found.load_s("b")) == (3.0, 100.0, 5.0)


def test_what_is_not_written_yet_outlives_what_another_writes(tmp_path: Any) -> None:
    daemon, probe = llmstack.Speeds(str(tmp_path)), llmstack.Speeds(str(tmp_path))
    daemon.note("a", "one", "load", 3.0)
    daemon.note("c", "one", "load", 4.0)
    probe.note("b", "two", "load", 5.0)
    probe.keep()
    assert daemon.identity_of("two") == "b"
    assert daemon.identity_of("one") == "c", "the last used"
    daemon.keep()
    assert set(json.loads((tmp_path / "speeds.json").read_text())) == {"a", "b", "c"}


def test_a_speed_that_cannot_be_written_is_kept_in_mind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = llmstack.Speeds(str(tmp_path))
    speeds.note("a", "one", "load", 3.0)

    def full(path: str, data: str) -> None:
        raise llmstack.UserError("cannot write", "make room")

    with monkeypatch.context() as patch:
        patch.setattr(llmstack, "write_atomic", full)
        with pytest.raises(llmstack.UserError):
            speeds.keep()
    assert speeds.load_s("a") == 3.0


# ---- what a conversation is restored under


@pytest.mark.parametrize("flags", [("--ctx-checkpoints", "8"), ("--slot-save-path", "/p"),
                                   ("--cache-ram", "64", "--ctx-checkpoints", "1")])
def test_what_memory_is_left_for_does_not_make_another_model(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Checkpoints are as many as memory has room for, which another start may find otherwise."""
    weights, program = tmp_path / "a.gguf", tmp_path / "llama-server"
    weights.write_bytes(b"weights")
    program.write_bytes(b"build")
    plain = [str(program), "--host", "127.0.0.1", "-c", "4096"]
    found = [llmstack.parking_identity(words, str(weights), {}) for words in (plain, [*plain, *flags])]
    assert found[0] == found[1]
