"""How far a load and a prompt's reading are: as the system and llama-server's log tell it, else nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmstack
from tests.test_engine import OpenStage, Stage, open_stage, stage, talkative, wait_for

__all__ = ["OpenStage", "open_stage", "stage", "talkative"]         # fixtures
WHOLE = ["llama-server", "--no-mmap"]
LINUX = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no /proc/PID/io")
BEGINS = "0.00.000.308 I srv          init: initializing ...\n"
READS = ("1.10.504.458 I slot print_timing: id  0 | task {} | prompt processing, n_tokens =   2048,"
         " progress = {}, t =  66.44 s / 30.82 tokens per second\n")
READ = ("0.07.072.325 I slot print_timing: id  3 | task {} | prompt eval time =     649.19 ms /"
        "     5 tokens (  129.84 ms per token,     7.70 tokens per second)\n")
ENDS = "0.07.072.352 I slot      release: id  3 | task {} | stop processing: n_tokens = 12, truncated = 0\n"


@pytest.mark.parametrize(("log", "share"), [
    ("", 0.0),
    (BEGINS, 0.0),
    (READS.format(0, "0.34"), 0.34),
    (READS.format(0, "0.34") + READS.format(0, "0.68"), 0.68),
    ("slot update_slots: id  0 | task 7 | prompt processing progress, n_tokens = 2048, batch.n_tokens = 2048,"
     " progress = 0.340000\n", 0.34),                                   # older builds
    (READS.format(0, "0.68") + READ.format(0), 0.0),                    # it writes
    (READS.format(0, "0.68") + ENDS.format(0), 0.0),                    # its client has left
    (READS.format(0, "0.68") + ENDS.format(0) + READS.format(4, "0.12"), 0.12),
    (READS.format(0, "0.68") + READS.format(4, "0.12"), 0.0),           # which of them is not known
    (READS.format(0, "0.68") + BEGINS, 0.0),                            # of a server that has died
    ("task 1 | prompt processing, progress = nonsense\n", 0.0),
])
def test_what_a_log_says_of_a_prompt(log: str, share: float) -> None:
    assert llmstack.prompt_read(log) == share


@pytest.mark.parametrize(("share", "words"), [(0.0, ""), (0.62, " 62 %"), (1e12, " 100 %")])
def test_a_share_in_words(share: float, words: str) -> None:
    assert llmstack.percent_words(share) == words


@LINUX
def test_a_load_is_as_far_as_its_process_has_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(64 << 20))
    code = (f"file = open({str(path)!r}, 'rb'); file.read(32 << 20); print(flush=True); input()\n"
            "file.read(); print(flush=True); input()")
    reader = subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert reader.stdin is not None
    assert reader.stdout is not None
    try:
        reader.stdout.readline()
        assert 0.5 <= llmstack.read_share(reader.pid, WHOLE, [str(path)]) < 0.6
        assert llmstack.read_share(reader.pid, ["llama-server"], [str(path)]) == 0.0, "a mapped file is not read"
        load_mode = ["llama-server", "--load-mode", "none"]
        assert llmstack.read_share(reader.pid, load_mode, [str(path)]) >= 0.5
        assert llmstack.read_share(reader.pid, WHOLE, [""]) == 0.0
        reader.stdin.write(b"\n")
        reader.stdin.flush()
        reader.stdout.readline()
        assert llmstack.read_share(reader.pid, WHOLE, [str(path)]) == 0.0, "what is left to do is not known"
    finally:
        reader.kill()
        reader.communicate()
    assert llmstack.read_share(reader.pid, WHOLE, [str(path)]) == 0.0


@pytest.mark.usefixtures("talkative")
def test_who_waits_for_a_load_is_told_how_far_it_is(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "read_share", lambda pid, command, paths: 0.62)
    stage.put("code-smart.slow")
    stream = stage.call().chat("code-smart", stream=True)
    assert stream.status() == 200
    wait_for(lambda: re.fullmatch(r": loading code-smart 62 %, \d+ s", stream.event()), "the percent")
    assert stage.engine.watched()["models"]["code-smart"]["share"] == 0.62
    stage.put("code-smart.loaded")
    assert stream.content() == "code-smart says hello."
    assert "share" not in stage.engine.watched()["models"]["code-smart"]


def test_only_a_request_that_is_alone_is_said_to_be_read(stage: Stage) -> None:
    held = stage.hold("code-smart", "one")
    model = stage.engine.models["code-smart"]
    with (stage.directory / "code-smart.log").open("a") as log:
        log.write(READS.format(0, "0.34"))
    assert stage.engine.prompt_read(model) == 0.34
    other = stage.hold("code-smart", "two")
    assert stage.engine.prompt_read(model) == 0.0
    for name in ("one", "two"):
        stage.put(f"{name}.go")
    for call in (held, other):
        call.events()


def test_the_row_of_a_request_says_how_much_of_its_prompt_is_read() -> None:
    """A stream whose client was told of a load said `writing` from then on."""
    class Reading(llmstack.Lease):
        def prompt_read(self) -> float:
            return 0.34

    asked: Any = llmstack.Asked.__new__(llmstack.Asked)
    asked.model, asked.path, asked.stream, asked.began_s = "auto", "/v1/chat/completions", True, 0.0
    asked.body = b"{}"
    assert asked.row(1)["stage"] == "reading the prompt"
    asked.lease = Reading()
    assert asked.row(1)["stage"] == "reading the prompt 34 %"
    asked.body = b""
    assert asked.row(1)["stage"] == "writing"


def test_status_shows_both() -> None:
    now = {"requests": [{"tier": "a", "stage": "reading the prompt 34 %", "began": 1}]}
    row = {"name": "a", "state": "loading", "share": 0.62, "since": 10.0}
    line = llmstack.tier_line(row, now, 20.0)
    assert (line.state, line.note) == ("loading 62 %", "reading the prompt 34 %")
    two = {"requests": [*now["requests"], {"tier": "a", "stage": "writing", "began": 1}]}
    assert llmstack.tier_line(row, two, 20.0).note == "2 answering"
