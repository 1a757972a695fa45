"""Files that no llama.cpp can load, though they begin like a GGUF: what is said of them, and where."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

import llmstack
from tests import gguf_models

NO_WEIGHTS = gguf_models.header_bytes(gguf_models.model("llama", vocab=300)[0], [])[0]
BROKEN = [
    pytest.param(b"GGUF" + bytes(100), "has nothing in its header", id="zeros behind four letters"),
    pytest.param(b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "holds no weights", id="a header of nothing"),
    pytest.param(NO_WEIGHTS, "holds no weights", id="metadata alone"),
    pytest.param(b"GGUF", "ends within its header", id="four letters"),
    pytest.param(bytes(5000), "is not a GGUF file", id="zeros"),
]


def write(data: bytes) -> Path:
    """A project whose one tier has a file of these bytes."""
    path = Path("m.gguf").absolute()
    path.write_bytes(data)
    Path(".llmstack").mkdir()
    places = llmstack.find_places(os.environ)
    Path(places.models_ini).write_text(f"[a]\nrole = fast\npath = {path}\n")
    llmstack.trust_project(places, "run")
    return path


@pytest.mark.parametrize(("data", "why"), BROKEN)
def test_check_and_fit_say_so(data: bytes, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(data)
    assert llmstack.file_damage(str(path)) == why
    llmstack.main(["check", "--offline", "--json"])
    row, = json.loads(capsys.readouterr().out)["tiers"]
    assert row["current"]["local"] == "damaged"
    assert why in row["current"]["problem"]
    assert llmstack.main(["fit", "--json"]) == 1
    tier, = json.loads(capsys.readouterr().out)["tiers"]
    assert (tier["source"], tier["fits"], tier["note"]) == ("broken", False, f"m.gguf {why}")


@pytest.mark.parametrize(("data", "why"), BROKEN)
def test_list_says_so(data: bytes, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(data)
    llmstack.main(["list", "--json"])
    row, = json.loads(capsys.readouterr().out)
    assert row["problem"].startswith(why)


def test_the_first_part_of_a_split_may_hold_no_weights(tmp_path: Path) -> None:
    """`llama-gguf-split --no-tensor-first-split` makes such files."""
    meta, tensors = gguf_models.model("llama", vocab=300)
    first = tmp_path / "m-00001-of-00002.gguf"
    split = {"split.count": 2, "split.tensors.count": len(tensors)}
    first.write_bytes(gguf_models.header_bytes({**meta, **split, "split.no": 0}, [])[0])
    gguf_models.write(tmp_path / "m-00002-of-00002.gguf", {**split, "split.no": 1}, tensors)
    assert llmstack.file_damage(str(first)) == ""
    whole = llmstack.local_header(str(first))
    assert set(whole.tensors) == {name for name, _, _ in tensors}
