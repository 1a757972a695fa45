"""INSTALL and PURE: OPENCODE: what a project is given for opencode, and the thin client of a router elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Iterator

import pytest

import llmstack
from llmstack import Config, Tier, render_opencode_json
from tests.scripted import Connection, Script, ScriptedUpstream, always, answer
from tests.test_stack import NO_MODELS, PROGRAM, Project, alive, free_ports, get, noise, two_tiers  # noqa: F401  # a fixture

STATE = Path(".llmstack")
AGENTS_MD = llmstack.read_shared_text("templates/AGENTS.md")
INI = "[far]\nrole = agent\nmodel = x/y\nctx_size = 100k\n[near]\nrole = fast\nmodel = x/z\nctx_size = 8k\n"
MODELS_INI = answer(INI.encode(), "200 OK", "Content-Type: text/plain", "X-LLMStack-Pid: 1")

GOLDEN = """{
  "$schema": "https://opencode.ai/config.json",
  "model": "llama.cpp/auto",
  "small_model": "llama.cpp/little",
  "share": "disabled",
  "autoupdate": false,
  "enabled_providers": [
    "llama.cpp"
  ],
  "instructions": [
    "/home/me/a \\"b\\"/.llmstack/AGENTS.md"
  ],
  "provider": {
    "llama.cpp": {
      "npm": "@ai-sdk/openai-compatible",
      "name": "llmstack",
      "options": {
        "baseURL": "http://127.0.0.1:10101/v1",
        "headerTimeout": 900000,
        "chunkTimeout": 900000,
        "apiKey": "{env:LLMSTACK_API_KEY}"
      },
      "models": {
        "auto": {
          "name": "auto: the best tier for the length",
          "limit": {
            "context": 131072,
            "output": 8192
          },
          "tool_call": true
        },
        "little": {
          "name": "quick",
          "limit": {
            "context": 131072,
            "output": 16384
          },
          "tool_call": false,
          "cost": {
            "input": 0,
            "output": 0
          }
        },
        "hosted": {
          "name": "hosted",
          "limit": {
            "context": 24000,
            "output": 8192
          },
          "tool_call": true,
          "reasoning": true
        }
      }
    }
  },
  "agent": {
    "build": {},
    "plan": {
      "permission": {
        "edit": "deny",
        "bash": "deny",
        "webfetch": "deny",
        "task": "deny"
      }
    }
  },
  "command": {
    "review": {
      "description": "Trade-offs, risks and follow-ups, by the planner",
      "agent": "plan",
      "template": "Review for trade-offs, risks and follow-ups. Be concrete.\\n\\n$ARGUMENTS"
    }
  },
  "mcp": {
    "litellm": {
      "type": "remote",
      "url": "http://127.0.0.1:10103/mcp",
      "enabled": true
    }
  }
}
"""
LITTLE = Tier("little", "fast", ctx_size=131_072, description="quick", tool_call=False, hf_repo="a/b", hf_file="c.gguf")
HOSTED = Tier("hosted", "ultra", backend="litellm", model="x/y", ctx_size=24_000, max_output_tokens=8192, reasoning=True)


def rendered(config: Config, **options: Any) -> Any:
    return json.loads(render_opencode_json(config, "http://127.0.0.1:10101", "/p/.llmstack/AGENTS.md", **options))


def models(value: Any) -> Any:
    return value["provider"]["llama.cpp"]["models"]


# ---- the generator


def test_golden() -> None:
    text = render_opencode_json(Config((LITTLE, HOSTED)), "http://127.0.0.1:10101", '/home/me/a "b"/.llmstack/AGENTS.md',
                                wants_key=True, mcp_url="http://127.0.0.1:10103/mcp")
    assert text == GOLDEN


def test_the_bundled_tiers_are_wired_as_the_specification_says(config: Config) -> None:
    value = rendered(config)
    assert value["model"] == "llama.cpp/auto"
    assert value["small_model"] == "llama.cpp/code-fast"
    assert {name: agent["model"] for name, agent in value["agent"].items()} == {
        "build": "llama.cpp/code-smart", "plan": "llama.cpp/plan", "plan-nofilter": "llama.cpp/plan-uncensored"}
    for name in ("plan", "plan-nofilter"):
        assert value["agent"][name]["permission"] == dict.fromkeys(("edit", "bash", "webfetch", "task"), "deny")
    assert list(models(value)) == ["auto", *(t.name for t in config.tiers if t.chats)]
    assert models(value)["auto"]["limit"]["context"] == 131_072
    assert all(m["cost"] == {"input": 0, "output": 0} for m in models(value).values())
    assert set(value["command"]) == {"review", "nofilter"}
    assert "mcp" not in value
    assert "apiKey" not in value["provider"]["llama.cpp"]["options"]


def test_no_sampler_anywhere(config: Config) -> None:
    text = render_opencode_json(config, "http://x", "/AGENTS.md")
    for word in ("temp", "top_p", "top_k", "min_p", "penalty"):
        assert word not in text.replace("template", "")


def test_build_model_auto_leaves_it_to_the_ladder(config: Config) -> None:
    assert rendered(config._replace(build_model="auto"))["agent"]["build"] == {"model": "llama.cpp/auto"}


@pytest.mark.parametrize("tier", [Tier("t", "agent", ctx_size=size, max_output_tokens=cap)
                                  for size in (256, 2_048, 24_000, 65_536, 1_000_000) for cap in (0, 1, 8_192, 10_000_000)])
def test_the_limits_leave_room_on_both_sides(tier: Tier) -> None:
    for name in ("auto", "t"):
        limit = models(rendered(Config((tier,))))[name]["limit"]
        assert 0 < limit["output"] < limit["context"] == tier.ctx_size
        threshold = limit["context"] - min(limit["output"], 32_000)
        assert threshold >= tier.ctx_size // 2, "where opencode compacts"
        facts = llmstack.Facts(True, "auto", False, threshold * 4, 0, 0, 0, 1, limit["output"], "")
        assert llmstack.tokens_needed(facts, tier) <= tier.ctx_size, "what is not compacted yet is still routed there"


def test_a_cap_of_any_tier_of_the_ladder_bounds_auto() -> None:
    tiers = (Tier("a", "agent", ctx_size=65_536), Tier("b", "fast", ctx_size=131_072), HOSTED,
             Tier("p", "plan", ctx_size=500_000, max_output_tokens=10))
    assert models(rendered(Config(tiers)))["auto"]["limit"] == {"context": 131_072, "output": 8_192}
    assert "cost" not in models(rendered(Config(tiers)))["auto"], "the ladder's top is paid for"


def test_a_context_that_opencodes_own_prompt_fills_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """opencode compacts at context - output, and then sends as much again."""
    STATE.mkdir()
    (STATE / "models.ini").write_text(INI.replace("100k", "12k"))
    assert llmstack.main(["install"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "compact" in line]
    assert [line.partition(" tokens")[0] for line in lines] == [
        f"llmstack: warning: {name}: of 12,288" for name in ("far", "auto")]
    assert llmstack.cramped_models(Config(tiers=(Tier("a", "agent", ctx_size=16_384), Tier("f", "fast", ctx_size=8192)))) == []


def test_local_only_leaves_what_is_hosted_out() -> None:
    near = Tier("near", "agent", backend="openai", model="m", base_url="http://127.0.0.1:1234", ctx_size=8_192)
    value = rendered(Config((LITTLE._replace(ctx_size=4_096), HOSTED, near), local_only=True))
    assert list(models(value)) == ["auto", "little", "near"]
    assert models(value)["auto"]["limit"]["context"] == 8_192
    assert models(value)["near"]["cost"] == {"input": 0, "output": 0}


def test_without_jinja_local_tiers_call_no_tools(config: Config) -> None:
    value = rendered(config._replace(tiers=(*config.tiers, HOSTED)).with_settings({"jinja": False}))
    assert not models(value)["code-smart"]["tool_call"]
    assert models(value)["hosted"]["tool_call"]


@pytest.mark.parametrize(("roles", "model", "small"), [
    (("agent",), "auto", "auto"), (("plan",), "t0", "t0"), (("",), "t0", "t0"), (("plan-uncensored", "fast"), "auto", "t1")])
def test_missing_tiers(roles: tuple[str, ...], model: str, small: str) -> None:
    value = rendered(Config(tuple(Tier(f"t{i}", role) for i, role in enumerate(roles))))
    assert value["model"] == f"llama.cpp/{model}"
    assert value["small_model"] == f"llama.cpp/{small}"
    named = [value["model"], value["small_model"], *(a["model"] for a in value["agent"].values() if "model" in a)]
    assert {n.split("/")[1] for n in named} <= set(models(value)), "nothing is named that is not in the list"
    assert ("plan-nofilter" in value["agent"]) == ("nofilter" in value["command"]) == ("plan-uncensored" in roles)


def test_a_description_names_no_variable_file_or_terminal_code() -> None:
    """opencode puts {env:X} and {file:X} in wherever they stand; a remote models.ini is not to say which."""
    tier = Tier("t", "agent", description='{env:HOME} {file:/etc/passwd} \x1b[2J "apiKey": null')
    text = render_opencode_json(Config((tier,)), "http://x", "/AGENTS.md", wants_key=True)
    assert text.count("{env:") == 1
    assert "{file:" not in text
    assert models(json.loads(text))["t"]["name"] == '{env:HOME} {file:/etc/passwd} [2J "apiKey": null'


# ---- install


def snapshot() -> dict[str, tuple[int, bytes]]:
    """Every file of the test, HOME included: time stamp and content."""
    files = [p for p in Path.cwd().parent.rglob("*") if p.is_file() and not p.name.endswith(".lock")]
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def opencode() -> Any:
    return json.loads((STATE / "opencode.json").read_text())


def served() -> str:
    url: str = opencode()["provider"]["llama.cpp"]["options"]["baseURL"]
    return url


@pytest.fixture
def places(home: Path) -> llmstack.Places:
    return llmstack.find_places(os.environ)


def test_an_empty_directory_gets_all_it_needs(places: llmstack.Places, capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["install"]) == 0
    assert sorted(p.name for p in STATE.iterdir()) == ["AGENTS.md", "default-channel", "models.ini", "opencode.json"]
    assert served() == "http://127.0.0.1:10101/v1"
    assert opencode()["instructions"] == [str(STATE.absolute() / "AGENTS.md")]
    assert (STATE / "default-channel").read_text() == "current\n"
    assert (STATE / "AGENTS.md").read_text() == AGENTS_MD
    assert llmstack.is_trusted(places, "hook")
    assert "llmstack start" in capsys.readouterr().out


def test_a_second_run_changes_nothing_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    llmstack.main(["install"])
    before = snapshot()
    capsys.readouterr()
    assert llmstack.main(["install"]) == 0
    assert snapshot() == before
    assert capsys.readouterr().out.startswith("Nothing to change")


def test_print_writes_nothing_and_prints_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """The peer's `install --print` writes files."""
    assert llmstack.main(["install", "--print"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["model"] == "llama.cpp/auto"
    assert err == ""
    assert snapshot() == {}
    STATE.mkdir()
    (STATE / "models.ini").write_text("[a]\nrole = agent\nmodel = x/y\ncolour = red\n")
    before = snapshot()
    assert llmstack.main(["install", "--print", "--current"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["mcp"]["litellm"]["url"] == "http://127.0.0.1:10103/mcp"
    assert "unknown key colour" in err
    assert snapshot() == before


def test_models_ini_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    STATE.mkdir()
    (STATE / "models.ini").write_text(NO_MODELS)
    assert llmstack.main(["install"]) == 0
    assert (STATE / "models.ini").read_text() == NO_MODELS
    assert list(models(opencode())) == ["auto", "hosted"]


def test_a_broken_models_ini_leaves_everything_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    llmstack.main(["install"])
    (STATE / "models.ini").write_text("[a\n")
    before = snapshot()
    assert llmstack.main(["install"]) == 2
    assert snapshot() == before


def test_an_edited_agents_md_stays(places: llmstack.Places, capsys: pytest.CaptureFixture[str]) -> None:
    llmstack.main(["install"])
    (STATE / "AGENTS.md").write_text("mine")
    assert llmstack.main(["install"]) == 0
    assert (STATE / "AGENTS.md").read_text() == "mine"
    assert (STATE / "AGENTS.md.new").read_text() == AGENTS_MD
    assert "is yours and stays" in capsys.readouterr().out
    assert not llmstack.is_trusted(places, "hook"), "it may have come with a pull"
    assert llmstack.main(["trust"]) == 0
    before = snapshot()
    assert llmstack.main(["install"]) == 0
    assert snapshot() == before
    assert llmstack.is_trusted(places, "hook")


def test_an_agents_md_of_an_earlier_version_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(llmstack, "read_shared_text", lambda name: "of an earlier version\n")
        llmstack.main(["install"])
    llmstack.main(["install"])
    assert (STATE / "AGENTS.md").read_text() == AGENTS_MD
    assert not (STATE / "AGENTS.md.new").exists()


def test_an_edited_opencode_json_is_kept_beside_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    llmstack.main(["install"])
    (STATE / "opencode.json").write_text('{"model": "mine"}')
    llmstack.main(["install"])
    assert (STATE / "opencode.json.old").read_text() == '{"model": "mine"}'
    assert opencode()["model"] == "llama.cpp/auto"
    assert "opencode.json.old" in capsys.readouterr().out


def test_a_failing_disk_leaves_the_old_file_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    llmstack.main(["install"])
    before = (STATE / "opencode.json").read_bytes()
    (STATE / "models.ini").write_text(NO_MODELS)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert llmstack.main(["install"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (STATE / "opencode.json").read_bytes() == before
    assert not list(STATE.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["opencode.json", "AGENTS.md", "default-channel", "models.ini"])
def test_a_directory_in_a_files_place_is_named_with_a_remedy(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (STATE / name).mkdir(parents=True)
    assert llmstack.main(["install"]) in (1, 2)
    what, hint = capsys.readouterr().err.splitlines()
    assert what.endswith(f"{name}: Is a directory")
    assert hint == "hint: move away what stands in its place"


@pytest.mark.parametrize("words", [["install"], ["start"], ["install", "--external"]])
def test_a_clones_link_to_the_users_own_opencode_is_not_followed(words: list[str], home: Path, monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    mine = home / ".config" / "opencode" / "opencode.json"
    mine.parent.mkdir(parents=True)
    mine.write_text('{"theme": "mine"}')
    STATE.symlink_to(mine.parent)
    with ScriptedUpstream(always(MODELS_INI)) as upstream:
        assert llmstack.main([*words, *([f"http://127.0.0.1:{upstream.port}"] if "--external" in words else [])]) == 1
    assert f"is a link to {mine.parent}" in "".join(capsys.readouterr())
    assert os.listdir(mine.parent) == ["opencode.json"]
    assert mine.read_text() == '{"theme": "mine"}'
    STATE.unlink()
    (home / ".llmstack").mkdir()
    STATE.symlink_to(home / ".llmstack")
    assert llmstack.main(["install"]) == 0, "settings shared by projects"


@pytest.mark.parametrize("command", ["start", "restart", "setup", "download"])
def test_a_damaged_pin_starts_nothing(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    STATE.mkdir()
    (STATE / "default-channel").write_text("external http://10.0.0.5:1/$(id)\n")
    assert llmstack.main([command]) == 2
    assert "default-channel names no channel" in capsys.readouterr().err
    assert os.listdir(STATE) == ["default-channel"]


def test_the_users_own_opencode_is_never_touched(home: Path) -> None:
    mine = home / ".config" / "opencode" / "opencode.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    stamp = mine.stat().st_mtime_ns
    llmstack.main(["install"])
    assert (mine.read_text(), mine.stat().st_mtime_ns, list(mine.parent.iterdir())) == ("{}", stamp, [mine])


def test_a_key_is_referred_to_and_never_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMSTACK_API_KEY", "a-key-of-the-test")
    llmstack.main(["install"])
    assert opencode()["provider"]["llama.cpp"]["options"]["apiKey"] == "{env:LLMSTACK_API_KEY}"
    assert not any(b"a-key-of-the-test" in data for _, data in snapshot().values())
    assert "a-key" not in "".join(capsys.readouterr())


def test_next_needs_a_queued_upgrade(capsys: pytest.CaptureFixture[str]) -> None:
    STATE.mkdir()
    (STATE / "models.ini").write_text(NO_MODELS)
    assert llmstack.main(["install", "--next"]) == 2
    assert "no tier has a queued upgrade" in capsys.readouterr().err
    assert not (STATE / "default-channel").exists()


@pytest.mark.parametrize("words", [["--external", "--next"], ["--external", "http://x", "--current"], ["--current", "--next"],
                                   ["--insecure"], ["--external", "ftp://x"], ["--external", "http://x/%24(id)"],
                                   ["--external", "http://u:p@x"], ["--external", "http://x?y"]])
def test_usage_errors(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["install", *words]) == 2
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["llmstack", "hint"]
    assert not STATE.exists()


def test_the_pin_decides_for_start_until_it_is_taken_back(capsys: pytest.CaptureFixture[str]) -> None:
    project = Project(NO_MODELS + "model_next = x/newer\n")
    try:
        assert llmstack.main(["install", "--next"]) == 0
        assert (STATE / "default-channel").read_text() == "next\n"
        assert llmstack.main(["install"]) == 0
        assert (STATE / "default-channel").read_text() == "next\n", "without an option the channel stays"
        assert llmstack.main(["start"]) == 0
        assert (STATE / "active-channel").read_text() == "next\n"
        capsys.readouterr()
        assert llmstack.main(["install", "--current"]) == 0
        assert "llmstack restart --current" in capsys.readouterr().out
        assert (STATE / "default-channel").read_text() == "current\n"
        assert llmstack.main(["restart", "--current"]) == 0
        project.write(NO_MODELS)
        (STATE / "default-channel").write_text("next\n")
        assert llmstack.main(["install"]) == 0
        assert (STATE / "default-channel").read_text() == "current\n", "the upgrade is not queued any more"
    finally:
        llmstack.main(["stop"])


def test_start_gives_a_new_project_its_opencode_json_and_trusts_it(places: llmstack.Places) -> None:
    project = Project()
    try:
        assert llmstack.main(["start"]) == 0
        assert served() == f"http://127.0.0.1:{project.router_port}/v1"
        assert (STATE / "default-channel").read_text() == "current\n"
        assert llmstack.is_trusted(places, "hook")
    finally:
        llmstack.main(["stop"])


def test_host_and_port_are_seen_by_status_opencode_json_and_a_later_install(places: llmstack.Places,
                                                                           capsys: pytest.CaptureFixture[str]) -> None:
    """The peer's are seen by none of them."""
    project = Project()
    port, = free_ports(1)
    try:
        llmstack.main(["install"])
        assert llmstack.main(["start", "--port", str(port)]) == 0
        assert served() == f"http://127.0.0.1:{port}/v1"
        assert llmstack.is_trusted(places, "hook"), "it was before"
        capsys.readouterr()
        assert llmstack.main(["status", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["router"]["url"] == f"http://127.0.0.1:{port}"
        assert llmstack.main(["install"]) == 0
        assert capsys.readouterr().out.startswith("Nothing to change")
        assert served() == f"http://127.0.0.1:{port}/v1"
        llmstack.main(["stop"])
        assert llmstack.main(["start"]) == 0
        assert served() == f"http://127.0.0.1:{project.router_port}/v1"
    finally:
        llmstack.main(["stop"])


def test_listening_everywhere_is_reached_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    project = Project()
    monkeypatch.setenv("LLMSTACK_API_KEY", "a-key-of-the-test")
    try:
        assert llmstack.main(["start", "--host", "0.0.0.0"]) == 0
        assert served() == f"http://127.0.0.1:{project.router_port}/v1"
    finally:
        llmstack.main(["stop"])


def test_start_changes_no_opencode_json_that_somebody_has_changed(capsys: pytest.CaptureFixture[str]) -> None:
    Project()
    llmstack.main(["install"])
    text = (STATE / "opencode.json").read_text().replace("/v1", "/v2")
    (STATE / "opencode.json").write_text(text)
    try:
        assert llmstack.main(["start"]) == 0
        assert (STATE / "opencode.json").read_text() == text
        assert "`llmstack install` writes it anew" in capsys.readouterr().out
    finally:
        llmstack.main(["stop"])


def test_start_says_when_models_ini_has_changed_since_install(capsys: pytest.CaptureFixture[str]) -> None:
    """A context that opencode believes larger than it is would overflow."""
    Project()
    try:
        for change, said in (("", False), ("max_output_tokens = 1000\n", True)):
            with (STATE / "models.ini").open("a") as file:
                file.write(change)
            assert llmstack.main(["restart"]) == 0
            assert ("opencode.json is not as models.ini has it now" in capsys.readouterr().out) is said
        assert llmstack.main(["install"]) == 0
        capsys.readouterr()
        assert llmstack.main(["start"]) == 0
        assert "opencode.json" not in capsys.readouterr().out
    finally:
        llmstack.main(["stop"])


def test_start_trusts_no_directory_that_came_with_files(places: llmstack.Places) -> None:
    Project()
    (STATE / "AGENTS.md").write_text("do as I say")
    try:
        assert llmstack.main(["start"]) == 0
        assert served()
        assert not llmstack.is_trusted(places, "hook")
    finally:
        llmstack.main(["stop"])


PEERS_OPENCODE = """{
  "$schema": "https://opencode.ai/config.json",
  "provider": {"llama-swap": {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": "http://127.0.0.1:10101/v1"}}},
  "model": "llama-swap/auto"
}
"""


def test_install_does_not_trust_what_a_cloned_models_ini_would_run(places: llmstack.Places) -> None:
    STATE.mkdir()
    (STATE / "models.ini").write_text("[DEFAULT]\nllama_server_bin = /tmp/evil\n[a]\nrole = fast\npath = a.gguf\n")
    assert llmstack.main(["install"]) == 0
    assert llmstack.is_trusted(places, "hook")
    assert not llmstack.is_trusted(places, "run")


def test_a_directory_of_the_peer_works_here(places: llmstack.Places, capsys: pytest.CaptureFixture[str]) -> None:
    STATE.mkdir()
    peers = {"opencode.json": PEERS_OPENCODE, "AGENTS.md": "# llmstack \u2014 agent notes\n", "default-channel": "current\n",
             "models.ini": "[DEFAULT]\nrouter_host = 127.0.0.1\n[code-fast]\nrole = fast\nhf_repo = a/b\nhf_file = c.gguf\n"
                           "ctx_size = 131072 ; tokens\n", "llama-swap.yaml": "models: {}\n",
             "litellm_config.yaml": "# mine\nmodel_list: []\n"}
    for name, text in peers.items():
        (STATE / name).write_text(text, encoding="utf-8")
    assert llmstack.main(["install"]) == 0
    assert list(models(opencode())) == ["auto", "code-fast"]
    assert (STATE / "opencode.json.old").read_text() == PEERS_OPENCODE
    for name in ("AGENTS.md", "default-channel", "models.ini", "llama-swap.yaml", "litellm_config.yaml"):
        assert (STATE / name).read_text(encoding="utf-8") == peers[name], name
    assert "then `llmstack trust`" in capsys.readouterr().out
    assert not llmstack.is_trusted(places, "hook")
    assert llmstack.main(["trust"]) == 0
    assert llmstack.is_trusted(places, "hook")
    assert "litellm_config.yaml" in capsys.readouterr().out, "what is trusted with it is said"


# ---- the thin client


def once(*replies: bytes) -> Script:
    """A script that gives each connection the next of `replies`, and then waits for it to be closed."""
    left = list(replies)

    def script(connection: Connection) -> None:
        connection.read()
        if left:
            connection.send(left.pop(0))        # before it is read, the next may have come
            connection.half_close()
        connection.rest()
    return script


def install_external(url: str, *words: str) -> int:
    return llmstack.main(["install", "--external", url, *words])


def test_a_thin_client_end_to_end(places: llmstack.Places, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedUpstream(always(MODELS_INI)) as router:
        url = f"http://127.0.0.1:{router.port}"
        assert install_external(url + "/v1/") == 0
        assert router.requests[0].target == "/models.ini"
        assert sorted(p.name for p in STATE.iterdir()) == ["AGENTS.md", "default-channel", "opencode.json"], "no models.ini"
        assert (STATE / "default-channel").read_text() == f"external {url}\n"
        assert served() == url + "/v1"
        assert list(models(opencode())) == ["auto", "far", "near"]
        assert "mcp" not in opencode(), "the gateway is on the other machine"
        assert llmstack.is_trusted(places, "hook")
        before = snapshot()
        assert llmstack.main(["install"]) == 0, "without URL or option it is read again"
        assert snapshot() == before
        assert llmstack.main(["install", "--print"]) == 0
        capsys.readouterr()
        assert llmstack.main(["start", "--detach"]) == 0
        assert f"{url}/v1 is up" in capsys.readouterr().out
        assert (STATE / "active-channel").read_text() == f"external {url}\n"
        assert llmstack.main(["restart"]) == 0
        assert llmstack.main(["status"]) == 0
        out = capsys.readouterr().out
        assert url in out
        assert "far" in out
        assert "Engine" not in out
        assert llmstack.main(["status", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["router"]["url"] == url
    assert llmstack.main(["status"]) == 1
    assert "nothing listens there" in capsys.readouterr().out
    assert llmstack.main(["start"]) == 1
    assert llmstack.main(["stop"]) == 0
    assert f"There is nothing local to stop: this project uses the router at {url}" in capsys.readouterr().out
    assert not (STATE / "active-channel").exists()
    with pytest.raises(llmstack.UserError, match="nothing of it is on this machine"):
        llmstack.refuse_external(places)
    assert llmstack.main(["start", "--next"]) == 2
    assert llmstack.main(["install", "--current"]) == 0
    llmstack.refuse_external(places)
    assert (STATE / "models.ini").exists()


def test_a_models_ini_that_the_user_has_stays(capsys: pytest.CaptureFixture[str]) -> None:
    STATE.mkdir()
    (STATE / "models.ini").write_text(NO_MODELS)
    with ScriptedUpstream(always(MODELS_INI)) as router:
        assert install_external(f"http://127.0.0.1:{router.port}") == 0
    assert (STATE / "models.ini").read_text() == NO_MODELS


def test_whence_the_url_comes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedUpstream(always(MODELS_INI)) as one, ScriptedUpstream(always(MODELS_INI)) as two:
        monkeypatch.setattr(llmstack, "DEFAULT_REMOTE", f"http://127.0.0.1:{one.port}")
        assert llmstack.main(["install", "--external"]) == 0
        assert served() == f"http://127.0.0.1:{one.port}/v1", "the default"
        monkeypatch.setenv("LLMSTACK_REMOTE_URL", f"http://127.0.0.1:{two.port}")
        assert llmstack.main(["install", "--external"]) == 0
        assert served() == f"http://127.0.0.1:{two.port}/v1", "the variable before the default"
        assert install_external(f"http://localhost:{one.port}") == 0
        assert served() == f"http://localhost:{one.port}/v1", "the argument before the variable"
        assert llmstack.main(["install"]) == 0
        assert served() == f"http://127.0.0.1:{two.port}/v1", "the variable is a way in, too"


def test_a_path_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedUpstream(always(MODELS_INI)) as router:
        assert install_external(f"http://127.0.0.1:{router.port}/llm/box/") == 0
        assert router.requests[0].target == "/llm/box/models.ini"
    assert served() == f"http://127.0.0.1:{router.port}/llm/box/v1"


HTML = answer(b"<!doctype html><title>Sign in</title>", "200 OK", "Content-Type: text/html")


@pytest.mark.parametrize(("reply", "said", "hinted"), [
    (HTML, "is a web page", "login"),
    (answer(b"  <html>"), "is a web page", "login"),
    (answer(b'{"status": "ok"}', "200 OK", "Content-Type: application/json"), "is no models.ini, line 1", "llmstack router"),
    (answer(b"[a]\nmodel = x/y\n[a]\n"), "is no models.ini, line 3: [a] is there twice", "llmstack router"),
    (answer(b"\xff\xfe"), "is no models.ini, line 1: byte 0xff", "llmstack router"),
    (answer(b""), "is no models.ini, it names no tier", "llmstack router"),
    (answer(b"", "302 Found", "Location: https://login.example/?next=%2Fmodels.ini"), "redirects to https://login.example/",
     "login page"),
    (answer(b"", "301 Moved", "Location: https://box.example/llm/models.ini"), "redirects to https://box.example/llm/models.ini",
     "llmstack install --external https://box.example/llm"),
    (answer(b"", "302 Found", "Location: \x1b[2J"), "", ""),
    (answer(b"", "302 Found", "Location: \xe9[2J"), "redirects to \u00e9[2J", "login page"),
    (answer(b"\x1b]0;x\x07k = v\n"), "is no models.ini, line 1: holds the control character", "llmstack router"),
    (answer(b"", "307 Temporary Redirect"), "redirects to nowhere", "login page"),
    (answer(b'{"error": {"message": "this router wants its key"}}', "401 Unauthorized"), "wants an API key", "LLMSTACK_API_KEY"),
    (answer(b"not found", "404 Not Found"), "answers 404", "llama-server"),
    (answer(b'{"error": {"message": "models.ini holds what looks like a key\\u001b"}}', "404 Not Found"),
     "answers 404: models.ini holds what looks like a key", "llama-server"),
    (answer(b"[]", "503 Service Unavailable"), "answers 503", "router.log"),
    (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "not HTTP", "https://"),
    (b"", "not HTTP", "https://"),
])
def test_what_is_no_router_is_said_in_two_lines(reply: bytes, said: str, hinted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedUpstream(once(reply)) as router:
        assert install_external(f"http://127.0.0.1:{router.port}") == 1
    refused(capsys, said, hinted)


def refused(capsys: pytest.CaptureFixture[str], said: str, hinted: str) -> None:
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("llmstack: error: http")
    assert "/models.ini" in error
    assert said in error
    assert hint.startswith("hint: ")
    assert hinted in hint
    assert error.isprintable()
    assert not STATE.exists(), "nothing is written before the router has answered"


def test_nothing_listens(capsys: pytest.CaptureFixture[str]) -> None:
    assert install_external(f"http://127.0.0.1:{free_ports(1)[0]}") == 1
    refused(capsys, "nothing listens there", "llmstack start")


def test_a_router_that_never_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "REMOTE_PATIENCE_S", 0.2)
    with ScriptedUpstream(once()) as router:
        assert install_external(f"http://127.0.0.1:{router.port}") == 1
    refused(capsys, "no answer within 0.2 s", "firewall")


def test_an_answer_without_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "MAX_INI_BYTES", 100_000)
    with ScriptedUpstream(once(b"HTTP/1.1 200 OK\r\n\r\n" + b"#" * 150_000)) as router:
        assert install_external(f"http://127.0.0.1:{router.port}") == 1
    refused(capsys, "more than 100,000 bytes", "correct the URL")


def test_a_name_that_is_not_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert install_external("http://box.invalid:10101") == 1
    refused(capsys, "its name is not found", "address in numbers")


def test_tls_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedUpstream(lambda connection: connection.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as router:
        assert install_external(f"https://127.0.0.1:{router.port}") == 1
    refused(capsys, "does not speak TLS", "http://")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A self-signed certificate of 127.0.0.1 with its key, in one PEM file."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here")
    path = tmp_path / "self-signed.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-subj", "/CN=box", "-addext", "subjectAltName=IP:127.0.0.1",
                    "-keyout", path, "-out", f"{path}.crt"], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
    return path


def test_a_self_signed_certificate(certificate: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("LLMSTACK_API_KEY", "a-key-of-the-test")
    with ScriptedUpstream(always(MODELS_INI), tls=context) as router:
        url = f"https://127.0.0.1:{router.port}"
        assert install_external(url) == 1
        refused(capsys, "its certificate is not trusted: self", "NODE_EXTRA_CA_CERTS")
        assert router.requests == [], "the key has not been sent"
        assert install_external(url, "--insecure") == 0
        assert "NODE_EXTRA_CA_CERTS" in capsys.readouterr().err
        assert served() == url + "/v1"
        assert llmstack.main(["start"]) == 1, "no flag, no trust"
        assert llmstack.main(["start", "--insecure"]) == 0
        monkeypatch.setenv("NODE_EXTRA_CA_CERTS", str(certificate))
        assert llmstack.main(["install"]) == 0
        assert llmstack.main(["start"]) == 0
        assert llmstack.main(["status"]) == 0
        assert {r.header("authorization") for r in router.requests} == {"Bearer a-key-of-the-test"}
    monkeypatch.setenv("NODE_EXTRA_CA_CERTS", str(certificate) + ".missing")
    assert install_external(url) == 2
    assert "holds no certificates" in capsys.readouterr().err


def test_plain_http_to_a_tls_port(certificate: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ScriptedUpstream(always(MODELS_INI), tls=context) as router:
        assert install_external(f"http://127.0.0.1:{router.port}") == 1
    refused(capsys, "", "")


def test_a_cloned_thin_client_is_asked_about_before_a_key_goes_out(monkeypatch: pytest.MonkeyPatch,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMSTACK_API_KEY", "a-key-of-the-test")
    STATE.mkdir()
    with ScriptedUpstream(always(MODELS_INI)) as router:
        (STATE / "default-channel").write_text(f"external http://127.0.0.1:{router.port}\n")
        for words in (["start"], ["restart"], ["install"], ["status"], ["why", "-"]):
            assert llmstack.main(words) == 1
            assert "not trusted on this machine" in "".join(capsys.readouterr())
        assert router.connections == 0
        assert llmstack.main(["stop"]) == 0
        llmstack.trust_project(llmstack.find_places(os.environ))
        assert llmstack.main(["start"]) == 0
        assert router.requests[0].header("authorization") == "Bearer a-key-of-the-test"


def test_why_asks_the_ladder_of_the_router(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedUpstream(always(MODELS_INI)) as router:
        install_external(f"http://127.0.0.1:{router.port}")
        capsys.readouterr()
        Path("body.json").write_text('{"model": "auto", "messages": []}')
        assert llmstack.main(["why", "body.json"]) == 0
    assert capsys.readouterr().out.startswith("far. ")


def test_start_says_when_the_tiers_have_changed_over_there(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedUpstream(once(MODELS_INI, answer(INI.replace("100k", "50k").encode()))) as router:
        install_external(f"http://127.0.0.1:{router.port}")
        assert llmstack.main(["start"]) == 0
    assert "`llmstack install` writes opencode.json anew" in capsys.readouterr().out


# ---- two projects, two hosts


@pytest.fixture
def second(tmp_path: Path) -> Path:
    path = tmp_path / "second"
    path.mkdir()
    return path


def test_two_projects_on_one_host(second: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first = Project()
    url = f"http://127.0.0.1:{first.router_port}"
    try:
        assert llmstack.main(["start"]) == 0
        pids = (first.pid("router"),)
        with monkeypatch.context() as inside:
            inside.chdir(second)
            assert install_external(url) == 0
            assert llmstack.main(["start"]) == 0
            assert llmstack.main(["status"]) == 0
            capsys.readouterr()
            assert llmstack.main(["stop"]) == 0
            assert "nothing local to stop" in capsys.readouterr().out
            assert json.loads(get(served() + "/models")[1])["data"][0]["id"] == "auto"
        assert all(map(alive, pids)), "the second project's stop has not touched them"
        assert llmstack.main(["status"]) == 0
    finally:
        llmstack.main(["stop"])


def test_a_project_is_no_client_of_its_own_router(capsys: pytest.CaptureFixture[str]) -> None:
    project = Project()
    try:
        llmstack.main(["start"])
        assert install_external(f"http://localhost:{project.router_port}") == 1
        assert "this project's own router" in capsys.readouterr().err
        assert llmstack.main(["status"]) == 0
        assert (STATE / "default-channel").read_text() == "current\n"
    finally:
        llmstack.main(["stop"])


def test_daemons_are_stopped_before_a_project_becomes_a_thin_client(capsys: pytest.CaptureFixture[str]) -> None:
    """The peer leaves them running, and no command finds them any more."""
    project = Project()
    try:
        llmstack.main(["start"])
        pids = (project.pid("router"),)
        assert install_external(f"http://127.0.0.1:{free_ports(1)[0]}") == 1
        assert all(map(alive, pids)), "the other router is not there: nothing has changed"
        with ScriptedUpstream(always(MODELS_INI)) as router:
            capsys.readouterr()
            assert install_external(f"http://127.0.0.1:{router.port}") == 0
        assert capsys.readouterr().out.startswith("Stopping this project's daemons")
        assert not any(map(alive, pids))
        assert not list(STATE.glob("*.pid"))
    finally:
        llmstack.main(["stop"])


def test_stop_finds_daemons_of_a_project_that_another_program_has_repinned(capsys: pytest.CaptureFixture[str]) -> None:
    project = Project()
    llmstack.main(["start"])
    pids = (project.pid("router"),)
    (STATE / "default-channel").write_text("external http://127.0.0.1:10101\n")
    assert llmstack.main(["stop"]) == 0
    assert "Stopped." in capsys.readouterr().out
    assert not any(map(alive, pids))


def test_a_router_with_a_key(second: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    project = Project()
    monkeypatch.setenv("LLMSTACK_API_KEY", "a-key-of-the-test")
    try:
        assert llmstack.main(["start"]) == 0
        capsys.readouterr()
        assert opencode()["provider"]["llama.cpp"]["options"]["apiKey"] == "{env:LLMSTACK_API_KEY}"
        with monkeypatch.context() as another_terminal:
            another_terminal.delenv("LLMSTACK_API_KEY")
            assert llmstack.main(["install"]) == 0
            assert opencode()["provider"]["llama.cpp"]["options"]["apiKey"], "the router wants it all the same"
            capsys.readouterr()
        with monkeypatch.context() as inside:
            inside.chdir(second)
            url = f"http://127.0.0.1:{project.router_port}"
            for key, said in (("", "wants an API key"), ("another", "refuses this LLMSTACK_API_KEY")):
                inside.setenv("LLMSTACK_API_KEY", key)
                assert install_external(url) == 1
                refused(capsys, said, "LLMSTACK_API_KEY")
            inside.setenv("LLMSTACK_API_KEY", "a-key-of-the-test")
            assert install_external(url) == 0
            assert opencode()["provider"]["llama.cpp"]["options"]["apiKey"] == "{env:LLMSTACK_API_KEY}"
            assert llmstack.main(["start"]) == 0
            assert llmstack.main(["status"]) == 0
            request = urllib.request.Request(served() + "/models", headers={"Authorization": "Bearer a-key-of-the-test"})
            with urllib.request.urlopen(request, timeout=20) as listing:
                assert json.loads(listing.read())["data"][0]["id"] == "auto"
            with pytest.raises(urllib.error.HTTPError, match="401"):
                get(served() + "/models")
    finally:
        llmstack.main(["stop"])
    assert not any(b"a-key-of-the-test" in data for _, data in snapshot().values())


def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=check)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, joined by a cable."""
    names = f"llmstack-desk-{os.getpid()}", f"llmstack-lap-{os.getpid()}"
    if not (sys.platform == "linux" and shutil.which("ip") and os.geteuid() == 0):
        pytest.skip("network namespaces need Linux, iproute2 and root")
    try:
        for name in names:
            if run("ip", "netns", "add", name, check=False).returncode:
                pytest.skip("no network namespace can be made here")
        run("ip", "link", "add", "desk", "netns", names[0], "type", "veth", "peer", "name", "lap", "netns", names[1])
        for name, link, address in ((names[0], "desk", "10.77.0.1/24"), (names[1], "lap", "10.77.0.2/24")):
            run("ip", "-n", name, "address", "add", address, "dev", link)
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            run("ip", "netns", "delete", name, check=False)


CHAT = """
import json, os, sys, urllib.request
body = {"model": "auto", "max_tokens": 30, "messages": [{"role": "user", "content": "hello"}]}
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["LLMSTACK_API_KEY"]}
request = urllib.request.Request(sys.argv[1] + "/chat/completions", json.dumps(body).encode(), headers)
print(json.loads(urllib.request.urlopen(request, timeout=30).read())["choices"][0]["message"]["content"])
"""


def test_two_hosts(hosts: tuple[str, str], second: Path, real_data: Path, noise: Path,  # noqa: F811
                   monkeypatch: pytest.MonkeyPatch) -> None:
    """A desktop with real llama.cpp that serves the network, a laptop with nothing but the program; default ports on both."""
    desk, lap = (("ip", "netns", "exec", name, sys.executable, PROGRAM) for name in hosts)
    STATE.mkdir()
    (STATE / "models.ini").write_text("[DEFAULT]\nengine = embedded\n" + two_tiers(noise))
    monkeypatch.setenv("LLMSTACK_API_KEY", "a-key-of-the-test")
    try:
        run(*desk, "trust")
        run(*desk, "start", "--host", "0.0.0.0")
        with monkeypatch.context() as laptop:
            laptop.chdir(second)
            laptop.setenv("XDG_DATA_HOME", str(second / "data"))
            assert "nothing listens there" in run(*lap, "install", "--external", check=False).stderr
            assert "10.77.0.1:10101" in run(*lap, "install", "--external", "http://10.77.0.1:10101").stdout
            assert served() == "http://10.77.0.1:10101/v1"
            assert "http://10.77.0.1:10101/v1 is up" in run(*lap, "start").stdout
            assert len(run(*lap[:4], sys.executable, "-c", CHAT, served()).stdout.split()) > 3
            assert "loaded" in run(*lap, "status").stdout
            run("ip", "-n", hosts[0], "link", "set", "desk", "down")
            assert run(*lap, "status", check=False).returncode == 1
    finally:
        run(*desk, "stop", check=False)
