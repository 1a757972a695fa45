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
import http.client
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any, Callable, Dict, Iterable, List, Mapping, Sequence

HUB_PATIENCE_S = 3                              # a closed network should hold up nobody


class Bar:
    """The line of a terminal that is written over as a download goes on; nothing elsewhere."""

    def __init__(self, llmstack: Any) -> None:
        self.live = llmstack.is_live_terminal()
        self._progress_words = llmstack.progress_words
        self._samples: Any = collections.deque(maxlen=50)       # (time, bytes) of one file
        self._file = ""
        self._shown = ""

    def clear(self) -> None:
        if self._shown:
            sys.stdout.write("\r" + " " * len(self._shown) + "\r")
            self._shown = ""

    def show(self, row: Mapping[str, Any], behind: int, last: str) -> None:
        """`row`: the running download; `behind`: how many wait; `last`: its log's last line."""
        if row["file"] != self._file:
            self._file = row["file"]
            self._samples.clear()
        self._samples.append((time.monotonic(), row["bytes"]))
        columns = shutil.get_terminal_size().columns - 1
        line = self._line(row, behind, last, columns)[:columns]
        sys.stdout.write("\r" + line.ljust(len(self._shown)))
        sys.stdout.flush()
        self._shown = line

    def _line(self, row: Mapping[str, Any], behind: int, last: str, columns: int) -> str:
        began, start = self._samples[0]
        now, have = self._samples[-1]
        stands = have == start and len(self._samples) > 15
        if stands and ("trying again" in last or "waiting" in last):
            return last.partition(" ")[2]
        total = row["total_bytes"]
        share = min(have / total, 1.0) if total else 0.0
        rate = (have - start) / max(now - began, 0.001)
        words = f"{share * 100:3.0f} % {self._progress_words(have, total, rate)}"
        if behind > 0:
            words = f"{share * 100:3.0f} % (+{behind}) {self._progress_words(have, total, rate)}"
        name = f"{row['tier']}-{row['label']}"
        width = columns - len(name) - len(words) - len(" [] ")
        if width < 4:                           # the words say it, too
            return f"{name} {words}"
        width = min(width, 24)
        return f"{name} [{'#' * int(share * width):<{width}}] {words}"


def ended_words(row: Mapping[str, Any], llmstack: Any) -> str:
    """How a download has ended, "" while it goes on. `row`: of download_rows, {} for none."""
    state = row.get("state", "stopped")
    if state in ("queued", "running"):
        return ""
    if state == "done":
        return f"done, {llmstack.progress_words(row['bytes'], 0, 0)}"
    error, hint = f"the worker was {state}", llmstack.GO_ON
    if state == "failed":
        error, hint = row["error"], row["hint"]
    return str(llmstack.failure_words(error, hint))


def group_by_end(rows: Mapping[str, Mapping[str, Any]],
                 names: Iterable[str], llmstack: Any) -> Dict[str, List[str]]:
    """How downloads have ended -> those that did so: a hub that is not there is said once."""
    ended: Dict[str, List[str]] = {}
    for name in names:
        words = ended_words(rows.get(name, {}), llmstack)
        if words:
            ended.setdefault(words, []).append(name)
    return ended


def show_running(places: Any, rows: Iterable[Mapping[str, Any]], bar: Bar,
                 behind: int, llmstack: Any) -> None:
    """Show the download that goes on now on the terminal's last line."""
    row = next((row for row in rows if row["state"] == "running"), None)
    if bar.live and row:
        log = places.log(f"dl-{row['tier']}-{row['label']}.log")
        bar.show(row, behind, llmstack.tail_of(log, 1))


def watch_downloads(places: Any, names: Sequence[str], say: Callable[[str], None],
                    llmstack: Any) -> List[str]:
    """Show the named jobs until they have ended; those that failed."""
    bar = Bar(llmstack)
    left = list(names)
    failed: List[str] = []
    while left:
        rows = {f"{row['tier']}-{row['label']}": row for row in llmstack.download_rows(places)}
        for words, ended in group_by_end(rows, left, llmstack).items():
            bar.clear()
            say(f"{', '.join(ended)}: {words}")
            left = [name for name in left if name not in ended]
            if words.startswith("failed"):
                failed += ended
        if left:
            show_running(places, rows.values(), bar, len(left) - 1, llmstack)
            time.sleep(0.2)
    return failed


def follow_downloads(places: Any, names: Sequence[str], say: Callable[[str], None],
                     llmstack: Any) -> List[str]:
    """Watch until the named jobs have ended; those that failed. On a terminal there is a bar.

    Errors: KeyboardInterrupt, once it has said that the worker goes on.
    """
    try:
        return watch_downloads(places, names, say, llmstack)
    except KeyboardInterrupt:
        say("")
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
    if llmstack.stop_downloads(places):
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
    known, _ = llmstack.plan_downloads(config, (), labels)
    if args.next:
        labels = ("next",)
    jobs, skipped = llmstack.plan_downloads(config, args.tiers, labels)
    for line in skipped:
        llmstack.say(line)
    if not jobs:
        llmstack.say("Nothing to download.")
        return 0
    llmstack.check_links(places)
    # It is not installed for nothing.
    if not llmstack.environment_ready(llmstack.HUB, places.data):
        check_reached("the model hub", llmstack.hub_endpoint(places.env), llmstack)
    pid = llmstack.start_downloads(places, jobs, known, places.env, llmstack.say)
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
