"""The command line of a tier's llama-server, as the embedded engine asks for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import llmstack


def test_a_llama_server_that_is_gone_since_the_start_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It was an IndexError, and its traceback in the log."""
    Path(".llmstack").mkdir()
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    Path(".llmstack/models.ini").write_text(f"[t]\nrole = fast\npath = {tmp_path / 'm.gguf'}\n")
    places = llmstack.find_places(os.environ)
    llmstack.trust_project(places, "run")
    config = llmstack.load_config(places)
    log = llmstack.Log("", "error")
    monkeypatch.setattr(llmstack, "find_llama_server", lambda *_: ())
    app = llmstack._embedded_app(places, config, log, llmstack.Drafts(places.data, log))
    model = app.engine.models["t"]
    with pytest.raises(llmstack.LoadError, match="t: there is no llama-server on this machine; "):
        app.engine._spawn_server(model, str(tmp_path / "log"))
    with pytest.raises(llmstack.UserError, match="there is no llama-server on this machine"):
        llmstack.probe_flags((), config, places.data)       # as llama-swap's parking asks
