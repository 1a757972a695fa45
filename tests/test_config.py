"""models.ini: the bundled file, the peer's format, and every way in which a file can be wrong."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

import llmstack
from llmstack import Config, ConfigError, Option, Routing, Tier, parse_models_ini

BUNDLED = (Path(__file__).resolve().parent.parent / "models.ini").read_text(encoding="utf-8")
GGUF = "hf_repo = owner/repo-GGUF\nhf_file = model-Q4_K_M.gguf\n"
A = "[a]\n" + GGUF                              # lines 1 to 3: a whole tier, what is appended starts on line 4
B = "[b]\n" + GGUF


def load(text: str) -> Config:
    """A file that must hold, without a warning."""
    config, warnings = parse_models_ini(text)
    assert warnings == ()
    return config


def problems(text: str) -> tuple[str, ...]:
    """What is wrong with a file that must not hold."""
    try:
        parse_models_ini(text)
    except ConfigError as exc:
        return exc.problems
    pytest.fail(f"accepted: {text!r}")


def line_of(problem: str) -> int:
    match = re.match(r"models\.ini:(\d+): \S", problem)
    assert match, problem
    return int(match.group(1))


def write_ini(text: str | bytes) -> Path:
    """Make it the models.ini of the project the test stands in."""
    path = Path(".llmstack/models.ini")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def ask_why(monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `llmstack why -` on a short request and return its exit code."""
    body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": "hi"}]}).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(body)))
    return llmstack.main(["why", "-"])


# ---- The bundled file


# The table of the specification, column by column.
TIERS = [
    pytest.param(
        "code-fast", "fast", "code", "bartowski/Qwen2.5-Coder-3B-Instruct-GGUF", "Qwen2.5-Coder-3B-Instruct-Q5_K_M.gguf", "",
        2.5, 0.0, 131072, (4.0, 32768), {"temp": 0.2}, 0, ("fast", "small", "autocomplete"), id="code-fast"),
    pytest.param(
        "code-smart", "agent", "code", "unsloth/Qwen3-Coder-Next-GGUF", "Qwen3-Coder-Next-Q4_K_M.gguf",
        "Qwen3-Coder-Next-UD-Q4_K_XL.gguf", 45, 50, 65536, (0.0, 0),
        {"temp": 0.5, "top_p": 0.85, "top_k": 20, "min_p": 0.05, "rep_pen": 1.05}, 1800,
        ("agent", "smart", "code", "coder"), id="code-smart"),
    pytest.param(
        "plan", "plan", "chat", "Jackrong/Qwopus-GLM-18B-Merged-GGUF", "Qwopus-GLM-18B-Healed-Q4_K_M.gguf",
        "Qwopus-GLM-18B-Healed-Q6_K.gguf", 9.2, 12.1, 65536, (0.0, 0),
        {"temp": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05}, 1200, ("planner", "chat", "glm"), id="plan"),
    pytest.param(
        "plan-uncensored", "plan-uncensored", "chat",
        "mradermacher/Mistral-Small-3.2-24B-Instruct-2506-ultra-uncensored-heretic-i1-GGUF",
        "Mistral-Small-3.2-24B-Instruct-2506-ultra-uncensored-heretic.i1-Q4_K_M.gguf",
        "Mistral-Small-3.2-24B-Instruct-2506-ultra-uncensored-heretic.i1-Q6_K.gguf", 13, 20, 131072, (0.0, 0),
        {"temp": 0.85, "top_p": 0.95, "top_k": 50, "min_p": 0.05}, 1200,
        ("uncensored", "nofilter", "plan-nofilter", "heretic"), id="plan-uncensored"),
    # Beside the specification's.
    pytest.param(
        "embed", "embed", "", "nomic-ai/nomic-embed-text-v1.5-GGUF", "nomic-embed-text-v1.5.Q8_0.gguf", "",
        0.15, 0.0, 2048, (0.0, 0), {}, 1200, (), id="embed"),
]


@pytest.mark.parametrize(
    ("name", "role", "kind", "repo", "file", "file_next", "gb", "gb_next", "ctx", "rope", "sampler", "ttl", "aliases"), TIERS)
def test_bundled_tier(config: Config, name: str, role: str, kind: str, repo: str, file: str, file_next: str, gb: float,
                      gb_next: float, ctx: int, rope: tuple[float, int], sampler: dict[str, float], ttl: int,
                      aliases: tuple[str, ...]) -> None:
    tier = config.by_name(name)
    assert tier is not None
    assert (tier.name, tier.role, tier.tier, tier.backend) == (name, role, kind, "gguf")
    assert (tier.hf_repo, tier.hf_file) == (repo, file)
    assert (tier.hf_file_next, tier.hf_repo_next, tier.has_next) == (file_next, "", bool(file_next))
    assert (tier.size_gb, tier.size_gb_next) == (gb, gb_next)
    assert (tier.ctx_size, tier.rope_scale, tier.rope_orig_ctx) == (ctx, *rope)
    assert dict(tier.sampler) == sampler
    assert (tier.ttl, tier.aliases) == (ttl, aliases)
    assert tier.quant in file
    assert tier.quant_next in file_next


def test_bundled_file_holds_these_tiers_and_the_documented_defaults() -> None:
    config = load(BUNDLED)
    assert [t.name for t in config.tiers] == ["code-fast", "code-smart", "plan", "plan-uncensored", "embed"]
    assert config.routing == Routing(12_000, 32_000, 10, ("[ultra]", "[opus]", "ultra:", "opus:"))
    # Left out altogether, every setting of [DEFAULT] and [ROUTING] means what the bundled file says.
    assert config._replace(tiers=()) == Config()
    assert (config.host, config.router_port, config.engine_port) == ("127.0.0.1", 10101, 10102)
    assert (config.engine, config.memory_gb, config.allow_unauthenticated) == ("auto", 0.0, False)


def stand_in(name: str) -> list[str]:
    """The commented-out block of lines that stands in for tier `name`."""
    lines = BUNDLED.split("\n")
    start = lines.index(f"; [{name}]")
    return lines[start:lines.index("", start)]


def swapped(text: str, name: str) -> str:
    """`text` with the stand-in in place of the local tier, as the file's own comment says to do it."""
    local = f"[{name}]" + text.split(f"\n[{name}]", 1)[1].split("\n\n", 1)[0]
    alternative = "\n".join(stand_in(name))
    text = text.replace("\n" + local, "\n; " + local.replace("\n", "\n; "), 1)
    return text.replace("\n" + alternative, "\n" + alternative.replace("\n; ", "\n")[2:], 1)


@pytest.mark.parametrize("name", ["code-fast", "code-smart", "plan", "plan-uncensored"])
def test_each_hosted_stand_in_parses_in_place_of_its_tier(config: Config, name: str) -> None:
    hosted = load(swapped(BUNDLED, name))
    local, tier = config.by_name(name), hosted.by_name(name)
    assert local is not None
    assert tier is not None
    assert [t.name for t in hosted.tiers].count(name) == 1
    assert (tier.role, tier.tier, tier.aliases) == (local.role, local.tier, local.aliases)
    assert (tier.backend, tier.hf_repo, tier.hf_file, tier.path) == ("litellm", "", "", "")
    assert re.fullmatch(r"(anthropic|openai)/[a-z0-9.-]+", tier.model)
    assert tier.ctx_size >= 128_000
    assert tier.max_output_tokens > 0
    assert dict(tier.sampler).keys() <= {"temp", "top_p"}, "hosted models take no llama.cpp extensions"
    assert [t for t in hosted.tiers if t.name != name] == [t for t in config.tiers if t.name != name]


def with_ultra(text: str) -> str:
    """`text` with the fenced tier switched on: the markers go, and "; " before each line between them."""
    before, fenced = text.split("; >>> AUTO-ENABLE-WHEN-LITELLM-AVAILABLE >>>\n")
    block, after = fenced.split("; <<< AUTO-ENABLE-WHEN-LITELLM-AVAILABLE <<<\n")
    return before + re.sub(r"(?m)^; ", "", block) + after


def test_the_fenced_tier_parses_once_the_fence_is_gone() -> None:
    config = load(with_ultra(BUNDLED))
    ultra = config.by_role("ultra")
    assert ultra is not None
    assert (ultra.name, ultra.tier, ultra.backend) == ("code-ultra", "code", "litellm")
    assert ultra.model == "anthropic/claude-opus-4-20250514"
    assert ultra.ctx_size == 2 * config.routing.high_fidelity_ceiling
    assert ultra.sampler == (), "Opus 4 refuses every sampling parameter"
    assert [t.name for t in config.ladder] == ["code-ultra", "code-smart", "code-fast"]


def test_all_stand_ins_at_once_make_an_all_hosted_file() -> None:
    text = with_ultra(BUNDLED)
    for name in ("code-fast", "code-smart", "plan", "plan-uncensored"):
        text = swapped(text, name)
    config = load(text)
    assert [t.backend for t in config.tiers if t.chats] == ["litellm"] * 5
    assert [t.name for t in llmstack.local_tiers(config)] == ["embed"]


# ---- The peer's format


PEER = """\
; ----------------------------------------------------------------------------
; models.ini  -  inventory of models.
;              model              (required; e.g. anthropic/claude-sonnet-4-20250514)
;   export ANTHROPIC_API_KEY=sk-ant-...
; ----------------------------------------------------------------------------

[DEFAULT]
router_host  = 0.0.0.0
router_port  = 10111
n_gpu_layers = 99
flash_attn   = on
jinja        = true
threads      = -1
cache_type_k = q8_0
cache_type_v = f16

[code-fast]
tier         = code
role         = fast
hf_repo      = Qwen/Qwen2.5-Coder-3B-Instruct
hf_file      = Qwen2.5-Coder-3B-Instruct-Q5_K_M.gguf
ctx_size     = 131072        ; native 128k; YaRN x4 -> 512k, but we cap at 131k
max_output_tokens = 8192
rope_scaling = yarn(scale=4, orig_ctx=32768)
size_gb      = 2.5
quant        = Q5_K_M
sampler      = temp=0.2     ; deterministic; fast tier for autocomplete / FIM
description  = Qwen2.5-Coder 3B - always-resident tiny coder for autocomplete / FIM / quick Q&A

[code-smart]
tier         = code
role         = agent
hf_repo      = unsloth/Qwen3-Coder-Next-GGUF
hf_file      = Qwen3-Coder-Next-Q4_K_M.gguf
hf_repo_next = unsloth/Qwen3-Coder-Newer-GGUF
hf_file_next = Qwen3-Coder-Newer-UD-Q4_K_XL.gguf
ctx_size     = 131072
size_gb      = ~45 GB
size_gb_next = 50
quant        = Q4_K_M
quant_next   = UD-Q4_K_XL
sampler      = temp=0.5, top_p=0.85, top_k=20, min_p=0.0, rep_pen=1.05  ; balanced agent
aliases      = agent, glm
ttl          = 900

; >>> AUTO-ENABLE-WHEN-LITELLM-AVAILABLE >>>
[code-ultra]
tier         = code
role         = ultra
backend      = litellm
model        = anthropic/claude-opus-4-20250514
model_next   = anthropic/claude-opus-5
ctx_size     = 200000      ; Opus 4 native 1M
;                          ; NOTE: the ceiling (12k) controls when auto-routing PREFERS this
; ; NB: no `sampler =` line.
max_output_tokens = 8192    ; cost discipline
; <<< AUTO-ENABLE-WHEN-LITELLM-AVAILABLE <<<

;------------------------------------------------------------------------------
[ROUTING]
; STEP-DOWN ladder: first match wins
high_fidelity_ceiling = 10000    ; tokens; below this, top-tier model is still cheap+fast
mid_fidelity_ceiling  = 30000
multi_turn            = 8        ; user-turn count
ultra_triggers        = [ultra], [opus], "ultra:", "opus:" (line start)
"""


def test_a_file_in_the_peers_format_loads_unchanged() -> None:
    config = load(PEER)
    assert (config.host, config.router_port) == ("0.0.0.0", 10111)
    assert config.settings == {"n_gpu_layers": "99", "flash_attn": "on", "jinja": True, "threads": -1,
                               "cache_type_k": "q8_0", "cache_type_v": "f16"}
    assert config.routing == Routing(10_000, 30_000, 8, ("[ultra]", "[opus]", "ultra:", "opus:"))
    fast, smart, ultra = config.tiers
    assert fast == Tier(
        "code-fast", "fast", "code", hf_repo="Qwen/Qwen2.5-Coder-3B-Instruct", hf_file="Qwen2.5-Coder-3B-Instruct-Q5_K_M.gguf",
        ctx_size=131072, max_output_tokens=8192, size_gb=2.5, quant="Q5_K_M", sampler=(("temp", 0.2),), rope_scale=4.0,
        rope_orig_ctx=32768, aliases=("fast", "small", "autocomplete"), ttl=0,
        description="Qwen2.5-Coder 3B - always-resident tiny coder for autocomplete / FIM / quick Q&A")
    assert (smart.hf_repo_next, smart.hf_file_next) == ("unsloth/Qwen3-Coder-Newer-GGUF", "Qwen3-Coder-Newer-UD-Q4_K_XL.gguf")
    assert (smart.size_gb, smart.size_gb_next, smart.quant_next) == (45.0, 50.0, "UD-Q4_K_XL")
    assert (smart.aliases, smart.ttl, smart.description) == (("agent", "glm"), 900, "code-smart")
    assert (ultra.backend, ultra.model, ultra.model_next) == (
        "litellm", "anthropic/claude-opus-4-20250514", "anthropic/claude-opus-5")
    assert (ultra.ctx_size, ultra.max_output_tokens, ultra.sampler) == (200_000, 8192, ())


# ---- Spelling that is accepted


@pytest.mark.parametrize(("text", "tokens"), [
    ("65536", 65536), ("64k", 65536), ("64K", 65536), ("131_072", 131072), ("1_000k", 1_024_000), ("256", 256)])
def test_ctx_size_spellings(text: str, tokens: int) -> None:
    assert load(f"{A}ctx_size = {text}\nmax_output_tokens = {text}\n").tiers[0].ctx_size == tokens
    assert llmstack.parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["64kb", "64 k", "6.4k", "k", "", "-1", "1__0", "_1", "1_", "0x10", "1e5", "\u0666\u0664"])
def test_parse_tokens_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of tokens"):
        llmstack.parse_tokens(text)


@pytest.mark.parametrize(("line", "field", "value"), [
    ("engine = embedded", "engine", "embedded"),
    ("engine = Llama-Swap", "engine", "llama-swap"),
    ("engine = auto", "engine", "auto"),
    ("memory_gb = auto", "memory_gb", 0.0),
    ("memory_gb = AUTO", "memory_gb", 0.0),
    ("memory_gb = 48", "memory_gb", 48.0),
    ("memory_gb = 47.5", "memory_gb", 47.5),
    ("memory_gb = 48 GB", "memory_gb", 48.0),
    ("allow_unauthenticated = Yes", "allow_unauthenticated", True),
    ("jinja = off", "jinja", False),
    ("flash_attn = AUTO", "flash_attn", "auto"),
    ("router_host = ::1", "host", "::1"),
    ("host = my-mac.local", "host", "my-mac.local"),
    ("router_port: 8080", "router_port", 8080),
    ("Router_Port = 8080", "router_port", 8080),
    ("n_gpu_layers = all", "n_gpu_layers", "all"),
    ("n_gpu_layers = 0", "n_gpu_layers", "0"),
    ("n_gpu_layers = 1_000", "n_gpu_layers", "1000"),     # goes to llama-server, which reads 1_000 as 1
    ("llama_server_bin = /opt/my llama/llama-server", "llama_server_bin", "/opt/my llama/llama-server"),
])
def test_default_settings(line: str, field: str, value: object) -> None:
    config = load(f"[DEFAULT]\n{line}\n")
    assert {**config._asdict(), **config.settings}[field] == value


@pytest.mark.parametrize(("line", "field", "value"), [
    ("description = a ; b", "description", "a"),
    ("description = a;b", "description", "a;b"),
    ("description = a # b", "description", "a # b"),
    ("description = ; nothing but a comment", "description", "a"),
    ("description = 100% of %(ctx)s, ${HOME} and $HOME", "description", "100% of %(ctx)s, ${HOME} and $HOME"),
    ("description = x = y: z", "description", "x = y: z"),
    ("description = für Köche \U0001f373", "description", "für Köche \U0001f373"),
    ('description = "quoted"', "description", '"quoted"'),
    ("quant = i1-Q4_K_M", "quant", "i1-Q4_K_M"),
    ("ttl = 3_600", "ttl", 3600),
    ("size_gb = ~9 GB", "size_gb", 9.0),
    ("aliases = x,, y ,", "aliases", ("x", "y")),
    ("sampler = temp=.5, top_k=40,", "sampler", (("temp", 0.5), ("top_k", 40.0))),
    ("rope_scaling = YaRN ( scale = 2.5 , orig_ctx = 32k )", "rope_scale", 2.5),
    ("rope_scaling = yarn(scale=4, orig_ctx=32_768)", "rope_orig_ctx", 32768),
])
def test_tier_settings(line: str, field: str, value: object) -> None:
    assert getattr(load(f"{A}{line}\n").tiers[0], field) == value


def test_empty_values_mean_the_default_or_none() -> None:
    empty = "".join(f"{key} =\n" for key in llmstack.TIER_OPTIONS if key not in ("hf_repo", "hf_file", "role"))
    assert load(f"[a]\nrole = fast\n{GGUF}{empty}").tiers == (
        Tier("a", "fast", hf_repo="owner/repo-GGUF", hf_file="model-Q4_K_M.gguf", description="a", ttl=0),)
    assert load("[DEFAULT]\n" + "".join(f"{key} =\n" for key in llmstack.DEFAULT_OPTIONS)) == Config()
    routing = load("[ROUTING]\nhigh_fidelity_ceiling =\nmid_fidelity_ceiling =\nmulti_turn =\nultra_triggers =\n").routing
    assert routing == Routing(ultra_triggers=()), "an empty list of triggers switches them off"


def test_an_empty_file_is_the_defaults_without_tiers() -> None:
    assert load("") == load("# nothing\n\n; here\n") == Config()


@pytest.mark.parametrize("text", [BUNDLED, PEER], ids=["bundled", "peer"])
def test_line_ends_and_bom_make_no_difference(text: str) -> None:
    expected = load(text)
    crlf = text.replace("\n", "\r\n")
    for data in (crlf.encode(), b"\xef\xbb\xbf" + text.encode(), b"\xef\xbb\xbf" + crlf.encode()):
        assert load(llmstack.decode_models_ini(data)) == expected
    assert llmstack.decode_models_ini(b"\xef\xbb\xbf" + text.encode()) == text


def test_problems_of_a_crlf_file_stand_on_the_same_lines() -> None:
    text = f"[DEFAULT]\nrouter_port = abc\n\n{A}sampler = tmp=1\nstray\n"
    assert problems(text.replace("\n", "\r\n")) == problems(text)


def test_a_section_indented_as_a_whole_is_read_as_it_looks() -> None:
    text = (f"[DEFAULT]\nrouter_port = 8080\nengine = embedded\n{A}ctx_size = 64k\n"
            "[ROUTING]\nmulti_turn = 7\nmid_fidelity_ceiling = 20000\n")
    assert load(re.sub(r"(?m)^(?=\w)", "  ", text)) == load(text)


def test_triggers_are_lower_cased_and_split() -> None:
    text = "[ROUTING]\nultra_triggers = [Deep-Think], BIG: ,[x]\n"
    assert load(text).routing.ultra_triggers == ("[deep-think]", "big:", "[x]")


@pytest.mark.parametrize("role", llmstack.ROLE_ALIASES)
def test_aliases_and_ttl_left_out_are_the_roles_own(role: str) -> None:
    tier = load(f"{A}role = {role}\n").tiers[0]
    assert (tier.aliases, tier.ttl) == (llmstack.ROLE_ALIASES[role], llmstack.ROLE_TTL_S[role])


def test_a_roles_own_alias_gives_way_to_a_section_of_that_name() -> None:
    config = load(f"{A}role = plan\n[chat]\n{GGUF}")
    assert config.tiers[0].aliases == ("planner", "glm")
    assert config.by_name("chat") == config.tiers[1]


@pytest.mark.parametrize("swap", [False, True], ids=["role first", "alias first"])
def test_a_roles_own_alias_gives_way_to_one_that_is_written(swap: bool) -> None:
    sections = [f"{A}role = fast\n", f"{B}role = agent\naliases = small\n"]
    config = load("".join(sections[::-1] if swap else sections))
    owner = config.by_name("small")
    assert owner is not None
    assert owner.name == "b"


# ---- Problems: (text, what is said of which line), every problem of the text in its order


Expected = list[tuple[int, str]]
PROBLEMS = [
    # structure
    pytest.param(f"{A}[a]\nrole = fast\n", [(4, "[a] is there twice, first on line 1")], id="section twice"),
    pytest.param(f"[ROUTING]\n{A}[ROUTING]\nmulti_turn = 3\n", [(5, "[ROUTING] is there twice, first on line 1")],
                 id="routing twice"),
    pytest.param(f"{A}role = fast\nctx_size = 64k\nrole = fast\n", [(6, "role in [a] is there twice, first on line 4")],
                 id="key twice"),
    pytest.param(f"{A}Role = fast\nrole = fast\n", [(5, "role in [a] is there twice, first on line 4")], id="key twice, case"),
    pytest.param("[DEFAULT]\nrouter_port = 8080\nrouter_port = abc\n",
                 [(3, "router_port in [DEFAULT] is there twice, first on line 2"), (3, "'abc'")], id="key twice, second wrong"),
    pytest.param(f"{A}what is this\n", [(4, "neither a [section], a key = value nor a comment")], id="stray line"),
    pytest.param("[DEFAULT]\njinja\n", [(2, "neither a [section]")], id="key without a value"),
    pytest.param("[DEFAULT]\njinja ; = true\n", [(2, "neither a [section]")], id="value only in a comment"),
    pytest.param("[DEFAULT]\n= 3\n", [(2, "neither a [section]")], id="no key"),
    pytest.param("[DEFAULT\n[ROUTING]\n", [(1, "neither a [section]")], id="bracket left open"),
    pytest.param(f"# x\n\nhost = 127.0.0.1\n{A}", [(3, "host stands before any [section]")], id="key before section"),
    pytest.param(f"one\ntwo = 2\n{A}three\n", [(1, "neither"), (2, "two stands before any [section]"), (6, "neither")],
                 id="several stray lines"),
    # numbers, choices, names
    pytest.param("[DEFAULT]\nrouter_port = abc\n", [(2, "router_port: 'abc' is not a whole number")], id="port abc"),
    pytest.param("[DEFAULT]\nrouter_port = 10101.5\n", [(2, "'10101.5' is not a whole number")], id="port with point"),
    pytest.param(f"{A}ctx_size = 64kb\n", [(4, "ctx_size: '64kb' is not a number of tokens")], id="64kb"),
    pytest.param(f"{A}ctx_size = big\nmax_output_tokens = lots\n",
                 [(4, "ctx_size: 'big'"), (5, "max_output_tokens: 'lots'")], id="two numbers"),
    pytest.param("[DEFAULT]\nengine = llamaswap\n",
                 [(2, "engine: 'llamaswap' is not one of auto, llama-swap, embedded, did you mean llama-swap?")], id="engine"),
    pytest.param("[DEFAULT]\nmemory_gb = lots\n", [(2, "memory_gb: 'lots' is not a size in GB or auto")], id="memory"),
    pytest.param("[DEFAULT]\njinja = ja\n", [(2, "jinja: 'ja' is not yes or no")], id="bool"),
    pytest.param("[a]\nhf_repo = Qwen2.5\nhf_file = x.gguf\n", [(2, "hf_repo: 'Qwen2.5' is not of the form owner/name")],
                 id="repo without owner"),
    # samplers and YaRN
    pytest.param(f"{A}sampler = tmep=0.2\n", [(4, "sampler: there is no 'tmep', did you mean temp?")], id="sampler typo"),
    pytest.param(f"{A}sampler = temp=0.2, top-p=0.9\n", [(4, "sampler: there is no 'top-p', did you mean top_p?")],
                 id="sampler dash"),
    pytest.param(f"{A}sampler = temperature=0.2\n", [(4, "sampler: there is no 'temperature', did you mean temp?")],
                 id="sampler long name"),
    pytest.param(f"{A}sampler = temp\n", [(4, "sampler: temp = nothing is not a number from 0 to 10")], id="sampler no value"),
    pytest.param(f"{A}sampler = temp=hot\n", [(4, "sampler: temp = hot is not a number")], id="sampler word"),
    pytest.param(f"{A}sampler = temp=nan\n", [(4, "sampler: temp = nan is not a number")], id="sampler nan"),
    pytest.param(f"{A}sampler = temp=0.1, temp=0.2\n", [(4, "sampler: temp is given twice")], id="sampler twice"),
    pytest.param(f"{A}sampler = top_k=20.5\n", [(4, "top_k")], id="sampler top_k with a fraction"),
    pytest.param(f"{A}rope_scaling = linear\n", [(4, "rope_scaling: 'linear' is not of the form yarn (scale=4, orig_ctx=32768)")],
                 id="rope"),
    pytest.param(f"{A}rope_scaling = yarn(scale=4)\n", [(4, "is not of the form yarn")], id="rope half"),
    pytest.param(f"{A}rope_scaling = yarn(scale=4.0.0, orig_ctx=32k)\n", [(4, "is not of the form yarn")], id="rope number"),
    pytest.param(f"{A}rope_scaling = yarn(scale=0, orig_ctx=32k)\n", [(4, "rope_scaling")], id="rope zero"),
    pytest.param("[ROUTING]\nultra_triggers = opus\n", [(2, "ultra_triggers: 'opus' names no trigger")], id="trigger"),
    # what belongs together
    pytest.param(f"{A}role = fast\n{B}role = fast\n", [(8, "role fast belongs to [a] already")], id="two tiers, one role"),
    pytest.param(f"{A}aliases = x, y\n{B}aliases = z, y\n", [(8, "alias y belongs to [a] already")], id="alias used twice"),
    pytest.param(f"{A}aliases = b\n{B}", [(4, "alias b belongs to [b] already")], id="alias is a later section"),
    pytest.param(f"{A}{B}aliases = a\n", [(7, "alias a belongs to [a] already")], id="alias is an earlier section"),
    pytest.param(f"{A}aliases = my alias\n", [(4, "aliases: 'my alias' is not a name")], id="alias with a space"),
    pytest.param(f"{A}aliases = auto\n", [(4, "alias auto is a reserved name")], id="alias auto"),
    pytest.param(f"{A}aliases = x, LiteLLM_Proxy\n", [(4, "alias LiteLLM_Proxy is a reserved name")], id="alias litellm_proxy"),
    pytest.param(f"{A}aliases = org/auto\n", [(4, "alias org/auto is a reserved name")], id="alias auto with a prefix"),
    pytest.param(f"[auto]\n{GGUF}", [(1, "[auto] is a reserved name")], id="section auto"),
    pytest.param(f"[AUTO]\n{GGUF}", [(1, "[AUTO] is a reserved name")], id="section AUTO"),
    pytest.param(f"[litellm_proxy]\n{GGUF}", [(1, "[litellm_proxy] is a reserved name")], id="section litellm_proxy"),
    pytest.param(f"[my model]\n{GGUF}", [(1, "[my model] is not a name a model can have")], id="section with a space"),
    pytest.param(f"[a/b]\n{GGUF}", [(1, "[a/b] is not a name a model can have")], id="section with a slash"),
    pytest.param(f"[{'x' * 64}]\n{GGUF}", [(1, "is not a name a model can have")], id="section too long"),
    pytest.param("[a]\nctx_size = 64k\n", [(1, "[a] names no model: hf_repo and hf_file, path, or model")], id="no model"),
    pytest.param("[a]\nhf_file = x.gguf\n", [(1, "[a] names no model")], id="file without repo"),
    pytest.param("[a]\nhf_repo =\nhf_file =\n", [(1, "[a] names no model")], id="empty repo and file"),
    pytest.param("[a]\nbackend = litellm\n", [(1, "[a] has backend = litellm but no model")], id="litellm without model"),
    pytest.param("[a]\nbackend = gguf\nmodel = x/y\n", [(1, "[a] names no model")], id="gguf with only a model"),
    pytest.param("[DEFAULT]\nrouter_port = 10102\n", [(2, "router_port and engine_port are both 10102")], id="router's port"),
    pytest.param("[DEFAULT]\nengine_port = 10101\n", [(2, "router_port and engine_port are both 10101")], id="engine's port"),
    pytest.param("[DEFAULT]\nlitellm_port = 10102\n", [(2, "engine_port and litellm_port are both 10102")], id="LiteLLM's port"),
    pytest.param("[ROUTING]\nmid_fidelity_ceiling = 30000\nhigh_fidelity_ceiling = 30001\n",
                 [(3, "high_fidelity_ceiling 30,001 is above mid_fidelity_ceiling 30,000")], id="ceilings crossed"),
]


@pytest.mark.parametrize(("text", "expected"), PROBLEMS)
def test_problem(text: str, expected: Expected) -> None:
    found = problems(text)
    assert [line_of(p) for p in found] == [line for line, _ in expected], found
    for _, what in expected:
        assert any(what in p for p in found), found
    assert not any("\n" in p for p in found)


# A value of the wrong kind for every key that has a kind: a key added to the tables without one here fails.
WRONG_KIND = {
    "DEFAULT": {"host": "a b", "router_host": "http://x", "router_port": "1o101", "engine_port": "-", "litellm_port": "x",
                "engine": "ollama",
                "memory_gb": "12 MB", "allow_unauthenticated": "maybe", "n_gpu_layers": "most", "flash_attn": "1", "jinja": "2",
                "threads": "four", "cache_type_k": "q9_0", "cache_type_v": "int8", "local_only": "2",
                "build_model": "smart", "decision_log": "2", "loading_state": "loud",
                "park_gb": "much", "park_after_s": "3s", "park_every_min": "x",
                "unknown_model": "guess", "patience_s": "soon", "allowed_origins": "https://*", "allowed_hosts": "*"},
    "SERVER": {"parallel": "two", "batch": "1k", "ubatch": "x", "n_cpu_moe": "all", "split_mode": "some",
               "main_gpu": "CUDA0", "reasoning_format": "qwen", "reasoning_budget": "much", "cache_reuse": "yes",
               "override_tensor": "exps", "tensor_split": "a,b", "device": "a b",
               "args": "--port 1"},
    "MODEL": {"mmproj": "o/n:../x", "chat_template_file": "o/n:/x", "chat_template_kwargs": "[1]", "draft": "o/n:",
              "speculative": "yes", "lora": "a, o/n:../b", "embedding": "2", "pooling": "max",
              "rope_freq_base": "1e6", "rope_freq_scale": "x", "yarn_ext_factor": "-2", "yarn_attn_factor": "x",
              "yarn_beta_slow": "x", "yarn_beta_fast": "x", **dict.fromkeys(llmstack.PRICE_KEYS, "$3")},
    "a": {"backend": "ollama", "hf_repo": "a/b/c", "hf_repo_next": "b", "hf_file": "../x", "hf_file_next": "/x",
          "ctx_size": "64m", "max_output_tokens": "1.5k",
          "size_gb": "big", "size_gb_next": "-", "sampler": "hot", "rope_scaling": "4", "aliases": "a\\b", "ttl": "30m",
          "base_url": "groq.com", "tool_call": "2", "reasoning": "maybe"},
    "ROUTING": {"high_fidelity_ceiling": "12.5", "mid_fidelity_ceiling": "x", "multi_turn": "ten", "ultra_triggers": "??",
                "stay": "yes", "stay_s": "long"},
}
_DEFAULTS_OF_SERVERS = {key: value for key, value in WRONG_KIND["DEFAULT"].items() if key in llmstack.SERVER_OPTIONS}
WRONG_KIND["SERVER"].update(_DEFAULTS_OF_SERVERS)
WRONG_KIND["DEFAULT"].update(WRONG_KIND["SERVER"])
WRONG_KIND["a"].update({**WRONG_KIND.pop("SERVER"), **WRONG_KIND.pop("MODEL")})
TABLES = {"DEFAULT": llmstack.DEFAULT_OPTIONS, "a": llmstack.TIER_OPTIONS, "ROUTING": llmstack.ROUTING_OPTIONS}


def section_with(section: str, line: str) -> str:
    """A whole file whose last line is `line`, in `section`."""
    if section != "a":
        return f"{A}[{section}]\n{line}\n"
    key = line.split(" ")[0]
    return "".join(old for old in A.splitlines(True) if not old.startswith(f"{key} ")) + f"{line}\n"


@pytest.mark.parametrize("section", TABLES)
def test_every_key_with_a_kind_refuses_another_kind(section: str) -> None:
    options: dict[str, Option] = TABLES[section]
    assert set(WRONG_KIND[section]) == {key for key, option in options.items() if option.kind != "text"}
    for key, value in WRONG_KIND[section].items():
        text = section_with(section, f"{key} = {value}")
        found = problems(text)
        assert [line_of(p) for p in found] == [text.count("\n")], found
        assert f": {key}: " in found[0]


@pytest.mark.parametrize(("section", "line"), [
    *(("DEFAULT", line) for line in (
        "router_port = 0", "router_port = 65536", "router_port = -1", "engine_port = 99999", "memory_gb = 0", "memory_gb = -4",
        "threads = -2", "threads = 4097", "n_gpu_layers = -7")),
    *(("a", line) for line in (
        "ctx_size = 0", "ctx_size = 255", "ctx_size = 100_000_001", "max_output_tokens = 0",
        "size_gb = -1", "ttl = -1", "ttl = 31_536_001", "sampler = temp=-0.1", "sampler = temp=10.1", "sampler = top_p=1.01",
        "sampler = min_p=2", "sampler = top_k=-1", "sampler = rep_pen=11")),
    *(("ROUTING", line) for line in ("multi_turn = 0", "multi_turn = -3", "high_fidelity_ceiling = -1",
                                     "mid_fidelity_ceiling = 100_000_001")),
])
def test_out_of_range(section: str, line: str) -> None:
    text = section_with(section, line)
    found = problems(text)
    assert [line_of(p) for p in found] == [text.count("\n")], found
    assert line.split()[0] in found[0]


def test_a_number_too_long_for_python_is_a_problem_like_any_other() -> None:
    assert [line_of(p) for p in problems(f"{A}ctx_size = {'9' * 5000}\nttl = {'9' * 5000}\n")] == [4, 5]


@pytest.mark.parametrize(("section", "above", "line"), [
    ("DEFAULT", "host = x", "router_port = 8080"), ("a", "description = x", "ctx_size = 64k"),
    ("ROUTING", "high_fidelity_ceiling = 12000", "mid_fidelity_ceiling = 20000")])
def test_a_setting_indented_by_accident_is_named_by_its_own_line(section: str, above: str, line: str) -> None:
    text = section_with(section, f"{above}\n   {line}")
    found = problems(text)
    assert any(line_of(p) == text.count("\n") and "indented" in p for p in found), found
    assert not any("\n" in p for p in found)


def test_any_other_indented_line_is_not_swallowed_either() -> None:
    found = problems(f"{A}description = x\n   made_up = 3\n")
    assert {line_of(p) for p in found} <= {4, 5}
    assert "indented" in found[0]


def test_all_problems_are_reported_together_in_line_order() -> None:
    text = "\n".join([
        "lost = 1",                             # 1
        "[DEFAULT]",
        "router_port = abc",                    # 3
        "stray",                                # 4
        "password = hunter2",                   # 5
        "[a]",
        "role = fast",
        "hf_repo = o/r",
        "hf_file = f.gguf",
        "ctx_size = 64kb",                      # 10
        "sampler = tmep=1",                     # 11
        "[b]",
        "role = fast",                          # 13
        "model = x/y",
        "aliases = auto",                       # 15
        "ttl = 5",
        "ttl = 6",                              # 17
        "[ROUTING]",
        "multi_turn = 0",                       # 19
        "and this",                             # 20
    ])
    assert [line_of(p) for p in problems(text)] == [1, 3, 4, 5, 10, 11, 13, 15, 17, 19, 20]


# ---- Encodings, and a file that cannot be read


@pytest.mark.parametrize(("data", "line", "byte"), [
    pytest.param(b"[DEFAULT]\nhost = x\n; f\xfcr mich\n", 3, "0xfc", id="latin-1"),
    pytest.param(b"\xff\xfe[\0D\0", 1, "0xff", id="utf-16"),
    pytest.param(b"[DEFAULT]\r\nhost = x\r\n\x80 = y\r\n", 3, "0x80", id="crlf"),
    pytest.param(b"\xef\xbb\xbf[DEFAULT]\nhost = x\n\xfcber = y\n", 3, "0xfc", id="after a bom"),
])
def test_bad_encoding_names_the_line(data: bytes, line: int, byte: str) -> None:
    with pytest.raises(ConfigError) as caught:
        llmstack.decode_models_ini(data)
    assert caught.value.problems == (f"models.ini:{line}: byte {byte} is not UTF-8; save the file as UTF-8",)


@pytest.mark.parametrize("char", ["\x1b", "\0", "\x07", "\x7f", "\x9b"])
def test_a_control_character_is_named_and_never_printed(char: str) -> None:
    """A cloned file's values are printed in many places."""
    with pytest.raises(ConfigError) as caught:
        llmstack.parse_models_ini(f"[a]\n{GGUF}description = x{char}[2J\n")
    assert caught.value.problems == (f"models.ini:4: holds the control character {char!r}; take it out",)


def test_a_bad_byte_in_the_projects_file_is_one_line_and_exit_2(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_ini(b"[DEFAULT]\nllama_server_bin = /home/J\xf6rg/llama-server\n")
    assert ask_why(monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"llmstack: error: {path}:2: byte 0xf6 is not UTF-8")
    assert "Traceback" not in err


def test_a_directory_in_its_place_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    Path(".llmstack/models.ini").mkdir(parents=True)
    assert llmstack.main(["status"]) == 2
    assert capsys.readouterr().err.startswith("llmstack: error: cannot read ")


# ---- load_config


def test_without_a_models_ini_the_bundled_one_holds(config: Config) -> None:
    assert llmstack.load_config(llmstack.find_places({})) == config


def test_the_projects_file_is_read_and_its_warnings_handed_on() -> None:
    path = write_ini(f"\ufeff{A}ctx_sise = 64k\n")
    said: list[str] = []
    loaded = llmstack.load_config(llmstack.find_places({}), said.append)
    assert [t.name for t in loaded.tiers] == ["a"]
    assert said == [f"{path}:4: unknown key ctx_sise in [a], did you mean ctx_size?"]


def test_a_named_models_ini_is_read_and_named_in_its_problems(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "my.ini"
    path.parent.mkdir()
    path.write_text("[DEFAULT]\nrouter_port = abc\n")
    with pytest.raises(ConfigError) as caught:
        llmstack.load_config(llmstack.find_places({"LLMSTACK_MODELS_INI": str(path)}))
    assert caught.value.problems == (f"{path}:2: router_port: 'abc' is not a whole number",)


def test_the_path_of_a_gguf_is_relative_to_the_file_that_names_it(home: Path) -> None:
    path = write_ini("[a]\npath = models/a.gguf\n[b]\npath = ~/b.gguf\n[c]\npath = /big/c d.gguf\n").resolve()
    loaded = llmstack.load_config(llmstack.find_places({}))
    assert [t.path for t in loaded.tiers] == [str(path.parent / "models/a.gguf"), str(home / "b.gguf"), "/big/c d.gguf"]


# ---- Warnings


@pytest.mark.parametrize(("section", "line", "warning"), [
    ("a", "contex_size = 64k", "unknown key contex_size in [a], did you mean ctx_size?"),
    ("a", "Descripton = x", "unknown key descripton in [a], did you mean description?"),
    ("a", "zzz = 1", "unknown key zzz in [a]"),
    ("DEFAULT", "roter_port = 1", "unknown key roter_port in [DEFAULT], did you mean router_port?"),
    ("ROUTING", "multi_turns = 1", "unknown key multi_turns in [ROUTING], did you mean multi_turn?"),
    ("a", "role = agnet", "role agnet is none that auto or the agents know, did you mean agent?"),
])
def test_what_is_not_known_is_a_warning(section: str, line: str, warning: str) -> None:
    text = section_with(section, line)
    config, warnings = parse_models_ini(text)
    assert warnings == (f"models.ini:{text.count(chr(10))}: {warning}",)
    assert [t.name for t in config.tiers] == ["a"]


# ---- The command line


def test_a_warning_is_printed_and_the_command_goes_on(
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_ini(f"{A}role = fast\ncontex_size = 64k\n")
    assert ask_why(monkeypatch) == 0
    out, err = capsys.readouterr()
    assert out.startswith("a. ")
    assert f"{path}:5: unknown key contex_size in [a], did you mean ctx_size?" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["why", "status"])
def test_every_problem_is_a_line_and_the_exit_code_is_2(
        command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_ini(f"[DEFAULT]\nrouter_port = abc\nthreads = many\n{A}sampler = tmep=1\n")
    assert (ask_why(monkeypatch) if command == "why" else llmstack.main([command])) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out.startswith("Project  ") if command == "status" else not out     # what runs is of interest all the more
    assert [line.split(": ", 2)[:2] for line in lines[:3]] == [["llmstack", "error"]] * 3
    assert [line.split(": ", 2)[2].split(": ")[:2] for line in lines[:3]] == [
        [f"{path}:2", "router_port"], [f"{path}:3", "threads"], [f"{path}:7", "sampler"]]
    assert lines[3].startswith("hint: ")
    assert len(lines) == 4


# ---- Secrets. None of these is one, and they are put together here so that no scanner takes them for one.


KEYS = {
    "anthropic": "sk-ant-" + "api03-aB3dE5fG7hI9jK1lM3nO5pQ7rS9tU1vW3x",
    "openai": "sk-" + "proj-aB3dE5fG7hI9jK1lM3nO5pQ7rS9tU1vW3x",
    "hugging face": "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH",
    "github": "ghp_" + "aB3dE5fG7hI9jK1lM3nO5pQ7rS9tU1vW3xY5",
    "github, fine-grained": "github_" + "pat_11ABCDEFG0aB3dE5fG7hI9_jK1lM3nO5pQ7rS9tU1vW3xY5zA7bC9dE1fG3hI5jK7lM9",
    "groq": "gsk_" + "aB3dE5fG7hI9jK1lM3nO5pQ7rS9tU1vW3xY5zA7bC9dE1fG3hI5jK",
    "google": "AIza" + "SyA1bC2dE3fG4hI5jK6lM7nO8pQ9rS0tU1v",
    "slack": "xoxb-" + "123456789012-abcdefABCDEF",
    "aws id": "AKIA" + "IOSFODNN7EXAMPLE",
    "role arn": "arn:aws:" + "iam::123456789012:role/llm",
    "jwt": "eyJ" + "hbGciOiJIUzI1NiJ9x." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0.sflKxwRJ",
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "url with password": "https://me:" + "hunter2Zebra@llm.example/v1",
}
OPAQUE = "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY"        # nothing but its shape tells: only as a whole value


def assert_refused_unseen(text: str, line: int, secret: str, capsys: pytest.CaptureFixture[str],
                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by its line, and neither a problem nor what a command prints shows the value."""
    found = problems(text)
    assert line in [line_of(p) for p in found], found
    write_ini(text)
    assert ask_why(monkeypatch) == 2
    out, err = capsys.readouterr()
    assert f"models.ini:{line}: " in err
    for shown in (*found, out, err):
        assert secret not in shown
        assert secret.lower() not in shown.lower()


@pytest.mark.parametrize("key", [
    "api_key", "API_KEY", "apikey", "api-key", "openai_api_key", "token", "hf_token", "secret", "client_secret", "password",
    "passwd", "aws_access_key_id", "AWS_Secret_Access_Key", "aws_session_token", "aws_region_name", "aws_profile", "role_arn",
    "private_key", "credentials", "bearer", "authorization", "export OPENAI_API_KEY",
])
def test_a_key_that_would_hold_a_secret_is_refused_by_name_and_line(
        key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for section in TABLES:
        text = section_with(section, f"{key} = Hunter2zebra")
        assert key.lower() in problems(text)[0].lower()
        assert_refused_unseen(text, text.count("\n"), "Hunter2zebra", capsys, monkeypatch)


@pytest.mark.parametrize("value", [*KEYS.values(), OPAQUE], ids=[*KEYS, "opaque"])
def test_a_value_that_looks_like_a_key_is_refused_whatever_its_name(
        value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("description", "quant", "note", "api_key_env", "api_base"):
        assert_refused_unseen(f"{A}{key} = {value}\n", 4, value, capsys, monkeypatch)


@pytest.mark.parametrize("place", [
    pytest.param(A + "; {}\n", id="comment"),
    pytest.param(A + "#{}\n", id="hash comment"),
    pytest.param(A + "; api_key = {}\n", id="switched off"),
    pytest.param(A + "   ; before I forget: {}!\n", id="indented comment"),
    pytest.param(A + "role = fast   ; {}\n", id="inline comment"),
    pytest.param(A + "description = use {} here\n", id="within a value"),
    pytest.param(A + "{}\n", id="stray line"),
])
def test_a_key_is_found_in_comments_and_beside_other_text(
        place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for value in KEYS.values():
        assert_refused_unseen(place.format(value), 4, value, capsys, monkeypatch)


@pytest.mark.parametrize("line", [
    "router_port = {}", "engine = {}", "host = {}", "memory_gb = {}", "jinja = {}", "n_gpu_layers = {}", "[{}]", "{} = 1",
    "[b]\nmodel = x/y\naliases = {}", "[b]\nmodel = x/y\nsampler = temp={}", "[b]\nmodel = x/y\nsampler = {}=1",
    "[b]\nmodel = x/y\nctx_size = {}", "[b]\nmodel = x/y\nrole = {}", "[b]\nmodel = x/y\nrope_scaling = {}",
    "[b]\nmodel = x/y\nhf_repo_next = {}", "[ROUTING]\nultra_triggers = {}", "[ROUTING]\nmulti_turn = 3\n   {}",
])
def test_a_key_pasted_into_the_wrong_place_is_refused_and_never_shown(
        line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("anthropic", "hugging face"):
        text = f"[DEFAULT]\n{line.format(KEYS[name])}\n"
        found = problems(text)
        write_ini(text)
        assert ask_why(monkeypatch) == 2
        for shown in (*found, *capsys.readouterr()):
            assert KEYS[name].lower() not in shown.lower()


def test_naming_the_variable_that_holds_a_key_is_no_secret() -> None:
    config, warnings = parse_models_ini("[a]\nmodel = openai/gpt-4o\napi_key_env = OPENAI_API_KEY\n")
    assert config.tiers[0].model == "openai/gpt-4o"
    assert all("models.ini:3: unknown key api_key_env" in w for w in warnings)


@pytest.mark.parametrize(("repo", "file"), [
    ("bartowski/Qwen2.5-Coder-3B-Instruct-GGUF", "Qwen2.5-Coder-3B-Instruct-Q5_K_M.gguf"),
    ("mradermacher/Mistral-Small-3.2-24B-Instruct-2506-ultra-uncensored-heretic-i1-GGUF", "Mistral-Small.i1-Q4_K_M.gguf"),
    ("TheBloke/Mistral7BInstructv02GGUF", "Qwen3Coder30BA3BInstruct1MUDQ4KXL"),
    ("someone/sk-fusion-7b-instruct-v0.2-GGUF", "x.gguf"),
    ("owner/repo", "sk-fusion-7b-instruct-v0.2.Q4_K_M.gguf"),
    ("hf-internal-testing/tiny-random-LlamaForCausalLM", "hf_Qwen2Coder7BInstructQ5KM.gguf"),
    ("org/Token-Secret-Password-8B", "Q4_K_M/Qwen3Coder480BA35BInstruct1MQ4KM-00001-of-00006.gguf"),
])
def test_names_of_models_never_look_like_secrets(repo: str, file: str) -> None:
    lines = f"hf_repo = {repo}\nhf_file = {file}\n"
    queued = lines.replace("hf_repo", "hf_repo_next").replace("hf_file", "hf_file_next")
    tier = load(f"[a]\n{lines}{queued}").tiers[0]
    assert (tier.hf_repo, tier.hf_file, tier.hf_repo_next, tier.hf_file_next) == (repo, file, repo, file)
    switched_off = re.sub(r"(?m)^", "; ", lines.rstrip("\n"))
    assert load(f"{A}{switched_off}\n") == load(A)


@pytest.mark.parametrize("line", [
    "[a]\npath = /Users/Anna/models/Qwen3Coder30BA3BInstruct1MUDQ4KXL", "[a]\npath = sk-fusion-7b-instruct-v0.2.Q4_K_M.gguf",
    "[a]\nmodel = bedrock/arn:aws:bedrock:eu-west-3:123456789012:inference-profile/eu.anthropic.claude-sonnet-4",
    "[a]\nmodel = openrouter/moonshotai/KimiK2Instruct0905Thinking",
    "[DEFAULT]\nllama_server_bin = /Users/Anna/src/llamacpp2026/build/bin/server",
])
def test_paths_and_model_ids_are_no_secrets(line: str) -> None:
    key, _, value = line.split("\n")[1].partition(" = ")
    config = load(line + "\n")
    values = config.tiers[0]._asdict() if config.tiers else config.settings
    assert values[key] == value
