"""DAEMON: what a plan becomes, without a process of its own."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

import llmstack
from tests.noise_model import render_noise_gguf


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> llmstack.Places:
    Path("noise.gguf").write_bytes(render_noise_gguf())
    Path(".llmstack").mkdir()
    monkeypatch.setenv("LLAMA_SERVER_BIN", sys.executable)
    monkeypatch.setattr(llmstack, "find_llama_swap", lambda *_: sys.executable)
    return llmstack.find_places(os.environ)


def configured(places: llmstack.Places, *lines: str, default: str = "") -> llmstack.Config:
    text = "\n".join((default, "[a]", "role = fast", "path = ../noise.gguf", *lines)) + "\n"
    Path(places.models_ini).write_text(text)
    return llmstack.load_config(places)


def refusing(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(llmstack, "probe_flags", lambda *_: frozenset(flags))


def open_drafts(places: llmstack.Places) -> llmstack.Drafts:
    return llmstack.Drafts(places.data, llmstack.Log("", "error"))


def routed(places: llmstack.Places, config: llmstack.Config) -> llmstack.RouterApp:
    log = llmstack.Log("", "error")
    behind = llmstack.UpstreamApp(llmstack.Upstream("127.0.0.1", 9), log)
    return llmstack.router_app(llmstack.Plan(places, config, "127.0.0.1", 0), behind, log)


def test_a_record_that_is_not_wanted_is_not_written(places: llmstack.Places) -> None:
    for default, is_there in (("", True), ("[DEFAULT]\ndecision_log = no\n", False)):
        app = routed(places, configured(places, default=default))
        assert (app._given.record is not None) is is_there
        assert app._given.remedy == "run `llmstack start`"


def test_a_demo_is_reloaded_without_being_trusted(places: llmstack.Places) -> None:
    """Its model lies elsewhere by design, which a project would have to be trusted for."""
    elsewhere = Path("elsewhere/llama-server").resolve()
    demo = places._replace(data=str(Path("data").resolve()), work=str(Path("data/demo").resolve()))
    assert demo.is_demo
    config = configured(places)
    configured(places, default=f"[DEFAULT]\nllama_server_bin = {elsewhere}\n")
    app = routed(demo, config)
    assert app.reload() == ""
    assert app._given.remedy == "run `llmstack start --demo`"
    assert "trust" in routed(places, config).reload()


def test_who_has_the_port_is_said() -> None:
    app = llmstack.UpstreamApp(llmstack.Upstream("127.0.0.1", 9), llmstack.Log("", "error"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(llmstack.UserError, match=rf"cannot listen on 127\.0\.0\.1 port {port}: taken by "):
            llmstack.listen("127.0.0.1", port, app)
    with pytest.raises(llmstack.UserError, match=r"cannot listen on 192\.0\.2\.1 port 0: ") as caught:
        llmstack.listen("192.0.2.1", 0, app)
    assert "taken" not in str(caught.value)


@pytest.mark.parametrize(("refused", "parks"), [((), True), (("--slot-save-path",), False)])
def test_a_build_that_cannot_park_is_not_told_where(
        places: llmstack.Places, monkeypatch: pytest.MonkeyPatch, refused: Any, parks: bool) -> None:
    refusing(monkeypatch, *refused)
    config = configured(places)
    log = llmstack.Log("", "error")
    app = llmstack._embedded_app(places, config, log, open_drafts(places))
    assert ("--slot-save-path" in app.engine._command(config.tiers[0], 1)) is parks
    swap = llmstack._swap_app(places, config, log, open_drafts(places))
    assert (swap._bays is not None) is parks


def test_the_engine_logs_once_what_its_server_refuses(
        places: llmstack.Places, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refusing(monkeypatch, "--n-cpu-moe")
    config = configured(places, "n_cpu_moe = 3")
    log = llmstack.Log(str(tmp_path / "log"), "info")
    app = llmstack._embedded_app(places, config, log, open_drafts(places))
    for _ in range(2):
        app.engine._command(config.tiers[0], 1)
    log.flush()
    said = "[a] n_cpu_moe: this llama-server refuses --n-cpu-moe 3"
    assert (tmp_path / "log").read_text().count(said) == 1


def test_llama_swap_hands_down_what_the_proxy_needs(
        places: llmstack.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch)
    config = configured(places)
    tier = llmstack.Tier("hosted", backend="litellm")
    proxy = llmstack.ProxyPlan(tier, ("python", "x"), 10103, llmstack.PROXY_HEALTH, False)
    monkeypatch.setattr(llmstack, "plan_proxy", lambda *_: proxy)
    monkeypatch.setenv("LLMSTACK_API_KEY", "ours")
    found = llmstack.find_places(os.environ)
    swap = llmstack._swap_app(found, config, llmstack.Log("", "error"), open_drafts(places))
    wanted = llmstack.litellm_env(llmstack._without_our_key(found.env))
    assert {**swap._env, "LLAMA_API_KEY": ""} == {**wanted, "LLAMA_API_KEY": ""}
    assert len(swap._env["LLAMA_API_KEY"]) == 32
    assert "LLMSTACK_API_KEY" not in swap._env
