"""Talk to a tier: one answer, or a chat.

TIER is a tier of models.ini, or `auto` (the default), which decides for each message. Without TEXT
a chat begins: Ctrl-C ends an answer, /quit or Ctrl-D the chat, /help lists what else there is.
A TEXT of - is standard input, which is also read where it is no terminal. On a terminal what a
model thinks is shown dimmed; elsewhere, and with -q, nothing but the answer is written.

examples:
  llmstack run "Why is the sky blue?"
  git diff | llmstack run code-smart "Review this:" -
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

CHAT_PATH = "/v1/chat/completions"
SILENCE_S = 600                                 # the router speaks every few seconds while it waits
MAX_FILE_BYTES = 4 << 20                        # of /file: more than any context holds
CHAT_COMMANDS = """\
/tier [NAME]  whom to ask from now on; auto decides anew for each message
/why          why the last answer came from the tier it came from
/file PATH    put a file in front of the next message
/save [PATH]  write the conversation as Markdown
/new          begin anew
/quit         leave; Ctrl-D does, too
A line of three double quotes begins and ends a message of many lines."""
QUOTES = '\"\"\"'


def dict_of(value: Any, key: Any) -> Dict[str, Any]:
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def delta_of(event: Dict[str, Any]) -> Tuple[str, str]:
    """(text of the answer, text of what the model thinks) that an event brings."""
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices:
        return "", ""
    delta = dict_of(choices[0], "delta")
    texts = delta.get("content"), delta.get("reasoning_content") or delta.get("reasoning")
    said, thought = (text if isinstance(text, str) else "" for text in texts)
    return said, thought


def counts_of(event: Dict[str, Any]) -> Dict[str, Any]:
    """Tokens, time and model that an event tells: usage of all, timings of llama.cpp."""
    usage, timings = dict_of(event, "usage"), dict_of(event, "timings")
    ms = timings.get("predicted_ms")
    found = {"prompt": usage.get("prompt_tokens"), "output": usage.get("completion_tokens"),
             "cached": dict_of(usage, "prompt_tokens_details").get("cached_tokens"),
             "writing_s": ms / 1000 if isinstance(ms, (int, float)) else None}
    if timings:
        found["cached"] = timings.get("cache_n")
    counts: Dict[str, Any] = {k: n for k, n in found.items() if isinstance(n, (int, float))}
    model = event.get("model")
    if isinstance(model, str) and model != "llmstack":      # which speaks while a model loads
        counts["model"] = model
    return counts


def refused(said: str, llmstack: Any) -> Any:
    """The UserError for what an answer says of a failure, without a server's log."""
    first = said.partition("\n")[0]
    name = first.partition(":")[0]
    if "while loading" in first:
        said = f"{name} failed to load: {llmstack.load_failure_words(said)}"
        return llmstack.UserError(said, f"see `llmstack logs {name}`")
    return llmstack.UserError(said, "see `llmstack status`, or the router's log")


def events_of(response: http.client.HTTPResponse, llmstack: Any) -> Iterator[Dict[str, Any]]:
    """The JSON objects of an event stream. Errors: UserError for an error event, or no end."""
    while True:
        try:
            line = response.readline()
        except (OSError, http.client.HTTPException):
            line = b""
        if not line:
            raise llmstack.UserError("the answer broke off", "see the router's log")
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = llmstack.parse_json_object(data)
        if event.get("error"):
            raise refused(llmstack.said_error(data.decode("utf-8", "replace")), llmstack)
        yield event


class Answer(NamedTuple):
    """What came of a question. Times in seconds."""

    text: str
    tier: str
    reason: str                                 # why that tier, "" where it was named
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    writing_s: float                            # from the first token to the last
    is_whole: bool                              # False where Ctrl-C has ended it


class Session:
    """A conversation with the router, and how it is shown."""

    def __init__(self, llmstack: Any, upstream: Any, config: Any, tier: str) -> None:
        self.llmstack, self.config, self.tier = llmstack, config, tier
        self.messages: List[Dict[str, str]] = []
        self.more: Dict[str, Any] = {}          # members of the request's body
        self.quiet = False
        self.last_reason = ""
        self._upstream = upstream
        self._affinity = os.urandom(8).hex()    # by which the router knows the conversation
        self._is_dim = False

    def ask(self, text: str) -> Answer:
        """Send a message, show the answer as it comes, and keep both. Errors: UserError."""
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self._answer()
        except BaseException:
            self.messages.pop()                 # it can be sent again
            raise
        self.messages.append({"role": "assistant", "content": answer.text})
        self.last_reason = answer.reason
        if not self.quiet:
            self._say_counts(answer)
        return answer

    def _answer(self) -> Answer:
        response = None
        texts: List[str] = []
        usage: Dict[str, Any] = {}
        began_s, is_whole = 0.0, True
        try:
            response = self._send()
            for event in events_of(response, self.llmstack):
                usage.update(counts_of(event))
                said, thought = delta_of(event)
                if said or thought:
                    began_s = began_s or time.monotonic()
                texts.append(said)              # first: what was shown is kept, come Ctrl-C
                self._show(thought, dim=True)
                self._show(said)
        except KeyboardInterrupt:
            if response is None:
                raise
            is_whole = False
        finally:
            if response is not None:
                response.close()
                self._show("\n")
        # A stream that had to wait began before its tier was known to answer.
        tier = response.getheader("X-LLMStack-Model") or usage.get("model") or self.tier
        writing_s = usage.get("writing_s") or time.monotonic() - began_s
        return Answer("".join(texts), tier, response.getheader("X-LLMStack-Reason") or "",
                      usage.get("prompt", 0), usage.get("cached", 0), usage.get("output", 0),
                      writing_s, is_whole)

    def _send(self) -> http.client.HTTPResponse:
        """The head of the answer, its events to be read. Errors: UserError."""
        upstream, llmstack = self._upstream, self.llmstack
        body = {"model": self.tier, "messages": self.messages, "stream": True,
                "stream_options": {"include_usage": True}, **self.more}
        headers = {"Content-Type": "application/json", "Host": upstream.authority.decode(),
                   "X-Session-Affinity": self._affinity, "Connection": "close"}
        if upstream.key:
            headers["Authorization"] = f"Bearer {upstream.key}"
        connection = http.client.HTTPConnection(upstream.host, upstream.port)
        try:
            connection.sock = upstream.connect()
            connection.sock.settimeout(SILENCE_S)
            data = json.dumps(body).encode("utf-8", "replace")
            connection.request("POST", upstream.prefix + CHAT_PATH, data, headers)
            response = connection.getresponse()
            refusal = response.read(1 << 20) if response.status != 200 else b""
        except (OSError, http.client.HTTPException) as exc:
            connection.close()
            why = llmstack.visible(str(exc).strip())
            raise llmstack.UserError(f"no answer from {upstream.url}: {why}",
                                     "see `llmstack status`") from None
        if response.status != 200:
            response.close()
            said = llmstack.said_error(refusal.decode("utf-8", "replace"))
            raise refused(said or f"the router answers {response.status}", llmstack)
        return response

    def _show(self, text: str, dim: bool = False) -> None:
        """A piece of an answer; on a terminal without what could steer it, elsewhere as it is."""
        if not text:
            return
        llmstack = self.llmstack
        if not sys.stdout.isatty():
            if not dim:
                llmstack.write_out(text)
            return
        if dim and self.quiet:
            return
        shown = llmstack.visible_lines(text)
        if dim != self._is_dim and llmstack.may_paint():
            shown = ("\x1b[2m" if dim else "\x1b[0m\n\n") + shown
            self._is_dim = dim
        llmstack.write_out(shown)

    def _say_counts(self, answer: Answer) -> None:
        words = [answer.tier]
        if answer.prompt_tokens:
            words.append(f"{answer.prompt_tokens:,} tokens ({answer.cached_tokens:,} cached)")
        if answer.output_tokens:
            speed = answer.output_tokens / max(answer.writing_s, 0.001)
            digits = 1 if speed < 10 else 0
            words.append(f"{answer.output_tokens:,} written, {speed:,.{digits}f} a second")
        if not answer.is_whole:
            words.append("ended by you")
        line = self.llmstack.visible(", ".join(words))
        if sys.stderr.isatty() and self.llmstack.may_paint():
            line = f"\x1b[2m{line}\x1b[0m"
        sys.stderr.write(line + "\n")


def tier_names(config: Any) -> List[str]:
    return ["auto", *(tier.name for tier in config.offered)]


def is_tier(word: str, config: Any) -> bool:
    return word == "auto" or config.by_name(word) is not None


# ---- the chat


def load_line_editor() -> None:
    """Cursor keys and history at the prompt, where Python has them."""
    try:
        import readline  # noqa: F401  # input() uses it
    except ImportError:
        pass


def read_message() -> str:
    """A line, or all lines between two of three quotes. Errors: EOFError, KeyboardInterrupt."""
    line = input("> ")
    if line.strip() != QUOTES:
        return line
    lines: List[str] = []
    while True:
        line = input(". ")
        if line.strip() == QUOTES:
            return "\n".join(lines)
        lines.append(line)


def take_tier(session: Session, name: str) -> None:
    llmstack, names = session.llmstack, tier_names(session.config)
    if name and not is_tier(name, session.config):
        raise llmstack.UserError(f"there is no tier {llmstack.unknown_word(name, names)}",
                                 "one of " + ", ".join(names))
    session.tier = name or session.tier
    llmstack.say(session.tier if name else f"{session.tier}, of {', '.join(names)}")


def read_file(path: str, llmstack: Any) -> str:
    """A file as a block of Markdown below its name. Errors: UserError."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as exc:
        raise llmstack.UserError(f"cannot read {path}: {exc.strerror}", "name a file") from None
    except UnicodeDecodeError:
        raise llmstack.UserError(f"{path} is not text", "name a text file") from None
    if len(data) > MAX_FILE_BYTES:
        raise llmstack.UserError(f"{path} has more than 4 MiB", "name a smaller one")
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{path}:\n{fence}\n{text}\n{fence}"


def render_chat(messages: Sequence[Dict[str, str]]) -> str:
    parts = [f"## {message['role']}\n\n{message['content'].strip()}\n" for message in messages]
    return "\n".join(parts)


def obey(session: Session, line: str, attached: List[str]) -> None:
    """Do what a line that begins with / says. Errors: UserError."""
    llmstack = session.llmstack
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name == "/tier":
        take_tier(session, rest)
    elif name == "/why":
        llmstack.say(session.last_reason or "the router has not said: there was no answer yet, its"
                     " tier was named, or it had to wait")
    elif name == "/file":
        attached.append(read_file(rest, llmstack))
        llmstack.say("It goes in front of your next message.")
    elif name == "/save":
        path = os.path.expanduser(rest) or time.strftime("llmstack-%Y%m%d-%H%M%S.md")
        if os.path.exists(path):
            raise llmstack.UserError(f"{path} is there already", "name another file")
        llmstack.write_atomic(os.path.abspath(path), render_chat(session.messages), 0o600)
        llmstack.say(f"Wrote {path}")
    elif name == "/new":
        session.messages = [m for m in session.messages if m["role"] == "system"]
        attached.clear()
    else:
        llmstack.say(CHAT_COMMANDS)


def chat(session: Session) -> int:
    """Read messages and commands until the user leaves."""
    load_line_editor()
    llmstack = session.llmstack
    llmstack.say(f"A chat with {session.tier}. /help says what there is, Ctrl-D ends it.")
    attached: List[str] = []
    while True:
        try:
            line = read_message()
        except EOFError:
            llmstack.say()
            return 0
        except KeyboardInterrupt:
            llmstack.say("\n/quit or Ctrl-D leaves")
            continue
        if line.strip() == "/quit":
            return 0
        try:
            if line.startswith("/"):
                obey(session, line, attached)
            elif line.strip():
                session.ask("\n\n".join([*attached, line]))
                attached.clear()
        except llmstack.UserError as exc:
            llmstack.say(f"{exc}" + (f"; {exc.hint}" if exc.hint else ""))
        except KeyboardInterrupt:
            llmstack.say()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "llmstack run [-q] [--system TEXT] [--max-tokens N] [TIER] [TEXT | -]"
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--demo", action="store_true", help="the demo's")
    parser.add_argument("-q", "--quiet", action="store_true", help="the answer alone")
    parser.add_argument("--system", metavar="TEXT", default="", help="a system message")
    parser.add_argument("--max-tokens", metavar="N", type=int, help="of an answer, at most")


def read_input(llmstack: Any) -> str:
    text = sys.stdin.read()
    if not text.strip():
        raise llmstack.UserError("there is nothing on standard input", "give a text", 2)
    return text


def chosen(words: Sequence[str], config: Any, llmstack: Any) -> Tuple[str, str]:
    """(tier, text) of a command line; no text asks for a chat. Errors: UserError."""
    rest = list(words)
    tier = "auto"
    if rest and is_tier(rest[0], config):
        tier = rest.pop(0)
    elif len([word for word in rest if word != "-"]) > 1:
        unknown = llmstack.unknown_word(rest[0], tier_names(config))
        raise llmstack.UserError(f"there is no tier {unknown}",
                                 "one of " + ", ".join(tier_names(config))
                                 + "; put a text of many words in quotes", 2)
    parts = [read_input(llmstack) if word == "-" else word for word in rest]
    return tier, "\n\n".join(parts)


def main(argv: Sequence[str], llmstack: Any) -> int:
    parser = llmstack.extra_parser("run", __doc__)
    add_options(parser)
    args = parser.parse_intermixed_args(list(argv))
    places = llmstack.find_places(os.environ, args.demo)
    upstream, config = llmstack.running_router(places)
    tier, text = chosen(args.words, config, llmstack)
    if not text and not sys.stdin.isatty():
        text = read_input(llmstack)
    session = Session(llmstack, upstream, config, tier)
    session.quiet = args.quiet
    if args.system:
        session.messages.append({"role": "system", "content": args.system})
    if args.max_tokens:
        session.more["max_tokens"] = args.max_tokens
    if text:
        return 0 if session.ask(text).is_whole else 130
    return chat(session)
