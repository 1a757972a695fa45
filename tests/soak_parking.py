"""Three models of which one fits, six conversations in turn, for minutes: is anything read twice?

    python3 -m tests.soak_parking [--seconds S] [--tokens N] [--model GGUF] [--server PROGRAM]
                                  [--gpu-layers N]

One project in a home of its own, a real llama-server. Each turn goes to the next conversation, so
two of three turns swap models. Every answer has to say that all of the conversation's last prompt
came out of the cache (`cache_n`); a conversation that has grown to N tokens begins anew. It prints
a table, and exits with 1 where an answer had less. Needs Linux, for what /proc tells; the model of
noise (tests/noise_model.py) is fast enough for two slow cores and is what is used by default.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from tests.bench_swap_cost import Turn, ask, conversation, ours
from tests.noise_model import render_noise_gguf

TIERS = {"one": "agent", "two": "plan", "three": "plan-uncensored"}
FIRST_TOKENS = 400                              # of a conversation's first message


class Talk:
    """One conversation: what was said in it, and how long its last prompt was."""

    def __init__(self, model: str, tag: str) -> None:
        self.model, self._tag = model, tag
        self.begun = 0
        self.begin()

    def begin(self) -> None:
        self.begun += 1
        self.said = conversation(FIRST_TOKENS, f"{self._tag} {self.begun}")
        self.before = 0

    def turn(self, port: int) -> Tuple[Turn, str]:
        """(the answer, what is wrong with it or "")."""
        answer = ask(port, self.model, self.said)
        wrong = ""
        if answer.cached < self.before - 1:
            wrong = f"{self._tag}: {answer.cached:,} of {self.before:,} tokens were cached"
        self.before = answer.prompt
        self.said += [{"role": "assistant", "content": answer.text},
                      {"role": "user", "content": f"And then? {len(self.said)}"}]
        return answer, wrong


def resident_mb(directory: Path) -> float:
    """Of the daemon."""
    pid = (directory / "project" / ".llmstack" / "router.pid").read_text().split()[0]
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def soak(port: int, seconds: float, most: int) -> Tuple[List[Turn], List[str]]:
    """Every returning turn, and every fault."""
    talks = [Talk(model, f"{model} {tag}") for tag in "ab" for model in TIERS]
    turns: List[Turn] = []
    faults: List[str] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for talk in talks:
            if talk.before > most:
                talk.begin()
            returns = talk.before > 0
            answer, wrong = talk.turn(port)
            if returns:
                turns.append(answer)
            if wrong:
                faults.append(wrong)
                print(wrong, file=sys.stderr, flush=True)
    return turns, faults


def render(turns: Sequence[Turn], faults: Sequence[str], memory: Dict[str, float],
           parked_mb: float) -> str:
    read = sum(turn.prompt for turn in turns)
    cached = sum(turn.cached for turn in turns)
    first_s = sorted(turn.first_s for turn in turns)
    return "\n".join([
        "| returning turns | their tokens | of these cached | first token, median and most |"
        " faults |",
        "|---|---|---|---|---|",
        f"| {len(turns):,} | {read:,} | {cached:,} ({cached / max(read, 1):.1%}) |"
        f" {statistics.median(first_s):.2f} and {first_s[-1]:.2f} s | {len(faults)} |",
        f"\ndaemon: {memory['begin']:.0f} MB at the beginning, {memory['end']:.0f} MB at the end;"
        f" parked: {parked_mb:.1f} MB"])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.soak_parking")
    parser.add_argument("--seconds", type=float, default=600, help="(600)")
    parser.add_argument("--tokens", type=int, default=4_000, help="a conversation's most (4000)")
    parser.add_argument("--model", default="", metavar="GGUF")
    parser.add_argument("--server", default=shutil.which("llama-server") or "", metavar="PROGRAM")
    parser.add_argument("--gpu-layers", type=int, default=0, metavar="N")
    asked = parser.parse_args(argv)
    asked.park_after = 0
    if not asked.server:
        raise SystemExit("there is no llama-server: see --server")
    with tempfile.TemporaryDirectory(prefix="soak-") as home:
        directory = Path(home)
        if not asked.model:
            asked.model = str(directory / "noise.gguf")
            Path(asked.model).write_bytes(render_noise_gguf())
        most = asked.tokens
        asked.tokens = most * 2                 # room for two conversations in a context
        with ours(asked, directory, 20, TIERS) as port:
            memory = {"begin": resident_mb(directory)}
            turns, faults = soak(port, asked.seconds, most)
            memory["end"] = resident_mb(directory)
            kept = (directory / "data" / "parked").glob("*.kv")
            parked_mb = sum(path.stat().st_size for path in kept) / 1e6
    print(render(turns, faults, memory, parked_mb))
    return 1 if faults or not turns else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
