"""Measure what a tier can do here: tools, JSON, thinking, pictures, speed, memory.

Each TIER (default: every local one whose file is here) is loaded by a llama-server of its own and
asked a few things. What is found is kept for this machine, these weights, this build and these
flags: opencode.json, /v1/models and `check` go by it, and routing knows its speeds before it has
answered. Where models.ini has tool_call or reasoning, that counts instead.

examples:
  llmstack probe
  llmstack probe code-smart --json
"""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import struct
import subprocess
import time
import zlib
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

SPEED_TOKENS = (2_048, 16_384)                  # of the prompts that are read
WRITTEN_TOKENS = 32                             # behind each of them
ANSWER_TOKENS = 1_024                           # of the other answers, thinking included...
FIRST_TOKENS = 64                               # ...and where only how they begin is looked at
PATIENCE_S = 600                                # for one answer, and for a prompt to be worth it
WORDS = ("river stone quiet morning seven letters under the bridge a red boat waits for rain while"
         " nobody counts the hours between two small towns of the north")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
COLOURS = ["red", "green", "blue"]
COLOUR_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": COLOURS}, "bright": {"type": "boolean"}},
    "required": ["colour", "bright"],
    "additionalProperties": False,
}


class Verdict(NamedTuple):
    """Whether a tier can do something; None where that is not to be told."""

    can: Optional[bool]
    note: str = ""


class Trial:
    """A llama-server of our own for one tier, up for as long as its block runs.

    Errors, at the block's beginning: UserError where the tier does not load.
    """

    def __init__(self, tier: Any, config: Any, places: Any, env: Mapping[str, str],
                 llmstack: Any) -> None:
        self.tier, self.config = tier, config
        self.log = places.log(f"{tier.name}.log")
        self.loaded_s = 0.0
        self.process: Any = None
        self.command: List[str] = []
        self._places, self._env = places, env
        self._llmstack = llmstack
        # Any free port: two trials that look for the next one in the same moment get the same,
        # and llama-server shares it. The key tells ours from a stranger, and keeps web pages out.
        self._upstream = llmstack.Upstream("127.0.0.1", llmstack.free_port("127.0.0.1"))
        self._upstream.key = os.urandom(16).hex()

    def _spawn(self) -> None:
        llmstack, data, env = self._llmstack, self._places.data, self._env
        own_config = llmstack.tier_config(self.config, self.tier)
        program = llmstack.find_llama_server(own_config, env, data)
        refused = llmstack.probe_flags(program, self.config, data)
        tier = llmstack.ready_tier(self.tier, env)
        self.command = llmstack.server_command(program, tier, self.config, self._upstream.port,
                                               refused)
        own = {
            **llmstack.without_credentials(env),
            "LLMSTACK_API_KEY": "",
            "LLAMA_API_KEY": self._upstream.key,
            llmstack.STACK_VARIABLE: llmstack.new_mark(self._places.project),
        }
        self.process = llmstack.spawn(self.command, self.log, own)

    def _wait_up(self, end_s: float) -> None:
        llmstack = self._llmstack
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > end_s:
                raise llmstack.UserError(
                    f"{self.tier.name} does not load:\n{llmstack.tail_of(self.log)}",
                    f"see {self.log}; `llmstack check` looks at its file")
            time.sleep(0.05)

    def __enter__(self) -> Trial:
        self._spawn()
        began = time.monotonic()
        try:
            self._wait_up(began + self._llmstack.LOAD_TIMEOUT_S)
        except BaseException:
            self._end()
            raise
        self.loaded_s = time.monotonic() - began
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        pid, llmstack = self.process.pid, self._llmstack
        started = llmstack.process_started(pid)
        llmstack.stop_process(pid, started, llmstack.STOP_GRACE_S, self.process.poll)
        self.process.wait()

    def _is_up(self) -> bool:
        try:
            response, _ = self._upstream.get("/health", 5.0)
        except (OSError, ValueError):
            return False
        return bool(response.status == 200)

    def ask(self, path: str, body: Optional[Mapping[str, Any]] = None,
            timeout_s: float = 10) -> Tuple[int, Dict[str, Any]]:
        """(status, answer) of its server. Errors: OSError, ValueError."""
        llmstack, method, data = self._llmstack, "GET", b""
        if body is not None:
            method, data = "POST", json.dumps(body).encode()
        response, said = self._upstream.get(path, timeout_s, method, llmstack.JSON_LINE, body=data)
        return response.status, llmstack.parse_json_object(said)


class Reply(NamedTuple):
    """An answer to a chat."""

    status: int
    message: Dict[str, Any]                     # of the assistant
    error: str                                  # "" for a good one
    is_cut: bool                                # it ran into its limit

    @property
    def text(self) -> str:
        content = self.message.get("content")
        return content if isinstance(content, str) else ""


def first_of(value: Any) -> Dict[str, Any]:
    """The first of a list of objects, {} for anything else."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return value[0]
    return {}


def error_of(answer: Mapping[str, Any]) -> str:
    """What an answer that is an error says."""
    error = answer.get("error")
    if isinstance(error, dict):
        error = error.get("message")
    return " ".join(str(error or "it is no answer").split())


def chat(trial: Any, messages: Sequence[Mapping[str, Any]], **more: Any) -> Reply:
    """What a tier answers. Errors: OSError, ValueError."""
    body = {"messages": list(messages), "temperature": 0, "max_tokens": ANSWER_TOKENS, **more}
    status, answer = trial.ask("/v1/chat/completions", body, PATIENCE_S)
    choice = first_of(answer.get("choices"))
    message = choice.get("message")
    error = "" if status == 200 else error_of(answer)
    return Reply(status, message if isinstance(message, dict) else {}, error,
                 choice.get("finish_reason") == "length")


def user(content: Any) -> Dict[str, Any]:
    return {"role": "user", "content": content}


# ---- what it can do


def template_error(trial: Any) -> str:
    """Why a tier's template makes no prompt of a plain chat, "" where it does."""
    messages = [user("Hello"), {"role": "assistant", "content": "Hello."}, user("Thanks")]
    status, answer = trial.ask("/apply-template", {"messages": messages})
    if status in (200, 404):                    # 404: a server that has no such path
        return ""
    return error_of(answer)


def called_city(call: Mapping[str, Any]) -> str:
    """The city that a call asks the weather of, "" for any other call."""
    function = call.get("function")
    if not isinstance(function, dict) or function.get("name") != "get_weather":
        return ""
    try:
        city = json.loads(str(function.get("arguments"))).get("city")
    except (ValueError, AttributeError):
        return ""
    return city if isinstance(city, str) else ""


def probe_tools(trial: Any) -> Verdict:
    """A call of its own accord, and an answer to what the tool says.

    Errors: OSError, ValueError.
    """
    asked = [user("What is the weather in Paris now? Use the tool get_weather.")]
    reply = chat(trial, asked, tools=[WEATHER])
    if reply.error:
        return Verdict(False, reply.error)
    call = first_of(reply.message.get("tool_calls"))
    if not call and reply.is_cut:
        return Verdict(None, "its answer is cut off before a call")
    if not call:
        return Verdict(False, "it answers without a call")
    if not called_city(call):
        return Verdict(False, "its call is not one that was offered")
    said = {"role": "tool", "tool_call_id": call.get("id") or "", "content": '{"celsius": 17}'}
    back = {"role": "assistant", "content": reply.text, "tool_calls": [call]}
    reply = chat(trial, [*asked, back, said], tools=[WEATHER])
    if reply.error:
        return Verdict(False, f"the tool's answer is refused: {reply.error}")
    return Verdict(True, "" if "17" in reply.text else "its answer leaves out what the tool said")


def probe_json(trial: Any) -> Verdict:
    """An answer by a schema. Errors: OSError, ValueError."""
    wanted = {"type": "json_schema",
              "json_schema": {"name": "answer", "strict": True, "schema": COLOUR_SCHEMA}}
    asked = [user("What colour is blood, and is it bright? Answer in JSON.")]
    reply = chat(trial, asked, response_format=wanted)
    if reply.error:
        return Verdict(False, reply.error)
    try:
        value = json.loads(reply.text)
        holds = value["colour"] in COLOURS and isinstance(value["bright"], bool)
    except (ValueError, LookupError, TypeError):
        holds = False
    if holds:
        return Verdict(True)
    if reply.is_cut:
        return Verdict(None, "its answer is cut off")
    return Verdict(False, "its answer does not keep to the schema")


def probe_reasoning(trial: Any) -> Verdict:
    """Whether it thinks before it answers. Errors: OSError, ValueError."""
    asked = [user("What is 17 + 25? Answer with the number only.")]
    reply = chat(trial, asked, max_tokens=FIRST_TOKENS)
    if reply.error:
        return Verdict(None, reply.error)
    if reply.message.get("reasoning_content"):
        return Verdict(True)
    if "<think>" in reply.text:
        return Verdict(True, "its thinking stands in the answer: see reasoning_format")
    return Verdict(False)


def in_time(trial: Any, test: Callable[[Any], Verdict]) -> Verdict:
    """What a test finds; nothing where its answer takes too long. Errors: OSError, ValueError."""
    try:
        return test(trial)
    except OSError as exc:
        if trial.process.poll() is not None:    # its server has died
            raise
        return Verdict(None, str(exc))


def red_png(side: int = 64) -> bytes:
    """A red square."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    rows = (b"\0" + b"\xff\0\0" * side) * side
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def probe_pictures(trial: Any) -> Verdict:
    """Whether it takes a picture. Errors: OSError, ValueError."""
    url = "data:image/png;base64," + base64.b64encode(red_png()).decode()
    content = [{"type": "text", "text": "What colour is this? One word."},
               {"type": "image_url", "image_url": {"url": url}}]
    reply = chat(trial, [user(content)])
    if reply.error:
        return Verdict(False, reply.error)
    if "red" in reply.text.lower():
        return Verdict(True)
    return Verdict(True, "it does not say that a red square is red")


# ---- how fast it is


def prompt_tokens(trial: Any, count: int) -> List[int]:
    """So many tokens of words without an order: nothing that repeats can be drafted.

    Errors: OSError, ValueError.
    """
    words, dice = WORDS.split(), random.Random(count)
    text = " ".join(dice.choice(words) for _ in range(count))
    _, answer = trial.ask("/tokenize", {"content": text}, PATIENCE_S)
    tokens = answer.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError("it does not tokenize")
    while len(tokens) < count:
        tokens += tokens
    return list(tokens[:count])


def speed_sizes(context: int) -> List[int]:
    """The prompts to read: those of SPEED_TOKENS that fit, and what fits of the first that not."""
    room = context - 2 * WRITTEN_TOKENS
    sizes = [size for size in SPEED_TOKENS if size <= room]
    if len(sizes) < len(SPEED_TOKENS) and room >= 2 * WRITTEN_TOKENS:
        sizes.append(room)
    return sizes


def measure_speed(trial: Any, size: int) -> Dict[str, Any]:
    """Tokens a second of a prompt of `size` and of what follows it. Errors: OSError, ValueError."""
    body = {"prompt": prompt_tokens(trial, size), "n_predict": WRITTEN_TOKENS, "ignore_eos": True,
            "cache_prompt": False, "temperature": 0}
    status, answer = trial.ask("/completion", body, PATIENCE_S)
    timings = answer.get("timings")
    if status != 200 or not isinstance(timings, dict):
        raise ValueError(error_of(answer))
    row = {"prompt_tokens": size,
           "read_per_s": round(float(timings["prompt_per_second"]), 1),
           "written_per_s": round(float(timings["predicted_per_second"]), 1)}
    if timings.get("draft_n"):
        row["accepted"] = round(timings["draft_n_accepted"] / timings["draft_n"], 3)
    return row


def measure_speeds(trial: Any, context: int) -> Tuple[List[Dict[str, Any]], str]:
    """(a row for each size, what to say of those left out). Errors: OSError, ValueError."""
    rows: List[Dict[str, Any]] = []
    sizes = speed_sizes(context)
    for size in sizes:
        if rows:
            needed_s = size / max(rows[-1]["read_per_s"], 0.01)
            if needed_s > PATIENCE_S / 2:
                return rows, f"{size:,} tokens would take {needed_s / 60:,.0f} minutes or more"
        rows.append(measure_speed(trial, size))
    missing = [f"{size:,}" for size in SPEED_TOKENS if size not in sizes]
    if missing:
        return rows, f"{' and '.join(missing)} tokens and an answer are more than it holds"
    return rows, ""


# ---- what it takes


def held_bytes(pid: int, llmstack: Any) -> int:
    """The most memory that a process has held, 0 where the system does not say."""
    for line in llmstack.read_text(f"/proc/{pid}/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        said = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True,
                              check=False).stdout.strip()
    except OSError:
        return 0
    return int(said) * 1024 if said.isdigit() else 0


def cards_gb(llmstack: Any) -> float:
    return float(sum(card.used_gb for card in llmstack.nvidia_cards()))


def keep_probe(data: str, identity: str, row: Mapping[str, Any], llmstack: Any) -> None:
    """Keep what was found of a tier. Errors: UserError."""
    path = llmstack.probes_file(data)
    rows = llmstack.parse_json_object(llmstack.read_text(path))
    kept = llmstack.newest_rows(rows, identity, row)
    llmstack.write_atomic(path, json.dumps(kept, indent=1))


def running_gb(places: Any, llmstack: Any) -> float:
    """What the models that are loaded take by the daemon's own count; 0 where there is none."""
    record = llmstack.running_record(places)
    if record is None:
        return 0.0
    now = llmstack.asked_json(llmstack.router_upstream(record, places.env), "/llmstack/snapshot")
    resident = llmstack.dict_of(now.get("memory")).get("resident")
    return resident / 1e9 if isinstance(resident, (int, float)) else 0.0


class Prober:
    """Measures the tiers of a configuration, one after the other."""

    def __init__(self, places: Any, config: Any, llmstack: Any) -> None:
        self.places, self.config = places, config
        self.llmstack = llmstack
        found = llmstack.load_extra("fit").running_machine(places, config, llmstack)
        self.machine = found or llmstack.this_machine(config)

    def check_room(self, fit: Any) -> None:
        """Errors: UserError where the running stack holds the memory that this takes."""
        taken_gb = running_gb(self.places, self.llmstack)
        if taken_gb and taken_gb + fit.need_gb > self.machine.budget_gb:
            raise self.llmstack.UserError(
                f"{fit.name} needs {fit.need_gb:.1f} GB, and the running stack holds"
                f" {taken_gb:.1f} of {self.machine.budget_gb:.1f}", "`llmstack stop` first")

    def probe(self, tier: Any) -> Dict[str, Any]:
        """What there is to say of a tier; kept. Errors: UserError."""
        llmstack = self.llmstack
        alone = self.config._replace(tiers=(tier,))
        fit = llmstack.measure_tiers(alone, self.machine, os.environ)[0]
        self.check_room(fit)
        least = tier._replace(cache_ram_mib=llmstack.LEAST_CACHE_MIB, ctx_checkpoints=1)
        row: Dict[str, Any] = {"tier": tier.name, "when": round(time.time())}
        before_gb = cards_gb(llmstack)
        trial = Trial(least, self.config, self.places, os.environ, llmstack)
        try:
            with trial:
                self._ask(trial, tier, row)
                self._learn(trial, tier, row.get("speeds", ()))
                held_gb = held_bytes(trial.process.pid, llmstack) / 1e9
                card_gb = max(cards_gb(llmstack) - before_gb, 0.0)
        except (OSError, ValueError, LookupError, TypeError) as exc:
            raise llmstack.UserError(f"{tier.name} loads but does not answer: {exc}",
                                     f"see {trial.log}") from None
        except llmstack.UserError as exc:
            row["template_error"] = refused_template(str(exc))
            if not row["template_error"]:
                raise
            self._keep(tier, row)
            return row
        row["memory"] = {"host_gb": round(held_gb, 3), "card_gb": round(card_gb, 3),
                         "fit_gb": round(fit.need_gb, 3), "fit_host_gb": round(fit.host_gb, 3)}
        self._keep(tier, row)
        return row

    def _learn(self, trial: Any, tier: Any, speeds: Sequence[Mapping[str, Any]]) -> None:
        """Teach the speeds that routing counts with, as a load and answers teach them.

        Errors: OSError, UserError.
        """
        llmstack = self.llmstack
        weights = llmstack.cached_model(llmstack.weights_for(tier), os.environ)
        env = llmstack.without_credentials(os.environ)
        identity = llmstack.parking_identity(trial.command, weights, env)
        known = llmstack.Speeds(self.places.data)
        known.note_load(identity, tier.name, trial.loaded_s, trial.process.pid, weights)
        for speed in speeds:
            counts = llmstack.Counts(speed["prompt_tokens"], 0, WRITTEN_TOKENS,
                                     speed["read_per_s"], speed["written_per_s"])
            known.note_answer(identity, tier.name, counts)
        known.keep()

    def _keep(self, tier: Any, row: Dict[str, Any]) -> None:
        data, llmstack = self.places.data, self.llmstack
        name = llmstack.probe_identity(tier, self.config, os.environ, data)
        if name:
            keep_probe(data, name, row, llmstack)

    def _ask(self, trial: Any, tier: Any, row: Dict[str, Any]) -> None:
        """Put into `row` what a loaded tier says. Errors: OSError, ValueError."""
        _, props = trial.ask("/props")
        settings = props.get("default_generation_settings")
        context = settings.get("n_ctx") if isinstance(settings, dict) else None
        row["build"] = str(props.get("build_info") or "")
        row["loaded_s"] = round(trial.loaded_s, 2)
        row["context_tokens"] = context if isinstance(context, int) else tier.ctx_size
        row["template_error"] = ""
        if tier.role not in self.llmstack.PATH_ROLES.values():
            row["template_error"] = template_error(trial)
            tests = [("tool_call", probe_tools), ("json_schema", probe_json),
                     ("reasoning", probe_reasoning)]
            if tier.has_projector:
                tests.append(("pictures", probe_pictures))
            for key, test in tests:
                row[key], row[f"{key}_note"] = in_time(trial, test)
            row["speeds"], row["speeds_note"] = measure_speeds(trial, row["context_tokens"])


def refused_template(said: str) -> str:
    """What a server that did not load says of its template, "" where that was not the reason."""
    lines = [line for line in said.splitlines() if "template" in line]
    causes = [line for line in lines if "error:" in line and "supplied" not in line]
    found = (causes or lines or [""])[0]
    return found.rpartition("common_chat_templates_init: ")[2].strip()


# ---- what is shown

WORDS_OF = {True: "yes", False: "no", None: "not to be told"}
LABELS = {"tool_call": "tools", "json_schema": "JSON schema", "reasoning": "thinking",
          "pictures": "pictures"}


def speed_words(row: Mapping[str, Any]) -> str:
    words = (f"reads {row['prompt_tokens']:,} tokens at {row['read_per_s']:,.0f} a second, then"
             f" writes {row['written_per_s']:,.1f}")
    if "accepted" in row:
        words += f" ({row['accepted']:.0%} of what was drafted is taken)"
    return words


def memory_words(memory: Mapping[str, float]) -> str:
    words = f"{memory['host_gb']:.2f} GB held at most, `fit` says {memory['fit_gb']:.2f}"
    if memory["card_gb"]:
        words = (f"{memory['card_gb']:.2f} GB of the card, `fit` says {memory['fit_gb']:.2f};"
                 f" {memory['host_gb']:.2f} of the host, `fit` says {memory['fit_host_gb']:.2f}")
    return words


def show(row: Mapping[str, Any], llmstack: Any) -> None:
    lines = []
    if row["template_error"]:
        lines.append(("template", f"does not compile: {row['template_error']}"))
    for key, label in LABELS.items():
        if key in row:
            note = f": {row[key + '_note']}" if row[f"{key}_note"] else ""
            lines.append((label, WORDS_OF[row[key]] + note))
    lines += [("speed", speed_words(speed)) for speed in row.get("speeds", ())]
    if row.get("speeds_note"):
        lines.append(("speed", row["speeds_note"]))
    if "memory" in row:
        lines.append(("memory", memory_words(row["memory"])))
    head = row["tier"]
    if "loaded_s" in row:
        head += f": {row['build']}, loaded in {row['loaded_s']:.1f} s, "
        head += f"{row['context_tokens']:,} tokens for one request"
    llmstack.say(llmstack.visible(head))
    for label, words in lines:
        llmstack.say(llmstack.visible(f"  {label:<12}{words}"))


# ---- the command


def chosen(names: Sequence[str], config: Any, llmstack: Any) -> List[Any]:
    """The tiers to measure. Errors: UserError."""
    local = {tier.name: tier for tier in llmstack.local_tiers(config)}
    for name in names:
        if name not in local:
            known = ", ".join(local) or "none"
            raise llmstack.UserError(f"there is no local tier {llmstack.unknown_word(name, local)}",
                                     f"one of: {known}", 2)
    found = []
    for tier in [local[name] for name in dict.fromkeys(names)] or local.values():
        if llmstack.cached_model(llmstack.weights_for(tier), os.environ):
            found.append(tier)
        elif names:
            raise llmstack.UserError(f"the model of {tier.name} is not here",
                                     llmstack.fetching_words(tier))
    if not found:
        raise llmstack.UserError("no model of this project is here", "`llmstack download`")
    return found


def tell_router(places: Any, llmstack: Any) -> None:
    """Have a running router, and then opencode, learn what was found. Errors: UserError."""
    record = llmstack.running_record(places)
    if record is not None:
        llmstack.ask_reload(record, os.environ)
    if os.path.exists(places.in_state("opencode.json")):
        llmstack.say("`llmstack install` writes what was found into opencode.json.")


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def measure(tiers: Sequence[Any], prober: Prober, as_json: bool) -> Tuple[List[Any], List[str]]:
    """(what was found, the tiers that failed), said as it comes.

    A signal that would end us ends the server first, which is in a session of its own.
    """
    llmstack = prober.llmstack
    rows, failed = [], []
    signals = [getattr(signal, name, signal.SIGTERM) for name in ("SIGTERM", "SIGHUP")]
    before = [(number, signal.signal(number, interrupted)) for number in dict.fromkeys(signals)]
    try:
        for tier in tiers:
            try:
                rows.append(prober.probe(tier))
            except llmstack.UserError as exc:
                failed.append(tier.name)
                llmstack.warn(f"{exc}; {exc.hint}")
                continue
            if not as_json:
                show(rows[-1], llmstack)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    return rows, failed


def main(argv: Sequence[str], llmstack: Any) -> Any:
    parser = llmstack.extra_parser("probe", __doc__)
    parser.usage = "llmstack probe [--next] [--json] [TIER ...]"
    parser.add_argument("tiers", metavar="TIER", nargs="*", help="these only")
    parser.add_argument("--next", action="store_true", help="the queued upgrades (hf_file_next)")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(list(argv))
    places = llmstack.find_places(os.environ)
    llmstack.refuse_external(places)
    llmstack.check_run_trust(places)
    config = llmstack.load_config(places, llmstack.warn)
    channel = "next" if args.next else llmstack.running_channel(places)
    config = llmstack.true_config(config.on_channel(channel), places)
    prober = Prober(places, config, llmstack)
    tiers = chosen(args.tiers, config, llmstack)
    rows, failed = measure(tiers, prober, args.json)
    if rows and not args.json:
        tell_router(places, llmstack)
    code = int(bool(failed) or any(row["template_error"] for row in rows))
    # People have read each row as it came.
    return llmstack.Result(rows, (), code, args.json)
