"""PURE: MEMORY, PURE: PROFILES and FIT: what a GGUF takes by its header, against llama.cpp's own report."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

import llmstack
from tests import gguf_models
from tests.fake_hub import FakeHub

ROOT = Path(__file__).resolve().parent.parent
MEMORY_PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
BUNDLED = (ROOT / "models.ini").read_text(encoding="utf-8")


FIT = llmstack.load_extra("fit")
ON_GPU = llmstack.LoadOptions(gpu_layers=999)


def parse(data: bytes) -> llmstack.GgufHeader:
    return llmstack.parse_gguf_header(lambda offset, count: data[offset:offset + count])


# ---- Against llama.cpp

DENSE: dict[str, Any] = {"kv": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": DENSE,                                             # every head its own K and V
    "qwen2": {"tied": True},                                    # grouped queries, one matrix in and out
    "qwen3moe": {"experts": 16, "used": 8, "expert_ff": 768},
    "gemma3": {"layers": 6, "window": 512, "tied": True},
    "gemma2": {"tied": True},                                   # four windows of 4,096: both caches full
    "gpt-oss": {"heads": 16, "kv": 4, "head": 64, "experts": 8, "used": 4, "expert_ff": 1024, "window": 128},
    "qwen3next": {"experts": 16, "used": 8, "expert_ff": 512, "shared": 512, "inner": 2048, "state": 128, "group": 8, "rank": 16},
    "granitehybrid": {"ff": 2048, "inner": 2048, "state": 128, "rank": 32, "kv": [0, 2, 0, 0], "tied": True},
    "jamba": {"ff": 2048, "inner": 2048, "state": 16, "rank": 64, "kv": [0, 2, 0, 0], "tied": True},
    "lfm2": {"ff": 2048, "kv": [0, 2, 0, 2], "tied": True, "conv": 3, "extra": {"shortconv.l_cache": 3}},
    "deepseek2": {"layers": 3, "ff": 2048, "experts": 8, "used": 4, "expert_ff": 512, "head": 192, "lora": 512},
}

# llama.cpp reports its buffers from verbosity 4 on, which the command line of the stand-in does not reach.
REPORTER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import llama_server, xllamacpp
params = llama_server.common_params(xllamacpp, llama_server.parse_command_line(sys.argv[2:]))
params.verbosity, params.fit_params = 5, False
server = xllamacpp.Server(params)
import time
time.sleep(0.2)
os._exit(0)
"""


def reported(data: Path, path: Path, *flags: str) -> llmstack.Memory:
    """What the real llama.cpp says it has allocated."""
    python = llmstack.environment_program(llmstack.LLAMA_CPP, str(data))
    command = [python, "-c", REPORTER, str(ROOT / "share" / "guests"), "-m", str(path), "--port", "0",
               "--load-mode", "mmap", "--no-warmup", *flags]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
                          check=False)
    text = done.stdout.decode("utf-8", "replace")
    found = [sum(float(n) for n in re.findall(rf"{what} buffer size = *([0-9.]+) MiB", text))
             for what in ("model", "KV", "RS", "(?:compute|output)")]
    assert found[0], text[-2000:]
    assert found[3], text[-2000:]
    return llmstack.Memory(*(round(n * 1024 * 1024) for n in found))


def without_cache(memory: llmstack.Memory) -> llmstack.Memory:
    """Without what is taken only once there are prompts."""
    return memory._replace(cache=0)


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3next"])
def test_slots_that_share_a_cache(arch: str, slots: int, real_data: Path, tmp_path: Path) -> None:
    path = gguf_models.write(tmp_path / "m.gguf", *gguf_models.model(arch, **MODELS[arch]))
    load = llmstack.LoadOptions(slots=slots)
    guess = without_cache(llmstack.estimate_memory(llmstack.local_header(str(path)), 16_000, load))
    real = reported(real_data, path, "-c", "16000", "-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0", "-np", str(slots), "-kvu")
    print(f"{arch} -np {slots}: {guess} / {real}: {guess.total / real.total - 1:+.2%}")
    assert guess.kv == pytest.approx(real.kv, abs=20_000)
    assert guess.recurrent == pytest.approx(real.recurrent, abs=20_000)
    assert guess.total == pytest.approx(real.total, rel=0.05)


@pytest.mark.parametrize(("arch", "flash"), [(a, True) for a in MODELS] + [(a, False) for a in ("llama", "gemma3", "qwen3next")])
def test_the_estimate_is_what_llama_cpp_reports(arch: str, flash: bool, real_data: Path, tmp_path: Path) -> None:
    path = gguf_models.write(tmp_path / "m.gguf", *gguf_models.model(arch, **MODELS[arch]))
    kind = "q8_0" if flash else "f16"
    load = llmstack.LoadOptions(kind, kind, flash)
    guess = without_cache(llmstack.estimate_memory(llmstack.local_header(str(path)), 16_000, load))
    real = reported(real_data, path, "-c", "16000", "-fa", "on" if flash else "off", "-ctk", kind, "-ctv", kind)
    print(f"{arch} {'fa' if flash else 'no fa'}: {guess} / {real}: {guess.total / real.total - 1:+.2%}")
    assert guess.weights == pytest.approx(real.weights, rel=0.001)
    assert guess.kv == pytest.approx(real.kv, abs=20_000)       # reported to a hundredth of a MiB
    assert guess.recurrent == pytest.approx(real.recurrent, abs=20_000)
    assert guess.compute == pytest.approx(real.compute, rel=0.16)
    assert guess.total == pytest.approx(real.total, rel=0.05)


@pytest.mark.parametrize("file", [
    "Qwen2.5-Coder-3B-Instruct-Q5_K_M", "Qwen3-Coder-30B-A3B-Instruct-Q6_K", "gpt-oss-20b-MXFP4", "gemma-3-12b-it-q4_k_m"])
def test_the_dimensions_the_readme_reckons_with_give_what_a_file_of_them_gives(file: str) -> None:
    header = gguf_models.KNOWN[file]
    k = header.keys
    made = parse(gguf_models.header_bytes(*gguf_models.model(
        header.arch, layers=k["block_count"], embd=k["embedding_length"], heads=k["attention.head_count"],
        kv=k["attention.head_count_kv"], head=k["attention.key_length"], ff=k["feed_forward_length"], vocab=header.vocab,
        tied=header.tied, experts=4 if "expert_used_count" in k else 0, used=k.get("expert_used_count", 0),
        expert_ff=k.get("expert_feed_forward_length", 0), window=k.get("attention.sliding_window", 0)))[0])
    mine, theirs = (llmstack.estimate_memory(h, 65_536, ON_GPU) for h in (header, made))
    assert mine.kv == theirs.kv
    assert mine.compute == pytest.approx(theirs.compute, rel=0.01)


@pytest.mark.parametrize(("name", "gb"), [
    ("Qwen3-Coder-Next-Q4_K_M", 0.856),         # 12 of 48 layers, 2 heads of 256, K and V, q8_0: 13,056 bytes a token
    ("Qwen3-32B-Q4_K_M", 9.127),                    # 64 layers, 8 heads of 128
    ("gpt-oss-20b-MXFP4", 0.869),                     # 12 layers at full length, 12 at 128 * 4 + 512 tokens
])
def test_kv_cache_of_known_models_at_64k(name: str, gb: float) -> None:
    assert llmstack.estimate_memory(gguf_models.KNOWN[name], 65_536).kv / 1e9 == pytest.approx(gb, abs=0.001)


def test_a_second_output_matrix_where_the_embedding_serves_as_one_on_a_gpu() -> None:
    header = gguf_models.KNOWN["Qwen3-4B-Instruct-2507-Q4_K_M"]
    on_cpu, on_gpu = (llmstack.estimate_memory(header, 4096, load) for load in (llmstack.LoadOptions(), ON_GPU))
    assert on_gpu.weights - on_cpu.weights == header.embd_bytes
    assert on_gpu.compute > on_cpu.compute


def test_the_largest_context_that_fits() -> None:
    header = gguf_models.KNOWN["Qwen3-32B-Q4_K_M"]

    def within(limit: float) -> Callable[[int], bool]:
        return lambda ctx: llmstack.estimate_memory(header, ctx).total <= limit

    ctx = llmstack.largest_context(131_072, within(24e9))
    assert within(24e9)(ctx)
    assert not within(24e9)(ctx + 256)
    assert llmstack.largest_context(131_072, within(10e9)) == 0
    assert llmstack.largest_context(131_072, within(1e12)) == 131_072


# ---- Headers

def small(**extra: Any) -> bytes:
    meta, tensors = gguf_models.model("llama", layers=1, vocab=400)
    return gguf_models.header_bytes({**meta, **extra}, tensors)[0]


def test_a_header_is_read_from_blocks_of_any_size() -> None:
    data = small()
    whole = parse(data)
    assert llmstack.parse_gguf_header(lambda at, count: data[at:at + count]) == whole
    assert (whole.arch, whole.vocab, whole.tied, whole.widest) == ("llama", 400, False, 4096)
    assert whole.end == len(data) + gguf_models.header_bytes(*gguf_models.model("llama", layers=1, vocab=400))[1]


def test_version_2_is_read() -> None:
    assert parse(gguf_models.header_bytes(*gguf_models.model("llama", layers=1, vocab=400), version=2)[0]).arch == "llama"


@pytest.mark.parametrize("cut", [0, 3, 10, 30, 1000, -40])
def test_a_header_that_ends_early_is_refused(cut: int) -> None:
    with pytest.raises(llmstack.GgufError, match=r"ends within its header|is not a GGUF"):
        parse(small()[:cut])


def raw(version: int = 3, tensors: int = 0, pairs: int = 1, body: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, pairs) + body


KEY = gguf_models.value("k")[1]


@pytest.mark.parametrize(("data", "why"), [
    (b"PK\3\4" + bytes(100), "is not a GGUF file"),
    (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
    (raw(1), "version 1"),
    (raw(tensors=2 ** 63), "beyond any reason"),
    (raw(pairs=2 ** 40), "beyond any reason"),
    (raw(body=struct.pack("<Q", 2 ** 62)), "beyond any reason"),                         # a key of 4 exabytes
    (raw(body=KEY + struct.pack("<IQ", 8, 2 ** 62)), "beyond any reason"),
    (raw(body=KEY + struct.pack("<IIQ", 9, 8, 2 ** 62)), "ends within"),                 # as many strings
    (raw(body=KEY + struct.pack("<IIQQ", 9, 8, 2 ** 62, 2 ** 62) + bytes(99)), "beyond any reason"),
    (raw(pairs=2, body=KEY + struct.pack("<IIQ", 9, 4, 2 ** 62)), "beyond any reason"),  # as many numbers
    (raw(body=KEY + struct.pack("<IIQ", 9, 9, 5)), "unknown type 9"),
    (raw(body=KEY + struct.pack("<I", 77)), "unknown type 77"),
    (raw(body=KEY + struct.pack("<II", 4, 1)), "holds no weights"),
    (raw(tensors=1, body=KEY + struct.pack("<II", 4, 1)), "names no architecture"),
    (b"GGUF" + bytes(100), "has nothing in its header"),
    (raw(tensors=1, body=gguf_models.value("general.architecture")[1] + struct.pack("<I", 8) + gguf_models.value("llama")[1]
         + KEY + struct.pack("<I", 2 ** 31)), "dimensions"),
])
def test_hostile_headers_are_refused_at_once(data: bytes, why: str) -> None:
    with pytest.raises(llmstack.GgufError, match=why):
        parse(data)


@pytest.mark.parametrize("keys", [
    {}, {"block_count": 0}, {"block_count": 2 ** 31}, {"block_count": 2, "nextn_predict_layers": 2}, {"block_count": "x"}])
def test_a_header_without_sane_layers_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(llmstack.GgufError, match="layers"):
        llmstack.estimate_memory(llmstack.GgufHeader("llama", keys, 0, 0, 0, True, 0), 4096)


@pytest.mark.parametrize("keys", [
    {"attention.head_count": [], "attention.head_count_kv": []}, {"attention.head_count": "many"}, {"embedding_length": -1},
    {"attention.head_count_kv": [1, -5, 3]}, {"expert_used_count": 2.5}, {"attention.sliding_window_pattern": [True]}])
def test_odd_keys_do_not_break_the_estimate(keys: dict[str, Any]) -> None:
    header = llmstack.GgufHeader("gemma3", {"block_count": 4, **keys}, 10, 100, 0, True, 7)
    assert llmstack.estimate_memory(header, 4096).total >= 100


def test_tensors_of_a_type_not_known_here_are_measured_by_where_the_next_begins() -> None:
    body = gguf_models.value("general.architecture")[1] + struct.pack("<I", 8) + gguf_models.value("llama")[1]
    for name, kind, offset in (("a", 99, 0), ("b", 99, 640), ("c", 0, 1000)):
        body += gguf_models.value(name)[1] + struct.pack("<IQIQ", 1, 8, kind, offset)
    assert parse(raw(tensors=3, body=body)).tensor_bytes == 640 + 360 + 32


def test_a_file_that_is_not_whole_says_so(tmp_path: Path) -> None:
    path = gguf_models.write(tmp_path / "m.gguf", *gguf_models.model("llama", layers=1))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(llmstack.GgufError, match=f"is not whole: {size - 1:,} of {size:,} bytes"):
        llmstack.local_header(str(path))


def split(directory: Path) -> tuple[Path, llmstack.GgufHeader]:
    """A model in two parts, and its header in one piece."""
    meta, tensors = gguf_models.model("llama", layers=2, tied=True)
    for number, (own, kept) in enumerate(((meta, tensors[:5]), ({}, tensors[5:]))):
        gguf_models.write(directory / f"m-0000{number + 1}-of-00002.gguf", {**own, "split.no": number, "split.count": 2}, kept)
    return directory / "m-00001-of-00002.gguf", parse(gguf_models.header_bytes(meta, tensors)[0])


def test_a_split_gguf_counts_all_its_parts(tmp_path: Path) -> None:
    first, whole = split(tmp_path)
    header = llmstack.local_header(str(first))
    assert header._replace(end=0) == whole._replace(end=0)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(OSError, match="No such file"):
        llmstack.local_header(str(first))


# ---- Where the file lies

@pytest.mark.parametrize(("env", "expected"), [
    ({}, "~/.cache/huggingface/hub"), ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/h/hub"),
    ({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c"), ({"LLAMA_CACHE": "/l", "HF_HUB_CACHE": "/c"}, "/l")])
def test_the_cache_is_llama_servers(env: dict[str, str], expected: str) -> None:
    assert llmstack.hub_cache_dir(env) == os.path.normpath(os.path.expanduser(expected))


def cached(home: Path, repo: str, file: str, commit: str, head: bool) -> Path:
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    path = folder / "snapshots" / commit / file
    path.parent.mkdir(parents=True)
    if head:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    return path


def test_only_the_snapshot_of_main_counts_as_for_llama_server(home: Path) -> None:
    weights = llmstack.Weights("o/n", "sub/m.gguf", "", 0, "", "current")
    env = {"HF_HOME": str(home)}
    assert llmstack.cached_model(weights, env) == ""
    old = cached(home, "o/n", "sub/m.gguf", "aaa", False)
    old.write_bytes(b"")
    assert llmstack.cached_model(weights, env) == "", "llama-server would not find it"
    new = cached(home, "o/n", "sub/m.gguf", "bbb", True)
    assert llmstack.cached_model(weights, env) == ""
    new.write_bytes(b"")
    assert llmstack.cached_model(weights, env) == str(new)


def test_a_split_model_is_here_when_all_of_it_is(home: Path) -> None:
    weights = llmstack.Weights("o/n", "m-00001-of-00002.gguf", "", 0, "", "current")
    env = {"HF_HOME": str(home)}
    first = cached(home, "o/n", "m-00001-of-00002.gguf", "aaa", True)
    first.write_bytes(b"")
    assert llmstack.local_parts(weights, env) == [str(first), ""]
    assert llmstack.cached_model(weights, env) == ""
    first.with_name("m-00002-of-00002.gguf").write_bytes(b"")
    assert llmstack.cached_model(weights, env) == str(first)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("served")
    gguf_models.write(folder / "big.gguf", *gguf_models.model("qwen2", layers=1, vocab=200_000))
    split(folder)
    return {p.name: p.read_bytes()[:9_000_000] for p in folder.iterdir()}


@pytest.fixture
def hub(served: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    server.repos["owner/name"] = served
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    yield server
    server.stop()


def on_hub(file: str) -> llmstack.Weights:
    return llmstack.Weights("owner/name", file, "", 0, "", "current")


def test_a_header_comes_from_the_hub_in_growing_ranges(hub: FakeHub) -> None:
    header = llmstack.hub_header(on_hub("big.gguf"), os.environ)
    assert header == parse(hub.repos["owner/name"]["big.gguf"])
    asked = [seen.range for seen in hub.fetched()]
    assert asked[:3] == ["bytes=0-1048575", "bytes=1048576-2097151", "bytes=2097152-4194303"]
    assert len(asked) < 5


def test_a_hub_without_ranges_is_read_as_far_as_needed(hub: FakeHub) -> None:
    hub.ranges = False
    assert llmstack.hub_header(on_hub("big.gguf"), os.environ) == parse(hub.repos["owner/name"]["big.gguf"])


def test_the_parts_of_a_split_are_read_each(hub: FakeHub) -> None:
    header = llmstack.hub_header(on_hub("m-00001-of-00002.gguf"), os.environ)
    assert header.tensor_bytes == sum(parse(hub.repos["owner/name"][f"m-0000{i}-of-00002.gguf"]).tensor_bytes for i in (1, 2))


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated["owner/name"] = "hf_secret"
    with pytest.raises(OSError, match="answered 401: set HF_TOKEN"):
        llmstack.hub_header(on_hub("big.gguf"), os.environ)
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    llmstack.hub_header(on_hub("big.gguf"), os.environ)
    assert {seen.authorization for seen in hub.fetched()} == {""}


@pytest.mark.parametrize("endpoint", ["file:///etc", "http://127.0.0.1:9", "nonsense"])
def test_what_is_no_hub_is_said_so(endpoint: str) -> None:
    with pytest.raises(llmstack.Unreachable):
        llmstack.hub_header(on_hub("m.gguf"), {"HF_ENDPOINT": endpoint})


# ---- The command

INI = """
[DEFAULT]
memory_gb = {budget}
[code-fast]
role = fast
path = {small}
ctx_size = 8k
[code-smart]
role = agent
hf_repo = owner/name
hf_file = big.gguf
ctx_size = 64k
size_gb = 3
[code-ultra]
role = ultra
model = anthropic/x
ctx_size = 24000
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")     # a card of the developer's own changes what a tier takes
    small = gguf_models.write(tmp_path / "small.gguf", *gguf_models.model("llama", layers=2))

    def write(budget: float) -> None:
        Path(".llmstack").mkdir(exist_ok=True)
        Path(".llmstack/models.ini").write_text(INI.format(budget=budget, small=small))

    return write


def fit_json(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    code = llmstack.main(["fit", "--json", *argv])
    return code, json.loads(capsys.readouterr().out)


def test_fit_says_what_each_tier_takes_and_from_where(hub: FakeHub, project: Any, capsys: pytest.CaptureFixture[str]) -> None:
    project(4)
    code, found = fit_json(capsys)
    assert code == 0
    assert (found["budget_gb"], found["budget_source"]) == (4, "memory_gb in models.ini")
    fast, smart, ultra = found["tiers"]
    assert (fast["source"], smart["source"], ultra["source"]) == ("local", "hub", "hosted")
    for row in (fast, smart):
        assert row["need_gb"] == pytest.approx(sum(row["memory"].values()) / 1e9)
        assert row["fits"]
    assert smart["largest_ctx"] == 131_072
    assert found["sets"] == [{"tiers": ["code-fast", "code-smart"], "need_gb": pytest.approx(fast["need_gb"] + smart["need_gb"]),
                              "each_gb": [pytest.approx(fast["need_gb"] + smart["need_gb"])], "fits": True}]


def test_fit_fails_where_a_tier_cannot_fit(hub: FakeHub, project: Any, capsys: pytest.CaptureFixture[str]) -> None:
    project(0.5)
    code, found = fit_json(capsys)
    assert code == 1
    fast, smart, _ = found["tiers"]
    assert (fast["fits"], smart["fits"], smart["largest_ctx"], found["sets"][0]["fits"]) == (True, False, 0, False)
    assert llmstack.main(["fit"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"code-smart .* 65,536 +0  does not fit\n(  .*\n)*.*by its header on the hub", out)
    assert "code-fast + code-smart\n          does not fit: they take turns" in out
    assert max(map(len, out.splitlines())) <= 60
    assert llmstack.main(["fit", "code-fast"]) == 0
    assert "code-smart" not in capsys.readouterr().out


def test_fit_offline_falls_back_to_size_gb_and_says_so(project: Any, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    project(4)
    code, found = fit_json(capsys)
    assert code == 0
    assert (found["tiers"][1]["source"], found["tiers"][1]["need_gb"]) == ("size_gb", pytest.approx(3.3))
    assert "the model hub cannot be reached" in found["tiers"][1]["note"]
    assert llmstack.main(["fit", "smart"]) == 0
    assert "~3.3" in capsys.readouterr().out


def test_a_silent_hub_is_asked_once_and_not_for_each_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def silent(request: Any, timeout: float) -> Any:
        asked.append(request.full_url)
        raise socket.timeout("timed out")       # as reading the answer's head does; 10 s a tier

    monkeypatch.setattr("urllib.request.urlopen", silent)
    tiers = tuple(llmstack.Tier(name, hf_repo="owner/name", hf_file=f"{name}.gguf", size_gb=1) for name in ("a", "b"))
    fits = llmstack.measure_tiers(llmstack.Config(tiers=tiers), llmstack.Machine(4.0, "test", False), os.environ, True)
    assert fits[0].note == "the model hub cannot be reached at huggingface.co: timed out"
    assert [fit.source for fit in fits] == ["size_gb", "size_gb"]
    assert len(asked) == 1


def test_fit_of_an_unknown_tier_is_a_usage_error(project: Any, capsys: pytest.CaptureFixture[str]) -> None:
    project(4)
    assert llmstack.main(["fit", "nobody"]) == 2
    assert "there is no tier nobody" in capsys.readouterr().err


def test_a_file_that_nothing_can_load_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(".llmstack").mkdir()
    (tmp_path / "bad.gguf").write_bytes(b"nothing" * 1_000_000)
    Path(".llmstack/models.ini").write_text(f"[DEFAULT]\nmemory_gb = 4\n[t]\nrole = fast\npath = {tmp_path / 'bad.gguf'}\n")
    assert llmstack.main(["fit"]) == 1
    out = capsys.readouterr().out
    assert "bad.gguf is not a GGUF file" in out
    assert "its file is broken" in out
    assert "~0.0" in out


def test_a_file_that_was_cut_does_not_fit_and_is_damaged(project: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    project(4)
    with (tmp_path / "small.gguf").open("r+b") as file:
        file.truncate((tmp_path / "small.gguf").stat().st_size - 1)
    code, found = fit_json(capsys, "code-fast")
    assert code == 1
    assert (found["tiers"][0]["source"], found["tiers"][0]["fits"]) == ("broken", False)
    llmstack.main(["check", "--json", "--offline"])
    row = next(t for t in json.loads(capsys.readouterr().out)["tiers"] if t["tier"] == "code-fast")
    assert row["current"]["local"] == "damaged"
    assert "is not whole" in row["current"]["problem"]


# ---- What the engines make of it

def fits(**need: float) -> list[llmstack.TierFit]:
    return [llmstack.TierFit(n.replace("_", "-"), "local", "", gb, True, 4096, 0, llmstack.Memory(round(gb * 9e8), 0, 0, 0))
            for n, gb in need.items()]


def vectors(need: dict[str, float]) -> dict[str, llmstack.Needs]:
    """Of one memory."""
    return {name: (gb,) for name, gb in need.items()}


def test_sets_beyond_the_budget_are_left_out_and_named(config: llmstack.Config) -> None:
    need = {"code-fast": 5.3, "code-smart": 49.8, "plan": 10.1, "plan-uncensored": 25.7}
    config = config._replace(tiers=tuple(t for t in config.tiers if t.chats))
    assert [s.tiers for s in llmstack.residency_sets(config, vectors(need), (51.5,))] == [
        ("code-fast", "plan"), ("code-fast", "plan-uncensored"), ("code-fast", "plan", "plan-uncensored"), ("code-smart",)]
    weights = {"code-smart": 9.0}
    plan = llmstack.SwapPlan(config, llmstack.Binary(("x",)), str,
                             need_gb=vectors(need), weights_gb=weights, budgets_gb=(40.0,))
    text = llmstack.render_llama_swap_yaml(plan)
    assert "# left out: code-fast + code-smart would take ~55.1 GB, and there are 40.0 GB" in text
    assert "# left out: code-fast + plan + plan-uncensored would take ~41.1 GB" in text
    assert '"f & p & u"' not in text
    assert "    c: 6\n" in text                 # 9 GB of weights by the header, not the 45 of size_gb
    assert "left out" not in llmstack.render_llama_swap_yaml(plan._replace(weights_gb={}, budgets_gb=(60.0,)))


def test_a_tier_alone_in_its_set_evicts_all_others(config: llmstack.Config) -> None:
    need = {"code-fast": 5.3, "code-smart": 49.8, "plan": 10.1, "plan-uncensored": 25.7}
    sets = llmstack.residency_sets(config, vectors(need), (51.5,))
    assert llmstack.choose_evictions("code-smart", ["code-fast", "plan"], sets, {}) == ["code-fast", "plan"]
    assert llmstack.choose_evictions("plan", ["code-fast"], sets, {}) == []


def test_the_embedded_engine_counts_by_header(config: llmstack.Config) -> None:
    log = llmstack.Log("", "error")
    known = fits(code_fast=5.3, code_smart=30.0, plan=10.0)
    engine = llmstack.Engine(config, lambda *_: [], log, str, llmstack.EnginePlan({}, 60.0, fits=known))
    assert engine.models["code-fast"].gb == 5.3
    assert engine.models["plan-uncensored"].gb == pytest.approx(13 * 1.1)       # no header: size_gb and a tenth
    assert engine.models["code-smart"].cost == llmstack.evict_cost(27)


# ---- The machine

def machine(monkeypatch: pytest.MonkeyPatch, total: float, mac: bool = False, outputs: dict[str, str] | None = None,
            layers: str = "999", **config: Any) -> llmstack.Machine:
    monkeypatch.setattr(llmstack, "IS_MAC", mac)
    monkeypatch.setattr(llmstack, "total_memory_gb", lambda: total)
    monkeypatch.setattr(llmstack, "program_output", lambda command: (outputs or {}).get(command[0], ""))
    return llmstack.this_machine(llmstack.Config(**config).with_settings({"n_gpu_layers": layers}))


@pytest.mark.parametrize(("gib", "gb"), [(8, 5.73), (16, 11.45), (32, 22.9), (36, 29.0), (64, 51.5), (128, 103.1)])
def test_a_macs_share_is_metals(monkeypatch: pytest.MonkeyPatch, gib: int, gb: float) -> None:
    found = machine(monkeypatch, gib * 1.073741824, True, {"sysctl": "0\n"})
    assert found.budget_gb == pytest.approx(gb, abs=0.05)
    assert found.gpu


def test_a_raised_wired_limit_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine(monkeypatch, 68.7, True, {"sysctl": "57344\n"})
    assert (round(found.budget_gb, 2), found.source) == (60.13, "the GPU's wired limit")


@pytest.mark.parametrize(("listed", "gb"), [
    ("GPU-1, 24564, 0, 0\n", 25.76), ("GPU-1, 24576, 0, 0\r\nGPU-2, 24576, 0, 0\r\n", 51.54),
    ("GPU-1, 81559, 480, 0\n", 85.02),         # an H100: CUDA saw 81,079 MiB
    ("GPU-1, 81559, 480, 1024\n", 83.94),      # and 1 GiB is somebody else's
    ("GPU-1, 24564, [N/A], 100\n", 25.65), ("", 0)])
def test_nvidia_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listed: str, gb: float) -> None:
    monkeypatch.setattr(llmstack, "DRM", str(tmp_path))
    found = machine(monkeypatch, 32.0, outputs={"nvidia-smi": listed})
    assert found.budget_gb == pytest.approx(gb or 24.0, abs=0.01)
    assert found.gpu is found.cuda is bool(gb)
    assert found.host_gb == (24.0 if gb else 0)
    assert machine(monkeypatch, 32.0, outputs={"nvidia-smi": listed}, layers="0").budget_gb == 24.0


def test_an_nvidia_gpu_that_shares_the_machines_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llmstack, "DRM", str(tmp_path))
    found = machine(monkeypatch, 128.0, outputs={"nvidia-smi": "GPU-1, [N/A], [N/A], [N/A]\n"})
    assert found[:1] + found[2:] == (96.0, True, True, 0.0, ())


TWO = "GPU-aa, 10000, 0, 0\nGPU-bb, 20000, 0, 0\n"


@pytest.mark.parametrize(("visible", "mib"), [
    ("0", 10_000), ("1", 20_000), ("1,0", 30_000), ("GPU-b", 20_000), (" 1 , 0 ", 30_000),
    ("", 0), ("-1", 0), ("7", 0), ("0,7,1", 10_000), ("GPU-", 0), ("0,0", 10_000)])
def test_only_the_cards_that_a_server_sees_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str, mib: int) -> None:
    monkeypatch.setattr(llmstack, "DRM", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = machine(monkeypatch, 32.0, outputs={"nvidia-smi": TWO})
    assert found.budget_gb == pytest.approx(mib * 1.048576e-3 or 24.0)
    assert found.gpu is bool(mib)


def test_vulkan_numbers_what_cuda_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"CUDA_VISIBLE_DEVICES": "1", "GGML_VK_VISIBLE_DEVICES": "0"}
    assert llmstack.visible_cards(["a", "b"], llmstack.NVIDIA_VISIBLE, both) == [1]
    assert llmstack.visible_cards(["", ""], llmstack.AMD_VISIBLE, {"HIP_VISIBLE_DEVICES": "1"}) == [1]
    assert llmstack.visible_cards(["", ""], llmstack.AMD_VISIBLE, {"ROCR_VISIBLE_DEVICES": ""}) == []


@pytest.mark.parametrize(("vram", "gb"), [
    ([17_163_091_968], 16.09),                                  # a card
    ([536_870_912, 17_163_091_968], 16.09),                     # and an APU beside it
    ([536_870_912], 16.54),                                     # an APU alone: what its driver lets it use of memory
    ([], 24.0)])
def test_amd_cards_and_apus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vram: list[int], gb: float) -> None:
    for number, size in enumerate(vram):
        device = tmp_path / f"card{number}" / "device"
        device.mkdir(parents=True)
        (device / "mem_info_vram_total").write_text(f"{size}\n")
        (device / "mem_info_gtt_total").write_text("16000000000\n")
        (tmp_path / f"card{number}-DP-1").mkdir()
    monkeypatch.setattr(llmstack, "DRM", str(tmp_path))
    assert machine(monkeypatch, 32.0).budget_gb == pytest.approx(gb, abs=0.01)


def test_memory_gb_is_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine(monkeypatch, 32.0, True, memory_gb=10.0)[:2] == (10.0, "memory_gb in models.ini")


# ---- Profiles

NAMES = list(llmstack.PROFILES)


def profile_text(name: str) -> str:
    return llmstack.read_profile(name).decode("utf-8")


def machine_for(name: str) -> llmstack.Machine:
    """The smallest machine that a profile is for: a Mac, or one with an NVIDIA card."""
    need = llmstack.PROFILES[name]
    if need.host_gb:
        return llmstack.Machine(need.budget_gb, "a card", True, True, need.host_gb, (need.budget_gb,))
    return llmstack.Machine(need.budget_gb, "a Mac", True)


def tiers_of(name: str, channel: str = "current") -> tuple[llmstack.Config, list[llmstack.TierFit]]:
    """A profile's tiers on the smallest machine it is for, on a GPU."""
    config, warnings = llmstack.parse_models_ini(profile_text(name))
    assert warnings == ()
    config, here, found = config.on_channel(channel), machine_for(name), []
    for tier in config.tiers:
        weights = llmstack.weights_for(tier)
        header = gguf_models.header_of(weights.file)
        need = llmstack.footprint_gb(weights.size_gb)
        assert header is None or header.tensor_bytes, weights.file
        found.append(llmstack.fit_tier(tier, config, here, header, "hub", "") if header else
                     llmstack.TierFit(tier.name, "size_gb", "", need, need <= here.budget_gb, tier.ctx_size))
    return config, found


@pytest.mark.parametrize("channel", ["current", "next"])
@pytest.mark.parametrize("name", NAMES)
def test_every_tier_of_a_profile_fits_its_machine(name: str, channel: str) -> None:
    config, found = tiers_of(name, channel)
    # 64 has the specification's upgrades: the agent's wants a Mac's raised limit.
    large = ["code-smart"] if (name, channel) == ("64", "next") else []
    assert [f.name for f in found if not f.fits] == large
    assert [f.name for f in found if f.memory is None] == (["plan"] if name == "64" else [])
    print({f.name: round(f.need_gb, 3) for f in found})
    for tier, fit in zip(config.tiers, found):          # nothing is stretched beyond what the model was trained for
        assert tier.ctx_size <= fit.largest_ctx or fit.memory is None or not fit.fits
        header = gguf_models.header_of(llmstack.weights_for(tier).file)
        assert header is None or tier.ctx_size <= header.keys["context_length"] * max(tier.rope_scale, 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_has_the_same_tiers(name: str) -> None:
    bundled, _ = llmstack.parse_models_ini(BUNDLED)
    config, _ = llmstack.parse_models_ini(profile_text(name))
    assert [(t.name, t.role, t.aliases, t.ttl, t.sampler) for t in config.tiers] == [
        (t.name, t.role, t.aliases, t.ttl, t.sampler) for t in bundled.tiers]
    assert [t.description.partition(" - ")[2] for t in config.tiers] == [t.description.partition(" - ")[2] for t in bundled.tiers]
    for tier in config.tiers:
        assert tier.quant
        assert tier.quant.lower() in tier.hf_file.lower()
        assert tier.quant_next.lower() in tier.hf_file_next.lower()
        assert bool(tier.quant_next) == bool(tier.size_gb_next) == tier.has_next


@pytest.mark.parametrize("name", [n for n in NAMES if llmstack.PROFILES[n].host_gb])
def test_on_a_card_every_tier_stays_beside_the_fast_one(name: str) -> None:
    """Its memory too, with what the reckoning of experts by their number may be off: a fifteenth."""
    config, found = tiers_of(name)
    here, fast = machine_for(name), found[0]
    for tier, fit in zip(config.tiers[1:], found[1:]):
        moved = fit.host_gb / 15 if dict(tier.server).get("n_cpu_moe") else 0.0
        assert fit.need_gb + fast.need_gb + moved <= here.budget_gb, fit.name
        assert fit.host_gb + fast.host_gb <= here.host_gb, fit.name


@pytest.mark.parametrize(("name", "queued"), [
    ("8", ["code-smart"]), ("16", ["code-smart"]), ("card-12", ["code-smart"]), ("card-16", []), ("24", ["plan"]),
    ("card-24", []), ("card-32", ["plan", "plan-uncensored"]), ("48", ["code-smart", "plan"]),
    ("64", ["code-smart", "plan", "plan-uncensored"]), ("128", ["code-smart", "plan"]), ("256", ["code-smart"]), ("512", [])])
def test_what_a_profile_queues(name: str, queued: list[str]) -> None:
    config, _ = llmstack.parse_models_ini(profile_text(name))
    assert [tier.name for tier in config.tiers if tier.has_next] == queued


def test_every_profile_is_a_file_and_every_file_a_profile() -> None:
    files = {path.stem for path in (ROOT / "share" / "profiles").iterdir()}
    assert files | {"64"} == set(NAMES)
    assert "64" not in files


def test_profiles_stand_in_the_order_of_their_budgets() -> None:
    budgets = [need.budget_gb for need in llmstack.PROFILES.values()]
    assert budgets == sorted(set(budgets))


def test_profile_64_is_the_bundled_file() -> None:
    assert profile_text("64") == BUNDLED
    assert "# Profile: 64 (GB of memory)" in BUNDLED


@pytest.mark.parametrize("name", [n for n in NAMES if n != "64"])
def test_a_profile_keeps_the_explanations(name: str) -> None:
    text = profile_text(name)
    what = "a card" if name.startswith("card") else "memory"
    assert f"# Profile: {name} (GB of {what})" in text
    assert llmstack.profile_of(text) == name
    mine, theirs = ([x for x in t.splitlines() if x.startswith(("#", ";"))] for t in (text, BUNDLED))
    assert mine[:1] + mine[2:] == theirs[:1] + theirs[2:]
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("name", [n for n in NAMES if n != "64"])
def test_a_profiles_file_has_only_what_differs(name: str) -> None:
    own = (ROOT / "share" / "profiles" / f"{name}.ini").read_text(encoding="utf-8")
    blocks = own.split("\n\n")[1:]
    assert blocks
    assert all(block.strip() not in BUNDLED and block.strip() in profile_text(name) for block in blocks)


@pytest.mark.parametrize(("budget", "name"), [
    (2, "8"), (5.73, "8"), (7.5, "8"), (11.45, "16"), (11.8, "16"), (16.1, "16"), (17.18, "24"), (18.9, "24"), (22.9, "24"),
    (24.7, "24"), (33.3, "24"), (37.8, "48"), (38.6, "48"), (49.4, "48"), (50.5, "64"), (51.5, "64"), (60.1, "64"),
    (98.9, "128"), (192, "128"), (202, "256"), (206, "256"), (405, "512"), (412, "512"), (900, "512")])
def test_the_profile_chosen_for_a_budget(budget: float, name: str) -> None:
    assert llmstack.choose_profile(llmstack.Machine(budget, "", True)) == name


@pytest.mark.parametrize(("card", "host", "name"), [
    (8.3, 25.0, "8"), (11.9, 25.0, "card-12"), (12.6, 50.0, "card-12"), (12.6, 12.4, "16"), (16.8, 25.0, "card-16"),
    (25.2, 25.0, "card-24"), (25.2, 100.0, "card-24"), (25.2, 12.4, "24"), (33.6, 50.0, "card-32"), (33.6, 12.4, "card-32"),
    (50.4, 100.0, "48"), (84.0, 100.0, "64"), (101.0, 190.0, "128")])
def test_the_profile_chosen_for_a_card(card: float, host: float, name: str) -> None:
    """A Mac with as much memory has another: what is kept beside a card has no place there."""
    assert llmstack.choose_profile(llmstack.Machine(card, "", True, True, host, (card,))) == name
    unified = llmstack.choose_profile(llmstack.Machine(card, "", True))
    assert not unified.startswith("card")


@pytest.mark.parametrize(("text", "name"), [
    ("8", "8"), ("32", "24"), ("24GB", "24"), ("96", "64"), ("64 GiB", "64"), ("192", "128"), ("256", "256"), ("9999", "512"),
    ("card-24", "card-24"), ("Card-48", "card-32"), ("card-20", "card-16")])
def test_a_profile_is_found_by_the_size_of_a_machine(text: str, name: str) -> None:
    assert llmstack.find_profile(text) == name


@pytest.mark.parametrize("text", ["", "4", "huge", "-8", "../64", "card-8", "card-", "card", "9" * 5000])
def test_there_is_no_such_profile(text: str) -> None:
    with pytest.raises(llmstack.UserError, match="there is no profile") as caught:
        llmstack.find_profile(text)
    assert caught.value.exit_code == 2


def test_a_new_project_gets_the_profile_of_this_machine(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    said: list[str] = []
    machine(monkeypatch, 17.18, True)
    places = llmstack.find_places(os.environ)
    llmstack.seed_project(places, said.append)
    assert Path(places.models_ini).read_text(encoding="utf-8") == profile_text("16")
    assert said[1] == "Profile 16, the tiers for 16 GB of memory (11.5 GB usable: 67% of 17.2 GB, what macOS gives the GPU)"
    said.clear()
    llmstack.seed_project(places, said.append)
    assert said == []
    with pytest.raises(llmstack.UserError, match="is there already"):
        llmstack.seed_project(places, said.append, profile="64")


def test_a_profile_that_cannot_fit_is_no_silent_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 17.18)
    text, why = llmstack.seed_text("64")
    assert text.decode() == BUNDLED
    assert "it needs 50.5 GB, so not every tier can load" in why
    text, why = llmstack.seed_text("card-24")
    assert text.decode() == profile_text("card-24")
    assert "Profile card-24, the tiers for a graphics card of 24 GB" in why
    assert "it needs 23.4 GB on a card and 24 GB beside it, so not every tier can load" in why
    machine(monkeypatch, 4.0)
    assert "Profile 8" in llmstack.seed_text()[1]
    assert "not every tier can load" in llmstack.seed_text()[1]


def test_start_takes_a_profile_for_a_new_project_only(monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "start_stack", lambda plan, again: True)
    monkeypatch.setattr(llmstack, "check_plan", lambda plan: None)
    assert llmstack.main(["start", "--profile", "gigantic"]) == 2
    assert "there is no profile gigantic" in capsys.readouterr().err
    assert llmstack.main(["start", "--profile", "128"]) == 0
    assert "Profile 128" in capsys.readouterr().out
    assert Path(".llmstack/models.ini").read_text(encoding="utf-8") == profile_text("128")
    assert llmstack.main(["start", "--profile", "8"]) == 1
    assert "is there already" in capsys.readouterr().err


# ---- docs/memory.md

def memory_table() -> Iterator[str]:
    yield "| profile | usable | code-fast | code-smart | plan | plan-uncensored | embed | together at most |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in NAMES:
        config, found = tiers_of(name)
        budget = llmstack.PROFILES[name].budget_gb
        cells = []
        for t, f in zip(config.tiers, found):
            beside = f" and {f.host_gb:.1f} beside it" if dict(t.server).get("n_cpu_moe") else ""
            cells.append(f"{t.description.partition(' - ')[0]}, {t.ctx_size // 1024}k: {f.need_gb:.1f} GB{beside}")
        most = max((need, tiers) for tiers, need in FIT.fit_sets(config, found, (), llmstack) if need <= budget)
        host = llmstack.PROFILES[name].host_gb
        usable = f"{budget:g} GB and {host:g} beside it" if host else f"{budget:g} GB"
        yield f"| {name} | {usable} | " + " | ".join(cells) + f" | {' + '.join(most[1])}: {most[0]:.1f} GB |"


def test_the_table_of_profiles_is_fits() -> None:
    table = "\n".join(memory_table())
    assert table in MEMORY_PAGE, f"the table of docs/memory.md should read:\n{table}"


def sets_table() -> Iterator[str]:
    yield "| loaded together, profile 64 | weights | with KV and buffers | |"
    yield "|---|---|---|---|"
    config, found = tiers_of("64")
    weights = {f.name: f.memory.weights / 1e9 if f.memory else t.size_gb for t, f in zip(config.tiers, found)}
    for tiers, need in FIT.fit_sets(config, found, (), llmstack):
        note = "" if need <= 51.5 else "needs the raised limit" if need <= 60.1 else "never together"
        yield f"| {' + '.join(tiers)} | {sum(weights[t] for t in tiers):.1f} GB | {need:.1f} GB | {note} |"


def test_the_table_of_sets_is_fits() -> None:
    table = "\n".join(sets_table())
    assert table in MEMORY_PAGE, f"the table of docs/memory.md should read:\n{table}"
