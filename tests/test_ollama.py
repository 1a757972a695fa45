"""Ollama's API: what its clients ask becomes OpenAI's, and the answers are turned back as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Optional

import pytest

import llmstack
from tests import test_router
from tests.scripted import Connection, Message, Script, always, answer, reply_with
from tests.test_names import ENGINE_S
from tests.test_router import (  # noqa: F401
    CONFIG,
    SSE_CHUNKED,
    Start,
    chunk,
    nothing_left_behind,
    post,
    request,
    start,
)

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def event(delta: dict[str, Any], finish: Optional[str] = None, **more: Any) -> bytes:
    value = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
EVENTS = [event({"reasoning_content": "hm"}), event({"content": "h"}), event({"content": "\u00e9"}),
          event({}, "stop"), USAGE, b"data: [DONE]\n\n"]


def streaming(*events: bytes) -> Script:
    def script(up: Connection) -> None:
        up.read()
        # however the bytes are cut
        whole = b"".join(events)
        pieces = [whole[i:i + 7] for i in range(0, len(whole), 7)]
        up.send(SSE_CHUNKED, *[chunk(p) for p in pieces], b"0\r\n\r\n")
    return script


def lines(message: Message) -> list[dict[str, Any]]:
    assert message.header("content-type") == "application/x-ndjson"
    assert message.whole
    return [json.loads(line) for line in message.body.splitlines()]


def ask(path: str, **values: Any) -> bytes:
    return post(values, target=path)


def test_a_chat_streams_lines_of_json(start: Start) -> None:  # noqa: F811
    rig = start(streaming(*EVENTS))
    got = rig.ask(ask("/api/chat", model="code-smart:latest", messages=HELLO, options={
        "temperature": 0.5, "num_ctx": 4096, "num_predict": 9, "stop": ["x"], "seed": 4}))
    rows = lines(got)
    assert [row["message"] for row in rows] == [
        {"role": "assistant", "content": "", "thinking": "hm"},
        {"role": "assistant", "content": "h"}, {"role": "assistant", "content": "\u00e9"},
        {"role": "assistant", "content": ""}]
    assert [row["done"] for row in rows] == [False, False, False, True]
    last = rows[-1]
    assert (last["done_reason"], last["prompt_eval_count"], last["eval_count"]) == ("stop", 7, 3)
    assert {row["model"] for row in rows} == {"code-smart:latest"}
    sent = rig.upstream.requests[0]
    assert sent.target == "/v1/chat/completions"
    assert sent.json == {
        "model": "code-smart", "messages": HELLO, "stream": True,
        "stream_options": {"include_usage": True}, "temperature": 0.5, "seed": 4, "stop": ["x"],
        "max_tokens": 9}


def test_a_chat_of_auto_is_decided(start: Start) -> None:  # noqa: F811
    rig = start(streaming(*EVENTS))
    got = rig.ask(ask("/api/chat", model="gpt-oss:20b", messages=HELLO))
    assert got.header("x-llmstack-model") == "code-ultra"
    assert lines(got)[-1]["done"] is True


def test_generate_has_a_prompt_and_answers_in_response(start: Start) -> None:  # noqa: F811
    rig = start(streaming(*EVENTS))
    got = rig.ask(ask("/api/generate", model="code-fast", prompt="hi", system="be brief",
                      images=["iVBORw0"], format="json", think=False))
    assert "".join(row["response"] for row in lines(got)) == "h\u00e9"
    sent = rig.upstream.requests[0].json
    assert sent["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [
            {"type": "text", "text": "hi"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0"}}]}]
    assert sent["response_format"] == {"type": "json_object"}
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}


def test_tools_go_both_ways(start: Start) -> None:  # noqa: F811
    def call(arguments: str, **more: str) -> bytes:
        return event({"tool_calls": [{"index": 0, "function": {**more, "arguments": arguments}}]})

    rig = start(streaming(call('{"at"', name="look"), call(":1}"), event({}, "tool_calls")))
    history = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "look", "arguments": {"at": 0}}}]},
        {"role": "tool", "tool_name": "look", "content": "nothing"}]
    rows = lines(rig.ask(ask("/api/chat", model="code-fast", messages=history, tools=[TOOL])))
    assert [row["message"].get("tool_calls") for row in rows] == [
        [{"function": {"name": "look", "arguments": {"at": 1}}}], None]
    assert rows[-1]["done_reason"] == "stop"
    sent = rig.upstream.requests[0].json
    assert sent["tools"] == [TOOL]
    assert sent["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"at": 0}'
    assert sent["messages"][1]["tool_calls"][0]["id"] == sent["messages"][2]["tool_call_id"]


def test_an_answer_that_is_no_stream(start: Start) -> None:  # noqa: F811
    body = {"choices": [{"message": {"role": "assistant", "content": "ho", "tool_calls": [
        {"function": {"name": "look", "arguments": '{"at":2}'}}]}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
    rig = start(always(answer(json.dumps(body).encode(), "200 OK", "Content-Type: application/json")))
    got = rig.ask(ask("/api/chat", model="code-fast", messages=HELLO, stream=False))
    assert got.header("content-type") == "application/json"
    said = got.json
    assert said["message"]["content"] == "ho"
    assert said["message"]["tool_calls"] == [{"function": {"name": "look", "arguments": {"at": 2}}}]
    assert (said["done"], said["done_reason"], said["eval_count"]) == (True, "length", 2)
    assert rig.upstream.requests[0].json["stream"] is False


def test_embeddings(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    body = {"data": [{"embedding": [1.0, 2.0]}, {"embedding": [3.0]}], "usage": {"prompt_tokens": 4}}
    tiers = (*CONFIG.tiers, llmstack.Tier("nomic", "embed"))
    monkeypatch.setattr(test_router, "CONFIG", CONFIG._replace(tiers=tiers))
    rig = start(always(answer(json.dumps(body).encode())))
    said = rig.ask(ask("/api/embed", model="nomic-embed-text", input=["a", "b"])).json
    assert (said["embeddings"], said["prompt_eval_count"]) == ([[1.0, 2.0], [3.0]], 4)
    assert rig.upstream.requests[-1].json == {"model": "nomic", "input": ["a", "b"]}
    assert rig.ask(ask("/api/embeddings", model="nomic", prompt="a")).json == {
        "embedding": [1.0, 2.0]}


def test_errors_are_in_its_own_shape(start: Start) -> None:  # noqa: F811
    error = b'{"error":{"message":"too hot","code":400}}'
    rig = start(always(answer(error, "400 Bad Request")))
    got = rig.ask(ask("/api/chat", model="code-fast", messages=HELLO))
    assert (got.status, json.loads(got.body)) == (400, {"error": "too hot"})
    for path in ("/api/chat", "/api/show", "/api/pull"):
        got = rig.ask(ask(path, name="llama3.2", messages=HELLO))
        if path == "/api/chat":
            continue                            # an upstream that may have it is asked
        assert got.status == 404
        assert list(got.json) == ["error"]
        assert "The models here are auto" in got.json["error"]
    got = rig.ask(post(b"{", target="/api/chat"))
    assert (got.status, list(got.json)) == (400, ["error"])


def test_a_stream_that_breaks_says_so_in_a_line(start: Start) -> None:  # noqa: F811
    def script(up: Connection) -> None:
        up.read()
        up.send(SSE_CHUNKED, chunk(EVENTS[1]))
        up.close()
    rig = start(script)
    client = rig.client()
    got = client.ask(ask("/api/chat", model="code-fast", messages=HELLO))
    rows = [json.loads(line) for line in got.body.splitlines()]
    assert rows[0]["message"]["content"] == "h"
    assert "model's server failed" in rows[1]["error"]
    assert len(rows) == 2
    assert not got.whole


def test_what_it_knows_of_models(start: Start) -> None:  # noqa: F811
    rig = start(always(ENGINE_S))
    assert rig.ask(request("GET", "/api/version")).json["version"]
    tags = rig.ask(request("GET", "/api/tags")).json["models"]
    assert [m["name"] for m in tags] == ["auto", "code-fast", "code-smart", "theirs"]
    assert [m["name"] for m in rig.ask(request("GET", "/api/ps")).json["models"]] == ["code-fast"]
    show = rig.ask(ask("/api/show", model="code-smart:latest")).json
    assert show["model_info"]["llmstack.context_length"] == 65_536
    assert show["capabilities"] == ["completion", "tools"]
    assert rig.ask(ask("/api/pull", model="gpt-oss:20b")).json == {"status": "success"}
    loaded = rig.ask(ask("/api/generate", model="code-fast", keep_alive=0))
    assert lines(loaded)[0]["done_reason"] == "load"


@pytest.mark.parametrize("values", [
    {}, {"messages": 5}, {"messages": [5, {"tool_calls": [5, {"function": 5}]}]},
    {"messages": HELLO, "options": 5, "tools": 5}, {"messages": HELLO, "model": 5}])
def test_nonsense_is_never_an_internal_error(start: Start, values: dict[str, Any]) -> None:  # noqa: F811
    rig = start(streaming(b'data: 5\n\ndata: {"choices":5}\n\ndata: {"choices":[{"delta":'
                          b'{"tool_calls":[5,{"index":"x","function":5}]}}]}\n\n', EVENTS[-1]))
    assert rig.ask(post(values, target="/api/chat")).status in (200, 400, 404)


CLIENT = """
import sys, ollama
client = ollama.Client(sys.argv[1])
print([m.model for m in client.list().models])
print("".join(p.message.content for p in client.chat("code-fast", [
    {"role": "user", "content": "hi"}], stream=True)))
print(client.show("code-smart").capabilities)
try:
    client.show("nothing")
except ollama.ResponseError as exc:
    print(exc.error)
"""


def test_the_real_client(start: Start) -> None:  # noqa: F811
    python = os.environ.get("LLMSTACK_TEST_OLLAMA", sys.executable)
    probe = subprocess.run([python, "-c", "import ollama"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("the package ollama is not installed")

    def reply(message: Message) -> bytes:
        if message.target == "/v1/models":
            return ENGINE_S
        body = b"".join(EVENTS)
        return answer(body, "200 OK", "Content-Type: text/event-stream")

    rig = start(reply_with(reply))
    done = subprocess.run([python, "-c", CLIENT, f"http://127.0.0.1:{rig.port}"], check=False,
                          capture_output=True, text=True, timeout=60)
    said = done.stdout.splitlines()
    assert said[:3] == ["['auto', 'code-fast', 'code-smart', 'theirs']", "h\u00e9",
                        "['completion', 'tools']"], done.stderr
    assert said[3].startswith("there is no model 'nothing'")
