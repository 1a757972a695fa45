"""`start` in a directory that has no models.ini yet."""

from __future__ import annotations

from pathlib import Path

import pytest

import llmstack


@pytest.mark.parametrize(("argv", "channel"), [([], "current"), (["--next"], "next")])
def test_the_channel_asked_for_is_that_of_the_seeded_project(
        argv: list[str], channel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[llmstack.Plan] = []
    monkeypatch.setattr(llmstack, "check_plan", lambda plan: None)
    monkeypatch.setattr(llmstack, "start_stack", lambda plan, *_: bool(plans.append(plan)))
    assert llmstack.main(["start", "--detach", "--profile", "64", *argv]) == 0
    assert Path(".llmstack/models.ini").exists()
    assert [plan.channel for plan in plans] == [channel]
