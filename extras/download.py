"""Fetch the models, in the background.

Fetch current and queued GGUFs into the hub cache that llama-server reads, one after another, in the
background; on a terminal, show it until it is done. What was interrupted goes on where it ended.
HF_TOKEN in the environment opens gated repositories.

examples:
  llmstack download                         # all models of this project
  llmstack download code-fast --wait        # one, until it is here
"""

from __future__ import annotations

import collections
import contextlib
import difflib
import functools
import http.client
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

HUB_PATIENCE_S = 3                              # a closed network should hold up nobody
MAX_API_BYTES = 64 << 20                        # of an answer of the hub's API
GO_ON = "run `llmstack download` again: it goes on from there"


# ---- what is to be fetched


def hub_api(path: str, env: Mapping[str, str], form: Optional[Mapping[str, Any]],
            llmstack: Any) -> Any:
    """A JSON answer of the hub's API. Errors: UserError where it cannot be had; HTTPError."""
    token, endpoint = llmstack.hub_token(env), llmstack.hub_endpoint(env)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    data = urllib.parse.urlencode(form, doseq=True).encode() if form else None
    url = f"{endpoint}/api/models/{path}"
    try:
        with llmstack.open_url(url, headers, "the model hub", data) as answer:
            return json.loads(answer.read(MAX_API_BYTES).decode("utf-8", "replace"))
    except urllib.error.HTTPError:
        raise
    except (ValueError, RecursionError, http.client.HTTPException, OSError) as exc:
        raise llmstack.UserError(f"{endpoint} does not answer like a model hub: {exc}",
                                 "see HF_ENDPOINT") from None


def named_tiers(config: Any, names: Sequence[str], llmstack: Any) -> List[Any]:
    """The tiers of these names, in the configuration's order. Errors: UserError for no tier's."""
    known = [name for tier in config.tiers for name in tier.names]
    asked = set()
    for name in names:
        tier = config.by_name(name)
        if tier is None:
            what = f"there is no tier {llmstack.unknown_word(name, known)}"
            names_of_all = ", ".join(t.name for t in config.tiers)
            raise llmstack.UserError(what, f"the tiers of models.ini are {names_of_all}", 2)
        asked.add(tier.name)
    return [tier for tier in config.tiers if tier.name in asked]


# Repository -> files of it, each once, in the order in which they are wanted.
RepoFiles = Dict[str, Dict[str, None]]


def tier_files(tier: Any, llmstack: Any) -> RepoFiles:
    """What a local tier needs of the hub on its channel; its model's repository is the first."""
    weights = llmstack.weights_for(tier)
    wanted: RepoFiles = {}
    for repo, file in [(weights.repo, weights.file), *llmstack.hub_files(tier)]:
        if repo:
            parts = dict.fromkeys(llmstack.split_parts(file))
            wanted.setdefault(repo, {}).update(parts)
    return wanted


def project_files(config: Any, llmstack: Any) -> RepoFiles:
    """What all tiers need, on either channel."""
    wanted: RepoFiles = {}
    for tier in llmstack.local_tiers(config):
        for channel in ("current", "next"):
            for repo, files in tier_files(tier.on_channel(channel), llmstack).items():
                wanted.setdefault(repo, {}).update(files)
    return wanted


def tier_jobs(tier: Any, label: str, wanted: RepoFiles, llmstack: Any) -> List[Any]:
    """A tier's model with what it needs of the same repository, then what it needs of others."""
    jobs: List[Any] = []
    for repo, files in tier_files(tier.on_channel(label), llmstack).items():
        beside = tuple(file for file in wanted[repo] if file not in files)
        suffix = f".more{len(jobs)}" if jobs else ""
        jobs.append(llmstack.Job(tier.name + suffix, label, repo, tuple(files), beside))
    return jobs


def plan_downloads(config: Any, names: Sequence[str],
                   labels: Sequence[str], llmstack: Any) -> Tuple[List[Any], List[str]]:
    """(what to fetch, why the other tiers are left out): every current file first, then the queued.

    `names` are tiers or aliases, all tiers when empty. Errors: UserError for a name that is none.
    """
    tiers = list(config.tiers)
    if names:
        tiers = named_tiers(config, names, llmstack)
    wanted = project_files(config, llmstack)
    jobs: List[Any] = []
    skipped: List[str] = []
    for label in labels:
        for tier in tiers:
            weights = llmstack.weights_for(tier.on_channel(label))
            if tier.backend != "gguf":
                skipped.append(f"{tier.name} is hosted, so there is nothing to fetch")
            elif weights.path:
                skipped.append(f"{tier.name} is on this disk already: {weights.path}")
            elif weights.channel == label:
                jobs += tier_jobs(tier, label, wanted, llmstack)
    return jobs, list(dict.fromkeys(skipped))


# ---- the worker: one process a project, started by `download` and left alone
#
# Its queue is .llmstack/downloads.json, its pid file .llmstack/download.pid. Both are written under
# one lock, so a job that is added is either seen by the worker that is about to end, or starts
# another.


def queue_lock(places: Any, llmstack: Any) -> Any:
    return llmstack.FileLock(places.in_state("downloads.lock"), lambda: None)


def write_queue(places: Any, queue: Mapping[str, Mapping[str, Any]], llmstack: Any) -> None:
    llmstack.write_atomic(llmstack.queue_file(places), json.dumps(queue, indent=1))


def set_state(places: Any, name: str, llmstack: Any, **values: Any) -> None:
    with queue_lock(places, llmstack):
        jobs = llmstack.read_queue(places)
        if name in jobs:
            jobs[name].update(values)
            write_queue(places, jobs, llmstack)


def next_job(places: Any, llmstack: Any) -> Optional[Any]:
    """The next of the queue, marked as running; None for none, and the worker is to end."""
    with queue_lock(places, llmstack):
        queue = llmstack.read_queue(places)
        for row in queue.values():
            if row["state"] in llmstack.UNFINISHED:
                row.update(state="running", error="")
                write_queue(places, queue, llmstack)
                return llmstack.parse_job(row)
        with contextlib.suppress(OSError):
            os.unlink(places.in_state("download.pid"))
        return None


def job_log(places: Any, name: str, llmstack: Any) -> Callable[[str], None]:
    """What writes a line, with the time, to a new log of a job."""
    path = places.log(f"dl-{name}.log")
    llmstack.shift_logs(path)

    def note(line: str) -> None:
        with os.fdopen(llmstack.open_log(path), "a", encoding="utf-8") as file:
            file.write(time.strftime("%Y-%m-%dT%H:%M:%S ") + line + "\n")

    return note


def fail_all(places: Any, why: Any, llmstack: Any) -> None:
    """Every job that waits fails for the same reason, which is no other's fault."""
    with queue_lock(places, llmstack):
        queue = llmstack.read_queue(places)
        for row in queue.values():
            if row["state"] in llmstack.UNFINISHED:
                row.update(state="failed", error=str(why), hint=why.hint)
        write_queue(places, queue, llmstack)


def nearest_files(repo: str, file: str, env: Mapping[str, str], llmstack: Any) -> str:
    """`; it has ...` with the names in a repository that are nearest to one it does not have."""
    try:
        rows = hub_api(f"{repo}/tree/main?recursive=true", env, None, llmstack)
        names = [row["path"] for row in rows if row["path"].endswith(".gguf")]
    except (llmstack.UserError, OSError, LookupError, TypeError, AttributeError):
        return ""
    near = difflib.get_close_matches(file, names, 3, 0.4) or names[:3]
    if not near:
        return "; it has no GGUF file at all"
    return f"; it has {llmstack.visible(', '.join(near))}"


def with_projector(job: Any, env: Mapping[str, str], llmstack: Any) -> Any:
    """A job with the file of its repository that ANY_PROJECTOR means there.

    Where it has none, or does not tell, the file is left out. Errors: Unreachable.
    """
    if llmstack.ANY_PROJECTOR not in job.files + job.beside:
        return job
    found = ""
    try:
        rows = hub_api(f"{job.repo}/tree/main?recursive=true", env, None, llmstack)
        found = llmstack.choose_projector(str(row["path"]) for row in rows)
    except llmstack.Unreachable:
        raise
    except (llmstack.UserError, OSError, LookupError, TypeError):
        pass                                    # fetching says what is wrong with the repository

    def named(files: Tuple[str, ...]) -> Tuple[str, ...]:
        names = [found if file == llmstack.ANY_PROJECTOR else file for file in files]
        return tuple(dict.fromkeys(filter(None, names)))

    return job._replace(files=named(job.files), beside=named(job.beside))


def guest_events(command: Sequence[str], wanted: Mapping[str, Any]) -> Iterator[Dict[str, Any]]:
    """What the hub's guest says while it fetches: see share/guests/hub_download.py.

    The guest ends when its standard input does, so it does not outlive a worker that is killed.
    """
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        assert guest.stdin is not None
        assert guest.stdout is not None
        guest.stdin.write(json.dumps(wanted).encode() + b"\n")
        guest.stdin.flush()
        yield from map(json.loads, guest.stdout)


def fetch_job(job: Any, data: str, env: Mapping[str, str], note: Callable[[str], None],
              tell: Callable[..., None], llmstack: Any) -> int:
    """Have the hub's guest bring all files of a job into the cache; their bytes together.

    Errors: UserError, Unreachable.
    """
    wants_projector = llmstack.ANY_PROJECTOR in job.files
    job = with_projector(job, env, llmstack)
    if wants_projector and not llmstack.choose_projector(job.files):
        note(f"{job.repo} has no {llmstack.ANY_PROJECTOR}: mmproj = auto finds nothing there")
    cache, endpoint = llmstack.hub_cache_dir(env), llmstack.hub_endpoint(env)
    note(f"{job.repo}: {', '.join(job.files)}, from {endpoint} into {cache}")
    wanted = {**job._asdict(), "cache": cache, "endpoint": endpoint}
    python = llmstack.environment_program(llmstack.HUB, data)
    command = llmstack.guest_command(python, "hub_download")
    event: Dict[str, Any] = {}
    for event in guest_events(command, wanted):
        if "say" in event:
            note(llmstack.visible(event["say"]))
        elif "part" in event:
            tell(**event)
        elif "size" in event:
            words = llmstack.progress_words(event["bytes"], event["size"], event["rate"])
            note(f"{event['file']}: {words}")
    # Its last event is how it has ended.
    if "done" in event:
        return int(event["done"])
    what = event.get("failed", "huggingface_hub has ended in the middle")
    if event.get("lacks"):
        what += nearest_files(job.repo, event["lacks"], env, llmstack)
    kind = llmstack.Unreachable if event.get("unreachable") else llmstack.UserError
    raise kind(llmstack.visible(what), llmstack.visible(event.get("hint", GO_ON)))


def failure_words(error: str, hint: str) -> str:
    """`failed: what (what to do)`, as the log of a download says it."""
    if not hint:
        return f"failed: {error}"
    return f"failed: {error} ({hint})"


def run_downloads(places: Any, env: Mapping[str, str], llmstack: Any) -> int:
    """The worker: fetch one queued job after another until none is left; 1 when one has failed."""
    code = 0
    while True:
        job = next_job(places, llmstack)
        if job is None:
            return code
        note = job_log(places, job.name, llmstack)
        tell = functools.partial(set_state, places, job.name, llmstack)
        try:
            size = fetch_job(job, places.data, env, note, tell, llmstack)
        except llmstack.Unreachable as exc:
            code = 1
            note(failure_words(str(exc), exc.hint))
            fail_all(places, exc, llmstack)
        # One file that fails, for whatever reason, does not stop those behind it.
        except Exception as exc:
            code = 1
            what = llmstack.visible(str(exc)) or type(exc).__name__
            hint = getattr(exc, "hint", "")
            tell(state="failed", error=what, hint=hint)
            note(failure_words(what, hint))
        else:
            tell(state="done", bytes=size)
            note(f"done: {size:,} bytes (download done)")


# ---- its start and its end


def left_over(queue: Mapping[str, Dict[str, Any]], known: Sequence[Any],
              llmstack: Any) -> Dict[str, Dict[str, Any]]:
    """The queue of a worker that has ended, as the next one finds it."""
    left = {}
    for name, row in queue.items():
        if row["state"] not in llmstack.UNFINISHED:
            left[name] = row
        elif llmstack.parse_job(row) in known:
            left[name] = {**row, "state": "queued"}
    return left


def spawn_worker(places: Any, env: Mapping[str, str], llmstack: Any) -> Any:
    """Start the worker, which stays. It needs the hub's token and no other credential."""
    log = places.log("download.log")
    llmstack.shift_logs(log)
    settings = llmstack.without_credentials(env)
    settings.pop("LLMSTACK_API_KEY", None)
    settings.update({
        "LLMSTACK_WORK_DIR": places.work,
        "LLMSTACK_DATA_DIR": places.data,
        "HF_ENDPOINT": llmstack.hub_endpoint(env),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    })
    record = llmstack.Record(0, "", llmstack.new_mark(places.project, "download"), kind="download")
    command = [sys.executable, llmstack.PROGRAM, "_download"]
    process, worker = llmstack.spawn_recorded(command, log, settings,
                                              places.in_state("download.pid"), record)
    # The worker stays; Popen is not to warn of that.
    process.returncode = 0
    return worker


def start_downloads(places: Any, jobs: Sequence[Any], known: Sequence[Any],
                    env: Mapping[str, str], say: Callable[[str], None], llmstack: Any) -> int:
    """Queue jobs and see that a worker runs; its pid. Errors: UserError.

    What a killed worker has left is taken up again where it is still one of the `known` jobs of
    models.ini: a cloned directory may have brought a queue along, and links that logs would follow.
    """
    llmstack.check_links(places)
    llmstack.install_environment(llmstack.HUB, places.data, say)
    # Where share/ is missing this fails here, not unseen in the worker.
    llmstack.guest_command(llmstack.environment_program(llmstack.HUB, places.data), "hub_download")
    with queue_lock(places, llmstack):
        queue = llmstack.read_queue(places)
        worker = llmstack.download_worker(places)
        if worker is None:
            queue = left_over(queue, known, llmstack)
        for job in jobs:
            state = queue.get(job.name, {}).get("state")
            if worker is None or state not in llmstack.UNFINISHED:
                # A job that is asked for again goes to the end of the queue.
                queue.pop(job.name, None)
                queue[job.name] = {**job._asdict(), "state": "queued"}
        write_queue(places, queue, llmstack)
        if worker is None:
            worker = spawn_worker(places, env, llmstack)
        return int(worker.pid)


def stop_downloads(places: Any, llmstack: Any) -> bool:
    """End the worker; what it has got so far is kept. True when there was one."""
    worker = llmstack.download_worker(places)
    if worker is not None:
        llmstack.stop_recorded(worker, places.project, llmstack.STOP_GRACE_S)
    with queue_lock(places, llmstack):
        if os.path.exists(llmstack.queue_file(places)):
            queue = left_over(llmstack.read_queue(places), (), llmstack)
            write_queue(places, queue, llmstack)
        with contextlib.suppress(OSError):
            os.unlink(places.in_state("download.pid"))
    return worker is not None


# ---- what is shown of it


class Bar:
    """How far a download is, in the words of one line; it remembers how fast that went."""

    def __init__(self, llmstack: Any) -> None:
        self._progress_words = llmstack.progress_words
        self._samples: Any = collections.deque(maxlen=50)       # (time, bytes) of one file
        self._file = ""

    def note(self, row: Mapping[str, Any], now_s: float) -> None:
        """Remember where a running download is now."""
        if row["file"] != self._file:
            self._file = row["file"]
            self._samples.clear()
        self._samples.append((now_s, row["bytes"]))

    def line(self, row: Mapping[str, Any], behind: int, last: str, columns: int) -> str:
        """`row`: a download noted before; `behind`: how many wait; `last`: its log's last line."""
        began, start = self._samples[0]
        now, have = self._samples[-1]
        stands = have == start and len(self._samples) > 15
        if stands and ("trying again" in last or "waiting" in last):
            return last.partition(" ")[2]
        total = row["total_bytes"]
        share = min(have / total, 1.0) if total else 0.0
        waiting = f" (+{behind})" if behind > 0 else ""
        rate = (have - start) / max(now - began, 0.001)
        words = f"{share * 100:3.0f} %{waiting} {self._progress_words(have, total, rate)}"
        name = f"{row['tier']}-{row['label']}"
        width = min(columns - len(name) - len(words) - len(" [] "), 24)
        if width < 4:                           # in a narrow terminal the words say it alone
            return f"{name} {words}"
        done = "#" * int(share * width)
        return f"{name} [{done:<{width}}] {words}"


def ended_words(row: Mapping[str, Any], llmstack: Any) -> str:
    """How a download has ended, "" while it goes on. `row`: of download_rows, {} for none."""
    state = row.get("state", "stopped")
    if state in ("queued", "running"):
        return ""
    if state == "done":
        return f"done, {llmstack.progress_words(row['bytes'], 0, 0)}"
    error, hint = f"the worker was {state}", GO_ON
    if state == "failed":
        error, hint = row["error"], row["hint"]
    return failure_words(error, hint)


def group_by_end(rows: Mapping[str, Mapping[str, Any]],
                 names: Iterable[str], llmstack: Any) -> Dict[str, List[str]]:
    """How downloads have ended -> those that did so: a hub that is not there is said once."""
    ended: Dict[str, List[str]] = {}
    for name in names:
        words = ended_words(rows.get(name, {}), llmstack)
        if words:
            ended.setdefault(words, []).append(name)
    return ended


def running_line(places: Any, rows: Iterable[Mapping[str, Any]], bar: Bar, behind: int,
                 llmstack: Any) -> str:
    """What there is to say of the download that goes on now, "" where none does."""
    row = next((row for row in rows if row["state"] == "running"), None)
    if row is None:
        return ""
    bar.note(row, time.monotonic())
    log = places.log(f"dl-{row['tier']}-{row['label']}.log")
    return bar.line(row, behind, llmstack.tail_of(log, 1), llmstack.terminal_columns() - 1)


def watch_downloads(places: Any, names: Sequence[str], progress: Any, is_live: bool,
                    llmstack: Any) -> List[str]:
    """Show the named jobs until they have ended; those that failed."""
    bar = Bar(llmstack)
    left = list(names)
    failed: List[str] = []
    while left:
        rows = {f"{row['tier']}-{row['label']}": row for row in llmstack.download_rows(places)}
        for words, ended in group_by_end(rows, left, llmstack).items():
            progress.say(f"{', '.join(ended)}: {words}")
            left = [name for name in left if name not in ended]
            if words.startswith("failed"):
                failed += ended
        line = running_line(places, rows.values(), bar, len(left) - 1, llmstack)
        if left and line and is_live:
            progress.show(line)
        if left:
            time.sleep(0.2)
    return failed


def follow_downloads(places: Any, names: Sequence[str], say: Callable[[str], None],
                     llmstack: Any) -> List[str]:
    """Watch until the named jobs have ended; those that failed. On a terminal there is a bar.

    Errors: KeyboardInterrupt, once it has said that the worker goes on.
    """
    terminal = llmstack.live_terminal()
    try:
        with llmstack.Progress(say, terminal) as progress:
            return watch_downloads(places, names, progress, terminal is not None, llmstack)
    except KeyboardInterrupt:
        say("The download goes on in the background: `llmstack status` shows it,"
            " `llmstack download --wait` watches it, `llmstack download --stop` ends it.")
        raise


def reach_host(url: str, timeout_s: float) -> None:
    """Return once the host of `url` answers anything. Errors: OSError, in words.

    The look-up of its name counts, too: urllib's own timeout does not bound that.
    """
    found: List[str] = []                       # "" for an answer, else why there is none

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")  # noqa: S310
            urllib.request.urlopen(request, timeout=timeout_s).close()  # noqa: S310
            found.append("")
        except urllib.error.HTTPError:          # a refusal is an answer
            found.append("")
        except (OSError, ValueError, http.client.HTTPException) as exc:
            reason = getattr(exc, "reason", exc)
            found.append(getattr(reason, "strerror", None) or str(reason) or type(exc).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    why = found[0] if found else f"no answer within {timeout_s:g} s"
    if why:
        raise OSError(why)


def check_reached(what: str, url: str, llmstack: Any) -> None:
    """Return once a host answers, or say within seconds that it does not. Errors: Unreachable."""
    try:
        reach_host(url, HUB_PATIENCE_S)
    except OSError as exc:
        hint = "see that this machine is online (HTTPS_PROXY is honoured), then again"
        raise llmstack.Unreachable(f"{what} cannot be reached at {url}: {exc}", hint) from None


def stop_download(args: Any, places: Any, llmstack: Any) -> int:
    """`download --stop`. Errors: UserError."""
    if args.tiers or args.next or args.wait:
        raise llmstack.UserError("--stop ends the whole download, and takes nothing beside it",
                                 "see `llmstack download --help`", 2)
    if stop_downloads(places, llmstack):
        llmstack.say("Stopped; `llmstack download` goes on from there.")
    else:
        llmstack.say("Nothing is being downloaded.")
    return 0


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("download", __doc__)
    parser.add_argument("tiers", metavar="TIER", nargs="*",
                        help="tiers to fetch (default: all local ones)")
    parser.add_argument("--next", action="store_true",
                        help="the queued upgrades only (hf_file_next)")
    parser.add_argument("--wait", action="store_true",
                        help="wait until all is done, without a terminal, too")
    parser.add_argument("--stop", action="store_true",
                        help="end the background download; what it has is kept")
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    llmstack.refuse_external(places)
    if args.stop:
        return stop_download(args, places, llmstack)
    llmstack.seed_project(places, llmstack.say)
    config = llmstack.load_config(places, llmstack.warn)
    labels: Sequence[str] = ("current", "next")
    known, _ = plan_downloads(config, (), labels, llmstack)
    if args.next:
        labels = ("next",)
    jobs, skipped = plan_downloads(config, args.tiers, labels, llmstack)
    for line in skipped:
        llmstack.say(line)
    if not jobs:
        llmstack.say("Nothing to download.")
        return 0
    llmstack.check_links(places)
    # It is not installed for nothing.
    if not llmstack.environment_ready(llmstack.HUB, places.data):
        check_reached("the model hub", llmstack.hub_endpoint(places.env), llmstack)
    pid = start_downloads(places, jobs, known, places.env, llmstack.say, llmstack)
    many = jobs[0].name
    if len(jobs) > 1:
        many = f"{len(jobs)} models"
    logs = places.log("dl-TIER-LABEL.log")
    llmstack.say(f"Downloading {many} in the background (pid {pid}), logs: {logs}")
    # A script goes on at once; a person watches.
    if not args.wait and not sys.stdout.isatty():
        return 0
    failed = follow_downloads(places, [job.name for job in jobs], llmstack.say, llmstack)
    if failed:
        raise llmstack.UserError(f"not downloaded: {', '.join(failed)}",
                                 "mend what its line says, then run it again")
    return 0
