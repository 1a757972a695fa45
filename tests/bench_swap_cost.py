"""What a swap costs a conversation: two tiers that cannot be together, one real model, four stacks.

    python3 -m tests.bench_swap_cost [--tokens N] [--rounds N] [--model GGUF] [--server PROGRAM]
                                     [--swap PROGRAM] [--gpu-layers N] [--park-after S] [--json]

    ours           llmstack's embedded engine, from `start` to `stop`
    ours, off      the same with park_gb = 0
    llama-swap     its binary, two models in one group
    router mode    llama-server --models-preset, --models-max 1

In a round each stack in turn reads a conversation of N tokens on one tier, answers a question on the
other, and goes on with the conversation on the first. Timed: from the request to the first token of
the question (the swap) and of the returning turn. No two rounds and no two stacks share a text.
Reported: medians, and the ratio of the best of the others to ours. A stack whose program is not
there is left out. Needs a POSIX system; leaves no process, port or file behind.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Sequence

import llmstack

ROOT = Path(llmstack.__file__).parent
PARKED, OFF, SWAP, ROUTER = "ours", "ours, park_gb = 0", "llama-swap", "llama.cpp's router mode"
WORDS = ["river", "stone", "window", "paper", "letter", "winter", "garden", "market", "silver",
         "candle", "island", "bridge", "engine", "forest", "signal", "mirror", "copper", "harbour"]


class Turn(NamedTuple):
    """One answer: seconds to its first token, and the prompt's tokens."""

    first_s: float
    prompt: int
    cached: int
    text: str


class Round(NamedTuple):
    cold: Turn
    swap: Turn
    back: Turn


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def ask(port: int, model: str, messages: Sequence[Dict[str, str]]) -> Turn:
    """A streamed chat of a few tokens. Errors: SystemExit where it says nothing, or no timings."""
    body = json.dumps({"model": model, "messages": messages, "stream": True, "max_tokens": 12,
                       "temperature": 0, "stream_options": {"include_usage": True}})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1_800)
    began, first_s, text = time.monotonic(), 0.0, ""
    timings: Dict[str, Any] = {}
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{model}: {response.status} {response.read()[:300]!r}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[len(b"data: "):])
            for choice in event.get("choices", ()):
                content = choice["delta"].get("content") or ""
                if content and not first_s:
                    first_s = time.monotonic() - began
                text += content
            timings = event.get("timings") or timings
    finally:
        connection.close()
    if not first_s or "prompt_n" not in timings:
        raise SystemExit(f"{model}: an answer without text or timings: {text!r} {timings}")
    cached = timings.get("cache_n", 0)
    return Turn(first_s, timings["prompt_n"] + cached, cached, text)


def conversation(tokens: int, tag: str) -> List[Dict[str, str]]:
    """About so many tokens, by SmolLM2's tokenizer; no beginning in common with another tag's."""
    chance = random.Random(tag)
    words = [f"{tag}."]
    for number in range(tokens * 10 // 32):
        words.append(f"{chance.choice(WORDS)} {number % 10}")
    return [{"role": "user", "content": " ".join(words)}]


def one_round(port: int, tokens: int, tag: str) -> Round:
    said = conversation(tokens, tag)
    cold = ask(port, "one", said)
    swap = ask(port, "two", [{"role": "user", "content": f"{tag}. What is a river?"}])
    said += [{"role": "assistant", "content": cold.text}, {"role": "user", "content": "And then?"}]
    return Round(cold, swap, ask(port, "one", said))


# ---- the stacks


def context_for(tokens: int) -> int:
    return max(2_048, (tokens * 5 // 4 + 512) // 256 * 256)


def wait_up(port: int, path: str, process: Any) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        time.sleep(0.05)
    raise SystemExit(f"nothing answers on {port}")


@contextlib.contextmanager
def spawned(command: List[str], port: int, path: str, log: Path) -> Iterator[int]:
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_up(port, path, process)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


TIERS = {"one": "agent", "two": "plan"}         # name -> role


@contextlib.contextmanager
def ours(asked: Any, directory: Path, park_gb: int,
         tiers: Mapping[str, str] = TIERS) -> Iterator[int]:
    """A project of its own, from `start` to `stop`; one of its tiers fits in memory."""
    project = directory / "project"
    (project / ".llmstack").mkdir(parents=True)
    port, engine_port = free_port(), free_port()
    same = f"path = {asked.model}\nctx_size = {context_for(asked.tokens)}\nsize_gb = 0.2\n"
    sections = "".join(f"[{name}]\n{same}tier = {role}\nrole = {role}\n"
                       for name, role in tiers.items())

    def write_ini(memory_gb: object) -> None:
        (project / ".llmstack" / "models.ini").write_text(
            f"[DEFAULT]\nrouter_port = {port}\nengine_port = {engine_port}\nengine = embedded\n"
            f"memory_gb = {memory_gb}\npark_gb = {park_gb}\npark_after_s = {asked.park_after}\n"
            f"n_gpu_layers = {asked.gpu_layers}\n"
            f"llama_server_bin = {asked.server}\n{sections}", encoding="utf-8")

    env = {**os.environ, "HOME": str(directory), "XDG_DATA_HOME": str(directory / "data"),
           "LLMSTACK_WORK_DIR": str(project), "LLMSTACK_DATA_DIR": str(directory / "data")}
    for name in ("LLMSTACK_MODELS_INI", "LLMSTACK_API_KEY"):
        env.pop(name, None)
    program = [sys.executable, str(ROOT / "llmstack.py")]

    def run(*words: str) -> bytes:
        done = subprocess.run([*program, *words], env=env, cwd=project, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise SystemExit(f"{words}: {done.stdout.decode(errors='replace')}")
        return done.stdout

    write_ini("auto")
    run("trust")
    need_gb = json.loads(run("fit", "--json"))["tiers"][0]["need_gb"]
    write_ini(round(1.5 * need_gb, 3))          # one of the two
    run("trust")
    run("start", "--detach")
    try:
        yield port
    finally:
        run("stop")


def llama_swap(asked: Any, directory: Path) -> Any:
    port = free_port()
    model = (f"    cmd: {asked.server} --host 127.0.0.1 --port ${{PORT}} -m {asked.model}"
             f" {' '.join(server_flags(asked))}\n")
    path = directory / "swap.yaml"
    path.write_text(f"healthCheckTimeout: 120\nmodels:\n  one:\n{model}  two:\n{model}",
                    encoding="utf-8")
    command = [asked.swap, "--config", str(path), "--listen", f"127.0.0.1:{port}"]
    return spawned(command, port, "/v1/models", directory / "swap.log")


def router_mode(asked: Any, directory: Path) -> Any:
    port, flags = free_port(), server_flags(asked)
    rows = "".join(f"{flag.lstrip('-')} = {value}\n" for flag, value in zip(flags[::2], flags[1::2]))
    path = directory / "preset.ini"
    path.write_text(f"[one]\nmodel = {asked.model}\n{rows}[two]\nmodel = {asked.model}\n{rows}",
                    encoding="utf-8")
    command = [asked.server, "--host", "127.0.0.1", "--port", str(port),
               "--models-preset", str(path), "--models-max", "1"]
    return spawned(command, port, "/health", directory / "router.log")


def server_flags(asked: Any) -> List[str]:
    """What llmstack gives a llama-server that changes its speed, in pairs."""
    return ["-c", str(context_for(asked.tokens)), "-ngl", str(asked.gpu_layers), "-fa", "on",
            "--cache-type-k", "q8_0", "--cache-type-v", "q8_0"]


def stacks(asked: Any) -> Dict[str, Callable[[Path], Any]]:
    found: Dict[str, Callable[[Path], Any]] = {
        PARKED: lambda directory: ours(asked, directory, 20),
        OFF: lambda directory: ours(asked, directory, 0)}
    if asked.swap:
        found[SWAP] = lambda directory: llama_swap(asked, directory)
    if os.path.basename(asked.server).startswith("llama-server"):
        found[ROUTER] = lambda directory: router_mode(asked, directory)
    return found


# ---- the table


def medians(rounds: Sequence[Round]) -> Dict[str, float]:
    def middle(values: List[float]) -> float:
        return round(statistics.median(values), 3)

    return {"tokens": middle([r.cold.prompt for r in rounds]),
            "cold_s": middle([r.cold.first_s for r in rounds]),
            "swap_s": middle([r.swap.first_s for r in rounds]),
            "back_s": middle([r.back.first_s for r in rounds]),
            "cached": middle([r.back.cached for r in rounds])}


def render(table: Dict[str, Dict[str, float]]) -> str:
    lines = ["| | tokens | first read | question to the other tier | returning turn | of it cached |",
             "|---|---|---|---|---|---|"]
    for name, row in table.items():
        lines.append(f"| {name} | {row['tokens']:,.0f} | {row['cold_s']:.2f} s | {row['swap_s']:.2f} s"
                     f" | {row['back_s']:.2f} s | {row['cached']:,.0f} |")
    others = [row["back_s"] for name, row in table.items() if name not in (PARKED, OFF)]
    mine = table[PARKED]
    if others:
        lines.append(f"\nreturning turn, best of the others / ours: {min(others) / mine['back_s']:.1f}")
    lines.append(f"parking adds to the swap: {mine['swap_s'] - table[OFF]['swap_s']:+.2f} s")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    smol = os.path.expanduser("~/.cache/llmstack-tests/smollm2/"
                              + llmstack.load_extra("demo").WHEEL_DEMO.file)
    parser = argparse.ArgumentParser(prog="tests.bench_swap_cost")
    parser.add_argument("--tokens", type=int, default=4_000, help="of the conversation (4000)")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    smol = os.environ.get("LLMSTACK_TEST_SMOL") or smol
    parser.add_argument("--model", default=smol, metavar="GGUF")
    parser.add_argument("--server", default=shutil.which("llama-server") or "", metavar="PROGRAM")
    parser.add_argument("--swap", default=shutil.which("llama-swap") or "", metavar="PROGRAM")
    parser.add_argument("--gpu-layers", type=int, default=0, metavar="N", help="of each stack (0)")
    parser.add_argument("--park-after", type=int, default=3, metavar="S",
                        help="park_after_s of ours (3); 0 parks what a fast machine reads at once")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(argv)
    if not asked.server or not os.path.exists(asked.model):
        raise SystemExit("there is no llama-server, or no model: see --server and --model")
    rounds: Dict[str, List[Round]] = {name: [] for name in stacks(asked)}
    names = list(rounds)
    for number in range(asked.rounds):
        for name in names[number % len(names):] + names[:number % len(names)]:
            with tempfile.TemporaryDirectory(prefix="swap-cost-") as directory, \
                    stacks(asked)[name](Path(directory)) as port:
                ask(port, "two", [{"role": "user", "content": "Hello"}])
                done = one_round(port, asked.tokens, f"{number} {names.index(name)}")
            rounds[name].append(done)
            if name != PARKED and done.back.cached > done.back.prompt // 4:
                raise SystemExit(f"{name}: the first tier was not stopped, so nothing is compared")
            print(f"round {number + 1}, {name}: {done.cold.prompt:,} tokens read in {done.cold.first_s:.2f} s,"
                  f" swap {done.swap.first_s:.2f} s, back in {done.back.first_s:.2f} s,"
                  f" {done.back.cached:,} cached", file=sys.stderr, flush=True)
    table = {name: medians(found) for name, found in rounds.items()}
    print(json.dumps(table, indent=1) if asked.json else render(table))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
