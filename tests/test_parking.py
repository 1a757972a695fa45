"""Conversations that survive a swap: the rules against a scripted server, then a real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pytest

import llmstack
from tests.noise_model import render_noise_gguf
from tests.test_engine import FIRST_PORT, Stage, wait_for
from tests.test_stack import Project, ask, engines, only_llama_swap

IDENTITY = "a" * 24
CONFIG = llmstack.Config(park_gb=1.0)


def messages(count: int, last: str = "more") -> List[Dict[str, str]]:
    return [{"role": "user", "content": f"message {i}"} for i in range(count - 1)] + [
        {"role": "user", "content": last}]


def asked(count: int, last: str = "more") -> bytes:
    return json.dumps({"model": "m", "messages": messages(count, last)}).encode()


class Slots:
    """llama-server's /slots as a script, in place of an Upstream."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.held: Dict[int, Any] = dict.fromkeys(range(4))
        self.host_cache: Dict[bytes, int] = {}  # last message -> tokens
        self.asked: List[str] = []
        self.refuses: Dict[str, Any] = {}       # action -> status, or an OSError
        self.busy: Tuple[int, ...] = ()
        self.written: Optional[int] = None      # of what a save says, where the disk took less

    def get(self, path: str, timeout_s: float = 5.0, method: str = "GET", headers: bytes = b"",
            limit_bytes: int = 0, body: bytes = b"") -> Tuple[llmstack.Response, bytes]:
        self.asked.append(path)
        if path == "/slots":
            rows = [{"id": i, "is_processing": i in self.busy,
                     **({} if n is None else {"n_prompt_tokens": n})} for i, n in self.held.items()]
            return answer(200, rows)
        if path == "/completion":
            return answer(200, {})
        if path.startswith("/v1/"):
            words = json.loads(body)
            assert (words["max_tokens"], words["stream"]) == (1, False)
            tokens = self.host_cache[words["messages"][-1]["content"].encode()]
            self.held = {**dict.fromkeys(self.held, 0), 3: tokens}
            return answer(200, {})
        slot, action = int(path.split("/")[2].split("?")[0]), path.partition("=")[2]
        refused = self.refuses.get(action)
        if isinstance(refused, OSError):
            raise refused
        name = json.loads(body)["filename"]
        file = Path(self.directory, name)
        if action == "save":
            tokens = self.held[slot]
            file.write_bytes(b"%d tokens" % tokens + b"." * (10 * tokens))
            size = file.stat().st_size if self.written is None else self.written
            return answer(refused or 200, {"n_saved": tokens, "n_written": size})
        return answer(refused or 200, {"n_restored": 1})

    def actions(self, action: str) -> List[str]:
        return [path for path in self.asked if path.endswith("=" + action)]


def answer(status: int, value: object) -> Tuple[llmstack.Response, bytes]:
    head = b"HTTP/1.1 %d Said\r\nContent-Length: 0" % status
    return llmstack.parse_response_head(head, "GET"), json.dumps(value).encode()


class Rig:
    """A data directory, and a model that is loaded again and again."""

    def __init__(self, data: Path, config: llmstack.Config = CONFIG) -> None:
        self.data = data
        self.log = llmstack.Log(str(data / "log"))
        self.parking = llmstack.Parking(str(data), config)
        self.parking.speeds.note(IDENTITY, "m", "read", 100.0)
        self.slots = Slots(self.parking.directory)

    def load(self, identity: str = IDENTITY, context: int = 100_000) -> llmstack.Bay:
        self.slots.held = dict.fromkeys(range(4))
        tier = llmstack.Tier("m", ctx_size=context)
        return llmstack.Bay(self.parking, tier, identity, self.slots, self.log)  # type: ignore[arg-type]

    def files(self) -> List[str]:
        return sorted(name for name in os.listdir(self.parking.directory) if name.endswith(".kv"))

    def said(self) -> str:
        self.log.flush()
        return (self.data / "log").read_text(encoding="utf-8")


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(llmstack, "PARKED_LEAST_FREE_BYTES", 0)
    return Rig(tmp_path)


def counts(prompt: int, cached: int = 0, output: int = 5) -> llmstack.Counts:
    return llmstack.Counts(prompt, cached, output, 100.0, 10.0)


def park(rig: Rig, tokens: int = 500, turns: int = 3, slot: int = 2) -> None:
    """A conversation of so many tokens, parked out of one slot."""
    bay = rig.load()
    rig.slots.held[slot] = tokens + 4           # the last token of five was never read
    bay.note("/v1/chat/completions", asked(turns), counts(tokens))
    bay.save(ending=True)
    assert rig.files() == [f"{IDENTITY}-{slot}.kv"]
    rig.slots.asked.clear()


def test_what_takes_long_to_read_is_saved_and_restored_to_its_slot(rig: Rig) -> None:
    bay = rig.load()
    rig.slots.held.update({0: 299, 2: 500})     # at 100 tokens a second, 3 s are 300
    bay.save(ending=True)
    assert rig.slots.actions("save") == ["/slots/2?action=save"]
    assert rig.files() == [f"{IDENTITY}-2.kv"]
    assert rig.load().restore()
    assert rig.slots.actions("restore") == ["/slots/2?action=restore"]


def test_files_are_the_users_alone(rig: Rig) -> None:
    park(rig)
    assert os.stat(rig.parking.directory).st_mode & 0o777 == 0o700
    for name in os.listdir(rig.parking.directory):
        assert os.stat(rig.parking.path(name)).st_mode & 0o777 == 0o600


def test_no_conversation_is_saved_over_another(rig: Rig) -> None:
    """It is asked in the slot that another was restored to, which is in the host's cache by then."""
    for slot, last in ((2, "first"), (2, "second"), (2, "third"), (0, "fourth"), (1, "first")):
        bay = rig.load()
        assert bay.restore()
        rig.slots.held[slot] = 604
        bay.note("/v1/chat/completions", asked(3, last), counts(600, 600))
        bay.save(ending=True)
    said = [json.loads(asked(3, last)) for last in ("first", "second", "third", "fourth")]
    parked = rig.parking.saved(IDENTITY)
    assert [sum(p.goes_on_in(values) for p in parked) for values in said] == [1, 1, 1, 1]
    bay = rig.load()
    rig.slots.held[3] = 604
    bay.note("/v1/chat/completions", asked(3, "fifth"), counts(600))
    bay.save(ending=True)
    assert len(rig.files()) == 4
    assert not any(p.goes_on_in(said[1]) for p in rig.parking.saved(IDENTITY)), "the oldest goes"


def test_a_file_stays_where_its_slot_was_not_used(rig: Rig) -> None:
    park(rig)
    bay = rig.load()
    bay.restore()
    bay.save(ending=True)
    assert rig.files() == [f"{IDENTITY}-2.kv"]


def test_nothing_is_parked_before_a_speed_is_known(rig: Rig) -> None:
    bay = rig.load("b" * 24)
    rig.slots.held[0] = 90_000
    bay.save(ending=True)
    assert rig.files() == []


def test_speeds_are_learned_from_answers_and_kept(rig: Rig) -> None:
    bay = rig.load("b" * 24)
    bay.note("", b"", counts(100))              # too few to tell
    bay.note("", b"", counts(1_000, cached=990))
    assert rig.parking.speeds.get("b" * 24, "read") == 0
    bay.note("", b"", counts(1_000))
    bay.save(ending=True)
    assert llmstack.Parking(str(rig.data), CONFIG).speeds.get("b" * 24, "read") == 100.0


def test_a_busy_slot_is_left_alone(rig: Rig) -> None:
    bay = rig.load()
    rig.slots.held[1] = 900
    rig.slots.busy = (1,)
    bay.save(ending=True)
    assert rig.slots.actions("save") == []


def test_conversations_in_the_hosts_cache_are_saved_too(rig: Rig) -> None:
    """llama-server empties idle slots as a task begins: only the last conversation is in one."""
    bay = rig.load()
    for last, tokens in (("first", 800), ("second", 400)):
        bay.note("/v1/chat/completions", asked(3, last), counts(tokens))
        rig.slots.host_cache[last.encode()] = tokens
    rig.slots.held.update({0: 404, 1: 0})
    bay.save(ending=True)
    assert [p.tokens for p in rig.parking.saved(IDENTITY)] == [404, 800]


def test_where_not_all_fits_the_last_used_come_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By length, old conversations took the context from those that were under way."""
    clock = iter(range(1_000, 2_000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    for slot, (last, tokens) in enumerate([("old", 800), ("older", 900), ("new", 400)]):
        bay = rig.load()
        rig.slots.held[slot] = tokens + 4
        bay.note("/v1/chat/completions", asked(3, last), counts(tokens))
        bay.save(ending=True)
    for _ in range(2):                          # coming back is no use, either
        rig.slots.asked.clear()
        assert rig.load(context=1_320).restore()
        assert rig.slots.actions("restore") == ["/slots/2?action=restore", "/slots/1?action=restore"]


def test_of_two_that_are_as_long_the_last_is_in_the_slot(rig: Rig) -> None:
    bay = rig.load()
    for last in ("first", "second"):
        bay.note("/v1/chat/completions", asked(3, last), counts(800))
        rig.slots.host_cache[last.encode()] = 800
    rig.slots.held[0] = 804
    bay.save(ending=True)
    begins = {p.tokens: p.begins for p in rig.parking.saved(IDENTITY)}
    assert begins == {804: llmstack.beginning(json.loads(asked(3, "second")), 3),
                      800: llmstack.beginning(json.loads(asked(3, "first")), 3)}


def test_while_in_use_the_hosts_cache_is_left_alone(rig: Rig) -> None:
    bay = rig.load()
    bay.note("/v1/chat/completions", asked(3, "first"), counts(800))
    rig.slots.held.update({0: 404, 1: 30_000})  # at 20,000 tokens a second, more than one second
    bay.save(ending=False)
    assert rig.slots.actions("save") == ["/slots/0?action=save"]


def test_it_is_due_when_it_was_used_for_so_long(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    bay = rig.load()
    rig.slots.held[0] = 400
    now = time.monotonic()
    saves: List[bool] = []
    monkeypatch.setattr(bay, "save", saves.append)

    def wait_due(after_s: float) -> int:
        monkeypatch.setattr(time, "monotonic", lambda: now + after_s)
        bay.save_when_due()
        for thread in threading.enumerate():
            if thread.name == "park m":
                thread.join()
        return len(saves)

    assert wait_due(601) == 0                   # not used since it was loaded
    bay.note("", b"", counts(10))
    assert wait_due(602) == 1
    assert wait_due(1_300) == 1                 # not used since
    bay.note("", b"", counts(10))
    assert wait_due(1_301) == 2
    assert saves == [False, False]


def test_an_older_state_of_a_conversation_goes(rig: Rig) -> None:
    park(rig, 500, turns=3, slot=2)
    bay = rig.load()
    bay.restore()
    rig.slots.held[1] = 704
    bay.note("/v1/chat/completions", json.dumps({"messages": [*messages(3), *messages(2)]}).encode(),
             counts(700, 500))
    bay.save(ending=True)
    assert rig.files() == [f"{IDENTITY}-2.kv"]
    assert [p.tokens for p in rig.parking.saved(IDENTITY)] == [704]


@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_a_damaged_file_is_never_given_to_the_server(rig: Rig, damage: str) -> None:
    park(rig)
    path = Path(rig.parking.path(rig.files()[0]))
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-1], "other": data[:-1] + b"x", "gone": b""}[damage])
    assert rig.load().restore()
    assert rig.slots.actions("restore") == []
    assert rig.parking.saved(IDENTITY) == []


def test_a_refused_file_costs_itself_alone(rig: Rig) -> None:
    park(rig)
    rig.slots.refuses["restore"] = 400
    assert rig.load().restore()
    assert rig.files() == []
    assert "answered 400" in rig.said()


def test_a_file_that_silences_the_server_goes_before_it_is_started_again(rig: Rig) -> None:
    park(rig)
    rig.slots.refuses["restore"] = OSError("gone")
    assert not rig.load().restore()
    assert rig.files() == []


def test_another_identity_is_never_restored(rig: Rig) -> None:
    park(rig)
    assert rig.load("b" * 24).restore()
    assert rig.slots.actions("restore") == []


def test_what_does_not_fit_the_context_together_waits(rig: Rig) -> None:
    bay = rig.load()
    rig.slots.held.update({0: 600, 1: 500, 2: 350})
    bay.save(ending=True)
    assert rig.load(context=1_000).restore()
    assert rig.slots.actions("restore") == ["/slots/0?action=restore", "/slots/2?action=restore"]
    assert len(rig.files()) == 3


@pytest.mark.parametrize("fault", ["short", 500, OSError("timed out")])
def test_a_save_that_fails_leaves_what_was_there(rig: Rig, fault: Any) -> None:
    """A full disk among them: llama-server may say 200 and have written less."""
    park(rig)
    before = Path(rig.parking.path(rig.files()[0])).read_bytes()
    bay = rig.load()
    rig.slots.held[2] = 900
    if fault == "short":
        rig.slots.written = 1
    else:
        rig.slots.refuses["save"] = fault
    bay.save(ending=True)
    assert "not parked" in rig.said()
    assert [name for name in os.listdir(rig.parking.directory) if name.endswith(".tmp")] == []
    assert Path(rig.parking.path(rig.files()[0])).read_bytes() == before
    assert rig.load().restore()
    assert len(rig.slots.actions("restore")) == 1


def test_half_a_save_of_a_killed_daemon_is_swept(rig: Rig) -> None:
    Path(rig.parking.path(f"{IDENTITY}-0.tmp")).write_bytes(b"half")
    llmstack.Parking(str(rig.data), CONFIG)
    assert os.listdir(rig.parking.directory) == []


def test_the_longest_unused_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "PARKED_LEAST_FREE_BYTES", 0)
    rig = Rig(tmp_path, CONFIG._replace(park_gb=12_000 / 1e9))
    for slot, age_s in ((0, 30), (1, 90), (2, 60)):
        bay = rig.load()
        rig.slots.held[slot] = 350
        bay.save(ending=True)
        stamp = time.time() - age_s
        os.utime(rig.parking.path(f"{IDENTITY}-{slot}.kv"), (stamp, stamp))
    bay = rig.load()
    rig.slots.held[3] = 350
    bay.save(ending=True)
    assert rig.files() == [f"{IDENTITY}-{n}.kv" for n in (0, 2, 3)]


def test_what_never_fits_pushes_nothing_out(rig: Rig) -> None:
    park(rig)
    bay = rig.load()
    rig.slots.held[0] = 200_000_000             # at ten bytes each, twice park_gb
    bay.save(ending=True)
    assert rig.slots.actions("save") == []
    assert rig.files() == [f"{IDENTITY}-2.kv"]


def test_the_last_of_a_disk_is_not_ours(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "PARKED_LEAST_FREE_BYTES", 10 ** 18)
    bay = rig.load()
    rig.slots.held[0] = 900
    bay.save(ending=True)
    assert rig.slots.actions("save") == []
    assert rig.files() == []


# ---- the proof


def prove(rig: Rig, cached: int, body: bytes) -> llmstack.Bay:
    park(rig, 500)
    bay = rig.load()
    bay.restore()
    bay.note("/v1/chat/completions", body, counts(600, cached))
    return bay


LONGER = json.dumps({"messages": [*messages(3), *messages(2)]}).encode()


def test_a_model_that_ignores_a_restore_is_parked_no_more(rig: Rig) -> None:
    bay = prove(rig, 0, LONGER)
    assert rig.files() == []
    note = "off: 0 of 500 restored tokens were used by this build of llama.cpp"
    assert llmstack.parking_notes(str(rig.data)) == {"m": note}
    rig.slots.held[0] = 900
    bay.save(ending=True)
    assert rig.files() == []
    rig.load("b" * 24).restore()                # another build
    assert llmstack.parking_notes(str(rig.data)) == {}


@pytest.mark.parametrize(("cached", "body"), [
    (500, LONGER), (20, asked(5, "of another conversation")),
    (0, asked(2))], ids=["it holds", "another conversation", "a shorter prompt"])
def test_nothing_else_is_held_against_a_model(rig: Rig, cached: int, body: bytes) -> None:
    prove(rig, cached, body)
    assert llmstack.parking_notes(str(rig.data)) == {}
    assert len(rig.files()) == 1


def test_a_conversation_that_has_grown_a_lot_proves_nothing(rig: Rig) -> None:
    """The host's cache, through which its slot is found, may have had no room for it."""
    park(rig, 500)
    bay = rig.load()
    bay.restore()
    bay.note("/v1/chat/completions", LONGER, counts(700, 0))
    assert llmstack.parking_notes(str(rig.data)) == {}
    assert len(rig.files()) == 1


def test_what_was_asked_beside_another_request_proves_nothing(rig: Rig) -> None:
    """The other may have pushed the conversation out of the host's cache."""
    park(rig, 500)
    bay = rig.load()
    bay.restore()
    assert bay.wants(10)
    assert bay.wants(10)
    bay.note("/v1/chat/completions", LONGER, counts(600, 0))
    assert llmstack.parking_notes(str(rig.data)) == {}


@pytest.mark.parametrize(("more", "asked_before", "settled"), [
    (8, 0, True), (0, 0, False), (8, 1, False),
], ids=["it has grown", "its slot is found", "another was asked first"])
def test_a_conversation_that_has_grown_goes_to_the_hosts_cache(
    rig: Rig, more: int, asked_before: int, settled: bool
) -> None:
    park(rig, 500)
    bay = rig.load()
    bay.restore()
    for _ in range(asked_before + 1):
        assert bay.wants(10)
    said = [*messages(3), *messages(more)] if more else messages(3)
    bay.make_findable(json.dumps({"model": "m", "messages": said}).encode())
    assert ("/completion" in rig.slots.asked) is settled
    bay.make_findable(asked(3, "of another conversation"))
    assert rig.slots.asked.count("/completion") == settled


# ---- what it is restored under


def test_identity_is_of_build_weights_and_flags(tmp_path: Path) -> None:
    weights, program = tmp_path / "a.gguf", tmp_path / "llama-server"
    weights.write_bytes(b"weights")
    program.write_bytes(b"build 1")

    def identity(*flags: str, port: str = "1", **env: str) -> str:
        command = [str(program), "--host", "127.0.0.1", "--port", port, *flags]
        return llmstack.parking_identity(command, str(weights), env)

    first = identity("-c", "4096")
    assert identity("-c", "4096", port="2", PATH="/bin") == first
    assert identity("-c", "4096", "--cache-ram", "512") == first
    others = [identity("-c", "8192"), identity("-c", "4096", LLAMA_ARG_N_PARALLEL="2")]
    program.write_bytes(b"build 22")
    others.append(identity("-c", "4096"))
    program.write_bytes(b"build 1")
    weights.write_bytes(b"Weights")
    others.append(identity("-c", "4096"))
    assert len({first, *others}) == 5


def test_forget_deletes_it_all(rig: Rig) -> None:
    park(rig)
    assert llmstack.forget_parked(str(rig.data)) > 5_000
    assert os.listdir(rig.parking.directory) == []
    assert llmstack.forget_parked(str(rig.data / "nowhere")) == 0


def test_forget_says_what_it_freed(rig: Rig, capsys: pytest.CaptureFixture[str],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSTACK_DATA_DIR", str(rig.data))
    park(rig)
    assert llmstack.main(["stop", "--forget"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Forgot 0.0 GB of parked conversations.", "Nothing is running."]
    assert rig.files() == []
    assert llmstack.main(["forget"]) == 0
    assert capsys.readouterr().out == "Nothing is parked.\n"


def test_status_says_what_is_not_parked(rig: Rig, capsys: pytest.CaptureFixture[str],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSTACK_DATA_DIR", str(rig.data))
    rig.parking.turn_off(IDENTITY, "code-smart", "0 of 500 restored tokens were used")
    assert llmstack.main(["status"]) == 1
    assert "parking off: 0 of 500 restored tokens were used" in capsys.readouterr().out
    assert llmstack.main(["status", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["tiers"]
    assert {row["name"]: row["parking"] for row in rows if row["parking"]} == {
        "code-smart": "off: 0 of 500 restored tokens were used"}


def test_parking_can_be_off(tmp_path: Path) -> None:
    log = llmstack.Log(str(tmp_path / "log"))
    parking = llmstack.open_parking(str(tmp_path), CONFIG._replace(park_gb=0), log)
    assert parking is not None
    parking.speeds.note(IDENTITY, "m", "read", 100.0)
    assert not parking.worth(IDENTITY, 90_000)
    assert not (tmp_path / "parked").exists()
    (tmp_path / "parked").write_text("a file in its place")
    assert llmstack.open_parking(str(tmp_path), CONFIG, log) is None


def test_llama_swaps_hook_ends_the_server_whatever_the_daemon_does(tmp_path: Path) -> None:
    server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                              start_new_session=True)
    guest = llmstack.guest_command(sys.executable, "park")
    assert subprocess.call([*guest, "1", "m", str(server.pid)]) == 0        # nobody is there
    assert server.wait(20) == -signal.SIGTERM


def test_the_hook_stands_with_every_llama_server(config: llmstack.Config) -> None:
    plan = llmstack.SwapPlan(config, llmstack.Binary(("x",)), llmstack.posix_quote)
    assert "cmdStop" not in llmstack.render_llama_swap_yaml(plan)
    hooked = llmstack.render_llama_swap_yaml(plan._replace(park=("python3", "a b.py", "10102")))
    assert hooked.count("""cmdStop: "python3 'a b.py' 10102 ${MODEL_ID} ${PID}"\n""") == len(
        llmstack.local_tiers(config))


# ---- llama.cpp itself


class RealStage(Stage):
    """Tiers that cannot be together, served by a real llama-server."""

    def __init__(self, tmp_path: Path, config: llmstack.Config, program: Tuple[str, ...]) -> None:
        weights = tmp_path / "noise.gguf"
        weights.write_bytes(render_noise_gguf())
        tiers = tuple(t._replace(path=str(weights), ctx_size=8192, rope_scale=0.0) for t in config.tiers
                      if t.name in ("code-smart", "plan", "code-fast"))
        self.program = program
        config = config._replace(tiers=tiers, park_after_s=0).with_settings({"threads": 1})
        super().__init__(tmp_path / "stage", config, 1e9, FIRST_PORT)
        for model in self.engine.models.values():
            model.gb = 6e8                      # of 1e9: one at a time
        self.parking = llmstack.Parking(str(tmp_path / "data"), config)
        self.engine._parking = self.parking

    def command(self, tier: llmstack.Tier, port: int) -> List[str]:
        refused = frozenset({"--no-mmap", "--load-mode"})       # what builds disagree about
        words = llmstack.server_command(self.program, tier, self.config, port, refused)
        return [*words, "--slot-save-path", self.parking.directory]

    def turn(self, model: str, said: List[Dict[str, str]]) -> Tuple[int, int]:
        """(tokens of the prompt, of these cached) of one turn, whose answer is put behind it."""
        status, told = self.ask("POST", "/v1/chat/completions", {
            "model": model, "max_tokens": 8, "messages": said})
        assert status == 200, told
        said += [told["choices"][0]["message"], {"role": "user", "content": "more"}]
        timings = told["timings"]
        return timings["prompt_n"] + timings["cache_n"], timings["cache_n"]

    def parked(self, tokens: int) -> Path:
        """The file of the conversation with so many tokens, give or take its last answer."""
        for path in Path(self.parking.directory).glob("*.json"):
            if tokens <= json.loads(path.read_text())["tokens"] <= tokens + 8:
                return path.with_suffix(".kv")
        raise AssertionError(f"no file has {tokens} tokens, {self.log()}")


def conversation(tag: str, words: int = 60) -> List[Dict[str, str]]:
    return [{"role": "user", "content": " ".join(f"{tag}{i}" for i in range(words))}]


@pytest.fixture(params=["stand-in", "PATH"])
def real(request: pytest.FixtureRequest, real_data: Path, tmp_path: Path,
         config: llmstack.Config) -> Iterator[RealStage]:
    program: Tuple[str, ...] = llmstack.find_llama_server(config, {"PATH": ""}, str(real_data))
    if request.param == "PATH":
        found = shutil.which("llama-server")
        if not found:
            pytest.skip("there is no llama-server on PATH")
        program = (found,)
    stage = RealStage(tmp_path, config, program)
    yield stage
    stage.close()


def test_a_real_conversation_survives_a_swap(real: RealStage) -> None:
    """The long one lies in the host's cache when its server stops, the short one in a slot."""
    long, short = conversation("a", 300), conversation("b")
    tokens = [real.turn("code-smart", said)[0] for said in (long, short)]
    real.turn("plan", conversation("c"))
    assert real.states() == {"plan": "ready"}
    real.parked(tokens[0])
    real.parked(tokens[1])
    for said, before in ((long, tokens[0]), (short, tokens[1])):
        prompt, cached = real.turn("code-smart", said)
        assert prompt > before
        assert cached >= before - 1
    assert llmstack.parking_notes(str(Path(real.parking.directory).parent)) == {}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_real_conversation_that_has_grown_a_lot_is_found(real: RealStage, path: str) -> None:
    """A tool's long result: what its slot shares with the prompt is less than the server looks for."""
    said = conversation("a")
    before, _ = real.turn("code-smart", said)
    real.turn("plan", conversation("b"))
    said += conversation("result", 90)
    status, told = real.ask("POST", path, {"model": "code-smart", "max_tokens": 8, "messages": said})
    assert status == 200, told
    usage = told["usage"]
    cached = usage.get("cache_read_input_tokens", told.get("timings", {}).get("cache_n"))
    assert cached >= before - 1, real.log()
    assert llmstack.parking_notes(str(Path(real.parking.directory).parent)) == {}


def test_six_real_conversations_on_three_models_in_turn(real: RealStage) -> None:
    """LLMSTACK_TEST_PARK_S: go on for so many seconds."""
    end = time.monotonic() + float(os.environ.get("LLMSTACK_TEST_PARK_S", "0"))
    models = ("code-smart", "plan", "code-fast")
    conversations = {(model, tag): conversation(model + tag, 40) for model in models for tag in "ab"}
    before = dict.fromkeys(conversations, 0)
    rounds = 0
    while rounds < 3 or time.monotonic() < end:
        for (model, tag), said in conversations.items():
            if before[model, tag] > 6_000:
                said[:], before[model, tag] = conversation(f"{model}{tag}{rounds}", 40), 0
            prompt, cached = real.turn(model, said)
            assert cached >= before[model, tag] - 1, f"{model} {tag} {rounds} {before} {cached}\n{real.log()}"
            before[model, tag] = prompt
        rounds += 1
    print(f"{rounds} rounds, {6 * rounds} answers")


def test_a_real_conversation_is_parked_while_it_is_in_use(real: RealStage) -> None:
    said = conversation("a")
    tokens, _ = real.turn("code-smart", said)
    real.wait_idle("code-smart")
    bay = real.engine.models["code-smart"].bay
    assert bay is not None
    real.engine.unload_idle()
    assert not list(Path(real.parking.directory).glob("*.kv"))
    bay._saved_at = -1e9                        # ten minutes ago
    real.engine.models["code-smart"].tier = real.engine.models["code-smart"].tier._replace(ttl=0)
    real.engine.unload_idle()
    wait_for(lambda: list(Path(real.parking.directory).glob("*.kv")), "a parked file")
    real.parked(tokens)
    os.kill(real.engine.models["code-smart"].process.pid, signal.SIGKILL)
    real.wait_dead("code-smart")
    assert real.turn("code-smart", said)[1] >= tokens - 1


def test_a_real_server_that_dies_of_a_file_is_started_again_without_it(real: RealStage) -> None:
    """A cut file ends b11549. Ours is looked at before, so this one lies about its ends, too."""
    said = conversation("a")
    tokens, _ = real.turn("code-smart", said)
    real.turn("plan", conversation("c"))
    path = real.parked(tokens)
    path.write_bytes(path.read_bytes()[:-5_000])
    row = json.loads(path.with_suffix(".json").read_text())
    row["edges"] = llmstack.file_edges(str(path))
    path.with_suffix(".json").write_text(json.dumps(row))
    assert real.turn("code-smart", said)[1] < tokens // 2
    assert not path.exists()
    assert "dropped" in real.log()


def test_a_full_disk_loses_a_real_conversation_and_nothing_else(
        real: RealStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full refuses every byte, as a full disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    said = conversation("a")
    real.turn("code-smart", said)
    bay = real.engine.models["code-smart"].bay
    assert bay is not None
    for number in range(4):
        os.symlink("/dev/full", real.parking.path(f"{bay.identity}-{number}.tmp"))
    real.turn("plan", conversation("c"))
    assert not list(Path(real.parking.directory).glob("*.kv"))
    assert "not parked" in real.log()
    real.turn("code-smart", said)


@pytest.mark.parametrize("engine", engines())
def test_a_conversation_survives_a_swap_and_a_restart(
        engine: str, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files serve both engines."""
    monkeypatch.setattr(llmstack, "find_program", only_llama_swap(llmstack.find_program))
    weights = tmp_path / "noise.gguf"
    weights.write_bytes(render_noise_gguf())
    tier = f"path = {weights}\nctx_size = 4k\nsize_gb = 0.1\n"
    project = Project(f"park_after_s = 0\n[one]\nrole = agent\n{tier}[two]\nrole = plan\n{tier}", engine)
    said = conversation("a", 120)

    def turn(model: str, messages: List[Dict[str, str]]) -> Tuple[int, int]:
        told = json.loads(ask(project.router_port, model=model, max_tokens=8, messages=messages)[1])
        messages += [told["choices"][0]["message"], {"role": "user", "content": "more"}]
        return told["timings"]["prompt_n"] + told["timings"]["cache_n"], told["timings"]["cache_n"]

    try:
        assert llmstack.main(["start"]) == 0
        before, cached = turn("one", said)
        assert cached == 0
        turn("two", conversation("b"))
        now, cached = turn("one", said)
        assert cached >= before - 1, project.log("engine")
        assert llmstack.main(["restart", "--detach"]) == 0
        router = llmstack.Upstream("127.0.0.1", project.router_port)
        told = llmstack.asked_json(router, "/llmstack/snapshot")
        assert {row["tier"] for row in told["parked"]} == {"one", "two"}, "whichever engine it is"
        assert turn("one", said)[1] >= now - 1, project.log("engine")
    finally:
        llmstack.main(["stop"])


# ---- who looks on


def test_who_looks_on_is_told_what_is_parked_and_no_word_of_it(rig: Rig) -> None:
    park(rig, tokens=500, turns=3)
    (row,) = rig.parking.rows()
    path = Path(rig.parking.directory, f"{IDENTITY}-2.kv")
    assert row == {"tier": "m", "tokens": 504, "turns": 3, "bytes": path.stat().st_size,
                   "used": round(path.stat().st_mtime)}
    for broken in ("{", "[]", '{"slot": "x"}'):
        (path.parent / f"{IDENTITY}-7.json").write_text(broken)
        assert rig.parking.rows() == [row]
    path.unlink()
    assert rig.parking.rows()[0]["bytes"] == 0
