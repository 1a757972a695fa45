"""Which tier a request would go to, and why.

The decision for a prompt or a request body is printed, and nothing is sent.

examples:
  llmstack why "why is the sky blue?"       # the tier a prompt would go to
  llmstack why body.json                    # ... or the body of a request
  llmstack why --path /v1/messages - < body.json
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

# Rung -> (what the request is, what it is for), in words for people.
RUNG_WORDS: Dict[str, Tuple[str, str]] = {
    "explicit": ("Asked for by name", ""),
    "fim": ("Infill", "the fast tier"),
    "trigger": ("{trigger} is in the prompt", "the best tier you have"),
    "high": ("Short prompt ({tokens} of {high} tokens)", "the best tier you have"),
    "mid": ("Longer prompt ({tokens} of {mid} tokens)", "the heavy coder"),
    "floor": ("Long prompt ({tokens} tokens) in a long conversation ({turns} turns)",
              "the heavy coder goes on"),
    "long": ("Long prompt ({tokens} tokens, more than {mid})", "the tier with the long window"),
}


def why_config(places: Any, llmstack: Any) -> Any:
    """The tiers that `why` decides between: the router's, here or elsewhere. Errors: UserError."""
    url = llmstack.trusted_url(places)
    if url:
        return llmstack.fetch_remote(url, os.environ).config
    config = llmstack.planned_config(places, llmstack.warn)
    config = config.on_channel(llmstack.running_channel(places))
    config = llmstack.true_config(config, places, llmstack.warn)
    return llmstack.with_served_contexts(config, llmstack.held_contexts(places))


def read_body(file: str, llmstack: Any) -> Dict[str, Any]:
    """A request body from a file, or from standard input for `-`. Errors: UserError."""
    hint = "give it the body of a request"
    try:
        if file == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(file, "rb") as source:
                data = source.read()
        body = json.loads(data.decode("utf-8"))
    except OSError as exc:
        raise llmstack.UserError(f"cannot read {file}: {exc.strerror}",
                                 "name a file that holds a JSON request body", 2) from None
    except (ValueError, RecursionError) as exc:
        raise llmstack.UserError(f"{file} is not JSON: {exc}", hint, 2) from None
    if not isinstance(body, dict):
        raise llmstack.UserError(f"{file} is not a JSON object", hint, 2)
    return body


def as_resolved(config: Any, path: str, body: Dict[str, Any],
                llmstack: Any) -> Tuple[Dict[str, Any], str]:
    """(a body with the tier that its model means, "gpt-4o is auto here" or "").

    Errors: UserError, as the router answers 404.
    """
    given = body.get("model")
    name = llmstack.resolve_on_path(config, path, given)
    if not name:
        raise llmstack.UserError(str(llmstack.unknown_model(config, given)),
                                 "name one of them, or give the name a line in [ALIASES]", 1)
    if name == given or given is None:
        return body, ""
    return {**body, "model": name}, f"{llmstack.visible(str(given))} is {name} here"


def is_file_name(word: str) -> bool:
    if word == "-" or os.path.exists(word):
        return True
    return bool(re.match(r"\S+\Z", word)) and (os.path.sep in word or word.endswith(".json"))


def why_body(words: Sequence[str], path: str, llmstack: Any) -> Dict[str, Any]:
    """The body of a request: that of a file, or one whose prompt is these words.

    Errors: UserError.
    """
    if len(words) == 1 and is_file_name(words[0]):
        return read_body(words[0], llmstack)
    if not path.endswith("/chat/completions"):
        raise llmstack.UserError("--path is for a request body, and these are words",
                                 "name a file, or leave --path out", 2)
    return {"model": "auto", "messages": [{"role": "user", "content": " ".join(words)}]}


def tiers_not_asked(places: Any, config: Any,
                    llmstack: Any) -> Tuple[Dict[str, str], Dict[str, str]]:
    """(tiers left alone for now, those that cannot answer), each with the reason.

    The running router's word, which has keys and failures of its own; without one, what is missing
    here.
    """
    states: Dict[str, Any] = {}
    try:
        upstream, _ = llmstack.running_router(places)
        states = llmstack.asked_json(upstream, "/llmstack/state")
    except llmstack.UserError:                  # none runs
        pass
    if not states:
        return {}, {**llmstack.missing_credentials(config, os.environ),
                    **llmstack.unserved_hosted(places, config, os.environ)}
    down: Dict[str, str] = {}
    barred: Dict[str, str] = {}
    for name, row in states.items():
        state = row.get("state") if isinstance(row, dict) else "available"
        if state == "available":
            continue
        kind = down if state in ("failing", "offline") else barred
        kind[name] = llmstack.visible(str(row.get("reason")))
    return down, barred


def why_decision(body: Dict[str, Any], places: Any, config: Any, path: str, llmstack: Any) -> Any:
    """The decision for a body, as the router would make it. Errors: UserError."""
    down, barred = tiers_not_asked(places, config, llmstack)
    try:
        texts: List[str] = []
        facts = llmstack.read_facts(path, body, config.routing.ultra_triggers, texts)
        if not llmstack.held_by_all(facts, config):
            facts = facts._replace(classes=llmstack.class_tokens(texts))
        return llmstack.decide(facts, config, down, barred)
    except llmstack.HttpError as exc:
        hint = f"give a tier one of these roles in {places.models_ini}"
        raise llmstack.UserError(str(exc), hint, 1) from None
    except RecursionError:
        raise llmstack.UserError("the request is nested too deeply",
                                 "give it the body of a request", 2) from None


def known_costs(places: Any, decision: Any, llmstack: Any) -> Dict[str, Dict[str, float]]:
    """Tier of the ladder -> seconds to read the request anew and to load it, where they are known.

    Nothing for another machine's router: its speeds are not ours.
    """
    found = {}
    speeds = llmstack.Speeds(places.data)
    tokens = decision.facts.full_tokens
    for tier in () if llmstack.trusted_url(places) else decision.preference:
        identity = speeds.identity_of(tier.name)
        per_s = speeds.reading(identity, tokens)
        if per_s and tier.backend == "gguf":
            found[tier.name] = {"read_s": round(tokens / per_s, 1),
                                "load_s": round(speeds.load_s(identity), 1)}
    return found


def why_words(decision: Any, llmstack: Any) -> str:
    """Why a request goes where it goes, in a sentence or two for people."""
    what, aim = RUNG_WORDS[decision.rung]
    facts, routing = decision.facts, decision.config.routing
    what = what.format(
        trigger=facts.trigger, turns=facts.turns, tokens=f"{max(facts.tokens, 1):,}",
        high=f"{routing.high_fidelity_ceiling:,}", mid=f"{routing.mid_fidelity_ceiling:,}")
    if not decision.chain:                      # asked for by name
        return what
    best, chosen = decision.preference[0], decision.chain[0]
    if chosen is not best:
        return f"{what}, for {best.name}. But {decision.refused[best.name]}"
    need = llmstack.tokens_needed(facts, chosen)
    if need > chosen.ctx_size:
        return (f"{what}. No tier holds {need:,} tokens ({facts.source});"
                " this one has the largest context")
    if best.role != llmstack.RUNGS[decision.rung][0] and aim != "the best tier you have":
        aim = f"there is no {llmstack.RUNGS[decision.rung][0]} tier here"
    return f"{what}: {aim}"


class WhyLine(NamedTuple):
    """A rung of the ladder as `why` shows it, the best tier first."""

    mark: str
    tier: str
    role: str
    context: str
    note: str


def why_lines(decision: Any, llmstack: Any) -> List[WhyLine]:
    """The ladder with what was passed over, and the tiers that are on none."""
    if not decision.chain:
        return []
    config, refused = decision.config, decision.refused
    others = [t for t in config.tiers if t not in config.ladder]
    lines = []
    for tier in (*config.ladder, *others):
        mark, note = "", refused.get(tier.name, "")
        if tier.name == decision.tier:
            mark, note = "\u2192", "taken"
        context = llmstack.context_words(tier.ctx_size)
        lines.append(WhyLine(mark, tier.name, tier.role or "-", context, note))
    return lines


def render_why(decision: Any, renamed: str, wrong: str,
               costs: Mapping[str, Mapping[str, float]], llmstack: Any) -> List[str]:
    """A decision as people read it: the sentence, the ladder, what would change it."""
    sentences = [llmstack.paint(decision.tier, "1"), renamed, why_words(decision, llmstack), wrong]
    lines = [". ".join(filter(None, sentences))]
    width = llmstack.output_columns()
    ladder = llmstack.render_table(why_lines(decision, llmstack), width, llmstack.paint)
    if ladder:
        lines += ["", *ladder]
    if decision.nearest:
        lines.append(f"Nearest change: {decision.nearest}")
    for name, takes in costs.items():
        lines.append(f"On {name}: about {takes['read_s']:,.1f} s to read it anew,"
                     f" {takes['load_s']:,.1f} s more where it must be loaded")
    return lines


def main(argv: Sequence[str], llmstack: Any) -> Any:
    parser = llmstack.extra_parser("why", __doc__)
    parser.add_argument("request", metavar="WORDS|FILE", nargs="+",
                        help="a prompt in plain words, or a JSON request body; - for standard"
                        " input")
    parser.add_argument("--path", metavar="P", default="/v1/chat/completions",
                        help="the path it would be posted to (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    config = why_config(places, llmstack)
    path = llmstack.inference_path(args.path)
    if not path:
        raise llmstack.UserError(f"{args.path} is no path that auto is resolved on",
                                 "one of " + ", ".join(llmstack.INFERENCE_PATHS.values()), 2)
    body, renamed = as_resolved(config, path, why_body(args.request, path, llmstack), llmstack)
    decision = why_decision(body, places, config, path, llmstack)
    wrong = ""
    tier = config.by_name(decision.tier)
    if decision.rung == "explicit" and tier is not None and tier.backend != "gguf":
        wrong = llmstack.plan_route(tier, config, decision.down).refused[1]
    costs = known_costs(places, decision, llmstack)
    reason = "; ".join(filter(None, [decision.reason, wrong]))
    if renamed:
        reason = f"{renamed}: {reason}"
    found = {"tier": decision.tier, "rung": decision.rung, "tokens": decision.tokens,
             "needs": decision.facts.full_tokens, "source": decision.facts.source,
             "reason": reason, "refused": decision.refused, "nearest": decision.nearest or None,
             "takes": costs}
    lines = render_why(decision, renamed, wrong, costs, llmstack)
    return llmstack.Result(found, lines, is_json=args.json)
