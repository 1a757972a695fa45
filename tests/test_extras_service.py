"""extras/service.py: what each system is told, and that what it runs stays, ends and says how."""

from __future__ import annotations

import os
import plistlib
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Iterator

import pytest

import llmstack
from tests.test_stack import NO_MODELS, Project, alive, until

ODD = 'a "b" 100% $HOME & <c>\\d'


def manager(name: str) -> object:
    extra = llmstack.load_extra("service")
    places = llmstack.find_places(os.environ)
    return getattr(extra, name)(
        [sys.executable, llmstack.PROGRAM, "service", "run"], places, llmstack
    )


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose path has everything that a format may stumble over."""
    work = tmp_path / ODD
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def unit_lines(text: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(key + "=")]


def test_the_unit_of_systemd(odd: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/models 50%")
    monkeypatch.setenv("LLMSTACK_API_KEY", "secret-of-mine")
    made = manager("systemd")
    assert made.path == str(home / ".config/systemd/user/llmstack.service")
    assert 'Environment="HF_HOME=/models 50%%"' in made.text
    assert unit_lines(made.text, "WorkingDirectory") == [str(odd).replace("%", "%%")]
    assert unit_lines(made.text, "Restart") == ["on-failure"]
    assert "secret-of-mine" not in made.text
    assert "@" not in made.text


def test_systemd_takes_the_unit(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = shutil.which("systemd-analyze")
    if not verify:
        pytest.skip("there is no systemd-analyze")
    work = tmp_path / "a 100% $HOME project"
    work.mkdir()
    monkeypatch.chdir(work)
    path = tmp_path / "llmstack.service"
    path.write_text(manager("systemd").text)
    done = subprocess.run(
        [verify, "--user", "verify", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )
    said = [line for line in done.stderr.splitlines() if "llmstack" in line]
    assert said == []


def test_the_agent_of_launchd(odd: Path, home: Path) -> None:
    made = manager("launchd")
    value = plistlib.loads(made.text.encode())
    assert value["ProgramArguments"] == [sys.executable, llmstack.PROGRAM, "service", "run"]
    assert value["WorkingDirectory"] == str(odd)
    assert value["EnvironmentVariables"]["LLMSTACK_WORK_DIR"] == str(odd)
    assert value["KeepAlive"] == {"SuccessfulExit": False}
    assert made.path == str(home / "Library/LaunchAgents/org.llmstack.plist")


def test_the_task_of_windows(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USERNAME", "A & B")
    made = manager("task")
    root = ElementTree.fromstring(made.text.replace("UTF-16", "UTF-8"))
    texts = {element.tag.partition("}")[2]: element.text for element in root.iter()}
    assert texts["Command"] == sys.executable
    assert texts["WorkingDirectory"] == str(odd)
    assert texts["UserId"] == ".\\A & B"
    assert texts["Arguments"] == f"{llmstack.windows_quote(llmstack.PROGRAM)} service run"
    assert made.text.encode(made.encoding).startswith((b"\xff\xfe", b"\xfe\xff"))


# ---- install, uninstall, status


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A systemctl that notes what it is asked, and fails where the file `fail` is there."""
    directory = tmp_path / "bin"
    directory.mkdir()
    script = directory / "systemctl"
    script.write_text(f"""#!/bin/sh
echo "$@" >> {directory}/asked
if [ -e {directory}/fail ]; then echo "no bus" >&2; exit 1; fi
echo active
""")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    return directory


@pytest.fixture
def models_ini() -> None:
    Path(".llmstack").mkdir()
    Path(".llmstack/models.ini").write_text(NO_MODELS)


@pytest.mark.usefixtures("models_ini")
@pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux'")
def test_install_status_uninstall(
    systemctl: Path,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    unit = home / ".config/systemd/user/llmstack.service"
    assert llmstack.main(["service", "status"]) == 1
    assert llmstack.main(["service", "install"]) == 0
    assert unit.stat().st_mode & 0o777 == 0o600
    assert (systemctl / "asked").read_text().splitlines() == [
        "--user daemon-reload",
        "--user enable --now llmstack.service",
    ]
    capsys.readouterr()
    assert llmstack.main(["service", "status"]) == 0
    assert "state  active" in capsys.readouterr().out
    with monkeypatch.context() as other:
        (tmp_path / "other").mkdir()
        other.chdir(tmp_path / "other")
        assert llmstack.main(["service", "status"]) == 0
    assert "of another project" in capsys.readouterr().out
    assert llmstack.main(["service", "uninstall"]) == 0
    assert not unit.exists()
    assert llmstack.main(["service", "uninstall"]) == 0


@pytest.mark.usefixtures("models_ini")
@pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux'")
def test_a_systemd_that_refuses_is_two_lines(
    systemctl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (systemctl / "fail").write_text("")
    assert llmstack.main(["service", "install"]) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "llmstack: error: systemctl says: no bus"
    assert len(err) == 2
    assert llmstack.main(["service", "uninstall"]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="systemd is Linux'")
def test_where_nothing_can_be_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmstack, "find_program", lambda name: "")
    assert llmstack.main(["service", "install"]) == 1
    assert "there is no systemd here" in capsys.readouterr().err
    Path(".llmstack").mkdir()
    Path(".llmstack/default-channel").write_text("external http://127.0.0.1:9\n")
    assert llmstack.main(["service", "install"]) == 1
    assert "nothing of it is on this machine" in capsys.readouterr().err


# ---- what the service runs


@pytest.fixture
def project() -> Iterator[Project]:
    yield Project()
    llmstack.main(["stop"])


def children(pid: int) -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()
            and f"PPid:\t{pid}\n" in llmstack.read_text(f"/proc/{name}/status")]


@pytest.fixture
def service(project: Project) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, llmstack.PROGRAM, "service", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    while "Stop it with" not in child.stdout.readline():    # the last line of its `start`
        assert child.poll() is None
    until(lambda: not children(child.pid), "its start has ended")
    yield child
    child.kill()
    child.communicate()


def test_it_ends_well_when_the_stack_is_stopped(
    service: subprocess.Popen[str], project: Project
) -> None:
    assert llmstack.main(["restart"]) == 0
    assert service.poll() is None
    assert llmstack.main(["stop"]) == 0
    assert service.wait(timeout=20) == 0


def test_it_fails_when_the_daemon_dies(service: subprocess.Popen[str], project: Project) -> None:
    pid = project.pid("router")
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), "the daemon is dead")
    assert service.wait(timeout=20) == 1


def test_its_end_is_the_stacks(service: subprocess.Popen[str], project: Project) -> None:
    pid = project.pid("router")
    service.send_signal(signal.SIGTERM)
    assert service.wait(timeout=20) == 0
    assert not alive(pid)


def test_a_broken_models_ini_is_not_tried_again(project: Project) -> None:
    project.write("[broken\n")
    done = subprocess.run(
        [sys.executable, llmstack.PROGRAM, "service", "run"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, "see RestartPreventExitStatus"
