"""extras/add.py: from a repository to a section of models.ini and its files, against a local hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Iterator

import pytest

import llmstack
from llmstack import UserError
from tests.fake_hub import FakeHub
from tests.noise_model import render_noise_gguf

INI = Path(".llmstack/models.ini")
ADD = llmstack.load_extra("add")
OLD = b"# mine\r\n[a]\r\nrole = agent\r\npath = /nowhere/a.gguf"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    noise = render_noise_gguf()
    server.repos["owner/noise-GGUF"] = {
        "noise-Q4_K_M.gguf": noise, "noise-Q8_0.gguf": noise + b"\0" * 4096, "noise-BF16.gguf": noise + b"\0" * 8192,
        "README.md": b"x"}
    server.repos["owner/eyes-GGUF"] = {"eyes-Q4_0.gguf": noise, "mmproj-BF16.gguf": b"x", "mmproj-F16.gguf": b"xx"}
    server.repos["owner/none"] = {"model.safetensors": b"x"}
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.stop()


def add(*words: str) -> int:
    return llmstack.main(["add", *words, "--yes"])


@pytest.mark.parametrize(("text", "expected"), [
    ("o/n", ("o/n", "", "")), ("o/n:Q4_K_M", ("o/n", "Q4_K_M", "")), ("https://huggingface.co/o/n", ("o/n", "", "")),
    ("https://huggingface.co/o/n/blob/main/d/x.gguf?download=true", ("o/n", "", "d/x.gguf")),
    ("https://huggingface.co/o/n/tree/main", ("o/n", "", "")),
])
def test_what_may_be_asked_for(text: str, expected: Any) -> None:
    assert ADD.parse_wanted(text, llmstack)[:3] == expected


@pytest.mark.parametrize("text", ["x", "a/b/c", "/nowhere/a.gguf", "o/", "../x"])
def test_what_may_not(text: str) -> None:
    with pytest.raises(UserError, match="is no file here, and no repository"):
        ADD.parse_wanted(text, llmstack)


@pytest.mark.parametrize(("file", "expected"), [
    ("a-Q4_K_M.gguf", ("Q4_K_M", 4)), ("d/A-UD-Q6_K_XL-00001-of-00002.gguf", ("UD-Q6_K_XL", 6)),
    ("a-iq3_xxs.gguf", ("iq3_xxs", 3)),
    ("a.gguf", ("", 0)), ("m-BF16.gguf", ("BF16", 16)), ("gpt-MXFP4.gguf", ("MXFP4", 4)),
])
def test_a_quant_is_read_from_the_name(file: str, expected: Any) -> None:
    assert ADD.quant_of(file) == expected


def test_an_empty_project_gets_the_largest_quant_that_fits(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert add("owner/noise-GGUF", "--no-download") == 0
    out = capsys.readouterr().out
    assert "KV cache" in out
    assert "fits" in out
    assert "licence   not named" in out
    text = INI.read_text()
    assert "hf_file = noise-Q8_0.gguf\n" in text
    config, warnings = llmstack.parse_models_ini(text)
    assert not warnings
    assert [(tier.name, tier.role, tier.quant) for tier in config.tiers] == [("noise", "agent", "Q8_0")]


def test_no_other_byte_of_models_ini_changes(hub: FakeHub) -> None:
    INI.parent.mkdir()
    INI.write_bytes(OLD)
    assert add("owner/eyes-GGUF:q4_0", "--tier", "eyes", "--role", "plan", "--no-download") == 0
    new = INI.read_bytes()
    assert new.startswith(OLD + b"\r\n\r\n[eyes]\r\nrole = plan\r\nhf_repo = owner/eyes-GGUF\r\nhf_file = eyes-Q4_0.gguf\r\n")
    assert new.endswith(b"mmproj = owner/eyes-GGUF:mmproj-F16.gguf\r\n")
    assert b"\n" not in new.replace(b"\r\n", b"")


@pytest.mark.parametrize(("words", "said"), [
    (("owner/noise-GGUF:Q2_K",), "owner/noise-GGUF has no Q2_K"), (("owner/none",), "owner/none has no GGUF"),
    (("owner/gone",), "there is no owner/gone on the hub, or it is private"),
    (("owner/noise-GGUF", "--tier", "a"), "models.ini has a already"),
    (("owner/noise-GGUF", "--role", "agent"), "role agent belongs to [a] already"),
])
def test_what_cannot_be_added_changes_nothing(hub: FakeHub, words: tuple[str, ...], said: str,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    INI.parent.mkdir()
    INI.write_bytes(OLD)
    assert add(*words, "--no-download") != 0
    assert said in capsys.readouterr().err
    assert INI.read_bytes() == OLD


def test_nothing_fits(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "this_machine", lambda config: llmstack.Machine(0.001, "a test", False))
    assert add("owner/noise-GGUF", "--no-download") == 1
    said = capsys.readouterr().err
    assert "nothing of owner/noise-GGUF fits: the smallest takes" in said
    assert "llmstack add owner/noise-GGUF:Q4_K_M" in said
    assert add("owner/noise-GGUF:Q8_0", "--no-download") == 0
    assert "does not fit" in capsys.readouterr().out


def test_without_a_terminal_it_wants_yes(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["add", "owner/noise-GGUF"]) == 1
    assert "nothing is added unasked" in capsys.readouterr().err
    assert not INI.exists()


def test_a_hub_that_says_nonsense_is_no_traceback(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.nonsense = b'[{"path": 1}, 5]'
    assert add("owner/noise-GGUF") == 1
    assert "does not answer like a model hub" in capsys.readouterr().err


def test_a_file_of_this_disk(tmp_path: Path) -> None:
    path = tmp_path / "mine-Q4_0.gguf"
    path.write_bytes(render_noise_gguf())
    assert add(str(path)) == 0
    tier = llmstack.load_config(llmstack.find_places(os.environ)).tiers[0]
    assert (tier.name, tier.path, tier.quant) == ("mine-q4_0", str(path), "Q4_0")


def test_from_an_empty_project_to_an_answer_in_one_command(hub: FakeHub, real_data: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("LLAMA_SERVER_BIN", raising=False)
    assert add("owner/noise-GGUF:Q4_K_M") == 0
    assert re.search(r"noise is loaded in [0-9.]+ s and answers '.+'", capsys.readouterr().out)
    tier = llmstack.load_config(llmstack.find_places(os.environ)).tiers[0]
    path = llmstack.cached_model(llmstack.weights_for(tier), os.environ)
    assert Path(path).read_bytes() == hub.repos["owner/noise-GGUF"]["noise-Q4_K_M.gguf"]
