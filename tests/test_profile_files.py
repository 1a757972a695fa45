"""A profile's own file laid over the bundled models.ini, the machine it is for, and what it queues."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import llmstack
from tests import gguf_models
from tests.test_fit import NAMES, machine, profile_text

BUNDLED = """\
# Profile: 64 (GB of memory). For another: ...
[a]
role  = fast
size_gb = 2

; [a]
; role = fast

# About b.
[b]
role  = agent
hf_file_next = x.gguf
# behind
ttl = 5
"""


def test_a_section_of_its_own_goes_before_the_bundled_one() -> None:
    own = "# Profile: 8 (GB of memory). For another: ...\n\n[b]\nrole  = agent   ; c\\1\nsize_gb = 1\n\n[c]\nrole = plan\n"
    assert llmstack.render_profile(BUNDLED, own) == BUNDLED.replace(
        "# Profile: 64 ", "# Profile: 8 ").replace("hf_file_next = x.gguf\n", "size_gb = 1\n").replace(
        "= agent\n", "= agent   ; c\\1\n")


def test_without_a_file_of_its_own_nothing_changes() -> None:
    assert llmstack.render_profile(BUNDLED, "") == BUNDLED


@pytest.mark.parametrize(("text", "name"), [
    (BUNDLED, "64"), ("# Profile: card-24 (GB of a card).\n", "card-24"), ("[a]\n# a Profile: 8\n", ""), ("", "")])
def test_a_models_ini_says_which_profile_it_was(text: str, name: str) -> None:
    assert llmstack.profile_of(text) == name


@pytest.mark.parametrize(("total", "smi", "name"), [
    (33.5, "GPU-1, 12288, 220, 500\n", "card-12"), (33.5, "GPU-1, 16380, 300, 800\n", "card-16"),
    (67.0, "GPU-1, 24564, 420, 900\n", "card-24"), (67.0, "GPU-1, 32607, 480, 1200\n", "card-32"),
    (16.6, "GPU-1, 24564, 420, 900\n", "24"), (67.0, "GPU-1, 12288, 0, 0\nGPU-2, 12288, 0, 0\n", "card-24"),
    (134.0, "GPU-1, [N/A], [N/A], [N/A]\n", "128"), (33.5, "", "24")])
def test_a_machine_with_a_card_gets_a_profile_for_one(
        total: float, smi: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llmstack, "DRM", str(tmp_path))
    machine(monkeypatch, total, outputs={"nvidia-smi": smi})
    text, why = llmstack.seed_text()
    assert text.decode() == profile_text(name)
    assert why.startswith(f"Profile {name}, the tiers for ")
    assert "not every tier" not in why


@pytest.mark.parametrize(("gib", "name"), [(32, "24"), (48, "48"), (256, "256"), (512, "512")])
def test_a_mac_gets_none_for_a_card(gib: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gib * 1.073741824, True)
    assert llmstack.seed_text()[0].decode() == profile_text(name)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_profile_writes_is_read_and_its_models_are_known(name: str) -> None:
    config, warnings = llmstack.parse_models_ini(profile_text(name))
    assert warnings == ()
    assert config.by_name("glm") == config.by_role("plan")
    for tier in config.tiers:
        for weights in llmstack.both_weights(tier):
            header = gguf_models.header_of(weights.file)
            assert "Qwopus" in weights.file or header is not None
            # Beside the specification's figures, size_gb is what the dimensions' table has.
            if header and name != "64":
                assert weights.size_gb == pytest.approx(header.tensor_bytes / 1e9, rel=0.03)


@pytest.mark.parametrize(("name", "queued"), [("card-24", False), ("card-12", True), ("256", True), ("512", False)])
def test_the_next_channel_is_refused_in_words_of_the_profile(
        name: str, queued: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["install", "--profile", name]) == 0
    capsys.readouterr()
    assert llmstack.main(["install", "--next"]) == (0 if queued else 2)
    said = capsys.readouterr().err
    told = f"no tier of this models.ini, profile {name}, has a queued upgrade, so there is no next channel to run"
    assert (told in said) is not queued
    assert os.path.exists(".llmstack/models.ini")


def test_a_model_in_a_folder_of_its_repository_is_known() -> None:
    models = llmstack.known_models()
    found = llmstack.known_header("Q4_K_M/Qwen3.5-397B-A17B-Q4_K_M-00001-of-00006.gguf", 1.0, models)
    assert found is not None
    assert found.tensor_bytes == 244_090_000_000
    assert len(found.tensors) == 60, "of the experts, one a layer"
