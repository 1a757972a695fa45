"""Run another ladder over the record of decisions.

Reads FILE..., else this project's logs/decisions.jsonl with its older parts, and decides each
request to `auto` once more by models.ini, or by the one of --models-ini; once each with `stay` of
[ROUTING] as no, loop and warm. No model is asked and nothing is sent. Hosts that were down and
credentials that were missing then are not counted.

  switches    turns of a conversation that went to another tier than the turn before
  read anew   tokens of prompts that the tier had not in its cache: all of them after a switch,
              else what is new since the turn before
  overflows   requests that the tier's context does not hold
  cost        of hosted tiers, by what a token of each has cost in the record

examples:
  llmstack replay --models-ini other.ini
  llmstack replay --json logs/decisions.jsonl.1
"""

from __future__ import annotations

import json
import os
import sys
from operator import itemgetter
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple

# What is read of a line, and of what type that is.
FIELDS = itemgetter("conversation", "tier", "rung", "tokens", "estimate", "truth", "output",
                    "turns", "max_tokens", "pictures", "fim", "trigger")
TYPES = (str, str, str, int, int, int, int, int, int, int, bool, str)
Rungs = Dict[str, Dict[str, int]]               # rung -> tier -> requests


class Ledger:
    """What one ladder comes to, request by request."""

    def __init__(self, contexts: Dict[str, int]) -> None:
        self.switches = self.read_anew = self.overflows = 0
        self.tokens: Dict[str, int] = {}        # tier -> of prompts and answers
        self._contexts = contexts
        # Conversation -> the tier that answered last, and the tokens it holds of it.
        self._last: Dict[str, Tuple[str, int]] = {}

    def last(self, conversation: str) -> Tuple[str, int]:
        return self._last.get(conversation, ("", 0)) if conversation else ("", 0)

    def add(self, conversation: str, tier: str, prompt: int, output: int) -> None:
        held = 0
        if conversation:
            last = self._last.get(conversation)
            self._last[conversation] = tier, prompt + output
            if last is not None and last[0] == tier:
                held = last[1]
            elif last is not None:
                self.switches += 1
        if prompt > held:
            self.read_anew += prompt - held
        if prompt > self._contexts.get(tier, prompt):
            self.overflows += 1
        self.tokens[tier] = self.tokens.get(tier, 0) + prompt + output


def sums(ledger: Ledger, cost: float) -> Dict[str, Any]:
    return {"switches": ledger.switches, "read_anew_tokens": ledger.read_anew,
            "overflows": ledger.overflows, "cost": round(cost, 6)}


STAYS = ("no", "loop", "warm")


class Replay:
    """The record as it was, and as another ladder would have had it, with each kind of `stay`.

    `speeds` are what this machine has shown of the tiers; `warm` goes by them.
    """

    def __init__(self, llmstack: Any, config: Any, speeds: Any) -> None:
        contexts = {tier.name: tier.ctx_size for tier in config.tiers}
        self.rows = self.named = self.unread = 0
        self.rungs: Rungs = {}
        self.recorded = Ledger(contexts)
        self.ledgers = {stay: Ledger(contexts) for stay in STAYS}
        self.replayed = self.ledgers[config.routing.stay]
        self._configs = {
            stay: config._replace(routing=config.routing._replace(stay=stay)) for stay in STAYS}
        self._speeds = speeds
        self._identities = {tier.name: speeds.identity_of(tier.name) for tier in config.tiers}
        self.cost = 0.0                         # of the requests to auto, as recorded
        self._llmstack, self._config = llmstack, config
        self._costs: Dict[str, float] = {}      # tier -> of all its requests that told it
        self._cost_tokens: Dict[str, int] = {}  # tier -> of these requests

    def take(self, lines: Iterable[str]) -> None:
        """Decide each line's request again; what is none is counted.

        Most of a line is why it went where it did. Parsing it no further than that takes 0.35 s for
        100,000 lines, the whole of them 0.95 s; only what has a cost is needed to its end.
        """
        decode = json.JSONDecoder().raw_decode
        for line in lines:
            counts, reason, rest = line.partition(',"reason":')
            if reason and '"cost":' not in rest:
                line = counts + "}"
            try:
                self._add(decode(line)[0])
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                self.unread += 1

    def _add(self, row: Dict[str, Any]) -> None:
        fields = FIELDS(row)
        if tuple(map(type, fields)) != TYPES:
            raise TypeError
        (conversation, tier, rung, tokens, estimate, truth, output,
         turns, max_tokens, pictures, fim, trigger) = fields
        prompt = truth or estimate
        cost = row.get("cost", 0.0)
        if cost:
            self._costs[tier] = self._costs.get(tier, 0.0) + cost
            self._cost_tokens[tier] = self._cost_tokens.get(tier, 0) + prompt + output
        if rung == "explicit":
            self.named += 1
            return
        # What the ladder knew: sums, without the text they were made from.
        llmstack = self._llmstack
        classes = max(estimate - pictures * llmstack.PICTURE_TOKENS, 1)
        facts = llmstack.Facts(
            auto=True, model="auto", fim=fim, chars=tokens * llmstack.CHARS_PER_TOKEN, wide=0,
            extra=0, pictures=pictures, turns=turns, max_tokens=max_tokens, trigger=trigger,
            classes=classes)
        decision = llmstack.decide(facts, self._config)
        self.recorded.add(conversation, tier, prompt, output)
        for stay, ledger in self.ledgers.items():
            name = self._stayed(decision, stay, ledger.last(conversation), prompt,
                                row.get("loop") is True)
            ledger.add(conversation, name, prompt, output)
            if ledger is self.replayed:
                tiers = self.rungs.setdefault(decision.rung, {})
                tiers[name] = tiers.get(name, 0) + 1
        self.rows += 1
        self.cost += cost

    def _pace(self, tier: str, tokens: int) -> Any:
        per_s = self._speeds.reading(self._identities.get(tier, ""), tokens)
        return self._llmstack.Pace(per_s, loaded=True)

    def _stayed(self, decision: Any, stay: str, last: Tuple[str, int], prompt: int,
                loop: bool) -> str:
        """The tier of a request whose conversation's last turn was on another, maybe."""
        tier, held = last
        if stay == "no" or tier in ("", decision.tier):
            return str(decision.tier)
        old, new = self._pace(tier, prompt), self._pace(decision.tier, prompt)
        cost_s = self._llmstack.leaving_cost(prompt, old, held, new, 0)
        leaving = self._llmstack.Leaving(tier, held, cost_s)
        decision = decision._replace(config=self._configs[stay])
        return str(self._llmstack.stay_or_go(decision, leaving, loop).tier)

    def replayed_cost(self) -> Tuple[float, List[str]]:
        """(by what tokens of a tier cost in the record, hosted tiers of which it tells none)."""
        cost = 0.0
        unknown: List[str] = []
        hosted = {tier.name for tier in self._config.tiers if tier.remote}
        for tier, tokens in self.replayed.tokens.items():
            if self._cost_tokens.get(tier):
                cost += tokens * self._costs[tier] / self._cost_tokens[tier]
            elif tier in hosted:
                unknown.append(tier)
        return cost, sorted(unknown)

    def result(self) -> Dict[str, Any]:
        """The value that --json prints."""
        cost, unknown = self.replayed_cost()
        return {"requests": self.rows, "named": self.named, "unread_lines": self.unread,
                "rungs": self.rungs,
                "recorded": sums(self.recorded, self.cost),
                "replayed": {**sums(self.replayed, cost), "cost_unknown": unknown},
                "stay": {stay: self.moves(ledger) for stay, ledger in self.ledgers.items()}}

    @staticmethod
    def moves(ledger: Ledger) -> Dict[str, int]:
        return {"switches": ledger.switches, "read_anew_tokens": ledger.read_anew,
                "overflows": ledger.overflows}


def table_lines(rows: Sequence[Sequence[str]]) -> List[str]:
    """Rows of text, the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    return lines


def render(replay: Replay, llmstack: Any) -> List[str]:
    """The result as two tables."""
    result = replay.result()
    tiers = list(dict.fromkeys(tier for row in replay.rungs.values() for tier in row))
    rows = [["rung", "requests", *tiers]]
    for rung in sorted(replay.rungs, key=list(llmstack.RUNGS).index):
        counts = replay.rungs[rung]
        rows.append([rung, f"{sum(counts.values()):,}",
                     *(f"{counts.get(tier, 0):,}" for tier in tiers)])
    lines = [*table_lines(rows), ""]
    old, new = result["recorded"], result["replayed"]
    stays = result["stay"]
    rows = [["", "as recorded", "replayed", *(f"stay = {stay}" for stay in stays)]]
    for label, key in (("switches", "switches"), ("read anew", "read_anew_tokens"),
                       ("overflows", "overflows")):
        rows.append([label, f"{old[key]:,}", f"{new[key]:,}",
                     *(f"{moves[key]:,}" for moves in stays.values())])
    if old["cost"] or new["cost"] or new["cost_unknown"]:
        rows.append(["cost", f"{old['cost']:.2f}", f"{new['cost']:.2f}", *([""] * len(stays))])
    lines += table_lines(rows)
    for tier in new["cost_unknown"]:
        lines.append(f"What {tier} costs is not in the record, and not in this sum.")
    if replay.named:
        lines.append(f"{replay.named:,} more asked for a tier by its name.")
    return lines


def record_files(path: str, llmstack: Any) -> List[str]:
    """The project's record, its oldest part first. Errors: UserError where there is none."""
    parts = [f"{path}.{number}" for number in range(llmstack.LOGS_KEPT, 0, -1)] + [path]
    found = [part for part in parts if os.path.exists(part)]
    if not found:
        raise llmstack.UserError(f"there is no {path}",
                                 "it begins with the first request after `llmstack start`,"
                                 " unless decision_log = no")
    return found


def read_file(name: str, take: Callable[[Iterable[str]], None], llmstack: Any) -> None:
    """Take all lines of a record. Errors: UserError where it cannot be read."""
    try:
        if name == "-":
            take(sys.stdin)
        else:
            with open(name, encoding="utf-8", errors="replace") as file:
                take(file)
    except OSError as exc:
        raise llmstack.UserError(f"cannot read {name}: {exc.strerror}", "name a record") from None


def main(argv: Sequence[str], llmstack: Any) -> Any:
    parser = llmstack.extra_parser("replay", __doc__)
    parser.add_argument("files", metavar="FILE", nargs="*",
                        help="of the record; - is standard input")
    parser.add_argument("--models-ini", metavar="OTHER", help="the ladder to run")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    if args.models_ini:
        path = os.path.abspath(args.models_ini)
        if not os.path.exists(path):
            raise llmstack.UserError(f"there is no {args.models_ini}", "name a models.ini", 2)
        places = places._replace(models_ini=path)
    config = llmstack.planned_config(places, llmstack.warn)
    replay = Replay(llmstack, config, llmstack.Speeds(places.data))
    for name in args.files or record_files(places.log("decisions.jsonl"), llmstack):
        read_file(name, replay.take, llmstack)
    if not replay.rows:
        raise llmstack.UserError("the record holds no request to auto", "name another file")
    notes = []
    if replay.unread:
        notes.append(f"{replay.unread:,} lines are no requests and were passed over")
    return llmstack.Result(replay.result(), render(replay, llmstack), 0, args.json, notes)
