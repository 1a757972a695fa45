"""What leaving a tier costs, [ROUTING] stay, and who broke the cache."""

from __future__ import annotations

import json
from typing import Any, Dict, List, Tuple

import pytest

import llmstack
from llmstack import Counts, Leaving, Pace
from tests.scripted import always, answer
from tests.test_fallback import wait_for
from tests.test_router import (  # noqa: F401  # fixtures
    CONFIG,
    Rig,
    Start,
    nothing_left_behind,
    post,
    start,
)

IDENTITY = "a" * 24


def said(role: str, content: object, **more: object) -> Dict[str, Any]:
    return {"role": role, "content": content, **more}


# ---- the end of tool calls


LOOPS = {
    "OpenAI's": ([said("user", "go"), said("assistant", None), said("tool", "12")], True),
    "Anthropic's": ([said("user", [{"type": "tool_result", "content": "12"}])], True),
    "of /v1/responses": ([{"type": "function_call_output", "output": "12"}], True),
    "a question": ([said("tool", "12"), said("user", "and then?")], False),
    "a question beside a result": (
        [said("user", [{"type": "tool_result"}, {"type": "text", "text": "stop"}])], False),
    "nothing": ([], False),
    "no message": (["x"], False),
}


@pytest.mark.parametrize(("messages", "loop"), LOOPS.values(), ids=LOOPS.keys())
def test_a_loop_is_what_brings_back_a_tools_result(messages: List[Any], loop: bool) -> None:
    assert llmstack.in_tool_loop({"messages": messages}) is loop
    assert llmstack.in_tool_loop({"input": messages}) is loop


# ---- what a switch costs


def test_a_switch_costs_what_is_read_anew_and_the_load() -> None:
    here = Pace(1_000.0, 5.0, loaded=True)
    there = Pace(500.0, 8.0)
    assert llmstack.leaving_cost(10_001, here, 10_000, there, 0) == pytest.approx(28.0, abs=0.1)
    assert llmstack.leaving_cost(10_001, here, 10_000, there._replace(loaded=True), 9_001) == (
        pytest.approx(2.0, abs=0.1))


def test_what_is_gone_from_memory_counts_nothing_unless_it_is_parked() -> None:
    gone, there = Pace(1_000.0, 5.0), Pace(1_000.0, 5.0, loaded=True)
    assert llmstack.leaving_cost(10_000, gone, 10_000, there, 0) == 0
    assert llmstack.leaving_cost(10_000, gone._replace(keeps=True), 10_000, there, 0) == (
        pytest.approx(5.0, abs=0.1))


def test_an_unknown_speed_makes_no_number() -> None:
    leaving = Leaving("code-smart", 18_400, llmstack.leaving_cost(9, Pace(9.0), 9, Pace(), 0))
    assert leaving.words("code-fast") == "leaves 18,400 tokens warm on code-smart"
    known = leaving._replace(cost_s=26.2).words("code-fast")
    assert known.endswith("; this turn takes about 26 s longer on code-fast")


# ---- stay


def decided(tokens: int, stay: str, **facts: Any) -> llmstack.Decision:
    routing = CONFIG.routing._replace(stay=stay)
    found = llmstack.Facts(True, "auto", False, tokens * 4, 0, 0, 0, 1, 0, "")
    return llmstack.decide(found._replace(**facts), CONFIG._replace(routing=routing))


STAYS = {
    "no: the ladder": ("no", True, 99.0, False),
    "loop, amid tool calls": ("loop", True, 0.0, True),
    "loop, at a question": ("loop", False, 99.0, False),
    "warm, amid tool calls": ("warm", True, 0.0, True),
    "warm, where leaving is dear": ("warm", False, 10.1, True),
    "warm, where it is cheap": ("warm", False, 10.0, False),
}


@pytest.mark.parametrize(("stay", "loop", "cost_s", "stays"), STAYS.values(), ids=STAYS.keys())
def test_stay_keeps_a_conversation_where_it_is(
        stay: str, loop: bool, cost_s: float, stays: bool) -> None:
    ladder = decided(30_000, stay)
    assert ladder.tier == "code-smart"
    found = llmstack.stay_or_go(ladder, Leaving("code-fast", 30_000, cost_s), loop)
    if not stays:
        assert found == ladder
        return
    assert found.tier == found.chain[0].name == "code-fast"
    assert found.chain[1].name == "code-smart"
    assert found.reason.startswith(ladder.reason + "; stays on code-fast, ")
    assert found.refused["code-smart"].startswith("the conversation stays on code-fast, ")


def test_no_conversation_stays_where_it_does_not_fit_or_no_answer_comes() -> None:
    ladder = decided(30_000, "warm")
    assert llmstack.stay_or_go(ladder, Leaving("code-ultra", 9, 99.0), True) is ladder  # 24,000
    down = ladder._replace(down={"code-fast": "answered 503"})
    assert llmstack.stay_or_go(down, Leaving("code-fast", 9, 99.0), True) is down
    assert llmstack.stay_or_go(ladder, Leaving("gone", 9, 99.0), True) is ladder


def test_a_trigger_has_its_way() -> None:
    ladder = decided(1_000, "warm", trigger="[ultra]")
    assert llmstack.stay_or_go(ladder, Leaving("code-fast", 9, 99.0), True) is ladder


def test_stay_is_read_from_models_ini() -> None:
    tier = "[code-fast]\nrole = fast\npath = /f.gguf\n"
    config, _ = llmstack.parse_models_ini(tier + "[ROUTING]\nstay = warm\nstay_s = 3\n")
    assert (config.routing.stay, config.routing.stay_s) == ("warm", 3)
    assert llmstack.parse_models_ini(tier)[0].routing.stay == "no"
    with pytest.raises(llmstack.UserError):
        llmstack.parse_models_ini(tier + "[ROUTING]\nstay = yes\n")


# ---- who broke the cache


def body(*messages: Dict[str, Any], **more: Any) -> Dict[str, Any]:
    return {"messages": [said("system", "s" * 100), *messages], **more}


TURN = (said("user", "u" * 100), said("assistant", "a" * 100))
NEXT = {
    "goes on": (body(*TURN, said("user", "b")), ""),
    "another system text": (
        {"messages": [said("system", "t"), *TURN, said("user", "b")]}, "system text"),
    "other tools": (body(*TURN, said("user", "b"), tools=[{"x": 1}]), "tools"),
    "another first message": (body(said("user", "v"), TURN[1], said("user", "b")), "message 1"),
    "another answer": (body(TURN[0], said("assistant", "c"), said("user", "b")), "message 2"),
    "marks of a provider's cache": (
        body(said("user", [{"type": "text", "text": "u" * 100,
                            "cache_control": {"type": "ephemeral"}}]), TURN[1],
             said("user", "b")), ""),
}


@pytest.mark.parametrize(("following", "where"), NEXT.values(), ids=NEXT.keys())
def test_the_first_difference_is_told_by_its_place(
        following: Dict[str, Any], where: str) -> None:
    before = llmstack.prompt_segments(body(*TURN))
    share, found = llmstack.same_beginning(before, llmstack.prompt_segments(following))
    assert found == where
    assert (share == 1.0) is (where == "")


def test_anthropics_marks_move_and_change_nothing() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    system = [{"type": "text", "text": "s"}]
    parts = [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]
    marked = [parts[0], {**parts[1], **mark}]
    before = {"system": [{**system[0], **mark}], "messages": [said("user", marked)]}
    after = {"system": system, "messages": [said("user", parts)]}
    assert llmstack.prompt_segments(before) == llmstack.prompt_segments(after)


def test_side_requests_of_a_session_are_no_turns_of_its_conversation() -> None:
    named = {b"session_id": b"one"}
    main, title = body(*TURN), body(said("user", "a title, please"))
    conversation, thread = llmstack.conversation_keys(named, main)
    assert conversation == llmstack.conversation_keys(named, title)[0] == "one"
    assert thread != llmstack.conversation_keys(named, title)[1]
    assert thread == llmstack.conversation_keys(named, body(*TURN, *TURN))[1]
    assert llmstack.conversation_keys({}, {}) == ("", "")


# ---- through the router


class Rows(llmstack.Recorder):
    """The record, kept in memory."""

    def __init__(self) -> None:
        super().__init__("")
        self.rows: List[Dict[str, Any]] = []

    def add(self, row: Dict[str, Any]) -> None:
        self.rows.append(row)


def counted(prompt: int, cached: int) -> bytes:
    timings = {"prompt_n": prompt - cached, "cache_n": cached, "predicted_n": 5}
    return answer(json.dumps({"timings": timings}).encode(), "200 OK",
                  "Content-Type: application/json")


def turns(rig: Rig, rows: Rows, *bodies: Dict[str, Any]) -> List[Any]:
    """The answers to these bodies, each noted before the next is asked."""
    answers = []
    for number, value in enumerate(bodies, 1):
        answers.append(rig.ask(post({"prompt_cache_key": "one", **value})))
        wait_for(lambda count=number: len(rows.rows) == count, "a row")
    return answers


def routed(start: Start, stay: str) -> Tuple[Rig, Rows]:  # noqa: F811
    """A router whose tiers read 1,000 tokens a second; an answer counts 20,000 tokens."""
    rows = Rows()
    rig = start(always(counted(20_000, 0)), record=rows)
    config = CONFIG._replace(routing=CONFIG.routing._replace(stay=stay))
    rig.app._snapshot = rig.app._adopt(config, {}, {})
    rig.app.behind.pace = (                                 # type: ignore[method-assign]
        lambda name, tokens: Pace(1_000.0, 1.0, loaded=True))
    return rig, rows


LONG = "word " * 13_600                         # 17,000 tokens: ultra holds them, and is left
GROWN = (body(said("user", "go")),
         body(said("user", "go"), said("assistant", LONG), said("user", "on")))


def test_a_switch_is_said_and_recorded(start: Start) -> None:  # noqa: F811
    rig, rows = routed(start, "no")
    first, second = turns(rig, rows, *GROWN)
    assert first.header("x-llmstack-switch") == ""
    assert "left" not in rows.rows[0]
    left = rows.rows[1]["left"]
    assert (left["tier"], left["tokens"]) == ("code-ultra", 20_005)
    assert left["cost_s"] > 10
    assert second.header("x-llmstack-model") == rows.rows[1]["tier"] != "code-ultra"
    assert second.header("x-llmstack-switch").startswith("leaves 20,005 tokens warm on code-ultra;")


def test_turns_tell_what_the_client_kept(start: Start) -> None:  # noqa: F811
    rig, rows = routed(start, "no")
    turn = said("user", "go")
    turns(rig, rows, body(turn), body(turn, said("assistant", "a"), said("user", "b")),
          {"messages": [said("system", "now"), turn, said("user", "c"), said("user", "d"),
                        said("user", "e")]})
    first, second, third = rows.rows
    assert "same" not in first
    assert (second["same"], second["differs"], second["held"]) == (1.0, "", 20_005)
    assert (third["same"], third["differs"]) == (0.0, "system text")


def test_a_tier_asked_by_name_is_recorded_too(start: Start) -> None:  # noqa: F811
    rig, rows = routed(start, "no")
    turn = said("user", "go")
    turns(rig, rows, body(turn, model="code-fast"),
          body(turn, said("assistant", "a"), said("user", "b"), model="code-fast"))
    assert (rows.rows[1]["same"], rows.rows[1]["held"]) == (1.0, 20_005)


def test_replay_finds_what_it_reads_before_the_reason(start: Start) -> None:  # noqa: F811
    """It parses no line further."""
    rig, rows = routed(start, "loop")
    turns(rig, rows, GROWN[0], body(said("user", "go"), said("assistant", "a"), said("tool", "1")))
    assert rows.rows[1]["loop"]
    for row in rows.rows:
        assert llmstack.load_extra("replay").WRITTEN.match(json.dumps(row, separators=(",", ":")))


def test_warm_stays(start: Start) -> None:  # noqa: F811
    rig, rows = routed(start, "warm")
    _, second = turns(rig, rows, *GROWN)
    assert [row["tier"] for row in rows.rows] == ["code-ultra", "code-ultra"]
    assert "stays on code-ultra, leaving it costs about " in second.header("x-llmstack-reason")
    assert second.header("x-llmstack-switch") == ""
    assert "left" not in rows.rows[1]


def test_a_loop_does_not_change_the_tier(start: Start) -> None:  # noqa: F811
    rig, rows = routed(start, "loop")
    loop = body(said("user", "go"), said("assistant", LONG), said("tool", "12"))
    after = body(*loop["messages"][1:], said("user", "on"))
    turns(rig, rows, GROWN[0], loop, after)
    assert [row["tier"] for row in rows.rows] == ["code-ultra", "code-ultra", "code-smart"]
    assert [row.get("loop") for row in rows.rows] == [None, True, None]


# ---- speeds


def test_reading_is_learned_by_the_size_of_the_prompt(tmp_path: Any) -> None:
    speeds = llmstack.Speeds(str(tmp_path))
    assert speeds.reading(IDENTITY, 100) == 0
    speeds.note_answer(IDENTITY, "m", Counts(50_000, 40_000, 5, 200.0, 9.0))
    assert speeds.reading(IDENTITY, 100) == 200.0, "what is known is better than nothing"
    speeds.note_answer(IDENTITY, "m", Counts(1_000, 0, 500, 800.0, 30.0))
    assert [speeds.reading(IDENTITY, n) for n in (100, 9_000, 40_000, 200_000)] == (
        [800.0, 800.0, 200.0, 200.0])
    assert speeds.get(IDENTITY, "written") == 30.0


def test_speeds_are_kept_bounded_and_found_by_the_models_name(tmp_path: Any) -> None:
    speeds = llmstack.Speeds(str(tmp_path))
    for number in range(llmstack.MAX_LEARNED + 3):
        speeds.note(f"i{number}", "m" if number < 60 else "n", "load", 2.0)
    speeds.keep()
    found = llmstack.Speeds(str(tmp_path))
    assert len(json.loads((tmp_path / "speeds.json").read_text())) == llmstack.MAX_LEARNED
    assert (found.identity_of("m"), found.identity_of("x")) == ("i59", "")
    assert found.load_s("i59") == 2.0


def test_a_damaged_file_of_speeds_is_begun_anew(tmp_path: Any) -> None:
    (tmp_path / "speeds.json").write_text('{"a": 5, "b": {"read": "fast"}, "c": [')
    assert llmstack.Speeds(str(tmp_path)).reading("b", 1) == 0
    (tmp_path / "speeds.json").write_text('{"a": 5, "b": {"read": "fast", "model": "m"}}')
    speeds = llmstack.Speeds(str(tmp_path))
    assert (speeds.reading("a", 1), speeds.reading("b", 1)) == (0, 0)
    assert speeds.identity_of("m") == "b"
