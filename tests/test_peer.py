"""A project directory made by the real opencode-llmstack 0.12.0 works here, and one of ours works there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest

import llmstack
from tests.test_stack import PROGRAM

PEER = os.environ.get("LLMSTACK_TEST_PEER", "")
SPOKEN = ("code-fast", "code-smart", "plan", "plan-uncensored")  # the peer lists embed as one of them
STATE = Path(".llmstack")
pytestmark = pytest.mark.skipif(not PEER, reason="the peer needs Python 3.11; or not run by `python3 -m tests`")


def peer(*words: str) -> str:
    """Run the peer's program in the current directory; what it says."""
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHONPATH": PEER, "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-m", "llmstack", *words], env=env, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contexts() -> dict[str, int]:
    """The models of opencode.json, by either's provider, with their contexts."""
    value: Any = json.loads((STATE / "opencode.json").read_text())
    (provider,) = value["provider"].values()
    return {name: model["limit"]["context"] for name, model in provider["models"].items()}


@pytest.fixture
def router(tmp_path: Path) -> Iterator[str]:
    """The address of our router, beside a project that our `install` has seeded."""
    desk = tmp_path / "desk"
    desk.mkdir()
    subprocess.run([sys.executable, PROGRAM, "install"], cwd=desk, check=True, capture_output=True)
    process = subprocess.Popen([sys.executable, PROGRAM, "serve", "--port", "0"], cwd=desk, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    yield process.stdout.readline().split()[0]
    process.terminate()
    process.communicate(timeout=20)


def test_a_directory_of_the_peers_install_works_here() -> None:
    peer("install")
    theirs = {name: (STATE / name).read_bytes() for name in ("models.ini", "AGENTS.md", "default-channel", "litellm_config.yaml")}
    known = contexts()
    assert llmstack.main(["install"]) == 0
    ours = contexts()
    assert {name: ours[name] for name in known if name != "auto"} == {n: known[n] for n in known if n != "auto"}
    assert {name: (STATE / name).read_bytes() for name in theirs} == theirs
    assert not llmstack.is_trusted(llmstack.find_places(os.environ), "hook"), "nobody has looked at its AGENTS.md"
    assert llmstack.main(["trust"]) == 0
    assert llmstack.main(["status"]) == 1, "read, and nothing runs"


def test_a_directory_of_ours_works_there() -> None:
    assert llmstack.main(["install"]) == 0
    ini, pin, ours = (STATE / "models.ini").read_bytes(), (STATE / "default-channel").read_text(), contexts()
    peer("install")
    theirs = contexts()
    assert {name: ours[name] for name in SPOKEN} == {name: theirs[name] for name in SPOKEN}
    assert len(theirs) > 4
    assert (STATE / "models.ini").read_bytes() == ini
    assert (STATE / "default-channel").read_text() == pin
    assert "http://127.0.0.1:10101" in peer("status")


def test_the_peer_is_a_thin_client_of_our_router_and_its_directory_one_of_ours(router: str) -> None:
    peer("install", "--external", router)
    theirs = contexts()
    assert (STATE / "default-channel").read_text() == f"external {router}\n"
    assert llmstack.main(["start"]) == 1, "not trusted"
    assert llmstack.main(["trust"]) == 0
    assert llmstack.main(["start"]) == 0
    assert llmstack.main(["install"]) == 0
    ours = contexts()
    assert {name: ours[name] for name in SPOKEN} == {name: theirs[name] for name in SPOKEN}
    assert (STATE / "default-channel").read_text() == f"external {router}\n"
    assert f'LLMSTACK_REMOTE_URL="{router}"' in peer("reload")
    assert not (STATE / "models.ini").exists()
