"""A llama-server of one file: its flags, its /health, its chats, and a director's hand in all of them.

    python -I -S fake_llama_server.py DIRECTORY [llama-server's flags]

It is a real process, so that starting, stopping and dying are real. It asks DIRECTORY what to do and writes
there what has happened. NAME is its --alias. Told at its start, by these files being there:

    NAME.fail     write the file's text to standard error, exit 1, before anything is listened on
    NAME.slow     answer 503 to everything until the file NAME.loaded is there
    NAME.crash    looked for while loading: write its text to standard error and exit 1
    NAME.hang     ignore SIGTERM
    NAME.orphan   start a child that ignores SIGTERM, in the same process group

Told by a request, in the content of its last message: "hold X" begins a stream and stops after its first
event, or answers nothing yet, until one of these files is there:

    X.go          finish the answer
    X.die         exit in the middle of it

Written, a line an event, to DIRECTORY/events:

    NAME started PID PORT beside=A,B     and the names of those started before that are alive now
    NAME refused PORT                    the port was taken
    NAME term                            SIGTERM has come
    NAME orphan PID                      the child of NAME.orphan
    NAME request PATH                    a request has been read (not those to /health)
    NAME held X                          it is being held
    NAME left X                          who asked has gone while it was held
    NAME done PATH                       its answer ends now
"""

import json
import os
import signal
import socket
import sys
import threading
import time

DIRECTORY = sys.argv[1]
FLAGS = {flag: value for flag, value in zip(sys.argv[2:], sys.argv[3:]) if flag.startswith("-")}
NAME = FLAGS["--alias"]


def path(name: str) -> str:
    return os.path.join(DIRECTORY, name)


def there(name: str) -> bool:
    return os.path.exists(path(name))


def say(*words: object) -> None:
    with open(path("events"), "ab", 0) as file:
        file.write((" ".join(map(str, (NAME, *words))) + "\n").encode())


def die_of(name: str) -> None:
    with open(path(name), "rb") as file:
        os.write(2, file.read())
    os._exit(1)


def alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def neighbours() -> str:
    if not there("events"):
        return ""
    with open(path("events")) as file:
        started = [line.split() for line in file]
    return ",".join(sorted({words[0] for words in started if words[1] == "started" and alive(words[2])}))


def start_orphan() -> None:
    """A child in our process group; SIGTERM stays blocked in it, as it is here."""
    pid = os.fork()
    if pid:
        say("orphan", pid)
        return
    time.sleep(60)
    os._exit(0)


class Conversation:
    """One connection, request after request."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.file = sock.makefile("rb")

    def run(self) -> None:
        try:
            while self.one():
                pass
        except OSError:
            pass
        finally:
            self.file.close()
            self.sock.close()

    def one(self) -> bool:
        line = self.file.readline().split()
        if not line:
            return False
        headers = {}
        while True:
            name, _, value = self.file.readline().decode("latin-1").partition(":")
            if not value:
                break
            headers[name.lower()] = value.strip()
        body = self.file.read(int(headers.get("content-length", 0)))
        method, target = line[0].decode(), line[1].decode()
        if there(f"{NAME}.slow") and not there(f"{NAME}.loaded"):
            self.json(503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})
        elif target == "/health":
            self.json(200, {"status": "ok"})
        elif target == "/props" and there(f"{NAME}.context"):
            with open(path(f"{NAME}.context")) as file:
                self.json(200, {"default_generation_settings": {"n_ctx": int(file.read())}})
        elif target == "/props":
            self.json(404, {})
        else:
            say("request", target)
            if not self.chat(target, body):
                say("done", target)
                self.json(200, {"server": NAME, "method": method, "target": target, "body": body.decode()})
        return headers.get("connection", "").lower() != "close"

    def chat(self, target: str, body: bytes) -> bool:
        """Answer a chat; False when the request is none."""
        if target != "/v1/chat/completions":
            return False
        asked = json.loads(body)
        words = asked["messages"][-1]["content"].split()
        if not asked.get("stream"):
            if words[0] == "hold":
                self.hold(words[1])
            say("done", target)                 # before it is: who has the answer may stop us at once
            self.json(200, {"choices": [{"message": {"role": "assistant", "content": f"{NAME} says hello"}}]})
            return True
        self.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.event(f"{NAME} says ")
        if words[0] == "hold":
            self.hold(words[1])
        self.event("hello")
        self.chunk(b"data: [DONE]\n\n")
        say("done", target)
        self.sock.sendall(b"0\r\n\r\n")
        return True

    def hold(self, what: str) -> None:
        say("held", what)
        while not there(f"{what}.go"):
            if there(f"{what}.die"):
                os._exit(3)
            try:
                if self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"":
                    say("left", what)
                    raise OSError("gone")
            except BlockingIOError:
                pass
            time.sleep(0.005)

    def event(self, text: str) -> None:
        self.chunk(b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.sock.sendall(b"%x\r\n%b\r\n" % (len(data), data))

    def json(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.sock.sendall(b"HTTP/1.1 %d Said\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
            status, len(body), body))


def watch_loading() -> None:
    while there(f"{NAME}.slow") and not there(f"{NAME}.loaded"):
        if there(f"{NAME}.crash"):
            die_of(f"{NAME}.crash")
        time.sleep(0.005)


def watch_parent(pid: int) -> None:
    """A test run that was killed leaves none of us behind, not even those told to hang."""
    while os.getppid() == pid:
        time.sleep(1)
    os._exit(1)


def accept(listener: socket.socket) -> None:
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=Conversation(sock).run, daemon=True).start()


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if there(f"{NAME}.orphan"):
        start_orphan()
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((FLAGS["--host"], int(FLAGS["--port"])))
    except OSError as exc:
        say("refused", FLAGS["--port"])
        os.write(2, f"couldn't bind HTTP server socket: {exc}\n".encode())
        os._exit(1)
    say("started", os.getpid(), FLAGS["--port"], "beside=" + neighbours())
    if there(f"{NAME}.fail"):
        die_of(f"{NAME}.fail")
    listener.listen(64)
    threading.Thread(target=watch_parent, args=(os.getppid(),), daemon=True).start()
    threading.Thread(target=watch_loading, daemon=True).start()
    threading.Thread(target=accept, args=(listener,), daemon=True).start()
    while True:
        signal.sigwait({signal.SIGTERM})
        say("term")
        if not there(f"{NAME}.hang"):
            os._exit(0)


if __name__ == "__main__":
    main()
