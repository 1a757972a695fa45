"""The ladder: which tier `auto` takes, why, and which bytes of the body change for it.

The tables below are the specification's; the property tests hold decide() and with_model() to it over many
seeded random cases, against a second, slower reading of the same sentences.
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest

import llmstack
from llmstack import Config, Decision, Facts, HttpError, Routing, Tier, decide, inference_path, is_auto, read_facts

CHAT = "/v1/chat/completions"
TRIGGERS = Routing().ultra_triggers

FAST = Tier("code-fast", role="fast", ctx_size=131_072)
SMART = Tier("code-smart", role="agent", ctx_size=65_536)
ULTRA = Tier("code-ultra", role="ultra", ctx_size=24_000, max_output_tokens=8_192)
PLAN = Tier("plan", role="plan", ctx_size=1_000_000)
WITH_ULTRA = Config(tiers=(FAST, SMART, ULTRA, PLAN))
NO_ULTRA = Config(tiers=(FAST, SMART, PLAN))

INI = """\
[code-fast]
role = fast
path = fast.gguf
ctx_size = 128k
[code-smart]
role = agent
path = smart.gguf
ctx_size = 64k
[code-ultra]
role = ultra
path = ultra.gguf
ctx_size = 24000
[ROUTING]
"""


def facts(tokens: int = 0, turns: int = 1, **others: Any) -> Facts:
    """A request of so many tokens in narrow text."""
    values: dict[str, Any] = {
        "auto": True, "model": "auto", "fim": False, "chars": tokens * 4, "wide": 0, "extra": 0, "pictures": 0,
        "turns": turns, "max_tokens": 0, "trigger": "",
    }
    return Facts(**{**values, **others})


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def chat(*messages: Any, **others: Any) -> dict[str, Any]:
    """A chat body; what is not a message yet is a user's."""
    return {"model": "auto", "messages": [m if isinstance(m, dict) else user(m) for m in messages], **others}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def compact(value: Any) -> int:
    """The length of a value as JSON without spaces."""
    return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False))


# ---- The rungs: the specification's table, first match wins


class Row(NamedTuple):
    tokens: int
    turns: int
    asks: str                                   # "", a trigger, or "infill"
    rung: str
    tier: str
    rung_without: str                           # the same request where there is no ultra tier
    tier_without: str


SPECIFICATION = [
    #   tokens turns asks      rung        tier          and without an ultra tier
    Row(0, 1, "", "high", "code-ultra", "high", "code-smart"),
    Row(0, 0, "", "high", "code-ultra", "high", "code-smart"),
    Row(11_999, 1, "", "high", "code-ultra", "high", "code-smart"),
    Row(12_000, 1, "", "high", "code-ultra", "high", "code-smart"),
    Row(12_000, 10, "", "high", "code-ultra", "high", "code-smart"),
    Row(12_001, 1, "", "mid", "code-smart", "mid", "code-smart"),
    Row(12_001, 10, "", "mid", "code-smart", "mid", "code-smart"),
    Row(32_000, 1, "", "mid", "code-smart", "mid", "code-smart"),
    Row(32_000, 10, "", "mid", "code-smart", "mid", "code-smart"),
    Row(32_001, 1, "", "long", "code-fast", "long", "code-fast"),
    Row(32_001, 9, "", "long", "code-fast", "long", "code-fast"),
    Row(32_001, 10, "", "floor", "code-smart", "floor", "code-smart"),
    Row(60_000, 400, "", "floor", "code-smart", "floor", "code-smart"),
    Row(100_000, 1, "", "long", "code-fast", "long", "code-fast"),
    Row(0, 1, "[ultra]", "trigger", "code-ultra", "trigger", "code-smart"),
    Row(20_000, 1, "opus:", "trigger", "code-ultra", "trigger", "code-smart"),
    Row(20_000, 12, "[opus]", "trigger", "code-ultra", "trigger", "code-smart"),
    Row(40_000, 1, "[ultra]", "trigger", "code-smart", "trigger", "code-smart"),
    Row(0, 1, "infill", "fim", "code-fast", "fim", "code-fast"),
    Row(12_001, 1, "infill", "fim", "code-fast", "fim", "code-fast"),
    Row(32_001, 10, "infill", "fim", "code-fast", "fim", "code-fast"),
]


def name_of(row: Any) -> str:
    return f"{row.tokens}-tokens-{row.turns}-turns-{row.asks or 'plain'}" if isinstance(row, Row) else ""


@pytest.mark.parametrize("row", SPECIFICATION, ids=name_of)
def test_the_specification_s_table(row: Row) -> None:
    asked = facts(row.tokens, row.turns, fim=row.asks == "infill", trigger=row.asks if row.asks != "infill" else "")
    wired, unwired = decide(asked, WITH_ULTRA), decide(asked, NO_ULTRA)
    assert (wired.rung, wired.tier) == (row.rung, row.tier)
    assert (unwired.rung, unwired.tier) == (row.rung_without, row.tier_without)
    assert wired.tokens == unwired.tokens == row.tokens


@pytest.mark.parametrize(("chars", "rung"), [
    (48_000, "high"), (48_003, "high"), (48_004, "mid"), (128_000, "mid"), (128_003, "mid"), (128_004, "long"),
])
def test_the_boundaries_hold_for_real_bodies(chars: int, rung: str) -> None:
    half = "x" * (chars // 2)
    body = chat(system(half), "x" * (chars - len(half)))
    assert decide(read_facts(CHAT, body, TRIGGERS), WITH_ULTRA).rung == rung


@pytest.mark.parametrize(("turns", "rung"), [(9, "long"), (10, "floor"), (11, "floor")])
def test_user_turns_are_counted_in_real_bodies(turns: int, rung: str) -> None:
    exchange = [{"role": "assistant", "content": "y"}, user("x")]
    body = chat(system("s"), "x" * 130_000, *(exchange * (turns - 1)))
    assert decide(read_facts(CHAT, body, TRIGGERS), WITH_ULTRA).rung == rung


@pytest.mark.parametrize(("tokens", "turns", "rung"), [
    (100, 1, "high"), (101, 1, "mid"), (200, 1, "mid"), (201, 2, "long"), (201, 3, "floor"),
])
def test_ceilings_and_turns_come_from_the_configuration(tokens: int, turns: int, rung: str) -> None:
    config = WITH_ULTRA._replace(routing=Routing(high_fidelity_ceiling=100, mid_fidelity_ceiling=200, multi_turn=3))
    assert decide(facts(tokens, turns), config).rung == rung


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_tiers_are_found_by_role_whatever_their_name_and_place(order: tuple[int, ...]) -> None:
    named = (FAST._replace(name="opus"), SMART._replace(name="code-fast"), ULTRA._replace(name="zebra"))
    config = Config(tiers=tuple(named[i] for i in order))
    got = [decide(facts(tokens), config).tier for tokens in (12_000, 32_000, 32_001)]
    assert got == ["zebra", "code-fast", "opus"]


@pytest.mark.parametrize(("roles", "high", "mid", "floor", "long", "infill"), [
    ("ultra agent fast", "ultra", "agent", "agent", "fast", "fast"),
    ("ultra agent", "ultra", "agent", "agent", "agent", "agent"),
    ("ultra fast", "ultra", "fast", "fast", "fast", "fast"),
    ("agent fast", "agent", "agent", "agent", "fast", "fast"),
    ("ultra", "ultra", "ultra", "ultra", "ultra", "ultra"),
    ("agent", "agent", "agent", "agent", "agent", "agent"),
    ("fast", "fast", "fast", "fast", "fast", "fast"),
])
def test_a_missing_role_falls_down_the_ladder_then_up(roles: str, high: str, mid: str, floor: str, long: str,
                                                      infill: str) -> None:
    config = Config(tiers=tuple(Tier(role, role=role, ctx_size=200_000) for role in roles.split()))
    asked = [facts(1), facts(20_000), facts(40_000, 10), facts(40_000), facts(1, fim=True)]
    assert [decide(f, config).tier for f in asked] == [high, mid, floor, long, infill]


@pytest.mark.parametrize(("missing", "asked"), [
    ("ultra", facts(1)), ("agent", facts(20_000)), ("agent", facts(40_000, 10)), ("fast", facts(40_000)),
    ("fast", facts(1, fim=True)),
], ids=["ultra-high", "agent-mid", "agent-floor", "fast-long", "fast-infill"])
def test_the_reason_says_which_role_is_missing(missing: str, asked: Facts) -> None:
    tiers = tuple(t._replace(ctx_size=200_000) for t in WITH_ULTRA.tiers if t.role != missing)
    assert f"no {missing} tier" in decide(asked, Config(tiers=tiers)).reason


@pytest.mark.parametrize("tiers", [(), (PLAN,), (PLAN, Tier("odd"), Tier("u", role="plan-uncensored"))])
def test_a_ladder_without_tiers_is_a_400(tiers: tuple[Tier, ...]) -> None:
    with pytest.raises(HttpError, match="fast, agent or ultra") as caught:
        decide(facts(), Config(tiers=tiers))
    assert caught.value.status == 400


def test_the_bundled_file_routes_as_it_says(config: Config) -> None:
    got = [decide(f, config).tier for f in (facts(12_000), facts(32_000), facts(32_001), facts(32_001, 10))]
    assert got == ["code-smart", "code-smart", "code-fast", "code-smart"]


# ---- Counting: characters of all message text and prompt


@pytest.mark.parametrize(("path", "body", "chars"), [
    (CHAT, chat("abcd"), 4),
    (CHAT, chat(system("abcd"), "efgh", {"role": "assistant", "content": "ij"}, user("klm")), 13),
    (CHAT, chat([text("abcd"), text("ef")]), 6),
    (CHAT, chat({"role": "tool", "tool_call_id": "1", "content": "abcdef"}), 6),
    (CHAT, chat("h\u00e9\u00e9\U0001f600"), 4),                              # code points, not bytes
    (CHAT, chat(), 0),
    ("/v1/completions", {"prompt": "abcd"}, 4),
    ("/v1/completions", {"prompt": ["abcd", "ef"]}, 6),
    ("/v1/completions", {"prompt": [1, 2, 3]}, 12),                          # a token each
    ("/v1/completions", {"prompt": [[1, 2], [3]]}, 12),
    ("/v1/completions", {"prompt": "abcd", "suffix": "ef"}, 6),
    ("/completion", {"prompt": [1, "abcd", 2]}, 12),
    ("/infill", {"input_prefix": "abc", "input_suffix": "de", "prompt": "f"}, 6),
    ("/infill", {"input_prefix": "abc", "input_extra": [{"filename": "a.py", "text": "xyz"}]}, 6),
    ("/v1/messages", {"system": "abcd", "messages": [user("ef")]}, 6),
    ("/v1/messages", {"system": [text("abcd"), text("gh")], "messages": [user([text("ef")])]}, 8),
    ("/v1/messages", chat([{"type": "tool_result", "tool_use_id": "t", "content": "abcde"}]), 5),
    ("/v1/messages", chat([{"type": "tool_result", "tool_use_id": "t", "content": [text("abc")]}, text("d")]), 4),
    ("/v1/messages/count_tokens", {"system": "abcd", "messages": [user("ef")]}, 6),
    ("/v1/responses", {"input": "abcd", "instructions": "efg"}, 7),
    ("/v1/responses", {"input": [user([{"type": "input_text", "text": "abc"}]), user("d")]}, 4),
    ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": "c", "output": "abcde"}]}, 5),
])
def test_characters_are_counted_wherever_text_stands(path: str, body: dict[str, Any], chars: int) -> None:
    got = read_facts(path, body)
    assert (got.chars, got.tokens) == (chars, chars // 4)


@pytest.mark.parametrize(("body", "turns"), [
    (chat("a"), 1),
    (chat(system("a"), {"role": "assistant", "content": "b"}, {"role": "tool", "content": "c"}), 0),
    (chat("a", {"role": "assistant", "content": "b"}, "c"), 2),
    (chat([text("a")], [{"type": "image_url", "image_url": {"url": "data:"}}]), 2),
    (chat("a", [{"type": "tool_result", "content": "the loop's, not the user's"}]), 1),
    (chat("a", [{"type": "tool_result", "content": "b"}, text("and the user's")]), 2),
    ({"prompt": "a"}, 1),
    ({"input": "a"}, 1),
    ({"input": [user("a"), {"type": "function_call_output", "output": "b"}, user("c")]}, 2),
    ({}, 0),
])
def test_a_turn_is_a_message_of_the_user(body: dict[str, Any], turns: int) -> None:
    assert read_facts(CHAT, body).turns == turns


# ---- The fuller estimate: what must fit a context

TOOLS = [{"type": "function", "function": {"name": "read_file", "parameters": {"type": "object", "properties": {}}}}]
WIDE_TOOLS = [{"function": {"description": "\u8aad" * 40}}]
ARGUMENTS = '{"path": "src/main.py", "text": "' + "x" * 200 + '"}'
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9_000}}


def calling(**message: Any) -> dict[str, Any]:
    return chat({"role": "assistant", **message})


@pytest.mark.parametrize(("body", "full"), [
    pytest.param(chat("x" * 400), 100, id="narrow"),
    pytest.param(chat("\u00e9\u0431\u03b1 " * 100), 100, id="latin-cyrillic-greek"),
    pytest.param(chat("\u5b57" * 100), 100, id="chinese"),
    pytest.param(chat("\u3042\u30ab" * 50), 100, id="kana"),
    pytest.param(chat("\ud55c" * 100), 100, id="hangul"),
    pytest.param(chat("\u0e01\u0e32" * 50), 100, id="thai"),
    pytest.param(chat("\uff21" * 100), 100, id="fullwidth"),
    pytest.param(chat("\U00020000" * 100), 100, id="rare-han"),
    pytest.param(chat("\U0001f600\U0001f680" * 50), 100, id="emoji"),
    pytest.param(chat("\u2705\u274c\u2b50\u26a1" * 25), 100, id="emoji-of-the-basic-plane"),
    pytest.param(chat("\u5b57" * 100 + "x" * 400), 200, id="mixed"),
    pytest.param(chat(system("\u5b57" * 60), [text("\u5b57" * 40)]), 100, id="chinese-parts"),
    pytest.param(chat(tools=TOOLS), compact(TOOLS) // 4, id="tools"),
    pytest.param(chat("x" * 400, tools=TOOLS), (400 + compact(TOOLS)) // 4, id="text-and-tools"),
    pytest.param(chat(functions=TOOLS), compact(TOOLS) // 4, id="functions"),
    pytest.param(chat(tools=WIDE_TOOLS), 40 + (compact(WIDE_TOOLS) - 40) // 4, id="chinese-tools"),
    pytest.param(calling(content=None, tool_calls=[{"function": {"name": "edit", "arguments": ARGUMENTS}}]),
                 (4 + len(ARGUMENTS)) // 4, id="tool-calls"),
    pytest.param(calling(tool_calls=[{"function": {"name": "edit", "arguments": ARGUMENTS}}]),
                 (4 + len(ARGUMENTS)) // 4, id="tool-calls-without-content"),
    pytest.param(calling(content="", tool_calls=[{"function": {"name": "f", "arguments": {"a": "b" * 30}}}] * 2),
                 2 * (1 + compact({"a": "b" * 30})) // 4, id="arguments-as-objects"),
    pytest.param(calling(content=None, function_call={"name": "edit", "arguments": ARGUMENTS}),
                 (4 + len(ARGUMENTS)) // 4, id="function-call-of-old"),
    pytest.param({"input": [{"type": "function_call", "call_id": "c", "name": "", "arguments": ARGUMENTS}]},
                 len(ARGUMENTS) // 4, id="responses-function-call"),
    pytest.param(calling(content=[{"type": "tool_use", "id": "t", "name": "", "input": {"a": "b" * 30}}]),
                 compact({"a": "b" * 30}) // 4, id="anthropic-tool-use"),
    pytest.param(calling(content="", reasoning_content="x" * 400), 100, id="reasoning"),
    pytest.param(chat([PICTURE]), 1_000, id="picture"),
    pytest.param(chat([text("x" * 400), PICTURE, PICTURE]), 2_100, id="two-pictures"),
    pytest.param(chat([{"type": "image", "source": {"type": "base64", "data": "A" * 9_000}}]), 1_000, id="anthropic-picture"),
    pytest.param({"input": [user([{"type": "input_image", "image_url": "data:"}])]}, 1_000, id="responses-picture"),
    pytest.param(chat([{"type": "tool_result", "content": [{"type": "image", "source": {}}]}]), 1_000, id="screenshot"),
])
def test_the_fuller_estimate_sees_all_that_fills_a_context(body: dict[str, Any], full: int) -> None:
    assert read_facts(CHAT, body).full_tokens == full


def test_the_rungs_compare_characters_alone() -> None:
    got = read_facts(CHAT, chat(["\u5b57" * 400, PICTURE], tools=TOOLS))
    assert got.tokens == 100
    assert got.full_tokens > 1_400


@pytest.mark.parametrize(("max_tokens", "max_output", "ctx", "reserve"), [
    (0, 0, 65_536, 1_024),                      # names none: 1,024
    (0, 512, 65_536, 512),                      # the tier's own cap is below that
    (0, 0, 2_048, 512),                         # a quarter of a small context
    (10, 8_192, 65_536, 10),                    # the request's wish is the smallest of the three
    (8_000, 0, 65_536, 8_000),
    (8_000, 4_096, 65_536, 4_096),              # the tier's cap is
    (100_000, 0, 65_536, 16_384),               # a quarter of the context is
    (100_000, 8_192, 24_000, 6_000),
])
def test_the_reserve_is_the_smallest_of_three(max_tokens: int, max_output: int, ctx: int, reserve: int) -> None:
    tier = Tier("t", role="agent", ctx_size=ctx, max_output_tokens=max_output)
    assert llmstack.tokens_needed(facts(500, max_tokens=max_tokens), tier) == 500 + reserve


@pytest.mark.parametrize(("asked", "tokens"), [
    ({"max_tokens": 7}, 7), ({"max_completion_tokens": 7}, 7), ({"max_output_tokens": 7}, 7), ({"n_predict": 7}, 7),
    ({"max_tokens": None, "max_completion_tokens": 7}, 7),
    ({}, 0), ({"max_tokens": 0}, 0), ({"n_predict": -1}, 0), ({"max_tokens": "7"}, 0), ({"max_tokens": True}, 0),
    ({"max_tokens": [7]}, 0), ({"max_tokens": {}}, 0),
])
def test_the_output_asked_for_has_four_names(asked: dict[str, Any], tokens: int) -> None:
    assert read_facts(CHAT, chat("x", **asked)).max_tokens == tokens


# ---- Triggers

FENCE = "```"

ASKS_FOR_ULTRA = [
    ("in-brackets", chat("[ultra] fix it"), "[ultra]"),
    ("anywhere-in-the-message", chat("please use [opus] for this"), "[opus]"),
    ("in-any-case", chat("[ULTRA] fix it"), "[ultra]"),
    ("on-a-later-line", chat("fix it\n\n[ultra]"), "[ultra]"),
    ("first-word", chat("ultra: fix it"), "ultra:"),
    ("first-word-glued", chat("opus:fix it"), "opus:"),
    ("first-word-behind-space", chat(" \n\tULTRA: fix it"), "ultra:"),
    ("in-a-text-part", chat([PICTURE, text("see [ultra]")]), "[ultra]"),
    ("first-word-of-parts", chat([text("ultra: fix"), text("more")]), "ultra:"),
    ("before-the-assistant", chat("[ultra] go", {"role": "assistant", "content": "on it"}), "[ultra]"),
    ("before-tool-results", chat("[ultra] go", {"role": "tool", "tool_call_id": "1", "content": "done"}), "[ultra]"),
    ("before-anthropic-results", chat("[ultra] go", [{"type": "tool_result", "content": "done"}]), "[ultra]"),
    ("beside-backticks", chat("`code` [ultra]"), "[ultra]"),
    ("behind-a-fence", chat(f"{FENCE}\ncode\n{FENCE}\n[ultra]"), "[ultra]"),
    ("behind-a-longer-closing-fence", chat(f"{FENCE}\ncode\n{FENCE}``\n[ultra]"), "[ultra]"),
    ("behind-tildes", chat("~~~\ncode\n~~~\n[ultra]"), "[ultra]"),
    ("behind-a-lone-backtick", chat("a ` and [ultra]"), "[ultra]"),
    ("behind-inline-code-of-three", chat(f"{FENCE}x{FENCE} is broken [ultra]"), "[ultra]"),
    ("alone-in-system", chat(system("Be kind.\n  [ultra]  \nBe brief."), "hi"), "[ultra]"),
    ("alone-in-system-parts", chat(system([text("Be kind."), text("[opus]")]), "hi"), "[opus]"),
    ("alone-in-developer", chat({"role": "developer", "content": "[Opus]"}, "hi"), "[opus]"),
    ("alone-in-anthropic-system", {"system": "Be kind.\r\n[ultra]\r\n", "messages": [user("hi")]}, "[ultra]"),
    ("alone-in-anthropic-parts", {"system": [text("[ultra]")], "messages": [user("hi")]}, "[ultra]"),
    ("alone-in-instructions", {"instructions": "[ultra]", "input": "hi"}, "[ultra]"),
    ("in-a-prompt", {"prompt": "[ultra] once upon"}, "[ultra]"),
    ("in-an-input", {"input": "ultra: hi"}, "ultra:"),
    ("in-input-items", {"input": [user([{"type": "input_text", "text": "[ultra] hi"}])]}, "[ultra]"),
]

DOES_NOT_ASK = [
    ("nothing", chat("hi")),
    ("no-messages", chat()),
    ("earlier-message", chat("[ultra] one", {"role": "assistant", "content": "ok"}, "two")),
    ("earlier-first-word", chat("ultra: one", "two")),
    ("earlier-text-later-picture", chat("[ultra] one", [PICTURE])),
    ("assistant", chat("hi", {"role": "assistant", "content": "[ultra] ultra:"})),
    ("tool", chat("hi", {"role": "tool", "tool_call_id": "1", "content": "[ultra]"})),
    ("tool-result", chat([{"type": "tool_result", "content": "[ultra]"}, text("go on")])),
    ("tool-result-parts", chat([{"type": "tool_result", "content": [text("[ultra]")]}, text("go on")])),
    ("tool-arguments", chat("hi", {"role": "assistant", "tool_calls": [{"function": {"arguments": "[ultra]"}}]})),
    ("function-output", {"input": [user("hi"), {"type": "function_call_output", "output": "[ultra]"}]}),
    ("backticks", chat("what does `[ultra]` do?")),
    ("double-backticks", chat("what does ``a ` [ultra]`` do?")),
    ("backticks-over-lines", chat("what does `a\n[ultra]` do?")),
    ("fence", chat(f"look:\n{FENCE}\n[ultra]\n{FENCE}\nwhy?")),
    ("fence-with-language", chat(f"{FENCE}ini\n[ultra]\nx = 1\n{FENCE}")),
    ("fence-never-closed", chat(f"{FENCE}\n[ultra]\n")),
    ("fence-indented", chat(f"  {FENCE}\n  [ultra]\n  {FENCE}")),
    ("fence-in-a-list", chat(f"- {FENCE}\n  [ultra]\n  {FENCE}\n")),
    ("fence-in-a-quote", chat(f"> {FENCE}\n> [ultra]\n> {FENCE}\n")),
    ("fence-with-crlf", chat(f"{FENCE}\r\n[ultra]\r\n{FENCE}\r\n")),
    ("fence-in-a-longer-fence", chat(f"{FENCE}`\n{FENCE}\ncode\n{FENCE}\n[ultra]\n{FENCE}`")),
    ("fence-in-tildes", chat(f"~~~\n{FENCE}\n~~\n[ultra]\n~~~")),
    ("second-fence", chat(f"{FENCE}\na\n{FENCE}\ntext\n{FENCE}\n[ultra]\n{FENCE}")),
    ("fence-that-names-a-fence", chat(f"{FENCE}md\nwrite\n{FENCE}python\n[ultra]\n{FENCE}\n")),
    ("fence-behind-a-lone-backtick", chat(f"it won`t run:\n{FENCE}\necho `date`\n[ultra]\n{FENCE}\n")),
    ("tildes", chat("~~~\n[ultra]\n~~~")),
    ("tildes-never-closed", chat("~~~~\n[ultra]\n~~~")),
    ("fence-in-a-prompt", {"prompt": f"{FENCE}\n[ultra]\n{FENCE}"}),
    ("pasted-line", chat("my settings:\nultra: true\nopus: false")),
    ("pasted-line-in-a-fence", chat(f"{FENCE}\nultra: true\n{FENCE}")),
    ("second-word", chat("use ultra: now")),
    ("first-word-in-backticks", chat("`ultra:` is what?")),
    ("first-word-of-a-later-part", chat([text("my settings"), text("ultra: true")])),
    ("longer-word", chat("ultraviolet: a colour")),
    ("word-without-colon", chat("ultra fix it")),
    ("other-brackets", chat("[ultra-wide] [ ultra ] [ultra")),
    ("prose-in-system", chat(system("Users may write [opus] to get the best model."), "hi")),
    ("sentence-in-system", chat(system("[opus] is the best model."), "hi")),
    ("colon-in-system", chat(system("ultra: true"), "hi")),
    ("colon-alone-in-system", chat(system("ultra:\nopus:"), "hi")),
    ("prose-in-developer", chat({"role": "developer", "content": "say [opus] if"}, "hi")),
    ("prose-in-anthropic-system", {"system": "say [opus] if", "messages": [user("hi")]}),
    ("prose-in-instructions", {"instructions": "say [opus] if", "input": "hi"}),
    ("backticks-in-system", chat(system("Write\n`[ultra]`\nif"), "hi")),
    ("beside-backticks-in-system", chat(system("`Write`\n`x` [ultra]"), "hi")),
    ("fence-in-system", chat(system(f"Write\n{FENCE}\n[ultra]\n{FENCE}\nto get the best model."), "hi")),
]


def first(row: Any) -> str:
    return str(row[0])


@pytest.mark.parametrize("row", ASKS_FOR_ULTRA, ids=first)
def test_these_ask_for_the_top_tier(row: tuple[str, dict[str, Any], str]) -> None:
    _, body, trigger = row
    got = read_facts(CHAT, body, TRIGGERS)
    assert got.trigger == trigger
    assert decide(got, WITH_ULTRA).rung == "trigger"
    assert decide(got, NO_ULTRA).tier == "code-smart", "without it, the agent's at any length"


@pytest.mark.parametrize("row", DOES_NOT_ASK, ids=first)
def test_these_do_not_ask_for_the_top_tier(row: tuple[str, dict[str, Any]]) -> None:
    assert read_facts(CHAT, row[1], TRIGGERS).trigger == ""


@pytest.mark.parametrize(("setting", "words", "trigger"), [
    ("ultra_triggers = [max], think:", "[MAX] go", "[max]"),
    ("ultra_triggers = [max], think:", "Think: go", "think:"),
    ("ultra_triggers = [max], think:", "[ultra] go", ""),
    ("ultra_triggers = [max], think:", "ultra: go", ""),
    ("ultra_triggers = [max], think:", "I think: go", ""),
    ("ultra_triggers =", "[ultra] go", ""),
    ("", "[ultra] go", "[ultra]"),
])
def test_triggers_come_from_the_configuration(setting: str, words: str, trigger: str) -> None:
    config = llmstack.parse_models_ini(INI + setting)[0]
    assert read_facts(CHAT, chat(words), config.routing.ultra_triggers).trigger == trigger


@pytest.mark.parametrize("words", ["a " + "`" * 12_000, " ".join("`" * i for i in range(150)), "```\n" * 3_000],
                         ids=["one-run", "runs-of-every-length", "fences"])
def test_a_message_full_of_backticks_is_searched_at_once(words: str) -> None:
    began = time.perf_counter()
    read_facts(CHAT, chat(words + " [ultra]"), TRIGGERS)
    assert time.perf_counter() - began < 0.2


# ---- The fit invariant: auto never picks a tier that cannot hold the request while another can


@pytest.mark.parametrize(("asked", "tier"), [
    (facts(64_512, 10), "code-smart"),                          # with 1,024 to answer: 65,536 exactly
    (facts(64_513, 10), "code-fast"),
    (facts(30_000, max_tokens=16_384), "code-smart"),
    (facts(22_976, trigger="[ultra]"), "code-ultra"),
    (facts(22_977, trigger="[ultra]"), "code-smart"),
    (facts(18_001, trigger="[ultra]", max_tokens=6_000), "code-smart"),
    (facts(64_513, trigger="[ultra]"), "code-fast"),            # down twice
    (facts(10_000, wide=40_000), "code-smart"),                 # 40,000 Chinese characters are 40,000 tokens
    (facts(16_000, wide=64_000, pictures=1), "code-fast"),
    (facts(1_000, extra=4 * 22_000), "code-smart"),
    (facts(1_000, pictures=22), "code-smart"),
    (facts(130_048), "code-fast"),
    (facts(130_049), "code-fast"),                              # none holds it: the largest context
    (facts(250_000, trigger="[ultra]"), "code-fast"),
])
def test_what_does_not_fit_goes_down_the_ladder(asked: Facts, tier: str) -> None:
    assert decide(asked, WITH_ULTRA).tier == tier


@pytest.mark.parametrize(("fast", "agent", "ultra", "asked", "tier"), [
    (8_192, 65_536, 200_000, facts(40_000), "agent"),           # nearest above
    (8_192, 32_768, 200_000, facts(40_000), "ultra"),
    (8_192, 32_768, 65_536, facts(50_000, 10), "ultra"),
    (8_192, 32_768, 65_536, facts(10_000, fim=True), "agent"),
    (65_536, 16_384, 200_000, facts(20_000), "fast"),           # down first, though ultra holds it
    (8_192, 16_384, 16_384, facts(90_000), "agent"),            # none holds it, and two are largest
])
def test_what_does_not_fit_below_goes_up(fast: int, agent: int, ultra: int, asked: Facts, tier: str) -> None:
    sizes = {"fast": fast, "agent": agent, "ultra": ultra}
    config = Config(tiers=tuple(Tier(role, role=role, ctx_size=size) for role, size in sizes.items()))
    assert decide(asked, config).tier == tier


def test_the_largest_context_serves_where_none_holds() -> None:
    decision = decide(facts(200_000), WITH_ULTRA)
    assert [t.name for t in decision.chain] == ["code-fast"]
    assert "no tier holds 201,024 tokens (estimated)" in decision.reason
    measured = decide(facts(200_000, classes=150_000, ratio=1.2), WITH_ULTRA)
    assert "no tier holds 181,024 tokens (measured)" in measured.reason
    assert measured.refused["code-ultra"].endswith("this needs 181,024 (measured)")


@pytest.mark.parametrize(("down", "tier", "chain"), [
    ([], "code-ultra", "code-ultra code-smart code-fast"),
    (["code-ultra"], "code-smart", "code-smart code-fast"),
    (["code-smart"], "code-ultra", "code-ultra code-fast"),
    (["code-ultra", "code-smart"], "code-fast", "code-fast"),
    (["code-ultra", "code-smart", "code-fast"], "code-ultra", "code-ultra code-smart code-fast"),
])
def test_a_tier_that_is_down_is_passed_over_while_another_holds(down: list[str], tier: str, chain: str) -> None:
    decision = decide(facts(100), WITH_ULTRA, dict.fromkeys(down, "answered 401"))
    assert (decision.tier, [t.name for t in decision.chain]) == (tier, chain.split())


def test_a_tier_that_is_down_is_still_taken_where_it_alone_holds() -> None:
    assert decide(facts(100_000), WITH_ULTRA, {"code-fast": "answered 503"}).tier == "code-fast"


def needs(f: Facts, tier: Tier) -> int:
    """The issue's sentence once more: text, wide characters a token each, extras, pictures, and the reserve."""
    narrow = f.chars - f.wide
    asked = f.max_tokens if f.max_tokens else 1_024
    caps = [asked, tier.ctx_size // 4] + [tier.max_output_tokens] * bool(tier.max_output_tokens)
    return (narrow + f.extra) // 4 + f.wide + 1_000 * f.pictures + sorted(caps)[0]


def role_wanted(f: Facts, config: Config) -> str:
    """The specification's table once more."""
    if f.fim:
        return "fast"
    if f.trigger or f.chars // 4 <= config.routing.high_fidelity_ceiling:
        return "ultra"
    if f.chars // 4 <= config.routing.mid_fidelity_ceiling or f.turns >= config.routing.multi_turn:
        return "agent"
    return "fast"


SEARCHED = {"ultra": "ultra agent fast", "agent": "agent fast ultra", "fast": "fast agent ultra"}   # down, then up


def any_config(rng: random.Random) -> Config:
    roles = rng.sample(["ultra", "agent", "fast"], rng.randint(1, 3))
    tiers = []
    for role in roles:
        ctx_size = rng.choice([512, 4_096, 8_192, 24_000, 65_536, 131_072, rng.randrange(256, 300_000)])
        tiers.append(Tier(f"the-{role}", role=role, ctx_size=ctx_size, max_output_tokens=rng.choice([0, 0, 256, 8_192])))
    rng.shuffle(tiers)
    high, mid = sorted(rng.choice([(12_000, 32_000), (rng.randrange(50_000), rng.randrange(50_000))]))
    return Config(tiers=(*tiers, PLAN), routing=Routing(high, mid, rng.choice([10, 1, 3])))


def any_facts(rng: random.Random) -> Facts:
    chars = rng.choice([rng.randrange(400), rng.randrange(60_000), rng.randrange(300_000), rng.randrange(1_200_000)])
    return facts(0, rng.randrange(14), chars=chars, fim=rng.random() < 0.1, trigger=rng.choice(["", "", "", "[ultra]"]),
                 wide=rng.choice([0, 0, rng.randint(0, chars)]), extra=rng.choice([0, rng.randrange(200_000)]),
                 pictures=rng.choice([0, 0, 0, rng.randrange(40)]), max_tokens=rng.choice([0, 0, 16, 4_096, 100_000]))


def test_auto_never_picks_a_tier_that_cannot_hold_the_request_while_another_can() -> None:
    rng = random.Random(1)
    for case in range(3_000):
        config, asked = any_config(rng), any_facts(rng)
        down = {t.name: "down" for t in config.tiers if rng.random() < 0.2}
        barred = {t.name: "barred" for t in config.tiers if rng.random() < 0.1}
        ladder = [t for t in config.tiers if t.role in llmstack.LADDER_ROLES]
        if asked.pictures and any(t.takes_pictures for t in ladder):
            barred.update((t.name, "blind") for t in ladder if not t.takes_pictures)
        by_role = {t.role: t for t in config.tiers}
        order = [by_role[role] for role in SEARCHED[role_wanted(asked, config)].split() if role in by_role]
        holding = [t for t in order if needs(asked, t) <= t.ctx_size]
        able = [t for t in holding if t.name not in barred]
        healthy = [t for t in able if t.name not in down]
        decision = decide(asked, config, down, barred)
        if able:
            expected = healthy or able
        elif holding:
            expected = holding[:1]
        else:
            left = [t for t in order if t.name not in barred] or order
            expected = [t for t in left if t.ctx_size == max(t.ctx_size for t in left)][:1]
        assert list(decision.chain) == expected, (case, asked, config, down)
        assert decision.tier == expected[0].name


# ---- What a decision says


@pytest.mark.parametrize(("asked", "reason", "refused"), [
    (facts(12_000), "12,000 tokens <= 12,000: top tier",
     {"code-fast": "below the tier taken", "code-smart": "below the tier taken"}),
    (facts(20_000), "20,000 tokens <= 32,000: heavy local coder",
     {"code-fast": "below the tier taken", "code-ultra": "20,000 tokens > 12,000 and no trigger"}),
    (facts(40_000, 11), "40,000 tokens, 11 user turns >= 10: keep the heavy coder",
     {"code-fast": "below the tier taken", "code-ultra": "code-ultra holds 24,000 tokens, this needs 41,024 (estimated)"}),
    (facts(40_000, 3), "40,000 tokens > 32,000: stepping down to the long window",
     {"code-smart": "40,000 tokens > 32,000 and 3 user turns < 10",
      "code-ultra": "code-ultra holds 24,000 tokens, this needs 41,024 (estimated)"}),
    (facts(100, trigger="[opus]"), "[opus] asks for the top tier",
     {"code-fast": "below the tier taken", "code-smart": "below the tier taken"}),
    (facts(70_000, 10), "70,000 tokens, 10 user turns >= 10: keep the heavy coder; code-smart holds 65,536 tokens,"
     " this needs 71,024 (estimated), so code-fast",
     {"code-smart": "code-smart holds 65,536 tokens, this needs 71,024 (estimated)",
      "code-ultra": "code-ultra holds 24,000 tokens, this needs 71,024 (estimated)"}),
    (facts(100, fim=True), "infill belongs to the fast tier",
     {"code-smart": "infill goes to the fast tier", "code-ultra": "infill goes to the fast tier"}),
])
def test_a_decision_gives_its_reason_and_one_for_every_other_tier(asked: Facts, reason: str, refused: dict[str, str]) -> None:
    decision = decide(asked, WITH_ULTRA)
    assert decision.reason == reason
    assert decision.refused == {**refused, "plan": "role plan is never auto-routed; ask for it by name"}


def test_a_decision_says_which_tier_is_down() -> None:
    decision = decide(facts(100), WITH_ULTRA, {"code-ultra": "answered 401 a moment ago"})
    why = "code-ultra is left alone for now: answered 401 a moment ago"
    assert decision.refused["code-ultra"] == why
    assert decision.reason.endswith(f"; {why}, so code-smart")


def test_every_other_tier_is_refused_with_a_reason() -> None:
    rng = random.Random(2)
    for _ in range(1_500):
        config = any_config(rng)
        decision = decide(any_facts(rng), config, {t.name: "down" for t in config.tiers if rng.random() < 0.2})
        assert set(decision.refused) == {t.name for t in config.tiers} - {decision.tier}
        assert all(decision.refused.values())


def test_a_name_is_taken_as_asked() -> None:
    decision = decide(facts(500_000, auto=False, model="plan"), WITH_ULTRA)
    assert (decision.tier, decision.rung, decision.refused, decision.nearest) == ("plan", "explicit", {}, "")


@pytest.mark.parametrize(("config", "asked", "nearest"), [
    (WITH_ULTRA, facts(13_240), "1,240 fewer tokens \u2192 code-ultra"),
    (WITH_ULTRA, facts(12_002), "2 fewer tokens \u2192 code-ultra"),
    (WITH_ULTRA, facts(40_000, 12), "28,000 fewer tokens \u2192 code-ultra"),
    (WITH_ULTRA, facts(33_000, 1), "9 more user turns \u2192 code-smart"),
    (WITH_ULTRA, facts(33_000, 9), "1 more user turn \u2192 code-smart"),
    (WITH_ULTRA, facts(32_004, 1), "4 fewer tokens \u2192 code-smart"),
    (WITH_ULTRA, facts(70_000, 3), "38,000 fewer tokens \u2192 code-smart"),     # turns alone would not make it fit
    (WITH_ULTRA, facts(70_000, 12), "5,488 fewer tokens \u2192 code-smart"),     # has the turns, needs only to fit
    (WITH_ULTRA, facts(30_000, trigger="[ultra]"), "7,024 fewer tokens \u2192 code-ultra"),   # the same of a trigger
    (WITH_ULTRA, facts(10_000, wide=40_000), "17,024 fewer tokens \u2192 code-ultra"),
    (WITH_ULTRA, facts(100), ""),                                               # at the top
    (NO_ULTRA, facts(13_240), ""),
    (NO_ULTRA, facts(40_000, 9), "1 more user turn \u2192 code-smart"),
    (WITH_ULTRA, facts(100, fim=True), ""),                                     # where infill goes is not a matter of size
], ids=lambda value: value or "none" if isinstance(value, str) else "")
def test_nearest_is_the_smallest_change_that_would_move_it_up(config: Config, asked: Facts, nearest: str) -> None:
    assert decide(asked, config).nearest == nearest


def fewer(asked: Facts, tokens: int) -> Facts:
    return asked._replace(chars=asked.chars - 4 * tokens)


def test_nearest_is_true() -> None:
    """Made, the change gives the tier it promises; with one token or turn less of it, nothing above."""
    rng = random.Random(3)
    for case in range(2_000):
        config = any_config(rng)
        asked = any_facts(rng)._replace(wide=0, extra=0, pictures=0, fim=False)
        decision = decide(asked, config)
        rank = {t.name: i for i, t in enumerate(config.ladder)}
        match = re.fullmatch(r"([\d,]+) (fewer token|more user turn)s? \u2192 ([\w-]+)", decision.nearest)
        if not match:
            assert not decision.nearest
            assert rank[decision.tier] == 0, (case, asked, config)
            continue
        change, kind, promised = int(match.group(1).replace(",", "")), match.group(2), match.group(3)
        if kind == "fewer token":
            made, almost = fewer(asked, change), fewer(asked, change - 1)
        else:
            made, almost = asked._replace(turns=asked.turns + change), asked._replace(turns=asked.turns + change - 1)
        assert rank[promised] < rank[decision.tier]
        assert decide(made, config).tier == promised, (case, decision)
        assert rank[decide(almost, config).tier] >= rank[decision.tier], (case, decision)


# ---- What auto is, and where


@pytest.mark.parametrize(("model", "auto"), [
    ("auto", True), ("AUTO", True), ("Auto", True), (" auto ", True), ("llama.cpp/auto", True), ("LLAMA.CPP/AUTO", True),
    ("a/b/auto", True), ("", True), ("  ", True), (None, True),
    ("code-smart", False), ("autopilot", False), ("my-auto", False), ("auto/x", False), ("llama.cpp/code-fast", False),
    (0, False), (False, False), ([], False), (["auto"], False), ({}, False), (1.5, False),
])
def test_auto_has_many_spellings(model: object, auto: bool) -> None:
    assert is_auto(model) is auto
    assert read_facts(CHAT, {"model": model}).auto is auto


def test_an_absent_model_is_auto() -> None:
    assert read_facts(CHAT, {"messages": []}).auto


CANONICAL = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
             "/completion", "/infill"]


@pytest.mark.parametrize("path", CANONICAL)
def test_inference_paths_go_with_and_without_v1_slash_and_query(path: str) -> None:
    bare = path[3:] if path.startswith("/v1/") else path
    for spelled in (path, bare, path + "/", bare + "/", path + "?beta=true", bare + "/?a=b/c"):
        assert inference_path(spelled) == path, spelled


@pytest.mark.parametrize("path", [
    "/", "", "/v1", "/v1/", "/v1/models", "/models.ini", "/v1/audio/speech", "/v1/chat", "/chat/completions/x", "/health",
    "/upstream/code-fast/v1/chat/completions", "/x?/v1/completions", "/v1/completionsx",
])
def test_other_paths_are_none_of_inference(path: str) -> None:
    assert inference_path(path) == ""


@pytest.mark.parametrize(("path", "body", "fim"), [
    ("/infill", {"input_prefix": "a"}, True),
    ("/infill", {}, True),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, True),
    ("/v1/completions", {"prompt": "a", "suffix": ""}, False),
    ("/v1/completions", {"prompt": "a", "suffix": None}, False),
    ("/v1/completions", {"prompt": "a"}, False),
    (CHAT, chat("a", suffix="b"), False),
])
def test_infill_and_a_suffix_go_to_the_fast_role(path: str, body: dict[str, Any], fim: bool) -> None:
    decision = decide(read_facts(path, body, TRIGGERS), WITH_ULTRA)
    assert (decision.rung == "fim", decision.tier == "code-fast") == (fim, fim)


# ---- Wrong types

KEYS = ["model", "messages", "input", "prompt", "system", "instructions", "suffix", "input_prefix", "input_suffix", "input_extra",
        "tools", "functions", "max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict", "stream"]
INNER_KEYS = ["role", "content", "type", "text", "tool_calls", "function", "function_call", "arguments", "name", "output",
              "input", "thinking", "reasoning_content", "source", "image_url"]
WORDS = ["user", "system", "assistant", "tool", "text", "image", "tool_result", "tool_use", "thinking", "function_call",
         "[ultra]", "ultra:", "auto", "", "\u5b57", "\ud800", "```"]


def junk(rng: random.Random, depth: int = 4) -> Any:
    """Any JSON value, made of the words a request is made of."""
    kind = rng.randrange(8 if depth else 6)
    if kind < 6:
        return [None, True, rng.randrange(-2, 3), 1.5, float("nan"), rng.choice(WORDS)][kind]
    if kind == 6:
        return [junk(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(INNER_KEYS): junk(rng, depth - 1) for _ in range(rng.randrange(5))}


def test_wrong_types_never_raise() -> None:
    rng = random.Random(4)
    for _ in range(4_000):
        body = {key: junk(rng) for key in rng.sample(KEYS, rng.randrange(6))}
        if rng.random() < 0.5:
            parts = [junk(rng) for _ in range(2)] if rng.random() < 0.5 else junk(rng)
            body["messages"] = [{"role": rng.choice(["user", "system", []]), "content": parts, "tool_calls": junk(rng)}]
        got = read_facts(rng.choice(CANONICAL), body, TRIGGERS)
        assert min(got.chars, got.wide, got.extra, got.pictures, got.turns, got.max_tokens) >= 0, body
        decision = decide(got, WITH_ULTRA)
        assert isinstance(decision.nearest, str)
        assert isinstance(decision.refused, dict)


@pytest.mark.parametrize("body", [
    chat([{"type": ["text"], "text": "x"}]), chat([{"type": {}, "text": "x"}]), {"prompt": [{"type": []}]},
    {"messages": "hi"}, {"messages": {"role": "user"}}, {"messages": [None, 1, "x", []]}, {"messages": [{}]},
    chat(None), chat(7), chat({"role": ["user"], "content": "x"}), {"input": 7}, {"input": ["x", None]},
    {"system": 7, "instructions": {}, "prompt": 1.5}, {"tools": "x"}, {"tools": {"a": float("inf")}},
    chat({"role": "assistant", "content": None, "tool_calls": {"function": 1}}),
    chat({"role": "assistant", "content": None, "tool_calls": [None, {"function": None}, {"function": {"arguments": 7}}]}),
], ids=repr)
def test_a_malformed_body_is_still_decided(body: dict[str, Any]) -> None:
    assert decide(read_facts(CHAT, body, TRIGGERS), WITH_ULTRA).tier == "code-ultra"


@pytest.mark.parametrize("body", [{"messages": "hi"}, {"messages": [7, "hi"]}, {"system": 7}, {"prompt": {"a": 1}}, {"input": 7},
                                  {"prompt": None}, {"tools": None}, chat(7.5), chat({"role": "user"})])
def test_wrong_types_count_nothing(body: dict[str, Any]) -> None:
    got = read_facts(CHAT, body)
    assert (got.chars, got.extra, got.pictures) == (0, 0, 0)


# ---- The model's bytes


def rewritten(body: bytes, name: str = "code-smart") -> bytes:
    pieces = llmstack.with_model(body, "model" in json.loads(body), name)
    return b"".join(pieces)


@pytest.mark.parametrize(("body", "result"), [
    ('{"model":"auto"}', '{"model":"N"}'),
    ('{"model":""}', '{"model":"N"}'),
    ('{"model":null}', '{"model":"N"}'),
    ('{"model":"llama.cpp/AUTO","stream":true}', '{"model":"N","stream":true}'),
    ('{"stream":true,"model":"auto"}', '{"stream":true,"model":"N"}'),
    ('  { "model" \t:\r\n "auto" , "x" : 1 }\n', '  { "model" \t:\r\n "N" , "x" : 1 }\n'),
    ('{\r\n"model": "auto",\r\n"x": 1\r\n}\r\n', '{\r\n"model": "N",\r\n"x": 1\r\n}\r\n'),
    # absent: it is put first
    ("{}", '{"model":"N"}'),
    (" {\r\n } ", ' {"model":"N"\r\n } '),
    ('{"x":1}', '{"model":"N","x":1}'),
    ('\n{ "x": {} }', '\n{"model":"N", "x": {} }'),
    ('{"x":"model"}', '{"model":"N","x":"model"}'),
    ('{"x":{"model":"auto"}}', '{"model":"N","x":{"model":"auto"}}'),
    ('{"x":[{"model":"auto"}],"Model":"auto"}', '{"model":"N","x":[{"model":"auto"}],"Model":"auto"}'),
    # nested, as a value, in text
    ('{"x":{"model":"auto"},"model":"auto"}', '{"x":{"model":"auto"},"model":"N"}'),
    ('{"model":"auto","x":{"model":"auto"}}', '{"model":"N","x":{"model":"auto"}}'),
    ('{"x":"model","model":"auto"}', '{"x":"model","model":"N"}'),
    ('{"model":"auto","x":"model"}', '{"model":"N","x":"model"}'),
    ('{"x":["model","auto"],"model":"auto"}', '{"x":["model","auto"],"model":"N"}'),
    (r'{"x":"\"model\":\"auto\"","model":"auto"}', r'{"x":"\"model\":\"auto\"","model":"N"}'),
    (r'{"x":"say \"model","model":"auto"}', r'{"x":"say \"model","model":"N"}'),
    (r'{"x":"}]{[\\","model":"auto","y":"{"}', r'{"x":"}]{[\\","model":"N","y":"{"}'),
    # duplicate keys: the last counts, all are changed
    ('{"model":"auto","model":""}', '{"model":"N","model":"N"}'),
    ('{"model":"code-fast","model":"auto"}', '{"model":"N","model":"N"}'),
    ('{"model":7,"model":"auto"}', '{"model":7,"model":"N"}'),
    ('{"model":{"model":"auto"},"model":null}', '{"model":{"model":"auto"},"model":"N"}'),
    # escaped keys and values
    (r'{"mod\u0065l":"auto"}', r'{"mod\u0065l":"N"}'),
    (r'{"\u006D\u006f\u0064\u0065\u006C":"auto"}', r'{"\u006D\u006f\u0064\u0065\u006C":"N"}'),
    (r'{"model":"code-fast","mod\u0065l":"auto"}', r'{"model":"N","mod\u0065l":"N"}'),
    (r'{"x":{"mod\u0065l":"auto"},"model":"\u0061uto"}', r'{"x":{"mod\u0065l":"auto"},"model":"N"}'),
    (r'{"x":{"model":"auto"},"mod\u0065l":"auto"}', r'{"x":{"model":"auto"},"mod\u0065l":"N"}'),
    # any script around it
    ('{"\u6a21\u578b":"\u5b57\U0001f600","model":"auto","\u00e9":"\u2028"}',
     '{"\u6a21\u578b":"\u5b57\U0001f600","model":"N","\u00e9":"\u2028"}'),
])
def test_only_the_model_s_bytes_change(body: str, result: str) -> None:
    for spelled in (body.encode(), bytearray(body.encode())):
        before = bytes(spelled)
        assert rewritten(spelled, "N").decode() == result
        assert spelled == before


MODEL_KEYS = [b'"model"', b'"model"', b'"mod\\u0065l"', b'"\\u006dodel"', b'"\\u006Dode\\u006c"']
MODEL_VALUES = [b'"auto"', b'""', b"null", b'"llama.cpp/Auto"', b'"\\u0061uto"', '"\u81ea\u52d5/auto"'.encode(), b'"\\"}/auto"']
OTHER_VALUES = [b"7", b'{"model":"auto"}', b'["auto","model"]', b"true"]
TEXTS = ["model", "auto", '"model":"auto"', "\\", '\\"', "{", "}]", "\u5b57", "\U0001f600", "mod\u00e9l", "x" * 80, "\x01", "\n"]


def other_json(rng: random.Random, plain: bool, depth: int = 3) -> Any:
    kind = rng.randrange(5 if depth else 3)
    if kind < 3:
        return [rng.choice([None, True, -1.5e3, 0]), "x", "x" if plain else rng.choice(TEXTS)][kind]
    if kind == 3:
        return [other_json(rng, plain, depth - 1) for _ in range(rng.randrange(4))]
    return {"k" if plain else rng.choice(["model", "x", "Model", *TEXTS]): other_json(rng, plain, depth - 1)
            for _ in range(rng.randrange(3))}


def any_body(rng: random.Random, models: int) -> list[bytes]:
    """A JSON object in pieces between which the values of its top-level "model" keys stand."""
    def space() -> bytes:
        return rng.choice([b"", b"", b" ", b"\r\n", b"\n\t "])

    plain = rng.random() < 0.4                  # nothing else in it is spelled like the key
    members: list[tuple[bytes, bytes]] = [(b"", b"")] * models
    for _ in range(rng.randrange(5)):
        key = "k" if plain else rng.choice(["messages", "models", "Model", "\u6a21", "x" * 70, "a\"model\"", "\\model"])
        value = json.dumps(other_json(rng, plain), ensure_ascii=rng.random() < 0.5, separators=rng.choice([(",", ":"), None]))
        members.append((json.dumps(key, ensure_ascii=rng.random() < 0.5).encode(), value.encode()))
    if models and not plain and rng.random() < 0.3:
        members.append((rng.choice(MODEL_KEYS), rng.choice(OTHER_VALUES)))      # a duplicate that names no model
        rng.shuffle(members)
        members.append((b"", b""))              # the last is what counts
    else:
        rng.shuffle(members)
    pieces, text = [], space() + b"{" + space()
    for number, (key, value) in enumerate(members):
        text += (b"," + space() if number else b"") + (key or (MODEL_KEYS[0] if plain else rng.choice(MODEL_KEYS)))
        text += space() + b":" + space()
        if key:
            text += value
        else:
            pieces.append(text)
            text = b""
        text += space()
    return [*pieces, text + b"}" + space()]


def test_parsed_again_the_body_names_the_tier_and_every_other_byte_is_the_same() -> None:
    rng = random.Random(5)
    for case in range(2_500):
        pieces = any_body(rng, rng.choice([1, 1, 1, 2, 3]))
        body = b"".join(a + b for a, b in itertools.zip_longest(pieces, [rng.choice(MODEL_VALUES) for _ in pieces[1:]],
                                                                fillvalue=b""))
        result = rewritten(bytearray(body) if case % 2 else body)
        assert result == b'"code-smart"'.join(pieces), body
        assert json.loads(result)["model"] == "code-smart"


def test_where_it_was_absent_taking_it_away_gives_the_original() -> None:
    rng = random.Random(6)
    for case in range(1_000):
        [body] = any_body(rng, 0)
        result = rewritten(bytearray(body) if case % 2 else body)
        assert json.loads(result) == {"model": "code-smart", **json.loads(body)}
        comma = b"," if json.loads(body) else b""
        assert result.replace(b'{"model":"code-smart"' + comma, b"{", 1) == body


# ---- llmstack why


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """`why` sends nothing."""
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("socket.socket", refuse)
    monkeypatch.setattr("socket.create_connection", refuse)


def write_ini(text: str) -> None:
    path = Path(".llmstack/models.ini")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def why(body: Any, *options: str) -> int:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    Path("request.json").write_bytes(data)
    return llmstack.main(["why", "request.json", *options])


@pytest.mark.usefixtures("no_sockets")
def test_why_explains_a_request_to_people(capsys: pytest.CaptureFixture[str]) -> None:
    write_ini(INI)
    assert why(chat("x" * 4 * 13_240)) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "code-smart. Longer prompt (13,240 of 32,000 tokens): the heavy coder",
        "",
        "   code-ultra  ultra   24k  13,240 tokens > 12,000 and no trigger",
        "\u2192  code-smart  agent   64k  taken",
        "   code-fast   fast   128k  below the tier taken",
        "Nearest change: 1,240 fewer tokens \u2192 code-ultra",
    ]
    assert err == ""


@pytest.mark.usefixtures("no_sockets")
def test_why_explains_a_request_to_programs(capsys: pytest.CaptureFixture[str]) -> None:
    write_ini(INI)
    assert why(chat("x" * 4 * 33_000), "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert list(out) == ["tier", "rung", "tokens", "needs", "source", "reason", "refused", "nearest",
                         "takes"]
    assert out == {
        "tier": "code-fast", "rung": "long", "tokens": 33_000, "needs": 26_796, "source": "estimated",
        "reason": "33,000 tokens > 32,000: stepping down to the long window",
        "refused": {"code-smart": "33,000 tokens > 32,000 and 1 user turns < 10",
                    "code-ultra": "code-ultra holds 24,000 tokens, this needs 27,820 (estimated)"},
        "nearest": "9 more user turns \u2192 code-smart",
        "takes": {},
    }


def test_why_says_what_a_tier_takes_where_that_is_known(
        capsys: pytest.CaptureFixture[str]) -> None:
    write_ini(INI)
    speeds = llmstack.Speeds(llmstack.find_places(os.environ).data)
    speeds.note("i", "code-fast", "read", 1_000.0)
    speeds.note("i", "code-fast", "load", 4.0)
    speeds.keep()
    body = chat("x" * 4 * 33_000)
    assert why(body, "--json") == 0
    assert json.loads(capsys.readouterr().out)["takes"] == {
        "code-fast": {"read_s": 26.8, "load_s": 4.0}}
    assert why(body) == 0
    assert ("On code-fast: about 26.8 s to read it anew, 4.0 s more where it must be loaded"
            in capsys.readouterr().out)


def test_why_knows_no_nearest_at_the_top(capsys: pytest.CaptureFixture[str]) -> None:
    write_ini(INI)
    assert why(chat("[opus] hi"), "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["tier"], out["rung"], out["nearest"]) == ("code-ultra", "trigger", None)
    assert why(chat("[opus] hi")) == 0
    assert "Nearest" not in capsys.readouterr().out


def test_why_takes_the_bundled_tiers_where_there_is_no_project(capsys: pytest.CaptureFixture[str]) -> None:
    assert why(chat("hi"), "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert out["tier"] == "code-smart"
    assert set(out["refused"]) == {"code-fast", "plan", "plan-uncensored", "embed"}


def test_why_reads_the_project_s_routing(capsys: pytest.CaptureFixture[str]) -> None:
    write_ini(INI + "high_fidelity_ceiling = 1\nmid_fidelity_ceiling = 2\nultra_triggers = [max]")
    assert why(chat("[max] hello there, all of you"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["rung"] == "trigger"
    assert why(chat("[ultra] hello there, all of you"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["rung"] == "long"


def test_why_says_that_a_name_is_taken_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert why({**chat("hi"), "model": "plan"}, "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["tier"], out["rung"], out["refused"], out["nearest"]) == ("plan", "explicit", {}, None)


@pytest.mark.parametrize(("name", "tier", "reason"), [
    ("gpt-4o", "code-smart", "gpt-4o is auto here: "), ("gpt-4o-mini", "code-fast", "gpt-4o-mini is code-fast here: "),
    ("openai/PLAN:latest", "plan", "openai/PLAN:latest is plan here: ")])
def test_why_knows_every_name_that_the_router_knows(name: str, tier: str, reason: str,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert why({**chat("hi"), "model": name}, "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert out["tier"] == tier
    assert out["reason"].startswith(reason)


def test_why_refuses_a_name_that_the_router_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert why({**chat("hi"), "model": "code-smrat"}) == 1
    assert "there is no model 'code-smrat', did you mean code-smart?" in capsys.readouterr().err


def test_why_reads_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    body = json.dumps(chat("\u5b57" * 40)).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(body)))
    assert llmstack.main(["why", "-", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 10


@pytest.mark.parametrize(("path", "tier", "rung"), [
    (CHAT, "code-smart", "high"), ("/chat/completions/", "code-smart", "high"), ("/v1/messages?beta=true", "code-smart", "high"),
    ("/infill", "code-fast", "fim"), ("/infill/", "code-fast", "fim"), ("/v1/completions", "code-fast", "fim"),
])
def test_why_takes_the_path_into_account(path: str, tier: str, rung: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert why({"prompt": "a", "suffix": "b"}, "--json", "--path", path) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["tier"], out["rung"]) == (tier, rung)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error, once it is sure that there is nothing but it and a hint."""
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    error, hint = err.splitlines()
    assert hint.startswith("hint: ")
    assert error.startswith("llmstack: error: ")
    return error


@pytest.mark.parametrize("body", [
    b"", b"{", b"hello", b'{"model": auto}', b"[]", b'[{"model":"auto"}]', b'"auto"', b"7", b"null", b'{"model":"auto"} x',
    b"\xef\xbb\xbf{}", '{"model":"auto"}'.encode("utf-16"), b'{"prompt":"\xff"}', b"\x00", b"[" * 100_000,
], ids=lambda body: repr(body[:20]))
def test_why_refuses_what_is_no_body_of_a_request(body: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert why(body) == 2
    assert "request.json is not" in refusal(capsys)


@pytest.mark.parametrize("name", ["gone.json", ".", "gone/request.json"])
def test_why_refuses_what_it_cannot_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert llmstack.main(["why", name]) == 2
    assert f"cannot read {name}" in refusal(capsys)


@pytest.mark.parametrize("options", [["--path", "/v1/models"], ["--path", ""], ["--nonsense"], ["--path"]])
def test_why_refuses_other_paths_and_options(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert why(chat("hi"), *options) == 2
    refusal(capsys)


def test_why_refuses_without_a_ladder(capsys: pytest.CaptureFixture[str]) -> None:
    write_ini("[plan]\nrole = plan\npath = plan.gguf\n")
    assert why(chat("hi")) == 1
    assert "no tier in models.ini has the role" in refusal(capsys)


@pytest.mark.parametrize("body", [
    b'{"model":"\\ud800"}', b'{"model":7}', b'{"model":["auto"]}', b'{"prompt":"\\ud800"}',
    b'{"messages":[{"role":"user","content":[{"type":["text"]}]}]}',
    b'{"prompt":' + b"[" * 600 + b"]" * 600 + b"}",
    b'{"messages":[{"role":"user","content":' + b"[" * 600 + b"]" * 600 + b"}]}",
    b'{"tools":' + b'{"a":' * 600 + b"1" + b"}" * 601,
], ids=lambda body: repr(body[:30]))
def test_why_survives_any_json_object(body: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert why(body) in (0, 1, 2)
    assert why(body, "--json") in (0, 1, 2)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_why_is_understood_by_a_terminal_without_unicode(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ini(INI)
    screen = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(screen, encoding=encoding))
    assert why(chat("x" * 4 * 13_240)) == 0
    assert b"1,240 fewer tokens" in screen.getvalue()


# ---- The same value everywhere


def test_the_response_headers_come_from_the_decision() -> None:
    decision: Decision = decide(facts(13_240), WITH_ULTRA)
    lines = llmstack.decision_headers(decision, decision.tier, []).decode().split("\r\n")
    assert lines[:3] == ["X-LLMStack-Model: code-smart", "X-LLMStack-Tokens: 13240", f"X-LLMStack-Reason: {decision.reason}"]


# ---- Purity

SOURCE = Path(llmstack.__file__).read_text(encoding="utf-8")
IMPURE = {"os", "open", "socket", "subprocess", "time", "print", "sys", "threading"}


def sections(source: str) -> dict[str, range]:
    """The banner sections of a file and the lines they take."""
    banners = re.finditer(r"^# =+\n# (.+)\n# =+$", source, re.MULTILINE)
    starts = [(source.count("\n", 0, banner.start()) + 1, banner.group(1)) for banner in banners]
    ends = [line for line, _ in starts[1:]] + [source.count("\n") + 2]
    return {name: range(start, end) for (start, name), end in zip(starts, ends)}


def impurities(source: str) -> Iterator[str]:
    """Each name of the outside world that a section named PURE mentions."""
    pure = {name: lines for name, lines in sections(source).items() if name.startswith("PURE: ")}
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        for name in names:
            for section, lines in pure.items():
                if name.split(".")[0] in IMPURE and getattr(node, "lineno", 0) in lines:
                    yield f"{section}, line {node.lineno}: {name}"     # type: ignore[attr-defined]


def test_the_pure_sections_never_name_the_outside_world() -> None:
    names = {name for name in sections(SOURCE) if name.startswith("PURE: ")}
    assert {"PURE: LADDER", "PURE: MODELS.INI", "PURE: GENERATORS", "PURE: HTTP"} <= names
    assert list(impurities(SOURCE)) == []


@pytest.mark.parametrize("line", ["x = os.sep", "x = open('f')", "import os.path", "from time import sleep", "print(1)",
                                  "def f():\n    import subprocess", "x = [sys for y in z]", "class C(threading.Thread): pass"])
def test_the_test_of_purity_would_notice(line: str) -> None:
    banner = "# ====\n# {}\n# ====\n"
    assert len(list(impurities(banner.format("PURE: A") + line + "\n" + banner.format("B") + "x = os.sep\n"))) == 1
    assert list(impurities(banner.format("A") + line + "\n" + banner.format("PURE: B") + "x = 1\n")) == []
