"""The table of `python3 -m tests --coverage`."""

from __future__ import annotations

import os

from tests import sections

TEXT = """\
import os
# ====
# ONE
# ====
a = 1
# ====
# PURE: TWO (a note)
# ====
b = 2
"""


def of_file(executed: list[int], missing: list[int]) -> dict[str, list[object]]:
    return {"executed_lines": [*executed], "missing_lines": [*missing],
            "executed_branches": [[line, 0] for line in executed],
            "missing_branches": [[line, -1] for line in missing]}


def test_lines_count_for_the_section_they_stand_in() -> None:
    report = {"files": {"extras/ps.py": of_file([], [1]), "llmstack.py": of_file([1, 5], [9]),
                        os.path.abspath("llmstack.py"): of_file([], [5])}}
    rows = [line.split() for line in sections.render_table(report, TEXT).splitlines()]
    assert rows[1:] == [
        ["docstring,", "imports", "100.0", "100.0", "1"], ["ONE", "100.0", "100.0", "1"],
        ["PURE:", "TWO", "0.0", "0.0", "1"], ["extras/ps.py", "0.0", "0.0", "1"]]
