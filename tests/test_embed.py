"""The profiles' tier for embeddings: small, beside the sets, and no client's partner to talk with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import llmstack
from tests import gguf_models
from tests.test_fit import NAMES, tiers_of
from tests.test_stack import Project, ask

TEXTS = ["search_query: where is a header read?", "search_document: a header is read here"]


def needs(found: list[llmstack.TierFit]) -> dict[str, llmstack.Needs]:
    return {fit.name: fit.needs for fit in found}


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_has_one_that_is_never_auto_and_no_chat_model(name: str) -> None:
    config, found = tiers_of(name)
    tier = config.by_role("embed")
    assert tier is not None
    assert (tier.name, tier.hf_repo) == ("embed", "nomic-ai/nomic-embed-text-v1.5-GGUF")
    assert (tier.ttl, tier.ctx_size, tier.aliases) == (1200, 2048, ())
    assert tier not in config.ladder
    # On a card, CUDA's own context and what stays on the host come on top.
    most = 1.2 if llmstack.PROFILES[name].host_gb else 0.41
    assert sum(needs(found)["embed"]) < most
    opencode = json.loads(llmstack.render_opencode_json(config, "http://127.0.0.1:1", "/a"))
    assert list(opencode["provider"]["llama.cpp"]["models"]) == [
        "auto", "code-fast", "code-smart", "plan", "plan-uncensored"]


@pytest.mark.parametrize("name", NAMES)
def test_beside_the_agent_it_makes_nothing_go(name: str) -> None:
    config, found = tiers_of(name)
    budget_gb = llmstack.PROFILES[name].budget_gb
    if name == "64":                            # on a Mac the GPU may have less than elsewhere
        budget_gb = 51.5
    sets = llmstack.residency_sets(config, needs(found), (budget_gb,))
    assert llmstack.choose_evictions("embed", ["code-smart"], sets, {}) == []


def test_the_sets_of_the_other_tiers_are_as_without_it(config: llmstack.Config) -> None:
    without = config._replace(tiers=tuple(tier for tier in config.tiers if tier.chats))
    assert llmstack.residency_sets(config) == llmstack.residency_sets(without)
    need = {tier.name: (1.1 * tier.size_gb,) for tier in config.tiers}
    for budget_gb in (50.0, 56.0, 100.0):
        got = llmstack.residency_sets(config, need, (budget_gb,))
        names = [set(found.tiers) - {"embed"} for found in got]
        assert all(set(found.tiers) in names
                   for found in llmstack.residency_sets(without, need, (budget_gb,)))


def test_it_takes_its_turn_where_memory_is_full(config: llmstack.Config) -> None:
    need = {"code-fast": (5.0,), "code-smart": (45.0,), "plan": (9.0,), "plan-uncensored": (20.0,),
            "embed": (0.3,)}
    sets = llmstack.residency_sets(config, need, (50.1,))
    running = ["code-fast", "code-smart"]
    costs = {"code-fast": 2, "code-smart": 30}
    assert llmstack.choose_evictions("embed", running, sets, costs) == ["code-fast"]


def test_it_takes_nothing_of_the_room_for_prompts(config: llmstack.Config) -> None:
    found = [llmstack.TierFit(tier.name, "local", "", 10.0, True, tier.ctx_size)
             for tier in config.tiers if tier.chats]
    small = llmstack.TierFit("embed", "local", "", 0.0001, True, 2048)
    machine = llmstack.Machine(26.0, "a test", False)
    alone, beside = (llmstack.with_caches(config, fits, machine)
                     for fits in (found, [*found, small]))
    for before, after in zip(alone.tiers, beside.tiers):
        assert before.cache_ram_mib == pytest.approx(after.cache_ram_mib, abs=1)
    last = beside.by_name("embed")
    assert last is not None
    assert last.cache_ram_mib == -1


def test_a_project_that_only_embeds_gets_its_opencode_json() -> None:
    config = llmstack.Config((llmstack.Tier("vectors", "embed", path="x.gguf"),))
    opencode = json.loads(llmstack.render_opencode_json(config, "http://127.0.0.1:1", "/a"))
    assert opencode["model"] == "llama.cpp/auto"
    assert opencode["provider"]["llama.cpp"]["models"] == {}


def encoder(path: Path) -> Path:
    """A small model of nomic-embed-text's kind, all zeros."""
    embd, ff = 128, 256
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special = len(tokens)
    tokens += ["\u2581" + chr(c) for c in range(33, 127)] + [chr(c) for c in range(33, 127)]
    meta = {
        "general.architecture": "nomic-bert", "general.name": "x", "general.file_type": 1,
        "tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * special + [1] * (len(tokens) - special),
        "tokenizer.ggml.token_type_count": 2, "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.seperator_token_id": 3,
        "nomic-bert.context_length": 2048, "nomic-bert.embedding_length": embd,
        "nomic-bert.block_count": 1, "nomic-bert.feed_forward_length": ff,
        "nomic-bert.attention.head_count": 2, "nomic-bert.attention.layer_norm_epsilon": 1e-12,
        "nomic-bert.attention.causal": False, "nomic-bert.pooling_type": 1,
        "nomic-bert.rope.freq_base": 1000.0}
    shapes = {
        "token_embd.weight": (embd, len(tokens)),
        "blk.0.attn_qkv.weight": (embd, 3 * embd), "blk.0.attn_output.weight": (embd, embd),
        "blk.0.ffn_up.weight": (embd, ff), "blk.0.ffn_gate.weight": (embd, ff),
        "blk.0.ffn_down.weight": (ff, embd)}
    tensors = [(name, shape, gguf_models.F16) for name, shape in shapes.items()]
    tensors.append(("token_types.weight", (embd, 2), gguf_models.F32))
    for norm in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        tensors += [(f"{norm}.{kind}", (embd,), gguf_models.F32) for kind in ("weight", "bias")]
    return gguf_models.write(path, meta, tensors)


@pytest.mark.usefixtures("real_data")
def test_real_llama_cpp_embeds(tmp_path: Path) -> None:
    project = Project(f"[embed]\nrole = embed\npath = {encoder(tmp_path / 'x.gguf')}\n"
                      "ctx_size = 2048\nsize_gb = 0.15\n")
    try:
        assert llmstack.main(["start", "--detach"]) == 0
        answer = json.loads(ask(project.router_port, "/v1/embeddings",
                                model="text-embedding-3-small", input=[*TEXTS, "a " * 2000])[1])
        assert answer["model"] == "embed"
        assert answer["usage"]["prompt_tokens"] > 2000
        assert [len(row["embedding"]) for row in answer["data"]] == [128, 128, 128]
    finally:
        llmstack.main(["stop"])
