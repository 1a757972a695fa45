"""What fits together, card by card: where tensors go, what each card takes, and who goes by it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import llmstack
from tests import gguf_models
from tests.test_fit import REPORTER, ROOT

TWO = llmstack.Machine(48.0, "two cards", True, False, 64.0, (24.0, 24.0))
MOE: dict[str, Any] = {"arch": "qwen3moe", "experts": 16, "used": 8, "expert_ff": 768}
GB = 10 ** 9


def header(**dimensions: Any) -> llmstack.GgufHeader:
    data, _ = gguf_models.header_bytes(*gguf_models.model(**{"arch": "qwen3", **dimensions}))
    return llmstack.parse_gguf_header(lambda at, count: data[at:at + count])


def heavy(layers: int, gb: float, tensors: dict[str, int] | None = None) -> llmstack.GgufHeader:
    """A model of so many gigabytes, all of them in its layers or in the tensors that are named."""
    plain = header(layers=layers, vocab=300)
    return plain._replace(tensor_bytes=round(gb * GB), embd_bytes=0, tied=False, tensors=tensors or {})


def fit(lines: str, model: llmstack.GgufHeader, machine: llmstack.Machine = TWO) -> llmstack.TierFit:
    config, _ = llmstack.parse_models_ini(f"[a]\nrole = agent\npath = /a.gguf\nctx_size = 4k\n{lines}")
    return llmstack.fit_tier(config.tiers[0], config, machine, model, "hub", "")


# ---- override_tensor


RULES = r"blk\.[01]\.ffn_.*_exps=CPU,attn_q=CPU,ffn_up_exps=CPU"


def test_tensors_are_matched_as_llama_cpp_matches_them(real_data: Path, tmp_path: Path) -> None:
    path = gguf_models.write(tmp_path / "moe.gguf", *gguf_models.model(**MOE))
    python = llmstack.environment_program(llmstack.LLAMA_CPP, str(real_data))
    command = [python, "-c", REPORTER, str(ROOT / "share" / "guests"), "-m", str(path), "--port", "0",
               "-c", "256", "--load-mode", "mmap", "--no-warmup", "-ot", RULES]
    said = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=60, check=False)
    text = said.stdout.decode("utf-8", "replace")
    moved = set(re.findall(r"tensor (\S+) \([^)]*\) buffer type overridden to CPU", text))
    found = llmstack.local_header(str(path))
    plain, on_host = (llmstack.estimate_memory(found, 4096, llmstack.LoadOptions(gpu_layers=99, overrides=rules))
                      for rules in ((), llmstack.tensor_overrides({"override_tensor": RULES})))
    assert len(moved) == 16
    assert on_host.host - plain.host == sum(found.tensors[name] for name in moved)
    assert on_host.total == plain.total


def test_the_first_rule_that_matches_counts_and_their_order_is_that_of_the_flags() -> None:
    to_card = {"override_tensor": r"blk\.0\..*_exps=CUDA0"}
    first = llmstack.tensor_overrides({**to_card, "n_cpu_moe": 2})
    last = llmstack.tensor_overrides({"n_cpu_moe": 2, **to_card})
    hosts = [llmstack.estimate_memory(header(**MOE), 4096, llmstack.LoadOptions(gpu_layers=99, overrides=rules)).host
             for rules in (first, last)]
    each = 3 * 2 * 1024 * 768 * 16              # gate, up and down of a layer, F16
    assert hosts[1] - hosts[0] == each


def test_a_layer_that_is_on_the_host_may_have_tensors_on_a_card() -> None:
    load = llmstack.LoadOptions(gpu_layers=2)
    rules = llmstack.tensor_overrides({"override_tensor": r"blk\.0\..*_exps=CUDA0,token_embd=CUDA0"})
    plain, moved = (llmstack.estimate_memory(header(**MOE), 4096, load._replace(overrides=r)) for r in ((), rules))
    found = header(**MOE)
    gone = sum(size for name, size in found.tensors.items() if name.startswith("blk.0.") and "_exps" in name)
    assert plain.host - moved.host == gone + found.embd_bytes


def test_an_embedding_that_is_the_output_is_there_once_where_both_are_in_one_place() -> None:
    """As llama-server logs it: its override counts for both."""
    found = header(tied=True)
    load = llmstack.LoadOptions(gpu_layers=99)
    rules = llmstack.tensor_overrides({"override_tensor": "token_embd=CPU"})
    plain, moved = (llmstack.estimate_memory(found, 4096, load._replace(overrides=r)) for r in ((), rules))
    assert plain.weights - moved.weights == found.embd_bytes
    assert (plain.host, sum(plain.each) - sum(moved.each)) == (moved.host, found.embd_bytes)


def test_a_pattern_that_python_does_not_know_moves_nothing() -> None:
    rules = llmstack.tensor_overrides({"override_tensor": "(=CPU"})
    load = llmstack.LoadOptions(gpu_layers=99)
    assert (llmstack.estimate_memory(header(), 4096, load._replace(overrides=rules))
            == llmstack.estimate_memory(header(), 4096, load))


# ---- what each card takes


@pytest.mark.parametrize(("lines", "shares"), [
    ("", (10, 10)), ("tensor_split = 3,1", (15, 5)), ("tensor_split = 0,1", (0, 20)),
    ("device = CUDA1", (0, 20)), ("split_mode = none\nmain_gpu = 0", (20, 0)),
    ("device = CUDA1,CUDA0\ntensor_split = 3,1", (5, 15)), ("tensor_split = 0,0,7", (10, 10)),
])
def test_layers_are_split_as_told_else_evenly(lines: str, shares: tuple[int, int]) -> None:
    found = fit(lines, heavy(19, 20.0))         # 19 layers and the output, a gigabyte each
    assert found.needs[:2] == pytest.approx(shares, abs=0.2)
    assert sum(found.needs) == pytest.approx(found.need_gb + found.host_gb)


def test_by_default_they_are_split_by_what_is_free() -> None:
    machine = TWO._replace(budget_gb=32.0, cards=(24.0, 8.0))
    assert fit("", heavy(19, 20.0), machine).needs[:2] == pytest.approx((15, 5), abs=0.2)


def test_experts_on_the_host_leave_the_first_card_empty() -> None:
    experts = {f"blk.{i}.ffn_up_exps.weight": GB for i in range(19)}
    model = heavy(19, 20.0, experts)
    assert fit("n_cpu_moe = 8", model).needs == pytest.approx((2.5, 9.5, 8.2), abs=0.5)
    assert fit("override_tensor = exps=CUDA1", model).needs[:2] == pytest.approx((0.5, 19.5), abs=0.3)


def test_a_tier_on_no_device_takes_of_the_host() -> None:
    found = fit("device = none", heavy(19, 20.0))
    assert (found.need_gb, found.needs[:2]) == (0, (0, 0))
    assert found.fits
    assert found.host_gb == pytest.approx(20, abs=0.5)
    assert not fit("device = none", heavy(19, 20.0), TWO._replace(host_gb=16.0)).fits


def test_each_card_is_a_limit() -> None:
    assert fit("", heavy(19, 40.0)).fits
    assert not fit("tensor_split = 3,1", heavy(19, 40.0)).fits
    assert not fit("device = CUDA0", heavy(19, 30.0)).fits


def test_a_budget_of_the_user_is_shared_out() -> None:
    machine = TWO._replace(budget_gb=24.0, cards=(24.0, 8.0))
    assert machine.budgets_gb == (18.0, 6.0, 64.0)
    assert llmstack.Machine(9.0, "", False).budgets_gb == (9.0,)
    assert machine._replace(cards=(24.0,)).budgets_gb == (24.0, 64.0)
    assert machine._replace(cards=(0.0, 0.0)).budgets_gb == (0, 0, 64.0)


def test_cards_that_others_fill_divide_nothing_by_nothing() -> None:
    assert not fit("", heavy(19, 20.0), TWO._replace(budget_gb=0.1, cards=(0.0, 0.0))).fits


# ---- what fits together


PINNED = """\
[f]
role = fast
path = /f.gguf
device = CUDA0
[c]
role = agent
path = /c.gguf
device = CUDA1
[p]
role = plan
path = /p.gguf
device = CUDA0
"""


def pinned_fits(config: llmstack.Config, sizes: dict[str, float]) -> list[llmstack.TierFit]:
    return [llmstack.fit_tier(tier, config, TWO, heavy(19, sizes[tier.name]), "local", "")
            for tier in config.tiers]


def test_two_tiers_that_are_each_on_a_card_of_their_own_stay_together() -> None:
    config, _ = llmstack.parse_models_ini(PINNED)
    fits = pinned_fits(config, {"f": 5.0, "c": 20.0, "p": 20.0})
    needs = {found.name: found.needs for found in fits}
    sets = {frozenset(found.tiers) for found in llmstack.residency_sets(config, needs, TWO.budgets_gb)}
    assert frozenset("fc") in sets
    assert frozenset("cp") in sets, "on a card each"
    assert not any({"f", "p"} <= found for found in sets), "20 and 5 on a card of 24, though 48 are there"


def test_llama_swap_is_told_the_same_sets() -> None:
    config, _ = llmstack.parse_models_ini(PINNED)
    fits = pinned_fits(config, {"f": 5.0, "c": 20.0, "p": 20.0})
    plan = llmstack.SwapPlan(config, llmstack.Binary(("x",)), str, budgets_gb=TWO.budgets_gb,
                             need_gb={found.name: found.needs for found in fits})
    text = llmstack.render_llama_swap_yaml(plan)
    assert re.search(r"# left out: f \+ p would take ~25\.[0-9] \+ 0\.0 GB and [0-9.]+ of the host's,"
                     r" and there are 24\.0 \+ 24\.0 GB and 64\.0 of the host's", text)
    assert '"f & c"' in text


def test_the_hosts_memory_is_a_limit_too() -> None:
    config, _ = llmstack.parse_models_ini(PINNED.replace("CUDA1", "none").replace("CUDA0", "none"))
    fits = pinned_fits(config, {"f": 30.0, "c": 30.0, "p": 30.0})
    needs = {found.name: found.needs for found in fits}
    found = llmstack.residency_sets(config, needs, TWO._replace(host_gb=62.0).budgets_gb)
    assert max(len(one.tiers) for one in found) == 2


class Process:
    pid = 0
    returncode = 0

    def poll(self) -> None:
        return None


def test_the_engine_makes_room_on_the_card_that_is_short(tmp_path: Path) -> None:
    config, _ = llmstack.parse_models_ini(PINNED)
    fits = pinned_fits(config, {"f": 5.0, "c": 20.0, "p": 20.0})
    plan = llmstack.EnginePlan({}, TWO.budget_gb, fits=fits, budgets_gb=TWO.budgets_gb)
    engine = llmstack.Engine(config, lambda *_: [], llmstack.Log(str(tmp_path / "log"), "error"), str, plan)
    for name in "fc":
        engine.models[name].process = Process()
        engine.models[name].turn_to("ready")
    gone = engine._room_for(engine.enqueue(engine.models["p"]))
    assert [model.name for model in gone or ()] == ["f"], "c is on the other card"
    engine.models["f"].turn_to("stopped")
    assert engine._room_for(engine.enqueue(engine.models["f"])) == []


def test_the_engine_says_of_which_memory_there_is_too_little(tmp_path: Path) -> None:
    config, _ = llmstack.parse_models_ini(PINNED)
    fits = pinned_fits(config, {"f": 30.0, "c": 1.0, "p": 1.0})
    plan = llmstack.EnginePlan({}, TWO.budget_gb, fits=fits, budgets_gb=TWO.budgets_gb)
    engine = llmstack.Engine(config, lambda *_: [], llmstack.Log(str(tmp_path / "log"), "error"), str, plan)
    with pytest.raises(llmstack.LoadError, match=r"f needs about 30\.[0-9] \+ 0\.0 GB and 0\.[0-9] of the host's and"
                                                 r" the budget is 24\.0 \+ 24\.0 GB and 64\.0 of the host's"):
        engine._room_for(engine.enqueue(engine.models["f"]))


# ---- the machine's cards, by what its driver is scripted to say


NVIDIA_SMI = "GPU-1, 24576, 0, 0\nGPU-2, 24576, 0, 4096\nGPU-3, 8192, 0, 0\n"


@pytest.mark.parametrize(("seen", "cards"), [
    (None, (25.77, 21.47, 8.59)), ("1", (21.47,)), ("GPU-3,GPU-1", (8.59, 25.77)), ("", ()),
])
def test_the_cards_are_those_that_a_server_sees_without_what_others_hold(
    seen: str | None, cards: tuple[float, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(llmstack, "IS_MAC", False)
    monkeypatch.setattr(llmstack, "DRM", str(tmp_path))
    monkeypatch.setattr(llmstack, "program_output", lambda command: NVIDIA_SMI if command[0] == "nvidia-smi" else "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    machine = llmstack.this_machine(llmstack.Config())
    assert machine.cards == pytest.approx(cards, abs=0.01)
    if cards:
        assert sum(machine.budgets_gb) == pytest.approx(machine.budget_gb + machine.host_gb)


def test_fit_shows_what_each_card_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path(".llmstack").mkdir()
    made = gguf_models.write(Path("m.gguf"), *gguf_models.model("qwen3", vocab=300))
    places = llmstack.find_places(os.environ)
    Path(places.models_ini).write_text(f"[a]\nrole = fast\npath = {made.absolute()}\ndevice = CUDA1\n"
                                       f"[b]\nrole = agent\npath = {made.absolute()}\ntensor_split = 3,1\n")
    machine = llmstack.Machine(1.0, "two cards", True, False, 48.0, (0.5, 0.5))
    monkeypatch.setattr(llmstack, "this_machine", lambda config: machine)
    monkeypatch.setattr(llmstack, "program_output", lambda command: "")
    code = llmstack.main(["fit", "--json"])
    found = json.loads(capsys.readouterr().out)
    together, = found["sets"]
    each = [sum(tier["each_gb"][place] for tier in found["tiers"]) for place in range(3)]
    assert together["each_gb"] == pytest.approx(each)
    assert together["fits"] is (max(each[:2]) <= 0.5)
    assert llmstack.main(["fit"]) == code
    out = capsys.readouterr().out
    assert f"{each[0]:.2f} on card 0 and {each[1]:.2f} on card 1" in out
