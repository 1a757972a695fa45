"""From Config to llama-server's flags, to what may be loaded together, and to llama-swap.yaml."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import pytest
import yaml

import llmstack
from llmstack import Config, ResidencySet, Tier, UserError

NONE: frozenset[str] = frozenset()
PROGRAM = ("/opt/llama.cpp/llama-server",)


def options(words: Sequence[str]) -> dict[str, str]:
    """Flags with their values; a flag that is there twice, or a value without a flag, fails."""
    found: dict[str, str] = {}
    flag = ""
    for word in words:
        if re.match(r"--?[a-z]", word):
            assert word not in found, f"{word} twice in {words}"
            flag, found[word] = word, ""
        else:
            assert flag, f"{word!r} belongs to no flag in {words}"
            found[flag], flag = word, ""
    return found


def tier(config: Config, name: str) -> Tier:
    found = config.by_name(name)
    assert found is not None
    return found


def local(name: str, role: str = "", **fields: Any) -> Tier:
    return Tier(name, role, hf_repo=f"owner/{name}-GGUF", hf_file=f"{name}.gguf", description=name, **fields)


def config_of(*tiers: Tier) -> Config:
    return Config(tiers=tiers)


# ---- llama-server's command line


SHARED = {"--host": "127.0.0.1", "--port": "10007", "-ngl": "999", "-fa": "on", "--jinja": "", "--cache-type-k": "q8_0",
          "--cache-type-v": "q8_0", "--threads": "-1", "--slot-prompt-similarity": "0.8", "--no-warmup": "", "--no-mmap": "",
          "--cors-origins": "localhost"}
HERETIC = "Mistral-Small-3.2-24B-Instruct-2506-ultra-uncensored-heretic"
OWN = {
    "code-fast": {
        "-hf": "bartowski/Qwen2.5-Coder-3B-Instruct-GGUF", "-hff": "Qwen2.5-Coder-3B-Instruct-Q5_K_M.gguf",
        "--alias": "code-fast", "-c": "131072", "--rope-scaling": "yarn", "--rope-scale": "4", "--yarn-orig-ctx": "32768",
        "--temp": "0.2"},
    "code-smart": {
        "-hf": "unsloth/Qwen3-Coder-Next-GGUF", "-hff": "Qwen3-Coder-Next-Q4_K_M.gguf", "--alias": "code-smart", "-c": "65536",
        "--temp": "0.5", "--top-p": "0.85", "--top-k": "20", "--min-p": "0.05", "--repeat-penalty": "1.05"},
    "plan": {
        "-hf": "Jackrong/Qwopus-GLM-18B-Merged-GGUF", "-hff": "Qwopus-GLM-18B-Healed-Q4_K_M.gguf", "--alias": "plan",
        "-c": "65536", "--temp": "0.7", "--top-p": "0.9", "--top-k": "40", "--min-p": "0.05"},
    "plan-uncensored": {
        "-hf": f"mradermacher/{HERETIC}-i1-GGUF", "-hff": f"{HERETIC}.i1-Q4_K_M.gguf", "--alias": "plan-uncensored",
        "-c": "131072", "--temp": "0.85", "--top-p": "0.95", "--top-k": "50", "--min-p": "0.05"},
    "embed": {
        "-hf": "nomic-ai/nomic-embed-text-v1.5-GGUF", "-hff": "nomic-embed-text-v1.5.Q8_0.gguf", "--alias": "embed",
        "-c": "2048", "--embedding": "", "--ubatch-size": "2048"},
}
NEXT_FILES = {"code-smart": "Qwen3-Coder-Next-UD-Q4_K_XL.gguf", "plan": "Qwopus-GLM-18B-Healed-Q6_K.gguf",
              "plan-uncensored": f"{HERETIC}.i1-Q6_K.gguf"}


@pytest.mark.parametrize("name", OWN)
def test_server_command_of_each_bundled_tier(config: Config, name: str) -> None:
    command = llmstack.server_command((*PROGRAM, "_sub"), tier(config, name), config, 10007, NONE)
    assert command[:2] == [*PROGRAM, "_sub"]
    assert options(command[2:]) == {**SHARED, **OWN[name]}


@pytest.mark.parametrize("name", OWN)
def test_the_next_channel_changes_the_file_and_nothing_else(config: Config, name: str) -> None:
    command = llmstack.server_command(
        PROGRAM, tier(config, name).on_channel("next"), config, 10007, NONE)
    assert options(command[1:]) == {**SHARED, **OWN[name], "-hff": NEXT_FILES.get(name, OWN[name]["-hff"])}


def test_settings_of_default_reach_the_command_line() -> None:
    config = Config().with_settings({"n_gpu_layers": "all", "flash_attn": "off", "jinja": False, "threads": 6,
                                     "cache_type_k": "f16", "cache_type_v": "bf16"})
    flags = options(llmstack.server_command(PROGRAM, local("a"), config, 1, NONE)[1:])
    assert flags == {"--host": "127.0.0.1", "--port": "1", "-hf": "owner/a-GGUF", "-hff": "a.gguf", "-ngl": "all", "-fa": "off",
                     "--cache-type-k": "f16", "--cache-type-v": "bf16", "--threads": "6",
                     "--slot-prompt-similarity": "0.8", "--no-warmup": "", "--no-mmap": "",
                     "--no-jinja": "",
                     "--cors-origins": "localhost",
                     "--alias": "a", "-c": "32768"}


def test_a_path_is_given_as_a_file_and_never_as_a_repository() -> None:
    flags = options(llmstack.server_command(PROGRAM, Tier("a", path="/big disk/a.gguf"), Config(), 1, NONE)[1:])
    assert flags["-m"] == "/big disk/a.gguf"
    assert not {"-hf", "-hff"} & set(flags)


@pytest.mark.parametrize(("value", "word"), [
    (0.2, "0.2"), (20.0, "20"), (1.05, "1.05"), (0.0, "0"), (100_000.0, "100000"), (0.125, "0.125")])
def test_numbers_of_a_sampler_are_written_plainly(value: float, word: str) -> None:
    flags = options([word for flag in llmstack.tier_flags(local("a", sampler=(("top_k", value),))) for word in flag])
    assert flags["--top-k"] == word


@pytest.mark.parametrize(("queued", "repo", "file", "gb", "quant", "channel"), [
    pytest.param({}, "owner/a-GGUF", "a.gguf", 9.0, "Q4", "current", id="nothing queued"),
    pytest.param({"hf_file_next": "b.gguf"}, "owner/a-GGUF", "b.gguf", 9.0, "Q4", "next", id="file"),
    pytest.param({"hf_repo_next": "o/b"}, "o/b", "a.gguf", 9.0, "Q4", "next", id="repository"),
    pytest.param({"hf_file_next": "b.gguf", "hf_repo_next": "o/b", "size_gb_next": 12.0, "quant_next": "Q6"}, "o/b", "b.gguf",
                 12.0, "Q6", "next", id="all"),
])
def test_what_the_next_channel_runs(queued: dict[str, Any], repo: str, file: str, gb: float, quant: str, channel: str) -> None:
    mine = local("a", size_gb=9.0, quant="Q4", **queued)
    assert llmstack.weights_for(mine.on_channel("next")) == llmstack.Weights(repo, file, "", gb, quant, channel)
    assert llmstack.weights_for(mine) == llmstack.Weights("owner/a-GGUF", "a.gguf", "", 9.0, "Q4", "current")


# ---- What an installed llama-server refuses


@pytest.mark.parametrize(("flags", "refused", "kept"), [
    pytest.param([("--no-mmap",), ("-fa", "on")], [], [("--no-mmap",), ("-fa", "on")], id="nothing refused"),
    pytest.param([("--no-mmap",), ("-fa", "on")], ["--no-mmap"], [("--load-mode", "none"), ("-fa", "on")], id="replaced"),
    pytest.param([("--no-mmap",), ("-fa", "on")], ["--no-mmap", "--load-mode"], [("-fa", "on")], id="replacement refused too"),
    pytest.param([("--no-mmap",), ("-fa", "on")], ["--load-mode"], [("--no-mmap",), ("-fa", "on")], id="only the replacement"),
    pytest.param([("--no-mmap",), ("-fa", "on")], ["-fa"], [("--no-mmap",)], id="left out with its value"),
    pytest.param([("--jinja",)], ["--jinja"], [], id="nothing left"),
])
def test_accepted_flags(flags: list[tuple[str, ...]], refused: list[str], kept: list[tuple[str, ...]]) -> None:
    assert llmstack.accepted_flags(flags, frozenset(refused)) == kept


def test_a_command_holds_nothing_that_is_refused(config: Config) -> None:
    refused = frozenset({"--no-mmap", "--jinja", "--min-p", "--no-warmup"})
    flags = options(llmstack.server_command(PROGRAM, tier(config, "plan"), config, 10007, refused)[1:])
    expected = {k: v for k, v in {**SHARED, **OWN["plan"]}.items() if k not in refused}
    assert flags == {**expected, "--load-mode": "none"}


class Binary:
    """A llama-server that takes the flags of its build, and writes down each time it is asked."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "llama server"
        self._asked = directory / "asked"

    def build(self, *refuses: str, note: str = "") -> None:
        """Install a build that refuses these flags; the file's size and time of change tell it from others."""
        pattern = "|".join(map(shlex.quote, refuses)) or "--no-such-flag"
        self.path.write_text(f'#!/bin/sh\n# {note}\nprintf \'%s\\n\' "$*" >> {shlex.quote(str(self._asked))}\n'
                             f'for word in "$@"; do case "$word" in {pattern}) exit 1;; esac; done\n')
        self.path.chmod(0o755)

    def asked(self) -> list[list[str]]:
        """The command lines since the last time this was called."""
        lines = self._asked.read_text().splitlines() if self._asked.exists() else []
        self._asked.unlink(missing_ok=True)
        return [line.split() for line in lines]


@pytest.fixture
def binary(tmp_path: Path) -> Binary:
    if os.name == "nt":
        pytest.skip("the stand-in for llama-server is a shell script")
    return Binary(tmp_path)


@pytest.fixture
def probe(binary: Binary, config: Config, tmp_path: Path) -> Callable[..., frozenset[str]]:
    def ask(changed: Config = config) -> frozenset[str]:
        return frozenset(llmstack.probe_flags((str(binary.path),), changed, str(tmp_path / "data")))
    return ask


@pytest.mark.parametrize(("refuses", "refused"), [
    pytest.param([], [], id="takes all"),
    pytest.param(["--no-mmap"], ["--no-mmap"], id="new: no --no-mmap"),
    pytest.param(["--no-mmap", "--load-mode"], ["--no-mmap", "--load-mode"], id="between: neither"),
    pytest.param(["--load-mode"], [], id="old: no --load-mode, not needed"),
    pytest.param(["-fa", "--jinja", "--yarn-orig-ctx"], ["-fa", "--jinja", "--yarn-orig-ctx"], id="old"),
    pytest.param(["q8_0"], ["--cache-type-k", "--cache-type-v"], id="a value"),
])
def test_probe_flags_finds_what_a_build_refuses(
        refuses: list[str], refused: list[str], binary: Binary, probe: Callable[..., frozenset[str]]) -> None:
    binary.build(*refuses)
    assert probe() == set(refused)


def test_every_question_ends_in_version_and_the_first_asks_for_all(
        config: Config, binary: Binary, probe: Callable[..., frozenset[str]]) -> None:
    binary.build()
    probe()
    asked = binary.asked()
    assert all(words[-1] == "--version" for words in asked)
    assert len(asked) <= 2, "one question is enough for a build that takes everything"
    flags = set(options(max(asked, key=len)))
    for name in OWN:
        command = llmstack.server_command((), tier(config, name), config, 1, NONE)
        assert set(options(command)) - {"--host", "--port", "-hf", "-hff"} <= flags


def test_a_probed_command_is_taken_by_the_build(
        config: Config, binary: Binary, probe: Callable[..., frozenset[str]]) -> None:
    binary.build("--no-mmap", "--min-p")
    refused = probe()
    for name in OWN:
        command = llmstack.server_command((str(binary.path),), tier(config, name), config, 1, refused)
        assert subprocess.run(command, check=False).returncode == 0


def test_the_answer_is_remembered_for_the_binary(binary: Binary, probe: Callable[..., frozenset[str]]) -> None:
    binary.build("--no-mmap")
    assert probe() == {"--no-mmap"}
    assert binary.asked()
    assert probe() == {"--no-mmap"}
    assert binary.asked() == []


def test_a_changed_binary_is_asked_again(binary: Binary, probe: Callable[..., frozenset[str]]) -> None:
    binary.build("--no-mmap")
    probe()
    binary.build("--jinja", note="upgraded")
    assert probe() == {"--jinja"}
    binary.asked()
    os.utime(binary.path, ns=(1, 1))            # another build of the same size
    probe()
    assert binary.asked()


def test_another_flag_is_asked_for_and_another_context_is_not(
        config: Config, binary: Binary, probe: Callable[..., frozenset[str]]) -> None:
    binary.build("f32")
    assert probe() == NONE
    binary.asked()
    longer = config._replace(tiers=tuple(t._replace(name=t.name + "-2", ctx_size=4096) for t in config.tiers))
    assert probe(longer) == NONE
    assert binary.asked() == [], "a name and a context length are no reason to ask"
    assert probe(config.with_settings({"cache_type_k": "f32"})) == {"--cache-type-k"}


def test_two_binaries_are_remembered_side_by_side(config: Config, tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("the stand-in for llama-server is a shell script")
    binaries = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        binaries.append(Binary(tmp_path / name))
    binaries[0].build()
    binaries[1].build("--no-mmap")
    for expected_runs in (True, False):
        assert [llmstack.probe_flags((str(b.path),), config, str(tmp_path / "data")) for b in binaries] == [NONE, {"--no-mmap"}]
        assert [bool(b.asked()) for b in binaries] == [expected_runs] * 2


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"STAMP": 1}', '{"STAMP": {}}'])
def test_a_broken_memory_is_asked_anew(
        content: str, binary: Binary, probe: Callable[..., frozenset[str]], tmp_path: Path) -> None:
    small = config_of(local("a"))
    binary.build("--jinja")
    probe(small)
    memory = tmp_path / "data" / "flags.json"
    (stamp,) = json.loads(memory.read_text())
    memory.write_text(content.replace('"STAMP"', json.dumps(stamp)))
    assert probe(small) == {"--jinja"}
    binary.asked()
    assert probe(small) == {"--jinja"}
    assert binary.asked() == []


def test_a_binary_that_fails_is_named_and_not_remembered(
        binary: Binary, probe: Callable[..., frozenset[str]]) -> None:
    binary.build("--version")
    with pytest.raises(UserError, match="llama server --version fails") as caught:
        probe()
    assert "llama_server_bin" in caught.value.hint
    binary.asked()
    with pytest.raises(UserError):
        probe()
    assert binary.asked()


def test_a_file_that_is_no_program_is_named(binary: Binary, probe: Callable[..., frozenset[str]]) -> None:
    binary.path.write_bytes(b"\x7fELF, or rather not")
    binary.path.chmod(0o755)
    with pytest.raises(UserError, match="llama server does not run"):
        probe()


def test_a_binary_that_is_gone_is_named(binary: Binary, probe: Callable[..., frozenset[str]]) -> None:
    with pytest.raises(UserError, match="llama server"):
        probe()


# ---- What may be loaded together


FAST, SMART, PLAN, WILD = local("f", "fast"), local("c", "agent"), local("p", "plan"), local("u", "plan-uncensored")
HOSTED = Tier("h", "ultra", backend="litellm", model="x/y")


@pytest.mark.parametrize(("tiers", "sets"), [
    pytest.param([FAST, SMART, PLAN, WILD], [{"f", "c"}, {"f", "p"}, {"f", "u"}, {"f", "p", "u"}], id="bundled"),
    pytest.param([PLAN, SMART, FAST], [{"f", "p"}, {"f", "c"}], id="in the order of the file"),
    pytest.param([SMART, PLAN, WILD], [{"c"}, {"p"}, {"u"}, {"p", "u"}], id="no fast tier"),
    pytest.param([FAST], [{"f"}], id="only a fast tier"),
    pytest.param([SMART], [{"c"}], id="only a heavy tier"),
    pytest.param([FAST, HOSTED, SMART], [{"f", "c"}], id="hosted tiers take no memory"),
    pytest.param([FAST, local("x"), local("y")], [{"f", "x"}, {"f", "y"}], id="tiers without a role"),
    pytest.param([HOSTED], [], id="nothing local"),
    pytest.param([], [], id="nothing"),
])
def test_residency_sets(tiers: list[Tier], sets: list[set[str]]) -> None:
    found = llmstack.residency_sets(config_of(*tiers))
    assert [set(s.tiers) for s in found] == sets
    names = [s.name for s in found]
    assert names == sorted(set(names)), "llama-swap tries sets in the order of their names"


def test_many_tiers_keep_their_order() -> None:
    tiers = [FAST, *(local(f"m{i}", f"Rolle {i} für x" if i % 2 else "") for i in range(60))]
    found = llmstack.residency_sets(config_of(*tiers))
    names = [s.name for s in found]
    assert [s.tiers for s in found] == [("f", f"m{i}") for i in range(60)]
    assert names == sorted(set(names))


@pytest.mark.parametrize(("gb", "cost"), [
    (0, 1), (0.4, 1), (1.4, 1), (2.5, 2), (9.2, 6), (12.1, 8), (13, 9), (20, 13), (44, 29), (45, 30), (50, 30), (1000, 30)])
def test_evict_cost(gb: float, cost: int) -> None:
    assert llmstack.evict_cost(gb) == cost


BUNDLED_SETS = [ResidencySet("a", ("f", "c")), ResidencySet("b", ("f", "p")), ResidencySet("c", ("f", "u")),
                ResidencySet("d", ("f", "p", "u"))]
COSTS = {"f": 2, "c": 30, "p": 6, "u": 9}


@pytest.mark.parametrize(("target", "running", "sets", "costs", "gone"), [
    pytest.param("p", ["f", "p"], BUNDLED_SETS, COSTS, [], id="runs already"),
    pytest.param("p", ["c", "p"], BUNDLED_SETS, COSTS, [], id="runs already, beside what no set allows"),
    pytest.param("c", [], BUNDLED_SETS, COSTS, [], id="nothing runs"),
    pytest.param("c", ["f"], BUNDLED_SETS, COSTS, [], id="fits beside"),
    pytest.param("p", ["f", "c"], BUNDLED_SETS, COSTS, ["c"], id="heavy for heavy, fast stays"),
    pytest.param("u", ["f", "p"], BUNDLED_SETS, COSTS, [], id="a later set throws out nothing"),
    pytest.param("c", ["f", "p", "u"], BUNDLED_SETS, COSTS, ["p", "u"], id="both chats for the agent"),
    pytest.param("f", ["c", "p"], BUNDLED_SETS, COSTS, ["p"], id="the cheaper of two goes"),
    pytest.param("f", ["c", "p"], BUNDLED_SETS, {"c": 3, "p": 8}, ["c"], id="costs decide which"),
    pytest.param("x", ["f", "c"], BUNDLED_SETS, COSTS, ["f", "c"], id="in no set: alone"),
    pytest.param("p", ["f", "x"], BUNDLED_SETS, COSTS, ["x"], id="a model in no set goes"),
    pytest.param("t", ["a", "b"], [ResidencySet("1", ("t", "a")), ResidencySet("2", ("t", "b"))], {}, ["b"],
                 id="equals: the first set, cost 1 where none is given"),
    pytest.param("t", ["a", "b"], [ResidencySet("1", ("t", "b")), ResidencySet("2", ("t", "a"))], {}, ["a"],
                 id="equals: the first set, the other way round"),
    pytest.param("t", ["a", "b", "c"], [ResidencySet("1", ("t", "a")), ResidencySet("2", ("t", "b", "c"))],
                 {"a": 3, "b": 1, "c": 1}, ["b", "c"], id="two cheap ones go for one dear one"),
    pytest.param("t", ["a", "b", "c"], [ResidencySet("1", ("t", "a")), ResidencySet("2", ("t", "b", "c"))],
                 {"a": 2, "b": 2, "c": 2}, ["a"], id="one goes for two of the same cost each"),
])
def test_choose_evictions(target: str, running: list[str], sets: list[ResidencySet], costs: dict[str, int],
                          gone: list[str]) -> None:
    assert llmstack.choose_evictions(target, running, sets, costs) == gone


def test_evictions_always_leave_a_set_and_never_cost_more_than_another_set(config: Config) -> None:
    sets = llmstack.residency_sets(config)
    names = [t.name for t in config.tiers if t.chats]
    costs = {t.name: llmstack.evict_cost(t.size_gb) for t in config.tiers}
    for size in range(len(names)):
        for running in itertools.combinations(names, size):
            for target in set(names) - set(running):
                gone = llmstack.choose_evictions(target, running, sets, costs)
                left = {*running, target} - set(gone)
                assert any(left <= set(s.tiers) for s in sets)
                for other in sets:
                    if target in other.tiers:
                        assert sum(costs[m] for m in gone) <= sum(costs[m] for m in running if m not in other.tiers)


# ---- llama-swap.yaml


def render(config: Config, program: Sequence[str] = PROGRAM, refused: frozenset[str] = NONE) -> str:
    server = llmstack.Binary(tuple(program), refused)
    return llmstack.render_llama_swap_yaml(llmstack.SwapPlan(config, server, llmstack.posix_quote))


def render_and_load(config: Config, program: Sequence[str] = PROGRAM,
                    refused: frozenset[str] = NONE) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(render(config, program, refused))
    return loaded


def words_of(loaded: dict[str, Any], name: str, port: int) -> list[str]:
    """The command line as llama-swap makes it: comment lines taken out, split like a shell does."""
    text = loaded["models"][name]["cmd"]
    lines = [line for line in text.replace("${PORT}", str(port)).splitlines() if not line.strip().startswith("#")]
    assert "${" not in "".join(lines)
    return shlex.split(" ".join(lines))


def test_yaml_top_level(config: Config) -> None:
    loaded = render_and_load(config)
    expected = {
        "healthCheckTimeout": 600, "startPort": 10001, "sendLoadingState": False,
        "apiKeys": ["${env.LLAMA_API_KEY}"], "includeAliasesInList": True,
        "captureBuffer": 0, "globalTTL": 0, "hooks": {"on_startup": {"preload": ["code-fast"]}}}
    assert {key: loaded[key] for key in expected} == expected
    assert set(loaded) - set(expected) == {"logLevel", "logToStdout", "models", "matrix"}


def test_yaml_models(config: Config) -> None:
    loaded = render_and_load(config)
    assert list(loaded["models"]) == [t.name for t in config.tiers]
    for mine in config.tiers:
        entry = loaded["models"][mine.name]
        assert {key: value for key, value in entry.items() if key != "cmd"} == {
            "name": mine.name,
            "description": mine.description,
            "proxy": "http://127.0.0.1:${PORT}",
            "ttl": mine.ttl,
            "concurrencyLimit": 512,
            "timeouts": {"idleConn": 3},
            **({"aliases": list(mine.aliases)} if mine.aliases else {}),
            "metadata": {"tier": mine.tier or mine.role, "role": mine.role, "ctx_size": mine.ctx_size, "size_gb": mine.size_gb,
                         "quant": mine.quant, "channel": "current"},
        }


@pytest.mark.parametrize("channel", ["current", "next"])
@pytest.mark.parametrize("refused", [NONE, frozenset({"--no-mmap"}), frozenset({"--no-mmap", "--load-mode", "--min-p", "-fa"})])
def test_yaml_runs_the_same_command_as_the_embedded_engine(config: Config, channel: str, refused: frozenset[str]) -> None:
    config = config.on_channel(channel)
    loaded = render_and_load(config, PROGRAM, refused)
    for mine in config.tiers:
        expected = llmstack.server_command(PROGRAM, mine, config, 10007, refused)
        words = words_of(loaded, mine.name, 10007)
        assert words[0] == PROGRAM[0]
        assert options(words[1:]) == options(expected[1:])


def test_yaml_matrix(config: Config) -> None:
    matrix = render_and_load(config)["matrix"]
    assert matrix == {
        "vars": {"f": "code-fast", "c": "code-smart", "p": "plan", "u": "plan-uncensored", "x4": "embed"},
        "evict_costs": {"f": 2, "c": 30, "p": 6, "u": 9, "x4": 1},
        "sets": {"a_agent": "f & c", "b_plan": "f & p", "c_plan_uncensored": "f & u", "d_chats": "f & p & u"},
    }
    assert render_and_load(config.on_channel("next"))["matrix"]["evict_costs"] == {
        "f": 2, "c": 30, "p": 8, "u": 13, "x4": 1}


@pytest.mark.parametrize("tiers", [
    pytest.param([FAST, SMART, PLAN, WILD], id="bundled"),
    pytest.param([SMART, PLAN], id="no fast tier"),
    pytest.param([FAST], id="only a fast tier"),
    pytest.param([FAST, *(local(f"my_model.{i}", "Größe: 3 #1" if i == 3 else "") for i in range(40))], id="many, odd roles"),
])
def test_the_matrix_says_what_the_residency_sets_say(tiers: list[Tier]) -> None:
    config = config_of(*tiers)
    matrix = render_and_load(config)["matrix"]
    keys = matrix["vars"]
    assert sorted(keys.values()) == sorted(t.name for t in tiers)
    assert all(re.fullmatch(r"[a-zA-Z0-9.-]{1,32}", key) for key in keys), "llama-swap takes no underscore there"
    assert set(matrix["evict_costs"]) == set(keys)
    assert all(isinstance(cost, int) and cost >= 1 for cost in matrix["evict_costs"].values())
    sets = [(name, tuple(keys[key] for key in expression.split(" & "))) for name, expression in matrix["sets"].items()]
    assert sets == [tuple(s) for s in llmstack.residency_sets(config)]


def test_hosted_tiers_are_neither_loaded_nor_counted(config: Config) -> None:
    loaded = render_and_load(config._replace(tiers=(*config.tiers, HOSTED)))
    assert HOSTED.name not in loaded["models"]
    assert loaded["matrix"] == render_and_load(config)["matrix"]


def test_without_a_fast_tier_nothing_is_preloaded() -> None:
    assert "hooks" not in render_and_load(config_of(SMART, PLAN))


def test_without_local_tiers_there_is_still_a_file_that_loads() -> None:
    loaded = render_and_load(config_of(HOSTED), program=())
    assert "matrix" not in loaded
    assert HOSTED.name not in loaded["models"]


def comments_of(text: str, name: str) -> str:
    block = text.split(f"\n  {name}:\n", 1)[1].split("\n\n", 1)[0]
    return "\n".join(line.strip() for line in block.splitlines() if line.strip().startswith("#"))


def test_upgrade_points_stand_at_every_tier(config: Config) -> None:
    text = render(config)
    assert "RUNNING NEXT" not in text
    assert "(channel current)" in text.splitlines()[0]
    for mine in config.tiers:
        comments = comments_of(text, mine.name)
        assert f">>> UPGRADE-POINT ({mine.name})" in comments
        assert (f"-hff {mine.hf_file_next}" in comments) == bool(mine.hf_file_next)
        if mine.hf_file_next:
            assert "--next" in comments


def test_the_next_channel_says_so_where_it_applies(config: Config) -> None:
    text = render(config.on_channel("next"))
    assert "(channel next)" in text.splitlines()[0]
    models = yaml.safe_load(text)["models"]
    for mine in config.tiers:
        comments, metadata = comments_of(text, mine.name), models[mine.name]["metadata"]
        if mine.has_next:
            assert f">>> RUNNING NEXT ({mine.name})" in comments
            assert f"-hff {mine.hf_file}" in comments, "the way back"
            assert "UPGRADE-POINT" not in comments
            assert (metadata["channel"], metadata["size_gb"], metadata["quant"]) == ("next", mine.size_gb_next, mine.quant_next)
        else:
            assert f">>> UPGRADE-POINT ({mine.name})" in comments
            assert (metadata["channel"], metadata["size_gb"]) == ("current", mine.size_gb)


ODD_TEXTS = [
    "a: b", "a #b", "# a", "- a", "-", "?", "? a", "a:", "'a'", '"a"', "it's", 'say "hi" \\ bye', "für Köche", "日本語",
    "\U0001f600", "yes", "No", "ON", "off", "true", "False", "null", "Null", "~", "y", "N", "=", "1", "1.5", "1e5", "0x1F",
    "0o7", "12:30:45", "2026-01-01", ".inf", ".NaN", "nan", "<<", "{a}", "[a]", "*a", "&a", "!a", "%a", "@a", "`a`", "| a",
    "> a", "a,b", "---", "...", "100% of it", "$5", "a\tb", "a  b", "\\n", "x" * 3000, "a\ufeffb", "a\x01b",
]


def test_odd_texts_survive_the_yaml() -> None:
    tiers = [local(f"m{i}")._replace(description=text, tier=text, quant=text) for i, text in enumerate(ODD_TEXTS)]
    models = render_and_load(config_of(*tiers))["models"]
    for mine in tiers:
        entry, text = models[mine.name], mine.description
        assert (entry["description"], entry["metadata"]["tier"], entry["metadata"]["quant"]) == (text, text, text)


@pytest.mark.parametrize("text", ["a\x7fb", "a\x85b", "a\u2028b"], ids=ascii)
def test_characters_that_yaml_forbids_or_folds_survive(text: str) -> None:
    assert render_and_load(config_of(local("a")._replace(description=text)))["models"]["a"]["description"] == text


@pytest.mark.parametrize("name", ["no", "Yes", "null", "on", "7b", "1.5", "1e5", "0x10", "12_000", "y", "a.b_c-d", "true"])
def test_odd_names_survive_the_yaml(name: str) -> None:
    loaded = render_and_load(config_of(local(name, "fast", aliases=(name + "2", "off", "0"))))
    assert list(loaded["models"]) == [name]
    assert loaded["models"][name]["aliases"] == [name + "2", "off", "0"]
    assert list(loaded["matrix"]["vars"].values()) == [name]
    assert loaded["hooks"]["on_startup"]["preload"] == [name]
    assert options(words_of(loaded, name, 1)[1:])["--alias"] == name


@pytest.mark.parametrize("text", ["uses ${HOME}", "${env.OPENAI_API_KEY}", "${PID}", "a ${x} b ${y}"])
def test_a_description_never_becomes_a_macro(text: str) -> None:
    """llama-swap puts macros in everywhere: an unknown one stops it, and ${env.X} would show a secret to every client.

    The one that is there is the key of this start, which nobody but the daemon has.
    """
    rendered = render(config_of(local("a")._replace(description=text, quant=text, tier=text)))
    assert set(re.findall(r"\$\{[^}]*\}", rendered)) == {
        "${PORT}", "${env.LLAMA_API_KEY}"}


@pytest.mark.parametrize("path", [
    "/models/my model.gguf", "/models/it's \"quoted\".gguf", "/models/a#b; c & d | e.gguf", "/models/# a.gguf",
    "/models/größe.gguf", "/models/日本 \U0001f600.gguf", "/models/back\\slash.gguf", "/models/$HOME `x` *.gguf",
    "/models/it's ${HOME}.gguf", "/models/a: b.gguf", "/models/  two.gguf"])
def test_odd_paths_survive_the_yaml_and_the_splitting(path: str) -> None:
    program = (path.replace(".gguf", "/llama-server"), "/other dir/llmstack.pyz", "_guest", "llama_server")
    loaded = render_and_load(config_of(local("a")._replace(path=path, hf_repo="", hf_file="")), program)
    words = words_of(loaded, "a", 1)
    assert tuple(words[:4]) == program
    assert options(words[4:])["-m"] == path


def test_a_repository_file_in_a_folder_or_with_a_space_survives() -> None:
    mine = local("a")._replace(hf_file="Q4 K M/it's-00001-of-00002.gguf")
    assert options(words_of(render_and_load(config_of(mine)), "a", 1)[1:])["-hff"] == mine.hf_file


# ---- The real llama-swap


# Serves /health and says, for any other path, what it was started with.
STUB = r'''
import json, socket, sys
words = sys.argv[1:]
port = int(words[words.index("--port") + 1])
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(("127.0.0.1", port))
server.listen(16)
while True:
    client = server.accept()[0]
    client.settimeout(5)
    data = b""
    try:
        while b"\r\n\r\n" not in data:
            more = client.recv(65536)
            if not more:
                break
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        while length and len(body) < length[0]:
            body += client.recv(65536)
        answer = json.dumps({"status": "ok", "argv": words}).encode()
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
                       % (len(answer), answer))
    except OSError:
        pass
    client.close()
'''


def free_ports(count: int) -> int:
    """The first of `count` adjacent free ports, below those the system gives to outgoing connections."""
    while True:
        first = random.randrange(15_000, 30_000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


SWAP_KEY = "a-key-of-this-test"


class Swap:
    """A running llama-swap."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port, self.process, self._log = port, process, log

    def ask(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, None if body is None else json.dumps(body),
                               {"Content-Type": "application/json", "Authorization": "Bearer " + SWAP_KEY})
            answer = connection.getresponse()
            data = answer.read()
            assert answer.status == 200, f"{method} {path}: {answer.status} {data!r}\n{self._log.read_text()}"
            return json.loads(data) if data.startswith(b"{") else data.decode()
        finally:
            connection.close()

    def running(self) -> dict[str, str]:
        return {m["model"]: m["state"] for m in self.ask("GET", "/running")["running"]}

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                if condition():
                    return
            except OSError:                     # not listening yet
                pass
            assert self.process.poll() is None, f"llama-swap ended\n{self._log.read_text()}"
            assert time.monotonic() < deadline, f"not {what}\n{self._log.read_text()}"
            time.sleep(0.01)


# What a real YAML parser of Go's is to read as well as PyYAML does.
REAL_TEXTS = {"code-fast": "- für: Köche #1 \U0001f600", "code-smart": 'it\'s "quoted" \\ and 50 % off', "plan": "yes",
              "plan-uncensored": "2026-01-01", "embed": "~"}


@pytest.fixture
def swap(config: Config, tmp_path: Path) -> Iterator[Swap]:
    """The real llama-swap on the rendered file of the bundled tiers, with a stub in the place of llama-server."""
    binary = shutil.which("llama-swap")
    if not binary or os.name == "nt":
        pytest.skip("llama-swap is not on PATH (the file is checked with PyYAML alone)")
    directory = tmp_path / "it's a directory"
    directory.mkdir()
    stub = directory / "llama server.py"
    stub.write_text(STUB)
    config = config._replace(tiers=tuple(t._replace(description=REAL_TEXTS[t.name]) for t in config.tiers))
    first = free_ports(1 + len(config.tiers))
    text = render(config, (sys.executable, "-S", "-E", str(stub)), refused=frozenset({"--no-mmap"}))
    assert text.count("startPort: 10001\n") == 1
    path, log = directory / "llama-swap.yaml", tmp_path / "llama-swap.log"
    path.write_text(text.replace("startPort: 10001\n", f"startPort: {first + 1}\n"), encoding="utf-8")
    with log.open("wb") as output:
        process = subprocess.Popen([binary, "-config", str(path), "-listen", f"127.0.0.1:{first}"], stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, "LLAMA_API_KEY": SWAP_KEY})
    try:
        yield Swap(first, process, log)
    finally:
        process.send_signal(signal.SIGTERM)     # it stops its children, each a process group of its own
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_the_real_llama_swap_reads_the_file_and_evicts_as_we_do(swap: Swap, config: Config) -> None:
    swap.wait_for(lambda: swap.ask("GET", "/health") == "OK", "up")

    listed = {m["id"]: m for m in swap.ask("GET", "/v1/models")["data"]}
    for mine in config.tiers:
        assert listed[mine.name]["description"] == REAL_TEXTS[mine.name]
        metadata = listed[mine.name]["meta"]["llamaswap"]
        assert {k: metadata[k] for k in ("role", "ctx_size", "channel")} == {
            "role": mine.role, "ctx_size": mine.ctx_size, "channel": "current"}
        assert set(mine.aliases) <= set(listed) | set(metadata.get("aliases", ()))

    swap.wait_for(lambda: swap.running() == {"code-fast": "ready"}, "preloaded")
    sets = llmstack.residency_sets(config)
    costs = {t.name: llmstack.evict_cost(t.size_gb) for t in config.tiers}
    loaded = {"code-fast"}
    for name, together in (("agent", {"code-fast", "code-smart"}), ("plan", {"code-fast", "plan"}),
                           ("heretic", {"code-fast", "plan", "plan-uncensored"}), ("code-smart", {"code-fast", "code-smart"})):
        target = tier(config, name)
        body = {"model": name, "messages": [{"role": "user", "content": "hi"}]}
        words = swap.ask("POST", "/v1/chat/completions", body)["argv"]
        port = int(options(words)["--port"])
        assert words[0].startswith("--")
        assert options(words) == options(
            llmstack.server_command((), target, config, port, frozenset({"--no-mmap"})))
        loaded = {*loaded, target.name} - set(llmstack.choose_evictions(target.name, sorted(loaded), sets, costs))
        assert loaded == together
        assert swap.running() == dict.fromkeys(together, "ready")


# ---- /v1/models


def test_the_entry_of_auto(config: Config) -> None:
    entry = llmstack.auto_entry(config)
    assert (entry["id"], entry["object"]) == ("auto", "model")
    assert entry["meta"]["llmstack"] == {"ctx_size": 131072, "ladder": ["code-smart", "code-fast"]}
    assert llmstack.auto_entry(Config())["meta"]["llmstack"] == {"ctx_size": 0, "ladder": []}


def test_the_entry_of_a_tier(config: Config) -> None:
    smart = tier(config, "code-smart")
    current, queued = (llmstack.tier_entry(smart.on_channel(channel)) for channel in ("current", "next"))
    assert current["id"] == "code-smart"
    assert current["aliases"] == ["agent", "smart", "code", "coder"]
    assert current["meta"]["llmstack"] == {"tier": "code", "role": "agent", "ctx_size": 65536, "channel": "current",
                                           "backend": "gguf", "size_gb": 45.0, "quant": "Q4_K_M"}
    assert queued["meta"]["llmstack"] == {**current["meta"]["llmstack"], "channel": "next", "size_gb": 50.0,
                                          "quant": "UD-Q4_K_XL"}
    hosted = llmstack.tier_entry(HOSTED)["meta"]["llmstack"]
    assert (hosted["backend"], hosted["model"]) == ("litellm", "x/y")
    assert "size_gb" not in hosted
