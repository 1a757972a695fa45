"""Channel markers and trust."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import llmstack


@pytest.fixture
def places(home: Path) -> llmstack.Places:
    found = llmstack.find_places(os.environ)
    Path(found.state).mkdir()
    return found


@pytest.mark.parametrize(("text", "marker"), [
    ("current\n", llmstack.Marker("current")),
    ("next", llmstack.Marker("next")),
    ("external http://10.0.0.5:10101\n", llmstack.Marker("external", "http://10.0.0.5:10101")),
    ("external https://box.example/llm/", llmstack.Marker("external", "https://box.example/llm/")),
    ("external http://[::1]:1", llmstack.Marker("external", "http://[::1]:1")),
])
def test_a_marker_reads_back_as_written(text: str, marker: llmstack.Marker) -> None:
    assert llmstack.parse_marker(text) == marker
    assert llmstack.parse_marker(llmstack.render_marker(marker)) == marker


@pytest.mark.parametrize("text", ["", "external", "currant", "current http://x", "external ftp://x", "external http://$(id)",
                                  "external http://x/`id`", "external http://x/%F", "external http://u:p@x",
                                  "external http://x/\x1b[2J", "external http://x y", "external http://x/\u00e9"])
def test_what_a_shell_could_read_otherwise_is_no_marker(text: str) -> None:
    assert llmstack.parse_marker(text) is None


def test_nothing_is_trusted_until_somebody_says_so(places: llmstack.Places) -> None:
    Path(places.state, "opencode.json").write_text("{}")
    assert not llmstack.is_trusted(places, "hook")
    assert llmstack.is_trusted(places, "run"), "nothing there that would be run"
    llmstack.trust_project(places)
    assert llmstack.is_trusted(places, "hook")
    assert os.path.realpath(places.state) in json.loads(Path(llmstack.trust_file(places.data)).read_text())


@pytest.mark.parametrize("name", ["opencode.json", "AGENTS.md", "default-channel"])
def test_a_change_of_what_the_hook_hands_on_ends_its_trust(name: str, places: llmstack.Places) -> None:
    llmstack.trust_project(places)
    Path(places.state, name).write_text("changed")
    assert not llmstack.is_trusted(places, "hook")


HOST = "[a]\nmodel = m\nbase_url = http://127.0.0.1:1\n"


@pytest.mark.parametrize(("text", "other"), [
    ("[DEFAULT]\nllama_server_bin = /tmp/evil\n", "[DEFAULT]\nllama_server_bin = /tmp/evil2\n"),
    ("[a]\nmodel = m\nbase_url: http://evil\n", "[a]\nmodel = m\nbase_url: http://evil:80\n"),
    (HOST.replace("model", "  API_KEY_ENV=AWS_SECRET_ACCESS_KEY\nmodel"), HOST + "api_key_env = AWS_ACCESS_KEY_ID\n"),
    ("[DEFAULT]\nallow_unauthenticated = yes\n", "[DEFAULT]\nrouter_host = 0.0.0.0\n"),
])
def test_a_models_ini_that_runs_or_sends_something_needs_trust(text: str, other: str, places: llmstack.Places) -> None:
    ini = Path(places.models_ini)
    ini.write_text("[DEFAULT]\nengine = auto\nallow_unauthenticated = no\nrouter_host = localhost\n")
    assert llmstack.is_trusted(places, "run")
    ini.write_text(text)
    assert not llmstack.is_trusted(places, "run")
    llmstack.trust_project(places)
    assert llmstack.is_trusted(places, "run")
    ini.write_text(f"; a comment\n{text}[ROUTING]\nmulti_turn = 3 ; and another\n")
    assert llmstack.is_trusted(places, "run"), "only what reaches out of the project counts"
    ini.write_text(other)
    assert not llmstack.is_trusted(places, "run")


def test_a_copy_of_a_trusted_project_is_not_trusted(places: llmstack.Places, tmp_path: Path) -> None:
    Path(places.state, "opencode.json").write_text("{}")
    llmstack.trust_project(places)
    other = tmp_path / "clone" / ".llmstack"
    shutil.copytree(places.state, other)
    assert not llmstack.is_trusted(places._replace(state=str(other)), "hook")


def test_a_broken_record_trusts_nothing(places: llmstack.Places) -> None:
    Path(places.state, "opencode.json").write_text("{}")
    llmstack.trust_project(places)
    Path(llmstack.trust_file(places.data)).write_text("[1")
    assert not llmstack.is_trusted(places, "hook")
