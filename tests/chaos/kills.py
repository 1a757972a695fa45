"""kill -9 over all parts of a stack, at moments nobody chose."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
import time
from collections.abc import Iterator, Sequence
from typing import Callable, NamedTuple, Optional

from tests.chaos.model_server import LOAD_S, known_events, prompt
from tests.chaos.rig import HOST, Bystander, Fault, Process, Rig, until
from tests.fake_hub import FakeHub

MOMENTS = ("start", "load", "stream", "stop")
EVENTS, DELAY_MS = 40, 10           # of the stream that a kill meets
ANSWER_S = 20                       # from a kill of a model's server to the next answer
REPO, FILE = "owner/some-GGUF", "some-Q4.gguf"
BIG_BYTES = 24 << 20                # of the download that a kill meets
HUB_TIER = f"""
[from-hub]
role = plan
hf_repo = {REPO}
hf_file = {FILE}
ctx_size = 8k
"""


class Kill(NamedTuple):
    """What is killed, when, and which command has to clean up behind it."""

    part: str
    moment: str
    then: str                       # start | stop

    def __str__(self) -> str:
        return f"{self.part} at {self.moment}, then {self.then}"


class Verdict(NamedTuple):
    """How one kill ended."""

    kill: Kill
    hit: bool                       # False: it had ended by itself
    fault: str
    clean_s: float                  # that the cleaning command took


def ask(port: int, seed: int, tier: str) -> tuple[bytes, bool]:
    """(payload, whether its end was clean) of a stream. Errors: OSError, HTTPException."""
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    message = {"role": "user", "content": prompt(seed, EVENTS, DELAY_MS)}
    body = json.dumps({"model": tier, "stream": True, "messages": [message]})
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", body,
                           {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise http.client.HTTPException(f"{answer.status} {answer.read(500)!r}")
        try:
            return answer.read(), True
        except http.client.IncompleteRead as exc:
            return exc.partial, False


def check_stream(seed: int, payload: bytes, clean: bool) -> None:
    """A stream is whole, or visibly is not. Errors: Fault."""
    expected = b"".join(known_events(seed, EVENTS))
    if not clean:
        return
    if hashlib.sha256(payload).digest() != hashlib.sha256(expected).digest():
        raise Fault(f"a stream ended clean with {len(payload)} of {len(expected)} bytes")


class Killer:
    """Kills on one rig. The stack is up or down as the last kill has left it."""

    def __init__(self, rig: Rig, source: random.Random) -> None:
        self._rig, self._source = rig, source
        self._engine = ""

    def run(self, kill: Kill) -> Verdict:
        """One kill, the cleaning behind it, and all that must hold then."""
        hit, clean_s, fault = False, 0.0, ""
        try:
            if kill.part == "worker":
                hit, clean_s = self._worker(kill)
            else:
                hit, clean_s = self._stack(kill)
            self._rig.bystander.check()
            self._rig.check_logs()
        except (Fault, OSError, http.client.HTTPException) as exc:
            fault = f"{type(exc).__name__}: {exc}"
            fault += self._log_fault()
            self._reset()
        return Verdict(kill, hit, fault, clean_s)

    def _log_fault(self) -> str:
        """What the logs say of a fault that was seen elsewhere."""
        try:
            self._rig.check_logs()
        except Fault as exc:
            return f"; {exc}"
        return ""

    def _reset(self) -> None:
        """After a fault, begin anew. Its log says more, where there is one."""
        for process in self._rig.processes():
            process.kill()
        for path in (*self._rig.state.glob("*.pid"), self._rig.data / "owner.json"):
            path.unlink(missing_ok=True)

    def _use(self, engine: str) -> None:
        if engine != self._engine:
            self._rig.command("stop", code=None)
            self._rig.write_ini(engine)
            self._engine = engine

    # ---- the stack

    def _stack(self, kill: Kill) -> tuple[bool, float]:
        rig = self._rig
        self._use("llama-swap" if kill.part == "llama-swap" else "embedded")
        meet: Callable[[Kill], bool] = {
            "start": self._at_start, "load": self._at_load,
            "stream": self._at_stream, "stop": self._at_stop,
        }[kill.moment]
        hit = meet(kill)
        self._check_status()
        began = time.monotonic()
        if kill.then == "start":
            rig.start()
            clean_s = time.monotonic() - began
            rig.check_up()
            self._check_answer()
            rig.command("stop")
        else:
            rig.command("stop", code=None)
            clean_s = time.monotonic() - began
        rig.check_down()
        return hit, clean_s

    def _pause(self, most_s: float) -> None:
        time.sleep(self._source.uniform(0, most_s))

    def _shoot(self, part: str, patience_s: float = 10) -> bool:
        process: Optional[Process] = None
        end = time.monotonic() + patience_s
        while process is None and time.monotonic() < end:
            process = self._rig.find(part)
        return process is not None and process.kill()

    def _at_start(self, kill: Kill) -> bool:
        """While `start` waits for the daemon, or just after."""
        words = ("start", "--detach")
        process = self._rig.popen(*words)
        until(lambda: self._rig.find("daemon") or process.poll() is not None, "a daemon")
        self._pause(0.6)
        hit = self._shoot(kill.part, 1.0)
        self._rig.finish(process, words)
        return hit

    def _at_load(self, kill: Kill) -> bool:
        """While a model loads, for which another has to go."""
        self._rig.start()
        with self._asking("code-smart"):
            self._pause(LOAD_S + 0.3)
            hit = self._shoot(kill.part)
        if hit and kill.part != "daemon":
            self._check_answer()
        return hit

    def _at_stream(self, kill: Kill) -> bool:
        self._rig.start()
        self._check_answer()
        with self._asking("code-smart"):
            self._pause(EVENTS * DELAY_MS / 1000)
            hit = self._shoot(kill.part)
        if hit and kill.part != "daemon":
            self._check_answer()
        return hit

    def _at_stop(self, kill: Kill) -> bool:
        self._rig.start()
        self._check_answer()
        process = self._rig.popen("stop")
        self._pause(0.5)
        hit = self._shoot(kill.part, 0.2)
        said = self._rig.finish(process, ("stop",))
        if said.code:
            raise Fault(f"`stop` ended with {said.code}: {said.text.strip()}")
        return hit

    @contextlib.contextmanager
    def _asking(self, tier: str) -> Iterator[None]:
        """A stream is asked for meanwhile, and judged at the end."""
        import threading
        seed = self._source.randrange(1 << 30)
        ends: list[tuple[bytes, bool]] = []

        def run() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                ends.append(ask(self._rig.router_port, seed, tier))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            thread.join()
        for payload, clean in ends:
            check_stream(seed, payload, clean)

    def _check_answer(self) -> None:
        """The stack gives a whole answer, after a moment at most. Errors: Fault."""
        seed = self._source.randrange(1 << 30)
        end, why = time.monotonic() + ANSWER_S, ""
        while time.monotonic() < end:
            try:
                payload, clean = ask(self._rig.router_port, seed, "auto")
            except (OSError, http.client.HTTPException) as exc:
                why = str(exc)
            else:
                check_stream(seed, payload, clean)
                if clean:
                    return
                why = "its stream broke off"
            time.sleep(0.1)
        raise Fault(f"no whole answer within {ANSWER_S} s: {why}")

    def _check_status(self) -> None:
        """What `status` says is so. Errors: Fault."""
        says = self._rig.status()["running"]
        daemon = self._rig.find("daemon")
        if says and daemon is None:
            raise Fault("status says that the stack runs, and there is no daemon")

    # ---- the download worker

    def _worker(self, kill: Kill) -> tuple[bool, float]:
        rig, hub = self._rig, FakeHub()
        data = self._source.randbytes(BIG_BYTES)
        hub.repos[REPO] = {FILE: data}
        rig.env["HF_ENDPOINT"] = hub.url
        rig.env["HF_HUB_CACHE"] = str(rig.directory / f"cache-{self._source.randrange(1 << 30)}")
        self._use("embedded")
        rig.write_ini("embedded", more=HUB_TIER)
        self._engine = ""
        try:
            return self._met_worker(kill, hub, data)
        finally:
            hub.stop()
            del rig.env["HF_ENDPOINT"], rig.env["HF_HUB_CACHE"]

    def _met_worker(self, kill: Kill, hub: FakeHub, data: bytes) -> tuple[bool, float]:
        rig = self._rig
        hub.hold_after = self._source.randrange(1, BIG_BYTES)
        words = ("download", "from-hub")
        process = rig.popen(*words)
        until(lambda: rig.find("worker") or process.poll() is not None, "a worker")
        if kill.moment != "start":
            until(hub.held.is_set, "bytes of the file")
        self._pause(0.3)
        if kill.moment == "stop":
            rig.finish(process, words)
            words, process = ("download", "--stop"), rig.popen("download", "--stop")
            self._pause(0.3)
        hit = self._shoot("worker", 1.0)
        hub.gate.set()
        rig.finish(process, words)
        if rig.find("worker") is None:
            rows = rig.status().get("downloads", [])
            if any(row["state"] == "running" for row in rows):
                raise Fault("status says that a download runs, and there is no worker")
        began = time.monotonic()
        if kill.then == "stop":
            rig.command("download", "--stop")
        clean_s = time.monotonic() - began
        if kill.then == "start":
            rig.command("download", "from-hub", "--wait")
            clean_s = time.monotonic() - began
            self._check_download(data)
        rig.check_down()
        return hit, clean_s

    def _check_download(self, data: bytes) -> None:
        from pathlib import Path
        found = list(Path(self._rig.env["HF_HUB_CACHE"]).glob(f"models--*/snapshots/*/{FILE}"))
        if [path.read_bytes() == data for path in found] != [True]:
            raise Fault(f"the download ended as {len(found)} files, or as other bytes")


def plan(count: int, parts: Sequence[str], source: random.Random) -> list[Kill]:
    """So many kills, every part at every moment in turn, in an order nobody chose."""
    every = [Kill(part, moment, then) for then in ("start", "stop") for moment in MOMENTS
             for part in parts if (part, moment) not in (("worker", "load"),)]
    kills = [every[number % len(every)] for number in range(count)]
    source.shuffle(kills)
    return kills


def run_kills(rig: Rig, count: int, source: random.Random,
              tell: Callable[[str], None]) -> list[Verdict]:
    """Kill so many times; how each ended."""
    parts = ["daemon", "llama-server"]
    parts += ["llama-swap"] if rig.swap else []
    parts += ["worker"] if rig.hub else []
    killer, verdicts = Killer(rig, source), []
    for number, kill in enumerate(plan(count, parts, source)):
        verdict = killer.run(kill)
        verdicts.append(verdict)
        tell(f"kill {number + 1} of {count}: {kill}: {verdict.fault or 'ok'}")
        if "a stranger was ended" in verdict.fault:
            rig.bystander = Bystander(rig.project)
    return verdicts
