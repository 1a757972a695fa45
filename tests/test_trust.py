"""Trust by construction: whatever spelling brings a value to the parser, that value is what has to be trusted."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

import pytest

import llmstack
from llmstack import Config, ConfigError, Option, Tier, UserError, parse_models_ini
from tests.noise_model import render_noise_gguf
from tests.test_shell import Terminal
from tests.test_stack import NO_MODELS, PROGRAM, Project, noise  # noqa: F401  # a fixture

STATE = Path(".llmstack")
INI = STATE / "models.ini"
HARMLESS = "[DEFAULT]\nengine = embedded\n" + NO_MODELS
WIDE_SPACES = [chr(n) for n in range(128, sys.maxunicode + 1) if chr(n).isspace()]
ODD = [*WIDE_SPACES, "\x1c", "\x1d", "\x1e", "\x1f", "\x0b", "\x0c", "\r", "\ufeff", "\u200b", "\u2060", "\u180e", "\u00ad"]
HOST = "[box]\nmodel = m\nbase_url = http://127.0.0.1:9\napi_key_env = BOX_KEY\n"
# A key that reaches out of the project, a value, and the text before it.
REACHES = [
    ("llama_server_bin", "./evil.sh", "[DEFAULT]\n"),
    ("router_host", "0.0.0.0", "[DEFAULT]\n"),
    ("host", "192.168.1.1", "[DEFAULT]\n"),
    ("allow_unauthenticated", "yes", "[DEFAULT]\n"),
    ("base_url", "https://evil.example", "[box]\nmodel = m\n"),
    ("api_key_env", "AWS_SECRET_ACCESS_KEY", "[box]\nmodel = m\nbase_url = https://evil.example\n"),
    ("path", "/etc/passwd", "[a]\n"),
    ("llama_server_bin", "./evil.sh", "[a]\npath = x.gguf\n"),
    ("args", "--log-file /etc/x", "[a]\npath = x.gguf\n"),
    ("args", "--log-file /etc/x", "[DEFAULT]\n"),
    ("mmproj", "/etc/passwd", "[a]\npath = x.gguf\n"),
    ("draft", "../../elsewhere.gguf", "[a]\npath = x.gguf\n"),
    ("lora", "a.gguf, ~/mine.gguf", "[a]\npath = x.gguf\n"),
    ("chat_template_file", "/etc/passwd", "[a]\npath = x.gguf\n"),
    ("path", "../../elsewhere.gguf", "[a]\n"),
    ("path", "~/mine.gguf", "[a]\n"),
    ("model", "huggingface/https://evil.example", "[a]\nbackend = litellm\n"),
    ("model_next", "huggingface/https://evil.example", "[a]\nmodel = x/y\n"),
]


@pytest.fixture
def places(home: Path) -> llmstack.Places:
    STATE.mkdir()
    return llmstack.find_places(os.environ)


COMMANDS = ("args", "llama_server_bin")


def reach(config: Config) -> list[tuple[str, ...]]:
    """What of a configuration reaches out of its project, by the fields' own names: not by the tables that trust uses."""
    found = [("program", config.settings.get("llama_server_bin", "")), ("open", str(config.allow_unauthenticated))]
    if config.host not in ("127.0.0.1", "localhost", "::1"):
        found.append(("host", config.host))
    for tier in config.tiers:
        inside = not tier.path or not os.path.relpath(tier.path, os.path.dirname(os.path.abspath(INI))).startswith("..")
        found.append((tier.name, tier.base_url, tier.api_key_env, "" if inside else tier.path))
        found.append((tier.name, *(m for m in (tier.model, tier.model_next) if "://" in m)))
        found += [("its own", str(pair)) for pair in tier.server if pair[0] in COMMANDS]
        files: list[str] = []
        llmstack.with_files(tier, lambda name, files=files: files.append(name) or name)  # type: ignore[misc]
        found += [("file", name) for name in files if os.path.relpath(name, INI.parent.absolute()).startswith("..")]
    found += [("args", str(pair)) for pair in config.server if pair[0] in COMMANDS]
    return [row for row in found if any(row[1:]) and row[1:] != ("False",)]


def reached(places: llmstack.Places) -> Optional[list[tuple[str, ...]]]:
    """What the program would use of the file that is there; None where it refuses the file."""
    try:
        return reach(llmstack.load_config(places))
    except UserError:
        return None


def check_closed(places: llmstack.Places, what: str, base: Any) -> None:
    """The file is refused, or what it reaches is what was trusted, or it is not trusted."""
    now = reached(places)
    if now is not None and now == base:
        return
    try:
        llmstack.check_run_trust(places)        # it returns where the directory is trusted
    except UserError:
        return
    raise AssertionError(f"{what!r} gets {now} past trust")


# ---- 1. every spelling of models.ini


POSITIONS = [
    "{o}{k} = {v}", "{k}{o}= {v}", "{k} {o} = {v}", "{o} {k} = {v}", " {o}{k} = {v}", "{k} ={o}{v}",
    "{k} = {v}{o}", "{h}{o}{t} = {v}", "; x{o}{k} = {v}", "; x{o}\n{k} = {v}", "ttl = 3{o}{k} = {v}",
    "{o}\n{k} = {v}", "{k} : {o} {v}", "{k}={v} {o};", "# {o}\n {k} = {v}",
]


@pytest.mark.parametrize(("key", "value", "before"), REACHES, ids=[f"{k} {n}" for n, (k, _, _) in enumerate(REACHES)])
def test_no_white_space_hides_a_key(key: str, value: str, before: str, places: llmstack.Places) -> None:
    llmstack.trust_project(places)
    for odd, position in itertools.product(ODD, POSITIONS):
        line = position.format(k=key, v=value, o=odd, h=key[:3], t=key[3:])
        INI.write_text(f"{before}{line}\n{NO_MODELS}", encoding="utf-8", newline="")
        check_closed(places, line, [])


SPELLINGS = [
    "{K} = {v}", "{k}={v}", "{k}:{v}", "{k}\t=\t{v}", "\t{k} = {v}", "    {k} = {v}", "{k} = {v} ; comment", "{k} = {v}\t;x",
    "{k} = {v}\r", "{k} = \r{v}", "{T} = {v}", "{k} =\n  {v}", "{k} = harmless\n  {v}", "{k} = harmless\n{k} = {v}",
    "{k} = {v}\n{k} = {v}", "{k} = {v}\n{k} = harmless", "[other]\n{k} = {v}", "[DEFAULT]\n{k} = {v}", "[default]\n{k} = {v}",
    "[ DEFAULT ]\n{k} = {v}", "[DEFAULT] # x\n{k} = {v}", "[DEFAULT] ; x\n{k} = {v}", "[DEFAULT][x]\n{k} = {v}",
    "[DEFAULT\n{k} = {v}", "[DEFAULT]x\n{k} = {v}", "[]\n{k} = {v}", "; {k} = {v}", "# {k} = {v}", "x = 1 ; {k} = {v}",
    "x = 1\\\n{k} = {v}", "{k} = {v}\\", "{k} = '{v}'", "{k}[] = {v}", "{k} == {v}", "{k} =: {v}", "%{k} = {v}", "{k} = {v}\0",
    "{k}\u0301 = {v}", "\u212a{k} = {v}", "{f} = {v}", "\ufeff{k} = {v}", "\\u00a0{k} = {v}",
]


@pytest.mark.parametrize(("key", "value", "before"), REACHES, ids=[f"{k} {n}" for n, (k, _, _) in enumerate(REACHES)])
def test_no_spelling_gets_past(key: str, value: str, before: str, places: llmstack.Places) -> None:
    llmstack.trust_project(places)
    full = "".join(chr(ord(c) + 0xFEE0) if c != "_" else c for c in key)          # fullwidth letters, which NFKC makes plain
    assert unicodedata.normalize("NFKC", full) == key
    heads = ("", "\ufeff", "\ufeff\ufeff", "; x\n", "\n\n")
    for spelling, head, ending in itertools.product(SPELLINGS, heads, ("\n", "\r\n", "\r")):
        line = spelling.format(k=key, K=key.upper(), T=key.title(), v=value, f=full)
        text = f"{head}{before}{line}\n{NO_MODELS}".replace("\n", ending)
        INI.write_text(text, encoding="utf-8", newline="")
        check_closed(places, text, [])


@pytest.mark.parametrize(("key", "value", "before"), REACHES, ids=[f"{k} {n}" for n, (k, _, _) in enumerate(REACHES)])
def test_another_value_than_the_trusted_one_waits(key: str, value: str, before: str, places: llmstack.Places) -> None:
    if key == "api_key_env":
        other = "OTHER_KEY"
    elif key == "allow_unauthenticated":
        other = "no"
    else:
        other = value + "2"
    INI.write_text(f"{before}{key} = {value}\n{NO_MODELS}")
    assert reached(places)
    assert not llmstack.is_trusted(places, "run")
    llmstack.trust_project(places)
    assert llmstack.is_trusted(places, "run")
    base = reached(places)
    INI.write_text(f"; more\n\n{before.replace('[a]', '[c]').replace('[box]', '[c]')}{key.upper()}: {other}\n{NO_MODELS}")
    if key == "allow_unauthenticated":
        assert llmstack.is_trusted(places, "run"), "less than what was trusted"
    else:
        check_closed(places, other, base)
    INI.write_text(f"{before}{key.upper()} : {value} ; the same\n# x\n{NO_MODELS}")
    assert llmstack.is_trusted(places, "run"), "only the value counts"


@pytest.mark.parametrize("path", ["a.gguf", "models/a.gguf", "./a.gguf", "a..gguf", "..a/b.gguf", "a/..b.gguf", "a/b../c.gguf"])
def test_a_path_within_the_project_needs_no_trust(path: str, places: llmstack.Places) -> None:
    INI.write_text(f"[a]\npath = {path}\n")
    assert llmstack.is_trusted(places, "run")


@pytest.mark.parametrize("path", [
    "/a.gguf", "../a.gguf", "a/../../b.gguf", "..", "a/..", "~/a", "~root/a", "C:\\a", "c:a",
    "\\\\h\\a", "a\\..\\..\\b", "//host/share/a", "a/../..\\b", "a:b"])
def test_a_path_that_may_lead_out_of_it_does(path: str, places: llmstack.Places) -> None:
    INI.write_text(f"[a]\npath = {path}\n")
    assert not llmstack.is_trusted(places, "run")


def test_a_key_whose_row_says_nothing_of_it_needs_trust(places: llmstack.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Option("text").harmless.match("x")
    assert not Option("bool").harmless.match("yes")
    monkeypatch.setitem(llmstack.TIER_OPTIONS, "quant", Option("text"))
    INI.write_text("[a]\npath = a.gguf\nquant = Q4\n")
    assert not llmstack.is_trusted(places, "run")
    llmstack.trust_project(places)
    assert llmstack.is_trusted(places, "run")


def test_every_field_that_the_file_sets_has_a_row() -> None:
    rows = {option.field or key for key, option in llmstack.DEFAULT_OPTIONS.items()}
    assert set(Config._fields) - {"tiers", "routing", "aliases", "server", "channel"} == rows - set(llmstack.SERVER_OPTIONS)
    of_tiers = set(llmstack.TIER_OPTIONS) - {"rope_scaling", *llmstack.TIER_SERVER_OPTIONS, *llmstack.PRICE_KEYS}
    assert set(Tier._fields) - {"server", "prices", "channel", "settled"} == of_tiers | {
        "rope_scale", "rope_orig_ctx", "name", "cache_ram_mib", "ctx_checkpoints"}
    assert set(llmstack.Routing._fields) == set(llmstack.ROUTING_OPTIONS)


# ---- the parser: lines, bounds


def first_problem(text: str) -> str:
    """The first problem of a models.ini that has one."""
    try:
        parse_models_ini(text)
    except ConfigError as exc:
        return exc.problems[0]
    raise AssertionError(f"it has none: {text!r}")


@pytest.mark.parametrize("line", [
    "{}engine = auto", "engine{} = auto", "engine ={}auto", "engine = {}auto", "{}[x]",
    "[ROUTING]{};", "{};"])
def test_odd_white_space_is_an_error_with_its_line(line: str) -> None:
    for odd in ODD:
        problem = first_problem(f"; one\n[DEFAULT]\n{line.format(odd)}\n")
        assert problem.startswith("models.ini:3: "), (odd, problem)
        assert odd not in problem


def test_nor_does_it_end_a_line() -> None:
    for odd in WIDE_SPACES:
        problem = first_problem(f"[a]\npath = a.gguf{odd}\n")
        assert problem.startswith("models.ini:2: "), (odd, problem)


@pytest.mark.parametrize("text", [
    "llama_server_bin = /a\rengine = auto\n", "; x\rllama_server_bin = /a\n",
    "engine = auto\r\r\n", "\r"])
def test_a_bare_cr_is_an_error_with_its_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_models_ini(f"\r\n[DEFAULT]\r\n{text}")
    assert caught.value.problems == ("models.ini:3: holds the control character '\\r'; take it out",)


@pytest.mark.parametrize("key", ["\u0435ngine", "engin\u00e9", "\uff45ngine", "engine\u200b", "\u212a", "\u00fcber"])
def test_keys_are_ascii(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_models_ini(f"[DEFAULT]\n{key} = auto\n")
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("models.ini:2: a key holds ASCII characters only, and this one has U+")


def test_text_of_any_language_is_a_value() -> None:
    config, _ = parse_models_ini("[a]\npath = a.gguf\ndescription = Rapide\u00a0! \u6f22\u3000\u5b57\n")
    assert config.tiers[0].description == "Rapide\u00a0! \u6f22\u3000\u5b57"


def sections(count: int) -> str:
    return "".join(f"[t{n}]\nhf_repo = a/b\nhf_file = c.gguf\n" for n in range(count))


def calls(text: str) -> int:
    """How many lines of the program run to parse it: a measure without a clock."""
    count = 0

    def count_line(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return count_line

    before = sys.gettrace()
    sys.settrace(count_line)
    try:
        parse_models_ini(text)
    finally:
        sys.settrace(before)
    return count


def test_the_work_grows_with_the_file_and_not_with_its_square() -> None:
    calls(sections(10))
    assert calls(sections(400)) < 2.2 * calls(sections(200))


@pytest.mark.parametrize(("text", "line", "what"), [
    pytest.param(sections(4_000), 3 * llmstack.MAX_INI_SECTIONS + 1, "more than 1,000 sections", id="sections"),
    pytest.param("[DEFAULT]\n" + "; x\n" * 100_000, 1, "is over 262,144 bytes", id="bytes"),
    pytest.param("[DEFAULT]\nhost = " + "x" * 9_000, 2, "is longer than 8,192 characters", id="line"),
])
def test_a_file_out_of_all_proportion_is_one_line(text: str, line: int, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_models_ini(text)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"models.ini:{line}: ")
    assert what in caught.value.problems[0]


def test_a_thousand_problems_are_the_first_hundred() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_models_ini("[DEFAULT]\n" + "stray\n" * 1_000)
    assert len(caught.value.problems) == 101
    assert caught.value.problems[-1] == "models.ini:102: and 900 more problems from here"
    _, warnings = parse_models_ini("[DEFAULT]\n" + "".join(f"odd{n} = 1\n" for n in range(1_000)))
    assert len(warnings) == 100


# ---- what is no file, or cannot be read


def too_long(path: Path) -> None:
    path.write_bytes(b"; x\n" * (17 * 1024 * 1024 // 4) + b"[DEFAULT]\nllama_server_bin = ./evil.sh\n" + NO_MODELS.encode())


def long_after(path: Path) -> None:
    path.write_bytes(b"[DEFAULT]\nllama_server_bin = ./evil.sh\n" + NO_MODELS.encode() + b"; x\n" * (17 * 1024 * 1024 // 4))


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listener(path: Path) -> None:
    short = os.path.relpath(path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(short)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def latin(path: Path) -> None:
    path.write_bytes(b"[DEFAULT]\nllama_server_bin = ./evil\xfc.sh\n")


def utf16(path: Path) -> None:
    path.write_bytes(f"[DEFAULT]\nllama_server_bin = ./evil.sh\n{NO_MODELS}".encode("utf-16"))


def directory(path: Path) -> None:
    path.mkdir()


def nul(path: Path) -> None:
    path.write_bytes(b"\0" * 100)


def shut(path: Path) -> None:
    path.write_text("[DEFAULT]\nllama_server_bin = ./evil.sh\n" + NO_MODELS)
    path.chmod(0)


KINDS: list[Callable[[Path], None]] = [too_long, long_after, fifo, listener, endless, loop, latin, utf16, directory, nul, shut]


@pytest.mark.parametrize("make", KINDS)
def test_what_cannot_be_read_is_not_trusted(make: Callable[[Path], None], places: llmstack.Places,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """A FIFO would hang here for ever, until faulthandler tells where."""
    if make is shut and os.geteuid() == 0:
        pytest.skip("root reads everything")
    llmstack.trust_project(places)
    make(INI)
    assert reached(places) is None
    assert not llmstack.is_trusted(places, "run")
    with pytest.raises(UserError):
        llmstack.check_run_trust(places)
    llmstack.trust_project(places)
    assert not llmstack.is_trusted(places, "run"), "it cannot be trusted either"
    assert llmstack.main(["trust"]) == 1
    out, err = capsys.readouterr()
    assert "models.ini" in out
    assert err.startswith("llmstack: error: not trusted: models.ini; the rest is")
    assert llmstack.main(["start", "--detach"]) in (1, 2)
    err = capsys.readouterr().err
    assert "models.ini" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["litellm_config.yaml", "opencode.json", "AGENTS.md", "default-channel"])
@pytest.mark.parametrize("make", [too_long, fifo, endless, loop, directory])
def test_no_other_file_that_takes_effect_is_either(make: Callable[[Path], None], name: str, places: llmstack.Places) -> None:
    part = "run" if name.endswith("yaml") else "hook"
    make(STATE / name)
    assert not llmstack.is_trusted(places, part)
    llmstack.trust_project(places)
    assert not llmstack.is_trusted(places, part)
    if part == "run":
        with pytest.raises(UserError, match=rf"{name} cannot be read"):
            llmstack.check_run_trust(places)


def test_a_link_to_another_file_is_read_through(places: llmstack.Places, tmp_path: Path) -> None:
    other = tmp_path / "other.ini"
    other.write_text(HARMLESS)
    INI.symlink_to(other)
    assert llmstack.is_trusted(places, "run")
    other.write_text("[DEFAULT]\nllama_server_bin = ./evil.sh\n" + NO_MODELS)
    assert not llmstack.is_trusted(places, "run")


def test_a_file_that_the_user_names_needs_no_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.ini"
    mine.write_text("[DEFAULT]\nllama_server_bin = ./mine.sh\n" + NO_MODELS)
    monkeypatch.setenv("LLMSTACK_MODELS_INI", str(mine))
    llmstack.check_run_trust(llmstack.find_places(os.environ))


# ---- from end to end


CLONES = {
    "plainly": b"[DEFAULT]\nllama_server_bin = ./evil.sh\n",
    "nbsp": "[DEFAULT]\n\u00a0llama_server_bin = ./evil.sh\n".encode(),
    "nbsp behind": "[DEFAULT]\nllama_server_bin\u00a0= ./evil.sh\n".encode(),
    "ideographic": "[DEFAULT]\n\u3000llama_server_bin = ./evil.sh\n".encode(),
    "cr": b"[DEFAULT]\nmemory_gb = auto\rllama_server_bin = ./evil.sh\n",
    "comment and cr": b"[DEFAULT]\n; x\rllama_server_bin = ./evil.sh\n",
    "line separator": "[DEFAULT]\n; x\u2028llama_server_bin = ./evil.sh\n".encode(),
    "next line": b"[DEFAULT]\n; x\xc2\x85llama_server_bin = ./evil.sh\n",
    "17 MB": b"; x\n" * (17 * 1024 * 1024 // 4) + b"[DEFAULT]\nllama_server_bin = ./evil.sh\n",
}


@pytest.mark.parametrize("name", CLONES)
def test_the_program_of_a_clone_does_not_run(name: str, real_data: Path) -> None:
    """On a plain `start`, in a directory that nobody has trusted."""
    project = Project("", "embedded")
    evil = Path("evil.sh")
    evil.write_text("#!/bin/sh\necho ran >> ran\n")
    evil.chmod(0o755)
    (STATE / "m.gguf").write_bytes(render_noise_gguf())
    tiers = b"[m]\nrole = fast\npath = m.gguf\nctx_size = 2k\nsize_gb = 0.1\n"
    ports = project.defaults.encode().replace(b"[DEFAULT]\n", b"")
    head, _, rest = CLONES[name].partition(b"[DEFAULT]\n")
    INI.write_bytes(head + b"[DEFAULT]\n" + rest + ports + tiers)
    try:
        done = subprocess.run([sys.executable, PROGRAM, "start", "--detach"], capture_output=True, text=True, check=False,
                              stdin=subprocess.DEVNULL, timeout=60)
        assert not Path("ran").exists()
        if name == "line separator":            # the parser, too, takes it for a part of the comment
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode in (1, 2)
            assert not list(STATE.glob("*.pid"))
            assert "not trusted here" in done.stderr or "models.ini" in done.stderr
    finally:
        llmstack.main(["stop"])
    assert not Path("ran").exists()


@pytest.mark.parametrize("odd", ["", "\u00a0", "\u3000", "x = 1\r"])
@pytest.mark.parametrize("words", [
    ["start", "--detach"], ["restart", "--detach"], ["serve", "--port", "0"], ["status"],
    ["why", "r.json"], ["check"], ["fit"], ["install"], ["reload"]])
def test_no_credential_leaves_a_clone(words: list[str], odd: str, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-test")
    Path("r.json").write_text('{"model": "auto", "messages": []}')
    with socket.create_server(("127.0.0.1", 0)) as evil:
        Project(f"[code-ultra]\nrole = ultra\nmodel = m\n{odd}base_url = http://127.0.0.1:{evil.getsockname()[1]}\n"
                f"{odd}api_key_env = AWS_SECRET_ACCESS_KEY\n")
        Path(llmstack.trust_file(llmstack.find_places(os.environ).data)).unlink()
        try:
            code = llmstack.main(words)
        finally:
            llmstack.main(["stop"])
        evil.setblocking(False)
        with pytest.raises(BlockingIOError):
            evil.accept()
    assert code or words[0] not in ("start", "restart", "serve")
    assert "a-secret-of-the-test" not in "".join(capsys.readouterr())


def test_an_address_in_active_channel_goes_to_no_shell(places: llmstack.Places) -> None:
    """It is written at each start, so nobody trusts it; a clone may bring one along."""
    (STATE / "default-channel").write_text("current\n")
    (STATE / "active-channel").write_text("external http://evil.example\n")
    llmstack.trust_project(places)
    lines = llmstack.shell_lines(places._replace(env={"LLMSTACK_ACTIVE": "1"}), "bash")
    assert "evil.example" not in lines
    assert "LLMSTACK_CHANNEL" in lines


# ---- 2. asked on a terminal


class Person:
    """Answers as told and remembers what was asked; None is nobody."""

    def __init__(self, answer: Optional[bool], meanwhile: Callable[[], object] = lambda: None) -> None:
        self.answer, self.meanwhile = answer, meanwhile
        self.asked: list[str] = []

    def __call__(self, question: str) -> Optional[bool]:
        self.asked.append(question)
        self.meanwhile()
        return self.answer


def offer(places: llmstack.Places, person: Person) -> list[str]:
    said: list[str] = []
    llmstack.offer_trust(places, said.append, person)
    return said


def test_yes_trusts_what_was_shown(places: llmstack.Places) -> None:
    INI.write_text("[DEFAULT]\nllama_server_bin = /opt/mine\n" + HOST)
    (STATE / "AGENTS.md").write_text("one\ntwo\n")
    person = Person(True)
    assert offer(places, person) == ["Trusted as it is now."]
    assert [" ".join(line.split()) for line in person.asked[0].split("\n")] == [
        "New or changed since it was trusted here:", f"project {Path.cwd()}", "AGENTS.md 2 lines",
        "models.ini llama_server_bin = /opt/mine", "models.ini [box] base_url = http://127.0.0.1:9",
        "models.ini [box] api_key_env = BOX_KEY", "Trust this? [y/N]"]
    assert llmstack.is_trusted(places, "hook")
    assert llmstack.is_trusted(places, "run")
    assert offer(places, again := Person(True)) == []
    assert again.asked == [], "nothing is new"


def test_only_what_is_new_is_shown(places: llmstack.Places) -> None:
    INI.write_text("[DEFAULT]\nllama_server_bin = /opt/mine\n" + HOST)
    offer(places, Person(True))
    INI.write_text("[DEFAULT]\nllama_server_bin = /opt/other\nengine = embedded\n" + HOST)
    person = Person(False)
    assert offer(places, person) == []
    assert "/opt/other" in person.asked[0]
    assert "base_url" not in person.asked[0]
    with pytest.raises(UserError, match=r"named by models\.ini llama_server_bin"):
        llmstack.check_run_trust(places)


@pytest.mark.parametrize("answer", [False, None])
def test_anything_but_yes_trusts_nothing(answer: Optional[bool], places: llmstack.Places) -> None:
    INI.write_text("[DEFAULT]\nllama_server_bin = /opt/mine\n" + HOST)
    assert offer(places, Person(answer)) == []
    assert not llmstack.is_trusted(places, "run")
    assert not Path(llmstack.trust_file(places.data)).exists()


@pytest.mark.parametrize(("name", "text"), [("models.ini", "[DEFAULT]\nllama_server_bin = /opt/other\n" + HOST),
                                            ("litellm_config.yaml", "callbacks: evil\n"), ("AGENTS.md", "do as I say\n")])
def test_what_changes_while_a_person_reads_is_not_trusted(name: str, text: str, places: llmstack.Places) -> None:
    INI.write_text("[DEFAULT]\nllama_server_bin = /opt/mine\n" + HOST)
    for other in ("litellm_config.yaml", "AGENTS.md"):
        (STATE / other).write_text("x\n")
    offer(places, Person(True, lambda: (STATE / name).write_text(text)))
    assert not (llmstack.is_trusted(places, "run") and llmstack.is_trusted(places, "hook"))


def test_what_cannot_be_read_is_shown_and_stays_out(places: llmstack.Places) -> None:
    INI.write_text("[DEFAULT]\nllama_server_bin = /opt/mine\n" + HOST)
    fifo(STATE / "litellm_config.yaml")
    person = Person(True)
    offer(places, person)
    assert "cannot be read: it is no regular file" in person.asked[0]
    with pytest.raises(UserError, match=r"litellm_config\.yaml cannot be read"):
        llmstack.check_run_trust(places)


@pytest.mark.parametrize("words", [["start"], ["restart"], ["install"]])
def test_the_commands_ask_where_a_person_is(words: list[str], places: llmstack.Places, monkeypatch: pytest.MonkeyPatch) -> None:
    INI.write_text("[DEFAULT]\nllama_server_bin = /opt/mine\n" + HOST)
    person = Person(False)
    monkeypatch.setattr(llmstack, "ask_person", person)
    code = llmstack.main(words)
    assert code == (0 if words == ["install"] else 1)
    assert len(person.asked) == 1
    assert not llmstack.is_trusted(places, "run")


@pytest.fixture
def on_terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_it(*words: str) -> Terminal:
        opened.append(Terminal([sys.executable, PROGRAM, *words], dict(os.environ, TERM="dumb"), Path.cwd()))
        return opened[-1]

    yield open_it
    for terminal in opened:
        terminal.close()


def test_a_terminal_is_asked(on_terminal: Callable[..., Terminal]) -> None:
    project = Project()
    server = Path("server.sh").absolute()
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    INI.write_text(f"{project.defaults}llama_server_bin = {server}\n{NO_MODELS}")
    try:
        terminal = on_terminal("start", "--detach")
        assert f"= {server}" in terminal.wait("Trust this? [y/N] ")
        terminal.send("")
        assert terminal.finish() == 1
        assert "is not trusted here as it is now" in terminal.fresh
        terminal = on_terminal("start", "--detach")
        terminal.wait("Trust this? [y/N] ")
        terminal.send("y")
        assert terminal.finish() == 0, terminal.fresh
        assert "Trusted as it is now." in terminal.fresh
        terminal = on_terminal("restart", "--detach")
        assert terminal.finish() == 0, terminal.fresh
        assert "Trust this?" not in terminal.fresh
    finally:
        llmstack.main(["stop"])


def test_an_interrupt_at_the_question_trusts_nothing(on_terminal: Callable[..., Terminal], places: llmstack.Places) -> None:
    INI.write_text("[DEFAULT]\nllama_server_bin = /opt/mine\n" + HOST)
    terminal = on_terminal("install")
    terminal.wait("Trust this? [y/N] ")
    os.kill(terminal.process.pid, signal.SIGINT)
    assert terminal.finish() == 130
    assert not llmstack.is_trusted(places, "run")


# ---- the ledger


def test_one_file_knows_what_is_trusted_and_what_we_wrote(places: llmstack.Places) -> None:
    assert llmstack.main(["install"]) == 0
    assert llmstack.is_trusted(places, "hook")
    assert llmstack._is_ours(places, "opencode.json", (STATE / "opencode.json").read_bytes())
    assert not Path(places.data, "written.json").exists()
    (STATE / "opencode.json").write_text("{}")
    llmstack.trust_project(places)
    assert not llmstack._is_ours(places, "opencode.json", b"{}"), "trusted, and yet somebody else's"


@pytest.mark.parametrize("text", ["[1", "[1]", "{}", '{"": 1}', '{"%s": 1}', '{"%s": {"run": 1, "hook": "x", "written": []}}',
                                  '{"%s": {"run": {"models.ini llama_server_bin": 1}}}'])
def test_a_ledger_of_another_shape_trusts_nothing(text: str, places: llmstack.Places) -> None:
    INI.write_text("[DEFAULT]\nllama_server_bin = /opt/mine\n" + HOST)
    path = Path(llmstack.trust_file(places.data))
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("%s", os.path.realpath(places.state)))
    assert not llmstack.is_trusted(places, "run")
    assert not llmstack._is_ours(places, "opencode.json", b"")
    llmstack.trust_project(places)
    assert llmstack.is_trusted(places, "run")


def test_two_who_trust_at_once_lose_nothing(places: llmstack.Places) -> None:
    INI.write_text("[DEFAULT]\nllama_server_bin = /opt/mine\n" + HOST)
    names = [f"file{n}" for n in range(8)]
    threads = [threading.Thread(target=llmstack._remember, args=(places, name, b"x")) for name in names]
    threads.append(threading.Thread(target=llmstack.trust_project, args=(places,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(llmstack._is_ours(places, name, b"x") for name in names)
    assert llmstack.is_trusted(places, "run")
