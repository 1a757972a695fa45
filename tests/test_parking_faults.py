"""What parking does where something breaks in the middle of it, with a real llama-server."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request
from pathlib import Path
from typing import Dict, List, Tuple

import pytest

import llmstack
from tests.noise_model import render_noise_gguf
from tests.test_parking import (  # noqa: F401  # fixtures
    IDENTITY,
    RealStage,
    Rig,
    conversation,
    real,
    rig,
)
from tests.test_stack import Project, ask, only_llama_swap


def test_a_kill_between_the_two_files_of_a_save_loses_that_save_alone(
        rig: Rig) -> None:  # noqa: F811
    """The .json is of the new state, the .kv still of the last one."""
    bay = rig.load()
    rig.slots.held.update({1: 500, 2: 700})
    bay.save(ending=True)
    row = json.loads(Path(rig.parking.path(f"{IDENTITY}-2.json")).read_text())
    row["edges"] = "9-" + "0" * 16
    Path(rig.parking.path(f"{IDENTITY}-2.json")).write_text(json.dumps(row))
    assert rig.load().restore()
    assert [path.split("?")[0] for path in rig.slots.actions("restore")] == ["/slots/1"]


def test_a_real_conversation_is_not_given_to_another_context(
        real: RealStage) -> None:  # noqa: F811
    """Nor lost by it: with its own context again, it is there."""
    said = conversation("a", 200)
    tokens, _ = real.turn("code-smart", said)
    model = real.engine.models["code-smart"]
    tier = model.tier
    real.turn("plan", conversation("b"))
    model.tier = tier._replace(ctx_size=4_096)
    assert real.turn("code-smart", list(said))[1] < tokens // 2
    assert real.log().count("code-smart: restored") == 0
    real.turn("plan", conversation("c"))
    model.tier = tier
    assert real.turn("code-smart", said)[1] >= tokens - 1


def test_half_a_save_of_a_killed_server_is_swept(rig: Rig) -> None:  # noqa: F811
    """And what was parked before is still restored."""
    bay = rig.load()
    rig.slots.held[1] = 500
    bay.save(ending=True)
    bay = rig.load()
    rig.slots.held[1] = 900
    half = Path(rig.parking.path(f"{IDENTITY}-0.tmp"))
    half.write_bytes(b"900 tok")
    rig.slots.refuses["save"] = ConnectionResetError("killed")
    bay.save(ending=True)
    assert not half.exists()
    assert rig.load().restore()
    assert rig.parking.saved(IDENTITY)[0].tokens == 500


def test_kill_9_of_a_server_that_is_being_parked(real: RealStage) -> None:  # noqa: F811
    """The state of the save before is still there."""
    said = conversation("a", 200)
    tokens, _ = real.turn("code-smart", said)
    real.turn("plan", conversation("b"))
    real.turn("code-smart", said)
    process = real.engine.models["code-smart"].process
    os.kill(process.pid, signal.SIGSTOP)        # it says nothing more
    other = threading.Thread(target=real.turn, args=("plan", conversation("c")))
    other.start()
    real.wait_state("code-smart", "stopping")
    os.kill(process.pid, signal.SIGKILL)
    other.join(60)
    assert not other.is_alive()
    assert real.turn("code-smart", said)[1] >= tokens - 1


def test_kill_9_of_the_daemon_in_the_middle_of_a_save(
        real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one sweeps the half of it, and restores the state of the save before."""
    monkeypatch.setattr(llmstack, "find_program", only_llama_swap(llmstack.find_program))
    weights = tmp_path / "noise.gguf"
    weights.write_bytes(render_noise_gguf())
    project = Project(f"park_after_s = 0\nn_gpu_layers = 0\n[one]\nrole = agent\npath = {weights}\n"
                      "ctx_size = 4k\nsize_gb = 0.1\n")
    said: List[Dict[str, str]] = conversation("a", 120)

    def turn() -> Tuple[int, int]:
        told = json.loads(ask(project.router_port, model="one", max_tokens=8, messages=said)[1])
        said.extend([told["choices"][0]["message"], {"role": "user", "content": "more"}])
        timings = told["timings"]
        return timings["prompt_n"] + timings["cache_n"], timings["cache_n"]

    parking = Path(llmstack.parked_dir(str(real_data)))
    try:
        assert llmstack.main(["start"]) == 0
        tokens, _ = turn()
        url = f"http://127.0.0.1:{project.engine_port}/api/models/unload/one"
        urllib.request.urlopen(urllib.request.Request(url, b""), timeout=60).close()
        (parked,) = parking.glob("*.kv")
        turn()
        os.kill(project.pid("router"), signal.SIGKILL)
        half = parked.with_suffix(".tmp")       # what the server leaves that dies with it
        half.write_bytes(parked.read_bytes()[:1_000])
        assert llmstack.main(["start"]) == 0
        assert turn()[1] >= tokens - 1, project.log("engine")
        assert not half.exists()
    finally:
        llmstack.main(["stop"])
