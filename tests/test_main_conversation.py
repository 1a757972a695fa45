"""The main conversation keeps its place beside side requests, on a real llama-server."""

from __future__ import annotations

from typing import Dict, List

import pytest

from tests.test_parking import (  # noqa: F401  # fixtures
    RealStage,
    conversation,
    real,
)


def after_side_requests(stage: RealStage, model: str) -> List[int]:
    """[tokens before, cached at the next turn], with five side requests of the same system text."""
    system: List[Dict[str, str]] = [{"role": "system", "content": conversation("s", 60)[0]["content"]}]
    main = [*system, *conversation("m", 200)]
    tokens, _ = stage.turn(model, main)
    for number in range(5):
        stage.turn(model, [*system, *conversation(f"t{number}", 20)])
    _, cached = stage.turn(model, main)
    return [tokens, cached]


@pytest.mark.parametrize("slots", [1, 4])
def test_side_requests_with_the_same_system_text_push_nothing_out(
        real: RealStage, slots: int) -> None:  # noqa: F811
    real.config = real.config._replace(server=(("parallel", slots),) if slots == 1 else ())
    tokens, cached = after_side_requests(real, "code-smart")
    assert cached >= tokens - 1, real.log()
