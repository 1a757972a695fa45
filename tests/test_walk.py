"""The walks in docs/development.md stay true: what they name stands in the room that they name."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Iterator

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/development.md").read_text(encoding="utf-8")
MOST_LINES = 60


def walk() -> str:
    return PAGE.split("## A stranger's walk\n")[1].split("\n## ")[0]


def steps() -> list[tuple[str, str]]:
    """(room or file, name) of each name in the second cells of the tables."""
    found = []
    for line in walk().splitlines():
        if re.match(r"\| [0-9]+ \|", line):
            cells = [cell.strip() for cell in line.split("|")[2:4]]
            found += [(cells[1], name) for name in re.findall(r"`([^`]+)`", cells[0])]
    return found


def names_of(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """What statements define: functions, classes with their methods, names that get a value."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield node.name
            yield from names_of(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield prefix + node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


def rooms() -> dict[str, set[str]]:
    """Section of llmstack.py -> the names that it defines."""
    source = (ROOT / "llmstack.py").read_text(encoding="utf-8")
    parts = re.split(r"^# =+\n# ([A-Z][^\n(]*?)(?: \(.*)?\n# =+$", source, flags=re.MULTILINE)
    return {name: set(names_of(ast.parse(text).body))
            for name, text in zip(parts[1::2], parts[2::2])}


ROOMS = rooms()


@pytest.mark.parametrize(("room", "name"), steps())
def test_each_name_stands_in_its_room(room: str, name: str) -> None:
    if room in ROOMS:
        assert name in ROOMS[room]
        return
    tree = ast.parse((ROOT / room).read_text(encoding="utf-8"))
    assert name in set(names_of(tree.body))


@pytest.mark.parametrize("room", sorted(ROOMS.keys() - {"CONSTANTS", "ERRORS", "VALUES"}))
def test_a_room_says_at_its_head_what_it_is(room: str) -> None:
    source = (ROOT / "llmstack.py").read_text(encoding="utf-8")
    head = re.search(rf"^# {re.escape(room)}\n# =+\n((?:#.*\n)*)", source, re.MULTILINE)
    assert head
    assert head.group(1)


def test_the_three_walks_are_found_and_short() -> None:
    numbers = re.findall(r"^\| ([0-9]+) \|", walk(), re.MULTILINE)
    assert numbers.count("1") == 3
    assert {"RELAY", "COMMANDS", "PURE: MODELS.INI"} <= {room for room, _ in steps()}
    assert len(walk().splitlines()) < MOST_LINES
