"""Chaos: kills, clients that misbehave, and what is left of it. Not part of the suite.

    python3 -m tests.chaos [--kills N] [--clients N] [--seconds S] [--quick] [--seed N]
                            [--program FILE]

One project in a home of its own, loopback only, on ports of its own; its models are a fake that
streams known bytes. Linux, for what /proc tells. llama-swap is killed, too, where it is on PATH,
and the download worker where LLMSTACK_TEST_DATA has huggingface_hub, which `python3 -m tests`
brings.

It prints a table, and each fault with the kill or the client that met it. Exit 1 for any fault.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from tests.chaos.kills import Verdict, run_kills
from tests.chaos.rig import Rig
from tests.chaos.soak import SoakReport, run_soak

QUICK_KILLS, QUICK_S = 12, 20.0


def tell(line: str) -> None:
    """Say how it goes."""
    print(line, file=sys.stderr, flush=True)


def find_data() -> Optional[Path]:
    """The data directory of the suite, where it has huggingface_hub."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    named = os.environ.get("LLMSTACK_TEST_DATA") or str(Path(cache) / "llmstack-tests" / "data")
    return Path(named) if (Path(named) / "hub").is_dir() else None


def render_kills(verdicts: Sequence[Verdict]) -> list[str]:
    """A row a part: how often it was killed and when, and what was not clean afterwards."""
    lines = ["| killed with -9 | times | alive when it was | faults | clean again after, s |",
             "|---|---|---|---|---|"]
    rows: dict[str, list[Verdict]] = collections.defaultdict(list)
    for verdict in verdicts:
        rows[verdict.kill.part].append(verdict)
    for part, found in sorted(rows.items()):
        taken = sorted(each.clean_s for each in found)
        lines.append(f"| {part} | {len(found)} | {sum(each.hit for each in found)} |"
                     f" {sum(bool(each.fault) for each in found)} |"
                     f" {statistics.median(taken):.1f}, at most {taken[-1]:.1f} |")
    return lines


def render_soak(report: SoakReport) -> list[str]:
    """What clients met, and what the daemon took."""
    lines = [f"| {report.clients} clients, {report.seconds:.0f} s | |", "|---|---|"]
    lines += [f"| {what} | {count:,} |" for what, count in report.counts.items()]
    lines += ["", "| the daemon | idle | at its most | a minute after |", "|---|---|---|---|"]
    for what, (before, most, after) in report.resources.items():
        lines.append(f"| {what} | {before:.0f} | {most:.0f} | {after:.0f} |")
    return lines


def main(argv: Sequence[str]) -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.chaos",
                                     description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, metavar="N", help="default 100, 0 for none")
    parser.add_argument("--clients", type=int, default=200, metavar="N", help="default 200")
    parser.add_argument("--seconds", type=float, metavar="S",
                        help="how long the clients go on (default 300, 0 for none)")
    parser.add_argument("--quick", action="store_true",
                        help=f"{QUICK_KILLS} kills and {QUICK_S:.0f} s")
    parser.add_argument("--program", default="", metavar="FILE",
                        help="a llmstack.py or .pyz (default: a .pyz built of what is here)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of every choice")
    options = parser.parse_args(argv)
    usual = (QUICK_KILLS, QUICK_S) if options.quick else (100, 300.0)
    kills = usual[0] if options.kills is None else options.kills
    seconds = usual[1] if options.seconds is None else options.seconds
    source = random.Random(options.seed)
    tell(f"seed {options.seed}")
    lines: list[str] = []
    faults: list[str] = []
    program = os.path.abspath(options.program) if options.program else ""
    rig = Rig(find_data(), shutil.which("llama-swap"), program)
    try:
        if seconds:
            report = run_soak(rig, options.clients, seconds, source, tell)
            lines += [*render_soak(report), ""]
            faults += report.faults
        if kills:
            verdicts = run_kills(rig, kills, source, tell)
            lines += [*render_kills(verdicts), ""]
            faults += [f"{each.kill}: {each.fault}" for each in verdicts if each.fault]
    finally:
        rig.close()
    print("\n".join(lines))
    print("\n".join(f"fault: {fault}" for fault in faults) or "no fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
