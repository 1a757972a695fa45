"""A llama-server of one file whose streams are known beforehand, byte for byte.

    python3 tests/chaos/model_server.py --port N [llama-server's flags]

The last message says what to stream: "stream SEED EVENTS DELAY_MS". It loads for LOAD_S, and it
does not end when its parent does: what a kill leaves behind is for llmstack to find.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import sys
import time
from collections.abc import Sequence

LOAD_S = 0.4
EVENT_CHARACTERS = 2000             # at most
DONE = b"data: [DONE]\n\n"
HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n")


@functools.lru_cache(maxsize=64)
def known_events(seed: int, count: int) -> tuple[bytes, ...]:
    """The events of one stream; the same for the same arguments, in any process."""
    source = random.Random(seed)
    made = []
    for number in range(count - 1):
        text = source.choice("abcdefgh \u00e4\u20ac") * source.randint(1, EVENT_CHARACTERS)
        choice = {"index": 0, "delta": {"content": f"{number} {text}"}, "finish_reason": None}
        value = {"object": "chat.completion.chunk", "choices": [choice]}
        made.append(b"data: " + json.dumps(value).encode() + b"\n\n")
    return (*made, DONE)


def prompt(seed: int, count: int, delay_ms: int) -> str:
    """The message that asks for a stream."""
    return f"stream {seed} {count} {delay_ms}"


class ModelServer:
    """Answers /health, /active (how many streams are under way) and chats."""

    def __init__(self) -> None:
        self._ready_at = time.monotonic() + LOAD_S
        self._active = 0

    async def serve(self, host: str, port: int) -> None:
        server = await asyncio.start_server(self._connection, host, port, backlog=512)
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        start, *lines = head.lower().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines if ": " in line)
        body = await reader.readexactly(int(fields.get("content-length", "0")))
        path = start.split(" ")[1]
        if time.monotonic() < self._ready_at:
            await self._say(writer, 503, {"error": {"message": "Loading model", "code": 503}})
        elif path == "/v1/chat/completions":
            await self._chat(writer, json.loads(body))
        else:
            await self._say(writer, 200, {"status": "ok", "active": self._active})
        return fields.get("connection") != "close"

    async def _chat(self, writer: asyncio.StreamWriter, asked: dict[str, object]) -> None:
        messages = asked["messages"]
        assert isinstance(messages, list)
        if not asked.get("stream"):
            message = {"role": "assistant", "content": "hello"}
            await self._say(writer, 200, {"choices": [{"index": 0, "message": message}]})
            return
        seed, count, delay_ms = map(int, messages[-1]["content"].split()[1:])
        self._active += 1
        try:
            writer.write(HEAD)
            for event in known_events(seed, count):
                writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                await writer.drain()
                if delay_ms:
                    await asyncio.sleep(delay_ms / 1000)
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            self._active -= 1

    async def _say(self, writer: asyncio.StreamWriter, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        writer.write(b"HTTP/1.1 %d Said\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%b" % (status, len(body), body))
        await writer.drain()


def main(words: Sequence[str]) -> None:
    """Serve as the command line says; asked for its version, it takes every flag."""
    if "--version" in words:
        return
    port = int(words[words.index("--port") + 1])
    asyncio.run(ModelServer().serve("127.0.0.1", port))


if __name__ == "__main__":
    main(sys.argv[1:])
