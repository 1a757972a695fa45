"""A scripted upstream for tests of the wire: raw sockets on port 0, and nothing ever sleeps.

Its behaviour is a function that is called with each connection, on a thread of its own:

    with ScriptedUpstream(always(answer(b"ok"))) as upstream: ...

or, without a function, the test drives both ends itself, in the order it reads:

    up = upstream.next()            # waits for the router to connect
    up.read()                       # one whole request, kept in upstream.requests with its raw bytes
    up.send(b"HTTP/1.1 200 OK\\r\\n...")

Every wait ends with an error after WAIT_S, which only a failing test ever reaches.
"""

from __future__ import annotations

import json
import queue
import socket
import ssl
import struct
import threading
from types import TracebackType
from typing import Any, Callable, NamedTuple, Optional

WAIT_S = 15.0

Header = tuple[bytes, bytes]
Script = Callable[["Connection"], None]


def wait(event: threading.Event) -> None:
    """Wait for what another thread is to do."""
    assert event.wait(WAIT_S), "what was waited for did not happen"


class Message(NamedTuple):
    """A request or an answer as it was on the wire, and its parts."""

    start: bytes                    # the first line
    headers: tuple[Header, ...]     # names as they were spelled
    body: bytes                     # without chunk framing
    whole: bool                     # the body ended as its framing says it should
    raw: bytes

    def all(self, name: str) -> list[str]:
        return [v.decode("utf-8", "surrogateescape") for n, v in self.headers if n.lower() == name.lower().encode()]

    def header(self, name: str) -> str:
        """The value of a header that is there at most once, "" without it."""
        values = self.all(name)
        assert len(values) < 2, values
        return values[0] if values else ""

    @property
    def status(self) -> int:
        return int(self.start.split(b" ")[1])

    @property
    def target(self) -> str:
        return self.start.split(b" ")[1].decode("latin-1")

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Chunks(NamedTuple):
    """Where a reader of chunk framing stands behind some bytes."""

    payload: bytes
    at: str                                     # size | payload | trailer | done
    line: bytes                                 # the part of a size line it holds
    missing: int                                # payload bytes and their CRLF still to come
    behind: int                                 # bytes behind the end of the message


def read_chunks(data: bytes) -> Chunks:
    """The plainest reader there is, all bytes at once. Errors: AssertionError or ValueError where framing is malformed."""
    payload, position = b"", 0
    while True:
        line, found, _ = data[position:].partition(b"\r\n")
        if not found:
            return Chunks(payload, "size", line, 0, 0)
        position += len(line) + 2
        size = int(line.split(b";")[0].strip(b" \t").decode("ascii"), 16)
        if size == 0:
            break
        payload += data[position:position + size]
        ending = data[position + size:position + size + 2]
        assert b"\r\n".startswith(ending), f"no CRLF behind a chunk of {size}: {ending!r}"
        missing = position + size + 2 - len(data)
        if missing > 0:
            return Chunks(payload, "payload", b"", missing, 0)
        position += size + 2
    while True:
        line, found, _ = data[position:].partition(b"\r\n")
        if not found:
            return Chunks(payload, "trailer", b"", 0, 0)
        position += len(line) + 2
        if not line:
            return Chunks(payload, "done", b"", 0, len(data) - position)


class Wire:
    """One end of a connection: sends, and reads HTTP by a reader that shares no code with the program."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._have = bytearray()
        self._raw = bytearray()     # what the message under way has taken
        sock.settimeout(WAIT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.sock.sendall(piece)

    def _more(self) -> bool:
        try:
            data = self.sock.recv(1 << 16)
        except ConnectionError:
            data = b""
        self._have += data
        return bool(data)

    def take(self, count: int) -> bytes:
        """The next `count` bytes; fewer only where the connection ends before."""
        while len(self._have) < count and self._more():
            pass
        return self._pop(count)

    def until(self, mark: bytes) -> bytes:
        """What comes, up to and with `mark`; without it where the connection ends before."""
        start = 0
        while True:
            found = self._have.find(mark, start)
            if found >= 0:
                return self._pop(found + len(mark))
            start = max(len(self._have) - len(mark), 0)
            if not self._more():
                return self._pop(len(self._have))

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        while self._more():
            pass
        return self._pop(len(self._have))

    def _pop(self, count: int) -> bytes:
        data = bytes(self._have[:count])
        del self._have[:count]
        self._raw += data
        return data

    def ended(self) -> bool:
        """Wait for the other side to close; False when it says something more instead."""
        return not self._have and not self._more()

    def read_head(self) -> Message:
        """A head alone; its body is left to be read piece by piece."""
        self._raw.clear()
        head = self.until(b"\r\n\r\n")
        assert head.endswith(b"\r\n\r\n"), f"the connection ended instead of a head: {head!r}"
        start, *lines = head[:-4].split(b"\r\n")
        headers = [line.partition(b":") for line in lines]
        return Message(start, tuple((name, value.strip()) for name, _, value in headers), b"", True, head)

    def read_message(self, method: str = "") -> Message:
        """A whole request, or with `method` the whole answer to one of that method."""
        head = self.read_head()
        length = head.header("content-length")
        if method and (method == "HEAD" or head.status in (101, 204, 304)):
            body, whole = b"", True
        elif head.header("transfer-encoding") == "chunked":
            body, whole = self._read_chunks()
        elif length:
            body = self.take(int(length))
            whole = len(body) == int(length)
        else:
            body, whole = (self.rest() if method else b""), True
        return head._replace(body=body, whole=whole, raw=bytes(self._raw))

    def _read_chunks(self) -> tuple[bytes, bool]:
        payload = b""
        while True:
            line = self.until(b"\r\n")
            if not line.endswith(b"\r\n"):
                return payload, False
            size = int(line.split(b";")[0], 16)
            if size == 0:
                while line not in (b"\r\n", b""):
                    line = self.until(b"\r\n")
                return payload, bool(line)
            data = self.take(size + 2)
            payload += data[:size]
            if len(data) < size + 2:
                return payload, False
            assert data.endswith(b"\r\n"), f"a chunk of {size} does not end after {data!r}"

    def read_chunk(self) -> bytes:
        """The payload of the next chunk."""
        line = self.until(b"\r\n")
        size = int(line, 16)
        data = self.take(size + 2)
        assert data[size:] == b"\r\n", (line, data)
        return data[:size]

    def half_close(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:             # the other side has reset it meanwhile
            pass

    def reset(self) -> None:
        """Close as a process that is killed with work in hand does: with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        self.sock.close()


class Connection(Wire):
    """The upstream's end of a connection from the router."""

    def __init__(self, sock: socket.socket, upstream: ScriptedUpstream, number: int) -> None:
        super().__init__(sock)
        self.upstream = upstream
        self.number = number        # 1 for the first

    def read(self) -> Message:
        """The next request, whole. It is kept in upstream.requests."""
        message = self.read_message()
        self.upstream.requests.append(message)
        return message


class ScriptedUpstream:
    """Listens on 127.0.0.1:0. `requests` and `connections` tell what came, over all connections."""

    def __init__(self, script: Optional[Script] = None, receive_buffer_bytes: int = 0,
                 tls: Optional[ssl.SSLContext] = None) -> None:
        self.requests: list[Message] = []
        self.connections = 0
        self._script = script
        self._tls = tls
        self._handed: queue.Queue[Connection] = queue.Queue()
        self._errors: list[BaseException] = []
        self._open: list[Connection] = []
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        if receive_buffer_bytes:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="scripted upstream", daemon=True)
        self._acceptor.start()

    def next(self) -> Connection:
        """The next connection, for the test to drive; only without a script."""
        try:
            return self._handed.get(timeout=WAIT_S)
        except queue.Empty:
            raise AssertionError("the router did not connect") from None

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            if self._closing:
                sock.close()
                return
            self.connections += 1
            if self._tls is not None:
                sock.settimeout(WAIT_S)
                try:
                    sock = self._tls.wrap_socket(sock, server_side=True)
                except OSError:     # the router does not trust it
                    continue
            connection = Connection(sock, self, self.connections)
            self._open.append(connection)
            if self._script is None:
                self._handed.put(connection)
                continue
            thread = threading.Thread(target=self._run, args=(self._script, connection), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, script: Script, connection: Connection) -> None:
        try:
            script(connection)
        except ConnectionError:     # the router has gone: what a test wants to know of it, it asks for
            pass
        except BaseException as exc:
            if not self._closing:
                self._errors.append(exc)
        finally:
            connection.close()

    def close(self) -> None:
        """End everything; an error in a script is raised here."""
        self._closing = True
        socket.create_connection(("127.0.0.1", self.port), WAIT_S).close()      # wakes accept() on every platform
        self._acceptor.join(WAIT_S)
        self._listener.close()
        for connection in self._open:
            try:
                connection.sock.shutdown(socket.SHUT_RDWR)
            except OSError:         # closed already
                pass
        for thread in self._threads:
            thread.join(WAIT_S)
        for connection in self._open:
            connection.close()
        if self._errors:
            raise self._errors[0]

    def __enter__(self) -> ScriptedUpstream:
        return self

    def __exit__(self, kind: Optional[type[BaseException]], exc: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.close()


def answer(body: bytes = b"ok", status: str = "200 OK", *headers: str) -> bytes:
    """An answer with a Content-Length."""
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def reply_with(reply: Callable[[Message], Optional[bytes]]) -> Script:
    """A script that answers each request with what `reply` makes of it; None closes without an answer."""
    def script(connection: Connection) -> None:
        while not connection.ended():
            data = reply(connection.read())
            if data is None:
                return
            connection.send(data)
    return script


def always(data: bytes) -> Script:
    """A script that gives every request the same answer."""
    return reply_with(lambda _: data)
