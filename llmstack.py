#!/usr/bin/env python3
"""llmstack: one file that turns a computer into a multi-tier local LLM stack.

    client (opencode, curl, Cursor, ...)
        |  OpenAI-compatible HTTP, model "auto" or a tier's name
        v
    router  127.0.0.1:10101   reads the body once, decides the tier, changes the model's bytes,
        |                     relays the answer as it comes
        v
    engine  127.0.0.1:10102   the embedded one, or our listener before llama-swap where that is
        |                     found: loads and unloads so that what is loaded fits in memory
        v
    llama-server  10001...    one process a loaded tier, on 127.0.0.1

Router and engine are one process, the daemon (`_daemon`), which owns all that it starts. A tier
with a base_url is no model of the engine's: the router asks that host itself. LiteLLM's proxy, for
the other hosted tiers, is a child of the engine.

A request crosses this file in this order: Server (accepts; a thread a connection) -> Client (reads
head and body) -> RouterApp.answer (who may ask) -> RouterApp._ask_ladder, which has all the rest:
read_facts -> decide -> ask_lease (waits until a backend is ready, and tells a waiting stream so) ->
relay (pooled upstream connection, bytes as they come) -> Descent (the next tier, where this one has
failed before its first byte) -> Recorder.

`start` is _bring_up: offer_trust -> planned_config -> Plan (host, port, channel, kind of engine) ->
check_plan -> seed_project -> start_stack (spawns the daemon, waits until it answers) ->
rewire_project -> open_shell. The daemon is _cmd_daemon -> _serve_plan (engine, router, two
servers). `restart` stops the old daemon once all else is checked.

Words, each with one meaning:
    tier        a [section] of models.ini: a name that clients ask for, with its model and context
    role        what a tier is for (fast, agent, ultra, plan, embed ...); the ladder goes by roles
    ladder      the auto-routed tiers, best first; a rung is the rule that chose one of them
    channel     current or next: which of a tier's two models runs
    backend     what serves a tier: gguf (the engine), litellm (its proxy), openai (a direct host)
    upstream    an address that requests are relayed to; a lease is a request's place there
    snapshot    a configuration with its routes, which a reload replaces as a whole
    park        to save what a model's slots hold before it stops; restored after its next load
    marker      default-channel: the channel that a project is pinned to, or another's router
    trust       a project's files take effect once their digests stand in trust.json

Map of the file, bottom-up; each section is built from those above it:
    CONSTANTS            numbers with their units and sources
    ERRORS               UserError and its kin; only main() prints them
    VALUES               the frozen records everything else passes around
    PURE: LADDER         facts of a request -> Decision; where the model's name stands in a body
    PURE: MODELS.INI     text -> Config, every problem with its line
    PURE: GENERATORS     Config -> llama-server flags, residency sets, llama-swap.yaml, /v1/models
    PURE: MEMORY         a GGUF's header -> the memory it takes once loaded; what fits together
    PURE: PROFILES       the tiers for other memory sizes, as text of a models.ini
    PURE: LITELLM        Config -> entries of litellm_config.yaml; which credentials a tier lacks
    PURE: OPENCODE       Config -> opencode.json, and the notes for its agents
    PURE: HTTP           request and response heads, chunk framing; no sockets
    PURE: ANSWERS        what errors and counts of an answer say; which conversation it belongs to
    PURE: SHELL          the hooks of bash, zsh, fish and PowerShell, and quoting for them
    PURE: DOWNLOADS      what to fetch for which tier
    SYSTEM EDGE          directories, atomic writes, memory, logs, what differs between platforms
    PROJECTS             a project's configuration, its channel, and whether it is trusted
    PROCESSES            identity, records, ports, stopping what is ours
    PROGRAMS             finding programs; private environments with packages from PyPI
    RELAY                sockets: client, upstream pool, the relay itself, the threaded server
    BACKENDS             what can answer a tier, and how a request waits for it
    RECORD               logs/decisions.jsonl, a line a request
    EVENTS               what those who look on are told: the page, its stream, /metrics
    OLLAMA               its API, turned into OpenAI's and back
    ROUTER               the application on 10101
    LLAMA-SERVER         which one, which flags it takes
    FIT                  the hub and its cache; what each tier takes; trials, and what they found
    LITELLM              which one, its environment, its configuration read by its own parser
    PARKING              what a model's slots hold, saved before it stops, restored after its load
    ENGINE               llama-server processes within the memory there is, and their API on 10102
    LLAMA-SWAP           llama-swap behind a listener of ours on 10102
    STACK                bringing the daemon up and down, and what is known of it from outside
    INSTALL              what a project is given for opencode; the router of another machine
    DOWNLOADS            the queue of models from the hub, and its worker
    SHELL                the shell of `start`, and the hooks' answers
    STATUS               what runs, as people read it
    DAEMON               engine, router and their servers put together, until a signal
    COMMANDS             what each command does, the table of them, and main()

Files, below the project's .llmstack/. The user's: models.ini, litellm_config.yaml. What is written
for opencode and for shells: opencode.json, AGENTS.md, default-channel, llmstack.bashrc, zdotdir/.
Of what runs: router.pid (the daemon's), active-channel, llama-swap.yaml, download.pid,
downloads.json, downloads.lock. In logs/: router.log, engine.log, llama-swap.log, TIER.log,
litellm_proxy.log, download.log, dl-TIER-current.log, dl-TIER-next.log, decisions.jsonl.
Below the data directory ($LLMSTACK_DATA_DIR, else $XDG_DATA_HOME/llmstack): bin/, llama-cpp/, hub/
and litellm/ (private environments), demo/, parked/ (conversations), lock, trust.json, owner.json
(whose daemon runs), and what is not to be found out twice: flags.json, contexts.json, speeds.json,
probes.json, drafting.json, litellm.json. The extras keep connect.json and proven.json there. In the
home directory: .SHELL_llmstack_hook. Models lie in the hub's cache, see hub_cache_dir().
Environment read: LLMSTACK_{WORK_DIR,MODELS_INI,DATA_DIR,BIN_DIR,API_KEY,USE_NEXT,REMOTE_URL,SHELL,
HOOK,ACTIVE}, SHELL, SHLVL, PWD, ZDOTDIR, LLAMA_SERVER_BIN, LITELLM_BIN, the providers' credentials,
MODEL_ENDPOINT, HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE, LLAMA_CACHE, XDG_CACHE_HOME,
XDG_DATA_HOME, LOCALAPPDATA, NODE_EXTRA_CA_CERTS, LOG_LEVEL, NO_COLOR, TERM, COLORTERM.
Set in shells: OPENCODE_CONFIG, LLMSTACK_{WORK_DIR,CHANNEL,ROOT,REMOTE_URL,ACTIVE,HOOK}; in every
process that the stack starts: LLMSTACK_STACK, the mark by which it is known as ours.
Exit codes: 0 done, 1 failed, 2 usage or configuration, 130 interrupted.
"""

from __future__ import annotations

import bisect
import collections
import errno
import functools
import io
import itertools
import json
import os
import re
import select
import socket
import stat
import struct
import sys
import threading
import time
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Container,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    Mapping,
    Match,
    MutableMapping,
    NamedTuple,
    Optional,
    Pattern,
    Sequence,
    Set,
    Tuple,
    Union,
)

if TYPE_CHECKING:
    from typing import TextIO

# Everything heavier than the above is imported where it is used: `status` in a prompt or a script
# should not pay for the HTTP server, and the router should not hold argparse's memory for nothing.

# ==================================================================================================
# CONSTANTS
# ==================================================================================================

VERSION = "1.0.0"

ROUTER_HOST = "127.0.0.1"
ROUTER_PORT = 10101
ENGINE_PORT = 10102
LITELLM_PORT = 10103               # its admin UI is at /ui, its MCP gateway at /mcp
FIRST_SERVER_PORT = 10001          # llama-server processes count up from here

HIGH_FIDELITY_CEILING_TOKENS = 12_000
MID_FIDELITY_CEILING_TOKENS = 32_000
MULTI_TURN = 10                    # user turns
CHARS_PER_TOKEN = 4
PICTURE_TOKENS = 1_000
DEFAULT_RESERVE_TOKENS = 1_024     # output room when the request names none
TINY_TOKENS = 500                  # of a prompt that may go past a tier that is busy
WORTH_LEARNING_TOKENS = 1_000      # of a prompt, before its true count teaches anything

MAX_CONNECTIONS = 512
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 128
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_STATE_BYTES = 16 * 1024 * 1024  # of a file in .llmstack/
MAX_INI_BYTES = 256 * 1024          # of a models.ini; the bundled one has 10,000
MAX_INI_LINE = 8_192                # characters; a pattern may look at each of them twice
MAX_INI_SECTIONS = 1_000
MAX_SHOWN_PROBLEMS = 100            # and as many warnings
HEAD_TIMEOUT_S = 30
IDLE_CLIENT_S = 300                # a kept-alive client that asks nothing
SEND_TIMEOUT_S = 60                # a client that takes nothing of its answer
TAIL_BYTES = 4096                  # of an event stream, kept to see at its end whether it was whole
RETURN_MEMORY_S = 10               # a daemon gives back what malloc holds free; it takes some ms
# Older kept connections may have been dropped without a word on their way.
IDLE_UPSTREAM_S = 60
CONNECT_TIMEOUT_S = 10
# Names, connection and TLS handshake of a hosted tier's host, together.
HOST_CONNECT_S = 5
# An unreachable host is looked at again after so long, then twice as long, up to the second.
PROBE_S = 2
MAX_PROBE_S = 60
RECV_BYTES = 16_384                 # every stream holds such a buffer while it waits for bytes
# How long a silent upstream goes before its client is looked at again.
PATIENCE_MS = 50
ACCEPT_S = 1.0                     # between two looks whether a server is to end
LOOK_S = 0.1                       # and at least so often, however steadily an upstream trickles
MAX_INTERIM = 16                   # answers of 100 to 199 before the one that counts
# So much of a stream is held back to see whether it begins with an error.
FIRST_EVENT_BYTES = 65_536
FIRST_BYTE_S = 120                 # a hosted tier that is silent so long gives way to the next
BREAKER_S = 20                     # a tier that failed is left alone this long...
MAX_BREAKER_S = 300                # ...or as long as its Retry-After says, up to this

# It is llama-swap's healthCheckTimeout, too; 45 GB from a slow disk fit in it.
LOAD_TIMEOUT_S = 600
STOP_GRACE_S = 5                   # llama-server often hangs on TERM with a request in flight
PARK_GRACE_S = 20                  # for the daemon, to park conversations and end its own children
START_TIMEOUT_S = 90               # until a daemon answers; llama-swap is up within a second
WAITING_EVERY_S = 2.0              # between the first messages of a stream that waits
FAILED_LOAD_S = 15                 # a load that failed is not tried again at once
# After this long, newcomers queue behind the one waiting for memory.
FAIR_WAIT_S = 10
LOG_BYTES = 10 * 1024 * 1024
LOGS_KEPT = 3

# This xllamacpp on PyPI is llama.cpp b11549; it has wheels for Python 3.10 and newer.
LLAMA_CPP_PIN = "2026.10.11549"
# The newest on PyPI whose proxy installs; wheels for Python 3.10 and newer.
LITELLM_PIN = "1.108.7"

# Top to bottom; other roles are never auto-routed.
LADDER_ROLES = ("ultra", "agent", "fast")
TEXT_ROLES = ("embed", "rerank")   # they turn texts into numbers; no client talks with them
KNOWN_ROLES = (*LADDER_ROLES, "plan", "plan-uncensored", *TEXT_ROLES)
ROLE_ALIASES: Dict[str, Tuple[str, ...]] = {
    "fast": ("fast", "small", "autocomplete"),
    "agent": ("agent", "smart", "code", "coder"),
    "plan": ("planner", "chat", "glm"),
    "plan-uncensored": ("uncensored", "nofilter", "plan-nofilter", "heretic"),
}
# What clients ask for where nobody has told them a name, and what answers that: a tier, a role or
# auto. The first pattern that matches counts. They stand for an [ALIASES] that is not there.
DEFAULT_ALIASES: Tuple[Tuple[str, str], ...] = (
    ("claude-haiku-*", "fast"), ("gpt-*-mini", "fast"), ("gpt-*-nano", "fast"),
    ("claude-*", "auto"), ("gpt-*", "auto"), ("o[0-9]*", "auto"), ("gemini-*", "auto"),
    ("default", "auto"),
)
ROLE_TTL_S = {"fast": 0, "agent": 1800, "plan": 1200, "plan-uncensored": 1200}
# The last three name logs.
RESERVED_NAMES = frozenset({"auto", "litellm_proxy", "router", "engine", "llama-swap"})

# ==================================================================================================
# ERRORS
# ==================================================================================================


class UserError(Exception):
    """Something the user can mend: one line that says what and where, one that says what to do."""

    def __init__(self, message: str, hint: str = "", exit_code: int = 1) -> None:
        super().__init__(message)
        self.problems: Sequence[str] = (message,)
        self.hint = hint
        self.exit_code = exit_code


class ConfigError(UserError):
    """models.ini does not hold; `problems` are whole lines, `models.ini:LINE: what`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems), "mend the lines above, then run the command again", 2)
        self.problems = tuple(problems)


class HttpError(Exception):
    """A request we answer ourselves: `status` goes on the wire, the message into its error."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class ClientGone(Exception):  # noqa: N818
    """The client closed its connection; whatever runs for it upstream is to be cancelled."""


class UpstreamBroken(Exception):  # noqa: N818
    """The upstream closed or garbled its connection before its answer was whole."""


class LoadError(Exception):
    """A model could not be brought up; the message carries the tail of its server's output."""


# ==================================================================================================
# VALUES (NamedTuple, not dataclass: importing dataclasses costs every command 5 ms)
# ==================================================================================================


# What follows the host is its end, a port or a path: 127.0.0.1.example.com is another's.
_LOCAL_URL = re.compile(r"https?://(?:localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?![^:/])")


class Tier(NamedTuple):
    """One [section] of models.ini.

    Units: context and output in tokens, sizes in GB (10^9 bytes), ttl in seconds.
    """

    name: str
    role: str = ""
    tier: str = ""
    backend: str = "gguf"                       # gguf | litellm | openai
    hf_repo: str = ""
    hf_file: str = ""
    hf_repo_next: str = ""
    hf_file_next: str = ""
    path: str = ""                              # a GGUF on this disk, instead of hf_repo / hf_file
    model: str = ""
    model_next: str = ""
    ctx_size: int = 32_768
    max_output_tokens: int = 0                  # 0: no cap
    size_gb: float = 0.0
    size_gb_next: float = 0.0
    quant: str = ""
    quant_next: str = ""
    sampler: Tuple[Tuple[str, float], ...] = ()
    rope_scale: float = 0.0                     # YaRN factor, 0: none
    rope_orig_ctx: int = 0
    cache_ram_mib: int = -1                     # of prompts in memory; -1: as the server has it
    ctx_checkpoints: int = -1                   # a slot, likewise
    description: str = ""
    aliases: Tuple[str, ...] = ()
    ttl: int = 1200                             # 0: never unloaded for idleness
    tool_call: bool = True                      # for clients that ask: the model can call tools...
    reasoning: bool = False                     # ...and thinks aloud
    settled: Tuple[str, ...] = ()               # of these two, what models.ini says itself
    base_url: str = ""                          # openai: where the host is, without /v1
    api_key_env: str = ""                       # the variable that holds its key
    server: Tuple[Tuple[str, Any], ...] = ()    # what it says of TIER_SERVER_OPTIONS
    prices: Tuple[Tuple[str, float], ...] = ()  # opencode's name -> dollars per million tokens
    channel: str = "current"                    # what it runs: current, or next, what is queued

    @property
    def names(self) -> Tuple[str, ...]:
        """Every name that clients may ask for it by."""
        return (self.name, *self.aliases)

    @property
    def settings(self) -> Dict[str, Any]:
        """Its own keys of llama-server, without those of [DEFAULT]: see tier_config."""
        return dict(self.server)

    @property
    def chats(self) -> bool:
        return self.role not in TEXT_ROLES

    @property
    def has_projector(self) -> bool:
        return "mmproj" in self.settings

    @property
    def takes_pictures(self) -> bool:
        return self.backend != "gguf" or self.has_projector

    @property
    def has_next(self) -> bool:
        """True where an upgrade is queued, for the channel next."""
        if self.backend == "gguf":
            return bool(self.hf_file_next or self.hf_repo_next)
        return bool(self.model_next)

    def on_channel(self, channel: str) -> Tier:
        """The same on a channel; one for which nothing is queued stays on the current one."""
        if channel != "next" or not self.has_next:
            channel = "current"
        return self._replace(channel=channel)

    @property
    def remote(self) -> bool:
        """True where a request leaves this machine, as far as models.ini can tell."""
        if self.backend == "openai":
            return not _LOCAL_URL.match(self.base_url)
        return self.backend == "litellm"


class Routing(NamedTuple):
    high_fidelity_ceiling: int = HIGH_FIDELITY_CEILING_TOKENS
    mid_fidelity_ceiling: int = MID_FIDELITY_CEILING_TOKENS
    multi_turn: int = MULTI_TURN
    ultra_triggers: Tuple[str, ...] = ("[ultra]", "[opus]", "ultra:", "opus:")
    stay: str = "no"                            # no | loop | warm: keep a conversation's tier
    stay_s: int = 10                            # ...while leaving it costs more


# All layers on the GPU, and a KV cache of 8 bits, which takes half of what f16 does.
DEFAULT_SERVER: Tuple[Tuple[str, Any], ...] = (
    ("n_gpu_layers", "999"),
    ("flash_attn", "on"),
    ("jinja", True),
    ("cache_type_k", "q8_0"),
    ("cache_type_v", "q8_0"),
    ("threads", -1),
)


class _Settings(NamedTuple):
    """The values of models.ini, and what they are where it is silent."""

    tiers: Tuple[Tier, ...] = ()
    channel: str = "current"                    # of its tiers: current | next
    routing: Routing = Routing()
    host: str = ROUTER_HOST
    router_port: int = ROUTER_PORT
    engine_port: int = ENGINE_PORT
    litellm_port: int = LITELLM_PORT
    engine: str = "auto"                        # auto | llama-swap | embedded
    memory_gb: float = 0.0                      # 0: auto
    allow_unauthenticated: bool = False
    local_only: bool = False                    # no request leaves this machine
    server: Tuple[Tuple[str, Any], ...] = DEFAULT_SERVER    # what it says of SERVER_OPTIONS
    build_model: str = "agent"                  # whom opencode's build agent asks: agent | auto
    decision_log: bool = True                   # logs/decisions.jsonl
    park_gb: float = 20.0                       # of parked conversations on the disk, 0: none
    park_after_s: int = 3                       # a conversation is parked that takes longer to read
    park_every_min: int = 10                    # ...and while in use, 0: only before a stop
    loading_state: str = "visible"              # of a stream that waits: visible | comments | off
    aliases: Tuple[Tuple[str, str], ...] = DEFAULT_ALIASES  # pattern -> tier, role or auto
    unknown_model: str = "error"                # what other names get: error | auto
    allowed_origins: Tuple[str, ...] = ()       # patterns for web pages that may ask
    allowed_hosts: Tuple[str, ...] = ()         # names of this machine besides its own
    patience_s: float = 0.0                     # of a tiny request for auto; 0: it waits its turn


class Config(_Settings):
    """models.ini, parsed. Frozen: a reload makes a new one, so what follows is worked out once."""

    def on_channel(self, channel: str) -> Config:
        """The same with its tiers on a channel: everything behind this asks them alone."""
        tiers = tuple(tier.on_channel(channel) for tier in self.tiers)
        # "" is said where nothing runs, external where it is another's to say.
        if channel != "next":
            channel = "current"
        return self._replace(tiers=tiers, channel=channel)

    @property
    def settings(self) -> Dict[str, Any]:
        """The keys of llama-server that have a value for all tiers."""
        return dict(self.server)

    def with_settings(self, own: Mapping[str, Any]) -> Config:
        return self._replace(server=tuple({**self.settings, **own}.items()))

    @functools.cached_property
    def smallest_context(self) -> int:
        """Of the ladder's tiers, in tokens: what it holds, all of them hold."""
        return min((tier.ctx_size for tier in self.ladder), default=0)

    @property
    def offered(self) -> Tuple[Tier, ...]:
        """The tiers that a request may name: without those that local_only forbids."""
        if self.local_only:
            return tuple(tier for tier in self.tiers if not tier.remote)
        return self.tiers

    def by_role(self, role: str) -> Optional[Tier]:
        for tier in self.tiers:
            if tier.role == role:
                return tier
        return None

    def by_name(self, name: str) -> Optional[Tier]:
        for tier in self.tiers:
            if tier.name == name or name in tier.aliases:
                return tier
        return None

    @functools.cached_property
    def ladder(self) -> Tuple[Tier, ...]:
        """The auto-routed tiers, best first."""
        found = []
        for role in LADDER_ROLES:
            # A role has one tier; where local_only forbids that, the rung is missing.
            found += [tier for tier in self.offered if tier.role == role]
        return tuple(found)

    @functools.cached_property
    def preferences(self) -> Dict[str, Tuple[Tier, ...]]:
        """The ladder as each of its roles sees it: itself and below, then above, nearest first."""
        orders = {}
        above: List[Tier] = []
        below = list(self.ladder)
        for role in LADDER_ROLES:
            orders[role] = (*below, *above)
            if below and below[0].role == role:
                above.insert(0, below.pop(0))
        return orders


class Facts(NamedTuple):
    """What the ladder needs to know of a request body, counted once."""

    auto: bool                                  # the model asked for is a spelling of `auto`
    model: str                                  # as asked, "" when absent
    fim: bool                                   # infill: belongs to the fast role
    chars: int                                  # code points of all message text and prompt
    wide: int                                   # of these, of wide scripts: about a token each
    extra: int                                  # characters of tool schemas and tool-call arguments
    pictures: int
    turns: int                                  # messages of the user
    max_tokens: int                             # 0 when the request names none
    trigger: str                                # the ultra trigger found, or ""
    classes: int = 0                            # what class_tokens says, 0: not asked yet
    ratio: float = 0.0                          # true tokens per class token, 0: not known

    @property
    def tokens(self) -> int:
        """The specification's estimate, which the rungs compare: characters / 4."""
        return self.chars // CHARS_PER_TOKEN

    @property
    def most_tokens(self) -> int:
        """What the text cannot exceed, by the rates of class_tokens."""
        text = int((self.chars + self.extra) * 1.62) + self.wide
        return text + self.pictures * PICTURE_TOKENS

    @property
    def full_tokens(self) -> int:
        """The fuller estimate, which must fit a tier's context."""
        if self.classes:
            text = int(self.classes * (self.ratio or 1.0))
        else:
            narrow = self.chars - self.wide + self.extra
            text = narrow // CHARS_PER_TOKEN + self.wide
        return text + self.pictures * PICTURE_TOKENS

    @property
    def source(self) -> str:
        """measured where the conversation's last answer counted its tokens, else estimated."""
        return "measured" if self.classes and self.ratio else "estimated"


# ==================================================================================================
# PURE: LADDER
# ==================================================================================================
# Which tier a request is for, from the request alone: its path and the name that it asks for, its
# size in tokens, a trigger; then what it costs a conversation to leave its tier.
#
# A body is counted once, into Facts. They choose a rung, and the rung chooses a role. That role's
# order of the tiers (config.preferences) loses those that do not hold the request and those that
# are down: what remains is the decision's chain. Asking its tiers, one after the other, is
# RouterApp._ask_ladder's, in ROUTER. Reasons are put into words only when somebody asks for them.

# Path (without /v1 and trailing slash) -> the canonical path an upstream knows.
INFERENCE_PATHS = {
    "/chat/completions": "/v1/chat/completions",
    "/completions": "/v1/completions",
    "/responses": "/v1/responses",
    "/messages": "/v1/messages",
    "/messages/count_tokens": "/v1/messages/count_tokens",
    "/completion": "/completion",
    "/infill": "/infill",
    "/embeddings": "/v1/embeddings",
    "/rerank": "/v1/rerank",
    "/reranking": "/v1/rerank",
}
_CANONICAL_PATHS = frozenset(INFERENCE_PATHS.values())
# The role that answers such a path, whatever is asked for by a name that is no tier's.
PATH_ROLES = {"/v1/embeddings": "embed", "/v1/rerank": "rerank"}
# What the last bytes of a whole event stream hold, one of these. Where none does, the model's
# server died, and somebody between it and us ended its stream cleanly, as llama-swap does. In prose
# the quotes are escaped, so none of these is taken for an end there.
_CHAT_ENDS = (b"[DONE]", b'"finish_reason":"', b'"finish_reason": "', b'"error"')
STREAM_ENDS = {
    "/v1/chat/completions": _CHAT_ENDS,
    "/v1/completions": _CHAT_ENDS,
    "/v1/messages": (b'"type":"message_stop"', b'"type": "message_stop"',
                     b'"type":"error"', b'"type": "error"'),
    # Its last event has the whole answer in it, so that its beginning may not be kept: any will do.
    "/v1/responses": (b"}",),
}
# Of a chat of OpenAI's, of Anthropic's messages, of OpenAI's responses.
_PICTURE_KINDS = ("image_url", "image", "input_image")
# Scripts of which a character is about a token: Thai, Chinese, Japanese, Korean, emoji and so on.
_WIDE = re.compile(
    "[\u0e00-\u0eff\u1000-\u11ff\u1780-\u17ff\u2e80-\u303e\u3041-\ua4cf\ua960-\ua97f\uac00-\ud7ff"
    "\uf900-\ufaff\ufe30-\ufe4f\uff01-\uff60\uffe0-\uffe6\U00016fe0-\U0001b2ff\U0001f300-\U0001faff"
    "\U00020000-\U0003fffd\u231a-\u23ff\u25fd\u25fe\u2600-\u27bf\u2b1b-\u2b55]"
)
# A line that opens a fenced block, in lists and quotes, too. A backtick behind a fence of backticks
# makes that a span of code instead (CommonMark 4.5).
_FENCE = re.compile(r"[ \t]*(?:(?:[-*+>]|[0-9]{1,9}[.)])[ \t]*)*(`{3,}(?=[^`]*\Z)|~{3,})")
_TICKS = re.compile("`+")


def _without_spans(text: str) -> str:
    """A paragraph without its backticked spans; a run is closed by the next of its length."""
    spans = []
    last: Dict[int, int] = {}                   # length of a run -> where the last such begins
    for run in _TICKS.finditer(text):
        start, end = run.span()
        length = end - start
        if length in last:
            spans.append((last[length], end))
        last[length] = start
    kept = []
    done = 0
    for start, end in sorted(spans):
        if start >= done:                       # else its first run stands within a span
            kept.append(text[done:start])
            done = end
    kept.append(text[done:])
    return "`".join(kept)


def _outside_code(text: str) -> str:
    """Markdown text without fenced blocks and backticked spans.

    One pattern for all of it would take quadratic time on text that somebody has made for that.
    """
    kept: List[str] = []
    paragraph: List[str] = []
    fence = ""
    # A span of code ends with its paragraph at the latest, and an empty line ends the last one.
    for line in [*text.splitlines(), ""]:
        if fence:
            bare = line.strip(" \t>")
            if bare.startswith(fence) and not bare.strip(fence[0]):
                fence = ""
            continue
        opening = _FENCE.match(line)
        if line.strip() and not opening:
            paragraph.append(line)
            continue
        kept.append(_without_spans("\n".join(paragraph)))
        paragraph = []
        if opening:
            fence = opening.group(1)
    return "\n".join(kept)


_DECODER = json.JSONDecoder()                   # json.loads asks on every call how it is to decode


def parse_json(text: str) -> Any:
    """As json.loads. Errors: ValueError, RecursionError."""
    if text[:1] == "{":
        # decode() looks for white space on both sides, each time with a pattern.
        value, end = _DECODER.raw_decode(text)
        if end == len(text) or not text[end:].strip(" \t\r\n"):
            return value
    return _DECODER.decode(text)                # its error says what is wrong


def unquoted(path: str) -> str:
    """A path without percent-encoding."""
    if "%" not in path:
        return path
    from urllib.parse import unquote
    return unquote(path)


def inference_path(target: str) -> str:
    """Return the canonical inference path for a request target, or "" when it is not one.

    However a client joins a base URL and a path: /v1 once, twice or not at all, slashes doubled or
    at the end, letters percent-encoded.
    """
    path = target.partition("?")[0]
    if path in _CANONICAL_PATHS:
        return path
    path = unquoted(path)
    words = [word for word in path.split("/") if word]
    # Twice, where a base URL ends in it and the client adds its own.
    while words and words[0] == "v1":
        words.pop(0)
    return INFERENCE_PATHS.get("/" + "/".join(words), "")


def _spellings(model: str) -> Tuple[str, str]:
    """A name in lower case without `:latest`, and the same without a provider's prefix."""
    name = model.strip().lower().removesuffix(":latest")    # which Ollama's clients add
    _, _, bare = name.rpartition("/")
    return name, bare


def is_auto(model: object) -> bool:
    """True for `auto` in any spelling, and for a name that is empty, null or absent."""
    if model is None or model == "auto":
        return True
    if not isinstance(model, str):
        return False
    _, bare = _spellings(model)
    return bare in ("", "auto")


def tier_named(config: Config, model: str) -> str:
    """The name of the tier that has this name in any spelling, "" where none has."""
    tier = config.by_name(model)
    if tier is not None:
        return tier.name
    spellings = _spellings(model)
    for tier in config.tiers:
        for name in tier.names:
            if name.lower() in spellings:
                return tier.name
    return ""


def resolve_name(config: Config, model: object) -> str:
    """The name of the tier that a request's model means, `auto`, or "" where it means none.

    A tier's own names come first, then the patterns of [ALIASES], and at last unknown_model.
    """
    if is_auto(model):
        return "auto"
    if not isinstance(model, str):
        return ""
    named = tier_named(config, model)
    if named:
        return named
    spellings = _spellings(model)
    from fnmatch import fnmatchcase
    for pattern, target in config.aliases:
        if any(fnmatchcase(name, pattern) for name in spellings):
            tier = config.by_name(target) or config.by_role(target)
            if tier is None:                    # a role that no tier here has
                return "auto"
            return tier.name
    if config.unknown_model == "auto":
        return "auto"
    return ""


def resolve_on_path(config: Config, path: str, model: object) -> str:
    """As resolve_name, on a canonical path: some have a role of their own.

    There, `auto` and the names that providers have for such models (text-embedding-3-small,
    rerank-v3.5) are the tier of that role, "" where there is none.
    """
    role = PATH_ROLES.get(path, "")
    name = resolve_name(config, model)
    if not role or name not in ("", "auto"):
        return name
    tier = config.by_role(role)
    if tier is None:
        return ""
    if name == "auto":
        return tier.name
    if isinstance(model, str) and role in model.lower():
        return tier.name
    return ""


def _count_wide(text: str) -> int:
    """How many characters of a text belong to a wide script."""
    if text.isascii():
        return 0
    return len(_WIDE.findall(text))


class _Tally:
    """Running counts over a body's text."""

    chars = wide = extra = pictures = 0

    def __init__(self, texts: List[str]) -> None:
        self.texts = texts                      # gets all that is counted

    def add_text(self, value: object) -> None:
        """Count text of a message."""
        if not isinstance(value, str):
            return
        self.chars += len(value)
        self.wide += _count_wide(value)
        self.texts.append(value)

    def add_aside(self, value: object) -> None:
        """Count what fills the context and is no message: schemas, arguments, reasoning."""
        if value is None:
            return
        text = value
        if not isinstance(text, str):
            text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        # There is one count of these: a wide character, about a token, goes in as the characters
        # that a token has.
        more = CHARS_PER_TOKEN - 1
        self.extra += len(text) + _count_wide(text) * more
        self.texts.append(text)

    def add_content(self, content: object, depth: int = 0) -> None:
        """Count a message's content or a prompt.

        It is a string, or a list of parts, strings or token ids, or of such lists.
        """
        if isinstance(content, str):
            self.add_text(content)
        # No API nests deeper; a hostile body does, until Python's own stack ends.
        elif isinstance(content, list) and depth < 4:
            for part in content:
                self._add_part(part, depth + 1)

    def _add_part(self, part: object, depth: int) -> None:
        if isinstance(part, int):               # a prompt given as token ids
            self.chars += CHARS_PER_TOKEN
        elif isinstance(part, (str, list)):
            self.add_content(part, depth)
        elif isinstance(part, dict):
            self._add_typed(part, depth)

    def _add_typed(self, part: Mapping[str, Any], depth: int) -> None:
        kind = part.get("type")
        if kind == "tool_use":
            self.add_aside(part.get("input"))
        elif kind == "tool_result":
            self.add_content(part.get("content"), depth)
        elif kind == "thinking":
            self.add_aside(part.get("thinking"))
        elif kind in _PICTURE_KINDS:
            self.pictures += 1
        else:
            self.add_text(part.get("text"))

    def add_message(self, message: Mapping[str, Any]) -> None:
        """Count one chat message, or one item of a /v1/responses input."""
        self.add_content(message.get("content"))
        if len(message) <= 2 and "content" in message:  # role and content
            return
        self.add_content(message.get("output"))         # of a function_call_output
        self.add_aside(message.get("reasoning_content"))
        if message.get("type") == "function_call":
            self.add_aside(message.get("arguments"))
        # The older API's one call stands bare where a call of tool_calls has it under a key.
        self._add_call({"function": message.get("function_call")})
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            for call in calls:
                self._add_call(call)

    def _add_call(self, call: object) -> None:
        if not isinstance(call, dict):
            return
        function = call.get("function")
        if isinstance(function, dict):
            self.add_aside(function.get("name"))
            self.add_aside(function.get("arguments"))


def _plain_text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = []
    for part in content:
        text = part
        if isinstance(part, dict):
            text = part.get("text")
        if isinstance(text, str):
            texts.append(text)
    return "\n".join(texts)


def _is_user_turn(content: object) -> bool:
    """False for content that only carries tool results back, as Anthropic's API has them.

    Such a message has the user's role, and comes from the client's own loop.
    """
    if not isinstance(content, list) or not content:
        return True
    kinds = [part.get("type") for part in content if isinstance(part, dict)]
    return kinds != ["tool_result"] * len(content)


def _leading_trigger(triggers: Sequence[str], user_text: str) -> str:
    """The `word:` trigger that a user's message begins with, or ""."""
    # Without a copy of a message that may have a megabyte.
    begins = user_text[:4096].lstrip().lower()
    for trigger in triggers:
        if begins.startswith(trigger) and not trigger.startswith("["):
            return trigger
    return ""


def _bracketed_trigger(triggers: Sequence[str], text: str, alone: bool) -> str:
    """The `[word]` trigger that stands in a text outside code, or "".

    `alone`: it counts only where a line holds nothing else.
    """
    if "[" not in text:
        return ""
    lowered = text.lower()
    found = [t for t in triggers if t.startswith("[") and t in lowered]
    if not found:                               # to read a text as Markdown is slow
        return ""
    outside = _outside_code(lowered)
    places: Union[str, List[str]] = outside
    if alone:
        places = [line.strip() for line in outside.splitlines()]
    for trigger in found:
        if trigger in places:
            return trigger
    return ""


def find_trigger(triggers: Sequence[str], user_text: str, system_texts: Iterable[str]) -> str:
    """Return the ultra trigger that holds, or "".

    `[word]` counts anywhere in the user's words outside code, and alone on a line of a system
    message; `word:` counts only as the first word of the user's message.
    """
    trigger = _leading_trigger(triggers, user_text)
    trigger = trigger or _bracketed_trigger(triggers, user_text, alone=False)
    # A system message may explain a trigger in a sentence, which asks for nothing.
    for text in system_texts:
        trigger = trigger or _bracketed_trigger(triggers, text, alone=True)
    return trigger


def _messages(body: Mapping[str, Any]) -> List[Mapping[str, Any]]:
    """The conversation of a chat, messages or responses body, as far as it has the shape of one."""
    for key in ("messages", "input"):
        value = body.get(key)
        if isinstance(value, list):
            return [m for m in value if isinstance(m, dict)]
        if key == "input" and isinstance(value, str):
            return [{"role": "user", "content": value}]
    return []


_OUTPUT_KEYS = frozenset({
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n_predict",
})
_SYSTEM_KEYS = ("system", "instructions")
_PROMPT_KEYS = ("prompt", "suffix", "input_prefix", "input_suffix", "input_extra")
_SCHEMA_KEYS = ("tools", "functions")
_COUNTED_KEYS = frozenset({*_SYSTEM_KEYS, *_PROMPT_KEYS, *_SCHEMA_KEYS})


def _output_tokens_asked(body: Mapping[str, Any]) -> int:
    """The longest answer that a body asks for, in tokens; 0 where it names none."""
    asked = 0
    for key in _OUTPUT_KEYS & body.keys():
        value = body[key]
        if isinstance(value, int) and not isinstance(value, bool):
            asked = max(asked, value)
    return asked


def read_facts(path: str, body: Mapping[str, Any], triggers: Sequence[str] = (),
               texts: Optional[List[str]] = None) -> Facts:
    """Count a parsed request body once; wrong types count nothing. `path` is canonical.

    `texts` gets all that was counted, for class_tokens: the facts outlive the body.
    """
    if texts is None:
        texts = []
    tally = _Tally(texts)
    messages = _messages(body)
    turns = 0
    last: object = None
    systems: List[object] = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if len(message) == 2 and role and isinstance(content, str) and content.isascii():
            # Most messages are such, and a request has hundreds: twice as fast as add_message.
            tally.chars += len(content)
            tally.texts.append(content)
        else:
            tally.add_message(message)
        if role == "user" and _is_user_turn(content):
            turns += 1
            last = content
        elif role in ("system", "developer"):
            systems.append(content)
    # In the body's order, not the set's, which differs from process to process: class_tokens takes
    # samples by their place.
    for key, value in body.items():
        if key not in _COUNTED_KEYS:
            continue
        if key in _SYSTEM_KEYS:
            systems.append(value)
        if key not in _SCHEMA_KEYS:
            tally.add_content(value)
        elif value:
            tally.add_aside(value)
    prompt = body.get("prompt")
    if isinstance(prompt, str) and not messages:
        turns = 1
        last = prompt
    trigger = ""
    if triggers:
        trigger = find_trigger(triggers, _plain_text(last), map(_plain_text, systems))
    model = body.get("model")
    fim = path == "/infill"
    if path == "/v1/completions" and body.get("suffix"):
        fim = True
    return Facts(
        auto=is_auto(model),
        model=model if isinstance(model, str) else "",
        fim=fim,
        chars=tally.chars,
        wide=tally.wide,
        extra=tally.extra,
        pictures=tally.pictures,
        turns=turns,
        max_tokens=_output_tokens_asked(body),
        trigger=trigger,
    )


# Tokens of a character by its class, least squares over eight tokenizers and forty kinds of text;
# docs/performance.md has how they were got. ASCII by translation, the rest by ranges.
_ASCII_RATES = {
    "a": 0.203,
    "A": 0.38,
    "0": 1.05,
    " ": 0.044,
    "\n": 0.73,
    "!": 0.66,
}


def _ascii_class(char: str) -> str:
    """The class of an ASCII character: a character that stands for all of its kind."""
    if char.islower():
        return "a"
    if char.isupper():
        return "A"
    if char.isdigit():
        return "0"
    if char == " ":
        return " "
    if char in "\n\t":
        return "\n"
    return "!"


_ASCII_CLASSES = "".join(_ascii_class(chr(code)) for code in range(128))
_WIDE_RATES = {                                 # up to this code point: tokens of a character
    0x0370: 1.62,                               # Latin with accents, phonetic signs
    0x0400: 0.58,                               # Greek
    0x0590: 0.37,                               # Cyrillic, Armenian
    0x0900: 0.46,                               # Hebrew, Arabic
    0x0E00: 0.76,                               # of India
    0x0F00: 0.59,                               # Thai, Lao
    0x2000: 0.76,
    0x2C00: 0.27,                               # punctuation, arrows, lines of tables
    0xAC00: 0.78,                               # Chinese, Japanese
    0xD7B0: 0.77,                               # Korean
    0x10000: 0.78,
    0x110000: 2.34,                             # emoji, and what is rare
}
_WIDE_ENDS = tuple(_WIDE_RATES)
_NOT_ASCII = re.compile("[^\x00-\x7f]")
_WINDOWS, _WINDOW_CHARS = 32, 256


def _windows_of(text: str) -> str:
    """A text of bounded length with the same mixture of characters: windows, evenly spread."""
    if len(text) <= _WINDOWS * _WINDOW_CHARS:
        return text
    step = len(text) // _WINDOWS
    windows = []
    for number in range(_WINDOWS):
        start = number * step
        windows.append(text[start:start + _WINDOW_CHARS])
    return "".join(windows)


def class_tokens(texts: Sequence[str]) -> int:
    """Tokens of all texts together, by the classes of their characters over sampled windows.

    Within 15 % for agents' conversations at the 92nd percentile, where characters / 4 is for 25 %.
    """
    text = "\n".join(texts)
    if not text:
        return 0
    sample = _windows_of(text)
    in_ascii = sample.encode("ascii", "ignore").decode("ascii")
    classes = in_ascii.translate(_ASCII_CLASSES)
    tokens = 0.0
    for name, rate in _ASCII_RATES.items():
        tokens += classes.count(name) * rate
    for char in _NOT_ASCII.findall(sample):
        place = bisect.bisect_right(_WIDE_ENDS, ord(char))
        tokens += _WIDE_RATES[_WIDE_ENDS[place]]
    return int(tokens * len(text) / len(sample))


# Rung -> the role it asks for, and its reason.
RUNGS: Dict[str, Tuple[str, str]] = {
    "fim": ("fast", "infill belongs to the fast tier"),
    "trigger": ("ultra", "{trigger} asks for the top tier"),
    "high": ("ultra", "{tokens:,} tokens <= {high:,}: top tier"),
    "mid": ("agent", "{tokens:,} tokens <= {mid:,}: heavy local coder"),
    "floor": ("agent", "{tokens:,} tokens, {turns} user turns >= {floor}: keep the heavy coder"),
    "long": ("fast", "{tokens:,} tokens > {mid:,}: stepping down to the long window"),
}


def held_by_all(facts: Facts, config: Config) -> bool:
    """Whether a request is so short that each tier of the ladder holds it, whatever its text is.

    Where not, class_tokens is worth its time.
    """
    # At least what output_reserve() takes for any tier.
    reserve = facts.max_tokens or DEFAULT_RESERVE_TOKENS
    return facts.most_tokens + reserve <= config.smallest_context


def _choose_rung(facts: Facts, routing: Routing) -> str:
    """The first that matches; the order is that of the specification's table."""
    if facts.fim:
        return "fim"
    if facts.trigger:                           # without an ultra tier, the agent's at any length
        return "trigger"
    tokens = facts.tokens
    if tokens <= routing.high_fidelity_ceiling:
        return "high"
    if tokens <= routing.mid_fidelity_ceiling:
        return "mid"
    if facts.turns >= routing.multi_turn:
        return "floor"
    return "long"


def output_reserve(facts: Facts, tier: Tier) -> int:
    """Tokens kept free for the answer: min(max_tokens or 1,024, max_output_tokens, ctx / 4)."""
    asked = facts.max_tokens or DEFAULT_RESERVE_TOKENS
    most = tier.max_output_tokens or tier.ctx_size
    # Some clients ask for as many as the whole context has: a prompt would have no room beside it.
    return min(asked, most, tier.ctx_size // 4)


def tokens_needed(facts: Facts, tier: Tier) -> int:
    """Tokens that `tier` must hold for this request: the fuller estimate plus room to answer."""
    return facts.full_tokens + output_reserve(facts, tier)


LOCAL_ONLY = "local_only = yes in models.ini keeps every request on this machine"


def _blind(config: Config) -> Dict[str, str]:
    """Tiers that take no pictures, where another tier takes them."""
    blind = {}
    for tier in config.ladder:
        if not tier.takes_pictures:
            blind[tier.name] = "it takes no pictures"
    if len(blind) == len(config.ladder):        # one of them shall say so
        return {}
    return blind


def _to_try(holds: List[Tier], down: Mapping[str, str], barred: Mapping[str, str]) -> List[Tier]:
    """Of the tiers that hold a request those to ask, in order; one at least where any holds it.

    `down` has those that are barred, too.
    """
    if not down:
        return holds
    # What is down is likelier to answer than what cannot: it may be back meanwhile.
    for avoided in (down, barred):
        left = [t for t in holds if t.name not in avoided]
        if left:
            return left
    return holds[:1]


class Pace(NamedTuple):
    """What this machine has shown of a tier; 0: not known yet."""

    read_per_s: float = 0.0                     # tokens of a prompt
    load_s: float = 0.0
    loaded: bool = False
    keeps: bool = False                         # a conversation survives until it is loaded again

    def turn_s(self, tokens: int, held: int) -> float:
        """Seconds until a prompt is read of which so many tokens are held; 0.0: not known."""
        if not self.read_per_s:
            return 0.0
        load_s = self.load_s
        if self.loaded:
            load_s = 0.0
        elif not self.keeps:
            held = 0
        # A server reads the last token anew even of a prompt that it holds whole.
        return load_s + max(tokens - held, 1) / self.read_per_s


def about_s(seconds: float) -> str:
    if seconds >= 10:
        return f"about {seconds:,.0f} s"
    return f"about {seconds:.1f} s"


class Leaving(NamedTuple):
    """What the tier that answered a conversation last has of it, where another is to go on."""

    tier: str = ""                              # "": it is not left
    tokens: int = 0                             # warm there
    cost_s: float = 0.0                         # that the turn takes longer elsewhere, 0: not known

    def words(self, tier: str) -> str:
        """What a switch to `tier` costs."""
        text = f"leaves {self.tokens:,} tokens warm on {self.tier}"
        if self.cost_s:
            text += f"; this turn takes {about_s(self.cost_s)} longer on {tier}"
        return text


STAYS = Leaving()                               # what most requests do


def leaving_cost(tokens: int, old: Pace, old_held: int, new: Pace, new_held: int) -> float:
    """Seconds that a prompt takes longer on a new tier than on the old one; 0.0: not known."""
    new_s = new.turn_s(tokens, new_held)
    if not new_s:
        return 0.0
    old_s = old.turn_s(tokens, old_held)
    return max(new_s - old_s, 0.0)


def _change_words(fewer_tokens: int, more_turns: int) -> str:
    if fewer_tokens:
        return f"{fewer_tokens:,} fewer tokens"
    if more_turns == 1:
        return "1 more user turn"
    return f"{more_turns} more user turns"


class Decision(NamedTuple):
    """Where a request goes and why; log line, response headers and `why` are all made from it."""

    tier: str
    rung: str                                   # explicit, or one of RUNGS
    chain: Tuple[Tier, ...]                     # this tier, then those a failure falls to, in order
    facts: Facts
    config: Config
    down: Mapping[str, str] = {}                # tiers left alone when it was made, with the reason
    barred: Mapping[str, str] = {}              # of these, those that cannot answer
    preference: Tuple[Tier, ...] = ()           # the whole ladder, as the rung would have it
    stays: str = ""                             # why this tier goes on instead of the rung's
    held: bool = True                           # by a tier at least

    @property
    def tokens(self) -> int:
        return self.facts.tokens

    def _why_not(self, tier: Tier) -> str:
        """Why a tier was not taken, in words."""
        name = tier.name
        if tier.role not in LADDER_ROLES:
            role = tier.role or "none"
            return f"role {role} is never auto-routed; ask for it by name"
        if self.config.local_only and tier.remote:
            return f"{name} is hosted, and {LOCAL_ONLY}"
        facts = self.facts
        need = tokens_needed(facts, tier)
        if need > tier.ctx_size:
            return f"{name} holds {tier.ctx_size:,} tokens, this needs {need:,} ({facts.source})"
        if name in self.down:
            return f"{name} is left alone for now: {self.down[name]}"
        if tier not in self._above:
            return "below the tier taken"
        if facts.fim:
            return "infill goes to the fast tier"
        routing = self.config.routing
        count = f"{facts.tokens:,} tokens"
        if tier.role == "ultra":
            return f"{count} > {routing.high_fidelity_ceiling:,} and no trigger"
        return (f"{count} > {routing.mid_fidelity_ceiling:,}"
                f" and {facts.turns} user turns < {routing.multi_turn}")

    def _reason_of_rung(self) -> str:
        role, words = RUNGS[self.rung]
        routing, facts = self.config.routing, self.facts
        reason = words.format(
            trigger=facts.trigger,
            tokens=facts.tokens,
            turns=facts.turns,
            high=routing.high_fidelity_ceiling,
            mid=routing.mid_fidelity_ceiling,
            floor=routing.multi_turn,
        )
        if self.preference[0].role != role:
            reason += f" (no {role} tier here)"
        return reason

    @property
    def reason(self) -> str:
        """Why this tier, in words: made when they are asked for, not while the request waits."""
        if self.rung == "explicit":
            return "asked for by name"
        reason = self._reason_of_rung()
        if self.stays:
            return f"{reason}; stays on {self.tier}, {self.stays}"
        best, chosen = self.preference[0], self.chain[0]
        if not self.held:
            need = tokens_needed(self.facts, chosen)
            return (f"{reason}; no tier holds {need:,} tokens ({self.facts.source}),"
                    f" {self.tier} has the largest context")
        if chosen is not best:
            return f"{reason}; {self._why_not(best)}, so {self.tier}"
        return reason

    @property
    def refused(self) -> Dict[str, str]:
        """Every other tier, with its reason for not being taken."""
        if self.rung == "explicit":
            return {}
        refused = {tier.name: self._why_not(tier) for tier in self.config.tiers}
        del refused[self.tier]
        if self.stays:                          # the rung's own choice is second then
            refused[self.chain[1].name] = f"the conversation stays on {self.tier}, {self.stays}"
        return refused

    @property
    def passed_over(self) -> Dict[str, str]:
        """The tiers of the ladder above the one taken, with the reason for each."""
        return {tier.name: self._why_not(tier) for tier in self._above}

    @property
    def _above(self) -> Tuple[Tier, ...]:
        """The tiers of the ladder above the one taken."""
        ladder = self.config.ladder
        return ladder[:ladder.index(self.chain[0])]

    def _tier_after(self, fewer: int, more: int) -> str:
        """The tier of the same request with so many tokens fewer and so many user turns more."""
        facts = self.facts
        chars = facts.chars - CHARS_PER_TOKEN * fewer
        changed = facts._replace(
            chars=max(chars, 0),
            wide=max(facts.wide - fewer, 0),
            classes=max(facts.classes - fewer, 0),
            turns=facts.turns + more,
        )
        return decide(changed, self.config, self.down, self.barred).tier

    @property
    def nearest(self) -> str:
        """The smallest change that would move the request up the ladder, "" where none does."""
        if self.rung in ("explicit", "fim"):
            return ""
        facts, routing = self.facts, self.config.routing
        # What is too much for a rung or for a tier's context, and what is missing for `floor`.
        changes = [
            (facts.tokens - routing.high_fidelity_ceiling, 0),
            (facts.tokens - routing.mid_fidelity_ceiling, 0),
            (0, routing.multi_turn - facts.turns),
        ]
        better = []
        for tier in self._above:
            changes.append((tokens_needed(facts, tier) - tier.ctx_size, 0))
            better.append(tier.name)
        for fewer, more in sorted(changes, key=sum):
            if fewer <= 0 and more <= 0:        # that bound is not what is in the way
                continue
            name = self._tier_after(fewer, more)
            if name in better:
                return f"{_change_words(fewer, more)} \u2192 {name}"
        return ""


def decide(facts: Facts, config: Config, down: Optional[Mapping[str, str]] = None,
           barred: Optional[Mapping[str, str]] = None) -> Decision:
    """Return the tier for *facts*.

    `down` names tiers not to be tried now, `barred` those that cannot answer, with the reason.
    Invariant: a tier that cannot hold the request is never taken while another can. Where all that
    hold it are down, they are tried all the same; a barred one only where no other holds it.
    Errors: HttpError 400 where no tier has a role of the ladder.
    Source: README, "How auto decides".
    """
    barred = barred or {}
    # Without a projector, llama-server answers a picture with an error.
    if facts.pictures:
        barred = {**barred, **_blind(config)}
    down = {**(down or {}), **barred}
    if not facts.auto:
        return Decision(facts.model, "explicit", (), facts, config, down)
    rung = _choose_rung(facts, config.routing)
    role, _ = RUNGS[rung]
    order = config.preferences[role]
    if not order:
        raise HttpError(400, "auto has nowhere to go: no tier in models.ini has the role"
                             " fast, agent or ultra")
    holds = []
    tokens = facts.full_tokens                  # once, as tokens_needed counts it for each tier
    for tier in order:
        if tokens + output_reserve(facts, tier) <= tier.ctx_size:
            holds.append(tier)
    chain = _to_try(holds, down, barred)
    if not chain:
        # The largest says best how far a request is too long, and its server may count fewer.
        able = [tier for tier in order if tier.name not in barred] or order
        chain = [max(able, key=lambda tier: tier.ctx_size)]
    return Decision(
        tier=chain[0].name,
        rung=rung,
        chain=tuple(chain),
        facts=facts,
        config=config,
        down=down,
        barred=barred,
        preference=order,
        held=bool(holds),
    )


def in_tool_loop(body: Mapping[str, Any]) -> bool:
    """Whether a request brings back what a tool has said: no word of the user's is new in it."""
    messages = body.get("messages") or body.get("input")
    if not messages or not isinstance(messages, list):
        return False
    last = messages[-1]
    if not isinstance(last, dict):
        return False
    kind = last.get("role") or last.get("type")
    if kind == "user":
        return not _is_user_turn(last.get("content"))
    return kind in ("tool", "function", "function_call_output")


def stay_or_go(decision: Decision, leaving: Leaving, loop: bool) -> Decision:
    """The decision, or by [ROUTING] stay the same request on the tier that is being left.

    That one must hold it and be able to answer. A trigger and infill always have their way.
    """
    routing = decision.config.routing
    if not leaving.tier or routing.stay == "no":
        return decision
    if decision.rung in ("explicit", "fim", "trigger"):
        return decision
    if loop:
        why = "amid its tool calls"
    elif routing.stay == "warm" and leaving.cost_s > routing.stay_s:
        why = f"leaving it costs {about_s(leaving.cost_s)}"
    else:
        return decision
    tier = decision.config.by_name(leaving.tier)
    # A reload may have removed it, or given it a role that is not the ladder's.
    if tier is None or tier not in decision.preference or tier.name in decision.down:
        return decision
    if tokens_needed(decision.facts, tier) > tier.ctx_size:
        return decision
    others = [other for other in decision.chain if other is not tier]
    return decision._replace(tier=tier.name, chain=(tier, *others), stays=why)


_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_TOKENS = re.compile(_STRING + rb"|[{}\[\]]", re.DOTALL)
_MODEL_VALUE = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*(" + _STRING + rb"|null)", re.DOTALL)
_OPENING = re.compile(rb"[ \t\r\n]*\{[ \t\r\n]*(\}?)")


def _model_keys(body: bytes) -> List[int]:
    """Where each top-level string that spells "model" ends, in a JSON object's bytes."""
    ends = []
    depth = 0
    for token in _TOKENS.finditer(body):
        text = token.group()
        if text in (b"{", b"["):
            depth += 1
        elif text in (b"}", b"]"):
            depth -= 1
        # With each of its letters escaped it has 32 bytes; a longer one need not be decoded.
        elif depth == 1 and len(text) < 64 and json.loads(text) == "model":
            ends.append(token.end())
    return ends


def model_spans(body: bytes) -> List[Tuple[int, int]]:
    """Where the value of the top-level "model" stands in a JSON object's bytes, for each time.

    A quote inside a JSON string is always escaped, so a lone `"model"` without an escaped spelling
    anywhere is the key itself: no need to walk a 400 kB prompt.
    """
    keys = []                                   # where one ends
    key = body.rfind(b'"model"')                # on prose three times as fast as find()
    lone = key >= 0 and body.rfind(b'"model"', 0, key) < 0
    if lone and (body.find(b"\\") < 0 or body.rfind(b"\\u00") < 0):
        keys.append(key + len(b'"model"'))
    else:
        keys = _model_keys(body)
    spans = []
    for end in keys:
        value = _MODEL_VALUE.match(body, end)
        if value:
            spans.append(value.span(1))
    return spans


def with_model(body: bytes, present: bool, name: str, more: Sequence[bytes] = ()) -> List[bytes]:
    """The body in pieces with the model's name changed to `name`, every other byte as it was.

    `present` says whether the parsed body has the key; where it has not, it is put first. `more`
    are members (`"top_p":0.9`) that the body has not got; they go to its front.
    """
    value = b'"%b"' % name.encode()             # a tier's name has nothing to escape
    view: Any = memoryview(body)                # its slices are no copies of a long prompt
    pieces: List[bytes] = []
    done = 0
    if not present:
        more = (b'"model":' + value, *more)
    opening = _OPENING.match(body) if more else None
    if opening:
        done = body.index(b"{") + 1
        pieces = [view[:done], b",".join(more)]
        if not opening.group(1):                # members follow
            pieces.append(b",")
    # A key that is there twice is changed each time: readers differ in which one counts.
    if present:
        for start, end in model_spans(body):
            pieces += [view[done:start], value]
            done = end
    pieces.append(view[done:])
    return pieces


# ==================================================================================================
# PURE: MODELS.INI
# ==================================================================================================
# The text of a models.ini becomes a Config here, or all that is wrong with it is said, line by
# line. The text comes from load_config or from another machine's router, so nothing in it is
# believed before its table has read it, and no value that may be a secret is ever repeated.

# Which values of a key have no effect outside the project, so that nobody has to trust them.
_ANY_VALUE = re.compile("")
_NO_VALUE = re.compile(r"(?!)")
_THIS_MACHINE = re.compile(r"(?:localhost|127(?:\.[0-9]{1,3}){3}|::1)\Z")
# LiteLLM asks the host of huggingface/https://HOST itself.
_NO_ADDRESS = re.compile(r"(?!.*://)")
_PATH_WITHIN = re.compile(r"(?![/\\~])(?!.*:)(?!(?:.*[/\\])?\.\.(?:[/\\]|\Z))")
_HUB_FILE = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*:(?!(?:[^,]*/)?\.\.?(?:/|,|\Z))[^/\\:,][^\\:,]*"
_HUB_REFERENCE = re.compile(_HUB_FILE + r"\Z")   # OWNER/NAME:FILE of the hub
# Files of the hub or of the project, in a list. None leads out of it.
_FILES_WITHIN = re.compile(
    rf"(?:(?:{_HUB_FILE}|(?![/\\~\s])(?!(?:[^,]*[/\\])?\.\.(?:[/\\]|,|\Z))[^,:]+)(?:, |\Z))+\Z")
_TRUST = {
    "free": _ANY_VALUE,
    "asks": _NO_VALUE,
    "own-host": _THIS_MACHINE,
    "no-url": _NO_ADDRESS,
    "inside": _PATH_WITHIN,
    "files": _FILES_WITHIN,
}


class Option(NamedTuple):
    """One key of models.ini.

    `kind` chooses the reader, `low`..`high` bounds numbers, `choices` closes a set. `harmless`
    matches the values that need no trust. `flags` are all names of the flag of llama-server that a
    key stands for; the first is written. Of a switch it is the first that says its value: for off
    one that begins with --no-. So a key is named for what is on: jinja, not no_jinja.
    """

    kind: str
    low: float = 0
    high: float = 0
    choices: Tuple[str, ...] = ()
    field: str = ""                             # of the record, where it is not called as the key
    harmless: Pattern[str] = _NO_VALUE
    flags: Tuple[str, ...] = ()


def _option_table(rows: str) -> Dict[str, Option]:
    """Rows of KEY TRUST VALUE FLAG...: TRUST is a word of _TRUST, VALUE one of these.

    KIND, KIND:LOW..HIGH, or CHOICE|CHOICE...
    """
    table = {}
    for row in rows.strip().splitlines():
        key, trust, value, *flags = row.split()
        kind, _, bounds = value.partition(":")
        low = high = 0.0
        choices: Sequence[str] = ()
        if bounds:
            low, high = map(float, bounds.split(".."))
        elif "|" in value:
            kind, choices = "choice", value.split("|")
        table[key] = Option(
            kind, low, high, tuple(choices), harmless=_TRUST[trust], flags=tuple(flags))
    return table


# The tables below are all that is known of the file: reading, errors, "did you mean", what needs
# trust and llama-server's flags come from them. What no row says, and no test asks: a key that
# changes how much memory a model takes is for load_options, too, and a flag whose value changes
# nothing of a saved slot is for _NOT_IN_KV.

# What [DEFAULT] says of llama-server for all tiers, and a tier for itself.
SERVER_OPTIONS = _option_table("""
n_gpu_layers        free  layers                  -ngl --gpu-layers --n-gpu-layers
flash_attn          free  on|off|auto             -fa --flash-attn
jinja               free  bool                    --jinja --no-jinja
cache_type_k        free  f32|f16|bf16|q8_0|q4_0|q4_1|iq4_nl|q5_0|q5_1  --cache-type-k -ctk
cache_type_v        free  f32|f16|bf16|q8_0|q4_0|q4_1|iq4_nl|q5_0|q5_1  --cache-type-v -ctv
threads             free  int:-1..4096            --threads -t
llama_server_bin    asks  text
parallel            free  int:1..256              --parallel -np
batch               free  int:1..1000000          --batch-size -b
ubatch              free  int:1..1000000          --ubatch-size -ub
n_cpu_moe           free  int:0..10000            --n-cpu-moe -ncmoe
override_tensor     free  overrides               --override-tensor -ot
split_mode          free  none|layer|row|tensor   --split-mode -sm
tensor_split        free  proportions             --tensor-split -ts
main_gpu            free  int:0..1000             --main-gpu -mg
device              free  devices                 --device -dev
reasoning_format    free  none|deepseek|deepseek-legacy|auto  --reasoning-format
reasoning_budget    free  int:-1..100000000       --reasoning-budget
cache_reuse         free  int:0..100000000        --cache-reuse
args                asks  args
""")
# What a tier says of its own model.
MODEL_OPTIONS = _option_table("""
mmproj                files  file                    --mmproj -mm
chat_template         free   text                    --chat-template
chat_template_file    files  file                    --chat-template-file
chat_template_kwargs  free   json                    --chat-template-kwargs
draft                 files  file                    -md --model-draft --spec-draft-model
speculative           free   auto|ngram|mtp|off      --spec-type
lora                  files  files                   --lora
embedding             free   bool                    --embedding --embeddings
pooling               free   none|mean|cls|last|rank --pooling
rope_freq_base        free   number:0..1e12          --rope-freq-base
rope_freq_scale       free   number:0..1e6           --rope-freq-scale
yarn_ext_factor       free   number:-1..1e3          --yarn-ext-factor
yarn_attn_factor      free   number:-1..1e3          --yarn-attn-factor
yarn_beta_slow        free   number:-1..1e6          --yarn-beta-slow
yarn_beta_fast        free   number:-1..1e6          --yarn-beta-fast
""")
TIER_SERVER_OPTIONS = {**SERVER_OPTIONS, **MODEL_OPTIONS}
FILE_KEYS = tuple(
    key for key, option in MODEL_OPTIONS.items()
    if option.kind in ("file", "files"))
# What `sampler` holds, within the bounds that llama-server accepts.
SAMPLER_OPTIONS = _option_table("""
temp     free  number:0..10   --temp --temperature
top_p    free  number:0..1    --top-p
top_k    free  int:0..100000  --top-k
min_p    free  number:0..1    --min-p
rep_pen  free  number:0..10   --repeat-penalty
""")
# What opencode shows as the cost of an answer: key -> opencode's own name of it.
# What `probe` finds out of a model, where a tier does not say it itself.
PROBED_KEYS = ("tool_call", "reasoning")
PRICE_KEYS = {
    "price_input_per_1m": "input",
    "price_output_per_1m": "output",
    "price_cache_read_per_1m": "cache_read",
    "price_cache_write_per_1m": "cache_write",
}

DEFAULT_OPTIONS = _option_table("""
host                   own-host  host
router_host            own-host  host
router_port            free      int:1..65535
engine_port            free      int:1..65535
litellm_port           free      int:1..65535
engine                 free      auto|llama-swap|embedded
memory_gb              free      gb_or_auto:0.1..100000
allow_unauthenticated  asks      bool
build_model            free      agent|auto
decision_log           free      bool
park_gb                free      gb:0..100000
park_after_s           free      int:0..86400
park_every_min         free      int:0..100000
loading_state          free      visible|comments|off
local_only             free      bool
patience_s             free      int:0..3600
allowed_origins        asks      origins
allowed_hosts          asks      hosts
unknown_model          free      error|auto
""")
DEFAULT_OPTIONS["router_host"] = DEFAULT_OPTIONS["host"]._replace(field="host")
DEFAULT_OPTIONS.update(SERVER_OPTIONS)
TIER_OPTIONS = _option_table("""
tier                      free    text
role                      free    text
backend                   free    gguf|litellm|openai
hf_repo                   free    repo
hf_file                   free    hub_file
hf_repo_next              free    repo
hf_file_next              free    hub_file
path                      inside  text
model                     no-url  text
model_next                no-url  text
base_url                  asks    url
api_key_env               asks    text
ctx_size                  free    tokens:256..100000000
max_output_tokens         free    tokens:1..100000000
size_gb                   free    gb:0..100000
size_gb_next              free    gb:0..100000
quant                     free    text
quant_next                free    text
sampler                   free    sampler
rope_scaling              free    rope
description               free    text
aliases                   free    names
ttl                       free    int:0..31536000
tool_call                 free    bool
reasoning                 free    bool
price_input_per_1m        free    number:0..1e6
price_output_per_1m       free    number:0..1e6
price_cache_read_per_1m   free    number:0..1e6
price_cache_write_per_1m  free    number:0..1e6
""")
TIER_OPTIONS.update(TIER_SERVER_OPTIONS)
ROUTING_OPTIONS = _option_table("""
high_fidelity_ceiling  free  tokens:0..100000000
mid_fidelity_ceiling   free  tokens:0..100000000
multi_turn             free  int:1..1000000
ultra_triggers         free  triggers
stay                   free  no|loop|warm
stay_s                 free  int:0..86400
""")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_ALIAS = re.compile(r"[A-Za-z0-9*?\[][A-Za-z0-9._/:@*?\[\]-]{0,126}\Z")  # org/model:tag
_WILDCARD = re.compile(r"[*?\[]")
_HOST_NAMES = r"(?:\*\.)?[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*(?::[0-9]{1,5})?\Z"
# Every page there is (https://*) is no pattern; every page of an editor's own scheme is one.
_ORIGIN_PATTERN = (
    rf"(?:https?://)?{_HOST_NAMES}|(?!https?:)[a-z][a-z0-9+.-]*://(?:\*|[A-Za-z0-9._-]+)\Z")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")
_HUB_PATH = re.compile(r"(?!.*(?:^|/)\.\.?(?:/|\Z))[^/\\:\x00-\x1f]+(?:/[^/\\:\x00-\x1f]+)*\Z")
_ROPE = re.compile(
    r"yarn\s*\(\s*(?:type\s*=\s*\w+\s*,\s*)?scale\s*=\s*([0-9]+(?:\.[0-9]+)?)\s*,"
    r"\s*orig_ctx\s*=\s*([0-9_]+[kK]?)\s*\)\Z",
    re.IGNORECASE)
_TRIGGER = re.compile(r"\[[\w-]+\]|[\w-]+:")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

# ---- what may be a secret

# Names that would hold a secret, whatever the value; values that look like one, whatever the name.
_SECRET_NAME = re.compile(
    r"api[_-]?key(?!_env)|token(?!s)|secret|passw|aws_|role_arn|credential|private_key|bearer"
    r"|authoriz")
_SECRET_VALUE = re.compile(
    r"\b(?:sk|pk|rk|gsk|xai|nvapi|pplx|csk|fw)[-_][A-Za-z0-9_-]{16,}|\bhf_[A-Za-z0-9]{20,}"
    r"|\b(?:gh[opsu]|github_pat)_[A-Za-z0-9_]{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{30,}|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\beyJ[A-Za-z0-9_-]{16,400}\.[A-Za-z0-9_-]{16,}"      # bounded: each start is read to its end
    r"|\barn:aws:iam::|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s:@]+@"
)
# What names a model may look as it likes.
_MODEL_NAME = re.compile(
    r"\bhf_repo(?:_next)?\s*[=:]\s*[\w.-]+/[\w.-]+|(?<![^\s=:;#])[^\s=:;#]+\.gguf\b",
    re.IGNORECASE)
# A host is asked by what it is here, so no user, query or escape.
_BASE_URL = re.compile(
    r"https?://(?:[\w-]{1,63}(?:\.[\w-]{1,63})*\.?|\[[0-9A-Fa-f:.]{2,45}\])"
    r"(?::([0-9]{1,5}))?(?:/[\w.~/-]*)?\Z",
    re.ASCII)
# The name of a variable is told from a key by its shape.
_VARIABLE = re.compile(r"_?[A-Z][A-Z0-9]{0,23}(?:_+[A-Z0-9]{1,24})*\Z")
_MAY_LOOK_RANDOM = frozenset({
    "hf_repo", "hf_repo_next", "hf_file", "hf_file_next", "path", "model", "model_next",
    "llama_server_bin", *FILE_KEYS})
_OPAQUE = re.compile(r"(?=[^\s]*[0-9])(?=[^\s]*[a-z])(?=[^\s]*[A-Z])[A-Za-z0-9+/]{32,}={0,2}\Z")

Shape = Union[str, Pattern[str]]


# ---- what a value is, by the kind of its option


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    import difflib
    if len(word) > 64:                          # the comparison takes the square of its length
        return ""
    for near in difflib.get_close_matches(word, list(known), 1, 0.5):
        return f", did you mean {near}?"
    return ""


def _shaped(pattern: Shape, text: str, what: str) -> str:
    """The text, where it has this shape. Errors: ValueError, whose words end with `what`."""
    if not re.match(pattern, text):
        raise ValueError(f"{text!r} {what}")
    return text


def _parse_whole(text: str) -> int:
    return int(_shaped(r"-?[0-9]+(?:_[0-9]+)*\Z", text, "is not a whole number"))


def _parse_decimal(text: str) -> float:
    return float(_shaped(r"-?[0-9]*\.?[0-9]+\Z", text, "is not a number"))


def parse_tokens(text: str) -> int:
    """`64k` = 65536, `131_072`, `32000` -> tokens. Errors: ValueError."""
    _shaped(r"[0-9]+(?:_[0-9]+)*[kK]?\Z", text,
            "is not a number of tokens, such as 65536, 131_072 or 64k")
    if text[-1] in "kK":
        return int(text[:-1]) * 1024
    return int(text)


def _parse_gb(text: str, what: str = "is not a size in GB") -> float:
    _shaped(r"(?i)~?\s*[0-9]+(?:\.[0-9]+)?\s*(?:gb)?\Z", text, what)
    return float(text.lower().strip("~gb \t"))


_NUMBERS: Dict[str, Callable[[str], float]] = {
    "int": _parse_whole,
    "number": _parse_decimal,
    "tokens": parse_tokens,
    "gb": _parse_gb,
    "gb_or_auto": functools.partial(_parse_gb, what="is not a size in GB or auto"),
}


def _parse_number(option: Option, text: str) -> float:
    number = _NUMBERS[option.kind](text)
    if not option.low <= number <= option.high:
        raise ValueError(f"{text} is not from {option.low:,.13g} to {option.high:,.13g}")
    return number


# Kind -> the shape of a text, and what is said of another.
_SHAPES: Dict[str, Tuple[Shape, str]] = {
    "text": ("", ""),
    "host": (r"[A-Za-z0-9.:_-]+\Z", "is not a host name or address"),
    "repo": (_REPO, "is not of the form owner/name"),
    "hub_file": (_HUB_PATH, "is not the name of a file in a repository"),
    "overrides": (r"[^\s=,]+=[\w:.-]+(?:,[^\s=,]+=[\w:.-]+)*\Z", "is not of the form exps=CPU"),
    "proportions": (r"[0-9]+(?:\.[0-9]+)?(?:,[0-9]+(?:\.[0-9]+)?)*\Z", "is not of the form 3,1"),
    "devices": (r"[\w:.-]+(?:,[\w:.-]+)*\Z", "is not of the form CUDA0,CUDA1"),
}
# The same for each part of a list.
_LISTS: Dict[str, Tuple[Shape, str]] = {
    "names": (_ALIAS, "is not a name, such as coder, org/model:tag or gpt-*"),
    "hosts": (_HOST_NAMES, "is no host name, such as box.lan or *.example.com"),
    "origins": (
        _ORIGIN_PATTERN,
        "is no origin, such as https://app.example.com, *.example.com or vscode-webview://*"),
}


def _parts(text: str) -> List[str]:
    """What stands between the commas of a list."""
    parts = (part.strip() for part in text.split(","))
    return [part for part in parts if part]


def _parse_bool(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(f"{text!r} is not yes or no")
    return text.lower() in _TRUE


def _parse_layers(text: str) -> str:
    shape = r"(?:auto|all|-1|[0-9](?:_?[0-9]){0,5})\Z"
    return _shaped(shape, text, "is not a number of layers, auto or all").replace("_", "")


def _parse_url(text: str) -> str:
    match = _BASE_URL.match(text)
    if match and len(text) <= 512:
        port = int(match.group(1) or 80)
        if 0 < port < 65_536:
            return text
    raise ValueError("not of the form https://host[:port][/path], such as"
                     " https://api.groq.com/openai/v1")


def _parse_sampler(text: str) -> Tuple[Tuple[str, float], ...]:
    values: Dict[str, float] = {}
    for part in _parts(text):
        key, _, value = map(str.strip, part.partition("="))
        option = SAMPLER_OPTIONS.get(key)
        if option is None:
            near = _did_you_mean(key, SAMPLER_OPTIONS)
            raise ValueError(f"there is no {key!r}{near}")
        if key in values:
            raise ValueError(f"{key} is given twice")
        try:
            values[key] = _parse_number(option, value)
        except ValueError:
            # What _parse_number says names no key, and here are several.
            kind = option.kind.replace("int", "whole number")
            raise ValueError(f"{key} = {value or 'nothing'} is not a {kind} from {option.low:g} to"
                             f" {option.high:g}") from None
    return tuple(values.items())


def _parse_rope(text: str) -> Tuple[float, int]:
    match = _ROPE.match(text)
    if not match:
        raise ValueError(f"{text!r} is not of the form yarn (scale=4, orig_ctx=32768)")
    scale = float(match.group(1))
    if not 1 <= scale <= 1000:
        raise ValueError(f"scale={match.group(1)} is not from 1 to 1000")
    return scale, parse_tokens(match.group(2))


def _parse_triggers(text: str) -> Tuple[str, ...]:
    found = tuple(trigger.lower() for trigger in _TRIGGER.findall(text))
    if text and not found:
        raise ValueError(f"{text!r} names no trigger of the form [word] or word:")
    return found


# Flags that args may not hold, and why.
_REFUSED_FLAGS = {
    "the engine says it itself":
        "--host --port --api-key --api-key-file -a --alias --slot-save-path --api-prefix"
        " --cors-origins --cors-methods --cors-headers --cors-credentials --no-cors-credentials"
        " --reuse-port --ssl-key-file --ssl-cert-file --no-slots --models-dir --models-preset"
        " --offline",
    "llama-server would print something and end":
        "-h --help --usage --version -cl --cache-list --completion-bash --list-devices",
    "hf_repo and hf_file, or path, name the model":
        "-m --model -mu --model-url -dr --docker-repo -hf -hfr --hf-repo -hff --hf-file",
    "ctx_size says it": "-c --ctx-size",
    "rope_scaling says it": "--rope-scaling --rope-scale --yarn-orig-ctx",
}


def _why_refused(flag: str) -> str:
    """Why `args` may not hold a flag of llama-server, "" where it may."""
    for why, flags in _REFUSED_FLAGS.items():
        if flag in flags.split():
            return why
    for key, option in TIER_SERVER_OPTIONS.items():
        if flag in option.flags:
            return f"{key} says it"
    for option in SAMPLER_OPTIONS.values():
        if flag in option.flags:
            return "sampler says it"
    return ""


Flag = Tuple[str, ...]                          # a flag of llama-server, with its values behind it


def group_args(words: Sequence[str]) -> List[Flag]:
    """The words of `args`, each flag with its values. llama-server reads --a_b as --a-b."""
    groups: List[Flag] = []
    for word in words:
        if word.startswith("--"):
            word = word.replace("_", "-")
        if re.match(r"--?[A-Za-z]", word):
            groups.append((word,))
        elif groups:
            groups[-1] += (word,)
        else:
            raise ValueError(f"{word!r} follows no flag")
    return groups


def _parse_args(text: str) -> Tuple[str, ...]:
    import shlex
    try:
        groups = group_args(shlex.split(text))
    except ValueError as exc:
        raise ValueError(f"it cannot be split as a shell would: {exc}") from None
    for flag, *_ in groups:
        name, _, _ = flag.partition("=")
        why = _why_refused(name)
        if why:
            raise ValueError(f"{flag} is not for args: {why}")
    return tuple(itertools.chain(*groups))


def _parse_object(text: str) -> str:
    try:
        if isinstance(json.loads(text), dict):
            return text
    except (ValueError, RecursionError):
        pass
    raise ValueError(f'{text!r} is not a JSON object, such as {{"enable_thinking": false}}')


def _parse_file(text: str) -> str:
    """A path, or a file of the hub as OWNER/NAME:FILE."""
    if re.match(r"[\w.-]+/[\w.-]+:", text):
        _shaped(_HUB_REFERENCE, text, "is not of the form OWNER/NAME:FILE")
    return text


def _parse_files(text: str) -> Tuple[str, ...]:
    return tuple(map(_parse_file, _parts(text)))


_READERS: Dict[str, Callable[[str], Any]] = {
    "args": _parse_args,
    "bool": _parse_bool,
    "file": _parse_file,
    "files": _parse_files,
    "json": _parse_object,
    "layers": _parse_layers,
    "rope": _parse_rope,
    "sampler": _parse_sampler,
    "triggers": _parse_triggers,
    "url": _parse_url,
}


def _parse_choice(option: Option, text: str) -> str:
    choice = text.lower()
    if choice not in option.choices:
        near = _did_you_mean(text, option.choices)
        raise ValueError(f"{text!r} is not one of {', '.join(option.choices)}{near}")
    return choice


def parse_value(option: Option, text: str) -> Any:
    """Read one value as its option says. Errors: ValueError; its sentence never shows a secret."""
    kind = option.kind
    if kind == "gb_or_auto" and text.lower() == "auto":
        return 0.0
    if kind in _NUMBERS:
        return _parse_number(option, text)
    if kind == "choice":
        return _parse_choice(option, text)
    if kind in _SHAPES:
        shape, what = _SHAPES[kind]
        return _shaped(shape, text, what)
    if kind in _LISTS:
        shape, what = _LISTS[kind]
        if kind != "names":                     # hosts are the same in any case, models are not
            text = text.lower()
        return tuple(_shaped(shape, part, what) for part in _parts(text))
    return _READERS[kind](text)


# ---- the lines of the file


class IniLine(NamedTuple):
    """A [section], or a key with its value, and where it stands."""

    number: int
    section: str
    key: str                                    # "" for the [section] itself
    value: str


_SECTION = re.compile(r"\[([^\]]+)\][ \t]*(?:#.*)?\Z")
_KEY_VALUE = re.compile(r"(?!\[)([^:=]+)[:=](.*)\Z", re.DOTALL)
_ALIAS_VALUE = re.compile(r"([^=]+)=(.*)\Z", re.DOTALL)    # a pattern may hold a colon
_LEAK = ("this line holds what looks like a key or password; the file is served and committed, so"
         " take it out (and revoke it)")
_CREDENTIALS_ADVICE = "credentials come from the environment, never from this file"
# An empty list of these is another than none.
_MAY_BE_EMPTY = ("triggers", "names")


def _odd_space(*texts: str) -> str:
    """White space other than space and tab at an end of one of the texts, as U+XXXX, or ""."""
    ends = "".join(text[:1] + text[-1:] for text in texts)
    for char in ends:
        if char.isspace() and char not in " \t":
            return f"U+{ord(char):04X}"
    return ""


def _secret_problem(key: str, value: str) -> str:
    """Why a key or its value may not stand in models.ini, or "". Never repeats the value."""
    if key not in TIER_OPTIONS and key not in DEFAULT_OPTIONS and _SECRET_NAME.search(key):
        return f"{key} would hold a secret: {_CREDENTIALS_ADVICE}"
    if key == "api_key_env" and value and not _VARIABLE.match(value):
        return ("api_key_env names the environment variable that holds the key, such as"
                " GROQ_API_KEY; the key itself stays there")
    if key not in _MAY_LOOK_RANDOM and _OPAQUE.match(value):
        return (f"the value of {key} looks like a key or password: {_CREDENTIALS_ADVICE}"
                " (and revoke it)")
    return ""


class IniReader:
    """The sections and keys of an ini text with their lines; its problems and what is odd in it.

    This is the only reader of the file: what it does not see has no value. configparser knows
    neither the lines of keys nor more than one problem at a time, and skips any white space of
    Unicode. A line that holds a secret is a problem and counts as not there.
    """

    def __init__(self, text: str, source: str = "models.ini") -> None:
        self.source = source
        self.problems: List[Tuple[int, str]] = []
        self.warnings: List[str] = []
        self.holds_secret = False
        self.sections: Dict[str, List[IniLine]] = {}
        self._first: Dict[Tuple[str, str], IniLine] = {}    # by section and key
        self._section: Optional[str] = ""       # None below a heading that cannot be shown
        self._indent, self._key = 0, ""         # of the last line with a key, "" after a heading
        for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
            self._read(number, line)

    def wrong(self, line: int, what: str) -> None:
        self.problems.append((line, what))

    def wrong_key(self, section: str, key: str, what: str) -> None:
        self.wrong(self.line_of(section, key), what)

    def warn(self, line: int, what: str, word: str = "", known: Iterable[str] = ()) -> None:
        """Say what is odd, and which of the known words may have been meant."""
        if len(self.warnings) < MAX_SHOWN_PROBLEMS:
            near = _did_you_mean(word, known)
            self.warnings.append(f"{self.source}:{line}: {what}{near}")

    def _read(self, number: int, line: str) -> None:
        stripped = line.strip(" \t")
        # A comment is served and committed like any other line, so it is looked at, too.
        leaks = bool(_SECRET_VALUE.search(_MODEL_NAME.sub("", stripped)))
        if leaks:
            self._hide(number, _LEAK)
        if not stripped or stripped[0] in "#;":
            return
        text = re.split(r"[ \t];", stripped, maxsplit=1)[0].rstrip(" \t")
        heading = _SECTION.match(text)
        indent = len(line) - len(line.lstrip(" \t"))
        if self._key and indent > self._indent:
            if not leaks:
                self.wrong(
                    number, "indented, so it continues the value above; take the spaces away")
        elif heading:
            self._section, self._key = heading.group(1), ""
            if leaks:
                self._section = None
            self._add(number, "", "")
        elif not leaks:
            self._read_key(number, text, indent)

    def _read_key(self, number: int, text: str, indent: int) -> None:
        pattern = _KEY_VALUE
        if self._section == "ALIASES":
            pattern = _ALIAS_VALUE
        match = pattern.match(text)
        key = value = ""
        if match:
            key, value = (part.strip(" \t") for part in match.groups())
        odd = _odd_space(text, key, value)
        if odd:
            self.wrong(
                number, f"the white space {odd} stands beside a key or value; use a plain space")
        elif not key:
            self.wrong(number, "neither a [section], a key = value nor a comment")
        elif not key.isascii():
            # Before it is in lower case: the sign for Kelvin is an ASCII k then.
            foreign = re.sub("[\x00-\x7f]", "", key)
            code = f"U+{ord(foreign[0]):04X}"
            self.wrong(number, f"a key holds ASCII characters only, and this one has {code}")
        elif self._section == "":
            self.wrong(number, f"{key.lower()} stands before any [section]")
        else:
            self._key = key.lower()
            self._indent = indent
            self._add(number, self._key, value)

    def _hide(self, number: int, what: str) -> None:
        self.holds_secret = True
        self.wrong(number, what)

    def _add(self, number: int, key: str, value: str) -> None:
        name = self._section
        if name is None:
            return
        secret = _secret_problem(key, value)
        if secret:
            self._hide(number, secret)
            return
        line = IniLine(number, name, key, value)
        first = self._first.setdefault((name, key), line)
        # Both are read all the same, so that what is wrong with either is said at once.
        if first is not line:
            what = f"[{name}]"
            if key:
                what = f"{key} in [{name}]"
            self.wrong(number, f"{what} is there twice, first on line {first.number}")
        self.sections.setdefault(name, []).append(line)

    def line_of(self, section: str, key: str = "") -> int:
        """Where a section, or a key of it, stands first; 0: nowhere."""
        line = self._first.get((section, key))
        if line is None:
            return 0
        return line.number

    def keys_of(self, section: str) -> List[IniLine]:
        lines = self.sections.get(section, ())
        return [line for line in lines if line.key]

    def values_of(self, section: str, options: Mapping[str, Option]) -> Dict[str, Any]:
        """Read one section's keys against its table."""
        values: Dict[str, Any] = {}
        for line in self.keys_of(section):
            key, option = line.key, options.get(line.key)
            if option is None:
                self.warn(line.number, f"unknown key {key} in [{section}]", key, options)
            # A key without a value says nothing: its usual value counts.
            elif line.value or option.kind in _MAY_BE_EMPTY:
                try:
                    values[option.field or key] = parse_value(option, line.value)
                except ValueError as exc:
                    self.wrong(line.number, f"{key}: {exc}")
        return values

    def shown_problems(self) -> List[str]:
        """Its problems as `source:LINE: what`, in the order of their lines."""
        shown = []
        problems = sorted(set(self.problems))
        for index, (line, what) in enumerate(problems):
            if index == MAX_SHOWN_PROBLEMS:
                what = f"and {len(problems) - index:,} more problems from here"
            shown.append(f"{self.source}:{line}: {what}")
        return shown[:MAX_SHOWN_PROBLEMS + 1]


def holds_secret(text: str) -> bool:
    """True when a models.ini, comments included, would give a secret away to its readers."""
    return IniReader(text).holds_secret


# ---- what goes together: hosts, models, names, ports


def _check_host(reader: IniReader, tier: Tier) -> None:
    """base_url and api_key_env stand where they mean something; a key unencrypted is warned of."""
    name = tier.name
    url, variable = tier.base_url, tier.api_key_env
    at = reader.line_of(name, "base_url")
    if tier.backend == "openai":
        if not at:
            reader.wrong_key(name, "", f"[{name}] has backend = openai but no base_url")
    elif url and tier.backend == "litellm":
        reader.wrong(
            at, "base_url is for backend = openai; LiteLLM's is api_base in litellm_config.yaml")
    elif url:
        reader.wrong(at, "base_url is for backend = openai and needs a model")
    if variable and tier.backend == "gguf":
        reader.wrong_key(
            name, "api_key_env", f"api_key_env is for hosted tiers, and [{name}] runs a GGUF here")
    if variable == "LLMSTACK_API_KEY":
        reader.wrong_key(
            name, "api_key_env", "LLMSTACK_API_KEY is the router's own key and goes to no host")
    # A key on its way to this very machine is read by nobody else.
    elif variable and url.startswith("http:") and not _LOCAL_URL.match(url):
        reader.warn(at, f"the key in {variable} travels unencrypted; https would protect it")


def _check_model(reader: IniReader, tier: Tier, written: Mapping[str, str]) -> None:
    """A tier names a model for its backend; `written` are its keys as they stand there."""
    name = tier.name
    if tier.backend != "gguf":
        for key in tier.settings:
            at = reader.line_of(name, key)
            reader.warn(at, f"{key} is for llama-server, and [{name}] is hosted")
        if not tier.model:
            reader.wrong_key(name, "", f"[{name}] has backend = {tier.backend} but no model")
        return
    # As written: what has the wrong shape is no value, and is told already.
    in_hub = written.get("hf_repo") and written.get("hf_file")
    if not (tier.path or in_hub):
        reader.wrong_key(
            name, "", f"[{name}] names no model: hf_repo and hf_file, path, or model")
    elif tier.hf_file_next and not (tier.hf_repo_next or tier.hf_repo):
        reader.wrong_key(name, "hf_file_next", "hf_file_next needs hf_repo_next or hf_repo")


def _implied_backend(values: Mapping[str, Any], written: Mapping[str, str]) -> str:
    if not values.get("model"):
        return "gguf"
    if written.get("base_url"):
        return "openai"
    return "litellm"


def _pop_values(values: Dict[str, Any], keys: Mapping[str, Any]) -> Dict[str, Any]:
    """Take these keys out of `values`; an empty list says nothing."""
    own = {}
    for key in list(values):
        if key in keys:
            own[key] = values.pop(key)
    return {key: value for key, value in own.items() if value != ()}


def _read_tier(reader: IniReader, name: str) -> Tier:
    """The tier of a section."""
    written = {line.key: line.value for line in reader.keys_of(name)}
    values = reader.values_of(name, TIER_OPTIONS)
    server = _pop_values(values, TIER_SERVER_OPTIONS)
    prices = _pop_values(values, PRICE_KEYS)
    scale, orig_ctx = values.pop("rope_scaling", (0.0, 0))
    role = values.get("role", "")
    # What a section leaves out follows from its role, and from what else it says.
    settings = {
        "aliases": ROLE_ALIASES.get(role, ()),
        "ttl": ROLE_TTL_S.get(role, 1200),
        "description": name,
        "backend": _implied_backend(values, written),
        "settled": tuple(key for key in PROBED_KEYS if written.get(key)),
        "server": tuple(server.items()),
        "prices": tuple((PRICE_KEYS[key], price) for key, price in prices.items()),
        "rope_scale": scale,
        "rope_orig_ctx": orig_ctx,
        **values,
    }
    tier = Tier(name, **settings)
    _check_host(reader, tier)
    _check_model(reader, tier, written)
    return tier


def _check_names(reader: IniReader, tiers: Sequence[Tier]) -> None:
    """Each tier has a name that a model can have, and a role that no other has."""
    # The ladder asks for the tier of a role: two would be a matter of luck.
    roles: Dict[str, str] = {}
    for tier in tiers:
        name, role = tier.name, tier.role
        if name.lower() in RESERVED_NAMES:
            reader.wrong_key(name, "", f"[{name}] is a reserved name")
        elif not _NAME.match(name):
            reader.wrong_key(name, "", f"[{name}] is not a name a model can have")
        if not role:
            continue
        at = reader.line_of(name, "role")
        owner = roles.setdefault(role, name)
        if owner != name:
            reader.wrong(at, f"role {role} belongs to [{owner}] already")
        if role not in KNOWN_ROLES:
            reader.warn(at, f"role {role} is none that auto or the agents know", role, KNOWN_ROLES)


def _own_aliases(reader: IniReader, tier: Tier, owners: Dict[str, str]) -> Tuple[str, ...]:
    """Those of a tier's aliases that are free; `owners` (name -> tier) learns them.

    An alias that comes with the role, and is not written, gives way to any other.
    """
    at = reader.line_of(tier.name, "aliases")
    aliases = []
    for alias in tier.aliases:
        # A pattern leads elsewhere only where no name does, see _alias_patterns.
        if _WILDCARD.search(alias):
            continue
        if alias.lower() in RESERVED_NAMES or is_auto(alias):
            reader.wrong(at, f"alias {alias} is a reserved name")
        elif alias not in owners:
            owners[alias] = tier.name
            aliases.append(alias)
        elif at and owners[alias] != tier.name:
            reader.wrong(at, f"alias {alias} belongs to [{owners[alias]}] already")
    return tuple(aliases)


def _with_own_aliases(reader: IniReader, tiers: Sequence[Tier]) -> Tuple[Tier, ...]:
    """The tiers, each name of which leads to one of them."""
    owners = {tier.name: tier.name for tier in tiers}

    def is_implied(tier: Tier) -> bool:
        return not reader.line_of(tier.name, "aliases")

    named = {}
    # The written ones first: those that come with a role give way to them.
    for tier in sorted(tiers, key=is_implied):
        aliases = _own_aliases(reader, tier, owners)
        named[tier.name] = tier._replace(aliases=aliases)
    return tuple(named[tier.name] for tier in tiers)


def _alias_patterns(reader: IniReader, tiers: Sequence[Tier]) -> Tuple[Tuple[str, str], ...]:
    """The patterns for names: those of the tiers' own aliases, then [ALIASES] or the defaults."""
    known = ["auto", *KNOWN_ROLES]
    patterns = []
    for tier in tiers:
        known += tier.names
        for alias in filter(_WILDCARD.search, tier.aliases):
            patterns.append((alias.lower(), tier.name))
    if "ALIASES" not in reader.sections:
        return (*patterns, *DEFAULT_ALIASES)
    for line in reader.keys_of("ALIASES"):
        pattern, target = line.key, line.value
        if not _ALIAS.match(pattern):
            what = f"{pattern} is no name and no pattern of names, such as gpt-*"
            reader.wrong(line.number, what)
        elif target not in known:
            near = _did_you_mean(target, known)
            what = f"{target or 'nothing'} is no tier, no role and not auto{near}"
            reader.wrong(line.number, what)
        patterns.append((pattern, target))
    return tuple(patterns)


# What a text may not hold anywhere, and what is said of it. A value is printed in many places, and
# a terminal would obey control characters; a CR alone is a new line to some editors.
_UNREADABLE = (
    (re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)"),
     "holds the control character {!r}; take it out"),
    (re.compile(rf"[^\n]{{{MAX_INI_LINE + 1}}}"), f"is longer than {MAX_INI_LINE:,} characters"),
)


def _check_readable(text: str, source: str) -> None:
    """Before a text of any origin is read at all. Errors: ConfigError."""
    if len(text) > MAX_INI_BYTES:
        raise ConfigError([f"{source}:1: is over {MAX_INI_BYTES:,} bytes"])
    for pattern, what in _UNREADABLE:
        found = pattern.search(text)
        if found:
            line = text.count("\n", 0, found.start()) + 1
            what = what.format(found.group())
            raise ConfigError([f"{source}:{line}: {what}"])


def _check_ports(reader: IniReader, config: Config) -> None:
    taken: Dict[int, str] = {}
    for key in ("router_port", "engine_port", "litellm_port"):
        port = getattr(config, key)
        other = taken.setdefault(port, key)
        if other != key:
            at = reader.line_of("DEFAULT", other) or reader.line_of("DEFAULT", key)
            reader.wrong(at, f"{other} and {key} are both {port}")


def _check_cache(reader: IniReader, config: Config) -> None:
    """llama-server refuses a quantised V without flash attention: no model would load."""
    sections: Dict[str, Dict[str, Any]] = {"DEFAULT": {}}
    for tier in config.tiers:
        sections[tier.name] = tier.settings
    for section, own in sections.items():
        settings = {**config.settings, **own}
        cache_type = settings["cache_type_v"]
        quantised = cache_type not in ("f32", "f16", "bf16")
        # A tier that says nothing of either inherits both, and [DEFAULT] is told already.
        at = reader.line_of(section, "flash_attn") or reader.line_of(section, "cache_type_v")
        if at and quantised and settings["flash_attn"] == "off":
            reader.wrong(at, f"flash_attn = off and cache_type_v = {cache_type} go not together:"
                             " set cache_type_v = f16, or flash_attn = on")


def _read_routing(reader: IniReader) -> Routing:
    values = reader.values_of("ROUTING", ROUTING_OPTIONS)
    routing = Routing(**values)
    high = routing.high_fidelity_ceiling
    mid = routing.mid_fidelity_ceiling
    if high > mid:
        at = reader.line_of("ROUTING", "high_fidelity_ceiling") or reader.line_of("ROUTING")
        reader.wrong(at, f"high_fidelity_ceiling {high:,} is above mid_fidelity_ceiling {mid:,}")
    return routing


# The sections that are no tiers.
_OTHER_SECTIONS = ("DEFAULT", "ROUTING", "ALIASES")


def _tier_sections(reader: IniReader) -> List[str]:
    """The names of all tiers. Errors: ConfigError where there are too many."""
    sections = [name for name in reader.sections if name not in _OTHER_SECTIONS]
    # Another machine's file may be made to be slow.
    if len(sections) > MAX_INI_SECTIONS:
        line = reader.line_of(sections[MAX_INI_SECTIONS])
        what = f"there are more than {MAX_INI_SECTIONS:,} sections"
        raise ConfigError([f"{reader.source}:{line}: {what}"])
    # A section without a key says nothing, so it is no tier.
    return [name for name in sections if reader.keys_of(name)]


def parse_models_ini(text: str, source: str = "models.ini") -> Tuple[Config, Tuple[str, ...]]:
    """Return (config, warnings) for the text of a models.ini.

    Strict and kind: every problem of the file at once, each as `source:LINE: what`.
    Errors: ConfigError.
    """
    _check_readable(text, source)
    reader = IniReader(text, source)
    values = reader.values_of("DEFAULT", DEFAULT_OPTIONS)
    settings = _pop_values(values, SERVER_OPTIONS)
    values["routing"] = _read_routing(reader)
    tiers = [_read_tier(reader, name) for name in _tier_sections(reader)]
    _check_names(reader, tiers)
    values["tiers"] = _with_own_aliases(reader, tiers)
    values["aliases"] = _alias_patterns(reader, tiers)
    config = Config(**values).with_settings(settings)
    _check_ports(reader, config)
    _check_cache(reader, config)
    if reader.problems:
        raise ConfigError(reader.shown_problems())
    return config, tuple(reader.warnings)


# ---- what needs trust


def _effect_text(option: Option, value: Any) -> str:
    """A value as models.ini would have it."""
    if value is True:
        return "yes"
    if not isinstance(value, tuple):
        return str(value)
    between = ", "
    if option.kind == "args":
        between = " "
    return between.join(map(str, value))


def _values_of(record: Any) -> Dict[str, Any]:
    """The fields of a record, and its keys of llama-server beside them."""
    return {**record._asdict(), **dict(getattr(record, "server", ()))}


def _effects(prefix: str, record: Any, default: Any,
             options: Mapping[str, Option]) -> List[Tuple[str, str]]:
    """(key, value) of what a record holds that needs trust; `default` says nothing.

    A field with two keys, as host and router_host are, is shown by its first.
    """
    own = _values_of(record)
    usual = _values_of(default)
    found: Dict[str, Tuple[str, str]] = {}
    for key, option in options.items():
        field = option.field or key
        if own.get(field) == usual.get(field):
            continue
        text = _effect_text(option, own[field])
        if not option.harmless.match(text):
            found.setdefault(field, (prefix + key, text))
    return list(found.values())


def config_effects(config: Config) -> List[Tuple[str, str]]:
    """(key, value) of all in a models.ini that can have an effect outside its project.

    They are the values that the parser returned and the program uses: no spelling is overlooked.
    """
    effects = _effects("", config, Config(), DEFAULT_OPTIONS)
    effects += _effects("[ROUTING] ", config.routing, Routing(), ROUTING_OPTIONS)
    for tier in config.tiers:
        effects += _effects(f"[{tier.name}] ", tier, Tier(tier.name), TIER_OPTIONS)
    return effects


def decode_models_ini(data: bytes, source: str = "models.ini") -> str:
    """Bytes of a models.ini to text; a BOM is taken off. Errors: ConfigError with the line."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        # The codec counts from behind the BOM, and so does its object.
        rest, start = exc.object, exc.start
        line = rest.count(b"\n", 0, start) + 1
        what = f"byte 0x{rest[start]:02x} is not UTF-8; save the file as UTF-8"
        raise ConfigError([f"{source}:{line}: {what}"]) from None


# ==================================================================================================
# PURE: GENERATORS
# ==================================================================================================
# What a Config means to others: the command line of a llama-server, the sets of tiers that may be
# loaded together, llama-swap's configuration, the way of a request, the list of models. Both
# engines take their flags and their sets from here, so that they do the same.

PROXY = "litellm_proxy"                         # the engines' name for LiteLLM's proxy


class Weights(NamedTuple):
    """What a local tier runs on one channel."""

    repo: str
    file: str
    path: str
    size_gb: float
    quant: str
    channel: str                                # current | next


def local_tiers(config: Config) -> List[Tier]:
    return [tier for tier in config.tiers if tier.backend == "gguf"]


def weights_for(tier: Tier) -> Weights:
    """The GGUF that a local tier runs on its channel."""
    weights = Weights(tier.hf_repo, tier.hf_file, tier.path, tier.size_gb, tier.quant, "current")
    if tier.channel != "next" or tier.backend != "gguf":
        return weights
    # What an upgrade does not say is as it was, but for a path, which it replaces.
    return Weights(
        tier.hf_repo_next or weights.repo,
        tier.hf_file_next or weights.file,
        "",
        tier.size_gb_next or weights.size_gb,
        tier.quant_next or weights.quant,
        "next")


def both_weights(tier: Tier) -> Tuple[Weights, Weights]:
    """What a tier runs on the current channel, and on the next one."""
    return weights_for(tier.on_channel("current")), weights_for(tier.on_channel("next"))


def with_files(tier: Tier, find: Callable[[str], str]) -> Tier:
    """A tier whose further files (mmproj, draft, lora ...) are what `find` makes of them."""
    settings = tier.settings
    for key in FILE_KEYS:
        value = settings.get(key)
        if isinstance(value, tuple):
            settings[key] = tuple(map(find, value))
        elif value:
            settings[key] = find(value)
    return tier._replace(server=tuple(settings.items()))


# What `mmproj = auto` asks of a model's repository; no file has this name.
ANY_PROJECTOR = "mmproj*.gguf"
_PROJECTOR = re.compile(r"mmproj[^/]*\.gguf\Z", re.IGNORECASE)


def choose_projector(files: Iterable[str]) -> str:
    """The projector among a repository's files, "" for none; F16 before others."""
    names = sorted(filter(_PROJECTOR.match, files))
    for name in names:
        if "-F16" in name.upper():
            return name
    return "".join(names[:1])


def hub_files(tier: Tier) -> List[Tuple[str, str]]:
    """(repository, file) of what a tier needs of the hub besides its model.

    A file may be ANY_PROJECTOR.
    """
    values: List[str] = []

    def collect(value: str) -> str:
        values.append(value)
        return value

    with_files(tier, collect)
    found = []
    own_repo = weights_for(tier).repo
    for value in values:
        repo, _, file = value.partition(":")
        if _HUB_REFERENCE.match(value):
            found.append((repo, file))
        elif value == "auto" and own_repo:
            found.append((own_repo, ANY_PROJECTOR))
    return found


# ---- flags of llama-server

# A flag that builds of llama.cpp disagree about -> what says the same to the others. `--no-mmap`
# went in b10875 (2026-09-09); `--load-mode none` came around b10105.
FLAG_REPLACEMENTS: Dict[str, Flag] = {"--no-mmap": ("--load-mode", "none")}
# What `speculative` asks for -> llama-server's --spec-type. A draft alone is loaded and not used.
_SPEC_TYPES = {"ngram": "ngram-mod", "mtp": "draft-mtp", "draft": "draft-simple"}
_ROLE_FLAGS = {"embed": "--embedding", "rerank": "--reranking"}


def _number(value: float) -> str:
    return f"{value:g}"


def _option_flags(key: str, value: Any) -> List[Flag]:
    """What a key of TIER_SERVER_OPTIONS says on the command line."""
    option = TIER_SERVER_OPTIONS[key]
    if option.kind == "args":
        return group_args(value)
    if option.kind == "files":
        value = ",".join(value)
    elif option.kind == "number":
        value = _number(value)
    for flag in option.flags:
        if option.kind != "bool":
            return [(flag, str(value))]
        # A switch that is on by default has a second name for off; others are off unsaid.
        if flag.startswith("--no-") != value:
            return [(flag,)]
    return []


def tier_config(config: Config, tier: Tier) -> Config:
    """[DEFAULT] as it counts for one tier: what the tier says of SERVER_OPTIONS itself wins."""
    own = {key: value for key, value in tier.server if key in SERVER_OPTIONS}
    return config.with_settings(own)


# How much of a prompt a slot must hold to be taken for it. llama-server's default is 0.1: then a
# long conversation that comes back takes the slot of a side request with the same system text, is
# never looked for in the host's cache, and read anew (docs/conversations.md has figures).
SLOT_SIMILARITY = 0.8
SLOT_FLAG = ("--slot-prompt-similarity", str(SLOT_SIMILARITY))


def common_flags(config: Config) -> List[Flag]:
    """Flags every llama-server gets."""
    flags: List[Flag] = [SLOT_FLAG]
    for key, value in config.settings.items():
        flags += _option_flags(key, value)
    if "parallel" in config.settings:           # else each slot gets its part of the context
        flags.append(("--kv-unified",))
    # By default every web page may read what a llama-server says.
    return [*flags, ("--no-warmup",), ("--no-mmap",), ("--cors-origins", "localhost")]


def _speculation_flags(settings: Mapping[str, Any]) -> List[Flag]:
    asked = settings.get("speculative", "auto")
    # Who names a draft wants it used.
    if asked == "auto" and "draft" in settings:
        asked = "draft"
    if asked in _SPEC_TYPES:
        return [("--spec-type", _SPEC_TYPES[asked])]
    return []


def reading_ubatch(tier: Tier) -> int:
    """The ubatch of a tier that reads a text in one batch or refuses it; 0 for every other."""
    if tier.role not in _ROLE_FLAGS or "ubatch" in tier.settings:
        return 0
    return min(tier.ctx_size, 2048)


def tier_flags(tier: Tier) -> List[Flag]:
    """Flags of one tier besides its weights: name, context, YaRN, sampler, its model's own."""
    flags: List[Flag] = [
        ("--alias", tier.name),
        ("-c", str(tier.ctx_size)),
    ]
    if tier.rope_scale:
        flags += [
            ("--rope-scaling", "yarn"),
            ("--rope-scale", _number(tier.rope_scale)),
            ("--yarn-orig-ctx", str(tier.rope_orig_ctx)),
        ]
    if tier.cache_ram_mib >= 0:
        flags.append(("--cache-ram", str(tier.cache_ram_mib)))
    if tier.ctx_checkpoints >= 0:
        flags.append(("--ctx-checkpoints", str(tier.ctx_checkpoints)))
    for key, value in tier.sampler:
        option = SAMPLER_OPTIONS[key]
        flags.append((option.flags[0], _number(value)))
    settings = tier.settings
    # A tier that embeds or ranks does so by its role, whatever `embedding` says.
    if tier.role in _ROLE_FLAGS:
        flags.append((_ROLE_FLAGS[tier.role],))
        settings.pop("embedding", None)
    ubatch = reading_ubatch(tier)
    if ubatch:
        flags.append(("--ubatch-size", str(ubatch)))
    # What `speculative` asks for is no value of the flag's: _speculation_flags has it.
    speculation = _speculation_flags(settings)
    settings.pop("speculative", None)
    for key in MODEL_OPTIONS:
        if key in settings:
            flags += _option_flags(key, settings[key])
    return [*flags, *speculation]


def all_flags(tier: Tier, config: Config) -> List[Flag]:
    """Every flag of a tier besides its weights and where it listens."""
    return [*common_flags(tier_config(config, tier)), *tier_flags(tier)]


def weight_flags(weights: Weights) -> List[Flag]:
    if weights.path:
        return [("-m", weights.path)]
    return [("-hf", weights.repo), ("-hff", weights.file)]


def accepted_flags(flags: Iterable[Flag], refused: FrozenSet[str]) -> List[Flag]:
    """Replace or leave out what the installed llama-server refuses, by flag name."""
    kept = []
    for flag in flags:
        if flag[0] in refused:
            flag = FLAG_REPLACEMENTS.get(flag[0], flag)
        if flag[0] not in refused:
            kept.append(flag)
    return kept


def refused_settings(config: Config, refused: FrozenSet[str]) -> List[str]:
    """What to say of keys of models.ini that count nothing: a llama-server refuses their flags."""
    lost = refused - FLAG_REPLACEMENTS.keys()
    lines = []
    for tier in local_tiers(config):
        settings = {**config.settings, **tier.settings}
        for key, value in settings.items():
            refused_flags = [flag for flag in _option_flags(key, value) if flag[0] in lost]
            for flag in refused_flags:
                what = " ".join(flag)
                lines.append(f"[{tier.name}] {key}: this llama-server refuses {what}")
    return list(dict.fromkeys(lines))           # args may say the same flag twice


def settings_words(config: Config, tier: Tier) -> str:
    """What a tier's llama-server is told beyond the usual: `n_cpu_moe 20, draft d.gguf`."""
    words = []
    settings = {**config.settings, **tier.settings}
    for key, value in settings.items():
        if (key, value) in DEFAULT_SERVER:
            continue
        values = [str(value)]
        if isinstance(value, tuple):
            values = list(value)
        if key in FILE_KEYS:
            # A status line has room for a file's name, not for its path.
            values = [re.sub(r".*[/\\:]", "", name) for name in values]
        words.append(" ".join([key, *values]))
    return ", ".join(words)


def server_command(program: Sequence[str], tier: Tier, config: Config, port: int,
                   refused: FrozenSet[str]) -> List[str]:
    """The whole command line that serves `tier` on 127.0.0.1:`port`."""
    command = [*program, "--host", "127.0.0.1", "--port", str(port)]
    weights = weight_flags(weights_for(tier))
    for flag in [*weights, *accepted_flags(all_flags(tier, config), refused)]:
        command += flag
    return command


# ---- which tiers may be loaded together


class ResidencySet(NamedTuple):
    """Tiers that may be loaded together.

    `name` sorts in the order sets should win (llama-swap since v243).
    """

    name: str
    tiers: Tuple[str, ...]


# GB of each memory: of each card, then of the host; of one memory alone where all share it.
Needs = Tuple[float, ...]


def needs_together(needs: Iterable[Needs]) -> Needs:
    """What several tiers take of each memory."""
    return tuple(map(sum, itertools.zip_longest(*needs, fillvalue=0.0)))


def gb_words(needs: Needs) -> str:
    """`5.3 GB`, or what it is of each memory: `5.3 + 2.1 GB and 1.0 of the host's`."""
    *cards, host = [f"{need_gb:.1f}" for need_gb in needs]
    if not cards:
        return f"{host} GB"
    return f"{' + '.join(cards)} GB and {host} of the host's"


def fits_together(needs: Iterable[Needs], budgets_gb: Needs) -> bool:
    """Whether what takes so much of each memory may be loaded at once."""
    taken = needs_together(needs)
    return all(taken_gb <= budget_gb for taken_gb, budget_gb in zip(taken, budgets_gb))


MOST_GROWN = 24                                 # tiers


def _filled(base: Sequence[str], others: Iterable[str], need_gb: Mapping[str, Needs],
            budgets_gb: Needs) -> FrozenSet[str]:
    """A set with those of the others that fit beside it, the first come first."""
    members = set(base)
    taken = needs_together(need_gb[name] for name in base)
    for name in others:
        # One that does not fit is passed by: a smaller one behind it may.
        more = needs_together([taken, need_gb[name]])
        if name not in members and fits_together([more], budgets_gb):
            members.add(name)
            taken = more
    return frozenset(members)


def _grown(bases: Sequence[Tuple[str, ...]], names: Sequence[str], need_gb: Mapping[str, Needs],
           budgets_gb: Needs) -> List[Tuple[str, ...]]:
    """Each of `bases` with all that fits beside it; each other tier has its turn to come first.

    Where a need is not known nothing grows. No result lies within another, or within a base.
    """
    known = [name for name in names if any(need_gb.get(name, ()))]
    # A sum with an unknown part would promise memory that is not there.
    growing = [base for base in bases if set(base) <= set(known)]
    if len(names) > MOST_GROWN:                 # it takes the cube of their number
        growing = growing[:1]
    found = [frozenset(base) for base in bases]
    for base in growing:
        for first in known:
            members = _filled(base, [first, *known], need_gb, budgets_gb)
            if members not in found:
                found.append(members)
    kept = []
    for members in found[len(bases):]:
        if not any(members < other for other in found):
            kept.append(tuple(name for name in names if name in members))
    return kept


def _set_prefix(number: int, count: int) -> str:
    """Letters that sort as numbers do."""
    letters = chr(97 + number % 26)
    if count > 26:
        letters = chr(97 + number // 26) + letters
    return letters + "_"


LabelledSets = List[Tuple[str, Tuple[str, ...]]]


def _labelled_sets(local: Sequence[Tier]) -> LabelledSets:
    """(label, tiers) of the sets for a machine on which all of them fit."""
    fast = [tier.name for tier in local if tier.role == "fast"]
    groups, chats = [], []
    for tier in local:
        if tier.role == "fast" or not tier.chats:
            continue
        groups.append((tier.role or tier.name, (*fast, tier.name)))
        if tier.role.startswith("plan"):
            chats.append(tier.name)
    if fast and not groups:
        groups.append(("fast", tuple(fast)))
    if len(chats) > 1:
        groups.append(("chats", (*fast, *chats)))
    return groups


def _sets_in_memory(sets: LabelledSets, local: Sequence[Tier], need_gb: Mapping[str, Needs],
                    budgets_gb: Needs) -> LabelledSets:
    """Those of the sets that fit, each tier that is in none of them, and what fits beside."""
    kept = []
    placed: Set[str] = set()
    for label, tiers in sets:
        needs = [need_gb.get(name, ()) for name in tiers]
        if fits_together(needs, budgets_gb):
            kept.append((label, tiers))
            placed.update(tiers)
    for tier in local:
        if tier.name not in placed:
            kept.append((tier.role or tier.name, (tier.name,)))
    bases = [tiers for _, tiers in kept]
    names = [tier.name for tier in local]
    for tiers in _grown(bases, names, need_gb, budgets_gb):
        kept.append(("more", tiers))
    return kept


def residency_sets(config: Config, need_gb: Optional[Mapping[str, Needs]] = None,
                   budgets_gb: Needs = ()) -> List[ResidencySet]:
    """The fast tier beside each heavy one, and all chat tiers together beside it.

    With `need_gb` of every tier, what does not fit the budget together is left out, and what fits
    beside it comes in: the sets above are for 64 GB. So do tiers for embeddings and reranking,
    which are small and make nothing go. A tier left in no set runs alone.
    """
    local = local_tiers(config)
    groups = _labelled_sets(local)
    if need_gb is not None:
        groups = _sets_in_memory(groups, local, need_gb, budgets_gb)
    sets = []
    for number, (label, tiers) in enumerate(groups):
        # Of sets that are as good the first counts, and llama-swap goes by their names.
        prefix = _set_prefix(number, len(groups))
        name = prefix + re.sub(r"\W", "_", label)
        sets.append(ResidencySet(name, tiers))
    return sets


LOADED_GB_PER_S = 1.5
MOST_EVICT_COST = 30


def evict_cost(size_gb: float) -> int:
    """What it costs to throw a model out: about the seconds to load it again, 1 to 30."""
    load_s = round(size_gb / LOADED_GB_PER_S)
    return max(1, min(load_s, MOST_EVICT_COST))


def choose_evictions(target: str, running: Sequence[str], sets: Sequence[ResidencySet],
                     costs: Mapping[str, float]) -> List[str]:
    """Which running models must go before `target` can load: llama-swap's matrix rule.

    The set holding the target that throws out the least wins, the first of equals; a model in no
    set runs alone.
    """
    if target in running:
        return []
    def cost(gone: Sequence[str]) -> float:
        return sum(costs.get(name, 1) for name in gone)

    choices = []
    for group in sets:
        if target in group.tiers:
            choices.append([name for name in running if name not in group.tiers])
    return min(choices, key=cost, default=list(running))


def tier_cost(tier: Tier, weights_gb: float) -> int:
    """evict_cost of a tier, by its real weights where they are known, which 0 says they are not.

    A tier of unknown size counts as 5 GB.
    """
    return evict_cost(weights_gb or weights_for(tier).size_gb or 5.0)


def footprint_gb(size_gb: float) -> float:
    """The memory that a tier is counted with where its header is not at hand, in GB.

    Weights and a tenth (README, "Memory math").
    """
    return size_gb * 1.1


# ---- llama-swap.yaml


def _yaml_quoted(value: str) -> str:
    """JSON's double quotes, with what YAML does not take as it is escaped.

    No surrogate pairs stand in it: Go's parser refuses them.
    """
    def escaped(found: Match[str]) -> str:
        return f"\\u{ord(found.group()):04x}"

    quoted = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", escaped, quoted)


_YAML_PLAIN = re.compile(
    r"(?!(?:true|false|yes|no|on|off|null|y|n)\Z)[A-Za-z][A-Za-z0-9 ._/()+-]*(?<! )\Z",
    re.IGNORECASE)


def _yaml_text(value: str) -> str:
    """A YAML scalar: plain where that is safe, else in JSON's double quotes, which YAML shares."""
    if _YAML_PLAIN.match(value):
        return value
    # llama-swap puts macros in everywhere, ${env.X} too.
    return _yaml_quoted(value.replace("${", "$ {"))


def _yaml_list(values: Iterable[str]) -> str:
    return f"[{', '.join(map(_yaml_text, values))}]"


def posix_quote(word: str) -> str:
    """Quote a word as llama-swap splits commands on POSIX, and keep its macros (${...}) out."""
    import shlex
    return shlex.quote(word).replace("${", "$''{")


def windows_quote(word: str) -> str:
    if '"' in word:
        # As Windows reads it, a quote takes the backslashes before it by pairs.
        word = re.sub(r'(\\*)"', r'\1\1\\"', word)
    elif " " not in word:
        return word
    return f'"{word}"'


class Binary(NamedTuple):
    """A llama-server that is installed, and the flags it refuses."""

    program: Tuple[str, ...]
    refused: FrozenSet[str] = frozenset()


class ProxyPlan(NamedTuple):
    """LiteLLM's proxy as llama-swap's model: what starts it, and whether at once."""

    tier: Tier
    command: Tuple[str, ...]
    port: int
    health: str
    preload: bool


class SwapPlan(NamedTuple):
    """What llama-swap's configuration is made of.

    From `first_port` on, as many ports as there are local tiers must be free, for llama-swap does
    not look. With `need_gb` of every tier, sets beyond the budget are left out.
    """

    config: Config
    server: Binary                              # of the tiers that have none of their own
    quote: Callable[[str], str]                 # protects a word in a command line
    first_port: int = FIRST_SERVER_PORT
    need_gb: Optional[Mapping[str, Needs]] = None
    weights_gb: Mapping[str, float] = {}
    budgets_gb: Needs = ()
    proxy: Optional[ProxyPlan] = None
    own: Mapping[str, Binary] = {}              # tiers with settings of their own -> their server
    park: Tuple[str, ...] = ()                  # the command that parks a model before it stops

    def words(self, words: Iterable[str]) -> str:
        return " ".join(map(self.quote, words))


_SWAP_HEAD = """\
# Written by `llmstack start` from models.ini (channel {channel}); the next start writes it again,
# so change models.ini instead.
healthCheckTimeout: {timeout_s}
logLevel: info
logToStdout: both
startPort: {first_port}
sendLoadingState: false           # the router says it, and can still ask another tier
apiKeys: ["${{env.LLAMA_API_KEY}}"]
includeAliasesInList: true
captureBuffer: 0                  # keep no copies of prompts and answers
globalTTL: 0
"""

_SWAP_MODEL = """
  {name}:
    name: {name}
    description: {description}
    cmd: |
{command}
    proxy: "http://127.0.0.1:${{PORT}}"
    ttl: {ttl}
    concurrencyLimit: 512         # 0 would mean 10, then a surprise 429
    timeouts: {{idleConn: 3}}       # llama-server closes after 5 s: a request then gets a 502
"""

# What llama-swap hands on in its own list of models.
_SWAP_METADATA = """\
    metadata:
      tier: {tier}
      role: {role}
      ctx_size: {ctx_size}
      size_gb: {weights.size_gb}
      quant: {quant}
      channel: {weights.channel}
"""

_SWAP_PROXY = """
  {name}:
    description: {description}
    cmd: |
      {command}
    proxy: "http://127.0.0.1:{port}"
    checkEndpoint: {health}
    ttl: 0
    concurrencyLimit: 512
    timeouts: {{idleConn: 3}}       # as of llama-server: uvicorn closes after 5 s
    aliases: {aliases}
"""


def _swap_notes(tier: Tier) -> List[str]:
    """Comments at the weights of a tier's command: where to change them, how to go back."""
    current, queued = both_weights(tier)
    if tier.channel == "next":
        return [
            f"# >>> RUNNING NEXT ({tier.name}): the queued upgrade,"
            " not the pair of hf_repo / hf_file.",
            f"# Way back: llmstack restart --current. It ran before: -hff {current.file}",
        ]
    notes = [
        f"# >>> UPGRADE-POINT ({tier.name}): the pair below is hf_repo / hf_file of models.ini;",
        "# change it there (see UPGRADING.md), then: llmstack restart",
    ]
    if tier.has_next:
        notes.append(f"# Queued: -hff {queued.file}. Try it with: llmstack restart --next")
    return notes


def _swap_command(plan: SwapPlan, tier: Tier) -> List[str]:
    """The lines of the command that serves a tier: server_command's words, and notes."""
    server = plan.own.get(tier.name, plan.server)
    weights = weight_flags(weights_for(tier))
    flags = accepted_flags(all_flags(tier, plan.config), server.refused)
    return [
        plan.words(server.program),
        "--host 127.0.0.1 --port ${PORT}",
        *_swap_notes(tier),
        *map(plan.words, weights),
        *map(plan.words, flags),
    ]


def _swap_model(plan: SwapPlan, tier: Tier) -> str:
    lines = [f"      {line}" for line in _swap_command(plan, tier)]
    text = _SWAP_MODEL.format(
        name=_yaml_text(tier.name),
        description=_yaml_text(tier.description),
        ttl=tier.ttl,
        command="\n".join(lines))
    if plan.park:
        park = plan.words(plan.park) + " ${MODEL_ID} ${PID}"
        text += f"    cmdStop: {_yaml_quoted(park)}\n"
    if tier.aliases:
        text += f"    aliases: {_yaml_list(tier.aliases)}\n"
    weights = weights_for(tier)
    return text + _SWAP_METADATA.format(
        tier=_yaml_text(tier.tier or tier.role),
        role=_yaml_text(tier.role),
        ctx_size=tier.ctx_size,
        weights=weights,
        quant=_yaml_text(weights.quant))


def _swap_proxy(plan: SwapPlan, proxy: ProxyPlan) -> str:
    tier = proxy.tier
    return _SWAP_PROXY.format(
        name=tier.name,
        description=_yaml_text(tier.description),
        command=plan.words(proxy.command),
        port=proxy.port,
        health=proxy.health,
        aliases=_yaml_list(tier.aliases))


def _left_out(plan: SwapPlan, sets: Sequence[ResidencySet]) -> str:
    """Comments on the sets that would be there if memory were no object."""
    if plan.need_gb is None:
        return ""
    text = ""
    kept = [group.tiers for group in sets]
    room = gb_words(plan.budgets_gb)
    for _, tiers in _labelled_sets(local_tiers(plan.config)):
        if tiers in kept:
            continue
        taken = needs_together(plan.need_gb.get(name, ()) for name in tiers)
        together = " + ".join(tiers)
        text += (f"    # left out: {together} would take ~{gb_words(taken)},"
                 f" and there are {room}\n")
    return text


_SWAP_MATRIX = """
# What may be loaded together; the cheapest way to make room wins, the first of equals.
matrix:
  vars:
{names}\
  evict_costs:
{costs}\
  sets:
{groups}\
"""
_SET_LETTERS = {"fast": "f", "agent": "c", "plan": "p", "plan-uncensored": "u"}


def _swap_matrix(plan: SwapPlan) -> str:
    """Which models may be loaded together. The proxy is in every set: else it would run alone."""
    keys = {}                                   # model -> its short name in the sets
    names = costs = ""
    for number, tier in enumerate(local_tiers(plan.config)):
        weights_gb = plan.weights_gb.get(tier.name, 0.0)
        key = _SET_LETTERS.get(tier.role, f"x{number}")
        keys[tier.name] = key
        names += f"    {key}: {_yaml_text(tier.name)}\n"
        costs += f"    {key}: {tier_cost(tier, weights_gb)}\n"
    everywhere = ""
    if plan.proxy:
        everywhere = " & l"
        names += f"    l: {PROXY}\n"
        costs += f"    l: {MOST_EVICT_COST}\n"
    sets = residency_sets(plan.config, plan.need_gb, plan.budgets_gb)
    groups = _left_out(plan, sets)
    for group in sets:
        members = " & ".join(keys[name] for name in group.tiers)
        groups += f'    {group.name}: "{members}{everywhere}"\n'
    if not sets:
        groups += '    a_hosted: "l"\n'
    return _SWAP_MATRIX.format(names=names, costs=costs, groups=groups)


def render_llama_swap_yaml(plan: SwapPlan) -> str:
    """The configuration of llama-swap v250 and newer."""
    local = local_tiers(plan.config)
    proxy = plan.proxy
    text = _SWAP_HEAD.format(
        channel=plan.config.channel, timeout_s=LOAD_TIMEOUT_S, first_port=plan.first_port)
    if not local and not proxy:
        return text + "\nmodels: {}\n"
    text += "\nmodels:"
    for tier in local:
        text += _swap_model(plan, tier)
    # Small, and asked by nearly every session: heavy tiers wait for their first request.
    preload = [tier.name for tier in local if tier.role == "fast"]
    if proxy:
        text += _swap_proxy(plan, proxy)
        if proxy.preload:
            preload.append(proxy.tier.name)
    text += _swap_matrix(plan)
    if preload:
        text += f"\nhooks:\n  on_startup:\n    preload: {_yaml_list(preload)}\n"
    return text


# ---- routes, and the list of models


def hosted_model(tier: Tier) -> str:
    """The provider's id of a hosted tier's model on its channel."""
    if tier.channel == "next":
        return tier.model_next
    return tier.model


def entry_name(tier: Tier) -> str:
    """The name of a LiteLLM tier's entry in the proxy's model_list."""
    # Both models stand in the list, so a change of channel needs no change of the file.
    if tier.channel == "next":
        return f"{tier.name}_next"
    return tier.name


def missing_credentials(config: Config, env: Mapping[str, str]) -> Dict[str, str]:
    """Hosted tiers whose api_key_env is not set in `env` -> what to say of it."""
    found = {}
    for tier in config.tiers:
        variable = tier.api_key_env
        if not variable:
            continue
        key = env.get(variable, "").strip()
        if not key:
            found[tier.name] = f"{variable} is not set"
        # It is to stand in a header.
        elif not (key.isascii() and key.isprintable()):
            found[tier.name] = f"{variable} holds more than printable ASCII"
    return found


def check_queued(config: Config, profile: str) -> None:
    """The next channel needs an upgrade to run.

    `profile`: what the models.ini was made of, "" where it does not say. Errors: UserError.
    """
    if any(tier.has_next for tier in config.tiers):
        return
    none = "no tier"
    if profile:
        none = f"no tier of this models.ini, profile {profile},"
    raise UserError(f"{none} has a queued upgrade, so there is no next channel to run",
                    "add hf_file_next or model_next to a tier of models.ini, or say --current"
                    " (and unset LLMSTACK_USE_NEXT)", 2)


class Route(NamedTuple):
    """How a request reaches the tier it is for: who answers, how its body and head change."""

    tier: Tier
    model: str = ""                             # what its body asks for, as JSON spells it
    # Keys that count as the caller's own -> the member to add where none of them is there.
    sampler: Tuple[Tuple[Tuple[str, ...], bytes], ...] = ()
    # The error it gets instead: status, message, kind.
    refused: Tuple[int, str, str] = (0, "", "")
    host: Any = None                            # the Host it goes to, None for what is behind us
    headers: Tuple[Any, ...] = ()               # what is added for the host: its key
    bare: bool = False                          # the host's paths begin with their own version

    @property
    def hosted(self) -> bool:
        return self.tier.backend != "gguf"


# models.ini's key -> the body's, and other spellings by which a caller may have set it.
_SAMPLER_MEMBERS = {
    "temp": ("temperature",),
    "top_p": ("top_p",),
    "top_k": ("top_k",),
    "min_p": ("min_p",),
    "rep_pen": ("repetition_penalty", "repeat_penalty"),
}
SAMPLED_PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"})


def plan_route(tier: Tier, config: Config, missing: Mapping[str, str]) -> Route:
    """A tier's route, as far as models.ini knows it. A LiteLLM tier's model is an entry there."""
    if tier.backend == "gguf":
        return Route(tier)
    model = hosted_model(tier)
    if tier.backend == "litellm":
        model = entry_name(tier)
    # As JSON escapes it, without its quotes: with_model puts those around it.
    model = json.dumps(model)[1:-1]
    # A llama-server has its sampler on its command line; a provider is sent it each time.
    sampler = []
    for key, value in tier.sampler:
        names = _SAMPLER_MEMBERS[key]
        member = f'"{names[0]}":{_number(value)}'
        sampler.append((names, member.encode()))
    name = tier.name
    refused = (0, "", "")
    if config.local_only and tier.remote:
        refused = (403, f"{name} is hosted, and {LOCAL_ONLY}", "forbidden")
    elif name in missing:
        what = f"{missing[name]} where llmstack was started; export it, then `llmstack restart`"
        refused = (401, f"{name}: {what}", "authentication_error")
    return Route(tier, model, tuple(sampler), refused)


def route_body(body: bytes, asked: Mapping[str, Any], route: Route, path: str,
               name: str) -> List[bytes]:
    """A request's body as its tier gets it: `name` for its model, and the sampler it left out.

    An empty `name` leaves the body as it is.
    """
    if not name:
        return [body]
    more = []
    if path in SAMPLED_PATHS:
        for keys, member in route.sampler:
            if asked.keys().isdisjoint(keys):
                more.append(member)
    return with_model(body, "model" in asked, name, more)


def capabilities(tier: Tier) -> List[str]:
    """What a tier can do, in the words that llama.cpp and Ollama use."""
    if not tier.chats:
        return ["embedding" if tier.role == "embed" else "rerank"]
    words = ["completion"]
    if tier.tool_call:
        words.append("tools")
    if tier.takes_pictures:
        words.append("vision")
    if tier.reasoning:
        words += ["reasoning", "thinking"]
    return words


def with_probes(config: Config, probes: Mapping[str, Mapping[str, Any]]) -> Config:
    """`config` with what `probe` has found out of its tiers.

    What models.ini says itself stays; so does what a probe could not tell.
    """
    tiers = []
    for tier in config.tiers:
        row = probes.get(tier.name, {})
        known = {}
        for key in PROBED_KEYS:
            if key not in tier.settled and isinstance(row.get(key), bool):
                known[key] = row[key]
        tiers.append(tier._replace(**known))
    return config._replace(tiers=tuple(tiers))


def as_loaded(tier: Tier) -> Tier:
    """A tier without what clients are told of it: a change of that needs no restart."""
    return tier._replace(tool_call=True, reasoning=False, settled=())


def _model_entry(name: str, context: int, output: int, able: Iterable[str],
                 meta: Mapping[str, Any]) -> Dict[str, Any]:
    """An entry of /v1/models; context and longest answer, in tokens, under every key in use."""
    keys = ("context_length", "context_window", "max_model_len", "max_input_tokens")
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "llmstack",
        **dict.fromkeys(keys, context),
        "max_output_tokens": min(output, context),
        "capabilities": list(dict.fromkeys(able)),
        "meta": {"n_ctx": context, "llmstack": {"ctx_size": context, **meta}},
    }


def auto_entry(config: Config) -> Dict[str, Any]:
    """The /v1/models entry of `auto`."""
    context = output = 0
    names, able = [], []
    for tier in config.ladder:
        names.append(tier.name)
        # What one of them can do, auto can: the ladder passes by those that see no pictures.
        able += capabilities(tier)
        context = max(context, tier.ctx_size)
        output = max(output, tier.max_output_tokens or tier.ctx_size)
    entry = _model_entry("auto", context, output, able, {"ladder": names})
    entry["description"] = "the best tier for the length of the conversation"
    return entry


def tier_entry(tier: Tier) -> Dict[str, Any]:
    """The /v1/models entry of a tier, as far as models.ini knows it."""
    weights = weights_for(tier)
    # `meta` is where llama-server has what OpenAI's API does not know.
    meta: Dict[str, Any] = {
        "tier": tier.tier or tier.role,
        "role": tier.role,
        "channel": tier.channel,
        "backend": tier.backend,
    }
    if tier.backend == "gguf":
        meta.update(size_gb=weights.size_gb, quant=weights.quant)
        if tier.has_projector:
            meta["input_modalities"] = ["text", "image"]
    else:
        meta["model"] = hosted_model(tier)
    output = tier.max_output_tokens or tier.ctx_size
    entry = _model_entry(tier.name, tier.ctx_size, output, capabilities(tier), meta)
    entry["channel"] = tier.channel
    entry["description"] = tier.description
    entry["aliases"] = list(tier.aliases)
    return entry


def _merged_entry(own: Dict[str, Any], theirs: Dict[str, Any]) -> Dict[str, Any]:
    """A tier's entry with what the server behind the router says of it."""
    merged = {**own, **theirs}
    # What serves a model knows it better than models.ini does, but for these three.
    for key in ("id", "channel", "aliases"):
        merged[key] = own[key]
    merged["meta"] = own["meta"]
    if isinstance(theirs.get("meta"), dict):
        merged["meta"] = {**theirs["meta"], **own["meta"]}
    return merged


def list_models(config: Config,
                theirs: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The entries of /v1/models: auto, each tier once, then what else is behind the router.

    `theirs` is the list of what is behind; a tier that is not in it is left out, but for hosts that
    the router asks itself. What local_only forbids is left out as well.
    """
    said: Dict[str, Dict[str, Any]] = {}
    for entry in theirs:
        said.setdefault(str(entry.get("id")), entry)
    listed = [auto_entry(config)]
    for tier in config.offered:
        own = tier_entry(tier)
        found = [said[name] for name in tier.names if name in said]
        if found:
            listed.append(_merged_entry(own, found[0]))
        elif tier.backend == "openai":
            listed.append(own)
    known = {"auto"}
    for tier in config.tiers:
        known.update(tier.names)
    for name, entry in said.items():
        if name in known:
            continue
        # LiteLLM's proxy and its _next entries stand in llama-swap's list.
        if PROXY not in json.dumps(entry):
            listed.append(entry)
    return listed


def anthropic_model(entry: Mapping[str, Any]) -> Dict[str, Any]:
    """An entry of /v1/models in the shape of Anthropic's API."""
    name = str(entry.get("id"))
    return {
        "type": "model",
        "id": name,
        "display_name": str(entry.get("description") or name),
        "created_at": "1970-01-01T00:00:00Z",
        "max_input_tokens": entry.get("max_input_tokens", 0),
        "max_tokens": entry.get("max_output_tokens", 0),
    }


def anthropic_models(entries: Sequence[Mapping[str, Any]]) -> Dict[str, Any]:
    """The whole list in the shape of Anthropic's API, as one page."""
    data = [anthropic_model(entry) for entry in entries]
    return {
        "data": data,
        "has_more": False,
        "first_id": data[0]["id"],
        "last_id": data[-1]["id"],
    }


# ==================================================================================================
# PURE: MEMORY
# ==================================================================================================
# What a GGUF takes once loaded, from its header alone, and whether that fits. A file's beginning
# becomes a GgufHeader, its hyperparameters _Layers; estimate_memory sums what they take of cards
# and host; fit_tier holds that against a Machine. No file is opened here: FIT has those.
#
# Weights, KV cache and recurrent state are llama.cpp's own sums at b11549 (llama-hparams.cpp,
# llama-kv-cache.cpp, llama-kv-cache-iswa.cpp, llama-memory-recurrent.cpp, llama-model.cpp). The
# compute buffer is what its allocator makes of the widest layer, fitted to its own report for the
# real dimensions of 18 models of 9 architectures: within 15 % of that buffer, within 3 % of small
# models and 0.5 % of those (tests/test_fit.py). What CUDA adds was measured on a card
# (tests/test_memory.py).

MAX_GGUF_HEADER_BYTES = 128 * 1024 * 1024      # the largest vocabularies take 20 MB
MAX_GGUF_ENTRIES = 65_536
MAX_GGUF_QUANTITY = 2 ** 48                     # of anything a header counts
MAX_MODEL_BYTES = 2 ** 50                       # more than any machine's memory
CELLS_STEP = 256                                # llama.cpp rounds a cache up to such steps
SERVER_SLOTS = 4                                # of --parallel auto; they share one cache
SERVER_UBATCH = 512                             # tokens
SERVER_BATCH = 2048                             # likewise; no ubatch is larger
MIB = 1 << 20
# What a process takes of an NVIDIA card beside its model: 591 MiB at its start, and at its first
# prompt up to 120 more (measured on an H100, driver 580).
CUDA_CONTEXT_BYTES = 711 * MIB
BARE_CONTEXT_BYTES = 527 * MIB                  # on a card that a server sees and does not use
PIPELINED_BATCHES = 4                           # GGML_SCHED_MAX_COPIES of llama.cpp
LEAST_CACHE_MIB = 64                            # of prompts: with none, several slots read slower
MOST_CACHE_MIB = 8192                           # llama-server's own default
MOST_CHECKPOINTS = 32                           # a slot, likewise

# GGML type -> (weights in a block, bytes of a block). Source: ggml.c, type_traits.
_GGML_SIZES: Dict[int, Tuple[int, int]] = {
    0: (1, 4),                                  # F32
    1: (1, 2),                                  # F16
    2: (32, 18),                                # Q4_0
    3: (32, 20),                                # Q4_1
    6: (32, 22),                                # Q5_0
    7: (32, 24),                                # Q5_1
    8: (32, 34),                                # Q8_0
    10: (256, 84),                              # Q2_K
    11: (256, 110),                             # Q3_K
    12: (256, 144),                             # Q4_K
    13: (256, 176),                             # Q5_K
    14: (256, 210),                             # Q6_K
    16: (256, 66),                              # IQ2_XXS
    17: (256, 74),                              # IQ2_XS
    18: (256, 98),                              # IQ3_XXS
    19: (256, 50),                              # IQ1_S
    20: (32, 18),                               # IQ4_NL
    21: (256, 110),                             # IQ3_S
    22: (256, 82),                              # IQ2_S
    23: (256, 136),                             # IQ4_XS
    26: (1, 4),                                 # I32
    29: (256, 56),                              # IQ1_M
    30: (1, 2),                                 # BF16
    34: (256, 54),                              # TQ1_0
    35: (256, 66),                              # TQ2_0
    39: (32, 17),                               # MXFP4
    40: (64, 36),                               # NVFP4
}
_Q6_K = 14
_FLOATS = ("f32", "f16", "bf16")
# A cache's type, as its flag names it -> its number above.
_CACHE_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 30,
    "q8_0": 8,
    "q4_0": 2,
    "q4_1": 3,
    "iq4_nl": 20,
    "q5_0": 6,
    "q5_1": 7,
}
# What a header's numbers are, as struct names them. Its other values are strings and lists.
_GGUF_SCALARS = {
    0: "B",                                     # uint8
    1: "b",                                     # int8
    2: "H",                                     # uint16
    3: "h",                                     # int16
    4: "I",                                     # uint32
    5: "i",                                     # int32
    6: "f",                                     # float32
    7: "?",                                     # bool
    10: "Q",                                    # uint64
    11: "q",                                    # int64
    12: "d",                                    # float64
}
_GGUF_STRING = 8
_GGUF_LIST = 9

# Every n-th layer sees everything, the others a window; minus: the first of n. The files rarely
# say it themselves.
_SWA_EVERY = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "llama4": 4,
    "cohere2": 4,
    "cohere2moe": -4,
    "olmo2": 4,
    "exaone4": 4,
    "exaone-moe": 4,
    "smallthinker": -4,
    "afmoe": 4,
    "plamo3": 8,
    "mellum": 4,
    "laguna": -4,
}
_SWA_WINDOW = {"gemma2": 4096, "exaone-moe": 128, "llama4": 8192}       # where the file names none


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _stored_bytes(values: int, kind: int) -> int:
    """What so many values take in a GGML type; -1 for a type that is not known here."""
    if kind not in _GGML_SIZES:
        return -1
    block, block_bytes = _GGML_SIZES[kind]
    return values // block * block_bytes


class GgufError(ValueError):
    """A header that cannot be read or reckoned with; the message completes "the file ..."."""


class BrokenGgufError(GgufError):
    """A file that no llama.cpp can load, whichever its version."""


def _quantity(value: object, default: int = 0) -> int:
    """A number of a header as a count; `default` for what is none, negative or endless."""
    if not isinstance(value, (int, float)):
        return default
    if 0 <= value < MAX_GGUF_QUANTITY:
        return int(value)
    return default


class GgufHeader(NamedTuple):
    """What of a GGUF's header decides its memory."""

    arch: str
    keys: Mapping[str, Any]                     # the architecture's, without its name
    vocab: int
    tensor_bytes: int = 0
    embd_bytes: int = 0                         # of these, the token embedding
    tied: bool = True                           # it serves as the output matrix, too
    widest: int = 0                             # values a token takes in the widest layer
    end: int = 0                                # where its tensors end: a smaller file is not whole
    tensors: Mapping[str, int] = {}             # name -> bytes


class Memory(NamedTuple):
    """Bytes that one llama-server takes."""

    weights: int
    kv: int
    recurrent: int
    compute: int
    context: int = 0                            # CUDA's own, once a process
    cache: int = 0                              # the least of prompts and checkpoints it keeps
    host: int = 0                               # of all the above, what is not on a card
    each: Tuple[int, ...] = ()                  # and what is on each card

    @property
    def parts(self) -> Dict[str, int]:
        """What it is made of; together, what it takes of cards and host."""
        sizes = self._asdict()
        # These two say where the same bytes are.
        del sizes["host"], sizes["each"]
        return sizes

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Machine(NamedTuple):
    """The memory models may take together here; why that much; whether a GPU has their layers."""

    budget_gb: float
    source: str
    gpu: bool
    cuda: bool = False
    host_gb: float = 0.0                        # beside a card of its own; 0: it is one memory
    cards: Tuple[float, ...] = ()               # GB of each, where they have memory of their own

    @property
    def budgets_gb(self) -> Needs:
        """The budget of each memory there is, the host's last."""
        each: Needs = (self.budget_gb,)
        if len(self.cards) > 1:
            # The budget is less than the cards have, and each card gives up the same share.
            cards_gb = sum(self.cards)
            share = self.budget_gb / max(cards_gb, 0.1)
            each = tuple(card_gb * share for card_gb in self.cards)
        if self.host_gb:
            each += (self.host_gb,)
        return each


class Override(NamedTuple):
    """Where tensors go whose name a pattern is found in: CPU, or a device such as CUDA1."""

    pattern: str
    buffer: str


# What --n-cpu-moe keeps on the host. Source: common.h, llm_ffn_exps_block_regex.
_EXPERTS = r"blk\.(%s)\.ffn_(up|down|gate|gate_up)_(ch|)exps"


def tensor_overrides(settings: Mapping[str, Any]) -> Tuple[Override, ...]:
    """What override_tensor and n_cpu_moe move, in the order of their flags."""
    found = []
    for key, value in settings.items():
        if key == "override_tensor":
            for rule in value.split(","):
                pattern, buffer = rule.split("=", 1)
                found.append(Override(pattern, buffer))
        elif key == "n_cpu_moe" and value:
            layers = "|".join(map(str, range(value)))
            found.append(Override(_EXPERTS % layers, "CPU"))
    return tuple(found)


class LoadOptions(NamedTuple):
    """How llama-server is to load a model, as far as memory depends on it."""

    cache_type_k: str = "q8_0"
    cache_type_v: str = "q8_0"
    flash_attn: bool = True
    gpu_layers: int = 0
    cuda: bool = False
    slots: int = SERVER_SLOTS                   # they share one cache
    ubatch: int = SERVER_UBATCH                 # tokens that are computed together
    overrides: Tuple[Override, ...] = ()        # the first that matches a tensor's name counts
    seen: int = 1                               # cards that its server sees
    cards: Tuple[int, ...] = (0,)               # of these, those that the model is split over...
    split: Tuple[float, ...] = (1.0,)           # ...and in which proportions


_ON_HOST = -1                                   # a place; others are cards
_NUMBERED = re.compile(r"[A-Za-z]+([0-9]{1,3})\Z")


def _place_named(device: str) -> int:
    """The card that llama.cpp names CUDA0, ROCm0 or Vulkan0; _ON_HOST for a name of no card."""
    found = _NUMBERED.match(device)
    if not found:
        return _ON_HOST
    return int(found.group(1))


def cards_of(config: Config, machine: Machine) -> Tuple[int, ...]:
    """Which of the machine's cards a tier's server uses, by the tier's own [DEFAULT]."""
    every = range(len(machine.cards))
    settings = config.settings
    names = settings.get("device", "").split(",")
    chosen = [_place_named(name) for name in names]
    # A name without a number may be any card; and so may one that this machine lacks.
    if not set(chosen).issubset(every):
        chosen = list(every)
    if settings.get("split_mode") == "none":
        first = settings.get("main_gpu", 0)
        chosen = chosen[first:first + 1] or chosen
    return tuple(chosen)


def _split_over(cards: Sequence[int], settings: Mapping[str, Any],
                machine: Machine) -> Tuple[float, ...]:
    """The proportions in which llama.cpp splits a model: as told, else by what is free on each."""
    parts = settings.get("tensor_split", "0").split(",")
    told = [float(part) for part in parts]
    told += [0.0] * len(cards)                  # cards that it does not name get nothing
    told = told[:len(cards)]
    if any(told):
        return tuple(told)
    # Full cards count a little, too: proportions of nothing have no sum.
    return tuple(max(machine.cards[card], 0.1) for card in cards)


def load_options(tier: Tier, config: Config, machine: Machine) -> LoadOptions:
    """How a tier's server is going to load its model here."""
    own = tier_config(config, tier)
    settings = own.settings
    layers = settings["n_gpu_layers"]
    count = 999                                 # auto, all, -1
    if layers.isdigit():
        count = int(layers)
    if not machine.gpu or settings.get("device") == "none":
        count = 0
    # What embeds or ranks reads a text in one batch, whatever [DEFAULT] says.
    ubatch = reading_ubatch(tier) or settings.get("ubatch", SERVER_UBATCH)
    batch = settings.get("batch", SERVER_BATCH)
    load = LoadOptions(
        cache_type_k=settings["cache_type_k"],
        cache_type_v=settings["cache_type_v"],
        flash_attn=settings["flash_attn"] != "off",
        gpu_layers=count,
        cuda=machine.cuda and count > 0,
        slots=settings.get("parallel", SERVER_SLOTS),
        ubatch=min(ubatch, batch),
        overrides=tensor_overrides(settings),
    )
    if not machine.cards:
        return load
    cards = cards_of(own, machine)
    return load._replace(
        seen=len(machine.cards),
        cards=cards,
        split=_split_over(cards, settings, machine),
    )


class _Tensor(NamedTuple):
    """A tensor as a header lists it."""

    offset: int                                 # behind the header, in bytes
    size: int                                   # bytes, -1 of a type that is not known here
    name: str
    shape: Sequence[int]


class _GgufReader:
    """Reads forward through a header, whatever it says never beyond MAX_GGUF_HEADER_BYTES."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        self._block = b""                       # what has been read last...
        self._start = 0                         # ...and from where
        self.at = 0

    def _check(self, count: int, most: int) -> None:
        if count > most:
            raise GgufError("has a header beyond any reason")

    def _fill(self, count: int) -> int:
        """Have `count` bytes at hand; where in the block they stand."""
        end = self.at + count
        if end > self._start + len(self._block):
            self._check(end, MAX_GGUF_HEADER_BYTES)
            # Values are small and many: one read brings thousands of them.
            wanted = max(count, 1 << 18)
            self._block = self._read(self.at, wanted)
            self._start = self.at
            if len(self._block) < count:
                raise BrokenGgufError("ends within its header")
        return self.at - self._start

    def take(self, count: int) -> bytes:
        offset = self._fill(count)
        self.at += count
        return self._block[offset:offset + count]

    def numbers(self, code: str) -> Tuple[Any, ...]:
        layout = struct.Struct("<" + code)
        return layout.unpack(self.take(layout.size))

    def count(self) -> int:
        """A number of entries that are all to be read."""
        count: int = self.numbers("Q")[0]
        self._check(count, MAX_GGUF_ENTRIES)
        return count

    def string(self) -> str:
        length, = self.numbers("Q")
        return self.take(length).decode("utf-8", "replace")

    def _skip_strings(self, count: int) -> None:
        # A vocabulary has up to 262,144 of them: their lengths alone are looked at.
        unpack = struct.Struct("<Q").unpack_from
        while count:
            offset = self._fill(8)
            last = len(self._block) - 8         # where a length may begin
            while count and offset <= last:
                length, = unpack(self._block, offset)
                offset += 8 + length
                count -= 1
            self.at = self._start + offset

    def value(self) -> Any:
        """A metadata value; of a list only its length as a range, but for 1,024 numbers at most."""
        kind, = self.numbers("I")
        if kind in _GGUF_SCALARS:
            return self.numbers(_GGUF_SCALARS[kind])[0]
        if kind == _GGUF_STRING:
            return self.string()
        if kind == _GGUF_LIST:
            return self._list()
        raise GgufError(f"has metadata of the unknown type {kind}")

    def _list(self) -> Sequence[int]:
        kind, count = self.numbers("IQ")
        if kind == _GGUF_STRING:
            self._skip_strings(count)
            return range(count)
        if kind not in _GGUF_SCALARS:
            raise GgufError(f"has a list of the unknown type {kind}")
        code = _GGUF_SCALARS[kind]
        # What is one number a layer is short; longer lists are of the vocabulary.
        if count <= 1024:
            return list(self.numbers(f"{count}{code}"))
        self.at += count * struct.calcsize(code)
        self._check(self.at, MAX_GGUF_HEADER_BYTES)
        return range(count)

    def tensor(self) -> _Tensor:
        name = self.string()
        dimensions, = self.numbers("I")
        if dimensions > 4:
            raise GgufError(f"has a tensor of {dimensions} dimensions")
        shape = self.numbers(f"{dimensions}Q")
        kind, offset = self.numbers("IQ")
        values = 1
        for length in shape:
            values *= length
        return _Tensor(offset, _stored_bytes(values, kind), name, shape)


def _widest_layer(tensors: Iterable[_Tensor]) -> int:
    """The values that a token takes in the widest matrix of a layer."""
    widths = {"": 0, "ffn_gate": 0, "ffn_up": 0}
    for tensor in tensors:
        name = tensor.name
        if not name.startswith("blk.") or len(tensor.shape) != 2:
            continue
        what = (name + "..").split(".")[2]      # a hostile file may name one "blk."
        if what not in widths:
            what = ""
        width = tensor.shape[1]
        widths[what] = max(widths[what], width)
    if not widths["ffn_gate"]:                  # one matrix for both (Phi): its rows count twice
        widths["ffn_up"] //= 2
    return max(widths.values())


def _with_tensors(header: GgufHeader, reader: _GgufReader, count: int,
                  alignment: int) -> GgufHeader:
    # A header may list them in any order; their data lies in the order of their offsets.
    tensors = sorted(reader.tensor() for _ in range(count))
    bytes_of: Dict[str, int] = {}
    end = following = 0                         # both count from behind the header
    for tensor in reversed(tensors):
        size = tensor.size
        if size < 0:                            # a type not known here: as far as the next tensor
            size = max(0, following - tensor.offset)
        bytes_of[tensor.name] = size
        end = max(end, tensor.offset + size)
        following = tensor.offset
    data = _round_up(reader.at, alignment)
    return header._replace(
        tensor_bytes=sum(bytes_of.values()),
        embd_bytes=bytes_of.get("token_embd.weight", 0),
        tied="output.weight" not in bytes_of,
        widest=_widest_layer(tensors),
        end=data + end,
        tensors=bytes_of,
    )


def _architecture(meta: Mapping[str, Any]) -> str:
    name = meta.get("general.architecture")
    if isinstance(name, str):
        return name
    # Of a split file only the first part says it.
    if not meta.get("split.no"):
        raise GgufError("names no architecture")
    return "-"


def _own_keys(meta: Mapping[str, Any], arch: str) -> Dict[str, Any]:
    """The numbers and lists of an architecture, by their names within it."""
    keys = {}
    for name, value in meta.items():
        owner, _, key = name.partition(".")
        if owner == arch and isinstance(value, (int, float, list)):
            keys[key] = value
    return keys


def parse_gguf_header(read: Callable[[int, int], bytes]) -> GgufHeader:
    """Return the header of a GGUF, or of one part of it.

    `read(offset, count)` may return more, or less at the end. Errors: GgufError.
    Source: ggml/docs/gguf.md, versions 2 and 3.
    """
    reader = _GgufReader(read)
    if reader.take(4) != b"GGUF":
        raise BrokenGgufError("is not a GGUF file")
    version, = reader.numbers("I")
    if not version:
        raise BrokenGgufError("has nothing in its header")
    if not version & 0xFFFF:                    # 3 with its bytes turned round
        raise GgufError("is written for big-endian machines")
    if version not in (2, 3):
        raise GgufError(f"is of GGUF version {version}, known are 2 and 3")
    tensors = reader.count()
    pairs = reader.count()
    meta: Dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.string()
        value = reader.value()
        # Other text, such as a template or a licence, decides no memory.
        if not isinstance(value, str) or key == "general.architecture":
            meta[key] = value
    parts = _quantity(meta.get("split.count"))
    if not tensors and parts < 2:               # the first of a split may have none
        raise BrokenGgufError("holds no weights")
    arch = _architecture(meta)
    keys = _own_keys(meta, arch)
    words = 0
    tokens = meta.get("tokenizer.ggml.tokens")
    if isinstance(tokens, (list, range)):
        words = len(tokens)
    vocab = _quantity(keys.get("vocab_size", words))
    header = GgufHeader(arch, keys, vocab)
    alignment = _quantity(meta.get("general.alignment")) or 32
    return _with_tensors(header, reader, tensors, alignment)


def merge_headers(first: GgufHeader, others: Iterable[GgufHeader]) -> GgufHeader:
    """The header of a split GGUF from those of its parts."""
    whole = first
    for part in others:
        whole = whole._replace(
            tensors={**whole.tensors, **part.tensors},
            tensor_bytes=whole.tensor_bytes + part.tensor_bytes,
            embd_bytes=whole.embd_bytes + part.embd_bytes,
            tied=whole.tied and part.tied,
            widest=max(whole.widest, part.widest),
        )
    return whole


class _Layers:
    """A header's hyperparameters, read as llama.cpp reads them."""

    def __init__(self, header: GgufHeader) -> None:
        self.keys = header.keys
        self.arch = header.arch
        # The last layers may be those that predict further tokens: they are no part of the model.
        drafting = self.number("nextn_predict_layers")
        self.count = self.number("block_count") - drafting
        if not 0 < self.count <= 1024:
            raise GgufError(f"has {self.count} layers by its header")
        heads = self.each("attention.head_count")
        self.heads = max(heads)
        self.kv_heads = self.each("attention.head_count_kv", heads)
        self.embd = self.number("embedding_length")
        head_size = 0
        if heads[0]:
            head_size = self.embd // heads[0]
        self.key = self.number("attention.key_length", head_size)
        self.value = self.number("attention.value_length", head_size)
        # Of latent attention (DeepSeek) only the compressed K is kept.
        latent_k = self.number("attention.key_length_mla")
        latent_v = self.number("attention.value_length_mla")
        self.latent = bool(latent_k and latent_v)
        usual = _SWA_WINDOW.get(self.arch, 0)
        self.window = self.number("attention.sliding_window", usual)

    def number(self, key: str, default: int = 0) -> int:
        return _quantity(self.keys.get(key), default)

    def each(self, key: str, default: Sequence[int] = (0,)) -> List[int]:
        """A key that is one number, or one a layer."""
        value = self.keys.get(key, default)
        if not isinstance(value, (list, tuple)):
            value = [value]
        values = list(map(_quantity, value)) or [0]
        values += values[-1:] * self.count      # the last one stands for those behind it
        return values[:self.count]

    def flags(self, key: str) -> List[bool]:
        """A key that says yes or no of each layer; [] where the file says nothing."""
        if not isinstance(self.keys.get(key), list):
            return []
        return [bool(value) for value in self.each(key)]

    def slides(self) -> List[bool]:
        """Which layers keep only a window."""
        none = [False] * self.count
        if not self.window:
            return none
        key = "attention.sliding_window_pattern"
        said = self.flags(key)
        if said:
            return said
        every = _SWA_EVERY.get(self.arch, 0)
        if self.arch == "exaone4" and self.count != 64:         # its 32B slides, its 1.2B does not
            every = 0
        if not every:
            return none
        period = self.number(key, abs(every)) or 1
        full = period - 1
        if every < 0:
            full = 0
        return [layer % period != full for layer in range(self.count)]

    def recurs(self) -> List[bool]:
        """Which layers carry a state instead of a cache."""
        said = self.flags("attention.recurrent_layers")
        if said:
            return said
        usual = 0
        if self.arch.startswith(("qwen3next", "qwen35")):
            usual = 4
        every = self.number("full_attention_interval", usual)
        if every:
            return [number % every != 0 for number in range(1, self.count + 1)]
        if self.arch.startswith(("mamba", "rwkv", "arwkv", "falcon-h1")):
            return [True] * self.count
        # Layers of a hybrid without K heads have a state; Nemotron-H has some with neither, which
        # only feed forward.
        forward = [0] * self.count
        if self.arch.startswith("nemotron_h"):
            forward = self.each("feed_forward_length")
        return [not heads and not ff for heads, ff in zip(self.kv_heads, forward)]

    def _state_floats(self) -> int:
        """What a layer keeps of a sequence: its convolution's last inputs, and its state.

        Each family has keys of its own for it: RWKV, LFM2, Kimi Linear, and Mamba with its kin.
        """
        wkv = self.number("wkv.head_size")
        if wkv:
            shifted = self.number("token_shift_count", 2)
            return self.embd * (shifted + wkv)
        short = self.number("shortconv.l_cache")
        if short:
            return self.embd * (short - 1)
        conv = self.number("ssm.conv_kernel")
        size = self.number("kda.head_dim")
        if size:
            inputs = 3 * ((conv or 4) - 1)      # of Q, K and V
            return (inputs + size) * size * self.heads
        inner = self.number("ssm.inner_size")
        state = self.number("ssm.state_size")
        group = self.number("ssm.group_count")
        inputs = max(conv, 1) - 1
        width = inner + 2 * group * state
        return inputs * width + state * inner

    def state_bytes(self) -> List[int]:
        """What each layer keeps of a sequence besides a cache."""
        size = self._state_floats() * 4
        return [size * recurs for recurs in self.recurs()]


class _CacheLayer(NamedTuple):
    """What one layer keeps of each token."""

    layer: int
    cells: int
    k: int                                      # values
    v: int                                      # likewise
    slides: bool


def _cache_layers(layers: _Layers, ctx_size: int, load: LoadOptions) -> List[_CacheLayer]:
    """The layers that have a cache. Source: llama-kv-cache-iswa.cpp."""
    slides = layers.slides()
    recurs = layers.recurs()
    cells = _round_up(ctx_size, CELLS_STEP)
    # A window of each slot, and what one computation adds before the old cells are free.
    windows = layers.window * load.slots
    sliding = windows + min(load.ubatch, cells)
    sliding = _round_up(min(cells, sliding), CELLS_STEP)
    shared = layers.number("attention.shared_kv_layers")        # the last use the others' cache
    kept = layers.count - shared
    # Of Gemma 3n the first 20 layers have caches, and the others read theirs.
    if layers.arch == "gemma3n":
        kept = min(kept, 20)
    # A layer has a cache or a state; those of Falcon-H1 have both.
    has_both = layers.arch == "falcon-h1"
    found = []
    for layer in range(kept):
        heads = layers.kv_heads[layer]
        if not heads:
            continue
        if recurs[layer] and not has_both:
            continue
        held, suffix = cells, ""
        if slides[layer]:
            held, suffix = sliding, "_swa"
        key = layers.number("attention.key_length" + suffix, layers.key)
        value = layers.number("attention.value_length" + suffix, layers.value)
        found.append(_CacheLayer(
            layer=layer,
            cells=held,
            k=key * heads,
            v=value * heads,
            slides=slides[layer],
        ))
    return found


def _cell_bytes(layer: _CacheLayer, layers: _Layers, load: LoadOptions, widest_v: int) -> int:
    """Bytes of one cell; V is padded to `widest_v` where it is kept transposed."""
    kind = _CACHE_TYPES[load.cache_type_k]
    indexer = layers.number("attention.indexer.key_length")
    keys = _stored_bytes(layer.k, kind) + _stored_bytes(indexer, kind)
    if layers.latent:
        return keys
    v = layer.v
    if not load.flash_attn:
        v = widest_v
    kind = _CACHE_TYPES[load.cache_type_v]
    return keys + _stored_bytes(v, kind)


_LAYER = re.compile(r"blk\.([0-9]{1,4})\.")


def _layer_places(count: int, load: LoadOptions) -> List[int]:
    """Where each of so many layers is, and behind them the output.

    Source: llama-model.cpp, get_layer_buft_list.
    """
    # The last layers go to cards, and of the cards each gets a stretch of them.
    on_cards = min(load.gpu_layers, count + 1)
    on_host = count + 1 - on_cards
    places = [_ON_HOST] * on_host
    whole = sum(load.split)
    ends = [part / whole for part in itertools.accumulate(load.split)]
    last = load.cards[-1]
    cards = [*load.cards, last]                 # rounding may lead beyond the last one's end
    for number in range(on_cards):
        index = bisect.bisect_right(ends, number / on_cards)
        places.append(cards[index])
    return places


class _Placing:
    """Says where each tensor of a model goes. Source: llama-model-loader.cpp, create_tensor."""

    def __init__(self, count: int, load: LoadOptions) -> None:
        self.layers = _layer_places(count, load)
        self._rules: List[Tuple[Pattern[str], int]] = []
        last = load.seen - 1
        for rule in load.overrides:
            place = min(_place_named(rule.buffer), last)
            try:
                pattern = re.compile(rule.pattern)
            except re.error:                    # which llama-server says itself
                continue
            self._rules.append((pattern, place))

    def of(self, name: str, otherwise: int) -> int:
        """The place of a tensor, `otherwise` where no override names it."""
        for pattern, place in self._rules:
            if pattern.search(name):
                return place
        return otherwise

    def of_layer(self, name: str) -> int:
        """The place of a tensor of a layer, or of one beside the output."""
        output = len(self.layers) - 1
        number = output
        found = _LAYER.match(name)
        if found:
            # Layers that predict further tokens are behind all others, with the output.
            number = min(int(found.group(1)), output)
        return self.of(name, self.layers[number])


def _placed_weights(header: GgufHeader, placing: _Placing, held: List[int]) -> int:
    """Add to `held` the weights on each card, and on the host, its last; the bytes of all.

    The token embedding is on the host. Where it is the output, too, a card has a second copy.
    """
    embedding = "token_embd.weight"
    output = placing.layers[-1]
    weights = header.tensor_bytes
    first = placing.of(embedding, _ON_HOST)
    held[first] += header.embd_bytes
    again = placing.of(embedding, output)
    if header.tied and again != first:
        weights += header.embd_bytes
        held[again] += header.embd_bytes
    rest = header.tensor_bytes - header.embd_bytes
    for name, size in header.tensors.items():
        if name != embedding:
            held[placing.of_layer(name)] += size
            rest -= size
    # Published dimensions name few tensors: the others are spread evenly.
    of_each, left = divmod(rest, len(placing.layers))
    for place in placing.layers:
        held[place] += of_each
    held[output] += left
    return weights


_PLAIN_LOAD = LoadOptions()


def _cache_bytes(caches: Sequence[_CacheLayer], layers: _Layers, load: LoadOptions) -> List[int]:
    """What the KV cache of each layer takes, 0 for one that has none."""
    widest_v = max((cache.v for cache in caches), default=0)
    sizes = [0] * layers.count
    for cache in caches:
        cell = _cell_bytes(cache, layers, load, widest_v)
        sizes[cache.layer] = cache.cells * cell
    return sizes


def checkpoint_bytes(header: GgufHeader, ctx_size: int, load: LoadOptions = _PLAIN_LOAD) -> int:
    """One checkpoint of one slot: what a conversation cannot be taken back to without one.

    That is a recurrent state and the sliding windows; models without either make none.
    """
    layers = _Layers(header)
    of_one_slot = load._replace(slots=1)
    caches = _cache_layers(layers, ctx_size, of_one_slot)
    sliding = [cache for cache in caches if cache.slides]
    windows = _cache_bytes(sliding, layers, load)
    return sum(windows) + sum(layers.state_bytes())


def _layer_floats(header: GgufHeader, layers: _Layers, scores: int) -> int:
    """Values a token takes while the most demanding layer is computed.

    `scores`: those that each head keeps, without flash attention.
    """
    embd = layers.embd
    heads = layers.heads
    key = layers.key
    experts = max(layers.each("expert_used_count"))
    own_width = layers.each("feed_forward_length")
    width = max(layers.each("expert_feed_forward_length", own_width))
    widest = max(header.widest, experts * width)
    feed_forward = 3 * widest + 5 * embd
    # What the experts say is mixed.
    of_each = 2 * embd + width
    mixing = experts * of_each + embd
    attention = 0
    if scores:
        all_heads = heads + max(layers.kv_heads)
        attention = heads * scores + 4 * embd
        attention += 2 * key * all_heads
    elif layers.latent:
        rank = layers.number("attention.kv_lora_rank")
        attention = heads * (2 * key + rank)
    return max(feed_forward, mixing, attention)


def _converted_bytes(layers: _Layers, caches: Sequence[_CacheLayer], load: LoadOptions,
                     tokens: int) -> int:
    """What CUDA's flash attention takes: one layer's quantised K and V again, as f16.

    Beside them lie the queries and their like, as measured with two models of 30 and 80 billion.
    """
    has_k = load.cache_type_k not in _FLOATS
    has_v = load.cache_type_v not in _FLOATS and not layers.latent
    most = 0
    for cache in caches:
        values = cache.k * has_k + cache.v * has_v
        most = max(most, cache.cells * values)
    if not most:
        return 0
    queries = layers.heads * layers.key
    beside = 5 * (queries + layers.embd) * tokens
    return most * 2 + beside * 4


class _Buffers(NamedTuple):
    """What is computed with, in bytes. Together they are the compute buffer of one device."""

    mask: int                                   # which cells each token sees
    peak: int                                   # the most demanding layer
    outputs: int                                # the next token's chances, of each slot


def _buffers(header: GgufHeader, layers: _Layers, caches: Sequence[_CacheLayer],
             load: LoadOptions, tokens: int) -> _Buffers:
    """`tokens`: those that are computed together."""
    # All full caches share a mask, all sliding ones another.
    cells = {cache.slides: cache.cells for cache in caches}
    mask_width = 4
    scores = max(cells.values(), default=0)
    if load.flash_attn:
        mask_width = 2
        scores = 0
    peak = _layer_floats(header, layers, scores) * tokens * 4
    if load.cuda and load.flash_attn:
        converted = _converted_bytes(layers, caches, load, tokens)
        peak = max(peak, converted)
    return _Buffers(
        mask=sum(cells.values()) * tokens * mask_width,
        peak=peak,
        outputs=header.vocab * load.slots * 4,
    )


def _context_bytes(load: LoadOptions) -> List[int]:
    """What CUDA itself takes of each card."""
    if not load.cuda:
        return [0] * load.seen
    contexts = [BARE_CONTEXT_BYTES] * load.seen
    for card in load.cards:
        contexts[card] = CUDA_CONTEXT_BYTES
    return contexts


def _on_cards(memory: Memory, header: GgufHeader, load: LoadOptions, buffers: _Buffers,
              layer_bytes: Sequence[int]) -> Memory:
    """`memory` as it is with layers on cards. `layer_bytes`: cache and state of each layer."""
    placing = _Placing(len(layer_bytes), load)
    held = [0] * (load.seen + 1)                # by each card, and behind them by the host
    weights = _placed_weights(header, placing, held)
    for place, size in zip(placing.layers, layer_bytes):
        held[place] += size
    # Each card has a buffer of its own, and its copy of the host's mask.
    used = len(load.cards)
    compute = (sum(buffers) + buffers.mask) * used
    # With all layers on several cards batches overlap, and each has the mask more than once.
    is_whole = _ON_HOST not in placing.layers and not load.overrides
    if used > 1 and is_whole:
        copies = used * (PIPELINED_BATCHES - 1)
        compute += copies * buffers.mask
    host_compute = buffers.mask + buffers.outputs
    held[_ON_HOST] += host_compute + memory.cache
    of_each = (compute - host_compute) // used
    for card in load.cards:
        held[card] += of_each
    contexts = _context_bytes(load)
    for card, context in enumerate(contexts):
        held[card] += context
    return memory._replace(
        weights=weights,
        compute=compute,
        context=sum(contexts),
        host=held.pop(_ON_HOST),
        each=tuple(held),
    )


def estimate_memory(header: GgufHeader, ctx_size: int, load: LoadOptions = _PLAIN_LOAD) -> Memory:
    """Return what llama-server takes for a model, in bytes. Errors: GgufError."""
    layers = _Layers(header)
    caches = _cache_layers(layers, ctx_size, load)
    kv = _cache_bytes(caches, layers, load)
    # Slots share the cache, and each has a state of its own.
    states = [size * load.slots for size in layers.state_bytes()]
    tokens = min(load.ubatch, _round_up(ctx_size, CELLS_STEP))
    buffers = _buffers(header, layers, caches, load, tokens)
    checkpoints = checkpoint_bytes(header, ctx_size, load) * load.slots
    memory = Memory(
        weights=header.tensor_bytes,
        kv=sum(kv),
        recurrent=sum(states),
        compute=sum(buffers),
        cache=LEAST_CACHE_MIB * MIB + checkpoints,
    )
    if load.gpu_layers:
        layer_bytes = list(map(sum, zip(kv, states)))
        memory = _on_cards(memory, header, load, buffers, layer_bytes)
    if memory.total > MAX_MODEL_BYTES:
        raise GgufError("has sizes beyond any reason")
    return memory


def largest_context(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest ctx_size up to `limit` that fits, in steps; 0 where none does."""
    # More context never takes less memory, so what fits is found by halving.
    low = 0
    high = limit // CELLS_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * CELLS_STEP):
            low = middle
        else:
            high = middle - 1
    return low * CELLS_STEP


class TierFit(NamedTuple):
    """What one tier needs. `need_gb` counts; `memory` says of what, where a header was at hand."""

    name: str
    source: str                                 # a key of SOURCES in extras/fit.py
    where: str
    need_gb: float                              # of the budget
    fits: bool
    ctx_size: int
    largest_ctx: int = 0                        # that fits alone; 0: none, or not known
    memory: Optional[Memory] = None
    note: str = ""
    host_gb: float = 0.0                        # of the host's memory, beside a card of its own
    checkpoint_mb: float = 0.0                  # one of each slot's, 0: it makes none, or not known
    cache_mib: int = 0                          # what prompts may take, checkpoints too
    trained_ctx: int = 0                        # YaRN's stretch in it; 0: not known
    slots: int = SERVER_SLOTS
    cards: Tuple[int, ...] = ()                 # that it is on, where the machine has several
    each_gb: Needs = ()                         # of each memory, as Machine.budgets_gb has them

    @property
    def needs(self) -> Needs:
        return self.each_gb or (self.need_gb,)


def trained_context(trained: int, tier: Tier) -> int:
    """Tokens that a tier's model can read: as trained, stretched by YaRN; 0: not known."""
    stretched = trained * max(tier.rope_scale, 1)
    return min(int(stretched), 1 << 24)


def fit_tier(tier: Tier, config: Config, machine: Machine, header: GgufHeader, source: str,
             where: str, beside: int = 0) -> TierFit:
    """Whether a tier fits the budget, by the header of its file. Errors: GgufError.

    `beside`: bytes of what is loaded with it: projector, adapters, draft. They count as weights.
    """
    load = load_options(tier, config, machine)

    def memory_at(ctx: int) -> Memory:
        memory = estimate_memory(header, ctx, load)
        each = list(memory.each)
        # Which card they go to is llama.cpp's choice; the first is where it begins.
        if each:
            each[load.cards[0]] += beside
        return memory._replace(weights=memory.weights + beside, each=tuple(each))

    def needs(memory: Memory) -> Needs:
        if not machine.host_gb:
            return (memory.total / 1e9,)
        each = memory.each or (0,) * load.seen
        host = memory.total - sum(each)
        return tuple(size / 1e9 for size in (*each, host))

    def fits(ctx: int) -> bool:
        # Cards are held against their own budgets: what one lacks another cannot give.
        memory = memory_at(ctx)
        return fits_together([needs(memory)], machine.budgets_gb)

    ctx_size = tier.ctx_size
    memory = memory_at(ctx_size)
    each_gb = needs(memory)
    on_cards_gb, host_gb = each_gb, 0.0
    if machine.host_gb:
        on_cards_gb, host_gb = each_gb[:-1], each_gb[-1]
    cards: Tuple[int, ...] = ()
    if load.seen > 1 and load.gpu_layers:
        cards = load.cards
    trained = trained_context(_quantity(header.keys.get("context_length")), tier)
    return TierFit(
        name=tier.name,
        source=source,
        where=where,
        need_gb=sum(on_cards_gb),
        fits=fits(ctx_size),
        ctx_size=ctx_size,
        largest_ctx=largest_context(trained or ctx_size, fits),
        memory=memory,
        host_gb=host_gb,
        checkpoint_mb=checkpoint_bytes(header, ctx_size, load) / 1e6,
        cache_mib=memory.cache // MIB,
        trained_ctx=trained,
        slots=load.slots,
        cards=cards,
        each_gb=each_gb,
    )


def fit_by_size(tier: Tier, config: Config, machine: Machine, need_gb: float) -> TierFit:
    """Whether a tier fits the budget of which no more is known than its size."""
    load = load_options(tier, config, machine)
    by_memory = [0.0] * len(machine.budgets_gb)
    whole = sum(load.split)
    for card, part in zip(load.cards, load.split):
        by_memory[card] = need_gb * part / whole
    each_gb = tuple(by_memory)
    source = "size_gb"
    if not need_gb:
        source = "unknown"
    return TierFit(
        name=tier.name,
        source=source,
        where="",
        need_gb=need_gb,
        fits=fits_together([each_gb], machine.budgets_gb),
        ctx_size=tier.ctx_size,
        each_gb=each_gb,
    )


def _known_experts(header: GgufHeader) -> Dict[str, int]:
    """The experts of a header without tensors: their part of all that is in its layers."""
    layers = _Layers(header)
    width = layers.number("expert_feed_forward_length")
    experts = 3 * width * layers.number("expert_count")
    if not experts:
        return {}
    # Q and the output have every head, K and V their own.
    attention = 2 * layers.key * layers.heads
    attention += (layers.key + layers.value) * max(layers.kv_heads)
    in_layers = header.tensor_bytes - header.embd_bytes
    if not header.tied:                         # the output is as large
        in_layers -= header.embd_bytes
    of_all = in_layers * experts // (experts + attention)
    of_each = of_all // layers.count
    # One name stands for all: what n_cpu_moe moves finds it.
    return {f"blk.{layer}.ffn_up_exps.weight": of_each for layer in range(layers.count)}


def known_header(file: str, size_gb: float, models: Mapping[str, Any]) -> Optional[GgufHeader]:
    """The header that a known model's file has, as its published dimensions tell.

    `models`: share/models.json. The token embedding counts as Q6_K, what llama-quantize gives it
    where it is the output, too.
    """
    file = file.rpartition("/")[2]
    # Whoever has quantised a model, its file begins with the model's name.
    names = [name for name in models if file.startswith(name)]
    if not names:
        return None
    # Of two names that the file begins with, the longer one says more.
    row = models[max(names, key=len)]
    keys = row["keys"]
    for quant, gb in row["gb"].items():
        if quant in file:
            size_gb = gb
            break
    embedding = row["vocab"] * keys["embedding_length"]
    query = keys["attention.head_count"] * keys["attention.key_length"]
    header = GgufHeader(
        arch=row["arch"],
        keys=keys,
        vocab=row["vocab"],
        tensor_bytes=round(size_gb * 1e9),
        embd_bytes=_stored_bytes(embedding, _Q6_K),
        tied=row["tied"],
        widest=max(keys["feed_forward_length"], query, row.get("widest", 0)),
    )
    return header._replace(tensors=_known_experts(header))


def _with_cache(tier: Tier, fit: TierFit, part_gb: float) -> Tier:
    """`part_gb` is free beyond the least, which the tier's need has in it."""
    free_mb = max(0.0, part_gb * 1000)
    checkpoints = -1
    if fit.checkpoint_mb:
        # Half of the room is for prompts. The least has one checkpoint in it already.
        of_all_slots_mb = fit.checkpoint_mb * fit.slots
        more = int(free_mb / 2 / of_all_slots_mb)
        checkpoints = min(MOST_CHECKPOINTS, 1 + more)
        free_mb -= (checkpoints - 1) * of_all_slots_mb
    free_mib = int(free_mb * 1e6 / MIB)
    return tier._replace(
        cache_ram_mib=min(MOST_CACHE_MIB, LEAST_CACHE_MIB + free_mib),
        ctx_checkpoints=checkpoints,
    )


def _cache_parts_gb(config: Config, fits: Sequence[TierFit], machine: Machine) -> Dict[str, float]:
    """Tier -> its part of the memory that the fullest set it may be loaded in leaves."""
    needs = {}
    taken_gb = {}
    # Prompts and checkpoints are kept in the host's memory, wherever the model is.
    limit_gb = machine.host_gb or machine.budget_gb
    for fit in fits:
        needs[fit.name] = fit.needs
        taken_gb[fit.name] = fit.need_gb
        if machine.host_gb:
            taken_gb[fit.name] = fit.host_gb
    chats = [tier.name for tier in config.tiers if tier.chats]
    parts_gb: Dict[str, float] = {}
    for together in residency_sets(config, needs, machine.budgets_gb):
        left_gb = limit_gb
        for name in together.tiers:
            left_gb -= taken_gb.get(name, 0.0)
        sharing = [name for name in chats if name in together.tiers]
        for name in sharing:
            part_gb = left_gb / len(sharing)
            parts_gb[name] = min(parts_gb.get(name, part_gb), part_gb)
    return parts_gb


def with_caches(config: Config, fits: Sequence[TierFit], machine: Machine) -> Config:
    """`config` with room for prompts and checkpoints in every local tier whose need is known.

    Each gets an equal part of what the fullest set it may be loaded in leaves: of the budget where
    that is all the memory there is, of the host's beside a card of its own. Tiers that hold no
    conversation get none.
    """
    local = [fit for fit in fits if fit.source != "hosted"]
    parts_gb = _cache_parts_gb(config, local, machine)
    known = {fit.name: fit for fit in local if any(fit.needs)}
    tiers = []
    for tier in config.tiers:
        if tier.chats and tier.name in known:
            part_gb = parts_gb.get(tier.name, 0.0)
            tier = _with_cache(tier, known[tier.name], part_gb)
        tiers.append(tier)
    return config._replace(tiers=tuple(tiers))


def cache_limit_mib(tier: Tier, fit: TierFit) -> int:
    """What prompts and checkpoints of a tier may take of memory, MiB; 0: not known."""
    # Either is -1 where nothing has been chosen for the tier.
    prompts_mib = max(0, tier.cache_ram_mib)
    checkpoints = max(0, tier.ctx_checkpoints) * fit.slots
    checkpoints_bytes = checkpoints * fit.checkpoint_mb * 1e6
    return prompts_mib + round(checkpoints_bytes / MIB)


def with_served_contexts(config: Config, served: Mapping[str, int]) -> Config:
    """`config` with no tier above what its server holds: tier -> tokens, 0: not known."""
    tiers = []
    for tier in config.tiers:
        most = served.get(tier.name) or tier.ctx_size
        tiers.append(tier._replace(ctx_size=min(tier.ctx_size, most)))
    return config._replace(tiers=tuple(tiers))


def with_true_contexts(config: Config, trained: Mapping[str, int]) -> Config:
    """`config` with no tier above the context its model was trained for, YaRN's stretch in it.

    `trained`: tier -> tokens of its file's header; a tier that it lacks stays as it is.
    """
    most = {}
    for tier in config.tiers:
        most[tier.name] = trained_context(trained.get(tier.name, 0), tier)
    return with_served_contexts(config, most)


class MemoryState(NamedTuple):
    """How the machine is off for memory at one moment."""

    stalled_pct: float = 0.0                    # of the last 10 s some program waited for memory
    available_gb: float = -1.0                  # without swapping; negative: not known
    total_gb: float = 0.0
    swapped_bytes: int = 0                      # written out since boot
    critical: bool = False                      # the system says so itself
    card_free_gb: float = -1.0                  # of all cards together; negative: there is none


STALLED_PCT = 10.0
SWAPPED_BYTES = 64 * MIB                        # between two looks


def memory_pressure(now: MemoryState, before: MemoryState) -> str:
    """Why nothing more should be loaded, in words; "" where memory is not short."""
    if now.critical:
        return "the system says that memory is critically short"
    # Reading a large file makes Linux swap a little and programs wait, with plenty available.
    if now.available_gb <= now.total_gb * 0.1:
        swapped = now.swapped_bytes - before.swapped_bytes
        if swapped > SWAPPED_BYTES:
            return f"the machine swaps ({swapped / MIB:,.0f} MiB just now)"
        if now.stalled_pct >= STALLED_PCT:
            return f"programs wait for memory {now.stalled_pct:.0f} % of the time"
    least_gb = min(1.0, now.total_gb * 0.03)
    if 0 <= now.available_gb < least_gb:
        return f"only {now.available_gb:.1f} GB of memory are available"
    if 0 <= now.card_free_gb < 0.1:
        return f"only {now.card_free_gb * 1000:.0f} MB are free on the card"
    return ""


# ==================================================================================================
# PURE: PROFILES
# ==================================================================================================
# The same tiers and roles for other machines: share/profiles/NAME.ini has the sections that differ
# from those of the models.ini beside the program, which is profile 64.


class Profile(NamedTuple):
    """GB that each tier of a profile must fit within by itself. tests/test_fit.py holds them to it.

    The budget is Metal's share of a Mac of that size, or 75 % of memory as Linux counts it,
    whichever is less; of a card, what its driver and a desktop leave.
    """

    budget_gb: float
    host_gb: float = 0.0                        # of memory beside a card; 0: for any machine


# In the order of their budgets. The number in a name is GB of memory, or of a card's.
PROFILES = {
    "8": Profile(5.7),
    "16": Profile(11.4),
    "card-12": Profile(11.5, 24.0),
    "card-16": Profile(15.4, 24.0),
    "24": Profile(17.1),
    "card-24": Profile(23.4, 24.0),
    "card-32": Profile(31.0, 11.0),
    "48": Profile(37.0),
    "64": Profile(50.5),
    "128": Profile(96.0),
    "256": Profile(200.0),
    "512": Profile(400.0),
}
BUNDLED_PROFILE = "64"
_PROFILE_NAME = re.compile(r"(card-|)([0-9]{1,6})(?: *gi?b)?\Z")
# A section's heading and settings, as far as the first empty line or comment.
_INI_BLOCK = re.compile(r"^\[([^\]\n]+)\]\n(?:[^\n#;].*\n)*", re.MULTILINE)
_PROFILE_TITLE = re.compile(r"^# Profile: ([^ \n]+).*\n", re.MULTILINE)


def fits_machine(name: str, machine: Machine) -> bool:
    """True where a machine has what every tier of a profile needs."""
    profile = PROFILES[name]
    return profile.budget_gb <= machine.budget_gb and profile.host_gb <= machine.host_gb


def choose_profile(machine: Machine) -> str:
    """The largest profile whose every tier fits a machine, or the smallest there is."""
    chosen, *others = PROFILES
    for name in others:
        if fits_machine(name, machine):
            chosen = name
    return chosen


def _kind_and_gb(name: str) -> Tuple[str, int]:
    """("card-" or "", GB) of what a profile is called; GB is 0 where that is no such name."""
    match = _PROFILE_NAME.match(name.strip().lower())
    if not match:
        return "", 0
    return match.group(1), int(match.group(2))


def find_profile(name: str) -> str:
    """The profile for a machine of `name` GB: 32 is 24's, card-20 card-16's. Errors: UserError."""
    kind, size = _kind_and_gb(name)
    found = ""
    for own in PROFILES:
        own_kind, own_size = _kind_and_gb(own)
        if own_kind == kind and own_size <= size:
            found = own
    if not found:
        sizes = ", ".join(PROFILES)
        raise UserError(f"there is no profile {name}",
                        f"one of {sizes} (GB of memory; card: of a graphics card)", 2)
    return found


def profile_words(name: str) -> str:
    """The machine that a profile is for."""
    kind, size = _kind_and_gb(name)
    if kind:
        return f"a graphics card of {size} GB"
    return f"{size} GB of memory"


def profile_of(text: str) -> str:
    """The profile that a models.ini was made of, "" where it does not say."""
    match = _PROFILE_TITLE.search(text)
    if not match:
        return ""
    return match.group(1)


def render_profile(bundled: str, own: str) -> str:
    """The models.ini of a profile: the bundled one, with the title and the sections of its own."""
    blocks = {}
    for block in _INI_BLOCK.finditer(own):
        blocks[block.group(1)] = block.group()

    def own_block(match: Match[str]) -> str:
        return blocks.get(match.group(1), match.group())

    title = _PROFILE_TITLE.search(own)
    if title:
        bundled = _PROFILE_TITLE.sub(title.group(), bundled, count=1)
    return _INI_BLOCK.sub(own_block, bundled)


# ==================================================================================================
# PURE: LITELLM
# ==================================================================================================
# What LiteLLM's proxy is to serve, and which credentials it lacks. No key is ever read here: only
# whether a variable has a value counts.

PROXY_HEALTH = "/health/liveliness"             # asks no provider anything, as /health would


def litellm_tiers(config: Config) -> List[Tier]:
    """The tiers that LiteLLM's proxy serves; none where no request may leave this machine."""
    if config.local_only:
        return []
    return [tier for tier in config.tiers if tier.backend == "litellm"]


def litellm_entries(config: Config) -> List[Tuple[str, str]]:
    """(model_name, model) of the entries that model_list needs."""
    entries = []
    for tier in config.tiers:
        if tier.backend != "litellm":
            continue
        entries.append((tier.name, tier.model))
        if tier.model_next:
            entries.append((f"{tier.name}_next", tier.model_next))
    return entries


def proxy_tier(config: Config) -> Optional[Tier]:
    """The proxy as an engine sees it: a model of no size with every hosted name as its alias.

    None where no tier needs it.
    """
    tiers = litellm_tiers(config)
    if not tiers:
        return None
    names = [name for name, _ in litellm_entries(config)]
    for tier in tiers:
        names += tier.aliases
    served = ", ".join(tier.name for tier in tiers)
    return Tier(
        PROXY,
        backend="litellm",
        ttl=0,
        ctx_size=0,
        description=f"LiteLLM, for {served}",
        aliases=tuple(dict.fromkeys(names)))


def unfence_ultra(text: str) -> str:
    """A models.ini with what its AUTO-ENABLE-WHEN-LITELLM-AVAILABLE markers fence switched on."""
    def bare(match: Match[str]) -> str:
        return re.sub(r"(?m)^; ?", "", match.group(1))

    mark = "AUTO-ENABLE-WHEN-LITELLM-AVAILABLE"
    fenced = rf"(?ms)^; >>> {mark} >>>\r?\n(.*?)^; <<< {mark} <<<\r?\n"
    return re.sub(fenced, bare, text)


def render_litellm_entries(entries: Sequence[Tuple[str, str]]) -> str:
    """(model_name, model) as entries of model_list, for a new file or to be put in by hand."""
    lines = []
    for name, model in entries:
        lines += [
            f"  - model_name: {_yaml_text(name)}",
            "    litellm_params:",
            f"      model: {_yaml_text(model)}",
        ]
    return "\n".join(lines)


class LitellmEntry(NamedTuple):
    """An entry of model_list, as LiteLLM's own parser reads it."""

    model: str
    references: Sequence[str] = ()              # the NAMEs of os.environ/NAME
    has_key: bool = False
    has_base: bool = False


class LitellmFile(NamedTuple):
    """litellm_config.yaml, as LiteLLM's own parser reads it."""

    entries: Mapping[str, LitellmEntry]
    environment: FrozenSet[str]                 # variables that the file sets itself


def parse_litellm_file(answer: Any) -> Optional[LitellmFile]:
    """What share/guests/litellm_yaml.py has said of a file; None where it could not read that."""
    entries = {}
    try:
        for name, entry in answer["entries"].items():
            entries[name] = LitellmEntry(**entry)
        return LitellmFile(entries, frozenset(answer["environment"]))
    except (AttributeError, KeyError, TypeError):
        # It has no entries, or an older version of the guest has answered.
        return None


# A provider and the variables that LiteLLM reads its credentials from; | between those that do
# instead of each other.
_CREDENTIAL_ROWS = """
anthropic     ANTHROPIC_API_KEY|ANTHROPIC_AUTH_TOKEN
azure         AZURE_API_KEY|AZURE_CLIENT_ID|AZURE_AD_TOKEN  AZURE_API_BASE
bedrock       AWS_ACCESS_KEY_ID|AWS_PROFILE|AWS_BEARER_TOKEN_BEDROCK\
|AWS_WEB_IDENTITY_TOKEN_FILE|AWS_ROLE_ARN
cerebras      CEREBRAS_API_KEY
codestral     CODESTRAL_API_KEY
cohere        COHERE_API_KEY|CO_API_KEY
cohere_chat   COHERE_API_KEY|CO_API_KEY
deepinfra     DEEPINFRA_API_KEY
deepseek      DEEPSEEK_API_KEY
fireworks_ai  FIREWORKS_API_KEY|FIREWORKS_AI_API_KEY|FIREWORKSAI_API_KEY|FIREWORKS_AI_TOKEN
gemini        GEMINI_API_KEY|GOOGLE_API_KEY
groq          GROQ_API_KEY
huggingface   HF_TOKEN|HUGGINGFACE_API_KEY
mistral       MISTRAL_API_KEY
moonshot      MOONSHOT_API_KEY
nvidia_nim    NVIDIA_NIM_API_KEY
openai        OPENAI_API_KEY
openrouter    OPENROUTER_API_KEY|OR_API_KEY
perplexity    PERPLEXITYAI_API_KEY|PERPLEXITY_API_KEY
replicate     REPLICATE_API_KEY
sambanova     SAMBANOVA_API_KEY
together_ai   TOGETHERAI_API_KEY|TOGETHER_API_KEY|TOGETHER_AI_API_KEY|TOGETHER_AI_TOKEN
vertex_ai     GOOGLE_APPLICATION_CREDENTIALS|VERTEXAI_CREDENTIALS|VERTEX_CREDENTIALS
xai           XAI_API_KEY
"""
CREDENTIALS: Dict[str, Sequence[str]] = {
    provider: names
    for provider, *names in map(str.split, _CREDENTIAL_ROWS.strip().splitlines())}
# A machine in their cloud may have credentials that no variable shows.
AMBIENT = ("azure", "bedrock", "vertex_ai")
_CREDENTIAL_NAMES = frozenset(re.findall(r"[A-Z][A-Z_]+", _CREDENTIAL_ROWS))


def _is_credential(name: str) -> bool:
    """True for a variable that only LiteLLM needs; HF_TOKEN is llama-server's, too."""
    if name.startswith(("AWS_S", "LITELLM_")):
        return True
    return name in _CREDENTIAL_NAMES and name != "HF_TOKEN"


def without_credentials(env: Mapping[str, str]) -> Dict[str, str]:
    """An environment for programs that ask no provider."""
    return {name: env[name] for name in env if not _is_credential(name)}


def _provider_of(model: str) -> str:
    """The provider that LiteLLM takes a model's name for, "" where that is not plain."""
    if "/" in model:
        return model.split("/")[0]
    if model.startswith("claude"):
        return "anthropic"
    if re.match(r"gpt-|o[0-9]|chatgpt", model):
        return "openai"
    return ""


def _wanted_credentials(tier: Tier, entry: LitellmEntry,
                        certain: bool) -> Sequence[str]:
    """The variables an entry needs, | between those that do instead of each other."""
    if entry.references or entry.has_key:
        return entry.references
    provider = _provider_of(entry.model or hosted_model(tier))
    if certain and provider in AMBIENT:
        return ()
    wanted = CREDENTIALS.get(provider, ())
    if entry.has_base:
        return [names for names in wanted if names != "AZURE_API_BASE"]
    return wanted


def tier_credentials(tier: Tier, env: Mapping[str, str], file: Optional[LitellmFile],
                     certain: bool = False) -> Tuple[str, ...]:
    """The names of the variables a LiteLLM tier lacks in `env`; none where that cannot be told.

    What its entry refers to as os.environ/NAME decides, else what its provider is known to need;
    `certain`: and cannot do without.
    """
    if file is None:
        return ()
    entry = file.entries.get(entry_name(tier), LitellmEntry(""))
    known = set(file.environment)
    # What is blank counts as not set.
    known.update(name for name, value in env.items() if value.strip())
    lacking: Dict[str, None] = {}
    for choices in _wanted_credentials(tier, entry, certain):
        names = choices.split("|")
        if known.isdisjoint(names):
            lacking[names[0]] = None
    return tuple(lacking)


def litellm_differences(config: Config, file: Optional[LitellmFile]) -> List[str]:
    """What models.ini and the entries of litellm_config.yaml, which count, do not agree on."""
    if file is None:
        return []
    lines = []
    for name, model in litellm_entries(config):
        entry = file.entries.get(name)
        if entry and entry.model not in ("", model):
            lines.append(f"{name}: models.ini says {model}, litellm_config.yaml {entry.model},"
                         " which is what is asked")
    return lines


# ==================================================================================================
# PURE: OPENCODE
# ==================================================================================================
# opencode.json is a function of the configuration, so that a thin client writes the same file for
# a router elsewhere as the project of that router does.

PROVIDER = "llama.cpp"                          # opencode's name for this stack: llama.cpp/auto
KEY_REFERENCE = "{env:LLMSTACK_API_KEY}"        # opencode puts in the value; no key is ever written
DEFAULT_OUTPUT_TOKENS = 16_384                  # of a tier that names none and has room for it
# What opencode 1.18 sends before a word of the user's: 30.7 kB, and AGENTS.md.
OPENCODE_TOKENS = 8_000
# A cold load, then a long prompt; opencode's own 300 s is less than that.
_SILENCE_MS = (LOAD_TIMEOUT_S + 300) * 1000
# task is denied, too: opencode's own agents explore and general run commands, whatever the agent
# that hands them a task may do.
_READ_ONLY = {"edit": "deny", "bash": "deny", "webfetch": "deny", "task": "deny"}
_PLANNER_PROMPT = ("You are a planner. Read the code, weigh the alternatives and describe what you"
                   " would change, file by file; change nothing and run nothing yourself.")


def client_limits(tier: Tier) -> Tuple[int, int]:
    """(context, output) that a client is told, in tokens.

    opencode compacts a conversation at context - min(output, 32000), and never stops compacting
    where output is not below context: no answer is promised more than that, or than half the
    context.
    """
    context, output = tier.ctx_size, tier.max_output_tokens
    if not output:
        output = min(context // 4, DEFAULT_OUTPUT_TOKENS)
    return context, min(output, context // 2, 32_000)


def _auto_limits(ladder: Sequence[Tier]) -> Tuple[int, int]:
    """The largest context that the ladder reaches, and an answer that every tier may give."""
    largest = max(ladder, key=lambda tier: tier.ctx_size)
    context, output = client_limits(largest)
    for tier in ladder:
        if tier.max_output_tokens:
            output = min(output, tier.max_output_tokens)
    return context, output


def _calls_tools(tier: Tier, config: Config) -> bool:
    """Whether a tier takes tools; a llama-server does so by its model's own template only."""
    settings = tier_config(config, tier).settings
    if tier.backend == "gguf" and not settings["jinja"]:
        return False
    return tier.tool_call


def _client_model(name: str, limits: Tuple[int, int], tiers: Sequence[Tier],
                  config: Config) -> Dict[str, Any]:
    """One model of opencode's list, which any of `tiers` may answer."""
    context, output = limits
    first, *others = tiers
    entry: Dict[str, Any] = {
        "name": re.sub(r"[\x00-\x1f\x7f-\x9f]", "", name),
        "limit": {"context": context, "output": output},
        "tool_call": any(_calls_tools(tier, config) for tier in tiers),
    }
    if all(tier.reasoning for tier in tiers):
        entry["reasoning"] = True
    if any(tier.has_projector for tier in tiers):
        entry["attachment"] = True
        entry["modalities"] = {"input": ["text", "image"], "output": ["text"]}
    free = {"input": 0, "output": 0}
    # What one of several hosted tiers will cost is not known before it is asked.
    if first.prices and not others:
        entry["cost"] = {**free, **dict(first.prices)}
    elif not any(tier.remote for tier in tiers):
        entry["cost"] = free
    return entry


def _opencode_models(config: Config) -> Dict[str, Any]:
    """opencode's list of models: auto where there is a ladder, and every tier that chats."""
    models = {}
    ladder = config.ladder
    if ladder:
        shown = "auto: the best tier for the length"
        models["auto"] = _client_model(shown, _auto_limits(ladder), ladder, config)
    for tier in config.tiers:
        if tier.chats:
            shown = tier.description or tier.name
            limits = client_limits(tier)
            models[tier.name] = _client_model(shown, limits, [tier], config)
    return models


def _with_offered(config: Config) -> Config:
    """What a client is shown: the tiers it may ask, or all of them where that is none."""
    return config._replace(tiers=config.offered or config.tiers)


def cramped_models(config: Config) -> List[str]:
    """What to say of the agents' models whose context opencode's own prompt fills.

    With such a model it would compact the conversation for ever.
    """
    config = _with_offered(config)
    limits = {}
    for role in ("agent", "plan", "plan-uncensored"):
        tier = config.by_role(role)
        if tier:
            limits[tier.name] = client_limits(tier)
    if config.ladder:
        limits["auto"] = _auto_limits(config.ladder)
    lines = []
    for name, (context, output) in limits.items():
        # A quarter of it has to be left for what the user says.
        if context - output < OPENCODE_TOKENS * 5 // 4:
            lines.append(f"{name}: of {context:,} tokens opencode keeps {output:,} for the answer;"
                         f" its own prompt and tools take about {OPENCODE_TOKENS:,}, so it would"
                         " compact without end: a larger ctx_size is needed")
    return lines


def _role_model(config: Config, role: str) -> Dict[str, str]:
    """The model of an agent whose tier has this role; nothing where none has it.

    Then opencode takes its default model.
    """
    tier = config.by_role(role)
    if tier is None:
        return {}
    return {"model": f"{PROVIDER}/{tier.name}"}


def _opencode_agents(config: Config, default: str) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """opencode's agents and the commands that call them."""
    build = {"model": default}
    if config.build_model == "agent":
        build = _role_model(config, "agent")
    agents: Dict[str, Any] = {
        "build": build,
        "plan": {**_role_model(config, "plan"), "permission": _READ_ONLY},
    }
    commands = {"review": {
        "description": "Trade-offs, risks and follow-ups, by the planner",
        "agent": "plan",
        "template": "Review for trade-offs, risks and follow-ups. Be concrete.\n\n$ARGUMENTS",
    }}
    uncensored = _role_model(config, "plan-uncensored")
    if uncensored:
        agents["plan-nofilter"] = {
            **uncensored,
            "description": "Plans without a filter; changes nothing",
            "mode": "all",
            "prompt": _PLANNER_PROMPT,
            "permission": _READ_ONLY,
        }
        commands["nofilter"] = {
            "description": "Ask the planner without a filter",
            "agent": "plan-nofilter",
            "template": "$ARGUMENTS",
        }
    return agents, commands


def render_opencode_json(config: Config, url: str, agents_md: str, *, wants_key: bool = False,
                         mcp_url: str = "") -> str:
    """opencode's configuration for the router at `url` (without /v1), whose tiers are `config`'s.

    No sampler anywhere: a tier's own applies. `agents_md` is the absolute path of its instructions,
    `wants_key` is of the router, `mcp_url` names LiteLLM's MCP gateway. The same arguments give the
    same bytes.
    """
    config = _with_offered(config)
    models = _opencode_models(config)
    first = next(iter(models), "auto")
    default = f"{PROVIDER}/{first}"
    agents, commands = _opencode_agents(config, default)
    options: Dict[str, Any] = {
        "baseURL": f"{url}/v1",
        "headerTimeout": _SILENCE_MS,
        "chunkTimeout": _SILENCE_MS,
    }
    if wants_key:
        options["apiKey"] = None                # KEY_REFERENCE takes its place in the text
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "llmstack",
        "options": options,
        "models": models,
    }
    value: Dict[str, Any] = {
        "$schema": "https://opencode.ai/config.json",
        "model": default,
        "small_model": _role_model(config, "fast").get("model", default),
        "share": "disabled",
        "autoupdate": False,
        # Without this, eight hosted models stand in the list, and prompts could leave.
        "enabled_providers": [PROVIDER],
        "instructions": [agents_md],
        "provider": {PROVIDER: provider},
        "agent": agents,
        "command": commands,
    }
    if mcp_url:
        value["mcp"] = {"litellm": {"type": "remote", "url": mcp_url, "enabled": True}}
    text = json.dumps(value, indent=2) + "\n"
    # opencode replaces {env:X} and {file:X} wherever they stand: a description must not name any.
    text = re.sub(r"\{(?=env:|file:)", r"\\u007b", text)
    return text.replace('"apiKey": null', f'"apiKey": "{KEY_REFERENCE}"')


# ==================================================================================================
# PURE: HTTP
# ==================================================================================================
# Strict where leniency smuggles: two programs that read one message differently are how a request
# is hidden inside another. llhttp and nginx refuse the same. Numbers of sections are RFC 9112's.

HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
})
_NO_LENGTH = HOP_BY_HOP | {b"content-length"}
# Which page may read an answer is ours to say: llama-server lets every one.
_OF_PAGES = frozenset({
    b"access-control-allow-origin", b"access-control-allow-credentials",
    b"access-control-expose-headers"})
# Who may ask, and where a request ends, is judged by the first of these; a second could say
# otherwise to whoever reads the last.
_SINGLE = (b"host", b"content-length", b"transfer-encoding", b"origin", b"sec-fetch-site")
_REQUEST_LINE = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])\Z")
_ABSOLUTE_FORM = re.compile(rb"https?://[^/?]+(.*)\Z", re.IGNORECASE)
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: (.*))?\Z", re.DOTALL)
_TOKEN_BYTES = b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_CONTROL_BYTES = bytes({*range(0x20), 0x7f} - {0x09})       # a tab may stand within a value
_NAKED_NEWLINE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?\Z")
_WHOLE_SIZE = re.compile(rb"([1-9A-Fa-f][0-9A-Fa-f]{0,7})\r\n")   # of a chunk that is not the last
MAX_FRAMING_LINE_BYTES = 1024                   # a chunk's size with its extensions, or a trailer
REASONS = {
    200: "OK", 204: "No Content", 307: "Temporary Redirect",
    400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout",
    413: "Content Too Large", 415: "Unsupported Media Type", 417: "Expectation Failed",
    429: "Too Many Requests",
    500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable",
}

Header = Tuple[bytes, bytes, bytes]             # lower-case name, value, the line as it came


class Request(NamedTuple):
    """A request's head. `length` is -1 for a chunked body."""

    method: str
    target: str                                 # begins with "/", or is the "*" of OPTIONS
    minor: int                                  # HTTP/1.minor
    headers: Tuple[Header, ...]
    keep_alive: bool
    upgrade: bool
    expects: bool                               # Expect: 100-continue
    fields: Dict[bytes, bytes]                  # lower-case name -> first value
    length: int
    words: FrozenSet[bytes] = frozenset()       # of its Connection headers, in lower case

    def header(self, name: bytes) -> str:
        return self.fields.get(name, b"").decode("latin-1")


class Response(NamedTuple):
    """An upstream's head. framing: none | length | chunked | close."""

    status: int
    headers: Tuple[Header, ...]
    framing: str
    length: int
    keep_alive: bool
    events: bool                                # text/event-stream
    text: bytes                                 # the lines that travel on, each with its CRLF

    def header(self, name: bytes) -> str:
        for known, value, _ in self.headers:
            if known == name:
                return value.decode("latin-1")
        return ""


# ---- heads


def head_end(data: Union[bytes, bytearray], searched: int = 0) -> int:
    """Return where the empty line behind a request's head begins, -1 while it is not there.

    `searched` says how many bytes an earlier call has seen: a head that comes byte by byte is read
    in linear time, too. Errors: HttpError 400 for what can become no head.
    """
    # The last three bytes may be the beginning of the empty line.
    end = data.find(b"\r\n\r\n", max(searched - 3, 0))
    length = end
    if end < 0:
        length = len(data) - 3
    if length > MAX_HEAD_BYTES:
        raise HttpError(400, f"head over {MAX_HEAD_BYTES:,} bytes")
    # Who ends lines so never sends the empty line: said now, and not when its time is over.
    if end < 0 and _NAKED_NEWLINE.search(data, max(searched - 1, 0)):
        raise HttpError(400, "a line ends in a bare CR or LF")
    return end


def _split_head(head: bytes) -> List[bytes]:
    """The lines of a head. Errors: ValueError for control bytes but those that end lines."""
    lines = head.split(b"\r\n")
    controls = len(head) - len(head.translate(None, _CONTROL_BYTES))
    if controls != 2 * (len(lines) - 1):        # a CR and an LF between two lines
        raise ValueError("a control byte, or a bare CR or LF")
    return lines


def _split_header(line: bytes) -> Header:
    """Errors: ValueError. A folded line (5.2) begins with white space, so it has no name."""
    name, colon, value = line.partition(b":")
    strange = name.translate(None, _TOKEN_BYTES)
    if strange or not name or not colon:
        raise ValueError("malformed header line")
    return name.lower(), value.strip(b" \t"), line


def _connection_words(headers: Sequence[Header]) -> FrozenSet[bytes]:
    """The lower-case words of all Connection headers."""
    words: List[bytes] = []
    for name, value, _ in headers:
        if name == b"connection":
            words += value.lower().split(b",")
    return frozenset(word.strip() for word in words)


def _origin_form(method: bytes, target: bytes) -> bytes:
    """A target (3.2) without scheme and host. Errors: HttpError 400."""
    if method == b"CONNECT":
        raise HttpError(400, "CONNECT is for proxies, and this is none")
    if target.startswith(b"/") or (target == b"*" and method == b"OPTIONS"):
        return target
    absolute = _ABSOLUTE_FORM.match(target)
    if absolute is None:
        raise HttpError(400, "the target is no path; it begins with /")
    path = absolute.group(1)
    if not path.startswith(b"/"):               # nothing but a query behind the host, or nothing
        path = b"/" + path
    return path


def _parse_request_line(line: bytes) -> Tuple[str, str, int]:
    """(method, target, minor version). Errors: HttpError 400."""
    match = _REQUEST_LINE.match(line)
    if match is None:
        raise HttpError(400, "malformed request line")
    method, target, minor = match.groups()
    target = _origin_form(method, target)
    return method.decode("ascii"), target.decode("latin-1"), int(minor)


# A client says most of its lines with each of its requests: of the 95 us of Python that a request
# with five headers takes, knowing them saves 7. Only of short heads: they stay in memory.
KNOWN_HEAD_BYTES = 2048
_known_header = functools.lru_cache(maxsize=256)(_split_header)
_known_request_line = functools.lru_cache(maxsize=64)(_parse_request_line)


def _request_length(fields: Mapping[bytes, bytes], minor: int) -> int:
    """How long a request's body is in bytes, -1 for a chunked one (6.3). Errors: HttpError 400."""
    length = fields.get(b"content-length")
    coding = fields.get(b"transfer-encoding")
    if coding is not None:
        # One program goes by the length and the next by the chunks: what is between is smuggled.
        if length is not None or coding.lower() != b"chunked" or minor == 0:
            raise HttpError(400, "Transfer-Encoding beside Content-Length, or other than chunked")
        return -1
    if length is None:
        return 0
    if not length.isdigit() or len(length) > 15:
        raise HttpError(400, "Content-Length is no number")
    return int(length)


def parse_request_head(head: bytes) -> Request:
    """Parse a request head (without its empty line), in linear time.

    Errors: HttpError 400, and 417 for an expectation other than 100-continue.
    """
    parse_line, split = _parse_request_line, _split_header
    if len(head) <= KNOWN_HEAD_BYTES:
        parse_line, split = _known_request_line, _known_header
    try:
        first, *lines = _split_head(head)
        # More are refused below, by the number of lines: they are not worth the work.
        headers = tuple(map(split, lines[:MAX_HEADERS]))
    except ValueError as exc:
        raise HttpError(400, str(exc)) from None
    method, target, minor = parse_line(first)
    if len(lines) > MAX_HEADERS:
        raise HttpError(400, f"more than {MAX_HEADERS} headers")
    # In reverse: of a header that is there twice, the first counts.
    fields = {name: value for name, value, _ in reversed(headers)}
    if len(fields) < len(headers):              # one is there twice
        names = [name for name, _, _ in headers]
        for name in _SINGLE:
            if names.count(name) > 1:
                raise HttpError(400, f"{name.decode()} is there twice")
    length = _request_length(fields, minor)
    if minor == 1 and b"host" not in fields:
        raise HttpError(400, "a Host header is needed")
    expect = fields.get(b"expect", b"")
    if expect and expect.lower() != b"100-continue":
        raise HttpError(417, "only Expect: 100-continue is known")
    words: FrozenSet[bytes] = frozenset()
    if b"connection" in fields:
        words = _connection_words(headers)
    stays = minor == 1 or b"keep-alive" in words
    upgrade = b"upgrade" in words and b"upgrade" in fields
    return Request(
        method=method,
        target=target,
        minor=minor,
        headers=headers,
        keep_alive=stays and b"close" not in words,
        upgrade=upgrade and minor == 1,
        expects=expect != b"" and minor == 1,
        fields=fields,
        length=length,
        words=words,
    )


def _response_length(headers: Sequence[Header]) -> int:
    """Content-Length of an answer, -1 without one. Errors: ValueError."""
    lengths = set()
    for name, value, _ in headers:
        if name == b"content-length":
            if not value.isdigit() or len(value) > 15:
                raise ValueError("Content-Length is no number")
            lengths.add(int(value))
    if len(lengths) > 1:
        raise ValueError("two Content-Lengths differ")
    return max(lengths, default=-1)


def _response_framing(method: str, status: int, coding: bytes, length: int) -> str:
    """How the end of an answer's body is known (6.3): none | chunked | length | close."""
    if method == "HEAD" or status < 200 or status in (204, 304):
        return "none"
    if coding == b"chunked":
        return "chunked"
    if length >= 0:
        return "length"
    return "close"


@functools.lru_cache(maxsize=32)
def parse_response_head(head: bytes, method: str) -> Response:
    """Parse an upstream's head (without its empty line). Errors: ValueError.

    A server's streams all have the same: of 100 us that a request costs, this saves 10.
    """
    first, *lines = _split_head(head)
    match = _STATUS_LINE.match(first)
    if match is None:
        raise ValueError("no HTTP status line")
    minor, code, reason = match.groups(b"")
    status = int(code)
    headers = [_split_header(line) for line in lines]
    fields = {name: value.lower() for name, value, _ in headers}
    length = _response_length(headers)
    _, _, coding = fields.get(b"transfer-encoding", b"").rpartition(b",")
    framing = _response_framing(method, status, coding.strip(), length)
    words = _connection_words(headers)
    stays = minor == b"1" or b"keep-alive" in words
    text = [b"HTTP/1.1 " + code + b" " + reason]
    if status == 101:                           # what follows is between client and upstream
        text += lines
    else:
        # How it is framed to the client is the relay's to say, and which page may read it ours.
        drop = _NO_LENGTH | _OF_PAGES | words
        text += [line for name, _, line in headers if name not in drop]
        # Once, however often it was said; a HEAD's answer says what a GET's would be.
        if framing == "length" or (framing == "none" and length >= 0):
            text.append(b"Content-Length: %d" % length)
    stays = stays and b"close" not in words
    content_type = fields.get(b"content-type", b"")
    return Response(
        status=status,
        headers=tuple(headers),
        framing=framing,
        length=max(length, 0),
        keep_alive=stays and framing != "close",
        events=content_type.startswith(b"text/event-stream"),
        text=b"\r\n".join(text) + b"\r\n",
    )


# ---- bodies as they are framed


class SizedBody:
    """A body of a length that its head says, through bytes that arrive in any pieces."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.ended = length == 0
        self.over = 0                           # bytes that stand behind its end

    def feed(self, data: bytes) -> bytes:
        """The part of the next bytes that is the body's. Errors: ValueError, in all these classes.

        Bytes that are refused do not count: what is said next must fit behind those before.
        """
        payload = data[:self._left]
        self._left -= len(payload)
        self.ended = self._left == 0
        self.over += len(data) - len(payload)
        return payload


class BodyToTheClose:
    """A body that goes up to the end of its connection."""

    ended = False
    over = 0

    def feed(self, data: bytes) -> bytes:
        return data


# What the next byte of a chunked message belongs to.
_SIZE, _DATA, _DATA_END, _TRAILER, _DONE = range(5)


class ChunkFraming:
    """Follows chunked framing (7.1) through bytes that arrive in any pieces; holds none back.

        SIZE -> DATA -> DATA_END -> SIZE ...
          `--> TRAILER ... -> DONE             behind a size of 0
    """

    __slots__ = ("_left", "_line", "_state", "ended", "over")

    def __init__(self) -> None:
        self._state = _SIZE
        # Bytes of this chunk, or trailers, that may still come.
        self._left = 0
        self._line = b""                        # a line, or a chunk's CRLF, that is not whole yet
        self.ended = False
        self.over = 0

    def feed(self, data: bytes) -> bytes:
        before = self._state, self._left, self._line
        payload: List[bytes] = []
        position = 0
        end = len(data)
        # A step takes what it can of the data; one that has not enough keeps its part in _line.
        try:
            while position < end and self._state != _DONE:
                position = self._take_whole(data, position, payload)
                if self._state == _DATA:
                    position = self._take_data(data, position, payload)
                elif self._state == _DATA_END:
                    position = self._take_data_end(data, position)
                else:
                    position = self._take_line(data, position)
        except ValueError:
            self._state, self._left, self._line = before
            raise
        self.ended = self._state == _DONE
        self.over += end - position
        return b"".join(payload)                # of one piece, that is the piece itself

    def _take_whole(self, data: bytes, position: int, payload: List[bytes]) -> int:
        """Take the chunks that have come from their size to their CRLF, as nearly all have.

        Of the 3.2 us that a relayed event of a burst costs, step by step takes 2.1, this 1.2.
        """
        if self._state != _SIZE or self._line:
            return position
        size = _WHOLE_SIZE.match(data, position)
        while size:
            begin = size.end()
            behind = begin + int(size.group(1), 16)
            if data[behind:behind + 2] != b"\r\n":
                break
            payload.append(data[begin:behind])
            position = behind + 2
            size = _WHOLE_SIZE.match(data, position)
        return position

    def _take_data(self, data: bytes, position: int, payload: List[bytes]) -> int:
        behind = min(position + self._left, len(data))
        payload.append(data[position:behind])
        self._left -= behind - position
        if not self._left:
            self._state = _DATA_END
        return behind

    def _take_data_end(self, data: bytes, position: int) -> int:
        missing = b"\r\n"[len(self._line):]
        came = data[position:position + len(missing)]
        if came == missing:
            self._state = _SIZE
            self._line = b""
        elif came == b"\r" and missing == b"\r\n":
            self._line = came
        else:
            raise ValueError("a chunk is longer than it said")
        return position + len(came)

    def _take_line(self, data: bytes, position: int) -> int:
        """A chunk's size, or a trailer."""
        newline = data.find(b"\n", position)
        behind = newline + 1
        if newline < 0:
            behind = len(data)
        line = self._line + data[position:behind]
        if len(line) > MAX_FRAMING_LINE_BYTES:
            raise ValueError("a line of the chunk framing is too long")
        self._line = line
        if newline < 0:
            return behind
        if not line.endswith(b"\r\n"):
            raise ValueError("a line of the chunk framing ends in a bare LF")
        self._line = b""
        if self._state == _SIZE:
            self._end_size(line[:-2])
        else:
            self._end_trailer(line[:-2])
        return behind

    def _end_size(self, line: bytes) -> None:
        match = _CHUNK_SIZE.match(line)
        if match is None:
            raise ValueError("malformed chunk size")
        self._left = int(match.group(1), 16)
        self._state = _DATA
        if not self._left:
            self._state = _TRAILER
            self._left = MAX_HEADERS

    def _end_trailer(self, line: bytes) -> None:
        if not line:
            self._state = _DONE
            return
        for header in _split_head(line):
            _split_header(header)
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"more than {MAX_HEADERS} trailers")


def body_of(response: Response) -> Union[SizedBody, ChunkFraming, BodyToTheClose]:
    """What takes an answer's body out of its framing."""
    if response.framing == "chunked":
        return ChunkFraming()
    if response.framing == "close":
        return BodyToTheClose()
    return SizedBody(response.length if response.framing == "length" else 0)


def chunk(data: bytes) -> bytes:
    """Frame `data` as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


# ---- what is in a request's body


def _unpacker(coding: str) -> Any:
    """What undoes a Content-Encoding, with the methods of zlib's. Errors: HttpError 415."""
    import zlib
    # The largest window; 16 more says that it is gzip's wrapping, not zlib's.
    if coding in ("gzip", "x-gzip"):
        return zlib.decompressobj(15 + 16)
    if coding == "deflate":
        return zlib.decompressobj(15)
    if coding == "zstd":
        try:
            from importlib import import_module
            return import_module("compression.zstd").ZstdDecompressor()
        except ImportError:                     # before Python 3.14
            pass
    raise HttpError(415, f"a body with Content-Encoding {coding!r} is not read here; gzip, deflate"
                         " and identity are")


def decoded_body(coding: str, body: bytes) -> bytes:
    """A body without its Content-Encoding. Errors: HttpError 400, 413, 415.

    It never grows beyond MAX_BODY_BYTES, however much is packed into it.
    """
    # Named in the order in which they were done. Two at most: nobody packs a body three times.
    for name in reversed(coding.lower().split(",")[:2]):
        name = name.strip()
        if name in ("", "identity"):
            continue
        unpacker = _unpacker(name)
        try:
            body = unpacker.decompress(body, MAX_BODY_BYTES + 1)
        except Exception as exc:                # zlib's and zstd's errors have no class in common
            raise HttpError(400, f"the body is not {name}: {exc}") from None
        if len(body) > MAX_BODY_BYTES:
            raise HttpError(413, f"the body is over {MAX_BODY_BYTES // 2**20} MiB")
        if not unpacker.eof or unpacker.unused_data:
            raise HttpError(400, f"the body is not one whole {name} stream")
    return body


_BOUNDARY = re.compile(r'multipart/form-data\s*;.*?boundary="?([^";,\s]{1,200})', re.IGNORECASE)
_MODEL_PART = re.compile(rb'content-disposition:[^\r\n]*;[ \t]*name="?model"?[ \t]*(?:;|\r|\Z)',
                         re.IGNORECASE)


def form_model(content_type: str, body: bytes) -> Tuple[int, int]:
    """Where the model's name stands in a form's body, (0, 0) where it does not."""
    boundary = _BOUNDARY.match(content_type)
    if boundary is None:
        return 0, 0
    mark = b"--" + boundary.group(1).encode("latin-1")
    part = body.find(mark)
    while part >= 0:
        following = body.find(b"\r\n" + mark, part)
        blank = body.find(b"\r\n\r\n", part)    # between a part's headers and its value
        if following < 0 or blank < 0:
            break
        if blank < following and _MODEL_PART.search(body[part:blank]):
            return blank + 4, following
        part = following + 2
    return 0, 0


# ---- our own errors


_ANTHROPIC_KINDS = {"upstream_error": "api_error", "server_error": "api_error",
                    "not_found": "not_found_error", "forbidden": "permission_error"}


def error_json(message: str, kind: str, code: Union[int, str, None] = None,
               protocol: str = "") -> bytes:
    """An error body in the shape of the path asked: OpenAI's, Anthropic's or Ollama's."""
    if protocol.startswith("/api/"):
        return json.dumps({"error": message}, ensure_ascii=False).encode()
    value: Dict[str, Any] = {
        "error": {"message": message, "type": kind, "param": None, "code": code}}
    if protocol.startswith("/v1/messages"):
        kind = _ANTHROPIC_KINDS.get(kind, kind)
        value = {"type": "error", "error": {"type": kind, "message": message}}
    return json.dumps(value, ensure_ascii=False).encode()


def _failed_response(message: str, kind: str) -> bytes:
    """What ends a stream of /v1/responses.

    OpenAI's libraries raise upon an `error` that has one inside; Codex reads response.failed. That
    comes behind it: the libraries' newest would find that its id is none they know.
    """
    error = {"code": "server_error", "message": message}
    said = {
        "type": "error",
        "sequence_number": 0,
        "param": None,
        **error,
        "error": {**error, "type": kind, "param": None},
    }
    response = {"id": "", "object": "response", "status": "failed", "output": [], "error": error}
    failed = {"type": "response.failed", "sequence_number": 1, "response": response}
    text = ""
    for event in (said, failed):
        data = json.dumps(event, ensure_ascii=False)
        text += f"event: {event['type']}\ndata: {data}\n\n"
    return text.encode()


def error_event(message: str, kind: str = "upstream_error", protocol: str = "") -> bytes:
    """A server-sent event that says a stream has failed."""
    code = None
    if kind == "server_error":                  # opencode (1.18) asks again upon this word
        code = kind
    body = error_json(message, kind, code, protocol)
    if protocol.startswith("/v1/messages"):
        return b"event: error\ndata: " + body + b"\n\n"
    if protocol == "/v1/responses":
        return _failed_response(message, kind)
    return b"data: " + body + b"\n\n"


# ---- who may ask

_LOOPBACK_NAME = re.compile(
    r"(?:localhost|[a-z0-9.-]+\.localhost|127(?:\.[0-9]{1,3}){3}|\[::1\]|::1)\.?(?::[0-9]{1,5})?\Z")


@functools.lru_cache(maxsize=32)                # each request asks it of the same few
def is_loopback(host: str) -> bool:
    """True for a host, with or without a port, that can only mean this machine."""
    return bool(_LOOPBACK_NAME.match(host.strip().lower()))


# What containers call the machine they run on; nobody can have a name of that domain.
CONTAINER_HOSTS = ("host.docker.internal", "host.containers.internal")


def host_matches(host: str, pattern: str) -> bool:
    """Whether a lower-case host is that of a pattern, exact or with `*.` in front."""
    if pattern.startswith("*."):
        return host.endswith(pattern[1:])
    return host == pattern


def origin_matches(origin: str, pattern: str) -> bool:
    """Whether a page's origin is that of a pattern of allowed_origins.

    A pattern without a scheme is a host's, on any port, by http or https.
    """
    scheme, _, place = origin.lower().partition("://")
    wanted, found, where = pattern.rpartition("://")
    if not found:
        host, _, _ = place.rpartition(":")
        return scheme in ("http", "https") and host_matches(host or place, where)
    if scheme != wanted:
        return False
    return where == "*" or host_matches(place, where)


def refusal(request: Request, loopback: bool, origins: Sequence[str] = (),
            hosts: Sequence[str] = ()) -> str:
    """Why a request may come from a web page that has no business here, or "".

    A page that resolved its own name to 127.0.0.1 gives itself away by Host, a cross-site one by
    Origin or Sec-Fetch-Site (an <img> sends no Origin, and GET /unload has effects). `origins` and
    `hosts` are patterns of those that may ask all the same.
    """
    host = request.header(b"host")
    if loopback and host and not is_loopback(host):
        name, _, _ = host.lower().partition(":")
        patterns = [pattern.partition(":")[0] for pattern in hosts]
        if not any(host_matches(name, pattern) for pattern in patterns):
            return (f"Host {host!r} is not this machine; use 127.0.0.1,"
                    " or name it in allowed_hosts of models.ini")
    if b"origin" in request.fields:
        origin = request.header(b"origin")
        if any(origin_matches(origin, pattern) for pattern in origins):
            return ""
        place = origin.split("://", 1)[-1]
        # In a network, our own page comes from the address that it is asked at.
        if not is_loopback(place) and (loopback or place != host):
            return (f"Origin {origin!r} may not use this router;"
                    " allowed_origins in models.ini names pages that may")
        return ""
    site = request.fields.get(b"sec-fetch-site", b"")
    if loopback and site.lower() == b"cross-site":
        return "cross-site requests may not use this router"
    return ""


# ==================================================================================================
# PURE: ANSWERS
# ==================================================================================================
# What the errors and the last bytes of an answer say: whose fault it was, what a prompt took.


class Counts(NamedTuple):
    """Tokens as an answer counts them; 0 where it does not say."""

    prompt: int = 0                             # all of it, cached or not
    cached: int = 0                             # of these, not read anew
    output: int = 0
    read_per_s: float = 0.0                     # tokens a second: of the prompt read anew
    written_per_s: float = 0.0
    drafted: int = 0                            # tokens that a draft has proposed...
    accepted: int = 0                           # ...and of these, those that were taken


NOTHING_COUNTED = Counts()
_COUNT = re.compile(rb'"(prompt_n|cache_n|predicted_n|draft_n|draft_n_accepted|prompt_tokens'
                    rb'|input_tokens|completion_tokens'
                    rb'|output_tokens|cached_tokens|cache_read_input_tokens'
                    rb'|cache_creation_input_tokens|prompt_per_second|predicted_per_second)"'
                    rb'\s*:\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)')


def tokens_said(said: bytes) -> Counts:
    """What an answer's beginning and end say of tokens: llama.cpp's timings, else a usage."""
    counts = _COUNT.findall(said)
    if not counts:
        return NOTHING_COUNTED
    # A stream may say a number more than once, as it grows: the largest is the last.
    found: Dict[bytes, float] = {}
    for name, value in counts:
        found[name] = max(found.get(name, 0.0), float(value))
    of = found.get
    cached = of(b"cache_n") or of(b"cached_tokens") or of(b"cache_read_input_tokens") or 0
    output = of(b"predicted_n") or of(b"completion_tokens") or of(b"output_tokens") or 0
    prompt = of(b"prompt_tokens") or 0
    if b"prompt_n" in found:                    # llama.cpp: what was read anew
        prompt = found[b"prompt_n"] + of(b"cache_n", 0)
    elif not prompt:
        prompt = of(b"input_tokens") or 0
        if b"cache_read_input_tokens" in found:  # Anthropic's input_tokens leave these out
            prompt += cached + of(b"cache_creation_input_tokens", 0)
    return Counts(
        prompt=int(prompt),
        cached=int(cached),
        output=int(output),
        read_per_s=of(b"prompt_per_second", 0.0),
        written_per_s=of(b"predicted_per_second", 0.0),
        drafted=int(of(b"draft_n", 0)),
        accepted=int(of(b"draft_n_accepted", 0)),
    )


# Words of servers and providers for a prompt that is too long -> where its tokens stand. Sources:
# llama.cpp server-context.cpp; errors of OpenAI, Anthropic, vLLM, SGLang, TGI and LiteLLM as seen.
_TOO_LONG = re.compile(
    r"exceed_context_size_error|context_length_exceeded|ContextWindowExceeded"
    r"|prompt is too long|maximum (?:context|prompt) length|exceed context limit"
    r"|exceeds? the (?:available|model's) context"
    r"|longer than the (?:model's context|maximum model length)"
    r"|input (?:tokens? )?(?:is |are )?too long"
    r"|exceeds the maximum (?:number of tokens|context|allowed length \([0-9]+ tokens)"
    r"|must have less than [0-9]+ tokens|`inputs` tokens \+"
    r"|too many tokens", re.IGNORECASE)
# The prompt's own count comes before one that has the answer's room in it.
_PROMPT_TOKENS = tuple(re.compile(pattern, re.IGNORECASE) for pattern in (
    r'"n_prompt_tokens"\s*:\s*([0-9]+)',
    r"request \(([0-9]+) tokens\)",
    r"prompt is too long: ([0-9]+) tokens",
    r"exceed context limit: ([0-9]+)",
    r"resulted in ([0-9]+) tokens",
    r"given: ([0-9]+)",
    r"([0-9]+) (?:in the messages|in your prompt|of text input|tokens from the input)",
    r"(?:requested|contains?(?: at least)?|has) ([0-9]+)(?: input)? tokens",
    r"length of (?:prompt|input)[^0-9]{0,20}\(?([0-9]+)",
    r"prompt \(length ([0-9]+)\)",
    r"input[^0-9]{0,40}\(?([0-9]+) tokens",
    r"input token count \(([0-9]+)\)"))


def prompt_tokens_said(status: int, text: str) -> int:
    """How many tokens a prompt has that a 400 or 413 calls too long.

    0 for any other error; 1 where it is too long and its tokens are not said.
    """
    if status not in (400, 413, 422, 500):
        return 0
    if not _TOO_LONG.search(text[:RECV_BYTES]):
        return 0
    text = text.replace(",", "")                # some write 131,072
    for pattern in _PROMPT_TOKENS:
        found = pattern.search(text)
        if found:
            return max(1, int(found.group(1)))
    return 1


_PICTURE_FAULT = re.compile(r"image input is not supported|audio input is not supported|mmproj"
                            r"|does not support (?:image|vision)|multimodal", re.IGNORECASE)
_TOOL_FAULT = re.compile(r"failed to parse tools|unsupported param|tool_choice|json schema"
                         r"|grammar", re.IGNORECASE)


def pictures_refused(text: str) -> bool:
    """Whether an error says that a model takes no pictures."""
    return bool(_PICTURE_FAULT.search(text[:RECV_BYTES]))


def own_fault(status: int, text: str) -> bool:
    """Whether an error is the request's own fault although its status blames the server.

    llama.cpp answers 500 to a picture without a projector, and to tools that it cannot parse.
    """
    if status != 500:
        return False
    return pictures_refused(text) or bool(_TOOL_FAULT.search(text[:RECV_BYTES]))


def falls_through(status: int, hosted: bool = False) -> bool:
    """True for an upstream's status that another tier may do better on.

    A 400 is the request's own fault. For a hosted tier also 402 (its credit is used up) and 404
    (its provider has retired the model).
    """
    if hosted and status in (402, 404):
        return True
    # 401 and 403 are about our key for that tier, which no other tier asks for.
    return status in (401, 403, 408, 429) or status >= 500


def parse_retry_after(value: str, now: float) -> float:
    """Seconds of a Retry-After, a number or a date; 0.0 for anything else. `now`: Unix time."""
    if re.match(r"[0-9]{1,6}(\.[0-9]+)?\Z", value):
        return float(value)
    if not re.match(r"[A-Z][a-z]{2}, ", value):
        return 0.0
    from email.utils import parsedate_to_datetime
    try:
        return max(parsedate_to_datetime(value).timestamp() - now, 0.0)
    except (ValueError, TypeError, OverflowError):
        return 0.0


# Header with a client's name for a conversation -> the client.
_SESSION_HEADERS = {b"x-session-affinity": "opencode", b"x-claude-code-session-id": "claude",
                    b"session_id": "codex"}


def client_named(fields: Mapping[bytes, bytes]) -> str:
    """The client that a request's session header belongs to, "" for any other."""
    for name, client in _SESSION_HEADERS.items():
        if fields.get(name):
            return client
    return ""


def conversation_keys(fields: Mapping[bytes, bytes], body: Mapping[str, Any]) -> Tuple[str, str]:
    """What tells a conversation from others, and its own requests from side requests.

    The first is its client's name for it, else how it begins; the second has the user's first
    message, too. Texts are hashed, anew in each process. "" where there is no conversation.
    """
    begins = [_plain_text(body[key]) for key in _SYSTEM_KEYS if key in body]
    first: Optional[str] = None
    for message in _messages(body):
        text = _plain_text(message.get("content"))
        begins.append(text)
        if message.get("role") == "user":
            first = text
            break
    key = body.get("prompt_cache_key") or body.get("session_id")
    for name in _SESSION_HEADERS:
        if fields.get(name):
            key = fields[name].decode("latin-1")
            break
    if isinstance(key, str) and key:
        key = key[:200]                         # a client's own word: as long as it likes
    else:
        text = "\0".join(begins)
        # A completion has no messages; its prompt grows, so only how it begins is the same.
        text = text or _plain_text(body.get("prompt"))[:4096]
        key = f"{hash(text):x}" if text else ""
    if not key or first is None:
        return key, ""
    return key, f"{key}/{hash(first):x}"


Segments = Tuple[int, ...]                      # digest and characters, in turn


def _unmarked(value: Any) -> Any:
    """A value without what marks a prompt for a provider's cache and is no part of it."""
    if isinstance(value, dict):
        return {k: _unmarked(v) for k, v in value.items() if k != "cache_control"}
    if isinstance(value, list):
        return [_unmarked(item) for item in value]
    return value


def _segment(value: Any) -> Segments:
    text = repr(value)
    if "cache_control" in text:
        text = repr(_unmarked(value))
    return hash(text), len(text)


def _message_segment(message: Mapping[str, Any]) -> Segments:
    """Of one message. A single part of text counts as the text: clients send it now so, now so."""
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1:
        content = _plain_text(content) or content
    if isinstance(content, str) and len(message) == 2:      # role and content: the usual case, fast
        return hash((message.get("role"), content)), len(content)
    return _segment({**message, "content": content})


def prompt_segments(body: Mapping[str, Any]) -> Segments:
    """A prompt's parts as it is read, told by digests: system text, tools, then each message."""
    messages = _messages(body)
    first = 0                                   # that is not the system's
    for message in messages:
        if message.get("role") not in ("system", "developer"):
            break
        first += 1
    system = [body.get("system"), body.get("instructions"), *messages[:first]]
    # Templates put the tools before the messages, wherever a body has them.
    tools = [body.get("tools"), body.get("functions")]
    found = [*_segment(system), *_segment(tools)]
    for message in messages[first:]:
        found += _message_segment(message)
    return tuple(found)


def same_beginning(before: Segments, now: Segments) -> Tuple[float, str]:
    """(how much of the last prompt the next one begins with, 0 to 1, and where they part).

    Told in characters; "" where the next goes on where the last ended.
    """
    same_chars = 0
    for i in range(0, len(before), 2):
        end = i + 2
        if before[i:end] != now[i:end]:
            part = i // 2                       # 0: the system's, 1: the tools, then messages
            where = f"message {part - 1}"
            if part < 2:
                where = ("system text", "tools")[part]
            return same_chars / sum(before[1::2]), where
        same_chars += before[i + 1]
    return 1.0, ""


def waiting_event(words: str) -> bytes:
    """A chat's event that shows what is waited for, as llama-swap's loading state does."""
    delta = {"role": "assistant", "reasoning_content": words + "\n"}
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    event = {"id": "llmstack-waiting", "object": "chat.completion.chunk", "created": 0,
             "model": "llmstack", "choices": [choice]}
    return b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"


# What llama.cpp prints when a load fails -> what that means, as seen with b11549.
_LOAD_FAILURES = tuple((re.compile(pattern, re.IGNORECASE), words) for pattern, words in (
    (r"not within the file bounds|corrupted or incomplete|failed to read", "the file is cut short"),
    (r"invalid magic|failed to read magic", "the file is no GGUF"),
    (r"unknown model architecture", "this llama-server does not know its architecture"),
    (r"out of memory|failed to allocate|unable to allocate|cudaMalloc", "memory ran out"),
    (r"there is no |No such file|failed to open", "the file is not there"),
    (r"error: invalid argument|error while handling argument", "llama-server refuses a flag"),
    (r"not loaded within", "it took too long"),
))


def size_words(size: float) -> str:
    """5.6 GB, or 3.1 MB where that says more; "" for none."""
    if not size:
        return ""
    if size >= 5e7:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB"


def load_failure_words(text: str) -> str:
    """Why a load has failed, in a few words."""
    for pattern, words in _LOAD_FAILURES:
        if pattern.search(text):
            return words
    return text.partition("\n")[0].rstrip(":")


# b11549 prints the first once a batch of 2,048 tokens, the others when a request writes or has
# ended, and the last when a server begins.
_READING = re.compile(r"task +([0-9]+) \| (?:prompt processing.* progress = ([01]\.[0-9]+)"
                      r"|prompt eval time|stop processing)|srv +init: initializing")


def prompt_read(log: str) -> float:
    """The share of its prompt that the only request under way has read, as a llama-server's log
    says; 0.0 where it does not, or of several."""
    shares: Dict[str, float] = {}
    for found in _READING.finditer(log):
        task, share = found.groups()
        if task is None:
            shares.clear()
        elif share is None:
            shares.pop(task, None)
        else:
            shares[task] = float(share)
    if len(shares) != 1:
        return 0.0
    return sum(shares.values())


def percent_words(share: float) -> str:
    """" 62 %", "" for nothing that is known."""
    if not share:
        return ""
    return f" {min(share, 1) * 100:.0f} %"


# ==================================================================================================
# PURE: SHELL
# ==================================================================================================
# Text that a shell evaluates: hooks, variables, prompts. Whatever a directory, a file or another
# machine has named is quoted here for the shell that reads it, and expanded by none.

SHELL_VARIABLES = (
    "OPENCODE_CONFIG",
    "LLMSTACK_WORK_DIR",
    "LLMSTACK_CHANNEL",
    "LLMSTACK_ROOT",
    "LLMSTACK_REMOTE_URL",
)

# How a variable is set for programs, set for the shell alone, and unset; bash's stands for any
# other shell.
_ASSIGNMENTS = {
    "bash": ("export {name}={word}", "{name}={word}", "unset {name}"),
    "fish": ("set -gx {name} {word}", "set -g {name} {word}", "set -e {name}"),
    "powershell": ("$env:{name} = {word}", "$global:{name} = {word}", "$env:{name} = $null"),
}

# The files below share/hooks/ that are, one behind the other, the hook of a shell.
HOOK_SOURCES = {
    "bash": ("llmstack.sh", "llmstack.bash"),
    "fish": ("llmstack.fish",),
    "powershell": ("llmstack.ps1",),
    "zsh": ("llmstack.sh", "llmstack.zsh"),
}
SHELLS = tuple(HOOK_SOURCES)


def shell_name(program: str) -> str:
    """bash, zsh, fish or powershell by a program's path, "" for any other shell."""
    # A login shell calls itself -bash.
    name = re.sub(r".*[/\\]|\.exe\Z", "", program.lower()).lstrip("-")
    if name == "pwsh":
        return "powershell"
    if name in SHELLS:
        return name
    return ""


def _powershell_characters(word: str) -> str:
    """A word by its character codes: Windows reads the bytes of text beyond ASCII as it likes."""
    raw = word.encode("utf-16-le", "surrogatepass")
    codes = [str(unit) for unit, in struct.iter_unpack("<H", raw)]
    return f"(-join[char[]]({','.join(codes)}))"


def shell_quote(shell: str, word: str) -> str:
    """One word of a shell's text that stands for `word`, whatever is in it."""
    if shell == "fish":
        word = word.replace("\\", "\\\\").replace("'", "\\'")
    elif shell != "powershell":
        word = word.replace("'", "'\\''")
    elif word.isascii() and word.isprintable():
        word = word.replace("'", "''")
    else:
        return _powershell_characters(word)
    return f"'{word}'"


def activate_line(shell: str, program: Sequence[str] = ()) -> str:
    """What turns the hook on in a start-up file.

    `program`: the words that run llmstack where its name alone does not.
    """
    words = " ".join(shell_quote(shell, word) for word in program)
    command = f"{words or 'llmstack'} activate {shell}"
    if shell == "fish":
        return f"{command} | source"
    if shell != "powershell":
        return f'eval "$({command})"'
    if program:                                 # a quoted word is no command
        command = f"& {command}"
    return f"{command} | Out-String | Invoke-Expression"


# The colour of an external project's prefix: (on, off), marked as of no width where a shell asks.
_PREFIX_COLOURS = {"bash": ("\\[\\e[38;5;98m\\]", "\\[\\e[0m\\]"), "zsh": ("%F{98}", "%f")}
_TERMINAL_COLOUR = ("\x1b[38;5;98m", "\x1b[0m")


def prompt_prefix(shell: str, channel: str, project: str, url: str, colour: bool) -> str:
    """What stands before a prompt, in the shell's own prompt language; no shell expands any of it.

    `project` is a directory's name: of it only letters, digits and . _ - are left. `url` is a
    marker's.
    """
    if channel != "external":
        return f"[llmstack:{channel}] "
    name = re.sub(r"[^\w.-]", "_", project)[:40] or "_"
    text = f"[llmstack:{name} {url}]"
    if colour:
        on, off = _PREFIX_COLOURS.get(shell, _TERMINAL_COLOUR)
        text = on + text + off
    return text + " "


def render_assignment(shell: str, name: str, value: Optional[str], export: bool = True) -> str:
    """A line that sets a variable, or unsets it where `value` is None."""
    form, own, unset = _ASSIGNMENTS.get(shell, _ASSIGNMENTS["bash"])
    if value is None:
        return unset.format(name=name)
    if not export:
        form = own
    word = shell_quote(shell, value)
    return form.format(name=name, word=word)


def render_own_variable(shell: str, name: str, value: str) -> str:
    """A line that sets a variable of the hook's own, which no program is to see."""
    return render_assignment(shell, f"_llmstack_{name}", value, export=False)


def render_hook(shell: str, text: str, python: str, program: str, trust: str) -> str:
    """The hook of a shell: its text below share/hooks/, and in front of it where the program is.

    Sourced twice it is the same as once.
    """
    lines = [
        render_own_variable(shell, "python", python),
        render_own_variable(shell, "program", program),
        render_own_variable(shell, "trust", trust),
        text,
    ]
    return "\n".join(lines)


def render_hook_answer(shell: str, values: Mapping[str, str], exported: Iterable[str], prefix: str,
                       hook: str) -> str:
    """What a hook evaluates on entering a project; `exported`: names that were exported before."""
    kinds = dict.fromkeys(exported, "x")
    lines = []
    for name, value in values.items():
        # Leaving the project, the hook restores a variable as it was: exported or the shell's own.
        kind = kinds.get(name, "s")
        word = shell_quote(shell, value)
        lines.append(f"_llmstack_set {name} {word} {kind}")
    lines.append(render_own_variable(shell, "prefix", prefix))
    lines.append(render_assignment(shell, "LLMSTACK_HOOK", hook))
    return "\n".join(lines) + "\n"


_ZSHENV_HEAD = r"""
{ if [[ -r ${ZDOTDIR:-$HOME}/.zshenv ]]; then source "${ZDOTDIR:-$HOME}/.zshenv"; fi } always {
_llmstack_start() {
local st=$?
emulate -L zsh
precmd_functions=(${precmd_functions:#_llmstack_start})
"""
_ZSHENV_TAIL = """_llmstack_prompt
return $st
}
typeset -ga precmd_functions
precmd_functions+=(_llmstack_start)
}
"""


def render_shell_start(shell: str, hook: str, values: Mapping[str, str], prefix: str,
                       zdotdir: Optional[str]) -> str:
    """What the shell of `start` runs after the user's own start-up files, which may have set the
    variables otherwise.

    For bash a whole rc file. For zsh a whole .zshenv, the only file that is not read from the
    user's ZDOTDIR: it puts that back (None: there is none) and leaves the rest to the first prompt,
    so that HISTFILE, .zcompdump and whatever else zsh and its frameworks derive from it are the
    user's.
    """
    lines = [hook]
    for name, value in values.items():
        lines.append(render_assignment(shell, name, value))
    lines.append(render_own_variable(shell, "prefix", prefix))
    text = "\n".join(lines) + "\n"
    if shell == "bash":
        return "if [ -r ~/.bashrc ]; then . ~/.bashrc; fi\n" + text
    if shell == "fish":
        return text + "_llmstack_prompt\n"
    if shell == "zsh":
        return render_assignment("zsh", "ZDOTDIR", zdotdir) + _ZSHENV_HEAD + text + _ZSHENV_TAIL
    return text


# ==================================================================================================
# PURE: DOWNLOADS
# ==================================================================================================
# What is to be fetched from the hub for which tier, as jobs of a queue. Names come from models.ini
# and from a queue that a clone may have brought along: none leads out of its directory.


class Job(NamedTuple):
    """One GGUF to fetch for one tier, with all the parts it is split into."""

    tier: str
    label: str                                  # current | next
    repo: str
    files: Tuple[str, ...]
    beside: Tuple[str, ...] = ()                # the project's other files of that repository

    @property
    def name(self) -> str:
        return f"{self.tier}-{self.label}"


def parse_job(row: Mapping[str, Any]) -> Optional[Job]:
    """A job of the queue file; None where it is none, or a name leads out of its directory."""
    files: Any = row.get("files")
    beside: Any = row.get("beside")
    for names in (files, beside):
        if not isinstance(names, (list, tuple)):
            return None
    job = Job(
        tier=str(row.get("tier")),
        label=str(row.get("label")),
        repo=str(row.get("repo")),
        files=tuple(map(str, files)),
        beside=tuple(map(str, beside)),
    )
    if job.label not in ("current", "next") or not job.files:
        return None
    shapes = [(_NAME, job.tier), (_REPO, job.repo)]
    for file in job.files + job.beside:
        shapes.append((_HUB_PATH, file))
    for shape, text in shapes:
        if not shape.match(text):
            return None
    return job


_SPLIT = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf\Z")
MAX_PARTS = 1000


def split_parts(file: str) -> Tuple[str, ...]:
    """All the files of a split GGUF, named by any of them; the file itself where it is whole."""
    match = _SPLIT.match(file)
    if match is None:
        return (file,)
    stem, _, count = match.groups()
    # A name is a stranger's word: 99,999 files would be asked for.
    if not 0 < int(count) <= MAX_PARTS:
        return (file,)
    parts = []
    for number in range(1, int(count) + 1):
        parts.append(f"{stem}-{number:05d}-of-{count}.gguf")
    return tuple(parts)


# ==================================================================================================
# SYSTEM EDGE
# ==================================================================================================
# The room of what differs between systems: directories and files, the memory there is, logs, locks,
# and how to speak to the user. What a project is has its place here (find_places), and how much
# memory its models may take (this_machine). It may touch the disk and run small system programs; it
# starts no process that stays, opens no socket and knows nothing of a stack.

# How a line is said to the user, and a yes or no asked for; None where nobody is there.
Say = Callable[[str], None]
Ask = Callable[[str], Optional[bool]]

# Tests set these two: what another platform does is run, not only read.
IS_WINDOWS = sys.platform == "win32"
IS_MAC = sys.platform == "darwin"
EXE = ".exe" if IS_WINDOWS else ""

# Absolute from the start, so that a later chdir does not lose it: what daemons are spawned from.
_LOADER: Any = globals()["__loader__"]
PROGRAM = os.path.abspath(getattr(_LOADER, "archive", None) or __file__)


def _beside(name: str) -> str:
    """Where a file lies that travels with the program: beside the source, or in the zipapp."""
    return os.path.join(os.path.dirname(__file__), name)


def read_resource(name: str) -> bytes:
    """A file that travels with the program.

    importlib.resources fails for a top-level module before 3.13; the loader's get_data does not.
    Errors: UserError where the program has been copied without it.
    """
    path = _beside(name)
    try:
        data: bytes = _LOADER.get_data(path)
    except OSError:
        raise UserError(f"{path} is missing", "copy it along with llmstack.py, or take"
                        " llmstack.pyz, which has it inside") from None
    return data


def read_shared_text(name: str) -> str:
    """A text below share/, with plain newlines whatever a checkout has made. Errors: UserError."""
    return read_resource("share/" + name).decode("utf-8").replace("\r\n", "\n")


def read_profile(name: str) -> bytes:
    """The models.ini of a profile. Errors: UserError where the program was copied without it."""
    bundled = read_resource("models.ini")
    if name == BUNDLED_PROFILE:
        return bundled
    text = bundled.decode("utf-8").replace("\r\n", "\n")
    text = render_profile(text, read_shared_text(f"profiles/{name}.ini"))
    return text.encode("utf-8")


def guest_command(python: str, name: str) -> List[str]:
    """The command that runs share/guests/NAME.py inside another environment's Python.

    The zipapp's own start runs a guest out of the archive and loads nothing else of it.
    Errors: UserError where llmstack.py has been copied without share/.
    """
    if getattr(_LOADER, "archive", None):
        return [python, PROGRAM, "_guest", name]
    folder = os.path.dirname(PROGRAM)
    path = os.path.join(folder, "share", "guests", name + ".py")
    if not os.path.isfile(path):
        raise UserError(f"there is no {path}",
                        "copy share/ beside llmstack.py, or take llmstack.pyz, which has it inside")
    return [python, path]


# ---- where a project and its files are


class Places(NamedTuple):
    """Directories and files of one invocation, absolute, and the environment it works in.

    As a rule made by places_at or find_places.
    """

    work: str                                   # the project
    state: str                                  # its .llmstack
    models_ini: str
    data: str                                   # shared by all projects of this user
    env: Mapping[str, str] = os.environ

    def in_state(self, name: str) -> str:
        return os.path.join(self.state, name)

    def log(self, name: str) -> str:
        return os.path.join(self.state, "logs", name)

    @property
    def is_demo(self) -> bool:
        return self.work == os.path.join(self.data, "demo")

    @property
    def project(self) -> str:
        """The real path of the directory that owns .llmstack: what marks and records name."""
        return os.path.dirname(os.path.realpath(self.state))


def places_at(data: str, work: str, env: Mapping[str, str] = os.environ) -> Places:
    """The places of the project in a directory."""
    state = os.path.join(work, ".llmstack")
    models_ini = os.path.join(state, "models.ini")
    return Places(work, state, models_ini, data, env)


def _expand(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def data_dir(env: Mapping[str, str]) -> str:
    if env.get("LLMSTACK_DATA_DIR"):
        return _expand(env["LLMSTACK_DATA_DIR"])
    variable, usual = "XDG_DATA_HOME", "~/.local/share"
    if IS_WINDOWS:
        variable, usual = "LOCALAPPDATA", "~/AppData/Local"
    root = env.get(variable) or os.path.expanduser(usual)
    return os.path.join(os.path.abspath(root), "llmstack")


_PROJECT_FILES = ("models.ini", "default-channel", "opencode.json")


def nearest_project(directory: str, is_project: Callable[[str], bool]) -> str:
    """The nearest directory at or above that one whose .llmstack/ is a project's, "" for none."""
    while not is_project(os.path.join(directory, ".llmstack")):
        above = os.path.dirname(directory)
        if above == directory:
            return ""
        directory = above
    return directory


def _is_state(state: str) -> bool:
    """True for a .llmstack/ of ours, not somebody else's directory or the remains of one."""
    files = [os.path.join(state, name) for name in _PROJECT_FILES]
    return any(map(os.path.lexists, files))


def find_places(env: Mapping[str, str], demo: bool = False) -> Places:
    """Where this invocation works: $LLMSTACK_WORK_DIR, else the project around us.

    The demo has its own place.
    """
    data = data_dir(env)
    if demo:
        # The demo brings a models.ini of its own, whatever the environment names.
        return places_at(data, os.path.join(data, "demo"), env)
    if env.get("LLMSTACK_WORK_DIR"):
        work = os.path.abspath(env["LLMSTACK_WORK_DIR"])
    else:
        try:
            here = os.getcwd()
        except FileNotFoundError:
            raise UserError("the current directory is gone", "cd into another") from None
        work = nearest_project(here, _is_state) or here
    places = places_at(data, work, env)
    if env.get("LLMSTACK_MODELS_INI"):
        return places._replace(models_ini=_expand(env["LLMSTACK_MODELS_INI"]))
    return places


# ---- files

_OF_ANOTHER_KIND = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EINVAL)
_PATH_HINTS = {
    **dict.fromkeys(_OF_ANOTHER_KIND, "move away what stands in its place"),
    errno.EFBIG: "make it smaller",
    errno.ENOSPC: "free some room",
}


def path_hint(exc: OSError) -> str:
    """What to do about a path that can be neither read nor written."""
    return _PATH_HINTS.get(exc.errno or 0, "mend its permissions, or those of its directory")


def path_error(verb: str, path: str, exc: OSError, exit_code: int = 1) -> UserError:
    """`cannot VERB path: why`, and what to do about it."""
    what = f"cannot {verb} {path}: {exc.strerror or exc}"
    return UserError(what, path_hint(exc), exit_code)


# Prompts stand in logs and caches, so whatever we write is for its user alone, whatever the umask
# is. Directories do most of that: nothing below a closed one can be reached.


def make_private_dir(path: str) -> None:
    """Make a directory and what is missing above it, for this user alone. Errors: OSError."""
    if not path or os.path.isdir(path):
        return
    make_private_dir(os.path.dirname(path))
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        # Another process was quicker, or a file stands there.
        if not os.path.isdir(path):
            raise


def _close_open_file(handle: int) -> None:
    """Take from others what they may do with an open file or directory of this user."""
    if IS_WINDOWS:
        return
    status = os.fstat(handle)
    mode = status.st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return
    if status.st_uid != os.geteuid() or not mode & 0o077:
        return
    try:
        os.fchmod(handle, mode & 0o700)
    except OSError:
        # Some file systems have no permissions.
        pass


def close_to_others(*paths: str) -> None:
    """Take from others what they may do with files and directories of this user, where they are.

    A link is left alone: it may lead to what is meant to be seen.
    """
    if IS_WINDOWS:
        return
    # A pipe that a clone has put there would be waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    for path in paths:
        try:
            handle = os.open(path, flags)
        except OSError:
            continue
        try:
            _close_open_file(handle)
        finally:
            os.close(handle)


def replace_file(source: str, target: str) -> None:
    """os.replace, on Windows tried for a second while somebody reads `target`. Errors: OSError."""
    end = time.monotonic() + 1
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not IS_WINDOWS or time.monotonic() > end:
                raise
        time.sleep(0.05)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def write_atomic(path: str, data: Union[str, bytes], mode: int = 0o600) -> None:
    """Write a file whole or not at all. Errors: UserError."""
    import tempfile
    if isinstance(data, str):
        data = data.encode("utf-8")
    directory = os.path.dirname(path)
    try:
        make_private_dir(directory)
        # In the same directory: os.replace is atomic only within one file system.
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            replace_file(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
    except OSError as exc:
        raise path_error("write", path, exc) from None


def _open_at_once(path: str, flags: int) -> int:
    """An opener that does not wait for a pipe's other end."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_regular(path: str, limit: int = MAX_STATE_BYTES) -> bytes:
    """The bytes of a regular file: what a cloned directory puts in its place cannot hang a reader.

    Errors: OSError, also for a pipe, a device, and a file of more than `limit` bytes.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        data = b""
        while len(data) <= limit:
            # In pieces: /proc/sys refuses to fill megabytes.
            part = file.read(RECV_BYTES)
            if not part:
                return data
            data += part
    raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes")


def read_text(path: str) -> str:
    """The text of a small file of ours, "" when it is not there or not text."""
    try:
        return read_regular(path).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def dict_of(value: object) -> Dict[str, Any]:
    """A value that should be an object; {} for any other."""
    if not isinstance(value, dict):
        return {}
    return value


def parse_json_object(data: Union[str, bytes]) -> Dict[str, Any]:
    """What another process or an older version wrote, {} where it is no JSON object."""
    try:
        return dict_of(json.loads(data))
    except (ValueError, RecursionError):
        return {}


def _read_json(path: str) -> Dict[str, Any]:
    return parse_json_object(read_text(path))


# ---- small system programs, and the memory there is


def program_output(command: Sequence[str]) -> str:
    """What a small system program prints, "" when it is missing or fails.

    In C and UTC: ps prints local times.
    """
    import subprocess
    # A translated answer would not be understood.
    env = {**os.environ, "LC_ALL": "C", "TZ": "UTC0"}
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, timeout=10, check=False, env=env)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def _windows_memory_gb() -> float:
    import ctypes
    # The structure is MEMORYSTATUSEX, whose first word is its size.
    status = ctypes.create_string_buffer(64)
    ctypes.memmove(status, (64).to_bytes(4, "little"), 4)
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(status):  # type: ignore[attr-defined]
        return 0.0
    return int.from_bytes(status.raw[8:16], "little") / 1e9


def total_memory_gb() -> float:
    """Physical memory, or a container's share of it, in GB; 0.0 when it cannot be told."""
    if IS_WINDOWS:
        return _windows_memory_gb()
    try:
        total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0.0
    # In a container the kernel tells the whole machine's memory; the limit stands here.
    share = read_text("/sys/fs/cgroup/memory.max").strip()
    if share.isdigit():
        total_bytes = min(total_bytes, int(share))
    return total_bytes / 1e9


DRM = "/sys/class/drm"
CARD_RESERVE_GB = 1.074                         # 1,024 MiB, what llama.cpp's --fit leaves on a card
HOST_SHARE = 0.75                               # of a machine's memory, for models
OWN_MEMORY_GB = 4.2                             # the carve-out of an AMD APU is smaller

# Which cards a process may see, by number or by the beginning of a UUID; of more than one
# variable, each numbers what the one before it has left.
NVIDIA_VISIBLE = ("CUDA_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
AMD_VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")


def visible_cards(uuids: Sequence[str], variables: Sequence[str],
                  env: Mapping[str, str]) -> List[int]:
    """The cards that programs started with `env` may use, as places in `uuids`.

    As CUDA reads it: the first name of no card ends the list, so that nothing and -1 mean none.
    """
    seen = list(range(len(uuids)))
    for variable in variables:
        if variable not in env:
            continue
        chosen: List[int] = []
        for name in env[variable].split(","):
            name = name.strip()
            found = []
            if name.isdigit():
                found = seen[int(name):int(name) + 1]
            elif name:
                found = [i for i in seen if uuids[i].startswith(name)]
            # A name that fits two cards ends the list as an unknown one does; so does a second
            # mention of a card.
            if len(found) != 1 or found[0] in chosen:
                break
            chosen += found
        seen = chosen
    return seen


class Card(NamedTuple):
    """A graphics card of its own memory; GB."""

    uuid: str
    total_gb: float                             # without the driver's reserve; 0: the machine's
    used_gb: float

    @property
    def free_gb(self) -> float:
        return max(0.0, self.total_gb - self.used_gb)


def _mib_gb(text: str) -> float:
    """Mebibytes in GB, 0 for [N/A]."""
    if not text.isdigit():
        return 0.0
    return int(text) * MIB / 1e9


def nvidia_cards() -> List[Card]:
    """What nvidia-smi tells of each card, in its order."""
    command = ["nvidia-smi", "--query-gpu=uuid,memory.total,memory.reserved,memory.used",
               "--format=csv,noheader,nounits"]
    cards = []
    for line in program_output(command).splitlines():
        uuid, *sizes = map(str.strip, line.split(","))
        if len(sizes) == 3:
            total_gb, reserved_gb, used_gb = map(_mib_gb, sizes)
            usable_gb = max(0.0, total_gb - reserved_gb)
            cards.append(Card(uuid, usable_gb, used_gb))
    return cards


def _seen_nvidia_cards(env: Mapping[str, str]) -> List[Card]:
    cards = nvidia_cards()
    seen = visible_cards([card.uuid for card in cards], NVIDIA_VISIBLE, env)
    return [cards[place] for place in seen]


def _amd_memory_gb(which: str) -> List[float]:
    """What each AMD card has of its own memory ("vram"), or may use of the machine's ("gtt")."""
    try:
        names = sorted(os.listdir(DRM))
    except OSError:
        return []
    cards = [name for name in names if re.match(r"card[0-9]+\Z", name)]
    sizes_gb = []
    for card in cards:
        size = read_text(f"{DRM}/{card}/device/mem_info_{which}_total").strip()
        if size.isdigit():
            sizes_gb.append(int(size) / 1e9)
    return sizes_gb


def _nvidia_machine(total_gb: float, env: Mapping[str, str]) -> Optional[Machine]:
    """The budget on NVIDIA cards, None where a program sees none."""
    cards = _seen_nvidia_cards(env)
    if not cards:
        return None
    share_gb = total_gb * HOST_SHARE
    size_gb = sum(card.total_gb for card in cards)
    if not size_gb:
        source = f"75% of {total_gb:.1f} GB, which the GPU shares"
        return Machine(share_gb, source, True, True)
    held_gb = sum(card.used_gb for card in cards)
    source = f"{size_gb:.1f} GB on {len(cards)} NVIDIA card"
    if len(cards) > 1:
        source += "s"
    if held_gb >= 0.05:
        source += f", less {held_gb:.1f} that others hold"
    # A budget of nothing would stand for one that is not known.
    free_gb = max(0.1, size_gb - held_gb)
    each = tuple(card.free_gb for card in cards)
    return Machine(free_gb, source, True, True, share_gb, each)


def _amd_machine(total_gb: float, env: Mapping[str, str]) -> Optional[Machine]:
    """The budget on AMD cards, None where a program sees none.

    An AMD APU with a small carve-out of its own works in the machine's memory, as far as its
    driver lets it (GTT).
    """
    own_gb = _amd_memory_gb("vram")
    # The kernel tells no UUID of an AMD card: a variable can name it by number only.
    seen = visible_cards([""] * len(own_gb), AMD_VISIBLE, env)
    sizes_gb = [own_gb[place] for place in seen]
    cards_gb = [size_gb for size_gb in sizes_gb if size_gb > OWN_MEMORY_GB]
    share_gb = total_gb * HOST_SHARE
    if cards_gb:
        source = f"{sum(cards_gb):.1f} GB on AMD cards, less 1 GiB each"
        each = tuple(size_gb - CARD_RESERVE_GB for size_gb in cards_gb)
        return Machine(sum(each), source, True, host_gb=share_gb, cards=each)
    shared_gb = sum(own_gb) + sum(_amd_memory_gb("gtt"))
    if not seen or not shared_gb:
        return None
    source = f"{shared_gb:.1f} GB that an AMD APU may use of memory, or 75% of that"
    return Machine(min(shared_gb, share_gb), source, True)


def _mac_gpu(total_gb: float) -> Machine:
    """A Mac's wired limit, else macOS's own share of memory.

    That is Metal's recommendedMaxWorkingSetSize: 5.73 GB of 8 GiB, 22.9 of 32, but 29.0 of 36 and
    51.5 of 64.
    """
    limit_gb = _mib_gb(program_output(["sysctl", "-n", "iogpu.wired_limit_mb"]).strip())
    if limit_gb:
        return Machine(limit_gb, "the GPU's wired limit", True)
    share = HOST_SHARE
    if total_gb < 38:
        share = 2 / 3
    source = f"{share:.0%} of {total_gb:.1f} GB, what macOS gives the GPU"
    return Machine(total_gb * share, source, True)


def this_machine(config: Config) -> Machine:
    """memory_gb of models.ini, else what the GPU may take, else 75 % of memory."""
    total_gb = total_memory_gb()
    found: Optional[Machine] = None
    if IS_MAC:
        found = _mac_gpu(total_gb)
    elif config.settings["n_gpu_layers"] != "0":
        found = _nvidia_machine(total_gb, os.environ)
        found = found or _amd_machine(total_gb, os.environ)
    if found is None:
        found = Machine(total_gb * HOST_SHARE, f"75% of {total_gb:.1f} GB of memory", False)
    if config.memory_gb:
        return found._replace(budget_gb=config.memory_gb, source="memory_gb in models.ini")
    # Where nothing can be told, a budget would only stop what may work.
    if not found.budget_gb:
        return found._replace(budget_gb=1e9)
    return found


def number_found(pattern: str, text: str, otherwise: float = 0.0) -> float:
    """The number that a pattern finds in a text."""
    found = re.search(pattern, text, re.MULTILINE)
    if not found:
        return otherwise
    return float(found.group(1))


def read_memory_state(cards: bool) -> MemoryState:
    """What the system tells of its memory now; `cards`: ask NVIDIA's driver, too."""
    import mmap
    free_gb = -1.0
    if cards:
        found = _seen_nvidia_cards(os.environ)
        if any(card.total_gb for card in found):
            free_gb = sum(card.free_gb for card in found)
    if IS_MAC:
        level = program_output(["sysctl", "-n", "kern.memorystatus_vm_pressure_level"]).strip()
        told = program_output(["vm_stat"])
        page_bytes = number_found(r"page size of ([0-9]+)", told, 16_384)
        swapped = number_found(r"Swapouts:\s+([0-9]+)", told) * page_bytes
        return MemoryState(swapped_bytes=int(swapped), critical=level == "4", card_free_gb=free_gb)
    memory = read_text("/proc/meminfo")
    swapped = number_found(r"^pswpout ([0-9]+)", read_text("/proc/vmstat"))
    return MemoryState(
        stalled_pct=number_found(r"some avg10=([0-9.]+)", read_text("/proc/pressure/memory")),
        available_gb=number_found(r"^MemAvailable: +([0-9]+) kB", memory, -1e6) * 1024 / 1e9,
        total_gb=number_found(r"^MemTotal: +([0-9]+) kB", memory) * 1024 / 1e9,
        swapped_bytes=int(swapped) * mmap.PAGESIZE,
        card_free_gb=free_gb,
    )


# ---- what people read, and are asked

# What comes from elsewhere (a path of a clone, another machine's answer, a request, a program's
# output) may hold what steers a terminal: escape sequences, C1 controls, marks that turn the
# direction of text, line ends of Unicode's own. Wherever text leaves for a terminal or a log, it
# passes here. An escape is JSON's, so that what we print as JSON stays that.
_COLOUR = re.compile(r"(\x1b\[(?:0|1|2|3[0-7])m)")


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return json.dumps(character)[1:-1]


def visible(text: str, limit: int = 300) -> str:
    """`text` in one line without anything that steers a terminal; at most `limit` characters."""
    if len(text) > limit:
        text = text[:limit] + "..."
    if text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def visible_lines(text: str) -> str:
    """As visible, for a text of many lines, of any length."""
    lines = text.expandtabs().split("\n")
    return "\n".join(visible(line, sys.maxsize) for line in lines)


def visible_colours(text: str) -> str:
    """As visible_lines, with the colours that paint() gives; none of them outlives the text."""
    parts = _COLOUR.split(text)
    if len(parts) == 1:
        return visible_lines(text)
    shown = [visible_lines(part) for part in parts]
    shown[1::2] = parts[1::2]
    return "".join([*shown, "\x1b[0m"])


USUAL_PLACES = ("/opt/homebrew/bin", "/usr/local/bin", "/usr/bin", "/home/linuxbrew/.linuxbrew/bin")


def find_program(name: str, places: Sequence[str] = USUAL_PLACES) -> str:
    """A program on PATH or in its usual places, "" when there is none."""
    import shutil
    # launchd and a desktop's menu give a PATH without Homebrew's places.
    found = shutil.which(name)
    if found:
        return found
    for directory in places:
        path = os.path.join(directory, name)
        if os.access(path, os.X_OK):
            return path
    return ""


def hook_parts(env: Mapping[str, str]) -> Tuple[str, str, str]:
    """(level, shell, project) of LLMSTACK_HOOK, which is `SHLVL:shell:project`."""
    level, _, rest = env.get("LLMSTACK_HOOK", "").partition(":")
    shell, _, project = rest.partition(":")
    return level, shell, project


def hooked_shell(env: Mapping[str, str]) -> str:
    """The shell whose hook is active where we were started from, "" for none.

    Another level means that a shell without the hook stands between.
    """
    level, shell, _ = hook_parts(env)
    if shell in SHELLS and level == env.get("SHLVL", ""):
        return shell
    return ""


def is_live_terminal() -> bool:
    """True where standard output is a terminal on which a line can be written over."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


class _OutputFailed(Exception):  # noqa: N818
    """Standard output is closed or full; says nothing where that is the reader's will."""


def may_paint() -> bool:
    """True on a terminal, and not under NO_COLOR."""
    return is_live_terminal() and not os.environ.get("NO_COLOR")


def paint(text: str, code: str) -> str:
    if not may_paint():
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def write_out(text: str) -> None:
    """Text as it is on standard output, at once: who pipes us sees progress."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise _OutputFailed from None
    except OSError as exc:
        raise _OutputFailed(f"cannot write the output: {exc.strerror}") from None


def called_as() -> str:
    """What runs this program where its user is: llmstack, else what was typed."""
    env = os.environ
    # In both kinds of shell `llmstack` is a function.
    if env.get("LLMSTACK_ACTIVE") or hooked_shell(env):
        return "llmstack"
    typed = sys.argv[0]
    if find_program("llmstack" + EXE) or os.path.abspath(typed) != PROGRAM:
        return "llmstack"
    # Python has orig_argv since 3.10.
    python, *_ = getattr(sys, "orig_argv", ["python3"])
    return f"{os.path.basename(python)} {posix_quote(typed)}"


def as_called(text: str) -> str:
    """A text whose `llmstack COMMAND` can be typed here; JSON is for programs and stays."""
    if "`llmstack " not in text or text.startswith("{"):
        return text
    return text.replace("`llmstack ", f"`{called_as()} ")


def say(line: str = "") -> None:
    """A line on standard output, whatever text from elsewhere it holds."""
    fit_to_print = visible_lines
    if may_paint():
        fit_to_print = visible_colours
    write_out(fit_to_print(as_called(line)) + "\n")


def as_json(found: Any) -> str:
    """What `--json` prints."""
    return json.dumps(found, indent=2, ensure_ascii=False)


def _tell(line: str) -> None:
    """A line on standard error, whatever text from elsewhere it holds."""
    sys.stderr.write(visible_lines(as_called(line)) + "\n")


def warn(line: str) -> None:
    _tell(f"llmstack: warning: {line}")


def has_person() -> bool:
    """True where somebody is there to be asked."""
    if sys.stdin is None:
        return False
    return sys.stdin.isatty() and sys.stdout.isatty()


def ask_person(question: str) -> Optional[bool]:
    """A yes or no from the terminal; None where there is none."""
    if not has_person():
        return None
    write_out(visible_lines(question))
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def agreed(question: str, unasked: str, hint: str) -> bool:
    """A person's yes. Errors: UserError where there is nobody to ask."""
    answer = ask_person(question)
    if answer is None:
        raise UserError(f"{unasked} unasked, and there is no terminal to ask on", hint)
    return answer


def _never_ask(_: str) -> Optional[bool]:
    """The answer where nobody is to be asked."""
    return None


# ---- logs


def open_log(path: str) -> int:
    """A descriptor that appends to a log, which is this user's alone. Errors: OSError."""
    make_private_dir(os.path.dirname(path))
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    # Not every platform has both of them.
    for name in ("O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    handle = os.open(path, flags, 0o600)
    _close_open_file(handle)
    return handle


def file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def shift_logs(path: str, newest: str = "") -> None:
    """path (or `newest`) -> path.1 -> path.2 -> path.3, the oldest falls away."""
    for number in range(LOGS_KEPT, 0, -1):
        younger = f"{path}.{number - 1}"
        if number == 1:
            younger = newest or path
        try:
            os.replace(younger, f"{path}.{number}")
        except OSError:
            # There are not as many yet.
            pass


LEVELS = {"debug": 10, "info": 20, "warning": 30, "warn": 30, "error": 40, "critical": 40}


class Log:
    """Lines with a time and a level, to a rotating file or to standard error.

    Not the logging module: this runs for every request, and a record of its own costs many times
    such a line.
    """

    def __init__(self, path: str = "", level: str = "info") -> None:
        self._path = path
        self._level = LEVELS.get(level.strip().lower(), 20)
        self.is_verbose = self._level <= 10
        self._lock = threading.Lock()
        self._fd = 2
        self._second = 0
        self._stamp = ""                        # of that second, as it is written
        self._waiting: Any = collections.deque()
        self._written_s = 0.0
        if path:
            self._fd = open_log(path)

    def debug(self, message: str) -> None:
        self._write("debug", message)

    def info(self, message: str) -> None:
        self._write("info", message)

    def warning(self, message: str) -> None:
        self._write("warning", message)

    def error(self, message: str) -> None:
        self._write("error", message)

    def _write(self, level: str, message: str) -> None:
        """A line; what follows a line end is indented: no text from outside is one of its own."""
        rank = LEVELS[level]
        if rank < self._level:
            return
        now = time.time()
        if int(now) != self._second:
            self._second = int(now)
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
        if not message.isprintable():
            message = visible_lines(message).replace("\n", "\n    ")
        line = f"{self._stamp} {level.upper()} {message}\n"
        self._waiting.append(line)
        # Lines of a busy quarter of a second go out together: a write lets go of the GIL.
        is_busy = 0 <= now - self._written_s < 0.25
        if rank >= LEVELS["warning"] or not is_busy:
            self.flush()

    def flush(self) -> None:
        """Write what waits; the server's main loop calls this every second."""
        if not self._waiting:
            return
        with self._lock:
            lines = [self._waiting.popleft() for _ in range(len(self._waiting))]
            self._written_s = time.time()
            try:
                os.write(self._fd, "".join(lines).encode("utf-8", "replace"))
            except OSError:
                # A full disk must not stop the relay.
                pass

    def rotate(self) -> None:
        """Start a new file when this one has grown over its size."""
        with self._lock:
            if self._fd != 2 and file_size(self._path) > LOG_BYTES:
                # First it is closed: Windows renames no open file.
                os.close(self._fd)
                self._fd = 2
                shift_logs(self._path)
            # Until the file can be opened again, lines go to standard error.
            if self._path and self._fd == 2:
                try:
                    self._fd = open_log(self._path)
                except OSError:
                    pass


def rotate_foreign_log(path: str) -> None:
    """Rotate a log that another program holds open for appending: copy it, then empty it."""
    if file_size(path) <= LOG_BYTES:
        return
    import shutil
    copy = path + ".tmp"
    _remove(copy)
    try:
        with open(path, "rb") as source, os.fdopen(open_log(copy), "ab") as target:
            shutil.copyfileobj(source, target)
        os.truncate(path, 0)
        shift_logs(path, copy)
    except OSError:
        pass


def tail_of(path: str, lines: int = 12, begin: int = 0) -> str:
    """The last lines of a log, fit to print, without their colours; none before byte `begin`."""
    try:
        with open(path, "rb") as file:
            file.seek(max(begin, file_size(path) - 8192))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    last = plain.splitlines()[-lines:]
    return "\n".join(visible_lines(line) for line in last)


# ---- a process and its threads

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8        # of mallopt(3)


def _glibc(call: str, *numbers: int) -> None:
    """Call a function of glibc's malloc; nothing happens where there is another libc."""
    try:
        import ctypes
        getattr(ctypes.CDLL(None), call)(*numbers)
    except (ImportError, AttributeError, OSError, TypeError):
        pass


def hold_little_memory() -> None:
    """Prepare a daemon for return_memory(), before it starts threads.

    Of arenas other than the first, malloc never returns the top; large bodies need no arena.
    """
    _glibc("mallopt", _M_ARENA_MAX, 1)
    _glibc("mallopt", _M_MMAP_THRESHOLD, 65_536)


def return_memory() -> None:
    """Give back the pages that malloc holds free.

    Reading this program leaves 25 MB of them in a daemon, a burst of clients 100 MB and more.
    """
    _glibc("malloc_trim", 0)


def core_here() -> int:
    """The core that this thread is on; -1 where threads need not, or cannot, be kept on one.

    Under the interpreter's lock one thread runs at a time, and one that is woken on another core
    waits there for the lock of the first. Connections' threads kept on one of two cores, against
    free ones: 1.6 times the requests/s of 16 clients, 1.4 times the events/s of 16 streams; one
    request alone, and the first event of 64 streams, the same.
    """
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    if not has_lock or not hasattr(os, "sched_setaffinity"):
        return -1
    try:
        words = read_text("/proc/thread-self/stat").rpartition(")")[2].split()
        return int(words[36])                   # proc(5): processor
    except (ValueError, IndexError):
        return -1


def stay_on_core(core: int) -> None:
    """Keep this thread, and those it starts, on a core; where it must not be, nothing happens."""
    try:
        if core >= 0:
            os.sched_setaffinity(0, {core})
    except OSError:
        pass


def leave_core() -> None:
    """Let this thread, and what it starts, use all cores that the main thread may."""
    try:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
    except OSError:
        pass


def in_background(name: str, work: Callable[..., None], *args: Any) -> None:
    """Do some work in a thread that keeps nobody from ending."""
    threading.Thread(target=work, args=args, name=name, daemon=True).start()


def more_files() -> None:
    """Raise the soft limit of open files (256 on a Mac): 512 clients need two sockets each."""
    if IS_WINDOWS:
        return
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = 4096
    if hard != resource.RLIM_INFINITY:
        want = min(want, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, want), hard))
    except (OSError, ValueError):
        pass


class FileLock:
    """An exclusive lock between processes, freed by the system when its holder dies."""

    def __init__(self, path: str, waiting: Callable[[], None]) -> None:
        self._path = path
        self._waiting = waiting                 # says, once, that somebody else has it
        self._file = -1

    def _try(self) -> bool:
        try:
            if IS_WINDOWS:
                import msvcrt
                msvcrt.locking(self._file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False

    def __enter__(self) -> FileLock:
        path = self._path
        try:
            make_private_dir(os.path.dirname(path))
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise path_error("open", path, exc) from None
        if not self._try():
            # Waiting is said once, before it begins: a silent program looks hung.
            self._waiting()
            while not self._try():
                time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


# ---- progress

PLAIN_PROGRESS_S = 10                           # between lines where none can be rewritten


def terminal_columns() -> int:
    """How wide the terminal of standard output is; $COLUMNS wins, and 80 stands for unknown."""
    import shutil
    return shutil.get_terminal_size().columns


def live_terminal() -> Optional[TextIO]:
    """What Progress rewrites its line on, None where that cannot be."""
    if not is_live_terminal():
        return None
    return sys.stdout


class Progress:
    """How far a long step is: one line, rewritten in place on a terminal, else a line now and then.

        with Progress(say, terminal) as progress:
            progress.show("  model.gguf: 12 of 93 MB")      # stands until the next
            progress.say("Installed.")                      # stays

    `say` takes the lines that stay; `terminal` is where one can be rewritten, or None.
    """

    def __init__(self, say: Callable[[str], None], terminal: Optional[TextIO] = None) -> None:
        self._say = say
        self._terminal = terminal
        self._shown = ""                        # what stands on the terminal, or waits to be said
        self._due_s = 0.0                       # when the next plain line may come

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state as a line of its own."""
        shown = self._shown
        self._clear()
        if shown:
            self._say(shown)

    def show(self, text: str) -> None:
        """The state is `text` now."""
        if text == self._shown:
            return
        if self._terminal is not None:
            # A line that wraps cannot be taken back.
            text = text[:terminal_columns() - 1]
            # Blanks cover what stood there of a longer one.
            covering = text.ljust(len(self._shown))
            self._terminal.write(f"\r{covering}")
            self._terminal.flush()
            self._shown = text
        # Where no line can be rewritten, a line every few seconds is enough for a log.
        elif time.monotonic() < self._due_s:
            self._shown = text
        else:
            self._due_s = time.monotonic() + PLAIN_PROGRESS_S
            self._shown = ""
            self._say(text)

    def say(self, text: str) -> None:
        """A line that stays, above the state."""
        self._clear()
        self._say(text)

    def _clear(self) -> None:
        if self._terminal is not None and self._shown:
            blank = " " * len(self._shown)
            self._terminal.write(f"\r{blank}\r")
        self._shown = ""


# ==================================================================================================
# PROJECTS
# ==================================================================================================
# The room of what a project says of itself: its configuration (load_config), its channel (Marker),
# and whether its files may take effect: what is new is shown (trust_facts), asked about
# (offer_trust) or refused (check_run_trust). It reads and writes below .llmstack/ and in
# trust.json, and starts nothing.


# ---- its configuration


def _models_ini_bytes(places: Places) -> Tuple[bytes, str]:
    """(what models.ini holds, its name for people), or the bundled one. Errors: UserError."""
    path = places.models_ini
    try:
        data = read_regular(path, MAX_INI_BYTES)
    except FileNotFoundError:
        if places.env.get("LLMSTACK_MODELS_INI"):
            what = f"LLMSTACK_MODELS_INI names {path}, which is not there"
            raise UserError(what, "correct it", 2) from None
        return read_resource("models.ini"), "models.ini"
    except OSError as exc:
        raise path_error("read", path, exc, 2) from None
    if path.startswith(os.getcwd()):
        path = os.path.relpath(path)
    return data, path


def _path_from(base: str, path: str) -> str:
    """A path of a models.ini in `base`; `auto` and what is on the hub stay as they are."""
    if path == "auto" or _HUB_REFERENCE.match(path):
        return path
    path = os.path.expanduser(path)
    return os.path.normpath(os.path.join(base, path))


def load_config(places: Places, warn: Optional[Callable[[str], None]] = None) -> Config:
    """The project's configuration, or the bundled one. Errors: ConfigError, UserError."""
    data, source = _models_ini_bytes(places)
    text = decode_models_ini(data, source)
    config, warnings = parse_models_ini(text, source)
    if warn is not None:
        for warning in warnings:
            warn(warning)
    if not config.tiers:
        # A stack without tiers would answer every request with an error.
        raise ConfigError([f"{source}:1: names no tier"])
    place = functools.partial(_path_from, os.path.dirname(places.models_ini))
    tiers = []
    for tier in config.tiers:
        if tier.path:
            tier = tier._replace(path=place(tier.path))
        tiers.append(with_files(tier, place))
    return config._replace(tiers=tuple(tiers))


def ini_line(places: Places, section: str, key: str) -> str:
    """`models.ini:LINE` where a key, or else its section, stands. Errors: UserError."""
    data, source = _models_ini_bytes(places)
    text = decode_models_ini(data, source)
    reader = IniReader(text, source)
    line = reader.line_of(section, key) or reader.line_of(section)
    return f"{source}:{line}"


# ---- its channel


class Marker(NamedTuple):
    """What a project is pinned to (default-channel) or runs (active-channel).

    In the file `CHANNEL` or `external URL`, as llmstack 0.12 writes it.
    """

    channel: str                                # current | next | external
    url: str = ""                               # external: the router's, without /v1


# What a shell prompt, a variable and a JSON file may hold as it is: no quote, blank, $, %,
# backslash or control character.
_SAFE_URL = re.compile(r"https?://(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])"
                       r"(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~/-]{0,512})?\Z")


def parse_marker(text: str) -> Optional[Marker]:
    """A marker file's text; None where it is none, or names a URL that is not plainly one."""
    words = text.split()
    if words in (["current"], ["next"]):
        return Marker(words[0])
    if len(words) != 2:
        return None
    channel, url = words
    if channel != "external" or not _SAFE_URL.match(url):
        return None
    return Marker(channel, url)


def render_marker(marker: Marker) -> str:
    return f"{marker.channel} {marker.url}".rstrip() + "\n"


def _digest(data: bytes) -> str:
    import hashlib
    return hashlib.sha256(data).hexdigest()


def _read_bytes(path: str) -> bytes:
    """A small file, b"" when it is none: a clone's link may lead to a device that never ends."""
    try:
        return read_regular(path)
    except OSError:
        return b""


def read_marker(places: Places, name: str = "default-channel") -> Optional[Marker]:
    data = _read_bytes(places.in_state(name))
    return parse_marker(data.decode("utf-8", "replace"))


def pinned_marker(places: Places) -> Marker:
    """What a project is pinned to: the current channel, where it says nothing else."""
    return read_marker(places) or Marker("current")


# ---- what takes effect, and the ledger of what is trusted

# A cloned repository may bring a .llmstack/ along. What the shell hook hands to opencode, and what
# `start` would run or send credentials to, takes effect only as it was when `install` wrote it
# here or the user said `llmstack trust`. The ledger, trust.json, lies outside the project, in the
# data directory. It has for each project the digests of what is trusted, by part, and of the files
# that we wrote there last ("written").
_HOOK_FILES = ("opencode.json", "AGENTS.md", "default-channel")


class Effect(NamedTuple):
    """One thing in .llmstack/ that takes effect outside it, and so waits for trust."""

    name: str                                   # a file's, for models.ini with the key
    data: bytes = b""                           # what is trusted, to the byte
    shown: str = ""                             # as `trust` shows it; "": by the file's kind
    problem: str = ""                           # why it cannot be trusted: it is not read whole


def _file_effects(places: Places, names: Sequence[str]) -> List[Effect]:
    effects = []
    for name in names:
        path = places.in_state(name)
        # A file that is not there takes no effect; a link that leads nowhere may, later.
        if not os.path.lexists(path):
            continue
        try:
            effects.append(Effect(name, read_regular(path)))
        except OSError as exc:
            effects.append(Effect(name, problem=f"cannot be read: {exc.strerror}"))
    return effects


def _ini_effects(places: Places) -> List[Effect]:
    """Of the project's models.ini; one that LLMSTACK_MODELS_INI names is the user's word."""
    if places.models_ini != places.in_state("models.ini"):
        return []
    try:
        data = read_regular(places.models_ini, MAX_INI_BYTES)
        config, _ = parse_models_ini(decode_models_ini(data))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        return [Effect("models.ini", problem=f"cannot be read: {exc.strerror}")]
    except ConfigError as exc:
        return [Effect("models.ini", problem=f"does not hold: {exc.problems[0]}")]
    effects = []
    for key, value in config_effects(config):
        name = f"models.ini {key}"
        effects.append(Effect(name, value.encode(), f"= {value}"))
    return effects


def _link_effects(places: Places) -> List[Effect]:
    """Symbolic links where logs are written, with where they lead.

    Other files of ours replace a link that they find.
    """
    names = ["logs"]
    try:
        for log in sorted(os.listdir(places.in_state("logs"))):
            names.append(os.path.join("logs", log))
    except OSError:
        # There are no logs yet, or a link leads to no directory.
        pass
    effects = []
    for name in names:
        path = places.in_state(name)
        if os.path.islink(path):
            target = os.readlink(path)
            effects.append(Effect(name, os.fsencode(target), f"leads to {target}"))
    return effects


# "hook": what a shell hands to opencode; "run": what `start` runs, sends credentials to, or follows
# out of the project.
_PARTS = ("hook", "run")


def part_effects(places: Places, part: str) -> List[Effect]:
    """What of a part takes effect now."""
    if part == "hook":
        return _file_effects(places, _HOOK_FILES)
    effects = _ini_effects(places)
    # LiteLLM imports the Python modules that its configuration names.
    effects += _file_effects(places, ["litellm_config.yaml"])
    effects += _link_effects(places)
    return effects


def project_effects(places: Places) -> Dict[str, List[Effect]]:
    """What takes effect now, by part. Read once: who shows it trusts just what is shown."""
    return {part: part_effects(places, part) for part in _PARTS}


def trust_file(data: str) -> str:
    return os.path.join(data, "trust.json")


def trust_lock(places: Places) -> FileLock:
    """Held while a trusted file is written and trusted anew: another start may look in between."""
    return FileLock(os.path.join(places.data, "trust.lock"), lambda: None)


def _read_ledger(places: Places) -> Tuple[Dict[str, Any], str]:
    """The ledger, and the name of this project in it."""
    return _read_json(trust_file(places.data)), os.path.realpath(places.state)


def _known(places: Places, what: str) -> Dict[str, Any]:
    """Name -> digest, as the ledger has it for this project; `what` is a part or "written"."""
    ledger, project = _read_ledger(places)
    return dict_of(dict_of(ledger.get(project)).get(what))


def _write_known(places: Places, what: str, known: Mapping[str, str]) -> None:
    """Make `known` what _known reads, for who holds the trust_lock. Errors: UserError."""
    ledger, project = _read_ledger(places)
    ledger[project] = {**dict_of(ledger.get(project)), what: known}
    # "" sorts first, so this is the second line of the file: there shell hooks look for news.
    ledger[""] = f"{time.time():.6f}"
    text = json.dumps(ledger, indent=1, sort_keys=True)
    write_atomic(trust_file(places.data), text)


def untrusted(places: Places, part: str, effects: Sequence[Effect]) -> List[Effect]:
    """Those of a part's effects that are new, other than as they were trusted, or not readable."""
    known = _known(places, part)
    new = []
    for effect in effects:
        if effect.problem or known.get(effect.name) != _digest(effect.data):
            new.append(effect)
    return new


def is_trusted(places: Places, part: str) -> bool:
    """True when all of the project's "hook" or "run" part, if anything, is as it was trusted."""
    return not untrusted(places, part, part_effects(places, part))


def check_links(places: Places) -> None:
    """Before anything is written below .llmstack/ at all.

    Errors: UserError where a link may lead out of it.
    """
    if _link_effects(places) and not is_trusted(places, "run"):
        raise UserError(f".llmstack of {visible(places.work)} has links that lead elsewhere, and is"
                        " not trusted here", "look at it, then run `llmstack trust`")


def record_effects(places: Places, part: str, effects: Sequence[Effect]) -> None:
    """Trust these of a part and no other, for who holds the trust_lock; a problem stays out."""
    known = {}
    for effect in effects:
        if not effect.problem:
            known[effect.name] = _digest(effect.data)
    _write_known(places, part, known)


def trust_project(places: Places, *parts: str) -> None:
    """Trust what .llmstack/ holds now, both parts where none is named. Errors: UserError."""
    with trust_lock(places):
        for part in parts or _PARTS:
            record_effects(places, part, part_effects(places, part))


def _is_ours(places: Places, name: str, data: bytes) -> bool:
    """True for the bytes of a file in .llmstack/ that we wrote there last."""
    return bool(_known(places, "written").get(name) == _digest(data))


def _remember(places: Places, name: str, data: bytes) -> None:
    """Note the bytes of a file in .llmstack/ as ours. Errors: UserError."""
    with trust_lock(places):
        written = _known(places, "written")
        written[name] = _digest(data)
        _write_known(places, "written", written)


# ---- what is shown of it, and asked


def untrusted_line(places: Places) -> str:
    return (f"llmstack: .llmstack of {visible(places.work)} is not trusted here; look at it,"
            " then run `llmstack trust`")


def check_run_trust(places: Places) -> None:
    """Before anything that .llmstack/ names is run or spoken to. Errors: UserError."""
    if is_trusted(places, "run"):
        return
    # Another start may have been writing litellm_config.yaml in that moment.
    with trust_lock(places):
        new = untrusted(places, "run", part_effects(places, "run"))
    for effect in new:
        if effect.problem:
            # Of a models.ini this says more.
            load_config(places)
            path = visible(places.in_state(effect.name))
            raise UserError(f"{path} {visible(effect.problem)}",
                            "it cannot be trusted so: mend it, or move it away")
    if new:
        names = ", ".join(effect.name for effect in new)
        raise UserError(f".llmstack of {visible(places.work)} is not trusted here as it is now:"
                        f" programs, addresses or other files are named by {visible(names)}",
                        "look at it, then run `llmstack trust`; an edit of your own needs that,"
                        " too")


# What of an opencode.json says neither where prompts go, nor what is run, nor what the model is
# told; * is any name. All else is shown: a key nobody has thought of (an npm package, a plugin, a
# hook) is what a clone would use.
_HARMLESS = [line.split() for line in """\
$schema
autoupdate
disabled_providers
provider * name
provider * options headerTimeout
provider * options chunkTimeout
provider * models * name
provider * models * limit
provider * models * cost
provider * models * reasoning
provider * models * tool_call
provider * models * temperature
agent * description
agent * mode
agent * temperature
command * description
command * agent
""".splitlines()]


def _is_harmless(path: Sequence[str], value: Any) -> bool:
    """True for a value of an opencode.json that can do no harm, as what is denied cannot."""
    if value in ("deny", "disabled"):
        return True
    for known in _HARMLESS:
        # All that lies below a harmless key is harmless, too.
        if len(path) < len(known):
            continue
        if all(word in ("*", key) for word, key in zip(known, path)):
            return True
    return False


def _harmful_values(value: Any, path: Tuple[str, ...]) -> Iterator[Tuple[str, str]]:
    """(path, text) of each value of an opencode.json that may do harm."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _harmful_values(inner, (*path, str(key)))
    elif not _is_harmless(path, value):
        name = ".".join(("opencode.json", *path))
        if not isinstance(value, str):
            value = json.dumps(value)
        yield name, value


SHOWN_LINES = 100                              # of litellm_config.yaml, before it is trusted


def _config_rows(text: str) -> List[Tuple[str, str]]:
    """Of litellm_config.yaml: imports, hosts that get a key. Anything but a comment may matter."""
    lines = [line for line in text.splitlines() if re.match(r"\s*[^\s#]", line)]
    shown = lines[:SHOWN_LINES]
    more = len(lines) - len(shown)
    if more:
        shown.append(f"and {more} more lines")
    return [("litellm_config.yaml", line) for line in shown]


def _effect_rows(effect: Effect) -> List[Tuple[str, str]]:
    """(what it is, its value) of what a thing to be trusted would do."""
    name = effect.name
    if effect.problem or effect.shown:
        return [(name, effect.problem or effect.shown)]
    text = effect.data.decode("utf-8", "replace")
    if name == "litellm_config.yaml":
        return _config_rows(text)
    if name == "default-channel":
        return [(name, text.strip())]
    if name != "opencode.json":
        return [(name, f"{len(text.splitlines())} lines")]
    try:
        return list(_harmful_values(json.loads(text), ()))
    except (ValueError, RecursionError):
        return [(name, "is not plain JSON; read it yourself")]


def trust_facts(places: Places, effects: Iterable[Effect]) -> List[str]:
    """The lines that show what is to be trusted, fit to print."""
    rows = [("project", places.work)]
    for effect in effects:
        rows += _effect_rows(effect)
    width = 0
    shown = []
    for name, value in rows:
        name = visible(name, 80)
        width = max(width, len(name))
        shown.append((name, visible(value)))
    return [f"{name:<{width}}  {value}" for name, value in shown]


def trust_effects(places: Places, effects: Mapping[str, Sequence[Effect]]) -> None:
    """Trust just these, part by part. Errors: UserError."""
    with trust_lock(places):
        for part, shown in effects.items():
            record_effects(places, part, shown)


def offer_trust(places: Places, say: Say, ask: Ask) -> None:
    """Show a person what is new or changed since it was trusted, and ask; yes trusts just that.

    `ask` answers None where nobody is there; it shows nothing then, and nothing is trusted.
    Errors: UserError.
    """
    if all(is_trusted(places, part) for part in _PARTS):
        return
    new: List[Effect] = []
    # Another start may have been writing litellm_config.yaml in that moment.
    with trust_lock(places):
        effects = project_effects(places)
        for part, of_part in effects.items():
            new += untrusted(places, part, of_part)
    # Where no more than problems is new, check_run_trust says what they are.
    if all(effect.problem for effect in new):
        return
    facts = "\n".join(trust_facts(places, new))
    if ask(f"New or changed since it was trusted here:\n{facts}\nTrust this? [y/N] "):
        trust_effects(places, effects)
        say("Trusted as it is now.")


# ==================================================================================================
# PROCESSES
# ==================================================================================================
# The room of processes and ports: whose they are, starting and stopping them. It may read /proc, or
# ask ps, lsof and netstat, and signal what is ours; it knows nothing of tiers and engines.

# All that we start carries a mark in its environment, made for one start and handed down to what it
# starts in turn. A record names the process, its start time and its mark. Nothing is signalled on a
# record's word alone: it may have come along with a copied directory, or have been made up by
# whoever made the directory. Only owned_process, the mark itself, or being our own child opens the
# door to a signal.

STACK_VARIABLE = "LLMSTACK_STACK"               # <kind>-<random>:<project>, see new_mark


def _percent_code(found: Match[bytes]) -> bytes:
    return b"%%%02X" % ord(found.group())


def _project_code(project: str) -> str:
    """A project's real path as it stands in a mark: without blanks, which ps cannot tell apart."""
    # Two spellings of one directory are one project.
    path = os.path.normcase(os.path.realpath(project))
    # urllib can quote, but its import would cost each shell prompt some milliseconds.
    code = re.sub(rb"[^A-Za-z0-9/._-]", _percent_code, os.fsencode(path))
    return code.decode("ascii")


def new_mark(project: str, kind: str = "stack") -> str:
    """A mark for one start in `project`; nobody else can have it."""
    start = os.urandom(12).hex()
    return f"{kind}-{start}:{_project_code(project)}"


def _marked_project(mark: str) -> str:
    """The project that a mark names, "" where it names none."""
    from urllib.parse import unquote_to_bytes
    code = mark.partition(":")[2]
    return os.fsdecode(unquote_to_bytes(code))


# Of /proc/PID/stat, counted behind the program's name: the process's start in ticks since boot.
_STAT_START = 19


def _linux_stat(pid: int) -> List[str]:
    """The fields of /proc/PID/stat behind the program's name, [] where there are none."""
    # A program's name may hold blanks and parentheses itself.
    _, _, fields = read_text(f"/proc/{pid}/stat").rpartition(")")
    return fields.split()


def _is_empty_shell(pid: int) -> bool:
    """True for a zombie without threads: with some, it still holds its memory."""
    try:
        return len(os.listdir(f"/proc/{pid}/task")) <= 1
    except OSError:
        return True


def _linux_started(pid: int) -> str:
    fields = _linux_stat(pid)
    if not fields:
        return ""
    if fields[0] in "ZX" and _is_empty_shell(pid):
        return ""
    # Ticks since boot come again after the next boot; the boot's own id does not.
    boot = read_text("/proc/sys/kernel/random/boot_id")
    return f"{boot[:8]}-{fields[_STAT_START]}"


def _windows_started(pid: int) -> str:
    import ctypes
    kernel = ctypes.windll.kernel32             # type: ignore[attr-defined]
    # 0x1000 is PROCESS_QUERY_LIMITED_INFORMATION.
    handle = kernel.OpenProcess(0x1000, False, pid)
    if not handle:
        return ""
    times = [ctypes.c_ulonglong() for _ in range(4)]
    code = ctypes.c_ulong()
    known = kernel.GetProcessTimes(handle, *map(ctypes.byref, times))
    known = known and kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    # 259 is STILL_ACTIVE.
    if not known or code.value != 259:
        return ""
    return str(times[0].value)


def _ps_says(pid: int, field: str) -> str:
    """What ps tells of one process, "" where it is gone."""
    command = ["ps", "-ww", "-o", f"{field}=", "-p", str(pid)]
    return program_output(command).strip()


def process_started(pid: int) -> str:
    """When process `pid` started, in a form that tells it from a later one of the same number.

    "" when it is gone. A zombie counts as gone: kill(pid, 0) would not say so.
    """
    if pid <= 0:
        return ""
    if IS_WINDOWS:
        return _windows_started(pid)
    if sys.platform.startswith("linux"):
        return _linux_started(pid)
    if _ps_says(pid, "stat").startswith("Z"):
        return ""
    # ps pads the day of the month with a blank.
    words = _ps_says(pid, "lstart").split()
    return " ".join(words)


def process_age_s(pid: int) -> Optional[float]:
    """How long process `pid` has been there; None where that cannot be told."""
    fields = _linux_stat(pid)
    if fields:
        up_s = float(read_text("/proc/uptime").split()[0])
        started_s = int(fields[_STAT_START]) / os.sysconf("SC_CLK_TCK")
        return up_s - started_s
    # Of macOS: DAYS-HOURS:MINUTES:SECONDS, without what is nothing.
    words = re.findall(r"[0-9]+", _ps_says(pid, "etime"))
    if not words:
        return None
    age_s = 0.0
    for word, unit_s in zip(reversed(words), (1, 60, 3600, 86_400)):
        age_s += int(word) * unit_s
    return age_s


def _all_pids() -> List[int]:
    """Every process of this machine, on Linux."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _has_proc() -> bool:
    return os.path.isdir("/proc/self")


def _ps(*options: str) -> Dict[int, str]:
    """Process -> what ps prints of it; options as of macOS."""
    found = {}
    for line in program_output(["ps", *options]).splitlines():
        pid, _, text = line.strip().partition(" ")
        if pid.isdigit():
            found[int(pid)] = text.strip()
    return found


def _variables(words: Iterable[str]) -> Dict[str, str]:
    """NAME=value words by name; the first of a name counts, as it does for getenv."""
    found: Dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            found.setdefault(name, value)
    return found


def _ps_environments(*which: str) -> Dict[int, Dict[str, str]]:
    """Process -> its environment, which ps writes behind the command line."""
    shown = (*which, "-o", "pid=,command=")
    bare = _ps("-ww", *shown)
    whole = _ps("-wwE", *shown)
    found = {}
    for pid, text in whole.items():
        command = bare.get(pid, text)
        # Another process may have got the number between the two calls.
        if not text.startswith(command):
            continue
        words = text[len(command):].split()
        # A process that hides its environment prints the same text both times.
        if words:
            found[pid] = _variables(words)
    return found


def process_environment(pid: int) -> Optional[Dict[str, str]]:
    """The environment a process was started with; None where it cannot be read."""
    if IS_WINDOWS:
        return None
    if not _has_proc():
        return _ps_environments("-p", str(pid)).get(pid)
    try:
        data = read_regular(f"/proc/{pid}/environ")
    except OSError:
        return None
    return _variables(os.fsdecode(data).split("\0"))


def process_command(pid: int) -> List[str]:
    """The words of a process's command line, [] where they cannot be told."""
    if IS_WINDOWS:
        query = f"(Get-CimInstance Win32_Process -Filter ProcessId={pid}).CommandLine"
        return program_output(["powershell", "-NoProfile", "-Command", query]).split()
    if not _has_proc():
        return _ps_says(pid, "command").split()
    try:
        data = read_regular(f"/proc/{pid}/cmdline")
    except OSError:
        return []
    return os.fsdecode(data).split("\0")


def process_user(pid: int) -> Optional[int]:
    """The number of the user a process runs as; None where that cannot be told."""
    if IS_WINDOWS:
        return None
    # The second number is the effective user.
    status = read_text(f"/proc/{pid}/status")
    found = re.search(r"^Uid:\s+\d+\s+(\d+)", status, re.MULTILINE)
    if found:
        return int(found.group(1))
    uid = _ps_says(pid, "uid")
    if not uid.isdigit():
        return None
    return int(uid)


def _mark_in(environment: Optional[Mapping[str, str]]) -> str:
    """The mark in an environment, "" for none."""
    return (environment or {}).get(STACK_VARIABLE, "")


def _marks() -> Dict[int, str]:
    """Every living process of this user's that carries a mark, but this one."""
    environments: Mapping[int, Optional[Mapping[str, str]]] = {}
    if _has_proc():
        environments = {pid: process_environment(pid) for pid in _all_pids()}
    elif not IS_WINDOWS:
        environments = _ps_environments("-ax")
    marks = {pid: _mark_in(environment) for pid, environment in environments.items()}
    # Whoever stops what carries a mark goes on itself.
    marks.pop(os.getpid(), None)
    return {pid: mark for pid, mark in marks.items() if mark}


def stack_members(stack: str) -> Dict[int, str]:
    """Living processes with this mark: (pid -> mark), children left behind by a kill -9."""
    return {pid: mark for pid, mark in _marks().items() if mark == stack}


def project_members(project: str) -> Dict[int, str]:
    """Living processes of a project's stack, records or none: (pid -> mark)."""
    end = ":" + _project_code(project)
    # A worker that downloads for the project outlives its stack; its mark begins otherwise.
    return {pid: mark for pid, mark in _marks().items()
            if mark.startswith("stack-") and mark.endswith(end)}


class Record(NamedTuple):
    """A daemon we started, as its pid file says: the pid on the first line, the rest as JSON."""

    pid: int
    started: str                                # process_started() at birth
    stack: str                                  # its mark
    host: str = ""
    port: int = 0
    kind: str = ""                              # llama-swap | embedded | download
    channel: str = "current"
    engine_port: int = 0

    @property
    def alive(self) -> bool:
        if not self.started:
            return False
        return process_started(self.pid) == self.started

    @property
    def project(self) -> str:
        """The real path of the directory that it was started for."""
        return _marked_project(self.stack)


def record_is_ours(record: Record, project: str) -> bool:
    """True where a record was written for this project, and has not come along with a copy."""
    return record.stack.partition(":")[2] == _project_code(project)


MAX_PID = 2 ** 32 - 1                           # of Windows; other systems' are smaller


def _is_recorded(name: str, value: Any) -> bool:
    """True for a value that we write into a pid file."""
    if name in ("port", "engine_port"):
        # A bool is an int, too.
        return type(value) is int and 0 <= value < 65_536
    return isinstance(value, str) and value.isprintable()


def parse_record(text: str) -> Optional[Record]:
    """A pid file's record; None where any of it is not what we write."""
    number, _, rest = text.partition("\n")
    if not re.match(r"[0-9]{1,10}\Z", number):
        return None
    pid = int(number)
    if not 1 < pid <= MAX_PID:
        return None
    values = {**Record._field_defaults, **parse_json_object(rest)}
    # What a newer version may have written beside them is no fault.
    fields: Dict[str, Any] = {}
    for name in Record._fields[1:]:
        value = values.get(name)
        if not _is_recorded(name, value):
            return None
        fields[name] = value
    return Record(pid, **fields)


def write_record(path: str, record: Record) -> None:
    values = record._asdict()
    del values["pid"]
    rest = json.dumps(values)
    write_atomic(path, f"{record.pid}\n{rest}\n")


def _settled_environment(pid: int) -> Optional[Dict[str, str]]:
    """process_environment of a process that may be young: in the middle of exec it has none."""
    end = time.monotonic() + 1
    environment = process_environment(pid)
    while environment == {} and process_started(pid) and time.monotonic() < end:
        time.sleep(0.005)
        environment = process_environment(pid)
    return environment


def _is_proven(record: Record) -> bool:
    """True where the living process of a record is the one that it was written for.

    The proof is the mark in its environment, or, where no environment can be read, that it runs our
    program or reads what stands in the project's .llmstack/.
    """
    environment = _settled_environment(record.pid)
    if environment is not None:
        # A mark of the same project from another start is another process.
        return _mark_in(environment) == record.stack
    command = " ".join(process_command(record.pid))
    # Windows writes the same path in upper and lower case.
    command = os.path.normcase(command)
    program = os.path.basename(PROGRAM)
    if os.path.normcase(program) in command:
        return True
    state = os.path.join(record.project, ".llmstack")
    return os.path.normcase(state) in command


def owned_process(record: Optional[Record], project: str) -> bool:
    """True where a record's process is alive and proves to be what was started for `project`."""
    if record is None or not record_is_ours(record, project):
        return False
    return record.alive and _is_proven(record)


def proven_record(text: str, project: str) -> Optional[Record]:
    """The record in a text; None where there is none that is this project's.

    Nor is it one where what runs under its number does not prove to be ours: nobody is to signal
    that, or to send a key to the address beside it.
    """
    record = parse_record(text)
    if record is None or not record_is_ours(record, project):
        return None
    if record.alive and not _is_proven(record):
        return None
    return record


def read_record(path: str) -> Optional[Record]:
    """proven_record of a pid file, for the project in whose .llmstack/ that stands.

    A link in the file's place makes it nobody else's.
    """
    state = os.path.realpath(os.path.dirname(path))
    project = os.path.dirname(state)
    return proven_record(read_text(path), project)


def _signal_process(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def _signal_group(pid: int, force: bool, alone: bool = True) -> None:
    """TERM or KILL a process's group; all that we start leads one. `alone`: else the process."""
    if IS_WINDOWS:
        program_output(["taskkill", "/PID", str(pid), "/T", "/F"])
        return
    import signal
    number = signal.SIGTERM
    if force:
        number = signal.SIGKILL
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        if alone:
            _signal_process(pid, number)


def spawn(command: Sequence[str], log: str, env: Mapping[str, str]) -> Any:
    """Start a process in a session of its own, its output appended to `log`; its Popen.

    Errors: UserError.
    """
    import subprocess
    leave_core()
    flags: Dict[str, Any] = {"start_new_session": True}
    if IS_WINDOWS:
        # DETACHED_PROCESS and CREATE_NEW_PROCESS_GROUP.
        flags = {"creationflags": 0x208}
    try:
        output = os.fdopen(open_log(log), "ab")
    except OSError as exc:
        raise path_error("write", log, exc) from None
    # The child has its own copy of the descriptor.
    with output:
        try:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output,
                                    stderr=output, env=env, **flags)
        except OSError as exc:
            raise UserError(f"cannot start {command[0]}: {exc.strerror}", "reinstall it") from None


def spawn_recorded(command: Sequence[str], log: str, env: Mapping[str, str], path: str,
                   record: Record) -> Tuple[Any, Record]:
    """spawn a daemon and write its record, which lacks but the process: (Popen, whole record).

    A child whose record cannot be written is ended at once: nothing runs that `stop` would not
    find. Errors: UserError.
    """
    process = spawn(command, log, {**env, STACK_VARIABLE: record.stack})
    try:
        record = record._replace(pid=process.pid, started=process_started(process.pid))
        write_record(path, record)
    except BaseException:
        _signal_group(process.pid, True)
        process.wait()
        raise
    return process, record


def _is_gone(pid: int, started: str, patience_s: float, reap: Callable[[], Any]) -> bool:
    """True when a process ends within `patience_s`."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        reap()
        if process_started(pid) != started:
            return True
        time.sleep(0.02)
    return False


def stop_process(pid: int, started: str, grace_s: float, reap: Callable[[], Any] = bool) -> bool:
    """TERM, then KILL after `grace_s`; True when it is gone. `reap` collects the exit of a child.

    For those who have proof that the process is ours: the pid of a child that nobody has reaped is
    nobody else's.
    """
    if not started or process_started(pid) != started:
        return True
    # A server that is loading may ignore TERM; nothing ignores KILL but a broken disk.
    for force, patience_s in ((False, grace_s), (True, 10.0)):
        _signal_group(pid, force)
        if _is_gone(pid, started, patience_s, reap):
            # A wrapper ends at once; what it wrapped may hang.
            if not IS_WINDOWS:
                _signal_group(pid, True, alone=False)
            return True
    return False


def stop_members(members: Mapping[int, str]) -> int:
    """Stop processes that were found by their mark; returns how many there were."""
    stopped = 0
    for pid, mark in members.items():
        started = process_started(pid)
        # Meanwhile another process may have got the number.
        if _mark_in(process_environment(pid)) == mark:
            stop_process(pid, started, 2.0)
            stopped += 1
    return stopped


def stop_recorded(record: Record, project: str, grace_s: float) -> int:
    """Stop a record's process and what it has left behind; returns how many there were.

    Where it is not this project's, or does not prove to be what was started, nothing is touched.
    Errors: UserError for a process that does not end.
    """
    if not record_is_ours(record, project):
        return 0
    pid = record.pid
    stopped = 0
    if owned_process(record, project):
        stopped = 1
        if not stop_process(pid, record.started, grace_s):
            raise UserError(f"{record.kind} (pid {pid}) does not stop",
                            f"end it by hand: kill -9 {pid}")
    return stopped + stop_members(stack_members(record.stack))


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return 0


# EACCES is what a port below 1024 gives; then the same two as Windows numbers them.
_PORT_TAKEN = (errno.EADDRINUSE, errno.EACCES, 10_048, 10_013)


def _listen_once(host: str, port: int) -> int:
    """The port that can be listened on now: this one, of 0 any; 0 where it is taken.

    Errors: UserError for an address that is none of this machine's.
    """
    family = socket.AF_INET
    if ":" in host:
        family = socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if not IS_WINDOWS:
            # What is in TIME_WAIT is free. On Windows the option would share a port in use.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            if exc.errno in _PORT_TAKEN or getattr(exc, "winerror", 0) in _PORT_TAKEN:
                return 0
            raise UserError(f"cannot listen on {host}: {exc.strerror or exc}",
                            "choose an address of this machine", 2) from None
        return int(probe.getsockname()[1])


def await_answer(what: str, process: Any, is_up: Callable[[], bool], log: str, log_bytes: int,
                 patience_s: int) -> None:
    """Return once a process that was just started answers.

    `log_bytes`: of its log before its start. Errors: UserError with what it has written there.
    """
    end = time.monotonic() + patience_s
    while not is_up():
        code = process.poll()
        if code is None and time.monotonic() < end:
            time.sleep(0.02)
            continue
        problem = f"exited with {code} at start"
        if code is None:
            problem = f"did not answer within {patience_s} s at start"
        # What stood in the log before is of an earlier start.
        tail = tail_of(log, begin=log_bytes)
        if tail:
            problem += f":\n{tail}"
        raise UserError(f"{what} {problem}", f"see {log}")


def port_is_free(host: str, port: int) -> bool:
    """True when `port` can be listened on now. Errors: UserError."""
    return _listen_once(host, port) > 0


def free_port(host: str) -> int:
    """A port that nobody listens on now. Errors: UserError."""
    return _listen_once(host, 0)


def free_run(first: int, count: int) -> int:
    """The first port from `first` on that is free with the `count` - 1 behind it."""
    start = first
    for port in range(first, 65_536):
        if not port_is_free("127.0.0.1", port):
            start = port + 1
        # From `start` to here all are free; of none of them, any port will do.
        if port - start + 1 >= count:
            return start
    raise UserError(f"there are no {count} free ports in a row above {first}",
                    "stop something that listens on them")


# As /proc/net/tcp has them: 127.0.0.1, every address of either kind, ::ffff:127.0.0.1 and ::1.
_LOCAL_ADDRESSES = ("0100007F", "0" * 8, "0" * 32, "0000000000000000FFFF00000100007F",
                    "00000000000000000000000001000000")


def _linux_sockets(port: int) -> Dict[str, int]:
    """Sockets that listen on `port`, with the number of their user."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        # The columns are proc(5)'s; both queues are one word, and so are the timer and its time.
        for row in read_text(table).splitlines()[1:]:
            _, local, _, state, _, _, _, user, _, inode = row.split()[:10]
            address, _, number = local.rpartition(":")
            if address not in _LOCAL_ADDRESSES or int(number, 16) != port:
                continue
            # LISTEN.
            if state == "0A":
                found[f"socket:[{inode}]"] = int(user)
    return found


def _open_files(pid: int) -> Iterator[str]:
    """Where a process's descriptors lead; one that it closes meanwhile hides no other."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for name in names:
        try:
            yield os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue


def _linux_listeners(port: int) -> Set[int]:
    sockets = _linux_sockets(port)
    if not sockets:
        return set()
    holders = set()
    for pid in _all_pids():
        if not sockets.keys().isdisjoint(_open_files(pid)):
            holders.add(pid)
    return holders


def _windows_listeners(netstat: str, port: int) -> Set[int]:
    """Whose foreign end has no port listens; the word for that state is in the user's language."""
    row = rf"TCP +\S+:{port} +\S+:0 .* ([0-9]+)\s*$"
    found = re.findall(row, netstat, re.MULTILINE)
    return {int(pid) for pid in found}


def listeners(port: int) -> Set[int]:
    """The pids of those who listen on `port` of an address of this machine's own or of every one.

    As far as that can be told: of another user's processes mostly not.
    """
    # Without a program: lsof is not on every Linux.
    if os.path.exists("/proc/net/tcp"):
        return _linux_listeners(port)
    if IS_WINDOWS:
        netstat = program_output(["netstat", "-ano"])
        return _windows_listeners(netstat, port)
    command = ["lsof", "-nP", "-t", f"-iTCP:{port}", "-sTCP:LISTEN"]
    words = program_output(command).split()
    return {int(pid) for pid in words if pid.isdigit()}


def _is_llmstack(pid: int) -> bool:
    """True for a daemon of ours, whosever, by the first words of its command line."""
    # The program itself, or Python and then the program.
    words = process_command(pid)[:2]
    program = re.compile(r"(^|[/\\])llmstack(\.pyz?)?\Z")
    return any(map(program.search, words))


def _hidden_holder(port: int) -> str:
    """Of what another user runs the kernel says whose it is, and anybody may read command lines."""
    users: Set[int] = set()
    if _has_proc():
        users = set(_linux_sockets(port).values()) - {os.geteuid()}
    if not users:
        return "another program"
    for pid in _all_pids():
        if process_user(pid) not in users or not _is_llmstack(pid):
            continue
        if str(port) in process_command(pid):
            return f"another user's llmstack (pid {pid})"
    return "another user's program"


def port_holder(port: int) -> str:
    """Who listens on `port`, in words that end a sentence."""
    pid = min(listeners(port), default=0)
    if not pid:
        return _hidden_holder(port)
    user = process_user(pid)
    if user is not None and user != os.geteuid():
        what = "program"
        if _is_llmstack(pid):
            what = "llmstack"
        return f"another user's {what} (pid {pid})"
    mark = _mark_in(process_environment(pid))
    project = _marked_project(mark)
    if project:
        return f"the llmstack of {visible(project)} (pid {pid})"
    name = read_text(f"/proc/{pid}/comm").strip()
    if not name:
        name = os.path.basename(_ps_says(pid, "comm"))
    # Any process may give itself any name.
    name = visible(name, 80) or "a program"
    return f"{name} (pid {pid})"


# ==================================================================================================
# PROGRAMS
# ==================================================================================================
# The room of programs that are not ours: where they lie, and the packages of PyPI's that a private
# environment brings. Nothing is ever put into the user's own Python.


class PrivateEnvironment(NamedTuple):
    """Pinned packages of PyPI's in a virtual environment of llmstack's own."""

    name: str                                   # its directory, with the version below it
    version: str
    package: str
    module: str                                 # what is imported as proof that it works
    what: str                                   # for people, with the size of the download
    oldest: int = 9                             # 3.9 to 3.14: Pythons its wheels are built for
    newest: int = 14
    otherwise: str = ""                         # what to do where it cannot be installed
    hashes: Tuple[str, ...] = ()                # SHA-256 of its wheels, where it comes alone

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


LLAMA_CPP = PrivateEnvironment(
    "llama-cpp", LLAMA_CPP_PIN, "xllamacpp", "xllamacpp",
    f"llama.cpp's server (xllamacpp {LLAMA_CPP_PIN}, 34 MB)", 10, 14,
    "or install llama.cpp yourself", (
        "4ecda27a308b2403aa13c9d04b270befab95edc556c24ed00b2f8a98bd7f6781",
        "1f2a08052bb653659bcf1bedbbaf86b97f41dd46aa2763d596d7f27c5d89a689",
        "e2a3e79e775515de4ad197e667f874070446ef9ac9cf2044bc9866bc4c72289e",
        "c54e7d13520ecc989c63dc99d55de3065e2f343a91f43f053d16b5e62077c261",
        "1b76730ab9af47ec8d05a3d55154305fa92642f694dd9ad87d9e5a5e9956a59d",
    ))
OLDEST_PIP = (22, 3)                            # of those that know --python

LITELLM = PrivateEnvironment(
    "litellm", LITELLM_PIN, "litellm[proxy]", "litellm.proxy.proxy_server",
    f"LiteLLM's proxy (litellm {LITELLM_PIN}, 170 MB, 760 MB on the disk)", 10, 13,
    "or install it yourself and name its program in LITELLM_BIN: uv tool install 'litellm[proxy]'")


def environment_dir(wanted: PrivateEnvironment, data: str) -> str:
    return os.path.join(data, wanted.name, wanted.version)


def environment_program(wanted: PrivateEnvironment, data: str) -> str:
    """The Python of an environment, whether or not that is there."""
    folder = "bin"
    if IS_WINDOWS:
        folder = "Scripts"
    return os.path.join(environment_dir(wanted, data), folder, "python" + EXE)


def _has_its_python(directory: str, python: str) -> bool:
    """True where the Python that an environment stands on is the one it was made with."""
    settings = read_text(os.path.join(directory, "pyvenv.cfg"))
    home = re.search(r"^home *= *(.+?) *$", settings, re.MULTILINE)
    if home is None or not os.path.isdir(home[1]):
        return False
    if not os.path.exists(python):
        return False
    # /usr/bin/python3 may be a newer one by now, which does not look where the packages are.
    name = os.path.basename(os.path.realpath(python))
    # Where its name tells no version, as on Windows, no directory does.
    if not re.match(r"python3\.[0-9]+t?\Z", name):
        return True
    packages = os.path.join(directory, "lib", name)
    return os.path.isdir(packages)


def environment_ready(wanted: PrivateEnvironment, data: str) -> bool:
    """True where an environment was finished, and the Python that it stands on is still there."""
    directory = environment_dir(wanted, data)
    if not os.path.exists(os.path.join(directory, "ready")):
        return False
    python = environment_program(wanted, data)
    return _has_its_python(directory, python)


def _launched_python(minor: int) -> str:
    """Python 3.`minor` of Windows, which has no python3.N.exe: the launcher knows what is there."""
    if not IS_WINDOWS:
        return ""
    launcher = find_program("py" + EXE)
    if not launcher:
        return ""
    ask = "import sys; print(sys.executable)"
    return program_output([launcher, f"-3.{minor}", "-c", ask]).strip()


def _is_python(program: str, minor: int) -> bool:
    """True where a program is that Python, and no stub of a version manager's."""
    said = program_output([program, "-c", "import sys; print(sys.version_info[1])"])
    return said.strip() == str(minor)


def suitable_python(wanted: PrivateEnvironment) -> str:
    """A Python that an environment's wheels are built for: this one, else the newest, or ""."""
    minors = range(wanted.oldest, wanted.newest + 1)
    if sys.version_info[1] in minors:
        return sys.executable
    for minor in reversed(minors):
        python = find_program(f"python3.{minor}{EXE}") or _launched_python(minor)
        if python and _is_python(python, minor):
            return python
    return ""


def _ends_within(process: Any, patience_s: float) -> bool:
    import subprocess
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def run_with_progress(what: str, command: Sequence[str],
                      say: Callable[[str], None]) -> Optional[str]:
    """Run a long command, showing that it goes on; its output when it failed."""
    import subprocess
    import tempfile
    began = time.monotonic()
    with tempfile.TemporaryFile() as output, Progress(say, live_terminal()) as progress:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=output, start_new_session=not IS_WINDOWS)
        try:
            while not _ends_within(process, 1):
                passed_s = time.monotonic() - began
                progress.show(f"  {what}: {passed_s:.0f} s")
        except BaseException:
            # pip and ensurepip have children of their own.
            _signal_group(process.pid, True)
            process.wait()
            raise
        passed_s = time.monotonic() - began
        if not process.returncode:
            progress.say(f"  {what}: done in {passed_s:.0f} s")
            return None
        progress.say(f"  {what}: failed after {passed_s:.0f} s")
        output.seek(0)
        return output.read().decode("utf-8", "replace")


def outside_pip(python: str) -> List[str]:
    """The command of a pip that installs into an environment without one, [] where there is none.

    -I keeps a pip.py of the current directory from being taken for it.
    """
    # Most of the time both are the same.
    for candidate in dict.fromkeys((python, sys.executable)):
        command = [candidate, "-I", "-m", "pip"]
        said = program_output([*command, "--version"])
        version = re.match(r"pip ([0-9]+)\.([0-9]+)", said)
        if version and tuple(map(int, version.groups())) >= OLDEST_PIP:
            return command
    return []


def _requirement_words(wanted: PrivateEnvironment, directory: str) -> List[str]:
    """What pip is to install: by hash where all hashes are known, else by version."""
    if not wanted.hashes:
        return [wanted.requirement]
    # pip takes hashes from a file alone.
    line = wanted.requirement
    for digest in wanted.hashes:
        line += f" --hash=sha256:{digest}"
    path = os.path.join(directory, "requirements.txt")
    write_atomic(path, line + "\n")
    return ["--no-deps", "--require-hashes", "-r", path]


def _install_error(wanted: PrivateEnvironment, what: str, output: str) -> UserError:
    """What to say where a step of an installation has failed."""
    hint = "see that PyPI can be reached, then again"
    # Debian keeps venv's part of Python in a package of its own.
    if "ensurepip" in output:
        hint = "apt install python3-venv, then again"
    if wanted.otherwise:
        hint += f"; {wanted.otherwise}"
    # pip and venv say the reason last.
    said = output.strip() or "no reason given"
    reason = said.splitlines()[-1]
    return UserError(f"the {what} failed: {reason}", hint)


def _make_environment(wanted: PrivateEnvironment, data: str, python: str,
                      say: Callable[[str], None]) -> None:
    """All of it anew: what an interrupted try or another Python has left is of no use.

    A pip of its own would take 5 of the 6 s that an environment takes.
    """
    import shutil
    directory = environment_dir(wanted, data)
    ready = os.path.join(directory, "ready")
    if os.path.exists(ready):
        say(f"The Python that {directory} was made with is gone, so it is made anew")
    say(f"Installing {wanted.what} into {directory}")
    shutil.rmtree(directory, ignore_errors=True)
    inside = environment_program(wanted, data)
    make = [python, "-m", "venv", directory]
    pip = [inside, "-m", "pip"]
    outside = outside_pip(python)
    if outside:
        make.append("--without-pip")
        pip = [*outside, "--python", inside]
    pip += ["install", "--disable-pip-version-check", "--only-binary", ":all:"]
    pip += _requirement_words(wanted, directory)
    steps = (
        ("environment", make),
        ("download and install", pip),
        ("first start", [inside, "-c", f"import {wanted.module}"]),
    )
    for what, command in steps:
        output = run_with_progress(what, command, say)
        if output is not None:
            shutil.rmtree(directory, ignore_errors=True)
            raise _install_error(wanted, what, output)
    # Last: an environment without it is made anew.
    write_atomic(ready, wanted.version + "\n")


def install_environment(wanted: PrivateEnvironment, data: str, say: Callable[[str], None]) -> None:
    """Make a private environment where none is ready; wheels only, nothing is built.

    One process does it at a time; the others wait and find it done. Errors: UserError.
    """
    if environment_ready(wanted, data):
        return
    what = wanted.what
    python = suitable_python(wanted)
    if not python:
        raise UserError(f"{what} needs Python 3.{wanted.oldest} to 3.{wanted.newest},"
                        " and there is none on PATH", wanted.otherwise)
    lock = os.path.join(data, wanted.name, "lock")
    with FileLock(lock, lambda: say(f"Another llmstack is installing {what}; waiting")):
        # Whoever held the lock may have made it.
        if not environment_ready(wanted, data):
            _make_environment(wanted, data, python, say)


# ==================================================================================================
# RELAY
# ==================================================================================================
# One thread a connection, blocking sockets, bytes as they come. What was measured and chosen:
# - A silent upstream is waited for with a kernel receive timeout of 50 ms; each time it lapses, the
#   thread peeks at its client and cancels when it has gone. Polling both sockets costs every chunk
#   one more system call; a watcher thread costs every request a hand-over of the interpreter's
#   lock. A lapse costs nothing while bytes flow, and works on every platform.
# - A body is taken out of its framing and put into ours: so its last bytes can be read.
# - A head is split and matched by few regular expressions, and what is the same in each request of
#   a client is kept. BaseHTTPRequestHandler and http.client parse far more than a relay needs.
#
# A Server has a thread that accepts, a thread for each connection, and the main thread for the
# housekeeping. A connection's thread reads a request (Client), has the App answer it, and closes
# the connection at its end; others only make it give way. The way of a relayed request (_Relay):
#     ask     over a connection of the upstream's pool; a kept one that has died is replaced, once
#     head    interim answers are dropped; in each silence the client is looked at, and told to wait
#     judge   an error, or a stream that begins with one, may be rejected: another tier is asked
#     begin   the first byte goes on: the body is let go of, and no other tier is asked any more
#     pass on until the body has ended (done), or ends without an end (broken)
# The upstream's connection goes back to its pool once an answer was read whole, and is closed by
# _Relay.run() in every other case, whatever was raised.
#
# To compare two versions, turn off the random addresses (`setarch -R`): where the libraries land
# moves the latency by 10 us from one start to the next.

_DONTWAIT = int(getattr(socket, "MSG_DONTWAIT", 0))
_PEEK = _DONTWAIT | int(socket.MSG_PEEK)        # once: these are enums, whose | is slow
_POLL = getattr(select, "poll", None)           # Windows has none; elsewhere select() ends at 1,023
_LAPSED = (BlockingIOError, socket.timeout)     # what lapsed patience raises; the second by TLS


def _set_patience(sock: socket.socket, milliseconds: int) -> None:
    """Make receiving and sending on `sock` raise one of _LAPSED after so long without progress."""
    if IS_WINDOWS or hasattr(sock, "cipher"):
        sock.settimeout(milliseconds / 1000)
        return
    seconds, rest = divmod(milliseconds, 1000)
    timeval = struct.pack("ll", seconds, rest * 1000)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def _readable(sock: socket.socket) -> bool:
    """Whether receiving would return at once: bytes have come, or the end."""
    if _POLL is None:
        return bool(select.select([sock], [], [], 0)[0])
    poll = _POLL()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _peek(sock: socket.socket) -> Optional[bytes]:
    """What could be received now without waiting: None for nothing, b"" for the end."""
    try:
        is_tls = hasattr(sock, "cipher")
        # Windows cannot peek without waiting, and TLS not at all: what is there is its end.
        if (is_tls or not _DONTWAIT) and not _readable(sock):
            return None
        if is_tls:
            return b""
        return sock.recv(1, _PEEK)
    except BlockingIOError:
        return None
    except (OSError, ValueError):
        return b""


def _carry(source: socket.socket, target: socket.socket) -> bool:
    """Pass on what has come; False at the end, which is passed on, too. Errors: OSError."""
    data = source.recv(RECV_BYTES)
    if data:
        target.sendall(data)
    else:
        target.shutdown(socket.SHUT_WR)
    return bool(data)


def _carry_all(ready: Any, other: Mapping[socket.socket, socket.socket]) -> None:
    """Pass on what comes from each registered socket until all have ended. Errors: OSError."""
    while ready.get_map():
        for key, _ in ready.select():
            if not _carry(key.fileobj, other[key.fileobj]):
                ready.unregister(key.fileobj)


class Client:
    """The side of a connection that asks. Only give_way() is for other threads."""

    __slots__ = (
        "_buffer", "_sock", "answering", "asking_since", "head_timeout_s", "keep_alive", "method",
        "minor", "opened", "origin", "protocol", "served", "unread",
    )
    send_timeout_s: float = SEND_TIMEOUT_S

    def __init__(self, sock: socket.socket, head_timeout_s: float = HEAD_TIMEOUT_S) -> None:
        self._sock = sock
        self._buffer = b""
        self.head_timeout_s = head_timeout_s
        self.keep_alive = True
        self.answering = False                  # the head of an answer has gone out
        self.opened = False                     # it was ours, of a stream of events
        self.protocol = ""                      # the canonical path asked: errors take its shape
        self.unread = False                     # a body was announced and not read
        self.served = False                     # a first request has come
        self.asking_since = time.monotonic()    # a request is to come whole, 0.0: none is under way
        self.method = ""
        self.minor = 1
        self.origin = b""                       # of the page that asks
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # How often a silent client's time is looked at; how long that is, its readers say.
        patience_s = min(5.0, head_timeout_s / 3)
        _set_patience(sock, max(int(patience_s * 1000), 1))

    # ---- reading

    def read_request(self) -> Optional[Request]:
        """The next request, or None when the client is done. Errors: HttpError."""
        # Nothing of the last request is said of this one, be it only that it is malformed.
        self.answering = self.opened = False
        self.method = self.protocol = ""
        self.minor = 1
        self.origin = b""
        head = self._read_head()
        if head is None:
            return None
        request = parse_request_head(head)
        self.method, self.minor = request.method, request.minor
        self.keep_alive = request.keep_alive
        self.origin = request.fields.get(b"origin", b"")
        self.served = True
        self.unread = request.length != 0
        if not self.unread:
            self.asking_since = 0.0
        return request

    def _read_head(self) -> Optional[bytes]:
        """The next head without its empty line, None when the client is done. Errors: HttpError."""
        buffer = bytearray(self._buffer)
        searched = 0
        may_skip = True                         # RFC 9112, 2.2: one empty line before a request
        idle_since = time.monotonic()
        self.asking_since = idle_since
        while True:
            if may_skip and buffer.startswith(b"\r\n"):
                del buffer[:2]
                may_skip = False
            if buffer:
                end = head_end(buffer, searched)
                if end >= 0:
                    self._buffer = bytes(buffer[end + 4:])
                    return bytes(buffer[:end])
                searched = len(buffer)
            elif self.served:                   # it may rest between two requests, not before one
                self.asking_since = 0.0
            try:
                data = self._sock.recv(RECV_BYTES)
                if not data:
                    return None
            except _LAPSED:
                data = b""
            except OSError:
                return None
            if data and not buffer:
                self.asking_since = time.monotonic()
            elif time.monotonic() - (self.asking_since or idle_since) > self._head_limit_s:
                if not buffer:
                    return None
                raise HttpError(408, f"the head did not arrive within {self.head_timeout_s:g} s")
            buffer += data

    @property
    def _head_limit_s(self) -> float:
        if self.asking_since:
            return self.head_timeout_s
        return IDLE_CLIENT_S

    def read_body(self, request: Request) -> bytes:
        """The whole body, de-chunked. Errors: HttpError 400, 408, 413; ClientGone."""
        if request.length > MAX_BODY_BYTES:
            raise HttpError(413, f"the body is over {MAX_BODY_BYTES // 2**20} MiB")
        if request.expects and not self._buffer:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        chunked = request.length < 0
        body = self._read_chunked() if chunked else self._read_sized(request.length)
        self.unread = False
        self.asking_since = 0.0
        return body

    def _read_sized(self, length: int) -> bytes:
        have = self._buffer
        self._buffer = have[length:]
        if length <= len(have):                 # it came with its head
            return have[:length]
        body, filled = bytearray(have), len(have)
        while filled < length:
            # Grows with what has come: saying much costs nothing.
            if filled == len(body):
                more = max(filled, RECV_BYTES)
                body.extend(bytes(min(more, length - filled)))
            with memoryview(body)[filled:] as rest:
                filled += self._wait_for(self._sock.recv_into, rest)
        return body                             # type: ignore[return-value]  # read like bytes

    def _read_chunked(self) -> bytes:
        framing, body = ChunkFraming(), bytearray()
        data, self._buffer = self._buffer, b""
        while True:
            try:
                body += framing.feed(data)
            except ValueError as exc:
                raise HttpError(400, str(exc)) from None
            if len(body) > MAX_BODY_BYTES:
                raise HttpError(413, f"the body is over {MAX_BODY_BYTES // 2**20} MiB")
            if framing.ended:
                self._buffer = data[len(data) - framing.over:]
                return body                     # type: ignore[return-value]  # read like bytes
            data = self._wait_for(self._sock.recv, RECV_BYTES)

    def _wait_for(self, receive: Callable[[Any], Any], argument: Any) -> Any:
        began = time.monotonic()
        while True:
            try:
                got = receive(argument)
            except _LAPSED:
                if time.monotonic() - began > self.head_timeout_s:
                    raise HttpError(408, "the body stopped arriving") from None
                continue
            except OSError:
                raise ClientGone from None
            if not got:
                raise ClientGone
            return got

    def gone(self) -> bool:
        """True when the client has closed its connection.

        Closing its sending half alone counts, too: nobody waits there any more.
        """
        seen = _peek(self._sock)
        # More requests, sent ahead: the end may stand behind them.
        while seen and len(self._buffer) < MAX_HEAD_BYTES:
            try:
                self._buffer += self._sock.recv(RECV_BYTES)
            except OSError:
                return True
            seen = _peek(self._sock)
        return seen == b""

    def give_way(self) -> None:
        """End the connection while its own thread waits for a request on it."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    # ---- writing

    def send(self, data: bytes) -> None:
        """Send everything.

        Errors: ClientGone, also for a client that takes nothing for send_timeout_s: it would hold
        its relay, its connection and its model without end.
        """
        view = memoryview(data)
        moved = time.monotonic()
        while view:
            try:
                sent = self._sock.send(view)
                if sent == len(view):           # nearly always, and at once
                    return
                view, moved = view[sent:], time.monotonic()
            except _LAPSED:
                if time.monotonic() - moved > self.send_timeout_s:
                    raise ClientGone from None
            except OSError:
                raise ClientGone from None

    def reply(self, status: int, body: bytes, content_type: str = "application/json",
              extra: bytes = b"") -> None:
        """Answer ourselves. Closes when a body was left unread: its bytes are no request."""
        if self.unread:
            self.keep_alive = False
        lines = [
            b"HTTP/1.1 %d %b" % (status, REASONS.get(status, "Error").encode()),
            b"Server: llmstack",
            b"Content-Type: " + content_type.encode(),
            b"Content-Length: %d" % len(body),
        ]
        answer = b"\r\n".join(lines) + b"\r\n"
        answer += self.connection_line() + self.for_page()
        answer += extra + b"\r\n"
        if self.method != "HEAD":
            answer += body                      # in one system call, and most often one packet
        self.answering = True
        self.send(answer)

    def reply_json(self, value: Any, status: int = 200, extra: bytes = b"") -> None:
        """Answer ourselves with a value as JSON."""
        self.reply(status, json.dumps(value, ensure_ascii=False).encode(), extra=extra)

    def connection_line(self) -> bytes:
        """The header line that says whether the connection stays, where its version does not."""
        if not self.keep_alive:
            return b"Connection: close\r\n"
        if not self.minor:
            return b"Connection: keep-alive\r\n"
        return b""

    def for_page(self) -> bytes:
        """Header lines with which a browser lets the page that asked read the answer."""
        if not self.origin:                     # none, or one that refusal() did not let pass
            return b""
        return (b"Access-Control-Allow-Origin: " + self.origin + b"\r\nVary: Origin\r\n"
                b"Access-Control-Expose-Headers: *\r\n")

    def reply_error(self, status: int, message: str, kind: str = "invalid_request_error",
                    extra: bytes = b"") -> None:
        self.reply(status, error_json(message, kind, status, self.protocol), extra=extra)

    def error_event(self, message: str, kind: str) -> bytes:
        """A server-sent event that says a stream has failed, in the shape of what was asked."""
        return error_event(message, kind, self.protocol)

    def open_stream(self, extra: bytes = b"") -> None:
        """Begin an answer that is a stream of events, before any upstream has one.

        `extra` are more header lines, each with its CRLF.
        """
        self.keep_alive = self.keep_alive and self.minor == 1
        lines = [
            b"HTTP/1.1 200 OK",
            b"Server: llmstack",
            b"Content-Type: text/event-stream",
            b"Cache-Control: no-cache",
        ]
        if self.minor == 1:
            lines.append(b"Transfer-Encoding: chunked")
        if not self.keep_alive:
            lines.append(b"Connection: close")
        self.answering = self.opened = True
        head = b"\r\n".join(lines) + b"\r\n"
        self.send(head + self.for_page() + extra + b"\r\n")

    def send_event(self, event: bytes) -> None:
        """An event or comment of a stream that open_stream began."""
        if self.minor == 1:
            event = chunk(event)
        self.send(event)

    def half_close(self) -> None:
        """Nothing more is said; what the client still sends meets no reset."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        """Close; after a refusal, let the client read it before its unread bytes reset it."""
        if self.unread or self._buffer:
            try:
                self._drain()
            except (OSError, ValueError):
                pass
        self._sock.close()

    def _drain(self) -> None:
        """Say no more, and take what the client still says. Errors: OSError, ValueError."""
        self.half_close()
        _set_patience(self._sock, 200)
        for _ in range(64):                     # who never stops talking is not listened to
            if not self._sock.recv(RECV_BYTES):
                return

    def tunnel(self, upstream: socket.socket) -> None:
        """Carry bytes both ways until both sides have ended (an `Upgrade` that was granted)."""
        import selectors
        other = {self._sock: upstream, upstream: self._sock}
        with selectors.DefaultSelector() as ready:
            for sock in other:
                _set_patience(sock, int(self.send_timeout_s * 1000))
                ready.register(sock, selectors.EVENT_READ)
            try:
                # What came right behind the request belongs to the new protocol.
                upstream.sendall(self._buffer)
                _carry_all(ready, other)
            except OSError:
                pass


JSON_LINE = b"Content-Type: application/json\r\n"


def _pieces(sock: socket.socket, timeout_s: float, limit_bytes: int) -> Iterator[bytes]:
    """What comes, up to the connection's end. Errors: OSError past the time, ValueError."""
    # For all of it: a byte a second would have no end, either.
    deadline = time.monotonic() + timeout_s
    total = 0
    while True:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            data = sock.recv(RECV_BYTES)
        except _LAPSED:
            data = None
        if data is None or time.monotonic() > deadline:
            raise OSError(f"no answer within {timeout_s:g} s")
        if not data:
            return
        total += len(data)
        if total > limit_bytes:
            raise OSError(errno.EFBIG, f"its answer has more than {limit_bytes:,} bytes")
        yield data


def _read_answer(pieces: Iterator[bytes], method: str) -> Tuple[Response, bytes]:
    """(head, body) of an answer that comes in pieces. Errors: ValueError, and those of `pieces`."""
    data, end = bytearray(), -1
    while end < 0:
        searched = len(data)
        piece = next(pieces, b"")
        if not piece:
            raise ValueError("the answer ended early")
        data += piece
        # The beginning of its body may have come with it.
        if len(data) > MAX_HEAD_BYTES + RECV_BYTES:
            raise ValueError("an answer without end")
        end = data.find(b"\r\n\r\n", max(searched - 3, 0))
    response = parse_response_head(bytes(data[:end]), method)
    body = body_of(response)
    payload = bytearray(body.feed(bytes(data[end + 4:])))
    while not body.ended:
        piece = next(pieces, b"")
        if piece:
            payload += body.feed(piece)
        elif response.framing == "close":
            break
        else:
            raise ValueError("the answer ended early")
    return response, bytes(payload)


class Upstream:
    """A host we ask, and its idle keep-alive connections, the last used first."""

    timeout_s: float = CONNECT_TIMEOUT_S
    key = ""                                    # that it wants, as a Bearer token
    is_gateway = False                          # a 502 without a body says that nobody answered it

    def __init__(self, host: str, port: int, prefix: str = "", tls: bool = False) -> None:
        self.host, self.port, self._tls = host, port, tls
        self.prefix = prefix.rstrip("/")
        self._idle: Any = collections.deque()   # (since, socket), the last used at the right
        self._context: Any = None
        scheme, usual_port = "http", 80
        if tls:
            scheme, usual_port = "https", 443
        authority = host
        if ":" in host:                         # an address of IPv6
            authority = f"[{host}]"
        if port != usual_port:
            authority += f":{port}"
        self.authority = authority.encode("ascii")
        self.url = f"{scheme}://{authority}{self.prefix}"

    def use_tls(self, context: Any) -> None:
        """Verify the server as this ssl.SSLContext says, not as the default one does."""
        self._context = context

    def connect(self, client: Optional[Client] = None) -> socket.socket:
        """A new connection, for `client` where one waits for it. Errors: OSError."""
        sock = socket.create_connection((self.host, self.port), self.timeout_s)
        try:
            if self._tls:
                import ssl
                self._context = self._context or ssl.create_default_context()
                sock = self._context.wrap_socket(sock, server_hostname=self.host)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Python's timeout polls before each call; the kernel's costs no system call.
            sock.settimeout(None)
            _set_patience(sock, PATIENCE_MS)
        except BaseException:
            sock.close()
            raise
        return sock

    def checkout(self, client: Optional[Client] = None) -> Tuple[socket.socket, bool]:
        """(connection, whether it was used before). Passes over those closed meanwhile."""
        while self._idle:
            try:
                since, sock = self._idle.pop()
            except IndexError:                  # another thread took the last one
                break
            is_fresh = time.monotonic() - since < IDLE_UPSTREAM_S
            # Whatever came meanwhile, an end or a late 408, is no answer to what is asked now.
            if is_fresh and not _readable(sock):
                return sock, True
            sock.close()
        return self.connect(client), False

    def checkin(self, sock: socket.socket) -> None:
        # As the last one is taken first, those that are not needed grow old and are closed.
        if len(self._idle) < MAX_CONNECTIONS:
            self._idle.append((time.monotonic(), sock))
        else:
            sock.close()

    def close_idle(self, older_than_s: float = IDLE_UPSTREAM_S) -> None:
        """Close the connections nobody has used for so long; applications call it every second."""
        before = time.monotonic() - older_than_s
        try:
            while self._idle[0][0] <= before:
                self._idle.popleft()[1].close()
        except IndexError:                      # none is left
            pass

    def forget(self) -> None:
        """Close the idle connections: their server is gone."""
        self.close_idle(0.0)

    def get(self, path: str, timeout_s: float = 5.0, method: str = "GET",
            headers: bytes = b"", limit_bytes: int = MAX_BODY_BYTES,
            body: bytes = b"") -> Tuple[Response, bytes]:
        """A small request of our own: (head, body), whole within `timeout_s` of the connection.

        Errors: OSError, ValueError.
        """
        if self.key:
            headers += b"Authorization: Bearer " + self.key.encode() + b"\r\n"
        lines = [
            f"{method} {self.prefix}{path} HTTP/1.1".encode("latin-1"),
            b"Host: " + self.authority,
            headers + b"Content-Length: %d" % len(body),
            b"Connection: close",
        ]
        # No kept one: each of these may be the last thing that is asked of that host.
        sock = self.connect()
        try:
            sock.settimeout(timeout_s)
            sock.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
            return _read_answer(_pieces(sock, timeout_s, limit_bytes), method)
        finally:
            sock.close()


MAX_ANSWER_BYTES = 1 << 20                      # of a daemon that is asked for its state


def asked_json(upstream: Upstream, path: str) -> Dict[str, Any]:
    """The JSON object that a daemon answers within 2 s, {} where it answers none.

    What is in it is another process's word: its types are for the caller to check.
    """
    try:
        body = upstream.get(path, 2.0, limit_bytes=MAX_ANSWER_BYTES)[1]
    except (OSError, ValueError):
        return {}
    return parse_json_object(body)


def parse_upstream(url: str) -> Upstream:
    """`http(s)://host[:port][/prefix]`; a trailing /v1 is ours to add. Errors: UserError."""
    from urllib.parse import urlsplit
    hint = "give it like http://127.0.0.1:8080"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise UserError(f"{url!r} is not a URL", hint, 2) from None
    plain = parts.scheme in ("http", "https") and url.isascii()
    if not plain or not parts.hostname or parts.query or parts.username:
        raise UserError(f"{url!r} is not a plain http or https URL", hint, 2)
    tls = parts.scheme == "https"
    if not port:
        port = 443 if tls else 80
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Upstream(parts.hostname, port, prefix, tls)


class Outcome(NamedTuple):
    """How a relay ended.

    state: done | broken (in the middle) | rejected (not passed on) | unreachable | failed (a load).
    """

    state: str
    status: int = 0
    detail: str = ""
    retry_after_s: float = 0.0
    counts: Counts = NOTHING_COUNTED            # what the answer says of its tokens
    first_byte_s: float = 0.0                   # from the sending of the request
    # Of a hosted answer, in dollars, where LiteLLM says it.
    cost: float = 0.0

    @property
    def answered(self) -> bool:
        """Whether it was passed on whole, and is no error."""
        return self.state == "done" and self.status < 400


class Translation:
    """Puts one answer into the shape of another protocol, as it passes."""

    content_type = b""

    def begin(self, status: int) -> None:
        """An answer with this status is going to pass."""

    def feed(self, payload: bytes, last: bool = False) -> bytes:
        """What the client gets for the next bytes, or for the `last`."""
        return payload


class Terms(NamedTuple):
    """What a relay heeds besides the request: the defaults pass everything on as it comes."""

    extra: Optional[Callable[[], bytes]] = None         # makes header lines for the answer
    # True: an error another tier may do better on.
    judge: Optional[Callable[[int, str], bool]] = None
    waiting: Optional[Callable[[], None]] = None        # called while nothing has come yet
    ends: Sequence[bytes] = ()                          # what the end of an event stream holds
    first_byte_s: float = 0.0                           # longest silence before it, 0: any
    # Called when the answer has begun to go on: no other is asked.
    began: Optional[Callable[[], None]] = None
    translation: Optional[Translation] = None           # the shape in which the client gets it
    # Longest wait in all for the first byte, 0: any.
    patience_s: float = 0.0


class _NoAnswer(Exception):  # noqa: N818
    """A connection ended before a byte of an answer came."""


def _why_unreachable(exc: Exception) -> str:
    """In words, for the client and the log."""
    if isinstance(exc, ConnectionRefusedError):
        return "connection refused"
    if isinstance(exc, _NoAnswer):
        return "closed the connection without an answer"
    if not isinstance(exc, OSError):
        return str(exc)
    if isinstance(exc, socket.timeout):
        return "no answer to the connection"
    verify = getattr(exc, "verify_message", "")         # of ssl.SSLError, as `reason` is
    if verify:
        return (f"its certificate does not verify: {verify.rstrip('.')};"
                " SSL_CERT_FILE names other authorities to trust")
    reason = getattr(exc, "reason", "")
    if reason:
        return f"TLS failed: {reason.lower().replace('_', ' ')}"
    return str(exc.strerror or exc)


class _Receiver:
    """Receives from an upstream for a client, and notices when that client leaves."""

    __slots__ = ("_buffer", "_client", "_look_at_s", "_sock", "silent_until_s", "waiting")

    def __init__(self, sock: socket.socket, client: Client) -> None:
        self._sock, self._client = sock, client
        # One buffer for all of an answer: with one for each receive(), 200 streams of small pieces
        # tear 30 MB of holes into malloc's heap.
        self._buffer = memoryview(bytearray(RECV_BYTES))
        self._look_at_s = time.monotonic() + LOOK_S
        self.waiting: Optional[Callable[[], None]] = None
        self.silent_until_s = 0.0               # 0: silence has no end

    def receive(self) -> bytes:
        """The next bytes, b"" at the end. Errors: UpstreamBroken; ClientGone.

        The client is looked at in every silence of PATIENCE_MS, and every LOOK_S however steadily
        an upstream trickles.
        """
        while True:
            try:
                received = self._sock.recv_into(self._buffer)
            except _LAPSED:
                received = -1
            except OSError as exc:
                raise UpstreamBroken(_why_unreachable(exc)) from None
            now = time.monotonic()
            # Whatever has come is of no use to a client that has left.
            if received < 0 or now >= self._look_at_s:
                self._look_at_s = now + LOOK_S
                if self._client.gone():
                    raise ClientGone
            if received >= 0:
                return bytes(self._buffer[:received])
            if self.silent_until_s and now > self.silent_until_s:
                raise UpstreamBroken("it says nothing")
            if self.waiting is not None:
                self.waiting()


def _send_upstream(sock: socket.socket, pieces: Sequence[bytes], client: Client) -> bool:
    """Send all pieces; False when the upstream has answered before it had read them all (413, say).

    Errors: OSError; ClientGone for a client that leaves meanwhile.
    """
    left = sum(map(len, pieces))
    is_tls = hasattr(sock, "cipher")
    # Gathering spares a copy of a 400 kB prompt.
    gather = left > RECV_BYTES and hasattr(sock, "sendmsg") and not is_tls
    if gather:
        views: List[Any] = [memoryview(piece) for piece in pieces if len(piece)]
    else:
        views = [b"".join(pieces)]
    while True:
        try:
            # The kernel takes 1,024 pieces at most.
            sent = sock.sendmsg(views[:64]) if gather else sock.send(views[0])
        except _LAPSED:
            if client.gone():
                raise ClientGone from None
            # With TLS, what has come may be a session ticket.
            if not is_tls and _peek(sock) is not None:
                return False
            continue
        except OSError:
            if _peek(sock):                     # it has said why it hung up
                return False
            raise
        left -= sent
        if not left:
            return True
        while sent >= len(views[0]):
            sent -= len(views.pop(0))
        views[0] = memoryview(views[0])[sent:]


def _receive_head(receiver: _Receiver, method: str) -> Tuple[Response, bytes]:
    """(final response head, bytes behind it). Errors: _NoAnswer, UpstreamBroken, ClientGone.

    Interim answers (100, 102, 103) are not for the client, which has had its 100 from us. Their
    number is bounded, as is the time of a head from its first byte on.
    """
    data, interim, end_s = b"", 0, 0.0
    while True:
        try:
            more = receiver.receive()
        except UpstreamBroken as exc:
            if not end_s and receiver.silent_until_s:
                raise
            if not end_s:
                raise _NoAnswer from None
            raise UpstreamBroken(f"broke off in its head: {exc}") from None
        if not more:
            if not end_s:
                raise _NoAnswer
            raise UpstreamBroken("closed the connection in the middle of its head")
        # A model may read its prompt for an hour before it says a byte; from then on it may not
        # rest.
        end_s = end_s or time.monotonic() + HEAD_TIMEOUT_S
        data += more
        head, found, rest = data.partition(b"\r\n\r\n")
        while found:
            try:
                response = parse_response_head(head, method)
            except ValueError as exc:
                raise UpstreamBroken(str(exc)) from None
            if response.status >= 200 or response.status == 101:
                return response, rest
            interim += 1
            data = rest
            head, found, rest = data.partition(b"\r\n\r\n")
        is_late = time.monotonic() > end_s
        if is_late or interim > MAX_INTERIM or len(data) > MAX_HEAD_BYTES:
            raise UpstreamBroken("its head does not end")


# Asks for a stream whose end can be read and added to.
UNCOMPRESSED = (b"accept-encoding", b"identity", b"Accept-Encoding: identity")


def without_headers(request: Request, names: Container[bytes]) -> Request:
    """The request without the headers of these names; its `fields` say on what they were."""
    kept = [header for header in request.headers if header[0] not in names]
    return request._replace(headers=tuple(kept))


def with_header(request: Request, header: Header) -> Request:
    """The request with a header instead of any of the same name."""
    others = without_headers(request, (header[0],)).headers
    return request._replace(headers=(*others, header))


_DROPPED = frozenset({b"host", b"content-length", b"expect"}) | HOP_BY_HOP
_DROPPED_FOR_A_KEY = _DROPPED | {b"authorization", b"x-api-key", b"api-key"}


def request_head(request: Request, upstream: Upstream, target: str, length: int) -> bytes:
    """The head we send upstream for a client's request; one with a key gets that and no other."""
    first = f"{request.method} {upstream.prefix}{target} HTTP/1.1"
    lines = [first.encode("latin-1"), b"Host: " + upstream.authority]
    drop = _DROPPED
    if upstream.key:
        drop = _DROPPED_FOR_A_KEY
        lines.append(b"Authorization: Bearer " + upstream.key.encode())
    if request.words:                           # Connection: close, say, from some clients
        drop = drop | request.words
    lines += [line for name, _, line in request.headers if name not in drop]
    if request.upgrade:
        lines.append(b"Connection: Upgrade")
        lines += [line for name, _, line in request.headers if name == b"upgrade"]
    # An empty body is announced, too, where the method means one (RFC 9110, 8.6).
    if length or request.length or request.method in ("POST", "PUT", "PATCH"):
        lines.append(b"Content-Length: %d" % length)
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _retyped(response: Response, content_type: bytes) -> Response:
    """The head of an answer whose body is going to be another."""
    of_body = (b"content-type:", b"content-length:")
    lines = [line for line in response.text.split(b"\r\n")
             if line and not line.lower().startswith(of_body)]
    lines.append(b"Content-Type: " + content_type + b"\r\n")
    return response._replace(text=b"\r\n".join(lines))


class _Answer:
    """The body of one answer on its way from an upstream to a client.

    However an upstream frames it, it is taken out of its frame here and put into ours: so something
    can be added to a stream of events, and its last bytes can be read.
    """

    __slots__ = ("_body", "_ends", "_translation", "chunked", "first", "response", "tail")

    def __init__(self, client: Client, response: Response, ends: Sequence[bytes] = (),
                 translation: Optional[Translation] = None) -> None:
        self.response, self._ends, self._translation = response, ends, translation
        self.first = self.tail = b""
        self._body = body_of(response)
        # A stream that we began has no length, and what a translation makes of a body another.
        sized = response.framing in ("length", "none") and not client.opened
        if translation is not None:
            sized = False
            translation.begin(response.status)
            self.response = _retyped(response, translation.content_type)
        self.chunked = client.minor == 1 and not sized
        if client.minor == 0 and not sized:
            client.keep_alive = False           # its end tells that of the answer

    @property
    def ended(self) -> bool:
        return self._body.ended

    @property
    def reusable(self) -> bool:
        """Whether the upstream's connection can carry another request."""
        return self._body.ended and not self._body.over and self.response.keep_alive

    def feed(self, data: bytes) -> bytes:
        """What of the next bytes is payload. Errors: UpstreamBroken."""
        try:
            payload = self._body.feed(data)
        except ValueError as exc:
            raise UpstreamBroken(str(exc)) from None
        # The end alone is kept, for what it says of tokens and of how the stream ended.
        if len(payload) >= TAIL_BYTES:
            self.tail = payload[-TAIL_BYTES:]
        elif payload:
            self.tail = (self.tail + payload)[-TAIL_BYTES:]
        return payload

    def frame(self, payload: bytes, last: bool = False) -> bytes:
        """Payload as the client gets it; `last`: with the clean end behind it."""
        if self._translation is not None:
            payload = self._translation.feed(payload, last)
        if not self.chunked:
            return payload
        if payload:                             # an empty chunk would be the end
            payload = chunk(payload)
        if last:
            payload += b"0\r\n\r\n"
        return payload

    def counts(self) -> Counts:
        """Of its tokens; they stand at its beginning (of a stream in its first event) or end."""
        return tokens_said(self.first + b"\n" + self.tail)

    def why_broken(self, at_close: bool = False) -> str:
        """Why an answer that ended is broken all the same, "" when it is whole.

        A server that is killed closes its connections as one that is done does, and llama-swap
        appends a failed load's JSON to the stream of its loading messages and ends that cleanly:
        opencode then asks again without bound.
        """
        if at_close and self.response.framing != "close":
            return "ended early"
        if not self.response.events:
            return ""
        tail = self.tail
        if not tail or tail.endswith((b"\n", b"\r", b"[DONE]")):
            # Of a path whose streams have no known end, an event's is enough.
            if not self._ends or any(end in tail for end in self._ends):
                return ""
            what = "end" if tail else "event"
            return f"its stream ended without an {what}"
        said = re.search(rb'"error":\s*(?:\{"message":\s*)?"((?:[^"\\]|\\.)*)"', self.tail)
        if said:
            return said.group(1).decode("utf-8", "replace")
        return "its stream ended in the middle of an event"


# An event that is no comment, whole.
_EVENT = re.compile(
    rb"(?:\A|(?<=\n))[ \t]*((?:data|event|id|retry)[^\r\n]*(?:\r?\n[^\r\n]+)*)\r?\n\r?\n")
# What may stand before a word of the model's, in Anthropic's streams and OpenAI's responses.
_PRELUDE = re.compile(
    rb'"type"\s*:\s*"(?:ping|message_start|response\.(?:created|queued|in_progress))"')
_EVENT_JSON = re.compile(rb"(?:\A|\n)data:[ \t]*(\{.*)")
_NOTHING = re.compile(rb"data:[ \t]*\[DONE\]")       # as the first event
_ERROR_CODE = re.compile(rb'"code"\s*:\s*"?([45][0-9]{2})\b')


def _telling_event(payload: bytes) -> Optional[Match[bytes]]:
    """The first event of a stream by which an answer begins, None while there is none.

    What only opens the stream is none: a server that has sent it may still fail.
    """
    for found in _EVENT.finditer(payload):
        event = found.group(1)
        if b"data:" in event and not _PRELUDE.search(event, 0, 400):
            return found
    return None


def _first_event(answer: _Answer, receiver: _Receiver, data: bytes) -> Tuple[bytes, bytes]:
    """(the payload of an event stream up to the event by which its answer begins, that event).

    Errors: UpstreamBroken, ClientGone. An event that is larger than FIRST_EVENT_BYTES is no error.
    """
    payload = answer.feed(data)
    found = _telling_event(payload)
    while found is None and not answer.ended and len(payload) <= FIRST_EVENT_BYTES:
        more = receiver.receive()
        if not more:
            raise UpstreamBroken("ended before its first event")
        payload += answer.feed(more)
        found = _telling_event(payload)
    if found is None:
        answer.first = payload[:FIRST_EVENT_BYTES]
        return payload, answer.first
    answer.first = payload[:found.end()]
    return payload, found.group(1)


def _says_error(event: bytes) -> bool:
    """Whether an event is an error, in any of the shapes that servers and providers give it."""
    if event.startswith((b"event: error", b"event:error")):
        return True
    found = _EVENT_JSON.search(event)
    if b"error" not in event or found is None:
        return False
    try:
        said = json.loads(found.group(1))
    except (ValueError, RecursionError):        # cut short: it is longer than errors are
        return False
    failed = said.get("type") in ("error", "response.failed")
    return failed or said.get("object") == "error" or bool(said.get("error"))


def event_error(event: bytes) -> int:
    """The status that an error event stands for, 0 for an event that is none."""
    if not _says_error(event):
        return 0
    code = _ERROR_CODE.search(event)
    if code is None:
        return 500
    return int(code.group(1))


def _short_body(answer: _Answer, receiver: _Receiver, data: bytes) -> bytes:
    """The body of an error as far as it is short: what is said in it decides where to go next."""
    payload = answer.feed(data)
    while len(payload) < RECV_BYTES and not answer.ended:
        more = receiver.receive()
        if not more:
            break
        payload += answer.feed(more)
    return payload


def _response_head(response: Response, client: Client, extra: bytes, chunked: bool) -> bytes:
    lines = response.text
    if chunked:
        lines += b"Transfer-Encoding: chunked\r\n"
    if response.status != 101:                  # its Connection line is the upstream's
        lines += client.connection_line()
    return b"".join((lines, client.for_page(), extra, b"\r\n"))


def _cost(response: Response) -> float:
    """Dollars, as LiteLLM says it in a header."""
    value = response.header(b"x-litellm-response-cost")
    if value and re.match(r"[0-9.]{1,20}(?:e-[0-9]{1,2})?\Z", value):
        return float(value)
    return 0.0


def _retry_after_s(response: Response) -> float:
    """Seconds of a Retry-After, a number or a date; 0.0 without one."""
    value = response.header(b"retry-after") or response.header(b"llm_provider-retry-after")
    return parse_retry_after(value.strip(), time.time())


class _Relay:
    """One request on its way upstream, and the answer on its way back."""

    def __init__(self, client: Client, request: Request, pieces: List[bytes], terms: Terms) -> None:
        self._client = client
        self._request = request
        self._pieces = pieces
        self._terms = terms
        self._sent_whole = False
        self._lines = b""                       # what terms.extra made
        self._sock: Optional[socket.socket] = None      # the upstream's, until it is given back
        self._began = False                     # the answer goes on to the client
        self._started_s = time.monotonic()
        self._first_byte_s = 0.0

    def exchange(self, sock: socket.socket) -> Tuple[_Receiver, Response, bytes]:
        """Send the request and read the answer's head: (receiver, head, bytes behind it).

        Errors: _NoAnswer, UpstreamBroken, ClientGone.
        """
        terms = self._terms
        try:
            self._sent_whole = _send_upstream(sock, self._pieces, self._client)
        except OSError:                         # that a kept connection has died shows here, too
            raise _NoAnswer from None
        if terms.extra is not None:             # now: the model is at work, and nobody waits
            self._lines = terms.extra()
        receiver = _Receiver(sock, self._client)
        receiver.waiting = terms.waiting
        if terms.first_byte_s:
            receiver.silent_until_s = time.monotonic() + terms.first_byte_s
        response, data = _receive_head(receiver, self._request.method)
        return receiver, response, data

    def judged(self, answer: _Answer, receiver: _Receiver,
               data: bytes) -> Tuple[Optional[Outcome], bytes]:
        """(the outcome of an answer that is not passed on, what of its body has come).

        Errors: UpstreamBroken, ClientGone.
        """
        response = answer.response
        judge = self._terms.judge
        opened = self._client.opened
        stream = response.status == 200 and response.events
        suspect = stream or response.status >= 400 or opened
        if not suspect or (judge is None and not opened):
            return None, answer.feed(data)
        if stream:
            # A server says 200 before it knows: its error is then the stream's first event.
            payload, event = _first_event(answer, receiver, data)
            status = event_error(event)
            text = event.decode("utf-8", "replace")
            broken = answer.why_broken() if answer.ended else ""
            if _NOTHING.match(event):
                broken = "its stream ended without an answer"
            if broken:
                status, text = 500, broken
        else:
            payload = _short_body(answer, receiver, data)
            status = response.status
            text = payload.decode("utf-8", "replace")
        rejected = bool(status and judge and judge(status, text))
        if rejected or (opened and not stream):     # what is no stream cannot follow one's events
            return Outcome("rejected", status, text, _retry_after_s(response)), payload
        return None, payload

    def pass_on(self, answer: _Answer, receiver: _Receiver, payload: bytes) -> None:
        """Send an answer to the client, bytes as they come.

        Errors: ClientGone; UpstreamBroken, after the client has been told in the stream, where that
        can be done.
        """
        self._client.answering = True
        try:
            self._send_answer(answer, receiver, payload)
        except UpstreamBroken as exc:
            self._say_broken(answer, str(exc))
            raise

    def _send_answer(self, answer: _Answer, receiver: _Receiver, payload: bytes) -> None:
        head = b""
        if not self._client.opened:
            head = _response_head(answer.response, self._client, self._lines, answer.chunked)
        self._send_piece(answer, payload, head)
        if self._terms.began is not None:       # behind the first words: nobody waits for it
            self._terms.began()
        while not answer.ended:
            data = receiver.receive()
            if not data:
                self._end_at_close(answer)
                return
            self._send_piece(answer, answer.feed(data))

    def _send_piece(self, answer: _Answer, payload: bytes, head: bytes = b"") -> None:
        """Send the next bytes of an answer. Errors: UpstreamBroken, where they are a broken end."""
        broken = answer.why_broken() if answer.ended else ""
        is_last = answer.ended and not broken
        out = head + answer.frame(payload, is_last)
        if out:
            self._client.send(out)
        if broken:
            raise UpstreamBroken(broken)

    def _end_at_close(self, answer: _Answer) -> None:
        """The upstream has closed its connection. Errors: UpstreamBroken, where that is no end."""
        broken = answer.why_broken(at_close=True)
        if broken:
            raise UpstreamBroken(broken)
        self._client.send(answer.frame(b"", last=True))

    def _say_broken(self, answer: _Answer, why: str) -> None:
        """Never a clean end: a client would take that for a finished answer."""
        client = self._client
        client.keep_alive = False
        sized = answer.response.framing == "length" and not answer.chunked
        if answer.response.events and not sized:
            event = client.error_event(f"the model's server failed: {why}", "server_error")
            client.send(answer.frame(b"\n\n" + event))

    def _switch(self, sock: socket.socket, response: Response, data: bytes) -> Outcome:
        """An upgrade that was granted: from here on, bytes both ways."""
        # What follows is no HTTP: a client that did not ask for it would take it for an answer.
        if not self._request.upgrade:
            raise UpstreamBroken("it switched protocols unasked")
        client = self._client
        client.answering, client.keep_alive = True, False
        client.send(_response_head(response, client, self._lines, False) + data)
        client.tunnel(sock)
        return Outcome("done", 101)

    def run(self, upstream: Upstream) -> Outcome:
        """Errors: ClientGone, after the upstream's connection has been closed."""
        try:
            return self._run(upstream)
        except (OSError, UpstreamBroken, _NoAnswer) as exc:
            if self._began:
                return Outcome("broken", 200, str(exc), first_byte_s=self._first_byte_s)
            return Outcome("unreachable", 0, _why_unreachable(exc))
        finally:
            if self._sock is not None:
                self._sock.close()

    def _run(self, upstream: Upstream) -> Outcome:
        sock, (receiver, response, data) = self._ask(upstream)
        if response.status == 101:
            return self._switch(sock, response, data)
        answer = _Answer(self._client, response, self._terms.ends, self._terms.translation)
        rejected, payload = self.judged(answer, receiver, data)
        # Its connection is closed: nobody reads what is left of that answer.
        if rejected is not None:
            return rejected
        self._begin()
        receiver.waiting, receiver.silent_until_s = None, 0.0
        self.pass_on(answer, receiver, payload)
        # Of a request that was not read to its end, the rest would be taken for the next one.
        if answer.reusable and self._sent_whole:
            upstream.checkin(sock)
            self._sock = None
        return Outcome(
            "done",
            response.status,
            counts=answer.counts(),
            first_byte_s=self._first_byte_s,
            cost=_cost(response),
        )

    def _ask(self, upstream: Upstream) -> Tuple[socket.socket, Tuple[_Receiver, Response, bytes]]:
        """(connection, what exchange() returns). Errors: those of exchange(), OSError."""
        self._sock, reused = upstream.checkout(self._client)
        try:
            return self._sock, self._answered(upstream)
        except _NoAnswer:
            if not (reused or upstream.is_gateway):
                raise
        self._sock.close()                      # a kept connection that died silently: once more
        self._sock = upstream.connect(self._client)
        return self._sock, self._answered(upstream)

    def _answered(self, upstream: Upstream) -> Tuple[_Receiver, Response, bytes]:
        """What exchange() returns. Errors: its own, _NoAnswer also where a gateway had none."""
        assert self._sock is not None
        receiver, response, data = self.exchange(self._sock)
        empty = response.framing == "length" and not response.length
        if upstream.is_gateway and response.status == 502 and empty:
            raise _NoAnswer
        return receiver, response, data

    def _begin(self) -> None:
        """The answer goes on to the client: no other tier is asked any more."""
        self._began = True                      # what fails from here on is broken, not unreachable
        self._first_byte_s = time.monotonic() - self._started_s
        self._pieces.clear()                    # a prompt is not held while its answer streams


def relay(client: Client, request: Request, upstream: Upstream, target: str, body: List[bytes],
          terms: Terms) -> Outcome:
    """Send a request upstream and pass the answer to the client, as `terms` say.

    Where client.opened, the head of an event stream has gone out already: then only such a stream
    is passed on. `body` gets the head in front, and is emptied once an answer goes on.
    Errors: ClientGone, after the upstream's connection has been closed.
    """
    head = request_head(request, upstream, target, sum(map(len, body)))
    body.insert(0, head)
    return _Relay(client, request, body, terms).run(upstream)


class App:
    """What a server does with its requests."""

    log: Log
    server: Server                              # that asks it, from its making on

    def answer(self, client: Client, request: Request) -> None:
        raise NotImplementedError

    def every_second(self) -> None:
        """Housekeeping on the main thread."""


def _reply_last(client: Client, status: int, message: str, extra: bytes = b"") -> None:
    """Say why a connection ends, where that can be said."""
    if client.answering:
        return
    client.keep_alive = False
    try:
        client.reply_error(status, message, "server_error", extra)
    except ClientGone:
        pass


def _serve_request(client: Client, app: App) -> bool:
    """Answer one request; False when there is none any more. Errors: ClientGone."""
    request = None
    try:
        request = client.read_request()
        if request is None:
            return False
        app.answer(client, request)
    except HttpError as exc:
        if client.answering:
            return False
        if request is None or exc.status in (408, 413):
            client.keep_alive = False           # where the next request begins is not known
        client.reply_error(exc.status, str(exc), exc.kind)
    return True


def serve_connection(client: Client, app: App) -> None:
    """Answer one connection's requests until it ends."""
    try:
        while client.keep_alive:
            if not _serve_request(client, app):
                break
    except ClientGone:
        pass
    except Exception:                           # a bug: its traceback is for the log alone
        import traceback
        app.log.error("internal error\n" + traceback.format_exc())
        _reply_last(client, 500, "internal error; see the log")
    finally:
        client.close()


class Server:
    """Listens, and answers each connection on a thread of its own. Errors: OSError.

    Not socketserver's: that polls beside accept(), and calls its housekeeping at each connection.
    """

    def __init__(self, host: str, port: int, app: App, *, most: int = MAX_CONNECTIONS,
                 head_timeout_s: float = HEAD_TIMEOUT_S) -> None:
        self._app, self._most, self._head_timeout_s = app, most, head_timeout_s
        self._core = core_here()                # that its connections' threads keep to
        self._lock = threading.Lock()
        self._clients: Set[Client] = set()      # whose threads run
        self._refused: List[Client] = []        # told why, and closed a little later
        self._stopping = False
        self._used = True                       # since memory was returned: the start, a client
        self._returned = time.monotonic()
        family = socket.AF_INET
        if ":" in host:
            family = socket.AF_INET6
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            if not IS_WINDOWS:                  # there it would share a port in use
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(1024)           # a burst of clients is not reset
        except OSError:
            self._socket.close()
            raise
        self.server_port: int = self._socket.getsockname()[1]
        app.server = self

    def serve_forever(self, every_s: float = 1.0) -> None:
        """Accept until shutdown(); the housekeeping is done each time so many seconds have gone."""
        accepting = threading.Thread(target=self._accept_all, name="accept", daemon=True)
        accepting.start()
        accepting.join(every_s)
        while accepting.is_alive():
            self._close_refused()
            self._return_memory()
            self._app.every_second()
            accepting.join(every_s)

    def _accept_all(self) -> None:
        """Accept until shutdown(), on the core of the connections' threads; they inherit it.

        On another, it waits there for the interpreter's lock between two clients, as each thread
        does that begins on one core and moves: until 64 streams that begin together all have their
        first event, that takes 2.3 times the processor time, and they wait twice as long.
        """
        stay_on_core(self._core)
        self._socket.settimeout(ACCEPT_S)
        while not self._stopping:
            self._accept()

    def _return_memory(self) -> None:
        if self._used and time.monotonic() - self._returned > RETURN_MEMORY_S:
            self._used, self._returned = False, time.monotonic()
            return_memory()

    def connections(self) -> int:
        return len(self._clients)

    def shutdown(self) -> None:
        """Make serve_forever() return; for other threads, and signals."""
        self._stopping = True                   # no Event: a signal may come while that is locked
        try:
            self._socket.shutdown(socket.SHUT_RDWR)     # on Linux, accept() returns at once
        except OSError:
            pass

    def server_close(self) -> None:
        self._socket.close()
        self._close_refused()

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except _LAPSED:
            return
        except OSError:                         # no descriptor is free, or it has been closed
            time.sleep(0.05)
            return
        try:
            client = Client(sock, self._head_timeout_s)
        except OSError:                         # gone before it began
            sock.close()
            return
        if not self._admit(client):
            self._refuse(client, f"{self._most} connections are open already")
            return
        try:
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()
        except (RuntimeError, MemoryError):
            self._leave(client)
            self._refuse(client, "no more threads are to be had")

    def _admit(self, client: Client) -> bool:
        with self._lock:
            if len(self._clients) >= self._most and not self._make_room():
                return False
            self._clients.add(client)
            return True

    def _make_room(self) -> bool:
        """Have the connection give way that has been longest about its request.

        Those within a quarter of all are left alone: a burst of honest clients is among them.
        """
        since = {client: client.asking_since for client in self._clients}
        asking = [client for client in since if since[client]]
        if len(asking) <= self._most // 4:
            return False
        oldest = min(asking, key=since.__getitem__)
        self._clients.discard(oldest)
        oldest.give_way()
        return True

    def _serve(self, client: Client) -> None:
        try:
            serve_connection(client, self._app)
        finally:
            self._leave(client)

    def _leave(self, client: Client) -> None:
        with self._lock:
            self._clients.discard(client)
            self._used = True

    def _refuse(self, client: Client, why: str) -> None:
        """A 503; closed at once, the client's request would meet a reset and lose it the answer."""
        _reply_last(client, 503, why, b"Retry-After: 1\r\n")
        client.half_close()
        self._refused.append(client)
        if len(self._refused) > self._most // 4:
            self._close_refused(1)

    def _close_refused(self, most: int = MAX_CONNECTIONS) -> None:
        """Close so many of those that were refused, the first first."""
        with self._lock:
            closing = self._refused[:most]
            del self._refused[:most]
        for client in closing:                  # without the lock: it waits for what is unread
            client.close()


# ==================================================================================================
# BACKENDS
# ==================================================================================================
# What can answer a tier: a llama-server of the embedded engine, a model of llama-swap, LiteLLM's
# proxy, a direct host. To a request they are all the same: a lease that becomes ready, has an
# upstream, and is given back.
#
# ask_lease() is the one place where a request waits, on the thread of its connection: it looks at
# the client in between, tells a stream what it waits for (Waiting), relays, and gives the place
# back, whatever has happened. How that ended is an Outcome; who asked says it to the client
# (tell_failure), for only they know whether another backend is asked.


class Lease:
    """A request's place at a backend. This one is ready at once."""

    bay: Optional[Bay] = None                   # where the model's conversations are parked
    load_s = 0.0                                # how long it has waited for a load

    def __init__(self, upstream: Optional[Upstream] = None) -> None:
        self.upstream = upstream
        self._target, self._body = "", b""

    def ready(self) -> bool:
        """True once `upstream` can be asked; until then, what can be done for it is begun.

        Errors: LoadError, where it will never be.
        """
        return True

    def wait(self, seconds: float) -> None:
        """Return when something may have changed, after `seconds` at the latest."""
        time.sleep(seconds)

    def stage(self) -> str:
        """What is waited for, in words ("loading code-smart"), "" for nothing worth saying."""
        return ""

    def prompt_read(self) -> float:
        """The share of the prompt that has been read, 0.0 where that is not known."""
        return 0.0

    def asks(self, target: str, body: Sequence[bytes]) -> None:
        """What is about to be asked, kept while its answer streams where it may be parked."""
        size = sum(map(len, body))
        if self.bay is not None and self.bay.wants(size):
            self._target, self._body = target, b"".join(body)
            self.bay.make_findable(self._body)

    def answered(self, outcome: Outcome) -> None:
        """How that ended."""
        if self.bay is not None and outcome.state == "done":
            self.bay.note(self._target, self._body, outcome.counts)

    def end(self) -> None:
        """Give the place back; once, whatever has happened."""


def _end_when_silent(sock: socket.socket) -> None:
    """A network that goes away says nothing: notice within 20 s instead of a quarter of an hour.

    USER_TIMEOUT (Linux, ms) is for what has been sent; with less than the probes' own time it would
    end a silent connection on the first probe that is lost. TCP_KEEPALIVE is a Mac's KEEPIDLE.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPALIVE", 5), ("TCP_KEEPINTVL", 5),
                        ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 20_000)):
        try:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        except OSError:                         # named, and not known to this kernel
            pass


class Host(Upstream):
    """A host of hosted tiers that the router asks itself, and whether it can be reached."""

    timeout_s = 2.0                             # a silent address gives way to the name's next

    def __init__(self, host: str, port: int, prefix: str, tls: bool, log: Log,
                 clock: Callable[[], float]) -> None:
        super().__init__(host, port, prefix, tls)
        self.offline = ""                       # why no connection comes about, "" while one does
        self.since = 0.0
        self._log, self._clock = log, clock
        self._lock = threading.Lock()
        self._probe_at = self._wait_s = 0.0
        self._probing = False

    def connect(self, client: Optional[Client] = None) -> socket.socket:
        """As Upstream's, but ends within HOST_CONNECT_S, a slow resolver and TLS included.

        Errors: OSError; ClientGone, when the client goes meanwhile.
        """
        # The first in it is the result: a connection, or that nobody waits for one any more. A list
        # is appended to in one step, so of two threads one is the first.
        got: List[Union[socket.socket, OSError]] = []
        done = threading.Event()

        def dial() -> None:
            result = self._dial()
            got.append(result)
            done.set()
            if got[0] is not result and isinstance(result, socket.socket):
                result.close()                  # too late

        # A thread of its own: nothing ends a resolver that is slow.
        threading.Thread(target=dial, name="dial", daemon=True).start()
        end_s = time.monotonic() + HOST_CONNECT_S
        gone = False
        while not done.wait(PATIENCE_MS / 1000):
            gone = client is not None and client.gone()
            if gone or time.monotonic() > end_s:
                break
        got.append(socket.timeout())
        result = got[0]
        if gone:
            if isinstance(result, socket.socket):
                result.close()
            raise ClientGone
        if isinstance(result, OSError):
            self._mark_lost(_why_unreachable(result))
            raise result
        if self.offline:
            self._mark_found()
        return result

    def _dial(self) -> Union[socket.socket, OSError]:
        try:
            sock = super().connect()
            _end_when_silent(sock)
            return sock
        except OSError as exc:
            return exc
        except UnicodeError as exc:             # a label of the name is too long
            return OSError(str(exc))

    def _mark_lost(self, why: str, again: bool = False) -> None:
        with self._lock:
            first = not self.offline
            if again:                           # a probe has failed: the next is further away
                self._wait_s = min(self._wait_s * 2, MAX_PROBE_S)
            elif first:
                self._wait_s = PROBE_S
            if first or again:
                self._probe_at = self._clock() + self._wait_s
            if first:
                self.since = self._clock()
            self.offline = why
        # Once, not for each request that finds out: the log is not to be filled by a lost network.
        if first:
            self.forget()                       # its kept connections lead nowhere, too
            self._log.warning(f"offline: no connection to {self.url} ({why});"
                              " auto runs locally meanwhile")

    def _mark_found(self) -> None:
        with self._lock:
            was, self.offline = self.offline, ""
        if was:
            gone_s = self._clock() - self.since
            self._log.info(f"back: {self.url} can be reached again, after {gone_s:,.0f} s")

    def why(self) -> str:
        gone_s = self._clock() - self.since
        return f"no connection to {self.url} for {gone_s:,.0f} s ({self.offline})"

    def look_again(self) -> None:
        """While unreachable, try the connection alone, without a request or the key."""
        with self._lock:
            is_time = self._clock() >= self._probe_at
            if not self.offline or self._probing or not is_time:
                return
            self._probing = True
        threading.Thread(target=self._probe, name="probe", daemon=True).start()

    def _probe(self) -> None:
        result = self._dial()
        if isinstance(result, OSError):
            self._mark_lost(_why_unreachable(result), again=True)
        else:
            result.close()
            self._mark_found()
        self._probing = False


class Waiting:
    """What a client that asked for a stream is told while its model gets ready."""

    GRACE_S = 0.15                              # a start that fails at once is a plain error

    def __init__(self, client: Client, path: str, stream: bool, stage: Callable[[], str],
                 mode: str = "visible", extra: Optional[Callable[[], bytes]] = None) -> None:
        self._client, self._extra = client, extra
        self._stage = stage                     # says what is waited for
        self._silent = not stream or mode == "off"
        chats = path == "/v1/chat/completions"
        self._visible = chats and mode == "visible"
        self._began_s = time.monotonic()
        self._next_s = self.GRACE_S             # of the next message, after the beginning
        self.ready_s = 0.0                      # how long it took until its model was ready

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._began_s

    def tell(self) -> None:
        """Say what is waited for, when it is time to. Errors: ClientGone.

        At once, then every 2 s, and ever more seldom: 96 messages in an hour, for some clients give
        up after a few hundred lines without an event.
        """
        waited_s = self.waited_s
        if self._silent or waited_s < self._next_s:
            return
        every_s = max(WAITING_EVERY_S, waited_s / 10)
        self._next_s = waited_s + min(every_s, 60)
        what = self._stage()
        if not what:
            return
        client = self._client
        if not client.opened:                   # from now on, an error can only be an event
            client.open_stream(self._extra() if self._extra else b"")
        words = f"{what}, {waited_s:.0f} s"
        if self._visible:
            client.send_event(waiting_event(words))
        else:                                   # a blank line behind it ends some clients' parsing
            client.send_event(f": {words}\n".encode())


def ask_lease(client: Client, request: Request, lease: Lease, target: str, body: List[bytes],
              terms: Terms, waiting: Waiting) -> Outcome:
    """Wait for a lease, relay over it and give it back. Errors: ClientGone."""
    try:
        while not lease.ready():
            lease.wait(PATIENCE_MS / 1000)
            if client.gone():
                raise ClientGone
            if 0 < terms.patience_s < waiting.waited_s:
                return Outcome("unreachable", 0, "busy")
            waiting.tell()
        # A server may be ready and busy: it takes the request, and lets it wait for a slot.
        if terms.patience_s:
            left_s = max(terms.patience_s - waiting.waited_s, PATIENCE_MS / 1000)
            terms = terms._replace(first_byte_s=left_s)
        waiting.ready_s = waiting.waited_s
        upstream = lease.upstream
        # It was ready, and has died since.
        if upstream is None:
            return Outcome("unreachable", 0, "its server has just ended")
        lease.asks(target, body)
        outcome = relay(client, request, upstream, target, body, terms)
        lease.answered(outcome)
        return outcome
    except LoadError as exc:
        return Outcome("failed", 500, str(exc))
    finally:
        lease.end()


def reply_failure(client: Client, status: int, message: str, kind: str = "upstream_error",
                  extra: bytes = b"") -> None:
    """Say that a request has failed: once, as an answer or within a stream that has begun."""
    if not client.opened:
        # Without it, clients' libraries ask again within a second, when nothing has changed here.
        if status >= 500:
            extra += b"Retry-After: 5\r\n"
        client.reply_error(status, message, kind, extra)
        return
    client.keep_alive = False                   # no clean end
    client.send_event(client.error_event(message, kind))


def said_error(text: str) -> str:
    """The message in an upstream's error, a JSON body or an event; else the text itself, short."""
    found = re.search(r'"message"\s*:\s*("(?:[^"\\]|\\.)*")', text)
    if found:
        try:
            return str(json.loads(found.group(1)))
        except ValueError:
            pass
    return text.strip()[:400]


def tell_failure(client: Client, log: Log, what: str, outcome: Outcome, nobody: str,
                 remedy: str = "", extra: bytes = b"") -> None:
    """Say in the log, and to the client where no answer has reached it, how a request has failed.

    `what` names the request, `nobody` says who did not answer.
    """
    detail = outcome.detail
    if outcome.state == "broken":
        log.warning(f"{what}: the upstream broke off its answer: {detail}")
    elif outcome.state == "failed":
        log.warning(f"{what}: {detail}")
        reply_failure(client, outcome.status, detail, extra=extra)
    elif outcome.state == "rejected":           # the client's to see: nothing here has failed
        reply_failure(client, outcome.status, said_error(detail), extra=extra)
    elif outcome.state == "unreachable":
        message = f"{nobody} ({detail})"
        if remedy:
            message += f"; {remedy}"
        log.warning(f"{what}: {message}")
        reply_failure(client, 502, message, extra=extra)


def check_caller(client: Client, request: Request, loopback: bool, origins: Sequence[str] = (),
                 hosts: Sequence[str] = ()) -> None:
    """Errors: HttpError 403 for what a web page has no business to ask; see refusal()."""
    wrong = refusal(request, loopback, origins, hosts)
    if wrong:
        # Else the answer would say that this page may read it.
        client.origin = b""
        raise HttpError(403, wrong, "forbidden")


def reply_preflight(client: Client, request: Request) -> None:
    """Tell a page that may ask that it may, whatever it is going to ask."""
    # Chromium asks for Private-Network before a public page may reach this machine.
    wanted = request.fields.get(b"access-control-request-headers", b"*")
    client.reply(200, b"", extra=(
        b"Access-Control-Allow-Methods: GET, POST, OPTIONS\r\n"
        b"Access-Control-Allow-Headers: " + wanted + b"\r\n"
        b"Access-Control-Allow-Private-Network: true\r\nAccess-Control-Max-Age: 600\r\n"))


class Behind(App):
    """What stands behind the router, and answers on 10102 itself."""

    address = ""                                # for messages
    remedy = "see its log"                      # ...where it does not answer; see Setting
    page_url = ""                               # of the router's page
    has_others = False                          # it may serve models that models.ini does not name
    loading_state = "visible"                   # how a stream that waits is told so, see Config
    judge: Optional[Callable[[int, str], bool]] = None  # of its errors: see Terms

    @property
    def nobody(self) -> str:
        """Who does not answer, in words."""
        return f"nothing answers behind the router at {self.address}"

    def memory(self) -> Dict[str, Any]:
        """The budget, and what is short, as `status` and `fit` show it; {} where it has none."""
        return {}

    def lease(self, name: str) -> Lease:
        """A place for a request to the tier `name`. Errors: HttpError 404 where there is none."""
        raise NotImplementedError

    def models(self, request: Request) -> Dict[str, Any]:
        """Its /v1/models. Errors: OSError, ValueError, KeyError, TypeError."""
        raise NotImplementedError

    def pace(self, name: str, tokens: int) -> Pace:
        """What is known of a tier with a prompt of so many tokens."""
        return Pace()

    def target(self, name: str, target: str) -> str:
        """Where a tier's own path is asked for, beside those for inference: at its upstream."""
        return target

    def forward(self, client: Client, request: Request, body: bytes) -> None:
        """Answer a request that is not the router's own. Errors: HttpError, ClientGone."""
        raise NotImplementedError

    def relay_over(self, lease: Lease, client: Client, request: Request, body: bytes,
                   stream: bool) -> Outcome:
        """Pass a request on as it is; `stream`: it asks for one. Errors: ClientGone."""
        path = inference_path(request.target)
        client.protocol = path
        waiting = Waiting(client, path, stream, lease.stage, self.loading_state)
        ends = STREAM_ENDS.get(path, ())
        terms = Terms(judge=self.judge, ends=ends, waiting=waiting.tell)
        pieces = [body]
        return ask_lease(client, request, lease, request.target, pieces, terms, waiting)

    def watched(self) -> Dict[str, Any]:
        """What it runs, for who looks on: `models`, a row a name; `parked`, a row a conversation;
        `budget` in bytes; `pressure`, why no more memory is taken now."""
        return {}

    def contexts(self) -> Dict[str, int]:
        """Tier -> tokens that a conversation may have there, as far as its servers have said."""
        return {}

    def start(self) -> None:
        """Bring up what it needs before it is listened for. Errors: UserError."""

    def close_idle(self) -> None:
        """Close connections that nobody has used for a while; called once a second."""

    def close(self) -> None:
        """End what was started for it."""

    def answer(self, client: Client, request: Request) -> None:
        # It listens on 127.0.0.1 alone, so there are no other origins and hosts to allow.
        check_caller(client, request, True)
        if request.method == "OPTIONS":         # a page of this machine asks whether it may
            reply_preflight(client, request)
            return
        body = client.read_body(request)
        self.forward(client, request, body)


def _json_of(request: Request, body: bytes) -> Any:
    """A JSON body, parsed; None for any other."""
    if b"json" not in request.fields.get(b"content-type", b"").lower():
        return None
    try:
        return json.loads(str(body, "utf-8"))
    except (ValueError, RecursionError):
        return None


class UpstreamApp(Behind):
    """One upstream for everything: `serve --upstream`, or llama-swap."""

    has_others = True

    def __init__(self, upstream: Upstream, log: Log) -> None:
        self.upstream, self.log = upstream, log
        self.address = upstream.url

    def close_idle(self) -> None:
        self.upstream.close_idle()

    def lease(self, name: str) -> Lease:
        return Lease(self.upstream)

    def models(self, request: Request) -> Dict[str, Any]:
        keys = b""
        for name, _, line in request.headers:
            if name in (b"authorization", b"x-api-key"):
                keys += line + b"\r\n"
        _, mark, query = request.target.partition("?")
        target = "/v1/models" + mark + query
        response, body = self.upstream.get(target, 3.0, headers=keys)
        listing = json.loads(body)
        if response.status != 200 or not isinstance(listing, dict):
            raise ValueError(response.status)
        return listing

    def forward(self, client: Client, request: Request, body: bytes) -> None:
        name, stream = "", False
        if inference_path(request.target):
            values = _json_of(request, body)
            if isinstance(values, dict):
                name = str(values.get("model"))
                stream = values.get("stream") is True
        if stream:                              # its last bytes are to be read
            request = with_header(request, UNCOMPRESSED)
        outcome = self.relay_over(self.lease(name), client, request, body, stream)
        path, _, _ = request.target.partition("?")
        what = f"{request.method} {path}"
        tell_failure(client, self.log, what, outcome, self.nobody, self.remedy)


# ==================================================================================================
# RECORD
# ==================================================================================================
# logs/decisions.jsonl: a line a request, without a word of its text. `llmstack replay` reads it.


# json.dumps makes an encoder of its own for each line.
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Recorder:
    """Writes the decision record; lines wait for the next flush."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._waiting: Any = collections.deque(maxlen=10_000)
        self._lock = threading.Lock()

    def add(self, row: Mapping[str, Any]) -> None:
        self._waiting.append(row)

    def flush(self) -> None:
        """Write what waits. A full disk loses lines, and stops nothing."""
        if not self._waiting:
            return
        with self._lock:
            rows = [self._waiting.popleft() for _ in range(len(self._waiting))]
            text = "".join(_ENCODE(row) + "\n" for row in rows)
            try:
                if file_size(self._path) > LOG_BYTES:
                    shift_logs(self._path)
                fd = open_log(self._path)
                try:
                    os.write(fd, text.encode("utf-8", "replace"))
                finally:
                    os.close(fd)
            except OSError:
                pass


def record_row(facts: Facts, path: str, tier: str, outcome: Outcome) -> Dict[str, Any]:
    """What the record says of one request: counts, times and names, no text."""
    counts = outcome.counts
    row: Dict[str, Any] = {
        "time": round(time.time(), 3),
        "conversation": "",                     # replay reads no further than the reason
        "path": path,
        "tier": tier,
        "rung": "explicit",
        "tokens": facts.tokens,
        "estimate": facts.full_tokens,
        "truth": counts.prompt,
        "ratio": round(facts.ratio, 3),
        "turns": facts.turns,
        "max_tokens": facts.max_tokens,
        "pictures": facts.pictures,
        "fim": facts.fim,
        "trigger": facts.trigger,
        "cached": counts.cached,
        "output": counts.output,
        "ended": outcome.state,
        "status": outcome.status,
        "first_byte_s": round(outcome.first_byte_s, 3),
    }
    if counts.written_per_s:
        row["per_s"] = round(counts.written_per_s, 1)
    if counts.drafted:
        row.update(drafted=counts.drafted, accepted=counts.accepted)
    if outcome.cost:
        row["cost"] = outcome.cost
    return row


# ==================================================================================================
# EVENTS
# ==================================================================================================
# What those who look on are told: the page, `status --watch` and Prometheus. A request pays for one
# row and a few sums; everything else is asked of its source only while somebody looks. No text of a
# prompt or of an answer comes here.

MAX_LISTENERS = 16                              # each holds a thread
DECISIONS_KEPT = 100
POINTS_KEPT = 1_000                             # of the plots, which show the last hour
SECONDS_BUCKETS = (0.1, 0.5, 2, 10, 60)


Labels = Tuple[str, ...]


class Metric(NamedTuple):
    """A family of /metrics."""

    kind: str                                   # counter | gauge | histogram
    labels: Labels
    help: str


METRICS = {
    "llmstack_requests_total": Metric(
        "counter", ("tier", "rung", "outcome"), "Inference requests that have ended."),
    "llmstack_fallbacks_total": Metric(
        "counter", (), "Times that auto went on to another tier after a failure."),
    "llmstack_tokens_total": Metric(
        "counter", ("tier", "kind"), "Tokens as the servers count them; cached are of the prompt."),
    "llmstack_cost_dollars_total": Metric(
        "counter", ("tier",), "What LiteLLM says that hosted answers have cost."),
    "llmstack_wait_seconds": Metric(
        "histogram", (), "From a request's arrival until its model was ready."),
    "llmstack_first_byte_seconds": Metric(
        "histogram", (), "From the sending of a request to its model until the first byte."),
    "llmstack_loads_total": Metric("counter", ("tier",), "Models loaded."),
    "llmstack_evictions_total": Metric(
        "counter", ("tier",), "Models unloaded to make room for another."),
    "llmstack_memory_bytes": Metric(
        "gauge", ("kind",), "What models may take, and what those that run are counted with."),
    "llmstack_parked_bytes": Metric("gauge", (), "Parked conversations on the disk."),
    "llmstack_tier_loaded": Metric("gauge", ("tier",), "1 where the model is ready."),
    "llmstack_requests_in_flight": Metric("gauge", (), "Inference requests under way."),
    "llmstack_connections": Metric("gauge", (), "Open connections of clients."),
}
IN_MEMORY = ("loaded", "loading", "unloading")  # states of a model whose memory counts
Samples = Dict[Tuple[str, Labels], float]       # (name, values of its labels) -> value


def _sample_line(name: str, labels: Sequence[str], values: Sequence[str], value: float) -> str:
    # No value has a character that would be escaped: names of tiers, and words of ours.
    pairs = [f'{label}="{text}"' for label, text in zip(labels, values)]
    if pairs:
        name += "{" + ",".join(pairs) + "}"
    return f"{name} {value:.12g}"


class _Histogram:
    """How often something has taken so many seconds. Whoever holds a lock adds and reads."""

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS_BUCKETS) + 1)     # the last: longer than all
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        bucket = bisect.bisect_left(SECONDS_BUCKETS, seconds)
        self._counts[bucket] += 1
        self._seconds += seconds

    def lines(self, name: str) -> List[str]:
        lines = []
        total = 0                               # a bucket counts what is in those before it, too
        for limit, count in zip((*SECONDS_BUCKETS, "+Inf"), self._counts):
            total += count
            lines.append(f'{name}_bucket{{le="{limit}"}} {total}')
        lines.append(f"{name}_sum {self._seconds:.12g}")
        lines.append(f"{name}_count {total}")
        return lines


# What /metrics calls them -> what the record does.
_COUNTED_TOKENS = {
    "prompt": "truth",
    "cached": "cached",
    "output": "output",
}


class Counters:
    """The sums behind /metrics. A request pays some microseconds for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: Samples = collections.defaultdict(float)
        # A counter without labels is shown before it has counted anything.
        self._sums["llmstack_fallbacks_total", ()] = 0
        self._histograms = {
            "llmstack_wait_seconds": _Histogram(),
            "llmstack_first_byte_seconds": _Histogram(),
        }


    def count_request(self, row: Mapping[str, Any]) -> None:
        """Count what a row of the decision record says."""
        sums = self._sums
        tier, ended = row["tier"], row["ended"]
        with self._lock:
            sums["llmstack_requests_total", (tier, row["rung"], ended)] += 1
            if "fallbacks" in row:
                sums["llmstack_fallbacks_total", ()] += len(row["fallbacks"])
            for kind, key in _COUNTED_TOKENS.items():
                count = row[key]
                if count:                       # else a tier has a line for what it never does
                    sums["llmstack_tokens_total", (tier, kind)] += count
            if "cost" in row:
                sums["llmstack_cost_dollars_total", (tier,)] += row["cost"]
            self._histograms["llmstack_wait_seconds"].add(row["wait_s"])
            # What was not passed on has no first byte.
            if ended in ("done", "broken"):
                self._histograms["llmstack_first_byte_seconds"].add(row["first_byte_s"])

    def render(self, gauges: Samples) -> str:
        """Prometheus' text format 0.0.4."""
        with self._lock:
            samples = {**self._sums, **gauges}
            timed = {}
            for name, times in self._histograms.items():
                timed[name] = times.lines(name)
        lines = []
        for name, metric in METRICS.items():
            lines.append(f"# HELP {name} {metric.help}")
            lines.append(f"# TYPE {name} {metric.kind}")
            lines += timed.get(name, [])
            for (sample, labels), value in samples.items():
                if sample == name:
                    lines.append(_sample_line(name, metric.labels, labels, value))
        return "\n".join(lines) + "\n"


class Events:
    """What has happened lately, who listens to it, and where else a snapshot comes from."""

    EVERY_S = 0.4                               # between two messages to a listener
    HEARTBEAT_S = 15.0

    def __init__(self) -> None:
        self.counters = Counters()
        self.sources: List[Callable[[], Dict[str, Any]]] = []   # of the parts of a snapshot
        self.hearers: List[Callable[[Mapping[str, Any]], None]] = []    # of every row
        self.rates: Dict[str, float] = {}       # tier -> tokens a second of its last answer
        self.epoch = time.time() - time.monotonic()     # once: a beginning told twice is the same
        self._lock = threading.Lock()           # of all below but the state
        self._salt = os.urandom(16).hex()
        self._start = os.urandom(4).hex()       # part of every id: numbers begin anew with a daemon
        self._number = 0                        # of the last decision
        self._rows: Any = collections.deque(maxlen=DECISIONS_KEPT)
        self._points: Any = collections.deque(maxlen=POINTS_KEPT)
        self._listeners = 0
        self._asking = threading.Lock()         # of the sources: one asks, the others wait
        self._state: Dict[str, Any] = {}        # what they told last...
        self._asked_s = -1e9                    # ...and when that was

    def name_of(self, conversation: str) -> str:
        """What a conversation is called: a hash of its key that nobody can look up."""
        if not conversation:
            return ""
        # hash() differs from process to process, so names of two daemons cannot be matched.
        digest = hash(self._salt + conversation) % 2**48
        return f"{digest:012x}"

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep the row of a request that has ended."""
        self.counters.count_request(row)
        for hear in self.hearers:
            hear(row)
        tier = row["tier"]
        per_s = row.get("per_s", 0.0)
        first_s = 0.0                           # an answer in one piece does not tell
        if row["stream"]:
            first_s = round(row["wait_s"] + row["first_byte_s"], 4)
        with self._lock:
            self._number += 1
            self._rows.append((self._number, row))
            if row["ended"] in ("done", "broken"):
                self._points.append((row["time"], tier, first_s, per_s))
            if per_s:
                self.rates[tier] = per_s

    def state(self) -> Dict[str, Any]:
        """What all sources tell, made once for all who ask within a moment."""
        with self._asking:
            if time.monotonic() - self._asked_s > self.EVERY_S / 2:
                # A new one: listeners compare it with the last, which they hold.
                self._state = {}
                for tell in self.sources:
                    self._state.update(tell())
                self._asked_s = time.monotonic()
            return self._state

    def snapshot(self, after: int = 0) -> Dict[str, Any]:
        """Everything, of the decisions those behind number `after`."""
        now = time.time()
        hour_ago = now - 3600
        with self._lock:
            points = [point for point in self._points if point[0] > hour_ago]
        return {
            **self.state(),
            "now": round(now, 1),
            "start": self._start,
            "points": points,
            "decisions": self._rows_after(after),
        }

    def _rows_after(self, number: int) -> List[Dict[str, Any]]:
        with self._lock:
            numbered = [item for item in self._rows if item[0] > number]
        return [{"number": its, **row} for its, row in numbered]

    def listen(self, client: Client, request: Request) -> None:
        """Answer with the stream until the client leaves. Errors: HttpError 503, ClientGone."""
        with self._lock:
            if self._listeners >= MAX_LISTENERS:
                raise HttpError(503, f"{MAX_LISTENERS} listen already", "server_error")
            self._listeners += 1
        try:
            self._tell(client, request.header(b"last-event-id"))
        finally:
            with self._lock:
                self._listeners -= 1

    def _tell(self, client: Client, last_id: str) -> None:
        """First everything, then what changes. Errors: ClientGone."""
        after = 0
        start, _, number = last_id.partition("-")
        is_ours = start == self._start          # else of an earlier daemon, which counted anew
        if is_ours and re.match("[0-9]{1,15}\\Z", number):
            after = int(number)                 # the client comes back, and has those
        client.open_stream()
        told = self.snapshot(after)
        after = self._send(client, "snapshot", told, after)
        sent_s = time.monotonic()
        while not client.gone():
            time.sleep(self.EVERY_S)
            state = self.state()
            change: Dict[str, Any] = {}
            for key, value in state.items():
                if value != told.get(key):
                    change[key] = value
            rows = self._rows_after(after)
            if rows:
                change["decisions"] = rows
            told = state
            if change:
                after = self._send(client, "change", change, after)
                sent_s = time.monotonic()
            elif time.monotonic() - sent_s > self.HEARTBEAT_S:
                # Proxies end a stream that says nothing for a minute.
                client.send_event(b":\n\n")
                sent_s = time.monotonic()
        raise ClientGone

    def _send(self, client: Client, kind: str, value: Mapping[str, Any], after: int) -> int:
        """Send an event; the number of the last decision that the client then has."""
        rows = value.get("decisions")
        if rows:
            after = rows[-1]["number"]
        # A browser that connects again sends the last id: see _tell.
        lines = f"id: {self._start}-{after}\nevent: {kind}\n"
        lines += f"data: {_ENCODE(value)}\n\n"
        client.send_event(lines.encode())
        return after


class Page(NamedTuple):
    """share/page/index.html as it is served."""

    html: bytes
    headers: bytes                              # lines, each with its CRLF


def read_page() -> Optional[Page]:
    """The page with the policy that lets run its own script and nothing else.

    None where the program has been copied without it.
    """
    import base64
    import hashlib
    try:
        text = read_shared_text("page/index.html")
    except UserError:
        return None
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; connect-src 'self'"
    policy += "; img-src data:; require-trusted-types-for 'script'"
    for element in ("script", "style"):
        _, _, rest = text.partition(f"<{element}>")
        inside, _, _ = rest.partition(f"</{element}>")
        digest = hashlib.sha256(inside.encode()).digest()
        policy += f"; {element}-src 'sha256-{base64.b64encode(digest).decode()}'"
    # The page says its policy itself, too; frame-ancestors counts in a header alone.
    text = text.replace("CONTENT_SECURITY_POLICY", policy)
    headers = (
        f"Content-Security-Policy: {policy}; frame-ancestors 'none'\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Referrer-Policy: no-referrer\r\n"
        "Cache-Control: no-cache\r\n"
        "Vary: Accept\r\n"
    )
    return Page(text.encode(), headers.encode())


def may_change(request: Request) -> bool:
    """Whether a request that changes something comes from a program, or from our own page.

    A form of another page can set no header of its own, and names its origin.
    """
    origin = request.header(b"origin")
    if origin:
        _, _, place = origin.partition("://")
        return place == request.header(b"host")
    return b"x-llmstack" in request.fields


# ==================================================================================================
# OLLAMA
# ==================================================================================================
# The API of Ollama for clients that speak no other: its requests become those of OpenAI's API, and
# the answers are turned back on their way, line by line. Shapes: docs/api.md of ollama 0.13.

OLLAMA_VERSION = "0.13.5"                       # what clients that look for a feature find
# These have the same name and meaning in both.
_OLLAMA_OPTIONS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "repeat_penalty",
    "presence_penalty", "frequency_penalty",
)
# What asks a model -> the path of OpenAI's API for it; and the other paths.
_OLLAMA_ASKS = {
    "/api/chat": "/v1/chat/completions",
    "/api/generate": "/v1/chat/completions",
    "/api/embed": "/v1/embeddings",
    "/api/embeddings": "/v1/embeddings",
}
_OLLAMA_PATHS = frozenset({
    *_OLLAMA_ASKS, "/api/version", "/api/tags", "/api/ps", "/api/show", "/api/pull"})
# How a picture begins in base64 -> its kind; all others are PNG.
_PICTURES = {"/9j/": "jpeg", "R0lGO": "gif", "UklGR": "webp"}


def ollama_path(path: str) -> str:
    """The path of Ollama's API that this is, "" for none."""
    path = path.rstrip("/")
    if path not in _OLLAMA_PATHS:
        return ""
    return path


def _list_of(value: object) -> List[Any]:
    """A value that should be a list; [] for any other."""
    if not isinstance(value, list):
        return []
    return value


def _first_choice(value: Mapping[str, Any]) -> Dict[str, Any]:
    choices = _list_of(value.get("choices"))
    if not choices:
        return {}
    return dict_of(choices[0])


def _picture_part(data: object) -> Dict[str, Any]:
    """A picture, in base64, as a part of a message."""
    text = str(data)
    kind = "png"
    for begins, other in _PICTURES.items():
        if text.startswith(begins):
            kind = other
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{text}"}}


def _with_pictures(text: object, images: object) -> object:
    """A message's content: the text alone, or parts with pictures behind it."""
    pictures = [_picture_part(image) for image in _list_of(images)]
    if not pictures:
        return text
    return [{"type": "text", "text": text or ""}, *pictures]


def _openai_call(call: object, number: str) -> Dict[str, Any]:
    """A tool call, under the number that its result is going to name."""
    function = dict_of(dict_of(call).get("function"))
    arguments = function.get("arguments") or {}
    asked = {
        "name": function.get("name"),
        "arguments": json.dumps(arguments, ensure_ascii=False),
    }
    return {"id": number, "type": "function", "function": asked}


def _openai_messages(messages: Iterable[Any]) -> List[Dict[str, Any]]:
    """Ollama's messages as OpenAI's."""
    made: List[Dict[str, Any]] = []
    # Ollama's results come in the order of their calls, OpenAI's name theirs.
    open_calls: List[str] = []
    for message in map(dict_of, messages):
        if not message:
            continue
        role = message.get("role")
        content = _with_pictures(message.get("content"), message.get("images"))
        new = {"role": role, "content": content}
        calls: List[Dict[str, Any]] = []
        for call in _list_of(message.get("tool_calls")):
            number = f"call_{len(made)}_{len(calls)}"
            calls.append(_openai_call(call, number))
        if calls:
            new["tool_calls"] = calls
            open_calls = [call["id"] for call in calls]
        if role == "tool" and open_calls:
            new["tool_call_id"] = open_calls.pop(0)
        if message.get("thinking"):
            new["reasoning_content"] = message["thinking"]
        made.append(new)
    return made


def openai_chat(values: Mapping[str, Any], generate: bool) -> Dict[str, Any]:
    """The body of chat/completions that asks what one of /api/chat or /api/generate asks."""
    ask = values.get
    messages = _list_of(ask("messages"))
    if generate:
        messages = [{"role": "user", "content": ask("prompt"), "images": ask("images")}]
        if ask("system"):
            messages.insert(0, {"role": "system", "content": ask("system")})
    body: Dict[str, Any] = {
        "model": ask("model"),
        "messages": _openai_messages(messages),
        "stream": ask("stream") is not False,   # a stream, unless it says otherwise
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if ask("tools"):
        body["tools"] = ask("tools")
    options = dict_of(ask("options"))
    for key in _OLLAMA_OPTIONS:
        if key in options:
            body[key] = options[key]
    most = options.get("num_predict")
    if isinstance(most, int) and most > 0:      # Ollama has -1 and -2 for no limit
        body["max_tokens"] = most
    shape = ask("format")
    if isinstance(shape, dict):
        schema = {"name": "answer", "schema": shape}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif shape == "json":
        body["response_format"] = {"type": "json_object"}
    think = ask("think")
    if isinstance(think, str):                  # low, medium or high
        body["reasoning_effort"] = think
    elif isinstance(think, bool):
        # Templates ask for it under this name, each for itself.
        body["chat_template_kwargs"] = {"enable_thinking": think}
    return body


def _json_line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


class OllamaAnswer(Translation):
    """An answer of OpenAI's API on its way to a client of Ollama's."""

    content_type = b"application/json"

    def __init__(self, path: str, model: str, stream: bool) -> None:
        self._path = path
        self._model = model
        self._stream = stream
        if stream:
            self.content_type = b"application/x-ndjson"
        self._status = 200
        self._held = bytearray()                # a line that is not whole, or the whole body
        self._calls: Dict[int, Dict[str, str]] = {}
        self._reason: object = "stop"
        self._failed = False
        self._began = time.monotonic()
        self._said = b""                        # where the tokens are counted

    def begin(self, status: int) -> None:
        self._status = status

    def nothing(self) -> bytes:
        """The answer to a request without words."""
        return _json_line({**self._row({}), "done": True, "done_reason": "load"})

    def feed(self, payload: bytes, last: bool = False) -> bytes:
        self._held += payload
        # An error is one object, whatever was asked for.
        has_failed = self._status >= 400
        if self._stream and not has_failed:
            return self._feed_stream(last)
        if not last:
            return b""
        if has_failed:
            text = self._held.decode("utf-8", "replace")
            return _json_line({"error": said_error(text)})
        return self._whole()

    def _feed_stream(self, last: bool) -> bytes:
        *lines, self._held = self._held.split(b"\n")      # the last one is not whole yet
        out = b""
        for line in lines:
            if line.startswith(b"data:"):
                out += self._event(bytes(line[len(b"data:"):]))
        if not last or self._failed:
            return out
        # Ollama's clients take a call whole; here they come in pieces, up to the end.
        if self._calls:
            out += _json_line(self._row({}, self._made_calls()))
        return out + self._end(self._row({}))

    def _event(self, data: bytes) -> bytes:
        """What one event of the stream becomes."""
        value = parse_json_object(data)
        error = value.get("error")
        if error:
            self._failed = True
            message = dict_of(error).get("message") or error
            return _json_line({"error": str(message)})
        if value.get("usage") or value.get("timings"):
            self._said = data
        # The event that counts the tokens has no choice, and comes behind the one with the reason.
        choice = _first_choice(value)
        self._reason = choice.get("finish_reason") or self._reason
        delta = dict_of(choice.get("delta"))
        for call in _list_of(delta.get("tool_calls")):
            self._add_call(call)
        if not delta.get("content") and not delta.get("reasoning_content"):
            return b""
        return _json_line(self._row(delta))

    def _add_call(self, call: object, index: int = 0) -> None:
        """A tool call, or the next piece of one."""
        call = dict_of(call)
        function = dict_of(call.get("function"))
        if isinstance(call.get("index"), int):
            index = call["index"]
        known = self._calls.setdefault(index, {"name": "", "arguments": ""})
        for key in known:
            known[key] += str(function.get(key) or "")

    def _made_calls(self) -> List[Dict[str, Any]]:
        made = []
        for _, call in sorted(self._calls.items()):
            arguments = parse_json_object(call["arguments"].encode())
            made.append({"function": {"name": call["name"], "arguments": arguments}})
        return made

    def _row(self, said: Mapping[str, Any],
             calls: Sequence[Dict[str, Any]] = ()) -> Dict[str, Any]:
        """The line for a message of OpenAI's, or for a piece of one."""
        content = said.get("content") or ""
        more = {}
        if said.get("reasoning_content"):
            more["thinking"] = said["reasoning_content"]
        if calls:
            more["tool_calls"] = calls
        row = {
            "model": self._model,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "done": False,
        }
        if self._path == "/api/generate":
            return {**row, "response": content, **more}
        return {**row, "message": {"role": "assistant", "content": content, **more}}

    def _end(self, row: Mapping[str, Any]) -> bytes:
        """The last line of a stream, or all of an answer that is none. Durations in ns."""
        counts = tokens_said(self._said)
        # Ollama knows these two: OpenAI's tool_calls is a stop, too.
        reason = "stop"
        if self._reason == "length":
            reason = "length"
        # Where a rate is not known, a duration of next to nothing.
        read_tokens = counts.prompt - counts.cached
        read_s = read_tokens / (counts.read_per_s or 1e9)
        written_s = counts.output / (counts.written_per_s or 1e9)
        took_s = time.monotonic() - self._began
        return _json_line({
            **row,
            "done": True,
            "done_reason": reason,
            "total_duration": int(took_s * 1e9),
            "load_duration": 0,
            "prompt_eval_count": counts.prompt,
            "prompt_eval_duration": int(read_s * 1e9),
            "eval_count": counts.output,
            "eval_duration": int(written_s * 1e9),
        })

    def _whole(self) -> bytes:
        """An answer that is no stream."""
        self._said = bytes(self._held)
        value = parse_json_object(self._said)
        if _OLLAMA_ASKS[self._path] == "/v1/embeddings":
            return self._vectors(value)
        choice = _first_choice(value)
        self._reason = choice.get("finish_reason")
        message = dict_of(choice.get("message"))
        for index, call in enumerate(_list_of(message.get("tool_calls"))):
            self._add_call(call, index)
        return self._end(self._row(message, self._made_calls()))

    def _vectors(self, value: Mapping[str, Any]) -> bytes:
        rows = map(dict_of, _list_of(value.get("data")))
        vectors = [row.get("embedding") for row in rows]
        if self._path == "/api/embeddings":     # it has one text, and one vector
            return _json_line({"embedding": next(iter(vectors), [])})
        return _json_line({
            "model": self._model,
            "embeddings": vectors,
            "prompt_eval_count": tokens_said(self._said).prompt,
        })


def ollama_model(entry: Mapping[str, Any]) -> Dict[str, Any]:
    """An entry of /v1/models as Ollama lists a model."""
    import hashlib
    own = dict_of(dict_of(entry.get("meta")).get("llmstack"))
    name = str(entry.get("id"))
    size_gb = float(own.get("size_gb") or 0)
    # Any digest will do: `ollama list` shows the first twelve characters of it.
    digest = hashlib.sha256(name.encode("utf-8", "replace"))
    details = {
        "parent_model": "",
        "format": "gguf",
        "family": "llmstack",
        "families": ["llmstack"],
        "parameter_size": "",
        "quantization_level": str(own.get("quant") or ""),
    }
    return {
        "name": name,
        "model": name,
        "modified_at": "1970-01-01T00:00:00Z",
        "size": int(size_gb * 1e9),
        "digest": digest.hexdigest(),
        "capabilities": entry.get("capabilities") or ["completion"],
        "details": details,
    }


def ollama_show(entry: Mapping[str, Any]) -> Dict[str, Any]:
    """An entry of /v1/models as Ollama describes a model."""
    context = entry.get("context_length") or 0
    model = ollama_model(entry)
    return {
        "modelfile": "",
        "parameters": f"num_ctx {context}",
        "template": "",
        "license": "",
        "model_info": {"general.architecture": "llmstack", "llmstack.context_length": context},
        "details": model["details"],
        "modified_at": model["modified_at"],
        "capabilities": model["capabilities"],
    }


# ==================================================================================================
# ROUTER
# ==================================================================================================
# Who may ask, which tier answers, and what becomes of it where that fails. RouterApp.answer sorts
# the paths; what is behind it is a Behind with leases, and nothing here knows which engine that is.
#
# RouterApp answers on the threads of its Server's connections; every_second() runs on the main
# thread. What they share is a Snapshot, which is replaced whole, and objects with locks of their
# own (Conversations, Events, Recorder) or dicts of which each step is atomic (Breaker, _ongoing).
#
# An inference request becomes an Asked. One for a tier's name goes to that tier, come what may; one
# for `auto` gets a Decision, and its chain of tiers is asked in turn (Descent), as long as nothing
# has reached the client: judge() says during a try whether another tier may do better, settle()
# behind it whether one is asked. Each try is a lease's (ask_lease), which waits, relays and gives
# the place back. However it ends, _finish tells the client and the log, and _note the record, the
# events and the conversation. The router writes no file but the record and the logs.


class Breaker:
    """Tiers that failed a moment ago, and until when they are left alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._down: Dict[str, Tuple[float, str]] = {}
        # Failures in a row, of hosted tiers.
        self._strikes: Dict[str, int] = collections.defaultdict(int)

    def trip(self, tier: str, reason: str, seconds: float = 0.0, growing: bool = False) -> None:
        """Leave a tier alone; with `growing`, twice as long with each failure upon the last."""
        now = self._clock()
        until, _ = self._down.get(tier, (0.0, ""))
        # Requests that were under way together are one failure, not one each.
        if growing and until <= now:
            self._strikes[tier] += 1
        if not seconds:
            doubled = max(self._strikes[tier] - 1, 0)
            doubled = min(doubled, 8)           # a thousand would be too much for a float
            seconds = BREAKER_S * 2 ** doubled
        until = now + min(seconds, MAX_BREAKER_S)
        self._down[tier] = (until, reason)

    def answered(self, tier: str) -> None:
        """It works: nothing is held against it any more."""
        self._strikes.pop(tier, None)
        self._down.pop(tier, None)

    def down(self) -> Dict[str, str]:
        """Tier -> reason, those still left alone."""
        if not self._down:
            return {}
        now = self._clock()
        left_alone = {}
        for tier, (until, reason) in list(self._down.items()):
            if until > now:
                left_alone[tier] = reason
            else:
                self._down.pop(tier, None)
        return left_alone


# Two keys name a conversation: its client's, by which the ratio of its tokens is learned, and its
# thread, by which a turn finds the one before it. See conversation_keys().


class Conversation(NamedTuple):
    """What answers have told of one conversation."""

    ratio: float = 0.0                          # true tokens per estimated one, 0: not known yet
    tier: str = ""                              # that answered last
    held: Mapping[str, int] = {}                # tier -> tokens that it has read and written of it
    segments: Segments = ()                     # of the prompt answered last


NEW_CONVERSATION = Conversation()


class Conversations:
    """The last conversations, by key, the oldest forgotten first."""

    def __init__(self, most: int = 512) -> None:
        self._most = most
        self._known: Any = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Conversation:
        with self._lock:
            found: Conversation = self._known.get(key, NEW_CONVERSATION)
            return found

    def learn(self, key: str, estimate: int, truth: int) -> None:
        """Keep what an answer or a refusal said a prompt's tokens really are."""
        if estimate > 0 and truth >= WORTH_LEARNING_TOKENS:
            # A server that counts nonsense shall not send everything to the largest tier.
            ratio = max(truth / estimate, 0.1)
            ratio = min(ratio, 10.0)
            self._keep(key, ratio=ratio)

    def answered(self, key: str, tier: str, tokens: int, segments: Segments) -> None:
        """Keep which tier has answered a prompt, and what it holds of it now."""
        if key:
            known = self.get(key)
            held = {**known.held, tier: tokens}     # other tiers hold what they held
            self._keep(key, tier=tier, held=held, segments=segments)

    def _keep(self, key: str, **fields: Any) -> None:
        with self._lock:
            known: Conversation = self._known.pop(key, NEW_CONVERSATION)
            self._known[key] = known._replace(**fields)
            while len(self._known) > self._most:
                self._known.popitem(last=False)


class Snapshot(NamedTuple):
    """A configuration and all that follows from it; a reload puts a new one in its place."""

    config: Config
    routes: Mapping[str, Route]                 # by name and alias
    hosts: Mapping[str, Host]                   # by base_url
    barred: Mapping[str, str]                   # tiers that cannot answer, with the reason
    asked: Config                               # as it was read: `config` has the contexts served
    served: Mapping[str, int]                   # by tier, tokens
    names: Tuple[str, ...]                      # patterns for this machine's own

    def offline(self) -> Dict[str, str]:
        """Tiers whose host cannot be reached, with the reason."""
        found = {}
        for route in self.routes.values():
            host = route.host
            if host is not None and host.offline:
                found[route.tier.name] = host.why()
        return found

    def state(self, failing: Mapping[str, str]) -> Dict[str, Dict[str, str]]:
        """Hosted tiers and those left alone -> state and reason, for `status`; no secrets."""
        found = {}
        for route in self.routes.values():
            if route.hosted:
                found[route.tier.name] = {"state": "available", "reason": ""}
        # What stands further down counts for more.
        reasons = {
            "failing": failing,
            "offline": self.offline(),
            "not served": self.barred,
        }
        for state, tiers in reasons.items():
            for name, why in tiers.items():
                found[name] = {"state": state, "reason": why}
        for route in self.routes.values():
            status, why, _ = route.refused
            if status == 403:
                found[route.tier.name] = {"state": "local_only", "reason": why}
            elif status:
                found[route.tier.name] = {"state": "no credential", "reason": why}
        return found


_MODELS_PATH = re.compile(r"/+(?:v1/+)*models/*(?:(?<=/)(.+))?\Z")   # the list, or one's entry
# What asking for a list of models, and looking into it, may raise.
_NO_LISTING = (OSError, ValueError, KeyError, TypeError, RecursionError)
# Headers that a host does not get: who the client is, and what is between it and us.
_OF_THE_CLIENT = frozenset({
    b"authorization",
    b"x-api-key",
    b"api-key",
    b"x-goog-api-key",
    b"openai-organization",
    b"openai-project",
    b"cookie",
    b"origin",
    b"referer",
    b"accept-encoding",
    b"connection",
})


def host_of(url: str, log: Log, clock: Callable[[], float]) -> Host:
    """The host that a tier's base_url names. Errors: UserError."""
    plain = parse_upstream(url)
    return Host(
        host=plain.host,
        port=plain.port,
        prefix=plain.prefix,
        tls=url.startswith("https:"),
        log=log,
        clock=clock,
    )


def to_host(route: Route, host: Host, env: Mapping[str, str]) -> Route:
    """The route of a direct host's tier, with the host's key."""
    variable = route.tier.api_key_env
    headers: Tuple[Header, ...] = ()
    if variable:
        key = env.get(variable, "").strip()
        value = b"Bearer " + key.encode("ascii", "ignore")
        header = (b"authorization", value, b"Authorization: " + value)
        headers = (header,)
    # Such a host has a version in its URL (/v1beta, /v4), and wants no /v1 behind that.
    bare = re.search(r"/v[0-9]+[a-z0-9]*(?:/|\Z)", host.prefix) is not None
    return route._replace(host=host, headers=headers, bare=bare)


def host_request(request: Request, route: Route, target: str) -> Tuple[Request, str]:
    """A client's request and its target as a host gets them: no credentials but the host's own.

    Nothing compressed is asked for: the relay reads the end of a stream.
    """
    drop = _OF_THE_CLIENT | request.words
    kept = without_headers(request, drop).headers
    headers = (*kept, *route.headers, UNCOMPRESSED)
    request = request._replace(headers=headers)
    if route.bare and target.startswith("/v1/"):
        target = target[3:]
    return request, target


def read_decoded(client: Client, request: Request) -> Tuple[Request, bytes]:
    """A request and its body, without a coding and the mark that some editors put before JSON.

    Errors: HttpError 400, 408, 413, 415; ClientGone.
    """
    body = client.read_body(request)
    # Decoded here: what is inside decides, and no model's server decodes it.
    if b"content-encoding" in request.fields:
        body = decoded_body(request.header(b"content-encoding"), body)
        request = without_headers(request, (b"content-encoding",))
    if body.startswith(b"\xef\xbb\xbf{"):
        body = body[3:]
    return request, body


def read_json(body: bytes) -> Any:
    """The JSON in a request's body. Errors: HttpError 400."""
    try:
        return parse_json(str(body, "utf-8"))
    except (ValueError, RecursionError) as exc:
        raise HttpError(400, f"the body is not JSON: {exc}") from None


def read_object(body: bytes) -> Dict[str, Any]:
    """The JSON object in a request's body. Errors: HttpError 400."""
    values = read_json(body)
    if not isinstance(values, dict):
        raise HttpError(400, "the body is not a JSON object")
    return values


def _asked_in(target: str) -> str:
    """The model that a target's query names, "" for none."""
    query = target.partition("?")[2]
    if "model=" not in query:
        return ""
    from urllib.parse import parse_qs
    first, *_ = parse_qs(query).get("model", [""])
    return first


def values_in(request: Request, body: bytes) -> Tuple[Dict[str, Any], Optional[Tuple[int, int]]]:
    """What a body says, and where its model's name stands in it; None where that is JSON.

    Of any other body the model alone is read, from a form or beside it in the query.
    """
    values = _json_of(request, body)
    if isinstance(values, dict):
        return values, None
    start, end = form_model(request.header(b"content-type"), body)
    in_form = str(body[start:end], "utf-8", "replace")
    model = in_form.strip() or _asked_in(request.target)
    return {"model": model}, (start, end)


_AS_JSON = (b"content-type", b"application/json", b"Content-Type: application/json")


class Asked:
    """An inference request, read, and how far it is. Its body goes once an answer has begun."""

    tier = ""                                   # that is asked now
    lease = Lease()                             # its place there; this one until it has one
    wait_s = 0.0                                # until its models were ready, of all tiers tried
    load_s = 0.0                                # of that, while they were loading
    translation: Optional[Translation] = None
    patience_s = 0.0                            # how long its first tier may keep it waiting
    place: Optional[Tuple[int, int]] = None     # of the model's name; None: find it in JSON
    known = NEW_CONVERSATION                    # by the answers to its earlier turns
    segments: Segments = ()                     # of its prompt, once its answer has begun
    estimate = 0                                # its tokens by class_tokens, 0: not asked yet
    is_long = False                             # enough for its answer to teach a ratio
    loop = False                                # it brings back what a tool has said
    leaving = STAYS

    def __init__(self, client: Client, request: Request, path: str, target: str, body: bytes,
                 values: Dict[str, Any]) -> None:
        self.client = client
        self.request = request
        self.path = path                        # canonical
        self.target = target                    # that with the query
        self.body = body
        self.values = values                    # of the body
        self.began_s = time.monotonic()
        self.model = values.get("model")
        self.stream = values.get("stream") is True
        self.conversation, self.thread = conversation_keys(request.fields, values)
        self.texts: List[str] = []              # of its prompt, until they are estimated

    def age_s(self) -> float:
        return time.monotonic() - self.began_s

    def estimated(self) -> int:
        """The prompt's tokens by class_tokens, which its answer's are compared with; 0: too few."""
        if self.is_long and not self.estimate:
            self.estimate = class_tokens(self.texts)
        return self.estimate

    def body_for(self, route: Route, name: str) -> List[bytes]:
        """The body as the tier of a route gets it, `name` for its model where that is one."""
        body = self.body
        if self.place is None:
            return route_body(body, self.values, route, self.path, name)
        start, end = self.place
        if not name or not end:
            return [body]
        return [body[:start], name.encode(), body[end:]]

    def release(self) -> None:
        """Let go of the body: 200 streams of 200 kB prompts would hold a hundred megabytes.

        What its answer and the next turn are compared with stays: an estimate and digests.
        """
        self.estimated()
        if self.thread:
            self.segments = prompt_segments(self.values)
        self.body = b""
        self.values = {}
        self.texts = []

    def row(self, number: int) -> Dict[str, Any]:
        """Its row of /llmstack/requests. Nothing of its text is in it."""
        return {
            "id": number,
            "model": str(self.model or "auto"),
            "tier": self.tier,
            "path": self.path,
            "stream": self.stream,
            "stage": self._stage(),
            "since_s": round(self.age_s(), 1),
        }

    def _stage(self) -> str:
        """What it waits for, in words."""
        stage = self.lease.stage()
        if stage:
            return stage
        if not self.body:                       # let go of when the answer begins
            return "writing"
        return "reading the prompt" + percent_words(self.lease.prompt_read())


def read_asked(client: Client, request: Request, path: str, target: str) -> Asked:
    """Read an inference request. Errors: HttpError, ClientGone."""
    request, body = read_decoded(client, request)
    values = read_object(body)
    content_type = request.fields.get(b"content-type", b"")
    if b"json" not in content_type.lower():     # curl -d says it is a form
        request = with_header(request, _AS_JSON)
    if values.get("stream") is True:
        request = with_header(request, UNCOMPRESSED)
    return Asked(client, request, path, target, body, values)


def unknown_model(config: Config, model: object) -> HttpError:
    """The 404 for a name that no model has: what was probably meant, and what there is."""
    names = ["auto"]
    aliases: List[str] = []
    for tier in config.offered:
        names.append(tier.name)
        aliases += tier.aliases
    asked = str(model)
    near = _did_you_mean(asked, [*names, *aliases]) or "."
    known = ", ".join(names)
    what = f"there is no model {asked[:200]!r}{near} The models here are {known}"
    return HttpError(404, what, "not_found")


def decision_headers(decision: Decision, tier: str, fallbacks: Sequence[str],
                     reason: str = "") -> bytes:
    """The X-LLMStack-* lines of an answer; `reason` where it has been made already."""
    reason = reason or decision.reason
    lines = (f"X-LLMStack-Model: {tier}\r\nX-LLMStack-Tokens: {decision.tokens}\r\n"
             f"X-LLMStack-Reason: {reason}\r\n")
    facts = decision.facts
    if facts.classes:                           # the bounds did not decide: which number did
        lines += f"X-LLMStack-Needs: {facts.full_tokens} ({facts.source})\r\n"
    if fallbacks:
        lines += f"X-LLMStack-Fallback: {', '.join(fallbacks)}\r\n"
    return lines.encode("utf-8")


def leaving_header(leaving: Leaving, tier: str) -> bytes:
    """The line that says what it costs to go on elsewhere; b"" for a conversation that stays."""
    if leaving.tier in ("", tier):
        return b""
    return f"X-LLMStack-Switch: {leaving.words(tier)}\r\n".encode()


class Descent:
    """The way of one `auto` request down the ladder, as its tiers fail."""

    def __init__(self, asked: Asked, decision: Decision, snapshot: Snapshot, breaker: Breaker,
                 conversations: Conversations) -> None:
        self.asked = asked
        self.decision = decision
        self._routes = snapshot.routes          # the same for all tries: a reload may come between
        self._breaker = breaker
        self._conversations = conversations
        self.tier, *self._left = decision.chain
        self.route = self._routes[self.tier.name]
        # A prompt's true size may bring back tiers that the estimate has left out of the chain.
        self._tried = {self.tier.name}
        self._own_fault = False                 # the last error was the request's, not the tier's
        self.fallbacks: List[str] = []
        self._reason = ""

    @property
    def reason(self) -> str:
        """Why the first tier; put into words once, for headers, log and record."""
        self._reason = self._reason or self.decision.reason
        return self._reason

    def prefer(self, tiers: Sequence[Tier]) -> None:
        """Ask these before the others, once the first has had its chance."""
        others = [tier for tier in self._left if tier not in tiers]
        self._left = [*tiers, *others]

    def headers(self) -> bytes:
        """The lines that an answer of the present tier gets, made while the model is at work."""
        name = self.tier.name
        lines = decision_headers(self.decision, name, self.fallbacks, self.reason)
        return lines + leaving_header(self.asked.leaving, name)

    def judge(self, status: int, text: str) -> bool:
        """Whether an error is to be answered by another tier; whose fault it was is kept."""
        need = prompt_tokens_said(status, text)
        own = need > 0 or own_fault(status, text)
        self._own_fault = own
        # Too long: to a tier that holds it. A picture: to one that takes it. Any other fault of the
        # request's own would be the next tier's answer, too.
        if need:
            asked = self.asked
            self._conversations.learn(asked.conversation, asked.estimated(), need)
            self._left = self._holding(need)
        elif own and pictures_refused(text):
            self._left = [tier for tier in self._left if tier.takes_pictures]
        elif own or not falls_through(status, self.route.hosted):
            self._left = []
        return len(self._left) > 0

    def _holding(self, tokens: int) -> List[Tier]:
        """The tiers not tried yet that hold a prompt of so many tokens, nearest first."""
        decision = self.decision
        holds = []
        for tier in decision.preference:
            if tier.name in self._tried:
                continue
            needed = tokens + output_reserve(decision.facts, tier)
            if needed <= tier.ctx_size:
                holds.append(tier)
        up = [tier for tier in holds if tier.name not in decision.down]
        return up or holds[:1]

    def settle(self, outcome: Outcome) -> bool:
        """Tell the breaker how the try ended; True when the next tier is to be asked."""
        self._tell_breaker(outcome)
        failed = outcome.state in ("rejected", "unreachable", "failed")
        if not failed or not self._left:
            return False
        last = self.tier.name
        self.tier = self._left.pop(0)
        name = self.tier.name
        self.route = self._routes[name]
        why = outcome.status or outcome.detail
        self.fallbacks.append(f"{last}\u2192{name} ({why})")
        self._tried.add(name)
        self._own_fault = False
        return True

    def _tell_breaker(self, outcome: Outcome) -> None:
        """Hold a failure against the tier, or forget what was held."""
        breaker = self._breaker
        name = self.tier.name
        if outcome.answered:
            breaker.answered(name)
            return
        host = self.route.host
        hosted = self.route.hosted
        if outcome.state == "broken":
            breaker.trip(name, "broke off its answer a moment ago", growing=hosted)
        elif outcome.state == "failed":         # its first line: the tail of a log is behind it
            why, *_ = outcome.detail.splitlines()
            breaker.trip(name, why, FAILED_LOAD_S)
        elif outcome.state == "unreachable":
            # A host that is offline says so itself. And a tier of the engine, whose server has
            # just ended or was not waited for longer, is loaded again by the next request.
            if host is not None and not host.offline:       # it took the connection
                breaker.trip(name, outcome.detail, growing=True)
        elif self._own_fault or not falls_through(outcome.status, hosted):
            if hosted:                          # it works: the request is at fault
                breaker.answered(name)
        else:
            why = f"answered {outcome.status} a moment ago"
            breaker.trip(name, why, outcome.retry_after_s, growing=hosted)


_ACTION = re.compile(r"/llmstack/(?:(?:load|unload)/[^/]{1,200}|requests/[0-9]{1,15}/stop)\Z")


class Setting(NamedTuple):
    """What a router is told of the process that it runs in."""

    loopback: bool = True                       # only this machine can reach it
    key: str = ""                               # that its clients must know, "" for none
    models_ini: str = ""                        # the path of the file that it serves...
    bundled: bytes = b""                        # ...and what it serves where that is not there
    reload: Optional[Callable[[], Config]] = None       # reads that file again. Errors: UserError
    # Tier -> why nobody does.
    unserved: Callable[[Config], Mapping[str, str]] = lambda config: {}
    foreign_logs: Sequence[str] = ()            # of other programs, to be rotated
    remedy: str = "run `llmstack start`"        # where nothing answers behind it
    env: Mapping[str, str] = {}
    record: Optional[Recorder] = None
    clock: Callable[[], float] = time.monotonic


def leaving_of(known: Conversation, decision: Decision, behind: Behind) -> Leaving:
    """What a decision leaves behind on the tier of its conversation's last turn."""
    old = known.tier
    new = decision.tier
    tokens = known.held.get(old, 0)
    # Infill is no part of what is said: its conversation goes on where it was.
    if not tokens or decision.rung == "fim" or old == new:
        return STAYS
    needed = decision.facts.full_tokens
    old_pace = behind.pace(old, needed)
    new_pace = behind.pace(new, needed)
    held_there = min(known.held.get(new, 0), needed)
    cost_s = leaving_cost(needed, old_pace, tokens, new_pace, held_there)
    return Leaving(old, tokens, cost_s)


def compare_turns(asked: Asked, row: Dict[str, Any]) -> None:
    """Put into a request's row what its conversation's last turn has left of the cache."""
    known = asked.known
    tier = row["tier"]
    before = known.segments
    now = asked.segments
    if len(now) > len(before) > 0:              # as many messages or fewer: it began anew
        share, where = same_beginning(before, now)
        row["same"] = round(share, 3)
        row["differs"] = where
        row["held"] = known.held.get(tier, 0)
        row["client"] = client_named(asked.request.fields)
    if known.tier not in ("", tier):
        row["left"] = {
            "tier": known.tier,
            "tokens": known.held[known.tier],
            "cost_s": round(asked.leaving.cost_s, 1),
        }


def key_headers(request: Request, key: str) -> FrozenSet[bytes]:
    """The headers that carry the router's key, which no upstream gets. Errors: HttpError 401."""
    import hmac
    offered = {b"x-api-key": request.header(b"x-api-key")}
    scheme, _, token = request.header(b"authorization").partition(" ")
    if scheme.lower() == "bearer":
        offered[b"authorization"] = token.strip()
    ours = []
    for name, value in offered.items():
        # compare_digest takes as long for a wrong key, however much of it is right.
        if hmac.compare_digest(value.encode("latin-1"), key.encode()):
            ours.append(name)
    if not ours:
        raise HttpError(401, "this router wants its LLMSTACK_API_KEY, as a Bearer token or"
                             " x-api-key", "authentication_error")
    return frozenset(ours)


def models_ini_bytes(path: str, bundled: bytes) -> bytes:
    """models.ini as it is on the disk now, or as bundled. Errors: HttpError 404."""
    try:
        text = read_regular(path, MAX_INI_BYTES)
    except OSError:
        if not bundled:
            raise HttpError(404, f"there is no {path} any more; run `llmstack start` in its project"
                                 " to seed one", "not_found") from None
        text = bundled
    # A user may have written one there since; the daemon runs on what it has read before.
    if holds_secret(text.decode("utf-8", "replace")):
        raise HttpError(404, "models.ini holds what looks like a key and is not served;"
                             " `llmstack reload` names the line", "not_found")
    return text


class RouterApp(App):
    """127.0.0.1:10101: decides for `auto`, asks tiers by name, passes everything else through."""

    def __init__(self, config: Config, behind: Behind, log: Log,
                 setting: Optional[Setting] = None) -> None:
        given = setting or Setting()
        behind.remedy = given.remedy
        self.log = log
        self.behind = behind
        self._given = given
        self._breaker = Breaker(given.clock)
        self._conversations = Conversations()
        self._ongoing: Dict[int, Asked] = {}    # inference requests under way
        self._number = itertools.count(1)
        self._page = read_page()
        # In a container or an editor, the machine's name may stand for us.
        name = socket.gethostname().lower()
        short, _, _ = name.partition(".")
        in_lan = f"{short}.local"
        self._own_names = (name, in_lan, *CONTAINER_HOSTS)
        self._snapshot = self._adopt(config, {}, {})
        self._started_with = [as_loaded(tier) for tier in config.tiers]
        self._started = time.time()
        self._read_last = self._ini_digest()    # of models.ini, as it was read last
        self.events = Events()
        self.events.sources.append(self.look)
        self._record = given.record
        if self._record:
            self.events.hearers.append(self._record.add)
        self._last_rotation = time.monotonic()
        self._reload_asked = False

    @property
    def config(self) -> Config:
        return self._snapshot.config

    # ---- configuration

    def ask_reload(self) -> None:
        """For the signal handler: it may hold the log's lock, so it only leaves a note."""
        self._reload_asked = True

    def reload(self) -> str:
        """Read models.ini again: routing changes live; why a broken file was refused, "" if not."""
        if self._given.reload is None:
            return "this router reads no models.ini again"
        digest = self._ini_digest()             # before it is read: what changes later is new
        now = self._snapshot
        try:
            config = self._given.reload()
            self._snapshot = self._adopt(config, now.hosts, now.served)
        except UserError as exc:
            self.log.error(f"models.ini refused, the old one stays: {exc}")
            return str(exc)
        self._read_last = digest
        tiers = []
        for tier in config.tiers:
            role = tier.role or "-"
            tiers.append(f"{role}={tier.name}")
        self.log.info(f"models.ini read again: {', '.join(tiers)}")
        return ""

    def _adopt(self, asked: Config, known: Mapping[str, Host],
               served: Mapping[str, int]) -> Snapshot:
        """Work out what a configuration means, once: a request only looks it up."""
        given = self._given
        config = with_served_contexts(asked, served)
        missing = missing_credentials(config, given.env)
        hosts: Dict[str, Host] = {}
        routes: Dict[str, Route] = {}
        for tier in config.tiers:
            route = plan_route(tier, config, missing)
            if tier.backend == "openai":
                url = tier.base_url
                # A host goes on with its connections, and with what it knows of the network.
                host = hosts.get(url) or known.get(url)
                if host is None:
                    host = host_of(url, self.log, given.clock)
                hosts[url] = host
                route = to_host(route, host, given.env)
            for name in tier.names:
                routes[name] = route
        return Snapshot(
            config=config,
            routes=routes,
            hosts=hosts,
            barred={**given.unserved(config), **missing},
            asked=asked,
            served=served,
            names=(*config.allowed_hosts, *self._own_names),
        )

    # ---- housekeeping

    def every_second(self) -> None:
        if self._reload_asked:
            self._reload_asked = False
            self.reload()
        now = self._snapshot
        # A llama-server says what its slots hold, which may be less than models.ini asks for.
        served = self.behind.contexts()
        if served != now.served:                # a model has been loaded for the first time
            self._snapshot = self._adopt(now.asked, now.hosts, served)
        # Hosts are found again without a request that would have to wait for that.
        for host in now.hosts.values():
            host.look_again()
            host.close_idle()
        self.behind.close_idle()
        self.log.flush()
        if self._record:
            self._record.flush()
        if time.monotonic() - self._last_rotation > 30:
            self._last_rotation = time.monotonic()
            self.log.rotate()
            for path in self._given.foreign_logs:
                rotate_foreign_log(path)

    # ---- who may ask, and what

    def answer(self, client: Client, request: Request) -> None:
        path, mark, query = request.target.partition("?")
        method = request.method
        inference = ""
        if method == "POST":
            inference = inference_path(path)
        # From here on, an error has the shape that the path's clients read.
        client.protocol = inference or ollama_path(path)
        given = self._given
        now = self._snapshot
        origins = now.config.allowed_origins
        check_caller(client, request, given.loopback, origins, now.names)
        if method == "OPTIONS" and b"access-control-request-method" in request.fields:
            reply_preflight(client, request)    # without a key, which a browser does not send there
            return
        if path == "/" and method in ("GET", "HEAD"):
            self._front(client, request)        # without the key: the page asks for it
            return
        if given.key:
            ours = key_headers(request, given.key)
            request = without_headers(request, ours)
        if b"origin" in request.fields:         # judged here; what is behind would refuse it
            request = without_headers(request, (b"origin",))
        if inference:
            target = inference + mark + query
            asked = read_asked(client, request, inference, target)
            self._infer(asked)
        elif client.protocol:
            self._answer_ollama(client, request, client.protocol)
        elif not self._answer_ourselves(client, request, path):
            self._pass_through(client, request, path)

    def _answer_ourselves(self, client: Client, request: Request, path: str) -> bool:
        """Answer what the router knows or does itself; False for any other path."""
        if request.method in ("GET", "HEAD"):
            return self._show(client, request, path)
        if request.method != "POST":
            return False
        if _ACTION.match(path):
            self._act(client, request, path)
        elif path == "/llmstack/reload":
            client.read_body(request)
            problem = self.reload()
            answer = {"ok": not problem, "problem": problem}
            client.reply_json(answer, 409 if problem else 200)
        else:
            return False
        return True

    def _show(self, client: Client, request: Request, path: str) -> bool:
        """Answer what can be read here; False for any other path."""
        told: Dict[str, Callable[[], Any]] = {
            "/llmstack/snapshot": self.events.snapshot,
            "/llmstack/state": self.state,
            "/llmstack/memory": self.behind.memory,
            "/llmstack/requests": self.requests,
        }
        models = _MODELS_PATH.match(path)
        if path in told:
            client.reply_json(told[path]())
        elif models:
            name = unquoted(models.group(1) or "")
            self._models(client, request, name)
        elif path == "/llmstack/events" and request.method == "GET":
            self.events.listen(client, request)
        elif request.target == "/metrics":      # with a query it is a model's own
            text = self.events.counters.render(self._gauges())
            client.reply(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif path == "/models.ini":
            ini = models_ini_bytes(self._given.models_ini, self._given.bundled)
            pid = b"X-LLMStack-Pid: %d\r\n" % os.getpid()
            client.reply(200, ini, "text/plain; charset=utf-8", pid)
        else:
            return False
        return True

    def _front(self, client: Client, request: Request) -> None:
        """The page for a browser; for others where the API is."""
        page = self._page
        accepted = request.fields.get(b"accept", b"").lower()
        if page is not None and b"text/html" in accepted:
            client.reply(200, page.html, "text/html; charset=utf-8", page.headers)
            return
        where = {"name": "llmstack", "api": "/v1", "models": "/v1/models"}
        client.reply_json(where, extra=b"Vary: Accept\r\n")

    def _act(self, client: Client, request: Request, path: str) -> None:
        """Load or unload a tier, or end a request. Errors: HttpError, ClientGone."""
        if not may_change(request):
            raise HttpError(403, "what changes something wants an X-LLMStack header, or this"
                                 " router's own Origin", "forbidden")
        client.read_body(request)
        _, _, verb, name, *_ = path.split("/")
        if verb == "requests":
            asked = self._ongoing.get(int(name))
            if asked is None:
                raise HttpError(404, f"no request {name} is under way", "not_found")
            asked.client.give_way()             # it ends as if its client had left
            client.reply_json({"ok": True})
            return
        tier = self.config.by_name(name)
        if tier is None:
            raise HttpError(404, f"there is no tier {name!r}", "not_found")
        if tier.backend != "gguf":
            raise HttpError(400, f"{tier.name} is hosted: there is nothing to {verb}")
        if verb == "unload":
            wanted = request._replace(target=f"/api/models/unload/{tier.name}")
        else:                                   # a request that wants nothing of the model but it
            wanted = request._replace(method="GET", target=f"/upstream/{tier.name}/health")
        self.behind.forward(client, wanted, b"")

    def _pass_through(self, client: Client, request: Request, path: str) -> None:
        """Everything else is for the tier that it names, or for what is behind us."""
        request, body = read_decoded(client, request)
        values, place = values_in(request, body)
        model = values.get("model")
        route: Optional[Route] = None
        in_path = path.startswith("/upstream/")     # the model that it is for
        named = isinstance(model, str) and not is_auto(model)
        if named and not in_path:
            name = self._resolve(request, model)
            route = self._snapshot.routes.get(name)
        if route is None:
            self.behind.forward(client, request, body)
            return
        target = request.target
        if route.host is None:
            target = self.behind.target(route.tier.name, target)
        asked = Asked(client, request, path, target, body, values)
        asked.place = place
        self._ask_named(asked, route)

    def _listing(self, request: Request) -> Dict[str, Any]:
        """The list of what is behind us with `auto` in front; else what models.ini knows."""
        config = self.config
        try:
            listing = self.behind.models(request)
            theirs = [entry for entry in listing["data"] if isinstance(entry, dict)]
        except _NO_LISTING:
            listing = {"object": "list"}
            theirs = [tier_entry(tier) for tier in config.tiers]
        listing["data"] = list_models(config, theirs)
        return listing

    def _models(self, client: Client, request: Request, name: str) -> None:
        """The list of models, or its entry of one name. Errors: HttpError 404."""
        anthropic = b"anthropic-version" in request.fields
        if name:
            answer = self._entry(request, name)
            if anthropic:
                answer = anthropic_model(answer)
        else:
            answer = self._listing(request)
            if anthropic:
                answer = anthropic_models(answer["data"])
        client.reply_json(answer)

    def _entry(self, request: Request, name: str) -> Dict[str, Any]:
        """The list's entry of what a name means, under that name. Errors: HttpError 404."""
        config = self.config
        entries = {}
        for entry in self._listing(request)["data"]:
            entries[str(entry.get("id"))] = entry
        for known in (name, resolve_name(config, name)):
            if known in entries:
                return {**entries[known], "id": name}
        raise unknown_model(config, name)

    def state(self) -> Dict[str, Dict[str, str]]:
        """See Snapshot.state."""
        return self._snapshot.state(self._breaker.down())

    # ---- for those who look on

    def _ini_digest(self) -> str:
        return _digest(_read_bytes(self._given.models_ini))

    def _about(self) -> Dict[str, Any]:
        """The daemon itself, and whether its models.ini has changed since it read it."""
        tiers = [as_loaded(tier) for tier in self._snapshot.asked.tiers]
        unread = self._ini_digest() != self._read_last
        return {
            "version": VERSION,
            "started": round(self._started),
            "changed": unread or tiers != self._started_with,
            "local_only": self.config.local_only,
        }

    def look(self) -> Dict[str, Any]:
        """The router's parts of a snapshot."""
        watched = self.behind.watched()
        models = watched.get("models", {})
        parked = watched.get("parked", [])
        resident = 0
        for row in models.values():
            if row["state"] in IN_MEMORY:
                resident += row.get("bytes", 0)
        memory = {
            "budget": watched.get("budget", 0),
            "resident": resident,
            "parked": sum(row["bytes"] for row in parked),
            "pressure": watched.get("pressure", ""),
        }
        return {
            "about": self._about(),
            "tiers": self._tier_rows(models),
            "memory": memory,
            "parked": parked,
            "requests": self._under_way(),
        }

    def _tier_rows(self, models: Mapping[str, Dict[str, Any]]) -> List[Dict[str, Any]]:
        """A row a tier; those of LiteLLM that can answer are as ready as its proxy is."""
        rows = []
        told = self.state()
        for tier in self.config.tiers:
            name = tier.name
            mark = told.get(name, {"state": "unknown", "reason": ""})
            row = {
                "name": name,
                "role": tier.role,
                "backend": tier.backend,
                "ctx_size": tier.ctx_size,
                "per_s": self.events.rates.get(name, 0.0),
                **mark,
                **models.get(name, {}),         # of what runs, its own word counts
            }
            row["reason"] = row["reason"] or mark["reason"]
            if tier.backend == "litellm" and row["state"] == "available":
                row["state"] = models.get(PROXY, row)["state"]
            is_barred = row["state"] == "not served"
            # What a tier lacks that is not served may be its key alone.
            if is_barred and row["reason"].startswith("missing "):
                row["state"] = "no credential"
            rows.append(row)
        return rows

    def _under_way(self) -> List[Dict[str, Any]]:
        """The requests, with their beginning instead of their age: a row that stays is no news."""
        rows = []
        for number, asked in list(self._ongoing.items()):
            row = asked.row(number)
            del row["since_s"]
            row["began"] = round(asked.began_s + self.events.epoch)
            rows.append(row)
        return rows

    def _gauges(self) -> Samples:
        state = self.events.state()
        memory = state["memory"]
        samples: Samples = {
            ("llmstack_requests_in_flight", ()): len(self._ongoing),
            ("llmstack_connections", ()): self.server.connections(),
            ("llmstack_memory_bytes", ("budget",)): memory["budget"],
            ("llmstack_memory_bytes", ("resident",)): memory["resident"],
            ("llmstack_parked_bytes", ()): memory["parked"],
        }
        for row in state["tiers"]:
            if row["backend"] == "gguf":
                tier = (row["name"],)
                samples["llmstack_tier_loaded", tier] = row["state"] == "loaded"
                samples["llmstack_loads_total", tier] = row.get("loads", 0)
                samples["llmstack_evictions_total", tier] = row.get("evictions", 0)
        return samples

    # ---- Ollama's API

    def _answer_ollama(self, client: Client, request: Request, path: str) -> None:
        """Answer a path of Ollama's API. Errors: HttpError, ClientGone."""
        request, body = read_decoded(client, request)
        if path == "/api/version":
            client.reply_json({"version": OLLAMA_VERSION})
            return
        if path in ("/api/tags", "/api/ps"):
            models = []
            for entry in self._listing(request)["data"]:
                runs = "'loaded'" in str(entry.get("status"))
                if runs or path == "/api/tags":
                    models.append(ollama_model(entry))
            client.reply_json({"models": models})
            return
        values = read_object(body)
        model = values.get("model") or values.get("name")
        if path in _OLLAMA_ASKS:
            values["model"] = model
            self._ask_ollama(client, request, path, values)
            return
        entry = self._entry(request, str(model))
        if path == "/api/show":
            client.reply_json(ollama_show(entry))
        else:                                   # /api/pull: there is nothing to fetch
            client.reply_json({"status": "success"})

    def _ask_ollama(self, client: Client, request: Request, path: str,
                    values: Dict[str, Any]) -> None:
        """Ask a model what a request of Ollama's API asks. Errors: HttpError, ClientGone."""
        target = _OLLAMA_ASKS[path]
        chats = target != "/v1/embeddings"
        if chats:
            asks = openai_chat(values, path == "/api/generate")
        else:
            texts = values.get("input", values.get("prompt"))
            asks = {"model": values["model"], "input": texts}
        translation = OllamaAnswer(
            path,
            str(values["model"] or "auto"),
            asks.get("stream", False),
        )
        says = values.get("prompt") or values.get("messages")
        if chats and not says:
            # `ollama run` asks for nothing to have the model loaded; its first words do that here.
            content_type = translation.content_type.decode()
            client.reply(200, translation.nothing(), content_type)
            return
        request = with_header(request, _AS_JSON)
        request = with_header(request, UNCOMPRESSED)
        text = json.dumps(asks, ensure_ascii=False)
        body = text.encode("utf-8", "replace")
        asked = Asked(client, request, target, target, body, asks)
        asked.translation = translation
        self._infer(asked)

    # ---- inference

    def _infer(self, asked: Asked) -> None:
        """Answer an inference request. Errors: HttpError, ClientGone."""
        number = next(self._number)
        asked.known = self._conversations.get(asked.thread)
        self._ongoing[number] = asked
        try:
            self._answer_asked(asked)
        finally:                                # whatever was raised: it is shown as under way
            del self._ongoing[number]

    def _answer_asked(self, asked: Asked) -> None:
        name = self._resolve(asked.request, asked.model, asked.path)
        if name == "auto":
            self._ask_ladder(asked)
        elif name:
            route = self._snapshot.routes[name]
            self._ask_named(asked, route)
        else:
            # A name of the host's or of llama-swap's own; it says itself what it does not know.
            self._check_served(asked)
            self.behind.forward(asked.client, asked.request, asked.body)

    def _resolve(self, request: Request, model: object, path: str = "") -> str:
        """As resolve_on_path; "" also for a name that only a pattern takes, and an upstream has."""
        config = self.config
        behind = self.behind
        name = resolve_on_path(config, path, model)
        if not name or not behind.has_others:
            return name
        if not isinstance(model, str) or is_auto(model):
            return name
        if tier_named(config, model):
            return name
        # A model that is there comes before a pattern that would send it elsewhere.
        try:
            theirs = [entry["id"] for entry in behind.models(request)["data"]]
        except _NO_LISTING:
            return name
        if model in theirs:
            return ""
        return name

    def _check_served(self, asked: Asked) -> None:
        """Errors: HttpError 404, for a name that nothing behind us may know either."""
        config = self.config
        direct = all(tier.backend == "openai" for tier in config.tiers)
        if self.behind.has_others and not direct:
            return
        role = PATH_ROLES.get(asked.path, "")
        if role and config.by_role(role) is None:
            raise HttpError(404, f"no tier does this: give one role = {role} in models.ini, with"
                                 " a model made for it, then `llmstack restart`", "not_found")
        raise unknown_model(config, asked.model)

    def requests(self) -> Dict[str, Any]:
        """What is under way, the oldest first."""
        rows = []
        for number, asked in list(self._ongoing.items()):       # a copy: other threads change it
            rows.append(asked.row(number))
        return {"requests": rows}

    def _ask_named(self, asked: Asked, route: Route) -> None:
        """Ask the one tier that a request names. Errors: HttpError, ClientGone."""
        facts: Optional[Facts] = None
        if asked.path in _CANONICAL_PATHS:
            try:
                facts = read_facts(asked.path, asked.values, texts=asked.texts)
                asked.is_long = facts.most_tokens >= WORTH_LEARNING_TOKENS
            except RecursionError:              # the upstream may take it all the same
                pass
        if facts is None:                       # nothing is kept of what cannot be counted
            asked.thread = ""
        name = route.tier.name
        status, message, kind = route.refused
        if status:
            self._publish(asked, facts, name, Outcome("refused", status))
            raise HttpError(status, message, kind)
        try:
            outcome = self._ask(asked, route)
        except ClientGone:
            self._publish(asked, facts, name, Outcome("left"))
            raise
        if outcome.answered:
            self._breaker.answered(name)
        self._publish(asked, facts, name, outcome)
        self._finish(asked, outcome, f"{asked.path} {name}", route)

    def _publish(self, asked: Asked, facts: Optional[Facts], tier: str, outcome: Outcome,
                 decided: Optional[Mapping[str, Any]] = None) -> None:
        """Tell the record and those who look on how a request ended; keep its turn.

        `decided`: what `auto` adds to its row. A request that could not be counted has none.
        """
        if facts is None:
            return
        row = record_row(facts, asked.path, tier, outcome)
        row.update(decided or {})
        compare_turns(asked, row)
        prompt = outcome.counts.prompt
        output = outcome.counts.output
        # What has been written is in the cache as well: the next turn brings it back as prompt. An
        # answer without output has only counted.
        if outcome.answered and prompt and output:
            self._conversations.answered(
                asked.thread,
                tier,
                prompt + output,
                asked.segments,
            )
        if outcome.state == "done":
            self._conversations.learn(asked.conversation, asked.estimate, prompt)
        wait_s = asked.wait_s
        total_s = asked.age_s()
        row["conversation"] = self.events.name_of(asked.conversation)
        row["wait_s"] = round(wait_s, 3)
        if asked.load_s:
            row["load_s"] = round(asked.load_s, 3)
        row["total_s"] = round(total_s, 3)
        row["stream"] = asked.stream
        # A server that times its answers has said it already.
        if asked.stream and output and "per_s" not in row:
            writing_s = total_s - wait_s - outcome.first_byte_s
            if writing_s > 0.1:                 # else it came in one piece, and tells no rate
                row["per_s"] = round(output / writing_s, 1)
        self.events.add(row)

    def _facts_of(self, asked: Asked, config: Config) -> Facts:
        """Count a request for the ladder. Errors: HttpError 400."""
        triggers = config.routing.ultra_triggers
        try:
            facts = read_facts(asked.path, asked.values, triggers, asked.texts)
        except RecursionError:
            raise HttpError(400, "the body is nested too deeply") from None
        asked.is_long = facts.most_tokens >= WORTH_LEARNING_TOKENS
        if not facts.auto:                      # another name here means it, too
            facts = facts._replace(auto=True)
        if held_by_all(facts, config):
            return facts
        # Not its thread's: a conversation's side requests are in the same language.
        ratio = self._conversations.get(asked.conversation).ratio
        asked.estimate = class_tokens(asked.texts)
        return facts._replace(classes=asked.estimate, ratio=ratio)

    def _decide(self, asked: Asked, now: Snapshot) -> Decision:
        """Where an `auto` request goes. Errors: HttpError 400."""
        facts = self._facts_of(asked, now.config)
        down = self._breaker.down()
        if now.hosts:
            down.update(now.offline())
        decision = decide(facts, now.config, down, now.barred)
        leaving = leaving_of(asked.known, decision, self.behind)
        loop = in_tool_loop(asked.values)
        asked.leaving = leaving
        asked.loop = loop
        return stay_or_go(decision, leaving, loop)

    def _ask_ladder(self, asked: Asked) -> None:
        """Ask the decision's tiers in turn until one answers."""
        now = self._snapshot
        decision = self._decide(asked, now)
        descent = Descent(
            asked,
            decision,
            snapshot=now,
            breaker=self._breaker,
            conversations=self._conversations,
        )
        patience_s = now.config.patience_s
        if patience_s and decision.facts.full_tokens <= TINY_TOKENS:
            # A title's request need not wait behind a long answer where another tier idles.
            idle = self._idle_beside(decision.chain)
            if idle:
                descent.prefer(idle)
                asked.patience_s = patience_s
        outcome = self._try(descent)
        while descent.settle(outcome):
            asked.patience_s = 0.0              # it is for the first alone
            outcome = self._try(descent)
        self._finish_descent(descent, outcome)

    def _finish_descent(self, descent: Descent, outcome: Outcome) -> None:
        """Tell client, log, record and conversation how an `auto` request ended."""
        asked = descent.asked
        decision = descent.decision
        what = f"auto -> {descent.tier.name}"
        how = outcome.status or outcome.state
        ms = asked.age_s() * 1000
        line = f"{what} [{decision.rung}] {descent.reason}"
        line += f"; {how} in {ms:,.0f} ms"
        if descent.fallbacks:
            line += f"; fell back {', '.join(descent.fallbacks)}"
        self.log.info(line)
        self._publish_descent(descent, outcome)
        self._finish(asked, outcome, what, descent.route, descent.headers)

    def _publish_descent(self, descent: Descent, outcome: Outcome) -> None:
        asked = descent.asked
        decision = descent.decision
        decided: Dict[str, Any] = {}
        if asked.loop:                          # before the reason: replay reads no further
            decided["loop"] = True
        decided["rung"] = decision.rung
        decided["reason"] = descent.reason
        decided["passed_over"] = decision.passed_over
        if descent.fallbacks:
            decided["fallbacks"] = descent.fallbacks
        self._publish(asked, decision.facts, descent.tier.name, outcome, decided)

    def _idle_beside(self, chain: Sequence[Tier]) -> List[Tier]:
        """The loaded tiers with nothing to do, where a chain's first is not one of them."""
        first = chain[0]
        if first.backend != "gguf":             # a hosted one is never busy
            return []
        rows = self.behind.watched().get("models", {})
        idle = set()
        for name, row in rows.items():
            if row["state"] == "loaded":
                idle.add(name)
        for asked in list(self._ongoing.values()):
            idle.discard(asked.tier)
        if first.name in idle:
            return []
        return [tier for tier in chain if tier.name in idle]

    def _try(self, descent: Descent) -> Outcome:
        """Ask the descent's present tier. Errors: ClientGone."""
        asked = descent.asked
        route = descent.route
        status, message, kind = route.refused
        if status:                              # no other tier holds it
            reply_failure(asked.client, status, message, kind, descent.headers())
            return Outcome("refused", status)
        try:
            return self._ask(asked, route, descent.judge, descent.headers)
        except ClientGone:
            ms = asked.age_s() * 1000
            self.log.info(f"auto -> {route.tier.name} {descent.reason};"
                          f" the client left after {ms:,.0f} ms")
            self._publish_descent(descent, Outcome("left"))
            raise

    def _ask(self, asked: Asked, route: Route,
             judge: Optional[Callable[[int, str], bool]] = None,
             headers: Optional[Callable[[], bytes]] = None) -> Outcome:
        """Ask one tier. Errors: ClientGone; HttpError 404 where the engine does not know it."""
        client = asked.client
        request = asked.request
        target = asked.target
        tier = route.tier.name
        by_ladder = judge is not None
        name = route.model
        # What is behind us knows a tier's own names, but not `auto` and names by pattern.
        is_known = not by_ladder and asked.model in self._snapshot.routes
        if not name and not is_known:
            name = tier
        pieces = asked.body_for(route, name)
        # A direct host is asked by the router itself; all other tiers are what is behind us.
        if route.host is None:
            lease = self.behind.lease(tier)
        else:
            lease = Lease(route.host)
            request, target = host_request(request, route, target)
        # For whoever asks meanwhile what this request waits for.
        asked.tier = tier
        asked.lease = lease
        first_byte_s = 0.0
        # A local model may read a prompt for minutes; a host that is silent so long has trouble.
        if by_ladder and asked.stream and route.hosted:
            first_byte_s = FIRST_BYTE_S
        waiting = Waiting(
            client,
            asked.path,
            # Clients of Ollama's API know no comments, and no events.
            stream=asked.stream and asked.translation is None,
            stage=lease.stage,
            mode=self.config.loading_state,
            extra=headers,
        )
        terms = Terms(
            extra=headers,
            judge=judge,
            waiting=waiting.tell,
            ends=STREAM_ENDS.get(asked.path, ()),
            first_byte_s=first_byte_s,
            began=asked.release,
            translation=asked.translation,
            patience_s=asked.patience_s,
        )
        try:
            return ask_lease(
                client,
                request,
                lease,
                target,
                pieces,
                terms,
                waiting,
            )
        finally:
            asked.wait_s += waiting.ready_s
            asked.load_s += lease.load_s

    def _finish(self, asked: Asked, outcome: Outcome, what: str, route: Route,
                extra: Optional[Callable[[], bytes]] = None) -> None:
        """Say in the log how a request ended, and to the client when nothing has reached it."""
        log = self.log
        behind = self.behind
        if log.is_verbose:
            log.debug(f"{what}: {outcome.state} {outcome.status} {outcome.detail}")
        if outcome.state == "done":
            return
        # `llmstack start` helps where the daemon's own part is missing, not where a host is.
        nobody = behind.nobody
        remedy = behind.remedy
        if route.host is not None:
            nobody = f"no answer from {route.host.url}"
            remedy = ""
        tell_failure(
            asked.client,
            log,
            what,
            outcome,
            nobody,
            remedy,
            extra=extra() if extra else b"",
        )


# ==================================================================================================
# LLAMA-SERVER
# ==================================================================================================
# Which programs the engines run, and what a llama-server says of itself: the flags it refuses and
# its build. It is run for that and for nothing else; loading models is ENGINE's.
#
# What it says is kept, as is all that is learned further down: a file a kind, in it a row a build
# or a model, the newest last. So what nobody uses any more goes by itself.

MAX_LEARNED = 64                                # rows a file
LLAMA_SERVER_HINT = ("run `llmstack setup`, which says how to have one and can bring it, or try"
                     " `llmstack start --demo`")
OTHER_SERVER = "reinstall llama.cpp, or name another one in llama_server_bin"
# Any value of these is as good to ask with: flags are asked anew for none of them.
_BY_TIER = ("--alias", "-c", "--cache-ram", "--ctx-checkpoints")


def digest_of(*facts: str) -> str:
    """24 hexadecimal digits that tell these facts from any others."""
    import hashlib
    text = "\0".join(facts)
    digest = hashlib.sha256(text.encode("utf-8", "replace"))
    return digest.hexdigest()[:24]


def newest_rows(rows: Mapping[str, Any], identity: str, row: Any) -> Dict[str, Any]:
    """`rows` with one that is new or has changed, without the oldest beyond MAX_LEARNED."""
    kept = {**rows}
    # Behind all others again, not where it was.
    kept.pop(identity, None)
    kept[identity] = row
    newest = list(kept.items())[-MAX_LEARNED:]
    return dict(newest)


def build_stamp(program: Sequence[str]) -> str:
    """Names one build of a program: path, size and time of change, and the stand-in's pin."""
    path = program[0]
    status = os.stat(path)
    stamp = f"{path}:{status.st_size}:{status.st_mtime_ns}"
    if len(program) > 1:
        stamp += f":{LLAMA_CPP_PIN}:{VERSION}"
    return stamp


def find_llama_server(config: Config, env: Mapping[str, str], data: str) -> Tuple[str, ...]:
    """The command that starts llama-server: as configured, as on PATH, or our stand-in.

    Empty when there is none. Errors: UserError where one is named that does not exist.
    """
    where = "llama_server_bin in models.ini"
    named = config.settings.get("llama_server_bin")
    if not named:
        where = "LLAMA_SERVER_BIN"
        named = env.get(where)
    if named:
        found = _expand(named)
        # A mere name is meant for PATH, not for the directory that we stand in.
        if os.path.basename(named) == named:
            found = find_program(named, ())
        if not found or not os.access(found, os.X_OK):
            raise UserError(f"{where} names {named}, which is no program here",
                            "correct it, or leave it out to search PATH", 2)
        return (found,)
    found = find_program("llama-server" + EXE)
    if found:
        return (found,)
    if not environment_ready(LLAMA_CPP, data):
        return ()
    python = environment_program(LLAMA_CPP, data)
    return tuple(guest_command(python, "llama_server"))


def bin_dir(env: Mapping[str, str], data: str) -> str:
    named = env.get("LLMSTACK_BIN_DIR")
    if named:
        return _expand(named)
    return os.path.join(data, "bin")


def find_llama_swap(env: Mapping[str, str], data: str) -> str:
    """The llama-swap binary: $LLMSTACK_BIN_DIR, the data directory, PATH; "" when there is none."""
    name = "llama-swap" + EXE
    ours = os.path.join(bin_dir(env, data), name)
    if os.access(ours, os.X_OK):
        return ours
    return find_program(name)


def _takes_flags(program: Sequence[str], flags: Iterable[Flag]) -> bool:
    """Whether a llama-server knows all of these. Errors: UserError where it does not run."""
    import subprocess
    words = itertools.chain.from_iterable(flags)
    command = [*program, *words, "--version"]
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as exc:
        raise UserError(f"{program[0]} does not run: {exc}", OTHER_SERVER) from None
    return ended.returncode == 0


def _ask_flags(program: Sequence[str], groups: Mapping[str, Flag]) -> Set[str]:
    """The names of those that a llama-server refuses, of replacements too. Errors: UserError.

    `llama-server FLAGS --version` exits 1 on an unknown flag and loads no model. Builds add and
    drop flags, so all are tried together first, and one by one only where that fails.
    """
    if not _takes_flags(program, ()):
        raise UserError(f"{program[0]} --version fails", OTHER_SERVER)
    if _takes_flags(program, groups.values()):
        return set()
    others = {}
    for name in FLAG_REPLACEMENTS:
        if name in groups:
            others[name] = FLAG_REPLACEMENTS[name]
    doubtful = set(groups)
    # A build that refuses one of these takes its replacement, as a rule, and all the rest.
    if _takes_flags(program, {**groups, **others}.values()):
        doubtful = set(others)
    refused = set()
    for name in doubtful:
        if _takes_flags(program, [groups[name]]):
            continue
        refused.add(name)
        other = others.get(name)
        if other and not _takes_flags(program, [other]):
            refused.add(other[0])
    return refused


def probe_flags(program: Sequence[str], config: Config, data: str) -> FrozenSet[str]:
    """Which of the flags we would use the installed llama-server refuses; asked once per binary.

    Errors: UserError, where there is none, too: it may go while a daemon runs.
    """
    if not program:
        raise UserError("there is no llama-server on this machine", LLAMA_SERVER_HINT)
    try:
        stamp = build_stamp(program)
    except OSError as exc:
        raise UserError(f"{program[0]} does not run: {exc.strerror}", OTHER_SERVER) from None
    flags = common_flags(config)
    for tier in local_tiers(config):
        flags += all_flags(tier, config)
    if config.park_gb:
        flags.append(("--slot-save-path", data))
    groups = {}
    asked = {}
    for flag in flags:
        name = flag[0]
        groups[name] = flag
        if name not in _BY_TIER:
            asked[name] = " ".join(flag)
    path = os.path.join(data, "flags.json")
    rows = _read_json(path)
    known = dict_of(rows.get(stamp))
    if known.get("asked") == asked:
        return frozenset(known["refused"])
    refused = _ask_flags(program, groups)
    row = {"asked": asked, "refused": sorted(refused)}
    rows = newest_rows(rows, stamp, row)
    write_atomic(path, json.dumps(rows, indent=1))
    return frozenset(refused)


def refused_notes(config: Config, env: Mapping[str, str], data: str) -> List[str]:
    """As refused_settings, of each tier by its own llama-server; none where that does not run."""
    notes: List[str] = []
    for tier in local_tiers(config):
        try:
            program = find_llama_server(tier_config(config, tier), env, data)
            refused = probe_flags(program, config, data)
        except UserError:                       # said elsewhere
            continue
        alone = config._replace(tiers=(tier,))
        notes += refused_settings(alone, refused)
    return notes


# ==================================================================================================
# FIT
# ==================================================================================================
# The hub, its cache on this disk, and what each tier takes by the header of its file in either.
# Headers are read anew each time, 40 ms for a vocabulary of 152,000, but where `status` would wait
# for them all: see trained_contexts. Nothing is fetched here but headers; extras/download.py brings
# files.
#
# Behind that stands what use has taught of a tier: whether drafting pays, and what `probe` has
# measured. Either is kept under a name for machine, weights, build and flags together, so it ends
# with what it was measured of.


# The first that is set counts, and the place below it.
_CACHE_VARIABLES = (
    ("LLAMA_CACHE", ""),
    ("HF_HUB_CACHE", ""),
    ("HUGGINGFACE_HUB_CACHE", ""),
    ("HF_HOME", "hub"),
    ("XDG_CACHE_HOME", "huggingface/hub"),
)


def hub_cache_dir(env: Mapping[str, str]) -> str:
    """Where llama-server keeps downloads, huggingface_hub's own place. Source: hf-cache.cpp."""
    place = "~/.cache/huggingface/hub"
    for name, below in _CACHE_VARIABLES:
        if env.get(name):
            place = os.path.join(env[name], below)
            break
    return os.path.normpath(_expand(place))


def repo_dir(cache: str, repo: str) -> str:
    return os.path.join(cache, "models--" + repo.replace("/", "--"))


def _names_in(directory: str, ending: str = "") -> List[str]:
    """The files of a directory that may not be there."""
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    found = [name for name in names if name.endswith(ending)]
    return sorted(found)


def _projector_in(directory: str) -> str:
    """The path of the projector that a directory holds, "" for none."""
    found = choose_projector(_names_in(directory))
    if not found:
        return ""
    return os.path.join(directory, found)


def local_file(cache: str, repo: str, file: str) -> str:
    """A file of the hub cache, "" for none. Looked for as llama-server does without a network.

    Only the commit of refs/main counts: what lies below another is not found.
    """
    folder = repo_dir(cache, repo)
    ref = os.path.join(folder, "refs", "main")
    commit = read_text(ref).strip()
    if not commit:
        return ""
    snapshot = os.path.join(folder, "snapshots", commit)
    if file == ANY_PROJECTOR:
        return _projector_in(snapshot)
    path = os.path.join(snapshot, *file.split("/"))
    if os.path.isfile(path):
        return path
    return ""


def local_parts(weights: Weights, env: Mapping[str, str]) -> List[str]:
    """Where each file of a tier's model lies on this disk, "" for one that is not here."""
    path = weights.path
    if not path:
        cache = hub_cache_dir(env)
        names = split_parts(weights.file)
        return [local_file(cache, weights.repo, name) for name in names]
    if os.path.isfile(path):
        return [path]
    return [""]


def cached_model(weights: Weights, env: Mapping[str, str]) -> str:
    """The first file of a tier's model where all of it is on this disk, else ""."""
    parts = local_parts(weights, env)
    if not all(parts):
        return ""
    return parts[0]


def downloaded_share(weights: Weights, env: Mapping[str, str]) -> float:
    """The share of a model that llama-server has downloaded, 0.0 where its size is not known.

    It writes beside what the hub's cache calls a blob. Source: download.cpp.
    """
    whole_bytes = weights.size_gb * 1e9
    if not weights.repo or not whole_bytes:
        return 0.0
    here = sum(map(file_size, local_parts(weights, env)))
    folder = repo_dir(hub_cache_dir(env), weights.repo)
    blobs = os.path.join(folder, "blobs")
    for name in _names_in(blobs, ".downloadInProgress"):
        here += file_size(os.path.join(blobs, name))
    return here / whole_bytes


def fetching_words(tier: Tier) -> str:
    """What brings a tier's missing file here, as `status` says it."""
    weights = weights_for(tier)
    if weights.repo:
        return f"llmstack download {tier.name}"
    return f"there is no {visible(weights.path)}"


def hub_endpoint(env: Mapping[str, str]) -> str:
    """Where llama-server asks for models, too."""
    named = env.get("MODEL_ENDPOINT") or env.get("HF_ENDPOINT")
    return (named or "https://huggingface.co").rstrip("/")


def hub_token(env: Mapping[str, str]) -> str:
    """What HF_TOKEN holds, "" for nothing.

    Errors: UserError, since the error of a library would quote it.
    """
    token = env.get("HF_TOKEN", "").strip()
    if not re.match(r"[!-~]*\Z", token):
        raise UserError("HF_TOKEN holds a character that no token has",
                        "set it anew: one line of letters and digits")
    return token


def hub_url(repo: str, file: str, env: Mapping[str, str]) -> str:
    from urllib.parse import quote
    return f"{hub_endpoint(env)}/{repo}/resolve/main/{quote(file)}"


class Unreachable(UserError):  # noqa: N818
    """A server that cannot be asked at all, so that no second question to it is worth its wait."""


def open_url(url: str, headers: Mapping[str, str], what: str, data: Optional[bytes] = None,
             timeout_s: float = 20) -> Any:
    """Ask a server on the internet, through the proxy of the environment, or one on this machine.

    Errors: Unreachable, HTTPError (an OSError) for what it refuses.
    """
    import urllib.error
    import urllib.request
    parts = re.match(r"https?://([^/?#]+)", url)
    if parts is None:
        raise Unreachable(f"{what} has no address that can be asked: {url}",
                          "give it one that begins with https://")
    host = parts.group(1)
    request = urllib.request.Request(url, data, {"User-Agent": f"llmstack/{VERSION}"})  # noqa: S310
    for name, value in headers.items():
        if name == "Authorization":             # not sent on when it leads elsewhere
            request.add_unredirected_header(name, value)
        else:
            request.add_header(name, value)
    ask: Any = urllib.request.urlopen
    if is_loopback(host):                       # a proxy would look for it on its own machine
        no_proxy = urllib.request.ProxyHandler({})
        ask = urllib.request.build_opener(no_proxy).open
    try:
        return ask(request, timeout=timeout_s)
    except urllib.error.HTTPError:              # an answer: whoever asked knows what it means
        raise
    except (OSError, ValueError) as exc:
        # A URLError has the error of the socket as its reason; that one's words say more.
        cause = getattr(exc, "reason", exc)
        reason = str(getattr(cause, "strerror", None) or cause)
        hint = "see that this machine is online (HTTPS_PROXY is honoured), then again"
        if "CERTIFICATE_VERIFY" in reason:
            hint = ("this Python has no certificates: run its Install Certificates.command,"
                    " or set SSL_CERT_FILE")
        raise Unreachable(f"{what} cannot be reached at {host}: {reason}", hint) from None


def _part_header(path: str) -> GgufHeader:
    """The header of one file of a GGUF. Errors: GgufError, OSError."""
    # A pipe in its place would keep a start waiting.
    with open(path, "rb", opener=_open_at_once) as file:
        def read(offset: int, count: int) -> bytes:
            file.seek(offset)
            return file.read(count)

        header = parse_gguf_header(read)
    size = file_size(path)
    if size < header.end:
        raise BrokenGgufError(f"is not whole: {size:,} of {header.end:,} bytes")
    return header


def local_header(path: str) -> GgufHeader:
    """The header of a GGUF on this disk, with its further parts. Errors: GgufError, OSError."""
    further = split_parts(path)[1:]
    return merge_headers(_part_header(path), map(_part_header, further))


def _fetch_range(url: str, first: int, count: int, token: str) -> bytes:
    """A part of a file on the hub; short at its end. Errors: Unreachable, OSError."""
    import http.client
    import urllib.error
    last = first + count - 1
    headers = {"Range": f"bytes={first}-{last}"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        with open_url(url, headers, "the model hub", timeout_s=10) as answer:
            # A mirror may know no ranges and send the file from its beginning.
            skip = first
            if answer.status == 206:
                skip = 0
            data: bytes = answer.read(skip + count)
            return data[skip:]
    except urllib.error.HTTPError as exc:
        if exc.code == 416:                     # beyond its end
            return b""
        hint = ""
        if exc.code in (401, 403):
            hint = ": set HF_TOKEN"
        raise OSError(f"{url} answered {exc.code}{hint}") from None
    except (ValueError, http.client.HTTPException) as exc:
        raise OSError(str(exc) or type(exc).__name__) from None
    except OSError as exc:                      # one that takes the connection and says nothing
        raise Unreachable(f"the model hub broke off: {exc}", "try again later") from None


def file_damage(path: str) -> str:
    """Why no llama.cpp can load one part of a GGUF, as "is not whole: ...", or ""."""
    try:
        _part_header(path)
    except BrokenGgufError as exc:
        return str(exc)
    except (GgufError, OSError):
        pass
    return ""


def hub_header(weights: Weights, env: Mapping[str, str]) -> GgufHeader:
    """The header of a GGUF on the hub, by growing ranges.

    Errors: GgufError, OSError, Unreachable.
    """
    token = hub_token(env)

    def part_header(name: str) -> GgufHeader:
        url = hub_url(weights.repo, name, env)
        held = bytearray()

        def read(offset: int, wanted: int) -> bytes:
            end = offset + wanted
            while len(held) < end <= MAX_GGUF_HEADER_BYTES:
                # Each range is as long as all before it, so that a large vocabulary, of which
                # nobody knows the length, takes five requests.
                count = max(1 << 20, len(held))
                more = _fetch_range(url, len(held), count, token)
                if not more:
                    break
                held.extend(more)
            return bytes(held[offset:end])

        return parse_gguf_header(read)

    further = split_parts(weights.file)[1:]
    return merge_headers(part_header(weights.file), map(part_header, further))


def _further_file(name: str, model: str, env: Mapping[str, str]) -> str:
    """The path of what a key such as mmproj names, "" where it is not here."""
    if name == "auto":
        return _projector_in(os.path.dirname(model))
    # The project's own file stands for itself.
    if not _HUB_REFERENCE.match(name):
        return name
    repo, _, file = name.partition(":")
    return local_file(hub_cache_dir(env), repo, file)


def beside_bytes(tier: Tier, config: Config, machine: Machine, model: str,
                 env: Mapping[str, str]) -> int:
    """What a tier's further files take once loaded, as far as they are here.

    A draft has a KV cache of its own, as long as the model's.
    """
    draft = tier.settings.get("draft")
    found: List[int] = []

    def count(name: str) -> str:
        path = _further_file(name, model, env)
        if name != draft:
            found.append(file_size(path))
            return name
        load = load_options(tier, config, machine)
        try:
            memory = estimate_memory(local_header(path), tier.ctx_size, load)
            found.append(memory.total)
        except (GgufError, OSError):            # loading says what is wrong with it
            pass
        return name

    with_files(tier, count)
    return sum(found)


def _header_number(path: str, key: str) -> int:
    """What a GGUF's header says under a key of its architecture; 0 where that cannot be read."""
    try:
        header = local_header(path)
    except (GgufError, OSError):                # another command says what is wrong with it
        return 0
    return _quantity(header.keys.get(key))


def ready_tier(tier: Tier, env: Mapping[str, str]) -> Tier:
    """A tier as its command line needs it: its further files by their paths, `auto` decided.

    A file that is not here is left out, or, where the tier is no use without it, an error.
    Errors: UserError.
    """
    if not tier.server:
        return tier
    model = cached_model(weights_for(tier), env)

    def find(name: str) -> str:
        path = _further_file(name, model, env)
        # A model without a projector reads no pictures, and all else as well.
        if path or name == "auto":
            return path
        repo, _, file = name.partition(":")
        raise UserError(f"{tier.name} needs {file} of {repo}, which is not here",
                        f"llmstack download {tier.name}")

    settings = {}
    for key, value in with_files(tier, find).server:
        if value not in ("", ()):
            settings[key] = value
    if settings.get("speculative") == "auto" and "draft" not in settings:
        settings["speculative"] = "off"
        # Layers for multi-token prediction draft without a second model.
        if _header_number(model, "nextn_predict_layers"):
            settings["speculative"] = "mtp"
    return tier._replace(server=tuple(settings.items()))


def known_models() -> Dict[str, Any]:
    """The dimensions of the profiles' models; none where the program was copied without them."""
    try:
        return parse_json_object(read_resource("share/models.json").decode("utf-8"))
    except UserError:
        return {}


def _measure_tier(tier: Tier, config: Config, machine: Machine, path: str, url: str,
                  env: Mapping[str, str]) -> TierFit:
    """What a tier takes by the best that is known: its file, the hub's, its dimensions, its size.

    Errors: Unreachable.
    """
    weights = weights_for(tier)
    where = path or url
    note = ""
    size_gb = weights.size_gb or file_size(path) / 1e9
    by_size = fit_by_size(tier, config, machine, footprint_gb(size_gb))
    by_size = by_size._replace(where=where)
    try:
        if path:
            header = local_header(path)
            beside = beside_bytes(tier, config, machine, path, env)
            return fit_tier(tier, config, machine, header, "local", path, beside)
        if url:
            header = hub_header(weights, env)
            return fit_tier(tier, config, machine, header, "hub", url)
    except GgufError as exc:
        note = f"{os.path.basename(where)} {exc}"
        if path and isinstance(exc, BrokenGgufError):
            return by_size._replace(source="broken", fits=False, note=note)
    except Unreachable:
        raise
    except OSError as exc:
        note = str(exc)
    # A file that is here and cannot be read may be another than its name says.
    known = known_header(weights.file, weights.size_gb, known_models())
    if known and not path:
        by_dimensions = fit_tier(tier, config, machine, known, "dimensions", where)
        return by_dimensions._replace(note=note)
    return by_size._replace(note=note)


def measure_tiers(config: Config, machine: Machine, env: Mapping[str, str],
                  hub: bool = False) -> List[TierFit]:
    """What each tier takes here: see _measure_tier; the hub is asked only with `hub`."""
    fits = []
    for tier in config.tiers:
        if tier.backend != "gguf":
            fits.append(TierFit(tier.name, "hosted", "", 0.0, True, tier.ctx_size))
            continue
        weights = weights_for(tier)
        path = cached_model(weights, env)
        url = ""
        note = ""
        if hub and weights.repo and not path:
            url = hub_url(weights.repo, weights.file, env)
        try:
            fit = _measure_tier(tier, config, machine, path, url, env)
        except Unreachable as exc:              # no further tier is asked for
            hub = False
            note = str(exc)
            fit = _measure_tier(tier, config, machine, path, "", env)
        fits.append(fit._replace(note=fit.note or note))
    # What is left for prompts is known only once all tiers are.
    with_room = with_caches(config, fits, machine).tiers
    return [fit._replace(cache_mib=cache_limit_mib(tier, fit))
            for tier, fit in zip(with_room, fits)]


def trained_contexts(config: Config, env: Mapping[str, str], data: str) -> Dict[str, int]:
    """Tier -> tokens its model was trained for, of those whose file is on this disk.

    Each file's header is read once: contexts.json of the data directory holds what it says.
    Without that `status` of eight models would take a third of a second longer.
    """
    record_path = os.path.join(data, "contexts.json")
    record = before = _read_json(record_path)
    found = {}
    for tier in local_tiers(config):
        path = cached_model(weights_for(tier), env)
        if not path:
            continue
        status = os.stat(path)
        stamp = f"{status.st_size}:{status.st_mtime_ns}"
        row = dict_of(record.get(path))
        if row.get("stamp") != stamp:
            tokens = _header_number(path, "context_length")
            row = {"stamp": stamp, "tokens": tokens}
            record = newest_rows(record, path, row)
        found[tier.name] = _quantity(row.get("tokens"))
    if record is before:
        return found
    try:
        write_atomic(record_path, json.dumps(record, indent=1))
    except UserError:                           # it is read again, then
        pass
    return found


# ---- drafting that proves itself

DRAFT_TRIAL_TOKENS = 2_000                      # that a tier writes with drafts, and without
class Drafting(NamedTuple):
    """What a tier has written with drafts and without, of one model, build and set of flags."""

    with_tokens: int = 0
    with_ms: int = 0
    without_tokens: int = 0
    without_ms: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def with_per_s(self) -> float:
        return self.with_tokens * 1000 / max(self.with_ms, 1)

    @property
    def without_per_s(self) -> float:
        return self.without_tokens * 1000 / max(self.without_ms, 1)

    @property
    def settled(self) -> bool:
        return min(self.with_tokens, self.without_tokens) >= DRAFT_TRIAL_TOKENS

    @property
    def drafts_next(self) -> bool:
        """Whether the next load drafts: first with, then without, then what was faster."""
        if self.settled:
            return self.with_per_s > self.without_per_s
        # A model may be stopped before it has written enough: then the same is tried again.
        return self.with_tokens < DRAFT_TRIAL_TOKENS

    def learn(self, drafts: bool, row: Mapping[str, Any]) -> Drafting:
        """With one more answer, by its row of the record."""
        tokens = row["output"]
        ms = round(tokens / row["per_s"] * 1000)
        if not drafts:
            return self._replace(
                without_tokens=self.without_tokens + tokens,
                without_ms=self.without_ms + ms,
            )
        return self._replace(
            with_tokens=self.with_tokens + tokens,
            with_ms=self.with_ms + ms,
            drafted=self.drafted + row.get("drafted", 0),
            accepted=self.accepted + row.get("accepted", 0),
        )


def drafting_words(found: Drafting, drafts: bool) -> str:
    """What drafting has brought so far, and what runs now."""
    words = ["does not draft"]
    if drafts:
        words = ["drafts"]
    if found.drafted:
        share = found.accepted / found.drafted
        words.append(f"{share:.0%} of {found.drafted:,} drafted tokens were taken")
    if found.with_tokens:
        words.append(f"{found.with_per_s:.1f} tok/s with drafts")
    if found.without_tokens:
        words.append(f"{found.without_per_s:.1f} without")
    if found.settled:
        words.append("the faster is kept")
    # What runs now goes on as it was loaded: only a load can change it.
    elif not found.drafts_next and drafts:
        words.append("its next load goes without, to compare")
    return ", ".join(words)


def drafts_by_itself(asked: Tier, ready: Tier) -> bool:
    """Whether a tier drafts because that was left to us: speculative = auto, or a draft alone."""
    if asked.settings.get("speculative", "auto") != "auto":
        return False
    settings = ready.settings
    return settings.get("speculative") == "mtp" or "draft" in settings


def without_drafts(tier: Tier) -> Tier:
    settings = tier.settings
    settings.pop("draft", None)
    settings["speculative"] = "off"
    return tier._replace(server=tuple(settings.items()))


class Drafts:
    """Chooses at each load whether a tier drafts, and learns from its answers. Thread-safe."""

    def __init__(self, data: str, log: Log) -> None:
        self._path = os.path.join(data, "drafting.json")
        self._log = log
        self._lock = threading.Lock()
        self._running: Dict[str, Tuple[str, bool]] = {}     # tier -> (identity, does it draft)
        self._rows = _read_json(self._path)

    def _found(self, identity: str) -> Drafting:
        """Whoever holds the lock asks."""
        row = self._rows.get(identity)
        if not isinstance(row, list):
            return Drafting()
        if len(row) != len(Drafting._fields):   # of another version
            return Drafting()
        return Drafting(*map(_quantity, row))

    def choose(self, asked: Tier, ready: Tier, identity: str) -> Tier:
        """`ready` as it is to be loaded now."""
        with self._lock:
            # What the server before this one answers no longer counts.
            self._running.pop(asked.name, None)
            if not identity or not drafts_by_itself(asked, ready):
                return ready
            drafts = self._found(identity).drafts_next
            self._running[asked.name] = (identity, drafts)
        if drafts:
            return ready
        return without_drafts(ready)

    def hear(self, row: Mapping[str, Any]) -> None:
        """Learn from the record's row of an answer."""
        # One that was broken off says nothing of how fast its end would have been.
        is_timed = row.get("output") and row.get("per_s")
        if row["ended"] != "done" or not is_timed:
            return
        name = row["tier"]
        with self._lock:
            identity, drafts = self._running.get(name, ("", False))
            found = self._found(identity)
            if not identity or found.settled:
                return
            found = found.learn(drafts, row)
            self._rows = newest_rows(self._rows, identity, list(found))
            text = json.dumps(self._rows)
        if found.settled:
            words = drafting_words(found, found.drafts_next)
            self._log.info(f"{name}: {words}")
        try:
            write_atomic(self._path, text)
        except UserError as exc:
            self._log.warning(str(exc))

    def said(self) -> Dict[str, str]:
        """Tier -> what there is to say of its drafting."""
        words = {}
        with self._lock:
            for name, (identity, drafts) in self._running.items():
                words[name] = drafting_words(self._found(identity), drafts)
        return words


# ---- what `probe` has measured, kept for as long as machine, weights, build and flags stay


def probes_file(data: str) -> str:
    return os.path.join(data, "probes.json")


def probe_identity(tier: Tier, config: Config, env: Mapping[str, str], data: str) -> str:
    """Names all that a measurement of a tier holds for; "" where it cannot be loaded here."""
    path = cached_model(weights_for(tier), env)
    try:
        program = find_llama_server(tier_config(config, tier), env, data)
        if not path or not program:
            return ""
        status = os.stat(path)
        stamp = build_stamp(program)
    except (OSError, UserError):
        return ""
    # These two follow from the memory that is free now, and say nothing of speed.
    plain = tier._replace(cache_ram_mib=-1, ctx_checkpoints=-1)
    return digest_of(
        socket.gethostname(),                   # a home directory may be of several machines
        stamp,
        os.path.realpath(path),                 # in the hub's cache it has the file's hash in it
        str(status.st_size),
        str(status.st_mtime_ns),
        *map(" ".join, all_flags(plain, config)),
    )


def known_probes(config: Config, env: Mapping[str, str], data: str) -> Dict[str, Dict[str, Any]]:
    """Tier -> what `probe` has found, of those for which it holds still."""
    rows = _read_json(probes_file(data))
    # Without any, no llama-server is looked for.
    if not rows:
        return {}
    found = {}
    for tier in local_tiers(config):
        row = rows.get(probe_identity(tier, config, env, data))
        if isinstance(row, dict):
            found[tier.name] = row
    return found


def true_config(config: Config, places: Places,
                warn: Optional[Callable[[str], None]] = None) -> Config:
    """`config` with the contexts that its models really have; what that takes away is warned of."""
    trained = trained_contexts(config, os.environ, places.data)
    true = with_true_contexts(config, trained)
    for before, after in zip(config.tiers, true.tiers):
        if warn and before != after:
            name = before.name
            at = ini_line(places, name, "ctx_size")
            warn(f"{at}: ctx_size {before.ctx_size:,} of [{name}] is more than its model was"
                 f" trained for; {after.ctx_size:,} counts")
    probes = known_probes(true, os.environ, places.data)
    return with_probes(true, probes)


# ==================================================================================================
# LITELLM
# ==================================================================================================
# LiteLLM lives in another Python than ours. What it knows of its configuration it is asked in a
# process of its own, share/guests/litellm_yaml.py; ours never imports it.

# What keeps it to itself; a variable of the user's wins. PRODUCTION: no .env file is read. The
# proxy wants a master key, or this permission: it listens on loopback, and its guard,
# share/guests/litellm_proxy.py, keeps web pages out, which a key would have to do else.
_LITELLM_ENV = {"LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False", "LITELLM_MODE": "PRODUCTION",
                "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOCAL_BLOG_POSTS": "True",
                "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
                "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
INSTALL_LITELLM = ("LiteLLM is not installed:"
                   " run `llmstack install-litellm`, then `llmstack restart`")


# What the installers write first into a program: its Python, with options or behind env; or a shell
# that executes it, where its path has a space or is too long for the kernel.
_SHEBANG = re.compile(rb"#! *(?:/usr/bin/env +(?:-S +)?)?([^\s'\"]*python[0-9.]*)(?: +-\w+)*\s*\n")
_TRAMPOLINE = re.compile(rb"#! */bin/sh\n'''exec' +(?:\"([^\"$]+)\"|'([^'$]+)'|(/\S+)) ")


def _named_python(head: bytes) -> str:
    """The Python that a program's first lines name, "" for none."""
    found = _SHEBANG.match(head) or _TRAMPOLINE.match(head)
    if not found:
        return ""
    named = os.fsdecode(next(filter(None, found.groups())))
    if "/" in named:
        return named
    # Behind env stands a bare name, which is one on PATH.
    return find_program(named)


def _python_of(program: str) -> str:
    """The Python that an installed program runs in. Errors: UserError where that cannot be told."""
    name = os.path.basename(program)
    if re.match(r"(?:python|pypy)[0-9.]*(?:\.exe)?\Z", name):
        return program
    try:
        with open(program, "rb") as file:
            python = _named_python(file.read(4096))
    except OSError:
        # A program may be executable and not readable.
        python = ""
    if not python:
        # An environment's programs lie beside its Python.
        folder = os.path.dirname(os.path.realpath(program))
        python = os.path.join(folder, "python" + EXE)
    if not os.access(python, os.X_OK):
        raise UserError(f"LITELLM_BIN names {program}, and which Python it runs in cannot be told:"
                        " nothing would keep web pages away from LiteLLM",
                        "name that Python in LITELLM_BIN instead, or leave LITELLM_BIN out and run"
                        " `llmstack install-litellm`", 2)
    return python


def _litellm_python(env: Mapping[str, str], data: str) -> str:
    """The Python that LiteLLM is installed in, "" for none. Errors: see find_litellm."""
    import importlib.util
    named = env.get("LITELLM_BIN", "")
    if named:
        found = _expand(named)
        if os.path.basename(named) == named:
            found = find_program(named, ())
        if not os.access(found, os.X_OK):
            raise UserError(f"LITELLM_BIN names {named}, which is no program here",
                            "correct it, or leave it out", 2)
        return _python_of(found)
    # A LiteLLM without its extra for the proxy cannot serve.
    needed = ("litellm", "fastapi", "uvicorn", "orjson", "apscheduler", "yaml")
    if all(map(importlib.util.find_spec, needed)):
        return sys.executable
    if environment_ready(LITELLM, data):
        return environment_program(LITELLM, data)
    return ""


def find_litellm(env: Mapping[str, str], data: str) -> Tuple[str, ...]:
    """The command that starts LiteLLM's proxy: LITELLM_BIN, this Python, our environment.

    Its first word is the Python that LiteLLM is installed in; empty where there is none.
    Errors: UserError where LITELLM_BIN names no program, or one whose Python cannot be found.
    """
    python = _litellm_python(env, data)
    if not python:
        return ()
    return tuple(guest_command(python, "litellm_proxy"))


def litellm_env(env: Mapping[str, str]) -> Dict[str, str]:
    """The proxy's environment: quiet, offline but for its providers, without others' databases."""
    quiet = dict(_LITELLM_ENV)
    for name, value in env.items():
        if not name.startswith(("DATABASE_", "DIRECT_URL")):
            quiet[name] = value
    return quiet


def litellm_config_path(places: Places) -> str:
    return places.in_state("litellm_config.yaml")


def litellm_command(program: Sequence[str], places: Places, port: int) -> List[str]:
    """LiteLLM's start, whenever that comes: with the configuration as it is now, or not at all."""
    path = litellm_config_path(places)
    # The guest refuses a file of another digest: it is not what was trusted.
    digest = _digest(_read_bytes(path))
    options = f"--host 127.0.0.1 --port {port} --telemetry False --num_workers 1"
    return [*program, digest, "--config", path, *options.split()]


YAML_TIMEOUT_S = 10                            # a file made to be slow is no reason to wait longer


def ask_litellm_yaml(program: Sequence[str], text: str,
                     wanted: Sequence[Tuple[str, str]]) -> Dict[str, Any]:
    """What share/guests/litellm_yaml.py answers in LiteLLM's Python; where it fails, only `why`."""
    import subprocess
    command = guest_command(program[0], "litellm_yaml")
    asked = json.dumps({"text": text, "wanted": wanted}).encode()
    try:
        done = subprocess.run(command, input=asked, stdout=subprocess.PIPE, timeout=YAML_TIMEOUT_S,
                              stderr=subprocess.DEVNULL, check=False)
        answer = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        answer = None
    if isinstance(answer, dict):
        return answer
    return {"why": f"{program[0]} does not read it"}


def read_litellm_file(places: Places, env: Mapping[str, str]) -> Optional[LitellmFile]:
    """What litellm_config.yaml holds; None where that cannot be told.

    LiteLLM's Python is asked once a version of the file, since `status` is to stay quick.
    """
    data = _read_bytes(litellm_config_path(places))
    if not data:
        return LitellmFile({}, frozenset())
    cache_path = os.path.join(places.data, "litellm.json")
    cache = _read_json(cache_path)
    digest = _digest(data)
    known = parse_litellm_file(cache.get(digest))
    if known:
        return known
    try:
        program = find_litellm(env, places.data)
        if not program:
            return None
        text = data.decode("utf-8")
        answer = ask_litellm_yaml(program, text, ())
        known = parse_litellm_file(answer)
        if known:
            # Eight versions are enough for the files of the projects in use.
            cache[digest] = answer
            latest = list(cache.items())[-8:]
            write_atomic(cache_path, json.dumps(dict(latest)))
    except (UserError, UnicodeDecodeError):
        # A damaged LITELLM_BIN or file is said by who starts LiteLLM, not by who looks.
        pass
    return known


# What LiteLLM finds without a variable -> the variable that is as good as set.
_CREDENTIAL_FILES = (
    ("~/.aws/credentials", "AWS_PROFILE"),
    ("~/.aws/config", "AWS_PROFILE"),
    ("~/.config/gcloud/application_default_credentials.json", "GOOGLE_APPLICATION_CREDENTIALS"),
)


def lacking_credentials(places: Places, config: Config, env: Mapping[str, str],
                        certain: bool = False) -> Dict[str, Tuple[str, ...]]:
    """LiteLLM tier -> names of the variables it lacks; `env`, `certain` as for tier_credentials."""
    tiers = litellm_tiers(config)
    if not tiers:
        return {}
    known = dict(env)
    for path, name in _CREDENTIAL_FILES:
        if os.path.exists(os.path.expanduser(path)):
            known.setdefault(name, path)
    file = read_litellm_file(places, env)
    lacking = {}
    for tier in tiers:
        names = tier_credentials(tier, known, file, certain)
        if names:
            lacking[tier.name] = names
    return lacking


def plan_proxy(places: Places, config: Config, env: Mapping[str, str]) -> Optional[ProxyPlan]:
    """What an engine is to run for hosted tiers; None where there are none, or no LiteLLM.

    Errors: UserError.
    """
    tier = proxy_tier(config)
    if tier is None:
        return None
    program = find_litellm(env, places.data)
    if not program:
        return None
    port = config.litellm_port
    command = litellm_command(program, places, port)
    lacking = lacking_credentials(places, config, env, True)
    # Only what auto may ask is worth a proxy before anybody has asked.
    preload = False
    for hosted in litellm_tiers(config):
        if hosted.role in LADDER_ROLES and hosted.name not in lacking:
            preload = True
    return ProxyPlan(tier, tuple(command), port, PROXY_HEALTH, preload)


def unserved_hosted(places: Places, config: Config, env: Mapping[str, str]) -> Dict[str, str]:
    """LiteLLM tiers that `auto` is to leave alone, with the reason."""
    tiers = litellm_tiers(config)
    if not tiers:
        return {}
    why = INSTALL_LITELLM
    try:
        if find_litellm(env, places.data):
            why = ""
    except UserError as exc:
        why = str(exc)
    if why:
        return {tier.name: why for tier in tiers}
    unserved = {}
    for name, variables in lacking_credentials(places, config, env, True).items():
        unserved[name] = f"missing {', '.join(variables)}"
    return unserved


def _extended_litellm(path: str, program: Sequence[str],
                      wanted: Sequence[Tuple[str, str]]) -> Dict[str, Any]:
    """litellm_config.yaml with what it lacks of `wanted`, as ask_litellm_yaml answers."""
    data = _read_bytes(path)
    if not data:
        if os.path.exists(path) and os.path.getsize(path):
            return {"why": "it cannot be read"}
        try:
            seed = read_shared_text("templates/litellm_config.yaml")
        except UserError as exc:
            return {"why": f"{exc}; {exc.hint}"}
        text = seed + render_litellm_entries(wanted) + "\n"
        return {"text": text, "added": [name for name, _ in wanted]}
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return {"why": "it is not UTF-8"}
    if program:
        return ask_litellm_yaml(program, text, wanted)
    # Where every name stands somewhere in it, nobody is told to put in what is there.
    if all(name in text for name, _ in wanted):
        return {}
    return {"why": "LiteLLM, whose parser that takes, is not installed"}


def write_litellm_config(places: Places, config: Config, program: Sequence[str], say: Say) -> None:
    """Give litellm_config.yaml an entry for each hosted tier without one.

    A file that cannot be extended without a doubt is left alone, and the user shown what to put in.
    Errors: UserError.
    """
    path = litellm_config_path(places)
    wanted = litellm_entries(config)
    fate = "not written"
    if os.path.exists(path):
        fate = "left alone"
    answer = _extended_litellm(path, program, wanted)
    if answer.get("why"):
        entries = render_litellm_entries(wanted)
        say(f"{path} is {fate} ({answer['why']}). See that its model_list has:\n{entries}")
        return
    for difference in litellm_differences(config, parse_litellm_file(answer)):
        say(f"Note: {difference}")
    if not answer.get("added"):
        return
    verb = "Wrote"
    if _read_bytes(path):
        verb = "Extended"
    # What was trusted stays so: the change is ours.
    with trust_lock(places):
        trusted = is_trusted(places, "run")
        write_atomic(path, answer["text"])
        if trusted:
            record_effects(places, "run", part_effects(places, "run"))
    added = ", ".join(answer["added"])
    say(f"{verb} {path}: {added}")


def prepare_hosted(places: Places, config: Config, say: Say, ask: Ask) -> str:
    """What `install` and `start` do for LiteLLM tiers: offer LiteLLM, then give them their entries.

    `ask` answers None without a terminal. Returns why they will not be served, or "".
    Errors: UserError.
    """
    if not litellm_tiers(config):
        return ""
    data = places.data
    program = find_litellm(places.env, data)
    if not program:
        where = environment_dir(LITELLM, data)
        if ask(f"Hosted tiers need {LITELLM.what}. Install it into {where}? [y/N] "):
            install_environment(LITELLM, data, say)
            program = find_litellm(places.env, data)
    write_litellm_config(places, config, program, say)
    if not program:
        return INSTALL_LITELLM
    return ""


def with_ultra(text: bytes, env: Mapping[str, str], data: str) -> bytes:
    """The models.ini a project begins with: code-ultra is on where LiteLLM is there to serve it."""
    try:
        available = bool(find_litellm(env, data))
    except UserError:
        available = False
    if not available:
        return text
    return unfence_ultra(text.decode("utf-8")).encode("utf-8")


# ==================================================================================================
# PARKING
# ==================================================================================================
# What the slots of a model hold is saved before its server stops and restored after its next load,
# so that no conversation is read twice. <data>/parked/ has IDENTITY-N.kv, written by llama-server,
# IDENTITY-N.json beside each, and IDENTITY.off for a model that ignores what is restored.
#
# The life of a conversation: an answer to it is noted, and its request kept as a Talk where reading
# it again would take longer than park_after_s (Bay.note). Before its server stops, and every
# park_every_min of use, its slot is saved under a number that may be another slot's (Numbers); the
# file counts once it is whole (Parking.keep). The next load restores it (Bay.restore), and its next
# request shows whether that is of use (Bay._prove). It goes as it is saved anew, as its room is
# wanted, by `llmstack forget`, or for good where a build ignores it.
#
# Bay knows one loaded model, Parking the directory; Bays of several models share it. A Bay asks its
# server over HTTP, from the engine's threads or one of its own, and never under the engine's lock.
#
# A save catches slots alone, and all but one are empty (b11549 and b11669, four slots): as a task
# begins, every idle slot goes to the host's prompt cache. After conversations of 1,414, 414 and 414
# tokens the slots held 0, 0 and 414. Asking for a prompt again brings it back, 1,410 of its 1,411
# tokens in 2 to 10 ms; so the last requests of long conversations are kept, and asked again for one
# token before the end. --no-cache-idle-slots would leave them in their slots, but what the context
# has no room for is purged without a copy: of four conversations of 414 tokens beside one of 7,614
# in a context of 8,192, three were read again, and by default none.
# A restored slot is found by a prompt that it holds most of, and goes to the host's cache only as
# a task begins: see Bay.make_findable.
# After a restore /slots tells no tokens until the slot is used, and a file stays valid: it is kept
# until its slot is saved anew. A cut file ends the server of b11549, so its ends are looked at.

PARKED_LEAST_FREE_BYTES = 5 * 10 ** 9           # of a disk, not ours to take
PARK_S = 15                                     # for all that one model parks
PULL_S = 2                                      # for one conversation of the host's cache
SAVED_PER_S = 20_000                            # tokens, until a save says: seen 41,000 to 130,000
SURE_SIMILARITY = (1 + SLOT_SIMILARITY) / 2     # of bytes, which are no tokens
LEAST_READ_TOKENS = 128                         # fewer tell nothing of a model's speed...
LEAST_WRITTEN_TOKENS = 16                       # ...nor do fewer of an answer
MAX_TALKS = 8                                   # a loaded model's conversations, and...
MAX_TALK_BYTES = 4 * 1024 * 1024                # ...the longest request of one that is kept
_EDGE_BYTES = 64 * 1024
# Whose values do not change what is saved. (Of 8 checkpoints that a slot was saved with, a server
# that may keep 1 takes back as much of the prompt: sliding windows and a hybrid model, b11669.)
_NOT_IN_KV = (
    "--port",
    "--cache-ram",
    "--ctx-checkpoints",
    "--threads",
    "--slot-prompt-similarity",
    "--slot-save-path",
)

# What a request has no more when it is asked again, for one token and with no stream to read.
_NOT_AGAIN = (
    "max_completion_tokens",
    "n_predict",
    "stream_options",
)


def talk_turns(values: Mapping[str, Any]) -> Union[List[Any], str]:
    """What a request's prompt grows by: a list of messages, or text."""
    for key in ("messages", "input", "prompt"):
        turns = values.get(key)
        if isinstance(turns, (list, str)):
            return turns
    return ""


def beginning(values: Mapping[str, Any], turns: int) -> str:
    """A hash of the first `turns` of a request; "" where it has fewer."""
    said = talk_turns(values)
    if not turns or len(said) < turns:
        return ""
    # A prompt begins with these, wherever the request has them.
    above = list(map(values.get, ("system", "instructions", "tools")))
    text = json.dumps([above, said[:turns]])
    return digest_of(text)


class Talk(NamedTuple):
    """A conversation that a loaded model has answered, as it was asked last."""

    at: float                                   # when, in seconds since 1970
    target: str = ""
    body: bytes = b""
    turns: int = 0                              # messages, or characters of a plain prompt
    begins: str = ""                            # what beginning() says of all these
    prompt: int = 0                             # tokens
    tokens: int = 0                             # of prompt and answer

    def is_in(self, slot_tokens: int) -> bool:
        """Whether a slot with so many tokens holds it: all but the last, which was never read."""
        return slot_tokens in (self.tokens - 1, self.tokens)


class Parked(NamedTuple):
    """A saved slot, as the .json beside its .kv tells it."""

    slot: int = 0
    tokens: int = 0
    edges: str = ""                             # of the .kv, see file_edges
    turns: int = 0                              # of the conversation in it, see Talk
    begins: str = ""
    prompt: int = 0
    body_bytes: int = 0                         # of its last request

    def goes_on_in(self, values: Mapping[str, Any]) -> bool:
        """Whether a request begins with all of its conversation."""
        if not self.begins:
            return False
        return beginning(values, self.turns) == self.begins


def parse_parked(row: Mapping[str, Any]) -> Parked:
    """Errors: KeyError, TypeError, ValueError for what is no row of this version."""
    values = []
    for name, usual in Parked()._asdict().items():
        kind = type(usual)                      # a field's default is of its type
        values.append(kind(row[name]))
    return Parked(*values)


def parked_dir(data: str) -> str:
    return os.path.join(data, "parked")


def parking_flags(data: str) -> List[str]:
    """llama-server's; none where the directory cannot be made, for it does not start without."""
    directory = parked_dir(data)
    try:
        make_private_dir(directory)
    except OSError:
        return []
    return ["--slot-save-path", directory]


def file_edges(path: str) -> str:
    """Tells files apart by their size, beginning and end. Errors: OSError."""
    import hashlib
    digest = hashlib.sha256()
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        digest.update(file.read(_EDGE_BYTES))
        last = max(status.st_size - _EDGE_BYTES, 0)
        file.seek(last)
        digest.update(file.read())
    return f"{status.st_size}-{digest.hexdigest()[:16]}"


def parking_identity(command: Sequence[str], weights: str, env: Mapping[str, str]) -> str:
    """Names all that changes what a saved slot means: build, weights, flags. Errors: OSError."""
    program = command[:command.index("--host")]
    changed = os.stat(weights).st_mtime_ns
    facts = [
        build_stamp(program),
        file_edges(weights),
        str(changed),
    ]
    # llama-server takes each of its flags from the environment, too.
    for name in sorted(env):
        if name.startswith("LLAMA_ARG_"):
            facts.append(f"{name}={env[name]}")
    before = ""
    for word in command:
        if not {before, word}.intersection(_NOT_IN_KV):
            facts.append(word)
        before = word
    return digest_of(*facts)


def parking_notes(data: str) -> Dict[str, str]:
    """Model -> why nothing of it is parked."""
    notes = {}
    directory = parked_dir(data)
    for name in _names_in(directory, ".off"):
        said = _read_json(os.path.join(directory, name))
        model = str(said.get("model"))
        why = str(said.get("why"))
        notes[model] = f"off: {visible(why)}"
    return notes


def forget_parked(data: str) -> int:
    """Delete every parked conversation; returns the bytes. Errors: UserError."""
    freed = 0
    directory = parked_dir(data)
    for name in _names_in(directory):
        path = os.path.join(directory, name)
        freed += file_size(path)
        try:
            os.unlink(path)
        except FileNotFoundError:               # a daemon has saved it anew, or dropped it
            pass
        except OSError as exc:
            raise path_error("delete", path, exc) from None
    return freed


def io_bytes(pid: int, count: str) -> int:
    """What Linux counts of a process: `rchar` it has read, `read_bytes` off disks; elsewhere -1."""
    for line in read_text(f"/proc/{pid}/io").splitlines():
        name, _, number = line.partition(": ")
        if name == count:
            return int(number)
    return -1


def _changed_s(path: str) -> float:
    """When a file was written last, 0.0 for none."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


# Prompts of so many tokens on -> the name of the speed at which they are read.
_READ_NAMES = {
    0: "read",
    8_192: "read8192",
    32_768: "read32768",
    131_072: "read131072",
}


def _read_names(tokens: int) -> List[str]:
    """The names of reading speeds, the one for prompts of so many tokens first."""
    shorter = []
    longer = []
    for least, name in _READ_NAMES.items():
        if least <= tokens:
            shorter.append(name)
        else:
            longer.append(name)
    return [*reversed(shorter), *longer]


class Speeds:
    """What this machine has shown of each model, build and flags: speeds.json.

    "read", "written", "saved" and "restored" are tokens a second, "bytes" those of a saved token,
    "load" and "disk" the seconds of a load, out of memory and off the disk. Reading slows down as
    a prompt grows: "read8192" is that of prompts from so many tokens on. Several processes learn,
    such as a daemon and `probe`: what one has written the others take in.
    """

    def __init__(self, data: str) -> None:
        self._path = os.path.join(data, "speeds.json")
        self._lock = threading.Lock()
        self._rows: Dict[str, Any] = {}         # those used last are the last
        self._news: Dict[str, Any] = {}         # of these, what is not written yet
        self._read_s = 0.0                      # when what has been read was written
        self._take_in()

    def _take_in(self) -> None:
        """Read the file where another process has written it."""
        changed_s = _changed_s(self._path)
        if changed_s == self._read_s:
            return
        with self._lock:
            rows = _read_json(self._path)
            for identity, row in self._news.items():
                rows = newest_rows(rows, identity, row)
            self._rows = rows
            self._read_s = changed_s

    def get(self, identity: str, *names: str) -> float:
        """The first speed known of several names; 0.0 for none."""
        row = dict_of(self._rows.get(identity))
        for name in names:
            found = row.get(name)
            if not isinstance(found, (int, float)):
                continue
            if found > 0:
                return float(found)
        return 0.0

    def note(self, identity: str, model: str, what: str, value: float) -> None:
        """Learn from one answer, load or save: it moves what is known by a third."""
        known = self.get(identity, what) or value
        news = value - known
        learnt = known + news / 3
        with self._lock:
            row = dict_of(self._rows.get(identity))
            row = {**row, "model": model, what: round(learnt, 2)}
            self._rows = newest_rows(self._rows, identity, row)
            self._news = newest_rows(self._news, identity, row)

    def reading(self, identity: str, tokens: int) -> float:
        """Tokens a second of prompts of that size, else of the nearest size known; 0.0: none."""
        if identity not in self._rows:
            return 0.0
        return self.get(identity, *_read_names(tokens))

    def note_answer(self, identity: str, model: str, counts: Counts) -> None:
        """Learn from an answer's timings; too few tokens tell nothing."""
        read_tokens = counts.prompt - counts.cached
        per_s = counts.read_per_s
        if per_s and read_tokens >= LEAST_READ_TOKENS:
            names = _read_names(counts.prompt)
            self.note(identity, model, names[0], per_s)
        per_s = counts.written_per_s
        if per_s and counts.output >= LEAST_WRITTEN_TOKENS:
            self.note(identity, model, "written", per_s)

    def note_load(self, identity: str, model: str, load_s: float, pid: int, weights: str) -> None:
        """Learn how long a load took: off the disk where half of the weights came from there."""
        kind = "load"
        if io_bytes(pid, "read_bytes") > file_size(weights) / 2:
            kind = "disk"
        self.note(identity, model, kind, load_s)

    def load_s(self, identity: str) -> float:
        """Seconds that the next load takes, out of memory where one has been seen; 0.0: unknown."""
        return self.get(identity, "load", "disk")

    def model_of(self, identity: str) -> str:
        """The model that an identity was last of, "" where it is not known."""
        row = dict_of(self._rows.get(identity))
        return str(row.get("model", ""))

    def identity_of(self, model: str) -> str:
        """The identity under which a model was used last; "" where it never was."""
        self._take_in()
        for identity in reversed(list(self._rows)):
            if self.model_of(identity) == model:
                return identity
        return ""

    def keep(self) -> None:
        """Write them down, where there is something new. Errors: UserError."""
        self._take_in()
        with self._lock:
            if not self._news:
                return
            self._news = {}
            text = json.dumps(self._rows, indent=1)
            write_atomic(self._path, text)
            self._read_s = _changed_s(self._path)


def _identity_in(name: str) -> str:
    """IDENTITY-N.kv -> IDENTITY."""
    return name.rpartition("-")[0]


class Parking:
    """The directory of what is parked, its limits, and the speeds that say what is worth it.

    With park_gb = 0 the speeds are learned all the same, and nothing is parked.
    """

    def __init__(self, data: str, config: Config) -> None:
        self.directory = parked_dir(data)
        self.speeds = Speeds(data)
        self.parks = config.park_gb > 0
        self.every_s = config.park_every_min * 60
        self._most_bytes = config.park_gb * 1e9
        self._after_s = config.park_after_s
        self._lock = threading.Lock()           # of the room there is
        if self.parks:
            make_private_dir(self.directory)
        # Half a save, of a daemon that was killed.
        for name in _names_in(self.directory, ".tmp"):
            _remove(self.path(name))

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def slot_path(self, identity: str, slot: int) -> str:
        return self.path(f"{identity}-{slot}.kv")

    def worth(self, identity: str, tokens: int) -> bool:
        """Whether reading so much again would take longer than park_after_s."""
        per_s = self.speeds.reading(identity, tokens)
        if not self.parks or not per_s:
            return False
        again_s = tokens / per_s
        return again_s > self._after_s

    # ---- files

    def off(self, identity: str) -> bool:
        return os.path.exists(self.path(identity + ".off"))

    def turn_off(self, identity: str, model: str, why: str) -> None:
        """Park nothing more under an identity, and drop what is there. Errors: UserError."""
        row = {
            "model": model,
            "why": why,
        }
        write_atomic(self.path(identity + ".off"), json.dumps(row))
        for parked in self.saved(identity):
            self.drop(identity, parked.slot)

    def try_again(self, identity: str, model: str) -> None:
        """What was said of another build of llama.cpp, or other weights, holds no longer."""
        own = identity + ".off"
        for name in _names_in(self.directory, ".off"):
            path = self.path(name)
            said = _read_json(path)
            if name != own and said.get("model") == model:
                _remove(path)

    def saved(self, identity: str) -> List[Parked]:
        """What is there of a model, the last used first, of several at once the longest.

        By length, two long conversations that nobody asks any more would take the context
        from those that are under way.
        """
        found = []
        for name in _names_in(self.directory, ".json"):
            if _identity_in(name) != identity:
                continue
            path = self.path(name)
            try:
                found.append(parse_parked(_read_json(path)))
            except (KeyError, TypeError, ValueError):           # of another version
                _remove(path)

        def age(parked: Parked) -> Tuple[float, int]:
            return self.used(identity, parked.slot), parked.tokens

        return sorted(found, key=age, reverse=True)

    def rows(self) -> List[Dict[str, Any]]:
        """What is parked of every model, the last used first: counts, bytes, a time, no text."""
        rows = []
        names = _names_in(self.directory, ".json")
        for identity in set(map(_identity_in, names)):
            for parked in self.saved(identity):
                path = self.slot_path(identity, parked.slot)
                rows.append({
                    "tier": self.speeds.model_of(identity),
                    "tokens": parked.tokens,
                    "turns": parked.turns,
                    "bytes": file_size(path),
                    "used": round(_changed_s(path)),
                })
        return sorted(rows, key=lambda row: -row["used"])

    def intact(self, identity: str, parked: Parked) -> bool:
        """Whether its file has the beginning and the end that it was kept with."""
        try:
            edges = file_edges(self.slot_path(identity, parked.slot))
        except OSError:
            return False
        return edges == parked.edges

    def keep(self, identity: str, parked: Parked, temporary: str, used: float) -> None:
        """Take a file that has been written whole, `used` last then. Errors: OSError, UserError."""
        os.chmod(temporary, 0o600)
        os.utime(temporary, (used, used))
        stem = self.path(f"{identity}-{parked.slot}")
        row = json.dumps(parked._asdict())
        # This one first: a .kv of which nothing is known is never restored.
        write_atomic(stem + ".json", row)
        replace_file(temporary, stem + ".kv")
        self.make_room()

    def _drop_stem(self, stem: str) -> None:
        _remove(self.path(stem + ".kv"))
        _remove(self.path(stem + ".json"))

    def drop(self, identity: str, slot: int) -> None:
        self._drop_stem(f"{identity}-{slot}")

    def used(self, identity: str, slot: int) -> float:
        """When a parked conversation was last answered, in seconds since 1970; 0.0: it is gone."""
        return _changed_s(self.slot_path(identity, slot))

    def make_room(self, more_bytes: float = 0.0) -> bool:
        """Drop the longest unused until the rest fits; False, and none, where it never will."""
        import shutil
        with self._lock:
            files = []
            total = 0
            for name in _names_in(self.directory, ".kv"):
                status = os.stat(self.path(name))
                size = status.st_size
                files.append((status.st_mtime_ns, name, size))
                total += size
            # What is parked already may be dropped for it, so its bytes count as free.
            free = shutil.disk_usage(self.directory).free + total
            room = min(self._most_bytes, free - PARKED_LEAST_FREE_BYTES)
            if more_bytes > room:
                return False
            for _, name, size in sorted(files):                 # the longest unused first
                if total + more_bytes <= room:
                    break
                self._drop_stem(name[:-len(".kv")])
                total -= size
        return True


def open_parking(data: str, config: Config, log: Log) -> Optional[Parking]:
    """The parking of a data directory; None where there can be none."""
    try:
        return Parking(data, config)
    except OSError as exc:
        log.warning(f"no conversation is parked: {exc}")
        return None


def model_pace(parking: Parking, identity: str, tokens: int) -> Pace:
    """What is known of a model that is not loaded, with a prompt of so many tokens."""
    is_worth = parking.worth(identity, tokens)
    return Pace(
        read_per_s=parking.speeds.reading(identity, tokens),
        load_s=parking.speeds.load_s(identity),
        keeps=is_worth and not parking.off(identity),
    )


class Slot(NamedTuple):
    """A slot of a running llama-server."""

    number: int
    tokens: int                                 # that it holds
    is_busy: bool


class Numbers:
    """Under which number a slot is saved, and so into which slot it comes back."""

    def __init__(self, slots: Sequence[int], saved: Sequence[Parked]) -> None:
        self._slots = slots
        self._saved = saved                     # the last used first
        self.used: List[int] = []               # in this round

    def left(self) -> List[int]:
        return [slot for slot in self._slots if slot not in self.used]

    def choose(self, slot: int, talk: Talk) -> int:
        """Its conversation's own, else its slot's, else one without a file, else the oldest file's.

        The file of its slot may hold another conversation, which was restored there and has left
        for the host's cache as this one was asked.
        """
        values = parse_json_object(talk.body)
        left = self.left()
        kept = [parked for parked in self._saved if parked.slot in left]
        for parked in kept:
            if parked.goes_on_in(values):
                return parked.slot
        taken = [parked.slot for parked in kept]
        empty = [number for number in left if number not in taken]
        if slot in empty or not left:
            return slot
        if empty:
            return empty[0]
        return taken[-1]


class Bay:
    """The parking of one loaded model: restores its slots, watches its answers, saves its slots."""

    def __init__(self, parking: Parking, tier: Tier, identity: str, upstream: Upstream,
                 log: Log) -> None:
        self._parking = parking
        self._speeds = parking.speeds
        self._name = tier.name
        self._context = tier.ctx_size
        self.identity = identity
        self._upstream = upstream
        self._log = log
        self.parks = parking.parks              # its server may know nothing of it
        self.tokens = 0                         # of the last answer, with its prompt
        self._lock = threading.Lock()           # of the three below
        self._talks: List[Talk] = []            # the one asked last is the last
        self._restored: List[Parked] = []       # until the first answer has proved it
        self._asked = 0                         # requests
        self._saving = threading.Lock()
        self._saved_at = self._answered_at = time.monotonic()

    def _warn(self, words: str) -> None:
        self._log.warning(f"{self._name}: {words}")

    def _learn(self, what: str, value: float) -> None:
        self._speeds.note(self.identity, self._name, what, value)

    def _is_worth(self, tokens: int) -> bool:
        return self._parking.worth(self.identity, tokens)

    def fresh(self) -> bool:
        """Whether no slot has been used yet. Errors: OSError, ValueError."""
        slots = self._slots()
        return not any(slot.tokens or slot.is_busy for slot in slots)

    def _restore_file(self, parked: Parked) -> int:
        """The status with which a parked conversation is restored; 0 for no answer."""
        name = f"{self.identity}-{parked.slot}.kv"
        try:
            status, _ = self._ask_slot(parked.slot, "restore", name, PARK_S)
        except (OSError, ValueError):
            return 0
        return status

    def restore(self) -> bool:
        """Fill a fresh server's slots; False where it went silent over a file, now gone."""
        parking = self._parking
        identity = self.identity
        parking.try_again(identity, self._name)
        began = time.monotonic()
        tokens = 0
        for parked in parking.saved(identity):
            if not parking.intact(identity, parked):
                parking.drop(identity, parked.slot)
                continue
            # It would throw out one that is back already.
            if tokens + parked.tokens > self._context:
                continue
            status = self._restore_file(parked)
            if status == 200:
                self._restored.append(parked)
                tokens += parked.tokens
                continue
            self._warn("a parked conversation is dropped, its restore is answered"
                       f" {status or 'not at all'}")
            parking.drop(identity, parked.slot)
            if not status:
                return False
        count = len(self._restored)
        if count:
            took_s = time.monotonic() - began
            per_s = tokens / max(took_s, 1e-3)
            self._learn("restored", per_s)
            self._log.info(f"{self._name}: restored {tokens:,} tokens of {count} conversations"
                           f" in {took_s:.2f} s")
        return True

    def wants(self, body_bytes: int) -> bool:
        """Whether a request of that size, about to be asked, may be one to keep."""
        with self._lock:
            self._asked += 1
        if body_bytes > MAX_TALK_BYTES or not self.parks:
            return False
        # What is not known yet this request may teach.
        is_known = self._speeds.reading(self.identity, 0)
        if self._restored or not is_known:
            return True
        most_tokens = body_bytes // 2
        return self._is_worth(most_tokens)

    def make_findable(self, body: bytes) -> None:
        """Make a restored conversation findable for `body`, the first to be asked after a load.

        llama-server looks for a prompt in the slots that hold SLOT_SIMILARITY of it, then in the
        host's cache. A restored slot that holds less, for a tool has said a lot meanwhile, goes
        there only as a task begins: one of a single token, here.
        """
        with self._lock:
            if self._asked > 1:
                return
            restored = self._restored
        least_bytes = SURE_SIMILARITY * len(body)
        short = [parked for parked in restored if parked.body_bytes < least_bytes]
        if not short:                           # as nearly always: the body is not read again
            return
        values = parse_json_object(body)
        if not any(parked.goes_on_in(values) for parked in short):
            return
        task = b'{"prompt": "a", "n_predict": 1, "cache_prompt": false}'
        try:
            self._upstream.get("/completion", PARK_S, "POST", JSON_LINE, body=task)
        except (OSError, ValueError) as exc:
            self._warn(f"what was restored may be read again: {exc}")

    def note(self, target: str, body: bytes, counts: Counts) -> None:
        """Learn from an answer: the model's speed, a conversation, whether a restore has held."""
        self._answered_at = time.monotonic()
        self._speeds.note_answer(self.identity, self._name, counts)
        self.tokens = counts.prompt + counts.output
        with self._lock:
            restored = self._restored
            self._restored = []
            if self._asked > 1:                 # the other one may have taken its place
                restored = []
        if not body:                            # wants() has told that there is no use in it
            return
        is_worth = self._is_worth(counts.prompt)
        if not (is_worth or restored):
            return
        values = parse_json_object(body)
        self._prove(restored, values, counts)
        turns = len(talk_turns(values))
        if not turns or not is_worth:
            return
        talk = Talk(
            at=time.time(),
            target=target,
            body=body,
            turns=turns,
            begins=beginning(values, turns),
            prompt=counts.prompt,
            tokens=self.tokens,
        )
        with self._lock:
            # What a conversation was before is the beginning of what it is now.
            talks = [t for t in self._talks if beginning(values, t.turns) != t.begins]
            talks.append(talk)
            self._talks = talks[-MAX_TALKS:]

    def _prove(self, restored: Iterable[Parked], values: Mapping[str, Any],
               counts: Counts) -> None:
        """Park nothing more of a model that reads again what was restored for this request."""
        for parked in restored:
            least = parked.prompt // 10
            is_used = counts.cached >= least
            # A slot that holds less is found through the host's cache alone, if that had room.
            is_found = parked.tokens > SLOT_SIMILARITY * counts.prompt
            if is_used or not is_found:
                continue
            if not parked.goes_on_in(values):
                continue
            why = (f"{counts.cached:,} of {parked.prompt:,} restored tokens were used by this build"
                   " of llama.cpp")
            self._warn(f"nothing is parked any more: {why}")
            try:
                self._parking.turn_off(self.identity, self._name, why)
            except UserError as exc:
                self._log.warning(str(exc))

    def pace(self, tokens: int) -> Pace:
        """What is known of the model with a prompt of so many tokens, now that it is loaded."""
        cold = model_pace(self._parking, self.identity, tokens)
        return cold._replace(loaded=True)

    def back_s(self) -> float:
        """Seconds until what the model holds now would be there again, after its next load."""
        per_s = self._speeds.reading(self.identity, self.tokens)
        if self.parks and self._is_worth(self.tokens):
            per_s = self._speeds.get(self.identity, "restored") or SAVED_PER_S
        if not per_s:
            return 0.0
        return self.tokens / per_s

    def save_when_due(self) -> None:
        """Save in a thread what has been in use for so long; for idle models, every second."""
        has_news = self._answered_at > self._saved_at
        if not self.parks or not has_news:
            return
        now = time.monotonic()
        waited_s = now - self._saved_at
        if 0 < self._parking.every_s < waited_s:
            self._saved_at = now
            in_background(f"park {self._name}", self.save, False)

    def save(self, ending: bool) -> None:
        """Save what is worth it, the longest first; `ending`: also out of the host's prompt cache.

        Not `ending`: only what takes under a second.
        """
        # One at a time: a save in use and the one at the end would write the same files.
        with self._saving:
            try:
                is_off = self._parking.off(self.identity)
                if self.parks and not is_off:
                    self._save_all(ending)
                self._speeds.keep()
            except (OSError, ValueError, UserError) as exc:
                self._warn(f"not parked: {exc}")

    def _save_all(self, ending: bool) -> None:
        began = time.monotonic()
        end = began + 1                         # requests may be coming
        if ending:
            end = began + PARK_S
        slots = self._slots()
        saved = self._parking.saved(self.identity)
        numbers = Numbers([slot.number for slot in slots], saved)
        elsewhere = self._save_held(slots, numbers, ending, end)
        # To bring one out of the cache takes a slot, which nobody else may be using.
        is_busy = any(slot.is_busy for slot in slots)
        if ending and not is_busy:
            self._save_cached(elsewhere, numbers, end)
        count = len(numbers.used)
        if count:
            took_s = time.monotonic() - began
            self._log.info(f"{self._name}: parked {count} conversations in {took_s:.2f} s")

    def _save_held(self, slots: Sequence[Slot], numbers: Numbers, ending: bool,
                   end: float) -> List[Talk]:
        """Save what the slots hold; the conversations that none of them holds."""
        per_s = self._speeds.get(self.identity, "saved") or SAVED_PER_S
        unknown = Talk(time.time())
        with self._lock:
            talks = self._talks[::-1]           # of two that are as long, the last is in the slot
        for slot in slots:
            talk = unknown
            held = [talk for talk in talks if talk.is_in(slot.tokens)]
            if held:
                talk = held[0]
                talks.remove(talk)
            is_quick = slot.tokens / per_s < 1
            if slot.is_busy or not (ending or is_quick):
                continue
            if self._is_worth(slot.tokens):
                self._save_slot(slot, talk, numbers, end)
        return talks

    def _save_cached(self, talks: Sequence[Talk], numbers: Numbers, end: float) -> None:
        """Save what the host's cache has, as long as there are numbers.

        Where one is there no more, the others are older, and looking for them costs seconds.
        """
        for talk in sorted(talks, key=lambda talk: -talk.prompt):
            if not numbers.left():
                break
            slot = self._pull(talk, end)
            if slot is None:
                break
            self._save_slot(slot, talk, numbers, end)

    def _slots(self) -> List[Slot]:
        """The slots of its server, the longest first. Errors: OSError, ValueError."""
        _, said = self._upstream.get("/slots", 2.0)
        rows = json.loads(said)
        if not isinstance(rows, list):
            raise ValueError("llama-server tells nothing of its slots")
        found = []
        for row in map(dict_of, rows):
            number = row.get("id")
            if isinstance(number, int):
                tokens = _quantity(row.get("n_prompt_tokens"))
                found.append(Slot(
                    number=number,
                    tokens=tokens,
                    is_busy=row.get("is_processing") is True,
                ))
        return sorted(found, key=lambda slot: -slot.tokens)

    def _ask_slot(self, slot: int, action: str, name: str,
                  timeout_s: float) -> Tuple[int, Dict[str, Any]]:
        """(status, answer) of a save or a restore. Errors: OSError, ValueError."""
        body = json.dumps({"filename": name}).encode()
        path = f"/slots/{slot}?action={action}"
        response, said = self._upstream.get(path, timeout_s, "POST", body=body)
        return response.status, parse_json_object(said)

    def _save_slot(self, slot: Slot, talk: Talk, numbers: Numbers, end: float) -> None:
        """Save a slot under a number that is left.

        It may take as long as reading it again would, no longer.
        """
        parking = self._parking
        identity = self.identity
        number = numbers.choose(slot.number, talk)
        name = f"{identity}-{number}.tmp"
        temporary = parking.path(name)
        began = time.monotonic()
        tokens = slot.tokens
        per_s = self._speeds.reading(identity, tokens) or 1.0
        timeout_s = min(tokens / per_s, end - began)
        timeout_s = max(timeout_s, 0.1)
        bytes_each = self._speeds.get(identity, "bytes")
        try:
            if not parking.make_room(tokens * bytes_each):
                return
            saved = self._write_slot(slot.number, name, timeout_s)
            took_s = time.monotonic() - began
            size = file_size(temporary)
            self._learn("bytes", size / saved)
            self._learn("saved", saved / took_s)
            self._drop_older(number, talk)
            parked = Parked(
                slot=number,
                tokens=saved,
                edges=file_edges(temporary),
                turns=talk.turns,
                begins=talk.begins,
                prompt=talk.prompt,
                body_bytes=len(talk.body),
            )
            parking.keep(identity, parked, temporary, talk.at)
            numbers.used.append(number)
        except (OSError, ValueError, UserError) as exc:
            self._warn(f"a conversation is not parked: {exc}")
        finally:
            _remove(temporary)

    def _write_slot(self, slot: int, name: str, timeout_s: float) -> int:
        """Have llama-server write a slot to a file; the tokens in it.

        Errors: OSError, ValueError where it does not come out whole.
        """
        status, said = self._ask_slot(slot, "save", name, timeout_s)
        saved = _quantity(said.get("n_saved"))
        size = file_size(self._parking.path(name))
        # On a full disk llama-server may say 200 and have written less.
        is_whole = size == said.get("n_written")
        if status != 200 or not is_whole or not saved:
            raise ValueError(f"llama-server says {status}, {size:,} bytes are written")
        return saved

    def _drop_older(self, number: int, talk: Talk) -> None:
        """An older state of the same conversation, in another slot's file, would take its room."""
        values = parse_json_object(talk.body)
        for parked in self._parking.saved(self.identity):
            if parked.slot == number:
                continue
            if parked.goes_on_in(values):
                self._parking.drop(self.identity, parked.slot)

    def _pull(self, talk: Talk, end: float) -> Optional[Slot]:
        """Bring a conversation from the host's cache into a slot; None where it is not there."""
        values = parse_json_object(talk.body)
        for name in _NOT_AGAIN:
            values.pop(name, None)
        limit = "max_tokens"
        if "/responses" in talk.target:
            limit = "max_output_tokens"
        values[limit] = 1
        values["stream"] = False
        body = json.dumps(values).encode()
        left_s = end - time.monotonic()
        left_s = max(left_s, 0.1)
        timeout_s = min(PULL_S, left_s)
        try:
            self._upstream.get(talk.target, timeout_s, "POST", JSON_LINE, body=body)
        except (OSError, ValueError):           # it was not there, and is being read
            return None
        asked = talk._replace(tokens=talk.prompt + 1)
        for slot in self._slots():
            if not slot.is_busy and asked.is_in(slot.tokens):
                return slot._replace(tokens=talk.prompt)
        return None


# ==================================================================================================
# ENGINE
# ==================================================================================================
# The room of llama-servers within the memory there is: who is loaded, who waits, who has to go. It
# starts and stops servers, and asks them whether they are well; which tier a request is for was
# decided before, and what is said to a client goes through a Lease.
#
# A model is "stopped", then "starting" once there is room for it, "ready" once its server is
# healthy and has back what was parked, "stopping" when it is idle for too long, unloaded or in the
# way of another, and "stopped" again. A load that fails or is no longer wanted ends as "stopped".
#
# A request's thread only looks, queues and counts: a Ticket polls try_enter, which begins a load
# where it can. Each load has a thread (Engine._load): it stops who has to go, starts the server,
# waits and restores. Each stop has one (Engine._stop): it parks, then ends the server. The
# listener's loop unloads once a second what was idle for its ttl; MemoryWatch has a thread, and
# unloads what is idle while memory is short.
#
# One lock, Engine._lock, guards the models and the queue; who waits for either waits on _changed,
# its condition. No server is asked and no process waited for under it. While a model is "starting"
# or "stopping" its process belongs to that thread: others may only set `cancelled`.


class Model:
    """One tier's llama-server. All fields belong to the engine's lock."""

    def __init__(self, tier: Tier, gb: float, proxy: Optional[ProxyPlan] = None) -> None:
        self.tier = tier
        self.gb = gb
        self.needs: Needs = (gb,)               # of each memory
        self.memory: Optional[Memory] = None    # what that is made of, where its header is known
        self.cost = tier_cost(tier, 0.0)        # of a load, until one has been seen
        self.proxy = proxy                      # LiteLLM's: no memory that counts, its own port
        self.state = "stopped"                  # stopped | starting | ready | stopping
        self.since = time.monotonic()
        self.in_flight = 0
        self.last_used = 0.0
        self.process: Any = None
        self.started = ""
        self.port = 0
        self.command: List[str] = []
        self.upstream: Optional[Upstream] = None
        self.cancelled = False                  # to be unloaded as soon as its load notices
        self.listening = False                  # while it loads: its server answers already
        self.failure = ""
        self.failed_at = -1e9
        self.loads = 0
        self.evictions = 0
        self.bay: Optional[Bay] = None          # while it is ready, where it is parked
        self.identity = ""                      # of its last load, see parking_identity
        self.context = 0                        # tokens a conversation, as its last server said
        self.load_s = 0.0                       # how long its last load took

    @property
    def name(self) -> str:
        return self.tier.name

    @property
    def is_idle(self) -> bool:
        return self.state == "ready" and not self.in_flight

    def turn_to(self, state: str) -> None:
        self.state = state
        self.since = time.monotonic()


def _model_of(tier: Tier, fit: Optional[TierFit]) -> Model:
    """The model of a local tier: it takes what was measured, else what its file's size says."""
    if fit is None:
        weights = weights_for(tier)
        size_gb = weights.size_gb or file_size(weights.path) / 1e9
        return Model(tier, footprint_gb(size_gb))
    model = Model(tier, fit.need_gb)
    model.needs = fit.needs
    memory = fit.memory
    if memory is not None:
        model.memory = memory
        model.cost = tier_cost(tier, memory.weights / 1e9)
    return model


# What the states of a model are called where people read them.
STATE_WORDS = {
    "stopped": "not loaded",
    "starting": "loading",
    "ready": "loaded",
    "stopping": "unloading",
}


OWN_READ_BYTES = 16 << 20                       # a program reads as much before its model, or less


def read_share(pid: int, command: Sequence[str], paths: Sequence[str]) -> float:
    """The share of its model's files that a loading server has read, 0.0 where that is not known.

    Linux counts what a process has read; a file that is mapped counts for nothing, and one that is
    read to its end says nothing of what is left to do. Measured with b11549: 101.3 MB of 98.4, of
    which 3 MB are the program's own.
    """
    is_copied = "--no-mmap" in command or "--load-mode none" in " ".join(command)
    if not is_copied:
        return 0.0
    read_bytes = io_bytes(pid, "rchar")
    size_bytes = sum(map(file_size, paths))
    if OWN_READ_BYTES < read_bytes < size_bytes:
        return read_bytes / size_bytes
    return 0.0


class _Cancelled(Exception):  # noqa: N818
    """A load is no longer wanted: it was unloaded meanwhile, or the engine is closing."""


class Ticket(Lease):
    """A request that waits for a model of the engine, and then is one of its requests."""

    def __init__(self, engine: Engine, model: Model) -> None:
        super().__init__()
        self.model = model
        self.since = time.monotonic()
        self.blocked_by: Set[str] = set()       # models that must become idle first
        self._engine = engine
        self._entered = False

    def ready(self) -> bool:
        if not self._engine.try_enter(self):
            return False
        # Now the model counts this request, and keeps its server until end().
        self._entered = True
        model = self.model
        self.upstream = model.upstream
        self.bay = model.bay
        if model.since > self.since:            # it has become ready meanwhile
            self.load_s = min(model.load_s, model.since - self.since)
        return True

    def wait(self, seconds: float) -> None:
        self._engine.wait(seconds)

    def stage(self) -> str:
        if self._entered:
            return ""
        return self._engine.stage(self)

    def prompt_read(self) -> float:
        if self._entered:
            return self._engine.prompt_read(self.model)
        return 0.0

    def end(self) -> None:
        if self._entered:
            self._engine.leave(self.model)
        else:
            self._engine.dequeue(self)


class EnginePlan(NamedTuple):
    """What an engine goes by, besides its configuration."""

    env: Mapping[str, str]                      # of what it starts
    budget_gb: float
    first_port: int = FIRST_SERVER_PORT
    fits: Sequence[TierFit] = ()                # what tiers take, as far as it is known
    proxy: Optional[ProxyPlan] = None           # for hosted tiers
    parking: Optional[Parking] = None
    budgets_gb: Needs = ()                      # of each memory; (): there is one


class Capacity(NamedTuple):
    """What a server holds at once: conversations, and the tokens of each; 0 where it tells none."""

    slots: int = 0
    tokens: int = 0


def told_capacity(tier: Tier, server: Upstream, log: Log) -> Capacity:
    """What a ready server says of itself: slots may share ctx_size, or fewer tokens fit."""
    told = asked_json(server, "/props")
    settings = dict_of(told.get("default_generation_settings"))
    tokens = _quantity(settings.get("n_ctx"))
    if 0 < tokens < tier.ctx_size:
        log.warning(f"{tier.name}: its server holds {tokens:,} tokens a conversation,"
                    f" ctx_size says {tier.ctx_size:,}")
    return Capacity(_quantity(told.get("total_slots")), tokens)


class Engine:
    """Starts and stops llama-server processes so that what is loaded fits in memory.

    A busy or loading model is never evicted: who needs its memory queues. Memory is freed before it
    is taken. A load goes on when the client that asked for it leaves; the model is wanted, and half
    a load is a waste.
    """

    def __init__(self, config: Config, command: Callable[[Tier, int], List[str]], log: Log,
                 log_path: Callable[[str], str], plan: EnginePlan) -> None:
        self.config = config
        self._command = command
        self._log = log
        self._log_path = log_path
        self._plan = plan
        self._parking = plan.parking
        # Servers of models on this machine ask no provider.
        self._local_env = without_credentials(plan.env)
        self._budgets_gb = plan.budgets_gb or (plan.budget_gb,)
        fits = {fit.name: fit for fit in plan.fits}
        needs = {fit.name: fit.needs for fit in plan.fits}
        self._sets = residency_sets(config, needs or None, self._budgets_gb)
        models = [_model_of(tier, fits.get(tier.name)) for tier in local_tiers(config)]
        if plan.proxy:
            models.append(Model(plan.proxy.tier, 0.0, plan.proxy))
        self.models = {model.name: model for model in models}
        # Aliases, too: all that clients ask for.
        self._by_name = {name: model for model in models for name in model.tier.names}
        self._lock = threading.RLock()          # of all models and of what follows
        self._changed = threading.Condition(self._lock)
        self._tickets: List[Ticket] = []        # who waits, the longest first
        self._closing = False
        self._epoch = time.time() - time.monotonic()
        self.pressure = ""                      # why no more memory is taken than now, or ""

    def find(self, name: str) -> Optional[Model]:
        return self._by_name.get(name)

    # ---- for requests

    def lease(self, name: str) -> Ticket:
        """A place for a request to a tier. Errors: HttpError 404."""
        model = self.find(name)
        if model is None:
            known = ", ".join(self.models) or "none"
            what = f"no model {name!r}"
            if not name:
                what = "no model named in the request"
            raise HttpError(404, f"{what}; there are: {known}", "not_found")
        return Ticket(self, model)

    def try_enter(self, ticket: Ticket) -> bool:
        """True when the ticket's model is ready and now counts this request.

        Else the ticket queues, and what can be done for it is begun. Errors: LoadError, when it
        cannot be loaded.
        """
        model = ticket.model
        process = model.process
        # poll() is a system call, so it stands before the lock.
        died = process is not None and process.poll() is not None
        with self._lock:                        # half the cost of the condition's own `with`
            if self._closing:
                raise LoadError("the engine is stopping")
            if died and model.state == "ready" and model.process is process:
                self._log.warning(f"{model.name}: its server has died"
                                  f" (exit {process.returncode}); starting it again")
                self._forget(model)
            if model.state == "ready" and not (self._tickets and self._must_yield(ticket)):
                self._unqueue(ticket)
                model.in_flight += 1
                model.last_used = time.monotonic()
                return True
            self._queue(ticket)
            if model.state == "stopped":
                self._load_where_room(ticket)
            return False

    def _load_where_room(self, ticket: Ticket) -> None:
        """Begin to load a ticket's model where nothing busy has to go. Errors: LoadError."""
        model = ticket.model
        # What has just failed would fail again, and each try takes others' memory.
        if time.monotonic() - model.failed_at < FAILED_LOAD_S:
            raise LoadError(model.failure)
        victims = self._room_for(ticket)
        if victims is not None:
            self._begin_load(model, victims)

    def wait(self, seconds: float) -> None:
        with self._lock:
            self._changed.wait(seconds)

    def stage(self, ticket: Ticket) -> str:
        """What a ticket waits for, in words."""
        with self._lock:
            model, name = ticket.model, ticket.model.name
            if model.state == "starting":
                return self._loading_stage(model)
            if model.state == "ready":
                return f"queued for {name} behind who has waited longer"
            busy = sorted(ticket.blocked_by)
            if busy:
                return f"waiting for {', '.join(busy)} to finish before {name} can load"
            return f"waiting for {name} to stop before it can load again"

    def _loading_stage(self, model: Model) -> str:
        """How far the load of a model is. Whoever holds the lock asks."""
        name = model.name
        leaving = [m.name for m in self.models.values() if m.state == "stopping"]
        # Whoever has to go is gone before the server is started.
        if leaving and model.process is None:
            names = ", ".join(leaving)
            return f"unloading {names} to load {name}"
        doing = "loading"
        if self._is_downloading(model):
            doing = "downloading"
        share = self._loaded(model)
        return f"{doing} {name}{percent_words(share)}"

    def _is_downloading(self, model: Model) -> bool:
        """Whether a starting model's server fetches it first; it does not listen before."""
        return not model.listening and not self._is_here(model)

    def _loaded(self, model: Model) -> float:
        """The share of a model's load, or download, that is done; 0.0 where that is not known."""
        process = model.process
        if model.proxy or process is None:
            return 0.0
        weights = weights_for(model.tier)
        if self._is_downloading(model):
            return downloaded_share(weights, self._local_env)
        paths = local_parts(weights, self._local_env)
        return read_share(process.pid, model.command, paths)

    def prompt_read(self, model: Model) -> float:
        """The share of its prompt that a model's only request has read; its log tells, alone."""
        # The log numbers requests by itself: of several, none can be told to be this one.
        if model.proxy or model.in_flight != 1:
            return 0.0
        return prompt_read(tail_of(self._log_path(model.name), 200))

    def _is_here(self, model: Model) -> bool:
        """False for a model that its server must download first."""
        return bool(model.proxy or self._cached(model))

    def _cached(self, model: Model) -> str:
        """The first file of a model, "" where not all of it is on this disk."""
        return cached_model(weights_for(model.tier), self._local_env)

    def _queue(self, ticket: Ticket) -> None:
        if ticket not in self._tickets:
            self._tickets.append(ticket)

    def _unqueue(self, ticket: Ticket) -> None:
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self._changed.notify_all()

    def enqueue(self, model: Model) -> Ticket:
        """A ticket that queues before its model has been looked at."""
        with self._lock:
            ticket = Ticket(self, model)
            self._queue(ticket)
            return ticket

    def dequeue(self, ticket: Ticket) -> None:
        with self._lock:
            self._unqueue(ticket)

    def leave(self, model: Model) -> None:
        with self._lock:
            model.in_flight -= 1
            model.last_used = time.monotonic()
            if self._tickets:
                self._changed.notify_all()

    def _must_yield(self, ticket: Ticket) -> bool:
        """A newcomer to a model that someone has long waited to see idle queues behind them."""
        name = ticket.model.name
        fair_since = time.monotonic() - FAIR_WAIT_S
        # A ticket that is older than theirs was here first.
        fair_since = min(fair_since, ticket.since)
        since = [other.since for other in self._tickets if name in other.blocked_by]
        return min(since, default=fair_since) < fair_since

    def _room_for(self, ticket: Ticket) -> Optional[List[Model]]:
        """The models to stop before the ticket's can load; None while one of them may not be.

        Errors: LoadError.
        """
        if ticket.model.proxy:
            return []
        leaving: Set[str] = set()
        running: List[Model] = []
        for model in self.models.values():
            # LiteLLM's proxy takes no memory that counts.
            if model.proxy or model.state == "stopped":
                continue
            if model.state == "stopping":
                leaving.add(model.name)
            else:
                running.append(model)
        busy = self._busy_names(ticket, running)
        victims = self._victims(ticket.model, running, busy)
        # What is leaving makes room as it is: whether that is enough is known once it is gone.
        ticket.blocked_by = leaving | busy.intersection(victims)
        if ticket.blocked_by:
            return None
        return [self.models[name] for name in victims]

    def _busy_names(self, ticket: Ticket, running: Sequence[Model]) -> Set[str]:
        """What may not be stopped for a ticket now."""
        busy = {m.name for m in running if not m.is_idle}
        # Who has waited longer for a model that runs is to find it loaded.
        for other in self._tickets:
            if other is ticket:
                break
            busy.add(other.model.name)
        return busy

    def _victims(self, model: Model, running: Sequence[Model], busy: Set[str]) -> List[str]:
        """What has to go before a model can load, busy or not. Errors: LoadError."""
        limits_gb = self._limits_gb(model, running)
        costs = {m.name: self._keeping_cost(m) for m in running}

        def reluctance(other: Model) -> Tuple[bool, float, float]:
            return other.name in busy, costs[other.name], other.last_used

        # Idle ones first, of these the cheapest to bring back.
        order = sorted(running, key=reluctance)
        needs = {m.name: m.needs for m in order}
        names = list(needs)
        victims = choose_evictions(model.name, names, self._sets, costs)
        for name in victims:
            del needs[name]
        while not fits_together([model.needs, *needs.values()], limits_gb):
            name = next(iter(needs))
            del needs[name]
            victims.append(name)
        return victims

    def _limits_gb(self, model: Model, running: Sequence[Model]) -> Needs:
        """What may be taken of each memory. Errors: LoadError where a model alone needs more."""
        budgets_gb = self._budgets_gb
        alone = [model.needs]
        words = f"{model.name} needs about {gb_words(model.needs)}"
        if not fits_together(alone, budgets_gb):
            budget = gb_words(budgets_gb)
            raise LoadError(f"{words} and the budget is {budget} (memory_gb in models.ini)")
        if not self.pressure:
            return budgets_gb
        # While memory is short, no more than is held now.
        nothing = (0.0,) * len(budgets_gb)
        held = [m.needs for m in running]
        held_gb = needs_together([nothing, *held])
        if not fits_together(alone, held_gb):
            raise LoadError(f"{words}, and {self.pressure}")
        return held_gb

    # ---- loading and unloading

    def _begin_load(self, model: Model, victims: List[Model]) -> None:
        model.turn_to("starting")
        model.cancelled = False
        model.listening = False
        for victim in victims:
            victim.turn_to("stopping")
        in_background(f"load {model.name}", self._load, model, victims)

    def _load(self, model: Model, victims: Sequence[Model]) -> None:
        """A load's whole thread; however it ends, its model is not "starting" for ever."""
        try:
            for victim in victims:
                self._log.info(f"{victim.name}: unloading to make room for {model.name}")
                self._stop(victim)
                victim.evictions += 1
            self._bring_up(model)
        except _Cancelled:
            self._log.info(f"{model.name}: unloaded while it was loading")
            self._stop(model)
        except LoadError as exc:
            why = str(exc)
            self._log.error(why)
            self._give_up(model, why)
        except Exception:
            import traceback
            self._log.error(traceback.format_exc())
            self._give_up(model, f"{model.name} could not be started; see the log")
        finally:
            with self._lock:
                self._changed.notify_all()

    def _bring_up(self, model: Model) -> None:
        """Start a model with what was parked of it. Errors: LoadError, _Cancelled."""
        began = time.monotonic()
        self._start(model)
        load_s = time.monotonic() - began
        while not self._restore(model):
            self._start(model)
        if self._parking is not None and model.bay is not None:
            speeds = self._parking.speeds
            path = self._cached(model)
            pid = model.process.pid
            speeds.note_load(model.identity, model.name, load_s, pid, path)
        self._learn_context(model)
        with self._lock:
            # It may have become unwanted in the moment it became healthy.
            self._check_wanted(model)
            asked = model.since
            model.turn_to("ready")
            model.loads += 1
            model.last_used = model.since
            model.load_s = model.since - asked
            self._log.info(f"{model.name}: ready on port {model.port} after {model.load_s:.1f} s")

    def pace(self, name: str, tokens: int) -> Pace:
        """What is known of a tier with a prompt of so many tokens."""
        parking = self._parking
        model = self.models.get(name)
        if model is None or parking is None:
            return Pace()
        bay = model.bay
        # A bay that is being emptied tells nothing any more.
        if bay is not None and model.state == "ready":
            return bay.pace(tokens)
        # Of a model that this engine has not loaded yet, an earlier one may have learnt.
        identity = model.identity
        if not identity:
            identity = parking.speeds.identity_of(name)
        return model_pace(parking, identity, tokens)

    def _keeping_cost(self, model: Model) -> float:
        """Seconds to bring a model back with what it holds, less for one that was idle for long.

        After a minute without a request that counts half, after nine minutes a tenth.
        """
        back_s = 0.0
        if self._parking is not None and model.identity:
            speeds = self._parking.speeds
            back_s = speeds.load_s(model.identity)
        # Before a load has been seen, a guess by its size.
        if not back_s:
            back_s = model.cost
        if model.bay is not None:
            back_s += model.bay.back_s()
        idle_minutes = (time.monotonic() - model.last_used) / 60
        return back_s / (1 + idle_minutes)

    def _give_up(self, model: Model, why: str) -> None:
        with self._lock:
            model.failure = why
            model.failed_at = time.monotonic()
        self._stop(model)

    def _start(self, model: Model) -> None:
        """Spawn a model's server and wait until it is healthy. Errors: LoadError, _Cancelled.

        Its port was free when it was chosen; where somebody else was quicker, another is tried.
        """
        name = model.name
        log = self._log_path(name)
        # Only now, while nobody writes to it.
        if file_size(log) > LOG_BYTES:
            shift_logs(log)
        path = weights_for(model.tier).path
        if path and not os.path.exists(path):
            raise LoadError(f"{name}: there is no {path}")
        for tries_left in (2, 1, 0):
            # LiteLLM's proxy has a port of its own.
            may_move = tries_left > 0 and not model.proxy
            log_bytes = file_size(log)
            port = self._spawn_server(model, log)
            code = self._wait_healthy(model, log)
            if code is None:
                # llama-server sets SO_REUSEPORT: two that choose a port in the same moment both
                # have it, and each gets some of the other's requests.
                strangers = self._listening_groups(model) - {model.process.pid}
                if not strangers or not may_move:
                    return
                self._end_server(model)
            elif not may_move or port_is_free("127.0.0.1", port):
                words = self._exit_words(model, code, log, log_bytes)
                raise LoadError(words)
            holder = port_holder(port)
            self._log.warning(f"{name}: port {port} was taken by {holder} meanwhile")

    def _exit_words(self, model: Model, code: int, log: str, log_bytes: int) -> str:
        """What to say of a server that has ended while it was loading."""
        name = model.name
        if not self._is_here(model):
            size_bytes = weights_for(model.tier).size_gb * 1e9
            size = size_words(size_bytes) or "size unknown"
            return f"{name} is not downloaded ({size}): llmstack download {name}"
        # What stands before is of a server before.
        tail = tail_of(log, begin=log_bytes) or "it printed nothing"
        return f"{name}: its server exited with {code} while loading:\n{tail}"

    @staticmethod
    def _end_server(model: Model) -> bool:
        """True once a model's server is gone, False where it does not die."""
        process = model.process
        return stop_process(process.pid, model.started, STOP_GRACE_S, process.poll)

    @staticmethod
    def _listening_groups(model: Model) -> Set[int]:
        """The process groups that listen on a server's port; a server of ours leads its own.

        None where that cannot be told: Windows has no groups, and not every system tells who
        listens.
        """
        if IS_WINDOWS:
            return set()
        return set(map(_group_of, listeners(model.port)))

    def _server_start(self, model: Model, upstream: Upstream) -> Tuple[List[str], Dict[str, str]]:
        """The command line and the environment of a model's server. Errors: UserError."""
        port = upstream.port
        if model.proxy is None:
            # A key that nobody but us knows keeps web pages out.
            upstream.key = os.urandom(16).hex()
            env = {**self._local_env, "LLAMA_API_KEY": upstream.key}
            command = self._command(model.tier, port)
            return command, env
        if not port_is_free("127.0.0.1", port):
            holder = port_holder(port)
            raise UserError(f"port {port} is taken by {holder}",
                            "choose another litellm_port in models.ini")
        # It asks providers, so it gets the credentials that others do not.
        env = litellm_env(self._plan.env)
        return list(model.proxy.command), env

    def _spawn_server(self, model: Model, log: str) -> int:
        """Start a model's server; its port. Errors: LoadError, _Cancelled."""
        with self._lock:
            port = self._choose_port(model)
            upstream = Upstream("127.0.0.1", port)
            model.port = port
            model.upstream = upstream
        try:
            # This may ask the binary about its flags, so not under the lock.
            model.command, env = self._server_start(model, upstream)
            with self._lock:
                self._check_wanted(model)
                process = spawn(model.command, log, env)
                model.process = process
                model.started = process_started(process.pid)
        except UserError as exc:
            raise LoadError(f"{model.name}: {exc}; {exc.hint}") from None
        self._log.info(f"{model.name}: starting on port {port}")
        return port

    def _choose_port(self, model: Model) -> int:
        """The proxy's own port, else a free one; another load may be about to listen on its own."""
        if model.proxy:
            return model.proxy.port
        taken = {other.port for other in self.models.values() if other is not model}
        first = self._plan.first_port
        for port in range(first, 65_536):
            if port not in taken and port_is_free("127.0.0.1", port):
                return port
        raise LoadError(f"{model.name}: there is no free port above {first}")

    def _wait_healthy(self, model: Model, log: str) -> Optional[int]:
        """None once a model's server is healthy, its exit code where it ends before.

        Errors: LoadError, _Cancelled.
        """
        # It does not listen before it has downloaded its model, which takes as long as it does.
        may_download = not model.proxy and not weights_for(model.tier).path
        end = time.monotonic() + LOAD_TIMEOUT_S
        while not self._healthy(model):
            with self._lock:
                self._check_wanted(model)
            code: Optional[int] = model.process.poll()
            if code is not None:
                return code
            now = time.monotonic()
            if now > end:
                raise LoadError(f"{model.name}: not loaded within {LOAD_TIMEOUT_S} s; see {log}")
            if not model.listening:
                model.listening = not port_is_free("127.0.0.1", model.port)
            if may_download and not model.listening:
                end = now + LOAD_TIMEOUT_S
            # A small model is there in a second or two, a large one in minutes.
            pause_s = 0.25
            if now - model.since < 5:
                pause_s = 0.05
            time.sleep(pause_s)
        return None

    def _restore(self, model: Model) -> bool:
        """Restore what is parked of a model; False where its server has died of that.

        Each time a file is gone, so another server dies of another file or not at all.
        """
        if self._parking is None or model.proxy:
            return True
        assert model.upstream is not None
        path = self._cached(model)
        try:
            identity = parking_identity(model.command, path, self._local_env)
        except OSError as exc:
            self._log.warning(f"{model.name}: nothing is parked, its file is not found: {exc}")
            return True
        model.identity = identity
        bay = Bay(self._parking, model.tier, identity, model.upstream, self._log)
        # A build without the flag neither saves nor restores.
        if "--slot-save-path" not in model.command:
            bay.parks = False
        if bay.parks and not bay.restore() and not self._healthy(model):
            self._end_server(model)
            return False
        model.bay = bay
        return True

    def _learn_context(self, model: Model) -> None:
        if model.proxy or model.upstream is None:
            return
        model.context = told_capacity(model.tier, model.upstream, self._log).tokens

    def contexts(self) -> Dict[str, int]:
        """Tier -> tokens a conversation, of those whose server has said so."""
        return {m.name: m.context for m in self.models.values() if m.context}

    def _check_wanted(self, model: Model) -> None:
        if self._closing or model.cancelled:
            raise _Cancelled

    def _healthy(self, model: Model) -> bool:
        """200 on its health's path, from our process.

        One that still downloads does not listen, and a stranger may.
        """
        process = model.process
        assert model.upstream is not None
        path = "/health"
        if model.proxy:
            path = model.proxy.health
        try:
            response, _ = model.upstream.get(path, 2.0)
        except (OSError, ValueError):
            return False
        if response.status != 200 or process.poll() is not None:
            return False
        groups = self._listening_groups(model)
        return not groups or process.pid in groups

    def _stop(self, model: Model) -> None:
        """Stop a model's server; its state is "stopped" afterwards.

        A server that does not die keeps its memory: its model stays "stopping" until it is gone.
        """
        process = model.process
        if process is not None:
            if model.bay is not None and process.poll() is None:
                model.bay.save(ending=True)
            while not self._end_server(model):
                self._log.error(f"{model.name}: its server (pid {process.pid}) does not die")
                if self._closing:
                    break
            process.poll()
        with self._lock:
            self._forget(model)

    def _forget(self, model: Model) -> None:
        if model.upstream:
            model.upstream.forget()
        model.process = None
        model.upstream = None
        model.bay = None
        model.port = 0
        model.cancelled = False
        model.listening = False
        model.turn_to("stopped")
        self._changed.notify_all()

    def unload(self, models: Iterable[Model]) -> None:
        """Stop models because the user says so, busy or loading; returns when they are gone."""
        chosen = list(models)
        with self._lock:
            for model in chosen:
                if model.state == "ready":
                    self._begin_stop(model)
                # A load ends itself: its thread alone may touch the process before it is ready.
                model.cancelled = model.state == "starting"
            while any(m.state == "stopping" or m.cancelled for m in chosen):
                self._changed.wait(1.0)

    def _begin_stop(self, model: Model) -> None:
        model.turn_to("stopping")
        in_background(f"stop {model.name}", self._stop, model)

    def unload_idle(self) -> None:
        """Unload what has been idle for its ttl, and notice servers that have died."""
        now = time.monotonic()
        with self._lock:
            for model in self.models.values():
                if not model.is_idle:
                    continue
                code = model.process.poll()
                ttl_s = model.tier.ttl
                idle_s = now - model.last_used
                if code is not None:
                    self._log.warning(f"{model.name}: its server has died (exit {code})")
                    self._forget(model)
                elif ttl_s and idle_s > ttl_s:
                    self._log.info(f"{model.name}: idle for {ttl_s} s, unloading")
                    self._begin_stop(model)
                elif model.bay is not None:
                    model.bay.save_when_due()

    def ease(self, pressure: str) -> None:
        """Take note of why memory is short; then the model that was idle longest goes."""
        with self._lock:
            # Said once for as long as it lasts; its words change with each figure in them.
            if bool(pressure) != bool(self.pressure):
                self._log.warning(f"memory: {pressure or 'no longer short'}")
            self.pressure = pressure
            if not pressure:
                return
            idle = [m for m in self.models.values() if m.is_idle and not m.proxy]
            model = min(idle, key=lambda m: m.last_used, default=None)
            # One goes a look: the next look sees what that has freed.
            if model is not None:
                self._log.warning(f"{model.name}: idle, unloading for {pressure}")
                self._begin_stop(model)

    def tend_files(self) -> None:
        """Rotate the servers' logs, and write down how fast they were."""
        for name in self.models:
            rotate_foreign_log(self._log_path(name))
        if self._parking is None:
            return
        try:
            self._parking.speeds.keep()
        except UserError as exc:
            self._log.warning(str(exc))

    def preload(self) -> None:
        """Begin to load the fast tier, and LiteLLM's proxy where `auto` may want it at once."""
        for model in self.models.values():
            wanted = model.tier.role == "fast"
            if model.proxy:
                wanted = model.proxy.preload
            if not wanted:
                continue
            ticket = self.enqueue(model)
            try:
                ticket.ready()
            except LoadError as exc:
                self._log.error(str(exc))
            # Nobody waits: a load that has begun goes on without a ticket.
            ticket.end()

    def close(self) -> None:
        """Stop everything, for good."""
        with self._lock:
            self._closing = True
            self._changed.notify_all()
        self.unload(self.models.values())

    def upstreams(self) -> List[Upstream]:
        """Of the models that are loaded or loading."""
        with self._lock:
            return [m.upstream for m in self.models.values() if m.upstream is not None]

    def running(self) -> List[Dict[str, Any]]:
        """The rows of /running."""
        rows = []
        with self._lock:
            now = time.monotonic()
            for model in self.models.values():
                if model.state == "stopped":
                    continue
                url = ""
                if model.upstream:
                    url = model.upstream.url
                rows.append({
                    "model": model.name,
                    "state": model.state,
                    "cmd": " ".join(model.command),
                    "proxy": url,
                    "ttl": model.tier.ttl,
                    "name": model.name,
                    "description": model.tier.description,
                    "in_flight": model.in_flight,
                    "seconds": round(now - model.since, 1),
                })
        return rows

    def watched(self) -> Dict[str, Any]:
        """The models and the budget, as Behind.watched() tells them."""
        rows = {}
        stopped = []
        with self._lock:
            for model in self.models.values():
                rows[model.name] = self._watched_row(model)
                if model.state == "stopped":
                    stopped.append(model)
        # This looks at the disk, so not under the lock.
        for model in stopped:
            if not self._is_here(model):
                row = rows[model.name]
                row["state"] = "not here"
                row["reason"] = fetching_words(model.tier)
        parked: List[Dict[str, Any]] = []
        if self._parking is not None:
            parked = self._parking.rows()
        return {
            "models": rows,
            "budget": round(self._plan.budget_gb * 1e9),
            "parked": parked,
            "pressure": self.pressure,
        }

    def _watched_row(self, model: Model) -> Dict[str, Any]:
        since = model.since
        row: Dict[str, Any] = {
            "state": STATE_WORDS[model.state],
            "reason": "",
            "loads": model.loads,
            "evictions": model.evictions,
            "bytes": round(model.gb * 1e9),     # 0 of LiteLLM's proxy
        }
        # A request that was answered since has shown that it loads.
        if model.state == "stopped" and model.failed_at > model.last_used:
            why = load_failure_words(model.failure)
            log = self._log_path(model.name)
            row["state"] = "failed to load"
            row["reason"] = f"{why} ({log})"
            since = model.failed_at
        row["since"] = round(since + self._epoch)
        if model.state == "starting":
            share = self._loaded(model)
            if share:
                row["share"] = round(share, 2)
            if self._is_downloading(model):
                row["reason"] = "its file is downloaded first"
        if model.memory is not None:
            row["parts"] = model.memory.parts
        return row


_PLAIN = "text/plain; charset=utf-8"
_UPSTREAM = "/upstream/"                        # then a model and a path of its server's


class MemoryWatch:
    """Looks every few seconds whether the machine is short of memory.

    In a thread of its own: nvidia-smi may take a second to answer.
    """

    INTERVAL_S = 5.0
    CALM_LOOKS = 3                              # in a row, before a shortage counts as over

    def __init__(self, machine: Machine,
                 read: Callable[[bool], MemoryState] = read_memory_state) -> None:
        self.machine = machine
        self._read = read
        self._before = read(machine.cuda)
        self._pressure = ""
        self._calm = 0                          # looks in a row that have found nothing
        self._stopped = threading.Event()

    def start(self, ease: Callable[[str], None]) -> None:
        """Tell `ease` after each look what is short."""
        in_background("memory", self._run, ease)

    def _run(self, ease: Callable[[str], None]) -> None:
        while not self._stopped.wait(self.INTERVAL_S):
            ease(self.look())

    def stop(self) -> None:
        self._stopped.set()

    def look(self) -> str:
        """What is short, as memory_pressure says it."""
        now = self._read(self.machine.cuda)
        found = memory_pressure(now, self._before)
        self._before = now
        self._calm += 1
        if found:
            self._calm = 0
        if found or self._calm >= self.CALM_LOOKS:
            self._pressure = found
        return self._pressure


_MODELS = "/v1/models/"                         # then the name of one


def canonical_request(request: Request) -> Request:
    """A request with its path as the router reads it: one for inference, or the list of models."""
    path, mark, query = request.target.partition("?")
    meant = ""
    if request.method == "POST":
        meant = inference_path(path)
    listing = _MODELS_PATH.match(unquoted(path))
    if listing is not None and request.method in ("GET", "HEAD"):
        meant = _MODELS + (listing[1] or "")
        meant = meant.rstrip("/")
    if not meant:
        return request
    return request._replace(target=meant + mark + query)


def listed_model(listing: Mapping[str, Any], name: str) -> Dict[str, Any]:
    """The entry of a list of models that has this name. Errors: HttpError 404, KeyError."""
    for entry in map(dict_of, listing["data"]):
        if entry.get("id") == name:
            return entry
    raise HttpError(404, f"there is no model {name[:200]!r} here", "not_found")


def no_such_path(request: Request) -> HttpError:
    """The 404 for a path that neither we nor what is behind us know."""
    path = request.target.partition("?")[0]
    host = request.header(b"host") or "127.0.0.1"
    return HttpError(404, f"no such path: {path[:200]}; base URL is http://{host}/v1, and the paths"
                          " of a model's own server are below /upstream/MODEL", "not_found")


class EngineApp(Behind):
    """127.0.0.1:10102 where llama-swap is absent; the same routes."""

    def __init__(self, engine: Engine, log: Log, watch: Optional[MemoryWatch] = None) -> None:
        self.engine = engine
        self.log = log
        self._watch = watch
        self._last_rotation = time.monotonic()
        self.address = "the embedded engine"
        self.loading_state = engine.config.loading_state

    def memory(self) -> Dict[str, Any]:
        shown: Dict[str, Any] = {}
        if self._watch:
            shown = self._watch.machine._asdict()
        shown["pressure"] = self.engine.pressure
        return shown

    def every_second(self) -> None:
        self.log.flush()
        self.engine.unload_idle()
        now = time.monotonic()
        if now - self._last_rotation > 30:
            self._last_rotation = now
            self.log.rotate()
            self.engine.tend_files()

    def watched(self) -> Dict[str, Any]:
        return self.engine.watched()

    def contexts(self) -> Dict[str, int]:
        return self.engine.contexts()

    def start(self) -> None:
        self.engine.preload()
        if self._watch:
            self._watch.start(self.engine.ease)

    def close_idle(self) -> None:
        for upstream in self.engine.upstreams():
            upstream.close_idle()

    def close(self) -> None:
        if self._watch:
            self._watch.stop()
        self.engine.close()

    def lease(self, name: str) -> Lease:
        return self.engine.lease(name)

    def pace(self, name: str, tokens: int) -> Pace:
        return self.engine.pace(name, tokens)

    def models(self, request: Request) -> Dict[str, Any]:
        entries = []
        config = with_served_contexts(self.engine.config, self.contexts())
        for tier in config.tiers:
            model = self.engine.find(tier.name)
            if model is None:
                continue
            value = "unloaded"
            if model.state == "ready":
                value = "loaded"
            entry = {**tier_entry(tier), "status": {"value": value}}
            entries += [{**entry, "id": name} for name in tier.names]
        return {"object": "list", "data": entries}

    def forward(self, client: Client, request: Request, body: bytes) -> None:
        """Answer a request about the engine, or ask the model it names. Errors: HttpError."""
        request = canonical_request(request)
        path, mark, query = request.target.partition("?")
        managed = request.method in ("GET", "HEAD", "POST")
        if managed and self._manage(client, request, path):
            return
        if path.startswith(_UPSTREAM):
            name, _, rest = path[len(_UPSTREAM):].partition("/")
            request = request._replace(target=f"/{rest}{mark}{query}")
            self._serve(client, request, name, body)
            return
        name = _asked_in(request.target)
        stream = False
        if body:
            # A list is for /lora-adapters, whose model stands in the query.
            values = dict_of(read_json(body))
            stream = values.get("stream") is True
            named = values.get("model")
            if isinstance(named, str):
                name = named
        if is_auto(name) and not inference_path(path):
            raise no_such_path(request)
        tier = self.engine.config.by_name(name)
        # LiteLLM knows no aliases.
        if body and tier and tier.backend == "litellm":
            pieces = with_model(body, True, tier.name)
            body = b"".join(pieces)
        self._serve(client, request, name, body, stream)

    def _manage(self, client: Client, request: Request, path: str) -> bool:
        """Answer a route about the engine itself; False for any other."""
        if path == "/unload":
            self.engine.unload(self.engine.models.values())
            client.reply(200, b"OK", _PLAIN)
            return True
        if request.method == "POST":
            return self._unload(client, path)
        if path == "/health":
            whose = b"X-LLMStack-Pid: %d\r\n" % os.getpid()
            client.reply(200, b"OK", _PLAIN, whose)
        elif path == "/ui" and self.page_url:
            # llama-swap's page is here; ours is the router's.
            where = f"Location: {self.page_url}\r\n"
            client.reply(307, b"", _PLAIN, where.encode())
        elif path == "/v1/models":
            listing = self.models(request)
            client.reply_json(listing)
        elif path.startswith(_MODELS):
            listing = self.models(request)
            entry = listed_model(listing, path[len(_MODELS):])
            client.reply_json(entry)
        elif path == "/running":
            client.reply_json({"running": self.engine.running()})
        else:
            return False
        return True

    def _unload(self, client: Client, path: str) -> bool:
        """Answer a POST that unloads; False for any other. Errors: HttpError 404."""
        unload_all = "/api/models/unload"
        if path == unload_all:
            self.engine.unload(self.engine.models.values())
            client.reply(200, b'{"msg":"ok"}')
            return True
        if not path.startswith(unload_all + "/"):
            return False
        name = path[len(unload_all) + 1:]
        ticket = self.engine.lease(name)
        self.engine.unload([ticket.model])
        client.reply(200, b"OK", _PLAIN)
        return True

    def _serve(self, client: Client, request: Request, name: str, body: bytes,
               stream: bool = False) -> None:
        lease = self.engine.lease(name)
        outcome = self.relay_over(lease, client, request, body, stream)
        nobody = f"{name}: its server does not answer"
        tell_failure(client, self.log, name, outcome, nobody)


# ==================================================================================================
# LLAMA-SWAP
# ==================================================================================================
# llama-swap is the engine where it is found. It runs behind a listener of ours, on a port and with
# a key that nobody else knows; what our engine does beyond it is done around it here: parking, what
# is said to a stream that waits, and what a conversation may hold.
#
# llama-swap says of a model what state it is in, and not who waits for what. That follows from the
# requests that are under way here (SwapApp.stage): all that are asked of it come by this listener.


def running_rows(upstream: Upstream) -> Optional[List[Dict[str, Any]]]:
    """The rows of an engine's /running that name a model and its state; None without an answer."""
    rows = asked_json(upstream, "/running").get("running")
    if not isinstance(rows, list):
        return None
    named = []
    for row in map(dict_of, rows):
        if isinstance(row.get("model"), str) and isinstance(row.get("state"), str):
            named.append(row)
    return named


def server_port(row: Mapping[str, Any]) -> int:
    """The port of a model's server by its row of /running, 0 where that has none."""
    url = str(row.get("proxy"))
    found = re.search(r":([0-9]{1,5})/?\Z", url)
    if found is None:
        return 0
    return int(found[1])


def ready_port(upstream: Upstream, name: str) -> int:
    """The port of a model's server, 0 where that is not ready or not told."""
    for row in running_rows(upstream) or ():
        if row["model"] == name and row["state"] == "ready":
            return server_port(row)
    return 0


def running_states(upstream: Upstream) -> Optional[Dict[str, str]]:
    """Model -> its state as /running tells it; None where it does not."""
    rows = running_rows(upstream)
    if rows is None:
        return None
    return {row["model"]: row["state"] for row in rows}


class Settling:
    """A model of llama-swap from its load on; its bay is there once what was parked is restored."""

    def __init__(self) -> None:
        self.done = threading.Event()           # restored, or cannot be
        self.bay: Optional[Bay] = None
        self.leases = 0                         # requests that wait for it, or are under way
        self.hold: Optional[socket.socket] = None

    def let_go(self) -> None:
        """Let llama-swap stop the model again, once nothing else is asked of it."""
        if self.hold is not None:
            self.hold.close()
            self.hold = None


def hold_model(swap: Upstream, name: str) -> socket.socket:
    """Have a model loaded, and kept until the connection is closed. Errors: OSError.

    llama-swap stops no model that has a request under way, and this one does not end: its body
    never comes. It is a GET, of which llama-swap reads no body before it passes it on.
    """
    sock = swap.connect()
    lines = [
        f"GET {swap.prefix}/upstream/{name}/health HTTP/1.1".encode("latin-1"),
        b"Host: " + swap.authority,
        b"Authorization: Bearer " + swap.key.encode(),
        b"Content-Length: 1",
    ]
    try:
        sock.sendall(b"\r\n".join(lines) + b"\r\n\r\n")
    except OSError:
        sock.close()
        raise
    return sock


class SwapBays:
    """The parking of llama-swap's models, with the embedded engine's files.

    llama-swap passes requests on as soon as a server is healthy, and says nothing before. So the
    first request since a load waits while llama-swap is asked for the model's /health, which loads
    it, and what is parked is restored. Before it stops a model, its cmdStop (share/guests/park.py)
    asks for /llmstack/park/MODEL here.

    Between the two the model has to be held: it would be idle, and go at once where another waits
    for its memory, which is settled in the same way. Two that wait for each other's took turns at
    loading: 20 s where one load took 8.
    """

    def __init__(self, parking: Parking, tiers: Sequence[Tier], identify: Callable[[Tier], str],
                 log: Log) -> None:
        self._parking = parking
        self._identify = identify
        self._log = log
        self._tiers = {tier.name: tier for tier in tiers}
        self._settling: Dict[str, Settling] = {}
        self._lock = threading.Lock()

    def settle(self, name: str, swap: Upstream) -> Optional[Settling]:
        """A model's restoring, which is begun where needed; None for what is never parked."""
        if name not in self._tiers:
            return None
        with self._lock:
            known = self._settling.get(name)
            if known is None:
                known = self._settling[name] = Settling()
                in_background(f"restore {name}", self._restore, name, swap, known)
            known.leases += 1
            return known

    def leave(self, settling: Settling) -> None:
        """A request has ended that had waited: whoever waited beside it has been asked, too."""
        with self._lock:
            settling.leases -= 1
            if settling.done.is_set() or not settling.leases:
                settling.let_go()

    def _restore(self, name: str, swap: Upstream, settling: Settling) -> None:
        try:
            settling.hold = hold_model(swap, name)
            settling.bay = self._restored_bay(name, swap)
        except (OSError, ValueError, UserError) as exc:
            self._log.warning(f"{name}: nothing is restored: {exc}")
        finally:
            # Without a bay the request that waits goes on, and the next one tries again. Meanwhile
            # the model may have been stopped, and be loaded for another.
            with self._lock:
                if settling.bay is None and self._settling.get(name) is settling:
                    del self._settling[name]
                settling.done.set()
                if not settling.leases:
                    settling.let_go()

    def _restored_bay(self, name: str, swap: Upstream) -> Optional[Bay]:
        tier = self._tiers[name]
        # A llama-server with --slot-save-path does not start without that directory.
        make_private_dir(self._parking.directory)
        states = running_states(swap) or {}
        began = time.monotonic()
        swap.get(f"/upstream/{name}/health", LOAD_TIMEOUT_S)
        load_s = time.monotonic() - began
        port = ready_port(swap, name)
        if not port:
            return None
        server = Upstream("127.0.0.1", port)
        # llama-swap's servers have its key.
        server.key = swap.key
        identity = self._identify(tier)
        bay = Bay(self._parking, tier, identity, server, self._log)
        # One that was loaded already has answered at once, which says nothing of a load.
        if name not in states:
            self._parking.speeds.note(identity, name, "load", load_s)
        # A server that has been asked already holds newer conversations than the files.
        if bay.fresh():
            bay.restore()
        return bay

    def pace(self, name: str, tokens: int) -> Pace:
        """What is known of a model with a prompt of so many tokens."""
        parking = self._parking
        settling = self._settling.get(name)
        if settling is not None and settling.bay is not None:
            return settling.bay.pace(tokens)
        identity = parking.speeds.identity_of(name)
        return model_pace(parking, identity, tokens)

    def parked(self) -> List[Dict[str, Any]]:
        return self._parking.rows()

    def park(self, name: str) -> None:
        """Save a model that is about to be stopped."""
        with self._lock:
            known = self._settling.pop(name, None)
        if known and known.bay:
            known.bay.save(ending=True)

    def forget_all(self) -> None:
        with self._lock:
            self._settling.clear()

    def save_when_due(self) -> None:
        with self._lock:
            bays = [known.bay for known in self._settling.values() if known.bay]
        for bay in bays:
            bay.save_when_due()


class SwapLease(Lease):
    """A request's place at llama-swap, which loads what it is asked for."""

    def __init__(self, app: SwapApp, model: str) -> None:
        super().__init__(app.upstream)
        self.model = model
        self._app = app
        self._settling = app.enter(self)

    @property
    def is_settled(self) -> bool:
        return self._settling is None or self._settling.done.is_set()

    def ready(self) -> bool:
        if not self.is_settled:
            return False
        if self._settling is not None:
            self.bay = self._settling.bay
        return True

    def wait(self, seconds: float) -> None:
        if self._settling is not None:
            self._settling.done.wait(seconds)

    def stage(self) -> str:
        return self._app.stage(self)

    def asks(self, target: str, body: Sequence[bytes]) -> None:
        super().asks(target, body)
        self._app.learn(self.model)

    def answered(self, outcome: Outcome) -> None:
        super().answered(outcome)
        # Where nothing is parked, the model was not loaded before.
        self._app.learn(self.model)

    def end(self) -> None:
        self._app.leave(self, self._settling)


def unknown_to_swap(status: int, text: str) -> bool:
    """Whether llama-swap has no such path: what it says then is no API's error."""
    return status == 404 and text.startswith("404 page not found")


class SwapApp(UpstreamApp):
    """127.0.0.1:10102 in front of llama-swap, which has a port and a key that nobody else knows.

    llama-swap answers every web page; this listener refuses what the router refuses, and passes
    everything else on, its UI, event streams and WebSockets included.
    """

    has_others = False
    RESTART_S = 5                               # between two starts of one that keeps dying

    def __init__(self, config: Config, command: Callable[[int], List[str]], env: Mapping[str, str],
                 log: Log, output: str, bays: Optional[SwapBays] = None) -> None:
        port = free_port("127.0.0.1")
        super().__init__(Upstream("127.0.0.1", port), log)
        self.upstream.key = env["LLAMA_API_KEY"]
        self.address = "llama-swap"
        self.upstream.is_gateway = True
        self.loading_state = config.loading_state
        self.judge = unknown_to_swap
        self.sets: Sequence[ResidencySet] = ()  # of models that may be loaded together
        self._tiers = {tier.name: tier for tier in local_tiers(config)}
        self._capacity: Dict[str, Capacity] = {}
        self._known: Set[str] = set()           # models asked for it since their load
        self._leases: List[SwapLease] = []      # requests under way, the oldest first
        self._models: Dict[str, str] = {}       # every name of a tier -> llama-swap's model
        for tier in litellm_tiers(config):
            self._models.update(dict.fromkeys(tier.names, PROXY))
        for tier in self._tiers.values():
            self._models.update(dict.fromkeys(tier.names, tier.name))
        self._bays = bays
        self._command = command(port)
        self._env = env
        self._output = output
        self._process: Any = None
        self._started_s = 0.0
        self._closing = False

    def start(self) -> None:
        """Spawn llama-swap and wait until it answers. Errors: UserError with its last words."""
        log_bytes = file_size(self._output)
        self._spawn()
        try:
            await_answer("llama-swap", self._process, self._healthy, self._output, log_bytes, 60)
        except UserError:
            self.close()
            raise

    def _spawn(self) -> None:
        self._started_s = time.monotonic()
        process = spawn(self._command, self._output, self._env)
        self._process = process
        self._mark = process_started(process.pid)

    def _healthy(self) -> bool:
        try:
            return self.upstream.get("/health", 2.0)[0].status == 200
        except (OSError, ValueError):
            return False

    def every_second(self) -> None:
        """Start llama-swap again where it has died; its models may have outlived it."""
        self.log.flush()
        if self._bays:
            self._bays.save_when_due()
        code = self._process.poll()
        if code is None or self._closing:
            return
        if time.monotonic() - self._started_s < self.RESTART_S:
            return
        self.log.error(
            f"llama-swap has died (exit {code}); starting it again, see {self._output}")
        # The models that it has left hold the ports that it would give to others.
        stop_members(stack_members(_mark_in(self._env)))
        if self._bays:
            self._bays.forget_all()
        self._known.clear()
        try:
            self._spawn()
        except UserError as exc:
            # Its program may be gone for a moment; this listener is asked all the same.
            self.log.error(f"{exc}; {exc.hint}")

    def close(self) -> None:
        self._closing = True
        grace_s = STOP_GRACE_S
        # Its models are parked before they stop.
        if self._bays:
            grace_s += PARK_S
        stop_process(self._process.pid, self._mark, grace_s, self._process.poll)
        self._process.wait()

    def watched(self) -> Dict[str, Any]:
        running = running_states(self.upstream)
        if running is None:
            return {}
        models = {}
        for name in set(self._models.values()):
            state = "not loaded"
            if name in running:
                state = STATE_WORDS.get(running[name], "loading")
            models[name] = {"state": state}
        parked: List[Dict[str, Any]] = []
        if self._bays is not None:
            parked = self._bays.parked()
        return {"models": models, "parked": parked}

    def target(self, name: str, target: str) -> str:
        """llama-swap finds a model by the body of its own paths alone."""
        if target.startswith("/v1/"):
            return target
        return f"/upstream/{name}{target}"

    def pace(self, name: str, tokens: int) -> Pace:
        if self._bays is None:
            return Pace()
        return self._bays.pace(name, tokens)

    def lease(self, name: str) -> Lease:
        # llama-swap says itself that it has no model of a name that is no tier's.
        model = self._models.get(name, name)
        return SwapLease(self, model)

    def enter(self, lease: SwapLease) -> Optional[Settling]:
        """Count a request as under way; what it has to wait for before it is asked, if anything."""
        self._leases.append(lease)
        if self._bays is None:
            return None
        return self._bays.settle(lease.model, self.upstream)

    def leave(self, lease: SwapLease, settling: Optional[Settling]) -> None:
        self._leases.remove(lease)
        if self._bays is not None and settling is not None:
            self._bays.leave(settling)

    # ---- what its servers hold

    def learn(self, name: str) -> None:
        """Have a model's server asked, once a load, what it holds; nobody waits for that."""
        tier = self._tiers.get(name)
        if tier is None or name in self._known:
            return
        self._known.add(name)
        in_background(f"ask {name}", self._ask_capacity, tier)

    def _ask_capacity(self, tier: Tier) -> None:
        port = ready_port(self.upstream, tier.name)
        if not port:                            # it is loading: the next to look asks again
            self._known.discard(tier.name)
            return
        server = Upstream("127.0.0.1", port)
        # llama-swap's servers have its key.
        server.key = self.upstream.key
        self._capacity[tier.name] = told_capacity(tier, server, self.log)

    def contexts(self) -> Dict[str, int]:
        told = list(self._capacity.items())
        return {name: capacity.tokens for name, capacity in told if capacity.tokens}

    # ---- what is waited for

    def stage(self, lease: SwapLease) -> str:
        """What a request waits for, in words; "" once its model is at work on it."""
        name = lease.model
        states = running_states(self.upstream) or {}
        state = states.pop(name, "stopped")
        if state == "starting":
            return f"loading {name}"
        if state == "stopping":
            return f"waiting for {name} to stop before it can load again"
        if state == "ready":
            return self._stage_when_ready(lease)
        return self._stage_behind(name, states)

    def _stage_behind(self, name: str, states: Mapping[str, str]) -> str:
        """What a model that is not being loaded yet waits for, by the states of the others."""
        others = {other: told for other, told in states.items() if self._excludes(name, other)}
        busy = {under_way.model for under_way in list(self._leases)}
        finish = [other for other in others if others[other] == "ready" and other in busy]
        if finish:
            return f"waiting for {', '.join(finish)} to finish before {name} can load"
        leaving = [other for other in others if others[other] == "stopping"]
        if leaving:
            return f"unloading {', '.join(leaving)} to load {name}"
        first = [other for other in others if others[other] == "starting"]
        if first:
            return f"queued for {name} behind {', '.join(first)}, which loads first"
        return f"waiting for llama-swap to load {name}"

    def _stage_when_ready(self, lease: SwapLease) -> str:
        name = lease.model
        if not lease.is_settled:
            return f"restoring what was parked of {name}"
        under_way = list(self._leases)
        if lease not in under_way:              # it has just ended
            return ""
        before = under_way[:under_way.index(lease)]
        earlier = sum(other.model == name for other in before)
        slots = self._capacity.get(name, Capacity()).slots
        # llama-server takes them in the order in which they come, and says nothing before.
        if 0 < slots <= earlier:
            return f"queued for {name} behind {earlier} of its requests"
        return ""

    def _excludes(self, name: str, other: str) -> bool:
        """Whether two models are never loaded together."""
        if PROXY in (name, other):
            return False
        return not any({name, other}.issubset(group.tiers) for group in self.sets)

    # ---- paths

    def relay_over(self, lease: Lease, client: Client, request: Request, body: bytes,
                   stream: bool) -> Outcome:
        outcome = super().relay_over(lease, client, request, body, stream)
        if outcome.state == "rejected" and outcome.status == 404:
            raise no_such_path(request)
        return outcome

    def forward(self, client: Client, request: Request, body: bytes) -> None:
        # share/guests/park.py asks this before llama-swap stops a model.
        park = "/llmstack/park/"
        if request.method == "POST" and request.target.startswith(park):
            self._park(request.target[len(park):])
            client.reply(200, b"OK", _PLAIN)
            return
        request = canonical_request(request)
        if request.target.startswith(_MODELS):
            self._reply_model(client, request)
            return
        super().forward(client, request, body)

    def _park(self, name: str) -> None:
        self._known.discard(name)
        if self._bays is not None:
            self._bays.park(name)

    def _reply_model(self, client: Client, request: Request) -> None:
        """The entry of one model, which llama-swap answers for all alone. Errors: HttpError."""
        path, mark, query = request.target.partition("?")
        every = request._replace(target=_MODELS.rstrip("/") + mark + query)
        try:
            listing = self.models(every)
            entry = listed_model(listing, path[len(_MODELS):])
        except _NO_LISTING:
            raise HttpError(502, self.nobody, "upstream_error") from None
        client.reply_json(entry)


# ==================================================================================================
# STACK
# ==================================================================================================
# One daemon a project: it listens on 10101 (router) and 10102 (engine), and owns what it starts.
# This room brings it up and takes it down, and asks it from outside, by HTTP. All that starts or
# stops one holds stack_lock, so that two terminals cannot both find the ports free.


def pid_file(places: Places) -> str:
    return places.in_state("router.pid")


def owner_file(data: str) -> str:
    return os.path.join(data, "owner.json")


def read_stack(places: Places) -> Optional[Record]:
    """The project's daemon as its pid file says, else as its copy in the data directory does.

    The copy is for one whose .llmstack was deleted while it ran. None where there is none of ours.
    """
    record = read_record(pid_file(places))
    if record is not None:
        return record
    copy = _read_json(owner_file(places.data))
    # One copy serves all projects: it is of the last one that was started.
    if copy.get("work") != places.work:
        return None
    text = str(copy.get("record", ""))
    return proven_record(text, places.work)


def running_record(places: Places) -> Optional[Record]:
    """The project's daemon where it lives, None where it does not or is another's."""
    record = read_stack(places)
    # Worktrees may share one .llmstack/; a daemon belongs to the one that it was started for.
    if not owned_process(record, places.work):
        return None
    return record


def connectable(host: str) -> str:
    """The address at which a listening address is reached from this machine."""
    # An address that means every interface can be listened on, but not connected to everywhere.
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104
    return loopback.get(host, host)


def api_key(env: Mapping[str, str]) -> str:
    """LLMSTACK_API_KEY without the newline its file ended with.

    Errors: UserError where no header can carry it.
    """
    key = env.get("LLMSTACK_API_KEY", "").strip()
    # A header is one line of ASCII; a key from a file on Windows may hold a mark of its encoding.
    if not key.isascii() or not key.isprintable():
        raise UserError("LLMSTACK_API_KEY holds more than printable ASCII",
                        "set it to one plain line", 2)
    return key


def router_upstream(record: Record, env: Mapping[str, str]) -> Upstream:
    """The router of a daemon, which is given the key of `env`. Errors: UserError for a bad one."""
    upstream = Upstream(connectable(record.host), record.port)
    upstream.key = api_key(env)
    return upstream


def engine_upstream(record: Record) -> Upstream:
    return Upstream("127.0.0.1", record.engine_port)


def _asked_head(upstream: Upstream, path: str) -> Optional[Response]:
    """The head of what a daemon answers within 2 s, None where it answers nothing."""
    try:
        return upstream.get(path, 2.0)[0]
    except (OSError, ValueError):
        return None


def answers(record: Record, env: Mapping[str, str]) -> bool:
    """True when a daemon is up: its process is the one we started, and its router says its pid."""
    if not record.alive:
        return False
    head = _asked_head(router_upstream(record, env), "/models.ini")
    if head is None:
        return False
    # A router that wants a key, or one without a models.ini, is up all the same.
    if head.status != 200:
        return head.status in (401, 404)
    # Another router may have taken the port after ours died.
    return head.header(b"x-llmstack-pid") == str(record.pid)


def engine_answers(record: Record) -> bool:
    head = _asked_head(engine_upstream(record), "/health")
    return head is not None and head.status == 200


def base_url(host: str, port: int) -> str:
    name = connectable(host)
    if ":" in name:
        name = f"[{name}]"
    return f"http://{name}:{port}"


def check_exposure(host: str, config: Config, env: Mapping[str, str]) -> None:
    """Refuse to listen where others can reach it without a key. Errors: UserError."""
    if is_loopback(host) or api_key(env):
        return
    if not config.allow_unauthenticated:
        raise UserError(f"{host} can be reached by others, and no API key is set",
                        "set LLMSTACK_API_KEY in the environment, or allow_unauthenticated = yes"
                        " in models.ini", 2)


class Plan(NamedTuple):
    """What `start` is to bring up, with all that was found out for it."""

    places: Places
    config: Config
    host: str
    port: int
    kind: str = "embedded"                      # of the engine: embedded | llama-swap

    @property
    def channel(self) -> str:
        return self.config.channel

    @property
    def url(self) -> str:
        """The router's, without /v1."""
        return base_url(self.host, self.port)


def _can_park(config: Config, server: Binary) -> bool:
    return config.park_gb > 0 and "--slot-save-path" not in server.refused


def swap_binary(config: Config, env: Mapping[str, str], data: str) -> Binary:
    """The llama-server that llama-swap is to run, told where to park. Errors: UserError."""
    program = find_llama_server(config, env, data)
    if not program:
        return Binary(program)
    server = Binary(program, probe_flags(program, config, data))
    if not _can_park(config, server):
        return server
    words = (*program, *parking_flags(data))
    return server._replace(program=words)


def own_binaries(config: Config, env: Mapping[str, str], data: str) -> Dict[str, Binary]:
    """Tiers with settings of their own -> their llama-server. Errors: UserError."""
    found = {}
    for tier in local_tiers(config):
        if SERVER_OPTIONS.keys().isdisjoint(tier.settings):
            continue
        own = tier_config(config, tier)
        found[tier.name] = swap_binary(own, env, data)
    return found


def _ready_for_swap(tier: Tier, env: Mapping[str, str]) -> Tier:
    """As ready_tier; where a file is not here the tier stays as it is, and alone fails to load."""
    try:
        return ready_tier(tier, env)
    except UserError:
        return tier


def costly_gb(local: Sequence[Tier], fits: Iterable[TierFit], speeds: Speeds) -> Dict[str, float]:
    """Tier -> the GB that evict_cost goes by: its weights, or what as many would take to load.

    The second where a load has been seen on this machine, under either engine.
    """
    found = {f.name: f.memory.weights / 1e9 for f in fits if f.memory}
    for tier in local:
        identity = speeds.identity_of(tier.name)
        load_s = speeds.load_s(identity)
        if load_s:
            found[tier.name] = load_s * LOADED_GB_PER_S
    return found


def write_swap_yaml(places: Places, config: Config, proxy: Optional[ProxyPlan],
                    path: str, drafts: Drafts) -> List[ResidencySet]:
    """Write llama-swap's configuration for this machine; its sets. Errors: UserError."""
    env = places.env
    data = places.data
    local = local_tiers(config)
    server = swap_binary(config, env, data)
    machine = this_machine(config)
    fits = measure_tiers(config, machine, env)
    config = with_caches(config, fits, machine)
    tiers = []
    for tier in config.tiers:
        ready = _ready_for_swap(tier, env)
        identity = probe_identity(tier, config, env, data)
        tiers.append(drafts.choose(tier, ready, identity))
    config = config._replace(tiers=tuple(tiers))
    # What llama-swap runs before it stops a model: it asks our listener to park that.
    park: Tuple[str, ...] = ()
    if _can_park(config, server):
        port = str(config.engine_port)
        park = (*guest_command(sys.executable, "park"), port)
    quote = posix_quote
    if IS_WINDOWS:
        quote = windows_quote
    plan = SwapPlan(
        config,
        server,
        quote=quote,
        first_port=free_run(FIRST_SERVER_PORT, len(local)),
        need_gb={fit.name: fit.needs for fit in fits},
        weights_gb=costly_gb(local, fits, Speeds(data)),
        budgets_gb=machine.budgets_gb,
        proxy=proxy,
        own=own_binaries(config, env, data),
        park=park,
    )
    text = render_llama_swap_yaml(plan)
    write_atomic(path, text)
    return residency_sets(plan.config, plan.need_gb, plan.budgets_gb)


def choose_engine(config: Config, env: Mapping[str, str], data: str) -> str:
    """Which engine is to serve: embedded | llama-swap. Errors: UserError."""
    # `auto` takes llama-swap where it is found, as llmstack 0.12 does.
    if config.engine == "embedded":
        return "embedded"
    if find_llama_swap(env, data):
        return "llama-swap"
    if config.engine == "llama-swap":
        folder = os.path.join(data, "bin")
        raise UserError("engine = llama-swap, and there is no llama-swap on PATH",
                        f"put its binary on PATH or in {folder}, or set engine = auto")
    return "embedded"


def check_plan(plan: Plan) -> None:
    """What can be known to fail before anything is started or stopped. Errors: UserError."""
    places = plan.places
    config = plan.config
    program = find_llama_server(config, places.env, places.data)
    if not program and local_tiers(config):
        raise UserError("there is no llama-server on this machine", LLAMA_SERVER_HINT)
    # llama-swap's YAML needs to know which flags there are.
    if program and plan.kind == "llama-swap":
        probe_flags(program, config, places.data)


def other_owner(places: Places) -> Optional[Places]:
    """The project whose daemon is alive, where that is not this one."""
    work = _read_json(owner_file(places.data)).get("work")
    if not work or work == places.work:
        return None
    other = places_at(places.data, str(work))
    if running_record(other) is None:
        return None
    return other


def seed_text(profile: str = "") -> Tuple[bytes, str]:
    """The models.ini for a new project: of `profile`, else of the one for this machine's memory;
    and why, in a line.

    Errors: UserError for a profile that there is not, or that this copy of the program lacks.
    """
    machine = this_machine(Config())
    # What this machine holds decides, unless the user knows better.
    name = choose_profile(machine)
    if profile:
        name = find_profile(profile)
    lacking = ""
    try:
        text = read_profile(name)
    except UserError as exc:
        if profile:
            raise
        # A copy without share/ still starts: with the profile that lies beside it.
        lacking = f"{exc}; taken instead: "
        name = BUNDLED_PROFILE
        text = read_profile(name)
    why = (f"{lacking}Profile {name}, the tiers for {profile_words(name)}"
           f" ({machine.budget_gb:.1f} GB usable: {machine.source})")
    if not fits_machine(name, machine):
        need = PROFILES[name]
        needed = f"{need.budget_gb:g} GB"
        if need.host_gb:
            needed += f" on a card and {need.host_gb:g} GB beside it"
        why += (f"; it needs {needed}, so not every tier can load:"
                " `llmstack fit` says which")
    return text, why


def planned_config(places: Places, warn: Optional[Callable[[str], None]] = None,
                   profile: str = "") -> Config:
    """load_config, or, without a models.ini, what `install` and `start` would give the directory.

    Errors: as theirs.
    """
    # A file that the user has named is not made up where it is missing: load_config says so.
    if places.env.get("LLMSTACK_MODELS_INI") or os.path.exists(places.models_ini):
        return load_config(places, warn)
    seed, _ = seed_text(profile)
    text = with_ultra(seed, places.env, places.data)
    config, _ = parse_models_ini(text.decode("utf-8"))
    return config


def check_state(places: Places) -> None:
    """Before files are written: a clone's .llmstack may be a link to ~/.config/opencode, say.

    Errors: UserError.
    """
    # An older version, or a clone, may have left these open to others.
    state = places.state
    close_to_others(places.data, state, places.in_state("logs"))
    if not os.path.islink(state):
        return
    target = os.path.realpath(state)
    # A link to another project's .llmstack is how worktrees share one.
    if os.path.basename(target) != ".llmstack":
        raise UserError(f"{state} is a link to {target}, and files would be written there",
                        "remove the link; one to a directory that is named .llmstack is followed")


def seed_project(places: Places, say: Say, text: Optional[bytes] = None, profile: str = "") -> None:
    """Give a directory its .llmstack/models.ini where it has none; never overwrites one.

    Errors: UserError.
    """
    check_state(places)
    there = os.path.exists(places.models_ini)
    if there and profile:
        raise UserError(f"{places.models_ini} is there already, and --profile would replace it",
                        "edit it, or move it away first")
    if there:
        return
    why = ""
    if text is None:
        text, why = seed_text(profile)
        text = with_ultra(text, places.env, places.data)
    # Nothing of a user's is overwritten: the file was not there a moment ago.
    write_atomic(places.models_ini, text)
    say(f"Wrote {places.models_ini}: the tiers of this project, yours to edit")
    if why:
        say(why)


def _stack_words(places: Places) -> Tuple[str, str]:
    """What another project's stack is called, and what ends it."""
    if places.is_demo:
        return "another llmstack (the demo)", "`llmstack stop --demo` ends it"
    work = places.work
    return f"another llmstack ({work})", f"`llmstack stop` in {work} ends it"


def _listening_stack(data: str, port: int) -> Optional[Places]:
    """The project of the llmstack that listens on `port`; None for any other program."""
    # llama-swap and its servers inherit the environment of the daemon that started them.
    for pid in sorted(listeners(port)):
        env = process_environment(pid) or {}
        work = env.get("LLMSTACK_WORK_DIR")
        if env.get(STACK_VARIABLE) and work:
            return places_at(data, work)
    return None


def _and_list(words: Sequence[str]) -> str:
    """a, b and c."""
    *first, last = words
    if not first:
        return last
    return f"{', '.join(first)} and {last}"


def _refuse_second_stack(places: Places) -> None:
    """One stack at a time, whatever its ports: two would not fit in memory. Errors: UserError."""
    owner = other_owner(places)
    if owner is None:
        return
    record = read_stack(owner)
    # It may have ended since it was found alive.
    if record is None:
        return
    name, advice = _stack_words(owner)
    url = base_url(record.host, record.port)
    raise UserError(f"{name} holds {record.port} and {record.engine_port}",
                    f"`llmstack install --external {url}` uses it from here, {advice}")


def check_ports(places: Places, wanted: Mapping[str, Tuple[str, int]]) -> None:
    """Refuse ports that others hold, and a second stack: one message says all. Errors: UserError.

    `wanted`: the key of models.ini that names a port -> (host, port); port 0 is any. What this
    project's own daemon holds is no obstacle: it is up, or is ended first.
    """
    _refuse_second_stack(places)
    free = [0]
    record = running_record(places)
    if record is not None:
        free += [record.port, record.engine_port]
    holders: Dict[str, List[str]] = {}          # who -> the ports
    keys, advice = [], []
    for key, (host, port) in wanted.items():
        if port in free or port_is_free(host, port):
            continue
        other = _listening_stack(places.data, port)
        if other is not None:
            holder, ending = _stack_words(other)
            advice.append(ending)
        else:
            holder = port_holder(port)
            keys.append(key)
        holders.setdefault(holder, []).append(str(port))
    if not holders:
        return
    if keys:
        advice.append(f"stop what is there, or choose another {_and_list(keys)} in models.ini")
    held = [f"{holder} holds {_and_list(ports)}" for holder, ports in holders.items()]
    # Two ports of one stack need its advice once.
    once = dict.fromkeys(advice)
    raise UserError("; ".join(held), "; ".join(once))


def stack_lock(places: Places, tell: Say = say) -> FileLock:
    return FileLock(os.path.join(places.data, "lock"),
                    lambda: tell("Another start or stop is under way; waiting for it"))


def _refuse_other_terms(plan: Plan, record: Record) -> None:
    """A running stack is not silently left on another channel or address than was asked for.

    Errors: UserError.
    """
    if record.channel != plan.channel:
        raise UserError(f"the stack is running on the {record.channel} channel",
                        f"run `llmstack restart --{plan.channel}` to change it")
    host = plan.host
    port = plan.port
    if (record.host, record.port) != (host, port):
        url = base_url(record.host, record.port)
        raise UserError(f"the router is running on {url}",
                        f"run `llmstack restart --host {host} --port {port}` to move it")


def _plan_ports(plan: Plan) -> Dict[str, Tuple[str, int]]:
    """Key of models.ini -> the address it names, of all that the daemon will listen on."""
    places = plan.places
    config = plan.config
    wanted = {
        "router_port": (plan.host, plan.port),
        "engine_port": ("127.0.0.1", config.engine_port),
    }
    # Without LiteLLM nothing will listen there.
    if proxy_tier(config) and find_litellm(places.env, places.data):
        wanted["litellm_port"] = ("127.0.0.1", config.litellm_port)
    return wanted


def program_name(program: Sequence[str]) -> str:
    """How a llama-server is shown: where it lies, or what has brought it."""
    if len(program) == 1:
        return program[0]
    return f"xllamacpp {LLAMA_CPP_PIN} from PyPI"


def _say_started(plan: Plan) -> None:
    places = plan.places
    config = plan.config
    program = find_llama_server(config, places.env, places.data)
    proxy = plan_proxy(places, config, places.env)
    engine = f"Engine  {plan.kind} on http://127.0.0.1:{config.engine_port}"
    if program:
        engine += f", llama-server is {program_name(program)}"
    say(f"Router  {plan.url}/v1")
    say(engine)
    if proxy is None:
        return
    when = "on demand"
    if proxy.preload:
        when = "starting; that takes a while"
    say(f"LiteLLM http://127.0.0.1:{proxy.port}/ui, {when}")


def _take_down(places: Places) -> int:
    """Stop all that was started for a project, by record or without; returns how many there were.

    Errors: UserError.
    """
    stopped = 0
    record = read_stack(places)
    if record is not None:
        stopped = stop_recorded(record, places.work, STOP_GRACE_S + PARK_GRACE_S)
    # What a crash has left has no record any more, but its mark.
    stopped += stop_members(project_members(places.work))
    _remove(pid_file(places))
    _remove(places.in_state("active-channel"))
    copy = owner_file(places.data)
    if _read_json(copy).get("work") == places.work:
        _remove(copy)
    return stopped


def _daemon_command(plan: Plan) -> List[str]:
    words = [sys.executable, PROGRAM, "_daemon"]
    words += ["--host", plan.host, "--port", str(plan.port), "--engine", plan.kind]
    if plan.channel == "next":
        words.append("--next")
    return words


def _start_daemon(plan: Plan) -> None:
    """Spawn the daemon and wait until it answers. Errors: UserError with the tail of its log."""
    places = plan.places
    log = places.log("router.log")
    log_bytes = file_size(log)
    blank = Record(
        pid=0,
        started="",
        stack=new_mark(places.work),
        host=plan.host,
        port=plan.port,
        kind=plan.kind,
        channel=plan.channel,
        engine_port=plan.config.engine_port,
    )
    env = {
        **places.env,
        "LLMSTACK_WORK_DIR": places.work,
        "LLMSTACK_DATA_DIR": places.data,
        "LLMSTACK_MODELS_INI": places.models_ini,
    }
    path = pid_file(places)
    process, record = spawn_recorded(_daemon_command(plan), log, env, path, blank)
    try:
        # The copy is what finds the daemon when .llmstack is deleted under it.
        copy = {"work": places.work, "record": read_text(path)}
        write_atomic(owner_file(places.data), json.dumps(copy))
        await_answer("the daemon", process, lambda: answers(record, places.env), log, log_bytes,
                     START_TIMEOUT_S)
    except BaseException:
        # After Ctrl-C, too, nothing stays up without a word.
        _take_down(places)
        process.wait()
        raise
    # The daemon stays; Popen is not to warn of that.
    process.returncode = 0
    write_atomic(places.in_state("active-channel"), plan.channel + "\n")
    _say_started(plan)


def start_stack(plan: Plan, again: bool = False) -> bool:
    """Bring up what check_plan has passed; True when it was started, False when it was up.

    `again`: a daemon that runs is taken down first. Errors: UserError.
    """
    places = plan.places
    with stack_lock(places):
        _refuse_second_stack(places)
        record = running_record(places)
        if record is not None and not again:
            _refuse_other_terms(plan, record)
            if answers(record, places.env) and engine_answers(record):
                return False
        if record is None and read_stack(places) is not None:
            say("The daemon has died; cleaning up after it and starting it again")
        # What a crash has left would hold the ports.
        _take_down(places)
        check_ports(places, _plan_ports(plan))
        _start_daemon(plan)
        return True


def ask_reload(record: Record, env: Mapping[str, str]) -> str:
    """Have the router read models.ini again; why it does not, "" where it has.

    Errors: UserError.
    """
    router = router_upstream(record, env)
    try:
        response, body = router.get("/llmstack/reload", 10.0, "POST")
    except (OSError, ValueError):
        raise UserError("the router does not answer", "see logs/router.log") from None
    if response.status == 200:
        return ""
    problem = parse_json_object(body).get("problem") or f"it answers {response.status}"
    return visible(str(problem), 2000)


def stop_stack(places: Places) -> bool:
    """Stop this project's daemon and all it has started; True when something was running.

    Errors: UserError.
    """
    with stack_lock(places):
        return _take_down(places) > 0


# ---- what runs, as `status` shows it


def _since_s(upstream: Upstream, row: Mapping[str, Any]) -> Optional[float]:
    """Since how many seconds a model is in its state; None where that cannot be told.

    llama-swap tells no times: there it is the age of the server's process, where that runs on this
    machine.
    """
    told = row.get("seconds")
    if isinstance(told, (int, float)) and 0 <= told < 1e10:
        return float(told)
    port = server_port(row)
    # Another machine's processes cannot be looked at.
    if "seconds" in row or not port or upstream.host != "127.0.0.1":
        return None
    for pid in listeners(port):
        return process_age_s(pid)
    return None


def _engine_states(upstream: Upstream) -> Optional[Dict[str, Tuple[str, Any]]]:
    """Tier -> (state, since how many seconds), as an engine, or a router before one, tells.

    None when it does not.
    """
    rows = running_rows(upstream)
    if rows is None:
        return None
    return {row["model"]: (row["state"], _since_s(upstream, row)) for row in rows}


def _router_states(upstream: Upstream) -> Dict[str, Dict[str, str]]:
    """Tier -> what a router tells of it: its state, and the reason for that."""
    states = {}
    for name, row in asked_json(upstream, "/llmstack/state").items():
        if isinstance(row, dict):
            values = row.items()
            states[name] = {key: value for key, value in values if isinstance(value, str)}
    return states


def _tier_row(tier: Tier, known: Tuple[str, Any],
              told: Mapping[str, str]) -> Dict[str, Any]:
    """A tier's row of `status`: `known` of the engine, or `told` by the router of a hosted one."""
    state, since_s = known
    weights = weights_for(tier)
    model = weights.path or weights.file
    # Of a hosted tier the engine knows nothing; the router knows how its host answers.
    if tier.backend != "gguf":
        model = hosted_model(tier)
        state = told.get("state", "unknown")
        since_s = None
    return {
        "name": tier.name,
        "role": tier.role,
        "backend": tier.backend,
        "ctx_size": tier.ctx_size,
        "model": model,
        "channel": tier.channel,
        "state": state,
        "reason": told.get("reason", ""),
        "since_s": since_s,
    }


def _environment_of(record: Optional[Record], env: Mapping[str, str]) -> Mapping[str, str]:
    """The environment a daemon was started with where that can be told, else `env`."""
    if record is None or not record.alive:
        return env
    return process_environment(record.pid) or env


def running_upstream(places: Places) -> Optional[Upstream]:
    """The running router of a project, with the key that its daemon wants; None where none is."""
    record = running_record(places)
    if record is None:
        return None
    upstream = router_upstream(record, places.env)
    upstream.key = upstream.key or api_key(_environment_of(record, {}))
    return upstream


def held_contexts(places: Places) -> Dict[str, int]:
    """Tier -> tokens a conversation, as the router of this project says; {} where none runs.

    A loaded server may hold less than models.ini asks of it, and says so to its router alone.
    """
    upstream = running_upstream(places)
    entries = asked_json(upstream, "/v1/models").get("data") if upstream else None
    if not isinstance(entries, list):
        return {}
    found = {}
    for entry in map(dict_of, entries):
        found[str(entry.get("id"))] = _quantity(entry.get("context_length"))
    return found


# llama-swap's and the engine's words for the state of LiteLLM's proxy -> a tier's.
_PROXY_WORDS = {"ready": "loaded", "starting": "loading", "": "cold"}


def _judge_hosted(row: Dict[str, Any], missing: Sequence[str], proxy: Tuple[str, Any]) -> None:
    """Put into a LiteLLM tier's row how its proxy is, and which credentials are missing."""
    row["missing"] = list(missing)
    state = row["state"]
    # The router calls a hosted tier available; whether its proxy is up, the engine knows.
    if state == "available":
        word, row["since_s"] = proxy
        row["state"] = _PROXY_WORDS.get(word, word)
    # A worse reason than a missing credential stays.
    if state in ("failing", "local_only") or "LiteLLM" in row["reason"]:
        return
    if missing:
        row["state"] = "no credential"
        row["reason"] = f"missing {', '.join(missing)}"


def running_channel(places: Places) -> str:
    """The channel of the project's daemon, "" where there is none."""
    record = running_record(places)
    if record is None:
        return ""
    return record.channel


def _hosted_states(config: Config, router: Optional[Upstream],
                   env: Mapping[str, str]) -> Dict[str, Dict[str, str]]:
    """What a router tells of its tiers; without one, which hosted tiers have no credential."""
    if router is not None:
        return _router_states(router)
    lacking = missing_credentials(config, env)
    return {name: {"state": "no credential", "reason": why} for name, why in lacking.items()}


def _tier_rows(places: Places, config: Config, router: Optional[Upstream],
               engine: Optional[Upstream], env: Mapping[str, str]) -> List[Dict[str, Any]]:
    """The rows of `status`, of what router and engine tell where they answer.

    `env`: that of the daemon, whose credentials count.
    """
    states: Dict[str, Tuple[str, Any]] = {}
    unnamed = ("unknown", None)
    if engine is not None:
        states = _engine_states(engine) or {}
        # An engine names only what is loaded.
        unnamed = ("stopped", None)
    hosted = _hosted_states(config, router, places.env)
    lacking = lacking_credentials(places, config, env)
    parking = parking_notes(places.data)
    proxy = states.get(PROXY, ("", None))
    rows = []
    for tier in config.tiers:
        name = tier.name
        known = states.get(name, unnamed)
        told = hosted.get(name, {})
        row = _tier_row(tier, known, told)
        row["parking"] = parking.get(name, "")
        row["settings"] = ""
        if tier.backend == "gguf":
            row["settings"] = settings_words(config, tier)
        if tier.backend == "litellm":
            _judge_hosted(row, lacking.get(name, ()), proxy)
        rows.append(row)
    return rows


def _daemon_row(record: Record, alive: bool, kind: str, url: str, up: object) -> Dict[str, Any]:
    return {
        "kind": kind,
        "url": url,
        "answers": up is not None,
        "pid": record.pid,
        "alive": alive,
    }


def stack_status(places: Places, config: Config) -> Dict[str, Any]:
    """What runs, probed now; the value `status --json` prints."""
    env = places.env
    record = read_stack(places)
    alive = owned_process(record, places.work)
    # Each is here only where it answers.
    router: Optional[Upstream] = None
    engine: Optional[Upstream] = None
    rows: Dict[str, Any] = {
        "project": places.work,
        "models_ini": places.models_ini,
        "router": None,
        "engine": None,
        "channel": None,
        "local_only": config.local_only,
        "other_owner": None,
        "now": None,
        "memory_pressure": "",
    }
    if record is not None:
        if alive and answers(record, env):
            router = router_upstream(record, env)
        if alive and engine_answers(record):
            engine = engine_upstream(record)
        router_url = base_url(record.host, record.port)
        engine_url = base_url("127.0.0.1", record.engine_port)
        rows["router"] = _daemon_row(record, alive, "router", router_url, router)
        rows["engine"] = _daemon_row(record, alive, record.kind, engine_url, engine)
        rows["channel"] = record.channel
        # The credentials that count are those of the daemon's terminal, not of this one.
        env = _environment_of(record, env)
    if router is not None:
        rows["now"] = asked_json(router, "/llmstack/snapshot")
        rows["memory_pressure"] = asked_json(router, "/llmstack/memory").get("pressure") or ""
    owner = other_owner(places)
    if owner is not None:
        rows["other_owner"] = owner.work
    rows["running"] = router is not None and engine is not None
    config = config.on_channel(rows["channel"] or "")
    rows["tiers"] = _tier_rows(places, config, router, engine, env)
    if litellm_tiers(config):
        rows["differences"] = litellm_differences(config, read_litellm_file(places, env))
    return rows


# ==================================================================================================
# INSTALL
# ==================================================================================================
# What `install` and `start` write into a project, and the thin client, whose router is elsewhere.
# A file that a person has changed is never overwritten: it is kept, or ours is put beside it.

REMOTE_PATIENCE_S = 10.0                        # for another machine's models.ini


def router_address(places: Places, config: Config) -> Tuple[str, int]:
    """(host, port) of the project's router: where it runs, else where models.ini would have it."""
    record = running_record(places)
    if record is not None:
        return record.host, record.port
    return config.host, config.router_port


def project_opencode_json(places: Places, config: Config, url: str, local: bool = True) -> str:
    """The opencode.json of a project whose router is at `url`.

    Where that is local, LiteLLM's gateway stands in it, and contexts are those of the files here.
    """
    key = api_key(places.env)
    mcp_url = ""
    if local:
        channel = pinned_marker(places).channel
        config = true_config(config.on_channel(channel), places)
        config = with_served_contexts(config, held_contexts(places))
        # The router may be of another terminal, and the key be known there.
        key = key or api_key(_environment_of(read_stack(places), {}))
        if litellm_tiers(config):
            mcp_url = f"http://127.0.0.1:{config.litellm_port}/mcp"
    notes = places.in_state("AGENTS.md")
    return render_opencode_json(config, url, notes, wants_key=bool(key), mcp_url=mcp_url)


def write_where_other(path: str, data: bytes) -> bool:
    """Give a file this content; False where it has it already. Errors: UserError."""
    if _read_bytes(path) == data:
        return False
    write_atomic(path, data)
    return True


def write_ours(places: Places, name: str, data: bytes, say: Say) -> bool:
    """Write a generated file into .llmstack/; True when anything has changed.

    A user's AGENTS.md stays, ours is put beside it; a changed opencode.json is kept as
    opencode.json.old.
    """
    path = places.in_state(name)
    old = _read_bytes(path)
    if old == data:
        return False
    if old and not _is_ours(places, name, old):
        if name == "AGENTS.md":
            say(f"{path} is yours and stays; this version's is beside it, in {name}.new")
            return write_where_other(path + ".new", data)
        write_atomic(path + ".old", old)
        say(f"Kept {path}, which somebody else wrote, as {name}.old")
    write_atomic(path, data)
    _remember(places, name, data)
    say(f"Wrote {path}")
    return True


def wire_project(places: Places, marker: Marker, opencode_json: str, say: Say,
                 trust: bool = True) -> bool:
    """Write opencode.json, AGENTS.md and the pin; True when anything has changed.

    What install has written is trusted. What a cloned directory may have brought along, an
    AGENTS.md of somebody else's or a program that models.ini names, is so only if it was before:
    `llmstack trust` is for that.
    """
    trusted = is_trusted(places, "hook")
    notes = b""
    changed = write_ours(places, "opencode.json", opencode_json.encode(), say)
    try:
        notes = read_shared_text("templates/AGENTS.md").encode()
    except UserError as exc:
        say(f"{exc}, so the project gets no AGENTS.md; {exc.hint}")
    if notes:
        changed |= write_ours(places, "AGENTS.md", notes, say)
    pin = places.in_state("default-channel")
    if write_where_other(pin, render_marker(marker).encode()):
        changed = True
        say(f"Wrote {pin}")
    # The router of before is not this project's any more.
    active = read_marker(places, "active-channel")
    if active and active.channel == "external" and active != marker:
        _remove(places.in_state("active-channel"))
    if not trust:
        return changed
    path = places.in_state("AGENTS.md")
    if not trusted and _read_bytes(path) != notes:
        say(f"{path} tells agents what to do and is not trusted here:"
            " look at it, then `llmstack trust`")
    elif not is_trusted(places, "hook"):
        trust_project(places, "hook")
    return changed


def rewire_project(places: Places, config: Config, url: str, say: Say) -> None:
    """After a start: opencode.json where there is none, or where it leads elsewhere.

    What was not trusted before is not trusted for that.
    """
    old = _read_bytes(places.in_state("opencode.json"))
    text = project_opencode_json(places, config, url)
    ours = _is_ours(places, "opencode.json", old)
    # A file that leads here stays as it is, whoever wrote it.
    if f'"{url}/v1"'.encode() in old:
        if ours and old != text.encode():
            say("opencode.json is not as models.ini has it now; `llmstack install` writes it anew")
        return
    if old and not ours:
        say(f"opencode.json leads elsewhere than to {url}; `llmstack install` writes it anew")
        return
    # Where none of them is there yet, what is trusted is nothing.
    trust = is_trusted(places, "hook")
    wire_project(places, pinned_marker(places), text, say, trust)


# ---- the thin client

# The thin client: a project whose router is somewhere else, and whose models.ini is read there
# each time. Nothing that comes from there is used before its size and its type are checked.


class RemoteRouter(NamedTuple):
    """A router that answers, as its /models.ini describes it."""

    url: str                                    # without /v1 or a trailing slash
    config: Config
    pid: str                                    # what it says its pid is
    upstream: Upstream


def pinned_url(places: Places) -> str:
    """The router a thin client is pinned to, "" for a local project."""
    marker = read_marker(places)
    if marker is None or marker.channel != "external":
        return ""
    return marker.url


def check_pin(places: Places) -> None:
    """Before anything local is done: a project whose pin is damaged may be a thin client.

    Errors: UserError.
    """
    path = places.in_state("default-channel")
    if os.path.lexists(path) and read_marker(places) is None:
        raise UserError(f"{path} names no channel",
                        "`llmstack install --current` writes it anew,"
                        " `llmstack install --external URL` for a router elsewhere", 2)


def refuse_external(places: Places) -> None:
    """For commands about what is local. Errors: UserError in a thin client."""
    check_pin(places)
    url = pinned_url(places)
    if url:
        raise UserError(f"this project uses the router at {url},"
                        " and nothing of it is on this machine",
                        "run it in the project that owns the daemons;"
                        " `llmstack install --current` makes this one local")


def trusted_url(places: Places) -> str:
    """pinned_url, which a cloned directory may have brought along: a key goes there.

    Errors: UserError where untrusted.
    """
    url = pinned_url(places)
    if url and not is_trusted(places, "hook"):
        raise UserError(f"this project's .llmstack/ leads to {url},"
                        " and it is not trusted on this machine",
                        "look at it, then run `llmstack trust`,"
                        f" or `llmstack install --external {url}`")
    return url


def _client_tls(env: Mapping[str, str], insecure: bool) -> Any:
    import ssl
    context = ssl.create_default_context()
    extra = env.get("NODE_EXTRA_CA_CERTS")      # opencode's own variable for it
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif extra:
        try:
            context.load_verify_locations(extra)
        except OSError as exc:                  # ssl.SSLError, too
            what = f"NODE_EXTRA_CA_CERTS names {extra}, which holds no certificates"
            raise UserError(f"{what} ({exc.strerror})", "name a PEM file", 2) from None
    return context


def _why_no_router(exc: Exception) -> Tuple[str, str]:
    """(what is wrong, what to do) when no whole answer came."""
    import ssl
    if isinstance(exc, ssl.SSLCertVerificationError):
        return (f"its certificate is not trusted: {exc.verify_message}",
                "name its certificate, a PEM file, in NODE_EXTRA_CA_CERTS, which opencode reads as"
                " well; --insecure does without verification here")
    if isinstance(exc, ssl.SSLError):
        return "it does not speak TLS", "give the URL with http://"
    if isinstance(exc, ConnectionRefusedError):
        return ("nothing listens there",
                "run `llmstack start` in the project that owns the router, or correct the URL")
    if isinstance(exc, socket.gaierror):
        return (f"its name is not found ({exc.strerror})",
                "correct the URL, or give the address in numbers")
    # The second is what upstream.get() says where bytes come, but too slowly.
    if isinstance(exc, socket.timeout) or "no answer within" in str(exc):
        return (f"no answer within {REMOTE_PATIENCE_S:g} s",
                "see that the machine is up and that no firewall stands between")
    if isinstance(exc, OSError):
        return str(exc.strerror or exc), "correct the URL, or see why that machine is not reached"
    return f"what answers is not HTTP ({exc})", "correct the URL; https:// where TLS is spoken"


def _said(body: bytes) -> str:
    """": " and the message of an error body, or nothing."""
    message = dict_of(parse_json_object(body).get("error")).get("message")
    if not isinstance(message, str):
        return ""
    return ": " + visible(message)


def _why_no_models_ini(response: Response, body: bytes, sent_key: bool,
                       problem: str) -> Tuple[str, str]:
    """(what is wrong, what to do) when something else than a models.ini came.

    `problem`: what its reader says of a text.
    """
    status = response.status
    if 300 <= status < 400:
        place = visible(response.header(b"location"))
        base = re.sub(r"/models\.ini\Z", "", place)
        if base != place and _SAFE_URL.match(base):
            return f"redirects to {place}", f"give that: llmstack install --external {base}"
        return (f"redirects to {place or 'nowhere'}",
                "a login page stands before it: name the router's own address")
    if status == 401:
        what = "wants an API key"
        if sent_key:
            what = "refuses this LLMSTACK_API_KEY"
        return what, "set LLMSTACK_API_KEY to the router's key, here and where opencode runs"
    if status == 404:
        return (f"answers 404{_said(body)}",
                "correct the URL: a llmstack router answers there,"
                " llama-server and llama-swap do not")
    if status != 200:
        return f"answers {status}{_said(body)}", "look at that machine's router.log"
    kind = response.header(b"content-type").lower()
    if "html" in kind or body.lstrip().startswith(b"<"):
        return ("is a web page, no router's models.ini",
                "correct the URL; a login page or a proxy may stand before the router")
    return (f"is no models.ini, {problem}",
            "correct the URL: it is to be a llmstack router's, without /v1")


def _read_remote(body: bytes, where: str) -> Config:
    """A router's configuration. Errors: ValueError, which says why it is none."""
    try:
        config, _ = parse_models_ini(decode_models_ini(body, where), where)
    except ConfigError as exc:
        problem = exc.problems[0].replace(where + ":", "line ")
        raise ValueError(visible(problem)) from None
    if not config.tiers:
        raise ValueError("it names no tier")
    return config


def fetch_remote(url: str, env: Mapping[str, str], insecure: bool = False) -> RemoteRouter:
    """Ask the router at `url` for its models.ini: a 200 that holds a tier means it is up.

    Errors: UserError, also for more than MAX_INI_BYTES and after REMOTE_PATIENCE_S.
    """
    # The address stands in prompts, and a shell must not expand any of it.
    upstream = parse_upstream(url)
    if not _SAFE_URL.match(upstream.url):
        raise UserError(f"{url!r} has characters that a shell's prompt could not show",
                        "use letters, digits and . _ ~ - /", 2)
    where = f"{upstream.url}/models.ini"
    upstream.key = api_key(env)
    try:
        if upstream.url.startswith("https"):
            upstream.use_tls(_client_tls(env, insecure))
        response, body = upstream.get("/models.ini", REMOTE_PATIENCE_S,
                                      limit_bytes=MAX_INI_BYTES)
    except (OSError, ValueError) as exc:
        what, hint = _why_no_router(exc)
        raise UserError(f"{where}: {what}", hint) from None
    problem = ""
    if response.status == 200:
        try:
            config = _read_remote(body, where)
            return RemoteRouter(upstream.url, config, response.header(b"x-llmstack-pid"), upstream)
        except ValueError as exc:
            problem = str(exc)
    what, hint = _why_no_models_ini(response, body, bool(upstream.key), problem)
    raise UserError(f"{where} {what}", hint)


def leave_daemons(places: Places, remote: RemoteRouter, say: Say) -> None:
    """Before a project becomes a thin client: stop the daemon it runs.

    Errors: UserError where that is this router.
    """
    record = running_record(places)
    if record is None:
        return
    # Another machine's router may have the same pid, or the same port.
    if remote.pid == str(record.pid) and remote.upstream.port == record.port:
        raise UserError(f"{remote.url} is this project's own router",
                        "run `install --external` in another project; to use another router here,"
                        " name its URL")
    say(f"Stopping this project's daemons: from now on it uses {remote.url}")
    stop_stack(places)


def connect_external(places: Places, insecure: bool, say: Say) -> None:
    """`start` in a thin client: see that its router is up. Errors: UserError."""
    remote = fetch_remote(trusted_url(places), places.env, insecure)
    url = remote.url
    # Shells show what runs, and the router has just answered.
    marker = Marker("external", url)
    write_atomic(places.in_state("active-channel"), render_marker(marker))
    say(f"Router  {url}/v1 is up")
    text = project_opencode_json(places, remote.config, url, local=False)
    if text.encode() != _read_bytes(places.in_state("opencode.json")):
        say("Its tiers, or whether there is an LLMSTACK_API_KEY, have changed;"
            " `llmstack install` writes opencode.json anew")


def _remote_tiers(remote: RemoteRouter) -> List[Dict[str, Any]]:
    """The rows of stack_status for another machine's tiers, fit to print."""
    states = _engine_states(remote.upstream)
    told = _router_states(remote.upstream)
    otherwise = "stopped"
    # A router that serves no engine's paths tells of hosted tiers alone.
    if states is None:
        otherwise, states = "unknown", {}
    rows = []
    for tier in remote.config.tiers:
        state = states.get(tier.name, (otherwise, None))
        row = _tier_row(tier, state, told.get(tier.name, {}))
        for key, value in row.items():
            if isinstance(value, str):
                row[key] = visible(value)
        rows.append(row)
    return rows


def external_status(places: Places) -> Dict[str, Any]:
    """stack_status of a thin client; "problem" says why the router does not answer."""
    url = pinned_url(places)
    router = {"kind": "external", "pid": None, "url": url, "alive": False, "answers": False}
    status: Dict[str, Any] = {
        "running": False,
        "project": places.work,
        "models_ini": f"{url}/models.ini",
        "router": router,
        "engine": None,
        "channel": "external",
        "tiers": [],
        "other_owner": None,
        "problem": None,
    }
    try:
        remote = fetch_remote(trusted_url(places), places.env)
    except UserError as exc:
        status["problem"] = f"{exc}; {exc.hint}"
        return status
    status["running"] = router["alive"] = router["answers"] = True
    status["tiers"] = _remote_tiers(remote)
    status["now"] = asked_json(remote.upstream, "/llmstack/snapshot")
    return status


# ==================================================================================================
# DOWNLOADS
# ==================================================================================================
# The room of what is known of downloads: how far each is, and whether their worker lives. They are
# started, fetched and ended by extras/download.py.

# The last release for Python 3.9, which a stock Mac has, and the last that goes on with what a
# killed download had got: newer ones write to a file with a random name.
HUB_PIN = "1.8.0"
HUB = PrivateEnvironment("hub", HUB_PIN, "huggingface_hub", "huggingface_hub",
                         f"huggingface_hub {HUB_PIN} (12 MB with what it needs)")


def span_words(seconds: float) -> str:
    """`75 s`, `14 min`, `12.5 h`"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def progress_words(have: float, size: float, rate: float) -> str:
    """`12.3 of 45.0 GB, 85.1 MB/s, 6 min left`; bytes, `size` 0 where it is not known, bytes/s."""
    unit = 1e6
    name = "MB"
    if size >= 1e9:
        unit = 1e9
        name = "GB"
    words = f"{have / unit:,.1f}"
    if size:
        words += f" of {size / unit:,.1f}"
    words += f" {name}"
    if not size or rate <= 0:
        return words
    left_s = (size - have) / rate
    return f"{words}, {rate / 1e6:,.1f} MB/s, {span_words(left_s)} left"


# What is known of a job once it has begun.
_QUEUE_VALUES = {
    "part": str,
    "error": str,
    "hint": str,
    "before": int,
    "total": int,
    "bytes": int,
}
UNFINISHED = ("queued", "running")              # the states of a job that has not ended
_ENDED = ("done", "failed")


def queue_file(places: Places) -> str:
    return places.in_state("downloads.json")


def read_queue(places: Places) -> Dict[str, Dict[str, Any]]:
    """Job name -> its state (queued, running, done, failed) and what is known of it.

    What a clone made up is left out: a row has a job's own values, each of its own type.
    """
    jobs = {}
    for name, row in _read_json(queue_file(places)).items():
        row = dict_of(row)
        job = parse_job(row)
        if job is None or job.name != name:
            continue
        if row.get("state") not in UNFINISHED + _ENDED:
            continue
        known = {"state": row["state"]}
        for key, kind in _QUEUE_VALUES.items():
            # A bool is an int, too.
            if type(row.get(key)) is kind:
                known[key] = row[key]
        jobs[name] = {**job._asdict(), **known}
    return jobs


def download_worker(places: Places) -> Optional[Record]:
    """The project's living worker."""
    record = read_record(places.in_state("download.pid"))
    if not owned_process(record, places.project):
        return None
    return record


def download_rows(places: Places) -> List[Dict[str, Any]]:
    """The downloads as `status` shows them; one whose worker was killed is "interrupted"."""
    worker = download_worker(places)
    cache = hub_cache_dir(places.env)
    rows = []
    for job in read_queue(places).values():
        state = job["state"]
        if worker is None and state in UNFINISHED:
            state = "interrupted"
        have = job.get("bytes", 0)
        if not have:
            # The hub's library keeps what it has of a file so; a queue may not lead elsewhere.
            part = os.path.basename(job.get("part", ""))
            folder = repo_dir(cache, job["repo"])
            path = os.path.join(folder, "blobs", f"{part}.incomplete")
            have = job.get("before", 0) + file_size(path)
        rows.append({
            "tier": job["tier"],
            "label": job["label"],
            "file": visible(job["files"][0]),
            "state": state,
            "bytes": have,
            "total_bytes": job.get("total") or have,
            "error": visible(job.get("error", "")),
            "hint": visible(job.get("hint", "")),
        })
    return rows


# ==================================================================================================
# SHELL
# ==================================================================================================
# The shell of `start` and the hooks. Both hand a project's files to opencode, which does what they
# say, so both ask first whether the project is trusted.

HOOK_FILES = {
    "bash": ".bash_llmstack_hook",
    "zsh": ".zsh_llmstack_hook",
    "fish": ".fish_llmstack_hook.fish",
    "powershell": ".powershell_llmstack_hook.ps1",
}


def _is_hooked(state: str) -> bool:
    """True for the .llmstack/ of a project as the shell hooks see it."""
    files = [os.path.join(state, name) for name in ("default-channel", "opencode.json")]
    return any(map(os.path.isfile, files))


def project_above(directory: str) -> str:
    """The nearest project of the shell hooks at or above a directory, "" for none."""
    return nearest_project(directory, _is_hooked)


def _shells_project(env: Mapping[str, str]) -> str:
    """The real path of the project that the shell stands in, "" for none. Errors: OSError."""
    # $PWD has the shell's spelling: a link in it may lead out of a project.
    here = env.get("PWD", "")
    is_ours = os.path.isabs(here) and os.path.samefile(here, ".")
    if not is_ours:
        here = os.getcwd()
    project = project_above(here)
    if not project:
        return ""
    return os.path.realpath(project)


def _restore_variable(env: MutableMapping[str, str], name: str) -> None:
    """Give a variable that a hook has set the value from before, where nobody has changed it."""
    new = env.pop(f"_llmstack_new_{name}", None)
    old = env.pop(f"_llmstack_old_{name}", None)
    if new is None or env.get(name) != new:
        return
    del env[name]
    # A variable of the shell's own was no program's to see.
    kind = env.get(f"_llmstack_had_{name}", "x")
    if old is not None and kind == "x":
        env[name] = old


def leave_stale_project(env: MutableMapping[str, str]) -> None:
    """Undo what a hook has set for another project than the one we are in, and take that one.

    bash and PowerShell hooks run at the prompt: in `cd ../second && llmstack stop` the variables
    are the first's.
    """
    _, _, project = hook_parts(env)
    # The shell of `start` stays in its project, wherever it goes.
    if not project or env.get("LLMSTACK_ACTIVE"):
        return
    if env.get("LLMSTACK_WORK_DIR") != project:
        return
    try:
        here = _shells_project(env)
    except OSError:
        return
    if here == project:
        return
    for name in SHELL_VARIABLES:
        _restore_variable(env, name)
    if here:
        env["LLMSTACK_WORK_DIR"] = here


def shell_values(places: Places, marker: Marker) -> Dict[str, str]:
    """The variables of a project's shell.

    OPENCODE_CONFIG only where the file is: without it, opencode would go elsewhere.
    """
    values = {}
    config = places.in_state("opencode.json")
    if os.path.isfile(config):
        values["OPENCODE_CONFIG"] = config
    channel = marker.channel
    values["LLMSTACK_WORK_DIR"] = places.work
    values["LLMSTACK_CHANNEL"] = channel
    values["LLMSTACK_ROOT"] = os.path.dirname(PROGRAM)
    if channel == "external":
        values["LLMSTACK_REMOTE_URL"] = marker.url
    return values


def _can_paint(env: Mapping[str, str]) -> bool:
    """Whether a prompt may have a colour of the 256."""
    if env.get("NO_COLOR"):
        return False
    if IS_WINDOWS or env.get("COLORTERM"):
        return True
    return "256color" in env.get("TERM", "")


def _shell_prefix(shell: str, places: Places, marker: Marker) -> str:
    project = os.path.basename(places.work)
    colour = _can_paint(places.env)
    return prompt_prefix(shell, marker.channel, project, marker.url, colour)


def hook_text(shell: str, data: str) -> str:
    """The hook of a shell as it is sourced here. Errors: UserError where it is missing."""
    text = ""
    for name in HOOK_SOURCES[shell]:
        text += read_shared_text(f"hooks/{name}")
    # An embedded Python may not know its own program.
    python = sys.executable or find_program("python3")
    return render_hook(shell, text, python, PROGRAM, trust_file(data))


def write_hook(shell: str, data: str) -> str:
    """Write the shell's hook file where it is not as it should be; its path. Errors: UserError."""
    path = os.path.expanduser(f"~/{HOOK_FILES[shell]}")
    text = hook_text(shell, data)
    # In it stand paths, whose bytes need be no text.
    write_where_other(path, os.fsencode(text))
    return path


def _touch_trust(data: str) -> None:
    """Files of a project that were only touched are older than the ledger again."""
    try:
        os.utime(trust_file(data))
    except OSError:
        pass


def hook_answer(places: Places, shell: str, tell: Say) -> str:
    """What the hook of a shell that has come into a project is to evaluate, "" for nothing.

    `tell` gets the reason.
    """
    effects = part_effects(places, "hook")
    # The project may have gone since the shell looked.
    if not effects:
        return ""
    if untrusted(places, "hook", effects):
        tell(untrusted_line(places))
        return ""
    pin = places.in_state("default-channel")
    if os.path.exists(pin) and read_marker(places) is None:
        tell(f"llmstack: {visible(pin)} names no channel; run `llmstack install`")
        return ""
    _touch_trust(places.data)
    marker = pinned_marker(places)
    values = shell_values(places, marker)
    prefix = _shell_prefix(shell, places, marker)
    # The shell's part stays, and the project's is this one from now on.
    level, of_shell, _ = hook_parts(places.env)
    hook = f"{level}:{of_shell}:{places.work}"
    return render_hook_answer(shell, values, places.env, prefix, hook)


def shell_program(env: Mapping[str, str]) -> str:
    """The user's shell: $LLMSTACK_SHELL, else $SHELL.

    On Windows PowerShell, where $SHELL is a guest's.
    """
    named = env.get("LLMSTACK_SHELL")
    if named:
        return find_program(named) or named
    if not IS_WINDOWS:
        return env.get("SHELL") or "/bin/sh"
    for name in ("pwsh", "powershell"):
        found = find_program(name)
        if found:
            return found
    return env.get("COMSPEC", "cmd.exe")


def _write_zdotdir(directory: str, text: str) -> None:
    """Write the .zshenv of the shell of `start`, with nothing beside it.

    A link that came with the project would lead elsewhere, and a .zshenv.zwc would be run.
    """
    import shutil
    _remove(directory)
    shutil.rmtree(directory, ignore_errors=True)
    write_atomic(os.path.join(directory, ".zshenv"), os.fsencode(text))


def _shell_command(program: str, places: Places, marker: Marker, env: Dict[str, str],
                   values: Mapping[str, str]) -> List[str]:
    """The command line of the subshell.

    Writes the start-up file that it needs, and changes `env` for it.
    """
    shell = shell_name(program)
    if not shell:
        return [program]
    try:
        hook = hook_text(shell, places.data)
    except UserError as exc:
        sys.stderr.write(f"llmstack: {exc}, so the prompt does not show the project; {exc.hint}\n")
        return [program]
    prefix = _shell_prefix(shell, places, marker)
    text = render_shell_start(shell, hook, values, prefix, env.get("ZDOTDIR"))
    if shell == "bash":
        path = places.in_state("llmstack.bashrc")
        write_atomic(path, os.fsencode(text))
        return [program, "--rcfile", path, "-i"]
    if shell == "zsh":
        path = places.in_state("zdotdir")
        _write_zdotdir(path, text)
        env["ZDOTDIR"] = path
        return [program, "-i"]
    if shell == "fish":
        return [program, "-i", "-C", text]
    import base64
    # PowerShell's own way to be given a text: no quote of it can end a word.
    encoded = base64.b64encode(text.encode("utf-16-le")).decode()
    return [program, "-NoLogo", "-NoExit", "-EncodedCommand", encoded]


def _become(command: List[str], env: Mapping[str, str]) -> int:
    """Run a command in place of this process; on Windows beside it, for its exit code.

    Errors: OSError.
    """
    import signal
    import subprocess
    if not IS_WINDOWS:
        # Python ignores these two, and a shell's children would, too.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(command[0], command, env)  # noqa: S606
    # A console's Ctrl-C comes to us, too; it is the shell's alone.
    signal.signal(signal.SIGINT, lambda *_: None)
    return subprocess.call(command, env=env)


def open_shell(places: Places, marker: Marker) -> int:
    """Become a shell in which opencode finds the project; does not return but on Windows.

    The process is replaced rather than waited for: job control, signals and the exit code are the
    shell's own. Errors: UserError.
    """
    # The hooks and the daemon spell the directory so.
    work = os.path.realpath(places.work)
    places = places_at(places.data, work, places.env)
    values = shell_values(places, marker)
    values["LLMSTACK_ACTIVE"] = "1"
    inside = {}
    for name, value in places.env.items():
        # What a hook has noted for itself is of the shell around this one.
        if not name.startswith(("_llmstack_", "LLMSTACK_HOOK")):
            inside[name] = value
    inside.update(values)
    program = shell_program(places.env)
    command = _shell_command(program, places, marker, inside, values)
    sys.stdout.flush()
    try:
        return _become(command, inside)
    except OSError as exc:
        raise UserError(f"cannot start the shell {program}: {exc.strerror}",
                        "name another in LLMSTACK_SHELL") from None


def _shown_marker(places: Places) -> Marker:
    """The channel that a running shell is to show: what runs, else what the project pins."""
    pinned = pinned_marker(places)
    active = read_marker(places, "active-channel") or pinned
    # An address in active-channel is nothing that was trusted.
    if "external" in (active.channel, pinned.channel):
        return pinned
    return active


def shell_lines(places: Places, shell: str) -> str:
    """What a running shell is to evaluate so that it has the project as it is now.

    "" where that is not trusted. A shell with the hook is told to look again; the shell of `start`,
    or one without either, gets the variables.
    """
    env = places.env
    inside = bool(env.get("LLMSTACK_ACTIVE"))
    if hooked_shell(env) and not inside:
        return render_own_variable(shell, "key", "?") + "\n"
    if not is_trusted(places, "hook"):
        return ""
    marker = _shown_marker(places)
    values: Dict[str, Optional[str]] = {**shell_values(places, marker)}
    if inside:
        # The shell of `start` has nothing of before to go back to.
        for name in SHELL_VARIABLES:
            if name in env:
                values.setdefault(name, None)
    lines = []
    for name, value in values.items():
        lines.append(render_assignment(shell, name, value))
    if inside:
        prefix = _shell_prefix(shell, places, marker)
        lines.append(render_own_variable(shell, "prefix", prefix))
    return "\n".join(lines) + "\n"


# ==================================================================================================
# STATUS
# ==================================================================================================
# `status` as people read it: it shows a router's snapshot, whose values are another process's word,
# so each is looked at before it is shown. It makes lines and neither asks nor prints.

Colour = Callable[[str, str], str]              # a text and its colour -> how it is printed
_GREEN, _YELLOW, _RED, _FAINT = "32", "33", "31", "2"
STATE_COLOURS = {
    "loaded": _GREEN,
    "available": _GREEN,
    "intact": _GREEN,
    "served": _GREEN,
    "loading": _YELLOW,
    "unloading": _YELLOW,
    "missing": _YELLOW,
    "partial": _YELLOW,
    "outdated": _YELLOW,
    "failed to load": _RED,
    "failing": _RED,
    "no credential": _RED,
    "damaged": _RED,
    "not served": _RED,
}


def value_in(row: Any, key: str) -> Any:
    return dict_of(row).get(key)


def text_in(row: Any, key: str) -> str:
    value = value_in(row, key)
    if not isinstance(value, str):
        return ""
    return visible(value)


def number_in(row: Any, key: str) -> float:
    value = value_in(row, key)
    # JSON as Python reads it knows NaN and Infinity, too.
    if isinstance(value, (int, float)) and 0 <= value < 1e15:
        return float(value)
    return 0.0


def dicts_in(row: Mapping[str, Any], key: str) -> List[Dict[str, Any]]:
    values = row.get(key)
    if not isinstance(values, list):
        return []
    return [value for value in values if isinstance(value, dict)]


def rate_words(per_s: float) -> str:
    """81 tok/s, or 3.1 tok/s where that says more; "" for none."""
    if not per_s:
        return ""
    if per_s >= 10:
        return f"{per_s:.0f} tok/s"
    return f"{per_s:.1f} tok/s"


def context_words(tokens: float) -> str:
    """128k for 131,072 tokens, 200k for 200,000."""
    # Local models are made for powers of two, hosts count in thousands.
    if tokens % 1024 == 0:
        return f"{tokens / 1024:.0f}k"
    if tokens >= 1000:
        return f"{tokens / 1000:.0f}k"
    return f"{tokens:.0f}"


def _since_words(then_s: float, now_s: float) -> str:
    """How long ago something was; another machine's clock may be ahead of ours."""
    return span_words(max(now_s - then_s, 0))


def _occupation(name: str, now: Mapping[str, Any], now_s: float) -> List[str]:
    """`2 answering`, `1 waiting, 14 s`: what a tier's requests do."""
    stages, waiting_since = [], []
    for request in dicts_in(now, "requests"):
        if text_in(request, "tier") != name:
            continue
        stage = text_in(request, "stage")
        if stage.startswith(("writing", "reading")):
            stages.append(stage)
        else:
            waiting_since.append(number_in(request, "began"))
    words = []
    # Of a single request it is known how much of its prompt is read.
    if len(stages) == 1 and "%" in stages[0]:
        words += stages
    elif stages:
        words.append(f"{len(stages)} answering")
    if waiting_since:
        longest = _since_words(min(waiting_since), now_s)
        words.append(f"{len(waiting_since)} waiting, {longest}")
    return words


class TierLine(NamedTuple):
    """A tier's row, a word or two a column; `note` may be a sentence."""

    name: str
    role: str
    context: str
    state: str
    memory: str
    speed: str
    note: str


def tier_line(row: Mapping[str, Any], now: Mapping[str, Any], now_s: float) -> TierLine:
    """A tier of a snapshot, or of stack_status where there is none."""
    name = text_in(row, "name")
    state = text_in(row, "state")
    note = text_in(row, "reason")
    since_s = number_in(row, "since")
    share = number_in(row, "share")
    ago = _since_words(since_s, now_s)
    if state == "failed to load" and since_s:
        note = f"{ago} ago: {note}"
    if state == "loading" and share:
        state += percent_words(share)
    elif state == "loading" and since_s:
        state += f" {ago}"
    words = _occupation(name, now, now_s)
    if note:
        words.append(note)
    return TierLine(
        name=name,
        role=text_in(row, "role") or "-",
        context=context_words(number_in(row, "ctx_size")),
        state=state,
        memory=size_words(number_in(row, "bytes")),
        speed=rate_words(number_in(row, "per_s")),
        note=", ".join(words),
    )


# What a narrow terminal does without, the first first, and what must fit beside it: a short note.
_LEFT_OUT = (
    ("role", 22),
    ("model", 0),
    ("speed", 0),
    ("context", 0),
    ("memory", 0),
    ("size", 0),
)
_RIGHT = ("context", "memory", "speed", "size")
_GAP = "  "


def _state_colour(state: str) -> str:
    # A state may have more behind its word, such as how far a load is.
    for word, code in STATE_COLOURS.items():
        if state.startswith(word):
            return code
    return _FAINT


def wrapped_lines(text: str, width: int, indent: str) -> List[str]:
    """A text in lines of `width` columns, those after the first indented; a path stays whole."""
    import textwrap
    return textwrap.wrap(text, max(width, 20), subsequent_indent=indent, break_long_words=False,
                         break_on_hyphens=False)


def _column_widths(rows: Sequence[Any]) -> Dict[str, int]:
    """Column -> how wide it is, its gap with it, of those that say something."""
    widths = {}
    # The last field is the note.
    for name in rows[0]._fields[:-1]:
        most = max(len(getattr(row, name)) for row in rows)
        if most:
            widths[name] = most + len(_GAP)
    return widths


def _cell(text: str, column: str, width: int, colour: Colour) -> str:
    """A text as wide as its column, whose gap is not part of that."""
    # A colour takes no room, so the padding is measured before.
    padding = " " * (width - len(_GAP) - len(text))
    if column == "state":
        text = colour(text, _state_colour(text))
    if column in _RIGHT:
        return padding + text
    return text + padding


def render_table(rows: Sequence[Any], width: int, colour: Colour) -> List[str]:
    """Rows of the same NamedTuple of texts, its fields as columns; empty columns are left out.

    `state` has a colour. A `note`, the last field, goes below its row where it does not fit.
    """
    if not rows:
        return []
    wide = _column_widths(rows)
    for name, beside in _LEFT_OUT:
        if sum(wide.values()) + beside > width:
            wide.pop(name, 0)
    room = width - sum(wide.values())           # for a note
    shown = []
    for row in rows:
        cells = []
        for column, columns in wide.items():
            text = getattr(row, column)
            cells.append(_cell(text, column, columns, colour))
        note = row.note
        if note and len(note) <= room:
            cells.append(note)
            note = ""
        line = _GAP.join(cells)
        shown.append(line.rstrip())
        shown += wrapped_lines("    " + note, width, "    ")
    return shown


def _last_words(row: Mapping[str, Any], now_s: float) -> str:
    """`last  auto → code-fast, 35,000 tokens (31,200 cached), 2.1 s, 4 s ago`"""
    target = text_in(row, "tier")
    if text_in(row, "rung") != "explicit":
        target = f"auto \u2192 {target}"
    # What the model has counted, else what the router has estimated.
    tokens = number_in(row, "truth") or number_in(row, "tokens")
    read = f"{tokens:,.0f} tokens"
    cached = number_in(row, "cached")
    if cached:
        read += f" ({cached:,.0f} cached)"
    words = [target, read]
    ended = text_in(row, "ended")
    if ended != "done":
        words.append(ended)
    took_s = number_in(row, "total_s")
    words.append(f"{took_s:.1f} s")
    ago = _since_words(number_in(row, "time"), now_s)
    words.append(f"{ago} ago")
    return "last  " + ", ".join(words)


def _stack_facts(now: Mapping[str, Any]) -> List[str]:
    """What there is to say of the whole stack."""
    about = now.get("about")
    memory = now.get("memory")
    facts = []
    budget_gb = number_in(memory, "budget") / 1e9
    if budget_gb:
        taken_gb = number_in(memory, "resident") / 1e9
        facts.append(f"memory {taken_gb:.1f} of {budget_gb:.1f} GB")
    pressure = text_in(memory, "pressure")
    if pressure:
        facts.append(f"{pressure}: idle models are unloaded")
    if value_in(about, "changed") is True:
        facts.append("models.ini changed since the start: llmstack restart")
    if value_in(about, "local_only") is True:
        facts.append("local_only: no request leaves this machine")
    return facts


def download_lines(now: Mapping[str, Any], width: int) -> List[str]:
    """The downloads that have not ended well."""
    lines: List[str] = []
    for row in dicts_in(now, "downloads"):
        state = text_in(row, "state")
        if state == "done":
            continue
        how = text_in(row, "error")
        if not how:
            size = number_in(row, "total_bytes")
            how = progress_words(number_in(row, "bytes"), size, 0)
        tier = text_in(row, "tier")
        label = text_in(row, "label")
        line = f"Download {tier}-{label}: {state}, {how}"
        lines += wrapped_lines(line, width, "  ")
    return lines


def render_snapshot(now: Mapping[str, Any], url: str, width: int, now_s: float,
                    colour: Colour) -> List[str]:
    """What runs, in lines of at most `width` columns where words allow it."""
    up = f"up  {url}/v1"
    facts = _stack_facts(now)
    lines = ["    ".join([up, *facts])]
    if len(lines[0]) > width:
        lines = [up]
        for fact in facts:
            lines += wrapped_lines(fact, width, "  ")
    # Last, for a colour has a length and takes no room.
    lines[0] = lines[0].replace("up", colour("up", _GREEN), 1)
    tiers = [tier_line(row, now, now_s) for row in dicts_in(now, "tiers")]
    lines += render_table(tiers, width, colour)
    lines += download_lines(now, width)
    decisions = dicts_in(now, "decisions")
    if decisions:
        last = _last_words(decisions[-1], now_s)
        lines += wrapped_lines(last, width, "      ")
    return lines


# ==================================================================================================
# DAEMON
# ==================================================================================================
# The process that `start` leaves behind: here a Plan becomes an engine, a router and their two
# servers, which run until a signal. Nothing in here reads arguments or speaks to a person; what
# there is to say goes to the logs.


def unserved_tiers(plan: Plan, config: Config) -> Dict[str, str]:
    """Tiers of a later configuration that the engine does not serve -> why."""
    places = plan.places
    found = unserved_hosted(places, config, places.env)
    # The engine has nothing to do with tiers of another host.
    known = {tier.name for tier in plan.config.tiers if tier.backend != "openai"}
    for tier in config.tiers:
        if tier.backend != "openai" and tier.name not in known:
            found[tier.name] = "the engine does not know it before `llmstack restart`"
    return found


def router_app(plan: Plan, behind: Behind, log: Log) -> RouterApp:
    """The router before this project's own engine."""
    places = plan.places
    record: Optional[Recorder] = None
    if plan.config.decision_log:
        path = places.log("decisions.jsonl")
        record = Recorder(path)
    remedy = "run `llmstack start`"
    if places.is_demo:
        remedy = "run `llmstack start --demo`"

    def reload() -> Config:
        # The demo's model lies elsewhere by design.
        if not places.is_demo:
            check_run_trust(places)
        config = load_config(places, log.warning)
        # A new file does not change what runs: that takes a restart.
        config = config.on_channel(plan.channel)
        return true_config(config, places, log.warning)

    setting = Setting(
        loopback=is_loopback(plan.host),
        key=api_key(places.env),
        models_ini=places.models_ini,
        reload=reload,
        unserved=functools.partial(unserved_tiers, plan),
        remedy=remedy,
        env=places.env,
        record=record,
        foreign_logs=(places.log("llama-swap.log"),),
    )
    app = RouterApp(plan.config, behind, log, setting)
    # The page shows downloads; the router itself knows nothing of them.
    sources = app.events.sources
    sources.append(lambda: {"downloads": download_rows(places)})
    return app


def listen(host: str, port: int, app: App) -> Server:
    """A listening server. Errors: UserError, who has the port."""
    try:
        return Server(host, port, app)
    except OSError as exc:
        # Who holds the port helps more than the number of the error.
        holder = exc.strerror
        if port and not port_is_free(host, port):
            holder = f"taken by {port_holder(port)}"
        raise UserError(f"cannot listen on {host} port {port}: {holder}",
                        "choose another --port, or --host") from None


class _Terminated(BaseException):
    """SIGTERM, on its way to the main thread's server loop."""


def _nothing() -> None:
    """What a signal sets off where there is nothing to do."""


def _on_signals(hangup: Callable[[], None] = _nothing,
                shutdown: Callable[[], None] = _nothing) -> None:
    """TERM ends the server loop; HUP ends nothing.

    A terminal that closes takes no daemon with it.
    """
    import signal

    def terminate(*_: object) -> None:
        # An exception in a finalizer would be lost, and the loop would go on.
        shutdown()
        raise _Terminated

    # TERM is what `stop`, systemd and launchd send.
    signal.signal(signal.SIGTERM, terminate)
    if not IS_WINDOWS:
        signal.signal(signal.SIGHUP, lambda *_: hangup())


def run_until_signal(server: Server, app: RouterApp) -> None:
    """Serve until a signal says to stop."""
    _on_signals(app.ask_reload, server.shutdown)
    # Once a second the loop also does the housekeeping of its application.
    try:
        server.serve_forever()
    finally:
        app.log.flush()
        server.server_close()


def _ignore_signals() -> None:
    """While ending: a second TERM must not cut the cleaning up short.

    Whoever is in a hurry sends KILL.
    """
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _without_our_key(env: Mapping[str, str]) -> Dict[str, str]:
    """An environment for programs that do not ask the router."""
    others = dict(env)
    others.pop("LLMSTACK_API_KEY", None)
    return others


class ServerCommands:
    """The command line of each tier's llama-server, as the engine asks for it at a load."""

    def __init__(self, places: Places, config: Config, log: Log, drafts: Drafts,
                 parks: bool) -> None:
        self._places = places
        self._config = config
        self._log = log
        self._drafts = drafts
        self._parks = parks
        self._refused: Dict[Tuple[str, ...], FrozenSet[str]] = {}
        self._probing = threading.Lock()

    def _refused_by(self, server: Tuple[str, ...]) -> FrozenSet[str]:
        """The flags that a build refuses. It is asked at its first load: the daemon is up by then.

        Errors: UserError.
        """
        with self._probing:
            refused = self._refused.get(server)
            if refused is None:
                refused = probe_flags(server, self._config, self._places.data)
                self._refused[server] = refused
                for said in refused_settings(self._config, refused):
                    self._log.warning(said)
            return refused

    def __call__(self, tier: Tier, port: int) -> List[str]:
        """Errors: UserError."""
        config = self._config
        env = self._places.env
        data = self._places.data
        # A tier may name a llama-server of its own.
        own = tier_config(config, tier)
        server = find_llama_server(own, env, data)
        refused = self._refused_by(server)
        identity = probe_identity(tier, config, env, data)
        ready = ready_tier(tier, env)
        ready = self._drafts.choose(tier, ready, identity)
        words = server_command(server, ready, config, port, refused)
        if self._parks and "--slot-save-path" not in refused:
            words += parking_flags(data)
        return words


def _embedded_app(places: Places, config: Config, log: Log, drafts: Drafts) -> EngineApp:
    """The embedded engine. Errors: UserError."""
    env = places.env
    data = places.data
    program = find_llama_server(config, env, data)
    machine = this_machine(config)
    fits = measure_tiers(config, machine, env)
    config = with_caches(config, fits, machine)
    parking = open_parking(data, config, log)
    parks = parking is not None and parking.parks
    command = ServerCommands(places, config, log, drafts, parks)

    def log_path(name: str) -> str:
        return places.log(f"{name}.log")

    budget = f"{machine.budget_gb:.1f} GB ({machine.source})"
    server = " ".join(program) or "no"
    log.info(f"memory budget {budget}, {server} server")
    plan = EnginePlan(
        env=_without_our_key(env),
        budget_gb=machine.budget_gb,
        fits=fits,
        proxy=plan_proxy(places, config, env),
        parking=parking,
        budgets_gb=machine.budgets_gb,
    )
    engine = Engine(config, command, log, log_path, plan)
    watch = MemoryWatch(machine)
    return EngineApp(engine, log, watch)


def _swap_bays(data: str, config: Config, env: Mapping[str, str], log: Log) -> Optional[SwapBays]:
    """The parking of llama-swap's models; None where there can be none. Errors: UserError."""
    program = find_llama_server(config, env, data)
    parking = open_parking(data, config, log)
    if parking is None or not program:
        return None
    server = Binary(program, probe_flags(program, config, data))
    if not _can_park(config, server):
        return None

    def identify(tier: Tier) -> str:
        own = tier_config(config, tier)
        program = find_llama_server(own, env, data)
        ready = _ready_for_swap(tier, env)
        refused = probe_flags(program, config, data)
        # A port makes no difference to what is parked.
        words = server_command(program, ready, config, 0, refused)
        weights = weights_for(tier)
        return parking_identity(words, cached_model(weights, env), env)

    return SwapBays(parking, local_tiers(config), identify, log)


def _swap_app(places: Places, config: Config, log: Log, drafts: Drafts) -> SwapApp:
    """llama-swap behind our listener, its configuration written anew. Errors: UserError."""
    env = _without_our_key(places.env)
    proxy = plan_proxy(places, config, env)
    if proxy:
        # llama-swap hands its own environment down to LiteLLM.
        env = litellm_env(env)
    # llama-swap's key, and that of its servers.
    env["LLAMA_API_KEY"] = os.urandom(16).hex()
    data = places.data
    path = places.in_state("llama-swap.yaml")
    sets = write_swap_yaml(places, config, proxy, path, drafts)
    program = find_llama_swap(env, data)

    def command(port: int) -> List[str]:
        return [program, "-config", path, "-listen", f"127.0.0.1:{port}"]

    for said in refused_notes(config, env, data):
        log.warning(said)
    bays = _swap_bays(data, config, env, log)
    output = places.log("llama-swap.log")
    app = SwapApp(config, command, env, log, output, bays)
    app.sets = sets
    return app


def _serve_plan(plan: Plan, log: Log, engine_log: Log) -> None:
    """Listen for clients and for the engine's own, until a signal says to stop."""
    places = plan.places
    config = plan.config
    drafts = Drafts(places.data, engine_log)
    make_engine: Callable[..., Behind] = _embedded_app
    if plan.kind == "llama-swap":
        make_engine = _swap_app
    behind = make_engine(places, config, engine_log, drafts)
    app = router_app(plan, behind, log)
    events = app.events
    events.hearers.append(drafts.hear)
    events.sources.append(lambda: {"drafting": drafts.said()})
    try:
        # From here on there are children to end.
        _on_signals()
        engine_server = listen("127.0.0.1", config.engine_port, behind)
        server = listen(plan.host, plan.port, app)
        # Where any port will do, it is known only now.
        page = base_url(plan.host, server.server_port)
        behind.page_url = f"{page}/"
        behind.start()
        in_background("engine", engine_server.serve_forever)
        log.info(f"llmstack {VERSION} on {plan.url}, engine {plan.kind}")
        run_until_signal(server, app)
    finally:
        _ignore_signals()
        # Here the models are parked and end; it may take as long as the slowest.
        behind.close()


# ==================================================================================================
# COMMANDS
# ==================================================================================================
# The room of the command line: each command reads its arguments, calls the rooms above and says
# what came of it. Here os.environ becomes the environment that travels with the places.


def _places(args: Any) -> Places:
    return find_places(os.environ, getattr(args, "demo", False))


def running_router(places: Places) -> Tuple[Upstream, Config]:
    """The router that `status` shows, its key with it, and its tiers.

    Errors: UserError where none is up.
    """
    url = trusted_url(places)
    if url:
        remote = fetch_remote(url, places.env)
        return remote.upstream, remote.config
    upstream = running_upstream(places)
    if upstream is None:
        raise UserError("the stack of this project is not running", "run `llmstack start`")
    return upstream, load_config(places)


def chosen_channel(places: Places, config: Config, asked: str = "", running: str = "") -> str:
    """The channel to run: as `asked`, else the one that is `running`, else the project's own.

    Errors: UserError where nothing is queued.
    """
    # What is asked on the command line goes before the environment, that before what runs.
    use_next = places.env.get("LLMSTACK_USE_NEXT", "")
    if asked == "current":
        return "current"
    if asked == "next" or use_next.strip().lower() in _TRUE:
        text = decode_models_ini(*_models_ini_bytes(places))
        check_queued(config, profile_of(text))
        return "next"
    channel = running or pinned_marker(places).channel
    if channel != "next":
        return "current"
    if not any(tier.has_next for tier in config.tiers):
        warn("no tier has a queued upgrade any more; running the current channel")
        return "current"
    return "next"


def _warn_of_missing(config: Config) -> None:
    """Say which models are not on the disk; a tier whose file comes later works then."""
    # Only a warning: the file may be on a disk that is not mounted yet.
    for tier in config.tiers:
        if tier.path and not os.path.exists(tier.path):
            warn(f"[{tier.name}] there is no {tier.path}")


def _plan_start(args: Any, places: Places, config: Config) -> Plan:
    """What is to be brought up; what runs keeps its address and channel unless told otherwise.

    Errors: UserError.
    """
    host, port = config.host, config.router_port
    running = ""
    record = running_record(places)
    if record is not None:
        host, port = record.host, record.port
        running = record.channel
    host = args.host or host
    # Port 0 is any free one; what runs has found its own already.
    if args.port == 0 and record is None:
        port = free_port(host)
    port = args.port or port
    # Before anything is started: others could reach it from its first second.
    check_exposure(host, config, places.env)
    _warn_of_missing(config)
    kind = choose_engine(config, places.env, places.data)
    channel = chosen_channel(places, config, args.channel, running)
    return Plan(places, config.on_channel(channel), host, port, kind)


def port_number(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) <= 65_535:
        return int(text)
    import argparse
    raise argparse.ArgumentTypeError(f"{text!r} is not a port")


def _enter_shell(args: Any, places: Places, marker: Marker) -> int:
    """What follows `start`: a shell where a person is there and has none yet.

    Does not return from it on POSIX.
    """
    env = places.env
    if args.detach or not has_person():
        return 0
    if env.get("LLMSTACK_ACTIVE"):
        say("This is a shell of `start` already; `exit` leaves it.")
        return 0
    if not is_trusted(places, "hook"):
        _tell(untrusted_line(places))
        return 0
    if hooked_shell(env):
        say("The hook of this shell does the rest, at its next prompt.")
        return 0
    stays = ", the daemons stay"
    if marker.channel == "external":
        stays = ""
    say(f"This is a shell for {places.work}; `exit` leaves it{stays}.")
    return open_shell(places, marker)


def _start_external(args: Any, places: Places) -> int:
    # What is asked for would be silently ignored.
    if args.channel or args.host or args.port:
        raise UserError(f"this project uses the router at {pinned_url(places)}, whose channel and"
                        " address are not decided here",
                        "`llmstack install --current` makes the project local", 2)
    connect_external(places, args.insecure, say)
    return _enter_shell(args, places, Marker("external", pinned_url(places)))


# ---- the commands in extras/


def extra_names() -> List[str]:
    """The commands in extras/, which lies beside this file or in its archive."""
    files: List[str] = []
    try:
        if getattr(_LOADER, "archive", None):
            import zipfile
            with zipfile.ZipFile(PROGRAM) as archive:
                files = archive.namelist()
        else:
            files = ["extras/" + name for name in os.listdir(_beside("extras"))]
    except OSError:
        # A copy of this file alone has none.
        pass
    names = re.findall(r"(?m)^extras/([a-z_]+)\.py$", "\n".join(files))
    return sorted(name.replace("_", "-") for name in names)


def unknown_word(word: str, known: Iterable[str]) -> str:
    """'strat', did you mean start?"""
    return repr(word) + _did_you_mean(word, known)


def extra_file(name: str) -> str:
    return f"extras/{name.replace('-', '_')}.py"


# In the order of `help`. What this file does not define is an extra: extras/NAME.py.
COMMAND_GROUPS = (
    ("Every day", "start stop restart status watch reload run ps logs demo"),
    ("Decisions", "why replay cache"),
    ("Models", "setup add list rm prune promote download check fit probe"),
    ("Programs", "install-llama-swap install-litellm"),
    ("Projects", "install connect run-with trust activate config"),
    ("Keep it", "service serve forget completion self version help"),
)


def command_groups() -> List[Tuple[str, List[str]]]:
    """COMMAND_GROUPS, and the extras that it does not know."""
    groups = [(heading, names.split()) for heading, names in COMMAND_GROUPS]
    more = extra_names()
    for _, names in groups:
        more = [name for name in more if name not in names]
    return [*groups, ("More", more)]


def command_names() -> List[str]:
    return [name for _, names in command_groups() for name in names]


def load_extra(name: str) -> Any:
    """The module of a command in extras/. Errors: UserError where there is none."""
    names = command_names()
    if name not in names:
        raise UserError(f"there is no command {unknown_word(name, names)}",
                        "`llmstack help` lists the commands", 2)
    try:
        source = read_resource(extra_file(name))
    except UserError:
        raise UserError(f"llmstack {name} is one of the extras, which this copy is without",
                        "copy extras/ beside llmstack.py, or use llmstack.pyz", 2) from None
    module: Any = type(sys)("llmstack_" + name.replace("-", "_"))
    module.__file__ = _beside(extra_file(name))
    # Without this file's own __future__ flags: an extra says which it wants.
    code = compile(source, module.__file__, "exec", dont_inherit=True)
    exec(code, module.__dict__)  # noqa: S102
    return module


class Result(NamedTuple):
    """What a command has found: one value for programs, the lines that say it to people."""

    found: Any
    lines: Sequence[str]
    code: int = 0
    is_json: bool = False
    notes: Sequence[str] = ()                   # warnings that follow the lines
    problem: Optional[UserError] = None         # raised once all else is shown


def show(result: Result) -> int:
    """Print a result, the one place that does; its exit code. Errors: UserError, its problem."""
    lines, notes = result.lines, result.notes
    if result.is_json:
        lines, notes = [as_json(result.found)], ()
    for line in lines:
        say(line)
    for note in notes:
        warn(note)
    if result.problem is not None:
        raise result.problem
    return result.code


def run_extra(name: str, argv: Sequence[str]) -> int:
    """Run a command of extras/, whose main() returns a Result or a code. Errors: UserError."""
    result = load_extra(name).main(argv, sys.modules[__name__])
    if isinstance(result, Result):
        return show(result)
    return int(result)


# ---- start and stop


def _warn_unserved(places: Places, config: Config, ask: Ask = _never_ask) -> None:
    """Prepare what hosted tiers need, and say why they are not served where they are not."""
    why = prepare_hosted(places, config, say, ask)
    if why:
        warn(f"hosted tiers are not served: {why}")


def _bring_up(args: Any, again: bool) -> int:
    """`start`, and with `again` `restart`.

    Everything is checked before anything is written or stopped.
    """
    places = _places(args)
    profile = getattr(args, "profile", "")      # `restart` has none
    this_module = sys.modules[__name__]
    demo: Any = None
    if args.demo:
        demo = load_extra("demo")
        demo.prepare_demo(args, places, this_module)
    else:
        offer_trust(places, say, ask_person)
        if pinned_url(places):
            return _start_external(args, places)
        check_run_trust(places)
        check_pin(places)
        check_state(places)
    plan = _plan_start(args, places, planned_config(places, warn, profile))
    # A start that cannot succeed writes nothing, and a restart leaves what runs alone.
    check_plan(plan)
    if profile or not os.path.exists(places.models_ini):
        # It refuses a profile where models.ini is there: nothing is replaced.
        seed_project(places, say, profile=profile)
        config = load_config(places)
        plan = plan._replace(config=config.on_channel(plan.channel))
    _warn_unserved(places, plan.config)
    started = start_stack(plan, again)
    if not started:
        say(f"Running already: {plan.url}/v1, the {plan.channel} channel")
    if args.demo:
        return int(demo.show_demo(args, places, plan.url, this_module))
    rewire_project(places, plan.config, plan.url, say)
    # Whoever restarts knows these two.
    if started and not again:
        say("Stop it with `llmstack stop`; look at it with `llmstack status`.")
    return _enter_shell(args, places, Marker(plan.channel))


def _say_idle(places: Places) -> None:
    """That there was nothing to stop, and whose stack it is that has this project's ports."""
    try:
        config = planned_config(places)
    except UserError:
        # Its models.ini may be another user's, or broken.
        config = Config()
    # Whoever typed `stop` wants the ports free, and wonders why they are not.
    for port in (config.router_port, config.engine_port):
        if port_is_free("127.0.0.1", port):
            continue
        holder = port_holder(port)
        if "llmstack" in holder:
            say(f"Nothing of this project is running: port {port} is taken by {holder}.")
            return
    say("Nothing is running.")


def say_forgotten(places: Places) -> None:
    freed = forget_parked(places.data)
    if freed:
        say(f"Forgot {freed / 1e9:.1f} GB of parked conversations.")
    else:
        say("Nothing is parked.")


def _cmd_stop(args: Any) -> int:
    places = _places(args)
    stopped = stop_stack(places)
    if args.forget:
        say_forgotten(places)
    url, owner = pinned_url(places), other_owner(places)
    if stopped:
        say("Stopped.")
    elif url:
        say(f"There is nothing local to stop: this project uses the router at {url}.")
    elif owner is not None:
        where = f"run it in {owner.work}"
        if owner.is_demo:
            where = "run `llmstack stop --demo`"
        raise UserError("nothing of this project is running; the daemons belong to another", where)
    else:
        _say_idle(places)
    return 0


# ---- status


def _status_rows(places: Places, config: Config) -> Dict[str, Any]:
    if pinned_url(places):
        return {**external_status(places), "downloads": []}
    return {**stack_status(places, config), "downloads": download_rows(places)}


def output_columns() -> int:
    """Of the terminal; of a file or a pipe as many as it takes."""
    if not sys.stdout.isatty():
        return 200
    return terminal_columns()


def _status_notes(rows: Mapping[str, Any]) -> List[str]:
    notes = [f"Note: {difference}" for difference in rows.get("differences", ())]
    drafting = value_in(rows.get("now"), "drafting")
    for row in rows["tiers"]:
        name = row["name"]
        # A thin client's rows have neither of these two.
        settings, parking = row.get("settings"), row.get("parking")
        if settings:
            notes.append(f"{name}: {visible(settings)}")
        if parking:
            notes.append(f"Note: {name}: parking {parking}")
        drafts = text_in(drafting, name)
        if drafts:
            notes.append(f"Note: {name}: {drafts}")
    return notes


def _part_line(name: str, row: Optional[Mapping[str, Any]]) -> str:
    """The line of the router or the engine."""
    title = f"{name.capitalize():<8}"
    if row is None:
        return f"{title} {paint('not running', '33')}"
    health = paint("died", "31")
    if row["answers"]:
        health = paint("up", "32")
    elif row["alive"]:
        health = paint("alive, but does not answer", "31")
    words = [f"{title} {health}", row["url"]]
    if row["pid"]:
        words.append(f"pid {row['pid']}")
    if row["pid"] and name == "engine":
        words.append(row["kind"])
    return ", ".join(words)


# llama-swap's and the embedded engine's words for a model's state -> a snapshot's.
_SNAPSHOT_WORDS = {**STATE_WORDS, "unknown": "not running"}


def _at_rest(row: Dict[str, Any], rows: Mapping[str, Any], places: Places,
             config: Config) -> Dict[str, Any]:
    """A tier's row with its state in the words of a snapshot."""
    state = row["state"]
    row = {**row, "state": _SNAPSHOT_WORDS.get(state, state)}
    tier = config.by_name(row["name"])
    if rows["running"] or tier is None or tier.backend != "gguf":
        return row
    weights = weights_for(tier)
    if not cached_model(weights, places.env):
        row.update(state="not here", reason=fetching_words(tier))
    return row


def _idle_line(rows: Mapping[str, Any], places: Places) -> str:
    """What there is to do where the stack does not run."""
    if rows["other_owner"]:
        return f"The daemons of this machine belong to {rows['other_owner']}."
    if places.is_demo:
        return "Bring it up with `llmstack start --demo`."
    return "Bring it up with `llmstack start`."


def _status_of_parts(rows: Dict[str, Any], places: Places, config: Config) -> List[str]:
    """What there is to say of a stack that is down, ailing or older than this program."""
    channel, problem = rows["channel"], rows.get("problem")
    title = f"Project  {rows['project']}"
    if channel:
        title += f" ({channel})"
    if problem:
        # A thin client whose router is down has no tiers to show.
        return [title, f"Router   {paint('not reached', '31')}, {problem}"]
    lines = [title, _part_line("router", rows["router"])]
    # The engine of a thin client is on another machine.
    if channel != "external":
        lines.append(_part_line("engine", rows["engine"]))
    tiers = []
    for row in rows["tiers"]:
        row = _at_rest(row, rows, places, config)
        tiers.append(tier_line(row, {}, time.time()))
    columns = output_columns()
    if tiers:
        lines += ["", *render_table(tiers, columns, paint)]
    lines += _status_notes(rows)
    pressure = rows.get("memory_pressure")
    if pressure:
        lines.append(f"Memory   {paint(pressure, '33')}: idle models are unloaded,"
                     " and none takes more")
    if rows.get("local_only"):
        lines.append("local_only: no request leaves this machine")
    lines += download_lines(rows, columns)
    if not rows["running"]:
        lines += ["", _idle_line(rows, places)]
    return lines


def _status_lines(rows: Dict[str, Any], places: Places, config: Config) -> List[str]:
    # A router of an older version tells no snapshot.
    told = rows.get("now") or {}
    if not rows["running"] or not dicts_in(told, "tiers"):
        return _status_of_parts(rows, places, config)
    snapshot = {**told, "downloads": rows["downloads"]}
    url = rows["router"]["url"]
    lines = render_snapshot(snapshot, url, output_columns(), time.time(), paint)
    if rows["channel"] == "next":
        lines.insert(1, "next channel")
    return lines + _status_notes(rows)


def _cmd_status(args: Any) -> int:
    places = _places(args)
    if args.watch:
        words = []
        if args.demo:
            words = ["--demo"]
        return run_extra("watch", words)
    broken: Optional[UserError] = None
    config = Config()
    try:
        if not pinned_url(places):
            config = planned_config(places)
            config = true_config(config.on_channel(running_channel(places)), places)
    except UserError as exc:
        # What runs is of interest all the more.
        broken = exc
    rows = _status_rows(places, config)
    lines = _status_lines(rows, places, config)
    code = 1
    if rows["running"]:
        code = 0
    # Its problems come last, where they are read.
    return show(Result(rows, lines, code, args.json, problem=broken))


# ---- shells, and trust


def _shell_in_use(env: Mapping[str, str]) -> str:
    """The shell that reads our output: the hook's, else the user's."""
    return hooked_shell(env) or shell_name(shell_program(env)) or "bash"


def _say_raw(text: str) -> None:
    """Text for a shell: the bytes of a path are what they are."""
    if not text:
        return
    text = text.rstrip("\n")
    # On a terminal the text is shown, and not evaluated.
    if sys.stdout.isatty():
        say(text)
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path may hold bytes that are no text, and the shell needs them as they are.
        sys.stdout.reconfigure(errors="surrogateescape")
    write_out(text + "\n")


def _cmd_reload(args: Any) -> int:
    """The shell's part first: it is of use with the router down, too."""
    places = _places(args)
    tell = _tell
    if sys.stdout.isatty():
        tell = say
    if not args.demo:
        shell = args.shell or _shell_in_use(places.env)
        _say_raw(shell_lines(places, shell))
        if not is_trusted(places, "hook"):
            tell(untrusted_line(places))
        if pinned_url(places):
            return 0
        # Credentials would go to the hosts that the file names.
        check_run_trust(places)
    load_config(places, warn)
    record = running_record(places)
    if record is None:
        raise UserError("the router of this project is not running", "run `llmstack start`")
    problem = ask_reload(record, places.env)
    if problem:
        raise UserError(f"the router keeps its old models.ini: {problem}", "mend it, then again")
    tell("models.ini is read again. Changed tiers need `llmstack restart`.")
    return 0


def _cmd_activate(args: Any) -> int:
    path = write_hook(args.shell, data_dir(os.environ))
    if sys.stdout.isatty():
        _tell(f"The hook is in {path}. This line turns it on, here and in your shell's start-up"
              f" file:\n  {activate_line(args.shell)}")
    source = "source"
    if args.shell == "powershell":
        source = "."
    _say_raw(f"{source} {shell_quote(args.shell, path)}\n")
    return 0


def _cmd_hook(shell: str, directory: str) -> int:
    """Behind the hooks: what to evaluate in a project.

    It does without argparse, whose import takes longer than all of it.
    """
    work = os.path.realpath(directory)
    places = places_at(data_dir(os.environ), work)
    _say_raw(hook_answer(places, shell, _tell))
    return 0


def _cmd_trust(args: Any) -> int:
    places = _places(args)
    # In a directory below a project, its hook speaks of the project above.
    if args.directory or not os.path.isdir(places.state):
        work = args.directory or project_above(places.work) or places.work
        places = places_at(places.data, os.path.abspath(work))
    if not os.path.isdir(places.state):
        raise UserError(f"there is no .llmstack in {visible(places.work)}",
                        "run `llmstack install` there")
    # Read first: what changes behind the showing is not trusted.
    effects = project_effects(places)
    every = list(itertools.chain(*effects.values()))
    for line in trust_facts(places, every):
        say(line)
    trust_effects(places, effects)
    broken = [effect.name for effect in every if effect.problem]
    if broken:
        raise UserError(f"not trusted: {', '.join(broken)}; the rest is",
                        "mend it, or move it away")
    say("Trusted as it is now.")
    return 0


# ---- install

DEFAULT_REMOTE = f"http://{ROUTER_HOST}:{ROUTER_PORT}"


def _external_url(args: Any, places: Places) -> str:
    """The router that `install` is to use, "" for this project's own. Errors: UserError."""
    if args.channel:
        return ""
    named = places.env.get("LLMSTACK_REMOTE_URL", "").strip()
    # --external without a URL is the environment's, else the usual address.
    if args.external is not None:
        return args.external or named or DEFAULT_REMOTE
    return named or trusted_url(places)


def _wire(places: Places, marker: Marker, opencode_json: str, config: Config) -> None:
    if not wire_project(places, marker, opencode_json, say):
        say(f"Nothing to change: {places.in_state('opencode.json')} is as it should be.")
    for line in cramped_models(config):
        warn(line)


def _install_external(args: Any, places: Places, url: str) -> int:
    remote = fetch_remote(url, places.env, args.insecure)
    config, url = remote.config, remote.url
    text = project_opencode_json(places, config, url, local=False)
    if args.print:
        say(text.rstrip("\n"))
        return 0
    check_state(places)
    leave_daemons(places, remote, say)
    _wire(places, Marker("external", url), text, config)
    names = ", ".join(tier.name for tier in config.tiers)
    say(f"This project uses the router at {url}: {names}.")
    if args.insecure:
        warn("its certificate was not verified; opencode verifies it, so name it in"
             " NODE_EXTRA_CA_CERTS before you run that")
    return 0


def _install_local(args: Any, places: Places) -> int:
    if args.insecure:
        raise UserError("--insecure is for --external https://...", "leave it out", 2)
    # --print writes nothing, not even a models.ini.
    if not args.print:
        seed_project(places, say, profile=args.profile)
    config = planned_config(places, warn, args.profile)
    if not args.print:
        _warn_unserved(places, config, ask_person)
    channel = chosen_channel(places, config, args.channel)
    config = true_config(config.on_channel(channel), places, warn)
    url = base_url(*router_address(places, config))
    text = project_opencode_json(places, config, url)
    if args.print:
        say(text.rstrip("\n"))
        return 0
    _wire(places, Marker(channel), text, config)
    running = running_channel(places)
    if not running:
        say(f"Pinned to the {channel} channel. Bring it up with `llmstack start`.")
    elif running != channel:
        say(f"The {running} channel is running; `llmstack restart --{channel}` changes it.")
    return 0


def _cmd_install(args: Any) -> int:
    places = _places(args)
    if not args.print:
        offer_trust(places, say, ask_person)
    url = _external_url(args, places)
    if url:
        return _install_external(args, places, url)
    return _install_local(args, places)


# ---- processes behind the commands


def _cmd_daemon(args: Any) -> int:
    """The process behind `start`: the router, and the engine with all its children."""
    places = find_places(os.environ)
    level = places.env.get("LOG_LEVEL", "info")
    log = Log(places.log("router.log"), level)
    engine_log = Log(places.log("engine.log"), level)
    config = load_config(places).on_channel(args.channel)
    config = true_config(config, places, engine_log.warning)
    plan = Plan(places, config, args.host, args.port, args.engine)
    more_files()
    hold_little_memory()
    try:
        _serve_plan(plan, log, engine_log)
    finally:
        log.flush()
        engine_log.flush()
    return 0


def _cmd_download_worker(_: Any) -> int:
    """The process behind `download`."""
    places = find_places(os.environ)
    code: int = load_extra("download").run_downloads(places, places.env, sys.modules[__name__])
    return code


def _cmd_version(args: Any) -> int:
    say(f"llmstack {VERSION}")
    return 0


# ---- the table of commands


class Argument(NamedTuple):
    """An option or an argument of a command."""

    names: str                                  # its spellings, with blanks between them
    settings: Mapping[str, Any]                 # as argparse takes them


def _argument(names: str, about: str, **settings: Any) -> Argument:
    return Argument(names, {"help": about, **settings})


def _switch(names: str, about: str) -> Argument:
    return _argument(names, about, action="store_true")


def _channel(channel: str, about: str) -> Argument:
    """The option that chooses a channel: none of them leaves "", which stands for neither."""
    return _argument(f"--{channel}", about, dest="channel", action="store_const", const=channel,
                     default="")


class Command(NamedTuple):
    """A command of this file: what runs it, and all that is said of it."""

    run: Optional[Callable[[Any], int]]         # None: `help`, which needs this table
    about: str = ""                             # its line in `help`; "" for one of ours alone
    description: str = ""
    arguments: Tuple[Argument, ...] = ()
    one_of: Tuple[Argument, ...] = ()           # options that exclude each other


_NEXT = _channel("next", "run the queued upgrades (hf_file_next, model_next)")
_DEMO = _switch("--demo", "the demo's")
_PROFILE = _argument("--profile", "for a directory without models.ini: the tiers for a machine with"
                     f" this much memory ({', '.join(PROFILES)} GB; default: this machine's)",
                     metavar="NAME", default="")
_STACK_ARGUMENTS = (
    _switch("--detach --no-shell", "daemons only, no shell"),
    _switch("--demo", "a small model of its own, for a first look on any machine"),
    _NEXT,
    _channel("current", "run the current models, whatever LLMSTACK_USE_NEXT says"),
    _argument("--host", "address to listen on (models.ini: host)", metavar="H"),
    _argument("--port", "port, 0 for any free one (models.ini: router_port)", metavar="P",
              type=port_number),
    _switch("--insecure", "thin client: do not verify the router's certificate"),
)
COMMANDS = {
    "install": Command(
        _cmd_install, "give this project its opencode.json",
        "Write .llmstack/opencode.json, AGENTS.md and the channel this project is pinned to;"
        " models.ini where there is none. Without an option the channel stays as it is.",
        (_switch("--insecure", "do not verify that router's certificate"),
         _PROFILE,
         _switch("-n --print", "print opencode.json and write nothing")),
        (_channel("current", "pin the current models"),
         _channel("next", "pin the queued upgrades (hf_file_next, model_next)"),
         _argument("--external", "use the router at URL (default: $LLMSTACK_REMOTE_URL, else"
                   f" {DEFAULT_REMOTE}) instead of one of this project",
                   metavar="URL", nargs="?", const=""))),
    "start": Command(
        functools.partial(_bring_up, again=False), "bring the stack up: engine and router",
        "Bring up the engine (10102) and the router (10101) for this project. A directory without"
        " .llmstack/ gets one. Running already is fine. On a terminal, where no hook is active"
        " (see activate), a shell follows in which opencode finds the project.",
        (_PROFILE, *_STACK_ARGUMENTS)),
    "stop": Command(
        _cmd_stop, "stop this project's daemons",
        "Stop this project's daemons and the model servers they started, and nothing else.",
        (_switch("--demo", "stop the demo's"),
         _switch("--forget", "and delete every parked conversation"))),
    "restart": Command(
        functools.partial(_bring_up, again=True), "stop, then start",
        "Stop and start again, on the same address and channel unless told otherwise. Loaded"
        " models are unloaded.",
        _STACK_ARGUMENTS),
    "status": Command(
        _cmd_status, "what runs, and in what state",
        "Show the daemons and the tiers, probed now. Exit code 0 when the stack is up, 1 when it is"
        " not.",
        (_switch("--json", "for programs"),
         _switch("--watch", "go on showing it, until Ctrl-C"),
         _DEMO)),
    "reload": Command(
        _cmd_reload, "let the running router and this shell read the project again",
        "Check models.ini and have the router read it again: routing changes at once, without a"
        " restart. Tiers and flags of models need `llmstack restart`. Printed is what the shell is"
        " to evaluate: eval \"$(llmstack reload)\", in fish llmstack reload | source.",
        (_DEMO,
         _argument("--shell", "whose language to print (default: that of the hook, of"
                   " $LLMSTACK_SHELL or of $SHELL)", choices=SHELLS))),
    "activate": Command(
        _cmd_activate, "a hook that wires a shell to the project it is in",
        "Write the hook of a shell to ~/.SHELL_llmstack_hook and print the line that turns it on."
        " In the shell's start-up file: eval \"$(llmstack activate zsh)\".",
        (_argument("shell", "whose hook", choices=SHELLS),)),
    "trust": Command(
        _cmd_trust, "let a project's .llmstack/ take effect on this machine",
        "Show what a project's .llmstack/ would put into effect, and trust it as it is now. What"
        " `install` writes is trusted already; a changed file is to be trusted again.",
        (_argument("directory", "the project (default: the one we are in)", metavar="DIR",
                   nargs="?"),)),
    "version": Command(_cmd_version, "print the version"),
    "help": Command(None, "list the commands, or explain one", arguments=(
        _argument("topic", "the one to explain", metavar="COMMAND", nargs="?", default=""),)),
    "_daemon": Command(_cmd_daemon, arguments=(
        _NEXT,
        _argument("--host", "", required=True),
        _argument("--port", "", type=port_number, required=True),
        _argument("--engine", "", required=True))),
    "_download": Command(_cmd_download_worker),
}


# ---- reading a command line

# What else a command is called -> its name.
OTHER_NAMES = {
    "-h": "help",
    "--help": "help",
    "-V": "version",
    "--version": "version",
    "init": "install",
    "configure": "install",
    "download-models": "download",
    "pull": "download",
    "check-models": "check",
}


def render_examples(prog: str) -> str:
    """The lines of share/examples.txt that run this command, as the end of its help."""
    try:
        lines = read_shared_text("examples.txt").splitlines()
    except UserError:
        return ""
    text = ""
    for line in lines:
        if line.startswith(f"{prog} "):
            text += f"  {line}\n"
    if not text:
        return ""
    return "\nexamples:\n" + text


def new_parser(prog: str, description: str, **options: Any) -> Any:
    """A parser with this program's manners."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            # argparse names what is wrong, not what was meant.
            unknown = re.match("unrecognized arguments: ([^ =]*)", message)
            if unknown:
                what = unknown_word(unknown.group(1), self._option_string_actions)
                message = f"{self.prog} has no {what}"
            raise UserError(message, f"see `{self.prog} --help`", 2)

        def format_help(self) -> str:
            return super().format_help() + render_examples(self.prog)

    return Parser(prog=prog, description=description, **options)


def extra_parser(name: str, doc: str) -> Any:
    """The parser of an extra, whose help is its docstring as it stands."""
    import argparse
    text, heading, examples = doc.rstrip().partition("examples:\n")
    return new_parser("llmstack " + name, text, epilog=heading + examples,
                      formatter_class=argparse.RawDescriptionHelpFormatter)


def command_parser(name: str) -> Any:
    """What reads the words behind a command of COMMANDS.

    Errors of usage exit with 2, in one line and a hint.
    """
    command = COMMANDS[name]
    parser = new_parser("llmstack " + name, command.description)
    if command.one_of:
        group = parser.add_mutually_exclusive_group()
        for argument in command.one_of:
            group.add_argument(*argument.names.split(), **argument.settings)
    for argument in command.arguments:
        parser.add_argument(*argument.names.split(), **argument.settings)
    parser.set_defaults(run=command.run)
    return parser


def _summary(name: str) -> str:
    """What `help` says of a command, "" where it is not here."""
    if name in COMMANDS:
        return COMMANDS[name].about
    try:
        text = read_resource(extra_file(name)).decode("utf-8")
    except UserError:
        return ""
    # The first line of its docstring, as a phrase.
    line, _, _ = text.partition("\n")
    line = line.strip('".')
    return line[:1].lower() + line[1:]


def render_help() -> str:
    """All commands in groups, with a line each."""
    lines = ["usage: llmstack COMMAND ...", "",
             "A multi-tier local LLM stack behind one OpenAI-compatible address."]
    for heading, names in command_groups():
        rows = []
        for name in names:
            about = _summary(name)
            if about:
                rows.append(f"  {name:<18}  {about}")
        if rows:
            lines += ["", heading, *rows]
    lines += ["", "`llmstack help COMMAND` explains one. Settings stand in .llmstack/models.ini.",
              "Exit codes: 0 done, 1 failed, 2 usage or configuration, 130 interrupted."]
    return "\n".join(lines)


def _say_help(topic: str) -> int:
    name = OTHER_NAMES.get(topic, topic)
    if name in COMMANDS:
        say(command_parser(name).format_help().rstrip("\n"))
        return 0
    if topic:
        return run_extra(topic, ["--help"])
    say(render_help())
    return 0


def run_command(argv: Sequence[str]) -> int:
    """Run one command line. Errors: UserError, and whatever is a bug."""
    name, *words = argv or ("help",)
    name = OTHER_NAMES.get(name, name)
    # A prompt waits for this one: it goes before all that costs time.
    if name == "_hook" and len(words) == 2:
        return _cmd_hook(*words)
    if not name.startswith("_"):
        # A hook that runs at the prompt has not seen the `cd` of this very line.
        leave_stale_project(os.environ)
    if name not in COMMANDS:
        return run_extra(name, words)
    args = command_parser(name).parse_args(words)
    if args.run is None:
        return _say_help(args.topic)
    return int(args.run(args))


def _mend_streams() -> None:
    """See that both output streams take whatever is written to them."""
    for name in ("stdout", "stderr"):
        # `llmstack status >&-` leaves none.
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))       # noqa: SIM115
    # Tests put other objects there, which take any text.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal without Unicode shows \u2192 rather than a traceback.
            stream.reconfigure(errors="backslashreplace")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command line and return its exit code; the one place that prints errors."""
    _mend_streams()
    try:
        return run_command(sys.argv[1:] if argv is None else argv)
    except UserError as exc:
        sys.stdout.flush()
        # A models.ini has all its problems shown at once.
        for problem in exc.problems:
            _tell(f"llmstack: error: {problem}")
        if exc.hint:
            _tell(f"hint: {exc.hint}")
        return exc.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("\nllmstack: interrupted\n")
        return 130
    except _Terminated:
        return 0
    except _OutputFailed as exc:
        # What is buffered must not fail again at the end of the process.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        # `llmstack status | head` closes its output and wants no message.
        if exc.args:
            _tell(f"llmstack: error: {exc}\nhint: redirect the output elsewhere")
        return 1


if __name__ == "__main__":
    sys.exit(main())
