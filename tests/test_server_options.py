"""Every key that models.ini has for llama-server, from its line to the command line of both engines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import llmstack
from llmstack import Config, ConfigError
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "share" / "guests"))

import llama_server

NONE: frozenset[str] = frozenset()
# Key -> a value of models.ini, and the words of it on the command line.
SAID = {
    "n_gpu_layers": ("0", "-ngl 0"),
    "flash_attn": ("auto", "-fa auto"),
    "jinja": ("no", "--no-jinja"),
    "cache_type_k": ("f16", "--cache-type-k f16"),
    "cache_type_v": ("f16", "--cache-type-v f16"),
    "threads": ("2", "--threads 2"),
    "llama_server_bin": ("/opt/mine", ""),
    "parallel": ("4", "--parallel 4 --kv-unified"),
    "batch": ("1024", "--batch-size 1024"),
    "ubatch": ("256", "--ubatch-size 256"),
    "n_cpu_moe": ("3", "--n-cpu-moe 3"),
    "override_tensor": ("exps=CPU", "--override-tensor exps=CPU"),
    "split_mode": ("row", "--split-mode row"),
    "tensor_split": ("3,1", "--tensor-split 3,1"),
    "main_gpu": ("0", "--main-gpu 0"),
    "device": ("none", "--device none"),
    "reasoning_format": ("deepseek", "--reasoning-format deepseek"),
    "reasoning_budget": ("100", "--reasoning-budget 100"),
    "cache_reuse": ("256", "--cache-reuse 256"),
    "args": ("--poll 0 --prio 1", "--poll 0 --prio 1"),
    "mmproj": ("/m/mmproj.gguf", "--mmproj /m/mmproj.gguf"),
    "chat_template": ("chatml", "--chat-template chatml"),
    "chat_template_file": ("TEMPLATE", "--chat-template-file TEMPLATE"),
    "chat_template_kwargs": ('{"enable_thinking":false}', '--chat-template-kwargs {"enable_thinking":false}'),
    "draft": ("/m/draft.gguf", "-md /m/draft.gguf --spec-type draft-simple"),
    "speculative": ("ngram", "--spec-type ngram-mod"),
    "lora": ("/m/a.gguf, /m/b.gguf", "--lora /m/a.gguf,/m/b.gguf"),
    "embedding": ("yes", "--embedding"),
    "pooling": ("mean", "--pooling mean"),
    "rope_freq_base": ("10000", "--rope-freq-base 10000"),
    "rope_freq_scale": ("0.5", "--rope-freq-scale 0.5"),
    "yarn_ext_factor": ("0.5", "--yarn-ext-factor 0.5"),
    "yarn_attn_factor": ("1", "--yarn-attn-factor 1"),
    "yarn_beta_slow": ("1", "--yarn-beta-slow 1"),
    "yarn_beta_fast": ("32", "--yarn-beta-fast 32"),
}
NOT_IN_THE_STAND_IN = {"device", "chat_template_kwargs", "args"}


def configured(text: str) -> Config:
    return llmstack.parse_models_ini(text)[0]


def problem(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        configured(text)
    (found,) = caught.value.problems
    return found


@pytest.fixture
def said(tmp_path: Path) -> dict[str, tuple[str, list[str]]]:
    """SAID with a template that is there, split into words."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    return {key: (value.replace("TEMPLATE", str(template)), words.replace("TEMPLATE", str(template)).split())
            for key, (value, words) in SAID.items()}


def one_tier(key: str, value: str) -> Config:
    return configured(f"[a]\npath = /m/a.gguf\n{key} = {value}\n")


def words_of(config: Config) -> list[str]:
    return llmstack.server_command(("S",), config.tiers[0], config, 1, NONE)


def contains(words: list[str], part: list[str]) -> bool:
    return any(words[i:i + len(part)] == part for i in range(len(words)))


def test_every_key_is_tried_here() -> None:
    assert set(SAID) == set(llmstack.TIER_SERVER_OPTIONS)


@pytest.mark.parametrize("key", SAID)
def test_a_key_reaches_the_command_line_and_the_yaml(key: str, said: dict[str, Any]) -> None:
    value, words = said[key]
    config = one_tier(key, value)
    assert contains(words_of(config), words)
    own = {"a": llmstack.Binary(("/opt/mine",))} if key in llmstack.SERVER_OPTIONS else {}
    plan = llmstack.SwapPlan(config, llmstack.Binary(("S",)), llmstack.posix_quote, own=own)
    text = llmstack.render_llama_swap_yaml(plan)
    loaded = yaml.safe_load(text)
    command = loaded["models"]["a"]["cmd"]
    import shlex
    in_yaml = shlex.split("\n".join(line for line in command.splitlines() if not line.lstrip().startswith("#")))
    assert contains(in_yaml, words)
    flags = [word for word in in_yaml if word.startswith("-")]
    assert len(flags) == len(set(flags)), "each flag once"


@pytest.mark.parametrize("key", llmstack.SERVER_OPTIONS)
def test_what_a_tier_says_wins_over_default(key: str, said: dict[str, Any]) -> None:
    value, words = said[key]
    config = configured(f"[DEFAULT]\n{key} = {value}\n[a]\npath = a.gguf\n[b]\npath = b.gguf\nthreads = 9\n")
    for tier in config.tiers:
        if (tier.name, key) != ("b", "threads"):
            assert contains(llmstack.server_command(("S",), tier, config, 1, NONE), words)
    other = {"parallel": "7", "n_gpu_layers": "5", "cache_type_k": "q4_0"}.get(key)
    if other:
        config = configured(f"[DEFAULT]\n{key} = {value}\n[a]\npath = a.gguf\n{key} = {other}\n")
        command = words_of(config)
        assert other in command
        assert not contains(command, words)


def test_real_llama_server_takes_every_flag(said: dict[str, Any]) -> None:
    program = os.environ.get("LLMSTACK_TEST_LLAMA_SERVER") or shutil.which("llama-server")
    if not program:
        pytest.skip("there is no llama-server here")
    words = [word for _, part in said.values() for word in part]
    done = subprocess.run([program, *words, "--version"], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_stand_in_takes_every_flag_but_two(said: dict[str, Any]) -> None:
    words = [word for key, (_, part) in said.items() if key not in NOT_IN_THE_STAND_IN for word in part if key != "lora"]
    llama_server.parse_command_line(words)


@pytest.mark.parametrize(("args", "why"), [
    ("--host 0.0.0.0", "--host is not for args"), ("--api_key x", "--api-key is not for args"),
    ("-m x", "hf_repo and hf_file, or path, name the model"), ("-c 5", "ctx_size says it"),
    ("-np 3", "parallel says it"), ("--port=1", "--port=1 is not for args"), ("--version", "print something and end"),
    ("--slot-save-path /x", "the engine says it itself"), ("--alias b", "--alias is not for args"),
    ("x --poll 0", "'x' follows no flag"), ("--poll '0", "No closing quotation"),
])
@pytest.mark.parametrize("section", ["[DEFAULT]", "[a]\npath = a.gguf"])
def test_args_refuse_by_line_what_breaks_a_promise(section: str, args: str, why: str) -> None:
    text = f"{section}\nargs = {args}\n"
    found = problem(text)
    assert found.startswith(f"models.ini:{text.count(chr(10))}: args: ")
    assert why in found


def test_a_hosted_tier_has_no_use_for_them() -> None:
    _, warnings = llmstack.parse_models_ini("[a]\nmodel = m\nparallel = 2\n")
    assert warnings == ("models.ini:3: parallel is for llama-server, and [a] is hosted",)


@pytest.mark.parametrize(("line", "needs_trust"), [
    ("args = --poll 0", True), ("llama_server_bin = ./mine", True), ("mmproj = /m/mmproj.gguf", True),
    ("mmproj = mmproj.gguf", False), ("mmproj = auto", False), ("draft = o/n:d.gguf", False), ("draft = ../d.gguf", True),
    ("lora = a.gguf, ~/b.gguf", True), ("lora = a.gguf, o/n:b.gguf", False), ("parallel = 2", False),
])
def test_what_reaches_out_of_the_project_needs_trust(line: str, needs_trust: bool) -> None:
    config = configured(f"[a]\npath = a.gguf\n{line}\n")
    assert [key for key, _ in llmstack.config_effects(config)] == ["[a] " + line.split(" ")[0]] * needs_trust


def test_pictures_are_said_of_a_tier_with_a_projector() -> None:
    config = configured("[a]\npath = a.gguf\nrole = agent\nmmproj = m.gguf\n[b]\npath = b.gguf\nrole = fast\n")
    assert [tier.takes_pictures for tier in config.tiers] == [True, False]
    import json
    models = json.loads(llmstack.render_opencode_json(config, "http://x", "/a"))["provider"]["llama.cpp"]["models"]
    assert {name: "modalities" in entry for name, entry in models.items()} == {"auto": True, "a": True, "b": False}
    assert llmstack.tier_entry(config.tiers[0])["meta"]["llmstack"]["input_modalities"] == ["text", "image"]


def test_what_is_refused_is_said() -> None:
    config = configured("[a]\npath = a.gguf\nn_cpu_moe = 3\nargs = --poll 0\n")
    assert llmstack.refused_settings(config, frozenset({"--n-cpu-moe", "--poll", "--no-mmap"})) == [
        "[a] n_cpu_moe: this llama-server refuses --n-cpu-moe 3", "[a] args: this llama-server refuses --poll 0"]


@pytest.mark.parametrize("word", ["a", "a b", '{"a": 1}', "a\\b c", 'x\\"y'])
def test_words_are_quoted_for_windows(word: str) -> None:
    # What CommandLineToArgvW makes of it, by its published rules.
    assert windows_split(llmstack.windows_quote(word)) == word


def windows_split(text: str) -> str:
    out, slashes, i = "", 0, 0
    while i < len(text):
        char = text[i]
        if char == "\\":
            slashes += 1
        elif char == '"':
            out += "\\" * (slashes // 2) + '"' * (slashes % 2)
            slashes = 0
        else:
            out += "\\" * slashes + char
            slashes = 0
        i += 1
    return out + "\\" * slashes


# ---- the files of a tier


def cached(cache: Path, repo: str, file: str) -> Path:
    folder = cache / ("models--" + repo.replace("/", "--"))
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("c")
    path = folder / "snapshots" / "c" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_files_of_the_hub_are_found_in_its_cache(tmp_path: Path) -> None:
    config = configured("[a]\nhf_repo = o/m\nhf_file = m.gguf\nmmproj = auto\ndraft = o/d:d.gguf\n")
    env = {"HF_HUB_CACHE": str(tmp_path)}
    cached(tmp_path, "o/m", "m.gguf")
    with pytest.raises(llmstack.UserError, match=r"a needs d\.gguf of o/d") as caught:
        llmstack.ready_tier(config.tiers[0], env)
    assert caught.value.hint == "llmstack download a"
    draft = cached(tmp_path, "o/d", "d.gguf")
    assert llmstack.ready_tier(config.tiers[0], env).settings == {"draft": str(draft)}
    projector = cached(tmp_path, "o/m", "mmproj-F16.gguf")
    assert llmstack.ready_tier(config.tiers[0], env).settings == {"mmproj": str(projector), "draft": str(draft)}


def test_llama_swap_starts_without_a_file_that_one_tier_lacks(tmp_path: Path) -> None:
    config = configured("[a]\npath = a.gguf\ndraft = o/d:d.gguf\n")
    assert llmstack._ready_for_swap(config.tiers[0], {"HF_HUB_CACHE": str(tmp_path)}) == config.tiers[0]


def test_they_are_downloaded_with_the_model() -> None:
    config = configured("[a]\nhf_repo = o/m\nhf_file = m.gguf\nmmproj = o/m:mmproj.gguf\ndraft = o/d:d.gguf\n")
    jobs, _ = llmstack.load_extra("download").plan_downloads(config, (), ("current",), llmstack)
    assert [(job.tier, job.repo, job.files) for job in jobs] == [
        ("a", "o/m", ("m.gguf", "mmproj.gguf")), ("a.more1", "o/d", ("d.gguf",))]
    assert all(llmstack.parse_job(job._asdict()) == job for job in jobs)


def test_auto_speculation_looks_for_the_head(tmp_path: Path) -> None:
    from tests.gguf_models import write
    for layers, expected in ((0, []), (1, ["--spec-type", "draft-mtp"])):
        meta = {"general.architecture": "llama", "llama.nextn_predict_layers": layers}
        path = write(tmp_path / f"{layers}.gguf", meta, [("output.weight", (4, 4), 1)])
        config = configured(f"[a]\npath = {path}\nspeculative = auto\n")
        tier = llmstack.ready_tier(config.tiers[0], {})
        flags = [word for flag in llmstack.tier_flags(tier) for word in flag]
        assert flags[4:] == expected


def test_a_quantised_v_needs_flash_attention_in_a_tier_too() -> None:
    assert problem("[a]\npath = a.gguf\nflash_attn = off\n").startswith("models.ini:3: flash_attn = off and")
    assert configured("[a]\npath = a.gguf\nflash_attn = off\ncache_type_v = f16\n")


def test_the_slots_of_a_tier_count() -> None:
    machine = llmstack.Machine(16.0, "memory", False)
    config = configured("[a]\npath = a.gguf\nparallel = 3\ncache_type_k = f16\n[b]\npath = b.gguf\n")
    loads = [llmstack.load_options(tier, config, machine) for tier in config.tiers]
    assert [(load.slots, load.cache_type_k) for load in loads] == [(3, "f16"), (4, "q8_0")]


# ---- projects of opencode-llmstack 1.0.3


def test_their_keys_are_read() -> None:
    import json
    text = ("[a]\ntier = subagent\npath = a.gguf\nrope_scaling = yarn(type=yarn, scale=4, orig_ctx=32768)\n"
            "chat_template = chatml\nprice_input_per_1m = 3\nprice_output_per_1m = 15.5\n[b]\npath = b.gguf\n")
    config, warnings = llmstack.parse_models_ini(text)
    assert not warnings
    assert (config.tiers[0].rope_scale, config.tiers[0].rope_orig_ctx) == (4, 32768)
    models = json.loads(llmstack.render_opencode_json(config, "http://x", "/a"))["provider"]["llama.cpp"]["models"]
    assert models["a"]["cost"] == {"input": 3, "output": 15.5}
    assert models["b"]["cost"] == {"input": 0, "output": 0}


@pytest.mark.parametrize("name", ["init", "configure"])
def test_their_commands_are_ours(name: str) -> None:
    parser = llmstack.command_parser(llmstack.OTHER_NAMES[name])
    assert parser.parse_args(["--current"]).run is llmstack._cmd_install
