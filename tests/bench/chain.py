"""The subjects of --swap: whole chains, each with a fake llama-server of its own behind it.

    llmstack      the daemon of `start`: router, embedded engine, relay
    llama-swap    one program that routes, loads and relays

Each starts its server itself, as it would start llama.cpp's. It is the stub, which answers at once.
"""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench import stub
from tests.bench.processes import Children, Launch, Subject
from tests.bench.stub import HOST

SWAP = "llama-swap"

# `auto` is a model's own name here, so that both are asked for the same thing.
SWAP_YAML = """\
logLevel: warn
startPort: {port}
models:
  auto:
    cmd: {server} --port ${{PORT}}
    concurrencyLimit: 512
"""

MODELS_INI = """\
[DEFAULT]
engine = embedded
router_port = {router_port}
engine_port = {engine_port}
llama_server_bin = {server}
memory_gb = 8

[code-fast]
role = fast
path = {model}
ctx_size = 128k
size_gb = 0.1

[code-smart]
role = agent
path = {model}
ctx_size = 64k
size_gb = 0.1
"""


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def write_server(directory: Path) -> Path:
    """Write the fake llama-server's program."""
    path = directory / "llama-server"
    words = shlex.join([sys.executable, stub.__file__])
    path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    path.chmod(0o755)
    return path


def start_chain(children: Children, name: str, command: Sequence[str], server: Path) -> Subject:
    """Start the daemon itself, not by way of `start`: the child is what is measured."""
    work = children.directory / "project"
    state = work / ".llmstack"
    state.mkdir(parents=True)
    model = children.directory / "model.gguf"
    model.touch()
    router_port, engine_port = free_port(), free_port()
    text = MODELS_INI.format(router_port=router_port, engine_port=engine_port, server=server,
                             model=model)
    (state / "models.ini").write_text(text)
    daemon = [*command, "_daemon", "--host", HOST, "--port", str(router_port)]
    launch = Launch(name, [*daemon, "--engine", "embedded"], {"LLMSTACK_WORK_DIR": str(work)},
                    "stderr", "")
    child = children.start(launch)
    child.wait_for_answer(router_port)
    return Subject(name, router_port, child)


def start_swap(children: Children, program: str, server: Path) -> Subject:
    """Start llama-swap, its log at its quietest but for failures."""
    port = free_port()
    path = children.directory / "llama-swap.yaml"
    path.write_text(SWAP_YAML.format(port=free_port(), server=server))
    command = [program, "-config", str(path), "-listen", f"{HOST}:{port}"]
    child = children.start(Launch(SWAP, command, {}, "stderr", ""))
    child.wait_for_answer(port)
    return Subject(SWAP, port, child)
