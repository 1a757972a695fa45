"""extras/probe.py: what a tier is found to be able to do, where that is kept, and who goes by it."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path
from typing import Any, Mapping

import pytest

import llmstack
from tests.noise_model import render_noise_gguf

PROBE = llmstack.load_extra("probe")
NOTHING: tuple[int, dict[str, Any]] = (200, {})


def hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `llmstack probe` run PROBE itself, so that a test can change it."""
    load = llmstack.load_extra
    monkeypatch.setattr(llmstack, "load_extra", lambda name: PROBE if name == "probe" else load(name))


class Told:
    """A trial whose server answers what it was told to."""

    def __init__(self, *answers: tuple[int, dict[str, Any]]) -> None:
        self.answers, self.asked = list(answers), []    # type: list[Any], list[Any]

    def ask(self, path: str, body: Mapping[str, Any] | None = None,
            timeout_s: float = 10) -> tuple[int, dict[str, Any]]:
        self.asked.append((path, body))
        return self.answers.pop(0)


def reply(content: Any = "", finish: str = "stop", **more: Any) -> tuple[int, dict[str, Any]]:
    message = {"role": "assistant", "content": content, **more}
    return 200, {"choices": [{"message": message, "finish_reason": finish}]}


def call(name: str = "get_weather", arguments: str = '{"city": "Paris"}') -> tuple[int, dict[str, Any]]:
    function = {"name": name, "arguments": arguments}
    return reply(None, tool_calls=[{"id": "x", "type": "function", "function": function}])


REFUSAL = (500, {"error": {"code": 500, "message": "this template\nis broken"}})


@pytest.mark.parametrize(("answers", "can", "note"), [
    ([call(), reply("It is 17 degrees.")], True, ""),
    ([call(), reply("It is warm.")], True, "its answer leaves out what the tool said"),
    ([call(), REFUSAL], False, "the tool's answer is refused: this template is broken"),
    ([reply("It is sunny.")], False, "it answers without a call"),
    ([reply("so", "length")], None, "its answer is cut off before a call"),
    ([call("other")], False, "its call is not one that was offered"),
    ([call(arguments="{")], False, "its call is not one that was offered"),
    ([call(arguments="[]")], False, "its call is not one that was offered"),
    ([REFUSAL], False, "this template is broken"),
    ([(200, {"choices": "x"})], False, "it answers without a call"),
])
def test_a_call_of_a_tool_there_and_back(answers: list[Any], can: bool | None, note: str) -> None:
    trial = Told(*answers)
    assert PROBE.probe_tools(trial) == (can, note)
    if can:
        roles = [message["role"] for message in trial.asked[1][1]["messages"]]
        assert roles == ["user", "assistant", "tool"]
        assert trial.asked[1][1]["messages"][2]["tool_call_id"] == "x"


@pytest.mark.parametrize(("answer", "can"), [
    (reply('{"colour": "red", "bright": true}'), True),
    (reply('{"colour": "pink", "bright": true}'), False), (reply("red"), False), (reply("[]"), False),
    (reply('{"colour": "r', "length"), None), (REFUSAL, False),
])
def test_an_answer_by_a_schema(answer: Any, can: bool | None) -> None:
    assert PROBE.probe_json(Told(answer)).can is can


@pytest.mark.parametrize(("answer", "can"), [
    (reply("42", reasoning_content="17 and 25"), True), (reply("<think>17 and", "length"), True),
    (reply("42"), False), (REFUSAL, None),
])
def test_thinking(answer: Any, can: bool | None) -> None:
    assert PROBE.probe_reasoning(Told(answer)).can is can


@pytest.mark.parametrize(("answer", "verdict"), [
    (reply("Red."), (True, "")), (reply("Blue"), (True, "it does not say that a red square is red")),
    (REFUSAL, (False, "this template is broken")),
])
def test_a_picture(answer: Any, verdict: Any) -> None:
    trial = Told(answer)
    assert PROBE.probe_pictures(trial) == verdict
    content = trial.asked[0][1]["messages"][0]["content"]
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,iVBORw0KGgo")


class Process:
    """One that has ended, or not."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code


def test_an_answer_that_takes_too_long_tells_nothing() -> None:
    def slow(trial: Any) -> Any:
        raise OSError("no answer within 600 s")

    trial: Any = Told()
    trial.process = Process(None)
    assert PROBE.in_time(trial, slow) == (None, "no answer within 600 s")
    trial.process = Process(1)
    with pytest.raises(OSError, match="no answer"):
        PROBE.in_time(trial, slow)


@pytest.mark.parametrize(("context", "sizes"), [
    (131_072, [2048, 16_384]), (16_448, [2048, 16_384]), (16_447, [2048, 16_383]), (8192, [2048, 8128]),
    (1024, [960]), (64, []),
])
def test_prompts_go_as_far_as_the_context(context: int, sizes: list[int]) -> None:
    assert PROBE.speed_sizes(context) == sizes


def timings(read: float, **more: Any) -> tuple[int, dict[str, Any]]:
    return 200, {"timings": {"prompt_per_second": read, "predicted_per_second": 20.04, **more}}


TOKENS = (200, {"tokens": list(range(500))})


def test_a_prompt_that_would_take_too_long_is_left_out_and_said() -> None:
    trial = Told(TOKENS, timings(10.0, draft_n=8, draft_n_accepted=6))
    rows, note = PROBE.measure_speeds(trial, 32_768)
    assert rows == [{"prompt_tokens": 2048, "read_per_s": 10.0, "written_per_s": 20.0, "accepted": 0.75}]
    assert note == "16,384 tokens would take 27 minutes or more"
    body = trial.asked[1][1]
    assert (len(body["prompt"]), body["cache_prompt"], body["ignore_eos"]) == (2048, False, True)


@pytest.mark.parametrize(("context", "note"), [
    (16_448, ""), (8192, "16,384 tokens and an answer are more than it holds"),
    (1024, "2,048 and 16,384 tokens and an answer are more than it holds"),
])
def test_sizes_that_the_context_does_not_hold_are_said(context: int, note: str) -> None:
    trial = Told(*[TOKENS, timings(500.0)] * 2)
    rows, said = PROBE.measure_speeds(trial, context)
    assert [row["prompt_tokens"] for row in rows] == PROBE.speed_sizes(context)
    assert said == note


def test_the_words_of_prompts_do_not_repeat() -> None:
    trial = Told(TOKENS, TOKENS)
    PROBE.prompt_tokens(trial, 300)
    PROBE.prompt_tokens(trial, 300)
    texts = [body["content"] for _, body in trial.asked]
    assert texts[0] == texts[1], "the same each time"
    assert texts[0][:200] not in texts[0][200:]


# ---- with a real llama-server


@pytest.fixture
def places(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> llmstack.Places:
    """A project with one tier, whose words are noise."""
    Path("noise.gguf").write_bytes(render_noise_gguf())
    write_ini("")
    return llmstack.find_places(os.environ)


def write_ini(lines: str) -> None:
    state = Path(".llmstack")
    state.mkdir(exist_ok=True)
    text = f"[code-fast]\nrole = fast\npath = ../noise.gguf\nctx_size = 4096\nthreads = 1\n{lines}"
    (state / "models.ini").write_text(text)
    llmstack.trust_project(llmstack.find_places(os.environ), "run")


def true_tier(places: llmstack.Places) -> llmstack.Tier:
    return llmstack.true_config(llmstack.load_config(places), places).tiers[0]


def test_a_tier_is_measured_and_that_counts(
    places: llmstack.Places, capsys: pytest.CaptureFixture[str]
) -> None:
    assert true_tier(places).tool_call
    assert llmstack.main(["probe", "--json"]) == 0
    row, = json.loads(capsys.readouterr().out)
    print(row)
    assert row["template_error"] == ""
    assert row["tool_call"] is False
    assert row["json_schema"] is True
    assert row["context_tokens"] == 4096
    assert [speed["prompt_tokens"] for speed in row["speeds"]] == [2048, 4032]
    assert all(speed["read_per_s"] > 0 and speed["written_per_s"] > 0 for speed in row["speeds"])
    assert row["memory"]["host_gb"] > 0
    assert row["memory"]["fit_gb"] > 0
    assert "b" in row["build"]
    path = Path(llmstack.probes_file(places.data))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not true_tier(places).tool_call
    config = llmstack.true_config(llmstack.load_config(places), places)
    text = llmstack.render_opencode_json(config, "http://x", "/a")
    models = json.loads(text)["provider"]["llama.cpp"]["models"]
    assert models["code-fast"]["tool_call"] is False
    assert "tools" not in llmstack.tier_entry(config.tiers[0])["capabilities"]
    write_ini("tool_call = yes\n")
    assert true_tier(places).tool_call, "what models.ini says itself"
    write_ini("cache_type_k = f16\n")
    assert true_tier(places).tool_call, "of other flags nothing is known"


def test_a_template_that_does_not_compile(
    places: llmstack.Places, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".llmstack/bad.jinja").write_text("{% if x %}{{ messages[0] ")
    write_ini("chat_template_file = bad.jinja\n")
    assert llmstack.main(["probe"]) == 1
    out = capsys.readouterr().out
    assert "code-fast" in out
    assert "  template    does not compile: " in out
    llmstack.main(["check", "--offline", "--json"])
    needs = json.loads(capsys.readouterr().out)["needs"]
    assert [need for need in needs if need.startswith("code-fast: its template does not compile: ")]
    write_ini("")
    llmstack.main(["check", "--offline", "--json"])
    assert "template does not compile" not in capsys.readouterr().out


def test_what_cannot_be_measured(
    places: llmstack.Places, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert llmstack.main(["probe", "code-fist"]) == 2
    assert "did you mean code-fast?" in capsys.readouterr().err
    hold(monkeypatch)
    monkeypatch.setattr(PROBE, "running_gb", lambda *_: 1e9)
    assert llmstack.main(["probe"]) == 1
    assert "the running stack holds 1000000000.0 of" in capsys.readouterr().err
    Path("noise.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(PROBE, "running_gb", lambda *_: 0.0)
    assert llmstack.main(["probe"]) == 1
    assert "code-fast does not load" in capsys.readouterr().err
    Path("noise.gguf").unlink()
    assert llmstack.main(["probe"]) == 1
    assert "no model of this project is here" in capsys.readouterr().err
    assert not Path(llmstack.probes_file(places.data)).exists()


def test_a_signal_leaves_no_server(
    places: llmstack.Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a session of its own, so nobody else would end it."""
    def ended(trial: Any) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return ""

    before = signal.getsignal(signal.SIGTERM)
    hold(monkeypatch)
    monkeypatch.setattr(PROBE, "template_error", ended)
    assert llmstack.main(["probe"]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert not Path(llmstack.probes_file(places.data)).exists()


def test_old_measurements_give_way(places: llmstack.Places) -> None:
    for number in range(llmstack.MAX_LEARNED + 3):
        PROBE.keep_probe(places.data, str(number), {"tier": "a"}, llmstack)
    kept = json.loads(Path(llmstack.probes_file(places.data)).read_text())
    assert list(kept) == [str(n) for n in range(3, llmstack.MAX_LEARNED + 3)]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 3}'])
def test_a_damaged_record_is_none(places: llmstack.Places, text: str) -> None:
    Path(llmstack.probes_file(places.data)).write_text(text)
    assert true_tier(places).tool_call
