"""What a process takes beside its model, which tiers stay together, and what happens when memory is short."""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest

import llmstack
from tests import gguf_models

MIB = llmstack.MIB
ON_CUDA = llmstack.LoadOptions(gpu_layers=999, cuda=True)


def known(file: str) -> llmstack.GgufHeader:
    header = gguf_models.header_of(file)
    assert header is not None
    return header


# ---- Measured on an H100 (driver 580, llama.cpp b11549)

def card_compute_mib(file: str, ctx: int, load: llmstack.LoadOptions) -> float:
    """The compute buffer on the card: without the host's mask and output."""
    header = known(file)
    memory = llmstack.estimate_memory(header, ctx, load)
    return (memory.compute - (memory.host - header.embd_bytes - memory.cache)) / MIB


@pytest.mark.parametrize(("file", "ctx", "mib"), [
    ("Qwen3-Coder-30B-A3B-Instruct-Q6_K", 131_072, 444.0),
    ("Qwen3-Coder-Next-Q4_K_M", 595_200, 1800.78),
])
def test_quantised_kv_is_kept_as_f16_once_more(file: str, ctx: int, mib: float) -> None:
    assert card_compute_mib(file, ctx, ON_CUDA) == pytest.approx(mib, rel=0.005)
    plain = ON_CUDA._replace(cache_type_k="f16", cache_type_v="f16")
    assert card_compute_mib(file, ctx, plain) < mib / 1.4
    metal = llmstack.LoadOptions(gpu_layers=999)
    assert card_compute_mib(file, ctx, metal) == card_compute_mib(file, ctx, plain)


@pytest.mark.parametrize(("file", "mib"), [("Qwen2.5-Coder-3B-Instruct-Q5_K_M", 243), ("gemma-3-12b-it-q4_k_m", 788)])
def test_the_token_embedding_stays_on_the_host(file: str, mib: int) -> None:
    header = known(file)
    memory = llmstack.estimate_memory(header, 8192, ON_CUDA)
    assert header.embd_bytes / MIB == pytest.approx(mib, abs=1)
    assert memory.host > header.embd_bytes
    assert sum(memory.each) + memory.host == memory.total
    assert llmstack.estimate_memory(header, 8192).host == 0


def test_a_process_has_a_context_of_its_own_on_cuda() -> None:
    header = known("Qwen3-8B-Q4_K_M")
    metal, cuda = (llmstack.estimate_memory(header, 8192, load) for load in (llmstack.LoadOptions(gpu_layers=999), ON_CUDA))
    assert (metal.context, cuda.context) == (0, 711 * MIB)      # 591 at its start, 120 more at the first prompt
    assert 591 + 110 <= cuda.context / MIB <= 591 + 125


def test_layers_that_stay_on_the_host_are_counted_there() -> None:
    header = known("Qwen3-8B-Q4_K_M")
    whole = llmstack.estimate_memory(header, 8192, ON_CUDA)
    half = llmstack.estimate_memory(header, 8192, ON_CUDA._replace(gpu_layers=18))
    assert half.total == whole.total
    assert half.host - whole.host == pytest.approx((header.tensor_bytes + half.kv) / 2, rel=0.1)


def test_a_card_and_the_host_have_a_limit_each() -> None:
    config, _ = llmstack.parse_models_ini("[t]\nrole = fast\npath = x.gguf\nctx_size = 8k\n")
    header = known("Qwen3-8B-Q4_K_M")

    def fit(card_gb: float, host_gb: float) -> llmstack.TierFit:
        there = llmstack.Machine(card_gb, "", True, True, host_gb)
        return llmstack.fit_tier(config.tiers[0], config, there, header, "local", "")

    one = fit(24, 16)
    assert one.fits
    assert one.memory is not None
    assert (one.need_gb, one.host_gb) == (sum(one.memory.each) / 1e9, one.memory.host / 1e9)
    assert not fit(one.need_gb - 0.01, 16).fits
    assert not fit(24, one.host_gb - 0.01).fits
    shared = llmstack.fit_tier(config.tiers[0], config, llmstack.Machine(24, "", True, True), header, "local", "")
    assert (shared.need_gb, shared.host_gb) == (one.memory.total / 1e9, 0.0)


# ---- Prompts and checkpoints

def tier(name: str, role: str = "", **more: Any) -> llmstack.Tier:
    return llmstack.Tier(name, role, path=f"{name}.gguf", **more)


F, C, P, U = (tier("f", "fast"), tier("c", "agent"), tier("p", "plan"), tier("u", "plan-uncensored"))
CONFIG = llmstack.Config(tiers=(F, C, P, U))
SOME = llmstack.Memory(1, 0, 0, 0)


def fits_of(need: dict[str, float], checkpoint_mb: float = 0.0, host_gb: float = 0.0) -> list[llmstack.TierFit]:
    return [llmstack.TierFit(n, "local", "", gb, True, 4096, 0, SOME, "", host_gb, checkpoint_mb) for n, gb in need.items()]


def vectors(need: dict[str, float]) -> dict[str, llmstack.Needs]:
    """Of one memory."""
    return {name: (gb,) for name, gb in need.items()}


NEED = {"f": 5.6, "c": 49.9, "p": 10.1, "u": 26.2}


def caches(fits: list[llmstack.TierFit], machine: llmstack.Machine) -> dict[str, tuple[int, int]]:
    return {t.name: (t.cache_ram_mib, t.ctx_checkpoints) for t in llmstack.with_caches(CONFIG, fits, machine).tiers}


def test_prompts_get_what_the_fullest_set_leaves() -> None:
    found = caches(fits_of(NEED), llmstack.Machine(60.0, "", True))
    assert found["c"][0] == pytest.approx(64 + (60 - 55.5) / 2 * 1e9 / MIB, abs=1)
    assert found["f"] == found["c"], "the least of its sets"
    assert found["p"][0] == pytest.approx(64 + (60 - 41.9) / 3 * 1e9 / MIB, abs=1)


def test_prompts_always_get_something_and_never_more_than_the_servers_own() -> None:
    assert set(caches(fits_of(NEED), llmstack.Machine(55.5, "", True)).values()) >= {(64, -1)}
    assert caches(fits_of(NEED), llmstack.Machine(500.0, "", True))["f"] == (8192, -1)


def test_beside_a_card_prompts_are_the_hosts() -> None:
    found = caches(fits_of(NEED, host_gb=1.0), llmstack.Machine(95.0, "", True, True, 8.0))
    assert found["f"][0] == pytest.approx(64 + (8 - 4) / 4 * 1e9 / MIB, abs=1)


def test_checkpoints_are_counted_and_bounded() -> None:
    need = {"f": 5.6, "c": 49.9}
    for budget in (55.5, 56.0, 60.0, 70.0, 200.0):
        for mib, checkpoints in caches(fits_of(need, 75.0), llmstack.Machine(budget, "", True)).values():
            if mib >= 0:
                assert 64 <= mib <= 8192
                assert 1 <= checkpoints <= 32


def test_the_caches_of_all_that_is_resident_are_within_the_budget() -> None:
    """The least is part of each tier's need; what is given beyond it never exceeds what is left."""
    chance = random.Random(11)
    for _ in range(300):
        need = {n: chance.uniform(1, 40) for n in "fcpu"}
        budget, each_mb = chance.uniform(20, 120), chance.choice([0.0, 75.0])
        found = caches(fits_of(need, each_mb), llmstack.Machine(budget, "", True))
        for one in llmstack.residency_sets(CONFIG, vectors(need), (budget,)):
            total = sum(need[t] for t in one.tiers)
            if len(one.tiers) == 1 and total > budget:
                continue                        # it is refused
            for name in one.tiers:
                mib, checkpoints = found[name]
                total += (mib - 64) * MIB / 1e9 + max(0, checkpoints - 1) * 4 * each_mb / 1000
            assert total <= budget + 0.001


def test_both_engines_get_the_flags() -> None:
    config = llmstack.with_caches(CONFIG, fits_of(NEED), llmstack.Machine(60.0, "", True))
    words = llmstack.server_command(["x"], config.tiers[1], config, 1, frozenset())
    assert words[words.index("--cache-ram") + 1] == str(config.tiers[1].cache_ram_mib)
    assert "--ctx-checkpoints" not in words, "where we know of none, the server may know better"
    hybrid = llmstack.with_caches(CONFIG, fits_of(NEED, 75.0), llmstack.Machine(60.0, "", True))
    words = llmstack.server_command(["x"], hybrid.tiers[1], hybrid, 1, frozenset())
    assert words[words.index("--ctx-checkpoints") + 1] == str(hybrid.tiers[1].ctx_checkpoints)
    plan = llmstack.SwapPlan(config, llmstack.Binary(("x",)), str)
    text = llmstack.render_llama_swap_yaml(plan)
    assert f"--cache-ram {config.tiers[1].cache_ram_mib}" in text
    assert "--cache-ram" not in llmstack.render_llama_swap_yaml(plan._replace(config=CONFIG))


@pytest.mark.parametrize(("file", "mb"), [
    ("Qwen3-Coder-Next-Q4_K_M.gguf", 79),       # 75 MiB
    ("Qwen3-32B-Q4_K_M.gguf", 0),
    ("gpt-oss-20b-MXFP4.gguf", 10),             # 12 windows of 128 and a batch
])
def test_what_a_checkpoint_takes(file: str, mb: int) -> None:
    assert llmstack.checkpoint_bytes(known(file), 65_536) / 1e6 == pytest.approx(mb, abs=1)


# ---- Sets that grow

def sets(need: dict[str, float], budget: float) -> list[set[str]]:
    return [set(s.tiers) for s in llmstack.residency_sets(CONFIG, vectors(need), (budget,))]


SPECIFIED = [{"f", "c"}, {"f", "p"}, {"f", "u"}, {"f", "p", "u"}]


@pytest.mark.parametrize(("budget", "expected"), [
    pytest.param(60.1, SPECIFIED, id="64 GB: the specification's"),
    pytest.param(66.0, [*SPECIFIED, {"f", "c", "p"}], id="the planner beside the agent"),
    pytest.param(82.0, [*SPECIFIED, {"f", "c", "p"}, {"f", "c", "u"}], id="or the other one"),
    pytest.param(92.0, [*SPECIFIED, {"f", "c", "p", "u"}], id="all"),
    pytest.param(50.0, [{"f", "p"}, {"f", "u"}, {"f", "p", "u"}, {"c"}], id="the agent alone"),
])
def test_what_fits_together_stays_together(budget: float, expected: list[set[str]]) -> None:
    assert sets(NEED, budget) == expected


def test_three_tiers_of_forty_gb_stay_on_a_card_of_eighty_four() -> None:
    need = {"f": 4.0, "c": 26.0, "p": 9.8}
    config = llmstack.Config(tiers=(F, C, P))
    found = llmstack.residency_sets(config, vectors(need), (84.4,))
    assert llmstack.choose_evictions("p", ["f", "c"], found, {}) == []


def test_no_set_is_beyond_the_budget_and_every_pair_that_fits_beside_the_fast_tier_is_in_one() -> None:
    chance = random.Random(7)
    for _ in range(200):
        need, budget = {n: chance.uniform(1, 40) for n in "fcpu"}, chance.uniform(10, 120)
        found = sets(need, budget)
        for one in found:
            assert len(one) == 1 or sum(need[n] for n in one) <= budget
        for a, b in itertools.combinations("cpu", 2):
            if need["f"] + need[a] + need[b] <= budget:
                assert any({"f", a, b} <= one for one in found)


def test_a_tier_of_unknown_size_grows_into_no_set() -> None:
    assert sets({"f": 1.0, "c": 1.0, "p": 0.0, "u": 0.0}, 100.0) == SPECIFIED


def test_many_tiers_take_no_time() -> None:
    many = tuple(tier(f"m{i}") for i in range(300))
    need = {t.name: 1.0 + i / 1000 for i, t in enumerate(many)}
    assert len(llmstack.residency_sets(llmstack.Config(tiers=many), vectors(need), (50.0,))) < 700


def test_the_yaml_has_the_sets_that_grew() -> None:
    plan = llmstack.SwapPlan(CONFIG, llmstack.Binary(("x",)), str, need_gb=vectors(NEED), budgets_gb=(92.0,))
    text = llmstack.render_llama_swap_yaml(plan)
    assert '    e_more: "f & c & p & u"' in text


# ---- Before a download

def test_a_profiles_model_counts_with_its_kv_before_it_is_here() -> None:
    text = llmstack.read_resource("models.ini").decode()
    config, _ = llmstack.parse_models_ini(text)
    fits = llmstack.measure_tiers(config, llmstack.Machine(60.0, "", True), {"HF_HOME": "/nonexistent"})
    found = {f.name: f for f in fits}
    assert found["code-fast"].need_gb == pytest.approx(5.6, abs=0.1)        # 2.8 by size_gb and a tenth
    assert {f.source for f in fits} == {"dimensions", "size_gb"}
    assert found["plan"].source == "size_gb"
    queued = llmstack.measure_tiers(config.on_channel("next"), llmstack.Machine(60.0, "", True), {"HF_HOME": "/nonexistent"})[1]
    assert queued.memory is not None
    assert queued.memory.weights == pytest.approx(50e9, rel=0.01), "size_gb_next, where no file's size is known"


def test_a_copy_of_the_program_alone_counts_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> bytes:
        raise llmstack.UserError(f"{name} is missing")

    monkeypatch.setattr(llmstack, "read_resource", missing)
    config = llmstack.Config(tiers=(llmstack.Tier("t", hf_repo="o/n", hf_file="Qwen3-8B-Q4_K_M.gguf", size_gb=5.0),))
    fit = llmstack.measure_tiers(config, llmstack.Machine(60.0, "", True), {})[0]
    assert (fit.source, fit.need_gb) == ("size_gb", pytest.approx(5.5))


# ---- The trained context

INI = "[DEFAULT]\nmemory_gb = 4\n[t]\nrole = fast\npath = {path}\nctx_size = 32768\n{more}\n"


@pytest.fixture
def project(tmp_path: Path) -> Any:
    path = gguf_models.write(tmp_path / "m.gguf", *gguf_models.model("llama", layers=1, ctx=8192))

    def write(more: str = "") -> llmstack.Places:
        Path(".llmstack").mkdir(exist_ok=True)
        Path(".llmstack/models.ini").write_text(INI.format(path=path, more=more))
        return llmstack.find_places(os.environ)

    return write


def true(places: llmstack.Places, said: list[str]) -> int:
    return llmstack.true_config(llmstack.load_config(places), places, said.append).tiers[0].ctx_size


def test_no_tier_has_more_context_than_its_model(project: Any) -> None:
    said: list[str] = []
    assert true(project(), said) == 8192
    assert len(said) == 1
    assert said[0].endswith("models.ini:6: ctx_size 32,768 of [t] is more than its model was trained for; 8,192 counts")


def test_yarn_stretches_what_the_model_was_trained_for(project: Any) -> None:
    said: list[str] = []
    assert true(project("rope_scaling = yarn (scale=4, orig_ctx=8192)"), said) == 32_768
    assert true(project("rope_scaling = yarn (scale=2, orig_ctx=8192)"), said) == 16_384
    assert len(said) == 1


def test_each_header_is_read_once(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    places, read = project(), []
    real = llmstack.local_header

    def counting(path: str) -> llmstack.GgufHeader:
        read.append(path)
        return real(path)

    monkeypatch.setattr(llmstack, "local_header", counting)
    assert [true(places, []) for _ in range(3)] == [8192] * 3
    assert len(read) == 1
    Path(read[0]).write_bytes(b"another file")
    assert true(places, []) == 32_768
    assert len(read) == 2


@pytest.mark.parametrize("record", ["", "[]", '{"X": 5}', '{"X": ["1:1", 4096]}', '{"X": {"stamp": 5}}', "\x00"])
def test_a_broken_record_is_written_anew(project: Any, record: str) -> None:
    places = project()
    path = llmstack.load_config(places).tiers[0].path
    Path(places.data).mkdir(parents=True, exist_ok=True)
    Path(places.data, "contexts.json").write_text(record.replace("X", path))
    assert true(places, []) == 8192


def test_every_command_says_the_same_context(project: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    project()
    llmstack.main(["fit", "--json"])
    assert json.loads(capsys.readouterr().out)["tiers"][0]["ctx_size"] == 8192
    llmstack.main(["status", "--json"])
    assert json.loads(capsys.readouterr().out)["tiers"][0]["ctx_size"] == 8192
    assert llmstack.main(["install", "--print"]) == 0
    printed = json.loads(capsys.readouterr().out)
    limits = [m["limit"]["context"] for p in printed["provider"].values() for m in p["models"].values()]
    assert set(limits) == {8192}
    places = llmstack.find_places(os.environ)       # as `start` writes it
    text = llmstack.project_opencode_json(places, llmstack.load_config(places), "http://127.0.0.1:1")
    assert '"context": 32768' not in text
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"model": "auto", "messages": [{"role": "user", "content": "x" * 80_000}]}))
    llmstack.main(["why", str(body)])
    assert "No tier holds 17,264 tokens (estimated)" in capsys.readouterr().out


def test_every_command_says_what_a_running_server_holds(
        project: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    places = project()
    monkeypatch.setattr(llmstack, "held_contexts", lambda places: {"auto": 4096, "t": 4096})
    llmstack.main(["fit", "--json"])
    assert json.loads(capsys.readouterr().out)["tiers"][0]["ctx_size"] == 4096
    assert llmstack.main(["install", "--print"]) == 0
    printed = json.loads(capsys.readouterr().out)
    limits = [m["limit"]["context"] for p in printed["provider"].values() for m in p["models"].values()]
    assert set(limits) == {4096}
    assert llmstack.load_extra("why").why_config(places, llmstack).tiers[0].ctx_size == 4096


@pytest.mark.parametrize(("told", "held"), [
    ({"data": [{"id": "t", "context_length": 4096}, {"id": "u"}, 5]}, {"t": 4096, "u": 0, "None": 0}),
    ({"data": "nonsense"}, {}),
    ({}, {}),
])
def test_what_a_router_says_of_contexts_is_looked_at_first(
        told: Any, held: Any, project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    places = project()
    monkeypatch.setattr(llmstack, "running_upstream", lambda places: llmstack.Upstream("127.0.0.1", 9))
    monkeypatch.setattr(llmstack, "asked_json", lambda upstream, path: told)
    assert llmstack.held_contexts(places) == held
    monkeypatch.setattr(llmstack, "running_upstream", lambda places: None)
    assert llmstack.held_contexts(places) == {}


def test_a_quantised_v_without_flash_attention_is_refused_by_line() -> None:
    text = "[DEFAULT]\nflash_attn = off\n{}[t]\nrole = fast\npath = x\n"
    with pytest.raises(llmstack.ConfigError, match=r"models.ini:2: flash_attn = off and cache_type_v = q8_0"):
        llmstack.parse_models_ini(text.format(""))
    llmstack.parse_models_ini(text.format("cache_type_v = f16\n"))          # a quantised K alone is taken


# ---- Memory that runs short

CALM = llmstack.MemoryState(0.0, 10.0, 64.0)


@pytest.mark.parametrize(("now", "why"), [
    (CALM, ""),
    (CALM._replace(stalled_pct=50.0, available_gb=40.0, swapped_bytes=2**30), ""),    # a large file is being read
    (CALM._replace(stalled_pct=12.4, available_gb=2.0), "programs wait for memory 12 % of the time"),
    (CALM._replace(swapped_bytes=300 * MIB, available_gb=2.0), "the machine swaps (300 MiB just now)"),
    (CALM._replace(swapped_bytes=30 * MIB, available_gb=2.0), ""),
    (CALM._replace(available_gb=0.5), "only 0.5 GB of memory are available"),
    (CALM._replace(critical=True), "the system says that memory is critically short"),
    (CALM._replace(card_free_gb=0.05), "only 50 MB are free on the card"),
    (CALM._replace(card_free_gb=0.3), ""),                                  # a load at the limit left as much
    (llmstack.MemoryState(), ""),                                           # nothing can be told
])
def test_when_memory_is_short(now: llmstack.MemoryState, why: str) -> None:
    assert llmstack.memory_pressure(now, CALM) == why


def test_this_machines_state_can_be_read() -> None:
    state = llmstack.read_memory_state(False)
    assert state.swapped_bytes >= 0
    assert state.available_gb <= max(state.total_gb, 0)


def test_a_mac_is_asked_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = {"sysctl": "4\n", "vm_stat": "Mach Virtual Memory Statistics:\nSwapins:  7.\nSwapouts:      100.\n"}
    monkeypatch.setattr(llmstack, "IS_MAC", True)
    monkeypatch.setattr(llmstack, "program_output", lambda command: outputs[command[0]])
    state = llmstack.read_memory_state(False)
    assert (state.critical, state.swapped_bytes) == (True, 1_638_400)


def test_what_is_free_on_the_card_is_nvidias_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "program_output", lambda command: "GPU-1, 10000, 100, 9850\n")
    assert llmstack.read_memory_state(True).card_free_gb == pytest.approx(50 * MIB / 1e9)


def test_a_shortage_is_over_after_some_calm_looks() -> None:
    states = [CALM, CALM._replace(critical=True), CALM, CALM, CALM]
    left = iter(states)
    watch = llmstack.MemoryWatch(llmstack.Machine(1.0, "", False), lambda _: next(left))
    said = [bool(watch.look()) for _ in states[1:]]
    assert said == [True, True, True, False]


def test_the_engine_is_told_from_a_thread(engine: llmstack.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack.MemoryWatch, "INTERVAL_S", 0.001)
    monkeypatch.setattr(engine, "preload", lambda: None)
    monkeypatch.setattr(engine, "close", lambda: None)
    told = threading.Event()
    monkeypatch.setattr(engine, "ease", lambda pressure: pressure and told.set())
    watch = llmstack.MemoryWatch(llmstack.Machine(1.0, "", False), lambda _: CALM._replace(critical=True))
    app = llmstack.EngineApp(engine, llmstack.Log("", "error"), watch)
    app.start()
    assert told.wait(20)
    app.close()


class Process:
    pid = 0
    returncode = 0

    def poll(self) -> None:
        return None


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> llmstack.Engine:
    """An engine with f and p loaded, and nothing behind them."""
    made = llmstack.Engine(CONFIG, lambda *_: [], llmstack.Log(str(tmp_path / "log"), "info"), str,
                           llmstack.EnginePlan({}, 100.0, fits=fits_of(NEED)))
    for number, name in enumerate("fp"):
        model = made.models[name]
        model.process, model.last_used = Process(), number
        model.turn_to("ready")
    monkeypatch.setattr(made, "_stop", lambda model: None)
    return made


def states(engine: llmstack.Engine) -> dict[str, str]:
    return {m.name: m.state for m in engine.models.values() if m.state != "stopped"}


def test_the_model_that_was_idle_longest_goes_first(engine: llmstack.Engine, tmp_path: Path) -> None:
    engine.ease("the machine swaps")
    assert states(engine) == {"f": "stopping", "p": "ready"}
    engine.models["p"].in_flight = 1
    engine.ease("the machine swaps")
    assert states(engine)["p"] == "ready"
    engine._log.flush()
    text = (tmp_path / "log").read_text()
    assert text.count("memory: the machine swaps") == 1
    assert "f: idle, unloading for the machine swaps" in text
    assert llmstack.EngineApp(engine, engine._log).memory()["pressure"] == "the machine swaps"


def test_nothing_takes_more_while_memory_is_short(engine: llmstack.Engine) -> None:
    engine.pressure = "the machine swaps"
    with pytest.raises(llmstack.LoadError, match=r"u needs about 26.2 GB, and the machine swaps"):
        engine._room_for(engine.enqueue(engine.models["u"]))
    engine.models["u"].needs = (9.0,)                 # takes the place of another
    victims = engine._room_for(engine.enqueue(engine.models["u"]))
    assert [m.name for m in victims or ()] == ["f", "p"]
    engine.pressure = ""
    engine.models["u"].needs = (26.2,)
    assert engine._room_for(engine.enqueue(engine.models["u"])) == []


# ---- The profiles' ladders

RUNGS = {"high": "agent", "mid": "agent", "floor": "agent", "long": "fast"}


@pytest.mark.parametrize("name", list(llmstack.PROFILES))
def test_every_rung_of_a_profile_is_reached(name: str) -> None:
    """Some conversation meets it, and its tier holds it with room to answer."""
    text = llmstack.read_profile(name).decode("utf-8")
    config, _ = llmstack.parse_models_ini(text)
    roles, found = {t.name: t.role for t in config.tiers}, set()
    for tokens in range(1000, 40_000, 100):
        for turns in (1, config.routing.multi_turn):
            facts = llmstack.Facts(True, "auto", False, tokens * 4, 0, 0, 0, turns, 0, "")
            decision = llmstack.decide(facts, config)
            if "no tier holds" not in decision.reason:
                found.add((decision.rung, roles[decision.tier]))
    assert found >= set(RUNGS.items())


def test_what_is_loaded_beside_a_model_counts(tmp_path: Path) -> None:
    """A projector and an adapter by their files, a draft with a KV cache of its own."""
    model, draft = (gguf_models.write(tmp_path / f"{n}.gguf", *gguf_models.model("qwen3", vocab=300)) for n in ("model", "draft"))
    for name, size in (("mmproj-F16.gguf", 3_000_000), ("style.gguf", 500_000)):
        (tmp_path / name).write_bytes(b"x" * size)

    def weights(*lines: str) -> int:
        text = "\n".join(("[t]", "role = fast", f"path = {model}", "ctx_size = 8k", *lines))
        config, _ = llmstack.parse_models_ini(text)
        fits = llmstack.measure_tiers(config, llmstack.Machine(24, "", False), {})
        assert fits[0].memory is not None
        assert fits[0].need_gb == fits[0].memory.total / 1e9
        return fits[0].memory.weights

    alone = weights()
    assert weights("mmproj = auto") - alone == 3_000_000
    assert weights(f"lora = {tmp_path / 'style.gguf'}") - alone == 500_000
    header = llmstack.local_header(str(draft))
    own = llmstack.estimate_memory(header, 8192, llmstack.LoadOptions())
    assert weights(f"draft = {draft}") - alone == own.total
    assert own.kv > 0
    assert weights("draft = o/d:not-here.gguf") == alone
