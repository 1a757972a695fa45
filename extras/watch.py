"""What runs, in place on a terminal, until Ctrl-C.

The same as `status --watch`: it goes by the router's stream of events, and survives a restart.

examples:
  llmstack watch                            # what runs, as it changes
  llmstack watch --demo                     # the demo's
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from typing import Any, Dict, Iterator, Sequence

SILENCE_S = 40                                  # the stream says something every 15 s


def received(sock: socket.socket, llmstack: Any) -> bytes:
    data = sock.recv(llmstack.RECV_BYTES)
    if not data:
        raise OSError("the stream has ended")
    return data


def snapshots(sock: socket.socket, data: bytes, llmstack: Any) -> Iterator[Dict[str, Any]]:
    now: Dict[str, Any] = {}
    framing, text = llmstack.ChunkFraming(), b""
    heard_s = time.monotonic()
    sock.settimeout(1.0)
    while True:
        blocks = (text + framing.feed(data)).split(b"\n\n")
        text = blocks.pop()
        if len(text) > llmstack.MAX_ANSWER_BYTES or framing.ended:
            raise ValueError("its stream is none of events")
        for block in blocks:
            now.update(llmstack.parse_json_object(block.partition(b"\ndata: ")[2] or b"{}"))
        if now:
            yield now
        try:
            data = received(sock, llmstack)
            heard_s = time.monotonic()
        except (BlockingIOError, socket.timeout):   # the second by TLS
            data = b""
            if time.monotonic() - heard_s > SILENCE_S:
                raise OSError("the stream says nothing any more") from None


def follow_events(upstream: Any, llmstack: Any) -> Iterator[Dict[str, Any]]:
    """The snapshot of a router anew with each change, and each second without one.

    Errors: OSError, ValueError where the stream ends or is none.
    """
    sock = upstream.connect()
    try:
        lines = [f"GET {upstream.prefix}/llmstack/events HTTP/1.1".encode("latin-1"),
                 b"Host: " + upstream.authority, b"Accept: text/event-stream"]
        if upstream.key:
            lines.append(b"Authorization: Bearer " + upstream.key.encode())
        sock.sendall(b"\r\n".join(lines) + b"\r\n\r\n")
        sock.settimeout(SILENCE_S)
        head = b""
        while llmstack.head_end(head, 0) < 0 and len(head) < llmstack.MAX_HEAD_BYTES:
            head += received(sock, llmstack)
        end = llmstack.head_end(head, 0)
        response = llmstack.parse_response_head(head[:end], "GET")
        if response.status != 200 or response.framing != "chunked":
            raise ValueError(f"it answers {response.status}")
        yield from snapshots(sock, head[end + 4:], llmstack)
    finally:
        sock.close()


def draw(lines: Sequence[str], in_place: bool, llmstack: Any) -> None:
    """Lines over those drawn before; one below the other where that cannot be."""
    if not in_place:
        for line in lines:
            llmstack.say(line)
        return
    # What does not fit would scroll, and the next picture would land elsewhere.
    most = max(shutil.get_terminal_size().lines - 1, 1)
    shown = [f"{llmstack.visible_colours(line)}\x1b[K\n" for line in lines[:most]]
    llmstack.write_out("".join(["\x1b[H", *shown, "\x1b[J"]))


def watch_once(upstream: Any, in_place: bool, llmstack: Any) -> None:
    """Show a router's snapshots until their stream breaks, and that it has."""
    url = upstream.url
    try:
        for now in follow_events(upstream, llmstack):
            width = llmstack.output_columns()
            lines = llmstack.render_snapshot(now, url, width, time.time(), llmstack.paint)
            draw(lines, in_place, llmstack)
    except (OSError, ValueError) as exc:
        draw([f"{url} does not answer ({exc}); trying again, Ctrl-C ends it"], in_place, llmstack)


def watch(places: Any, llmstack: Any) -> int:
    """Show what runs as it changes, in place on a terminal, until Ctrl-C. Errors: UserError."""
    upstream, _ = llmstack.running_router(places)
    try:
        while True:
            watch_once(upstream, llmstack.is_live_terminal(), llmstack)
            # A router that is being restarted is back soon.
            time.sleep(1)
    except KeyboardInterrupt:
        return 0


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("watch", __doc__)
    parser.add_argument("--demo", action="store_true", help="the demo's")
    args = parser.parse_args(list(argv))
    return watch(llmstack.find_places(os.environ, args.demo), llmstack)
