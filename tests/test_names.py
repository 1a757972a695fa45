"""Names that clients come with: how they resolve, and what the list of models says of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

import llmstack
from llmstack import Config, Tier, parse_models_ini, resolve_name
from tests import test_router
from tests.scripted import Message, always, answer, reply_with
from tests.test_router import (  # noqa: F401
    CHAT,
    CONFIG,
    OK,
    Start,
    chat,
    nothing_left_behind,
    post,
    request,
    start,
)

INI = """
[code-fast]
role = fast
path = fast.gguf
aliases = fast, qwen/qwen3:8b
[code-smart]
role = agent
path = smart.gguf
aliases = coder, cursor-*
[plan]
role = plan
path = plan.gguf
"""


def parsed(text: str) -> Config:
    return parse_models_ini(text)[0]


@pytest.mark.parametrize(("name", "means"), [
    (None, "auto"), ("", "auto"), ("auto", "auto"), ("AUTO", "auto"), ("llama.cpp/auto", "auto"),
    ("auto:latest", "auto"), ("code-smart", "code-smart"), ("CODE-SMART", "code-smart"),
    ("code-smart:latest", "code-smart"), ("openai/code-smart", "code-smart"),
    ("llama.cpp/code-fast", "code-fast"), ("a/b/Coder:LATEST", "code-smart"),
    ("qwen/qwen3:8b", "code-fast"), ("Qwen/Qwen3:8B", "code-fast"), ("cursor-small", "code-smart"),
    ("gpt-4o", "auto"), ("gpt-5.1-codex", "auto"), ("gpt-4o-mini", "code-fast"),
    ("gpt-5-nano", "code-fast"), ("openai/gpt-5-mini", "code-fast"), ("o3", "auto"),
    ("o4-mini", "auto"), ("claude-haiku-4-5", "code-fast"), ("claude-sonnet-4-5[1m]", "auto"),
    ("gemini-2.5-pro", "auto"), ("default", "auto"),
    ("opus", ""), ("code", ""), ("llama3.2", ""), (5, ""), (["auto"], ""),
])
def test_what_a_name_means(name: object, means: str) -> None:
    assert resolve_name(parsed(INI), name) == means


def test_a_tier_s_own_name_comes_before_any_pattern() -> None:
    config = parsed(INI.replace("[plan]", "[gpt-5]"))
    assert resolve_name(config, "gpt-5") == "gpt-5"
    assert resolve_name(config, "openai/GPT-5") == "gpt-5"
    assert resolve_name(config, "gpt-4") == "auto"


def test_a_role_that_no_tier_has_is_auto() -> None:
    config = Config(tiers=(Tier("only", "agent"),))
    assert resolve_name(config, "claude-haiku-4-5") == "auto"


def test_a_section_of_aliases_stands_in_place_of_the_defaults() -> None:
    config = parsed(INI + "[ALIASES]\nllama3:* = plan\nClaude-* = agent\nwhatever = auto\n")
    assert resolve_name(config, "llama3:8b") == "plan"
    assert resolve_name(config, "claude-opus-4") == "code-smart"
    assert resolve_name(config, "whatever") == "auto"
    assert resolve_name(config, "gpt-4o") == ""
    assert resolve_name(config, "cursor-fast") == "code-smart", "a tier's own patterns stay"


def test_every_other_name_can_be_auto() -> None:
    config = parsed("[DEFAULT]\nunknown_model = auto\n" + INI)
    assert resolve_name(config, "llama3.2") == "auto"
    assert resolve_name(config, 5) == ""


@pytest.mark.parametrize(("line", "problem"), [
    ("gpt-* = code-smrt", "code-smrt is no tier, no role and not auto, did you mean code-smart?"),
    ("gpt-* =", "nothing is no tier, no role and not auto"),
    ("a b = auto", "a b is no name and no pattern of names, such as gpt-*"),
    ("gpt-*", "neither a [section], a key = value nor a comment"),
    ("gpt-* = auto\ngpt-* = plan", "gpt-* in [ALIASES] is there twice, first on line 14"),
])
def test_an_alias_that_leads_nowhere_is_told_by_its_line(line: str, problem: str) -> None:
    with pytest.raises(llmstack.ConfigError) as caught:
        parsed(INI + f"[ALIASES]\n{line}\n")
    number = 14 + line.count("\n")
    assert str(caught.value) == f"models.ini:{number}: {problem}"


# ---- on the wire


def model_of(message: Message) -> str:
    return str(message.json.get("model"))


@pytest.mark.parametrize(("asked", "got"), [
    ("CODE-SMART", "code-smart"), ("openai/code-fast", "code-fast"), ("fast:latest", "code-fast"),
    ("gpt-4o-mini", "code-fast"), ("coder", "coder"), ("code-smart", "code-smart"),
    ("openai/code-ultra", "code-ultra"),
])
def test_the_body_names_the_tier_where_the_client_did_not(start: Start, asked: str,  # noqa: F811
                                                           got: str) -> None:
    rig = start(always(OK))
    assert rig.ask(chat(asked)).status == 200
    assert model_of(rig.upstream.requests[-1]) == got


@pytest.mark.parametrize("asked", ["gpt-4o", "claude-opus-4-1", "auto:latest"])
def test_a_name_that_means_auto_is_decided_as_auto(start: Start, asked: str) -> None:  # noqa: F811
    rig = start(always(OK))
    got = rig.ask(chat(asked))
    assert got.header("x-llmstack-model") == "code-ultra"
    assert model_of(rig.upstream.requests[-1]) == "code-ultra"


def test_a_model_of_the_upstream_s_own_stays_that(start: Start) -> None:  # noqa: F811
    body = json.dumps({"data": [{"id": "gpt-oss"}]}).encode()

    def reply(message: Message) -> bytes:
        return answer(body) if message.target == "/v1/models" else OK

    rig = start(reply_with(reply))
    assert rig.ask(chat("gpt-oss")).header("x-llmstack-model") == ""
    assert model_of(rig.upstream.requests[-1]) == "gpt-oss"
    assert rig.ask(chat("gpt-4o")).header("x-llmstack-model") == "code-ultra"


def test_an_unknown_name_is_a_404_that_says_what_there_is(
        start: Start, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    hosted = Tier("hosted", "agent", backend="openai", model="m", base_url="http://127.0.0.1:9/v1")
    monkeypatch.setattr(test_router, "CONFIG", Config(tiers=(hosted,)))
    rig = start(always(OK))
    got = rig.ask(chat("hostde"))
    assert got.status == 404
    assert got.json["error"]["message"] == (
        "there is no model 'hostde', did you mean hosted? The models here are auto, hosted")
    got = rig.ask(post({"model": "llama3.2", "messages": []}, target="/v1/messages"))
    assert (got.status, got.json["type"], got.json["error"]["type"]) == (
        404, "error", "not_found_error")
    assert rig.upstream.requests == []


# ---- the list of models, and one of them


def listing(*entries: dict[str, Any]) -> bytes:
    return answer(json.dumps({"object": "list", "data": entries}).encode())


ENGINE_S = listing({"id": "code-fast", "status": {"value": "loaded"}}, {"id": "fast"},
                   {"id": "code-smart", "meta": {"llamaswap": {"x": 1}}}, {"id": "coder"},
                   {"id": "theirs"})


def test_each_model_is_listed_once_with_its_aliases_inside(start: Start) -> None:  # noqa: F811
    rig = start(always(ENGINE_S))
    entries = rig.ask(request("GET", "/v1/models")).json["data"]
    assert [e["id"] for e in entries] == ["auto", "code-fast", "code-smart", "theirs"]
    assert entries[1]["aliases"] == ["fast"]
    assert entries[1]["status"] == {"value": "loaded"}
    assert entries[2]["meta"]["llamaswap"] == {"x": 1}


def test_every_client_finds_the_context_in_the_key_it_reads(start: Start) -> None:  # noqa: F811
    rig = start(always(ENGINE_S))
    auto, fast, smart = rig.ask(request("GET", "/v1/models")).json["data"][:3]
    for key in ("context_length", "context_window", "max_model_len", "max_input_tokens",
                "max_output_tokens"):
        assert (auto[key], fast[key], smart[key]) == (131_072, 131_072, 65_536), key
    assert (auto["meta"]["n_ctx"], smart["meta"]["n_ctx"]) == (131_072, 65_536)
    assert smart["capabilities"] == ["completion", "tools"]
    assert auto["capabilities"] == ["completion", "tools", "vision"]
    thinking = llmstack.tier_entry(Tier("a", reasoning=True, tool_call=False))
    assert thinking["capabilities"] == ["completion", "reasoning", "thinking"]


@pytest.mark.parametrize(("name", "context"), [
    ("auto", 131_072), ("code-smart", 65_536), ("coder", 65_536), ("openai/CODE-SMART", 65_536),
    ("gpt-4o", 131_072), ("org%2Fcode-fast", 131_072),
])
def test_one_model_under_any_of_its_names(start: Start, name: str,  # noqa: F811
                                          context: int) -> None:
    rig = start(always(ENGINE_S))
    entry = rig.ask(request("GET", "/v1/models/" + name)).json
    assert (entry["id"], entry["context_length"]) == (name.replace("%2F", "/"), context)
    assert rig.ask(request("GET", "/models/" + name)).json == entry


def test_one_model_that_is_not_there(start: Start) -> None:  # noqa: F811
    rig = start(always(ENGINE_S))
    assert rig.ask(request("GET", "/v1/models/theirs")).json == {"id": "theirs"}
    got = rig.ask(request("GET", "/v1/models/llama3.2"))
    assert got.status == 404
    assert "The models here are auto, code-fast, code-smart" in got.json["error"]["message"]


def test_anthropic_s_clients_get_their_own_shape(start: Start) -> None:  # noqa: F811
    rig = start(always(ENGINE_S))
    version = "Anthropic-Version: 2023-06-01"
    page = rig.ask(request("GET", "/v1/models?limit=1000", version)).json
    assert (page["has_more"], page["first_id"], page["last_id"]) == (False, "auto", "theirs")
    assert page["data"][2] == {
        "type": "model", "id": "code-smart", "display_name": "code-smart",
        "created_at": "1970-01-01T00:00:00Z", "max_input_tokens": 65_536, "max_tokens": 65_536}
    assert rig.ask(request("GET", "/v1/models/coder", version)).json["id"] == "coder"


# ---- embeddings and reranking


WITH_ROLES = (*CONFIG.tiers, Tier("nomic", "embed", ctx_size=8192), Tier("jina", "rerank"))


@pytest.mark.parametrize(("path", "model", "got"), [
    ("/v1/embeddings", "auto", "nomic"), ("/v1/embeddings", None, "nomic"),
    ("/embeddings", "", "nomic"), ("/v1/embeddings", "text-embedding-3-small", "nomic"),
    ("/v1/embeddings", "openai/text-embedding-ada-002", "nomic"),
    ("/v1/embeddings", "nomic", "nomic"), ("/v1/embeddings", "code-fast", "code-fast"),
    ("/v1/rerank", "auto", "jina"), ("/rerank", "rerank-v3.5", "jina"),
    ("/v1/reranking", "JINA", "jina"),
])
def test_embeddings_and_reranking_have_a_role(
        start: Start, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
        path: str, model: object, got: str) -> None:
    monkeypatch.setattr(test_router, "CONFIG", CONFIG._replace(tiers=WITH_ROLES))
    rig = start(always(OK))
    body = {"model": model, "input": "x"}
    assert rig.ask(post(body, target=path)).status == 200
    sent = rig.upstream.requests[-1]
    assert sent.target == ("/v1/rerank" if "rerank" in path else "/v1/embeddings")
    assert sent.json == {"model": got, "input": "x"}


@pytest.mark.parametrize("role", ["embed", "rerank"])
def test_without_such_a_tier_the_error_says_how_to_add_it(
        start: Start, monkeypatch: pytest.MonkeyPatch, role: str) -> None:  # noqa: F811
    monkeypatch.setattr(llmstack.UpstreamApp, "has_others", False)
    rig = start(always(OK))
    path = "/v1/embeddings" if role == "embed" else "/v1/rerank"
    got = rig.ask(post({"model": "auto", "input": "x"}, target=path))
    assert got.status == 404
    assert f"role = {role} in models.ini" in got.json["error"]["message"]
    assert rig.upstream.requests == []


def test_their_servers_get_their_flags() -> None:
    embed, rerank = (llmstack.tier_flags(tier) for tier in WITH_ROLES[-2:])
    assert ("--embedding",) in embed
    assert ("--ubatch-size", "2048") in embed
    assert ("--reranking",) in rerank
    assert llmstack.capabilities(WITH_ROLES[-2]) == ["embedding"]
    assert llmstack.tier_flags(CONFIG.tiers[0]) == [("--alias", "code-fast"), ("-c", "131072")]
