"""What router and engine add to a stream through LiteLLM: its proxy asked alone and through the stack, in turn.

    LLMSTACK_TEST_DATA=~/.cache/llmstack-tests/data python3 -m tests.bench.litellm [ROUNDS]

Both ask the real proxy, and behind it the benchmark's stub. A stream has 500 events, which LiteLLM parses and writes anew;
that costs it so much more than us that the two are told apart by medians over many streams only.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.stub import HOST, STREAM_EVENTS

ROOT = Path(__file__).resolve().parent.parent.parent
LOAD_S = 120


def free_ports(count: int) -> list[int]:
    socks = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


def prepare(directory: Path, stub: str, ports: list[int]) -> dict[str, str]:
    """A project with one hosted tier, whose provider is the stub; the environment to run llmstack with."""
    state = directory / ".llmstack"
    state.mkdir()
    (state / "models.ini").write_text(
        "[DEFAULT]\nengine = embedded\nrouter_port = {}\nengine_port = {}\nlitellm_port = {}\n"
        "[code-smart]\nrole = agent\nmodel = openai/stub\nctx_size = 64k\n".format(*ports))
    (state / "litellm_config.yaml").write_text(
        "litellm_settings: {drop_params: true}\nmodel_list:\n- model_name: code-smart\n"
        f"  litellm_params: {{model: openai/stub, api_base: '{stub}/v1', api_key: none}}\n")
    data = directory / "data"
    data.mkdir()
    (data / "litellm").symlink_to(Path(os.environ["LLMSTACK_TEST_DATA"]).expanduser() / "litellm")
    return {"PATH": os.environ["PATH"], "HOME": str(directory), "LLMSTACK_DATA_DIR": str(data),
            "LLMSTACK_WORK_DIR": str(directory),
            "REPEATED_STREAMING_CHUNK_LIMIT": "1000"}       # LiteLLM takes the stub's equal words for a model that hangs


def stream(port: int, number: int) -> tuple[float, float]:
    """(ms to the first event, ms to the end) of one stream; checks that it is whole."""
    body = json.dumps({"model": "code-smart", "stream": True, "messages": [{"role": "user", "content": f"say {number}"}]})
    began = time.perf_counter()
    connection = http.client.HTTPConnection(HOST, port, timeout=LOAD_S)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    first = answer.readline()
    first_ms = (time.perf_counter() - began) * 1000
    try:
        data = first + answer.read()
    except http.client.IncompleteRead as exc:
        data = exc.partial
    ms = (time.perf_counter() - began) * 1000
    connection.close()
    words = data.count(b'"content":" word"')
    if answer.status != 200 or not data.rstrip().endswith(b"data: [DONE]") or words != STREAM_EVENTS - 2:
        raise SystemExit(f"port {port} answered {answer.status}, {data[-300:]!r}")
    return first_ms, ms


def main(rounds: int) -> int:
    if not os.environ.get("LLMSTACK_TEST_DATA"):
        raise SystemExit("LLMSTACK_TEST_DATA names no directory; `python3 -m tests` makes it")
    ports = free_ports(3)
    with tempfile.TemporaryDirectory() as name, subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "bench" / "stub.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stub:
        assert stub.stdout is not None
        url = stub.stdout.readline().decode().split()[-1].rstrip("/")
        env = prepare(Path(name), url, ports)

        def llmstack(*words: str) -> None:
            subprocess.run([sys.executable, str(ROOT / "llmstack.py"), *words], env=env, check=True, stdin=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL)

        llmstack("trust")
        try:
            llmstack("start", "--detach")
            for number in range(-5, 0):         # the first waits for the proxy, the others warm it up
                stream(ports[0], number)
            taken: dict[int, list[tuple[float, float]]] = {ports[0]: [], ports[2]: []}
            for number in range(rounds * 10):
                for port in (ports[0], ports[2])[:: 1 if number % 2 else -1]:
                    taken[port].append(stream(port, number))
        finally:
            llmstack("stop")
            stub.terminate()
    alone, through = ([statistics.median(column) for column in zip(*taken[port])] for port in (ports[2], ports[0]))
    print(f"{'':24}{'LiteLLM alone':>16}{'through llmstack':>18}{'added':>10}")
    for label, a, b in (("first event, ms", alone[0], through[0]), ("500 events, ms", alone[1], through[1])):
        print(f"{label:24}{a:16.2f}{b:18.2f}{b - a:10.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
