"""connect and run-with: the user's bytes stay, and what was put in can be taken out again."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

import llmstack
from tests.conftest import ROOT

connect: Any = llmstack.load_extra("connect")
KEY = "a-key-of-the-test"
WRITTEN = ("claude", "codex", "aider", "continue", "zed", "qwen", "crush", "pi", "goose", "llm")
INI = "".join(f"[{name}]\nrole = {role}\nmodel = x/y\nctx_size = {context}\n"
              for name, role, context in (("big", "agent", "64k"), ("small", "fast", "128k")))


@pytest.fixture(autouse=True)
def project() -> Path:
    """A project with two tiers, whose router nobody has started."""
    ini = Path(".llmstack/models.ini")
    ini.parent.mkdir()
    ini.write_text(INI)
    return ini


def run(*words: str) -> int:
    return int(connect.main(list(words), llmstack))


def refused(*words: str) -> tuple[str, str]:
    with pytest.raises(llmstack.UserError) as caught:
        run(*words)
    return str(caught.value), caught.value.hint


def snapshot(home: Path) -> dict[str, bytes]:
    """Every file of the home directory but our record."""
    return {str(path.relative_to(home)): path.read_bytes() for path in home.rglob("*")
            if path.is_file() and path.name not in (connect.RECORD, "trust.lock")}


def keep(text: str, before: str) -> bool:
    """Whether each character of `before` is in `text`, in this order."""
    rest = iter(text)
    return all(character in rest for character in before)


# ---- the data

def test_every_client_has_its_file_and_every_file_its_client() -> None:
    files = {path.stem for path in (ROOT / "share" / "clients").iterdir()}
    assert files == set(connect.CLIENTS)


@pytest.mark.parametrize("key", ["", KEY])
@pytest.mark.parametrize("name", connect.CLIENTS)
def test_nothing_is_left_unreplaced_and_no_key_is_shown(
        name: str, key: str, home: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    if key:
        monkeypatch.setenv("LLMSTACK_API_KEY", key)
    before = snapshot(home)
    assert run(name, "--print") == 0
    text = capsys.readouterr().out
    assert "127.0.0.1:10101" in text
    assert "<" not in text.replace("<model>", "")
    assert "?key" not in text
    assert "?nokey" not in text
    assert KEY not in text
    assert snapshot(home) == before
    assert "big" in text or name not in WRITTEN or name in ("claude", "codex")


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_client_is_told(name: str, monkeypatch: pytest.MonkeyPatch, home: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    """Its default is auto, and its context is known, but where the client has no such setting."""
    monkeypatch.setenv("LLMSTACK_API_KEY", KEY)
    assert run(name) == 0
    text = b"".join(snapshot(home).values()).decode()
    assert "auto" in text
    assert "131072" in text or name == "llm"
    assert KEY not in text
    by_the_user = ("aider", "llm", "zed")       # who have no name for a variable in a file
    assert "LLMSTACK_API_KEY" in text or name in by_the_user
    assert "LLMSTACK_API_KEY" in capsys.readouterr().out or name == "llm"


# ---- files

@pytest.mark.parametrize("name", WRITTEN)
def test_undo_leaves_no_trace(name: str, home: Path) -> None:
    before = snapshot(home)
    assert run(name) == 0
    assert snapshot(home) != before
    assert run(name, "--undo") == 0
    assert snapshot(home) == before
    assert run(name, "--undo") == 0             # nothing to undo


USERS = {
    "comments": '// mine\n{\n    // the theme\n    "theme": "dark", // so\n    "a": [1, 2,],\n}\n',
    "one line": '{"theme": "dark", "env": {"MINE": "1"}}',
    "empty object": "{ }",
    "windows": '\ufeff{\r\n\t"theme": "dark",\r\n\t"env": {}\r\n}\r\n',
    "its own": '{\n  "env": {\n    "ANTHROPIC_MODEL": "opus",\n    "MINE": "{\\"}"\n  }\n}\n',
}


@pytest.mark.parametrize("text", USERS.values(), ids=list(USERS))
def test_the_users_settings_stay(text: str, home: Path) -> None:
    path = home / ".claude" / "settings.json"
    path.parent.mkdir()
    path.write_bytes(text.encode())
    path.chmod(0o600)
    assert run("claude") == 0
    now = path.read_bytes().decode()
    assert keep(now, text.replace("opus", ""))
    values = connect.node_value(now, connect.read_json(now))
    assert values["env"]["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:10101"
    assert values["env"]["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "small"
    assert values["env"]["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "131072"
    assert Path(f"{path}.before-llmstack").read_bytes() == text.encode()
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir()} == {0o600}
    assert run("claude", "--undo") == 0
    assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", USERS.values(), ids=list(USERS))
def test_undo_after_the_user_has_changed_something_else(text: str, home: Path) -> None:
    """Each value and each comment is as it was, and what came meanwhile stays."""
    path = home / ".claude" / "settings.json"
    path.parent.mkdir()
    path.write_bytes(text.encode())
    assert run("claude") == 0
    path.write_bytes(path.read_bytes() + b"// later\n")
    assert run("claude", "--undo") == 0
    now = path.read_bytes().decode()
    assert now.endswith("// later\n")
    before = connect.node_value(text, connect.read_json(text))
    assert connect.node_value(now, connect.read_json(now)) == before
    assert keep("".join(now.split()), "".join(text.split()))
    assert Path(f"{path}.before-llmstack").read_bytes() == text.encode(), "the backup stays"


def test_a_file_that_its_client_has_written_anew(home: Path) -> None:
    path = home / ".qwen" / "settings.json"
    path.parent.mkdir()
    mine = {"modelProviders": {"openai": [{"id": "mine"}]}, "ui": {"theme": "x"}}
    path.write_text(json.dumps(mine))
    assert run("qwen") == 0
    told = json.loads(path.read_text())
    names = [model["id"] for model in told["modelProviders"]["openai"]]
    assert names == ["auto", "big", "small", "mine"]
    path.write_text(json.dumps({**told, "version": 4}, indent=4))
    assert run("qwen", "--undo") == 0
    assert json.loads(path.read_text()) == {**mine, "version": 4}


def test_what_the_user_has_changed_of_ours_stays(home: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    assert run("claude") == 0
    path = home / ".claude" / "settings.json"
    path.write_text(path.read_text().replace('"ANTHROPIC_MODEL": "auto"', '"ANTHROPIC_MODEL": "big"'))
    assert run() == 0
    assert "changed" in capsys.readouterr().out
    path.write_text(path.read_text() + "{")
    assert run() == 0
    assert "changed" in capsys.readouterr().out
    path.write_text(path.read_text()[:-1])
    assert run("claude", "--undo") == 1
    assert json.loads(path.read_text()) == {"env": {"ANTHROPIC_MODEL": "big"}}
    assert "env.ANTHROPIC_MODEL stays" in capsys.readouterr().err


def test_again_changes_nothing_and_a_new_tier_is_told(project: Path, home: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    path = home / ".pi" / "agent" / "models.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"providers": {"mine": {}}}\n')
    assert run("pi") == 0
    before = snapshot(home)
    capsys.readouterr()
    assert run("pi") == 0
    assert snapshot(home) == before
    assert "Nothing to change" in capsys.readouterr().out
    project.write_text(INI + "[third]\nrole = plan\nmodel = x/y\nctx_size = 32k\n")
    assert run("pi") == 0
    assert path.read_text().count('"id": "third"') == 1
    assert path.read_text().count('"id": "big"') == 1
    assert run("pi", "--undo") == 0
    assert path.read_text() == '{"providers": {"mine": {}}}\n'
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_a_link(home: Path) -> None:
    dotfiles = home / "dotfiles"
    dotfiles.mkdir()
    (dotfiles / "claude.json").write_text('{"theme": "dark"}')
    path = home / ".claude" / "settings.json"
    path.parent.mkdir()
    path.symlink_to(dotfiles / "claude.json")
    assert run("claude") == 0
    assert path.is_symlink()
    assert "ANTHROPIC_BASE_URL" in (dotfiles / "claude.json").read_text()


@pytest.mark.parametrize("text", ["{", "[]", '{"env": 3}', '{"env": {"ANTHROPIC_MODEL": {}}}',
                                  '{"a" 1}', '{"a": tru}', "[" * 5000, '{"a": 1} x'])
def test_a_file_that_cannot_be_extended_is_left_alone(text: str, home: Path) -> None:
    path = home / ".claude" / "settings.json"
    path.parent.mkdir()
    path.write_text(text)
    what, hint = refused("claude")
    assert str(path) in what
    assert '"ANTHROPIC_BASE_URL": "http://127.0.0.1:10101"' in hint
    assert snapshot(home)[".claude/settings.json"] == text.encode()


def test_files_that_are_none(home: Path) -> None:
    path = home / ".claude" / "settings.json"
    path.mkdir(parents=True)
    assert "cannot read" in refused("claude")[0]
    path.rmdir()
    path.write_bytes(b'{"a": "\xff"}')
    assert "not UTF-8" in refused("claude")[0]
    record = Path(llmstack.find_places(os.environ).data) / connect.RECORD
    record.parent.mkdir(parents=True, exist_ok=True)
    for text in ("{", "[]", '{"claude": 3}', '{"claude": {"x": {}}}'):
        record.write_text(text)
        assert "is broken" in refused()[0]


# ---- YAML and TOML

AIDER = "# mine\ndark-mode: true\nread:\n  - CONVENTIONS.md\n"


@pytest.mark.parametrize("text", [AIDER, AIDER.rstrip(), AIDER.replace("\n", "\r\n"), "---\n" + AIDER])
def test_lines_are_put_behind_the_users(text: str, home: Path) -> None:
    path = home / ".aider.conf.yml"
    path.write_bytes(text.encode())
    assert run("aider") == 0
    now = path.read_bytes().decode()
    assert now.startswith(text)
    assert 'model: "openai/auto"' in now
    assert 'weak-model: "openai/small"' in now
    path.write_bytes(now.encode() + b"git: false\n")
    assert run("aider", "--undo") == 0
    assert path.read_bytes().decode().rstrip() == text.rstrip() + now[len(text):][:0] + \
        ("\r\n" if "\r\n" in text else "\n") + "git: false"


@pytest.mark.parametrize(("name", "file", "text"), [
    ("aider", ".aider.conf.yml", "model: sonnet\n"),
    ("aider", ".aider.conf.yml", "{dark-mode: true}\n"),
    ("aider", ".aider.conf.yml", "a: |\n  x\n...\n"),
    ("aider", ".aider.conf.yml", "a: 1\n---\nb: 2\n"),
    ("aider", ".aider.conf.yml", "- a: 1\n"),
    ("llm", ".config/io.datasette.llm/extra-openai-models.yaml", "[{model_id: x}]\n"),
    ("llm", ".config/io.datasette.llm/extra-openai-models.yaml", "model_id: x\n"),
    ("continue", ".continue/config.yaml", "models: []\n"),
    ("continue", ".continue/config.yaml", "models:\nrules: x\n"),
    ("codex", ".codex/llmstack.config.toml", 'model = "mine"\n')])
def test_what_is_not_plain_is_refused_with_the_text(name: str, file: str, text: str,
                                                    home: Path) -> None:
    path = home / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    what, hint = refused(name)
    assert str(path) in what
    assert "http://127.0.0.1:10101/v1" in hint
    assert {f: d for f, d in snapshot(home).items() if f.startswith(".")} == {file: text.encode()}


CONTINUE = """name: Mine
version: 1.0.0
schema: v1
models:     # all of them
# the first
- name: mine
  model: x
rules:
  - be brief
"""


@pytest.mark.parametrize("text", [CONTINUE, CONTINUE.replace("- name", "    - name").replace(
    "  model", "      model"), CONTINUE.replace("models:     # all of them\n# the first\n"
                                               "- name: mine\n  model: x\n", "")])
def test_continues_models_are_joined(text: str, home: Path) -> None:
    yaml = pytest.importorskip("yaml")
    path = home / ".continue" / "config.yaml"
    path.parent.mkdir()
    path.write_text(text)
    mine = yaml.safe_load(text)
    assert run("continue") == 0
    told = yaml.safe_load(path.read_text())
    names = [model["model"] for model in told["models"]]
    assert names == ["auto", "big", "small", *["x" for _ in mine.get("models", ())]]
    assert {**told, "models": 0} == {**mine, "models": 0}
    assert keep(path.read_text(), text)
    assert run("continue", "--undo") == 0
    assert path.read_text() == text


def test_a_block_that_was_changed_stays(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / ".aider.conf.yml"
    assert run("aider") == 0
    changed = path.read_text().replace("openai/small", "openai/big")
    path.write_text(changed)
    assert run("aider", "--undo") == 1
    assert path.read_text() == changed
    assert "stays" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["codex", "aider", "continue", "llm"])
def test_what_is_written_is_what_its_format_is(name: str, home: Path) -> None:
    assert run(name) == 0
    for file, data in snapshot(home).items():
        if file.endswith((".yml", ".yaml")):
            assert pytest.importorskip("yaml").safe_load(data)
        elif file.endswith(".toml"):
            told = pytest.importorskip("tomllib").loads(data.decode())
            assert told["model_providers"]["llmstack"]["base_url"] == "http://127.0.0.1:10101/v1"


# ---- which router

def test_a_clone_does_not_name_the_router(project: Path, home: Path) -> None:
    project.write_text("[DEFAULT]\nhost = 10.6.6.6\n" + INI)
    before = snapshot(home)
    what, hint = refused("claude")
    assert "not trusted" in what or hint.endswith("--url http://10.6.6.6:10101")
    assert snapshot(home) == before


def test_a_client_that_nobody_knows() -> None:
    assert "no client is called vi" in refused("vi")[0]


def test_the_list(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("claude") == 0
    (home / ".cursor").mkdir()
    capsys.readouterr()
    assert run() == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["claude"].endswith("connected")
    assert "found" in lines["cursor"]
    assert lines["roo"].split() == ["roo", "Roo", "Code"]


# ---- run-with

@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """program(name): a client of that name, which says how it was called."""
    def make(name: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    return make


@pytest.mark.parametrize("key", ["", KEY])
@pytest.mark.parametrize("name", [
    "claude", "codex", "opencode", "aider", "qwen", "goose", "open-webui"])
def test_run_with_gives_it_all_and_writes_nothing(name: str, key: str, program: Any, home: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    if key:
        monkeypatch.setenv("LLMSTACK_API_KEY", key)
    before = snapshot(home), snapshot(Path.cwd())
    program(name)
    command, env = llmstack.load_extra("run-with").client_command(llmstack, name, ["--help"])
    added = {name: text for name, text in env.items() if os.environ.get(name) != text}
    assert Path(command[0]).name == name
    assert command[-1] == "--help"
    assert KEY not in " ".join(command), "a command line is for everyone to see"
    text = " ".join([*command, *added.values()])
    assert "127.0.0.1:10101" in text
    assert "auto" in text
    assert "<" not in text
    assert (snapshot(home), snapshot(Path.cwd())) == before


def test_opencode_is_led_to_the_router_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(llmstack, "run_command", lambda words: ran.append(words) or 0)
    connect = llmstack.load_extra("connect").connect
    assert connect(llmstack, "opencode", "", True) == 0
    assert connect(llmstack, "opencode", "http://127.0.0.1:1", False) == 0
    assert ran == [["install", "--print"], ["install", "--external", "http://127.0.0.1:1"]]


@pytest.mark.parametrize(("name", "says"), [
    ("zed", "`llmstack connect zed`"), ("vi", "one of"), ("claude", "install it first")])
def test_run_with_says_what_to_do_instead(name: str, says: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "find_program", lambda *_: "")
    with pytest.raises(llmstack.UserError) as caught:
        llmstack.load_extra("run-with").client_command(llmstack, name, [])
    assert says in caught.value.hint
