"""Show the end of a log, and follow it.

NAME is router (the default), engine, a tier, or any other log that the project has; several are
shown one after another, with -f line by line as they come.

examples:
  llmstack logs -f router engine
  llmstack logs -n 200 code-smart
"""

from __future__ import annotations

import os
import time
from typing import Any, BinaryIO, List, Optional, Sequence

POLL_S = 0.2                                    # files tell nobody, everywhere, when they grow
TAIL_BYTES = 1 << 20                            # of a log, searched for its last lines


class Follower:
    """A log that is read as it grows, through its rotations."""

    def __init__(self, name: str, path: str, llmstack: Any) -> None:
        self.name, self.path = name, path
        self._llmstack = llmstack
        self._file: Optional[BinaryIO] = None
        self._rest = b""                        # a line that is not whole yet

    def tail(self, count: int) -> List[str]:
        """The last lines; from then on lines() has what follows. Errors: UserError."""
        if not self._open():
            return []
        assert self._file is not None
        size = os.fstat(self._file.fileno()).st_size
        self._file.seek(max(0, size - TAIL_BYTES))
        return self._take()[-count:] if count else self._take()[:0]

    def lines(self) -> List[str]:
        """What has come since."""
        found = self._take()
        if self._was_replaced():
            found += self._take()               # written to the old one at the last moment
            self.close()
            if self._open():
                found += self._take()
        return found

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _open(self) -> bool:
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115  # closed by close()
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise self._llmstack.UserError(f"cannot read {self.path}: {exc.strerror}") from None
        self._rest = b""
        return True

    def _was_replaced(self) -> bool:
        """True where another file, or a shorter one, has the name now."""
        if self._file is None:
            return True
        try:
            now, ours = os.stat(self.path), os.fstat(self._file.fileno())
        except OSError:
            return False
        if (now.st_dev, now.st_ino) != (ours.st_dev, ours.st_ino):
            return True
        return now.st_size < self._file.tell()

    def _take(self) -> List[str]:
        if self._file is None:
            return []
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]


def log_names(places: Any) -> List[str]:
    """The logs that the project has, by name."""
    try:
        files = os.listdir(os.path.dirname(places.log("")))
    except OSError:
        return []
    return sorted(file[:-4] for file in files if file.endswith(".log"))


def find_log(name: str, places: Any, config: Any, llmstack: Any) -> Follower:
    """The log of this name. Errors: UserError where there is none."""
    there = log_names(places)
    tier = config.by_name(name)
    found = tier.name if tier is not None else name
    if found == "engine" and "engine" not in there and "llama-swap" in there:
        found = "llama-swap"
    known = ["router", "engine", *(t.name for t in config.tiers), *there]
    if found not in known:
        raise llmstack.UserError(f"there is no log {llmstack.unknown_word(name, known)}",
                                 "one of " + ", ".join(dict.fromkeys(known)), 2)
    return Follower(found, places.log(found + ".log"), llmstack)


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("logs", __doc__)
    parser.add_argument("names", metavar="{router,engine,TIER}", nargs="*", default=["router"])
    parser.add_argument("--demo", action="store_true", help="the demo's")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes")
    parser.add_argument("-n", "--lines", metavar="N", type=int, default=40,
                        help="begin with the last N lines (default: %(default)s)")
    args = parser.parse_intermixed_args(list(argv))
    places = llmstack.find_places(os.environ, args.demo)
    llmstack.refuse_external(places)
    config = llmstack.planned_config(places)
    logs = [find_log(name, places, config, llmstack) for name in args.names]
    width = max(len(log.name) for log in logs) if len(logs) > 1 else 0

    def show(log: Follower, lines: Sequence[str]) -> None:
        for line in lines:
            llmstack.say(f"{log.name:<{width}}  {line}" if width else line)

    for log in logs:
        show(log, log.tail(max(args.lines, 0)))
        if not args.follow and not os.path.exists(log.path):
            llmstack.warn(f"{log.name} has written nothing yet")
    while args.follow:
        time.sleep(POLL_S)
        for log in logs:
            show(log, log.lines())
    for log in logs:
        log.close()
    return 0
