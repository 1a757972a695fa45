"""What the suite runs of the program: lines and branches by section of llmstack.py, and by extra.

    python3 -m tests --coverage [pytest arguments]

Every Python process that a test starts is measured, too, but for one that is killed, and one that
is given an environment of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Callable

ROOT = Path(__file__).resolve().parent.parent
COVERAGE = "coverage==7.17.5"
# The archive that tests build, the program with its bytecode that they start, and the program
# alone that they copy, are the same files.
SETTINGS = """\
[run]
branch = true
parallel = true
sigterm = true
patch = subprocess, execv, _exit
data_file = {data}/c
include = */llmstack.py, */extras/*.py
disable_warnings = couldnt-parse
[paths]
program =
    {root}
    */llmstack.pyz
    */compiled
    */alone
[report]
ignore_errors = true
"""
BANNER = re.compile(r"# =+\n# ([A-Z][A-Z:. -]+[A-Z])\b.*\n# =+\n")


def section_finder(text: str) -> Callable[[int], str]:
    """What tells, for the number of a line, its section."""
    starts = [(text.count("\n", 0, m.start()), m.group(1)) for m in BANNER.finditer(text)]
    starts = [(0, "docstring, imports"), *starts]
    return lambda line: [name for start, name in starts if start < line][-1]


def percent(run: list[bool]) -> str:
    return f"{100 * sum(run) / len(run):.1f}" if run else "-"


def render_table(report: dict[str, Any], text: str) -> str:
    """Percent by section of llmstack.py, whose text is `text`, then by file.

    `report`: coverage's, as JSON.
    """
    section = section_finder(text)
    found: dict[str, tuple[list[bool], list[bool]]] = {}
    # Outside this directory are copies that a test has changed, or built.
    files = {name: row for name, row in report["files"].items() if not Path(name).is_absolute()}
    for name, of_file in sorted(files.items(), key=lambda item: item[0] != "llmstack.py"):
        for state in ("executed", "missing"):
            lines = [(line, 0) for line in of_file[state + "_lines"]]
            branches = [(line, 1) for line, _ in of_file[state + "_branches"]]
            for line, kind in sorted(lines + branches):
                row = section(line) if name == "llmstack.py" else name
                found.setdefault(row, ([], []))[kind].append(state == "executed")
    shown = [f"{'':<22} {'lines %':>8} {'branches %':>11} {'of':>5}"]
    for row, (lines, branches) in found.items():
        shown.append(f"{row:<22} {percent(lines):>8} {percent(branches):>11} {len(branches):>5}")
    return "\n".join(shown)


def measure(python: str, words: list[str], environment: dict[str, str], report: str) -> int:
    """Run pytest under coverage and print the table; pytest's exit code.

    `report`: the file for coverage's own, which names every line and branch that was not run.
    """
    with tempfile.TemporaryDirectory() as data:
        settings = Path(data, "settings")
        settings.write_text(SETTINGS.format(data=data, root=ROOT), encoding="utf-8")

        def coverage(command: str, *more: str) -> int:
            line = [python, "-m", "coverage", command, f"--rcfile={settings}", *more]
            return subprocess.call(line, env=environment)

        code = coverage("run", "-m", "pytest", *words)
        coverage("combine", "-q")
        coverage("json", "-q", "-o", report)
    found = json.loads(Path(report).read_text(encoding="utf-8"))
    print(render_table(found, (ROOT / "llmstack.py").read_text(encoding="utf-8")))
    print(f"What was not run: {report}")
    return code
