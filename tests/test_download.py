"""download and check: the real huggingface_hub and the real llama.cpp against a local hub; llama-swap's releases."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

import llmstack
from tests.conftest import load_always
from tests.fake_hub import FakeHub, FakeReleases, tar_gz, zipped
from tests.noise_model import render_noise_gguf
from tests.test_stack import until

CHECK = llmstack.load_extra("check")
SWAP = llmstack.load_extra("install-llama-swap")
DOWNLOAD = llmstack.load_extra("download")
PROGRAM = llmstack.PROGRAM
SECRET = "hf_" + "aB3" * 12
BIG = b"GGUF" + random.Random(1).randbytes(4_000_000)
SMALL = b"GGUF" + random.Random(2).randbytes(50_000)
INI = """
[code-fast]
role = fast
hf_repo = owner/fast-GGUF
hf_file = fast-Q4.gguf
hf_file_next = fast-Q6.gguf

[code-smart]
role = agent
hf_repo = owner/smart-GGUF
hf_file = Q4/smart-00001-of-00003.gguf
size_gb = 1

[plan]
role = plan
backend = openai
base_url = https://api.example.com/v1
api_key_env = EXAMPLE_API_KEY
model = some-model
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    server.repos["owner/fast-GGUF"] = {"fast-Q4.gguf": BIG, "fast-Q6.gguf": SMALL, "README.md": b"x"}
    server.repos["owner/smart-GGUF"] = {f"Q4/smart-0000{n}-of-00003.gguf": SMALL + bytes([n]) for n in (1, 2, 3)}
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.stop()


@pytest.fixture
def places(home: Path) -> llmstack.Places:
    found = llmstack.find_places(os.environ)
    Path(found.state).mkdir()
    Path(found.models_ini).write_text(INI)
    return found


@pytest.fixture
def releases(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeReleases]:
    server = FakeReleases()
    monkeypatch.setenv("LLMSTACK_RELEASES_URL", server.url)
    yield server
    server.stop()


def read_to_end(master: int) -> bytes:
    """What a terminal still shows, which is closed then."""
    seen = b""
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:                         # Linux says EIO, others an end
            data = b""
        if not data:
            os.close(master)
            return seen
        seen += data


def cache() -> str:
    return llmstack.hub_cache_dir(os.environ)


def here(repo: str, file: str) -> bytes:
    path = llmstack.local_file(cache(), repo, file)
    return Path(path).read_bytes() if path else b""


def log(places: llmstack.Places, name: str) -> str:
    return llmstack.read_text(places.log(f"dl-{name}.log"))


def kill_worker(worker: llmstack.Record) -> None:
    """Kill a worker, and wait until its child, which sees its pipe end, has gone as well."""
    children = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()
                and f"PPid:\t{worker.pid}\n" in llmstack.read_text(f"/proc/{pid}/status")]
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: not any(map(llmstack.process_started, children)), "its child has gone")


def worker_gone(places: llmstack.Places) -> None:
    until(lambda: llmstack.download_worker(places) is None, "the worker is done")


# ---- where things are


@pytest.mark.parametrize(("env", "cache"), [
    ({}, "~/.cache/huggingface/hub"), ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"), ({"HF_HOME": "/h"}, "/h/hub"),
    ({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}, "/c"), ({"LLAMA_CACHE": "/l", "HF_HUB_CACHE": "/c"}, "/l"),
])
def test_the_cache_is_where_llama_server_looks(env: dict[str, str], cache: str) -> None:
    assert llmstack.hub_cache_dir(env) == os.path.expanduser(cache)


def test_all_parts_of_a_split_model() -> None:
    assert llmstack.split_parts("a/m-Q4-00002-of-00003.gguf") == tuple(f"a/m-Q4-0000{n}-of-00003.gguf" for n in (1, 2, 3))
    assert llmstack.split_parts("m-00001-of-99999.gguf") == ("m-00001-of-99999.gguf",), "nobody has that many"
    assert llmstack.split_parts("m.gguf") == ("m.gguf",)


def test_current_files_come_first_and_hosted_tiers_are_left_out() -> None:
    config, _ = llmstack.parse_models_ini(INI + "[mine]\npath = x.gguf\n")
    jobs, skipped = DOWNLOAD.plan_downloads(config, (), ("current", "next"), llmstack)
    assert [job.name for job in jobs] == ["code-fast-current", "code-smart-current", "code-fast-next"]
    assert len(jobs[1].files) == 3
    assert jobs[0].beside == ("fast-Q6.gguf",)
    assert skipped == ["plan is hosted, so there is nothing to fetch", "mine is on this disk already: x.gguf"]
    assert [job.name for job in DOWNLOAD.plan_downloads(config, ("fast",), ("next",), llmstack)[0]] == ["code-fast-next"]
    with pytest.raises(llmstack.UserError, match="did you mean code-fast"):
        DOWNLOAD.plan_downloads(config, ("code-fats",), ("current",), llmstack)


@pytest.mark.parametrize("file", ["../../x.gguf", "a/../../x", "/etc/passwd", "a\\..\\b", "..", "c:x", "a//b"])
def test_a_name_never_leads_out_of_the_cache(file: str) -> None:
    for key in ("hf_file", "hf_file_next"):
        with pytest.raises(llmstack.UserError, match="is not the name of a file in a repository"):
            llmstack.parse_models_ini(f"[t]\nhf_repo = o/r\nhf_file = x.gguf\n{key} = {file}\n")
    row = {"tier": "t", "label": "current", "repo": "o/r", "files": ["x.gguf"], "beside": []}
    assert llmstack.parse_job(row) is not None
    for bad in ({"files": [file]}, {"beside": [file]}, {"tier": "../t"}, {"label": "x/y"}, {"repo": "../.."}, {"files": "x"}):
        assert llmstack.parse_job({**row, **bad}) is None


# ---- downloads, with the real huggingface_hub


def test_everything_arrives_and_the_logs_say_so(hub: FakeHub, places: llmstack.Places, real_data: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["download", "--wait"]) == 0
    out = capsys.readouterr().out
    assert "plan is hosted" in out
    assert out.count(": done, ") == 3, "one line a file"
    worker_gone(places)
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG
    assert here("owner/fast-GGUF", "fast-Q6.gguf") == SMALL
    for part in (1, 2, 3):
        assert here("owner/smart-GGUF", f"Q4/smart-0000{part}-of-00003.gguf") == SMALL + bytes([part])
    for name in ("code-fast-current", "code-smart-current", "code-fast-next"):
        assert log(places, name).splitlines()[-1].endswith("(download done)")
    assert "SHA-256 verified" in log(places, "code-fast-current")
    assert not list(Path(cache()).rglob("*.incomplete"))
    before = len(hub.fetched())
    assert llmstack.main(["download-models", "--wait"]) == 0
    assert len(hub.fetched()) == before, "what is there is not fetched again"
    assert llmstack.main(["status", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out.split("\n{", 1)[1].join(["{", ""]))["downloads"]
    assert {row["state"] for row in rows} == {"done"}


def test_a_killed_download_goes_on_where_it_was(hub: FakeHub, places: llmstack.Places, real_data: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    hub.hold_after = 3_000_000
    assert llmstack.main(["download", "code-fast"]) == 0
    assert "in the background" in capsys.readouterr().out
    assert hub.held.wait(30)
    part = until(lambda: list(Path(cache()).rglob("*.incomplete")), "the part")[0]
    until(lambda: part.stat().st_size >= 2_000_000, "two megabytes on the disk")
    llmstack.main(["status"])
    assert "code-fast-current: running" in capsys.readouterr().out
    worker = llmstack.download_worker(places)
    assert worker is not None
    kill_worker(worker)
    worker_gone(places)
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == b""
    llmstack.main(["status"])
    assert "code-fast-current: interrupted, 2." in capsys.readouterr().out
    hub.gate.set()
    assert llmstack.main(["download", "code-fast", "--wait"]) == 0
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG
    ranges = [s.range for s in hub.fetched() if "fast-Q4" in s.path]
    assert ranges[0] == ""
    assert int(ranges[1][len("bytes="):-1]) >= 2_000_000
    assert "going on at 2," in log(places, "code-fast-current")


def test_what_is_queued_while_a_worker_runs_is_done_by_it(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    hub.hold_after = 1_000_000
    assert llmstack.main(["download", "code-fast"]) == 0
    assert hub.held.wait(30)
    first = llmstack.download_worker(places)
    assert llmstack.main(["download", "code-smart"]) == 0
    assert llmstack.download_worker(places) == first
    hub.gate.set()
    worker_gone(places)
    assert {row["state"] for row in llmstack.download_rows(places)} == {"done"}
    assert len(llmstack.download_rows(places)) == 3


def test_a_stopped_download_keeps_what_it_has(hub: FakeHub, places: llmstack.Places, real_data: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    hub.hold_after = 1_500_000
    llmstack.main(["download", "code-fast"])
    assert hub.held.wait(30)
    until(lambda: [p for p in Path(cache()).rglob("*.incomplete") if p.stat().st_size], "a part")
    assert llmstack.main(["download", "--stop"]) == 0
    assert llmstack.download_worker(places) is None
    assert llmstack.download_rows(places) == []
    assert list(Path(cache()).rglob("*.incomplete"))
    assert llmstack.main(["download", "--stop"]) == 0
    assert "Nothing is being downloaded" in capsys.readouterr().out


def test_a_cut_connection_is_taken_up_again(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    hub.cut = [2_500_000]
    assert llmstack.main(["download", "code-fast", "--wait"]) == 0
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG
    assert [s.range for s in hub.fetched() if "fast-Q4" in s.path][1].startswith("bytes=2")
    assert "trying again in 1 s" in log(places, "code-fast-current")


def test_damaged_bytes_are_thrown_away(hub: FakeHub, places: llmstack.Places, real_data: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    hub.damaged = True
    assert llmstack.main(["download", "code-fast", "--wait"]) == 1
    captured = capsys.readouterr()
    assert "arrived damaged" in captured.out
    assert "not downloaded: code-fast-current, code-fast-next" in captured.err
    worker_gone(places)
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == b""
    assert [p for p in Path(cache()).rglob("*") if p.is_file() and p.stat().st_size > 10_000] == []
    assert ": arrived damaged" not in log(places, "code-fast-current").splitlines()[-1]
    assert " failed: " in log(places, "code-fast-current").splitlines()[-1]


def test_a_damaged_part_of_an_earlier_try_is_begun_again(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    blobs = Path(llmstack.repo_dir(cache(), "owner/fast-GGUF")) / "blobs"
    blobs.mkdir(parents=True)
    import hashlib
    (blobs / (hashlib.sha256(BIG).hexdigest() + ".incomplete")).write_bytes(b"not the model" * 1000)
    assert llmstack.main(["download", "code-fast", "--wait"]) == 0
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG
    assert "beginning again" in log(places, "code-fast-current")


def test_one_file_without_a_queue_is_held_to_the_hash_on_the_redirect(hub: FakeHub, real_data: Path) -> None:
    """The hash stands on the hub's 302; where that leads says one of its own, of the bytes that it sends."""
    job = llmstack.Job("demo", "current", "owner/fast-GGUF", ("fast-Q4.gguf",))
    said: list[str] = []
    hub.damaged = True
    with pytest.raises(llmstack.UserError, match="arrived damaged"):
        DOWNLOAD.fetch_job(job, str(real_data), os.environ, said.append, lambda **_: None, llmstack)
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == b""
    hub.damaged = False
    assert DOWNLOAD.fetch_job(job, str(real_data), os.environ, said.append, lambda **_: None, llmstack) == len(BIG)
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG
    assert said[-1] == "fast-Q4.gguf: whole, SHA-256 verified"


def test_a_busy_hub_is_waited_for_as_it_asks(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    hub.refuse = [(429, {"Retry-After": "2"}), (503, {})]
    began = time.monotonic()
    assert llmstack.main(["download", "code-fast", "--wait"]) == 0
    assert time.monotonic() - began >= 2
    text = log(places, "code-fast-current")
    assert "the model hub asks to wait; trying again in 2 s" in text
    assert "the model hub answers 503; trying again in 5 s" in text


def test_a_lapsed_address_is_asked_for_again(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    hub.lapsed = 1
    assert llmstack.main(["download", "code-fast", "--wait"]) == 0
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG
    assert "has lapsed; trying again in 1 s" in log(places, "code-fast-current")


def test_a_bad_token_is_named(hub: FakeHub, places: llmstack.Places, real_data: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture[str]) -> None:
    hub.refuse = [(401, {"X_Error_Message": "Invalid credentials in Authorization header"})]
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert llmstack.main(["download", "code-fast", "--next", "--wait"]) == 1
    out = capsys.readouterr().out
    assert "does not take the token in HF_TOKEN" in out
    assert SECRET not in out


def test_every_refusal_says_what_to_do(hub: FakeHub, places: llmstack.Places, real_data: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    Path(places.models_ini).write_text("".join(
        f"[{name}]\nhf_repo = {repo}\nhf_file = {file}\n" for name, repo, file in (
            ("gated", "owner/gated-GGUF", "g.gguf"), ("missing", "owner/none-GGUF", "n.gguf"),
            ("misspelt", "owner/fast-GGUF", "fast-Q5.gguf"), ("good", "owner/fast-GGUF", "fast-Q6.gguf"))))
    hub.repos["owner/gated-GGUF"] = {"g.gguf": SMALL}
    hub.gated["owner/gated-GGUF"] = SECRET
    assert llmstack.main(["download", "--wait"]) == 1
    out = capsys.readouterr().out
    lines = {line.split(":")[0]: line for line in out.splitlines() if "-current:" in line}
    assert "is gated" in lines["gated-current"]
    assert f"{hub.url}/owner/gated-GGUF" in lines["gated-current"]
    assert "HF_TOKEN" in lines["gated-current"]
    assert "there is no owner/none-GGUF on the hub" in lines["missing-current"]
    assert "owner/fast-GGUF has no fast-Q5.gguf; it has fast-Q" in lines["misspelt-current"]
    assert "correct hf_file" in lines["misspelt-current"]
    assert "done" in lines["good-current"], "the others are fetched all the same"


def test_a_token_opens_a_gated_repository_and_stands_nowhere(hub: FakeHub, places: llmstack.Places, real_data: Path, home: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["owner/gated-GGUF"] = {"g.gguf": BIG}
    hub.gated["owner/gated-GGUF"] = SECRET
    hub.hold_after = 1_000_000
    Path(places.models_ini).write_text("[gated]\nhf_repo = owner/gated-GGUF\nhf_file = g.gguf\n")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("LLMSTACK_API_KEY", "not-for-the-worker")
    assert llmstack.main(["download"]) == 0
    assert hub.held.wait(30)
    worker = llmstack.download_worker(places)
    assert worker is not None
    if os.path.isdir("/proc/self"):
        assert SECRET.encode() not in Path(f"/proc/{worker.pid}/cmdline").read_bytes()
        assert b"not-for-the-worker" not in Path(f"/proc/{worker.pid}/environ").read_bytes()
    hub.gate.set()
    worker_gone(places)
    assert here("owner/gated-GGUF", "g.gguf") == BIG
    assert {s.authorization for s in hub.fetched()} == {""}, "a signed address elsewhere gets no token"
    for file in [*Path(places.state).rglob("*"), *home.rglob("*.log")]:
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()


def test_a_hub_that_is_not_there_is_one_line_a_file(places: llmstack.Places, real_data: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert llmstack.main(["download", "code-fast", "--wait"]) == 1
    captured = capsys.readouterr()
    assert "the model hub cannot be reached at http://127.0.0.1:9" in captured.out
    assert "Traceback" not in captured.out + captured.err + log(places, "code-fast-current")


def test_a_hub_that_is_not_there_is_said_once(places: llmstack.Places, real_data: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert llmstack.main(["download", "--wait"]) == 1
    out = capsys.readouterr().out
    worker_gone(places)
    assert out.count("the model hub cannot be reached") == 1
    assert "code-fast-current, code-smart-current, code-fast-next: failed: " in out
    assert log(places, "code-fast-next") == "", "it was not asked again for each"


def guest_of(worker: int) -> int:
    """The pid of the worker's guest, 0 when there is none."""
    done = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in done.stdout.splitlines()]
    return next((int(pid) for pid, parent, args in rows if int(parent) == worker and "hub_download" in args), 0)


@pytest.mark.skipif(not shutil.which("ps"), reason="no ps")
def test_a_guest_goes_with_its_worker(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    hub.hold_after = 2_000_000
    assert llmstack.main(["download", "code-fast"]) == 0
    assert hub.held.wait(30)
    worker = llmstack.download_worker(places)
    assert worker is not None
    guest = until(lambda: guest_of(worker.pid), "the guest")
    started = llmstack.process_started(guest)
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: llmstack.process_started(guest) != started, "the guest is gone")


@pytest.mark.skipif(not shutil.which("ps"), reason="no ps")
def test_a_guest_that_is_killed_fails_its_job_and_no_other(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    hub.hold_after = 2_000_000
    assert llmstack.main(["download", "code-fast"]) == 0
    assert hub.held.wait(30)
    worker = llmstack.download_worker(places)
    assert worker is not None
    os.kill(until(lambda: guest_of(worker.pid), "the guest"), signal.SIGKILL)
    worker_gone(places)
    rows = {row["label"]: row for row in llmstack.download_rows(places)}
    assert rows["current"]["state"] == "failed"
    assert "goes on from there" in rows["current"]["hint"]
    assert rows["next"]["state"] == "done"
    hub.gate.set()
    assert llmstack.main(["download", "code-fast", "--wait"]) == 0
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG


def test_what_was_fetched_but_not_verified_is_verified_by_the_next(hub: FakeHub, places: llmstack.Places,
                                                                   real_data: Path) -> None:
    """A kill while the hash of 50 GB is made: the library has put the file in place by then."""
    blob = place("owner/fast-GGUF", "fast-Q4.gguf", BIG[:-1] + bytes([BIG[-1] ^ 1]), hub)
    Path(f"{blob}.unverified").touch()
    assert llmstack.main(["download", "code-fast", "--wait"]) == 1
    assert not blob.exists()
    assert llmstack.main(["download", "code-fast", "--wait"]) == 0
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG
    assert not Path(f"{blob}.unverified").exists()


def test_refs_main_moves_only_when_all_is_there(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    """Meanwhile llama-server finds what it has found before."""
    assert llmstack.main(["download", "code-fast", "--wait"]) == 0
    hub.revision["owner/fast-GGUF"] = 1
    hub.repos["owner/fast-GGUF"]["fast-Q4.gguf"] = BIG + b"newer"
    hub.hold_after = 1_000_000
    assert llmstack.main(["download", "code-fast"]) == 0
    assert hub.held.wait(30)
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG
    hub.gate.set()
    worker_gone(places)
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG + b"newer"
    assert here("owner/fast-GGUF", "fast-Q6.gguf") == SMALL


def test_a_copy_without_its_guests_downloads_nothing_and_says_why(hub: FakeHub, places: llmstack.Places, real_data: Path,
                                                                  tmp_path: Path) -> None:
    copy = shutil.copy(PROGRAM, tmp_path)
    shutil.copytree(Path(PROGRAM).parent / "extras", tmp_path / "extras")
    done = subprocess.run([sys.executable, copy, "download"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "hub_download.py" in done.stderr.splitlines()[0]
    assert "share/" in done.stderr.splitlines()[1]
    assert llmstack.download_worker(places) is None


def test_the_zipapp_downloads_as_well(hub: FakeHub, places: llmstack.Places, real_data: Path, tmp_path: Path) -> None:
    import build_zipapp
    pyz = tmp_path / "llmstack.pyz"
    build_zipapp.write(str(pyz), build_zipapp.build())
    done = subprocess.run([sys.executable, str(pyz), "download", "code-fast", "--wait"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG
    worker_gone(places)


def test_a_full_disk_is_seen_before_anything_is_fetched(
        hub: FakeHub, places: llmstack.Places, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or \
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("a small file system needs root")
    try:
        monkeypatch.setenv("HF_HUB_CACHE", str(small))
        assert llmstack.main(["download", "code-fast", "--wait"]) == 1
        out = capsys.readouterr().out
        assert "fast-Q4.gguf needs 0.00 GB more" in out
        assert "free some room" in out
        assert not [s for s in hub.fetched() if "fast-Q4" in s.path]
        assert here("owner/fast-GGUF", "fast-Q6.gguf") == SMALL, "what fits is fetched"
        worker_gone(places)
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_a_cache_that_cannot_be_written_is_one_line(hub: FakeHub, places: llmstack.Places, real_data: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    assert llmstack.main(["download", "code-fast", "--wait"]) == 1
    captured = capsys.readouterr()
    assert "cannot write" in captured.out
    assert "Traceback" not in captured.out + captured.err + Path(places.log("download.log")).read_text()
    assert " failed: " in log(places, "code-fast-current").splitlines()[-1]


def test_a_new_commit_does_not_hide_what_was_there(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    """llama-server looks only below the commit of refs/main: both files must be there."""
    ini = Path(places.models_ini)
    assert llmstack.main(["download", "code-fast", "--wait"]) == 0
    worker_gone(places)
    hub.revision["owner/fast-GGUF"] = 1
    hub.repos["owner/fast-GGUF"]["fast-Q8.gguf"] = SMALL + b"8"
    ini.write_text(INI.replace("fast-Q6", "fast-Q8"))
    assert llmstack.main(["download", "code-fast", "--next", "--wait"]) == 0
    assert here("owner/fast-GGUF", "fast-Q8.gguf") == SMALL + b"8"
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG


def test_a_newer_file_on_the_hub_is_seen_and_fetched(hub: FakeHub, places: llmstack.Places, real_data: Path, server_here: None,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    Path(places.models_ini).write_text("[a]\nhf_repo = owner/fast-GGUF\nhf_file = fast-Q6.gguf\n")
    assert llmstack.main(["download", "--wait"]) == 0
    hub.repos["owner/fast-GGUF"]["fast-Q6.gguf"] = SMALL + b"corrected"
    hub.revision["owner/fast-GGUF"] = 1
    assert check(capsys)[1]["needs"] == [
        "a (current): the local copy is outdated: the hub has a newer one; `llmstack download` fetches it"]
    assert llmstack.main(["download", "--wait"]) == 0
    worker_gone(places)
    assert here("owner/fast-GGUF", "fast-Q6.gguf") == SMALL + b"corrected"
    assert check(capsys)[1]["needs"] == []


@pytest.mark.parametrize("row", [
    {"state": "running", "bytes": "x", "total": [], "before": {}, "part": 7, "error": 1, "hint": None},
    {"state": "running", "bytes": True, "total": "1e9"},
    {"state": "failed", "error": "\x1b[31mred\nsecond line", "hint": "\x07"},
    {"state": "queued", "part": "/etc/passwd", "files": ["\x9b31m.gguf"]},
])
def test_a_queue_that_a_clone_brought_is_no_more_than_words(row: dict[str, object], places: llmstack.Places,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    whole = {"tier": "code-fast", "label": "current", "repo": "owner/fast-GGUF", "files": ["fast-Q4.gguf"], "beside": [], **row}
    Path(llmstack.queue_file(places)).write_text(json.dumps({"code-fast-current": whole}))
    assert llmstack.main(["status"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^Download code-fast-current: (interrupted|failed)\b.*$", out, re.MULTILINE)
    assert all(c.isprintable() or c == "\n" for c in out)
    assert llmstack.download_rows(places)[0]["bytes"] == 0
    assert llmstack.main(["check", "--offline"]) == 1
    assert llmstack.main(["download", "--stop"]) == 0


def test_no_log_is_written_where_a_clones_link_leads(places: llmstack.Places, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "outside").mkdir()
    Path(places.state, "logs").symlink_to(tmp_path / "outside")
    assert llmstack.main(["download"]) == 1
    assert "has links that lead elsewhere" in capsys.readouterr().err
    assert not list((tmp_path / "outside").iterdir())


def test_a_log_that_cannot_be_written_is_said(hub: FakeHub, places: llmstack.Places, real_data: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    Path(places.state, "logs").write_text("a file where a directory belongs")
    assert llmstack.main(["download"]) == 1
    assert "error: cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["code-fast"], ["--wait"], ["--next"]])
def test_stop_is_for_the_whole_download(words: list[str], places: llmstack.Places, capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["download", "--stop", *words]) == 2
    assert "--stop ends the whole download" in capsys.readouterr().err


@pytest.mark.parametrize("token", ["hf_first\nsecond", "hf_t\u00f6ken", "hf_\u20ac"])
def test_a_token_that_is_none_is_not_repeated(token: str, hub: FakeHub, places: llmstack.Places, server_here: None,
                                              monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    for words in (["check"], ["fit"]):
        assert llmstack.main(words) == 1
        said = "".join(capfd.readouterr())
        assert "HF_TOKEN holds a character that no token has" in said
        assert "hf_" not in said.replace("hf_file", "").replace("hf_repo", "")


def test_two_projects_fetch_a_file_once(hub: FakeHub, places: llmstack.Places, real_data: Path, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    hub.hold_after = 1_000_000
    assert llmstack.main(["download", "code-fast"]) == 0
    assert hub.held.wait(30)
    monkeypatch.setenv("LLMSTACK_WORK_DIR", str(tmp_path / "other"))
    other = llmstack.find_places(os.environ)
    Path(other.state).mkdir(parents=True)
    Path(other.models_ini).write_text(INI)
    assert llmstack.main(["download", "code-fast"]) == 0
    until(lambda: "another program is fetching" in log(other, "code-fast-current"), "the second one waits")
    hub.gate.set()
    worker_gone(places)
    worker_gone(other)
    assert "is here already" in log(other, "code-fast-current")
    assert len([s for s in hub.fetched() if "fast-Q4" in s.path]) == 1
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG


def test_an_offline_library_says_so(hub: FakeHub, places: llmstack.Places, real_data: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert llmstack.main(["download", "code-fast", "--wait"]) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().out


def test_a_queue_that_came_with_a_clone_is_not_worked_off(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    hub.repos["evil/x"] = {"x.gguf": SMALL}
    row = {"tier": "code-fast", "label": "next", "repo": "evil/x", "files": ["x.gguf"], "beside": [], "state": "queued"}
    Path(llmstack.queue_file(places)).write_text(json.dumps({"code-fast-next": row, "broken": 1}))
    assert llmstack.main(["download", "code-smart", "--wait"]) == 0
    worker_gone(places)
    assert not [s for s in hub.seen if "evil" in s.path]


def test_interrupting_the_view_leaves_the_worker_running(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    hub.hold_after = 1_000_000
    process = subprocess.Popen([sys.executable, PROGRAM, "download", "code-fast", "--wait"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    assert hub.held.wait(30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "goes on in the background" in out
    assert "Traceback" not in err
    assert llmstack.download_worker(places) is not None
    hub.gate.set()
    worker_gone(places)
    assert here("owner/fast-GGUF", "fast-Q4.gguf") == BIG


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals")
def test_a_terminal_gets_a_bar_with_rate_and_time_left(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    import pty
    hub.hold_after = 2_000_000
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, PROGRAM, "download", "code-fast"], stdout=slave, stderr=slave,
                               stdin=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"})
    os.close(slave)
    seen = b""
    assert hub.held.wait(30)
    while b"code-fast-current [######" not in seen or b" MB/s, " not in seen:
        seen += os.read(master, 4096)
    hub.gate.set()
    seen += read_to_end(master)
    assert process.wait(timeout=20) == 0
    assert b"of 4.0 MB" in seen
    assert b"code-fast-next: done" in seen
    worker_gone(places)


@pytest.mark.parametrize(("columns", "bar"), [(120, 24), (80, 10), (70, 0)])
def test_the_bar_gives_way_and_the_words_stay(columns: int, bar: int) -> None:
    row = {"tier": "code-fast", "label": "current", "file": "x", "bytes": 12_300_000_000, "total_bytes": 45_000_000_000}
    shown = DOWNLOAD.Bar(llmstack)
    shown.note({**row, "bytes": 12_300_000_000 - 850_000_000}, 0.0)
    shown.note(row, 10.0)
    line = shown.line(row, 1, "", columns)
    assert len(line) <= columns
    assert line.endswith(" 27 % (+1) 12.3 of 45.0 GB, 85.0 MB/s, 6 min left")
    assert len(re.sub(r".*\[|\].*|^[^\[]*$", "", line)) == bar


def test_a_thin_client_downloads_nothing(places: llmstack.Places, capsys: pytest.CaptureFixture[str]) -> None:
    Path(places.state, "default-channel").write_text("external http://10.0.0.5:10101\n")
    for words in (["download"], ["install-llama-swap"], ["check"], ["setup"]):
        assert llmstack.main(words) == 1
        assert "http://10.0.0.5:10101" in capsys.readouterr().err


def test_progress_in_words() -> None:
    assert llmstack.progress_words(1_500_000_000, 45_000_000_000, 50e6) == "1.5 of 45.0 GB, 50.0 MB/s, 14 min left"
    assert llmstack.progress_words(1_000_000, 3_000_000, 1e6) == "1.0 of 3.0 MB, 1.0 MB/s, 2 s left"
    assert llmstack.progress_words(0, 45_000_000_000, 1e6).endswith("12.5 h left")
    assert llmstack.progress_words(5_000_000, 0, 1e6) == "5.0 MB"


# ---- the cache as the real llama-server reads it


def serve(argv: list[str], program: list[str], env: dict[str, str]) -> bytes:
    """What a llama-server answers on /v1/models."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([*program, "--host", "127.0.0.1", "--port", str(port), *argv], env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    try:
        upstream = llmstack.Upstream("127.0.0.1", port)

        def healthy() -> bool:
            assert process.poll() is None, process.stdout and process.stdout.read().decode("utf-8", "replace")[-3000:]
            try:
                return upstream.get("/health")[0].status == 200
            except (OSError, ValueError):
                return False

        until(healthy, "llama-server is up", 60)
        return upstream.get("/v1/models")[1]
    finally:
        process.kill()
        process.communicate()


def servers(real_data: Path) -> list[list[str]]:
    found = shutil.which("llama-server")
    python = llmstack.environment_program(llmstack.LLAMA_CPP, str(real_data))
    stand_in = llmstack.guest_command(python, "llama_server")
    return [stand_in, *([[found]] if found else [])]


def test_what_download_has_brought_starts_without_a_network(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    hub.repos["owner/fast-GGUF"]["fast-Q4.gguf"] = render_noise_gguf()
    assert llmstack.main(["download", "code-fast", "--wait"]) == 0
    worker_gone(places)
    argv = ["-hf", "owner/fast-GGUF", "-hff", "fast-Q4.gguf", "-c", "512", "--alias", "code-fast"]
    for program in servers(real_data):
        for env, more in (({"HF_ENDPOINT": "http://127.0.0.1:9"}, []), ({}, ["--offline"])):
            asked = len(hub.seen)
            assert b'"code-fast"' in serve([*argv, *more], program, {**os.environ, **env})
            assert len(hub.seen) == asked
        fetched = len(hub.fetched())
        assert serve(argv, program, dict(os.environ)), "online, it takes our copy, too"
        assert len(hub.fetched()) == fetched


def test_what_llama_server_has_brought_is_not_fetched_again(hub: FakeHub, places: llmstack.Places, real_data: Path) -> None:
    hub.repos["owner/fast-GGUF"]["fast-Q4.gguf"] = render_noise_gguf()
    for program in servers(real_data):
        shutil.rmtree(cache(), ignore_errors=True)
        serve(["-hf", "owner/fast-GGUF", "-hff", "fast-Q4.gguf", "-c", "512"], program, dict(os.environ))
        assert here("owner/fast-GGUF", "fast-Q4.gguf") == hub.repos["owner/fast-GGUF"]["fast-Q4.gguf"]
        hub.seen.clear()
        assert llmstack.main(["download", "code-fast", "--wait"]) == 0
        worker_gone(places)
        assert not [s for s in hub.fetched() if "fast-Q4" in s.path]


def watch_download(program: list[str], config: llmstack.Config, hub: FakeHub, directory: Path) -> None:
    """Load code-fast, whose file llama-server fetches and the hub holds back in its middle."""
    shutil.rmtree(cache(), ignore_errors=True)
    hub.gate.clear()
    refused = llmstack.probe_flags(program, config, str(directory))
    engine = llmstack.Engine(config, lambda tier, port: llmstack.server_command(program, tier, config, port, refused),
                             llmstack.Log(str(directory / "log")), lambda name: str(directory / name),
                             llmstack.EnginePlan(os.environ, 8.0))
    ticket = engine.lease("code-fast")
    try:
        until(lambda: ticket.ready() or re.fullmatch(r"downloading code-fast [1-5][0-9]? %", ticket.stage()),
              "the percent", 60)
        row = engine.watched()["models"]["code-fast"]
        assert 0 < row["share"] < 0.6
        assert row["reason"] == "its file is downloaded first"
        hub.gate.set()
        until(ticket.ready, "the model", 60)
    finally:
        hub.gate.set()
        ticket.end()
        engine.close()


def test_who_waits_for_a_download_is_told_how_far_it_is(hub: FakeHub, real_data: Path, home: Path) -> None:
    data = render_noise_gguf()
    hub.repos["owner/fast-GGUF"]["fast-Q4.gguf"] = data
    hub.hold_after = len(data) // 2
    sized = f"hf_file = fast-Q4.gguf\nctx_size = 512\nsize_gb = {len(data) / 1e9:.6f}\n"
    config = llmstack.parse_models_ini(INI.replace("hf_file = fast-Q4.gguf\n", sized))[0]
    for program in servers(real_data):
        watch_download(program, config, hub, home)


def test_the_share_of_a_download_needs_its_size(places: llmstack.Places) -> None:
    blobs = Path(llmstack.repo_dir(cache(), "owner/a-GGUF"), "blobs")
    blobs.mkdir(parents=True)
    (blobs / "ab.downloadInProgress").write_bytes(bytes(250_000))
    (blobs / "cd.incomplete").write_bytes(bytes(250_000))               # huggingface_hub's, not what is waited for
    tier = llmstack.Tier("a", hf_repo="owner/a-GGUF", hf_file="a.gguf", size_gb=0.001)
    for size_gb, share in ((0.001, 0.25), (0.0, 0.0)):
        weights = llmstack.weights_for(tier._replace(size_gb=size_gb))
        assert llmstack.downloaded_share(weights, os.environ) == share


# ---- check


def check(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = llmstack.main(["check", "--json", *words])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def server_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("LLAMA_SERVER_BIN", str(program))


def place(repo: str, file: str, data: bytes, hub: FakeHub) -> Path:
    """A file of the hub in the cache, as huggingface_hub lays it."""
    import hashlib
    folder = Path(llmstack.repo_dir(cache(), repo))
    blob = folder / "blobs" / hashlib.sha256(hub.repos[repo].get(file, data)).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    link = folder / "snapshots" / hub.commit(repo) / file
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(hub.commit(repo))
    return blob


def test_check_says_what_each_tier_lacks(hub: FakeHub, places: llmstack.Places, server_here: None,
                                         capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = check(capsys)
    tiers = {row["tier"]: row for row in found["tiers"]}
    assert code == 1
    assert tiers["code-fast"]["current"] == {
        "repo": "owner/fast-GGUF", "url": f"{hub.url}/owner/fast-GGUF", "file": "fast-Q4.gguf", "quant": "", "exists": True,
        "size_bytes": len(BIG), "changed": "2026-05-04",
        "local": "missing", "problem": ""}
    assert tiers["code-fast"]["next"]["file"] == "fast-Q6.gguf"
    assert tiers["code-smart"]["current"]["size_bytes"] == 3 * (len(SMALL) + 1)
    assert tiers["plan"]["model"] == "some-model"
    assert found["needs"] == [
        "code-fast (current): not here yet; `llmstack download code-fast` fetches it",
        "code-smart (current): not here yet; `llmstack download code-smart` fetches it", "plan: EXAMPLE_API_KEY is not set"]
    monkeypatch.setenv("EXAMPLE_API_KEY", "value-of-the-key")
    place("owner/fast-GGUF", "fast-Q4.gguf", BIG, hub)
    for part in (1, 2, 3):
        place("owner/smart-GGUF", f"Q4/smart-0000{part}-of-00003.gguf", SMALL + bytes([part]), hub)
    code, found = check(capsys)
    assert (code, found["needs"]) == (0, [])
    assert found["tiers"][0]["current"]["local"] == "intact"
    assert "value-of-the-key" not in json.dumps(found)
    assert llmstack.main(["check-models"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^code-fast +fast +fast-Q4\.gguf +4\.0 MB +intact$", out, re.MULTILINE)
    assert re.search(r"^plan .*some-model +served$", out, re.MULTILINE)
    assert llmstack.main(["check", "code-fast"]) == 0
    assert f"\ncurrent   {hub.url}/owner/fast-GGUF fast-Q4.gguf, changed 2026-05-04\n" in capsys.readouterr().out


def test_check_knows_what_a_litellm_tier_lacks(places: llmstack.Places, server_here: None, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    Path(places.models_ini).write_text("[ultra]\nrole = ultra\nmodel = anthropic/some-model\n")
    assert check(capsys, "--offline")[1]["needs"] == [f"ultra: {llmstack.INSTALL_LITELLM}"]
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: (sys.executable, "litellm_proxy.py"))
    assert check(capsys, "--offline")[1]["needs"] == ["ultra: missing ANTHROPIC_API_KEY"]
    monkeypatch.setenv("ANTHROPIC_API_KEY", "value-of-the-key")
    Path(places.in_state("litellm_config.yaml")).write_text(
        "model_list:\n  - model_name: ultra\n    litellm_params:\n      model: anthropic/another\n")
    needs = check(capsys, "--offline")[1]["needs"]
    assert needs == ["ultra: DRIFT! models.ini says anthropic/some-model, litellm_config.yaml anthropic/another, which is what"
                     " is asked"]


def test_check_finds_what_is_damaged_outdated_or_gone(hub: FakeHub, places: llmstack.Places, server_here: None,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    Path(places.models_ini).write_text("[a]\nhf_repo = owner/fast-GGUF\nhf_file = fast-Q4.gguf\n"
                                       "[b]\nhf_repo = owner/fast-GGUF\nhf_file = fast-Q5.gguf\n"
                                       "[c]\nhf_repo = owner/none\nhf_file = x.gguf\n[d]\npath = none.gguf\n")
    blob = place("owner/fast-GGUF", "fast-Q4.gguf", BIG[:-1] + b"x", hub)
    code, found = check(capsys)
    tiers = {row["tier"]: row["current"] for row in found["tiers"]}
    assert code == 1
    assert tiers["a"]["local"] == "damaged"
    assert "has no fast-Q5.gguf; it has fast-Q" in tiers["b"]["problem"]
    assert "there is no owner/none" in tiers["c"]["problem"]
    assert "none.gguf" in tiers["d"]["problem"]
    assert len(found["needs"]) == 4
    blob.write_bytes(BIG[:-5])
    assert check(capsys)[1]["tiers"][0]["current"]["problem"].startswith("the local copy is damaged: it has 3,999,999 bytes")
    blob.write_bytes(BIG)
    assert check(capsys, "--offline")[1]["tiers"][0]["current"]["local"] == "intact"
    hub.repos["owner/fast-GGUF"]["fast-Q4.gguf"] = BIG + b"newer"
    assert check(capsys)[1]["tiers"][0]["current"]["local"] == "outdated"


def test_check_without_a_network_knows_what_is_here(places: llmstack.Places, server_here: None, hub: FakeHub,
                                                    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path(places.models_ini).write_text("[a]\nhf_repo = owner/fast-GGUF\nhf_file = fast-Q4.gguf\n")
    place("owner/fast-GGUF", "fast-Q4.gguf", BIG, hub)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, found = check(capsys)
    assert code == 0, "the hub's absence is nothing to mend here"
    assert "cannot be reached" in found["notes"][0]
    assert found["tiers"][0]["current"]["exists"] is None
    code, found = check(capsys, "--offline")
    assert (code, found["notes"]) == (0, [])


NONSENSE = [b"[", b"[" * 100_000, b"null", b"1", b"[1]", b"{}", b'[{"path": 1}]', b'{"assets": [{"name": "x"}]}',
            b'[{"path": "fast-Q4.gguf", "size": "x"}]', b'[{"path": "fast-Q4.gguf", "lastCommit": 7}]',
            b'[{"path": "fast-Q4.gguf", "lfs": [1]}]', b"\xff", b"<html>"]


@pytest.mark.parametrize("answer", NONSENSE, ids=lambda answer: repr(answer[:40]))
def test_no_answer_of_a_hub_or_a_mirror_is_a_traceback(answer: bytes, hub: FakeHub, releases: FakeReleases,
                                                       places: llmstack.Places, server_here: None,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    Path(places.models_ini).write_text("[a]\nhf_repo = owner/fast-GGUF\nhf_file = fast-Q4.gguf\n")
    hub.nonsense = releases.nonsense = answer
    assert llmstack.main(["check", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["tiers"][0]["current"]["local"] == "missing"
    assert isinstance(DOWNLOAD.nearest_files("owner/fast-GGUF", "x.gguf", os.environ, llmstack), str)
    assert llmstack.main(["install-llama-swap"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_nothing_that_a_mirror_names_reaches_the_terminal_raw(releases: FakeReleases, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    this_platform(monkeypatch)
    tag = "v251\x1b[2J\x9b31m"
    releases.nonsense = json.dumps({"tag_name": tag, "assets": [
        {"name": f"llama-swap_2{evil}51_linux_amd64.tar.gz", "browser_download_url": releases.url, "digest": "\x1b[2J"}
        for evil in ("", "\x1b[2J")]}).encode()
    assert llmstack.main(["install-llama-swap"]) == 1
    captured = capsys.readouterr()
    assert "gives no SHA-256" in captured.err
    assert not set("\x1b\x9b") & set(captured.out + captured.err)


def test_drift_between_models_ini_and_the_generated_file(places: llmstack.Places, server_here: None,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = llmstack.parse_models_ini(INI)
    plan = llmstack.SwapPlan(config, llmstack.Binary(("x",)), llmstack.posix_quote)
    for channel in ("current", "next"):
        running = plan._replace(config=config.on_channel(channel))
        text = llmstack.render_llama_swap_yaml(running)
        Path(places.in_state("llama-swap.yaml")).write_text(text)
        assert CHECK.find_drift(places, config, llmstack) == {}
    text = llmstack.render_llama_swap_yaml(plan)
    Path(places.in_state("llama-swap.yaml")).write_text(text.replace("      -hff fast-Q4.gguf", "      -hff fast-Q6.gguf"))
    assert CHECK.find_drift(places, config, llmstack) == {
        "code-fast": ["llama-swap.yaml has fast-Q6.gguf, models.ini fast-Q4.gguf"]}
    assert llmstack.main(["check", "--offline"]) == 1
    assert "DRIFT! llama-swap.yaml has fast-Q6.gguf" in capsys.readouterr().out
    Path(places.models_ini).write_text(INI.replace("= fast-Q4", "= fast-Q6"))
    config = llmstack.load_config(places)
    assert CHECK.find_drift(places, config, llmstack) == {}, "as UPGRADING says: flipped in both, no drift"
    Path(places.in_state("llama-swap.yaml")).write_text(text.replace("      -hff fast-Q4.gguf", "      -hff \x1b[2J"))
    assert CHECK.find_drift(places, config, llmstack)["code-fast"][0].startswith("llama-swap.yaml has \\u001b[2J, ")


def test_drift_between_models_ini_and_what_runs(places: llmstack.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = llmstack.parse_models_ini(INI)
    record = llmstack.Record(os.getpid(), llmstack.process_started(os.getpid()), "x", "127.0.0.1", 1, "embedded", "current")
    monkeypatch.setattr(llmstack, "read_stack", lambda places: record)
    monkeypatch.setattr(llmstack, "owned_process", lambda record, project: True)
    command = "llama-server -hf owner/fast-GGUF -hff fast-Q2.gguf -c 1"
    view = ({"code-fast": command}, {"code-fast": {"ctx_size": 77, "quant": ""}})
    monkeypatch.setattr(CHECK, "engine_view", lambda engine, llmstack: view)
    assert CHECK.find_drift(places, config, llmstack) == {
        "code-fast": ["fast-Q2.gguf is running, models.ini has fast-Q4.gguf",
                      "the running engine has ctx_size 77, models.ini 32768"],
        "code-smart": ["the running engine does not know this tier"]}


# ---- llama-swap's releases


def swap(version: str) -> bytes:
    return f"#!/bin/sh\necho 'version: {version} (abcdef), built at 2026-01-01'\n".encode()


def this_platform(monkeypatch: pytest.MonkeyPatch, system: str = "linux", machine: str = "amd64") -> None:
    monkeypatch.setattr(SWAP, "platform_names", lambda llmstack: (system, machine))
    load_always(monkeypatch, "install-llama-swap", SWAP)


def binary() -> Path:
    return Path(llmstack.data_dir(os.environ)) / "bin" / "llama-swap"


def test_the_right_binary_is_installed_once(releases: FakeReleases, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    this_platform(monkeypatch)
    releases.add("v251", {"llama-swap_251_linux_amd64.tar.gz": tar_gz({"LICENSE": b"x", "llama-swap": swap("v251")}),
                          "llama-swap_251_darwin_arm64.tar.gz": tar_gz({"llama-swap": b"other"})})
    releases.add("v250", {"llama-swap_250_linux_amd64.tar.gz": tar_gz({"llama-swap": swap("v250")})})
    assert llmstack.main(["install-llama-swap"]) == 0
    assert binary().read_bytes() == swap("v251")
    assert os.access(binary(), os.X_OK)
    assert "checksum verified" in capsys.readouterr().out
    assert llmstack.find_llama_swap(os.environ, llmstack.data_dir(os.environ)) == str(binary())
    files = len([s for s in releases.seen if s.path.startswith("/files")])
    assert llmstack.main(["install-llama-swap"]) == 0
    assert "here already" in capsys.readouterr().out
    assert len([s for s in releases.seen if s.path.startswith("/files")]) == files
    assert llmstack.main(["install-llama-swap", "--version", "250"]) == 0
    assert binary().read_bytes() == swap("v250")
    asked = len(releases.seen)
    monkeypatch.setenv("LLAMA_SWAP_VERSION", "v250")
    assert llmstack.main(["install-llama-swap"]) == 0
    assert len(releases.seen) == asked, "a named version that is there: nobody is asked"
    assert llmstack.main(["install-llama-swap", "--force"]) == 0
    assert len(releases.seen) > asked
    assert list(binary().parent.iterdir()) == [binary()]


def test_an_own_directory_for_the_binary(releases: FakeReleases, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    this_platform(monkeypatch)
    monkeypatch.setenv("LLMSTACK_BIN_DIR", str(tmp_path / "bin"))
    releases.add("v251", {"llama-swap_251_linux_amd64.tar.gz": tar_gz({"./llama-swap": swap("v251")})})
    releases.digests = True
    del releases.assets["v251"]["llama-swap_251_checksums.txt"]
    assert llmstack.main(["install-llama-swap"]) == 0, "the release's own digest will do"
    assert (tmp_path / "bin" / "llama-swap").read_bytes() == swap("v251")


@pytest.mark.parametrize(("archive", "sums", "said"), [
    (tar_gz({"llama-swap": swap("v251")}), {"llama-swap_251_linux_amd64.tar.gz": "0" * 64}, "its SHA-256 is not that of"),
    (tar_gz({"llama-swap": swap("v251")}), {"llama-swap_251_linux_amd64.tar.gz": "none"}, "gives no SHA-256"),
    (tar_gz({"../llama-swap": swap("v251"), "/tmp/llama-swap": b"x"}), None, "holds no plain file llama-swap"),
    (tar_gz({}, {"llama-swap": "/bin/sh"}), None, "holds no plain file llama-swap"),
    (tar_gz({"llama-swap": swap("v249")}), None, "does not run here, or is not v251"),
    (tar_gz({"llama-swap": b"\x7fELF broken"}), None, "does not run here"),
    (b"no archive", None, "cannot be unpacked"),
    (tar_gz({"llama-swap": random.Random(3).randbytes(50_000)})[:9_000], None, "cannot be unpacked"),
], ids=["sum", "no sum", "traversal", "link", "version", "broken", "no archive", "cut"])
def test_nothing_bad_takes_the_old_ones_place(archive: bytes, sums: dict[str, str] | None, said: str, releases: FakeReleases,
                                              monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    this_platform(monkeypatch)
    binary().parent.mkdir(parents=True)
    binary().write_bytes(swap("v200"))
    binary().chmod(0o755)
    releases.add("v251", {"llama-swap_251_linux_amd64.tar.gz": archive}, sums)
    assert llmstack.main(["install-llama-swap"]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 2
    assert binary().read_bytes() == swap("v200")
    assert list(binary().parent.iterdir()) == [binary()]


def test_what_the_releases_server_refuses_is_one_line(releases: FakeReleases, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    this_platform(monkeypatch, "plan9", "mips")
    releases.add("v251", {"llama-swap_251_linux_amd64.tar.gz": b"", "llama-swap_251_windows_amd64.zip": b""})
    assert llmstack.main(["install-llama-swap"]) == 1
    assert "no binary for plan9/mips, only for linux/amd64, windows/amd64" in capsys.readouterr().err
    assert llmstack.main(["install-llama-swap", "--version", "v9"]) == 1
    assert "there is no release v9" in capsys.readouterr().err
    assert llmstack.main(["install-llama-swap", "--version", "../x"]) == 2
    releases.limited = str(int(time.time()) + 1800)
    assert llmstack.main(["install-llama-swap"]) == 1
    assert "wait until " + time.strftime("%H:", time.localtime(int(releases.limited))) in capsys.readouterr().err
    monkeypatch.setenv("LLMSTACK_RELEASES_URL", "http://127.0.0.1:9")
    assert llmstack.main(["install-llama-swap"]) == 1
    err = capsys.readouterr().err
    assert "cannot be reached at 127.0.0.1:9" in err
    assert "HTTPS_PROXY" in err


def test_a_full_disk_leaves_no_half_binary(releases: FakeReleases, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    this_platform(monkeypatch)
    releases.add("v251", {"llama-swap_251_linux_amd64.tar.gz": tar_gz({"llama-swap": swap("v251")})})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(llmstack.os, "fsync", full)
    assert llmstack.main(["install-llama-swap"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert list(binary().parent.iterdir()) == []


def test_a_proxy_is_used(releases: FakeReleases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSTACK_RELEASES_URL", "http://releases.invalid")
    monkeypatch.setenv("http_proxy", releases.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    done = subprocess.run([sys.executable, PROGRAM, "install-llama-swap"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert [s.path for s in releases.seen] == ["http://releases.invalid/repos/mostlygeek/llama-swap/releases/latest"]


# ---- Windows and macOS, by substitution


@pytest.mark.parametrize(("sysname", "windows", "mac", "machine", "asset"), [
    ("Windows", True, False, "AMD64", "llama-swap_251_windows_amd64.zip"),
    ("Darwin", False, True, "arm64", "llama-swap_251_darwin_arm64.tar.gz"),
    ("Darwin", False, True, "x86_64", "llama-swap_251_darwin_amd64.tar.gz"),
    ("Linux", False, False, "aarch64", "llama-swap_251_linux_arm64.tar.gz"),
    ("Linux", False, False, "x86_64", "llama-swap_251_linux_amd64.tar.gz"),
    ("FreeBSD", False, False, "amd64", "llama-swap_251_freebsd_amd64.tar.gz"),
    ("Windows", True, False, "ARM64", ""), ("Linux", False, False, "riscv64", ""),
])
def test_the_asset_of_every_platform(sysname: str, windows: bool, mac: bool, machine: str, asset: str,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    import platform
    monkeypatch.setattr(llmstack, "IS_WINDOWS", windows)
    monkeypatch.setattr(llmstack, "IS_MAC", mac)
    monkeypatch.setattr(platform, "system", lambda: sysname)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    names = ["llama-swap_251_checksums.txt", *(f"llama-swap_251_{s}_{m}.tar.gz" for s in ("linux", "darwin") for m in
             ("amd64", "arm64")), "llama-swap_251_freebsd_amd64.tar.gz", "llama-swap_251_windows_amd64.zip"]
    assert SWAP.choose_asset(names, *SWAP.platform_names(llmstack)) == asset


def test_windows_gets_an_exe_out_of_a_zip_even_while_it_runs(releases: FakeReleases, monkeypatch: pytest.MonkeyPatch,
                                                             tmp_path: Path) -> None:
    monkeypatch.setattr(llmstack, "IS_WINDOWS", True)
    monkeypatch.setattr(llmstack, "EXE", ".exe")
    this_platform(monkeypatch, "windows")
    directory = Path(os.environ["LOCALAPPDATA"]) / "llmstack" / "bin"
    directory.mkdir(parents=True)
    (directory / "llama-swap.exe").write_bytes(swap("v200"))
    (directory / "llama-swap.exe").chmod(0o755)
    releases.add("v251", {"llama-swap_251_windows_amd64.zip": zipped({"README.md": b"", "llama-swap.exe": swap("v251")})})
    replace, refused = os.replace, []

    def locked(source: str, target: str) -> None:
        if target.endswith("llama-swap.exe") and not refused:
            refused.append(target)
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(llmstack.os, "replace", locked)
    assert llmstack.main(["install-llama-swap"]) == 0
    assert (directory / "llama-swap.exe").read_bytes() == swap("v251")
    assert (directory / "llama-swap.exe.old").read_bytes() == swap("v200")


def test_windows_paths_and_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "IS_WINDOWS", True)
    monkeypatch.setattr(llmstack, "EXE", ".exe")
    assert llmstack.bin_dir({}, llmstack.data_dir({"LOCALAPPDATA": "/local"})) == "/local/llmstack/bin"
    assert llmstack.environment_program(llmstack.HUB, "/d").endswith("/Scripts/python.exe")
    ran: list[list[str]] = []
    monkeypatch.setattr(llmstack, "program_output", lambda command: ran.append(list(command)) or "")
    llmstack._signal_group(77, True)
    assert ran == [["taskkill", "/PID", "77", "/T", "/F"]]
    assert llmstack.load_extra("setup").server_ways(llmstack) == "winget install ggml.llamacpp"


def test_homebrew_is_found_without_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(llmstack.os, "access", lambda path, mode: path == "/opt/homebrew/bin/llama-server")
    assert llmstack.find_program("llama-server") == "/opt/homebrew/bin/llama-server"


def test_no_module_of_one_system_alone_is_needed_to_load_the_program() -> None:
    only = ["fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog", "msvcrt", "winreg", "_winapi"]
    calls = ["sched_getaffinity", "sched_setaffinity", "killpg", "geteuid", "getpgid"]
    code = (f"import os, sys\nfor n in {only}: sys.modules[n] = None\nfor n in {calls}: os.__dict__.pop(n, None)\n"
            f"sys.path.insert(0, {str(Path(PROGRAM).parent)!r})\n"
            "import llmstack\nllmstack.command_parser('start')\nprint(llmstack.main(['version']))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["0"], done.stderr
