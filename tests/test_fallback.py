"""The router's word on every tier is true: streams fall back, a wait is told, a context error stays here.

With the engine's real processes (fake_llama_server.py) where loads fail, with a scripted upstream
where answers do.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, Iterator, List

import pytest

import llmstack
from llmstack import Config, Tier
from tests.scripted import answer
from tests.test_engine import (  # noqa: F401  # fixtures
    Broken,
    Call,
    OpenStage,
    Stage,
    open_stage,
    wait_for,
)
from tests.test_router import (  # noqa: F401  # fixtures
    CHAT,
    CONFIG,
    EVENTS,
    OK,
    SSE_CHUNKED,
    HeardLog,
    Rig,
    Start,
    asked,
    by_model,
    chat,
    error_of,
    post,
    read_chunks,
    refuse,
    start,
)

# ---------------------------------------------------------------------------------------------------
# Loads that fail
# ---------------------------------------------------------------------------------------------------


class Routed:
    """A router before an engine, both in this process."""

    def __init__(self, stage: Stage, **settings: Any) -> None:
        self.stage = stage
        self.log = HeardLog()
        self.app = llmstack.RouterApp(stage.config, stage.app, self.log,
                                      llmstack.Setting(**settings))
        self.server = llmstack.Server("127.0.0.1", 0, self.app)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        self.calls: List[Call] = []

    def call(self) -> Call:
        self.calls.append(Call(self.server.server_port))
        return self.calls[-1]

    def close(self) -> None:
        for call in self.calls:
            call.close()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


LOCAL = Config(tiers=(
    Tier("code-fast", "fast", hf_repo="a/b", hf_file="fast.gguf", ctx_size=131_072, size_gb=1),
    Tier("code-smart", "agent", hf_repo="a/b", hf_file="smart.gguf", ctx_size=65_536, size_gb=1),
))


@pytest.fixture
def routed(open_stage: OpenStage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Routed]:  # noqa: F811
    monkeypatch.setattr(llmstack.Waiting, "GRACE_S", 0.0)
    monkeypatch.setattr(llmstack, "WAITING_EVERY_S", 0.01)
    routed = Routed(open_stage(config=LOCAL))
    yield routed
    routed.close()


def test_a_stream_falls_back_when_a_load_fails_long_after_it_was_opened(routed: Routed) -> None:
    routed.stage.put("code-smart.slow")
    call = routed.call().chat("auto", stream=True)
    assert call.status() == 200, "the stream is open, and its client is told to wait"
    assert call.event().startswith(": loading code-smart")
    routed.stage.put("code-smart.crash", "no memory for that\n")
    events = call.events()
    assert not any("error" in event for event in events), events
    assert events[-1] == "data: [DONE]"
    assert "code-fast says " in "".join(events)
    assert routed.app._breaker.down().keys() == {"code-smart"}
    routed.log.line_with("fell back code-smart\u2192code-fast")


def test_what_a_loaded_server_holds_is_what_counts(routed: Routed) -> None:
    """ctx_size promises 65,536; its server gives each conversation 2,048."""
    routed.stage.put("code-smart.context", "2048")
    assert routed.call().chat("code-smart").answer()[0] == 200
    wait_for(lambda: routed.app.config.by_name("code-smart").ctx_size == 2048,  # type: ignore[union-attr]
             "the router has taken note")
    listed = routed.call().send("GET", "/v1/models").answer()[1]["data"]
    assert {entry["id"]: entry["context_length"] for entry in listed}["code-smart"] == 2_048
    call = routed.call().chat("auto", "word " * 2_000)
    assert call.status() == 200
    assert call.headers["x-llmstack-model"] == "code-fast"
    assert "code-smart holds 2,048 tokens" in call.headers["x-llmstack-reason"]
    assert not routed.app._about()["changed"], "models.ini is what it was"


def test_slots_that_are_asked_for_share_a_context(routed: Routed) -> None:
    """By --kv-unified each may fill it; a build without that says itself what its slots hold."""
    config = LOCAL._replace(server=(("parallel", 4),))
    app = routed.app
    app._snapshot = app._adopt(config, {}, {})
    assert [t.ctx_size for t in app.config.tiers] == [t.ctx_size for t in LOCAL.tiers]
    app._snapshot = app._adopt(config, {}, {"code-fast": 8_192})
    assert app.config.tiers[0].ctx_size == 8_192, "what a server says wins"


def until_broken(call: Call) -> Iterator[str]:
    """The events of a stream that must not end cleanly."""
    while True:
        try:
            event = call.event()
        except Broken:
            return
        assert event, "a clean end"
        yield event


def test_when_nothing_is_left_one_error_is_said_once(routed: Routed) -> None:
    for name in ("code-smart", "code-fast"):
        routed.stage.put(f"{name}.slow")
    call = routed.call().chat("auto", stream=True)
    assert call.status() == 200
    assert call.event().startswith(": loading code-smart")
    for name in ("code-smart", "code-fast"):
        routed.stage.put(f"{name}.crash", f"{name} is cut short\n")
    errors = [event for event in until_broken(call) if "error" in event]
    assert len(errors) == 1
    assert "code-fast is cut short" in errors[0]


def test_a_named_tier_that_cannot_load_is_one_error_event(routed: Routed) -> None:
    routed.stage.put("code-smart.slow")
    call = routed.call().chat("code-smart", stream=True)
    assert call.status() == 200
    assert call.event().startswith(": loading code-smart")
    routed.stage.put("code-smart.crash", "no\n")
    event = call.event()
    while event.startswith(":"):
        event = call.event()
    assert json.loads(event[6:])["error"]["type"] == "upstream_error"


def test_what_no_tier_does_better_is_asked_of_no_other_one(routed: Routed) -> None:
    """Its stream is open already: an answer that is none cannot follow, from whichever tier."""
    routed.stage.put("code-smart.slow")
    body = {"model": "auto", "input": "x", "stream": True}
    call = routed.call().send("POST", "/v1/responses", body)    # the fake answers with its echo
    assert call.status() == 200
    assert call.event().startswith(": loading code-smart")
    routed.stage.put("code-smart.loaded")
    assert any("upstream_error" in event for event in until_broken(call))
    assert "fell back" not in routed.log.line_with("auto -> ")


def test_what_a_stream_waits_for_is_said_truly(routed: Routed) -> None:
    held = routed.call().chat("code-smart", "hold x", True)
    assert held.status() == 200
    assert held.first_data() == "code-smart says "
    routed.stage.engine._budgets_gb = (1.5,)                    # only one fits
    waiting = routed.call().chat("code-fast", stream=True)
    assert waiting.status() == 200
    assert waiting.event().startswith(": waiting for code-smart to finish before code-fast can load")
    rows = routed.app.requests()["requests"]
    assert [(r["tier"], r["stage"].split(" ")[0]) for r in rows] == [
        ("code-smart", "writing"), ("code-fast", "waiting")]
    routed.stage.put("x.go")
    assert "code-fast says " in "".join(waiting.events())


def test_a_visible_wait_is_a_chat_s_reasoning(routed: Routed) -> None:
    routed.app._snapshot = routed.app._adopt(LOCAL._replace(loading_state="visible"), {}, {})
    routed.stage.put("code-smart.slow")
    call = routed.call().chat("auto", stream=True)
    assert call.status() == 200
    delta = json.loads(call.event()[6:])["choices"][0]["delta"]
    assert delta["reasoning_content"].startswith("loading code-smart, 0 s")
    assert "content" not in delta
    routed.stage.put("code-smart.loaded")
    assert call.events()[-1] == "data: [DONE]"


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_an_hours_wait_is_at_most_100_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(llmstack.time, "monotonic", clock.monotonic)

    class Told:
        opened = True

        def __init__(self) -> None:
            self.sent: List[bytes] = []

        def send_event(self, event: bytes) -> None:
            self.sent.append(event)

    client = Told()
    waiting = llmstack.Waiting(client, "/v1/messages", True, lambda: "loading x")    # type: ignore[arg-type]
    for _ in range(3600 * 20):
        clock.now += 0.05
        waiting.tell()
    assert 60 < len(client.sent) <= 100
    assert all(m.startswith(b": loading x, ") and m.count(b"\n") == 1 for m in client.sent)
    assert int(client.sent[0].split(b", ")[1].split()[0]) == 0, "at once"


# ---------------------------------------------------------------------------------------------------
# Answers that fail
# ---------------------------------------------------------------------------------------------------

FIRST_ERRORS = {
    "OpenAI's": b'data: {"error":{"message":"overloaded","type":"server_error"}}\n\n',
    "with a code": b'data: {"error":{"code":503,"message":"loading"}}\n\n',
    "Anthropic's": b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"o"}}\n\n',
    "vLLM's": b'data: {"object":"error","message":"o","type":"InternalServerError","code":500}\n\n',
    "with choices": b'data: {"id":"g","choices":[{"delta":{},"finish_reason":"error"}],'
                    b'"error":{"code":502,"message":"Provider disconnected"}}\n\n',
    "of responses": b'event: response.failed\ndata: {"type":"response.failed","response":'
                    b'{"status":"failed","error":{"code":"server_error","message":"o"}}}\n\n',
    "behind a comment": b': ping\n\ndata: {"error":{"message":"overloaded"}}\n\n',
    "behind a retry": b'retry: 3000\n\ndata: {"error":{"message":"overloaded"}}\n\n',
    "behind a ping": b'event: ping\ndata: {"type": "ping"}\n\nevent: error\ndata: {"type":"error","error":{}}\n\n',
    "behind a beginning": b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":5}}}\n\n'
                          b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n',
    "behind two of responses": b'data: {"type":"response.created","response":{"error":null}}\n\n'
                               b'data: {"type":"response.in_progress"}\n\n'
                               b'data: {"type":"response.failed","response":{"error":{"code":"server_error"}}}\n\n',
    "nothing but its end": b"data: [DONE]\n\n",
}
PRELUDES = (b'event: ping\ndata: {"type": "ping"}\n\n', b'data: {"type":"response.created"}\n\n', b"retry: 3000\n\n")


@pytest.mark.parametrize("event", FIRST_ERRORS.values(), ids=FIRST_ERRORS.keys())
def test_a_stream_that_begins_with_an_error_is_answered_by_the_next_tier(
        start: Start, event: bytes) -> None:  # noqa: F811
    good = SSE_CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in EVENTS) + b"0\r\n\r\n"
    bad = SSE_CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event)
    rig = start(by_model(code_ultra=bad, code_smart=good))
    got = rig.ask(chat(stream=True))
    assert got.body == b"".join(EVENTS)
    assert got.header("x-llmstack-fallback").startswith("code-ultra\u2192code-smart (50")


@pytest.mark.parametrize("prelude", PRELUDES)
def test_what_opens_a_stream_is_passed_on_with_the_answer(start: Start, prelude: bytes) -> None:  # noqa: F811
    rig = start()
    client = rig.client()
    client.send(chat(stream=True))
    up = rig.upstream.next()
    up.read()
    up.send(SSE_CHUNKED, b"%x\r\n%b\r\n" % (len(prelude), prelude))
    up.send(b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in EVENTS) + b"0\r\n\r\n")
    assert client.read_message().body == prelude + b"".join(EVENTS)


def test_a_stream_of_responses_that_says_nothing_falls_back(start: Start) -> None:  # noqa: F811
    good = SSE_CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in EVENTS) + b"0\r\n\r\n"
    rig = start(by_model(code_ultra=SSE_CHUNKED + b"0\r\n\r\n", code_smart=good))
    got = rig.ask(post({"model": "auto", "input": "hello", "stream": True}, target="/v1/responses"))
    assert got.header("x-llmstack-fallback").startswith("code-ultra\u2192code-smart (500")


def test_a_tier_that_breaks_streams_is_left_alone(start: Start) -> None:  # noqa: F811
    rig = start()
    client = rig.client()
    client.send(chat(stream=True))
    up = rig.upstream.next()
    up.read()
    up.send(SSE_CHUNKED, b"%x\r\n%b\r\n" % (len(EVENTS[0]), EVENTS[0]))
    client.read_head()
    up.reset()
    client.rest()
    rig.log.line_with("broke off")
    wait_for(lambda: "code-ultra" in rig.app._breaker.down(), "the breaker")


def test_a_hosted_tier_that_stays_silent_gives_way(start: Start,  # noqa: F811
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmstack, "FIRST_BYTE_S", 0.05)
    rig = start()
    client = rig.client()
    client.send(chat(stream=True))
    silent = rig.upstream.next()
    assert silent.read().json["model"] == "code-ultra"
    following = rig.upstream.next()
    assert following.read().json["model"] == "code-smart"
    following.send(SSE_CHUNKED, *(b"%x\r\n%b\r\n" % (len(e), e) for e in EVENTS), b"0\r\n\r\n")
    got = client.read_message("POST")
    assert got.header("x-llmstack-fallback") == "code-ultra\u2192code-smart (it says nothing)"


# ---- whose fault it is


TOO_LONG = {
    "llama.cpp": ('{"error":{"code":400,"message":"request (10019 tokens) exceeds the available context'
                  ' size (4096 tokens), try increasing it","type":"exceed_context_size_error",'
                  '"n_prompt_tokens":10019,"n_ctx":4096}}', 10_019),
    "OpenAI": ('{"error":{"message":"This model\'s maximum context length is 8192 tokens. However, your'
               ' messages resulted in 9017 tokens.","code":"context_length_exceeded"}}', 9_017),
    "Anthropic": ('{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too'
                  ' long: 215,342 tokens > 200000 maximum"}}', 215_342),
    "vLLM": ('{"message":"This model\'s maximum context length is 4096 tokens. However, you requested'
             ' 5012 tokens (4500 in the messages, 512 in the completion)."}', 4_500),
    "vLLM, the prompt alone": ('{"error":{"message":"The decoder prompt (length 12324) is longer than the'
                               ' maximum model length of 8192."}}', 12_324),
    "vLLM, by now": ("This model's maximum context length is 4096 tokens. However, you requested 1000 output"
                     ' tokens and your prompt contains at least 4500 input tokens.', 4_500),
    "SGLang": ("The input (8211 tokens) is longer than the model's context length (8192 tokens).", 8_211),
    "SGLang, with room": ("Requested token count exceeds the model's maximum context length of 32768 tokens."
                          " You requested a total of 35528 tokens: 27336 tokens from the input messages"
                          " and 8192 tokens for the completion.", 27_336),
    "SGLang, in its queue": ("Input length (5012 tokens) exceeds the maximum allowed length (4096 tokens).",
                             5_012),
    "Anthropic, with room": ('{"type":"error","error":{"message":"input length and `max_tokens` exceed'
                             ' context limit: 188240 + 21333 > 200000, decrease"}}', 188_240),
    "xAI": ("This model's maximum prompt length is 131072 but the request contains 131500 tokens.", 131_500),
    "Gemini": ("The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
               1_200_000),
    "LiteLLM": ('{"error":{"message":"litellm.ContextWindowExceededError: AnthropicError - prompt is too'
                ' long: 204001 tokens > 200000 maximum"}}', 204_001),
    "TGI": ('{"error":"Input validation error: `inputs` must have less than 1024 tokens. Given: 1045"}', 1_045),
    "TGI, with room": ('{"error":"`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 1500 `inputs` tokens and'
                       ' 1000 `max_new_tokens`"}', 1_500),
    "without a number": ('{"error":{"code":"context_length_exceeded"}}', 1),
}


@pytest.mark.parametrize(("text", "tokens"), TOO_LONG.values(), ids=TOO_LONG.keys())
def test_a_prompt_that_is_too_long_is_understood(text: str, tokens: int) -> None:
    assert llmstack.prompt_tokens_said(400, text) == tokens


@pytest.mark.parametrize("text", ['{"error":{"message":"messages is required"}}', "", "tokens" * 9,
                                  '{"error":{"message":"max_tokens is too large"}}'])
def test_other_errors_are_no_such_thing(text: str) -> None:
    assert llmstack.prompt_tokens_said(400, text) == 0


def context_error(tokens: int, ctx: int) -> bytes:
    text = json.dumps({"error": {"code": 400, "type": "exceed_context_size_error", "n_ctx": ctx,
                                 "message": "too long", "n_prompt_tokens": tokens}})
    return answer(text.encode(), "400 Bad Request", "Content-Type: application/json")


def test_a_context_error_stays_here_while_another_tier_holds_the_request(start: Start) -> None:  # noqa: F811
    rig = start(by_model(code_ultra=context_error(70_000, 24_000)))
    got = rig.ask(chat())
    assert (got.status, asked(rig)) == (200, ["code-ultra", "code-fast"]), "code-smart holds 65,536"
    assert got.header("x-llmstack-fallback") == "code-ultra\u2192code-fast (400)"
    assert rig.app._breaker.down() == {}, "it is nobody's fault"


def test_room_for_the_answer_is_no_part_of_what_a_refusal_teaches(start: Start) -> None:  # noqa: F811
    text = ("This model's maximum context length is 24000 tokens. However, you requested 64500 tokens"
            " (4500 in the messages, 60000 in the completion).")
    rig = start(by_model(code_ultra=answer(text.encode(), "400 Bad Request")))
    got = rig.ask(chat(max_tokens=60_000))
    assert (got.status, asked(rig)) == (200, ["code-ultra", "code-smart"]), "code-smart holds 4,500"


def test_a_context_error_is_passed_on_where_no_tier_holds_the_request(start: Start) -> None:  # noqa: F811
    rig = start(by_model(code_ultra=context_error(500_000, 24_000)))
    got = rig.ask(chat())
    assert (got.status, got.json["error"]["n_prompt_tokens"]) == (400, 500_000)
    assert asked(rig) == ["code-ultra"]


def test_the_next_turn_is_decided_by_what_was_learned(start: Start) -> None:  # noqa: F811
    """9,000 tokens by estimate are 40,000 in truth: the first turn finds out, the next goes right."""
    rig = start(by_model(code_ultra=context_error(40_000, 24_000)))
    turn = {"prompt_cache_key": "one", "text": "x1{};," * 5_000}
    assert rig.ask(chat(**turn)).header("x-llmstack-model") == "code-smart"
    rig.upstream.requests.clear()
    got = rig.ask(chat(**turn))
    assert asked(rig) == ["code-smart"]
    assert "measured" in got.header("x-llmstack-needs")
    other = rig.ask(chat(prompt_cache_key="two", text="x1{};," * 5_000))
    assert "estimated" in other.header("x-llmstack-needs")


@pytest.mark.parametrize("name", ["auto", "code-ultra"])
def test_the_counts_of_an_answer_teach_the_next_turn(start: Start, name: str) -> None:  # noqa: F811
    done = b'{"choices":[],"usage":{"prompt_tokens":40000,"completion_tokens":3}}'
    rig = start(by_model(code_ultra=answer(done, "200 OK", "Content-Type: application/json")))
    turn = {"prompt_cache_key": "one", "text": "x1{};," * 5_000}
    assert rig.ask(chat(name, **turn)).status == 200
    assert asked(rig) == ["code-ultra"]
    wait_for(lambda: rig.app._conversations.get("one").ratio, "the learning")
    assert rig.ask(chat(**turn)).header("x-llmstack-model") == "code-smart"


COUNTS = {
    "llama.cpp's timings": (b'"timings":{"cache_n":4000,"prompt_n":70,"prompt_per_second":120.5,'
                            b'"predicted_n":12,"predicted_per_second":40.1}', (4_070, 4_000, 12)),
    "OpenAI's usage": (b'"usage":{"prompt_tokens":100,"completion_tokens":7,'
                       b'"prompt_tokens_details":{"cached_tokens":64}}', (100, 64, 7)),
    "Anthropic's": (b'"usage":{"input_tokens":10,"cache_read_input_tokens":900,'
                    b'"cache_creation_input_tokens":50,"output_tokens":3}', (960, 900, 3)),
    "nothing": (b"data: [DONE]", (0, 0, 0)),
}


@pytest.mark.parametrize(("said", "expected"), COUNTS.values(), ids=COUNTS.keys())
def test_what_an_answer_counts(said: bytes, expected: tuple[int, int, int]) -> None:
    assert llmstack.tokens_said(said)[:3] == expected


OWN_FAULTS = ["image input is not supported - hint: you may need to provide the mmproj",
              "Failed to parse tools: missing function name"]


@pytest.mark.parametrize("message", OWN_FAULTS)
def test_a_requests_own_fault_marks_no_tier(start: Start, message: str) -> None:  # noqa: F811
    text = json.dumps({"error": {"code": 500, "message": message}}).encode()
    rig = start(by_model(code_smart=answer(text, "500 Oh", "Content-Type: application/json"),
                         code_ultra=refuse("503 Down")))
    got = rig.ask(chat())
    assert got.status == 500
    assert message in got.json["error"]["message"]
    assert list(rig.app._breaker.down()) == ["code-ultra"]


def test_pictures_go_only_to_tiers_that_take_them(start: Start) -> None:  # noqa: F811
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    body = {"model": "auto", "messages": [{"role": "user", "content": picture}]}
    rig = start(by_model(code_ultra=refuse("503 Down")))
    rig.ask(post(body))
    assert asked(rig) == ["code-ultra"]


# ---- paths


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/v1/chat/completions", "/chat/completions",
                                  "/v1/chat/completions/", "//v1//chat/completions",
                                  "/v1/chat%2Fcompletions", "/v1/%63hat/completions?x=1"])
@pytest.mark.parametrize("model", ["auto", "code-smart"])
def test_named_tiers_and_auto_share_their_paths(start: Start, path: str, model: str) -> None:  # noqa: F811
    rig = start(by_model())
    assert rig.ask(chat(model, target=path)).status == 200
    assert rig.upstream.requests[0].target.split("?")[0] == CHAT


def test_a_path_nobody_knows_is_said_to_be_one(routed: Routed) -> None:
    status, body = routed.call().send("POST", "/v1/imagine", {"model": "auto"}).answer()
    assert status == 404
    message = body["error"]["message"]
    assert message.startswith("no such path: /v1/imagine; base URL is http://127.0.0.1/v1, ")


# ---- the record


def test_every_request_is_a_line_without_a_word_of_its_text(start: Start, tmp_path: Path) -> None:  # noqa: F811
    recorder = llmstack.Recorder(str(tmp_path / "decisions.jsonl"))
    rig = start(by_model(code_ultra=refuse("503 Down")), record=recorder)
    rig.ask(chat(text="my secret words"))
    rig.ask(chat("code-fast", text="my secret words"))
    path = tmp_path / "decisions.jsonl"
    wait_for(lambda: path.exists() and path.read_text().count("\n") == 2, "both rows")
    text = path.read_text()
    assert "secret" not in text
    # A row is written behind its answer, so they may come in either order.
    second, first = sorted(map(json.loads, text.splitlines()), key=lambda row: str(row["rung"]))
    assert (first["tier"], first["rung"], first["ended"]) == ("code-smart", "high", "done")
    assert first["fallbacks"] == ["code-ultra\u2192code-smart (503)"]
    assert (second["tier"], second["rung"]) == ("code-fast", "explicit")
    assert first["conversation"] == second["conversation"] != ""
    assert path.stat().st_mode & 0o077 == 0


