"""The stand-in for llama-server: its command line, and the real xllamacpp behind it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Iterator

import pytest

import llmstack
from tests.conftest import ROOT
from tests.noise_model import render_noise_gguf

sys.path.insert(0, str(ROOT / "share" / "guests"))

import llama_server

# ---- its command line


@pytest.mark.parametrize(("argv", "said"), [
    (["--no-mmap", "--version"], "invalid argument: --no-mmap"),
    (["-c", "abc", "--version"], "invalid value for -c: abc"),
    (["-c", "nan"], "invalid value for -c: nan"),
    (["--temp", "nan"], "invalid value for --temp: nan"),
    (["--flash-attn", "maybe", "--version"], "invalid value for --flash-attn: maybe"),
    (["--override-tensor", "exps", "--version"], "invalid value for --override-tensor: exps"),
    (["--lora-scaled", "a.gguf", "--version"], "invalid value for --lora-scaled: a.gguf"),
    (["--spec-type", "guess", "--version"], "invalid value for --spec-type: guess"),
    (["--cache-ram", "-2", "--version"], "invalid value for --cache-ram: -2"),
    (["--slot-save-path", "/nowhere", "--version"], "not a directory: /nowhere"),
    (["--chat-template-file", "/nowhere", "--version"], "cannot read /nowhere: No such file or directory"),
    (["--temp"], "--temp needs a value"),
])
def test_it_refuses_as_llama_server_does(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert llama_server.main(argv) == 1
    assert capsys.readouterr().err.splitlines() == [f"error: {said}"]


def test_it_takes_every_flag_we_use(config: llmstack.Config) -> None:
    command = llmstack.server_command((), config.tiers[0], config, 10001, frozenset({"--no-mmap"}))
    values = llama_server.parse_command_line(command)
    assert values["n_ctx"] == 131_072
    assert values["rope_freq_scale"] == 0.25
    assert values["load_mode"] == 0


@pytest.mark.parametrize(("argv", "expected"), [
    (["--alias", "", "-m", ""], {"model_alias": [], "model.path": ""}),
    (["--rerank"], {"embedding": True, "pooling_type": 4}),
    (["--embeddings", "--pooling", "cls"], {"embedding": True, "pooling_type": 2}),
    (["--cors-origins", "localhost"], {"cors_origins": "localhost", "cors_origins_explicit": True}),
    (["--api-key", "a,b", "--api-key", "c"], {"api_keys": ["a", "b", "c"]}),
    (["--lora", "a,b", "--lora-scaled", "c:d:0.5"], {"lora_adapters": [("a", 1.0), ("b", 1.0), ("c:d", 0.5)]}),
    (["-ncmoe", "1", "-ot", "x=CPU,y=CPU"],
     {"tensor_buft_overrides": [r"blk\.0\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU", "x=CPU", "y=CPU"]}),
    (["-ngl", "all", "-np", "-1", "-ngl", "7"], {"n_gpu_layers": 7, "n_parallel": -1}),
    (["--spec-type", "ngram-mod,draft-simple"], {"speculative.types": [9, 1]}),
    (["-m", "a", "--version", "--nonsense"], {"model.path": "a", "version": True}),
])
def test_what_flags_mean(argv: list[str], expected: dict[str, Any]) -> None:
    assert llama_server.parse_command_line(argv) == expected


def test_files_that_flags_name(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# mine\n one \n\ntwo\n")
    (tmp_path / "template").write_text("{{ x }}\n")
    values = llama_server.parse_command_line([
        "--api-key-file", str(tmp_path / "keys"), "--chat-template-file", str(tmp_path / "template"),
        "--slot-save-path", str(tmp_path), "-ts", "3,1"])
    assert values["api_keys"] == ["one", "two"]
    assert values["chat_template"] == "{{ x }}\n"
    assert values["slot_save_path"] == str(tmp_path) + os.sep
    assert (values["tensor_split"][:3], len(values["tensor_split"])) == ([3.0, 1.0, 0.0], 128)


# ---- with the real xllamacpp


@pytest.fixture
def program(real_data: Path) -> list[str]:
    python = llmstack.environment_program(llmstack.LLAMA_CPP, str(real_data))
    return llmstack.guest_command(python, "llama_server")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(render_noise_gguf())
    return path


def refused(command: list[str]) -> str:
    """What a command says that ends with 1."""
    done = subprocess.run(command, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    return done.stderr


def test_it_says_what_is_wrong_with_a_model(program: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    for model, said in ((tmp_path / "none.gguf", "No such file"), (tmp_path / "bad.gguf", "not a GGUF file")):
        error = refused([*program, "-m", str(model), "--port", "0"])
        assert said in error
        assert len(error.splitlines()) == 1


def test_it_says_what_xllamacpp_does_not_take(program: list[str], model: Path) -> None:
    error = refused([*program, "-m", str(model), "-ot", "x=NOWHERE"])
    assert "error: invalid value for tensor_buft_overrides: x=NOWHERE: unknown buffer type" in error
    assert "Traceback" not in error


SAMPLES = {"--model": "DIR/none", "--hf-repo": "", "--slot-save-path": "DIR", "--chat-template-file": "DIR/file",
           "--api-key-file": "DIR/file", "--override-tensor": "x=CPU", "--lora-scaled": "x:1", "--spec-type": "none",
           "--host": "127.0.0.1", "--port": "0"}


def test_xllamacpp_has_an_attribute_for_every_flag(program: list[str], tmp_path: Path) -> None:
    """Each flag once, with a value that it takes, is set without an error: the model is what is missing."""
    argv: list[str] = []
    for option in llama_server.OPTIONS:
        flag = option.flags.split()[-1]
        if flag == "--version" or flag in argv:
            continue
        argv.append(flag)
        if isinstance(option.value, dict):
            argv.append(list(option.value)[-1])
        elif callable(option.value):
            argv.append(SAMPLES.get(flag, "1").replace("DIR", str(tmp_path)))
    (tmp_path / "file").write_text("x")
    assert refused([*program, *argv]) == f"error: cannot read the model {tmp_path}/none: No such file or directory\n"


@contextlib.contextmanager
def serving(command: list[str], env: dict[str, str]) -> Iterator[llmstack.Upstream]:
    """A server that is up; it says itself on which port."""
    process = subprocess.Popen([*command, "--port", "0", "-c", "512", "-np", "1"], env={**os.environ, **env}, text=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr
    try:
        seen = []
        for line in process.stderr:
            seen.append(line)
            port = re.search(r"listening on http://127\.0\.0\.1:(\d+)", line)
            if port:
                break
        else:
            pytest.fail("".join(seen))
        yield llmstack.Upstream("127.0.0.1", int(port.group(1)))
    finally:
        process.kill()
        process.communicate()


def ask(upstream: llmstack.Upstream, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{upstream.port}{path}", json.dumps(body).encode(),
                                     {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


PROMPT = {"prompt": "Once upon a time", "n_predict": 2, "id_slot": 0, "temperature": 0}


def test_a_key_in_the_environment_is_demanded(program: list[str], model: Path) -> None:
    with serving([*program, "-m", str(model)], {"LLAMA_API_KEY": "one,two"}) as server:
        assert ask(server, "/completion", PROMPT)[0] == 401
        assert ask(server, "/completion", PROMPT, Authorization="Bearer three")[0] == 401
        assert ask(server, "/completion", PROMPT, Authorization="Bearer two")[0] == 200


def test_a_slot_is_saved_and_restored(program: list[str], model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "slots"
    saved.mkdir()
    command = [*program, "-m", str(model), "--slot-save-path", str(saved), "--cache-ram", "0", "--ctx-checkpoints", "0"]
    with serving(command, {}) as server:
        assert ask(server, "/completion", PROMPT)[0] == 200
        status, said = ask(server, "/slots/0?action=save", {"filename": "a.bin"})
        assert (status, said["n_saved"] > 0) == (200, True)
    with serving(command, {}) as server:
        status, again = ask(server, "/slots/0?action=restore", {"filename": "a.bin"})
        assert (status, again["n_restored"]) == (200, said["n_saved"])
        assert ask(server, "/completion", PROMPT)[1]["timings"]["cache_n"] > 0
    assert (saved / "a.bin").stat().st_size > 0
