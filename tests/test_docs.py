"""The README stays true: every command, option, key, variable and route of the program stands in it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Iterator

import pytest

import llmstack

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "llmstack.py").read_text(encoding="utf-8")


def subcommands() -> dict[str, argparse.ArgumentParser]:
    parser = llmstack.make_parser()
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return {name: sub for name, sub in actions[0].choices.items() if not name.startswith("_")}


def options() -> Iterator[tuple[str, str]]:
    for name, parser in subcommands().items():
        for action in parser._actions:
            for option in action.option_strings:
                if option not in ("-h", "--help"):
                    yield name, option


@pytest.mark.parametrize("name", subcommands())
def test_every_command_stands_in_the_readme(name: str) -> None:
    assert f"`llmstack {name}" in README


@pytest.mark.parametrize(("name", "option"), list(options()))
def test_every_option_stands_in_its_commands_row(name: str, option: str) -> None:
    row = next(line for line in README.splitlines() if line.startswith("|") and f"`llmstack {name}" in line)
    assert option in row or option == "--no-shell"


def test_every_option_in_the_readme_exists() -> None:
    known = {option for _, option in options()} | {"--lint", "--check", "--version", "--rounds", "--pyz", "--peer"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known


@pytest.mark.parametrize("key", [*llmstack.DEFAULT_OPTIONS, *llmstack.TIER_OPTIONS, *llmstack.ROUTING_OPTIONS])
def test_every_key_of_models_ini_stands_in_the_readme(key: str) -> None:
    assert f"`{key}`" in README


def test_every_environment_variable_stands_in_the_readme() -> None:
    named = set(re.findall(r'"((?:LLMSTACK|LLAMA|HF)_[A-Z_]+|LOG_LEVEL|NO_COLOR)"', SOURCE))
    internal = {llmstack.STACK_VARIABLE, "HF_TOKEN", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"}   # set, not read
    assert {n for n in named - internal if f"`{n}`" not in README} == set()


def test_the_defaults_in_the_readme_are_the_programs() -> None:
    config = llmstack.Config()
    for key in ("host", "router_port", "engine_port", "engine"):
        assert re.search(rf"\| `{key}`[^|]*\| {getattr(config, key)} \|", README), key
    for key in ("high_fidelity_ceiling", "mid_fidelity_ceiling", "multi_turn"):
        assert f"| `{key}` | {getattr(config.routing, key)} |" in README


def test_the_tier_table_is_the_bundled_file(config: llmstack.Config) -> None:
    for tier in config.tiers:
        row = next(line for line in README.splitlines() if line.startswith(f"| {tier.name} |"))
        assert f"{tier.ctx_size:,}" in row
        assert f"{tier.size_gb:g} GB" in row
        assert tier.quant in row


def test_the_map_of_the_file_names_its_banners() -> None:
    banners = re.findall(r"^# =+\n# ([A-Z][^\n(]*?)(?: \(.*)?\n# =+$", SOURCE, re.MULTILINE)
    mapped = re.findall(r"^    ([A-Z][A-Z.: -]+?)  +\S", llmstack.__doc__ or "", re.MULTILINE)
    assert banners == mapped


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["help"]) == 0
    out = capsys.readouterr().out
    for name in subcommands():
        assert name in out
    assert "_router" not in out


def test_the_changelog_names_this_version() -> None:
    assert f"## {llmstack.VERSION}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_ini_examples_of_the_docs_load() -> None:
    for name in ("README.md", "UPGRADING.md"):
        for block in re.findall(r"```ini\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL):
            llmstack.parse_models_ini(block)
