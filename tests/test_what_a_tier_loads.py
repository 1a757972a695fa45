"""Projectors that `auto` finds, experts on the host, batches and slots: what is fetched, loaded and counted."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, Iterator

import pytest

import llmstack
from tests import gguf_models
from tests.fake_hub import FakeHub
from tests.test_download import worker_gone
from tests.test_fit import REPORTER, ROOT, reported, without_cache

PROBE = llmstack.load_extra("probe")
CARD = llmstack.Machine(24.0, "a card", True, True, 48.0)
MOE: dict[str, Any] = {"experts": 16, "used": 8, "expert_ff": 768}


@pytest.fixture
def places() -> llmstack.Places:
    Path(".llmstack").mkdir()
    return llmstack.find_places(os.environ)


def write_ini(*lines: str) -> llmstack.Config:
    places = llmstack.find_places(os.environ)
    Path(places.models_ini).write_text("\n".join(lines) + "\n")
    llmstack.trust_project(places, "run")
    return llmstack.load_config(places)


# ---- mmproj = auto


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    server.repos["o/eyes"] = {"m.gguf": b"m" * 900, "mmproj-BF16.gguf": b"b" * 300, "mmproj-F16.gguf": b"f" * 200}
    server.repos["o/blind"] = {"m.gguf": b"m" * 901}
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.stop()


EYES = ("[a]", "role = agent", "hf_repo = o/eyes", "hf_file = m.gguf", "mmproj = auto")


def test_the_repositorys_projector_comes_with_the_model(
    hub: FakeHub, places: llmstack.Places, real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_ini(*EYES)
    assert llmstack.main(["download", "--wait"]) == 0
    worker_gone(places)
    cache = llmstack.hub_cache_dir(os.environ)
    projector = llmstack.local_file(cache, "o/eyes", "mmproj-F16.gguf")
    assert projector
    assert not llmstack.local_file(cache, "o/eyes", "mmproj-BF16.gguf")
    assert llmstack.ready_tier(config.tiers[0], os.environ).settings == {"mmproj": projector}
    extra = llmstack.load_extra("setup")
    setup = extra.Setup(places, os.environ, None, print, llmstack._never_ask, [], [])
    assert extra.setup_jobs(setup, llmstack) == []
    capsys.readouterr()
    assert llmstack.main(["list", "--json"]) == 0
    assert {row["name"]: row["tiers"] for row in json.loads(capsys.readouterr().out)} == {
        "o/eyes:m.gguf": ["a"], "o/eyes:mmproj-F16.gguf": ["a"]}


def test_a_repository_without_one(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    write_ini("[a]", "role = agent", "hf_repo = o/blind", "hf_file = m.gguf", "mmproj = auto")
    assert llmstack.main(["download", "--wait"]) == 0
    worker_gone(places)
    said = Path(places.log("dl-a-current.log")).read_text()
    assert "o/blind has no mmproj*.gguf: mmproj = auto finds nothing there" in said
    assert llmstack.local_file(llmstack.hub_cache_dir(os.environ), "o/blind", "m.gguf")


def test_a_model_that_comes_later_leaves_the_projector_in_place(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    write_ini(*EYES)
    assert llmstack.main(["download", "--wait"]) == 0
    worker_gone(places)
    hub.repos["o/eyes"]["n.gguf"] = b"n" * 700
    hub.revision["o/eyes"] = 1
    write_ini(*EYES, "[b]", "hf_repo = o/eyes", "hf_file = n.gguf")
    assert llmstack.main(["download", "b", "--wait"]) == 0
    worker_gone(places)
    assert llmstack.local_file(llmstack.hub_cache_dir(os.environ), "o/eyes", llmstack.ANY_PROJECTOR)


@pytest.mark.parametrize(("files", "chosen"), [
    (["m.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf"], "mmproj-F16.gguf"),
    (["mmproj-Q8_0.gguf", "mmproj-BF16.gguf"], "mmproj-BF16.gguf"), (["MMPROJ.GGUF"], "MMPROJ.GGUF"),
    (["d/mmproj-F16.gguf", "m.gguf", "mmproj.txt"], ""), ([], ""),
])
def test_f16_before_others(files: list[str], chosen: str) -> None:
    assert llmstack.choose_projector(files) == chosen


# ---- experts on the host


def moe_file(path: Path) -> Path:
    return gguf_models.write(path / "moe.gguf", *gguf_models.model("qwen3moe", **MOE))


def on_the_host(count: int) -> tuple[llmstack.Override, ...]:
    return llmstack.tensor_overrides({"n_cpu_moe": count})


def estimate(path: Path, **options: Any) -> llmstack.Memory:
    load = llmstack.LoadOptions(gpu_layers=999, **options)
    return llmstack.estimate_memory(llmstack.local_header(str(path)), 4096, load)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 99])
def test_experts_that_stay_on_the_host_count_there(count: int, tmp_path: Path) -> None:
    path = moe_file(tmp_path)
    plain, moved = estimate(path), estimate(path, overrides=on_the_host(count))
    each = 3 * 2 * 1024 * 768 * 16              # gate, up and down of a layer, F16
    assert moved.total == plain.total
    assert moved.host - plain.host == each * min(count, 4)


def test_a_layer_on_the_host_counts_once(tmp_path: Path) -> None:
    path = moe_file(tmp_path)
    header = llmstack.local_header(str(path))
    three = llmstack.LoadOptions(gpu_layers=3)  # the last two layers and the output
    both = three._replace(overrides=on_the_host(3))
    hosts = [llmstack.estimate_memory(header, 4096, load).host for load in (three, both)]
    assert hosts[1] - hosts[0] == sum(size for name, size in header.tensors.items() if "blk.2.ffn_" in name and "exps" in name)


def test_llama_cpp_keeps_what_is_counted(real_data: Path, tmp_path: Path) -> None:
    path = moe_file(tmp_path)
    python = llmstack.environment_program(llmstack.LLAMA_CPP, str(real_data))
    command = [python, "-c", REPORTER, str(ROOT / "share" / "guests"), "-m", str(path), "--port", "0", "-c", "256",
               "--load-mode", "mmap", "--no-warmup", "--n-cpu-moe", "3"]
    said = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
                          check=False).stdout.decode("utf-8", "replace")
    moved: dict[str, int] = {}
    for name, mib in re.findall(r"tensor (\S+) \(([0-9]+) MiB [^)]*\) buffer type overridden to CPU", said):
        moved[name] = int(mib) << 20
    assert sum(moved.values()) == estimate(path, overrides=on_the_host(3)).host - estimate(path).host


def test_known_models_have_experts_by_their_dimensions() -> None:
    header = gguf_models.header_of("Qwen3-Coder-30B-A3B-Instruct-Q6_K")
    assert header is not None
    share = sum(header.tensors.values()) / header.tensor_bytes
    assert len(header.tensors) == 48
    assert 0.9 < share < 1


def test_the_parts_are_what_is_needed(places: llmstack.Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    write_ini("[a]", "role = agent", f"path = {moe_file(tmp_path)}", "ctx_size = 8k", "n_cpu_moe = 2")
    for machine in (CARD, llmstack.Machine(24.0, "one memory", True)):
        monkeypatch.setattr(llmstack, "this_machine", lambda config, found=machine: found)
        assert llmstack.main(["fit", "--json"]) == 0
        row, = json.loads(capsys.readouterr().out)["tiers"]
        assert sum(row["memory"].values()) / 1e9 == pytest.approx(row["need_gb"] + row["host_gb"])
        assert (row["host_gb"] > 0.1) is bool(machine.host_gb)


# ---- batches and slots


@pytest.mark.parametrize(("lines", "ubatch"), [
    ((), 512), (("ubatch = 1024",), 1024), (("batch = 256",), 256), (("ubatch = 4096",), 2048), (("role = embed",), 2048),
    (("role = embed", "ctx_size = 700"), 700), (("role = rerank", "ubatch = 64"), 64),
    (("ubatch = 4096", "batch = 4096"), 4096),
])
def test_what_is_computed_together(lines: tuple[str, ...], ubatch: int, places: llmstack.Places) -> None:
    config = write_ini("[a]", "path = a.gguf", *lines)
    assert llmstack.load_options(config.tiers[0], config, CARD).ubatch == ubatch


@pytest.mark.parametrize("ubatch", [128, 2048])
def test_a_ubatch_takes_what_llama_cpp_reports(ubatch: int, real_data: Path, tmp_path: Path) -> None:
    path = moe_file(tmp_path)
    load = llmstack.LoadOptions(ubatch=ubatch)
    guess = without_cache(llmstack.estimate_memory(llmstack.local_header(str(path)), 4096, load))
    real = reported(real_data, path, "-c", "4096", "-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0", "-ub", str(ubatch))
    print(f"-ub {ubatch}: {guess.compute} / {real.compute}: {guess.compute / real.compute - 1:+.2%}")
    assert guess.compute == pytest.approx(real.compute, rel=0.16)


def test_a_request_of_a_tier_with_slots_may_fill_its_context(
    places: llmstack.Places, real_data: Path
) -> None:
    """The router counts with ctx_size; without a shared cache each of the slots had a part of it."""
    from tests.noise_model import render_noise_gguf
    Path("noise.gguf").write_bytes(render_noise_gguf())
    config = write_ini("[a]", "path = ../noise.gguf", "ctx_size = 2048", "parallel = 4")
    with PROBE.Trial(config.tiers[0], config, places, os.environ, llmstack) as trial:
        props = trial.ask("/props")[1]
    assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (4, 2048)


def test_two_trials_at_once_each_have_a_server_of_their_own(
    places: llmstack.Places, real_data: Path
) -> None:
    """llama-server shares its port: with the same one, each asked the other's server."""
    from tests.noise_model import render_noise_gguf
    Path("noise.gguf").write_bytes(render_noise_gguf())
    config = write_ini("[a]", "path = ../noise.gguf", "ctx_size = 2048",
                       "[b]", "path = ../noise.gguf", "ctx_size = 1024")
    trials = [PROBE.Trial(tier, config, places, os.environ, llmstack) for tier in config.tiers]
    with trials[0] as first, trials[1] as second:
        for _ in range(8):
            contexts = [trial.ask("/props")[1]["default_generation_settings"]["n_ctx"]
                        for trial in (first, second)]
            assert contexts == [2048, 1024]
        key, first._upstream.key = first._upstream.key, ""
        assert first.ask("/props")[0] == 401, "a web page has no key"
        first._upstream.key = key
