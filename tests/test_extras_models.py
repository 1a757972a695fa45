"""extras/list.py, rm.py, prune.py and promote.py: what is on the disk, and what of it may go."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import llmstack
from tests.noise_model import render_noise_gguf

INI = Path(".llmstack/models.ini")
TEXT = """\
# mine
[a]
role = agent
hf_repo = o/a
hf_file = a-Q4.gguf     ; the small one
hf_file_next = a-Q8.gguf
size_gb_next = 9
quant_next = Q8

[b]
hf_repo = o/b
hf_file = b-00001-of-00002.gguf
# the end
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    INI.parent.mkdir()
    INI.write_bytes(TEXT.encode())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(cache: Path, repo: str, file: str, data: bytes = b"", commit: str = "c") -> Path:
    """A file as the hub cache has it: a link to a blob."""
    folder = cache / ("models--" + repo.replace("/", "--"))
    blob = folder / "blobs" / f"{len(data)}-{file.replace('/', '_')}"
    path = folder / "snapshots" / commit / file
    path.parent.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(data or render_noise_gguf())
    path.symlink_to(os.path.relpath(blob, path.parent))
    return path


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, list[str]]]:
    assert llmstack.main(["list", "--json"]) == 0
    return {row["name"]: (row["problem"], row["tiers"]) for row in json.loads(capsys.readouterr().out)}


def test_every_model_by_tier_or_none(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(cache, "o/a", "a-Q4.gguf")
    put(cache, "o/a", "a-Q8.gguf", render_noise_gguf()[:-100])
    put(cache, "o/b", "b-00001-of-00002.gguf")
    put(cache, "x/y", "d/z.gguf")
    found = listed(capsys)
    assert {name: tiers for name, (_, tiers) in found.items()} == {
        "o/a:a-Q4.gguf": ["a"], "o/a:a-Q8.gguf": ["a (next)"], "o/b:b-00001-of-00002.gguf": ["b"], "x/y:d/z.gguf": []}
    assert found["o/a:a-Q4.gguf"][0] == ""
    assert found["o/a:a-Q8.gguf"][0].startswith("is not whole")
    assert found["o/b:b-00001-of-00002.gguf"][0] == "lacks 1 of its parts"
    assert llmstack.main(["list"]) == 0
    assert "no tier of this project" in capsys.readouterr().out


def test_an_empty_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["list"]) == 0
    assert "There is no model on this disk" in capsys.readouterr().out


def test_a_model_goes_with_its_data(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(cache, "x/y", "z.gguf")
    blob = Path(os.path.realpath(path))
    assert llmstack.main(["rm", "z.gguf"]) == 1
    assert "no terminal to ask on" in capsys.readouterr().err
    assert llmstack.main(["rm", "z.gguf", "--yes"]) == 0
    assert not blob.exists()
    assert not path.is_symlink()


def test_what_a_tier_runs_stays(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(cache, "o/a", "a-Q4.gguf")
    assert llmstack.main(["rm", "o/a", "--yes"]) == 1
    assert "o/a:a-Q4.gguf belongs to a" in capsys.readouterr().err
    assert path.exists()
    assert llmstack.main(["rm", "o/a", "--yes", "--force"]) == 0
    assert not path.exists()


def test_a_link_that_leads_out_of_the_cache_is_left(cache: Path, tmp_path: Path) -> None:
    outside = tmp_path / "mine.gguf"
    outside.write_bytes(render_noise_gguf())
    path = put(cache, "x/y", "z.gguf")
    path.unlink()
    path.symlink_to(outside)
    assert llmstack.main(["rm", "z.gguf", "--yes"]) == 0
    assert outside.exists()
    assert not path.is_symlink()


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["rm", "nothing", "--yes"]) == 2
    assert "there is no model 'nothing' on this disk" in capsys.readouterr().err


def test_prune_takes_what_no_tier_names(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, other = put(cache, "o/a", "a-Q8.gguf"), put(cache, "x/y", "z.gguf")
    assert llmstack.main(["prune"]) == 1
    assert other.exists()
    assert llmstack.main(["prune", "--yes"]) == 0
    assert ours.exists()
    assert not other.exists()
    assert llmstack.main(["prune"]) == 0
    assert "belongs to a tier" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_promote_changes_what_upgrading_says_and_nothing_else(ending: str) -> None:
    INI.write_bytes(TEXT.replace("\n", ending).encode("utf-8-sig"))
    assert llmstack.main(["promote", "nobody"]) == 2
    assert llmstack.main(["promote", "a"]) == 0
    expected = TEXT.replace("a-Q4.gguf ", "a-Q8.gguf ").replace("hf_file_next = a-Q8.gguf\n", "").replace(
        "size_gb_next = 9\nquant_next = Q8\n", "size_gb = 9\nquant = Q8\n")
    assert INI.read_bytes() == expected.replace("\n", ending).encode("utf-8-sig")


def test_promote_without_an_upgrade(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["promote", "b"]) == 1
    assert "b has no queued upgrade" in capsys.readouterr().err
    assert INI.read_bytes() == TEXT.encode()
