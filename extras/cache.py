"""Say of each conversation what its client and its server have kept of the prompt cache.

Reads this project's logs/decisions.jsonl with its older parts. A turn is cheap when its prompt
begins as the last one did (the client's part), and when the tier that answers still holds that
(the server's part). CONVERSATION is a conversation's name in the record, or how it begins: its
turns are shown one by one. No text of a prompt is in the record.

examples:
  llmstack cache
  llmstack cache 3f2a
  llmstack cache --json
"""

from __future__ import annotations

import json
import os
import time
from typing import Any, Dict, Iterable, List, NamedTuple, Sequence

# (client, what it changes) -> what is known to stop it. "": any.
ADVICE = {
    ("claude", "system text"):
        "Claude Code puts a line that changes with each request before its system text:"
        " CLAUDE_CODE_ATTRIBUTION_HEADER=0 stops it, and `llmstack connect claude` sets that",
    ("opencode", "message"):
        "opencode moves its reminder of plan and build mode to the newest message (its issues"
        " 23595 and 26749): no setting stops it, staying in one mode does",
    ("", "system text"):
        "a date, a time or a working directory in the system text does this",
    ("", "tools"):
        "tools that come and go do this: MCP servers that connect late, for example",
}


class Turn(NamedTuple):
    """A turn whose conversation had one before, as the record tells it."""

    time_s: float
    client: str
    tier: str
    same: float                                 # of the last prompt, 0 to 1
    differs: str
    base: int                                   # tokens there were to keep
    cached: int
    left: str                                   # the tier of the last turn, where it was another
    wait_s: float                               # until its model was loaded

    @property
    def kept(self) -> float:
        """How much of what the client kept the server has kept, too."""
        return min(self.cached / max(self.same * self.base, 1.0), 1.0)

    @property
    def place(self) -> str:
        """Where the client's change stands: "message 12" is a "message"."""
        return "message" if self.differs.startswith("message ") else self.differs

    @property
    def loss(self) -> str:
        """Why the server has kept little, "" where it has kept most."""
        if self.kept >= 0.5 or not self.same * self.base >= 1:
            return ""
        if self.left:
            return "another tier"
        return "loaded anew" if self.wait_s >= 0.5 else "made room"


LOSSES = {
    "another tier": "went to another tier, which had to read it ([ROUTING] stay)",
    "loaded anew": "waited for a load that brought nothing back (park_gb, park_after_s)",
    "made room": "found that other conversations had taken their place (parallel, --cache-ram)",
}


def parse_turn(row: Any) -> Turn:
    """A line of the record. Errors: KeyError, TypeError, ValueError where it is no turn."""
    left = row.get("left") or {}
    base = int(row["held"]) or int(left.get("tokens", 0))
    return Turn(float(row["time"]), str(row.get("client", "")), str(row["tier"]),
                float(row["same"]), str(row["differs"]), base, int(row["cached"]),
                str(left.get("tier", "")), float(row.get("wait_s", 0.0)))


class Conversation:
    """The turns of one conversation, and what is said of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.turns: List[Turn] = []

    def counts(self, words: Iterable[str]) -> Dict[str, int]:
        """Word -> how often it is there, without ""."""
        found: Dict[str, int] = {}
        for word in words:
            if word:
                found[word] = found.get(word, 0) + 1
        return found

    def advice(self) -> List[str]:
        """What is known to stop what the client does, for what it does at every fifth turn."""
        client = self.turns[-1].client
        changes = self.counts(turn.place for turn in self.turns)
        found = []
        for place, count in changes.items():
            known = ADVICE.get((client, place)) or ADVICE.get(("", place))
            if known and count * 5 >= len(self.turns):
                found.append(known)
        return found

    def row(self) -> Dict[str, Any]:
        """Its value in --json."""
        turns = self.turns
        base = sum(turn.base for turn in turns)
        same = sum(turn.same * turn.base for turn in turns)
        cached = sum(turn.kept * turn.same * turn.base for turn in turns)
        return {"conversation": self.name, "client": turns[-1].client,
                "tiers": list(dict.fromkeys(turn.tier for turn in turns)),
                "first": turns[0].time_s, "last": turns[-1].time_s, "turns": len(turns),
                "kept_by_client": round(same / base, 3) if base else None,
                "kept_by_server": round(cached / same, 3) if same else None,
                "changes": self.counts(turn.place for turn in turns),
                "losses": self.counts(turn.loss for turn in turns),
                "advice": self.advice()}


def add_turns(found: Dict[str, Conversation], lines: Iterable[str]) -> None:
    """Put the turns of a record into their conversations; what is no turn is passed over."""
    for line in lines:
        if '"same":' not in line:
            continue
        try:
            row = json.loads(line)
            name, turn = str(row["conversation"]), parse_turn(row)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            continue
        found.setdefault(name, Conversation(name)).turns.append(turn)


def percent(share: Any) -> str:
    return "nothing known" if share is None else f"{share:.0%}"


def render(conversation: Conversation, llmstack: Any) -> List[str]:
    """What was kept of one conversation, and why not."""
    row = conversation.row()
    clock = time.strftime("%H:%M", time.localtime(row["last"]))
    client = f"{row['client']} on " if row["client"] else ""
    lines = [llmstack.visible(
        f"{row['conversation']}  {client}{', '.join(row['tiers'])}, turns after its first:"
        f" {row['turns']:,}, the last at {clock}", 200)]
    lines.append(f"  kept by the client {percent(row['kept_by_client'])},"
                 f" by the server {percent(row['kept_by_server'])}")
    for place, count in row["changes"].items():
        what = "an earlier message" if place == "message" else f"its {place}"
        lines.append(llmstack.visible(f"  the client changed {what}: {count:,} turns", 200))
    for loss, count in row["losses"].items():
        lines.append(f"  {count:,} turns {LOSSES[loss]}")
    return lines + [f"  {advice}" for advice in row["advice"]]


def render_turns(conversation: Conversation, llmstack: Any) -> List[str]:
    """Of each turn what was kept of so many tokens."""
    lines = []
    for turn in conversation.turns:
        clock = time.strftime("%H:%M:%S", time.localtime(turn.time_s))
        where = f", differs from {turn.differs} on" if turn.differs else ""
        loss = f", {turn.loss}" if turn.loss else ""
        lines.append(llmstack.visible(
            f"  {clock}  {turn.tier}: {turn.base:,} tokens, client {turn.same:.0%}{where},"
            f" server {turn.kept:.0%}{loss}", 200))
    return lines


def main(argv: Sequence[str], llmstack: Any) -> Any:
    parser = llmstack.extra_parser("cache", __doc__)
    parser.add_argument("conversation", metavar="CONVERSATION", nargs="?", default="",
                        help="its name in the record, or how that begins")
    parser.add_argument("--file", metavar="FILE", help="another record, - for standard input")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(list(argv))
    replay = llmstack.load_extra("replay")
    places = llmstack.find_places(os.environ)
    known: Dict[str, Conversation] = {}
    log = places.log("decisions.jsonl")
    files = [args.file] if args.file else replay.record_files(log, llmstack)
    for file in files:
        replay.read_file(file, lambda lines: add_turns(known, lines), llmstack)
    found = [one for name, one in known.items() if name.startswith(args.conversation)]
    if args.conversation and not found:
        raise llmstack.UserError(
            f"no conversation {llmstack.visible(args.conversation)} had a second turn",
            "`llmstack cache` names those that had one", 1)
    lines = []
    for conversation in found:
        lines += render(conversation, llmstack)
        if args.conversation:
            lines += render_turns(conversation, llmstack)
    nothing = ["No conversation of the record has had a second turn yet."]
    rows = [conversation.row() for conversation in found]
    return llmstack.Result(rows, lines or nothing, is_json=args.json)
