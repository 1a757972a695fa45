"""Hosted tiers through LiteLLM: litellm_config.yaml, credentials, the real proxy before a scripted provider."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Iterator, NamedTuple
from urllib import error, request

import pytest
import yaml

import llmstack
from llmstack import Config, Tier, UserError
from tests.conftest import ROOT
from tests.noise_model import render_noise_gguf
from tests.test_environments import make_environment
from tests.test_http import ELSEWHERE, LOOPBACK

sys.path.insert(0, str(ROOT / "share" / "guests"))

import litellm_proxy
import litellm_yaml

KEY = "sk-scripted-0123456789abcdef0123"
# Each start of the real proxy takes seconds of a processor: one process has all its tests.
pytestmark = pytest.mark.xdist_group("litellm")

# ---- what is written


def hosted(**more: Any) -> Tier:
    return Tier("code-ultra", role="ultra", backend="litellm", model="anthropic/claude-opus-4-20250514")._replace(**more)


HERE = (sys.executable, "litellm_proxy.py")     # this Python has PyYAML, as LiteLLM's has


def written(config: Config, program: tuple[str, ...] = HERE) -> tuple[str, list[str]]:
    """(litellm_config.yaml after a write, what was said)."""
    places = llmstack.find_places(os.environ)
    lines: list[str] = []
    llmstack.write_litellm_config(places, config, program, lines.append)
    return llmstack.read_text(llmstack.litellm_config_path(places)), lines


def test_the_seed_has_an_entry_for_each_hosted_tier_and_its_next() -> None:
    text, said = written(Config(tiers=(hosted(model_next="anthropic/b"), Tier("code-fast", role="fast"))))
    assert yaml.safe_load(text) == {
        "litellm_settings": {"drop_params": True, "request_timeout": 120},
        "router_settings": {"disable_cooldowns": True, "num_retries": 0},
        "model_list": [{"model_name": "code-ultra", "litellm_params": {"model": "anthropic/claude-opus-4-20250514"}},
                       {"model_name": "code-ultra_next", "litellm_params": {"model": "anthropic/b"}}]}
    assert said[0].startswith("Wrote ")
    assert not written(Config(tiers=(hosted(model_next="anthropic/b"),)))[1], "nothing to add, nothing to say"


def test_no_hosted_tier_no_file() -> None:
    assert written(Config(tiers=(Tier("code-fast"),))) == ("", [])


@pytest.mark.parametrize(("data", "why"), [
    (b"model_list: null\n", "model_list is no list"),
    (b"model_list:\n- model_name: a\n  litellm_params: {model: @}\n", "LiteLLM's parser does not read it"),
    (b"# \xff\n", "it is not UTF-8"),
    (b"# \xc3\xa4\r\nmodel_list: []\n---\na: 1\n", "several documents"),
])
def test_a_file_that_cannot_be_extended_stays_and_the_stub_is_shown(data: bytes, why: str) -> None:
    path = Path(".llmstack/litellm_config.yaml")
    path.parent.mkdir()
    path.write_bytes(data)
    said = written(Config(tiers=(hosted(),)))[1]
    assert path.read_bytes() == data
    assert "is left alone (" in said[0]
    assert why in said[0]
    assert said[0].endswith("  - model_name: code-ultra\n    litellm_params:\n      model: anthropic/claude-opus-4-20250514")


def test_an_extended_file_differs_in_nothing_else() -> None:
    path = Path(".llmstack/litellm_config.yaml")
    path.parent.mkdir()
    path.write_bytes("\ufeff# ä\r\nmodel_list:\r\n- model_name: a\r\n  litellm_params: {model: x/y}\r\n# z".encode())
    written(Config(tiers=(hosted(),)))
    assert path.read_bytes() == (
        "\ufeff# ä\r\nmodel_list:\r\n- model_name: a\r\n  litellm_params: {model: x/y}\r\n- model_name: code-ultra\r\n"
        "  litellm_params:\r\n    model: anthropic/claude-opus-4-20250514\r\n# z").encode()


def test_without_litellm_an_existing_file_stays() -> None:
    """Its parser is not here. The stub is shown where a name is nowhere in the file."""
    path = Path(".llmstack/litellm_config.yaml")
    path.parent.mkdir()
    path.write_text("model_list: []\n")
    text, said = written(Config(tiers=(hosted(),)), ())
    assert text == "model_list: []\n"
    assert "is not installed" in said[0]
    assert "- model_name: code-ultra" in said[0]
    path.write_text("model_list: [{model_name: code-ultra, litellm_params: {model: a/b}}]\n")
    assert written(Config(tiers=(hosted(),)), ())[1] == []


def test_a_file_that_cannot_be_read_is_not_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(".llmstack/litellm_config.yaml")
    path.parent.mkdir()
    path.write_text("model_list: []\n")
    monkeypatch.setattr(llmstack, "_read_bytes", lambda path: b"")         # as for one without permission
    text, said = written(Config(tiers=(hosted(),)))
    assert text == "model_list: []\n"
    assert "cannot be read" in said[0]


@pytest.mark.parametrize("code", ["import time; time.sleep(60)", "print('[]')", "1 / 0", "print('{')"])
def test_a_parser_that_does_not_answer_is_no_error(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "guest_command", lambda python, name: [python, "-c", code])
    monkeypatch.setattr(llmstack, "YAML_TIMEOUT_S", 1)
    assert list(llmstack.ask_litellm_yaml(HERE, "", ())) == ["why"]


def test_a_file_made_to_be_slow_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aliases of aliases: ten lines are as long as ten billion."""
    levels = "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    monkeypatch.setattr(llmstack, "YAML_TIMEOUT_S", 1)
    answer = llmstack.ask_litellm_yaml(HERE, f"a0: &a0 [x, y]\n{levels}", [("a", "b")])
    assert answer["why"].endswith("does not read it")


# ---- what is read


def test_the_file_is_read_once_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    places = llmstack.find_places(os.environ)
    path = Path(llmstack.litellm_config_path(places))
    assert llmstack.read_litellm_file(places, {}) == ({}, frozenset()), "no file"
    path.parent.mkdir()
    path.write_text("model_list: [{model_name: a, litellm_params: {model: x/y, api_key: a-literal-key}}]\n")
    assert llmstack.read_litellm_file(places, {}) is None, "no LiteLLM, so no parser"
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: HERE)
    known = llmstack.read_litellm_file(places, {})
    assert known is not None
    assert known.entries == {"a": llmstack.LitellmEntry("x/y", [], has_key=True)}
    cache = Path(places.data, "litellm.json")
    assert "a-literal-key" not in cache.read_text()
    if os.name != "nt":
        assert cache.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: pytest.fail("asked twice"))
    assert llmstack.read_litellm_file(places, {}) == known
    path.write_text("model_list: []\nenvironment_variables: {NAME: x}\n")
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: HERE)
    assert llmstack.read_litellm_file(places, {}) == ({}, frozenset({"NAME"}))


@pytest.mark.parametrize("damage", ["[]", "{", '{"x": 1}', "null"])
def test_a_damaged_record_of_it_is_asked_for_anew(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    places = llmstack.find_places(os.environ)
    path = Path(llmstack.litellm_config_path(places))
    path.parent.mkdir()
    path.write_text("model_list: []\n")
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: HERE)
    first = llmstack.read_litellm_file(places, {})
    cache = Path(places.data, "litellm.json")
    cache.write_text(json.dumps({key: json.loads('"x"') for key in json.loads(cache.read_text())}) if damage == "null"
                     else damage)
    assert llmstack.read_litellm_file(places, {}) == first
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: pytest.fail("not mended"))
    assert llmstack.read_litellm_file(places, {}) == first


def test_the_last_eight_versions_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    places = llmstack.find_places(os.environ)
    path = Path(llmstack.litellm_config_path(places))
    path.parent.mkdir()
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: HERE)
    asked: list[str] = []

    def answer(program: Any, text: str, wanted: Any) -> dict[str, Any]:
        asked.append(text)
        return {"entries": {}, "environment": []}

    monkeypatch.setattr(llmstack, "ask_litellm_yaml", answer)
    for number in (*range(10), 9, 2, 1):
        path.write_text(f"# {number}\n")
        llmstack.read_litellm_file(places, {})
    assert asked == [f"# {n}\n" for n in (*range(10), 1)]


def test_a_changed_model_is_said_and_the_entry_stays() -> None:
    before, _ = written(Config(tiers=(hosted(),)))
    after, said = written(Config(tiers=(hosted(model="openai/gpt-4o"),)))
    assert after == before
    assert said == ["Note: code-ultra: models.ini says openai/gpt-4o, litellm_config.yaml anthropic/claude-opus-4-20250514,"
                    " which is what is asked"]


def test_what_is_written_is_trusted_only_where_the_file_was() -> None:
    places = llmstack.find_places(os.environ)
    Path(places.state).mkdir()
    Path(places.state, "AGENTS.md").write_text("do as I say")
    written(Config(tiers=(hosted(),)))
    assert llmstack.is_trusted(places, "run")
    assert not llmstack.is_trusted(places, "hook"), "the rest of the directory is another matter"
    Path(llmstack.litellm_config_path(places)).write_text("model_list: []\n")       # somebody else's
    written(Config(tiers=(hosted(),)))
    assert not llmstack.is_trusted(places, "run")
    with pytest.raises(UserError, match=r"not trusted here.* named by litellm_config\.yaml"):
        llmstack.check_run_trust(places)


# ---- credentials


@pytest.mark.parametrize(("model", "env", "yaml_text", "expected"), [
    ("anthropic/x", {}, "", ("ANTHROPIC_API_KEY",)),
    ("anthropic/x", {"ANTHROPIC_API_KEY": "k"}, "", ()),
    ("anthropic/x", {"ANTHROPIC_API_KEY": " "}, "", ("ANTHROPIC_API_KEY",)),
    ("claude-3-opus", {}, "", ("ANTHROPIC_API_KEY",)),
    ("gpt-4o", {}, "", ("OPENAI_API_KEY",)),
    ("gemini/x", {"GOOGLE_API_KEY": "k"}, "", ()),
    ("bedrock/x", {}, "", ("AWS_ACCESS_KEY_ID",)),
    ("bedrock/x", {"AWS_PROFILE": "p"}, "", ()),
    ("azure/x", {"AZURE_API_KEY": "k"}, "", ("AZURE_API_BASE",)),
    ("ollama/x", {}, "", ()),
    ("openai/x", {}, "api_key: os.environ/MINE", ("MINE",)),
    ("openai/x", {"MINE": "k"}, "api_key: os.environ/MINE", ()),
    ("openai/x", {}, "api_key: none", ()),
    ("openai/x", {"OPENAI_API_KEY": "k"}, "api_key: os.environ/MINE # os.environ/OTHER", ("MINE",)),
    ("openai/x", {}, "model: groq/y", ("GROQ_API_KEY",)),
    ("openai/x", {}, "<<: *defaults", ()),                  # an anchor that is nowhere: no YAML
    ("openai/x", {}, "<<: {api_key: os.environ/MERGED}", ("MERGED",)),
    ("azure/x", {"AZURE_API_KEY": "k"}, "api_base: https://x.example", ()),
    ("openai/x", {}, "weight: 2", ("OPENAI_API_KEY",)),
])
def test_which_credentials_a_tier_lacks(model: str, env: dict[str, str], yaml_text: str, expected: tuple[str, ...]) -> None:
    if yaml_text:
        yaml_text = f"model_list:\n- model_name: code-ultra\n  litellm_params:\n    {yaml_text}\n- model_name: b\n" \
                    "  litellm_params: {api_key: os.environ/B}\n"
    file = llmstack.parse_litellm_file(litellm_yaml.answer(yaml_text, ()))
    assert llmstack.tier_credentials(hosted(model=model), env, file) == expected


def test_a_variable_that_the_file_sets_is_not_missing() -> None:
    text = "environment_variables: {OPENAI_API_KEY: x}\n"
    file = llmstack.parse_litellm_file(litellm_yaml.answer(text, ()))
    assert llmstack.tier_credentials(hosted(model="openai/x"), {}, file) == ()


def test_the_next_channel_has_credentials_of_its_own() -> None:
    tier = hosted(model_next="groq/x").on_channel("next")
    file = llmstack.LitellmFile({}, frozenset())
    assert llmstack.tier_credentials(tier, {"ANTHROPIC_API_KEY": "k"}, file) == ("GROQ_API_KEY",)


def test_the_proxy_starts_at_once_where_the_channel_that_runs_has_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: ("x",))
    config = Config(tiers=(hosted(model="groq/a", model_next="openai/b"),))
    for channel in ("current", "next"):
        plan = llmstack.plan_proxy(llmstack.find_places(os.environ), config.on_channel(channel),
                                   {"OPENAI_API_KEY": "x"})
        assert plan is not None
        assert plan.preload == (channel == "next")


def test_llama_server_gets_no_credentials_and_the_proxy_no_database() -> None:
    env = {"ANTHROPIC_API_KEY": "k", "AWS_SECRET_ACCESS_KEY": "k", "HF_TOKEN": "h", "PATH": "p", "DATABASE_URL": "postgres://",
           "LITELLM_LOG": "INFO"}
    assert llmstack.without_credentials(env) == {"HF_TOKEN": "h", "PATH": "p", "DATABASE_URL": "postgres://"}
    proxy = llmstack.litellm_env(env)
    assert proxy["ANTHROPIC_API_KEY"] == "k"
    assert proxy["LITELLM_LOG"] == "INFO"
    assert proxy["LITELLM_LOCAL_MODEL_COST_MAP"] == "True"
    assert "DATABASE_URL" not in proxy


# ---- which LiteLLM


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def proxy_command(python: str) -> tuple[str, ...]:
    return tuple(llmstack.guest_command(python, "litellm_proxy"))


def test_which_litellm_is_taken(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    assert llmstack.find_litellm({}, data) == ()
    with pytest.raises(UserError, match="no program"):
        llmstack.find_litellm({"LITELLM_BIN": "/nowhere"}, data)
    assert llmstack.find_litellm({"LITELLM_BIN": sys.executable}, data) == proxy_command(sys.executable)
    make_environment(llmstack.LITELLM, data)
    python = llmstack.environment_program(llmstack.LITELLM, data)
    assert llmstack.find_litellm({}, data) == proxy_command(python)


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
@pytest.mark.parametrize("head", [
    "#!{python}", "#! {python} -sE", "#!/usr/bin/env {python}", "#!/usr/bin/env -S {python} -E", "#!/usr/bin/env python3",
    "#!/bin/sh\n'''exec' \"{spaced}\" \"$0\" \"$@\"\n' '''", "#!/bin/sh\n'''exec' '{spaced}' \"$0\" \"$@\"\n' '''",
    "#!/bin/sh\n'''exec' {python} \"$0\" \"$@\"\n' '''",
])
def test_the_python_of_an_installed_litellm(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip, uv and pipx write them, below paths with spaces and too long for the kernel, too."""
    spaced = tmp_path / "a b" / "bin" / "python3"
    spaced.parent.mkdir(parents=True)
    spaced.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(spaced.parent))
    program = script(tmp_path / "litellm", head.format(python=sys.executable, spaced=spaced) + "\nimport re\n")
    found = llmstack.find_litellm({"LITELLM_BIN": program}, "/nowhere")
    expected = spaced if "{spaced}" in head or "env python3" in head else sys.executable
    assert found == proxy_command(str(expected))


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
def test_the_python_beside_a_program_that_may_be_moved(tmp_path: Path) -> None:
    """uv's relocatable environments; and tools are links into their environment."""
    inside = tmp_path / "env" / "bin"
    inside.mkdir(parents=True)
    (inside / "python").symlink_to(sys.executable)
    head = "#!/bin/sh\n'''exec' \"$(dirname -- \"$(realpath -- \"$0\")\")\"/'python' \"$0\" \"$@\"\n' '''\n"
    script(inside / "litellm", head)
    (tmp_path / "litellm").symlink_to(inside / "litellm")
    found = llmstack.find_litellm({"LITELLM_BIN": str(tmp_path / "litellm")}, "/nowhere")
    assert found == proxy_command(str(inside / "python"))


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
@pytest.mark.parametrize("text", ["#!/bin/sh\nexec docker run litellm\n", "#!/nowhere/python3\n", "\x7fELF", ""])
def test_a_litellm_that_would_run_unguarded_is_refused(text: str, tmp_path: Path) -> None:
    program = script(tmp_path / "litellm", text)
    with pytest.raises(UserError, match=r"LITELLM_BIN names .* which Python it runs in") as failure:
        llmstack.find_litellm({"LITELLM_BIN": program}, "/nowhere")
    assert "name that Python in LITELLM_BIN" in failure.value.hint


# ---- the guard before it


def test_a_configuration_that_changed_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """LiteLLM may start long after `start` looked at trust; a pull may have come between."""
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} is run"))
    places = llmstack.Places("/p", str(tmp_path), "/models.ini", "/d")
    config = Path(llmstack.litellm_config_path(places))
    config.parent.mkdir(exist_ok=True)
    config.write_text("model_list: []\n")
    command = llmstack.litellm_command((), places, 1)
    config.write_text("litellm_settings: {callbacks: evil.module}\n")
    assert litellm_proxy.main(command) == 1
    assert "`llmstack restart` takes it in" in capsys.readouterr().out


def test_the_project_is_no_place_for_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM puts its working directory on sys.path, and the one two above; a clone may hold a prisma.py."""
    seen: list[tuple[str, str]] = []

    class Module:
        app = SimpleNamespace(add_middleware=lambda guard: seen.append((guard.__name__, os.getcwd())))
        run_server = staticmethod(lambda: seen.append((" ".join(sys.argv), os.getcwd())))

    def import_module(name: str) -> Any:
        seen.append((name, os.getcwd()))
        return Module

    monkeypatch.setattr("importlib.import_module", import_module)
    monkeypatch.setattr(sys, "argv", [])
    here, there = os.getcwd(), os.path.dirname(sys.executable)
    (tmp_path / "c.yaml").write_bytes(b"model_list: []")
    digest, file = hashlib.sha256(b"model_list: []").hexdigest(), str(tmp_path / "c.yaml")
    assert litellm_proxy.main([digest, "--config", file, "--port", "1"]) == 0
    assert seen == [("litellm.proxy.proxy_cli", there), ("litellm.proxy.proxy_server", there),
                    ("WebGuard", here), (f"litellm --config {file} --port 1", here)]


HOSTS = ["", *LOOPBACK, *ELSEWHERE]
ORIGINS = ["", "null", "http://localhost:3000", "https://127.0.0.1:8443", "http://[::1]:5173", "https://evil.example",
           "http://127.0.0.1.evil.example", "http://evil.example://localhost", "file://", "HTTP://LOCALHOST"]


@pytest.mark.parametrize("site", ["", "none", "same-origin", "same-site", "cross-site", "Cross-Site"])
def test_the_guard_has_the_routers_rule(site: str) -> None:
    for host in HOSTS:
        for origin in ORIGINS:
            given = {"host": host, "origin": origin, "sec-fetch-site": site}
            headers = {name: value for name, value in given.items() if value}
            fields = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
            asked = llmstack.Request("GET", "/", 1, (), True, False, False, fields, 0)
            ours = llmstack.refusal(asked, True).replace("this router", "LiteLLM")
            ours = re.split(r", or name it|; allowed_origins", ours)[0]     # our keys are not LiteLLM's
            assert litellm_proxy.refusal(headers) == ours, headers


@pytest.mark.parametrize(("kind", "headers", "expected"), [
    ("lifespan", None, ["passed"]),
    ("http", [(b"Host", b"127.0.0.1")], ["passed"]),
    ("http", [(b"host", b"evil.example"), (b"host", b"127.0.0.1")], ["http.response.start 403", "http.response.body"]),
    ("http", [(b"host", b"\xff")], ["http.response.start 403", "http.response.body"]),
    ("websocket", [(b"origin", b"https://evil.example")], ["websocket.close"]),
])
def test_what_the_guard_lets_through(kind: str, headers: Any, expected: list[str]) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append("passed")

    async def send(message: Any) -> None:
        seen.append(" ".join(str(message[key]) for key in ("type", "status") if key in message))

    scope = {"type": kind} if headers is None else {"type": kind, "headers": headers}
    asyncio.run(litellm_proxy.WebGuard(app)(scope, None, send))
    assert seen == expected


# ---- code-ultra


def test_code_ultra_is_switched_on_where_litellm_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fenced = llmstack.read_resource("models.ini")
    assert llmstack.with_ultra(fenced, {}, "/nowhere") == fenced
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: ("x",))
    text = llmstack.with_ultra(fenced, {}, "/nowhere").decode()
    config, warnings = llmstack.parse_models_ini(text)
    assert not warnings
    assert config.ladder[0] == config.by_role("ultra")
    ultra = config.by_role("ultra")
    assert ultra is not None
    assert (ultra.name, ultra.backend, ultra.ctx_size, ultra.sampler) == ("code-ultra", "litellm", 24000, ())
    assert "AUTO-ENABLE" not in text
    assert llmstack.unfence_ultra(text) == text
    assert llmstack.unfence_ultra(fenced.decode().replace("\n", "\r\n")) == text.replace("\n", "\r\n")


def test_a_hosted_tier_without_litellm_is_said_and_auto_goes_around_it() -> None:
    places = llmstack.find_places(os.environ)
    config = Config(tiers=(hosted(), Tier("code-smart", role="agent", path="x")))
    assert llmstack.unserved_hosted(places, config, {}) == {"code-ultra": llmstack.INSTALL_LITELLM}
    asked: list[str] = []
    why = llmstack.prepare_hosted(places._replace(env={}), config, llmstack.say,
                                  lambda question: bool(asked.append(question)))
    assert why == llmstack.INSTALL_LITELLM
    assert asked[0].startswith("Hosted tiers need LiteLLM's proxy")
    assert Path(".llmstack/litellm_config.yaml").exists(), "the entries do not depend on it"
    assert llmstack.proxy_tier(config._replace(local_only=True)) is None


def test_install_litellm_does_nothing_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: ("/here/litellm",))
    assert llmstack.main(["install-litellm"]) == 0
    assert "/here/litellm" in capsys.readouterr().out
    done: list[str] = []
    monkeypatch.setattr(llmstack, "install_environment", lambda wanted, data, say: done.append(wanted.name))
    assert llmstack.main(["install-litellm", "--force"]) == 0
    assert done == ["litellm"]


def test_llama_swap_keeps_the_proxy_beside_everything() -> None:
    smart, plan = Tier("code-smart", role="agent", path="/x"), Tier("plan", role="plan", path="/y")
    tier = llmstack.proxy_tier(Config(tiers=(hosted(aliases=("opus",), model_next="a/b"),)))
    assert tier is not None
    proxy = llmstack.ProxyPlan(tier, ("py", "a b"), 10103, llmstack.PROXY_HEALTH, True)
    swap = llmstack.SwapPlan(Config((smart, plan)), llmstack.Binary(("x",)), llmstack.posix_quote, proxy=proxy)
    value = yaml.safe_load(llmstack.render_llama_swap_yaml(swap))
    model = value["models"]["litellm_proxy"]
    assert model["aliases"] == ["code-ultra", "code-ultra_next", "opus"]
    assert (model["proxy"], model["checkEndpoint"], model["ttl"]) == ("http://127.0.0.1:10103", "/health/liveliness", 0)
    assert model["cmd"] == "py 'a b'\n"
    assert all(members.endswith(" & l") for members in value["matrix"]["sets"].values())
    assert value["hooks"]["on_startup"]["preload"] == ["litellm_proxy"]
    alone = yaml.safe_load(llmstack.render_llama_swap_yaml(swap._replace(config=Config())))
    assert alone["matrix"]["sets"] == {"a_hosted": "l"}


# ---- the embedded engine and its proxy


FAKE = """#!/bin/sh
exec {python} -c '
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
    def log_message(self, *a): pass
{fail}
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
' "$@"
"""


@pytest.fixture
def engine(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[llmstack.Engine]:
    fail = getattr(request, "param", "")
    program = script(tmp_path / "litellm", FAKE.format(python=sys.executable, fail=fail))
    config = Config(tiers=(hosted(aliases=("opus",)), Tier("code-smart", role="agent", path="/nowhere", size_gb=1)),
                    litellm_port=free_ports(1)[0])
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: (program,))
    proxy = llmstack.plan_proxy(llmstack.find_places(os.environ), config, {"ANTHROPIC_API_KEY": "k"})
    assert proxy is not None
    assert proxy.preload
    engine = llmstack.Engine(config, lambda tier, port: [], llmstack.Log(str(tmp_path / "log")), lambda n: str(tmp_path / n),
                             llmstack.EnginePlan(os.environ, 2.0, proxy=proxy))
    yield engine
    engine.close()


def load(engine: llmstack.Engine, name: str) -> None:
    model = engine.find(name)
    assert model is not None
    ticket = engine.enqueue(model)
    try:
        while not engine.try_enter(ticket):
            engine.wait(1.0)
        engine.leave(model)
    finally:
        engine.dequeue(ticket)


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
def test_the_proxy_is_a_model_of_no_size_that_nothing_evicts(engine: llmstack.Engine) -> None:
    assert engine.find("opus") is engine.find("code-ultra") is engine.find("litellm_proxy")
    load(engine, "opus")
    assert [(r["model"], r["state"]) for r in engine.running()] == [("litellm_proxy", "ready")]
    with pytest.raises(llmstack.LoadError, match="there is no /nowhere"):
        load(engine, "code-smart")
    assert [(r["model"], r["state"]) for r in engine.running()] == [("litellm_proxy", "ready")]


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
@pytest.mark.parametrize("engine", ["sys.exit(\"no such config\")"], indirect=True)
def test_a_proxy_that_does_not_start_says_why(engine: llmstack.Engine) -> None:
    with pytest.raises(llmstack.LoadError, match="litellm_proxy: its server exited with 1 while loading:\nno such config"):
        load(engine, "code-ultra")


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
def test_a_stranger_on_the_proxys_port_is_named(engine: llmstack.Engine) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", engine.config.litellm_port))
        stranger.listen()
        with pytest.raises(llmstack.LoadError, match=f"port {engine.config.litellm_port} is taken by"):
            load(engine, "code-ultra")


# ---- the real proxy, before a scripted provider


class Provider(BaseHTTPRequestHandler):
    """OpenAI's and Anthropic's shapes; the last message's text says what to answer."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[tuple[str, dict[str, str], Any]]] = []
    left: ClassVar[threading.Event] = threading.Event()

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        said = body["messages"][-1]["content"]
        said = said if isinstance(said, str) else said[-1].get("text", "")
        if said[:3].isdigit():
            self.json(int(said[:3]), {"error": {"message": f"scripted {said}", "type": "scripted", "code": said}})
        elif self.path.endswith("/messages"):
            self.json(200, {"id": "m", "type": "message", "role": "assistant", "model": body["model"], "stop_reason": "end_turn",
                            "content": [{"type": "text", "text": "Bonjour"}], "usage": {"input_tokens": 1, "output_tokens": 1}})
        elif body.get("stream"):
            self.stream(body["model"], said)
        else:
            calls = [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}]
            message = {"role": "assistant", "content": None, "tool_calls": calls} if body.get("tools") else \
                {"role": "assistant", "content": "Hello"}
            self.json(200, {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"], "usage": {
                "prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}, "choices": [
                    {"index": 0, "message": message, "finish_reason": "tool_calls" if body.get("tools") else "stop"}]})

    def stream(self, model: str, said: str) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        for delta, reason in (({"content": "Hel"}, None), ({"content": "lo"}, None), ({}, "stop")):
            event = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": model,
                     "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
            self.chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
            if said == "cut":
                return
            if said == "hang":
                self.connection.settimeout(30)
                if self.connection.recv(1) == b"":
                    self.left.set()
                return
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def json(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("retry-after", "7")
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def free_ports(count: int) -> list[int]:
    socks = [socket.socket() for _ in range(count)]
    for sock in socks:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


class Answer(NamedTuple):
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Stack:
    """A whole stack in a process group of its own: two hosted tiers through LiteLLM, and a local one."""

    def __init__(self, directory: Path, engine: str, provider: int) -> None:
        shared = os.environ["LLMSTACK_TEST_DATA"]
        self.directory, self.engine = directory, engine
        self.router, self.engine_port, self.litellm = free_ports(3)
        self.state = directory / "project" / ".llmstack"
        self.state.mkdir(parents=True)
        data = directory / "data"
        data.mkdir()
        for name in ("llama-cpp", "litellm"):
            (data / name).symlink_to(Path(shared) / name, target_is_directory=True)
        noise = directory / "noise.gguf"
        noise.write_bytes(render_noise_gguf())
        (self.state / "models.ini").write_text(f"""
[DEFAULT]
engine = {engine}
router_port = {self.router}
engine_port = {self.engine_port}
litellm_port = {self.litellm}
threads = 1

[code-ultra]
role = ultra
model = openai/gpt-scripted
model_next = openai/gpt-later
ctx_size = 24000
sampler = temp=0.3
aliases = opus

[claude]
model = anthropic/claude-scripted
ctx_size = 24000

[keyless]
model = groq/llama-scripted
ctx_size = 24000

[code-smart]
role = agent
path = {noise}
ctx_size = 4096
""")
        (self.state / "litellm_config.yaml").write_text(f"""# by hand
model_list:
  - model_name: code-ultra
    litellm_params: &scripted
      model: openai/gpt-scripted
      api_base: http://127.0.0.1:{provider}/v1
      api_key: os.environ/SCRIPTED_KEY
  - model_name: claude
    litellm_params: {{model: anthropic/claude-scripted, api_base: "http://127.0.0.1:{provider}",
                      api_key: os.environ/SCRIPTED_KEY}}
litellm_settings: {{drop_params: true, num_retries: 0}}
router_settings: {{disable_cooldowns: true, num_retries: 0}}
""")
        self.env = {"PATH": os.environ["PATH"], "HOME": str(directory), "LLMSTACK_DATA_DIR": str(data), "SCRIPTED_KEY": KEY,
                    "LLMSTACK_WORK_DIR": str(directory / "project"), "DATABASE_URL": "postgresql://x:y@127.0.0.1:9/z"}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, llmstack.PROGRAM, *words], env=self.env, text=True, timeout=120,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)

    def status(self) -> dict[str, Any]:
        rows: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return rows

    def tier(self, name: str) -> dict[str, Any]:
        return next(t for t in self.status()["tiers"] if t["name"] == name)

    def ask(self, path: str, body: Any = None, port: int = 0, **headers: str) -> Answer:
        data = None if body is None else json.dumps(body).encode()
        asked = request.Request(f"http://127.0.0.1:{port or self.router}{path}", data,
                                {"Content-Type": "application/json", **headers})
        try:
            with request.urlopen(asked, timeout=90) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except error.HTTPError as exc:
            return Answer(exc.code, exc.headers, exc.read())

    def chat(self, model: str, text: str = "hello", path: str = "/v1/chat/completions", **more: Any) -> Answer:
        return self.ask(path, {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8, **more})


ENGINES = ["embedded", pytest.param("llama-swap", marks=pytest.mark.skipif(
    shutil.which("llama-swap") is None, reason="no llama-swap on PATH"))]


class Running(NamedTuple):
    stack: Stack
    first: Answer                               # a stream that was asked for while the proxy was starting
    state: str                                  # of code-ultra, meanwhile
    out: str                                    # what `start` said


@pytest.fixture(scope="module", params=ENGINES)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    if not os.environ.get("LLMSTACK_TEST_DATA"):
        pytest.skip("run the suite with `python3 -m tests`: it provisions LiteLLM's proxy")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stack = Stack(tmp_path_factory.mktemp(request.param), request.param, server.server_port)
    try:
        stack.run("trust")
        out = stack.run("start", "--detach").stdout
        answers: list[Answer] = []
        asking = threading.Thread(target=lambda: answers.append(stack.chat("code-ultra", stream=True)))
        asking.start()
        state = stack.tier("code-ultra")["state"]
        stack.chat("code-smart")                # now, before another stack of this machine takes the port meant for it
        asking.join()
        yield Running(stack, answers[0], state, out)
    finally:
        stack.run("stop")
        server.shutdown()
        server.server_close()


@pytest.fixture
def stack(running: Running) -> Stack:
    Provider.asked.clear()
    return running.stack


def test_start_merges_and_says_where_litellm_is(running: Running, stack: Stack) -> None:
    assert f"LiteLLM http://127.0.0.1:{stack.litellm}/ui" in running.out
    text = (stack.state / "litellm_config.yaml").read_text()
    assert text.startswith("# by hand\nmodel_list:\n  - model_name: code-ultra\n    litellm_params: &scripted\n")
    assert [e["model_name"] for e in yaml.safe_load(text)["model_list"]] == ["code-ultra", "claude", "code-ultra_next", "keyless"]


def test_while_it_starts_streams_are_told_and_status_says_loading(running: Running) -> None:
    assert running.state == "loading"
    body = running.first.body.decode()
    assert "loading litellm_proxy" in body
    assert '"Hel"' in body
    assert body.rstrip().endswith("data: [DONE]")


def test_chats_by_name_and_alias_with_the_tiers_sampler(stack: Stack) -> None:
    for name in ("code-ultra", "opus"):
        answer = stack.chat(name)
        assert (answer.status, answer.json["choices"][0]["message"]["content"]) == (200, "Hello")
        path, headers, body = Provider.asked[-1]
        assert (path, headers["authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
        assert (body["model"], body["temperature"]) == ("gpt-scripted", 0.3)
    stack.chat("code-ultra", temperature=0.9)
    assert Provider.asked[-1][2]["temperature"] == 0.9


def test_a_stream_and_a_tool_call_come_whole(stack: Stack) -> None:
    answer = stack.chat("code-ultra", stream=True)
    events = [json.loads(x[6:]) for x in answer.body.decode().split("\n\n") if x.startswith("data: {")]
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"]) == "Hello"
    assert answer.body.rstrip().endswith(b"data: [DONE]")
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    answer = stack.chat("code-ultra", tools=tools)
    assert Provider.asked[-1][2]["tools"] == tools
    assert answer.json["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": 1}'}


def test_anthropics_shape_on_both_sides(stack: Stack) -> None:
    answer = stack.chat("claude", path="/v1/messages")
    assert answer.status == 200, answer.body
    assert answer.json["content"][0]["text"] == "Bonjour"
    path, headers, _ = Provider.asked[-1]
    assert (path, headers["x-api-key"]) == ("/v1/messages", KEY)
    assert stack.chat("claude").json["choices"][0]["message"]["content"] == "Bonjour"


def test_auto_takes_the_hosted_tier_and_falls_down_on_401(stack: Stack) -> None:
    answer = stack.chat("auto")
    assert (answer.headers["X-LLMStack-Model"], answer.json["choices"][0]["message"]["content"]) == ("code-ultra", "Hello")
    answer = stack.chat("auto", "401")
    assert answer.status == 200
    assert answer.headers["X-LLMStack-Model"] == "code-smart"
    assert "code-ultra" in answer.headers["X-LLMStack-Fallback"]
    assert "(401)" in answer.headers["X-LLMStack-Fallback"]
    assert stack.tier("code-ultra")["state"] == "failing"
    answer = stack.chat("code-ultra", "401")
    assert answer.status == 401, "asked for by name, it is passed on"
    assert b"scripted 401" in answer.body


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
def test_what_the_provider_refuses_is_passed_on_where_the_tier_was_named(stack: Stack, status: int) -> None:
    answer = stack.chat("claude", str(status))
    assert (answer.status, answer.json["error"]["message"].count(f"scripted {status}")) == (status, 1), answer.body
    answer = stack.chat("code-ultra", str(status), stream=True)
    assert answer.status == status, answer.body
    assert stack.chat("code-ultra").status == 200, "and the next one is asked again"


def test_a_stream_that_is_cut_never_looks_whole(stack: Stack) -> None:
    try:
        body = stack.chat("code-ultra", "cut", stream=True).body
    except http.client.IncompleteRead as exc:
        body = exc.partial
    assert b'"Hel"' in body
    assert b'"error"' in body


def test_a_client_that_leaves_is_cancelled_at_the_provider(stack: Stack) -> None:
    Provider.left.clear()
    body = json.dumps({"model": "code-ultra", "stream": True, "messages": [{"role": "user", "content": "hang"}]}).encode()
    with socket.create_connection(("127.0.0.1", stack.router)) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        seen = b""
        while b"Hel" not in seen:
            data = client.recv(65_536)
            assert data, seen
            seen += data
    assert Provider.left.wait(15)


def test_a_missing_credential_is_named_and_never_shown(stack: Stack) -> None:
    row = stack.tier("keyless")
    assert (row["state"], row["reason"], row["missing"]) == ("no credential", "missing GROQ_API_KEY", ["GROQ_API_KEY"])
    assert stack.tier("claude")["missing"] == []
    everything = "".join(p.read_text(errors="replace") for p in (stack.directory / "project").rglob("*") if p.is_file())
    everything += stack.run("status").stdout + stack.ask("/models.ini").body.decode()
    if Path("/proc").is_dir():
        everything += "".join(p.read_text(errors="replace") for p in Path("/proc").glob("[0-9]*/cmdline"))
    assert KEY not in everything


def test_models_lists_hosted_tiers(stack: Stack) -> None:
    entries = {e["id"]: e for e in stack.ask("/v1/models").json["data"]}
    assert {"auto", "code-ultra", "claude", "code-smart"} <= set(entries)
    assert not {"litellm_proxy", "code-ultra_next"} & set(entries)
    meta = entries["code-ultra"]["meta"]["llmstack"]
    assert (entries["code-ultra"]["channel"], meta["model"], meta["ctx_size"]) == ("current", "openai/gpt-scripted", 24000)


def test_the_admin_page_and_the_mcp_gateway_are_there_but_not_for_web_pages(stack: Stack) -> None:
    assert stack.ask("/ui/", port=stack.litellm).status == 200
    hello = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
        "protocolVersion": "2025-03-26", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}}
    answer = stack.ask("/mcp", hello, stack.litellm, Accept="application/json, text/event-stream")
    assert answer.status == 200
    assert b"serverInfo" in answer.body
    ask = {"model": "code-ultra", "messages": [{"role": "user", "content": "hello"}]}
    for header in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = stack.ask("/v1/chat/completions", ask, stack.litellm, **header)
        assert answer.status == 403, header
        assert "access-control-allow-origin" not in answer.headers
    assert not Provider.asked
    own = {"Origin": f"http://127.0.0.1:{stack.litellm}", "Sec-Fetch-Site": "same-origin"}
    assert stack.ask("/v1/models", None, stack.litellm, **own).status == 200


def test_the_proxy_stays_beside_a_local_model_and_goes_with_the_stack(stack: Stack) -> None:
    stack.chat("code-smart")
    stack.chat("code-ultra")
    rows = stack.ask("/running", port=stack.engine_port).json["running"]
    assert {r["model"]: r["state"] for r in rows} == {"code-smart": "ready", "litellm_proxy": "ready"}
    rows = {t["name"]: t for t in stack.status()["tiers"]}
    assert [0 < (rows[name]["since_s"] or 0) < 600 for name in ("claude", "code-smart")] == [True, True], rows
    assert re.search(r"code-ultra .* loaded\b", stack.run("status").stdout)
    pids = llmstack.listeners(stack.litellm)
    assert stack.run("stop").returncode == 0
    end = time.monotonic() + 10
    while any(llmstack.process_started(pid) for pid in pids):
        assert time.monotonic() < end
    assert llmstack.port_is_free("127.0.0.1", stack.litellm)


def test_restart_next_asks_the_next_model(stack: Stack) -> None:
    text = (stack.state / "litellm_config.yaml").read_text()
    path = stack.state / "litellm_config.yaml"
    base = yaml.safe_load(text)["model_list"][0]["litellm_params"]["api_base"]
    path.write_text(text.replace("      model: openai/gpt-later", "      <<: *scripted\n      model: openai/gpt-later"))
    assert yaml.safe_load(path.read_text())["model_list"][2]["litellm_params"]["api_base"] == base
    stack.run("trust")
    assert stack.run("restart", "--next", "--detach").returncode == 0
    answer = stack.chat("auto")
    assert answer.status == 200, answer.body
    assert (answer.headers["X-LLMStack-Model"], Provider.asked[-1][2]["model"]) == ("code-ultra", "gpt-later")
    entries = {e["id"]: e for e in stack.ask("/v1/models").json["data"]}
    assert (entries["code-ultra"]["channel"], entries["code-ultra"]["meta"]["llmstack"]["model"]) == ("next", "openai/gpt-later")
    assert stack.tier("code-ultra")["model"] == "openai/gpt-later"
