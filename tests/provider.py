"""A scripted provider that speaks what clients speak: chat completions, responses and messages.

It answers a request that offers the scripted tool, and holds no result of it yet, with a call of
that tool, and every other with a text. What was asked is kept.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Iterator, NamedTuple, Optional

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
TITLE = '{"title": "a title"}'


class Asked(NamedTuple):
    """A request as it arrived."""

    path: str
    headers: dict[str, str]
    body: Any

    @property
    def tools(self) -> list[str]:
        tools = self.body.get("tools") or []
        return [tool.get("function", tool).get("name", "") for tool in tools]

    def holds(self, text: str) -> bool:
        return text in json.dumps(self.body)


class Tool(NamedTuple):
    """The call that is scripted."""

    name: str
    arguments: dict[str, Any]


class Provider:
    """A server on a free port; `tool` and `error` are set by the test."""

    def __init__(self) -> None:
        self.tool: Optional[Tool] = None
        self.text = "all done"
        self.error = ""
        self.asked: list[Asked] = []
        provider = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(self.path.split("?")[0], headers, body)
                provider.asked.append(asked)
                status, kind, data = provider.answer(asked)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, asked: Asked) -> tuple[int, str, bytes]:
        """(status, content type, body)."""
        if self.error:
            error = {"message": self.error, "type": "invalid_request_error", "code": None}
            value = {"type": "error", "error": error}
            return 400, "application/json", json.dumps(value).encode()
        if asked.path.endswith("/count_tokens"):
            return 200, "application/json", b'{"input_tokens": 10}'
        tool = self.tool if self.is_due(asked) else None
        text = self.text if asked.tools or self.tool is None else TITLE
        speak = {CHAT: chat, RESPONSES: responses, MESSAGES: messages}[asked.path]
        whole, events = speak(asked.body, tool, text)
        if not asked.body.get("stream"):
            return 200, "application/json", json.dumps(whole).encode()
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        if asked.path == CHAT:
            lines.append("data: [DONE]\n\n")
        else:
            lines = [f"event: {e['type']}\n{line}" for e, line in zip(events, lines)]
        return 200, "text/event-stream", "".join(lines).encode()

    def is_due(self, asked: Asked) -> bool:
        return self.tool is not None and self.tool.name in asked.tools and not asked.holds("call_1")


Spoken = tuple[Any, list[Any]]                  # the whole answer, and the same as events


def chat(body: Any, tool: Optional[Tool], text: str) -> Spoken:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if tool:
        function = {"name": tool.name, "arguments": json.dumps(tool.arguments)}
        call = {"index": 0, "id": "call_1", "type": "function", "function": function}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
    why = "tool_calls" if tool else "stop"
    head = {"id": "c1", "created": 1, "model": body["model"]}
    whole = {**head, "object": "chat.completion", "usage": USAGE,
             "choices": [{"index": 0, "message": message, "finish_reason": why}]}
    chunk = {**head, "object": "chat.completion.chunk"}
    deltas = [({"role": "assistant"}, None), (message, None), ({}, why)]
    events: list[Any] = [{**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
                         for delta, end in deltas]
    return whole, [*events, {**chunk, "choices": [], "usage": USAGE}]


def messages(body: Any, tool: Optional[Tool], text: str) -> Spoken:
    block: dict[str, Any] = {"type": "text", "text": text}
    start: dict[str, Any] = {"type": "text", "text": ""}
    delta: dict[str, Any] = {"type": "text_delta", "text": text}
    if tool:
        block = {"type": "tool_use", "id": "call_1", "name": tool.name, "input": tool.arguments}
        start = {**block, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": json.dumps(tool.arguments)}
    why = "tool_use" if tool else "end_turn"
    usage = {"input_tokens": 10, "output_tokens": 5}
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"],
            "stop_sequence": None, "usage": usage}
    events = [
        {"type": "message_start", "message": {**head, "content": [], "stop_reason": None}},
        {"type": "content_block_start", "index": 0, "content_block": start},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": why, "stop_sequence": None},
         "usage": usage},
        {"type": "message_stop"},
    ]
    return {**head, "content": [block], "stop_reason": why}, events


def responses(body: Any, tool: Optional[Tool], text: str) -> Spoken:
    item: dict[str, Any] = {"id": "item_1", "type": "message", "role": "assistant",
                            "status": "completed",
                            "content": [{"type": "output_text", "text": text, "annotations": []}]}
    if tool:
        item = {"id": "item_1", "type": "function_call", "call_id": "call_1", "name": tool.name,
                "arguments": json.dumps(tool.arguments), "status": "completed"}
    usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15,
             "input_tokens_details": {"cached_tokens": 0},
             "output_tokens_details": {"reasoning_tokens": 0}}
    head = {"id": "resp_1", "object": "response", "created_at": 1, "model": body["model"]}
    whole = {**head, "status": "completed", "output": [item], "usage": usage}
    return whole, list(_response_events(head, item, whole, text if not tool else ""))


def _response_events(head: Any, item: Any, whole: Any, text: str) -> Iterator[Any]:
    yield {"type": "response.created", "response": {**head, "status": "in_progress", "output": []}}
    begun = {**item, "content": []} if text else {**item, "arguments": ""}
    yield {"type": "response.output_item.added", "output_index": 0, "item": begun}
    if text:
        yield {"type": "response.output_text.delta", "item_id": "item_1", "output_index": 0,
               "content_index": 0, "delta": text}
    yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    yield {"type": "response.completed", "response": whole}
