"""README and docs/ stay true: every command, option, key, variable and path stands on its page."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from pathlib import Path
from typing import Iterator

import pytest

import llmstack

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "llmstack.py").read_text(encoding="utf-8")
PATHS = [ROOT / "README.md", ROOT / "UPGRADING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in PATHS if not path.name.startswith("inbox-")}

COMMANDS = "docs/commands.md"
CONFIGURATION = "docs/configuration.md"
ENDPOINTS = "docs/endpoints.md"
ENVIRONMENT = "docs/environment.md"
MODELS = "docs/models.md"
CLIENTS = "docs/clients.md"
PAGE = "docs/page.md"
README_LINES = 200
COLUMNS = 100

OF_OTHER_PROGRAMS = {
    "--coverage", "--lint", "--peer", "--pyz", "--rounds", "--swap",                # tests, benchmarks
    "--clients", "--kills", "--program", "--quick", "--seconds", "--seed",          # chaos
    "--api-key", "--cache-ram", "--ctx-checkpoints", "--device", "--no-jinja",      # llama-server
    "--slot-save-path", "--slot-prompt-similarity",
    "--oss", "--user"}
SET_FOR_CHILDREN = {llmstack.STACK_VARIABLE, "HF_HUB_DISABLE_PROGRESS_BARS",
                    "HF_HUB_DISABLE_TELEMETRY", "LLAMA_API_KEY"}


def rows(page: str) -> list[list[str]]:
    """The cells of every table row of a page; a bar in a cell is written as \\|."""
    lines = [line for line in PAGES[page].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def blocks(page: str, *languages: str) -> list[str]:
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", PAGES[page],
                      re.DOTALL | re.MULTILINE)


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)


# ---- commands and options


def subcommands() -> dict[str, argparse.ArgumentParser]:
    named = {name: name for name in llmstack.COMMANDS} | llmstack.OTHER_NAMES
    return {name: llmstack.command_parser(command) for name, command in named.items()
            if name[0] not in "_-" and command in llmstack.COMMANDS}


def options() -> Iterator[tuple[str, str]]:
    for name, parser in subcommands().items():
        for action in parser._actions:
            for option in action.option_strings:
                if option not in ("-h", "--help"):
                    yield name, option


def extra_options() -> Iterator[tuple[str, str]]:
    """The options that a command's file in extras/ names."""
    for name in llmstack.extra_names():
        path = ROOT / "extras" / (name.replace("-", "_") + ".py")
        text = path.read_text(encoding="utf-8")
        for call in re.findall(r"add_argument\(([^)]*)", text):
            for option in re.findall(r'"(--?[a-z][a-z-]*)"', call):
                yield name, option


def command_rows(page: str, name: str) -> list[str]:
    """The first cells that begin with the command; a second name may follow on its page."""
    before = ".*" if page == COMMANDS else ""
    asked = re.compile(rf"{before}`llmstack {re.escape(name)}(?:`| [\[A-Za-z])")
    return [row[0] for row in rows(page) if asked.match(row[0])]


@pytest.mark.parametrize("name", subcommands())
def test_every_command_has_one_row(name: str) -> None:
    assert len(command_rows(COMMANDS, name)) == 1
    others = [page for page in PAGES if page != COMMANDS and command_rows(page, name)]
    assert others == []


@pytest.mark.parametrize(("name", "option"), list(options()))
def test_every_option_stands_in_its_commands_row(name: str, option: str) -> None:
    if option == "--no-shell":                  # the second name of an option that is there
        assert f"`{option}`" in PAGES[COMMANDS]
        return
    assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", command_rows(COMMANDS, name)[0])


OTHER_NAMES_OF_EXTRAS = [name for name, command in llmstack.OTHER_NAMES.items()
                         if command in llmstack.extra_names()]


@pytest.mark.parametrize("name", [*llmstack.extra_names(), *OTHER_NAMES_OF_EXTRAS])
def test_every_extra_has_its_rows_on_the_page_of_commands(name: str) -> None:
    assert command_rows(COMMANDS, name)
    assert [page for page in PAGES if page != COMMANDS and command_rows(page, name)] == []


@pytest.mark.parametrize(("name", "option"), list(extra_options()))
def test_every_option_of_an_extra_stands_in_one_of_its_rows(name: str, option: str) -> None:
    rows_of_it = " ".join(command_rows(COMMANDS, name))
    assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", rows_of_it)


def test_every_option_in_the_documents_exists() -> None:
    known = {option for _, option in options()} | OF_OTHER_PROGRAMS
    known |= {"--check", "--help", "--version"}
    for path in (ROOT / "extras").glob("*.py"):
        known.update(re.findall(r'"(--[a-z][a-z0-9-]+)"', path.read_text(encoding="utf-8")))
    for page, text in PAGES.items():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))
        assert named <= known, page


def command_lines() -> list[list[str]]:
    """Every `llmstack ...` line of a shell block, in words, without its comment."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh", "console"):
            for line in re.findall(r"^(?:\$ |.*\| )?llmstack (.*)$", block, re.MULTILINE):
                found.append(shlex.split(re.split(r" +#| \| | && ", line)[0]))
    return found


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_every_command_line_is_one(words: list[str]) -> None:
    name = llmstack.OTHER_NAMES.get(words[0], words[0])
    if name not in llmstack.extra_names():
        assert llmstack.command_parser(name).parse_args(words[1:])


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["help"]) == 0
    out = capsys.readouterr().out
    for name in llmstack.COMMANDS:
        assert (f"\n  {name} " in out) is not name.startswith("_")


# ---- models.ini


@pytest.mark.parametrize("key", [*llmstack.DEFAULT_OPTIONS, *llmstack.TIER_OPTIONS,
                                 *llmstack.ROUTING_OPTIONS])
def test_every_key_has_one_row(key: str) -> None:
    assert sum(names_in(row[0]) == [key] for row in rows(CONFIGURATION)) == 1


def test_every_key_in_the_table_exists() -> None:
    """A key that goes, or is renamed, goes from its page."""
    known = {*llmstack.DEFAULT_OPTIONS, *llmstack.TIER_OPTIONS, *llmstack.ROUTING_OPTIONS}
    named = {row[0] for row in rows(CONFIGURATION) if re.fullmatch(r"`[a-z_]+`", row[0])}
    assert {cell.strip("`") for cell in named} <= known


def default_of(key: str) -> str:
    return next(row[1] for row in rows(CONFIGURATION) if row[0] == f"`{key}`")


def words_for(value: object) -> tuple[str, ...]:
    """How the table may write a default."""
    if isinstance(value, bool):
        return ("yes", "true") if value else ("no",)
    if isinstance(value, tuple):
        return (", ".join(map(str, value)),)
    return (f"{value:g}",) if isinstance(value, float) else (str(value),)


def test_the_defaults_in_the_tables_are_the_programs() -> None:
    config = llmstack.Config()
    for key in sorted({*llmstack.DEFAULT_OPTIONS} - {"router_host", "memory_gb"}):
        value = getattr(config, key, config.settings.get(key, ""))
        assert default_of(key) in words_for(value), key
    for key in ("high_fidelity_ceiling", "mid_fidelity_ceiling", "multi_turn"):
        assert default_of(key) == str(getattr(config.routing, key)), key


def test_the_ladder_in_readme_has_the_programs_numbers() -> None:
    routing = llmstack.Config().routing
    ladder = [row[1] for row in rows("README.md") if row[0].isdigit()]
    assert f"{routing.high_fidelity_ceiling:,}" in ladder[1]
    assert f"{routing.mid_fidelity_ceiling:,}" in ladder[2]
    assert f"at least {routing.multi_turn} user turns" in ladder[3]
    assert len(ladder) == 5


def test_the_patterns_of_names_are_the_programs() -> None:
    block = next(b for b in blocks(CONFIGURATION, "ini") if "[ALIASES]" in b)
    config, _ = llmstack.parse_models_ini(block)
    assert config.aliases == llmstack.DEFAULT_ALIASES


def test_the_roles_table_is_the_programs() -> None:
    for role, aliases in llmstack.ROLE_ALIASES.items():
        ttl = str(llmstack.ROLE_TTL_S[role])
        assert [role, ttl, ", ".join(aliases)] in rows(CONFIGURATION)


def test_the_tier_table_is_the_bundled_file(config: llmstack.Config) -> None:
    for tier in config.tiers:
        row = next(row for row in rows(MODELS) if row[0] == tier.name)
        assert row[2].startswith(tier.quant)
        assert row[3] == f"{tier.size_gb:g} GB"
        assert row[4].startswith(f"{tier.ctx_size:,}")


@pytest.mark.parametrize("page", PAGES)
def test_ini_examples_load(page: str) -> None:
    for block in blocks(page, "ini"):
        llmstack.parse_models_ini(block)


# ---- variables, paths


def variables() -> list[str]:
    sources = [SOURCE, *(path.read_text(encoding="utf-8") for path in (ROOT / "extras").glob("*.py"))]
    read = re.findall(r'"((?:LLMSTACK|LLAMA|HF)_[A-Z_]+|LOG_LEVEL|NO_COLOR)"', "\n".join(sources))
    # A name that ends in _ is the beginning of many.
    return sorted({name + "*" if name.endswith("_") else name for name in read} - SET_FOR_CHILDREN)


@pytest.mark.parametrize("variable", variables())
def test_every_variable_has_one_row(variable: str) -> None:
    assert sum(variable in names_in(row[0]) for row in rows(ENVIRONMENT)) == 1


def test_every_variable_in_the_table_is_read() -> None:
    cells = [row[0] for row in rows(ENVIRONMENT)]
    named = {name for cell in cells for name in names_in(cell) if name.startswith("LLMSTACK_")}
    assert named <= {*variables(), llmstack.STACK_VARIABLE}


def section(name: str) -> str:
    """The source text of a section of llmstack.py, from its banner to the next."""
    return re.split(rf"^# {name}\b.*\n# =+$", SOURCE, flags=re.MULTILINE)[1].split("\n# ====")[0]


def answered_paths() -> list[str]:
    """Every path that these sections compare a request's with, and the inference paths."""
    found = set(llmstack.INFERENCE_PATHS.values())
    for name in ("OLLAMA", "ROUTER", "ENGINE"):
        for node in ast.walk(ast.parse(section(name))):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(r"/[a-z][a-z0-9_]*([/.][a-z0-9_.]*)*", text):
                found.add(text)
    return sorted(found - {"/v1/"})             # a beginning that many share


@pytest.mark.parametrize("path", answered_paths())
def test_every_path_stands_in_endpoints(path: str) -> None:
    assert re.search(rf"`(?:[A-Z]+ )?{re.escape(path)}(?:`|[A-Z.])", PAGES[ENDPOINTS])


def test_the_sections_with_paths_are_found() -> None:
    assert {"/models.ini", "/llmstack/state", "/running", "/unload"} <= set(answered_paths())


# ---- the page's metrics, connect's clients


@pytest.mark.parametrize("name", llmstack.METRICS)
def test_every_metric_has_one_row(name: str) -> None:
    labels = [row[1] for row in rows(PAGE) if names_in(row[0]) == [name]]
    metric = llmstack.METRICS[name]
    assert labels == [", ".join(metric.labels) or ("le" if metric.kind == "histogram" else "")]


def test_every_metric_in_the_table_is_counted() -> None:
    cells = [name for row in rows(PAGE) for name in names_in(row[0])]
    assert {name for name in cells if name.startswith("llmstack_")} == set(llmstack.METRICS)


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "share/clients").glob("*.json")))
def test_every_client_of_connect_has_one_row(name: str) -> None:
    first = [row[0].split(", ") for row in rows(CLIENTS)]
    assert sum(name in names for names in first) == 1


# ---- the pages themselves


def anchor_of(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    plain = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return plain.replace(" ", "-")


def headings(page: str) -> list[str]:
    return [anchor_of(found) for found in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)]


def links(page: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_resolves(page: str) -> None:
    for link in links(page):
        path, _, fragment = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.is_file(), link
        if fragment:
            assert fragment in headings(target.relative_to(ROOT).as_posix()), link


def test_readme_is_one_page() -> None:
    assert len(PAGES["README.md"].splitlines()) <= README_LINES


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_readme_leads_to_every_page(page: str) -> None:
    assert page in links("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_read_alone(page: str) -> None:
    """It opens with its one title, and its lines of prose fit a terminal; a table's cannot."""
    text = PAGES[page]
    assert text.startswith("# ")
    assert len(re.findall(r"^# ", prose(page), re.MULTILINE)) == 1
    long = [line for line in text.splitlines() if len(line) > COLUMNS and line[0] != "|"]
    assert [line for line in long if " " in line.strip()] == []


def test_readme_has_ten_troubles() -> None:
    part = PAGES["README.md"].split("## Ten troubles")[1].split("\n## ")[0]
    assert len([line for line in part.splitlines() if line.startswith("|")]) == 2 + 10


def test_the_changelog_names_this_version() -> None:
    assert f"## {llmstack.VERSION}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_map_of_the_file_names_its_banners() -> None:
    banners = re.findall(r"^# =+\n# ([A-Z][^\n(]*?)(?: \(.*)?\n# =+$", SOURCE, re.MULTILINE)
    mapped = re.findall(r"^    ([A-Z][A-Z.: -]+?)  +\S", llmstack.__doc__ or "", re.MULTILINE)
    assert banners == mapped
