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
import re
import sys
from bisect import bisect_left
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple

Fields = Tuple[Any, ...]                        # of a line, as fields_of has them
Rungs = Dict[str, Dict[str, int]]               # rung -> tier -> requests

# What is read of a line, and of what type that is.
COUNTED = {"conversation": str, "tier": str, "rung": str, "tokens": int, "estimate": int,
           "truth": int, "output": int}
# What decides beside the counts.
SHAPE = {"turns": int, "max_tokens": int, "pictures": int, "fim": bool, "trigger": str}

MOST_TOKENS = 10 ** 15                          # more is no count, and its cost no number

# A line as far as its reason, as the router writes it; a line of another order is parsed.
TEXT = r'[^"\\\x00-\x1f]*'
COUNT = "[0-9]{1,15}"
NUMBER = "[0-9.e-]{1,25}"
WRITTEN = re.compile(
    rf'{{"time":{NUMBER},"conversation":"({TEXT})","path":"{TEXT}","tier":"({TEXT})"'
    rf',"rung":"({TEXT})","tokens":({COUNT}),"estimate":({COUNT}),"truth":({COUNT})'
    rf',"ratio":{NUMBER}'
    rf',("turns":{COUNT},"max_tokens":{COUNT},"pictures":{COUNT},"fim":(?:true|false)'
    rf',"trigger":"{TEXT}")'
    rf',"cached":{COUNT},"output":({COUNT}),"ended":"{TEXT}","status":{COUNT}'
    rf',"first_byte_s":{NUMBER}(?:,"per_s":{NUMBER})?(?:,"drafted":{COUNT},"accepted":{COUNT})?'
    rf'(?:,"cost":({NUMBER}))?(,"loop":true)?,"reason":')
DECODER = json.JSONDecoder()


def parsed_fields(line: str) -> Fields:
    """What is read of any line. Errors: ValueError, KeyError, TypeError, RecursionError."""
    row, _ = DECODER.raw_decode(line)
    for key, kind in (*COUNTED.items(), *SHAPE.items()):
        if type(row[key]) is not kind:
            raise TypeError
        if kind is int and not 0 <= row[key] <= MOST_TOKENS:
            raise ValueError
    counted = [row[key] for key in COUNTED]
    shape = json.dumps({key: row[key] for key in SHAPE})
    return (*counted, shape[1:-1], row.get("cost", 0.0), row.get("loop") is True)


def fields_of(line: str) -> Fields:
    """The values of COUNTED, the JSON of SHAPE's members, the cost, and whether amid tool calls.

    100,000 lines take 0.25 s so, of the second that a user waits; parsed as JSON, 0.7 s.
    Errors: those of parsed_fields.
    """
    match = WRITTEN.match(line)
    if match is None:
        return parsed_fields(line)
    conversation, tier, rung, tokens, estimate, truth, shape, output, cost, loop = match.groups()
    return (conversation, tier, rung, int(tokens), int(estimate), int(truth), int(output),
            shape, float(cost or 0), loop is not None)


class Case:
    """Requests of which the ladder thinks the same, and where they go."""

    def __init__(self, decision: Any) -> None:
        self.decision = decision
        self.rung, self.tier = decision.rung, decision.tier
        # (stay, last tier, amid its tool calls, at too high a cost) -> the tier that goes on.
        self.stayed: Dict[Tuple[str, str, bool, bool], str] = {}


class Shape:
    """Requests that differ in their two counts only.

    The ladder compares these with its ceilings and with what each tier holds. All requests between
    the same two limits are one case.
    """

    def __init__(self, members: str, llmstack: Any, config: Any) -> None:
        self._llmstack, self._config = llmstack, config
        shape = json.loads("{" + members + "}")
        self._facts = llmstack.Facts(auto=True, model="auto", chars=0, wide=0, extra=0, **shape)
        routing = config.routing
        self._ceilings = sorted([routing.high_fidelity_ceiling, routing.mid_fidelity_ceiling])
        limits = []
        for tier in config.ladder:
            limits.append(tier.ctx_size - llmstack.output_reserve(self._facts, tier))
        self._limits = sorted(limits)
        self._cases: Dict[Tuple[int, int], Case] = {}   # limits below the two counts -> a case

    def case(self, tokens: int, estimate: int) -> Case:
        """The case of a request, decided where it is the first of it."""
        between = bisect_left(self._ceilings, tokens), bisect_left(self._limits, estimate)
        found = self._cases.get(between)
        if found is None:
            # What the ladder knew: sums, without the text they were made from.
            llmstack, facts = self._llmstack, self._facts
            classes = max(estimate - facts.pictures * llmstack.PICTURE_TOKENS, 1)
            chars = tokens * llmstack.CHARS_PER_TOKEN
            facts = facts._replace(chars=chars, classes=classes)
            found = Case(llmstack.decide(facts, self._config))
            self._cases[between] = found
        return found


Last = Tuple[str, int]                          # a conversation's last tier, the tokens it holds
NOWHERE: Last = ("", 0)                         # that of a first turn


class Ledger:
    """What one ladder comes to, request by request."""

    def __init__(self, contexts: Dict[str, int]) -> None:
        self.switches = self.read_anew = self.overflows = 0
        self.last: Dict[str, Last] = {}         # of each conversation
        self._contexts = contexts

    def add(self, conversation: str, last: Last, tier: str, prompt: int, output: int) -> None:
        last_tier, held = last
        if tier != last_tier:
            held = 0
            if last is not NOWHERE:
                self.switches += 1
        if conversation:
            self.last[conversation] = tier, prompt + output
        if prompt > held:
            self.read_anew += prompt - held
        if prompt > self._contexts.get(tier, prompt):
            self.overflows += 1


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
        self._tokens: Dict[str, int] = {}       # tier -> of all requests, as replayed
        self._shapes: Dict[str, Shape] = {}     # by their members
        self._paces: Dict[Tuple[str, int], Any] = {}    # tier, bits of the prompt's length -> pace

    def take(self, lines: Iterable[str]) -> None:
        """Decide each line's request again; what is none is counted."""
        for line in lines:
            try:
                self._add(fields_of(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                self.unread += 1

    def _add(self, fields: Fields) -> None:
        conversation, tier, rung, tokens, estimate, truth, output, shape, cost, loop = fields
        prompt = truth or estimate
        if cost:
            self._costs[tier] = self._costs.get(tier, 0.0) + cost
            self._cost_tokens[tier] = self._cost_tokens.get(tier, 0) + prompt + output
        if rung == "explicit":
            self.named += 1
            return
        if shape not in self._shapes:
            self._shapes[shape] = Shape(shape, self._llmstack, self._config)
        case = self._shapes[shape].case(tokens, estimate)
        last = self.recorded.last.get(conversation, NOWHERE)
        self.recorded.add(conversation, last, tier, prompt, output)
        for stay, ledger in self.ledgers.items():
            last = ledger.last.get(conversation, NOWHERE)
            name: str = case.tier
            if last[0] != name:
                name = self._stayed(case, stay, last, prompt, loop)
            ledger.add(conversation, last, name, prompt, output)
            if ledger is self.replayed:
                tiers = self.rungs.setdefault(case.rung, {})
                tiers[name] = tiers.get(name, 0) + 1
                self._tokens[name] = self._tokens.get(name, 0) + prompt + output
        self.rows += 1
        self.cost += cost

    def _pace(self, tier: str, tokens: int) -> Any:
        """How fast a tier reads, which is the same for all prompts between two powers of 2."""
        size = tier, tokens.bit_length()
        pace = self._paces.get(size)
        if pace is None:
            per_s = self._speeds.reading(self._identities.get(tier, ""), tokens)
            pace = self._llmstack.Pace(per_s, loaded=True)
            self._paces[size] = pace
        return pace

    def _stayed(self, case: Case, stay: str, last: Last, prompt: int, loop: bool) -> str:
        """The tier of a request whose conversation's last turn was on another, maybe."""
        if stay == "no" or last is NOWHERE:
            return str(case.tier)
        tier, held = last
        cost_s = 0.0
        if stay == "warm" and not loop:
            old = self._pace(tier, prompt)
            new = self._pace(case.tier, prompt)
            cost_s = self._llmstack.leaving_cost(prompt, old, held, new, 0)
        kind = stay, tier, loop, cost_s > self._config.routing.stay_s
        name = case.stayed.get(kind)
        if name is None:
            decision = case.decision._replace(config=self._configs[stay])
            leaving = self._llmstack.Leaving(tier, held, cost_s)
            name = str(self._llmstack.stay_or_go(decision, leaving, loop).tier)
            case.stayed[kind] = name
        return name

    def replayed_cost(self) -> Tuple[float, List[str]]:
        """(by what tokens of a tier cost in the record, hosted tiers of which it tells none)."""
        cost = 0.0
        unknown: List[str] = []
        hosted = {tier.name for tier in self._config.tiers if tier.remote}
        for tier, tokens in self._tokens.items():
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
