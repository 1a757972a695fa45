"""Several cards: which of them a tier is on, whether it fits there, and what llama-server calls them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import llmstack
from tests import gguf_models

CUDA = """\
ggml_cuda_init: found 2 CUDA devices:
  Device 0: NVIDIA GeForce RTX 4090, compute capability 8.9, VMM: yes
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24081 MiB, 23650 MiB free)
  CUDA1: NVIDIA GeForce RTX 3060 (11907 MiB, 11800 MiB free)
"""
FIT = llmstack.load_extra("fit")
TWO = llmstack.Machine(36.0, "two cards", True, True, 48.0, (24.0, 12.0))


@pytest.mark.parametrize(("text", "found"), [
    (CUDA, [("CUDA0", "NVIDIA GeForce RTX 4090", 24081, 23650), ("CUDA1", "NVIDIA GeForce RTX 3060", 11907, 11800)]),
    ("Available devices:\n  Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31) (24560 MiB, 24100 MiB free)\n",
     [("Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)", 24560, 24100)]),
    ("Available devices:\r\n  ROCm0: AMD Radeon Graphics (98304 MiB, 97000 MiB free)\r\n",
     [("ROCm0", "AMD Radeon Graphics", 98304, 97000)]),
    ("Available devices:\n  MTL0: Apple M2 Max (49152 MiB, 49151 MiB free)\n", [("MTL0", "Apple M2 Max", 49152, 49151)]),
    ("Available devices:\n  (none)\n", []), ("error: invalid argument: --list-devices\n", []), ("", []),
])
def test_what_llama_server_lists(text: str, found: list[Any]) -> None:
    assert FIT.parse_devices(text) == found


def test_a_real_llama_server_that_has_none(real_data: Path) -> None:
    assert FIT.list_devices((), llmstack) == []
    assert FIT.list_devices(("/bin/false",), llmstack) == []


def configured(*lines: str) -> llmstack.Config:
    return llmstack.parse_models_ini("\n".join(("[a]", "role = agent", "path = /a.gguf", *lines)) + "\n")[0]


@pytest.mark.parametrize(("lines", "cards"), [
    ((), (0, 1)), (("device = CUDA1",), (1,)), (("device = CUDA1,CUDA0",), (1, 0)), (("device = Metal",), (0, 1)),
    (("device = CUDA7",), (0, 1)), (("split_mode = none",), (0,)), (("split_mode = none", "main_gpu = 1"), (1,)),
    (("split_mode = none", "main_gpu = 9"), (0, 1)), (("split_mode = none", "device = Vulkan1"), (1,)),
])
def test_the_cards_of_a_tier(lines: tuple[str, ...], cards: tuple[int, ...]) -> None:
    config = configured(*lines)
    assert llmstack.cards_of(llmstack.tier_config(config, config.tiers[0]), TWO) == cards


def fit(*lines: str, machine: llmstack.Machine = TWO) -> llmstack.TierFit:
    config = configured("ctx_size = 8k", *lines)
    header = gguf_models.header_of("Qwen3-Coder-30B-A3B-Instruct-Q6_K")     # 25.1 GB
    assert header is not None
    return llmstack.fit_tier(config.tiers[0], config, machine, header, "hub", "")


def test_a_tier_fits_on_the_cards_that_it_may_use() -> None:
    assert fit().fits
    assert not fit("device = CUDA0").fits
    assert not fit("split_mode = none", "main_gpu = 1").fits
    assert fit("device = CUDA1", "n_cpu_moe = 40").fits
    assert (fit().cards, fit("device = CUDA1").cards, fit("device = none").cards) == ((0, 1), (1,), ())
    assert fit(machine=TWO._replace(budget_gb=24.0, cards=(24.0,))).cards == (), "of one card there is nothing to say"


def test_cudas_context_counts_on_each() -> None:
    spread, alone = fit().memory, fit("device = CUDA0").memory
    assert spread is not None
    assert alone is not None
    assert spread.context == 2 * llmstack.CUDA_CONTEXT_BYTES
    assert alone.context == llmstack.CUDA_CONTEXT_BYTES + llmstack.BARE_CONTEXT_BYTES


def test_a_tier_on_no_device_is_the_processors() -> None:
    memory = fit("device = none").memory
    assert memory is not None
    assert (memory.context, memory.host) == (0, 0)


def test_the_budget_knows_each_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = "GPU-1, 24576, 0, 0\nGPU-2, 12288, 0, 1024\n"
    monkeypatch.setattr(llmstack, "IS_MAC", False)
    monkeypatch.setattr(llmstack, "DRM", str(tmp_path))
    monkeypatch.setattr(llmstack, "program_output", lambda command: listed if command[0] == "nvidia-smi" else "")
    found = llmstack.this_machine(llmstack.Config())
    assert [round(gb, 2) for gb in found.cards] == [25.77, 11.81]
    assert found.budget_gb == pytest.approx(sum(found.cards))


def test_fit_says_which_card(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path(".llmstack").mkdir()
    made = gguf_models.write(Path("m.gguf"), *gguf_models.model("qwen3", vocab=300))
    places = llmstack.find_places(os.environ)
    Path(places.models_ini).write_text(f"[a]\nrole = fast\npath = {made.absolute()}\ndevice = CUDA1\n"
                                       f"[b]\nrole = agent\npath = {made.absolute()}\n")
    monkeypatch.setattr(llmstack, "this_machine", lambda config: TWO)
    monkeypatch.setattr(llmstack, "find_llama_server", lambda *_: ("llama-server",))
    monkeypatch.setattr(llmstack, "program_output", lambda command: CUDA)
    assert llmstack.main(["fit"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "CUDA1: NVIDIA GeForce RTX 3060, 12.5 GB, 12.4 free now" in out
    assert re.search(r"[0-9.]+ on CUDA1, by its file", out)
    assert re.search(r"[0-9.]+ on CUDA0 and [0-9.]+ on CUDA1, by its file", out)
    assert llmstack.main(["fit", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [device["name"] for device in found["devices"]] == ["CUDA0", "CUDA1"]
    assert [tier["cards"] for tier in found["tiers"]] == [[1], [0, 1]]


# What nvidia-smi showed on two H100 after a prompt of 2,454 tokens, of llama.cpp b11549 and models
# of these dimensions whose weights are zeros.
DENSE = {"arch": "qwen3", "layers": 24, "embd": 2048, "heads": 16, "kv": 8, "ff": 8192}
MOE = {"arch": "qwen3moe", "layers": 16, "embd": 2048, "heads": 16, "kv": 4, "ff": 4096,
       "experts": 32, "used": 4, "expert_ff": 768}


@pytest.mark.parametrize(("dimensions", "settings", "mib"), [
    pytest.param(DENSE, {}, 8806, id="split over both"),
    pytest.param(DENSE, {"tensor_split": "3,1"}, 8806, id="split three to one"),
    pytest.param(DENSE, {"device": "CUDA1"}, 7842, id="on one, the other is seen"),
    pytest.param(DENSE, {"split_mode": "none", "main_gpu": 1}, 7842, id="not split"),
    pytest.param(MOE, {}, 8450, id="experts, split over both"),
    pytest.param(MOE, {"n_cpu_moe": 8}, 5706, id="experts, half of them on the host"),
])
def test_what_two_cards_held_is_what_fit_says(tmp_path: Path, dimensions: dict[str, Any],
                                              settings: dict[str, Any], mib: int) -> None:
    path = gguf_models.write(tmp_path / "m.gguf", *gguf_models.model(**dimensions))
    tier = llmstack.Tier("big", "agent", path=str(path), ctx_size=65_536,
                         server=tuple(settings.items()))
    machine = llmstack.Machine(170.0, "two cards", True, True, 200.0, (85.0, 85.0))
    fit, = llmstack.measure_tiers(llmstack.Config(tiers=(tier,)), machine, {})
    measured_gb = mib * llmstack.MIB / 1e9
    assert measured_gb <= fit.need_gb < measured_gb * 1.02
