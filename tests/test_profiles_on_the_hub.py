"""The table of the profiles' models, and `check --profiles`, which holds it to a hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Iterator

import pytest

import llmstack
from tests.fake_hub import FakeHub

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = llmstack.load_extra("check").profile_files(llmstack)


class Hub(FakeHub):
    """Says of each file the size it is to have, in bytes, without having it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}
        for row in ROWS:
            parts = llmstack.split_parts(row.file)
            for part in parts:
                self.repos.setdefault(row.repo, {})[part] = b""
                self.sizes[part] = round(row.size_gb * 1e9 / len(parts))

    def rows(self, repo: str) -> list[dict[str, Any]]:
        found = super().rows(repo)
        for row in found:
            row["size"] = row["lfs"]["size"] = self.sizes[row["path"]]
        return found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.stop()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.file)
def test_every_model_of_a_profile_stands_in_the_table(row: Any) -> None:
    line, = re.findall(rf"^\| `{re.escape(row.repo)}` `{re.escape(row.file)}` \| .*", PAGE, re.MULTILINE)
    _, _, size, profiles, confirmed, _ = line.split("|")
    assert float(size) == row.size_gb
    assert profiles.strip().split(", ") == list(row.profiles)
    assert confirmed.strip()


def test_the_table_has_no_others() -> None:
    files = re.findall(r"^\| `[^`]+` `([^`]+\.gguf)` \|", PAGE, re.MULTILINE)
    assert sorted(files) == sorted(row.file for row in ROWS)


def check(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    code = llmstack.main(["check", "--profiles", "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_hub_that_agrees(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = check(capsys)
    assert (code, {row["problem"] for row in rows}) == (0, {""})
    assert all(row["hub_gb"] == pytest.approx(row["size_gb"]) for row in rows)
    assert llmstack.main(["check", "--profiles"]) == 0
    assert "as said  25.10 GB  unsloth/Qwen3-Coder-30B-A3B-Instruct-GGUF:" in capsys.readouterr().out


def test_what_differs_is_said(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.sizes["Qwen3-Coder-Next-Q4_K_M.gguf"] = 45_000_000_000
    hub.sizes["Qwen3-8B-Q4_K_M.gguf"] = 5_040_000_000      # within what rounding does
    del hub.repos["Jackrong/Qwopus-GLM-18B-Merged-GGUF"]["Qwopus-GLM-18B-Healed-Q6_K.gguf"]
    del hub.repos["Qwen/Qwen3-14B-GGUF"]
    code, rows = check(capsys)
    problems = {row["file"]: row["problem"] for row in rows if row["problem"]}
    assert code == 1
    assert sorted(problems) == ["Qwen3-14B-Q4_K_M.gguf", "Qwen3-Coder-Next-Q4_K_M.gguf", "Qwopus-GLM-18B-Healed-Q6_K.gguf"]
    assert problems["Qwen3-Coder-Next-Q4_K_M.gguf"] == "the hub has 45.00 GB"
    assert "there is no Qwen/Qwen3-14B-GGUF on the hub" in problems["Qwen3-14B-Q4_K_M.gguf"]
    llmstack.main(["check", "--profiles"])
    assert "differs  48.53 GB  unsloth/Qwen3-Coder-Next-GGUF:" in capsys.readouterr().out


def test_no_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert llmstack.main(["check", "--profiles"]) == 1
    assert "the model hub cannot be reached" in capsys.readouterr().err
