"""`service` under a real systemd: a user manager in namespaces of its own, where the system lets us."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmstack
from tests.test_stack import free_ports

SYSTEMD = "/lib/systemd/systemd"
SPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--cgroup"]
# /run/systemd/system says to systemd that it has booted the machine.
SCRIPT = r"""
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system "$XDG_RUNTIME_DIR"
chmod 700 "$XDG_RUNTIME_DIR"
"$SYSTEMD" --user --log-level=warning > "$HOME/systemd.log" 2>&1 &
until [ -S "$XDG_RUNTIME_DIR/systemd/private" ]; do kill -0 $!; sleep 0.1; done
of() { systemctl --user show llmstack.service --value -p "$1"; }
up() { until curl -fs "http://127.0.0.1:$PORT/v1/models" > /dev/null; do sleep 0.2; done; }
"$PYTHON" "$PROGRAM" service install
up
echo "state $(of ActiveState)"
kill -9 "$(of MainPID)"
until [ "$(of NRestarts)" = 1 ]; do sleep 0.2; done
up
echo "again $(of NRestarts) $(of ActiveState)"
"$PYTHON" "$PROGRAM" service status
"$PYTHON" "$PROGRAM" service uninstall
until ! curl -fs "http://127.0.0.1:$PORT/v1/models" > /dev/null; do sleep 0.2; done
echo "left $(systemctl --user list-units 'llmstack*' --no-legend | wc -l)"
"""


def may_have_spaces() -> bool:
    tools = all(map(shutil.which, ("unshare", "systemctl", "curl")))
    if not tools or not os.path.exists(SYSTEMD):
        return False
    asked = [*SPACES, "mount", "-t", "tmpfs", "tmpfs", "/run"]
    return subprocess.run(asked, capture_output=True, check=False, timeout=60).returncode == 0


def test_a_real_systemd_starts_it_and_starts_it_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux" or not may_have_spaces():
        pytest.skip("no systemd here, or no namespaces for us")
    router, engine = free_ports(2)
    Path(".llmstack").mkdir()
    Path(".llmstack/models.ini").write_text(
        f"[DEFAULT]\nengine = embedded\nrouter_port = {router}\nengine_port = {engine}\n"
        "[far]\nrole = agent\nbase_url = http://127.0.0.1:9/v1\nmodel = m\n")
    llmstack.trust_project(llmstack.find_places(os.environ))
    for name, value in (("SYSTEMD", SYSTEMD), ("PYTHON", sys.executable), ("PROGRAM", llmstack.PROGRAM),
                        ("PORT", str(router)), ("XDG_RUNTIME_DIR", "/run/user/0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    done = subprocess.run([*SPACES, "bash", "-c", SCRIPT], capture_output=True, text=True, check=False,
                          timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("^state active$", done.stdout, re.MULTILINE)
    assert re.search("^again 1 active$", done.stdout, re.MULTILINE)
    assert re.search("^state +active$", done.stdout, re.MULTILINE)
    assert re.search("^left 0$", done.stdout, re.MULTILINE)
