"""extras/replay.py: the same requests on another ladder, from nothing but the record."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any, Optional

import pytest

import llmstack

LADDER = """\
[code-fast]
role = fast
path = /fast.gguf
ctx_size = 128k
[code-smart]
role = agent
path = /smart.gguf
ctx_size = 64k
"""
HOSTED = (
    LADDER
    + """\
[code-ultra]
role = ultra
model = provider/large
ctx_size = 200k
"""
)


def row(
    tokens: int, conversation: str = "c", cost: float = 0.0, loop: bool = False, **more: Any
) -> dict[str, Any]:
    """A line of the record, its keys in the order in which the router has them."""
    facts = llmstack.Facts(True, "auto", False, tokens * 4, 0, 0, 0, 1, 0, "")
    decision = llmstack.decide(facts, llmstack.parse_models_ini(LADDER)[0])
    said = json.dumps({"usage": {"prompt_tokens": tokens, "completion_tokens": 100}}).encode()
    outcome = llmstack.Outcome("done", 200, counts=llmstack.tokens_said(said), cost=cost)
    made = llmstack.record_row(facts, "/v1/chat/completions", decision.tier, outcome)
    if loop:
        made["loop"] = True
    made.update(rung=decision.rung, reason=decision.reason, passed_over=decision.passed_over)
    made["conversation"] = conversation
    return {**made, "time": 1.5, "total_s": 1.0, **more}


def write(*rows: Any, name: str = ".llmstack/logs/decisions.jsonl") -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    lines = [
        line if isinstance(line, str) else json.dumps(line, separators=(",", ":")) for line in rows
    ]
    Path(name).write_text("".join(line + "\n" for line in lines))


@pytest.fixture(autouse=True)
def ladder() -> None:
    Path(".llmstack").mkdir()
    Path(".llmstack/models.ini").write_text(LADDER)


def replay(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert llmstack.main(["replay", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_same_ladder_decides_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    write(row(1_000), row(40_000), row(50_000), row(1_000, "d"))
    found = replay(capsys)
    assert found["requests"] == 4
    assert found["rungs"] == {"high": {"code-smart": 2}, "long": {"code-fast": 2}}
    same = {
        "switches": 1,
        "read_anew_tokens": 1_000 + 40_000 + 9_900 + 1_000,
        "overflows": 0,
        "cost": 0,
    }
    assert found["recorded"] == same
    assert found["replayed"] == {**same, "cost_unknown": []}


def test_another_ladder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.ini").write_text(HOSTED + "[ROUTING]\nmid_fidelity_ceiling = 60000\n")
    write(row(1_000), row(40_000), row(50_000))
    found = replay(capsys, "--models-ini", "other.ini")
    assert found["rungs"] == {"high": {"code-ultra": 1}, "mid": {"code-smart": 2}}
    assert found["replayed"]["switches"] == 1
    assert found["replayed"]["cost_unknown"] == ["code-ultra"]


def test_what_a_token_cost_is_what_it_would_cost(capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.ini").write_text(HOSTED)
    write(
        row(900, tier="code-ultra", rung="explicit", cost=0.5),
        row(900, tier="code-ultra", cost=0.5),
        row(1_900),
    )
    found = replay(capsys, "--models-ini", "other.ini")
    assert found["named"] == 1
    assert found["recorded"]["cost"] == 0.5, "of what went to auto"
    assert found["replayed"]["cost"] == pytest.approx(3_000 * (0.5 + 0.5) / 2_000)


def test_a_prompt_larger_than_its_tier_overflows(capsys: pytest.CaptureFixture[str]) -> None:
    write(row(60_000, tier="code-smart", truth=70_000))
    found = replay(capsys)
    assert found["recorded"]["overflows"] == 1
    assert found["replayed"]["overflows"] == 0, (
        "the ladder knows 60,000 and room to answer: code-fast"
    )


def test_what_a_tier_holds_goes_by_the_fuller_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    """The rungs go by characters / 4, which says 30,000 of dense text that is 70,000 tokens."""
    write(row(30_000, estimate=70_000), row(30_000))
    assert replay(capsys)["rungs"] == {"mid": {"code-fast": 1, "code-smart": 1}}


@pytest.mark.parametrize("key", ["trigger", "fim", "pictures", "turns"])
def test_what_decides_beside_the_count(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.ini").write_text(HOSTED)
    value: Any = {"trigger": "[ultra]", "fim": True, "pictures": 1, "turns": 12}[key]
    write(row(40_000, **{key: value}))
    rung, tier = {
        "trigger": ("trigger", "code-ultra"),
        "fim": ("fim", "code-fast"),
        "pictures": ("long", "code-ultra"),
        "turns": ("floor", "code-smart"),
    }[key]
    assert replay(capsys, "--models-ini", "other.ini")["rungs"] == {rung: {tier: 1}}


def test_older_parts_come_first_and_files_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    write(row(1_000))
    write(row(40_000), name=".llmstack/logs/decisions.jsonl.1")
    assert replay(capsys)["recorded"]["switches"] == 1
    assert replay(capsys, ".llmstack/logs/decisions.jsonl.1")["requests"] == 1


def test_the_kinds_of_stay_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """30,000 tokens on code-smart, a tool's result that makes them 40,000, then a question."""
    write(row(30_000), row(40_000, loop=True), row(41_000), row(1_000, "other"))
    assert {name: found["switches"] for name, found in replay(capsys)["stay"].items()} == {
        "no": 1, "loop": 1, "warm": 1}, "at the question, where nothing is known of speeds"
    anew = {name: found["read_anew_tokens"] for name, found in replay(capsys)["stay"].items()}
    assert anew == {
        "no": 30_000 + 40_000 + 900 + 1_000,
        "loop": 30_000 + 9_900 + 41_000 + 1_000,
        "warm": 30_000 + 9_900 + 41_000 + 1_000,
    }
    places = llmstack.find_places(os.environ)
    speeds = llmstack.Speeds(places.data)
    speeds.note("i", "code-fast", "read", 500.0)
    speeds.note("j", "code-smart", "read", 500.0)
    speeds.keep()
    found = replay(capsys)["stay"]
    assert (found["loop"]["switches"], found["warm"]["switches"]) == (1, 0)
    assert found["warm"]["read_anew_tokens"] < found["no"]["read_anew_tokens"]


def routed(outcome: llmstack.Outcome, loop: bool, facts: llmstack.Facts) -> str:
    """A line as the router writes it."""
    made = llmstack.record_row(facts, "/v1/chat/completions", "code-smart", outcome)
    if loop:
        made["loop"] = True
    made.update(rung="mid", reason="it is said", passed_over={}, conversation="c", total_s=1.0)
    return json.dumps(made, separators=(",", ":"))


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("cost", [0.0, 0.00001, 0.25])
@pytest.mark.parametrize("counts", [{}, {"predicted_per_second": 33.3}, {"draft_n": 9}])
def test_a_line_of_the_router_is_read_without_a_parser(
    counts: dict[str, Any], cost: float, loop: bool
) -> None:
    extra = llmstack.load_extra("replay")
    said = {"usage": {"prompt_tokens": 900, "completion_tokens": 100}, "timings": counts}
    told = llmstack.tokens_said(json.dumps(said).encode())
    outcome = llmstack.Outcome("done", 200, counts=told, cost=cost, first_byte_s=0.00049)
    facts = llmstack.Facts(True, "auto", True, 4_000, 0, 0, 2, 3, 500, "[ultra]", 7_000, 1.25)
    line = routed(outcome, loop, facts)
    assert extra.WRITTEN.match(line)
    *found, shape, found_cost, found_loop = extra.fields_of(line)
    *parsed, parsed_shape, parsed_cost, parsed_loop = extra.parsed_fields(line)
    assert (found, found_cost, found_loop) == (parsed, parsed_cost, parsed_loop)
    assert json.loads("{" + shape + "}") == json.loads("{" + parsed_shape + "}")
    assert (found_cost, found_loop) == (cost, loop)


def test_beside_each_limit_the_ladder_is_kept_to(capsys: pytest.CaptureFixture[str]) -> None:
    """A decision is made once for all requests between the same limits."""
    Path("other.ini").write_text(HOSTED + "max_output_tokens = 5000\n")
    config, _ = llmstack.parse_models_ini(Path("other.ini").read_text())
    limits = [config.routing.high_fidelity_ceiling, config.routing.mid_fidelity_ceiling]
    for tier in config.ladder:
        limits += [tier.ctx_size - reserve for reserve in (1_024, 5_000, tier.ctx_size // 4)]
    chance = random.Random(1)
    rows = []
    expected: dict[str, dict[str, int]] = {}
    for _ in range(2_000):
        tokens = chance.choice(limits) + chance.randint(0, 1)
        estimate = chance.choice(limits) + chance.randint(0, 1)
        asked: dict[str, Any] = {
            "turns": config.routing.multi_turn - chance.randint(0, 1),
            "max_tokens": chance.choice([0, 5_000, 90_000]),
            "pictures": chance.choice([0, 0, 1, 90]),
            "fim": chance.random() < 0.1,
            "trigger": chance.choice(["", "", "[ultra]"]),
        }
        rows.append(row(tokens, estimate=estimate, **asked))
        classes = max(estimate - asked["pictures"] * llmstack.PICTURE_TOKENS, 1)
        facts = llmstack.Facts(
            auto=True, model="auto", chars=tokens * 4, wide=0, extra=0, classes=classes, **asked
        )
        decision = llmstack.decide(facts, config)
        tiers = expected.setdefault(decision.rung, {})
        tiers[decision.tier] = tiers.get(decision.tier, 0) + 1
    write(*rows)
    assert replay(capsys, "--models-ini", "other.ini")["rungs"] == expected


def test_what_is_known_of_a_speed_is_the_same_between_two_powers_of_2() -> None:
    speeds = llmstack.Speeds(llmstack.find_places(os.environ).data)
    for per_s, name in enumerate(["read", "read8192", "read32768", "read131072"], 1):
        speeds.note("i", "code-fast", name, float(per_s))
    for bits in range(1, 21):
        first, last = 2 ** (bits - 1), 2**bits - 1
        assert speeds.reading("i", first) == speeds.reading("i", last)
    assert speeds.reading("i", 0) == speeds.reading("i", 1)
    assert speeds.reading("i", 2**20) == 4.0


HOSTILE = [
    "",
    "no JSON",
    "[]",
    "7",
    "null",
    '{"tier":"code-fast"}',
    "[" * 100_000,
    '{"rung":1,"reason":2}',
]


def test_lines_that_are_no_requests_are_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [row(1, tier=value) for value in ([], {})] + [row(1, conversation=[])]
    wrong += [
        {**row(1), key: value}
        for key in ("tokens", "estimate", "turns", "output")
        for value in ("x", [], None, -1, 10**400)
    ]
    write(row(1_000), *HOSTILE, *wrong, '{"time":1,')
    assert llmstack.main(["replay"]) == 0
    out, err = capsys.readouterr()
    assert "high         1           1" in out
    assert f"{len(HOSTILE) + len(wrong) + 1} lines are no requests" in err


def test_two_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    write(row(1_000), row(40_000), row(2, rung="explicit"))
    assert llmstack.main(["replay"]) == 0
    assert (
        capsys.readouterr().out
        == """\
rung  requests  code-smart  code-fast
high         1           1          0
long         1           0          1

           as recorded  replayed  stay = no  stay = loop  stay = warm
switches             1         1          1            1            1
read anew       41,000    41,000     41,000       41,000       41,000
overflows            0         0          0            0            0
1 more asked for a tier by its name.
"""
    )


@pytest.mark.parametrize(
    ("words", "said", "record"),
    [
        ([], "there is no ", None),
        (["none.jsonl"], "cannot read none.jsonl: No such file or directory", None),
        (["--models-ini", "none.ini"], "there is no none.ini", "{}"),
        ([], "the record holds no request to auto", "{}"),
    ],
)
def test_errors(
    words: list[str], said: str, record: Optional[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if record is not None:
        write(record)
    assert llmstack.main(["replay", *words]) in (1, 2)
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("llmstack: error: " + said)
    assert len(err) == 2
