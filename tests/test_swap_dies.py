"""What llama-swap leaves behind when it is killed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

import llmstack

# Starts a model's server as llama-swap does, in a group of its own, and says which; then waits.
SWAP = """\
import http.server, os, subprocess, sys
out = open({pids!r}, "a")
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"],
                         start_new_session=True)
print(os.getpid(), child.pid, file=out, flush=True)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def wait_gone(pid: int) -> bool:
    end = time.monotonic() + 15
    while llmstack.process_started(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not llmstack.process_started(pid)


def started_swap(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[llmstack.SwapApp, str]:
    """A listener with a llama-swap of ours behind it, and the mark of what it starts."""
    program = home / "swap.py"
    program.write_text(SWAP.format(pids=str(home / "pids")))
    mark = llmstack.new_mark(os.getcwd())
    env = {**os.environ, llmstack.STACK_VARIABLE: mark, "LLAMA_API_KEY": "k"}

    def command(port: int) -> list[str]:
        return [sys.executable, str(program), str(port)]

    log = llmstack.Log(str(home / "log"))
    app = llmstack.SwapApp(llmstack.Config(), command, env, log, str(home / "output"))
    monkeypatch.setattr(app, "RESTART_S", 0)
    app.start()
    return app, mark


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="marks are read from /proc")
def test_servers_of_a_llama_swap_that_died_do_not_keep_its_ports(
        home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app, mark = started_swap(home, monkeypatch)
    try:
        swap, server = map(int, (home / "pids").read_text().split())
        os.kill(swap, 9)
        assert app._process.wait() == -9
        assert llmstack.process_started(server), "it outlives llama-swap"
        app.every_second()
        assert wait_gone(server)
        assert app._process.poll() is None, "llama-swap is up again"
    finally:
        app.close()
        llmstack.stop_members(llmstack.stack_members(mark))


def test_a_llama_swap_that_cannot_be_started_again_ends_nothing_else(
        home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program may be gone, for an upgrade: the listener before it goes on, and tries again."""
    app, mark = started_swap(home, monkeypatch)
    there = app._command
    try:
        app._process.kill()
        app._process.wait()
        app._command = [str(home / "gone")]
        app.every_second()
        app.log.flush()
        assert "cannot start" in (home / "log").read_text()
        app._command = there
        app.every_second()
        assert app._process.poll() is None, "llama-swap is up again"
    finally:
        app.close()
        llmstack.stop_members(llmstack.stack_members(mark))
