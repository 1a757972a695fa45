"""What the suite runs of the program: lines and branches by section of llmstack.py, and by extra.

    python3 -m tests --coverage [pytest arguments]

Every Python process that a test starts is measured, too, unless it is killed or has an
environment of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Iterator, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COVERAGE = "coverage==7.17.5"
# The archive that tests build has the same files inside.
SETTINGS = """\
[run]
branch = true
parallel = true
sigterm = true
patch = subprocess, execv, _exit
data_file = {data}/c
include = */llmstack.py, */extras/*.py
[paths]
program =
    {root}
    */llmstack.pyz
[report]
ignore_errors = true
"""
BANNER = re.compile(r"# =+\n# (.+)\n# =+\n")


class Row(NamedTuple):
    """How many lines and branches there are, and how many of them were run."""

    name: str
    lines: list[bool]
    branches: list[bool]

    def render(self) -> str:
        lines, branches = map(percent, (self.lines, self.branches))
        return f"{self.name:<24} {lines:>6} {branches:>9} of {len(self.branches)}"


def percent(run: list[bool]) -> str:
    return f"{100 * sum(run) / len(run):.1f}" if run else "-"


def sections(text: str) -> list[tuple[int, str]]:
    """(the line before which it begins, its name) of each section, the last one first."""
    found = [(text.count("\n", 0, m.start()), m.group(1)) for m in BANNER.finditer(text)]
    return [*reversed(found), (0, "docstring, imports")]


def rows(report: dict[str, dict[str, dict[str, list[int]]]]) -> Iterator[Row]:
    """The table: a row for each section of llmstack.py, then one for each other file."""
    for name, of_file in sorted(report["files"].items(), key=lambda item: item[0] != "llmstack.py"):
        starts = [(0, name)]
        if name == "llmstack.py":
            starts = sections((ROOT / name).read_text(encoding="utf-8"))
        found = {title: Row(title, [], []) for _, title in reversed(starts)}

        def row_of(line: int, starts: list = starts, found: dict = found) -> Row:
            return next(found[title] for start, title in starts if line > start)

        for key in ("executed", "missing"):
            for line in of_file[key + "_lines"]:
                row_of(line).lines.append(key == "executed")
            for line, _ in of_file[key + "_branches"]:
                row_of(line).branches.append(key == "executed")
        yield from found.values()


def measure(python: str, words: list[str], environment: dict[str, str]) -> int:
    """Run pytest under coverage and print the table; pytest's exit code."""
    coverage = [python, "-m", "coverage"]
    with tempfile.TemporaryDirectory() as data:
        settings = Path(data, "settings")
        settings.write_text(SETTINGS.format(data=data, root=ROOT), encoding="utf-8")
        rc, report = f"--rcfile={settings}", os.path.join(data, "report.json")
        code = subprocess.call([*coverage, "run", rc, "-m", "pytest", *words], env=environment)
        subprocess.run([*coverage, "combine", rc, "-q"], check=True)
        subprocess.run([*coverage, "json", rc, "-q", "-o", report], check=True)
        print(f"{'section':<24} {'lines':>6} {'branches':>9}")
        for row in rows(json.loads(Path(report).read_text(encoding="utf-8"))):
            print(row.render())
    return code
