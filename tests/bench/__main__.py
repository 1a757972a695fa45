"""Benchmark: llmstack beside the bare upstream, nginx and the peer package, in one run.

    python3 -m tests.bench [--rounds N] [--peer PYTHON] [--pyz FILE] [--json] [--quick] [--check]
    python3 -m tests.bench --swap LLAMA_SWAP [the same options]

    client (this process) ──> subject ──> stub upstream (its own process)
                              direct      the client talks to the stub itself
                              nginx       one worker, keep-alive, unbuffered: relays, and reads no JSON
                              llmstack    `serve --upstream STUB --host 127.0.0.1 --port 0`
                              peer        opencode-llmstack, where --peer names a Python that has it
    With --swap: direct, and whole chains that start a fake llama-server themselves, see tests/bench/chain.py.

How it measures
    Machines are noisy, so nothing is compared across runs or across minutes. Each round takes every measure over every
    subject in turn, starting with another subject each round; the two latencies, which are differences of a few dozen
    microseconds, are taken in short slices that go around the subjects. A comparison with a rival is a ratio within one
    round; what is reported is the median over the rounds.
    The client is one selectors loop, which costs less than the thread per connection of a typical Python client: on a
    shared core that leaves the client less to hide a slow router behind.
    In every measure the client serialises each body with json.dumps, inside the timed span, and the stub parses each with
    json.loads, as real clients and servers do. Every request says model "auto", so a router has to parse and rewrite it,
    and no two prompts of a measure are the same, so that remembering answers or decisions wins nothing. Sockets are
    keep-alive with Nagle off.
    Before a subject is timed, in every round, one plain and one streamed answer are read through it and compared with
    what the stub sent; a subject that alters or cuts them fails the round instead of winning.
    Two things to know when reading it. "direct" is no ceiling for streams: a relay that joins the stub's sends leaves the
    client fewer reads. And on several cores the p50 of one request at a time depends on whether the kernel puts client,
    stub and subject on one core or wakes another for each hop (0.02 against 0.07 ms for direct);
    `taskset -c 0 python3 -m tests.bench` takes that choice away, and what is left is each subject's own cost.

Measures
    one at a time         p50 of the latency; "added" is what the subject adds to direct's p50 of that round
    16 at a time          requests/s
    16 streams            events/s; 500 events each, the stub sends each event on its own
    64 live streams       200 events/s each for a second: events/s delivered, time to the first event
    400 kB prompt         p50 of the latency
    memory after a round  resident; "highest" is the most it ever was
    boot                  from spawning a server to its first 200 on /models.ini or /v1/models
    idle memory           resident, right after that answer
    llmstack.pyz version  beside `python -c pass`

It measures and does not judge: the exit code is 0 with a goal missed, unless --check is given (then 1).
Exit 2: it cannot measure llmstack at all. Needs a POSIX system. Leaves no process, port or file behind.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import grp
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from tests.bench.chain import SWAP, free_port, start_chain, start_swap, write_server
from tests.bench.client import BURST, check_relay, connect, exchange, keep_asking
from tests.bench.processes import (
    Child,
    Children,
    Launch,
    Subject,
    SubjectError,
    children_of_run,
    output_of,
    start,
)
from tests.bench.stub import HOST, LIVE, LIVE_EVENTS, STREAM_EVENTS

# ---- constants

REPOSITORY = Path(__file__).resolve().parent.parent.parent

SLICES = 10  # of a latency measure, in turn with the other subjects'
STREAMS = 16
LIVE_STREAMS = 64
BIG_PROMPT = "word and " * 44_444  # 400 kB

DIRECT, NGINX, LLMSTACK, PEER = "direct", "nginx", "llmstack", "peer"
RIVALS = (NGINX, PEER, SWAP)
PYZ = "llmstack.pyz"


class SetupError(Exception):
    """The benchmark cannot run at all (exit code 2)."""


# ---- records


class Effort(NamedTuple):
    """How long each measure runs, per subject and round."""

    one_s: float
    requests_s: float
    streams_s: float
    big_s: float
    versions: int


FULL = Effort(one_s=0.5, requests_s=1.0, streams_s=1.0, big_s=0.5, versions=5)
QUICK = Effort(one_s=0.2, requests_s=0.3, streams_s=0.3, big_s=0.2, versions=3)

MEASURES = (  # the rows of the table: key, label, unit, digits
    ("one_ms", "one at a time, p50", "ms", 3),
    ("added_ms", "one at a time, added", "ms", 3),
    ("requests", "16 at a time", "requests/s", 0),
    ("events", "16 streams of 500 events", "events/s", 0),
    ("event_cpu_us", "  processor time of an event", "us", 2),
    ("live_events", "64 live streams", "events/s", 0),
    ("live_first_ms", "64 live, first event, median", "ms", 1),
    ("live_first_max_ms", "64 live, first event, slowest", "ms", 1),
    ("big_ms", "400 kB prompt, p50", "ms", 2),
    ("busy_mb", "memory after a round", "MB", 1),
    ("most_mb", "  highest", "MB", 1),
    ("boot_ms", "boot to first answer", "ms", 0),
    ("idle_mb", "idle memory", "MB", 1),
    ("version_ms", "llmstack.pyz version", "ms", 1),
    ("version_ratio", "  beside python -c pass", "x", 2),
)


class Goal(NamedTuple):
    """A bound on llmstack's median, or on the median of its per-round ratios to the rival it needs."""

    text: str
    measure: str
    needs: Optional[str]  # what may be missing: a rival, or the .pyz
    at_most: bool
    limit: float
    unit: str


GOALS = (
    Goal("added latency, one at a time", "added_ms", NGINX, True, 2.0, "x nginx"),
    Goal("16 at a time, requests/s", "requests", NGINX, False, 0.4, "x nginx"),
    Goal("16 streams, events/s", "events", NGINX, False, 0.8, "x nginx"),
    Goal("64 live streams, first event", "live_first_ms", NGINX, True, 3.0, "x nginx"),
    Goal("400 kB prompt", "big_ms", NGINX, True, 1.6, "x nginx"),
    Goal("16 at a time, requests/s", "requests", PEER, False, 20.0, "x peer"),
    Goal("16 streams, events/s", "events", PEER, False, 20.0, "x peer"),
    Goal("boot to first answer", "boot_ms", None, True, 200.0, "ms"),
    Goal("idle memory", "idle_mb", None, True, 25.0, "MB"),
    Goal("llmstack.pyz version", "version_ratio", PYZ, True, 2.0, "x python -c pass"),
)
SWAP_GOALS = (
    Goal("added latency, one at a time", "added_ms", SWAP, True, 0.4, "x llama-swap"),
    Goal("16 at a time, requests/s", "requests", SWAP, False, 2.0, "x llama-swap"),
    Goal("16 streams, events/s", "events", SWAP, False, 1.5, "x llama-swap"),
    Goal("64 live streams, first event", "live_first_ms", SWAP, True, 1.0, "x llama-swap"),
    Goal("memory after a round", "busy_mb", SWAP, True, 0.25, "x llama-swap"),
)
PASS, MISS, UNKNOWN = "PASS", "MISS", "NOT MEASURED"


class Outcome(NamedTuple):
    """A goal with what was measured: *value* is the median, *low* and *high* the extremes of the rounds."""

    goal: Goal
    verdict: str
    value: Optional[float] = None
    low: Optional[float] = None
    high: Optional[float] = None


class Results:
    """Every sample of the run: a round is measure -> subject -> value, with no entry for what failed."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, dict[str, float]]] = []
        self.failures: list[str] = []

    def add(self, subject: str, values: dict[str, float]) -> None:
        """File *values* (measure -> value) of *subject* under the last round."""
        for key, value in values.items():
            self.rounds[-1].setdefault(key, {})[subject] = value

    def attempt(self, subject: str, what: str, measure: Callable[..., dict[str, float]], *arguments: Any) -> bool:
        """File what *measure* returns for *subject*, or its failure; return whether it succeeded."""
        try:
            self.add(subject, measure(*arguments))
        except (SubjectError, OSError) as error:
            self.failures.append(f"{subject}, round {len(self.rounds)}, {what}: {error}")
            return False
        return True

    def samples(self, key: str, subject: str) -> list[float]:
        """What the rounds hold of one measure of one subject."""
        return [each[key][subject] for each in self.rounds if subject in each.get(key, {})]

    def median(self, key: str, subject: str) -> Optional[float]:
        """The median over the rounds, or None if nothing was measured."""
        found = self.samples(key, subject)
        return statistics.median(found) if found else None

    def ratios(self, key: str, subject: str, rival: str) -> list[float]:
        """*subject* / *rival* within each round; a round without a positive rival has no ratio."""
        pairs = [each[key] for each in self.rounds if {subject, rival} <= each.get(key, {}).keys()]
        return [pair[subject] / pair[rival] for pair in pairs if pair[rival] > 0]


# ---- the measures


def measure_requests(port: int, effort: Effort) -> dict[str, float]:
    """Small requests, 16 at a time."""
    done, taken_s = keep_asking(port, STREAMS, BURST, 0, effort.requests_s)
    return {"requests": len(done) / taken_s}


def measure_streams(port: int, effort: Effort) -> dict[str, float]:
    """16 streams of 500 events, sent as fast as they are taken."""
    done, taken_s = keep_asking(port, STREAMS, BURST, STREAM_EVENTS, effort.streams_s)
    return {"events": STREAM_EVENTS * len(done) / taken_s}


def measure_event_cpu(child: Child, port: int, effort: Effort) -> dict[str, float]:
    """The same, by what an event costs the subject: the stub sends no faster than it can, whoever stands between."""
    before_s = child.processor_s()
    done, _ = keep_asking(port, STREAMS, BURST, STREAM_EVENTS, effort.streams_s)
    used_s = child.processor_s() - before_s
    return {"event_cpu_us": used_s * 1e6 / (STREAM_EVENTS * len(done))} if used_s else {}


def measure_live(port: int, _effort: Effort) -> dict[str, float]:
    """64 streams that start together and have an event every 5 ms each."""
    done, taken_s = keep_asking(port, LIVE_STREAMS, LIVE, LIVE_EVENTS, 0.0)
    first_ms = [each.first_event_s * 1e3 for each in done]
    return {"live_events": LIVE_EVENTS * len(done) / taken_s, "live_first_ms": statistics.median(first_ms),
            "live_first_max_ms": max(first_ms)}


def measure_memory(child: Child) -> dict[str, float]:
    """What the subject holds once a round's work is behind it, and the most it ever held."""
    now, most = child.memory_bytes()
    return {"busy_mb": now / 1e6, "most_mb": most / 1e6} if most else {}


# ---- the subjects

NGINX_CONFIG = """\
daemon off; worker_processes 1; {user}
pid {directory}/nginx.pid; error_log {directory}/nginx.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_max_body_size 64m; client_body_buffer_size 1m; client_body_temp_path {directory}/nginx-body;
    proxy_temp_path {directory}/nginx-proxy; fastcgi_temp_path {directory}/nginx-fastcgi;
    uwsgi_temp_path {directory}/nginx-uwsgi; scgi_temp_path {directory}/nginx-scgi;
    keepalive_requests 1000000000;
    upstream stub {{ server {host}:{upstream}; keepalive 128; keepalive_requests 1000000000; }}
    server {{
        listen {host}:{port} backlog=1024;
        location / {{ proxy_pass http://stub; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }}
    }}
}}
"""

PEER_FACTS = """\
import importlib.metadata, json, platform, llmstack.paths
print(json.dumps([importlib.metadata.version("opencode-llmstack"), platform.python_version(),
                  str(llmstack.paths.MODELS_INI_TEMPLATE)]))
"""

# Release 0.12.0 has no setting for the port of its upstream, only this constant, which app.py copies when
# it is imported. Everything else is its own `python -m llmstack.app`.
PEER_LAUNCH = """\
import sys
from llmstack import paths
paths.SWAP_PORT = int(sys.argv.pop(1))
from llmstack.app import main
main()
"""


def find_nginx() -> str:
    """Return the path of nginx; raise SubjectError if there is none."""
    found = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
    if not found:
        raise SubjectError("no nginx on PATH or in /usr/sbin")
    return found


def start_nginx(children: Children, nginx: str, upstream: int) -> Subject:
    """Start nginx with one worker; it takes no port 0, so a port lost to another program is tried anew."""
    directory = children.directory
    # As root, nginx would run its worker as nobody, to whom the directory of the run is closed.
    user = f"user {getpass.getuser()} {grp.getgrgid(os.getegid()).gr_name};" if os.geteuid() == 0 else ""
    for attempts_left in (2, 1, 0):
        port = free_port()
        (directory / "nginx.conf").write_text(
            NGINX_CONFIG.format(directory=directory, host=HOST, port=port, upstream=upstream, user=user))
        command = [nginx, "-p", str(directory), "-c", str(directory / "nginx.conf")]
        child = children.start(Launch(NGINX, command, {}, "stderr", ""))
        try:
            child.wait_for_answer(port)
            return Subject(NGINX, port, child)
        except SubjectError:
            children.stop(child)
            if not attempts_left or "Address already in use" not in (directory / "nginx.log").read_text():
                raise
    raise AssertionError("unreachable")


def start_peer(children: Children, python: Optional[str], upstream: int) -> tuple[Subject, str]:
    """Start the peer's router as its own `start` does, with its bundled models.ini; return its version, too."""
    if not python:
        raise SubjectError("no --peer PYTHON given")
    output = output_of([python, "-c", PEER_FACTS], cwd=children.directory, env=children.env)
    version, python_version, models_ini = json.loads(output)
    command = [python, "-c", PEER_LAUNCH, str(upstream), "--host", HOST, "--port", "0"]
    subject = start(children, PEER, command, "stderr", r"running on http://[^\s/:]+:(\d+)",
                    {"LLMSTACK_MODELS_INI": str(models_ini)}, has_boot=True)
    return subject, f"opencode-llmstack {version} on Python {python_version}"


def router_command(options: argparse.Namespace) -> list[str]:
    """Return what `serve` is appended to."""
    if options.router:
        return shlex.split(options.router)
    script = Path(options.pyz).resolve() if options.pyz else REPOSITORY / "llmstack.py"
    if not script.is_file():
        raise SetupError(f"there is no {script} (name one with --pyz FILE or --router 'CMD ...')")
    return [sys.executable, str(script)]


def find_pyz(children: Children, given: Optional[str]) -> Path:
    """Return the .pyz: the *given* one, or one built from a copy of the repository."""
    if given:
        return Path(given).resolve()
    if not (REPOSITORY / "build_zipapp.py").is_file():
        raise SubjectError("no --pyz FILE given and no build_zipapp.py to build one with")
    copy = children.directory / "build"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.pyz"))
    output_of([sys.executable, "build_zipapp.py"], cwd=copy, env=children.env)
    built = sorted(copy.rglob("*.pyz"))
    if not built:
        raise SubjectError("build_zipapp.py left no .pyz")
    return built[0]


# ---- the run


def measure_boot(children: Children, launch: Launch) -> dict[str, float]:
    """A fresh server up to its first answer, and its memory then."""
    child = children.start(launch)
    try:
        child.wait_for_answer(child.wait_for_port())
        taken_s = time.perf_counter() - child.started_s
        return {"boot_ms": taken_s * 1e3, "idle_mb": child.resident_bytes() / 1e6}
    finally:
        children.stop(child)


def measure_version(children: Children, pyz: Path, effort: Effort) -> dict[str, float]:
    """`llmstack.pyz version` and a bare Python, one after the other."""
    taken_s: dict[str, list[float]] = {"bare": [], "pyz": []}
    commands = {"bare": [sys.executable, "-c", "pass"], "pyz": [sys.executable, str(pyz), "version"]}
    for _ in range(effort.versions):
        for name, command in commands.items():
            start_s = time.perf_counter()
            output_of(command, cwd=children.directory, env=children.env)
            taken_s[name].append(time.perf_counter() - start_s)
    medians = {name: statistics.median(values) for name, values in taken_s.items()}
    return {"version_ms": medians["pyz"] * 1e3, "version_ratio": medians["pyz"] / medians["bare"]}


class Field(NamedTuple):
    """Who takes part, and who does not and why."""

    subjects: list[Subject]
    pyz: Optional[Path]
    versions: dict[str, str]
    missing: dict[str, str]
    rewrites: dict[str, str]  # subject -> the model the stub was asked for, where the client said "auto"
    goals: Sequence[Goal] = GOALS


def gather_field(children: Children, options: argparse.Namespace) -> Field:
    """Start every subject; only the stub and llmstack are indispensable."""
    command = router_command(options)
    versions, missing, pyz = {}, {}, None
    try:
        direct = start(children, DIRECT, [sys.executable, str(REPOSITORY / "tests" / "bench" / "stub.py")])
        serve = ["serve", "--upstream", f"http://{HOST}:{direct.port}", "--host", HOST, "--port", "0"]
        subjects = [direct, start(children, LLMSTACK, [*command, *serve], has_boot=True)]
        rewrites = {each.name: check_relay(each.port) for each in subjects}
    except SubjectError as error:
        raise SetupError(f"cannot start the stub and {shlex.join(command)!r}: {error}") from None
    try:
        nginx = find_nginx()
        versions[NGINX] = output_of([nginx, "-v"]).rpartition("/")[2]
        subjects.insert(1, start_nginx(children, nginx, direct.port))
    except SubjectError as error:
        missing[NGINX] = str(error)
    try:
        peer, versions[PEER] = start_peer(children, options.peer, direct.port)
        subjects.append(peer)
        rewrites[PEER] = check_relay(peer.port)
    except SubjectError as error:
        missing[PEER] = str(error)
    try:
        pyz = find_pyz(children, options.pyz)
    except SubjectError as error:
        missing[PYZ] = str(error)
    return Field(subjects, pyz, versions, missing, rewrites)


def gather_chains(children: Children, options: argparse.Namespace) -> Field:
    """Start the chains of --swap."""
    try:
        version = output_of([options.swap, "-version"])
        server = write_server(children.directory)
        direct = start(children, DIRECT, [sys.executable, str(REPOSITORY / "tests" / "bench" / "stub.py")])
        subjects = [
            direct,
            start_swap(children, options.swap, server),
            start_chain(children, LLMSTACK, router_command(options), server),
        ]
        rewrites = {each.name: check_relay(each.port) for each in subjects}
    except SubjectError as error:
        raise SetupError(str(error)) from None
    return Field(subjects, None, {SWAP: version}, {}, rewrites, SWAP_GOALS)


class _Latency:
    """Requests sent one after the other over one connection to one subject."""

    def __init__(self, subject: Subject, prompt: str) -> None:
        self.subject, self._prompt = subject, prompt
        self._sock = connect(subject.port)
        self.taken_s: list[float] = []

    def ask(self, seconds: float) -> dict[str, float]:
        """Go on for so long; the first answers are the warm-up's."""
        end_s = time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            self.taken_s.append(exchange(self._sock, self._prompt, self.subject.port))
        return {}

    def close(self) -> None:
        self._sock.close()


def _take_latencies(results: Results, subjects: Sequence[Subject], key: str, prompt: str, seconds: float) -> None:
    """File the p50 of each subject, in slices that go around them; a first slice is not counted."""
    with contextlib.ExitStack() as stack:
        runs = [_Latency(each, prompt) for each in subjects]
        for each in runs:
            stack.callback(each.close)
        for number in range(SLICES + 1):
            runs = [each for each in runs if results.attempt(each.subject.name, key, each.ask, seconds / SLICES)]
            if not number:
                for each in runs:
                    each.taken_s.clear()
        for each in runs:
            results.add(each.subject.name, {key: statistics.median(each.taken_s) * 1e3})


def _verify(port: int) -> dict[str, float]:
    check_relay(port)
    return {}


def _run_round(children: Children, field: Field, effort: Effort, results: Results, first: int) -> None:
    """Take every measure once over every subject, beginning with the subject number *first*."""
    results.rounds.append({})
    turn = first % len(field.subjects)
    order = [*field.subjects[turn:], *field.subjects[:turn]]
    sound = [each for each in order if results.attempt(each.name, "check_relay", _verify, each.port)]
    _take_latencies(results, sound, "one_ms", BURST, effort.one_s)
    for measure in (measure_requests, measure_streams, measure_live):
        for each in sound:
            results.attempt(each.name, measure.__name__, measure, each.port, effort)
    for each in sound:
        results.attempt(each.name, "measure_event_cpu", measure_event_cpu, each.child, each.port, effort)
    _take_latencies(results, sound, "big_ms", BIG_PROMPT, effort.big_s)
    for each in sound:
        results.attempt(each.name, "measure_memory", measure_memory, each.child)
    for each in order:
        if each.has_boot:
            results.attempt(each.name, "measure_boot", measure_boot, children, each.child.launch)
    if field.pyz:
        results.attempt(LLMSTACK, "measure_version", measure_version, children, field.pyz, effort)
    latencies = results.rounds[-1].get("one_ms", {})
    if DIRECT in latencies:
        for name in latencies.keys() - {DIRECT}:
            results.add(name, {"added_ms": latencies[name] - latencies[DIRECT]})


def run_rounds(children: Children, field: Field, rounds: int, effort: Effort) -> Results:
    """Run a short warm-up that counts for nothing, then the rounds."""
    _run_round(children, field, QUICK, Results(), first=0)
    results = Results()
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", file=sys.stderr, flush=True)
        _run_round(children, field, effort, results, first=number)
    if results.failures:
        results.failures += [f"{each.name}, last on stderr: {each.child.last_words()}" for each in field.subjects]
    return results


def judge(goal: Goal, results: Results, missing: Container[str]) -> Outcome:
    """Return how llmstack did against *goal*; rounds that llmstack failed are not left out, but a miss."""
    ours = results.samples(goal.measure, LLMSTACK)
    values = results.ratios(goal.measure, LLMSTACK, goal.needs) if goal.needs in RIVALS else ours
    if goal.needs in missing or (ours and not values):
        return Outcome(goal, UNKNOWN)
    if not values:
        return Outcome(goal, MISS)
    value = statistics.median(values)
    is_met = value <= goal.limit if goal.at_most else value >= goal.limit
    is_whole = len(ours) == len(results.rounds)
    return Outcome(goal, PASS if is_met and is_whole else MISS, value, min(values), max(values))


# ---- the report


def describe_machine(field: Field) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": _cpu_model(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
        **field.versions,
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found.group(1)
    with contextlib.suppress(SubjectError):
        return output_of(["sysctl", "-n", "machdep.cpu.brand_string"])
    return platform.processor() or "unknown CPU"


def render_text(machine: dict[str, Any], field: Field, results: Results, outcomes: Sequence[Outcome]) -> str:
    """Return the report for people."""
    rivals = [f"{name}: {field.versions.get(name, 'NOT MEASURED')}" for name in RIVALS
              if name in field.versions or name in field.missing]
    lines = [
        "machine: {usable_cores} of {cores} cores, {cpu}; {system}; load {load_before}".format(**machine),
        f"python:  {machine['python']}; rivals: {'; '.join(rivals)}",
    ]
    if machine["load_before"] > machine["usable_cores"] / 2:
        lines.append("warning: other programs were at work at the start; measure again on a quiet machine")
    lines += [f'auto:    {name} asked the stub for "{model}"' for name, model in field.rewrites.items()]
    names = [subject.name for subject in field.subjects]
    lines += ["", f"medians, rounds: {len(results.rounds)}", " " * 44 + "".join(f"{name:>12}" for name in names)]
    for key, label, unit, digits in MEASURES:
        medians = [results.median(key, name) for name in names]
        if not any(medians):
            continue
        cells = ["-" if value is None else f"{value:,.{digits}f}" for value in medians]
        lines.append(f"{label:32}{unit:>12}" + "".join(f"{cell:>12}" for cell in cells))
    lines += ["", "goals (llmstack; the extremes of the rounds in brackets)"]
    for goal, verdict, value, low, high in outcomes:
        line = f"{verdict:13} {goal.text:30} {'<=' if goal.at_most else '>='} {f'{goal.limit:g} {goal.unit}':19}"
        lines.append(line.rstrip() if value is None else f"{line} {value:8.2f}  ({low:.2f} to {high:.2f})")
    lines += [f"not measured: {name}: {reason}" for name, reason in field.missing.items()]
    lines += [f"failed: {failure}" for failure in results.failures]
    return "\n".join(lines)


def render_json(machine: dict[str, Any], field: Field, results: Results, outcomes: Sequence[Outcome]) -> str:
    """Return the report as one JSON object."""
    names = [subject.name for subject in field.subjects]
    measures = {key: {"label": label.strip(), "unit": unit, "medians": {name: results.median(key, name) for name in names},
                      "rounds": {name: results.samples(key, name) for name in names}} for key, label, unit, _ in MEASURES}
    goals = [{**outcome._asdict(), "goal": outcome.goal._asdict()} for outcome in outcomes]
    return json.dumps({"machine": machine, "missing": field.missing, "rewrites": field.rewrites, "rounds": len(results.rounds),
                       "measures": measures, "goals": goals, "failures": results.failures}, indent=2)


# ---- the start


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds to run (default 5; 2 with --quick)")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that can import opencode-llmstack")
    parser.add_argument("--pyz", metavar="FILE", help="serve from this .pyz instead of llmstack.py")
    parser.add_argument("--router", metavar="CMD", help="serve with this command instead of llmstack.py")
    parser.add_argument("--swap", metavar="PATH", help="measure whole chains, beside this llama-swap")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="shorter measures, fewer rounds: a smoke test")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    options = parser.parse_args(argv)
    rounds = options.rounds if options.rounds is not None else (2 if options.quick else 5)
    if rounds < 1:
        parser.error("--rounds: at least 1")
    try:
        with children_of_run() as children:
            gather = gather_chains if options.swap else gather_field
            field = gather(children, options)
            machine = describe_machine(field)
            results = run_rounds(children, field, rounds, QUICK if options.quick else FULL)
    except SetupError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 2
    outcomes = [judge(goal, results, field.missing) for goal in field.goals]
    print((render_json if options.json else render_text)(machine, field, results, outcomes))
    return 1 if options.check and any(outcome.verdict == MISS for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
